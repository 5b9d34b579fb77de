"""How the notebooks show pictures and films. What is in them comes from the scripts.

A picture is (H, W, 3) uint8, or a tensor (3, H, W) with values 0..1, as the painter has them.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Video

from genima.plots import add_caption, two_columns, write_film, write_video

BORDER = 1  # white pixels between the views of one picture


def tiled(views: dict[str, np.ndarray]) -> np.ndarray:
    """The views of one moment {camera: (H, W, 3)} as one picture, in the painter's order."""
    around = ((BORDER, BORDER), (BORDER, BORDER), (0, 0))
    framed = [np.pad(view, around, constant_values=255) for view in views.values()]
    return two_columns(framed)


def pick(batch: dict[str, np.ndarray], i: int) -> dict[str, np.ndarray]:
    """The views of sample i of a batch {camera: (B, H, W, 3)}."""
    return {camera: views[i] for camera, views in batch.items()}


def repeat(views: dict[str, np.ndarray], times: int) -> dict[str, np.ndarray]:
    """The views of one moment, several times: {camera: (times, H, W, 3)}."""
    return {camera: np.repeat(view[None], times, axis=0) for camera, view in views.items()}


def stack(moments: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Several moments {camera: (H, W, 3)} as one batch {camera: (B, H, W, 3)}."""
    return {camera: np.stack([views[camera] for views in moments]) for camera in moments[0]}


def as_picture(picture) -> np.ndarray:
    """A picture as matplotlib takes it."""
    if isinstance(picture, torch.Tensor):
        picture = picture.permute(1, 2, 0).clip(0, 1).numpy()
    return picture


def show_picture(axes, picture, title: str = ""):
    """Draw one picture, without ticks and frame."""
    axes.imshow(as_picture(picture))
    axes.set_title(title)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def show_grid(rows: list[list], titles=(), names=(), title: str = "", width: float = 11):
    """Rows of pictures: titles above the first row, names left of the rows, a title above all.

    width: of the figure, inches. A place whose picture is None stays empty.
    """
    columns = max(len(row) for row in rows)
    height, length = as_picture(rows[0][0]).shape[:2]
    cell = width / columns
    room = 0.35 * bool(titles) + 0.35 * bool(title)  # inches
    figure, grid = plt.subplots(
        len(rows),
        columns,
        figsize=(width, room + len(rows) * (cell * height / length + 0.08)),
        squeeze=False,
        layout="compressed",  # no gaps where the pictures are smaller than their places
    )
    for axes in grid.flat:
        axes.axis("off")
    for row, pictures in zip(grid, rows):
        for axes, picture in zip(row, pictures):
            if picture is not None:
                axes.axis("on")
                show_picture(axes, picture)
    for axes, text in zip(grid[0], titles):
        axes.set_title(text)
    for axes, text in zip(grid[:, 0], names):
        axes.set_ylabel(text)
    if title:
        figure.suptitle(title, fontsize=11)


def play(path: Path) -> Video:
    """A film, stored in the notebook."""
    return Video(
        data=Path(path).read_bytes(),
        embed=True,
        mimetype="video/mp4",
        html_attributes="controls loop autoplay muted",
    )


def play_episodes(films: list[tuple], painted_name: str = "painted target") -> Video:
    """Episodes one after the other; films: (outcome, frames) of each, as rollout gives them."""
    with TemporaryDirectory() as folder:
        write_film(Path(folder), "film", films, painted_name)
        return play(Path(folder, "film.mp4"))


def play_frames(frames: list[np.ndarray], title: str, painted_name: str, fps: float) -> Video:
    """Frames of film_frame (three panels) with one title."""
    captioned = [add_caption(frame, title, painted_name) for frame in frames]
    with TemporaryDirectory() as folder:
        path = Path(folder, "film.mp4")
        write_video(path, captioned, fps)
        return play(path)
