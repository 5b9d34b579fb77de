"""Bad options, paths and checkpoints: exit code 2, one sentence, no traceback, nothing written."""

import importlib
import shutil

import h5py
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from test_episodes import contents, stage
from turbo import make_turbo

import train_act
from genima.files import UserError
from genima.hub import load_parts
from genima.painter import TurboPainter

SHORT = ["--steps", 3, "--batch-size", 2, "--checkpoint-every", 3, "--keep", 1]
SD_TURBO = ["--size", "sd-turbo", "--base"]
NAN = float("nan")

# stage, options, what the sentence says
OPTIONS = [
    ("collect_demos", ["--scenes", 10**18], "--scenes must be"),
    ("collect_demos", ["--scenes", -1], "--scenes must be"),
    ("collect_demos", ["--seed", -1], "--seed must be"),
    ("collect_demos", ["--seed", 10**30], "--seed must be"),
    ("collect_demos", ["--image-size", 10**9], "--image-size must be"),
    ("collect_demos", ["--workers", 10**9], "--workers must be"),
    ("collect_demos", ["--tasks", "../x"], "'../x'"),
    ("collect_demos", ["--from-rlbench", "/nowhere"], "/nowhere"),
    ("render_spheres", ["--horizon", 10**30], "--horizon must be"),
    ("render_spheres", ["--horizon", 0], "--horizon must be"),
    ("render_spheres", ["--size", 10**9], "--size must be"),
    ("render_spheres", ["--size", -3], "--size must be"),
    ("render_spheres", ["--calibration", "x" * 300], "too long"),
    ("render_spheres", ["--calibration", "/"], "/"),
    ("train_controlnet", ["--crop", 16], "--crop must be from 0 to 15, not 16"),
    ("train_controlnet", ["--crop", -1], "--crop must be"),
    ("train_controlnet", ["--num-inference-steps", 5000], "from 1 to 1000, not 5000"),
    ("train_controlnet", ["--resolution", 160_000_000], "--resolution must be"),
    ("train_controlnet", ["--resolution", -16], "--resolution must be"),
    ("train_controlnet", ["--micro-batch-size", 0], "--micro-batch-size must be"),
    ("train_controlnet", [*SD_TURBO, "/nowhere"], "/nowhere is neither a folder"),
    ("train_controlnet", [*SD_TURBO, "no such"], "no such is neither a folder"),
    ("train_controlnet", [*SD_TURBO, "a/b/c"], "a/b/c is neither a folder"),
    ("train_controlnet", [*SD_TURBO, "x" * 300], "too long"),
    ("evaluate", ["--episodes", 10**18], "--episodes must be"),
    ("evaluate", ["--seed", -1], "--seed must be"),
    ("evaluate", ["--workers", 10**6], "--workers must be"),
    ("evaluate", ["--execution-horizon", 10**30], "--execution-horizon must be"),
    ("evaluate", ["--policy", "nope"], "'nope'"),
    ("evaluate", ["--policy", ":"], "There is no file"),
    ("evaluate", ["--controller", "/nowhere"], "There is no checkpoint /nowhere"),
]
TRAINING = [
    (["--learning-rate", NAN], "--learning-rate must be from 0 to 1, not nan"),
    (["--learning-rate", -1], "--learning-rate must be"),
    (["--learning-rate", "inf"], "--learning-rate must be"),
    (["--learning-rate", "1e30"], "--learning-rate must be"),
    (["--seed", -1], "--seed must be"),
    (["--seed", 10**30], "--seed must be"),
    (["--steps", 0], "--steps must be 1 or more, not 0"),
    (["--batch-size", 10**12], "--batch-size must be"),
    (["--checkpoint-every", 0], "--checkpoint-every must be"),
    (["--keep", -1], "--keep must be 0 or more, not -1"),
]
for name in ("train_controlnet", "train_act"):
    OPTIONS += [(name, [*SHORT, *options], words) for options, words in TRAINING]


