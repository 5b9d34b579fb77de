"""A dataset in RLBench's layout to measure importing with.

    python tests/make_rlbench_dataset.py FOLDER

100 demonstrations of 100 frames, four cameras of 128x128 (1 GB), in smooth, slightly noisy
pictures, as a renderer makes them.
"""

import sys
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from test_rlbench import CAMERAS, dumps, write_dataset


def main(root: tyro.conf.Positional[Path], episodes: int = 100, frames: int = 100):
    write_dataset(root, size=(128, 128))
    first = root / "reach_target/variation0/episodes/episode0"
    # the same motion there and back, as often as it takes
    from rlbench.backend.observation import Observation
    from rlbench.demo import Demo

    from sims.rlbench_dataset import load

    content = load(first / "low_dim_obs.pkl")._observations
    observations = []
    for t in range(frames):
        observation = Observation.__new__(Observation)
        k = t % (2 * len(content) - 2)
        observation.__dict__.update(content[min(k, 2 * len(content) - 2 - k)].__dict__)
        observations.append(observation)
    pickled, random = dumps(Demo(observations)), np.random.default_rng(0)
    y, x = np.mgrid[:128, :128]
    for number in range(episodes):
        folder = first.with_name(f"episode{number}")
        for camera in CAMERAS:
            (folder / f"{camera}_rgb").mkdir(parents=True, exist_ok=True)
            for t in range(frames):
                smooth = (
                    128
                    + 60 * np.sin((x[..., None] + t) / [17, 23, 31])
                    + 50 * np.cos(y[..., None] / [13, 29, 19])
                )
                noisy = np.clip(smooth + random.normal(0, 2, smooth.shape), 0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(folder / f"{camera}_rgb" / f"{t}.png", compress_level=1)
        (folder / "low_dim_obs.pkl").write_bytes(pickled)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
