"""A Robotiq gripper on a UR's wrist, through the socket that its URCap opens on the controller.

    gripper = Robotiq("192.168.0.10")
    gripper.opening()                    0 closed .. 1 open
    gripper.move(opened=False)           returns at once

The URCap answers lines of text: `GET POS` with `POS 230`, `SET POS 0` with `ack`. Not tried on a
gripper: tests/test_ur5e.py has a stand-in of the socket.
"""

import socket

import numpy as np

from genima.files import UserError

PORT = 63352
TIMEOUT = 2.0  # seconds for an answer
OPEN = 3  # positions of a 2F-85, 0 to 255, where its fingers stop
CLOSED = 230
SPEED = 255  # the fastest
FORCE = 50  # of 255, gentle
ACTIVE = 3  # the status of a gripper that is ready


class Robotiq:
    """Raises OSError where the gripper does not answer, ValueError for an answer of other form."""

    def __init__(self, host: str, port: int = PORT):
        self.socket = socket.create_connection((host, port), TIMEOUT)
        self.answers = self.socket.makefile("r", encoding="ascii", newline="\n")
        if self.get("STA") != ACTIVE:
            # Activation opens and closes the fingers: a person does that.
            raise UserError("The gripper is not active: activate it on the teach pendant.")
        self.set(SPE=SPEED, FOR=FORCE, GTO=1)

    def get(self, name: str) -> int:
        """One of the gripper's variables."""
        self.socket.sendall(f"GET {name}\n".encode())
        answer = self.answers.readline().split()
        if len(answer) != 2 or answer[0] != name:
            raise ValueError(f"it answers {answer} to GET {name}")
        return int(answer[1])

    def set(self, **variables: int):
        """Set some of its variables at once."""
        pairs = " ".join(f"{name} {value}" for name, value in variables.items())
        self.socket.sendall(f"SET {pairs}\n".encode())
        answer = self.answers.readline().strip()
        if answer != "ack":
            raise ValueError(f"it answers '{answer}' to SET {pairs}")

    def opening(self) -> float:
        """0 closed .. 1 open."""
        return float(np.clip((CLOSED - self.get("POS")) / (CLOSED - OPEN), 0, 1))

    def move(self, opened: bool):
        """Open, or close until the fingers meet something."""
        self.set(POS=0 if opened else 255)

    def close(self):
        self.socket.close()
