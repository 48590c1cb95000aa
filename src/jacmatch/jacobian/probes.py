"""Directions to probe a Jacobian with, and the random numbers behind them: pure functions of (seed, sample id, draw).

Nothing is stored and no generator is advanced. A number is one output of a counter-based generator (splitmix64) with a
key made of the seed, the draw and the sample's own id. So a sample gets the same direction at any position in a
batch, however it is split, before and after a resume, and in a teacher's cache: on a CPU bit for bit. Integers and
the laws `rademacher` and `basis` are the same bit for bit on every device, the others up to float32 rounding; on a GPU
the last digits of `sphere` and `orthogonal` may also change with the size of the batch.

Each public function has its own random stream: two functions with equal (seed, ids, draw) give independent numbers.
The same function gives equal numbers, so use a different `draw` (or seed) for terms that must be independent.

References:
    Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195 (the generator; mixing constants: Stafford's variant 13).
"""

import math
from collections.abc import Callable
from typing import Final, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacmatch.errors import InputError, unknown_name, whole_number

_Keys: TypeAlias = Int[Tensor, "batch"]
_Rows: TypeAlias = Float[Tensor, "batch probe dim"]
Law = Literal["gaussian", "rademacher", "sphere", "basis", "orthogonal"]

# torch has no unsigned 64-bit arithmetic: each constant is the int64 with the same bits; sums and products wrap.
_GAMMA: Final = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST: Final = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND: Final = 0x94D049BB133111EB - (1 << 64)
# One stream per public function.
_BITS, _UNIFORM, _GAUSSIAN, _DIRECTIONS, _PERMUTATION, _PARTNERS = range(6)


def bits(seed: int, ids: Int[Tensor, "batch"], draw: int, count: int) -> Int[Tensor, "batch count"]:
    """64 random bits for each sample and index, as signed integers.

    bᵢ = s(s(s(s(seed, 0), draw), idₙ), i) for i = 0 … count − 1, where s(state, j) = mix(state + (j + 1)·γ) is output j
    of the splitmix64 generator seeded with `state`. The first numbers do not change when `count` grows.

    Args:
        seed: Seed of the run; any 64-bit integer.
        ids: Number of each sample in its data set, int64; its device is the device of the result.
        draw: Index of the independent draw, for example the number of the step; any 64-bit integer.
        count: Number of random numbers for each sample, at least 1.
    """
    return _stream(_keys("bits", _BITS, seed, ids, draw, count), count)


def uniform(seed: int, ids: Int[Tensor, "batch"], draw: int, count: int) -> Float[Tensor, "batch count"]:
    """Numbers uniform on the multiples of 2⁻²⁴ in [0, 1), float32; the arguments are those of `bits`."""
    words = _stream(_keys("uniform", _UNIFORM, seed, ids, draw, count), count)
    return _shifted(words, 40).to(torch.float32) * 2.0**-24


def gaussian(seed: int, ids: Int[Tensor, "batch"], draw: int, count: int) -> Float[Tensor, "batch count"]:
    """Numbers from the standard normal distribution, float32; the arguments are those of `bits`.

    g₂ᵢ = √(−2 ln u)·cos 2πw and g₂ᵢ₊₁ = √(−2 ln u)·sin 2πw (Box and Muller), u and w from the two ends of one 64-bit
    number. Both are odd multiples of 2⁻²⁴ below 1: there is no logarithm of 0 and no g = 0. The largest |g| is 5.77.
    """
    return _box_muller(_keys("gaussian", _GAUSSIAN, seed, ids, draw, count), count)


