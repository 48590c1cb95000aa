"""Distillation of networks with several heads: a dictionary of terms, and one pass of each network for all of them.

The outputs of all heads are packed into one tensor. A row vᵀJ of this tensor with v = 0 outside of a head is a row of
that head.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, Final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.errors import InputError
from jacmatch.jacobian import (
    AttentionPixel,
    BatchNormPolicy,
    Context,
    Engine,
    Estimator,
    Logits,
    NoiseAveraged,
    Readout,
    TokenSubstitutions,
)
from jacmatch.jacobian.estimators import Cost, Side
from jacmatch.jacobian.features import Select, Selection, Structure
from jacmatch.objectives import validation
from jacmatch.objectives.base import Computed, Objective
from jacmatch.objectives.compiled import Step
from jacmatch.objectives.differentiation import Differentiation
from jacmatch.objectives.distillation import Distillation
from jacmatch.objectives.terms import AtData, Batch, Point, Terms
from jacmatch.objectives.weights import WeightSchedule
from jacmatch.teachers import Answer, ModuleTeacher, Teacher

_SHARED: Final = (
    *("point", "every", "fraction", "engine", "chunk_size", "schedule", "batch_norm", "seed", "measure_every"),
    *("samples_per_class", "classes"),
)
"""Settings of `Distillation` that are not those of one head."""
_SEED: Final = 7919  # between the seeds of two heads, so that their directions are independent


class Heads(Objective):
    """Distillation of networks with several outputs; each head has its own labels, losses, weights and probe.

    The terms are named `head/labels`, `head/outputs` and `head/jacobians`. For each batch the teacher is queried once
    and the student runs once; a head with derivatives adds its backward passes. The `GradientShare` of a head is a
    share of the gradient of all terms.

    Args:
        student: The network to train, whose outputs are a dictionary, an object or a tuple.
        teacher: The teacher, an nn.Module. Only heads for which `outputs` or `jacobians` is not 0 must exist in the
            teacher.
        heads: Settings of `Distillation` by head: weights (`jacobians` is 0 where it is not given), `task`, losses,
            `probe`, `readout`, `class_dim`, … `output` selects the head, or a pair (student's, teacher's); by default
            that is the entry or attribute of this name. Probes on the input side must be the same in all heads.
        point: The inputs at which student and teacher are compared.
        chunk_size: Number of rows, over all heads, whose graphs are in memory at the same time.
        every, fraction, engine, schedule, batch_norm, seed, measure_every: As in `Distillation`, for all heads.

    Attributes:
        heads: An objective with the settings of each head.

    Raises:
        InputError: A setting is invalid, or must be the same for all heads, or is not supported for several heads.

    Example:
        >>> class Two(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body, self.kind, self.size = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 1)
        ...     def forward(self, x):
        ...         h = self.body(x).tanh()
        ...         return {"kind": self.kind(h), "size": self.size(h)}
        >>> objective = Heads(Two(), Two(), {"kind": {"jacobians": 0.1}, "size": {"task": "regression", "labels": 0}})
        >>> objective(torch.randn(4, 3), {"kind": torch.tensor([0, 1, 1, 0])}).keys()
        ['loss', 'kind/labels', 'kind/outputs', 'kind/jacobians', 'size/outputs']
    """

    labels_by_name: ClassVar[bool] = True

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | nn.Module | None,
        heads: Mapping[str, Mapping[str, Any]],
        *,
        point: Point | None = None,
        every: int = 1,
        fraction: float | int = 1.0,
        engine: Engine = "auto",
        chunk_size: int | None = None,
        schedule: WeightSchedule | None = None,
        batch_norm: BatchNormPolicy = "frozen",
        seed: int = 0,
        measure_every: int = 100,
    ) -> None:
        point = AtData() if point is None else point
        if not (isinstance(heads, Mapping) and all(isinstance(each, Mapping) for each in heads.values())):
            rule = "`heads` of `Heads` must be a dictionary with a dictionary of settings for each head."
            do = "For example {'kind': {'jacobians': 0.1}, 'size': {'task': 'regression'}}."
            raise InputError(rule, got=type(heads).__name__, do=do)
        made = {name: _head(name, student, teacher, settings, point) for name, settings in heads.items()}
        if not made:
            raise InputError("`heads` of `Heads` must have at least one head.", got="none")
        weights = {f"{name}/{term}": w for name, head in made.items() for term, w in head.loss_weights.weights.items()}
        taught = [name for name in made if weights[f"{name}/outputs"] or weights[f"{name}/jacobians"]]
        order = [*taught, *(name for name in made if name not in taught)]
        pairs = {name: _pair(heads[name].get("output")) for name in order}
        of_student = Selection(partial(_selected, {name: pairs[name][0] for name in order}, "student"), several=True)
        of_teacher = Selection(partial(_selected, {name: pairs[name][1] for name in taught}, "teacher"), several=True)
        assert of_student.structure is not None
        assert of_teacher.structure is not None
        derived = {name: head for name, head in made.items() if weights[f"{name}/jacobians"]}
        self.names, self.taught, self.derived = tuple(order), tuple(taught), tuple(derived)
        self.structures = (of_student.structure, of_teacher.structure)
        settings = {name: head.differentiation for name, head in derived.items()}
        of_outputs, of_targets = self.structures
        own = _Readouts({name: each.teacher_readout for name, each in settings.items()}, of_targets, of_targets)
        theirs = _Readouts({name: each.readout for name, each in settings.items()}, of_outputs, of_targets, own)
        self.probes = _Probes({name: each.probe for name, each in settings.items() if each.probe}, own.values)
        probe: Any = _common(self.probes.each) or self.probes
        readouts = (theirs, own) if derived else (Logits(), Logits())
        how = (probe, *readouts, point, batch_norm, engine, seed, chunk_size, fraction, "Heads")
        calls: dict[str, Any] = {"every": every, "measure_every": measure_every, "schedule": schedule}
        output = of_student if teacher is None else (of_student, of_teacher)
        super().__init__(student, teacher, weights, Differentiation(*how), output=output, **calls)
        if self.teacher is not None and not isinstance(self.teacher, ModuleTeacher):
            rule = "`teacher` of `Heads` must be a network that returns several outputs."
            raise InputError(rule, got=type(teacher).__name__, do="Distill each head with its own Distillation.")
        self.heads = made

    @property
    def derivative_terms(self) -> tuple[str, ...]:
        """The Jacobian terms of the heads."""
        return tuple(f"{name}/jacobians" for name in self.derived)

    def not_compiled(self) -> str | None:
        """Return why the steps of this objective are not compiled."""
        return "several heads are not compiled."

    def by_head(self, outputs: Float[Tensor, "batch entry"]) -> dict[str, Tensor]:
        """Return the student's outputs by head, from `Terms.student_outputs`, which has all of them in one row."""
        parts: dict[str, Tensor] = self.structures[0].unpack(outputs)
        return parts

    def forward(  # type: ignore[override]  # labels by head
        self,
        x: Float[Tensor, "batch *input"],
        y: Mapping[str, Tensor] | None = None,
        *,
        partner_labels: Mapping[str, Tensor] | None = None,
        **others: Any,
    ) -> Terms:
        """Compute the terms for a batch; see `Objective.forward`.

        Args:
            x: Raw inputs, the same for student and teacher.
            y: Labels by head, for heads whose label term has a weight.
            partner_labels: The labels of the partners by head.
            **others: Other arguments of `Objective.forward`.

        Raises:
            InputError: labels of a head are missing, a shape is wrong, or a head of student and teacher differs.
        """
        labels = self._labels(y, len(x))
        of_partners = {name: each.roll(1, 0) for name, each in labels.items()} if others.get("partners") is None else {}
        if partner_labels is not None:
            of_partners = self._labels(partner_labels, len(x))
        return super().forward(x, None, labels=labels, of_partners=of_partners, **others)

    def _terms(
        self,
        batch: Batch,
        count: int,
        *,
        measured: bool,
        labels: Mapping[str, Tensor] = MappingProxyType({}),
        of_partners: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Computed:
        if self.compiled is not None:
            self.compiled.give_up(self.not_compiled() or "")
        first, how = batch.part(slice(count)) if count else batch, self.differentiation
        if how.side == "output":
            known = labels if batch.share is None else {}
            probe: Any = replace(self.probes, labels={name: each[:count] for name, each in known.items()})
            how = replace(how, probe=probe)
        answer, of_all = self._answers(batch, count, partial(self._query, how))
        targets = None if of_all is None else of_all.outputs
        outputs, rows = self._in_parts(
            self.network, batch, len(first.x), lambda: how.of_student(self.network, first, answer, traced=measured)
        )
        validation.one_output_for_each("Heads", outputs, batch.x)
        steps = self._steps(batch, labels, of_partners, targets)
        wanted = {} if answer is None or answer.products is None else self._rows(answer.products)
        own_rows = {} if rows is None else self._rows(rows)
        unweighted: dict[str, Tensor] = {}
        for name, of_head in self.by_head(outputs).items():
            step, of_head = steps[name], _column(of_head)
            step.rows = wanted.get(name)
            self._check_head(name, of_head, step)
            with validation.explained("Heads", batch.x, step.labels, self.student, f"y[{name!r}]"):
                terms = self.heads[name]._comparison(of_head, of_head, own_rows.get(name), step)
            unweighted |= {f"{name}/{term}": value for term, value in terms.items()}
        return outputs, targets, unweighted, None

    def _labels(self, y: Mapping[str, Tensor] | None, samples: int) -> dict[str, Tensor]:
        """Return the labels of the heads that learn them."""
        wanted = [name for name in self.heads if self.loss_weights.weights[f"{name}/labels"]]
        given = y if isinstance(y, Mapping) else {}
        if missing := [name for name in wanted if not isinstance(given.get(name), Tensor)]:
            got = f"a dictionary with {', '.join(map(repr, given))}" if given else type(y).__name__
            rule = f"`y` of `Heads` must be a dictionary with the labels of {', '.join(map(repr, missing))}."
            raise InputError(rule, got=got, do="Set labels=0 in heads without labels.")
        labels = {name: validation.without_ignored(given[name], self.heads[name].ignore_index) for name in wanted}
        for name, each in labels.items():
            if len(each) != samples:
                rule = f"`y` of `Heads` must have one label of {name!r} for each sample."
                raise InputError(rule, got=f"{len(each)} for {samples} samples")
        return labels

    def _query(self, how: Differentiation, batch: Batch, *, products: bool) -> Answer | None:
        if self.teacher is None or not (
            products or any(self.loss_weights.weights[f"{n}/outputs"] for n in self.taught)
        ):
            return None
        return how.ask(self.teacher, batch, products=products)

    def _steps(
        self, batch: Batch, labels: Mapping[str, Tensor], others: Mapping[str, Tensor], targets: Tensor | None
    ) -> dict[str, Step]:
        """Return the tensors that each head is compared with, besides products."""
        taught = {} if targets is None else self.structures[1].unpack(targets)
        steps = {}
        for name in self.names:
            step = Step(batch.x, labels.get(name), share=batch.share)
            if batch.share is not None:
                step.partner_labels = others.get(name)
            if self.loss_weights.weights[f"{name}/outputs"] and name in taught:
                step.targets = _column(taught[name])
            steps[name] = step
        return steps

    def _rows(self, products: Tensor) -> dict[str, Tensor]:
        """Return the products of each head: its rows vᵀJ, or its entries of Jv."""
        if self.differentiation.side == "output":
            return dict(zip(self.derived, torch.split(products, self.probes.counts), strict=True))
        parts: dict[str, Tensor] = self.probes.values.unpack(products)
        return parts

    def _check_head(self, name: str, outputs: Tensor, step: Step) -> None:
        """Reject a head whose outputs differ from the teacher's, or whose classes are in an unknown dimension."""
        head = self.heads[name]
        if step.targets is not None and step.targets.shape != outputs.shape:
            raise _unlike(name, outputs.shape[1:], step.targets.shape[1:])
        uses_classes = head.task == "classification" and (
            step.labels is not None or (step.targets is not None and head.output_loss == "kl")
        )
        if outputs.dim() > 2 and head.class_dim is None and uses_classes:
            rule = f"`class_dim` of head {name!r} of `Heads` must be given for outputs of more than two dimensions."
            do = "Pass class_dim=1 for images (B, K, H, W), class_dim=-1 for tokens (B, T, K)."
            raise InputError(rule, got=f"shape {tuple(outputs.shape)}", do=do)
        labels = step.labels
        if labels is not None and labels.is_floating_point() and labels.dim() == 1 and outputs.dim() == 2:
            step.labels = labels[:, None]


def _head(
    name: str, student: nn.Module, teacher: Teacher | nn.Module | None, settings: Mapping[str, Any], point: Point
) -> Distillation:
    """Return the objective with the settings of a head."""
    if shared := [each for each in settings if each in _SHARED]:
        do = f"Pass it to Heads: {shared[0]}=..." if shared[0] in _SHARED[:-2] else "Leave it out."
        rule = f"A head of `Heads` must not have settings of the whole batch, in {name!r}."
        raise InputError(rule, got=shared[0], do=do)
    rest = {key: value for key, value in settings.items() if key != "output"}
    try:
        head = Distillation(student, teacher, **{"jacobians": 0.0, **rest}, point=point)
    except (InputError, TypeError) as error:
        raise InputError(f"Head {name!r} of `Heads` must have valid settings.", got=str(error)) from error
    how = head.differentiation
    averaged, pixels = isinstance(how.probe, NoiseAveraged), (how.readout, how.teacher_readout)
    refused = {
        "probe=NoiseAveraged(...)": averaged,
        "readout=AttentionPixel(...)": any(isinstance(each, AttentionPixel) for each in pixels),
        "jacobian_loss='relative'": head.jacobian_loss == "relative",
    }
    for setting in (setting for setting, used in refused.items() if used and head.takes_derivatives):
        rule = f"Head {name!r} of `Heads` must have settings that are supported for several heads."
        raise InputError(rule, got=setting, do="Distill this head by `Distillation(output=...)`.")
    return head


def _pair(output: Any) -> tuple[Select | None, Select | None]:
    return output if isinstance(output, tuple) and len(output) == 2 else (output, output)


def _selected(selects: Mapping[str, Select | None], network: str, returned: Any) -> dict[str, Tensor]:
    """Return the outputs of the heads."""
    parts = {}
    for name, select in selects.items():
        if select is not None:
            part = select(returned)
        else:
            part = returned.get(name, returned) if isinstance(returned, Mapping) else getattr(returned, name, returned)
        if part is returned and select is None:
            rule = f"The {network} of `Heads` must return head {name!r} as an entry or attribute of this name."
            got = ", ".join(map(repr, returned)) if isinstance(returned, Mapping) else type(returned).__name__
            of_labels = "" if network == "student" else ", or learn from labels alone: outputs=0, jacobians=0"
            raise InputError(rule, got=got, do=f"Select it by output= in the settings of the head{of_labels}.")
        if not isinstance(part, Tensor) or not part.is_floating_point():
            rule = f"Head {name!r} of the {network} of `Heads` must be a floating-point tensor."
            got = str(part.dtype) if isinstance(part, Tensor) else type(part).__name__
            raise InputError(rule, got=got, do="Leave it out of `heads`, or select another output by output=.")
        parts[name] = part
    return parts


def _column(outputs: Tensor) -> Tensor:
    return outputs[:, None] if outputs.dim() == 1 else outputs


def _unlike(name: str, student: torch.Size, teacher: torch.Size) -> InputError:
    rule = f"Student and teacher of `Heads` must have the same outputs in head {name!r}."
    return InputError(rule, got=f"{tuple(student)} and {tuple(teacher)}", do="Select others by output=(…, …).")


def _common(probes: Mapping[str, Estimator]) -> Estimator | None:
    """Return the probe of all heads where they must share it: on the input side, and for token substitutions."""
    shared = (each for each in probes.values() if isinstance(each, TokenSubstitutions) or each.side == "input")
    first = next(shared, None)
    if first is not None and any(each != first for each in probes.values()):
        rule = "Probes on the input side, and TokenSubstitutions, must be the same in all heads of `Heads`."
        raise InputError(rule, got=", ".join(f"{name}: {type(each).__name__}" for name, each in probes.items()))
    return first


@dataclass
class _Readouts:
    """The readouts of the heads, whose values are packed as one row for each sample."""

    each: Mapping[str, Readout]  # readout of each head with derivatives
    structure: Structure  # structure of the network's outputs
    teachers: Structure  # structure of the teacher's outputs
    expected: "_Readouts | None" = None  # the readouts of the teacher, whose values must have the same shapes
    values: Structure = field(default_factory=Structure)  # structure of the values

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that the readouts read."""
        return tuple(layer for readout in self.each.values() for layer in readout.layers)

    def __call__(self, outputs: Tensor, features: Mapping[str, Tensor], context: Context) -> Tensor:
        """Return the values of all heads (B, R)."""
        parts, of_teacher = self.structure.unpack(outputs), context.teacher_outputs
        taught = {} if of_teacher is None else self.teachers.unpack(of_teacher)
        values = {}
        for name, readout in self.each.items():
            about = replace(context, teacher_outputs=_column(taught[name]) if name in taught else None)
            values[name] = readout(_column(parts[name]), features, about)
        expected = () if self.expected is None else self.expected.values.shapes
        for name, shape in zip(values, expected, strict=False):
            if values[name].shape[1:] != shape:
                raise _unlike(name, values[name].shape[1:], shape)
        return self.values.read("The values of all heads", values)


@dataclass
class _Probes:
    """The probes of the heads on the output side: their directions, with zeros outside of each head."""

    side: ClassVar[Side] = "output"
    each: Mapping[str, Estimator]  # probe of each head with derivatives
    values: Structure  # structure of the teacher's values
    labels: Mapping[str, Tensor] = field(default_factory=dict)  # labels of the heads that have them
    counts: list[int] = field(default_factory=list)  # number of directions of each head, as of the last call

    def directions(self, *, outputs: Tensor, labels: object, seed: int, **about: Any) -> Tensor:
        """Return the directions (P, B, R)."""
        rows, before = [], 0
        for number, (name, values) in enumerate(self.values.unpack(outputs).items()):
            about |= {"seed": seed + _SEED * number, "labels": self.labels.get(name)}
            v = self.each[name].directions(outputs=values, **about).flatten(2)
            rows.append(nn.functional.pad(v, (before, outputs.shape[1] - before - v.shape[2])))
            before += v.shape[2]
        self.counts[:] = map(len, rows)
        return torch.cat(rows)

    def variance(self, matrix: Tensor, *, outputs: Tensor | None = None) -> float:
        """Return the sum of the heads' variances: their directions are independent."""
        parts = self.values.unpack(matrix.T)
        values = {} if outputs is None else self.values.unpack(outputs[None])
        one = {name: None if outputs is None else values[name].flatten() for name in parts}
        return sum(self.each[name].variance(part.flatten(1).T, outputs=one[name]) for name, part in parts.items())

    def passes(self, outputs: int) -> Cost:
        """Return the sum of the heads' passes, each for this number of outputs."""
        each = [astuple(probe.passes(outputs)) for probe in self.each.values()]
        return Cost(*map(sum, zip(*each, strict=True)))
