"""What every training loop needs and no reader wants to see twice: stop, resume, learning rate.

A training script uses it like this; everything else of the loop stands in the script:

    start, log = resume(folder, network, optimizer, identity)  # 0 and [] the first time
    stopping = StopSignal()
    for step, batch in enumerate(batches(samples, start, steps, 2), start + 1):
        set_learning_rate(optimizer, peak * warmup(step) * half_cosine(step, steps))
        ...
        loss, stop = agree(accelerator, loss, stopping.requested)
        log.append([step, loss])
        keep_last(folder, ["config.json", "model.safetensors"], step, keep=3)
        save(folder, network, optimizer, identity, step, log)

A batch is a function of seed and step alone, so a resumed training needs no more than the step, the
weights and the optimiser's state, and gives the same losses as one that was never stopped.
"""

import math
import os
import platform
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path

import torch

from genima.files import UserError, check_number, name_full_disk, shorten, write_whole
from genima.parallel import depend_on_parent

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

LIMITS = {  # of the settings of any training: from, to
    "steps": (1, None),
    "batch_size": (1, 65_536),
    "learning_rate": (0, 1),
    "seed": (0, 2**31 - 1),
    "checkpoint_every": (1, None),
    "keep": (0, None),
}
LEFT_OVER = (".saving-*", ".step-*", ".*.tmp.*")  # names of what is not complete yet


def check_numbers(settings):
    """Raise a UserError for settings, of those in LIMITS, that no training can have.

    None has yet to be filled in.
    """
    for name, (low, high) in LIMITS.items():
        value = getattr(settings, name, None)
        if value is not None:
            option = "--" + name.replace("_", "-")
            check_number(option, value, low, high)


class StopSignal:
    """Ctrl-C, SIGTERM (a scheduler's stop) and SIGHUP (the terminal is gone) end a training after
    the step under way; a second one ends it at once."""

    def __init__(self):
        self.requested = False
        numbers = [signal.SIGINT, signal.SIGTERM]
        hangup = getattr(signal, "SIGHUP", None)  # Windows has none
        if hangup and signal.getsignal(hangup) != signal.SIG_IGN:  # nohup ignores it
            numbers.append(hangup)
        for number in numbers:
            signal.signal(number, self.request)

    def request(self, number, frame):
        self.requested = True
        signal.signal(number, signal.default_int_handler)


def stop_training(step: int, say: bool):
    """End the process after a checkpoint; say: whether this process is the one that prints."""
    if say:
        with suppress(OSError):  # the terminal may be gone
            print(
                f"\nStopped after step {step}: run the same command again to resume.",
                file=sys.stderr,
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
        worker_init_fn=depend_on_parent,
    )


def agree(accelerator, loss: torch.Tensor, stop: bool) -> tuple[float, bool]:
    """The loss of the whole batch, and whether to stop: all processes stop at the same step.

    Raises UserError for a loss that is no number: no later step could repair the weights.
    """
    if accelerator.num_processes == 1:
        loss = loss.item()
    else:
        both = torch.stack([loss.detach(), torch.full_like(loss, float(stop))])
        loss, stopping = accelerator.reduce(both, "mean").tolist()
        stop = stopping > 0
    if not math.isfinite(loss):
        raise UserError(
            f"The loss is {loss}: train with a lower --learning-rate, in another --run (the last "
            "checkpoint is kept)."
        )
    return loss, stop


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
    # Python's file says why it cannot be written; PyTorch's own does not.
    with write_whole(folder / "training.pt") as path, open(path, "wb") as file:
        torch.save(checkpoint, file)


def resume(folder: Path, network, optimizer, identity: dict) -> tuple[int, list]:
    """Load <folder>/training.pt into network and optimizer. Returns the steps done and the log.

    identity: settings and facts about the data that must not change in the middle of a training.
    From here on the folder belongs to this process: what killed trainings left is removed. Raises
    UserError for a checkpoint of another training, one that cannot be read, or a folder in which
    another process trains.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "training.pt"
    checkpoint = read_checkpoint(path, identity)
    step = 0
    log = []
    if checkpoint is not None:
        try:
            step = checkpoint["step"]
            log = checkpoint["log"]
            if len(log) != step:
                raise ValueError(f"{len(log)} losses of {step} steps")
            missing, unexpected = network.load_state_dict(checkpoint["model"], strict=False)
            if unexpected or set(missing) & set(trained_parameters(network)):
                raise RuntimeError("other parameters")
            optimizer.load_state_dict(checkpoint["optimizer"])
        except RuntimeError:
            raise UserError(
                f"{path} is of a network of another size or vocabulary: use another --run."
            ) from None
        except Exception as error:  # something is missing, or of another type
            raise unreadable(path, error) from error
    take_folder(folder)
    return step, log


def take_folder(folder: Path):
    """Lock a training's folder until this process ends, and remove what killed ones left in it.

    Raises UserError if another process trains in it. The lock is the system's, on training.lock:
    it ends with the process, however that ends, and the processes that prepare batches do not have
    it.
    """
    if fcntl is None or os.environ.get("RANK", "0") != "0":  # of several processes, the first
        return
    # It stays open, for to close it is to unlock it.
    file = os.open(folder / "training.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        owner = os.read(file, 100).decode()
        raise UserError(
            f"{folder}: {owner} is training here: wait until it has ended, or use another --run."
        ) from error
    except OSError:  # a file system that cannot lock
        return
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {platform.node()}".encode(), 0)
    for pattern in LEFT_OVER:
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def read_checkpoint(path: Path, identity: dict) -> dict | None:
    """The checkpoint at `path`, of the same settings and data; None where there is none."""
    if not os.path.lexists(path):  # a link to nowhere is no new training
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        before = dict(checkpoint["identity"])
    except Exception as error:
        raise unreadable(path, error) from error
    for name in before | identity:
        if before.get(name) != identity.get(name):
            raise UserError(
                f"{path} was trained with {name} {before.get(name)}, not {identity.get(name)}: "
                "use another --run, or the same settings."
            )
    return checkpoint


def unreadable(path: Path, error: Exception) -> UserError:
    reason = shorten(f"{type(error).__name__}: {error}")[:100]
    return UserError(
        f"{path} cannot be read ({reason}): move it away to train again from the start."
    )


def keep_last(folder: Path, names: list[str], step: int, keep: int):
    """Copy the files and folders `names` to <folder>/step-<step>/; keep the last `keep`.

    Call it before save: a training that is killed meanwhile does this step again.
    """
    if not keep:
        return
    target = folder / f"step-{step}"
    new = folder / f".step-{step}"
    for old in (new, target):
        shutil.rmtree(old, ignore_errors=True)
    with name_full_disk(target):
        new.mkdir()
        for name in names:
            copy = shutil.copytree if (folder / name).is_dir() else shutil.copy
            copy(folder / name, new / name)
        new.rename(target)
    steps = sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))
    for old in steps[:-keep]:
        shutil.rmtree(folder / f"step-{old}")
