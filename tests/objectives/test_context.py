"""Other arguments of the networks, several inputs, and graphs: each against a function that is closed over them."""

import numpy as np
import pytest
import torch
from torch import nn

import jacmatch
from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import Arguments, DataPairs, Edges, EveryRow, Inputs, Nodes, RandomInputs, RandomOutputs, Shared
from jacmatch.jacobian.finite_differences import couples
from jacmatch.objectives import AtMixedPairs, Distillation, Regression, Robustness, Transfer
from jacmatch.teachers import (
    AnalyticTeacher,
    BlackBoxTeacher,
    EnsembleTeacher,
    MemoizedTeacher,
    ModuleTeacher,
    Question,
)

D = torch.float64
B, T, K = 6, 4, 3


class Masked(nn.Module):
    """A mean over the tokens of the mask, moved by types and scaled by a table."""

    def __init__(self, seed, width=5):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(2, width).to(D), nn.Linear(width, K).to(D)
        self.types = nn.Embedding(3, width).to(D)

    def forward(self, x, mask, extra):
        h = (self.first(x) + self.types(extra["types"])).tanh()
        mean = (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.last(mean) * extra["table"].sum() * extra["factor"]


def context(seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(B, T, generator=generator) > 0.4).to(D)
    mask[:, 0] = 1
    types = torch.randint(3, (B, T), generator=generator)
    return {"mask": mask, "extra": {"types": types, "table": torch.tensor([0.5, 0.7], dtype=D), "factor": 1.5}}


X, Y = torch.randn(B, T, 2, dtype=D, generator=torch.Generator().manual_seed(1)), torch.arange(B) % K
CONTEXT = context()


class Closed(nn.Module):
    """The same network around a context of the first samples, for a batch of that many."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        rows = {"mask": CONTEXT["mask"][: len(x)], "extra": dict(CONTEXT["extra"])}
        rows["extra"]["types"] = rows["extra"]["types"][: len(x)]
        return self.inner(x, **rows)


def rows_of(network):
    """J by definition, sample by sample, (B, K, T, 2)."""
    with torch.enable_grad():
        one = [
            torch.autograd.functional.jacobian(
                lambda z, n=n: network(z, **Arguments.of("", X, CONTEXT)[1].part(slice(n, n + 1)).split(z)[1])[0],
                X[n : n + 1],
            )[:, 0]
            for n in range(B)
        ]
    return torch.stack(one)


def test_products_take_a_context():
    network, v, u = Masked(1), torch.randn(B, T, 2, dtype=D), torch.randn(B, K, dtype=D)
    j = rows_of(network)
    torch.testing.assert_close(jacmatch.jacobian(network, X, context=CONTEXT)[1], j)
    torch.testing.assert_close(jacmatch.jacobian(network.eval(), X, context=CONTEXT, chunk_size=2)[1], j)
    torch.testing.assert_close(jacmatch.vjp(network, X, u, context=CONTEXT)[1], torch.einsum("bk,bkti->bti", u, j))
    for engine in ("forward", "reverse", "differences", "auto"):
        jv = jacmatch.jvp(network, X, v, engine=engine, context=CONTEXT)[1]
        torch.testing.assert_close(jv, torch.einsum("bkti,bti->bk", j, v), rtol=1e-6, atol=1e-8)


@pytest.mark.ci
def test_the_doctor_takes_a_context():
    assert jacmatch.doctor(Masked(1), X, context=CONTEXT).engine == "reverse"


SETTINGS = {
    "rows": {"probe": EveryRow()},
    "outputs in chunks": {"probe": RandomOutputs(3), "chunk_size": 1},
    "inputs": {"probe": RandomInputs(2)},
    "pairs": {"probe": DataPairs()},
    "fraction": {"probe": RandomOutputs(1), "fraction": 0.5},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_distillation_equals_one_of_networks_that_hold_the_context(name):
    networks = [Masked(1), Masked(2, 7)]
    settings = {"jacobians": 1.0, "jacobian_loss": "squared", **SETTINGS[name]}
    ids = torch.arange(B)
    wanted = Distillation(*map(Closed, networks), **settings) if name != "fraction" else None
    terms = Distillation(*networks, **settings)(X, Y, ids=ids, context=CONTEXT)
    if wanted is not None:
        torch.testing.assert_close(terms.loss, wanted(X, Y, ids=ids).loss)
    else:  # the first three by rows of the definition
        v = RandomOutputs(1).directions(outputs=terms.teacher_outputs[:3], ids=ids[:3], seed=0, draw=0)[0]
        difference = (rows_of(networks[0]) - rows_of(networks[1]))[:3]
        product = torch.einsum("bk,bkti->bti", v, difference)
        torch.testing.assert_close(terms["jacobians"], product.square().flatten(1).sum(1).mean())
        outputs = networks[0](X, **CONTEXT)
        torch.testing.assert_close(terms.student_outputs, outputs)


def test_all_objectives_pass_it_on():
    network = Masked(1)
    j = rows_of(network)
    penalty = Robustness(network, penalty=1.0, form="squared-norm", probe=EveryRow())(X, Y, context=CONTEXT)
    torch.testing.assert_close(penalty["penalty"], j.square().flatten(1).sum(1).mean())
    target = torch.randn(B, K, dtype=D)
    fitted = Regression(network, jacobians=1.0)(X, target, j=j, context=CONTEXT)
    assert float(fitted["jacobians"].detach()) < 1e-20
    taught = Regression(network, Masked(2), jacobians=1.0)(X, context=CONTEXT)
    wanted = (j - rows_of(Masked(2))).square().flatten(1).sum(1).mean()
    torch.testing.assert_close(taught["jacobians"], wanted)


class Picture(nn.Module):
    """Convolutions and a time."""

    def __init__(self, outputs, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.last = nn.Conv2d(1, 3, 3).to(D), nn.Linear(12, outputs).to(D)

    def forward(self, x, time):
        return self.last(self.conv(x * time.view(-1, 1, 1, 1)).tanh().flatten(1))


class At(nn.Module):
    def __init__(self, inner, time):
        super().__init__()
        self.inner, self.time = inner, time

    def forward(self, x):
        return self.inner(x, self.time[: len(x)])


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_transfer_takes_a_context(fraction):
    x, y, time = torch.randn(4, 1, 4, 4, dtype=D), torch.tensor([0, 1, 1, 0]), torch.full((4,), 1.5, dtype=D)
    student, teacher = Picture(2 + 5, 1), Picture(5, 2)
    settings = {"classes": 2, "attention": 1.0, "jacobians": 1.0, "fraction": fraction}
    terms = Transfer(student, teacher, pairs=[("conv", "conv")], **settings)(x, y, context={"time": time})
    pairs = [("inner.conv", "inner.conv")]
    wanted = Transfer(At(student, time), At(teacher, time), pairs=pairs, **settings)(x, y)
    for name in wanted:
        torch.testing.assert_close(terms[name], wanted[name])


def test_teachers_take_it():
    network = Masked(1)
    j, y = rows_of(network), network(X, **CONTEXT).detach()
    arguments = Arguments.of("", X, CONTEXT)[1]
    v, u = torch.randn(1, B, T, 2, dtype=D), torch.randn(1, B, K, dtype=D)
    jv, uj = torch.einsum("bkti,pbti->pbk", j, v), torch.einsum("pbk,bkti->pbti", u, j)

    def plain(x, **named):
        return network(torch.as_tensor(x), named["mask"], named["extra"]).detach()

    teachers = {
        "module": ModuleTeacher(network),
        "ensemble": EnsembleTeacher([ModuleTeacher(network), ModuleTeacher(network)]),
        "analytic": AnalyticTeacher(plain, lambda x, **_: j),
        "black box": BlackBoxTeacher(plain, batch_size=4),
    }
    for teacher in teachers.values():
        answer = teacher.answer(X, Question(tangents=v, arguments=arguments))
        torch.testing.assert_close(answer.outputs, y)
        torch.testing.assert_close(answer.products, jv, rtol=1e-6, atol=1e-8)
        if teacher.answers_vjp:
            torch.testing.assert_close(teacher.answer(X, Question(cotangents=u, arguments=arguments)).products, uj)
    single = ModuleTeacher(network, dtype=torch.float32)
    torch.testing.assert_close(single.answer(X, Question(arguments=arguments)).outputs, y, rtol=1e-4, atol=1e-5)


def test_arrays_reach_a_numpy_teacher():
    seen = {}

    def function(x, *, scale):
        seen["type"] = type(scale)
        return x.sum(1, keepdims=True) * scale[:, None]

    arguments = Arguments.of("", X[:, 0], {"scale": torch.full((B,), 2.0, dtype=D)})[1]
    answer = BlackBoxTeacher(function, arrays="numpy", batch_size=4).answer(X[:, 0], Question(arguments=arguments))
    torch.testing.assert_close(answer.outputs[:, 0], 2 * X[:, 0].sum(1))
    assert seen["type"] is np.ndarray


def test_memory_knows_the_context():
    teacher = MemoizedTeacher(ModuleTeacher(Masked(1)))
    for seed, queried in ((0, B), (0, B), (1, 2 * B), (0, 2 * B)):
        arguments = Arguments.of("", X, context(seed))[1]
        answer = teacher.answer(X, Question(ids=torch.arange(B), arguments=arguments))
        torch.testing.assert_close(answer.outputs, Masked(1)(X, **context(seed)).detach())
        assert teacher.queried == queried
    other = {**CONTEXT, "extra": {**CONTEXT["extra"], "table": torch.ones(2, dtype=D)}}
    teacher.answer(X, Question(ids=torch.arange(B), arguments=Arguments.of("", X, other)[1]))
    assert teacher.queried == 3 * B, "a shared table counts as well"


class Field(nn.Module):
    """A function of a place (2,) and a time."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).to(D)

    def forward(self, x, t):
        return self.net(torch.cat([x, t[:, None]], 1))


@pytest.mark.parametrize("form", ["dictionary", "tuple"])
def test_several_inputs_in_units(form):
    """The term is Σ ((∂f/∂x − ∂g/∂x)·unit)², from Jacobians of each input by itself."""
    x, t = torch.randn(B, 2, dtype=D), torch.rand(B, dtype=D)
    student, teacher = Field(1), Field(2)
    units = {"t": 10.0} if form == "dictionary" else {1: 10.0}
    inputs = Inputs({"x": x, "t": t} if form == "dictionary" else (x, t), units=units)
    terms = Distillation(student, teacher, task="regression", labels=0, outputs=0, jacobians=1.0, probe=EveryRow(),
                         jacobian_loss="squared")(inputs)  # fmt: skip
    parts = []
    for network in (student, teacher):
        of_x = torch.autograd.functional.jacobian(lambda z, n=network: n(z, t).sum(0), x).movedim(0, 1)
        of_t = torch.autograd.functional.jacobian(lambda z, n=network: n(x, z).sum(0), t).movedim(0, 1)
        parts.append(torch.cat([of_x, 10 * of_t[..., None]], 2))
    torch.testing.assert_close(terms.loss, (parts[0] - parts[1]).square().flatten(1).sum(1).mean())
    plain = Distillation(student, teacher, jacobians=1.0)({"x": x, "t": t}, torch.arange(B) % 2)
    torch.testing.assert_close(plain.student_outputs, student(x, t))


class Potential(nn.Module):
    """Energies of molecules by pairs of atoms of one molecule, with types."""

    def __init__(self, seed=0, edges=False):
        super().__init__()
        torch.manual_seed(seed)
        self.types, self.edges = nn.Embedding(3, 4).to(D), edges
        self.net = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 1)).to(D)

    def forward(self, positions, types, batch, edges=None):
        if edges is None:
            edges = ((batch[:, None] == batch) & ~torch.eye(len(batch), dtype=torch.bool)).nonzero().T
        i, j = edges
        distance = (positions[i] - positions[j]).square().sum(1, keepdim=True)
        pairs = self.net(torch.cat([self.types(types[i]), self.types(types[j]), distance], 1))[:, 0]
        return torch.zeros(int(batch.max()) + 1, dtype=D).index_add(0, batch[i], pairs)[:, None]


