"""The report says what the run folder says, escapes everything and loads nothing."""

import base64
import csv
import html.parser
import io
import re

import numpy as np
import pytest
from matplotlib.image import imread

from jacmatch.errors import InputError
from jacmatch.report import figures, tables, write_report
from jacmatch.report.figures import METHODS, PALETTE, styles
from jacmatch.report.page import STYLE
from jacmatch.runs import Run, spread

EVIL = '<script>alert("x")</script>'


SCORES = ((0.7, 0.8), (0.75, 0.9))


def comparison(folder, *, label=EVIL, regression=False, images=True, size=8, scores=SCORES, smoke=False):
    """A finished run of two methods over as many seeds as there are scores."""
    settings = {"teacher": "cnn5", "student": label, "data": "digits"}
    settings |= {"smoke": True} if smoke else {}
    run = Run.create(folder, "distill", settings, "0.0.1")
    measure = "rmse" if regression else "accuracy"
    network = {measure: 0.75, "parameters": 1234}
    agreement = {"top1": None if regression else 0.5, "jacobian_cosine": 0.25, "jacobian_relative_error": 1.5}
    rows = []
    for method, values in zip(("labels", "outputs"), scores, strict=True):
        for seed in range(len(values)):
            child = run.child(f"seed{seed}/{method}", {**settings, "seed": seed, "method": method})
            child.log({"step": 10, f"validation_{measure}": 0.5 + 0.1 * seed})
            child.log({"step": 15, "loss": 1.0})
            child.log({"step": 20, f"validation_{measure}": 0.7 + 0.1 * seed})
        rows.append(
            {
                "method": method,
                "label": f"{label} {method}",
                "seeds": len(values),
                "steps": 20,
                measure: spread(values),
                "agreement": {
                    key: spread([value] * len(values)) for key, value in agreement.items() if value is not None
                },
                "seconds": spread([2.0, 4.0]),
            }
        )
    if images:
        rng = np.random.default_rng(0)
        channels = 1 if size == 8 else 3
        file = io.BytesIO()
        np.savez(
            file,
            images=rng.random((3, channels, size, size), dtype=np.float32),
            teacher=rng.standard_normal((3, channels, size, size)),
            students=rng.standard_normal((2, 3, channels, size, size)),
            methods=np.array([label, "b"]),
            cosines=rng.random((2, 3)),
            labels=np.arange(3),
        )
        run.write_bytes("jacobian_figure.npz", file.getvalue())
    whole = {"job": "distill", "version": "0.0.1", "seed": 0, "teacher": network, "student": network}
    whole |= {"agreement": agreement, "seconds": 1.0, "samples_per_second": 1.0, "peak_memory_bytes": 1}
    run.write_result({**whole, "rows": rows, "train_samples": 100, "test_samples": 500, "settings": settings})
    return run


class Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "xlink:href") and value]

    def handle_data(self, data):
        self.text += data


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def test_the_page_says_what_the_run_says(tmp_path):
    run = comparison(tmp_path / "run", label="cnn3")
    page = read(write_report(run.path))
    for words in ("cnn5 → cnn3 on digits", "75.0 ± 7.1", "1,234", "over 2 seeds", "500 test samples", "100 training"):
        assert words in page.text
    assert page.tags.count("img") == 3 * 4  # images, teacher, two students
    assert (run.path / "report.html").stat().st_size < 1_500_000


def test_everything_is_escaped_and_nothing_is_loaded(tmp_path):
    run = comparison(tmp_path / "run")
    page = read(write_report(run.path))
    assert "script" not in page.tags
    assert EVIL in page.text
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert "default-src 'none'" in (run.path / "report.html").read_text()


def test_tables_agree_with_the_rows(tmp_path):
    run = comparison(tmp_path / "run", label="a|b,c")
    write_report(run.path)
    rows = list(csv.reader((run.path / "table.csv").read_text().splitlines()))
    named = dict(zip(*rows[:2], strict=True))
    assert named["label"] == "a|b,c labels"
    assert float(named["accuracy_mean"]) == pytest.approx(0.75)
    assert float(named["accuracy_std"]) == pytest.approx(0.005**0.5)
    assert named["accuracy_values"] == "0.7 0.8"
    lines = (run.path / "table.md").read_text().splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| a\\|b,c labels | 75.0 ± 7.1 |")


def test_a_regression_has_no_agreement_in_class(tmp_path):
    run = comparison(tmp_path / "run", label="x", regression=True, images=False)
    page = read(write_report(run.path))
    assert "test RMSE" in page.text
    assert "0.75 ± 0.07071" in page.text
    assert "agreement %" not in page.text
    assert "img" not in page.tags


def subtitle(path):
    return re.search(r"</h1><p class=note>(.*?)</p>", path.read_text())[1]


