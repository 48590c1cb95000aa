"""How a network is called at the tensor that is differentiated: its other arguments, and inputs of several tensors.

Derivatives are taken with respect to one tensor x (B, …). `Arguments` converts it to the arguments of the network:
keyword arguments that are not differentiated (masks, atom types, time), several inputs that are concatenated in x, each
in its own unit, or the nodes of graphs, which are padded in x but not in the network.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from jacmatch.errors import InputError

_NODES = 8  # graphs are padded to a multiple of this, since each new shape of x is verified again


@dataclass(frozen=True)
class Shared:
    """A value in `context` that is shared by all samples, even if it has as many rows as the batch.

    Attributes:
        value: The value passed to the networks.

    Example:
        >>> Shared(torch.ones(3, 2)).value.shape
        torch.Size([3, 2])
    """

    value: Any


@dataclass(frozen=True)
class Edges:
    """The edges of graphs, as a value of a context: pairs of nodes, numbered over the whole batch.

    Attributes:
        index: (2, E); both ends of an edge must be in the same graph.
    """

    index: Int[Tensor, "2 edge"]


@dataclass(frozen=True)
class Inputs:
    """Several inputs that are differentiated, each in its own unit.

    The networks get the tensors unchanged. Derivatives are taken with respect to part/unit: random directions have
    variance 1 in these units, and one squared error covers all parts.

    Attributes:
        parts: Tensors (B, …) of the same floating-point type: a tuple for positional arguments, a dictionary for
            keyword arguments.
        units: The unit of each part by its name, or by its number in a tuple; 1 where it is not named.

    Raises:
        InputError: a part is not a tensor (B, …), types differ, a unit is not positive, or a unit has no part.

    Example:
        >>> Inputs({"x": torch.rand(4, 3), "t": torch.rand(4, 1)}, units={"t": 10.0}).packed[0].shape
        torch.Size([4, 4])
    """

    parts: Mapping[str, Tensor] | tuple[Tensor, ...]
    units: Mapping[str | int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = self.named
        for name, part in named.items():
            if not isinstance(part, Tensor) or not part.is_floating_point() or not part.dim():
                got = f"{part.dtype} {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
                do = "Pass labels as `y`, and inputs that are not differentiated as context={...}."
                raise InputError(f"Part {name!r} of the inputs must be a floating-point tensor (B, …).", got=got, do=do)
        kinds = {(part.dtype, part.device, len(part)) for part in named.values()}
        if len(kinds) != 1:
            got = ", ".join(f"{name} {part.dtype} {tuple(part.shape)}" for name, part in named.items()) or "none"
            rule = "All parts of the inputs must have the same dtype and the same number of samples."
            raise InputError(rule, got=got)
        for name, unit in self.units.items():
            if name not in named or not 0 < unit < float("inf"):
                rule = "`units` of `Inputs` must be positive and finite, keyed by part name or number."
                raise InputError(rule, got=f"{name!r}: {unit}", do=f"Parts are {', '.join(map(repr, named))}.")

    @property
    def named(self) -> dict[str | int, Tensor]:
        """The parts by their names or numbers."""
        return dict(self.parts.items() if isinstance(self.parts, Mapping) else enumerate(self.parts))

    @property
    def packed(self) -> tuple[Float[Tensor, "batch entry"], "_Several"]:
        """The parts in their units, flattened and concatenated, and the layout that splits them again."""
        named = {name: (part, float(self.units.get(name, 1.0))) for name, part in self.named.items()}
        layout = _Several(tuple((name, part.shape[1:], unit) for name, (part, unit) in named.items()))
        return torch.cat([(part / unit).reshape(len(part), -1) for part, unit in named.values()], 1), layout


@dataclass(frozen=True)
class Nodes:
    """Positions of the nodes of graphs, or of point clouds, that are differentiated; graphs may differ in size.

    The networks get the positions unchanged, and `index` as the keyword argument `name`. Tensors of a context with as
    many rows as there are nodes belong to the nodes.

    Attributes:
        positions: (ΣN, D), the nodes of one graph after those of another.
        index: The graph of each node, from 0 to B − 1 in this order.
        name: The keyword argument that takes the index; None if the networks take none.

    Raises:
        InputError: the index is not one number for each node, or not in order.

    Example:
        >>> Nodes(torch.rand(5, 3), torch.tensor([0, 0, 1, 1, 1])).packed[0].shape
        torch.Size([2, 8, 3])
    """

    positions: Float[Tensor, "node dimension"]
    index: Int[Tensor, "node"]
    name: str | None = "batch"

    def __post_init__(self) -> None:
        steps = self.index.diff(prepend=self.index.new_zeros(1)) if self.index.dim() == 1 else self.index
        if self.index.shape != self.positions.shape[:1] or not len(steps) or bool(((steps != 0) & (steps != 1)).any()):
            rule = "`index` of `Nodes` must be ascending graph numbers from 0, and each graph must have a node."
            got = f"shape {tuple(self.index.shape)} for positions {tuple(self.positions.shape)}"
            raise InputError(rule, got=got, do="Sort the nodes by graph, and number the graphs from 0.")

    @property
    def packed(self) -> tuple[Float[Tensor, "batch most dimension"], "_Ragged"]:
        """The positions, padded with zeros, and the layout that removes the padding again."""
        counts = torch.bincount(self.index)
        most = -(-int(counts.max()) // _NODES) * _NODES
        layout = _Ragged(torch.arange(most, device=self.index.device) < counts[:, None], self.name)
        return layout.padded(self.positions), layout


@dataclass(frozen=True)
class _Several:
    """Name, shape of a sample and unit of each part."""

    parts: tuple[tuple[str | int, torch.Size, float], ...]

    def split(self, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        flat = torch.split(x, [shape.numel() for _, shape, _ in self.parts], 1)
        tensors = [
            (part if unit == 1 else part * unit).reshape(len(x), *shape)
            for part, (_, shape, unit) in zip(flat, self.parts, strict=True)
        ]
        if isinstance(self.parts[0][0], int):
            return tuple(tensors), {}
        return (), {str(name): tensor for (name, _, _), tensor in zip(self.parts, tensors, strict=True)}


@dataclass(frozen=True)
class _Ragged:
    """Which entries of the padded x are nodes."""

    mask: Bool[Tensor, "batch most"]
    name: str | None

    def padded(self, nodes: Shaped[Tensor, "node *shape"]) -> Shaped[Tensor, "batch most *shape"]:
        whole = nodes.new_zeros(self.mask.numel(), *nodes.shape[1:])
        return whole.index_copy(0, self.numbers, nodes.detach()).reshape(*self.mask.shape, *nodes.shape[1:])

    @property
    def numbers(self) -> Int[Tensor, "node"]:
        """The index of each node in the padded x."""
        return self.mask.flatten().nonzero()[:, 0]

    def taken(self, padded: Tensor) -> Tensor:
        return padded.flatten(0, 1).index_select(0, self.numbers)

    def split(self, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        index = self.numbers // self.mask.shape[1]
        return (self.taken(x),), {} if self.name is None else {self.name: index}


@dataclass(frozen=True)
class Substituted:
    """Substitutions of tokens, whose coefficients are x (B, k); see `substitutions`."""

    tokens: Int[Tensor, "batch token"]  # token ids
    positions: Int[Tensor, "batch one"]  # positions of the tokens that are replaced
    new: Int[Tensor, "batch one"]  # the ids that replace them

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Substituted":
        """Return a copy with the function applied to each tensor."""
        return Substituted(function(self.tokens), function(self.positions), function(self.new))

    def call(self, module: Any, x: Float[Tensor, "batch one"], named: dict[str, Any]) -> Any:
        """Call the module with its embeddings moved by x along the directions, and return the result."""
        layer = embedding_of(module)
        met: list[Tensor] = []

        def move(layer: nn.Module, given: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
            if not (given and given[0].shape == self.tokens.shape and torch.equal(given[0], self.tokens)):
                return embedded
            met.append(given[0])
            old = self.tokens.gather(1, self.positions)
            forward = type(layer).forward
            directions = forward(layer, self.new) - forward(layer, old)
            index = self.positions[..., None].expand_as(directions)
            return embedded.scatter_add(1, index, (x[..., None] * directions).to(embedded.dtype))

        with layer.register_forward_hook(move):
            returned = module(self.tokens, **named)
        if not met:
            rule = "The embedding of a token network must be indexed by the token ids themselves."
            raise InputError(rule, got=type(module).__name__, do="TokenSubstitutions needs a table of single tokens.")
        return returned


def embedding_of(module: Any) -> nn.Embedding:
    """Return the token embedding of a network: `get_input_embeddings()`, or its only `nn.Embedding`."""
    parts: list[Any] = list(module.modules()) if isinstance(module, nn.Module) else []
    layers = [part for part in parts if isinstance(part, nn.Embedding)]
    for part in parts if len(layers) > 1 else ():
        embedding = part.get_input_embeddings() if hasattr(part, "get_input_embeddings") else None
        if isinstance(embedding, nn.Embedding):
            return embedding
    if len(layers) != 1:
        rule = "A network of TokenSubstitutions must have one nn.Embedding, or `get_input_embeddings()`."
        got = f"{len(layers)} of them in {type(module).__name__}"
        raise InputError(rule, got=got, do="Give the module a method get_input_embeddings that returns the right one.")
    return layers[0]


@dataclass(frozen=True)
class _OfNodes:
    """A tensor of the nodes, padded as x is."""

    padded: Tensor


@dataclass(frozen=True)
class _OfEdges:
    """Edges (B, E, 2) as indices of nodes within each graph; −1 means no edge."""

    padded: Tensor


def _mapped(tree: Any, samples: Callable[[Tensor], Tensor], shared: Callable[[Any], Any] = lambda value: value) -> Any:
    """Return the tree with one function applied to each tensor of the samples, and another to each shared value."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return samples(leaf)
        if isinstance(leaf, _OfNodes | _OfEdges):
            return type(leaf)(samples(leaf.padded))
        return Shared(shared(leaf.value)) if isinstance(leaf, Shared) else leaf

    return tree_map(one, tree)


