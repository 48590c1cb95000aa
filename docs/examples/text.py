"""A small transformer student of a larger one with other embeddings: which package is a docstring of?

The texts are docstrings of four installed packages, without the packages' names; the teacher is a transformer that this
script trains on 2,000 of them, the student has 20 texts per class. Methods at equal cost, as in `segmentation.py`.
"""

import ast
import json
import platform
import re
import statistics
import sys
import time
from collections import Counter
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from jacmatch import Distillation, GradientShare
from jacmatch.jacobian import TokenSubstitutions

PACKAGES, LENGTH, WORDS, STEPS, FEW = ("scipy", "sklearn", "matplotlib", "torch"), 24, 2000, 150, 20
NAMES = {"scipy", "sklearn", "scikit", "learn", "matplotlib", "mpl", "pyplot", "plt", "torch", "pytorch", "np", "numpy"}


def texts():
    """Token ids (N, LENGTH), 0 for padding and 1 for rare words, and the class of each, in an order of their own."""
    words, labels = [], []
    for label, package in enumerate(PACKAGES):
        collected = []
        for path in sorted(Path(find_spec(package).submodule_search_locations[0]).rglob("*.py")):
            if "test" in str(path) or len(collected) > 1500:
                continue
            tree = ast.parse(path.read_text(errors="ignore"))
            kinds = (ast.FunctionDef, ast.ClassDef)
            for text in (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)):
                some = [word for word in re.findall("[a-z]+", (text or "").lower()) if word not in NAMES][:LENGTH]
                collected += [some] if len(some) >= 8 else []
        words += collected[:1000]
        labels += [label] * len(collected[:1000])
    number = {word: n + 2 for n, (word, _) in enumerate(Counter(w for t in words for w in t).most_common(WORDS - 2))}
    ids = torch.tensor([[number.get(w, 1) for w in t] + [0] * (LENGTH - len(t)) for t in words])
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    return ids[order], torch.tensor(labels)[order]


class Classifier(nn.Module):
    """Embeddings, transformer layers, a mean over the words."""

    def __init__(self, width, layers):
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, width), nn.Parameter(0.1 * torch.randn(LENGTH, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True)
        self.layers, self.last = nn.TransformerEncoder(layer, layers), nn.Linear(width, len(PACKAGES))

    def forward(self, input_ids, attention_mask):
        h = self.layers(self.words(input_ids) + self.positions, src_key_padding_mask=attention_mask == 0)
        mask = attention_mask[..., None]
        return self.last((h * mask).sum(1) / mask.sum(1))


def fit(objective, ids, y, steps, seed, batch=40):
    optimizer = torch.optim.AdamW(objective.student.parameters(), 2e-3)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = torch.randperm(len(ids), generator=generator)[:batch]
        optimizer.zero_grad()
        context = {"attention_mask": (ids[rows] > 0).long()}
        objective(ids[rows], y[rows], ids=rows, progress=step / steps, context=context).loss.backward()
        optimizer.step()
        plan.step()


PROBE = TokenSubstitutions(4, special=(0, 1))
METHODS = {
    "labels": lambda student, teacher: Distillation(student),
    "outputs": lambda student, teacher: Distillation(student, teacher, jacobians=0),
    "derivatives": lambda student, teacher: Distillation(student, teacher, jacobians=GradientShare(0.3), probe=PROBE),
}


def seconds_of(ids, y, teacher):
    """Median seconds of a step, the methods taking turns."""
    made = {name: make(Classifier(16, 1), teacher) for name, make in METHODS.items()}
    times, context = {name: [] for name in made}, {"attention_mask": (ids > 0).long()}
    for _ in range(20):
        for name, objective in made.items():
            start = time.perf_counter()
            objective(ids, y, context=context).loss.backward()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each[5:]) for name, each in times.items()}


def main(out):
    torch.set_num_threads(1)
    path = Path(out)
    result = json.loads(path.read_text()) if path.exists() else {"cells": {}}
    ids, y = texts()
    train, test = slice(0, 2000), slice(-1000, None)
    result["texts"] = {
        "number": len(ids),
        **{name: version(name.replace("sklearn", "scikit-learn")) for name in PACKAGES},
    }

    def accuracy(network):
        with torch.no_grad():
            return float((network.eval()(ids[test], (ids[test] > 0).long()).argmax(1) == y[test]).float().mean())

    for seed in range(3):
        if all(f"{name}/{seed}" in result["cells"] for name in METHODS):
            continue
        torch.manual_seed(seed)
        teacher = Classifier(32, 2)
        fit(Distillation(teacher), ids[train], y[train], 400, seed)
        result["cells"][f"teacher/{seed}"] = {"accuracy": accuracy(teacher)}
        order = torch.randperm(2000, generator=torch.Generator().manual_seed(seed))
        rows = torch.cat([order[y[order] == label][:FEW] for label in range(len(PACKAGES))])
        result.setdefault("seconds", seconds_of(ids[rows[::2]], y[rows[::2]], teacher))
        most = max(result["seconds"].values())
        for name, make in METHODS.items():
            torch.manual_seed(seed)
            student = Classifier(16, 1)
            steps = round(STEPS * most / result["seconds"][name])
            fit(make(student, teacher), ids[rows], y[rows], steps, seed)
            result["cells"][f"{name}/{seed}"] = {"accuracy": accuracy(student), "steps": steps}
            print(name, seed, result["cells"][f"{name}/{seed}"], flush=True)
            result["machine"] = {"python": platform.python_version(), "torch": torch.__version__, "threads": 1}
            path.write_text(json.dumps(result, indent=1))
    result["summary"] = {}
    for name in ("teacher", *METHODS):
        values = [result["cells"][f"{name}/{seed}"]["accuracy"] for seed in range(3)]
        result["summary"][name] = [round(f(values), 4) for f in (statistics.mean, statistics.stdev)]
    path.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
