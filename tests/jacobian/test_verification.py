"""What decides which engine is used: compared with differences once, remembered, and nothing of the module changed."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import jacmatch
from jacmatch import UnsupportedError, doctor, jacobian, jvp, unverified, vjp
from jacmatch.jacobian import verification
from jacmatch.jacobian.finite_differences import plain
from jacmatch.jacobian.products import jvp_products
from jacmatch.teachers import ModuleTeacher, Question

from .faults import Applied, Once, WithoutTangent, cut_square, linear
from .sound import SOUND

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def comparisons(monkeypatch):
    """Counts the comparisons with differences that are made."""
    made, true = [], verification.Comparison
    monkeypatch.setattr(verification, "Comparison", lambda *a, **k: made.append(1) or true(*a, **k))
    return made


def of_layers(function):
    torch.manual_seed(3)
    return Applied(function, linear(), linear(4))


ZERO_TANGENT = of_layers(lambda x, a, b: b(WithoutTangent.apply(a(x))))
DETACHED = of_layers(lambda x, a, b: b(a(x) * (1 + x.detach().norm(dim=1, keepdim=True))))
ONCE = of_layers(lambda x, a, b: b(Once.apply(a(x))))
CUT = of_layers(lambda x, a, b: b(cut_square(a(x))))


@pytest.mark.parametrize(
    ("module", "engine"),
    [(ZERO_TANGENT, "reverse"), (DETACHED, "differences"), (ONCE, "differences"), (CUT, "differences")],
)
def test_auto_takes_the_first_engine_that_is_right(module, engine):
    assert jvp_products(module, X, X[None]).engine == engine
    assert doctor(module, X).engines[engine] == "right"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jvp(ZERO_TANGENT, X, X, engine="forward"), r"returns zero.*Use engine='reverse'"),
        (lambda: vjp(DETACHED, X, X[:, :4]), r"vᵀJ of this module is wrong.*Jv is right by engine='differences'"),
        (lambda: jacobian(DETACHED, X), r"vᵀJ of this module is wrong"),
        (lambda: vjp(ONCE, X, X[:, :4]), r"taken only once.*torch\.no_grad\(\)"),
        (lambda: vjp(CUT, X, X[:, :4]), r"gradient of a penalty by engine 'reverse' is off"),
    ],
)
def test_what_is_wrong_for_certain_is_refused(call, message):
    for _ in range(2):
        with pytest.raises(UnsupportedError, match=message):
            call()
    with unverified():
        call()


def test_where_gradients_are_off_only_the_product_counts():
    with torch.no_grad():
        vjp(CUT, X, X[:, :4])
        vjp(ONCE, X, X[:, :4])
        with pytest.raises(UnsupportedError, match="is wrong"):
            vjp(DETACHED, X, X[:, :4])


def test_a_teacher_warns_by_itself_and_is_refused_in_a_training():
    teacher, question = jacmatch.ModuleTeacher(copy.deepcopy(DETACHED)), jacmatch.Question(cotangents=X[None, :, :4])
    with pytest.warns(UserWarning, match="vᵀJ of this module is wrong"):
        teacher.answer(X, question)
    objective = jacmatch.Distillation(nn.Linear(5, 4), teacher, labels=0, probe=jacmatch.RandomOutputs(1))
    with pytest.raises(UnsupportedError, match="vᵀJ of this module is wrong"):
        objective(X)
    with unverified():
        teacher.answer(X, question)
        objective(X)


def test_a_kind_of_call_is_verified_once(comparisons):
    net = nn.Sequential(linear(), nn.Tanh(), nn.Dropout(0.5), linear(4))
    for step in range(3):
        jvp(net, X + step, X)
        vjp(net, X, X[:, :4])
    assert len(comparisons) == 2
    jvp(net.eval(), X, X)
    assert len(comparisons) == 3
    net[0].weight.requires_grad_(False)
    jvp(net, X, X)
    jvp(net, X[:, :5].double().float(), X)
    assert len(comparisons) == 4


def test_a_function_that_is_made_in_each_step_is_verified_once(comparisons):
    net = linear(4, 3)
    for step in range(3):
        mask = torch.rand(6, 1) + step
        vjp(lambda x, mask=mask, step=step: net(torch.tanh(x[:, :4]) * mask) * (1 + step), X, X[:, :3])
    assert len(comparisons) == 2  # the second one for all samples: the mask is for six of them


def test_the_memory_goes_with_the_network():
    net = linear()
    vjp(net, X, X[:, :4])
    number = id(net)
    assert number in verification._memory
    del net
    assert number not in verification._memory


def state(net):
    """All that a verification could change."""
    return {
        "state": {name: each.clone() for name, each in net.state_dict().items()},
        "ids": [id(each) for each in (*net.parameters(), *net.buffers())],
        "versions": [each._version for each in (*net.parameters(), *net.buffers())],
        "modes": [layer.training for layer in net.modules()],
        "hooks": [(len(layer._forward_hooks), len(layer._backward_hooks)) for layer in net.modules()],
        "gradients": [each.grad for each in net.parameters()],
        "attributes": [sorted(vars(layer)) for layer in net.modules()],
        "numbers": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
    }


def squares_in_place(x, a, b):
    h = a(x).relu()
    h *= h
    return b(h)


def test_a_network_that_cannot_be_trained_has_derivatives_which_cannot_be_differentiated():
    module, x = of_layers(squares_in_place).double(), X.double()
    step = 1e-6 * torch.ones_like(x)
    expected = (module(x + step) - module(x - step)) / 2e-6
    for engine in ("auto", "forward", "differences"):
        products = jvp(module, x, torch.ones_like(x), engine=engine)[1]
        assert torch.allclose(products, expected, rtol=1e-5)
        with pytest.raises(UnsupportedError, match=r"cannot be differentiated.*outputs fails.*in place"):
            products.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        module(x).sum().backward()
    assert "untrainable" in {each.code for each in doctor(module, x).findings}


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls, self.layer, self.norm = 0, linear(), nn.BatchNorm1d(4)

    def forward(self, x):
        self.calls += 1
        return self.norm(self.layer(x)) * (1 + self.calls) * random.random()


def test_nothing_of_the_network_changes(as_users_run):
    net = Counts()
    net.layer.weight.grad = torch.ones(4, 5)
    before = state(net)
    verification.engines_for_jvp(verification.known_for(plain(net), X, 1), plain(net), X, "auto", 1)
    verification.samples_couple(plain(net), X)
    after = state(net)
    assert net.calls == 0
    numbers, others = before.pop("numbers"), after.pop("numbers")
    assert torch.equal(numbers[0], others[0])
    assert numbers[1:] == others[1:]
    for name, value in before.pop("state").items():
        assert torch.equal(after["state"][name], value)
    del after["state"]
    assert after == before


def test_a_graph_that_was_made_before_goes_on():
    net = nn.Sequential(linear(), nn.Tanh(), linear(4))
    loss = net(X).square().sum()
    (loss + jvp(net, X, X)[1].square().sum()).backward()
    assert net[0].weight.grad is not None


STRANGE = {
    "dead": lambda: nn.Sequential(linear(), nn.Threshold(50, 0), linear(4)),
    "zero weights": lambda: nn.Sequential(linear(), nn.ReLU(), linear(4).requires_grad_()).apply(
        lambda layer: nn.init.zeros_(layer.weight) if isinstance(layer, nn.Linear) else None
    ),
    "saturated": lambda: nn.Sequential(linear(), nn.Sigmoid()).apply(
        lambda layer: nn.init.constant_(layer.weight, 1e4) if isinstance(layer, nn.Linear) else None
    ),
    "frozen": lambda: linear().requires_grad_(False),
    "only a bias is trained": lambda: nn.Sequential(
        linear().requires_grad_(False), nn.Tanh(), linear(4).requires_grad_(False)
    ),
    "draws numbers in evaluation": lambda: Applied(lambda x, a: a(functional.dropout(x)), linear()),
    "counts its calls": Counts,
    "noise of another generator": lambda: Applied(lambda x, a: a(x) + 0.1 * float(np.random.rand()), linear()),
    "float32 inside": lambda: Applied(lambda x, a, b: b(a(x).tanh().float().to(x.dtype)), linear(), linear(4)),
    "float32 beside": lambda: Applied(
        lambda x, a, b: a(x) + functional.linear(x.float(), b.weight.float()).to(x.dtype), linear(), linear()
    ),
    "spectral norm": lambda: nn.Sequential(nn.utils.spectral_norm(linear()), nn.Tanh(), linear(4)),
    "weights held constant": lambda: Applied(
        lambda x, a, b: b(a(x).tanh()) * a.weight.detach().norm(), linear(), linear(4)
    ),
}


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.ci
def test_there_is_no_false_alarm(name, as_users_run):  # beartype draws from the generator of `random`
    torch.manual_seed(1)
    net = STRANGE[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vjp(net, X, X[:, :4])
        jvp(net, X, X)
        for engine in ("forward", "reverse", "differences"):
            jvp(net, X, X, engine=engine)


class Noisy(nn.Module):
    """Draws from a generator of its own, which nothing replays."""

    def __init__(self, seed):
        super().__init__()
        self.layer, self.generator = linear(), np.random.default_rng(seed)

    def forward(self, x):
        return self.layer(x) + 0.1 * float(self.generator.random())


@pytest.mark.parametrize(("seed", "engine"), [(85, "forward"), (186, "reverse")])
def test_there_is_no_verdict_where_no_two_calls_agree(seed, engine):
    """With these seeds, two differences agree by chance that the derivative is another one."""
    torch.manual_seed(1)
    net = Noisy(seed)
    for each in ("forward", "reverse")[: 1 + (engine == "reverse")]:
        jvp(net, X, X, engine=each)
    assert "non-deterministic" in {each.code for each in doctor(net, X).findings}


@pytest.mark.ci
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", SOUND)
def test_sound_networks_use_the_first_engine(name, training):
    make, shape = SOUND[name]
    net, x = make().train(training), torch.randn(shape)
    assert jvp_products(net, x, x[None]).engine == "forward"
    vjp(net, x, net(x).detach())


class OfABatch(nn.Module):
    """Holds a number for each row of a batch."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = linear(), torch.arange(1.0, 13.0)

    def forward(self, x):
        return self.layer(x).tanh() * self.scale[: len(x), None].to(x.dtype)


