"""Stage 0 for data that exists: what others recorded becomes episodes, or episodes go to others.

    In:   HDF5 files of ACT, ALOHA or a vendor; a dataset of LeRobot v3.0 or RLBench; where the
          cameras are.
    Out:  <run>/episodes/<task>/<name>.hdf5, see genima/episodes.py; or a dataset for LeRobot or ACT
    Run:  python import_demos.py bought/ --run runs/mine --calibration cameras.yaml
          python import_demos.py aloha/ --run runs/mine --robot panda --instruction "fold a cloth"
          python import_demos.py lab/ --run runs/mine --urdf xarm6.urdf --gripper-length 0.17
          python import_demos.py rlbench/ --run runs/rlbench --fps 20
          python import_demos.py --to-lerobot runs/mine/episodes exported/
          python import_demos.py --to-act runs/mine/episodes/pick_up_the_cup exported/

A mapping says which part of a file is what (mappings/, docs/your-data.md); without --mapping the
ready one that fits is taken. Joint poses come from forward kinematics, everything is brought to one
rate, pictures are straightened. Failed demonstrations come along, marked as failed: training leaves
them out. Stopped in the middle, the same command continues where it was.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process for each core does the work

import tyro

from genima.conversion import convert
from genima.episodes import CAMERAS, find_episodes, read_episode
from genima.export_act import export_act
from genima.files import UserError, check_number, run_stage
from genima.import_groups import detect_mapping
from genima.import_hdf5 import open_recording, read_recording
from genima.import_sources import (
    Source,
    find_hdf5,
    find_lerobot,
    find_places,
    keep,
    name_places,
    prepare,
    shorten_list,
)
from genima.mapping import Mapping, read_mapping, ready_mappings
from genima.parallel import run_in_parallel, usable_cores
from genima.recordings import Conversion, Recording
from genima.robots import Robot, check_robot
from sims.rlbench_dataset import HZ, find_demonstrations, identify, read_demonstration, read_notes
from sims.rlbench_folders import episode_file, episode_folders, not_importable

RLBENCH_MAPPING = Mapping(source="rlbench")  # stands for it: no file of mappings/ is needed


@dataclass
class Settings:
    sources: tyro.conf.Positional[tuple[Path, ...]] = ()
    """HDF5 files, folders of them, or datasets of LeRobot or RLBench."""
    run: Path = Path("runs/mine")
    """Folder of the run; episodes go to <run>/episodes."""
    mapping: str | None = None
    """act, vendor, robomimic, lerobot, nanogenima, or a YAML file of your own; none: what fits."""
    robot: str = ""
    """panda, fr3 or ur5e; none: as the file says, or by the number of joints."""
    urdf: Path | None = None
    """For any other arm: its robot description. Poses are then in the frame of its first link."""
    tip: str = ""
    """The link in it that holds the gripper; none: a usual name (tool0, flange), or the last."""
    fps: float = 10.0
    """Frames a second of the episodes: the rate at which the arm is to be driven."""
    source_fps: float | None = None
    """Frames a second of the recordings, where these have no timestamps or wrong ones."""
    calibration: tuple[str, ...] = ()
    """Files that say where the cameras are and what their lenses do: our own, RealSense, ROS,
    Kalibr, easy_handeye; NAME=FILE for a file that does not say which camera it is of."""
    cameras: tuple[str, ...] = ()
    """Which cameras to import; none named: all."""
    gripper_length: float | None = None
    """Metres from the flange to the middle of the fingertips; none: the robot's usual gripper."""
    instruction: str = ""
    """What is done, in words, where the recordings do not say it."""
    task: str = ""
    """Name of the task's folder; none: the instruction with underscores."""
    to_lerobot: tuple[Path, Path] | None = None
    """Export the episodes in a folder as a LeRobot v3.0 dataset: FOLDER OUT."""
    to_act: tuple[Path, Path] | None = None
    """Export them for ACT's own loader, padded to one length: FOLDER OUT."""
    failed: bool = False
    """Export failed demonstrations too. (Importing keeps them in any case, marked as failed.)"""
    workers: int = field(default_factory=usable_cores)
    """Processes."""


@dataclass
class Outcome:
    """What became of a source."""

    task: str = ""
    success: bool = True
    skipped: bool = False  # it was there already
    error: str = ""
    notes: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------- what is there
