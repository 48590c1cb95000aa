"""Models by name: the catalogue, other libraries, the user's own."""

import sys
import types

import pytest
import torch
from torch import nn

from jacmatch import models
from jacmatch.errors import InputError
from jacmatch.models import CATALOG, Normalized, build, count_parameters


def test_public_names_exist_and_are_listed_once():
    assert len(set(models.__all__)) == len(models.__all__)
    assert all(hasattr(models, name) for name in models.__all__)


@pytest.mark.parametrize("name", CATALOG)
def test_building_by_name_is_calling_the_function(name):
    torch.manual_seed(5)
    built = build(name, 4, (3, 32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)).state_dict()
    torch.manual_seed(5)
    called = CATALOG[name](4, (3, 32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)).state_dict()
    assert built.keys() == called.keys()
    assert all(torch.equal(built[key], called[key]) for key in called)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("vgg-4", "vgg4"),
        ("resnet-56", "resnet56"),
        ("wrn40-2", "wrn-40-2"),
        ("vit", "vit-tiny"),
        ("ResNet20", "resnet20"),
    ],
)
def test_an_unknown_name_gives_the_nearest(name, nearest):
    with pytest.raises(
        InputError, match=f"A model must be a known name. Got '{name}'. Nearest: .*{nearest}.*Known:.*timm:"
    ):
        build(name, 10, (3, 32, 32))


def test_sizes_are_checked_before_anything_is_imported():
    with pytest.raises(InputError, match=r"`outputs` of `timm:resnet18` must be at least 1. Got 0"):
        build("timm:resnet18", 0, (3, 32, 32))
    with pytest.raises(InputError, match=r"`shape` of `any.thing:here` must have at least one axis.*Got \(\)"):
        build("any.thing:here", 2, ())


def test_layouts_by_name():
    assert count_parameters(build("mlp:7-5", 2, (3,))) == 3 * 7 + 7 + 7 * 5 + 5 + 5 * 2 + 2
    assert count_parameters(build("vgg:8-M-16", 2, (1, 8, 8))) == 72 + 16 + 1152 + 32 + 34


def test_count_parameters_takes_frozen_ones_and_counts_shared_ones_once():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    module[1].weight = module[0].weight
    module[0].weight.requires_grad_(False)
    assert count_parameters(module) == 9 + 3 + 3 + 6


class Pooled(nn.Module):
    """Stands for a network of another library: takes any image size."""

    def __init__(self, outputs, channels, least=1, *, rows=False):
        super().__init__()
        self.convolution = nn.Conv2d(channels, outputs, 1)
        self.dropout = nn.Dropout()
        self.least, self.rows = least, rows

    def forward(self, x):
        if x.shape[-1] < self.least:
            raise AssertionError(f"Expected at least {self.least} pixels")
        maps = self.dropout(self.convolution(x))
        return maps if self.rows else maps.mean(dim=(2, 3))


@pytest.fixture
def timm(monkeypatch):
    """A module with the four functions of timm that are used; the real one is an optional package."""
    module = types.ModuleType("timm")
    module.calls = []
    module.list_models = lambda: ["resnet18", "resnet34", "vit_tiny", "segmenter"]
    module.is_model = lambda name: name in module.list_models()
    fixed = types.SimpleNamespace(mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 0.5), fixed_input_size=True)
    free = types.SimpleNamespace(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), fixed_input_size=False)
    configurations = {"vit_tiny": fixed, "resnet18": free, "segmenter": free}
    module.get_pretrained_cfg = configurations.get

    def create_model(name, **options):
        module.calls.append((name, options))
        return Pooled(options["num_classes"], options["in_chans"], rows=name == "segmenter")

    module.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", module)
    return module


