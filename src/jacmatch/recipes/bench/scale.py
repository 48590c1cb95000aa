"""`jacmatch bench scale`: the cache as it grows."""

from jacmatch.recipes.bench.claims import Benchmark, Case, Claim, Measured
from jacmatch.recipes.bench.method import Conditions, NotMeasured

COST = Claim("cost per sample of a cache of 10⁶ entries ÷ one of 10³", must=1.2, aim=1.05)
RESIDENT = Claim("resident memory with a cache of 10⁶ entries ÷ one of 10³", must=1.2, aim=1.05)


def later(conditions: Conditions) -> Measured:
    """Not measured yet."""
    raise NotMeasured("not measured yet")


SCALE = Benchmark(
    "the cache as it grows",
    (
        Case(COST, "reading", later, devices=("cpu",)),
        Case(RESIDENT, "reading", later, devices=("cpu",)),
    ),
)
