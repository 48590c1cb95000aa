"""Teachers adapted to the target: a linear probe on their features, or principal components of the features."""

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.datasets import Split
from jacmatch.errors import InputError
from jacmatch.jacobian import Context, Logits, PCAFeatures, Readout, run
from jacmatch.jobs.teachers import Pretrained, evaluating
from jacmatch.objectives import AtMixedPairs, Distillation
from jacmatch.teachers import Answer, MemoizedTeacher, ModuleTeacher, Question
from jacmatch.training import Training, fit
from jacmatch.training.data import in_order

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse penalties C of a probe; cross-validation takes the one of the smallest log loss."""
_BATCH = 100


class ReadoutNetwork(nn.Module):
    """A network whose outputs are the values of a readout of another network.

    Example:
        >>> features = PCAFeatures("0", 2).fitted(inner := nn.Sequential(nn.Linear(3, 4)), torch.rand(9, 3))
        >>> ReadoutNetwork(inner, features)(torch.rand(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(self, network: nn.Module, readout: Readout) -> None:
        """Wrap the network; the readout needs no labels."""
        super().__init__()
        self.network, self.readout = network, readout

    def forward(self, x: Float[Tensor, "batch *input"]) -> Float[Tensor, "batch *row"]:
        """The values of the readout."""
        return self.readout(*run(self.network, x, self.readout.layers), Context())


@dataclass(frozen=True)
class _Pooled:
    """The features of a layer, averaged over all pixels."""

    layer: str

    @property
    def layers(self) -> tuple[str, ...]:
        return (self.layer,)

    def __call__(self, outputs: Tensor, features: Mapping[str, Tensor], context: Context) -> Tensor:
        z = features[self.layer]
        return z if z.dim() == 2 else z.flatten(2).mean(2)


class HeadTeacher:
    """A teacher whose outputs are computed from pooled features of a pretrained network.

    Teachers that share a memory of the features query the network once for each point. Other queries go to the network.
    """

    answers_vjp = True

    def __init__(self, network: nn.Module, memory: MemoizedTeacher, layer: str, head: nn.Module | Readout) -> None:
        self.whole = MemoizedTeacher(ModuleTeacher(network), draws=memory.draws)
        self.memory, self.layer, self.head = memory, layer, head

    @classmethod
    def of_last_layer(
        cls, network: nn.Module, memory: MemoizedTeacher, split: Split
    ) -> "HeadTeacher | MemoizedTeacher":
        """Return a teacher whose head is the last layer; if no layer returns its input, it has its own memory.

        `network` is the memoized network, or that with another last layer.
        """
        try:
            head, layer = head_of(network, split)
        except InputError:
            layer = ""
        return (
            cls(network, memory, layer, head) if layer else MemoizedTeacher(ModuleTeacher(network), draws=memory.draws)
        )

    def answer(self, x: Float[Tensor, "batch *input"], question: Question | None = None) -> Answer:
        """Return outputs computed from the stored features; the network computes everything else."""
        requested = question or Question()
        products = requested.cotangents is not None or requested.tangents is not None
        if products or requested.layers or not isinstance(requested.readout, Logits):
            return self.whole.answer(x, requested)
        about = Question(_Pooled(self.layer), ids=requested.ids, draw=requested.draw, random=requested.random)
        pooled = self.memory.answer(x, about).values
        with torch.no_grad():
            if isinstance(self.head, nn.Module):
                outputs = self.head.to(pooled)(pooled)
            else:
                outputs = self.head(pooled, {self.layer: pooled}, Context())
        return Answer(outputs, outputs)


def head_of(network: nn.Module, split: Split) -> tuple[nn.Linear, str]:
    """Return the last linear layer, and the last layer whose output, averaged over all pixels, is its input."""
    x = split.inputs(torch.arange(min(2, len(split)))).to(next(network.parameters()).device)
    outputs, calls = layer_calls(network, x)
    heads = [call for call in calls if call.output is outputs and type(call.module) is nn.Linear]
    if not heads or heads[-1].given.dim() != 2:
        raise InputError("A teacher must end in a linear layer to be adapted.", got="another")
    head, features = heads[-1].module, heads[-1].given
    layer = ""
    for call in calls:
        if isinstance(call.output, Tensor) and call.module is not head and call.output.dim() in (2, 4):
            pooled = call.output.mean((2, 3)) if call.output.dim() == 4 else call.output
            if pooled.shape == features.shape and torch.allclose(pooled, features, atol=1e-6):
                layer = call.name
    assert isinstance(head, nn.Linear)
    return head, layer


class LayerCall(NamedTuple):
    """A call of a layer in the forward pass of a network."""

    name: str
    module: nn.Module
    given: Any  # first argument of the call
    output: Any


def layer_calls(network: nn.Module, x: Tensor) -> tuple[Tensor, list[LayerCall]]:
    """Return the outputs of a network at x in evaluation mode, and the calls of its layers in their order."""
    calls: list[LayerCall] = []

    def record(name: str) -> Any:
        return lambda module, given, output: calls.append(LayerCall(name, module, given[0] if given else None, output))

    with ExitStack() as hooks, evaluating(network):
        for name, module in list(network.named_modules())[1:]:
            hooks.enter_context(module.register_forward_hook(record(name)))
        return network(x), calls


def layer_path(network: nn.Module, layer: str) -> str | None:
    """Return the path of a layer, in which names of wrappers may be omitted; None if there is none."""
    known = dict(network.named_modules())
    return next((prefix + layer for prefix in ("", "network.", "network.network.") if prefix + layer in known), None)


def features_of(network: nn.Module, head: nn.Linear, split: Split) -> Float[Tensor, "sample feature"]:
    """Return the input of the last layer for all samples."""
    rows: list[Tensor] = []
    with head.register_forward_pre_hook(lambda _, given: rows.append(given[0].cpu())), evaluating(network):
        for x, _ in in_order(split, _BATCH, head.weight.device):
            network(x)
    return torch.cat(rows)


def probed(teacher: Pretrained, train: Split, classes: int, seed: int) -> nn.Module:
    """Return the teacher with a new last layer, fitted by logistic regression; its features do not change.

    Features are standardized; the penalty is chosen by cross-validation on the training samples (5 parts, or as many as
    the smallest class has samples; C = 0.01 where a class has one).
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    network = teacher.with_outputs(classes).to(next(teacher.network.parameters()).device).eval()
    head, _ = head_of(network, train)
    z, y = features_of(network, head, train).double(), train.y.cpu().numpy()
    mean, std = z.mean(0) * (head.bias is not None), z.std(0).clamp_min(1e-6)
    rows = ((z - mean) / std).numpy()
    smallest = int(torch.bincount(train.y.cpu(), minlength=classes).min())
    if smallest < 1:
        raise InputError("The labeled images of the target must cover every class.", got="a class without one")
    model: Any = LogisticRegression(C=1e-2, max_iter=1000, fit_intercept=head.bias is not None)
    if smallest > 1:
        folds = StratifiedKFold(min(5, smallest), shuffle=True, random_state=seed % 2**32)
        model = GridSearchCV(model, {"C": PENALTIES}, scoring="neg_log_loss", cv=folds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = model.fit(rows, y)
    fitted = getattr(fitted, "best_estimator_", fitted)
    weight, bias = (torch.as_tensor(each, dtype=torch.float64) for each in (fitted.coef_, fitted.intercept_))
    if classes == 2:  # scikit-learn has one row for two classes
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    with torch.no_grad():
        head.weight.copy_(weight / std)
        if head.bias is not None:
            head.bias.copy_(bias - (weight / std) @ mean)
    return network


def finetuned(
    network: nn.Module, train: Split, settings: Training, seed: int, device: str, *, whole: bool = False
) -> nn.Module:
    """Fine-tune the last block and the last layer of a teacher with a probe, on the labels.

    The last block is the last child with parameters before the last layer. If it has more than half of all parameters,
    its own last child is used instead.
    """
    head, _ = head_of(network, train)
    network.requires_grad_(False)
    parts = (network,) if whole else (head, last_block(network, head))
    trained = {module for part in parts for module in part.requires_grad_(True).modules()}
    others: list[Any] = [module for module in network.modules() if module not in trained]
    frozen = [module for module in others if getattr(module, "running_mean", None) is not None]
    for module in frozen:  # the statistics stay as they are, like the weights
        module.eval().train = lambda mode=True, module=module: module
    try:
        fit(Distillation(network, labels=1.0, point=AtMixedPairs()), train, settings, seed=seed, device=device)
    finally:
        for module in frozen:
            del module.train
    return network.eval().requires_grad_(False)


def last_block(network: nn.Module, head: nn.Linear) -> nn.Module:
    """Return the last block before the last layer, with at most half of all parameters if it can be divided."""

    def size(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p is not head.weight and p is not head.bias)

    block = network
    while block is network or 2 * size(block) > size(network):
        if not (parts := [child for child in block.children() if size(child)]):
            break
        block = parts[-1]
    return block


def basis_of(teacher: Pretrained, images: Split, layer: str | None, k: int, whiten: bool) -> ReadoutNetwork:
    """Return the teacher's pooled features in the basis of their first k principal components on these images.

    Without `layer` they are the input of the last one. Names of wrappers may be left out.
    """
    network = teacher.network
    x = images.inputs().to(next(network.parameters()).device)
    if layer is None:
        layer = head_of(network, images)[1]
        if not layer:
            do = "Name the layer: --feature-layer."
            raise InputError("The teacher must have a layer that returns the input of its last one.", got="none", do=do)
    with evaluating(network):
        return ReadoutNetwork(network, PCAFeatures(layer_path(network, layer) or layer, k, whiten).fitted(network, x))
