"""Transfer from a pretrained teacher with other classes: labels + outputs (LwF) + attention maps + their Jacobians."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import AttentionMaps, BatchNormPolicy, Context, Engine, Readout, run
from jacmatch.jacobian.modules import in_mode
from jacmatch.losses import JacobianLoss, OutputLoss, attention_map, attention_transfer, match_sizes
from jacmatch.losses.outputs import precise
from jacmatch.models import FirstOutputs
from jacmatch.objectives import validation
from jacmatch.objectives.base import Computed, Objective, Output
from jacmatch.objectives.differentiation import Differentiation
from jacmatch.objectives.terms import AtData, Batch, Point, jacobian_term, label_term, output_term
from jacmatch.objectives.weights import GradientShare, WeightSchedule
from jacmatch.teachers import Answer, Question, Teacher
from jacmatch.teachers.base import query

Pair = tuple[str, str]
"""Dotted paths of a layer of the student and of the teacher's layer that it is compared with."""


class Transfer(Objective):
    """Labels of the target task, the teacher's outputs, its attention maps and their gradients: ℓ = Σⱼ wⱼ ℓⱼ.

    The last layer of the student has the K outputs of the target task, followed by as many as the teacher has. On
    images of the target task, the first outputs learn the labels, and the others learn the outputs of the pretrained
    teacher (learning without forgetting). For each pair of layers both attention maps A = Σ_c |Z_c|^p are pooled to one
    size and compared up to scale, ‖A_S/‖A_S‖ − A_T/‖A_T‖‖². The gradients of one pixel of the maps with respect to the
    raw image are compared as well (`jacobian_loss`): the pixel at which the teacher's pooled map is largest. Both terms
    are means over the pairs and over the batch.

    The teacher is queried once and the student run once for each batch, with one vᵀJ for each pair in both networks.
    Nothing is random, so a `MemoizedTeacher` computes each image only once. The attribute `student` is the network with
    the outputs of the target task only, which is validated and saved.

    Args:
        student: The network to train, with outputs (B, K + K_T).
        teacher: A teacher or an nn.Module with outputs (B, K_T); None for labels alone.
        classes: K, the number of classes of the target task.
        pairs: Pairs of layers to compare; required if `attention` or `jacobians` has a weight.
        labels: Weight of the cross-entropy with the labels.
        outputs: Weight of the output term.
        attention: Weight of the attention term; a `GradientShare` is the share of the gradient norm.
        jacobians: Weight of the Jacobian term, likewise.
        size: Height and width that all maps are pooled to; None takes the smaller of the two maps of each pair.
        p: Exponent of the attention maps, at least 1; above 1 if derivatives are taken.
        output_loss: Hinton's `kl` with τ², or `squared` logit differences (as in the precursor).
        temperature: τ of `kl`; learning without forgetting uses 2.
        jacobian_loss: `normalized` (the paper's: the scale of a map is arbitrary), `relative` or `squared`.
        engine: `auto` or `reverse`: the gradient of a pixel is a row vᵀJ, for which there is no other engine.
        every, fraction, chunk_size, schedule, batch_norm, measure_every, output: As in `Distillation`.
        point: The images at which all terms are compared: `AtData` (None), or `AtMixedPairs`, which mixes labels too.
        shared: Whether the teacher was adapted to the target task: its outputs are then the K classes, and the student
            has one head (B, K) that learns from labels and teacher.
        seed: Seeds the mixtures.

    Raises:
        InputError: a setting is invalid, or two settings are incompatible.
        UnsupportedError: the teacher cannot compute vᵀJ.

    References:
        Srinivas & Fleuret 2018, arXiv:1803.00443, section 5 and equation 10, as re-implementations and notes report it;
        the ICML text was not available. Li & Hoiem 2016, arXiv:1606.09282 (LwF). Zagoruyko & Komodakis 2017,
        arXiv:1612.03928 (attention maps).

    Example:
        >>> def network(outputs, width):
        ...     return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, outputs))
        >>> objective = Transfer(network(2 + 5, 3), network(5, 8), classes=2, pairs=[("1", "1")])
        >>> terms = objective(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 1, 0]))
        >>> terms.keys(), terms.student_outputs.shape
        (['loss', 'labels', 'outputs', 'attention', 'jacobians'], torch.Size([4, 2]))
    """

    student: FirstOutputs

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | nn.Module | None = None,
        *,
        classes: int,
        pairs: Sequence[Pair] = (),
        labels: float | int = 1.0,
        outputs: float | int = 1.0,
        attention: float | int = GradientShare(0.2),
        jacobians: float | int = GradientShare(0.2),
        size: int | None = None,
        p: float = 2.0,
        output_loss: OutputLoss = "kl",
        temperature: float | int = 2.0,
        jacobian_loss: JacobianLoss = "normalized",
        every: int = 1,
        fraction: float | int = 1.0,
        engine: Engine = "auto",
        chunk_size: int | None = None,
        schedule: WeightSchedule | None = None,
        batch_norm: BatchNormPolicy = "frozen",
        measure_every: int = 100,
        output: Output = None,
        point: Point | None = None,
        shared: bool = False,
        seed: int = 0,
    ) -> None:
        if teacher is None:
            outputs = attention = jacobians = 0.0
        weights = {"labels": labels, "outputs": outputs, "attention": attention, "jacobians": jacobians}
        calls: dict[str, Any] = {"every": every, "schedule": schedule, "measure_every": measure_every}
        settings: dict[str, Any] = {"batch_norm": batch_norm, "engine": engine, "seed": seed, "fraction": fraction}
        settings |= {"point": AtData() if point is None else point, "chunk_size": chunk_size}
        how = Differentiation(None, caller="Transfer", **settings)  # the rows are those of the largest pixels
        super().__init__(FirstOutputs(student, classes), teacher, weights, how, output=output, **calls)
        self.pairs, self.size, self.p, self.shared = tuple(pairs), size, p, shared
        self.output_loss, self.temperature, self.jacobian_loss = output_loss, temperature, jacobian_loss
        self._sizes: dict[tuple[int, ...], tuple[tuple[int, int], ...]] = {}
        validation.known_names("Transfer", output_loss=output_loss, jacobian_loss=jacobian_loss)
        validation.positive_settings("Transfer", temperature=temperature)
        self._check(attention, jacobians)

    def _check(self, attention: float | int, jacobians: float | int) -> None:
        if (attention or jacobians) and not self.pairs:
            do = 'Give for example pairs=[("features.conv4", "layer2")].'
            raise InputError("`pairs` of `Transfer` must name layers if maps are compared.", got="none", do=do)
        if self.size is not None and self.size < 1:
            raise InputError("`size` of `Transfer` must be at least 1.", got=self.size)
        if not (self.p > 1 or (self.p == 1 and not jacobians)):
            rule = "`p` of `Transfer` must be above 1 (1 without derivatives), else the maps have no derivative at 0."
            raise InputError(rule, got=self.p, do="Omit it for the default, 2.")
        if jacobians and self.teacher is not None and not self.teacher.answers_vjp:
            rule = f"`teacher` of `Transfer` must answer vᵀJ; {type(self.teacher).__name__} cannot. Use jacobians=0."
            raise UnsupportedError(rule)

    def _terms(self, batch: Batch, count: int, *, measured: bool) -> Computed:
        mapped = bool(count or self.loss_weights.weights["attention"])
        answer, answers = self._answers(batch, count, partial(self._query, mapped=mapped))
        outputs, maps, products = self._student(batch, answer, count, traced=measured)
        terms = self._of_whole_batch(batch, answers, outputs, maps)
        rows = None if answer is None else answer.products
        if rows is not None and products is not None:
            terms["jacobians"] = jacobian_term(self.jacobian_loss, products, rows)
        teacher_outputs = None if answers is None else answers.outputs
        return outputs[:, : self.student.outputs], teacher_outputs, terms, rows

    def not_compiled(self) -> str | None:
        """Return why the steps of this objective are not compiled."""
        return "Transfer is not compiled: it reads inner layers of the networks."

    def _query(self, batch: Batch, *, products: bool, mapped: bool) -> Answer | None:
        """Return the teacher's answer, whose values are the attention maps if `mapped`; None if none is needed."""
        weights = self.loss_weights.weights
        if self.teacher is None or not (products or weights["outputs"] or weights["attention"]):
            return None
        about: dict[str, Any] = {"ids": batch.ids, "draw": batch.draw, "arguments": batch.arguments}
        if mapped:
            about["readout"] = maps = self._maps(batch, 1)
        if products:
            about |= {"cotangents": maps.largest, "rule": "largest pixels"}
        return query(self.teacher, batch.x, Question(random=batch.share is not None, **about))

    def maps(self, x: Float[Tensor, "batch *input"], side: Literal[0, 1]) -> AttentionMaps:
        """Return the readout of the student (0) or teacher (1) for inputs of this shape; map sizes are equal."""
        return self._maps(Batch(x, None, x, None, None, torch.arange(len(x)), 0), side)

    def _maps(self, batch: Batch, side: Literal[0, 1]) -> AttentionMaps:
        shape = tuple(batch.x.shape[1:])
        if shape not in self._sizes:
            self._sizes[shape] = self._common_sizes(batch.part(slice(1)))
        return AttentionMaps(tuple(pair[side] for pair in self.pairs), self._sizes[shape], self.p)

    def _common_sizes(self, first: Batch) -> tuple[tuple[int, int], ...]:
        """Return the size of each pair's maps: `size`, but never larger than either map."""
        assert self.teacher is not None
        mine, theirs = (tuple(dict.fromkeys(pair[side] for pair in self.pairs)) for side in (0, 1))
        with in_mode(self.student, training=False), torch.no_grad():
            _, own = run(self.student.network, first.x, mine, arguments=first.arguments)
        about = Question(layers=theirs, arguments=first.arguments)
        other = query(self.teacher, first.x, about).features
        sizes = []
        for student_layer, teacher_layer in self.pairs:
            both = match_sizes(attention_map(own[student_layer]), attention_map(other[teacher_layer]))
            height, width = both[0].shape[1:]
            sizes.append((height, width) if self.size is None else (min(self.size, height), min(self.size, width)))
        return tuple(sizes)

    def _student(
        self, batch: Batch, answer: Answer | None, count: int, *, traced: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return all outputs, the attention maps, and the rows of the first `count` samples, each only if needed."""
        network, attention = self.student.network, bool(self.loss_weights.weights["attention"])

        def plain(batch: Batch) -> tuple[Tensor, Tensor | None]:
            if not attention:
                return run(network, batch.x, arguments=batch.arguments)[0], None
            readout: Readout = self._maps(batch, 0)
            layers = tuple(dict.fromkeys(readout.layers))
            outputs, features = run(network, batch.x, layers, arguments=batch.arguments)
            return outputs, readout(outputs, features, Context())

        if answer is None or answer.products is None:
            return *plain(batch), None
        assert answer.cotangents is not None
        readout, v, first = self._maps(batch, 0), answer.cotangents, batch.part(slice(count))
        others = Context(arguments=first.arguments)

        def derive() -> tuple[tuple[Tensor, Tensor], Tensor]:
            result = self.differentiation.products(network, first.x, v, readout, others, traced=traced)
            return (result.outputs, result.values), result.products

        both, products = self._in_parts(network, batch, count, derive, plain)
        return *both, products

    def _of_whole_batch(
        self, batch: Batch, answer: Answer | None, outputs: Tensor, maps: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the terms without derivatives."""
        weights, terms = self.loss_weights.weights, {}
        classes = self.student.outputs
        if weights["labels"]:
            assert batch.labels is not None
            mixed = (batch.partner_labels, batch.share)
            terms["labels"] = label_term("classification", outputs[:, :classes], batch.labels, *mixed)
        if answer is not None and weights["outputs"]:
            source = outputs if self.shared else outputs[:, classes:]
            if source.shape != answer.outputs.shape:
                both = f"{classes} + {answer.outputs.shape[1]}"
                do = f"Build it with {both} outputs: the classes of the target, then the teacher's."
                do = "With `shared` the teacher has the classes of the target." if self.shared else do
                rule = "`student` of `Transfer` must have outputs for the classes of the target and of the teacher."
                raise InputError(rule, got=f"{outputs.shape[1]} outputs", do=do)
            terms["outputs"] = output_term(self.output_loss, source, answer.outputs, self.temperature)
        if answer is not None and maps is not None and weights["attention"]:
            pairs = zip(*(self._maps(batch, 0).maps(precise(each)) for each in (maps, answer.values)), strict=True)
            terms["attention"] = torch.stack([attention_transfer(s, t).mean() for s, t in pairs]).mean()
        return terms
