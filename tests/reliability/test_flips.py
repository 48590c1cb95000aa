"""Files that are damaged: each flipped bit and each cut is noticed, or changes nothing that is read."""

import random
import shlex
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from jacmatch.cli import VERBS, main
from jacmatch.cli.flags import parse
from jacmatch.errors import InputError
from jacmatch.jobs.cache import opened, queries_of
from jacmatch.jobs.networks import load_student
from jacmatch.jobs.settings import load as load_data
from jacmatch.teachers.cached.reader import bits_of
from jacmatch.training.checkpoints import load

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("all_as_users_run")]
TIMES = 1000
TRAIN = "train --data npz:data.npz --model mlp:8 --steps 40 --batch-size 16 --ema 0.9 --validation 0"
TAUGHT = (
    "--data npz:data.npz --teacher taught --student mlp:8 --steps 8 --batch-size 16 --views 2 --augment crop --seeds 1 "
    "--validation 0 --per-class 0 --cache answers"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint, a network and a cache."""
    folder = tmp_path_factory.mktemp("made")
    generator = np.random.default_rng(0)
    x, y = generator.random((48, 1, 8, 8), dtype=np.float32), np.arange(48) % 3
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        np.savez("data.npz", x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
        for words in (f"{TRAIN} --out taught", f"{TRAIN} --out cut --max-steps 11", f"cache build {TAUGHT}"):
            assert main(shlex.split(words)) == 0
    return folder


def damaged(content, choose, cut):
    """The content with one bit flipped, or cut off somewhere."""
    position = choose.randrange(len(content))
    if cut:
        return content[:position]
    return content[:position] + bytes([content[position] ^ 1 << choose.randrange(8)]) + content[position + 1 :]


@pytest.mark.parametrize("cut", [False, True])
def test_checkpoints(made, tmp_path, cut):
    content, choose = (made / "cut" / "checkpoint.pt").read_bytes(), random.Random(1)
    file = tmp_path / "checkpoint.pt"
    for _ in range(TIMES):
        file.write_bytes(damaged(content, choose, cut))
        with pytest.raises(InputError, match="must be a complete checkpoint"):
            load(file)


def test_weights_of_a_run(made, tmp_path):
    shutil.copytree(made / "taught", tmp_path / "run")
    file, choose = tmp_path / "run" / "student.safetensors", random.Random(2)
    content = file.read_bytes()
    for _ in range(TIMES):
        file.write_bytes(damaged(content, choose, cut=False))
        with pytest.raises(InputError, match="must have the checksum that it was written with"):
            load_student(tmp_path / "run")


def answers_of(source, cache):
    """Return all that a training reads from the cache, as bits."""
    teacher, answers = opened(cache, source), []
    for view in range(source.views):
        for rows in torch.split(source.order(view), source.batch_size):
            given = source.answers(rows, view)
            answers += bits_of(teacher.answer(given.x, given.question))
    return answers


@pytest.mark.parametrize("cut", [False, True])
def test_caches(made, tmp_path, cut, monkeypatch):
    monkeypatch.chdir(made)
    kind = VERBS["distill"].load()
    job = kind(**parse("jacmatch distill", kind, shlex.split(TAUGHT), {})[0])
    data = load_data(job.data, job.seed, job.smoke)
    source = queries_of(job, data, load_student("taught"), 0)
    cache = tmp_path / "answers"
    shutil.copytree(made / "answers", cache)
    whole = answers_of(source, cache)
    files = [file for file in sorted(cache.rglob("*")) if file.is_file() and file.stat().st_size]
    sizes, choose, outcomes = [file.stat().st_size for file in files], random.Random(3), Counter()
    for number in range(TIMES):
        # Every other time any byte, else any file: most bytes are products, most mistakes are possible in small files.
        file = choose.choices(files, sizes)[0] if number % 2 else choose.choice(files)
        content = file.read_bytes()
        file.write_bytes(damaged(content, choose, cut))
        try:
            answers = answers_of(source, cache)
        except InputError:
            outcomes["noticed"] += 1
        else:
            same = len(answers) == len(whole) and all(map(torch.equal, answers, whole))
            outcomes["harmless" if same else f"wrong: {Path(file).relative_to(cache)}"] += 1
            if same:
                outcomes[f"harmless in {file.name}"] += 1
        file.write_bytes(content)
    print(dict(outcomes))  # with pytest -s
    assert outcomes["noticed"] + outcomes["harmless"] == TIMES
