"""Demonstrations in memory: episodes with their targets, read by stage 3, and scenes held out."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from genima.act import words_of
from genima.arrays import check_array, read_dataset
from genima.episodes import Episode, check_alike, find_episodes, order_cameras, read_episode
from genima.files import UserError, read_hdf5
from genima.kinematics import Chain
from genima.robots import FRANKA
from genima.scenes import (
    Scene,
    check_successful,
    describe_split,
    held_out_scenes,
    name_of,
    scene_of,
)
from genima.spheres import FORMAT, PAPER, SphereStyle, read_style
from genima.views import cell_of, resize_images

BACKGROUNDS = 300  # demonstrations of which a frame is read where not all images are needed


@dataclass(kw_only=True)
class Demonstration(Episode):
    """An episode, and what render_spheres.py found out about it."""

    target: np.ndarray  # (T, D+1) joint positions K steps later (rad), gripper command (0 or 1)
    horizon: int  # K
    chain: Chain
    style: SphereStyle = PAPER

    def __post_init__(self):
        self.recorded_sizes = dict(self.image_sizes)  # {camera: (H, W)}, before fit_to_network

    @property
    def scene(self) -> Scene:
        return scene_of(self.path, self.task, self.seed, self.sim)

    def texts(self) -> list[str]:
        """The instruction, and other ways to say it."""
        return [self.instruction, *self.instructions]


def read_demonstrations(
    run: Path, images: bool, seed: int = 0, use_failed: bool = False, size: str = "tiny"
) -> list[Demonstration]:
    """Read <run>/episodes and the targets of <run>/spheres.

    Images that are large or differ in size are resized as the network of this size ("tiny" or
    "sd-turbo") takes them, and the intrinsics with them: see cell_of in genima/views.py.

    use_failed: also those that failed.
    images: read all images. Otherwise only some demonstrations have any: one random frame, {camera:
    (1, H, W, 3)}.
    Raises UserError where spheres are missing, or demonstrations differ in joints, cameras, image
    sizes or horizon.
    """
    paths = find_episodes(run / "episodes")
    chosen = np.linspace(0, len(paths) - 1, BACKGROUNDS).astype(int)
    chosen = set(chosen.tolist())
    rng = np.random.default_rng(seed)
    demonstrations = []
    for i, path in enumerate(tqdm(paths, desc="reading", unit="episode", leave=False)):
        demonstration = read_demonstration(path, run, images or i in chosen)
        if not demonstration.success and not use_failed:
            continue
        fit_to_network(demonstration, size)
        if demonstration.images and not images:
            keep_one_frame(demonstration, rng)
        demonstrations.append(demonstration)
        check_alike(demonstration, demonstrations[0])
        if demonstration.horizon != demonstrations[0].horizon:
            raise UserError(
                f"The spheres of {path} have horizon {demonstration.horizon}, those before it "
                f"{demonstrations[0].horizon}: draw all with one horizon, in another --run."
            )
    check_successful(len(demonstrations), len(paths), run / "episodes")
    return demonstrations


def read_demonstration(path: Path, run: Path, images: bool) -> Demonstration:
    episode = read_episode(path, images=images)
    spheres = run / "spheres" / path.parent.name / path.name
    if not spheres.exists():
        raise UserError(f"{spheres} is missing: run render_spheres.py --run {run} first.")
    with read_hdf5(spheres, FORMAT) as root:
        target = read_dataset(root, "target/qpos")
        style = read_style(root)
        horizon = int(root.attrs["horizon"])
        for camera, measured in root.get("cameras", {}).items():  # render_spheres.py --calibration
            episode.intrinsics[camera] = measured["intrinsics"][()]
            episode.extrinsics[camera] = measured["extrinsics"][()]
    if target.shape != episode.qpos.shape:
        raise UserError(
            f"{spheres} was drawn for another episode: move it away and run render_spheres.py "
            f"--run {run} again."
        )
    check_array(target, episode.qpos.shape, np.float32, f"{spheres}: target/qpos")
    chain = Chain.from_episode(episode)
    return Demonstration(
        **vars(episode),
        target=target,
        horizon=horizon,
        chain=chain,
        style=style,
    )


def fit_to_network(demonstration: Demonstration, size: str):
    """Resize the images to the cells of a network, where they do not stay as recorded, in place."""
    cell = cell_of(demonstration.image_sizes, size)
    if cell is None:
        return
    for camera, (height, width) in demonstration.recorded_sizes.items():
        scale = np.diag([cell / width, cell / height, 1])
        demonstration.intrinsics[camera] = scale @ demonstration.intrinsics[camera]
        demonstration.image_sizes[camera] = (cell, cell)
        if demonstration.images:
            images = demonstration.images[camera]
            demonstration.images[camera] = resize_images(images, cell, cell)


def keep_one_frame(demonstration: Demonstration, rng: np.random.Generator):
    """Keep the images of one random frame."""
    t = rng.integers(len(demonstration.qpos))
    for camera, images in demonstration.images.items():
        demonstration.images[camera] = images[t : t + 1].copy()


def split_scenes(demonstrations: list[Demonstration]) -> tuple[list, list]:
    """Demonstrations to train on, and those of scenes held out (genima/scenes.py) to validate on.

    Of a single scene nothing can be held out: then both are all of them.
    """
    held_out = held_out_scenes(one.scene for one in demonstrations)
    training = [one for one in demonstrations if one.scene not in held_out]
    validation = [one for one in demonstrations if one.scene in held_out]
    if not validation:
        validation = training
    return training, validation


def describe_held_out(demonstrations: list[Demonstration], run: Path) -> str:
    """One sentence about scenes held out of these demonstrations, and about failed ones."""
    scenes = {one.scene for one in demonstrations}
    held_out = held_out_scenes(scenes)
    left_out = len(find_episodes(run / "episodes")) - len(demonstrations)
    used = sum(not one.success for one in demonstrations)
    return describe_split(len(scenes), len(held_out), left_out, used)


def names_held_out(demonstrations: list[Demonstration]) -> list[str]:
    """The sorted names <task>/<file> of the demonstrations that are held out."""
    held_out = held_out_scenes(one.scene for one in demonstrations)
    return sorted(name_of(one.path) for one in demonstrations if one.scene in held_out)


def describe(demonstrations: list[Demonstration], with_words: bool) -> dict:
    """What a network must fit: horizon K, number of joints D, cameras, image_size [H, W],
    tasks, fps, and which demonstrations are held_out.

    Where images were resized to image_size, image_sizes has the cameras' own [H, W]. Where it is no
    Franka, robot has its name.
    with_words: and all words of the instructions, sorted; otherwise the vocabulary is empty.
    """
    example = demonstrations[0]
    cameras = order_cameras(example.image_sizes)
    vocabulary = set()
    if with_words:
        for demonstration in demonstrations:
            for text in demonstration.texts():
                vocabulary.update(words_of(text))
    config = {
        "horizon": example.horizon,
        "joints": example.qpos.shape[1] - 1,
        "cameras": cameras,
        "image_size": list(example.image_sizes[cameras[0]]),
        "vocabulary": sorted(vocabulary),
        "tasks": sorted({one.task for one in demonstrations}),
        "fps": example.fps,
        "held_out": names_held_out(demonstrations),
    }
    if example.robot not in FRANKA:
        config["robot"] = example.robot
    if example.recorded_sizes != example.image_sizes:
        config["image_sizes"] = {name: list(example.recorded_sizes[name]) for name in cameras}
    if example.style != PAPER:
        config["style"] = {"joints": example.style.joints, "factors": example.style.factors}
    return config
