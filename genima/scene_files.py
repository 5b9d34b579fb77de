"""The random scenes that the base learns from, SHARD to a file (pretrain_painter.py).

Stage 2 may show some of them among the demonstrations (train_controlnet.py --rehearse).

<out>/scenes/<first>.hdf5    attrs format, first, cameras
  /images                    (N, V, H, W, 3) uint8
  /layers                    (N, S, V, H, W, 4) uint8 RGBA, what each sentence asks to paint
  /sentences                 (N, S) text
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from genima.arrays import check_stored
from genima.episodes import CAMERAS
from genima.files import UserError, read_hdf5

FORMAT = "nanogenima-scenes-1"
SHARD = 500  # scenes a file: a killed run loses at most that many
KINDS = ("A", "B", "C", "C")  # of the sentences for each scene: a quarter, a quarter, a half


def find_shards(folder: Path, first_scene: int, scenes: int) -> dict[Path, int]:
    """The scenes' files, with the number of the first scene in each."""
    starts = range(first_scene, first_scene + scenes, SHARD)
    return {folder / f"{start:07d}.hdf5": start for start in starts}


def check_shards(paths: Sequence[Path], cameras: int, size: int):
    """Raise a UserError for a file of scenes that is missing, broken, or of other pictures."""
    views = (cameras, size, size)
    wanted = {
        "images": (SHARD, *views, 3),
        "layers": (SHARD, len(KINDS), *views, 4),
        "sentences": (SHARD, len(KINDS)),
    }
    for path in paths:
        with read_hdf5(path, FORMAT) as root:
            for name, shape in wanted.items():
                data = root[name]
                check_stored(data)
                pictures = name == "sentences" or data.dtype == np.uint8
                if name == "images" and data.ndim == 5 and data.shape[2] != size:
                    there = data.shape[2]
                    raise UserError(
                        f"{path} has views of {there} pixels: give --image-size {there}, or "
                        "another --out."
                    )
                if data.shape != shape or not pictures:
                    raise UserError(
                        f"{path}: {name} has shape {data.shape} of {data.dtype}, not {shape}: use "
                        "another --out, or move this file away and run the same command again."
                    )


class Scene(NamedTuple):
    """A scene and one of its sentences: a sample for stage 2, as its frames are."""

    file: str
    index: int
    which: int  # sentence
    instructions: list[str]  # that sentence

    @property
    def key(self) -> str:
        return f"{self.file} {self.index} {self.which}"

    def read(self) -> np.ndarray:
        """All views and the layers to paint on them: (V, h, w, 3 + 4) uint8."""
        with h5py.File(self.file, "r") as root:
            layers = root["layers"][self.index, self.which]
            return np.concatenate([root["images"][self.index], layers], axis=-1)

    def read_views(self, cameras: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """As Frame.read_views."""
        pictures = self.read()
        chosen = [pictures[CAMERAS.index(camera)] for camera in cameras]
        return [(picture[..., :3], picture[..., 3:]) for picture in chosen]


class RandomScenes:
    """Files of random scenes, to draw samples from."""

    def __init__(self, files: Sequence[Path]):
        self.sentences = {}  # of each file, (N, S)
        for path in files:
            with read_hdf5(path, FORMAT) as root:
                self.sentences[str(path)] = root["sentences"].asstr()[:]
        self.files = list(self.sentences)

    def __len__(self) -> int:
        return sum(len(sentences) for sentences in self.sentences.values())

    def draw(self, rng: np.random.Generator) -> Scene:
        file = self.files[rng.integers(len(self.files))]
        sentences = self.sentences[file]
        index = rng.integers(len(sentences))
        which = rng.integers(len(KINDS))
        return Scene(file, index, which, [sentences[index, which]])


def find_scenes(folder: Path | None, cameras: list[str], size: int | None) -> RandomScenes | None:
    """The scenes that pretrain_painter.py drew into <folder>/scenes, for a run with these views.

    size: height and width of the views, None where they are not square. No folder, no scenes.
    Raises UserError where there are none, and for a run with other cameras or sizes.
    """
    if folder is None:
        return None
    files = sorted((folder / "scenes").glob("[!.]*.hdf5"))
    if not files:
        raise UserError(
            f"{folder} has no scenes to rehearse: draw some "
            f"(python pretrain_painter.py --steps 0 --scenes 1500 --out {folder})."
        )
    strange = [camera for camera in cameras if camera not in CAMERAS]
    if strange or size is None:
        raise UserError(
            f"--rehearse {folder}: random scenes have square views of {', '.join(CAMERAS)}, this "
            "run has others: train without --rehearse."
        )
    with read_hdf5(files[0], FORMAT) as root:
        theirs = root["images"].shape[2]
    if theirs != size:
        raise UserError(
            f"--rehearse {folder}: its views have {theirs} pixels, this run's {size}: draw others "
            f"(python pretrain_painter.py --steps 0 --image-size {size} --out FOLDER)."
        )
    check_shards(files, len(CAMERAS), size)
    return RandomScenes(files)
