"""Which settings of an objective are allowed, alone and together."""

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from jacmatch.errors import InputError, UnsupportedError, unknown_name, whole_number
from jacmatch.jacobian import (
    Arguments,
    AttentionPixel,
    BatchNormPolicy,
    Context,
    Engine,
    Estimator,
    LabelClass,
    LabelLogit,
    Logits,
    Loss,
    Readout,
    Shared,
    TopLogit,
)
from jacmatch.jacobian.arguments import embedding_of
from jacmatch.jacobian.features import Select
from jacmatch.losses import IGNORED, JACOBIAN_LOSSES, OUTPUT_LOSSES, Positions, Task
from jacmatch.objectives.terms import AtData, AtMixedPairs, Point
from jacmatch.teachers import EnsembleTeacher, MemoizedTeacher, ModuleTeacher, Teacher

KNOWN: dict[str, Collection[str]] = {
    "output_loss": OUTPUT_LOSSES,
    "jacobian_loss": JACOBIAN_LOSSES,
    "task": get_args(Task),
    "batch_norm": get_args(BatchNormPolicy),
    "positions": get_args(Positions),
}
"""The allowed names of each setting."""


def known_names(caller: str, **settings: str) -> None:
    """Reject unknown names."""
    for name, given in settings.items():
        if given not in KNOWN[name]:
            raise unknown_name(f"`{name}` of `{caller}`", str(given), KNOWN[name])


def positive_settings(caller: str, *, temperature: float | int | None = None, **counts: int) -> None:
    """Check that counts of calls are integers from 1, and that a temperature is positive and finite."""
    for name, given in counts.items():
        whole_number(f"`{name}` of `{caller}`", given)
    if temperature is not None and not 0 < temperature < math.inf:
        raise InputError(f"`temperature` of `{caller}` must be positive and finite.", got=temperature)


def engine(caller: str, probe: Estimator | None, given: Engine, only: str | None) -> None:
    """Validate the name of an engine, and that the probe can use this engine.

    `only` is the only engine that the probe supports; None if any can be chosen.
    """
    if given not in get_args(Engine):
        raise unknown_name(f"`engine` of `{caller}`", str(given), get_args(Engine))
    if only is not None and given not in ("auto", only):
        rule = f"`engine` of `{caller}{_with_probe(probe)}` must be 'auto' or {only!r}."
        do = "Other engines are for RandomInputs and DataPairs." if probe is not None else "It compares rows vᵀJ."
        raise InputError(rule, got=repr(given), do=do)


def chunk_size(caller: str, probe: Estimator | None, side: str, given: int | None) -> None:
    """Check the number of rows in a chunk, and that the probe takes rows."""
    if given is None:
        return
    whole_number(f"`chunk_size` of `{caller}`", given, other=", or None")
    if side == "input":
        rule = f"`chunk_size` of `{caller}` is for probes on the output side, whose products are rows."
        raise InputError(rule, got=f"probe={type(probe).__name__}()", do="Leave it out.")


def _with_probe(probe: Estimator | None) -> str:
    return "" if probe is None else f"(probe={type(probe).__name__}())"


def couples(student: nn.Module) -> bool:
    """Whether a sample's outputs depend on the rest of the batch: BatchNorm normalizing by batch statistics."""
    layers = (layer for layer in student.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm))
    return any(layer.training or layer.running_mean is None for layer in layers)


def are_objects(caller: str, probe: object, readouts: tuple[object, ...], point: object) -> None:
    """Reject a name or a class where an instance is required."""
    settings = (
        *([("probe", probe, "directions", "RandomOutputs(1)")] if probe is not None else []),
        *(("readout", readout, "__call__", "Logits()") for readout in readouts),
        ("point", point, "move", "AtData()"),
    )
    for name, given, method, example in settings:
        if isinstance(given, type) or not callable(getattr(given, method, None)):
            got = f"the class {given.__name__}" if isinstance(given, type) else repr(given)
            raise InputError(f"`{name}` of `{caller}` must be an object such as {example}.", got=got)


