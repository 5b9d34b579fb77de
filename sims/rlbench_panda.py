"""RLBench in CoppeliaSim, behind the interface of sims/mujoco_panda.py, as a Gymnasium environment.

In:   absolute joint positions (7, rad) and a gripper command (0 closed, 1 open), 20 times a
      second: RLBench steps its simulation by 50 ms, and JointPosition() sends each action for one
      step. Discrete() moves the gripper when the command changes, and waits.
Out:  joint positions and velocities, and one picture per camera
Use:  env = RLBenchEnv("open_box");  obs, info = env.reset(seed=0);  print(info["instruction"])

Needs RLBench 1.2, PyRep and CoppeliaSim 4.1 (requirements-rlbench.txt), on Linux, and a display, if
only a virtual one. Angles are RLBench's: its joint 4 has its zero 0.0698 rad from Franka's.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
from PIL import Image

from genima.episodes import CAMERAS
from genima.files import UserError
from genima.kinematics import JOINT_LIMITS
from sims.coppeliasim import SimulatorSettings, import_rlbench, simulator, task_class
from sims.mujoco_panda import ArmEnv
from sims.rlbench_dataset import HZ, arm, camera_matrices, convert, identify, load
from sims.rlbench_protocol import RLBENCH_PROTOCOL

RANDOM_STATE = 624  # length of the Mersenne Twister's state
MAX_ATTEMPTS = 40  # RLBench's, to lay out a scene


class NoSceneError(Exception):
    """RLBench could not lay out the scene, or plan a demonstration in it: try another seed."""


class RLBenchEnv(ArmEnv):
    """One task of RLBench.

    reset(options=...): "variation" (drawn if absent), or "demonstration", a folder episode<M> of a
    dataset whose scene is laid out again. Raises NoSceneError where RLBench finds no place for the
    task. Any other exception of RLBench, PyRep and CoppeliaSim goes through, in reset() and step();
    CoppeliaSim is stopped then, and the next reset() starts a new one.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": HZ}

    def __init__(
        self,
        task="reach_target",
        image_size=128,
        cameras=CAMERAS,
        images=True,
        protocol=RLBENCH_PROTOCOL,
    ):
        task_class(task)  # raises UserError if there is none
        super().__init__(image_size, cameras, images, *JOINT_LIMITS["panda"])
        self.name = task
        self.protocol = protocol
        # RLBench does not say what a task is about.
        self.task = SimpleNamespace(candidates=0, focus=lambda env: np.full(3, np.nan))

    @contextmanager
    def simulating(self):
        """Calls of RLBench: what is wrong with the scene is a NoSceneError, all else goes through.

        After all else nobody knows the simulator's state, so it is stopped.
        """
        errors = import_rlbench().backend.exceptions
        no_scene = (errors.BoundaryError, errors.TaskEnvironmentError, errors.WaypointError)
        try:
            yield
        except UserError:
            raise
        except no_scene as error:
            raise NoSceneError(" ".join(str(error).split())) from error
        except Exception as error:
            if "Could not collect demos" in str(error):  # a RuntimeError like any other
                raise NoSceneError(" ".join(str(error).split())) from error
            self.stop_after(error)
            raise

    def stop_after(self, error):
        """Stop a simulator that has failed."""
        try:
            simulator.stop()
        except Exception as another:
            raise error from another

    def prepare(self, seed, variation):
        """Load the task, seed RLBench, which draws from NumPy's global state, and set or draw the
        variation."""
        protocol = self.protocol
        settings = SimulatorSettings(
            size=(self.height, self.width),
            cameras=tuple(dict.fromkeys([*self.cameras, "front"])),  # front: films
            arm_velocity=protocol.arm_velocity,
            arm_acceleration=protocol.arm_acceleration,
            renderer=protocol.renderer,
        )
        self.live = simulator.load(self.name, settings)
        np.random.seed(seed % 2**32)
        if variation is None:
            self.variation = int(self.live.sample_variation())
            return
        count = self.live.variation_count()
        if not 0 <= variation < count:
            raise UserError(
                f"RLBench's task {self.name} has the variations 0 to {count - 1}, and no "
                f"variation {variation}."
            )
        self.live.set_variation(variation)
        self.variation = variation

    # ---- Gymnasium
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        options = options or {}
        variation = options.get("variation", self.protocol.variation)
        demo = None
        if options.get("demonstration"):
            demo, variation = recorded(options["demonstration"])
        with self.simulating():
            self.prepare(self.seed, variation)
            if demo:
                self.instructions, self.last = self.live.reset_to_demo(demo)
            else:
                self.instructions, self.last = self.live.reset()
        self.instruction = self.instructions[self.seed % len(self.instructions)]
        self.succeeded = False
        where = f"RLBench's task {self.name}"
        self.chain, self.base_from_world = arm(self.joints()[None], [self.last], where)
        return self.observe(), self.info()

    def step(self, action):
        action = self.checked(action)
        self.steps += 1
        with self.simulating():
            self.last, reward, terminated = self.live.step(action)
        self.succeeded = reward > 0
        done = bool(terminated or self.succeeded)
        truncated = self.steps >= self.protocol.max_steps
        return self.observe(), float(self.succeeded), done, truncated, self.info()

    def close(self):
        simulator.stop()

    def info(self):
        return {
            "instruction": self.instruction,
            "instructions": self.instructions,
            "variation": self.variation,
            "success": self.succeeded,
        }

    def joints(self):
        """Joint positions (7,) in rad."""
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
        """World from joint (8, 4, 4): the seven joints, which turn about z, then the tool."""
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
        """A demonstration by RLBench's own planner, as an Episode without a path.

        Raises NoSceneError where there is none.
        """
        with self.simulating():
            self.prepare(seed, self.protocol.variation)
            descriptions, _ = self.live.reset()  # get_demos does not tell them
            (demo,) = self.live.get_demos(amount=1, live_demos=True)
        observations = list(demo)
        images = {}
        for camera in self.cameras:
            pictures = [getattr(one, f"{camera}_rgb") for one in observations]
            images[camera] = np.stack(pictures).astype(np.uint8)
        where = f"RLBench's demonstration of {self.name}"
        return convert(
            observations, images, list(descriptions), self.name, self.variation, seed, where
        )


