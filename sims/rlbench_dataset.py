"""RLBench's datasets, read on a machine without RLBench and CoppeliaSim.

In:   <root>/<task>/variation<N>/variation_descriptions.pkl               a list of sentences
      <root>/<task>/variation<N>/episodes/episode<M>/low_dim_obs.pkl      all but the pictures
      <root>/<task>/variation<N>/episodes/episode<M>/<camera>_rgb/<t>.png
      and PerAct's, PerAct2's and The Colosseum's layouts (sims/rlbench_folders.py)
Out:  an Episode (genima/episodes.py) for each demonstration;
      python collect_demos.py --from-rlbench <root> --run runs/rlbench      writes them

What RLBench does its own way is turned into ours here:
  world    RLBench's is the room; ours is the robot's base (sims/rlbench_arm.py)
  joints   PyRep's pose of a joint is that of its axis before it turns; ours turns with it.
           The angles are RLBench's: its joint 4 has its zero 0.0698 rad from Franka's.
  cameras  PyRep's axes and negative focal lengths become OpenCV's (sims/rlbench_cameras.py)
  action   what was sent after frame t stands in frame t+1, as misc["joint_position_action"].
           Where it is missing (old datasets; also where a path ends), the joints of frame t+1
           and its gripper_open do. The last frame repeats the action before it.
  gripper  1 open, 0 closed, halved at 0.5 as RLBench's Discrete gripper mode does
  time     a frame is a step of RLBench's simulation, 50 ms
"""

import numpy as np

from genima.episodes import Episode
from genima.files import UserError
from genima.kinematics import spread
from sims.rlbench_arm import NEAR, find_arm, mean_pose, pose_matrices
from sims.rlbench_cameras import OTHER_NAMES, standard_camera, to_opencv
from sims.rlbench_folders import (
    find_demonstrations,
    identify,
    picture_folder,
    read_descriptions,
    read_pictures,
)
from sims.rlbench_pickle import load

__all__ = ["HZ", "convert", "find_demonstrations", "identify", "load", "read_demonstration"]

HZ = 20  # RLBench steps its simulation by 50 ms, and a demonstration has a frame per step
# rad/s, Franka's data sheet; CoppeliaSim's motors overshoot a little, keyframes are far beyond.
JOINT_SPEEDS = np.array([2.175, 2.175, 2.175, 2.175, 2.61, 2.61, 2.61])
OVERSHOOT = 1.25


# ------------------------------------------------------------------------------------- numbers
def field(observation, name):
    """What an observation holds under this name, itself or in its misc; None if nothing."""
    attributes = vars(observation)
    if name in attributes:
        return attributes[name]
    misc = attributes.get("misc")
    return misc.get(name) if isinstance(misc, dict) else None


def numbers(value, shape):
    """The value as float64 (*shape); None if it is not finite numbers of that shape."""
    if isinstance(value, (list, tuple)):
        if not shape or len(value) != shape[0]:
            return None
        parts = [numbers(part, shape[1:]) for part in value]
        return None if any(part is None for part in parts) else np.array(parts)
    if not isinstance(value, (bool, int, float, np.ndarray, np.generic)):
        return None
    try:
        array = np.asarray(value, np.float64)
    except (ValueError, OverflowError):
        return None
    return array if array.shape == shape and np.isfinite(array).all() else None


def column(observations, name, shape, where):
    """A field of all frames (T, *shape) float64. Raises UserError if a frame lacks it."""
    values = []
    for t, observation in enumerate(observations):
        value = field(observation, name)
        array = numbers(value, shape)
        if array is None:
            found = "missing" if value is None else "something else"
            if isinstance(value, np.ndarray):
                found = f"of shape {value.shape}"
            raise UserError(
                f"{where}: {name} of frame {t} is {found}, where finite numbers of shape {shape} "
                "are needed: record it again, with RLBench's default robot, a Panda."
            )
        values.append(array)
    return np.array(values)


def has_numbers(observations, name, shape):
    """Do all frames hold numbers of this shape under this name?"""
    return all(numbers(field(one, name), shape) is not None for one in observations)


