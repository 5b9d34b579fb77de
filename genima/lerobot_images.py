"""The pictures of a LeRobot dataset, in videos or in its tables, read when they are asked for."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

from genima.files import UserError
from genima.recordings import decode_picture


class VideoFrames:
    """An episode's pictures in a video: [t] -> (H, W, 3) uint8 RGB, fastest in rising order."""

    def __init__(self, path: Path, start: float, fps: float, length: int):
        self.path = path
        self.start = start  # seconds into the video
        self.fps = fps
        self.length = length
        self.number = -1
        self.picture = None
        self.frames = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, t: int) -> np.ndarray:
        try:
            if self.frames is None or t < self.number:
                self.frames = self.decode()
                self.number = -1
            while self.number < t:
                self.number, frame = next(self.frames)
                if self.number >= t:
                    self.picture = frame.to_ndarray(format="rgb24")
        except Exception as error:  # FFmpeg fails in many ways, and so do tables with wrong numbers
            raise UserError(
                f"{self.path} ends or breaks before frame {t} of the episode: copy it again."
            ) from error
        return self.picture

    def decode(self):
        """Yield (number in the episode, frame), beginning at or shortly before its first one."""
        with av.open(str(self.path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            container.seek(int(self.start / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                yield round((frame.time - self.start) * self.fps), frame


class ImageRows:
    """Pictures that stand as files in a table's rows: [t] -> (H, W, 3) uint8 RGB."""

    def __init__(self, rows: list[dict], where: str):
        self.rows = rows
        self.where = where

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, t: int) -> np.ndarray:
        picture = decode_picture(self.rows[t]["bytes"], swap=True)
        if picture is None:
            raise UserError(f"{self.where}: frame {t} is no picture: copy the dataset again.")
        return picture
