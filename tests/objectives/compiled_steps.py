"""A few steps of a compiled objective and of its eager twin, in a process without type checks: they cannot be traced.

Called as `compiled_steps.py KIND POLICY BACKEND`; prints what a test asks about, as JSON.
"""

import json
import sys
import warnings

import torch
from torch import nn

from jacmatch.jacobian import RandomOutputs
from jacmatch.models.vit import VisionTransformer
from jacmatch.objectives import CompiledSteps, Distillation, Regression, Robustness


class Own(torch.autograd.Function):
    """A custom rule that is right to any order when it is not compiled."""

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
    if kind == "vit":
        return VisionTransformer(5, (1, 8, 8), depth=1, width=16, heads=2)
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
    with warnings.catch_warnings(record=True) as caught:
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
                "warnings": [str(w.message) for w in caught if w.category is UserWarning],
                **report,
            }
        )
    )


def small(kind, policy, backend):
    """The same of a regression and of a penalty."""
    torch.set_num_threads(1)
    gradients = []
    for compiled in (False, True):
        torch.manual_seed(0)
        student, teacher = (nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(2))
        made = {
            "regression": lambda s, t: Regression(s, t, jacobians=1.0, probe=RandomOutputs(2), inputs=2.0),
            "robustness": lambda s, t: Robustness(s, penalty=0.5, scale=2.0),
        }
        objective = made[kind](student, teacher)
        objective.compiled = CompiledSteps(backend=backend) if compiled else None
        grads = []
        for count in (6, 6, 5, 7):  # the first is measured, so it is eager
            x = torch.rand(count, 4, generator=torch.Generator().manual_seed(count))
            y = x[:, :3].sin() if kind == "regression" else torch.arange(count) % 3
            objective.zero_grad()
            objective(x, y, draw=1)["loss"].backward()
            grads.append(student[0].weight.grad.clone())
        gradients.append(grads)
    worst = max(float((one - other).abs().max()) for one, other in zip(*gradients, strict=True))
    print(json.dumps({"worst": worst, **objective.compiled.report()}))


(small if sys.argv[1].startswith("r") else main)(*sys.argv[1:])
