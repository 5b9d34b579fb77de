"""What can be said about a random scene, and what to paint for it (pretrain_painter.py).

A  "the robot as it is, the hand open"   the four spheres where the joints are now
B  "the rose block"                      one magenta sphere on the thing that is named
C  "the open hand above the rose block"  the four spheres where inverse kinematics puts the arm
"""

import numpy as np

from genima.spheres import RADIUS, RADIUS_FACTOR, draw_spheres, target_spheres
from sims.mujoco_tasks import COLOURS, TASKS, TOOL_DOWN

MAGENTA = (255, 0, 255)  # of the marker; no sphere of the robot has this colour
ABOVE = 0.10  # metres between the hand and what it is above
# What the things of each task are called; {} is the name that the task gives a candidate.
THINGS = {
    "reach_target": ("the {} ball", "the {} sphere", "the {} target"),
    "push_button": ("the {} button",),
    "pick_and_lift": ("the {} block", "the {} cube"),
    "slide_block_to_target": ("the block",),
    "open_drawer": ("the {} drawer", "the {} handle"),
    "take_lid_off_saucepan": ("the lid", "the knob of the lid", "the saucepan"),
    "close_box": ("the lid", "the lid of the box"),
    "stack_blocks": ("the {} block", "the {} cube"),
}


def all_sentences() -> list[str]:
    """Every sentence of the scenes, and every instruction of the tasks, so that the tokenizer
    knows all words. (Of the instructions the base learns no more than that.)"""
    sentences = set()
    for hand in ("open", "closed"):
        sentences.add(f"the robot as it is, the hand {hand}")
    for name, task in TASKS.items():
        names = [*COLOURS, *task.names]
        for thing in names:
            sentences.update(phrase.format(thing) for phrase in THINGS[name])
            sentences.update(template.format(thing) for template in task.templates)
    sentences.update(f"the open hand {place} it" for place in ("at", "above"))
    return sorted(sentences)


def kind_of(sentence: str) -> str:
    """Which of the three kinds a sentence is of."""
    if sentence.startswith("the robot"):
        return "A"
    if " hand " in sentence:
        return "C"
    return "B"


def draw_sentence(kind: str, env, rng) -> tuple[str, np.ndarray]:
    """A sentence of this kind about the scene, and what to paint for it: (V, H, W, 4) uint8 RGBA.

    Raises UserError where the arm cannot get there.
    """
    gripper_open = bool(rng.random() < 0.5)
    hand = "open" if gripper_open else "closed"
    if kind == "A":
        layers = draw_arm(env, env.joint_poses(), gripper_open)
        return f"the robot as it is, the hand {hand}", layers

    env.variation = int(rng.integers(env.task.candidates))
    thing = str(rng.choice(THINGS[env.task_name])).format(env.task.names[env.variation])
    point = env.task.focus(env)
    if kind == "B":
        return thing, draw_marker(env, point)

    place = rng.choice(["at", "above"])
    if place == "above":
        point = point + (0, 0, ABOVE)
    joints = env.ik(point, TOOL_DOWN)
    layers = draw_arm(env, env.joint_poses_at(joints), gripper_open)
    return f"the {hand} hand {place} {thing}", layers


def draw_arm(env, joint_poses: np.ndarray, gripper_open: bool) -> np.ndarray:
    """The four spheres of an arm at joint_poses (8, 4, 4), in all views: (V, H, W, 4)."""
    layers = []
    for camera in env.cameras:
        spheres = target_spheres(joint_poses, gripper_open, camera)
        layers.append(draw_spheres(*spheres, *env.camera_parameters(camera), env.height, env.width))
    return np.stack(layers)


def draw_marker(env, point: np.ndarray) -> np.ndarray:
    """A magenta sphere at a point (3,) of the world, in all views: (V, H, W, 4)."""
    pose = np.eye(4)
    pose[:3, 3] = point
    colours = np.array([MAGENTA], np.uint8)
    layers = []
    for camera in env.cameras:
        radii = [RADIUS * RADIUS_FACTOR[camera]]
        layer = draw_spheres(
            pose[None], radii, colours, *env.camera_parameters(camera), env.height, env.width
        )
        layers.append(layer)
    return np.stack(layers)
