"""Settings that jobs share; a job extends one of these dataclasses. Also: which settings name code."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from jacmatch.datasets import Data, Split
from jacmatch.datasets import catalog as data_sets
from jacmatch.errors import InputError
from jacmatch.jobs.data import SMOKE_TRAIN, parts, some
from jacmatch.models import catalog as models
from jacmatch.runs import Run
from jacmatch.runs.files import disk
from jacmatch.training import Training, find_device
from jacmatch.training.distributed import ProcessGroup
from jacmatch.version import __version__

SMOKE_STEPS, SMOKE_BATCH, SMOKE_JACOBIANS = 2, 2, 2
"""Limits of a smoke run: steps, samples in a step, samples whose Jacobians are compared."""


@dataclass(frozen=True)
class JobFields:
    """Settings of every job."""

    group: ClassVar[str] = "run"
    """The heading of these fields in the help."""

    no_settings: ClassVar[tuple[str, ...]] = (
        *("out", "devices", "max_steps", "workers", "prefetch", "resident_mib"),
        *("allow_code", "doctor", "logger"),
    )
    """Fields that do not determine the result and are not stored in a run."""

    out: Path | None = None
    """Run folder. By default runs/VERB-NUMBER with the next free number."""
    seed: int = 0
    """Random seed; the same seed gives the same run."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto (a GPU if there is one)."""
    smoke: bool = False
    """Run a tiny version of the job in seconds, to test that it works. Its numbers mean nothing."""
    allow_code: bool = False
    """Allow a --config, a run folder or a cache to name code outside the package (PACKAGE.MODULE:CALLABLE), and run
    it."""

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the result, as plain values for a run folder."""
        plain = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in self.no_settings:
                plain[field.name] = str(value) if isinstance(value, Path) else value
        return plain

    def begin(self, job: str, again: bool = False) -> Run:
        """Return the run of this job: new, or the unfinished one in the folder; with `again` also a finished one."""
        device = find_device(self.device)
        if self.device == "auto" and device.type == "cpu" and self._begun_on_cpu():
            object.__setattr__(self, "device", "cpu")  # the default of version 0.1, whose runs go on
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        ranks = ProcessGroup.current()
        if getattr(self, "devices", 1) not in (1, ranks.size):
            rule = f"`devices` of `{job}` must be the number of processes that were started."
            do = (
                "The command line starts them; in Python start torchrun, and call torch.distributed.init_process_group."
            )
            raise InputError(rule, got=f"{getattr(self, 'devices', 1)}, and {ranks.size} process(es)", do=do)
        folder = self.out or Path(ranks.broadcast(str(claimed_folder(job)) if ranks.first else ""))
        if ranks.first:
            run = Run.create(folder, job, self.settings(), __version__, cuda=gpu, again=again)
        ranks.barrier()
        if not ranks.first:
            run = replace(Run.open(folder, finished=False), follows=True)
        return run

    def _begun_on_cpu(self) -> bool:
        """Return whether the run folder holds a run whose setting `device` is the CPU."""
        if self.out is None or not (self.out / "settings.json").is_file():
            return False
        settings = Run.open(self.out, finished=False).settings
        return bool(settings.get("device") == "cpu")

    def folder(self, job: str) -> Path:
        """Return the run folder of this job; without `out` a new one that no other process uses."""
        return self.out or claimed_folder(job)


@dataclass(frozen=True)
class TrainingFields(JobFields, Training):
    """Settings of every job that trains: those of `Training`, as fields and options of the job."""

    group: ClassVar[str] = Training.group
    together: ClassVar[bool] = True
    """Whether several processes can do the job together."""

    devices: int = 1
    """Number of processes on this machine that train together. Each takes a part of every batch, and its own GPU if
    there are GPUs. Results do not depend on this number, up to rounding. Omit this option under torchrun, which starts
    the processes itself."""
    checkpoint_every: int = 500
    validation: float = 0.1
    """Training samples that are held out for the learning curves: a fraction (below 1) or a number."""

    def training(self, **changes: Any) -> Training:
        """Return the settings of the training loop; `changes` replace some of them."""
        chosen = {field.name: getattr(self, field.name) for field in fields(Training)} | changes
        if self.smoke:
            steps = min(chosen["steps"], SMOKE_STEPS)
            smaller = {"steps": steps, "batch_size": min(chosen["batch_size"], SMOKE_BATCH), "validate_every": steps}
            chosen |= smaller | {"warmup": 0, "accumulate": 1}
        return Training(**chosen)

    def teacher_settings(self) -> dict[str, Any]:
        """Return the settings of `train` for a teacher that this job trains first."""
        names = ("data", "seed", "device", "smoke", "validation", "workers", "prefetch", "resident_mib")
        own = {"model": "teacher", "steps": "teacher_steps", **dict(zip(names, names, strict=True))}
        doctor = self.doctor and not self.smoke
        return {name: getattr(self, field) for name, field in own.items()} | {"doctor": doctor}

    def checked(self, seed: int, last: bool) -> bool:
        """Return whether the pre-flight check runs for a cell. It runs for the first seed, once per method."""
        return self.doctor and seed == self.seed and (last or not self.smoke)

    def parts(self, data: Data, per_class: int, seed: int) -> tuple[Split, Split | None]:
        """Return the training and the validation samples; see `jacmatch.jobs.data.parts`."""
        if data.positions and self.augment:
            rule = "`--augment` must not be given with labels of positions, which it does not move."
            raise InputError(rule, got=" ".join(self.augment), do="Leave it out, or augment the data.")
        validation: float = self.validation
        if self.smoke:
            data, per_class = replace(data, train=some(data, data.train, SMOKE_TRAIN)), min(per_class, SMOKE_TRAIN - 2)
            validation = 0.1 if validation > 1 and float(validation).is_integer() else validation
        return parts(data, validation, per_class, seed)


def claimed_folder(job: str) -> Path:
    """Make runs/JOB-NUMBER with the next free number. Processes that run at once get different folders."""
    number, parent = 1, Path("runs")
    with disk(parent):
        while True:
            parent.mkdir(exist_ok=True)
            path = parent / f"{job}-{number:03d}"
            try:
                path.mkdir()
            except FileExistsError:
                number += 1
            except FileNotFoundError:  # another process has removed the empty folder `runs`
                continue
            else:
                return path


def flag(name: str) -> str:
    """Return the flag of a field."""
    return f"--{name.replace('_', '-')}"


def positive(job: str, **numbers: int | None) -> None:
    """Refuse numbers below 1, with the name of the flag; None is a number that is not given."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise InputError(f"`{flag(name)}` of `{job}` must be at least 1.", got=number)


