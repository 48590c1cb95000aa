"""Cross-entropy under input noise: the paper's second order against the right one, by quadrature."""

import pytest
import torch

from jacmatch.losses import (
    cross_entropy,
    fisher,
    hinton_kl,
    label_cross_entropy,
    paper_cross_entropy,
    paper_label_cross_entropy,
    piecewise_linear_cross_entropy,
    squared_error,
)

from .smooth import SIGMAS, derivatives, log_softmax_of, mean_over_noise, network, orders, rows_at, softmax_of

SEEDS = (1, 2, 3)


@pytest.fixture(params=SEEDS)
def pair(request):
    """Student's logits, teacher's logits, and a point."""
    generator = torch.Generator().manual_seed(request.param)
    return network(request.param), network(request.param + 100), torch.randn(2, generator=generator).double()


def limit(errors):
    """The coefficient of σ²; what follows is σ⁴, so two sigmas give the limit."""
    coarse, fine = (r / sigma**2 for r, sigma in zip(errors[-2:], SIGMAS[-2:], strict=True))
    return (4 * fine - coarse) / 3


def under_noise(student, x, label):
    """E of the cross-entropy with one label, for each sigma."""
    return [mean_over_noise(lambda y: cross_entropy(student(y), label.expand(len(y))), x, sigma) for sigma in SIGMAS]


def fisher_at(student, teacher, x):
    rows = (rows_at(log_softmax_of(f), x[None]) for f in (student, teacher))
    return fisher(*rows, teacher(x).softmax(0)[None]).item()


def test_kl_has_half_the_fisher_distance(pair):
    student, teacher, x = pair
    p, q = derivatives(softmax_of(teacher), x), derivatives(softmax_of(student), x)
    ratio = p.value / q.value
    rest = (p.laplacian * ratio.log() - ratio * q.laplacian).sum().item()
    base = hinton_kl(student(x)[None], teacher(x)[None]).item()
    errors = [
        mean_over_noise(lambda y: hinton_kl(student(y), teacher(y)), x, sigma)
        - base
        - sigma**2 / 2 * (fisher_at(student, teacher, x) + rest)
        for sigma in SIGMAS
    ]
    assert orders(errors)[-1] == pytest.approx(4, abs=0.1)


def test_where_the_values_agree_the_fisher_distance_is_all(pair):
    _, teacher, x = pair
    other = network(7)

    def student(y):
        return teacher(y) + other(y) - other(x)

    term = fisher_at(student, teacher, x)
    assert term > 0.01
    errors = [
        mean_over_noise(lambda y: hinton_kl(student(y), teacher(y)), x, sigma) - sigma**2 / 2 * term for sigma in SIGMAS
    ]
    assert orders(errors)[-1] == pytest.approx(4, abs=0.1)


def test_equation_2_of_the_paper_has_an_error_of_second_order(pair):
    student, teacher, x = pair
    p, q = derivatives(softmax_of(teacher), x), derivatives(softmax_of(student), x)
    paper = paper_cross_entropy(q.rows[None], p.rows[None], q.value[None]).item()
    lost = 0.5 * (p.value * q.rows.square().sum(1) / q.value**2).sum()
    curvature = -0.5 * (p.laplacian * q.value.log() + p.value * q.laplacian / q.value).sum()

    def soft(y):
        return cross_entropy(student(y), teacher(y).softmax(-1))

    errors = [mean_over_noise(soft, x, sigma) - soft(x[None]).item() - sigma**2 * paper for sigma in SIGMAS]
    assert orders(errors)[-1] == pytest.approx(2, abs=0.1)
    assert limit(errors) == pytest.approx((lost + curvature).item(), rel=1e-2)


def test_the_papers_term_and_the_lost_one_are_half_the_fisher_distance(pair):
    student, teacher, x = pair
    points = x + torch.randn(5, 2, dtype=torch.float64)
    q_rows, p_rows = rows_at(softmax_of(student), points), rows_at(softmax_of(teacher), points)
    log_q, log_p = rows_at(log_softmax_of(student), points), rows_at(log_softmax_of(teacher), points)
    p, q = teacher(points).softmax(-1), student(points).softmax(-1)
    lost = 0.5 * (p * q_rows.square().sum(2) / q**2).sum(1)
    left = paper_cross_entropy(q_rows, p_rows, q) + lost
    right = 0.5 * fisher(log_q, log_p, p) - 0.5 * fisher(torch.zeros_like(log_p), log_p, p)
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


def test_equation_2_has_no_lower_bound_and_fisher_has(pair):
    student, teacher, x = pair
    p_rows, p = rows_at(softmax_of(teacher), x[None]), teacher(x).softmax(0)[None]
    q = student(x).softmax(0)[None]
    log_p_rows = rows_at(log_softmax_of(teacher), x[None])
    factors = (1.0, 10.0, 100.0, 1000.0)
    paper = [paper_cross_entropy(t * p_rows, p_rows, q).item() for t in factors]
    for t, value in zip(factors, paper, strict=True):
        assert value == pytest.approx(t * paper[0], rel=1e-9)
    assert paper[-1] < -100
    distances = [fisher(t * p_rows / q.unsqueeze(2), log_p_rows, p).item() for t in factors]
    assert min(distances) >= 0
    assert distances == sorted(distances)


