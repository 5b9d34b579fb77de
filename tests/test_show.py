"""Films for people: the second model shows the first one's scene, and changes nothing in it."""

import imageio.v2 as imageio
import numpy as np
import pytest
import torch

import collect_demos
import evaluate
import genima.plots
import sims.show
from genima.checkpoints import note_unseen_tasks
from genima.episodes import CAMERAS
from genima.files import UserError
from genima.plots import GREEN, HEADING_HEIGHT, RED, people_frame, write_grid
from genima.previews import contact_sheet, enlarge, labelled_views
from sims import make_env
from sims.arms import find_arm
from sims.demonstrator import record_demonstration
from sims.mujoco_tasks import TASKS
from sims.show import (
    FPS,
    SECONDS_AT_END,
    Moment,
    PeopleCamera,
    Recording,
    between,
    film_attempts,
    film_demonstrations,
    film_frames,
    snapshot,
    thin_out,
    write_people_film,
    write_people_films,
)

VIEWS = {"wrist": np.full((8, 8, 3), 40, np.uint8), "front": np.full((8, 8, 3), 80, np.uint8)}


@pytest.fixture(scope="module")
def env():
    env = make_env("push_button", 64, ("front",))
    env.reset(seed=3)
    return env


@pytest.fixture(scope="module")
def camera(env):
    return PeopleCamera(env, 120, 160)


class Blank:
    """A camera that draws nothing, quickly."""

    def __init__(self, env):
        self.model = env.model

    def render(self, moment):
        return np.zeros((48, 64, 3), np.uint8)

    def close(self):
        pass


# ------------------------------------------------------------------------------------------- camera
def test_the_camera_shows_the_scene_and_leaves_it_alone(env, camera):
    before = env.render_camera("front", 64, 64)
    state = env.data.qpos.copy()
    scene = snapshot(env)
    first = camera.render(scene)
    assert first.shape == (120, 160, 3) and first.std() > 20
    np.testing.assert_array_equal(camera.render(scene), first)

    moved = snapshot(env)
    moved.qpos[:7] = np.array(find_arm("fr3").home) + 0.3
    assert (camera.render(moved) != first).any(axis=-1).mean() > 0.02  # the arm is elsewhere
    red = snapshot(env)
    red.colours["table"][:] = (1, 0, 0, 1)
    difference = camera.render(red).astype(int) - first
    assert difference[..., 0].mean() > difference[..., 1].mean() + 20
    dark = snapshot(env)
    dark.light *= 0.3
    assert camera.render(dark).mean() < 0.8 * first.mean()

    np.testing.assert_array_equal(env.data.qpos, state)
    np.testing.assert_array_equal(env.render_camera("front", 64, 64), before)


def test_a_perturbed_scene_has_a_camera_too():
    env = make_env("push_button", 64, (), "background")
    env.reset(seed=0)
    assert PeopleCamera(env, 60, 80).render(snapshot(env)).std() > 20


def test_between_two_steps_the_arm_is_in_between(env):
    now = snapshot(env)
    later = snapshot(env)
    later.qpos[:7] += 0.2
    quarter = between(env.model, now, later, 0.25)
    np.testing.assert_allclose(quarter.qpos[:7], now.qpos[:7] + 0.05)
    np.testing.assert_allclose(quarter.qpos[7:], now.qpos[7:])


def test_a_thinned_mesh_has_one_vertex_in_a_cube():
    vertices = np.array([[0, 0, 0], [0.01, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1.01, 0]]) + 0.1
    faces = np.array([[0, 2, 3], [1, 2, 4], [0, 1, 3]])
    thinned, remaining = thin_out(vertices, faces, 0.5)
    assert len(thinned) == 3
    assert len(remaining) == 1  # of three, two fell together and one is flat
    assert sorted(remaining[0]) == [0, 1, 2]
    assert np.isclose(thinned, (0.105, 0.1, 0.1)).all(axis=1).any()  # the mean of two


