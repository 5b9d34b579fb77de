"""The Franka arm and its hand, through `franky-control`: read the state, send a command, stop.

    robot = Franka("172.16.0.2", safety)
    now, qpos, qvel = robot.state()          # s; (8,) rad and gripper opening 0..1; (8,) rad/s
    robot.send(joints, velocity)             # (7,) rad, (7,) rad/s: returns at once
    robot.grip(opened=True)                  # returns at once
    robot.hold()                             # brake, then hold the position

Whatever libfranka reports becomes a Fault: one sentence that says what to do.
"""

import re
import threading
import time
from contextlib import suppress

import numpy as np

from genima.files import UserError

CONTROL_HZ = 10  # commands a second (paper: 10 Hz and below on the real arm)
HAND_WIDTH = 0.08  # metres between the open fingers
GRIPPER_SPEED = 0.1  # m/s
GRIPPER_FORCE = 20.0  # N
BRAKING = 2  # seconds; the arm brakes in less than 0.4


class Fault(UserError):
    """Why the arm was stopped."""


# ------------------------------------------------------------------------------ libfranka's words
# A pattern in libfranka's message, and what to tell the user. The first match counts: a mode's
# name ("Reflex") follows the reasons for which the robot enters it.
ADVICE = {
    "cartesian_reflex": "it touched something: free it, and unlock it in Desk",
    "joint_reflex": "a joint met a force: free it, and unlock it in Desk",
    "communication_constraints": "commands came too late: connect by cable, quit other programs, "
    "use a real-time kernel",
    "velocity_violation|velocity_limit|acceleration|jerk|discontinuity": "a joint was to move too "
    "fast or too suddenly: lower --speed",
    "position_limits": "a joint is at its limit: guide it away by hand",
    "self_collision": "it would have touched itself: guide it away by hand",
    r"user.?stop": "the stop button is pressed: release it",
    "guiding": "somebody is guiding it by hand: let go of the buttons at its wrist",
    "safety function": "a rule in Watchman stops it: end the rule, or leave its zone",
    "automatic.?error.?recovery": "it is still recovering from an error: wait, and start again",
    "reflex|error recovery required": "an earlier reflex still locks it: free it, "
    "and acknowledge the error in Desk",
    "brakes|mode .*other": "its brakes are closed: unlock the joints in Desk",
    "incompatible.*version": "franky-control and the robot's system are of different versions: "
    "install the wheel for this system (requirements-robot.txt)",
    "FCI": "FCI is not active: activate it in Desk",
    "reset by peer|closed connection|interrupted": "it ended the connection: see in Desk that FCI "
    "is active and that no other program controls it",
    "time.?out|timed out|connection": "it does not answer: check network and power, "
    "and that FCI is active in Desk",
}


def one_line(error: object) -> str:
    return " ".join(str(error).split())


def find_advice(error: object) -> str | None:
    """What to do about an error of libfranka, or None for one that is not in the table."""
    for pattern, advice in ADVICE.items():
        if re.search(pattern, one_line(error), re.IGNORECASE):
            return advice
    return None


def explain(error: object) -> str:
    """An error of libfranka as one sentence."""
    advice = find_advice(error)
    if advice is None:
        return f"The robot stopped ({one_line(error)}): see in Desk why, and start again."
    return f"The robot stopped, {advice} ({one_line(error)})."


