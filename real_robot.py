"""Stage 5: the control loop on a Franka or a UR5e, or on a simulated arm behind Franka's protocol.

    In:   runs/demo/controlnet/, runs/demo/act/          the trained painter and controller (run)
    Out:  runs/demo/episodes/<task>/real_<time>.hdf5     a demonstration                    (record)
          runs/demo/robot/<time>_<task>/log.hdf5         an episode file that also holds painted
                                                         targets, timings and events        (run)
          first_target.png, timing.png beside it                                            (run)
          film.mp4, film.png beside it                                                      (replay)
          calibration.yaml                               where the cameras are        (calibrate)

    python real_robot.py run                         the simulated arm
    python real_robot.py run --robot 172.16.0.2 --calibration calibration.yaml
                             --cameras front=832112070001 wrist=opencv:0 ...
    python real_robot.py record --robot 172.16.0.2 --task fold_cloth ...   guide the arm by hand;
                                                     without --robot a script guides it
    python real_robot.py replay runs/demo/robot/<time>_<task>    --keep adds it to the episodes
    python real_robot.py calibrate --help            find where a camera is, with a printed board

Paper, sections 3.3 and 4.3: observe, paint the target, turn it into a chunk of joint positions,
follow the chunk at 10 Hz, observe again. The next target is painted during the motion, in another
process. Action 0 of a chunk belongs to the moment of its picture, which is over when the chunk
arrives: the motion continues with action 1 and never pauses. Whatever fails, the arm holds its
position, the log is written, and one sentence says what it was.
"""

import sys
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from tqdm import tqdm

from genima.episodes import read_episode
from genima.files import UserError, run_stage
from robot.arm import CONTROL_HZ, Fault
from robot.chunks import ChunkFollower
from robot.policy_process import PolicyProcess, load_policy
from robot.recording import recover, replay, write_timing
from robot.safety import WORKSPACE, Safety, StaleFrames
from robot.session import session, stop_on_signals
from robot.workcell import Observer, check_numbers, open_workcell, prompt_user

TIME_FORMAT = "%Y%m%d-%H%M%S"  # in the names of recordings
CAMERA_PAUSE = 2  # seconds that the arm holds and waits for a camera that sends nothing


# --------------------------------------------------------------------------------------- settings
@dataclass
class Settings:
    run: Path = Path("runs/demo")
    """Folder of the run: controlnet/ and act/ are read, robot/ or episodes/<task>/ is written."""
    robot: str = "sim"
    """Host name or address of the robot; sim: simulated, over the robot's own protocol."""
    arm: Literal["fr3", "panda", "ur5e"] = "fr3"
    """Which arm it is: its driver, kinematics and joint limits (simulated: fr3)."""
    task: str = "pick_and_lift"
    """The task's name; in the simulator one of sims/mujoco_tasks.py."""
    instruction: str = ""
    """What to do; empty: the simulated scene's own, or asked for."""
    calibration: Path | None = None
    """JSON or YAML file of the cameras, as real_robot.py calibrate writes it."""
    cameras: tuple[str, ...] = ()
    """Cameras as name=serial (RealSense), name=opencv:0, name=opencv:/dev/video2, or
    name=opencv:0:left and name=opencv:0:right (two views in one picture); names as in the
    calibration file. In the simulator: which of its four to use, also under the policy's names
    (hand_cam=wrist room=front); all if none is named."""
    seed: int = 0
    """In the simulator: the first scene."""
    yes: bool = False
    """Begin at once, without asking (in the simulator nobody is asked)."""


@dataclass
class Run(Settings):
    policy: Literal["trained", "demonstrator"] = "trained"
    """trained: painter and controller; demonstrator: a script that knows the simulated scene."""
    speed: float | None = None
    """Fraction of the joints' maximum velocities; unset: 0.2, and 1 in the simulator."""
    workspace: tuple[float, float, float, float, float, float] = WORKSPACE
    """Where the fingertips may go: x, y, z from and x, y, z to, metres from the robot's base."""
    watchdog: float = 0.5
    """Seconds that the policy may be late, once the arm moves, before it is stopped."""
    execution_horizon: int = 7
    """Steps of a chunk to run before the next one takes over (one of 8 passes meanwhile)."""
    steps: int = 0
    """Stop after so many steps; 0: the simulated task's number, or 300."""
    episodes: int = 1
    """In the simulator: how many scenes, one after the other."""
    dry_run: bool = False
    """Compute and show everything, send nothing."""
    device: str = "cpu"
    """Where the networks run: cpu, cuda, mps."""


@dataclass
class Record(Settings):
    size: int = 0
    """Keep the middle square of the pictures at so many pixels; 0: all of it, 480x640."""
    seconds: float = 0.0
    """Stop by itself after so long; 0: at Enter (in the simulator, when the script is done)."""
    seed: int = 500_000
    """In the simulator: the scene."""


