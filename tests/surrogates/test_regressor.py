"""The scikit-learn estimator: what it learns, what it refuses, and scikit-learn's own checks."""

import pickle
import re
import warnings

import numpy as np
import pytest
from scipy.stats import qmc
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks

from jacmatch.errors import InputError
from jacmatch.surrogates import DataWarning, JacobianRegressor, regressor
from jacmatch.surrogates.gaussian_process import fit_gaussian_process, wrong_partials
from jacmatch.surrogates.samples import standardize, suspicious

FAST = {"model": "network", "hidden": (8, 8), "activation": "silu", "max_evaluations": 150}
EXPECTED_TO_FAIL = {
    # A weight of 0 keeps a sample among those that may be held out, and 2 is no second sample there.
    "check_sample_weight_equivalence_on_dense_data": "samples are held out at random",
}


def wave(count, seed=0):
    x = np.random.default_rng(seed).uniform(-2, 2, (count, 2))
    y = np.sin(x[:, 0]) * np.cos(x[:, 1])
    j = np.stack([np.cos(x[:, 0]) * np.cos(x[:, 1]), -np.sin(x[:, 0]) * np.sin(x[:, 1])], 1)
    return x, y, j


def rmse(model, seed=9):
    x, y, _ = wave(500, seed)
    return float(np.sqrt(np.mean((model.predict(x) - y) ** 2)) / y.std())


def test_partials_say_more_than_values():
    x, y, j = wave(24)
    with_partials = JacobianRegressor(**FAST).fit(x, y, jacobian=j)
    assert rmse(with_partials) < 0.5 * rmse(JacobianRegressor(**FAST).fit(x, y))
    xt, _, jt = wave(200, seed=5)
    predicted = with_partials.predict_jacobian(xt)
    assert predicted.shape == jt.shape
    step = 1e-5 * np.array([1.0, 0.0])
    differences = (with_partials.predict(xt + step) - with_partials.predict(xt - step)) / 2e-5
    np.testing.assert_allclose(predicted[:, 0], differences, atol=1e-6)


def test_what_is_predicted_does_not_depend_on_the_container_of_the_inputs():
    """Plain arrays take a shorter check than lists and arrays of other types."""
    x, y, j = wave(20)
    model = JacobianRegressor(**FAST).fit(x, y, jacobian=j)
    points = wave(30, seed=4)[0]
    for predict in (model.predict, model.predict_jacobian):
        np.testing.assert_array_equal(predict(points), predict(points.tolist()))
        np.testing.assert_allclose(predict(points.astype(np.float32)), predict(points), atol=1e-5)
        for wrong in (np.full((3, 2), np.nan), np.ones((3, 3)), np.ones(3), np.ones((0, 2))):
            with pytest.raises(ValueError, match=r"NaN|features|2D|0 sample"):
                predict(wrong)


def test_units_do_not_matter():
    """Units that are powers of two change no rounding, so the same network is fitted."""
    x, y, j = wave(20)
    a, b = np.array([2.0**10, 2.0**-13]), 2.0**17
    plain = JacobianRegressor(**FAST).fit(x, y, jacobian=j)
    scaled = JacobianRegressor(**FAST).fit(x * a, y * b, jacobian=j * b / a)
    np.testing.assert_array_equal(scaled.predict(x * a) / b, plain.predict(x))
    np.testing.assert_array_equal(scaled.predict_jacobian(x * a) * a / b, plain.predict_jacobian(x))


def test_what_is_missing_is_not_learned():
    """Any pattern of NaN: what is known is fitted, and what would stand in its place does not matter."""
    x, y, j = wave(20)
    known = np.random.default_rng(0).random(j.shape) < 0.5
    model = JacobianRegressor(**FAST).fit(x, y, jacobian=np.where(known, j, np.nan))
    assert rmse(model) < rmse(JacobianRegressor(**FAST).fit(x, y))
    none = JacobianRegressor(**FAST).fit(x, y, jacobian=np.full_like(j, np.nan))
    np.testing.assert_array_equal(none.predict(x), JacobianRegressor(**FAST).fit(x, y).predict(x))


