"""Each estimator's mean and variance: exactly, over all directions it can give, where they are finitely many."""

import dataclasses
import itertools
import math
import re

import pytest
import torch

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import probes
from jacmatch.jacobian.estimators import (
    ESTIMATORS,
    AntitheticNoise,
    Cost,
    DataPairs,
    Estimator,
    EveryRow,
    FisherRows,
    LabelClass,
    NoiseAveraged,
    RandomInputs,
    RandomOutputs,
    SampledRows,
    SubspaceInputs,
    TopClass,
)

from .reference_estimators import LIMIT, estimate, law_variance, mean_and_variance, z_scores

ONE = torch.arange(1)

# One of each, its cost for 5 outputs, and what it needs besides seed and draw.
CASES = {
    "every-row": (EveryRow(), Cost(0, 5), ["outputs"]),
    "top-class": (TopClass(), Cost(0, 1), ["outputs"]),
    "label-class": (LabelClass(), Cost(0, 1), ["outputs", "labels"]),
    "random-outputs": (RandomOutputs(count=3), Cost(0, 3), ["outputs", "ids"]),
    "random-inputs": (RandomInputs(count=3, law="sphere"), Cost(3, 0), ["x", "ids"]),
    "sampled-rows": (SampledRows(count=2), Cost(0, 2), ["outputs", "ids"]),
    "data-pairs": (DataPairs(), Cost(1, 0), ["x", "partners"]),
    "subspace-inputs": (SubspaceInputs(3, count=2), Cost(2, 0), ["x", "ids"]),
    "fisher-rows": (FisherRows(count=3, temperature=2.0), Cost(0, 3), ["outputs", "ids"]),
    "noise-averaged": (NoiseAveraged(RandomOutputs(2), sigma=0.1, count=3), Cost(3, 6), ["outputs", "ids"]),
    "antithetic-noise": (AntitheticNoise(count=3, sigma=0.1), Cost(6, 0), ["x", "ids"]),
}


def matrix(rows, columns):
    """Entries of unlike size, so that no two rows or columns weigh the same."""
    generator = torch.Generator().manual_seed(100 * rows + columns)
    entries = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return entries * torch.arange(1, rows + 1)[:, None] / torch.arange(1, columns + 1).sqrt()


def ask(estimator, batch=6, classes=5, shape=(2, 4), **settings):
    generator = torch.Generator().manual_seed(1)
    draw = {
        "x": torch.randn(batch, *shape, generator=generator, dtype=torch.float64),
        "outputs": torch.randn(batch, classes, generator=generator, dtype=torch.float64),
        "labels": torch.randint(classes, (batch,), generator=generator),
        "ids": torch.arange(batch),
        "seed": 3,
        "draw": 4,
        "partners": torch.randn(batch, *shape, generator=generator, dtype=torch.float64),
    }
    return estimator.directions(**{**draw, **settings})


def all_directions(estimator, dim, values=None):
    """The different directions that many samples get, each once, after a test that all are equally likely."""
    count = 40_000
    values = torch.zeros(dim, dtype=torch.float64) if values is None else values
    rows = values.expand(count, -1)
    results = ask(estimator, x=rows, outputs=rows, ids=torch.arange(count)).transpose(0, 1)
    support, frequency = results.unique(dim=0, return_counts=True)
    p = 1 / len(support)
    assert (frequency - count * p).abs().max() <= LIMIT * math.sqrt(count * p * (1 - p))
    return list(support)


@pytest.mark.parametrize(
    ("estimator", "dim", "directions"),
    [
        (RandomOutputs(1, "rademacher"), 1, 2),
        (RandomOutputs(1, "rademacher"), 3, 2**3),
        (RandomOutputs(2, "rademacher"), 3, 2**6),
        (RandomOutputs(1, "basis"), 4, 4),
        (RandomOutputs(2, "basis"), 4, 4**2),
        (RandomOutputs(3, "sphere"), 1, 2**3),
        (RandomOutputs(3, "orthogonal"), 1, 2**3),
        (RandomInputs(1, "rademacher"), 5, 2**5),
        (RandomInputs(2, "basis"), 3, 3**2),
        (SampledRows(1), 1, 1),
        (SampledRows(1), 5, 5),
        (SampledRows(3), 5, 5 * 4 * 3),
        (SampledRows(4), 4, 4 * 3 * 2),
    ],
)
def test_mean_and_variance_over_all_directions(estimator, dim, directions):
    m = matrix(dim, 4) if estimator.side == "output" else matrix(4, dim)
    support = all_directions(estimator, dim)
    assert len(support) == directions
    mean, variance = mean_and_variance([estimate(v, m, estimator.side) for v in support])
    assert mean == pytest.approx(m.square().sum().item(), rel=1e-12)
    assert estimator.variance(m) == pytest.approx(variance, rel=1e-10, abs=1e-12 * mean**2)


