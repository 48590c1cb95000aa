"""The Gaussian process of `jacmatch.surrogates` beside GPyTorch's kernel with gradients: error, seconds.

Both get 50 points with partials (Latin hypercube), and predict 500 new points with partials. GPyTorch: RBFKernelGrad
with a length scale for each input, float64, 100 steps of Adam with rate 0.1. pip install gpytorch

    python benchmarks/surrogate_gpytorch.py docs/results/surrogate-gpytorch.json
"""

import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import gpytorch
import numpy as np
import torch
from scipy.stats import qmc

from jacmatch.jacobian.products import jacobian
from jacmatch.surrogates import JacobianRegressor
from surrogate_coverage import FUNCTIONS

POINTS, TEST, SEEDS = 50, 500, 3


class Process(gpytorch.models.ExactGP):
    """A constant plus a process with the squared exponential kernel and its derivatives."""

    def __init__(self, x, y, likelihood):
        super().__init__(x, y, likelihood)
        self.mean_module = gpytorch.means.ConstantMeanGrad()
        self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernelGrad(ard_num_dims=x.shape[1]))

    def forward(self, x):
        """Return the prior at x."""
        return gpytorch.distributions.MultitaskMultivariateNormal(self.mean_module(x), self.covar_module(x))


def by_gpytorch(x, y, j):
    """Return what predicts values (N, 1) and partials (N, 1, D)."""
    mean, std, centre, scale = x.mean(0), x.std(0), y.mean(0), y.std(0)
    given = torch.from_numpy((x - mean) / std)
    known = torch.from_numpy(np.concatenate([(y - centre) / scale, j[:, 0] * std / scale], 1))
    constraint = gpytorch.constraints.GreaterThan(1e-8)
    likelihood = gpytorch.likelihoods.MultitaskGaussianLikelihood(known.shape[1], noise_constraint=constraint)
    likelihood.noise = 1e-5
    process = Process(given, known, likelihood)
    objective = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, process)
    optimizer = torch.optim.Adam(process.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        (-objective(process(given), known)).backward()
        optimizer.step()
    process.eval()

    def predict(points):
        with torch.no_grad():
            both = process(torch.from_numpy((points - mean) / std)).mean.numpy()
        return centre + scale * both[:, :1], (both[:, 1:] * scale / std)[:, None]

    return predict


def by_us(x, y, j):
    """Return what predicts values (N, 1) and partials (N, 1, D)."""
    model = JacobianRegressor(model="gp").fit(x, y, jacobian=j)
    return lambda points: (model.predict(points), model.predict_jacobian(points))


def measure(name, seed, method):
    """Return errors in %, of the standard deviation and of the partials' root mean square, and processor seconds."""
    function, d = FUNCTIONS[name]
    x = qmc.LatinHypercube(d, seed=seed).random(POINTS)
    points = np.random.default_rng(500 + seed).random((TEST, d))
    (y, j), (true, expected) = (
        [each.detach().numpy() for each in jacobian(function, torch.from_numpy(some))] for some in (x, points)
    )
    start = time.process_time()
    predict = method(x, y, j)
    fit, start = time.process_time() - start, time.process_time()
    values, partials = predict(points)
    return {
        "values": 100 * float(np.sqrt(np.mean((values - true) ** 2)) / true.std()),
        "partials": 100 * float(np.sqrt(np.mean((partials - expected) ** 2) / np.mean(expected**2))),
        "fit_seconds": fit,
        "point_seconds": (time.process_time() - start) / TEST,
    }


def main(path):
    """Measure and write all cells."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    packages = ("gpytorch", "torch", "numpy")
    about = {"platform": platform.platform(), "versions": {each: version(each) for each in packages}}
    cells = {
        f"{name}/{POINTS}/{seed}/{method.__name__}": measure(name, seed, method)
        for name in ("friedman", "circuit", "franke")
        for seed in range(SEEDS)
        for method in (by_us, by_gpytorch)
    }
    path.write_text(json.dumps({**about, "cells": cells}, indent=1) + "\n")
    for key, cell in cells.items():
        print(key, {what: float(f"{number:.3g}") for what, number in cell.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
