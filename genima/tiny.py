"""The parts of the tiny and the small painter: SD-Turbo's, built small and not trained yet.

    size      parameters    tiled views                     made for
    tiny           7 M      128x128 (four of 64x64)         a laptop
    small         71 M      256x256 (four of 128x128)       one consumer GPU
    sd-turbo     1.3 G      512x512 (four of 256x256)       a large GPU; not built here

Each part is of the class that StableDiffusionControlNetPipeline takes; an autoencoder is not
needed, for a latent is a patch of pixels.
"""

from diffusers import ControlNetModel, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from genima.tokenizer import train_tokenizer

PATCH = 4  # pixels a side of one latent; 8 gave blurred blobs
LAYOUTS = {
    "tiny": {
        "channels": (48, 64, 128),  # of the UNet; each level has half the resolution
        "heads": 4,
        "text_width": 64,  # of the text encoder, and of the cross-attention
        "text_layers": 2,
    },
    # One level more: at the last, as in tiny, a view has 4x4 cells.
    "small": {
        "channels": (96, 128, 256, 384),
        "heads": 8,
        "text_width": 256,
        "text_layers": 4,
    },
}


def pixel_unit(size: str) -> int:
    """What height and width of the tiled views must be a multiple of."""
    halvings = len(LAYOUTS[size]["channels"]) - 1
    return PATCH * 2**halvings


def build_parts(size: str, prompts: list[str], resolution: int) -> dict:
    """{part: network}, with random weights. prompts: each of their words becomes one token."""
    layout = LAYOUTS[size]
    tokenizer = train_tokenizer(prompts)
    text_encoder = build_text_encoder(layout, tokenizer)
    unet = build_unet(layout, resolution)
    controlnet = ControlNetModel.from_unet(
        unet,
        conditioning_channels=3 * PATCH**2,
        conditioning_embedding_out_channels=(48,),
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,  # SD-Turbo's noise
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        prediction_type="sample",
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "unet": unet,
        "controlnet": controlnet,
        "scheduler": scheduler,
    }


def build_text_encoder(layout: dict, tokenizer) -> CLIPTextModel:
    width = layout["text_width"]
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layout["text_layers"],
        num_attention_heads=layout["heads"],
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet(layout: dict, resolution: int) -> UNet2DConditionModel:
    with_text = len(layout["channels"]) - 1  # levels
    return UNet2DConditionModel(
        sample_size=resolution // PATCH,
        in_channels=3 * PATCH**2,
        out_channels=4 * PATCH**2,  # an RGBA layer
        # Text enters where objects are still visible: at 8 and at 4 cells a view, for small at 16,
        # too. (With as many as 32, attention would take more time than all the rest.)
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * with_text,
        up_block_types=("CrossAttnUpBlock2D",) * with_text + ("UpBlock2D",),
        block_out_channels=layout["channels"],
        layers_per_block=1,
        cross_attention_dim=layout["text_width"],
        # In truth the number of heads (diffusers keeps the misnomer).
        attention_head_dim=layout["heads"],
        norm_num_groups=16,
        # It enters also as one vector that scales every block's channels (FiLM), as SDXL's pooled
        # text does. With this, and early frames drawn more often, the painter was after 900 steps
        # where attention alone brought it in 1,800.
        class_embed_type="projection",
        projection_class_embeddings_input_dim=layout["text_width"],
        resnet_time_scale_shift="scale_shift",
    )
