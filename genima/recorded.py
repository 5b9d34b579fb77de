"""How good is a policy on recorded demonstrations that it was not trained on? No simulator needed.

In:   <run>/episodes, <run>/spheres, and the policy's networks
Out:  <run>/evaluation/recorded.json, recorded.png     the numbers; observation, truth, painted
      (recorded_act.json for --policy act, recorded_<file>.json for --policy FILE:FUNCTION)

    python evaluate.py --recorded --run runs/mine
    python evaluate.py --recorded --run runs/mine --policy act
    python evaluate.py --recorded --run runs/mine --policy oracle      true spheres
    python evaluate.py --recorded --run runs/mine \\
        --policy variations/train_diffusion_policy.py:policy

In every held-out demonstration, the policy is shown the recorded views of every 8th frame
(--execution-horizon) and answers. Its answer is compared with the demonstration:

overlap     of painted and true spheres, intersection over union, as the painter sees the views
gripper     how far the painted gripper sphere is from the true one: pixels of the recorded view
chunk       how far its joint positions are from the recorded actions: degrees, mean over joints

The same is measured on perturbed pictures (genima/perturbed_pictures.py). Overlap and gripper are
those of a painter; of other policies only the chunk is measured. Nothing moves here: errors that
add up in closed loop do not show, and a good answer that differs from the demonstrator's counts as
an error. Which demonstrations are held out: genima/scenes.py. A network's config lists them.
"""

from collections import Counter
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from genima.act import Controller
from genima.checkpoints import check_policy, choose_device, load_networks, resolve_folders
from genima.demonstrations import Demonstration, read_demonstration
from genima.episodes import FORMAT, find_episodes
from genima.files import UserError, read_hdf5
from genima.kinematics import is_in_room
from genima.language import gripper_centre
from genima.perturbed_pictures import (
    LEAST_STATIC,
    PERTURBATIONS,
    perturb,
    sample_pictures,
    static_views,
)
from genima.policy import GenimaPolicy, follow
from genima.recorded_report import make_report, print_report, write_report
from genima.scenes import describe_split, held_out_scenes, name_of, scene_of
from genima.spheres import alpha_composite
from genima.views import grid_of, is_uniform, resize_images

AS_RECORDED = "as recorded"
EVERY = 8  # frames from one look of the policy to the next, as in closed loop
DIFFERENT = 51  # of 255: a sphere is where a picture differs so much from the observation
# Options of evaluate.py that mean nothing here, and their defaults.
REFUSED = {
    "sim": None,
    "protocol": None,
    "demos": None,
    "variation": None,
    "renderer": None,
    "max_steps": None,
    "checkpoints": None,
    "perturb": None,
    "trace": False,
    "episodes": 50,
    "seed": 0,
    "language": 50,
    "videos": 1,
}


# ----------------------------------------------------------------------------- which demonstrations
def choose_demonstrations(run: Path, tasks: tuple, policy) -> tuple[list[Path], int, str]:
    """Files to measure on, how many of them are held out, and a sentence about that.

    Held out is what the policy's networks say that they were not trained on; where they say
    nothing, what the rule of genima/scenes.py holds out. Of none held out, all are measured on.
    Failed demonstrations are left out.
    """
    paths = []
    scenes = {}  # by path
    found = find_episodes(run / "episodes", tasks or None)
    for path in find_episodes(run / "episodes"):
        with read_hdf5(path, FORMAT) as root:
            facts = dict(root.attrs)
        if not facts["success"]:
            continue
        scenes[path] = scene_of(path, str(facts["task"]), int(facts["seed"]), bool(facts["sim"]))
        if path in found:
            paths.append(path)
    if not paths:
        raise UserError(f"There is no successful demonstration in {run / 'episodes'}.")

    rule = held_out_scenes(scenes.values())
    lists = lists_of(policy)
    held_out = []
    for path in paths:
        listed = all(name_of(path) in names for names in lists)
        if listed and (lists or scenes[path] in rule):
            held_out.append(path)
    count = len({scenes[path] for path in held_out})
    sentence = describe_split(len({scenes[path] for path in paths}), count, 0, 0)
    if len(found) > len(paths):
        sentence += f" {len(found) - len(paths)} failed demonstrations left out."
    if not lists:
        sentence += " The policy does not say what it was trained on; this is the usual rule."
    if held_out:
        return held_out, len(held_out), sentence
    sentence += " All numbers below are of demonstrations that may have been trained on."
    return paths, 0, sentence