def test_a_timm_model_takes_raw_inputs_and_its_own_constants(timm):
    model = build("timm:resnet18", 4, (3, 8, 8))
    assert timm.calls == [("resnet18", {"pretrained": False, "num_classes": 4, "in_chans": 3})]
    assert isinstance(model, Normalized)
    assert model.training
    x = torch.rand(2, 3, 8, 8)
    mean, std = (torch.tensor(each).reshape(1, 3, 1, 1) for each in ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    model.eval()
    torch.testing.assert_close(model(x), model.network((x - mean) / std))


def test_a_timm_model_of_fixed_size_is_built_for_the_images(timm):
    model = build("timm:vit_tiny", 4, (3, 8, 12), (0.3,), (0.7,))
    assert timm.calls[0][1]["img_size"] == (8, 12)
    assert model.mean.flatten().tolist() == pytest.approx([0.3] * 3)
    assert model.std.flatten().tolist() == pytest.approx([0.7] * 3)


def test_timm_constants_are_for_rgb_and_default_to_imagenets(timm):
    assert build("timm:resnet18", 4, (1, 8, 8)).mean.item() == 0
    assert build("timm:resnet34", 4, (3, 8, 8)).mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


def test_an_unknown_timm_model_gives_the_nearest(timm):
    with pytest.raises(
        InputError, match=r"A model `timm:NAME` must be known to timm. Got 'resnet19'. Nearest: resnet18"
    ):
        build("timm:resnet19", 4, (3, 8, 8))
    with pytest.raises(InputError, match=r"Got ''. Nearest: none"):
        build("timm:", 4, (3, 8, 8))


def test_a_network_that_does_not_answer_a_row_of_outputs_is_refused(timm):
    with pytest.raises(
        InputError, match=r"`timm:segmenter` must return 4 outputs per sample. Got torch.Size\(\[1, 4, 8, 8"
    ):
        build("timm:segmenter", 4, (3, 8, 8))


def test_statistics_that_do_not_fit_another_librarys_model_are_refused(timm):
    with pytest.raises(
        InputError, match=r"`mean` of `Normalized` must have one number, or one for each of the 3 channels"
    ):
        build("timm:resnet18", 4, (3, 8, 8), (0.1, 0.2), (1.0,))


@pytest.fixture
def torchvision(monkeypatch):
    """The two functions of torchvision.models that are used; the real one is an optional package."""
    module = types.ModuleType("torchvision.models")
    module.list_models = lambda module: ["resnet18", "vit_b_16"]

    def get_model(name, weights, num_classes):
        assert weights is None
        return Pooled(num_classes, 3, least=224 if name == "vit_b_16" else 1)

    module.get_model = get_model
    package = types.ModuleType("torchvision")
    package.models = module
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", module)


@pytest.mark.usefixtures("torchvision")
def test_a_torchvision_model_takes_raw_inputs():
    model = build("torchvision:resnet18", 4, (3, 8, 8)).eval()
    x = torch.rand(2, 3, 8, 8)
    mean, std = (torch.tensor(each).reshape(1, 3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(model(x), model.network((x - mean) / std))
    assert build("torchvision:resnet18", 4, (3, 8, 8), (0.5,), (0.1,)).mean.flatten().tolist() == [0.5] * 3


@pytest.mark.usefixtures("torchvision")
def test_what_torchvision_cannot_build_is_refused():
    with pytest.raises(InputError, match=r"must be known to torchvision. Got 'resnet81'. Nearest: resnet18"):
        build("torchvision:resnet81", 4, (3, 8, 8))
    with pytest.raises(InputError, match=r"take samples of shape \(3, 8, 8\). Got \w+: Expected at least 224 pixels"):
        build("torchvision:vit_b_16", 4, (3, 8, 8))
    with pytest.raises(InputError, match=r"must take samples of shape \(1, 8, 8\). Got .*to have 3 channels"):
        build("torchvision:resnet18", 4, (1, 8, 8))


@pytest.mark.parametrize(
    ("spec", "package", "command"),
    [
        ("timm:resnet18", "timm", r"pip install 'jacmatch\[timm\]'"),
        ("torchvision:resnet18", "torchvision", "pip install torchvision"),
    ],
)
def test_a_missing_package_is_named_with_the_command(monkeypatch, spec, package, command):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.models", None)
    with pytest.raises(InputError, match=f"`{spec}` needs the package {package}. Got .* Run: {command}."):
        build(spec, 4, (3, 8, 8))


OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, shape, width=5):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(shape[0], width), nn.Linear(width, classes))
    def forward(self, x):
        return self.layers(x)

def make(*, outputs, mean=None, std=None, **rest):
    assert not rest
    net = nn.Linear(3, outputs)
    net.scaling = (mean, std)
    return net

def fixed():
    return nn.Linear(3, 7)

def needs_more(outputs, depth): ...
def positional(outputs, /): ...
def not_a_module(outputs): return lambda x: x
def fails(outputs): raise ZeroDivisionError("of the user")
instance = nn.Linear(3, 2)
number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_models").mkdir()
    (tmp_path / "my_models" / "nets.py").write_text(OWN)
    (tmp_path / "my_models" / "broken.py").write_text("import a_package_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_models.nets"
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_models"]:
        del sys.modules[name]


def test_the_users_class_gets_classes_and_shape(own):
    net = build(f"{own}:Net", 4, (3,))
    assert type(net).__name__ == "Net"
    assert net(torch.zeros(2, 3)).shape == (2, 4)
    assert net.layers[1].out_features == 5


def test_the_users_function_gets_what_it_names_and_nothing_else(own):
    assert build(f"{own}:make", 4, (3,), (0.5,), (2.0,)).scaling == ((0.5,), (2.0,))
    assert build(f"{own}:fixed", 4, (3,)).out_features == 7
    assert build(f"{own}:make", 4, (3,)) is not build(f"{own}:make", 4, (3,))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("needs_more", "called with `outputs` or `classes`, `shape`, `mean`, `std`. Got required parameters depth"),
        ("positional", "called with `outputs` or `classes`.*Got required parameters outputs"),
        ("not_a_module", "returns a new torch.nn.Module. Got an object of type function"),
        ("instance", "returns a new torch.nn.Module at each call. Got an object of type Linear"),
        ("number", "at each call. Got an object of type int"),
        ("none", "at each call. Got an object of type NoneType"),
    ],
)
def test_what_is_no_builder_is_refused(own, name, message):
    with pytest.raises(InputError, match=f"`{own}:{name}` must be a function or class that .*{message}"):
        build(f"{own}:{name}", 4, (3,))


