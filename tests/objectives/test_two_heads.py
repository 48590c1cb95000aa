"""A student with two heads: labels of the target, and outputs of a teacher of other classes or of features."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from jacmatch.errors import InputError
from jacmatch.jacobian import OutputsFrom, PCAFeatures, RandomInputs, RandomOutputs
from jacmatch.losses import hinton_kl
from jacmatch.objectives import AtMixedPairs, Distillation
from jacmatch.objectives.transfer import Transfer
from jacmatch.teachers import ModuleTeacher

from . import cases, reference

CLASSES, OTHERS = 2, 4


def networks():
    return cases.perceptron(5, seed=1, outputs=CLASSES + OTHERS), cases.teacher()


def given(**changes):
    batch = cases.batch()
    return {**batch, "y": batch["y"] % CLASSES, "partner_labels": batch["partner_labels"] % CLASSES, **changes}


@pytest.mark.parametrize("point", [None, AtMixedPairs()])
@pytest.mark.parametrize("probe", [RandomOutputs(2), RandomInputs(1)])
def test_the_terms_are_those_of_the_heads(point, probe):
    student, teacher = networks()
    settings = {"classes": CLASSES, "probe": probe, "point": point, "jacobians": 1.0, "jacobian_loss": "squared"}
    made = Distillation(student, teacher, output_loss="kl", temperature=2.0, **settings)
    batch = given(draw=7)
    terms = made(batch.pop("x"), batch.pop("y"), **batch)
    x, y, draw = given()["x"], given()["y"], 7
    moved, share = made.differentiation.point.move(x, batch["partners"], ids=batch["ids"], seed=0, draw=draw)
    both = student(moved)
    first, second = both[:, :CLASSES], both[:, CLASSES:]
    each = functional.cross_entropy(first, y, reduction="none")
    if share is not None:
        each = share * each + (1 - share) * functional.cross_entropy(first, batch["partner_labels"], reduction="none")
    torch.testing.assert_close(terms["labels"], each.mean())
    torch.testing.assert_close(terms["outputs"], hinton_kl(second, teacher(moved), 2.0).mean())
    v = probe.directions(x=moved, outputs=second, ids=batch["ids"], seed=0, draw=draw)
    total = 0.0
    for n in range(len(x)):
        j = [
            torch.autograd.functional.jacobian(f, moved[n : n + 1]).reshape(OTHERS, -1)
            for f in (lambda z: student(z)[:, CLASSES:], teacher)
        ]
        m = j[0] - j[1]
        rows = v[:, n].flatten(1)
        total += float((rows @ m if probe.side == "output" else rows @ m.mT).square().sum())
    assert float(terms["jacobians"].detach()) == pytest.approx(total / len(x), rel=1e-6)
    assert terms.student_outputs.shape == (len(x), CLASSES)
    assert made.student(x).shape == (len(x), CLASSES)
    assert isinstance(made.differentiation.readout, OutputsFrom)


def test_unlabelled_samples_have_no_label_term():
    student, teacher = networks()
    made = Distillation(student, teacher, classes=CLASSES, jacobians=0.0)
    x, y = given()["x"], torch.tensor([1, -100, 0])
    expected = functional.cross_entropy(student(x)[[0, 2], :CLASSES], y[[0, 2]], reduction="sum") / 3
    torch.testing.assert_close(made(x, y)["labels"], expected)


def test_features_in_the_basis_of_the_teacher_are_learned_by_the_second_head():
    student, teacher = networks()
    x, y = given()["x"], given()["y"]
    readout = PCAFeatures("1", 2).fitted(teacher, x)
    student = cases.perceptron(5, seed=1, outputs=CLASSES + 2)
    settings = {"classes": CLASSES, "output_loss": "squared", "jacobian_loss": "squared", "jacobians": 1.0}
    made = Distillation(student, ModuleTeacher(ReadoutOf(teacher, readout)), probe=RandomOutputs(1), **settings)
    features = (teacher[1](x.flatten(1)) - readout.mean) @ readout.components
    terms = made(x, y)
    assert made.loss_weights.weights["outputs"] == 1.0
    expected = sum(reference.squared(s[CLASSES:], t) for s, t in zip(student(x), features, strict=True)) / len(x)
    assert float(terms["outputs"].detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    assert terms["jacobians"].detach() > 0


class ReadoutOf(nn.Module):
    def __init__(self, network, readout):
        super().__init__()
        self.network, self.readout = network, readout

    def forward(self, x):
        return (self.network[1](x.flatten(1)) - self.readout.mean) @ self.readout.components


def test_heads_that_do_not_fit():
    student, teacher = networks()
    with pytest.raises(InputError, match=r"Student and teacher must have the same outputs\. Got \(3,\) and \(4,\)"):
        Distillation(student, teacher, classes=3, jacobians=0.0)(given()["x"], given()["y"])
    with pytest.raises(InputError, match=r"`first` of `OutputsFrom` must be an integer of at least 1"):
        Distillation(student, teacher, classes=0, jacobians=0.0)


def test_an_adapted_teacher_shares_the_head_at_mixed_pairs():
    def network(channels, seed):
        torch.manual_seed(seed)
        layers = (nn.Conv2d(1, channels, 2), nn.Tanh(), nn.Flatten(), nn.Linear(channels * 9, 3))
        return nn.Sequential(*layers).double()

    student, teacher = network(2, 1), network(3, 2)
    made = Transfer(
        student, teacher, classes=3, pairs=[("1", "1")], point=AtMixedPairs(), shared=True, attention=1.0, jacobians=1.0
    )
    assert made.needs_partners
    x, partners = torch.rand(2, 3, 1, 4, 4, dtype=torch.float64)
    ids, y, other = torch.arange(3), torch.tensor([0, 1, 2]), torch.tensor([2, 0, -100])
    terms = made(x, y, ids=ids, draw=1, partners=partners, partner_labels=other)
    moved, share = AtMixedPairs().move(x, partners, ids=ids, seed=0, draw=1)
    outputs = student(moved)
    torch.testing.assert_close(terms["outputs"], hinton_kl(outputs, teacher(moved), 2.0).mean())
    pairs = (share, y), (1 - share, other)
    costs = sum(part * functional.cross_entropy(outputs, label, reduction="none") for part, label in pairs)
    torch.testing.assert_close(terms["labels"], costs.mean())
    maps = [each[:2](moved).square().sum(1).flatten(1) for each in (student, teacher)]
    apart = functional.normalize(maps[0]) - functional.normalize(maps[1])
    torch.testing.assert_close(terms["attention"], apart.square().sum(1).mean())
    with pytest.raises(InputError, match=r"Got 3 outputs\. With `shared` the teacher has the classes of the target"):
        Transfer(student, network(3, 2)[:3], classes=3, shared=True, attention=0, jacobians=0)(x, y)
