"""`jacmatch transfer`: what they write, what can be loaded again."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import jacmatch
from jacmatch import datasets
from jacmatch.errors import InputError
from jacmatch.jacobian import PooledFeatures, run
from jacmatch.jobs import Train, Transfer, pretrained, teacher_distance
from jacmatch.jobs.layer_pairs import chosen_pairs, layers_by_resolution, named_pairs
from jacmatch.jobs.networks import Weights
from jacmatch.jobs.progress import Progress
from jacmatch.jobs.transfer import METHODS
from jacmatch.losses import hinton_kl
from jacmatch.models import Resized, build, save_weights

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
    result = Transfer(smoke=True, out=shared / "run").run()
    return shared / "run", result


@pytest.mark.ci
def test_every_method_has_a_row(finished):
    folder, result = finished
    assert [row["method"] for row in result["rows"]] == list(METHODS)
    assert {row["seeds"] for row in result["rows"]} == {1}
    assert json.loads((folder / "result.json").read_text())["job"] == "transfer"
    assert result["teacher"]["parameters"] > 60_000
    assert 0.2 < result["teacher"]["accuracy"] <= 1
    assert set(result["distances"]) == {"unseen", "source"}
    for row in result["rows"]:
        assert (row["bound"] is None) == (row["method"] in {"labels", "oracle"})
    printed = [line[0] for line in result["tables"][0]["rows"]]
    assert printed == list(METHODS.values())


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
    again = Transfer(smoke=True, out=folder).run()
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
    return {"x_train": x, "y_train": y, "x_test": x[:12], "y_test": y[:12]}


@pytest.mark.ci
def test_samples_that_are_no_images(shared):
    x, y = np.random.default_rng(0).random((30, 4), dtype=np.float32), np.arange(30) % 3
    np.savez(shared / "vectors.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(InputError, match=r"`--data` of `transfer` must be images\. Got samples of shape \(4,\)"):
        Transfer(data=f"npz:{shared}/vectors.npz", smoke=True).run()


@pytest.mark.ci
def test_images_of_other_channels(shared):
    network = build("cnn3", outputs=3, shape=(3, 8, 8))
    save_weights(network, shared / "colour.safetensors")
    with pytest.raises(InputError, match=r"must hold the weights of this VGG\. Got of another shape"):
        pretrained.from_weights("cnn3", 3, (1, 8, 8), 12, Weights(shared / "colour.safetensors"))
    with pytest.raises(InputError, match=r"must take images that can be resized from \(1, 6, 6\)\. Got .*\(1, 8, 9\)"):
        pretrained._fitted(network, (1, 8, 9), (1, 6, 6))


@pytest.mark.ci
def test_a_teacher_without_a_last_layer_is_not_fine_tuned():
    description = pretrained.Description("mlp:4", 3, (1, 8, 8), (0.0,), (1.0,))
    other = build("mlp:5", outputs=3, shape=(1, 8, 8))
    teacher = pretrained.Pretrained(other, description, (1, 8, 8))
    with pytest.raises(InputError, match=r"outputs in a last linear layer to be fine-tuned\. Got \d tensors"):
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
    teacher = pretrained.from_weights("cnn3", 4, (1, 8, 8), 12, Weights(shared / "w.safetensors"))
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
    pooled = teacher_distance.features(teacher, "features.conv1", X)
    _, features = run(teacher, X, ("features.conv1",))
    torch.testing.assert_close(pooled, features["features.conv1"].mean((2, 3)).detach())
    assert PooledFeatures("features.conv1").size == 1


@pytest.mark.ci
@pytest.mark.parametrize("loss", ["squared", "kl"])
def test_the_terms_of_the_bound_are_those_of_the_networks(loss):
    student, teacher = (build("mlp:5-tanh", outputs=count, shape=(1, 8, 8)).eval() for count in (2 + 3, 3))
    near, far = X[:2], X[2:]
    bound = teacher_distance.bound(student, teacher, 2, loss, 2.0, near, far)
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
    np.savez(shared / "sorted.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    Train(
        data=f"npz:{shared}/sorted.npz",
        model="cnn3",
        smoke=True,
        validation=0.0,
        out=shared / "sorted",
    ).run()
    job = Transfer(
        data=f"npz:{shared}/sorted.npz",
        teacher=str(shared / "sorted"),
        student="cnn3",
        methods=("lwf",),
    )
    data = job.ready(Progress(quiet=True)).data
    assert set(data.test.y[:12].tolist()) == {0, 1, 2}
    assert torch.equal(data.test.x.flatten(1).sort(0).values, torch.from_numpy(x).flatten(1).sort(0).values)
    for split, count in ((data.train, 12), (data.train, 100)):
        first = teacher_distance.mixed(split, count)
        assert len(first) == min(count, 60)
        assert set(first.y.tolist()) == {0, 1, 2}
        assert torch.equal(first.x, teacher_distance.mixed(split, count).x)


@pytest.mark.ci
def test_nearest_means():
    train = datasets.Split(torch.tensor([[0.0], [2.0], [10.0], [12.0]]), torch.tensor([0, 0, 1, 1]))
    test = datasets.Split(torch.tensor([[5.0], [7.0], [6.5]]), torch.tensor([0, 1, 0]))
    assert teacher_distance.nearest_mean_accuracy(nn.Identity(), train, test, 2) == pytest.approx(2 / 3)
