"""How the weights of convolutions lie in memory."""

from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def channels_last(network: Network) -> Network:
    """The network, its images laid out with the channels of a pixel side by side, as oneDNN and cuDNN like them.

    Results are the same up to rounding.
    """
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def contiguous(network: Network) -> Network:
    """The network in torch's usual layout."""
    return network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload,no-any-return]
