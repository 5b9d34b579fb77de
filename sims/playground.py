"""A robot to talk to: a scene, trained networks, and a sentence that may change in mid-motion.

    playground = Playground("checkpoints/demo")
    playground.say("push the blue button")
    while playground.running:
        playground.step()
    playground.film(Path("film.mp4"))

All that a page such as play.py's shows is here, without the page. MuJoCo draws in the thread that
drew first, so call all methods from one thread.
"""

from pathlib import Path
from types import SimpleNamespace

import mujoco
import numpy as np

from genima.act import words_of
from genima.checkpoints import load_controller, load_policy, trained_tasks
from genima.files import UserError
from genima.kinematics import franka_chain
from genima.plots import write_video
from genima.policy import ActPolicy, OraclePainter, camera_images, executable, follow
from genima.spheres import alpha_composite, draw_spheres, target_spheres
from genima.word_maps import draw_word_maps, word_attention, word_effect
from sims import Simulators
from sims.demonstrator import JOINT_SPEED, expert_actions, joint_path
from sims.mujoco_panda import CONTROL_HZ
from sims.perturbed_panda import PERTURBATIONS
from sims.show import FPS, PeopleCamera, Recording, film_frames, snapshot

LOOKS = ("usual", *PERTURBATIONS)
# Who says where the arm should be a moment later.
GUIDES = {
    "painter": "the painter",
    "truth": "the truth (scripted expert)",
    "hand": "your hand",
    "act": "nobody (ACT on plain views)",
}
PAINTED_NAMES = {
    "painter": "what the diffusion model paints",
    "truth": "the true spheres",
    "hand": "the spheres where you put them",
    "act": "what ACT sees",
}
HEAT_MAPS = {
    "what changes in the painting if the word is left out": word_effect,
    "cross-attention, of which the word gets so much": word_attention,
}
MAX_SECONDS = 30  # of the film: what happened last
MAX_STEPS = 100  # the arm stops after so many steps without success
HAND_STEPS = 16  # with a sphere in your hand
LIFT = 0.10  # metres: after an episode the arm lifts itself before it returns to where it began
LOWEST = 0.01  # metres above the table: the gripper's sphere goes no lower
FARTHEST = 0.25  # metres, along each axis, that it can be moved from where it was taken
PEOPLE_SIZE = (360, 480)  # height and width of the live picture, pixels


