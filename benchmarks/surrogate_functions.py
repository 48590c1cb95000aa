"""The default surrogate on 33 smooth functions of two to ten inputs, 200 points, with and without partials.

`estimator` is `JacobianRegressor()`, `job` what `jacmatch surrogate` saves. Each seed draws a Latin
hypercube of training points and 1,000 test points. No default was chosen with these points.

    python benchmarks/surrogate_functions.py docs/results/surrogate-functions.json [SEEDS]
"""

import math
import platform
import sys
import time
import warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from scipy.stats import qmc

from jacmatch.jacobian.products import jacobian
from jacmatch.jobs import Surrogate
from jacmatch.jobs.surrogate.points import Samples, predictions
from jacmatch.jobs.surrogate.source import Source
from jacmatch.surrogates import JacobianRegressor
from jacmatch_research.bench.surrogates import fill

POINTS, TEST, SEEDS = 200, 1000, 5


def scaled(x, *bounds):
    """Inputs in their ranges."""
    return [low + (high - low) * x[:, i] for i, (low, high) in enumerate(bounds)]


def wing_weight(x):
    """The weight of the wing of a light aircraft (Forrester, Sobester & Keane 2008)."""
    ranges = [(150, 200), (220, 300), (6, 10), (-10, 10), (16, 45), (0.5, 1), (0.08, 0.18), (2.5, 6), (1700, 2500)]
    s, wf, a, sweep, q, taper, t, n, w, wp = scaled(x, *ranges, (0.025, 0.08))
    c = torch.cos(sweep * math.pi / 180)
    first = 0.036 * s**0.758 * wf**0.0035 * (a / c**2) ** 0.6 * q**0.006 * taper**0.04
    return first * (100 * t / c) ** -0.3 * (n * w) ** 0.49 + s * wp


def circuit(x):
    """The midpoint voltage of an output transformerless push-pull circuit (Ben-Ari & Steinberg 2007)."""
    b1, b2, f, c1, c2, beta = scaled(x, (50, 150), (25, 70), (0.5, 3), (1.2, 2.5), (0.25, 1.2), (50, 300))
    base, gain = 12 * b2 / (b1 + b2), beta * (c2 + 9)
    return (base + 0.74) * gain / (gain + f) + 11.35 * f / (gain + f) + 0.74 * f * gain / ((gain + f) * c1)


def piston(x):
    """The cycle time of a piston in seconds (Kenett & Zacks 1998)."""
    ranges = [(30, 60), (0.005, 0.02), (0.002, 0.01), (1000, 5000), (90_000, 110_000), (290, 296), (340, 360)]
    m, s, v0, k, p0, ta, t0 = scaled(x, *ranges)
    a = p0 * s + 19.62 * m - k * v0 / s
    v = s / (2 * k) * ((a**2 + 4 * k * p0 * v0 / t0 * ta).sqrt() - a)
    return 2 * math.pi * (m / (k + s**2 * p0 * v0 / t0 * ta / v**2)).sqrt()


def franke(x):
    """Franke 1979."""
    a, b = 9 * x[:, 0], 9 * x[:, 1]
    first = 0.75 * torch.exp(-((a - 2) ** 2 + (b - 2) ** 2) / 4) + 0.75 * torch.exp(-((a + 1) ** 2) / 49 - (b + 1) / 10)
    return first + 0.5 * torch.exp(-((a - 7) ** 2 + (b - 3) ** 2) / 4) - 0.2 * torch.exp(-((a - 4) ** 2) - (b - 7) ** 2)


def friedman(x):
    """Friedman 1991, without noise."""
    a, b, c, d, e = x.unbind(1)
    return 10 * torch.sin(math.pi * a * b) + 20 * (c - 0.5) ** 2 + 10 * d + 5 * e


def branin(x):
    """Branin 1972."""
    a, b = scaled(x, (-5, 10), (0, 15))
    return (b - 5.1 / (4 * math.pi**2) * a**2 + 5 / math.pi * a - 6) ** 2 + 10 * (1 - 1 / (8 * math.pi)) * a.cos() + 10


def hartmann(x, a, p):
    """Minus the sum of four Gaussians (Hartmann 1973)."""
    a, p, alpha = (torch.tensor(each, dtype=x.dtype) for each in (a, p, [1.0, 1.2, 3.0, 3.2]))
    return -torch.exp(-(a * (x[:, None] - 1e-4 * p) ** 2).sum(2)) @ alpha


