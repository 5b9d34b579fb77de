"""Packing a run: half precision for the large weights, some scenes, and no harm to a training."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from genima.files import UserError
from tools.pack_checkpoint import main


def write_run(folder):
    """A run with three networks of one weight each, and two scenes of one task."""
    files = ["act/config.json", "act/losses.png", "act/training.pt", "controlnet/painter.json"]
    for part in ("episodes", "spheres"):
        files += [f"{part}/push_button/{seed}_0.hdf5" for seed in (7, 77)]
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for name in ("act", "controlnet/unet", "controlnet/text_encoder"):
        (folder / name).mkdir(exist_ok=True)
        save_file({"weight": torch.tensor([0.1])}, folder / name / "model.safetensors")


def pack(monkeypatch, run, out):
    words = ["--run", str(run), "--out", str(out), "--episodes", "push_button/7"]
    monkeypatch.setattr(sys, "argv", ["pack_checkpoint.py", *words])
    main()


def test_what_is_packed(tmp_path, monkeypatch):
    run = tmp_path / "run"
    out = tmp_path / "out"
    write_run(run)
    (out / "episodes").mkdir(parents=True)
    (out / "episodes/old.hdf5").write_text("of an earlier packing")
    (out / "README.md").write_text("the card")
    pack(monkeypatch, run, out)
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {
        "README.md",
        "act/config.json",
        "act/model.safetensors",
        "controlnet/painter.json",
        "controlnet/text_encoder/model.safetensors",
        "controlnet/unet/model.safetensors",
        "episodes/push_button/7_0.hdf5",
        "spheres/push_button/7_0.hdf5",
    }
    half = torch.tensor([0.1]).half()
    for name in ("act", "controlnet/unet"):
        assert load_file(out / name / "model.safetensors")["weight"].equal(half)
    text_encoder = load_file(out / "controlnet/text_encoder/model.safetensors")
    assert text_encoder["weight"].dtype == torch.float32


def test_nothing_is_lost(tmp_path, monkeypatch):
    """A training is never replaced, nor an earlier packing by a run that is not whole."""
    run = tmp_path / "run"
    write_run(run)
    before = sorted(run.rglob("*"))
    with pytest.raises(UserError, match="holds a training: give another --out"):
        pack(monkeypatch, run, run)
    assert sorted(run.rglob("*")) == before
    out = tmp_path / "out"
    pack(monkeypatch, run, out)
    packed = sorted(out.rglob("*"))
    (run / "spheres").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="There is no .*spheres"):
        pack(monkeypatch, run, out)
    assert sorted(out.rglob("*")) == packed
