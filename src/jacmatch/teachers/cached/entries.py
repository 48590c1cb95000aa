"""From a teacher's answer to the rows of a shard and back."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from jacmatch.errors import InputError, UnsupportedError, unknown_name
from jacmatch.jacobian import probes
from jacmatch.teachers.base import Answer, Question
from jacmatch.teachers.cached.layout import TYPES, Field

Storage = Literal["float32", "float16", "bfloat16"]
_SEED = 1_000_099  # of the weights of the sums
_NEAR = 1e-4  # sums that differ by less than this share of the norm differ by rounding
_SUMS = 2


def fields_of(
    answer: Answer, question: Question, storage: Storage = "float32", alone: Answer | None = None
) -> tuple[Field, ...]:
    """What is stored of each sample of such an answer.

    Where cotangents are made of the values, outputs and values keep their type: directions made of rounded values would
    not be those of the products. They are few beside the products.

    Args:
        answer: A teacher's answer.
        question: What it was asked.
        storage: Type of what may be rounded.
        alone: The answer about the same inputs without products, if that will be asked too. A network computes
            derivatives by other kernels, and the last digits of its outputs are others then.

    Raises:
        UnsupportedError: The answer has features, which are not stored.
        InputError: `storage` is unknown.
    """
    if storage not in get_args(Storage):
        raise unknown_name("`storage` of a cache (`--store`)", storage, get_args(Storage))
    if answer.features or question.layers or question.readout.layers:
        raise UnsupportedError("A cache stores outputs and products, no features. Use a readout of the outputs.")
    exact = _type_name(answer.outputs)
    rounded = exact if storage == "float32" else storage
    told = exact if question.cotangents is not None else rounded
    fields = [Field("ids", "int64", ()), Field("outputs", told, tuple(answer.outputs.shape[1:]))]
    if not _same(answer.values, answer.outputs):
        fields.append(Field("values", told, tuple(answer.values.shape[1:])))
    if answer.products is not None:
        fields.append(Field("products", rounded, (len(answer.products), *answer.products.shape[2:])))
    if alone is not None and not _same(alone.outputs, answer.outputs):
        fields.append(Field("outputs_alone", rounded, tuple(answer.outputs.shape[1:])))
    fields.append(Field("input_sums", "float32", (_SUMS,)))
    if answer.products is not None:
        fields.append(Field("direction_sums", "float32", (_SUMS,)))
    return tuple(fields)


def rows_of(
    answer: Answer, x: Tensor, question: Question, fields: Sequence[Field], alone: Answer | None = None
) -> dict[str, Tensor]:
    """The rows of an answer, one for each sample, on the CPU.

    Args:
        answer: The answer.
        x: Where it was asked.
        question: What was asked.
        fields: What is stored.
        alone: The answer without products, where that is stored too.

    Raises:
        InputError: The answer has not the fields, or is not finite in their types.
    """
    assert question.ids is not None
    given: dict[str, Tensor | None] = {"ids": question.ids, "outputs": answer.outputs, "input_sums": sums(x)}
    given |= {"values": answer.values, "outputs_alone": None if alone is None else alone.outputs}
    if answer.products is not None:
        directions = answer.cotangents if question.tangents is None else question.tangents
        assert directions is not None
        given["products"] = answer.products.transpose(0, 1)
        given["direction_sums"] = sums(directions.transpose(0, 1))
    rows = {}
    for field in fields:
        tensor = given.get(field.name)
        if tensor is None or tuple(tensor.shape[1:]) != field.shape:
            got = "nothing" if tensor is None else f"shape {tuple(tensor.shape[1:])}"
            raise InputError(f"Every answer must have `{field.name}` of the shape {field.shape}.", got=got)
        rows[field.name] = stored = tensor.detach().to("cpu", TYPES[field.dtype]).contiguous()
        if stored.is_floating_point() and not stored.isfinite().all():
            way_out = "Use --store bfloat16 or float32." if field.dtype == "float16" else "Look at the teacher."
            raise InputError(f"`{field.name}` of an answer must be finite as {field.dtype}.", do=way_out)
    return rows


def sums(x: Tensor) -> Tensor:
    """Two fixed random sums over the elements of each sample, by which it is told from others; (B, 2)."""
    flat = x.detach().flatten(1).float()
    return flat @ _weights(flat.shape[1]).to(flat.device)


@lru_cache(maxsize=8)
def _weights(count: int) -> Tensor:
    ids = torch.arange(_SUMS)
    return probes.directions("gaussian", seed=_SEED, ids=ids, draw=0, count=1, shape=(count,))[0].T.contiguous()


def unlike(x: Tensor, stored: Tensor) -> Tensor:
    """Which samples have other sums than those stored, beyond rounding; (B,)."""
    room = _NEAR * x.detach().flatten(1).float().norm(dim=1, keepdim=True)
    apart: Tensor = (sums(x) - stored.to(x.device)).abs() > room
    return apart.any(1)


def _type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
