"""A pass with derivatives leaves the module, the input and all global flags as they were, also when it fails."""

import pytest
import torch
from torch import Tensor, nn

from jacmatch.errors import InputError
from jacmatch.jacobian import PooledFeatures, jvp_products, twice_differentiable, vjp_products

from .architectures import ARCHITECTURES, made
from .ways import WAYS, every_policy, every_way, go


def state_of(module: nn.Module) -> dict:
    """Everything about a module that a pass could leave changed: attributes, hooks, modes, identities."""
    state = {}
    for path, layer in module.named_modules():
        for name, value in vars(layer).items():
            inside = dict(value) if isinstance(value, dict) else value
            state[path, name] = {k: id(v) for k, v in inside.items()} if isinstance(inside, dict) else id(inside)
        state[path, "training"] = layer.training
    for name, parameter in module.named_parameters():
        state["parameter", name] = id(parameter), parameter.requires_grad, parameter.grad, parameter._version
    return state


def global_state() -> dict:
    """Everything global that a pass could leave changed."""
    return {
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "cudnn": torch.backends.cudnn.enabled,
        "oneDNN": torch._C._get_mkldnn_enabled(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
        "cudnn attention": torch.backends.cuda.cudnn_sdp_enabled(),
        "function modes": torch._C._len_torch_function_stack(),
        "gradients": torch.is_grad_enabled(),
        "type": torch.get_default_dtype(),
        "random numbers": torch.get_rng_state().tolist(),
    }


@pytest.fixture(params=["usual", "unusual"])
def _flags(request):
    """The usual global flags, and unusual ones, which must be put back too."""
    if request.param == "usual":
        yield
        return
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.cuda.enable_flash_sdp(False)
    torch._C._set_mkldnn_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)
    torch.backends.cuda.enable_flash_sdp(True)
    torch._C._set_mkldnn_enabled(True)


UNTOUCHED = [
    "batchnorm-train",
    "batchnorm-train-frozen",
    "encoder-layer",
    "lstm",
    "hardswish-inplace",
    "first-operation-inplace",
    "input-scaled-inplace",
]


@every_way
@pytest.mark.usefixtures("_flags")
@pytest.mark.parametrize("name", UNTOUCHED)
def test_a_pass_leaves_the_module_and_the_flags_as_they_were(name, way):
    module, x = made(name)
    copied = x.clone()
    before = state_of(module), global_state()
    readout = PooledFeatures("0") if name.startswith("batchnorm") else None
    go(way, module, x, batch_norm=ARCHITECTURES[name].batch_norm, readout=readout)
    assert state_of(module) == before[0]
    assert global_state() == before[1]
    assert torch.equal(x, copied)
    assert not x.requires_grad
    assert x.grad is None


class Interrupted(Exception):
    """Nothing that the library knows."""


class Stumbling(nn.Module):
    """A layer that raises."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


@every_way
@every_policy
@pytest.mark.usefixtures("_flags")
@pytest.mark.parametrize("error", [Interrupted(), KeyboardInterrupt(), RuntimeError("no")], ids=repr)
@pytest.mark.ci
def test_a_pass_that_fails_leaves_the_module_and_the_flags_as_they_were(error, policy, way):
    module = nn.Sequential(nn.BatchNorm2d(2), nn.LSTM(4, 3), Stumbling(error)).double().train()
    module[1].forward = lambda x: x  # there only to be seen
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    before = state_of(module), global_state()
    with pytest.raises((type(error), RuntimeError)):
        go(way, module, x, batch_norm=policy, readout=PooledFeatures("0"), layers=("1",))
    assert state_of(module) == before[0]
    assert global_state() == before[1]


def test_an_error_of_the_user_is_passed_on():
    """Only what PyTorch says about derivatives becomes an error of an engine."""
    x = torch.randn(2, 3)
    for way in WAYS:
        with pytest.raises(Interrupted):
            go(way, Stumbling(Interrupted()), x)


@every_way
@pytest.mark.usefixtures("as_users_run")
def test_directions_of_a_wrong_shape_leave_the_module_as_it_was(way):
    module, x = made("batchnorm-train-frozen")
    before = state_of(module), global_state()

    def call() -> None:
        if way == "vjp":
            vjp_products(module, x, torch.ones(1, 3, 7, dtype=x.dtype), batch_norm="frozen")
        else:
            jvp_products(module, x, torch.ones(1, 3, 2, 4, 5, dtype=x.dtype), engine=way, batch_norm="frozen")

    with pytest.raises(InputError, match="must have the shape"):
        call()
    assert state_of(module) == before[0]
    assert global_state() == before[1]


def test_the_context_by_itself():
    module, _ = made("encoder-layer")
    before = state_of(module), global_state()
    with twice_differentiable(module, "frozen", statistics=True):
        assert not torch.backends.mha.get_fastpath_enabled()
        assert not torch.backends.cuda.flash_sdp_enabled()
    with pytest.raises(Interrupted), twice_differentiable(module):
        raise Interrupted
    assert state_of(module) == before[0]
    assert global_state() == before[1]
