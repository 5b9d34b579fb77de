"""Synthetic episodes: a chain of joints with random constants, made without a simulator."""

import importlib
import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from genima.episodes import Episode, write_episode
from genima.files import run_stage


def random_pose(random, shift=0.3):
    """A random rotation (QR of a Gaussian) and a translation within `shift` metres."""
    rotation, _ = np.linalg.qr(random.normal(size=(3, 3)))
    rotation *= np.linalg.det(rotation)
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation, random.uniform(-shift, shift, 3)
    return pose


def look_at(position, target):
    """World from camera, OpenCV axes, for a camera at `position` that looks at `target`."""
    forward = np.subtract(target, position) / np.linalg.norm(np.subtract(target, position))
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    pose[:3, 3] = position
    return pose


def turn_about_z(angle):
    return np.array(
        [
            [np.cos(angle), -np.sin(angle), 0, 0],
            [np.sin(angle), np.cos(angle), 0, 0],
            [0, 0, 1, 0],
            [0, 0, 0, 1],
        ]
    )


def make_episode(seed=0, joints=7, frames=6, size=(32, 40), task="pick_and_lift"):
    """A whole episode, and its constants: links (D, 4, 4), tool (4, 4), wrist camera (4, 4)."""
    random = np.random.default_rng(seed)
    links = [random_pose(random) for _ in range(joints)]
    tool = random_pose(random, 0.1)
    mount = look_at(
        tool[:3, 3] + random_pose(random)[:3, 0] * 0.3, tool[:3, 3]
    )  # the wrist's camera sees the tool
    angles = random.uniform(-2, 2, joints) + np.cumsum(
        random.normal(0, 0.05, (frames, joints)), axis=0
    )
    poses = np.zeros((frames, joints + 1, 4, 4))
    for t in range(frames):
        pose = np.eye(4)
        for i in range(joints):
            pose = pose @ links[i] @ turn_about_z(angles[t, i])
            poses[t, i] = pose
        poses[t, joints] = pose @ tool
    gripper = (np.arange(frames) < frames // 2)[
        :, None
    ]  # what is commanded; the fingers follow a frame later
    opening = 0.9 * (np.arange(frames) <= frames // 2)[:, None]
    height, width = size
    episode = Episode(
        path=Path("in memory"),
        task=task,
        variation=1,
        instruction="pick up the cube",
        success=True,
        fps=10.0,
        robot="panda",
        instructions=["pick up the cube", "lift it"],
        sim=True,
        seed=seed,
        joint_poses=poses.astype(np.float32),
        qpos=np.hstack([angles, opening]).astype(np.float32),
        qvel=random.normal(size=(frames, joints + 1)).astype(np.float32),
        action=np.hstack([angles + 0.05, gripper]).astype(np.float32),
        images={
            camera: random.integers(0, 256, (frames, height, width, 3), np.uint8)
            for camera in ("front", "wrist")
        },
        intrinsics=dict.fromkeys(
            ("front", "wrist"),
            np.array([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1.0]]),
        ),
        extrinsics={
            "front": np.repeat(look_at((2.0, 0.3, 0.5), (0, 0, 0))[None], frames, 0),
            "wrist": poses[:, -2] @ mount,
        },
    )
    return episode, np.array(links), tool, mount


def call(stage, *words):
    """Run a stage in this process as its command line does; the exit code."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        sys.argv = [f"{stage.__name__}.py", *map(str, words)]
        run_stage(stage.main)
        return 0
    except SystemExit as ended:
        return ended.code
    finally:
        reset_the_accelerator()
        for number, handler in before.items():
            signal.signal(number, handler)


def reset_the_accelerator():
    """The next training in this process may choose another precision than the last."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def run(tmp_path):
    """A run's folder with two episodes of one task."""
    for seed in range(2):
        write_episode(
            tmp_path / f"episodes/pick_and_lift/{seed:06d}_00.hdf5", make_episode(seed)[0]
        )
    return tmp_path


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """A busy disk takes a second for each fsync; the tests need none."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run of two scenes with three buttons (one is held out), views of 16x16, and its spheres."""
    run = tmp_path_factory.mktemp("recorded")
    record = ["collect_demos.py", "--tasks", "push_button", "--scenes", "2", "--image-size", "16"]
    for command in (record, ["render_spheres.py"]):
        done = subprocess.run(
            [sys.executable, *command, "--run", run], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(autouse=True)
def forget_the_accelerator():
    yield
    reset_the_accelerator()


@pytest.fixture
def copied(recorded, tmp_path):
    """A copy of the recorded run, to be broken."""
    return shutil.copytree(recorded, tmp_path / "run")


@pytest.fixture
def sentence_of(monkeypatch, capsys):
    """Function(stage's name, options...) -> the one sentence with which it ends, exit code 2."""
    from accelerate.state import AcceleratorState, GradientState
    from test_episodes import stage

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run_to_its_end(name, *options):
        AcceleratorState._reset_state(True)  # as in a new process
        GradientState._reset_state()
        main = importlib.import_module(name).main
        code, _, sentence = stage(monkeypatch, capsys, main, *options)
        assert code == 2 and sentence.endswith("."), sentence
        assert "delete" not in sentence, sentence
        return sentence

    return run_to_its_end


@pytest.fixture
def bring(tmp_path, capsys):
    """Import into tmp_path / "run", a front camera calibrated -> (what is printed, the errors)."""
    from make_recordings import room_cameras

    import import_demos
    from genima.files import UserError

    calibration = tmp_path / "cams.json"
    calibration.write_text(json.dumps(room_cameras({"front": (96, 128)})))

    def import_all(*sources, **options):
        options = {"calibration": (str(calibration),), "workers": 1} | options
        error = ""
        try:
            import_demos.import_all(import_demos.Settings(sources, tmp_path / "run", **options))
        except UserError as raised:
            error = str(raised)
        return capsys.readouterr().out, error

    return import_all


@pytest.fixture
def little_memory():
    """Four gigabytes more than the tests have: a bomb ends a test, and not the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


# These start workers that draw, by forking this process. A fork of a process that has drawn itself,
# as many tests do, waits forever for threads of the drawing library that it does not have.
FORKING = ("test_environments", "test_faults", "test_full_disks", "test_hostile", "test_rehearsal")


def pytest_collection_modifyitems(items):
    """The files above come first; all else stays in its order."""
    items.sort(key=lambda item: not item.path.name.startswith(FORKING))