def hartmann_3(x):
    a = [[3, 10, 30], [0.1, 10, 35], [3, 10, 30], [0.1, 10, 35]]
    return hartmann(x, a, [[3689, 1170, 2673], [4699, 4387, 7470], [1091, 8732, 5547], [381, 5743, 8828]])


def hartmann_6(x):
    a = [[10, 3, 17, 3.5, 1.7, 8], [0.05, 10, 17, 0.1, 8, 14], [3, 3.5, 1.7, 10, 17, 8], [17, 8, 0.05, 10, 0.1, 14]]
    p = [[1312, 1696, 5569, 124, 8283, 5886], [2329, 4135, 8307, 3736, 1004, 9991]]
    return hartmann(x, a, [*p, [2348, 1451, 3522, 2883, 3047, 6650], [4047, 8828, 8732, 5743, 1091, 381]])


def curved(x):
    """The highly curved function of three inputs of Dette & Pepelyshev 2010."""
    a, b, c = x.unbind(1)
    return 4 * (a - 2 + 8 * b - 8 * b**2) ** 2 + (3 - 4 * b) ** 2 + 16 * (c + 1).sqrt() * (2 * c - 1) ** 2


def curved_8(x):
    """The function of eight inputs of Dette & Pepelyshev 2010."""
    a, b, c = x[:, 0], x[:, 1], x[:, 2]
    first = 4 * (a - 2 + 8 * b - 8 * b**2) ** 2 + (3 - 4 * b) ** 2 + 16 * (c + 1).sqrt() * (2 * c - 1) ** 2
    return first + sum(k * torch.log(1 + x[:, 2:k].sum(1)) for k in range(4, 9))


def sines(x):
    """A sum of sines of four inputs, each with another frequency."""
    return sum(torch.sin((2 + 2 * i) * x[:, i] + i) for i in range(4)) + 0.5 * x[:, 0] * x[:, 3]


def cosines(x):
    """A product of four cosines."""
    return torch.cos(torch.tensor([2.0, 1.5, 3.0, 1.0], dtype=x.dtype) * x).prod(1)


def corner_peak(x):
    """The corner peak of Genz 1984 in six inputs."""
    return (1 + x @ torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0, 1.2], dtype=x.dtype)) ** -7


def camel(x):
    """The six-hump camel function (Dixon & Szegő 1978)."""
    a, b = scaled(x, (-2, 2), (-1, 1))
    return (4 - 2.1 * a**2 + a**4 / 3) * a**2 + a * b + (4 * b**2 - 4) * b**2


def robot_arm(x):
    """The distance of the end of a planar arm with four segments from its base (An & Owen 2001)."""
    lengths, angles = x[:, 0::2], 2 * math.pi * x[:, 1::2].cumsum(1)
    return ((lengths * angles.cos()).sum(1) ** 2 + (lengths * angles.sin()).sum(1) ** 2).sqrt()


def currin(x):
    """The exponential function of Currin, Mitchell, Morris & Ylvisaker 1991."""
    a, b = x.unbind(1)
    ratio = (2300 * a**3 + 1900 * a**2 + 2092 * a + 60) / (100 * a**3 + 500 * a**2 + 4 * a + 20)
    return (1 - torch.exp(-0.5 / b)) * ratio


def lim(x):
    """The polynomial of Lim, Sacks, Studden & Welch 2002."""
    a, b = x.unbind(1)
    first = 9 + 2.5 * a - 17.5 * b + 2.5 * a * b + 19 * b**2 - 7.5 * a**3
    return first - 2.5 * a * b**2 - 5.5 * b**4 + a**3 * b**2


def park(x):
    """The first function of Park 1991."""
    a, b, c, d = x.unbind(1)
    return a / 2 * ((1 + (b + c**2) * d / a**2).sqrt() - 1) + (a + 3 * d) * torch.exp(1 + c.sin())


def griewank(x):
    """Griewank 1981 in four inputs, within five of 0."""
    z = 10 * x - 5
    return 1 + (z**2).sum(1) / 4000 - torch.cos(z / torch.arange(1, 5, dtype=x.dtype).sqrt()).prod(1)


def ackley(x):
    """Ackley 1987 in four inputs between 0.5 and 1.5, where it is smooth."""
    z = x + 0.5
    return -20 * torch.exp(-0.2 * (z**2).mean(1).sqrt()) - torch.exp(torch.cos(2 * math.pi * z).mean(1))


