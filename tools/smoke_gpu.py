"""Do all stages run on this GPU, at true size, on a few frames? A few minutes, one line a stage.

    python tools/smoke_gpu.py                        SD-Turbo, from the Hugging Face Hub
    python tools/smoke_gpu.py --base FOLDER          SD-Turbo, from this disk
    python tools/smoke_gpu.py --random               its true size with random weights: no network
    python tools/smoke_gpu.py --size small           the smaller painters, from random weights

In:   nothing, or SD-Turbo
Out:  <run>/smoke.json (seconds of each stage, GPU, versions); <run>/*.log; the run itself

Demonstrations, spheres, the painter's training stopped by Ctrl-C after its first checkpoint and
resumed, the controller's training, one episode in closed loop. The networks learn nothing in so few
steps; what is seen is that everything loads, fits into memory, saves, resumes and paints. Without a
CUDA GPU sd-turbo is a very small network.
"""

import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from genima.files import UserError, run_stage
from tools.measuring import Report
from tools.random_turbo import layout_for, write_folder

PIXELS = {"tiny": 64, "small": 128}  # of a view; of sd-turbo half its resolution
STOPPED = 130  # the exit code of a training that Ctrl-C has stopped


@dataclass
class Settings:
    run: Path = Path("runs/smoke")
    """Folder of the run. It should be new."""
    size: Literal["tiny", "small", "sd-turbo"] = "sd-turbo"
    """The painter. The controller has the paper's size for sd-turbo, else tiny's."""
    base: str = "stabilityai/sd-turbo"
    """SD-Turbo: its name on the Hugging Face Hub, or a folder."""
    random: bool = False
    """Random weights of SD-Turbo's size in place of the base; 3 GB on this disk."""
    steps: int = 20
    """Gradient steps of each training; the first checkpoint is at half of them."""
    episodes: int = 1
    """Episodes to drive."""


def commands(settings: Settings, device: str) -> dict[str, list[str]]:
    """{stage: its command line}; the painter's training appears twice."""
    run = str(settings.run)
    steps = str(settings.steps)
    size = settings.size
    painter = ["train_controlnet.py", "--run", run, "--size", size, "--steps", steps]
    painter += ["--checkpoint-every", str(max(1, settings.steps // 2))]
    evaluation = ["evaluate.py", "--run", run, "--size", size, "--language", "0", "--workers", "1"]
    evaluation += ["--episodes", str(settings.episodes)]
    controller_size = "tiny"
    if size == "sd-turbo":
        resolution = layout_for(device).resolution
        pixels = resolution // 2
        base = settings.base
        if settings.random:
            base = str(settings.run / "sd-turbo")
        painter += ["--base", base, "--resolution", str(resolution)]
        if device == "cuda":
            controller_size = "sd-turbo"
            evaluation.append("--compile")
    else:
        pixels = PIXELS[size]
        painter += ["--base", "none"]
    demonstrations = ["collect_demos.py", "--run", run, "--tasks", "push_button"]
    demonstrations += ["--scenes", "2", "--image-size", str(pixels)]
    controller = ["train_act.py", "--run", run, "--size", controller_size, "--steps", steps]
    return {
        "demonstrations": demonstrations,
        "spheres": ["render_spheres.py", "--run", run],
        "painter_stopped": painter,
        "painter_resumed": painter,
        "controller": controller,
        "closed_loop": evaluation,
    }


def call(words: list[str], log: Path, stop_at: Path | None = None) -> int:
    """Run a stage, its output in a file; stop it by Ctrl-C when stop_at exists. The exit code."""
    with open(log, "w") as file:
        stage = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
        )
        if stop_at is not None:
            while stage.poll() is None and not stop_at.exists():
                time.sleep(0.1)
            if stage.poll() is None:
                stage.send_signal(signal.SIGINT)
        return stage.wait()


def main():
    settings = tyro.cli(Settings, description=__doc__)
    settings.run = settings.run.resolve()
    if (settings.run / "controlnet").exists():
        raise UserError(f"{settings.run} holds a training already: give another --run.")
    device = "cpu"
    gpu = "none"
    if torch.cuda.is_available():
        device = "cuda"
        gpu = torch.cuda.get_device_name()
    report = Report(settings.run / "smoke.json")
    report.add("machine", "versions", gpu=gpu, torch=torch.__version__, cuda=torch.version.cuda)
    if settings.size == "sd-turbo" and settings.random:
        write_folder(settings.run / "sd-turbo", device, ["push the {} button"])
        torch.cuda.empty_cache()
    for name, words in commands(settings, device).items():
        log = settings.run / f"{name}.log"
        stop_at = None
        allowed = (0,)
        if name == "painter_stopped":
            stop_at = settings.run / "controlnet/training.pt"
            allowed = (0, STOPPED)  # 0: it was faster than Ctrl-C
        start = time.perf_counter()
        code = call(words, log, stop_at)
        seconds = round(time.perf_counter() - start, 1)
        report.add(settings.size, name, seconds=seconds, exit_code=code)
        if code not in allowed:
            end = log.read_text().strip()[-500:]
            raise UserError(f"{name} failed (exit code {code}; {log}): {end}")
    report.print_table()


if __name__ == "__main__":
    run_stage(main)
