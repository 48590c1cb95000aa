"""Compiled steps: one graph whatever the batch, the eager gradients, and no silence where something is not compiled."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from jacmatch.datasets import Split
from jacmatch.errors import InputError
from jacmatch.jacobian import Logits, RandomInputs, RandomOutputs, TopClass
from jacmatch.objectives import CompiledSteps, Distillation, Robustness
from jacmatch.objectives.compiled import Kinds, Step
from jacmatch.training import Training, fit

SCRIPT = Path(__file__).with_name("compiled_steps.py")
SLOW = pytest.mark.slow
KINDS = Kinds(lambda outputs, values, rows, step: {}, Logits(), "frozen")


def ran(*arguments):
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("kind", "policy", "backend"),
    [
        pytest.param("norm", "frozen", "aot_eager", marks=pytest.mark.ci),
        pytest.param("norm", "batch", "aot_eager", marks=SLOW),
        pytest.param("plain", "frozen", "aot_eager", marks=SLOW),
        pytest.param("norm", "frozen", "inductor", marks=SLOW),
        pytest.param("norm", "batch", "inductor", marks=SLOW),
    ],
)
def test_one_graph_with_the_eager_gradients_for_any_batch(kind, policy, backend):
    report = ran(kind, policy, backend)
    assert (report["fallback"], report["warnings"], report["graphs"]) == (None, [], 1)
    assert report["steps"] == 4  # three steps, and one that was compared
    assert report["worst"] < 1e-5
    assert report["difference"] < 1e-5
    assert report["apart"] < 1e-6
    assert report["batches"] == ([4] if kind == "norm" else [])


@pytest.mark.ci
def test_a_vision_transformer_is_compiled():
    """With a graph for each batch size: PyTorch fixes the size in a linear layer of three-dimensional inputs."""
    report = ran("vit", "frozen", "aot_eager")
    assert (report["fallback"], report["warnings"]) == (None, [])
    assert report["steps"] >= 4
    assert report["worst"] < 1e-5


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["regression", "robustness"])
def test_other_objectives_are_one_graph_too(kind):
    report = ran(kind, "frozen", "aot_eager")
    assert (report["fallback"], report["graphs"], report["steps"]) == (None, 1, 4)
    assert report["worst"] < 1e-6


@SLOW
def test_a_rule_of_ones_own_is_not_compiled():
    """It would be wrong without a word: its second derivative is lost."""
    report = ran("own", "frozen", "aot_eager")
    assert "autograd.Function in the network loses its second derivative" in report["fallback"]
    assert [report["fallback"] in message for message in report["warnings"]] == [True]
    assert (report["steps"], report["worst"]) == (0, 0.0)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"probe": RandomInputs(1)}, r"not compiled but run eagerly: Jv, for directions on the input side"),
        ({"fraction": 0.5}, r"`fraction` below 1 is not compiled"),
        ({"probe": RandomOutputs(2), "chunk_size": 1}, r"rows in chunks are not compiled"),
    ],
)
def test_what_is_not_compiled_says_so_once_and_runs_eagerly(settings, reason):
    x, y = torch.rand(6, 3), torch.randint(2, (6,))
    torch.manual_seed(0)
    networks = [nn.Linear(3, 2), nn.Linear(3, 2)]
    objectives = [Distillation(networks[0], networks[1], jacobians=1.0, **settings) for _ in range(2)]
    objectives[1].compiled = CompiledSteps(backend="aot_eager")
    with pytest.warns(UserWarning, match=reason) as caught:
        losses = [[objective(x, y)["loss"] for _ in range(3)] for objective in objectives]
    assert len([one for one in caught if "not compiled but" in str(one.message)]) == 1
    assert losses[0] == losses[1]
    assert objectives[1].compiled.report()["graphs"] == 0


def test_a_wrong_compiled_gradient_is_detected():
    steps = CompiledSteps(backend="aot_eager")
    student = nn.Linear(3, 2)
    terms = {"labels": student(torch.ones(1, 3)).square().sum()}
    steps.graph = lambda *_: (torch.ones(1), {"labels": student(torch.ones(1, 3)).sum()})
    steps.graph.graphs, steps.graph.cuda_graphs = 0, False
    step = Step(torch.ones(1, 3))
    with pytest.warns(UserWarning, match=r"gradient of a compiled step differs by .* from that of an eager one"):
        assert steps(student, KINDS, step, lambda: (torch.ones(1), terms)) is None


def test_a_failing_compiler_is_reported():
    steps = CompiledSteps(backend="aot_eager")

    def fail(*_):
        raise RuntimeError("no C++ compiler")

    steps.graph = fail
    steps.graph.graphs = steps.checked = 1
    step = Step(torch.ones(1, 3))
    with pytest.warns(UserWarning, match=r"run eagerly: RuntimeError: no C\+\+ compiler"):
        assert steps(nn.Linear(3, 2), KINDS, step, lambda: None) is None
    assert steps.fallback == "RuntimeError: no C++ compiler"


def test_the_training_reports_what_was_compiled():
    split = Split(torch.rand(8, 3), torch.arange(8) % 2)
    settings = Training(steps=2, batch_size=4, compile=True)
    with pytest.warns(UserWarning, match=r"TopClass is not compiled: its row depends on the outputs"):
        fitted = fit(Robustness(nn.Linear(3, 2), probe=TopClass()), split, settings, seed=0)
    assert fitted.compiled["fallback"] == "TopClass is not compiled: its row depends on the outputs of the same pass."
    assert fit(Distillation(nn.Linear(3, 2)), split, Training(steps=1, batch_size=4), seed=0).compiled is None


def test_cuda_graphs_need_a_compiled_step_and_a_gpu():
    with pytest.raises(InputError, match=r"`cuda_graphs` of `Training` must be used with `compile`"):
        Training(cuda_graphs=True)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"`cuda_graphs` of `CompiledSteps` needs a GPU\. Got no CUDA"):
            CompiledSteps(cuda_graphs=True)


@pytest.mark.parametrize("how", ["torch.compile", "method"])
def test_a_compiled_objective_computes_what_it_does_without(how, as_users_run):
    """torch.compile cannot follow a derivative of a derivative, so the objective runs as it was written."""
    gradients = []
    for compiled in (False, True):
        torch.manual_seed(0)
        student = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        objective = Distillation(student, nn.Linear(4, 3), jacobians=1.0)
        call = objective
        if compiled and how == "method":
            with pytest.warns(UserWarning, match=r"runs uncompiled.*Training\(compile=True\)"):
                objective.compile(backend="aot_eager")
        elif compiled:
            call = torch.compile(objective, backend="aot_eager")
        call(torch.rand(6, 4), torch.arange(6) % 3)["loss"].backward()
        gradients.append(student[0].weight.grad)
    torch.testing.assert_close(*gradients)
