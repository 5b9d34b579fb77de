"""genima/episodes.py, genima/files.py: files come back whole, bad ones are one sentence."""

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest
from conftest import ROOT, make_episode

import episodes
from genima.episodes import ATTRIBUTES, find_episodes, read_episode, write_episode
from genima.files import UserError, run_stage, write_whole


def stage(monkeypatch, capsys, main, *arguments):
    """Run a stage's main as its command line does -> (exit code, output, last line of errors)."""
    monkeypatch.setattr(sys, "argv", ["stage.py", *map(str, arguments)])
    code = 0
    try:
        run_stage(main)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err.rstrip().splitlines()[-1].split("\r")[-1] if err.strip() else ""


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("joints, size, frames", [(7, (32, 40), 6), (6, (24, 24), 1)])
def test_an_episode_comes_back_as_it_was_written(tmp_path, joints, size, frames):
    episode = make_episode(3, joints, frames, size)[0]
    path = tmp_path / "task" / "000003_01.hdf5"
    write_episode(path, episode)
    again = read_episode(path)
    assert again.path == path and again.image_sizes == {"front": size, "wrist": size}
    for name, kind in ATTRIBUTES.items():
        assert getattr(again, name) == getattr(episode, name) and type(getattr(again, name)) is kind
    for name in ("qpos", "qvel", "action", "joint_poses"):
        assert getattr(again, name).dtype == np.float32
        np.testing.assert_array_equal(getattr(again, name), getattr(episode, name))
    for name in ("images", "intrinsics", "extrinsics"):
        for camera in ("front", "wrist"):
            np.testing.assert_array_equal(
                getattr(again, name)[camera], getattr(episode, name)[camera]
            )
    assert (
        read_episode(path, images=False).images == {}
        and read_episode(path, images=False).image_sizes == again.image_sizes
    )
    assert os.listdir(path.parent) == [path.name]


def test_acts_loader_can_read_it(run):
    """The accesses of ACT's EpisodicDataset, in its order."""
    path = find_episodes(run / "episodes")[0]
    episode = make_episode(0)[0]
    with h5py.File(path, "r") as root:
        assert root.attrs["sim"]
        original_action_shape = root["/action"].shape
        start = 2
        qpos, qvel = root["/observations/qpos"][start], root["/observations/qvel"][start]
        image = root["/observations/images/front"][start]
        action = root["/action"][start:]
        assert (
            root["/observations/qpos"][()].shape
            == root["/observations/qvel"][()].shape
            == root["/action"][()].shape
        )
        assert (
            root["/observations/images/front"].chunks[0] == 1
        )  # one frame can be read without its neighbours
    assert original_action_shape == (6, 8) and action.shape == (4, 8)
    np.testing.assert_array_equal(qpos, episode.qpos[start])
    np.testing.assert_array_equal(qvel, episode.qvel[start])
    np.testing.assert_array_equal(image, episode.images["front"][start])


def replace(dataset, change):
    """A way to damage a file: one dataset becomes `change` of itself, or goes (None)."""

    def damage(path):
        with h5py.File(path, "r+") as root:
            data = root[dataset][()]
            del root[dataset]
            if change:
                root[dataset] = change(data)

    return damage


def spoil(value, index=(1, 2)):
    """A change of an array: one number of it."""

    def change(data):
        data[index] = value
        return data

    return change


def remove_attribute(path):
    with h5py.File(path, "r+") as root:
        del root.attrs["instruction"]


def spoil_chunk(path):
    with h5py.File(path, "r") as root:
        offset = root["observations/images/front"].id.get_chunk_info(1).byte_offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 200] = bytes(200)
    path.write_bytes(data)


