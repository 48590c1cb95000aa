"""Objectives in the Trainer of Hugging Face Transformers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jacmatch import files
from jacmatch.errors import InputError, UnsupportedError
from jacmatch.integrations import require
from jacmatch.integrations.unit import TrainingUnit
from jacmatch.jacobian import Arguments, run
from jacmatch.objectives import CompiledSteps, Objective

require("transformers", "hf")
require("accelerate", "hf")

import safetensors.torch  # noqa: E402
from transformers import PreTrainedModel, Trainer, TrainingArguments  # noqa: E402

__all__ = ["EmbeddingInputs", "JacmatchTrainer", "TrainerModel", "compute_loss"]

STATE_FILE = "objective.safetensors"
"""File of a checkpoint with the state of the objective, one tensor."""
_LARGEST = 1 << 16  # bytes; the limit for this file
_LABELS = ("labels", "label")


class EmbeddingInputs(nn.Module):
    """A transformer as a function of embeddings (B, T, D), with respect to which it can be differentiated.

    Outputs cannot be differentiated with respect to token ids. A batch must contain `inputs_embeds` instead, looked up
    in one frozen table for student and teacher. Their embedding sizes must be equal.

    Args:
        model: A model whose `forward` takes `inputs_embeds`.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        >>> model = EmbeddingInputs(BertForSequenceClassification(BertConfig(vocab_size=20, **sizes)))
        >>> model(torch.randn(2, 5, 8)).logits.shape
        torch.Size([2, 2])
    """

    main_input_name = "inputs_embeds"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """Return what the model returns. A Trainer removes columns of a data set that `forward` does not name."""
        others |= {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        return self.model(inputs_embeds=inputs_embeds, **{k: v for k, v in others.items() if v is not None})


def saved_part(student: nn.Module) -> nn.Module:
    """Return the module that a checkpoint stores: the transformer within `EmbeddingInputs`, or the student."""
    return student.model if isinstance(student, EmbeddingInputs) else student


def inputs_and_labels(
    batch: Mapping[str, Any], student: nn.Module, input_name: str | None = None
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """Return the inputs, the labels and all other arguments of a batch, which is a dictionary.

    Without `input_name`, one of several inputs is that of the student's `main_input_name`.
    """
    given = {name: value for name, value in batch.items() if value is not None}
    labels = next((given.pop(name) for name in _LABELS if name in given), None)
    if input_name is None:
        named = getattr(student, "main_input_name", None)
        input_name = named if named in given or len(given) != 1 else next(iter(given))
    if input_name not in given:
        rule = f"A batch must have the input {input_name!r}."
        raise InputError(rule, got=", ".join(map(repr, batch)), do="Name it: JacmatchTrainer(..., input_name=...).")
    x = given.pop(input_name)
    return x, labels, given


def compute_loss(objective: Objective, *, input_name: str | None = None) -> Callable[..., Any]:
    """Return a function for the `compute_loss` method of your own Trainer, whose model is the student.

    The Trainer counts the labels of all batches of a step, except −100. If it passes this number, the loss of a batch
    is weighted by its share, so that the losses of a step add up to the mean. Otherwise the Trainer divides by the
    number of batches itself.

    Args:
        objective: The objective.
        input_name: Key of the input in a batch. None: the only input, or the student's `main_input_name`.

    Raises:
        UnsupportedError: At the first call in several processes, in which the Trainer would wrap the student instead of
            the objective.

    Example:
        >>> from jacmatch import Distillation
        >>> loss_of = compute_loss(Distillation(nn.Linear(3, 2), nn.Linear(3, 2), jacobians=0.0))
        >>> class MyTrainer(Trainer):
        ...     def compute_loss(self, *args, **kwargs):
        ...         return loss_of(*args, **kwargs)
    """
    unit = TrainingUnit(objective)

    def loss_of_batch(
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise UnsupportedError(
                "`compute_loss` cannot be used in several processes: the Trainer wraps the student, and gradients of "
                "derivatives would not be averaged. Use JacmatchTrainer(objective, args, ...), which wraps the "
                "objective."
            )
        x, labels, context = inputs_and_labels(inputs, unit.student, input_name)
        returned = unit(x, labels, context=context)
        loss = returned["loss"]
        if num_items_in_batch is not None and labels is not None:
            loss = loss * (labels.ne(-100).sum() / num_items_in_batch)
        return (loss, {"loss": loss, "logits": returned["student_outputs"]}) if return_outputs else loss

    return loss_of_batch


class TrainerModel(TrainingUnit):
    """An objective as the model of a Trainer: it takes the entries of a batch, and returns `loss` and `logits`.

    The loss is a mean over the samples of a batch; a Trainer divides it by the number of batches that it accumulates.

    Args:
        objective: The objective.
        input_name: The key of the input in a batch; None is the only one, or the student's `main_input_name`.
    """

    accepts_loss_kwargs = False

    def __init__(self, objective: Objective, *, input_name: str | None = None) -> None:
        super().__init__(objective)
        self.input_name, self.progress = input_name, 0.0
        self.terms: dict[str, Tensor] = {}

    @property
    def config(self) -> Any:
        """Return the configuration of the student, None where it has none."""
        return getattr(saved_part(self.student), "config", None)

    def gradient_checkpointing_enable(self, *args: Any, **settings: Any) -> None:
        """Recompute the activations of the student's layers in the backward pass."""
        saved_part(self.student).gradient_checkpointing_enable(*args, **settings)  # type: ignore[operator]

    def activation_checkpointing_enable(self, *args: Any, **settings: Any) -> None:
        """Same as `gradient_checkpointing_enable`, under the name that transformers uses from version 6 on."""
        saved_part(self.student).activation_checkpointing_enable(*args, **settings)  # type: ignore[operator]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, labels: Tensor | None = None, **batch: Any) -> dict[str, Tensor]:
        """Return the loss and the student's outputs."""
        x, y, context = inputs_and_labels({"labels": labels, **batch}, self.student, self.input_name)
        if y is None and not self.training:  # `predict` on data without labels
            with self.objective.selected_outputs():
                return {"logits": run(self.student, x, arguments=Arguments.of("TrainerModel", x, context)[1])[0]}
        returned = super().forward(x, y, progress=self.progress, context=context)
        self.terms = {name: value for name, value in returned.items() if name not in ("loss", "student_outputs")}
        return {"loss": returned["loss"], "logits": returned["student_outputs"]}


