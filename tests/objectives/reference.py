"""The terms of distillation from their definitions, one sample after the other, with autograd on the plain networks."""

import torch
from torch import Tensor

from .cases import Reading


def jacobian(network, reading: Reading, x: Tensor, label, top: int) -> Tensor:
    """J (R, entry) of the readout at one sample."""
    j = torch.autograd.functional.jacobian(
        lambda z: reading.definition(network(z[None])[0], label, top), x, create_graph=False
    )
    return j.flatten(1)


def values(network, reading: Reading, x: Tensor, label, top: int) -> Tensor:
    with torch.no_grad():
        return reading.definition(network(x[None])[0], label, top)


def products(network, reading, x, label, top, v, side, step) -> Tensor:
    """Rows (P, …) of one sample: vᵀJ, Jv, or antithetic differences of values."""
    if step is not None:
        pairs = [[values(network, reading, x + s * step * one, label, top) for s in (1, -1)] for one in v]
        return torch.stack([(plus - minus) / (2 * step) for plus, minus in pairs])
    j = jacobian(network, reading, x, label, top)
    rows = []
    for one in v:
        row = torch.zeros(j.shape[1 if side == "output" else 0], dtype=torch.float64)
        for r in range(j.shape[0]):
            if side == "output":
                row = row + one[r] * j[r]
            else:
                row[r] = (j[r] * one.flatten()).sum()
        rows.append(row)
    return torch.stack(rows)


def squared(s: Tensor, t: Tensor) -> Tensor:
    return sum((a - b) ** 2 for a, b in zip(s.flatten(), t.flatten(), strict=True))


def normalized(s: Tensor, t: Tensor) -> Tensor:
    """2(1 − cos) of the rows lengthened by √eps, mean over rows."""
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(s.flatten(1), t.flatten(1), strict=True):
        dot, aa, bb = (sum(p * q for p, q in zip(u, w, strict=True)) + 1e-8 for u, w in ((a, b), (a, a), (b, b)))
        total = total + 2 * (1 - dot / (aa * bb).sqrt())
    return total / len(s)


def bounded(s: Tensor, t: Tensor) -> Tensor:
    return squared(s, t) / (squared(s, t) + squared(t, torch.zeros_like(t)) + 1e-6)


JACOBIAN_LOSSES = {"squared": squared, "bounded": bounded, "relative": squared, "normalized": normalized}


def cross_entropy(logits: Tensor, label) -> Tensor:
    logs = logits - logits.exp().sum().log()
    return -logs[int(label)]


def kl(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    p, q = (torch.exp(y / tau) / torch.exp(y / tau).sum() for y in (teacher, student))
    return tau**2 * sum(a * (a.log() - b.log()) for a, b in zip(p, q, strict=True))


def jacobian_terms(student, teacher, reading, loss, probe, x, labels, ids, draw, partners) -> Tensor:
    """The Jacobian term of each sample, before weighting; x are the points where it is taken.

    The relative one is divided by the mean squared norm of the teacher's products in the batch.
    """
    with torch.no_grad():
        tops = [int(teacher(one[None])[0].argmax()) for one in x]
    each = list(zip(x, [None] * len(x) if labels is None else labels, tops, strict=True))
    outputs = torch.stack([values(teacher, reading, *one) for one in each])
    v = probe.directions(x=x, outputs=outputs, labels=labels, ids=ids, seed=0, draw=draw, partners=partners)
    step = getattr(probe, "step", None)
    terms, norms = [], []
    for n, one in enumerate(each):
        s, t = (products(net, reading, *one, v[:, n], probe.side, step) for net in (student, teacher))
        terms.append(JACOBIAN_LOSSES[loss](s, t))
        norms.append(sum(float(entry) ** 2 for entry in t.flatten()))
    return torch.stack(terms) / (sum(norms) / len(norms) + 1e-6 if loss == "relative" else 1)
