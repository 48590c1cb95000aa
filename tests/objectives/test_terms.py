"""Each term equals its definition, and the parameter gradient of the whole loss equals differences, in float64."""

import contextlib
import itertools

import pytest
import torch

from jacmatch.errors import InputError
from jacmatch.jacobian import (
    ESTIMATORS,
    READOUTS,
    AntitheticNoise,
    EveryRow,
    FisherRows,
    LogProbabilities,
    NoiseAveraged,
    RandomInputs,
)
from jacmatch.losses import JACOBIAN_LOSSES
from jacmatch.objectives import POINTS as POINT_TYPES
from jacmatch.objectives import AtMixedPairs, Distillation, GradientShare
from jacmatch.teachers import AnalyticTeacher, BlackBoxTeacher, EnsembleTeacher, ModuleTeacher

from . import reference
from .cases import (
    BATCH,
    EXACT,
    OUTPUTS,
    POINTS,
    PROBES,
    READINGS,
    SHAPE,
    along,
    batch,
    direction_of,
    directional_difference,
    go_together,
    perceptron,
    student,
    teacher,
    unchecked,
)


def in_pairs(probe, reading, point, loss):
    """Every pair of settings of two axes, and every triple of the first three; the rest is slow."""
    by_probe = reading == "logits" and point == "data"
    by_reading = probe in ("random-outputs", "random-inputs") and point == "data"
    return loss == "relative" or by_probe or by_reading or (probe == "random-outputs" and reading == "logits")


COMBINATIONS = [
    pytest.param(*combination, marks=[] if in_pairs(*combination) else [pytest.mark.slow])
    for combination in itertools.product(PROBES, READINGS, POINTS, JACOBIAN_LOSSES)
    if go_together(*combination[:3])
]


def test_every_probe_point_and_readout_of_outputs_has_a_row():
    assert {type(probe) for probe in PROBES.values()} == set(ESTIMATORS.values()) - {NoiseAveraged}
    assert set(POINTS) == set(POINT_TYPES)
    assert set(READINGS) == set(READOUTS) - {
        *("attention-pixel", "attention-maps", "pooled-features", "outputs-from", "pca-features")
    }
    assert set(JACOBIAN_LOSSES) == set(reference.JACOBIAN_LOSSES)


@pytest.mark.parametrize(("probe", "reading", "point", "loss"), COMBINATIONS)
def test_value_and_gradient(probe, reading, point, loss):
    with contextlib.nullcontext() if loss == "relative" else unchecked():
        s, t, given = student(), teacher(), batch()
        objective = Distillation(
            s,
            t,
            labels=0.5,
            outputs=0.1,
            jacobians=2.0,
            probe=PROBES[probe],
            readout=READINGS[reading].readout,
            jacobian_loss=loss,
            point=POINTS[point],
        ).eval()
        terms = objective(**given)
        moved, share = POINTS[point].move(given["x"], given["partners"], ids=given["ids"], seed=0, draw=0)
        labels = given["y"] if share is None else None
        truth = reference.jacobian_terms(
            s, t, READINGS[reading], loss, PROBES[probe], moved, labels, given["ids"], 0, given["partners"]
        )
        torch.testing.assert_close(terms.unweighted["jacobians"], truth.mean(), rtol=1e-9, atol=1e-12)

        parameters = list(s.parameters())
        direction = direction_of(parameters)
        of_jacobians, whole = (along(terms[name], parameters, direction) for name in ("jacobians", "loss"))
        exact = directional_difference(lambda: objective(**given)["loss"], parameters, direction)
        assert whole == pytest.approx(exact, rel=1e-6, abs=1e-8)
        assert abs(of_jacobians) > 1e-9, "the Jacobian term must have a gradient"


