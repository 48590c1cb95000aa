"""The three differentiation engines, called by `products` and by the checks.

*reverse* (`torch.autograd.grad`) is the most portable and the only one for vᵀJ. *forward* (`torch.func.jvp`) takes Jv
in one dual pass, without double backward. *differences* needs values only.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import finite_differences
from jacmatch.jacobian.callables import buffers_in_training, copies_of, write_buffers
from jacmatch.jacobian.features import selecting, selection_of
from jacmatch.jacobian.findings import first_line
from jacmatch.jacobian.function import Cotangents, Function, Products, check_direction, replayed, replaying
from jacmatch.jacobian.modules import is_trainable, twice_differentiable
from jacmatch.jacobian.readouts import parts_of
from jacmatch.jacobian.rules import op_replacements
from jacmatch.jacobian.rules.base import applied, toward_input

_levels = threading.RLock()


def graph_nodes(*results: Tensor, before: Tensor | None = None) -> dict[Any, list[Any]]:
    """Return each node of the autograd graph of these results, with the nodes before it.

    The node of `before` is left out, and with it all nodes that are reached only through it.
    """
    nodes: dict[Any, list[Any]] = {}
    end, waiting = None if before is None else before.grad_fn, [each.grad_fn for each in results]
    while waiting:
        node = waiting.pop()
        if node is not None and node is not end and node not in nodes:
            nodes[node] = [each for each, _ in node.next_functions]
            waiting += nodes[node]
    return nodes


def graph_leaves(*results: Tensor, before: Tensor | None = None) -> list[Tensor]:
    """Return the leaves that the results depend on and that require gradients: mostly parameters."""
    leaves = (getattr(node, "variable", None) for node in graph_nodes(*results, before=before))
    return [leaf for leaf in leaves if leaf is not None and leaf is not before]


def branch_of(*results: Tensor, x: Tensor) -> int | None:
    """Return a number for the operations that computed the results: it differs if other data took another branch.

    It covers each operation with the two before it, and not how often these occur, so that the length of a loop does
    not count. None without a graph, and where a graph cannot be read.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    before = graph_nodes(*results, before=x)
    kinds: dict[Any, Any] = {node: node.name() for node in before}
    for _ in range(2):  # a node by its name, then with the nodes before it, then with those before them
        kinds[None] = None
        near = {node: [kinds.get(each, "x") for each in nodes] for node, nodes in before.items()}
        kinds = {node: hash((kinds[node], (tuple, frozenset)[len(each) > 3](each))) for node, each in near.items()}
    return hash(frozenset(kinds.values())) if before else None


def meets_once_differentiable(loss: Tensor) -> bool:
    """Return whether a backward marked `once_differentiable` is in the graph: autograd ignores it silently."""
    return any(node.name().endswith("autograd::Error") for node in graph_nodes(loss))


class _Refused(torch.autograd.Function):
    """The identity, whose backward pass raises an error."""

    @staticmethod
    def forward(products: Tensor, reason: str) -> Tensor:
        return products.view_as(products)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.reason = inputs[1]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError(f"A derivative of this network cannot be differentiated. {ctx.reason}")


def undifferentiable(result: Products, reason: str) -> Products:
    """Return the products so that differentiating them raises an error with this reason; unchanged if it is empty."""
    if not reason or not result.products.requires_grad:
        return result
    return replace(result, products=applied(_Refused, result.products, reason))


def reverse_vjp(function: Function, x: Tensor, cotangents: Cotangents) -> Products:
    """Return vᵀJ for each cotangent: one forward pass, one backward pass per v."""
    if torch._C._are_functorch_transforms_active():  # within torch.func.grad and the like no tensor can become a leaf
        with twice_differentiable(function.module, function.batch_norm):
            return traced_vjp(function, x, cotangents)[0]
    leaf = x if x.requires_grad else x.detach().requires_grad_()
    result, differentiable = _vjp(function, leaf, cotangents, torch.is_grad_enabled(), by_leaf=leaf is x)
    return result if differentiable else _detached(result)


