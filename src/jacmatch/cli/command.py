"""Run a command line and return its exit code: 0 success, 1 a bug, 2 a mistake of the user, 130 interrupted."""

import contextlib
import dataclasses
import errno
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import sys
import sysconfig
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jacmatch import plugins
from jacmatch.cli.verbs import verbs
from jacmatch.errors import ElsewhereError, InputError, Stopped, UnsupportedError, unknown_name
from jacmatch.version import __version__

_OURS = Path(__file__).resolve().parents[1]
_LIBRARIES = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
_NO_MEMORY = re.compile(r"DefaultCPUAllocator|alloc_cpu|not enough memory|out of memory|can.{1,2}t allocate", re.I)
_REMEDY = "Fix it there; --traceback shows the lines."


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Turn exceptions of the user's code within the block, and lack of memory, into `Stopped`."""
    try:
        yield
    except (InputError, UnsupportedError, ElsewhereError, KeyboardInterrupt):
        raise
    except SystemExit as stop:
        who = _location(stop) or "Code that the job runs"
        raise Stopped(f"{who} called sys.exit({stop.code!r}): it must return. {_REMEDY}") from stop
    except BaseException as error:
        if _is_of_memory(error):
            raise Stopped("the memory is full. Use a smaller --batch-size, or less data.") from error
        from jacmatch.training.distributed import is_of_connections

        location = None if is_of_connections(error) else _location(error)
        if location is None:
            raise
        text = " ".join(str(error).split())[:300]
        raise Stopped(f"{location} raised {type(error).__name__}{f': {text}' if text else ''}. {_REMEDY}") from error


def _is_of_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))


def _location(error: BaseException) -> str | None:
    """Return the last line of the user's code in a traceback; None if there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if frame.filename.startswith("<") or not file.is_absolute():
            continue
        above = {file, *file.parents}
        if _OURS not in above and not above & _LIBRARIES and not {"site-packages", "dist-packages"} & set(file.parts):
            return f"{file.name}, line {frame.lineno}, in {frame.name}"
    return None


_FULL = (errno.ENOSPC, errno.EDQUOT)
_PATHS = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS)  # an unusable path
_HELP = ("-h", "--help", "--help-all")
_EXTRA = ("tyro", "rich", "yaml", "lightning_fabric", "safetensors", "matplotlib")  # what the extra `train` installs


def main(argv: Sequence[str] | None = None) -> int:
    """Run `jacmatch` with these arguments and return the exit code.

    For a mistake of the user, print one line on stderr and return 2; for Ctrl-C and SIGTERM, print one line and return
    130. Any other exception is a bug: print its traceback and return 1.

    Args:
        argv: The arguments after the program's name; those of this process if None.

    Example:
        >>> main(["--version"])  # doctest: +ELLIPSIS
        jacmatch ...
        0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _open_streams()
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    verb = words[0] if words else "--help"
    if verb in ("--version", "-V"):
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
        with _as_program(job.program):
            return job.run(verb, words[1:])
    except KeyboardInterrupt:
        return job.say(f"interrupted. {job.clean_up()}", 130)
    except ElsewhereError as error:
        remains = job.clean_up()
        return job.say(f"{error.says} {remains}", error.code) if error.says else error.code
    except (InputError, UnsupportedError) as error:
        remains = job.clean_up()
        return job.say(f"{error} {remains}" if isinstance(error, Stopped) else str(error), 2)
    except BrokenPipeError:  # the reader of our output has gone, as in `jacmatch list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            where = f" ({error.filename})" if error.filename else ""
            return job.say(f"the disk is full{where}. Free some space. {job.clean_up()}", 2)
        if isinstance(error, OSError) and error.errno in _PATHS and error.filename:
            job.clean_up()
            return job.say(f"{error.filename} must be a usable path. Got '{error.strerror}'.", 2)
        traceback.print_exc()
        job.clean_up()
        return job.say("this is a defect of jacmatch. Please report it with the lines above.", 1)