def find_sources(settings: Settings) -> tuple[list[Source], list[str]]:
    """The demonstrations in the files and folders, and a sentence on each file that is none."""
    chosen = read_mapping(settings.mapping) if settings.mapping else None
    places: dict[Path, Path] = {}  # absolute -> as given, each once
    sources: list[Source] = []
    errors: list[str] = []
    for path in settings.sources:
        if not path.exists():
            raise UserError(f"{path} does not exist.")
        found = find_places(path) if path.is_dir() else [path]
        rlbench = [one for one in episode_folders(path) if (one / "low_dim_obs.pkl").exists()]
        if rlbench:
            sources += find_rlbench(path, settings)
            errors += not_importable(path)
        if not found and not rlbench:
            raise UserError(f"{path} holds neither HDF5 files nor a dataset of LeRobot or RLBench.")
        for place in found:
            places.setdefault(Path(os.path.abspath(place)), place)
    mappings = [chosen] if chosen else ready_mappings()
    for path, name in zip(places.values(), name_places(list(places.values()))):
        try:
            if path.is_dir():
                sources += find_lerobot(path, name, chosen or read_mapping("lerobot"))
            else:
                sources += find_hdf5(path, name, detect_mapping(path, mappings))
        except UserError as error:
            errors.append(str(error))
    prepare(sources)
    return sources, errors


def find_rlbench(folder: Path, settings: Settings) -> list[Source]:
    """The demonstrations of an RLBench dataset, which says where its cameras are."""
    if settings.fps != HZ:
        raise UserError(
            f"{folder} is a dataset of RLBench, at {HZ} frames a second: give --fps {HZ}."
        )
    folders = find_demonstrations(folder)
    for note in read_notes(folders):
        print(f"Note: {note}")
    sources = []
    for path in folders:
        name = f"{identify(path)[0]}/{episode_file(path).removesuffix('.hdf5')}"
        sources.append(Source(path, name, RLBENCH_MAPPING))
    return sources


# -------------------------------------------------------------------------------- one episode
def import_one(source: Source, settings: Settings) -> Outcome:
    """Import one demonstration, unless that was done. Runs in a process of its own."""
    try:
        if source.mapping == RLBENCH_MAPPING:
            return import_rlbench(source, settings)
        mapping = source.mapping
        if settings.instruction:
            mapping = replace(mapping, instruction="")  # whatever the recording says
        if source.row is None:
            with open_recording(source.path, source.group) as root:
                recording = read_recording(root, mapping, settings.source_fps, settings.cameras)
                return write_recording(recording, source, settings)
        from genima.import_lerobot import read_lerobot

        recording = read_lerobot(source.path, source.row, mapping, settings.source_fps)
        return write_recording(recording, source, settings)
    except UserError as error:
        return Outcome(error=str(error))


def import_rlbench(source: Source, settings: Settings) -> Outcome:
    """As collect_demos.py --from-rlbench, which knows more options."""
    episode = read_demonstration(source.path, settings.cameras or CAMERAS)
    episode.path = source.path
    known = keep(episode, source.name, settings.run)
    return Outcome(episode.task, skipped=known is not None)


def write_recording(recording: Recording, source: Source, settings: Settings) -> Outcome:
    """Convert a recording and write its episode."""
    for camera in settings.cameras:
        if camera not in recording.images:
            names = ", ".join(recording.images)
            raise UserError(f"{recording.source} has no camera '{camera}', but {names}.")
    recording.extremes = source.extremes
    recording.gripper_command_range = source.mapping.gripper_command_range
    if settings.cameras:
        recording.images = {camera: recording.images[camera] for camera in settings.cameras}
    conversion = Conversion(
        robot=arm_of(settings),
        fps=settings.fps,
        calibration=calibration_of(source, settings),
        gripper_length=settings.gripper_length,
        instruction=settings.instruction,
        task=settings.task,
    )
    episode, notes = convert(recording, conversion)
    episode.seed = source.number
    known = keep(episode, f"{episode.task}/{source.name}", settings.run)
    if known:
        return Outcome(episode.task, known.success, skipped=True)
    return Outcome(episode.task, episode.success, notes=notes)


def arm_of(settings: Settings) -> Robot | str:
    """The arm of the robot description, or the name that was given, "" for none."""
    if settings.urdf is None:
        return settings.robot
    from genima.urdf import read_urdf  # Pinocchio is only needed here

    return read_urdf(settings.urdf, settings.tip)


def calibration_of(source: Source, settings: Settings) -> tuple[str, ...]:
    """The calibration files: those asked for, or the one that our export puts into a dataset."""
    exported = source.path / "meta" / "cameras.json"
    if not settings.calibration and exported.exists():
        return (str(exported),)
    return settings.calibration


