"""A page to play with: tell the robot something, change your mind, take a sphere in your hand.

    In:   runs/demo/controlnet/ and runs/demo/act/; act_rgb/ too, where plain ACT was trained
    Out:  a page at http://127.0.0.1:7860, and the film that you download from it

    pip install -r requirements-play.txt
    python play.py --run checkpoints/demo      the checkpoint that is shipped
    python play.py                             your own run, runs/demo

Choose a task, a scene and a look, type a sentence, and type another while the arm moves. Drag in a
view to move the gripper's sphere: the arm follows it, and no painter is asked. The page is for one
person and one robot: two tabs show the same one. It listens on this machine alone unless --host
says otherwise, and asks nothing of the internet.

Paper, section 3.3. The robot is sims/playground.py; here is only what a browser shows of it.
"""

import base64
import html
import io
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import tyro
from PIL import Image

from genima.checkpoints import choose_device
from genima.files import UserError, check_number, run_stage
from sims.mujoco_tasks import TASKS
from sims.playground import FARTHEST, GUIDES, HEAT_MAPS, LOOKS, PAINTED_NAMES, Playground

INTRODUCTION = """
## Tell the robot something, and change your mind
A diffusion model paints where the arm should be a moment later; the arm follows the paint."""
MOST_EXAMPLES = 3  # sentences that a click says
FONTS = ["system-ui", "sans-serif"]  # of the machine: none is fetched
# A drag ends where the mouse is let go; a click is a drag of no length.
DRAG = """
let from = null;
element.addEventListener('dragstart', event => event.preventDefault());
element.addEventListener('pointerdown', event => { from = event.target.dataset.camera; });
element.addEventListener('pointerup', event => {
    const camera = event.target.dataset.camera;
    if (camera && camera === from) {
        const box = event.target.getBoundingClientRect();
        const x = (event.clientX - box.left) / box.width;
        const y = (event.clientY - box.top) / box.height;
        trigger('click', {camera: camera, x: x, y: y});
    }
    from = null;
});
"""
STYLE = """
.panels { display: grid; grid-template-columns: 3fr 3fr 4fr; gap: 12px; }
@media (max-width: 800px) { .panels { display: block; } .panels figure { margin: 8px 0; } }
.panels figure, .words figure { margin: 0; }
.panels figcaption, .words figcaption { font-size: 14px; color: #666; margin-bottom: 4px; }
.panels img, .words img { display: block; margin: 0; width: 100%; user-select: none; }
.views { display: grid; grid-template-columns: 1fr 1fr; gap: 2px; }
.views img { aspect-ratio: 1; image-rendering: pixelated; cursor: crosshair; }
.words { display: flex; gap: 12px; flex-wrap: wrap; }
.words figure { width: 160px; }
.words img { image-rendering: pixelated; }
"""


@dataclass
class Settings:
    run: Path = Path("runs/demo")
    """Folder of the run: controlnet/ and act/ inside it are read."""
    host: str = "127.0.0.1"
    """Where to listen. 0.0.0.0 lets everybody in your network drive the robot."""
    port: int = 7860
    """The page's port."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where the networks run; auto takes a GPU where there is one."""


