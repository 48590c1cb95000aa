"""Modules that are sound, some of which PyTorch alone would differentiate wrongly or not at all."""

from torch import nn
from torch.nn import functional

from .faults import Applied, linear


class Attends(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, dropout=dropout, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class First(nn.Module):
    """A layer, and a linear head on one position of what it returns."""

    def __init__(self, layer, width, position):
        super().__init__()
        self.layer, self.head, self.position = layer, nn.Linear(width, 4), position

    def forward(self, x):
        y = self.layer(x)
        return self.head((y[0] if isinstance(y, tuple) else y)[:, self.position])


def functional_dropout():
    module = Applied(lambda x, a: a(x), linear())
    module.function = lambda x, a: a(functional.dropout(x, 0.5, training=module.training))
    return module


SEQUENCE, IMAGES, VECTORS = (4, 5, 32), (4, 3, 8, 8), (6, 5)
SOUND = {
    "mlp": (lambda: nn.Sequential(linear(), nn.ReLU(), linear(4, 16), nn.ReLU(), linear(16)), VECTORS),
    "conv and BatchNorm": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, stride=2, groups=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        ),
        IMAGES,
    ),
    "multi-head attention": (Attends, SEQUENCE),
    "multi-head attention, dropout": (lambda: Attends(0.1), SEQUENCE),
    "encoder layer": (
        lambda: First(nn.TransformerEncoderLayer(32, 4, 64, 0.1, batch_first=True), 32, 0),
        SEQUENCE,
    ),
    "lstm": (lambda: First(nn.LSTM(32, 8, num_layers=2, batch_first=True), 8, -1), SEQUENCE),
    "lstm, dropout": (lambda: First(nn.LSTM(32, 8, num_layers=2, dropout=0.3, batch_first=True), 8, -1), SEQUENCE),
    "dropout": (lambda: nn.Sequential(linear(), nn.Tanh(), nn.Dropout(0.5), linear(4)), VECTORS),
    "dropout as a function": (functional_dropout, VECTORS),
    "hardswish": (
        lambda: nn.Sequential(linear(5, 12), nn.Hardswish(), linear(12, 12), nn.Hardsigmoid(), linear(12)),
        VECTORS,
    ),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.GELU(), nn.Flatten(), nn.Linear(288, 4)),
        IMAGES,
    ),
    "layer norm": (lambda: nn.Sequential(linear(5, 12), nn.LayerNorm(12), nn.GELU(), linear(12)), VECTORS),
    "frozen": (lambda: nn.Sequential(linear(), nn.ReLU(), linear(4)).requires_grad_(False), VECTORS),
    "a small derivative": (lambda: Applied(lambda x, a: 1 + 1e-5 * a(x), linear()), VECTORS),
    "float32 inside": (
        lambda: Applied(lambda x, a, b: b(a(x).tanh().float().to(x.dtype)), linear(), linear(4)),
        VECTORS,
    ),
}
