"""What a teacher should answer, from the definitions: one sample, one class, one input element after the other."""

import math

import torch
from torch import Tensor


def logits(y, label):
    return list(y)


def log_probabilities(y, label):
    """log softmax(y / 2)."""
    total = sum(torch.exp(one / 2) for one in y)
    return [one / 2 - torch.log(total) for one in y]


def label_logit(y, label):
    if label.dim():
        return [sum(share * one for share, one in zip(label, y, strict=True))]
    return [y[int(label)]]


def top_logit(y, label):
    best = 0
    for k in range(len(y)):
        if float(y[k]) > float(y[best]):
            best = k
    return [y[best]]


def loss(y, label):
    """−log softmax(y) at the label; −Σ p log softmax(y) for a mixed label."""
    logs = [one - torch.log(sum(torch.exp(other) for other in y)) for one in y]
    if label.dim():
        return [-sum(share * one for share, one in zip(label, logs, strict=True))]
    return [-logs[int(label)]]


def values(function, readout, x: Tensor, labels: Tensor) -> Tensor:
    """r(f(x)) of each sample; f takes one sample and returns (K,)."""
    return torch.stack([torch.stack(readout(function(one), label)) for one, label in zip(x, labels, strict=True)])


def jacobians(function, readout, x: Tensor, labels: Tensor) -> Tensor:
    """J (B, R, entry) by four-point differences along one input element after the other, with an error of h⁴."""
    h = 1e-3
    samples = []
    for one, label in zip(x, labels, strict=True):
        columns = []
        for i in range(one.numel()):
            e = torch.zeros_like(one)
            e.view(-1)[i] = h
            f = {m: torch.stack(readout(function(one + m * e), label)) for m in (-2, -1, 1, 2)}
            columns.append((8 * (f[1] - f[-1]) - (f[2] - f[-2])) / (12 * h))
        samples.append(torch.stack(columns, dim=1))
    return torch.stack(samples)


def jvp(jacobian: Tensor, tangents: Tensor) -> Tensor:
    """Jv (P, B, R)."""
    products = torch.zeros(tangents.shape[0], *jacobian.shape[:2], dtype=torch.float64)
    for p in range(tangents.shape[0]):
        for n in range(jacobian.shape[0]):
            v = tangents[p, n].flatten()
            for r in range(jacobian.shape[1]):
                products[p, n, r] = math.fsum(float(jacobian[n, r, i] * v[i]) for i in range(len(v)))
    return products


def vjp(jacobian: Tensor, cotangents: Tensor, shape: tuple[int, ...]) -> Tensor:
    """vᵀJ (P, B, *input)."""
    products = torch.zeros(cotangents.shape[0], jacobian.shape[0], jacobian.shape[2], dtype=torch.float64)
    for p in range(cotangents.shape[0]):
        for n in range(jacobian.shape[0]):
            for i in range(jacobian.shape[2]):
                terms = (float(cotangents[p, n, r] * jacobian[n, r, i]) for r in range(jacobian.shape[1]))
                products[p, n, i] = math.fsum(terms)
    return products.view(*products.shape[:2], *shape)