@pytest.mark.parametrize(("count", "temperature"), [(1, 1.0), (2, 1.0), (1, 2.5)])
def test_fisher_rows_over_all_directions(count, temperature):
    estimator, m = FisherRows(count, temperature), matrix(3, 4)
    outputs = torch.tensor([0.3, -1.0, 1.7], dtype=torch.float64)
    support = all_directions(estimator, 3, outputs)
    assert len(support) == 2 ** (3 * count)
    mean, variance = mean_and_variance([estimate(v, m, "output") for v in support])
    weights = [math.exp(z / temperature) for z in outputs.tolist()]
    rows = [sum(entry**2 for entry in row) for row in m.tolist()]
    assert mean == pytest.approx(sum(w * r for w, r in zip(weights, rows, strict=True)) / sum(weights), rel=1e-12)
    assert estimator.variance(m, outputs=outputs) == pytest.approx(variance, rel=1e-10)


def test_fisher_rows_take_log_probabilities_for_outputs_as_they_are():
    logits = torch.randn(6, 5, dtype=torch.float64)
    at_temperature = ask(FisherRows(temperature=4.0), outputs=logits)
    torch.testing.assert_close(ask(FisherRows(), outputs=(logits / 4).log_softmax(1)), at_temperature)


@pytest.mark.parametrize("law", list(probes.LAWS))
@pytest.mark.parametrize(("dim", "count"), [(1, 1), (1, 2), (3, 1), (3, 2), (3, 3), (3, 5), (2, 5)])
def test_variance_follows_from_the_moments_of_the_law(law, dim, count):
    for m in (matrix(dim, 2), matrix(dim, 7)):
        expected = pytest.approx(law_variance(law, count, m), rel=1e-10, abs=1e-12 * m.square().sum().item() ** 2)
        assert RandomOutputs(count, law).variance(m) == expected
        assert RandomInputs(count, law).variance(m.mT) == expected
        if law == "gaussian":
            assert AntitheticNoise(count, sigma=0.3).variance(m.mT) == expected
            assert RandomInputs(count, law).variance(m) == pytest.approx(RandomOutputs(count, law).variance(m))


@pytest.mark.parametrize("law", ["gaussian", "sphere", "orthogonal"])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("side", ["output", "input"])
def test_mean_and_variance_over_a_fixed_sample(law, count, side):
    estimator = RandomOutputs(count, law) if side == "output" else RandomInputs(count, law)
    m, samples = matrix(3, 4), 40_000
    probed = m if side == "output" else m.mT
    rows = torch.zeros(samples, len(probed), dtype=torch.float64)
    v = ask(estimator, x=rows, outputs=rows, ids=torch.arange(samples))
    estimates = (v @ probed).square().sum(dim=(0, 2))
    trace = m.square().sum().item()
    assert estimates[7].item() == pytest.approx(estimate(v[:, 7], m, side), rel=1e-12)
    assert z_scores(estimates, trace).abs() < LIMIT
    assert z_scores((estimates - trace) ** 2, estimator.variance(m)).abs() < LIMIT


@pytest.mark.parametrize("side", ["output", "input"])
def test_as_many_orthogonal_directions_as_dimensions_are_exact(side):
    m = matrix(5, 8)
    count = 5 if side == "output" else 8
    estimator = RandomOutputs(2 * count, "orthogonal") if side == "output" else RandomInputs(count, "orthogonal")
    v = ask(estimator)
    assert estimator.variance(m) == 0
    for sample in range(6):
        assert estimate(v[:, sample], m, side) == pytest.approx(m.square().sum().item(), rel=1e-12)