# -------------------------------------------------------------------------------------- stages
def check_settings(settings: Settings):
    """Raise a UserError for settings that make no sense, before anything is read."""
    if settings.robot:
        check_robot(settings.robot)
    if settings.robot and settings.urdf or settings.tip and not settings.urdf:
        raise UserError("Give --robot, or --urdf with the --tip that it needs.")
    arm_of(settings)  # raises a UserError for a robot description that cannot be read
    check_number("--fps", settings.fps, 0.1, 1000)
    check_number("--workers", settings.workers, 1, 1024)
    if settings.source_fps is not None:
        check_number("--source-fps", settings.source_fps, 0.1, 10_000)
    if settings.gripper_length is not None:
        check_number("--gripper-length", settings.gripper_length, 0, 1)
    is_path = Path(settings.task).name != settings.task or not settings.task.strip(".")
    if settings.task and is_path:
        raise UserError(f"--task {settings.task}: give a name, not a path.")
    if not settings.sources:
        raise UserError("There is nothing to import: name HDF5 files or folders; see --help.")
    paths = sorted((settings.run / "episodes").glob("*/[!.]*.hdf5"))
    if paths:
        known = read_episode(paths[0], images=False)
        if known.fps != settings.fps:
            raise UserError(
                f"{paths[0]} has {known.fps:g} frames a second, not {settings.fps:g}: "
                "use another --run, or the same --fps."
            )


def import_all(settings: Settings):
    check_settings(settings)
    sources, errors = find_sources(settings)
    for name, count in Counter(source.mapping.name for source in sources).items():
        how = "as asked for" if settings.mapping else "which fits"
        print(f"{counted(count, 'demonstration')}: mapping '{name}', {how}.")
    outcomes: list[Outcome] = []
    notes: dict[str, list[str]] = {}
    for source, outcome in import_sources(sources, settings):
        if outcome is None:
            outcome = Outcome(error=f"{source.path}: its process died twice: run it again.")
        outcomes.append(outcome)
        if outcome.error:
            errors.append(outcome.error)
        for note in outcome.notes:
            notes.setdefault(note, []).append(source.name)
    for note, names in sorted(notes.items()):
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        print(f"{min(names)}{others}: {note}")
    report(outcomes, settings.run / "episodes")
    if errors:
        summary = f"{counted(len(errors), 'demonstration')} not imported."
        raise UserError("\n".join([*shorten_list(errors), summary]))


def import_sources(sources: list[Source], settings: Settings) -> Iterator[tuple]:
    """Yield (source, what became of it).

    The first that can be imported comes before the others, which have to be like it.
    """
    jobs = [(import_one, source, settings) for source in sources]
    done = False
    while jobs and not done:
        for (_, source, _), outcome in run_in_parallel(jobs[:1], 1, "importing", "episode"):
            done = outcome is not None and not outcome.error
            yield source, outcome
        jobs = jobs[1:]
    if jobs:
        several = run_in_parallel(jobs, settings.workers, "importing", "episode")
        for (_, source, _), outcome in several:
            yield source, outcome


def counted(number: int, noun: str) -> str:
    """ "1 episode", "2 episodes"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def report(outcomes: list[Outcome], folder: Path):
    """Print what was imported for each task, and how many of these failed."""
    done = [outcome for outcome in outcomes if not outcome.error]
    for task in sorted({outcome.task for outcome in done}):
        of_task = [outcome for outcome in done if outcome.task == task]
        new = sum(not outcome.skipped for outcome in of_task)
        failed = sum(not outcome.success for outcome in of_task)
        sentence = f"{task}: {counted(new, 'demonstration')} imported"
        if new < len(of_task):
            sentence += f", {len(of_task) - new} were there already"
        if failed:
            sentence += f"; {failed} of them FAILED: kept, and left out of training"
        print(f"{sentence}; they are in {folder / task}.")


def find_all(folder: Path) -> list[Path]:
    """The episodes of a folder of tasks, or of one task's folder."""
    one_task = sorted(folder.glob("[!.]*.hdf5"))
    return one_task or find_episodes(folder)


def export(settings: Settings):
    if settings.to_lerobot:
        from genima.export_lerobot import export_dataset  # pyarrow and PyAV are only needed here

        folder, out = settings.to_lerobot
        made = export_dataset(find_all(folder), out, settings.failed)
        print(
            f"For LeRobot: {counted(made['episodes'], 'episode')}, {made['frames']} frames: {out}"
        )
    else:
        folder, out = settings.to_act
        made = export_act(find_all(folder), out, settings.failed)
        print(f"For ACT: {counted(made['episodes'], 'episode')} of {made['frames']} frames: {out}")
    if made["left_out"]:
        left_out = counted(made["left_out"], "failed demonstration")
        print(f"{left_out} left out; --failed takes them along.")


def main():
    settings = tyro.cli(Settings, description=__doc__)
    if settings.to_lerobot or settings.to_act:
        export(settings)
    else:
        import_all(settings)


if __name__ == "__main__":
    run_stage(main)
