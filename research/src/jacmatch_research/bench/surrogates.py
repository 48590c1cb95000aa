"""`jacmatch bench surrogates`: errors and seconds compared with SMT and JENN, with the same points and partials.

    jacmatch bench surrogates --out DIR                                    # DIR/surrogates-cells.json is continued
    python -m jacmatch_research.bench.surrogates CELLS.json [METHOD ...]   # some methods only

Cell by cell (problem, size, seed, method), seed by seed, so that an interrupted run has results for all sizes. SMT and
JENN are not installed with the package: pip install smt jenn.
"""

import contextlib
import functools
import importlib.metadata
import json
import math
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from scipy.stats import qmc
from torch import Tensor

from jacmatch.errors import optional_package
from jacmatch.jacobian.products import jacobian
from jacmatch.jobs.surrogate.functions import HIGH, LOW, flow, ishigami
from jacmatch.runs.files import write_whole
from jacmatch.surrogates import JacobianRegressor
from jacmatch_research.bench.claims import Benchmark, Case, Claim, Conditions, Measured, NotMeasured, Spread
from jacmatch_research.processes import one_thread

TEST, TEST_PARTIALS = 1000, 100
SIZES = (32, 64, 128, 256, 512)
SEEDS = 5
LIMIT = 120.0
"""Processor seconds after which a cell is stopped; that it takes longer is its result."""


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


def torsion_vibration(x: Tensor) -> Tensor:
    """The low natural frequency of a shaft with two disks (Liping, Beeson, Wiggs & Rayasam 2006), 15 inputs."""
    d1, l1, g1, d2, g2, disk1, d3, l3, g3, d2b, t1, rho1, disk2, t2, rho2 = x.unbind(1)
    k1, k2, k3 = (math.pi * g * d / (32 * length) for g, d, length in ((g1, d1, l1), (g3, d3, l3), (g2, d2b, d2)))
    masses = rho1 * math.pi * t1 * disk1 / (4 * 9.80665), rho2 * math.pi * t2 * disk2 / (4 * 9.80665)
    j1, j2 = 0.5 * masses[0] * (disk1 / 2) ** 2, 0.5 * masses[1] * (disk2 / 2) ** 2
    b = (k1 + k2) / j1 + (k2 + k3) / j2
    c = (k1 * k2 + k2 * k3 + k3 * k1) / (j1 * j2)
    return (((b - (b * b - 4 * c).sqrt()) / 2).sqrt() / (2 * math.pi))[:, None]


def ten_outputs(x: Tensor) -> Tensor:
    """Ten sine waves of six inputs along random directions."""
    directions = torch.from_numpy(np.random.default_rng(5).normal(size=(10, 6)))
    z = x @ directions.T
    return z.sin() + 0.3 * z * z * (0.5 * x[:, :1]).cos()


_SHAFT = (2.0, 10.0, 1.17e7, 8.0, 3.9e6, 12.0, 1.825, 12.0, 6.2e6, 2.25, 3.0, 0.28, 14.0, 4.0, 0.1)
_WING_LOW = (150.0, 220.0, 6.0, -10.0, 16.0, 0.5, 0.08, 2.5, 1700.0, 0.025)
_WING_HIGH = (200.0, 300.0, 10.0, 10.0, 45.0, 1.0, 0.18, 6.0, 2500.0, 0.08)
PROBLEMS: dict[str, Problem] = {
    "rosenbrock": Problem(rosenbrock, (-2.0,) * 2, (2.0,) * 2),
    "ishigami": Problem(ishigami, (-math.pi,) * 3, (math.pi,) * 3),
    "water-flow": Problem(flow, LOW, HIGH),
    "ten-outputs": Problem(ten_outputs, (-1.0,) * 6, (1.0,) * 6),
    "wing-weight": Problem(wing_weight, _WING_LOW, _WING_HIGH),
    "torsion-vibration": Problem(
        torsion_vibration, tuple(0.9 * each for each in _SHAFT), tuple(1.1 * each for each in _SHAFT)
    ),
    "robot-arm": Problem(robot_arm, (0.0, 0.0) * 4, (1.0, 2 * math.pi) * 4),
    "tensor-product": Problem(tensor_product, (-1.0,) * 2, (1.0,) * 2),
}

