"""Makes a torchvision importable that is built for another torch, as on a machine without GPU: frameworks import it."""

import importlib.util

import torch


def _declared():
    """Declare the operators that such a torchvision lacks; no test calls them."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library


OPERATORS = _declared()
