"""Codes, texts and the JSON document of findings."""

import ast
import inspect
import json

import pytest
import torch
from torch import nn

from jacmatch.diagnostics import CODES, FINDINGS, Finding, doctor, preflight, report
from jacmatch.jacobian import findings as of_engines
from jacmatch.objectives import Distillation
from jacmatch.training.data import Batch

ENGINES = ("reverse", "forward", "differences")


def codes_in(module):
    """The first argument of each call that makes a finding, engines' names filled in."""
    codes = set()
    for call in ast.walk(ast.parse(inspect.getsource(module))):
        name = getattr(getattr(call, "func", None), "id", None)
        if name in ("Finding", "fault", "note") and call.args:
            code = call.args[0]
            if isinstance(code, ast.Constant):
                codes.add(code.value)
            elif isinstance(code, ast.JoinedStr):
                codes |= {engine + code.values[-1].value for engine in ENGINES}
    return codes


def test_every_code_is_listed_and_every_listed_code_exists():
    module = inspect.getmodule(doctor)
    made = codes_in(of_engines) | codes_in(module) | codes_in(preflight) | set(FINDINGS)
    made |= {"partly-detached", "forward-incomplete"}  # chosen by an expression
    assert made == set(CODES)


def test_the_document_of_a_diagnosis_is_json_with_stable_names():
    document = report(doctor(lambda x: x.detach() * x, torch.randn(3, 2)))
    assert json.loads(json.dumps(document)) == document
    assert document.keys() == {"ok", "findings", "says", "engine", "engines"}
    (first, *_) = document["findings"]
    assert first.keys() == {"code", "severity", "what", "remedy", "way_out"}
    assert first["way_out"] == first["remedy"]
    assert not document["ok"]


def test_the_document_of_a_preflight_check_is_json_with_stable_names():
    batch = Batch(torch.rand(8, 3), torch.arange(8) % 2, torch.arange(8), 0)
    document = report(preflight.preflight_check(Distillation(nn.Linear(3, 2)), batch))
    assert json.loads(json.dumps(document)) == document
    assert document.keys() == {"ok", "findings", "says", "errors", "exact"}
    assert document["ok"]
    assert document["says"] == "no fault found"


def test_former_names_warn():
    import importlib

    package = importlib.import_module("jacmatch.jacobian")
    with pytest.warns(DeprecationWarning, match=r"jacmatch\.diagnostics\.doctor"):
        assert package.doctor is doctor
    with pytest.warns(DeprecationWarning, match=r"jacmatch\.jacobian\.vjp_products"):
        assert package.pull is package.vjp_products
    with pytest.warns(DeprecationWarning, match=r"Finding\.remedy"):
        assert Finding("code", "note", "what", "do this").way_out == "do this"
    with pytest.raises(AttributeError):
        package.physician  # noqa: B018