Fitted = tuple[Callable[[ndarray], ndarray], Callable[[ndarray], ndarray]]
"""What predicts values (N, K), and partials (N, K, D)."""


def _ours(
    problem: Problem, x: ndarray, y: ndarray, j: ndarray | None, seed: int, *, distill: bool = False, **settings: Any
) -> Fitted:
    model = JacobianRegressor(random_state=seed, **settings).fit(x, y, jacobian=j)
    model = model.distill() if distill else model
    return model.predict, model.predict_jacobian


def _smt(problem: Problem, x: ndarray, y: ndarray, j: ndarray, seed: int, *, partials: bool) -> Fitted:
    """A Gaussian process for each output: gradient-enhanced with partial least squares, or fitted to values alone."""
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


def _genn(problem: Problem, x: ndarray, y: ndarray, j: ndarray, seed: int) -> Fitted:
    """SMT's network of one output each, with its defaults but for the learning rate and 2,000 iterations."""
    models = optional_package("smt.surrogate_models", "`bench surrogates`", "pip install smt jenn")
    fitted = []
    for k in range(y.shape[1]):
        model = models.GENN(num_iterations=2000, alpha=RATE, seed=seed, print_global=False)
        model.load_data(x, y[:, k], j[:, k])
        model.train()
        fitted.append(model)

    def derivatives(points: ndarray) -> ndarray:
        each = range(x.shape[1])
        return np.stack([np.stack([m.predict_derivatives(points, i)[:, 0] for i in each], 1) for m in fitted], 1)

    return lambda points: np.concatenate([m.predict_values(points) for m in fitted], 1), derivatives


def _jenn(problem: Problem, x: ndarray, y: ndarray, j: ndarray, seed: int) -> Fitted:
    jenn = optional_package("jenn", "`bench surrogates`", "pip install jenn")
    network = jenn.NeuralNet([x.shape[1], 32, 32, y.shape[1]])
    network.fit(
        x.T, y.T, j.transpose(1, 2, 0), is_normalize=True, alpha=RATE, lambd=0.01, max_iter=2000, random_state=seed
    )
    return lambda points: network.predict(points.T).T, lambda points: network.predict_partials(points.T).transpose(
        2, 0, 1
    )


