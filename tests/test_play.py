"""A robot to talk to, its page, and the page in a browser.

The robot is the shipped checkpoint's. What depends on how well it was trained is asked of several
scenes; the rest is asked of every call.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import ROOT

import play
import sims.playground
from genima.files import UserError
from genima.painter import PROMPT
from genima.word_maps import (
    draw_word_maps,
    number_words,
    tokens_of_words,
    word_attention,
    word_effect,
)
from sims.mujoco_tasks import TASKS
from sims.playground import FARTHEST, GUIDES, HEAT_MAPS, LOOKS, LOWEST, Playground

DEMO = ROOT / "checkpoints/demo"


class Blank:
    """In place of the people's camera: nothing is drawn, quickly."""

    def __init__(self, env, height, width):
        self.shape = (height, width, 3)

    def render(self, moment):
        return np.zeros(self.shape, np.uint8)

    def close(self):
        pass


@pytest.fixture(scope="module")
def drawing_nothing():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sims.playground, "PeopleCamera", Blank)
        yield


@pytest.fixture(scope="module")
def robot(drawing_nothing):
    return Playground(DEMO)


@pytest.fixture
def fresh(robot):
    robot.choose("push_button", 0, "usual")
    robot.follow_guide("painter")
    return robot


def drive(robot, steps=250):
    """Until it stops: no sooner than the way back and the steps of an episode allow."""
    for _ in range(steps):
        if robot.running:
            robot.step()


# ---------------------------------------------------------------------------------------- sentences
def test_what_is_said_is_done_in_most_scenes(fresh):
    done = []
    for scene in range(3):
        fresh.choose("push_button", scene, "usual")
        for sentence in fresh.examples()[1:]:  # the second one after the arm has returned
            fresh.say(sentence)
            drive(fresh)
            assert not fresh.running
            done.append(fresh.success)
    assert sum(done) >= 2, done


def test_another_sentence_in_mid_motion_is_painted_at_once(fresh):
    first, second, _ = fresh.examples()
    fresh.say(first)
    drive(fresh, 3)
    assert fresh.steps == 3 and len(fresh.chunk) == fresh.horizon - 3
    run_number = fresh.run_number
    painted = fresh.painted
    fresh.say(second)
    assert fresh.run_number == run_number + 1  # whoever drives for the first sentence stops
    assert fresh.env.variation == 1
    drive(fresh, 1)
    assert len(fresh.chunk) == fresh.horizon - 1
    assert any((fresh.painted[camera] != painted[camera]).any() for camera in painted)
    sentences = [moment.sentence for moment in fresh.recording.moments]
    assert sentences == 3 * [first] + [second]


def test_success_is_the_object_that_was_said(fresh):
    fresh.say("push the white button, no, wait")
    assert fresh.env.variation == fresh.env.task.names.index("white")
    fresh.say("be nice")  # names nothing: as before
    assert fresh.env.variation == fresh.env.task.names.index("white")
    fresh.stop()
    fresh.say("   ")
    assert not fresh.running and fresh.message == "Say something first."


def test_the_truth_is_a_guide(fresh):
    done = []
    for scene in range(3):
        fresh.choose("push_button", scene, "usual")
        fresh.follow_guide("truth")
        fresh.say(fresh.examples()[2])
        drive(fresh)
        done.append(fresh.success)
    assert sum(done) >= 2, done


def test_reset_is_the_same_beginning(fresh):
    beginning = fresh.env.data.qpos.copy()
    views = fresh.views
    fresh.say("push the rose button")
    drive(fresh, 5)
    assert np.abs(fresh.env.data.qpos - beginning).max() > 0.01
    fresh.reset()
    np.testing.assert_array_equal(fresh.env.data.qpos, beginning)
    for camera, view in fresh.views.items():
        np.testing.assert_array_equal(view, views[camera])
    assert not fresh.running and fresh.steps == 0 and not fresh.recording.moments


def test_every_task_and_look_is_shown_and_strange_tasks_are_named(fresh):
    for task in TASKS:
        fresh.choose(task, 1, "usual")
        is_strange = task not in fresh.trained
        assert ("never trained on this task" in fresh.message) == is_strange
    usual = fresh.views
    for look in LOOKS[1:]:
        fresh.choose(task, 1, look)
        assert any((fresh.views[name] != usual[name]).any() for name in usual), look


