"""A teacher that is asked once for each sample: its answers are kept in memory."""

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from jacmatch.errors import InputError
from jacmatch.teachers.base import Answer, Question, Teacher

_ROUNDING = (1e-3, 1e-2)  # of the largest output, on a CPU and on a GPU: sums in another order, shorter products
_BATCH_SECOND = ("products", "cotangents")  # (P, B, …); all else in an answer is (B, …)


@dataclass
class _Kept:
    """What was asked about a sample, and the answer about it."""

    x: Tensor
    labels: Tensor | None
    parts: dict[str, Tensor] = field(default_factory=dict)


class RememberedTeacher:
    """The answers of another teacher, each computed at its first use and then kept.

    A question is remembered if it has `ids` and is not `random`: no input directions, and cotangents only with
    a `rule`; its readout and rule must be hashable. An answer is given again only if readout, rule and layers are equal
    and x and the label of that id are those of then, bit for bit; else the teacher itself is asked, about the whole
    batch. So augmented images cost what they cost without.
    The teacher must be frozen and treat each sample by itself, as every teacher of this package does; answers of
    another batch can differ from those of this one by rounding. The first time that a batch could be answered from
    memory, and then the 16th, the 256th, …, the teacher is asked all the same, and its answer is compared.

    Args:
        teacher: Who is asked.
        limit: Bytes to keep at most; beyond, the teacher itself is asked.

    Raises:
        InputError: `teacher` is none, or `limit` is below 0.

    Example:
        >>> from jacmatch.teachers.module import ModuleTeacher
        >>> teacher = RememberedTeacher(ModuleTeacher(torch.nn.Linear(3, 2)))
        >>> question = Question(ids=torch.arange(4))
        >>> first, second = (teacher.answer(torch.ones(4, 3), question) for _ in range(2))
        >>> torch.equal(first.outputs, second.outputs), teacher.asked, teacher.remembered
        (True, 4, 4)
    """

    def __init__(self, teacher: Teacher, *, limit: int = 2**31) -> None:
        if not isinstance(teacher, Teacher):
            do = "Wrap a network into ModuleTeacher."
            raise InputError("`teacher` of `RememberedTeacher` must be a teacher.", got=type(teacher).__name__, do=do)
        if limit < 0:
            raise InputError("`limit` of `RememberedTeacher` must be at least 0.", got=limit)
        self.teacher, self.limit = teacher, limit
        self.asked, self.remembered, self.bytes = 0, 0, 0
        self._repeats, self._next_check = 0, 1
        self._memory: dict[Hashable, dict[int, _Kept]] = {}

    @property
    def answers_vjp(self) -> bool:
        """Whether the teacher answers vᵀJ."""
        return self.teacher.answers_vjp

    def answer(self, x: Float[Tensor, "batch *input"], question: Question | None = None) -> Answer:
        """The teacher's answer; `asked` and `remembered` count the samples on either way.

        Raises:
            InputError: The teacher does not say any more what it said before.
        """
        question = question or Question()
        key = (question.readout, question.rule, question.cotangents is None, question.layers)
        if question.ids is None or question.random or not _is_repeatable(question) or not _is_hashable(key):
            self.asked += len(x)
            return self.teacher.answer(x, question)
        memory = self._memory.setdefault(key, {})
        ids = question.ids.tolist()
        if all(_same(memory.get(number), x, question.labels, row) for row, number in enumerate(ids)):
            self.remembered += len(ids)
            known = _joined([memory[number].parts for number in ids])
            self._repeats += 1
            if self._repeats == self._next_check:
                self._next_check *= 16
                self._check(x, question, known)
            return known
        self.asked += len(ids)
        answer = self.teacher.answer(x, question)  # of the whole batch: its cotangents are made for that
        self._keep(memory, ids, x, question, answer)
        return answer

    def _check(self, x: Tensor, question: Question, known: Answer) -> None:
        """Refuses a teacher that says something else now about most of these samples: memory would hide it."""
        now = self.teacher.answer(x, question).outputs
        far = (now - known.outputs).abs().flatten(1).amax(1)
        tolerance = _ROUNDING[x.device.type == "cuda"] * torch.maximum(now.abs().max(), known.outputs.abs().max())
        changed = int((far > tolerance).sum())
        if 2 * changed > len(x):
            rule = "`teacher` of `RememberedTeacher` must give the same answer to the same question each time."
            do = "Freeze it: evaluation mode, fixed weights, no noise; or pass the teacher itself, which is then asked."
            raise InputError(rule, got=f"another answer about {changed} of {len(x)} samples", do=do)

    def _keep(self, memory: dict[int, _Kept], ids: list[int], x: Tensor, question: Question, answer: Answer) -> None:
        """Remembers ids that are new; what is known of an id is never replaced."""
        for row, number in enumerate(ids):
            if number in memory:
                continue
            kept = _Kept(x[row].clone(), None if question.labels is None else question.labels[row].clone())
            kept.parts = {name: part.clone() for name, part in _parts(answer, row).items()}
            size = sum(part.numel() * part.element_size() for part in (kept.x, *kept.parts.values()))
            if self.bytes + size > self.limit:
                return
            memory[number] = kept
            self.bytes += size


def _is_repeatable(question: Question) -> bool:
    """Whether there are no input directions, and cotangents are none, or those of a rule."""
    return question.tangents is None and (question.cotangents is None or question.rule is not None)


def _is_hashable(key: Hashable) -> bool:
    """Whether this can be looked up; a readout that is a dataclass and not frozen cannot."""
    try:
        hash(key)
    except TypeError:
        return False
    return True


def _same(kept: _Kept | None, x: Tensor, labels: Tensor | None, row: int) -> bool:
    """Whether this sample is the one that was kept."""
    if kept is None or (kept.labels is None) != (labels is None):
        return False
    if kept.x.dtype != x.dtype or kept.x.device != x.device or not torch.equal(kept.x, x[row]):
        return False
    return labels is None or kept.labels is None or torch.equal(kept.labels, labels[row])


def _parts(answer: Answer, row: int) -> dict[str, Tensor]:
    """What an answer says about one sample, by name."""
    parts = {"outputs": answer.outputs[row], "values": answer.values[row]}
    for name in _BATCH_SECOND:
        whole = getattr(answer, name)
        if whole is not None:
            parts[name] = whole[:, row]
    return parts | {f"feature {name}": value[row] for name, value in answer.features.items()}


def _joined(rows: list[dict[str, Tensor]]) -> Answer:
    """One answer about several samples."""
    parts = {name: torch.stack([row[name] for row in rows], int(name in _BATCH_SECOND)) for name in rows[0]}
    features = {name.removeprefix("feature "): part for name, part in parts.items() if name.startswith("feature ")}
    return Answer(parts["outputs"], parts["values"], parts.get("products"), features, parts.get("cotangents"))
