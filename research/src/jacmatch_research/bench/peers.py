"""`jacmatch bench peers`: plain distillation beside other libraries, on the same networks, data, batch and loss.

Each library is used as its documentation shows: the training box of torchdistill with its loss and loader, and the
distillation task of timm in a bare loop with torch's loader, because timm's loader reads image files. In each library,
the loss is half the cross-entropy plus half Hinton's KL at temperature 4, and the optimizer is Adam. The losses of a
batch are compared before the measurement.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from jacmatch.datasets import Split
from jacmatch.models import build
from jacmatch.objectives import Distillation
from jacmatch.training import Training, fit
from jacmatch.training.state import channels_last
from jacmatch_research.bench import rivals
from jacmatch_research.bench.claims import Benchmark, Case, Claim, Conditions, Measured, NotMeasured, compare

TORCHDISTILL = Claim("plain distillation, samples/s ÷ torchdistill", must=1.0, aim=1.5, better="higher")
TIMM = Claim("plain distillation, samples/s ÷ distillation task of timm", must=1.0, aim=1.5, better="higher")

PAIRS = {
    "cnn5 → cnn3, 8×8, batch 128": ("cnn5", "cnn3", (1, 8, 8), 128, 60),
    "VGG-9 → VGG-4, 28×28, batch 64": ("vgg9", "vgg4", (1, 28, 28), 64, 3),
    "ResNet-56 → ResNet-20, 32×32, batch 32": ("resnet56", "resnet20", (3, 32, 32), 32, 6),
}
CLASSES, TEMPERATURE, RATE = 10, 4.0, 1e-3
Library = Literal["torchdistill", "timm"]


@dataclass(frozen=True)
class Task:
    """The task of every library: networks of one seed by catalog name, samples in memory, and a number of steps.

    A step has `batch` samples; the samples are those of one epoch.
    """

    teacher: str
    student: str
    x: Tensor
    y: Tensor
    batch: int
    steps: int

    @classmethod
    def of(cls, conditions: Conditions, pair: str) -> "Task":
        """The task of a pair; in a quick run, two steps of the smallest networks."""
        teacher, student, shape, batch, steps = PAIRS[pair]
        if conditions.quick:
            teacher, student, batch, steps = "cnn5", "cnn3", 4, 2
        x = torch.rand(batch * steps, *shape, device=conditions.device)
        return cls(teacher, student, x, torch.randint(0, CLASSES, (len(x),), device=x.device), batch, steps)

    def networks(self) -> tuple[nn.Module, nn.Module]:
        """New teacher and student, with the same weights in each call."""
        torch.manual_seed(0)
        shape = tuple(self.x.shape[1:])
        teacher, student = (build(name, CLASSES, shape).to(self.x.device) for name in (self.teacher, self.student))
        return teacher.eval().requires_grad_(False), student.train()

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """The batches of an epoch, in the order of the samples."""
        return [(x, y) for x, y in DataLoader(TensorDataset(self.x, self.y), self.batch)]

    def loader(self) -> DataLoader[Any]:
        """A shuffling loader of torch over the samples, without worker processes: they are in memory."""
        return DataLoader(TensorDataset(self.x, self.y), self.batch, shuffle=True)


def ours(task: Task, *, apart: bool = True) -> Distillation:
    """The objective of this library: half the cross-entropy plus half the KL; `apart`: contiguous memory layout."""
    teacher, student = task.networks()
    if not apart:
        channels_last(teacher)
    return Distillation(
        student, teacher, labels=0.5, outputs=0.5, jacobians=0, output_loss="kl", temperature=TEMPERATURE
    )


def theirs_timm(task: Task) -> tuple[Callable[[Tensor, Tensor], Tensor], nn.Module]:
    """A function that computes the loss of a batch by timm's task, and the student."""
    try:
        from timm.task import LogitDistillationTask
    except ImportError as missing:
        raise NotMeasured("timm.task is not installed: pip install 'timm>=1.0.23'") from missing
    teacher, student = task.networks()
    channels = task.x.shape[1]
    for network in (teacher, student):  # both normalize by themselves, so nothing is left for timm to do
        vars(network)["pretrained_cfg"] = {"mean": (0.0,) * channels, "std": (1.0,) * channels}
        vars(network).update(num_classes=CLASSES, in_chans=channels)
    made = LogitDistillationTask(
        student,
        teacher,
        nn.CrossEntropyLoss(),
        task_loss_weight=0.5,
        temperature=TEMPERATURE,
        device=task.x.device,
        verbose=False,
    ).train()
    return (lambda x, y: made(x, y)["loss"]), student


