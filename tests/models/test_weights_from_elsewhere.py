"""Weights as other libraries and training scripts leave them: read right, or refused with a remedy that works."""

import argparse
import io
import json
import pickle
import shlex
import subprocess
import sys
import tarfile
import types
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_model
from torch import nn

from jacmatch.errors import InputError
from jacmatch.models import build, convert_weights, load_weights, save_weights, weight_files

from .other_weights import Net, X, loads, prefixed, refused, saved, trained, written


# pytorch #3805, huggingface/pytorch-image-models #2003, open-mmlab/mmrazor #650, sming256/OpenTAD #44: what wrappers
# and scripts put before the names.
@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "ema_model.", "model.", "a.b.c."]
)
def test_prefixes_are_left_out(tmp_path, prefix):
    net = trained()
    loads(net, written(tmp_path, prefixed(prefix, net.state_dict())))


def test_wrappers_within_the_names_and_around_the_module(tmp_path):
    net = trained()
    inner = {name.replace("bn.", "bn._orig_mod."): value for name, value in net.state_dict().items()}
    loads(net, written(tmp_path, inner))
    loads(net, written(tmp_path, net.state_dict()), nn.DataParallel(Net()))


@pytest.mark.ci
def test_a_compiled_module_takes_bare_names(tmp_path):
    net = trained()
    loads(net, written(tmp_path, net.state_dict()), torch.compile(Net(), backend="eager"))


def test_averages_of_torch_and_counters_of_thop_need_no_counterpart(tmp_path):
    net = trained()
    average = torch.optim.swa_utils.AveragedModel(net)
    counted = {**average.state_dict(), "module.conv.total_ops": torch.zeros(1), "total_params": torch.zeros(1)}
    loads(net, written(tmp_path, counted))


def test_counters_of_batch_norm_may_be_missing(tmp_path):
    net = trained()
    loads(net, written(tmp_path, {k: v for k, v in net.state_dict().items() if "num_batches" not in k}))


def test_statistics_of_batch_norm_may_not(tmp_path):
    part = {k: v for k, v in trained().state_dict().items() if "running_mean" not in k}
    refused(written(tmp_path, part), "must contain the weights of this Net. Got missing: bn.running_mean. Build")


# huggingface/transformers #38870, #30202: tensors of two names are written once.
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("owner", ["a", "b"])
def test_tied_weights_may_be_there_once(tmp_path, owner):
    net, other, x = Tied(), Tied(), torch.rand(3, 4)
    save_model(net, str(tmp_path / "w.safetensors"))
    loads(net, tmp_path / "w.safetensors", other, x)
    part = {k: v for k, v in net.state_dict().items() if k.endswith("bias") or k.startswith(owner)}
    loads(net, written(tmp_path, prefixed("model.", part)), Tied(), x)
    assert other.b.weight is other.a.weight


def test_tied_weights_are_not_two_values(tmp_path):
    state = {**Tied().state_dict(), "b.weight": torch.zeros(4, 4)}
    refused(
        written(tmp_path, state), "must contain equal tensors a.weight and b.weight, which this module ties", Tied()
    )


# IntelLabs/distiller #102, winycg/CLIP-KD #9, checkpoints of RepDistiller, timm, DeiT and Lightning.
def checkpoints(net):
    state = net.state_dict()
    optimizer = torch.optim.Adam(net.parameters())
    net(X).sum().backward()
    optimizer.step()
    return {
        "bare": state,
        "model": {"epoch": 240, "model": state, "best_acc": torch.tensor(79.4)},
        "numpy": {"epoch": 3, "state_dict": state, "best_acc": np.float64(79.4), "curve": np.ones(3)},
        "timm": {"arch": "resnet", "state_dict": state, "args": argparse.Namespace(lr=0.1), "metric": 3.0},
        "optimizer": {"net": prefixed("module.", state), "optimizer": optimizer.state_dict(), "epoch": 1},
        "nested": {"checkpoint": {"model_state_dict": state}},
        "module": net,
        "module in a dictionary": {"epoch": 5, "model": net, "optimizer": None},
        "lightning": {
            "state_dict": {**prefixed("model.", state)},
            "hyper_parameters": types.SimpleNamespace(lr=0.1),
            "loops": {"fit_loop": {"state_dict": {}}},
        },
    }


@pytest.mark.parametrize("kind", checkpoints(trained()))
@pytest.mark.parametrize("zip_file", [True, False])
def test_checkpoints_of_torch_are_read(tmp_path, kind, zip_file):
    net = trained()
    content = checkpoints(net)[kind]
    path = saved(tmp_path, content, _use_new_zipfile_serialization=zip_file)
    unknown = kind in ("numpy", "timm", "module", "module in a dictionary", "lightning")
    if unknown and not zip_file:
        refused(path, "must be a checkpoint that can be read without running code. Got one that needs classes")
    else:
        loads(net, path)