def fitting_task(
    probe: Estimator | None,
    readouts: tuple[Readout, ...],
    point: Point,
    task: str,
    output_loss: str,
    weights: dict[str, float | int],
) -> None:
    """Reject probes, readouts and points that are incompatible with each other or with the task."""
    one_pixel(readouts)
    if task == "regression":
        numeric("Distillation(task='regression')", probe, readouts, output_loss)
    if isinstance(point, AtMixedPairs):
        if task == "regression" and weights["labels"]:
            rule = "`labels` of `Distillation` must be 0 at mixed pairs in regression: a mixture of labels is not the "
            raise InputError(f"{rule}label of the mixture.", got=weights["labels"])
        if isinstance(probe, LabelClass) or any(isinstance(readout, LabelLogit | Loss) for readout in readouts):
            rule = "A mixed pair has no single label, so `probe` and `readout` of `Distillation` must not need one."
            raise InputError(rule, do="Use TopClass() or TopLogit(), whose class is the teacher's.")


def numeric(caller: str, probe: Estimator | None, readouts: tuple[Readout, ...], output_loss: str) -> None:
    """Reject settings for classes in regression."""
    classes = [
        *(type(readout).__name__ for readout in readouts if isinstance(readout, LabelLogit | Loss | TopLogit)),
        *(["LabelClass"] if isinstance(probe, LabelClass) else []),
        *(["kl"] if output_loss == "kl" else []),
    ]
    if classes:
        rule = f"`{caller}` must not have settings for classes."
        do = "Use readout=Logits(), output_loss='squared' and a probe without labels."
        raise InputError(rule, got=", ".join(dict.fromkeys(classes)), do=do)


def one_pixel(readouts: tuple[Readout, ...]) -> None:
    """Reject attention maps of different `size`: their pixels do not correspond."""
    pair = [readout for readout in readouts if isinstance(readout, AttentionPixel)]
    if len(pair) == 2 and pair[0].size != pair[1].size:
        rule = "Both `AttentionPixel` in `readout` of `Distillation` must have the same `size`."
        raise InputError(rule, got=f"{pair[0].size} and {pair[1].size}", do="AttentionPixel(layer, size=4) for both.")


@dataclass(frozen=True)
class SameMap:
    """The student's `AttentionPixel`, which rejects a map whose size differs from the teacher's."""

    readout: AttentionPixel
    size: torch.Size

    @property
    def layers(self) -> tuple[str, ...]:
        """The layer of the attention map."""
        return self.readout.layers

    def __call__(self, outputs: Tensor, features: Mapping[str, Tensor], context: Context) -> Tensor:
        """Return the values of the readout."""
        size = features[self.readout.layer].shape[2:]
        if self.readout.size is None and size != self.size:
            rule = "Without a `size` of `AttentionPixel`, student and teacher need attention maps of the same size."
            do = "AttentionPixel(layer, size=4) pools both."
            raise InputError(rule, got=f"{tuple(size)} and {tuple(self.size)}", do=do)
        return self.readout(outputs, features, context)


def same_outputs(student: Tensor, teacher: Tensor, readout: Readout | None = None) -> None:
    """Reject networks with different numbers of outputs, or of readout values."""
    if student.shape == teacher.shape:
        return
    if student.shape == teacher.shape[:1]:
        raise SingleOutput
    got = f"{tuple(student.shape[1:])} and {tuple(teacher.shape[1:])}"
    if readout is None or isinstance(readout, Logits):
        remedy = "Build the student with the teacher's number of classes."
        raise InputError("Student and teacher must have the same outputs.", got=got, do=remedy)
    remedy = "Choose `readout` as a pair (student's, teacher's) of equal sizes."
    raise InputError("Student and teacher must have the same number of values of the readout.", got=got, do=remedy)