_NEVER = (
    *("device", "pairs", "feature_layer", "probe", "readout", "name", "names", "rows", "action", "x_columns"),
    *("y_columns", "at_least", "at_most", "trained"),  # the last is a run folder, which is checked when it is opened
)
"""Text fields that never name code."""
_FIELDS: Mapping[str, Callable[[str], bool]] = {
    **dict.fromkeys(("data", "unlabelled"), data_sets.is_code),
    **dict.fromkeys(("model", "student", "teacher", "first", "second"), models.is_code),
}


def _is_function(spec: str) -> bool:
    from jacmatch.jobs.surrogate.functions import is_code  # imports scikit-learn

    return is_code(spec)


_OF_JOB: Mapping[str, Mapping[str, Callable[[str], bool]]] = {
    "surrogate": {"teacher": _is_function, "jacobian": _is_function}
}


def names_code(job: str, field: str, value: object) -> bool:
    """Return whether a setting names code, PACKAGE.MODULE:CALLABLE, that the job would run.

    A prefix of data sets (`npz`) is not a prefix of models, and vice versa, so this depends on the field; a field that
    is not listed may always name code. The command line is trusted; a settings file, a run folder and a cache are not.
    """
    if field in _NEVER:
        return False
    if isinstance(value, str):
        decides = _OF_JOB.get(job, {}).get(field) or _FIELDS.get(field)
        return ":" in value if decides is None else decides(value)
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(names_code(job, field, part) for part in parts)


def check_no_code(job: str, settings: Mapping[str, Any], source: str) -> None:
    """Refuse settings of a file that name code outside the package."""
    for field, value in settings.items():
        if names_code(job, field, value):
            rule = f"`{field}` in {source} must not name code outside the package, which the job would run."
            raise InputError(rule, got=repr(value), do="If you trust it, add --allow-code.")
