"""Which second-order solver fits a surrogate best in the same processor time: SciPy, PyTorch, Levenberg–Marquardt.

L-BFGS-B of SciPy, `torch.optim.LBFGS` (strong Wolfe) and Levenberg–Marquardt with the explicit Jacobian of all
residuals minimize the same loss from the same start, without selection. Each gets the processor seconds that SciPy
needs for 2,000 evaluations.

    python benchmarks/surrogate_solvers.py docs/results/surrogate-solvers.json
"""

import json
import math
import platform
import sys
import time
from pathlib import Path

import numpy as np
import scipy
import torch
from scipy import linalg
from scipy.stats import qmc

from jacmatch.surrogates.perceptron import Perceptron
from jacmatch.surrogates.samples import standardize
from jacmatch.surrogates.solver import minimize_loss

EVALUATIONS = 2000
DECAY = 1e-7
SEEDS = 3


def rosenbrock(x):
    a, b = x.T
    y = (1 - a) ** 2 + 100 * (b - a * a) ** 2
    return y[:, None], np.stack([-2 * (1 - a) - 400 * a * (b - a * a), 200 * (b - a * a)], 1)[:, None]


def ishigami(x):
    a, b, c = x.T
    y = np.sin(a) * (1 + 0.1 * c**4) + 7 * np.sin(b) ** 2
    j = np.stack([np.cos(a) * (1 + 0.1 * c**4), 14 * np.sin(b) * np.cos(b), 0.4 * c**3 * np.sin(a)], 1)
    return y[:, None], j[:, None]


def product(x):
    """The exponential of a weighted sum, eight inputs."""
    a = 1 / np.arange(1, 9)
    y = np.exp(x @ a)
    return y[:, None], (y[:, None] * a)[:, None]


PROBLEMS = {
    "rosenbrock": (rosenbrock, 2, 2.0, 50),
    "ishigami": (ishigami, 3, math.pi, 200),
    "exponential": (product, 8, 1.0, 64),
}


def residual_jacobian(net, theta, x):
    """The derivatives of all values (N·K, p) and partials (D·N·K, p) by the parameters."""
    y, _, steps = net.forward(theta, x, jacobian=True)
    n, d, k = len(x), x.shape[1], y.shape[1]
    of_values, of_partials = np.empty((n, k, net.count)), np.empty((d, n, k, net.count))
    layers, stop = net.layers(theta), net.count
    delta, extra = np.broadcast_to(np.eye(k), (n, k, k)), np.zeros((d, n, k, k))
    for number in reversed(range(len(layers))):
        weight = layers[number][0]
        h, f = weight.shape
        a, tangents = steps[number].values, steps[number].tangents
        bias, first = stop - h, stop - h - h * f
        of_values[:, :, bias:stop] = delta
        of_values[:, :, first:bias] = (delta[..., None] * a[:, None, None, :]).reshape(n, k, h * f)
        block = extra[..., None] * a[None, :, None, None, :]
        if tangents is None:
            for i in range(d):
                block[i, :, :, :, i] += delta
        else:
            block += delta[None, ..., None] * tangents[:, :, None, None, :]
        of_partials[..., first:bias] = block.reshape(d, n, k, h * f)
        of_partials[..., bias:stop] = extra
        stop = first
        if number:
            step = steps[number]
            back = delta @ weight
            curved = back[None] * (step.second * step.before)[:, :, None, :]
            extra = curved + (extra @ weight) * step.first[None, :, None, :]
            delta = back * step.first[:, None, :]
    return of_values.reshape(-1, net.count), of_partials.reshape(-1, net.count)