def lists_of(policy) -> list[list[str]]:
    """Of each network of a policy that says so: the names of the demonstrations held out."""
    lists = []
    for owner in (policy, getattr(policy, "painter", None), getattr(policy, "controller", None)):
        config = getattr(owner, "config", {})
        if "held_out" in config:
            lists.append(config["held_out"])
    return lists


def true_layers(demonstration: Demonstration, run: Path, cameras, frames) -> dict:
    """The spheres to paint at some frames: {camera: (T, H, W, 4) uint8}, as large as the views."""
    path = run / "spheres" / demonstration.path.parent.name / demonstration.path.name
    layers = {}
    with h5py.File(path, "r") as root:
        for camera in cameras:
            layer = root["layers"][camera][frames]
            layers[camera] = resize_images(layer, *demonstration.image_sizes[camera])
    return layers


# ------------------------------------------------------------------------------------ measurements
def measure_chunk(chunk: np.ndarray, demonstration: Demonstration, t: int) -> dict:
    """A chunk (K, D+1) beside the actions recorded from frame t on, up to the episode's end."""
    actions = demonstration.action[t : t + len(chunk)]  # (k, D+1)
    chunk = chunk[: len(actions)]
    error = np.abs(np.rad2deg(chunk[:, :-1] - actions[:, :-1]))  # (k, D)
    still = np.abs(np.rad2deg(demonstration.qpos[t, :-1] - actions[:, :-1]))
    same = (chunk[:, -1] > 0.5) == (actions[:, -1] > 0.5)
    return {
        "chunk_deg": float(error.mean()),
        "last_deg": float(error[-1].mean()),
        "still_deg": float(still.mean()),
        "gripper_right": float(same.mean()),
    }


def measure_spheres(painted, truth, image, cell: int | None) -> dict:
    """A painted view (H, W, 3) beside the true one, both over `image`; compared at cell x cell."""
    height, width = image.shape[:2]
    pictures = np.stack([painted, truth, image])
    if cell is not None:
        pictures = resize_images(pictures, cell, cell)
    change = np.abs(pictures[:2].astype(int) - pictures[2]).max(axis=-1) > DIFFERENT  # (2, h, w)
    there = gripper_centre(pictures[1], pictures[2])
    here = gripper_centre(pictures[0], pictures[2])
    rows, columns = change.shape[1:]
    scale = np.array([width / columns, height / rows])  # of x and y
    visible = bool(np.isfinite(there).all())
    found = bool(np.isfinite(here).all())
    error = None
    if visible and found:
        error = float(np.linalg.norm((here - there) * scale))
    return {
        "common": int((change[0] & change[1]).sum()),
        "either": int((change[0] | change[1]).sum()),
        "gripper_visible": visible,
        "gripper_px": error,
    }


def cell_of_painter(policy) -> int | None:
    """Pixels a side of a view inside the painter; None where it sees the views as they are."""
    resolution = policy.painter.config["resolution"]
    rows, _ = grid_of(len(policy.cameras))
    cell = resolution // rows
    if is_uniform(policy.image_sizes) and policy.image_size[0] == cell:
        return None
    return cell


def look(policy, images, truth, qpos, instruction, drop_state) -> tuple[np.ndarray, dict]:
    """The policy's chunk (K, D+1) and what it painted; for the oracle's controller the truth."""
    if isinstance(policy, Controller):
        return follow(policy, truth, qpos, instruction, drop_state), truth
    return policy.act(images, qpos, instruction)


