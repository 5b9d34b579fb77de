"""The painter: text model, UNet and ControlNet as one network. Trained by train_controlnet.py, used by evaluate.py and real_robot.py.

    prompt --> CLIP's text model --------------------+--> words
    four views in one picture --> ControlNet <-------+       |      a copy of the UNet's encoder; joined by zero convolutions,
                                     |               v       v      so that before training it changes nothing
    noise (tiny: the picture) -----> + -----------> UNet --> + --> the picture with spheres

Two sizes of the same parts. `tiny` is built small and trained from nothing: a latent is a patch of pixels. `sd-turbo` is Stability
AI's network, of which nothing but the ControlNet is trained: a latent is what its autoencoder makes of 8x8 pixels.
"""

import json
import os
import re
import tempfile
from collections import Counter
from pathlib import Path

import diffusers
import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from genima.episodes import CAMERAS
from genima.files import UserError

diffusers.utils.logging.disable_progress_bar()  # one bar, ours
transformers.utils.logging.disable_progress_bar()

PROMPT = "tiled perspectives of a robot arm executing '{}'"  # paper, appendix: the views and the instruction in one sentence
TIMESTEP = 999  # SD-Turbo's first timestep, and its only one when it paints in one step
PATCH = 4  # pixels a side that make up one latent of `tiny`; 8 gave blurred blobs
TOKENS = 32  # longest prompt of `tiny`; CLIP's 77 would be padding


def tile(views):
    """Views (B, 4, C, H, W) in the order of CAMERAS -> one picture (B, C, 2H, 2W): row 1 wrist, front; row 2 shoulders."""
    B, V, C, H, W = views.shape
    return views.reshape(B, 2, 2, C, H, W).permute(0, 3, 1, 4, 2, 5).reshape(B, C, 2 * H, 2 * W)


def untile(picture):
    """The inverse of `tile`."""
    B, C, H, W = picture.shape
    return (
        picture.reshape(B, C, 2, H // 2, 2, W // 2)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(B, 4, C, H // 2, W // 2)
    )


def composite(layer, picture):
    """Layer (B, 4, H, W) over picture (B, 3, H, W), both 0..1."""
    colour, alpha = layer[:, :3], layer[:, 3:]
    return alpha * colour + (1 - alpha) * picture


# ------------------------------------------------------------------------------------------------------------ parts
def build_tiny(instructions, image_size):
    """The parts of StableDiffusionControlNetPipeline, small and untrained."""
    tokenizer = train_tokenizer([PROMPT.format(instruction) for instruction in instructions])
    width = 64
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, projection_dim=width,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=2 * image_size // PATCH,
        in_channels=3 * PATCH**2,
        out_channels=4 * PATCH**2,  # an RGBA layer
        # Text enters where objects are still visible: at 8 cells a view (and 4), not at the coarsest level alone.
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 64, 128),
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=4,  # in truth the number of heads (diffusers keeps the misnomer)
        norm_num_groups=16,
        # ... and as one vector that scales every block's channels (FiLM), as SDXL's pooled text does. With this, and early frames
        # drawn more often, the painter was after 900 steps where attention alone brought it in 1,800.
        class_embed_type="projection",
        projection_class_embeddings_input_dim=width,
        resnet_time_scale_shift="scale_shift",
    )
    controlnet = ControlNetModel.from_unet(
        unet, conditioning_channels=3 * PATCH**2, conditioning_embedding_out_channels=(48,)
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        prediction_type="sample",
    )
    return dict(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        unet=unet,
        controlnet=controlnet,
        scheduler=scheduler,
    )


def train_tokenizer(sentences):
    """CLIP's tokenizer with a vocabulary of our own: every byte, and the words of the instructions merged from them.

    Byte-pair encoding by the textbook: the most frequent pair of neighbours becomes one piece, until every word is one. (The
    `tokenizers` package's trainer breaks ties by chance, and a resumed training would read other numbers for the same words.)
    """
    counts = Counter(
        word for sentence in sentences for word in re.findall("[a-z]+", sentence.lower())
    )
    words, merges = {word: [*word[:-1], word[-1] + "</w>"] for word in sorted(counts)}, []
    while True:
        pairs = Counter()
        for word, spelling in words.items():
            for pair in zip(spelling, spelling[1:]):
                pairs[pair] += counts[word]
        if not pairs:
            break
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        for spelling in words.values():
            for i in reversed(range(len(spelling) - 1)):
                if tuple(spelling[i : i + 2]) == merges[-1]:
                    spelling[i : i + 2] = ["".join(merges[-1])]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [byte + "</w>" for byte in alphabet] + ["".join(merge) for merge in merges]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, merges, model_max_length=TOKENS
    )


PARTS = dict(tokenizer=CLIPTokenizer, text_encoder=CLIPTextModel, vae=AutoencoderKL, unet=UNet2DConditionModel,
             scheduler=EulerDiscreteScheduler, controlnet=ControlNetModel)  # fmt: skip


