"""Painter and controller as one policy, and its rollout: look, paint the targets, follow them.

A policy is any object with

    cameras       names of the views that it looks at
    image_size    (H, W) of each view, pixels; image_sizes, by camera, where they differ
    robot         whose arm it moves, "fr3" if it does not say
    act(images, qpos, instruction) -> chunk, painted
        images       {camera: (H, W, 3) uint8}
        qpos         (D+1,) joint positions (rad) and gripper opening 0..1
        instruction  a sentence
        chunk        (K, D+1) absolute joint targets (rad) and probability of an open gripper
        painted      {camera: (H, W, 3) uint8}, what the controller saw; for films

and, where it needs them, `reset(env)`, called when an episode has begun, and `paint_seconds`, how
long the last call of act took to paint. Three policies are in this file; `evaluate.py --policy
FILE:FUNCTION` runs any other. Nothing here knows a simulator: the environment is an argument.

Paper, sections 3.3 and 4.
"""

import time
from collections.abc import Callable
from contextlib import contextmanager

import numpy as np

from genima.act import Controller
from genima.episodes import Episode
from genima.files import UserError
from genima.plots import PANEL, painted_panel
from genima.spheres import PAPER, SphereStyle, alpha_composite, draw_spheres, target_spheres
from genima.views import image_sizes_of


# ---------------------------------------------------------------------------------------- policies
class GenimaPolicy:
    """The painter paints the target spheres, the controller follows them."""

    def __init__(self, painter, controller: Controller, drop_state: bool = False):
        """drop_state: leave the joint state out of the controller's input."""
        self.painter = painter
        self.controller = controller
        self.drop_state = drop_state
        self.cameras = tuple(controller.config["cameras"])
        self.image_sizes = image_sizes_of(controller.config)
        self.robot = controller.config.get("robot", "fr3")
        self.image_size = self.image_sizes[self.cameras[0]]

    def act(self, images, qpos, instruction):
        start = time.perf_counter()
        batch = self.painter.paint(batch_of_one(images), [instruction])
        painted = {camera: image[0] for camera, image in batch.items()}  # (H, W, 3)
        self.paint_seconds = time.perf_counter() - start
        return follow(self.controller, painted, qpos, instruction, self.drop_state), painted


class ActPolicy:
    """The controller alone, on plain views: the baseline ACT."""

    def __init__(self, controller: Controller, drop_state: bool = False):
        self.controller = controller
        self.drop_state = drop_state
        self.cameras = tuple(controller.config["cameras"])
        self.image_sizes = image_sizes_of(controller.config)
        self.robot = controller.config.get("robot", "fr3")
        self.image_size = self.image_sizes[self.cameras[0]]

    def act(self, images, qpos, instruction):
        return follow(self.controller, images, qpos, instruction, self.drop_state), images


class OraclePolicy:
    """The controller on the true spheres of a demonstration: its upper bound."""

    def __init__(self, controller: Controller, demonstrate: Callable, drop_state: bool = False):
        """demonstrate(env) -> Episode: how the scene that the environment shows is solved."""
        self.controller = controller
        self.demonstrate = demonstrate
        self.drop_state = drop_state
        self.cameras = tuple(controller.config["cameras"])
        self.image_sizes = image_sizes_of(controller.config)
        self.robot = controller.config.get("robot", "fr3")
        self.image_size = self.image_sizes[self.cameras[0]]

    def reset(self, env):
        """Raises UserError where there is no demonstration: the episode counts as a failure."""
        self.env = env
        config = self.controller.config
        style = PAPER
        if "style" in config:
            style = SphereStyle(tuple(config["style"]["joints"]), config["style"]["factors"])
        self.painter = OraclePainter(self.demonstrate(env), config["horizon"], style)

    def act(self, images, qpos, instruction):
        start = time.perf_counter()
        frame = self.painter.progress(qpos[:-1])
        painted = self.painter.paint(self.env, images, frame)
        self.paint_seconds = time.perf_counter() - start
        return follow(self.controller, painted, qpos, instruction, self.drop_state), painted


class OraclePainter:
    """Paints the true spheres of a demonstration.

    It follows the demonstration by progress: a clock would run away from a slow controller.
    """

    def __init__(self, demo: Episode, horizon: int, style: SphereStyle = PAPER):
        """horizon: how many steps ahead the painted spheres are (K)."""
        self.demo = demo
        self.horizon = horizon
        self.style = style
        self.frame = -1

    def progress(self, joints: np.ndarray) -> int:
        """The demonstration's frame nearest to these joints (D,), at least one after the last."""
        # No further than a chunk: a hand that goes down and up again passes the same place twice.
        ahead = np.arange(self.frame + 1, self.frame + self.horizon + 1)
        ahead = np.minimum(ahead, len(self.demo.qpos) - 1)
        distance = np.linalg.norm(self.demo.qpos[ahead, :-1] - joints, axis=1)
        self.frame = int(ahead[np.argmin(distance)])
        return self.frame

    def paint(self, env, images: dict[str, np.ndarray], frame: int) -> dict[str, np.ndarray]:
        """The spheres of `horizon` steps after this frame, over what the cameras see now."""
        frame = min(frame + self.horizon, len(self.demo.qpos) - 1)
        is_open = self.demo.action[frame, -1] > 0.5
        painted = {}
        for camera, image in images.items():
            spheres = target_spheres(self.demo.joint_poses[frame], is_open, camera, self.style)
            size = image.shape[:2]
            intrinsics, world_from_camera = env.camera_parameters(camera, size)
            layer = draw_spheres(*spheres, intrinsics, world_from_camera, *size)
            painted[camera] = alpha_composite(layer, image)
        return painted


