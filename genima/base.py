"""The base that tiny starts from, in SD-Turbo's place: a painter that pretrain_painter.py has made.

A base is a folder like a trained painter's. It has read words and seen things, but no task.
"""

import hashlib
from pathlib import Path

from genima.files import UserError
from genima.painter import TinyPainter, load_painter

SHIPPED = Path(__file__).resolve().parent.parent / "checkpoints/base"


def load_base(base: str, config: dict, instructions: list[str]) -> TinyPainter:
    """The base's painter, to be trained further with this config.

    Raises UserError for a folder without a base, or one that does not fit the run. Prints which
    words of the instructions the base has never read.
    """
    folder = Path(base)
    if not (folder / "painter.json").exists():
        raise UserError(
            f"{folder} holds no base: make one (make base), or start from random weights "
            "(--base none)."
        )
    painter = load_painter(folder).train()
    for name in ("size", "cameras", "image_size", "resolution"):
        if painter.config[name] != config[name]:
            raise UserError(
                f"The base {folder} is for {name} {painter.config[name]}, this run has "
                f"{config[name]}: make a base of its own (pretrain_painter.py), or start from "
                "random weights (--base none)."
            )
    unknown = unknown_words(painter.tokenizer, instructions)
    if unknown:
        print(f"The base has never read {', '.join(unknown)}: it spells them letter by letter.")
    painter.config = config
    return painter


def unknown_words(tokenizer, instructions: list[str]) -> list[str]:
    """The words that are more than one token."""
    words = set()
    for instruction in instructions:
        words.update(instruction.lower().split())
    return sorted(word for word in words if len(tokenizer.tokenize(word)) > 1 and word.isalpha())


def fingerprint(base: str) -> str:
    """A hash of the base's weights: a training is resumed from the same base only."""
    digest = hashlib.sha256()
    for path in sorted(Path(base).rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
