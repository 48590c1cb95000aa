"""The source of a surrogate's samples: a function that can be evaluated, or a file."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.datasets import Data, from_arrays, split_validation
from jacmatch.datasets.arrays import OPTIONAL, npz_arrays
from jacmatch.datasets.files import is_file
from jacmatch.errors import InputError
from jacmatch.jobs.settings import flag
from jacmatch.jobs.surrogate import functions
from jacmatch.jobs.surrogate import points as sampling
from jacmatch.jobs.surrogate.fields import SurrogateFields
from jacmatch.jobs.surrogate.functions import EXAMPLES, Function, FunctionCheck, import_callable
from jacmatch.jobs.surrogate.points import Samples, cached, query, sample_actively
from jacmatch.runs import Run
from jacmatch.runs.identity import DOUBLE, Fingerprints, code_of, digest_of, probe, source_of
from jacmatch.surrogates.gaussian_process import INVERTED, fit_gaussian_process, wrong_partials
from jacmatch.surrogates.samples import (
    DataWarning,
    check_cotangents,
    check_jacobian,
    shared_scale,
    standardize,
    suspicious,
)
from jacmatch.surrogates.tables import load_table
from jacmatch.teachers.cached.format import digest

FILES = ("npz:", "csv:", "parquet:")
_CHECKED = 16  # points
_TEST_SEED = 2**20  # seeds of held-out points begin here
_SIZES = (32, 64, 128, 256)


@dataclass(frozen=True, eq=False)
class Arrays:
    """The samples of a file."""

    data: Data  # fields are flat
    train: Samples
    test: Samples
    output: tuple[int, ...] | None = None  # axes of a field
    warnings: tuple[str, ...] = ()  # problems of the samples, one line each


@dataclass(frozen=True, eq=False)
class Source:
    """A function or a file to learn from."""

    job: SurrogateFields  # the settings
    function: Function | None  # the function, None for a file
    check: FunctionCheck | None  # the result of the check of the function
    file: Arrays | None  # the samples of a file
    region: Float[Tensor, "corner *input"]  # the box, or all given points
    units: Float[Tensor, "*input"]  # units of the inputs

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of training points."""
        if self.job.samples:
            return self.job.samples
        if self.function is not None and self.job.sampling != "given":
            return (8, 16) if self.job.smoke else _SIZES
        total = len(self.file.train) if self.file is not None else len(self.region) - len(self.region) // 5
        if self.job.smoke:
            return tuple(sorted({min(8, total), min(16, total)}))
        return tuple(sorted({max(4, total // part) for part in (8, 4, 2, 1)} - {n for n in (4,) if n > total}))

    @property
    def has_partials(self) -> bool:
        """Whether partials are known."""
        return self.function is not None or (self.file is not None and self.file.train.j is not None)

    @property
    def inputs(self) -> dict[str, Fingerprints]:
        """Inputs of the run besides its settings: the arrays of the file, or points, code and values."""
        if self.file is not None:
            train = self.file.train
            data: dict[str, Fingerprints] = {"data": dict(self.file.data.digests)}
            if train.u is None or train.j is None:
                return data
            return data | {"projections": {"u": digest(("u", train.u)), "j": digest(("j", train.j))}}
        assert self.check is not None
        function: Fingerprints = {**code_behind(self.job.teacher), **code_behind(self.job.jacobian)}
        function |= {"call": digest_of(source_of(self._function.call)), "slopes by": self._function.way}
        tolerance = max(DOUBLE, 1e3 * self._function.precision)
        for name in ("values", "jacobians"):
            known = getattr(self.check, name)
            if known is not None:
                function[name] = probe(known.flatten().tolist(), tolerance)
        given = "points" if self.job.sampling == "given" else "box"
        return {given: {"x": digest(("x", self.region))}, "function": function}

    def training(self, run: Run, seed: int, learn: Callable[[Samples], nn.Module]) -> dict[int, Samples]:
        """Training points of a seed for each size, cached in the run. `learn` trains a student, for active sampling."""
        most = self.sizes[-1]
        if self.file is not None:
            order = torch.randperm(len(self.file.train), generator=torch.Generator().manual_seed(seed))
            return {size: self.file.train.rows(order[:size]) for size in self.sizes}
        if self.job.sampling in ("latin-hypercube", "active"):  # a subset of these is not such a set
            return {size: self._cached(run, f"points-seed{seed}-n{size}", size, seed, learn) for size in self.sizes}
        samples = self._cached(run, f"points-seed{seed}", most, seed, learn)
        return {size: samples.rows(slice(size)) for size in self.sizes}

    def test(self, run: Run) -> Samples:
        """Held-out points, the same for all seeds."""
        if self.file is not None:
            return self.file.test
        count = 50 if self.job.smoke else self.job.test_samples
        if self.job.sampling == "given":
            x = self._given(self.job.seed)[1][:count]
        else:
            x = sampling.inside(sampling.cube("box", count, len(self.units), _TEST_SEED + self.job.seed), self.region)
        return cached(run, "points-test", lambda: query(self._function, x, jacobians=True), self.function)

    def _cached(self, run: Run, name: str, count: int, seed: int, learn: Callable[[Samples], nn.Module]) -> Samples:
        return cached(run, name, lambda: self._query(count, seed, learn), self.function)

    def _query(self, count: int, seed: int, learn: Callable[[Samples], nn.Module]) -> Samples:
        kind, jacobians = self.job.sampling, "slopes" in self.job.methods

        def points(number: int, own: int) -> Tensor:
            return sampling.inside(sampling.cube(kind, number, len(self.units), own), self.region)

        def answer(x: Tensor) -> Samples:
            return query(self._function, x, jacobians=jacobians)

        if kind == "given":
            x, _ = self._given(self.job.seed)
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
            return answer(x[order[:count]])
        if kind != "active":
            return answer(points(count, seed))
        units = (self.units, _units("output", self.job.output_units, None))
        return sample_actively(
            points(count, seed), points, answer, learn, units, count, rounds=self.job.rounds, seed=2**16 * (seed + 1)
        )

    def _given(self, seed: int) -> tuple[Tensor, Tensor]:
        """The given points for training, and those that are held out."""
        order = torch.randperm(len(self.region), generator=torch.Generator().manual_seed(seed))
        held_out = len(self.region) // 5
        return self.region[order[held_out:]], self.region[order[:held_out]]

    def output_units(self, y: Float[Tensor, "sample out"]) -> Float[Tensor, "out"]:
        """Return the units of the outputs: as given, or the standard deviation of these values; a field shares it."""
        spread = y.std(0, unbiased=False)
        if self.file is not None and self.file.output is not None:
            spread = torch.from_numpy(shared_scale(y.numpy(), self.file.output))
        units = _units("output", self.job.output_units, spread)
        assert units is not None
        return units

    @property
    def _function(self) -> Function:
        assert self.function is not None
        return self.function


def open_source(job: SurrogateFields) -> Source:
    """Return the source that the settings name, checked at some points."""
    if job.teacher.startswith(FILES):
        return _file(job)
    for name in ("x_columns", "y_columns"):
        if getattr(job, name):
            rule = f"`{flag(name)}` of `surrogate` requires a table."
            raise InputError(rule, got=job.teacher, do="Name csv:FILE or parquet:FILE, or leave it out.")
    call = EXAMPLES[job.teacher] if job.teacher in EXAMPLES else import_callable(job.teacher)
    if job.points is not None:
        region = read_points(job.points)
        units = _units("input", job.input_units, region.std(0, unbiased=False))
        some = region[torch.linspace(0, len(region) - 1, min(_CHECKED, len(region))).long()]
    else:
        low, high = job.low or getattr(call, "low", ()), job.high or getattr(call, "high", ())
        region = sampling.box(tuple(low), tuple(high), job.inputs)
        units = _units("input", job.input_units, (region[1] - region[0]) / 12**0.5)
        some = sampling.inside(sampling.cube("sobol", _CHECKED, region.shape[1], _TEST_SEED + job.seed), region)
    assert units is not None
    own, way = None, job.jacobian
    if way not in ("auto", *functions.WAYS):
        own, way = import_callable(way, "--jacobian"), "own"
    _resolved(region, units)
    function = functions.open_function(job.teacher, call, some, units, own=own, way=way, step=job.step)  # type: ignore[arg-type]
    check = replace(functions.check_function(function, some), calls=function.points)
    _units("output", job.output_units, torch.ones(check.outputs))
    _enough(job, len(region) - len(region) // 5 if job.points is not None else None)
    return Source(job, function, check, None, region, units)


def code_behind(spec: str) -> Fingerprints:
    """Fingerprints of the module in a PACKAGE.MODULE:CALLABLE and of its imports; empty for other names."""
    module, colon, _ = spec.partition(":")
    return code_of(module) if colon else {}


def _units(kind: str, given: tuple[float, ...], spread: Tensor | None) -> Tensor | None:
    """The units that are given, one for all or one for each; the spread if none are."""
    flag = f"`--{kind}-units` of `surrogate`"
    if given:
        if spread is not None and len(given) not in (1, spread.numel()):
            rule = f"{flag} must give one number per {kind} ({spread.numel()}), or one for all."
            raise InputError(rule, got=len(given))
        units = torch.tensor(given, dtype=torch.float64)
        return units if spread is None else units.expand(spread.numel()).reshape(spread.shape)
    if spread is None:
        return None
    if not bool((spread > 0).all()):
        still = ", ".join(str(number) for number in torch.nonzero(spread.flatten() <= 0)[:8, 0].tolist())
        rule = f"{flag} must be given if an {kind} never varies: its unit is then unknown."
        do = f"Give a typical change of each {kind}, or leave that one out."
        raise InputError(rule, got=f"{kind} {still}", do=do)
    return spread


def _resolved(x: Tensor, units: Tensor) -> None:
    """Refuse inputs whose change is lost in float32, in which networks are trained."""
    lost = x.abs().amax(0) * torch.finfo(torch.float32).eps >= 1e-3 * units
    if bool(lost.any()):
        number = int(lost.flatten().int().argmax())
        rule = "Inputs of `surrogate` must vary by more than the rounding errors of float32."
        got = f"input {number}: up to {float(x.abs().amax(0).flatten()[number]):.9g}, in units of "
        do = "Shift the input to begin near 0, and add the offset inside the function."
        raise InputError(rule, got=f"{got}{float(units.flatten()[number]):.3g}", do=do)


def _file(job: SurrogateFields) -> Source:
    """The arrays of a file."""
    for name in ("points", "low", "high", "step", "inputs"):
        if getattr(job, name) not in (None, ()):
            rule = f"`--{name}` of `surrogate` is for a function that can be evaluated."
            raise InputError(rule, got=job.teacher, do="Leave it out, or name PACKAGE.MODULE:CALLABLE.")
    if job.sampling != "sobol" or job.jacobian != "auto":
        rule = "`--sampling` and `--jacobian` of `surrogate` are for a function that can be evaluated."
        raise InputError(rule, got=job.teacher, do="Leave them out: the file has its points, and j_train its partials.")
    file = arrays_of(job)
    data = file.data
    if data.classes is not None:
        raise InputError(f"{job.teacher} must have targets (N, K) of a float type.", got="classes")
    if file.train.j is None and job.methods == ("slopes",):
        rule = f"{job.teacher} must have `j_train` (N, K, D) for `--methods slopes`."
        raise InputError(rule, got="values alone", do="Add the partials, or use --methods values.")
    units = _units("input", job.input_units, data.train.inputs().double().std(0, unbiased=False))
    assert units is not None
    _resolved(data.train.inputs().double(), units)
    source = Source(job, None, None, file, data.train.inputs().double(), units)
    source.output_units(file.train.y)
    _enough(job, len(file.train))
    for line in file.warnings:
        warnings.warn_explicit(f"{job.teacher}: {line}", DataWarning, "jacmatch", 0, registry={})
    return source


def _warnings(whole: Samples, *, field: bool, smoke: bool) -> list[str]:
    """Return one line for each problem of the samples of a file."""
    partials = None if whole.j is None or whole.u is not None else whole.j.flatten(2).numpy()
    x, y = whole.x.flatten(1).numpy(), whole.y.numpy()
    lines = suspicious(x, y, partials, field=field)
    if lines or field or smoke or partials is None or y.size * (1 + x.shape[1]) > INVERTED:
        return lines
    return wrong_partials(fit_gaussian_process(standardize(x, y, partials)[0], calibrated=False))


def arrays_of(job: SurrogateFields) -> Arrays:
    """Return the samples of the file; without test points, a fifth of them is held out."""
    if job.teacher.startswith("npz:"):
        optional = (*OPTIONAL, "u_train", "u_test")
        arrays = npz_arrays(job.teacher.removeprefix("npz:"), ("x_train", "y_train"), optional)
    else:
        arrays = load_table(job.teacher, job.x_columns, job.y_columns)
    tested = "x_test" in arrays or "y_test" in arrays
    if not tested:
        count = len(np.atleast_1d(np.asarray(arrays["y_train"])))
        if 0 < count < 5:
            rule = f"{job.teacher} must have at least 5 samples, of which one is held out, or test points."
            raise InputError(rule, got=count)
        arrays |= {key.replace("train", "test"): array for key, array in arrays.items()}
    output = _flat_fields(job.teacher, arrays)
    parts = [part for part in ("train", "test") if f"u_{part}" in arrays]
    projected = {key: arrays.pop(key, None) for part in parts for key in (f"u_{part}", f"j_{part}")}
    data = from_arrays(job.teacher, arrays)
    train, test = (_samples(job.teacher, data, part, projected, output) for part in ("train", "test"))
    lines = () if data.classes is not None else _warnings(train, field=output is not None, smoke=job.smoke)
    if not tested:
        rows, held_out = split_validation(data.train.y, 0.2, job.seed)
        data = replace(data, train=data.train.subset(rows), test=data.train.subset(held_out))
        train, test = train.rows(rows), train.rows(held_out)
    return Arrays(data, train, test, output, tuple(lines))


def _flat_fields(name: str, arrays: dict[str, object]) -> tuple[int, ...] | None:
    """Flatten fields (N, *output) and their Jacobians, but not projections; return the axes of the output."""
    shape: tuple[int, ...] = np.asarray(arrays["y_train"]).shape
    if len(shape) < 3:
        if "u_train" in arrays:
            rule = f"`u_train` of {name} is for fields: `y_train` of shape (N, H, W), (N, K, H, W) or with more axes."
            raise InputError(rule, got=f"`y_train` of shape {shape}", do="Give `j_train` (N, K, *input) alone.")
        for part in ("train", "test"):
            y, j = np.asarray(arrays.get(f"y_{part}")), np.asarray(arrays.get(f"j_{part}"))
            if y.ndim == 1 and y.dtype.kind == "f":
                arrays[f"y_{part}"] = y[:, None]
            elif y.ndim == 2 and y.dtype.kind in "iu":
                arrays[f"y_{part}"] = y.astype(np.float64)
            if y.shape[1:] in ((), (1,)) and j.ndim and j.shape == np.asarray(arrays.get(f"x_{part}")).shape:
                arrays[f"j_{part}"] = j[:, None]
        return None
    output = shape[1:]
    for part in ("train", "test"):
        y = np.asarray(arrays.get(f"y_{part}"))
        if y.shape[1:] != output:
            raise InputError(f"`y_{part}` of {name} must have the shape (N, {str(output)[1:]}.", got=f"shape {y.shape}")
        arrays[f"y_{part}"] = y.reshape(len(y), -1)
        j = np.asarray(arrays.get(f"j_{part}", ()))
        if f"u_{part}" not in arrays and j.size:
            if j.shape[1 : 1 + len(output)] != output:
                rule = f"`j_{part}` of {name} must be the Jacobians of the fields, (N, *output, *input)."
                do = f"Give cotangents, `u_{part}` (N, P, *output), where they are projections (N, P, *input)."
                raise InputError(rule, got=f"shape {j.shape}", do=do)
            arrays[f"j_{part}"] = j.reshape(len(y), -1, *j.shape[1 + len(output) :])
    return output


def _samples(
    name: str, data: Data, part: str, projected: Mapping[str, object], output: tuple[int, ...] | None
) -> Samples:
    """Return the samples of a part of a file, in float64."""
    split = data.train if part == "train" else data.test
    x, partials = split.inputs().double(), None if split.jacobians is None else split.jacobians.double()
    if f"u_{part}" not in projected or output is None:
        return Samples(x, split.y.double(), partials)
    if projected[f"j_{part}"] is None:
        rule = f"`u_{part}` of {name} needs `j_{part}`, the projections uᵀ ∂y/∂x (N, P, *input)."
        raise InputError(rule, got="no such array", do="Without it, leave the cotangents out.")
    u = check_cotangents(projected[f"u_{part}"], len(x), output, f"`u_{part}` of {name}")
    what, given = f"`j_{part}` of {name}", np.asarray(projected[f"j_{part}"])
    if given.shape == (len(x), u.shape[1], *x.shape[1:]):
        given = given.reshape(*given.shape[:2], -1)
    j = check_jacobian(given, (len(x), u.shape[1], x[0].numel()), "projections", what)
    return Samples(x, split.y.double(), torch.from_numpy(j).reshape(*j.shape[:2], *x.shape[1:]), u=torch.from_numpy(u))


def _enough(job: SurrogateFields, there: int | None) -> None:
    most = max(job.samples, default=4)
    if there is not None and most > there:
        rule = f"`--samples` of `surrogate` must be at most {there}, the number of training points."
        raise InputError(rule, got=most)


def read_points(path: Path) -> Float[Tensor, "sample input"]:
    """Return the array of an .npy file."""
    rule = f"`--points {path}` of `surrogate` must be an .npy file with an array (N, D) of finite floats, N ≥ 10."
    if not is_file(path):
        raise InputError(rule, got="no such file", do="Check the path.")
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # so that a header cannot claim more than the file has
    except Exception as error:  # numpy raises many types
        raise InputError(rule, got="no array, or a damaged one", do="Write it with np.save.") from error
    if array.ndim != 2 or array.dtype.kind != "f" or len(array) < 10:
        raise InputError(rule, got=f"{array.dtype} of shape {array.shape}", do="Write it with np.save.")
    if not np.isfinite(array).all():
        raise InputError(rule, got="NaN or infinity", do="Remove these rows.")
    return torch.from_numpy(array.astype(np.float64))
