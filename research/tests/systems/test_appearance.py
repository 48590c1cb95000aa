"""Faces, the model of their appearance, and fits: against slow definitions and against what is known."""

import numpy as np
import pytest
import torch
from scipy.spatial import Delaunay, procrustes

from jacmatch.errors import UnsupportedError
from jacmatch.jacobian import jvp
from jacmatch_research.systems.appearance import learning, model
from jacmatch_research.systems.appearance.faces import LANDMARKS, SIDE, Faces, faces
from jacmatch_research.systems.appearance.learning import AlongDirections, Glance, Lesson


@pytest.fixture(scope="module")
def train():
    return faces(40, seed=0)


@pytest.fixture(scope="module")
def built(train):
    return model.build(train)


def poses_of(built, shown):
    return model.pose_of(built, shown.landmarks)


def test_faces_depend_on_seed_and_number_only(train):
    assert train.images.shape == (40, SIDE, SIDE)
    assert train.landmarks.shape == (40, LANDMARKS, 2)
    again = faces(3, seed=0)
    assert np.array_equal(again.images, train.images[:3])
    assert not np.array_equal(faces(3, seed=1).landmarks, again.landmarks)
    assert train.landmarks.min() > 3
    assert train.landmarks.max() < SIDE - 1
    assert 8 < train.eye_distance.min() < train.eye_distance.max() < 22


def test_landmarks_are_where_things_are_drawn(train):
    """Pupils are darker than skin between the eyes; the jaw's points lie on an edge."""
    for image, points in zip(train.images, train.landmarks, strict=True):
        x, y = (points[15:19].mean(0) + points[19:23].mean(0)) / 2
        eye = points[15:19].mean(0)
        near = image[int(eye[1]) - 2 : int(eye[1]) + 4, int(eye[0]) - 3 : int(eye[0]) + 4]
        assert near.min() < image[int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2].mean() - 0.1


def test_bilinear_interpolation_by_its_definition():
    image = np.random.default_rng(0).random((1, 5, 6))
    points = np.array([[[2.25, 3.5], [0.0, 0.0], [-3.0, 1.0]]])
    expected = 0.5 * (0.75 * image[0, 3, 2] + 0.25 * image[0, 3, 3]) + 0.5 * (
        0.75 * image[0, 4, 2] + 0.25 * image[0, 4, 3]
    )
    assert model.bilinear(image, points)[0] == pytest.approx([expected, image[0, 0, 0], image[0, 1, 0]])


def test_shapes_are_aligned_as_by_scipy(train, built):
    shapes = model._aligned(train.landmarks)
    for shape in shapes[:5]:
        _, _, distance = procrustes(built.mean, shape)
        real = shape - shape.mean(0)
        mean = built.mean - built.mean.mean(0)
        best = (real * mean).sum() / np.square(real).sum()
        assert np.square(mean - best * real).sum() / np.square(mean).sum() == pytest.approx(distance, abs=2e-3)


def test_modes_hold_95_percent_of_the_variance_and_no_mode_too_many(train, built):
    shapes = model._aligned(train.landmarks).reshape(40, -1)
    values = np.linalg.eigvalsh(np.cov(shapes.T))[::-1]
    count = len(built.modes)
    assert values[: count - 1].sum() / values.sum() < 0.95 <= values[:count].sum() / values.sum()
    assert np.square(built.modes.reshape(count, -1)).sum(1) == pytest.approx(values[:count])
    assert built.textures @ built.textures.T == pytest.approx(np.eye(len(built.textures)), abs=1e-10)


def test_weights_are_barycentric(built):
    assert built.weights.sum(1) == pytest.approx(np.ones(len(built.weights)))
    assert built.weights.min() > -1e-9
    assert (np.count_nonzero(np.abs(built.weights) > 1e-12, axis=1) <= 3).all()
    assert (Delaunay(built.mean).find_simplex(0.999 * (built.weights @ built.mean)) >= 0).all()


def test_poses_compose_and_shape_numbers_invert_shapes(train, built):
    poses = poses_of(built, train)
    random = np.random.default_rng(0)
    p = random.normal(0, 1, (len(train), built.parameters))
    here = model.in_image(built.shape(p), poses)
    own = np.concatenate((0 * p[:, :4], p[:, 4:]), 1)
    again = model.in_image(built.shape(own), model.composed(p, poses))
    assert again == pytest.approx(here)
    numbers = model.shape_numbers(built, model.in_image(built.shape(own), poses), poses)
    assert numbers == pytest.approx(own, abs=1e-9)
    assert model.pose_of(built, model.in_image(built.mean[None], poses)) == pytest.approx(poses)


