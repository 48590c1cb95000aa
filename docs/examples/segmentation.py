"""A small U-Net student of a larger one on scenes of handwritten digits, 20 of them labeled.

Methods at equal cost: those without derivatives get as many more steps as a step with derivatives takes longer, as
measured before the first training. `python segmentation.py OUT.json` stores each finished cell; a second run goes on.
"""

import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from jacmatch import Distillation, GradientShare
from jacmatch.datasets import Split
from jacmatch.training.evaluation import evaluate

SIZE, DIGITS, CLASSES, STEPS, SCENES = 24, 4, 4, 300, 20


class UNet(nn.Module):
    """Two levels with a skip connection: (B, 1, H, W) to (B, 5, H, W): background, and digits 0 to 3."""

    def __init__(self, width):
        super().__init__()

        def block(inputs, outputs):
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.GELU())

        self.first, self.down = block(1, width), nn.Sequential(nn.AvgPool2d(2), block(width, 2 * width))
        self.bottom = nn.Sequential(nn.AvgPool2d(2), block(2 * width, 2 * width), nn.Upsample(scale_factor=2))
        self.up = nn.Sequential(block(4 * width, width), nn.Upsample(scale_factor=2))
        self.last = nn.Sequential(block(2 * width, width), nn.Conv2d(width, CLASSES + 1, 1))

    def forward(self, x):
        first = self.first(x)
        down = self.down(first)
        return self.last(torch.cat([first, self.up(torch.cat([down, self.bottom(down)], 1))], 1))


def scenes(rows, count, seed):
    """Scenes with digits of these rows at random positions, noise, and the class of each pixel."""
    data = load_digits()
    images, classes = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
    generator = torch.Generator().manual_seed(seed)
    x, y = 0.3 * torch.rand(count, 1, SIZE, SIZE, generator=generator), torch.zeros(count, SIZE, SIZE).long()
    for scene in range(count):
        for row in rows[torch.randint(len(rows), (DIGITS,), generator=generator)]:
            top, left = torch.randint(SIZE - 7, (2,), generator=generator).tolist()
            window = (scene, slice(top, top + 8), slice(left, left + 8))
            ink = images[row] > 0.25
            x[:, 0][window] = torch.maximum(x[:, 0][window], images[row])
            y[window] = torch.where(ink, classes[row] + 1, y[window])
    return Split(x, y)


def fit(objective, split, steps, seed, batch=20):
    optimizer = torch.optim.AdamW(objective.student.parameters(), 3e-3)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    generator = torch.Generator().manual_seed(seed)
    objective.train()
    for step in range(steps):
        rows = torch.randperm(len(split), generator=generator)[:batch]
        optimizer.zero_grad()
        objective(split.x[rows], split.y[rows], ids=rows, progress=step / steps).loss.backward()
        optimizer.step()
        plan.step()


COMMON = {"class_dim": 1, "positions": "mean"}
METHODS = {
    "labels": lambda student, teacher: Distillation(student, **COMMON),
    "outputs": lambda student, teacher: Distillation(student, teacher, jacobians=0, **COMMON),
    "derivatives": lambda student, teacher: Distillation(student, teacher, jacobians=GradientShare(0.3), **COMMON),
}


def seconds_of(split, teacher):
    """Median seconds of a step, the methods taking turns."""
    made = {name: make(UNet(8), teacher) for name, make in METHODS.items()}
    times = {name: [] for name in made}
    for _ in range(25):
        for name, objective in made.items():
            start = time.perf_counter()
            objective(split.x, split.y).loss.backward()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each[5:]) for name, each in times.items()}


def main(out):
    torch.set_num_threads(1)
    path = Path(out)
    result = json.loads(path.read_text()) if path.exists() else {"cells": {}}
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    order = order[torch.tensor(load_digits().target)[order] < CLASSES]
    pool, held_out = order[:500], order[500:]
    test = scenes(held_out, 200, 1)
    for seed in range(3):
        if all(f"{name}/{seed}" in result["cells"] for name in METHODS):
            continue
        torch.manual_seed(seed)
        teacher = UNet(16)
        fit(Distillation(teacher, **COMMON), scenes(pool, 1000, 100 + seed), 400, seed)
        few = scenes(pool, SCENES, 200 + seed)
        result.setdefault("seconds", seconds_of(few, teacher))
        result["cells"][f"teacher/{seed}"] = evaluate(teacher.eval(), test, device="cpu")
        most = max(result["seconds"].values())
        for name, make in METHODS.items():
            torch.manual_seed(seed)
            student = UNet(8)
            steps = round(STEPS * most / result["seconds"][name])
            fit(make(student, teacher), few, steps, seed)
            cell = {**evaluate(student.eval(), test, device="cpu"), "steps": steps}
            result["cells"][f"{name}/{seed}"] = cell
            print(name, seed, cell, flush=True)
            result["machine"] = {"python": platform.python_version(), "torch": torch.__version__, "threads": 1}
            result["machine"]["processor"] = platform.machine()
            path.write_text(json.dumps(result, indent=1))
    for name in ("teacher", *METHODS):
        cells = [result["cells"][f"{name}/{seed}"] for seed in range(3)]
        result.setdefault("summary", {})[name] = {
            key: [round(f([c[key] for c in cells]), 4) for f in (statistics.mean, statistics.stdev)]
            for key in ("accuracy", "miou")
        }
    path.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
