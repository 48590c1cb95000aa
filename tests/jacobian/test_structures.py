"""Tuples and dictionaries of inputs and outputs in `jvp`, `vjp` and `jacobian`, against torch.autograd.functional."""

from collections import OrderedDict
from dataclasses import dataclass
from operator import itemgetter
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian as by_definition

import jacmatch
from jacmatch import InputError, Inputs, UnsupportedError

D, B = torch.float64, 3
X, T = (
    torch.randn(B, *shape, dtype=D, generator=torch.Generator().manual_seed(n)) for n, shape in enumerate([(2, 2), ()])
)
VX, VT = torch.randn(2, B, 2, 2, dtype=D), torch.randn(2, B, dtype=D)


@dataclass
class Detected:
    scores: Tensor
    mask: Tensor


class Network(nn.Module):
    """A classifier and a dense head of two inputs, an integer output, and None."""

    def __init__(self, kind=D):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.scores = nn.Linear(5, 6).to(kind), nn.Linear(6, 3).to(kind)

    def forward(self, x, t, scale=1.0):
        h = self.body(torch.cat([x.flatten(1), t[:, None]], 1)).tanh() * scale
        mask = (h[:, :4] ** 2).view(-1, 2, 2)
        inner = {"mask": mask, "sum": mask.sum((1, 2))}
        return {"scores": self.scores(h), "inner": inner, "top": h.argmax(1), "none": None}


def both(out):
    return {"scores": out["scores"], "inner": dict(out["inner"])}


def blocks(network, n):
    """Blocks of the Jacobian of sample n by definition: of scores, mask and sum by x and by t."""

    def outputs(x, t):
        out = network(x[None], t[None], scale=torch.tensor(0.5, dtype=D))
        return out["scores"][0], out["inner"]["mask"][0], out["inner"]["sum"][0]

    return by_definition(outputs, (X[n], T[n]))


@pytest.mark.parametrize("way", ["module", "function"])
@pytest.mark.parametrize("kind", [tuple, dict, Inputs])
def test_products_have_the_structure_of_inputs_and_outputs(kind, way):
    network = Network()
    module = network if way == "module" else lambda x, t, scale: network(x, t, scale=scale)
    x = (X, T) if kind is tuple else {"x": X, "t": T}
    v = (VX, VT) if kind is tuple else {"x": VX, "t": VT}
    first, second = (0, 1) if kind is tuple else ("x", "t")
    x = Inputs(x) if kind is Inputs else x
    settings = {"context": {"scale": torch.tensor(0.5, dtype=D)}, "output": both}
    y, j = jacmatch.jacobian(module, x, **settings)
    torch.testing.assert_close(y["inner"]["mask"], network(X, T, scale=0.5)["inner"]["mask"])
    u = {
        "scores": torch.randn(B, 3, dtype=D),
        "inner": {"mask": torch.randn(B, 2, 2, dtype=D), "sum": torch.randn(B, dtype=D)},
    }
    _, rows = jacmatch.vjp(module, x, u, **settings)
    _, columns = jacmatch.jvp(module, x, v, **settings)
    for n in range(B):
        wanted = blocks(network, n)
        for name, (by_x, by_t) in zip(("scores", "mask", "sum"), wanted, strict=True):
            here = j[name] if name == "scores" else j["inner"][name]
            torch.testing.assert_close(here[first][n], by_x)
            torch.testing.assert_close(here[second][n], by_t)
            jv = torch.tensordot(VX[:, n], by_x, ([1, 2], [-2, -1])) + VT[:, n].view(2, *[1] * by_t.dim()) * by_t
            torch.testing.assert_close((columns[name] if name == "scores" else columns["inner"][name])[:, n], jv)
        flat = [u["scores"][n], u["inner"]["mask"][n], u["inner"]["sum"][n]]
        for number, part in enumerate((first, second)):
            row = sum(torch.tensordot(c, w[number], c.dim()) for w, c in zip(wanted, flat, strict=True))
            torch.testing.assert_close(rows[part][n], row)


def test_units_are_those_of_the_inputs():
    inputs = Inputs({"x": X, "t": T}, units={"t": 10.0})
    plain = jacmatch.jacobian(Network(), {"x": X, "t": T}, output=itemgetter("scores"))[1]
    scaled = jacmatch.jacobian(Network(), inputs, output=itemgetter("scores"))[1]
    torch.testing.assert_close(scaled["t"], 10 * plain["t"])
    torch.testing.assert_close(scaled["x"], plain["x"])


def test_one_of_several_outputs_and_one_direction():
    network = Network()
    y, jv = jacmatch.jvp(network, (X, T), (VX[0], VT[0]), output=lambda out: out["scores"])
    assert y.shape == jv.shape == (B, 3)
    _, row = jacmatch.vjp(network, (X, T), torch.ones(B, 3, dtype=D), output=lambda out: out["scores"])
    assert [part.shape for part in row] == [X.shape, T.shape]


