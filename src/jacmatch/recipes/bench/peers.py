"""`jacmatch bench peers`: plain distillation beside other libraries on the same networks, data and batch."""

from jacmatch.recipes.bench.claims import Benchmark, Case, Claim, Measured
from jacmatch.recipes.bench.method import Conditions, NotMeasured

TORCHDISTILL = Claim("plain distillation, samples/s ÷ torchdistill", must=1.0, aim=1.5, better="higher")
TIMM = Claim("plain distillation, samples/s ÷ distillation task of timm", must=1.0, aim=1.5, better="higher")


def later(conditions: Conditions) -> Measured:
    """Not measured yet."""
    raise NotMeasured("not measured yet")


PEERS = Benchmark(
    "plain distillation beside other libraries on the same networks, data and batch",
    (
        Case(TORCHDISTILL, "ResNet-56 → ResNet-20", later),
        Case(TIMM, "ResNet-56 → ResNet-20", later),
    ),
)
