"""RLBench's datasets, read on a machine without RLBench and CoppeliaSim.

In:   <root>/<task>/variation<N>/variation_descriptions.pkl                     a list of sentences
      <root>/<task>/variation<N>/episodes/episode<M>/low_dim_obs.pkl            a Demo of Observations without pictures
      <root>/<task>/variation<N>/episodes/episode<M>/<camera>_rgb/<t>.png
Out:  an Episode (episodes.py) for each; `python collect_demos.py --from-rlbench <root>` writes them.

What RLBench does its own way is turned into ours here, and nowhere else (names of functions are those of RLBench 1.2 and PyRep):
  cameras   PyRep's VisionSensor looks along +z with x to the left and y up, and says so with negative focal lengths. OpenCV's
            camera is that one turned half round its z axis, with positive ones: the same pixels, to the bit.
  world     RLBench's is the room's; ours is the robot's base, which is found from the poses that were recorded.
  joints    PyRep's pose of a joint is that of its axis before it turns; ours turns with it. Their origins are kept.
  action    what was sent after frame t stands in frame t+1, as misc["joint_position_action"]. Where it is missing (old datasets;
            also where a path ends), the joints of frame t+1 and its gripper_open do. The last frame repeats the action before it.
  gripper   1 open, 0 closed, halved at 0.5 as RLBench's Discrete gripper mode does.
  time      a frame is a step of RLBench's simulation, 50 ms.

A pickle is a program. These are read by an unpickler that knows two empty classes and NumPy's arrays, and nothing else.
"""

import io
import pickle
import re
from _compat_pickle import IMPORT_MAPPING
from types import SimpleNamespace

import numpy as np
from PIL import Image

from genima.episodes import Episode
from genima.files import UserError
from genima.kinematics import Chain, franka_chain, rotate_z, spread

HZ = 20  # RLBench steps its simulation by 50 ms, and a demonstration has a frame per step
OPENCV = np.diag(
    [-1.0, -1, 1, 1]
)  # PyRep's camera from OpenCV's: x left and y up against x right and y down
NEAR = 0.02  # metres, and parts of a rotation matrix: how well a Panda must fit. Other arms are off by ten times as much.


# ------------------------------------------------------------------------------------------------------------ pickles
def empty_array(kind, shape, dtype):
    """To be filled by the pickle's next instruction: NumPy's _reconstruct makes no other."""
    if kind is not np.ndarray or tuple(shape) != (0,):
        raise pickle.UnpicklingError("an array that NumPy did not write")
    return np.ndarray((0,), "b")


class Unpickler(pickle.Unpickler):
    """Knows what NumPy's arrays of numbers are pickled with, our own functions in place of NumPy's, and two containers of attributes:
    Observation, and Demo, which holds _observations and random_seed, NumPy's random state before the scene was laid out."""

    def __init__(self, path):
        super().__init__(io.BytesIO(path.read_bytes()))
        self.path, self.allowed = path, {
            "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # protocol 2 writes bytes as text
            "numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype,
            "numpy.core.multiarray._reconstruct": empty_array,
            "numpy.core.multiarray.scalar": lambda dtype, data: np.frombuffer(data, dtype)[0],
            "numpy.core.numeric._frombuffer": lambda data, dtype, shape, order: np.frombuffer(data, dtype).reshape(shape, order=order),
            # A class that no file can change: the next one meets it as it was.
            "rlbench.demo.Demo": SimpleNamespace, "rlbench.backend.observation.Observation": SimpleNamespace,
        }  # fmt: skip

    def find_class(self, module, name):
        name = f"{IMPORT_MAPPING.get(module, module)}.{name}"  # protocol 2 has Python 2's names
        known = name.replace("numpy._core.", "numpy.core.")  # NumPy 2 and 1
        if known not in self.allowed:
            raise UserError(
                f"{self.path} names {name}, which no recorded demonstration needs and which could run code: "
                "nothing of it was run; get this file from somewhere else."
            )
        return self.allowed[known]


