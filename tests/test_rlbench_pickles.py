"""Hostile pickles: refused in one sentence, nothing run, nothing large allocated, no crash."""

import pickle
import resource
import struct

import numpy as np
import pytest

from genima.files import UserError
from sims import rlbench_pickle
from sims.rlbench_pickle import load

RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
FROM_BUFFER = b"cnumpy.core.numeric\n_frombuffer\n"
SCALAR = b"cnumpy.core.multiarray\nscalar\n"


def dtype(code, order=b"<", fields=b"NNN"):
    """The instructions for an array's type."""
    code = b"cnumpy\ndtype\n\x8c" + bytes([len(code)]) + code + b"\x89\x88\x87R"
    state = b"(K\x03\x8c" + bytes([len(order)]) + order + fields
    return code + state + b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"


def number(value):
    content = value.to_bytes(16, "little", signed=True)
    return b"\x8a\x10" + content


def text(content):
    return b"C" + bytes([len(content)]) + content


def array(code=b"f8", shape=(2,), content=b"\0" * 16, **how):
    """An array as NumPy pickles it: _reconstruct and a state."""
    lengths = b"(" + b"".join(number(length) for length in shape) + b"t"
    state = b"(K\x01" + lengths + dtype(code, **how) + b"\x89" + text(content) + b"tb"
    return RECONSTRUCT + state


def frombuffer(code=b"f8", shape=(2,), content=b"\0" * 16):
    """An array as NumPy pickles it in protocol 5."""
    lengths = b"(" + b"".join(number(length) for length in shape) + b"t"
    return FROM_BUFFER + b"(" + text(content) + dtype(code) + lengths + b"\x8c\x01CtR"


def doubled(depth, kind):
    """A tuple or a list of itself twice, and so on: 2**depth items, of which few are written."""
    start = b"]\x94" if kind == "list" else b")\x94"
    content = start
    for i in range(depth):
        again = b"h" + bytes([i])
        content += b"](" + again + again + b"e\x94" if kind == "list" else again + b"\x86\x94"
    return content


FIELDS = b"N\x8c\x01a\x85}\x8c\x01a" + dtype(b"f8") + number(10**6) + b"\x86s"
HOSTILE = {
    "objects from raw bytes": array(b"O8", (1,), b"\x41" * 8),
    "objects from a buffer": frombuffer(b"O8", (1,), b"\x41" * 8),
    "an object from raw bytes": SCALAR + dtype(b"O8") + text(b"\x41" * 8) + b"\x86R",
    "objects as a list": array(b"O8", (1,))[:-20] + b"](cnumpy\nndarray\netb",
    "a field beyond the buffer": array(b"V8", (2,), fields=FIELDS),
    "a field in a number": array(b"f8", (2,), fields=FIELDS),
    "a subarray": array(b"f8", (2,), fields=dtype(b"f8") + number(99) + b"\x85\x86NN"),
    "a huge shape": array(b"f8", (10**11,)),
    "a huge shape in a buffer": frombuffer(b"f8", (10**11,)),
    "a shape that wraps": array(b"f8", (2**61, 8), b""),
    "a huge shape of nothing": array(b"S0", (10**11,), b""),
    "a negative length": array(b"f8", (-2,)),
    "two negative lengths": array(b"f8", (-1, -2)),
    "too few bytes": array(b"f8", (3,)),
    "too many bytes": array(b"f8", (1,)),
    "a number of too few bytes": SCALAR + dtype(b"f8") + text(b"\0") + b"\x86R",
    "a text that is none": array(b"U2", (2,), b"\xff" * 16),
    "an item of a gigabyte": array(b"S1000000000", (1,), b"x"),
    "a date": array(b"M8", (2,)),
    "an array of another class": RECONSTRUCT.replace(b"ndarray", b"dtype") + b".",
    "an array of some length": RECONSTRUCT.replace(b"K\x00\x85", b"K\x64\x85"),
    "an array without content": RECONSTRUCT,
    "an array filled with an array": RECONSTRUCT + b"(K\x01K\x02\x85" + array() + b"\x89C\x00tb",
    "items for an array": array() + b"K\x00K\x01s",
    "items for an array at the end": array() + b"(K\x01K\x02e",
    "a function in place of a value": b"cnumpy\nndarray\n",
    "a mark": b"(\x940h\x00",
    "a call of a value": b"K\x01)R",
    "an instance of a function": b"cnumpy\ndtype\n)\x81",
    "a call of a class": b"crlbench.demo\nDemo\n)R",
    "attributes of a function": b"cnumpy\ndtype\n}\x8c\x08__code__K\x01sb",
    "attributes of a class": b"crlbench.demo\nDemo\nN}\x8c\x05taintK\x01s\x86b",
    "a method by its dotted name": b"\x8c\x05numpy\x8c\x0endarray.tofile\x93",
    "a memo far away": b"Nr\xff\xff\xff\x7fj\xff\xff\xff\x6f",
    "a memo that is empty": b"h\x05",
    "a tuple without end": b"t",
    "an empty stack": b"0",
    "duplicates": b"N" + b"2" * 100,
    "a text of eight exabytes": b"\x8d" + struct.pack("<Q", 2**62) + b"x",
    "bytes of eight exabytes": b"\x8e" + struct.pack("<Q", 2**62) + b"x",
    "a bytearray of a terabyte": b"\x96" + struct.pack("<Q", 2**40) + b"x",
    "a number of too many digits": b"I" + b"9" * 10_000 + b"\n",
    "a tuple as a key": b"}" + b")" + b"\x85" * 100_000 + b"K\x01s",
    "twice and twice again as a key": b"}" + doubled(60, "tuple") + b"K\x01s",
    "nested too deep": b")" + b"\x85" * 100_000,
    "a persistent object": b"K\x01Q",
    "an extension": b"\x82\x01",
    "a buffer from elsewhere": b"\x97",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("place", ["alone", "inside"])
def test_a_hostile_pickle_is_one_sentence(tmp_path, name, place):
    content = HOSTILE[name]
    if place == "inside":
        content = b"](}\x8c\x04misc" + content + b"se"
    path = tmp_path / "file.pkl"
    path.write_bytes(b"\x80\x05" + content + b".")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="file.pkl") as caught:
        load(path)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 500 + len(str(path)) and sentence.isascii()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000, f"{grown} KiB"