# -------------------------------------------------------------------------------------------- films
def test_a_film_has_thirty_frames_a_second_and_the_sentence_of_each_moment(env):
    scene = snapshot(env)
    moments = [Moment(scene, VIEWS, "push it"), Moment(scene, VIEWS, "no, lift it")]
    moments += [Moment(scene, VIEWS, "no, lift it")]
    frames = list(film_frames(Blank(env), moments, True, "painted"))
    assert len(frames) == 2 * FPS / 10 + SECONDS_AT_END * FPS
    headings = [frame[:HEADING_HEIGHT] for frame in frames]
    assert (headings[0] == headings[2]).all()
    assert (headings[2] != headings[3]).any()  # the sentence has changed
    assert not (frames[5] == GREEN).all(axis=-1).any()
    assert (frames[6] == GREEN).all(axis=-1).sum() > 100
    assert len(list(film_frames(Blank(env), moments, None, "painted"))) == 7


def test_the_verdict_has_its_colour_and_stays_in_the_scene():
    scene = np.zeros((240, 320, 3), np.uint8)
    reason = "failed: the arm cannot reach [0.9, 0.1, 0.3] (off by 0.112), and this is a long story"
    frame = people_frame(scene, VIEWS, "push", "painted", False, reason)
    rows, columns = np.nonzero((frame == RED).all(axis=-1))
    assert len(rows) > 1000 and columns.max() < 320 and rows.max() < 240
    assert frame.shape == (HEADING_HEIGHT + 240, 320 + 240, 3)


def test_a_recording_does_not_change_a_demonstration():
    env = make_env("push_button", 32, ("front",), images=True)
    recording = Recording()
    watched = record_demonstration(env, "push_button", 5, 1, "near", recording)
    plain = record_demonstration(env, "push_button", 5, 1, "near")
    assert len(recording.moments) == len(plain.qpos) + 1
    np.testing.assert_array_equal(watched.qpos, plain.qpos)
    np.testing.assert_array_equal(recording.moments[3].painted["front"], plain.images["front"][3])


def test_attempts_are_filmed_with_their_reasons(tmp_path, monkeypatch):
    filmed = []

    def record(env, task, seed, variation, start, watch):
        env.reset(seed=seed)
        watch(env, VIEWS, "push it")
        if seed == 2:
            raise UserError("The arm cannot reach it.")
        return type("Episode", (), {"success": seed == 1})

    def write(path, task, sim, films, painted_name):
        filmed.extend((outcome, len(moments)) for outcome, moments in films)

    monkeypatch.setattr(sims.show, "record_demonstration", record)
    monkeypatch.setattr(sims.show, "write_people_film", write)
    film_attempts(
        tmp_path / "a.mp4", "push_button", [(1, 0, "near"), (2, 0, "near"), (3, 0, "near")]
    )
    assert [outcome["success"] for outcome, _ in filmed] == [True, False, False]
    verdicts = [outcome["verdict"] for outcome, _ in filmed]
    assert verdicts[0] == "scene 1: done"
    assert verdicts[1] == "scene 2: failed: The arm cannot reach it."
    assert "not done" in verdicts[2]
    assert [count for _, count in filmed] == [1, 1, 1]


def test_successes_and_failures_are_chosen_for_each_task(tmp_path, monkeypatch):
    jobs = []
    monkeypatch.setattr(sims.show, "draw_films", lambda drawn, workers: jobs.extend(drawn))
    tried = [("reach_target", seed, 0, "near", seed in (3, 4, 5)) for seed in range(8)]
    tried += [("push_button", seed, 1, "anywhere", False) for seed in range(3)]
    film_demonstrations(tmp_path, tried, 2, 1)
    assert [(job[1].name, [attempt[0] for attempt in job[3]]) for job in jobs] == [
        ("reach_target.mp4", [0, 1, 3, 4]),
        ("push_button.mp4", [0, 1]),
    ]


def test_only_filmed_episodes_get_a_film(tmp_path, monkeypatch):
    jobs = []
    monkeypatch.setattr(sims.show, "draw_films", lambda drawn, workers: jobs.extend(drawn))
    settings = evaluate.Settings(out=tmp_path, perturb="light", policy="act")
    filmed = ({"success": True}, {"moments": [1, 2]})
    plain = ({"success": False}, {"moments": []})
    rlbench = ({"success": False}, {})
    episodes = {"push_button": [filmed, plain, rlbench], "reach_target": [plain, rlbench]}
    write_people_films(settings, "evaluation_act_light", episodes)
    (job,) = jobs
    assert job[1] == tmp_path / "push_button_act_light_people.mp4"
    assert job[2:] == ("push_button", "light", [({"success": True}, [1, 2])], "what ACT sees")


