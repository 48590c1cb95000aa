"""The Trainer of Hugging Face on objectives: equal to a plain loop, for each setting that changes how it trains."""

import copy
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.training.processes import both
from torch import distributed, nn

from jacmatch import AtData, Distillation, EveryRow, GradientShare, InputError, RandomOutputs, UnsupportedError

from .cases import Images, X, Y, difference, networks, objective, plain_loop, steps
from .transformers_cases import DATA, arguments, vit

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
huggingface = importlib.import_module("jacmatch.integrations.huggingface")
JacmatchTrainer, STATE_FILE = huggingface.JacmatchTrainer, huggingface.STATE_FILE

pytestmark = [
    pytest.mark.ci,
    pytest.mark.filterwarnings("default"),  # of frameworks; errors are still errors
    pytest.mark.usefixtures("all_as_users_run"),
]

SHARES = {"jacobians": GradientShare(0.3), "measure_every": 2}


def train(objective, out, samples=22, **settings):
    trainer = JacmatchTrainer(objective, arguments(out, **settings), train_dataset=DATA[:samples])
    trainer.train()
    return trainer


@pytest.mark.parametrize("accumulate", [1, 4])
def test_it_trains_as_a_plain_loop(tmp_path, accumulate):
    student, teacher = networks()
    plain = copy.deepcopy(student)
    trainer = train(objective(student, teacher), tmp_path, gradient_accumulation_steps=accumulate)
    means = plain_loop(objective(plain, teacher), steps(22, 4, accumulate))
    assert difference(student, plain) < 1e-6
    logged = [row for row in trainer.state.log_history if "loss" in row]
    for row, mean in zip(logged, means, strict=True):
        assert {name: row[name] for name in mean} == pytest.approx(mean, rel=1e-5)


def test_accumulated_batches_are_one_batch_of_all_their_samples(tmp_path):
    """22 samples: the last step has batches of 4 and 2, which count by their samples."""
    student, teacher = networks()
    plain = copy.deepcopy(student)
    train(objective(student, teacher, probe=EveryRow()), tmp_path, gradient_accumulation_steps=2)
    plain_loop(objective(plain, teacher, probe=EveryRow()), steps(22, 8))
    assert difference(student, plain) < 1e-6


def test_shares_of_the_gradient_are_measured_and_logged(tmp_path):
    student, teacher = networks()
    plain = copy.deepcopy(student)
    trainer = train(objective(student, teacher, **SHARES), tmp_path)
    plain_loop(objective(plain, teacher, **SHARES), steps(22, 4))
    assert difference(student, plain) < 1e-6
    assert trainer.state.log_history[0]["share_jacobians"] == pytest.approx(0.3)


def test_bf16_is_autocast_around_the_objective(tmp_path):
    student, teacher = networks()
    plain = copy.deepcopy(student)
    train(objective(student, teacher), tmp_path, bf16=True)
    plain_loop(objective(plain, teacher), steps(22, 4), cast=torch.bfloat16)
    assert difference(student, plain) < 1e-6


def test_activation_checkpointing_changes_nothing(tmp_path):
    student, teacher = vit(8), vit(16)
    plain = copy.deepcopy(student)
    train(objective(student, teacher), tmp_path, activation_checkpointing=True)
    plain_loop(objective(plain, teacher), steps(22, 4))
    assert difference(student, plain) < 1e-6


