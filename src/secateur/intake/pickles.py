"""A pickle read as plain data: its opcodes are followed, nothing it names is imported and nothing it calls is called.

A global becomes a `Name`, a call becomes a `Record` of what would have been called with what. Only callers' own functions
(``calls``) turn records into values. Opcodes are taken apart by the standard library's ``pickletools``.
"""

from __future__ import annotations

import pickletools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ModelError
from .view import View

MAX_OPCODES = 1_000_000
MAX_NAMES = 10_000
MAX_KEY = 16  # values in a tuple that is a key: it is hashed anew for every item set
FRAME_HEADER = 9  # bytes of the opcode FRAME with its argument


@dataclass(frozen=True, slots=True)
class Name:
    """A global that a pickle names: ``module`` and ``name`` as they stand there."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Record:
    """An object that a pickle describes, not made.

    Attributes:
        made_by: What would have been called: a `Name`, or another value.
        arguments: With what.
        state: What would have been its attributes.
        items: What would have been set by key.
        entries: What would have been appended.
    """

    made_by: Any
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    entries: list[Any] = field(default_factory=list)


Call = Callable[[tuple[Any, ...]], Any]
Names = dict[Name, tuple[Any, ...] | None]
HIDDEN = Name("?", "?")  # a global whose name is computed, or kept outside the pickle
DIRECT = frozenset({Name("torch.storage", "_load_from_bytes")})  # reads another pickle, so it must be seen with what it reads


@dataclass
class Budget:
    """What all pickles of one file may cost together.

    Attributes:
        opcodes: Steps that are left.
        made: Bytes that calls may still make out of arguments, which can be used again and again.
    """

    opcodes: int = MAX_OPCODES
    made: int = 2**26

    def make(self, amount: int) -> None:
        """Spend; `ModelError` when it is too much."""
        self.made -= amount
        if self.made < 0:
            raise ModelError("the pickle makes much more out of little, as a bomb does")


@dataclass(frozen=True, eq=False)
class Pickle:
    """What one pickle holds.

    Attributes:
        value: Plain Python values, `Name`, `Record`, and what ``calls`` and ``persistent`` returned.
        names: Every global, in the order of first appearance, with what it was first called with, if it was called.
        end: Position after the pickle.
    """

    value: Any
    names: Names
    end: int


def read_pickle(
    content: bytes | memoryview,
    start: int = 0,
    *,
    calls: Mapping[Name, Call] | None = None,
    persistent: Callable[[Any], Any] | None = None,
    names: Names | None = None,
    budget: Budget | None = None,
) -> Pickle:
    """Follow one pickle.

    Args:
        content: The bytes; other things may follow the pickle.
        start: Where it begins.
        calls: What to make of calls: global -> function of the arguments. It may raise `ModelError`.
        persistent: What to make of persistent ids; None refuses them.
        names: Filled with the globals, also when the pickle turns out to be damaged.
        budget: What is left for this file.

    Raises:
        ModelError: The pickle is damaged, or takes more than the budget.
    """
    file = View(memoryview(content))
    file.seek(start)
    machine = _Machine(calls or {}, persistent, {} if names is None else names)
    budget = Budget() if budget is None else budget
    previous = frame = 0
    try:
        for opcode, argument, position in _opcodes(file):
            budget.opcodes -= 1
            if budget.opcodes < 0:
                raise ModelError(f"the pickles of a file must have at most {MAX_OPCODES} opcodes, got more")
            if previous < frame < position or (opcode.name == "FRAME" and position < frame):
                raise ValueError("a frame that ends within an opcode is read by every implementation in its own way")
            if opcode.name == "FRAME":
                frame = position + FRAME_HEADER + int(argument or 0)
            previous = position
            machine.step(opcode.name, argument)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ModelError("the pickle is damaged: its opcodes make no sense") from error
    finally:
        if machine.indirect > 0:
            machine.names[HIDDEN] = None
    if frame > len(content):
        raise ModelError("the pickle is damaged: a frame is longer than the file")
    return Pickle(machine.stack[-1], machine.names, file.tell())


def also_a_pickle(data: memoryview) -> bool:
    """Return whether a file of another format, unpickled by somebody, could get as far as importing something.

    Only the opcodes are looked at, not what they do: any reader stops where they end, none has to stop before.
    """
    strings = previous = frame = 0
    try:
        for count, (opcode, argument, position) in enumerate(_opcodes(View(data, max_line=2**28))):
            if count > MAX_OPCODES or previous < frame < position:
                return True
            if opcode.name == "FRAME":
                frame = position + FRAME_HEADER + int(argument or 0)
            previous = position
            words = str(argument).split(" ") if opcode.name in ("GLOBAL", "INST") else [argument]
            plausible = sum(isinstance(word, str) and re.fullmatch(r"[^\W\d][\w.]{0,999}", word) is not None for word in words)
            if plausible == 2 or (opcode.name == "STACK_GLOBAL" and strings >= 2):
                return True
            strings += plausible
    except (ValueError, IndexError, OverflowError):
        return False
    return False


def _opcodes(file: View) -> Iterator[tuple[pickletools.OpcodeInfo, Any, int]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about backslashes in texts
        for opcode, argument, position in pickletools.genops(file):
            yield opcode, argument, position or 0


class _Machine:
    """The stack machine of the pickle protocols 0 to 5."""

    def __init__(self, calls: Mapping[Name, Call], persistent: Callable[[Any], Any] | None, names: Names) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.calls, self.persistent, self.names = calls, persistent, names
        self.indirect = 0  # times that a name of `DIRECT` was taken, less times that it was called

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in LITERALS:
            self.stack.append(argument)
        elif opcode in CONSTANTS:
            self.stack.append(CONSTANTS[opcode])
        elif opcode not in IGNORED:
            getattr(self, "_" + opcode.lower())(argument)

    def _to_mark(self) -> list[Any]:
        found = self.stack
        self.stack = self.below.pop()
        return found

    def _name(self, module: Any, name: Any) -> Name:
        plain = isinstance(module, str) and isinstance(name, str) and max(len(module), len(name)) <= 1000
        found = Name(module, name) if plain else HIDDEN
        self.names.setdefault(found, None)
        if len(self.names) > MAX_NAMES:
            raise ModelError(f"a pickle must name at most {MAX_NAMES} objects, got more")
        self.indirect += found in DIRECT
        return found

    def _call(self, callee: Any, arguments: Any) -> Any:
        given = arguments if isinstance(arguments, tuple) else (arguments,)
        if not isinstance(callee, Name):  # what is called is computed
            self.names[HIDDEN] = None
            return Record(callee, given)
        if self.names.get(callee) is None:
            self.names[callee] = given
        self.indirect -= callee in DIRECT
        known = self.calls.get(callee)
        return Record(callee, given) if known is None else known(given)

    # Stack and memo

    def _mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def _pop(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self._to_mark()

    def _pop_mark(self, _: Any) -> None:
        self._to_mark()

    def _dup(self, _: Any) -> None:
        self.indirect += isinstance(self.stack[-1], Name) and self.stack[-1] in DIRECT
        self.stack.append(self.stack[-1])

    def _memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    _binput = _long_binput = _put

    def _get(self, index: int) -> None:
        found = self.memo[index]
        self.indirect += isinstance(found, Name) and found in DIRECT
        self.stack.append(found)

    _binget = _long_binget = _get

    def _stop(self, _: Any) -> None:
        if len(self.stack) != 1 or self.below:
            raise ValueError

    # Containers

    def _empty_list(self, _: Any) -> None:
        self.stack.append([])

    def _empty_dict(self, _: Any) -> None:
        self.stack.append({})

    def _empty_set(self, _: Any) -> None:
        self.stack.append(Record(Name("builtins", "set")))

    def _list(self, _: Any) -> None:
        found = self._to_mark()
        self.stack.append(found)

    def _tuple(self, _: Any) -> None:
        found = self._to_mark()
        self.stack.append(tuple(found))

    def _frozenset(self, _: Any) -> None:
        found = self._to_mark()
        self.stack.append(Record(Name("builtins", "frozenset"), entries=found))

    def _dict(self, _: Any) -> None:
        pairs = self._to_mark()
        self.stack.append({})
        self._set(pairs)

    def _tuple1(self, _: Any) -> None:
        self.stack[-1:] = [(self.stack[-1],)]

    def _tuple2(self, _: Any) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def _tuple3(self, _: Any) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def _append(self, _: Any) -> None:
        self._extend([self.stack.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._to_mark())

    _additems = _appends

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        (target.entries if isinstance(target, Record) else target).extend(values)

    def _setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _setitems(self, _: Any) -> None:
        self._set(self._to_mark())

    def _set(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        items: dict[Any, Any] = target.items if isinstance(target, Record) else target
        if not isinstance(items, dict) or len(pairs) % 2:
            raise TypeError
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            items[key if _is_flat(key) else Record(key)] = value

    # Objects

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(self._name(module, name))

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(self._name(module, name))

    def _ext1(self, _: Any) -> None:
        self.stack.append(self._name(None, None))

    _ext2 = _ext4 = _ext1

    def _inst(self, argument: str) -> None:
        arguments = tuple(self._to_mark())
        self._global(argument)
        self.stack.append(self._call(self.stack.pop(), arguments))

    def _obj(self, _: Any) -> None:
        callee, *arguments = self._to_mark()
        self.stack.append(self._call(callee, tuple(arguments)))

    def _reduce(self, _: Any) -> None:
        arguments, callee = self.stack.pop(), self.stack.pop()
        self.stack.append(self._call(callee, arguments))

    _newobj = _reduce

    def _newobj_ex(self, _: Any) -> None:
        keywords, arguments, callee = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.stack.append(self._call(callee, (arguments, keywords)))

    def _build(self, _: Any) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif not isinstance(target, dict):  # of a module or a class, say
            self.names[HIDDEN] = None
        parts = state if isinstance(state, tuple) else (state,)
        if any(isinstance(key, str) and _is_hook(key) for part in parts if isinstance(part, dict) for key in part):
            self.names[HIDDEN] = None

    def _persid(self, argument: Any) -> None:
        if self.persistent is None:
            raise ValueError
        self.stack.append(self.persistent(argument))

    def _binpersid(self, _: Any) -> None:
        self._persid(self.stack.pop())


def _is_hook(attribute: str) -> bool:
    """Whether an attribute changes what later opcodes call on an object."""
    return attribute in ("append", "extend", "add") or (attribute.startswith("__") and attribute.endswith("__"))


def _is_flat(key: Any) -> bool:
    """Whether hashing is quick: a nested tuple is hashed by recursion in C, a long one or a huge number anew each time."""
    if isinstance(key, tuple):
        return len(key) <= MAX_KEY and not any(isinstance(part, tuple) or not _is_flat(part) for part in key)
    return not isinstance(key, list | dict | bytearray) and (type(key) is not int or abs(key) < 2**64)


CONSTANTS: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
IGNORED = frozenset({"PROTO", "FRAME"})
LITERALS = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
)
