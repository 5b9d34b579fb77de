"""What both trainings need and no reader wants to see twice: checkpoints, resume."""

import shutil

import torch

from genima.files import UserError


def keep_last(folder, names, step, keep):
    """Copy the files and folders `names` of a finished checkpoint to <folder>/step-<step>/, and remove all but the last `keep`."""
    if not keep:
        return
    target, new = folder / f"step-{step}", folder / f".step-{step}"
    for old in (new, target):
        shutil.rmtree(old, ignore_errors=True)
    new.mkdir()
    for name in names:
        (shutil.copytree if (folder / name).is_dir() else shutil.copy)(folder / name, new / name)
    new.rename(target)
    for old in sorted(folder.glob("step-*"), key=lambda path: int(path.name[5:]))[:-keep]:
        shutil.rmtree(old)


def read_checkpoint(path, identity):
    """The checkpoint at `path`, which must come from the same settings and data; None where there is none."""
    if not path.exists():
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        before = checkpoint["identity"]
    except Exception as error:
        raise UserError(
            f"{path} cannot be read ({' '.join(str(error).split())[:100]}): delete it to train anew."
        ) from error
    for name, value in identity.items():
        if before.get(name) != value:
            raise UserError(
                f"{path} was trained with {name} {before.get(name)}, not {value}: delete {path.parent}, or use another --run."
            )
    return checkpoint