def test_the_subtitle_says_what_was_run(tmp_path):
    assert subtitle(write_report(comparison(tmp_path / "run", label="cnn3").path)) == (
        "Teacher cnn5: 1,234 parameters. Student cnn3: 1,234 parameters. "
        "Data: digits, 100 training samples and 500 test samples. 20 optimizer steps. 2 seeds."
    )


def test_a_smoke_run_says_that_its_numbers_mean_nothing(tmp_path):
    whole = read(write_report(comparison(tmp_path / "whole", label="x").path)).text
    assert "mean nothing" not in whole
    smoke = read(write_report(comparison(tmp_path / "smoke", label="x", smoke=True).path)).text
    assert "A smoke run" in smoke
    assert "its numbers mean nothing" in smoke


def test_the_figure_of_jacobians_of_an_older_version_is_shown(tmp_path):
    run = comparison(tmp_path / "run", label="x")
    page = write_report(run.path).read_text()
    (run.path / "jacobian_figure.npz").rename(run.path / "sheet.npz")
    assert write_report(run.path).read_text() == page


def test_the_page_fits_a_phone_and_no_heading_is_cut(tmp_path):
    page = write_report(comparison(tmp_path / "run", label="x").path).read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert page.count("<table>") == page.count("<div class=wide><table>") > 0
    assert re.search(r"\.wide {[^}]*overflow-x: auto", STYLE)
    breaking = re.search(r"([^}]*){ overflow-wrap: anywhere; }", STYLE)[1]
    assert "thead" not in breaking  # a heading that breaks anywhere becomes a column of letters
    assert "tbody th" in breaking


def test_the_page_is_the_same_when_it_is_written_again(tmp_path):
    run = comparison(tmp_path / "run", label="x")
    first = write_report(run.path).read_bytes()
    assert write_report(run.path).read_bytes() == first


def test_no_method_is_favoured_and_gains_are_taken_seed_by_seed(tmp_path):
    worse = comparison(tmp_path / "run", label="x", scores=((0.7, 0.8), (0.6, 0.85)))
    text = write_report(worse.path).read_text()
    assert "-10.0, +5.0" in text
    assert "last-child { font-weight" not in text
    assert "font-weight: 600" not in text


def test_the_page_says_what_the_numbers_are(tmp_path):
    two = read(write_report(comparison(tmp_path / "two", label="x").path)).text
    assert "sample standard deviation over 2 seeds" in two
    assert "Jacobians, on a fixed part of these samples" in two
    assert "each image has its own scale" in two
    one = read(write_report(comparison(tmp_path / "one", label="x", scores=((0.7,), (0.8,))).path)).text
    assert "One seed, so the spread is not known" in one
    assert "±" not in one
    assert "Each seed" not in one


@pytest.mark.parametrize("label", ["$\\x$", "_hidden", "a & b < c", "é 漢", "\udce9"])
def test_any_name_can_be_shown(tmp_path, label):
    write_report(comparison(tmp_path / "run", label=label).path)


def test_a_page_of_large_pictures_stays_small(tmp_path):
    page = write_report(comparison(tmp_path / "run", label="x", size=224).path)
    assert page.stat().st_size < 1_500_000


def test_a_row_logged_twice_counts_once_and_seeds_meet_at_common_steps():
    first = [{"step": 1, "validation_accuracy": 0.1}, {"step": 1, "validation_accuracy": 0.3}, {"step": 2}]
    second = [{"step": 1, "validation_accuracy": 0.5}, {"step": 2, "validation_accuracy": 0.9}]
    steps, values = figures._by_step([first, second], "validation_accuracy")
    assert steps.tolist() == [1]
    assert values.tolist() == [[0.3], [0.5]]


def test_curves_take_the_colors_and_letters_of_the_page():
    picture = figures.curves({"labels": [[{"step": step, "validation_rmse": step} for step in (1, 2, 3)]]}, "rmse")
    assert "var(--grey)" in picture
    assert "currentColor" in picture
    assert "#01" not in picture
    assert "DejaVu" not in picture
    assert "http" not in picture.replace("http://www.w3.org/", "")


def pixels(address):
    return imread(io.BytesIO(base64.b64decode(address.partition(",")[2])))[..., :3]


def test_a_jacobian_is_white_at_zero_and_symmetric_in_sign():
    rising = pixels(figures.signed(np.array([[[0.0, 2.0], [-2.0, 1.0]]])))
    assert rising[0, 0].min() > 0.95
    assert rising[0, 1].argmax() == 0  # positive is red
    assert rising[1, 0].argmax() == 2  # negative is blue
    scaled = pixels(figures.signed(np.array([[[0.0, 20.0], [-20.0, 10.0]]])))
    assert (rising == scaled).all()
    assert (pixels(figures.signed(np.zeros((3, 2, 2)))) > 0.95).all()