def test_floods_are_refused_before_they_fill_the_memory(tmp_path, monkeypatch):
    assert rlbench_pickle.MOST_INSTRUCTIONS <= 3_000_000  # 60 bytes each, for empty lists
    monkeypatch.setattr(rlbench_pickle, "MOST_INSTRUCTIONS", 30_000)
    path = tmp_path / "file.pkl"
    for flood in (b"]" * 40_000, b"(" * 40_000, b"N" + b"\x94" * 40_000):
        path.write_bytes(b"\x80\x05" + flood + b".")
        with pytest.raises(UserError, match="file.pkl.*instructions"):
            load(path)
    with open(path, "wb") as file:
        file.truncate(10**12)  # takes no place on the disk
    with pytest.raises(UserError, match="file.pkl.*more than .* bytes"):
        load(path)


def test_names_of_a_hostile_file_do_not_flood_the_terminal(tmp_path):
    path = tmp_path / "file.pkl"
    path.write_bytes(b"\x80\x05c" + "é\x1b[2J".encode() * 10_000 + b"\nx\n.")
    with pytest.raises(UserError) as caught:
        load(path)
    assert str(caught.value).isascii() and len(str(caught.value)) < 600


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_numpy_pickles_comes_back(tmp_path, protocol):
    random = np.random.default_rng(0)
    arrays = {
        "double": random.normal(size=(3, 4)),
        "Fortran": np.asfortranarray(random.normal(size=(3, 4))),
        "single": random.normal(size=5).astype(np.float32),
        "swapped": np.arange(5).astype(">i4"),
        "bytes": np.array([b"a", b"bcd"]),
        "text": np.array(["a", "bcd", "\U0001f916"]),
        "bool": random.integers(0, 2, (2, 3)) > 0,
        "picture": random.integers(0, 256, (4, 5, 3), np.uint8),
        "one": np.array(1.5),
        "none": np.zeros((0, 3)),
        "part": np.arange(20.0).reshape(4, 5)[::2, 1:],
    }
    things = {"arrays": arrays, "number": np.float64(1.5), "truth": np.bool_(True)}
    things["state"] = np.random.get_state()
    path = tmp_path / "file.pkl"
    path.write_bytes(pickle.dumps(things, protocol))
    content = load(path)
    for name, expected in arrays.items():
        found = content["arrays"][name]
        assert found.dtype == expected.dtype.newbyteorder("="), name
        assert found.shape == expected.shape and np.array_equal(found, expected), name
    assert content["number"] == 1.5 and content["truth"] is True
    assert content["state"][0] == "MT19937"
    assert np.array_equal(content["state"][1], things["state"][1])


def test_numbers_and_nothing_among_objects_become_floats(tmp_path):
    path = tmp_path / "file.pkl"
    path.write_bytes(pickle.dumps(np.append(None, 1.0), 4))  # as RLBench writes where a path ends
    content = load(path)
    assert content.dtype == float and np.isnan(content[0]) and content[1] == 1
    path.write_bytes(pickle.dumps(np.array([None, "a"]), 4))
    with pytest.raises(UserError, match="array of objects"):
        load(path)


def test_a_bool_is_0_or_1(tmp_path):
    """NumPy counts with the bytes of a bool, and would write beyond an array."""
    path = tmp_path / "file.pkl"
    path.write_bytes(b"\x80\x05" + array(b"b1", (4,), b"\x00\x01\xff\x80") + b".")
    assert load(path).view(np.uint8).tolist() == [0, 1, 1, 1]
