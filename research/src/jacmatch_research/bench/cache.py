"""`jacmatch bench cache`: a teacher that answers from disk."""

import tempfile
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

from jacmatch.models import build
from jacmatch.teachers import ModuleTeacher
from jacmatch_research.bench.answers import Answers
from jacmatch_research.bench.claims import Benchmark, Case, Claim, Measured
from jacmatch_research.bench.method import Conditions, compare

ENTRY = Claim("answer from disk ÷ answer of the live teacher")
WRITING = Claim("asking a teacher and writing its answers ÷ asking it")

TEACHERS = {
    "VGG-9, 32×32": ("vgg9", 64),
    "ResNet-20, 32×32": ("resnet20", 32),
}


def _answers(conditions: Conditions, folder: str, teacher: str, products: str) -> tuple[Answers, int]:
    name, batch = TEACHERS[teacher]
    name, batch, samples = ("mlp", 4, 8) if conditions.quick else (name, batch, 4 * batch)
    return Answers(Path(folder) / "cache", build(name, 10, (3, 32, 32)), (3, 32, 32), samples, products), batch


def reading(conditions: Conditions, teacher: str, products: str) -> Measured:
    """A batch of answers from disk ÷ the same of the live teacher; the files are in the memory of the system."""
    with tempfile.TemporaryDirectory() as folder:
        answers, batch = _answers(conditions, folder, teacher, products)
        answers.write(batch)
        live, (x, question) = ModuleTeacher(answers.network), answers.query_of(batch, 0)
        times = compare(conditions, answers.reader(batch, 1), lambda: live.answer(x, question), 15)
    spent = 1e6 * times.spread.median * times.baseline_seconds / batch
    details = {"batch": batch, "baseline_seconds": times.baseline_seconds, "microseconds_per_sample": round(spent, 1)}
    return Measured(times.spread, details=details)


def writing(conditions: Conditions, teacher: str, products: str) -> Measured:
    """A new cache ÷ the answers that it is made of; the disk has all of it at the end."""
    with tempfile.TemporaryDirectory() as folder:
        answers, batch = _answers(conditions, folder, teacher, products)
        live, turns = ModuleTeacher(answers.network), count()

        def write() -> None:
            replace(answers, folder=Path(folder) / f"cache-{next(turns)}").write(batch)

        def ask() -> None:
            for number in range(answers.samples // batch):
                live.answer(*answers.query_of(batch, number))

        times = compare(conditions, write, ask, 7)
    return Measured(times.spread, details={"samples": answers.samples, "baseline_seconds": times.baseline_seconds})


CACHE = Benchmark(
    "a teacher that answers from disk",
    (
        *(
            Case(
                ENTRY, f"{teacher}, {products}", partial(reading, teacher=teacher, products=products), devices=("cpu",)
            )
            for teacher in TEACHERS
            for products in ("vᵀJ", "Jv", "outputs")
        ),
        *(
            Case(WRITING, f"{teacher}, vᵀJ", partial(writing, teacher=teacher, products="vᵀJ"), devices=("cpu",))
            for teacher in TEACHERS
        ),
    ),
)