SIZES = [3, 2, 4, 3, 2]
INDEX = torch.repeat_interleave(torch.arange(5), torch.tensor(SIZES))
POSITIONS, TYPES = torch.randn(14, 3, dtype=D), torch.arange(14) % 3


@pytest.mark.parametrize("probe", [EveryRow(), RandomInputs(1), RandomOutputs(2)])
@pytest.mark.parametrize("edges", [False, True])
def test_graphs_of_unlike_sizes(probe, edges):
    """The derivatives of the energies by the positions, as autograd has them for the whole batch of nodes."""
    student, teacher = Potential(1), Potential(2)
    others = {"types": TYPES}
    if edges:
        others["edges"] = ((INDEX[:, None] == INDEX) & ~torch.eye(14, dtype=torch.bool)).nonzero().T
    forces = []
    for network in (student, teacher):
        p = POSITIONS.clone().requires_grad_()
        forces.append(torch.autograd.grad(network(p, batch=INDEX, **others).sum(), p)[0])
    difference = forces[0] - forces[1]
    x, layout = Nodes(POSITIONS, INDEX).packed
    settings = {"labels": 0, "outputs": 0, "jacobians": 1.0, "jacobian_loss": "squared", "probe": probe}
    given = {**others, "edges": Edges(others["edges"])} if edges else others
    for fraction in (1.0, 0.6):
        count = round(fraction * 5)
        objective = Distillation(student, teacher, task="regression", fraction=fraction, **settings)
        loss = objective(Nodes(POSITIONS, INDEX), ids=torch.arange(5), context=given).loss
        if probe == EveryRow():
            expected = difference[count > INDEX].square().sum() / count
        elif probe.side == "output":
            v = probe.directions(outputs=torch.zeros(5, 1, dtype=D), ids=torch.arange(5), seed=0, draw=0)[:, :, 0]
            expected = (v[:, INDEX, None] * difference)[:, count > INDEX].square().sum() / count
        else:
            v = layout.taken(probe.directions(x=x, ids=torch.arange(5), seed=0, draw=0)[0])
            jv = torch.zeros(5, dtype=D).index_add(0, INDEX, (v * difference).sum(1))
            expected = jv[:count].square().mean()
        torch.testing.assert_close(loss, expected)


