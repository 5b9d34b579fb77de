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

import numpy as np
from PIL import Image

from episodes import Episode, UserError
from render_spheres import Chain, spread, turns

HZ = 20  # RLBench steps its simulation by 50 ms, and a demonstration has a frame per step
OPENCV = np.diag([-1.0, -1, 1, 1])  # PyRep's camera from OpenCV's: x left and y up against x right and y down
NEAR = 0.02  # metres, and parts of a rotation matrix: how well a Panda must fit. Other arms are off by ten times as much.

# Franka's Denavit-Hartenberg parameters after Craig (Franka Control Interface documentation, "Denavit-Hartenberg parameters")
DH = np.array([(0, 0.333, 0), (0, 0, -1), (0, 0.316, 1), (0.0825, 0, 1), (-0.0825, 0.384, -1), (0, 0, 1), (0.088, 0, 1)])
FINGERTIPS = 0.107 + 0.1034  # metres from the last joint along its axis: the flange, and the hand to between its fingertips


# ------------------------------------------------------------------------------------------------------------ pickles
class Observation:
    """RLBench's observation, as a plain container of attributes."""


class Demo:
    """RLBench's demonstration: _observations, and random_seed: NumPy's random state before the scene was laid out."""


def _array(kind, shape, dtype):
    """An empty array, to be filled by the pickle's next instruction: NumPy's _reconstruct makes no other."""
    if kind is not np.ndarray or tuple(shape) != (0,):
        raise pickle.UnpicklingError("an array that NumPy did not write")
    return np.ndarray((0,), "b")


class Unpickler(pickle.Unpickler):
    def __init__(self, file, path):
        super().__init__(file)
        self.path, self.allowed = path, {
            ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),  # protocol 2 writes bytes as text
            ("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype,
            # Classes of their own for each file: a file can set attributes of a class, and shall not meddle with the next one's.
            ("rlbench.demo", "Demo"): type("Demo", (Demo,), {}),
            ("rlbench.backend.observation", "Observation"): type("Observation", (Observation,), {}),
        }  # fmt: skip
        for core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2; what their functions of these names do, for arrays of numbers
            self.allowed |= {
                (f"{core}.multiarray", "_reconstruct"): _array,
                (f"{core}.multiarray", "scalar"): lambda dtype, data: np.frombuffer(data, dtype)[0],
                (f"{core}.numeric", "_frombuffer"):
                    lambda data, dtype, shape, order: np.frombuffer(data, dtype).reshape(shape, order=order),
            }  # fmt: skip

    def find_class(self, module, name):
        module = IMPORT_MAPPING.get(module, module)  # protocol 2 has Python 2's names
        if (module, name) not in self.allowed:
            raise UserError(f"{self.path} names {module}.{name}, which no recorded demonstration needs and which could run code: "
                            "nothing of it was run; get this file from somewhere else.")
        return self.allowed[module, name]


def load(path):
    """The content of one of RLBench's pickles. Nothing in it can run."""
    try:
        return Unpickler(io.BytesIO(path.read_bytes()), path).load()
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} is missing: get the dataset again.") from None
    except Exception as error:  # a damaged pickle raises whatever its next instruction meets
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split()) or type(error).__name__}): get it again.") from error


# ------------------------------------------------------------------------------------------------------------- the arm
def panda(tool=np.eye(4), offsets=np.zeros(7)):
    """The Panda's kinematics, each joint's frame moved along its axis by offsets (7,) metres; tool (4, 4) in the last of them."""
    links = np.tile(np.eye(4), (7, 1, 1))
    links[:, 0, 3] = DH[:, 0]
    for link, (_, shift, quarter_turns) in zip(links, DH):
        cosine, sine = 1 - abs(quarter_turns), quarter_turns
        link[:3, :3] = [[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]]  # about x
        link[:3, 3] += shift * link[:3, 2]
    along = np.tile(np.eye(4), (8, 1, 1))
    along[1:, 2, 3] = offsets
    return Chain(np.linalg.inv(along[:-1]) @ links @ along[1:], tool, {}, {})


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
    ours = panda().joint_poses(q)[:, :7]
    rotation = nearest_rotation(joint_poses[..., :3, 2:3] @ ours[..., None, :3, 2])
    axes, origins = ours[..., :3, 2] @ rotation.T, ours[..., :3, 3] @ rotation.T  # (T, 7, 3)
    # joint_poses' origins = base + origins + axes * offsets: linear in base and offsets
    system = np.concatenate([np.broadcast_to(np.eye(3), (*axes.shape, 3)), axes[..., None] * np.eye(7)[:, None]], axis=-1)  # (T, 7, 3, 10)
    wanted = joint_poses[..., :3, 3] - origins
    solution = np.linalg.lstsq(system.reshape(-1, 10), wanted.ravel(), rcond=None)[0]
    error = max(np.abs(system @ solution - wanted).max(), np.abs(axes - joint_poses[..., :3, 2]).max())
    return pose_of(rotation, solution[:3]), solution[3:], error


