"""What fuzzing found, and whole files, read again by every reader of files from outside."""

from pathlib import Path

import pytest

from .readers import READERS, survives

CORPUS = Path(__file__).parent / "corpus"
pytestmark = pytest.mark.usefixtures("all_as_users_run")


@pytest.mark.parametrize("name", READERS)
def test_whole_files_are_read_and_cut_ones_are_not(name, tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    seeds = READERS[name].seeds(tmp_path)[:3]
    assert survives(name, seeds[0], folder)
    assert not all(survives(name, seed[: 1 + len(seed) // 2], folder) for seed in seeds)


@pytest.mark.parametrize("name", READERS)
def test_a_former_finding_is_read_or_refused(name, tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    for file in sorted((CORPUS / name).glob("*")):
        survives(name, file.read_bytes(), folder)
