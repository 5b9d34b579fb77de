"""One session with the arm: it begins with a connection and a recording, and always ends safely."""

import signal
import sys
from contextlib import contextmanager

from genima.files import UserError
from robot.arm import Fault, Franka
from robot.cameras import resize_and_crop
from robot.recording import Recording
from robot.ur5e_arm import UR5e

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stop_on_signals():
    """SIGTERM and SIGHUP end the program as Ctrl-C does: with a KeyboardInterrupt."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup does it
            signal.signal(number, signal.default_int_handler)


def connect(settings, host, safety):
    """The arm of these settings. A demonstration and a dry run only listen to a UR5e."""
    if settings.arm == "ur5e":
        return UR5e(host, safety, moves=not getattr(settings, "dry_run", True))
    return Franka(host, safety)


@contextmanager
def session(settings, workcell, safety, path, cameras, size):
    """Yields robot, log, instruction to a block that makes the episode `path`.

    Whatever ends the block, a fault, a signal or its last line: first the arm holds, then the log
    is written, then a sentence says why.
    """
    images = workcell.read_frames()[1]
    calibration = {}
    for camera in cameras:
        if camera not in images:
            raise UserError(
                f"The policy was trained with camera '{camera}', which --cameras does not name: "
                f"add {camera}=<which>, in a rehearsal one of the simulator's ({camera}=front)."
            )
        entry = workcell.calibration[camera]
        intrinsics = resize_and_crop(images[camera], size, entry["intrinsics"])[1]
        calibration[camera] = entry | {"intrinsics": intrinsics}
    instruction = settings.instruction or workcell.instruction
    attributes = {
        "task": settings.task,
        "variation": workcell.variation,
        "instruction": instruction,
        "instructions": [instruction],
        "robot": settings.arm,
        "sim": workcell.simulated,
        "seed": workcell.seed,
    }
    robot = connect(settings, workcell.host, safety)
    log = Recording(path, attributes, calibration)
    error = None
    try:
        yield robot, log, instruction
    except BaseException as problem:
        error = problem
    handlers = {}
    for number in STOP_SIGNALS:  # a log that is half written helps nobody
        handlers[number] = signal.signal(number, signal.SIG_IGN)
    try:
        reason = "finished"
        if error:
            reason = f"stopped: {str(error) or type(error).__name__}"
        log.event(reason)
        robot.hold()
        success = not error and log.count > 0 and workcell.is_successful()
        path = log.finish(success)
    except OSError:
        print(
            f"What was recorded is kept in {log.folder}; "
            "the next start makes an episode file of it.",
            file=sys.stderr,
        )
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if error:
        kept = f"what was recorded is in {path}" if path else "nothing was recorded"
        print(f"The arm holds its position; {kept}.", file=sys.stderr)
        raise error
    if not path:
        raise Fault("It was ended before its first step, so nothing was recorded.")
