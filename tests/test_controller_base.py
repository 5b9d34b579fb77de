"""Stage 3 from a base: what it takes over, when the shipped one fits, and bases that do not fit."""

import json

import numpy as np
import pytest
import torch
from test_train_act import CAMERAS, HORIZON, train, write_targets

from genima.act import ACT, Controller, save_controller
from genima.base import FOLLOWER, load_controller_base, start_from
from genima.files import UserError
from sims import make_env
from sims.demonstrator import record_demonstration

CONFIG = {
    "size": "tiny",
    "observation": "spheres",
    "horizon": HORIZON,
    "joints": 7,
    "cameras": CAMERAS,
    "image_size": [32, 40],
    "vocabulary": [],
    "state_mean": [0.5] * 8,
    "state_std": [2.0] * 8,
}


def make_base(folder, **changes):
    torch.manual_seed(5)
    config = CONFIG | changes
    save_controller(folder, ACT(config), config)
    return folder


def make_other_weights(folder):
    controller = Controller.load(folder)
    with torch.no_grad():
        controller.model.queries += 1
    save_controller(folder, controller.model, controller.config)


@pytest.fixture
def with_spheres(run):
    write_targets(run)
    return run


def test_a_training_starts_from_the_base_with_its_statistics(with_spheres, tmp_path):
    base = make_base(tmp_path / "base")
    assert train(with_spheres, "--base", str(base), "--learning-rate", "0", steps=1) == 0
    before = Controller.load(base)
    after = Controller.load(with_spheres / "act")
    for name, weights in after.model.state_dict().items():
        torch.testing.assert_close(weights, before.model.state_dict()[name], rtol=0, atol=0)
    assert after.config["state_mean"] == CONFIG["state_mean"]
    assert after.config["state_std"] == CONFIG["state_std"]


def test_a_training_resumes_from_its_own_base_alone(with_spheres, tmp_path, capsys):
    base = make_base(tmp_path / "base")
    options = ["--base", str(base)]
    assert train(with_spheres, *options, steps=2) == 0
    assert train(with_spheres, *options, steps=2) == 0
    assert "trained already" in capsys.readouterr().out
    other = make_base(tmp_path / "other", state_mean=[0.0] * 8)
    make_other_weights(other)
    assert train(with_spheres, "--base", str(other), steps=2) == 2
    assert "was trained with base" in capsys.readouterr().err


def test_the_shipped_controller_is_left_where_it_does_not_fit(capsys):
    config = Controller.load(FOLLOWER).config
    assert load_controller_base(None, config)[0] is not None
    assert load_controller_base("none", config) == (None, None)
    others = {"joints": 6, "image_size": [48, 64], "horizon": 20}
    for name, value in others.items():
        assert load_controller_base(None, config | {name: value}) == (None, None)
        assert f"is for {name} " in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"horizon": 9}, {"image_size": [32, 32]}])
def test_a_base_that_does_not_fit_is_one_sentence(tmp_path, changes):
    base = make_base(tmp_path / "base", **changes)
    with pytest.raises(UserError, match=f"is for {next(iter(changes))} .* or --base none"):
        load_controller_base(str(base), CONFIG)


def test_of_other_cameras_the_shared_weights_and_those_of_the_same_name(tmp_path, capsys):
    """A network of the base's second camera and a new one: what the second sees, it sees alike."""
    config = CONFIG | {"cameras": ["wrist", "front"]}
    torch.manual_seed(5)
    save_controller(tmp_path, ACT(config), config)
    cameras = ["front", "ego"]
    base, _ = load_controller_base(str(tmp_path), CONFIG | {"cameras": cameras})
    assert "without the cameras ego: what" in capsys.readouterr().out
    network = ACT(CONFIG | {"cameras": cameras})
    fresh = network.image_encoder.to_tokens.pool[1].weight.clone()
    start_from(network, cameras, base)

    images = torch.randint(0, 256, (1, 2, 3, 32, 40), dtype=torch.uint8)
    no_words = torch.zeros(1, 0)
    tokens = network.image_encoder(images, no_words)
    as_base = base.model.image_encoder(images.flip(1), no_words)  # front is its second view
    per_view = tokens.shape[1] // 2
    torch.testing.assert_close(tokens[:, :per_view], as_base[:, per_view:])
    torch.testing.assert_close(network.image_encoder.to_tokens.pool[1].weight, fresh)
    torch.testing.assert_close(network.queries, base.model.queries)


def test_a_copy_without_checkpoints_starts_from_random_weights(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("genima.base.FOLLOWER", tmp_path / "none")
    assert load_controller_base(None, CONFIG) == (None, None)
    assert "starts from random weights" in capsys.readouterr().out


def test_a_folder_without_a_controller_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="holds no trained controller"):
        load_controller_base(str(tmp_path), CONFIG)


def test_steps_and_learning_rate_follow_the_base(with_spheres, tmp_path):
    base = make_base(tmp_path / "base")
    assert train(with_spheres, "--base", str(base), steps=1) == 0
    checkpoint = torch.load(with_spheres / "act/training.pt")
    assert checkpoint["identity"]["learning_rate"] == 3e-4
    assert train(with_spheres, "--base", "none", "--out", str(tmp_path / "other"), steps=1) == 0
    checkpoint = torch.load(tmp_path / "other/training.pt")
    assert checkpoint["identity"]["learning_rate"] == 1e-3
    assert json.loads((tmp_path / "other/config.json").read_text())["state_mean"] != [0.5] * 8


def test_the_exercise_goes_through_random_poses():
    env = make_env("move_around", 0, ())
    paths = [record_demonstration(env, "move_around", seed, 0, "anywhere") for seed in (1, 2)]
    for episode in paths:
        assert episode.success and len(episode.qpos) > 15
        assert np.ptp(episode.qpos[:, :7], axis=0).max() > 0.2  # rad: it moves
        assert set(episode.action[:, 7]) <= {0.0, 1.0}
    assert not np.array_equal(paths[0].qpos[:5], paths[1].qpos[:5])