# ------------------------------------------------------------------------------------ what is shown
def data_url(image: np.ndarray, format: str) -> str:
    """An image (H, W, 3) uint8 as the text that stands in an <img>."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format, quality=85)
    text = base64.b64encode(file.getvalue()).decode()
    return f"data:image/{format.lower()};base64,{text}"


def views_html(title: str, views: dict[str, np.ndarray]) -> str:
    """Views {camera: (H, W, 3)}, two in a row, each of which a sphere can be dragged in."""
    images = []
    for camera, image in views.items():
        name = camera.replace("_", " ")
        source = data_url(image, "PNG")
        images.append(f'<img data-camera="{camera}" alt="{name}" title="{name}" src="{source}">')
    return (
        f"<figure><figcaption>{title}</figcaption>"
        f'<div class="views">{"".join(images)}</div></figure>'
    )


class Page:
    """What the page's buttons do. Each answer is (panels, status), both HTML.

    All work is done in one thread, one thing after the other: MuJoCo draws in the thread that drew
    first, and a robot cannot do two things at once.
    """

    def __init__(self, run: Path, device: str = "cpu"):
        """Raises UserError for a run without networks."""
        self.folder = tempfile.TemporaryDirectory(prefix="genima-play-")
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.playground = self.thread.submit(Playground, run, device).result()

    def do(self, method: str, *arguments):
        """Call a method of the playground in its thread; what is wrong becomes the message."""
        return self.thread.submit(self.attempt, method, arguments).result()

    def attempt(self, method, arguments):
        try:
            return getattr(self.playground, method)(*arguments)
        except UserError as error:
            self.playground.stop()
            self.playground.message = str(error)
            return None

    def show(self) -> tuple[str, str]:
        """Observation, painting and robot as they are now, and what is going on."""
        return self.thread.submit(self.draw).result()

    def draw(self):
        robot = self.playground
        scene = data_url(robot.scene(), "JPEG")
        panels = [
            views_html("what the robot sees", robot.views),
            views_html(PAINTED_NAMES[robot.guide], robot.painted),
            '<figure class="scene"><figcaption>the robot</figcaption>'
            f'<img alt="the robot" src="{scene}"></figure>',
        ]
        return f'<div class="panels">{"".join(panels)}</div>', self.status()

    def status(self) -> str:
        """One line: the sentence, the step, the sphere in your hand, and the message."""
        robot = self.playground
        words = [f"\u201c{robot.sentence}\u201d"]
        if robot.running:
            words.append("on its way back" if robot.returning else f"step {robot.steps}")
        if robot.guide == "hand":
            x, y, z = 100 * robot.offset
            words.append(f"sphere moved by {x:.1f}, {y:.1f}, {z:.1f} cm")
        words.append(robot.message)
        text = " · ".join(word for word in words if word)
        return html.escape(text)

    # ---- buttons
    def choose(self, task: str, seed: float, look: str):
        self.do("choose", task, int(seed or 0), look)
        return self.show()

    def say(self, sentence: str):
        self.do("say", sentence or "")
        return self.show()

    def follow(self, guide: str):
        self.do("follow_guide", guide)
        return self.show()

    def move(self, x: float, y: float, z: float):
        """The sliders, centimetres."""
        self.do("move_sphere", [x / 100, y / 100, z / 100])
        return self.show()

    def drag(self, camera: str, x: float, y: float):
        """A drag to a point of a view, 0..1."""
        self.do("drag_sphere", camera, x, y)
        return self.show()

    def step(self):
        self.do("stop")
        self.do("step")
        return self.show()

    def press(self, button: str):
        """A button whose name is the playground's method: stop, reset."""
        self.do(button)
        return self.show()

    def controls(self) -> tuple:
        """What the guide and the sliders should show now."""
        return self.playground.guide, *np.round(100 * self.playground.offset, 1).tolist()

    def words(self, kind: str) -> tuple:
        """A heat map of each word of the sentence."""
        figures = []
        for word, picture in (self.do("heat_maps", kind) or {}).items():
            caption = f"<figcaption>{html.escape(word)}</figcaption>"
            figures.append(f'<figure>{caption}<img src="{data_url(picture, "PNG")}"></figure>')
        return f'<div class="words">{"".join(figures)}</div>', *self.show()

    def run(self) -> Iterator[tuple[str, str]]:
        """Drive until the end of the episode; another run takes over from this one."""
        number = self.do("start")
        yield from self.drive(number)

    def drive_on(self) -> Iterator[tuple[str, str]]:
        """Drive if something was said or moved."""
        yield from self.drive(self.playground.run_number)

    def drive(self, number: int):
        robot = self.playground
        while robot.running and robot.run_number == number:
            self.do("step")
            yield self.show()
        yield self.show()

    def film(self) -> tuple[str | None, str, str]:
        """The film's file, or None and a message if there is nothing to show yet."""
        self.do("stop")
        path = self.do("film", Path(self.folder.name) / "film.mp4")
        return path, *self.show()


