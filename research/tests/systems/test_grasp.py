"""Hand and parallel manipulator against each other, differences and scipy's rotations; the pose by Newton."""

import pytest
import torch
from scipy.spatial.transform import Rotation

from jacmatch import jacobian
from jacmatch.errors import InputError
from jacmatch_research.systems.grasp.hand import Hand, ObjectPose, by_hand, torques_by_hand
from jacmatch_research.systems.grasp.manipulator import (
    Inverse,
    by_manipulator,
    constraints,
    coordinates,
    drawn,
    matrices,
    pose,
    pose_jacobian,
    regularity,
    rotation,
    toward_singular,
    twist_of,
)

HAND, STEP = Hand(), 1e-6
EXACT = {"atol": 1e-10, "rtol": 1e-10}


@pytest.fixture(scope="module")
def grasps():
    driven = drawn(HAND, 40, seed=0, reach=0.15, least=0.1)
    object_pose, closed = pose(HAND, driven)
    assert closed.all()
    return driven, object_pose, HAND.joints(object_pose)


def moved(object_pose, twist):
    return ObjectPose(object_pose.p + twist[:3], rotation(twist[3:].expand(len(object_pose.p), 3)) @ object_pose.r)


def test_tips_are_at_the_contacts_with_the_angles_of_the_closed_form(grasps):
    driven, object_pose, q = grasps
    torch.testing.assert_close(HAND.points(q).tip, HAND.contacts(object_pose), **EXACT)
    torch.testing.assert_close(q[..., :2].flatten(1), driven, atol=1e-9, rtol=0)
    at = HAND.points(q)
    torch.testing.assert_close((at.knee - at.base).norm(dim=-1), torch.full_like(q[..., 0], 0.070))
    torch.testing.assert_close((at.tip - at.knee).norm(dim=-1), torch.full_like(q[..., 0], 0.058))


def test_the_hand_jacobian_and_the_grasp_matrix_are_derivatives_of_tips_and_contacts(grasps):
    _, object_pose, q = grasps
    whole = HAND.hand_jacobian(q)
    for joint, step in enumerate(STEP * torch.eye(9, dtype=q.dtype)):
        step = step.view(3, 3)
        difference = (HAND.points(q + step).tip - HAND.points(q - step).tip).flatten(1) / (2 * STEP)
        torch.testing.assert_close(whole[..., joint], difference, atol=1e-9, rtol=0)
    velocities = HAND.grasp_matrix(object_pose).mT
    for axis, step in enumerate(STEP * torch.eye(6, dtype=q.dtype)):
        ends = [HAND.contacts(moved(object_pose, sign * step)).flatten(1) for sign in (1, -1)]
        torch.testing.assert_close(velocities[..., axis], (ends[0] - ends[1]) / (2 * STEP), atol=1e-9, rtol=0)


def test_a_and_b_are_derivatives_of_the_legs_equations(grasps):
    driven, object_pose, _ = grasps
    a, b = matrices(HAND, object_pose, driven)
    for k, step in enumerate(STEP * torch.eye(6, dtype=a.dtype)):
        by_pose = [constraints(HAND, moved(object_pose, sign * step), driven) for sign in (1, -1)]
        torch.testing.assert_close(a[..., k], (by_pose[0] - by_pose[1]) / (2 * STEP), atol=1e-9, rtol=0)
        by_joint = [constraints(HAND, object_pose, driven + sign * step) for sign in (1, -1)]
        torch.testing.assert_close(b[..., k], (by_joint[1] - by_joint[0]) / (2 * STEP), atol=1e-9, rtol=0)


def test_velocities_agree_in_both_formalisms(grasps):
    driven, object_pose, q = grasps
    torch.testing.assert_close(by_hand(HAND, object_pose, q), by_manipulator(HAND, object_pose, driven), **EXACT)


def test_torques_and_forces_agree_in_both_formalisms(grasps):
    driven, object_pose, q = grasps
    wrench = torch.randn(len(driven), 6, generator=torch.Generator().manual_seed(1), dtype=q.dtype)
    torques, forces = torques_by_hand(HAND, object_pose, q, wrench)
    by_duality = torch.einsum("gij,gi->gj", by_manipulator(HAND, object_pose, driven), wrench)
    torch.testing.assert_close(torques, by_duality, **EXACT)
    torch.testing.assert_close(torch.einsum("gif,gf->gi", HAND.grasp_matrix(object_pose), forces), wrench, **EXACT)
    # A free knee carries no torque: the force of each finger is in the span of what pushes along its distal phalanx.
    all_torques = torch.einsum("gfj,gf->gj", HAND.hand_jacobian(q), forces).unflatten(1, (3, 3))
    assert all_torques[..., 2].abs().max() < 1e-12


