"""The configurations of the sweep: the modules and operators of PyTorch's own test databases, made networks.

Rules, so that the same configurations come out again:

- *Modules*: each entry of `module_db`, in evaluation mode and, where the database says that they differ, in training
  mode; of its inputs in float64 at most `MODULE_INPUTS`, evenly spaced.
- *Operators*: each entry of `op_db` that has float64 on the CPU, but for `UNDEFINED`; of its inputs with at most
  `SMALL` elements (or the smallest) at most `OPERATOR_INPUTS`, evenly spaced. `x` is the first tensor, and finite; all
  other tensors that the database differentiates are parameters, unless they hold -1, 0 and 1 only, as labels do.
  Further entries, with one input each: the in-place variant (`in-place`), all tensors computed from `x` (`all`), and
  the operator inside the wrapper that the database uses for checks of gradients, if it has one (`symmetric`).
- *Seeds*: of torch, Python and NumPy for each entry; and PYTHONHASHSEED=0, since the databases iterate over sets.
- *Parameters*: x goes through an elementwise scale and shift first, both trained, so that each network has parameters.
- *Batch*: where the first dimension of the outputs is that of x, x is the batch (`batch`); otherwise, and where that
  couples the samples of a module in evaluation mode, there are two samples, and their outputs are computed one by one
  (`loop`).
- *Outputs* are flattened to (B, K); of several, those of a real floating-point type are concatenated. Inputs
  with more than `LARGE` outputs are left out.
"""

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

MODULE_INPUTS = 8
OPERATOR_INPUTS = 2
SMALL = 128
LARGE = 2500
DTYPE = torch.float64
UNDEFINED = ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")
"""Operators whose results are memory as it is."""
FACTORS = (1.01, 0.99, 1.0)
"""What the second sample of a loop is a multiple by: the first with finite outputs."""


@dataclass(frozen=True)
class Configuration:
    """A network, and its input."""

    name: str
    network: nn.Module
    x: Tensor


class Network(nn.Module):
    """x ↦ outputs (B, K) of a call, behind a scale and a shift that are trained."""

    def __init__(self, call: Callable[[Tensor], Any], module: nn.Module, shape: torch.Size, *, loop: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape, dtype=DTYPE))
        self.shift = nn.Parameter(torch.zeros(shape, dtype=DTYPE))
        self.module, self._call, self._loop = module, call, loop

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (B, K)."""
        moved = x * self.scale + self.shift
        if not self._loop:
            return _flat(self._call(moved), len(x))
        return torch.stack([_flat(self._call(each.clone()), 1)[0] for each in moved.unbind(0)])


class Operator(nn.Module):
    """Holds the tensors of an operator's call that are not computed from x."""

    def __init__(self, function: Callable[..., Any], leaves: list[Any], spec: Any, positions: list[int]) -> None:
        super().__init__()
        self._function, self._spec, self._positions = function, spec, positions
        self._leaves = list(leaves)
        self._shapes = [leaves[position].shape for position in positions]
        for number, leaf in enumerate(leaves):
            if number not in positions and isinstance(leaf, Tensor) and leaf.requires_grad and not _is_label(leaf):
                setattr(self, f"tensor{number}", nn.Parameter(leaf.detach().clone()))
                self._leaves[number] = None

    def forward(self, x: Tensor) -> Any:
        """The operator's results."""
        leaves = [getattr(self, f"tensor{number}", leaf) for number, leaf in enumerate(self._leaves)]
        if len(self._positions) == 1:
            leaves[self._positions[0]] = x
        else:
            parts = x.split([shape.numel() for shape in self._shapes])
            for position, shape, part in zip(self._positions, self._shapes, parts, strict=True):
                leaves[position] = part.reshape(shape)
        (first, *args), kwargs = tree_unflatten(leaves, self._spec)
        return self._function(first, *args, **kwargs)


