"""The parts of the tiny painter: SD-Turbo's, built small and not trained yet.

About 7 M parameters in place of 1.3 G, for pictures of 128x128 pixels on a laptop. Each part is of
the class that StableDiffusionControlNetPipeline takes; an autoencoder is not needed, for a latent
is a patch of pixels.
"""

from diffusers import ControlNetModel, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from genima.tokenizer import train_tokenizer

PATCH = 4  # pixels a side of one latent; 8 gave blurred blobs
WIDTH = 64  # of the text encoder, and of the cross-attention


def build_tiny(prompts: list[str], resolution: int) -> dict:
    """{part: network}, with random weights. prompts: each of their words becomes one token."""
    tokenizer = train_tokenizer(prompts)
    text_encoder = build_text_encoder(tokenizer)
    unet = build_unet(resolution)
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


def build_text_encoder(tokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet(resolution: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=resolution // PATCH,
        in_channels=3 * PATCH**2,
        out_channels=4 * PATCH**2,  # an RGBA layer
        # Text enters where objects are still visible: at 8 and at 4 cells a view.
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 64, 128),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # in truth the number of heads (diffusers keeps the misnomer)
        norm_num_groups=16,
        # It enters also as one vector that scales every block's channels (FiLM), as SDXL's pooled
        # text does. With this, and early frames drawn more often, the painter was after 900 steps
        # where attention alone brought it in 1,800.
        class_embed_type="projection",
        projection_class_embeddings_input_dim=WIDTH,
        resnet_time_scale_shift="scale_shift",
    )
