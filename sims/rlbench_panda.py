"""RLBench in CoppeliaSim, behind the interface of sims/mujoco_panda.py, as a Gymnasium environment.

In:   absolute joint positions (7, rad) and a gripper command (0 closed, 1 open), twenty times a second: RLBench steps its simulation
      by 50 ms, and JointPosition() sends each action for one step. Discrete() moves the gripper when the command changes, and waits.
Out:  joint positions and velocities, and one picture per camera.
Use:  env = RLBenchEnv("open_box");  obs, info = env.reset(seed=0);  print(info["instruction"])

Needs RLBench 1.2, PyRep and CoppeliaSim 4.1 (requirements-rlbench.txt), on Linux, and a display, if only a virtual one. A process
has one CoppeliaSim; all environments of the process share it.
"""

import difflib
import importlib
import os
import pkgutil
import sys
from contextlib import contextmanager
from multiprocessing.util import Finalize
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from genima.episodes import CAMERAS
from genima.files import UserError
from genima.kinematics import JOINT_LIMITS
from sims.mujoco_panda import ArmEnv
from sims.rlbench_dataset import HZ, arm, camera_matrices, convert, load

# What the paper evaluates: 25 tasks of RLBench. It does not list them with its code; these are the 23 that the authors' laboratory
# configured for RLBench in its RoboBase library, and two others that GENIMA's code names. The paper's own table may list others.
PAPER_TASKS = (
    "basketball_in_hoop", "insert_usb_in_computer", "lamp_on", "meat_on_grill", "open_door", "open_drawer", "open_microwave",
    "open_oven", "phone_on_base", "pick_up_cup", "press_switch", "put_books_on_bookshelf", "put_item_in_drawer", "put_money_in_safe",
    "put_rubbish_in_bin", "reach_target", "slide_block_to_target", "stack_wine", "sweep_to_dustpan", "take_lid_off_saucepan",
    "take_plate_off_colored_dish_rack", "toilet_seat_up", "turn_tap", "move_hanger", "open_box",
)  # fmt: skip
MAX_STEPS = 200  # paper


class NoSceneError(Exception):
    """RLBench could not lay out the scene, or plan a demonstration in it: another seed may do."""


# ---------------------------------------------------------------------------------------------------------- CoppeliaSim
def missing():
    """One sentence about what CoppeliaSim lacks on this machine, or None."""
    root, see = os.environ.get("COPPELIASIM_ROOT"), "see requirements-rlbench.txt"
    if not root:
        return f"CoppeliaSim was not found: the variable COPPELIASIM_ROOT is not set; {see}."
    if not list(Path(root).glob("libcoppeliaSim.so*")):
        return f"CoppeliaSim was not found: COPPELIASIM_ROOT is {root}, where there is no libcoppeliaSim.so; {see}."
    if not any(
        Path(root).resolve() == Path(part).resolve()
        for part in os.environ.get("LD_LIBRARY_PATH", "").split(":")
        if part
    ):
        return f"CoppeliaSim's libraries are not found: add {root} to the variable LD_LIBRARY_PATH; {see}."
    if not (Path(os.environ.get("QT_QPA_PLATFORM_PLUGIN_PATH", "")) / "platforms").is_dir():
        return f"CoppeliaSim cannot open a window: set the variable QT_QPA_PLATFORM_PLUGIN_PATH to {root}; {see}."
    if not os.environ.get("DISPLAY"):
        return "CoppeliaSim needs a display, and the variable DISPLAY is not set: put `xvfb-run -a` before the command."


def import_rlbench():
    """The package rlbench, with its modules used here. Raises UserError where it, PyRep or CoppeliaSim is missing."""
    try:
        import rlbench.action_modes.action_mode
        import rlbench.action_modes.arm_action_modes
        import rlbench.action_modes.gripper_action_modes
        import rlbench.backend.exceptions
        import rlbench.demo
        import rlbench.environment
        import rlbench.observation_config
        import rlbench.tasks
    except Exception as error:  # ImportError, and whatever PyRep makes of a missing library
        raise UserError(
            missing() or f"RLBench cannot be imported ({error}): see requirements-rlbench.txt."
        ) from error
    if "pyrep.backend.sim" in sys.modules and (
        reason := missing()
    ):  # Qt would end the process without a word
        raise UserError(reason)
    return rlbench


