"""Derivatives by token substitutions, against differences in the embeddings in float64."""

import pytest
import torch
from torch import nn

import jacmatch
from jacmatch.errors import InputError
from jacmatch.jacobian import EveryRow, MaskedNeighbours, RandomInputs, RandomOutputs, TokenSubstitutions
from jacmatch.objectives import AtNoise, Distillation, Robustness
from jacmatch.teachers import BlackBoxTeacher, MemoizedTeacher, ModuleTeacher

D, B, T, V, K = torch.float64, 5, 6, 12, 3


class Text(nn.Module):
    """One layer of attention over embedded tokens, with positions and a mask."""

    def __init__(self, width, seed, vocabulary=V):
        super().__init__()
        torch.manual_seed(seed)
        self.words, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(T, width)
        self.layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.last = nn.Linear(width, K)
        self.to(D)

    def get_input_embeddings(self):
        return self.words

    def embedded(self, e, attention_mask):
        e = e + self.positions(torch.arange(e.shape[1]))
        h = self.layer(e, src_key_padding_mask=attention_mask == 0)
        return self.last((h * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True))

    def forward(self, input_ids, attention_mask):
        return self.embedded(self.words(input_ids), attention_mask)


IDS = torch.randint(2, V, (B, T), generator=torch.Generator().manual_seed(0))
IDS[:, 0] = 1  # start
MASK = torch.ones(B, T, dtype=torch.int64)
MASK[1, 3:], MASK[2, 4:] = 0, 0
IDS[MASK == 0] = 0
Y, NUMBERS = torch.arange(B) % K, torch.arange(B)
PROBE = TokenSubstitutions(4, special=(0, 1))


def drawn(probe=PROBE, **changed):
    about = {"ids": NUMBERS, "seed": 0, "draw": 0, "context": {"attention_mask": MASK}, "vocabulary": V, **changed}
    return probe.drawn(IDS, **about)


def by_differences(network, chosen):
    """Jv of each substitution (B, K, k), four-point differences in the embeddings."""
    h, columns = 1e-3, []
    with torch.no_grad():
        e = network.words(IDS)
        for m in range(chosen.new.shape[1]):
            direction = torch.zeros_like(e)
            for n in range(B):
                p = chosen.positions[n, m]
                direction[n, p] = network.words.weight[chosen.new[n, m]] - network.words.weight[IDS[n, p]]
            y = {step: network.embedded(e + step * h * direction, MASK) for step in (-2, -1, 1, 2)}
            columns.append((8 * (y[1] - y[-1]) - (y[2] - y[-2])) / (12 * h))
    return torch.stack(columns, 2)


