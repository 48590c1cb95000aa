"""The arm against published numbers, autograd, differences and scipy's rotations; inverse kinematics and switches."""

import math

import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import nn

from jacmatch.errors import InputError
from jacmatch_research.systems.kinematics.chain import PUMA_560, Chain, rotation_vector
from jacmatch_research.systems.kinematics.inverse import (
    animate,
    damped_step,
    eased,
    errors,
    exact,
    exact_poses,
    folds,
    is_near,
    nearest_rotation,
    of_student,
    solve,
)

NOMINAL = torch.tensor([[0, math.pi / 4, math.pi, 0, math.pi / 4, 0]], dtype=torch.float64)


class Exact(nn.Module):
    """The arm's own outputs as a network, and nothing to train."""

    def forward(self, q):
        return PUMA_560.outputs(q)


def perturbed(count, seed, by=0.6, share=0.5):
    q = PUMA_560.drawn(count, seed, share)
    generator = torch.Generator().manual_seed(seed + 1)
    away = by * (2 * torch.rand(q.shape, generator=generator, dtype=q.dtype) - 1)
    return q, torch.clamp(q + away, *PUMA_560.limits(share))


def test_the_pose_and_jacobian_are_those_that_corke_prints():
    """Corke, Robotics, Vision and Control (2011), 7.1 and 8.1.1: `p560.fkine(qn)` and `p560.jacob0(qn)`."""
    position, rotation = PUMA_560.pose(NOMINAL)
    assert position[0].tolist() == pytest.approx([0.5963, -0.1501, -0.0144], abs=1e-4)
    torch.testing.assert_close(rotation[0].round(), torch.tensor([[0, 0, 1], [0, 1, 0], [-1, 0, 0]]).double())
    printed = [[0.1501, 0.0144, 0.3197, 0, 0, 0], [0.5963, 0, 0, 0, 0, 0], [0, 0.5963, 0.2910, 0, 0, 0]]
    printed += [[0, 0, 0, 0.7071, 0, 1], [0, -1, -1, 0, -1, 0], [1, 0, 0, -0.7071, 0, 0]]
    torch.testing.assert_close(PUMA_560.jacobian(NOMINAL)[0], torch.tensor(printed).double(), atol=1e-4, rtol=0)


def test_derivatives_are_those_of_autograd_and_of_differences():
    q, h = PUMA_560.drawn(4, seed=0), 1e-6
    output_jacobian = PUMA_560.output_jacobian(q)
    for row in range(4):
        by_autograd = torch.autograd.functional.jacobian(lambda one: PUMA_560.outputs(one[None])[0], q[row])
        torch.testing.assert_close(output_jacobian[row], by_autograd, atol=1e-12, rtol=0)
    for joint, step in enumerate(h * torch.eye(6, dtype=q.dtype)):
        difference = (PUMA_560.outputs(q + step) - PUMA_560.outputs(q - step)) / (2 * h)
        torch.testing.assert_close(output_jacobian[..., joint], difference, atol=1e-8, rtol=0)


def test_the_geometric_jacobian_is_what_the_frame_does():
    q, h = PUMA_560.drawn(5, seed=1), 1e-6
    whole = PUMA_560.jacobian(q)
    for joint, step in enumerate(h * torch.eye(6, dtype=q.dtype)):
        moved = errors(PUMA_560.pose(q - step), PUMA_560.pose(q + step)) / (2 * h)
        torch.testing.assert_close(whole[..., joint], moved, atol=1e-8, rtol=0)


def test_rotation_vectors_are_scipys():
    turned = Rotation.random(50, rng=3)
    near = Rotation.from_rotvec([[math.pi - 1e-9, 0, 0], [0, 0, 1e-9], [0, 0, 0], [0, 3.1, 0.2]])
    for rotations in (turned, near):
        matrices = torch.from_numpy(rotations.as_matrix())
        torch.testing.assert_close(
            rotation_vector(matrices), torch.from_numpy(rotations.as_rotvec()), atol=1e-8, rtol=0
        )


def test_the_nearest_rotation_is_the_polar_factor_and_never_a_reflection():
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(20, 3, 3, generator=generator, dtype=torch.float64)
    nearest = nearest_rotation(matrices)
    torch.testing.assert_close(torch.det(nearest), torch.ones(20, dtype=torch.float64))
    others = torch.from_numpy(Rotation.random(200, rng=0).as_matrix())
    for matrix, rotation in zip(matrices, nearest, strict=True):
        assert ((others - matrix).norm(dim=(1, 2)) >= (rotation - matrix).norm() - 1e-12).all()


