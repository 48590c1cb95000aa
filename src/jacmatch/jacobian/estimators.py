"""Which products with a Jacobian to take, their weights, their variance and their cost.

M is a matrix with a row for each output and a column for each input element: one sample's Jacobian, or the difference
of two. A = MMᵀ, so tr A = ‖M‖²_F. An estimator gives directions v₁ … v_P on one side; the estimate is Σₚ ‖vₚᵀM‖²
on the output side and Σₚ ‖Mvₚ‖² on the input side. The directions include the weights, without further division.

The paper's form is `TopClass`, or `LabelClass` where labels may be used: their mean is one term of tr A. The others are
the corrected forms, with mean tr A unless stated otherwise.

References:
    Srinivas & Fleuret 2018, arXiv:1803.00443, on approximating the full Jacobian (also in "Local Affine Approximators",
    NIPS 2017 LLD). Random output directions: Hoffman, Roberts & Yaida 2019, arXiv:1908.02729.
"""

import math
from dataclasses import astuple, dataclass, field, replace
from functools import reduce
from typing import Any, ClassVar, Final, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from jacmatch.errors import InputError, UnsupportedError, class_axis, one_row_of_classes, unknown_name, whole_number
from jacmatch.jacobian import probes

Side = Literal["output", "input"]
BASES: Final = ("dct", "pca", "data")
Inputs: TypeAlias = Float[Tensor, "batch *input"] | None
Outputs: TypeAlias = Float[Tensor, "batch *out"] | None
Labels: TypeAlias = Int[Tensor, "batch *position"] | Float[Tensor, "batch *out"] | None
Ids: TypeAlias = Int[Tensor, "batch"] | None
Matrix: TypeAlias = Float[Tensor, "row column"]
OnOutputs: TypeAlias = Float[Tensor, "probe batch *out"]
OnInputs: TypeAlias = Float[Tensor, "probe batch *input"]
_NOISE: Final = 1_000_081  # offset of the seed, so that noise is independent of directions, and of noise at the points


@dataclass(frozen=True)
class Cost:
    """Number of passes through the student for the products, in addition to the one forward pass of every step.

    The backward pass of the loss, which goes through all of them, is not counted. `forward` passes lead from inputs to
    outputs (a plain value, or a Jv in forward mode), `backward` passes from outputs to inputs (a vᵀJ).
    """

    forward: int
    backward: int


@runtime_checkable
class Estimator(Protocol):
    """The type of the `probe=` argument of an objective. An implementation names the keywords that it needs."""

    side: ClassVar[Side]

    def directions(
        self, *, x: Inputs, outputs: Outputs, labels: Labels, ids: Ids, seed: int, draw: int, partners: Inputs
    ) -> Float[Tensor, "probe batch *shape"]:
        """Return the directions, weights included, shaped like outputs or like inputs, depending on `side`.

        Args:
            x: The inputs; needed on the input side.
            outputs: The teacher's readout values; needed on the output side.
            labels: Class indices, or the probabilities of mixed labels; only `LabelClass` uses them.
            ids: Number of each sample, int64; needed if anything is random.
            seed: Seed of the run.
            draw: Index of the independent draw, for example the number of the step.
            partners: The input of each sample's partner; only `DataPairs` uses them.
        """
        ...

    def variance(self, matrix: Matrix, *, outputs: Float[Tensor, "row"] | None = None) -> float:
        """The variance of the estimate for M = `matrix`, by its formula, in float64.

        `outputs`, the teacher's readout values for this sample, are used only by `FisherRows`.
        """
        ...

    def passes(self, outputs: int) -> Cost:
        """The cost of one step's products for a student with this many outputs."""
        ...


_REMEDIES: Final = {
    "x": "Pass the inputs.",
    "outputs": "Pass the teacher's readout values.",
    "labels": "Pass the labels, or use TopClass().",
    "ids": "Pass an integer id per sample, for example torch.arange(len(x)).",
    "partners": "Pass the inputs of the rows that probes.partners chooses.",
}