def read_tool(observations, where):
    """Poses (T, 4, 4) of the gripper in the room."""
    if has_numbers(observations, "gripper_matrix", (4, 4)):
        tool = column(observations, "gripper_matrix", (4, 4), where)
        product = tool[:, :3, :3] @ np.swapaxes(tool[:, :3, :3], 1, 2)
        if np.abs(product - np.eye(3)).max() < 1e-3:
            return tool
    poses = column(observations, "gripper_pose", (7,), where)
    if np.abs(np.linalg.norm(poses[:, 3:], axis=1) - 1).max() > 1e-3:
        raise UserError(f"{where}: gripper_pose holds no rotations: record it again.")
    return pose_matrices(poses)


def arm(joints, observations, where):
    """The chain of the recorded arm and base_from_world (4, 4); joints: (T, 7) rad."""
    joint_poses = None
    if field(observations[0], "joint_poses") is not None:
        joint_poses = pose_matrices(column(observations, "joint_poses", (7, 7), where))
    return find_arm(joints, joint_poses, read_tool(observations, where), where)


def camera_matrices(observations, camera, where):
    """OpenCV intrinsics (3, 3) and camera poses (T, 4, 4) in RLBench's world."""
    name = camera
    other = OTHER_NAMES.get(camera)
    if other and field(observations[0], f"{other}_camera_intrinsics") is not None:
        name = other
    intrinsics = column(observations, f"{name}_camera_intrinsics", (3, 3), where)[0]
    poses = column(observations, f"{name}_camera_extrinsics", (4, 4), where)
    return to_opencv(intrinsics, poses, f"{where}: {name}_camera_intrinsics")


def lacks_cameras(observations):
    """Is this a recording of the time before RLBench wrote its cameras down?"""
    misc = field(observations[0], "misc")
    return not isinstance(misc, dict) or not any("_camera_" in str(name) for name in misc)


def check_speed(joints, where):
    """Raise UserError if the arm is faster than a Panda: then the frames are not 50 ms apart."""
    speeds = np.abs(np.diff(joints, axis=0)) * HZ  # (T-1, 7)
    t, joint = np.unravel_index(np.argmax(speeds / JOINT_SPEEDS), speeds.shape)
    fastest = speeds[t, joint]
    if fastest > OVERSHOOT * JOINT_SPEEDS[joint]:
        raise UserError(
            f"{where}: joint {joint + 1} turns at {fastest:.1f} rad/s between frames {t} and "
            f"{t + 1}, where a Panda's limit is {JOINT_SPEEDS[joint]}: these are keyframes, not "
            "all frames of RLBench's simulation (20 a second); use the whole recording."
        )


# ------------------------------------------------------------------------------------ episodes
def sent_actions(observations, qpos):
    """The actions (T, 8) that were sent after each frame; qpos: (T, 8)."""
    action = np.append(qpos[1:], qpos[-1:], axis=0)
    for t, observation in enumerate(observations[1:]):
        sent = field(observation, "joint_position_action")
        for length in (7, 8):  # the last step of a path has [None, gripper]
            values = numbers(sent, (length,))
            if values is not None:
                action[t, :length] = values
    action[-1] = action[-2]
    action[:, -1] = action[:, -1] > 0.5
    return action


def follow_arm(poses, last_joint):
    """A camera's poses (T, 4, 4), exactly on the arm if it moves with it.

    CoppeliaSim's arm, held together by forces, gives by fractions of a millimetre.
    """
    mounts = np.linalg.inv(last_joint) @ poses
    if spread(poses) > 1e-6 and spread(mounts) < NEAR:
        return last_joint @ mean_pose(mounts)
    return poses


