"""A small transformer student of a sentence encoder, all-MiniLM-L6-v2 with a linear probe, on four newsgroups.

Both share a tokenizer; the student's table of embeddings is 64 wide, not 384. The teacher answers once about each text,
and its time is measured apart; then each method trains for the same seconds of processor time.
`python text.py OUT.json MINILM TEXTS` stores each finished cell; a second run goes on. MINILM is the folder of the
model (config.json, model.safetensors, tokenizer.json), TEXTS has 20newsgroups-train.tab and 20newsgroups-test.tab.
"""

import csv
import json
import math
import platform
import statistics
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModel

from jacmatch import Distillation, GradientShare, MemoizedTeacher, ModuleTeacher
from jacmatch.jacobian import TokenSubstitutions

GROUPS = ("sci.crypt", "sci.electronics", "sci.med", "sci.space")
LENGTH, WIDTH, SECONDS, BATCH, SEEDS, COUNTS, SOME = 24, 64, 8.0, 16, 3, (10, 100), 500
SPECIAL = (0, 100, 101, 102, 103)  # padding, unknown, start, separation, mask


def texts(path, tokenizer):
    """Token ids (N, LENGTH) and groups (N,), in an order of their own."""
    csv.field_size_limit(10**9)
    with open(path, encoding="utf-8") as file:
        rows = [row for row in csv.reader(file, delimiter="\t") if row and row[0] in GROUPS]
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    ids = torch.tensor([each.ids for each in tokenizer.encode_batch([text for _, text in rows])])
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    return ids[order], torch.tensor([GROUPS.index(group) for group, _ in rows])[order]


class Teacher(nn.Module):
    """The mean of the encoder's tokens, and a linear probe that is trained on it."""

    def __init__(self, folder):
        super().__init__()
        self.encoder, self.last = AutoModel.from_pretrained(folder), nn.Linear(384, len(GROUPS))

    def forward(self, input_ids, attention_mask, probe=True):
        h, mask = self.encoder(input_ids, attention_mask).last_hidden_state, attention_mask[..., None]
        mean = (h * mask).sum(1) / mask.sum(1)
        return self.last(mean) if probe else mean

    def get_input_embeddings(self):
        return self.encoder.get_input_embeddings()


class Student(nn.Module):
    """Two transformer layers; the embeddings start from the principal components of the teacher's."""

    def __init__(self, table):
        super().__init__()
        self.words, self.positions = nn.Embedding.from_pretrained(table, freeze=False), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.1, "gelu", batch_first=True)
        self.layers, self.last = nn.TransformerEncoder(layer, 2), nn.Linear(WIDTH, len(GROUPS))

    def forward(self, input_ids, attention_mask):
        h = self.layers(self.words(input_ids) + self.positions.weight, src_key_padding_mask=attention_mask == 0)
        mask = attention_mask[..., None]
        return self.last((h * mask).sum(1) / mask.sum(1))

    def get_input_embeddings(self):
        return self.words


def mask_of(ids):
    return {"attention_mask": (ids > 0).long()}


def in_batches(network, ids, **how):
    """What a network returns for all texts, in evaluation mode."""
    with torch.no_grad():
        return torch.cat([network.eval()(some, **mask_of(some), **how) for some in ids.split(50)])


def fit(objective, ids, y, known, seed):
    """Train for SECONDS of processor time; return the number of steps."""
    optimizer = torch.optim.AdamW(objective.student.parameters(), 1e-3, weight_decay=0.05)
    generator, steps, start = torch.Generator().manual_seed(seed), 0, time.process_time()
    while (progress := (time.process_time() - start) / SECONDS) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, progress / 0.1) * 0.5 * (1 + math.cos(math.pi * progress))
        rows = known[torch.randperm(len(known), generator=generator)[:BATCH]]
        optimizer.zero_grad()
        context = mask_of(ids[rows])
        objective(ids[rows], y[rows], ids=rows, draw=0, progress=progress, context=context).loss.backward()
        optimizer.step()
        steps += 1
    return steps


def ask(objective, ids, y, known):
    """Have the teacher answer once about these texts; return its seconds for each."""
    start = time.process_time()
    with torch.no_grad():
        for rows in known.split(25):
            objective(ids[rows], y[rows], ids=rows, draw=0, context=mask_of(ids[rows]))
    return (time.process_time() - start) / len(known)


# The same eight substitutions of a text each time, so that the teacher is queried once about it.
PROBE = TokenSubstitutions(8, candidates="random", special=SPECIAL)
METHODS = {
    "labels": lambda student, teacher: Distillation(student),
    "outputs": lambda student, teacher: Distillation(student, teacher, jacobians=0),
    "derivatives": lambda student, teacher: Distillation(student, teacher, jacobians=GradientShare(0.3), probe=PROBE),
}


def main(out, folder, data):
    torch.set_num_threads(1)
    path, tokenizer = Path(out), Tokenizer.from_file(f"{folder}/tokenizer.json")
    result = json.loads(path.read_text()) if path.exists() else {"cells": {}}
    ids, y = texts(f"{data}/20newsgroups-train.tab", tokenizer)
    test, labels = (each[:SOME] for each in texts(f"{data}/20newsgroups-test.tab", tokenizer))
    torch.manual_seed(0)
    teacher = Teacher(folder)
    features, targets = in_batches(teacher, ids[:SOME], probe=False), y[:SOME]
    optimizer = torch.optim.LBFGS(teacher.last.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        total = nn.functional.cross_entropy(teacher.last(features), targets)
        (total := total + 1e-3 * teacher.last.weight.square().sum()).backward()
        return total

    optimizer.step(loss)
    table = teacher.get_input_embeddings().weight.detach()
    table = table @ torch.pca_lowrank(table, WIDTH, niter=4)[2]
    table /= table.std()

    def accuracy(network):
        return float((in_batches(network, test).argmax(1) == labels).float().mean())

    if "teacher" not in result:
        result["teacher"] = {"accuracy": accuracy(teacher), "texts": len(features)}
    result["machine"] = {
        **{"python": platform.python_version(), "processor": platform.machine(), "threads": 1},
        **{name: version(name) for name in ("torch", "transformers")},
    }
    for seed in range(SEEDS):
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
        memory = MemoizedTeacher(ModuleTeacher(teacher), draws=True)
        for count, name in ((count, name) for count in reversed(COUNTS) for name in METHODS):
            if (key := f"{name}/{count}/{seed}") in result["cells"]:
                continue
            known = torch.cat([order[y[order] == label][:count] for label in range(len(GROUPS))])
            torch.manual_seed(seed)
            student = Student(table.clone())
            objective = METHODS[name](student, memory)
            before = ask(objective, ids, y, known)
            steps = fit(objective, ids, y, known, seed)
            result["cells"][key] = {"accuracy": accuracy(student), "steps": steps, "seconds_of_a_text_before": before}
            print(key, result["cells"][key], flush=True)
            path.write_text(json.dumps(result, indent=1))
    done = Counter(key.rpartition("/")[0] for key in result["cells"])
    result["summary"] = {}
    for method in (method for method in done if done[method] == SEEDS):
        cells = [result["cells"][f"{method}/{seed}"] for seed in range(SEEDS)]
        values, steps = ([cell[kind] for cell in cells] for kind in ("accuracy", "steps"))
        spread = [round(f(values), 4) for f in (statistics.mean, statistics.stdev)]
        result["summary"][method] = {"accuracy": spread, "steps": round(statistics.mean(steps))}
    path.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
