"""Which engine may be used for a function: decided once for each kind of call, by a comparison with differences.

The product of an engine may be wrong. A correct product may have no derivative or a wrong one; a missing derivative
raises an error only in the backward pass of a user's loss, and a wrong one raises none. So an engine is checked on a
few samples before its first use: its product against differences of the values, and the parameter gradient of a penalty
on it against differences of the penalty (`engine_checks`). The verdict is stored for as long as the network lives.

A verdict holds for one signature: the networks that the function uses with all their layers and modes, trained tensors,
readout, BatchNorm policy, shape of a sample, type, device, and whether gradients are on. It also holds for one branch
only: numbers, settings and data may change what the network computes. The graph of each call shows its branch, and an
engine is checked again before the product of another branch is returned.
"""

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace
from functools import cached_property
from types import FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from jacmatch.errors import UnsupportedError
from jacmatch.jacobian.arguments import Arguments
from jacmatch.jacobian.callables import key_of, layers_of, modules_of, preserved_generators, preserved_state, trains
from jacmatch.jacobian.engine_checks import is_small, judge, not_finite_at
from jacmatch.jacobian.engines import JVP_ENGINES, reverse_vjp
from jacmatch.jacobian.features import Selection
from jacmatch.jacobian.findings import UNKNOWN, Verdict, refused
from jacmatch.jacobian.finite_differences import (
    EngineRun,
    Reference,
    couples,
    evaluated,
    own_copy,
    plain,
    replayed_values,
)
from jacmatch.jacobian.function import Cotangents, Function, Products
from jacmatch.jacobian.modules import uncompiled
from jacmatch.jacobian.readouts import Context

Result = TypeVar("Result")
_SAMPLES, _SIGNATURES = 4, 256
_BRANCHES = 16
"""Number of branches of a signature that are all checked; of later ones, only each 2ᵏ-th is."""
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DataParallel", "SyncBatchNorm")