# Stages that write to other folders: the options come alone.
OTHERS = [
    ("import_demos", [], "nothing to import"),
    ("import_demos", ["--fps", NAN], "--fps must be"),
    ("import_demos", ["--fps", 10**30], "--fps must be"),
    ("import_demos", ["--source-fps", -1], "--source-fps must be"),
    ("import_demos", ["--workers", 0], "--workers must be"),
    ("import_demos", ["--gripper-length", NAN], "--gripper-length must be"),
    ("import_demos", ["--task", "../x"], "not a path"),
    ("import_demos", ["--robot", "hal"], "hal"),
    ("import_demos", ["/nowhere"], "/nowhere does not exist"),
    ("import_demos", ["x" * 300], "too long"),
    ("import_demos", [".", "--mapping", "nope"], "no mapping 'nope'"),
    ("import_demos", [".", "--mapping", "/dev/zero"], "/dev/zero"),
    ("import_demos", ["--to-act", "/nowhere", "out"], "/nowhere"),
    ("import_demos", ["--to-lerobot", "/nowhere", "out"], "/nowhere"),
    ("pretrain_painter", ["--steps", -1], "--steps must be"),
    ("pretrain_painter", ["--scenes", 0], "--scenes must be"),
    ("pretrain_painter", ["--scenes", 10**18], "--scenes must be"),
    ("pretrain_painter", ["--image-size", 12], "--image-size must be a multiple of 8"),
    ("pretrain_painter", ["--image-size", 10**9], "--image-size must be"),
    ("pretrain_painter", ["--learning-rate", NAN], "--learning-rate must be"),
    ("pretrain_painter", ["--batch-size", -1], "--batch-size must be"),
    ("pretrain_painter", ["--seed", 10**30], "--seed must be"),
    ("pretrain_painter", ["--workers", 10**9], "--workers must be"),
    ("pretrain_painter", ["--out", "/dev/null"], "/dev/null"),
    ("real_robot", ["run"], "There is no checkpoint"),
    ("real_robot", ["record", "--seed", -1], "--seed must be"),
    ("real_robot", ["record", "--size", 10**9], "--size must be"),
    ("real_robot", ["record", "--seconds", NAN], "--seconds must be"),
    ("real_robot", ["record", "--robot", "nobody"], "A robot needs --cameras"),
    ("real_robot", ["record", "--robot", "nobody", "--calibration", "/dev/zero"], "/dev/zero"),
    ("real_robot", ["run", "--policy", "demonstrator", "--episodes", 0], "--episodes must be"),
    ("real_robot", ["run", "--policy", "demonstrator", "--watchdog", NAN], "--watchdog must be"),
    ("real_robot", ["replay", "/nowhere"], "/nowhere"),
    ("real_robot", ["replay", "x" * 300], "x" * 300),
    ("real_robot", ["calibrate", "--images", "/nowhere"], "/nowhere"),
]


@pytest.mark.parametrize("name, options, words", OTHERS)
def test_a_bad_option_of_another_stage_is_one_sentence(
    tmp_path, monkeypatch, sentence_of, name, options, words
):
    monkeypatch.chdir(tmp_path)
    assert words in sentence_of(name, *options)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("name, options, words", OPTIONS)
def test_a_bad_option_is_one_sentence(copied, sentence_of, name, options, words):
    before = contents(copied)
    assert words in sentence_of(name, "--run", copied, *options)
    assert contents(copied) == before


# ------------------------------------------------------------------------------------------- paths
def a_file(path):
    path.write_text("")


def a_link_to_itself(path):
    path.symlink_to(path.name)


def a_link_to_nowhere(path):
    path.symlink_to("nowhere")


PATHS = [  # stage, what of the run is no folder
    ("collect_demos", "."),
    ("collect_demos", "episodes"),
    ("collect_demos", "episodes/push_button"),
    ("render_spheres", "."),
    ("render_spheres", "episodes"),
    ("render_spheres", "episodes/push_button"),
    ("render_spheres", "spheres"),
    ("render_spheres", "spheres/push_button"),
    ("train_controlnet", "."),
    ("train_controlnet", "spheres"),
    ("train_controlnet", "controlnet"),
    ("train_controlnet", "controlnet/training.pt"),
    ("train_act", "episodes"),
    ("train_act", "spheres/push_button"),
    ("train_act", "act"),
    ("train_act", "act/training.pt"),
    ("evaluate", "."),
    ("evaluate", "act"),
    ("evaluate", "controlnet"),
]
FEW = {
    "collect_demos": ["--tasks", "push_button", "--scenes", 1, "--image-size", 16],
    "render_spheres": [],
    "train_controlnet": [*SHORT, "--base", "none"],
    "train_act": SHORT,
    "evaluate": ["--tasks", "push_button", "--episodes", 1],
}


