"""The tokenizer of the tiny painter: CLIP's, with a vocabulary of the instructions alone.

Byte-pair encoding by the textbook (Sennrich et al. 2016): every word is spelled out, and the most
frequent pair of neighbours becomes one piece, again and again, until each word is one piece. The
256 bytes stay in the vocabulary, so that any sentence can be tokenized.

The `tokenizers` package trains faster, but breaks ties by chance: a resumed training would read
other numbers for the same words.
"""

import re
from collections import Counter

import torch
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

MAX_TOKENS = 32  # the longest prompt; to CLIP's 77 the rest would be padding


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    """B prompts -> token ids (B, L), each padded or cut to the length the text encoder reads."""
    tokens = tokenizer(
        prompts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return tokens.input_ids


def unknown_words(tokenizer: CLIPTokenizer, sentences: list[str]) -> list[str]:
    """The words of the sentences that the tokenizer's training did not have: more than one token.

    Numbers are not among them: digits are always bytes.
    """
    words = set()
    for sentence in sentences:
        words.update(re.findall(r"[^\W\d_]+", sentence.lower()))
    return sorted(word for word in words if len(tokenizer.tokenize(word)) > 1)


def train_tokenizer(sentences: list[str]) -> CLIPTokenizer:
    """A tokenizer for which every word of the sentences is one token, whatever their order."""
    word_counts = Counter()
    for sentence in sentences:
        word_counts.update(re.findall("[a-z]+", sentence.lower()))
    spellings = {}
    for word in sorted(word_counts):
        spellings[word] = [*word[:-1], word[-1] + "</w>"]  # CLIP marks the end of a word

    merges = []
    while True:
        pair_counts = count_pairs(spellings, word_counts)
        if not pair_counts:
            break
        pair = max(pair_counts, key=lambda pair: (pair_counts[pair], pair))
        merges.append(pair)
        for spelling in spellings.values():
            merge_pair(spelling, pair)

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [byte + "</w>" for byte in alphabet]
    pieces += ["".join(pair) for pair in merges]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    unique_pieces = dict.fromkeys(pieces)
    vocabulary = {piece: i for i, piece in enumerate(unique_pieces)}
    return CLIPTokenizer(vocabulary, merges, model_max_length=MAX_TOKENS)


def count_pairs(spellings: dict[str, list[str]], word_counts: Counter) -> Counter:
    """How often each pair of neighbouring pieces occurs in all words."""
    pair_counts = Counter()
    for word, spelling in spellings.items():
        for pair in zip(spelling, spelling[1:]):
            pair_counts[pair] += word_counts[word]
    return pair_counts


def merge_pair(spelling: list[str], pair: tuple[str, str]):
    """Replace each occurrence of the pair by one piece, in place."""
    for i in reversed(range(len(spelling) - 1)):
        if tuple(spelling[i : i + 2]) == pair:
            spelling[i : i + 2] = ["".join(pair)]
