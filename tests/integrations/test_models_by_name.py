"""`hf:` and `timm:` names with the libraries that they stand for."""

import json

import pytest
import torch

from jacmatch import datasets
from jacmatch.jobs import networks
from jacmatch.models.catalog import preprocessing


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


def test_the_preprocessing_of_timm_is_that_of_its_published_weights():
    timm = pytest.importorskip("timm")
    known = preprocessing("timm:vit_base_patch16_224")
    cfg = timm.get_pretrained_cfg("vit_base_patch16_224")
    assert (known.mean, known.std, known.size, known.fixed) == (cfg.mean, cfg.std, 224, True)
