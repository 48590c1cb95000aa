"""Data sets that need no file: the digits of scikit-learn, and a smooth function with known values and Jacobian."""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jacmatch.datasets.arrays import from_arrays
from jacmatch.datasets.data import Data, keys, split_validation
from jacmatch.datasets.files import check_memory
from jacmatch.errors import InputError, UnsupportedError, unknown_name

TEST_ROWS = 500


def load_digits(argument: str, seed: int) -> Data:
    """Return `digits`, 1,797 gray images of 8 × 8 pixels in ten classes, values/16 in [0, 1].

    There is no official split; 500 rows, stratified by class and chosen by `seed`, are the test part.

    References:
        Alpaydin & Kaynak, "Optical Recognition of Handwritten Digits", UCI 1998 (CC BY 4.0).
    """
    if argument:
        raise InputError("`--data digits` takes no argument.", got=repr(argument), do="Write digits.")
    try:
        from sklearn.datasets import load_digits as of_scikit_learn
    except ImportError as error:
        install = "Install it with: pip install 'jacmatch[train]'."
        raise UnsupportedError(f"`--data digits` comes with scikit-learn, which is not installed. {install}") from error
    pixels, labels = of_scikit_learn(return_X_y=True)
    x = (pixels.reshape(-1, 1, 8, 8) / 16).astype(np.float32)
    y = labels.astype(np.int64)
    train, test = (rows.numpy() for rows in split_validation(torch.from_numpy(y), TEST_ROWS, seed))
    return from_arrays("digits", {"x_train": x[train], "y_train": y[train], "x_test": x[test], "y_test": y[test]})


# Inputs, outputs, training rows, test rows.
DEFAULTS = {"D": 6, "K": 3, "N": 200, "T": 1000}


def load(argument: str, seed: int) -> Data:
    """Return a regression with known derivatives: `synthetic[:D=6,K=3,N=200,T=1000]`.

    There are D inputs, uniform in [−1, 1] and drawn by `seed`, K outputs, N training rows and T test rows. The function
    is `values`, always the same, and the Jacobians of both parts are exact.

    Raises:
        InputError: `argument` does not consist of some of the four settings.
    """
    sizes = _parse(argument)
    inputs, outputs = sizes["D"], sizes["K"]
    needed = 12 * (sizes["N"] + sizes["T"]) * inputs * (outputs + 1)  # float64, and the float32 made of it
    check_memory(needed, "The Jacobians of `--data synthetic`", "Choose smaller numbers.")
    arrays: dict[str, object] = {}
    for stream, (part, rows) in enumerate((("train", sizes["N"]), ("test", sizes["T"]))):
        uniform = (keys(seed, rows * inputs, stream) >> 11).astype("float64") * 2.0**-53
        x = torch.from_numpy(2 * uniform - 1).reshape(rows, inputs)
        arrays |= {f"x_{part}": x, f"y_{part}": values(x, outputs), f"j_{part}": jacobian(x, outputs)}
    return from_arrays("synthetic:" + ",".join(f"{key}={size}" for key, size in sizes.items()), arrays)


def values(x: Float[Tensor, "batch input"], outputs: int) -> Float[Tensor, "batch row"]:
    """Return f_k(x) = sin(2 Σ_i a_ki x_i) + ½ (Σ_i b_ki x_i)² for rows k = 1 … K, with fixed a and b.

    a_ki = √(2/D) cos(k i) and b_ki = √(2/D) sin((k + 1) i) for inputs i = 1 … D; no derivative vanishes identically.
    """
    a, b = _coefficients(x, outputs)
    return torch.sin(2 * x @ a.T) + (x @ b.T).square() / 2


def jacobian(x: Float[Tensor, "batch input"], outputs: int) -> Float[Tensor, "batch row input"]:
    """Return ∂f_k/∂x_i = 2 a_ki cos(2 Σ_j a_kj x_j) + b_ki Σ_j b_kj x_j of the function `values`.

    Example:
        >>> jacobian(torch.zeros(1, 1), 1).allclose(2 * torch.tensor(2.0).sqrt() * torch.tensor(1.0).cos())
        True
    """
    a, b = _coefficients(x, outputs)
    return 2 * torch.cos(2 * x @ a.T)[:, :, None] * a + (x @ b.T)[:, :, None] * b


def _coefficients(
    x: Float[Tensor, "batch input"], outputs: int
) -> tuple[Float[Tensor, "row input"], Float[Tensor, "row input"]]:
    columns = torch.arange(1, x.shape[1] + 1, dtype=torch.float64)
    rows = torch.arange(1, outputs + 1, dtype=torch.float64)[:, None]
    scale = math.sqrt(2 / x.shape[1])
    return (scale * torch.cos(rows * columns)).to(x), (scale * torch.sin((rows + 1) * columns)).to(x)


def _parse(argument: str) -> dict[str, int]:
    sizes, given = dict(DEFAULTS), set()
    for part in argument.split(",") if argument else []:
        key, equals, text = part.strip().partition("=")
        if key not in DEFAULTS:
            raise unknown_name("Each number of `--data synthetic`", key, DEFAULTS)
        if key in given:
            raise InputError(f"{key} of `--data synthetic` must be given once.", got=argument)
        if not (equals and text.isascii() and text.isdigit() and 1 <= int(text[:19]) < 2**40):
            rule = f"{key} of `--data synthetic` must be an integer, at least 1."
            raise InputError(rule, got=repr(text), do=f"Write for example synthetic:{key}={DEFAULTS[key]}.")
        given.add(key)
        sizes[key] = int(text)
    return sizes