def load(path):
    """The content of one of RLBench's pickles. Nothing in it can run."""
    try:
        return Unpickler(path).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its next instruction meets
        raise UserError(
            f"{path} cannot be read ({' '.join(str(error).split()) or type(error).__name__}): get it again."
        ) from error


def field(observation, name):
    """What an observation holds under this name, itself or in its misc; None where there is no such thing."""
    return (vars(observation) | vars(observation).get("misc", {})).get(name)


def column(observations, name, shape, where):
    """A field of all frames (T, *shape) float64."""
    values = [field(observation, name) for observation in observations]
    for t, value in enumerate(values):
        if np.shape(value) != shape or not np.isfinite(np.array(value, np.float64)).all():
            found = "missing" if value is None else f"of shape {np.shape(value)}"
            raise UserError(
                f"{where}: {name} of frame {t} is {found}, where finite numbers of shape {shape} are needed: "
                "record it again, with RLBench's default robot, a Panda."
            )
    return np.array(values, np.float64)


# ------------------------------------------------------------------------------------------------------------- the arm
def panda(tool=np.eye(4), offsets=np.zeros(7)):
    """The Panda's kinematics, each joint's frame moved along its axis by offsets (7,) metres; tool (4, 4) in the last of them."""
    along = np.tile(np.eye(4), (8, 1, 1))
    along[1:, 2, 3] = offsets
    return Chain(np.linalg.inv(along[:-1]) @ franka_chain().links @ along[1:], tool, {}, {})


def nearest_rotation(matrices):
    """The rotation (3, 3) nearest to the mean of matrices (..., 3, 3)."""
    u, _, v = np.linalg.svd(matrices.reshape(-1, 3, 3).mean(axis=0))
    return u @ np.diag([1, 1, np.linalg.det(u @ v)]) @ v


def pose_of(rotation, position):
    return np.vstack([np.column_stack([rotation, position]), [0, 0, 0, 1]])


def mean_pose(poses):
    """The pose (4, 4) in the middle of poses (T, 4, 4) that hardly differ."""
    return pose_of(nearest_rotation(poses[:, :3, :3]), poses[:, :3, 3].mean(axis=0))


def fit_base(q, joint_poses):
    """Where does a Panda with joints q (T, 7) stand, whose joints' axes are the z axes of joint_poses (T, 7, 4, 4)?

    -> world_from_base (4, 4), offsets (7,) of the joints' origins along their axes, the largest error in metres.
    """
    ours = panda().forward_kinematics(q)[:, :7]
    rotation = nearest_rotation(joint_poses[..., :3, 2:3] @ ours[..., None, :3, 2])
    axes, origins = ours[..., :3, 2] @ rotation.T, ours[..., :3, 3] @ rotation.T  # (T, 7, 3)
    # joint_poses' origins = base + origins + axes * offsets: linear in base and offsets
    system = np.concatenate(
        [np.broadcast_to(np.eye(3), (*axes.shape, 3)), axes[..., None] * np.eye(7)[:, None]],
        axis=-1,
    )  # (T, 7, 3, 10)
    wanted = joint_poses[..., :3, 3] - origins
    solution = np.linalg.lstsq(system.reshape(-1, 10), wanted.ravel(), rcond=None)[0]
    error = max(
        np.abs(system @ solution - wanted).max(), np.abs(axes - joint_poses[..., :3, 2]).max()
    )
    return pose_of(rotation, solution[:3]), solution[3:], error


def fit_base_to_tool(q, tool):
    """The same from poses tool (T, 4, 4) of the hand alone, for datasets without joint_poses -> world_from_base, zeros (7,), error."""
    last, fits = panda().forward_kinematics(q)[:, 6], []
    for turn in range(
        8
    ):  # in eighths: the hand sits on the last joint turned by -45 degrees, and PyRep's tip somehow on the hand
        hand = last @ franka_chain().tool @ rotate_z(np.array(turn * np.pi / 4))  # (T, 4, 4)
        rotations = tool[:, :3, :3] @ np.swapaxes(hand[:, :3, :3], 1, 2)
        rotation = nearest_rotation(rotations)
        positions = tool[:, :3, 3] - hand[:, :3, 3] @ rotation.T
        error = max(np.abs(rotations - rotation).max(), np.ptp(positions, axis=0).max())
        fits.append((round(error, 3), -rotation[0, 0], pose_of(rotation, positions.mean(axis=0))))
    error, _, base = min(
        fits, key=lambda fit: fit[:2]
    )  # where several fit (a hand that always points down): the base looks along x
    return base, np.zeros(7), error


