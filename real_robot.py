"""Stage 5: the loop on a Franka arm, or on one simulated behind the robot's own network protocol.

In:   runs/demo/controlnet/, runs/demo/act/            the trained painter and controller   (run)
Out:  runs/demo/episodes/<task>/real_<time>.hdf5       demonstrations                       (record)
      runs/demo/robot/<time>_<task>/                   log.hdf5 (an episode file that also holds painted targets, commands, timings and
                                                       events), first_target.png, timing.png (run), film.mp4, film.png (replay)

    python real_robot.py run                                       the simulated arm, tasks and cameras of sims/mujoco_panda.py
    python real_robot.py run --robot 172.16.0.2 --calibration cameras.yaml --cameras front=832112070001 wrist=832112070002 ...
    python real_robot.py record --robot 172.16.0.2 --task fold_cloth ...        guide the arm by hand; without --robot a script does
    python real_robot.py replay runs/demo/robot/<time>_<task>      the film; --keep adds the run to the demonstrations

Paper, sections 3.3 and 4.3: look, paint the target, turn it into a chunk of joint positions, follow the chunk at 10 Hz, look again.
The next picture is painted beside the motion, in a process of its own, while the last step of the present chunk is under way: action 0
of a chunk belongs to the moment of its picture, which is over when the chunk arrives, so the motion goes on with action 1 and never
pauses. Whatever goes wrong, the arm holds its position, the log is written, and one sentence says what it was.
"""

import math
import signal
import sys
import time
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from genima.episodes import CAMERAS, read_episode
from genima.files import UserError, run_stage, write_whole
from genima.kinematics import JOINT_LIMITS, franka_chain
from robot.arm import HZ, Fault, Franka, History, Policy, Station, ask, fit, trained
from robot.recording import Recording, Replay, recover, replay, write_timing

VELOCITY = np.array([2.175] * 4 + [2.61] * 3)  # rad/s, the lower of Panda's and FR3's (data sheets)
STAMP = "%Y%m%d-%H%M%S"  # in the names of recordings


