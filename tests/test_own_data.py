"""From a folder of files that numpy and h5py wrote to a trained policy, as a user types it."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT
from make_recordings import HAND_EYE, ROS, UR5E_HOME, room_cameras, write_vendor
from PIL import Image

TWO = {"front": (96, 128), "side": (120, 90)}
FEW = ("--steps", 1, "--batch-size", 2)


def type_in(*words):
    """Run a command -> its standard output."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout


def import_and_train(run, source, *calibration):
    """Stages 0 to 3 on a folder of recordings -> what each has printed."""
    said = {}
    said["import"] = type_in(
        "import_demos.py", source, "--run", run, "--calibration", *calibration, "--workers", 1
    )
    said["check"] = type_in("episodes.py", "--check", run / "episodes")
    said["spheres"] = type_in("render_spheres.py", "--run", run, "--preview")
    said["painter"] = type_in("train_controlnet.py", "--run", run, *FEW)
    said["act"] = type_in("train_act.py", "--run", run, *FEW)
    return said


@pytest.mark.slow
def test_a_franka_with_one_wrist_camera(tmp_path):
    """480x640 at 30 Hz, width in metres, two failed takes, a ROS calibration and a hand-eye one."""
    bought = tmp_path / "bought"
    bought.mkdir()
    for take in range(5):
        write_vendor(bought / f"take_{take}.hdf5", success=take < 3, seed=take, frames=31)
    (tmp_path / "lens.yaml").write_text(ROS)
    (tmp_path / "pose.yaml").write_text(HAND_EYE)
    run = tmp_path / "run"
    said = import_and_train(run, bought, tmp_path / "lens.yaml", tmp_path / "pose.yaml")
    assert "5 demonstrations imported" in said["import"] and "2 of them FAILED" in said["import"]
    assert "60%" in said["check"]
    assert "wrist: joint 2 0%" in said["spheres"] and "Warning" in said["spheres"]
    for stage in ("painter", "act"):
        assert "1 of 3 scenes held out, 2 failed demonstrations left out" in said[stage]

    type_in("train_act.py", "--run", run, *FEW, "--observation", "rgb")
    type_in("variations/train_diffusion_policy.py", "--run", run, *FEW)
    diffusion = "variations/train_diffusion_policy.py:policy"
    still = set()
    for policy, name in (("genima", ""), ("act", "_act"), (diffusion, "_diffusion_policy")):
        out = type_in("evaluate.py", "--recorded", "--run", run, "--policy", policy)
        assert "1 of 3 scenes held out. 2 failed demonstrations left out." in out
        report = json.loads((run / f"evaluation/recorded{name}.json").read_text())
        assert (report["episodes"], report["held_out"]) == (1, 1)
        assert set(report["results"]) == {"as recorded", "hue", "brightness", "distractors"}
        total = report["results"]["as recorded"]["total"]
        assert total["frames"] == 2 and ("overlap" in total) == (name == "")
        still.add(total["still_deg"])
        columns = 3 if name == "" else 2
        picture = Image.open(run / f"evaluation/recorded{name}.png")
        assert picture.width == columns * (round(200 * 640 / 480) + 4)
    assert len(still) == 1  # the same frames of the same demonstration for all three

    options = ("--dry-run", "--steps", 10, "--arm", "panda", "--watchdog", 60)
    options += ("--instruction", "pick up the cup")
    out = type_in("real_robot.py", "run", "--run", run, *options)
    assert "pick up the cup: " in out


@pytest.mark.slow
def test_a_ur5e_with_two_cameras_of_different_sizes(tmp_path):
    bought = tmp_path / "bought"
    bought.mkdir()
    for take in range(2):
        path = bought / f"take_{take}.hdf5"
        write_vendor(path, UR5E_HOME, frames=12, fps=10.0, seed=take, cameras=TWO)
    cameras = tmp_path / "cameras.json"
    cameras.write_text(json.dumps(room_cameras(TWO), indent="\t"))
    run = tmp_path / "run"
    said = import_and_train(run, bought, cameras)
    assert "taken for a ur5e" in said["import"]
    type_in("evaluate.py", "--recorded", "--run", run, "--execution-horizon", 4)
    report = json.loads((run / "evaluation/recorded.json").read_text())
    plain = report["results"]["as recorded"]
    assert set(plain["cameras"]) == set(TWO) and list(plain["episodes"]) == [
        "pick_up_the_cup/take_1.hdf5"
    ]
    assert plain["total"]["frames"] == 3
    for camera in TWO:
        assert 0 <= plain["cameras"][camera]["overlap"] <= 1