class JacmatchTrainer(Trainer):  # type: ignore[misc]
    """A Hugging Face Trainer that trains the student of an objective.

    - accelerate prepares the objective, not the student, and DistributedDataParallel wraps it.
    - The gradient of a step is that of the mean over all samples of all accumulated batches and processes, even if
      these have different numbers of samples.
    - The log has the mean of each weighted term, and the share of each in the gradient norm as `share_NAME`.
    - A checkpoint has the student as `save_pretrained` stores it (of a peft model the adapter), and the state of the
      objective in `objective.safetensors`. The teacher is not stored. `train(resume_from_checkpoint=...)` reads both.
    - `torch_compile=True` compiles whole steps, as `jacmatch.objectives.CompiledSteps` does.

    Args:
        objective: The objective, with student and teacher.
        args: The `TrainingArguments`.
        input_name: Key of the input in a batch. None: the only entry except `labels`, or the student's
            `main_input_name`.
        **settings: Other arguments of `transformers.Trainer`, such as `train_dataset` and `compute_metrics`.

    Raises:
        InputError: `model`, `model_init`, `compute_loss_func` or label smoothing is given; the objective replaces them.
        UnsupportedError: The weights would be sharded (FSDP, DeepSpeed), or one process would train on several GPUs.
    """

    loss_is_scaled_for_ga = False  # the Trainer divides by the number of accumulated batches

    def __init__(
        self,
        objective: Objective,
        args: TrainingArguments | None = None,
        *,
        input_name: str | None = None,
        **settings: Any,
    ) -> None:
        replaced = [name for name in ("model", "model_init", "compute_loss_func") if settings.get(name) is not None]
        if args is not None and args.label_smoothing_factor:
            replaced.append("label_smoothing_factor")
        if replaced:
            rule = "`JacmatchTrainer` must not have arguments that the objective replaces."
            raise InputError(rule, got=", ".join(replaced), do="Leave them out; the objective has student and losses.")
        unit = TrainerModel(objective, input_name=input_name)
        if args is not None and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # the loss of the unit reaches all parameters
        super().__init__(model=unit, args=args, **settings)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.n_gpu > 1:
            raise UnsupportedError(
                "`JacmatchTrainer` trains whole copies of the student, one GPU in each process, not with FSDP, "
                "DeepSpeed or nn.DataParallel. Leave fsdp and deepspeed out and start it by "
                "torchrun --nproc-per-node=N; for sharded weights use `jacmatch distill --shard`."
            )
        if self.args.torch_compile:
            objective.compiled = CompiledSteps(backend=self.args.torch_compile_backend or "inductor")
        self.objective = objective
        self._unit = unit
        self._samples = 0
        self._sums: dict[str, Tensor] = {}  # sums of the terms over the steps since the last log
        self._steps = 0

    @contextmanager
    def _student_as_model(self) -> Iterator[None]:
        """Make `model` the student inside the block, for what the Trainer saves, loads and inspects."""
        self.model = saved_part(self.objective.student)
        try:
            yield
        finally:
            self.model = self._unit

    def get_batch_samples(self, *args: Any) -> tuple[list[Any], Any]:
        """Return the batches of a step, and count their samples over all processes."""
        batches, items = super().get_batch_samples(*args)
        samples = sum(len(self._inputs(batch)) for batch in batches)
        if self.args.world_size > 1:
            samples = int(self.accelerator.gather(torch.tensor([samples], device=self.args.device)).sum())
        self._samples = samples
        self._steps += bool(batches)
        return batches, items

    def _inputs(self, batch: Mapping[str, Any]) -> Tensor:
        return inputs_and_labels(batch, self.objective.student, self._unit.input_name)[0]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch, weighted by its number of samples where it is one of several."""
        self._unit.progress = self.state.global_step / max(self.state.max_steps, 1)
        outputs = model(**inputs)
        loss = outputs["loss"]
        if model.training and self.is_in_train:
            batches = self.current_gradient_accumulation_steps
            part = len(self._inputs(inputs)) * self.args.world_size / self._samples
            loss = loss * (part * batches)
            for name, value in self._unit.terms.items():
                self._sums[name] = self._sums.get(name, 0.0) + value * part
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the means of the terms since the last log, and their gradient shares, with the training loss."""
        if "loss" in logs and self._sums:
            means = {name: value / self._steps for name, value in self._sums.items()}
            if self.args.world_size > 1:
                means = self.accelerator.reduce(means, reduction="mean")
            logs.update({name: float(value) for name, value in means.items()})
            logs.update({f"share_{name}": share for name, share in self._unit.shares.items()})
            self._sums, self._steps = {}, 0
        super().log(logs, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns of a dataset that the student takes."""
        with self._student_as_model():
            super()._set_signature_columns_if_needed()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with self._student_as_model():
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            state = safetensors.torch.save({"state": self.objective.get_extra_state()})
            files.replace(Path(output_dir or self.args.output_dir) / STATE_FILE, state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_pretrained(resume_from_checkpoint):
            with self._student_as_model():
                super()._load_from_checkpoint(resume_from_checkpoint)
        self._load_state(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if not self._load_pretrained(self.state.best_model_checkpoint):
            with self._student_as_model():
                super()._load_best_model()
        self._load_state(self.state.best_model_checkpoint)

    def _load_pretrained(self, folder: str) -> bool:
        """Load the weights of a PreTrainedModel, perhaps under other names; return whether the student is one."""
        student = saved_part(self.objective.student)
        if not isinstance(student, PreTrainedModel):
            return False
        settings = {"config": student.config, "dtype": student.dtype}
        stored, report = type(student).from_pretrained(folder, output_loading_info=True, **settings)
        if missing := sorted(report["missing_keys"]):
            rule = f"The checkpoint {folder} must have all weights of the student."
            raise InputError(rule, got=f"none for {', '.join(missing[:3])}", do="Resume with the same student.")
        student.load_state_dict(stored.state_dict())
        return True

    def _load_state(self, folder: str) -> None:
        path = Path(folder) / STATE_FILE
        if path.exists():  # not in a checkpoint of another Trainer: its student can be trained on
            self.objective.set_extra_state(safetensors.torch.load(files.read(path.parent, path, _LARGEST))["state"])