def test_collect_drops_no_option_silently(tmp_path):
    for simulator in ({}, {"sim": "rlbench"}):
        settings = collect_demos.Settings(demos=5, scenes=9, **simulator)
        with pytest.raises(UserError, match="--demos or --scenes, not both"):
            collect_demos.check_settings(settings)
    settings = collect_demos.Settings(demos=5, from_rlbench=tmp_path)
    with pytest.raises(UserError, match="takes --scenes"):
        collect_demos.check_settings(settings)


def test_collect_refuses_to_film_what_it_cannot(tmp_path):
    for changes in ({"sim": "rlbench"}, {"from_rlbench": tmp_path}):
        with pytest.raises(UserError, match="--film is for the embedded simulator"):
            collect_demos.check_settings(collect_demos.Settings(film=1, **changes))


@pytest.mark.slow
def test_collect_writes_films(tmp_path):
    settings = collect_demos.Settings(
        run=tmp_path, tasks=("push_button",), demos=2, image_size=(16,), film=1, workers=1
    )
    collect_demos.collect(settings)
    film = imageio.get_reader(tmp_path / "films/push_button.mp4")
    assert film.get_meta_data()["fps"] == FPS
    assert film.count_frames() > SECONDS_AT_END * FPS


# ----------------------------------------------------------------------------------------- previews
def test_previews_can_be_looked_at():
    images = np.zeros((3, 8, 12, 3), np.uint8)
    images[:, 2, 5] = 255
    large = enlarge(images, 30)
    assert large.shape == (3, 32, 48, 3)
    assert large[0, 8:12, 20:24].min() == 255 and large[0].sum() == 3 * 255 * 16
    sheet = contact_sheet({"wrist": images, "front": images}, ["0.0 s", "0.5 s", "1.0 s"], 30)
    assert ((sheet == 255).all(axis=-1)).sum() > 6 * 16 and (sheet == 0).any()
    frames = labelled_views({"wrist": images, "front": images, "top": images}, "push it", 30)
    assert frames.shape == (3, HEADING_HEIGHT + 64, 96, 3)


# -------------------------------------------------------------------------------------------- notes
def test_a_task_that_was_never_trained_is_named(tmp_path, capsys):
    for name, file, tasks in (
        ("painter", "painter.json", '["reach_target", "push_button"]'),
        ("controller", "config.json", '["push_button"]'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(f'{{"tasks": {tasks}}}')
    folders = {name: tmp_path / name for name in ("painter", "controller")}
    note_unseen_tasks(["push_button"], folders, tmp_path)
    assert capsys.readouterr().out == ""
    note_unseen_tasks(["push_button", "reach_target"], folders, tmp_path)
    printed = capsys.readouterr().out
    assert "were never trained on reach_target, only on push_button" in printed

    (tmp_path / "controller/config.json").write_text("{}")  # of an earlier version
    note_unseen_tasks(["reach_target"], {"controller": folders["controller"]}, tmp_path)
    assert capsys.readouterr().out == ""  # nothing is known
    (tmp_path / "episodes/push_button").mkdir(parents=True)
    note_unseen_tasks(["reach_target"], {"controller": folders["controller"]}, tmp_path)
    assert "probably never trained on reach_target" in capsys.readouterr().out


def test_an_arm_of_six_joints_is_filmed_as_it_is(tmp_path):
    env = make_env("push_button", 16, CAMERAS, images=True, robot="ur5e")
    observation, _ = env.reset(seed=0)
    recording = Recording()
    for _ in range(3):
        recording(env, observation["images"], "push the rose button")
        observation, *_ = env.step(env.action_space.sample())
    path = tmp_path / "film.mp4"
    write_people_film(path, "push_button", "mujoco", [({"success": True}, recording.moments)])
    assert len(imageio.mimread(path, memtest=False)) > FPS / 10


def test_no_caption_is_cut_off(monkeypatch, tmp_path):
    """The longest instruction stands above its picture, within the figure."""
    sentences = [text.format("middle") for task in TASKS.values() for text in task.templates]
    drawn = []
    monkeypatch.setattr(genima.plots, "save_figure", lambda figure, path, dpi: drawn.append(figure))
    pictures = torch.zeros(1, 3, 8, 8)
    columns = dict.fromkeys(("observation", "truth", "painted"), pictures)
    write_grid(tmp_path / "grid.png", columns, [max(sentences, key=len)])
    figure = drawn[0]
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert axes.title.get_window_extent().x0 > 0
