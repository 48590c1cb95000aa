"""A training step with one random row of the Jacobian ÷ a step of plain distillation of the same pair, live teacher.

By operations, with r the teacher's forward cost in units of the student's: (2r + 6) / (r + 3), so about 2.
"""

import torch

import method
from jacmatch import Distillation, RandomOutputs, Share
from jacmatch.models import build

PAIRS = {
    "VGG-9 → VGG-4, 28×28": ("vgg9", "vgg4", (1, 28, 28), 64),
    "ResNet-56 → ResNet-20, 32×32": ("resnet56", "resnet20", (3, 32, 32), 32),
}


def step(teacher, student, x, y, jacobians, batch_norm):
    objective = Distillation(student, teacher, jacobians=jacobians, probe=RandomOutputs(1), batch_norm=batch_norm)
    optimizer = torch.optim.Adam(student.parameters())
    # The measurement of the gradient shares is a separate cost: 1 / measure_every of a few backward passes.
    objective.measure_every = 10**9
    objective(x, y)["loss"].backward()

    def run():
        optimizer.zero_grad()
        objective(x, y)["loss"].backward()
        optimizer.step()

    return run


def rows(quick):
    found = []
    for name, (teacher_name, student_name, shape, batch) in PAIRS.items():
        if quick:
            teacher_name, student_name, batch = "cnn5", "cnn3", 4
        x, y = torch.rand(batch, *shape), torch.randint(0, 10, (batch,))
        for batch_norm in ("frozen", "batch"):
            steps = [
                step(build(teacher_name, 10, shape), build(student_name, 10, shape), x, y, weight, batch_norm)
                for weight in (Share(0.3), 0.0)
            ]
            found.append({"case": f"{name}, {batch_norm}", "batch": batch, **method.ratio(*steps, 3 if quick else 15)})
    return found


if __name__ == "__main__":
    method.main("row_step", "one random row (reverse) ÷ plain distillation, live teacher", 2.3, rows)
