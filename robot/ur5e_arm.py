"""A UR5e and its Robotiq gripper, through `ur_rtde`: read the state, send a command, stop.

    robot = UR5e("192.168.0.10", safety)         the methods of robot/arm.py's Franka:
    now, qpos, qvel = robot.state()              s; (7,) rad and gripper opening 0..1; (7,) rad/s
    robot.send(joints, velocity)                 (6,) rad, (6,) rad/s: returns at once
    robot.grip(opened=True)                      returns at once
    robot.hold()                                 brake, then give the control back

UNTESTED ON AN ARM: tests/test_ur5e.py has a stand-in of the calls, with their documented names and
arguments.

A UR's servoJ wants a position every few milliseconds, and the policy sends ten a second. A thread
fills in the positions between. What stops by itself:
- a command that is late by more than PATIENCE: the thread ends the motion (servoStop);
- a program that dies: the controller misses the thread's watchdog and ends its own program;
- a command outside the limits: it is refused before anything is sent.
"""

import threading
import time
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from genima.files import UserError
from robot.arm import BRAKING, CONTROL_HZ, Fault, one_line
from robot.robotiq import Robotiq

STREAM_HZ = 125.0  # positions a second
LOOKAHEAD = 0.1  # seconds, of servoJ: 0.03 to 0.2, more is smoother
GAIN = 300.0  # of servoJ: 100 to 2000, more follows closer
PATIENCE = 0.3  # seconds that the next command may take, three times what it should
GRACE = 0.03  # seconds that a motion continues when the next command is late
DECELERATION = 10.0  # m/s^2, of servoStop
MIN_WATCHDOG_HZ = 10.0
MISSING = "pip install -r requirements-robot.txt"


@dataclass
class Segment:
    """The way from one command to the next: a cubic in each joint."""

    begin: float  # s of time.monotonic()
    start: np.ndarray  # (6,) rad
    start_velocity: np.ndarray  # (6,) rad/s
    end: np.ndarray
    end_velocity: np.ndarray

    def at(self, now: float) -> tuple[np.ndarray, np.ndarray]:
        """Position (6,) rad and velocity (6,) rad/s; after the end it rolls on for GRACE."""
        duration = 1 / CONTROL_HZ
        elapsed = now - self.begin
        if elapsed >= duration:
            late = min(elapsed - duration, GRACE)
            return self.end + late * self.end_velocity, self.end_velocity
        s = elapsed / duration
        way = self.end - self.start
        before = duration * self.start_velocity
        after = duration * self.end_velocity
        cubic = before + after - 2 * way
        square = 3 * way - 2 * before - after
        position = self.start + s * (before + s * (square + s * cubic))
        velocity = (before + s * (2 * square + 3 * s * cubic)) / duration
        return position, velocity


