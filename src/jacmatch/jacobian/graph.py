"""The autograd graph of a result: its nodes, its leaves, and backwards marked `once_differentiable`."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def graph_nodes(*results: Tensor, before: Tensor | None = None) -> Iterator[Any]:
    """Yield each node of the graph of these results once.

    Args:
        results: Tensors; those without a graph have no nodes.
        before: A tensor whose node is left out, and with it all nodes that are reached only through it.
    """
    seen, waiting = {None if before is None else before.grad_fn}, [each.grad_fn for each in results]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions]


def graph_leaves(*results: Tensor, before: Tensor | None = None) -> list[Tensor]:
    """Return the leaves that the results depend on and that require gradients: mostly parameters."""
    leaves = (getattr(node, "variable", None) for node in graph_nodes(*results, before=before))
    return [leaf for leaf in leaves if leaf is not None and leaf is not before]


def meets_once_differentiable(loss: Tensor) -> bool:
    """Return whether a backward marked `once_differentiable` is in the graph: autograd ignores it silently."""
    return any(node.name().endswith("autograd::Error") for node in graph_nodes(loss))
