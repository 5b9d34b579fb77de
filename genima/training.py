"""What every training loop needs and no reader wants to see twice: stop, resume, learning rate.

A training script uses it like this; everything else of the loop stands in the script:

    start, log = resume(folder, network, optimizer, identity)  # 0 and [] the first time
    stopping = StopSignal()
    for step, batch in enumerate(batches(samples, start, steps), start + 1):
        set_learning_rate(optimizer, peak * warmup(step) * half_cosine(step, steps))
        ...
        loss, stop = agree(accelerator, loss, stopping.requested)
        log.append([step, loss])
        save(folder, network, optimizer, identity, step, log)
        keep_last(folder, ["config.json", "model.safetensors"], step, keep=3)

A batch is a function of seed and step alone, so a resumed training needs no more than the step, the
weights and the optimiser's state, and gives the same losses as one that was never stopped.
"""

import math
import shutil
import signal
import sys
from pathlib import Path

import torch

from genima.files import UserError, write_whole
from genima.parallel import ignore_interrupt


class StopSignal:
    """Ctrl-C and SIGTERM end a training after the step under way; a second one ends it at once."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.request)

    def request(self, number, frame):
        self.requested = True
        signal.signal(number, signal.default_int_handler)


def stop_training(step: int, say: bool):
    """End the process after a checkpoint; say: whether this process is the one that prints."""
    if say:
        print(
            f"\nStopped after step {step}: run the same command again to resume.", file=sys.stderr
        )
    sys.exit(130)


# ------------------------------------------------------------------------------------ learning rate
def warmup(step: int, steps: int = 100) -> float:
    """A straight line from 0 to 1 over the first steps. step counts from 1."""
    return min(step / steps, 1)


def half_cosine(step: int, steps: int) -> float:
    """Half a cosine from 1 at the first step to 0 after the last. step counts from 1."""
    return 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))


def set_learning_rate(optimizer, learning_rate: float):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


# ------------------------------------------------------------------------------- batches, processes
def batches(dataset, start: int, steps: int, num_workers: int, pin_memory: bool = False):
    """Items start, ..., steps - 1 of a dataset whose item `i` is the whole batch of step i + 1."""
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        sampler=range(start, steps),
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=ignore_interrupt,
    )


def agree(accelerator, loss: torch.Tensor, stop: bool) -> tuple[float, bool]:
    """The loss of the whole batch, and whether to stop: all processes stop at the same step."""
    if accelerator.num_processes == 1:
        return loss.item(), stop
    both = torch.stack([loss.detach(), torch.full_like(loss, float(stop))])
    loss, stop = accelerator.reduce(both, "mean").tolist()
    return loss, stop > 0


# -------------------------------------------------------------------------------------- checkpoints
def trained_parameters(network) -> dict[str, torch.Tensor]:
    """The parameters that are trained; what is frozen is not in a checkpoint."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def save(folder: Path, network, optimizer, identity: dict, step: int, log: list):
    """Write <folder>/training.pt. Call it last: what it says is done, must be done."""
    checkpoint = {
        "step": step,
        "identity": identity,
        "log": log,
        "model": trained_parameters(network),
        "optimizer": optimizer.state_dict(),
    }
    with write_whole(folder / "training.pt") as path:
        torch.save(checkpoint, path)


def resume(folder: Path, network, optimizer, identity: dict) -> tuple[int, list]:
    """Load <folder>/training.pt into network and optimizer. Returns the steps done and the log.

    identity: settings and facts about the data that must not change in the middle of a training.
    Raises UserError for a checkpoint of another training, or one that cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = read_checkpoint(folder / "training.pt", identity)
    if checkpoint is None:
        return 0, []
    try:
        missing, unexpected = network.load_state_dict(checkpoint["model"], strict=False)
        if unexpected or set(missing) & set(trained_parameters(network)):
            raise RuntimeError("other parameters")
    except RuntimeError:
        raise UserError(
            f"{folder / 'training.pt'} is of a network of another size or vocabulary: "
            "use another --run."
        ) from None
    optimizer.load_state_dict(checkpoint["optimizer"])
    return checkpoint["step"], checkpoint["log"]


def read_checkpoint(path: Path, identity: dict) -> dict | None:
    """The checkpoint at `path`, of the same settings and data; None where there is none."""
    if not path.exists():
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        before = checkpoint["identity"]
    except Exception as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"{path} cannot be read ({reason}): move it away to train again from the start."
        ) from error
    for name, value in identity.items():
        if before.get(name) != value:
            raise UserError(
                f"{path} was trained with {name} {before.get(name)}, not {value}: "
                "use another --run, or the same settings."
            )
    return checkpoint


def keep_last(folder: Path, names: list[str], step: int, keep: int):
    """Copy the files and folders `names` to <folder>/step-<step>/; keep the last `keep`."""
    if not keep:
        return
    target = folder / f"step-{step}"
    new = folder / f".step-{step}"
    for old in (new, target):
        shutil.rmtree(old, ignore_errors=True)
    new.mkdir()
    for name in names:
        copy = shutil.copytree if (folder / name).is_dir() else shutil.copy
        copy(folder / name, new / name)
    new.rename(target)
    steps = sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))
    for old in steps[:-keep]:
        shutil.rmtree(folder / f"step-{old}")