def convert(observations, images, descriptions, task, variation, number, where, cameras=None):
    """RLBench's observations with their images {camera: (T, H, W, 3)} -> an Episode.

    cameras: {camera: (intrinsics, poses)} as camera_matrices() gives them, if not in the
    observations. where: what a message names.
    """
    joints = column(observations, "joint_positions", (7,), where)
    gripper = column(observations, "gripper_open", (), where)[:, None]
    check_speed(joints, where)
    if has_numbers(observations, "joint_velocities", (7,)):
        velocities = column(observations, "joint_velocities", (7,), where)
    else:
        velocities = np.gradient(joints, 1 / HZ, axis=0)
    chain, base_from_world = arm(joints, observations, where)
    joint_poses = chain.forward_kinematics(joints)  # (T, 8, 4, 4)
    intrinsics = {}
    extrinsics = {}
    for camera in images:
        if cameras is None:
            intrinsics[camera], poses = camera_matrices(observations, camera, where)
        else:
            intrinsics[camera], poses = cameras[camera]
        extrinsics[camera] = follow_arm(base_from_world @ poses, joint_poses[:, -2])
    qpos = np.hstack([joints, gripper])  # (T, 8)
    qvel = np.hstack([velocities, np.gradient(gripper, 1 / HZ, axis=0)])  # (T, 8)
    return Episode(
        path=None,
        task=task,
        variation=variation,
        instruction=descriptions[number % len(descriptions)],
        instructions=descriptions,
        success=True,  # RLBench keeps nothing but successes
        fps=float(HZ),
        robot="panda",
        sim=True,
        seed=number,
        qpos=qpos.astype(np.float32),
        qvel=qvel.astype(np.float32),
        action=sent_actions(observations, qpos).astype(np.float32),
        joint_poses=joint_poses.astype(np.float32),
        images=images,
        intrinsics=intrinsics,
        extrinsics=extrinsics,
    )


# --------------------------------------------------------------------------------------- files
def read_observations(path):
    """The observations of a low_dim_obs.pkl."""
    content = load(path)
    observations = getattr(content, "_observations", content)
    if isinstance(observations, list) and observations and hasattr(observations[0], "left"):
        raise UserError(
            f"{path} holds a demonstration of two arms (PerAct2's BimanualObservation): only "
            "those of one arm can be imported."
        )
    enough = isinstance(observations, list) and len(observations) > 1
    if not enough or not all(hasattr(one, "joint_positions") for one in observations):
        raise UserError(
            f"{path} does not hold a demonstration of two frames or more: record it again."
        )
    return observations


def read_demonstration(folder, cameras, size=None):
    """One folder episode<M> of a dataset -> an Episode.

    size: (height, width) of its pictures, as recorded if None. Raises UserError for one that is
    broken, or of another robot.
    """
    where = folder / "low_dim_obs.pkl"
    task, variation, number = identify(folder)
    descriptions = read_descriptions(folder)[0]
    observations = read_observations(where)
    images = {}
    sizes = {}
    for camera in cameras:
        pictures = picture_folder(folder, camera)
        images[camera], sizes[camera] = read_pictures(pictures, len(observations), size)
    standard = None
    if lacks_cameras(observations):
        tool = read_tool(observations, where)
        has_overhead = (folder / "overhead_rgb").is_dir()
        standard = {}
        for camera in cameras:
            standard[camera] = standard_camera(camera, tool, sizes[camera], has_overhead, where)
    episode = convert(observations, images, descriptions, task, variation, number, where, standard)
    for camera in cameras:
        width, height = sizes[camera]
        scale = np.diag([images[camera].shape[2] / width, images[camera].shape[1] / height, 1])
        episode.intrinsics[camera] = scale @ episode.intrinsics[camera]
    return episode


def read_notes(folders):
    """What these recordings lack and what is taken instead: sentences, of one episode a variation.

    Faults are left to read_demonstration().
    """
    notes = []
    checked = set()
    for folder in folders:
        if folder.parent in checked:
            continue
        checked.add(folder.parent)
        try:
            task = identify(folder)[0]
            only_name = read_descriptions(folder)[1]
            observations = read_observations(folder / "low_dim_obs.pkl")
        except UserError:
            continue
        if only_name:
            notes.append(
                f"{task}: an observation lies in place of the sentences (RLBench before June "
                f"2023), so the instruction is the task's name, '{task.replace('_', ' ')}'."
            )
        if lacks_cameras(observations):
            notes.append(
                f"{task}: recorded without its cameras (RLBench before April 2021), so they are "
                "taken to be those of RLBench's scene: look at render_spheres.py --preview."
            )
    return list(dict.fromkeys(notes))