def test_the_cost_is_that_of_the_residual(train, built):
    shown = model.windows(train.images[:4], poses_of(built, train)[:4])
    p = np.random.default_rng(1).normal(0, 0.7, (4, built.parameters))
    residual = built.residual(shown, p)
    assert residual @ built.textures.T == pytest.approx(np.zeros((4, len(built.textures))), abs=1e-9)
    costs = built.cost(shown, p)
    assert costs == pytest.approx((residual**2).mean(1) + 0.02 * (p[:, 4:] ** 2).mean(1))
    assert [built.cost_of(window)(each) for window, each in zip(shown, p, strict=True)] == pytest.approx(costs)


def errors(built, shown, poses, p):
    apart = model.in_image(built.shape(p), poses) - shown.landmarks
    return np.linalg.norm(apart, axis=-1).mean(1) / shown.eye_distance


def test_the_fixed_jacobian_lowers_error_and_cost(train, built):
    shown = faces(12, seed=1)
    poses = learning.displaced(built, shown, np.array([[0.0, 0, 0.8, -0.6]] * 12))
    window = model.windows(shown.images, poses)
    fit = model.by_fixed_jacobian(built, model.fixed_jacobian(built, train), window)
    nothing = np.zeros_like(fit.p)
    assert (built.cost(window, fit.p) <= built.cost(window, nothing)).all()
    before, after = (np.median(errors(built, shown, poses, p)) for p in (nothing, fit.p))
    assert after < 0.7 * before
    assert (fit.evaluations >= 2).all()


def test_newuoa_finds_a_lower_cost_than_the_fixed_jacobian_and_repeats_itself(train, built):
    pytest.importorskip("nlopt")
    shown = faces(3, seed=1)
    poses = learning.displaced(built, shown, np.array([[0.0, 0, 0.4, -0.3]] * 3))
    window = model.windows(shown.images, poses)
    fixed = model.by_fixed_jacobian(built, model.fixed_jacobian(built, train), window)
    fit = model.by_newuoa(built, window)
    assert built.cost(window, fit.p).mean() < built.cost(window, fixed.p).mean()
    assert np.array_equal(model.by_newuoa(built, window[1:2]).p[0], fit.p[1])
    assert (fit.evaluations <= 1000).all()


