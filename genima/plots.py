"""Films and figures: what a closed loop, a robot's run and a preview have to show. Pictures are (..., H, W, 3) uint8."""

import csv

import imageio.v2 as imageio
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from genima.files import write_whole

PANEL = 256  # height and width of a film's three panels, pixels


def two_columns(pictures):
    """A list of pictures as one, two in a row; an odd one's neighbour is black."""
    pictures = pictures + [np.zeros_like(pictures[0])] * (
        len(pictures) % 2 if len(pictures) > 1 else 0
    )
    return np.concatenate(
        [np.concatenate(pictures[i : i + 2], axis=-2) for i in range(0, len(pictures), 2)], axis=-3
    )


def tile(images):
    """Pictures {camera: (H, W, 3)} as the painter sees them, enlarged to a panel with the pixels left visible."""
    return np.array(
        Image.fromarray(two_columns(list(images.values()))).resize((PANEL, PANEL), Image.NEAREST)
    )


def write_video(path, frames, fps):
    with write_whole(path) as temporary:
        imageio.mimwrite(temporary, frames, fps=fps, codec="libx264", macro_block_size=2)


def caption(frame, text, what):
    """A frame (H, 3 W, 3) with the instruction above it and the panels' names below."""
    height, width, _ = frame.shape
    sheet = Image.new("RGB", (width, height + 48), "white")
    sheet.paste(Image.fromarray(frame), (0, 28))
    draw, names = ImageDraw.Draw(sheet), ("observation", what, "motion")
    for name, x, y, size in [(text, width // 2, 14, 16)] + [
        (names[i], (2 * i + 1) * PANEL // 2, height + 38, 13) for i in range(3)
    ]:
        draw.text((x, y), name, "black", ImageFont.load_default(size), anchor="mm")
    return np.array(sheet)


def write_film(out, name, films, what, fps=10):
    """<name>.mp4 of (outcome, frames) pairs one after the other, and <name>.png: how the first successful one began and ended."""
    outcome, frames = next((film for film in films if film[0]["success"]), films[0])
    still = np.concatenate([frames[0][:, : 2 * PANEL], frames[-1][:, 2 * PANEL :]], axis=1)
    with write_whole(out / f"{name}.png") as path:
        Image.fromarray(caption(still, outcome["instruction"], what)).save(path)
    shown = []
    for outcome, frames in films:
        shown += [caption(frame, outcome["instruction"], what) for frame in frames]
        verdict = f"{outcome['instruction']}: {'done' if outcome['success'] else 'not done'}"
        shown += [caption(frames[-1], verdict, what)] * fps  # a second to read it
    write_video(out / f"{name}.mp4", shown, fps)


def write_grid(path, columns, captions):
    """Pictures (N, 3, H, W), 0..1, under each column's title, side by side; the first column has a caption for each row instead."""
    rows = len(captions)
    axes = (figure := Figure((9, 3.3 * rows), layout="tight")).subplots(
        rows, len(columns), squeeze=False
    )
    for column, (title, pictures) in enumerate(columns.items()):
        for row in range(rows):
            axes[row, column].imshow(
                pictures[row].permute(1, 2, 0).numpy(), interpolation="nearest"
            )
            axes[row, column].axis("off")
            axes[row, column].set_title(title if column else captions[row], fontsize=9)
    with write_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=70)


def write_bars(path, report):
    """Success per task with its interval, as a picture."""
    tasks = report["tasks"]
    rates, ends = (
        np.array([100 * task["rate"] for task in tasks.values()]),
        np.array([task["wilson_95"] for task in tasks.values()]),
    )
    whiskers = np.maximum([rates - 100 * ends[:, 0], 100 * ends[:, 1] - rates], 0)  # (2, tasks)
    figure = Figure(figsize=(2 + 1.4 * len(tasks), 4), layout="constrained")
    axes = figure.subplots()
    axes.bar(
        [name.replace("_", "\n") for name in tasks],
        rates,
        0.6,
        color="#4c78a8",
        yerr=whiskers,
        capsize=6,
    )
    for i, task in enumerate(tasks.values()):
        axes.text(
            i,
            3,
            f"{task['successes']} of {task['episodes']}",
            ha="center",
            color="white" if rates[i] > 10 else "black",
        )
    axes.set(
        ylim=(0, 102),
        ylabel="success in unseen scenes, %",
        title=f"policy: {report['policy']} (whiskers: 95 % interval)",
    )
    axes.spines[["top", "right"]].set_visible(False)
    with write_whole(path) as temporary:
        figure.savefig(temporary, dpi=150)


def write_losses(folder, columns, rows, training, held_out, measured):
    """losses.csv, a row a step, the step first ("" or nothing where a column was not measured); and losses.png: the columns `training`,
    each the mean of 50 steps, beside the columns `held_out`; `measured` says what those are."""
    with write_whole(folder / "losses.csv") as path, open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    left, right = (figure := Figure((11, 4), layout="constrained")).subplots(1, 2)
    window = np.ones(min(50, len(rows))) / min(50, len(rows))
    for name in training:
        values = [row[columns.index(name)] for row in rows]
        left.semilogy(
            [row[0] for row in rows[len(window) - 1 :]],
            np.convolve(values, window, "valid"),
            label=name.replace("_", " "),
        )
    for name in held_out:
        i = columns.index(name)
        points = [(row[0], row[i]) for row in rows if len(row) > i and row[i] != ""]
        right.plot(*np.array(points).reshape(-1, 2).T, ".-", label=name.replace("_", " "))
    left.set(title="training (mean of 50 steps)", xlabel="step", ylabel="loss")
    right.set(title="held-out scenes", xlabel="step", ylabel=measured, ylim=(0, None))
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    with write_whole(folder / "losses.png") as path:
        figure.savefig(path, format="png", dpi=100)