def test_torch_compile_compiles_whole_steps():
    """In a process without the type checks of this suite, which a compiler cannot follow."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.integrations.compiled", "huggingface"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["fallback"] is None
    assert result["steps"] > 0
    assert result["difference"] < 1e-6


def test_a_resumed_run_ends_as_one_without_a_break(tmp_path):
    """Of a network whose `save_pretrained` stores other names than the module has."""
    student, teacher = vit(8), vit(16)
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"}
    settings |= {"train_sampling_strategy": "random"}
    whole = train(objective(student, teacher, **SHARES), tmp_path, **settings)
    folder = tmp_path / "checkpoint-3"
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", STATE_FILE} <= names
    other = vit(8)
    trainer = JacmatchTrainer(
        objective(other, teacher, **SHARES), arguments(tmp_path, **settings), train_dataset=DATA[:22]
    )
    trainer.train(resume_from_checkpoint=str(folder))
    assert difference(student, other) == 0
    assert trainer.objective.calls == whole.objective.calls == 6
    last = [run.state.log_history[-2] for run in (whole, trainer)]  # the one before the closing row
    terms = ("loss", "labels", "outputs", "jacobians", "share_jacobians")
    assert [last[0][name] for name in terms] == pytest.approx([last[1][name] for name in terms])


def test_the_student_is_saved_as_a_pretrained_model_without_its_teacher(tmp_path):
    student, teacher = vit(8), vit(16)
    trainer = train(objective(student, teacher), tmp_path, samples=8)
    trainer.save_model(str(tmp_path / "out"))
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out")
    assert difference(student, loaded) == 0
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert size < 8 * sum(parameter.numel() for parameter in student.parameters()) + 10_000


def test_a_checkpoint_of_another_student_is_refused(tmp_path):
    vit(8).vit.save_pretrained(tmp_path)
    trainer = JacmatchTrainer(objective(vit(8), vit(16)), arguments(tmp_path), train_dataset=DATA[:4])
    with pytest.raises(InputError, match=r"must have all weights of the student\. Got none for classifier\.bias"):
        trainer._load_from_checkpoint(str(tmp_path))


def test_the_best_checkpoint_is_loaded_with_its_state(tmp_path):
    student, teacher = vit(8), vit(16)
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "first", "learning_rate": 0.01}
    metrics = iter([{"first": 1.0}, {"first": 0.0}])
    trainer = JacmatchTrainer(
        objective(student, teacher),
        arguments(tmp_path, **settings, greater_is_better=True),
        train_dataset=DATA[:22],
        eval_dataset=DATA[:8],
        compute_metrics=lambda _: next(metrics),
    )
    trainer.train()
    best = transformers.ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-2")
    assert difference(student, best) == 0
    assert trainer.objective.calls == 2


def test_it_evaluates_and_predicts(tmp_path):
    student, teacher = networks()
    trainer = JacmatchTrainer(
        objective(student, teacher), arguments(tmp_path), compute_metrics=lambda given: {"n": len(given.label_ids)}
    )
    result = trainer.evaluate(DATA[:8])
    with torch.no_grad():
        expected = objective(student, teacher).eval()(X[:8], Y[:8])
    assert result["eval_loss"] == pytest.approx(float(expected.loss), rel=1e-5)
    assert result["eval_n"] == 8
    predicted = trainer.predict([{"pixel_values": x} for x in X[:5]]).predictions
    torch.testing.assert_close(torch.tensor(predicted), student(X[:5]).detach())


def rank_of_two():
    """Tell accelerate what torch.distributed knows already."""
    rank = str(distributed.get_rank())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")


def train_in_two(accumulate, out):
    rank_of_two()
    student, teacher = networks()
    settings = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": accumulate, "ddp_backend": "gloo"}
    trainer = train(objective(student, teacher, **SHARES), out, samples=24, **settings)
    kind = type(trainer.model_wrapped).__name__
    assert not trainer.model_wrapped.find_unused_parameters
    return student, trainer.state.log_history[-2]["loss"], kind


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_train_as_one_with_all_samples(tmp_path, accumulate):
    student, teacher = networks()
    order = torch.arange(24).view(-1, 2, 3).transpose(1, 2).flatten()  # sample i of process r is number 2 i + r
    means = plain_loop(objective(student, teacher, **SHARES), steps(24, 6, accumulate, X[order], Y[order]))
    for trained, loss, kind in both(train_in_two, accumulate, tmp_path):
        assert kind == "DistributedDataParallel"
        assert difference(trained, student) < 1e-6
        assert loss == pytest.approx(means[-1]["loss"], rel=1e-5)


class MyTrainer(transformers.Trainer):
    """A Trainer of one's own, around a student that takes `num_items_in_batch` as every transformer does."""

    loss_of = None

    def compute_loss(self, *args, **kwargs):
        return self.loss_of(*args, **kwargs)


class TakesLabels(Images):
    def forward(self, pixel_values, labels=None):
        return super().forward(pixel_values)


class TakesAnything(Images):
    def forward(self, pixel_values, labels=None, **_):
        return super().forward(pixel_values)


@pytest.mark.parametrize("kind", [TakesLabels, TakesAnything])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_compute_loss_in_a_trainer_of_ones_own(tmp_path, kind, accumulate):
    _, teacher = networks()
    student = kind(4)
    plain = copy.deepcopy(student)
    settings = arguments(tmp_path, gradient_accumulation_steps=accumulate)
    trainer = MyTrainer(student, settings, train_dataset=DATA[:24])
    trainer.loss_of = huggingface.compute_loss(objective(student, teacher))
    trainer.train()
    plain_loop(objective(plain, teacher), steps(24, 4, accumulate))
    assert difference(student, plain) < 1e-6
    _, outputs = trainer.compute_loss(student, {"pixel_values": X[:4], "labels": Y[:4]}, return_outputs=True)
    assert outputs["logits"].shape == (4, 10)


def bert(width=8):
    torch.manual_seed(width)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)


