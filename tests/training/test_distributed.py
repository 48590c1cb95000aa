"""Two processes train what one trains on the whole batch, to rounding."""

import copy
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from jacmatch.datasets import Split
from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import RandomInputs, RandomOutputs
from jacmatch.objectives import AtMixedPairs, Distillation, GradientShare, Regression, Robustness
from jacmatch.runs import Run
from jacmatch.training import Training, fit
from jacmatch.training.distributed import ProcessGroup, without_synchronized_statistics

from . import cases
from .processes import both

pytestmark = pytest.mark.usefixtures("as_users_run")
ROOT = Path(__file__).parents[2]
SPLIT, HELD_OUT = cases.images(17), cases.images(9, seed=1)


def network(seed):
    """No BatchNorm and no dropout, which see who else is there."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(144, 3))


class Exact(nn.Module):
    """In float64: a difference of values divided by a small step makes the rounding of float32 visible."""

    def __init__(self, seed):
        super().__init__()
        self.inner = network(seed).double()

    def forward(self, x):
        return self.inner(x.double())


def objective(**given):
    kind = Exact if given.get("engine") == "differences" else network
    return Distillation(kind(1), kind(2).eval(), seed=3, **{"jacobians": GradientShare(0.3), **given})


FIVE = Training(steps=5, batch_size=6, optimizer="sgd", lr=0.02)
UNEVEN = Training(
    steps=5, batch_size=7, optimizer="sgd", lr=0.02, accumulate=2, augment=("crop", "flip"), clip=1.0, ema=0.5
)
INPUTS = {"reverse": RandomInputs(2), "forward": RandomInputs(2), "differences": RandomInputs(2)}
JOBS = {
    **{
        f"{engine}, {name}": (objective(probe=probe, engine=engine, jacobians=1.0), settings)
        for engine, probe in {"auto": RandomOutputs(2), **INPUTS}.items()
        for name, settings in {"even": FIVE, "uneven and accumulated": UNEVEN}.items()
    },
    "shares of the gradient": (objective(measure_every=2, point=AtMixedPairs(), jacobians=GradientShare(0.4)), UNEVEN),
    "some of a batch": (objective(fraction=0.3, measure_every=2, jacobians=GradientShare(0.4)), UNEVEN),
    "one sample of a batch": (objective(fraction=0.1, measure_every=2), FIVE),
    "derivatives in each second step": (objective(labels=0.0, outputs=0.0, jacobians=1.0, every=2), FIVE),
    "without a gradient for biases": (objective(labels=0.0, outputs=0.0, jacobians=1.0), FIVE),
    "penalty": (Robustness(network(1), penalty=GradientShare(0.3), noise=0.1, measure_every=2), UNEVEN),
    "labels": (Distillation(network(1)), UNEVEN),
}


SHARDED = {
    name: (given, replace(settings, shard=True, ema=None))
    for name, (given, settings) in JOBS.items()
    if name.startswith(("forward", "differences", "labels"))
}
ONE_SHARDED = {name: SHARDED[name] for name in ("forward, even",)}
COMPILED = {
    f"compiled, {name}": (objective(labels=0.5), replace(settings, compile=True))
    for name, settings in {"even": FIVE, "uneven and accumulated": UNEVEN}.items()
}


def trained(jobs):
    """Of each job the state and the last row of metrics."""
    results = {}
    for name, (given, settings) in jobs.items():
        each, rows = copy.deepcopy(given), []
        fit(each, SPLIT, settings, seed=2, validation=HELD_OUT, on_step=lambda _, row, rows=rows: rows.append(row))
        results[name] = each.state_dict(), {key: value for key, value in rows[-1].items() if key != "seconds"}
    return results


def apart(one, other):
    """Largest difference of two states."""
    tensors = [name for name in one if name != "_extra_state"]
    return max(float((one[name] - other[name]).abs().max()) for name in tensors)


def refusal(given, settings):
    """What `fit` says."""
    try:
        fit(copy.deepcopy(given), SPLIT, settings, seed=2)
    except (InputError, UnsupportedError) as error:
        return str(error)


def in_two(folder):
    """What is tried in two processes at each run of the tests."""
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(cases.network())
    refused = {
        "reverse": (JOBS["auto, even"][0], replace(FIVE, shard=True)),
        "share": (objective(probe=RandomInputs(1)), replace(FIVE, shard=True)),
        "average": (JOBS["labels"][0], replace(FIVE, shard=True, ema=0.9)),
        "synchronized": (Distillation(synchronized, cases.network(2).eval(), jacobians=GradientShare(0.3)), FIVE),
        "few": (JOBS["labels"][0], Training(batch_size=1)),
    }
    refusals = {name: refusal(*job) for name, job in refused.items()}
    try:
        ProcessGroup.current().same("data", str(ProcessGroup.current().rank))
    except InputError as error:
        refusals["data"] = str(error)
    normalized = Distillation(cases.network(), cases.network(2).eval(), jacobians=GradientShare(0.3))
    fit(normalized, SPLIT, FIVE, seed=0)
    return trained({**JOBS, **ONE_SHARDED}), resumed(folder, {"dropout": FIVE}), refusals, normalized.state_dict()


def more_in_two(folder):
    """What takes longer."""
    return trained({**SHARDED, **COMPILED}), resumed(folder, {"sharded": replace(FIVE, shard=True, optimizer="adam")})


def resumed(folder, jobs):
    """How far a run that stopped after three steps and went on ends from one that did not; dropout and all."""
    far = {}
    for name, settings in jobs.items():
        states = []
        for stops in ((None,), (3, None)):
            run = Stopped(folder / name) if len(stops) > 1 else None
            for stop in stops:
                each = Distillation(cases.network(), seed=3)
                fit(each, SPLIT, replace(settings, max_steps=stop), seed=2, run=run and run.begun())
            states.append(each.state_dict())
        far[name] = apart(*states)
    return far


@dataclass
class Stopped:
    """The run in a folder that two processes train."""

    folder: Path

    def begun(self):
        run = cases.begin(self.folder) if ProcessGroup.current().first else None
        ProcessGroup.current().barrier()
        return run or replace(Run.open(self.folder, finished=False), follows=True)


def agree(jobs, *results):
    """Compares with one process on the whole batch."""
    alone = trained({name: (given, replace(settings, shard=False)) for name, (given, settings) in jobs.items()})
    for got in results:
        for name, (state, row) in alone.items():
            there, row_there = got[name]
            assert apart(state, there) <= 1e-6, f"{name} differs by {apart(state, there):.1e}"
            shown = {key for key in row if not key.startswith("share_")} if jobs[name][1].shard else row.keys()
            wanted = {key: row[key] for key in shown}  # the KL divergence is a difference of numbers near 1, times τ²
            assert {key: row_there[key] for key in shown} == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def regression():
    """Derivatives on the input side of a regression, by the engine that is named."""
    how = {"probe": RandomInputs(1), "engine": "forward", "jacobians": 1.0}
    return Regression(network(1), network(2).eval(), seed=3, **how)


NUMBERS = Split(SPLIT.x, torch.randn(len(SPLIT.x), 3, generator=torch.Generator().manual_seed(5)))


def wrapped_by_a_user():
    """DistributedDataParallel as PyTorch gives it, around a term that gives the biases no gradient."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 3), nn.Softplus(), nn.Linear(3, 2))
    model = nn.parallel.DistributedDataParallel(
        Distillation(student, nn.Linear(4, 2), labels=0, outputs=0, jacobians=1.0)
    )
    x = torch.rand(4, 4, generator=torch.Generator().manual_seed(ProcessGroup.current().rank))
    for _ in range(3):
        student.zero_grad()
        model(x)["loss"].backward()
    return [None if p.grad is None else p.grad.clone() for p in student.parameters()]


