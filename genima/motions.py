"""Motions to imitate: where the arm is, where it should be K steps later, and how it gets there.

A demonstration has one motion for each moment. A controller that is trained on those alone learns
that the current joints tell the future, and does not look at the spheres. So both ends of a motion
are shifted, and the actions lead from the one to the other:

    current + current_shift  -- actions + a mixture of both shifts -->  target + target_shift

The samples never repeat, the controller learns to correct errors, and the current joints do not
tell where the spheres are.
"""

from dataclasses import dataclass

import numpy as np

from genima.demonstrations import Demonstration

# One value of each is drawn per shift: standard deviations in rad, and the largest part of the way
# to another demonstration, or away from it: 50 demonstrations leave the workspace's edges empty.
CURRENT_NOISE = (0, 0.02, 0.05)
TARGET_NOISE = (0, 0.01, 0.02)
TOWARDS_ANOTHER = (0, 0.15, 0.4, -0.2)

# A camera is never quite where calibration says. At most so far along and about each axis:
CAMERA_SHIFT = 0.03  # metres
CAMERA_TURN = np.deg2rad(3)


@dataclass
class Motion:
    demonstration: Demonstration
    t: int
    current: np.ndarray  # (D+1,) joint positions (rad), gripper opening
    target: np.ndarray  # (D+1,) joint positions (rad), gripper command
    actions: np.ndarray  # (K, D+1) joint positions (rad), gripper commands
    action_is_pad: np.ndarray  # (K,) True after the episode's end


class Motions:
    """Random motions of some demonstrations."""

    def __init__(
        self,
        demonstrations: list[Demonstration],
        all_demonstrations: list[Demonstration],
        shifted: bool,
    ):
        """all_demonstrations: their joint positions are the range of the shifted ones."""
        self.shifted = shifted
        self.horizon = demonstrations[0].horizon
        self.frames = []
        for demonstration in demonstrations:
            for t in range(len(demonstration.qpos)):
                self.frames.append((demonstration, t))
        joints = np.concatenate([one.qpos[:, :-1] for one in all_demonstrations])
        self.lowest = joints.min(0) - 0.1  # (D,) rad
        self.highest = joints.max(0) + 0.1

    def draw(self, rng: np.random.Generator) -> Motion:
        """The motion of a random moment, shifted at both ends."""
        demonstration, t = self.random_frame(rng)
        current = demonstration.qpos[t].copy()
        target = demonstration.target[t].copy()
        k = np.arange(1, self.horizon + 1)  # steps ahead
        last = len(demonstration.action) - 1
        actions = demonstration.action[np.minimum(t + k - 1, last)].copy()  # (K, D+1)
        if self.shifted:
            other, s = self.random_frame(rng)
            current_shift = self.shift(rng, current, other.qpos[s], CURRENT_NOISE)  # (D,)
            other, s = self.random_frame(rng)
            target_shift = self.shift(rng, target, other.target[s], TARGET_NOISE)  # (D,)
            part = (k / self.horizon)[:, None]  # (K, 1) of the way
            actions[:, :-1] += current_shift * (1 - part) + target_shift * part
        return Motion(demonstration, t, current, target, actions, t + k - 1 > last)

    def random_frame(self, rng: np.random.Generator) -> tuple[Demonstration, int]:
        return self.frames[rng.integers(len(self.frames))]

    def shift(self, rng, qpos, other_qpos, noise) -> np.ndarray:
        """Shift the joints of qpos (D+1,) in place; returns by how much (D,).

        They go a part of the way to those of another demonstration, and a little at random. Noise
        alone would not do: four spheres tell the postures of the demonstrations from one another,
        but not all postures that the arm could have.
        """
        before = qpos[:-1].copy()
        part = rng.random() * rng.choice(TOWARDS_ANOTHER)
        random = rng.choice(noise) * rng.normal(size=len(before))
        after = before + part * (other_qpos[:-1] - before) + random
        qpos[:-1] = np.clip(after, self.lowest, self.highest)
        return qpos[:-1] - before

    def state_statistics(self, seed: int, samples: int = 2000) -> dict[str, list[float]]:
        """Mean and standard deviation (D+1,) of the current joints and gripper."""
        states = []
        for i in range(samples):
            states.append(self.draw(np.random.default_rng((seed, i))).current)
        states = np.stack(states)  # (samples, D+1)
        std = states.std(0) + 1e-3
        return {"state_mean": states.mean(0).tolist(), "state_std": std.tolist()}


def misplace_camera(rng: np.random.Generator, world_from_camera: np.ndarray) -> np.ndarray:
    """The camera's pose (4, 4), shifted and turned a little about its own axes."""
    shift = rng.uniform(-CAMERA_SHIFT, CAMERA_SHIFT, 3)
    x, y, z = rng.uniform(-CAMERA_TURN, CAMERA_TURN, 3)
    small_turn = np.array([[1, -z, y], [z, 1, -x], [-y, x, 1]])  # of small angles
    rotation, _ = np.linalg.qr(small_turn)
    rotation *= np.sign(np.diagonal(rotation))  # QR leaves the signs of the columns open
    moved = world_from_camera.copy()
    moved[:3, :3] = world_from_camera[:3, :3] @ rotation
    moved[:3, 3] += shift
    return moved
