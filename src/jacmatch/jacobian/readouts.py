"""Readouts: what is differentiated.

A network returns outputs `(B, K)`; a readout turns them, and features of layers by their dotted module path, into the
values `(B, R)` whose Jacobian is matched. Student and teacher may use different readouts as long as R agrees. The
features are returned from the differentiated function itself, so they are differentiable in every engine.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional

from jacmatch.errors import InputError, class_axis, one_row_of_classes, whole_number
from jacmatch.jacobian.arguments import Arguments
from jacmatch.jacobian.features import run


@dataclass(frozen=True)
class Context:
    """The data of a pass besides x: other arguments of the network, and data that a readout may need.

    Attributes:
        labels: Class of each sample, or a distribution over classes `(B, K)` where labels are mixed.
        teacher_outputs: The teacher's outputs; the class index of `TopLogit` comes from here, never from the student.
        pixels: Flat index of the teacher's largest attention pixel, per sample.
        arguments: How the network is called at x; None if x is its only argument.
    """

    labels: Shaped[Tensor, "batch *label"] | None = None
    teacher_outputs: Float[Tensor, "batch *out"] | None = None
    pixels: Int[Tensor, "batch"] | None = None
    arguments: Arguments | None = None

    def part(self, rows: Int[Tensor, "row"], batch: int) -> "Context":
        """Return the context of some of the samples."""
        return self._mapped(lambda each: each[rows] if len(each) == batch else each, lambda each: each.part(rows))

    def to(self, dtype: torch.dtype) -> "Context":
        """Return the context with floating-point tensors converted to this type."""
        return self._mapped(lambda each: each.to(dtype) if each.is_floating_point() else each, lambda e: e.to(dtype))

    @property
    def kind(self) -> Hashable:
        """A key of everything that affects how a network is differentiated."""
        tensors = (self.labels, self.teacher_outputs, self.pixels)
        kinds = tuple(None if each is None else (each.shape[1:], each.dtype) for each in tensors)
        return *kinds, None if self.arguments is None else self.arguments.kind

    def _mapped(self, tensor: Callable[[Tensor], Tensor], arguments: Callable[[Arguments], Arguments]) -> "Context":
        named = {name: each for name, each in vars(self).items() if isinstance(each, Tensor)}
        changed: dict[str, Any] = {name: tensor(each) for name, each in named.items()}
        return replace(self, **changed, arguments=None if self.arguments is None else arguments(self.arguments))


Outputs: TypeAlias = Float[Tensor, "batch *out"]
Features: TypeAlias = Mapping[str, Tensor]


@runtime_checkable
class Readout(Protocol):
    """A function of outputs and features, with the dotted paths of the features it needs."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Dotted module paths of the features that are needed."""
        ...

    def __call__(self, outputs: Outputs, features: Features, context: Context) -> Float[Tensor, "batch *row"]:
        """The values whose Jacobian is taken."""
        ...


@dataclass(frozen=True)
class Logits:
    """The outputs themselves (Srinivas & Fleuret 2018, proposition 1)."""

    layers: tuple[str, ...] = ()

    def __call__(self, outputs: Outputs, features: Features, context: Context) -> Outputs:
        """Return the outputs."""
        return outputs


@dataclass(frozen=True)
class LogProbabilities:
    """Log-probabilities log softmax(y / τ); their Jacobian is the score that the Fisher loss compares.

    Attributes:
        temperature: τ > 0, divides the logits.
        class_dim: The dimension of the classes; needed for outputs of more than two dimensions, unless the layer that
            computes them determines it (`features.class_dimension`).
    """

    temperature: float = 1.0
    layers: tuple[str, ...] = ()
    class_dim: int | None = None

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise InputError("`temperature` of `LogProbabilities` must be positive.", got=self.temperature)

    def __call__(self, outputs: Outputs, features: Features, context: Context) -> Outputs:
        """Return log softmax(y / τ)."""
        axis = class_axis("LogProbabilities", outputs.shape, self.class_dim)
        return functional.log_softmax(outputs / self.temperature, dim=axis)