def test_the_jacobian_of_a_module_that_holds_a_number_for_each_row():
    net = OfABatch().eval()
    full = torch.autograd.functional.jacobian(net, X)
    own = torch.stack([full[n, :, n] for n in range(len(X))])
    for chunk_size in (None, 1, 3):
        torch.testing.assert_close(jacobian(net, X, chunk_size=chunk_size)[1].detach(), own)
    net.scale = net.scale[: len(X)]
    torch.testing.assert_close(jacobian(net, X)[1].detach(), own)


COUPLED = {
    "BatchNorm in training": lambda: nn.Sequential(linear(), nn.BatchNorm1d(4), nn.Tanh(), linear(4)),
    "BatchNorm without statistics": lambda: nn.Sequential(
        linear(), nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh(), linear(4)
    ).eval(),
    "centering": lambda: Applied(lambda x, a, b: b(torch.tanh(a(x) - a(x).mean(0))), linear(), linear(4)).eval(),
    "softmax over the batch": lambda: Applied(lambda x, a: a(x).softmax(0), linear()).eval(),
}


@pytest.mark.parametrize("name", COUPLED)
def test_the_jacobian_holds_derivatives_by_the_own_sample(name):
    net, x = COUPLED[name]().double(), X.double()
    full = torch.autograd.functional.jacobian(copy.deepcopy(net), x)
    own = torch.stack([full[n, :, n] for n in range(len(x))])
    for chunk_size in (None, 1, 2):
        torch.testing.assert_close(jacobian(net, x, chunk_size=chunk_size)[1].detach(), own)
    if name == "BatchNorm without statistics":
        return  # it refuses one sample
    one = torch.autograd.functional.jacobian(copy.deepcopy(net).eval(), x[:1])[:, :, 0]
    torch.testing.assert_close(jacobian(net.eval(), x[:1])[1].detach(), one)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([X, X], "must be one tensor. Got list"),
        (X.numpy(), "must be one tensor. Got ndarray"),
        (X[:0], r"at least one sample. Got shape \(0, 5\). Leave empty batches out"),
        (torch.tensor(1.0), r"a batch dimension"),
    ],
)
def test_what_is_no_tensor_of_samples_is_refused(as_users_run, x, message):
    for call in (lambda: doctor(linear(), x), lambda: vjp(linear(), x, X), lambda: jacobian(linear(), x)):
        with pytest.raises(jacmatch.InputError, match=message):
            call()


