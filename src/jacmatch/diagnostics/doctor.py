"""Which derivative engines are right for a module and what is wrong with the others, and which is the fastest."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.diagnostics.isolation import Batch
from jacmatch.errors import UnsupportedError, unknown_name
from jacmatch.jacobian import Engine, gradient_norms
from jacmatch.jacobian.arguments import Arguments
from jacmatch.jacobian.callables import layers_of, preserved_buffers, preserved_generators, preserved_state
from jacmatch.jacobian.findings import DOCTOR, Finding, Verdict, fault, note
from jacmatch.jacobian.finite_differences import couples, plain
from jacmatch.jacobian.function import check_input, replayed
from jacmatch.jacobian.modules import Module, call, in_mode
from jacmatch.jacobian.verification import Comparison, comparison_of, isolated
from jacmatch.objectives import Distillation

ENGINES = ("reverse", "forward", "differences")


@dataclass(frozen=True)
class Diagnosis:
    """The result of `doctor`.

    Attributes:
        engine: The first of reverse, forward, differences that is correct; `none` if no engine is.
        findings: The findings.
        engines: For each engine `right`, or what is wrong with it.
    """

    engine: str
    findings: tuple[Finding, ...]
    engines: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return not any(finding.severity == "fault" for finding in self.findings)

    def __str__(self) -> str:
        lines = [f"engine: {self.engine}", *(f"  {name:<12} {state}" for name, state in self.engines.items())]
        lines += [f"{finding.severity} {finding}" for finding in self.findings]
        return "\n".join(lines if self.findings else [*lines, "no fault found"])


def doctor(
    module: Module,
    x: Float[Tensor, "batch *input"],
    *,
    seed: int = 0,
    engines: tuple[str, ...] = ENGINES,
    context: Mapping[str, Any] | None = None,
) -> Diagnosis:
    """Diagnose a module at x, in its current mode (training or evaluation); the module is left unchanged.

    Values are checked for the whole batch, derivatives on a few samples of it, by the checks that every product makes
    before it uses an engine (`jacmatch.jacobian.verification`). The reference is a copy in float64 where the module can
    be copied and runs in float64; otherwise the differences are taken in the module's own type, with a loose tolerance.

    Args:
        module: The network, or any function of one tensor.
        x: A batch of at least two samples, as in training.
        seed: Seeds the directions.
        engines: The engines to check.
        context: Other arguments of the network, by name, passed unchanged. Tensors whose first dimension is the batch
            belong to the samples; wrap a tensor in `Shared` if only its size is that of the batch.

    Raises:
        InputError: x is not a tensor of samples of a floating-point type, the outputs are not a real tensor, or an
            engine is unknown.

    Example:
        >>> diagnosis = doctor(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3))
        >>> diagnosis.engine, diagnosis.ok
        ('reverse', True)
    """
    check_input(x, "doctor")
    if not set(engines) <= set(ENGINES):
        raise unknown_name("An engine of `doctor`", next(each for each in engines if each not in ENGINES), ENGINES)
    x = x.detach()
    arguments = Arguments.of("doctor", x, context)[1]
    with isolated(x), preserved_state(module), torch.enable_grad():
        findings = _values(module, x, arguments)
        if any(finding.code in ("not-finite", "non-deterministic") for finding in findings):
            return Diagnosis("none", tuple(findings), {})
        comparison = comparison_of(plain(module, arguments), x, seed=seed)
        reference = comparison.reference
        if not reference.moves:
            findings.append(DOCTOR["zero-jacobian"])
        elif reference.tolerance == math.inf:
            findings.append(DOCTOR["unchecked"])
        states = {}
        for name in engines:
            verdict = _both_products(comparison, x, name, arguments)
            states[name] = verdict.label
            cut_off = any(finding.code in ("detached", "partly-detached") for finding in findings)
            findings += [each for each in verdict.findings if not (cut_off and each.code in _FOLLOW_FROM_DETACHING)]
    engine = next((name for name, state in states.items() if state == "right"), "none")
    return Diagnosis(engine, tuple(dict.fromkeys(findings)), states)


def _both_products(comparison: Comparison, x: Tensor, name: str, arguments: Arguments | None) -> Verdict:
    """Return the verdict on an engine for all that it is used for: reverse mode computes vᵀJ and Jv."""
    product = "vjp" if name == "reverse" else name
    verdict = comparison.not_finite(product, x, arguments) or comparison.verdict(product, rounding=True)
    if name != "reverse" or not verdict.is_right or not comparison.reference.moves:
        return verdict
    other = comparison.verdict("reverse", rounding=True)
    if other.is_right:
        return verdict
    what = f"Jv by engine 'reverse' is not correct: {other.label}. {' '.join(each.what for each in other.findings)}"
    finding = note("reverse-wrong-for-jvp", what, "Use another engine for Jv, as engine='auto' does.")
    return Verdict(other.state, f"right for vjp; for jvp {other.label}", (*verdict.findings, finding))


_FOLLOW_FROM_DETACHING = (
    *("forward-zero", "forward-incomplete", "forward-unsupported"),
    *("wrong-gradient", "detached-parameters", "differences-inaccurate"),
)


def _values(module: Module, x: Tensor, arguments: Arguments | None) -> list[Finding]:
    """Return what values alone show: NaN, random numbers, writes to the input, samples that depend on each other."""
    with torch.no_grad():
        if not torch.isfinite(x).all():
            return [fault("not-finite", "The input contains NaN or Inf.", "Clean the data.")]
        same = replayed(plain(module, arguments), x)
        y, again, given = same(x), same(x), x.clone()
        if not torch.isfinite(y).all():
            remedy = "Look for log, division or overflow; lower the scale."
            return [fault("not-finite", "The outputs contain NaN or Inf.", remedy)]
        findings = []
        repeats = torch.equal(y, again)
        if not repeats or _differs(module, x, arguments):
            if not repeats or not isinstance(module, nn.Module):
                return [DOCTOR["non-deterministic"]]
            with in_mode(module, training=False):
                if _differs(module, x, arguments):
                    return [DOCTOR["non-deterministic"]]
            findings.append(DOCTOR["dropout"])
        with preserved_buffers(module):
            call(module, given, arguments)
        if not torch.equal(given, x):
            findings.append(DOCTOR["in-place-input"])
        return findings + _coupling(module, x, y, same)


def _differs(module: Module, x: Tensor, arguments: Arguments | None) -> bool:
    """Return whether two ordinary calls, one after the other, give different outputs."""
    with preserved_state(module):
        first, second = (plain(module, arguments)(x.clone())[0] for _ in range(2))
    return not torch.allclose(first, second, rtol=1e-3, atol=1e-6)


def _coupling(module: Module, x: Tensor, y: Tensor, values: Callable[[Tensor], Tensor]) -> list[Finding]:
    """Return a finding if the output of one sample depends on the others."""
    try:
        if not couples(values, x, y, 1e-4):
            return []
    except UnsupportedError as unknown:
        return [note("unchecked", str(unknown), "Try another batch.")]
    batch_norm = nn.modules.batchnorm._BatchNorm
    normalized = any(isinstance(layer, batch_norm) and layer.training for layer in layers_of(module))
    return [DOCTOR["batch-norm-couples" if normalized else "couples-samples"]]


_ENGINES: tuple[Engine, ...] = ("forward", "reverse")


@dataclass(frozen=True)
class EngineBenchmark:
    """The result of `benchmark_engines`.

    Attributes:
        engine: The fastest engine that can differentiate the student; `differences` if no other can.
        seconds: Median time of a step by each of these engines.
        refused: For each other engine, the reason why it cannot.
    """

    engine: Engine
    seconds: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def benchmark_engines(objective: Distillation, batch: Batch, *, rounds: int = 5) -> EngineBenchmark:
    """Measure the fastest engine for directions on the input side, by the time of a step: terms and gradient.

    The engines alternate, each after one step that is not timed. The engine `differences` is not measured: it takes
    about as long, but is not exact. The objective, its student and torch's random numbers are left unchanged.

    Args:
        objective: The objective, on the device of the batch; its probe must draw input directions.
        batch: A batch of the training.
        rounds: Timed steps by each engine.
    """
    seconds: dict[str, list[float]] = {engine: [] for engine in _ENGINES}
    refused: dict[str, str] = {}
    with _untouched(objective, batch.x.device):
        for _ in range(rounds + 1):
            for engine in [each for each in _ENGINES if each not in refused]:
                try:
                    seconds[engine].append(_step(objective, batch, engine))
                except UnsupportedError as error:
                    refused[engine] = str(error)
    measured = [engine for engine in _ENGINES if engine not in refused]
    medians: dict[str, float] = {engine: statistics.median(seconds[engine][1:]) for engine in measured}
    best: Engine = min(measured, key=lambda engine: medians[engine], default="differences")
    return EngineBenchmark(best, medians, refused)


def _step(objective: Distillation, batch: Batch, engine: Engine) -> float:
    """Return the seconds of the terms and their gradient."""
    parameters: list[nn.Parameter] = [p for p in objective.parameters() if p.requires_grad]
    objective.differentiation.engine, objective.calls = engine, 1  # the same directions for each engine
    _wait(batch.x.device)
    start = time.perf_counter()
    terms = objective(batch.x, batch.y, **batch.keywords())
    gradient_norms({"loss": terms["loss"]}, parameters)
    _wait(batch.x.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _untouched(objective: Distillation, device: torch.device) -> Iterator[None]:
    """Make each call within the context a step with the Jacobian term and without measured shares; then restore."""
    before = (objective.differentiation.engine, objective.every, objective.training)
    objective.every = 1
    objective.train()
    try:
        with objective.unmeasured_calls(), preserved_generators(device), preserved_buffers(objective.student):
            yield
    finally:
        objective.differentiation.engine, objective.every, training = before
        objective.train(training)
