"""A few steps of a compiled objective and of its eager twin, in a process without type checks: they cannot be traced.

Called as `compiled_steps.py KIND POLICY BACKEND`; prints what a test asks about, as JSON.
"""

import json
import sys
import warnings

import torch
from torch import nn

from jacmatch.objectives import CompiledSteps, Distillation


class Own(torch.autograd.Function):
    """A rule of one's own, right to any order when it is not compiled."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


class Applied(nn.Module):
    def forward(self, x):
        return Own.apply(x)


def network(kind):
    torch.manual_seed(0)
    middle = {"norm": [nn.BatchNorm2d(4), nn.ReLU()], "plain": [nn.GELU()], "own": [Applied()]}[kind]
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), *middle, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 5)
    )


def main(kind, policy, backend):
    torch.set_num_threads(1)
    objectives = []
    for compiled in (False, True):
        objective = Distillation(network(kind), network("plain"), batch_norm=policy, jacobians=1.0, output_loss="kl")
        objective.compiled = CompiledSteps(backend=backend) if compiled else None
        objectives.append(objective)
    worst = 0.0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for count in (20, 20, 17, 31):  # the first is measured, so it is eager
            x, y = torch.rand(count, 1, 8, 8), torch.randint(5, (count,))
            gradients = []
            for objective in objectives:
                objective.zero_grad()
                objective(x, y, ids=torch.arange(count), draw=1)["loss"].backward()
                gradients.append(torch.cat([p.grad.flatten() for p in objective.student.parameters()]))
            eager, compiled = gradients
            worst = max(worst, float((eager - compiled).norm() / eager.norm()))
    eager, compiled = (objective.student.state_dict() for objective in objectives)
    apart = max(float((eager[name] - compiled[name]).abs().max()) for name in eager)
    batches = [int(value) for name, value in compiled.items() if "num_batches" in name]
    report = objectives[1].compiled.report()
    print(
        json.dumps(
            {
                "worst": worst,
                "apart": apart,
                "batches": batches,
                "said": [str(w.message) for w in said if w.category is UserWarning],
                **report,
            }
        )
    )


main(*sys.argv[1:])
