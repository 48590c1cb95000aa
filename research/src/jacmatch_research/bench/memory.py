"""`jacmatch bench memory`: peak memory in new processes."""

import textwrap
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn

from jacmatch_research.bench import rivals
from jacmatch_research.bench.claims import Benchmark, Case, Claim, Conditions, Measured, Spread, compare_memory, output

ROW = Claim("peak memory of one row ÷ plain distillation", must=2.0, aim=1.6)
CHUNKS = Claim("peak memory of k = 8 rows in chunks of 1 ÷ k = 1", must=1.05)
RETURNED = Claim(f"{CHUNKS.text}, freed memory returned to the system at once", must=1.05)
ARENA = Claim(f"{CHUNKS.text}, one arena of the allocator")
TRIMMED = Claim(f"{CHUNKS.text}, the heap trimmed at 64 KiB")
TENSORS = Claim("largest sum of tensors, k = 8 rows in chunks of 1 ÷ k = 1", must=1.05)
FULL = Claim("peak memory of a full Jacobian of 100 outputs ÷ the same with chunk_size=1")

FUNC = Claim("peak memory of a full Jacobian of 100 outputs ÷ `vmap(jacrev(...))` of torch.func", must=0.8)
TORCHJD = Claim("peak memory of a full Jacobian of 100 outputs ÷ `torchjd.autojac.jac`", must=0.8)

PAIRS = {
    "VGG-9 → VGG-4, 28×28": ("vgg9", "vgg4", (1, 28, 28), 64),
    "ResNet-56 → ResNet-20, 32×32": ("resnet56", "resnet20", (3, 32, 32), 32),
}
STEPS = """
from jacmatch.jacobian import RandomOutputs
from jacmatch.models import build
from jacmatch.objectives import Distillation
from jacmatch_research.bench.rivals import stepper
teacher, student = (build(name, 10, {shape}).to(device) for name in ({teacher!r}, {student!r}))
x, y = torch.rand({batch}, *{shape}, device=device), torch.randint(0, 10, ({batch},), device=device)
objective = Distillation(
    student, teacher, jacobians={weight}, probe=RandomOutputs({rows}), chunk_size={chunk}, measure_every=10**9
)
objective.measured_at = 0  # the shares are not measured
step = stepper(student, lambda: objective(x, y)["loss"])
for _ in range(3):
    step()
"""
FULL_JACOBIAN = """
from jacmatch import jacobian
from jacmatch.models import build
network = build("{}", 100, (3, 32, 32)).eval().requires_grad_(False).to(device)
jacobian(network, torch.rand({}, 3, 32, 32, device=device), chunk_size={})
"""
PEER = """
from jacmatch.models import build
from jacmatch_research.bench.rivals import {peer}
network = build("{network}", 100, (3, 32, 32)).eval().requires_grad_(False).to(device)
{peer}(network, torch.rand(8, 3, 32, 32, device=device))
"""


def steps(conditions: Conditions, pair: str, weight: float, rows: int, chunk: int | None) -> str:
    """A few training steps as the text of a program."""
    teacher, student, shape, batch = PAIRS[pair]
    if conditions.quick:
        teacher, student, batch = "cnn5", "cnn3", 4
    given = {"teacher": teacher, "student": student, "shape": shape, "batch": batch}
    return STEPS.format(weight=weight, rows=rows, chunk=chunk, **given)


def one_row(conditions: Conditions, pair: str) -> Measured:
    """Peak memory of three steps with one row each ÷ three plain steps; both include Python, torch and the networks."""
    mine, plain = (steps(conditions, pair, weight, 1, None) for weight in (1.0, 0.0))
    return Measured(compare_memory(conditions, mine, plain), details={"batch": PAIRS[pair][3]})