@pytest.mark.parametrize(
    "spec", ["my_models.nots:make", "nobody_has_this.nets:make", "coreml:file", "my_models.nets.deep:x"]
)
def test_modules_that_are_not_there_are_refused(own, spec):
    with pytest.raises(
        InputError, match=rf"must be importable; other forms: .*timm:NAME.*Got '{spec}': No module named"
    ):
        build(spec, 4, (3,))


@pytest.mark.parametrize("spec", [":make", "a..b:make", ".a:make", "a-b:make", "./nets.py:make"])
def test_what_is_no_module_name_is_refused(spec):
    with pytest.raises(InputError, match=f"must be importable; other forms: .*Got '{spec}'"):
        build(spec, 4, (3,))


def test_failures_of_the_users_own_code_keep_their_traceback(own):
    with pytest.raises(ZeroDivisionError, match=r"of the user"):
        build(f"{own}:fails", 4, (3,))
    with pytest.raises(ModuleNotFoundError, match=r"a_package_nobody_has"):
        build("my_models.broken:make", 4, (3,))


def test_a_callable_without_a_signature_is_refused():
    with pytest.raises(
        InputError,
        match=r"`builtins:dict` must be a function or class .* and whose parameters can be read. Got no signature",
    ):
        build("builtins:dict", 4, (3,))