def matrices(poses):
    """Poses (..., 7): x y z and a quaternion with w last -> (..., 4, 4)."""
    x, y, z, w = np.moveaxis(
        poses[..., 3:] / np.linalg.norm(poses[..., 3:], axis=-1, keepdims=True), -1, 0
    )
    zero = np.zeros_like(x)
    return np.moveaxis(np.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w), poses[..., 0]],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w), poses[..., 1]],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y), poses[..., 2]],
        [zero, zero, zero, zero + 1]]), (0, 1), (-2, -1))  # fmt: skip


def arm(q, observations, where):
    """The chain of the recorded arm and base_from_world (4, 4). Raises UserError for another robot."""
    tool = matrices(column(observations, "gripper_pose", (7,), where))
    if field(observations[0], "joint_poses") is None:
        base, offsets, error = fit_base_to_tool(q, tool)
    else:
        base, offsets, error = fit_base(
            q, matrices(column(observations, "joint_poses", (7, 7), where))
        )
    tips = np.linalg.inv(base @ panda(offsets=offsets).forward_kinematics(q)[:, 6]) @ tool
    if error > NEAR or spread(tips) > 2 * NEAR:
        raise UserError(
            f"{where}: this is not a Panda, for its joints and its gripper do not move as a Panda's do (by {error:.2f}): "
            "only RLBench's default robot can be imported."
        )
    return panda(mean_pose(tips), offsets), np.linalg.inv(base)


# ------------------------------------------------------------------------------------------------------------ episodes
def camera_matrices(observations, camera, where):
    """OpenCV intrinsics (3, 3) and camera poses (T, 4, 4) in RLBench's world."""
    intrinsics = column(observations, f"{camera}_camera_intrinsics", (3, 3), where)[0]
    return intrinsics @ OPENCV[:3, :3], column(
        observations, f"{camera}_camera_extrinsics", (4, 4), where
    ) @ OPENCV


def convert(observations, images, descriptions, task, variation, number, where):
    """RLBench's observations with their images {camera: (T, H, W, 3)} -> an Episode."""
    joints = column(observations, "joint_positions", (7,), where)
    gripper = column(observations, "gripper_open", (), where)[:, None]
    speeds = column(observations, "joint_velocities", (7,), where)
    chain, base_from_world = arm(joints, observations, where)
    joint_poses = chain.forward_kinematics(joints)  # (T, 8, 4, 4)
    intrinsics, extrinsics = {}, {}
    for camera in images:
        intrinsics[camera], poses = camera_matrices(observations, camera, where)
        poses = base_from_world @ poses
        mounts = np.linalg.inv(joint_poses[:, -2]) @ poses
        # A camera on the arm follows it exactly, which CoppeliaSim's arm, held together by forces, does not quite.
        if spread(poses) > 1e-6 and spread(mounts) < NEAR:
            poses = joint_poses[:, -2] @ mean_pose(mounts)
        extrinsics[camera] = poses
    qpos = np.hstack([joints, gripper])  # (T, 8)
    action = np.append(qpos[1:], qpos[-1:], axis=0)
    for t, observation in enumerate(observations[1:]):
        sent = field(observation, "joint_position_action")
        if np.shape(sent) in ((7,), (8,)):  # the last step of a path has [None, gripper]
            action[t, : len(sent)] = sent
    action[-1] = action[-2]
    action[:, -1] = action[:, -1] > 0.5
    return Episode(
        path=None, task=task, variation=variation, instruction=descriptions[number % len(descriptions)], instructions=descriptions,
        success=True, fps=float(HZ), robot="panda", sim=True, seed=number,  # RLBench keeps nothing but successes
        qpos=qpos.astype(np.float32), qvel=np.hstack([speeds, np.gradient(gripper, 1 / HZ, axis=0)]).astype(np.float32),
        action=action.astype(np.float32), joint_poses=joint_poses.astype(np.float32),
        images=images, intrinsics=intrinsics, extrinsics=extrinsics,
    )  # fmt: skip


