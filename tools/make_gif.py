"""The film at the top of the README: a success of each task, by the shipped checkpoint.

python evaluate.py --run checkpoints/demo --episodes 6 --videos 6 --language 0 --out runs/gif
python tools/make_gif.py runs/gif docs/demo.gif
"""

import sys
from pathlib import Path

import imageio.v2 as imageio
from PIL import Image

SIZE = (512, 202)  # pixels
TASKS = ("push_button", "pick_and_lift", "reach_target")
SECONDS = 3  # of each task's film; they begin with the first episode


def main():
    folder, target = map(Path, sys.argv[1:])
    frames = []
    for task in TASKS:
        film = imageio.get_reader(folder / f"{task}.mp4")
        fps = film.get_meta_data()["fps"]
        for i, frame in enumerate(film):
            if i < SECONDS * fps:
                frames.append(Image.fromarray(frame).resize(SIZE).quantize(256))
    frames[0].save(target, save_all=True, append_images=frames[1:], duration=100, loop=0)
    print(f"{target}: {len(frames)} frames, {target.stat().st_size / 1e6:.1f} MB.")


if __name__ == "__main__":
    main()