def test_channels_are_summed():
    row = np.array([[[1.0, -3.0]], [[2.0, 5.0]], [[4.0, -1.0]]])
    assert figures.signed(row) == figures.signed(row.sum(0, keepdims=True))


def test_what_was_not_measured_is_a_dash():
    numbers = {"mean": 0.5, "std": None, "values": [0.5]}
    agreement = {"top1": None, "jacobian_cosine": numbers}
    row = {"label": "a", "accuracy": numbers, "agreement": agreement, "steps": 1, "seconds": numbers}
    assert tables.cells({"rows": [row]})[1] == [["a", "50.0", "–", "0.500", "–", "1", "0.5"]]


def luminance(color):
    parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_every_color_stands_out_from_its_background():
    light, dark = STYLE.split("@media (prefers-color-scheme: dark)")
    for scheme in (light, dark):
        colors = dict(re.findall(r"--(\w+): (#[0-9a-f]{6}|#fff)[;\s]", scheme))
        ground, card = (luminance(colors[name].replace("#fff", "#ffffff")) for name in ("ground", "card"))
        names = ["text", "soft", *PALETTE]
        for name in names:
            for behind in (ground, card):
                low, high = sorted((luminance(colors[name]), behind))
                assert (high + 0.05) / (low + 0.05) >= 4.5, name


def misshapen():
    """Arrays with fewer students than methods."""
    one, file = np.zeros((3, 1, 8, 8)), io.BytesIO()
    few = {"students": np.zeros((1, 3, 1, 8, 8)), "methods": np.array(["a", "b"]), "cosines": np.zeros((1, 3))}
    np.savez(file, images=one, teacher=one, labels=np.arange(3), **few)
    return file.getvalue()


def test_folders_without_a_comparison_are_refused(tmp_path):
    Run.create(tmp_path / "open", "distill", {}, "1")
    other = Run.create(tmp_path / "other", "doctor", {}, "1")
    other.write_result({"job": "doctor", "version": "1", "seed": 0, "seconds": 1.0, "settings": {}})
    for name, cut in {"damaged": b"nonsense", "empty": b"", "torn": None, "misshapen": misshapen()}.items():
        arrays = comparison(tmp_path / name, label="x").path / "jacobian_figure.npz"
        arrays.write_bytes(arrays.read_bytes()[:500] if cut is None else cut)
    result = comparison(tmp_path / "rows", label="x").path / "result.json"
    result.write_text(result.read_text().replace('"mean"', '"average"'))
    for name, message in {
        "none": "no folder of that name",
        "open": "must contain a finished run",
        "other": "must contain a comparison",
        **dict.fromkeys(
            ("damaged", "empty", "torn", "misshapen"),
            r"must contain the arrays of the figure of Jacobians",
        ),
        "rows": "result.json must (be unchanged since its job wrote it|have the rows or tables)",
    }.items():
        with pytest.raises(InputError, match=message):
            write_report(tmp_path / name)
        assert not (tmp_path / name / "report.html").exists()


def color_blind(color, missing):
    """A color in linear RGB as somebody sees it who lacks a cone (Viénot, Brettel and Mollon, 1999)."""
    parts = np.array([int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]) ** 2.2
    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    seen = {
        "red": [[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]],
        "green": [[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]],
    }
    return np.linalg.inv(to_lms) @ np.array(seen[missing]) @ to_lms @ parts


@pytest.mark.parametrize("missing", ["red", "green"])
def test_the_main_colors_differ_without_a_cone(missing):
    """Grey, orange and blue carry the comparison that every table makes."""
    for scheme in (0, 1):
        seen = [color_blind(PALETTE[name][scheme], missing) for name in ("grey", "orange", "blue")]
        for first, second in ((0, 1), (0, 2), (1, 2)):
            assert np.abs(seen[first] - seen[second]).max() > 0.1


def test_a_method_has_one_color_whatever_is_shown_beside_it():
    names = [name for methods in METHODS.values() for name in methods]
    assert len(set(names)) == len(names)
    for color, methods in METHODS.items():
        for name in methods:
            assert styles(["unknown", name])[1] == styles([name])[0]
            assert styles([name])[0].color == color
    assert [style.color for style in styles(["labels", "outputs", "jacobians"])] == ["grey", "orange", "blue"]
    labels = ["labels only", "labels + outputs", "labels + outputs + Jacobians"]
    assert styles(labels) == styles(["labels", "outputs", "jacobians"])


def test_lines_shown_together_differ_in_color_or_dash():
    names = ["values", "values, 4 × steps", "values, 16 × steps", *(f"other {number}" for number in range(7))]
    chosen = styles(names)
    assert len({(style.color, style.dash) for style in chosen}) == len(names)
    assert len({style.dash for style in chosen[:3]}) == 3
    assert {style.color for style in chosen[:3]} == {"orange"}
    assert "orange" not in {style.color for style in chosen[3:]}