RATE = 3e-3
"""Learning rate of JENN and GENN, with which both are more accurate than with their default, 0.05."""
PEERS: dict[str, Callable[..., Fitted]] = {
    "jenn": _jenn,
    "genn": _genn,
    "gekpls": lambda *args: _smt(*args, partials=True),
    "kriging": lambda *args: _smt(*args, partials=False),
}
OURS: dict[str, Callable[..., Fitted]] = {
    "auto": _ours,
    "network": partial(_ours, model="network"),
    "gp": partial(_ours, model="gp"),
    "distilled": partial(_ours, model="gp", distill=True),
}
METHODS = PEERS | OURS


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` when this process has used this number of processor seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"over {seconds:g} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _timed(call: Callable[[ndarray], ndarray], points: ndarray) -> tuple[ndarray, float]:
    """Return predictions and the processor seconds of one point; calls are repeated until the clock resolves them."""
    start, calls = time.process_time(), 0
    while True:
        predictions, calls = np.asarray(call(points)), calls + 1
        seconds = time.process_time() - start
        if seconds > 0.1:
            return predictions, seconds / (calls * len(points))


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
    fit_seconds = time.process_time() - start
    predictions, values_seconds = _timed(predict, points)
    slow, partials_seconds = _timed(derivatives, points[: tests[1]])
    predictions, slow = predictions.reshape(values.shape), slow.reshape(partials[: tests[1]].shape)
    off = (slow - partials[: tests[1]]) * scale
    return {
        "values": 100 * float(np.sqrt(np.mean(((predictions - values) / values.std(0)) ** 2))),
        "partials": 100 * float(np.sqrt(np.mean(off**2) / np.mean((partials[: tests[1]] * scale) ** 2))),
        "fit_seconds": fit_seconds,
        "values_seconds": values_seconds,
        "partials_seconds": partials_seconds,
    }


def measure(
    path: Path, methods: tuple[str, ...] = tuple(METHODS), *, sizes: tuple[int, ...] = SIZES, seeds: int = SEEDS
) -> dict[str, Any]:
    """Measure the cells that are missing in the file, write it after each, and return all."""
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "scipy", "smt", "jenn")}
    about = {"seconds": "processor seconds, one thread", "platform": platform.platform(), "versions": versions}
    cells = {
        f"{name}/{size}/{seed}/{method}": partial(_tried, name, size, seed, method)
        for seed in range(seeds)
        for size in sizes
        for method in methods
        for name in PROBLEMS
    }
    with one_thread():
        return fill(path, about, cells)


def fill(path: Path, about: Mapping[str, Any], measurements: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Make the measurements whose cells the file lacks, write it after each, and return all cells."""
    cells: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else {}
    for key, measurement in measurements.items():
        if key not in cells:
            cells[key] = measurement()
            write_whole(path.parent, path.name, json.dumps({**about, "cells": cells}, indent=1).encode() + b"\n")
            print(key, cells[key], file=sys.stderr, flush=True)
    return cells


def _tried(name: str, size: int, seed: int, method: str) -> dict[str, Any]:
    """Measure a cell; a peer may fail on a problem, which is a result."""
    try:
        with _limited(LIMIT):
            return cell(name, size, seed, method)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:200]}


def _cells(conditions: Conditions) -> Mapping[str, Any]:
    """Return the cells in the folder of the results, after measuring those that are missing."""
    if conditions.quick:
        raise NotMeasured("takes hours: not in a quick run")
    for name in ("smt", "jenn"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise NotMeasured(f"{name} is not installed: pip install smt jenn") from None
    return _measured(conditions.folder / "surrogates-cells.json")


_measured = functools.cache(measure)


def ratio(conditions: Conditions, name: str, size: int, what: str, peers: tuple[str, ...] = tuple(PEERS)) -> Measured:
    """Return the error or time of the default of this library ÷ that of the best of the peers, over the seeds."""
    cells = _cells(conditions)
    ratios, numbers = [], {method: [] for method in METHODS}  # type: ignore[var-annotated]
    for seed in range(SEEDS):
        for method in METHODS:
            number = cells[f"{name}/{size}/{seed}/{method}"].get(what)
            numbers[method] += [] if number is None else [number]
        of = {method: cells[f"{name}/{size}/{seed}/{method}"].get(what) for method in METHODS}
        others = [of[method] for method in peers if of[method] is not None]
        if of["auto"] is not None and others:
            ratios.append(of["auto"] / min(others))
    if not ratios:
        raise NotMeasured(f"{name}, {size} points: no method of the peers within {LIMIT:g} s")
    means = {method: float(f"{statistics.mean(each):.4g}") for method, each in numbers.items() if each}
    return Measured(Spread.of(ratios), details=means)


_SECONDS = "seconds of a surrogate's partials ÷ those of"
CLAIMS = (
    ("values", tuple(PEERS), Claim("RMSE of a surrogate's values ÷ the lowest of SMT and JENN", must=1.0)),
    ("partials", tuple(PEERS), Claim("RMSE of a surrogate's partials ÷ the lowest of SMT and JENN", must=1.0)),
    ("fit_seconds", tuple(PEERS), Claim("seconds of a surrogate's fit ÷ the fewest of SMT and JENN")),
    ("partials_seconds", ("kriging",), Claim(f"{_SECONDS} Kriging of values", must=1e-3)),
    ("partials_seconds", ("gekpls",), Claim(f"{_SECONDS} gradient-enhanced Kriging", must=1e-3)),
)
SURROGATES = Benchmark(
    "surrogates beside those of SMT and JENN",
    tuple(
        Case(
            claim,
            f"{name}, {size} points",
            partial(ratio, name=name, size=size, what=what, peers=peers),
            devices=("cpu",),
        )
        for what, peers, claim in CLAIMS
        for name in PROBLEMS
        for size in SIZES
    ),
)

if __name__ == "__main__":
    measure(Path(sys.argv[1]), tuple(sys.argv[2:]) or tuple(METHODS))
