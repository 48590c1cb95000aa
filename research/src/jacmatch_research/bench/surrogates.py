"""Surrogates beside those of SMT and JENN: the same points and partials, errors at fresh points, seconds.

    python -m jacmatch_research.bench.surrogates CELLS.json

measures cell by cell (problem, size, seed, method) and goes on where it was stopped. SMT and JENN are not installed
with the package: pip install smt jenn.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from scipy.stats import qmc
from torch import Tensor

from jacmatch.errors import optional_package
from jacmatch.jacobian.products import jacobian
from jacmatch.jobs.surrogate.examples import HIGH, LOW, flow, ishigami
from jacmatch.runs.files import write_whole
from jacmatch.surrogates import JacobianRegressor
from jacmatch_research.processes import one_thread

TEST, TEST_PARTIALS = 1000, 100
SIZES = (32, 128, 64, 256, 512)
SEEDS = 5


@dataclass(frozen=True)
class Problem:
    """A function of a batch, differentiable by autograd, on a box."""

    function: Callable[[Tensor], Tensor]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def samples(self, unit: ndarray) -> tuple[ndarray, ndarray, ndarray]:
        """Return inputs, values and partials at points of the unit cube."""
        low, high = np.array(self.low), np.array(self.high)
        x = low + (high - low) * unit
        y, j = jacobian(self.function, torch.from_numpy(x))
        return x, y.detach().numpy(), j.detach().numpy()


def rosenbrock(x: Tensor) -> Tensor:
    """Rosenbrock's valley in two dimensions (Rosenbrock 1960)."""
    a, b = x.unbind(1)
    return ((1 - a) ** 2 + 100 * (b - a * a) ** 2)[:, None]


def branin(x: Tensor) -> Tensor:
    """Branin's function (Branin 1972)."""
    a, b = x.unbind(1)
    return ((b - 5.1 / (4 * math.pi**2) * a**2 + 5 / math.pi * a - 6) ** 2 + 10 * (1 - 1 / (8 * math.pi)) * a.cos())[
        :, None
    ]


def tensor_product(x: Tensor) -> Tensor:
    """The product of cos πxᵢ."""
    return (math.pi * x).cos().prod(1, keepdim=True)


def robot_arm(x: Tensor) -> Tensor:
    """The distance of the end of a planar arm with four segments from its base (An & Owen 2001)."""
    lengths, angles = x[:, ::2], x[:, 1::2].cumsum(1)
    u, v = (lengths * angles.cos()).sum(1), (lengths * angles.sin()).sum(1)
    return (u * u + v * v + 1e-12).sqrt()[:, None]


def wing_weight(x: Tensor) -> Tensor:
    """The weight of a light aircraft's wing (Forrester, Sóbester & Keane 2008, section 1.2)."""
    area, fuel, aspect, sweep, pressure, taper, thickness, load, gross, paint = x.unbind(1)
    angle = sweep * math.pi / 180
    weight = 0.036 * area**0.758 * fuel**0.0035 * (aspect / angle.cos() ** 2) ** 0.6 * pressure**0.006 * taper**0.04
    return (weight * (100 * thickness / angle.cos()) ** -0.3 * (load * gross) ** 0.49 + area * paint)[:, None]


def ten_outputs(x: Tensor) -> Tensor:
    """Ten waves of six inputs along random directions."""
    directions = torch.from_numpy(np.random.default_rng(5).normal(size=(10, 6)))
    z = x @ directions.T
    return z.sin() + 0.3 * z * z * (0.5 * x[:, :1]).cos()


_WING_LOW = (150.0, 220.0, 6.0, -10.0, 16.0, 0.5, 0.08, 2.5, 1700.0, 0.025)
_WING_HIGH = (200.0, 300.0, 10.0, 10.0, 45.0, 1.0, 0.18, 6.0, 2500.0, 0.08)
PROBLEMS: dict[str, Problem] = {
    "rosenbrock": Problem(rosenbrock, (-2.0,) * 2, (2.0,) * 2),
    "ishigami": Problem(ishigami, (-math.pi,) * 3, (math.pi,) * 3),
    "water-flow": Problem(flow, LOW, HIGH),
    "ten-outputs": Problem(ten_outputs, (-1.0,) * 6, (1.0,) * 6),
    "wing-weight": Problem(wing_weight, _WING_LOW, _WING_HIGH),
    "robot-arm": Problem(robot_arm, (0.0, 0.0) * 4, (1.0, 2 * math.pi) * 4),
    "branin": Problem(branin, (-5.0, 0.0), (10.0, 15.0)),
    "tensor-product": Problem(tensor_product, (-1.0,) * 2, (1.0,) * 2),
}

Fitted = tuple[Callable[[ndarray], ndarray], Callable[[ndarray], ndarray]]
"""What predicts values (N, K), and partials (N, K, D)."""