@pytest.mark.parametrize("what", [a_file, a_link_to_itself, a_link_to_nowhere])
@pytest.mark.parametrize("name, place", PATHS)
def test_a_path_that_is_no_folder_is_one_sentence(copied, sentence_of, name, place, what):
    path = copied / place
    if path.is_dir():
        path.rename(copied.parent / "moved away")
    path.parent.mkdir(exist_ok=True)
    what(path)
    before = contents(copied.parent)
    assert str(copied) in sentence_of(name, "--run", copied, *FEW[name])
    assert contents(copied.parent) == before


@pytest.mark.parametrize("name", FEW)
def test_a_name_that_is_too_long_is_one_sentence(tmp_path, sentence_of, name):
    sentence = sentence_of(name, "--run", tmp_path / ("x" * 300), *FEW[name])
    assert "x" * 300 in sentence
    assert contents(tmp_path) == {}


def test_a_seed_that_is_text_is_one_sentence(copied, sentence_of):
    path = sorted(copied.rglob("episodes/*/*.hdf5"))[0]
    with h5py.File(path, "r+") as root:
        root.attrs["seed"] = "first"
    for name in ("render_spheres", "train_act", "train_controlnet"):
        assert path.name in sentence_of(name, "--run", copied)


# ------------------------------------------------------------------------------------- checkpoints
CHANGES = {
    "without its identity": lambda checkpoint: checkpoint.pop("identity"),
    "with another identity": lambda checkpoint: checkpoint.update(identity=3),
    "without its step": lambda checkpoint: checkpoint.pop("step"),
    "with a step that is text": lambda checkpoint: checkpoint.update(step="x"),
    "of more steps than losses": lambda checkpoint: checkpoint.update(step=10**9),
    "without losses": lambda checkpoint: checkpoint.update(log=None),
    "without weights": lambda checkpoint: checkpoint.update(model=None),
    "without the optimiser": lambda checkpoint: checkpoint.pop("optimizer"),
    "with half an optimiser": lambda checkpoint: checkpoint.update(optimizer={}),
}


def test_a_broken_checkpoint_is_one_sentence(copied, sentence_of, monkeypatch, capsys):
    for name, folder in (("train_act", "act"), ("train_controlnet", "controlnet")):
        AcceleratorState._reset_state(True)
        main = importlib.import_module(name).main
        code, _, err = stage(monkeypatch, capsys, main, "--run", copied, *FEW[name])
        assert code == 0, err
        path = copied / folder / "training.pt"
        checkpoint = torch.load(path)
        for what, change in CHANGES.items():
            changed = dict(checkpoint)
            change(changed)
            torch.save(changed, path)
            before = contents(copied)
            sentence = sentence_of(name, "--run", copied, *FEW[name])
            assert str(path) in sentence and "cannot be read" in sentence, what
            assert contents(copied) == before


def test_a_loss_that_is_no_number_ends_a_training(copied, sentence_of, monkeypatch):
    def no_number(model, batch):
        joints, _, _ = model(**batch)
        zero = joints.sum() * 0
        return zero + NAN, dict.fromkeys(train_act.TRAINING_COLUMNS, zero)

    monkeypatch.setattr(train_act, "act_loss", no_number)
    assert "The loss is nan" in sentence_of("train_act", "--run", copied, *SHORT)
    assert not (copied / "act/model.safetensors").exists()


# ------------------------------------------------------------------------------------ half weights
def to_half(folder):
    """Leave the weights in float16 alone, as the Hub's --variant fp16 does."""
    for path in folder.rglob("*.safetensors"):
        weights = {name: weight.half() for name, weight in load_file(path).items()}
        save_file(weights, path.with_suffix(".fp16.safetensors"), {"format": "pt"})
        path.unlink()


def test_a_folder_of_half_weights_alone_is_loaded_as_float32(tmp_path):
    base = make_turbo(tmp_path / "base")
    whole = load_parts(base, TurboPainter.base_parts)
    to_half(base)
    parts = load_parts(base, TurboPainter.base_parts)
    for name in ("text_encoder", "vae", "unet"):
        expected = whole[name].state_dict()
        for key, weight in parts[name].state_dict().items():
            assert weight.dtype == expected[key].dtype
            assert torch.allclose(weight, expected[key], atol=1e-3, rtol=1e-3), (name, key)


def test_a_folder_without_a_tokenizer_is_one_sentence(tmp_path):
    base = make_turbo(tmp_path / "base")
    shutil.rmtree(base / "tokenizer")
    with pytest.raises(UserError, match="tokenizer is no whole CLIPTokenizer"):
        load_parts(base, TurboPainter.base_parts)
