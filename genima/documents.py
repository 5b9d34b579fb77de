"""JSON and YAML files, read so that whatever is in them ends in data or in one sentence.

    read_json(path), read_yaml(path)         the content
    explain(path, advice)                    what a reader stumbles over, as a UserError

A few lines of YAML can stand for billions (names for parts that hold names for parts), and a file
may nest deeper than Python can follow, have no end, or hold no text at all. Such files are refused.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from genima.files import UserError, shorten

MAX_SIZE = 20_000_000  # bytes of a file; a long vocabulary has a few thousand
MAX_VALUES = 1_000_000  # values in a file, each counted as often as it is used
REFUSED = (ValueError, TypeError, RecursionError, yaml.YAMLError)


class PlainLoader(yaml.SafeLoader):
    """YAML with keys as they are written: the serial number 017322 is no octal number.

    Merge keys (<<), whose result can be larger than its parts, are refused.
    """

    def construct_mapping(self, node, deep=False):
        if isinstance(node, yaml.MappingNode):
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:merge":
                    raise yaml.YAMLError("merge keys (<<) are not read: write the lines out")
            keys = [(self.as_text(key), value) for key, value in node.value]
            node = yaml.MappingNode(node.tag, keys, node.start_mark, node.end_mark)
        return super().construct_mapping(node, deep)

    def as_text(self, key):
        if not isinstance(key, yaml.ScalarNode):
            return key
        return yaml.ScalarNode("tag:yaml.org,2002:str", key.value, key.start_mark, key.end_mark)


def read_json(path: Path | str):
    """The content of a JSON file. Raises UserError for one that is missing or broken."""
    return parse(path, "no JSON", json.loads)


def read_yaml(path: Path | str):
    """The content of a YAML or JSON file. Raises UserError for one that is missing or broken."""
    return parse(path, "neither JSON nor YAML", load_yaml)


def load_yaml(text: str):
    """YAML reads JSON, too, but not with tabs in it. A last --- may be there, as ROS prints it."""
    try:
        return json.loads(text)
    except ValueError:
        documents = list(yaml.load_all(text, PlainLoader))
    while documents and documents[-1] is None:
        documents.pop()
    if len(documents) > 1:
        raise ValueError(f"it holds {len(documents)} documents with --- between them, not one")
    return documents[0] if documents else None


def parse(path: Path | str, language: str, load):
    try:
        content = load(read_text(path))
        check_count(content)
    except REFUSED as error:
        raise UserError(
            f"{path} is {language} that can be read ({shorten(str(error))}): mend it, or copy "
            "it again from where it was made."
        ) from error
    return content


def read_text(path: Path | str) -> str:
    """A file's text. Raises UserError for a file without end, and for what is no file."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_SIZE + 1)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {os.strerror(error.errno)}; check this path."
        ) from error
    if len(content) > MAX_SIZE:
        raise UserError(
            f"{path} has more than {MAX_SIZE // 1_000_000} MB, which is too much: check this path."
        )
    return content.decode("utf-8-sig")  # an editor of Windows puts a mark at the beginning


def check_count(content):
    """Raise a ValueError for more than MAX_VALUES values, or for one that holds itself."""
    waiting = [content]
    count = 0
    while waiting:
        value = waiting.pop()
        count += 1
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        if count + len(waiting) > MAX_VALUES:
            raise ValueError(f"it stands for more than {MAX_VALUES:,} values")


@contextmanager
def explain(path: Path | str, advice: str) -> Iterator[None]:
    """In the block somebody's file is understood: what fails there becomes a UserError.

    advice: what to do about it, after a colon.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if getattr(error, "filename", None):  # the system says what it is about
            raise
        words = shorten(f"{type(error).__name__}: {error}")
        raise UserError(f"{path} cannot be understood ({words}): {advice}.") from error