def _ours(problem: Problem, x: ndarray, y: ndarray, j: ndarray, seed: int, **settings: Any) -> Fitted:
    model = JacobianRegressor(random_state=seed, **settings).fit(x, y, jacobian=j)
    return model.predict, model.predict_jacobian


def _smt(problem: Problem, x: ndarray, y: ndarray, j: ndarray, seed: int, *, partials: bool) -> Fitted:
    """A process for each output: gradient-enhanced with partial least squares, or of the values alone."""
    models = optional_package("smt.surrogate_models", "`bench surrogates`", "pip install smt")
    d, fitted = x.shape[1], []
    for k in range(y.shape[1]):
        if partials:
            limits = np.stack([problem.low, problem.high], 1)
            count = min(d, 3)
            model = models.GEKPLS(
                theta0=[1e-2] * count, n_comp=count, extra_points=min(d, 5), xlimits=limits, print_global=False
            )
        else:
            model = models.KRG(theta0=[1e-2] * d, print_global=False)
        model.set_training_values(x, y[:, k])
        for i in range(d if partials else 0):
            model.set_training_derivatives(x, j[:, k, i], i)
        model.train()
        fitted.append(model)

    def derivatives(points: ndarray) -> ndarray:
        return np.stack([np.stack([m.predict_derivatives(points, i)[:, 0] for i in range(d)], 1) for m in fitted], 1)

    return lambda points: np.concatenate([m.predict_values(points) for m in fitted], 1), derivatives


def _jenn(problem: Problem, x: ndarray, y: ndarray, j: ndarray, seed: int) -> Fitted:
    jenn = optional_package("jenn", "`bench surrogates`", "pip install jenn")
    network = jenn.NeuralNet([x.shape[1], 32, 32, y.shape[1]])
    network.fit(x.T, y.T, j.transpose(1, 2, 0), is_normalize=True, max_iter=2000, random_state=seed)
    return lambda points: network.predict(points.T).T, lambda points: network.predict_partials(points.T).transpose(
        2, 0, 1
    )


METHODS: dict[str, Callable[..., Fitted]] = {
    "auto": _ours,
    "network": lambda *args: _ours(*args, model="network"),
    "values": lambda problem, x, y, j, seed: _ours(problem, x, y, None, seed),  # type: ignore[arg-type]
    "jenn": _jenn,
    "gekpls": lambda *args: _smt(*args, partials=True),
    "kriging": lambda *args: _smt(*args, partials=False),
}


def cell(
    name: str, size: int, seed: int, method: str, tests: tuple[int, int] = (TEST, TEST_PARTIALS)
) -> dict[str, Any]:
    """Return errors in % of the standard deviation (partials: of their root mean square) and seconds."""
    problem = PROBLEMS[name]
    d = len(problem.low)
    x, y, j = problem.samples(qmc.LatinHypercube(d, seed=seed).random(size))
    points, values, partials = problem.samples(np.random.default_rng(10_000 + seed).random((tests[0], d)))
    scale = x.std(0) / y.std(0)[:, None]
    start = time.process_time()
    predict, derivatives = METHODS[method](problem, x, y, j, seed)
    fitted = time.process_time()
    found = np.asarray(predict(points)).reshape(values.shape)
    predicted = time.process_time()
    slow = np.asarray(derivatives(points[: tests[1]])).reshape(partials[: tests[1]].shape)
    done = time.process_time()
    off = (slow - partials[: tests[1]]) * scale
    return {
        "values": 100 * float(np.sqrt(np.mean(((found - values) / values.std(0)) ** 2))),
        "partials": 100 * float(np.sqrt(np.mean(off**2) / np.mean((partials[: tests[1]] * scale) ** 2))),
        "fit_seconds": fitted - start,
        "values_seconds": (predicted - fitted) / tests[0],
        "partials_seconds": (done - predicted) / tests[1],
    }


def measure(path: Path, *, limit: int = sys.maxsize) -> Mapping[str, Any]:
    """Measure the cells that are missing in the file, write it after each, and return all."""
    cells: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else {}
    order = [
        (size, seed, name, method) for seed in range(SEEDS) for size in SIZES for name in PROBLEMS for method in METHODS
    ]
    with one_thread():
        for size, seed, name, method in order:
            key = f"{name}/{size}/{seed}/{method}"
            if key in cells or limit <= 0:
                continue
            limit -= 1
            try:
                cells[key] = cell(name, size, seed, method)
            except Exception as error:  # a peer may fail on a problem: that is a result
                cells[key] = {"failed": f"{type(error).__name__}: {error}"[:200]}
            write_whole(path.parent, path.name, json.dumps({"cells": cells}, indent=1).encode() + b"\n")
            print(key, cells[key], flush=True)
    return cells


if __name__ == "__main__":
    measure(Path(sys.argv[1]))
