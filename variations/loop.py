"""What the three variations share: the training loop of train_act.py with the loss left open, and evaluate.py's closed loop."""

import json
import math
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm import tqdm

import evaluate as closed_loop
from genima.episodes import CAMERAS
from genima.files import UserError, write_whole
from genima.parallel import ignore_interrupt
from genima.plots import write_losses
from genima.training import read_checkpoint
from train_act import Samples, read_run, words_in


@dataclass
class Settings:
    run: Path = Path("runs/demo")
    """Folder of the run; episodes/ and spheres/ inside it are read, a folder of the variation's name is written."""
    evaluate: bool = False
    """Drive what was trained in unseen scenes instead of training it."""
    steps: int = 1800
    """Gradient steps; the learning rate falls to zero over them."""
    batch: int = 32
    """Samples a step."""
    learning_rate: float = 1e-3
    """Highest learning rate."""
    bf16: bool = False
    """Train in sixteen bits: a step takes two thirds of the time. Not so the ACT baseline."""
    seed: int = 0
    """Seed of the weights, the samples and the noise."""
    checkpoint_every: int = 300
    """Steps between two checkpoints."""
    scenes: int = 50
    """For --evaluate: unseen scenes of each task."""
    first_scene: int = 0
    """For --evaluate: seed of the first scene; the next one's is one more."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where the networks run; auto takes a GPU where there is one."""


def settle(settings_class, description):
    """The command line -> settings, with the device that there is."""
    settings = tyro.cli(settings_class, description=description)
    if min(settings.steps, settings.batch, settings.checkpoint_every, settings.scenes) < 1:
        raise UserError("--steps, --batch, --checkpoint-every and --scenes must be 1 or more.")
    if settings.device == "auto":
        settings.device = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    return settings


def prepare(settings, samples_class=Samples, language=True):
    """Read the run for samples on plain views -> training samples, samples of held-out scenes, and the network's configuration.

    As the ACT baseline does it (train_act.py --observation rgb): the same episodes, and the same scenes held out.
    """
    settings.observation = "rgb"  # for read_run
    episodes, horizon = read_run(settings)
    scenes = sorted({(episode.task, episode.seed) for episode in episodes})
    held_out = set(scenes[9::20] or scenes[1:][-1:])
    training = [episode for episode in episodes if (episode.task, episode.seed) not in held_out]
    unseen = [
        episode for episode in episodes if (episode.task, episode.seed) in held_out
    ] or training
    vocabulary = {
        word
        for episode in episodes
        for text in (episode.instruction, *episode.instructions)
        for word in words_in(text)
    }
    config = dict(
        size="tiny",
        observation="rgb",
        horizon=horizon,
        joints=episodes[0].qpos.shape[1] - 1,
        cameras=sorted(episodes[0].image_sizes, key=lambda name: (*CAMERAS, name).index(name)),
        image_size=list(next(iter(episodes[0].image_sizes.values()))),
        vocabulary=sorted(vocabulary) if language else [],
    )
    samples = samples_class(training, episodes, config, settings)
    present = np.stack(
        [samples.motion(np.random.default_rng((settings.seed, i)))[2] for i in range(2000)]
    )  # (2000, D+1)
    config.update(state_mean=present.mean(0).tolist(), state_std=(present.std(0) + 1e-3).tolist())
    return samples, samples_class(unseen, episodes, config, settings), config