class Comparison:
    """A function and a few samples on which its engines are compared with the same differences."""

    def __init__(
        self, function: Function, x: Tensor, *, seed: int = 0, count: int = 1, few: bool = True, moved: bool = True
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.function, self.x = _samples(function, x, few, moved, generator)
        self.generator, self.count = generator, count
        self.single = Reference.of(self.function, self.x, generator, count=count, single=True)

    @cached_property
    def reference(self) -> Reference:
        """The reference with its uncertainty, which takes several times the passes of `single`."""
        return Reference.of(self.function, self.x, self.generator, count=self.count)

    def verdict(self, name: str, *, rounding: bool = False) -> Verdict:
        """Return the verdict on `vjp`, or on an engine for Jv; `rounding` checks the function's own type too.

        An engine that agrees with a single difference is right; only others are compared with the slower `reference`.
        If no two calls return the same values, an engine that does not agree gets the verdict `unknown`, because the
        differences contain the noise.
        """
        if self.single.x.dtype == torch.float64 and self.single.moves:
            verdict = self._verdict(name, self.single, rounding)
            if verdict.state == "right":
                return verdict
        verdict = self._verdict(name, self.reference, rounding)
        return UNKNOWN if verdict.state == "wrong" and not self.reference.repeats else verdict

    def _verdict(self, name: str, reference: Reference, rounding: bool) -> Verdict:
        engine, of_rows = ("reverse", True) if name == "vjp" else (name, False)
        run = _run(name, reference.cotangents, lambda z: reference.tangents.to(z.dtype))
        return judge(engine, run, self.function, self.x, reference, of_rows=of_rows, rounding=rounding)

    def not_finite(self, name: str, x: Tensor, arguments: Arguments | None = None) -> Verdict | None:
        """Return a verdict if an engine returns NaN or infinity for the whole batch, else None."""
        run = _run(name, lambda z: lambda y: torch.randn_like(y)[None], lambda z: torch.randn_like(z)[None])
        return not_finite_at("reverse" if name == "vjp" else name, run, plain(self.function.module, arguments), x)


def _run(name: str, cotangents: Callable[[Tensor], Cotangents], tangents: Callable[[Tensor], Tensor]) -> EngineRun:
    """Return `vjp`, or an engine for Jv, with directions that may depend on the input."""
    if name == "vjp":
        return lambda function, x: reverse_vjp(function, x, cotangents(x))
    return lambda function, x: JVP_ENGINES[name](function, x, tangents(x))


def _samples(
    function: Function, x: Tensor, few: bool, moved: bool, generator: torch.Generator
) -> tuple[Function, Tensor]:
    """Return the function for the samples on which engines are compared, and these samples."""
    function, x = sampled(function, x.detach()) if few else (function, x.detach())
    # Equal pixels tie in max pooling and lie on kinks of ReLU, where no derivative exists: move away from them.
    noise = torch.randn(x.shape, generator=generator, device="cpu").to(x)
    return function, x + 1e-3 * moved * x.square().mean().sqrt() * noise


class Known:
    """The verdicts of one signature, for each branch that calls have taken, and the branch of the last call."""

    def __init__(self) -> None:
        self.verdicts: OrderedDict[Hashable, dict[Any, Any]] = OrderedDict()
        self.samples: dict[Hashable, tuple[bool, bool]] = {}
        self.branch: Hashable = None
        self._previous: Hashable = None
        self._seen = 0

    def now(self, function: Function) -> dict[Any, Any]:
        """Return the entries of the branch of the last call; before the first, of what numbers and settings select."""
        return self.verdicts.setdefault(_numbers(function) if self.branch is None else self.branch, {})

    def holds(self, function: Function, x: Tensor, name: str, count: int, result: Products) -> bool:
        """Return whether the verdict on an engine holds for the branch of this call; if not, it is to be checked."""
        if result.engine == "differences":
            return True
        with _verifying:
            branch = _numbers(function) if result.branch is None else result.branch
            if branch == self.branch:
                return True
            first, self._previous = self.branch is None, self.branch
            if branch not in self.verdicts:
                self._seen += 1
                few = result.branch is None or _is_distributed(function)
                samples = (True, True) if few else _samples_of(branch, function, x, name, count)
                rare = self._seen > _BRANCHES and self._seen & (self._seen - 1)
                if rare or (few and _is_distributed(function)) or (first and samples == (True, True)):
                    self.verdicts[branch] = dict(self.now(function))
                self.samples[branch] = samples
                if len(self.verdicts) > _SIGNATURES:
                    self.samples.pop(self.verdicts.popitem(last=False)[0], None)
            self.branch = branch
            known = self.now(function).get(name)
            return known is not None and (known.state == "right" or first)

    def recheck(self, check: Callable[[], Result]) -> Result:
        """Return the result of the check; if it raises, the next call is expected in the branch before this one."""
        try:
            return check()
        except UnsupportedError:
            self.branch = self._previous
            raise


def check_first(known: Known | None, check: Callable[[], Result]) -> Result:
    """Return the result of the check before a call; a branch where it raises may not be that of the next call."""
    try:
        return check()
    except UnsupportedError:
        if known is None or known.branch is None:
            raise
        known.branch = None
        return check()


def _samples_of(branch: Hashable, function: Function, x: Tensor, name: str, count: int) -> tuple[bool, bool]:
    """Return which samples take this branch: `few` of them, or else all, `moved` a little, or else as they are."""
    works_on_few = False
    for few, moved in ((True, True), (False, True)):
        with ExitStack() as stack:
            for each in (suppress(Exception), warnings.catch_warnings(), preserved_generators(x.device), unverified()):
                stack.enter_context(each)
            warnings.simplefilter("ignore")
            part, z = _samples(function, x, few, moved, torch.Generator().manual_seed(0))
            z = z.requires_grad_(x.requires_grad)
            z = z.clone() if x.grad_fn is not None else z
            stack.enter_context(preserved_state(function.module))
            run = _run(
                name,
                lambda _: lambda y: torch.ones_like(y)[None],
                lambda z: torch.ones_like(z).expand(min(count, 2), *z.shape),
            )
            if run(part, z).branch == branch:
                return few or not works_on_few, moved
            works_on_few = True
    return False, False


def _numbers(function: Function) -> Hashable:
    """Return the plain attributes of all layers, and the numbers in the context: what may select a branch."""
    own = [
        (name, key_of(value, 2, numbers=True))
        for layer in layers_of(function.module)
        for name, value in vars(layer).items()
        if name not in _OF_EVERY_MODULE and not isinstance(value, Tensor)
    ]
    arguments = function.context.arguments
    given = [] if arguments is None else tree_leaves(dict(arguments.values))
    return tuple(own), key_of(function.module, numbers=True), key_of(given, 2, numbers=True)


_BY_VALUES = "Estimate it with larger steps, by the probe AntitheticNoise and a BlackBoxTeacher."
_enabled: ContextVar[bool] = ContextVar("jacmatch_verification", default=True)
_raises: ContextVar[bool | None] = ContextVar("jacmatch_errors", default=None)


_memory: dict[int, tuple[weakref.ref[Any], OrderedDict[Hashable, Known]]] = {}
"""What is known by signature, and by the id of the object with whose lifetime it ends."""
_verifying = threading.RLock()


def _stored_for(function: Function, signature: Hashable) -> Known:
    """Return what is known for this signature; nothing at first."""
    networks = modules_of(function.module)
    owner = networks[0] if networks else getattr(function.module, "__code__", function.module)
    number, entries = id(owner), _memory
    entry = entries.get(number)
    if entry is None or entry[0]() is not owner:
        try:
            reference = weakref.ref(owner, lambda _: entries.pop(number, None))
        except TypeError:  # an object without weak references
            return Known()
        entry = entries[number] = (reference, OrderedDict())
    if signature not in entry[1] and len(entry[1]) >= _SIGNATURES:
        entry[1].popitem(last=False)
    return entry[1].setdefault(signature, Known())


@contextmanager
def unverified() -> Iterator[None]:
    """Context without verification: engines are used as they are, whatever they return.

    Use it for functions whose derivative is meant to differ from that of their values, for example a straight-through
    estimator, and to count operations.

    Example:
        >>> from jacmatch.jacobian import jvp
        >>> with unverified():
        ...     y, jv = jvp(lambda x: x.detach() * x, torch.ones(1, 2), torch.ones(1, 2))
        >>> jv
        tensor([[1., 1.]])
    """
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)


