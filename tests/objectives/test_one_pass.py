"""One teacher query and one student pass for each batch; the directions of a sample depend on its id alone."""

import pytest
import torch
from torch import nn

from jacmatch.jacobian import Cost, EveryRow, RandomInputs, unverified
from jacmatch.objectives import Distillation, jacobian_norm_penalty
from jacmatch.teachers import BlackBoxTeacher, EnsembleTeacher, ModuleTeacher

from .cases import OUTPUTS, POINTS, PROBES, batch, perceptron, student, teacher


class Counted:
    """A teacher that counts its queries."""

    def __init__(self, teacher):
        self.teacher, self.answers_vjp, self.queries = teacher, teacher.answers_vjp, 0

    def answer(self, x, question):
        self.queries += 1
        return self.teacher.answer(x, question)


def passes(network):
    """A list that grows with each forward pass of the network."""
    seen = []
    network.register_forward_pre_hook(lambda layer, given: seen.append(len(given[0])))
    return seen


ALL = {**PROBES, "random-inputs, 1": RandomInputs(1), "random-inputs, 5": RandomInputs(5)}


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("probe", ALL)
@pytest.mark.parametrize("training", [True, False])
def test_one_question_and_one_pass(probe, point, training):
    if probe == "label-class" and point == "mixed-pairs":
        return
    net, s, given = teacher(), student(), batch()
    counted = Counted(ModuleTeacher(net))
    objective = Distillation(s, counted, probe=ALL[probe], point=POINTS[point]).train(training)
    seen = {name: passes(network) for name, network in (("student", s), ("teacher", net))}
    with unverified():  # the check of an engine before its first use has passes of its own
        objective(**given)["loss"].backward()
    assert counted.queries == 1
    # Differences need their pairs of values; that is what such a probe says it costs.
    pairs = ALL[probe].passes(OUTPUTS).forward if probe == "antithetic-noise" else 0
    assert seen == {"student": [3] * (1 + pairs), "teacher": [3] * (1 + pairs)}


def test_the_backward_passes_are_those_of_the_estimator():
    for probe, wanted in ((EveryRow(), OUTPUTS), (PROBES["random-outputs"], 2), (PROBES["top-class"], 1)):
        s, seen = student(), []
        s[3].register_full_backward_hook(lambda layer, inner, outer, seen=seen: seen.append(1))
        with unverified():
            Distillation(s, teacher(), jacobians=1.0, probe=probe).eval()(**batch())
        assert probe.passes(OUTPUTS) == Cost(forward=0, backward=wanted)
        assert len(seen) == wanted


@pytest.mark.parametrize("settings", [{"jacobians": 0}, {"labels": 1, "outputs": 0, "jacobians": 1.0, "every": 2}])
def test_one_pass_without_derivatives(settings):
    net, s, given = teacher(), student(), batch()
    counted = Counted(ModuleTeacher(net))
    objective = Distillation(s, counted, **settings)
    objective.calls = 1
    seen = passes(s)
    objective(**given)
    assert seen == [3]
    assert counted.queries == (1 if settings["jacobians"] == 0 else 0)


def test_labels_alone_need_no_teacher():
    s = student()
    seen = passes(s)
    assert Distillation(s)(**batch()).teacher_outputs is None
    assert seen == [3]


def test_a_black_box_is_called_for_values_and_pairs_only():
    calls = []
    net = teacher()
    box = BlackBoxTeacher(lambda x: calls.append(len(x)) or net(x))
    Distillation(student(), box, probe=RandomInputs(2))(**batch())
    assert calls == [3] * 5


def test_known_directions_query_each_member_of_an_ensemble_once():
    members = [Counted(ModuleTeacher(teacher())) for _ in range(2)]
    Distillation(student(), EnsembleTeacher(members), probe=RandomInputs(2))(**batch())
    assert [member.queries for member in members] == [1, 1]


def test_a_penalty_takes_one_pass():
    s = student()
    seen = passes(s)
    with unverified():
        jacobian_norm_penalty(s, batch()["x"], probes=3)
    assert seen == [3]


