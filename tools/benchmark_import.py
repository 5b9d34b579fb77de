"""The command of tools/benchmark.py for import_demos.py: how it keeps up with decoding pictures."""

import tempfile
import time
from pathlib import Path

import cv2
import h5py
import numpy as np

import import_demos
from genima.files import UserError
from genima.import_hdf5 import open_recording, read_recording

HEIGHT = 480
WIDTH = 640
QUALITY = 90  # of the JPEGs
NOISE = 4  # of a camera's pixels, standard deviation
LENS = """{"wrist": {"intrinsics": [[607, 0, 320], [0, 606, 240], [0, 0, 1]],
"hand_from_camera": [[1, 0, 0, 0.06], [0, 1, 0, 0], [0, 0, 1, -0.06], [0, 0, 0, 1]]%s}}"""
BENT = ', "distortion": [0.1, -0.2, 0, 0, 0]'


def importing(pictures: int = 150, turns: int = 3):
    """Import a vendor's file of JPEGs, 480x640, and decode its pictures alone, in turns.

    Args:
        pictures: How many the file has.
        turns: How often each is done; the shortest time counts, of one process.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_recording(folder / "take.hdf5", pictures)
        for lens, distortion in (("a straight lens", ""), ("a lens that bends", BENT)):
            (folder / "lens.json").write_text(LENS % distortion)
            alone = []
            whole = []
            for turn in range(turns):
                run = folder / f"{len(distortion)}_{turn}"
                settings = import_demos.Settings(
                    (folder / "take.hdf5",), run, calibration=(str(folder / "lens.json"),)
                )
                source = import_demos.find_sources(settings)[0][0]
                alone.append(time_decoding(source))
                whole.append(time_importing(source, settings))
            ours = 1000 * min(whole) / pictures  # ms
            theirs = 1000 * min(alone) / pictures
            print(
                f"{lens}: {ours:.1f} ms a picture, decoding alone {theirs:.1f} ms: "
                f"{theirs / ours:.0%} of its speed."
            )


def write_recording(path: Path, pictures: int):
    """A vendor's file with pictures as a camera makes them: smooth, with noise on every pixel."""
    random = np.random.default_rng(0)
    coarse = random.uniform(0, 255, (HEIGHT // 16, WIDTH // 16, 3)).astype(np.float32)
    smooth = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    with h5py.File(path, "w") as root:
        root.attrs["language_instruction"] = "pick up the cup"
        root.attrs["success"] = True
        root["joint_positions"] = np.tile([0.0, -0.2, 0.0, -2.2, 0.0, 2.0, 0.8], (pictures, 1))
        root["gripper_width"] = np.full(pictures, 0.08)
        root["timestamps"] = np.arange(pictures) / 10
        images = root.create_dataset("rgb/wrist", pictures, h5py.vlen_dtype(np.uint8))
        for t in range(pictures):
            noisy = np.roll(smooth, t, axis=1) + random.normal(0, NOISE, smooth.shape)
            picture = noisy.clip(0, 255).astype(np.uint8)
            images[t] = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]


def time_decoding(source: import_demos.Source) -> float:
    """Seconds to decode every picture."""
    with open_recording(source.path) as root:
        images = read_recording(root, source.mapping).images["wrist"]
        start = time.perf_counter()
        for t in range(len(images)):
            images[t]
        return time.perf_counter() - start


def time_importing(source: import_demos.Source, settings: import_demos.Settings) -> float:
    """Seconds to import the file."""
    start = time.perf_counter()
    outcome = import_demos.import_one(source, settings)
    if outcome.error:
        raise UserError(outcome.error)
    return time.perf_counter() - start