def test_fixed_rows():
    m, outputs = matrix(5, 8), torch.randn(6, 5, dtype=torch.float64)
    labels = torch.tensor([4, 0, 1, 1, 3, 2])
    every, top, label = (ask(e, outputs=outputs, labels=labels) for e in (EveryRow(), TopClass(), LabelClass()))
    assert (every.shape, top.shape, label.shape) == ((5, 6, 5), (1, 6, 5), (1, 6, 5))
    for sample in range(6):
        row = max(range(5), key=lambda i, n=sample: outputs[n, i].item())
        assert estimate(every[:, sample], m, "output") == pytest.approx(m.square().sum().item())
        assert estimate(top[:, sample], m, "output") == pytest.approx(m[row].square().sum().item())
        assert estimate(label[:, sample], m, "output") == pytest.approx(m[labels[sample]].square().sum().item())
    assert EveryRow().variance(m) == TopClass().variance(m) == LabelClass().variance(m) == 0


def test_label_class_takes_mixed_labels_as_weights_of_rows():
    mixed = torch.rand(6, 5, dtype=torch.float32)
    assert torch.equal(ask(LabelClass(), labels=mixed), mixed.double()[None])


def test_a_label_that_is_no_output_is_loud():
    for label in (5, -1):
        with pytest.raises(RuntimeError, match="out of bounds"):
            ask(LabelClass(), labels=torch.full((6,), label))


def test_data_pairs_are_the_scaled_differences():
    x, partners = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)
    (v,) = ask(DataPairs(), x=x, partners=partners)
    for n in range(3):
        difference = partners[n] - x[n]
        torch.testing.assert_close(v[n], difference * math.sqrt(8) / difference.square().sum().sqrt())
    with pytest.raises(UnsupportedError, match=r"`DataPairs` has no variance formula without .* use RandomInputs\(\)"):
        DataPairs().variance(matrix(2, 3))


def test_data_pairs_over_all_partners():
    x, m = torch.randn(7, 4, dtype=torch.float64), matrix(3, 4)
    others = x[1:]
    v = ask(DataPairs(), x=x[:1].expand(6, 4), partners=others)[0]
    _, variance = mean_and_variance([estimate(direction[None], m, "input") for direction in v])
    assert DataPairs().variance(m, tangents=v) == pytest.approx(variance, rel=1e-10)


@pytest.mark.parametrize("basis", ["dct", "pca", "data"])
@pytest.mark.parametrize(("law", "directions"), [("rademacher", 2**3), ("basis", 3)])
def test_directions_in_a_subspace_over_all_of_them(basis, law, directions):
    x = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    probe, m = SubspaceInputs(3, basis, law=law).fitted(x), matrix(4, 6)
    u = probe.vectors.double()
    torch.testing.assert_close(u @ u.mT, torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0)
    coordinates = {tuple((u @ v[0]).mul(1e3).round().int().tolist()): v for v in all_directions(probe, 6)}
    assert len(coordinates) == directions
    mean, variance = mean_and_variance([estimate(v, m, "input") for v in coordinates.values()])
    assert mean == pytest.approx((m @ u.mT).square().sum().item(), rel=1e-5)  # the norm restricted to the subspace
    assert probe.variance(m) == pytest.approx(variance, rel=1e-4, abs=1e-6 * mean**2)


