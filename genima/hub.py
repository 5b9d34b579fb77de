"""The Hugging Face Hub: a model card for what was trained, and the upload. (Loading by name: painter.py.)"""

import dataclasses
import sys
from pathlib import Path

import huggingface_hub

from genima.files import UserError, write_whole

CARD = """---
license: {licence}
library_name: diffusers
pipeline_tag: image-to-image
tags: [robotics, controlnet, genima, nanogenima]{base}
---
# {title}

Paints a robot's joint positions, a few steps ahead, as coloured spheres on its four camera pictures, for the instruction in the
prompt: the diffusion stage of [GENIMA](https://arxiv.org/abs/2407.07875), trained with nanoGENIMA.

```python
from genima.painter import Painter

painter = Painter.load("{name}")
painted = painter.paint({{camera: pictures}}, ["push the blue button"])  # (B, H, W, 3) uint8 each
```

**Data.** {frames} pictures of demonstrations; each target shows the robot {horizon} steps later.

**Training.** `{command}`: {steps} steps, the last loss {loss:.4f}; overlap (IoU) of painted and true spheres at the first frames of
unseen scenes: {overlap}.

| setting | value |
| --- | --- |
{settings}

![training loss, and overlap in unseen scenes](losses.png)

Unseen scenes: observation, truth, painted.

![observation, truth, painted](validation.png)

**Licence.** {licence_text}
"""


def write_card(folder, settings, log, frames, horizon):
    """Write <folder>/README.md from a run's settings (a dataclass) and log (rows of step, loss, overlap or "")."""
    turbo = settings.size == "sd-turbo"
    overlaps = [row[2] for row in log if row[2] != ""]
    text = CARD.format(
        licence="other\nlicense_name: stability-ai-community\nlicense_link: https://stability.ai/community-license-agreement" if turbo else "mit",
        base="\nbase_model: stabilityai/sd-turbo" if turbo else "",
        title=f"A GENIMA painter ({settings.size}, {settings.objective})", name=settings.push_to_hub or folder, frames=frames, horizon=horizon,
        command=" ".join(["python", *(Path(word).name if word.endswith(".py") else word for word in sys.argv)]),
        steps=log[-1][0], loss=log[-1][1], overlap=f"{overlaps[-1]:.3f}" if overlaps else "not measured yet",
        settings="\n".join(f"| {field.name} | {getattr(settings, field.name)} |" for field in dataclasses.fields(settings)),
        licence_text="A ControlNet derived from SD-Turbo: the Stability AI Community Licence applies." if turbo
        else "MIT, as the code that trained it; no weights of others are in it.",
    )  # fmt: skip
    with write_whole(folder / "README.md") as path:
        path.write_text(text)


def check_hub(name):
    """Raise a UserError unless this name can be uploaded to: better before the training than after it."""
    try:
        huggingface_hub.utils.validate_repo_id(name)
        huggingface_hub.HfApi().whoami()
    except Exception as error:
        raise UserError(
            f"--push-to-hub {name} cannot work ({' '.join(str(error).split())[:100]}): check the name and the network, and "
            "log in (hf auth login); without the flag everything stays in the run's folder."
        ) from error


def push(folder, names, repository):
    """Upload files and folders of a run to a repository of the Hub, which is made where there is none."""
    patterns = [pattern for name in names for pattern in (name, f"{name}/*")]
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
            f"{folder} is trained, but {repository} cannot be uploaded to ({' '.join(str(error).split())[:100]}): "
            "run the same command again when the network is there."
        ) from error
    print(f"Uploaded (private): {url}")