def recorded(folder):
    """RLBench's Demo of a recorded demonstration, good for resetting to it, and its variation."""
    path = folder / "low_dim_obs.pkl"
    content = load(path)
    _, variation, _ = identify(folder)
    state = getattr(content, "random_seed", None)
    if state is None:
        raise UserError(
            f"{path} does not say how its scene was laid out: evaluate without --demos."
        )
    if not is_random_state(state):
        raise UserError(f"{path} holds no state of NumPy's random numbers: get it again.")
    attempts = getattr(content, "num_reset_attempts", None)
    if attempts is not None and (type(attempts) is not int or not 1 <= attempts <= MAX_ATTEMPTS):
        raise UserError(f"{path} holds no number of attempts to lay out its scene: get it again.")
    demo = import_rlbench().demo.Demo([SimpleNamespace(misc={"variation_index": variation})])
    demo.random_seed = state
    demo.num_reset_attempts = attempts
    return demo, variation


def is_random_state(state):
    """Is this a state that NumPy's generator can take? It does not look at the position itself."""
    if type(state) is not tuple or len(state) != 5:
        return False
    name, keys, position, has_gauss, gauss = state
    if not isinstance(keys, np.ndarray) or keys.shape != (RANDOM_STATE,) or keys.dtype != np.uint32:
        return False
    if type(position) is not int or not 0 <= position <= RANDOM_STATE:
        return False
    return name == "MT19937" and has_gauss in (0, 1) and isinstance(gauss, float)
