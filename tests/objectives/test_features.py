"""Readouts of features: student and teacher are unlike, and the pixel is the teacher's."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import AttentionPixel, EveryRow, LabelLogit, Logits, PooledFeatures, RandomInputs
from jacmatch.objectives import Distillation
from jacmatch.teachers import BlackBoxTeacher

from .cases import along, direction_of, directional_difference


def student():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(192, 4)).double()


def teacher():
    torch.manual_seed(2)
    body = nn.Sequential(nn.Conv2d(1, 5, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(5, 3, 1), nn.Tanh())
    net = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(48, 4))
    net[0] = body
    return net.double()


def images():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 3, 1])


def pooled_map(features, size):
    """Σ_c z², and the mean over windows, one after the other."""
    attention = sum(channel**2 for channel in features)
    window = len(attention) // size
    rows = [attention[i * window : (i + 1) * window] for i in range(size)]
    return torch.stack([row[:, j * window : (j + 1) * window].mean() for row in rows for j in range(size)])


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("probe", [EveryRow(), RandomInputs(2)])
def test_the_attention_at_the_teachers_pixel(size, probe):
    s, t, (x, y) = student(), teacher(), images()
    readout = (AttentionPixel("0", size=size), AttentionPixel("0.2", size=size))
    settings = {"probe": probe, "readout": readout, "jacobian_loss": "squared", "jacobians": 1.0}
    terms = Distillation(s, t, **settings)(x, y)
    ids = torch.arange(3)
    v = probe.directions(x=x, outputs=x.new_ones(3, 1), labels=y, ids=ids, seed=0, draw=0, partners=None)
    total, pixels = 0.0, []
    for n in range(3):
        with torch.no_grad():
            pixel = int(pooled_map(t[0][:3](x[n : n + 1])[0], size).argmax())
        pixels.append(pixel == int(pooled_map(s[0](x[n : n + 1])[0], size).argmax()))
        rows = [
            torch.autograd.functional.jacobian(lambda z, f=f, pixel=pixel: pooled_map(f(z[None])[0], size)[pixel], x[n])
            for f in (s[0], t[0][:3])
        ]
        if probe.side == "output":
            total += float(((rows[0] - rows[1]) ** 2).sum())
        else:
            total += sum(float(((rows[0] - rows[1]) * one[n]).sum() ** 2) for one in v)
    assert float(terms["jacobians"].detach()) == pytest.approx(total / 3, rel=1e-9)
    assert size == 1 or not all(pixels), "or the student's own pixel would do as well"


def test_the_attention_term_has_the_gradient_of_differences():
    s, t, (x, y) = student(), teacher(), images()
    readout = (AttentionPixel("0", size=2), AttentionPixel("0.2", size=2))
    objective = Distillation(s, t, probe=EveryRow(), readout=readout, jacobians=1.0, jacobian_loss="normalized").eval()
    parameters = list(s.parameters())
    direction = direction_of(parameters)
    whole = along(objective(x, y)["loss"], parameters, direction)
    assert whole == pytest.approx(
        directional_difference(lambda: objective(x, y)["loss"], parameters, direction), rel=1e-6
    )


@pytest.mark.parametrize("size", [1, 2])
def test_pooled_features(size):
    s, t, (x, y) = student(), teacher(), images()
    readout = (PooledFeatures("0", size=size), PooledFeatures("0.2", size=size))
    terms = Distillation(s, t, probe=EveryRow(), readout=readout, jacobian_loss="squared", jacobians=1.0)(x, y)
    total = 0.0
    for n in range(3):
        rows = [
            torch.autograd.functional.jacobian(
                lambda z, f=f: functional.avg_pool2d(f(z[None]), 8 // size if f is s[0] else 4 // size).flatten(), x[n]
            )
            for f in (s[0], t[0][:3])
        ]
        total += float(((rows[0] - rows[1]) ** 2).sum())
    assert float(terms["jacobians"].detach()) == pytest.approx(total / 3, rel=1e-9)


def test_two_readouts_of_outputs():
    s, t, (x, y) = student(), teacher(), images()
    terms = Distillation(s, t, probe=EveryRow(), readout=(LabelLogit(), LabelLogit()), jacobians=1.0)(x, y)
    one = Distillation(s, t, probe=EveryRow(), readout=LabelLogit(), jacobians=1.0)(x, y)
    assert torch.equal(terms["loss"], one["loss"])


def test_a_pixel_of_one_map_is_none_of_another():
    x, y = images()
    sizes = (AttentionPixel("0", size=4), AttentionPixel("0.2", size=2))
    with pytest.raises(
        InputError, match=r"Both `AttentionPixel` in `readout` .* must have the same `size`\. Got 4 and 2\."
    ):
        Distillation(student(), teacher(), readout=sizes)
    for first, second in ((student(), teacher()), (teacher(), student())):
        layers = ("0", "0.2") if isinstance(first[0], nn.Conv2d) else ("0.2", "0")
        objective = Distillation(first, second, readout=tuple(AttentionPixel(layer) for layer in layers))
        match = r"Without a `size` of `AttentionPixel`, student and teacher need attention maps of the same size\. Got"
        with pytest.raises(InputError, match=match):
            objective(x, y)


def test_like_maps_need_no_size():
    x, y = images()
    a, b = student(), student()
    with torch.no_grad():
        b[0].weight.mul_(-0.5)
    terms = Distillation(a, b, probe=EveryRow(), readout=AttentionPixel("0"), jacobians=1.0)(x, y)
    sized = Distillation(a, b, probe=EveryRow(), readout=AttentionPixel("0", size=8), jacobians=1.0)(x, y)
    torch.testing.assert_close(terms["jacobians"], sized["jacobians"])
    assert float(terms["jacobians"].detach()) > 0.01


@pytest.mark.parametrize(
    ("readout", "got"),
    [
        ((PooledFeatures("0"), Logits()), r"\(3,\) and \(4,\)"),
        ((AttentionPixel("0"), PooledFeatures("0.2")), r"\(1,\) and \(3,\)"),
    ],
)
@pytest.mark.parametrize("probe", [EveryRow(), RandomInputs(1)])
def test_readouts_of_different_length_are_refused(readout, got, probe):
    x, y = images()
    match = rf"Student and teacher must have the same number of values of the readout\. Got {got}\. Choose `readout`"
    with pytest.raises(InputError, match=match):
        Distillation(student(), teacher(), readout=readout, probe=probe)(x, y)


def test_a_black_box_has_no_features():
    x, y = images()
    objective = Distillation(student(), BlackBoxTeacher(teacher()), readout=PooledFeatures("0"), probe=RandomInputs(1))
    with pytest.raises(UnsupportedError, match=r"must return features; BlackBoxTeacher returns outputs only"):
        objective(x, y)