@pytest.mark.parametrize("batch_norm", ["batch", "frozen"])
@pytest.mark.parametrize("probe", ["every-row", "random-inputs", "antithetic-noise"])
def test_running_statistics_move_once(probe, batch_norm):
    given = batch(count=6)
    s = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, OUTPUTS)).double()
    plain = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, OUTPUTS)).double()
    plain.load_state_dict(s.state_dict())
    outputs = plain(given["x"])
    terms = Distillation(s, teacher(), probe=PROBES[probe], batch_norm=batch_norm)(**given)
    torch.testing.assert_close(terms.student_outputs, outputs)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(s.get_buffer(name), buffer)


def per_sample(objective, given, rows):
    """Each term times the number of samples: a sum over the samples."""
    part = {name: tensor[rows] for name, tensor in given.items()}
    terms = objective(**part)
    return {name: terms[name].detach() * len(rows) for name in terms}


@pytest.mark.parametrize("point", [pytest.param(one, marks=pytest.mark.ci if one == "noise" else []) for one in POINTS])
@pytest.mark.parametrize("probe", PROBES)
def test_a_sample_gets_the_same_wherever_it_stands(probe, point):
    if probe == "label-class" and point == "mixed-pairs":
        return
    given = batch(count=5)
    objective = Distillation(
        student(),
        teacher(),
        jacobians=1.0,
        jacobian_loss="squared",
        probe=PROBES[probe],
        point=POINTS[point],
        seed=5,
    ).eval()
    whole = per_sample(objective, given, torch.arange(5))
    permuted = per_sample(objective, given, torch.tensor([3, 0, 4, 2, 1]))
    single = [per_sample(objective, given, torch.tensor([n])) for n in range(5)]
    for name, value in whole.items():
        torch.testing.assert_close(permuted[name], value, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(sum(part[name] for part in single), value, rtol=1e-10, atol=1e-12)


RANDOM = ["random-outputs", "random-inputs", "sampled-rows", "fisher-rows", "antithetic-noise"]


@pytest.mark.parametrize("probe", RANDOM)
@pytest.mark.ci
def test_directions_depend_on_seed_id_and_draw(probe):
    given = batch(count=5)

    def term(*, seed=0, calls=0, ids=given["ids"]):
        objective = Distillation(student(), teacher(), jacobians=1.0, probe=PROBES[probe], seed=seed).eval()
        objective.calls = calls
        return float(objective(**{**given, "ids": ids}).unweighted["jacobians"].detach())

    assert term() == term()
    assert len({term(), term(seed=1), term(calls=1), term(ids=given["ids"] + 1)}) == 4


def test_each_call_in_training_draws_anew_and_none_in_evaluation():
    objective = Distillation(student(), teacher(), jacobians=1.0)
    given = batch()

    def term():
        return float(objective(**given).unweighted["jacobians"].detach())

    assert len({term() for _ in range(4)}) == 4
    objective.eval()
    assert len({term() for _ in range(3)}) == 1
    assert objective.calls == 4


def test_ids_are_row_numbers_where_none_are_given():
    given = batch()
    given.pop("ids")
    a = Distillation(student(), teacher(), jacobians=1.0)(**given)
    b = Distillation(student(), teacher(), jacobians=1.0)(**given, ids=torch.arange(3))
    assert torch.equal(a["loss"], b["loss"])


@pytest.mark.parametrize("probe", ["every-row", "random-inputs", "antithetic-noise"])
def test_dropout_has_one_mask_for_values_and_derivatives(probe):
    """The term is that of the network in which the units are taken out for good that the values lack."""
    net, given = perceptron(5, seed=3), batch()
    dropping = nn.Sequential(*net[:3], nn.Dropout(0.5), net[3])
    terms = Distillation(dropping, teacher(), jacobians=1.0, probe=PROBES[probe])(**given)
    masks = []
    for hidden, outputs in zip(net[:3](given["x"]), terms.student_outputs, strict=True):
        possible = [2.0 * torch.tensor([bits >> i & 1 for i in range(5)]).double() for bits in range(2**5)]
        masks += [mask for mask in possible if torch.allclose(net[3](hidden * mask), outputs)]
    assert len(masks) == len(given["x"]), "one for each sample"

    class Thinned(nn.Module):
        def forward(self, h):
            return h * torch.stack(masks)

    thinned = nn.Sequential(*net[:3], Thinned(), net[3])
    truth = Distillation(thinned, teacher(), jacobians=1.0, probe=PROBES[probe])(**given)
    torch.testing.assert_close(terms["jacobians"], truth["jacobians"], rtol=1e-6, atol=1e-9)
