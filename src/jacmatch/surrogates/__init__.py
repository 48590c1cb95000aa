"""Fit a smooth function, for example a simulator, to its values and partial derivatives.

Example:
    >>> import numpy as np
    >>> from jacmatch.surrogates import JacobianRegressor
    >>> x = np.random.default_rng(0).uniform(-1, 1, (20, 2))
    >>> y, j = np.exp(x[:, 0]) * x[:, 1], np.stack([np.exp(x[:, 0]) * x[:, 1], np.exp(x[:, 0])], 1)
    >>> model = JacobianRegressor(hidden=(8, 8), max_evaluations=300).fit(x, y, jacobian=j)
    >>> round(model.score(x, y), 2)
    1.0
"""

from jacmatch.errors import optional_package

optional_package("sklearn", "`jacmatch.surrogates`", "pip install 'jacmatch[train]'")

from jacmatch.surrogates.regressor import JacobianRegressor  # noqa: E402
from jacmatch.surrogates.samples import DataWarning  # noqa: E402
from jacmatch.surrogates.tables import split_frame  # noqa: E402

__all__ = ["DataWarning", "JacobianRegressor", "split_frame"]