def _open_streams() -> None:
    """Replace closed streams; write characters that the encoding lacks as escapes."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _as_program(name: str) -> Iterator[None]:
    """Within the block, treat SIGTERM like Ctrl-C and print warnings of jacmatch in one line."""
    usual = warnings.formatwarning

    def short(message: Any, *rest: Any, **more: Any) -> str:
        if "jacmatch" not in Path(rest[1]).parts:
            return usual(message, *rest, **more)
        return f"{name}: warning: {message}\n" if os.environ.get("RANK", "0") == "0" else ""

    warnings.formatwarning = short
    in_main = threading.current_thread() is threading.main_thread()
    if default := in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # clusters send it
    try:
        yield
    finally:
        warnings.formatwarning = usual
        if default:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@dataclasses.dataclass
class _Job:
    """The state of a running command, for the message if it fails."""

    program: str
    traceback: bool
    out: Path | None = None
    keeps: tuple[str, ...] = ("checkpoint.pt", "result.json")  # an interrupted job with these stays
    numbered: bool = False  # --out was left out: the folder got a number
    fresh: bool = False  # the run folder was absent or empty before
    made: Sequence[Path] = ()  # the run folder and its parents, those that were not there before
    started: bool = False  # several processes run: each reports its own errors

    def run(self, verb: str, words: Sequence[str]) -> int:
        """Run the verb and print its result."""
        known = verbs()
        if verb not in known:
            if verb in plugins.RESEARCH:
                rule = f"`{verb}` is a verb of jacmatch-research, which is not installed."
                raise InputError(rule, do="Run: pip install jacmatch-research.")
            raise unknown_name("The verb", verb, known)
        # Slow to import, so not before they are needed.
        from jacmatch.cli import flags

        kind = flags.declared(known[verb].job)
        if requested := {*words} & {*_HELP}:
            flags.print_help(self.program, kind, everything="--help-all" in requested)
            return 0
        from jacmatch.cli import settings

        config = settings.chosen(words, verb, flags.flags(kind))
        fields, options = flags.parse(self.program, kind, words, config)
        from jacmatch.cli import summary
        from jacmatch.training import distributed
        from jacmatch.training.distributed import ProcessGroup

        job = known[verb].load()(**fields)
        if options.resume is not None:
            job = settings.resumed(job, options.resume)
        elif getattr(job, "smoke", False) and "smoke" not in flags.given(kind, words):
            text = f"{options.config} sets smoke: the numbers will mean nothing. Add --no-smoke for a full run."
            if os.environ.get("RANK", "0") == "0":
                print(f"{self.program}: {text}", file=sys.stderr)
        together = getattr(job, "together", False)
        if together and job.devices > 1 and distributed.rank_and_size()[1] == 1:
            from jacmatch.cli.launch import launch

            words = [*words] if job.out is not None else [*words, "--out", str(self._chosen(job, verb))]
            self.out = job.out or self.out  # named in the message if a process is killed
            code = launch([verb, *words], job.devices, numbered=self.numbered)
            if code:
                self.clean_up()
            return code
        self.started = not together
        with distributed.joined(job.device) if together else contextlib.nullcontext(ProcessGroup()) as ranks:
            self.started = True
            if hasattr(job, "out"):
                self.keeps = getattr(job, "keeps", self.keeps)
                # the first process makes the run folder
                self.out = Path(ranks.broadcast(str(self._chosen(job, verb)) if ranks.first else ""))
                ranks.barrier()
                job = dataclasses.replace(job, out=self.out)
            if hasattr(job, "named"):
                job.named({*config, *flags.given(kind, words)})
            with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext(), translated():
                result = job.run()
        if ranks.first:
            print(json.dumps(result, indent=2, allow_nan=False)) if options.json else summary.show(result)
            sys.stdout.flush()
        return 0

    def _chosen(self, job: Any, verb: str) -> Path:
        """Return the run folder, created if the job did not name one, and note what existed before."""
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
        """Print one line on stderr and return the exit code."""
        if self.traceback and code == 2:
            traceback.print_exc()
        if self.started or os.environ.get("RANK", "0") == "0":
            print(f"{self.program}: {' '.join(message.split())}", file=sys.stderr)
        return code

    def clean_up(self) -> str:
        """Return a sentence on what an interrupted job leaves and how to resume it.

        A folder that this command made and that holds nothing to resume from is removed.
        """
        if self.out is None or not self._has_progress():
            if self.out is not None and self.fresh:
                # Another job may have a run beside this one (rmdir fails) or in this folder (it has the lock).
                from jacmatch.runs.files import hold

                with contextlib.suppress(OSError, InputError):
                    lock = hold(self.out)
                    shutil.rmtree(self.out)
                    lock.release()
                    if not self.made:
                        self.out.mkdir()
                    for parent in self.made[1:]:
                        parent.rmdir()
            return "No run folder was written."
        again = f"with --out {self.out} " if self.numbered else ""
        return f"Finished work is kept in {self.out}: run the same command {again}again to resume."

    def _has_progress(self) -> bool:
        assert self.out is not None
        with contextlib.suppress(OSError):  # a name that no folder can have
            return any(any(self.out.rglob(name)) for name in self.keeps)
        return False


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