def _vjp(
    function: Function,
    leaf: Tensor,
    cotangents: Cotangents,
    differentiable: bool,
    buffers: dict[str, Tensor] | None = None,
    *,
    by_leaf: bool = False,
) -> tuple[Products, bool]:
    """Return the result of `reverse_vjp` with respect to `leaf`, and whether the rows have a graph.

    They have one if `differentiable` is set and anything requires a gradient: the leaf, or other leaves of the values'
    graph, registered parameters or not. `buffers` replace those of the module.
    """
    with torch.enable_grad(), twice_differentiable(function.module, function.batch_norm, once=not differentiable):
        values, outputs, features = function(leaf.clone(), buffers)  # a clone: the first operation may be in-place
        differentiable = differentiable and (by_leaf or _is_trained(function, values, leaf))
        v = cotangents(values.detach()) if callable(cotangents) else cotangents
        check_direction("cotangents", v, values.shape)
        products = _rows(parts_of(function.readout, values, features), leaf, v, differentiable)
    return Products(outputs, values, products, features, branch=branch_of(values, outputs, x=leaf)), differentiable


def own_rows(function: Function, x: Tensor, check: Callable[[Tensor], None]) -> Products:
    """∂yₙₖ/∂xₙ for each output k (K, B, *input): one forward pass, and a backward pass for each sample and output."""
    leaf = x if x.requires_grad else x.detach().requires_grad_()
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad(), twice_differentiable(function.module, function.batch_norm, once=not differentiable):
        values, outputs, features = function(leaf.clone())
        check(values)
        differentiable = differentiable and (leaf is x or _is_trained(function, values, leaf))
        rows = [
            _gradient([(y, torch.ones_like(y))], leaf, create_graph=differentiable, retain_graph=True)[sample]
            for each in values.unbind(1)
            for sample, y in enumerate(each.unbind(0))
        ]
    products, branch = torch.stack(rows).view(values.shape[1], *x.shape), branch_of(values, outputs, x=leaf)
    result = Products(outputs, values, products, features, branch=branch)
    return result if differentiable else _detached(result)