# ------------------------------------------------------------------------------------------------------------------ safety
@dataclass
class Safety:
    """All that keeps the arm from doing harm, except the robot's own reflexes. Every check raises a Fault; `drive` then holds the arm."""

    arm: str = "fr3"
    speed: float = 0.2  # share of the joints' greatest velocities
    # Where the fingertips may go, metres: x, y, z from, x, y, z to. The table is at 0; a wish may be a little below what it presses.
    workspace: tuple = (0.2, -0.5, -0.01, 0.8, 0.5, 0.75)
    watchdog: float = 0.5  # seconds that the policy may be late
    stale: float = 0.25  # seconds that a picture, or word from the robot, may be old

    margin = 0.05  # rad that commands keep away from the joints' limits
    jump = 0.35  # rad from one command to the next wish: thrice a fast demonstration's step

    def __post_init__(self):
        if not 0 < self.speed <= 1:
            raise UserError("--speed must be above 0 and at most 1.")
        if not (
            np.less(self.workspace[:3], self.workspace[3:]).all() and self.watchdog > 0
        ):  # nor NaN, which nothing exceeds
            raise UserError(
                "--workspace is x, y, z from and x, y, z to, each from below its to, and --watchdog must be above 0."
            )
        self.chain = franka_chain()
        self.low, self.high = np.array(JOINT_LIMITS[self.arm]) + [[self.margin], [-self.margin]]

    def check_chunk(self, chunk):
        """What the policy gave, (K, 8)."""
        if chunk.ndim != 2 or chunk.shape[1] != 8 or not np.isfinite(chunk).all():
            raise Fault(
                "The policy gave NaN or infinite numbers: look at the log's pictures. Is a camera covered, did training diverge?"
            )

    def step(self, previous, wish):
        """The command (7,) on the way from the previous one to the policy's wish (7,), and how much of the way it is (0..1).

        A wish that is merely fast is approached at the speed cap, and the chunk is played more slowly. One that no demonstration
        would make, or that is out of bounds, is refused. The way back into bounds is free: a hand may have led the arm out.
        """
        change = np.abs(wish - previous)
        if not change.max() <= self.jump:
            raise Fault(
                f"The policy wants joint {change.argmax() + 1} to jump by {change.max():.2f} rad; {self.jump} are allowed."
            )
        share = 1 / max(1.0, (HZ * change / VELOCITY).max() / self.speed)
        command = previous + share * (wish - previous)
        beyond, before = (
            np.maximum(self.low - joints, joints - self.high) for joints in (command, previous)
        )  # rad
        worst = np.where(beyond > np.maximum(before, 0), beyond, 0).argmax()
        if beyond[worst] > max(before[worst], 0):
            raise Fault(
                f"The policy wants joint {worst + 1} at {command[worst]:.2f} rad; "
                f"{self.low[worst]:.2f} to {self.high[worst]:.2f} are allowed."
            )
        tool, before = (
            self.chain.forward_kinematics(joints)[-1, :3, 3] for joints in (command, previous)
        )  # metres
        if self.outside_box(tool) > self.outside_box(before):
            raise Fault(
                f"The policy wants the fingertips at {tool.round(3).tolist()}, outside the --workspace {self.workspace}."
            )
        return command, share

    def outside_box(self, tool):
        """By how many metres a point (3,) is outside the workspace, 0 inside."""
        return max(
            np.maximum(
                np.subtract(self.workspace[:3], tool), np.subtract(tool, self.workspace[3:])
            ).max(),
            0,
        )

    def check_motion(self, qvel):
        if (np.abs(qvel[:7]) > 0.95 * VELOCITY).any():
            raise Fault(
                f"Joint {np.abs(qvel[:7] / VELOCITY).argmax() + 1} moves at more than 95 % of its greatest velocity."
            )

    def check_fresh(self, stamps, now):
        """stamps: camera -> when its picture was taken, s; 0 before the first."""
        oldest = min(stamps, key=stamps.get)
        if now - stamps[oldest] > self.stale:
            since = f" for {now - stamps[oldest]:.1f} s" if stamps[oldest] else ""
            raise Fault(f"Camera '{oldest}' has sent no picture{since}: check its cable.")

    def check_heard(self, seconds):
        if seconds > self.stale:
            raise Fault(f"The robot has been silent for {seconds:.1f} s: check network and power.")

    def confirm(self, painted, path, yes):
        """Before the first motion a person sees the painted target, and says yes."""
        with write_whole(path) as temporary:
            Image.fromarray(np.concatenate(list(painted.values()), axis=1)).save(
                temporary, format="png"
            )
        print(f"The painted target is in {path}.")
        if (
            not yes
            and ask(
                "Is it where the gripper should go, and is the stop button in your hand? y Enter moves the arm: "
            )
            != "y"
        ):
            raise Fault("Not confirmed, so nothing was sent.")

    def check_waiting(self, seconds):
        if seconds > self.watchdog:
            raise Fault(
                f"The policy is late by more than {self.watchdog} s (--watchdog): is the machine busy, or the network too large?"
            )


# ---------------------------------------------------------------------------------------------------------------- settings
@dataclass
class Settings:
    run: Path = Path("runs/demo")
    """Folder of the run: controlnet/ and act/ are read, robot/ is written, or by record episodes/<task>/."""
    robot: str = "sim"
    """Host name or address of the robot; sim: simulated, over the robot's own protocol on this machine."""
    arm: Literal["fr3", "panda"] = "fr3"
    """Which arm it is: its joints' limits."""
    task: str = "pick_and_lift"
    """The task's name; in the simulator one of sims/mujoco_tasks.py."""
    instruction: str = ""
    """What to do; empty: the simulated scene's own, or asked for."""
    calibration: Path | None = None
    """JSON or YAML file of the cameras (real_robot.py calibrate): {camera: {intrinsics, world_from_camera or last_joint_from_camera}}."""
    cameras: tuple[str, ...] = ()
    """RealSense cameras as name=serial, named as in the calibration file; in the simulator, which to record, all four if none is named."""
    seed: int = 0
    """In the simulator: the first scene."""
    yes: bool = False
    """Begin at once, without asking (in the simulator nobody is asked)."""