def michalewicz(x):
    """Michalewicz 1992 in two inputs."""
    z = math.pi * x
    return -(z.sin() * torch.sin(torch.arange(1, 3, dtype=x.dtype) * z**2 / math.pi) ** 20).sum(1)


def zakharov(x):
    """Zakharov's function in six inputs."""
    z = 15 * x - 5
    linear = 0.5 * z @ torch.arange(1, 7, dtype=x.dtype)
    return (z**2).sum(1) + linear**2 + linear**4


def dixon_price(x):
    """Dixon & Price 1989 in five inputs."""
    z = 20 * x - 10
    return (z[:, 0] - 1) ** 2 + (2 * z[:, 1:] ** 2 - z[:, :-1]) ** 2 @ torch.arange(2, 6, dtype=x.dtype)


def styblinski_tang(x):
    """Styblinski & Tang 1990 in six inputs."""
    z = 10 * x - 5
    return 0.5 * (z**4 - 16 * z**2 + 5 * z).sum(1)


def g_function(x):
    """The g-function of Sobol in six inputs above 1/2, where it is smooth."""
    a = torch.arange(6, dtype=x.dtype)
    return ((2 * x + a) / (1 + a)).prod(1)


def gramacy_lee(x):
    """Gramacy & Lee 2008."""
    a, b = scaled(x, (-2, 6), (-2, 6))
    return a * torch.exp(-(a**2) - b**2)


def cantilever(x):
    """The displacement of a cantilever beam (Wu, Shin, Sues & Cesare 2001)."""
    e, lateral, vertical = scaled(x, (2.4e7, 3.4e7), (200, 800), (600, 1400))
    w, t = 2 + 2 * x[:, 3], 2 + 2 * x[:, 4]
    return 4e6 / (e * w * t) * ((vertical / t**2) ** 2 + (lateral / w**2) ** 2).sqrt()


def flood(x):
    """The overflow of a river over its dyke in metres (Iooss & Lemaitre 2015)."""
    ranges = [(500, 3000), (15, 60), (49, 51), (54, 56), (7, 9), (55, 55.9), (4990, 5010), (295, 305)]
    q, ks, zv, zm, hd, cb, length, b = scaled(x, *ranges)
    return zv + (q / (b * ks * ((zm - zv) / length).sqrt())) ** 0.6 - hd - cb


def steel_column(x):
    """The limit state of a steel column (Kuschel & Rackwitz 1997)."""
    ranges = [(330, 470), (4e5, 6e5), (5e5, 7e5), (5e5, 7e5), (290, 310), (18, 22), (280, 320), (10, 50)]
    fs, p1, p2, p3, b, d, h, f0 = scaled(x, *ranges)
    e, p = 1.9e5 + 4e4 * x[:, 8], p1 + p2 + p3
    euler = math.pi**2 * e * b * d * h**2 / (2 * 7500**2)
    return fs - p * (1 / (2 * b * d) + f0 / (b * d * h) * euler / (euler - p))


def loeppky(x):
    """Loeppky, Williams & Moore 2013, seven inputs."""
    linear = x @ torch.tensor([6, 4, 5.5, 1, 0.5, 0.2, 0.1], dtype=x.dtype)
    return linear + 3 * x[:, 0] * x[:, 1] + 2.2 * x[:, 0] * x[:, 2] + 1.4 * x[:, 1] * x[:, 2]


def linkletter(x):
    """The sinusoidal function of Linkletter, Bingham, Hengartner, Higdon & Ye 2006, ten inputs of which two matter."""
    return torch.sin(x[:, 0]) + torch.sin(5 * x[:, 1]) + 0 * x.sum(1)


def goldstein_price(x):
    """Goldstein & Price 1971."""
    a, b = scaled(x, (-2, 2), (-2, 2))
    first = 1 + (a + b + 1) ** 2 * (19 - 14 * a + 3 * a**2 - 14 * b + 6 * a * b + 3 * b**2)
    return first * (30 + (2 * a - 3 * b) ** 2 * (18 - 32 * a + 12 * a**2 + 48 * b - 36 * a * b + 27 * b**2))


def rastrigin(x):
    """Rastrigin 1974 in three inputs within one of 0."""
    z = 2 * x - 1
    return (z**2 - 10 * torch.cos(2 * math.pi * z)).sum(1)


