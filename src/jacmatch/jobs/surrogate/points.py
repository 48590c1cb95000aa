"""Points of a surrogate, their values and Jacobians, and their cost."""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jacmatch.datasets.arrays import check_npz_sizes
from jacmatch.errors import InputError, converted_errors, unknown_name
from jacmatch.files import read
from jacmatch.jacobian import jacobian, vjp
from jacmatch.jobs.surrogate.functions import Function
from jacmatch.runs import Run
from jacmatch.runs.identity import DOUBLE

Sampling = Literal["box", "sobol", "latin-hypercube", "given", "active"]
SAMPLINGS: tuple[Sampling, ...] = ("box", "sobol", "latin-hypercube", "given", "active")
Points = Float[Tensor, "sample input"]


def cube(kind: str, count: int, inputs: int, seed: int) -> Points:
    """Return points in the unit cube, in float64.

    Any number of first points of a scrambled `sobol` sequence is evenly spread. In a `latin-hypercube`, each slice of
    an axis has one point.
    """
    if count < 1 or inputs < 1:
        raise InputError("`count` and `inputs` of a sample must be at least 1.", got=f"{count} and {inputs}")
    generator = torch.Generator().manual_seed(seed)
    if kind == "box":
        return torch.rand(count, inputs, generator=generator, dtype=torch.float64)
    if kind in ("sobol", "active"):
        if inputs > torch.quasirandom.SobolEngine.MAXDIM:
            most = torch.quasirandom.SobolEngine.MAXDIM
            rule = f"`--sampling sobol` and `active` of `surrogate` must have at most {most} inputs."
            raise InputError(rule, got=inputs, do="Use --sampling box or latin-hypercube.")
        engine = torch.quasirandom.SobolEngine(inputs, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
        return engine.draw(count, dtype=torch.float64)
    if kind == "latin-hypercube":
        slices = torch.stack([torch.randperm(count, generator=generator) for _ in range(inputs)], 1)
        return (slices + torch.rand(count, inputs, generator=generator, dtype=torch.float64)) / count
    raise unknown_name("`--sampling` of `surrogate`", kind, SAMPLINGS)


def box(low: tuple[float, ...], high: tuple[float, ...], inputs: int | None) -> Float[Tensor, "2 input"]:
    """Return the corners of the box, with one bound for each input or one for all."""
    size = inputs or max(len(low), len(high))
    for name, given in (("low", low), ("high", high)):
        if len(given) not in (1, size) or not size:
            rule = f"`--{name}` of `surrogate` must have a bound for each of the {size or 'D'} inputs, or one for all."
            raise InputError(rule, got=f"{len(given)}", do="--low 0 -1 --high 1 1 is a box of two inputs.")
    corners = [torch.tensor(given, dtype=torch.float64).expand(size) for given in (low, high)]
    if not bool(((corners[1] > corners[0]) & (corners[1] - corners[0]).isfinite()).all()):
        raise InputError("`--low` must be below `--high` for each input, both finite.", got=f"{low} and {high}")
    return torch.stack(corners)


def inside(unit: Points, corners: Float[Tensor, "2 input"]) -> Points:
    """Map points of the unit cube into the box."""
    return corners[0] + unit * (corners[1] - corners[0])


def worst(disagreement: Float[Tensor, "sample"], count: int, seed: int) -> Int[Tensor, "chosen"]:
    """Select `count` candidates at random, with probabilities proportional to their disagreement.

    The largest disagreements are not simply selected, because they are close to each other.
    """
    weights = disagreement.double().clamp_min(0)
    weights = weights + 1e-12 * weights.sum() + 1e-300
    return torch.multinomial(weights, count, generator=torch.Generator().manual_seed(seed))


def shares(count: int, rounds: int) -> list[int]:
    """Return the number of points at the start and after each round of active sampling; the last is `count`.

    The first third of the points is drawn at the start; the rounds add equal parts of the others.
    """
    first = max(2, count // 3)
    return [first + (count - first) * number // rounds for number in range(rounds + 1)]


_AGAIN = 3  # points of a file that are evaluated again when a run is resumed
_CHUNK = 256  # points whose Jacobians are taken at once


@dataclass(frozen=True, eq=False)
class Samples:
    """Points with their values, known Jacobians, and cost."""

    x: Float[Tensor, "sample *input"]  # inputs, float64
    y: Float[Tensor, "sample out"]  # values
    j: Float[Tensor, "sample row *input"] | None  # partials ∂yₖ/∂xᵢ, None where unknown
    calls: int = 0  # number of evaluations of the function, including rejected candidates and differences
    seconds: float = 0.0  # seconds spent in the function
    u: Float[Tensor, "sample row out"] | None = None  # cotangents, if j has projections uᵀ ∂y/∂x instead

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, which: slice | Int[Tensor, "chosen"]) -> "Samples":
        """Some of the points, at a proportionate cost."""
        x = self.x[which]
        part = len(x) / max(len(self), 1)
        partials, cotangents = (None if each is None else each[which] for each in (self.j, self.u))
        return Samples(x, self.y[which], partials, round(self.calls * part), self.seconds * part, cotangents)

    def joined(self, more: "Samples") -> "Samples":
        """Return the points of both."""
        partials = None if self.j is None or more.j is None else torch.cat([self.j, more.j])
        x, y = torch.cat([self.x, more.x]), torch.cat([self.y, more.y])
        return Samples(x, y, partials, self.calls + more.calls, self.seconds + more.seconds)


def query(function: Function, x: Float[Tensor, "sample input"], *, jacobians: bool) -> Samples:
    """Return values and, if requested, Jacobians of the function at x."""
    calls, seconds = function.points, function.seconds
    y = function.values(x)
    j = torch.cat([function.jacobian(part) for part in torch.split(x, _CHUNK)]) if jacobians else None
    return Samples(x, y, j, function.points - calls, function.seconds - seconds)


def cached(run: Run, name: str, make: Callable[[], Samples], function: Function | None = None) -> Samples:
    """Return the samples in a file of the run folder; if it is missing, make and write it.

    `function` is evaluated again at some of the points in the file; these calls are not counted.
    """
    file = run.path / f"{name}.npz"
    if not file.is_file():
        made = make()
        arrays: dict[str, Any] = {"x": made.x, "y": made.y, **({} if made.j is None else {"j": made.j})}
        stream = io.BytesIO()
        np.savez(stream, calls=made.calls, seconds=made.seconds, **arrays)
        run.write_bytes(file.name, stream.getvalue())
        return made
    with converted_errors(f"{file} must contain the points of this run.", "Remove it."):
        content = io.BytesIO(read(run.path, file))
        check_npz_sizes(content, str(file))
        with np.load(content, allow_pickle=False) as archive:
            x, y = (torch.from_numpy(archive[key]) for key in ("x", "y"))
            j = torch.from_numpy(archive["j"]) if "j" in archive.files else None
            shapes = [tuple(each.shape) for each in (x, y, *(() if j is None else (j,)))]
            if shapes[1:] != [(len(x), y.shape[1]), (len(x), y.shape[1], *x.shape[1:])][: len(shapes) - 1]:
                raise ValueError(f"shapes {shapes}")
            samples = Samples(x, y, j, int(archive["calls"]), float(archive["seconds"]))
    if function is not None and len(samples):
        _check_unchanged(file, samples, replace(function))
    return samples


def _check_unchanged(file: Path, samples: Samples, function: Function) -> None:
    """Refuse samples of another function."""
    rows = torch.linspace(0, len(samples) - 1, min(_AGAIN, len(samples))).long()
    stored, now = samples.y[rows], function.values(samples.x[rows])
    off = math.inf
    if stored.shape == now.shape:
        off = float((stored - now).abs().max() / torch.maximum(stored.abs(), now.abs()).max().clamp_min(1e-300))
    if off > max(DOUBLE, 1e3 * function.precision):
        rule = f"{function.name} must return the values that {file} holds."
        do = "Restore that function, or choose another --out."
        raise InputError(rule, got=f"values that are off by {off:.2g} of the largest", do=do)


def sample_actively(
    first: Float[Tensor, "sample input"],
    pool: Callable[[int, int], Float[Tensor, "candidate input"]],
    answer: Callable[[Float[Tensor, "candidate input"]], Samples],
    learn: Callable[[Samples], nn.Module],
    units: tuple[Float[Tensor, "input"], Float[Tensor, "out"] | None],
    count: int,
    *,
    rounds: int,
    seed: int,
    more: int = 4,
) -> Samples:
    """Add points to `first` in rounds, where a student of the points so far disagrees with the teacher.

    The teacher is evaluated at `more` candidates for each point that is added.
    """
    sizes = shares(count, rounds)
    known = answer(first[: sizes[0]])
    for number, size in enumerate(sizes[1:], 1):
        missing = size - len(known)
        if not missing:
            continue
        candidates = answer(pool(more * missing, seed + number))
        far = disagreement(learn(known), candidates, units)
        taken = candidates.rows(worst(far, missing, seed + number))
        known = known.joined(Samples(taken.x, taken.y, taken.j, candidates.calls, candidates.seconds))
    return known


def disagreement(
    student: nn.Module, samples: Samples, units: tuple[Float[Tensor, "input"], Float[Tensor, "out"] | None]
) -> Float[Tensor, "sample"]:
    """Return the squared error of the student at each point, of values and Jacobian in units.

    The Jacobian is weighted so that both parts are equal for a student that predicts the mean everywhere.
    """
    s, t = units[0], units[1] if units[1] is not None else samples.y.std(0).clamp_min(1e-300)
    values, partials = predictions(student, samples.x, jacobians=samples.j is not None)
    far = ((values - samples.y) / t).square().sum(1)
    if samples.j is None or partials is None:
        return far
    size = _in_units(samples.j, s, t).square().sum((1, 2))
    weight = float(((samples.y - samples.y.mean(0)) / t).square().sum(1).mean() / size.mean().clamp_min(1e-300))
    return far + weight * _in_units(partials - samples.j, s, t).square().sum((1, 2))


def predictions(
    student: nn.Module,
    x: Float[Tensor, "sample *input"],
    *,
    jacobians: bool,
    u: Float[Tensor, "sample row out"] | None = None,
) -> tuple[Float[Tensor, "sample out"], Float[Tensor, "sample row *input"] | None]:
    """Return values, and Jacobians or their projections on u, in float64 for any dtype and device of the student."""
    like = next(student.parameters(), torch.empty(0))  # a Gaussian process has none
    values, rows = [], []
    with torch.no_grad():
        for start in range(0, len(x), _CHUNK):
            part = slice(start, start + _CHUNK)
            inputs = x[part].to(like)
            if jacobians:
                if u is None:
                    y, j = jacobian(student, inputs)
                else:
                    each = [vjp(student, inputs, row.to(like)) for row in u[part].unbind(1)]
                    y, j = each[0][0], torch.stack([product for _, product in each], 1)
                rows.append(j.detach().double().cpu())
            else:
                y = student(inputs)
            values.append(y.detach().double().cpu())
    return torch.cat(values), torch.cat(rows) if jacobians else None


def errors(
    student: nn.Module, test: Samples, s: Float[Tensor, "*input"], t: Float[Tensor, "out"]
) -> dict[str, float | None]:
    """Return the errors of a student at held-out points.

    `rmse` is over all outputs, in raw units. `values` and `slopes` are the RMSE of values and partials in units t and
    t/s; projections uᵀ ∂y/∂x are divided by ‖u t‖. `jacobian_relative_error` and `jacobian_cosine` are those of the
    Jacobian, or of the projections, in these units.
    """
    values, partials = predictions(student, test.x, jacobians=test.j is not None, u=test.u)
    off = values - test.y
    measured: dict[str, float | None] = {"rmse": _rms(off), "values": _rms(off / t)}
    measured |= dict.fromkeys(("slopes", "jacobian_relative_error", "jacobian_cosine"))
    if test.j is not None and partials is not None and not bool(test.j.isnan().all()):
        unknown = test.j.isnan()
        of_rows = t if test.u is None else (test.u * t).norm(dim=2).clamp_min(1e-300)
        true, mine = (_in_units(each.masked_fill(unknown, 0.0), s, of_rows) for each in (test.j, partials))
        size = float(true.norm())
        measured["slopes"] = _rms((mine - true)[~unknown.flatten(2)])
        measured["jacobian_relative_error"] = float((mine - true).norm()) / size if size else None
        some = ~unknown.flatten(1).all(1)
        cosine = nn.functional.cosine_similarity(mine[some].flatten(1), true[some].flatten(1), dim=1).mean()
        measured["jacobian_cosine"] = float(cosine)
    return measured


def _in_units(j: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Partials (N, K, D) in units t/s, whatever the shape of the inputs; t is (K,) or (N, K)."""
    return (j * s).flatten(2) / t[..., None]


def _rms(off: Tensor) -> float:
    return math.sqrt(float(off.square().mean()))
