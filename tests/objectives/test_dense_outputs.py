"""Outputs of more than two dimensions: the dimension of the classes is given, or read off the last layer."""

import math

import pytest
import torch
from torch import nn

from jacmatch.datasets import Split
from jacmatch.errors import InputError
from jacmatch.jacobian import (
    AntitheticNoise,
    DataPairs,
    EveryRow,
    FisherRows,
    LabelClass,
    LabelLogit,
    Logits,
    LogProbabilities,
    Loss,
    RandomInputs,
    RandomOutputs,
    SampledRows,
    TopClass,
    TopLogit,
    jacobian,
    jvp_products,
    vjp_products,
)
from jacmatch.jacobian.features import class_dimension
from jacmatch.losses import agreement, cross_entropy, hinton_kl
from jacmatch.objectives import Distillation, GradientShare, Regression, Robustness
from jacmatch.teachers import ModuleTeacher
from jacmatch.training.evaluation import evaluate

D = torch.float64


class Permuted(nn.Module):
    """Tokens (B, T, K) whose last operation is no layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).transpose(1, 2).contiguous().transpose(1, 2)


def tokens(seed=0, layer=nn.Linear):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), layer(6, 7)).to(D)


def images(seed=0, last=nn.Conv2d):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.Tanh(), last(5, 3, 1)).to(D)


X_TOKENS, X_IMAGES = torch.randn(2, 5, 4, dtype=D), torch.randn(2, 2, 4, 4, dtype=D)
CASES = {"tokens": (tokens, X_TOKENS, -1), "images": (images, X_IMAGES, 1)}


def kl_by_definition(s, t, axis, temperature):
    """Each position by itself, as rows of (N, K)."""
    s, t = (each.movedim(axis, -1).reshape(-1, each.shape[axis]) / temperature for each in (s, t))
    p = t.softmax(1)
    return temperature**2 * (p * (p.log() - s.log_softmax(1))).sum()


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_kl_is_over_the_classes_and_a_sum_over_positions(name, given):
    make, x, axis = CASES[name]
    s, t = make(1), make(2)
    settings = {"class_dim": axis} if given else {}
    terms = Distillation(s, t, labels=0, jacobians=0, **settings)(x)
    wanted = kl_by_definition(s(x), t(x), axis, 4.0) / len(x)
    torch.testing.assert_close(terms.loss, wanted)


@pytest.mark.parametrize("name", CASES)
def test_labels_of_positions_with_some_left_out(name):
    make, x, axis = CASES[name]
    s = make(1)
    outputs = s(x)
    positions = outputs.select(axis, 0).shape
    y = torch.randint(3, positions, generator=torch.Generator().manual_seed(0))
    y[0].view(-1)[:2] = -100
    terms = Distillation(s)(x, y)
    wanted = nn.functional.cross_entropy(outputs.movedim(axis, 1), y, reduction="sum") / len(x)
    torch.testing.assert_close(terms["labels"], wanted)
    soft = torch.rand_like(outputs).softmax(axis)
    wanted = nn.functional.cross_entropy(outputs.movedim(axis, 1), soft.movedim(axis, 1), reduction="sum") / len(x)
    torch.testing.assert_close(Distillation(s)(x, soft)["labels"], wanted)


def whole(network, x, of=lambda y: y):
    """All derivatives of the flattened values, (B, R, *input), sample by sample."""
    return torch.stack([torch.autograd.functional.jacobian(lambda z: of(network(z[None]))[0].flatten(), a) for a in x])


@pytest.mark.parametrize("name", CASES)
def test_squares_of_fisher_directions_are_the_probabilities(name):
    make, x, axis = CASES[name]
    y = make(1)(x)
    v = FisherRows(2, class_dim=axis).directions(outputs=y, ids=torch.arange(len(x)), seed=0, draw=0)
    torch.testing.assert_close(v.square().sum(0), y.softmax(axis))


@pytest.mark.ci
@pytest.mark.parametrize("name", CASES)
def test_fisher_rows_are_weighted_by_the_probabilities_of_their_position(name):
    """Over all signs of the directions the mean is Σ p ‖∇ log q − ∇ log p‖², here by many draws within 5 errors."""
    make, x, axis = CASES[name]
    s, t = make(1), make(2)
    x = x[:1]
    settings = {"labels": 0, "outputs": 0, "jacobians": 1.0, "jacobian_loss": "squared", "readout": LogProbabilities()}
    objective = Distillation(s, t, probe=FisherRows(1), **settings).eval()
    many = 2000
    with torch.no_grad():
        copies = x.expand(many, *x.shape[1:])
        each = [
            float(objective(part, ids=torch.arange(start, start + 100)).loss)
            for start, part in zip(range(0, many, 100), copies.split(100), strict=True)
        ]
        logs = [whole(net, x, lambda y: y.log_softmax(axis)) for net in (s, t)]
        p = t(x).softmax(axis).flatten(1)
        wanted = float((p * (logs[0] - logs[1]).flatten(2).square().sum(2)).sum())
    mean = sum(each) / len(each)
    error = math.sqrt(sum((one - mean) ** 2 for one in each) / (len(each) * (len(each) - 1)))
    assert abs(mean - wanted) < 5 * error
    assert error < 0.05 * wanted


@pytest.mark.parametrize("probe", [RandomOutputs(1), RandomInputs(1)])
@pytest.mark.parametrize("name", CASES)
def test_random_products_of_dense_outputs(name, probe):
    """The squared term is that of the products by whole Jacobians, with the directions of the probe."""
    make, x, _ = CASES[name]
    s, t = make(1), make(2)
    objective = Distillation(s, t, labels=0, outputs=0, jacobians=1.0, probe=probe, jacobian_loss="squared")
    ids = torch.arange(len(x))
    v = probe.directions(x=x, outputs=t(x), labels=None, ids=ids, seed=0, draw=0, partners=None)[0].flatten(1)
    j = (whole(s, x) - whole(t, x)).flatten(2)
    product = torch.einsum("br,bri->bi" if probe.side == "output" else "bi,bri->br", v, j)
    torch.testing.assert_close(objective(x, ids=ids).loss, product.square().sum(1).mean())


@pytest.mark.parametrize(
    ("network", "x", "wanted"),
    [
        (tokens(), X_TOKENS, -1),
        (images(), X_IMAGES, 1),
        (images(last=nn.ConvTranspose2d), X_IMAGES, 1),
        (Permuted(tokens()), X_TOKENS, None),
        (nn.Sequential(*tokens(), nn.Dropout(0.0)).eval(), X_TOKENS, -1),
        (nn.Sequential(*tokens(), nn.ReLU(inplace=True)), X_TOKENS, None),
        (nn.Sequential(*tokens(), nn.Tanh()), X_TOKENS, None),
        (torch.sin, X_TOKENS, None),
    ],
)
def test_the_last_layer_says_it_or_nobody_does(network, x, wanted):
    """Dropout in evaluation mode returns the very tensor it got; an activation, in place or not, makes another one."""
    before = torch.get_rng_state()
    assert class_dimension(network, x) == wanted
    assert torch.equal(before, torch.get_rng_state())


def test_a_layer_with_a_hook_says_nothing():
    network = tokens()
    network[2].register_forward_hook(lambda layer, inputs, output: output.transpose(1, 2))
    assert class_dimension(network, X_TOKENS) is None


def test_reading_it_leaves_batch_norm_alone():
    network = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(4, 3)).to(D)
    class_dimension(network, X_TOKENS)
    assert int(network[0].num_batches_tracked) == 0


@pytest.mark.parametrize("name", CASES)
def test_log_probabilities_sum_to_one_over_the_classes(name):
    make, x, axis = CASES[name]
    network = make(1)
    wanted = network(x).log_softmax(axis)
    for readout in (LogProbabilities(), LogProbabilities(class_dim=axis)):
        torch.testing.assert_close(
            vjp_products(network, x, lambda y: torch.ones_like(y)[None], readout=readout).values, wanted
        )
    for engine in ("forward", "reverse", "differences"):
        torch.testing.assert_close(
            jvp_products(network, x, x[None], readout=LogProbabilities(), engine=engine).values, wanted
        )


def kl(**settings):
    return lambda: Distillation(Permuted(tokens(1)), tokens(2), labels=0, jacobians=0, **settings)(X_TOKENS)


def dense(**settings):
    return lambda: Distillation(tokens(1), tokens(2), labels=0, jacobians=1.0, **settings)(
        X_TOKENS, torch.zeros(2, 5, dtype=torch.int64)
    )


REFUSED = [
    (kl(), r"`class_dim` of `Distillation` must be given .* Pass class_dim=1 for images .*class_dim=-1 for tokens"),
    (kl(class_dim=0), r"`class_dim` of `hinton_kl` must be a dimension after the batch\. Got 0 for shape \(2, 5, 7\)"),
    (kl(class_dim=3), r"must be a dimension after the batch\. Got 3 for shape \(2, 5, 7\)"),
    (
        lambda: hinton_kl(torch.zeros(2, 5, 7), torch.zeros(2, 5, 7)),
        r"`class_dim` of `hinton_kl` must be given for outputs of more than two dimensions\. Got shape \(2, 5, 7\)",
    ),
    (lambda: cross_entropy(torch.zeros(2, 5, 7), torch.zeros(2, 5).long()), r"`class_dim` of `cross_entropy` must be"),
    (lambda: agreement(torch.zeros(2, 5, 7), torch.zeros(2, 5, 7)), r"`class_dim` of `agreement` must be given"),
    (
        lambda: vjp_products(Permuted(tokens()), X_TOKENS, lambda y: y[None], readout=LogProbabilities()),
        r"`class_dim` of `LogProbabilities` must be given",
    ),
    (
        lambda: FisherRows().directions(outputs=torch.zeros(2, 5, 7), ids=torch.arange(2), seed=0, draw=0),
        r"`class_dim` of `FisherRows` must be given",
    ),
    *((dense(probe=probe), rf"`{type(probe).__name__}` must have outputs \(batch, out\)\. Got shape \(2, 5, 7\)")
      for probe in (EveryRow(), TopClass(), LabelClass(), SampledRows(1))),
    (dense(readout=LabelLogit()), r"`LabelLogit` must have outputs \(batch, out\)\. Got shape \(2, 5, 7\)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "match"), REFUSED)
def test_it_is_never_guessed(as_users_run, call, match):
    with pytest.raises(InputError, match=match):
        call()


def test_dense_measures_by_definition():
    s, t = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    torch.testing.assert_close(agreement(s, t, class_dim=-1), (s.argmax(2) == t.argmax(2)).float().mean(1))


class Several(nn.Module):
    """Returns the outputs, wrapped."""

    def __init__(self, wrap, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.wrap = nn.Linear(4, 3).to(D), wrap

    def forward(self, x):
        return self.wrap(self.layer(x), x.tanh())


class Wrapped:
    def __init__(self, scores, hidden):
        self.scores, self.hidden = scores, hidden


FORMS = {
    "tuple": (lambda y, h: (h, y), lambda out: out[1], r"a tuple of 2 tensors, \[0\] \(6, 4\), \[1\] \(6, 3\)"),
    "dict": (lambda y, h: {"a": y, "h": h}, lambda out: out["a"], r"a dictionary of 2 tensors, \['a'\] \(6, 3\)"),
    "object": (Wrapped, lambda out: out.scores, r"a Wrapped of 2 tensors, \.scores \(6, 3\), \.hidden \(6, 4\)"),
    "nested": (
        lambda y, h: (y, (h, [h])),
        lambda out: out[0],
        r"a tuple of 3 tensors, \[0\] .*, \[1\]\[0\] .*\[1\]\[1\]\[0\]",
    ),
}
X, Y = torch.randn(6, 4, dtype=D), torch.arange(6) % 3


@pytest.mark.parametrize("name", FORMS)
def test_one_of_several_outputs_is_selected(name):
    wrap, output, _ = FORMS[name]
    student, teacher = Several(wrap, 1), Several(wrap, 2)
    plain = Distillation(student.layer, teacher.layer, jacobians=GradientShare(0.3))(X, Y)
    objective = Distillation(student, teacher, jacobians=GradientShare(0.3), output=output)
    terms = objective(X, Y)
    for each, term in plain.items():
        torch.testing.assert_close(terms[each], term)
    assert not isinstance(student(X), torch.Tensor), "what the network returns is as before"
    assert {key.split(".")[0] for key in objective.state_dict()} == {"student", "_extra_state"}


def test_student_and_teacher_may_differ():
    wrap, output, _ = FORMS["tuple"]
    student, teacher = Several(wrap, 1), Several(wrap, 2)
    plain = Distillation(student.layer, teacher.layer, jacobians=GradientShare(0.3))(X, Y).loss
    torch.testing.assert_close(
        Distillation(student, teacher.layer, jacobians=GradientShare(0.3), output=(output, None))(X, Y).loss, plain
    )
    torch.testing.assert_close(
        Distillation(student.layer, teacher, jacobians=GradientShare(0.3), output=(None, output))(X, Y).loss, plain
    )
    torch.testing.assert_close(Robustness(student, output=output)(X, Y).loss, Robustness(student.layer)(X, Y).loss)


@pytest.mark.parametrize("name", FORMS)
def test_several_outputs_are_named_not_guessed(name):
    wrap, _, got = FORMS[name]
    for call in (
        lambda: Distillation(Several(wrap), Several(wrap), jacobians=1.0)(X, Y),
        lambda: jacobian(Several(wrap), X),
    ):
        with pytest.raises(
            InputError, match=rf"Got {got}.* Select one: output=lambda out: out.* lambda x: module\(x\)"
        ):
            call()


@pytest.mark.parametrize(
    ("output", "match"),
    [
        (3, r"`output` of `Distillation` must be callable, or a pair of callables .* Got int"),
        ((lambda out: out["missing"], None), r"`output` must select a tensor .* Got TypeError .* for a tuple of 2"),
        ((lambda out: out, None), r"`output` must select one tensor .* Got a tuple of 2 tensors"),
        ((lambda out: out[7], None), r"`output` must select a tensor .* Got IndexError"),
    ],
)
def test_a_wrong_selection_is_refused(as_users_run, output, match):
    student = Several(FORMS["tuple"][0])
    with pytest.raises(InputError, match=match):
        Distillation(student, student.layer.__class__(4, 3).to(D), jacobians=1.0, output=output)(X, Y)


def test_a_teacher_object_selects_by_itself(as_users_run):
    wrap, output, _ = FORMS["tuple"]
    student, teacher = Several(wrap, 1), ModuleTeacher(Several(wrap, 2), output=output)
    plain = Distillation(student.layer, teacher.module.layer, jacobians=1.0)(X, Y).loss
    torch.testing.assert_close(Distillation(student, teacher, jacobians=1.0, output=output)(X, Y).loss, plain)
    with pytest.raises(InputError, match=r"select from a teacher's outputs only .* Got ModuleTeacher\. Use Module"):
        Distillation(student, teacher, jacobians=1.0, output=(output, output))
    with pytest.raises(InputError, match=r"`output` of `ModuleTeacher` must be callable\. Got int"):
        ModuleTeacher(student, output=1)


def fields(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 1)).to(D)


PROBES = [EveryRow(), TopClass(), LabelClass(), SampledRows(1), FisherRows(1), RandomOutputs(2), RandomInputs(2),
          DataPairs(), AntitheticNoise(1, sigma=1e-4)]  # fmt: skip
READOUTS = {
    "logits": (Logits(), lambda y, axis: y),
    "log-probabilities": (LogProbabilities(), lambda y, axis: y.log_softmax(axis)),
    "label-logit": (LabelLogit(), None),
    "top-logit": (TopLogit(), None),
    "loss": (Loss(), None),
}
NEED_ROWS = (EveryRow, TopClass, LabelClass, SampledRows)


def wanted_of(loss, s, t):
    """Each loss from products (B, P, …) by its definition."""
    error, size = ((each).square().flatten(1).sum(1) for each in (s - t, t))
    if loss == "squared":
        return error.mean()
    if loss == "relative":
        return error.mean() / (size.mean() + 1e-6)
    if loss == "bounded":
        return None  # below: only that it is finite, between 0 and 1; its definition has a test of its own
    unit = [each.flatten(2) / each.flatten(2).norm(dim=2, keepdim=True) for each in (s, t)]
    return (unit[0] - unit[1]).square().sum(2).mean()


@pytest.mark.ci
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: type(probe).__name__)
def test_every_probe_readout_and_loss_works_or_is_refused_in_one_line(as_users_run, name, probe):
    make, x, axis = CASES[name]
    s, t, ids = make(1), make(2), torch.arange(len(x))
    y = torch.zeros(t(x).select(axis, 0).shape, dtype=torch.int64)
    jacobians = {key: [whole(net, x, lambda v: of(v, axis)).flatten(2) for net in (s, t)]  # noqa: B023
                 for key, (_, of) in READOUTS.items() if of is not None}  # fmt: skip
    for key, (readout, of) in READOUTS.items():
        for loss in ("squared", "relative", "normalized", "bounded"):
            settings = {"labels": 0, "outputs": 0, "jacobians": 1.0, "jacobian_loss": loss}
            objective = Distillation(s, t, probe=probe, readout=readout, class_dim=axis, **settings)
            if of is None or isinstance(probe, NEED_ROWS):
                with pytest.raises(InputError) as caught:
                    objective(x, y, ids=ids)
                assert "\n" not in str(caught.value)
                assert "must have outputs (batch, out)" in str(caught.value)
                continue
            value = objective(x, y, ids=ids).loss.detach()
            v = objective.differentiation.probe.directions(
                x=x, outputs=of(t(x), axis).detach(), labels=y, ids=ids, seed=0, draw=0, partners=x.roll(1, 0)
            ).flatten(2)
            equation = "pbr,bri->bpi" if probe.side == "output" else "pbi,bri->bpr"
            wanted = wanted_of(loss, *(torch.einsum(equation, v, j) for j in jacobians[key]))
            if wanted is None:
                assert 0 < float(value) < 1
            else:
                rough = isinstance(probe, AntitheticNoise)
                torch.testing.assert_close(value, wanted, rtol=1e-4 if rough else 1e-7, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_values_and_derivatives_are_reduced_over_positions_by_one_rule(name):
    make, x, axis = CASES[name]
    s, t = make(1), make(2)
    y = torch.zeros(t(x).select(axis, 0).shape, dtype=torch.int64)
    y[0].view(-1)[0] = -100
    number = y[0].numel()
    settings = {"jacobians": 1.0, "jacobian_loss": "squared", "class_dim": axis}
    total, mean = (Distillation(s, t, **settings, positions=each)(x, y) for each in ("sum", "mean"))
    for term in ("labels", "outputs", "jacobians"):
        torch.testing.assert_close(mean[term] * number, total[term])
    total, mean = (Robustness(s, class_dim=axis, positions=each)(x, y) for each in ("sum", "mean"))
    torch.testing.assert_close(mean.loss * number, total.loss)
    ratio = [Distillation(s, t, jacobians=1.0, class_dim=axis, positions=each)(x, y) for each in ("sum", "mean")]
    torch.testing.assert_close(ratio[0]["jacobians"], ratio[1]["jacobians"])


def test_another_label_may_mark_what_is_left_out():
    s = images(1)
    y = torch.randint(3, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    wanted = y.clone()
    y[0, :2], wanted[0, :2] = 255, -100
    for make in (Distillation, Robustness):
        torch.testing.assert_close(make(s, ignore_index=255)(X_IMAGES, y).loss, make(s)(X_IMAGES, wanted).loss)


def test_fields_of_numbers():
    """(B, C, H, W) → (B, C′, H′, W′) with targets, against whole Jacobians."""
    s, t, target = fields(1), fields(2), torch.randn(2, 2, 4, 4, dtype=D)
    settings = {"jacobians": 1.0, "jacobian_loss": "squared", "task": "regression", "probe": RandomInputs(1)}
    terms = Distillation(s, t, **settings, positions="mean")(X_IMAGES, target, ids=torch.arange(2))
    torch.testing.assert_close(terms["labels"], (s(X_IMAGES) - target).square().sum() / 2 / 16)
    torch.testing.assert_close(terms["outputs"], (s(X_IMAGES) - t(X_IMAGES)).square().sum() / 2 / 16)
    v = RandomInputs(1).directions(x=X_IMAGES, ids=torch.arange(2), seed=0, draw=0)[0].flatten(1)
    j = (whole(s, X_IMAGES) - whole(t, X_IMAGES)).flatten(2)
    torch.testing.assert_close(terms["jacobians"], torch.einsum("bi,bri->br", v, j).square().sum() / 2 / 16)


class Single(nn.Module):
    """One number for each sample, (B,)."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)).to(D)

    def forward(self, x):
        return self.net(x)[:, 0]


