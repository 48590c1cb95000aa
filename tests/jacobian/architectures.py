"""Small networks, one for each construction whose second derivative PyTorch has, lacks or gets wrong."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

EXACT = ("forward", "reverse")


@dataclass(frozen=True)
class Architecture:
    """How to build a network, and what to feed it.

    Attributes:
        build: Makes the module.
        shape: Shape of one sample.
        training: Whether it is differentiated in training mode.
        batch_norm: Policy for its BatchNorm layers.
        engines: The exact engines that can jvp_products through it.
        seed: Of weights and inputs; chosen so that no sample lies near a kink.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    training: bool = False
    batch_norm: str = "batch"
    engines: tuple[str, ...] = EXACT
    seed: int = 0


class Applied(nn.Module):
    """A function of a tensor, as a layer."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` of a sequence with itself, and a linear head on its first position."""

    def __init__(self, need_weights: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=True)
        self.head = nn.Linear(4, 3)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x.sin(), x, need_weights=self.need_weights)[0][:, 0])


class CausalAttention(nn.Module):
    """`scaled_dot_product_attention` called by itself, as modern transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inwards, self.outwards = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.inwards(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
        return self.outwards(mixed.transpose(1, 2).flatten(2)[:, -1])


class Recurrent(nn.Module):
    """A recurrent layer, and a linear head on its last position."""

    def __init__(self, kind: type[nn.RNNBase], **settings: object) -> None:
        super().__init__()
        self.layer = kind(3, 3, batch_first=True, **settings)
        self.head = nn.Linear(6 if self.layer.bidirectional else 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class Cells(nn.Module):
    """An LSTM cell called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0]


