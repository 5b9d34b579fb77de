"""Trained networks on disk, and the policies that they make.

    policy = load_policy("runs/demo/controlnet", "runs/demo/act")

Loading checks that the networks fit the policy and each other.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from genima.act import Controller
from genima.documents import read_json
from genima.files import UserError
from genima.painter import load_painter
from genima.policy import ActPolicy, GenimaPolicy
from genima.views import image_sizes_of

MAKE_ONE = "`make demo` trains one in runs/demo, `make try` runs the one in checkpoints/demo."


def check_policy(name: str):
    """Raise a UserError for a policy that evaluate.py does not have."""
    if name not in ("genima", "act", "oracle") and ":" not in name:
        raise UserError(f"There is no policy '{name}': give genima, act, oracle or FILE:FUNCTION.")


def resolve_folders(settings) -> dict[str, Path]:
    """Fill in the folders of evaluate.py's settings -> {setting: folder} of the policy's networks.

    Raises UserError where a network, or the function of a policy, is not there.
    """
    if settings.out is None:
        settings.out = settings.run / "evaluation"
    if settings.controller is None:
        settings.controller = settings.run / ("act_rgb" if settings.policy == "act" else "act")
    if settings.painter is None:
        settings.painter = settings.run / "controlnet"
    if ":" in settings.policy:
        load_function(settings.policy)  # raises UserError if it is not there
        return {}
    folders = {"controller": settings.controller}
    if settings.policy == "genima":
        folders["painter"] = settings.painter
    for name, folder in folders.items():
        may_be_on_hub = name == "painter" and folder.parent != settings.run
        if not folder.is_dir() and not may_be_on_hub:
            raise UserError(f"There is no checkpoint {folder}. {MAKE_ONE}")
    return folders


def load_networks(settings):
    """The policy that evaluate.py's settings describe; for the oracle its controller alone."""
    device = settings.device
    if ":" in settings.policy:
        policy = load_function(settings.policy)(settings.run, device)
        for name in ("cameras", "image_size", "act"):
            if not hasattr(policy, name):
                raise UserError(f"{settings.policy} returns no policy: it has no '{name}'.")
        return policy
    if settings.policy == "oracle":
        return load_controller(settings.controller, "spheres", device)
    if settings.policy == "act":
        controller = load_controller(settings.controller, "rgb", device)
        return ActPolicy(controller, settings.drop_state)
    return load_policy(
        settings.painter,
        settings.controller,
        device,
        settings.drop_state,
        settings.size,
        settings.taesd,
        settings.compile,
    )


def load_policy(
    painter: Path | str,
    controller: Path | str,
    device: str = "cpu",
    drop_state: bool = False,
    size: str | None = None,
    taesd: str | None = None,
    compile: bool = False,
) -> GenimaPolicy:
    """The policy of two trained networks: their folders, or a painter's name on the Hub.

    size: refuse a painter of another size. taesd, compile: see the painter. Raises UserError for
    networks that do not fit each other.
    """
    follower = load_controller(controller, "spheres", device)
    artist = load_painter(painter, device, taesd, compile)
    theirs = artist.config | {"image_size": image_sizes_of(artist.config)}
    ours = follower.config | {"image_size": image_sizes_of(follower.config)}
    for name in ("cameras", "horizon", "image_size"):
        wanted = ours[name]
        if theirs[name] != wanted:
            raise UserError(
                f"{painter} was trained with {name} {theirs[name]}, {controller} with {wanted}: "
                "train one of them again."
            )
    if size not in (theirs["size"], None):
        raise UserError(f"{painter} was trained with --size {theirs['size']}, not {size}.")
    return GenimaPolicy(artist, follower, drop_state)


def load_controller(folder: Path | str, observation: str, device: str = "cpu") -> Controller:
    """The controller in a folder. observation: "spheres" or "rgb", on which it must be trained."""
    controller = Controller.load(folder, device)
    if controller.config["observation"] != observation:
        raise UserError(
            f"{folder} was not trained with --observation {observation}, which this policy needs: "
            "give another --controller."
        )
    return controller


def load_function(place: str) -> Callable:
    """The function at FILE:FUNCTION. Raises UserError where there is none."""
    file, _, name = place.rpartition(":")
    if not Path(file).is_file():
        raise UserError(f"There is no file {file}: give --policy FILE:FUNCTION.")
    spec = importlib.util.spec_from_file_location(f"policy_of_{Path(file).stem}", file)
    if spec is None:
        raise UserError(f"{file} is no Python file: give --policy FILE:FUNCTION.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as an import does; dataclasses look there
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise UserError(f"{file} has no function '{name}': give --policy FILE:FUNCTION.")
    return getattr(module, name)


def choose_device(name: str) -> str:
    """ "cuda", "mps" or "cpu"; auto is the first of them that there is. Raises UserError."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name == "auto":
        return available[0]
    if name not in available:
        raise UserError(f"--device {name}: PyTorch finds no such GPU; give --device auto.")
    return name


def last_steps(folder: Path, count: int) -> list[Path]:
    """The last `count` checkpoints step-<N>/ in a folder, the newest first."""
    steps = sorted(folder.glob("step-*"), key=lambda path: int(path.name[5:]), reverse=True)
    if len(steps) < count:
        raise UserError(
            f"{folder} holds {len(steps)} of the {count} checkpoints to average over: train it with"
            f" --keep {count}, or give --checkpoints 1."
        )
    return steps[:count]


def note_unseen_tasks(tasks: Sequence[str], folders: dict[str, Path], run: Path):
    """Say which of the tasks a network was never trained on, before anybody wonders about 0 %."""
    trained = [set(trained_tasks(folder)) for folder in folders.values()]
    trained = [known for known in trained if known]
    verb = "were never"
    if trained:
        known = set.intersection(*trained)
    else:  # checkpoints of an earlier version
        known = {path.name for path in (run / "episodes").glob("*/")}
        verb = "were probably never"
    unseen = [task for task in tasks if task not in known]
    if known and unseen:
        print(
            f"Note: these networks {verb} trained on {', '.join(unseen)}, only on "
            f"{', '.join(sorted(known))}: expect failures."
        )


def trained_tasks(folder: Path) -> list[str]:
    """The tasks that a network was trained on; [] where its folder does not say."""
    for name in ("painter.json", "config.json"):
        with suppress(UserError, TypeError, KeyError):  # load_networks says what is wrong
            return list(read_json(folder / name)["tasks"])
    return []