FUNCTIONS = {
    "wing weight": (wing_weight, 10),
    "circuit": (circuit, 6),
    "piston": (piston, 7),
    "Franke": (franke, 2),
    "Friedman": (friedman, 5),
    "Branin": (branin, 2),
    "Hartmann-3": (hartmann_3, 3),
    "Hartmann-6": (hartmann_6, 6),
    "curved, 3 inputs": (curved, 3),
    "curved, 8 inputs": (curved_8, 8),
    "sum of sines": (sines, 4),
    "product of cosines": (cosines, 4),
    "corner peak": (corner_peak, 6),
    "camel": (camel, 2),
    "robot arm": (robot_arm, 8),
    "Currin": (currin, 2),
    "Lim": (lim, 2),
    "Gramacy-Lee": (gramacy_lee, 2),
    "Michalewicz": (michalewicz, 2),
    "Goldstein-Price": (goldstein_price, 2),
    "Rastrigin": (rastrigin, 3),
    "Park": (park, 4),
    "Griewank": (griewank, 4),
    "Ackley": (ackley, 4),
    "Dixon-Price": (dixon_price, 5),
    "cantilever": (cantilever, 5),
    "Zakharov": (zakharov, 6),
    "Styblinski-Tang": (styblinski_tang, 6),
    "g-function": (g_function, 6),
    "Loeppky": (loeppky, 7),
    "flood": (flood, 8),
    "steel column": (steel_column, 9),
    "Linkletter": (linkletter, 10),
}


def samples(name, x):
    """Values (N, 1) and partials (N, 1, D)."""
    y, j = jacobian(lambda x: FUNCTIONS[name][0](x)[:, None], torch.from_numpy(x))
    return y.detach().numpy(), j.detach().numpy()


def by_estimator(x, y, j, seed, **settings):
    """`JacobianRegressor()`; its choice."""
    model = JacobianRegressor(random_state=seed, **settings).fit(x, y, jacobian=j)
    chosen = model.model_ if model.model_ == "gp" else model.fits_[0].net.activation
    return lambda points: (model.predict(points).reshape(-1, 1), model.predict_jacobian(points)), chosen


def by_job(x, y, j, seed):
    """What `jacmatch surrogate` saves; its choice."""
    job = Surrogate(teacher="npz:none")
    x, y, j = (None if each is None else torch.from_numpy(each) for each in (x, y, j))
    source = Source(job, None, None, None, x, x.std(0, unbiased=False))
    module, fit, free = job.network_of(source, Samples(x, y, j), job.methods[j is not None], seed)

    def predict(points):
        return [each.numpy() for each in predictions(module, torch.from_numpy(points), jacobians=True)]

    return predict, free["model"] if free["model"] == "gp" else f"{free['model']}, {fit.net.activation}"


METHODS = {"estimator": by_estimator, "job": by_job}


def measure(name, seed, method, partials, **settings):
    """Errors in % of the standard deviation (partials: of their root mean square), and processor seconds."""
    d = FUNCTIONS[name][1]
    x = qmc.LatinHypercube(d, seed=seed).random(POINTS)
    y, j = samples(name, x)
    points = np.random.default_rng(500 + seed).random((TEST, d))
    true, true_j = samples(name, points)
    start = time.process_time()
    predict, chosen = METHODS[method](x, y, j if partials else None, seed, **settings)
    seconds = time.process_time() - start
    mean, mean_j = predict(points)
    return {
        "values": 100 * float(np.sqrt(np.mean((mean - true) ** 2)) / true.std()),
        "partials": 100 * float(np.sqrt(np.mean((mean_j.reshape(true_j.shape) - true_j) ** 2) / np.mean(true_j**2))),
        "seconds": round(seconds, 2),
        "chosen": chosen,
    }


def main(path, seeds):
    """Measure the cells that are missing."""
    about = {"platform": platform.platform(), "versions": {n: version(n) for n in ("jacmatch", "numpy", "scipy")}}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    given = {True: "values + partials", False: "values"}
    cells = {
        f"{name}/{seed}/{method}/{label}": partial(measure, name, seed, method, partials)
        for seed in range(seeds)
        for name in FUNCTIONS
        for method in METHODS
        for partials, label in given.items()
    }
    fill(path, about, cells)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else SEEDS)
