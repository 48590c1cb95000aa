"""Networks that take raw inputs and normalize them: `build("vgg4", outputs, shape, mean, std)`."""

from jacmatch.models.catalog import CATALOG, FORMS, build, count_parameters
from jacmatch.models.inputs import FirstOutputs, Normalized, Resized
from jacmatch.models.mlp import MLP, ScaledMLP, scaled_mlp
from jacmatch.models.resnet import ResNet, WideResNet
from jacmatch.models.values import ValuesOnly
from jacmatch.models.vgg import VGG
from jacmatch.models.vit import VisionTransformer
from jacmatch.models.weights import convert_weights, load_weights, save_weights

__all__ = [
    "CATALOG",
    "FORMS",
    "MLP",
    "VGG",
    "FirstOutputs",
    "Normalized",
    "ResNet",
    "Resized",
    "ScaledMLP",
    "ValuesOnly",
    "VisionTransformer",
    "WideResNet",
    "build",
    "convert_weights",
    "count_parameters",
    "load_weights",
    "save_weights",
    "scaled_mlp",
]
