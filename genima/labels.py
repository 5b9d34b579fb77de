"""What a recording says in words, whichever file it comes from: instruction, success, joints."""

from __future__ import annotations

import json
import re
from contextlib import suppress

import h5py
import numpy as np

from genima.files import UserError, shorten
from genima.mapping import split_columns

YES = ("true", "yes", "y", "success", "successful", "succeeded", "ok", "pass", "passed", "done")
NO = ("false", "no", "n", "failure", "failed", "fail")
NO_LABEL = ("", "nan", "none", "null")
UR_JOINTS = ("shoulder_pan", "shoulder_lift", "elbow", "wrist_1", "wrist_2", "wrist_3")
UR_PENDANT = ("base", "shoulder", "elbow", "wrist_1", "wrist_2", "wrist_3")


def text(value) -> str:
    """A string from an attribute or dataset, whatever HDF5 made of it."""
    if isinstance(value, h5py.Dataset):
        value = value[()]
    if isinstance(value, np.ndarray):
        value = value.reshape(-1)[0] if value.size else ""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    value = "" if value is None else str(value)
    printed = re.fullmatch(r"""b(['"])(.*)\1""", value)  # bytes that Python made a text of
    return printed[2] if printed else value


def flatten(values) -> list:
    """The values of an attribute, a dataset or nested lists, one after the other."""
    if isinstance(values, h5py.Dataset):
        values = values[()]
    return list(np.asarray(values, object).reshape(-1))


# ---------------------------------------------------------------------------- label of success
def flag(values, where: str) -> bool | None:
    """True or False from labels, None where there is none. Raises UserError for other words.

    Of a label in each frame one that is true is enough, as in a LeRobot dataset.
    """
    if values is None:
        return None
    labels = [read_label(value, where) for value in flatten(values)]
    labels = [label for label in labels if label is not None]
    return any(labels) if labels else None


def read_label(value, where: str) -> bool | None:
    """One label; None for an empty one and for NaN. Between 0 and 1 there is no threshold."""
    word = text(value).strip().lower()
    if word in NO_LABEL:
        return None
    if word in YES or is_number(word, 1):
        return True
    if word in NO or is_number(word, 0):
        return False
    raise UserError(
        f"{where} holds '{shorten(word)}', which is neither 1 nor {', '.join(YES)}, neither 0 nor "
        f"{', '.join(NO)}: name another label in the mapping, or null for none."
    )


def is_number(word: str, number: int) -> bool:
    try:
        return float(word) == number
    except ValueError:
        return False


# --------------------------------------------------------------------------------- instruction
def read_instruction(values, where: str, frames: int, notes: list[str]) -> str:
    """An instruction, which may be repeated in each frame. Raises UserError where it changes.

    Of several ways to say it the first is taken, and a note says so.
    """
    if values is None:
        return ""
    sentences = [text(value) for value in flatten(values)]
    different = list(dict.fromkeys(sentences))
    if len(different) == 1:
        different = ways_to_say_it(different[0], where)
    elif len(different) < len(sentences) or len(sentences) == frames:
        frame = next(t for t, other in enumerate(sentences) if other != sentences[0])
        change = f"'{shorten(different[0])}' becomes '{shorten(different[1])}' at frame {frame}"
        raise UserError(
            f"{where}: {change}: cut it into one file for each, or give --instruction for all of "
            "it."
        )
    if len(different) > 1:
        notes.append(
            f"{len(different)} ways to say it are recorded: '{shorten(different[0])}' is taken; "
            "else give --instruction."
        )
    return different[0] if different else ""


def ways_to_say_it(sentence: str, where: str) -> list[str]:
    """The sentences of a JSON list; any other text is one. Raises UserError for other JSON.

    LIBERO writes {"language_instruction": "...", ...}.
    """
    sentence = sentence.strip()
    if not sentence.startswith(("[", "{")):
        return [sentence]
    try:
        content = json.loads(sentence)
    except (ValueError, RecursionError):
        return [sentence]
    if isinstance(content, dict) and isinstance(content.get("language_instruction"), str):
        return [content["language_instruction"]]
    if isinstance(content, list) and content and all(isinstance(way, str) for way in content):
        return content
    raise UserError(
        f"{where} holds {shorten(sentence)}, which is no list of sentences: give --instruction."
    )


# ------------------------------------------------------------------------------- joints' names
def check_order(values, joints: str, count: int, where: str):
    """Raise a UserError where recorded names say that the joints are not in the arm's order.

    values: a name for each of the `count` joints, or for each column of the dataset; joints: what
    the mapping names, such as "q[0:6]". ROS gives a UR's joints by the alphabet: elbow first. Names
    of other arms that have no number tell nothing, nor do YuMi's, whose joint 7 is the third.
    """
    dataset, columns = split_columns(joints)
    names = names_of(values)
    numbers = np.arange(len(names))
    with suppress(IndexError):
        picked = numbers if columns is None else np.atleast_1d(numbers[columns])
        numbers = picked if len(picked) == count else numbers
    if len(numbers) > count:
        is_hand = [re.search("grip|finger|hand", names[number].lower()) for number in numbers]
        numbers = numbers[[not found for found in is_hand]]
    chosen = [names[number] for number in numbers]
    places = places_of(chosen)
    if len(chosen) != count or places is None or "yumi" in chosen[0].lower():
        return
    order = np.argsort(places)
    if (order != np.arange(count)).any():
        columns = ",".join(str(number) for number in numbers[order])
        raise UserError(
            f"{where} has its joints in the order {', '.join(chosen[:3])}, ...: name them from the "
            f"base on in the mapping, {dataset}[{columns}], and the action's likewise."
        )


def names_of(values) -> list[str]:
    """Names from a list, a row for each frame, LeRobot's dict, or one text that lists them."""
    if isinstance(values, dict):  # {"motors": [...]}, or {name: column}
        first = next(iter(values.values()), [])
        values = list(values) if isinstance(first, int) else first
    if isinstance(values, h5py.Dataset):
        values = values[()]
    if np.ndim(values) > 1:
        values = values[0]
    names = [text(value) for value in flatten(values)]
    if len(names) != 1:
        return names
    with suppress(ValueError):
        content = json.loads(names[0])
        if isinstance(content, list):
            return [str(name) for name in content]
    return re.split(r"[,;\s]+", names[0].strip())


def places_of(names: list[str]) -> list[int] | None:
    """Which joint from the base each name means: fr3_joint2 -> 2; None: they do not say."""
    separated = [re.sub(r"(?<=[a-z])(?=[A-Z0-9])|[\s.-]+", "_", name).lower() for name in names]
    for words in (UR_JOINTS, UR_PENDANT):
        found = [[place for place, word in enumerate(words) if word in name] for name in separated]
        if all(len(places) == 1 for places in found):
            places = [place for (place,) in found]
            if len(set(places)) == len(places):
                return places
    numbers = [[int(digits) for digits in re.findall(r"\d+", name)] for name in names]
    if not names or len({len(row) for row in numbers}) != 1:
        return None
    for column in zip(*numbers):
        if len(set(column)) == len(column):
            return list(column)
    return None