def torchdistill_box(task: Task) -> Any:
    """The training box of torchdistill for the task, built as from one of its configuration files."""
    try:
        from torchdistill.common.constant import def_logger
        from torchdistill.core.distillation import get_distillation_box
    except ImportError as missing:
        raise NotMeasured("torchdistill is not installed: pip install torchdistill") from missing
    def_logger.setLevel(logging.WARNING)
    teacher, student = task.networks()
    where = {"student_module_path": ".", "student_module_io": "output"}
    where |= {"teacher_module_path": ".", "teacher_module_io": "output"}
    loss = {"key": "KDLoss", "kwargs": {**where, "temperature": TEMPERATURE, "alpha": 0.5, "reduction": "batchmean"}}
    config = {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler},
            "kwargs": {"batch_size": task.batch, "num_workers": 0},
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "Adam", "kwargs": {"lr": RATE}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": loss, "weight": 1.0}}}},
    }
    data = {"train": TensorDataset(task.x, task.y)}
    return get_distillation_box(teacher, student, data, config, task.x.device, None, False, 1)


def agree(first: Tensor, second: Tensor) -> None:
    """Check that two libraries compute the same loss."""
    torch.testing.assert_close(first.detach(), second.detach(), rtol=1e-4, atol=1e-5)


def stepped(task: Task, library: Library) -> tuple[Callable[[Tensor, Tensor], None], Iterable[Any], nn.Module]:
    """The step of another library, whose loss is that of this library, its loader, and its student."""
    first = task.batches()[0]
    if library == "timm":
        their_loss, student = theirs_timm(task)
        agree(ours(task)(*first)["loss"], their_loss(*first))
        return rivals.stepper(student, their_loss), task.loader(), student
    box = torchdistill_box(task)
    box.pre_epoch_process(epoch=0)
    agree(ours(task)(*first)["loss"], box.forward_process(*first))

    def step(x: Tensor, y: Tensor) -> None:
        box.post_forward_process(loss=box.forward_process(x, y))

    return step, box.train_data_loader, box.student_model


def over(step: Callable[[Tensor, Tensor], None], batches: Iterable[Any]) -> None:
    """An epoch of steps; only samples and labels of the loader are used."""
    for x, y, *_ in batches:
        step(x, y)


def given_batches(conditions: Conditions, pair: str, library: Library) -> Measured:
    """Time of steps on prepared batches: loss, gradient and optimizer, without loader and log."""
    task = Task.of(conditions, pair)
    their_step, *_ = stepped(task, library)
    objective, batches = ours(task), task.batches()
    step = rivals.stepper(objective.student, lambda x, y: objective(x, y)["loss"])
    return measured(conditions, task, partial(over, their_step, batches), partial(over, step, batches))


def whole_loop(conditions: Conditions, pair: str, library: Library, *, apart: bool = True) -> Measured:
    """Time of an epoch with a shuffling loader; for this library, `fit` with its start and everything around a step."""
    task = Task.of(conditions, pair)
    their_step, loader, _ = stepped(task, library)
    settings = Training(steps=task.steps, batch_size=task.batch, lr=RATE, schedule="constant", channels_last=not apart)
    split = Split(task.x, task.y)
    train = partial(fit, ours(task, apart=apart), split, settings, seed=0, device=conditions.device)
    return measured(conditions, task, partial(over, their_step, loader), train)


def measured(conditions: Conditions, task: Task, theirs: Callable[[], object], here: Callable[[], object]) -> Measured:
    """Samples/s of this library ÷ samples/s of the other: the inverse ratio of the times of an epoch."""
    times = compare(conditions, theirs, here, 7)
    rate = len(task.x) / times.baseline_seconds
    return Measured(times.spread, details={"steps": task.steps, "samples_per_second": float(f"{rate:.4g}")})


LIBRARIES: tuple[tuple[Claim, Library], ...] = ((TORCHDISTILL, "torchdistill"), (TIMM, "timm"))
PEERS = Benchmark(
    "plain distillation beside other libraries on the same networks, data, batch and loss",
    tuple(
        Case(claim, f"{pair}, {what}", partial(measure, pair=pair, library=library))
        for claim, library in LIBRARIES
        for pair in PAIRS
        for what, measure in (
            ("batches given", given_batches),
            ("whole loop", whole_loop),
            ("whole loop with --channels-last", partial(whole_loop, apart=False)),
        )
    ),
)