def test_weights():
    x, y, j = wave(30)
    wrong = j.copy()
    wrong[:, 1] = 5.0
    with pytest.warns(DataWarning, match="partials of output 0 do not explain"):
        ignored = JacobianRegressor(partial_weights=[1.0, 0.0], **FAST).fit(x, y, jacobian=wrong)
    with pytest.warns(DataWarning, match="partials of output 0 do not explain"):
        believed = JacobianRegressor(**FAST).fit(x, y, jacobian=wrong)
    assert rmse(ignored) < 0.2 * rmse(believed)
    both = np.stack([y, np.random.default_rng(0).normal(size=30)], 1)
    first = JacobianRegressor(output_weights=[1.0, 1e-6], **FAST).fit(x, both)
    second = JacobianRegressor(output_weights=[1e-6, 1.0], **FAST).fit(x, both)
    assert np.square(first.predict(x) - both)[:, 0].mean() < np.square(second.predict(x) - both)[:, 0].mean()


def test_several_outputs_have_their_shape():
    x, y, j = wave(20)
    model = JacobianRegressor(**FAST).fit(x, np.stack([y, 2 * y, -y], 1), jacobian=np.stack([j, 2 * j, -j], 1))
    assert model.predict(x).shape == (20, 3)
    assert model.predict_jacobian(x).shape == (20, 3, 2)
    table = np.stack([j, 2 * j, -j], 1).reshape(20, 6)
    same = JacobianRegressor(**FAST).fit(x, np.stack([y, 2 * y, -y], 1), jacobian=table)
    np.testing.assert_array_equal(same.predict(x), model.predict(x))


def test_an_ensemble_has_a_standard_deviation():
    x, y, j = wave(20)
    model = JacobianRegressor(ensemble=3, **FAST).fit(x, y, jacobian=j)
    _, near = model.predict(x, return_std=True)
    _, far = model.predict(x + 5, return_std=True)
    assert near.shape == (20,)
    assert near.mean() < far.mean()
    with pytest.raises(InputError, match="needs a Gaussian process or an ensemble"):
        JacobianRegressor(**FAST).fit(x, y).predict(x, return_std=True)


def test_the_better_model_on_held_out_samples_predicts():
    """For a smooth function that is the Gaussian process, which then also gives the standard deviation."""
    x, y, j = wave(30)
    model = JacobianRegressor(**{**FAST, "model": "auto"}).fit(x, y, jacobian=j)
    assert model.model_ == "gp"
    assert model.held_out_["gp"] < model.held_out_["network"]
    assert not model.fits_
    xt, yt, jt = wave(400, seed=3)
    mean, std = model.predict(xt, return_std=True)
    assert rmse(model) < 1e-3
    assert 0.8 < (np.abs(mean - yt) < 1.645 * std).mean() <= 1.0
    assert np.abs(model.predict_jacobian(xt) - jt).max() < 0.02


def test_a_network_learns_from_the_process():
    x, y, j = wave(16)
    process = JacobianRegressor(**{**FAST, "model": "gp"}).fit(x, y, jacobian=j)
    network = process.distill(100)
    assert network.model_ == "network"
    assert rmse(network) < 0.7 * rmse(JacobianRegressor(**FAST).fit(x, y, jacobian=j))
    with pytest.raises(InputError, match="`distill` of `JacobianRegressor` needs a Gaussian process"):
        network.distill()


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.ci
def test_noisy_values_are_learned_in_minibatches():
    """Sampled payoffs with pathwise derivatives: what is wanted is their mean."""
    rng = np.random.default_rng(0)
    x, noise = rng.uniform(-1, 1, (1500, 1)), rng.normal(size=(1500, 1))
    y, j = np.sin(2 * x) + 3 * noise * x, 2 * np.cos(2 * x) + 3 * noise
    with pytest.warns(DataWarning, match="unless the values are noisy"):
        model = JacobianRegressor(steps=400).fit(x, y, jacobian=j)
    assert model.solver_ == ("adam", "noisy values")
    fresh = np.linspace(-0.9, 0.9, 50)[:, None]
    assert np.abs(model.predict(fresh) - np.sin(2 * fresh)).mean() < 0.25


