"""A folder in SD-Turbo's exact layout, with random weights: of its true size, or small."""

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

from genima.tokenizer import train_tokenizer

SENTENCES = ["tiled perspectives of a robot arm executing 'push the blue button'"]
# SD 2.1-base, from which SD-Turbo was distilled: about 1.3 G parameters
TRUE = dict(
    channels=(320, 640, 1280, 1280),
    heads=(5, 10, 20, 20),
    width=1024,
    text_layers=23,
    text_heads=16,
    vae=(128, 256, 512, 512),
    layers=2,
    groups=32,
)
SMALL = dict(
    channels=(8, 16, 16, 16),
    heads=(1, 2, 2, 2),
    width=16,
    text_layers=2,
    text_heads=2,
    vae=(4, 4, 4, 4),
    layers=1,
    groups=4,
)


def make_turbo(folder, size=SMALL, seed=0):
    """Write the folder: tokenizer/ text_encoder/ vae/ unet/ scheduler/ model_index.json."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(SENTENCES)
    tokenizer.model_max_length = 77
    text_config = CLIPTextConfig(
        vocab_size=49408 if size is TRUE else len(tokenizer),
        hidden_size=size["width"],
        intermediate_size=4 * size["width"],
        num_hidden_layers=size["text_layers"],
        num_attention_heads=size["text_heads"],
        max_position_embeddings=77,
        hidden_act="gelu",
        projection_dim=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text_encoder = CLIPTextModel(text_config)
    unet = UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        block_out_channels=size["channels"],
        layers_per_block=size["layers"],
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=size["width"],
        attention_head_dim=size["heads"],
        use_linear_projection=True,
        norm_num_groups=size["groups"],
    )
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=size["vae"],
        layers_per_block=size["layers"],
        sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=size["groups"],
        scaling_factor=0.18215,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        steps_offset=1,
        prediction_type="epsilon",
    )
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder)
    return folder
