"""The pictures of the README: a sentence that changes half-way, and the eight tasks.

    In:   checkpoints/demo, or another run
    Out:  docs/demo.gif     the first scene in which the arm obeys the second sentence
          docs/tasks.png    with --tasks: each task before and after the scripted expert

    python tools/make_gif.py --scene 8     what the README shows
    python tools/make_gif.py --tasks

Run the first one again when checkpoints/demo is another one.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from genima.files import UserError, run_stage, write_whole
from sims import make_env
from sims.demonstrator import expert_actions
from sims.mujoco_tasks import TASKS
from sims.playground import Playground
from sims.show import PeopleCamera, film_frames, snapshot

HALF_WAY = 10  # steps of the first sentence
MOST_STEPS = 60  # of the second, so that the film stays short
SCENES = 100  # to try
HEIGHT = 390  # of the GIF's scene, pixels
MILLISECONDS = 70  # a frame: half as fast as the arm is
PAINTED = "what the diffusion model paints"
STILL = (300, 400)  # height and width of each picture of a task
COLUMNS = 2


@dataclass
class Settings:
    run: Path = Path("checkpoints/demo")
    """Folder of the run that drives the arm."""
    scene: int = 0
    """The first scene to try."""
    tasks: bool = False
    """Draw the tasks in place of the film."""
    out: Path = Path("docs")
    """Folder for the picture."""


def change_of_mind(run: Path, first_scene: int) -> Playground:
    """A robot that was told of one button and then, on its way, of another, which it pressed."""
    playground = Playground(run)
    for scene in range(first_scene, first_scene + SCENES):
        playground.choose("push_button", scene, "usual")
        first, second, _ = playground.examples()
        playground.say(first)
        for _ in range(HALF_WAY):
            if playground.running:
                playground.step()
        if not playground.running:  # it was faster
            continue
        print(f"Scene {scene}: {first}, then {second}.")
        playground.say(second)
        while playground.running and playground.steps < MOST_STEPS:
            playground.step()
        if playground.success:
            return playground
    raise UserError(f"The policy in {run} changes its mind in none of {SCENES} scenes.")


def write_gif(playground: Playground, path: Path):
    """The film of what has happened, as a GIF that begins again."""
    moments = playground.recording.moments
    camera = PeopleCamera(playground.env, HEIGHT, HEIGHT * 4 // 3)
    frames = []
    for frame in film_frames(camera, moments, True, PAINTED):
        frames.append(Image.fromarray(frame))
    # One palette for all frames, without dithering: what stands still is not stored again.
    palette = choose_palette([frames[i] for i in (0, len(frames) // 2, -1)])
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    with write_whole(path) as temporary:
        frames[0].save(
            temporary,
            save_all=True,
            append_images=frames[1:],
            duration=MILLISECONDS,
            loop=0,
        )
    print(f"{path}: {len(frames)} frames, {path.stat().st_size / 1e6:.1f} MB.")


def choose_palette(frames: list[Image.Image]) -> Image.Image:
    """256 colours. Vivid pixels count more, so that small objects keep theirs.

    kmeans: without it, what is black becomes purple.
    """
    pixels = np.concatenate([np.asarray(frame).reshape(-1, 3) for frame in frames])
    vivid = pixels[np.ptp(pixels, axis=1) > 120]
    repeated = np.resize(vivid, (len(pixels) // 2, 3))
    return Image.fromarray(np.concatenate([pixels, repeated])[None]).quantize(256, kmeans=1)


def draw_tasks() -> Image.Image:
    """Every task before and after, under its name and what the robot is told."""
    height, width = STILL
    title = 44
    rows = -(-len(TASKS) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (2 * width + 16), rows * (height + title)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, task in enumerate(TASKS):
        x = i % COLUMNS * (2 * width + 16)
        y = i // COLUMNS * (height + title)
        env = make_env(task, 0, ())
        _, info = env.reset(seed=0)
        camera = PeopleCamera(env, height, width)
        sheet.paste(Image.fromarray(camera.render(snapshot(env))), (x, y + title))
        for action in expert_actions(env):
            env.step(action)
        sheet.paste(Image.fromarray(camera.render(snapshot(env))), (x + width, y + title))
        camera.close()
        words = f"{task}: \u201c{info['instruction']}\u201d"
        draw.text((x + 6, y + title // 2), words, "black", ImageFont.load_default(22), anchor="lm")
    return sheet


def main():
    settings = tyro.cli(Settings, description=__doc__)
    if settings.tasks:
        path = settings.out / "tasks.png"
        with write_whole(path) as temporary:
            draw_tasks().save(temporary, optimize=True)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB.")
        return
    write_gif(change_of_mind(settings.run, settings.scene), settings.out / "demo.gif")


if __name__ == "__main__":
    run_stage(main)