def find_demonstrations(root, tasks=(), variations=(), count=None):
    """The folders episode<M> of these tasks and variations (none named: of all), at most `count` of each variation."""
    found = {}  # (task, variation) -> [(number, folder), ...]
    for path in root.glob("*/variation*/episodes/episode*"):
        if match := re.fullmatch(
            r"(.*)/variation(\d+)/episodes/episode(\d+)", path.relative_to(root).as_posix()
        ):
            found.setdefault((match[1], int(match[2])), []).append((int(match[3]), path))
    if not found:
        raise UserError(
            f"{root} has no <task>/variation<N>/episodes/episode<M> inside: give the root of a dataset of RLBench."
        )
    present = sorted({task for task, _ in found})
    for task in set(tasks) - set(present):
        raise UserError(f"{root} has no task '{task}', only {', '.join(present)}.")
    chosen = [
        (task, n)
        for task, n in sorted(found)
        if (not tasks or task in tasks) and (not variations or n in variations)
    ]
    for variation in set(variations) - {n for _, n in chosen}:
        raise UserError(f"{root} has no variation{variation} of these tasks.")
    return [path for key in chosen for _, path in sorted(found[key])[:count]]


def read_pictures(folder, frames, size):
    """The pictures 0.png, 1.png, ... of a camera, resized if size (height, width) is given -> (T, H, W, 3), original (W, H)."""
    pictures = []
    for path in [folder / f"{t}.png" for t in range(frames)]:
        try:
            with Image.open(path) as file:
                picture = file.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{path} is no whole picture ({error}): get it again.") from error
        original = picture.size
        if size and original != size[::-1]:
            picture = picture.resize(
                size[::-1], Image.BOX if original[0] > size[1] else Image.BICUBIC
            )
        pictures.append(np.array(picture))
    return np.stack(pictures), original


def read_demonstration(folder, cameras, size=None):
    """One folder episode<M> of a dataset -> an Episode. size: (height, width) of its pictures, as recorded if None."""
    variation, where = folder.parent.parent, folder / "low_dim_obs.pkl"
    descriptions, demo = load(variation / "variation_descriptions.pkl"), load(where)
    if (
        not isinstance(descriptions, list)
        or not descriptions
        or not all(isinstance(text, str) for text in descriptions)
    ):
        raise UserError(
            f"{variation / 'variation_descriptions.pkl'} is not a list of sentences: get it again."
        )
    observations = getattr(demo, "_observations", demo)
    if (
        not isinstance(observations, list)
        or len(observations) < 2
        or not all(hasattr(o, "joint_positions") for o in observations)
    ):
        raise UserError(
            f"{where} does not hold a demonstration of two frames or more: record it again."
        )
    images, scales = {}, {}
    for camera in cameras:
        pictures = folder / f"{camera}_rgb"
        if not pictures.is_dir():
            there = ", ".join(sorted(path.name[:-4] for path in folder.glob("*_rgb"))) or "none"
            raise UserError(
                f"{pictures} is missing; this demonstration's cameras are: {there}. Choose among them with --cameras."
            )
        if (count := len(list(pictures.glob("*.png")))) != len(observations):
            raise UserError(
                f"{pictures} has {count} pictures, but the demonstration {len(observations)} frames: get it again."
            )
        images[camera], (width, height) = read_pictures(pictures, count, size)
        scales[camera] = np.diag(
            [images[camera].shape[2] / width, images[camera].shape[1] / height, 1]
        )
    episode = convert(
        observations,
        images,
        descriptions,
        variation.parent.name,
        int(variation.name[9:]),
        int(folder.name[7:]),
        where,
    )
    episode.intrinsics = {camera: scales[camera] @ episode.intrinsics[camera] for camera in cameras}
    return episode