def needed(value: Tensor | None, name: str, caller: str, method: str = "directions") -> Tensor:
    """Return the value of a keyword that this estimator needs, if it was given."""
    if value is None:
        raise InputError(f"`{name}` of `{caller}.{method}` must be given.", do=_REMEDIES[name])
    return value


def ids_of(ids: Tensor | None, values: Tensor, caller: str) -> Tensor:
    """Return the ids, one for each sample: a single id would be broadcast, and give all samples the same direction."""
    given = needed(ids, "ids", caller)
    if given.shape[0] != values.shape[0]:
        what = f"`ids` of `{caller}.directions` must be one for each sample."
        raise InputError(what, got=f"{given.shape[0]} for {values.shape[0]} samples", do=_REMEDIES["ids"])
    return given


def check_count(caller: str, count: int, law: str = "gaussian") -> None:
    """Reject a number of directions below 1, and unknown distributions."""
    whole_number(f"`count` of `{caller}`", count)
    if law not in probes.LAWS:
        raise unknown_name(f"`law` of `{caller}`", law, probes.LAWS)


def check_positive(what: str, value: float) -> None:
    """Reject numbers that are not positive and finite."""
    if not 0 < value < math.inf:
        raise InputError(f"{what} must be positive and finite.", got=value)


def random_directions(
    caller: str, law: str, count: int, like: Float[Tensor, "batch *shape"], ids: Ids, seed: int, draw: int
) -> Float[Tensor, "probe batch *shape"]:
    """`count` directions from a distribution of `probes.directions`, shaped like `like`, each divided by √count."""
    given, shape = ids_of(ids, like, caller), tuple(like.shape[1:])
    v = probes.directions(law, seed=seed, ids=given, draw=draw, count=count, shape=shape, dtype=like.dtype)
    return v if count == 1 else v / math.sqrt(count)


def law_variance(law: str, count: int, matrix: Float[Tensor, "probed other"]) -> float:
    """Variance of the mean of ‖vᵀM‖² over `count` directions v of this distribution in the space of M's rows."""
    m = matrix.double()
    n = m.shape[0]
    # ‖MMᵀ‖ = ‖MᵀM‖: the smaller of the two, as one side may have as many elements as an image.
    squared = (m @ m.mT if n <= m.shape[1] else m.mT @ m).square().sum().item()
    diagonal = m.square().sum(dim=1)
    trace, diagonal_squared = diagonal.sum().item(), diagonal.square().sum().item()
    deviation = squared - trace**2 / n
    rest = count % n
    one = {
        "gaussian": 2 * squared,
        "rademacher": 2 * (squared - diagonal_squared),
        "sphere": 2 * n / (n + 2) * deviation,
        "basis": n * diagonal_squared - trace**2,
        "orthogonal": 2 * n * rest * (n - rest) / (count * max(n - 1, 1) * (n + 2)) * deviation,
    }[law]
    return max(one, 0.0) / count


class _Products:
    """What most estimators have in common: one product for each direction."""

    side: ClassVar[Side]
    count: int = 1

    def passes(self, outputs: int) -> Cost:
        """One vᵀJ or Jv for each direction."""
        return Cost(forward=0, backward=self.count) if self.side == "output" else Cost(forward=self.count, backward=0)


class _Rows(_Products):
    """Rows that are not random."""

    def variance(self, matrix: Matrix, **unused: object) -> float:
        """0: nothing is random. One row of the paper's form has the bias A_cc − tr A instead."""
        return 0.0


class _OfLaw(_Products):
    """Directions from a distribution of `probes.directions`, on either side."""

    law: str = "gaussian"

    def __post_init__(self) -> None:
        check_count(type(self).__name__, self.count, self.law)

    def directions(
        self, *, x: Inputs = None, outputs: Outputs = None, ids: Ids, seed: int, draw: int, **unused: object
    ) -> Float[Tensor, "probe batch *shape"]:
        """Directions from the distribution, in the space of outputs or inputs, divided by √P."""
        name = type(self).__name__
        like = needed(outputs, "outputs", name) if self.side == "output" else needed(x, "x", name)
        return random_directions(name, self.law, self.count, like, ids, seed, draw)

    def variance(self, matrix: Matrix, **unused: object) -> float:
        """The formula of the distribution; for `AntitheticNoise` up to O(σ²) where the map is not linear."""
        return law_variance(self.law, self.count, matrix if self.side == "output" else matrix.mT)


