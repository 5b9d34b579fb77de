"""Recordings as others write them, made of numpy and h5py alone: what a lab or a vendor delivers.

python tests/make_recordings.py FOLDER       one of each, to try import_demos.py on
"""

import json
import sys
from pathlib import Path

import h5py
import numpy as np

PANDA_HOME = np.array([0.0, -0.2, 0.0, -2.2, 0.0, 2.0, 0.8])
UR5E_HOME = np.array([-0.2, -1.5, 1.5, -1.5, -1.6, 0.0])
INSTRUCTION = "pick up the cup"
ROS = """image_width: 640
image_height: 480
camera_name: wrist
camera_matrix: {rows: 3, cols: 3, data: [607.0, 0.0, 320.0, 0.0, 606.0, 240.0, 0.0, 0.0, 1.0]}
distortion_model: plumb_bob
distortion_coefficients: {rows: 1, cols: 5, data: [0.1, -0.2, 0.001, -0.002, 0.0]}
"""
HAND_EYE = """parameters:
  eye_on_hand: true
  robot_base_frame: panda_link0
  robot_effector_frame: panda_hand
  tracking_base_frame: camera_color_optical_frame
transformation: {x: 0.06, y: 0.0, z: -0.06, qx: 0.0, qy: 0.0, qz: 0.0, qw: 1.0}
"""


def motion(home, frames, seed=0):
    """Joints (T, D) that swing about a posture, and a gripper (T,) that closes from 1 to 0.4."""
    random = np.random.default_rng(seed)
    time = np.linspace(0, 1, frames)[:, None]
    joints = home + random.uniform(-0.3, 0.3, len(home)) * np.sin(3 * time)
    gripper = np.interp(time[:, 0], [0.5, 0.8], [1.0, 0.4])
    return joints, gripper


def pictures(frames, height, width, seed=0):
    """Pictures (T, H, W, 3) uint8 of which no two are alike, smooth enough for a JPEG."""
    random = np.random.default_rng(seed)
    corners = random.integers(0, 255, (frames, 3, 3)).astype(np.float64)  # three colours a frame
    across = np.linspace(0, 1, width)[None, None, :, None]
    down = np.linspace(0, 1, height)[None, :, None, None]
    a, b, c = corners[:, None, None, :, :].transpose(3, 0, 1, 2, 4)
    return (a * (1 - across) * (1 - down) + b * across + c * (1 - across) * down).astype(np.uint8)


def write_vendor(path, home=PANDA_HOME, frames=45, fps=30.0, success=True, seed=0, cameras=None):
    """A vendor's file. cameras: {name: (H, W)}."""
    joints, gripper = motion(home, frames, seed)
    with h5py.File(path, "w") as root:
        root.attrs["language_instruction"] = INSTRUCTION
        root.attrs["success"] = success
        root["joint_positions"] = joints
        root["gripper_width"] = gripper * 0.08
        root["timestamps"] = 1000.0 + np.arange(frames) / fps
        for number, (camera, size) in enumerate((cameras or {"wrist": (480, 640)}).items()):
            root[f"rgb/{camera}"] = pictures(frames, *size, 10 * seed + number)


def write_act(path, frames=50, encode=None, size=(48, 64), seed=0):
    """ACT's file. encode: a function from a picture to the bytes of a JPEG, padded with zeros."""
    joints, gripper = motion(PANDA_HOME, frames, seed)
    qpos = np.concatenate([joints, gripper[:, None]], axis=1)
    images = pictures(frames, *size, seed)
    with h5py.File(path, "w") as root:
        root.attrs["sim"] = False
        root["observations/qpos"] = qpos
        root["observations/qvel"] = np.zeros_like(qpos)
        root["action"] = np.concatenate([qpos[1:], qpos[-1:]])
        if encode is None:
            root["observations/images/wrist"] = images
            return
        root.attrs["compress"] = True
        encoded = [np.frombuffer(encode(picture), np.uint8) for picture in images]
        longest = max(len(data) for data in encoded)
        padded = [np.pad(data, (0, longest + 7 - len(data))) for data in encoded]
        root["observations/images/wrist"] = np.stack(padded)
        root["compress_len"] = [[len(data) for data in encoded]]


def look_from(position, target):
    """World from camera (4, 4), OpenCV's axes."""
    forward = np.subtract(target, position)
    forward = forward / np.linalg.norm(forward)
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    pose[:3, 3] = position
    return pose


def room_cameras(cameras):
    """Our calibration of cameras {name: (H, W)} that stand in the room and look at the arm."""
    entries = {}
    for number, (camera, (height, width)) in enumerate(cameras.items()):
        pose = look_from([1.3, 0.5 - number, 0.7], [0.0, 0.0, 0.4])
        matrix = [[float(width), 0, width / 2], [0, float(width), height / 2], [0, 0, 1]]
        entries[camera] = {"intrinsics": matrix, "world_from_camera": pose.tolist()}
    return entries


def main(folder):
    folder.mkdir(parents=True)
    write_vendor(folder / "vendor.hdf5")
    write_vendor(folder / "failed.hdf5", success=False, seed=1)
    write_act(folder / "act.hdf5")
    (folder / "wrist_lens.yaml").write_text(ROS)
    (folder / "wrist_pose.yaml").write_text(HAND_EYE)
    two = {"front": (96, 128), "side": (120, 90)}
    write_vendor(folder / "ur5e.hdf5", UR5E_HOME, cameras=two)
    (folder / "room.json").write_text(json.dumps(room_cameras(two), indent="\t"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
