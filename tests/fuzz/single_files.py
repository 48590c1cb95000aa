"""Weights, images and settings: what the bytes of a fuzzer mean, and whole ones to begin with."""

import io
import json
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image
from torch import nn

from jacmatch.cli import settings
from jacmatch.datasets.streamed import decode
from jacmatch.models import load_weights

from .folders import KNOWN


def read_weights(data: bytes, folder: Path) -> None:
    file = folder / "weights.safetensors"
    file.write_bytes(data)
    load_weights(nn.Linear(3, 2), file)


def weight_seeds(folder: Path) -> list[bytes]:
    state = nn.Linear(3, 2).state_dict()
    return [
        safetensors.torch.save(state),
        safetensors.torch.save({"mean": torch.zeros(1, 3), **state}, {"format": "pt"}),
        safetensors.torch.save({name: value.half() for name, value in state.items()}),
    ]


def read_image(data: bytes, folder: Path) -> None:
    pixels = decode(data, "an image", caller="the test", max_pixels=10_000, size=(4, 4))
    assert pixels.shape[:2] == (4, 4)


def image_seeds(folder: Path) -> list[bytes]:
    seeds = []
    for kind in ("png", "jpeg", "webp"):
        for mode in ("L", "RGB", "P"):
            if (kind, mode) != ("jpeg", "P"):
                content = io.BytesIO()
                Image.new(mode, (5, 4), 3).save(content, kind)
                seeds.append(content.getvalue())
    return seeds


def read_settings(data: bytes, folder: Path) -> None:
    file = folder / ("settings.json" if data[:1] == b"0" else "settings.yaml")
    file.write_bytes(data[1:])
    settings.read(str(file), "distill", KNOWN)


def settings_seeds(folder: Path) -> list[bytes]:
    known = {"seed": 1, "lr": 1e-3, "methods": ["labels"], "data": "digits", "augment": [], "milestones": [0.5]}
    text = json.dumps(known).encode()
    yaml = b"seed: 1\nlr: 1e-3\nmethods: [labels]\nchannels-last: yes\nout: &a x\nteacher_mean: null\n"
    whole = json.dumps({"job": "distill", "version": "0.1.0", "settings": known}).encode()
    return [b"0" + text, b"1" + yaml, b"0" + whole, b"1" + text]
