import ast
import dataclasses
import inspect
import itertools
import math

import pytest

from jacmatch.errors import InputError
from jacmatch.training import Training, factor
from jacmatch.training.configuration import ema_decay

from . import reference


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_rate_follows_its_definition(schedule, warmup):
    settings = Training(steps=40, schedule=schedule, warmup=warmup, milestones=(0.25, 0.5, 0.9), lr=0.3)
    for step in range(40):
        assert settings.lr * factor(step, settings) == pytest.approx(reference.rate(step, settings), rel=1e-12)


def test_rate_at_points_worked_out_by_hand():
    cosine = Training(steps=100, schedule="cosine", warmup=20)
    assert factor(0, cosine) == 1 / 20
    assert factor(19, cosine) == factor(20, cosine) == 1.0
    assert factor(60, cosine) == pytest.approx(0.5)
    assert 0 < factor(99, cosine) < 1e-3
    falling = Training(steps=10, schedule="step", milestones=(0.5, 0.8))
    assert [factor(step, falling) for step in (4, 5, 7, 8)] == pytest.approx([1, 0.1, 0.1, 0.01])


def test_warmup_may_take_all_steps():
    assert factor(3, Training(steps=4, warmup=4, schedule="cosine")) == 1.0


def test_decay_of_the_average():
    assert ema_decay(0, 0.9) == 0.1
    assert ema_decay(5, 0.9) == 6 / 15
    assert ema_decay(80, 0.9) == 0.9


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, r"`steps` of `Training` must be an integer of at least 1\. Got 0"),
        ({"steps": -5}, r"`steps` .* Got -5"),
        ({"steps": True}, r"`steps` .* Got True"),
        ({"batch_size": 0}, r"`batch_size` of `Training`"),
        ({"accumulate": 0}, r"`accumulate` of `Training`"),
        ({"validate_every": 0}, r"`validate_every` of `Training`"),
        ({"checkpoint_every": 0}, r"`checkpoint_every` of `Training`"),
        ({"max_steps": 0}, r"`max_steps` of `Training`"),
        ({"warmup": -1}, r"`warmup` of `Training` must be an integer of at least 0"),
        ({"steps": 10, "warmup": 11}, r"`warmup` .* must not be longer than `steps`, 10\. Got 11"),
        ({"lr": 0.0}, r"`lr` of `Training` must be finite and positive\. Got 0\.0"),
        ({"lr": math.nan}, r"`lr` .* Got nan"),
        ({"lr": math.inf}, r"`lr` .* Got inf"),
        ({"weight_decay": -0.1}, r"`weight_decay` .* at least 0"),
        ({"momentum": 1.0}, r"`momentum` .* in \[0, 1\)"),
        ({"clip": 0.0}, r"`clip` .* positive.* Use None not to clip"),
        ({"ema": 1.0}, r"`ema` .* in \(0, 1\).* Use None for no average"),
        ({"milestones": (0.8, 0.5)}, r"`milestones` of `Training` must be ascending"),
        ({"milestones": (0.5, 0.5)}, r"`milestones`"),
        ({"milestones": (1.0,)}, r"`milestones`"),
        ({"optimizer": "adan"}, r"`optimizer` .* Got 'adan'\. Nearest: adam"),
        ({"schedule": "cosin"}, r"`schedule` .* Nearest: cosine"),
        ({"precision": "16"}, r"`precision` .* Known: 32, bf16, fp16"),
        ({"augment": ("crop", "flop")}, r"`augment` .* Got 'flop'\. Nearest: flip"),
    ],
)
@pytest.mark.usefixtures("as_users_run")
def test_wrong_settings_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        Training(**given)


def test_every_field_is_described():
    body = ast.parse(inspect.getsource(Training)).body[0].body
    described = {
        field.target.id
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value.value, str)
    }
    assert [field.name for field in dataclasses.fields(Training) if field.name not in described] == []
