"""Workers import nothing from the working folder."""

import os
import subprocess
import sys

import pytest

from jacmatch_research import processes

NAMES = ("json.py", "os.py", "yaml.py", "pickle.py", "socket.py", "multiprocessing.py", "runpy.py", "torch.py")


@pytest.fixture
def _hostile(tmp_path, monkeypatch):
    """A working folder with modules that leave a file where they are imported."""
    for name in NAMES:
        (tmp_path / name).write_text("open('ran', 'w').close()\nraise ImportError('of the working folder')\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="-P is from Python 3.11")
@pytest.mark.usefixtures("_hostile")
def test_workers_begin_without_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    with processes.safe_path():
        text = "import json, pickle, socket, runpy, multiprocessing"
        subprocess.run([sys.executable, "-S", "-c", text], check=True)
    assert "PYTHONSAFEPATH" not in os.environ
    assert not (tmp_path / "ran").exists()
    monkeypatch.setenv("PYTHONSAFEPATH", "x")
    with processes.safe_path():
        pass
    assert os.environ["PYTHONSAFEPATH"] == "x"
