"""Pack a trained run into a small folder of the repository, from which the notebooks start.

In:   runs/demo                          a trained run (make demo)
Out:  checkpoints/demo/controlnet, act   the networks, their large weights in half precision
      checkpoints/demo/episodes, spheres a dozen demonstrations with their target spheres

    python tools/pack_checkpoint.py

`python evaluate.py --run checkpoints/demo` works on it as on any run.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from genima.episodes import find_episodes
from genima.files import UserError, run_stage

NETWORKS = ("controlnet", "act")
DATA = ("episodes", "spheres")
# Folders whose weights are stored in half precision. Both networks read them back as float32.
# The text encoder is small and stays as it is.
HALF_PRECISION = ("act", "unet", "controlnet")
# What a trained network does not need: the optimiser's state, its lock, pictures to look at.
LEFT_OUT = (".pt", ".lock", ".png")


@dataclass
class Settings:
    run: Path = Path("runs/demo")
    """The trained run."""
    out: Path = Path("checkpoints/demo")
    """Folder of the copy. controlnet/, act/, episodes/ and spheres/ in it are replaced."""
    episodes: tuple[str, ...] = (
        "push_button/1000000",
        "push_button/1000001",
        "reach_target/1000000",
        "pick_and_lift/1000000",
    )
    """Task and seed of the scenes to keep, each with all its instructions."""


def check_folders(run: Path, out: Path):
    """Raise UserError if the run is not trained, or if packing would replace another training."""
    for part in NETWORKS + DATA:
        if not (run / part).is_dir():
            raise UserError(f"There is no {run / part}: run make demo, or give another --run.")
    for network in NETWORKS:
        if (out / network / "training.pt").exists():
            raise UserError(f"{out} holds a training: give another --out, so that it is kept.")


def copy_network(source: Path, target: Path):
    """Copy the folder of a network, its large weights in half precision."""
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        if path.is_dir() or path.suffix in LEFT_OUT:
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors" and path.parent.name in HALF_PRECISION:
            weights = {name: weight.half() for name, weight in load_file(path).items()}
            save_file(weights, copy, metadata={"format": "pt"})
        else:
            shutil.copyfile(path, copy)


def copy_scenes(run: Path, out: Path, scenes: tuple[str, ...]):
    """Copy the episodes and sphere files of some scenes, named <task>/<seed>."""
    for path in find_episodes(run / "episodes"):
        task = path.parent.name
        seed = path.name.split("_")[0]
        if f"{task}/{seed}" not in scenes:
            continue
        for part in DATA:
            copy = out / part / task / path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run / part / task / path.name, copy)


def main():
    settings = tyro.cli(Settings, description=__doc__)
    check_folders(settings.run, settings.out)
    for part in NETWORKS + DATA:
        shutil.rmtree(settings.out / part, ignore_errors=True)
    for network in NETWORKS:
        copy_network(settings.run / network, settings.out / network)
    copy_scenes(settings.run, settings.out, settings.episodes)
    size = sum(path.stat().st_size for path in settings.out.rglob("*") if path.is_file())
    print(f"{settings.out}: {size / 1e6:.1f} MB.")


if __name__ == "__main__":
    run_stage(main)
