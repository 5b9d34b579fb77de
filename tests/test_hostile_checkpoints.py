"""Checkpoints of another version, another program, or another intention: one sentence each."""

import json
import os
import pickle
import shutil
import struct

import pytest
import torch
from conftest import ROOT
from damage import write
from safetensors.torch import save
from test_episodes import contents

SHORT = ["--steps", 3, "--batch-size", 2, "--checkpoint-every", 3]
TRAINING = {"train_controlnet": [*SHORT, "--base", "none"], "train_act": SHORT}
pytestmark = pytest.mark.usefixtures("little_memory")


def painter_config(**changes):
    config = json.loads((ROOT / "checkpoints/demo/controlnet/painter.json").read_text())
    return json.dumps(config | changes)


PAINTERS = {
    "another size": painter_config(size="huge"),
    "a size of a number": painter_config(size=3),
    "no base": painter_config(size="sd-turbo"),
    "a base of a number": painter_config(size="sd-turbo", base=3),
    "a base that is not there": painter_config(size="sd-turbo", base="/nowhere"),
    "an objective unheard of": painter_config(objective="magic"),
    "cameras of a number": painter_config(cameras=3),
    "cameras of numbers": painter_config(cameras=[1, 2, 3, 4]),
    "no cameras": painter_config(cameras=[]),
    "cameras twice": painter_config(cameras=["front", "front"]),
    "a resolution of text": painter_config(resolution="high"),
    "a resolution of nothing": painter_config(resolution=0),
    "a resolution of terabytes": painter_config(resolution=10**9),
    "a picture of text": painter_config(image_size="64"),
    "a picture of no number": painter_config(image_size=float("nan")),
    "a picture of no size": painter_config(image_size=None),
    "sizes of other cameras": painter_config(image_size=None, image_sizes={"top": [1, 1]}),
    "sizes of text": painter_config(image_sizes={"front": "64"}),
    "a horizon of half a step": painter_config(horizon=0.5),
    "steps without end": painter_config(num_inference_steps=float("inf")),
    "an earlier version": json.dumps({"picture": 128, "steps": 1}),
    "a list": "[]",
    "deep": "[" * 100_000,
    "half": "{",
    "nothing": "",
}


def copy_checkpoint(tmp_path):
    run = shutil.copytree(ROOT / "checkpoints/demo", tmp_path / "run")
    return run, ["--run", run, "--tasks", "push_button", "--episodes", 1, "--language", 0]


@pytest.mark.parametrize("what", PAINTERS)
def test_a_hostile_painter_is_one_sentence(tmp_path, sentence_of, what):
    run, options = copy_checkpoint(tmp_path)
    path = write(run / "controlnet/painter.json", PAINTERS[what])
    before = contents(run)
    sentence = sentence_of("evaluate", *options, "--workers", 1)
    assert str(path) in sentence or "/nowhere" in sentence
    assert contents(run) == before


def act_config(**changes):
    config = json.loads((ROOT / "checkpoints/demo/act/config.json").read_text())
    return json.dumps(config | changes)


CONTROLLERS = {
    "another size": act_config(size="huge"),
    "joints of text": act_config(joints="seven"),
    "other joints": act_config(joints=6),
    "joints of terabytes": act_config(joints=10**9),
    "a horizon below nothing": act_config(horizon=-8),
    "a horizon of gigabytes": act_config(horizon=60_000),
    "a mean of text": act_config(state_mean=["x"] * 8),
    "a mean of one": act_config(state_mean=[0.0]),
    "a deviation of nothing": act_config(state_std=[0.0] * 8),
    "a deviation of no number": act_config(state_std=[float("nan")] * 8),
    "words of numbers": act_config(vocabulary=[1, 2]),
    "pictures of one side": act_config(image_size=[64]),
    "an observation unheard of": act_config(observation="touch"),
    "nothing said": "{}",
    "a list": "[]",
    "deep": '{"a":' * 100_000,
    "half": "{",
}


@pytest.mark.parametrize("what", CONTROLLERS)
def test_a_hostile_controller_is_one_sentence(tmp_path, sentence_of, what):
    run, options = copy_checkpoint(tmp_path)
    write(run / "act/config.json", CONTROLLERS[what])
    before = contents(run)
    assert str(run / "act") in sentence_of("evaluate", *options, "--workers", 1)
    assert contents(run) == before


WEIGHTS = {
    "a huge header": struct.pack("<Q", 2**62) + b"{}",
    "a header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "a header that is no JSON": struct.pack("<Q", 5) + b"[[[[[",
    "weights beyond the file": struct.pack("<Q", 69)
    + b'{"queries":{"dtype":"F32","shape":[8,128],"data_offsets":[0,4096]}}  ',
    "no weights": struct.pack("<Q", 2) + b"{}",
    "other weights": save({"elsewhere": torch.zeros(2)}),
    "zeros": bytes(100),
    "a pickle": pickle.dumps({"queries": 3}),
    "nothing": b"",
}


@pytest.mark.parametrize("what", WEIGHTS)
@pytest.mark.parametrize(
    "place", ["act/model.safetensors", "controlnet/unet/diffusion_pytorch_model.safetensors"]
)
def test_hostile_weights_are_one_sentence(tmp_path, sentence_of, place, what):
    run, options = copy_checkpoint(tmp_path)
    path = run / place
    assert path.is_file()
    write(path, WEIGHTS[what])
    assert str(path.parent) in sentence_of("evaluate", *options, "--workers", 1)


class RunsCode:
    """What pickle calls when it reads this."""

    def __reduce__(self):
        return os.system, ("touch broken",)


@pytest.mark.parametrize("name", TRAINING)
def test_a_pickle_in_a_checkpoint_is_not_run(copied, sentence_of, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    folder = copied / {"train_act": "act", "train_controlnet": "controlnet"}[name]
    folder.mkdir()
    path = folder / "training.pt"
    torch.save({"step": RunsCode(), "identity": {}}, path)
    zipped = path.read_bytes()
    for content in (zipped, pickle.dumps(RunsCode()), zipped[:-100], b"PK\x05\x06" + bytes(18)):
        path.write_bytes(content)
        assert str(path) in sentence_of(name, "--run", copied, *TRAINING[name])
        assert path.read_bytes() == content
    assert not (tmp_path / "broken").exists()