@dataclass
class Run(Settings):
    policy: Literal["trained", "demonstrator"] = "trained"
    """trained: painter and controller; demonstrator: a script that knows the simulated scene."""
    speed: float | None = None
    """Share of the joints' greatest velocities; unset: 0.2, and 1 in the simulator, where nobody can be hit."""
    workspace: tuple[float, float, float, float, float, float] = Safety.workspace
    """Where the fingertips may go: x, y, z from and x, y, z to, metres from the robot's base."""
    watchdog: float = Safety.watchdog
    """Seconds that the policy may be late before the arm is stopped."""
    execute: int = 7
    """Steps of a chunk to go before the next one takes over (one of 8 passes while it is computed)."""
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
    """Keep the middle square of the pictures at so many pixels; 0: as they are, 480x640. Train with one size."""
    seconds: float = 0.0
    """Stop by itself after so long; 0: at Enter (in the simulator, when the script is done)."""
    seed: int = 500_000
    """In the simulator: the scene."""


# ---------------------------------------------------------------------------------------------------------- run and record
def station(settings, **options):
    """The arm and cameras of these settings, to be closed; options: of the simulated one."""
    if settings.robot != "sim":
        return Station(settings)
    from sims.franky_panda import Bench  # needs MuJoCo, which a real robot does not

    return Bench(settings.task, settings.seed, **options)


@contextmanager
def held(settings, bench, safety, path, names, size):
    """-> robot, log, instruction, for a block that makes the episode `path` of these cameras, with their pictures at `size`.
    Whatever ends the block, a fault, Ctrl-C or its last line: first the arm holds, then the log is written, then a sentence says why."""
    pictures, error, calibration = (
        bench.read()[1],
        None,
        {},
    )  # the pictures are of the right size, if black, before the first
    for name in names:
        if name not in pictures:
            raise UserError(
                f"The policy was trained with camera '{name}', which --cameras does not name."
            )
        calibration[name] = bench.calibration[name] | {
            "intrinsics": fit(pictures[name], size, bench.calibration[name]["intrinsics"])[1]
        }
    instruction = settings.instruction or bench.instruction
    about = dict(task=settings.task, variation=bench.variation, instruction=instruction, instructions=[instruction], robot=settings.arm,
                 sim=bench.sim, seed=bench.seed)  # fmt: skip
    robot, log = Franka(bench.host, safety), Recording(path, about, calibration)
    try:
        yield robot, log, instruction
    except BaseException as problem:
        error = problem
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a log that is half written helps nobody
    try:
        log.event(
            f"stopped: {str(error) or type(error).__name__}" if error else "finished"
        )  # when; it is written by a thread
        robot.hold()
        path = log.finish(not error and log.count > 0 and bench.success())
    except OSError:
        print(
            f"What was recorded is kept in {log.folder}; the next start makes an episode file of it.",
            file=sys.stderr,
        )
        raise
    finally:
        signal.signal(signal.SIGINT, before)
    if error:
        print(
            f"The arm holds its position; {f'what was recorded is in {path}' if path else 'nothing was recorded'}.",
            file=sys.stderr,
        )
        raise error
    if not path:
        raise Fault("It was ended before its first step, so nothing was recorded.")


# --------------------------------------------------------------------------------------------------------------------- run
def between(chunk, position):
    """The action at a place between two steps of a chunk (K, 8); the last one beyond its end."""
    return np.array([np.interp(position, np.arange(len(chunk)), column) for column in chunk.T])


def through(before, after):
    """The velocity (rad/s) at which a joint passes its target: the slower of the steps before and after it, none where it turns or ends.
    Without it the arm would brake for every target, and be two steps behind a fast chunk."""
    return HZ * np.where(
        before * after > 0, np.sign(after) * np.minimum(np.abs(before), np.abs(after)), 0
    )


