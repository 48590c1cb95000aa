import base64

from jacmatch.report import Table, write_report
from jacmatch.runs import Run

from .test_report import EVIL, read


def reproduced(folder, data=True):
    settings = {"name": "low-data", "data": EVIL}
    run = Run.create(folder, "reproduce", settings, "1")
    table = Table(
        "t", f"Accuracy {EVIL}", ("row", "n = 1"), (("labels", "5.0"), (EVIL, "7.0 ± 1.2")), (f"Note {EVIL}.",)
    )
    result = {"job": "reproduce", "version": "1", "seed": 0, "seconds": 1.0, "settings": settings}
    result |= {"data": EVIL} if data else {}
    run.write_result({**result, "about": "what helps", "tables": [table.plain()]})
    return run


def test_a_study_without_data_names_none(tmp_path):
    text = read(write_report(reproduced(tmp_path / "run", data=False).path)).text
    assert text.startswith("low-data\n")
    assert "low-data on" not in text


def test_the_page_has_title_rows_and_notes_escaped(tmp_path):
    run = reproduced(tmp_path / "run")
    page = read(write_report(run.path))
    for words in ("low-data on <script>", "What helps.", "7.0 ± 1.2", f"Note {EVIL}.", f"Accuracy {EVIL}"):
        assert words in page.text
    assert not {"script", "img", "svg"} & set(page.tags)


def test_a_figure_is_shown_and_cannot_act(tmp_path):
    run = reproduced(tmp_path / "run")
    drawn = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    run.write_bytes("figure.svg", drawn)
    page = read(write_report(run.path))
    kind, _, data = page.links[0].partition(",")
    assert kind == "data:image/svg+xml;base64"  # an image: no script of it is run
    assert base64.b64decode(data) == drawn
    assert "script" not in page.tags


def test_a_small_figure_is_for_phones_and_a_figure_without_one_scrolls(tmp_path):
    run = reproduced(tmp_path / "run")
    run.write_bytes("figure.svg", b"<svg>wide</svg>")
    assert "<figure class='drawn wide'><img class=whole" in write_report(run.path).read_text()
    run.write_bytes("figure-small.svg", b"<svg>small</svg>")
    page = write_report(run.path).read_text()
    small = base64.b64encode(b"<svg>small</svg>").decode()
    assert f'<source media="(max-width: 40rem)" srcset="data:image/svg+xml;base64,{small}">' in page