@dataclass(frozen=True)
class EveryRow(_Rows):
    """All rows: v = e₁ … e_K. Exact: mean tr A, variance 0."""

    side: ClassVar[Side] = "output"

    def directions(self, *, outputs: Outputs, **unused: object) -> OnOutputs:
        """The unit vectors, the same for all samples."""
        values = needed(outputs, "outputs", "EveryRow")
        one_row_of_classes("EveryRow", values.shape)
        unit = torch.eye(values.shape[1], dtype=values.dtype, device=values.device)
        return unit[:, None, :].expand(-1, values.shape[0], -1)

    def passes(self, outputs: int) -> Cost:
        """One vᵀJ for each output."""
        return Cost(forward=0, backward=outputs)


@dataclass(frozen=True)
class TopClass(_Rows):
    """The row c of the teacher's largest output. Paper's form: mean A_cc ≤ tr A, so it is biased low.

    Both networks use the teacher's class: with its own, the student might be compared in a different row.

    Example:
        >>> TopClass().directions(outputs=torch.tensor([[1.0, 5.0, 2.0]]))
        tensor([[[0., 1., 0.]]])
    """

    side: ClassVar[Side] = "output"

    def directions(self, *, outputs: Outputs, **unused: object) -> OnOutputs:
        """The unit vector of the teacher's largest output."""
        values = needed(outputs, "outputs", "TopClass")
        one_row_of_classes("TopClass", values.shape)
        return _weighted_unit(values.argmax(dim=1)[:, None], values, 1.0)


@dataclass(frozen=True)
class LabelClass(_Rows):
    """The row y of the label. Paper's form where labels may be used: mean A_yy ≤ tr A, so it is biased low.

    For mixed labels, with probabilities y, v = y: the mixture of the rows, as in the readout `LabelLogit`.
    """

    side: ClassVar[Side] = "output"

    def directions(self, *, outputs: Outputs, labels: Labels, **unused: object) -> OnOutputs:
        """The unit vector of the label."""
        values, given = needed(outputs, "outputs", "LabelClass"), needed(labels, "labels", "LabelClass")
        one_row_of_classes("LabelClass", values.shape)
        if given.is_floating_point():
            return given.to(values.dtype)[None]
        return _weighted_unit(given.long()[:, None], values, 1.0)


@dataclass(frozen=True)
class RandomOutputs(_OfLaw):
    """P = `count` random output directions from the distribution `law` (see `probes.directions`), each divided by √P.

    The variance, with K outputs and r = P mod K, is 1/P of

    - `gaussian`: 2‖A‖²_F
    - `rademacher`: 2(‖A‖²_F − Σᵢ Aᵢᵢ²)
    - `sphere`: 2K/(K + 2)·(‖A‖²_F − (tr A)²/K)
    - `basis`: K Σᵢ Aᵢᵢ² − (tr A)²
    - `orthogonal`: 2Kr(K − r)/(P(K − 1)(K + 2))·(‖A‖²_F − (tr A)²/K), so 0 when P is a multiple of K

    Example:
        >>> RandomOutputs(count=2, law="rademacher").variance(torch.eye(3))
        0.0
    """

    count: int = 1
    law: str = "gaussian"
    side: ClassVar[Side] = "output"


