"""Following the policy's chunks: what to send next, and when to ask for the next chunk."""

import math
import time

import numpy as np

from robot.arm import CONTROL_HZ, Fault

FIRST_ANSWER = 60  # seconds that the policy may take while the arm rests


def interpolate(chunk: np.ndarray, position: float) -> np.ndarray:
    """The action (D+1,) between two steps of a chunk (K, D+1); the last one beyond its end."""
    steps = np.arange(len(chunk))
    return np.array([np.interp(position, steps, column) for column in chunk.T])


def passing_velocity(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The velocity (rad/s) at which a joint passes its target: the slower of the steps before and
    after it (rad), 0 where it turns or ends. Without it the arm would brake for every target."""
    slower = np.sign(after) * np.minimum(np.abs(before), np.abs(after))
    return CONTROL_HZ * np.where(before * after > 0, slower, 0)


class ChunkFollower:
    """What to send next, and when to ask for the next chunk.

    The way is counted in steps of a chunk; at low speed a command covers only part of a step.
    travelled: how far the arm was sent. origin: how far it was in the picture that the chunk was
    made from. The chunk's action 0 is one step from there.
    """

    def __init__(self, policy, safety, settings, instruction, log):
        self.policy = policy
        self.safety = safety
        self.settings = settings
        self.instruction = instruction
        self.log = log
        self.cameras = policy.config["cameras"]
        self.size = policy.config["image_size"]
        self.travelled = 0.0
        self.latency = 0.0  # s that the policy takes

    def ask_at_rest(self, observer):
        """Get a chunk while the arm rests: however long it takes, nothing can happen."""
        observation = observer.observe(self.cameras, self.size)
        self.requested = time.monotonic()
        self.policy.request(observation.images, observation.qpos, self.instruction, self.travelled)
        self.next_origin = self.travelled
        answer = self.policy.receive(FIRST_ANSWER)
        if answer is None:
            raise Fault(f"The policy gave no answer within {FIRST_ANSWER} s: is the machine busy?")
        self.accept(answer)
        observer.states.clear()  # they are older than the answer took
        observer.update()
        self.previous = observer.qpos[:-1]
        self.opened = bool(observer.qpos[-1] > 0.5)

    def accept(self, answer):
        """Take over a new chunk."""
        self.safety.check_chunk(answer.chunk)
        self.chunk = answer.chunk
        self.painted = answer.painted
        self.origin = self.next_origin
        self.requested = None
        self.latency = max(answer.seconds, 0.8 * self.latency)  # slowly forgotten
        self.log.event(f"a new target after {1000 * answer.seconds:.0f} ms")

    def next_command(self):
        """Joint positions (D,) that are safe, their velocity (D,), and the fraction of a step that
        they cover; None at the end of the chunk."""
        position = self.travelled - self.origin
        if position >= len(self.chunk):
            return None
        target = interpolate(self.chunk, position)[:-1]
        command, fraction = self.safety.limit_step(self.previous, target)
        self.travelled += fraction
        position += fraction
        following = interpolate(self.chunk, position)[:-1]  # the same at the chunk's end
        velocity = passing_velocity(command - self.previous, following - command)
        velocity = self.safety.limit_passing(velocity)
        step = min(math.ceil(position) - 1, len(self.chunk) - 1)
        self.opened = bool(self.chunk[step, -1] > 0.5)
        self.previous = command
        return command, velocity, fraction

    def request_in_time(self, observation, fraction: float, due: float):
        """Ask for the next chunk, so early that it is there when this one has been followed."""
        steps_meanwhile = math.ceil((self.latency + 0.015) * CONTROL_HZ)
        horizon = min(self.settings.execution_horizon, len(self.chunk) - steps_meanwhile)
        if self.requested is not None or self.travelled - self.origin < 1 + horizon:
            return
        self.requested = time.monotonic()
        self.policy.request(observation.images, observation.qpos, self.instruction, self.travelled)
        age = max(due - observation.stamp, 0)  # of the picture, s
        self.next_origin = self.travelled - fraction * (1 + CONTROL_HZ * age)

    def receive(self, qpos: np.ndarray):
        """Take over the next chunk if it is there; a Fault if it is late."""
        answer = self.policy.receive()
        if answer:
            self.accept(answer)
            if self.settings.dry_run:
                self.previous = qpos[:-1]
        elif self.requested is not None:
            self.safety.check_watchdog(time.monotonic() - self.requested)
