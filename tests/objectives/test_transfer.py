"""The terms of a transfer against slow loops from the definitions, and their gradients against finite differences."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import unverified
from jacmatch.objectives import GradientShare, WeightSchedule
from jacmatch.objectives.transfer import Transfer
from jacmatch.teachers import BlackBoxTeacher, MemoizedTeacher, ModuleTeacher, Question

from . import reference
from .cases import along, direction_of, directional_difference, unchecked

CLASSES, TEACHER_CLASSES, BATCH, SHAPE = 2, 3, 3, (2, 6, 5)
PAIRS = [("first.1", "body.1"), ("second.1", "body.3")]


class Student(nn.Module):
    """Features (B, 3, 4, 3) and (B, 4, 3, 2), then both heads."""

    def __init__(self, seed=1):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh())
        self.second = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Softplus())
        self.heads = nn.Linear(24, CLASSES + TEACHER_CLASSES)

    def forward(self, x):
        return self.heads(self.second(self.first(x)).flatten(1))


class Teacher(nn.Module):
    """A teacher of another architecture: features (B, 5, 5, 4) and (B, 2, 2, 3)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.body = nn.Sequential(nn.Conv2d(2, 5, 2), nn.Softplus(), nn.Conv2d(5, 2, (4, 2)), nn.Tanh())
        self.head = nn.Linear(12, TEACHER_CLASSES)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


def batch(count=BATCH):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 1, 1, 0, 1])[:count]


def objective(student=None, teacher=None, **settings):
    chosen = {"classes": CLASSES, "pairs": PAIRS, "attention": 1.0, "jacobians": 1.0, **settings}
    return Transfer((student or Student()).double(), teacher or Teacher().double(), **chosen)


def layer_of(network, x, name):
    """The features of one image at a layer, by calling the layers one after the other."""
    z = x[None]
    if isinstance(network, Student):
        z = network.first(z)
        return (network.second(z) if name.startswith("second") else z)[0]
    return (network.body if name.endswith("3") else network.body[:2])(z)[0]


def pixels(network, x, name, size, p):
    """The pooled attention map of one image, by loops over windows."""
    z = layer_of(network, x, name)
    height, width = z.shape[1:]
    rows = []
    for i, j in itertools.product(range(size[0]), range(size[1])):
        window = z[
            :,
            i * height // size[0] : -(-(i + 1) * height // size[0]),
            j * width // size[1] : -(-(j + 1) * width // size[1]),
        ]
        rows.append((window.abs() ** p).sum(0).mean())
    return torch.stack(rows)


def sizes(pool):
    """The smaller of the two maps of each pair, (4, 3) ∧ (5, 4) and (3, 2) ∧ (2, 3), and at most `pool`."""
    natural = [(4, 3), (2, 2)]
    return natural if pool is None else [(min(pool, h), min(pool, w)) for h, w in natural]


def row_of(network, x, name, size, p, pixel):
    """The gradient of one pixel of the pooled map by the image."""
    return torch.autograd.functional.jacobian(lambda z: pixels(network, z, name, size, p)[pixel], x).flatten()


def by_definition(student, teacher, x, y, *, p, pool, output_loss, temperature, jacobian_loss):
    """All terms, before weighting."""
    sums, norm = {"labels": 0.0, "outputs": 0.0, "attention": 0.0, "jacobians": 0.0}, 0.0
    for one, label in zip(x, y, strict=True):
        both, teacher_outputs = student(one[None])[0].detach(), teacher(one[None])[0].detach()
        sums["labels"] += reference.cross_entropy(both[:CLASSES], label)
        source = both[CLASSES:]
        kl = reference.kl(source, teacher_outputs, temperature)
        sums["outputs"] += reference.squared(source, teacher_outputs) if output_loss == "squared" else kl
        own_rows, other_rows = [], []
        for (mine, theirs), size in zip(PAIRS, sizes(pool), strict=True):
            own, other = (pixels(*of, size, p).detach() for of in ((student, one, mine), (teacher, one, theirs)))
            sums["attention"] += reference.normalized(own[None], other[None]) / len(PAIRS)
            pixel = int(other.argmax())
            for network, name, rows in ((student, mine, own_rows), (teacher, theirs, other_rows)):
                rows.append(row_of(network, one, name, size, p, pixel))
        loss = reference.JACOBIAN_LOSSES[jacobian_loss]
        sums["jacobians"] += loss(torch.stack(own_rows), torch.stack(other_rows))
        norm += float(torch.stack(other_rows).square().sum()) / len(x)
    if jacobian_loss == "relative":
        sums["jacobians"] /= norm + 1e-6
    return {name: float(total) / len(x) for name, total in sums.items()}