@dataclass(frozen=True)
class SampledRows(_Products):
    """n = `count` different rows out of K, all choices equally likely, each with weight K/n (Horvitz and Thompson).

    With aᵢ = Aᵢᵢ the variance is K²(1 − n/K)·S²/n, S² = Σᵢ (aᵢ − ā)²/(K − 1): rows drawn without replacement.

    Example:
        >>> SampledRows(count=3).variance(torch.randn(3, 8))
        0.0
    """

    count: int
    side: ClassVar[Side] = "output"

    def __post_init__(self) -> None:
        check_count("SampledRows", self.count)

    def directions(self, *, outputs: Outputs, ids: Ids, seed: int, draw: int, **unused: object) -> OnOutputs:
        """√(K/n)·e_i for n different i."""
        values = needed(outputs, "outputs", "SampledRows")
        one_row_of_classes("SampledRows", values.shape)
        total = values.shape[1]
        self._check_total(total)
        order = probes.permutation(seed, ids_of(ids, values, "SampledRows"), draw, total)
        return _weighted_unit(order[:, : self.count], values, math.sqrt(total / self.count))

    def variance(self, matrix: Matrix, **unused: object) -> float:
        """K²(1 − n/K)·S²/n."""
        rows = matrix.double().square().sum(dim=1)
        total = rows.shape[0]
        self._check_total(total)
        return total * (total - self.count) / self.count * rows.var().item() if total > self.count else 0.0

    def passes(self, outputs: int) -> Cost:
        """One vᵀJ for each row."""
        self._check_total(outputs)
        return Cost(forward=0, backward=self.count)

    def _check_total(self, outputs: int) -> None:
        if self.count > outputs:
            what = "`count` of `SampledRows` must not exceed the number of outputs."
            raise InputError(what, got=f"{self.count} of {outputs}", do="Use EveryRow() for all rows.")


@dataclass(frozen=True)
class FisherRows(_Products):
    """P = `count` directions v = √p ⊙ s/√P, s random signs, p = softmax(teacher's outputs/τ), τ = `temperature`.

    Mean Σᵢ pᵢ ‖Mᵢ‖²: with M the difference of two log-probability Jacobians, this is the Fisher distance for soft
    targets. With B = diag(√p)·A·diag(√p) the variance is 2(‖B‖²_F − Σᵢ Bᵢᵢ²)/P. Leave τ = 1 if the readout is
    log-probabilities, at any temperature: their softmax gives the probabilities. For dense outputs the Fisher
    distance is summed over the positions; `class_dim` is their dimension of the classes.
    """

    count: int = 1
    temperature: float = 1.0
    class_dim: int | None = None
    side: ClassVar[Side] = "output"

    def __post_init__(self) -> None:
        check_count("FisherRows", self.count)
        check_positive("`temperature` of `FisherRows`", self.temperature)

    def directions(self, *, outputs: Outputs, ids: Ids, seed: int, draw: int, **unused: object) -> OnOutputs:
        """√p ⊙ s/√P."""
        values = needed(outputs, "outputs", "FisherRows").detach()
        signs = random_directions("FisherRows", "rademacher", self.count, values, ids, seed, draw)
        axis = class_axis("FisherRows", values.shape, self.class_dim)
        return signs * (values / self.temperature).softmax(dim=axis).sqrt()

    def variance(self, matrix: Matrix, *, outputs: Float[Tensor, "row"] | None = None) -> float:
        """2(‖B‖²_F − Σᵢ Bᵢᵢ²)/P, with the p of `outputs`."""
        values = needed(outputs, "outputs", "FisherRows", "variance").double()
        weights = (values / self.temperature).softmax(dim=0).sqrt()
        return law_variance("rademacher", self.count, matrix * weights[:, None])


def _weighted_unit(index: Int[Tensor, "batch probe"], like: Float[Tensor, "batch out"], weight: float) -> OnOutputs:
    batch, probe = index.shape
    zeros = torch.zeros(batch, probe, like.shape[1], dtype=like.dtype, device=like.device)
    return zeros.scatter_(2, index[:, :, None], weight).transpose(0, 1)


@dataclass(frozen=True)
class RandomInputs(_OfLaw):
    """P = `count` random input directions from the distribution `law` (see `probes.directions`), each divided by √P.

    The variance is that of `RandomOutputs` with MᵀM for A and the number of input elements for K: for `gaussian` the
    same on both sides. The teacher needs no backward pass.
    """

    count: int = 1
    law: str = "gaussian"
    side: ClassVar[Side] = "input"