def test_subclasses_of_dict_are_read_as_dictionaries(tmp_path):
    from collections import defaultdict

    net = trained()
    settings = defaultdict(list, lr=0.1)
    loads(net, saved(tmp_path, {"state_dict": net.state_dict(), "hyper_parameters": settings, "acc": np.float32(1)}))


def test_no_code_of_a_checkpoint_is_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'harm')!r}, 'w')",)

    net, before = trained(), torch.serialization.get_safe_globals()
    loads(net, saved(tmp_path, {"model": net.state_dict(), "extra": Harm()}))
    assert not (tmp_path / "harm").exists()
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_functions_of_the_system_are_refused(tmp_path):
    import os

    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    refused(saved(tmp_path, {"model": trained().state_dict(), "extra": Harm()}), "without running code")
    assert not (tmp_path / "harm").exists()


def run(message):
    """Runs the command that ends a message."""
    command = message[message.index("python -c") :]
    subprocess.run(shlex.split(command.replace("python", sys.executable, 1)), check=True, capture_output=True)


@pytest.mark.ci
@pytest.mark.parametrize("name", ["w.pth", 'it\'s a "name" $HOME.pth'])
def test_the_conversion_of_the_refusal_works(tmp_path, name):
    net = trained()
    path = saved(tmp_path, checkpoints(net)["numpy"], name)
    run(refused(path, "Pass allow_pickle=True", allow_pickle=False))
    loads(net, path.with_suffix(".safetensors"))


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ["old", "pickle", "script", "program"])
def test_what_needs_code_is_refused_with_a_command_that_works(tmp_path, kind):
    net, path = trained(), tmp_path / "w.pth"
    if kind == "old":
        content = checkpoints(net)["timm"]
        saved(tmp_path, content, _use_new_zipfile_serialization=False)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"model": net.state_dict()}))
    elif kind == "script":
        torch.jit.trace(net, X).save(path)
    else:
        path = path.with_suffix(".pt2")
        torch.export.save(torch.export.export(net, (X,)), path)
    run(refused(path, "If you trust it"))
    loads(net, path.with_suffix(".state.pth"))


def test_damaged_checkpoints_are_refused(tmp_path):
    path = saved(tmp_path, {"model": trained().state_dict()})
    content = path.read_bytes()
    for keep in (0, 1, 30, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:keep])
        refused(path, "must be (a complete torch checkpoint|a file of weights)")
    offset = content.index(trained().conv.weight.detach().numpy().tobytes())
    path.write_bytes(content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1 :])
    refused(path, "Got a part whose checksum differs from the stored one. Copy it again")


def test_bombs_are_refused(tmp_path):
    path, packed = saved(tmp_path, {"model": torch.zeros(2**20)}), tmp_path / "packed.pth"
    with zipfile.ZipFile(path) as parts, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as others:
        for part in parts.infolist():
            others.writestr(part.filename, parts.read(part))
    refused(packed, "Got parts that are larger than the file")
    np.savez_compressed(tmp_path / "w.npz", a=np.zeros(2**22))
    refused(tmp_path / "w.npz", "Got parts far larger than the file")


def test_what_is_there_once_is_visited_once(tmp_path, monkeypatch):
    shared = {"a": torch.zeros(1)}
    for _ in range(40):
        shared = {str(i): shared for i in range(100)}
    refused(saved(tmp_path, shared), "must contain the weights of this Net. Got no named tensors")
    module = nn.Linear(1, 1)
    for _ in range(20):
        module = nn.ModuleList([module, module])
    monkeypatch.setattr(weight_files, "_MODULES", 100)
    refused(saved(tmp_path, module), "must be a complete torch checkpoint. Got ValueError: more than 100 modules")


def test_tensors_that_are_none_are_refused(tmp_path):
    state = trained().state_dict()
    for value in (torch.zeros(16, 3).to_sparse().T, torch.empty(3, 16, device="meta")):
        path = saved(tmp_path, {**state, "fc.weight": value})
        refused(path, "must contain ordinary tensors. Got sparse, quantized or empty ones: fc.weight")
    huge = torch.zeros(1).expand(10**9, 10**9)
    refused(saved(tmp_path, {**state, "fc.weight": huge}), r"of another shape: fc.weight \(1000000000, 1000000000\)")


