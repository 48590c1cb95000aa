"""What was asked of a function and what it said: points, values, slopes, and what they cost. Kept in the run folder."""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jacmatch.datasets import npz
from jacmatch.errors import InputError
from jacmatch.files import read
from jacmatch.jacobian import jacobian
from jacmatch.jobs.surrogate.functions import Function
from jacmatch.jobs.surrogate.sampling import shares, worst
from jacmatch.runs import Run
from jacmatch.runs.identity import DOUBLE

_AGAIN = 3  # points of a file that are asked again when a run goes on
_CHUNK = 256  # points whose Jacobians are taken at once


@dataclass(frozen=True, eq=False)
class Asked:
    """Points with their values, their slopes where known, and what they cost.

    Attributes:
        x: Inputs, float64.
        y: Values.
        j: Slopes ∂yₖ/∂xᵢ, None where unknown.
        calls: Points at which the function was asked; candidates that were not taken, and differences, included.
        seconds: Time spent in it.
    """

    x: Float[Tensor, "sample *input"]
    y: Float[Tensor, "sample out"]
    j: Float[Tensor, "sample out *input"] | None
    calls: int = 0
    seconds: float = 0.0

    def __len__(self) -> int:
        """The number of points."""
        return len(self.x)

    def rows(self, which: slice | Int[Tensor, "chosen"]) -> "Asked":
        """Some of the points, at a proportionate cost."""
        x = self.x[which]
        part = len(x) / max(len(self), 1)
        slopes = None if self.j is None else self.j[which]
        return Asked(x, self.y[which], slopes, round(self.calls * part), self.seconds * part)

    def joined(self, more: "Asked") -> "Asked":
        """Both."""
        slopes = None if self.j is None or more.j is None else torch.cat([self.j, more.j])
        return Asked(
            torch.cat([self.x, more.x]),
            torch.cat([self.y, more.y]),
            slopes,
            self.calls + more.calls,
            self.seconds + more.seconds,
        )


def ask(function: Function, x: Float[Tensor, "sample input"], *, slopes: bool) -> Asked:
    """What the function says at x."""
    calls, seconds = function.points, function.seconds
    y = function.values(x)
    j = torch.cat([function.slopes(part) for part in torch.split(x, _CHUNK)]) if slopes else None
    return Asked(x, y, j, function.points - calls, function.seconds - seconds)


def kept(run: Run, name: str, make: Callable[[], Asked], function: Function | None = None) -> Asked:
    """What the run folder holds under this name; made and kept, if it is not there yet.

    Args:
        run: The run.
        name: Of the file, without its ending.
        make: Asks for what is not there.
        function: What is asked again at some of the points that are there; it counts no calls.

    Raises:
        InputError: the file is damaged, or the function says something else now.
    """
    file = run.path / f"{name}.npz"
    if not file.is_file():
        made = make()
        arrays = {"x": made.x, "y": made.y, **({} if made.j is None else {"j": made.j})}
        stream = io.BytesIO()
        np.savez(
            stream,
            calls=np.array(made.calls),
            seconds=np.array(made.seconds),
            **{key: value.numpy() for key, value in arrays.items()},  # type: ignore[arg-type]
        )
        run.write_bytes(file.name, stream.getvalue())
        return made
    try:
        content = io.BytesIO(read(run.path, file))
        npz.check_sizes(content, str(file))
        with np.load(content, allow_pickle=False) as held:
            x, y = (torch.from_numpy(held[key]) for key in ("x", "y"))
            j = torch.from_numpy(held["j"]) if "j" in held.files else None
            shapes = [tuple(each.shape) for each in (x, y, *(() if j is None else (j,)))]
            if shapes[1:] != [(len(x), y.shape[1]), (len(x), y.shape[1], *x.shape[1:])][: len(shapes) - 1]:
                raise ValueError(f"shapes {shapes}")
            found = Asked(x, y, j, int(held["calls"]), float(held["seconds"]))
    except InputError:
        raise
    except Exception as error:  # numpy and zipfile have many
        raise InputError(f"{file} must hold the points of this run.", got=f"{error}", do="Remove it.") from error
    if function is not None and len(found):
        _says_the_same(file, found, replace(function))
    return found


def _says_the_same(file: Path, told: Asked, function: Function) -> None:
    """Refuses points that another function was asked about."""
    rows = torch.linspace(0, len(told) - 1, min(_AGAIN, len(told))).long()
    stored, now = told.y[rows], function.values(told.x[rows])
    off = math.inf
    if stored.shape == now.shape:
        off = float((stored - now).abs().max() / torch.maximum(stored.abs(), now.abs()).max().clamp_min(1e-300))
    if off > max(DOUBLE, 1e3 * function.precision):
        rule = f"{function.name} must say what it said when {file} was written."
        do = "Bring that function back, or choose another --out."
        raise InputError(rule, got=f"values that are off by {off:.2g} of the largest", do=do)


