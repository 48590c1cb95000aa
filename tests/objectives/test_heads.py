"""Several heads in one objective, against separate objectives of the heads, summed by hand."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from jacmatch import (
    AntitheticNoise,
    AtMixedPairs,
    Distillation,
    EveryRow,
    GradientShare,
    Heads,
    InputError,
    LabelClass,
    LogProbabilities,
    NoiseAveraged,
    RandomInputs,
    RandomOutputs,
    TopClass,
    TopLogit,
)
from jacmatch.integrations import TrainingUnit
from jacmatch.jacobian import TokenSubstitutions
from jacmatch.objectives.weights import gradient_norms
from jacmatch.teachers import AnalyticTeacher

D, B = torch.float64, 6
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(B, 4, dtype=D, generator=GENERATOR)
Y = {
    "class": torch.arange(B) % 3,
    "depth": torch.randn(B, 2, 2, 2, dtype=D, generator=GENERATOR),
    "size": torch.randn(B, dtype=D, generator=GENERATOR),
}
IDS = torch.arange(B)


class Several(nn.Module):
    """Classes, a dense field, one number, an integer output, and None."""

    def __init__(self, width=5, seed=0, classes=3, kind=D):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.classes = nn.Linear(4, width).to(kind), nn.Linear(width, classes).to(kind)
        self.depth, self.size = nn.Linear(width, 8).to(kind), nn.Linear(width, 1).to(kind)
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        h = self.body(x).tanh()
        depth = self.depth(h).view(-1, 2, 2, 2)
        return {"class": self.classes(h), "depth": depth, "size": self.size(h)[:, 0], "top": h.argmax(1), "none": None}


HEADS = {
    "class": {"jacobians": 0.3, "probe": EveryRow(), "jacobian_loss": "squared"},
    "depth": {"task": "regression", "jacobians": 0.2, "probe": RandomOutputs(2), "positions": "mean"},
    "size": {"task": "regression", "labels": 2.0, "outputs": 0.5, "jacobians": 0.1},
}
CASES = {
    "rows": (HEADS, {}),
    "readouts": (
        {
            "class": {"jacobians": 0.3, "readout": LogProbabilities(2.0), "probe": LabelClass()},
            "size": {"task": "regression", "jacobians": 0.1},
            "depth": {"task": "regression", "outputs": 0.0, "jacobians": 0.4, "jacobian_loss": "normalized"},
        },
        {},
    ),
    "classes": (
        {
            "class": {"jacobians": 0.3, "readout": TopLogit(), "probe": TopClass()},
            "size": {"labels": 0, "task": "regression"},
        },
        {},
    ),
    "inputs": ({n: {**h, "probe": RandomInputs(2)} for n, h in HEADS.items()}, {}),
    "differences": ({n: {**h, "probe": AntitheticNoise(sigma=1e-3)} for n, h in HEADS.items()}, {}),
    "fraction": (HEADS, {"fraction": 0.5}),
    "chunks": (HEADS, {"chunk_size": 1}),
    "mixed pairs": (
        {"class": {"jacobians": 0.3}, "depth": {"labels": 0, "task": "regression"}},
        {"point": AtMixedPairs()},
    ),
    "every": (HEADS, {"every": 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_terms_and_gradient_are_those_of_separate_objectives(name):
    heads, settings = CASES[name]
    student, teacher = Several(), Several(7, 1)
    objective = Heads(student, teacher, heads, **settings)
    student.runs = teacher.runs = 0
    y = {head: Y[head] for head in heads}
    terms = objective(X, y, ids=IDS)
    total, wanted = 0.0, {}
    for head in heads:
        own = "jacobians" in heads[head] and objective.differentiation.side == "output"
        seed = 7919 * list(heads).index(head) * own  # heads draw different directions
        alone = Distillation(
            student, teacher, output=lambda out, head=head: out[head], **{"jacobians": 0.0, **heads[head]}, **settings,
            seed=seed,
        )  # fmt: skip
        separate = alone(X, y[head], ids=IDS)
        total = total + separate.loss
        wanted |= {f"{head}/{term}": value for term, value in separate.items() if term != "loss"}
    assert terms.keys() == ["loss", *wanted]
    torch.testing.assert_close(dict(terms.items()), {"loss": total, **wanted})
    parameters = list(student.parameters())
    gradients = [
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in (terms.loss, total)
    ]
    torch.testing.assert_close(*gradients)


def test_each_network_runs_once_for_all_heads():
    student, teacher = Several(), Several(7, 1)
    objective = Heads(student, teacher, HEADS)
    objective(X, Y)  # the first call verifies the engine
    student.runs = teacher.runs = 0
    terms = objective(X, Y)
    assert (student.runs, teacher.runs) == (1, 1)
    torch.testing.assert_close(objective.by_head(terms.student_outputs)["depth"], student(X)["depth"])
    torch.testing.assert_close(objective.by_head(terms.student_outputs)["size"], student(X)["size"])


def test_shares_are_those_of_the_gradient_of_all_heads():
    student, teacher = Several(), Several(7, 1)
    heads = {
        n: {**h, "jacobians": GradientShare(share)}
        for (n, h), share in zip(HEADS.items(), (0.1, 0.2, 0.05), strict=True)
    }
    terms = Heads(student, teacher, heads)(X, Y)
    norms = gradient_norms({k: v for k, v in terms.items() if k != "loss"}, list(student.parameters()))
    whole = sum(norms.values())
    for head, share in zip(heads, (0.1, 0.2, 0.05), strict=True):
        assert float(norms[f"{head}/jacobians"] / whole) == pytest.approx(share)
        assert terms.shares[f"{head}/jacobians"] == pytest.approx(share)
    with pytest.raises(InputError, match="less than 1"):
        Heads(student, teacher, {n: {**h, "jacobians": GradientShare(0.4)} for n, h in HEADS.items()})


class Without(Several):
    """A teacher that has no sizes."""

    def forward(self, x):
        out = super().forward(x)
        return {"depth": out["depth"], "class": out["class"]}


def test_a_teacher_may_lack_a_head_that_learns_labels_alone():
    student, teacher = Several(), Without(7, 1)
    heads = {"size": {"task": "regression", "outputs": 0}, **{n: HEADS[n] for n in ("class", "depth")}}
    terms = Heads(student, teacher, heads)(X, Y, ids=IDS)
    of_two = [f"{head}/{term}" for head in ("class", "depth") for term in ("labels", "outputs", "jacobians")]
    assert terms.keys() == ["loss", "size/labels", *of_two]
    alone = Distillation(student, teacher, output=lambda out: out["class"], **HEADS["class"])(X, Y["class"], ids=IDS)
    torch.testing.assert_close(terms["class/jacobians"], alone["jacobians"])
    torch.testing.assert_close(terms["size/labels"], (student(X)["size"] - Y["size"]).square().mean())
    labels = Heads(student, None, heads)(X, Y)
    assert labels.keys() == ["loss", "size/labels", "class/labels", "depth/labels"]
    with pytest.raises(InputError, match=r"teacher of `Heads` must return head 'size'.*alone: outputs=0"):
        Heads(student, teacher, HEADS)(X, Y)


@dataclass
class Detected:
    scores: Tensor
    boxes: tuple[Tensor, ...]


class Objects(Several):
    def forward(self, x):
        out = super().forward(x)
        return Detected(out["class"], (out["depth"], out["size"]))


def test_heads_of_an_object_and_inside_of_tuples():
    settings = {"scores": HEADS["class"], "size": {**HEADS["size"], "output": lambda out: out.boxes[1]}}
    terms = Heads(Objects(), Objects(7, 1), settings)(X, {"scores": Y["class"], "size": Y["size"]}, ids=IDS)
    wanted = Heads(Several(), Several(7, 1), {n: HEADS[n] for n in ("class", "size")})(X, Y, ids=IDS)
    torch.testing.assert_close(terms.loss, wanted.loss)
    pair = (lambda out: out.boxes[1], lambda out: out["size"])
    other = Heads(Objects(), Several(7, 1), {"size": {**HEADS["size"], "output": pair}})(
        X, {"size": Y["size"]}, ids=IDS
    )
    torch.testing.assert_close(other["size/outputs"], wanted["size/outputs"])


def test_sixteen_bits_and_autocast():
    student, teacher = Several(kind=torch.float32), Several(7, 1, kind=torch.float32)
    labels = {name: y.float() if y.is_floating_point() else y for name, y in Y.items()}
    wanted = Heads(student, teacher, HEADS)(X.float(), labels, ids=IDS)
    with torch.autocast("cpu", torch.bfloat16):
        terms = Heads(student, teacher, HEADS)(X.float(), labels, ids=IDS)
    terms.loss.backward()
    torch.testing.assert_close(terms.loss, wanted.loss, rtol=0.05, atol=0.05)


def test_training_lowers_all_terms_and_its_state_goes_on():
    student, teacher = Several(8), Several(7, 1)
    heads = {n: {**h, "labels": 0.0, "jacobians": GradientShare(0.1)} for n, h in HEADS.items()}
    unit = TrainingUnit(Heads(student, teacher, heads, measure_every=5))
    optimizer = torch.optim.Adam(student.parameters(), 0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        returned = unit(X)
        returned["loss"].backward()
        optimizer.step()
        losses.append({name: float(value) for name, value in returned.items() if "/" in name})
    assert all(losses[-1][name] < losses[0][name] for name in losses[0] if name.endswith("outputs"))
    state, again = unit.state_dict(), Heads(Several(8), teacher, heads, measure_every=5)
    TrainingUnit(again).load_state_dict(state)
    torch.testing.assert_close(again(X).loss, unit.objective(X).loss)


def test_a_copy_that_was_never_called_has_the_structure_of_its_networks():
    objective = Heads(Several(), Several(7, 1), HEADS)
    wanted = objective(X, Y, ids=IDS, draw=0)
    again = copy.deepcopy(Heads(Several(), Several(7, 1), HEADS))(X, Y, ids=IDS, draw=0)
    torch.testing.assert_close(again.loss, wanted.loss, rtol=0, atol=0)


class Words(nn.Module):
    """Two heads of token ids."""

    def __init__(self, width):
        super().__init__()
        self.words, self.kind, self.tag = (
            nn.Embedding(9, width).to(D),
            nn.Linear(width, 2).to(D),
            nn.Linear(width, 3).to(D),
        )

    def forward(self, tokens, attention_mask):
        h = (self.words(tokens).tanh() * attention_mask[..., None]).mean(1)
        return {"kind": self.kind(h), "tag": self.tag(h)}


def test_token_substitutions_are_shared_by_the_heads():
    tokens, context = torch.arange(20).view(5, 4) % 9, {"attention_mask": torch.ones(5, 4, dtype=D)}
    probe, (student, teacher) = TokenSubstitutions(2, rows=EveryRow(), candidates="random"), (Words(3), Words(5))
    settings = {"labels": 0, "jacobians": 1.0, "probe": probe}
    terms = Heads(student, teacher, {"kind": settings, "tag": settings})(tokens, ids=torch.arange(5), context=context)
    for head in ("kind", "tag"):
        alone = Distillation(student, teacher, output=lambda out, head=head: out[head], **settings)
        wanted = alone(tokens, ids=torch.arange(5), context=context)
        torch.testing.assert_close(terms[f"{head}/jacobians"], wanted["jacobians"])


def heads_of(**changed):
    return {**HEADS, **changed}


NOISE = NoiseAveraged(RandomOutputs(1), sigma=0.1, count=2)
POSITIONS = torch.zeros(B, 2, 2).long()
REFUSED = {
    "no heads": ({}, Y, r"`heads` of `Heads` must have at least one head"),
    "a setting of all": (heads_of(size={"every": 2}), Y, r"'size'\. Got every\. Pass it to Heads: every="),
    "two heads in one layer": (heads_of(size={"classes": 2}), Y, r"'size'\. Got classes\. Leave it out"),
    "an unknown setting": (heads_of(size={"weight": 2}), Y, r"Head 'size' of `Heads` must have valid settings.*weight"),
    "a wrong setting": (heads_of(size={"output_loss": "mse"}), Y, r"Head 'size'.*valid settings.*output_loss"),
    "noise": (heads_of(size={"jacobians": 1.0, "probe": NOISE}), Y, r"Head 'size'.*NoiseAveraged"),
    "relative": (heads_of(size={"jacobians": 1.0, "jacobian_loss": "relative"}), Y, r"Head 'size'.*relative"),
    "sides": (heads_of(size={"jacobians": 1.0, "probe": RandomInputs(1)}), Y, r"same in all heads.*size: RandomInputs"),
    "integers": (heads_of(top={"labels": 0}), Y, r"Head 'top' of the teacher of `Heads` must be a floating-.*int64"),
    "nothing": (heads_of(none={"outputs": 0}), {**Y, "none": Y["class"]}, r"Head 'none' of the student.*NoneType"),
    "a missing head": (
        heads_of(boxes={"labels": 0}),
        Y,
        r"teacher of `Heads` must return head 'boxes'.*Got 'class', 'depth'",
    ),
    "classes out of range": (HEADS, {**Y, "class": Y["class"] + 1}, r"`y\['class'\]` of `Heads` must be classes"),
    "no labels": (HEADS, {"depth": Y["depth"]}, r"with the labels of 'class', 'size'\. Got a dictionary with 'depth'"),
    "none": (HEADS, None, r"labels of 'class', 'depth', 'size'\. Got NoneType"),
    "too few labels": (HEADS, {**Y, "size": Y["size"][1:]}, r"one label of 'size' for each sample\. Got 5 for 6"),
    "class_dim": (heads_of(depth={"jacobians": 0}), {**Y, "depth": POSITIONS}, r"`class_dim` of head 'depth'"),
}


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("name", REFUSED)
def test_what_several_heads_cannot_have_is_refused_in_one_line(name):
    heads, y, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        Heads(Several(), Several(7, 1), heads)(X, y)


@pytest.mark.parametrize("heads", [["class"], {"class": None}])
def test_settings_that_are_no_dictionary_are_refused(as_users_run, heads):
    with pytest.raises(InputError, match="`heads` of `Heads` must be a dictionary with a dictionary of settings"):
        Heads(Several(), Several(7, 1), heads)


@pytest.mark.parametrize("jacobians", [0.0, 0.3])
def test_heads_of_other_sizes_are_named(jacobians):
    heads = {"class": {**HEADS["class"], "jacobians": jacobians}, "size": HEADS["size"]}
    with pytest.raises(InputError, match=r"same outputs in head 'class'\. Got \(4,\) and \(3,\)"):
        Heads(Several(classes=4), Several(7, 1), heads)(X, Y)


def test_a_teacher_that_is_no_network_is_refused():
    teacher = AnalyticTeacher(lambda x: x, lambda x: torch.eye(4, dtype=D).expand(len(x), 4, 4))
    with pytest.raises(InputError, match=r"`output` of `Heads` can select|`teacher` of `Heads` must be a network"):
        Heads(Several(), teacher, HEADS)


def test_labels_of_positions_may_be_ignored():
    class Dense(Several):
        def forward(self, x):
            return {"map": super().forward(x)["depth"], "size": super().forward(x)["size"]}

    labels = torch.randint(2, (B, 2, 2))
    labels[:, 0] = 255
    settings = {"class_dim": 1, "ignore_index": 255, "positions": "mean"}
    student, teacher = Dense(), Dense(7, 1)
    terms = Heads(student, teacher, {"map": settings})(X, {"map": labels})
    alone = Distillation(student, teacher, output=lambda out: out["map"], jacobians=0, **settings)(X, labels)
    torch.testing.assert_close(terms.loss, alone.loss)
