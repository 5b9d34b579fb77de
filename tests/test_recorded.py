"""evaluate.py --recorded: pictures perturbed, what is held out, and numbers known beforehand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import look_at, make_episode

import evaluate
from genima import recorded
from genima.episodes import read_episode, write_episode
from genima.files import UserError
from genima.perturbed_pictures import (
    arm_pixels,
    change_brightness,
    find_static,
    paste_distractors,
    perturb,
    replace_background,
    turn_hue,
)
from genima.policy import GenimaPolicy
from genima.recorded_report import summarise_views, views_panel
from genima.spheres import alpha_composite
from render_spheres import main as render_spheres

HORIZON = 2


# ------------------------------------------------------------------------------ perturbed pictures
def test_hue_turns_colours_and_leaves_grey():
    colours = np.array([[[[200, 0, 0], [0, 200, 0], [90, 90, 90]]]], np.uint8)
    turned = turn_hue(colours, 120)
    np.testing.assert_array_equal(turned[0, 0], [[0, 200, 0], [0, 0, 200], [90, 90, 90]])
    np.testing.assert_array_equal(turn_hue(turned, -120), colours)
    red = turn_hue(colours, 20)[0, 0, 0]
    assert red[0] > 150 and 0 < red[1] < 100 and red[2] == 0  # red stays red


def test_brightness_is_a_factor_up_to_white():
    images = np.array([[[[100, 200, 0]]]], np.uint8)
    assert change_brightness(images, 1.4)[0, 0, 0].tolist() == [140, 255, 0]
    assert change_brightness(images, 0.6)[0, 0, 0].tolist() == [60, 120, 0]


def test_distractors_lie_where_nothing_moves_and_stay_in_all_frames():
    images = np.random.default_rng(0).integers(0, 256, (3, 60, 80, 3), np.uint8)
    static = np.zeros((60, 80), bool)
    static[:, 40:] = True
    for seed in range(5):
        pasted = paste_distractors(images, static, np.random.default_rng(seed))
        changed = (pasted != images).any(-1)  # (3, 60, 80)
        assert 20 < changed[0].sum() < 60 * 80 / 3
        assert not changed[:, :, :40].any()
        np.testing.assert_array_equal(pasted[0][changed.all(0)], pasted[2][changed.all(0)])


def test_background_is_replaced_where_nothing_moves_alone():
    images = np.full((2, 40, 50, 3), 120, np.uint8)
    static = np.zeros((40, 50), bool)
    static[:20] = True
    replaced = replace_background(images, static, np.random.default_rng(0))
    np.testing.assert_array_equal(replaced[:, 20:], images[:, 20:])
    assert (replaced[0, :20] != 120).any(-1).mean() > 0.9
    np.testing.assert_array_equal(replaced[0], replaced[1])


def test_static_is_what_no_picture_changes():
    rng = np.random.default_rng(0)
    pictures = np.clip(rng.normal(100, 4, (20, 50, 50, 3)), 0, 255).astype(np.uint8)
    pictures[7, 10:20, 10:20] = 220  # something stands there once
    static = find_static(pictures)
    assert not static[9:21, 9:21].any()
    assert static[:5].all() and static[25:].all() and static[:, 25:].all()


def test_the_arm_is_where_its_joints_are():
    poses = np.tile(np.eye(4), (3, 1, 1))
    poses[:, 2, 3] = 0.2, 0.4, 0.6  # straight up from the base
    intrinsics = np.array([[100.0, 0, 50], [0, 100.0, 50], [0, 0, 1]])
    arm = arm_pixels(poses, intrinsics, look_at((2.0, 0, 0.3), (0, 0, 0.3)), 100, 100)
    rows, columns = np.nonzero(arm)
    # 0.3 + 0.1 m up and down at a distance of 2 m, and 0.1 m to either side.
    assert abs(rows.min() - 30) <= 1 and abs(rows.max() - 69) <= 1
    assert abs(columns.min() - 45) <= 1 and abs(columns.max() - 54) <= 1


@pytest.mark.parametrize("kind", ["hue", "brightness", "distractors", "background"])
def test_perturbations_are_random_by_their_seed_alone(kind):
    images = np.random.default_rng(0).integers(60, 180, (2, 32, 40, 3), np.uint8)
    before = images.copy()
    static = np.ones((32, 40), bool)
    results = [perturb(kind, images, static, np.random.default_rng(s)) for s in (1, 1, 2, 3, 4)]
    np.testing.assert_array_equal(images, before)
    np.testing.assert_array_equal(results[0], results[1])
    assert any((result != results[0]).any() for result in results[2:])
    assert results[0].shape == images.shape and results[0].dtype == np.uint8
    assert (results[0] != images).any()


# --------------------------------------------------------------------------------------- one frame
def test_chunks_are_compared_in_degrees_up_to_the_end():
    action = np.zeros((5, 3), np.float32)
    action[:, 0] = np.deg2rad([0, 1, 2, 3, 4])
    action[:, 2] = 1
    demonstration = SimpleNamespace(action=action, qpos=np.zeros((5, 3), np.float32))
    chunk = np.zeros((4, 3))
    chunk[:, 0] = np.deg2rad([3, 4, 0, 0])
    chunk[:, 1] = np.deg2rad([0, 4, 90, 90])
    chunk[:, 2] = [0.9, 0.1, 0, 0]
    measured = recorded.measure_chunk(chunk, demonstration, 3)  # two actions are left
    assert measured["chunk_deg"] == pytest.approx((0 + 0 + 0 + 4) / 4, abs=1e-4)
    assert measured["last_deg"] == pytest.approx(2, abs=1e-4)
    assert measured["still_deg"] == pytest.approx(7 / 4, abs=1e-4)
    assert measured["gripper_right"] == 0.5


def disc(x, y, colour, radius=6, size=(48, 64)):
    image = np.full((*size, 3), 90, np.uint8)
    rows, columns = np.indices(size)
    image[(columns - x) ** 2 + (rows - y) ** 2 <= radius**2] = colour
    return image


def test_spheres_are_compared_by_overlap_and_in_pixels_of_the_view():
    plain = np.full((48, 64, 3), 90, np.uint8)
    cyan = (0, 255, 255)
    same = recorded.measure_spheres(disc(20, 20, cyan), disc(20, 20, cyan), plain, None)
    assert same["common"] == same["either"] > 100
    assert same["gripper_px"] == 0 and same["gripper_visible"]
    moved = recorded.measure_spheres(disc(23, 24, cyan), disc(20, 20, cyan), plain, None)
    assert moved["gripper_px"] == pytest.approx(5) and moved["common"] < moved["either"]
    small = recorded.measure_spheres(disc(23, 24, cyan), disc(20, 20, cyan), plain, 32)
    assert small["gripper_px"] == pytest.approx(5, abs=0.5)  # of the view, not of the cell
    missed = recorded.measure_spheres(plain, disc(20, 20, (255, 255, 0)), plain, None)
    assert missed["gripper_visible"] and missed["gripper_px"] is None and missed["common"] == 0
    red = recorded.measure_spheres(disc(9, 9, (255, 0, 0)), disc(9, 9, (255, 0, 0)), plain, None)
    assert not red["gripper_visible"] and red["common"] > 0

    summary = summarise_views([same, moved, missed, red])
    assert (summary["gripper_visible"], summary["gripper_missed"]) == (3, 1)
    assert summary["gripper_px"] == 2.5
    nothing = recorded.measure_spheres(plain, plain, plain, None)
    assert summarise_views([nothing])["overlap"] is None


def test_views_of_any_sizes_become_one_panel():
    views = {"a": disc(9, 9, (255, 0, 0)), "b": np.zeros((300, 200, 3), np.uint8)}
    panel = views_panel(views | {"c": views["b"]})
    assert panel.shape == (400, 2 * round(200 * 64 / 48), 3)


# ------------------------------------------------------------------------------------ a whole run
class PerfectPainter:
    """Paints the truth: it has been told all layers. On a perturbed picture it paints nothing."""

    def __init__(self, run, held_out):
        self.config = {"resolution": 64, "held_out": held_out}
        self.answers = {}
        for path in sorted((run / "episodes").rglob("*.hdf5")):
            episode = read_episode(path)
            frames = np.arange(len(episode.qpos))
            layers = recorded.true_layers(episode, run, list(episode.images), frames)
            for t in frames:
                seen = {camera: images[t] for camera, images in episode.images.items()}
                painted = {
                    camera: alpha_composite(layers[camera][t], image)
                    for camera, image in seen.items()
                }
                self.answers[self.key(seen)] = painted

    @staticmethod
    def key(images):
        return images["front"].tobytes()


class Perfect(GenimaPolicy):
    """Paints the truth, and sends each joint one degree beside the recorded action."""

    def __init__(self, run, held_out):
        self.painter = PerfectPainter(run, held_out)
        self.cameras = ("front", "wrist")
        self.image_sizes = dict.fromkeys(self.cameras, (32, 32))
        self.image_size = (32, 32)
        self.controller = SimpleNamespace(config={"held_out": held_out})
        self.demonstration, *_ = make_episode(0, size=(32, 32), frames=12)

    def act(self, images, qpos, instruction):
        t = int(np.abs(self.demonstration.qpos - qpos).sum(1).argmin())
        chunk = self.demonstration.action[t : t + HORIZON].astype(float)
        chunk[:, :-1] += np.deg2rad(1)
        return chunk, self.painter.answers.get(self.painter.key(images), images)


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """A run with spheres: seeds 0, 1 and 2 of one arm; 2 would be held out."""
    for seed in range(3):
        episode, *_ = make_episode(0, size=(32, 32), frames=12)
        episode.seed = seed
        rng = np.random.default_rng(seed)
        for camera, images in episode.images.items():
            episode.images[camera] = rng.integers(60, 200, images.shape, np.uint8)
        write_episode(tmp_path / f"episodes/pick_and_lift/{seed:06d}_00.hdf5", episode)
    monkeypatch.setattr(
        "sys.argv", ["render_spheres.py", "--run", str(tmp_path), "--horizon", str(HORIZON)]
    )
    render_spheres()
    return tmp_path


def settings_of(run, **changes):
    return evaluate.Settings(run=run, recorded=True, device="cpu", **changes)


def evaluate_with(policy, run, monkeypatch, **changes):
    monkeypatch.setattr(recorded, "load_networks", lambda settings: policy)
    monkeypatch.setattr(recorded, "resolve_folders", lambda settings: {})
    settings = settings_of(run, out=run / "evaluation", **changes)
    recorded.evaluate_recorded(settings)
    return json.loads((run / "evaluation/recorded.json").read_text())


def test_a_painter_of_the_truth_has_full_marks_and_only_as_recorded(drawn, monkeypatch, capsys):
    name = "pick_and_lift/000001_00.hdf5"  # not what the rule would hold out
    report = evaluate_with(Perfect(drawn, [name]), drawn, monkeypatch, execution_horizon=4)
    out = capsys.readouterr().out
    assert "1 of 3 scenes held out." in out and "trained on" not in out
    assert (report["held_out"], report["episodes"]) == (1, 1)
    plain = report["results"]["as recorded"]
    assert list(plain["episodes"]) == [name]
    assert plain["total"]["frames"] == 3  # 0, 4 and 8 of 12
    assert plain["total"]["overlap"] == 1 and plain["total"]["gripper_missed"] == 0
    assert plain["total"]["gripper_px"] == 0
    assert plain["total"]["chunk_deg"] == pytest.approx(1, abs=0.01)
    assert plain["total"]["gripper_right"] == 1
    assert plain["total"]["still_deg"] > 1
    assert set(plain["cameras"]) == {"front", "wrist"}
    for kind in ("hue", "brightness", "distractors"):
        total = report["results"][kind]["total"]
        assert total["overlap"] == 0
        assert total["gripper_missed"] == total["gripper_visible"] > 0
        assert total["chunk_deg"] == pytest.approx(1, abs=0.01)
    assert "background" not in report["results"]  # every pixel of these pictures moves
    assert report["background_kept"] == {"front": 1, "wrist": 1}
    assert "not measured" in out
    assert (drawn / "evaluation/recorded.png").exists()


def test_both_networks_must_not_have_seen_it(drawn, monkeypatch):
    policy = Perfect(drawn, ["pick_and_lift/000000_00.hdf5", "pick_and_lift/000001_00.hdf5"])
    policy.controller.config["held_out"] = ["pick_and_lift/000001_00.hdf5"]
    report = evaluate_with(policy, drawn, monkeypatch)
    assert list(report["results"]["as recorded"]["episodes"]) == ["pick_and_lift/000001_00.hdf5"]


def test_no_false_claim_where_nothing_is_held_out(drawn, monkeypatch, capsys):
    report = evaluate_with(Perfect(drawn, []), drawn, monkeypatch)
    out = capsys.readouterr().out
    assert "0 of 3 scenes held out. All numbers below are of demonstrations that may" in out
    assert (report["held_out"], report["episodes"]) == (0, 3)
    assert "unseen" not in out + json.dumps(report)


def test_any_policy_is_measured_by_its_chunk_alone(drawn, monkeypatch, capsys):
    class Still:
        cameras = ("front",)
        image_size = (32, 32)

        def act(self, images, qpos, instruction):
            assert set(images) == {"front"} and instruction == "pick up the cube"
            return np.tile(qpos, (9, 1)), images

    report = evaluate_with(Still(), drawn, monkeypatch)
    out = capsys.readouterr().out
    assert "does not say what it was trained on" in out
    plain = report["results"]["as recorded"]
    assert list(plain["episodes"]) == ["pick_and_lift/000002_00.hdf5"]  # by the rule
    assert plain["total"]["chunk_deg"] == plain["total"]["still_deg"] > 1
    assert "overlap" not in plain["total"]
    assert plain["cameras"] == {}


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"perturb": "light"}, "--perturb is for a simulator"),
        ({"sim": "rlbench"}, "--sim is for a simulator"),
        ({"max_steps": 3}, "--max-steps is for a simulator"),
        ({"policy": "genimo"}, "There is no policy 'genimo'"),
        ({"execution_horizon": 0}, "--execution-horizon must be 1 or more"),
        ({}, "There is no checkpoint"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        recorded.evaluate_recorded(settings_of(tmp_path, **changes))


def test_options_of_a_simulator_are_refused(tmp_path):
    for option in ({"episodes": 10}, {"seed": 7}, {"language": 0}, {"videos": 0}):
        name = next(iter(option))
        with pytest.raises(UserError, match=f"--{name} is for a simulator"):
            recorded.evaluate_recorded(evaluate.Settings(run=tmp_path, recorded=True, **option))
