"""How long all partials of a point take: Kriging of SMT, and the models of `jacmatch.surrogates`, with their errors.

Each model is fitted to 64 points, all but Kriging with partials. Ours predict 1,000 points in one call, Kriging 100.

    python benchmarks/surrogate_speed.py docs/results/surrogate-speed.json
"""

import json
import math
import platform
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from scipy.stats import qmc

from jacmatch.jacobian.products import jacobian
from jacmatch.jobs.surrogate.functions import HIGH, LOW, flow, ishigami
from jacmatch.surrogates import JacobianRegressor

POINTS = 64


def rosenbrock(x):
    """Rosenbrock 1960."""
    a, b = x.unbind(1)
    return ((1 - a) ** 2 + 100 * (b - a * a) ** 2)[:, None]


PROBLEMS = {
    "rosenbrock": (rosenbrock, (-2.0,) * 2, (2.0,) * 2),
    "ishigami": (ishigami, (-math.pi,) * 3, (math.pi,) * 3),
    "borehole": (flow, LOW, HIGH),
}


def microseconds(predict, points):
    """The least processor time of a point in seven rounds of at least 0.05 s."""
    best = math.inf
    for _ in range(7):
        start, calls = time.process_time(), 0
        while (seconds := time.process_time() - start) < 0.05:
            predict(points)
            calls += 1
        best = min(best, seconds / calls / len(points))
    return 1e6 * best


def kriging(x, y):
    """Kriging of the values, which predicts partials one input at a time."""
    from smt.surrogate_models import KRG

    model = KRG(theta0=[1e-2] * x.shape[1], print_global=False)
    model.set_training_values(x, y)
    model.train()
    return lambda z: np.stack([model.predict_derivatives(z, i)[:, 0] for i in range(x.shape[1])], 1)


def measure(name):
    """Microseconds, and errors in % of the root mean square of the partials, of each model."""
    function, low, high = PROBLEMS[name]
    low, high, d = np.array(low), np.array(high), len(low)

    def samples(unit):
        x = low + (high - low) * unit
        y, j = jacobian(function, torch.from_numpy(x))
        return x, y.detach().numpy(), j.detach().numpy()[:, 0]

    x, y, j = samples(qmc.LatinHypercube(d, seed=0).random(POINTS))
    points, _, true = samples(np.random.default_rng(1).random((1000, d)))
    unit = (high - low) / np.sqrt(12)
    process = JacobianRegressor(model="gp").fit(x, y[:, 0], jacobian=j)
    models = {"kriging": kriging(x, y), "process": process.predict_jacobian}
    for hidden in ((64, 64), (32, 32), (16, 16)):
        student = process.set_params(hidden=hidden, activation="silu").distill().predict_jacobian
        name = f"distilled, {hidden[0]}-{hidden[1]}"
        models[name] = student
        models[f"{name}, float32"] = lambda z, student=student: student(z.astype(np.float32))
    rows = {}
    for name, predict in models.items():
        some = slice(100 if name == "kriging" else 1000)
        off = (predict(points[some]) - true[some]) * unit
        error = 100 * float(np.sqrt(np.mean(off**2) / np.mean((true[some] * unit) ** 2)))
        rows[name] = {"microseconds": microseconds(predict, points[some]), "partials": error}
        print(name, rows[name], flush=True)
    return rows


def main(path):
    """Measure all."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    versions = {name: version(name) for name in ("jacmatch", "numpy", "scipy", "smt")}
    cells = {name: measure(name) for name in PROBLEMS}
    about = {"platform": platform.platform(), "threads": 1, "versions": versions}
    path.write_text(json.dumps({**about, "cells": cells}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
