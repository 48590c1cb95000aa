"""The report says what the run folder says, escapes everything and loads nothing."""

import csv
import html.parser
import io

import numpy as np
import pytest

from jacmatch.errors import InputError
from jacmatch.report import tables, write_report
from jacmatch.runs import Run, spread

EVIL = '<script>alert("x")</script>'


def comparison(folder, *, label=EVIL, regression=False, sheet=True):
    settings = {"teacher": "cnn5", "student": label, "data": "digits"}
    run = Run.create(folder, "distill", settings, "0.0.1")
    measure = "rmse" if regression else "accuracy"
    network = {measure: 0.75, "parameters": 1234}
    agreement = {"top1": None if regression else 0.5, "jacobian_cosine": 0.25, "jacobian_relative_error": 1.5}
    rows = []
    for method in ("labels", "outputs"):
        for seed in (0, 1):
            child = run.child(f"seed{seed}/{method}", {**settings, "seed": seed, "method": method})
            child.log({"step": 10, f"validation_{measure}": 0.5 + 0.1 * seed})
            child.log({"step": 15, "loss": 1.0})
            child.log({"step": 20, f"validation_{measure}": 0.7 + 0.1 * seed})
        rows.append(
            {
                "method": method,
                "label": f"{label} {method}",
                "seeds": 2,
                "steps": 20,
                measure: spread([0.70, 0.80]),
                "agreement": {key: spread([value, value]) for key, value in agreement.items() if value is not None},
                "seconds": spread([2.0, 4.0]),
            }
        )
    if sheet:
        rng = np.random.default_rng(0)
        file = io.BytesIO()
        np.savez(
            file,
            images=rng.random((3, 1, 8, 8), dtype=np.float32),
            teacher=rng.standard_normal((3, 1, 8, 8)),
            students=rng.standard_normal((2, 3, 1, 8, 8)),
            methods=np.array([label, "b"]),
            cosines=rng.random((2, 3)),
            labels=np.arange(3),
        )
        run.write_bytes("sheet.npz", file.getvalue())
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
    assert page.tags.count("svg") == 1
    assert page.tags.count("img") == 1
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
    assert rows[1][0] == "a|b,c labels"
    assert rows[1][1] == "75.0 ± 7.1"
    lines = (run.path / "table.md").read_text().splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| a\\|b,c labels | 75.0 ± 7.1 |")
    heads, cells = tables.cells(run.result)
    text = tables.aligned(heads, cells).splitlines()
    assert len({len(line) for line in text}) == 1


def test_a_regression_has_no_agreement_in_class(tmp_path):
    run = comparison(tmp_path / "run", label="x", regression=True, sheet=False)
    page = read(write_report(run.path))
    assert "test RMSE" in page.text
    assert "0.750 ± 0.071" in page.text
    assert "agreement %" not in page.text
    assert "img" not in page.tags


def test_the_page_is_the_same_when_it_is_written_again(tmp_path):
    run = comparison(tmp_path / "run", label="x")
    first = write_report(run.path).read_bytes()
    assert write_report(run.path).read_bytes() == first


def test_folders_without_a_comparison_are_refused(tmp_path):
    Run.create(tmp_path / "open", "distill", {}, "1")
    other = Run.create(tmp_path / "other", "doctor", {}, "1")
    other.write_result({"job": "doctor", "version": "1", "seed": 0, "seconds": 1.0, "settings": {}})
    damaged = comparison(tmp_path / "damaged", label="x", sheet=False)
    (damaged.path / "sheet.npz").write_bytes(b"nonsense")
    for name, message in {
        "none": "no folder of that name",
        "open": "must hold a finished run",
        "other": "must hold a comparison",
        "damaged": "sheet.npz",
    }.items():
        with pytest.raises(InputError, match=message):
            write_report(tmp_path / name)
        assert not (tmp_path / name / "report.html").exists()