def drive(robot, cameras, policy, safety, log, settings, instruction, steps, finished):
    """The loop. Returns how late each command was (s) when finished() says so or after `steps` commands; raises what stops it."""
    history, K, wanted = (
        History(robot, cameras, safety),
        policy.needs["horizon"],
        (policy.needs["cameras"], policy.needs["image_size"][0]),
    )
    pictures, _, _, qpos, _ = history.look(*wanted)
    policy.ask(pictures, qpos, instruction, 0)
    painted, chunk, _ = policy.answer(60) or safety.check_waiting(math.inf)
    safety.check_chunk(chunk)
    safety.confirm(
        painted,
        log.path.with_name("first_target.png"),
        settings.yes or settings.robot == "sim" or settings.dry_run,
    )
    log.event("the first target was confirmed")

    # The way is counted in steps of a chunk, of which a slow one is a part: how far the arm is sent, and how far it was in the picture
    # that the chunk was made from. The chunk's action 0 is one step from there.
    travelled = looked = 0.0
    chunk, asked, latency, lateness = None, None, 0.0, []
    history.rows.clear()  # a person may have taken her time
    here = history.listen()
    previous, opened = here[:7], here[7] > 0.5
    start, tick = time.monotonic() + 1 / HZ, 0
    while len(lateness) < steps and not finished():
        history.wait(start + tick / HZ)
        late, share = time.monotonic() - start - tick / HZ, 0.0
        # 1. Send, before anything else.
        if chunk is not None and travelled - looked < K:
            command, share = safety.step(previous, between(chunk, travelled - looked)[:7])
            travelled += share
            after = (
                between(chunk, travelled - looked)[:7] - command
            )  # the chunk's next step, nothing at its end
            opened = bool(chunk[min(math.ceil(travelled - looked) - 1, K - 1), 7] > 0.5)
            if not settings.dry_run:
                robot.send(command, through(command - previous, after))
                robot.grip(opened)
            previous = command
            lateness.append(late)
        # 2. See, and write down.
        reached = history.last
        pictures, _, frame, qpos, qvel = history.look(*wanted)
        safety.check_motion(qvel)
        log.add(
            pictures,
            painted,
            time=time.monotonic(),
            frame=frame,
            late=late,
            latency=latency,
            progress=share,
            qpos=qpos,
            qvel=qvel,
            action=np.append(previous, opened),
            reached=reached,
        )
        # 3. Think: ask for the next chunk, so early that it is there when this one ends.
        ahead = math.ceil((latency + 0.015) * HZ)  # steps that pass meanwhile
        if asked is None and (
            chunk is None or travelled - looked >= 1 + min(settings.execute, K - ahead)
        ):
            policy.ask(pictures, qpos, instruction, travelled)
            age = max(start + tick / HZ - frame, 0)  # of the picture, s
            asked, looking = time.monotonic(), travelled - share * (1 + HZ * age)
        tick += 1
        history.wait(start + tick / HZ - 0.012)
        if answer := policy.answer():
            painted, chunk, seconds = answer
            safety.check_chunk(chunk)
            latency = max(seconds, 0.8 * latency)  # slowly forgotten
            log.event(f"a new target after {1000 * seconds:.0f} ms")
            looked, asked = looking, None
            if settings.dry_run:
                previous = history.last[:7]
        elif asked is not None:
            safety.check_waiting(time.monotonic() - asked)
    return lateness


def run_once(settings, policy, bench):
    """One episode. Returns whether it succeeded."""
    speed = (1.0 if bench.sim else 0.2) if settings.speed is None else settings.speed
    safety = Safety(settings.arm, speed, settings.workspace, settings.watchdog)
    folder = settings.run / "robot" / f"{time.strftime(STAMP)}_{settings.task}"
    finished = bench.over if not (settings.steps and bench.sim) else lambda: False
    wanted = policy.needs["cameras"], policy.needs["image_size"][0]
    with held(settings, bench, safety, folder / "log.hdf5", *wanted) as (robot, log, instruction):
        lateness = drive(
            robot,
            bench,
            policy,
            safety,
            log,
            settings,
            instruction,
            settings.steps or bench.max_steps,
            finished,
        )
    if lateness:
        write_timing(folder / "timing.png", lateness)
    if bench.sim and bench.get("lost") > 0.2:
        print(
            f"This machine was too busy for the simulated arm: its clock fell behind by {bench.get('lost'):.1f} s."
        )
    success = read_episode(log.path, images=False).success
    print(f"{instruction}: {'done' if success else 'not done'}; the log is {log.path}.")
    return success