def levenberg_marquardt(data, net, theta, seconds):
    """Steps of the damped normal equations, in the smaller of both forms, until the time is spent."""
    start, damping = time.process_time(), 1e-2
    decays = DECAY * net.is_weight + 1e-14
    of_y, of_t = np.sqrt(data.y_weights).ravel(), np.sqrt(data.t_weights).ravel()

    def objective(parameters):
        return data.loss(net, parameters) + 0.5 * float(decays @ parameters**2)

    current = objective(theta)
    while time.process_time() - start < seconds:
        y, t, _ = net.forward(theta, data.x, jacobian=True)
        jacobians = residual_jacobian(net, theta, data.x)
        j = np.concatenate([of_y[:, None] * jacobians[0], of_t[:, None] * jacobians[1]])
        r = np.concatenate([of_y * (y - data.y).ravel(), of_t * (t - data.t).ravel()])
        gradient = j.T @ r + decays * theta
        for _ in range(12):
            scale = decays + damping
            try:
                if len(r) >= net.count:
                    step = -linalg.solve(j.T @ j + np.diag(scale), gradient, assume_a="pos", check_finite=False)
                else:
                    scaled, decay_step = j / scale, decays / scale * theta
                    inner = linalg.solve(
                        scaled @ j.T + np.eye(len(r)), r - j @ decay_step, assume_a="pos", check_finite=False
                    )
                    step = -(scaled.T @ inner) - decay_step
            except (linalg.LinAlgError, linalg.LinAlgWarning):
                damping *= 10
                continue
            new = objective(theta + step)
            if new < current:
                break
            damping *= 4
        else:
            break
        ratio = (current - new) / max(-0.5 * float(gradient @ step), 1e-300)
        theta, current = theta + step, new
        damping = max(damping * (0.2 if ratio > 0.75 else 1 if ratio > 0.25 else 2), 1e-14)
    return theta


def by_torch(data, net, theta, seconds):
    """`torch.optim.LBFGS` with the explicit gradient, in rounds of 20 iterations until the time is spent."""
    parameters = torch.from_numpy(theta.copy()).requires_grad_()
    optimizer = torch.optim.LBFGS([parameters], 1.0, 20, history_size=50, line_search_fn="strong_wolfe")
    decays = DECAY * net.is_weight
    start = time.process_time()

    def closure():
        now = parameters.detach().numpy()
        loss, gradient = data.loss_and_gradient(net, now)
        parameters.grad = torch.from_numpy(gradient + decays * now)
        return torch.tensor(loss + 0.5 * float(decays @ now**2))

    while time.process_time() - start < seconds:
        optimizer.step(closure)
    return parameters.detach().numpy()


def measured(name, width, seed):
    """Loss and held-out errors (% of the standard deviation) of each solver."""
    function, inputs, bound, count = PROBLEMS[name]
    x = bound * (2 * qmc.LatinHypercube(inputs, seed=seed).random(count) - 1)
    y, j = function(x)
    data, scaler = standardize(x, y, j)
    test = bound * (2 * np.random.default_rng(seed + 1000).random((1000, inputs)) - 1)
    true, partials = function(test)
    net = Perceptron((inputs, width, width, 1), "silu")
    theta = net.initial(seed)
    start = time.process_time()
    results = {"scipy": minimize_loss(data, net, theta, DECAY, EVALUATIONS)[0]}
    seconds = time.process_time() - start
    results["torch"] = by_torch(data, net, theta, seconds)
    results["levenberg-marquardt"] = levenberg_marquardt(data, net, theta, seconds)
    rows = {}
    for solver, parameters in results.items():
        value, jacobian = net(parameters, scaler.inputs(test))
        off = scaler.outputs(value) - true
        off_partials = (scaler.jacobian(jacobian) - partials) * scaler.x_scale
        rows[solver] = {
            "loss": data.loss(net, parameters),
            "values": 100 * float(np.sqrt(np.mean(off**2)) / true.std()),
            "partials": 100 * float(np.sqrt(np.mean(off_partials**2) / np.mean((partials * scaler.x_scale) ** 2))),
        }
    return {"problem": name, "width": width, "seed": seed, "seconds": seconds, "solvers": rows}


def main(path):
    """Measures all and writes the document after each cell."""
    cells = []
    for name in PROBLEMS:
        for width in (32, 64):
            for seed in range(SEEDS):
                cells.append(measured(name, width, seed))
                versions = {"scipy": scipy.__version__, "torch": torch.__version__, "numpy": np.__version__}
                document = {"machine": platform.machine(), "versions": versions, "threads": 1, "cells": cells}
                Path(path).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
                print(name, width, seed, cells[-1]["solvers"], flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