def test_the_bases_of_subspaces_are_those_of_their_definitions():
    x = torch.randn(20, 2, 3, 4, dtype=torch.float64)
    flat = x.flatten(1)
    _, vectors = torch.linalg.eigh((flat - flat.mean(0)).mT @ (flat - flat.mean(0)))
    u = SubspaceInputs(4, "pca").fitted(x).vectors.double()
    leading = vectors[:, -4:]
    torch.testing.assert_close(u.mT @ u, leading @ leading.mT, atol=1e-5, rtol=0)
    u = SubspaceInputs(4, "data").fitted(x).vectors.double()
    span = (flat[1:] - flat[0]).mT
    residual = u.mT - span @ torch.linalg.lstsq(span, u.mT).solution
    assert residual.abs().max() < 1e-5
    u = SubspaceInputs(6, "dct").fitted(x).vectors.double().reshape(6, 2, 3, 4)
    for row, (channel, p, q) in enumerate([(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (1, 1, 0)]):
        for i, j in itertools.product(range(3), range(4)):
            wave = math.cos(math.pi * p * (i + 0.5) / 3) * math.cos(math.pi * q * (j + 0.5) / 4)
            norm = math.sqrt((1 + (p > 0)) / 3 * (1 + (q > 0)) / 4)
            assert float(u[row, channel, i, j]) == pytest.approx(norm * wave, abs=1e-6)
        assert u[row, 1 - channel].abs().max() == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SubspaceInputs(0), r"`k` of `SubspaceInputs` must be an integer of at least 1\. Got 0"),
        (lambda: SubspaceInputs(2, "fourier"), r"`basis` of `SubspaceInputs`"),
        (
            lambda: SubspaceInputs(5, "pca").fitted(torch.rand(5, 9)),
            r"`--probe-dimensions`.* must be < the number of inputs.*Got 5 for 5",
        ),
        (
            lambda: SubspaceInputs(5).fitted(torch.rand(5, 4)),
            r"`k` of `SubspaceInputs` \(`--probe-dimensions`\) must be at most 4",
        ),
        (
            lambda: ask(SubspaceInputs(2, "pca")),
            r"`vectors` of `SubspaceInputs` must be a basis of the inputs\. Got none",
        ),
        (lambda: ask(SubspaceInputs(2).fitted(torch.rand(5, 3))), r"must be a basis of the inputs\. Got vectors of 3"),
        (lambda: SubspaceInputs(2).variance(matrix(2, 3)), r"must be a basis of the inputs\. Got none"),
    ],
)
def test_a_subspace_that_cannot_be(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("count", [1, 4])
def test_antithetic_noise_is_exact_for_quadratic_maps(count):
    estimator, m = AntitheticNoise(count, sigma=0.1), matrix(3, 8)
    v = ask(estimator, shape=(8,))
    x, bend = torch.randn(6, 8, dtype=torch.float64), torch.randn(3, 8, 8, dtype=torch.float64)

    def function(points):
        return points @ m.mT + torch.einsum("...i,kij,...j->...k", points - x, bend, points - x)

    differences = (function(x + estimator.step * v) - function(x - estimator.step * v)) / (2 * estimator.step)
    torch.testing.assert_close(differences, v @ m.mT, rtol=1e-10, atol=1e-10)


def test_antithetic_noise_moves_the_inputs_by_sigma():
    for count in (1, 4):
        estimator = AntitheticNoise(count, sigma=0.1)
        noise = estimator.step * ask(estimator, batch=5000, ids=torch.arange(5000))
        assert z_scores(noise.flatten() ** 2, 0.1**2).abs() < LIMIT


def test_the_mean_of_averaged_rows_over_all_noise(monkeypatch):
    """‖E M‖² + E‖M − E M‖²/m, for noise that takes two values and M linear in it: all m-tuples are enumerated."""
    m0, bend = matrix(3, 4), torch.randn(3, 4, dtype=torch.float64)
    for count in (1, 2, 3):
        probe = NoiseAveraged(EveryRow(), sigma=0.5, count=count)
        values = []
        for signs in itertools.product((-1.0, 1.0), repeat=count):
            z = torch.tensor(signs, dtype=torch.float64).reshape(count, 1, 1)
            monkeypatch.setattr(probes, "directions", lambda *_, z=z, **__: z)
            x = probe.noisy(torch.zeros(1, 1, dtype=torch.float64), ONE, 0, 0)
            rows = torch.stack([m0 + float(value) * bend for value in x.flatten()], 1)  # a row for each noisy input
            values.append(float(probe.averaged(rows).square().sum()))
        expected = m0.square().sum() + 0.25 * bend.square().sum() / count
        assert sum(values) / len(values) == pytest.approx(float(expected), rel=1e-12)
    assert NoiseAveraged(RandomOutputs(2), sigma=1.0).variance(m0) == RandomOutputs(2).variance(m0)
    for inner in (AntitheticNoise(sigma=0.1), NoiseAveraged(sigma=0.1)):
        with pytest.raises(InputError, match=r"must take derivatives at the noisy inputs\. Got (Anti|Noise)"):
            NoiseAveraged(inner, sigma=0.1)


def test_every_name_has_a_case():
    assert {name: type(estimator) for name, (estimator, *_) in CASES.items()} == ESTIMATORS


@pytest.mark.parametrize("name", CASES)
def test_contract(name):
    estimator, cost, needed = CASES[name]
    assert isinstance(estimator, Estimator)
    assert estimator.passes(5) == cost
    v = ask(estimator)
    assert v.shape[1:] == ((6, 5) if estimator.side == "output" else (6, 2, 4))
    assert v.shape[0] == {"antithetic-noise": 3, "noise-averaged": 2}.get(name, max(cost.forward, cost.backward))
    assert v.dtype == torch.float64
    assert torch.equal(ask(estimator), v)
    for changed in ({"draw": 5}, {"seed": 4}):
        assert torch.equal(ask(estimator, **changed), v) != ("ids" in needed)
    single = ask(estimator, x=torch.zeros(6, 2, 4), outputs=torch.zeros(6, 5), partners=torch.ones(6, 2, 4))
    assert single.dtype == torch.float32
    live = {"x": torch.ones(6, 2, 4), "outputs": torch.ones(6, 5), "partners": torch.zeros(6, 2, 4)}
    assert not ask(estimator, **{key: value.requires_grad_() for key, value in live.items()}).requires_grad
    with pytest.raises(dataclasses.FrozenInstanceError):
        estimator.side = "output"


@pytest.mark.parametrize("name", CASES)
def test_order_and_split_of_the_batch_do_not_matter(name):
    estimator, *_ = CASES[name]
    batch = {"x": torch.randn(7, 2, 4), "partners": torch.randn(7, 2, 4), "outputs": torch.randn(7, 5)}
    batch |= {"labels": torch.randint(5, (7,)), "ids": torch.randperm(100)[:7]}
    whole = ask(estimator, **batch)
    order = torch.tensor([6, 2, 0, 1, 5, 3, 4])
    assert torch.equal(ask(estimator, **{key: value[order] for key, value in batch.items()}), whole[:, order])
    parts = [ask(estimator, **{key: value[cut] for key, value in batch.items()}) for cut in (slice(0, 3), slice(3, 7))]
    assert torch.equal(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("name", CASES)
def test_needs_what_it_says(name):
    estimator, _, needed = CASES[name]
    others = {"x", "outputs", "labels", "ids", "partners"} - set(needed)
    assert torch.equal(ask(estimator, **dict.fromkeys(others)), ask(estimator))
    for missing in needed:
        who = type(estimator.probe if name == "noise-averaged" else estimator).__name__
        message = f"`{missing}` of `{who}.directions` must be given. Pass "
        with pytest.raises(InputError, match=message):
            ask(estimator, **{missing: None})


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomOutputs(0), "`count` of `RandomOutputs` must be an integer of at least 1. Got 0."),
        (lambda: RandomInputs(-2), "`count` of `RandomInputs` must be an integer of at least 1. Got -2."),
        (lambda: SampledRows(0), "`count` of `SampledRows` must be an integer of at least 1. Got 0."),
        (lambda: FisherRows(2.5), "`count` of `FisherRows` must be an integer of at least 1. Got 2.5."),
        (lambda: AntitheticNoise(0, sigma=1.0), "`count` of `AntitheticNoise` must be an integer of at least 1."),
        (lambda: RandomOutputs(1, "spere"), "`law` of `RandomOutputs` must be a known name. Got 'spere'. Nearest: sph"),
        (lambda: RandomInputs(1, "Basis"), "`law` of `RandomInputs` must be a known name. Got 'Basis'. Nearest: bas"),
        (lambda: AntitheticNoise(sigma=0.0), "`sigma` of `AntitheticNoise` must be positive and finite. Got 0.0."),
        (lambda: AntitheticNoise(sigma=math.nan), "`sigma` of `AntitheticNoise` must be positive and finite. Got nan."),
        (lambda: FisherRows(temperature=-1), "`temperature` of `FisherRows` must be positive and finite. Got -1."),
        (lambda: ask(SampledRows(6)), "`count` of `SampledRows` must not exceed the number of outputs. Got 6 of 5."),
        (lambda: SampledRows(6).passes(5), "the number of outputs. Got 6 of 5. Use EveryRow() for all rows."),
        (lambda: SampledRows(6).variance(matrix(5, 2)), "the number of outputs. Got 6 of 5. Use EveryRow()"),
        (lambda: FisherRows().variance(matrix(5, 2)), "`outputs` of `FisherRows.variance` must be given. Pass"),
        (lambda: ask(RandomInputs(), ids=ONE), "`ids` of `RandomInputs.directions` must be one for each sample."),
        (lambda: ask(SampledRows(2), ids=ONE), "must be one for each sample. Got 1 for 6 samples. Pass an integer id"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(InputError, match=re.escape(message)):
        make()
