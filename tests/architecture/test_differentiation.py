"""One file differentiates, one file trains: everything else only composes functions."""

import ast

import pytest

from . import source

DIFFERENTIATES = "src/jacmatch/jacobian/engines.py"
TRAINS = "src/jacmatch/training/loop.py"
BUILDS_OPTIMIZER = "src/jacmatch/training/state.py"
A_USER_S_LOOP = "research/src/jacmatch_research/reproduce/defaults.py"  # the loop of the README, in full
BENCHMARKED_AGAINST = "research/src/jacmatch_research/bench/rivals.py"  # what one would write without the package
DEFINES_RULES = "src/jacmatch/jacobian/rules/"

FILES = source.files("src", "research/src")
OF_FUNC = ("vjp", "jvp", "grad", "grad_and_value", "jacrev", "jacfwd", "hessian", "linearize", "vmap")


def differentiations(module: ast.Module) -> list[str]:
    """Names of torch.autograd and torch.func that take a derivative, and calls of `backward`."""
    calls = []
    for node in ast.walk(module):
        name = source.dotted(node) if isinstance(node, ast.Attribute) else ""
        if name.startswith("torch.autograd") and name.count(".") == 2:
            calls.append(name)
        if name.startswith("torch.func.") and name.split(".")[2] in OF_FUNC:
            calls.append(name)
        if name.endswith((".backward", "forward_ad.dual_level", "forward_ad.make_dual")):
            calls.append(name)
        if isinstance(node, ast.ImportFrom) and node.module in {
            "torch.func",
            "torch.autograd",
            "torch.autograd.functional",
        }:
            calls += [f"{node.module}.{alias.name}" for alias in node.names if alias.name != "functional_call"]
        if isinstance(node, ast.Import):
            calls += [alias.name for alias in node.names if alias.name.startswith(("torch.autograd", "torch.func"))]
    return calls


def steps(module: ast.Module) -> list[str]:
    """Calls of a method `step` with an optimizer or a scaler before it, and optimizers that are built."""
    calls = [source.dotted(node.func) for node in ast.walk(module) if isinstance(node, ast.Call)]
    return [name for name in calls if name.endswith("optimizer.step") or name.startswith(("torch.optim.", "optim."))]


def test_only_the_engines_differentiate():
    calls_of = {
        source.name(path): set(differentiations(source.tree(path))) for path in source.files("src", "research/src")
    }
    assert {"torch.autograd.grad", "torch.func.jvp"} <= calls_of.pop(DIFFERENTIATES)
    assert calls_of.pop(TRAINS) == {"state.fabric.backward"}
    assert calls_of.pop(BENCHMARKED_AGAINST)
    assert calls_of.pop(A_USER_S_LOOP) == {"loss().backward"}
    in_rules = {name: calls for name, calls in calls_of.items() if name.startswith(DEFINES_RULES) and calls}
    # a rule takes a dual number apart and joins one; it takes no derivative
    assert set().union(*in_rules.values()) == {
        "torch.autograd.Function",
        "torch.autograd.forward_ad",
        "forward_ad.make_dual",
    }
    assert not {name: calls for name, calls in calls_of.items() if calls and name not in in_rules}


def test_only_the_training_loop_steps_an_optimizer():
    assert [source.name(path) for path in FILES if steps(source.tree(path))] == [
        BENCHMARKED_AGAINST,
        A_USER_S_LOOP,
        TRAINS,
        BUILDS_OPTIMIZER,
    ]


@pytest.mark.parametrize(
    "line",
    [
        "torch.autograd.grad(y, x)",
        "(row,) = torch.autograd.grad(y, x)",
        "torch.autograd.functional.jacobian(f, x)",
        "torch.func.jacrev(f)(x)",
        "loss.backward()",
        "terms['loss'].backward()",
        "from torch.func import vjp",
        "from torch.autograd import grad",
        "import torch.autograd.functional as F",
        "torch.autograd.forward_ad.make_dual(x, v)",
    ],
)
def test_the_search_finds_a_derivative(line):
    assert differentiations(ast.parse(line))


def test_the_search_finds_a_step():
    assert steps(ast.parse("optimizer.step()"))
    assert steps(ast.parse("self.optimizer.step(closure)"))
    assert not steps(ast.parse("scheduler.step"))
    assert not differentiations(ast.parse("from torch.func import functional_call"))