def chunks(conditions: Conditions, pair: str, environment: Mapping[str, str] | None = None) -> Measured:
    """Peak memory of eight rows in chunks of one ÷ that of one row."""
    eight, one = (steps(conditions, pair, 1.0, rows, chunk) for rows, chunk in ((8, 1), (1, None)))
    return Measured(compare_memory(conditions, eight, one, environment=environment), details={"batch": PAIRS[pair][3]})


def full_jacobian(conditions: Conditions, chunk: int) -> Measured:
    """The memory of an exact Jacobian, by the number of rows that are computed at once."""
    network = "mlp" if conditions.quick else "resnet20"
    these, one = (FULL_JACOBIAN.format(network, 2, size) for size in (chunk, 1))
    return Measured(compare_memory(conditions, these, one), details={"batch": 2})


def beside_peer(conditions: Conditions, peer: Callable[[nn.Module, Tensor], Tensor]) -> Measured:
    """An exact Jacobian of eight samples ÷ that of another library."""
    network = "mlp" if conditions.quick else "resnet20"
    theirs = PEER.format(network=network, peer=peer.__name__)
    ours = FULL_JACOBIAN.format(network, 8, None)
    return Measured(compare_memory(conditions, ours, theirs), details={"batch": 8})


MEMORY = Benchmark(
    "peak memory in new processes",
    (
        *(Case(ROW, pair, partial(one_row, pair=pair)) for pair in PAIRS),
        *(Case(CHUNKS, pair, partial(chunks, pair=pair)) for pair in PAIRS),
        *(
            Case(FULL, f"ResNet-20, 32×32, chunk_size={chunk}", partial(full_jacobian, chunk=chunk))
            for chunk in (2, 4, 8, 16, 32)
        ),
        Case(FUNC, "ResNet-20, 32×32, batch 8", partial(beside_peer, peer=rivals.torch_func_jacobian)),
        Case(TORCHJD, "ResNet-20, 32×32, batch 8", partial(beside_peer, peer=rivals.torchjd_jacobian)),
    ),
)

# counts what torch allocates and frees, in its order
COUNTED = """
import json, pathlib, tempfile
with torch.profiler.profile(profile_memory=True) as profiler:
{program}
with tempfile.NamedTemporaryFile(suffix=".json") as file:
    profiler.export_chrome_trace(file.name)
    trace = json.loads(pathlib.Path(file.name).read_text())  # the profiler replaces the file
events = [e for e in trace["traceEvents"] if e["name"] == "[memory]"]
held = peak = 0
for event in sorted(events, key=lambda e: e["ts"]):
    held += event["args"]["Bytes"]
    peak = max(peak, held)
print(peak)
"""


def tensors(conditions: Conditions, pair: str) -> Measured:
    """Largest sum of all tensors at once, with eight rows in chunks of one ÷ with one row; the same in each round."""
    programs = (steps(conditions, pair, 1.0, rows, chunk) for rows, chunk in ((8, 1), (1, None)))
    texts = (COUNTED.format(program=textwrap.indent(each.replace("range(3)", "range(2)"), "    ")) for each in programs)
    eight, one = (int(output(conditions, text)) for text in texts)
    return Measured(Spread.of([eight / one]), details={"batch": PAIRS[pair][3], "mib_of_one": one >> 20})


# glibc retains freed blocks in its heap, in pieces; blocks from this size on are mapped and returned to the system
ALLOCATORS = {
    RETURNED: {"MALLOC_MMAP_THRESHOLD_": "65536"},
    ARENA: {"MALLOC_ARENA_MAX": "1"},
    TRIMMED: {"MALLOC_TRIM_THRESHOLD_": "65536"},
}
CHUNKED = Benchmark(
    "memory of rows in chunks: tensors alone, and the process by the settings of its allocator",
    (
        *(Case(TENSORS, pair, partial(tensors, pair=pair), devices=("cpu",)) for pair in PAIRS),
        *(
            Case(claim, pair, partial(chunks, pair=pair, environment=variables), devices=("cpu",))
            for claim, variables in ALLOCATORS.items()
            for pair in PAIRS
        ),
    ),
)