def batch_of_tensors(caller: str, x: object, y: object, *, floating: bool) -> Tensor:
    """Return x; reject a batch that is not a tensor, is empty, or cannot be differentiated."""
    for name, given in (("x", x), ("y", y)):
        if isinstance(given, Mapping):
            got = f"a dictionary with {', '.join(map(repr, given))}"
            do = "Pass the tensors in it: objective(batch[...], batch[...])."
            raise InputError(f"`{name}` of `{caller}` must be a tensor.", got=got, do=do)
        if not isinstance(given, Tensor) and (name == "x" or given is not None):
            do = "Unpack a batch: objective(*batch); torch.as_tensor makes tensors of arrays."
            raise InputError(f"`{name}` of `{caller}` must be a tensor.", got=type(given).__name__, do=do)
    assert isinstance(x, Tensor)
    if x.dim() == 0 or len(x) == 0:
        rule = f"`x` of `{caller}` must have at least one sample."
        raise InputError(rule, got=f"shape {tuple(x.shape)}", do="Leave such batches out.")
    if floating and not x.is_floating_point():
        raise InputError(
            f"`x` of `{caller}` must be of a floating-point type for derivatives, noise or mixtures.",
            got=str(x.dtype),
            do="For images, pass x.float() / 255 to networks that were trained with it. For tokens, differentiate "
            "with respect to embeddings (`jacmatch.jacobian.from_embeddings`), or omit that term.",
        )
    return x


@contextmanager
def explained(caller: str, x: Tensor, y: Tensor | None, student: nn.Module, name: str = "y") -> Iterator[None]:
    """Context in which torch's errors about input types and label ranges are raised with the name of the argument."""
    try:
        yield
    except (RuntimeError, IndexError, InputError) as error:
        like = next((p for p in student.parameters() if p.is_floating_point()), x)
        if isinstance(error, InputError):
            like = x
        if x.dtype != like.dtype and "type" in str(error) and not torch.is_autocast_enabled(x.device.type):
            kind = str(like.dtype)
            rule = f"`x` of `{caller}` must have the type of the student's parameters."
            do = f"Convert one of them: x.to({kind}) (bytes of images: x.to({kind}) / 255), or student.to(x.dtype)."
            raise InputError(rule, got=f"{x.dtype} and {kind}", do=do) from error
        if y is not None and not y.is_floating_point() and "out of bounds" in str(error):
            rule = f"`{name}` of `{caller}` must be classes from 0 to K − 1, for K outputs."
            do = "Number the classes from 0, and give the student an output for each."
            raise InputError(rule, got="labels out of this range", do=do) from error
        raise


def arguments_of_pairs(caller: str, arguments: Arguments, point: Point) -> None:
    """Reject pairs of samples whose other arguments differ."""
    if isinstance(point, AtMixedPairs) and arguments.of_samples:
        rule = f"`context` of `{caller}` must not have tensors of the samples at mixed pairs."
        do = "Use point=AtData(): a mixture of two samples has no mask, type or size of its own."
        raise InputError(rule, got=", ".join(arguments.values) or "nodes of graphs", do=do)
    if arguments.is_ragged:
        rule = f"`probe` of `{caller}` must not be DataPairs if x is Nodes: two graphs have different nodes."
        raise InputError(rule, do="Use RandomInputs(k).")


def tokens(caller: str, x: object, point: Point) -> None:
    """Check for TokenSubstitutions that x is a batch of token ids, and that the point does not move the inputs."""
    probe = f"`{caller}(probe=TokenSubstitutions(...))`"
    if not isinstance(x, Tensor) or x.dim() != 2 or x.is_floating_point() or not len(x):
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"`x` of {probe} must be token ids (batch, token).", got=got, do="Pass input_ids.")
    if not isinstance(point, AtData):
        rule = f"`point` of {probe} must be AtData(): token ids cannot be moved or mixed."
        raise InputError(rule, got=type(point).__name__, do="Leave it out.")


def vocabulary(caller: str, networks: list[object]) -> int:
    """Return the number of tokens in the vocabularies of all networks."""
    networks = [network.teacher if isinstance(network, MemoizedTeacher) else network for network in networks]
    modules = [network.module if isinstance(network, ModuleTeacher) else network for network in networks]
    if others := [type(module).__name__ for module in modules if isinstance(module, Teacher)]:
        rule = f"`teacher` of `{caller}(probe=TokenSubstitutions(...))` must be a network with embeddings."
        raise InputError(rule, got=", ".join(others), do="Pass the nn.Module.")
    return min(embedding_of(module).num_embeddings for module in modules if module is not None)