SETTINGS = [
    {"p": 2.0, "size": None, "output_loss": "kl", "temperature": 2.0, "jacobian_loss": "normalized"},
    {"p": 4.0, "size": 2, "output_loss": "squared", "temperature": 1.0, "jacobian_loss": "relative"},
    {"p": 3.0, "size": 1, "output_loss": "kl", "temperature": 1.0, "jacobian_loss": "squared"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: f"p={settings['p']}, size={settings['size']}")
def test_the_terms_are_those_of_the_definitions(settings):
    student, teacher = Student().double(), Teacher().double()
    x, y = batch()
    expected = by_definition(
        student, teacher, x, y, **{"pool" if key == "size" else key: value for key, value in settings.items()}
    )
    weights = {"labels": 0.7, "outputs": 0.3, "attention": 2.0, "jacobians": 0.5}
    terms = objective(student, teacher, **weights, **settings)(x, y)
    assert terms.keys() == ["loss", *weights]
    for name, weight in weights.items():
        assert terms.unweighted[name].item() == pytest.approx(expected[name], rel=1e-9), name
        assert terms[name].item() == pytest.approx(weight * expected[name], rel=1e-9)
    assert terms["loss"].item() == pytest.approx(sum(weights[name] * expected[name] for name in weights))
    assert torch.equal(terms.student_outputs, student(x)[:, :CLASSES])
    assert torch.equal(terms.teacher_outputs, teacher(x))


@pytest.mark.parametrize("settings", SETTINGS[:2], ids=["normalised", "relative"])
@pytest.mark.parametrize("only", [None, "outputs", "attention", "jacobians"])
def test_the_gradient_is_that_of_finite_differences(settings, only):
    weights = {"labels": 1.0, "outputs": 0.5, "attention": 2.0, "jacobians": 3.0}
    weights = {name: weight if only in (None, name) else 0.0 for name, weight in weights.items()}
    made = objective(**weights, **settings).eval()
    x, y = batch()
    parameters = list(made.parameters())
    direction = direction_of(parameters)
    exact = along(made(x, y)["loss"], parameters, direction)
    assert abs(exact) > 1e-3
    assert directional_difference(lambda: made(x, y)["loss"], parameters, direction) == pytest.approx(exact, rel=1e-6)


def test_a_student_that_is_the_teacher_loses_nothing():
    """Both heads apart, all terms but the labels are 0 for equal networks."""
    teacher = Student(seed=1).double()
    source = nn.Linear(24, TEACHER_CLASSES).double()
    with torch.no_grad():
        source.weight.copy_(teacher.heads.weight[CLASSES:])
        source.bias.copy_(teacher.heads.bias[CLASSES:])
    teacher.heads = source
    pairs = [("first.1", "first.1"), ("second.1", "second.1")]
    terms = objective(Student(seed=1), teacher, pairs=pairs)(*batch())
    for name in ("outputs", "attention", "jacobians"):
        assert float(terms.unweighted[name].detach()) == pytest.approx(0, abs=1e-12)


def test_one_forward_pass_and_one_query():
    student, queries, passes = Student().double(), [], []
    inner = ModuleTeacher(Teacher().double())

    class Watched:
        answers_vjp = True

        def answer(self, x, question=None):
            queries.append(question)
            return inner.answer(x, question)

    made = objective(student, Watched())
    x, y = batch()
    made(x, y)  # finds out the sizes of the maps
    student.register_forward_hook(lambda *_: passes.append(1))
    queries.clear()
    with unverified():  # the check of an engine before its first use has passes of its own
        made(x, y)
    assert (len(passes), len(queries)) == (1, 1)


def test_samples_are_treated_each_by_itself():
    x, y = batch(5)
    made = objective().eval()
    whole = made(x, y)
    parts = [made(x[rows], y[rows]) for rows in (slice(0, 2), slice(2, 5))]
    for name in ("labels", "outputs", "attention", "jacobians"):
        joined = (2 * parts[0].unweighted[name] + 3 * parts[1].unweighted[name]) / 5
        torch.testing.assert_close(whole.unweighted[name], joined)


def test_a_memoized_teacher_gives_the_same_loss():
    x, y = batch()
    memoized = MemoizedTeacher(ModuleTeacher(Teacher().double()))
    made, plain = objective(teacher=memoized), objective()
    for _ in range(3):
        torch.testing.assert_close(made(x, y, ids=torch.arange(3))["loss"], plain(x, y)["loss"])
    assert memoized.queried == 1 + 3, "one image for the sizes of the maps, then each image once"
    assert memoized.memoized == 2 * 3


def test_methods_without_a_term_do_not_compute_it():
    x, y = batch()
    assert objective(attention=0.0, jacobians=0.0, pairs=())(x, y).keys() == ["loss", "labels", "outputs"]
    assert objective(jacobians=0.0)(x, y).keys() == ["loss", "labels", "outputs", "attention"]
    assert objective(attention=0.0)(x, y).keys() == ["loss", "labels", "outputs", "jacobians"]
    alone = Transfer(Student().double(), classes=CLASSES)
    assert alone(x, y).keys() == ["loss", "labels"]
    torch.testing.assert_close(alone(x, y)["loss"], functional.cross_entropy(alone.student(x), y))


def test_every_and_schedule():
    made = objective(every=3, schedule=WeightSchedule(samples_per_class=300)).train()
    x, y = batch()
    there = [("jacobians" in terms, terms) for terms in (made(x, y) for _ in range(6))]
    assert [each for each, _ in there] == [True, False, False, True, False, False]
    terms = there[0][1]
    torch.testing.assert_close(terms["jacobians"], 3 * 0.5 * terms.unweighted["jacobians"])


def test_shares_are_reached_and_saved_in_the_state():
    made = objective(outputs=GradientShare(0.3), attention=GradientShare(0.2), jacobians=GradientShare(0.1)).train()
    terms = made(*batch())
    assert terms.shares == pytest.approx({"labels": 0.4, "outputs": 0.3, "attention": 0.2, "jacobians": 0.1})
    other = objective(outputs=GradientShare(0.3), attention=GradientShare(0.2), jacobians=GradientShare(0.1)).train()
    other.load_state_dict(made.state_dict())
    torch.testing.assert_close(other(*batch())["loss"], made(*batch())["loss"])
    assert other.calls == 2


def test_modes_and_statistics_are_left_alone():
    student = Student()
    student.second.insert(1, nn.BatchNorm2d(4))
    student.first.eval()
    made = objective(student, pairs=[("first.1", "body.1"), ("second.2", "body.3")])
    x, y = batch()
    with torch.no_grad(), unchecked():
        made.maps(x, 0)
    assert int(student.second[1].num_batches_tracked) == 0
    assert (student.first.training, student.second.training) == (False, True)
    made(x, y)
    assert int(student.second[1].num_batches_tracked) == 1


def test_the_teacher_is_no_part_of_the_module():
    made = objective()
    assert not [name for name, _ in made.named_parameters() if "body" in name]
    assert Question().ids is None


REFUSED = {
    "no pairs": ({"pairs": ()}, r"`pairs` of `Transfer` must name layers.* Got none\. Give for example"),
    "no term": ({"labels": 0, "outputs": 0, "attention": 0, "jacobians": 0}, r"`Transfer` must have at least one term"),
    "p": ({"p": 1.0}, r"`p` of `Transfer` must be above 1 .*Got 1\.0\. Omit it for the default, 2"),
    "size": ({"size": 0}, r"`size` of `Transfer` must be at least 1\. Got 0"),
    "loss": ({"output_loss": "kll"}, r"`output_loss` of `Transfer` must be a known name\. Got 'kll'\. Nearest: kl"),
    "rows": ({"jacobian_loss": "l2"}, r"`jacobian_loss` of `Transfer` must be a known name"),
    "every": ({"every": 0}, r"`every` of `Transfer` must be an integer of at least 1\. Got 0"),
    "temperature": ({"temperature": 0}, r"`temperature` of `Transfer` must be positive"),
    "shares": (
        {"attention": GradientShare(0.6), "jacobians": GradientShare(0.5)},
        r"shares of all terms must add up to less than 1",
    ),
    "classes": ({"classes": 0}, r"`outputs` of `FirstOutputs` must be at least 1"),
}


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_are_wrong(name):
    settings, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        objective(**settings)


@pytest.mark.usefixtures("as_users_run")
def test_batches_and_networks_that_do_not_fit():
    x, y = batch()
    with pytest.raises(InputError, match=r"`y` must be given if the weight `labels` is not 0\. Set labels=0"):
        objective()(x)
    with pytest.raises(
        InputError, match=r"must have outputs for the classes of the target and of the teacher\. Got 5 outputs"
    ):
        objective(classes=1)(x, y.clamp_max(0))
    with pytest.raises(InputError, match=r"The layer of a readout must be a known name\. Got 'first\.7'"):
        objective(pairs=[("first.7", "body.1")])(x, y)
    with pytest.raises(InputError, match=r"`features` of `attention_map` must have shape"):
        objective(pairs=[("heads", "body.1")])(x, y)
    with pytest.raises(UnsupportedError, match=r"`teacher` of `Transfer` must answer vᵀJ; BlackBoxTeacher cannot"):
        objective(teacher=BlackBoxTeacher(Teacher().double()))
    shared = Student().double()
    with pytest.raises(InputError, match=r"must not share parameters"):
        objective(shared, shared)