def two_more(folder):
    trained = regression()
    fit(trained, NUMBERS, replace(FIVE, shard=True), seed=2)
    rows = sharded_by_a_user(Regression(network(1), network(2).eval(), probe=RandomOutputs(1), jacobians=1.0))
    return trained.state_dict(), wrapped_by_a_user(), sharded_by_a_user(regression()), rows


def sharded_by_a_user(objective):
    """The gradients of a whole batch in each process, under FSDP2 as PyTorch gives it; or the refusal."""
    from torch.distributed.fsdp import fully_shard  # slow to import

    fully_shard(objective.student)
    try:
        objective(NUMBERS.inputs(), NUMBERS.y, ids=torch.arange(len(NUMBERS)))["loss"].backward()
    except UnsupportedError as error:
        return str(error)
    return [parameter.grad.full_tensor() for parameter in objective.parameters()]


@pytest.mark.ci
def test_a_regression_is_sharded_and_a_bias_without_gradient_does_not_stop_ddp(tmp_path):
    first, second = both(two_more, tmp_path)
    alone = regression()
    fit(alone, NUMBERS, FIVE, seed=2)
    assert apart(first[0], alone.state_dict()) <= 1e-6
    for one, other in zip(first[1], second[1], strict=True):
        assert torch.equal(one, other)
    weight, bias = first[1][0], first[1][3]
    assert weight.abs().max() > 0
    assert not bias.any()
    alone = regression()
    alone(NUMBERS.inputs(), NUMBERS.y)["loss"].backward()
    for parameter, gradient in zip(alone.parameters(), first[2], strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-6)
    assert "cannot be combined with derivatives by the reverse engine" in first[3]


