"""Teachers made of other teachers: the mean of several, and one whose answers are stored in memory."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.former_names import former
from jacmatch.jacobian import Arguments, Logits, finite_differences
from jacmatch.teachers.base import (
    Answer,
    Question,
    Teacher,
    fitting_tangents,
    frozen_pass,
    readout_jvp,
    readout_vjp,
    values_of,
)
from jacmatch.teachers.functions import ModuleTeacher


class EnsembleTeacher:
    """The mean of the outputs of several teachers; its Jacobian is the mean of theirs.

    If output directions depend on the outputs, the members are queried twice, because the directions are computed from
    the mean of the outputs.

    Args:
        teachers: At least one teacher; all have the same number of outputs.

    Raises:
        InputError: The list is empty, or a member is not a teacher.

    Example:
        >>> from jacmatch.teachers.functions import ModuleTeacher
        >>> one, two = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        >>> mean = EnsembleTeacher([ModuleTeacher(one), ModuleTeacher(two)]).answer(torch.ones(4, 3)).outputs
        >>> torch.allclose(mean, (one(torch.ones(4, 3)) + two(torch.ones(4, 3))) / 2)
        True
    """

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        if not teachers:
            raise InputError("`teachers` of `EnsembleTeacher` must not be empty.")
        for teacher in teachers:
            _check_teacher("Each of `teachers` of `EnsembleTeacher`", teacher)
        self.teachers = tuple(teachers)

    @property
    def answers_vjp(self) -> bool:
        """Whether all members answer vᵀJ."""
        return all(teacher.answers_vjp for teacher in self.teachers)

    def answer(self, x: Float[Tensor, "batch *input"], question: Question | None = None) -> Answer:
        """Return the mean outputs at x and the products of the query.

        Raises:
            InputError: the members have different numbers of outputs.
            UnsupportedError: the query has features, which members need not share.
        """
        question = question or Question()
        if question.layers or question.readout.layers:
            rule = "Features are those of one network; EnsembleTeacher has outputs only. Use a readout of the outputs."
            raise UnsupportedError(rule)
        x = x.detach()
        with frozen_pass(x):
            if question.step is not None and question.tangents is not None:
                return self._differences(x, question)
            outputs, jv = self._mean(x, replace(question, readout=Logits(), cotangents=None))
            if question.cotangents is not None:
                values, w, v = readout_vjp(question, outputs)
                _, rows = self._mean(x, Question(cotangents=w, arguments=question.arguments))
                return Answer(outputs, values, rows, cotangents=v)
            if jv is not None:
                values, products = readout_jvp(question, outputs, jv)
                return Answer(outputs, values, products)
            return Answer(outputs, values_of(question, outputs))

    def _differences(self, x: Tensor, question: Question) -> Answer:
        """Antithetic differences of the readout of the mean, which are not the mean of the members' differences."""
        outputs, _ = self._mean(x, Question(arguments=question.arguments))
        products = finite_differences.central(
            lambda z: values_of(question, self._mean(z, Question(arguments=question.arguments))[0]),
            x,
            fitting_tangents(question, x),
            step=question.step,
        )
        return Answer(outputs, values_of(question, outputs), products)

    def _mean(self, x: Tensor, question: Question) -> tuple[Tensor, Tensor | None]:
        answers = [teacher.answer(x, question) for teacher in self.teachers]
        sizes = {answer.outputs.shape[1] for answer in answers}
        if len(sizes) > 1:
            raise InputError("All members of `EnsembleTeacher` must have the same outputs.", got=sorted(sizes))
        products = [answer.products for answer in answers if answer.products is not None]
        mean = torch.stack(products).mean(0) if products else None
        return torch.stack([answer.outputs for answer in answers]).mean(0), mean


_ROUNDING = (1e-3, 1e-2)  # relative to the largest output, on a CPU and on a GPU: other order of sums, TF32
_BATCH_SECOND = ("products", "cotangents")  # (P, B, …); all else in an answer is (B, …)


