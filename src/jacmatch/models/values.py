"""Networks without derivatives: ONNX files, and functions of the user."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.errors import InputError, converted_errors, optional_package
from jacmatch.models.inputs import Shape

_TYPES = {"float": np.float32, "float16": np.float16, "double": np.float64, "uint8": np.uint8}
_STEPS = {"float": 1e-3, "double": 1e-3, "float16": 0.1, "uint8": 0.1}
"""Steps of finite differences, relative to the root mean square of the input.

In float32 below ε^⅓, which balances rounding and curvature: most networks are linear between kinks.
"""


class ValuesOnly(nn.Module):
    """A module without parameters that calls a function; its outputs have no gradient.

    Args:
        function: Takes a batch (B, *input) and returns outputs (B, K), or dense outputs (B, K, H, W), all of them
            tensors or arrays; tensors are tried first.
        name: What the user calls it, for messages.
        step: Step of differences relative to the root mean square of the input; None: by the dtype of x.

    Example:
        >>> ValuesOnly(lambda x: x.sum(1, keepdims=True))(torch.ones(2, 3))
        tensor([[3.],
                [3.]])
    """

    def __init__(self, function: Callable[[Any], Any], *, name: str = "function", step: float | None = None) -> None:
        super().__init__()
        self.function, self.name, self.step = function, name, step
        self.arrays: bool | None = None

    def forward(self, x: Float[Tensor, "batch *input"]) -> Float[Tensor, "batch out *position"]:
        """The outputs, in the type and on the device of x.

        Raises:
            InputError: The function does not return one row for each sample.
        """
        with torch.no_grad():
            given = self._called(x.detach())
        outputs = given if isinstance(given, Tensor) else torch.from_numpy(np.array(given, np.float32, order="C"))
        if outputs.dim() < 2 or len(outputs) != len(x):
            rule = f"`{self.name}` must return outputs ({len(x)}, K) for {len(x)} samples."
            raise InputError(rule, got=f"shape {tuple(outputs.shape)}", do="Return one row for each sample.")
        return outputs.to(x)

    def _called(self, x: Tensor) -> Any:
        if self.arrays is None:
            try:
                given = self.function(x.clone())
                self.arrays = False
                return given
            except Exception:  # a function of arrays may raise anything for a tensor
                self.arrays = True
        return self.function(x.numpy(force=True).copy() if self.arrays else x.clone())


def onnx(path: str, outputs: int | None, shape: Shape, mean: object = None, std: object = None) -> ValuesOnly:
    """Return the network of an ONNX file on raw inputs, run by onnxruntime on the CPU.

    Images in NHWC order are transposed, float16 and double are converted, and uint8 inputs get 255·x, rounded. If the
    file has a fixed batch size, the last batch is padded.
    """
    file = Path(os.path.expanduser(path))
    rule = f"`onnx:{path}` must be an ONNX file"
    if not file.is_file():
        raise InputError(f"{rule}.", got="no such file", do="Check the path.")
    session, entry = _session(file, rule)
    sizes = [size if isinstance(size, int) and size > 0 else None for size in entry.shape]
    dtype = entry.type.removeprefix("tensor(").rstrip(")")
    rows, order = _layout(rule, sizes, shape, dtype)

    def run(x: Tensor) -> Tensor:
        x = x.float().cpu()
        if mean is not None and std is not None:
            scale = [torch.tensor(each).float().view(1, -1, *[1] * (len(shape) - 1)) for each in (mean, std)]
            x = (x - scale[0]) / scale[1]
        if dtype == "uint8" and (float(x.min()) < -1 or float(x.max()) > 2):  # noise and differences go a little beyond
            do = "Divide the inputs by 255, leave mean and std out, or export the network with float32 inputs."
            raise InputError(f"{rule} with float inputs for inputs outside [0, 1].", got="uint8 inputs", do=do)
        array = x.permute(*order).numpy()
        array = (255 * array).round().clip(0, 255) if dtype == "uint8" else array
        array = np.ascontiguousarray(array, dtype=_TYPES[dtype])
        parts = [array[start : start + (rows or len(array))] for start in range(0, len(array), rows or len(array))]
        results = []
        for part in parts:
            whole = np.concatenate([part, np.repeat(part[-1:], rows - len(part), 0)]) if rows else part
            results.append(np.asarray(session.run(None, {entry.name: whole})[0], np.float32)[: len(part)])
        return torch.from_numpy(np.concatenate(results))

    network = ValuesOnly(run, name=f"onnx:{path}", step=_step(file, dtype))
    network.arrays = False
    with converted_errors(f"{rule} that takes samples of shape {tuple(shape)}."):
        result = network(torch.zeros(2, *shape))
    if outputs is not None and result.shape[1] != outputs:
        do = "Its classes must be those of the data, in the same order."
        raise InputError(f"{rule} with {outputs} outputs for these data.", got=f"{result.shape[1]}", do=do)
    return network


def _session(file: Path, rule: str) -> tuple[Any, Any]:
    """The session, and its only input."""
    runtime = optional_package("onnxruntime", "`onnx:FILE`", "pip install 'jacmatch[onnx]'")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
    with converted_errors(f"{rule} that onnxruntime can read.", "Export it again."):
        session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    entries = session.get_inputs()
    if len(entries) != 1:
        got = f"{len(entries)}: {', '.join(entry.name for entry in entries)}"
        raise InputError(f"{rule} with one input.", got=got, do="Export a network of one input tensor.")
    return session, entries[0]


def _layout(rule: str, sizes: list[int | None], shape: Shape, dtype: str) -> tuple[int | None, tuple[int, ...]]:
    """The fixed batch size if there is one, and the permutation of the dimensions: none for NCHW, or to NHWC."""
    if dtype not in _TYPES:
        raise InputError(f"{rule} that takes {', '.join(_TYPES)}.", got=dtype, do="Export it with float32 inputs.")

    def fits(sample: Shape) -> bool:
        pairs = zip(sizes[1:], sample, strict=False)
        return len(sizes) == 1 + len(sample) and all(own in (None, side) for own, side in pairs)

    straight = tuple(range(1 + len(shape)))
    if fits(tuple(shape)):
        return sizes[0], straight
    if len(shape) == 3 and fits((*shape[1:], shape[0])):
        return sizes[0], (0, 2, 3, 1)
    got = f"{dtype} of shape ({', '.join('any' if size is None else str(size) for size in sizes)})"
    do = "Give data of that size (folder:DIR@SIZE), or export it for these."
    raise InputError(f"{rule} that takes samples of shape {tuple(shape)}, NCHW or NHWC.", got=got, do=do)


def _step(file: Path, dtype: str) -> float:
    """Return a larger step for coarse inputs, and for quantized networks, which are piecewise constant."""
    with file.open("rb") as stream:
        quantized = any(word in stream.read(2**28) for word in (b"QuantizeLinear", b"DynamicQuantizeLinear"))
    return 0.2 if quantized else _STEPS[dtype]