# ------------------------------------------------------------------------------------------ a hand
class PerfectFollower:
    """A controller that goes where the hand wants the arm, along a straight line of the joints."""

    def __init__(self, robot):
        self.robot = robot

    def __call__(self, controller, images, qpos, instruction, drop_state):
        fractions = np.linspace(0, 1, self.robot.horizon - 1)[1:, None]
        path = qpos[:-1] + fractions * (self.robot.hand_joints - qpos[:-1])
        path = np.concatenate([path, path[-1:], path[-1:]])  # the arm lags behind by a step
        return np.column_stack([path, np.ones(len(path))])


@pytest.mark.parametrize("direction", [*np.eye(3), *-np.eye(3)[:2]])
def test_a_moved_sphere_is_painted_there_and_followed(fresh, monkeypatch, direction):
    monkeypatch.setattr(sims.playground, "follow", PerfectFollower(fresh))
    before = fresh.env.tool_pose()[:3, 3].copy()
    fresh.move_sphere(0.05 * direction)
    assert fresh.guide == "hand" and fresh.running
    drive(fresh, fresh.horizon)  # one chunk
    way = fresh.env.tool_pose()[:3, 3] - before
    assert 0.04 <= way @ direction <= 0.06
    assert np.linalg.norm(way - (way @ direction) * direction) < 0.01
    painted = [np.any(fresh.painted[name] != fresh.views[name]) for name in fresh.views]
    assert all(painted[1:])  # in the room's cameras


def test_the_shipped_controller_follows_a_moved_sphere(fresh):
    ways = []
    for scene in range(3):
        fresh.choose("push_button", scene, "usual")
        for direction in (*np.eye(3)[:2], *-np.eye(3)[:2]):
            fresh.reset()
            before = fresh.env.tool_pose()[:3, 3].copy()
            fresh.move_sphere(0.05 * direction)
            drive(fresh, fresh.horizon)
            ways.append((fresh.env.tool_pose()[:3, 3] - before) @ direction)
    assert 0.04 <= np.mean(ways) <= 0.06, np.round(ways, 3)
    assert 0.025 <= min(ways) and max(ways) <= 0.07, np.round(ways, 3)


def pixel_of_sphere(robot, camera):
    """Where a view shows the gripper's sphere, 0..1."""
    intrinsics, world_from_camera = robot.env.camera_parameters(camera)
    sphere = robot.held_pose[:3, 3] + robot.offset
    seen = intrinsics @ (np.linalg.inv(world_from_camera) @ np.append(sphere, 1))[:3]
    return seen[:2] / seen[2] / (robot.env.width, robot.env.height)


def test_a_drag_moves_the_sphere_under_the_pointer(fresh):
    for camera in ("front", "left_shoulder", "wrist"):
        fresh.reset()
        fresh.follow_guide("hand")
        pointer = pixel_of_sphere(fresh, camera) + (0.05, -0.03)
        fresh.drag_sphere(camera, *pointer)
        assert 0.005 < np.linalg.norm(fresh.offset) < 0.2
        np.testing.assert_allclose(pixel_of_sphere(fresh, camera), pointer, atol=1e-6)


def test_a_sphere_stays_above_the_table_and_within_reach(fresh):
    fresh.move_sphere((0, 0, -9))
    assert fresh.held_pose[2, 3] + fresh.offset[2] >= LOWEST - 1e-9
    assert abs(fresh.offset[2]) <= FARTHEST
    before = fresh.hand_joints.copy()
    fresh.reset()
    fresh.follow_guide("hand")
    with pytest.raises(UserError, match="cannot reach"):
        for _ in range(9):
            fresh.move_sphere((FARTHEST, FARTHEST, FARTHEST))
            fresh.held_pose[:3, 3] += fresh.offset
    assert np.isfinite(before).all()


# ---------------------------------------------------------------------------------------- heat maps
class Listener:
    """A painter that paints the view white where it hears a word, and nothing for other words."""

    def paint(self, images, instructions):
        painted = {}
        for camera, pictures in images.items():
            painted[camera] = pictures.copy()
            for picture, instruction in zip(painted[camera], instructions):
                if "blue" in instruction:
                    picture[2:4, 1] = 255
        return painted


def test_the_word_that_changes_the_painting_is_hot_where_it_does():
    images = {name: np.zeros((8, 8, 3), np.uint8) for name in ("front", "wrist")}
    maps = word_effect(Listener(), images, "push the blue the button")
    assert list(maps) == ["push", "the", "blue", "the (2)", "button"]
    for word, views in maps.items():
        for heat in views.values():
            assert heat.sum() == (2 * 255 if word == "blue" else 0)
    assert maps["blue"]["front"][2, 1] == 255
    pictures = draw_word_maps(images, maps)
    assert pictures["blue"].shape == (8, 16, 3)
    assert (pictures["blue"][2:4, 1] > 200).any() and not pictures["push"].any()


