"""Export of a surrogate: safetensors, and ONNX with its scaling, neither of which needs this package."""

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.errors import InputError, optional_package
from jacmatch.runs.files import write_whole

ONNX = "student.onnx"
CLOSE = 1e-5  # largest difference that is allowed, as a share of t + |y|
_NEEDED = ("onnx", "onnxscript")


def difference(
    mine: Callable[[Float[Tensor, "sample *input"]], Tensor],
    module: nn.Module,
    x: Float[Tensor, "sample *input"],
    t: Float[Tensor, "out"],
    what: str,
) -> float:
    """Return the largest difference of a saved network from the module, relative to t + |y|, with t the units."""
    with torch.no_grad():
        y = module(x)
        off = float(((mine(x) - y).abs().double() / (t + y.abs())).max())
    if not off <= CLOSE:
        rule = f"{what} must return what the network returns, to {CLOSE:g} of the unit and of the value of each output."
        raise InputError(rule, got=f"a difference of {off:.2g}", do="Report it with the versions of torch and onnx.")
    return off


def require_onnx() -> None:
    """Raise `InputError` if a package that the export needs is missing."""
    for name in _NEEDED:
        optional_package(name, "`--onnx always` of `surrogate`", "pip install 'jacmatch[onnx]'")


def to_onnx(
    module: nn.Module,
    folder: Path,
    x: Float[Tensor, "sample *input"],
    t: Float[Tensor, "out"],
    when: Literal["auto", "always", "never"] = "auto",
) -> dict[str, Any]:
    """Write the network as `student.onnx` (input `x`, output `y`, any batch size), read it back and compare it.

    Returns:
        `file`, `largest_difference` and `checked_by`, or the reason why there is no file.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if when == "never" or (when == "auto" and missing):
        why = f"the extra onnx is not installed ({', '.join(missing)})" if missing else "not wanted"
        return {"file": None, "why": why}
    require_onnx()
    module, x = module.eval().cpu(), x.float().cpu()
    path = folder / ONNX
    data = onnx_bytes(module, x)
    write_whole(folder, ONNX, data)
    run, by = _reader(data, path)
    off = difference(lambda z: torch.from_numpy(run(z.numpy())), module, x, t, str(path))
    return {"file": ONNX, "largest_difference": off, "checked_by": by, "bytes": len(data)}


def onnx_bytes(module: nn.Module, x: Float[Tensor, "sample *input"]) -> bytes:
    """Return the network as an ONNX file with the input `x`, the output `y` and any batch size."""
    how: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "dynamo": True, "verbose": False}
    with _quiet():
        program = torch.onnx.export(module, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},), **how)
        assert program is not None
        data: bytes = program.model_proto.SerializeToString()
    return data


def _reader(data: bytes, path: Path) -> tuple[Callable[[Any], Any], str]:
    """Return what runs the file: onnxruntime, or the reference implementation of onnx."""
    if importlib.util.find_spec("onnxruntime") is not None:
        runtime = optional_package("onnxruntime", str(path), "pip install 'jacmatch[onnx]'")
        session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
        return lambda x: np.asarray(session.run(None, {"x": x})[0]), "onnxruntime"
    reference = optional_package("onnx.reference", str(path), "pip install 'jacmatch[onnx]'")
    evaluator = reference.ReferenceEvaluator(data)
    return lambda x: np.asarray(evaluator.run(None, {"x": x})[0]), "onnx.reference"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's logs, warnings and prints."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
