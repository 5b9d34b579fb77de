"""Cameras: each device is read by a thread of its own, which keeps the newest frame.

    cameras = Cameras({"front": "832112070001", "wrist": "opencv:0"})
    stamps, images = cameras.read_frames()   # {camera: s of time.monotonic()}, {camera: (H, W, 3)}
    cameras.close()

A camera's source is one of
    832112070001        the serial number of a RealSense
    opencv:0            a camera that OpenCV opens by its number ...
    opencv:/dev/video2  ... or by its file
    opencv:0:left       the left half of a picture that shows two views side by side (ZED)
    opencv:0:right      the right half
"""

import threading
import time
from contextlib import suppress

import numpy as np
from PIL import Image, ImageOps

from genima.calibration_files import Camera
from genima.files import UserError
from genima.lens import undistort, undistortion
from robot.arm import Fault, one_line

FIRST_FRAME = 10  # seconds that a camera may take to start
TIMEOUT = 1000  # milliseconds to wait for one frame
HALVES = ("left", "right")


# ---------------------------------------------------------------------------------------- devices
class RealSense:
    """An Intel RealSense: 480x640 at 30 frames a second."""

    def __init__(self, serial: str, camera: str):
        try:
            import pyrealsense2
        except ImportError:
            raise UserError(
                "pyrealsense2 is not installed: pip install -r requirements-robot.txt."
            ) from None
        self.rs = pyrealsense2
        self.serial = serial
        connected = set()
        for device in self.rs.context().query_devices():
            connected.add(device.get_info(self.rs.camera_info.serial_number))
        if serial not in connected:
            others = ", ".join(sorted(connected)) or "none"
            raise UserError(
                f"There is no RealSense camera {serial} for '{camera}'; connected are: {others}."
            )

    def start(self):
        config = self.rs.config()
        config.enable_device(self.serial)
        config.enable_stream(self.rs.stream.color, 640, 480, self.rs.format.rgb8, 30)
        self.pipeline = self.rs.pipeline()
        self.pipeline.start(config)

    def read(self) -> np.ndarray | None:
        """The next frame (H, W, 3) in RGB; None when there was none within a second."""
        try:
            frame = self.pipeline.wait_for_frames(TIMEOUT).get_color_frame()
        except RuntimeError as error:
            # librealsense raises for a timeout as it does for a failure.
            if "didn't arrive" not in str(error):
                raise
            return None
        if not frame:
            return None
        return np.array(frame.get_data())

    def stop(self):
        self.pipeline.stop()


class OpenCVCamera:
    """Any camera that OpenCV can open, in its default size."""

    def __init__(self, device: str, camera: str):
        try:
            import cv2
        except ImportError as error:
            raise UserError(
                f"OpenCV is not installed ({error}): pip install -r requirements.txt."
            ) from None
        self.cv2 = cv2
        self.capture = cv2.VideoCapture(int(device) if device.isdigit() else device)
        if not self.capture.isOpened():
            raise UserError(
                f"OpenCV cannot open camera '{device}' for '{camera}': is it connected, "
                "and does no other program use it?"
            )

    def start(self):
        self.capture.set(self.cv2.CAP_PROP_BUFFERSIZE, 1)

    def read(self) -> np.ndarray | None:
        """The next frame (H, W, 3) in RGB; None when there was none."""
        arrived, frame = self.capture.read()
        if not arrived:
            time.sleep(0.01)  # a lost camera answers at once
            return None
        return self.cv2.cvtColor(frame, self.cv2.COLOR_BGR2RGB)

    def stop(self):
        self.capture.release()


# ------------------------------------------------------------------------------------ the cameras
def parse_source(source: str) -> tuple[str, str, str]:
    """A camera's source -> kind (realsense or opencv), device, half (left, right or empty)."""
    kind, colon, device = source.partition(":")
    if not colon:
        return "realsense", source, ""
    half = ""
    head, _, tail = device.rpartition(":")
    if head and tail in HALVES:
        device = head
        half = tail
    if kind != "opencv" or not device:
        raise UserError(
            f"--cameras: '{source}' is no camera; give a RealSense's serial number, opencv:0, "
            "opencv:/dev/video2, or opencv:0:left and opencv:0:right."
        )
    return "opencv", device, half


def cut_half(image: np.ndarray, half: str) -> np.ndarray:
    """The left or right half of a picture (H, W, 3); all of it for an empty `half`."""
    middle = image.shape[1] // 2
    if half == "left":
        return image[:, :middle]
    if half == "right":
        return image[:, middle : 2 * middle]
    return image


