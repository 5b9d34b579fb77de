"""The report of evaluate.py --recorded: recorded.json, a table, and a picture to look at.

Measurements ("rows") are those of genima/recorded.py, one for each frame shown to the policy.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from genima.files import write_whole
from genima.report import describe_machine, git_commit, policy_name
from genima.views import grid_of

VIEW = 200  # height of the largest view in recorded.png, pixels
CAPTION = 24  # height of a line of text there
COLUMNS = ("observation", "true spheres", "painted")


# ----------------------------------------------------------------------------------------- numbers
def summarise(rows: list[dict]) -> dict:
    """Means over all frames; of the spheres, over all their views."""
    summary = {"frames": len(rows)}
    for name in ("chunk_deg", "last_deg", "still_deg", "gripper_right"):
        summary[name] = round(float(np.mean([row[name] for row in rows])), 3)
    views = [view for row in rows for view in row["views"].values()]
    if views:
        summary |= summarise_views(views)
    return summary


def summarise_views(views: list[dict]) -> dict:
    """Overlap (None where there is no sphere), and the gripper's error where both are visible."""
    either = sum(view["either"] for view in views)
    common = sum(view["common"] for view in views)
    errors = [view["gripper_px"] for view in views if view["gripper_px"] is not None]
    visible = sum(view["gripper_visible"] for view in views)
    return {
        "overlap": round(common / either, 3) if either else None,
        "gripper_px": round(float(np.median(errors)), 2) if errors else None,
        "gripper_px_90": round(float(np.quantile(errors, 0.9)), 2) if errors else None,
        "gripper_visible": visible,
        "gripper_missed": visible - len(errors),
    }


def by_camera(rows: list[dict]) -> dict:
    cameras = {}
    for row in rows:
        for camera, view in row["views"].items():
            cameras.setdefault(camera, []).append(view)
    return {camera: summarise_views(views) for camera, views in cameras.items()}


def by_episode(rows: list[dict]) -> dict:
    episodes = {}
    for row in rows:
        episodes.setdefault(row["episode"], []).append(row)
    return {name: summarise(of_episode) for name, of_episode in episodes.items()}


def make_report(
    settings, rows: dict, unchanged: dict, episodes: int, held_out: int, sentence: str
) -> dict:
    """The content of recorded.json. rows: {kind: measurements}; unchanged: see measure_all."""
    results = {}
    for kind, measured in rows.items():
        if measured:
            results[kind] = {
                "total": summarise(measured),
                "cameras": by_camera(measured),
                "episodes": by_episode(measured),
            }
    return {
        "policy": policy_name(settings.policy),
        "run": str(settings.run),
        "episodes": episodes,
        "held_out": held_out,
        "split": sentence,
        "every": settings.execution_horizon,
        "git_commit": git_commit(),
        "machine": describe_machine(settings.device),
        "background_kept": unchanged,
        "results": results,
    }


# ------------------------------------------------------------------------------------------- table
def print_report(report: dict):
    """In sum for every kind of picture, then by camera and by episode for those as recorded."""
    print(
        f"\nPolicy {report['policy']}: {report['episodes']} demonstrations, "
        f"one frame in {report['every']}."
    )
    print(
        f"{'':<34}{'overlap':>8}{'gripper':>10}{'missed':>10}"
        f"{'chunk':>9}{'its end':>9}{'standing':>10}{'gripper':>9}"
    )
    for kind, result in report["results"].items():
        print_row(kind, result["total"])
    if "background" not in report["results"]:
        print(f"{'background':<34} not measured")
    first = next(iter(report["results"].values()))
    for camera, summary in first["cameras"].items():
        print_row(f"  camera {camera}", summary)
    for episode, summary in first["episodes"].items():
        print_row(f"  {episode}", summary)
    print(
        "overlap of painted and true spheres; gripper sphere off, median, and not painted;\n"
        "chunk and its last step off, and off if the arm stood still (mean of the joints);\n"
        "gripper told right."
    )
    for camera, count in report["background_kept"].items():
        print(
            f"{camera}: another background could not be put into {count} of {report['episodes']} "
            "demonstrations, because nearly everything in the picture moves."
        )


def print_row(name: str, summary: dict):
    """A line of the table; what was not measured is a dash."""
    cells = {
        "overlap": (8, "{:.0%}"),
        "gripper_px": (10, "{:.1f} px"),
        "missed": (10, "{}"),
        "chunk_deg": (9, "{:.2f}°"),
        "last_deg": (9, "{:.2f}°"),
        "still_deg": (10, "{:.2f}°"),
        "gripper_right": (9, "{:.0%}"),
    }
    values = dict(summary)
    if "gripper_visible" in summary:
        values["missed"] = f"{summary['gripper_missed']} of {summary['gripper_visible']}"
    line = f"{name[-34:]:<34}"
    for column, (width, template) in cells.items():
        value = values.get(column)
        text = "-" if value is None else template.format(value)
        line += f"{text:>{width}}"
    print(line)


# ----------------------------------------------------------------------------------------- picture
def write_report(settings, report: dict, shown: list[tuple], paints: bool):
    """Write recorded.png, and last recorded.json. paints: whether the policy paints spheres."""
    name = "recorded"
    if settings.policy != "genima":
        name += f"_{policy_name(settings.policy)}"
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        write_pictures(settings.out / f"{name}.png", shown, len(COLUMNS) if paints else 2)
        with write_whole(settings.out / f"{name}.json") as path:
            path.write_text(json.dumps(report, indent=1))
    except OSError as error:
        error.filename = error.filename or str(settings.out)
        raise
    print(f"{settings.out / name}.json has all numbers, {settings.out / name}.png the pictures.")


def write_pictures(path: Path, shown: list[tuple], columns: int):
    """Rows of observation, truth and painting. shown: [(caption, views, views, views)]."""
    sheets = []
    for caption, *pictures in shown:
        panels = [views_panel(views) for views in pictures[:columns]]
        height, width = panels[0].shape[:2]
        sheet = Image.new("RGB", (columns * (width + 4), height + 2 * CAPTION), "white")
        draw = ImageDraw.Draw(sheet)
        font = ImageFont.load_default(14)
        draw.text((4, 4), caption, "black", font)
        for i, panel in enumerate(panels):
            left = i * (width + 4)
            draw.text((left + 4, CAPTION + 4), COLUMNS[i], "black", font)
            sheet.paste(Image.fromarray(panel), (left, 2 * CAPTION))
        sheets.append(np.asarray(sheet))
    with write_whole(path) as temporary:
        Image.fromarray(np.concatenate(sheets)).save(temporary)


def views_panel(views: dict[str, np.ndarray]) -> np.ndarray:
    """Views {camera: (H, W, 3)} of any sizes as one picture, in the painter's grid, undistorted."""
    rows, columns = grid_of(len(views))
    widest = max(view.shape[1] / view.shape[0] for view in views.values())
    width = round(VIEW * max(widest, 1))
    panel = Image.new("RGB", (columns * width, rows * VIEW))
    for i, view in enumerate(views.values()):
        h, w = view.shape[:2]
        small = h < VIEW
        resampling = Image.Resampling.NEAREST if small else Image.Resampling.BILINEAR
        scaled = Image.fromarray(view).resize((round(w * VIEW / h), VIEW), resampling)
        panel.paste(scaled, (i % columns * width, i // columns * VIEW))
    return np.asarray(panel)
