"""The report on demonstrations as a page with pictures, in one HTML file.

The pictures show the spheres over what was recorded: they have to sit on the arm. The first episode
of each task is shown, and those that have something out of bounds, up to a number.
"""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from genima.episodes import FORMAT, Episode, read_episode
from genima.files import read_hdf5, write_whole
from genima.quality import Facts
from genima.spheres import alpha_composite, draw_spheres, target_spheres

SHOWN = 30  # episodes with pictures
FRAMES = 3  # of each: the first, one in the middle, the last
WIDTH = 240  # pixels of a picture on the page
STYLE = (
    "body{font-family:sans-serif;margin:2em}td,th{padding:.2em .8em;text-align:right}"
    "td:first-child,td:last-child{text-align:left}.bad{color:#b02020}img{margin:2px}"
)


def write_page(path: Path, tasks: dict[str, list[Facts]], faults: list[str]):
    """Write the page. tasks: the facts of each task's episodes; faults: of files not usable."""
    everything = [one for facts in tasks.values() for one in facts]
    parts = [
        f"<!doctype html><meta charset=utf-8><style>{STYLE}</style><title>Demonstrations</title>"
    ]
    parts.append(f"<h1>{len(everything)} demonstrations</h1>")
    parts += [f"<p class=bad>{escape(fault)}</p>" for fault in faults]
    parts.append(table_of(everything))
    for one in choose(tasks):
        parts.append(f"<h2>{escape(one.path)}</h2>")
        parts += [f"<p class=bad>{escape(words)}</p>" for words in one.out_of_bounds]
        parts += pictures_of(read_episode(Path(one.path), images=False))
    with write_whole(path) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")


def table_of(everything: list[Facts]) -> str:
    """A row for each episode."""
    names = ("file", "frames", "success", "step, rad", "jerk, rad/s^3", "beyond limits")
    names += ("longest gap, s", "jitter, s", "gripper", "tool off by, cm", "out of bounds")
    rows = ["<tr>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"]
    for one in everything:
        tool = None if one.tool_error is None else 100 * one.tool_error
        cells = [
            escape(f"{one.task}/{Path(one.path).name}"),
            str(one.frames),
            "yes" if one.success else "no",
            f"{one.step:.3f}",
            f"{one.jerk:.0f}",
            number(one.beyond, "d"),
            number(one.gap, ".3f"),
            number(one.jitter, ".3f"),
            f"{one.gripper[0]:.2f} to {one.gripper[1]:.2f}",
            number(tool, ".1f"),
            escape("; ".join(one.out_of_bounds)),
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "<table>" + "\n".join(rows) + "</table>"


def number(value: float | None, form: str) -> str:
    """A number in a cell; a question mark for what the file does not say."""
    return "?" if value is None else format(value, form)


def choose(tasks: dict[str, list[Facts]]) -> list[Facts]:
    """The episodes to show: the first of each task, then those with something out of bounds."""
    shown = [facts[0] for facts in tasks.values()]
    for facts in tasks.values():
        shown += [one for one in facts[1:] if one.out_of_bounds]
    return shown[:SHOWN]


def pictures_of(episode: Episode) -> list[str]:
    """A row of pictures for each camera, with the spheres of the same frame."""
    frames = np.linspace(0, len(episode.qpos) - 1, FRAMES).round().astype(int)
    rows = []
    with read_hdf5(episode.path, FORMAT) as root:
        for camera in episode.image_sizes:
            stored = root[f"observations/images/{camera}"]
            shown = [
                picture_tag(with_spheres(episode, camera, t, stored[t])) for t in np.unique(frames)
            ]
            rows.append(f"<p>{escape(camera)}<br>{''.join(shown)}</p>")
    return rows


def with_spheres(episode: Episode, camera: str, t: int, picture: np.ndarray) -> np.ndarray:
    """A recorded picture (H, W, 3) with the spheres where the arm is in it."""
    is_open = episode.qpos[t, -1] > 0.5
    spheres = target_spheres(episode.joint_poses[t], is_open, camera)
    pose = episode.extrinsics[camera][t]
    layer = draw_spheres(*spheres, episode.intrinsics[camera], pose, *picture.shape[:2])
    return alpha_composite(layer, picture)


def picture_tag(picture: np.ndarray) -> str:
    """A picture (H, W, 3) as an <img> that holds it."""
    image = Image.fromarray(picture)
    image = image.resize((WIDTH, round(WIDTH * image.height / image.width)))
    data = io.BytesIO()
    image.save(data, "jpeg", quality=85)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}">'
