"""The painter: text model, UNet and ControlNet as one network. Trained by train_controlnet.py, used by evaluate.py."""

import json
import os
import re
import tempfile
from collections import Counter
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers import ControlNetModel, EulerDiscreteScheduler, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from episodes import CAMERAS, UserError

diffusers.utils.logging.disable_progress_bar()  # one bar, ours
transformers.utils.logging.disable_progress_bar()

PROMPT = "tiled perspectives of a robot arm executing '{}'"  # paper, appendix: the views and the instruction in one sentence
TIMESTEP = 999  # SD-Turbo's first and only step
PATCH = 4  # pixels a side that make up one latent; 8 gave blurred blobs
TOKENS = 32  # longest prompt; CLIP's 77 would be padding


def tile(views):
    """Views (B, 4, C, H, W) in the order of CAMERAS -> one picture (B, C, 2H, 2W): row 1 wrist, front; row 2 shoulders."""
    B, V, C, H, W = views.shape
    return views.reshape(B, 2, 2, C, H, W).permute(0, 3, 1, 4, 2, 5).reshape(B, C, 2 * H, 2 * W)


def untile(picture):
    """The inverse of `tile`."""
    B, C, H, W = picture.shape
    return picture.reshape(B, C, 2, H // 2, 2, W // 2).permute(0, 2, 4, 1, 3, 5).reshape(B, 4, C, H // 2, W // 2)


def build_tiny(instructions, image_size):
    """The parts of StableDiffusionControlNetPipeline, small and untrained: tokenizer, text model, UNet, ControlNet, scheduler."""
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
        out_channels=4 * PATCH**2,
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
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
    )
    return tokenizer, text_encoder, unet, controlnet, scheduler


def train_tokenizer(sentences):
    """CLIP's tokenizer with a vocabulary of our own: every byte, and the words of the instructions merged from them.

    Byte-pair encoding by the textbook: the most frequent pair of neighbours becomes one piece, until every word is one. (The
    `tokenizers` package's trainer breaks ties by chance, and a resumed training would read other numbers for the same words.)
    """
    counts = Counter(word for sentence in sentences for word in re.findall("[a-z]+", sentence.lower()))
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
    return CLIPTokenizer({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, merges, model_max_length=TOKENS)


class Painter(torch.nn.Module):
    """Text model, UNet and ControlNet as one network: pictures and prompts in, RGBA layers out, in one step."""

    def __init__(self, tokenizer, text_encoder, unet, controlnet, scheduler, config):
        super().__init__()
        self.config, self.horizon = config, config["horizon"]
        self.tokenizer, self.scheduler = tokenizer, scheduler
        self.text_encoder, self.unet, self.controlnet = text_encoder, unet, controlnet

    @classmethod
    def load(cls, folder, device="cpu"):
        folder = Path(folder)
        if not (folder / "painter.json").exists():
            raise UserError(f"{folder} holds no painter: train one first (python train_controlnet.py).")
        return cls(
            CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            CLIPTextModel.from_pretrained(folder / "text_encoder"),
            UNet2DConditionModel.from_pretrained(folder, subfolder="unet"),
            ControlNetModel.from_pretrained(folder, subfolder="controlnet"),
            EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler"),
            json.loads((folder / "painter.json").read_text()),
        ).to(device).eval()  # fmt: skip

    def save(self, folder):
        """Writes the parts file by file, each whole."""
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as new:
            new = Path(new)
            self.tokenizer.save_pretrained(new / "tokenizer")
            for name in ("text_encoder", "unet", "controlnet", "scheduler"):
                getattr(self, name).save_pretrained(new / name)
            (new / "painter.json").write_text(json.dumps(self.config, indent=1))
            for file in [file for file in new.rglob("*") if file.is_file()]:
                target = folder / file.relative_to(new)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)

    def forward(self, condition, prompts):
        """Condition (B, 3, 2H, 2W) in 0..1 -> the layer's logits (B, 4, 2H, 2W): red, green, blue, alpha."""
        tokens = self.tokenizer(prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        text = self.text_encoder(tokens.input_ids.to(condition.device))
        words, sentence = text.last_hidden_state, text.pooler_output  # (B, 32, 64), (B, 64)
        latent = F.pixel_unshuffle(2 * condition - 1, PATCH)  # (B, 48, 2H/4, 2W/4)
        down, middle = self.controlnet(
            latent, TIMESTEP, words, class_labels=sentence, controlnet_cond=latent, return_dict=False
        )
        layer = self.unet(
            latent, TIMESTEP, words, class_labels=sentence,
            down_block_additional_residuals=down, mid_block_additional_residual=middle,
        ).sample  # (B, 64, 2H/4, 2W/4)  # fmt: skip
        return F.pixel_shuffle(layer, PATCH)

    @torch.no_grad()
    def paint(self, images, instructions):
        """Views {camera: (B, H, W, 3) uint8} and B instructions -> the painted views, likewise."""
        views = torch.from_numpy(np.stack([images[camera] for camera in CAMERAS], axis=1))  # (B, 4, H, W, 3)
        picture = tile(views.permute(0, 1, 4, 2, 3).to(self.unet.device).float() / 255)
        if picture.shape[-1] != 2 * self.config["image_size"]:
            raise UserError(
                f"The painter was trained on views of {self.config['image_size']} pixels, these have {picture.shape[-1] // 2}: "
                "render the observations in that size."
            )
        layer = self(picture, [PROMPT.format(instruction) for instruction in instructions]).sigmoid()
        painted = untile(compose(layer, picture)).permute(0, 1, 3, 4, 2)  # (B, 4, H, W, 3)
        painted = (255 * painted).round().to(torch.uint8).cpu().numpy()
        return {camera: painted[:, i] for i, camera in enumerate(CAMERAS)}


def compose(layer, picture):
    """Layer (B, 4, H, W) over picture (B, 3, H, W), both 0..1."""
    colour, alpha = layer[:, :3], layer[:, 3:]
    return alpha * colour + (1 - alpha) * picture
