"""`hf:` and `timm:` names with the libraries that they stand for."""

import json

import pytest
import torch

from jacmatch import datasets, load_student
from jacmatch.cli import main
from jacmatch.errors import InputError
from jacmatch.jobs import Export, Train, networks
from jacmatch.models.catalog import preprocessing
from jacmatch.runs import Run


def test_a_folder_of_transformers_is_a_teacher_with_its_own_preprocessing(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    config = transformers.ResNetConfig(num_channels=1, num_labels=10, **sizes)
    net = transformers.ResNetForImageClassification(config).eval()
    net.save_pretrained(tmp_path)
    own = {"do_normalize": True, "image_mean": [0.5], "image_std": [0.25], "size": {"height": 8, "width": 8}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(own))
    teacher = networks.network(f"hf:{tmp_path}", datasets.load("digits"))
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(teacher(x), net((x - 0.5) / 0.25).logits)


@pytest.mark.ci
def test_a_folder_without_preprocessing_needs_mean_and_std(tmp_path):
    """Also where transformers has other names for the layers in memory than in files."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=10, **sizes)
    net = transformers.ViTForImageClassification(config).eval()
    net.save_pretrained(tmp_path)
    spec, data = f"hf:{tmp_path}", datasets.load("digits")
    with pytest.raises(InputError, match=r"has no preprocessor_config\.json\. Give --mean and --std \(--teacher-mean"):
        networks.network(spec, data)
    teacher = networks.network(spec, data, networks.Weights(None, (0.5,), (0.25,)))
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(teacher(x), net((x - 0.5) / 0.25).logits)


@pytest.mark.ci
def test_a_folder_of_transformers_teaches_other_classes(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("JACMATCH_CACHE", str(tmp_path / "cache"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=6, **sizes)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    own = {"do_normalize": True, "image_mean": [0.5], "image_std": [0.25], "size": {"height": 8, "width": 8}}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(own))
    words = ["transfer", "--teacher", f"hf:{tmp_path / 'vit'}", "--student", "cnn3", "--data", "digits", "--smoke"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    result = Run.open(tmp_path / "run").result
    assert result["settings"]["teacher"] == words[2]
    assert 0 <= result["student"]["accuracy"] <= 1


@pytest.mark.ci
def test_a_student_of_transformers_is_exported_in_its_own_form(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    config = transformers.ResNetConfig(num_channels=1, num_labels=10, **sizes)
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "model")
    own = {"do_normalize": True, "image_mean": [0.5], "image_std": [0.25], "size": {"height": 8, "width": 8}}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(own))
    Train(model=f"hf:{tmp_path / 'model'}", smoke=True, doctor=False, out=tmp_path / "run").run()
    Export(trained=str(tmp_path / "run"), to=("hf",), smoke=True, out=tmp_path / "out").run()
    net = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(net((x - 0.5) / 0.25).logits, load_student(tmp_path / "run")(x))


def test_the_preprocessing_of_timm_is_that_of_its_published_weights():
    timm = pytest.importorskip("timm")
    known = preprocessing("timm:vit_base_patch16_224")
    cfg = timm.get_pretrained_cfg("vit_base_patch16_224")
    assert (known.mean, known.std, known.size, known.fixed) == (cfg.mean, cfg.std, 224, True)