@dataclass
class _Entry:
    """The query about one sample, and its answer."""

    x: Tensor
    labels: Tensor | None
    arguments: Arguments | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)


class MemoizedTeacher:
    """A teacher that stores the answers of another teacher in memory.

    A query is memoized if it has `ids`, is not `random` and has no tangents; if it has cotangents, it needs a `rule`.
    Readout and rule must be hashable. With `draws`, queries that are `random` or have tangents with a `rule` are
    memoized too, by id and draw; use this for a training with `views`, whose points and directions repeat. A stored
    answer is returned only if readout, rule and layers are equal, and x, its context and the label are equal to the
    stored ones bit for bit. Otherwise the teacher is queried for the whole batch.

    The teacher must be frozen and must process samples independently, as all teachers of this package do. Answers for
    the same sample in different batches may differ by rounding. When a batch is answered from memory for the 1st, 16th,
    256th, … time, the teacher is queried as well, and both answers are compared. If the weights of a network have been
    changed in place, all stored answers are dropped.

    Args:
        teacher: The teacher to query.
        limit: Maximum number of bytes in memory. When it is reached, further answers are not stored.
        draws: Whether random queries are memoized by their draw.

    Attributes:
        queried: Number of samples for which the teacher was queried.
        memoized: Number of samples that were answered from memory.
        bytes: Number of bytes in memory.

    Raises:
        InputError: `teacher` is not a teacher, or `limit` is below 0.

    Example:
        >>> from jacmatch.teachers.functions import ModuleTeacher
        >>> teacher = MemoizedTeacher(ModuleTeacher(torch.nn.Linear(3, 2)))
        >>> question = Question(ids=torch.arange(4))
        >>> first, second = (teacher.answer(torch.ones(4, 3), question) for _ in range(2))
        >>> torch.equal(first.outputs, second.outputs), teacher.queried, teacher.memoized
        (True, 4, 4)
    """

    def __init__(self, teacher: Teacher, *, limit: int = 2**31, draws: bool = False) -> None:
        _check_teacher("`teacher` of `MemoizedTeacher`", teacher)
        if limit < 0:
            raise InputError("`limit` of `MemoizedTeacher` must be at least 0.", got=limit)
        self.teacher, self.limit, self.draws = teacher, limit, draws
        self.queried, self.memoized, self.bytes = 0, 0, 0
        self._repeats, self._next_check = 0, 1
        self._memory: dict[Hashable, dict[int, _Entry]] = {}
        self._versions: list[int] = []

    asked = former("MemoizedTeacher", "asked", "queried")
    remembered = former("MemoizedTeacher", "remembered", "memoized")

    @property
    def answers_vjp(self) -> bool:
        """Whether the teacher answers vᵀJ."""
        return self.teacher.answers_vjp

    def answer(self, x: Float[Tensor, "batch *input"], question: Question | None = None) -> Answer:
        """Return the teacher's answer, from memory if it is stored.

        Raises:
            InputError: The teacher's answer to the same query has changed.
        """
        question = question or Question()
        kinds = (question.cotangents is None, question.tangents is None, question.step)
        key = (question.readout, question.rule, *kinds, question.layers, question.draw if question.random else None)
        random = question.random and not (self.draws and question.draw is not None)
        if question.ids is None or random or not self._is_repeatable(question) or not _is_hashable(key):
            self.queried += len(x)
            return self.teacher.answer(x, question)
        if self._versions != (versions := [weight._version for weight in _weights(self.teacher)]):
            self._memory, self.bytes, self._versions = {}, 0, versions
        memory = self._memory.setdefault(key, {})
        ids = question.ids.tolist()
        if all(_same(memory.get(number), x, question, row) for row, number in enumerate(ids)):
            self.memoized += len(ids)
            known = _joined([memory[number].parts for number in ids])
            self._repeats += 1
            if self._repeats == self._next_check:
                self._next_check *= 16
                self._check(x, question, known)
            return known
        self.queried += len(ids)
        answer = self.teacher.answer(x, question)  # for the whole batch: the cotangents are those of the batch
        self._store(memory, ids, x, question, answer)
        return answer

    def _is_repeatable(self, question: Question) -> bool:
        """Return whether there are no directions, or a rule determines them; on the input side also their draw."""
        if question.tangents is not None:
            return self.draws and question.rule is not None
        return question.cotangents is None or question.rule is not None

    def _check(self, x: Tensor, question: Question, known: Answer) -> None:
        """Refuse a teacher whose answer about most of these samples has changed."""
        now = self.teacher.answer(x, question).outputs
        far = (now - known.outputs).abs().flatten(1).amax(1)
        tolerance = _ROUNDING[x.device.type == "cuda"] * torch.maximum(now.abs().max(), known.outputs.abs().max())
        changed = int((far > tolerance).sum())
        if 2 * changed > len(x):
            rule = "`teacher` of `MemoizedTeacher` must give the same answer to the same query each time."
            do = "Freeze it (evaluation mode, fixed weights, no noise), or do not memoize it."
            raise InputError(rule, got=f"another answer for {changed} of {len(x)} samples", do=do)

    def _store(self, memory: dict[int, _Entry], ids: list[int], x: Tensor, question: Question, answer: Answer) -> None:
        """Store the answers for new ids; an entry is never replaced."""
        for row, number in enumerate(ids):
            if number in memory:
                continue
            entry = _Entry(x[row].clone(), None if question.labels is None else question.labels[row].clone())
            if question.arguments is not None:
                entry.arguments = question.arguments.part(slice(row, row + 1)).clone()
            entry.parts = {name: part.clone() for name, part in _parts(answer, row).items()}
            size = sum(part.numel() * part.element_size() for part in (entry.x, *entry.parts.values()))
            if self.bytes + size > self.limit:
                return
            memory[number] = entry
            self.bytes += size


