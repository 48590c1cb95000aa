"""A function of tensors compiled as one graph, for any batch size; a graph break is an error.

A whole objective is compiled, including the derivative: with `torch.compile` on the network alone, the second
derivative raises an error, or silently runs eagerly.
"""

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx

from jacmatch.errors import UnsupportedError

Run = Callable[..., Any]


class OneGraph:
    """A function whose call runs one compiled graph; anything that would break the graph is an error.

    Args:
        function: Takes and returns tensors, networks and constants.
        backend: `inductor`, or another backend of `torch.compile`.
        cuda_graphs: Whether the kernels of a GPU are launched as a CUDA graph.

    Attributes:
        graphs: Number of compiled graphs: one for each kind of arguments, whatever the batch size.
        runs: Number of calls that ran a compiled graph.
    """

    def __init__(self, function: Run, backend: str = "inductor", cuda_graphs: bool = False) -> None:
        self.backend, self.cuda_graphs = backend, cuda_graphs
        self.graphs, self.runs = 0, 0
        self._compiled = torch.compile(function, backend=self._compile, fullgraph=True)

    def __call__(self, *arguments: Any) -> Any:
        """Call the compiled function, and return its result."""
        before = self.runs
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        result = self._compiled(*arguments)
        if self.runs == before:
            raise UnsupportedError("torch.compile ran the function eagerly (is TORCHDYNAMO_DISABLE set?).")
        return result

    def _compile(self, graph: fx.GraphModule, inputs: list[Tensor]) -> Run:
        parts = [part for part in graph.modules() if isinstance(part, fx.GraphModule)]
        if any("autograd_function_apply" in str(node.target) for part in parts for node in part.graph.nodes):
            # the compiled graph would silently lack its second derivative
            raise UnsupportedError("an autograd.Function in the network loses its second derivative when compiled.")
        self.graphs += 1
        own: Run = self._inductor if self.backend == "inductor" else torch._dynamo.lookup_backend(self.backend)
        run = own(graph, inputs)

        def counted(*arguments: Any) -> Any:
            self.runs += 1
            return run(*arguments)

        return counted

    def _inductor(self, graph: fx.GraphModule, inputs: list[Tensor]) -> Run:
        from torch._inductor.compile_fx import compile_fx
        from torch._inductor.decomposition import select_decomp_table

        # Decomposed into a scatter, the backward of max pooling is silently read before it is complete, if two rows
        # use it (torch 2.13 on CPU). Inductor's own kernel is right.
        table = dict(select_decomp_table())
        table.pop(torch.ops.aten.max_pool2d_with_indices_backward.default, None)
        options = {"joint_custom_pre_pass": _pass_for_any_batch(), "triton.cudagraphs": self.cuda_graphs}
        return cast(Run, compile_fx(graph, inputs, decompositions=table, config_patches=options))


def any_batch(*pairs: tuple[Tensor | None, int]) -> None:
    """Mark the batch dimension of each tensor as dynamic, so that another batch size needs no new graph."""
    for tensor, dimension in pairs:
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def reason_of(error: Exception) -> str:
    """Return the first lines of a compiler's error."""
    inner = getattr(error, "inner_exception", None) or error
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return f"{type(inner).__name__}: {' '.join(lines[:3])}"[:300]


def _pass_for_any_batch() -> Any:
    """Return an Inductor pass that runs before the graph is partitioned into forward and backward."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class AnyBatch(CustomGraphPass):
        """Rewrite the second derivative w.r.t. the weight as the gradient of a convolution w.r.t. its weight.

        Autograd expresses it as a convolution whose kernel is a batch of gradients; Inductor fixes kernel sizes.
        """

        def __call__(self, graph: fx.Graph) -> None:
            for node in graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default):
                _, gradients, bias, _, _, _, transposed, _, groups = node.args
                dynamic = any(isinstance(size, torch.SymInt) for size in gradients.meta["val"].shape)
                fixed = not any(isinstance(size, torch.SymInt) for size in node.meta["val"].shape)
                if dynamic and fixed and bias is None and not transposed and groups == 1:
                    node.replace_all_uses_with(_weight_gradient(graph, node))
                    graph.erase_node(node)

        def uuid(self) -> str:
            return "jacmatch any batch 1"

    return AnyBatch()


def _weight_gradient(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Return nodes for conv(imagesᵀ, gradientsᵀ), stride and dilation swapped, as the backward of a convolution."""
    images, gradients, _, stride, padding, dilation, _, output_padding, _ = node.args
    result = node.meta["val"]
    axes = [1, 0, *range(2, result.dim())]

    def add(target: Any, *arguments: Any, **options: Any) -> fx.Node:
        added = graph.call_function(target, arguments, options)
        values = fx.node.map_arg(arguments, lambda one: one.meta["val"])
        with result.fake_mode:
            added.meta["val"] = target(*values, **options)
        return added

    permute = torch.ops.aten.permute.default
    with graph.inserting_before(node):
        shape = [result.shape[1], result.shape[0], *result.shape[2:]]
        weight = add(torch.ops.aten.empty.memory_format, shape, dtype=result.dtype, device=result.device)
        pooled = add(
            torch.ops.aten.convolution_backward.default,
            *(add(permute, gradients, axes), add(permute, images, axes), weight, None),
            *(dilation, padding, stride, False, output_padding, 1, [False, True, False]),
        )
        return add(permute, add(operator.getitem, pooled, 1), axes)