def test_fisher_ignores_shifts_of_the_logits(pair):
    student, teacher, x = pair
    shift = network(55, outputs=1)
    points = x + torch.randn(4, 2, dtype=torch.float64)
    log_p, p = rows_at(log_softmax_of(teacher), points), teacher(points).softmax(-1)
    plain = fisher(rows_at(log_softmax_of(student), points), log_p, p)
    shifted = fisher(rows_at(log_softmax_of(lambda y: student(y) + shift(y)), points), log_p, p)
    torch.testing.assert_close(shifted, plain, rtol=1e-10, atol=1e-12)
    assert plain.min() > 1e-3
    # The teacher plus a function of the input, the same for all classes: value and parameter gradient are zero.
    weight = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    rows = rows_at(log_softmax_of(lambda y: teacher(y) + shift(y) + y @ weight.T), points)
    value = fisher(rows, log_p, p)
    assert value.abs().max() < 1e-20
    (gradient,) = torch.autograd.grad(value.sum(), weight)
    assert gradient.abs().max() < 1e-10
    # Logits as rows would not do: the same shift is then seen.
    assert squared_error(rows_at(shift, points).expand(-1, 3, -1), torch.zeros(4, 3, 2).double()).min() > 1e-3


def test_fisher_and_kl_at_high_temperature_are_squared_errors_of_centred_logits(pair):
    student, teacher, x = pair
    tau, k = 1e4, 3
    s_rows, t_rows = rows_at(student, x[None]), rows_at(teacher, x[None])
    hot = fisher_at(lambda y: student(y) / tau, lambda y: teacher(y) / tau, x)

    def centred(values):
        return values - values.mean(1, keepdim=True)

    assert k * tau**2 * hot == pytest.approx(squared_error(centred(s_rows), centred(t_rows)).item(), rel=1e-3)
    s, t = student(x)[None], teacher(x)[None]
    expected = squared_error(centred(s), centred(t)).item() / (2 * k)
    assert hinton_kl(s, t, temperature=tau).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("label", [0, 1, 2])
def test_label_cross_entropy_of_smooth_networks(pair, label):
    student, _, x = pair
    q, y = derivatives(softmax_of(student), x), torch.tensor([label])
    base = cross_entropy(student(x)[None], y).item()
    right, paper = [], []
    for sigma, mean in zip(SIGMAS, under_noise(student, x, y), strict=True):
        second = label_cross_entropy(q.rows[None], q.value[None], q.laplacian[None], y, sigma).item()
        right.append(mean - base - second)
        paper.append(mean - base - paper_label_cross_entropy(q.rows[None], q.value[None], y, sigma).item())
    assert orders(right)[-1] == pytest.approx(4, abs=0.1)
    expected = -0.5 * (q.rows[label].square().sum() / q.value[label] ** 2 + q.laplacian[label] / q.value[label])
    assert limit(paper) == pytest.approx(expected.item(), rel=1e-2)


@pytest.mark.parametrize("seed", SEEDS)
def test_locally_linear_logits_have_a_closed_form_without_the_label(seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(3, 2, generator=generator).double()
    c, x = torch.randn(3, generator=generator).double(), torch.randn(2, generator=generator).double()

    def student(y):
        return y @ a.T + c

    q = derivatives(softmax_of(student), x)
    papers = []
    for label in range(3):
        y = torch.tensor([label])
        base = cross_entropy(student(x)[None], y).item()
        means = under_noise(student, x, y)
        exact = [
            mean - base - piecewise_linear_cross_entropy(a[None], q.value[None], sigma).item()
            for mean, sigma in zip(means, SIGMAS, strict=True)
        ]
        assert orders(exact)[-1] == pytest.approx(4, abs=0.1)
        paper = [
            mean - base - paper_label_cross_entropy(q.rows[None], q.value[None], y, sigma).item()
            for mean, sigma in zip(means, SIGMAS, strict=True)
        ]
        # Eq. 3 of the paper: its error is of the order of the term itself, and it depends on the label.
        assert orders(paper)[-1] == pytest.approx(2, abs=0.1)
        papers.append(paper_label_cross_entropy(q.rows[None], q.value[None], y, 1.0).item())
        halved = label_cross_entropy(q.rows[None], q.value[None], 0 * q.laplacian[None], y, 1.0).item()
        assert halved == pytest.approx(papers[-1] / 2, rel=1e-12)
        # Neither does the factor ½ alone repair it: the Laplacian of a softmax is not zero for linear logits.
        closed = piecewise_linear_cross_entropy(a[None], q.value[None], 1.0).item()
        assert abs(halved - closed) > 1e-2 * closed
        full = label_cross_entropy(q.rows[None], q.value[None], q.laplacian[None], y, 1.0).item()
        assert full == pytest.approx(closed, rel=1e-9)
    assert max(papers) > 1.5 * min(papers)


def test_rows_of_log_probabilities_give_the_same_closed_form(pair):
    student, _, x = pair
    q = student(x).softmax(0)[None]
    from_logits = piecewise_linear_cross_entropy(rows_at(student, x[None]), q, 0.3)
    from_scores = piecewise_linear_cross_entropy(rows_at(log_softmax_of(student), x[None]), q, 0.3)
    torch.testing.assert_close(from_logits, from_scores, rtol=1e-10, atol=1e-12)
