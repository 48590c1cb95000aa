"""How often the 90 % interval of a surrogate holds the true value, on functions that were not used for its calibration.

Each seed draws a Latin hypercube of training points, with partials, and 1,000 test points uniformly.

    python benchmarks/surrogate_coverage.py docs/results/surrogate-coverage.json
"""

import math
import platform
import sys
import warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from scipy.stats import qmc

from jacmatch.jacobian.products import jacobian
from jacmatch.surrogates import JacobianRegressor
from jacmatch_research.bench.surrogates import fill

SIZES, SEEDS = (50, 200), 5


def friedman(x):
    """Friedman 1991, without noise."""
    return 10 * torch.sin(math.pi * x[:, :1] * x[:, 1:2]) + 20 * (x[:, 2:3] - 0.5) ** 2 + 10 * x[:, 3:4] + 5 * x[:, 4:]


def circuit(x):
    """The midpoint voltage of an output transformerless push-pull circuit (Ben-Ari & Steinberg 2007)."""
    low = torch.tensor([50, 25, 0.5, 1.2, 0.25, 50], dtype=x.dtype)
    high = torch.tensor([150, 70, 3, 2.5, 1.2, 300], dtype=x.dtype)
    b1, b2, f, c1, c2, beta = (low + (high - low) * x).unbind(1)
    base, gain = 12 * b2 / (b1 + b2), beta * (c2 + 9)
    return ((base + 0.74) * gain / (gain + f) + 11.35 * f / (gain + f) + 0.74 * f * gain / ((gain + f) * c1))[:, None]


def franke(x):
    """Franke 1979."""
    a, b = 9 * x[:, :1], 9 * x[:, 1:]
    first = 0.75 * torch.exp(-((a - 2) ** 2 + (b - 2) ** 2) / 4) + 0.75 * torch.exp(-((a + 1) ** 2) / 49 - (b + 1) / 10)
    return first + 0.5 * torch.exp(-((a - 7) ** 2 + (b - 3) ** 2) / 4) - 0.2 * torch.exp(-((a - 4) ** 2) - (b - 7) ** 2)


def three(x):
    """Three outputs of six inputs."""
    first = torch.sin(3 * x[:, 0] + 2 * x[:, 1]) * x[:, 2]
    return torch.stack([first, torch.exp(-3 * ((x[:, :4] - 0.4) ** 2).sum(1)), x[:, 3] * x[:, 4] - x[:, 5] ** 2], 1)


FUNCTIONS = {"friedman": (friedman, 5), "circuit": (circuit, 6), "franke": (franke, 2), "three outputs": (three, 6)}
METHODS = {"gp": {"model": "gp"}, "ensemble of 4": {"model": "network", "ensemble": 4, "max_evaluations": 400}}


def measure(name, size, seed, method):
    """Return the error in % of the standard deviation, and the coverage where there is a standard deviation."""
    function, d = FUNCTIONS[name]
    x = qmc.LatinHypercube(d, seed=seed).random(size)
    y, j = (each.detach().numpy() for each in jacobian(function, torch.from_numpy(x)))
    points = np.random.default_rng(500 + seed).random((1000, d))
    true = function(torch.from_numpy(points)).numpy()
    model = JacobianRegressor(random_state=seed, **METHODS[method])
    model.fit(x, y, jacobian=j)
    mean, std = model.predict(points, return_std=True)
    row = {"error": 100 * float(np.sqrt(np.mean(((model.predict(points) - true) / true.std(0)) ** 2)))}
    return row | {"coverage": float((np.abs(mean - true) <= 1.6449 * std).mean())}


def main(path):
    """Measure the cells that are missing."""
    about = {"platform": platform.platform(), "versions": {n: version(n) for n in ("jacmatch", "numpy", "scipy")}}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cells = {
        f"{name}/{size}/{seed}/{method}": partial(measure, name, size, seed, method)
        for size in SIZES
        for method in METHODS
        for seed in range(SEEDS)
        for name in FUNCTIONS
    }
    fill(path, about, cells)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