def load_parts(folder, names):
    """Parts of a folder in diffusers' layout, or of a model of that name on the Hugging Face Hub, as float32."""
    parts = {}
    if not Path(folder).is_dir() and not isinstance(
        huggingface_hub.try_to_load_from_cache(str(folder), "model_index.json"), str
    ):
        try:
            huggingface_hub.HfApi().model_info(
                str(folder), timeout=10
            )  # asks once: what follows would try for minutes
        except Exception as error:
            raise UserError(
                f"{folder} is neither a folder here nor can it be fetched ({one_line(error)}): connect to the network once, or "
                "name a folder in SD-Turbo's layout (--base)."
            ) from error
    for name in names:
        weights = (
            {} if name in ("tokenizer", "scheduler") else {"use_safetensors": True}
        )  # no pickle from a stranger
        try:
            parts[name] = PARTS[name].from_pretrained(folder, subfolder=name, **weights)
        except Exception as error:
            raise UserError(
                f"{folder} has no whole {name}/ ({one_line(error)}): give one in SD-Turbo's layout."
            ) from error
    return parts


def one_line(error):
    return " ".join(str(error).split())[:120]


def load_turbo(base):
    """SD-Turbo's parts (or those of a folder in its layout), and a ControlNet that begins as a copy of its UNet's encoder."""
    parts = load_parts(base, ["tokenizer", "text_encoder", "vae", "unet", "scheduler"])
    width, given = (
        parts["unet"].config.cross_attention_dim,
        parts["text_encoder"].config.hidden_size,
    )
    if width != given:
        raise UserError(
            f"{base}: the UNet reads words of width {width}, the text encoder gives {given}: take both from one model."
        )
    return parts | {"controlnet": ControlNetModel.from_unet(parts["unet"])}