def train(network, loss_of, samples, checks, settings, folder, config):
    """Minimise loss_of(network, batch); write config.json, model.safetensors, losses.csv, losses.png, training.pt into `folder`.

    Item i of `samples` and of `checks` (held-out scenes) is the batch of step i: a dict of tensors, and of lists that stay as they are.
    Ctrl-C stops, and the same command goes on from there. A batch and its noise are a function of seed and step alone.
    """
    identity = dict(
        config,
        steps=settings.steps,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        bf16=settings.bf16,
    )
    checkpoint = read_checkpoint(folder / "training.pt", identity)
    start, history, seconds = (
        (checkpoint[name] for name in ("step", "history", "seconds")) if checkpoint else (0, [], 0)
    )
    if start == settings.steps:
        print(f"{folder} is trained already, {start} steps.")
        return
    network = network.to(settings.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(network.parameters(), settings.learning_rate, weight_decay=1e-4)
    if checkpoint:
        network.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    on_device = lambda batch: {
        name: value.to(settings.device) if torch.is_tensor(value) else value
        for name, value in batch.items()
    }  # noqa: E731
    print(
        f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters, on {settings.device}."
    )

    stopping = []  # Ctrl-C ends the training after the step it is in, a second one at once
    signal.signal(
        signal.SIGINT,
        lambda *_: (
            stopping.append(True) or signal.signal(signal.SIGINT, signal.default_int_handler)
        ),
    )
    batches = DataLoader(
        samples,
        batch_size=None,
        sampler=range(start, settings.steps),
        num_workers=2,
        worker_init_fn=ignore_interrupt,
    )
    began = time.monotonic() - seconds
    for step, batch in enumerate(
        bar := tqdm(batches, desc=folder.name, unit="step", initial=start, total=settings.steps),
        start,
    ):
        torch.manual_seed(int(np.random.SeedSequence((settings.seed, step)).generate_state(1)[0]))
        for group in optimizer.param_groups:  # a short warm-up, and half a cosine down to zero
            group["lr"] = (
                settings.learning_rate
                * min(1, (step + 1) / 100)
                * (1 + math.cos(math.pi * step / settings.steps))
                / 2
            )
        with torch.autocast(settings.device, torch.bfloat16, enabled=settings.bf16):
            loss = loss_of(network, on_device(batch))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

        done = step + 1
        history.append([step, loss.item(), ""])
        bar.set_postfix(loss=f"{np.mean([row[1] for row in history[-50:]]):.4f}", refresh=False)
        due = done % settings.checkpoint_every == 0 or done == settings.steps
        if due:
            network.eval()
            with torch.no_grad():
                torch.manual_seed(0)
                history[-1][2] = float(
                    np.mean(
                        [
                            loss_of(network, on_device(checks[settings.steps + i])).item()
                            for i in range(6)
                        ]
                    )
                )
            network.train()
        if due or stopping:
            save(
                folder,
                config,
                dict(
                    model=network.state_dict(),
                    optimizer=optimizer.state_dict(),
                    step=done,
                    identity=identity,
                    history=history,
                    seconds=time.monotonic() - began,
                ),
            )
        if stopping and done < settings.steps:
            print(
                f"\nStopped after step {done}: the same command goes on from there.",
                file=sys.stderr,
            )
            sys.exit(130)
    minutes = (time.monotonic() - began) / 60
    print(
        f"{folder}: loss in held-out scenes {history[-1][2]:.4f}, after {settings.steps} steps in {minutes:.1f} minutes."
    )


def save(folder, config, checkpoint):
    """Each file whole, training.pt last: what it says is done, is done."""
    with write_whole(folder / "config.json") as path:
        path.write_text(json.dumps(config, indent=1))
    with write_whole(folder / "model.safetensors") as path:
        save_file({name: value.contiguous() for name, value in checkpoint["model"].items()}, path)
    write_losses(
        folder, ("step", "loss", "held_out"), checkpoint["history"], ["loss"], ["held_out"], "loss"
    )
    with write_whole(folder / "training.pt") as path:
        torch.save(checkpoint, path)


def load(network_class, folder, device):
    """A trained network and its configuration."""
    try:
        config = json.loads((folder / "config.json").read_text())
        network = network_class(config)
        network.load_state_dict(load_file(folder / "model.safetensors"))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder} holds no trained network ({reason}): run the script without --evaluate first."
        ) from error
    return network.to(device).eval(), config


def drive(policy, settings, folder):
    """evaluate.py with another policy: policy(run, device) -> a policy of genima/policy.py. Writes evaluation_<name>.json and films."""
    closed = closed_loop.Settings(
        run=settings.run,
        policy=f"{policy.__globals__['__file__']}:{policy.__name__}",
        episodes=settings.scenes,
        seed=settings.first_scene,
        language=0,
        controller=folder,
        out=folder,
        device=settings.device,
    )
    closed_loop.evaluate(closed_loop.resolve_settings(closed))