# openai/CLIP and ultralytics/yolov5 write such files, and {model, ema} is what EMA in timm and YOLO leaves.
def test_of_weights_and_their_average_the_weights_are_taken_with_a_warning(tmp_path):
    net, average = trained(), trained(lambda: Net().double())
    path = saved(tmp_path, {"model": net.state_dict(), "model_ema": prefixed("module.", average.state_dict())})
    with pytest.warns(UserWarning, match="has several sets of weights: 'model' is taken, not 'model_ema'"):
        loads(net, path)
    loads(average.float(), path, key="model_ema")
    refused(
        path, "`key` of `load_weights` must name a set of weights.*Got 'ema'. Known: 'model', 'model_ema'", key="ema"
    )
    with pytest.warns(UserWarning, match="`key` of `convert_weights` chooses another"):
        convert_weights(path, tmp_path / "w.safetensors")
    loads(net, tmp_path / "w.safetensors")


def test_one_of_two_networks_must_be_chosen(tmp_path):
    net, other = trained(), Net().eval()
    two = {**prefixed("student.", net.state_dict()), **prefixed("teacher.", other.state_dict())}
    path = written(tmp_path, two)
    refused(path, "must contain one set of weights, or `key` of `load_weights` must name one. Got 'student', 'teacher'")
    with pytest.warns(UserWarning, match="has unused tensors: student"):
        loads(other, path, key="teacher")
    path = saved(tmp_path, {"a": net.state_dict(), "b": other.state_dict()})
    refused(path, "Got 'a', 'b'. Give for example key='a'")
    with pytest.raises(InputError, match="or `key` of `convert_weights` must name one"):
        convert_weights(path, tmp_path / "w.safetensors")


def test_a_network_within_a_larger_one_is_taken_with_a_warning(tmp_path):
    net = trained()
    path = written(tmp_path, {**prefixed("model.", net.state_dict()), "criterion.weight": torch.ones(3)})
    with pytest.warns(UserWarning, match="has unused tensors: criterion.weight"):
        loads(net, path)


# zkyseu/O2SFormer #23, open-mmlab/mmdetection #8654
def test_averages_beside_the_weights_as_mmcv_names_them(tmp_path):
    net = trained()
    averages = {f"ema_{name.replace('.', '_')}": value for name, value in net.state_dict().items()}
    with pytest.warns(UserWarning, match="unused tensors: ema_"):
        loads(net, written(tmp_path, {**net.state_dict(), **averages}))


def test_an_architecture_with_more_layers_is_refused(tmp_path):
    state = {**trained().state_dict(), "conv2.weight": torch.zeros(4, 4, 3, 3)}
    refused(written(tmp_path, prefixed("model.", state)), "Got not in the model: conv2.weight. Build")


# amirgholami/adahessian #22
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_converted(tmp_path, dtype):
    net = trained(lambda: Net().to(dtype).float())
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in net.state_dict().items()}
    load_weights(other := Net(), written(tmp_path, state))
    torch.testing.assert_close(other.eval()(X), net(X), atol=0.05, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_eight_bits_are_their_values_and_the_user_is_warned(tmp_path, dtype):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in trained().state_dict().items()}
    with pytest.warns(UserWarning, match="has weights in float8_.*: rounded to 2 or 3 bits"):
        load_weights(other := Net(), written(tmp_path, state))
    assert torch.equal(other.fc.weight, state["fc.weight"].float())


def test_whole_numbers_are_no_weights_and_large_ones_no_half_floats(tmp_path):
    state = trained().state_dict()
    quantized = {**state, "fc.weight": torch.ones(3, 16, dtype=torch.int8)}
    refused(written(tmp_path, quantized), "must contain weights of a float type. Got int8 in fc.weight. Quantized")
    large = {**state, "fc.bias": torch.tensor([1.0, 1e5, 0.0])}
    refused(
        written(tmp_path, large), "must contain values that float16 can hold. Got larger ones in fc.bias", Net().half()
    )


def test_a_counter_in_floats_stays_a_whole_number(tmp_path):
    net = trained()
    state = {**net.state_dict(), "bn.num_batches_tracked": torch.tensor(7.0)}
    load_weights(other := Net(), written(tmp_path, state))
    assert other.bn.num_batches_tracked.item() == 7
    state["bn.num_batches_tracked"] = torch.tensor(7.5)
    refused(written(tmp_path, state), "must contain values that int64 can hold")


