"""Networks that take raw inputs and normalise them inside, by name: `build("vgg4", outputs, shape, mean, std)`."""

from jacmatch.models.catalog import CATALOG, FORMS, build, count_parameters, load_weights, save_weights
from jacmatch.models.mlp import MLP, Normalized
from jacmatch.models.resnet import ResNet, WideResNet
from jacmatch.models.vgg import VGG
from jacmatch.models.vit import VisionTransformer

__all__ = [
    "CATALOG",
    "FORMS",
    "MLP",
    "VGG",
    "Normalized",
    "ResNet",
    "VisionTransformer",
    "WideResNet",
    "build",
    "count_parameters",
    "load_weights",
    "save_weights",
]