@dataclass
class Replay:
    log: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, or its log.hdf5."""
    keep: bool = False
    """Add the run to the demonstrations, <run>/episodes/<task>, for the next policy."""


@dataclass
class Calibrate:
    arm: Annotated[Literal["fr3", "panda", "ur5e"], tyro.conf.arg(aliases=["--robot"])] = "fr3"
    """Which arm it is: its kinematics. Here --robot is another name for --arm."""
    images: Path = Path("pictures")
    """Folder with <camera>/000.png, ... and joints.csv; or an episode file."""
    camera: str = "front"
    """Name of the camera to calibrate."""
    on_arm: bool | None = None
    """Whether the camera sits on the hand; by default only the one called wrist does."""
    calibration: Path = Path("calibration.yaml")
    """The file to write the camera into; cameras that it holds already are kept."""
    square: float = 0.030
    """Side of a square in metres: measure it on the printed board."""
    print_board: Path | None = None
    """Only write the board to this .pdf or .png file, at its true size."""


# ------------------------------------------------------------------------------- the control loop
def control_loop(robot, observer, follower, safety, log, dry_run, steps, is_over, lateness):
    """Ten times a second: read and check, plan and send, observe and log, ask for the next chunk.

    Returns when `is_over()` or after `steps` commands; appends to `lateness` how late each command
    was, s.
    """
    start = time.monotonic() + 1 / CONTROL_HZ
    tick = 0
    while len(lateness) < steps and not is_over():
        # 1. Read the arm and the cameras, and check them, until the next command is due.
        due = start + tick / CONTROL_HZ
        observer.wait_until(due)
        late = time.monotonic() - due
        reached = observer.qpos

        # 2. Plan the next command within the limits, and send it.
        fraction = 0.0
        planned = follower.next_command()
        if planned is not None:
            command, velocity, fraction = planned
            if not dry_run:
                robot.send(command, velocity)
                robot.grip(follower.opened)
            lateness.append(late)

        # 3. Observe, check and log.
        observation = observer.observe(follower.cameras, follower.size)
        safety.check_velocity(observation.qvel)
        log.add(
            observation.images,
            follower.painted,
            time=time.monotonic(),
            frame=observation.stamp,
            late=late,
            latency=follower.latency,
            progress=fraction,
            qpos=observation.qpos,
            qvel=observation.qvel,
            action=np.append(follower.previous, follower.opened),
            reached=reached,
        )

        # 4. Ask for the next chunk, and take it over once it is there.
        follower.request_in_time(observation, fraction, due)
        tick += 1
        observer.wait_until(start + tick / CONTROL_HZ - 0.012)
        follower.receive(observer.qpos)


def drive(robot, workcell, policy, safety, log, settings, instruction, steps, is_over):
    """Show the first target, then follow the policy. Returns how late each command was, s."""
    observer = Observer(robot, workcell, safety)
    follower = ChunkFollower(policy, safety, settings, instruction, log)
    follower.ask_at_rest(observer)
    ask = prompt_user
    if settings.yes or settings.robot == "sim" or settings.dry_run:
        ask = None
    safety.confirm(follower.painted, log.path.with_name("first_target.png"), ask)
    log.event("the first target was confirmed")
    observer.wait_for_frames(CAMERA_PAUSE)
    lateness = []
    while True:
        follower.ask_at_rest(observer)  # again: a person may have taken her time
        try:
            control_loop(
                robot, observer, follower, safety, log, settings.dry_run, steps, is_over, lateness
            )
            return lateness
        except StaleFrames as fault:
            robot.brake()
            log.event(f"paused: {fault}")
            observer.wait_for_frames(CAMERA_PAUSE)  # raises the same if it does not come back


# -------------------------------------------------------------------------------------------- run
def never() -> bool:
    return False


def run_episode(settings, policy, workcell):
    """One episode. Returns whether it succeeded."""
    speed = settings.speed
    if speed is None:
        speed = 1.0 if workcell.simulated else 0.2
    safety = Safety(settings.arm, speed, settings.workspace, settings.watchdog)
    folder = settings.run / "robot" / f"{time.strftime(TIME_FORMAT)}_{settings.task}"
    cameras = policy.config["cameras"]
    size = policy.config["image_size"]
    steps = settings.steps or workcell.max_steps
    is_over = workcell.is_over
    if settings.steps and workcell.simulated:
        is_over = never
    with session(settings, workcell, safety, folder / "log.hdf5", cameras, size) as opened:
        robot, log, instruction = opened
        lateness = drive(
            robot, workcell, policy, safety, log, settings, instruction, steps, is_over
        )
    if lateness:
        write_timing(folder / "timing.png", lateness)
    if workcell.simulated and workcell.get("lost") > 0.2:
        print(
            "This machine was too busy for the simulated arm: "
            f"its clock fell behind by {workcell.get('lost'):.1f} s."
        )
    log = read_episode(folder / "log.hdf5", images=False)
    outcome = "done" if log.success else "not done"
    print(f"{log.instruction}: {outcome}; the log is {log.path}.")
    return log.success


def run(settings, load=None, workcell=None):
    """load: makes the policy, in its process; workcell: one that runs already (both for tests)."""
    if settings.robot != "sim" and (settings.policy == "demonstrator" or settings.episodes > 1):
        raise UserError(
            "--policy demonstrator and --episodes are for the simulated scene alone: "
            "use a trained policy, once, on a robot."
        )
    for folder in (settings.run / "act", settings.run / "controlnet"):
        if settings.policy == "trained" and not load and not folder.is_dir():
            raise UserError(
                f"There is no checkpoint {folder}: train it first, or try --policy demonstrator."
            )
    recover(settings.run)
    first = settings.seed
    seeds = range(first, first + settings.episodes)
    successes = 0
    for seed in tqdm(seeds, desc="episodes", disable=settings.episodes == 1):
        settings.seed = seed
        try:
            with nullcontext(workcell) if workcell else closing(open_workcell(settings)) as cell:
                loader = load or partial(load_policy, settings.run, settings.device)
                if settings.policy == "demonstrator":
                    loader = cell.load_demonstrator
                with closing(PolicyProcess(loader)) as policy:
                    successes += run_episode(settings, policy, cell)
        except Fault as error:
            if settings.episodes == 1:
                raise
            print(f"Seed {seed}: {error}", file=sys.stderr)
    if settings.episodes > 1:
        print(
            f"{successes} of {settings.episodes} episodes of {settings.task} succeeded "
            f"(seeds {first} to {seeds[-1]})."
        )


# ----------------------------------------------------------------------------------------- record
def record(settings):
    """One demonstration. Every frame has new pictures: where a camera is late, the frame waits,
    and those after it catch up. Returns the episode's path."""
    recover(settings.run)
    size = (settings.size, settings.size) if settings.size else None
    # The simulated cameras take 26 ms for a picture of 480x640, 2 ms for one of 64x64.
    options = {"size": size} if size else {"size": (480, 640), "fps": CONTROL_HZ}
    safety = Safety(settings.arm, stale=CAMERA_PAUSE)  # nothing is sent: a camera may pause
    path = settings.run / "episodes" / settings.task / f"real_{time.strftime(TIME_FORMAT)}.hdf5"
    with closing(open_workcell(settings, **options)) as workcell:
        names = list(workcell.calibration)
        with session(settings, workcell, safety, path, names, size) as (robot, log, _):
            workcell.start_demonstration(settings)
            observer = Observer(robot, workcell, safety)
            stamps = workcell.read_frames()[0]
            start = None
            while settings.seconds == 0 or log.count < settings.seconds * CONTROL_HZ:
                if start:
                    observer.wait_until(start + log.count / CONTROL_HZ)
                while has_old_frame(workcell, stamps):
                    observer.wait_until(time.monotonic() + 0.02)
                now = time.monotonic()
                if start is None:
                    start = now + 0.5 / CONTROL_HZ  # midway between two pictures
                observation = observer.observe(names, size)
                stamps = observation.stamps
                log.add(
                    observation.images,
                    time=now,
                    frame=observation.stamp,
                    late=now - start - log.count / CONTROL_HZ,
                    qpos=observation.qpos,
                    qvel=observation.qvel,
                )
                if log.count % CONTROL_HZ == 0:
                    print(f"\rrecording, {log.count // CONTROL_HZ} s ", end="", flush=True)
                if settings.seconds == 0 and log.count > CONTROL_HZ and workcell.is_over():
                    break
    print(f"\n{log.count} frames are in {path}.")
    return path


def has_old_frame(workcell, stamps):
    """Whether a camera's newest frame is still the one with this stamp {camera: s}."""
    newest = workcell.read_frames()[0]
    return any(newest[camera] == stamps[camera] for camera in stamps)


def calibrate(settings):
    from robot import calibrate  # OpenCV, which the other commands do not need

    calibrate.calibrate(settings)


def main():
    stop_on_signals()
    commands = {"run": Run, "record": Record, "replay": Replay, "calibrate": Calibrate}
    settings = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    functions = {Run: run, Record: record, Replay: replay, Calibrate: calibrate}
    if isinstance(settings, Settings):
        check_numbers(settings)
    functions[type(settings)](settings)


if __name__ == "__main__":
    run_stage(main)