def directions(
    law: str,
    *,
    seed: int,
    ids: Int[Tensor, "batch"],
    draw: int,
    count: int,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "probe batch *shape"]:
    """Random directions v with E[vvᵀ] = I, hence E‖vᵀM‖² = E‖Mv‖² = ‖M‖²_F.

    With n the number of elements of `shape`, the distributions (`law`) of one direction are

    - `gaussian`: vᵢ ~ N(0, 1), independent;
    - `rademacher`: vᵢ = ±1, independent: no variance from the diagonal of MMᵀ;
    - `sphere`: uniform on the sphere of radius √n;
    - `basis`: √n·eᵢ, i uniform in 0 … n − 1;
    - `orthogonal`: as `sphere`, and the directions of a sample are mutually orthogonal in blocks of n (uniform in the
      sense of Haar; the last block may be smaller), so that n of them give ‖M‖²_F without error.

    Directions of different samples are independent; so are those of one sample, except in `orthogonal`. The first
    directions do not change when `count` grows (in `orthogonal` up to rounding).

    Args:
        law: One of the names above.
        seed: Seed of the run.
        ids: Number of each sample, int64.
        draw: Index of the independent draw.
        count: Number of directions for each sample, at least 1.
        shape: Shape of one direction: that of one input, or (outputs,).
        dtype: Type of the result. Drawn in float32; normalized in float64 if this is float64, else in float32.
    """
    if law not in LAWS:
        raise unknown_name("`law` of `directions`", law, LAWS)
    dim = math.prod(shape)
    if dim < 1:
        raise InputError("`shape` of `directions` must have at least one element.", got=shape)
    if not dtype.is_floating_point:
        raise InputError("`dtype` of `directions` must be a floating type.", got=dtype, do="Use torch.float32.")
    keys = _keys("directions", _DIRECTIONS, seed, ids, draw, count)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    rows = LAWS[law](keys, count, dim, exact)
    return rows.transpose(0, 1).contiguous().reshape(count, ids.shape[0], *shape).to(dtype)


def permutation(seed: int, ids: Int[Tensor, "batch"], draw: int, count: int) -> Int[Tensor, "batch count"]:
    """A random order of 0 … count − 1 for each sample, all orders equally likely; the arguments are those of `bits`."""
    words = _stream(_keys("permutation", _PERMUTATION, seed, ids, draw, count), count)
    return words.argsort(dim=1, stable=True)


def partners(seed: int, ids: Int[Tensor, "batch"], draw: int, population: int) -> Int[Tensor, "batch"]:
    """The row number of a random partner for each sample, uniform on the `population` rows except the sample's own.

    A sample whose id is not a row (id ≥ population) gets any row. `seed`, `ids` and `draw` are those of `bits`.
    """
    if population < 2:
        raise InputError("`population` of `partners` must be at least 2: a partner is another row.", got=population)
    words = _stream(_keys("partners", _PARTNERS, seed, ids, draw, 1), 1)[:, 0]
    others = torch.where(ids < population, population - 1, population)
    rank = _shifted(words, 1) % others
    return rank + (rank >= ids)


def data_pairs(
    x: Float[Tensor, "batch *input"], partners_x: Float[Tensor, "batch *input"]
) -> Float[Tensor, "batch *input"]:
    """Return the directions from each sample to its partner, scaled to the norm of the random directions.

    vₙ = √D·(x′ₙ − xₙ)/‖x′ₙ − xₙ‖ for samples x and partners x′ of D elements each; 0 where the two are equal.
    """
    if x.shape != partners_x.shape:
        got = f"{tuple(x.shape)} and {tuple(partners_x.shape)}"
        raise InputError("`x` and `partners_x` of `data_pairs` must have the same shape.", got=got)
    difference = (partners_x - x).reshape(x.shape[0], -1)
    norm = torch.linalg.vector_norm(difference, dim=1, keepdim=True)
    scale = math.sqrt(difference.shape[1]) / torch.where(norm > 0, norm, 1.0)
    return (difference * scale).reshape(x.shape)


def _keys(caller: str, purpose: int, seed: int, ids: Int[Tensor, "batch"], draw: int, count: int) -> _Keys:
    """s(s(s(seed, purpose), draw), idₙ): the state of each sample's own generator, for `count` numbers."""
    whole_number(f"`count` of `{caller}`", count)
    if ids.dtype != torch.int64 or ids.ndim != 1:
        got = f"{ids.dtype} of shape {tuple(ids.shape)}"
        raise InputError(f"`ids` of `{caller}` must be a 1-D tensor of int64.", got=got, do="Use torch.arange(len(x)).")
    for name, value in (("seed", seed), ("draw", draw)):
        if not -(1 << 63) <= value < 1 << 63:
            raise InputError(f"`{name}` of `{caller}` must be a signed 64-bit integer.", got=value)
    # 0-d tensors on the CPU, not Python integers: under torch.compile a new draw then needs no new graph.
    of_run, of_purpose, of_draw = (
        torch.full((), value, dtype=torch.int64, device="cpu") for value in (seed, purpose, draw)
    )
    return _output(_output(_output(of_run, of_purpose), of_draw), ids)


