"""The policy in a process of its own: neither its threads nor Python's lock delay a command.

    policy = PolicyProcess(partial(load_policy, run, device))
    policy.config                                        cameras, image_size (H, W), horizon K
    policy.request(images, qpos, instruction, progress)  returns at once
    policy.receive()                                     Answer, or None while it is computing

A policy is a function act(images {camera: (H, W, 3)}, qpos (D+1,), instruction, progress) ->
chunk (K, D+1), painted {camera: (H, W, 3)}; progress counts the steps done and is used only by a
scripted policy.
"""

import multiprocessing
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genima.files import UserError
from genima.parallel import end_with_parent
from robot.arm import Fault, one_line

LOADING = 600  # seconds that a policy may take to load


@dataclass
class Answer:
    chunk: np.ndarray  # (K, D+1) joint positions (rad) and probability of an open gripper
    painted: dict  # {camera: (H, W, 3) uint8}
    seconds: float  # since the request


def load_policy(run: Path, device: str):
    """A run's painter and controller -> config (cameras, image_size, horizon), act."""
    import torch  # in this process alone: it takes seconds

    from genima import checkpoints

    torch.set_num_threads(1)
    policy = checkpoints.load_policy(run / "controlnet", run / "act", device)

    def act(images, qpos, instruction, progress):
        return policy.act(images, qpos, instruction)  # (K, D+1), {camera: (H, W, 3)}

    trained = policy.controller.config
    config = {name: trained[name] for name in ("cameras", "horizon")}
    config["image_size"] = None  # as the cameras give them
    if len(set(policy.image_sizes.values())) == 1:
        config["image_size"] = policy.image_size
    return config, act


# --------------------------------------------------------------------------- the policy's process
def serve_policy(load, pipe):
    """Load a policy, send its config, then answer one request at a time."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the main program's business
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        config, act = load()
        pipe.send(config)
        while True:
            asked, *request = pipe.recv()
            chunk, painted = act(*request)
            seconds = time.monotonic() - asked
            pipe.send(Answer(np.asarray(chunk, np.float64), painted, seconds))
    except (EOFError, BrokenPipeError):  # the main program has closed its end
        pass
    except UserError as error:
        pipe.send(Fault(str(error)))
    except Exception as error:
        pipe.send(Fault(f"The policy failed ({type(error).__name__}: {one_line(error)})."))


# ------------------------------------------------------------------------------- the main program
class PolicyProcess:
    def __init__(self, load):
        """load: a function that can be pickled, as load_policy. Returns when it is loaded."""
        context = multiprocessing.get_context("spawn")
        self.pipe, child_pipe = context.Pipe()
        self.process = context.Process(target=serve_policy, args=(load, child_pipe), daemon=True)
        self.process.start()
        child_pipe.close()
        try:
            self.config = self.receive(LOADING)
            if self.config is None:
                raise Fault(
                    f"The policy was not loaded within {LOADING} s: is the machine busy, "
                    "or the disk slow? Start it again."
                )
        except BaseException:
            self.close()
            raise

    def request(self, images: dict, qpos: np.ndarray, instruction: str, progress: float):
        """Ask for a chunk; it may take as long as it takes."""
        with suppress(OSError):  # `receive` reports that the process has ended
            self.pipe.send((time.monotonic(), images, qpos, instruction, progress))

    def receive(self, timeout: float = 0.0):
        """The Answer to the last request; None when it is not there within `timeout` seconds."""
        try:
            if not self.pipe.poll(timeout):
                return None
            answer = self.pipe.recv()
        except (EOFError, OSError):
            raise Fault("The policy's process has ended: is there enough memory?") from None
        if isinstance(answer, Fault):
            raise answer
        return answer

    def close(self):
        self.process.kill()
        self.process.join()
