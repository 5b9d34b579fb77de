"""The scripted expert of the embedded simulator: from a task's waypoints to actions, and to a whole demonstration."""

import numpy as np

from genima.episodes import Episode
from genima.files import UserError
from sims import make_env
from sims.mujoco_panda import CONTROL_HZ, rotation_vector
from sims.mujoco_tasks import rotation_from

JOINT_SPEED = 1.2  # rad/s, about half of what the arm can do (Franka's data sheet: 2.2 to 2.6)


def expert_actions(env):
    """The scripted expert from the present state: yields one action (8,) per control step.

    Straight lines of the tool between the task's waypoints, at bounded tool and joint speed, through inverse kinematics.
    Raises UserError when a waypoint is out of reach.
    """
    target = env.tool()
    joints = env.data.qpos[:7].copy()
    for move in env.task.plan(env):
        start, rotation = target, target[:3, :3] if move.rotation is None else move.rotation
        distance = np.linalg.norm(move.position - start[:3, 3])
        turn = rotation_vector(rotation @ start[:3, :3].T)
        steps = int(np.ceil(max(distance / move.speed, np.linalg.norm(turn) / 1.5) * CONTROL_HZ))
        path = [joints]
        while steps:  # more steps until no joint is too fast (inverse kinematics may turn a short line into a long turn)
            path = [joints]
            for fraction in np.arange(1, steps + 1) / steps:
                pose = rotation_from(fraction * turn) @ start[:3, :3]
                path.append(
                    env.ik(start[:3, 3] + fraction * (move.position - start[:3, 3]), pose, path[-1])
                )
            fastest = np.abs(np.diff(path, axis=0)).max() * CONTROL_HZ
            if fastest <= JOINT_SPEED:
                break
            steps = max(steps + 1, int(np.ceil(steps * fastest / JOINT_SPEED)))
            if steps > 200:
                raise UserError(
                    f"No way to {np.round(move.position, 3)} below {JOINT_SPEED} rad/s."
                )
        joints = path[-1]
        target = np.block([[rotation, np.reshape(move.position, (3, 1))], [0, 0, 0, 1]])
        for position in path[1:] + [joints] * move.dwell:
            yield np.append(position, move.gripper)


def record_demonstration(env, task, seed, variation, start):
    """One attempt: the whole demonstration, whether or not it succeeds. Returns an Episode without a path."""
    observation, info = env.reset(seed=seed, options={"variation": variation, "start": start})
    frames = []
    for action in expert_actions(env):
        frames.append(
            (
                observation,
                action,
                env.joint_poses(),
                {camera: env.camera(camera)[1] for camera in env.cameras},
            )
        )
        observation, _, _, _, info = env.step(action)
    observations, actions, joint_poses, extrinsics = zip(*frames)
    return Episode(
        path=None, task=task, variation=variation, instruction=info["instruction"], instructions=info["instructions"],
        success=info["success"], fps=float(CONTROL_HZ), robot="fr3", sim=True, seed=seed,
        qpos=np.stack([seen["qpos"] for seen in observations]), qvel=np.stack([seen["qvel"] for seen in observations]),
        action=np.array(actions, np.float32), joint_poses=np.stack(joint_poses),
        images={camera: np.stack([seen["images"][camera] for seen in observations]) for camera in env.cameras},
        intrinsics={camera: env.camera(camera)[0] for camera in env.cameras},
        extrinsics={camera: np.stack([poses[camera] for poses in extrinsics]) for camera in env.cameras},
    )  # fmt: skip


def record_oracle(task, seed, variation):
    """The demonstration that an oracle follows: of the same scene, without pictures."""
    return record_demonstration(make_env(task, 0, ()), task, seed, variation, start="anywhere")