@contextmanager
def errors(raised: bool) -> Iterator[None]:
    """Context in which wrong products raise an error, or only a warning; the outermost context decides.

    A teacher queried by a user warns, so that its products can be inspected; one queried by a training run raises.
    """
    token = _raises.set(raised) if _raises.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _raises.reset(token)


def known_for(function: Function, x: Tensor, count: int) -> Known | None:
    """Return what is known for calls with `count` tangents, 0 for vᵀJ; None where nothing is checked."""
    if not _enabled.get() or not _can_be_verified(function, x):
        return None
    return _stored_for(function, _signature(function, x, min(count, 2)))


def engines_for_jvp(
    known: Known | None, function: Function, x: Tensor, requested: str, count: int
) -> tuple[tuple[str, ...], str]:
    """Return the engines to try for Jv in turn, and why their product cannot be differentiated ("" where it can).

    It is a single engine if one was requested or is known to be right.
    """
    wanted = tuple(JVP_ENGINES) if requested == "auto" else (requested,)
    verdicts = _verdicts(known, function, x, wanted, count)
    right = [name for name, verdict in verdicts.items() if verdict.state == "right"]
    if right:
        return (right[0],), ""
    if requested != "auto":
        verdict = verdicts[requested]
        if verdict.certain or verdict.state == "not finite":
            remedy = _remedy(known, function, x, requested, count)
            if verdict.certain or remedy:  # a NaN that no engine avoids belongs to the function
                raise _wrong(f"Jv by engine '{requested}'", verdict, remedy)
        return wanted, _untrainable(verdict)
    possible = [name for name in wanted if verdicts[name].state == "unknown"]
    possible += [name for name in wanted if name not in possible and not verdicts[name].certain]
    if not possible:
        first = next((each for each in verdicts.values() if each.state == "wrong"), verdicts["forward"])
        _raise_or_warn(_wrong("Jv, by each engine,", first, ""))
        return wanted, ""
    last = verdicts[wanted[-1]]
    inaccurate = any(each.code == "differences-inaccurate" for each in last.findings)
    if inaccurate and all(verdicts[name].state == "refused" or verdicts[name].certain for name in wanted[:-1]):
        _raise_or_warn(_wrong("Jv by differences", last, _BY_VALUES))
    return tuple(possible), _untrainable(verdicts[possible[0]])


def _untrainable(verdict: Verdict) -> str:
    return next((f"{each.what} {each.remedy}" for each in verdict.findings if each.code == "untrainable"), "")