def task_class(tasks, name):
    """RLBench's class of a task, by the task's name. Raises UserError with the nearest name if there is none."""
    names = [module.name for module in pkgutil.iter_modules(tasks.__path__)]
    if name not in names:
        raise UserError(
            f"RLBench has no task '{name}'; is it '{difflib.get_close_matches(name, names, 1, 0)[0]}'?"
        )
    return getattr(
        importlib.import_module(f"rlbench.tasks.{name}"),
        "".join(word.capitalize() for word in name.split("_")),
    )


running = SimpleNamespace(
    settings=None, environment=None, name=None, live=None, stop=lambda: None
)  # this process's CoppeliaSim and its task


def load_task(name, size, cameras):
    """RLBench's TaskEnvironment of this task, with these cameras of size (height, width); begun and loaded only where that is new."""
    rlbench = import_rlbench()
    if running.settings != (size, cameras):
        stop()
        config, modes = rlbench.observation_config.ObservationConfig(), rlbench.action_modes
        config.set_all(False)
        for what in ("joint_positions", "joint_velocities", "gripper_open", "gripper_pose"):
            setattr(config, what, True)
        for camera in cameras:
            if not hasattr(config, f"{camera}_camera"):
                raise UserError(
                    f"RLBench has no camera '{camera}'; choose from wrist, front, left_shoulder, right_shoulder, overhead."
                )
            settings = getattr(config, f"{camera}_camera")
            settings.rgb, settings.image_size = True, size[::-1]  # PyRep: width, height
        mode = modes.action_mode.MoveArmThenGripper(
            modes.arm_action_modes.JointPosition(), modes.gripper_action_modes.Discrete()
        )
        running.environment = rlbench.environment.Environment(
            action_mode=mode, obs_config=config, headless=True
        )
        try:
            running.environment.launch()
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(
                missing() or f"CoppeliaSim does not start ({reason}): see requirements-rlbench.txt."
            ) from error
        running.stop = Finalize(
            None, running.environment.shutdown, exitpriority=10
        )  # also at the process's end
        running.settings = size, cameras
    if running.name != name:
        running.live, running.name = (
            running.environment.get_task(task_class(rlbench.tasks, name)),
            name,
        )
    return running.live


def stop():
    running.stop()
    running.settings, running.name, running.stop = None, None, lambda: None


@contextmanager
def laying_out():
    """RLBench's errors while it lays out a scene, or plans in it, as a NoSceneError."""
    errors = import_rlbench().backend.exceptions
    try:
        yield
    except (
        errors.BoundaryError,
        errors.TaskEnvironmentError,
        errors.WaypointError,
        RuntimeError,
    ) as error:
        raise NoSceneError(" ".join(str(error).split())) from error