# --------------------------------------------------------------------------------------------- page
def build_page(page: Page):
    """The page as Gradio's Blocks."""
    import gradio as gr

    robot = page.playground
    tasks = [(name.replace("_", " "), name) for name in TASKS]
    guides = [(words, name) for name, words in GUIDES.items() if name != "act" or robot.act]

    with gr.Blocks(title="nanoGENIMA", analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            task = gr.Dropdown(tasks, value=robot.task, label="Task")
            seed = gr.Number(robot.seed, label="Scene", precision=0, minimum=0)
            look = gr.Dropdown(list(LOOKS), value=robot.look, label="Look")
            guide = gr.Dropdown(guides, value=robot.guide, label="Who paints the spheres")
        panels, status = page.show()
        panels = gr.HTML(panels, css_template=STYLE, js_on_load=DRAG, elem_id="panels")
        status = gr.HTML(status, elem_id="status")
        with gr.Row(equal_height=True):
            sentence = gr.Textbox(
                label="Tell the robot, also while it moves", scale=4, elem_id="sentence"
            )
            say = gr.Button("Say", variant="primary")
        with gr.Row():
            examples = [gr.Button(size="sm") for _ in range(MOST_EXAMPLES)]
        with gr.Row():
            run = gr.Button("Run")
            step = gr.Button("Step")
            stop = gr.Button("Stop")
            reset = gr.Button("Reset")
            film = gr.Button("Film")
        video = gr.Video(label="The last half minute since the reset", visible=False, height=400)
        with gr.Accordion("Take the gripper's sphere in your hand", open=True):
            gr.Markdown("Drag in a view, or move it here. The arm follows; no painter is asked.")
            with gr.Row():
                most = 100 * FARTHEST
                ranges = {"minimum": -most, "maximum": most, "step": 0.5, "value": 0}
                x = gr.Slider(label="away from the robot, cm", **ranges)
                y = gr.Slider(label="to the robot's left, cm", **ranges)
                z = gr.Slider(label="up, cm", **ranges)
        with gr.Accordion("Which words does the painter listen to?", open=True):
            with gr.Row(equal_height=True):
                kind = gr.Dropdown(list(HEAT_MAPS), label="Heat map", scale=4)
                look_at_words = gr.Button("Look at the words")
            words = gr.HTML(css_template=STYLE, elem_id="words")

        shown = [panels, status]
        hand = [guide, x, y, z]
        always = {"trigger_mode": "multiple", "concurrency_limit": None}

        def wire(event, handler, inputs=None, outputs=shown, progress="hidden"):
            return event(handler, inputs, outputs, show_progress=progress, **always)

        def drag(event: gr.EventData):
            return page.drag(event.camera, event.x, event.y)

        def show_examples():
            sentences = robot.examples()
            sentences += [None] * (MOST_EXAMPLES - len(sentences))
            return [gr.update(value=words, visible=words is not None) for words in sentences]

        def show_film():
            path, *now = page.film()
            return gr.update(value=path, visible=path is not None), *now

        for part in (task, seed, look):
            chosen = wire(part.change, page.choose, [task, seed, look])
            wire(wire(chosen.then, show_examples, None, examples).then, page.controls, None, hand)
        wire(wire(guide.input, page.follow, [guide]).then, page.controls, None, hand)
        wire(wire(sentence.submit, page.say, [sentence]).then, page.drive_on)
        wire(wire(say.click, page.say, [sentence]).then, page.drive_on)
        for example in examples:
            wire(wire(example.click, page.say, [example]).then, page.drive_on)
        for part in (x, y, z):
            moved = wire(part.release, page.move, [x, y, z])
            wire(wire(moved.then, page.controls, None, hand).then, page.drive_on)
        dragged = wire(panels.click, drag)
        wire(wire(dragged.then, page.controls, None, hand).then, page.drive_on)
        wire(run.click, page.run)
        wire(step.click, page.step)
        wire(stop.click, partial(page.press, "stop"))
        wire(wire(reset.click, partial(page.press, "reset")).then, page.controls, None, hand)
        wire(film.click, show_film, None, [video, *shown], "full")
        wire(look_at_words.click, page.words, [kind], [words, *shown], "full")
        wire(blocks.load, page.show)
        wire(blocks.load, show_examples, None, examples)
        wire(blocks.load, page.controls, None, hand)
    return blocks


def main():
    settings = tyro.cli(Settings, description=__doc__)
    check_number("--port", settings.port, 1, 65535)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
    except ImportError as error:
        raise UserError(
            "The page needs Gradio: pip install -r requirements-play.txt first."
        ) from error
    page = Page(settings.run, choose_device(settings.device))
    blocks = build_page(page)
    try:
        blocks.launch(
            server_name=settings.host,
            server_port=settings.port,
            share=False,
            ssr_mode=False,
            allowed_paths=[page.folder.name],
            theme=gr.themes.Default(font=FONTS, font_mono=["monospace"]),
            footer_links=[],
        )
    except OSError as error:
        place = f"{settings.host}:{settings.port}"
        raise UserError(f"Nobody can listen at {place}: give another --port or --host.") from error


if __name__ == "__main__":
    run_stage(main)