def test_attention_is_the_cross_attention_of_each_word(fresh):
    painter = fresh.genima.painter
    images = fresh.views
    before = painter.paint({name: view[None] for name, view in images.items()}, ["push it"])
    maps = word_attention(painter, images, "push the rose button")
    assert list(maps) == ["push", "the", "rose", "button"]
    for views in maps.values():
        for name, heat in views.items():
            assert heat.shape == images[name].shape[:2]
            assert 0 < heat.min() and heat.max() < painter.tokenizer.model_max_length
    assert not any(layer._forward_hooks for layer in painter.modules())
    after = painter.paint({name: view[None] for name, view in images.items()}, ["push it"])
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])

    # Tokens that nobody can tell from one another share the attention equally.
    layers = [layer for name, layer in painter.named_modules() if name.endswith("attn2.to_k")]
    weights = [layer.weight.detach().clone() for layer in layers]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.weight.zero_()
        for views in word_attention(painter, images, "push it").values():
            for heat in views.values():
                np.testing.assert_allclose(heat, 1, rtol=1e-4)
    finally:
        with torch.no_grad():
            for layer, weight in zip(layers, weights):
                layer.weight.copy_(weight)


def test_a_word_has_the_tokens_that_it_became(fresh):
    tokenizer = fresh.genima.painter.tokenizer
    for sentence in ("push the rose button", "turn it, won't you", "stack xylophones"):
        tokens = tokens_of_words(tokenizer, sentence)
        prompt = PROMPT.format(sentence)
        ids = tokenizer(prompt).input_ids
        for word, numbers in zip(sentence.split(), tokens):
            assert word in tokenizer.decode([ids[i] for i in numbers]).replace(" ", "") + "'"
    assert number_words(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]


# ----------------------------------------------------------------------------------------- the page
@pytest.fixture(scope="module")
def page(drawing_nothing):
    return play.Page(DEMO)


def random_call(page, random):
    """One thing that a person may do, sensible or not."""
    sentences = [
        "push the rose button",
        "reach the blue target",
        "",
        "<b>hi</b>",
        "x " * 60,
        "\u00fc",
    ]
    centimetres = random.uniform(-40, 40, 3)
    calls = [
        (page.say, [str(random.choice(sentences))]),
        (page.choose, [str(random.choice(list(TASKS)[:4])), int(random.integers(-2, 99)), "usual"]),
        (page.choose, ["push_button", None, str(random.choice([*LOOKS[1:3], "purple"]))]),
        (page.follow, [str(random.choice([*GUIDES, "nobody"]))]),
        (page.move, list(centimetres)),
        (page.drag, [str(random.choice(["front", "wrist"])), *random.uniform(-0.2, 1.2, 2)]),
        (page.step, []),
        (page.press, ["stop"]),
        (page.press, ["reset"]),
        (page.controls, []),
        (page.words, [str(random.choice([*HEAT_MAPS, "nonsense"]))]),
    ]
    function, arguments = calls[random.integers(len(calls))]
    return function(*arguments)


def test_a_hundred_random_calls_leave_the_page_alive(page):
    random = np.random.default_rng(0)
    for _ in range(100):
        random_call(page, random)
        driving = page.drive_on()
        for _ in range(int(random.integers(1, 3))):
            next(driving, None)
    panels, status = page.choose("push_button", 0, "usual")
    page.follow("truth")
    assert panels.count("<img") == 9 and "push the" in status
    page.say(page.playground.examples()[2])
    steps = sum(1 for _ in page.drive_on())
    assert steps > 5 and not page.playground.running


def test_a_second_run_takes_over_from_the_first(page):
    page.choose("push_button", 0, "usual")
    page.follow("painter")
    page.say(page.playground.examples()[0])
    first = page.drive_on()
    next(first)
    page.say(page.playground.examples()[1])
    second = page.drive_on()
    next(second)
    steps = page.playground.steps
    assert len(list(first)) <= 1  # it shows where the arm is, and ends
    assert page.playground.steps == steps


