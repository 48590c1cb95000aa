"""From the words of a command line to an exit code: 0 done, 2 a mistake to mend, 1 a defect of ours, 130 stopped."""

import contextlib
import dataclasses
import difflib
import errno
import importlib.util
import json
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jacmatch import plugins
from jacmatch.cli.verbs import verbs
from jacmatch.errors import ElsewhereError, InputError, Stopped, UnsupportedError
from jacmatch.version import __version__

_FULL = (errno.ENOSPC, errno.EDQUOT)
_PATHS = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS)  # of a user's path
_HELP = ("-h", "--help", "--help-all")
_EXTRA = ("tyro", "rich", "yaml", "lightning_fabric", "safetensors", "matplotlib")  # what every verb brings


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `jacmatch` with these words, after doing what they say.

    What the user can mend is one line on stderr and 2; Ctrl-C and SIGTERM are one line and 130; anything else that is
    raised is a defect of ours: its traceback, and 1.

    Args:
        argv: The words after the program's name; those of this process if None.

    Example:
        >>> main(["--version"])  # doctest: +ELLIPSIS
        jacmatch ...
        0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    verb = words[0] if words else "--help"
    if verb == "--version":
        print(f"jacmatch {__version__}")
        return 0
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        rule = f"jacmatch: the command line needs the extra train; not installed: {', '.join(missing)}."
        print(f"{rule} Run: pip install 'jacmatch[train]'.", file=sys.stderr)
        return 2
    if verb in _HELP:
        _print_help()
        return 0
    job = _Job(f"jacmatch {verb}" if verb in verbs() else "jacmatch", "--traceback" in words)
    try:
        with _terminated_as_interrupted():
            return job.run(verb, words[1:])
    except KeyboardInterrupt:
        return job.say(f"interrupted. {job.left()}", 130)
    except ElsewhereError as error:
        left = job.left()
        return job.say(f"{error.says} {left}", error.code) if error.says else error.code
    except (InputError, UnsupportedError) as error:
        left = job.left()
        return job.say(f"{error} {left}" if isinstance(error, Stopped) else str(error), 2)
    except BrokenPipeError:  # the reader of our output has gone, as in `jacmatch list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            return job.say(f"the disk is full ({error.filename}). Free some space. {job.left()}", 2)
        if isinstance(error, OSError) and error.errno in _PATHS and error.filename:
            job.left()
            return job.say(f"{error.filename} must be a path that can be used. Got '{error.strerror}'.", 2)
        traceback.print_exc()
        job.left()
        return job.say("this is a defect of jacmatch. Please report it with the lines above.", 1)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Within the block SIGTERM, by which a cluster takes a machine back, is what Ctrl-C is."""
    usual = threading.current_thread() is threading.main_thread()
    usual = usual and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if usual:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if usual:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@dataclasses.dataclass
class _Job:
    """What is known about a command while it runs, for the line that ends it."""

    program: str
    traceback: bool
    out: Path | None = None
    keeps: tuple[str, ...] = ("checkpoint.pt", "result.json")  # what is worth keeping of a job that was cut off
    numbered: bool = False  # --out was left out, and a folder was chosen
    fresh: bool = False  # the run folder was absent or empty before
    made: Sequence[Path] = ()  # the run folder and its parents, those that were not there before
    met: bool = False  # a mistake is that of one of several processes, and not that of each

    def run(self, verb: str, words: Sequence[str]) -> int:
        """Does what the words say, and prints what came of it."""
        known = verbs()
        if verb not in known:
            raise _unknown(verb, known)
        # Slow to import, so not before they are needed.
        from jacmatch.cli import flags

        kind = known[verb].load()
        if asked := [word for word in words if word in _HELP]:
            flags.print_help(self.program, kind, everything="--help-all" in asked)
            return 0
        from jacmatch.cli import settings, summary
        from jacmatch.cli.failures import translated
        from jacmatch.training import distributed
        from jacmatch.training.distributed import ProcessGroup

        config = settings.chosen(words, verb, flags.flags(kind))
        job, options = flags.read(self.program, kind, words, config)
        if options.resume is not None:
            job = settings.resumed(job, options.resume)
        elif getattr(job, "smoke", False) and "smoke" not in flags.given(kind, words):
            text = f"{options.config} sets smoke: the numbers will mean nothing. Add --no-smoke for a full run."
            if os.environ.get("RANK", "0") == "0":
                print(f"{self.program}: {text}", file=sys.stderr)
        together = getattr(job, "together", False)
        if together and job.devices > 1 and distributed.expected() == 1:
            from jacmatch.cli.launch import launch

            words = [*words] if job.out is not None else [*words, "--out", str(self._chosen(job, verb))]
            self.out = job.out or self.out  # for what is said if one is killed
            code = launch([verb, *words], job.devices, numbered=self.numbered)
            if code:
                self.left()
            return code
        self.met = not together
        with distributed.joined(job.device) if together else contextlib.nullcontext(ProcessGroup()) as ranks:
            self.met = True
            if hasattr(job, "out"):
                job = self._begun(job, verb, ranks)
            if hasattr(job, "named"):
                job.named({*config, *flags.given(kind, words)})
            with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext(), translated():
                result = job.run()
        if ranks.first:
            print(json.dumps(result, indent=2, allow_nan=False)) if options.json else summary.show(result)
            sys.stdout.flush()
        return 0

    def _begun(self, job: Any, verb: str, ranks: Any) -> Any:
        """The job with its folder, about which is noted what was there before."""
        self.keeps = getattr(job, "keeps", self.keeps)
        self.out = Path(ranks.broadcast(str(self._chosen(job, verb)) if ranks.first else ""))  # the first makes it
        ranks.barrier()
        return dataclasses.replace(job, out=self.out)

    def _chosen(self, job: Any, verb: str) -> Path:
        """The folder of the job, made if the job did not name one; what was there before is noted."""
        self.numbered = job.out is None or "JACMATCH_NUMBERED" in os.environ
        above = [path for path in (Path("runs"),) if job.out is None and not path.exists()]
        from jacmatch.runs.files import disk

        out: Path = job.folder(verb)
        with disk(out):
            missing = [path for path in (out, *out.parents) if not path.exists()]
            self.made = [out, *above] if job.out is None else missing
            self.fresh = bool(self.made) or (out.is_dir() and not any(out.iterdir()))
        self.out = out
        return out

    def say(self, message: str, code: int) -> int:
        """Prints one line and returns the exit code."""
        if self.traceback and code == 2:
            traceback.print_exc()
        if self.met or os.environ.get("RANK", "0") == "0":
            print(f"{self.program}: {' '.join(message.split())}", file=sys.stderr)
        return code

    def left(self) -> str:
        """What is left of a job that was cut off, and how to go on.

        A folder that this command made and that holds nothing to go on from is removed: nothing is half written.
        """
        if self.out is None or not self._has_kept():
            if self.out is not None and self.fresh:
                # Another job has put its run beside (rmdir fails), or has begun in this very folder (it has the lock).
                from jacmatch.runs.lock import hold

                with contextlib.suppress(OSError, InputError):
                    lock = hold(self.out)
                    shutil.rmtree(self.out)
                    lock.release()
                    if not self.made:
                        self.out.mkdir()
                    for parent in self.made[1:]:
                        parent.rmdir()
            return "No run folder was written."
        again = f"the same command with --out {self.out}" if self.numbered else "the same command"
        return f"What is done is kept in {self.out}: {again} goes on."

    def _has_kept(self) -> bool:
        assert self.out is not None
        with contextlib.suppress(OSError):  # of a name that no folder can have
            return any(any(self.out.rglob(name)) for name in self.keeps)
        return False


def _unknown(verb: str, known: Mapping[str, plugins.Verb]) -> InputError:
    """An error for a verb that is not there, with the nearest that is, or with the package that has it."""
    if verb in plugins.RESEARCH:
        rule = f"`{verb}` is a verb of jacmatch-research, which is not installed."
        return InputError(rule, do="Run: pip install jacmatch-research.")
    near = difflib.get_close_matches(verb, known, n=2, cutoff=0.5)
    what = "flag" if verb.startswith("-") else "verb"
    nearest = f"Nearest: {', '.join(near)}. " if near else ""
    return InputError(f"unknown {what} {verb}.", do=f"{nearest}Verbs: {', '.join(known)}. See jacmatch --help.")


def _print_help() -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table

    def box(title: str, rows: Mapping[str, str]) -> Panel:
        table = Table.grid(padding=(0, 2))
        for name, text in rows.items():
            table.add_row(name, text)
        return Panel(table, title=title, title_align="left", border_style="dim")

    console = Console(highlight=False, markup=False)
    console.print("usage: jacmatch VERB [OPTIONS]\n")
    console.print("Train a student network on its teacher's values and derivatives.")
    console.print("Begin with `jacmatch distill`.\n")
    console.print(box("verbs", {name: verb.help for name, verb in verbs().items()}))
    console.print(box("options", {"VERB --help": "options and examples of a verb", "--version": "print the version"}))
