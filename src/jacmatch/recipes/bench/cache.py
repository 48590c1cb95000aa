"""`jacmatch bench cache`: a teacher that answers from disk."""

from jacmatch.recipes.bench.claims import Benchmark, Case, Claim, Measured
from jacmatch.recipes.bench.method import Conditions, NotMeasured

ENTRY = Claim("answer from disk ÷ answer of the live teacher")


def later(conditions: Conditions) -> Measured:
    """Not measured yet."""
    raise NotMeasured("not measured yet")


CACHE = Benchmark(
    "a teacher that answers from disk",
    (Case(ENTRY, "VGG-9, one row", later),),
)