def rebuilt_vjp(function: Function, x: Tensor, cotangents: Cotangents, chunk_size: int) -> Products:
    """`reverse_vjp` whose graphs are recomputed in the backward pass, for `chunk_size` rows at a time.

    Each chunk has its own forward pass, which is freed together with its rows, so that k rows need the memory of one
    chunk. A shared forward pass would also have to store the gradients of its activations for all chunks.
    """
    if not torch.is_grad_enabled() or not (x.requires_grad or is_trainable(function.module)):
        return reverse_vjp(function, x, cotangents)
    leaf = x if x.requires_grad else x.detach().requires_grad_()
    # first, since the pass at x advances the generator and writes the buffers
    again, start = replaying(x), copies_of(buffers_in_training(function.module))
    made: list[Tensor] = []
    selection = selection_of(function.module)

    def chosen(values: Tensor) -> Tensor:
        made.append(cotangents(values) if callable(cotangents) else cotangents)
        check_direction("cotangents", made[0], values.shape)
        return made[0][:chunk_size]

    def passed(number: int, differentiable: bool) -> Products:
        v = made[0][number * chunk_size : (number + 1) * chunk_size]
        with selecting(function.module, selection):
            return again(lambda: _vjp(function, leaf, v, differentiable, copies_of(start), by_leaf=True)[0])

    first = _rebuilt(_vjp(function, leaf, chosen, False)[0], partial(passed, 0, True), leaf, x.requires_grad)
    rows = [first.products]
    for number in range(1, -(-len(made[0]) // chunk_size)):
        rows.append(_rebuilt(passed(number, False), partial(passed, number, True), leaf, x.requires_grad).products)
    return replace(first, products=torch.cat(rows))


def _rebuilt(result: Products, again: Callable[[], Products], leaf: Tensor, by_x: bool) -> Products:
    """Return the result with a graph that `again` builds on demand: to the parameters, and to the leaf if it is x."""
    # Of all results: for a readout of an inner layer, the outputs depend on parameters that its values do not.
    roots = [leaf] * by_x + graph_leaves(*result.tensors(), before=leaf)
    tensors: tuple[Tensor, ...] = _Rebuilt.apply(again, tuple(each.detach() for each in result.tensors()), *roots)  # type: ignore[no-untyped-call]
    return result.with_tensors(tensors)


class _Rebuilt(torch.autograd.Function):
    """Results of a pass whose graph is built only in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, again: Callable[[], Products], results: tuple[Tensor, ...], *roots: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.again, ctx.roots = again, roots
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs = [(y, g) for y, g in zip(ctx.again().tensors(), gradients, strict=True) if g is not None]
        pairs = [(y, g) for y, g in pairs if y.requires_grad]
        values, directions = [y for y, _ in pairs], [g for _, g in pairs]
        return None, None, *torch.autograd.grad(values, ctx.roots, directions, allow_unused=True)


def traced_vjp(function: Function, x: Tensor, cotangents: Cotangents) -> tuple[Products, dict[str, Tensor]]:
    """Return `reverse_vjp` in a form that `torch.compile` can trace, and the buffers after this pass."""

    def on_copies(z: Tensor) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]]:
        copies = copies_of(buffers_in_training(function.module))
        with op_replacements.compiled(frozen=function.batch_norm == "frozen"):
            values, outputs, features = function(z.clone(), copies)
        return values, (outputs, features, copies)

    values, vjp, (outputs, features, written) = torch.func.vjp(on_copies, x, has_aux=True)  # type: ignore[misc]
    v = cotangents(values.detach()) if callable(cotangents) else cotangents
    check_direction("cotangents", v, values.shape)
    rows = torch.stack([vjp(each.to(values.dtype))[0] for each in v.unbind(0)])
    return Products(outputs, values, rows, features), written


def _is_trained(function: Function, values: Tensor, leaf: Tensor) -> bool:
    """Return whether the values can have a gradient with respect to anything but the leaf."""
    if isinstance(function.module, nn.Module) and is_trainable(function.module):
        return True
    return bool(graph_leaves(values, before=leaf))  # a plain function, or trained tensors that are not registered


def _rows(values: tuple[Tensor, ...], leaf: Tensor, v: Tensor, differentiable: bool) -> Tensor:
    """Return the result of a backward pass for each v, from those parts of the values where v is not zero."""
    rows = []
    widths = [part.shape[1] for part in values] if len(values) > 1 else []
    for number, one in enumerate(v, 1):
        keep = differentiable or number < len(v)
        each = list(zip(values, one.split(widths, 1) if widths else (one,), strict=True))
        nonzero = [(part, some) for part, some in each if bool(some.any())] if widths else each
        rows.append(_gradient(nonzero or each, leaf, create_graph=differentiable, retain_graph=keep))
    return torch.stack(rows)


def _gradient(pairs: list[tuple[Tensor, Tensor]], leaf: Tensor, *, create_graph: bool, retain_graph: bool) -> Tensor:
    """Return Σ vᵀJ over pairs of values and directions v."""
    values = [part for part, _ in pairs]
    if not any(part.requires_grad for part in values):
        raise _cut_off()
    directions = [v.to(part.dtype) for part, v in pairs]
    try:
        with toward_input():
            (row,) = torch.autograd.grad(
                values, leaf, directions, create_graph=create_graph, retain_graph=retain_graph, allow_unused=True
            )
    except (RuntimeError, NotImplementedError) as error:
        raise _cannot("reverse", error, "'differences', or 'forward' with directions on the input side") from error
    if row is None:
        raise _cut_off()
    return row


def _cut_off() -> UnsupportedError:
    return UnsupportedError(
        "The values do not depend on `x` through differentiable operations (something detaches them: .detach(), "
        ".data, numpy, argmax, no_grad). Remove it, or use engine='differences'."
    )


def forward_jvp(function: Function, x: Tensor, tangents: Tensor) -> Products:
    """Return Jv for each direction in one dual pass; the values are computed once, only the tangents are batched."""

    def on_copies(z: Tensor) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]]:
        # torch.func requires written buffers to be created inside the function. A multiplication, not a clone:
        # forward mode refuses an in-place first operation on its own input.
        copies = copies_of(buffers_in_training(function.module))
        values, outputs, features = function(z * 1, copies)
        return values, (outputs, features, copies)

    def one(v: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]]:
        return torch.func.jvp(on_copies, (x,), (v.to(x.dtype),), has_aux=True, strict=True)  # type: ignore[return-value]

    # forward-mode levels are global to the process: ending one would also end that of another thread
    with _levels, twice_differentiable(function.module, function.batch_norm, statistics=True, forward=True):
        try:
            if len(tangents) == 1:
                values, single, (outputs, features, written) = one(tangents[0])
                products = single[None]
            else:
                batched = torch.func.vmap(one, out_dims=(None, 0, None), randomness="same")  # type: ignore[arg-type]
                values, products, (outputs, features, written) = batched(tangents)
            calls = op_replacements.calls_until_now()
        except InputError:
            raise
        except (RuntimeError, ValueError, KeyError) as error:  # KeyError: torch.cond has no rule
            raise _cannot("forward", error, "'reverse' or 'differences'") from error
    write_buffers(function.module, written)
    branch = branch_of(values, outputs, x=x) if torch.is_grad_enabled() else calls
    result = Products(outputs, values, products, features, "forward", branch)
    # custom rules run with gradients enabled, whatever the mode outside torch.func.jvp
    return result if torch.is_grad_enabled() else _detached(result)


def reverse_jvp(function: Function, x: Tensor, tangents: Tensor) -> Products:
    """Jv = ∂/∂u (uᵀJ) v: the vjp is linear in u, so the vjp of the vjp is the jvp. Two backward passes."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad(), twice_differentiable(function.module, function.batch_norm, statistics=True):
        leaf = x if x.requires_grad else x.detach().requires_grad_()
        values, outputs, features = function(leaf.clone())
        differentiable = differentiable and (leaf is x or _is_trained(function, values, leaf))
        u = torch.zeros_like(values, requires_grad=True)
        row = _gradient([(values, u)], leaf, create_graph=True, retain_graph=True)
        products = _rows((row,), u, tangents, differentiable)
    result = Products(outputs, values, products, features, "reverse", branch_of(values, outputs, x=leaf))
    return result if differentiable else _detached(result)


def difference_jvp(function: Function, x: Tensor, tangents: Tensor, step: float | None = None) -> Products:
    """Return Jv from values; every pass has the same random numbers, and only the pass at x writes the buffers."""
    values_at = replayed(function, x)  # first, since the pass at x advances the generator
    with twice_differentiable(function.module, function.batch_norm, statistics=True) as frozen:
        values, outputs, features = function(x.clone())
        sizes = finite_differences.step_sizes(x, tangents) if step is None else step
        if isinstance(sizes, Tensor) and frozen is None:
            # samples may be coupled (BatchNorm), so all of them must move by the same step
            sizes = sizes.mean(1, keepdim=True).expand_as(sizes)
        products = finite_differences.central(
            values_at if frozen is None else frozen.replayed(values_at), x, tangents, step=sizes
        )
    return Products(outputs, values, products, features, "differences")


JVP_ENGINES: dict[str, Callable[[Function, Tensor, Tensor], Products]] = {
    "forward": forward_jvp,
    "reverse": reverse_jvp,
    "differences": difference_jvp,
}
"""The engines for Jv in the order in which `auto` tries them."""


def parameter_gradients(loss: Tensor, parameters: Sequence[Tensor], retain_graph: bool = True) -> list[Tensor | None]:
    """Return ∂loss/∂θ for each parameter, dense, None where the loss does not depend on it; the graph is retained."""
    if not (parameters and loss.requires_grad):
        return [None] * len(parameters)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=retain_graph, allow_unused=True)
    # the gradient of `nn.Embedding(sparse=True)` is sparse, and most operations refuse it
    return [each if each is None or each.layout == torch.strided else each.to_dense() for each in gradients]


class _Connected(torch.autograd.Function):
    """The identity of a loss, with an edge without gradient to each parameter."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return (*gradients, *[None] * ctx.count)


def connected(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return the loss, whose backward pass reaches each of these parameters, even those without a gradient."""
    connected: Tensor = _Connected.apply(loss, *parameters)  # type: ignore[no-untyped-call]
    return connected


def gradient_norms(
    terms: dict[str, Tensor],
    parameters: list[nn.Parameter],
    whole: Callable[[str, list[Tensor | None]], list[Tensor | None]] | None = None,
) -> dict[str, Tensor]:
    """‖∂term/∂θ‖₂ of each scalar term over all parameters θ, in float64, so that squares do not underflow.

    A term that depends on no parameter is left out. The graph is retained for the following backward pass. If a term
    covers a part of the batch, `whole` converts its gradients to those of the whole batch.
    """
    norms = {}
    for name, term in terms.items():
        gradients = parameter_gradients(term, parameters)
        if whole is not None:
            gradients = whole(name, gradients)
        parts = [torch.linalg.vector_norm(each, dtype=torch.float64) for each in gradients if each is not None]
        if parts:
            norms[name] = torch.linalg.vector_norm(torch.stack(parts))
    return norms


def _cannot(engine: str, error: Exception, others: str) -> UnsupportedError:
    return UnsupportedError(
        f"Engine '{engine}' cannot differentiate this module: {first_line(error)} Use engine={others}; "
        "`jacmatch.doctor(module, x)` shows which are correct."
    )


def _detached(result: Products) -> Products:
    return result.with_tensors([each.detach() for each in result.tensors()])
