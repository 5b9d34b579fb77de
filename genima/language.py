"""Does language matter? Each object of one scene is named once: where does the gripper get painted?

A painter that paints the likeliest target whatever the sentence says is right for one object only.
"""

from collections.abc import Callable

import numpy as np

from genima.files import UserError
from genima.policy import OraclePainter, camera_images


def find_gripper_sphere(painted: dict, images: dict) -> np.ndarray:
    """The middle of the painted gripper sphere: the mean (x, y) of its pixels in each camera.

    {camera: (H, W, 3)} twice -> (cameras without the wrist's, 2) pixels, NaN where none is painted.
    """
    positions = []
    for camera in painted:
        if camera == "wrist":  # the sphere is always near its middle
            continue
        positions.append(gripper_centre(painted[camera], images[camera]))
    return np.array(positions)


def gripper_centre(painted: np.ndarray, image: np.ndarray) -> np.ndarray:
    """The mean (x, y) of the new cyan or yellow pixels in a view (H, W, 3); NaN without any."""
    after = painted.astype(float)
    before = image.astype(float)
    red, green, blue = np.moveaxis(after, -1, 0)  # (H, W) each
    cyan = np.minimum(green, blue) - red
    yellow = np.minimum(red, green) - blue
    changed = np.linalg.norm(after - before, axis=-1) > 60
    y, x = np.nonzero((np.maximum(cyan, yellow) > 80) & changed)
    if len(x) == 0:
        return np.full(2, np.nan)
    return np.array([x.mean(), y.mean()])


def check_language(env, painter, demonstrate: Callable, horizon: int, seed: int) -> list[bool]:
    """For each object of a scene: is the gripper painted towards it when the instruction names it?

    It is if the painted sphere is nearer to the true one for this object than to those for the
    others. demonstrate(env) -> Episode gives the truth; the answer is [] if it raises UserError.
    """
    instructions = []
    truth = []
    for variation in range(env.task.candidates):
        _, info = env.reset(seed=seed, options={"variation": variation})
        images = camera_images(env)
        try:
            oracle = OraclePainter(demonstrate(env), horizon)
        except UserError:
            return []
        instructions.append(info["instruction"])
        truth.append(find_gripper_sphere(oracle.paint(env, images, 0), images))  # (cameras, 2)

    batch = {camera: np.repeat(image[None], len(truth), 0) for camera, image in images.items()}
    painted = painter.paint(batch, instructions)
    correct = []
    for variation in range(len(truth)):
        views = {camera: pictures[variation] for camera, pictures in painted.items()}
        found = find_gripper_sphere(views, images)
        distances = np.linalg.norm(np.array(truth) - found, axis=-1)  # (variations, cameras)
        distances = np.nan_to_num(distances, nan=env.width).mean(axis=1)  # (variations,) pixels
        is_nearest = distances.argmin() == variation
        correct.append(bool(np.isfinite(found).any() and is_nearest))
    return correct