class UR5e:
    """A connection to the arm. Threads stream its positions and operate its gripper."""

    def __init__(self, host: str, safety, moves: bool = True):
        """safety: robot/safety.py's. moves: take control; False only listens, so that a person can
        guide the arm with the teach pendant's freedrive."""
        self.safety = safety
        self.lock = threading.Lock()
        self.segment = None
        self.servoing = False
        self.stopped = threading.Event()
        self.closing = threading.Event()
        self.error = None
        self.gripper_target = None  # True: open, False: closed, None: leave it as it is
        self.control = None
        self._connect(host, moves)
        self.clock = 0.0  # the robot's, s
        self.heard = time.monotonic()  # when the robot's clock last advanced
        self.threads = [threading.Thread(target=self._operate_gripper, daemon=True)]
        if moves:
            self.threads.append(threading.Thread(target=self._stream, daemon=True))
        for thread in self.threads:
            thread.start()

    def _connect(self, host, moves):
        try:
            import rtde_control
            import rtde_receive
        except ImportError as error:
            raise UserError(f"ur_rtde is not installed ({error}): {MISSING}.") from None
        try:
            self.receive = rtde_receive.RTDEReceiveInterface(host)
            self.gripper = Robotiq(host)
            self.opening = self.gripper.opening()
            if moves:
                self.control = rtde_control.RTDEControlInterface(host, STREAM_HZ)
                self.control.setWatchdog(MIN_WATCHDOG_HZ)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"No connection to the robot at {host} ({one_line(error)}): is it on, in remote "
                "control, and is the Robotiq URCap installed?"
            ) from None

    # ------------------------------------------------------------------------------------- the arm
    def state(self) -> tuple[float, np.ndarray, np.ndarray]:
        """time.monotonic(); joint positions and gripper opening 0..1 (7,); their velocities (7,).

        The gripper's velocity is unknown here: 0. Raises a Fault when arm or gripper failed, or
        when the robot is silent.
        """
        if self.error:
            raise Fault(self.error)
        try:
            self._check_robot()
            joints = self.receive.getActualQ()
            rates = self.receive.getActualQd()
            clock = self.receive.getTimestamp()
        except Fault:
            raise
        except Exception as error:
            raise Fault(f"The robot stopped ({one_line(error)}): see its pendant.") from None
        now = time.monotonic()
        if clock != self.clock:
            self.clock = clock
            self.heard = now
        self.safety.check_robot_clock(now - self.heard)
        return now, np.append(joints, self.opening), np.append(rates, 0)

    def _check_robot(self):
        if self.receive.isEmergencyStopped():
            raise Fault("The emergency stop is pressed: release it, and start the robot again.")
        if self.receive.isProtectiveStopped():
            raise Fault("The robot made a protective stop: free it, and unlock it on its pendant.")
        if not self.receive.isConnected():
            raise Fault("The robot ended the connection: check network and power.")
        if self.control is not None and not self.control.isProgramRunning():
            raise Fault("The robot's program has ended: is it in remote control?")

    def send(self, joints: np.ndarray, velocity: np.ndarray):
        """Move to joint positions (6,) and pass them at a velocity (6,), from any motion.

        Raises a Fault, and sends nothing, for a command outside the limits.
        """
        if self.error:
            raise Fault(self.error)
        with self.lock:
            now = time.monotonic()
            if self.segment is None:
                start = np.array(self.receive.getActualQ())
                start_velocity = np.zeros(6)
            else:
                start, start_velocity = self.segment.at(now)
            self.safety.check_command(start, joints)
            self.segment = Segment(now, start, start_velocity, joints.copy(), velocity.copy())
            self.stopped.clear()

    def grip(self, opened: bool):
        """Open or close the gripper, in its thread; `state` reports a failure."""
        self.gripper_target = opened

    def brake(self):
        """Stop the motion and hold the position. Never raises: there may be an error already."""
        with self.lock:
            was_moving = self.segment is not None
            self.segment = None
        if was_moving:
            self.stopped.wait(BRAKING)

    def hold(self):
        """End the session: the gripper is left as it is, the arm brakes and holds."""
        self.brake()
        self.closing.set()
        for thread in self.threads:
            thread.join(BRAKING)
        with suppress(Exception):  # no connection: the controller's watchdog stops the arm
            if self.control is not None:
                self.control.stopScript()
        with suppress(Exception):
            self.gripper.close()

    # ------------------------------------------------------------------------------------ threads
    def _stream(self):
        """In a thread: send the position of this moment, 125 times a second."""
        try:
            while not self.closing.is_set():
                period = self.control.initPeriod()
                self._stream_one()
                self.control.kickWatchdog()
                self.control.waitPeriod(period)
        except Exception as error:
            self.error = f"The robot stopped ({one_line(error)}): see its pendant."
        with suppress(Exception):
            self.control.servoStop(DECELERATION)
        self.stopped.set()

    def _stream_one(self):
        with self.lock:
            now = time.monotonic()
            if self.segment is not None and now - self.segment.begin > PATIENCE:
                self.segment = None  # the next command is late
            segment = self.segment
        if segment is not None:
            position = segment.at(now)[0].tolist()
            if not self.control.servoJ(position, 0.0, 0.0, 1 / STREAM_HZ, LOOKAHEAD, GAIN):
                raise RuntimeError("servoJ was refused")
            self.servoing = True
        elif self.servoing:
            self.control.servoStop(DECELERATION)
            self.servoing = False
            self.stopped.set()

    def _operate_gripper(self):
        """In a thread: read the opening, and bring the gripper to where it is wanted."""
        sent = None
        try:
            while not self.closing.wait(0.03):
                target = self.gripper_target
                if target != sent:
                    self.gripper.move(target)
                    sent = target
                self.opening = self.gripper.opening()
        except Exception as error:
            if not self.closing.is_set():
                self.error = f"The gripper no longer answers ({one_line(error)}): see its light."
