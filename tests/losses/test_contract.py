"""What every loss must keep, run on every row of `cases.py`."""

import inspect
import typing

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from jacmatch import losses
from jacmatch.errors import InputError
from jacmatch.losses import attention, jacobians, noise, outputs, penalties

from .cases import BATCH, CASES, Case

each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
DIFFERENTIABLE = [case for case in CASES if case.differentiable]


def several(answer) -> tuple[Tensor, ...]:
    return answer if isinstance(answer, tuple) else (answer,)


def run(case: Case, inputs) -> tuple[Tensor, ...]:
    return several(case.function(*inputs, **case.options))


def close(a, b, **tolerances):
    for left, right in zip(several(a), several(b), strict=True):
        torch.testing.assert_close(left, right, **(tolerances or {"rtol": 1e-9, "atol": 1e-12}))


def with_gradient(inputs, dtype=torch.float64):
    return tuple(x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x for x in inputs)


@each
def test_equals_the_slow_reference(case):
    inputs = case.unequal()
    copies = [tensor.clone() for tensor in inputs]
    answer = run(case, inputs)
    close(answer, case.reference(*inputs, **case.options))
    for tensor, copy in zip(inputs, copies, strict=True):
        assert torch.equal(tensor, copy), "the inputs were changed"
    assert all(len(part) == BATCH for part in answer)


@each
def test_default_options_equal_the_references_defaults(case):
    required = {
        name
        for name, parameter in inspect.signature(case.function).parameters.items()
        if name in case.options and parameter.default is inspect.Parameter.empty
    }
    options = {name: case.options[name] for name in required}
    inputs = case.unequal()
    close(case.function(*inputs, **options), case.reference(*inputs, **options))


@pytest.mark.parametrize("case", [case for case in CASES if case.equal], ids=lambda case: case.name)
def test_zero_if_and_only_if_equal(case):
    inputs = case.equal()
    for part in run(case, inputs):
        assert part.abs().max() < 1e-14
    # One entry of the first tensor moves, in one sample: that sample must see it and no other.
    first = inputs[0].movedim(case.batch_dim, 0)
    for sample in range(BATCH):
        for entry in range(first[sample].numel()):
            moved = first.clone(memory_format=torch.contiguous_format)
            moved[sample].view(-1)[entry] += 0.25
            total = sum(run(case, (moved.movedim(0, case.batch_dim), *inputs[1:]))).reshape(BATCH, -1).sum(1)
            assert total[sample] > 1e-5, f"entry {entry} is not seen"
            total[sample] = 0
            assert total.abs().max() < 1e-14, "another sample is changed"


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda case: case.name)
def test_gradients(case):
    inputs = with_gradient(case.unequal())
    assert gradcheck(lambda *x: run(case, x), inputs)
    assert gradgradcheck(lambda *x: run(case, x), inputs)


@each
def test_samples_do_not_see_each_other(case):
    inputs, dim = case.unequal(), case.batch_dim
    dims = [0 if not tensor.is_floating_point() else dim for tensor in inputs]
    whole = run(case, inputs)
    order = torch.tensor([2, 0, 1])
    permuted = run(case, [tensor.index_select(d, order) for tensor, d in zip(inputs, dims, strict=True)])
    close(permuted, tuple(part[order] for part in whole))
    pieces = [
        run(case, [tensor.narrow(d, start, length) for tensor, d in zip(inputs, dims, strict=True)])
        for start, length in ((0, 1), (1, 2))
    ]
    close(tuple(torch.cat(parts) for parts in zip(*pieces, strict=True)), whole)


@pytest.mark.parametrize(
    ("case", "invariance"),
    [(case, invariance) for case in CASES for invariance in case.invariances],
    ids=lambda value: getattr(value, "name", value),
)
def test_claimed_invariances(case, invariance):
    inputs = case.unequal()
    changed = case.invariances[invariance](inputs)
    assert any(not torch.equal(a, b) for a, b in zip(inputs, changed, strict=True))
    close(run(case, changed), run(case, inputs))


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    ("case", "message"),
    [(case, message) for case in CASES for message in case.refused],
    ids=lambda value: getattr(value, "name", ""),
)
def test_refuses_wrong_shapes(case, message):
    inputs = case.refused[message](case.unequal())
    with pytest.raises(InputError, match=message):
        run(case, inputs)


def test_every_loss_of_two_tensors_refuses_unequal_shapes():
    paired = [case for case in CASES if len([x for x in case.unequal() if x.is_floating_point()]) > 1]
    refusing = {case.function for case in paired if case.refused}
    assert {case.function for case in paired} == refusing


