"""Where in the views does each word act? Two heat maps of a painter, a map for each word.

effect      the word is left out, and the painting changes: how much, at each pixel
attention   how much of the cross-attention of UNet and ControlNet falls on the word, at each cell

Attention is what is usually shown, and the weaker evidence: it says what a cell reads, not what it
makes of it. In the laptop's painter the words also scale every channel (genima/tiny.py), which no
attention shows.
"""

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F

from genima.painter import PROMPT
from genima.plots import two_columns
from genima.views import untile_views


def word_effect(painter, images: dict[str, np.ndarray], sentence: str) -> dict[str, dict]:
    """{camera: (H, W, 3) uint8} and a sentence -> {word: {camera: (H, W)}}, 0..255.

    A map is the mean change of the three colours when the painter is told the sentence without
    this word. Words are numbered where they occur twice. Raises UserError for what painters refuse.
    """
    words = sentence.split()
    sentences = [sentence]
    for i in range(len(words)):
        sentences.append(" ".join(words[:i] + words[i + 1 :]))
    batch = {}
    for camera, image in images.items():
        batch[camera] = np.repeat(image[None], len(sentences), axis=0)  # (1 + words, H, W, 3)
    painted = painter.paint(batch, sentences)
    maps = {}
    for i, name in enumerate(number_words(words)):
        maps[name] = {}
        for camera, pictures in painted.items():
            change = pictures[i + 1].astype(float) - pictures[0]
            maps[name][camera] = np.abs(change).mean(axis=-1)  # (H, W)
    return maps


@torch.no_grad()
def word_attention(painter, images: dict[str, np.ndarray], sentence: str) -> dict[str, dict]:
    """The same, for the attention: how many times as much as a token gets on average.

    It is the mean over heads, the layers of the finest grid, and the word's tokens.
    """
    kept = []

    def keep(layer, inputs, named, output):
        hidden_states = inputs[0]  # (1, cells, channels)
        encoder_hidden_states = named["encoder_hidden_states"]  # (1, L, E)
        query = layer.head_to_batch_dim(layer.to_q(hidden_states))
        key = layer.head_to_batch_dim(layer.to_k(encoder_hidden_states))
        scores = layer.get_attention_scores(query, key).float()  # (heads, cells, L)
        side = round(scores.shape[1] ** 0.5)
        kept.append(scores.mean(dim=0).T.reshape(-1, side, side))  # (L, side, side)

    hooks = []
    for network in (painter.unet, painter.controlnet):
        for name, layer in network.named_modules():
            if name.endswith("attn2"):  # diffusers' name for cross-attention
                hooks.append(layer.register_forward_hook(keep, with_kwargs=True))
    try:
        painter.paint({camera: image[None] for camera, image in images.items()}, [sentence])
    finally:
        for hook in hooks:
            hook.remove()

    finest = max(scores.shape[-1] for scores in kept)
    layers = [scores for scores in kept if scores.shape[-1] == finest]
    attention = torch.stack(layers).mean(dim=0)  # (L, side, side)
    attention = attention * len(attention)  # they sum to 1 over the L tokens
    tokens = tokens_of_words(painter.tokenizer, sentence)
    maps = {}
    for name, numbers in zip(number_words(sentence.split()), tokens):
        tiled = attention[numbers].mean(dim=0)[None, None]  # (1, 1, side, side)
        maps[name] = {}
        views = untile_views(tiled, len(images))[0, :, 0]  # (V, side / 2, side / 2)
        for view, (camera, image) in zip(views, images.items()):
            size = image.shape[:2]
            maps[name][camera] = F.interpolate(view[None, None], size)[0, 0].cpu().numpy()
    return maps


def draw_word_maps(images: dict[str, np.ndarray], maps: dict[str, dict]) -> dict[str, np.ndarray]:
    """Heat over the grey views: {word: (2 H, 2 W, 3) uint8}, on one scale for all words."""
    every = np.concatenate([heat.ravel() for views in maps.values() for heat in views.values()])
    least = every.min()
    span = max(every.max() - least, 1e-9)
    inferno = matplotlib.colormaps["inferno"]
    pictures = {}
    for word, views in maps.items():
        drawn = []
        for camera, heat in views.items():
            strength = (heat - least) / span  # (H, W), 0..1
            colour = 255 * inferno(strength)[..., :3]
            grey = 0.5 * images[camera].mean(axis=-1, keepdims=True)
            is_hot = strength[..., None] > 0.1
            drawn.append(np.where(is_hot, colour, grey).astype(np.uint8))
        pictures[word] = two_columns(drawn)
    return pictures


def tokens_of_words(tokenizer, sentence: str) -> list[list[int]]:
    """For each word of a sentence, which tokens of its prompt it became."""
    offsets = tokenizer(PROMPT.format(sentence), return_offsets_mapping=True)["offset_mapping"]
    place = PROMPT.index("{}")
    tokens = []
    for word in sentence.split():
        start = PROMPT.format(sentence).index(word, place)
        place = start + len(word)
        tokens.append([i for i, (low, high) in enumerate(offsets) if low < place and high > start])
    return tokens


def number_words(words: list[str]) -> list[str]:
    """Each word once: the second "the" is "the (2)"."""
    names = []
    for i, word in enumerate(words):
        before = words[:i].count(word)
        names.append(f"{word} ({before + 1})" if before else word)
    return names
