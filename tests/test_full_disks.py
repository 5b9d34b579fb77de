"""A disk that is full, in every stage: exit code 2, one sentence, nothing lost; then it resumes.

The disk is a small tmpfs, mounted for a test where that is allowed.
"""

import importlib
import json
import os
import shutil
import subprocess

import h5py
import pytest
from accelerate.state import AcceleratorState, GradientState
from make_recordings import room_cameras, write_vendor
from test_episodes import stage

import pretrain_painter
from genima import scene_files
from genima.files import describe

SIZE = 256  # megabytes
SHORT = ["--steps", 2, "--batch-size", 2, "--checkpoint-every", 1]
COLLECT = ["--tasks", "push_button", "--scenes", 3, "--image-size", 16, "--workers", 1]
# Stage, options, and how many kilobytes it finds: none, and fewer than it needs. (A controller has
# 19 MB, a painter 8, and what they resume from three times as much.)
STAGES = {
    "collect_demos": (COLLECT, (0, 40)),
    "render_spheres": (["--preview"], (0, 40)),
    "train_controlnet": ([*SHORT, "--base", "none", "--keep", 1], (0, 300, 12_000)),
    "train_act": ([*SHORT, "--keep", 1], (0, 25_000, 45_000)),
    "pretrain_painter": (["--image-size", 8, "--scenes", 8, *SHORT, "--workers", 1], (0, 300)),
    "import_demos": (["--workers", 1], (0, 40)),
}
CASES = [(name, free) for name, (_, sizes) in STAGES.items() for free in sizes]


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={SIZE}m", "tmpfs", folder]
    if os.name != "posix" or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("no disk may be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder, kilobytes):
    """Leave so many kilobytes free. Returns the file that takes up the others."""
    path = folder / "filler"
    free = shutil.disk_usage(folder).free
    path.write_bytes(bytes(max(free - 1024 * kilobytes, 0)))
    return path


def prepare(name, run, recorded, tmp_path):
    """What a stage reads, in place. Returns its options for this run."""
    options = STAGES[name][0]
    if name == "import_demos":
        write_vendor(tmp_path / "take.hdf5", cameras={"wrist": (48, 64)})
        room = tmp_path / "room.json"
        room.write_text(json.dumps(room_cameras({"wrist": (48, 64)})))
        return [tmp_path / "take.hdf5", "--run", run, "--calibration", room, *options]
    if name == "pretrain_painter":
        return ["--out", run, *options]
    if name != "collect_demos":
        shutil.copytree(recorded / "episodes", run / "episodes")
    if name.startswith("train"):
        shutil.copytree(recorded / "spheres", run / "spheres")
    return ["--run", run, *options]


def numbers(run):
    """Everything that a stage has made, but for what says when and how it was made."""
    found = {}
    for path in sorted(run.rglob("*")):
        if path.suffix in (".hdf5", ".safetensors", ".csv"):
            found[path.relative_to(run)] = path.read_bytes()
    return found


def left_over(run):
    patterns = (".saving-*", ".step-*", ".*.tmp*")
    return [path for pattern in patterns for path in run.rglob(pattern)]


@pytest.mark.parametrize("name, free", CASES)
def test_a_full_disk_is_one_sentence(
    small_disk, recorded, tmp_path, monkeypatch, capsys, name, free
):
    monkeypatch.setattr(scene_files, "SHARD", 8)
    monkeypatch.setattr(pretrain_painter, "SHARD", 8)
    run = small_disk / "run"
    run.mkdir()
    options = prepare(name, run, recorded, tmp_path)
    before = numbers(run)
    main = importlib.import_module(name).main

    def run_stage():
        AcceleratorState._reset_state(True)  # as in a new process
        GradientState._reset_state()
        return stage(monkeypatch, capsys, main, *options)

    filler = fill(small_disk, free)
    code, _, sentence = run_stage()
    if name == "import_demos":
        sentence = sentence.replace("1 demonstration not imported.", "disk is full")
    assert code == 2 and "disk is full" in sentence, sentence
    assert before.items() <= numbers(run).items()
    filler.unlink()
    code, _, sentence = run_stage()
    assert code == 0, sentence
    assert not left_over(run)
    if not name.startswith("pre"):
        return
    with h5py.File(run / "scenes/0000000.hdf5") as root:
        assert len(root["images"]) == 8


# What libraries say when the disk is full.
FULL = {
    "safetensors": RuntimeError("Error while serializing: I/O error: No space left on device"),
    "torch": RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0"),
    "shutil": shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")]),
    "HDF5": OSError("Can't write data (file write failed: errno = 28, No space left on device)"),
    "a quota": OSError(122, "Disk quota exceeded"),
    "a limit": OSError(27, "File too large"),
}


@pytest.mark.parametrize("who", FULL)
def test_whoever_says_that_the_disk_is_full(who):
    error = FULL[who]
    if who == "torch":  # it says nothing of the reason; what it came from does
        error.__context__ = OSError(28, "No space left on device")
    assert "The disk is full" in describe(error)


def test_shared_memory_is_named():
    """Docker gives 64 MB of it, and --size sd-turbo needs more."""
    words = "unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device"
    for error in (RuntimeError(words), RuntimeError("DataLoader worker is killed")):
        if "shm" not in str(error):
            error.__context__ = RuntimeError(words)
        assert "--shm-size=1g" in describe(error) and "/dev/shm" in describe(error)
    bus = RuntimeError(
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
        "dataloader's workers are out of shared memory. Please try to raise your shared memory "
        "limit."
    )
    assert "--shm-size=1g" in describe(bus)


def test_a_full_disk_under_an_evaluation(small_disk, monkeypatch, capsys):
    """Finished episodes are kept; the oracle's controller is enough to see it."""
    from conftest import ROOT

    import evaluate

    shutil.copytree(ROOT / "checkpoints/demo/act", small_disk / "act")
    options = ["--run", small_disk, "--policy", "oracle", "--tasks", "push_button"]
    options += ["--episodes", 1, "--workers", 1, "--device", "cpu"]
    filler = fill(small_disk, 0)
    code, _, sentence = stage(monkeypatch, capsys, evaluate.main, *options)
    assert code == 2 and "disk is full" in sentence, sentence
    filler.unlink()
    code, printed, sentence = stage(monkeypatch, capsys, evaluate.main, *options)
    assert code == 0, sentence
    assert not list(small_disk.rglob("*.partial.jsonl")) and not left_over(small_disk)