def revoked(known: Known | None, function: Function, name: str, failure: UnsupportedError) -> bool:
    """Withdraw the verdict that an engine is right, since it refuses the function after all; False if there was none.

    The network has changed since, for example by a switch that turns on checkpointing, or the whole batch differs from
    the few samples that were checked.
    """
    verdicts = {} if known is None else known.now(function)
    if verdicts.get(name, UNKNOWN).state != "right":
        return False
    verdicts[name] = refused(name, failure, moves=True)
    return True


def check_vjp(known: Known | None, function: Function, x: Tensor) -> str:
    """Return why the product vᵀJ cannot be differentiated; "" where it can, or where that is not known."""
    verdict = _verdicts(known, function, x, ("vjp",), 1)["vjp"]
    # An engine that fails for directions that require gradients may still return a product, without a gradient.
    if verdict.certain or (verdict.label == "cannot" and torch.is_grad_enabled()):
        _raise_or_warn(_wrong("vᵀJ", verdict, _remedy(known, function, x, "vjp", 1)))
    return _untrainable(verdict)


def samples_couple(function: Function, x: Tensor) -> bool | None:
    """Return whether the values of one sample depend on others in the batch; None where that is not known."""

    def find() -> bool:
        few, z = (function, x.detach()) if len(x) <= 4 * _SAMPLES else sampled(function, x.detach())
        if len(z) == 1:
            z = torch.cat([z, z.flip(-1) * 1.1 + 0.1])
            arguments = few.context.arguments
            few = replace(few, context=Context(arguments=None if arguments is None else arguments.repeated(2)))
        try:
            return _couple(few, z)
        except Exception:  # the module works on the whole batch only, as on a square matrix
            return _couple(function, x.detach())

    return _stored(function, x, "couples", find)


def _couple(function: Function, x: Tensor) -> bool:
    with torch.no_grad():
        _, z, values_at, values = evaluated(function, x)
        return couples(values_at, z, values, 1e-9 if z.dtype == torch.float64 else 1e-4)


def repeats(function: Function, x: Tensor) -> bool:
    """Return whether a repeated batch gives its values again; a module with a tensor for each row does not."""

    def find() -> bool:
        with torch.no_grad():
            copied, arguments = own_copy(function), function.context.arguments
            values = replayed_values(copied, x)(x)
            if arguments is not None:
                copied = replace(copied, context=Context(arguments=arguments.repeated(2)))
            try:
                both = torch.cat([x, x])
                twice, again = replayed_values(copied, both)(both), values.repeat(2, *[1] * (values.dim() - 1))
            except Exception:  # a function may raise anything for a batch that is too large
                return False
            return twice.shape == again.shape and torch.allclose(twice, again, rtol=1e-3, atol=1e-5)

    return _stored(function, x, ("repeats", len(x)), find) is not False


def sampled(function: Function, x: Tensor) -> tuple[Function, Tensor]:
    """Return the function for the few samples that are checked, spread over the batch, and these samples."""
    number = _SAMPLES if is_small(*modules_of(function.module)) else _SAMPLES // 2
    if len(x) <= number:
        return function, x
    rows = torch.linspace(0, len(x) - 1, number, device=x.device).long()
    return replace(function, context=function.context.part(rows, len(x))), x[rows]


def _verdicts(
    known: Known | None, function: Function, x: Tensor, names: tuple[str, ...], count: int
) -> dict[str, Verdict]:
    """Return verdicts in this order, up to the first that is right."""
    if known is None:
        return dict.fromkeys(names, UNKNOWN)
    entries, samples = known.now(function), known.samples.get(known.branch, (True, True))
    verdicts: dict[str, Verdict] = {}
    comparison: Comparison | None = None
    for name in names:
        with _verifying:  # another thread waits for the verdict
            if name not in entries:
                verdict = UNKNOWN
                # A function may raise anything on inputs that are not the user's.
                with isolated(x), suppress(Exception):
                    comparison = comparison or comparison_of(function, x, count=count, samples=samples)
                    verdict = comparison.verdict(name)
                entries[name] = verdict
        verdicts[name] = entries[name]
        if entries[name].state == "right":
            break
    return verdicts


def comparison_of(
    function: Function, x: Tensor, *, seed: int = 0, count: int = 1, samples: tuple[bool, bool] = (True, True)
) -> Comparison:
    """Return the comparison on a few samples, or on all if the module has a tensor for each sample of the batch."""
    if _is_distributed(function):
        raise UnsupportedError("A comparison of engines needs all processes of the job.")
    try:
        return Comparison(function, x, seed=seed, count=count, few=samples[0], moved=samples[1])
    except Exception:  # a function may raise anything for a batch of another size
        return Comparison(function, x, seed=seed, count=count, few=False, moved=samples[1])