BROKEN = {
    "qpos missing": (replace("observations/qpos", None), "qpos"),
    "camera missing": (replace("cameras/front/intrinsics", None), "intrinsics"),
    "attribute missing": (remove_attribute, "instruction"),
    "cut in half": (
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        "truncated",
    ),
    "last byte cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "text": (lambda path: path.write_text("hello"), "cannot be read"),
    "damaged inside": (spoil_chunk, "cannot be read"),
    "foreign": (lambda path: h5py.File(path, "w").close(), "format"),
    "nan in qpos": (replace("observations/qpos", spoil(np.nan)), "observations/qpos"),
    "inf in action": (replace("action", spoil(np.inf)), "action"),
    "nan in extrinsics": (
        replace("cameras/front/extrinsics", spoil(np.nan, (0, 0, 3))),
        "cameras/front/extrinsics",
    ),
    "gripper command 2": (replace("action", spoil(2, (0, -1))), "gripper"),
    "action too short": (replace("action", lambda a: a[:-1]), "action"),
    "action of integers": (replace("action", lambda a: a.astype(int)), "action"),
    "poses of fewer joints": (
        replace("observations/joint_poses", lambda a: a[:, 1:]),
        "observations/joint_poses",
    ),
    "images too short": (
        replace("observations/images/wrist", lambda a: a[:-1]),
        "observations/images/wrist",
    ),
    "images as masks": (
        replace("observations/images/wrist", lambda a: a[..., 0]),
        "observations/images/wrist",
    ),
    "images with alpha": (
        replace("observations/images/wrist", lambda a: np.concatenate([a, a[..., :1]], -1)),
        "images/wrist",
    ),
    "images of floats": (
        replace("observations/images/wrist", lambda a: a / 255),
        "observations/images/wrist",
    ),
    "images of one camera": (replace("observations/images/wrist", None), "same cameras"),
    "camera scaled": (
        replace("cameras/front/extrinsics", lambda a: a * [[1.1], [1.1], [1.1], [1]]),
        "cameras/front/extrinsics",
    ),
    "camera mirrored": (
        replace("cameras/front/extrinsics", lambda a: a * [1, 1, -1, 1]),
        "cameras/front/extrinsics",
    ),
    "joint transposed": (
        replace("observations/joint_poses", lambda a: a.swapaxes(2, 3)),
        "observations/joint_poses",
    ),
    "negative focal length": (
        replace("cameras/wrist/intrinsics", lambda a: a * [[-1], [1], [1]]),
        "cameras/wrist/intrinsics",
    ),
    "intrinsics of 4x4": (
        replace("cameras/wrist/intrinsics", lambda a: np.eye(4)),
        "cameras/wrist/intrinsics",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_named_with_what_is_wrong(run, what):
    damage, words = BROKEN[what]
    path = find_episodes(run / "episodes")[1]
    damage(path)
    with pytest.raises(UserError) as caught:
        read_episode(path)
    assert (
        str(path) in str(caught.value)
        and words in str(caught.value)
        and "\n" not in str(caught.value)
    )


def test_a_broken_episode_is_not_written(tmp_path):
    episode = make_episode()[0]
    episode.qpos[2, 3] = np.nan
    with pytest.raises(UserError, match="qpos"):
        write_episode(tmp_path / "task" / "a.hdf5", episode)
    assert contents(tmp_path) == {}


def test_an_existing_file_is_not_overwritten(run):
    path = find_episodes(run / "episodes")[0]
    before = contents(run)
    with pytest.raises(UserError, match="exists"):
        write_episode(path, make_episode(9)[0])
    assert contents(run) == before


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, error):
    (tmp_path / "notes.txt").write_text("old")

    def fail(descriptor):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)), write_whole(tmp_path / "notes.txt") as path:
        path.write_text("new")
    with pytest.raises(type(error)):
        write_episode(tmp_path / "a.hdf5", make_episode()[0])
    assert contents(tmp_path) == {tmp_path / "notes.txt": b"old"}


