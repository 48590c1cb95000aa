"""A teacher that answers from disk."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.teachers.base import Answer, Question
from jacmatch.teachers.cached.fingerprint import described, differences
from jacmatch.teachers.cached.format import unlike
from jacmatch.teachers.cached.shards import Shards

_LISTED = 3  # missing shards, and samples, in a message


class CachedTeacher:
    """The answers of another teacher, which `jacmatch cache build` has written to a folder.

    The sample's id and the draw (the view) identify an entry. It is returned only for the query that it answers:
    readout, products, probe and step must be the stored ones, and two random sums over the input and over the
    directions must agree with the stored sums to 10⁻⁴ of the norm. Directions are computed again from (seed, id,
    draw). Outputs and products are returned bit for bit as they were stored.

    Args:
        folder: The folder of one seed, `CACHE/seed0`.
        expected: The fingerprint of the present job; None accepts any.
        views: How many views the job needs.

    Raises:
        InputError: The folder is no cache or unfinished, it was made for something else, or it has too few views.

    Example:
        A job that was run as `jacmatch cache build --cache answers` is taught by
        `Distillation(student, CachedTeacher("answers/seed0"))`.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, expected: Mapping[str, str] | None = None, views: int = 1
    ) -> None:
        self.shards = Shards(Path(folder))
        self.head = self.shards.head
        if expected is not None:
            self._is_of(expected)
        available = "every view" if self.head.constant else f"{self.head.views} views"
        if not self.head.constant and views > self.head.views:
            do = f"Train with --views {self.head.views}, or build a longer cache (--steps, --views)."
            raise InputError(f"The cache {folder} must have {views} views.", got=available, do=do)
        missing = self.shards.missing()
        if missing:
            more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
            raise InputError(
                f"The cache {folder} must be finished.",
                got=f"{', '.join(missing[:_LISTED])}{more} missing",
                do="Run its `jacmatch cache build` again: it goes on.",
            )

    def _is_of(self, expected: Mapping[str, str]) -> None:
        there = dict(self.head.fingerprint)
        if expected.get("probe") == "none":  # outputs do not depend on the products of the query
            there["probe"] = "none"
        apart = differences(there, expected)
        if apart:
            do = "Build one for this job: jacmatch cache build --cache OTHER, with the flags of this command."
            raise InputError(f"The cache {self.shards.folder} must be of this job.", got=apart, do=do)

    @property
    def answers_vjp(self) -> bool:
        """Whether vᵀJ was stored."""
        return self.head.question["products"] == "vᵀJ"

    def answer(self, x: Float[Tensor, "batch *input"], question: Question | None = None) -> Answer:
        """The stored outputs, and products if the query has directions; in the type and on the device of x."""
        question = question or Question()
        with_products = question.cotangents is not None or question.tangents is not None
        self._fits(question, with_products)
        assert question.ids is not None
        assert question.draw is not None or self.head.constant
        view = 0 if self.head.constant else int(question.draw or 0)
        if not 0 <= view < self.head.views:
            do = f"Train with --views {self.head.views}, or build a longer cache."
            rule = f"`draw` of a question to {self.shards.folder} must be below {self.head.views}, its number of views."
            raise InputError(rule, got=view, do=do)
        rows = self.shards.read(view, question.ids)
        self._same("input", x, rows["input_sums"], question, view)
        outputs = _as(x, rows["outputs"])
        values = _as(x, rows["values"]) if "values" in rows else outputs
        if not with_products:
            return Answer(_as(x, rows.get("outputs_alone", rows["outputs"])), values)
        directions = question.tangents
        if question.cotangents is not None:
            given = question.cotangents
            directions = (given(values) if callable(given) else given).detach()
        assert directions is not None
        self._same("direction", directions.transpose(0, 1), rows["direction_sums"], question, view)
        products = _as(x, rows["products"].transpose(0, 1).contiguous())
        return Answer(outputs, values, products, cotangents=directions if question.tangents is None else None)

    def _fits(self, question: Question, with_products: bool) -> None:
        """Refuse a query whose answers are not stored."""
        if question.layers or question.readout.layers:
            raise UnsupportedError("CachedTeacher has outputs only. Use a readout of the outputs, or a live teacher.")
        if question.ids is None or (question.draw is None and not self.head.constant):
            rule = "A question to `CachedTeacher` must have `ids` and `draw`, which identify its entries."
            do = "Call the objective with ids= (rows of the training split) and draw= (the view)."
            raise InputError(rule, got=f"ids {'missing' if question.ids is None else 'given'}", do=do)
        if question.arguments is not None:
            raise UnsupportedError(
                "`CachedTeacher` stores no `context` of a batch, nor inputs of several tensors: it cannot tell "
                "whether they are the same. Use the teacher itself, or MemoizedTeacher."
            )
        here, there = described(question), dict(self.head.question)
        if not with_products:
            here, there = {"readout": here["readout"]}, {"readout": there["readout"]}
        apart = differences(there, here)
        if apart:
            do = "Build a cache for this query, or pass the query that the cache was built for."
            raise InputError(f"A question to {self.shards.folder} must be the stored one.", got=apart, do=do)

    def _same(self, what: str, given: Tensor, stored: Tensor, question: Question, view: int) -> None:
        """Refuse inputs or directions other than the stored ones."""
        if len(given) != len(stored):
            rule = f"A question to `CachedTeacher` must have one {what} for each of the {len(stored)} ids."
            raise InputError(rule, got=len(given))
        wrong = unlike(given, stored)
        if bool(wrong.any()):
            assert question.ids is not None
            ids = question.ids[wrong.to(question.ids.device)].tolist()
            raise InputError(
                f"The {what}s of a question to {self.shards.folder} must be those of the query that the cache was built for.",
                got=f"others for {len(ids)} of {len(given)} samples (ids {ids[:_LISTED]}, view {view})",
                do="Data, augmentation, partners, point, probe and seed must be those of the cache.",
            )


def _as(x: Tensor, stored: Tensor) -> Tensor:
    """The stored tensor with the type and on the device of x."""
    if x.device.type == "cuda" and stored.device.type == "cpu":
        stored = stored.pin_memory()
    return stored.to(x.device, non_blocking=True).to(x.dtype)


def bits_of(answer: Answer) -> list[Tensor]:
    """Return the tensors of an answer."""
    parts = (answer.outputs, answer.values, answer.products, answer.cotangents, *answer.features.values())
    return [part for part in parts if part is not None]


def agree(one: Answer, other: Answer, tolerance: float) -> bool:
    """Whether two answers are equal: to `tolerance` of the largest number, or bit for bit if that is 0."""
    for first, second in zip(bits_of(one), bits_of(other), strict=True):
        if first.shape != second.shape:
            return False
        if torch.equal(first, second):
            continue
        limit = tolerance * torch.maximum(first.abs().max(), second.abs().max())
        if not tolerance or bool(((first - second).abs() > limit).any()):
            return False
    return True
