"""The pickle machine: plain values come back as they were, everything else as a description, and bounds hold."""

from __future__ import annotations

import argparse
import pickle
import pickletools
import time
from collections import Counter, OrderedDict, defaultdict
from pathlib import PurePosixPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import ModelError
from secateur.intake import pickles
from secateur.intake.pickles import HIDDEN, Budget, Name, Record, also_a_pickle, read_pickle

PROTOCOLS = range(6)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary())
SMALL = st.integers(-(2**63), 2**63)
KEYS = st.one_of(SMALL, st.text(), st.tuples(SMALL, st.text()))
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(KEYS, inner), st.tuples(inner), st.tuples(inner, inner)
    ),
    max_leaves=20,
)


@given(PLAIN, st.sampled_from([3, 4, 5]))
def test_plain_values_come_back(value, protocol):
    assert read_pickle(pickle.dumps(value, protocol)).value == value


@given(st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.text()), st.lists, max_leaves=10), st.integers(0, 5))
def test_old_protocols(value, protocol):
    assert read_pickle(pickle.dumps(value, protocol)).value == value


class Point:
    def __init__(self, x: int) -> None:
        self.x = x


class Slotted:
    __slots__ = ("x",)


class Loud:
    def __reduce__(self) -> Any:
        return divmod, ("hello",), {"state": 1}, iter([1, 2]), iter([("a", 3)])


class Keywords:
    def __new__(cls, *, x: int) -> Keywords:
        return object.__new__(cls)

    def __getnewargs_ex__(self) -> Any:
        return (), {"x": 1}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_objects_become_records(protocol):
    found = read_pickle(pickle.dumps([Point(3), Loud()], protocol))
    point, loud = found.value
    assert point.state == {"x": 3}
    assert isinstance(loud, Record)
    assert isinstance(loud.made_by, Name)
    assert (loud.made_by.name, loud.arguments) == ("divmod", ("hello",))
    assert (loud.state, loud.entries, loud.items) == ({"state": 1}, [1, 2], {"a": 3})
    assert any(name.name == "divmod" for name in found.names)
    assert any(name.name == "Point" for name in found.names)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_keyword_arguments_of_new(protocol):
    record = read_pickle(pickle.dumps(Keywords(x=1), protocol)).value
    assert isinstance(record, Record)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (argparse.Namespace(a=1), "argparse.Namespace"),
        (PurePosixPath("a/b"), "pathlib.PurePosixPath"),
        (defaultdict(list, {1: [2]}), "collections.defaultdict"),
        (Counter("aab"), "collections.Counter"),
        (OrderedDict(a=1), "collections.OrderedDict"),
        (frozenset({1}), None),
        ({1, 2}, None),
    ],
)
def test_usual_objects(protocol, value, name):
    found = read_pickle(pickle.dumps(value, protocol))
    assert isinstance(found.value, Record)
    assert name is None or name in map(str, found.names)


def test_calls_may_be_answered():
    content = pickle.dumps(OrderedDict(a=1), 2)
    made = read_pickle(content, calls={Name("collections", "OrderedDict"): lambda arguments: {"args": len(arguments)}})
    assert made.value == {"args": 0, "a": 1}


@pytest.mark.parametrize("arguments", [b")", b"N", b"(lp0\n", b"K\x01"])
def test_arguments_of_calls_need_not_be_a_tuple(arguments):
    record = read_pickle(b"\x80\x02cos\nsystem\n" + arguments + b"R.").value
    assert record.made_by == Name("os", "system")


def test_names_are_seen_however_they_are_spelled():
    direct = b"\x80\x02cos\nsystem\n."
    stack = b"\x80\x04\x8c\x02os\x8c\x06system\x93."
    memo = b"\x80\x04\x8c\x02os\x94\x8c\x06system\x9400h\x00h\x01\x93."
    instance = b"(S'x'\nios\nsystem\n."
    object_ = b"(cos\nsystem\nS'x'\no."
    for content in (direct, stack, memo, instance, object_):
        assert Name("os", "system") in read_pickle(content).names


@pytest.mark.parametrize(
    "content", [b"\x80\x04NN\x93.", b"\x80\x04K\x01\x8c\x01x\x93.", b"\x80\x02\x82\x01.", b"\x80\x02\x84\x01\x00\x00\x00."]
)
def test_computed_names_are_told(content):
    assert list(read_pickle(content).names) == [HIDDEN]


def test_names_seen_before_damage_count():
    names: dict[Name, None] = {}
    with pytest.raises(ModelError):
        read_pickle(b"\x80\x02cos\nsystem\n(S'x'\ntRoops", names=names)
    assert list(names) == [Name("os", "system")]


@pytest.mark.parametrize("length", range(1, 16))
def test_frames_must_end_between_opcodes(length):
    """Python's own unpickler loses bytes at the end of such a frame: ``cXos`` is read as ``os`` where the X is cut off."""
    content = b"cXos\nsystem\n."
    framed = b"\x80\x04\x95" + length.to_bytes(8, "little") + content
    if length in (len(content) - 1, len(content)):
        assert read_pickle(framed).names
    else:
        with pytest.raises(ModelError, match="damaged"):
            read_pickle(framed)


def test_frames_must_not_be_nested():
    inner = b"\x95" + (1).to_bytes(8, "little") + b"N"
    with pytest.raises(ModelError, match="damaged"):
        read_pickle(b"\x80\x04\x95" + (50).to_bytes(8, "little") + inner + b"." + b" " * 50)


