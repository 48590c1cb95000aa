"""Where a surrogate learns from: a function that can be asked anywhere, or a file that holds what was asked before."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.datasets import Data, from_arrays, npz, split_validation
from jacmatch.datasets.files import is_file
from jacmatch.errors import InputError
from jacmatch.jobs.surrogate import points as sampling
from jacmatch.jobs.surrogate.examples import EXAMPLES
from jacmatch.jobs.surrogate.fields import SurrogateFields
from jacmatch.jobs.surrogate.functions import WAYS, Function, Tried, found, opened, tried
from jacmatch.jobs.surrogate.points import Asked, actively, ask, kept
from jacmatch.runs import Run
from jacmatch.runs.identity import DOUBLE, Fingerprints, code_of, digest_of, probe, source_of
from jacmatch.surrogates.tables import load_table
from jacmatch.teachers.cached.fingerprint import digest

FILES = ("npz:", "csv:", "parquet:")
_TRIED = 16  # points
_TEST_SEED = 2**20  # seeds of held-out points begin here
_SIZES = (32, 64, 128, 256)


@dataclass(frozen=True, eq=False)
class Source:
    """What can be learned from.

    Attributes:
        job: The settings.
        function: What can be asked, None for a file.
        tried: What was found when it was.
        data: The file's arrays.
        place: The box, or all given points.
        units: Units of the inputs.
    """

    job: SurrogateFields
    function: Function | None
    tried: Tried | None
    data: Data | None
    place: Float[Tensor, "corner *input"]
    units: Float[Tensor, "*input"]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of training points."""
        if self.job.samples:
            return self.job.samples
        if self.job.smoke:
            return (8, 16)
        if self.function is not None and self.job.sampling != "given":
            return _SIZES
        total = len(self.data.train) if self.data is not None else len(self.place) - len(self.place) // 5
        return tuple(sorted({max(4, total // part) for part in (8, 4, 2, 1)} - {n for n in (4,) if n > total}))

    @property
    def slopes(self) -> bool:
        """Whether slopes are known."""
        return self.function is not None or (self.data is not None and self.data.train.jacobians is not None)

    @property
    def inputs(self) -> dict[str, Fingerprints]:
        """What the run is made of besides its settings: the arrays of the file, or points, code and values."""
        if self.data is not None:
            return {"data": dict(self.data.digests)}
        assert self.tried is not None
        function: Fingerprints = {**code_behind(self.job.teacher), **code_behind(self.job.jacobian)}
        function |= {"call": digest_of(source_of(self._function.call)), "slopes by": self._function.way}
        tolerance = max(DOUBLE, 1e3 * self._function.precision)
        for name in ("values", "jacobians"):
            said = getattr(self.tried, name)
            if said is not None:
                function[name] = probe(said.flatten().tolist(), tolerance)
        given = "points" if self.job.sampling == "given" else "box"
        return {given: {"x": digest(("x", self.place))}, "function": function}

    def training(self, run: Run, seed: int, learn: Callable[[Asked], nn.Module]) -> dict[int, Asked]:
        """Training points of a seed for each size, kept in the run. `learn` trains a student, for active sampling."""
        most = self.sizes[-1]
        if self.data is not None:
            order = torch.randperm(len(self.data.train), generator=torch.Generator().manual_seed(seed))
            whole = _of(self.data, train=True)
            return {size: whole.rows(order[:size]) for size in self.sizes}
        if self.job.sampling in ("latin-hypercube", "active"):  # of these a part is no such set
            return {size: self._kept(run, f"points-seed{seed}-n{size}", size, seed, learn) for size in self.sizes}
        asked = self._kept(run, f"points-seed{seed}", most, seed, learn)
        return {size: asked.rows(slice(size)) for size in self.sizes}

    def test(self, run: Run) -> Asked:
        """Held-out points, the same for all seeds."""
        if self.data is not None:
            return _of(self.data, train=False)
        count = 50 if self.job.smoke else self.job.test_samples
        if self.job.sampling == "given":
            x = self._given(self.job.seed)[1][:count]
        else:
            x = sampling.inside(sampling.cube("box", count, len(self.units), _TEST_SEED + self.job.seed), self.place)
        return kept(run, "points-test", lambda: ask(self._function, x, slopes=True), self.function)

    def _kept(self, run: Run, name: str, count: int, seed: int, learn: Callable[[Asked], nn.Module]) -> Asked:
        return kept(run, name, lambda: self._asked(count, seed, learn), self.function)

    def _asked(self, count: int, seed: int, learn: Callable[[Asked], nn.Module]) -> Asked:
        kind, slopes = self.job.sampling, "slopes" in self.job.methods

        def points(number: int, own: int) -> Tensor:
            return sampling.inside(sampling.cube(kind, number, len(self.units), own), self.place)

        def answer(x: Tensor) -> Asked:
            return ask(self._function, x, slopes=slopes)

        if kind == "given":
            x, _ = self._given(self.job.seed)
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
            return answer(x[order[:count]])
        if kind != "active":
            return answer(points(count, seed))
        units = (self.units, _units("output", self.job.output_units, None))
        return actively(
            points(count, seed), points, answer, learn, units, count, rounds=self.job.rounds, seed=2**16 * (seed + 1)
        )

    def _given(self, seed: int) -> tuple[Tensor, Tensor]:
        """The given points for training, and those that are held out."""
        order = torch.randperm(len(self.place), generator=torch.Generator().manual_seed(seed))
        held = len(self.place) // 5
        return self.place[order[held:]], self.place[order[:held]]

    @property
    def _function(self) -> Function:
        assert self.function is not None
        return self.function


def source(job: SurrogateFields) -> Source:
    """What the settings name, tried at some points.

    Raises:
        InputError: it cannot be learned from; the message says why.
    """
    if job.teacher.startswith(FILES):
        return _file(job)
    for name in ("x_columns", "y_columns"):
        if getattr(job, name):
            rule = f"`--{name.replace('_', '-')}` of `surrogate` is for a table."
            raise InputError(rule, got=job.teacher, do="Name csv:FILE or parquet:FILE, or leave it out.")
    call = EXAMPLES[job.teacher] if job.teacher in EXAMPLES else found(job.teacher)
    if job.points is not None:
        place = read_points(job.points)
        units = _units("input", job.input_units, place.std(0, unbiased=False))
        some = place[torch.linspace(0, len(place) - 1, min(_TRIED, len(place))).long()]
    else:
        low, high = job.low or getattr(call, "low", ()), job.high or getattr(call, "high", ())
        place = sampling.box(tuple(low), tuple(high), job.inputs)
        units = _units("input", job.input_units, (place[1] - place[0]) / 12**0.5)
        some = sampling.inside(sampling.cube("sobol", _TRIED, place.shape[1], _TEST_SEED + job.seed), place)
    assert units is not None
    own, way = None, job.jacobian
    if way not in ("auto", *WAYS):
        own, way = found(way, "--jacobian"), "own"
    _resolved(place, units)
    function = opened(job.teacher, call, some, units, own=own, way=way, step=job.step)  # type: ignore[arg-type]
    found_out = replace(tried(function, some), calls=function.points)
    _units("output", job.output_units, torch.ones(found_out.outputs))
    _enough(job, len(place) - len(place) // 5 if job.points is not None else None)
    return Source(job, function, found_out, None, place, units)


def code_behind(spec: str) -> Fingerprints:
    """The source of the module in a PACKAGE.MODULE:CALLABLE and of those that it imports; nothing for other names."""
    module, colon, _ = spec.partition(":")
    return code_of(module) if colon else {}


def output_units(job: SurrogateFields, y: Float[Tensor, "sample out"]) -> Float[Tensor, "out"]:
    """Units of the outputs: as given, or the standard deviation of these values.

    Raises:
        InputError: an output never varies, so its unit is not known.
    """
    units = _units("output", job.output_units, y.std(0, unbiased=False))
    assert units is not None
    return units


def _units(kind: str, given: tuple[float, ...], spread: Tensor | None) -> Tensor | None:
    """The units that are given, one for all or one for each; the spread if none are."""
    flag = f"`--{kind}-units` of `surrogate`"
    if given:
        if spread is not None and len(given) not in (1, spread.numel()):
            raise InputError(
                f"{flag} must be one for each of the {spread.numel()} {kind}s, or one for all.", got=len(given)
            )
        units = torch.tensor(given, dtype=torch.float64)
        return units if spread is None else units.expand(spread.numel()).reshape(spread.shape)
    if spread is None:
        return None
    if not bool((spread > 0).all()):
        still = ", ".join(str(number) for number in torch.nonzero(spread.flatten() <= 0)[:8, 0].tolist())
        rule = f"{flag} must be given where an {kind} never varies: its unit cannot be seen."
        raise InputError(
            rule, got=f"{kind} {still}", do=f"Give a typical change of each {kind}, or leave that one out."
        )
    return spread


def _resolved(x: Tensor, units: Tensor) -> None:
    """Refuses inputs whose change is lost in float32, in which networks are trained."""
    lost = x.abs().amax(0) * torch.finfo(torch.float32).eps >= 1e-3 * units
    if bool(lost.any()):
        number = int(lost.flatten().int().argmax())
        rule = "Inputs of `surrogate` must change by more than float32 can tell."
        got = f"input {number}: up to {float(x.abs().amax(0).flatten()[number]):.9g}, in units of "
        do = "Give the function an input that begins near 0, and add the rest inside it."
        raise InputError(rule, got=f"{got}{float(units.flatten()[number]):.3g}", do=do)


def _file(job: SurrogateFields) -> Source:
    """The arrays of a file."""
    for name in ("points", "low", "high", "step", "inputs"):
        if getattr(job, name) not in (None, ()):
            rule = f"`--{name}` of `surrogate` is for a function that can be asked."
            raise InputError(rule, got=job.teacher, do="Leave it out, or name PACKAGE.MODULE:CALLABLE.")
    if job.sampling != "sobol" or job.jacobian != "auto":
        rule = "`--sampling` and `--jacobian` of `surrogate` are for a function that can be asked."
        raise InputError(rule, got=job.teacher, do="Leave them out: the file has its points, and j_train its slopes.")
    data = arrays_of(job)
    if data.classes is not None:
        raise InputError(f"{job.teacher} must have targets (N, K) of a float type.", got="classes")
    if data.train.jacobians is None and job.methods == ("slopes",):
        rule = f"{job.teacher} must have `j_train` (N, K, D) for `--methods slopes`."
        raise InputError(rule, got="values alone", do="Add the partials, or use --methods values.")
    units = _units("input", job.input_units, data.train.inputs().double().std(0, unbiased=False))
    assert units is not None
    _resolved(data.train.inputs().double(), units)
    output_units(job, data.train.y.double())
    _enough(job, len(data.train))
    return Source(job, None, None, data, data.train.inputs().double(), units)


def arrays_of(job: SurrogateFields) -> Data:
    """The arrays of the file; a fifth of its points is held out where it has no others to test with."""
    if job.teacher.startswith("npz:"):
        arrays = npz.arrays(job.teacher.removeprefix("npz:"), ("x_train", "y_train"))
    else:
        arrays = load_table(job.teacher, job.x_columns, job.y_columns)
    if "x_test" in arrays or "y_test" in arrays:
        return from_arrays(job.teacher, arrays)
    same = {key.replace("train", "test"): array for key, array in arrays.items()}
    data = from_arrays(job.teacher, {**arrays, **same})
    kept, held = split_validation(data.train.y, 0.2, job.seed)
    return replace(data, train=data.train.subset(kept), test=data.train.subset(held))


def _of(data: Data, *, train: bool) -> Asked:
    split = data.train if train else data.test
    slopes = None if split.jacobians is None else split.jacobians.double()
    return Asked(split.inputs().double(), split.y.double(), slopes)


def _enough(job: SurrogateFields, there: int | None) -> None:
    most = max(job.samples, default=16 if job.smoke else 4)
    if there is not None and most > there:
        rule = f"`--samples` of `surrogate` must be at most the {there} training points there are."
        raise InputError(rule, got=most)


def read_points(path: Path) -> Float[Tensor, "sample input"]:
    """The array of an .npy file."""
    rule = f"`--points {path}` of `surrogate` must be an .npy file with an array (N, D) of finite floats, N ≥ 10."
    if not is_file(path):
        raise InputError(rule, got="no such file", do="Check the path.")
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # so that a header cannot ask for more than the file has
    except Exception as error:  # numpy has many
        raise InputError(rule, got="no array, or a damaged one", do="Write it with np.save.") from error
    if array.ndim != 2 or array.dtype.kind != "f" or len(array) < 10:
        raise InputError(rule, got=f"{array.dtype} of shape {array.shape}", do="Write it with np.save.")
    if not np.isfinite(array).all():
        raise InputError(rule, got="NaN or infinity", do="Remove these rows.")
    return torch.from_numpy(array.astype(np.float64))
