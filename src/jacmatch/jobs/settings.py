"""Parts shared by jobs: settings, as dataclasses that they extend; data; and which settings name code."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from torch import Tensor

from jacmatch import datasets
from jacmatch.datasets import Data, Split, folders, from_arrays, of_classes
from jacmatch.datasets import catalog as data_sets
from jacmatch.datasets.arrays import OPTIONAL, REQUIRED, npz_arrays
from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jobs import networks
from jacmatch.models import catalog as models
from jacmatch.runs import Run
from jacmatch.runs.files import disk
from jacmatch.runs.identity import changed
from jacmatch.training import Training, find_device
from jacmatch.training.distributed import ProcessGroup
from jacmatch.version import __version__

SMOKE_TRAIN, SMOKE_TEST = 12, 2
"""Training and test samples of a smoke run, for each class."""
_SHARED, _SCALES = 0.01, 10.0  # share of test inputs, and ratio of scales, above which there is a warning
_LEVELS = 4  # a network of surrogate lies three folders below its run
_DO = "Name the data: --data."


def load(spec: str, seed: int, smoke: bool, *, positions: bool = False, tests: bool = True) -> Data:
    """Load a data set; in a smoke run with few test samples. Per-position labels need a job that allows them.

    `tests`: whether the job measures generalization.
    """
    if not 0 <= seed < 2**63:
        raise InputError("`--seed` must be at least 0 and below 2⁶³.", got=seed)
    data = datasets.load(spec, seed)
    _compare_parts(data.train.x, data.test.x, data.name, tests)
    if data.positions and not positions:
        rule = "`--data` of this job must have one label for each sample."
        do = "Per-position labels are for train, distill, evaluate, compare, doctor and export."
        raise InputError(rule, got=f"labels (N, {', '.join(map(str, data.positions))})", do=do)
    return replace(data, test=some(data, data.test, SMOKE_TEST)) if smoke else data


def _compare_parts(train: Any, test: Any, name: str, tests: bool) -> None:
    """Warn if test inputs are training inputs too, or have another scale; not for images on disk."""
    if not (isinstance(train, Tensor) and isinstance(test, Tensor)):
        return
    sizes = [float(torch.linalg.vector_norm(x)) / x.numel() ** 0.5 for x in (train, test) if x.is_floating_point()]
    if sizes and max(sizes) > _SCALES * min(sizes):
        text = f"the training inputs of {name} have the root mean square {sizes[0]:.3g}, the test inputs"
        warnings.warn(f"{text} {sizes[1]:.3g}: they must have the same scale.", stacklevel=3)
    known = {hash(row.tobytes()) for row in train.numpy()} if tests else set()
    if (shared := sum(hash(row.tobytes()) in known for row in test.numpy())) > _SHARED * len(test):
        text = f"{shared:,} of the {len(test):,} test inputs of {name} are training inputs too"
        warnings.warn(f"{text}: they measure no generalization.", stacklevel=3)


def without_labels(spec: str, seed: int) -> Data:
    """Load data whose labels are not used: images may lie in DIR itself, and an archive may have `x_train` alone."""
    name, _, argument = spec.partition(":")
    if name == "npz":
        x: Any = npz_arrays(argument, ("x_train",), REQUIRED + OPTIONAL)["x_train"]
    elif name != "folder" or (x := folders.images(argument)) is None:
        return load(spec, seed, False, tests=False)
    parts = {"x_train": x, "x_test": (x := np.atleast_1d(x))[:1]}
    return from_arrays(spec, parts | {"y_train": np.full((len(x), 1), 0.5), "y_test": np.full((len(x[:1]), 1), 0.5)})


def dense_settings(data: Data) -> dict[str, Any]:
    """Return the settings of an objective for per-position labels: outputs (B, K, H, W), means over positions."""
    return {"class_dim": 1, "positions": "mean"} if data.positions else {}


def some(data: Data, split: Split, count: int) -> Split:
    """Return the first `count` samples of each class; of numbers or per-position labels the first 100 samples."""
    if data.classes is None or data.positions:
        return split.subset(torch.arange(min(100, len(split))))
    rank = torch.zeros_like(split.y)
    for label in range(data.classes):
        of_class = split.y == label
        rank[of_class] = torch.arange(int(of_class.sum()), device=rank.device)
    return split.subset((rank < count).nonzero()[:, 0])


def parts(data: Data, validation: float, per_class: int, seed: int) -> tuple[Split, Split | None]:
    """Return training samples, `per_class` of each class, and the validation samples held out before."""
    if per_class < 0:
        raise InputError("`--per-class` must be at least 0; 0 takes all.", got=per_class)
    if not (0 <= validation < 1 or (validation > 0 and float(validation).is_integer())):
        raise InputError("`--validation` must be a fraction below 1, or an integer.", got=validation)
    split, validation_part = data.train, None
    if validation:
        amount = validation if validation < 1 else int(validation)
        train_rows, validation_rows = datasets.split_validation(split.y, amount, seed)
        split, validation_part = split.subset(train_rows), split.subset(validation_rows)
    if per_class:
        split = split.subset(datasets.per_class(split.y, per_class, seed))
    return split, validation_part


def mixed(split: Split, count: int | None = None) -> Split:
    """Return at most `count` samples in a fixed random order, because files of a folder are sorted by class."""
    return split.subset(torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:count])


def data_for(verb: str, models: tuple[str, ...], data: str | None, *, seed: int, smoke: bool, allow_code: bool) -> Data:
    """Return the named data set, or that of a run folder among the models, or the digits.

    Data of a run keep the split of that run for any seed, because its network may have been trained on other samples.
    """
    runs, tested = [Path(spec) for spec in models if networks.is_run(spec)], verb == "evaluate"
    if data is not None:
        own = [run for run in map(_whole, runs) if run.settings.get("data") == data]
        return load(data, _number(own[0], "seed") if own else seed, smoke, positions=True, tests=tested)
    candidates = [data_of_run(folder, allow_code=allow_code, tests=tested) for folder in runs]
    if not candidates:
        return load("digits", seed, smoke)
    tests = [{f"{name}_test": digest for name, digest in each.test.digests.items()} for each in candidates]
    if len(candidates) > 1 and (difference := changed(*tests)):
        rule = f"`--data` of `{verb}` must be given for two runs that were tested on different data."
        raise InputError(rule, got=f"{candidates[0].name} and {candidates[1].name}: {difference}", do=_DO)
    first = candidates[0]
    return replace(first, test=some(first, first.test, SMOKE_TEST)) if smoke else first


def data_of_run(folder: Path, *, allow_code: bool = False, tests: bool = False) -> Data:
    """Return the data of a run, or of a network inside a run."""
    run = _whole(folder)
    spec = run.settings.get("teacher" if run.job == "surrogate" else "data")
    rule = f"`--data` must be given: the data of the run in {folder} cannot be loaded."
    if not isinstance(spec, str):
        raise InputError(rule, got=f"a run of `{run.job}` that names none", do=_DO)
    if run.job != "surrogate" and datasets.catalog.is_code(spec) and not allow_code:
        do = "If you trust it, add --allow-code, or name other data: --data."
        raise InputError(f"The data of the run in {folder} are made by code outside the package.", got=spec, do=do)
    try:
        candidates = _candidates(run, spec, tests)
    except (InputError, UnsupportedError) as error:
        raise InputError(rule, got=f"'{spec}': {error}", do=_DO) from error
    there = run.inputs.get("data")
    differences = [changed(there, data.digests) if there else "" for data in candidates]
    for data, difference in zip(candidates, differences, strict=True):
        if not difference:
            return data
    rule = f"The data of the run in {folder} must be those that it was started with."
    do = f"To use them as they are now, name them: --data {spec}."
    raise InputError(rule, got=f"changes in {differences[0]}", do=do)


def _candidates(run: Run, spec: str, tests: bool) -> list[Data]:
    """Return the data sets that the run may have used."""
    if run.job == "surrogate":
        from jacmatch.jobs.surrogate.fields import SurrogateFields  # imports scikit-learn
        from jacmatch.jobs.surrogate.source import FILES, arrays_of

        seed = _number(run, "seed")
        if not spec.startswith(FILES):
            return [_points(run)]
        x_columns, y_columns = (tuple(run.settings.get(name) or ()) for name in ("x_columns", "y_columns"))
        return [arrays_of(SurrogateFields(teacher=spec, seed=seed, x_columns=x_columns, y_columns=y_columns)).data]
    data = load(spec, _number(run, "seed"), bool(run.settings.get("smoke")), positions=True, tests=tests)
    if run.job != "transfer" or data.classes is None:
        return [data]
    source = _number(run, "source_classes") or data.outputs // 2  # a teacher that was trained first has had these
    parts = [of_classes(data, range(source, data.classes)), data]
    outputs = networks.describe(run.path).outputs
    return [replace(part, test=mixed(part.test)) for part in parts if part.outputs == outputs] or [data]


def _points(run: Run) -> Data:
    """Return the points of a surrogate run."""
    from jacmatch.jobs.surrogate.points import cached

    arrays: dict[str, object] = {}
    seed = _number(run, "seed")
    for part, pattern in (("test", "points-test.npz"), ("train", f"points-seed{seed}*.npz")):
        files = sorted(run.path.glob(pattern), key=lambda file: (len(file.name), file.name))
        if not files:
            raise InputError(f"{run.path} must contain the points of its function.", got=f"no {pattern}")
        points = cached(run, files[-1].stem, _missing)
        arrays |= {f"x_{part}": points.x.float(), f"y_{part}": points.y.float()}
        if points.j is not None:
            arrays[f"j_{part}"] = points.j.float()
    return from_arrays(f"the points of {run.path}", arrays)


def _missing() -> NoReturn:
    raise InputError("The points file of a run must exist.")


def _whole(folder: Path) -> Run:
    """Return the run in a folder, or the run that the folder is a part of."""
    run = Run.open(folder, finished=False)
    for parent in list(folder.absolute().parents)[:_LEVELS]:
        if (parent / "settings.json").is_file() and (above := Run.open(parent, finished=False)).job == run.job:
            run = above
    return run


def _number(run: Run, name: str) -> int:
    value = run.settings.get(name)
    return value if isinstance(value, int) else 0


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
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in self.no_settings}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    def begin(self, job: str, again: bool = False) -> Run:
        """Return the run of this job: new, or the unfinished one in the folder; with `again` also a finished one."""
        device = find_device(self.device)
        if self.device == "auto" and device.type == "cpu" and self._begun_on_cpu():
            object.__setattr__(self, "device", "cpu")  # the default of version 0.1, whose runs go on
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        ranks = ProcessGroup.current()
        if getattr(self, "devices", 1) not in (1, ranks.size):
            rule = f"`devices` of `{job}` must be the number of processes that were started."
            do = "The command line starts them; in Python use torchrun and torch.distributed.init_process_group."
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
        return Run.open(self.out, finished=False).settings.get("device") == "cpu"

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
        """Return the training and the validation samples; see `jacmatch.jobs.settings.parts`."""
        if data.positions and self.augment:
            rule = "`--augment` must not be given with per-position labels: it moves the pixels, but not the labels."
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
