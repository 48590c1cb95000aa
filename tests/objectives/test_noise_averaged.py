"""Rows of a Jacobian that is averaged over noise, the same noise for student and teacher."""

import pytest
import torch
from torch import nn

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import AttentionPixel, DataPairs, NoiseAveraged, RandomInputs, RandomOutputs
from jacmatch.objectives import AtMixedPairs, Distillation, Robustness

from . import cases


def jacobian(network, x):
    return torch.autograd.functional.jacobian(network, x[None])[0, :, 0].flatten(1)


@pytest.mark.parametrize("inner", [RandomOutputs(2), RandomInputs(2), DataPairs()])
@pytest.mark.parametrize("point", [None, AtMixedPairs()])
def test_the_term_is_that_of_the_averaged_jacobians(inner, point):
    probe = NoiseAveraged(inner, sigma=0.4, count=3)
    student, teacher, given = cases.student(), cases.teacher(), cases.batch()
    settings = {"jacobians": 1.0, "jacobian_loss": "squared", "point": point}
    made = Distillation(student, teacher, probe=probe, **settings)
    assert made.needs_partners == (point is not None or isinstance(inner, DataPairs))
    assert "average" in made.not_compiled() or probe.side == "input"
    x, ids = given["x"], given["ids"]
    terms = made(x, given["y"], ids=ids, draw=5, partners=given["partners"], partner_labels=given["partner_labels"])
    moved, _ = made.differentiation.point.move(x, given["partners"], ids=ids, seed=0, draw=5)
    noisy = probe.noisy(moved, ids, 0, 5).unflatten(0, (len(x), 3))
    about = {"ids": ids, "seed": 0, "draw": 5, "partners": given["partners"], "labels": None}
    v = inner.directions(x=moved, outputs=teacher(moved).detach(), **about).flatten(2)
    total = 0.0
    for n in range(len(x)):
        m = sum(jacobian(student, z) - jacobian(teacher, z) for z in noisy[n]) / 3
        total += float((v[:, n] @ (m if probe.side == "output" else m.mT)).square().sum())
    assert float(terms["jacobians"].detach()) == pytest.approx(total / len(x), rel=1e-8)
    torch.testing.assert_close(terms.student_outputs, student(moved))
    parameters = list(student.parameters())
    direction = cases.direction_of(parameters)

    def value():
        return made(x, given["y"], ids=ids, draw=5, partners=given["partners"], partner_labels=given["partner_labels"])

    made.eval()
    expected = cases.directional_difference(lambda: value()["jacobians"].detach(), parameters, direction)
    assert cases.along(value()["jacobians"], parameters, direction) == pytest.approx(expected, rel=1e-5)


def test_running_statistics_move_once():
    student = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).double().train()
    made = Distillation(student, cases.teacher(), probe=NoiseAveraged(sigma=0.1, count=2), jacobians=1.0).train()
    made(cases.batch()["x"], cases.batch()["y"])
    assert int(student[2].num_batches_tracked) == 1


def test_where_an_average_over_noise_is_refused():
    probe = NoiseAveraged(sigma=0.1)
    with pytest.raises(InputError, match=r"`probe` of `Robustness` must not be averaged over noise"):
        Robustness(cases.student(), probe=probe)
    with pytest.raises(InputError, match=r"`Distillation` must not be averaged over noise with AttentionPixel"):
        Distillation(cases.student(), cases.teacher(), probe=probe, readout=AttentionPixel("1"))
    made, given = Distillation(cases.student(), cases.teacher(), probe=probe, jacobians=1.0), cases.batch()
    with pytest.raises(UnsupportedError, match=r"Products of `NoiseAveraged` are not cached"):
        made.question(given["x"], given["y"], ids=given["ids"], draw=0)
