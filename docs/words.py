"""Counts the words that this project does not use, by directory; exit code 1 if there is one.

    python docs/words.py                            # counts in src, research, docs, tests and the pages beside them
    python docs/words.py src/jacmatch/objectives    # each line with such a word in this directory, then the counts
    python docs/words.py --lines                    # each line, everywhere

A reader who knows PyTorch should meet the standard term only. `TERMS` gives for each word the standard term and where
the word counts: as a part of a *name* (`_asked_rows`, `AskedRows`), in *text* (docstrings, comments, messages, pages),
or in both. Many of the words are ordinary English in a sentence ("the file is kept") and confusing as the name of a
variable (`kept`): these count as names only. `ORDINARY` lists the phrases that do not count, and `EXCEPTIONS` the files
in which a word is somebody else's name.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("src", "research", "docs", "tests", "benchmarks", "README.md", "CONTRIBUTING.md")
SUFFIXES = {".py", ".md"}
SKIPPED = ("docs/words.py", "docs/results/*/*", "docs/changelog.md", "tests/architecture/test_language.py")

BOTH, NAME, TEXT = "name or text", "name", "text"


@dataclass(frozen=True)
class Term:
    """A word (a regular expression of one or two words), what to write in its stead, and where it counts."""

    word: str
    instead: str
    where: str = BOTH


TERMS = (
    Term("slopes?", "Jacobian, derivatives, gradient; partials in surrogates"),
    Term("told", "teacher_outputs, reported"),
    Term("asked", "query, requested"),
    Term("asks|asking", "query, request", NAME),
    Term("found", "result", NAME),
    Term("kept", "cached", NAME),
    Term("settled", "resolve, converged"),
    Term("said", "message, reported"),
    Term("dealt", "make_batches"),
    Term("gates?", "pre-flight check"),
    Term("rehears(al|als|e|es|ed)", "side-effect-free evaluation"),
    Term("trials?", "engine benchmark, measurement"),
    Term("examin(e|es|ed|ing)", "check, validate, diagnose"),
    Term("guard(s|ed)?", "check, validate"),
    Term("strangers?", "unregistered parameters"),
    Term("places?", "device", NAME),
    Term("rooms?", "space, tolerance"),
    Term("ways? out", "remedy"),
    Term("mild(ly)?", "loose"),
    Term("bent", "non-smooth"),
    Term("pull(s|ed)?", "vjp_products", NAME),
    Term("push(es|ed)?", "jvp_products", NAME),
    Term("closeness", "teacher_distance"),
    Term("depths", "layer_pairs"),
    Term("sheets?", "jacobian_figure"),
    Term("remainders?", "expansion_error", NAME),
    Term("narrow", "last_layer_factorization, small", NAME),
    Term("held", "held_out, stored", NAME),
    Term("written out", "op_replacements"),
    Term("remembered", "memoized", NAME),
    Term("houses?", "rules, style"),
)
# Classes that were renamed. Their words ("share", "ranks") are ordinary, so the whole name is compared.
CLASSES = {
    "Share": "GradientShare",
    "Balance": "LossWeights",
    "Ranks": "ProcessGroup",
    "Crew": "ProcessGroup",
    "RememberedTeacher": "MemoizedTeacher",
}

# Phrases in which a word is what everybody calls the thing. They are taken out before a line is searched.
ORDINARY = re.compile(
    r"""negative[_ ]slope          # torch.nn.LeakyReLU
    | held[_ -]out                 # data kept back for validation
    | torch\.narrow | \.narrow\b | \bnarrow_copy\b | as_strided
    | data[ _]sheets? | read[_ ]excel
    | placeholders?
    | largest[_ ]remainder        # the method of apportionment
    | (Module|File|Package)NotFoundError | in[_-]place(?![ ]of)
    | (forget|input|output|update|reset)[ ]gates? | gated | gates[ ]of[ ]an[ ]LSTM
    | torch\._guards
    | (fitted|log[-–]log)[ ]slopes? | slopes?[ ]of[ ](the[ ](fit|line)|log) | slopes[ ]over[ ]the[ ]three[ ]smallest
    | --trial\b                   # an option of RepDistiller
    """,
    re.VERBOSE | re.IGNORECASE,
)
EXCEPTIONS: dict[str, tuple[str, ...]] = {
    "src/jacmatch/report/page.py": ("sheet",),  # file name of version 0.1
    "tests/report/test_report.py": ("sheet",),
    "src/jacmatch/report/figures.py": ("slopes",),  # labels in results of version 0.1
    "src/jacmatch/surrogates/modules.py": ("slopes",),  # the former name of an argument
    "src/jacmatch/jobs/surrogate/*.py": ("slopes", "trial", "bent"),  # flags, and fields of results
    "src/jacmatch/jobs/transfer.py": ("depths", "slope"),  # a flag, and a field of result.json
    "src/jacmatch/jobs/transfer_results.py": ("slope",),  # a field of result.json
    "src/jacmatch/former_names.py": ("gate", "trial", "examine", "examined", "pull"),  # names of version 0.1
    "src/jacmatch/teachers/cached/writer.py": ("found",),  # a field of result.json
    "src/jacmatch/teachers/ensemble.py": ("asked", "remembered"),  # names of version 0.1
    "src/jacmatch/training/identity.py": ("slopes",),
    "src/jacmatch/diagnostics/preflight.py": ("way out",),
    "src/jacmatch/jacobian/findings.py": ("way out",),
    "src/jacmatch/jacobian/rules/base.py": ("push",),  # a function of functorch
    "tests/objectives/test_base.py": ("Share", "Balance"),  # former names of classes
    "tests/diagnostics/test_findings.py": ("pull", "way out"),  # former names
    "tests/training/test_identity.py": ("slopes",),  # settings in checkpoints of version 0.1
    "tests/jobs/test_transfer.py": ("slope",),  # a field of result.json
    "tests/test_former_names.py": ("trial",),  # names of version 0.1
    "tests/jobs/test_cache_building.py": ("found",),  # a field of result.json
    "tests/jobs/surrogate/test_command.py": ("slopes", "trial"),  # flags, and fields of results
    "tests/surrogates/test_modules.py": ("slopes",),  # the former name of an argument
    "tests/integrations/test_models_by_name.py": ("depths",),  # of a configuration of transformers
    # settings and measures in committed results
    "research/src/jacmatch_research/reproduce/surrogate.py": ("slopes", "asked"),
    "research/tests/reproduce/test_surrogate_experiment.py": ("slopes", "asked"),
    "research/src/jacmatch_research/reproduce/propositions.py": ("slope",),
    "research/tests/reproduce/test_propositions.py": ("slope",),
    "research/src/jacmatch_research/reproduce/transfer.py": ("depths", "slope", "closeness"),
    "research/src/jacmatch_research/systems/steering/control.py": ("settled",),  # keys of stored results
    "research/src/jacmatch_research/reproduce/steering.py": ("settled",),
    "research/src/jacmatch_research/reproduce/pricing.py": ("slopes",),
}  # glob of paths: the words that may stand there

_TOKENS = re.compile(
    r"""\#[^\n]* | [rbuf]{0,2}(?:\"{3}(?:[^\\]|\\.)*?\"{3} | '{3}(?:[^\\]|\\.)*?'{3}
    | "(?:[^"\\\n]|\\.)*" | '(?:[^'\\\n]|\\.)*') | (?P<name>(?:\.[ \t]*)?[^\W\d]\w*)""",
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)  # comments, strings, and names with the dot before them: faster than the module `tokenize`
_PIECES = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")
_WORDS = re.compile(r"\w+")
_CODE = re.compile(r"``?[^`\n]+``?")


