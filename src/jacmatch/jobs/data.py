"""The data of a job: loaded by name or from a run folder, reduced, and split."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from jacmatch import datasets
from jacmatch.datasets import Data, Split, folders, from_arrays, of_classes
from jacmatch.datasets.arrays import OPTIONAL, REQUIRED, npz_arrays
from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jobs import networks
from jacmatch.runs import Run
from jacmatch.runs.identity import changed

SMOKE_TRAIN, SMOKE_TEST = 12, 2
"""Training and test samples of a smoke run, for each class."""
_LEVELS = 4  # a network of surrogate lies three folders below its run
_DO = "Name the data: --data."


def load(spec: str, seed: int, smoke: bool, *, positions: bool = False) -> Data:
    """Load a data set; in a smoke run with few test samples. Labels of positions need a job that allows them."""
    if not 0 <= seed < 2**63:
        raise InputError("`--seed` must be at least 0 and below 2⁶³.", got=seed)
    data = datasets.load(spec, seed)
    if data.positions and not positions:
        rule = "`--data` of this job must have one label for each sample."
        do = "Labels of positions are for train, distill, evaluate, compare, doctor and export."
        raise InputError(rule, got=f"labels (N, {', '.join(map(str, data.positions))})", do=do)
    return replace(data, test=some(data, data.test, SMOKE_TEST)) if smoke else data


def without_labels(spec: str, seed: int) -> Data:
    """Load data whose labels are not used: images may lie in DIR itself, and an archive may have `x_train` alone."""
    name, _, argument = spec.partition(":")
    if name == "npz":
        x: Any = npz_arrays(argument, ("x_train",), REQUIRED + OPTIONAL)["x_train"]
    elif name != "folder" or (x := folders.images(argument)) is None:
        return load(spec, seed, False)
    parts = {"x_train": x, "x_test": (x := np.atleast_1d(x))[:1]}
    return from_arrays(spec, parts | {"y_train": np.full((len(x), 1), 0.5), "y_test": np.full((len(x[:1]), 1), 0.5)})


def dense_settings(data: Data) -> dict[str, Any]:
    """Return the settings of an objective for labels of positions: outputs (B, K, H, W), means over positions."""
    return {"class_dim": 1, "positions": "mean"} if data.positions else {}


def some(data: Data, split: Split, count: int) -> Split:
    """Return the first `count` samples of each class; of numbers or labels of positions the first 100 samples."""
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
        raise InputError("`--per-class` must be at least 0, where 0 takes all.", got=per_class)
    if not (0 <= validation < 1 or (validation > 0 and float(validation).is_integer())):
        raise InputError("`--validation` must be a fraction below 1, or a whole number.", got=validation)
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
    runs = [Path(spec) for spec in models if networks.is_run(spec)]
    if data is not None:
        own = [run for run in map(_whole, runs) if run.settings.get("data") == data]
        return load(data, _number(own[0], "seed") if own else seed, smoke, positions=True)
    candidates = [data_of_run(folder, allow_code=allow_code) for folder in runs]
    if not candidates:
        return load("digits", seed, smoke)
    if len(candidates) > 1 and (difference := changed(*map(_of_test, candidates))):
        rule = f"`--data` of `{verb}` must be given for two runs that were tested on different data."
        raise InputError(rule, got=f"{candidates[0].name} and {candidates[1].name}: {difference}", do=_DO)
    first = candidates[0]
    return replace(first, test=some(first, first.test, SMOKE_TEST)) if smoke else first


def data_of_run(folder: Path, *, allow_code: bool = False) -> Data:
    """Return the data of a run, or of a network inside a run, as they were when it was started."""
    run = _whole(folder)
    spec = run.settings.get("teacher" if run.job == "surrogate" else "data")
    rule = f"`--data` must be given: the data of the run in {folder} cannot be loaded."
    if not isinstance(spec, str):
        raise InputError(rule, got=f"a run of `{run.job}` that names none", do=_DO)
    if run.job != "surrogate" and datasets.catalog.is_code(spec) and not allow_code:
        do = "If you trust it, add --allow-code, or name other data: --data."
        raise InputError(f"The data of the run in {folder} are made by code outside the package.", got=spec, do=do)
    try:
        candidates = _candidates(run, spec)
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


def _candidates(run: Run, spec: str) -> list[Data]:
    """Return the data sets that the run may have used; its fingerprints decide."""
    if run.job == "surrogate":
        from jacmatch.jobs.surrogate.fields import SurrogateFields  # imports scikit-learn
        from jacmatch.jobs.surrogate.source import FILES, arrays_of

        seed = _number(run, "seed")
        if not spec.startswith(FILES):
            return [_points(run)]
        x_columns, y_columns = (tuple(run.settings.get(name) or ()) for name in ("x_columns", "y_columns"))
        return [arrays_of(SurrogateFields(teacher=spec, seed=seed, x_columns=x_columns, y_columns=y_columns)).data]
    data = load(spec, _number(run, "seed"), bool(run.settings.get("smoke")), positions=True)
    if run.job != "transfer" or data.classes is None:
        return [data]
    source = _number(run, "source_classes") or data.outputs // 2  # a teacher that was trained first has had these
    parts = [of_classes(data, range(source, data.classes)), data]
    outputs = networks.describe(run.path).outputs
    return [replace(part, test=mixed(part.test)) for part in parts if part.outputs == outputs] or [data]


def _points(run: Run) -> Data:
    """Return the data of a surrogate run: the points at which its function was evaluated."""
    from jacmatch.jobs.surrogate.points import cached

    arrays: dict[str, object] = {}
    seed = _number(run, "seed")
    for part, pattern in (("test", "points-test.npz"), ("train", f"points-seed{seed}*.npz")):
        files = sorted(run.path.glob(pattern), key=lambda file: (len(file.name), file.name))
        if not files:
            raise InputError(f"{run.path} must hold the points of its function.", got=f"no {pattern}")
        points = cached(run, files[-1].stem, _missing)
        arrays |= {f"x_{part}": points.x.float(), f"y_{part}": points.y.float()}
        if points.j is not None:
            arrays[f"j_{part}"] = points.j.float()
    return from_arrays(f"the points of {run.path}", arrays)


def _missing() -> NoReturn:
    raise InputError("The file of the points of a run must exist.")


def _of_test(data: Data) -> dict[str, str]:
    return {name: digest for name, digest in data.digests.items() if name in ("x_test", "y_test")}


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