@pytest.mark.parametrize("engine", ["auto", "forward", "reverse", "differences"])
def test_synchronized_statistics_go_with_differences_alone(engine):
    student = nn.SyncBatchNorm.convert_sync_batchnorm(cases.network())
    made = Regression(student, cases.network(2), probe=RandomInputs(1), engine=engine)
    if engine == "differences":
        without_synchronized_statistics(made)
    else:
        with pytest.raises(UnsupportedError, match=r"must not have SyncBatchNorm .* or --engine differences"):
            without_synchronized_statistics(made)


@pytest.mark.ci
def test_two_processes_train_what_one_does(tmp_path):
    first, second = both(in_two, tmp_path)
    agree({**JOBS, **ONE_SHARDED}, first[0], second[0])
    assert first[1] == second[1] == {"dropout": 0.0}
    for name, pattern in {
        "reverse": "cannot be combined with derivatives by the reverse engine: FSDP2 frees the weights",
        "share": "cannot be combined with a weight that is a `GradientShare`",
        "average": "cannot be combined with `ema`=0.9",
        "synchronized": "must not have SyncBatchNorm .'student.1'. where its derivatives are compared",
        "few": "A batch must have a sample for each of the 2 processes",
        "data": "All 2 processes of a job must have the same data",
    }.items():
        assert re.search(pattern, first[2][name] or "nothing"), first[2][name]
    assert apart(first[3], second[3]) == 0.0  # BatchNorm: each normalizes its part, and all end with one network
    with pytest.raises(InputError, match=re.escape("processes (2 there, 1 here)")):
        fit(Distillation(cases.network(), seed=3), SPLIT, FIVE, seed=2, run=cases.begin(tmp_path / "dropout"))
    with pytest.raises(InputError, match="`shard` of `Training` needs several processes"):
        fit(JOBS["labels"][0], SPLIT, replace(FIVE, shard=True), seed=2)


def compared(folder):
    """Shards and compiled steps in two processes against one."""
    first, second = both(more_in_two, folder, timeout=500)
    agree({**SHARDED, **COMPILED}, first[0], second[0])
    assert first[1] == second[1] == {"sharded": 0.0}


@pytest.mark.ci
def test_shards_and_compiled_steps_train_what_one_process_does(tmp_path):
    """In a process of its own: the type checks of the suite cannot be compiled."""
    program = f"from pathlib import Path; from {__name__} import compared; compared(Path({str(tmp_path)!r}))"
    command = [sys.executable, "-W", "error::UserWarning", "-c", program]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