@dataclass(frozen=True)
class Hit:
    """A word of the list: the file, the line, the word as it is written there, and the term it belongs to."""

    path: Path
    line: int
    word: str
    term: str
    text: str


def pieces(name: str) -> str:
    """The words of an identifier, in lower case and with spaces between them.

    >>> pieces("_askedRows"), pieces("WRITTEN_OUT"), pieces("JVPPush")
    ('asked rows', 'written out', 'jvp push')
    """
    return " ".join(_PIECES.findall(name)).lower()


def _fragments(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line, kind (name or text) and content of everything in a file that has words."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        block = False
        for number, line in enumerate(source.splitlines(), 1):
            block ^= line.lstrip().startswith("```")
            yield from ((number, NAME, code) for code in ([line] if block else _CODE.findall(line)))
            yield number, TEXT, line
        return
    number, end = 1, 0
    for match in _TOKENS.finditer(source):
        number, end = number + source.count("\n", end, match.start()), match.start()
        if match["name"]:
            yield number, NAME, re.sub(r"\s", "", match["name"])
        else:
            yield from ((number + offset, TEXT, line) for offset, line in enumerate(match[0].splitlines()))


def _pattern(kind: str) -> re.Pattern[str]:
    """All terms that count in names, or in text, as one expression with a group for each."""
    return re.compile("|".join(rf"\b(?P<t{i}>{t.word})\b" for i, t in enumerate(TERMS) if t.where in (BOTH, kind)))


_PATTERNS = {kind: _pattern(kind) for kind in (NAME, TEXT)}
_ANY = re.compile("|".join((*(t.word.replace(" ", ".{0,9}") for t in TERMS), *CLASSES)), re.IGNORECASE)  # a quick look


def hits(path: Path) -> Iterator[Hit]:
    """The words of the list in one file; a word that counts in names and in text is counted once where it is both."""
    where = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()
    allowed = {word for glob, words in EXCEPTIONS.items() if fnmatch(where, glob) for word in words}
    text = path.read_text(encoding="utf-8")
    if not _ANY.search(text):
        return
    lines = text.splitlines()
    seen: set[tuple[int, str, str]] = set()
    for number, kind, content in _fragments(path):
        if not _ANY.search(content):
            continue
        names = _WORDS.findall(ORDINARY.sub(" ", content))
        matches = [(name, name) for name in names if name in CLASSES and (kind == NAME or f"`{name}" in content)]
        for match in _PATTERNS[kind].finditer(pieces(" ".join(names))):
            matches.append((match[0], TERMS[int(str(match.lastgroup)[1:])].word))
        for word, term in matches:
            if word in allowed or (path.suffix == ".md" and (number, word, kind) in seen):
                continue
            seen |= {(number, word, TEXT)} if path.suffix == ".md" and kind == NAME else set()
            yield Hit(path, number, word, term, lines[number - 1].strip())


def files(parts: list[Path]) -> Iterator[Path]:
    """The Python files and pages of these directories."""
    for part in parts:
        for path in [part] if part.is_file() else sorted(part.rglob("*")):
            where = path.resolve().relative_to(ROOT).as_posix() if path.resolve().is_relative_to(ROOT) else str(path)
            if path.suffix in SUFFIXES and not any(fnmatch(where, each) for each in SKIPPED):
                yield path.resolve()


def main() -> int:
    """Prints the counts, and the lines if directories are named."""
    parser = argparse.ArgumentParser(description="Counts the words that this project does not use.")
    parser.add_argument("paths", nargs="*", type=Path, help="files and directories; without one, all counts")
    parser.add_argument("--lines", action="store_true", help="print each line, also without paths")
    arguments = parser.parse_args()
    parts = arguments.paths or [ROOT / part for part in PARTS if (ROOT / part).exists()]
    counts: dict[str, Counter[str]] = {}
    for part in parts:
        for path in files([part]):
            for hit in hits(path):
                counts.setdefault(hit.term, Counter())[str(part)] += 1
                if arguments.paths or arguments.lines:
                    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
                    print(f"{shown}:{hit.line}: {hit.word}: {hit.text}")
    instead = {term.word: term.instead for term in TERMS} | CLASSES
    heads = [part.name if part.is_relative_to(ROOT) else str(part) for part in parts]
    print(f"\n{'word':28}" + "".join(f"{head[:14]:>15}" for head in heads) + "   write")
    for term, each in sorted(counts.items(), key=lambda pair: -pair[1].total()):
        numbers = "".join(f"{each[str(part)]:15}" for part in parts)
        print(f"{term:28}{numbers}   {instead[term]}")
    total = sum(each.total() for each in counts.values())
    print(f"{total} words of the list")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