def test_a_damped_step_is_that_of_least_squares_where_the_error_is_small():
    q = PUMA_560.drawn(3, seed=2, share=0.5)
    output_jacobian = PUMA_560.jacobian(q)
    missing = 1e-6 * torch.ones(3, 6, dtype=q.dtype)
    plain = torch.linalg.lstsq(output_jacobian, missing[..., None]).solution[..., 0]
    torch.testing.assert_close(damped_step(output_jacobian, missing), plain, rtol=0.05, atol=1e-9)
    assert damped_step(output_jacobian, 1e6 * missing).abs().amax(1).tolist() == pytest.approx([0.3] * 3)


def test_inverse_kinematics_reaches_poses_within_the_limits():
    q, start = perturbed(60, seed=4, by=0.3)
    target, limits = PUMA_560.pose(q), PUMA_560.limits(0.5)
    result = solve(exact(PUMA_560), target, start, limits)
    assert result.reached.double().mean() > 0.85
    assert is_near(errors(PUMA_560.pose(result.q), target))[result.reached].all()
    assert ((result.q >= limits[0]) & (result.q <= limits[1])).all()
    assert result.iterations[result.reached].double().mean() < 8
    assert result.iterations[~result.reached].tolist() == [60] * int((~result.reached).sum())
    there = solve(exact(PUMA_560), target, q, limits)
    assert torch.equal(there.q, q)
    assert there.iterations.sum() == 0


def test_a_perfect_student_drives_as_the_arm_does():
    q, start = perturbed(3, seed=6, by=0.2)
    position, rotation, output_jacobian = of_student(Exact())(start)
    single = {"atol": 1e-6, "rtol": 0}  # students are evaluated in float32
    torch.testing.assert_close(position, PUMA_560.pose(start)[0], **single)
    torch.testing.assert_close(rotation, PUMA_560.pose(start)[1], **single)
    torch.testing.assert_close(output_jacobian, PUMA_560.jacobian(start), **single)
    limits, target = PUMA_560.limits(0.5), PUMA_560.pose(q)
    one = solve(exact_poses(PUMA_560, of_student(Exact())), target, start, limits, iterations=6)
    other = solve(exact(PUMA_560), target, start, limits, iterations=6)
    assert torch.equal(one.iterations, other.iterations)
    torch.testing.assert_close(one.q[one.reached], other.q[other.reached], atol=1e-3, rtol=0)


def test_an_animation_goes_over_without_a_jump_where_frames_are_solved_from_each_other():
    keys = torch.stack([PUMA_560.drawn(3, seed, 0.3) for seed in range(4)])
    warm = animate(PUMA_560, exact(PUMA_560), keys, share=0.5, frames=8)
    assert (warm["into"] == 0).all()
    assert (warm["back"] <= warm["usual"]).all()
    cold = animate(PUMA_560, exact(PUMA_560), keys[:, :1], share=0.5, frames=4, cold=PUMA_560.drawn(1, 2, 1.0)[0])
    assert (cold["into"] > 0.3).any()
    keys[1, :, 4] = 1e-3  # the wrist is nearly straight where inverse kinematics takes over
    folded = animate(PUMA_560, exact(PUMA_560), keys, share=0.5, frames=3)
    assert (folded["fold"] < 1e-3).all()
    assert (folded["into"] == 0).all()
    end = eased(keys[0], keys[1], 8)
    assert end.shape == (8, 3, 6)
    torch.testing.assert_close(end[-1], keys[1])


def test_a_straight_wrist_is_a_fold():
    q = PUMA_560.drawn(2, seed=3, share=0.5)
    folded = q.clone()
    folded[:, 4] = 0
    assert (folds(PUMA_560, folded[None]) < 1e-12).all()
    assert (folds(PUMA_560, q[None]) > 1e-4).all()


def test_a_chain_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r"`Chain` must have as many numbers of each kind as it has joints\."):
        Chain((0.0,), (0.0,), (0.0, 0.0), (-1.0,), (1.0,))
    with pytest.raises(InputError, match=r"`lower` of `Chain` must be below `upper`\."):
        Chain((0.0,), (0.0,), (0.0,), (1.0,), (1.0,))