def unambiguous(caller: str, arguments: Arguments, x: Tensor, known: dict[str, int]) -> None:
    """Reject a tensor that was shared in a batch of another size, and now has as many rows as the batch.

    `known` has the numbers of rows of shared tensors by name; those of this call are added.
    """
    for name, value in arguments.values.items():
        if isinstance(value, Tensor) and known.get(name) == len(x):
            raise InputError(
                f"`{name}` in `context` of `{caller}` is ambiguous: its rows may be samples or not, because it had as "
                "many rows in a batch of another size.",
                got=f"{len(x)} rows for {len(x)} samples",
                do=f"Pass jacmatch.Shared({name}) if it is a table.",
            )
        if isinstance(value, Shared) and isinstance(value.value, Tensor) and value.value.dim():
            known[name] = len(value.value)


class SingleOutput(Exception):
    """Raised for outputs (B,), which an objective reshapes to (B, 1)."""


def not_single(outputs: Tensor) -> None:
    """Raise SingleOutput for outputs (B,)."""
    if outputs.dim() == 1:
        raise SingleOutput


def one_output_for_each(caller: str, outputs: Tensor, x: Tensor) -> None:
    """Reject outputs without a dimension after the batch, or with a different number of samples."""
    if outputs.dim() == 1 and len(outputs) == len(x):
        raise SingleOutput
    if outputs.dim() < 2 or len(outputs) != len(x):
        rule = f"`student` of `{caller}` must return outputs (batch, out), here ({len(x)}, out)."
        raise InputError(rule, got=f"shape {tuple(outputs.shape)}", do="A row of outputs for each sample.")


def one_for_each(caller: str, x: Tensor, **given: Tensor | None) -> None:
    """Reject tensors without one entry for each sample: torch would broadcast them."""
    for name, tensor in given.items():
        wanted = tuple(x.shape) if name == "partners" else (len(x),)
        if tensor is not None and tuple(tensor.shape[: len(wanted)]) != wanted:
            rule = f"`{name}` of `{caller}` must have one entry for each of the {len(x)} samples, of shape {wanted}."
            raise InputError(rule, got=f"shape {tuple(tensor.shape)}")


def without_ignored(labels: Tensor, ignored: int) -> Tensor:
    """Return per-position labels with IGNORED instead of the user's `ignore_index`."""
    if ignored == IGNORED or labels.dim() < 2 or labels.is_floating_point():
        return labels
    return labels.masked_fill(labels == ignored, IGNORED)


def selections(
    output: Select | tuple[Select | None, Select | None] | None, teacher: object, caller: str
) -> tuple[Select | None, Select | None]:
    """Return the selectors of student and teacher outputs; reject one that is not callable, or has no effect."""
    pair = output if isinstance(output, tuple) and len(output) == 2 else (output, output)
    for each in pair:
        if each is not None and not callable(each):
            rule = f"`output` of `{caller}` must be callable, or a pair of callables (student's, teacher's)."
            raise InputError(rule, got=type(each).__name__, do="For example output=lambda out: out[0].")
    if isinstance(output, tuple) and pair[1] is not None and not isinstance(teacher, nn.Module):
        rule = f"`output` of `{caller}` can select from a teacher's outputs only if the teacher is an nn.Module."
        raise InputError(rule, got=type(teacher).__name__, do="Use ModuleTeacher(network, output=...).")
    return pair


def separate(student: nn.Module, teacher: object) -> None:
    """Reject a student that shares parameters with its teacher, before the teacher is frozen."""
    if isinstance(teacher, EnsembleTeacher):
        for member in teacher.teachers:
            separate(student, member)
    if isinstance(teacher, MemoizedTeacher):
        separate(student, teacher.teacher)
    module = teacher.module if isinstance(teacher, ModuleTeacher) else teacher
    if not isinstance(module, nn.Module):
        return
    frozen = set(map(id, module.parameters()))
    if any(id(parameter) in frozen for parameter in student.parameters()):
        rule = "`student` and `teacher` of `Distillation` must not share parameters: the teacher is frozen."
        raise InputError(rule, do="Give the student a copy (copy.deepcopy).")


def answerable(caller: str, probe: Estimator | None, teacher: Teacher) -> None:
    """Reject directions on the output side if the teacher cannot compute vᵀJ."""
    if (probe is None or probe.side == "output") and not teacher.answers_vjp:
        raise UnsupportedError(
            f"`teacher` of `{caller}{_with_probe(probe)}` must answer vᵀJ; {type(teacher).__name__} "
            "has values only. Use probe=RandomInputs(k)."
        )
