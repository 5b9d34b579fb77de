"""Where RLBench's demonstrations lie on a disk, and their sentences and pictures.

    <root>/<task>/variation<N>/episodes/episode<M>/        RLBench's generator, GENIMA's data,
                                                           most of The Colosseum's
    <root>/<task>/all_variations/episodes/episode<M>/      PerAct's and PerAct2's
    <root>/<task>/episodes/episode<M>/                     The Colosseum's mixed set (<task>_13)

In the last two each episode has its own variation_number.pkl and variation_descriptions.pkl.
Links are followed; an episode that is met twice counts once.
"""

import re

import numpy as np
from PIL import Image

from genima.files import UserError
from sims.rlbench_cameras import OTHER_NAMES
from sims.rlbench_pickle import load

LAYOUTS = "<task>/variation<N>/episodes/episode<M>"
MOST_CHARACTERS = 1000  # of a sentence; RLBench's have less than 200


# ------------------------------------------------------------------------------------- folders
def order(folder):
    """variation0, variation1, ..., variation10 come before other folders."""
    digits = re.fullmatch(r"(?:variation|episode)(\d+)", folder.name)
    return (0, int(digits[1]), "") if digits else (1, 0, folder.name)


def episode_folders(root):
    """All folders .../episodes/episode* below root, each once."""
    found = []
    seen = set()
    waiting = [root] if root.is_dir() else []
    while waiting:
        folder = waiting.pop()
        if folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        if folder.parent.name == "episodes" and folder.name.startswith("episode"):
            found.append(folder)
            continue
        try:
            inside = [path for path in folder.iterdir() if path.is_dir()]
        except OSError as error:
            raise UserError(f"{folder} cannot be read ({error.strerror}).") from error
        waiting += sorted(inside, key=order, reverse=True)
    return found


def is_known_layout(folder, root):
    """Does this folder of an episode lie where one of the layouts above has it?"""
    parts = folder.relative_to(root).parts
    if not re.fullmatch(r"episode\d+", folder.name):
        return False
    kind = r"variation\d+|all_variations"
    if len(parts) == 4:
        return bool(re.fullmatch(kind, parts[1]))
    own_number = (folder / "variation_number.pkl").exists()
    return len(parts) == 3 and own_number and not re.fullmatch(kind, parts[0])


def identify(folder):
    """Task, variation and number of a demonstration's folder episode<M>."""
    group = folder.absolute().parent.parent
    number = int(folder.name.removeprefix("episode"))
    if group.name.startswith("variation") and group.name[9:].isdigit():
        return group.parent.name, int(group.name[9:]), number
    task = group.parent.name if group.name == "all_variations" else group.name
    variation = load(folder / "variation_number.pkl")
    if type(variation) is not int or not 0 <= variation < 10_000:
        path = folder / "variation_number.pkl"
        raise UserError(f"{path} does not hold a variation's number: get it again.")
    return task, variation, number


def survey(root):
    """All demonstrations below root: {(task, variation): {number: folder}}, and what is wrong.

    The latter are sentences, one for each place with episodes that cannot be imported.
    """
    found = {}
    wrong = []
    elsewhere = {}  # folder episodes/ -> names of the episodes inside
    for folder in episode_folders(root):
        if not is_known_layout(folder, root):
            elsewhere.setdefault(folder.parent, []).append(folder.name)
            continue
        try:
            task, variation, number = identify(folder)
        except UserError as error:
            wrong.append(str(error))
            continue
        other = found.setdefault((task, variation), {}).setdefault(number, folder)
        if other != folder:
            wrong.append(
                f"{folder} was not imported: it has the task, the variation and the number of "
                f"{other}; import it alone, with another --run."
            )
    for parent, names in elsewhere.items():
        wrong.append(
            f"{parent} was not imported ({', '.join(names)}): it is not where RLBench has its "
            f"episodes, {root}/{LAYOUTS}; give the folder above the tasks as root."
        )
    return found, wrong