@pytest.mark.parametrize("probe", [EveryRow(), RandomOutputs(1), RandomInputs(1)])
def test_one_number_for_each_sample(probe):
    """Outputs (B,) are those of a column (B, 1), of student and teacher, with labels (B,)."""
    y = torch.randn(6, dtype=D)
    settings = {"task": "regression", "jacobians": 1.0, "probe": probe}
    wanted = Distillation(Single(1).net, Single(2).net, **settings)
    objective = Distillation(Single(1), Single(2), **settings)
    for _ in range(2):
        torch.testing.assert_close(objective(X, y).loss, wanted(X, y[:, None]).loss)
    buffers = zip(objective.student.net.buffers(), wanted.student.buffers(), strict=True)
    assert all(torch.equal(one, other) for one, other in buffers), "the first call counts once"
    plain = Distillation(Single(1), Single(2), task="regression", jacobians=0)(X, y)
    torch.testing.assert_close(plain["labels"], (Single(1)(X) - y).square().mean())


def test_one_number_in_the_other_objectives():
    y = torch.randn(6, dtype=D)
    settings = {"task": "regression", "form": "squared-norm", "probe": EveryRow()}
    torch.testing.assert_close(
        Robustness(Single(1), **settings)(X, y).loss, Robustness(Single(1).net, **settings)(X, y[:, None]).loss
    )
    settings = {"jacobians": 1.0}
    torch.testing.assert_close(
        Regression(Single(1), Single(2), **settings)(X, y).loss,
        Regression(Single(1).net, Single(2).net, **settings)(X, y[:, None]).loss,
    )


def test_evaluation_of_positions():
    """Pixel accuracy and mean intersection over union, by hand: two classes, one position left out."""
    logits = torch.tensor([[[2.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0], [-9.0, -9.0, -9.0, -9.0]]])
    labels = torch.tensor([[0, 1, 0, 255]])  # predicted 0, 1, 1, 0
    result = evaluate(nn.Identity(), Split(logits, labels), device="cpu", ignore_index=255)
    assert result == {"accuracy": pytest.approx(2 / 3), "miou": pytest.approx((1 / 2 + 1 / 2) / 2)}
    tokens_last = evaluate(nn.Identity(), Split(logits.mT, labels), device="cpu", ignore_index=255, class_dim=-1)
    assert tokens_last == result
    with pytest.raises(InputError, match=r"Per-position labels must have the shape \(1, 3\).*class_dim=-1"):
        evaluate(nn.Identity(), Split(logits.mT, labels), device="cpu")
    with pytest.raises(InputError, match="must have labeled positions"):
        evaluate(nn.Identity(), Split(logits, labels * 0 + 255), device="cpu", ignore_index=255)