@dataclass(frozen=True)
class Arguments:
    """Keyword arguments of a network, and the layout of its inputs in x.

    Attributes:
        values: Arguments by name. Tensors belong to the samples unless they are wrapped in `Shared`.
        layout: How several tensors, or graphs, are laid out in x; None if x itself is the input.
    """

    values: Mapping[str, Any]
    layout: _Several | _Ragged | Substituted | None = None

    def split(self, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and keyword arguments."""
        layout = self.layout
        args, named = layout.split(x) if isinstance(layout, _Several | _Ragged) else ((x,), {})

        def given(leaf: Any) -> Any:
            if isinstance(leaf, _OfNodes):
                assert isinstance(self.layout, _Ragged)
                return self.layout.taken(leaf.padded)
            if isinstance(leaf, _OfEdges):
                assert isinstance(self.layout, _Ragged)
                counts = self.layout.mask.sum(1)
                edges = leaf.padded + (counts.cumsum(0) - counts)[:, None, None]
                return edges[leaf.padded[..., 0] >= 0].T
            return leaf.value if isinstance(leaf, Shared) else leaf

        return args, {**tree_map(given, dict(self.values)), **named}

    def __call__(self, module: Callable[..., Any], x: Tensor) -> Any:
        """Call the module with these arguments, and return the result."""
        args, named = self.split(x)
        return self.layout.call(module, x, named) if isinstance(self.layout, Substituted) else module(*args, **named)

    def _with(
        self, samples: Callable[[Tensor], Tensor], shared: Callable[[Any], Any] = lambda value: value
    ) -> "Arguments":
        layout = self.layout
        if isinstance(layout, _Ragged):
            layout = replace(layout, mask=samples(layout.mask))
        elif isinstance(layout, Substituted):
            layout = layout.mapped(samples)
        return Arguments(_mapped(dict(self.values), samples, shared), layout)

    @property
    def is_ragged(self) -> bool:
        """Whether x contains the padded nodes of graphs."""
        return isinstance(self.layout, _Ragged)

    def part(self, rows: slice | Int[Tensor, "row"]) -> "Arguments":
        """Return the arguments of some of the samples."""
        return self._with(lambda each: each[rows])

    def repeated(self, copies: int) -> "Arguments":
        """Return the arguments of the batch, repeated `copies` times."""
        return self if copies == 1 else self._with(lambda each: torch.cat([each] * copies))

    def to(self, dtype: torch.dtype) -> "Arguments":
        """Return the arguments with floating-point tensors converted to this type."""

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return self._with(cast, lambda value: tree_map(cast, value))

    def clone(self) -> "Arguments":
        """Return copies of the tensors of the samples."""
        return self._with(lambda each: each.clone())

    @property
    def of_samples(self) -> list[Tensor]:
        """The tensors of the samples."""
        tensors: list[Tensor] = []
        self._with(lambda each: tensors.append(each) or each)  # type: ignore[func-returns-value]
        return tensors

    @property
    def kind(self) -> Hashable:
        """A key of everything that affects differentiation: shapes of a sample, types, and flags."""

        def one(leaf: Any) -> Hashable:
            if isinstance(leaf, Shared):
                return "shared", *(one(each) for each in tree_leaves(leaf.value))
            leaf = leaf.padded if isinstance(leaf, _OfNodes | _OfEdges) else leaf
            if isinstance(leaf, Tensor):
                return tuple(leaf.shape[1:]), leaf.dtype
            flag = isinstance(leaf, str | bool | None) or (type(leaf) is int and leaf in (0, 1))
            return leaf if flag else str(type(leaf))

        leaves, spec = tree_flatten(dict(self.values))
        parts = self.layout.parts if isinstance(self.layout, _Several) else type(self.layout)
        return str(spec), tuple(map(one, leaves)), parts

    def same(self, other: "Arguments | None") -> bool:
        """Return whether they are equal, bit for bit."""
        if other is None or (one := tree_flatten(dict(self.values)))[1] != (two := tree_flatten(dict(other.values)))[1]:
            return False
        masks = [list(vars(each.layout).values()) if each.layout else [] for each in (self, other)]
        return type(self.layout) is type(other.layout) and all(map(_equal, one[0] + masks[0], two[0] + masks[1]))

    @staticmethod
    def of(caller: str, x: Any, context: "Mapping[str, Any] | Arguments | None") -> tuple[Any, "Arguments | None"]:
        """Return the tensor that is differentiated, and the arguments; None if there is only the tensor.

        A tensor whose first dimension is the batch belongs to the samples; one with as many rows as `Nodes` has nodes
        belongs to the nodes. Everything else, and values in `Shared`, are passed unchanged.
        """
        if isinstance(context, Arguments):
            return x, context
        x = Inputs(x) if isinstance(x, Mapping) else x
        x, layout = x.packed if isinstance(x, Inputs | Nodes) else (x, None)
        if context is not None and not (isinstance(context, Mapping) and all(isinstance(k, str) for k in context)):
            rule = f"`context` of `{caller}` must be a dictionary of keyword arguments of the networks."
            raise InputError(rule, got=type(context).__name__, do="For example context={'attention_mask': mask}.")
        if not isinstance(x, Tensor) or not x.dim() or (not context and layout is None):
            return x, None

        def sorted_out(leaf: Any) -> Any:
            if isinstance(leaf, np.ndarray):
                rule = f"Arrays in `context` of `{caller}` must be tensors, so that they can be split into samples."
                raise InputError(rule, got="a NumPy array", do="Use torch.as_tensor.")
            if isinstance(leaf, Edges):
                return _edges(leaf.index, layout, caller)
            if not isinstance(leaf, Tensor):
                return leaf
            if isinstance(layout, _Ragged) and leaf.dim() and len(leaf) == int(layout.mask.sum()):
                return _OfNodes(layout.padded(leaf))
            return leaf if leaf.dim() and len(leaf) == len(x) else Shared(leaf)

        return x, Arguments(tree_map(sorted_out, dict(context or {})), layout)


def _edges(index: Tensor, layout: Any, caller: str) -> _OfEdges:
    """Return the edges grouped by graph."""
    if not isinstance(layout, _Ragged):
        rule = f"`Edges` in `context` of `{caller}` must be used with x=Nodes(positions, index)."
        raise InputError(rule, got="x without an index", do="Pass a plain tensor for other networks.")
    of, counts = layout.numbers // layout.mask.shape[1], layout.mask.sum(1)
    graph = of[index[0]]
    if not torch.equal(graph, of[index[1]]):
        raise InputError(f"Both ends of each of `Edges` in `context` of `{caller}` must be in the same graph.")
    local = (index - (counts.cumsum(0) - counts)[graph]).T
    number = torch.bincount(graph, minlength=len(counts))
    order = graph.argsort(stable=True)
    position = torch.arange(len(order), device=index.device) - (number.cumsum(0) - number)[graph[order]]
    padded = index.new_full((len(counts), max(1, int(number.max())), 2), -1)
    padded[graph[order], position] = local[order]
    return _OfEdges(padded)


def _equal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Shared):
        pairs = [tree_flatten(each.value) for each in (one, other)]
        return pairs[0][1] == pairs[1][1] and all(map(_equal, pairs[0][0], pairs[1][0]))
    if isinstance(one, _OfNodes | _OfEdges):
        return _equal(one.padded, other.padded)
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    return bool(one == other)