@pytest.mark.parametrize("output_loss", ["squared", "kl"])
@pytest.mark.parametrize("mixed", [False, True])
def test_labels_and_outputs(output_loss, mixed):
    s, t, given = student(), teacher(), batch()
    point = AtMixedPairs() if mixed else None
    objective = Distillation(s, t, jacobians=0, output_loss=output_loss, temperature=3.0, point=point, seed=4)
    terms = objective(**given)
    x, share = given["x"], None
    if mixed:
        x, share = AtMixedPairs().move(x, given["partners"], ids=given["ids"], seed=4, draw=0)
    labels, outputs = [], []
    for n in range(BATCH):
        z, y = (net(x[n : n + 1])[0].detach() for net in (s, t))
        first, other = (reference.cross_entropy(z, given[name][n]) for name in ("y", "partner_labels"))
        labels.append(first if share is None else share[n] * first + (1 - share[n]) * other)
        outputs.append(reference.kl(z, y, 3.0) if output_loss == "kl" else reference.squared(z, y))
    torch.testing.assert_close(terms["labels"], torch.stack(labels).mean())
    torch.testing.assert_close(terms["outputs"], torch.stack(outputs).mean())
    torch.testing.assert_close(terms.student_outputs, s(x))
    torch.testing.assert_close(terms.teacher_outputs, t(x))
    assert not terms.teacher_outputs.requires_grad
    assert terms.student_outputs.requires_grad


def test_terms_add_up_and_weights_multiply():
    given = batch()
    one = Distillation(student(), teacher(), labels=1.0, outputs=1.0, jacobians=1.0, probe=EveryRow())(**given)
    weights = {"labels": 0.25, "outputs": 3.0, "jacobians": 0.125}
    terms = Distillation(student(), teacher(), probe=EveryRow(), **weights)(**given)
    assert terms.keys() == ["loss", "labels", "outputs", "jacobians"]
    assert torch.equal(terms["loss"], torch.stack([terms[name] for name in weights]).sum())
    for name, weight in weights.items():
        assert torch.equal(terms.unweighted[name], one.unweighted[name])
        assert torch.equal(terms[name], weight * terms.unweighted[name])
        assert terms[name].dtype == EXACT


def test_terms_of_weight_zero_are_not_there():
    given = batch()
    assert Distillation(student(), teacher(), outputs=0, jacobians=0)(**given).keys() == ["loss", "labels"]
    assert Distillation(student())(**given).keys() == ["loss", "labels"]
    terms = Distillation(student(), teacher(), labels=0, jacobians=GradientShare(0.3))(given["x"])
    assert terms.keys() == ["loss", "outputs", "jacobians"]
    with pytest.raises(KeyError, match="labels"):
        terms["labels"]
    assert Distillation(student())(**given).teacher_outputs is None


def test_a_loss_without_a_term_can_still_be_differentiated():
    s, given = student(), batch()
    objective = Distillation(s, teacher(), labels=0, outputs=0, jacobians=1.0, every=2)
    objective(**given)
    terms = objective(**given)
    assert terms.keys() == ["loss"]
    assert float(terms["loss"].detach()) == 0
    terms["loss"].backward()
    assert all(float(p.grad.abs().max()) == 0 for p in s.parameters())


def test_the_last_bias_has_no_part_in_the_jacobian():
    s = student()
    Distillation(s, teacher(), labels=0, outputs=0, jacobians=1.0)(**batch())["loss"].backward()
    assert s[3].bias.grad is None
    assert float(s[3].weight.grad.norm()) > 0
    assert float(s[1].bias.grad.norm()) > 0


def test_measuring_does_not_change_the_gradient():
    given = batch()
    for probe in (EveryRow(), RandomInputs(2)):
        gradients = []
        for training in (True, False):
            s = student()
            objective = Distillation(s, teacher(), jacobians=1.0, probe=probe).train(training)
            gradients.append(torch.autograd.grad(objective(**given)["loss"], list(s.parameters())))
        for measured, plain in zip(*gradients, strict=True):
            assert torch.equal(measured, plain)


def test_without_gradients_the_terms_are_the_same():
    given = batch()
    objective = Distillation(student(), teacher(), jacobians=1.0).eval()
    with torch.no_grad():
        quiet = objective(**given)
    assert not quiet["loss"].requires_grad
    torch.testing.assert_close(quiet["loss"], objective(**given)["loss"].detach())