class TwoSides(nn.Module):
    """One output has a derivative, the other a wrong one, from a function whose backward is not its derivative."""

    def __init__(self, named=False):
        super().__init__()
        self.w, self.named = nn.Parameter(torch.ones(2, dtype=D)), named

    def forward(self, x):
        right, wrong = x * self.w, Wrong.apply(x * self.w)
        return {"right": right, "wrong": wrong} if self.named else [right, wrong]


class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


@pytest.mark.parametrize("select", [lambda n: lambda out: out[n], itemgetter])
def test_a_verdict_on_one_output_is_not_that_on_another(select):
    """Both functions have the same code and module; only the number that they close over differs."""
    network, x = TwoSides(), torch.rand(B, 2, dtype=D)
    jacmatch.vjp(network, x, torch.ones_like(x), output=select(0))
    with pytest.raises(UnsupportedError, match="is wrong"):
        jacmatch.vjp(network, x, torch.ones_like(x), output=select(1))


SIDE = 0


@pytest.mark.ci
@pytest.mark.parametrize("sides", [(0, 1), ("right", "wrong")])
def test_a_verdict_is_for_one_global_name_or_number(monkeypatch, sides):
    """A loop at the top of a script selects by a global; a function without `output` may, too, by a name."""
    network, x = TwoSides(named=isinstance(sides[0], str)), torch.rand(B, 2, dtype=D)
    calls = [lambda: jacmatch.vjp(network, x, torch.ones_like(x), output=lambda out: out[SIDE])]
    if network.named:
        calls.append(lambda: jacmatch.vjp(lambda x: network(x)[SIDE], x, torch.ones_like(x)))
    for call in calls:
        monkeypatch.setitem(globals(), "SIDE", sides[0])
        call()
        monkeypatch.setitem(globals(), "SIDE", sides[1])
        with pytest.raises(UnsupportedError, match="is wrong"):
            call()


class Pair(NamedTuple):
    x: Tensor
    t: Tensor


def test_directions_match_by_key_in_any_order_and_named_tuples_by_position():
    network, settings = Network(), {"output": lambda out: OrderedDict(both(out))}
    u = {
        "inner": {"sum": torch.rand(B, dtype=D), "mask": torch.rand(B, 2, 2, dtype=D)},
        "scores": torch.rand(B, 3, dtype=D),
    }
    same = {"scores": u["scores"], "inner": {"mask": u["inner"]["mask"], "sum": u["inner"]["sum"]}}
    _, rows = jacmatch.vjp(network, Pair(X, T), u, **settings)
    wanted = jacmatch.vjp(network, (X, T), same, output=both)[1]
    assert type(rows) is Pair
    torch.testing.assert_close(tuple(rows), wanted, rtol=0, atol=0)
    wanted = jacmatch.jvp(network, (X, T), (VX, VT), output=itemgetter("scores"))[1]
    for x, v in (({"x": X, "t": T}, {"t": VT, "x": VX}), (Pair(X, T), Pair(VX, VT)), (Pair(X, T), (VX, VT))):
        jv = jacmatch.jvp(network, x, v, output=itemgetter("scores"))[1]
        torch.testing.assert_close(jv, wanted, rtol=0, atol=0)


REFUSED = {
    "no output": ({"output": None}, r"one tensor.*scores"),
    "integers": ({"output": lambda out: out["top"]}, r"floating-point tensors.*int64"),
    "nothing": ({"output": lambda out: (out["scores"], out["none"])}, r"floating-point tensors.*NoneType"),
    "an object": ({"output": lambda out: SimpleNamespace(**out)}, r"floating-point tensors.*SimpleNamespace"),
    "a data class": ({"output": lambda out: Detected(out["scores"], out["inner"]["mask"])}, r"tensors.*Detected"),
    "a missing name": ({"output": lambda out: out["boxes"]}, r"must select a tensor.*KeyError"),
    "samples": ({"output": lambda out: (out["scores"], out["inner"]["mask"][1:])}, r"the same number of samples"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_selected_is_refused_in_one_line(name):
    settings, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        jacmatch.jvp(Network(), (X, T), (VX, VT), **settings)


@pytest.mark.parametrize(("v", "message"), [
    ({"x": VX, "t": VT}, r"`tangents` of `jvp` must have the structure and shapes"),
    ((VX, VT[..., None]), r"structure and shapes.*\(2, 2\).*Got"),
    (VX, r"structure and shapes"),
])  # fmt: skip
def test_directions_of_another_structure_are_refused(v, message):
    with pytest.raises(InputError, match=message):
        jacmatch.jvp(Network(), (X, T), v, output=itemgetter("scores"))
    with pytest.raises(InputError, match=r"`cotangents` of `vjp` must be one tensor"):
        jacmatch.vjp(Network(), (X, T), (VX, VT), output=itemgetter("scores"))


def test_sixteen_bits():
    network, x, t = Network(torch.bfloat16), X.bfloat16(), T.bfloat16()
    y, j = jacmatch.jacobian(network, (x, t), output=both)
    wanted = jacmatch.jacobian(Network(), (X, T), output=both)[1]
    assert y["scores"].dtype == torch.bfloat16
    torch.testing.assert_close(j["scores"][0].to(D), wanted["scores"][0], rtol=0.1, atol=0.05)