def test_a_full_disk_is_one_sentence(tmp_path):
    """A process that may write no file above 4 kB."""
    code = """
import sys
from conftest import make_episode
from genima.episodes import write_episode
from genima.files import run_stage
run_stage(lambda: write_episode(sys.argv[1], make_episode()[0]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.hdf5"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "disk is full" in done.stderr and "a.hdf5" in done.stderr
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    "error, code, words",
    [
        (UserError("Sentence."), 2, "Sentence."),
        (KeyboardInterrupt(), 130, "Stopped."),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "disk is full"),
        (OSError(errno.EMFILE, "Too many open files"), 2, "Too many open files"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 2, "/x/y: Permission denied"),
        (MemoryError("Unable to allocate 7 TiB"), 2, "Unable to allocate 7 TiB"),
    ],
)
def test_run_stage_ends_with_a_sentence(monkeypatch, capsys, error, code, words):
    def main():
        raise error

    got, out, err = stage(monkeypatch, capsys, main)
    assert (got, out) == (code, "") and words in err


def test_run_stage_does_not_hide_our_mistakes():
    with pytest.raises(ZeroDivisionError):
        run_stage(lambda: 1 / 0)
    with pytest.raises(PermissionError):
        run_stage(lambda: (_ for _ in ()).throw(PermissionError(errno.EACCES, "no")))


def test_finding_episodes(run):
    (run / "episodes/pick_and_lift/.000007_00.12.tmp.hdf5").write_bytes(b"half")
    write_episode(run / "episodes/another/000001_00.hdf5", make_episode(5)[0])
    names = [
        path.relative_to(run / "episodes").as_posix() for path in find_episodes(run / "episodes")
    ]
    assert names == [
        "another/000001_00.hdf5",
        "pick_and_lift/000000_00.hdf5",
        "pick_and_lift/000001_00.hdf5",
    ]
    assert len(find_episodes(run / "episodes", ["pick_and_lift"])) == 2
    (run / "empty").mkdir()
    for folder, tasks in [
        (run / "nowhere", None),
        (run / "empty", None),
        (run / "episodes", ["another", "dance"]),
    ]:
        with pytest.raises(UserError, match="nowhere|empty|dance"):
            find_episodes(folder, tasks)


def test_check_prints_a_table(run, monkeypatch, capsys):
    episode = make_episode(4, frames=9)[0]
    episode.success = False
    # The third difference is 0.006; times 10 Hz cubed: 6 rad/s^3.
    episode.qpos[:, 0] = np.arange(9) ** 3 / 1000
    episode.qpos[:, 1:7] = [0, 0, -1, 0, 1, 0]
    episode.action[:] = episode.qpos
    episode.qpos[3:5, 1] = -2  # beyond the limit -1.7628 in two frames
    write_episode(run / "episodes/other/a.hdf5", episode)
    code, out, err = stage(monkeypatch, capsys, episodes.main, "--check", run / "episodes")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert code == 1 and rows["pick_and_lift"][:3] == ["2", "12", "100%"]
    assert rows["other"] == [
        "1",
        "9",
        "0%",
        "2.000",
        "4000.0",  # 0, 0, -2, -2: the third difference is 4
        "2",
    ]

    episode.qpos[3:5, 1] = 0
    (run / "episodes/other/a.hdf5").unlink()
    write_episode(run / "episodes/other/a.hdf5", episode)
    out = stage(monkeypatch, capsys, episodes.main, "--check", run / "episodes")[1]
    assert out.splitlines()[1].split() == [
        "other",
        "1",
        "9",
        "0%",
        "0.169",  # (512 - 343) / 1000
        "6.0",
        "0",
    ]


def test_check_lists_broken_and_odd_files(run, monkeypatch, capsys):
    first, second = find_episodes(run / "episodes")
    BROKEN["cut in half"][0](second)
    write_episode(run / "episodes/pick_and_lift/000002_00.hdf5", make_episode(2, joints=6)[0])
    write_episode(run / "episodes/pick_and_lift/000003_00.hdf5", make_episode(2, size=(64, 64))[0])
    before = contents(run)
    monkeypatch.setattr(sys, "argv", ["episodes.py", "--check", str(run / "episodes")])
    with pytest.raises(UserError) as caught:
        episodes.main()
    lines = str(caught.value).splitlines()[-4:]
    assert [second.name in lines[0], "6 joints" in lines[1], "images" in lines[2]] == [True] * 3
    assert lines[3] == "3 of 4 files cannot be used with the others."
    assert stage(monkeypatch, capsys, episodes.main, "--check", run / "episodes")[0] == 2
    assert contents(run) == before


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_check_of_no_folder(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "episodes.py", "--check", tmp_path / folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and folder in done.stderr and len(done.stderr.splitlines()) == 1


# ------------------------------------------------------------------------------- the system refuses
def test_a_file_that_another_program_has_open_is_not_called_broken(run):
    path = find_episodes(run / "episodes")[0]
    with open(path, "rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="open in another program") as caught:
            read_episode(path)
    assert str(path) in str(caught.value)
    read_episode(path)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ELOOP])
def test_a_file_that_may_not_be_read_is_not_called_broken(run, monkeypatch, number):
    path = find_episodes(run / "episodes")[0]

    def refuse(*arguments, **named):
        raise OSError(number, "Unable to synchronously open file (unable to open file)")

    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(UserError) as caught:
        read_episode(path)
    assert str(caught.value) == f"{path} cannot be read: {os.strerror(number)}."


def test_a_folder_in_place_of_a_file(run):
    path = run / "episodes/pick_and_lift/000009_00.hdf5"
    path.mkdir()
    with pytest.raises(UserError, match="Is a directory"):
        read_episode(path)


@pytest.mark.parametrize("name, words", [("file", "Not a directory"), ("x" * 300, "too long")])
def test_a_path_that_cannot_be_a_folder_is_one_sentence(run, monkeypatch, capsys, name, words):
    (run / "file").write_text("")
    folder = run / name

    def write():
        write_episode(folder / "a/b.hdf5", make_episode()[0])

    code, _, sentence = stage(monkeypatch, capsys, episodes.main, "--check", folder)
    assert code == 2 and str(folder) in sentence and words in sentence
    code, _, sentence = stage(monkeypatch, capsys, write)
    assert code == 2 and str(folder) in sentence and words in sentence


def test_what_a_killed_process_left_is_removed_by_the_next_write(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    abandoned = tmp_path / f".a.{ended.pid}.tmp.hdf5"
    in_use = tmp_path / f".a.{os.getppid()}.tmp.hdf5"
    other = tmp_path / f".b.{ended.pid}.tmp.hdf5"
    for path in (abandoned, in_use, other):
        path.write_bytes(b"half")
    write_episode(tmp_path / "a.hdf5", make_episode()[0])
    assert not abandoned.exists() and in_use.exists() and other.exists()


# ---------------------------------------------------------------------------- signals and terminals
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_stops_a_stage(name):
    code = """
import time
from genima.files import run_stage
def main():
    print("ready", flush=True)
    time.sleep(60)
run_stage(main)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "Stopped.\n")


def test_check_in_a_terminal_of_ascii_and_80_columns(run):
    write_episode(run / f"episodes/{'long' * 8}/a.hdf5", make_episode(1)[0])
    done = subprocess.run(
        [sys.executable, "episodes.py", "--check", run / "episodes"],
        cwd=ROOT,
        capture_output=True,
        env=os.environ | {"LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 1, done.stderr  # the poses of these are random
    lines = done.stdout.decode("ascii").splitlines()
    assert len(lines) == 10 and max(len(line) for line in lines) <= 80