def test_regression():
    s, t, given = student(), teacher(), batch()
    given["y"] = torch.randn(BATCH, OUTPUTS, dtype=EXACT)
    given.pop("partner_labels")
    objective = Distillation(s, t, task="regression", labels=1.5, jacobians=1.0, probe=EveryRow()).eval()
    terms = objective(**given)
    truth = torch.stack([reference.squared(a, b) for a, b in zip(s(given["x"]), given["y"], strict=True)]).mean()
    torch.testing.assert_close(terms["labels"], 1.5 * truth)
    parameters = list(s.parameters())
    direction = direction_of(parameters)
    exact = directional_difference(lambda: objective(**given)["loss"], parameters, direction)
    assert along(objective(**given)["loss"], parameters, direction) == pytest.approx(exact, rel=1e-6)


def test_labels_may_be_probabilities():
    given = batch()
    given["y"] = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 1, 0], [0.1, 0.2, 0.3, 0.4]], dtype=EXACT)
    logs = student()(given["x"]).log_softmax(1)
    terms = Distillation(student(), jacobians=0)(given["x"], given["y"])
    torch.testing.assert_close(terms["labels"], -(given["y"] * logs).sum(1).mean())


def test_every_kind_of_teacher_gives_the_same_terms():
    given, net = batch(), teacher()
    a, b, c, d = (p.detach() for p in teacher().parameters())

    def jacobian(x):
        derivatives = 1 - torch.tanh(x.flatten(1) @ a.T + b) ** 2
        return torch.einsum("kh,nh,hi->nki", c, derivatives, a).view(len(x), OUTPUTS, *SHAPE)

    kinds = {
        "module": ModuleTeacher(net),
        "analytic": AnalyticTeacher(lambda x: torch.tanh(x.flatten(1) @ a.T + b) @ c.T + d, jacobian),
        "ensemble": EnsembleTeacher([ModuleTeacher(net), ModuleTeacher(net)]),
        "black box": BlackBoxTeacher(net),
    }
    for probe in (FisherRows(2), RandomInputs(2), PROBES["antithetic-noise"]):
        terms = {
            name: Distillation(student(), kind, jacobians=1.0, probe=probe, readout=LogProbabilities())(**given)
            for name, kind in kinds.items()
            if kind.answers_vjp or probe.side == "input"
        }
        for other in terms.values():
            for name in ("labels", "outputs", "jacobians"):
                torch.testing.assert_close(other[name], terms["module"][name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("probe", PROBES)
def test_a_float32_student_learns_from_a_float64_teacher(probe):
    given = {name: value.float() if value.is_floating_point() else value for name, value in batch().items()}
    terms = Distillation(student().float(), teacher(), jacobians=1.0, probe=PROBES[probe])(**given)
    exact = Distillation(student(), teacher(), jacobians=1.0, probe=PROBES[probe])(**batch())
    assert terms["loss"].dtype == torch.float32
    torch.testing.assert_close(terms["loss"].double(), exact["loss"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("probe", [*PROBES.values(), AntitheticNoise(1, sigma=1e-3)], ids=[*PROBES, "small noise"])
def test_autocast_costs_digits_of_the_network_alone(probe):
    """The term in 16 bits is that in 32 up to rounding of single values; a difference of rounded ones would be lost."""
    given = {name: value.float() if value.is_floating_point() else value for name, value in batch().items()}
    s = student().float()
    parameters = [p for p in s.parameters() if p is not s[3].bias]
    objective = Distillation(s, teacher().float(), jacobians=1.0, probe=probe).eval()
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            terms = objective(**given)
        assert all(terms[name].dtype == torch.float32 for name in terms)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(terms["jacobians"], parameters)]))
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 0.03


def test_another_number_of_classes_is_named_whatever_the_probe():
    match = (
        r"Student and teacher must have the same outputs\. Got \(5,\) and \(4,\)\. Build the student with the teacher's"
    )
    for probe in PROBES.values():
        with pytest.raises(InputError, match=match):
            Distillation(perceptron(5, 1, outputs=5), teacher(), labels=0, probe=probe)(**batch())
    with pytest.raises(InputError, match=match):
        Distillation(perceptron(5, 1, outputs=5), teacher(), labels=0, jacobians=0)(**batch())