def test_the_solver_and_why(monkeypatch):
    x, y, j = wave(20)
    assert JacobianRegressor(**FAST).fit(x, y).solver_ == ("lbfgs", "deterministic, and small enough")
    data, _ = standardize(x, y[:, None], j[:, None])
    on_gpu = JacobianRegressor(**FAST, device="cuda")
    assert on_gpu._solver(data, x, y[:, None], j[:, None], False) == ("adam", "on cuda")
    model = JacobianRegressor(**{**FAST, "solver": "adam"}, steps=30).fit(x, y, jacobian=j)
    assert model.solver_ == ("adam", "as set")
    assert model.predict_jacobian(x).shape == (20, 2)
    monkeypatch.setattr(regressor, "too_large", lambda *_: True)
    model = JacobianRegressor(**FAST, steps=2).fit(x, y)
    assert model.solver_ == ("adam", "too many samples for full-batch steps")


def test_warm_start_goes_on():
    x, y, j = wave(30)
    settings = {**FAST, "activation": "auto", "weight_decay": 1e-6}  # the loss has the weight decay in it
    model = JacobianRegressor(warm_start=True, **settings).fit(x, y, jacobian=j)
    first = model.fits_[0]
    assert model.fit(x, y, jacobian=j).fits_[0].loss < first.loss
    assert model.fits_[0].net == first.net
    assert model.set_params(hidden=(6,)).fit(x, y, jacobian=j).fits_[0].net.widths != first.net.widths


@pytest.mark.ci
def test_it_works_with_the_rest_of_scikit_learn():
    x, y, j = wave(24)
    model = make_pipeline(StandardScaler(), JacobianRegressor(**FAST)).fit(x, y)
    assert model.score(x, y) > 0.9
    search = GridSearchCV(JacobianRegressor(**FAST), {"activation": ["silu", "tanh"]}, cv=2).fit(x, y, jacobian=j)
    assert search.best_params_["activation"] in {"silu", "tanh"}
    copy = pickle.loads(pickle.dumps(search.best_estimator_))
    np.testing.assert_array_equal(copy.predict(x), search.best_estimator_.predict(x))
    assert clone(copy).get_params()["hidden"] == (8, 8)


@pytest.mark.parametrize(
    ("settings", "jacobian", "message"),
    [
        ({}, np.zeros((20, 3)), r"`jacobian` of `fit` must have the shape \(20, 1, 2\).*Got shape \(20, 3\)"),
        ({}, np.full((20, 2), np.inf), "`jacobian` of `fit` must be finite.*20 of 20 rows, first in row 0"),
        ({}, "text", "`jacobian` of `fit` must be an array of floats"),
        ({"model": "kriging"}, None, "`model` of `JacobianRegressor`"),
        ({"model": "gp", "output_weights": 2.0}, None, 'model="gp"` of `JacobianRegressor` takes up to 6000 values'),
        ({"solver": "newton"}, None, "`solver` of `JacobianRegressor`"),
        ({"starts": 0}, None, "`starts` of `JacobianRegressor` must be an integer of at least 1"),
        ({"ensemble": 0}, None, "`ensemble` of `JacobianRegressor` must be an integer"),
        ({"ensemble": "a"}, None, "`ensemble` of `JacobianRegressor` must be an integer"),
        ({"starts": 1.5}, None, "`starts` of `JacobianRegressor` must be an integer"),
        ({"max_evaluations": 0}, None, "`max_evaluations` of `JacobianRegressor` must be an integer"),
        ({"hidden": 8}, None, "`hidden` of `JacobianRegressor` must be the widths"),
        (
            {"hidden": (8, 0)},
            None,
            "Each width in `hidden` of `JacobianRegressor` must be an integer of at least 1",
        ),
        ({"weight_decay": -1.0}, None, "`weight_decay` of `JacobianRegressor` must be"),
        ({"jacobian_weight": "much"}, None, "`jacobian_weight` of `JacobianRegressor` must be"),
        ({"activation": "relu"}, None, "`activation` of `JacobianRegressor`"),
        ({"output_weights": [1.0, 2.0, 3.0]}, None, r"`output_weights` .* fit the shape \(1,\). Got shape \(3,\)"),
        ({"output_weights": -1.0}, None, "`output_weights` of `JacobianRegressor` must be finite, at least 0"),
    ],
)
def test_what_it_refuses(settings, jacobian, message, as_users_run):
    x, y, _ = wave(20)
    with pytest.raises(InputError, match=message):
        JacobianRegressor(**{**FAST, **settings}).fit(x, y, jacobian=jacobian)


