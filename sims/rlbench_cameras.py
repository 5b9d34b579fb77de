"""RLBench's cameras, as OpenCV's.

PyRep's vision sensor looks along +z with x to the left and y up, and says so with negative focal
lengths. OpenCV's camera is that one turned half round its z axis, with positive focal lengths: the
same pixels, to the bit. Positive focal lengths in a recording are taken as OpenCV's already.

Recordings older than April 2021 do not hold their cameras. For them RLBench's own are known:
position, direction and field of view below were read from a newer recording, and the pictures of
the older ones agree. The cameras at the shoulders were moved once, in December 2020, when the
overhead camera was added; their places before that were measured on pictures, to a centimetre.
"""

from dataclasses import dataclass

import numpy as np

from genima.files import UserError

# PyRep's camera from OpenCV's: x left and y up against x right and y down.
PYREP_FROM_OPENCV = np.diag([-1.0, -1, 1, 1])
# PerAct2's names of two cameras.
OTHER_NAMES = {"left_shoulder": "over_shoulder_left", "right_shoulder": "over_shoulder_right"}


@dataclass(frozen=True)
class Camera:
    """A camera of RLBench's scene. yaw: degrees to the left of the x axis; pitch: below it."""

    position: tuple
    yaw: float
    pitch: float
    field_of_view: float = 40.0

    def pose(self):
        """World from camera (4, 4), OpenCV's axes."""
        yaw, pitch = np.radians([self.yaw, self.pitch])
        forward = np.array(
            [np.cos(pitch) * np.cos(yaw), np.cos(pitch) * np.sin(yaw), -np.sin(pitch)]
        )
        right = np.array([np.sin(yaw), -np.cos(yaw), 0.0])
        pose = np.eye(4)
        pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
        pose[:3, 3] = self.position
        return pose

    def intrinsics(self, width, height):
        """(3, 3) in pixels; the field of view is that of the larger side."""
        focal = max(width, height) / 2 / np.tan(np.radians(self.field_of_view / 2))
        return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])


IN_THE_ROOM = {
    "front": Camera((1.35, 0.0, 1.58), 180, 25),
    "overhead": Camera((-0.175, 0.0, 2.43), 0, 65),
    "left_shoulder": Camera((-0.175, 0.2, 1.98), -10, 65),
    "right_shoulder": Camera((-0.175, -0.2, 1.98), 10, 65),
}
BEFORE_OVERHEAD = {
    "front": IN_THE_ROOM["front"],
    "left_shoulder": Camera((-0.175, 0.25, 1.98), 0, 65),
    "right_shoulder": Camera((-0.175, -0.25, 1.98), 0, 65),
}
# The wrist's camera sits behind the hand and is tilted by 5 degrees: position in the tip's frame.
WRIST_POSITION = (-0.05, 0.002, -0.0921)
WRIST_TILT = np.radians(5)
WRIST_FIELD_OF_VIEW = 60.0


def tip_from_wrist_camera():
    """(4, 4), OpenCV's axes."""
    cosine = np.cos(WRIST_TILT)
    sine = np.sin(WRIST_TILT)
    pose = np.eye(4)
    pose[:3, :3] = [[0, cosine, sine], [-1, 0, 0], [0, -sine, cosine]]
    pose[:3, 3] = WRIST_POSITION
    return pose


def standard_camera(name, tool, size, has_overhead, where):
    """Intrinsics (3, 3) and poses (T, 4, 4) of RLBench's own camera, for recordings without them.

    tool: (T, 4, 4) world from tip; size: width, height in pixels.
    """
    if name == "wrist":
        camera = Camera((0, 0, 0), 0, 0, WRIST_FIELD_OF_VIEW)
        return camera.intrinsics(*size), tool @ tip_from_wrist_camera()
    cameras = IN_THE_ROOM if has_overhead else BEFORE_OVERHEAD
    if name not in cameras:
        raise UserError(f"{where} does not hold {name}_camera_intrinsics: choose other --cameras.")
    poses = np.repeat(cameras[name].pose()[None], len(tool), axis=0)
    return cameras[name].intrinsics(*size), poses


def to_opencv(intrinsics, poses, where):
    """Recorded intrinsics (3, 3) and poses (T, 4, 4) -> OpenCV's."""
    fx, fy = intrinsics[0, 0], intrinsics[1, 1]
    if fx > 0 and fy > 0:
        return intrinsics, poses
    if fx < 0 and fy < 0:
        return intrinsics @ PYREP_FROM_OPENCV[:3, :3], poses @ PYREP_FROM_OPENCV
    raise UserError(
        f"{where} has focal lengths {fx:.1f} and {fy:.1f} pixels, where RLBench's are both "
        "negative and OpenCV's both positive: record it again."
    )