def measure(policy, demonstration, frames, images, layers, settings) -> tuple[list[dict], list]:
    """Show a policy some frames -> a measurement for each, and (observation, truth, painted) views.

    images {camera: (T, H, W, 3)}, layers {camera: (T, H, W, 4)}: of these frames.
    """
    rows = []
    pictures = []
    for i, t in enumerate(frames):
        observed = {camera: views[i] for camera, views in images.items()}
        truth = {}
        for camera, image in observed.items():
            truth[camera] = alpha_composite(layers[camera][i], image)
        qpos = demonstration.qpos[t]
        chunk, painted = look(
            policy, observed, truth, qpos, demonstration.instruction, settings.drop_state
        )
        row = {"episode": name_of(demonstration.path), "frame": int(t), "views": {}}
        row |= measure_chunk(chunk, demonstration, t)
        if isinstance(policy, GenimaPolicy):
            cell = cell_of_painter(policy)
            for camera, image in observed.items():
                view = measure_spheres(painted[camera], truth[camera], image, cell)
                row["views"][camera] = view
        rows.append(row)
        pictures.append((observed, truth, painted))
    return rows, pictures


# -------------------------------------------------------------------------------------- evaluation
def measure_all(settings, policy, paths: list[Path]) -> tuple[dict, list, dict]:
    """Every demonstration, as recorded and perturbed.

    Returns the measurements of each kind {kind: rows}, pictures to show [(caption, observation,
    truth, painted)], and {camera: in how many demonstrations its background stays}.
    """
    cameras = list(config_of(policy)["cameras"])
    recorded = find_episodes(settings.run / "episodes")
    rows = {kind: [] for kind in (AS_RECORDED, *PERTURBATIONS)}
    shown = []
    unchanged = Counter()
    samples = None
    for number, path in enumerate(tqdm(paths, "measuring", unit="episode")):
        demonstration = read_demonstration(path, settings.run, images=True)
        if samples is None:
            in_room = [camera for camera in cameras if is_in_room(demonstration, camera)]
            samples = {camera: sample_pictures(recorded, camera) for camera in in_room}
        frames = np.arange(0, len(demonstration.qpos), settings.execution_horizon)
        layers = true_layers(demonstration, settings.run, cameras, frames)
        static = static_views(demonstration, cameras, frames, samples)
        fixed = {camera for camera in cameras if static[camera].mean() < LEAST_STATIC}
        unchanged.update(fixed)
        for place, kind in enumerate(rows):
            if kind == "background" and len(fixed) == len(cameras):
                continue
            images = {}
            for i, camera in enumerate(cameras):
                images[camera] = demonstration.images[camera][frames]
                if kind == AS_RECORDED or (kind == "background" and camera in fixed):
                    continue
                rng = np.random.default_rng([number, place, i])
                if kind in ("hue", "brightness"):  # the same in all views
                    rng = np.random.default_rng([number, place])
                images[camera] = perturb(kind, images[camera], static[camera], rng)
            measured, pictures = measure(policy, demonstration, frames, images, layers, settings)
            rows[kind] += measured
            if number == 0 or (kind == AS_RECORDED and number < 3):
                caption = f"{name_of(path)}, {kind}: {demonstration.instruction}"
                shown.append((caption, *pictures[0]))
    return rows, shown, dict(unchanged)


def config_of(policy) -> dict:
    """Its cameras: those of a policy, or of the oracle's controller."""
    if isinstance(policy, Controller):
        return policy.config
    return {"cameras": policy.cameras}


def check_options(settings):
    for name, default in REFUSED.items():
        if getattr(settings, name) != default:
            option = name.replace("_", "-")
            raise UserError(f"--{option} is for a simulator: leave it out with --recorded.")
    check_policy(settings.policy)
    if settings.execution_horizon is None:
        settings.execution_horizon = EVERY
    if settings.execution_horizon < 1:
        raise UserError("--execution-horizon must be 1 or more.")


def evaluate_recorded(settings):
    """evaluate.py --recorded: measure, write and print. settings: its Settings."""
    check_options(settings)
    settings.device = choose_device(settings.device)
    resolve_folders(settings)
    policy = load_networks(settings)
    paths, held_out, sentence = choose_demonstrations(settings.run, settings.tasks, policy)
    print(sentence)
    rows, shown, unchanged = measure_all(settings, policy, paths)
    report = make_report(settings, rows, unchanged, len(paths), held_out, sentence)
    write_report(settings, report, shown, isinstance(policy, GenimaPolicy))
    print_report(report)
