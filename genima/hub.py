"""The Hugging Face Hub and its layout: load and save a painter's parts, its model card, upload.

A painter is stored as diffusers stores a pipeline: one folder per part (unet/, controlnet/, ...),
weights as safetensors. Wherever such a folder is read, the name of a model on the Hub will do.
"""

import dataclasses
import json
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import diffusers
import huggingface_hub
import transformers

from genima.configs import check_config
from genima.documents import read_json
from genima.files import UserError, name_full_disk, write_whole

OURS = {
    "header": "license: mit",
    "sentence": "MIT, as the code that trained it; no weights of others are in it.",
}
LICENCES = {  # of the trained weights, by size
    "tiny": OURS,
    "small": OURS,
    "sd-turbo": {
        "header": "license: other\n"
        "license_name: stability-ai-community\n"
        "license_link: https://stability.ai/community-license-agreement\n"
        "base_model: stabilityai/sd-turbo",
        "sentence": "A ControlNet derived from SD-Turbo: "
        "the Stability AI Community Licence applies.",
    },
}

# What a painter's config always has (genima/painter.py says what it means).
CONFIG_NAMES = {"size", "objective", "num_inference_steps", "image_size", "resolution", "horizon"}
CONFIG_NAMES |= {"cameras"}

CARD = """---
{header}
library_name: diffusers
pipeline_tag: image-to-image
tags: [robotics, controlnet, genima, nanogenima]
---
# A GENIMA painter ({size}, {objective})

Paints a robot's joint positions, a few steps ahead, as coloured spheres on its camera pictures,
for the instruction in the prompt: the diffusion stage of
[GENIMA](https://arxiv.org/abs/2407.07875), trained with nanoGENIMA.

```python
from genima.painter import load_painter

painter = load_painter("{name}")
painted = painter.paint({{camera: pictures}}, ["push the blue button"])  # (B, H, W, 3) uint8 each
```

**Data.** {frames} pictures of demonstrations; each target shows the robot {horizon} steps later.

**Training.** `{command}`: {steps} steps, the last loss {loss:.4f}; overlap (IoU) of painted and
true spheres at the first frames of {measured_in}: {overlap}.

| setting | value |
| --- | --- |
{settings}

![training loss, and overlap in {measured_in}](losses.png)

First frames of {measured_in}: observation, truth, painted.

![observation, truth, painted](validation.png)

**Licence.** {licence}
"""


# ----------------------------------------------------------------------------------- load and save
def fetch_folder(name: str | Path) -> Path:
    """The folder of this name or, where there is none, the model user/name of the Hub, fetched."""
    folder = Path(name)
    if folder.is_dir() or len(folder.parts) != 2:
        return folder
    try:
        return Path(huggingface_hub.snapshot_download(str(name)))
    except Exception as error:
        raise UserError(
            f"{name} is no folder here, and the Hugging Face Hub gives none of that name "
            f"({one_line(error)})."
        ) from error


def load_parts(source: str | Path, classes: dict[str, type]) -> dict:
    """{part: its class} -> {part: loaded from <source>/<part>}, as float32.

    source: a folder in diffusers' layout, or the name of a model on the Hub. Weights that are there
    in float16 alone (--variant fp16) will do.
    """
    check_reachable(source)
    return {name: load_part(source, part_class, name) for name, part_class in classes.items()}


def load_part(source: str | Path, part_class: type, subfolder: str = ""):
    """One part, loaded from <source>/<subfolder>."""
    hide_progress_bars()
    options = {"subfolder": subfolder}
    has_weights = subfolder not in ("tokenizer", "scheduler")
    if has_weights:
        options["use_safetensors"] = True  # a pickle could run code
    try:
        check_files(Path(source), subfolder)
        if has_weights:
            return load_weights(source, part_class, options)
        return part_class.from_pretrained(source, **options)
    except Exception as error:
        if has_weights:
            with suppress(Exception):  # what is wrong without it is the error to report
                return load_weights(source, part_class, options | {"variant": "fp16"}).float()
        raise UserError(
            f"{Path(source) / subfolder} is no whole {part_class.__name__}, nor can it be fetched "
            f"({one_line(error)}): give one in diffusers' layout."
        ) from error


def load_weights(source: str | Path, part_class: type, options: dict):
    """A network. Raises ValueError for a file that lacks weights: these would be random numbers."""
    network, found = part_class.from_pretrained(source, output_loading_info=True, **options)
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"{len(missing)} of its weights are missing, such as {missing[0]}")
    if hasattr(network, "register_to_config"):  # else what is saved names a folder of this machine
        network.register_to_config(_name_or_path="")
    return network