def test_cycles_and_nesting_are_harmless():
    cycle: list[Any] = []
    cycle.append(cycle)
    value = read_pickle(pickle.dumps(cycle)).value
    assert value[0] is value
    deep = b"\x80\x02)" + b"\x85" * 200_000 + b"."
    value = read_pickle(deep).value
    del value
    key = read_pickle(b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.").value  # hashing such a key would overflow the C stack
    assert isinstance(next(iter(key)), Record)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b".",
        b"\x80\x02",
        b"\x80\x02N",
        b"\x80\x02NN.",
        b"\x80\x02(N.",
        b"\x80\x020.",
        b"\x80\x02t.",
        b"\x80\x02h\x05.",
        b"\x80\x02K\x01K\x02s.",
        b"\x80\x02}K\x01s.",
        b"\x80\x02}(K\x01u.",
        b"\x80\x02Na.",
        b"\x80\x02K\x01b.",
        b"\x80\x02Q.",
        b"\x80\x02NQ.",
        b"\x80\x05\x97.",
        b"\x80\x02\xff.",
        b"\x80\x02X\xff\xff\xff\x7fa.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x0fa.",
        b"\x80\x02U\x05a.",
        b"I12x\n.",
        b"L" + b"9" * 5000 + b"\n.",
    ],
)
def test_damage_is_one_error(content):
    with pytest.raises(ModelError, match="damaged"):
        read_pickle(content)


def test_every_opcode_is_known():
    machine = pickles._Machine({}, None, {})
    for code in pickletools.opcodes:
        known = code.name in pickles.LITERALS or code.name in pickles.CONSTANTS or code.name in pickles.IGNORED
        assert known or hasattr(machine, f"_{code.name.lower()}") or code.name in ("NEXT_BUFFER", "READONLY_BUFFER")


def test_opcodes_of_a_file_are_counted_together():
    budget = Budget(opcodes=100)
    read_pickle(b"\x80\x02" + b"N0" * 30 + b"N.", budget=budget)
    with pytest.raises(ModelError, match="opcodes, got more"):
        read_pickle(b"\x80\x02" + b"N0" * 30 + b"N.", budget=budget)


def test_names_are_counted(monkeypatch):
    monkeypatch.setattr(pickles, "MAX_NAMES", 10)
    with pytest.raises(ModelError, match="at most 10 objects"):
        read_pickle(b"\x80\x02(" + b"".join(b"ca\nb%d\n" % i for i in range(11)) + b"t.")


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


LOAD = b"ctorch.storage\n_load_from_bytes\n"


@pytest.mark.parametrize(
    "content",
    [
        b"ca\nB\n)R)R.",  # what a call returned is called
        b"ca\nB\n)R)\x81.",
        b"ctorch\nnn\n}" + text("__path__") + b"]sb.",  # attributes of a module are set
        b"ca\nB\n)R}" + text("__setstate__") + b"Nsb.",
        b"ca\nB\n)R}" + text("append") + b"Nsb.",
        b"ca\nB\n)R(N}" + text("extend") + b"Nstb.",
        LOAD + b".",  # taken, and not called with what it reads
        b"(" + LOAD + b"Nt.",
        LOAD + b"q\x000h\x00h\x00\x86.",
        LOAD + b"2\x86.",
    ],
)
def test_ways_to_call_what_is_not_named(content):
    assert HIDDEN in read_pickle(b"\x80\x02" + content).names


def test_calls_of_what_is_named_are_not_hidden():
    assert HIDDEN not in read_pickle(b"\x80\x02" + LOAD + b"q\x00)R0h\x00)R.").names


@pytest.mark.parametrize("key", [(0,) * 17, ((1,),), (1, [2]), 2**70, [1], {"a": 1}])
def test_keys_that_are_slow_to_hash_are_wrapped(key):
    framed = read_pickle(b"\x80\x02}" + pickle.dumps(key, 2)[2:-1] + b"Ns.")
    assert isinstance(next(iter(framed.value)), Record)


def test_a_bomb_of_references_takes_no_room():
    doubled = b"\x80\x02]" + b"2\x86" * 60 + b"."  # DUP, TUPLE2: 2**60 leaves when written out
    start = time.perf_counter()
    read_pickle(doubled)
    assert time.perf_counter() - start < 5


def test_where_a_pickle_ends():
    content = pickle.dumps([1]) + b"rest"
    assert content[read_pickle(content).end :] == b"rest"
    assert read_pickle(b"xx" + pickle.dumps(7), 2).value == 7


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"\x80\x02cos\nsystem\n.", True),
        (b"N0" * 500_100 + b"N.", True),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", True),
        (b"\x80\x04\x95\x01" + bytes(7) + b"cXos\nsystem\n.", True),
        (b"V" + b"x" * 2_000_000 + b"\ncos\nsystem\n.", True),
        (b"]K\x01K\x02scos\nsystem\n.", True),
        (b"\x80\x02N.", False),
        (b"c\x00\x00{\nb\xff\n.", False),
        (b"\x58\x01\x00\x00\x00\x00\x00\x00{", False),
        (b"", False),
    ],
)
def test_what_somebody_could_unpickle(content, wanted):
    assert also_a_pickle(memoryview(content)) == wanted
