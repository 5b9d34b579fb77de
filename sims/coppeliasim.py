"""CoppeliaSim, the simulator that RLBench runs in: what it needs, how it is started and stopped.

A process can hold one CoppeliaSim: PyRep talks to it through a library with global state. So the
simulator of this module is the process's, and all environments of the process share it.
"""

import difflib
import importlib
import os
import pkgutil
import sys
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path

from genima.files import UserError

ADVICE = "see requirements-rlbench.txt"


@dataclass(frozen=True)
class SimulatorSettings:
    """What CoppeliaSim has to be started again for."""

    size: tuple  # height, width in pixels
    cameras: tuple
    arm_velocity: float = 1.0  # of the planner: RLBench's default
    arm_acceleration: float = 4.0
    renderer: str = "opengl3"


def missing():
    """One sentence about what CoppeliaSim lacks on this machine, or None."""
    root = os.environ.get("COPPELIASIM_ROOT")
    if not root:
        return (
            "CoppeliaSim was not found: the variable COPPELIASIM_ROOT is not set or empty; "
            f"{ADVICE}."
        )
    if not list(Path(root).glob("libcoppeliaSim.so*")):
        return (
            f"CoppeliaSim was not found: COPPELIASIM_ROOT is {root}, where there is no "
            f"libcoppeliaSim.so; {ADVICE}."
        )
    libraries = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    if Path(root).resolve() not in [Path(part).resolve() for part in libraries if part]:
        return (
            f"CoppeliaSim's libraries are not found: add {root} to the variable LD_LIBRARY_PATH; "
            f"{ADVICE}."
        )
    if not (Path(os.environ.get("QT_QPA_PLATFORM_PLUGIN_PATH", "")) / "platforms").is_dir():
        return (
            "CoppeliaSim cannot open a window: set the variable QT_QPA_PLATFORM_PLUGIN_PATH to "
            f"{root}; {ADVICE}."
        )
    if not os.environ.get("DISPLAY"):
        return (
            "CoppeliaSim needs a display, and the variable DISPLAY is not set: put `xvfb-run -a` "
            "before the command."
        )
    return None


def import_rlbench():
    """The package rlbench, with its modules used here.

    Raises UserError where it, PyRep or CoppeliaSim is missing.
    """
    try:
        import pyrep.const  # noqa: F401  (RenderMode, below)
        import rlbench.action_modes.action_mode
        import rlbench.action_modes.arm_action_modes
        import rlbench.action_modes.gripper_action_modes
        import rlbench.backend.exceptions
        import rlbench.demo
        import rlbench.environment
        import rlbench.observation_config
        import rlbench.tasks
    except Exception as error:  # ImportError, and whatever PyRep makes of a missing library
        reason = missing() or f"RLBench cannot be imported ({error}): {ADVICE}."
        raise UserError(reason) from error
    if "pyrep.backend.sim" in sys.modules:  # Qt would end the process without a word
        reason = missing()
        if reason:
            raise UserError(reason)
    return rlbench


def task_class(name):
    """RLBench's class of a task. Raises UserError with the nearest name if there is none."""
    tasks = import_rlbench().tasks
    names = [module.name for module in pkgutil.iter_modules(tasks.__path__)]
    if name not in names:
        nearest = difflib.get_close_matches(name, names, 1, 0)[0]
        raise UserError(f"RLBench has no task '{name}'; is it '{nearest}'?")
    module = importlib.import_module(f"rlbench.tasks.{name}")
    return getattr(module, "".join(word.capitalize() for word in name.split("_")))


def observation_config(rlbench, settings):
    """RLBench's ObservationConfig: the arm, the gripper and these cameras, no depth, no masks."""
    from pyrep.const import RenderMode

    config = rlbench.observation_config.ObservationConfig()
    config.set_all(False)
    for what in ("joint_positions", "joint_velocities", "gripper_open", "gripper_pose"):
        setattr(config, what, True)
    for name in settings.cameras:
        if not hasattr(config, f"{name}_camera"):
            raise UserError(
                f"RLBench has no camera '{name}'; choose from wrist, front, left_shoulder, "
                "right_shoulder, overhead."
            )
        camera = getattr(config, f"{name}_camera")
        camera.rgb = True
        camera.image_size = settings.size[::-1]  # PyRep: width, height
        camera.render_mode = RenderMode[settings.renderer.upper()]
    return config


class Simulator:
    """This process's CoppeliaSim, with one task of RLBench loaded."""

    def __init__(self):
        self.settings = None
        self.environment = None
        self.task_name = None
        self.task = None
        self.end = None  # stops CoppeliaSim, at the latest at the process's end

    def load(self, name, settings):
        """RLBench's TaskEnvironment of this task; started and loaded only where that is new."""
        rlbench = import_rlbench()
        if self.settings != settings:
            self.stop()
            self.start(rlbench, settings)
        if self.task_name != name:
            self.task_name = None
            self.task = self.environment.get_task(task_class(name))
            self.task_name = name
        return self.task

    def start(self, rlbench, settings):
        modes = rlbench.action_modes
        environment = rlbench.environment.Environment(
            action_mode=modes.action_mode.MoveArmThenGripper(
                modes.arm_action_modes.JointPosition(), modes.gripper_action_modes.Discrete()
            ),
            obs_config=observation_config(rlbench, settings),
            headless=True,
            arm_max_velocity=settings.arm_velocity,
            arm_max_acceleration=settings.arm_acceleration,
        )
        try:
            environment.launch()
        except Exception as error:
            reason = " ".join(str(error).split())
            reason = missing() or f"CoppeliaSim does not start ({reason}): {ADVICE}."
            raise UserError(reason) from error
        self.environment = environment
        self.end = Finalize(None, environment.shutdown, exitpriority=10)
        self.settings = settings

    def stop(self):
        """End CoppeliaSim; the next load() starts a new one."""
        end = self.end
        self.__init__()
        if end:
            end()


simulator = Simulator()
