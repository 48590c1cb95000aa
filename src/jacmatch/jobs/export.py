"""`jacmatch export`: write a trained network to files that do not need this package, and compare them with it."""

import contextlib
import importlib.util
import io
import json
import logging
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import tyro
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.datasets import Data, Split
from jacmatch.errors import InputError, converted_errors, optional_package, printable
from jacmatch.jobs import networks
from jacmatch.jobs.settings import JobFields, data_for
from jacmatch.jobs.study import Progress, write_measurement
from jacmatch.models import Normalized, Resized, ValuesOnly
from jacmatch.models.values import onnx
from jacmatch.runs import Run
from jacmatch.runs.files import write_whole
from jacmatch.teachers import as_teacher
from jacmatch.training.evaluation import jacobian_differences

Target = Literal["onnx", "pt2", "safetensors", "hf"]
PROGRAM, ONNX = "student.pt2", "student.onnx"
_VALUES, _JACOBIANS = 1e-3, 0.05
"""Largest relative errors of values and of Jacobian products of a file that is not quantized."""
_DIRECTIONS = 8  # number of directions in which Jacobians are compared
_CALIBRATED = 128  # training samples from which the ranges of int8 are computed


@dataclass(frozen=True)
class Export(JobFields):
    """Export a trained network, and compare each file's outputs and Jacobians with the network's on test samples."""

    main: ClassVar[str] = "to int8 data samples out seed allow_code smoke json"
    examples: ClassVar[tuple[str, ...]] = ("runs/student --to onnx --int8", "runs/student --to hf safetensors")

    trained: Annotated[str, tyro.conf.Positional] = ""
    """The folder of a run of train, distill, robust, transfer or surrogate."""
    to: tuple[Target, ...] = ("onnx",)
    """Formats: onnx; pt2 (a program of torch.export); safetensors; hf (a folder for the Hugging Face Hub). pt2 is
    always written."""
    int8: bool = False
    """Also write the ONNX file quantized to int8, calibrated with training samples."""
    data: str | None = None
    """Data set; files and network are compared on its test split. By default that of the run."""
    samples: int = 16
    """Number of test samples that are compared."""

    def run(self, progress: Progress | None = None) -> dict[str, Any]:
        """Write and compare the files, and return the result.

        Raises:
            InputError: The folder holds no network, a package is missing, or a file differs from the network.
        """
        if self.samples < 1:
            raise InputError("`--samples` of `export` must be at least 1.", got=self.samples)
        if self.int8 and "onnx" not in self.to:
            raise InputError("`--int8` of `export` must be used with --to onnx.", got=" ".join(self.to))
        if not networks.is_run(self.trained):
            rule = "`jacmatch export` must be given the folder of a run."
            do = "For weights of another program, run first: jacmatch train --weights."
            raise InputError(rule, got=repr(self.trained), do=do)
        for name in ("onnx", "onnxscript", "onnxruntime") if "onnx" in self.to else ():
            optional_package(name, "`export --to onnx`", "pip install 'jacmatch[onnx]'")
        folder = Path(self.trained)
        network = networks.load_student(folder, allow_code=self.allow_code).cpu()
        description = networks.describe(folder)
        given: dict[str, Any] = {"seed": self.seed, "smoke": self.smoke, "allow_code": self.allow_code}
        data = data_for("export", (self.trained,), self.data, **given)
        run = self.begin("export")
        start = time.perf_counter()
        count = min(4 if self.smoke else self.samples, len(data.test))
        split = data.test.subset(torch.linspace(0, len(data.test) - 1, count).round().long())
        files: dict[str, Any] = {}
        with progress or Progress() as shown:
            shown.stage("Writing and comparing files")
            files[PROGRAM] = _program(run, network, split)
            if "onnx" in self.to:
                files[ONNX] = _onnx(run, network, split)
            if self.int8:
                files["student.int8.onnx"] = _int8(run, network, split, data)
            if "safetensors" in self.to:
                files[networks.WEIGHTS] = {"bytes": _copied(run, folder, networks.WEIGHTS)}
            if "hf" in self.to:
                files |= _hub(run, folder, network, description)
        write_whole(run.path, "load.py", _LOADER.format(shape=description.shape).encode())
        card = model_card(folder, description, data, files)
        write_whole(run.path, "README.md", card.encode())
        return write_measurement(self, run, data, start, files=files, samples=count)