@dataclass(frozen=True)
class LabelLogit:
    """The logit of the label, one row per sample."""

    layers: tuple[str, ...] = ()

    def __call__(self, outputs: Outputs, features: Features, context: Context) -> Float[Tensor, "batch 1"]:
        """Return y at the label; for mixed labels, the mixture of the logits."""
        labels = _needed(context.labels, "labels", "LabelLogit")
        one_row_of_classes("LabelLogit", outputs.shape)
        if labels.is_floating_point():
            return (outputs * labels).sum(1, keepdim=True)
        return outputs.gather(1, labels[:, None])


@dataclass(frozen=True)
class TopLogit:
    """The logit of the teacher's top class, one row per sample: the paper's choice (precursor, section 3)."""

    layers: tuple[str, ...] = ()

    def __call__(self, outputs: Outputs, features: Features, context: Context) -> Float[Tensor, "batch 1"]:
        """Return y at the teacher's argmax."""
        teacher = _needed(context.teacher_outputs, "teacher_outputs", "TopLogit")
        one_row_of_classes("TopLogit", outputs.shape)
        return outputs.gather(1, teacher.argmax(1, keepdim=True))


@dataclass(frozen=True)
class Loss:
    """The cross-entropy of each sample with its label (the readout of arXiv:2110.12072)."""

    layers: tuple[str, ...] = ()

    def __call__(self, outputs: Outputs, features: Features, context: Context) -> Float[Tensor, "batch 1"]:
        """Return −log softmax(y) at the label."""
        labels = _needed(context.labels, "labels", "Loss")
        one_row_of_classes("Loss", outputs.shape)
        return functional.cross_entropy(outputs, labels, reduction="none")[:, None]


class _OfLayer:
    """A readout of the features of one layer."""

    layer: str

    @property
    def layers(self) -> tuple[str, ...]:
        """The one layer."""
        return (self.layer,)


@dataclass(frozen=True)
class AttentionPixel(_OfLayer):
    """The attention map at its largest pixel, one row per sample (paper, section on transfer).

    The map is A = Σ_c |Z_c|^p, pooled to `size` × `size` pixels by averaging, which is linear and so commutes with the
    derivative. The pixel is the teacher's: for the student pass `Context(pixels=...)` from `largest`.

    Attributes:
        layer: Dotted path of the layer whose features Z are `(B, C, H, W)`.
        p: Exponent, above 1 so that the map is differentiable at 0.
        size: Height and width of the pooled map; None keeps those of the layer.
    """

    layer: str
    p: float = 2.0
    size: int | None = None

    def _map(self, features: Features) -> Float[Tensor, "batch pixel"]:
        return _attention(features, self.layer, self.p, self.size)

    def largest(self, features: Features) -> Int[Tensor, "batch"]:
        """Flat index of the largest pixel of the pooled map, per sample."""
        return self._map(features).argmax(1)

    def __call__(self, outputs: Outputs, features: Features, context: Context) -> Float[Tensor, "batch 1"]:
        """Return A at the teacher's pixel, or at its own largest where no teacher's pixel is given."""
        pixels = self.largest(features) if context.pixels is None else context.pixels
        return self._map(features).gather(1, pixels[:, None])