def test_text_is_differentiated_by_its_embeddings(tmp_path):
    teacher, student = bert(8), bert(8)
    torch.manual_seed(0)
    tokens, y = torch.randint(20, (12, 5)), torch.randint(3, (12,))
    table = teacher.get_input_embeddings()
    embedded = table(tokens).detach()
    data = [{"inputs_embeds": x, "labels": each} for x, each in zip(embedded, y, strict=True)]
    networks = huggingface.EmbeddingInputs(student), huggingface.EmbeddingInputs(teacher)
    plain = copy.deepcopy(networks[0])
    trainer = JacmatchTrainer(objective(*networks), arguments(tmp_path), train_dataset=data)
    trainer.train()
    plain_loop(objective(plain, networks[1]), steps(12, 4, 1, embedded, y))
    assert difference(networks[0], plain) < 1e-6
    trainer.save_model(str(tmp_path / "out"))
    assert difference(transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out"), student) == 0


def test_a_lora_student(tmp_path):
    peft = pytest.importorskip("peft")
    base = vit(8)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"], lora_dropout=0.0)
    student = peft.get_peft_model(base, config)
    plain, teacher = copy.deepcopy(student), vit(16)
    start = copy.deepcopy(student)
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    train(objective(student, teacher, **SHARES), tmp_path, **settings)
    plain_loop(objective(plain, teacher, **SHARES), steps(16, 4))
    assert difference(student, plain) < 1e-6
    moved = {
        name
        for (name, before), after in zip(start.named_parameters(), student.parameters(), strict=True)
        if not torch.equal(before, after)
    }
    assert moved
    assert all("lora_" in name or "classifier" in name for name in moved)
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", STATE_FILE} <= names
    assert "model.safetensors" not in names
    other = copy.deepcopy(start)
    trainer = JacmatchTrainer(
        objective(other, teacher, **SHARES), arguments(tmp_path, **settings), train_dataset=DATA[:22]
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert difference(student, other) < 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": nn.Linear(1, 1)}, "that the objective replaces. Got model"),
        ({"compute_loss_func": max}, "Got compute_loss_func"),
        ({"smoothing": 0.1}, "Got label_smoothing_factor"),
    ],
)
def test_what_the_objective_replaces_is_refused(tmp_path, settings, message):
    args = arguments(tmp_path, label_smoothing_factor=settings.pop("smoothing", 0.0))
    with pytest.raises(InputError) as caught:
        JacmatchTrainer(objective(*networks()), args, **settings)
    assert message in str(caught.value)


def test_a_student_without_an_objective_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"`objective` of `TrainerModel` must be an objective\. Got Images"):
        JacmatchTrainer(Images(4), arguments(tmp_path))


def test_several_gpus_in_one_process_are_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(UnsupportedError, match="torchrun --nproc-per-node=N"):
        JacmatchTrainer(objective(*networks()), args)


def test_compute_loss_refuses_a_wrapped_student():
    student, teacher = networks()
    loss_of = huggingface.compute_loss(objective(student, teacher))
    with pytest.raises(UnsupportedError, match=r"Use JacmatchTrainer\(objective, args, \.\.\.\)"):
        loss_of(nn.DataParallel(student), {"pixel_values": X[:4], "labels": Y[:4]})


@pytest.mark.parametrize(
    ("batch", "name", "message"),
    [
        ({"pixel_values": X[:4], "ids": Y[:4]}, None, "must have the input None. Got 'pixel_values', 'ids'"),
        ({"pixel_values": X[:4]}, "images", "must have the input 'images'"),
    ],
)
def test_batches_that_an_objective_cannot_take_are_refused(batch, name, message):
    loss_of = huggingface.compute_loss(objective(*networks()), input_name=name)
    with pytest.raises(InputError) as caught:
        loss_of(nn.Linear(1, 1), batch)
    assert message in str(caught.value)


def test_masks_reach_both_networks():
    """Padding and its mask change nothing: neither the loss nor its gradient."""
    from transformers import BertConfig, BertForSequenceClassification

    size = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1}
    size |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    student, teacher = (
        huggingface.EmbeddingInputs(BertForSequenceClassification(BertConfig(vocab_size=9, **size)).double())
        for _ in range(2)
    )
    x, y, results = torch.randn(4, 3, 8, dtype=torch.float64), torch.tensor([0, 1, 1, 0]), []
    for pad in (0, 2):
        mask = torch.ones(4, 3 + pad).long()
        mask[:, 3:] = 0
        padded = torch.cat([x, torch.randn(4, pad, 8, dtype=torch.float64)], 1)
        loss_of = huggingface.compute_loss(Distillation(student, teacher, jacobians=1.0, probe=EveryRow()))
        student.zero_grad()
        loss = loss_of(student, {"inputs_embeds": padded, "attention_mask": mask, "labels": y})
        loss.backward()
        results.append((loss.detach(), student.model.classifier.weight.grad.clone()))
    torch.testing.assert_close(results[0], results[1])


def test_no_file_of_a_checkpoint_is_read_through_a_link(tmp_path):
    trainer = train(objective(vit(8), vit(16)), tmp_path, samples=8, save_strategy="epoch")
    folder = next(Path(tmp_path).glob("checkpoint-*"))
    (folder / STATE_FILE).rename(tmp_path / "elsewhere")
    (folder / STATE_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Exception, match="link"):
        trainer._load_from_checkpoint(str(folder))


def test_distillation_of_one_class_per_sample_keeps_its_default(tmp_path):
    """The defaults of `Distillation` train as they are, mixed pairs and all."""
    student, teacher = networks()
    trainer = train(Distillation(student, teacher, samples_per_class=5), tmp_path, samples=8)
    assert not isinstance(trainer.objective.differentiation.point, AtData)
    assert isinstance(trainer.objective.differentiation.probe, RandomOutputs)
