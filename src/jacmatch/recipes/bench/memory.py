"""`jacmatch bench memory`: peak memory in fresh processes."""

from functools import partial

from jacmatch.recipes.bench.claims import Benchmark, Case, Claim, Measured
from jacmatch.recipes.bench.method import Conditions, NotMeasured, compare_memory

ROW = Claim("peak memory of one row ÷ plain distillation", must=2.0, aim=1.6)
CHUNKS = Claim("peak memory of k = 8 rows in chunks of 1 ÷ k = 1", must=1.05)
FULL = Claim("peak memory of a full Jacobian of 100 outputs ÷ the same with chunk_size=1")

FULL_JACOBIAN = """
from jacmatch import jacobian
from jacmatch.models import build
network = build("{}", 100, (3, 32, 32)).eval().requires_grad_(False).to(device)
jacobian(network, torch.rand(2, 3, 32, 32, device=device), chunk_size={})
"""


def full_jacobian(conditions: Conditions, chunk: int) -> Measured:
    """How the memory of an exact Jacobian grows with the rows that are taken at once."""
    network = "mlp" if conditions.quick else "resnet20"
    these, one = (FULL_JACOBIAN.format(network, size) for size in (chunk, 1))
    return Measured(compare_memory(conditions, these, one), details={"batch": 2})


def later(conditions: Conditions) -> Measured:
    """Not measured yet."""
    raise NotMeasured("not measured yet")


MEMORY = Benchmark(
    "peak memory in fresh processes",
    (
        Case(ROW, "VGG-9 → VGG-4; ResNet-56 → ResNet-20", later),
        Case(CHUNKS, "ResNet-20", later),
        *(
            Case(FULL, f"ResNet-20, 32×32, chunk_size={chunk}", partial(full_jacobian, chunk=chunk))
            for chunk in (2, 4, 8, 16, 32)
        ),
    ),
)