def test_the_pose_is_followed_back_from_its_joints():
    """Poses are chosen, their joints follow in closed form, and Newton finds the poses again."""
    generator = torch.Generator().manual_seed(2)
    noise = 2 * torch.rand(30, 6, generator=generator, dtype=torch.float64) - 1
    rest = HAND.rest()
    object_pose = ObjectPose(rest.p + 0.005 * noise[:, :3], rotation(0.08 * noise[:, 3:]))
    driven = HAND.joints(object_pose)[..., :2].flatten(1)
    solution, converged = pose(HAND, driven)
    assert converged.all()
    torch.testing.assert_close(solution.p, object_pose.p, **EXACT)
    torch.testing.assert_close(solution.r, object_pose.r, **EXACT)


def test_derivatives_of_the_implicit_pose_are_those_of_differences(grasps):
    driven, object_pose = grasps[0][:4], ObjectPose(grasps[1].p[:4], grasps[1].r[:4])
    steps = STEP * torch.cat((torch.eye(6), -torch.eye(6))).to(driven.dtype)
    ends = coordinates(HAND, pose(HAND, (driven[:, None] + steps).flatten(0, 1))[0]).view(4, 2, 6, 6)
    difference = (ends[:, 0] - ends[:, 1]).mT / (2 * STEP)
    torch.testing.assert_close(pose_jacobian(HAND, object_pose, driven), difference, atol=1e-6, rtol=1e-6)


def test_twists_of_rotation_vectors_are_scipys():
    generator = torch.Generator().manual_seed(4)
    y = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    y[0, 3:] = 0
    turning = twist_of(y)
    for axis, step in enumerate(1e-5 * torch.eye(3, dtype=y.dtype)):
        ends = [Rotation.from_rotvec((y[:, 3:] + sign * step).numpy()) for sign in (1, -1)]
        omega = torch.from_numpy((ends[0] * ends[1].inv()).as_rotvec()) / 2e-5
        torch.testing.assert_close(turning[:, 3:, 3 + axis], omega, atol=1e-8, rtol=0)
    assert (turning[:, :3, :3] == torch.eye(3)).all()
    assert (turning[:, :3, 3:] == 0).all()


def test_on_the_way_to_a_singular_grasp_derivatives_grow_as_regularity_falls_and_both_formalisms_agree():
    shares = (0.0, 0.99, 0.9999)
    object_pose, driven = toward_singular(HAND, 2, seed=0, shares=shares)
    assert constraints(HAND, object_pose, driven).abs().max() < 1e-14
    least = regularity(HAND, object_pose, driven).view(2, 3)
    whole = by_manipulator(HAND, object_pose, driven)
    size = torch.linalg.matrix_norm(whole, 2).view(2, 3)
    assert (least[:, 0] > 0.5).all()
    torch.testing.assert_close(least[:, 1] / least[:, 2], torch.full((2,), 100.0).double(), rtol=0.1, atol=0)
    torch.testing.assert_close(size[:, 2] / size[:, 1], torch.full((2,), 100.0).double(), rtol=0.1, atol=0)
    apart = (by_hand(HAND, object_pose, HAND.joints(object_pose)) - whole).norm(dim=(1, 2)) / whole.norm(dim=(1, 2))
    assert apart.max() < 1e-10
    with pytest.raises(InputError, match=r"`count` of `toward_singular` is more than the directions found\. Got 3\."):
        toward_singular(Hand(palm=0.2), 3, seed=0, shares=(0.5,))


def test_lengths_must_be_above_zero():
    with pytest.raises(InputError, match=r"Lengths of `Hand` must be above 0\."):
        Hand(grip=0.0)


@pytest.mark.ci
def test_the_inverse_of_a_network_has_the_inverse_jacobian():
    """f(y) = y + 0.1 sin y: its inverse and the Jacobian of that, against definitions."""

    class Wavy(torch.nn.Module):
        def forward(self, y):
            return y + 0.1 * torch.sin(3 * y)

    inverse = Inverse(Wavy(), torch.zeros(2))
    y = torch.tensor([[0.5, -1.0], [2.0, 0.1], [0.0, 0.0]], dtype=torch.float64)
    q = Wavy()(y)
    known = torch.diag_embed(1 / (1 + 0.3 * torch.cos(3 * y)))
    predicted, j = jacobian(inverse, q)
    torch.testing.assert_close(predicted, y, **EXACT)
    torch.testing.assert_close(j, known, **EXACT)
