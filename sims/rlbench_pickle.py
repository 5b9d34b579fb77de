"""RLBench's pickles, read so that nothing in them can run.

In:   low_dim_obs.pkl, variation_descriptions.pkl, variation_number.pkl
Out:  lists, tuples, dicts, numbers, strings and NumPy arrays; a SimpleNamespace in place of each
      object of RLBench

A pickle is a program: it names functions of Python and calls them. This file holds a machine of its
own for that language. It knows the 45 instructions that recorded demonstrations consist of. The
functions that a pickle may name are five, all of them below, and the classes are containers without
a method. An array is built as NumPy itself pickles one, from a type without fields, a shape, and
exactly as many bytes as the two need.
"""

import pickletools
from _compat_pickle import IMPORT_MAPPING
from types import SimpleNamespace

from genima.files import UserError
from sims.pickled_arrays import FUNCTIONS, Array, ArrayType, PickleError, shorten

LARGEST = 100_000_000  # bytes; a demonstration has less than a megabyte
MOST_INSTRUCTIONS = 3_000_000  # a demonstration has about 500 a frame

# The classes of RLBench, and of its fork for PerAct2, of which instances are pickled.
CLASSES = (
    "rlbench.demo.Demo",
    "rlbench.backend.observation.Observation",
    "rlbench.backend.observation.UnimanualObservation",
    "rlbench.backend.observation.UnimanualObservationData",
    "rlbench.backend.observation.BimanualObservation",
)
# The instructions whose argument is a value.
VALUES = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)


class Name(str):
    """A function or class that the pickle names."""


class Mark:
    """Where on the stack a list of items begins."""


CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
NEW = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "MARK": Mark}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


# ------------------------------------------------------------------------------------ the machine
class Machine:
    """A stack and a memo, and what each instruction does with them."""

    def __init__(self, path):
        self.path = path
        self.stack = []
        self.memo = {}

    def run(self, content):
        """The object that the pickle describes."""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if count == MOST_INSTRUCTIONS:
                raise PickleError(f"it has more than {MOST_INSTRUCTIONS} instructions")
            if opcode.name == "STOP":
                return with_arrays(self.stack.pop(), {})
            self.step(opcode.name, argument)
        raise PickleError("it has no end")

    def step(self, name, argument):
        """Carry out one instruction."""
        stack = self.stack
        if name in VALUES:
            stack.append(argument)
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in TUPLES:
            self.make_tuple(TUPLES[name])
        elif name in NEW:
            stack.append(NEW[name]())
        elif name in ("TUPLE", "LIST", "DICT", "APPENDS", "SETITEMS"):
            self.take_marked(name)
        elif name == "APPEND":
            self.append([stack.pop()])
        elif name == "SETITEM":
            value = stack.pop()
            self.set_items([stack.pop(), value])
        elif name == "GLOBAL":
            stack.append(self.find(*argument.split(" ")))
        elif name == "STACK_GLOBAL":
            attribute = stack.pop()
            stack.append(self.find(stack.pop(), attribute))
        elif name in ("REDUCE", "NEWOBJ"):
            self.call(name)
        elif name == "BUILD":
            self.set_state(stack.pop())
        elif name not in ("PROTO", "FRAME"):
            raise PickleError(f"instruction {name}, which no recorded demonstration needs")

    def make_tuple(self, length):
        first = len(self.stack) - length
        items = tuple(self.stack[first:])
        if len(items) != length:
            raise PickleError("a tuple without its items")
        del self.stack[first:]
        self.stack.append(items)

    def take_marked(self, name):
        """Do with all that lies above the last mark what the instruction says."""
        items = []
        while not isinstance(self.stack[-1], Mark):
            items.append(self.stack.pop())
        self.stack.pop()
        items.reverse()
        if name == "TUPLE":
            self.stack.append(tuple(items))
        elif name in ("LIST", "APPENDS"):
            if name == "LIST":
                self.stack.append([])
            self.append(items)
        else:
            if name == "DICT":
                self.stack.append({})
            self.set_items(items)

    def append(self, items):
        if type(self.stack[-1]) is not list:
            raise PickleError("items for something that is not a list")
        self.stack[-1].extend(items)

    def set_items(self, items):
        """Keys and values in turn, for the dict on the stack."""
        if type(self.stack[-1]) is not dict or len(items) % 2:
            raise PickleError("items for something that is not a dict")
        for key, value in zip(items[::2], items[1::2]):
            if type(key) not in (str, int):
                raise PickleError("a dict whose keys are not names")
            self.stack[-1][key] = value

    def find(self, module, attribute):
        """The name of a function or class, if it is one of those above."""
        module = IMPORT_MAPPING.get(module, module)  # protocol 2 has Python 2's names
        name = f"{module}.{attribute}"
        known = name.replace("numpy._core.", "numpy.core.")  # NumPy 2 and 1
        if known not in FUNCTIONS and known not in CLASSES and known != "numpy.ndarray":
            raise UserError(
                f"{self.path} names {shorten(name)}, which no recorded demonstration needs and "
                "which could run code: nothing of it was run; get this file from somewhere else."
            )
        return Name(known)

    def call(self, instruction):
        arguments = self.stack.pop()
        function = self.stack.pop()
        if type(function) is not Name or type(arguments) is not tuple:
            raise PickleError("a call of something that is not a function")
        if instruction == "NEWOBJ" and function in CLASSES:
            self.stack.append(SimpleNamespace())
        elif instruction == "REDUCE" and function in FUNCTIONS:
            self.stack.append(FUNCTIONS[function](*arguments))
        else:
            raise PickleError(f"a call of {function}")

    def set_state(self, state):
        """Fill the object on the stack."""
        target = self.stack[-1]
        if type(target) in (Array, ArrayType):
            target.set_state(state)
        elif type(target) is SimpleNamespace and type(state) is dict:
            vars(target).update(state)
        else:
            raise PickleError("attributes of something that has none")


def with_arrays(thing, done):
    """The same with each Array's content in its place. done: by id, what was visited."""
    if id(thing) in done:
        return done[id(thing)][1]
    if type(thing) is Array:
        if thing.content is None:
            raise PickleError("an array without content")
        return thing.content
    if type(thing) is tuple:
        result = tuple([with_arrays(item, done) for item in thing])
        done[id(thing)] = thing, result
        return result
    done[id(thing)] = thing, thing
    if type(thing) is list:
        for i, item in enumerate(thing):
            thing[i] = with_arrays(item, done)
    elif type(thing) in (dict, SimpleNamespace):
        items = thing if type(thing) is dict else vars(thing)
        for key, item in items.items():
            items[key] = with_arrays(item, done)
    elif type(thing) in (Name, Mark, ArrayType):
        raise PickleError("a function in the place of a value")
    return thing


def load(path):
    """The content of one of RLBench's pickles. Nothing in it can run."""
    try:
        if path.stat().st_size > LARGEST:
            raise PickleError(f"it has more than {LARGEST} bytes")
        return Machine(path).run(path.read_bytes())
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its next instruction meets
        reason = shorten(error) or type(error).__name__
        raise UserError(f"{path} cannot be read ({reason}): get it again.") from error
