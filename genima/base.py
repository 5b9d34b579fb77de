"""What tiny and small start from: a painter in SD-Turbo's place, a controller that follows spheres.

A base is a folder like a trained painter's, made by pretrain_painter.py. It has read words and seen
things, but no task. The controller was trained by train_act.py on random motions (collect_demos.py
--tasks move_around).
"""

import hashlib
from pathlib import Path

from genima.act import ACT, Controller
from genima.files import UserError
from genima.painter import TinyPainter, load_painter

SHIPPED = Path(__file__).resolve().parent.parent / "checkpoints/base"
FOLLOWER = SHIPPED.parent / "follower"
BASES = {  # by default; small's is not shipped
    "tiny": str(SHIPPED),
    "small": "runs/base-small",
    "sd-turbo": "stabilityai/sd-turbo",
}
HOW_TO_MAKE = {"tiny": "make base", "small": "python pretrain_painter.py --size small"}
# What a controller and its base have in common.
SHARED = ("size", "observation", "image_size", "horizon", "joints", "robot", "style")
VIEWS = "image_encoder.to_tokens.pool."  # a controller's weights that belong to one view
FROM_SCRATCH = "none"  # in place of a folder: random weights
OWN = "make a base of its own (pretrain_painter.py), or start from random weights (--base none)"


def check_base(size: str, base: str, out: Path):
    """Raise a UserError for a base that a painter of this size cannot start from.

    out: the folder of the painter to be trained, which must not be the base itself.
    """
    folder = Path(base)
    if folder.is_dir() and folder.resolve() == out.resolve():
        raise UserError(f"--out {out} is the base itself: give another folder.")
    is_ours = (folder / "painter.json").exists()
    if size == "sd-turbo":
        if is_ours or base == FROM_SCRATCH:
            raise UserError(
                f"--base {base} is for --size tiny and small: sd-turbo starts from SD-Turbo's "
                f"folder, or its name on the Hugging Face Hub (--base {BASES[size]})."
            )
    elif base != FROM_SCRATCH and not is_ours:
        raise UserError(
            f"{base} holds no base for --size {size}: make one ({HOW_TO_MAKE[size]}), or start "
            "from random weights (--base none)."
        )


def load_base(base: str, config: dict) -> TinyPainter:
    """The base's painter, to be trained further with this config.

    Its networks take pictures of any size, so a base of other cameras serves as well, if less: what
    is different is said aloud. Raises UserError for a base of another size of network, and for one
    that cannot be read.
    """
    painter = load_painter(base).train()
    theirs = painter.config
    if theirs["size"] != config["size"]:
        raise UserError(
            f"The base {base} is for size {theirs['size']}, this run has {config['size']}: {OWN}."
        )
    for name in ("cameras", "image_size"):
        if theirs.get(name) != config[name]:
            print(f"Note: the base {base} is of {name} {theirs.get(name)}, not {config[name]}.")
    painter.config = config
    return painter


def load_controller_base(base: str | None, config: dict) -> tuple[Controller | None, str | None]:
    """The controller that a training with this config starts from, and its fingerprint.

    base: its folder, or "none"; None: the shipped one, where it fits the data. (None, None) stands
    for random weights. Raises UserError for a folder without a controller, and for a controller
    that does not fit.
    """
    if base == FROM_SCRATCH:
        return None, None
    folder = FOLLOWER if base is None else Path(base)
    if base is None and not folder.exists():
        print(f"There is no {folder}: this training starts from random weights.")
        return None, None
    controller = Controller.load(folder)
    for name in SHARED:
        theirs = controller.config.get(name)
        ours = config.get(name)
        if theirs == ours:
            continue
        words = f"The controller {folder} is for {name} {theirs}, this run has {ours}"
        if base is None:
            print(f"{words}: this training starts from random weights.")
            return None, None
        raise UserError(f"{words}: give another --base, or --base none.")
    new = [camera for camera in config["cameras"] if camera not in controller.config["cameras"]]
    if new:
        print(
            f"Note: the controller {folder} was trained without the cameras {', '.join(new)}: what "
            "it needs for them starts from random weights."
        )
    return controller, fingerprint(str(folder))


def start_from(network: ACT, cameras: list[str], base: Controller):
    """Copy the base's weights into a network of these cameras.

    All views share their weights but for the last layer (PooledTokens): that is taken from the
    base's camera of the same name, and stays as it is where the base has no such camera.
    """
    weights = {}
    for name, values in base.model.state_dict().items():
        if not name.startswith(VIEWS):
            weights[name] = values
            continue
        view, parameter = name.removeprefix(VIEWS).split(".")
        camera = base.config["cameras"][int(view)]
        if camera in cameras:
            weights[f"{VIEWS}{cameras.index(camera)}.{parameter}"] = values
    own = {name: values for name, values in network.state_dict().items() if name.startswith(VIEWS)}
    network.load_state_dict(own | weights)


def fingerprint(base: str) -> str | None:
    """A hash of a base's weights, configs and words: a training resumes from the same base only.

    None for random weights.
    """
    if base == FROM_SCRATCH:
        return None
    digest = hashlib.sha256()
    for path in sorted(Path(base).rglob("*")):
        if path.suffix in (".safetensors", ".json"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
