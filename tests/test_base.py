"""Stage 2 from a base: what it takes over, where it writes, and bases that do not fit."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from conftest import call

import train_controlnet
from genima.base import fingerprint, load_base
from genima.episodes import CAMERAS
from genima.files import UserError
from genima.painter import TinyPainter, load_painter
from genima.painter_training import fill_in_defaults
from genima.tokenizer import unknown_words
from sims.mujoco_tasks import TASKS

SIZE = 16  # pixels a view
CONFIG = {
    "size": "tiny",
    "objective": "one-step",
    "num_inference_steps": 1,
    "image_size": SIZE,
    "resolution": 2 * SIZE,
    "horizon": 0,
    "cameras": list(CAMERAS),
}
# All words of the task but the other colours.
SENTENCES = [template.format("rose") for template in TASKS["push_button"].templates]


def make_base(folder, sentences=SENTENCES, **config):
    folder.mkdir()
    torch.manual_seed(0)
    TinyPainter.from_scratch(sentences, CONFIG | config).save(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture
def run(recorded, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("episodes", "spheres"):
        (folder / name).symlink_to(recorded / name)
    return folder


def train(run, base, *options, steps=2):
    words = ["--run", run, "--base", base, "--steps", steps, "--batch-size", 2]
    return call(train_controlnet, *words, "--precision", "fp32", *options)


def test_a_painter_starts_from_its_base(base, run, capsys):
    out = run.parent / "elsewhere/painter"
    assert train(run, base, "--out", out, "--learning-rate", 0) == 0
    assert not (run / "controlnet").exists()
    printed = capsys.readouterr().out
    assert printed.count("New to the text encoder, which spells them in bytes: ") == 1
    config = json.loads((out / "painter.json").read_text())
    held_out = [f"push_button/1000001_{variation:02d}.hdf5" for variation in range(3)]
    facts = {"horizon": 8, "tasks": ["push_button"], "fps": 10.0, "held_out": held_out}
    assert config == CONFIG | facts
    for path in out.rglob("*.json"):
        assert str(base) not in path.read_text(), path  # of no use on another machine
    trained = load_painter(out)
    start = load_painter(base)
    assert trained.tokenizer.get_vocab() == start.tokenizer.get_vocab()
    for name, weight in start.state_dict().items():  # nothing was learned
        torch.testing.assert_close(trained.state_dict()[name], weight, atol=0, rtol=0)

    assert train(run, base, "--out", run / "painter") == 0  # now something is
    learned = load_painter(run / "painter").state_dict()
    changed = set()
    for name, weight in start.state_dict().items():
        if not torch.equal(learned[name], weight):
            changed.add(name.split(".")[0])
    assert changed == {"unet", "controlnet", "text_encoder"}


def test_the_base_decides_the_defaults(base, run):
    data = train_controlnet.find_frames(run)
    expected = {str(base): (1200, 2e-4), "none": (4800, 8e-4)}
    for name, defaults in expected.items():
        settings = train_controlnet.Settings(run=run, base=name)
        fill_in_defaults(settings, data)
        assert (settings.steps, settings.learning_rate) == defaults
        assert settings.out == run / "controlnet"
    settings = train_controlnet.Settings(run=run)
    fill_in_defaults(settings, data)
    assert settings.base.endswith("checkpoints/base") and settings.steps == 1200
    settings = train_controlnet.Settings(run=run, size="sd-turbo")
    fill_in_defaults(settings, data)
    assert (settings.base, settings.steps) == ("stabilityai/sd-turbo", 10_000)


LONG = "push the button " * 8 + "now"  # 25 words


def test_the_longest_prompt_sets_the_length_that_is_read():
    assert tokenize_lengths(["push"]) == 32
    assert tokenize_lengths(["push", LONG]) == 36
    with pytest.raises(UserError, match="has [0-9]+ tokens, and the painter reads at most 77"):
        TinyPainter.from_scratch([LONG * 3 + "push the button " * 3], CONFIG)


def tokenize_lengths(sentences):
    """How many tokens a painter of these sentences reads; it paints, and refuses a longer one."""
    painter = TinyPainter.from_scratch(sentences, CONFIG).eval()
    longest = painter.tokenizer.model_max_length
    views = {camera: np.zeros((1, SIZE, SIZE, 3), np.uint8) for camera in CAMERAS}
    painter.paint(views, sentences[-1:])
    with pytest.raises(UserError, match=f"tokens, and the painter reads at most {longest}: say"):
        painter.paint(views, [LONG + " push" * 40])
    return longest


def test_an_instruction_longer_than_the_base_reads_is_one_sentence(run, base, tmp_path, capsys):
    (run / "episodes").unlink()
    source = Path(run / "spheres").resolve().parent / "episodes"
    shutil.copytree(source, run / "episodes")
    for path in run.glob("episodes/*/*.hdf5"):
        with h5py.File(path, "r+") as root:
            root.attrs["instructions"] = [LONG]
    assert train(run, base) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and LONG in said[0] and "reads at most 32" in said[0], said
    assert not (run / "controlnet").exists()


def test_words_that_the_base_never_read(base):
    tokenizer = load_painter(base).tokenizer
    assert unknown_words(tokenizer, ["Push the rose button, robot!"]) == []
    said = unknown_words(tokenizer, ["push the zebra", "polish the ñandú in 1984"])
    assert said == ["in", "polish", "zebra", "ñandú"]


def test_a_training_resumes_from_its_own_base_only(base, run, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    assert fingerprint(other) == fingerprint(base)
    painter = load_base(other, CONFIG)
    with torch.no_grad():
        painter.unet.conv_in.bias += 1
    painter.save(other)
    assert fingerprint(other) != fingerprint(base)

    options = ["--checkpoint-every", 1, "--learning-rate", 1e-3]
    assert train(run, base, *options) == 0
    for name in (other, "none"):
        capsys.readouterr()
        assert train(run, name, *options) == 2
        sentence = capsys.readouterr().err.strip()
        assert "was trained with base" in sentence and len(sentence.splitlines()) == 1
    assert train(run, base, *options) == 0


BAD = {  # what to change in the base's config or the arguments -> a part of the sentence
    "another size": ({"size": "small"}, [], "is for size small, this run has tiny"),
    "for sd-turbo": ({}, ["--size", "sd-turbo"], "is for --size tiny"),
    "the output": ({}, ["--out", "BASE"], "is the base itself"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_base_that_does_not_fit_is_one_sentence(run, tmp_path, capsys, what):
    changes, options, sentence = BAD[what]
    base = make_base(tmp_path / "base", **changes)
    options = [base if option == "BASE" else option for option in options]
    files = {path: path.read_bytes() for path in base.rglob("*.*")}
    assert train(run, base, *options) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and sentence in said[0], said
    assert not (run / "controlnet").exists()
    assert files == {path: path.read_bytes() for path in base.rglob("*.*")}


@pytest.mark.parametrize("changes", [{"cameras": ["wrist", "front"]}, {"image_size": 32}])
def test_a_base_of_other_views_serves_and_it_is_said(run, tmp_path, capsys, changes):
    base = make_base(tmp_path / "base", **changes)
    assert train(run, base, "--steps", 1) == 0
    said = capsys.readouterr().out
    name = next(iter(changes))
    assert f"is of {name} {changes[name]}, not" in said
    painter = load_painter(run / "controlnet")
    assert painter.config[name] == CONFIG[name]


def test_from_a_base_few_cameras_have_its_cells(tmp_path):
    data = SimpleNamespace(cameras=["wrist"], image_size=None)
    for base, resolution in ((None, 64), ("none", 128)):
        settings = train_controlnet.Settings(run=tmp_path, base=base)
        fill_in_defaults(settings, data)
        assert settings.resolution == resolution


@pytest.mark.parametrize(
    "name, options, sentence",
    [
        ("no/such/folder", [], "holds no base for --size tiny: make one (make base)"),
        ("stabilityai/sd-turbo", [], "(--base none)"),
        ("none", ["--size", "sd-turbo"], "sd-turbo starts from SD-Turbo's folder"),
    ],
)
def test_no_base_is_one_sentence(run, capsys, name, options, sentence):
    assert train(run, name, *options) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and sentence in said[0], said


def test_half_a_base_is_one_sentence(run, tmp_path, capsys):
    base = make_base(tmp_path / "base")
    weights = base / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert train(run, base) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and str(base / "unet") in said[0], said


def test_the_shipped_base_paints():
    painter = load_painter("checkpoints/base")
    assert painter.config["cameras"] == list(CAMERAS) and painter.config["horizon"] == 0
    views = {camera: np.zeros((1, 64, 64, 3), np.uint8) for camera in CAMERAS}
    painted = painter.paint(views, ["the rose block"])
    assert {picture.shape for picture in painted.values()} == {(1, 64, 64, 3)}