def _is_label(leaf: Tensor) -> bool:
    return _is_input(leaf) and bool(torch.isin(leaf.detach(), torch.tensor([-1.0, 0.0, 1.0], dtype=DTYPE)).all())


def _flat(result: Any, batch: int) -> Tensor:
    parts = [each for each in tree_flatten(result)[0] if isinstance(each, Tensor) and each.is_floating_point()]
    if not parts:
        raise NoOutputsError
    parts = [part.to_dense() if part.layout != torch.strided else part for part in parts]
    return torch.cat([part.reshape(batch, -1) for part in parts], 1)


class NoOutputsError(Exception):
    """The results have no real floating-point type: nothing to differentiate."""


def families() -> dict[str, Callable[[], Iterator[Configuration]]]:
    """For each entry of the databases by name what makes its configurations; reading them takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
        from torch.testing._internal.common_modules import module_db

    made: dict[str, Callable[[], Iterator[Configuration]]] = {}
    for info in module_db:
        made[info.name] = partial(_of_module, info)
    for info in op_db:
        if DTYPE in info.supported_dtypes("cpu") and info.name not in UNDEFINED:
            variant = f" ({info.variant_test_name})" if info.variant_test_name else ""
            made[f"torch.{info.name}{variant}"] = partial(_of_operator, f"torch.{info.name}{variant}", info)
    return made


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # the databases draw from it
    torch.manual_seed(0)


def _of_module(info: Any) -> Iterator[Configuration]:
    for training in (False, True) if info.train_and_eval_differ else (False,):
        _seed()
        inputs = info.module_inputs_func(info, device="cpu", dtype=DTYPE, requires_grad=False, training=training)
        for number in _spaced(len(inputs), MODULE_INPUTS):
            torch.manual_seed(0)
            chosen = inputs[number]
            given, forward = chosen.constructor_input, chosen.forward_input
            if forward is None or not forward.args or not _is_input(forward.args[0]):
                continue
            module = info.module_cls(*given.args, **given.kwargs).to(DTYPE).train(training)
            x, *args = forward.args
            with torch.no_grad(), contextlib.suppress(Exception):
                module(x.clone(), *args, **forward.kwargs)  # lazy modules get their shapes
            call = _Call(module, args, forward.kwargs)
            mode = "train" if training else "eval"
            yield from _networks(f"{info.name} {mode} {number}", call, module, x.detach())


class _Call:
    """A module with the rest of its arguments."""

    def __init__(self, module: nn.Module, args: list[Any], kwargs: dict[str, Any]) -> None:
        self.module, self.args, self.kwargs = module, args, kwargs

    def __call__(self, x: Tensor) -> Any:
        return self.module(x, *self.args, **self.kwargs)


def _of_operator(name: str, info: Any) -> Iterator[Configuration]:
    _seed()
    samples = [_Sample.of(each) for each in info.sample_inputs("cpu", DTYPE, requires_grad=info.supports_autograd)]
    samples = [each for each in samples if each is not None and bool(each.leaves[each.positions[0]].isfinite().all())]
    small = [each for each in samples if each.size <= SMALL] or sorted(samples, key=lambda each: each.size)[:1]
    function = info.get_op()
    for number in _spaced(len(small), OPERATOR_INPUTS):
        yield from small[number].networks(f"{name} {number}", function, small[number].positions[:1])
    if not small:
        return
    first = min(small, key=lambda each: (-len(each.positions), each.size_of_all))
    if info.get_inplace() is not None:
        yield from first.networks(f"{name} in-place", info.get_inplace(), first.positions[:1])
    if len(first.positions) > 1:
        yield from first.networks(f"{name} all", function, first.positions)
    if getattr(info.gradcheck_wrapper, "__name__", "") != "<lambda>":
        symmetric = partial(info.gradcheck_wrapper, function)
        yield from small[0].networks(f"{name} symmetric", symmetric, small[0].positions[:1])


@dataclass
class _Sample:
    """One call of an operator, taken apart."""

    leaves: list[Any]
    spec: Any
    positions: list[int]
    """Where tensors stand that can be computed from x."""

    @staticmethod
    def of(sample: Any) -> "_Sample | None":
        leaves, spec = tree_flatten(((sample.input, *sample.args), sample.kwargs))
        leaves = [_leaf(each) for each in leaves]
        floating = [number for number, each in enumerate(leaves) if _is_input(each)]
        positions = [number for number in floating if leaves[number].requires_grad] or floating[:1]
        return _Sample(leaves, spec, positions) if positions else None

    @property
    def size(self) -> int:
        return self.leaves[self.positions[0]].numel()

    @property
    def size_of_all(self) -> int:
        """Elements of all tensors that can be computed from x."""
        return sum(self.leaves[position].numel() for position in self.positions)

    def networks(self, name: str, function: Callable[..., Any], positions: list[int]) -> Iterator[Configuration]:
        torch.manual_seed(0)
        operator = Operator(function, self.leaves, self.spec, positions).eval()
        tensors = [self.leaves[position].detach() for position in positions]
        x = tensors[0] if len(tensors) == 1 else torch.cat([each.flatten() for each in tensors])
        yield from _networks(name, operator, operator, x, loop_only=len(tensors) > 1)


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _is_input(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == DTYPE and value.numel() > 0 and value.layout == torch.strided


def _spaced(count: int, most: int) -> list[int]:
    if count <= most:
        return list(range(count))
    return sorted({round(number * (count - 1) / (most - 1)) for number in range(most)})


def _networks(
    name: str, call: Callable[[Tensor], Any], module: nn.Module, x: Tensor, *, loop_only: bool = False
) -> Iterator[Configuration]:
    """The call as a network on the batch x if it is one, and, where samples are coupled or x is no batch, in a loop."""
    if not _number_of_outputs(call, x) <= LARGE:
        return
    if not loop_only and x.dim() > 0 and len(x) > 1 and _keeps_batch(call, x):
        network = Network(call, module, x.shape[1:], loop=False).train(module.training)
        yield Configuration(f"{name} batch", network, x)
        if module.training or not couples(network, x):
            return
    network = Network(call, module, x.shape, loop=True).train(module.training)
    pairs = [torch.stack([x, factor * x]) for factor in FACTORS]
    finite = [pair for pair in pairs if _is_finite(network, pair)]
    yield Configuration(f"{name} loop", network, (finite or pairs)[0])


def _number_of_outputs(call: Callable[[Tensor], Any], x: Tensor) -> int:
    with torch.no_grad(), contextlib.suppress(Exception):
        return sum(each.numel() for each in tree_flatten(call(x.clone()))[0] if isinstance(each, Tensor))
    return 0


def _keeps_batch(call: Callable[[Tensor], Any], x: Tensor) -> bool:
    with torch.no_grad(), contextlib.suppress(Exception):
        results = tree_flatten(call(x.clone()))[0]
        parts = [each for each in results if isinstance(each, Tensor) and each.is_floating_point()]
        return bool(parts) and all(part.dim() > 0 and len(part) == len(x) for part in parts)
    return False


def _is_finite(network: nn.Module, x: Tensor) -> bool:
    with torch.no_grad(), contextlib.suppress(Exception):
        torch.manual_seed(0)
        return bool(torch.isfinite(network(x)).all())
    return False


def couples(network: nn.Module, x: Tensor) -> bool:
    """Whether the outputs of other samples follow a move of the first, or those of the first a move of the others."""
    moved = x * (1 + 0.01 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2)))

    def at(z: Tensor) -> Tensor:
        torch.manual_seed(0)
        return network(z.clone())

    with torch.no_grad(), contextlib.suppress(Exception):
        first, others = torch.cat([moved[:1], x[1:]]), torch.cat([x[:1], moved[1:]])
        now = torch.cat([at(others)[:1], at(first)[1:]])
        return not torch.allclose(now, at(x), rtol=1e-9, atol=1e-12, equal_nan=True)
    return False