def lens_maps(entry: dict, size: tuple[int, int]):
    """What straightens the pictures (H, W) of a calibrated camera; None where nothing is bent."""
    camera = Camera("calibration", distortion=entry.get("distortion"))
    camera.model = entry.get("distortion_model", "brown")
    return undistortion(camera, entry["intrinsics"], size)


class Cameras:
    """The newest frame of each camera, straightened as its calibration says."""

    def __init__(self, sources: dict[str, str], calibration: dict | None = None):
        """sources: {camera: source}. calibration: as genima/calibration.py's load_calibration.

        Returns when every camera has sent its first frame.
        """
        self.lenses = {} if calibration is None else calibration
        self.maps = {}  # camera -> what straightens its pictures
        self.newest = {}  # camera -> (time.monotonic(), (H, W, 3) uint8)
        self.errors = {}  # camera -> what its device reported
        self.closing = threading.Event()
        views = {}  # (kind, device) -> {camera: half}: a device with two views is opened once
        for camera, source in sources.items():
            kind, device, half = parse_source(source)
            views.setdefault((kind, device), {})[camera] = half
        devices = []
        for (kind, device), halves in views.items():
            opened = {"realsense": RealSense, "opencv": OpenCVCamera}[kind]
            devices.append((opened(device, next(iter(halves))), halves))
        for arguments in devices:
            threading.Thread(target=self._read, args=arguments, daemon=True).start()
        self._wait_for_first_frames(sources)

    def _read(self, device, halves):
        """In a thread: keep the newest frame of one device."""
        try:
            device.start()
            while not self.closing.is_set():
                image = device.read()
                stamp = time.monotonic()
                if image is None:
                    continue
                for camera, half in halves.items():
                    self.newest[camera] = stamp, self._straighten(camera, cut_half(image, half))
        except Exception as error:
            for camera in halves:
                self.errors[camera] = one_line(error)
        with suppress(Exception):
            device.stop()

    def _straighten(self, camera, image):
        """As import_demos.py does it with recorded pictures."""
        if camera not in self.lenses:
            return image
        if camera not in self.maps:
            self.maps[camera] = lens_maps(self.lenses[camera], image.shape[:2])
        return undistort(image, self.maps[camera])

    def _wait_for_first_frames(self, sources):
        end = time.monotonic() + FIRST_FRAME
        while True:
            self._check_errors()
            missing = [camera for camera in sources if camera not in self.newest]
            if not missing:
                self.newest = {camera: self.newest[camera] for camera in sources}
                return
            if time.monotonic() > end:
                self.close()
                raise Fault(
                    f"Camera '{missing[0]}' has sent no picture for {FIRST_FRAME} s: "
                    "check its cable."
                )
            time.sleep(0.01)

    def _check_errors(self):
        for camera, error in list(self.errors.items()):
            self.close()
            raise Fault(f"Camera '{camera}' failed ({error}): check its cable.")

    def read_frames(self) -> tuple[dict, dict]:
        """{camera: time.monotonic() of its newest frame}, {camera: (H, W, 3) uint8}."""
        self._check_errors()
        stamps = {}
        images = {}
        for camera, (stamp, image) in list(self.newest.items()):
            stamps[camera] = stamp
            images[camera] = image
        return stamps, images

    def close(self):
        self.closing.set()


# --------------------------------------------------------------------------------------- pictures
def resize_and_crop(
    image: np.ndarray, size: tuple[int, int] | None, intrinsics: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The middle of a picture (H, W, 3) in another size, and the camera's intrinsics (3, 3) for it.

    size: (height, width); None: as it is. What does not fit the new aspect ratio is cut off.
    """
    if intrinsics is None:
        intrinsics = np.eye(3)
    height, width = image.shape[:2]
    if size is None or tuple(size) == (height, width):
        return image, intrinsics
    scale = max(size[0] / height, size[1] / width)
    resized = ImageOps.fit(Image.fromarray(image), (size[1], size[0]), Image.BOX)
    cut_x = (width - size[1] / scale) / 2
    cut_y = (height - size[0] / scale) / 2
    shift = np.array([[0, 0, cut_x], [0, 0, cut_y], [0, 0, 0]])
    return np.asarray(resized), np.diag([scale, scale, 1]) @ (intrinsics - shift)