def actively(
    first: Float[Tensor, "sample input"],
    pool: Callable[[int, int], Float[Tensor, "candidate input"]],
    answer: Callable[[Float[Tensor, "candidate input"]], Asked],
    learn: Callable[[Asked], nn.Module],
    units: tuple[Float[Tensor, "input"], Float[Tensor, "out"] | None],
    count: int,
    *,
    rounds: int,
    seed: int,
    more: int = 4,
) -> Asked:
    """`first`, and in each round points where a student of those so far disagrees with its teacher; in that order.

    Args:
        first: Candidates of which the first ones begin.
        pool: Makes so many candidates for a seed.
        answer: Asks the teacher.
        learn: Trains a student.
        units: Of inputs and outputs; the deviation of the values if None.
        count: How many points in all.
        rounds: In how many rounds.
        seed: Of the draws.
        more: Candidates for each point that is taken; the teacher is asked at all of them.
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
        known = known.joined(Asked(taken.x, taken.y, taken.j, candidates.calls, candidates.seconds))
    return known


def disagreement(
    student: nn.Module, told: Asked, units: tuple[Float[Tensor, "input"], Float[Tensor, "out"] | None]
) -> Float[Tensor, "sample"]:
    """How far the student is from what it was told, at each point: squared error of values and slopes in units.

    The slopes count so much that both parts would be equal for a student that says the mean everywhere.
    """
    s, t = units[0], units[1] if units[1] is not None else told.y.std(0).clamp_min(1e-300)
    values, slopes = said(student, told.x, slopes=told.j is not None)
    far = ((values - told.y) / t).square().sum(1)
    if told.j is None or slopes is None:
        return far
    size = _in_units(told.j, s, t).square().sum((1, 2))
    weight = float(((told.y - told.y.mean(0)) / t).square().sum(1).mean() / size.mean().clamp_min(1e-300))
    return far + weight * _in_units(slopes - told.j, s, t).square().sum((1, 2))


def said(
    student: nn.Module, x: Float[Tensor, "sample *input"], *, slopes: bool
) -> tuple[Float[Tensor, "sample out"], Float[Tensor, "sample out *input"] | None]:
    """Values and slopes of a student in float64, whatever its own type and device."""
    like = next(student.parameters())
    values, rows = [], []
    with torch.no_grad():
        for part in torch.split(x, _CHUNK):
            asked = part.to(like)
            if slopes:
                y, j = jacobian(student, asked)
                rows.append(j.detach().double().cpu())
            else:
                y = student(asked)
            values.append(y.detach().double().cpu())
    return torch.cat(values), torch.cat(rows) if slopes else None


def errors(
    student: nn.Module, test: Asked, s: Float[Tensor, "*input"], t: Float[Tensor, "out"]
) -> dict[str, float | None]:
    """How good a student is at held-out points.

    `rmse` is in raw units, over all outputs as `evaluate` has it; `values` and `slopes` are RMSE in units t and t/s;
    `jacobian_relative_error` and `jacobian_cosine` are of the slopes in units.
    """
    values, slopes = said(student, test.x, slopes=test.j is not None)
    off = values - test.y
    found: dict[str, float | None] = {
        "rmse": _rms(off),
        "values": _rms(off / t),
        "slopes": None,
        "jacobian_relative_error": None,
        "jacobian_cosine": None,
    }
    if test.j is not None and slopes is not None and not bool(test.j.isnan().all()):
        unknown = test.j.isnan()
        true, mine = (_in_units(each.masked_fill(unknown, 0.0), s, t) for each in (test.j, slopes))
        size = float(true.norm())
        found["slopes"] = _rms((mine - true)[~unknown.flatten(2)])
        found["jacobian_relative_error"] = float((mine - true).norm()) / size if size else None
        some = ~unknown.flatten(1).all(1)
        cosine = nn.functional.cosine_similarity(mine[some].flatten(1), true[some].flatten(1), dim=1).mean()
        found["jacobian_cosine"] = float(cosine)
    return found


def _in_units(j: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Slopes (N, K, D) in units t/s, whatever the shape of the inputs."""
    return (j * s).flatten(2) / t[:, None]


def _rms(off: Tensor) -> float:
    return math.sqrt(float(off.square().mean()))
