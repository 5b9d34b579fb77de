"""Pack a trained run into a small folder that goes with the repository: the notebooks start from it.

In:   runs/demo              (make demo)
Out:  checkpoints/demo       controlnet/ and act/ with their large weights in half precision, and a dozen episodes with spheres

    python checkpoints/pack.py

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

HALVED = (
    "act",
    "unet",
    "controlnet",
)  # folders of the large weights; they are read back as single precision


@dataclass
class Settings:
    run: Path = Path("runs/demo")
    """The trained run."""
    out: Path = Path("checkpoints/demo")
    """Where the small copy goes; controlnet/, act/, episodes/ and spheres/ in it are replaced."""
    episodes: tuple[str, ...] = (
        "push_button/1000000",
        "push_button/1000001",
        "reach_target/1000000",
        "pick_and_lift/1000000",
    )
    """Task and seed of the scenes to keep; each is there once for every object that can be named."""


def main():
    settings = tyro.cli(Settings, description=__doc__)
    parts = ("controlnet", "act", "episodes", "spheres")
    for part in parts:
        if not (settings.run / part).is_dir():
            raise UserError(f"There is no {settings.run / part}: run make demo first.")
        shutil.rmtree(settings.out / part, ignore_errors=True)
    for source in [path for part in parts[:2] for path in sorted((settings.run / part).rglob("*"))]:
        target = settings.out / source.relative_to(settings.run)
        if source.is_dir() or source.suffix in (
            ".pt",
            ".png",
        ):  # to go on training, and to look at: not needed here
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".safetensors" and source.parent.name in HALVED:
            save_file(
                {name: weight.half() for name, weight in load_file(source).items()},
                target,
                metadata={"format": "pt"},
            )
        else:
            shutil.copyfile(source, target)
    for path in find_episodes(settings.run / "episodes"):
        if f"{path.parent.name}/{path.name.split('_')[0]}" in settings.episodes:
            for part in parts[2:]:
                target = settings.out / part / path.parent.name / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(settings.run / part / path.parent.name / path.name, target)
    size = sum(path.stat().st_size for path in settings.out.rglob("*") if path.is_file())
    print(f"{settings.out}: {size / 1e6:.1f} MB.")


if __name__ == "__main__":
    run_stage(main)