# ---------------------------------------------------------------------------------------------------------- network
class Painter(torch.nn.Module):
    """All parts as one network. config: size, objective, steps (of the scheduler at inference), image_size (of a view, pixels),
    picture (height and width of the four views tiled, as the networks see them), horizon, cameras, base (sd-turbo)."""

    def __init__(self, parts, config):
        super().__init__()
        self.config, self.horizon = config, config["horizon"]
        self.tokenizer, self.scheduler = parts["tokenizer"], parts["scheduler"]
        self.text_encoder, self.unet, self.controlnet = (
            parts["text_encoder"],
            parts["unet"],
            parts["controlnet"],
        )
        self.vae = parts.get("vae")  # none: tiny
        self.memory = {}  # prompt: what the frozen text encoder made of it
        if self.vae:
            self.requires_grad_(False)
            self.controlnet.requires_grad_(True)

    @classmethod
    def load(cls, folder, device="cpu", taesd=None, compile=False):
        """folder: a run's controlnet/, or a name on the Hugging Face Hub. For sd-turbo, taesd is the folder or name of a tiny
        autoencoder that decodes faster (madebyollin/taesd), and compile has PyTorch write kernels for this GPU (a minute)."""
        folder = Path(folder)
        if not folder.is_dir() and len(folder.parts) == 2:
            try:
                folder = Path(huggingface_hub.snapshot_download(str(folder)))
            except Exception as error:
                raise UserError(
                    f"{folder} is no folder here, and the Hugging Face Hub gives none of that name ({one_line(error)})."
                ) from error
        if not (folder / "painter.json").exists():
            raise UserError(
                f"{folder} holds no painter: train one first (python train_controlnet.py)."
            )
        config = json.loads((folder / "painter.json").read_text())
        if config["size"] == "tiny":
            return (
                cls(load_parts(folder, [name for name in PARTS if name != "vae"]), config)
                .to(device)
                .eval()
            )
        parts = load_parts(
            config["base"], ["tokenizer", "text_encoder", "vae", "unet", "scheduler"]
        ) | load_parts(folder, ["controlnet"])
        if taesd:
            try:
                parts["vae"] = AutoencoderTiny.from_pretrained(taesd, use_safetensors=True)
            except Exception as error:
                raise UserError(
                    f"{taesd} is no tiny autoencoder, nor can it be fetched ({one_line(error)})."
                ) from error
        painter = cls(parts, config).to(device).eval()
        if torch.device(device).type == "cuda":
            painter.to(dtype=torch.bfloat16, memory_format=torch.channels_last)
        if compile:
            for part in (painter.unet, painter.controlnet, painter.vae.decoder):
                part.compile()
        return painter

    def save(self, folder):
        """Writes what was trained and what cannot be had elsewhere, file by file, each whole."""
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as new:
            new = Path(new)
            for name in self.saved:
                getattr(self, name).save_pretrained(new / name)
            (new / "painter.json").write_text(json.dumps(self.config, indent=1))
            for file in [file for file in new.rglob("*") if file.is_file()]:
                target = folder / file.relative_to(new)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)

    @property
    def saved(self):
        return (
            ["controlnet"]
            if self.vae
            else ["tokenizer", "text_encoder", "unet", "controlnet", "scheduler"]
        )

    def read(self, prompts):
        """B prompts -> words (B, L, E), and (B, E) of each sentence as a whole, for tiny. A frozen text encoder reads a prompt once."""
        device, texts = (
            self.unet.device,
            sorted(set(prompts) - set(self.memory)) if self.vae else prompts,
        )
        if texts:
            tokens = self.tokenizer(
                texts,
                padding="max_length",
                max_length=self.tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            with torch.set_grad_enabled(self.vae is None and torch.is_grad_enabled()):
                text = self.text_encoder(tokens.input_ids.to(device))
            if self.vae is None:
                return text.last_hidden_state, text.pooler_output  # (B, 32, 64), (B, 64)
            self.memory.update(zip(texts, text.last_hidden_state.cpu()))
        return torch.stack([self.memory[prompt] for prompt in prompts]).to(
            device, self.unet.dtype
        ), None  # (B, 77, 1024)

    def encode(self, picture):
        """Picture (B, 3, H, W) in 0..1 -> latent: tiny (B, 48, H/4, W/4), sd-turbo (B, 4, H/8, W/8)."""
        if self.vae is None:
            return F.pixel_unshuffle(2 * picture - 1, PATCH)
        with torch.no_grad():  # the mean, not a sample: the same picture is the same latent
            return (
                self.vae.encode((2 * picture - 1).to(self.vae.dtype)).latent_dist.mode()
                * self.vae.config.scaling_factor
            )

    def decode(self, latent):
        """The inverse of `encode`."""
        if self.vae is None:
            return (F.pixel_shuffle(latent, PATCH) / 2 + 0.5).clamp(0, 1)
        picture = self.vae.decode(latent.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
        return (picture.float() / 2 + 0.5).clamp(0, 1)

    def forward(self, condition, prompts, latent=None, timestep=TIMESTEP):
        """What the UNet, steered by the ControlNet, makes of a noisy latent (none: of the condition's own).

        condition (B, 3, H, W) in 0..1: the views, tiled. Returns the noise in the latent, in its shape; for tiny the logits of
        the layer over the condition (B, 4, H, W): red, green, blue, alpha.
        """
        words, sentence = self.read(prompts)
        # SD's ControlNet has a small convolutional network for pixels; tiny's looks at patches
        hint = condition.to(self.unet.dtype) if self.vae else self.encode(condition)
        latent = hint if latent is None else latent.to(self.unet.dtype)
        down, middle = self.controlnet(
            latent, timestep, words, class_labels=sentence, controlnet_cond=hint, return_dict=False
        )
        output = self.unet(
            latent, timestep, words, class_labels=sentence,
            down_block_additional_residuals=down, mid_block_additional_residual=middle,
        ).sample  # fmt: skip
        return output if self.vae else F.pixel_shuffle(output, PATCH)

    @torch.no_grad()
    def paint_tiles(self, condition, prompts, seed=0):
        """The views (B, 3, H, W) in 0..1, tiled, and B prompts -> the same picture with spheres. Same seed, same picture."""
        if self.vae is None and self.config["objective"] == "one-step":
            return composite(self(condition, prompts).sigmoid(), condition)
        self.scheduler.set_timesteps(self.config["steps"], device=condition.device)
        scale = PATCH if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)
        shape = (
            1,
            self.unet.config.in_channels,
            condition.shape[2] // scale,
            condition.shape[3] // scale,
        )
        noise = torch.randn(
            shape, generator=torch.Generator().manual_seed(seed)
        )  # on the CPU: the same on every device
        latent = (
            noise.to(condition.device).expand(len(condition), -1, -1, -1)
            * self.scheduler.init_noise_sigma
        )
        for t in (
            self.scheduler.timesteps
        ):  # Euler's steps along the ODE from noise to picture; with one, straight to its end
            predicted = self(condition, prompts, self.scheduler.scale_model_input(latent, t), t)
            if self.vae is None:  # the layer gives the picture without its noise
                predicted = self.encode(composite(predicted.sigmoid(), condition))
            latent = self.scheduler.step(predicted.float(), t, latent).prev_sample
        return self.decode(latent)

    def paint(self, images, instructions):
        """Views {camera: (B, H, W, 3) uint8} and B instructions -> the painted views, likewise."""
        views = torch.from_numpy(
            np.stack([images[camera] for camera in CAMERAS], axis=1)
        )  # (B, 4, H, W, 3)
        picture = tile(views.permute(0, 1, 4, 2, 3).to(self.unet.device).float() / 255)
        if picture.shape[-1] != 2 * self.config["image_size"]:
            raise UserError(
                f"The painter was trained on views of {self.config['image_size']} pixels, these have {picture.shape[-1] // 2}: "
                "render the observations in that size."
            )
        prompts = [PROMPT.format(instruction) for instruction in instructions]
        painted = resize(
            self.paint_tiles(resize(picture, self.config["picture"]), prompts), picture.shape[-1]
        )
        painted = untile(painted).permute(0, 1, 3, 4, 2)  # (B, 4, H, W, 3)
        painted = (255 * painted).round().to(torch.uint8).cpu().numpy()
        return {camera: painted[:, i] for i, camera in enumerate(CAMERAS)}


def resize(pictures, size):
    """(B, C, H, W) -> (B, C, size, size)."""
    if pictures.shape[-1] == size:
        return pictures
    return F.interpolate(pictures, (size, size), mode="bilinear", antialias=True).clamp(0, 1)
