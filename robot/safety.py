"""All that keeps the arm from doing harm, except the robot's own reflexes.

Every check raises a Fault, one sentence; the control loop then makes the arm hold. Each command
goes through `limit_step` before it is sent.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from genima.files import UserError, write_whole
from genima.plots import same_size
from genima.robots import JOINT_LIMITS, robot_chain
from robot.arm import CONTROL_HZ, Fault

# rad/s, of each joint (data sheets; for the Franka the lower of Panda's and FR3's).
FRANKA_VELOCITY = np.array([2.175] * 4 + [2.61] * 3)
MAX_VELOCITY = {"fr3": FRANKA_VELOCITY, "panda": FRANKA_VELOCITY, "ur5e": np.full(6, np.pi)}
# Where the fingertips may go, m. The table is at 0; a target may be a little below what it presses.
WORKSPACE = (0.2, -0.5, -0.01, 0.8, 0.5, 0.75)


class StaleFrames(Fault):
    """A camera has sent nothing for too long. It may come back."""


@dataclass
class Safety:
    arm: str = "fr3"
    speed: float = 0.2  # fraction of the joints' maximum velocities
    workspace: tuple = WORKSPACE  # x, y, z from; x, y, z to
    watchdog: float = 0.5  # s that the policy may be late
    stale: float = 0.25  # s that a picture, or the robot's clock, may be old

    passing = 0.99  # of --speed: the planner refuses a target passed at its maximum and a rounding
    margin = 0.05  # rad that commands keep away from the joints' limits
    jump = 0.35  # rad from a command to the next target: thrice a fast demonstration's step

    def __post_init__(self):
        if not 0 < self.speed <= 1:
            raise UserError("--speed must be above 0 and at most 1.")
        ordered = np.less(self.workspace[:3], self.workspace[3:]).all()
        if not (ordered and self.watchdog > 0):  # false for NaN, too
            raise UserError(
                "--workspace is x, y, z from and x, y, z to, each from below its to, "
                "and --watchdog must be above 0."
            )
        self.chain = robot_chain(self.arm)
        self.max_velocity = MAX_VELOCITY[self.arm]
        low, high = JOINT_LIMITS[self.arm]
        self.low = np.array(low) + self.margin
        self.high = np.array(high) - self.margin

    # ---------------------------------------------------------------------- the policy's commands
    def check_chunk(self, chunk: np.ndarray):
        """What the policy gave must be finite and of shape (K, D+1)."""
        width = len(self.low) + 1
        if chunk.ndim != 2 or chunk.shape[1] != width or not np.isfinite(chunk).all():
            raise Fault(
                "The policy gave NaN or infinite numbers: see the log's pictures. "
                "Is a camera covered, did training diverge?"
            )

    def limit_step(self, previous: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, float]:
        """The next command (D,) on the way from the previous one (D,) to the policy's target (D,).

        Returns the command, and the fraction of the way that it covers. A target that is merely
        fast is approached at the maximum speed, and the chunk is played more slowly. One that no
        demonstration would make, or that is out of bounds, is refused. The way back into bounds
        is free: a hand may have led the arm out.
        """
        change = self.check_jump(previous, target)
        speed = (CONTROL_HZ * change / self.max_velocity).max()  # as a fraction of the maximum
        fraction = 1 / max(1.0, speed / self.speed)
        command = previous + fraction * (target - previous)
        self.check_joint_limits(previous, command)
        self.check_workspace(previous, command)
        return command, fraction

    def check_command(self, previous: np.ndarray, command: np.ndarray):
        """For an arm that checks by itself what it is sent: no jump, and within the limits."""
        self.check_jump(previous, command)
        self.check_joint_limits(previous, command)

    def check_jump(self, previous: np.ndarray, target: np.ndarray) -> np.ndarray:
        """A target must be near the previous command. Returns by how much each joint turns (D,)."""
        change = np.abs(target - previous)
        if not change.max() <= self.jump:  # false for NaN, too
            raise Fault(
                f"The policy wants joint {change.argmax() + 1} to jump by {change.max():.2f} rad; "
                f"{self.jump} are allowed."
            )
        return change

    def limit_passing(self, velocity: np.ndarray) -> np.ndarray:
        """The velocity (D,), rad/s, at which the arm may pass a target: below its maximum."""
        fastest = self.passing * self.speed * self.max_velocity
        return velocity.clip(-fastest, fastest)

    def check_joint_limits(self, previous: np.ndarray, command: np.ndarray):
        """A command must not leave the joints' limits, or leave them further."""
        beyond = np.maximum(self.low - command, command - self.high)  # rad, negative inside
        before = np.maximum(self.low - previous, previous - self.high)
        further = beyond > np.maximum(before, 0)
        if further.any():
            joint = int(np.where(further, beyond, 0).argmax())
            raise Fault(
                f"The policy wants joint {joint + 1} at {command[joint]:.2f} rad; "
                f"{self.low[joint]:.2f} to {self.high[joint]:.2f} are allowed."
            )

    def check_workspace(self, previous: np.ndarray, command: np.ndarray):
        """A command must not bring the fingertips out of the workspace, or further out."""
        tool = self.chain.forward_kinematics(command)[-1, :3, 3]  # metres
        before = self.chain.forward_kinematics(previous)[-1, :3, 3]
        if self.distance_outside(tool) > self.distance_outside(before):
            raise Fault(
                f"The policy wants the fingertips at {tool.round(3).tolist()}, "
                f"outside the --workspace {self.workspace}."
            )

    def distance_outside(self, tool: np.ndarray) -> float:
        """By how many metres a point (3,) is outside the workspace, 0 inside."""
        below = np.subtract(self.workspace[:3], tool)
        above = np.subtract(tool, self.workspace[3:])
        return max(np.maximum(below, above).max(), 0)

    # --------------------------------------------------------------- the arm, cameras, the policy
    def check_velocity(self, qvel: np.ndarray):
        fractions = np.abs(qvel[:-1] / self.max_velocity)
        if (fractions > 0.95).any():
            raise Fault(
                f"Joint {fractions.argmax() + 1} moves at more than 95 % of its maximum velocity."
            )

    def check_frames(self, stamps: dict[str, float], now: float):
        """stamps: camera -> when its newest picture was taken, s; 0 before the first."""
        oldest = min(stamps, key=stamps.get)
        age = now - stamps[oldest]
        if age <= self.stale:
            return
        since = ""
        if stamps[oldest]:
            since = f" for {age:.1f} s"
        raise StaleFrames(f"Camera '{oldest}' has sent no picture{since}: check its cable.")

    def check_robot_clock(self, seconds: float):
        """seconds: since the robot's clock last advanced."""
        if seconds > self.stale:
            raise Fault(f"The robot has been silent for {seconds:.1f} s: check network and power.")

    def check_watchdog(self, seconds: float):
        """seconds: since the policy was asked."""
        if seconds > self.watchdog:
            raise Fault(
                f"The policy is late by more than {self.watchdog} s (--watchdog): "
                "is the machine busy, or the network too large?"
            )

    # ----------------------------------------------------------------------------------- a person
    def confirm(self, painted: dict, path: Path, ask):
        """Before the first motion a person sees the painted target, and says yes.

        ask: a function of the question; None where nobody has to be asked.
        """
        with write_whole(path) as temporary:
            picture = np.concatenate(same_size(list(painted.values())), axis=1)
            Image.fromarray(picture).save(temporary, format="png")
        print(f"The painted target is in {path}.")
        if ask is None:
            return
        question = (
            "Is it where the gripper should go, and is the stop button in your hand? "
            "y Enter moves the arm: "
        )
        if ask(question) != "y":
            raise Fault("Not confirmed, so nothing was sent.")