def _compared(name: str, mine: nn.Module, network: nn.Module, split: Split, *, strict: bool) -> dict[str, Any]:
    """Return relative errors of values and Jacobians of a file, and its agreement with the network."""
    x = split.inputs().cpu()
    with torch.no_grad():
        wanted, got = network(x).double(), mine(x).double()
    reference: nn.Module = network
    if strict and isinstance(mine, ValuesOnly):
        reference = ValuesOnly(network, step=mine.step)
    rows = torch.arange(len(split))
    cosines, difference, norm = jacobian_differences(mine, as_teacher(reference), split, rows, _DIRECTIONS)
    result = {
        "value_relative_error": float((got - wanted).norm() / wanted.norm().clamp_min(1e-30)),
        "jacobian_relative_error": float((difference.sum() / norm.sum().clamp_min(1e-30)).sqrt()),
        "jacobian_cosine": float(cosines.mean()),
    }
    if not split.y.is_floating_point():
        result["top1"] = float((got.argmax(1) == wanted.argmax(1)).double().mean())
    if strict:
        limits = {"value_relative_error": _VALUES, "jacobian_relative_error": _JACOBIANS}
        for key, limit in limits.items():
            if not result[key] <= limit:
                rule = f"{name} must return what the network returns: {key.replace('_', ' ')} at most {limit:g}."
                raise InputError(rule, got=f"{result[key]:.2g}", do="Report it with the versions of torch and onnx.")
    return result


def _program(run: Run, network: nn.Module, split: Split) -> dict[str, Any]:
    x = split.inputs(torch.zeros(2, dtype=torch.int64)).cpu()
    with converted_errors("The network must be one that torch.export can trace."):
        program = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file = io.BytesIO()
    torch.export.save(program, file)
    write_whole(run.path, PROGRAM, file.getvalue())
    mine: Any = torch.export.load(io.BytesIO(file.getvalue())).module()
    values = ValuesOnly(mine.__call__, name=PROGRAM, step=1e-3)
    return {**_compared(PROGRAM, values, network, split, strict=True), "bytes": len(file.getvalue())}


def _onnx(run: Run, network: nn.Module, split: Split) -> dict[str, Any]:
    data = onnx_bytes(network, split.inputs(torch.zeros(2, dtype=torch.int64)).cpu())
    path = write_whole(run.path, ONNX, data)
    return {**_compared(path.name, _session(path, split), network, split, strict=True), "bytes": len(data)}


def _session(path: Path, split: Split) -> ValuesOnly:
    return onnx(str(path), None, tuple(split.x.shape[1:]))


def _int8(run: Run, network: nn.Module, split: Split, data: Data) -> dict[str, Any]:
    """The static quantization of onnxruntime, with ranges from evenly spaced training samples."""
    quantization = optional_package("onnxruntime.quantization", "`export --int8`", "pip install 'jacmatch[onnx]'")
    rows = torch.linspace(0, len(data.train) - 1, min(_CALIBRATED, len(data.train))).round().long()
    batches = iter([{"x": part.numpy()} for part in torch.split(data.train.inputs(rows).cpu(), 16)])

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Any] | None:
            return next(batches, None)

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "q.onnx"
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)  # it recommends a preprocessing that torch's exporter has done
        try:
            quantization.quantize_static(str(run.path / ONNX), str(target), Reader(), per_channel=True)
        finally:
            logging.disable(before)
        content = target.read_bytes()
    path = write_whole(run.path, "student.int8.onnx", content)
    return {**_compared(path.name, _session(path, split), network, split, strict=False), "bytes": len(content)}


def _copied(run: Run, folder: Path, name: str, target: str = "") -> int:
    content = (folder / name).read_bytes()
    write_whole(run.path, target or name, content)
    return len(content)


