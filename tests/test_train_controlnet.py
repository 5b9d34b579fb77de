"""train_controlnet.py: tiles, tokens, layers, what is saved; a stopped training goes on to the same numbers; bad input."""

import csv
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import ControlNetModel, EulerDiscreteScheduler, UNet2DConditionModel
from test_episodes import contents
from transformers import CLIPTextModel, CLIPTokenizer

import train_controlnet
from genima.episodes import CAMERAS
from genima.files import UserError, run_stage
from genima.painter import (
    PROMPT,
    TOKENS,
    Painter,
    build_tiny,
    composite,
    tile,
    train_tokenizer,
    untile,
)
from train_controlnet import Batches, Settings, find_frames, load, painting_loss

SIZE = 16  # pixels a view
INSTRUCTIONS = [
    "push the blue button", "push the white button", "touch the rose ball with the panda gripper", "take lid off the saucepan",
    "slide the block to the target", "stack 2 orange blocks", "close box",
]  # fmt: skip


CONFIG = {
    "size": "tiny",
    "objective": "one-step",
    "steps": 1,
    "image_size": SIZE,
    "picture": 2 * SIZE,
    "horizon": 8,
    "cameras": list(CAMERAS),
}


SETTINGS = Settings(picture=2 * SIZE)


def parts_of(batch):
    return (batch[name] for name in ("condition", "observation", "layer", "prompts"))


def new_painter():
    torch.manual_seed(0)
    return Painter(build_tiny(INSTRUCTIONS, SIZE), {**CONFIG}).eval()


@pytest.fixture(scope="module")
def painter():
    """A painter that is not trained; the tests leave it so."""
    return new_painter()


