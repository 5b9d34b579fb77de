"""Previews for people: several views at once, enlarged and labelled.

Images are (N, H, W, 3) uint8.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from genima.plots import HEADING_HEIGHT, NAMES_HEIGHT, two_columns, write_fitting

GAP = 6  # between the pictures of a contact sheet, pixels
MARGIN = 90  # at its left, for the captions


def contact_sheet(columns: dict[str, np.ndarray], captions: list[str], height: int) -> np.ndarray:
    """Pictures {title: (N, H, W, 3)} in columns under their titles, N captions at the left.

    Each picture is at least `height` pixels high, with its own pixels still visible.
    """
    pictures = {title: enlarge(column, height) for title, column in columns.items()}
    height, width = next(iter(pictures.values())).shape[1:3]
    step = height + GAP
    size = (MARGIN + len(columns) * (width + GAP), NAMES_HEIGHT + 8 + len(captions) * step)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, (title, images) in enumerate(pictures.items()):
        x = MARGIN + column * (width + GAP)
        write_fitting(draw, title, (x, NAMES_HEIGHT // 2), 15, width, "black")
        for row, image in enumerate(images):
            sheet.paste(Image.fromarray(image), (x, NAMES_HEIGHT + 8 + row * step))
    for row, caption in enumerate(captions):
        middle = NAMES_HEIGHT + 8 + row * step + height // 2
        write_fitting(draw, caption, (8, middle), 15, MARGIN - 12, "black")
    return np.array(sheet)


def enlarge(images: np.ndarray, height: int) -> np.ndarray:
    """Images (N, h, w, 3), each pixel repeated until they are `height` pixels high or more."""
    times = -(-height // images.shape[1])
    return images.repeat(times, axis=1).repeat(times, axis=2)


def labelled_views(views: dict[str, np.ndarray], title: str, height: int) -> np.ndarray:
    """Views {camera: (N, h, w, 3)} two in a row, their names in them, a title above: (N, H, W, 3).

    Each view is at least `height` pixels high.
    """
    tiled = two_columns([enlarge(images, height) for images in views.values()])
    frames = []
    for images in tiled:
        sheet = Image.new("RGB", (images.shape[1], HEADING_HEIGHT + images.shape[0]), "white")
        sheet.paste(Image.fromarray(images), (0, HEADING_HEIGHT))
        draw = ImageDraw.Draw(sheet)
        write_fitting(draw, title, (12, HEADING_HEIGHT // 2), 20, images.shape[1] - 24, "black")
        for i, camera in enumerate(views):
            x = i % 2 * images.shape[1] // 2 + 8
            y = i // 2 * images.shape[0] // -(-len(views) // 2) + HEADING_HEIGHT + 14
            words = camera.replace("_", " ")
            draw.text(
                (x, y),
                words,
                "white",
                ImageFont.load_default(16),
                "lm",
                stroke_width=1,
                stroke_fill="black",
            )
        frames.append(np.array(sheet))
    return np.stack(frames)