@pytest.mark.parametrize("x", [(X, X), {"x": X}])
def test_the_doctor_takes_one_tensor(as_users_run, x):
    with pytest.raises(jacmatch.InputError, match=f"must be one tensor. Got {type(x).__name__}"):
        doctor(linear(), x)


def test_complex_outputs_are_refused():
    for call in (lambda: doctor(torch.fft.fft, X), lambda: vjp(torch.fft.fft, X, X)):
        with pytest.raises(jacmatch.InputError, match=r"real floating-point outputs.*complex64.*Return .real"):
            call()


@pytest.mark.parametrize("engine", ["auto", "forward", "reverse", "differences"])
def test_samples_that_are_numbers(engine):
    x = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(jvp(torch.sin, x, torch.ones_like(x), engine=engine)[1], x.cos(), rtol=1e-7, atol=1e-9)
    assert doctor(torch.sin, x).ok


def test_reverse_mode_is_tried_as_both_products():
    """log Σ exp as torch has it: vᵀJ is right, Jv by two backward passes is not a number."""

    class NotTwice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx, gradient):
            return Twisted.apply(gradient, *ctx.saved_tensors)

    class Twisted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gradient, x):
            ctx.save_for_backward(gradient, x)
            return gradient * x.cos()

        @staticmethod
        def backward(ctx, gradient):
            first, x = ctx.saved_tensors
            return 2 * gradient * x.cos(), -gradient * first * x.sin()  # the first is twice what it should be

    diagnosis = doctor(lambda x: NotTwice.apply(x) * 2, X)
    assert diagnosis.engines["reverse"].startswith("right for vjp; for jvp off by")
    assert diagnosis.engine == "differences"
    (note,) = [each for each in diagnosis.findings if each.code == "reverse-wrong-for-jvp"]
    assert note.severity == "note"
    assert jvp_products(lambda x: NotTwice.apply(x) * 2, X, X[None]).engine == "differences"