def picture(seed=0, batch=1):
    return torch.rand(batch, 3, 2 * SIZE, 2 * SIZE, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------- tiles
def test_tiles_are_where_the_paper_puts_them():
    views = torch.rand(2, 4, 3, 5, 7)
    tiled = tile(views)
    assert tiled.shape == (2, 3, 10, 14) and CAMERAS == (
        "wrist",
        "front",
        "right_shoulder",
        "left_shoulder",
    )
    for i, (rows, columns) in enumerate(
        [
            (slice(5), slice(7)),
            (slice(5), slice(7, 14)),
            (slice(5, 10), slice(7)),
            (slice(5, 10), slice(7, 14)),
        ]
    ):
        torch.testing.assert_close(tiled[:, :, rows, columns], views[:, i], rtol=0, atol=0)
    assert torch.equal(untile(tiled), views)


def test_painting_nothing_gives_the_views_back(painter, monkeypatch):
    random = np.random.default_rng(0)
    images = {
        camera: random.integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
        for camera in reversed(CAMERAS)
    }
    logits = torch.full((2, 4, 2 * SIZE, 2 * SIZE), -30.0)
    monkeypatch.setattr(painter, "forward", lambda condition, prompts: logits)
    painted = painter.paint(images, INSTRUCTIONS[:2])
    for camera in CAMERAS:
        np.testing.assert_array_equal(painted[camera], images[camera])

    logits[1, [0, 3], :SIZE, SIZE:] = 30  # red, opaque, upper right
    painted = painter.paint(images, INSTRUCTIONS[:2])
    assert (painted["front"][1] == [255, 0, 0]).all()
    np.testing.assert_array_equal(painted["front"][0], images["front"][0])
    np.testing.assert_array_equal(painted["wrist"], images["wrist"])


# --------------------------------------------------------------------------------------------------------------- tokens
def test_every_word_of_the_instructions_is_one_token(painter):
    tokenizer, words = (
        painter.tokenizer,
        sorted({word for text in INSTRUCTIONS for word in re.findall("[a-z]+", text)}),
    )
    assert {word: len(tokenizer(word).input_ids) for word in words} == dict.fromkeys(
        words, 3
    )  # start, word, end
    for text in INSTRUCTIONS:
        ids, tokens = (
            tokenizer(PROMPT.format(text)).input_ids,
            tokenizer.tokenize(PROMPT.format(text)),
        )
        assert len(ids) <= TOKENS and tokenizer.unk_token_id not in ids[:-1]
        assert {word + "</w>" for word in text.split()[1:]} <= set(
            tokens
        )  # the first word: CLIP cuts 'touch into 't and ouch
    assert len({tuple(tokenizer(PROMPT.format(text)).input_ids) for text in INSTRUCTIONS}) == len(
        INSTRUCTIONS
    )


def test_the_same_instructions_give_the_same_numbers():
    """Or a resumed training would mix the words up."""
    vocabularies = [
        train_tokenizer(sentences).get_vocab()
        for sentences in (INSTRUCTIONS, INSTRUCTIONS[::-1])
        for _ in range(3)
    ]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


def test_unknown_words_become_bytes(painter, tmp_path):
    tokenizer, text = painter.tokenizer, "polish the zebra's ñandú in 1984 猫 "
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert not {tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id} & set(
        ids[1:-1]
    )
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")

    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert len(again) == len(tokenizer) == painter.text_encoder.config.vocab_size
    for text in (text, *INSTRUCTIONS):
        assert again(text).input_ids == tokenizer(text).input_ids


# -------------------------------------------------------------------------------------------------------------- network
def test_an_untrained_controlnet_changes_nothing(painter, monkeypatch):
    """Its zero convolutions: training starts from what the UNet alone would paint."""
    arguments, unet = (picture(batch=2), INSTRUCTIONS[:2]), painter.unet.forward

    def alone(*inputs, down_block_additional_residuals, mid_block_additional_residual, **named):
        return unet(*inputs, **named)

    with torch.no_grad():
        painted = painter(*arguments)
        monkeypatch.setattr(painter.unet, "forward", alone)
        assert painted.shape == (2, 4, 2 * SIZE, 2 * SIZE) and torch.equal(
            painted, painter(*arguments)
        )


def test_diffusers_and_transformers_load_what_is_saved(tmp_path):
    painter = new_painter()
    with torch.no_grad():
        for parameter in (
            painter.controlnet.parameters()
        ):  # as after training: no zero convolution is zero any more
            parameter += 0.01 * torch.randn_like(parameter)
    painter.save(tmp_path)
    parts = dict(
        tokenizer=CLIPTokenizer.from_pretrained(tmp_path / "tokenizer"), text_encoder=CLIPTextModel.from_pretrained(tmp_path / "text_encoder"),
        unet=UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet"),
        controlnet=ControlNetModel.from_pretrained(tmp_path, subfolder="controlnet"),
        scheduler=EulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler"),
    )  # fmt: skip
    from_parts, loaded = Painter(parts, painter.config).eval(), Painter.load(tmp_path)
    assert loaded.horizon == 8 and loaded.config["image_size"] == SIZE
    with torch.no_grad():
        expected = painter(picture(), INSTRUCTIONS[:1])
        assert torch.equal(from_parts(picture(), INSTRUCTIONS[:1]), expected)
        assert torch.equal(loaded(picture(), INSTRUCTIONS[:1]), expected)
        assert not torch.equal(loaded(picture(), INSTRUCTIONS[1:2]), expected)
    files = {path.relative_to(tmp_path).as_posix() for path in contents(tmp_path)}
    assert {"unet/diffusion_pytorch_model.safetensors", "controlnet/diffusion_pytorch_model.safetensors",
            "text_encoder/model.safetensors", "scheduler/scheduler_config.json"} <= files  # fmt: skip
    assert not [file for file in files if file.startswith(".") or file.endswith(".bin")]
    with pytest.raises(UserError, match="holds no painter"):
        Painter.load(tmp_path / "unet")


def test_painting_loss_by_hand():
    """One picture of two pixels: the left one is the sphere's."""
    logits = torch.zeros(1, 4, 1, 2)  # paints grey, half transparent
    layer = torch.tensor([1.0, 0.0]).expand(1, 4, 1, 2)  # white and opaque; nothing
    observation = torch.zeros(1, 3, 1, 2)
    # Painted 0.5 * 0.5 = 0.25 in both; the truth is 1 and 0. Sphere pixels count twenty times.
    by_hand = math.log(2) + (20 * (1 - 0.25) + 1 * 0.25) / 2
    assert painting_loss(logits, layer, observation).item() == pytest.approx(by_hand, rel=1e-6)
    sure = torch.tensor([30.0, -30.0]).expand(1, 4, 1, 2)
    assert painting_loss(sure, layer, observation).item() == pytest.approx(0, abs=1e-6)


def test_the_same_picture_is_painted_as_the_instruction_says():
    """Overfitting on one picture: blue is on the left, white on the right."""
    painter = new_painter().train()
    observation = picture().expand(2, -1, -1, -1)
    y, x = torch.meshgrid(torch.arange(2 * SIZE), torch.arange(2 * SIZE), indexing="ij")
    alphas = torch.stack(
        [(x - centre) ** 2 + (y - 20) ** 2 < 25 for centre in (7, 24)]
    ).float()  # (2, H, W)
    layer = torch.stack([0 * alphas, alphas, alphas, alphas], dim=1)  # cyan
    prompts = [PROMPT.format(text) for text in INSTRUCTIONS[:2]]
    optimizer = torch.optim.AdamW(painter.parameters(), lr=1e-3)
    losses = []
    for _ in range(70):
        losses.append(painting_loss(painter(observation, prompts), layer, observation))
        optimizer.zero_grad()
        losses[-1].backward()
        torch.nn.utils.clip_grad_norm_(painter.parameters(), 1.0)
        optimizer.step()
    assert losses[0] > 1 and losses[-1] < 0.1, (losses[0], losses[-1])
    with torch.no_grad():
        painted = painter.eval()(observation, prompts)[:, 3] > 0
    overlap = [
        [((a & (b > 0)).sum() / (a | (b > 0)).sum()).item() for b in alphas] for a in painted
    ]
    assert min(overlap[0][0], overlap[1][1]) > 0.9 and max(overlap[0][1], overlap[1][0]) < 0.1, (
        overlap
    )
    assert (
        max(
            parameter.abs().max()
            for block in painter.controlnet.controlnet_down_blocks
            for parameter in block.parameters()
        )
        > 0
    )


# ----------------------------------------------------------------------------------------------------------------- data
@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run with two scenes of three buttons (one scene is held out), and their spheres."""
    run = tmp_path_factory.mktemp("recorded")
    for command in (
        ["collect_demos.py", "--tasks", "push_button", "--scenes", "2", "--image-size", str(SIZE)],
        ["render_spheres.py"],
    ):
        done = subprocess.run(
            [sys.executable, *command, "--run", run], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    return run


def test_noise_becomes_the_picture_with_the_layer_in_any_number_of_steps(monkeypatch):
    painter = Painter(
        build_tiny(["push the blue button"], SIZE), CONFIG | {"objective": "noise", "steps": 4}
    ).eval()
    condition, layer, seen = (
        torch.rand(2, 3, 2 * SIZE, 2 * SIZE),
        torch.rand(2, 4, 2 * SIZE, 2 * SIZE),
        [],
    )
    monkeypatch.setattr(
        painter,
        "forward",
        lambda condition, prompts, latent, t: seen.append((t.item(), latent)) or layer.logit(),
    )
    painted = painter.paint_tiles(condition, ["", ""])
    torch.testing.assert_close(painted, composite(layer, condition), atol=1e-4, rtol=0)
    assert [t for t, _ in seen] == [999, 749, 499, 249]
    assert 0.9 < seen[0][1].std() < 1.1 and not torch.equal(
        seen[0][1], seen[1][1]
    )  # from noise of unit strength
    far, near = ((painter.decode(seen[i][1]) - painted).abs().mean() for i in (1, 3))
    assert near < 0.7 * far  # step by step, it clears up


def test_batches_depend_on_seed_and_step_alone(recorded):
    training, held_out, horizon = find_frames(recorded)
    assert horizon == 8 and {"1000000"} == {
        path.split("/")[-1].split("_")[0] for path, *_ in held_out
    }
    assert {"1000001"} == {path.split("/")[-1].split("_")[0] for path, *_ in training}
    settings = Settings(batch=4, seed=5, picture=2 * SIZE)
    batches = Batches(training, settings)
    first, again, next_one = (
        batches[4],
        Batches(training, replace(settings, steps=9))[4],
        batches[5],
    )
    halves = [
        Batches(training, settings, process, 2)[4] for process in range(2)
    ]  # shared between two processes: the same samples
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, again[name]) and torch.equal(
                value, torch.cat([half[name] for half in halves])
            )
        else:
            assert value == again[name] == halves[0][name] + halves[1][name]
    assert (
        not torch.equal(first["condition"], next_one["condition"]) and len(set(first["seeds"])) == 4
    )
    condition, observation, layer, prompts = parts_of(first)
    assert condition.shape == observation.shape == (4, 3, 2 * SIZE, 2 * SIZE) and layer.shape == (
        4,
        4,
        2 * SIZE,
        2 * SIZE,
    )
    assert (
        all(x.min() >= 0 and x.max() <= 1 for x in (condition, observation, layer))
        and len(prompts) == 4
    )


def test_crop_moves_picture_and_layer_together_and_jitter_the_condition_alone(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (1, SIZE, SIZE, 4), np.uint8)
    with h5py.File(tmp_path / "both.hdf5", "w") as root:
        for camera in CAMERAS:
            root[f"layers/{camera}"], root[f"observations/images/{camera}"] = (
                pictures,
                pictures[..., :3],
            )
    frames = [(tmp_path / "both.hdf5", tmp_path / "both.hdf5", 0, ["push"])] * 8
    condition, observation, layer, prompts = parts_of(
        load(frames, [np.random.default_rng(i) for i in range(8)], SETTINGS, augment=True)
    )
    seen = (layer[:, 3:] > 0.01).expand(-1, 3, -1, -1)  # what is transparent has no colour
    torch.testing.assert_close(observation[seen], layer[:, :3][seen])
    assert not torch.equal(observation[0], observation[1])
    assert (condition - observation).abs().mean() > 0.01 and prompts == [PROMPT.format("push")] * 8
    condition, observation, layer, _ = parts_of(
        load(frames, [np.random.default_rng(0)] * 8, SETTINGS, augment=False)
    )
    plain = torch.from_numpy(pictures[0]).permute(2, 0, 1) / 255
    assert torch.equal(condition, observation)
    torch.testing.assert_close(untile(layer)[3, 2][:, plain[3] > 0.01], plain[:, plain[3] > 0.01])


# ------------------------------------------------------------------------------------------- processes that run the stage
FORKS = multiprocessing.get_context(
    "forkserver"
)  # imports the stage once, which takes seconds, and forks a process per run
FORKS.set_forkserver_preload(["train_controlnet"])
STEPS, CHECKPOINT = 24, 8


def child(main, log, arguments):
    sys.argv = ["train_controlnet.py", *map(str, arguments)]
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as on the command line
    run_stage(main)


def start(run, *arguments, main=train_controlnet.main):
    """The stage in a process of its own; what it prints goes to <run>.out and <run>.err."""
    settings = ["--steps", STEPS, "--batch", 2, "--checkpoint-every", CHECKPOINT]
    process = FORKS.Process(target=child, args=(main, run, ["--run", run, *settings, *arguments]))
    process.start()
    return process


def end(process, timeout=300):
    process.join(timeout)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def wait_until(condition, process):
    while not condition():
        assert process.is_alive(), "it ended too early"
        time.sleep(0.01)


def printed(run, name="err"):
    log = run.with_name(f"{run.name}.{name}")
    return log.read_text() if log.exists() else ""


@pytest.fixture(scope="module")
def trained(recorded):
    """A run trained without a break, and a copy of the recorded one to be trained with breaks meanwhile."""
    run, broken = (recorded.with_name(name) for name in ("trained", "broken"))
    shutil.copytree(recorded, run)
    shutil.copytree(recorded, broken)
    process = start(run)
    yield run, broken, process
    process.kill()


def test_a_stopped_training_goes_on_to_the_same_losses(trained):
    run, broken, process = trained
    log = broken / "controlnet/losses.csv"

    stopped = start(broken)
    wait_until(
        lambda: re.search(r"\| [1-9]\d*/", printed(broken)), stopped
    )  # the progress bar counts
    os.kill(stopped.pid, signal.SIGINT)  # Ctrl-C
    assert end(stopped) == 130
    step = int(
        re.search(
            r"Stopped after step (\d+): run the same command again to go on\.", printed(broken)
        )[1]
    )
    assert 0 < step < STEPS and len(log.read_text().splitlines()) == 1 + step

    before = log.stat().st_mtime_ns
    killed = start(broken)
    wait_until(lambda: log.stat().st_mtime_ns != before, killed)
    killed.kill()
    assert end(killed) == -signal.SIGKILL
    rows = list(csv.reader(log.open()))
    assert step < len(rows) - 1 < STEPS and (len(rows) - 1) % CHECKPOINT == 0  # a checkpoint, whole

    assert end(start(broken)) == 0 and end(process) == 0, printed(run)
    assert log.read_text() == (run / "controlnet/losses.csv").read_text()
    rows = list(csv.DictReader(log.open()))
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    assert [int(row["step"]) for row in rows if row["first_frame_iou"]] == [8, 16, 24]
    same = [
        Painter.load(folder / "controlnet")(picture(), INSTRUCTIONS[:1]) for folder in (run, broken)
    ]
    assert torch.equal(*same)
    assert (
        "painter" in printed(run)
        and f"{STEPS}/{STEPS}" in printed(run)
        and "IoU" in printed(run, "out")
    )

    untouched = contents(run / "controlnet")
    assert (
        end(start(run)) == 0
        and "trained already" in printed(run, "out")
        and contents(run / "controlnet") == untouched
    )


def paint_larger_pictures():
    images = {camera: np.zeros((1, 2 * SIZE, 2 * SIZE, 3), np.uint8) for camera in CAMERAS}
    Painter.load(sys.argv[2] + "/controlnet").paint(images, ["push the blue button"])


def first(run, folder):
    return sorted((run / folder).glob("*/*.hdf5"))[-1]  # of the scene that is trained on


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_horizon(run):
    with h5py.File(first(run, "spheres"), "r+") as root:
        root.attrs["horizon"] = 20


def half_a_checkpoint(run):
    (run / "controlnet").mkdir()
    torch.save({"identity": {}, "step": 3}, run / "controlnet/training.pt")
    halve(run / "controlnet/training.pt")


BAD = {
    "no episodes": (lambda run: shutil.rmtree(run / "episodes"), [], "There is no HDF5 file in"),
    "no spheres": (
        lambda run: first(run, "spheres").unlink(),
        [],
        "is missing: draw the spheres first",
    ),
    "two horizons": (change_horizon, [], "different horizons"),
    "half an episode": (lambda run: halve(first(run, "episodes")), [], "cannot be read"),
    "half a file of spheres": (lambda run: halve(first(run, "spheres")), [], "cannot be read"),
    "nothing but held-out scenes": (
        lambda run: [path.unlink() for path in run.glob("*/*/1000001*")],
        [],
        "no scene to train on",
    ),
    "half a checkpoint": (half_a_checkpoint, [], "training.pt cannot be read"),
    "no step": (lambda run: None, ["--steps", "0"], "must be 1 or more"),
}


@pytest.fixture(scope="module")
def bad_runs(recorded):
    """All of them, one process each, at once."""
    runs = {}
    for i, (what, (damage, arguments, _)) in enumerate(BAD.items()):
        run = recorded.with_name(f"bad{i}")
        shutil.copytree(recorded, run)
        damage(run)
        runs[what] = run, contents(run), start(run, *arguments)
    return runs


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_sentence(bad_runs, what):
    run, before, process = bad_runs[what]
    assert end(process) == 2, printed(run)
    assert BAD[what][2] in printed(run) and (str(run) in printed(run) or what == "no step")
    assert len(printed(run).splitlines()) == 1
    assert contents(run) == before


def test_pictures_of_another_size_are_one_sentence(trained):
    run, _, process = trained
    assert end(process) == 0
    before = contents(run)
    assert end(start(run, main=paint_larger_pictures)) == 2
    sentence = f"The painter was trained on views of {SIZE} pixels, these have {2 * SIZE}: render the observations in that size."
    assert printed(run).splitlines()[-1] == sentence and "Traceback" not in printed(run)
    assert contents(run) == before


def test_a_checkpoint_is_refused_with_other_settings(trained):
    run, _, process = trained
    assert end(process) == 0
    before = contents(run)
    assert end(start(run, "--batch", "3")) == 2
    assert "was trained with batch 2, not 3" in printed(run) and len(printed(run).splitlines()) == 1
    this = torch.load(run / "controlnet/training.pt", weights_only=True)["identity"][
        "precision"
    ]  # bf16 where the CPU has it
    other = {"bf16": "fp32", "fp32": "bf16"}[this]
    assert end(start(run, "--precision", other)) == 2
    assert f"was trained with precision {this}, not {other}" in printed(run)
    assert contents(run) == before
    assert json.loads((run / "controlnet/painter.json").read_text()) == CONFIG
