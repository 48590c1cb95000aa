"""Slow definitions of the random numbers and of the estimators' moments, in Python integers and float64 loops.

Statistical tests compare with `LIMIT` standard errors. A normal statistic exceeds 6.5 by chance with probability 8e-11;
the two files that use it make fewer than 5000 comparisons, so a false alarm has probability below 1e-6.
"""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

LIMIT = 6.5
MASK = 2**64 - 1
STREAMS = {"bits": 0, "uniform": 1, "gaussian": 2, "directions": 3, "permutation": 4, "partners": 5}


def splitmix64(state: int) -> Iterator[int]:
    """The generator as published: a state that is advanced, and a mixing of it."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        yield z ^ (z >> 31)


def output(state: int, number: int) -> int:
    """Output `number` of the generator: the state before it is known without the outputs before it."""
    return next(splitmix64((state + number * 0x9E3779B97F4A7C15) & MASK))


def words(stream: str, seed: int, sample: int, draw: int, count: int) -> list[int]:
    key = output(output(output(seed & MASK, STREAMS[stream]), draw & MASK), sample & MASK)
    return list(itertools.islice(splitmix64(key), count))


def signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def normal_pair(word: int) -> tuple[float, float]:
    u = (2 * (word >> 41) + 1) / 2**24
    w = (2 * (word & (2**23 - 1)) + 1) / 2**24
    radius = math.sqrt(-2 * math.log(u))
    return radius * math.cos(2 * math.pi * w), radius * math.sin(2 * math.pi * w)


def estimate(directions: Tensor, matrix: Tensor, side: str) -> float:
    """Σₚ ‖vₚᵀM‖² or Σₚ ‖Mvₚ‖² for the (P, ·) directions of one sample."""
    m = matrix.tolist() if side == "output" else matrix.T.tolist()
    total = 0.0
    for v in directions.flatten(1).tolist():
        for column in range(len(m[0])):
            total += sum(v[row] * m[row][column] for row in range(len(m))) ** 2
    return total


def mean_and_variance(values: list[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    return mean, math.fsum((value - mean) ** 2 for value in values) / len(values)


def moment(law: str, n: int, i: int, j: int, k: int, m: int) -> float:
    """E[vᵢvⱼvₖvₘ] of one direction."""
    pairings = (i == j) * (k == m) + (i == k) * (j == m) + (i == m) * (j == k)
    if law == "gaussian":
        return float(pairings)
    if law in ("sphere", "orthogonal"):
        return pairings * n / (n + 2)
    if law == "rademacher":
        signs = list(itertools.product((-1, 1), repeat=n))
        return sum(s[i] * s[j] * s[k] * s[m] for s in signs) / len(signs)
    return float(n) if i == j == k == m else 0.0


def cross_moment(n: int, i: int, j: int, k: int, m: int) -> float:
    """E[vᵢvⱼwₖwₘ] of two columns v, w of √n times a Haar orthogonal matrix (the formula of Weingarten)."""
    crossed = (i == k) * (j == m) + (i == m) * (j == k)
    return n**2 * ((n + 1) * (i == j) * (k == m) - crossed) / (n * (n - 1) * (n + 2))


def law_variance(law: str, count: int, matrix: Tensor) -> float:
    """Variance of (1/P) Σₚ ‖vₚᵀM‖², from the moments of the law: Σₚᵩ E[(vₚᵀAvₚ)(vᵩᵀAvᵩ)]/P² − (tr A)²."""
    a = (matrix @ matrix.T).tolist()
    n = len(a)
    trace = sum(a[i][i] for i in range(n))
    product = 0.0
    for p, q in itertools.product(range(count), repeat=2):
        together = law == "orthogonal" and p // n == q // n
        if p != q and not together:
            product += trace**2
            continue
        for i, j, k, m in itertools.product(range(n), repeat=4):
            expectation = moment(law, n, i, j, k, m) if p == q else cross_moment(n, i, j, k, m)
            product += a[i][j] * a[k][m] * expectation
    return product / count**2 - trace**2


def z_scores(samples: Tensor, expected: Tensor | float) -> Tensor:
    """How many standard errors the mean over the first axis lies from `expected`; 0 where all agree exactly."""
    samples = samples.double()
    error = samples.mean(0) - expected
    spread = samples.std(0) / math.sqrt(samples.shape[0])
    return torch.where(error.abs() < 1e-6, 0.0, error / spread)