def test_a_straight_through_estimator_needs_unverified():
    """Its derivative is meant to be another one than that of its values, which do not move."""
    module = Applied(lambda x, a: a(x) + (a(x).round() - a(x)).detach(), linear())
    x, u = X, torch.randn_like(module(X))
    with pytest.raises(UnsupportedError, match=r"outputs do not change.*unverified"):
        jacmatch.vjp(module, x, u)
    with jacmatch.unverified():
        assert jacmatch.vjp(module, x, u)[1].any()


def test_a_last_layer_of_zeros_is_right():
    """Its outputs do not change, and its Jacobian has a parameter gradient all the same."""
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    nn.init.zeros_(module[2].weight)
    x, u = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    row = jacmatch.vjp(module, x, u)[1]
    assert not row.any()
    row.sum().backward()
    assert module[2].weight.grad.any()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_rows_are_compared_in_any_memory_layout(layout):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)).to(memory_format=layout)
    x = torch.randn(3, 3, 4, 4).contiguous(memory_format=layout)
    _, rows = vjp(module, x, torch.ones(1, 3, 2))
    expected = torch.func.vmap(torch.func.grad(lambda one: module(one[None]).sum()))(x)
    torch.testing.assert_close(rows[0], expected, rtol=1e-4, atol=1e-5)
    assert rows.requires_grad


class Switched(nn.Module):
    """A network with a switch, by which it may hide a part of its derivative."""

    def __init__(self, cut):
        super().__init__()
        self.layer, self.cut = nn.Linear(3, 3).double(), cut

    def forward(self, x, cut=False):
        h = self.layer(x)
        return h.detach() * h if cut or (self.cut() if callable(self.cut) else self.cut) else h.tanh()


@pytest.mark.parametrize(
    ("before", "after"),
    [(False, True), (0, 1), ("", "cut"), (lambda: False, lambda: 1 + 1 == 2)],
    ids=["flags", "numbers", "names", "functions"],
)
def test_a_network_that_is_switched_is_verified_again(before, after):
    module, x = Switched(before), torch.randn(4, 3, dtype=torch.float64)
    jvp(module, x, x)
    vjp(module, x, x)
    module.cut = after
    for call in (jvp, vjp):
        with pytest.raises(UnsupportedError, match="of this module is wrong"):
            call(module, x, x)


def test_a_flag_of_a_context_may_be_a_number():
    module, x = Switched(False), torch.randn(4, 3, dtype=torch.float64)
    jvp(module, x, x, context={"cut": 0})
    with pytest.raises(UnsupportedError, match="of this module is wrong"):
        jvp(module, x, x, context={"cut": 1})