def _check_teacher(what: str, given: object) -> None:
    if not isinstance(given, Teacher):
        raise InputError(
            f"{what} must be a teacher.", got=type(given).__name__, do="Wrap a network into ModuleTeacher."
        )


def _weights(teacher: Teacher) -> list[Tensor]:
    """Return parameters and buffers of the networks of a teacher."""
    if isinstance(teacher, EnsembleTeacher):
        return [weight for each in teacher.teachers for weight in _weights(each)]
    module = teacher.module if isinstance(teacher, ModuleTeacher) else None
    return [] if module is None else [*module.parameters(), *module.buffers()]


def _is_hashable(key: Hashable) -> bool:
    """Return whether this can be looked up; a readout that is a dataclass and not frozen cannot."""
    try:
        hash(key)
    except TypeError:
        return False
    return True


def _same(entry: _Entry | None, x: Tensor, question: Question, row: int) -> bool:
    """Return whether this sample is that of the entry."""
    labels, arguments = question.labels, question.arguments
    if entry is None or (entry.labels is None) != (labels is None):
        return False
    if entry.x.dtype != x.dtype or entry.x.device != x.device or not torch.equal(entry.x, x[row]):
        return False
    if (entry.arguments is None) != (arguments is None):
        return False
    if arguments is not None and not arguments.part(slice(row, row + 1)).same(entry.arguments):
        return False
    return labels is None or entry.labels is None or torch.equal(entry.labels, labels[row])


def _parts(answer: Answer, row: int) -> dict[str, Tensor]:
    """Return the parts of an answer about one sample, by name."""
    parts = {"outputs": answer.outputs[row], "values": answer.values[row]}
    for name in _BATCH_SECOND:
        whole = getattr(answer, name)
        if whole is not None:
            parts[name] = whole[:, row]
    return parts | {f"feature {name}": value[row] for name, value in answer.features.items()}


def _joined(rows: list[dict[str, Tensor]]) -> Answer:
    """Return one answer about several samples."""
    parts = {name: torch.stack([row[name] for row in rows], int(name in _BATCH_SECOND)) for name in rows[0]}
    features = {name.removeprefix("feature "): part for name, part in parts.items() if name.startswith("feature ")}
    return Answer(parts["outputs"], parts["values"], parts.get("products"), features, parts.get("cotangents"))