def batch_of_one(images):
    return {camera: image[None] for camera, image in images.items()}  # (1, H, W, 3)


def follow(controller, images, qpos, instruction, drop_state) -> np.ndarray:
    """The controller's chunk (K, D+1) for one observation."""
    return controller(batch_of_one(images), qpos[None], [instruction], drop_state)[0]


# ----------------------------------------------------------------------------------------- rollout
class SimulatorError(Exception):
    """A call of the simulator failed. It ends its episode and nothing else."""


@contextmanager
def simulator_calls():
    """Any error in this block becomes a SimulatorError, but for UserError and MemoryError."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        words = " ".join(str(error).split())
        raise SimulatorError(f"{type(error).__name__}: {words}") from error


def before_episode(seed: int) -> tuple[dict, dict]:
    """Outcome and log of an episode that has not begun."""
    outcome = {
        "seed": seed,
        "variation": None,
        "instruction": None,
        "success": False,
        "steps": 0,
    }
    log = {
        "paint": [],  # seconds, one entry for each look
        "control": [],  # likewise
        "trace": [],  # a trace_row for each step
        "frames": [],  # of a film, (PANEL, 3 PANEL, 3)
    }
    return outcome, log


def rollout(
    env,
    policy,
    seed: int,
    options: dict | None = None,
    execution_horizon: int = 8,
    film: bool = False,
    watch: Callable | None = None,
) -> tuple[dict, dict]:
    """One episode in closed loop -> outcome, log (see before_episode).

    env: a Gymnasium environment of sims/. seed, options: for its reset. execution_horizon: how many
    steps of each chunk to run before looking again. film: whether to keep frames. watch: called as
    watch(env, painted, instruction) before each step and after the last.

    If the simulator fails, the episode ends and outcome["error"] says why ("<type>: <message>");
    "variation" stays None if the scene could not even be laid out. Errors of the policy are raised.
    """
    outcome, log = before_episode(seed)
    try:
        with simulator_calls():
            observation, info = env.reset(seed=seed, options=options)
        outcome["seed"] = env.seed
        outcome["variation"] = info["variation"]
        outcome["instruction"] = info["instruction"]
        if hasattr(policy, "reset"):
            try:
                policy.reset(env)
            except UserError:  # the oracle has no demonstration of this scene
                return outcome, log

        done = False
        while not done:
            with simulator_calls():
                images = camera_images(env, getattr(policy, "image_sizes", {}))
            start = time.perf_counter()
            chunk, painted = policy.act(images, observation["qpos"], info["instruction"])
            seconds = time.perf_counter() - start
            paint_seconds = getattr(policy, "paint_seconds", 0.0)
            log["paint"].append(paint_seconds)
            log["control"].append(seconds - paint_seconds)
            actions = executable(chunk, env.action_space)[:execution_horizon]

            with simulator_calls():
                if film:
                    observed = render_panel(env)
                for i, action in enumerate(actions):
                    if film:
                        log["frames"].append(film_frame(observed, painted, render_panel(env)))
                    if watch is not None:
                        watch(env, painted, info["instruction"])
                    log["trace"].append(trace_row(env, action, i == 0))
                    observation, _, terminated, truncated, info = env.step(action)
                    outcome["steps"] = env.steps
                    done = terminated or truncated
                    if done:
                        break
        outcome["success"] = info["success"]
        if watch is not None:
            watch(env, painted, info["instruction"])
        if "error" in info:
            outcome["error"] = info["error"]
        if film:
            with simulator_calls():
                log["frames"].append(film_frame(observed, painted, render_panel(env)))
    except SimulatorError as error:
        outcome["error"] = str(error)
    return outcome, log


def camera_images(env, image_sizes: dict | None = None) -> dict[str, np.ndarray]:
    """What all cameras see now: {camera: (H, W, 3) uint8}.

    image_sizes: {camera: (H, W)} where the environment's own size is not meant.
    """
    if image_sizes is None:
        image_sizes = {}
    images = {}
    for name in env.cameras:
        height, width = image_sizes.get(name, (env.height, env.width))
        images[name] = env.render_camera(name, height, width)
    return images


def executable(chunk, space) -> np.ndarray:
    """A chunk (K, D+1) as the action space takes it: gripper 0 or 1, joints within their limits."""
    chunk = np.array(chunk)
    if chunk.ndim != 2 or chunk.shape[1:] != space.shape:
        raise UserError(
            f"The policy's chunk must have the shape (K, {space.shape[0]}), not {chunk.shape}."
        )
    chunk[:, -1] = chunk[:, -1] > 0.5
    return np.clip(chunk, space.low, space.high)  # a network overshoots a limit by a hair


def trace_row(env, action, looked: bool) -> list[float]:
    """Step, tool x y z, object x y z (world frame, metres), gripper command, 1 after a look."""
    row = [env.steps, *env.tool_pose()[:3, 3], *env.task.focus(env), action[-1], looked]
    return [float(value) for value in row]


def render_panel(env) -> np.ndarray:
    return env.render_camera("front", PANEL, PANEL)


def film_frame(observed, painted, now) -> np.ndarray:
    """What the policy observed and painted, and the robot now, side by side (PANEL, 3 PANEL, 3)."""
    return np.concatenate([observed, painted_panel(painted), now], axis=1)