def _stream(keys: _Keys, count: int) -> Int[Tensor, "batch count"]:
    return _output(keys[:, None], torch.arange(count, device=keys.device))


def _output(state: Int[Tensor, "..."], number: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Output `number` of the splitmix64 generator seeded with `state`, for all pairs that broadcasting makes."""
    # ~j is −(j + 1). From a sum torch.compile makes index arithmetic, which does not wrap but fails.
    z = ~number * -_GAMMA + state
    # In place, because memory traffic is what a draw costs.
    z ^= _shifted(z, 30)
    z *= _FIRST
    z ^= _shifted(z, 27)
    z *= _SECOND
    z ^= _shifted(z, 31)
    return z


def _shifted(words: Int[Tensor, "..."], bits: int) -> Int[Tensor, "..."]:
    """Return a logical shift to the right; `>>` copies the sign bit into the free bits, the mask clears them."""
    return (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _box_muller(keys: _Keys, count: int) -> Float[Tensor, "batch count"]:
    words = _stream(keys, (count + 1) // 2)
    # (2k + 1)/2²⁴ with k of 23 bits: exact in float32, and the smallest and the largest lie equally far from 0 and 1.
    u = _shifted(words, 41).to(torch.float32).mul_(2.0**-23).add_(2.0**-24)
    w = words.bitwise_and_((1 << 23) - 1).to(torch.float32).mul_(2.0**-23).add_(2.0**-24)
    radius = u.log_().mul_(-2).sqrt_()
    angle = w.mul_(2 * math.pi)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=2).flatten(1)[:, :count]


def _gaussian(keys: _Keys, count: int, dim: int, dtype: torch.dtype) -> _Rows:
    return _box_muller(keys, count * dim).reshape(-1, count, dim).to(dtype)


def _rademacher(keys: _Keys, count: int, dim: int, dtype: torch.dtype) -> _Rows:
    words = _stream(keys, -(-count * dim // 64))
    ones = (words[:, :, None] >> torch.arange(64, device=keys.device)).bitwise_and_(1)
    return ones.flatten(1)[:, : count * dim].reshape(-1, count, dim).to(dtype).mul_(2).sub_(1)


def _sphere(keys: _Keys, count: int, dim: int, dtype: torch.dtype) -> _Rows:
    g = _gaussian(keys, count, dim, dtype)
    return g.div_(torch.linalg.vector_norm(g, dim=2, keepdim=True)).mul_(math.sqrt(dim))


def _basis(keys: _Keys, count: int, dim: int, dtype: torch.dtype) -> _Rows:
    # The remainder of a 63-bit number favors no index by more than dim/2⁶³.
    index = _shifted(_stream(keys, count), 1) % dim
    zeros = torch.zeros(keys.shape[0], count, dim, dtype=dtype, device=keys.device)
    return zeros.scatter_(2, index[:, :, None], math.sqrt(dim))


def _orthogonal(keys: _Keys, count: int, dim: int, dtype: torch.dtype) -> _Rows:
    size = min(count, dim)
    blocks = -(-count // size)
    g = _gaussian(keys, blocks * size, dim, dtype).reshape(-1, blocks, size, dim)
    # LAPACK's last digits depend on where a matrix starts in memory, hence on its position in the batch. Rows of zeros
    # change neither Q nor R; with a multiple of 16 rows every matrix starts at 64 bytes, as torch's memory does.
    q, r = torch.linalg.qr(torch.nn.functional.pad(g, (0, -dim % 16)).mT)
    # QR leaves the sign of each column to the algorithm; with diag R > 0 it is unique and Q is uniform (Haar).
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(dtype)
    rows: Tensor = (q[:, :, :dim] * signs[:, :, None, :]).mT * math.sqrt(dim)
    return rows.reshape(-1, blocks * size, dim)[:, :count]


LAWS: Final[dict[str, Callable[[_Keys, int, int, torch.dtype], _Rows]]] = {
    "gaussian": _gaussian,
    "rademacher": _rademacher,
    "sphere": _sphere,
    "basis": _basis,
    "orthogonal": _orthogonal,
}
"""The distributions of `directions` by name; each maps (keys, count, dim, dtype) to (batch, count, dim)."""