def test_what_it_warns_of():
    x, y, j = wave(20)
    with pytest.warns(DataWarning, match="input 1 never varies"):
        JacobianRegressor(**FAST).fit(np.stack([x[:, 0], np.ones(20)], 1), y)
    twice = np.concatenate([x, x[3:5]])
    with pytest.warns(DataWarning, match=r"1 input\(s\) occur more than once .* is in rows 4, 21"):
        JacobianRegressor(**FAST).fit(twice, np.concatenate([y, y[3:4], y[4:5] + 1]))
    twice, partials = np.concatenate([x, x[3:5]]), np.concatenate([j, j[3:4], j[4:5] + 1])
    with pytest.warns(DataWarning, match=r"1 input\(s\) .* different outputs or partials; .* is in rows 4, 21"):
        JacobianRegressor(**FAST).fit(twice, np.concatenate([y, y[3:5]]), jacobian=partials)
    with pytest.warns(DataWarning, match="output 0 in row 3 is .* times as far from the median as usual"):
        JacobianRegressor(**FAST).fit(x, np.where(np.arange(20) == 3, 1e9, y))
    with pytest.warns(DataWarning, match="a single sample: the prediction is constant"):
        JacobianRegressor(**FAST).fit(x[:1], y[:1])
    x, y, j = wave(60)
    with pytest.warns(DataWarning, match="do not explain how it changes"):
        model = JacobianRegressor(**FAST).fit(x, y, jacobian=1000 * j)
    assert len(model.warnings_) == 1