def fit_base_to_tool(q, tool):
    """The same from poses tool (T, 4, 4) of the hand alone, for datasets without joint_poses -> world_from_base, zeros (7,), error."""
    last, best = panda().joint_poses(q)[:, 6], None
    for turn in range(8):  # in eighths: the hand sits on the last joint turned by -45 degrees, and PyRep's tip somehow on the hand
        mount = turns(np.array(turn * np.pi / 4))[:3, :3]
        rotations = tool[:, :3, :3] @ np.swapaxes(last[:, :3, :3] @ mount, 1, 2)
        rotation = nearest_rotation(rotations)
        error = np.abs(rotations - rotation).max()
        if best is None or error < best[1] - 1e-3 or error < best[1] + 1e-3 and rotation[0, 0] > best[0][0, 0]:  # it looks along x
            best = rotation, error
    rotation, error = best
    # tool = base + rotation @ (last joint + its rotation @ (tip + difference)); the difference only as far as the motion tells it
    tip = np.array([0, 0, FINGERTIPS])
    wanted = tool[:, :3, 3] - (last[:, :3, 3] + last[:, :3, :3] @ tip) @ rotation.T
    system = np.concatenate([np.broadcast_to(np.eye(3), (len(q), 3, 3)), rotation @ last[:, :3, :3]], axis=2)  # (T, 3, 6)
    ridge = np.hstack([np.zeros((3, 3)), 0.1 * np.eye(3)])
    solution = np.linalg.lstsq(np.vstack([*system, ridge]), np.append(wanted, np.zeros(3)), rcond=None)[0]
    return pose_of(rotation, solution[:3]), np.zeros(7), max(error, np.abs(system @ solution - wanted).max())


def matrices(poses):
    """Poses (..., 7): x y z and a quaternion with w last, or (..., 3 or 4, 4) -> (..., 4, 4)."""
    poses = np.asarray(poses, np.float64)
    if poses.shape[-1] == 7:
        x, y, z, w = np.moveaxis(poses[..., 3:] / np.linalg.norm(poses[..., 3:], axis=-1, keepdims=True), -1, 0)
        rows = [[1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w), poses[..., 0]],
                [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w), poses[..., 1]],
                [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y), poses[..., 2]]]  # fmt: skip
        poses = np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)
    whole = np.zeros((*poses.shape[:-2], 4, 4))
    whole[..., : poses.shape[-2], :], whole[..., 3, 3] = poses, 1
    return whole