def _stored(function: Function, x: Tensor, name: Any, find: Callable[[], bool]) -> bool | None:
    """Return the entry of this name, computed by `find` if there is none; None where that is not possible."""
    known_here = known_for(function, x, 0)
    if known_here is None:
        return None
    known = known_here.now(function)
    with _verifying:
        if name not in known:
            result = None
            if not _is_distributed(function):
                with isolated(x), suppress(Exception):  # a function may raise anything
                    result = find()
            known[name] = result
    value: bool | None = known[name]
    return value


@contextmanager
def isolated(x: Tensor) -> Iterator[None]:
    """Leave the user's random numbers untouched within the context, suppress warnings, and verify nothing."""
    with ExitStack() as stack:
        stack.enter_context(preserved_generators(x.device))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(unverified())
        stack.enter_context(torch.autocast(x.device.type, enabled=False))
        stack.enter_context(uncompiled())
        warnings.simplefilter("ignore")
        yield


def _can_be_verified(function: Function, x: Tensor) -> bool:
    """Return whether the function may be called again, here and now, without side effects."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch._C._is_tracing():
        return False
    if type(x) not in (Tensor, nn.Parameter) or x.device.type == "meta" or x.dim() == 0 or not len(x):
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._autograd._top_saved_tensors_default_hooks(True):
        return False  # operations are counted, or saved tensors recorded
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _is_distributed(function: Function) -> bool:
    """Return whether a call of the function involves other processes."""
    layers = layers_of(function.module)
    if any(base.__name__ in _WRAPPERS for layer in layers for base in type(layer).__mro__):
        return True
    return any(hasattr(p, "full_tensor") for layer in layers for p in layer._parameters.values())


def _signature(function: Function, x: Tensor, count: int) -> Hashable:
    layers: list[Any] = []
    for layer in layers_of(function.module):
        layers += (id(layer), trains(layer), len(layer._forward_hooks) + len(layer._forward_pre_hooks))
        layers += [each.key for each in layer._forward_hooks.values() if isinstance(each, Selection)]
        layers += [p is not None and p.requires_grad for p in layer._parameters.values()] + _switches(layer)
    kind = x.device.type
    return (
        tuple(layers),
        key_of(function.module),
        key_of(function.readout),
        function.context.kind,
        function.batch_norm,
        (x.shape[1:], x.dtype, x.device, len(x) > 1, count),
        (torch.is_grad_enabled(), torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)),
    )


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _switches(layer: nn.Module) -> list[Hashable]:
    """Return the attributes that may select what a layer computes: flags, names, functions, but no counters."""
    switches: list[Hashable] = []
    for name, value in vars(layer).items():
        if name in _OF_EVERY_MODULE:
            continue
        if isinstance(value, (bool, str)) or (type(value) is int and value in (0, 1)):
            switches += (name, value)
        elif isinstance(value, (FunctionType, MethodType)):
            switches += (name, id(value.__code__))
    return switches


def _remedy(known: Known | None, function: Function, x: Tensor, failed: str, count: int) -> str:
    """Return a sentence that names an engine that is right; "" if there is none."""
    others = tuple(name for name in JVP_ENGINES if name != failed)
    right = [name for name, each in _verdicts(known, function, x, others, count).items() if each.state == "right"]
    if not right:
        return ""
    jv = "Jv is right by" if failed == "vjp" else "Use"
    return f"{jv} engine={right[0]!r}{', a probe of input directions' if failed == 'vjp' else ''}."


def _raise_or_warn(error: UnsupportedError) -> None:
    if _raises.get() is not False:
        raise error
    warnings.warn(str(error), stacklevel=3)


def _wrong(what: str, verdict: Verdict, remedy: str) -> UnsupportedError:
    reason = " ".join(each.what for each in verdict.findings[-1:])
    if verdict.state == "refused":
        what += " of this module cannot be differentiated again"
        remedy += " Under torch.no_grad() the product itself works."
    else:
        what += " of this module is wrong"
    parts = [f"{what}:", reason, remedy.strip(), "`jacmatch.doctor(module, x)` has details; within"]
    return UnsupportedError(" ".join([*filter(None, parts), "`jacmatch.unverified()` nothing is checked."]))