@pytest.mark.parametrize("rows", [EveryRow(), RandomOutputs(2), RandomInputs(2)], ids=lambda rows: type(rows).__name__)
def test_the_term_is_that_of_differences_in_the_embeddings(rows):
    """Student and teacher of other widths: Σ of squared differences of the products, by definition."""
    student, teacher = Text(4, 1), Text(8, 2)
    probe = TokenSubstitutions(4, special=(0, 1), rows=rows)
    settings = {"labels": 0, "outputs": 0, "jacobians": 1.0, "jacobian_loss": "squared"}
    objective = Distillation(student, teacher, probe=probe, **settings)
    terms = objective(IDS, Y, ids=NUMBERS, context={"attention_mask": MASK})
    chosen = drawn(probe)
    j = by_differences(student, chosen) - by_differences(teacher, chosen)
    x, y = torch.zeros(B, 4, dtype=D), torch.zeros(B, K, dtype=D)
    v = rows.directions(x=x, outputs=y, ids=NUMBERS, seed=0, draw=0, labels=Y, partners=x)
    product = torch.einsum("pbk,bkm->pbm" if rows.side == "output" else "pbm,bkm->pbk", v, j)
    torch.testing.assert_close(terms.loss, product.square().sum((0, 2)).mean(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(terms.student_outputs, student(IDS, MASK))
    terms.loss.backward()
    assert student.words.weight.grad.abs().sum() > 0, "the student's own table learns from it"
    assert objective.calls == 1
    again = objective(IDS, Y, ids=NUMBERS, context={"attention_mask": MASK}).loss
    assert not torch.equal(again, terms.loss), "the next call draws others"


def test_the_gradient_by_the_table():
    """∂term/∂E along a direction, by differences of the term."""
    student, teacher = Text(4, 1), Text(8, 2)
    settings = {"labels": 0, "outputs": 0, "jacobians": 1.0, "jacobian_loss": "squared"}
    objective = Distillation(student, teacher, probe=PROBE, **settings)

    def term():
        return objective(IDS, Y, ids=NUMBERS, draw=0, context={"attention_mask": MASK}).loss

    table, h = student.words.weight, 1e-5
    move = torch.randn(table.shape, dtype=D, generator=torch.Generator().manual_seed(0))
    expected = float((torch.autograd.grad(term(), table)[0] * move).sum())
    with torch.no_grad():
        ends = []
        for step in (h, -h):
            table += step * move
            ends.append(float(term()))
            table -= step * move
    assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(expected, rel=1e-6)


def test_padding_and_special_tokens_are_left_alone():
    for candidates in ("batch", "random"):
        probe = TokenSubstitutions(50, candidates=candidates, special=(0, 1))
        chosen = drawn(probe)
        assert bool(MASK.gather(1, chosen.positions).all())
        assert not bool(torch.isin(IDS.gather(1, chosen.positions), torch.tensor([0, 1])).any())
        assert not bool(torch.isin(chosen.new, torch.tensor([0, 1])).any())
        if candidates == "batch":
            assert set(chosen.new.unique().tolist()) <= set(IDS[IDS > 1].tolist())
        else:
            assert int(chosen.new.max()) < V
        assert set(chosen.positions[0].tolist()) == {1, 2, 3, 4, 5}, "all others are drawn"
    nothing = drawn(context={"attention_mask": torch.where(NUMBERS[:, None] == 3, 0, MASK)})
    assert torch.equal(nothing.new[3], IDS[3].gather(0, nothing.positions[3])), "a text without a free position"


def test_a_text_has_its_substitutions_wherever_it_stands():
    order = torch.tensor([3, 1])
    probe = TokenSubstitutions(4, candidates="random", special=(0, 1))
    part = probe.drawn(IDS[order], ids=order, seed=0, draw=0, context={"attention_mask": MASK[order]}, vocabulary=V)
    torch.testing.assert_close(part.new, drawn(probe).new[order])
    torch.testing.assert_close(part.positions, drawn(probe).positions[order])
    assert not torch.equal(drawn(probe, draw=1).new, drawn(probe).new)


def test_candidates_of_a_masked_language_model():
    class Model(nn.Module):
        """Expects the tokens 4 and 5 where a token is hidden."""

        def forward(self, ids):
            logits = torch.zeros(*ids.shape, V)
            logits[..., 4:6] = (ids == 2)[..., None].float()
            return logits

    probe = TokenSubstitutions(8, candidates=MaskedNeighbours(Model(), mask_token=2, top=2), special=(0, 1))
    assert set(drawn(probe).new.flatten().tolist()) == {4, 5}


def test_fraction_and_penalty():
    student, teacher = Text(4, 1), Text(8, 2)
    settings = {"labels": 0, "outputs": 0, "jacobians": 1.0, "jacobian_loss": "squared", "fraction": 0.6}
    probe = TokenSubstitutions(3, special=(0, 1), rows=EveryRow())
    terms = Distillation(student, teacher, probe=probe, **settings)(
        IDS, Y, ids=NUMBERS, context={"attention_mask": MASK}
    )
    j = (by_differences(student, drawn(probe)) - by_differences(teacher, drawn(probe)))[:3]
    torch.testing.assert_close(terms.loss, j.square().sum((1, 2)).mean(), rtol=1e-6, atol=1e-9)
    penalty = Robustness(student, penalty=1.0, form="squared-norm", probe=probe)
    terms = penalty(IDS, Y, ids=NUMBERS, context={"attention_mask": MASK})["penalty"]
    norm = by_differences(student, drawn(probe)).square().sum((1, 2)).mean()
    torch.testing.assert_close(terms, norm, rtol=1e-6, atol=1e-9)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = nn.Embedding(V, 2), nn.Embedding(V, 2), nn.Linear(2, K)

    def forward(self, ids):
        return self.last((self.one(ids) + self.two(ids)).mean(1))


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.last = nn.Embedding(V + 1, 2), nn.Linear(2, K)

    def forward(self, ids):
        return self.last(self.one(ids + 1).mean(1))


def test_a_memory_answers_for_a_network_about_the_same_substitutions():
    student, teacher, context = Text(4, 1), Text(8, 2), {"attention_mask": MASK}
    memory = MemoizedTeacher(ModuleTeacher(teacher), draws=True)
    probe = TokenSubstitutions(4, candidates="random", special=(0, 1))
    with_memory, without = (Distillation(student, each, jacobians=1.0, probe=probe) for each in (memory, teacher))
    for rows in (slice(None), [3, 0, 4]):
        about = {"ids": NUMBERS[rows], "draw": 0, "context": {"attention_mask": MASK[rows]}}
        torch.testing.assert_close(
            with_memory(IDS[rows], Y[rows], **about).loss, without(IDS[rows], Y[rows], **about).loss
        )
    assert (memory.queried, memory.memoized) == (B, 3)
    with_memory(IDS, Y, ids=NUMBERS, draw=1, context=context)
    assert memory.queried == 2 * B


def call(student=Text, x=IDS, teacher=None, **settings):
    student = Text(4, 1) if student is Text else student
    objective = Distillation(student, teacher or Text(8, 2), jacobians=1.0, probe=PROBE, **settings)
    context = {"attention_mask": MASK} if isinstance(student, Text) else {}
    return lambda: objective(x, Y, context=context)


REFUSED = {
    "count": (lambda: TokenSubstitutions(0), r"`count` of `TokenSubstitutions` must be an integer"),
    "candidates": (lambda: TokenSubstitutions(1, candidates="near"), r"`candidates` of `TokenSub.*Got 'near'"),
    "floats": (call(x=torch.rand(B, T)), r"`x` of `Distillation\(probe=TokenSub.*must be token ids .*Pass input_ids"),
    "noise": (call(point=AtNoise(0.1)), r"`point` of .* must be AtData\(\).* Got AtNoise"),
    "two tables": (call(student=Two()), r"must have one nn\.Embedding.* Got 2 of them in Two"),
    "shifted": (call(student=Shifted(), teacher=Shifted()), r"must be indexed by the token ids themselves"),
    "black box": (
        lambda: call(teacher=BlackBoxTeacher(lambda x: x))(),
        r"(must be a network with embeddings|must answer vᵀJ)",
    ),
    "no tokens": (lambda: drawn(TokenSubstitutions(1, special=tuple(range(V)))), r"must have tokens to choose from"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(as_users_run, name):
    refused, match = REFUSED[name]
    with pytest.raises((InputError, jacmatch.UnsupportedError), match=match):
        refused()