def _hub(run: Run, folder: Path, network: Any, description: networks.Description) -> dict[str, Any]:
    """Write `config.json` and `model.safetensors` in the format of the library that the network comes from."""
    inner = network.network if isinstance(network, Resized) else network
    family, _, name = description.spec.partition(":")
    size = description.size or description.shape[-1]
    if family == "hf" and isinstance(inner, Normalized):
        classifier: Any = inner.network.network
        classifier.save_pretrained(run.path)
        own = {"do_normalize": True, "image_mean": description.mean, "image_std": description.std, "do_rescale": True}
        own |= {"size": {"height": size, "width": size}, "image_processor_type": "ViTImageProcessor"}
        write_whole(run.path, "preprocessor_config.json", json.dumps(own, indent=2).encode())
    elif family == "timm" and isinstance(inner, Normalized):
        safetensors = optional_package("safetensors.torch", "`export --to hf`", "pip install 'jacmatch[train]'")
        state = {key: value.contiguous().clone() for key, value in inner.network.state_dict().items()}
        write_whole(run.path, "model.safetensors", safetensors.save(state, metadata={"format": "pt"}))
        cfg = {"mean": description.mean, "std": description.std, "num_classes": description.outputs}
        cfg["input_size"] = [description.shape[0], size, size]
        config = {"architecture": name, "num_classes": description.outputs, "pretrained_cfg": cfg}
        config |= {"model_args": {"in_chans": description.shape[0]}}
        write_whole(run.path, "config.json", json.dumps(config, indent=2).encode())
    else:
        _copied(run, folder, networks.WEIGHTS, "model.safetensors")
        config = {"library_name": "jacmatch", **description.__dict__}
        write_whole(run.path, "config.json", json.dumps(config, indent=2).encode())
    names = ("model.safetensors", "config.json")
    return {name: {"bytes": (run.path / name).stat().st_size} for name in names if (run.path / name).is_file()}


_LOADER = '''"""The network, from student.pt2: `from load import load`. It needs torch alone.

The input is a batch of raw inputs of shape {shape}; images are in [0, 1], normalization is inside.
"""

from pathlib import Path

import torch

SHAPE = {shape}


def load():
    """Return the network, for any batch size."""
    return torch.export.load(Path(__file__).resolve().parent / "student.pt2").module()


if __name__ == "__main__":
    print(tuple(load()(torch.rand(3, *SHAPE)).shape))
'''


def _plain(value: object) -> str:
    """Return the value as Markdown without markup."""
    return re.sub(r"([][<>&`*|\\])", r"\\\1", printable(f"{value:.4g}" if isinstance(value, float) else str(value)))


def model_card(
    folder: Path, description: networks.Description, data: Data, files: Mapping[str, Mapping[str, Any]]
) -> str:
    """Return `README.md`, with fields to fill in."""
    run = Run.open(folder, finished=False)
    result: Mapping[str, Any] = run.result if run.finished else {}
    settings = {key: value for key, value in run.settings.items() if value not in (None, (), [], False)}
    student, teacher, agreement = (result.get(key) or {} for key in ("student", "teacher", "agreement"))

    def lines(values: Mapping[str, Any]) -> str:
        shown = [f"- {k.replace('_', ' ')}: {_plain(v)}" for k, v in values.items() if isinstance(v, int | float | str)]
        return "\n".join(shown) or "- none"

    form = {"bytes": ",", "value_relative_error": ".2g", "jacobian_relative_error": ".2g", "jacobian_cosine": ".4f"}
    rows = []
    for name, one in files.items():
        row = [format(one[k], f) if k in one else "–" for k, f in form.items()]
        rows.append(f"| {' | '.join([name, *row])} |")
    library = {"timm": "timm", "hf": "transformers"}.get(description.spec.partition(":")[0], "jacmatch")
    cost = {key: result[key] for key in ("seconds", "samples_per_second", "peak_memory_bytes") if key in result}
    return "\n".join(
        [
            "---\nlicense: TO FILL IN",
            f"library_name: {library}",
            "tags: [knowledge-distillation, jacobian-matching]\n---",
            f"# {_plain(description.spec)}, {description.outputs} outputs",
            "",
            f"Made by `jacmatch {run.job}` {result.get('version', '')}. Input: {description.shape}, raw (images in "
            "[0, 1]); normalization is inside the network.",
            "",
            f"## Data\n\n{_plain(data.name)}: {len(data.train):,} training and {len(data.test):,} test samples.",
            f"\n## Teacher\n\n- name: {_plain(settings.get('teacher', 'none'))}\n{lines(teacher)}",
            f"\n## Recipe\n\n{lines(settings)}",
            f"\n## Accuracy on the test split\n\n{lines(student)}",
            f"\n## Agreement with the teacher, in value and derivative\n\n{lines(agreement)}",
            f"\n## Cost\n\n{lines(cost)}",
            "\n## Files, compared with the network on test samples\n",
            "| file | bytes | error of values | error of Jacobians | cosine of Jacobians |",
            "| --- | ---: | ---: | ---: | ---: |",
            *rows,
            "\n`python load.py` loads `student.pt2`; it needs torch alone.",
            "\n## License\n\n- of this network: TO FILL IN\n- of the data: TO FILL IN\n- of the teacher: TO FILL IN\n",
        ]
    )


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
