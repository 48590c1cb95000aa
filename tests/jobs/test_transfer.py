"""`jacmatch transfer`: what they write, what can be loaded again."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import jacmatch
from jacmatch import datasets
from jacmatch.errors import InputError
from jacmatch.jacobian import PooledFeatures, run
from jacmatch.jobs import Train, Transfer, transfer_results
from jacmatch.jobs import teachers as pretrained
from jacmatch.jobs.networks import Weights
from jacmatch.jobs.settings import mixed, without_labels
from jacmatch.jobs.study import Cell, Progress
from jacmatch.jobs.transfer_results import (
    METHODS,
    PAPER,
    RECIPES,
    chosen_pairs,
    layers_by_resolution,
    loss_falls,
    named_pairs,
    not_converged,
    useless_probe,
)
from jacmatch.losses import hinton_kl
from jacmatch.models import Resized, build, save_weights
from jacmatch.runs import Run
from jacmatch.training import Training

X = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transfer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JACMATCH_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def finished(shared):
    result = Transfer(recipe="paper", smoke=True, out=shared / "run").run()
    return shared / "run", result


@pytest.mark.ci
def test_every_method_has_a_row(finished):
    folder, result = finished
    assert [row["method"] for row in result["rows"]] == list(PAPER)
    assert {row["seeds"] for row in result["rows"]} == {1}
    assert json.loads((folder / "result.json").read_text())["job"] == "transfer"
    assert result["teacher"]["parameters"] > 60_000
    assert 0.2 < result["teacher"]["accuracy"] <= 1
    assert set(result["distances"]) == {"unseen", "source"}
    for row in result["rows"]:
        assert (row["bound"] is None) == (row["method"] in {"labels", "oracle"})
    printed = [line[0] for line in result["tables"][0]["rows"]]
    assert printed == [METHODS[method] for method in PAPER]


@pytest.mark.ci
def test_the_bound_of_the_result_holds_and_its_terms_add_up(finished):
    _, result = finished
    apart = result["distances"]["unseen"]["pixels"]
    for row in result["rows"]:
        if row["bound"] is not None:
            bound = {key: value["mean"] for key, value in row["bound"].items()}
            assert bound["rho_unseen"] <= min(bound["by_hausdorff"], bound["by_nearest"], bound["by_transport"]) + 1e-9
            assert bound["by_hausdorff"] == pytest.approx(bound["rho_largest"] + bound["slope"] * apart["hausdorff"])
            assert bound["by_transport"] == pytest.approx(bound["rho_average"] + bound["slope"] * apart["wasserstein"])


@pytest.mark.ci
def test_the_student_that_is_saved_has_the_outputs_of_the_target(finished):
    folder, _ = finished
    student = jacmatch.load_student(folder)
    assert student(X).shape == (6, 5)
    last = folder / "seed0" / "lwf+attention+jacobians"
    accuracy = json.loads((last / "result.json").read_text())["student"]["accuracy"]
    data = Transfer(smoke=True).ready(Progress(quiet=True)).data
    with torch.no_grad():
        right = (jacmatch.load_student(last)(data.test.inputs()).argmax(1) == data.test.y).double().mean()
    assert float(right) == pytest.approx(accuracy)


@pytest.mark.ci
def test_what_is_done_is_not_done_again(finished, monkeypatch):
    folder, result = finished
    (folder / "result.json").unlink()
    monkeypatch.setattr("jacmatch.jobs.study.fit", lambda *_, **__: pytest.fail("trained again"))
    again = Transfer(recipe="paper", smoke=True, out=folder).run()
    assert again["rows"] == result["rows"]


@pytest.mark.ci
def test_a_run_as_teacher_for_images_of_another_size(shared):
    np.savez(shared / "small.npz", **arrays(6))
    np.savez(shared / "large.npz", **arrays(12))
    Train(
        data=f"npz:{shared}/large.npz",
        model="cnn3",
        smoke=True,
        validation=0.0,
        out=shared / "teacher",
    ).run()
    job = Transfer(
        data=f"npz:{shared}/small.npz",
        teacher=str(shared / "teacher"),
        student="cnn3",
        methods=("oracle", "lwf+attention+jacobians"),
        pairs=("features.conv2:features.conv2",),
        per_class=4,
        validation=0.0,
        smoke=True,
        out=shared / "resized",
    )
    ready = job.ready(Progress(quiet=True))
    assert isinstance(ready.teacher.network, Resized)
    assert ready.pairs == (("features.conv2", "network.features.conv2"),)
    assert ready.teacher.with_outputs(7)(torch.rand(2, 1, 6, 6)).shape == (2, 7)
    result = job.run()
    assert set(result["distances"]) == {"unseen"}
    assert jacmatch.load_student(shared / "resized")(torch.rand(2, 1, 6, 6)).shape == (2, 3)


def arrays(side):
    generator = np.random.default_rng(0)
    x, y = generator.random((30, 1, side, side), dtype=np.float32), np.arange(30) % 3
    return {"x_train": x, "y_train": y, "x_test": 1 - x[:12], "y_test": y[:12]}


@pytest.mark.ci
def test_samples_that_are_no_images(shared):
    x, y = np.random.default_rng(0).random((30, 4), dtype=np.float32), np.arange(30) % 3
    np.savez(shared / "vectors.npz", x_train=x, y_train=y, x_test=1 - x, y_test=y)
    with pytest.raises(InputError, match=r"`--data` of `transfer` must be images\. Got samples of shape \(4,\)"):
        Transfer(data=f"npz:{shared}/vectors.npz", smoke=True).run()


@pytest.mark.ci
def test_images_of_other_channels(shared):
    network = build("cnn3", outputs=3, shape=(3, 8, 8))
    save_weights(network, shared / "colour.safetensors")
    with pytest.raises(InputError, match=r"must contain the weights of this VGG\. Got of another shape"):
        pretrained.pretrained("cnn3", 3, (1, 8, 8), Weights(shared / "colour.safetensors", size=12))
    with pytest.raises(
        InputError, match=r"input must be images to which \(1, 6, 6\) can be resized\. Got .*\(1, 8, 9\)"
    ):
        pretrained._fitted(network, (1, 8, 9), (1, 6, 6))


@pytest.mark.ci
def test_a_teacher_without_a_last_layer_is_not_fine_tuned():
    description = pretrained.Description("mlp:4", 3, (1, 8, 8), (0.0,), (1.0,))
    other = build("mlp:5", outputs=3, shape=(1, 8, 8))
    teacher = pretrained.Pretrained(other, description, (1, 8, 8))
    with pytest.raises(InputError, match=r"to be fine-tuned for other classes\. Got \d tensors"):
        teacher.with_outputs(2)


@pytest.mark.ci
@pytest.mark.parametrize("outputs", [4, 6], ids=["as many outputs", "other outputs"])
def test_the_last_layer_is_new_and_all_else_the_teachers(outputs):
    description = pretrained.Description("cnn3", 4, (1, 8, 8), (0.0,), (1.0,))
    teacher = pretrained.Pretrained(description.build(), description, (1, 8, 8))
    torch.manual_seed(3)
    copy, drawn = teacher.with_outputs(outputs), torch.rand(1)
    torch.manual_seed(3)
    fresh = pretrained.replace(description, outputs=outputs).build().state_dict()
    assert torch.equal(torch.rand(1), drawn), "as many random numbers as one network takes"
    for name, value in copy.state_dict().items():
        source = fresh if name.startswith("classifier") else teacher.network.state_dict()
        assert torch.equal(value, source[name]), name
    assert not torch.equal(copy.classifier.bias[:4], teacher.network.classifier.bias)


@pytest.mark.ci
def test_weights_of_a_file_keep_their_statistics(shared):
    network = build("cnn3", outputs=4, shape=(1, 12, 12), mean=(0.25,), std=(0.5,))
    save_weights(network, shared / "w.safetensors")
    teacher = pretrained.pretrained("cnn3", 4, (1, 8, 8), Weights(shared / "w.safetensors", size=12))
    wide = nn.functional.interpolate(X, (12, 12), mode="bilinear")
    torch.testing.assert_close(teacher.network(X), network.eval()(wide))
    assert teacher.description.mean == (0.25,)
    copy = teacher.with_outputs(3)
    own, new = teacher.network.network.state_dict(), copy.network.state_dict()
    assert [name for name in own if own[name].shape != new[name].shape] == ["classifier.weight", "classifier.bias"]
    assert all(torch.equal(own[name], new[name]) for name in own if not name.startswith("classifier"))


@pytest.mark.ci
def test_layers_are_the_last_of_each_resolution():
    student, teacher = (build(spec, outputs=3, shape=(1, 8, 8)) for spec in ("cnn3", "cnn5"))
    assert layers_by_resolution(student, (1, 8, 8)) == ["features.conv1", "features.conv2", "features"]
    deep = build("vgg:4-M-4-M-4-M-4", outputs=3, shape=(1, 32, 32))
    small = build("vgg:4-M-4", outputs=3, shape=(1, 32, 32))
    pairs = chosen_pairs(small, deep, (1, 32, 32), 5)
    assert pairs == (("features.conv1", "features.conv1"), ("features", "features"))
    assert chosen_pairs(student, teacher, (1, 8, 8), 1) == (("features", "features"),)
    with pytest.raises(InputError, match=r"The student must have feature maps with more than one pixel\. Got none"):
        chosen_pairs(build("mlp:4", outputs=3, shape=(1, 8, 8)), teacher, (1, 8, 8), 1)
    wrapped = Resized(teacher, (1, 4, 4), 8)
    assert named_pairs(["features.conv1:features.conv3"], student, wrapped) == (
        ("features.conv1", "network.features.conv3"),
    )
    with pytest.raises(InputError, match=r"A layer of the teacher in `--pairs` must be a known name\. Got 'conv9'"):
        named_pairs(["features.conv1:conv9"], student, wrapped)
    with pytest.raises(InputError, match=r"Each of `--pairs` must be STUDENT_LAYER:TEACHER_LAYER\. Got 'features'"):
        named_pairs(["features"], student, wrapped)


@pytest.mark.ci
def test_features_are_the_pooled_means():
    teacher = build("cnn3", outputs=3, shape=(1, 8, 8)).eval()
    pooled = transfer_results.features(teacher, "features.conv1", X)
    _, features = run(teacher, X, ("features.conv1",))
    torch.testing.assert_close(pooled, features["features.conv1"].mean((2, 3)).detach())
    assert PooledFeatures("features.conv1").size == 1


@pytest.mark.ci
@pytest.mark.parametrize("loss", ["squared", "kl"])
def test_the_terms_of_the_bound_are_those_of_the_networks(loss):
    student, teacher = (build("mlp:5-tanh", outputs=count, shape=(1, 8, 8)).eval() for count in (2 + 3, 3))
    near, far = X[:2], X[2:]
    bound = transfer_results.bound(student, teacher, 2, loss, 2.0, near, far)
    with torch.no_grad():
        pairs = [(student(x)[:, 2:], teacher(x)) for x in (far, near)]
        rho = [hinton_kl(s, t, 2.0) if loss == "kl" else (s - t).norm(dim=1) for s, t in pairs]
    assert bound["rho_unseen"] == pytest.approx(float(rho[0].mean()), rel=1e-5)
    assert bound["rho_largest"] == pytest.approx(float(rho[1].max()), rel=1e-5)
    for a, p in zip(rho[0], far, strict=True):
        for b, q in zip(rho[1], near, strict=True):
            assert bound["slope"] >= float((a - b).abs() / (p - q).norm()) - 1e-6


@pytest.mark.ci
def test_unseen_images_are_of_mixed_classes_where_the_files_are_sorted(shared):
    x, y = np.random.default_rng(0).random((60, 1, 6, 6), dtype=np.float32), np.arange(60) // 20
    for name in ("sorted", "other"):
        np.savez(shared / f"{name}.npz", x_train=1 - x, y_train=y, x_test=x, y_test=y)
    Train(
        data=f"npz:{shared}/sorted.npz",
        model="cnn3",
        smoke=True,
        validation=0.0,
        out=shared / "sorted",
    ).run()
    job = Transfer(
        data=f"npz:{shared}/other.npz",
        teacher=str(shared / "sorted"),
        student="cnn3",
        methods=("lwf",),
    )
    data = job.ready(Progress(quiet=True)).data
    assert set(data.test.y[:12].tolist()) == {0, 1, 2}
    assert torch.equal(data.test.x.flatten(1).sort(0).values, torch.from_numpy(x).flatten(1).sort(0).values)
    for split, count in ((data.train, 12), (data.train, 100)):
        first = mixed(split, count)
        assert len(first) == min(count, 60)
        assert set(first.y.tolist()) == {0, 1, 2}
        assert torch.equal(first.x, mixed(split, count).x)


@pytest.mark.ci
def test_nearest_means():
    train = datasets.Split(torch.tensor([[0.0], [2.0], [10.0], [12.0]]), torch.tensor([0, 0, 1, 1]))
    test = datasets.Split(torch.tensor([[5.0], [7.0], [6.5]]), torch.tensor([0, 1, 0]))
    assert transfer_results.nearest_mean_accuracy(nn.Identity(), train, test, 2) == pytest.approx(2 / 3)


@pytest.fixture(scope="module")
def adapted(shared):
    methods = ("mixup", "adapt", "adapt+attention", "adapt+jacobians", "features+jacobians", "lwf")
    settings = {"unlabelled": "digits", "unlabelled_count": 20, "per_class": 4}
    job = Transfer(smoke=True, **settings, methods=methods, out=shared / "adapted")
    return shared / "adapted", job.run()


@pytest.mark.ci
def test_recipes_share_one_result(adapted):
    folder, result = adapted
    rows = {row["method"]: row for row in result["rows"]}
    assert result["unlabelled_samples"] == 20
    more = result | {"settings": result["settings"] | {"unlabelled_count": 10**6}}
    assert "20 unlabeled training images (all there are), " in transfer_results.tables(more)[0].notes[0]
    assert "all there are" not in result["tables"][0]["notes"][0]
    assert 0.2 < result["teacher"]["probe_accuracy"]["mean"] <= 1
    assert len(result["teacher"]["probe_accuracy"]["values"]) == 1, "one teacher for a seed, not one for a method"
    data = Transfer(smoke=True, per_class=4).ready(Progress(quiet=True)).data
    held_out = Transfer(smoke=True, per_class=4).parts(data, 4, 0)[1]
    assert result["validation_samples"] == len(held_out) > 0
    assert f"{len(held_out)} labeled images held out" in result["tables"][0]["notes"][0]
    assert result["resolved"] == {"point": "mixed-pairs", "output_loss": "kl", "temperature": 1.0}
    assert rows["mixup"]["bound"] is None
    assert rows["mixup"]["agreement"]["top1"] is None
    for method in ("adapt", "adapt+jacobians", "features+jacobians"):
        assert -1 <= rows[method]["agreement"]["jacobian_cosine"]["mean"] <= 1
        assert rows[method]["agreement"]["jacobian_relative_error"]["mean"] > 0
    assert rows["adapt+attention"]["agreement"]["attention_cosine"]["mean"] > 0
    assert "Learning curves" in (folder / "report.html").read_text()
    for method in rows:
        assert jacmatch.load_student(folder / "seed0" / method)(X).shape == (6, 5)
    held_out = {method: row["validation_accuracy"]["mean"] for method, row in rows.items()}
    assert held_out[result["method"]] == max(held_out.values())
    best = folder / "seed0" / result["method"]
    torch.testing.assert_close(jacmatch.load_student(folder)(X), jacmatch.load_student(best)(X))


@pytest.mark.ci
@pytest.mark.parametrize(("accuracies", "tuned"), [((0.5, 0.6), True), ((0.6, 0.6), False)])
def test_the_better_adapted_teacher_on_held_out_images_is_taken(ready, monkeypatch, accuracies, tuned):
    job = Transfer(smoke=True, per_class=4)
    labelled, held_out = job.parts(ready.data, 4, 0)
    ready = jacmatch.jobs.transfer.replace(ready, memories={}, adapted={})
    given = iter(accuracies)
    seen = []

    def evaluate(network, split, device):
        seen.append(split)
        return {"accuracy": next(given)}

    monkeypatch.setattr("jacmatch.jobs.transfer.evaluate", evaluate)
    network = job.taught("adapt", ready, labelled, None, 0, held_out).teacher.network
    pretrained_features = ready.teacher.network.features.state_dict()
    moved = any(
        not torch.equal(value, pretrained_features[name]) for name, value in network.features.state_dict().items()
    )
    assert moved == tuned
    assert seen == [held_out, held_out]
    again = job.taught("adapt+jacobians", ready, labelled, None, 0, held_out)
    assert again.teacher.network is network


@pytest.mark.ci
def test_without_held_out_images_the_teacher_has_a_probe(ready):
    job = Transfer(smoke=True, per_class=4, validation=0.0)
    labelled, held_out = job.parts(ready.data, 4, 0)
    assert held_out is None
    ready = jacmatch.jobs.transfer.replace(ready, memories={}, adapted={})
    network = job.taught("adapt", ready, labelled, None, 0).teacher.network
    before = ready.teacher.network.features.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in network.features.state_dict().items())


def test_each_recipe_names_methods_that_exist():
    assert all(method in METHODS for recipe in RECIPES.values() for method in recipe.methods)
    assert Transfer().chosen == RECIPES["adapt"].methods
    assert Transfer(recipe="paper").chosen == PAPER


@pytest.fixture(scope="module")
def ready(shared):
    return Transfer(smoke=True).ready(Progress(quiet=True))


@pytest.mark.ci
def test_unlabelled_images_are_those_of_the_target_that_are_left(ready):
    job = Transfer(smoke=True, unlabelled="digits", per_class=4)
    labelled, held_out = job.parts(ready.data, 4, 0)
    images = job.unlabelled_images(ready, labelled, 0)
    rows = [{tuple(x.flatten().tolist()) for x in split.x} for split in (labelled, held_out, images)]
    assert not rows[2] & (rows[0] | rows[1])
    assert len(images) == len(job.parts(ready.data, 0, 0)[0]) - len(labelled)
    train = Transfer.training_images("lwf", labelled, images)
    assert (train.y == -100).sum() == len(images)
    assert train.y[: len(labelled)].tolist() == labelled.y.tolist()
    assert len(job.training_images("mixup", labelled, images)) == len(labelled)
    assert len(job.training_images("adapt", labelled, images)) == len(labelled) + len(images)
    with pytest.raises(InputError, match=r"`--unlabelled` of `transfer` must leave images that are not labeled"):
        Transfer(smoke=True, unlabelled="digits", per_class=0).unlabelled_images(ready, labelled, 0)


def test_unlabelled_images_need_no_labels(tmp_path):
    x = np.random.default_rng(0).integers(0, 255, (3, 1, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x_train=x)
    for row, image in enumerate(x):
        Image.fromarray(image[0]).save(tmp_path / f"{row}.png")
    for spec in (f"npz:{tmp_path}/images.npz", f"folder:{tmp_path}"):
        assert (without_labels(spec, 0).train.stored().numpy() == x).all()
    assert without_labels(f"folder:{tmp_path}@4", 0).shape == (1, 4, 4)
    assert without_labels("digits", 0).classes == 10


@pytest.mark.ci
def test_unlabelled_images_of_another_scale(shared):
    np.savez(shared / "bytes.npz", x_train=100 * np.random.default_rng(0).random((9, 1, 8, 8), dtype=np.float32))
    job = Transfer(smoke=True, unlabelled=f"npz:{shared}/bytes.npz")
    with pytest.raises(InputError, match=r"must be on the scale of --data.* times its standard deviation\. Rescale"):
        job.ready(Progress(quiet=True))


@pytest.mark.ci
def test_unlabelled_images_of_another_size(shared):
    np.savez(shared / "large2.npz", **arrays(12))
    job = Transfer(smoke=True, unlabelled=f"npz:{shared}/large2.npz")
    with pytest.raises(InputError, match=r"must be images of shape \(1, 8, 8\), as --data has\. Got \(1, 12, 12\)"):
        job.ready(Progress(quiet=True))


@pytest.mark.ci
def test_a_teacher_of_the_classes_of_the_target(shared):
    np.savez(shared / "same.npz", **arrays(6))
    Train(data=f"npz:{shared}/same.npz", model="cnn3", smoke=True, validation=0.0, out=shared / "same").run()
    job = Transfer(data=f"npz:{shared}/same.npz", teacher=str(shared / "same"), student="cnn3")
    with pytest.raises(InputError, match=r"trained on classes other than those of --data.*Use `jacmatch distill"):
        job.ready(Progress(quiet=True))


@pytest.mark.ci
def test_a_student_larger_than_its_teacher_is_a_note(ready):
    larger = dataclasses.replace(ready, description=pretrained.Description.of("vgg4", ready.data))
    students = [Transfer(smoke=True).network_of("mixup", each) for each in (ready, larger)]
    assert transfer_results.larger_student(students[0], ready.teacher.network) == []
    (note,) = transfer_results.larger_student(students[1], ready.teacher.network)
    assert note.startswith("The student has more parameters than its teacher")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unlabelled_count": 3}, r"`--unlabelled-count` of `transfer` must be used with --unlabelled"),
        ({"unlabelled": "digits", "unlabelled_count": -1}, r"`--unlabelled-count` of `transfer` must be at least 0"),
        ({"adapt_steps": -1}, r"`--adapt-steps` of `transfer` must be at least 0"),
        (
            {"probe": "data-pairs", "methods": ("adapt", "adapt+attention+jacobians")},
            r"`--probe` of `transfer` must be used with a method .*Got --probe data-pairs and adapt adapt\+attention",
        ),
        ({"feature_components": 0}, r"`--feature-components` of `transfer` must be at least 1"),
        (
            {"unlabelled": "digits", "methods": ("mixup",)},
            r"`--unlabelled` of `transfer` must be used with a method that",
        ),
        (
            {"teacher_weights": Path("w.pth"), "teacher_steps": 9},
            r"`--teacher-steps` of `transfer` must be used with a t",
        ),
        (
            {"teacher": "hf:m", "source_classes": 3},
            r"`--source-classes` of `transfer` must be used with a teacher that i",
        ),
        ({"teacher_outputs": 5}, r"`--teacher-outputs` of `transfer` must be used with --teacher-weights"),
        ({"recipe": "lwf", "adapt_steps": 0}, r"`--adapt-steps` of `transfer` must be used with --methods adapt"),
        (
            {"oracle_steps": 9},
            r"`--oracle-steps` of `transfer` must be used with --methods oracle\. Got --oracle-steps 9",
        ),
        (
            {"whiten": True},
            r"`--whiten` of `transfer` must be used with --methods features\. Got --whiten True and mixup",
        ),
        (
            {"outputs_share": 0.5},
            r"`--outputs-share` of `transfer` must be used with lwf or features: adapt has --output",
        ),
        (
            {"methods": ("labels",), "labels_weight": 2.0},
            r"`--labels-weight` of `transfer` must be used with a method th",
        ),
        (
            {"recipe": "paper", "temperature": 3.0},
            r"`--temperature` of `transfer` must be used with an output term of kl",
        ),
        (
            {"attention_share": 0.5},
            r"`--attention-share` of `transfer` must be used with a method that compares attentio",
        ),
        ({"pool": 2}, r"`--pool` of `transfer` must be used with a method that compares attention maps"),
        ({"methods": ("adapt",), "every": 2}, r"`--every` of `transfer` must be used with a method with Jacobians"),
        ({"noise": 0.2}, r"`--noise` of `transfer` must be used with --probe noise-averaged"),
        (
            {"probe_basis": "pca"},
            r"`--probe-basis` of `transfer` must be used with --probe subspace-inputs.*Leave out --",
        ),
        ({"recipe": "paper", "oracle_steps": 4, "warmup": 9}, r"`warmup` of `Training` must not be longer than `steps"),
    ],
)
def test_settings_of_recipes_that_are_wrong(settings, message):
    with pytest.raises(InputError, match=message):
        Transfer(**settings).check()


def test_the_fall_of_a_loss_compares_the_end_with_the_middle_and_the_start():
    rows = [{"step": step, "loss": 9.0, "labels": 1.0, "outputs": 100.0 - step} for step in range(1, 101)]
    middle, end = (sum(range(101 - b, 101 - a)) / 20 for a, b in ((50, 70), (80, 100)))
    assert loss_falls(rows, 100) == pytest.approx((1 - end / middle, 1 - end / 100))
    assert loss_falls([{"step": step, "loss": 1.0, "labels": 1.0} for step in range(1, 101)], 100) == (0, 0)
    assert loss_falls([{"step": 1, "validation_accuracy": 0.5}], 2) is None
    assert loss_falls(rows, 100, ("labels",)) == (0, 0)
    few = [{"step": step, "loss": 1.0, "labels": loss} for step, loss in ((10, 1.0), (25, 0.9))]
    assert loss_falls(few, 25) == (0, pytest.approx(0.1))


def test_a_probe_that_is_no_better_than_labels_is_a_note():
    rows = {"mixup": {"accuracy": {"mean": 0.8}}}
    (note,) = useless_probe(rows, [0.7, 0.8])
    assert note.startswith(
        "The probed teacher has 75.0% accuracy, no more than a student trained on labels alone (80.0%)"
    )
    assert useless_probe(rows, [0.7, 0.95]) == useless_probe(rows, []) == useless_probe({}, [0.1]) == []


def test_a_run_that_has_not_converged_says_so(tmp_path):
    run = Run.create(tmp_path / "run", "transfer", {}, "0.1.0")
    curves = {"mixup": (1.0, 1.0, 0.5), "adapt": (1.0, 0.5, 0.45), "lwf": (1.0, 0.85, 0.8)}
    cells = [Cell(0, method, METHODS[method], Training(), None) for method in curves]
    for cell, losses in zip(cells, curves.values(), strict=True):
        child = cell.folder(run)
        for step in range(1, 101):
            others = {"outputs": float(300 - 2 * step)} if cell.method == "lwf" else {}  # their weight is a share
            child.log({"step": step, "loss": 1.0, "labels": losses[(step > 25) + (step > 75)], **others})
    assert not_converged(run, [(cell, {"steps": 100}) for cell in cells]) == [
        "labels, mixed pairs has not converged: its loss fell by 50% in the end. Give more --steps.",
        "LwF: labels + outputs has not converged: its loss fell by only 20% in all. Give more --steps.",
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"recipe": "paper", "oracle_steps": 3, "pool": 2, "attention_weight": 1.0, "every": 2, "source_classes": 4},
        {"recipe": "features", "whiten": True, "outputs_share": 0.5, "probe": "noise-averaged", "noise": 0.2},
        {"probe": "subspace-inputs", "probe_basis": "pca", "temperature": 2.0, "adapt_steps": 0, "labels_weight": 0.1},
        {"methods": ("lwf+jacobians",), "p": 3.0, "outputs_weight": 0.5, "unlabelled": "digits"},
    ],
)
def test_settings_of_recipes_that_are_used(settings):
    Transfer(**settings).check()


@pytest.mark.ci
def test_the_target_under_another_name_has_no_image_that_is_held_out(shared, monkeypatch):
    monkeypatch.setitem(datasets.catalog.LOADERS, "other", datasets.catalog.LOADERS["digits"])
    job = Transfer(smoke=True, unlabelled="other", per_class=4)
    assert job.ready(Progress(quiet=True)).unlabelled is None


@pytest.mark.ci
@pytest.mark.parametrize("basis", ["pca", "data"])
def test_directions_are_those_of_the_images_that_are_learned_from(ready, basis):
    """Neither held-out images nor those beyond --unlabelled-count are seen."""
    settings = {"per_class": 2, "unlabelled": "digits", "unlabelled_count": 6, "probe": "subspace-inputs"}
    job = Transfer(smoke=True, **settings, probe_basis=basis)
    labelled, _ = job.parts(ready.data, 2, 0)
    images = job.unlabelled_images(ready, labelled, 0)
    fresh = jacmatch.jobs.transfer.replace(ready, memories={}, adapted={})
    taught = job.taught("adapt+jacobians", fresh, labelled, images, 0)
    probe = job.objective("adapt+jacobians", job.network_of("adapt+jacobians", taught), taught).differentiation.probe
    x = torch.cat([labelled.inputs(), images.inputs()]).flatten(1)
    assert len(x) == 16
    assert probe.k == 15
    span = torch.linalg.qr((x - x.mean(0)).mT.double())[0][:, :15]
    torch.testing.assert_close((probe.vectors.double() @ span).norm(dim=1), torch.ones(15, dtype=torch.float64))


@pytest.mark.ci
def test_a_warm_up_may_be_longer_than_the_fine_tuning_of_a_teacher(ready):
    job = Transfer(smoke=True, per_class=4, steps=400, warmup=300)
    labelled, held_out = job.parts(ready.data, 4, 0)
    job = jacmatch.jobs.transfer.replace(job, smoke=False, adapt_steps=2)
    fresh = jacmatch.jobs.transfer.replace(ready, memories={}, adapted={})
    assert job.taught("adapt", fresh, labelled, None, 0, held_out).teacher.network(X).shape == (6, 5)
