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

from genima.files import UserError

MAX_TOKENS = 32  # of a prompt, where the data has none that is longer
CLIP_TOKENS = 77  # the longest prompt that any painter reads
COUNTED = 10_000  # tokens of a prompt, at most


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    """B prompts -> token ids (B, L), each padded to the length that the text encoder reads.

    Raises UserError for a prompt that is longer.
    """
    longest = tokenizer.model_max_length
    tokens = tokenizer(
        prompts,
        padding="max_length",
        max_length=longest + 1,  # one more shows which prompts are too long
        truncation=True,
        return_tensors="pt",
    )
    for prompt, too_long in zip(prompts, tokens.attention_mask[:, -1]):
        if too_long:
            check_length(prompt, count_tokens(tokenizer, prompt), longest)
    return tokens.input_ids[:, :-1]


def count_tokens(tokenizer: CLIPTokenizer, prompt: str) -> int:
    """The length of a prompt, with its start and its end."""
    return len(tokenizer(prompt, truncation=True, max_length=COUNTED).input_ids)


def check_length(prompt: str, tokens: int, longest: int):
    """Raise a UserError for a prompt that a text encoder cannot read to its end."""
    if tokens > longest:
        raise UserError(
            f'The prompt "{prompt}" has {tokens} tokens, and the painter reads at most {longest}: '
            "say it in fewer words."
        )


def unknown_words(tokenizer: CLIPTokenizer, sentences: list[str]) -> list[str]:
    """The words of the sentences that the tokenizer's training did not have: more than one token.

    Numbers are not among them: digits are always bytes.
    """
    words = set()
    for sentence in sentences:
        words.update(re.findall(r"[^\W\d_]+", sentence.lower()))
    return sorted(word for word in words if len(tokenizer.tokenize(word)) > 1)


def train_tokenizer(sentences: list[str]) -> CLIPTokenizer:
    """A tokenizer for which every word of the sentences is one token, whatever their order.

    It reads as many tokens as the longest sentence has, at least MAX_TOKENS. Raises UserError for a
    sentence of more than CLIP_TOKENS.
    """
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
    tokenizer = CLIPTokenizer(vocabulary, merges, model_max_length=MAX_TOKENS)
    for sentence in sentences:
        length = count_tokens(tokenizer, sentence)
        check_length(sentence, length, CLIP_TOKENS)
        tokenizer.model_max_length = max(tokenizer.model_max_length, length)
    return tokenizer


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
