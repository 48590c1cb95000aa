"""Weights on disk: what is written, and everything that is refused."""

import os
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from jacmatch.errors import InputError
from jacmatch.models import Normalized, build, load_weights, save_weights


def small(seed=0, outputs=3):
    torch.manual_seed(seed)
    return build("vgg:4-M-6", outputs, (1, 8, 8), (0.3,), (0.4,))


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(small(), path)
    return path


def edited(saved, **changes):
    """A copy of the file with tensors replaced, or left out where None."""
    tensors = load_file(saved)
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    path = saved.with_name("edited.safetensors")
    save_file(tensors, path)
    return path


def refused(path, match, model=None, **options):
    """Loading fails with this message and changes nothing."""
    model = model or small(seed=1)
    before = state(model)
    with pytest.raises(InputError, match=match):
        load_weights(model, path, **options)
    assert same(state(model), before)


def test_the_file_is_plain_safetensors_with_the_models_own_scaling(saved):
    assert same(load_file(saved), state(small()))
    assert load_file(saved)["mean"].flatten().tolist() == pytest.approx([0.3])
    assert [entry.name for entry in saved.parent.iterdir()] == ["w.safetensors"]


def test_tied_and_transposed_tensors_are_written(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[0].bias.data = torch.randn(3, 2)[:, 0]
    save_weights(model, tmp_path / "w.safetensors")
    assert same(load_file(tmp_path / "w.safetensors"), state(model))


def test_loading_converts_to_the_modules_precision(saved):
    model = small(seed=1).double()
    load_weights(model, saved)
    assert model.classifier.weight.dtype == torch.float64
    assert torch.equal(model.classifier.weight.float(), small().classifier.weight)


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.ckpt", "w.pkl", "weights", "w.pth.tar"])
def test_pickles_are_read_only_on_request_and_the_message_says_how(tmp_path, name):
    torch.save(small().state_dict(), tmp_path / name)
    refused(tmp_path / name, r"must not be a pickle file.*Pass allow_pickle=True.*or convert it once: python -c")
    model = small(seed=1)
    load_weights(model, tmp_path / name, allow_pickle=True)
    assert same(state(model), state(small()))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    refused(tmp_path / "none.safetensors", "Weights must be a readable file. Got `.*none.safetensors` .No such file")
    (tmp_path / "folder.safetensors").mkdir()
    refused(tmp_path / "folder.safetensors", "must be a folder of weights. Got one without any of the known names")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_damaged_file_is_refused(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    refused(saved, "`.*w.safetensors` must be a complete safetensors file. Got ")


def test_something_else_under_that_name_is_refused(saved):
    saved.write_bytes(b"PK\x03\x04 not tensors at all")
    refused(saved, "must be a complete safetensors file")


def test_weights_of_another_model_list_what_differs(saved):
    refused(
        saved,
        r"must contain the weights of this ResNet. Got missing: conv1.weight, bn1.weight, bn1.bias and \d+ more; "
        r"not in the model: .*Build the model they were trained in",
        model=build("resnet8", 3, (1, 8, 8)),
    )


def test_weights_for_another_number_of_outputs_list_the_shapes(saved):
    refused(
        saved,
        r"Got of another shape: classifier.weight \(3, 6\), must be \(5, 6\), classifier.bias \(3,\), must be \(5,\)\. "
        r"These weights have 3 outputs and the model 5\. To fine-tune them for other classes: jacmatch train",
        model=small(outputs=5),
    )


def test_weights_for_other_channels_are_refused(saved):
    refused(saved, r"of another shape: mean \(1, 1, 1, 1\), must be \(1, 3", model=build("vgg:4-M-6", 3, (3, 8, 8)))


def test_one_missing_and_one_extra_tensor_are_refused(saved):
    path = edited(saved, **{"classifier.bias": None, "classifier.biases": torch.zeros(3)})
    refused(path, "Got missing: classifier.bias; not in the model: classifier.biases. As many")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(saved, value):
    path = edited(saved, **{"classifier.bias": torch.tensor([0.0, value, 1.0])})
    refused(path, "must contain finite weights. Got NaN or infinity in classifier.bias")


def test_weights_from_elsewhere_must_say_their_normalization(saved):
    path = edited(saved, mean=None, std=None)
    message = "must contain `mean` and `std`, by which.*`mean=.0.0,., std=.1.0,.`. if they were trained"
    refused(path, message)
    refused(path, message, mean=(0.5,))
    refused(path, "`mean` of `load_weights` must have one number", mean=(0.5, 0.5), std=(1.0,))
    model = small(seed=1)
    load_weights(model, path, mean=(0.5,), std=(0.25,))
    assert (model.mean.item(), model.std.item()) == (0.5, 0.25)
    assert torch.equal(model.classifier.weight, small().classifier.weight)


def test_half_a_normalization_is_a_missing_tensor(saved):
    refused(edited(saved, std=None), "Got missing: std. Build")


def test_a_normalization_beside_the_files_own_is_refused(saved):
    refused(
        saved,
        "`mean` and `std` of `load_weights` must not be given for a file that contains them. Leave them out",
        mean=(0.0,),
        std=(1.0,),
    )


def test_a_network_of_another_library_takes_its_bare_weights(tmp_path):
    inner = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    save_file(inner.state_dict(), tmp_path / "bare.safetensors")
    fresh = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    wrapped = Normalized(fresh, (1, 2, 2))
    load_weights(wrapped, tmp_path / "bare.safetensors", mean=(0.5,), std=(2.0,))
    x = torch.rand(3, 1, 2, 2)
    torch.testing.assert_close(wrapped(x), inner((x - 0.5) / 2))


def test_a_module_that_has_no_scaling_of_its_own_needs_none(tmp_path):
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    save_weights(first, tmp_path / "w.safetensors")
    load_weights(second, tmp_path / "w.safetensors")
    assert same(state(first), state(second))


def test_saving_needs_the_suffix_and_a_folder(tmp_path):
    with pytest.raises(InputError, match=r"`path` of `save_weights` must end in `.safetensors`. Got `.*w.pt`"):
        save_weights(small(), tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"a folder that exists and can be written. Got `.*` .No such file"):
        save_weights(small(), tmp_path / "none" / "w.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("failure", "caught"),
    [(OSError(28, "No space left on device"), InputError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_save_that_fails_leaves_the_old_file(saved, monkeypatch, failure, caught):
    content = saved.read_bytes()

    def fail(*_):
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(caught, match=r"No space left" if caught is InputError else None):
        save_weights(small(seed=1), saved)
    assert saved.read_bytes() == content
    assert [entry.name for entry in saved.parent.iterdir()] == ["w.safetensors"]


def test_without_safetensors_the_error_says_what_to_install(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    message = r"needs the package safetensors. Got .* Run: pip install 'jacmatch\[train\]'"
    refused(saved, f"`load_weights` {message}")
    with pytest.raises(InputError, match=f"`save_weights` {message}"):
        save_weights(small(), saved)