def test_a_missing_package_is_named(built, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nlopt", None)
    with pytest.raises(UnsupportedError, match=r"the package nlopt is not installed\. Run: pip install 'jacmatch-res"):
        model.by_newuoa(built, np.zeros((1, model.WINDOW, model.WINDOW)))


def affine(built, x):
    """A fitter that is an affine map of its window."""
    matrix = np.random.default_rng(3).normal(0, 1e-2, (x.shape[1], built.parameters))
    return x.astype(float) @ matrix


def test_derivatives_of_a_lesson_are_the_fitters(train, built, monkeypatch):
    monkeypatch.setattr(learning, "fitter", lambda m, known=None: lambda x: affine(m, x))
    monkeypatch.setattr(learning, "_REFUSED", 1e9)
    examples = learning.lesson(built, Faces(train.images[:5], train.landmarks[:5]), directions=2, seed=0)
    assert examples.fits == 25
    expected = torch.from_numpy(np.stack([affine(built, u.numpy()) for u in examples.directions])).float()
    torch.testing.assert_close(examples.derivatives, expected, rtol=1e-3, atol=1e-5)
    assert learning.jumps(built, examples, 5) == 0


def test_the_fitter_is_not_called_twice_for_a_window(train, built, monkeypatch):
    fitted = []

    def newuoa(m, shown):
        fitted.append(len(shown))
        return model.Fit(affine(m, shown.reshape(len(shown), -1)), np.ones(len(shown), int))

    monkeypatch.setattr(learning, "by_newuoa", newuoa)
    few, known = Faces(train.images[:4], train.landmarks[:4]), {}
    one = learning.lesson(built, few, directions=0, seed=0, known=known)
    two = learning.lesson(built, Faces(train.images[:6], train.landmarks[:6]), directions=0, seed=0, known=known)
    assert sum(fitted) == 6
    assert (one.fits, two.fits) == (4, 6)
    assert {tuple(row) for row in one.y.tolist()} <= {tuple(row) for row in two.y.tolist()}


def test_failed_fits_are_left_out(train, built, monkeypatch):
    def fails_at_the_first(x):
        p = np.zeros((len(x), built.parameters))
        p[0, 4:] = 50.0
        return p

    monkeypatch.setattr(learning, "fitter", lambda m, known=None: fails_at_the_first)
    shown = Faces(train.images[:6], train.landmarks[:6])
    examples = learning.lesson(built, shown, directions=0, seed=0)
    assert len(examples.x) < 6
    assert examples.fits == 6
    assert float(examples.y.abs().max()) == 0


def test_a_student_samples_the_texture_that_the_model_does(train, built):
    shown = model.windows(train.images[:3], poses_of(built, train)[:3])
    p = np.random.default_rng(2).normal(0, 0.7, (3, built.parameters))
    x = torch.from_numpy(shown.reshape(3, -1)).float()
    got = Glance(built).sampled(x, torch.from_numpy(p).float())
    torch.testing.assert_close(got, torch.from_numpy(built.sampled(shown, p)).float(), rtol=1e-3, atol=2e-3)


def restless(built):
    """A student that has not the answer 0."""
    torch.manual_seed(0)
    student = Glance(built).eval()
    for each in student.maps:
        torch.nn.init.normal_(each.weight, std=0.02)
    return student


def test_each_look_is_where_the_one_before_says(train, built):
    shown = model.windows(train.images[:2], poses_of(built, train)[:2])
    student = restless(built)
    p = np.zeros((2, built.parameters))
    for each in student.maps:
        g = torch.from_numpy(built.sampled(shown, p) - built.texture).float()
        p = p + each(g).detach().double().numpy()
    got = student(torch.from_numpy(shown.reshape(2, -1)).float()).detach().numpy()
    assert np.abs(p).max() > 0.3
    assert got == pytest.approx(p, rel=1e-3, abs=2e-3)


def test_a_student_begins_with_the_steps_of_the_fixed_jacobian(train, built):
    shown = model.windows(train.images[:3], poses_of(built, train)[:3] * 1.02)
    update = model.fixed_jacobian(built, train)
    p = np.zeros((3, built.parameters))
    for _ in range(2):
        p = p - built.residual(shown, p) @ update.T
    got = Glance(built, looks=2, update=update)(torch.from_numpy(shown.reshape(3, -1)).float()).detach().numpy()
    assert np.abs(p).max() > 0.3
    assert got == pytest.approx(p, rel=1e-3, abs=5e-3)


def test_the_loss_along_directions_by_its_definition(built):
    generator = torch.Generator().manual_seed(0)
    x, u = (torch.rand(4, 1600, generator=generator) for _ in range(2))
    y, s = (torch.rand(4, built.parameters, generator=generator) for _ in range(2))
    student = restless(built)
    objective = AlongDirections(student, Lesson(x, y, u[None], s[None], 12), 0.3)
    ids = torch.tensor([2, 0])
    terms = objective.eval()(x[ids], y[ids], ids=ids)
    last = student.after_each(x[ids])[:, -built.parameters :]
    torch.testing.assert_close(student(x[ids]), last)
    answers, moved = student.after_each(x[ids]), jvp(student.after_each, x[ids], u[ids])[1]
    values = (answers - torch.cat([y[ids]] * 3, 1)).square().sum(1).mean()
    derivatives = (moved - torch.cat([s[ids]] * 3, 1)).square().sum(1).mean()
    torch.testing.assert_close(terms.unweighted["values"], values)
    torch.testing.assert_close(terms.unweighted["jacobians"], derivatives)
    terms["loss"].backward()
    assert student.maps[0].weight.grad.abs().sum() > 0


def test_derivatives_of_a_student_are_those_of_its_answers(built):
    student, generator = restless(built).double(), torch.Generator().manual_seed(1)
    x, u = (torch.rand(2, 1600, generator=generator, dtype=torch.float64) for _ in range(2))
    h = 1e-6
    difference = (student(x + h * u) - student(x - h * u)) / (2 * h)
    torch.testing.assert_close(jvp(student, x, u)[1], difference, rtol=1e-4, atol=1e-6)