# ------------------------------------------------------------------------------------------------------------ episodes
def stack(observations, read, shapes, what, where):
    """read(observation) of every frame as one array of float64, if every frame has it in one of these shapes."""
    values = [read(observation) for observation in observations]
    try:
        array = np.array(values, np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.shape[1:] not in shapes or not np.isfinite(array).all():
        t = next((t for t, value in enumerate(values) if np.shape(value) not in shapes), 0)
        found = "missing" if values[t] is None else f"of shape {np.shape(values[t])}, or not of numbers"
        raise UserError(f"{where}: {what} of frame {t} is {found}, where {' or '.join(map(str, shapes))} is needed: record it again.")
    return array


def camera_matrices(observations, camera, where):
    """OpenCV intrinsics (3, 3) and camera poses (T, 4, 4) in RLBench's world."""
    intrinsics, extrinsics = (
        stack(observations, lambda o: getattr(o, "misc", {}).get(f"{camera}_camera_{name}"), shapes, f"{camera}_camera_{name}", where)
        for name, shapes in (("intrinsics", [(3, 3)]), ("extrinsics", [(4, 4), (3, 4)])))  # fmt: skip
    intrinsics, extrinsics = intrinsics[0].copy(), matrices(extrinsics)
    if np.sign(intrinsics[0, 0]) != np.sign(intrinsics[1, 1]) or intrinsics[0, 0] == 0:
        raise UserError(f"{where}: {camera}_camera_intrinsics has the focal lengths {intrinsics[0, 0]} and {intrinsics[1, 1]}, which "
                        "mirror the picture: record it again.")
    if intrinsics[0, 0] < 0:
        intrinsics[[0, 1], [0, 1]] *= -1
        extrinsics = extrinsics @ OPENCV
    return intrinsics, extrinsics


def commands(observations, joints, gripper):
    """The actions (T, 8): see the top of this file."""
    actions = np.concatenate([joints, gripper], axis=1)[np.minimum(np.arange(len(joints)) + 1, len(joints) - 1)]
    for t, observation in enumerate(observations[1:]):
        sent = np.array(getattr(observation, "misc", {}).get("joint_position_action"), object).ravel()
        if len(sent) in (7, 8) and all(isinstance(value, (int, float, np.number)) and np.isfinite(value) for value in sent):
            actions[t, : len(sent)] = sent
    actions[-1] = actions[-2]
    actions[:, -1] = actions[:, -1] > 0.5
    return actions


def arm(q, observations, where):
    """The chain of the recorded arm and base_from_world (4, 4). Raises UserError for another robot."""
    tool = stack(observations, lambda o: o.gripper_pose if getattr(o, "gripper_matrix", None) is None else o.gripper_matrix,
                 [(7,), (4, 4), (3, 4)], "gripper_pose", where)
    tool, misc = matrices(tool), [getattr(observation, "misc", {}) for observation in observations]
    fits = [fit_base_to_tool(q, tool)]
    if all(np.shape(values.get("joint_poses")) == (7, 7) for values in misc):
        fits.insert(0, fit_base(q, matrices([values["joint_poses"] for values in misc])))
    for base, offsets, error in fits:
        tips = np.linalg.inv(base @ panda(offsets=offsets).joint_poses(q)[:, 6]) @ tool
        if error < NEAR and spread(tips) < 2 * NEAR:
            return panda(mean_pose(tips), offsets), np.linalg.inv(base)
    raise UserError(f"{where}: this is not a Panda, for its joints and its gripper do not move as a Panda's do (by {fits[0][2]:.2f}): "
                    "only RLBench's default robot can be imported.")


def convert(observations, images, descriptions, task, variation, number, where):
    """RLBench's observations with their images {camera: (T, H, W, 3)} -> an Episode."""
    if np.shape(observations[0].joint_positions) != (7,):
        raise UserError(f"{where}: this is not a Panda, for joint_positions has the shape {np.shape(observations[0].joint_positions)}: "
                        "only RLBench's default robot can be imported.")
    joints = stack(observations, lambda o: o.joint_positions, [(7,)], "joint_positions", where)
    gripper = stack(observations, lambda o: o.gripper_open, [()], "gripper_open", where)[:, None]
    if getattr(observations[0], "joint_velocities", None) is None:
        speeds = np.gradient(joints, 1 / HZ, axis=0)
    else:
        speeds = stack(observations, lambda o: o.joint_velocities, [(7,)], "joint_velocities", where)
    chain, base_from_world = arm(joints, observations, where)
    joint_poses = chain.joint_poses(joints)  # (T, 8, 4, 4)
    intrinsics, extrinsics = {}, {}
    for camera in images:
        intrinsics[camera], poses = camera_matrices(observations, camera, where)
        poses = base_from_world @ poses
        mounts = np.linalg.inv(joint_poses[:, -2]) @ poses
        # A camera on the arm follows it exactly, which CoppeliaSim's arm, held together by forces, does not quite.
        if spread(poses) > 1e-6 and spread(mounts) < NEAR:
            poses = joint_poses[:, -2] @ mean_pose(mounts)
        extrinsics[camera] = poses
    return Episode(
        path=None, task=task, variation=variation, instruction=descriptions[number % len(descriptions)], instructions=descriptions,
        success=True, fps=float(HZ), robot="panda", sim=True, seed=number,  # RLBench keeps nothing but successes
        qpos=np.hstack([joints, gripper]).astype(np.float32),
        qvel=np.hstack([speeds, np.gradient(gripper, 1 / HZ, axis=0)]).astype(np.float32),
        action=commands(observations, joints, gripper).astype(np.float32), joint_poses=joint_poses.astype(np.float32),
        images=images, intrinsics=intrinsics, extrinsics=extrinsics,
    )  # fmt: skip


def read_pictures(folder, frames, size):
    """The pictures 0.png, 1.png, ... of a camera, resized if size (height, width) is given -> (T, H, W, 3), original (H, W)."""
    pictures = []
    for t in range(frames):
        try:
            with Image.open(folder / f"{t}.png") as file:
                picture = file if file.mode == "RGB" else file.convert("RGB")
                original = picture.size
                if size and original != size[::-1]:
                    picture = picture.resize(size[::-1], Image.BOX if original[0] > size[1] else Image.BICUBIC)
                pictures.append(np.array(picture))
        except FileNotFoundError:
            raise UserError(f"{folder / f'{t}.png'} is missing, though the demonstration has {frames} frames: get it again.") from None
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{folder / f'{t}.png'} is no whole picture ({error}): get it again.") from error
        if pictures[-1].shape != pictures[0].shape:
            raise UserError(f"{folder / f'{t}.png'} has another size than the pictures before it: record the demonstration again.")
    return np.stack(pictures), original[::-1]


def find_demonstrations(root, tasks=(), variations=(), count=None):
    """The folders episode<M> of these tasks and variations (none named: of all), at most `count` of each variation."""
    numbered = lambda folder, name: sorted(  # noqa: E731
        (int(match[1]), path) for path in folder.glob(f"{name}*") if (match := re.fullmatch(rf"{name}(\d+)", path.name)) and path.is_dir())
    if not root.is_dir():
        raise UserError(f"There is no folder {root}: give the dataset's root, in which a folder for each task lies.")
    found = sorted(path.name for path in root.iterdir() if numbered(path, "variation"))
    if not found:
        raise UserError(f"{root} has no <task>/variation<N> inside: give the dataset's root, in which a folder for each task lies.")
    folders = []
    for task in tasks or found:
        if task not in found:
            raise UserError(f"{root} has no task '{task}', only {', '.join(found)}.")
        present = numbered(root / task, "variation")
        for missing in set(variations) - {number for number, _ in present}:
            raise UserError(f"{root / task} has no variation{missing}.")
        for number, folder in present:
            if not variations or number in variations:
                episodes = numbered(folder / "episodes", "episode")
                if not episodes:
                    raise UserError(f"{folder} has no episodes/episode<M> inside: get the dataset again.")
                folders += [path for _, path in episodes[:count]]
    return folders


def read_demonstration(folder, cameras, size=None):
    """One folder episode<M> of a dataset -> an Episode. size: (height, width) of its pictures, as recorded if None."""
    variation = folder.parent.parent
    descriptions = load(variation / "variation_descriptions.pkl")
    if not isinstance(descriptions, (list, tuple)) or not descriptions or not all(isinstance(text, str) and text for text in descriptions):
        raise UserError(f"{variation / 'variation_descriptions.pkl'} is not a list of sentences: get it again.")
    where = folder / "low_dim_obs.pkl"
    demo = load(where)
    observations = getattr(demo, "_observations", demo)
    if not isinstance(observations, (list, tuple)) or len(observations) < 2 or any(not hasattr(o, "joint_positions") for o in observations):
        raise UserError(f"{where} does not hold a demonstration of two frames or more: record it again.")
    frames, images, sizes = len(observations), {}, {}
    for camera in cameras:
        pictures = folder / f"{camera}_rgb"
        if not pictures.is_dir():
            there = ", ".join(sorted(path.name[:-4] for path in folder.glob("*_rgb"))) or "none"
            raise UserError(f"{pictures} is missing; this demonstration's cameras are: {there}. Choose among them with --cameras.")
        if (pictures / f"{frames}.png").exists():
            raise UserError(f"{pictures} has more pictures than the demonstration's {frames} frames: half of it is missing, get it again.")
        images[camera], sizes[camera] = read_pictures(pictures, frames, size)
    episode = convert(observations, images, list(descriptions), variation.parent.name, int(variation.name[9:]), int(folder.name[7:]), where)
    for camera, (height, width) in sizes.items():
        new_height, new_width = images[camera].shape[1:3]
        episode.intrinsics[camera] = np.diag([new_width / width, new_height / height, 1]) @ episode.intrinsics[camera]
    return episode