@pytest.mark.parametrize("wrong", [lambda j: -j, lambda j: j * [1000, 1], lambda j: j[::-1], lambda j: 0 * j])
def test_one_row_of_wrong_partials_among_fifty_is_named(wrong):
    x, y, j = wave(50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        JacobianRegressor(model="gp").fit(x, y, jacobian=j)
    j[7] = wrong(j[7])
    with pytest.warns(DataWarning, match="partials of output 0 in row 7 disagree with all other samples"):
        JacobianRegressor(model="gp").fit(x, y, jacobian=j)


@pytest.mark.parametrize(("factor", "named"), [(1e-3, r"if they were 1e\+03 times"), (-1.0, "if they were -1 times")])
def test_wrong_units_or_signs_of_an_input_are_named(factor, named):
    x = np.random.default_rng(0).uniform(-1, 1, (40, 3))
    y = np.sin(x[:, 0]) + x[:, 1] + x[:, 2] ** 2
    j = np.stack([np.cos(x[:, 0]), np.ones(40), 2 * x[:, 2]], 1)[:, None]
    assert not suspicious(x, y[:, None], j)
    (line,) = suspicious(x, y[:, None], j * np.array([1.0, factor, 1.0]))
    assert re.search(f"the partials of output 0 with respect to input 1 would agree best .* {named} as large", line)


@pytest.mark.parametrize("scale", [1e300, 1e-300])
def test_numbers_whose_squares_overflow_are_refused(scale):
    x, y, j = wave(20)
    with pytest.raises(InputError, match="standard deviation of an input of a surrogate must be between 1e-100"):
        JacobianRegressor(**FAST).fit(scale * x, y)
    with pytest.raises(InputError, match="standard deviation of an output of a surrogate must be between 1e-100"):
        JacobianRegressor(**FAST).fit(x, scale * y)
    with pytest.raises(InputError, match="largest partial of an output in standardized units of a surrogate must be"):
        JacobianRegressor(**FAST).fit(x, y, jacobian=scale * j)


def test_columns_and_rows_without_numbers_are_named():
    pandas = pytest.importorskip("pandas")
    x, y, j = wave(20)
    frame = pandas.DataFrame(x, columns=["a", "b"])
    model = JacobianRegressor(**FAST).fit(frame, y)
    dates = pandas.date_range("2020-01-01", periods=20)
    for column, message in (
        (dates, "'b' of `X` of `JacobianRegressor` must be numbers. Got datetime64.*Convert dates to numbers"),
        (["u", "v"] * 10, "'b' of `X` of `JacobianRegressor` must be numbers. Got .* one column of 0 and 1"),
        (pandas.Categorical([1, 2] * 10), "'b' of `X` of `JacobianRegressor` must be numbers"),
        (np.where(np.arange(20) == 4, np.nan, 1.0), "must be finite. Got NaN or infinity in 1 rows, first in row 4"),
    ):
        for call in (lambda X: JacobianRegressor(**FAST).fit(X, y), model.predict):
            with pytest.raises(InputError, match=message):
                call(frame.assign(b=column))
    with pytest.raises(InputError, match=r"Each column of `X` of `JacobianRegressor` must have a unique name. Got a"):
        model.fit(frame[["a", "a"]], y)
    with pytest.raises(InputError, match=r"`y` of `JacobianRegressor` must be finite. Got NaN .* first in row 2"):
        model.fit(x, np.where(np.arange(20) == 2, np.nan, y))
    with pytest.raises(InputError, match=r"column '0' of `X` .* must be numbers. Got datetime64"):
        model.fit(dates.to_numpy()[:, None], y)
    with pytest.raises(InputError, match="`X` of `JacobianRegressor` must be real numbers"):
        model.fit(x + 1j, y)
    with pytest.raises(InputError, match="`jacobian` of `fit` must be an array of floats"):
        model.fit(x, y, jacobian=j + 1j)


def test_partials_in_a_frame_are_taken_by_name():
    pandas = pytest.importorskip("pandas")
    x, y, j = wave(20)
    frame, values = pandas.DataFrame(x, columns=["a", "b"]), pandas.Series(y, name="f")
    first = JacobianRegressor(**FAST).fit(frame, values, jacobian=j)
    swapped = pandas.DataFrame({"df/db": j[:, 1], "df/da": j[:, 0]})
    second = JacobianRegressor(**FAST).fit(frame, values, jacobian=swapped)
    assert (first.predict(frame) == second.predict(frame)).all()
    for names in (["b", "a"], [("f", "b"), ("f", "a")]):
        other = JacobianRegressor(**FAST).fit(frame, values, jacobian=swapped.set_axis(names, axis=1))
        assert (first.predict(frame) == other.predict(frame)).all()
    model = JacobianRegressor(**FAST).fit(frame, values, jacobian=swapped[["df/db"]])  # the other one is not known
    alone = JacobianRegressor(**FAST).fit(frame, values, jacobian=j * [np.nan, 1])
    assert (model.predict(frame) == alone.predict(frame)).all()
    with pytest.raises(InputError, match=r"Each column of `jacobian` of `fit` must be dOUTPUT/dINPUT .* Got df/dc"):
        model.fit(frame, values, jacobian=swapped.rename(columns={"df/da": "df/dc"}))


def _tanh(x):
    return np.tanh(50 * (x[:, 0] - 0.4)), 50 / np.cosh(50 * (x - 0.4)) ** 2


SHARP = {
    "tanh": _tanh,
    "|x|": lambda x: (np.abs(x[:, 0] - 0.37), np.sign(x - 0.37)),
    "log": lambda x: (np.log(x[:, 0] + 1e-3), 1 / (x + 1e-3)),
    "root": lambda x: (np.sqrt(x[:, 0]), 0.5 / np.sqrt(x)),
}


@pytest.mark.parametrize("name", SHARP)
def test_right_partials_of_a_sharp_function_have_no_warning_and_wrong_ones_have_one(name):
    x = qmc.LatinHypercube(1, seed=1).random(50)
    y, j = SHARP[name](x)
    y, j = y[:, None], j[:, None]

    def lines(j):
        return suspicious(x, y, j) + wrong_partials(fit_gaussian_process(standardize(x, y, j)[0]))

    assert not lines(j)
    assert "output 0" in lines(180 / np.pi * j)[0]  # radians for degrees
    assert "output 0" in lines(np.random.default_rng(0).permutation(j))[0]
    wrong = j.copy()
    wrong[30] = np.abs(j).max()
    assert any("row 30 " in line for line in lines(wrong))


def test_the_interval_of_a_network_contains_what_that_of_a_process_misses():
    x = np.random.default_rng(0).random((40, 1))
    model = JacobianRegressor(max_evaluations=300).fit(x, np.log(x[:, 0] + 1e-3), jacobian=1 / (x + 1e-3))
    assert (model.model_, model.process_ is None) == ("network", False)  # which is much worse close to 0
    points = np.random.default_rng(1).random((500, 1))
    mean, std = model.predict(points, return_std=True)
    assert (np.abs(mean - np.log(points[:, 0] + 1e-3)) <= 1.6449 * std).mean() >= 0.9


def test_a_network_without_hidden_layers_is_linear():
    x = np.random.default_rng(0).random((30, 2))
    model = JacobianRegressor(model="network", hidden=()).fit(x, x @ [2.0, -3.0] + 1)
    np.testing.assert_allclose(model.predict_jacobian(x), np.tile([2.0, -3.0], (30, 1)), atol=1e-4)


def test_a_row_of_partials_times_minus_9_is_named():
    x = np.random.default_rng(0).random((200, 5))
    a, b, c, d, e = x.T
    y = 10 * np.sin(np.pi * a * b) + 20 * (c - 0.5) ** 2 + 10 * d + 5 * e
    rate = 10 * np.pi * np.cos(np.pi * a * b)
    j = np.stack([rate * b, rate * a, 40 * (c - 0.5), 10 + 0 * d, 5 + 0 * e], 1)[:, None]
    assert not suspicious(x, y[:, None], j)
    for row in range(0, 200, 20):
        wrong = j.copy()
        wrong[row] *= -9
        (line,) = suspicious(x, y[:, None], wrong)
        assert f"the partials of output 0 in row {row} disagree with the values of its neighbors" in line


@pytest.mark.ci
@pytest.mark.usefixtures("as_users_run")
@pytest.mark.filterwarnings("default")  # scikit-learn's own samples are contradictory, constant or skipped
def test_scikit_learn_s_own_checks():
    results = estimator_checks.check_estimator(
        JacobianRegressor(starts=1, **FAST), on_fail=None, expected_failed_checks=EXPECTED_TO_FAIL
    )
    wrong = {result["check_name"]: result["status"] for result in results if result["status"] == "failed"}
    assert not wrong
    xfailed = {result["check_name"] for result in results if result["status"] == "xfail"}
    assert xfailed == set(EXPECTED_TO_FAIL)


@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    "check",
    ["fit_idempotent", "estimators_pickle", "methods_sample_order_invariance", "dict_unchanged", "n_features_in"],
)
def test_scikit_learn_s_own_checks_of_what_a_process_stores(check):
    """Those that depend on the model; the others see the estimator alone, or take 10 s with a process."""
    getattr(estimator_checks, f"check_{check}")("JacobianRegressor", JacobianRegressor(starts=1, max_evaluations=150))


def test_samples_without_inputs_are_refused():
    with pytest.raises(ValueError, match=r"0 feature\(s\)"):
        JacobianRegressor(starts=1, **FAST).fit(np.zeros((12, 0)), np.zeros(12))
