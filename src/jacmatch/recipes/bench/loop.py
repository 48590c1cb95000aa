"""`jacmatch bench loop`: what the training loop adds to the arithmetic of its steps."""

from jacmatch.recipes.bench.claims import Benchmark, Case, Claim, Measured
from jacmatch.recipes.bench.method import Conditions, NotMeasured

OVERHEAD = Claim("step of the training loop ÷ its bare arithmetic")


def later(conditions: Conditions) -> Measured:
    """Not measured yet."""
    raise NotMeasured("not measured yet")


LOOP = Benchmark(
    "what the training loop adds to the arithmetic of its steps",
    (Case(OVERHEAD, "plain distillation and one row", later),),
)