class Playground:
    """One robot at one table, and everything that was said and done since the last reset."""

    def __init__(self, run: Path | str, device: str = "cpu"):
        """run: a folder with controlnet/, act/ and, for plain ACT, act_rgb/. Raises UserError."""
        run = Path(run)
        self.genima = load_policy(run / "controlnet", run / "act", device)
        self.controller = self.genima.controller
        self.horizon = self.controller.config["horizon"]
        self.act = None
        if (run / "act_rgb").is_dir():
            self.act = ActPolicy(load_controller(run / "act_rgb", "rgb", device))
        self.trained = trained_tasks(run / "controlnet")
        if not self.trained:  # a checkpoint of an earlier version
            self.trained = sorted(path.name for path in (run / "episodes").glob("*/"))
        self.chain = franka_chain()
        self.simulators = Simulators()
        self.camera = None
        self.run_number = 0
        self.guide = "painter"
        self.choose("push_button", 0, "usual")

    # ---- the scene
    def choose(self, task: str, seed: int, look: str):
        """Lay out another scene. Raises UserError for an unknown task, look or a negative seed."""
        if look not in LOOKS:
            raise UserError(f"There is no look '{look}': choose from {', '.join(LOOKS)}.")
        if not 0 <= seed < 2**31:
            raise UserError("The scene's number must be 0 or more, and below 2147483648.")
        sim = "mujoco" if look == "usual" else look
        env = self.simulators.get(task, self.genima.image_size, self.genima.cameras, sim)
        if self.camera is None or env is not self.env:
            if self.camera is not None:
                self.camera.close()
            self.camera = PeopleCamera(env, *PEOPLE_SIZE)
        self.env = env
        self.task = task
        self.seed = seed
        self.look = look
        self.reset()
        if self.trained and task not in self.trained:
            known = ", ".join(self.trained)
            self.message = f"The painter was never trained on this task, only on {known}."

    def reset(self):
        """The same scene from its beginning; the sentence is the scene's own again."""
        self.observation, info = self.env.reset(seed=self.seed)
        self.first_joints = self.observation["qpos"][:-1].astype(float)
        self.is_over = False  # whether an episode has ended where the arm is
        self.sentence = info["instruction"]
        self.message = ""
        self.recording = Recording()
        self.views = camera_images(self.env)
        self.painted = self.views
        self.stop()
        self.take_sphere()
        self.look_again()

    def examples(self) -> list[str]:
        """One sentence for each object of the scene."""
        return [self.env.task.instructions(i)[0] for i in range(self.env.task.candidates)]

    # ---- what a person does
    def say(self, sentence: str):
        """Tell the robot something; it starts to move, or changes its mind.

        After the end of an episode it returns first to where it began: no demonstration ever
        started on a button that was just pressed.
        """
        sentence = " ".join(sentence.split())
        if not sentence:
            self.message = "Say something first."
            return
        self.sentence = sentence
        names = self.env.task.names
        for variation in range(self.env.task.candidates):
            if names[variation % len(names)] in words_of(sentence):
                self.env.variation = variation  # success is judged by what the sentence names
        self.start()
        self.look_again()
        if self.is_over:
            self.chunk = self.way_back()
            self.returning = len(self.chunk)
            self.is_over = False

    def follow_guide(self, guide: str):
        """Who paints the targets from now on, a key of GUIDES. Raises UserError."""
        if guide not in GUIDES:
            raise UserError(f"There is no '{guide}': choose from {', '.join(GUIDES)}.")
        if guide == "act" and self.act is None:
            raise UserError(
                "This run has no act_rgb: train it with train_act.py --observation rgb first."
            )
        self.guide = guide
        self.take_sphere()
        self.look_again()

    def take_sphere(self):
        """The gripper's sphere is in the hand, where the gripper is now."""
        self.held_pose = self.env.tool_pose()
        self.held_joints = self.observation["qpos"][:-1].astype(float)
        self.hand_joints = self.held_joints
        self.hand_open = bool(self.observation["qpos"][-1] > 0.5)
        self.offset = np.zeros(3)

    def move_sphere(self, offset):
        """Put the gripper's sphere at an offset (x, y, z), metres, from where it was taken.

        The other spheres follow as the arm would. Raises UserError where the arm cannot reach.
        """
        if self.guide != "hand":
            self.follow_guide("hand")
        offset = np.clip(np.asarray(offset, float), -FARTHEST, FARTHEST)
        position = self.held_pose[:3, 3] + offset
        position[2] = max(position[2], LOWEST)
        self.hand_joints = self.env.ik(position, self.held_pose[:3, :3], self.held_joints)
        self.offset = position - self.held_pose[:3, 3]
        self.start()
        self.look_again()

    def drag_sphere(self, camera: str, x: float, y: float):
        """Put it where a view shows the point (x, y), each 0..1, as far from the camera as before.

        Raises UserError where the arm cannot reach.
        """
        if self.guide != "hand":
            self.follow_guide("hand")
        intrinsics, world_from_camera = self.env.camera_parameters(camera)
        sphere = self.held_pose[:3, 3] + self.offset
        depth = (sphere - world_from_camera[:3, 3]) @ world_from_camera[:3, 2]
        pixel = np.array([x * self.env.width, y * self.env.height, 1])
        point = depth * np.linalg.solve(intrinsics, pixel)  # (3,) in the camera's frame
        point = world_from_camera[:3, :3] @ point + world_from_camera[:3, 3]
        self.move_sphere(point - self.held_pose[:3, 3])

    def start(self) -> int:
        """Begin to move -> this run's number; an earlier run is over."""
        self.run_number += 1
        self.running = True
        self.steps = 0
        self.message = ""
        return self.run_number

    def stop(self):
        self.running = False
        self.steps = 0

    # ---- what the robot does
    def look_again(self):
        """Forget the rest of the chunk: before the next step, look and paint."""
        self.chunk = []
        self.returning = 0  # steps left of a way back
        self.truth = None
        self.success = False

    def step(self):
        """One control step. The arm stops when the episode is over, or after MAX_STEPS."""
        if not self.chunk:
            self.decide()
        self.recording(self.env, self.painted, self.sentence)
        del self.recording.moments[: -MAX_SECONDS * CONTROL_HZ]
        self.observation, *_ = self.env.step(self.chunk.pop(0))
        self.views = camera_images(self.env)
        if self.returning:
            self.returning -= 1
            self.painted = self.views
            return
        self.steps += 1
        if self.guide == "hand":
            if self.steps >= HAND_STEPS:
                self.stop()
            return
        self.success = bool(self.env.task.success(self.env))
        if self.success:
            self.end("Done. Say something else, or reset.")
        elif self.env.task.failed(self.env):
            self.end("That was another one. Say something else, or reset.")
        elif self.steps >= MAX_STEPS:
            self.end(f"Not done after {MAX_STEPS} steps. Say something else, or reset.")

    def end(self, message: str):
        self.message = message
        self.is_over = True
        self.stop()

    def way_back(self) -> list[np.ndarray]:
        """Actions (8,) that lift the arm and bring it to where it began, with open fingers."""
        joints = self.observation["qpos"][:-1].astype(float)
        tool = self.env.tool_pose()
        above = tool[:3, 3] + (0, 0, LIFT)
        try:
            path = joint_path(self.env, tool, joints, above, tool[:3, :3], speed=0.3)
        except UserError:  # out of reach
            path = [joints]
        way = self.first_joints - path[-1]
        count = int(np.ceil(np.abs(way).max() * CONTROL_HZ / JOINT_SPEED)) + 1
        start = path[-1]
        path += [start + way * i / count for i in range(1, count + 1)]
        path += 2 * [self.first_joints]
        return [np.append(position, 1.0) for position in path]

    def decide(self):
        """Look, paint, and ask the controller for the next chunk."""
        qpos = self.observation["qpos"]
        self.views = camera_images(self.env)
        if self.guide == "painter":
            chunk, self.painted = self.genima.act(self.views, qpos, self.sentence)
        elif self.guide == "act":
            chunk, self.painted = self.act.act(self.views, qpos, self.sentence)
        else:
            self.painted = self.paint_truth() if self.guide == "truth" else self.paint_hand()
            chunk = follow(self.controller, self.painted, qpos, self.sentence, False)
        self.chunk = list(executable(chunk, self.env.action_space))

    def paint_truth(self) -> dict[str, np.ndarray]:
        """The views with the spheres of the scripted expert, who starts where the arm is."""
        if self.truth is None:
            self.truth = OraclePainter(self.demonstrate(), self.horizon)
        frame = self.truth.progress(self.observation["qpos"][:-1])
        return self.truth.paint(self.env, self.views, frame)

    def demonstrate(self):
        """What the scripted expert would do from here: qpos, action and joint_poses of each step.

        Raises UserError where a waypoint is out of reach.
        """
        blind = self.simulators.get(self.task, 0, ())
        blind.reset(seed=self.env.seed, options={"variation": self.env.variation})
        for name in ("qpos", "qvel", "ctrl", "mocap_pos", "mocap_quat"):
            getattr(blind.data, name)[:] = getattr(self.env.data, name)
        mujoco.mj_forward(blind.model, blind.data)
        demo = SimpleNamespace(qpos=[], action=[], joint_poses=[])
        for action in expert_actions(blind):
            demo.qpos.append(blind.observe()["qpos"])
            demo.action.append(action)
            demo.joint_poses.append(blind.joint_poses())
            blind.step(action)
        for name, values in vars(demo).items():
            setattr(demo, name, np.stack(values))
        return demo

    def paint_hand(self) -> dict[str, np.ndarray]:
        """The views with the spheres of an arm whose gripper is where the hand put it."""
        joint_poses = self.chain.forward_kinematics(self.hand_joints)
        painted = {}
        for camera, image in self.views.items():
            spheres = target_spheres(joint_poses, self.hand_open, camera)
            intrinsics, world_from_camera = self.env.camera_parameters(camera)
            layer = draw_spheres(*spheres, intrinsics, world_from_camera, *image.shape[:2])
            painted[camera] = alpha_composite(layer, image)
        return painted

    # ---- what there is to see
    def scene(self) -> np.ndarray:
        """The robot as it is now, for people: (360, 480, 3) uint8."""
        return self.camera.render(snapshot(self.env))

    def heat_maps(self, kind: str) -> dict[str, np.ndarray]:
        """Where each word of the sentence acts, a picture for each. kind: a key of HEAT_MAPS.

        Raises UserError.
        """
        if kind not in HEAT_MAPS:
            raise UserError(f"There is no heat map '{kind}': choose from {', '.join(HEAT_MAPS)}.")
        self.views = camera_images(self.env)
        maps = HEAT_MAPS[kind](self.genima.painter, self.views, self.sentence)
        return draw_word_maps(self.views, maps)

    def film(self, path: Path) -> Path:
        """Write what happened since the last reset, at most MAX_SECONDS. Raises UserError."""
        if not self.recording.moments:
            raise UserError("Nothing has happened yet: press Run first.")
        moments = [*self.recording.moments]
        self.recording(self.env, self.painted, self.sentence)
        moments.append(self.recording.moments.pop())
        camera = PeopleCamera(self.env)
        try:
            success = self.success if not self.running else None
            frames = film_frames(camera, moments, success, PAINTED_NAMES[self.guide])
            write_video(path, frames, FPS)
        finally:
            camera.close()
        return path