class Heads(nn.Module):
    """A network with two outputs, in a dictionary or a tuple."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.body, self.head, self.wrap = nn.Linear(4, 5), nn.Linear(5, 3), wrap

    def forward(self, x: Tensor) -> object:
        hidden = self.body(x).tanh()
        return self.wrap(self.head(hidden), hidden)


def mlp(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), *middle, nn.Linear(5, 3))


def convolutional(*middle: nn.Module, **settings: object) -> nn.Sequential:
    trunk = nn.Sequential(nn.Conv2d(2, 4, 3, **{"padding": 1, **settings}), *middle, nn.Flatten())
    return nn.Sequential(*trunk, nn.Linear(trunk(torch.zeros(2, *IMAGE)).shape[1], 3))


def encoder_layer(**settings: object) -> nn.Sequential:
    layer = nn.TransformerEncoderLayer(4, 2, 6, **{"batch_first": True, "activation": "gelu", **settings})
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 3))


IMAGE, SEQUENCE, VECTOR = (2, 4, 4), (3, 4), (4,)
STEPS = (2, 3)

ARCHITECTURES: dict[str, Architecture] = {
    "mlp-tanh": Architecture(lambda: mlp(nn.Tanh()), VECTOR),
    "batchnorm-eval": Architecture(lambda: convolutional(nn.BatchNorm2d(4), nn.Tanh()), IMAGE),
    "batchnorm-train": Architecture(lambda: convolutional(nn.BatchNorm2d(4), nn.Tanh()), IMAGE, training=True),
    "batchnorm-train-frozen": Architecture(
        lambda: convolutional(nn.BatchNorm2d(4), nn.Tanh()), IMAGE, training=True, batch_norm="frozen"
    ),
    "batchnorm-twice-frozen": Architecture(
        lambda: mlp(nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh()),
        VECTOR,
        training=True,
        batch_norm="frozen",
    ),
    "batchnorm-1d-plain": Architecture(lambda: mlp(nn.BatchNorm1d(5, affine=False), nn.Tanh()), VECTOR, training=True),
    "batchnorm-untracked": Architecture(
        lambda: mlp(nn.BatchNorm1d(5, track_running_stats=False), nn.Tanh()), VECTOR, training=True
    ),
    "batchnorm-untracked-frozen": Architecture(
        lambda: mlp(nn.BatchNorm1d(5, track_running_stats=False), nn.Tanh()),
        VECTOR,
        training=True,
        batch_norm="frozen",
    ),
    "batchnorm-untracked-eval": Architecture(
        lambda: mlp(nn.BatchNorm1d(5, track_running_stats=False), nn.Tanh()), VECTOR
    ),
    "relu-inplace": Architecture(
        lambda: convolutional(nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3), nn.ReLU(inplace=True)), IMAGE
    ),
    "first-operation-inplace": Architecture(
        lambda: nn.Sequential(nn.ReLU(inplace=True), mlp(nn.Tanh())), VECTOR, seed=1
    ),
    "input-scaled-inplace": Architecture(lambda: nn.Sequential(Applied(lambda x: x.mul_(0.5)), mlp(nn.Tanh())), VECTOR),
    "groupnorm": Architecture(lambda: convolutional(nn.GroupNorm(2, 4), nn.SiLU()), IMAGE),
    "instancenorm": Architecture(lambda: convolutional(nn.InstanceNorm2d(4, affine=True), nn.Tanh()), IMAGE),
    "instancenorm-tracked-train": Architecture(
        lambda: convolutional(nn.InstanceNorm2d(4, track_running_stats=True), nn.Tanh()), IMAGE, training=True
    ),
    "instancenorm-tracked-eval": Architecture(
        lambda: convolutional(nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.Tanh()), IMAGE
    ),
    "layernorm-gelu": Architecture(lambda: mlp(nn.LayerNorm(5), nn.GELU()), VECTOR),
    "layernorm-plain": Architecture(
        lambda: nn.Sequential(
            nn.Linear(4, 4), nn.LayerNorm((3, 4), elementwise_affine=False), nn.Flatten(), nn.Linear(12, 2)
        ),
        SEQUENCE,
    ),
    "rmsnorm": Architecture(lambda: mlp(nn.RMSNorm(5), nn.GELU(approximate="tanh")), VECTOR),
    "softmax": Architecture(lambda: nn.Sequential(mlp(nn.Softmax(1)), nn.LogSoftmax(1)), VECTOR),
    "attention": Architecture(SelfAttention, SEQUENCE),
    "attention-train": Architecture(lambda: SelfAttention(dropout=0.3), SEQUENCE, training=True),
    "attention-without-weights": Architecture(lambda: SelfAttention(need_weights=False), SEQUENCE),
    "attention-without-weights-train": Architecture(
        lambda: SelfAttention(need_weights=False, dropout=0.3), SEQUENCE, training=True
    ),
    "attention-causal": Architecture(CausalAttention, SEQUENCE),
    "encoder-layer": Architecture(encoder_layer, SEQUENCE),
    "encoder-layer-norm-first": Architecture(lambda: encoder_layer(norm_first=True), SEQUENCE),
    "encoder-layer-train": Architecture(lambda: encoder_layer(dropout=0.2), SEQUENCE, training=True),
    # stretched, so that what comes in lies on the flat, the curved and the straight part
    "hardsigmoid": Architecture(lambda: mlp(Applied(lambda x: 4 * x - 3), nn.Hardsigmoid()), VECTOR),
    "hardsigmoid-function": Architecture(lambda: mlp(Applied(lambda x: functional.hardsigmoid(4 * x - 3))), VECTOR),
    "hardswish-inplace": Architecture(lambda: mlp(Applied(lambda x: 4 * x - 3), nn.Hardswish(inplace=True)), VECTOR),
    "hardswish-function": Architecture(lambda: mlp(Applied(lambda x: functional.hardswish(4 * x - 3))), VECTOR),
    "glu": Architecture(lambda: nn.Sequential(nn.Linear(4, 6), nn.GLU(), nn.Linear(3, 3)), VECTOR),
    "lstm": Architecture(lambda: Recurrent(nn.LSTM, bidirectional=True), STEPS),
    "lstm-cell": Architecture(Cells, STEPS),
    "gru": Architecture(lambda: Recurrent(nn.GRU, num_layers=2), STEPS),
    "dropout": Architecture(lambda: mlp(nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 5), nn.Tanh()), VECTOR, training=True),
    "dropout-of-channels": Architecture(
        lambda: convolutional(nn.Tanh(), nn.Dropout2d(0.4), nn.Conv2d(4, 2, 3), nn.Tanh()), IMAGE, training=True
    ),
    "grouped-strided": Architecture(lambda: convolutional(nn.Tanh(), stride=2, groups=2), IMAGE),
    "transposed": Architecture(
        lambda: nn.Sequential(
            nn.ConvTranspose2d(2, 2, 2, stride=2), nn.Tanh(), nn.Conv2d(2, 1, 3, stride=3), nn.Flatten()
        ),
        (2, 3, 3),
    ),
    "max-pool": Architecture(lambda: convolutional(nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.Tanh()), IMAGE),
    "adaptive-pools": Architecture(
        lambda: convolutional(nn.AdaptiveMaxPool2d(3), nn.Tanh(), nn.AdaptiveAvgPool2d(2)), IMAGE
    ),
    "dictionary": Architecture(lambda: Heads(lambda y, hidden: {"hidden": hidden, "logits": y}), VECTOR),
    "tuple": Architecture(lambda: nn.Sequential(Heads(lambda y, hidden: (y, hidden)), Applied(lambda y: y[0])), VECTOR),
    "image-to-image": Architecture(
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 2)), (2, 3, 3)
    ),
}


def made(name: str, dtype: torch.dtype = torch.float64, batch: int = 3) -> tuple[nn.Module, Tensor]:
    """The module of that name with random weights and statistics, and a batch for it."""
    architecture = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(architecture.seed)
        module = architecture.build()
        x = torch.randn(batch, *architecture.shape)
        with torch.no_grad():
            for parameter in module.parameters():  # none at the special values that layers begin with
                parameter.add_(0.2 * torch.randn_like(parameter))
            for buffer_name, buffer in module.named_buffers():
                if buffer.is_floating_point():
                    buffer.uniform_(-0.5, 0.5) if "mean" in buffer_name else buffer.uniform_(0.5, 2.0)
    return module.to(dtype).train(architecture.training), x.to(dtype)


class ConstantStatistics(nn.Module):
    """A network as a function of its input while BatchNorm uses the statistics of one given batch, as constants."""

    def __init__(self, inside: nn.Module, batch: Tensor) -> None:
        super().__init__()
        self.inside, self.batch = inside, batch

    def forward(self, z: Tensor) -> object:
        layers = [layer for layer in self.inside.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
        seen: dict[nn.Module, Tensor] = {}
        hooks = [layer.register_forward_pre_hook(lambda layer, x: seen.update({layer: x[0]})) for layer in layers]
        with torch.no_grad():
            self.inside(self.batch.clone())
        for hook in hooks:
            hook.remove()
        own = [(layer.running_mean, layer.running_var) for layer in layers]
        for layer in layers:
            channels = seen[layer].transpose(0, 1).flatten(1)
            layer.running_mean, layer.running_var = channels.mean(1), channels.var(1, unbiased=False)
            layer.eval()
        try:
            return self.inside(z)
        finally:
            for layer, (mean, var) in zip(layers, own, strict=True):
                layer.running_mean, layer.running_var = mean, var
                layer.train()


def plain(name: str) -> tuple[nn.Module, Tensor]:
    """What an engine differentiates, for the reference: the same module, with statistics held if they are frozen."""
    module, x = made(name)
    if ARCHITECTURES[name].batch_norm == "frozen":
        return ConstantStatistics(module, x), x
    return module, x