def test_what_is_typed_is_no_html_and_errors_are_sentences(page):
    page.choose("push_button", 0, "usual")
    _, status = page.say("<script>alert(1)</script>")
    assert "<script>" not in status and "&lt;script&gt;" in status
    _, status = page.follow("act")
    assert "act_rgb" in status
    _, status = page.choose("push_button", -1, "usual")
    assert "0 or more" in status
    page.press("reset")
    path, _, status = page.film()
    assert path is None and "press Run first" in status


def test_the_page_stays_on_this_machine_unless_asked():
    assert play.Settings().host == "127.0.0.1"


def test_without_gradio_or_networks_there_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="holds no trained controller"):
        play.Page(tmp_path)
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(sys, "argv", ["play.py", "--run", str(DEMO)])
    with pytest.raises(UserError, match="pip install -r requirements-play.txt"):
        play.main()


# ---------------------------------------------------------------------------------------- a browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
missing = [name for name in ("gradio", "playwright") if find_spec(name) is None]
in_browser = pytest.mark.skipif(
    bool(missing) or CHROMIUM is None,
    reason="needs Chromium, and pip install -r requirements-play.txt",
)


HAS_ENDED = """said => {
    const status = document.querySelector('#status').innerText;
    return status.includes(said) && /Done|another one|Not done/.test(status);
}"""


@pytest.fixture
def address():
    """The page's, served by play.py in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "play.py", "--run", DEMO, "--port", str(port)]
    server = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        for _ in range(300):
            assert server.poll() is None, "play.py has ended"
            with socket.socket() as attempt:
                if attempt.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(1)
        again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert again.returncode == 2 and "give another --port" in again.stderr.splitlines()[-1]
        yield port
    finally:
        server.terminate()
        server.wait()


def others_addresses():
    """This machine's addresses in its networks."""
    names = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
    return {name[4][0] for name in names} - {"127.0.0.1"}


@in_browser
@pytest.mark.slow
def test_the_page_in_a_browser(address, tmp_path):
    from playwright.sync_api import sync_playwright

    for other in others_addresses():
        with socket.socket() as attempt:
            assert attempt.connect_ex((other, address)) != 0, "the page listens in the network"

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 1000})
        errors = []
        requests = []
        tab.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(f"http://127.0.0.1:{address}")
        tab.wait_for_selector("#panels img")
        status = tab.locator("#status")

        # one sentence, and another after it
        pressed = 0
        for scene in range(3):
            tab.get_by_label("Scene").fill(str(scene))
            tab.get_by_label("Scene").press("Tab")
            tab.wait_for_timeout(1000)
            examples = tab.get_by_role("button").filter(has_text="push the")
            for sentence in examples.all_inner_texts()[:2]:
                box = tab.locator("#sentence textarea, #sentence input").first
                box.fill(sentence)
                box.press("Enter")
                tab.wait_for_function(HAS_ENDED, arg=sentence, timeout=120_000)
                pressed += "Done" in status.inner_text()
        assert pressed >= 2

        # a drag in the front camera's painted view
        view = tab.locator("#panels img[data-camera=front]").nth(1)
        box = view.bounding_box()
        tab.mouse.move(box["x"] + 70, box["y"] + 70)
        tab.mouse.down()
        tab.mouse.move(box["x"] + 90, box["y"] + 70)
        tab.mouse.up()
        tab.wait_for_function(
            "() => document.querySelector('#status').innerText.includes('sphere moved by')",
            timeout=60_000,
        )

        # the words, and the film
        tab.get_by_role("button", name="Look at the words").click()
        tab.wait_for_selector("#words img", timeout=60_000)
        tab.get_by_role("button", name="Film", exact=True).click()
        tab.wait_for_selector("video", timeout=180_000)
        tab.screenshot(path=tmp_path / "page.png", full_page=True)

        # clicks in any order
        random = np.random.default_rng(0)
        buttons = ["Run", "Step", "Stop", "Reset", "Say", *examples.all_inner_texts()]
        for _ in range(100):
            name = str(random.choice(buttons))
            tab.get_by_role("button", name=name, exact=True).click()
            tab.wait_for_timeout(int(random.integers(0, 100)))
        tab.get_by_role("button", name="Stop", exact=True).click()
        tab.get_by_role("button", name="Reset", exact=True).click()
        tab.wait_for_timeout(2000)
        assert tab.locator("#panels img").count() == 9
        browser.close()
    assert not errors, errors
    outside = [
        url
        for url in requests
        if not url.startswith((f"http://127.0.0.1:{address}", "data:", "blob:"))
    ]
    assert not outside, outside
