"""Tables: which columns are what, and what is refused."""

import numpy as np
import pytest

from jacmatch.errors import InputError
from jacmatch.surrogates import JacobianRegressor, split_frame
from jacmatch.surrogates.tables import load_table

pandas = pytest.importorskip("pandas")
COLUMNS = {
    "x1": [0.0, 1.0, 2.0],
    "x2": [1.0, 1.0, 4.0],
    "y": [0.0, 1.0, 8.0],
    "dy/dx1": [1.0, np.nan, 4.0],
}


def write(folder, text):
    (folder / "runs.csv").write_text(text, encoding="utf-8")
    return f"csv:{folder / 'runs.csv'}"


def test_columns_by_their_names():
    x, y, j = split_frame(pandas.DataFrame(COLUMNS))
    assert list(x.columns) == ["x1", "x2"]
    assert list(y.columns) == ["y"]
    np.testing.assert_array_equal(j[:, 0], [[1.0, np.nan], [np.nan, np.nan], [4.0, np.nan]])


def test_columns_that_are_named():
    frame = pandas.DataFrame({"force": [1.0, 2.0], "size": [3.0, 4.0], "lift": [5.0, 6.0], "dlift/dsize": [0.5, 0.6]})
    for arguments in ({"outputs": ["lift"]}, {"inputs": ["force", "size"]}):
        x, y, j = split_frame(frame, **arguments)
        assert list(x.columns) == ["force", "size"]
        assert list(y.columns) == ["lift"]
        np.testing.assert_array_equal(j[:, 0, 1], [0.5, 0.6])


def test_a_file_is_as_its_frame(tmp_path):
    frame = pandas.DataFrame(COLUMNS)
    frame.to_csv(tmp_path / "runs.csv", index=False)
    arrays = load_table(f"csv:{tmp_path / 'runs.csv'}")
    x, y, j = split_frame(frame)
    np.testing.assert_array_equal(arrays["x_train"], x.to_numpy())
    np.testing.assert_array_equal(arrays["y_train"], y.to_numpy())
    np.testing.assert_array_equal(arrays["j_train"], j)
    assert "j_train" not in load_table(write(tmp_path, "x,y\n1,2\n3,4\n"))


def test_a_parquet_file_is_as_its_frame(tmp_path):
    pytest.importorskip("pyarrow")
    pandas.DataFrame(COLUMNS).to_parquet(tmp_path / "runs.parquet")
    arrays = load_table(f"parquet:{tmp_path / 'runs.parquet'}")
    np.testing.assert_array_equal(arrays["y_train"][:, 0], COLUMNS["y"])


def test_frames_in_and_out():
    x = pandas.DataFrame({"a": np.linspace(0, 1, 12), "b": np.linspace(1, 0, 12) ** 2}, index=range(100, 112))
    y = pandas.DataFrame({"lift": np.sin(x["a"]), "drag": x["b"]})
    model = JacobianRegressor(hidden=(4,), starts=1, max_evaluations=50, ensemble=2).fit(x, y)
    frame = model.predict_frame(x, jacobian=True, return_std=True)
    partials = ["dlift/da", "dlift/db", "ddrag/da", "ddrag/db"]
    assert list(frame.columns) == ["lift", "drag", "lift_std", "drag_std", *partials]
    assert list(frame.index) == list(x.index)
    np.testing.assert_array_equal(frame["drag"], model.predict(x)[:, 1])
    np.testing.assert_array_equal(frame["ddrag/da"], model.predict_jacobian(x)[:, 1, 0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,y\n", "must have a header and at least one row"),
        ("x,y\n1,2\n1\n", r"must have 2 cells, like its header. Got 1 in line 3"),
        ("x,x,y\n1,2,3\n", "must have a unique name. Got x"),
        ("a,b\n1,2\n", r"must have columns of inputs \(x…\) and of outputs"),
        ("x;y\n1,5;2\n", "must be separated by commas. Got 'x;y'"),
        ("x,y\n" + 200_000 * "1" + ",2\n", "must be a CSV file with a header. Got Error: field larger"),
        ("x,y\nred,2\n", r"'x' of .* must be numbers\. Got 'red'.*get_dummies"),
        ('x,y\n"1,234.5",2\n', r"'x' of .* must be numbers\. Got '1,234\.5'\. Write numbers like 1234\.5"),
        ("x,y\n1,2\nNA,3\n", r"'x' of .* must be numbers\. Got 'NA'\. Write numbers"),
        ("x,y\n1_5,2\n", r"'x' of .* must be numbers\. Got '1_5'"),
        ("x,y\n\n1,2\n\n3\n", r"must have 2 cells, like its header. Got 1 in line 5"),
        ("x,y\n1,2\n,3\n", "must be finite. Got NaN or infinity in 1 rows, first in row 1, column 'x'"),
        ("x,y,dy/dx\n1,2,inf\n", "must be finite, or NaN"),
        ("x,y,dy/dz\n1,2,3\n", r"'dy/dz' of .* must be dOUTPUT/dINPUT"),
    ],
)
def test_tables_that_are_refused(text, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load_table(write(tmp_path, text))


def test_a_column_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="must have the column 'z'"):
        load_table(write(tmp_path, "x,y\n1,2\n"), inputs=["z"])
    with pytest.raises(InputError, match="`--teacher csv:FILE` must name an existing file"):
        load_table("csv:nowhere.csv")
