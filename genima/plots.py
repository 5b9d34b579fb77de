"""Films and figures: what an evaluation, a robot's run, a preview and a training have to show.

Every file is written whole or not at all. Images are (..., H, W, 3) uint8 unless stated otherwise.
"""

import csv
from collections.abc import Iterable
from pathlib import Path
from textwrap import wrap

import imageio.v2 as imageio
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from genima.files import write_whole
from genima.spheres import alpha_composite

PANEL = 256  # height and width of each of a film's three panels, pixels
TITLE_HEIGHT = 28  # of the strip above the panels, which holds the instruction
NAMES_HEIGHT = 20  # of the strip below them, which holds their names
HEADING_HEIGHT = 44  # of the strip above a frame for people
GREEN = (20, 130, 60)
RED = (190, 40, 40)
GREY = (90, 90, 90)
SMOOTHING = 50  # training losses are shown as the mean of this many steps

# What a column of losses.csv is called in losses.png
LABELS = {
    "loss": "training loss",
    "first_frame_iou": "overlap with true spheres (first frames)",
    "iou_A": "A: the robot as it is",
    "iou_B": "B: the thing that is named",
    "iou_C": "C: the hand where it is told",
    "held_out": "training loss, in these scenes",
    "gripper_median": "gripper's place, median (m)",
    "gripper_mean": "gripper's place, mean (m)",
    "gripper_right": "gripper commands that are right (share)",
    "joints": "joint positions (L1, normalised)",
    "gripper": "gripper (cross-entropy)",
    "kl": "KL divergence of the CVAE",
    "error": "whole chunk",
    "error_last": "last step of the chunk",
    "error_without_state": "whole chunk, joint state hidden",
}


# ------------------------------------------------------------------------------------------- films
def same_size(images: list[np.ndarray]) -> list[np.ndarray]:
    """Images (H, W, 3) uint8: all as large as the largest, where they differ."""
    sizes = [image.shape[-3:-1] for image in images]
    if len(set(sizes)) == 1:
        return images
    height, width = np.max(sizes, axis=0)
    enlarged = []
    for image in images:
        resized = Image.fromarray(image).resize((width, height), Image.NEAREST)
        enlarged.append(np.asarray(resized))
    return enlarged


def two_columns(images: list[np.ndarray]) -> np.ndarray:
    """Several images as one, two in a row; the last place stays black if their number is odd."""
    images = same_size(list(images))
    if len(images) > 1 and len(images) % 2:
        images.append(np.zeros_like(images[0]))
    rows = []
    for i in range(0, len(images), 2):
        rows.append(np.concatenate(images[i : i + 2], axis=-2))
    return np.concatenate(rows, axis=-3)


def painted_panel(images: dict[str, np.ndarray]) -> np.ndarray:
    """All views {camera: (H, W, 3)} as one panel (PANEL, PANEL, 3) that keeps their pixels visible.

    They lie as in the painter's tiled image.
    """
    tiled = Image.fromarray(two_columns(list(images.values())))
    return np.array(tiled.resize((PANEL, PANEL), Image.NEAREST))


def write_video(path: Path, frames: Iterable[np.ndarray], fps: float):
    """An H.264 film of frames (H, W, 3), which may be made one by one."""
    with write_whole(path) as temporary:
        settings = {"fps": fps, "codec": "libx264", "macro_block_size": 2}
        with imageio.get_writer(temporary, **settings) as writer:
            for frame in frames:
                writer.append_data(frame)


