"""NumPy's arrays out of a pickle that may be hostile (sims/rlbench_pickle.py).

An array is built as NumPy itself pickles one, from a type without fields, a shape, and exactly as
many bytes as the two need. Below are all functions that such a pickle may name.
"""

import math
import re

import numpy as np

MOST_DIMENSIONS = 8


class PickleError(Exception):
    """What is wrong with a pickle, without its name."""


def shorten(text):
    """A piece of an unknown file for a message: one line, printable anywhere, not long."""
    text = " ".join(str(text).split())
    return text.encode("ascii", "replace").decode()[:100]


class ArrayType:
    """An array's type: NumPy's code of it, such as f8, and the order of its bytes."""

    def __init__(self, code):
        if not re.fullmatch(r"b1|[iu][1248]|f[248]|[SU][1-9]\d{0,8}|O8", code):
            raise PickleError(f"an array of type {shorten(repr(code))}")
        self.code = code
        self.order = "="

    def set_state(self, state):
        _, order, *details = state
        names_and_fields = details[:3]
        if order not in ("<", ">", "=", "|") or names_and_fields != [None, None, None]:
            raise PickleError("an array with fields")
        self.order = order


class Array:
    """A place for an array, filled by the pickle's next instruction."""

    def __init__(self):
        self.content = None

    def set_state(self, state):
        _, shape, array_type, is_fortran, content = state
        order = "F" if is_fortran else "C"
        self.content = build_array(content, array_type, shape, order)


# ---------------------------------------------------------------------------------------- arrays
def build_array(content, array_type, shape, order):
    """An array (shape) of this type from its bytes, in this machine's byte order."""
    if type(array_type) is not ArrayType or order not in ("C", "F"):
        raise PickleError("an array that NumPy did not write")
    if type(shape) is not tuple or len(shape) > MOST_DIMENSIONS:
        raise PickleError("an array without a shape")
    for length in shape:
        if type(length) is not int or length < 0:
            raise PickleError("an array of negative length")
    if array_type.code == "O8":
        return build_numbers(content, shape)
    if type(content) not in (bytes, bytearray):
        raise PickleError("an array without bytes")
    content = bytes(content)
    dtype = np.dtype(array_type.order + array_type.code)
    if math.prod(shape) * dtype.itemsize != len(content):
        raise PickleError(f"an array whose bytes are not there ({len(content)} for {shape})")
    if dtype.kind == "U":  # not every number is a character
        content.decode("utf-32-be" if dtype.str[0] == ">" else "utf-32-le")
    if dtype.kind == "b":  # a byte that is neither 0 nor 1 confuses NumPy
        numbers = np.ndarray(shape, np.uint8, content, order=order)
        return numbers != 0
    array = np.ndarray(shape, dtype, content, order=order)
    return array.astype(dtype.newbyteorder("="))


def build_numbers(content, shape):
    """An array of Python's objects as floats (shape): RLBench writes [None, gripper] at times."""
    if type(content) is not list or math.prod(shape) != len(content):
        raise PickleError("an array of objects")
    numbers = []
    for item in content:
        if item is not None and type(item) not in (bool, int, float):
            raise PickleError("an array of objects")
        numbers.append(np.nan if item is None else float(item))
    return np.array(numbers).reshape(shape)


# ------------------------------------------------------------- the functions a pickle may name
def reconstruct(kind, shape, code):
    if kind != "numpy.ndarray" or shape != (0,):
        raise PickleError("an array that NumPy did not write")
    return Array()


def from_buffer(content, array_type, shape, order):
    array = Array()
    array.content = build_array(content, array_type, shape, order)
    return array


def scalar(array_type, content):
    return build_array(content, array_type, (), "C").item()


def encode(text, encoding):
    """Protocol 2 writes bytes as text."""
    if type(text) is not str or encoding != "latin1":
        raise PickleError("text in an unknown encoding")
    return text.encode("latin1")


def no_bytes():
    """Protocol 2 writes bytes of length 0 as a call."""
    return b""


def array_type(code, align, copy):
    return ArrayType(code)


FUNCTIONS = {
    "numpy.core.multiarray._reconstruct": reconstruct,
    "numpy.core.numeric._frombuffer": from_buffer,
    "numpy.core.multiarray.scalar": scalar,
    "numpy.dtype": array_type,
    "_codecs.encode": encode,
    "builtins.bytes": no_bytes,
}
