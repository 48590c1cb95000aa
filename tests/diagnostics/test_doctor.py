"""The doctor names planted faults and their remedy, and leaves every module unchanged."""

import copy

import pytest
import torch
from tests.jacobian.faults import FAULTS, linear, plain
from tests.jacobian.sound import IMAGES, SEQUENCE, SOUND, Attends, First
from torch import nn

from jacmatch.diagnostics import doctor
from jacmatch.errors import InputError

ALONE = {
    "couples-samples",
    "detached",
    "forward-zero",
    "in-place-input",
    "nan-derivative",
    "non-deterministic",
    "not-finite",
    "once-differentiable",
    "partly-detached",
    "zero-jacobian",
}
"""Faults whose consequences are not reported again under other codes."""

each = pytest.mark.parametrize("name", FAULTS)


def planted(name):
    torch.manual_seed(3)
    return FAULTS[name].build(), FAULTS[name].batch()


@each
def test_a_planted_fault_is_named(name):
    fault = FAULTS[name]
    diagnosis = doctor(*planted(name))
    (finding, *_) = [finding for finding in diagnosis.findings if finding.code == fault.code]
    is_note = fault.code in ("in-place-input", "forward-unsupported", "couples-samples")
    assert fault.remedy in finding.remedy
    assert finding.severity == ("note" if is_note else "fault")
    assert diagnosis.ok == is_note
    assert diagnosis.engine == fault.engine
    text = str(diagnosis)
    assert text.startswith(f"engine: {fault.engine}\n")
    assert f"{finding.severity} [{fault.code}] {finding.what} Remedy: {finding.remedy}" in text
    assert len(set(diagnosis.findings)) == len(diagnosis.findings)
    if fault.code in ALONE:
        assert {finding.code for finding in diagnosis.findings if finding.severity == "fault"} <= {fault.code}


@pytest.mark.parametrize(
    "seeds",
    [pytest.param(range(12), marks=pytest.mark.ci), pytest.param(range(12, 60), marks=pytest.mark.slow)],
    ids=["few", "many"],
)
@pytest.mark.parametrize("name", ["detached: a factor", "derivative taken once: custom_op with a cut backward"])
def test_a_fault_is_not_missed_by_chance(as_users_run, name, seeds):
    """What is compared are a few random products: a part that is missing must not be small in all of them."""
    for seed in seeds:
        torch.manual_seed(seed)
        diagnosis = doctor(FAULTS[name].build(), plain(), seed=seed)
        assert FAULTS[name].code in {finding.code for finding in diagnosis.findings}, seed


def everything(module):
    """All that a diagnosis could change."""
    hooks = [
        (layer._forward_hooks.copy(), layer._forward_pre_hooks.copy(), layer._backward_hooks.copy())
        for layer in module.modules()
    ]
    return {
        "state": copy.deepcopy(module.state_dict()),
        "identity": [id(tensor) for tensor in (*module.parameters(), *module.buffers())],
        "modes": [layer.training for layer in module.modules()],
        "asks": [parameter.requires_grad for parameter in module.parameters()],
        "gradients": [parameter.grad for parameter in module.parameters()],
        "hooks": hooks,
        "random": torch.get_rng_state(),
        "attributes": [sorted(vars(layer)) for layer in module.modules()],
    }


def unusual():
    """Conv, BatchNorm, dropout and attention, some layers frozen and some in the other mode."""
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 4)
    )
    module[0].weight.requires_grad_(False)
    module[1].eval()
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.ci
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.ci)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [unusual, Attends, SOUND["lstm, dropout"][0], SOUND["conv and BatchNorm"][0]])
def test_the_module_stays_as_it_was(make, training, dtype):
    module = make().to(dtype)
    if make is not unusual:
        module.train(training)
    x = torch.randn(SEQUENCE if isinstance(module, Attends | First) else IMAGES).to(dtype)
    given, before = x.clone(), everything(module)
    fast = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    with torch.no_grad():
        diagnosis = doctor(module, x)
        assert not torch.is_grad_enabled()
    assert diagnosis.ok
    after = everything(module)
    assert torch.equal(x, given)
    assert (torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()) == fast
    for name, value in before["state"].items():
        assert torch.equal(after["state"][name], value), name
    assert torch.equal(after.pop("random"), before.pop("random"))
    assert {**after, "state": None} == {**before, "state": None}


@pytest.mark.ci
@each
def test_a_faulty_module_stays_as_it_was_too(name):
    module, x = planted(name)
    given, before = x.clone(), everything(module)
    doctor(module, x)
    after = everything(module)
    for key, value in before["state"].items():
        # A module that writes its buffers in evaluation mode does so in each call: nothing prevents that.
        assert torch.equal(after["state"][key], value) or key == "calls", key
    assert torch.equal(after["random"], before["random"])
    assert after["modes"] == before["modes"]
    assert torch.equal(x.nan_to_num(9), given.nan_to_num(9))


@pytest.mark.ci
def test_the_same_seed_gives_the_same_diagnosis():
    module, x = SOUND["encoder layer"][0](), torch.randn(SEQUENCE)
    assert str(doctor(module, x)) == str(doctor(module, x))


def test_a_sound_module_in_words():
    text = str(doctor(nn.Sequential(linear(), nn.Tanh(), linear(4)), plain()))
    assert text.splitlines() == [
        "engine: reverse",
        "  reverse      right",
        "  forward      right",
        "  differences  right",
        "no fault found",
    ]


def test_a_custom_op_is_named_with_its_name():
    text = str(doctor(*planted("no rule: custom_op without jvp")))
    assert "the custom operator jacmatch_tests.square" in text
    assert "forward      cannot" in text


def test_each_engine_has_its_line():
    text = str(doctor(*planted("no rule: a jvp of zero")))
    assert "  forward      silently zero\n" in text
    assert text.count("\n") == 4


def test_one_sample_is_checked_as_far_as_possible():
    assert doctor(nn.Sequential(linear(), nn.Tanh(), linear(4)), plain()[:1]).ok
    assert doctor(nn.Sequential(linear(1, 3), nn.Tanh()), torch.randn(2, 1)).ok
    assert doctor(nn.Sequential(linear(), nn.Tanh()), torch.zeros(2, 5)).ok


def test_tokens_are_refused(as_users_run):
    with pytest.raises(InputError, match=r"`x` of `doctor` must be of a floating-point type\. Got torch\.int64\."):
        doctor(nn.Embedding(3, 4), torch.tensor([[1, 2]]))