# -------------------------------------------------------------------------------------------------------- environment
class RLBenchEnv(ArmEnv):
    """One task of RLBench.

    reset(options=...): "variation" (drawn if absent), or "demonstration", a folder episode<M> of a dataset whose scene is laid out
    again. Raises NoSceneError where RLBench finds no place for the task. An action that RLBench refuses ends the episode, and
    info["error"] says why.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": HZ}

    def __init__(self, task="reach_target", image_size=128, cameras=CAMERAS, images=True):
        task_class(import_rlbench().tasks, task)
        super().__init__(image_size, cameras, images, *JOINT_LIMITS["panda"])
        self.name = task
        self.task = SimpleNamespace(
            candidates=0, focus=lambda env: np.full(3, np.nan)
        )  # RLBench does not say what a task is about

    def begin(self, seed, variation=None):
        """Seed RLBench, which draws from NumPy's global state, and choose the variation, or draw it."""
        self.live = load_task(
            self.name, (self.height, self.width), tuple(dict.fromkeys([*self.cameras, "front"]))
        )  # front: films
        np.random.seed(seed % 2**32)
        if variation is not None:
            self.live.set_variation(variation)
        self.variation = int(self.live.sample_variation()) if variation is None else variation

    # ---- Gymnasium
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        options = options or {}
        with laying_out():
            self.begin(self.seed, options.get("variation"))
            if options.get("demonstration"):
                demo, self.variation = recorded(options["demonstration"])
                self.instructions, self.last = self.live.reset_to_demo(demo)
            else:
                self.instructions, self.last = self.live.reset()
        self.instruction = self.instructions[self.seed % len(self.instructions)]
        self.succeeded, self.error = False, None
        self.chain, self.base_from_world = arm(
            self.joints()[None], [self.last], f"RLBench's task {self.name}"
        )
        return self.observe(), self.info()

    def step(self, action):
        action = self.checked(action)
        self.steps += 1
        try:
            self.last, reward, terminated = self.live.step(action)
        except import_rlbench().backend.exceptions.InvalidActionError as error:
            reward, terminated, self.error = 0.0, True, str(error)
        self.succeeded = reward > 0
        return (
            self.observe(),
            float(self.succeeded),
            bool(terminated or self.succeeded),
            self.steps >= MAX_STEPS,
            self.info(),
        )

    def close(self):
        stop()

    def info(self):
        info = {
            "instruction": self.instruction,
            "instructions": self.instructions,
            "variation": self.variation,
            "success": self.succeeded,
        }
        return info | ({"error": self.error} if self.error else {})

    def joints(self):
        return np.array(self.last.joint_positions, np.float64)

    def observe(self):
        return self.observation(
            self.joints(), self.last.gripper_open, self.last.joint_velocities, 0
        )

    def render_camera(self, camera, height, width):
        """What the camera sees now: (height, width, 3) uint8."""
        picture = Image.fromarray(np.array(getattr(self.last, f"{camera}_rgb"), np.uint8))
        return np.array(picture.resize((width, height)))

    # ---- geometry, in the frame of the robot's base
    def joint_poses(self):
        """World from joint (8, 4, 4): the seven joints (z is the axis, the frame turns with the joint), then the tool."""
        return self.chain.forward_kinematics(self.joints()).astype(np.float32)

    def tool_pose(self):
        """World from tool (4, 4)."""
        return self.chain.forward_kinematics(self.joints())[-1]

    def camera_parameters(self, name):
        """OpenCV intrinsics (3, 3) in pixels and world from camera (4, 4) as of now."""
        intrinsics, pose = camera_matrices([self.last], name, f"RLBench's task {self.name}")
        return intrinsics, self.base_from_world @ pose[0]

    # ---- demonstrations
    def demonstrate(self, seed):
        """A demonstration by RLBench's own planner, as an Episode without a path. Raises NoSceneError where there is none."""
        with laying_out():
            self.begin(seed)
            descriptions, _ = self.live.reset()  # get_demos does not tell them
            (demo,) = self.live.get_demos(amount=1, live_demos=True)
        observations = list(demo)
        images = {
            camera: np.stack([getattr(o, f"{camera}_rgb") for o in observations]).astype(np.uint8)
            for camera in self.cameras
        }
        return convert(
            observations,
            images,
            list(descriptions),
            self.name,
            self.variation,
            seed,
            f"RLBench's demonstration of {self.name}",
        )


def recorded(folder):
    """RLBench's Demo of a recorded demonstration, good for resetting to it, and its variation."""
    content, variation = load(folder / "low_dim_obs.pkl"), int(folder.parent.parent.name[9:])
    if getattr(content, "random_seed", None) is None:
        raise UserError(
            f"{folder / 'low_dim_obs.pkl'} does not say how its scene was laid out: evaluate without --demos."
        )
    demo = import_rlbench().demo.Demo([SimpleNamespace(misc={"variation_index": variation})])
    demo.random_seed, demo.num_reset_attempts = (
        content.random_seed,
        getattr(content, "num_reset_attempts", None),
    )
    return demo, variation