def check_files(source: Path, subfolder: str):
    """Raise a FileNotFoundError if a folder lacks a part: a tokenizer would load empty."""
    if source.is_dir() and not list((source / subfolder).glob("*.json")):
        raise FileNotFoundError(f"there is no JSON file in {source / subfolder}")


def read_config(folder: Path) -> dict:
    """A painter's painter.json. Raises UserError if it is missing, broken or of an old version."""
    path = folder / "painter.json"
    if not path.exists():
        raise UserError(f"{folder} holds no painter: train one first (python train_controlnet.py).")
    config = read_json(path)
    if isinstance(config, dict) and "picture" in config:
        raise UserError(
            f"{path} is of an earlier version: in it, rename 'picture' to 'resolution' and "
            "'steps' to 'num_inference_steps'."
        )
    needed = CONFIG_NAMES
    if isinstance(config, dict) and config.get("size") == "sd-turbo":
        needed = needed | {"base"}
    check_config(config, path, needed)
    if config["size"] not in LICENCES:
        raise UserError(f"{path}: size is {config['size']!r}, not one of {', '.join(LICENCES)}.")
    return config


def save_parts(folder: Path, parts: dict, config: dict):
    """Write each part to <folder>/<part>, and painter.json: file by file, each whole."""
    hide_progress_bars()
    in_folder = tempfile.TemporaryDirectory(dir=folder, prefix=".saving-")
    with name_full_disk(folder), in_folder as temporary:
        temporary = Path(temporary)
        for name, part in parts.items():
            part.save_pretrained(temporary / name)
        (temporary / "painter.json").write_text(json.dumps(config, indent=1))
        files = [path for path in temporary.rglob("*") if path.is_file()]
        for file in files:
            target = folder / file.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)


def check_reachable(source: str | Path):
    """Ask the Hub once for a model that is not on this disk: from_pretrained tries for minutes."""
    if Path(source).is_dir():
        return
    try:
        cached = huggingface_hub.try_to_load_from_cache(str(source), "model_index.json")
        if isinstance(cached, str):
            return
        huggingface_hub.HfApi().model_info(str(source), timeout=10)
    except Exception as error:
        raise UserError(
            f"{source} is neither a folder here nor can it be fetched ({one_line(error)}): "
            "connect to the network once, or name a folder in SD-Turbo's layout (--base)."
        ) from error


def hide_progress_bars():
    """The only progress bar is the training's own."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


# ------------------------------------------------------------------------------------------- share
def write_card(
    folder: Path, settings, log: list, frames: int, horizon: int, measured_in: str = "unseen scenes"
):
    """Write <folder>/README.md.

    measured_in: the scenes of the overlap and of validation.png, as the card calls them.
    settings: the dataclass that train_controlnet.py reads from its command line.
    log: rows of step, loss, overlap or "" where it was not measured.
    """
    licence = LICENCES[settings.size]
    name = settings.push_to_hub
    if name is None:
        name = folder
    overlap = "not measured yet"
    for row in log:
        if row[2] != "":
            overlap = f"{row[2]:.3f}"
    rows = []
    here = f"{Path(__file__).resolve().parent.parent}/"  # of no use on another machine
    for field in dataclasses.fields(settings):
        value = str(getattr(settings, field.name)).removeprefix(here)
        rows.append(f"| {field.name} | {value} |")
    script, *arguments = sys.argv
    last_step, last_loss, _ = log[-1]
    text = CARD.format(
        header=licence["header"],
        size=settings.size,
        objective=settings.objective,
        name=name,
        frames=frames,
        horizon=horizon,
        command=" ".join(["python", Path(script).name, *arguments]),
        steps=last_step,
        loss=last_loss,
        overlap=overlap,
        measured_in=measured_in,
        settings="\n".join(rows),
        licence=licence["sentence"],
    )
    with write_whole(folder / "README.md") as path:
        path.write_text(text)


def check_hub(name: str):
    """Raise a UserError unless this name can be uploaded to: ask before the training."""
    try:
        huggingface_hub.utils.validate_repo_id(name)
        huggingface_hub.HfApi().whoami()
    except Exception as error:
        raise UserError(
            f"--push-to-hub {name} cannot work ({one_line(error)}): check the name and the "
            "network, and log in (hf auth login); without the flag everything stays in the run's "
            "folder."
        ) from error


def push(folder: Path, names: list[str], repository: str):
    """Upload files and folders of a run to a private repository of the Hub; create it if needed."""
    patterns = []
    for name in names:
        patterns += [name, f"{name}/*"]
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repository, exist_ok=True, private=True)
        url = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=patterns,
            commit_message="Trained with nanoGENIMA",
        )
    except Exception as error:
        raise UserError(
            f"{folder} is trained, but {repository} cannot be uploaded to ({one_line(error)}): "
            "run the same command again when the network is there."
        ) from error
    print(f"Uploaded (private): {url}")