def run(settings, load=None, bench=None):
    """load: makes the policy, in its process; bench: a simulated arm that runs already (both for tests)."""
    if settings.robot != "sim" and (settings.policy == "demonstrator" or settings.episodes > 1):
        raise UserError(
            "--policy demonstrator and --episodes are for the simulated scene alone: use a trained policy, once, on a robot."
        )
    for folder in (settings.run / "act", settings.run / "controlnet"):
        if settings.policy == "trained" and not load and not folder.is_dir():
            raise UserError(
                f"There is no checkpoint {folder}: train it first, or try --policy demonstrator."
            )
    recover(settings.run)
    first, successes = settings.seed, 0
    for settings.seed in tqdm(
        range(first, first + settings.episodes), desc="episodes", disable=settings.episodes == 1
    ):
        try:
            with nullcontext(bench) if bench else closing(station(settings)) as scene:
                made = load or (
                    scene.policy
                    if settings.policy == "demonstrator"
                    else partial(trained, settings.run, settings.device)
                )
                with closing(Policy(made)) as policy:
                    successes += run_once(settings, policy, scene)
        except Fault as error:
            if settings.episodes == 1:
                raise
            print(f"Seed {settings.seed}: {error}", file=sys.stderr)
    if settings.episodes > 1:
        print(
            f"{successes} of {settings.episodes} episodes of {settings.task} succeeded (seeds {first} to {settings.seed})."
        )


# ------------------------------------------------------------------------------------------------------------------ record
def record(settings):
    """One demonstration. Every frame has new pictures: where a camera is late, the frame waits, and those after it catch up.
    Returns its path."""
    recover(settings.run)
    # The simulated cameras take 26 ms for a picture of 480x640, 2 ms for one of 64x64.
    options = dict(size=(settings.size,) * 2) if settings.size else dict(size=(480, 640), fps=HZ)
    safety = Safety(settings.arm, stale=1.0)  # nothing is sent: a camera may pause
    path = settings.run / "episodes" / settings.task / f"real_{time.strftime(STAMP)}.hdf5"
    with closing(station(settings, cameras=settings.cameras or CAMERAS, **options)) as bench:
        with held(settings, bench, safety, path, list(bench.calibration), settings.size) as (
            robot,
            log,
            _,
        ):
            if not (settings.yes or bench.sim):
                ask(
                    "Hold the arm by the buttons at its wrist. Enter starts the recording, and Enter stops it."
                )
            history = History(robot, bench, safety)
            if bench.sim:
                bench.demonstrate()
            stamps, start = bench.read()[0], None
            while settings.seconds == 0 or log.count < settings.seconds * HZ:
                history.wait(start + log.count / HZ if start else 0)
                while any(stamp == stamps[camera] for camera, stamp in bench.read()[0].items()):
                    history.wait(time.monotonic() + 0.02)
                now = time.monotonic()
                start = start or now + 0.5 / HZ  # midway between two pictures
                pictures, stamps, frame, qpos, qvel = history.look(list(stamps), settings.size)
                log.add(
                    pictures,
                    time=now,
                    frame=frame,
                    late=now - start - log.count / HZ,
                    qpos=qpos,
                    qvel=qvel,
                )
                if log.count % HZ == 0:
                    print(f"\rrecording, {log.count // HZ} s ", end="", flush=True)
                if settings.seconds == 0 and (
                    log.count > HZ and not bench.get("guided") if bench.sim else bench.over()
                ):
                    break
    print(f"\n{log.count} frames are in {path}.")
    return path


def main():
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    from robot.calibrate import (
        Settings as Calibrate,  # imported late: the policy's process has no use for OpenCV
    )
    from robot.calibrate import calibrate

    settings = tyro.extras.subcommand_cli_from_dict({"run": Run, "record": Record, "replay": Replay, "calibrate": Calibrate},
                                                    description=__doc__)  # fmt: skip
    {Run: run, Record: record, Replay: replay, Calibrate: calibrate}[type(settings)](settings)


if __name__ == "__main__":
    run_stage(main)