def find_demonstrations(root, tasks=(), variations=(), count=None):
    """The folders episode<M> of these tasks and variations, at most `count` of each variation.

    None named: of all. Raises UserError where there are none.
    """
    found, wrong = survey(root)
    if not found:
        reason = "".join(f" {sentence}" for sentence in wrong[:1])
        raise UserError(
            f"{root} has no {LAYOUTS} inside: give the root of a dataset of RLBench.{reason}"
        )
    present = sorted({task for task, _ in found})
    for task in tasks:
        if task not in present:
            raise UserError(f"{root} has no task '{task}', only {', '.join(present)}.")
    chosen = []
    for task, variation in sorted(found):
        if (not tasks or task in tasks) and (not variations or variation in variations):
            chosen.append((task, variation))
    for variation in variations:
        if variation not in [number for _, number in chosen]:
            raise UserError(f"{root} has no variation{variation} of these tasks.")
    folders = []
    for key in chosen:
        folders += [folder for _, folder in sorted(found[key].items())][:count]
    return folders


def not_importable(root, tasks=()):
    """A sentence for each place below root whose episodes find_demonstrations does not find.

    With tasks named, only for places below those.
    """
    wrong = survey(root)[1]
    if not tasks:
        return wrong
    places = [str(root / task) for task in tasks]
    return [sentence for sentence in wrong if any(place in sentence for place in places)]


def episode_file(folder):
    """The name of the file that a demonstration is imported to."""
    _, variation, number = identify(folder)
    return f"episode{number:03d}_variation{variation:02d}.hdf5"


# ----------------------------------------------------------------------------------- sentences
def read_descriptions(folder):
    """A demonstration's sentences, and whether they are only the task's name.

    Before June 2023 RLBench's generator wrote an Observation in the place of the sentences.
    """
    path = folder / "variation_descriptions.pkl"
    if not path.exists():
        path = folder.parent.parent / "variation_descriptions.pkl"
    content = load(path)
    if hasattr(content, "joint_positions"):
        return [identify(folder)[0].replace("_", " ")], True
    if not isinstance(content, list) or not content:
        raise UserError(f"{path} is not a list of sentences: get it again.")
    for sentence in content:
        if type(sentence) is not str or not 0 < len(sentence) <= MOST_CHARACTERS:
            raise UserError(f"{path} is not a list of sentences: get it again.")
    return content, False


# ------------------------------------------------------------------------------------ pictures
def picture_folder(folder, camera):
    """Where a demonstration keeps a camera's pictures. Raises UserError if it has none."""
    for name in (camera, OTHER_NAMES.get(camera, camera)):
        if (folder / f"{name}_rgb").is_dir():
            return folder / f"{name}_rgb"
    there = ", ".join(sorted(path.name[:-4] for path in folder.glob("*_rgb"))) or "none"
    raise UserError(
        f"{folder / f'{camera}_rgb'} is missing; this demonstration's cameras are: {there}. "
        "Choose among them with --cameras."
    )


def read_picture(path, size):
    """One picture (H, W, 3), resized if size (height, width) is given; original (width, height)."""
    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no whole picture ({error}): get it again.") from error
    original = picture.size
    if size and original != size[::-1]:
        shrinks = original[0] > size[1]
        picture = picture.resize(size[::-1], Image.BOX if shrinks else Image.BICUBIC)
    return np.array(picture), original


def read_pictures(folder, frames, size):
    """All pictures of a camera (T, H, W, 3) and their original size (width, height)."""
    count = len(list(folder.glob("*.png")))
    if count != frames:
        raise UserError(
            f"{folder} has {count} pictures, but the demonstration {frames} frames: get it again."
        )
    pattern = "{}.png" if (folder / "0.png").exists() else "rgb_{:04d}.png"  # PerAct2's
    pictures = []
    for t in range(frames):
        path = folder / pattern.format(t)
        picture, original = read_picture(path, size)
        if t == 0:
            first = original
        if original != first:
            raise UserError(f"{path} is of {original} pixels, the first of {first}: get it again.")
        pictures.append(picture)
    return np.stack(pictures), first