@dataclass(frozen=True)
class AttentionMaps:
    """The attention maps of several layers, one after the other: R = Σ_m height_m · width_m, one forward pass for all.

    Each map is A = Σ_c |Z_c|^p of its layer, pooled to its size by averaging and flattened. `largest` gives the
    directions that pick the largest pixel of each map, so that vᵀJ has one row for each layer; a student is given those
    of its teacher.

    Attributes:
        layers: Dotted paths of the layers whose features Z are `(B, C, H, W)`.
        sizes: Height and width of each pooled map.
        p: Exponent, above 1 so that the maps are differentiable at 0.

    Raises:
        InputError: there is not one size for each layer.

    References:
        Srinivas & Fleuret 2018, arXiv:1803.00443, section 5 (one layer), as re-implementations and notes report it; the
        ICML text was not available. Zagoruyko & Komodakis 2017, arXiv:1612.03928.
    """

    layers: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    p: float = 2.0

    def __post_init__(self) -> None:
        if not self.layers or len(self.layers) != len(self.sizes):
            rule = "`sizes` of `AttentionMaps` must have a height and a width for each of `layers`."
            raise InputError(rule, got=f"{len(self.layers)} layers and {len(self.sizes)} sizes")

    def __call__(self, outputs: Outputs, features: Features, context: Context) -> Float[Tensor, "batch row"]:
        """Return the maps, flattened and one after the other."""
        return torch.cat(self.parts(features), 1)

    def parts(self, features: Features) -> tuple[Float[Tensor, "batch pixel"], ...]:
        """The flattened maps, one for each layer."""
        pairs = zip(self.layers, self.sizes, strict=True)
        return tuple(_attention(features, layer, self.p, size) for layer, size in pairs)

    def maps(self, values: Float[Tensor, "batch row"]) -> tuple[Float[Tensor, "batch height width"], ...]:
        """The values as maps again, one for each layer."""
        flat = torch.split(values, [height * width for height, width in self.sizes], 1)
        return tuple(part.reshape(-1, *size) for part, size in zip(flat, self.sizes, strict=True))

    def largest(self, values: Float[Tensor, "batch row"]) -> Float[Tensor, "map batch row"]:
        """The directions v that pick the largest pixel of each map: a one, and zeros."""
        picked, start = [], 0
        for part in self.maps(values):
            pixels = start + part.flatten(1).argmax(1)
            picked.append(functional.one_hot(pixels, values.shape[1]).to(values.dtype))
            start += part[0].numel()
        return torch.stack(picked)


@dataclass(frozen=True)
class PooledFeatures(_OfLayer):
    """Features of a layer averaged over `size` × `size` windows, R = channels · size².

    Attributes:
        layer: Dotted path of the layer whose features are `(B, C, H, W)`.
        size: Number of windows along each axis.
    """

    layer: str
    size: int = 1

    def __call__(self, outputs: Outputs, features: Features, context: Context) -> Float[Tensor, "batch row"]:
        """Return the pooled features, flattened."""
        return functional.adaptive_avg_pool2d(_image_features(features, self.layer), self.size).flatten(1)


@dataclass(frozen=True)
class OutputsFrom:
    """The outputs from one index on: the second head of a network that has two in its last layer.

    Attributes:
        first: Index of the first of them, at least 1.
    """

    first: int
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        whole_number("`first` of `OutputsFrom`", self.first)

    def __call__(self, outputs: Outputs, features: Features, context: Context) -> Float[Tensor, "batch *row"]:
        """Return the outputs after the first head."""
        return outputs[:, self.first :]


