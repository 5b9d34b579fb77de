"""The rung between tiny and SD-Turbo: --size small, from its base to an episode in closed loop.

Its true size is built once. All trainings here are of the same layout with fewer channels.
"""

import csv
import json
import shutil

import h5py
import numpy as np
import pytest
import torch
from conftest import call
from test_evaluate import untrained

import evaluate
import pretrain_painter
import train_controlnet
from genima import painter_training, scene_files
from genima.base import fingerprint
from genima.checkpoints import load_policy
from genima.episodes import CAMERAS
from genima.files import UserError
from genima.painter import PROMPT, TinyPainter, load_painter
from genima.painter_training import check_settings, choose_precision, fill_in_defaults
from genima.tiny import LAYOUTS, pixel_unit
from sims.scene_sentences import all_sentences, kind_of
from train_controlnet import Settings

SIZE = 16  # pixels a view
NARROW = {"channels": (16, 16, 32, 32), "heads": 2, "text_width": 16, "text_layers": 1}
SENTENCE = "push the rose button"


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setitem(LAYOUTS, "small", NARROW)


@pytest.fixture
def run(recorded, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("episodes", "spheres"):
        (folder / name).symlink_to(recorded / name)
    return folder


def train(run, *options):
    words = ["--run", run, "--size", "small", "--steps", 2, "--batch-size", 2]
    return call(train_controlnet, *words, "--precision", "fp32", *options)


def losses(folder):
    with open(folder / "losses.csv") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


# ---------------------------------------------------------------------------------------- true size
def test_the_true_size():
    """60 to 100 M parameters; four views of 128x128; a prompt that changes what is painted."""
    config = {
        "size": "small",
        "objective": "one-step",
        "num_inference_steps": 1,
        "image_size": 128,
        "resolution": 256,
        "horizon": 8,
        "cameras": list(CAMERAS),
    }
    torch.manual_seed(0)
    painter = TinyPainter.from_scratch([SENTENCE, "pick up the red block"], config).eval()
    count = sum(parameter.numel() for parameter in painter.parameters())
    assert 60e6 < count < 100e6, count
    assert not hasattr(painter, "vae")
    with torch.no_grad():
        hidden_states, pooled = painter.encode_text([PROMPT.format(SENTENCE)])
        assert hidden_states.shape == (1, 32, 256) and pooled.shape == (1, 256)
        tiled = torch.rand(1, 3, 256, 256)
        assert painter.encode_images(tiled).shape == (1, 48, 64, 64)
        assert torch.allclose(painter.decode_latents(painter.encode_images(tiled)), tiled)
        layers = [painter(tiled, [PROMPT.format(text)]) for text in (SENTENCE, "pick up")]
    assert layers[0].shape == (1, 4, 256, 256)
    assert not torch.equal(*layers)
    # The last level has 4x4 cells a view: 64 latents a side, halved three times.
    assert pixel_unit("small") == 32 and pixel_unit("tiny") == 16


def test_its_defaults(recorded):
    data = train_controlnet.find_frames(recorded)
    expected = {None: (1200, 7e-5), "none": (4800, 3e-4)}
    for base, defaults in expected.items():
        settings = Settings(run=recorded, size="small", base=base)
        fill_in_defaults(settings, data)
        assert (settings.steps, settings.learning_rate) == defaults
        assert settings.base == (base or "runs/base-small")
        assert settings.resolution == 2 * SIZE  # as recorded
        settings.micro_batch_size = 1
        check_settings(settings, 1, list(CAMERAS))
    data.image_sizes = dict.fromkeys(CAMERAS, (480, 640))
    settings = Settings(run=recorded, size="small")
    fill_in_defaults(settings, data)
    assert settings.resolution == 256
    settings = Settings(
        size="small", steps=1, micro_batch_size=1, resolution=80, learning_rate=1e-4
    )
    with pytest.raises(UserError, match="80x80 pixels, which is no multiple of 32"):
        check_settings(settings, 1, list(CAMERAS))

    for size, (folder, pixels, rate) in {
        "tiny": ("runs/base", 64, 8e-4),
        "small": ("runs/base-small", 128, 3e-4),
    }.items():
        settings = pretrain_painter.Settings(size=size)
        pretrain_painter.fill_in_defaults(settings)
        assert settings.out.as_posix() == folder
        assert (settings.image_size, settings.learning_rate) == (pixels, rate)


@pytest.mark.parametrize(
    "gpu, able, chosen",
    [(True, {}, "bf16"), (False, {"amx_bf16": True}, "bf16"), (False, {}, "fp32")],
)
def test_bf16_on_a_gpu_or_on_a_cpu_that_has_it(monkeypatch, gpu, able, chosen):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert choose_precision("small", "auto") == chosen


# ---------------------------------------------------------------------------------------- trainings
@pytest.fixture(autouse=True)
def few_scenes_a_file(monkeypatch):
    monkeypatch.setattr(scene_files, "SHARD", 3)
    monkeypatch.setattr(pretrain_painter, "SHARD", 3)


def make_scenes(folder, size=SIZE, count=3):
    """A file as pretrain_painter.py draws them, of random pixels."""
    random = np.random.default_rng(0)
    path = folder / "0000000.hdf5"
    folder.mkdir(parents=True)
    with h5py.File(path, "w") as root:
        root.attrs["format"] = pretrain_painter.FORMAT
        root["images"] = random.integers(0, 256, (count, 4, size, size, 3), np.uint8)
        root["layers"] = random.integers(0, 256, (count, 4, 4, size, size, 4), np.uint8)
        sentences = ["the robot as it is, the hand open", "the rose button"]
        sentences += ["the open hand at the rose button", "the open hand above the rose button"]
        root["sentences"] = np.array([sentences] * count, dtype=h5py.string_dtype())
    return path


def test_from_the_base_to_an_episode(narrow, run, tmp_path, monkeypatch, capsys):
    """pretrain_painter.py, train_controlnet.py stopped and resumed, one episode of evaluate.py."""
    base = tmp_path / "base"
    make_scenes(base / "scenes")
    words = ["--size", "small", "--image-size", SIZE, "--out", base, "--scenes", 1]
    words += ["--steps", 1, "--batch-size", 2, "--workers", 1]
    assert call(pretrain_painter, *words) == 0
    config = json.loads((base / "painter.json").read_text())
    assert (config["size"], config["image_size"]) == ("small", SIZE)
    assert (base / "scenes.png").exists()
    before = fingerprint(base)
    assert call(pretrain_painter, *words) == 0  # it is trained already
    assert fingerprint(base) == before
    assert call(pretrain_painter, *words, "--size", "tiny") == 2
    assert "was trained with size small, not tiny" in capsys.readouterr().err

    # Whole; and stopped after the first step, then resumed.
    capsys.readouterr()
    assert train(run, "--base", base, "--out", run / "whole", "--compile") == 0
    printed = capsys.readouterr().out
    assert printed.count("There is no CUDA GPU to measure on: one sample at once") == 1
    assert printed.count("There is no CUDA GPU, so nothing is compiled.") == 1
    with monkeypatch.context() as patch:
        patch.setattr(train_controlnet.StopSignal, "requested", True, raising=False)
        patch.setattr(train_controlnet.StopSignal, "__init__", lambda self: None)
        assert train(run, "--base", base) == 130
    assert len(losses(run / "controlnet")) == 1
    assert train(run, "--base", base) == 0
    assert losses(run / "controlnet") == losses(run / "whole")
    assert train(run, "--base", "none", "--learning-rate", 7e-5) == 2
    assert "was trained with base" in capsys.readouterr().err
    card = (run / "controlnet/README.md").read_text()
    assert "license: mit" in card and "(small, one-step)" in card

    # The tiny controller follows it.
    untrained(run / "act", image_size=[SIZE, SIZE])
    settings = evaluate.Settings(
        run=run, size="small", sim="mujoco", execution_horizon=40, videos=0, device="cpu"
    )
    settings.painter = run / "controlnet"
    settings.controller = run / "act"
    workspace = evaluate.Workspace([settings])
    outcome, _ = evaluate.run_episode(workspace, 0, "push_button", 0)
    assert "error" not in outcome and outcome["steps"] > 0
    with pytest.raises(UserError, match="was trained with --size small, not tiny"):
        load_policy(run / "controlnet", run / "act", size="tiny")

    capsys.readouterr()
    load_painter(run / "controlnet", compile=True)
    assert "--taesd and --compile are for sd-turbo" in capsys.readouterr().out


def test_noise_prediction_from_random_weights(narrow, run):
    assert train(run, "--base", "none", "--objective", "noise", "--steps", 1) == 0
    painter = load_painter(run / "controlnet")
    assert painter.config["objective"] == "noise"
    views = {camera: np.zeros((1, SIZE, SIZE, 3), np.uint8) for camera in CAMERAS}
    assert painter.paint(views, [SENTENCE])["wrist"].shape == (1, SIZE, SIZE, 3)


def test_bases_that_do_not_fit_are_one_sentence(narrow, run, tmp_path, capsys):
    assert train(run, "--base", tmp_path / "none here") == 2
    said = capsys.readouterr().err.strip()
    assert "holds no base for --size small: make one (python pretrain_painter.py --size" in said
    assert len(said.splitlines()) == 1
    assert train(run, "--base", "checkpoints/base") == 2
    said = capsys.readouterr().err.strip()
    assert "is for size tiny, this run has small" in said and len(said.splitlines()) == 1


def test_scenes_of_another_size_are_one_sentence(tmp_path, capsys):
    make_scenes(tmp_path / "scenes", size=8)
    words = ["--out", tmp_path, "--scenes", 1, "--image-size", SIZE, "--workers", 1]
    assert call(pretrain_painter, *words) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "has views of 8 pixels: give --image-size 8, or another --out" in said
    shutil.rmtree(tmp_path / "scenes")


def test_every_sentence_has_a_kind_and_known_words():
    sentences = all_sentences()
    assert "the rose block" in sentences and sentences == sorted(set(sentences))
    assert kind_of("the robot as it is, the hand open") == "A"
    assert kind_of("the rose block") == "B"
    assert kind_of("the open hand above the rose block") == "C"


def test_on_a_gpu_its_convolutions_run_channels_last():
    """prepare_tiny asks for it where bf16 convolutions are faster so, and nowhere else."""

    class Watched(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.moves = []

        def to(self, *places, **options):
            self.moves.append(options)
            return self

    for device, bf16, moves in (("cuda", True, 2), ("cuda", False, 1), ("cpu", False, 1)):
        painter = Watched()
        painter_training.prepare_tiny(painter, torch.device(device), bf16)
        assert len(painter.moves) == moves