def test_rows_within_a_transform_of_the_parameters():
    """There no tensor can require a gradient of its own."""
    module, x = (
        nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)).double(),
        torch.randn(5, 3).double(),
    )
    parameters = {name: each.detach() for name, each in module.named_parameters()}
    u = torch.randn(5, 2).double()

    def penalty(given, product):
        return product(lambda z: torch.func.functional_call(module, given, (z,))).square().sum()

    result = torch.func.grad(penalty)(parameters, lambda f: vjp(f, x, u)[1])
    expected = torch.func.grad(penalty)(parameters, lambda f: torch.func.vjp(f, x)[1](u)[0])
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("levels", [1e3, 1e4])
def test_differences_of_rounded_values_are_refused_where_no_other_engine_exists(levels):
    def rounded(x):  # as a quantized layer, outside of autograd
        return torch.from_numpy(np.round(x.numpy(force=True) * levels) / levels).tanh()

    with pytest.raises(UnsupportedError, match=r"Jv by differences of this module is wrong.*rounds its values"):
        jvp(rounded, X, X)
    with unverified():
        assert jvp(rounded, X, X)[1].shape == X.shape


@pytest.mark.parametrize(("levels", "error"), [(1e5, 1e-2), (1e9, 1e-3)])
def test_differences_of_smooth_values_outside_of_autograd_are_returned(levels, error):
    smooth = jvp(lambda x: torch.from_numpy(np.round(np.tanh(x.numpy(force=True)) * levels) / levels), X, X)[1]
    torch.testing.assert_close(smooth, X * (1 - X.tanh().square()), rtol=error, atol=error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "part",
    [
        lambda z: z * z.float().sigmoid().detach(),
        lambda z: z / z.detach().float().norm(dim=1, keepdim=True),
        lambda z: z + torch.tensor([[float(each) for each in row] for row in z]),
        lambda z: z + torch.from_numpy(z.numpy(force=True).astype("float32") ** 2),
    ],
)
def test_a_missing_derivative_is_noticed_although_that_part_is_computed_in_float32(part, dtype):
    def function(x):
        return part(torch.tanh(x) * torch.arange(1.0, 6)).to(x.dtype)

    x = X.to(dtype)
    with pytest.raises(UnsupportedError, match="part of the derivative is missing"):
        vjp(function, x, x)
    with pytest.raises(UnsupportedError, match="part of the derivative is missing"):
        jvp(function, x, x, engine="reverse")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalization_computed_in_float32_is_right(dtype):
    def normalized(x):
        return (x.float() * x.float().square().mean(1, keepdim=True).rsqrt()).to(x.dtype)

    x, u = X.to(dtype), torch.ones(6, 5, dtype=dtype)
    one_by_one = torch.func.vmap(torch.func.jacrev(lambda row: normalized(row[None])[0].sum()))(x)
    torch.testing.assert_close(vjp(normalized, x, u)[1], one_by_one)


REDUCED = {
    "right": (lambda z: z.tanh(), None),
    "part": (lambda z: z + 0.5 * z.square().detach(), "part of the derivative is missing|not by differences|off by"),
    "zero": (WithoutTangent.apply, "returns zero"),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", REDUCED)
def test_a_part_of_lower_precision_is_compared_in_float64(name, dtype):
    """Differences of numbers in 16 bits show nothing, and those in 32 bits no gradient of a penalty."""
    part, message = REDUCED[name]
    net = Applied(lambda x, a, b: b(part(a(x).to(dtype)).to(x.dtype)), linear(), linear(4))
    if message is not None:
        with pytest.raises(UnsupportedError, match=message):
            jvp(net, X, X, engine="forward")
    else:
        wide = Applied(lambda x, a, b: b(a(x).tanh()), *net.layers).requires_grad_(False)
        expected = torch.func.jvp(wide, (X,), (X,))[1]
        for engine in ("auto", "forward", "reverse"):
            torch.testing.assert_close(jvp(net, X, X, engine=engine)[1], expected, rtol=0.05, atol=0.02)


def test_a_wrong_parameter_gradient_is_noticed_although_that_part_is_computed_in_float32():
    net = Applied(lambda x, a, b: b(cut_square(a(x).double().float()).to(x.dtype)), linear(), linear(4))
    with pytest.raises(UnsupportedError, match="parameter gradient"):
        vjp(net, X, torch.ones(6, 4))


def test_a_teacher_with_a_part_in_16_bits_does_not_take_differences():
    net = Applied(lambda x, a, b: b(a(x).bfloat16().tanh().to(x.dtype)), linear(), linear(4))
    wide = Applied(lambda x, a, b: b(a(x).tanh()), *net.layers)
    products = ModuleTeacher(net).answer(X, Question(tangents=X[None])).products
    torch.testing.assert_close(products[0], torch.func.jvp(wide, (X,), (X,))[1].detach(), rtol=0.05, atol=0.02)