@each
def test_float32_stays_float32(case):
    inputs = case.unequal()
    single_precision = tuple(x.float() if x.is_floating_point() else x for x in inputs)
    answer = run(case, single_precision)
    assert all(part.dtype == torch.float32 for part in answer)
    close(tuple(part.double() for part in answer), run(case, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("case", "which"),
    [(case, which) for case in CASES for which in case.at_zero],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.parametrize("options", ["row", "default"])
def test_gradients_are_finite_at_zero(case, which, dtype, options):
    inputs = with_gradient(case.at_zero[which](), dtype)
    given = case.options if options == "row" else {k: v for k, v in case.options.items() if k == "sigma"}
    parts = several(case.function(*inputs, **given))
    variables = [x for x in inputs if x.is_floating_point()]
    gradients = torch.autograd.grad(sum(part.sum() for part in parts), variables, create_graph=True)
    assert all(torch.isfinite(part).all() for part in parts)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    if all(torch.isfinite(x).all() for x in variables):
        total = sum((gradient * torch.randn_like(gradient)).sum() for gradient in gradients)
        second = torch.autograd.grad(total, variables, allow_unused=True)
        assert all(torch.isfinite(gradient).all() for gradient in second if gradient is not None)


def called_student_teacher(module) -> set:
    """The exported losses of a module that can be called as (student, teacher) and return one number per sample."""
    functions = set()
    for name in losses.__all__:
        function = getattr(losses, name)
        if not inspect.isfunction(function) or function.__module__ != module.__name__:
            continue
        signature = inspect.signature(function)
        first, *others = list(signature.parameters.values())
        if first.name != "student" or not others or others[0].name != "teacher":
            continue
        single = typing.get_origin(signature.return_annotation) is not tuple
        if single and all(parameter.default is not inspect.Parameter.empty for parameter in others[1:]):
            functions.add(function)
    return functions


def exported():
    """The functions among the exported names; the others are dictionaries and literal types."""
    return {getattr(losses, name) for name in losses.__all__ if inspect.isfunction(getattr(losses, name))}


def test_dictionaries_equal_what_is_exported():
    assert set(losses.JACOBIAN_LOSSES.values()) == called_student_teacher(jacobians) | {losses.squared_error}
    assert set(losses.OUTPUT_LOSSES.values()) == called_student_teacher(outputs) - {losses.agreement}
    functions = exported()
    assert set(losses.PENALTIES.values()) == {f for f in functions if f.__module__ == penalties.__name__}
    modules = {module.__name__ for module in (attention, jacobians, noise, outputs, penalties)}
    assert {function.__module__ for function in functions} == modules


def test_every_exported_function_has_a_row():
    functions = exported()
    assert functions == {case.function for case in CASES}
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: losses.hinton_kl(x, x, temperature=0.0), "`temperature` of `hinton_kl` must be above 0. Got 0.0"),
        (lambda x: losses.hinton_kl(x, x, temperature=float("nan")), "`temperature` of `hinton_kl` .* Got nan"),
        (lambda x: losses.relative_error(x, x, eps=0.0), "`eps` of `relative_error` must be above 0"),
        (lambda x: losses.bounded_error(x, x, eps=0.0), "`eps` of `bounded_error` must be above 0"),
        (lambda x: losses.normalized_error(x, x, eps=-1.0), "`eps` of `normalized_error` must be above 0"),
        (lambda x: losses.direction_and_magnitude(x, x, eps=0.0), "`eps` of `direction_and_magnitude` must be above"),
        (lambda x: losses.attention_transfer(x[None], x[None], eps=0.0), "`eps` of .* must be above 0"),
        (lambda x: losses.hoffman(x, outputs=0), "`outputs` of `hoffman` must be at least 1.* Got 0"),
        (lambda x: losses.paper_label_squared(x, sigma=-0.1), "`sigma` of `paper_label_squared` .* Got -0.1"),
        (
            lambda x: losses.piecewise_linear_cross_entropy(x, x, sigma=float("nan")),
            "`sigma` of `piecewise_linear_cross_entropy` must be at least 0",
        ),
        (
            lambda x: losses.paper_label_cross_entropy(x, x, x, sigma=-1.0),
            "`sigma` of `paper_label_cross_entropy` must be at least 0",
        ),
        (
            lambda x: losses.label_cross_entropy(x, x, x, x, sigma=-1.0),
            "`sigma` of `label_cross_entropy` must be at least 0",
        ),
        (lambda x: losses.attention_map(x[None, None], p=0.5), "`p` of `attention_map` must be at least 1. Got 0.5"),
    ],
)
def test_refuses_scalars_out_of_range(call, message):
    with pytest.raises(InputError, match=message):
        call(torch.ones(2, 3))


def test_labels_out_of_range_are_not_taken_for_another_class():
    # The range belongs to the data set; here it must only not pass in silence. −100 is an unlabelled sample.
    for label in (5, -1):
        with pytest.raises(InputError, match=r"must be classes from 0 to .* out of bounds"):
            losses.cross_entropy(torch.zeros(1, 5), torch.tensor([label]))


def test_an_unlabelled_sample_costs_nothing_and_has_no_gradient():
    logits = torch.randn(3, 5, requires_grad=True)
    costs = losses.cross_entropy(logits, torch.tensor([1, -100, 0]))
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([1, -100, 0]), reduction="none")
    torch.testing.assert_close(costs, expected)
    (gradient,) = torch.autograd.grad(costs.sum(), logits)
    assert gradient[1].abs().sum() == 0
    assert gradient[0].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_of_any_integer_dtype(dtype):
    logits = torch.randn(3, 5)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([1, 4, 0]), reduction="none")
    torch.testing.assert_close(losses.cross_entropy(logits, torch.tensor([1, 4, 0], dtype=dtype)), expected)