@dataclass(frozen=True)
class DataPairs(_Products):
    """The direction from each sample to its partner, scaled to norm √D for D input elements.

    Mean D·E[uᵀMᵀMu] over the unit vectors u between data points; it is tr A only if these are isotropic.
    """

    side: ClassVar[Side] = "input"

    def directions(self, *, x: Inputs, partners: Inputs, **unused: object) -> OnInputs:
        """`probes.data_pairs` of the inputs and their partners."""
        given, others = needed(x, "x", "DataPairs"), needed(partners, "partners", "DataPairs")
        return probes.data_pairs(given.detach(), others.detach())[None]

    def variance(
        self, matrix: Matrix, *, tangents: Float[Tensor, "pair column"] | None = None, **unused: object
    ) -> float:
        """The variance of ‖Mv‖² over `tangents`, all possible directions of a sample, equally likely.

        These are `probes.data_pairs` from the sample to each of the other data points, flattened.
        """
        if tangents is None:
            raise UnsupportedError(
                "`DataPairs` has no variance formula without the data. Pass tangents=..., the directions to all "
                "partners, or use RandomInputs(), whose variance is known."
            )
        return (tangents.double() @ matrix.double().mT).square().sum(1).var(correction=0).item()


@dataclass(frozen=True, eq=False)
class SubspaceInputs(_Products):
    """P = `count` random input directions v = Ug/√P in a subspace in which images differ, g ~ `law` in k dimensions.

    The columns of U are orthonormal. Mean ‖MU‖²_F, the norm restricted to the subspace; the variance is that of
    `RandomInputs` with MU for M. White noise spreads over all D dimensions, but images vary in few of them.

    Attributes:
        k: Dimensions of the subspace.
        basis: `dct`, the lowest spatial frequencies of each channel; `pca`, the leading principal components of a set
            of images; `data`, the span of differences of images. The last two come from `fitted`.
        count: P.
        law: Distribution of g, see `probes.directions`.
        vectors: Uᵀ, (k, D); None for `dct` until the shape of a sample is known.

    Example:
        >>> probe = SubspaceInputs(2, "pca").fitted(torch.eye(4))
        >>> probe.directions(x=torch.zeros(3, 4), ids=torch.arange(3), seed=0, draw=0).shape
        torch.Size([1, 3, 4])
    """

    k: int
    basis: str = "dct"
    count: int = 1
    law: str = "gaussian"
    vectors: Float[Tensor, "k column"] | None = None
    side: ClassVar[Side] = "input"

    def __post_init__(self) -> None:
        check_count("SubspaceInputs", self.count, self.law)
        if self.basis not in BASES:
            raise unknown_name("`basis` of `SubspaceInputs`", self.basis, BASES)
        whole_number("`k` of `SubspaceInputs`", self.k)

    def fitted(self, x: Float[Tensor, "sample *input"], seed: int = 0) -> "SubspaceInputs":
        """Return the probe with the basis of these training inputs; the seed chooses the pairs of `data`.

        Raises:
            InputError: The inputs span fewer than k dimensions.
        """
        flat = x.detach().flatten(1).double()
        if self.basis == "dct":
            vectors = cosines(tuple(x.shape[1:]), self.k)
        elif self.basis == "pca":
            vectors = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)[2][: self.k]
        else:
            order = probes.permutation(seed, torch.zeros(1, dtype=torch.int64), 0, len(flat))[0]
            vectors = torch.linalg.qr(flat[order].diff(dim=0)[: self.k].mT)[0].mT
        if self.basis != "dct" and min(len(flat) - 1, flat.shape[1]) < self.k:
            rule = (
                "`k` of `SubspaceInputs` (`--probe-dimensions`) must be < the number of inputs, and at most their size."
            )
            raise InputError(rule, got=f"{self.k} for {len(flat)} inputs of {flat.shape[1]} elements")
        return replace(self, vectors=vectors.float())

    def directions(self, *, x: Inputs, ids: Ids, seed: int, draw: int, **unused: object) -> OnInputs:
        """Ug/√P; the basis must be fitted to inputs of this size, unless it is `dct`."""
        given = needed(x, "x", "SubspaceInputs")
        shape = tuple(given.shape[1:])
        vectors = self._basis(shape).to(given)
        inner = given.new_zeros(len(given), len(vectors))
        g = random_directions("SubspaceInputs", self.law, self.count, inner, ids, seed, draw)
        return (g @ vectors).reshape(self.count, len(given), *shape)

    def _basis(self, shape: tuple[int, ...] | None) -> Float[Tensor, "k column"]:
        """Return Uᵀ for samples of this shape; None means that the shape is not known."""
        vectors = cosines(shape, self.k) if self.vectors is None and self.basis == "dct" and shape else self.vectors
        if vectors is None or (shape is not None and vectors.shape[1] != math.prod(shape)):
            got = "none" if vectors is None else f"vectors of {vectors.shape[1]} elements"
            rule = "`vectors` of `SubspaceInputs` must be a basis of the inputs."
            raise InputError(rule, got=got, do="Fit it to the training inputs: SubspaceInputs(k, basis).fitted(x).")
        return vectors

    def variance(self, matrix: Matrix, **unused: object) -> float:
        """The formula of the distribution, applied to MU; the probe must be fitted."""
        vectors = self._basis(None if self.vectors is None else (matrix.shape[1],))
        return law_variance(self.law, self.count, vectors.to(matrix).double() @ matrix.double().mT)


