"""What a trained network says of itself, painter.json or config.json, checked before it is used.

check_config(config, path, needed)    raises UserError: the file, the entry and its value
"""

import math
from pathlib import Path

from genima.files import UserError

ADVICE = "copy this folder again from where it was trained, or train again in another --run"
MAX_NUMBER = 65_536  # pixels, steps, joints: no entry is larger


def check_config(config: dict, path: Path, needed: set[str]):
    """Raise a UserError for an entry that is missing, or of another type than the networks expect.

    path: the file that it was read from. needed: names of entries.
    """
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no settings of a network: {ADVICE}.")
    missing = needed - config.keys()
    if missing:
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}: {ADVICE}.")
    for name, (is_right, wanted) in ENTRIES.items():
        if name in config and not is_right(config[name]):
            refuse(path, name, config[name], wanted)
    cameras = config.get("cameras", [])
    sizes = config.get("image_sizes")
    if sizes is not None and set(sizes) != set(cameras):
        refuse(path, "image_sizes", sizes, f"a size for each of {', '.join(cameras)}")
    if config.get("image_size", 1) is None and sizes is None:
        refuse(path, "image_size", None, "a size, unless there are image_sizes")
    for name in ("state_mean", "state_std"):
        numbers = config.get(name)
        if numbers is not None and "joints" in config and len(numbers) != config["joints"] + 1:
            refuse(path, name, numbers, f"{config['joints'] + 1} numbers")


def refuse(path: Path, name: str, value, wanted: str):
    shown = repr(value)[:80]
    raise UserError(f"{path}: {name} is {shown}, not {wanted}: {ADVICE}.")


# ---------------------------------------------------------------------------- what an entry may be
def is_text(value) -> bool:
    return isinstance(value, str)


def is_texts(value) -> bool:
    return isinstance(value, list) and all(is_text(entry) for entry in value)


def is_names(value) -> bool:
    """Whether these are texts, at least one, and no two alike."""
    return is_texts(value) and 0 < len(value) == len(set(value))


def is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_NUMBER


def is_positive(value) -> bool:
    return is_whole(value) and value > 0


def is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def is_numbers(value) -> bool:
    return isinstance(value, list) and all(is_number(entry) for entry in value)


def is_deviations(value) -> bool:
    return is_numbers(value) and all(entry > 0 for entry in value)


def is_pair(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(is_positive(side) for side in value)


def is_size(value) -> bool:
    return value is None or is_positive(value) or is_pair(value)


def is_sizes(value) -> bool:
    return isinstance(value, dict) and all(is_pair(size) for size in value.values())


def is_rate(value) -> bool:
    return is_number(value) and value > 0


ENTRIES = {
    "size": (is_text, "a name"),
    "objective": (("one-step", "noise").__contains__, "one-step or noise"),
    "observation": (("spheres", "rgb").__contains__, "spheres or rgb"),
    "base": (is_text, "a folder or a name on the Hub"),
    "num_inference_steps": (is_positive, "a whole number above 0"),
    "resolution": (is_positive, "a number of pixels"),
    "horizon": (is_whole, "a number of steps"),
    "joints": (is_positive, "a number of joints"),
    "cameras": (is_names, "a list of cameras"),
    "image_size": (is_size, "a number of pixels, or [height, width]"),
    "image_sizes": (is_sizes, "{camera: [height, width]}"),
    "vocabulary": (is_texts, "a list of words"),
    "tasks": (is_texts, "a list of tasks"),
    "fps": (is_rate, "a rate in Hz"),
    "state_mean": (is_numbers, "a list of numbers"),
    "state_std": (is_deviations, "a list of numbers above 0"),
}