def add_caption(frame: np.ndarray, title: str, painted_name: str) -> np.ndarray:
    """A frame of three panels (PANEL, 3 PANEL, 3), a title above it, their names below."""
    height, width, _ = frame.shape
    sheet = Image.new("RGB", (width, TITLE_HEIGHT + height + NAMES_HEIGHT), "white")
    sheet.paste(Image.fromarray(frame), (0, TITLE_HEIGHT))
    draw = ImageDraw.Draw(sheet)

    def write_centred(text, x, y, size):
        draw.text((x, y), text, "black", ImageFont.load_default(size), anchor="mm")

    write_centred(title, width // 2, TITLE_HEIGHT // 2, 16)
    for i, name in enumerate(["observation", painted_name, "motion"]):
        middle = (2 * i + 1) * PANEL // 2
        write_centred(name, middle, TITLE_HEIGHT + height + NAMES_HEIGHT // 2, 13)
    return np.array(sheet)


def write_film(
    out: Path, name: str, films: list[tuple], painted_name: str = "painted target", fps: float = 10
):
    """Episodes one after the other as <name>.mp4, and the first success as <name>.png.

    films: (outcome, frames) of each episode; an outcome says "instruction" and "success", a frame
    is observation, painted target and motion side by side. The still image shows what the first
    frame observed and painted, and where the robot was in the last.
    """
    outcome, frames = films[0]
    for film in reversed(films):
        if film[0]["success"]:
            outcome, frames = film
    still = np.concatenate([frames[0][:, : 2 * PANEL], frames[-1][:, 2 * PANEL :]], axis=1)
    with write_whole(out / f"{name}.png") as path:
        captioned = add_caption(still, outcome["instruction"], painted_name)
        Image.fromarray(captioned).save(path)

    shown = []
    for outcome, frames in films:
        for frame in frames:
            shown.append(add_caption(frame, outcome["instruction"], painted_name))
        verdict = "done" if outcome["success"] else "not done"
        last = add_caption(frames[-1], f"{outcome['instruction']}: {verdict}", painted_name)
        shown += [last] * round(fps)  # a second to read it
    write_video(out / f"{name}.mp4", shown, fps)


def people_frame(
    scene: np.ndarray,
    painted: dict[str, np.ndarray],
    sentence: str,
    painted_name: str,
    success: bool | None = None,
    verdict: str | None = None,
) -> np.ndarray:
    """A frame for people: the scene (H, W, 3), the painted views in a square beside it, titles.

    painted: {camera: (h, w, 3)}, whose pixels stay visible. sentence: what the robot is told at
    this moment. success: how the episode ended; None while it runs. verdict: the words for it.
    """
    height, width, _ = scene.shape
    views = Image.fromarray(two_columns(list(painted.values())))
    views = views.resize((height, height), Image.NEAREST)
    sheet = Image.new("RGB", (width + height, HEADING_HEIGHT + height), "white")
    sheet.paste(Image.fromarray(scene), (0, HEADING_HEIGHT))
    sheet.paste(views, (width, HEADING_HEIGHT))
    draw = ImageDraw.Draw(sheet)
    middle = HEADING_HEIGHT // 2
    write_fitting(draw, f"\u201c{sentence}\u201d", (12, middle), 22, width - 24, "black")
    write_fitting(draw, painted_name, (width + 12, middle), 18, height - 24, GREY)
    if success is not None:
        if verdict is None:
            verdict = "done" if success else "not done"
        write_verdict(draw, verdict, GREEN if success else RED, width)
    return np.array(sheet)


def write_verdict(draw, verdict: str, colour: tuple, width: int):
    """How an episode ended, in a box at the top left of a scene of this width; long ones wrap."""
    size = 24 if len(verdict) < 20 else 16
    font = ImageFont.load_default(size)
    words = "\n".join(wrap(verdict, width * 2 // size - 4))
    corner = (16, HEADING_HEIGHT + 16)
    left, top, right, bottom = draw.multiline_textbbox(corner, words, font)
    draw.rounded_rectangle((left - 10, top - 8, right + 10, bottom + 8), 6, fill=colour)
    draw.multiline_text(corner, words, "white", font)


def write_fitting(draw, text: str, place: tuple, size: int, width: int, colour):
    """Write a line from `place` (left, middle), in a smaller size if it is wider than `width`."""
    font = ImageFont.load_default(size)
    while size > 9 and draw.textlength(text, font) > width:
        size -= 1
        font = ImageFont.load_default(size)
    draw.text(place, text, colour, font, anchor="lm")


# ----------------------------------------------------------------------------------------- figures
def save_figure(figure: Figure, path: Path, dpi: int):
    with write_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)


def write_grid(path: Path, columns: dict, captions: list[str]):
    """Columns of pictures {title: (N, 3, H, W) tensor, 0..1}; captions: a sentence for each row.

    The captions stand above the pictures of the first column, whose title is left out.
    """
    rows = len(captions)
    figure = Figure((9, 3.3 * rows), layout="tight")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (title, pictures) in enumerate(columns.items()):
        for row in range(rows):
            cell = axes[row, column]
            picture = pictures[row].permute(1, 2, 0).numpy()  # (H, W, 3)
            cell.imshow(picture, interpolation="nearest")
            cell.axis("off")
            caption = title if column else "\n".join(wrap(captions[row], 36))
            cell.set_title(caption, fontsize=9)
    save_figure(figure, path, dpi=70)


def write_contact_sheet(path: Path, images: np.ndarray, layers: np.ndarray, sentences: np.ndarray):
    """N scenes, one a row, with what each of their S sentences asks for painted on them.

    images (N, V, H, W, 3), layers (N, S, V, H, W, 4), both uint8; sentences (N, S).
    """
    rows, columns = sentences.shape
    figure = Figure((2.2 * columns, 2.5 * rows), layout="tight")
    axes = figure.subplots(rows, columns)
    for row in range(rows):
        for column in range(columns):
            painted = alpha_composite(layers[row, column], images[row])  # (V, H, W, 3)
            axes[row, column].imshow(two_columns(list(painted)), interpolation="nearest")
            axes[row, column].set_title(sentences[row, column], fontsize=7)
            axes[row, column].axis("off")
    save_figure(figure, path, 110)


def write_bars(path: Path, report: dict):
    """Success per task with its 95 % interval, from the content of evaluation.json."""
    tasks = report["tasks"]
    rates = np.array([100 * task["rate"] for task in tasks.values()])
    ends = np.array([task["wilson_95"] for task in tasks.values()]) * 100  # (tasks, 2)
    whiskers = np.maximum([rates - ends[:, 0], ends[:, 1] - rates], 0)  # (2, tasks)
    names = [name.replace("_", "\n") for name in tasks]

    figure = Figure(figsize=(2 + 1.4 * len(tasks), 4), layout="constrained")
    axes = figure.subplots()
    axes.bar(names, rates, 0.6, color="#4c78a8", yerr=whiskers, capsize=6)
    for i, task in enumerate(tasks.values()):
        words = f"{task['successes']} of {task['episodes']}"
        axes.text(i, 3, words, ha="center", color="white" if rates[i] > 10 else "black")
    axes.set_ylim(0, 102)
    axes.set_ylabel("success in unseen scenes, %")
    axes.set_title(f"policy: {report['policy']} (whiskers: 95 % interval)")
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path, dpi=150)


def write_losses(
    folder: Path,
    columns: list[str],
    rows: list[list],
    training: list[str],
    held_out: list[str],
    measured: str,
):
    """Write losses.csv, a row a step, and losses.png: training at the left, held-out at the right.

    columns: names, the first one is the step. rows: their values; "" or nothing where a column was
    not measured. training, held_out: which columns to show where. measured: what held_out are, for
    the axis.
    """
    with write_whole(folder / "losses.csv") as path:
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])

    figure = Figure((11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    width = min(SMOOTHING, len(rows))
    steps = [row[0] for row in rows[width - 1 :]]
    for name in training:
        i = columns.index(name)
        values = [row[i] for row in rows]
        means = np.convolve(values, np.ones(width) / width, "valid")
        left.semilogy(steps, means, label=label_of(name))
    for name in held_out:
        i = columns.index(name)
        points = [(row[0], row[i]) for row in rows if len(row) > i and row[i] != ""]
        right.plot(*np.array(points).reshape(-1, 2).T, ".-", label=label_of(name))
    left.set(title=f"training (mean of {SMOOTHING} steps)", xlabel="step", ylabel="loss")
    right.set(title="held-out scenes", xlabel="step", ylabel=measured, ylim=(0, None))
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    save_figure(figure, folder / "losses.png", dpi=100)


def label_of(column: str) -> str:
    """A column's name in words."""
    return LABELS.get(column, column.replace("_", " "))