def test_a_table_with_as_many_rows_as_the_batch_is_shared_where_it_says_so():
    class Tabled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, K).to(D)

        def forward(self, x, table):
            assert len(table) == B
            return self.layer(x) * table.sum()

    table, x = torch.ones(B, dtype=D), X[:, 0]
    objective = Distillation(Tabled(), Tabled(), jacobians=1.0, fraction=0.5)
    assert objective(x, Y, context={"table": Shared(table)}).loss.isfinite()
    assert objective(x[:4], Y[:4], context={"table": table}).loss.isfinite(), "six rows are no four samples"
    with pytest.raises(InputError, match=r"`table` in `context` of `Distil.* is ambiguous.* Pass jacmatch\.Shared"):
        objective(x, Y, context={"table": table})


class Anything(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, K).to(D)

    def forward(self, x, **_):
        return self.layer(x)


def objective(**settings):
    return Distillation(Anything(), Anything(), jacobians=1.0, **settings)


x2 = X[:, 0]
PAIRS = {"point": AtMixedPairs()}
REFUSED = {
    "no dictionary": (lambda: objective()(x2, Y, context=[1]), r"`context` of `Distillation` must be a dict.*Got list"),
    "arrays": (lambda: objective()(x2, Y, context={"m": np.ones(3)}), r"Arrays in `context` .* must be tensors"),
    "mixed": (lambda: objective(**PAIRS)(x2, Y, context={"m": x2}), r"at mixed pairs\. Got m\. Use point=AtData"),
    "edges": (
        lambda: objective()(x2, Y, context={"e": Edges(torch.zeros(2, 1).long())}),
        r"`Edges` .* must be used with x",
    ),
    "crossing": (
        lambda: Arguments.of("f", Nodes(POSITIONS, INDEX), {"e": Edges(torch.tensor([[0], [13]]))}),
        r"Both ends of each of `Edges` in `context` of `f` must be in the same graph",
    ),
    "unsorted": (lambda: Nodes(POSITIONS, INDEX.flip(0)), r"`index` of `Nodes` must be .* Sort the nodes by graph"),
    "pairs of graphs": (
        lambda: objective(probe=DataPairs())(Nodes(POSITIONS, INDEX), torch.arange(5) % K),
        r"`probe` of `Distillation` must not be DataPairs if x is Nodes",
    ),
    "no tensor": (lambda: Inputs({"x": x2, "t": 1.0}), r"Part 't' of the inputs must be .* Got float"),
    "two types": (lambda: Inputs((x2, x2.float())), r"All parts of the inputs must have the same dtype"),
    "unit": (lambda: Inputs((x2,), units={1: 2.0}), r"`units` of `Inputs` must be .* Got 1: 2\.0\. Parts are 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(as_users_run, name):
    call, match = REFUSED[name]
    with pytest.raises(InputError, match=match):
        call()


def test_parts_of_a_context_are_those_of_the_samples():
    """Rows, copies and another type, against indexing by hand; `couples` and the like rely on it."""
    arguments = Arguments.of("", X, CONTEXT)[1]
    rows = torch.tensor([4, 1])
    _, named = arguments.part(rows).split(X[rows])
    torch.testing.assert_close(named["mask"], CONTEXT["mask"][rows])
    torch.testing.assert_close(named["extra"]["types"], CONTEXT["extra"]["types"][rows])
    assert named["extra"]["table"] is CONTEXT["extra"]["table"]
    assert named["extra"]["factor"] == 1.5
    _, named = arguments.repeated(2).split(torch.cat([X, X]))
    torch.testing.assert_close(named["mask"], CONTEXT["mask"].repeat(2, 1))
    _, named = arguments.to(torch.float32).split(X)
    assert named["mask"].dtype == named["extra"]["table"].dtype == torch.float32
    assert named["extra"]["types"].dtype == torch.int64
    assert not arguments.same(Arguments.of("", X, context(1))[1])
    assert not couples(lambda z: Masked(1)(z, **CONTEXT).detach(), X, Masked(1)(X, **CONTEXT).detach(), 1e-9)


def test_a_cache_refuses_it(tmp_path):
    from jacmatch.teachers import CachedTeacher

    teacher = object.__new__(CachedTeacher)
    with pytest.raises(UnsupportedError, match=r"`CachedTeacher` stores no `context` .* MemoizedTeacher"):
        teacher._fits(
            Question(ids=torch.arange(B), draw=0, arguments=Arguments.of("", X, CONTEXT)[1]), with_products=False
        )