# huggingface/diffusers #7830, HorizonWind2004/reconstruction-alignment #19
@pytest.fixture
def sharded(tmp_path):
    net = trained()
    state = net.state_dict()
    parts = {name: f"model-0000{1 + (i > 3)}-of-00002.safetensors" for i, name in enumerate(state)}
    for file in set(parts.values()):
        written(tmp_path, {name: state[name] for name in parts if parts[name] == file}, file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": parts}))
    return net, index, parts


def test_several_files_with_an_index_are_read(sharded):
    net, index, _ = sharded
    loads(net, index)
    loads(net, index.parent)
    shard = index.parent / "model-00001-of-00002.safetensors"
    refused(shard, "Got missing: .*one file of several: name their index, or the folder")


def test_several_files_of_torch_are_read_on_request(tmp_path):
    net = trained()
    state = net.state_dict()
    parts = {name: f"pytorch_model-0000{1 + (i > 3)}-of-00002.bin" for i, name in enumerate(state)}
    for file in set(parts.values()):
        saved(tmp_path, {name: state[name] for name in parts if parts[name] == file}, file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": parts}))
    loads(net, tmp_path)
    refused(tmp_path, "must not be a pickle file", allow_pickle=False)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b"])
def test_an_index_names_no_path(sharded, name):
    _, index, parts = sharded
    index.write_text(json.dumps({"weight_map": {**parts, "fc.weight": name}}))
    refused(index, "must name files of its own folder. Got a path")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "must be an index of weights, with a `weight_map`.*Got JSONDecodeError"),
        ("[" * 100_000, "must be an index of weights"),
        ('{"weight_map": {}}', "Got another content"),
        ('{"weight_map": {"fc.weight": 3}}', "Got another content"),
        ('{"weight_map": {"a": "model.safetensors.index.json"}}', "must name files of weights"),
        ('{"weight_map": {"a": "none.safetensors"}}', "Weights must be a readable file"),
        (
            '{"weight_map": {"fc.weight": "model-00001-of-00002.safetensors"}}',
            "must contain the 1 tensors that .* lists",
        ),
    ],
)
def test_damaged_indices_are_refused(sharded, content, match):
    sharded[1].write_text(content)
    refused(sharded[1], match)


def test_links_out_of_a_folder_are_not_followed(sharded, tmp_path_factory):
    _, index, _ = sharded
    outside = tmp_path_factory.mktemp("outside") / "w.safetensors"
    shard = index.parent / "model-00001-of-00002.safetensors"
    shard.replace(outside)
    shard.symlink_to(outside)
    refused(index, "must lie in its folder. Got a link that leads out of it")


def test_the_cache_of_hugging_face_links_to_its_own_blobs(tmp_path):
    net = trained()
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1f"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    written(blobs, net.state_dict(), "abc")
    (snapshot / "model.safetensors").symlink_to(blobs / "abc")
    loads(net, snapshot)
    loads(net, blobs / "abc")


def test_arrays_of_numpy_are_read(tmp_path):
    net = trained()
    np.savez(tmp_path / "w.npz", **{name: value.numpy() for name, value in net.state_dict().items()})
    loads(net, tmp_path / "w.npz")
    np.savez(tmp_path / "w.npz", a=np.array([{}], dtype=object), allow_pickle=True)
    refused(tmp_path / "w.npz", "must be a complete numpy archive of plain arrays. Got ValueError: Object arrays")


@pytest.mark.parametrize(
    ("head", "match"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab",
            "Got a pointer of Git LFS. Fetch .*git lfs pull",
        ),
        (b"<!DOCTYPE html><html>404</html>", "Got a text like a web page. Download the file itself"),
        (b"\x89HDF\r\n\x1a\n", "Got an HDF5 file"),
        (b"\x1f\x8b\x08", "Got a file packed by gzip. Unpack it first"),
        (b"some text", "Got another kind of file"),
        (b"", "Got an empty file"),
    ],
)
def test_other_files_are_named(tmp_path, head, match):
    (tmp_path / "w.bin").write_bytes(head)
    refused(tmp_path / "w.bin", match)


def test_an_old_tar_archive_and_a_distributed_checkpoint_are_named(tmp_path):
    with tarfile.open(tmp_path / "w.pth", "w") as tar:
        tar.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    refused(tmp_path / "w.pth", "Got an old tar archive. If you trust it")
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").touch()
    refused(tmp_path / "dcp", "python -m torch.distributed.checkpoint.format_utils dcp_to_torch .*dcp .*dcp.pth")


def test_a_conversion_needs_the_suffix_and_tensors(tmp_path):
    path = saved(tmp_path, {"epoch": 3})
    with pytest.raises(InputError, match=r"`target` of `convert_weights` must end in `.safetensors`"):
        convert_weights(path, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"must contain named tensors\. Got none"):
        convert_weights(path, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"`key` of `convert_weights` must name a set .*Got 'ema'. Known: 'model'"):
        convert_weights(saved(tmp_path, {"model": Net().state_dict()}), tmp_path / "w.safetensors", key="ema")


def test_our_own_weights_within_a_wrapper(tmp_path):
    net, other = build("resnet8", 3, (1, 8, 8), (0.3,), (0.4,)).eval(), build("resnet8", 3, (1, 8, 8))
    save_weights(nn.DataParallel(net), tmp_path / "w.safetensors")
    load_weights(other, tmp_path / "w.safetensors")
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(other.eval()(x), net(x))
