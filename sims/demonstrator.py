"""The scripted expert of the embedded simulator: from waypoints to actions and demonstrations.

for action in expert_actions(env):               from wherever the arm is
    env.step(action)
episode = record_demonstration(env, task, seed, variation, start="near")
"""

from collections.abc import Callable, Iterator

import numpy as np

from genima.episodes import Episode
from genima.files import UserError
from sims import make_env
from sims.mujoco_panda import CONTROL_HZ, make_pose, rotation_vector
from sims.mujoco_tasks import rotation_from

JOINT_SPEED = 1.2  # rad/s, about half of what an arm can do (Franka's 2.2 to 2.6, a UR5e 3.1)
TURN_SPEED = 1.5  # rad/s, of the tool
MAX_STEPS = 200  # between two waypoints


def expert_actions(env) -> Iterator[np.ndarray]:
    """The scripted expert from the present state: yields one action (D+1,) per control step.

    Straight lines of the tool between the task's waypoints, at bounded tool and joint speed,
    through inverse kinematics. Raises UserError when a waypoint is out of reach.
    """
    tool = env.tool_pose()
    joints = env.data.qpos[: env.joints].copy()
    for move in env.task.plan(env):
        rotation = tool[:3, :3]
        if move.rotation is not None:
            rotation = move.rotation
        path = joint_path(env, tool, joints, move.position, rotation, move.speed)
        tool = make_pose(rotation, move.position)
        if path:
            joints = path[-1]
        for position in path + [joints] * move.dwell:
            yield np.append(position, move.gripper)


def joint_path(env, tool, joints, position, rotation, speed) -> list[np.ndarray]:
    """Joint positions (D,) for each control step on the straight line of the tool to a pose.

    tool (4, 4) and joints (D,): where the line begins. Empty where the tool is there already.
    Raises UserError where the line is out of reach, or too fast for the joints however slow.
    """
    offset = position - tool[:3, 3]
    turn = rotation_vector(rotation @ tool[:3, :3].T)
    seconds = max(np.linalg.norm(offset) / speed, np.linalg.norm(turn) / TURN_SPEED)
    steps = int(np.ceil(seconds * CONTROL_HZ))
    while steps:
        path = [joints]
        for fraction in np.arange(1, steps + 1) / steps:
            pose = rotation_from(fraction * turn) @ tool[:3, :3]
            path.append(env.ik(tool[:3, 3] + fraction * offset, pose, path[-1]))
        fastest = np.abs(np.diff(path, axis=0)).max() * CONTROL_HZ
        if fastest <= JOINT_SPEED:
            return path[1:]
        # Inverse kinematics may turn a short line into a large turn of a joint: more steps.
        steps = max(steps + 1, int(np.ceil(steps * fastest / JOINT_SPEED)))
        if steps > MAX_STEPS:
            raise UserError(f"No way to {np.round(position, 3)} below {JOINT_SPEED} rad/s.")
    return []


def record_demonstration(
    env, task: str, seed: int, variation: int, start: str, watch: Callable | None = None
) -> Episode:
    """One attempt: the whole demonstration, whether or not it succeeds, without a path.

    start: "anywhere" over the table, or "near" the object. watch: called as watch(env, images,
    instruction) at the beginning and after each step, in an environment with images. Raises
    UserError when a waypoint is out of reach.
    """
    observation, info = env.reset(seed=seed, options={"variation": variation, "start": start})
    observations = []
    actions = []
    joint_poses = []
    extrinsics = {camera: [] for camera in env.cameras}
    if watch is not None:
        watch(env, observation["images"], info["instruction"])
    for action in expert_actions(env):
        observations.append(observation)
        actions.append(action)
        joint_poses.append(env.joint_poses())
        for camera in env.cameras:
            extrinsics[camera].append(env.camera_parameters(camera)[1])
        observation, _, _, _, info = env.step(action)
        if watch is not None:
            watch(env, observation["images"], info["instruction"])

    images = {}
    intrinsics = {}
    for camera in env.cameras:
        images[camera] = np.stack([seen["images"][camera] for seen in observations])
        intrinsics[camera] = env.camera_parameters(camera)[0]
    return Episode(
        path=None,
        task=task,
        variation=variation,
        instruction=info["instruction"],
        instructions=info["instructions"],
        success=info["success"],
        fps=float(CONTROL_HZ),
        robot=env.robot,
        sim=True,
        seed=seed,
        qpos=np.stack([seen["qpos"] for seen in observations]),
        qvel=np.stack([seen["qvel"] for seen in observations]),
        action=np.array(actions, np.float32),
        joint_poses=np.stack(joint_poses),
        images=images,
        intrinsics=intrinsics,
        extrinsics={camera: np.stack(poses) for camera, poses in extrinsics.items()},
    )


def record_oracle(task: str, seed: int, variation: int, env=None) -> Episode:
    """The demonstration that an oracle follows: of the same scene, without images.

    env: a PandaEnv of the task without cameras to record it in; None: a new one.
    """
    if env is None:
        env = make_env(task, 0, ())
    return record_demonstration(env, task, seed, variation, start="anywhere")