# ---------------------------------------------------------------------------------------- the arm
class Franka:
    """A connection to the arm. The gripper blocks while it moves, so a thread operates it."""

    def __init__(self, host: str, safety):
        """safety: `speed` and `check_robot_clock` of real_robot.py's Safety are used."""
        try:
            import franky
        except ImportError as error:
            raise UserError(
                f"franky-control is not installed ({error}): "
                "pip install -r requirements.txt (Linux on x86-64 only)."
            ) from None
        self.franky = franky
        self.safety = safety
        self.moving = False
        self.gripper_target = None  # True: open, False: closed, None: leave it as it is
        self.gripper_error = None
        try:
            self._connect(host)
        except Exception as error:
            advice = find_advice(error)
            if advice is None:
                advice = "is it on, unlocked, and is FCI active in Desk?"
            raise UserError(
                f"No connection to the robot at {host} ({one_line(error)}): {advice}"
            ) from None
        self.clock = 0.0  # the robot's, s
        self.heard = time.monotonic()  # when the robot's clock last advanced
        self.closing = threading.Event()
        threading.Thread(target=self._operate_gripper, daemon=True).start()

    def _connect(self, host):
        franky = self.franky
        self.robot = franky.Robot(host, realtime_config=franky.RealtimeConfig.Ignore)
        speed = self.safety.speed
        smoothness = max(speed, 0.5)  # with less acceleration and jerk the arm would lag behind
        self.robot.relative_dynamics_factor = franky.RelativeDynamicsFactor(
            speed, smoothness, smoothness
        )
        self.gripper = franky.Gripper(host)
        self.opening = self.gripper.width / HAND_WIDTH

    def state(self) -> tuple[float, np.ndarray, np.ndarray]:
        """time.monotonic(); joint positions and gripper opening 0..1 (8,); their velocities (8,).

        The gripper's velocity is unknown here: 0. Raises a Fault when arm or gripper failed, or
        when the robot is silent.
        """
        if self.gripper_error:
            raise Fault(self.gripper_error)
        try:
            if self.moving and not self.robot.is_in_control:
                self.robot.poll_motion()  # raises the reason
                raise RuntimeError("the motion ended by itself")
            state = self.robot.state
        except Exception as error:
            self.moving = False
            raise Fault(explain(error)) from None
        now = time.monotonic()
        clock = state.time.to_sec()
        if clock != self.clock:
            self.clock = clock
            self.heard = now
        self.safety.check_robot_clock(now - self.heard)
        return now, np.append(state.q, self.opening), np.append(state.dq, 0)

    def send(self, joints: np.ndarray, velocity: np.ndarray):
        """Move to joint positions (7,) and pass them at a velocity (7,), from any motion."""
        try:
            target = self.franky.JointState(joints, velocity)
            motion = self.franky.JointMotion(target, return_when_finished=False)
            self.robot.move(motion, asynchronous=True)
        except Exception as error:
            raise Fault(explain(error)) from None
        self.moving = True

    def grip(self, opened: bool):
        """Open or close the hand, in its thread; `state` reports a failure."""
        self.gripper_target = opened

    def brake(self):
        """Stop the motion and hold the position. Never raises: there may be an error already."""
        if not self.moving:
            return
        self.moving = False
        dynamics = self.franky.RelativeDynamicsFactor.MAX_DYNAMICS
        try:
            self.robot.move(self.franky.JointStopMotion(dynamics), asynchronous=True)
            self.robot.join_motion(BRAKING)  # without a connection libfranka needs a second
        except Exception:
            with suppress(Exception):  # no connection: the robot stops when commands end
                self.robot.stop()

    def hold(self):
        """End the session: the gripper is left as it is, the arm brakes and holds."""
        self.closing.set()
        self.brake()

    # ------------------------------------------------------------------------------------ gripper
    def _operate_gripper(self):
        """In a thread: read the opening, and bring the gripper to where it is wanted."""
        reached = None  # the target that was reached
        moving_to = None  # the target of the motion under way
        motion = None
        try:
            while not self.closing.wait(0.005):
                # The real hand answers about thirty times a second.
                self.opening = self.gripper.width / HAND_WIDTH
                target = self.gripper_target
                if moving_to is None:
                    if target is not None and target != reached:
                        moving_to = target
                        motion = self._move_gripper(target)
                elif motion.wait(0):
                    if not motion.get():
                        raise RuntimeError("it reports no success")
                    reached = moving_to
                    moving_to = None
        except Exception as error:
            failed = {None: "no longer answers", True: "did not open", False: "did not close"}
            what = f"{failed[moving_to]} ({one_line(error)})"
            self.gripper_error = f"The gripper {what}: free it, and home it in Desk."

    def _move_gripper(self, opened):
        if opened:
            return self.gripper.move_async(HAND_WIDTH, GRIPPER_SPEED)
        # The tolerances of the full width: whatever the closing fingers meet is held.
        return self.gripper.grasp_async(0.0, GRIPPER_SPEED, GRIPPER_FORCE, HAND_WIDTH, HAND_WIDTH)