def cosines(shape: tuple[int, ...], k: int) -> Float[Tensor, "k column"]:
    """Return the k cosines of lowest frequency (DCT-II, orthonormal) of samples of this shape, as rows.

    Frequencies are sorted by the sum of their squares over height and width, and ties by channel. A vector has one
    dimension.
    """
    channels, sides = (shape[0], shape[1:]) if len(shape) > 1 else (1, shape)
    if k > math.prod(shape):
        rule = f"`k` of `SubspaceInputs` (`--probe-dimensions`) must be at most {math.prod(shape)} here."
        raise InputError(rule, got=k)
    waves = []
    for side in sides:
        n = torch.arange(side, dtype=torch.float64)
        wave = torch.cos(math.pi / side * (n + 0.5) * n[:, None]) * math.sqrt(2 / side)
        wave[0] /= math.sqrt(2)
        waves.append(wave)
    indices = torch.cartesian_prod(*(torch.arange(side) for side in sides)).reshape(-1, len(sides))
    indices = indices[indices.square().sum(1).argsort(stable=True)][: -(-k // channels)]
    products = (reduce(torch.kron, map(Tensor.__getitem__, waves, index)) for index in indices.tolist())
    unit = torch.eye(channels, dtype=torch.float64)
    return torch.cat([torch.kron(unit, product[None]) for product in products])[:k].float()


@dataclass(frozen=True)
class AntitheticNoise(_OfLaw):
    """P = `count` pairs of inputs x ± σz, z ~ N(0, I), σ = `sigma` in units of the input: values only, no derivatives.

    With M = ∂δ and v = z/√P, ‖Mv‖² is taken as Σᵢ ((δᵢ(x + hv) − δᵢ(x − hv))/2h)², h = σ√P = `step`. Mean tr A + O(σ²):
    the remainder starts with σ² Σᵢ ∇δᵢ·∇Δδᵢ, while the paper's form without pairs is off by Σᵢ δᵢΔδᵢ at any σ.
    Variance 2‖A‖²_F/P + O(σ²).

    References:
        Corrects Srinivas & Fleuret 2018, arXiv:1803.00443, Proposition 1, where a term of order σ² is dropped.
    """

    count: int = 1
    sigma: float = field(kw_only=True)
    side: ClassVar[Side] = "input"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("`sigma` of `AntitheticNoise`", self.sigma)

    @property
    def step(self) -> float:
        """The step of the differences, h = σ√P: it scales a direction v = z/√P to the noise σz."""
        return self.sigma * math.sqrt(self.count)

    def passes(self, outputs: int) -> Cost:
        """Two values for each pair."""
        return Cost(forward=2 * self.count, backward=0)


@dataclass(frozen=True)
class NoiseAveraged:
    """The products of another probe, averaged over `count` noisy inputs x + σz: rows of a smoothed Jacobian.

    Student and teacher are differentiated at the same noisy inputs, σ = `sigma`, z ~ N(0, I). With m = `count` and M
    the difference of two Jacobians, the mean is ‖E M(x + σz)‖² + E‖M(x + σz) − E M‖²/m, in the norm that `probe`
    estimates: the Jacobian of the smoothed function E f(x + σz), plus 1/m of the fluctuations.

    Attributes:
        probe: Chooses the directions.
        sigma: σ, in units of the input.
        count: m, noisy inputs for each sample; each costs as much as the probe.
    """

    probe: Estimator = field(default_factory=RandomOutputs)
    sigma: float = field(kw_only=True)
    count: int = field(default=4, kw_only=True)

    def __post_init__(self) -> None:
        check_count("NoiseAveraged", self.count)
        check_positive("`sigma` of `NoiseAveraged`", self.sigma)
        if isinstance(self.probe, AntitheticNoise | NoiseAveraged):
            rule = "`probe` of `NoiseAveraged` must take derivatives at the noisy inputs."
            raise InputError(rule, got=type(self.probe).__name__, do="Use RandomOutputs() or RandomInputs().")

    @property
    def side(self) -> Side:
        """The side of the probe."""
        return self.probe.side

    def noisy(
        self, x: Float[Tensor, "batch *input"], ids: Int[Tensor, "batch"], seed: int, draw: int
    ) -> Float[Tensor, "copies *input"]:
        """Return `count` noisy inputs for each sample, one sample after the other."""
        about: dict[str, Any] = {"seed": seed + _NOISE, "ids": ids, "draw": draw, "count": self.count}
        z = probes.directions("gaussian", **about, shape=tuple(x.shape[1:]), dtype=x.dtype)
        return (x + self.sigma * z).transpose(0, 1).flatten(0, 1)

    def repeated(self, values: Shaped[Tensor, "..."], dim: int = 0) -> Shaped[Tensor, "..."]:
        """Repeat values of the samples along dimension `dim`, once for each of their noisy inputs."""
        return values.repeat_interleave(self.count, dim)

    def averaged(self, products: Float[Tensor, "probe copies *rest"]) -> Float[Tensor, "probe batch *rest"]:
        """Return the means of the products over the noisy inputs of each sample."""
        return torch.unflatten(products, 1, (-1, self.count)).mean(2)

    def directions(self, **given: Any) -> Float[Tensor, "probe batch *shape"]:
        """The directions of the probe."""
        return self.probe.directions(**given)

    def variance(self, matrix: Matrix, **given: Any) -> float:
        """The variance of the probe for M, the Jacobian averaged over the noise."""
        return self.probe.variance(matrix, **given)

    def passes(self, outputs: int) -> Cost:
        """`count` times those of the probe, and one forward pass for each noisy input."""
        forward, backward = astuple(self.probe.passes(outputs))
        return Cost(self.count * (1 + forward), self.count * backward)


ESTIMATORS: Final[dict[str, type[Estimator]]] = {
    "every-row": EveryRow,
    "top-class": TopClass,
    "label-class": LabelClass,
    "random-outputs": RandomOutputs,
    "random-inputs": RandomInputs,
    "sampled-rows": SampledRows,
    "data-pairs": DataPairs,
    "subspace-inputs": SubspaceInputs,
    "fisher-rows": FisherRows,
    "antithetic-noise": AntitheticNoise,
    "noise-averaged": NoiseAveraged,  # type: ignore[dict-item]  # its side is that of another probe
}
"""The estimators by their names on the command line."""
