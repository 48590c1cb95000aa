"""The files of a run folder, in the order in which they are written.

- `settings.json`: job, version and resolved settings. Written first, so a folder is a run if and only if it has one.
- `environment.json`: versions, machine, commit, start; one more entry under `resumed` each time the run is resumed.
- `inputs.json`: fingerprints of everything else that determines the result; see `runs.identity`.
- `metrics.jsonl`: one JSON object per line, appended and flushed.
- Artifacts of the job, and runs inside the run (`seed0/labels/`), each with its own settings and result.
- `result.json`: written last. A run is finished if and only if it exists.

Every file but `metrics.jsonl` is written atomically. JSON is strict: NaN and infinities are refused.
"""

import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jacmatch.errors import InputError
from jacmatch.files import UNFINISHED, append, check_entry, inside, read
from jacmatch.runs.files import LOCK, Lock, decoded, disk, encoded, hold, load, plain, undone_on_failure, write_whole
from jacmatch.runs.identity import INPUTS, Fingerprint, changed, digest_of

_DECIDING = ("jacmatch", "torch", "numpy", "threads", "cuda", "commit")
"""Parts of an environment on which the bits of a result depend."""
_WARNED: dict[Any, Any] = {}  # registry of the warnings shown


def environment(cuda: str | None = None) -> dict[str, Any]:
    """Return versions, machine, commit and time, as in `environment.json`; `cuda` is the name of the GPU, if any.

    Example:
        >>> sorted(environment())
        ['commit', 'cpus', 'cuda', 'jacmatch', 'numpy', 'platform', 'python', 'started', 'threads', 'torch']
    """
    return {
        "jacmatch": _version("jacmatch"),
        "torch": _version("torch"),
        "numpy": _version("numpy"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": threads(),
        "cuda": cuda,
        "commit": commit(Path(__file__)),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def threads() -> int | None:
    """Return the number of CPU threads of torch; None if torch is not imported.

    The order of summation, and so the last digits of a trained network, depend on it.
    """
    torch = sys.modules.get("torch")
    return None if torch is None else int(torch.get_num_threads())


def warn_of_changes(before: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Warn in one line if a run is resumed in an environment that differs from that of its start."""
    names = [name for name in _DECIDING if name in before and before[name] != here.get(name)]
    if names:
        there, now = (", ".join(f"{name} {given.get(name)}" for name in names) for given in (before, here))
        message = f"The run was started with {there}, and is resumed with {now}."
        message = f"{message} The result equals that of an uninterrupted run up to rounding, not bit for bit."
        # one line, once, and no source line
        warnings.warn_explicit(message, UserWarning, "jacmatch", 0, registry=_WARNED)


def commit(file: Path) -> str | None:
    """Return the commit of the checkout that tracks `file`, with "-dirty" if it has changes; None without one.

    A package installed into a project's virtual environment lies inside that project's checkout without being part of
    it, so the file must be tracked.
    """
    git = ["git", "-C", str(file.parent)]
    try:
        for arguments in (
            ["ls-files", "--error-unmatch", file.name],
            ["describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
        ):
            answer = subprocess.run([*git, *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


TRAINING_JOBS = frozenset({"train", "distill", "robust", "transfer", "surrogate"})
_GENERAL = ("job", "version", "seed", "seconds", "settings")
_TRAINING = ("teacher", "student", "agreement", "samples_per_second", "peak_memory_bytes")
_AGREEMENT = ("top1", "jacobian_cosine", "jacobian_relative_error")
# Lowest, highest, whether null is allowed. An accuracy above 1 is a percentage.
_RANGES = {
    "seed": (-math.inf, math.inf, False),
    "seconds": (0.0, math.inf, False),
    "samples_per_second": (0.0, math.inf, True),
    "peak_memory_bytes": (0.0, math.inf, True),
    "accuracy": (0.0, 1.0, False),
    "rmse": (0.0, math.inf, False),
    "parameters": (0.0, math.inf, True),
    "top1": (0.0, 1.0, True),
    "jacobian_cosine": (-1.0, 1.0, True),
    "jacobian_relative_error": (0.0, math.inf, True),
}
_WHOLE = ("seed", "peak_memory_bytes", "parameters")
_SHOWN = 120  # characters of a value in a message
_ROUNDING = 1e-5  # a cosine of float32 vectors may lie this far outside its range


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean, the sample standard deviation (n − 1; None for one value) and the values.

    Example:
        >>> spread([0.5, 1.0])
        {'mean': 0.75, 'std': 0.3535533905932738, 'values': [0.5, 1.0]}

    Raises:
        InputError: There is no value.
    """
    if not values:
        raise InputError("`values` of `spread` must have at least one value.", got="none")
    plain = [float(value) for value in values]
    std = statistics.stdev(plain) if len(plain) > 1 else None
    return {"mean": statistics.fmean(plain), "std": std, "values": plain}


def check(result: Mapping[str, Any], job: str, version: str, settings: Mapping[str, Any]) -> None:
    """Refuse a result that lacks a key of its job, has a number out of range, or belongs to another run."""
    training = job in TRAINING_JOBS
    _have(result, _GENERAL + _TRAINING if training else _GENERAL, "result")
    for key, own in (("job", job), ("version", version), ("settings", settings)):
        if result[key] != own:
            raise InputError(f"`result.{key}` must be the {key} of its run, {own!r}.", got=repr(result[key])[:_SHOWN])
    _in_ranges(result, ("seed", "seconds", "samples_per_second", "peak_memory_bytes"), "result")
    if not training:
        return
    networks = {f"result.{who}": result[who] for who in ("teacher", "student") if result[who] is not None}
    for where, network in networks.items():
        _have(network, ("parameters",), where)
        if not {"accuracy", "rmse"} & network.keys():
            rule = f"`{where}` must have `accuracy` (classes) or `rmse` (regression)."
            raise InputError(rule, got=repr(sorted(network))[:_SHOWN])
        _in_ranges(network, ("accuracy", "rmse", "parameters"), where)
    if not networks:
        raise InputError("`result` must have a `teacher` or a `student`.", got="null for both")
    rows = result.get("rows")
    for number, row in enumerate(rows if isinstance(rows, list) else ()):
        _row(row, f"result.rows[{number}]")
    if result["agreement"] is not None:
        _have(result["agreement"], _AGREEMENT, "result.agreement")
        _in_ranges(result["agreement"], _AGREEMENT, "result.agreement")


def _have(value: object, keys: Sequence[str], where: str) -> None:
    if not isinstance(value, Mapping):
        raise InputError(f"`{where}` must be an object.", got=repr(value)[:_SHOWN])
    missing = [key for key in keys if key not in value]
    if missing:
        do = f"Give all of: {', '.join(keys)}."
        raise InputError(f"`{where}` must have every key of its schema.", got=f"none of the name '{missing[0]}'", do=do)


def _row(row: object, where: str) -> None:
    """Refuse a row of a comparison with a mean, deviation or value that is no number or out of range."""
    _have(row, (), where)
    assert isinstance(row, Mapping)
    inner = row.get("agreement")
    for values in (row, inner if isinstance(inner, Mapping) else {}):
        for key in _RANGES.keys() & values.keys():
            numbers = values[key]
            if isinstance(numbers, Mapping):
                _have(numbers, ("mean", "std", "values"), f"{where}.{key}")
                listed = numbers["values"] if isinstance(numbers["values"], list) else [numbers["values"]]
                for value in (numbers["mean"], *listed):
                    _in_range({key: value}, key, f"{where}.{key}", whole=False)
                _in_range({"seconds": numbers["std"] or 0.0}, "seconds", f"{where}.{key}.std")


def _in_ranges(values: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    for key in keys:
        if key in values:
            _in_range(values, key, where)


def _in_range(values: Mapping[str, Any], key: str, where: str, *, whole: bool = True) -> None:
    low, high, null = _RANGES[key]
    value = values[key]
    if value is None and null:
        return
    whole = whole and key in _WHOLE
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not number or not low - _ROUNDING <= value <= high + _ROUNDING:
        kind = "an integer" if whole else "a number"
        span = "" if low == -math.inf else f" of at least {low:g}" if high == math.inf else f" in [{low:g}, {high:g}]"
        raise InputError(f"`{where}.{key}` must be {kind}{span}{' or null' if null else ''}.", got=repr(value)[:_SHOWN])


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value})
    return flat


METRICS = "metrics.jsonl"
_LARGEST = 2**30


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the rows of the `metrics.jsonl` in a folder, empty without one; a truncated last line is skipped.

    Raises:
        InputError: Another line is damaged.
    """
    file = Path(folder) / METRICS
    with disk(file.parent, "readable"):
        check_entry(file.parent, file)
        lines = read(file.parent, file, _LARGEST).split(b"\n")[:-1] if file.is_file() else []
    return [decoded(line, f"line {number} of {file}") for number, line in enumerate(lines, 1)]


def mend(folder: Path) -> None:
    """Remove a truncated last line, to which the next row would be appended.

    A file with hard links, as in some copies of folders, is copied first, so that new rows appear only in this folder.
    """
    file = folder / METRICS
    with disk(folder):
        if file.is_file():
            content = read(folder, file, _LARGEST)
            end = content.rfind(b"\n") + 1
            if end < len(content) or file.is_symlink() or file.stat().st_nlink > 1:
                write_whole(folder, METRICS, content[:end])


_SETTINGS, _ENVIRONMENT = "settings.json", "environment.json"
RESULT = "result.json"
"""The file that a job writes last: a run is finished if and only if it exists."""
CHECKPOINT = "checkpoint.pt"
"""File from which a job resumes; removed when the result is written."""
_OWN = (_SETTINGS, _ENVIRONMENT, INPUTS, METRICS, RESULT, CHECKPOINT, LOCK)


@dataclass(frozen=True)
class Run:
    """A folder with the settings, metrics and result of one job. Created by `Run.create`, read by `Run.open`."""

    path: Path
    job: str
    version: str
    settings: dict[str, Any]
    resumed: bool = False
    lock: Lock | None = field(default=None, compare=False, repr=False)
    follows: bool = False
    """Whether another process of the job writes the files; this process then writes nothing."""
    identity: str | None = None
    """For a run inside a run: a digest of the inputs of the outer run."""
    observer: Callable[[Mapping[str, Any]], None] | None = field(default=None, compare=False, repr=False)
    """Called with each row that is logged."""

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        job: str,
        settings: Mapping[str, Any],
        version: str,
        *,
        cuda: str | None = None,
        again: bool = False,
    ) -> "Run":
        """Start a run in a new or empty folder, or resume the unfinished run of the same job and settings in it.

        The folder is locked for this process until the result is written or the run is garbage-collected.

        Args:
            path: The folder; missing parents are created. If this fails, what was created is removed.
            job: The verb of the command line.
            settings: All settings that determine the result, without others (such as the output folder).
            version: The version of this package.
            cuda: Name of the GPU, if the job uses one.
            again: Whether a finished run is accepted. Its result remains until `write_result` replaces it.

        Raises:
            InputError: The folder contains other files, a finished run or another run; another process uses it; a
                setting cannot be written as JSON; or writing fails.

        Example:
            >>> import tempfile
            >>> folder = tempfile.mkdtemp()
            >>> run = Run.create(folder, "train", {"lr": 0.1}, "0.1.0")
            >>> run.log({"step": 1, "loss": 0.5})
            >>> run.resumed, Run.create(folder, "train", {"lr": 0.1}, "0.1.0").resumed
            (False, True)
            >>> run.metrics()
            [{'step': 1, 'loss': 0.5}]
        """
        now, folder = environment(cuda), Path(path)
        chosen = plain(settings, "settings")
        if others := _entries(folder):
            _existing_run(folder, others)  # nothing is written to a folder that is no run
        with undone_on_failure(folder, ()):
            lock = hold(folder)
            run = replace(cls._enter(folder, job, chosen, version, now), lock=lock)
        if run.finished and not again:
            raise _taken(run.path, f"a finished run of `{job}`")
        if run.resumed:
            before = run.environment
            warn_of_changes((before.get("resumed") or [before])[-1], now)
            whole = {**before, "resumed": [*before.get("resumed", []), now]} if before else {**now, "resumed": []}
            write_whole(run.path, _ENVIRONMENT, encoded(whole, _ENVIRONMENT))
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, finished: bool = True) -> "Run":
        """Open the run in a folder, for reading; an unfinished one only with `finished=False`.

        Raises:
            InputError: The folder is missing or is no run, the run is unfinished, or one of its files is damaged.
        """
        folder = Path(path)
        if not os.path.isfile(folder / _SETTINGS):  # false also for impossible names
            got = f"a folder without {_SETTINGS}" if os.path.isdir(folder) else "no folder of that name"
            raise InputError(f"{folder} must be a run folder.", got=got, do="Give the --out of an earlier job.")
        run = _stored_run(folder)
        if finished:
            _ = run.result
        return run

    def child(self, name: str, settings: Mapping[str, Any] | None = None, job: str | None = None) -> "Run":
        """Return the run `name` (such as "seed0/labels") inside this run: new, resumed, or finished (`finished`).

        Settings and job are those of this run if left out.

        Raises:
            InputError: The name leads out of the folder, or another run is there.
        """
        for part in name.split("/"):
            _check_name(part)
        chosen = self.settings if settings is None else settings
        folder = inside(self.path, self.path / name)
        if self.follows:
            return replace(self, path=folder, settings=plain(chosen, "settings"), job=job or self.job)
        identity = self.inputs_digest
        run = Run._enter(folder, self.job if job is None else job, chosen, self.version, identity=identity)
        if run.identity != identity:
            raise _taken(folder, "a run with other inputs (data, code, teacher) than the run that it lies in")
        return run

    def check_inputs(self, part: str, here: Mapping[str, Fingerprint]) -> None:
        """Store fingerprints of a part ("data"), or compare them with the stored ones if the run is resumed.

        Raises:
            InputError: The run was started with other inputs; the message names them.
        """
        if self.follows:
            return
        there = self.inputs
        if part not in there:
            write_whole(self.path, INPUTS, encoded({**there, part: dict(here)}, INPUTS))
        elif changes := changed(there[part], here):
            rule = f"The run in {self.path} must be resumed with the {part} that it was started with."
            do = "Restore the original inputs, or choose another --out."
            raise InputError(rule, got=f"changes in {changes}", do=do)

    @property
    def inputs(self) -> dict[str, Any]:
        """The stored fingerprints, by part and name; empty if there are none."""
        file = self.path / INPUTS
        return load(file) if file.is_file() else {}

    @property
    def inputs_digest(self) -> str | None:
        """A digest of the stored fingerprints; None if there are none."""
        inputs = self.inputs
        return digest_of(inputs) if inputs else None

    @property
    def finished(self) -> bool:
        """Whether the result has been written."""
        return (self.path / RESULT).is_file()

    @property
    def result(self) -> dict[str, Any]:
        """The content of `result.json`.

        Raises:
            InputError: The run is unfinished, or the file is damaged.
        """
        if not self.finished:
            do = "Run its command again with the same --out to resume it."
            raise InputError(f"{self.path} must contain a finished run.", got=f"a run without {RESULT}", do=do)
        result = load(self.path / RESULT)
        try:
            check(result, self.job, self.version, self.settings)
        except InputError as error:
            rule = f"{self.path / RESULT} must be unchanged since its job wrote it. {error}"
            raise InputError(rule, do="It is damaged or was changed: run the job again.") from error
        return result

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, machine, commit and start of the run; empty for a run inside a run."""
        file = self.path / _ENVIRONMENT
        return load(file) if file.is_file() else {}

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one line to the metrics.

        Raises:
            InputError: A value cannot be written as JSON (NaN, for instance), or writing fails.
        """
        line = json.dumps(plain(row, "metrics")) + "\n"
        with disk(self.path):
            append(self.path / METRICS, line.encode())
        if self.observer is not None:
            self.observer(row)

    def metrics(self) -> list[dict[str, Any]]:
        """The logged rows, in order; see `read_metrics`."""
        return read_metrics(self.path)

    def rewind(self, step: int) -> None:
        """Drop the metrics after `step`, so that a run resumed from a checkpoint logs no step twice."""
        rows = [row for row in self.metrics() if row.get("step", step) <= step]
        write_whole(self.path, METRICS, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def write_json(self, name: str, value: object) -> Path:
        """Write the artifact `name` atomically as JSON, and return its path.

        Raises:
            InputError: The name is that of a file of the run itself or leads out of the folder, a value cannot be
                written as JSON, or writing fails.
        """
        return self.write_bytes(name, encoded(value, name))

    def write_bytes(self, name: str, data: bytes) -> Path:
        """Write the artifact `name` atomically, and return its path.

        Raises:
            InputError: The name is that of a file of the run itself or leads out of the folder, or writing fails.
        """
        _check_name(name)
        return self.path / name if self.follows else write_whole(self.path, name, data)

    def write_result(self, result: Mapping[str, Any], *, again: bool = False) -> Path:
        """Check `result.json` against its schema, write it atomically, and return its path; this finishes the run.

        Every job has `job`, `version`, `seed`, `seconds`, `settings`. A training job also has `teacher` and `student`
        (each `accuracy` in [0, 1] or `rmse`, and `parameters`; null for the one that the job does not have),
        `agreement` (`top1`, `jacobian_cosine`, `jacobian_relative_error`, each or all null), `samples_per_second` and
        `peak_memory_bytes`. Other keys are stored as they are. With `again`, the result of a finished run is replaced.

        Raises:
            InputError: The run is finished (without `again`), a key is missing or out of range, or writing fails.
        """
        if self.follows:
            return self.path / RESULT
        if self.finished and not again:
            raise InputError("`Run.write_result` must be called once per run.", got=f"a finished run in {self.path}")
        check(plain(result, "result"), self.job, self.version, self.settings)
        file = write_whole(self.path, RESULT, encoded(result, "result"))
        with disk(self.path):
            (self.path / CHECKPOINT).unlink(missing_ok=True)
        if self.lock is not None:
            self.lock.release()
        return file

    @classmethod
    def _enter(
        cls,
        folder: Path,
        job: str,
        settings: Mapping[str, Any],
        version: str,
        now: Mapping[str, Any] | None = None,
        identity: str | None = None,
    ) -> "Run":
        """Start the run in `folder`, in the environment `now`, or open it; refuse anything else that is there."""
        chosen = plain(settings, "settings")
        tidy(folder)
        others = _entries(folder)
        if not others:
            with undone_on_failure(folder, (_ENVIRONMENT, _SETTINGS, LOCK)):
                head = {"job": job, "version": version, "settings": chosen}
                head |= {} if identity is None else {"inputs": identity}
                write_whole(folder, _SETTINGS, encoded(head, _SETTINGS))
                if now is not None:
                    write_whole(folder, _ENVIRONMENT, encoded({**now, "resumed": []}, _ENVIRONMENT))
            return cls(folder, job, version, chosen, identity=identity)
        run = _existing_run(folder, others)
        if run.job != job:
            raise _taken(folder, f"a run of `{run.job}`, not of `{job}`")
        if run.settings != chosen:
            pair = (dict(sorted(_flat(each).items())) for each in (run.settings, chosen))
            raise _taken(folder, f"a run with other settings: {changed(*pair)}")
        if run.version != version:
            raise _taken(folder, f"a run of version {run.version}, not {version}")
        mend(folder)
        return run


def tidy(folder: Path) -> None:
    """Remove what a killed process left in a run: incomplete files, and the checkpoint if the run is finished."""
    with disk(folder):
        orphans = list(folder.glob(f".*{UNFINISHED}")) if folder.is_dir() else []
        if (folder / RESULT).is_file():
            orphans.append(folder / CHECKPOINT)
        for orphan in orphans:
            orphan.unlink(missing_ok=True)


def _entries(folder: Path) -> list[str]:
    """Return the sorted names in a folder, without the lock and incomplete files; empty without a folder."""
    with disk(folder):
        if not folder.exists():
            return []
        if not folder.is_dir():
            raise _taken(folder, "a file")
        names = [entry.name for entry in folder.iterdir()]
        return sorted(name for name in names if name != LOCK and not name.endswith(UNFINISHED))


def _existing_run(folder: Path, names: Sequence[str]) -> Run:
    """Return the run in a folder with these names, none of which leads elsewhere."""
    if _SETTINGS not in names:
        raise _taken(folder, f"a folder that is not a run and contains {names[0]!r}")
    with disk(folder, "readable"):
        for name in _OWN:
            check_entry(folder, folder / name)
    return _stored_run(folder)


def _stored_run(folder: Path) -> Run:
    head = load(folder / _SETTINGS)
    if not (
        isinstance(head.get("settings"), dict) and all(isinstance(head.get(key), str) for key in ("job", "version"))
    ):
        rule = f"{folder / _SETTINGS} must have the job, version and settings of a run."
        raise InputError(rule, got=f"the keys {sorted(head)}", do="Another program wrote it: choose another folder.")
    return Run(folder, head["job"], head["version"], head["settings"], resumed=True, identity=head.get("inputs"))


def _taken(folder: Path, got: str) -> InputError:
    rule = f"The run folder {folder} (`--out`) must be new, empty, or contain this run, unfinished."
    return InputError(rule, got=got, do="Choose another --out, or remove that one.")


def _check_name(name: str) -> None:
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise InputError("A name inside a run folder must be letters, digits, '.', '_', '+' and '-'.", got=repr(name))
    if name in _OWN:
        raise InputError("An artifact must not have the name of a file that the run writes itself.", got=repr(name))