@dataclass(frozen=True, eq=False)
class PCAFeatures(_OfLayer):
    """Pooled features of a layer in the basis of their leading principal components: z = Wᵀ(pool(Z) − μ)/s.

    The statistics are those of one network, a teacher, on one set of inputs: `fitted` returns the readout with them. A
    student learns these k numbers with a linear layer, for example its second head. The readout is linear in the
    features, so rows of its Jacobian are those of the pooled features in the same basis.

    Attributes:
        layer: Dotted path of the layer; features (B, C) or (B, C, H, W), averaged over all pixels.
        k: Number of components.
        whiten: Divide each component by its own standard deviation; otherwise divide all by that of the first, which
            keeps their ratios.
        mean: μ, (C,).
        components: W/s, (C, k).

    Example:
        >>> readout = PCAFeatures("0", 2).fitted(torch.nn.Sequential(torch.nn.Linear(3, 5)), torch.rand(20, 3))
        >>> readout.components.shape
        torch.Size([5, 2])
    """

    layer: str
    k: int
    whiten: bool = False
    mean: Float[Tensor, "channel"] | None = None
    components: Float[Tensor, "channel k"] | None = None

    def __post_init__(self) -> None:
        whole_number("`k` of `PCAFeatures`", self.k)

    def fitted(self, module: nn.Module, x: Float[Tensor, "sample *input"], batch: int = 100) -> "PCAFeatures":
        """Return the readout with the statistics of the features of x.

        Args:
            module: The teacher, in evaluation mode.
            x: Its inputs, more than `k`.
            batch: Number of inputs in one pass.

        Raises:
            InputError: There is no such layer, or there are too few inputs or channels.
        """
        with torch.no_grad():
            rows = [self._pooled(run(module, part, self.layers)[1]).double() for part in torch.split(x, batch)]
        pooled = torch.cat(rows)
        if self.k > min(len(pooled) - 1, pooled.shape[1]):
            rule = "`k` of `PCAFeatures` must be below the number of inputs, and at most the number of channels."
            raise InputError(rule, got=f"{self.k} of {len(pooled)} inputs and {pooled.shape[1]} channels")
        _, scales, basis = torch.linalg.svd(pooled - pooled.mean(0), full_matrices=False)
        deviations = (scales[: self.k] / (len(pooled) - 1) ** 0.5).clamp_min(1e-6 * float(scales[0]) + 1e-12)
        divisor = deviations if self.whiten else deviations[:1]
        components = basis[: self.k].mT / divisor
        return replace(self, mean=pooled.mean(0).to(x), components=components.to(x))

    def _pooled(self, features: Features) -> Float[Tensor, "batch channel"]:
        z = features[self.layer]
        return z if z.dim() == 2 else _image_features(features, self.layer).mean((2, 3))

    def __call__(self, outputs: Outputs, features: Features, context: Context) -> Float[Tensor, "batch k"]:
        """Return the components.

        Raises:
            InputError: The readout has no statistics yet, or its statistics have another number of channels.
        """
        z = self._pooled(features)
        if self.mean is None or self.components is None or len(self.mean) != z.shape[1]:
            got = "none" if self.mean is None else f"those of {len(self.mean)} channels for {z.shape[1]}"
            rule = "`PCAFeatures` must have the statistics of its layer."
            raise InputError(rule, got=got, do="Fit it to the teacher: PCAFeatures(layer, k).fitted(teacher, x).")
        return (z - self.mean.to(z)) @ self.components.to(z)


READOUTS: dict[str, Callable[..., Readout]] = {
    "logits": Logits,
    "log-probabilities": LogProbabilities,
    "label-logit": LabelLogit,
    "top-logit": TopLogit,
    "loss": Loss,
    "attention-pixel": AttentionPixel,
    "attention-maps": AttentionMaps,
    "pooled-features": PooledFeatures,
    "outputs-from": OutputsFrom,
    "pca-features": PCAFeatures,
}


def parts_of(readout: Readout, values: Tensor, features: Features) -> tuple[Tensor, ...]:
    """Return the values (B, R) split into consecutive parts, if a readout takes them from layers of different depth.

    A backward pass that begins at a shallow layer need not go through the deeper ones.
    """
    return readout.parts(features) if isinstance(readout, AttentionMaps) else (values,)


def with_class_dim(part: Any, dimension: int) -> Any:
    """Return the readout or probe with this dimension of the classes, unless it has one already."""
    if isinstance(inner := getattr(part, "readout", None), Readout):
        return replace(part, readout=with_class_dim(inner, dimension))
    return replace(part, class_dim=dimension) if getattr(part, "class_dim", 0) is None else part


def _needed(value: Tensor | None, name: str, readout: str) -> Tensor:
    if value is None:
        raise InputError(f"`{readout}` needs `{name}` in its context.", got="None", do=f"Pass Context({name}=...).")
    return value


def _attention(
    features: Features, layer: str, p: float, size: int | tuple[int, int] | None
) -> Float[Tensor, "batch pixel"]:
    """The attention map of a layer, pooled and flattened."""
    z = _image_features(features, layer)
    # An even power needs no |·|, for which autograd's second derivative at 0 is 0 (correct for p = 2: 2).
    attention = (z if p % 2 == 0 else z.abs()).pow(p).sum(1)
    if size is not None:
        attention = functional.adaptive_avg_pool2d(attention, size)
    return attention.flatten(1)


def _image_features(features: Features, layer: str) -> Float[Tensor, "batch channel height width"]:
    z = features[layer]
    if z.dim() != 4:
        rule = f"Layer {layer!r} must return features (batch, channel, height, width)."
        raise InputError(rule, got=f"shape {tuple(z.shape)}", do="Name a convolutional layer.")
    return z
