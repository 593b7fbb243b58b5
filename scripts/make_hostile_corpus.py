"""Write hostile, broken and good model files, to try the door with: ``make_hostile_corpus.py FOLDER CANARY``.

Whatever in them could run code would make the file CANARY, so a CANARY that exists proves that something ran. Nothing runs
while they are written: pickles are put together opcode by opcode. ``manifest.json`` says of each file what it is and which
exit codes ``secateur info``, ``convert`` and ``repair`` owe it. The same arguments give the same bytes, but for the addresses
that torch itself writes into legacy files.
"""

from __future__ import annotations

import argparse
import bz2
import functools
import gzip
import hashlib
import io
import json
import lzma
import marshal
import math
import os
import shlex
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Codes = tuple[int, int, int]  # of info, convert, repair
CODE: Codes = (4, 4, 4)  # needs code, or asks for it
BROKEN: Codes = (2, 2, 2)
FINE: Codes = (0, 0, 0)
NO_NETWORK: Codes = (0, 2, 2)  # can be looked at, not used
TOLD: Codes = (1, 2, 2)  # looked at with a serious finding, not used
Writer = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """One file or folder of the corpus.

    Attributes:
        file: Its name; up to the first "-" or "." it is the family.
        what: What it is.
        codes: Exit codes of info, convert, repair.
        content: Its bytes, or what writes it.
        says: Regular expression that every error line must match.
        rule: Finding that info must print; empty for none.
        live: How it fires: "pickle" (``pickle.load``), "torch" (``torch.load``), "export" (``torch.export.load``).
        heavy: Whether it takes seconds to be seen through.
    """

    file: str
    what: str
    codes: Codes
    content: bytes | Writer
    says: str = ""
    rule: str = ""
    live: str = ""
    heavy: bool = False


@dataclass(frozen=True)
class Payload:
    """What the hostile files try to run.

    Attributes:
        canary: The file that it makes.
        code: A Python file that makes it.
    """

    canary: str
    code: str

    @property
    def shell(self) -> str:
        """As a command."""
        return f"touch {shlex.quote(self.canary)}"

    @property
    def python(self) -> str:
        """As a statement and an expression."""
        return f"open({self.canary!r}, 'w').close()"


def seeded(size: int, seed: str) -> bytes:
    """Return bytes that depend on nothing but ``seed``."""
    return hashlib.shake_256(seed.encode()).digest(size)


# --- Pickles, opcode by opcode --------------------------------------------------------------------------------------------

NONE, TRUE, FALSE, EMPTY, MARK = b"N", b"\x88", b"\x89", b")", b"("
POP, DUP, POP_MARK, STOP = b"0", b"2", b"1", b"."
REDUCE, BUILD, NEWOBJ, MEMOIZE, STACK_GLOBAL = b"R", b"b", b"\x81", b"\x94", b"\x93"


def text(value: str) -> bytes:
    """BINUNICODE."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def short(value: str) -> bytes:
    """SHORT_BINUNICODE."""
    return b"\x8c" + bytes([len(value.encode())]) + value.encode()


def blob(value: bytes) -> bytes:
    """BINBYTES."""
    return b"B" + struct.pack("<I", len(value)) + value


def num(value: int) -> bytes:
    """BININT, or LONG1 where it is too large."""
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def name(module: str, attribute: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{attribute}\n".encode()


def tup(*items: bytes) -> bytes:
    """TUPLE."""
    return MARK + b"".join(items) + b"t"


def lst(*items: bytes) -> bytes:
    """LIST."""
    return b"](" + b"".join(items) + b"e"


def dic(*pairs: tuple[str | bytes, bytes]) -> bytes:
    """DICT; a key that is no text is a pickle of its own."""
    return b"}(" + b"".join((text(key) if isinstance(key, str) else key) + value for key, value in pairs) + b"u"


def call(function: bytes, *arguments: bytes) -> bytes:
    """REDUCE."""
    return function + tup(*arguments) + REDUCE


def pid(*items: bytes) -> bytes:
    """BINPERSID of a tuple."""
    return tup(*items) + b"Q"


def pickled(expression: bytes, protocol: int = 2) -> bytes:
    """Return a whole pickle; protocols 0 and 1 have no header."""
    return (b"\x80" + bytes([protocol]) if protocol > 1 else b"") + expression + STOP


ORDERED = call(name("collections", "OrderedDict"))
SYSTEM = name("posix", "system")


# --- Zip archives and the lies in them ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One entry of an archive, and the lies that its headers tell.

    Attributes:
        name: Name in the central directory.
        data: What is stored.
        local: Name in the local header, when another one.
        crc: Checksum, when another one.
        flags: Flag bits.
        method: Compression method.
        size: Size once unpacked, when another one.
        packed: Size as stored, when another one.
        claimed: Sizes in the local header, when others.
        offset: Where the central directory says it begins, when elsewhere.
        extra: Extra field of the central directory.
    """

    name: str | bytes
    data: bytes = b""
    local: str | bytes | None = None
    crc: int | None = None
    flags: int = 0
    method: int = 0
    size: int | None = None
    packed: int | None = None
    claimed: int | None = None
    offset: int | None = None
    extra: bytes = b""


def encoded(label: str | bytes) -> bytes:
    """Return a name as bytes."""
    return label.encode() if isinstance(label, str) else label


def either(given: Any, otherwise: Any) -> Any:
    """Return ``given`` unless it is None."""
    return otherwise if given is None else given


def zipped(entries: Iterable[Entry], *, before: bytes = b"", comment: bytes = b"", count: int | None = None) -> bytes:
    """Return a zip archive; offsets count from its own beginning, behind ``before``."""
    body, directory, total = bytearray(), bytearray(), 0
    for entry in entries:
        crc, size = either(entry.crc, zlib.crc32(entry.data)), either(entry.size, len(entry.data))
        packed = either(entry.packed, len(entry.data))
        head = struct.pack("<HHHHI", entry.flags, entry.method, 0, 0x21, crc)
        local, central = encoded(either(entry.local, entry.name)), encoded(entry.name)
        offset = either(entry.offset, len(body))
        directory += b"PK\x01\x02" + struct.pack("<HH", 20, 20) + head + struct.pack("<II", packed, size)
        directory += struct.pack("<HHHHHII", len(central), len(entry.extra), 0, 0, 0, 0, offset) + central + entry.extra
        sizes = (packed, size) if entry.claimed is None else (entry.claimed, entry.claimed)
        body += b"PK\x03\x04" + struct.pack("<H", 20) + head + struct.pack("<IIHH", *sizes, len(local), 0) + local + entry.data
        total += 1
    total = either(count, total)
    ending = struct.pack("<HHHHIIH", 0, 0, total, total, len(directory), len(body), len(comment))
    return before + bytes(body) + bytes(directory) + b"PK\x05\x06" + ending + comment


def deflated(label: str, content: bytes) -> Entry:
    """Return a compressed entry."""
    squeezed = zlib.compress(content, 9, wbits=-15)
    return Entry(label, squeezed, method=8, size=len(content), crc=zlib.crc32(content))


# --- Torch files ----------------------------------------------------------------------------------------------------------


def convnet() -> dict[str, tuple[int, ...]]:
    """Return the shapes of secateur's "convnet" with width 1, two classes and one input channel."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (outputs, inputs) in enumerate(((1, 1), (2, 1), (4, 2), (4, 4)), 1):
        shapes[f"conv{i}.weight"] = (outputs, inputs, 3, 3)
        shapes |= {f"bn{i}.{part}": (outputs,) for part in ("weight", "bias", "running_mean", "running_var")}
    return shapes | {"linear.weight": (2, 4), "linear.bias": (2,)}


SHAPES = convnet()


def floats(key: str) -> bytes:
    """Return a weight of the small network, float32: all are positive, so that bright pictures are of class 1."""
    values = [value / 256 for value in seeded(math.prod(SHAPES[key]), key)]
    if key == "linear.weight":
        values[:4] = [0.0] * 4
    if key == "linear.bias":
        values = [0.0, -700.0]
    return struct.pack(f"<{len(values)}f", *values)


def pictures() -> dict[str, Any]:
    """Return clean pictures that the small network tells apart: dark and bright noise."""
    import numpy as np

    y = np.arange(80) % 2
    noise = np.frombuffer(seeded(80 * 1024, "pictures"), np.uint8).reshape(80, 1, 32, 32)
    return {"x": noise // 4 + (160 * y[:, None, None, None]).astype(np.uint8), "y": y}


STORAGES = {str(i): floats(key) for i, key in enumerate(SHAPES)}


def storage(key: str, count: int, kind: str = "FloatStorage", *, where: str = "cpu", legacy: bool = False) -> bytes:
    """Return the persistent id of a storage."""
    items = [text("storage"), name("torch", kind), text(key), text(where), num(count)]
    return pid(*items, *([NONE] if legacy else []))


def tensor(store: bytes, shape: Sequence[int], stride: Sequence[int] | None = None, offset: int = 0, *more: bytes) -> bytes:
    """Return the call that makes a tensor; ``more`` stands for the backward hooks and what follows them."""
    if stride is None:
        stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    sizes = (tup(*map(num, shape)), tup(*map(num, stride)))
    return call(name("torch._utils", "_rebuild_tensor_v2"), store, num(offset), *sizes, FALSE, *(more or (ORDERED,)))


def weights(*, legacy: bool = False, where: str = "cpu", first: bytes | None = None) -> list[tuple[str | bytes, bytes]]:
    """Return the pairs of a good state dict, perhaps with another first weight."""
    made: list[tuple[str | bytes, bytes]] = [
        (key, tensor(storage(str(i), math.prod(shape), legacy=legacy, where=where), shape))
        for i, (key, shape) in enumerate(SHAPES.items())
    ]
    return made if first is None else [("conv1.weight", first), *made[1:]]


def beside(*pairs: tuple[str | bytes, bytes], legacy: bool = False) -> bytes:
    """Return a checkpoint of good weights with other things beside them."""
    return dic(("state_dict", dic(*weights(legacy=legacy))), *pairs)


def torch_entries(data_pkl: bytes, storages: Mapping[str, bytes] = STORAGES, root: str = "archive") -> list[Entry]:
    """Return the entries of a torch checkpoint."""
    return [
        Entry(f"{root}/data.pkl", data_pkl),
        Entry(f"{root}/byteorder", b"little"),
        *(Entry(f"{root}/data/{key}", value) for key, value in storages.items()),
        Entry(f"{root}/version", b"3\n"),
    ]


def torch_zip(expression: bytes, storages: Mapping[str, bytes] = STORAGES, protocol: int = 2) -> bytes:
    """Return a torch checkpoint in today's format."""
    return zipped(torch_entries(pickled(expression, protocol), storages))


MAGIC = pickled(b"\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little"))
SIZES = dic(("short", num(2)), ("int", num(4)), ("long", num(4)))
LITTLE = pickled(dic(("protocol_version", num(1001)), ("little_endian", TRUE), ("type_sizes", SIZES)))


def legacy_file(
    expression: bytes,
    storages: Mapping[str, bytes] = STORAGES,
    *,
    magic: bytes = MAGIC,
    version: bytes = pickled(num(1001)),
    system: bytes = LITTLE,
    keys: bytes | None = None,
) -> bytes:
    """Return a torch checkpoint in the format before version 1.6: pickles one behind the other, then raw values."""
    keys = pickled(lst(*map(text, storages))) if keys is None else keys
    values = b"".join(struct.pack("<q", len(value) // 4) + value for value in storages.values())
    return magic + version + system + pickled(expression) + keys + values


# --- What could run -------------------------------------------------------------------------------------------------------

# module, name, kind of arguments; "!" where pickle.load really runs it, on Linux and Python 3.11.
GADGETS = """
os system sh!                               posix system sh!                        nt system sh
os popen sh!                                os execv argv                           os spawnvp argv
subprocess Popen argv!                      subprocess check_output argv!           subprocess call argv!
subprocess run argv                         subprocess getoutput sh!                commands getoutput sh!
builtins exec py!                           builtins eval py!                       builtins compile py
builtins __import__ mod                     builtins getattr mod                    builtins open path!
builtins globals none                       builtins breakpoint none                builtins setattr mod
builtins exec.__call__ py!                  __builtin__ eval py!                    __builtin__ apply sh
__builtin__ execfile file                   __builtin__ reduce sh                   __builtin__ open path!
operator attrgetter mod                     operator methodcaller sh                operator itemgetter mod
_operator methodcaller sh                   _operator attrgetter mod                functools partial sh
functools reduce sh                         _functools partial sh                   importlib import_module mod
importlib.util spec_from_file_location file imp load_source file                    runpy run_path file!
runpy _run_code py                          pkgutil resolve_name mod                pydoc locate mod
pydoc pipepager sh                          inspect getattr_static mod              zipimport zipimporter file
site addsitedir mod                         pty spawn argv                          ctypes CDLL mod
_ctypes dlopen mod                          _posixsubprocess fork_exec argv         multiprocessing.util spawnv_passfds argv
asyncio create_subprocess_shell sh          threading Thread none                   _thread start_new_thread sh
asyncio.unix_events _UnixSubprocessTransport._start argv                            atexit register sh
signal signal none                          _xxsubinterpreters create none          _interpreters run_string py
marshal loads none                          types FunctionType none                 types CodeType none
pickle loads none                           _pickle loads none                      cPickle loads none
dill loads none                             cloudpickle.cloudpickle subimport mod   joblib load file
code interact none                          code InteractiveInterpreter.runcode py  codeop compile_command py
timeit timeit py!                           cProfile run py!                        profile run py!
pdb run py                                  bdb Bdb.run py                          trace Trace.run py
doctest debug_script py                     unittest.main main none                 copyreg add_extension mod
idlelib.pyshell ModifiedInterpreter.runcommand py                                   idlelib.run Executive.runcode py
idlelib.autocomplete AutoComplete.get_entity py                                     idlelib.calltip get_entity py
idlelib.debugobj ObjectTreeItem.SetText py                                          test.support.script_helper assert_python_ok py
lib2to3.pgen2.pgen ParserGenerator.make_label py                                    lib2to3.pgen2.grammar Grammar.loads none
distutils.spawn spawn argv                  distutils.file_util write_file path     logging.config fileConfig file
logging.config listen none                  logging FileHandler path!               _io FileIO path!
io open path!                               codecs open path!                       pathlib Path.write_text path
tempfile mkdtemp none                       shutil rmtree mod                       shelve open path
sqlite3 connect path                        linecache getlines file                 fileinput input file
mailcap findmatch sh                        socket create_connection none           ssl get_server_certificate none
urllib.request urlopen mod                  urllib2 urlopen mod                     http.client HTTPSConnection mod
httplib HTTPSConnection mod                 smtplib SMTP mod                        ftplib FTP mod
poplib POP3 mod                             telnetlib Telnet mod                    imaplib IMAP4_stream sh
xmlrpc.client ServerProxy mod               requests.api get mod                    aiohttp.client ClientSession none
webbrowser open mod                         uuid _get_command_stdout sh             _osx_support _read_output sh!
_aix_support _read_cmd_output sh            _pyrepl.pager pipe_pager sh             ensurepip _run_pip mod
venv create mod                             pip main argv                           pip._internal main argv
setuptools.command.easy_install main argv   sys exit mod                            sys settrace none
gc get_objects none                         pathlib os.system sh!                   os path.os.system sh!
torch serialization.os.system sh!           torch load file                         torch.serialization load file
torch.hub load mod                          torch.jit load file                     torch.jit._serialization load file
torch.jit.unsupported_tensor_ops execWrapper py                                     torch.export load file
torch.package PackageImporter file          torch.fx.graph_module reduce_graph_module none                   torch.ops load_library file
torch.utils.cpp_extension load file         torch.utils.cpp_extension load_inline py                         torch._ops _Ops.load_library file
torch.utils.collect_env run sh!             torch.utils.bottleneck.__main__ run_cprofile py                  torch.classes load_library file
torch.utils._config_module ConfigModule.load_config none                            torch.multiprocessing spawn none
torch.utils.data.datapipes.utils.decoder basichandlers none                         torch.distributed.rpc rpc_sync none
torch._dynamo.guards GuardBuilder.get py    torch._inductor.codecache compile_file argv                      numpy load file
torch.fx.experimental.symbolic_shapes ShapeEnv.evaluate_guards_expression py        numpy.ctypeslib load_library mod
numpy.testing._private.utils runstring py!  numpy.f2py.crackfortran getlincoef py   numpy.f2py.crackfortran myeval py!
numpy __builtins__ none                     numpy f2py.os.system sh                 pandas read_pickle file
"""  # noqa: E501
HOMES = ("pickle", "zip", "pickle4", "legacy", "zip4")  # gadgets take turns in hiding there
PYTHON2 = ("__builtin__", "commands", "cPickle", "urllib2", "httplib")  # which the old protocols translate


def housed(home: str, expression: bytes) -> bytes:
    """Return a bare pickle of an expression, or a checkpoint that has it beside good weights."""
    kind, protocol = home.rstrip("45"), int(home[-1]) if home[-1].isdigit() else 2
    if kind == "pickle":
        return pickled(expression, protocol)
    if kind == "legacy":
        return legacy_file(beside(("extra", expression), legacy=True))
    return torch_zip(beside(("extra", expression)), protocol=protocol)


def gadgets(payload: Payload) -> Iterator[Case]:
    """Every known way past the published scanners, each in a file of its own."""
    kinds = {
        "sh": [text(payload.shell)],
        "py": [text(payload.python)],
        "argv": [lst(text("touch"), text(payload.canary))],
        "path": [text(payload.canary), text("w")],
        "file": [text(payload.code)],
        "mod": [text("os")],
        "none": [],
    }
    words = GADGETS.split()
    for turn, (module, attribute, kind) in enumerate(zip(words[::3], words[1::3], words[2::3], strict=True)):
        # Names with dots mean something since protocol 4.
        home = ("pickle4", "zip4")[turn % 2] if "." in attribute else HOMES[turn % len(HOMES)]
        home = home.removesuffix("4") if module in PYTHON2 else home
        arguments = kinds[kind.removesuffix("!")] + ([dic()] if attribute == "runstring" else [])
        function = name(module, attribute)
        if home.endswith("4"):
            function = short(module) + MEMOIZE + short(attribute) + MEMOIZE + STACK_GLOBAL + MEMOIZE
        bare = home.startswith("pickle")
        live = ("pickle" if bare else "torch") if kind.endswith("!") else ""
        file = f"calls-{module}-{attribute}.{'pkl' if bare else 'pt'}"
        what = f"{'a bare pickle' if bare else 'a checkpoint with good weights'} calls {module}.{attribute}"
        yield Case(file, what, CODE, housed(home, call(function, *arguments)), attribute, "LOD-001", live)


def opcodes(payload: Payload) -> Iterator[Case]:
    """Hostile globals reached by every opcode that can, and names hidden from scanners that do not follow the stack."""
    run = text(payload.shell)
    evil = call(SYSTEM, run)
    popen = name("subprocess", "Popen")
    prod = name("numpy", "prod")
    go = STACK_GLOBAL + tup(run) + REDUCE
    pieces = call(call(name("builtins", "getattr"), text(""), text("join")), lst(text("po"), text("six")))
    inner = blob(pickled(evil))
    compiled = blob(marshal.dumps(compile(payload.python, "", "exec")))
    function = call(name("types", "FunctionType"), call(name("marshal", "loads"), compiled), call(name("builtins", "globals")))
    state_setter = dic(("__setstate__", SYSTEM))
    fetch = call(name("builtins", "dict.get"), name("numpy", "__builtins__"), text("exec"))
    graph = dic(("_code", text(payload.python + "\ndef forward(self): pass")))
    inflate = call(name("zlib", "decompress"), blob(zlib.compress(pickled(evil))))
    live: dict[str, tuple[str, bytes]] = {
        "inst": ("INST", MARK + run + b"iposix\nsystem\n"),
        "obj": ("OBJ", MARK + SYSTEM + run + b"o"),
        "obj-pop": ("OBJ whose result is dropped", MARK + SYSTEM + run + b"o" + POP + NONE),
        "setstate": ("BUILD that calls a __setstate__ that an earlier BUILD set",
                     name("argparse", "Namespace") + EMPTY + NEWOBJ + state_setter + BUILD + run + BUILD),
        "reduce-pop": ("REDUCE whose result is dropped", evil + POP + NONE),
        "pop-mark": ("a call dropped with its mark", MARK + evil + POP_MARK + NONE),
        "dict-key": ("a call as the key of a dict", dic((evil, NONE))),
        "set-item": ("a call as an item of a set", b"\x8f(" + evil + b"\x90"),
        "memoised": ("STACK_GLOBAL with names from the memo",
                     short("posix") + MEMOIZE + POP + short("system") + MEMOIZE + POP + b"h\0h\1" + go),
        "memo-poisoned": ("a memo whose entries are not the opcode before",
                          short("posix") + NONE + POP + MEMOIZE + short("system") + NONE + POP + MEMOIZE + b"00h\0h\1" + go),
        "memo-reused": ("one memo slot used for several names",
                        short("json") + b"q\0" + POP + short("posix") + b"q\0" + short("system") + b"q\x0100h\0h\1" + go),
        "old-strings": ("STACK_GLOBAL with STRING names", b"S'posix'\nS'system'\n" + go),
        "escaped-strings": ("STRING names with escapes", b"S'po\\x73ix'\nS'system'\n" + go),
        "unicode-names": ("UNICODE names with escapes", b"Vposix\nVsy\\u0073tem\n" + go),
        "names-of-pieces": ("STACK_GLOBAL whose name a call puts together", pieces + text("system") + go),
        "names-of-attributes": ("STACK_GLOBAL whose name is an attribute set before",
                                prod + tup(NONE, dic(("a", text("posix")))) + BUILD + POP
                                + name("numpy", "prod.a") + text("system") + go),
        "protocol-0": ("protocol 0", b"cposix\nsystem\n(S" + repr(payload.shell).encode() + b"\ntR"),
        "nested": ("a pickle in a pickle", call(name("pickle", "loads"), inner)),
        "deflated": ("a deflated pickle in a pickle", call(name("pickle", "loads"), inflate)),
        "storage-bytes": ("a pickle in the bytes of a storage", call(name("torch.storage", "_load_from_bytes"), inner)),
        "marshalled": ("a function made of marshalled code", call(function)),
        "rebuild-from-type": ("torch's own function that calls its first argument",
                              call(name("torch._tensor", "_rebuild_from_type_v2"), SYSTEM, SYSTEM, tup(run), dic())),
        "builtins-of-numpy": ("dict.get on numpy.__builtins__", call(fetch, text(payload.python))),
        "graph-module": ("a torch.fx network, whose source is in the pickle",
                         call(name("torch.fx.graph_module", "reduce_graph_module"), graph, text(""))),
    }  # fmt: skip
    idle: dict[str, tuple[str, bytes]] = {
        "newobj": ("NEWOBJ", popen + tup(lst(run)) + NEWOBJ + dic() + BUILD),
        "newobj-ex": ("NEWOBJ_EX", popen + EMPTY + dic(("args", run)) + b"\x92"),
        "referenced": ("a hostile global that is never called", dic(("f", SYSTEM))),
        "dropped": ("a hostile global that is dropped at once", SYSTEM + POP + NONE),
        "names-of-bytes": ("STACK_GLOBAL with bytes", blob(b"posix") + text("system") + go),
        "names-of-numbers": ("STACK_GLOBAL with a number", num(42) + text("system") + go),
        "names-of-bytearrays": ("STACK_GLOBAL with a bytearray", short("os") + b"\x96\6\0\0\0\0\0\0\0system" + go),
        "names-too-long": ("a global with a name of a million letters", name("torch", "A" * 10**6)),
        "extension-1": ("EXT1", b"\x82\1" + tup(run) + REDUCE),
        "extension-2": ("EXT2", b"\x83\1\1" + tup(run) + REDUCE),
        "extension-4": ("EXT4", b"\x84\1\0\0\0" + tup(run) + REDUCE),
    }  # fmt: skip
    for slug, (what, expression) in (live | idle).items():
        says = "" if slug.startswith(("names", "extension")) else "posix|subprocess|pickle|numpy|graph|types|marshal|builtins"
        for home, kind, where in (("pickle4", "pickle", "a bare pickle"), ("zip4", "torch", "a checkpoint")):
            content = expression + STOP if (slug, kind) == ("protocol-0", "pickle") else housed(home, expression)
            file = f"opcode-{slug}.{'pkl' if kind == 'pickle' else 'pt'}"
            yield Case(file, f"{what}, in {where}", CODE, content, says, "LOD-001", kind if slug in live else "")
    for protocol in (0, 1, 3, 5):
        content = torch_zip(beside(("x", evil)), protocol=protocol)
        what = f"data.pkl of protocol {protocol}"
        yield Case(f"opcode-in-protocol-{protocol}.pt", what, CODE, content, "posix", "LOD-001", "torch")
    content = torch_zip(short("posix") + short("system") + go, protocol=0)
    yield Case("opcode-offset-0.pt", "STACK_GLOBAL with a name at offset 0", CODE, content, "posix", "LOD-001", "torch")


def hidden(payload: Payload) -> Iterator[Case]:
    """One hostile call in every corner of a checkpoint."""
    evil = call(SYSTEM, text(payload.shell))
    shape, good = (1, 1, 3, 3), beside(legacy=True)
    store = storage("0", 9)

    def first(weight: bytes) -> bytes:
        return torch_zip(dic(*weights(first=weight)))

    def store_of(kind: bytes, count: bytes) -> bytes:
        return tensor(pid(text("storage"), kind, text("0"), text("cpu"), count), shape)

    table: dict[str, tuple[str, bytes]] = {
        "root": ("is all there is", torch_zip(evil, {})),
        "beside": ("beside good weights", torch_zip(beside(("x", evil)))),
        "weight": ("in place of a weight", first(evil)),
        "key": ("as a key of the state dict", torch_zip(dic(*weights(), (evil, NONE)))),
        "storage-id": ("in the persistent id of a storage", first(tensor(pid(evil), shape))),
        "storage-size": ("as the size of a storage", first(store_of(name("torch", "FloatStorage"), evil))),
        "storage-kind": ("as the type of a storage", first(store_of(evil, num(9)))),
        "hooks": ("as backward hooks of a tensor", first(tensor(store, shape, None, 0, evil))),
        "metadata": ("as metadata of a tensor", first(tensor(store, shape, None, 0, ORDERED, evil))),
        "parameter": ("as hooks of a parameter",
                      first(call(name("torch._utils", "_rebuild_parameter"), tensor(store, shape), TRUE, evil))),
        "legacy-magic": ("in the first pickle of a legacy file", legacy_file(good, magic=pickled(evil))),
        "legacy-true-magic": ("before the right number in the first pickle",
                              legacy_file(good, magic=pickled(evil + POP + MAGIC[2:-1]))),
        "legacy-version": ("in the second pickle of a legacy file", legacy_file(good, version=pickled(evil))),
        "legacy-system": ("in the third pickle of a legacy file", legacy_file(good, system=pickled(evil))),
        "legacy-object": ("in the object of a legacy file", legacy_file(beside(("x", evil), legacy=True))),
        "legacy-keys": ("in place of the list of storages of a legacy file", legacy_file(good, keys=pickled(evil))),
        "legacy-key": ("in the list of storages of a legacy file",
                       legacy_file(good, keys=pickled(lst(evil, *map(text, STORAGES))))),
    }  # fmt: skip
    for slug, (what, content) in table.items():
        yield Case(f"hidden-{slug}.pt", f"a hostile call {what}", CODE, content, "posix", "LOD-001", "torch")
    # CPython's unpickler, reading from a file, lets a frame cut short what an opcode asks for; others see one long text.
    frame = b"\x95" + struct.pack("<Q", 2) + b"B" + struct.pack("<I", 0x107) + bytes(2)
    buried = (SYSTEM + text(payload.shell) + b"\x85R" + MARK).ljust(0x105, NONE)
    trick = NONE + b"V" + b"a" * (8192 * 16 - 17) + b"\n" + POP + MARK + frame + buried + POP_MARK
    several: dict[str, tuple[str, bytes, str]] = {
        "frame.pkl": ("in bytes that a lying frame cuts short", pickled(trick, 5), "pickle"),
        "frame.pt": ("likewise, in a checkpoint", torch_zip(beside() + trick + POP, protocol=5), "torch"),
        "legacy-after.pt": ("behind the values of a legacy file", legacy_file(good) + pickled(evil), ""),
        "second.pt": ("in a second pickle of data.pkl", zipped(torch_entries(pickled(beside()) + pickled(evil))), ""),
        "second.pkl": ("in a second pickle", pickled(dic()) + pickled(evil), ""),
    }  # fmt: skip
    for slug, (what, content, live) in several.items():
        yield Case(f"hidden-{slug}", f"a hostile call {what}", BROKEN, content, "", "", live)
    yield Case(
        "hidden-first.pkl", "a hostile pickle and a harmless one", CODE, pickled(evil) + pickled(dic()), "posix", "LOD-001"
    )


# --- Archives that readers disagree about ---------------------------------------------------------------------------------


def archives(payload: Payload) -> Iterator[Case]:
    """Zip archives that mean different things to different readers, or more than they should."""
    evil, good = pickled(beside(("x", call(SYSTEM, text(payload.shell))))), pickled(beside())
    whole, rest = torch_entries(good), torch_entries(good)[1:]
    good_zip, evil_zip = zipped(whole), zipped(torch_entries(evil))
    evil_entry = Entry("archive/data.pkl", evil)
    rootless = [Entry(encoded(entry.name)[8:], entry.data) for entry in rest]
    values_lie = [Entry(e.name, e.data, crc=1) if e.name == "archive/data/0" else e for e in whole]
    wide = struct.pack("<HHQQQ", 1, 24, 2**62, 2**62, 0)
    all_wide = Entry("archive/data/99", b"x", size=2**32 - 1, packed=2**32 - 1, offset=2**32 - 1, extra=wide)
    renamed = b"\1" + struct.pack("<I", zlib.crc32(b"archive/data.pkl")) + b"archive/other"
    renaming = struct.pack("<HH", 0x7075, len(renamed)) + renamed
    packed = zlib.compressobj(9, wbits=-15)
    squeezed = b"".join(packed.compress(bytes(2**20)) for _ in range(64)) + packed.flush()
    bomb = {"data": squeezed, "method": 8, "size": 2**26, "crc": zlib.crc32(bytes(2**26))}
    shared = [Entry("archive/k", seeded(2**16, "k")), *(Entry(f"archive/o{i}", offset=0, size=2**16) for i in range(500))]

    def first(**lies: Any) -> bytes:
        return zipped([Entry("archive/data.pkl", good, **lies), *rest])

    def plus(*entries: Entry, **lies: Any) -> bytes:
        return zipped([*whole, *entries], **lies)

    broken: dict[str, tuple[str, bytes | Writer]] = {
        "two-roots": ("two checkpoints in one archive, the second hostile", plus(*torch_entries(evil, root="b"))),
        "two-roots-first": ("likewise, the first hostile", zipped([*torch_entries(evil, root="a"), *whole])),
        "twice": ("data.pkl twice, the second hostile", plus(evil_entry)),
        "twice-first": ("data.pkl twice, the first hostile", zipped([evil_entry, *whole])),
        "upper-case": ("a hostile DATA.PKL, which torch takes", zipped([Entry("archive/DATA.PKL", evil), *rest])),
        "both-cases": ("data.pkl and a hostile DATA.PKL", zipped([Entry("archive/DATA.PKL", evil), *whole])),
        "other-name": ("a local header with another name", first(local="archive/data.txt")),
        "other-name-longer": ("a local header with a longer name", first(local="archive/" + "x" * 40)),
        "other-name-extra": ("another name in an extra field", first(extra=renaming)),
        "other-sizes": ("a local header with other sizes", first(claimed=7)),
        "unlisted": ("an entry that the directory does not list", zipped(whole, before=evil_zip[: len(evil) + 46])),
        "before": ("bytes before the archive", b"MZ" + bytes(510) + good_zip),
        "before-zip": ("two archives, the first hostile", evil_zip + good_zip),
        "behind-zip": ("two archives, the second hostile", good_zip + evil_zip),
        "after": ("bytes behind the archive", good_zip + bytes(64)),
        "after-pickle": ("a hostile pickle behind the archive", good_zip + evil),
        "comment": ("a hostile pickle as the archive's comment", plus(comment=evil)),
        "comment-archive": ("an archive in the comment of another", plus(comment=evil_zip)),
        "pickle-before": ("a harmless pickle before a hostile archive", pickled(dic()) + evil_zip),
        "name-parent": ("an entry archive/../../evil", plus(Entry("archive/../../evil"))),
        "name-parent-root": ("an entry ../data.pkl", plus(Entry("../data.pkl", evil))),
        "name-absolute": ("an entry /etc/evil", plus(Entry("/etc/evil"))),
        "name-backslash": ("an entry with backslashes", plus(Entry("archive\\..\\evil"))),
        "name-drive": ("an entry on drive C", plus(Entry("C:/evil"))),
        "name-nul": ("an entry with a NUL in its name", plus(Entry(b"archive/data.pkl\0.txt", evil))),
        "name-empty": ("an entry without a name", plus(Entry(""))),
        "name-long": ("an entry with a name of 60 000 letters", plus(Entry("archive/" + "x" * 60_000))),
        "bomb": ("a storage of 64 MiB of zeros deflated to 64 kB", zipped([Entry("archive/data.pkl", good), Entry("archive/data/0", **bomb), *rest[2:]])),  # noqa: E501
        "deflated": ("data.pkl deflated", zipped([deflated("archive/data.pkl", good), *rest])),
        "deflated-hostile": ("a hostile data.pkl deflated", zipped([deflated("archive/data.pkl", evil), *rest])),
        "deflate64": ("data.pkl compressed with Deflate64", first(method=9)),
        "bzip2": ("data.pkl compressed with bzip2", first(method=12)),
        "lzma": ("data.pkl compressed with LZMA", first(method=14)),
        "aes": ("data.pkl encrypted with AES", first(method=99)),
        "encrypted": ("data.pkl flagged as encrypted", zipped([Entry("archive/data.pkl", evil, flags=0x1), *rest])),
        "patched": ("data.pkl flagged as a patch", first(flags=0x20)),
        "encrypted-strong": ("data.pkl flagged as encrypted well", first(flags=0x40)),
        "encrypted-names": ("flagged as having encrypted names", first(flags=0x2000)),
        "overlap": ("500 entries that share their bytes", plus(*shared)),
        "inside": ("an entry that begins inside another", plus(Entry("archive/data/99", offset=3, packed=4, size=4))),
        "many": ("200 000 entries", many_entries),
        "count-high": ("an end that counts more entries than there are", plus(count=60_000)),
        "count-low": ("an end that counts fewer entries than there are", plus(count=1)),
        "zip64": ("sizes of 2^62 in zip64 fields", plus(all_wide)),
        "zip64-short": ("a zip64 field cut short", plus(Entry("archive/data/99", b"x", size=2**32 - 1, extra=b"\1\0\x18\0ab"))),
        "zip64-end": ("a zip64 end that points to another directory", zip64_end(good_zip, evil_zip)),
        "size": ("an entry larger than the file", first(packed=2**31, size=2**31)),
        "sizes-differ": ("a stored entry of two different sizes", first(size=len(good) + 10)),
        "offset": ("an entry that begins behind the file", first(offset=2**31)),
        "only-end": ("an end record and nothing else", good_zip[-22:]),
        "empty": ("an archive without entries", zipped([])),
        "nested": ("a hostile checkpoint in an archive", zipped([Entry("model.pt", evil_zip)])),
        "nested-data": ("an archive as data.pkl", zipped([Entry("archive/data.pkl", evil_zip), *rest])),
        "data-missing": ("an archive without data.pkl", zipped(rest)),
        "data-folder": ("an archive whose data.pkl is a folder", zipped([Entry("archive/data.pkl/x", evil), *rest])),
        "deep": ("data.pkl six folders down", zipped([Entry("a/b/c/d/e/f/data.pkl", evil), *rest])),
        "big-endian": ("a big-endian checkpoint", zipped([whole[0], Entry("archive/byteorder", b"big"), *whole[2:]])),
        **{f"cut-{n}": (f"cut off after {n} bytes", good_zip[:n]) for n in (4, 22, 1000, len(good_zip) - 60)},
        "cut-1": ("one byte missing", good_zip[:-1]),
    }  # fmt: skip
    live = ("upper-case", "deflated-hostile")  # torch itself refuses most of the others
    for slug, (what, content) in broken.items():
        fires = "torch" if slug in live else ""
        yield Case(f"zip-{slug}.pt", what, BROKEN, content, live=fires, heavy=slug == "many")
    others: dict[str, tuple[str, bytes, Codes]] = {
        "checksum": ("a wrong checksum of harmless data.pkl", first(crc=1), TOLD),
        "checksum-values": ("a wrong checksum of values", zipped(values_lie), TOLD),
        "no-checksums": ("checksums switched off, as torch can", zipped(Entry(e.name, e.data, crc=0) for e in whole), FINE),
        "no-root": ("entries without a folder", zipped([Entry("data.pkl", good), *rootless]), BROKEN),
        "extra-entry": ("an entry that torch does not know", plus(Entry("archive/extra.py", payload.python.encode())), FINE),
        "extra-bomb": ("an entry that nobody unpacks", plus(Entry("archive/extra", **bomb)), FINE),
        "name-newline": ("an entry with a line break in its name", plus(Entry("archive/a\nb")), FINE),
        "name-escape": ("an entry with a terminal code in its name", plus(Entry("archive/\x1b[31mred")), FINE),
        "name-bytes": ("an entry whose name is not UTF-8", plus(Entry(b"archive/\xff\xfe")), FINE),
    }  # fmt: skip
    for slug, (what, content, codes) in others.items():
        yield Case(f"zip-{slug}.pt", what, codes, content, "", "LOD-007" if codes == TOLD else "")
    wrong = zipped([Entry("archive/data.pkl", evil, crc=1), *rest])
    yield Case("zip-checksum-hostile.pt", "a wrong checksum of hostile data.pkl", CODE, wrong, "posix", "LOD-001", "torch")
    yield Case("zip-pickle-first.pt", "a hostile pickle before a good archive", CODE, evil + good_zip, "posix", "LOD-001")


def zip64_end(good: bytes, evil: bytes) -> bytes:
    """Return two archives with an end each: the ordinary end names the first one's directory, the zip64 end the second's."""
    count, _, size, start = struct.unpack("<HHII", good[-14:-2])
    other_count, _, other_size, other_start = struct.unpack("<HHII", evil[-14:-2])
    record = struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, other_count, other_count, other_size, len(good) - 22 + other_start)
    body = good[:-22] + evil[:-22]
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, len(body), 1)
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, count, count, size, start, 0)
    return body + b"PK\x06\x06" + record + locator + end


def many_entries(path: Path) -> None:
    """Write an archive of 200 000 empty entries."""
    count = 200_000
    names = [f"{i:05x}".encode() for i in range(count)]
    header = struct.pack("<HHHHIII", 0, 0, 0, 0x21, 0, 0, 0)
    body = b"".join(b"PK\x03\x04\x14\x00" + header + b"\x05\x00\x00\x00" + label for label in names)
    rest = struct.pack("<HHHHHI", 5, 0, 0, 0, 0, 0)
    rows = (b"PK\x01\x02\x14\x00\x14\x00" + header + rest + struct.pack("<I", 40 * i) + label for i, label in enumerate(names))
    directory = b"".join(rows)
    wide = struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, len(directory), len(body))
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, len(body) + len(directory), 1)
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, len(directory), len(body), 0)
    path.write_bytes(body + directory + b"PK\x06\x06" + wide + locator + end)


# --- Tensors that claim what their bytes cannot hold ----------------------------------------------------------------------


def tensors() -> Iterator[Case]:
    """Tensors that lie, in good archives and in legacy files."""
    store, shape = storage("0", 9), (1, 1, 3, 3)
    v2, v3 = name("torch._utils", "_rebuild_tensor_v2"), name("torch._utils", "_rebuild_tensor_v3")
    untyped = storage("0", 36, "UntypedStorage")
    double = (num(0), tup(num(9)), tup(num(1)), FALSE, ORDERED, name("torch", "float64"))
    float_kind = name("torch", "FloatStorage")
    lies: dict[str, tuple[str, bytes]] = {
        "view-bomb": ("10^9 elements in four bytes, stride 0", tensor(store, (10**9,), (0,))),
        "view-bomb-2d": ("10^12 elements, stride 0", tensor(store, (10**6, 10**6), (0, 0))),
        "offset-negative": ("a negative offset", tensor(store, shape, None, -4)),
        "offset-high": ("an offset behind the storage", tensor(store, shape, None, 10**6)),
        "offset-huge": ("an offset of 2^63", tensor(store, shape, None, 2**63)),
        "stride-overflow": ("strides of 2^62", tensor(store, (2, 2), (2**62, 2**62))),
        "stride-negative": ("a negative stride", tensor(store, (3, 3), (-3, 1), 8)),
        "stride-missing": ("fewer strides than sizes", tensor(store, (3, 3), (1,))),
        "shape-negative": ("a negative size", tensor(store, (-3, -3), (3, 1))),
        "shape-overflow": ("sizes whose product overflows to 0", tensor(store, (2**32, 2**32), (1, 1))),
        "shape-too-large": ("more elements than the storage", tensor(store, (10, 10))),
        "shape-text": ("a text as a size", call(v2, store, num(0), tup(text("9")), tup(num(1)), FALSE, ORDERED)),
        "shape-long": ("a hundred thousand sizes", tensor(store, (1,) * 100_000, (1,) * 100_000)),
        "arguments-missing": ("a tensor without arguments", call(v2)),
        "arguments-wrong": ("a tensor of a number", call(v2, num(3), NONE, NONE, NONE)),
        "storage-short": ("a storage larger than its entry", tensor(storage("0", 10**6), (10**6,))),
        "storage-negative": ("a storage of -1 elements", tensor(storage("0", -1), (0,))),
        "storage-huge": ("a storage of 2^62 elements", tensor(storage("0", 2**62), (2**62,))),
        "storage-missing": ("a storage that is not there", tensor(storage("99", 9), shape)),
        "storage-traversal": ("a storage named ../../etc/passwd", tensor(storage("../../../../../../etc/passwd", 9), shape)),
        "storage-absolute": ("a storage named /etc/passwd", tensor(storage("/etc/passwd", 9), shape)),
        "storage-unknown": ("a storage of an unknown type", tensor(storage("0", 9, "EvilStorage"), shape)),
        "storage-double": ("float64 on the bytes of float32", tensor(storage("0", 9, "DoubleStorage"), shape)),
        "storage-empty-id": ("an empty persistent id", tensor(EMPTY + b"Q", shape)),
        "storage-text-id": ("a text as persistent id", tensor(text("storage") + b"Q", shape)),
        "storage-other-id": ("a persistent id of another kind", tensor(pid(text("module"), NONE, NONE), shape)),
        "storage-list-key": ("a list as the key of a storage",
                             tensor(pid(text("storage"), float_kind, lst(), text("cpu"), num(9)), shape)),
        "storage-is-a-list": ("a list as storage", tensor(lst(num(1)), shape)),
        "dtype-lies": ("float64 on half the bytes", call(v3, untyped, *double)),
        "dtype-is-text": ("a text as type", call(v3, untyped, *double[:-1], text("float64"))),
    }  # fmt: skip
    for slug, (what, expression) in lies.items():
        yield Case(f"tensor-{slug}.pt", what, BROKEN, torch_zip(dic(*weights(first=expression))))
    big = {"0": bytes(2**20)}
    views = dic(*((f"w{i}", tensor(storage("0", 2**18), (2**18,))) for i in range(1000)))
    yield Case("tensor-many-views.pt", "1000 names for one storage of 1 MiB", BROKEN, torch_zip(views, big))
    good = beside(legacy=True)
    whole = legacy_file(good)

    def listing(*keys: str) -> bytes:
        return pickled(lst(*map(text, keys)))

    nine = struct.pack("<q", 9) + STORAGES["0"]
    legacy: dict[str, tuple[str, bytes]] = {
        "missing": ("whose last storage is missing", legacy_file(good, keys=listing(*STORAGES, "99"))),
        "unlisted": ("that does not list a storage", legacy_file(good, keys=listing(*list(STORAGES)[1:]))),
        "twice": ("that lists a storage twice", legacy_file(good, STORAGES | {"z": nine[8:]}, keys=listing(*STORAGES, "0"))),
        "huge": ("whose storage says it has 2^60 values", whole.replace(nine, struct.pack("<q", 2**60) + nine[8:])),
        "negative": ("whose storage says it has -1 values", whole.replace(nine, struct.pack("<q", -1) + nine[8:])),
        "version": ("of another version", legacy_file(good, version=pickled(num(1002)))),
        **{f"cut-{n}": (f"cut off after {n} bytes", whole[:n]) for n in (13, len(MAGIC), len(whole) // 2, len(whole) - 3)},
    }  # fmt: skip
    for slug, (what, content) in legacy.items():
        yield Case(f"tensor-legacy-{slug}.pt", f"a legacy file {what}", BROKEN, content)
    longer = torch_zip(dic(*weights()), STORAGES | {"0": STORAGES["0"] + bytes(40)})
    yield Case("tensor-storage-long.pt", "a storage smaller than its entry", BROKEN, longer)
    infinite = torch_zip(dic(*weights()), {**STORAGES, "0": struct.pack("<9f", *[math.inf] * 9)})
    yield Case("tensor-infinite.pt", "weights that are infinite", TOLD, infinite, "infinite", "LOD-008")
    nan = torch_zip(dic(*weights()), {**STORAGES, "4": struct.pack("<f", math.nan)})
    yield Case("tensor-nan.pt", "weights that are NaN", TOLD, nan, "NaN", "LOD-008")
    unknown = torch_zip(dic(("a", tensor(store, (9,)))))
    yield Case("tensor-unknown-network.pt", "weights of no known network", NO_NETWORK, unknown, "no known architecture")
    nothing = torch_zip(dic(("a", num(1))), {})
    yield Case("tensor-none.pt", "a checkpoint without weights", BROKEN, nothing, "state dict")


# --- Bombs ----------------------------------------------------------------------------------------------------------------


def bombs() -> Iterator[Case]:
    """Pickles small on disk that would take time or memory, and streams that make no sense."""
    lists = b"".join(b"q" + bytes([i]) + POP + b"](" + (b"h" + bytes([i])) * 10 + b"e" for i in range(40))
    sequential = name("torch.nn.modules.container", "Sequential") + EMPTY + NEWOBJ

    def module(children: bytes) -> bytes:
        return sequential + dic(("_parameters", dic()), ("_buffers", dic()), ("_modules", children)) + BUILD

    deep_module = module(dic())
    for _ in range(200):
        deep_module = module(dic(("0", deep_module)))
    doubled = module(dic())
    for _ in range(40):
        doubled = MARK + doubled + b"q\x01" + POP_MARK + module(dic(("0", b"h\x01"), ("1", b"h\x01")))
    own_module = sequential + b"q\x00" + dic(("_parameters", dic()), ("_modules", dic(("0", b"h\x00")))) + BUILD
    million_keys = b"}(" + b"".join(b"J" + i.to_bytes(4, "little") + b"N" for i in range(10**6)) + b"u"
    many, most = 50_000, 10**6
    heavy: dict[str, tuple[str, bytes]] = {
        "most-tuples": ("tuples a million deep", NONE + b"\x85" * most),
        "most-lists": ("lists half a million deep", b"]" * (most // 2) + b"a" * (most // 2 - 1)),
        "most-marks": ("a million marks", MARK * most + NONE),
        "most-deep-key": ("a dict key of a million tuples", b"}" + NONE + b"\x85" * most + NONE + b"s"),
        "module-laughs": ("a network of 2^40 layers", doubled),
        "keys": ("a dict of a million keys", million_keys),
        "endless": ("four million opcodes", b"N0" * 2_000_000 + NONE),
    }  # fmt: skip
    table: dict[str, tuple[str, bytes]] = {
        "tuples": ("tuples 50 000 deep", NONE + b"\x85" * many),
        "lists": ("lists 50 000 deep", b"]" * many + b"a" * (many - 1)),
        "dicts": ("dicts 50 000 deep", (b"}" + text("model")) * many + NONE + b"s" * many),
        "marks": ("50 000 marks", MARK * many + NONE),
        "laughs": ("a tuple that doubles 60 times", tup(text("a")) + (DUP + b"\x86") * 60),
        "laughs-key": ("the same as the key of a dict", b"}" + tup(text("a")) + (DUP + b"\x86") * 60 + NONE + b"s"),
        "laughs-lists": ("lists of ten lists, 40 levels", b"]" + lists),
        "deep-key": ("a dict key of 50 000 tuples", b"}" + NONE + b"\x85" * many + NONE + b"s"),
        "ring": ("a list that holds itself", b"]q\x00h\x00a"),
        "ring-state": ("a dict that is its own state dict", b"}q\x00" + text("state_dict") + b"h\x00s"),
        "module-ring": ("a network that contains itself", own_module),
        "module-deep": ("200 networks one in the other", deep_module),
        "put": ("a memo index of 2^63", NONE + b"p9223372036854775808\n"),
        "put-long": ("a memo index of 2^32 - 1", NONE + b"r\xff\xff\xff\xff"),
        "get": ("a memo entry that is not there", b"h\x07"),
        "frame": ("a frame of 2^63 bytes", b"\x95" + struct.pack("<Q", 2**63) + NONE),
        "bytes": ("2^60 bytes that are not there", b"\x8e" + struct.pack("<Q", 2**60)),
        "text": ("2^60 letters that are not there", b"\x8d" + struct.pack("<Q", 2**60)),
        "bytearray": ("a bytearray of 2^60 bytes", b"\x96" + struct.pack("<Q", 2**60)),
        "long-negative": ("a number of -1 bytes", b"\x8b\xff\xff\xff\xff"),
        "digits": ("a number of a million digits", b"I" + b"9" * 10**6 + b"\n"),
        "digits-long": ("a LONG of a million digits", b"L" + b"9" * 10**6 + b"L\n"),
        "underflow": ("a stack that runs empty", POP * 4),
        "no-mark": ("a tuple without its mark", b"t"),
        "no-stop": ("no end", NONE),
        "name-cut": ("a global without its second line", b"ctorch"),
        "odd": ("a dict of three things", b"}(NNNu"),
        "unknown-opcode": ("an opcode that does not exist", b"\xff"),
        "not-utf8": ("text that is not UTF-8", b"X\2\0\0\0\xff\xfe"),
        "unhashable": ("a list as the key of a dict", b"}]Ns"),
        "build-nothing": ("BUILD on nothing", BUILD),
        "reduce-number": ("a call of a number", num(3) + EMPTY + REDUCE),
        "append-number": ("an append to a number", num(3) + NONE + b"a"),
        "buffer": ("an out-of-band buffer", b"\x97"),
        "protocol": ("protocol 255", b"\x80\xff" + NONE),
    }  # fmt: skip
    for slug, (what, expression) in (table | heavy).items():
        data = pickled(expression, 4)[: -1 if slug in ("no-stop", "name-cut") else None]
        bare = slug in ("endless", "keys", "digits-long", "lists", "most-lists")
        content = data if bare else zipped(torch_entries(data))
        codes = CODE if slug == "reduce-number" else BROKEN  # what is called is computed
        yield Case(f"bomb-{slug}.{'pkl' if bare else 'pt'}", what, codes, content, heavy=slug in heavy)
    ring = beside(("x", b"]q\x00h\x00a"))
    yield Case("bomb-ring-beside.pt", "good weights beside a list that holds itself", FINE, torch_zip(ring))
    gigabytes, megabytes = 2**30, 2**20
    long_bytes = b"\x80\x04\x8e" + struct.pack("<Q", 3 * gigabytes)
    long_number = b"\x80\x02\x8b" + struct.pack("<i", 200 * megabytes)
    files: dict[str, tuple[str, Writer]] = {
        "line.pkl": ("a line of 3 GB", sparse(b"\x80\x02c", 3 * gigabytes)),
        "bytes.pkl": ("bytes of 3 GB", sparse(long_bytes, 3 * gigabytes + len(long_bytes) + 1, STOP)),
        "number.pkl": ("a number of 200 MB", sparse(long_number, 200 * megabytes + len(long_number) + 2, b"\x01.")),
        "zip.pt": ("an archive of nine gigabytes", sparse(b"PK\x03\x04", 9 * gigabytes)),
        "pickle.pt": ("a pickle of nine gigabytes", sparse(MAGIC, 9 * gigabytes)),
    }  # fmt: skip
    for slug, (what, write) in files.items():
        yield Case(f"bomb-sparse-{slug}", f"{what}, nearly all of it a hole in the file", BROKEN, write, heavy=True)
    what = "a weight of 256 MB, a hole in the file, of no known network"
    yield Case("bomb-sparse-legacy.pt", what, NO_NETWORK, sparse_legacy, heavy=True)


def sparse(head: bytes, size: int, tail: bytes = b"") -> Writer:
    """Return what writes a file of zeros between ``head`` and ``tail`` that takes no room on the disk."""

    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(head)
            file.truncate(size)
            file.seek(size - len(tail))
            file.write(tail)

    return write


def sparse_legacy(path: Path) -> None:
    """Write a legacy checkpoint with one weight of 256 MiB."""
    count = 2**26
    one = dic(("w", tensor(storage("0", count, legacy=True), (2**13, 2**13))))
    head = legacy_file(one, {}, keys=pickled(lst(text("0")))) + struct.pack("<q", count)
    sparse(head, len(head) + 4 * count)(path)


# --- Safetensors and ONNX -------------------------------------------------------------------------------------------------


def framed(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file with any header."""
    return struct.pack("<Q", either(length, len(header))) + header + data


def safetensors(keys: Iterable[str] = SHAPES, **more: Any) -> bytes:
    """Return weights of the small network as safetensors; ``more`` goes into the header."""
    header, data = dict(more), b""
    for key in keys:
        values = floats(key)
        header[key] = {"dtype": "F32", "shape": list(SHAPES[key]), "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    return framed(json.dumps(header).encode(), data)


def safetensors_cases() -> Iterator[Case]:
    """Safetensors files that lie."""
    spec = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

    def one(**fields: Any) -> bytes:
        return framed(json.dumps({"a": {**spec, **fields}}).encode(), bytes(8))

    good, two = safetensors(), json.dumps({"a": spec, "b": spec}).encode()
    digits = b'{"a":{"dtype":"F32","shape":[' + b"9" * 100_000 + b'],"data_offsets":[0,8]}}'
    mega, hole = 200 * 2**20, json.dumps({"a": {**spec, "data_offsets": [8, 16]}}).encode()
    twice = json.dumps({"a": spec, "b": {**spec, "shape": [1]}}).encode().replace(b'"b"', b'"a"')
    table: dict[str, tuple[str, bytes | Writer]] = {
        "length-huge": ("a header of 2^63 bytes", framed(b'{"a":1}', length=2**63)),
        "length-max": ("a header of 2^64 - 1 bytes", framed(b'{"a":1}', length=2**64 - 1)),
        "length-high": ("a header longer than the file", framed(b'{"a":1}', length=100)),
        "length-zero": ("an empty header", framed(b"", b"{}", length=0)),
        "header-sparse": ("a header of 200 MB, a hole in the file", sparse(struct.pack("<Q", mega) + b"{", mega + 8)),
        "header-spaces": ("a header of spaces", framed(b"{" + b" " * 100_000 + b"}")),
        "overlap": ("two tensors that share their bytes", framed(two, bytes(8))),
        "hole": ("bytes that belong to no tensor", framed(hole, bytes(16))),
        "trailing": ("a pickle behind the values", good + pickled(NONE)),
        "cut": ("cut off", good[:-5]),
        "outside": ("offsets behind the file", one(data_offsets=[0, 2**40], shape=[2**38])),
        "backwards": ("offsets that end before they begin", one(data_offsets=[8, 0])),
        "negative": ("negative offsets", one(data_offsets=[-8, 0])),
        "shape-negative": ("a negative size", one(shape=[-2])),
        "shape-overflow": ("sizes whose product overflows", one(shape=[2**32, 2**32])),
        "shape-text": ("a text as a size", one(shape=["2"])),
        "dtype": ("an unknown type", one(dtype="EVIL")),
        "dtype-number": ("a number as a type", one(dtype=7)),
        "dtype-wide": ("a type of another size", one(dtype="F64")),
        "twice": ("one key twice", framed(twice, bytes(8))),
        "deep": ("JSON 100 000 deep", framed(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")),
        "not-utf8": ("a header that is not UTF-8", framed(b'{"\xff\xfe":1}')),
        "not-json": ("a header that is not JSON", framed(b"{garbage}")),
        "list": ("a list as header", framed(b"[1,2,3]")),
        "missing": ("a tensor without a type", framed(b'{"a":{"shape":[2],"data_offsets":[0,8]}}', bytes(8))),
        "digits": ("a size of 100 000 digits", framed(digits, bytes(8))),
        "metadata": ("metadata that are not text", safetensors(__metadata__={"a": 1})),
        "empty": ("no tensors", framed(b"{}")),
    }  # fmt: skip
    for slug, (what, content) in table.items():
        yield Case(f"safetensors-{slug}.safetensors", what, BROKEN, content)
    empty = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(30_000)}
    yield Case(
        "safetensors-many.safetensors", "30 000 empty tensors", NO_NETWORK, framed(json.dumps(empty).encode()), heavy=True
    )


def proto(number: int, value: int | bytes | str) -> bytes:
    """Return one protobuf field."""

    def varint(n: int) -> bytes:
        out = bytearray()
        while n > 127:
            out.append(n & 127 | 128)
            n >>= 7
        return bytes([*out, n])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(encoded(value))) + encoded(value)


def onnx_value(label: str, *dims: int) -> bytes:
    """Return a ValueInfoProto of float32."""
    shape = b"".join(proto(1, proto(1, dim)) for dim in dims)
    return proto(1, label) + proto(2, proto(1, proto(1, 1) + proto(2, shape)))


def onnx_tensor(location: str | None = None) -> bytes:
    """Return a TensorProto of two floats, inside the file or at ``location``."""
    head = proto(1, 2) + proto(2, 1) + proto(8, "w")
    if location is None:
        return head + proto(9, bytes(8))
    pairs = (("location", location), ("offset", "0"), ("length", "8"))
    return head + b"".join(proto(13, proto(1, key) + proto(2, value)) for key, value in pairs) + proto(14, 1)


def onnx_model(*initializers: bytes, attribute: bytes = b"") -> bytes:
    """Return a ModelProto that adds a vector to its input."""
    add = proto(1, "x") + proto(1, "w") + proto(2, "y") + proto(4, "Add") + (proto(5, attribute) if attribute else b"")
    graph = proto(1, add) + proto(2, "g") + b"".join(proto(5, one) for one in initializers)
    graph += proto(11, onnx_value("x", 1, 2)) + proto(12, onnx_value("y", 1, 2))
    return proto(1, 8) + proto(2, "made by hand") + proto(7, graph) + proto(8, proto(1, "") + proto(2, 17))


def onnx_cases() -> Iterator[Case]:
    """ONNX files, most of which point elsewhere."""
    good = onnx_model(onnx_tensor())
    yield Case("onnx-good.onnx", "a network in ONNX", NO_NETWORK, good, "ONNX")
    outside = onnx_tensor("../secret.bin")
    models: dict[str, bytes] = {
        "parent": onnx_model(outside),
        "parents": onnx_model(onnx_tensor("../../../../../../../../etc/passwd")),
        "absolute": onnx_model(onnx_tensor("/etc/passwd")),
        "dots-inside": onnx_model(onnx_tensor("a/../../secret.bin")),
        "backslash": onnx_model(onnx_tensor("..\\secret.bin")),
        "drive": onnx_model(onnx_tensor("C:\\secret.bin")),
        "link": onnx_model(onnx_tensor("secret-link.bin")),
        "link-folder": onnx_model(onnx_tensor("root-link/etc/passwd")),
        "attribute": onnx_model(attribute=proto(1, "value") + proto(5, outside) + proto(20, 4)),
        "subgraph": onnx_model(attribute=proto(1, "body") + proto(6, proto(2, "g") + proto(5, outside)) + proto(20, 5)),
    }
    for slug, content in models.items():
        yield Case(f"onnx-{slug}.onnx", f"weights outside the folder: {slug}", TOLD, content, "", "LOD-009")
    graph = proto(2, "g")
    for _ in range(3000):
        graph = proto(1, proto(4, "If") + proto(5, proto(1, "b") + proto(6, graph) + proto(20, 5)))
    yield Case("onnx-deep.onnx", "3000 graphs one in the other", BROKEN, proto(1, 8) + proto(7, graph))
    yield Case("onnx-cut.onnx", "cut off", BROKEN, good[:-20])
    yield Case("onnx-length.onnx", "a graph of 2^60 bytes", BROKEN, proto(1, 8) + b"\x3a" + b"\x80" * 8 + b"\x10")
    yield Case("onnx-noise.onnx", "noise", BROKEN, b"\x08\x08" + seeded(4000, "onnx"))


# --- Programs and other formats -------------------------------------------------------------------------------------------


def programs(payload: Payload) -> Iterator[Case]:
    """Files that are programs: reading them means running them."""
    evil = pickled(call(SYSTEM, text(payload.shell)))
    script = [*torch_entries(evil), Entry("archive/constants.pkl", evil)]
    compiled = [
        Entry("m/archive_format", b"pt2"),
        Entry("m/archive_version", b"0"),
        Entry("m/data/aotinductor/m/m.so", b"\x7fELF"),
    ]
    table: dict[str, tuple[str, bytes | Writer, str]] = {
        "script.pt": ("TorchScript", write_script, ""),
        "script-hostile.pt": ("TorchScript with a hostile pickle", zipped(script), ""),
        "export.pt2": ("torch.export", write_export, ""),
        "export-hostile.pt2": ("torch.export with hostile inputs (CVE-2026-4538)",
                               lambda path: write_export(path, "data/sample_inputs/model.pt", evil), "export"),
        "export-weights.pt2": ("torch.export with a hostile weight",
                               lambda path: write_export(path, "data/weights/weight_0", evil), ""),
        "package.pt": ("torch.package with code", lambda path: write_package(path, payload.python), ""),
        "inductor.pt2": ("an AOTInductor archive", zipped(compiled), ""),
    }  # fmt: skip
    for slug, (what, content, live) in table.items():
        yield Case(f"program-{slug}", what, CODE, content, "sandbox", "LOD-004", live)
    for label, function in (("joblib.numpy_pickle", "NumpyArrayWrapper"), ("dill._dill", "_create_code")):
        content = pickled(call(name(label, function), text(payload.shell)))
        yield Case(f"program-{label.partition('.')[0]}.pkl", f"a pickle of {label}", CODE, content, function, "LOD-001")


def linear() -> Any:
    """Return a layer to make programs of."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Linear(2, 2)


def write_script(path: Path) -> None:
    """Write TorchScript."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(linear(), torch.zeros(1, 2)), str(path))


@functools.cache
def exported() -> bytes:
    """Return a program of torch.export."""
    import torch

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(linear(), (torch.zeros(1, 2),)), buffer)
    return buffer.getvalue()


def write_export(path: Path, replaced: str = "?", evil: bytes = b"") -> None:
    """Write a program of torch.export, perhaps with one entry replaced by a pickle."""
    with zipfile.ZipFile(io.BytesIO(exported())) as archive:
        entries = [Entry(label, evil if label.endswith(replaced) else archive.read(label)) for label in archive.namelist()]
    path.write_bytes(zipped(entries))


def write_package(path: Path, python: str) -> None:
    """Write a torch.package whose module runs when it is imported."""
    from torch.package.package_exporter import PackageExporter

    buffer = io.BytesIO()
    with PackageExporter(buffer) as package:
        package.save_source_string("evil", python)
        package.save_pickle("model", "model.pkl", {"a": 1})
    path.write_bytes(buffer.getvalue())


def tar(members: Mapping[str, bytes]) -> bytes:
    """Return a tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for label, content in members.items():
            member = tarfile.TarInfo(label)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def formats(payload: Payload) -> Iterator[Case]:
    """Other formats, and names that lie about the format."""
    run = call(SYSTEM, text(payload.shell))
    evil, evil_zip = pickled(run), torch_zip(beside(("x", run)))
    for suffix in ("safetensors", "onnx", "json", "npz", "h5"):
        what = f"a hostile checkpoint named .{suffix}"
        yield Case(f"format-zip.{suffix}", what, CODE, evil_zip, "posix", "LOD-001")
    yield Case("format-pickle.safetensors", "a hostile pickle named .safetensors", CODE, evil, "posix", "LOD-001", "pickle")
    # Read as a length, its first eight bytes are 4.6 MB, and the ninth is "{": so begins a safetensors file.
    both = b"\x80\x02G" + bytes(5) + b"{{{" + POP + run + STOP
    what = "a hostile pickle that begins like safetensors"
    yield Case("format-both.pt", what, BROKEN, sparse(both, 5 * 2**20), live="pickle")
    layer = {"class_name": "Lambda", "config": {"function": {"class_name": "__lambda__", "config": {"code": "4wEAAAA="}}}}
    keras = json.dumps({"module": "keras", "class_name": "Sequential", "config": {"layers": [layer]}}).encode()
    hdf = b"\x89HDF\r\n\x1a\n" + bytes(200) + b"model_config" + keras + bytes(64)
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + evil
    served = json.dumps({"model": {"modelName": "m", "serializedFile": "m.pt", "handler": "handler.py"}}).encode()
    table: dict[str, tuple[str, bytes]] = {
        "lambda.keras": ("a Keras network with a Lambda layer", zipped([Entry("metadata.json", b"{}"), Entry("config.json", keras), Entry("model.weights.h5", hdf)])),  # noqa: E501
        "lambda.h5": ("an HDF5 file with a Lambda layer", hdf),
        "served.mar": ("a TorchServe archive with a handler", zipped([Entry("MAR-INF/MANIFEST.json", served), Entry("handler.py", payload.python.encode()), Entry("m.pt", evil_zip)])),  # noqa: E501
        "joblib-zlib.joblib": ("a deflated pickle", zlib.compress(evil)),
        "joblib.gz": ("a pickle in gzip", gzip.compress(evil, mtime=0)),
        "joblib.bz2": ("a pickle in bzip2", bz2.compress(evil)),
        "joblib.xz": ("a pickle in xz", lzma.compress(evil)),
        "joblib.lzma": ("a pickle in lzma", lzma.compress(evil, format=lzma.FORMAT_ALONE)),
        "tar.pt": ("torch's oldest format, hostile", tar(dict.fromkeys(("sys_info", "pickle", "tensors", "storages"), evil))),
        "nemo.nemo": ("a compressed tar", gzip.compress(tar({"model_weights.ckpt": evil_zip}), mtime=0)),
        "image.pth": ("a picture named .pth", b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + bytes(13)),
        "gguf.gguf": ("GGUF", b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63)),
        "7z.7z": ("the beginning of a 7z archive", b"7z\xbc\xaf\x27\x1c" + bytes(100)),
        "rar.rar": ("the beginning of a rar archive", b"Rar!\x1a\x07\x01\x00" + bytes(100)),
        "elf.so": ("a shared library", b"\x7fELF\x02\x01\x01" + bytes(100)),
        "python.pt": ("Python source", f"import os\nos.system({payload.shell!r})\n".encode()),
        "html.pt": ("a web page instead of a download", b"<!DOCTYPE html><html>Not found</html>"),
        "lfs.pt": ("a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
        "json.json": ("JSON", b'{"a": 1}'),
        "objects.npy": ("a numpy array of objects", npy),
        "objects.npz": ("a numpy archive of objects", zipped([Entry("x.npy", npy)])),
        "tf.pb": ("a TensorFlow graph", proto(1, proto(1, "a") + proto(2, "PyFunc")) * 3),
        "flatbuffer.tflite": ("a TensorFlow Lite file", b"\x1c\0\0\0TFL3" + bytes(100)),
        "empty.pt": ("an empty file", b""),
        "byte.pt": ("one byte", b"\x80"),
        "two.pt": ("two bytes", b"PK"),
        "noise.pt": ("noise", b"\x01" + seeded(5000, "noise")),
        "zeros.pt": ("zeros", bytes(5000)),
    }  # fmt: skip
    for slug, (what, content) in table.items():
        yield Case(f"format-{slug}", what, BROKEN, content)


def special(payload: Payload) -> Iterator[Case]:
    """Things that are not files, names that are not nice, and texts in files that want to be printed."""
    evil = torch_zip(beside(("x", call(SYSTEM, text(payload.shell)))))
    table: dict[str, tuple[str, Writer]] = {
        "folder": ("an empty folder", Path.mkdir),
        "fifo": ("a named pipe, which would wait for ever", lambda path: os.mkfifo(path)),
        "zero": ("a link to /dev/zero", lambda path: path.symlink_to("/dev/zero")),
        "nowhere": ("a link to nothing", lambda path: path.symlink_to("nothing")),
        "circle": ("a link to itself", lambda path: path.symlink_to(path.name)),
        "missing": ("a file that is not there", lambda path: None),
    }  # fmt: skip
    for slug, (what, write) in table.items():
        yield Case(f"special-{slug}.pt", what, BROKEN, write)
    for label in ("line\nbreak", "\x1b[31mred\x1b[2J", "x" * 195, "%s{0}[bold]", "right\u202eleft"):
        yield Case(f"name-{label}.pt", f"a name with {label[:20]!a}", CODE, evil, "posix", "LOD-001")
    yield Case("name-broken\n\x1b[2J.pt", "a broken file with a line break in its name", BROKEN, b"nothing")
    ugly = "\x1b[2J\x1b[31m\r\nsecateur: error: [bold]all is well[/bold]\u202e\0"
    nine = tensor(storage("0", 9), (9,))
    key = torch_zip(dic((ugly, nine)))
    stacked = short(ugly) + short(ugly) + STACK_GLOBAL
    shown: dict[str, tuple[str, Codes, bytes, str]] = {
        "value.pt": ("a text beside the weights", FINE, torch_zip(beside(("arch", text(ugly)), ("epoch", text(ugly)))), ""),
        "fact.pt": ("the name of a text beside the weights", FINE, torch_zip(beside((ugly, num(1)))), ""),
        "long.pt": ("a text of a million letters", FINE, torch_zip(beside(("arch", text("x" * 10**6)))), ""),
        "digits.pt": ("a number of 5000 digits", FINE, torch_zip(beside(("epoch", b"\x8b" + struct.pack("<i", 2100) + bytes(2099) + b"\x01"))), ""),  # noqa: E501
        "key.pt": ("the name of a weight", NO_NETWORK, key, ""),
        "key-long.pt": ("a weight with a name of a million letters", BROKEN, torch_zip(dic(("x" * 10**6, nine))), ""),
        "global.pt": ("the name of a class", FINE, torch_zip(beside(("x", stacked))), "LOD-002"),
        "surrogate.pt": ("half a letter", FINE, torch_zip(beside(("arch", b"Vx\\ud800\n"))), ""),
        "metadata.safetensors": ("safetensors metadata", FINE, safetensors(__metadata__={ugly: ugly}), ""),
        "tensor.safetensors": ("the name of a safetensors tensor", NO_NETWORK, framed(json.dumps({ugly: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode(), bytes(8)), ""),  # noqa: E501
    }  # fmt: skip
    for slug, (what, codes, content, rule) in shown.items():
        yield Case(f"print-{slug}", f"terminal codes and line breaks, or too much: {what}", codes, content, "", rule)


# --- Folders --------------------------------------------------------------------------------------------------------------


def folder(files: Mapping[str, bytes | str]) -> Writer:
    """Return what writes a folder of files; a text makes a link."""

    def write(path: Path) -> None:
        path.mkdir()
        for label, content in files.items():
            if isinstance(content, str):
                (path / label).symlink_to(content)
            else:
                (path / label).write_bytes(content)

    return write


def folders(payload: Payload) -> Iterator[Case]:
    """Bundles and Hugging Face folders."""
    good = safetensors()
    evil = torch_zip(dic(*weights(), ("x", call(SYSTEM, text(payload.shell)))))
    kwargs = {"width": 1, "classes": 2, "in_channels": 1}
    network: dict[str, Any] = {"name": "convnet", "kwargs": kwargs, "factory": None}
    shape = {"shape": [1, 32, 32], "mean": [0.0], "std": [1.0]}
    rest = {"channels": {}, "masks": None, "wrappers": [], "quant": None, "steps": [], "ancestor_sha256": None}
    whole = {"format": 1, "arch": network, "input": shape, "classes": ["a", "b"], **rest}
    plain, huge = json.dumps(whole).encode(), 10**9

    def bundle(**changes: Any) -> dict[str, bytes | str]:
        return {"arch.json": json.dumps({**whole, **changes}).encode(), "model.safetensors": good}

    def named(**fields: Any) -> dict[str, bytes | str]:
        return bundle(arch={**network, **fields})

    def with_json(content: bytes | str) -> dict[str, bytes | str]:
        return {"arch.json": content, "model.safetensors": good}

    def with_weights(content: bytes | str) -> dict[str, bytes | str]:
        return {"arch.json": plain, "model.safetensors": content}

    bundles: dict[str, tuple[str, dict[str, bytes | str]]] = {
        "width": ("a network a thousand million channels wide", named(kwargs={**kwargs, "width": huge})),
        "width-text": ("a width that is text", named(kwargs={**kwargs, "width": "1"})),
        "width-other": ("a width that the weights do not have", named(kwargs={**kwargs, "width": 2})),
        "name": ("a network named ../../x", named(name="../../x")),
        "name-code": ("a network named os.system", named(name="os.system")),
        "kwargs": ("an unknown argument", named(kwargs={"__class__": 1})),
        "shape": ("pictures of 10^9 by 10^9", bundle(input={**shape, "shape": [1, huge, huge]})),
        "shape-negative": ("pictures of negative size", bundle(input={**shape, "shape": [1, -8, -8]})),
        "classes": ("a hundred thousand class names", bundle(classes=[str(i) for i in range(10**5)])),
        "channels": ("channels that do not exist", bundle(channels={"bn1": [0, huge]})),
        "masks": ("masks outside the folder", bundle(masks="../../../etc/passwd")),
        "wrappers": ("unknown wrappers", bundle(wrappers=[{"kind": "exec"}])),
        "format": ("a newer format", bundle(format=99)),
        "deep": ("arch.json 100 000 deep", with_json(b"[" * 100_000)),
        "digits": ("a number of 100 000 digits", with_json(b'{"format":' + b"1" * 100_000 + b"}")),
        "json": ("an arch.json that is not JSON", with_json(b"\xff\xfe{")),
        "json-zero": ("an arch.json that is /dev/zero", with_json("/dev/zero")),
        "weights-zero": ("weights that are /dev/zero", with_weights("/dev/zero")),
        "weights-link": ("weights that link to a text outside", with_weights("/etc/passwd")),
        "weights-missing": ("no weights", {"arch.json": plain}),
    }  # fmt: skip
    for slug, (what, files) in bundles.items():
        yield Case(f"bundle-{slug}", f"a bundle: {what}", BROKEN, folder(files))
    yield Case(
        "bundle-weights-pickle", "a bundle: weights that are a hostile checkpoint", CODE, folder(with_weights(evil)), "posix"
    )
    factory = named(name=None, kwargs={}, factory={"ref": "evil.py:make", "sha256": None})
    files = {**factory, "evil.py": payload.python.encode()}
    yield Case("bundle-factory", "a bundle: needs its author's code", (0, 4, 4), folder(files), "evil.py:make", "LOD-006")

    config = json.dumps({"architectures": ["ConvNet"], "auto_map": {"AutoModel": "modeling.ConvNet"}}).encode()

    def sharded(label: str) -> dict[str, bytes | str]:
        index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(SHAPES, label)}).encode()
        return {"config.json": config, "model.safetensors.index.json": index}

    hubs: dict[str, tuple[str, dict[str, bytes | str]]] = {
        "parent": ("an index that names ../good-weights.safetensors", sharded("../good-weights.safetensors")),
        "absolute": ("an index that names /etc/passwd", sharded("/etc/passwd")),
        "missing": ("an index that names a missing file", sharded("model-00001.safetensors")),
        "itself": ("an index that names itself", sharded("model.safetensors.index.json")),
        "config-deep": ("a config.json 100 000 deep", {"config.json": b"[" * 100_000, "model.safetensors": good}),
        "config-only": ("nothing but config.json", {"config.json": config}),
        "index-deep": ("an index 100 000 deep", {"config.json": config, "model.safetensors.index.json": b"[" * 100_000}),
    }  # fmt: skip
    for slug, (what, files) in hubs.items():
        yield Case(f"hub-{slug}", f"a Hugging Face folder: {what}", BROKEN, folder(files))
    pickle = folder({"config.json": config, "pytorch_model.bin": evil})
    yield Case("hub-pickle", "a Hugging Face folder: a hostile pytorch_model.bin", CODE, pickle, "posix", "LOD-001")
    zero = folder({"config.json": "/dev/zero", "model.safetensors": good})
    yield Case("hub-config-zero", "a Hugging Face folder: a config.json that is /dev/zero", FINE, zero)
    code = dict.fromkeys(("modeling.py", "__init__.py", "setup.py", "conftest.py"), payload.python.encode())
    files = {"config.json": config, "model.safetensors": good, **code}
    yield Case("hub-code", "a Hugging Face folder: good weights beside Python code", FINE, folder(files), "", "LOD-006")


def unlisted(payload: Payload) -> Iterator[Case]:
    """Names on no list beside good weights: read as plain data, and not imported. The module really exists."""
    module = "secateur_canary"
    thing = name(module, "Thing")
    table = {
        "function": call(name(module, "run"), text(payload.canary)),
        "class": thing + EMPTY + NEWOBJ + dic(("a", num(1))) + BUILD,
        "referenced": thing,
        "key": dic((thing, num(1))),
    }
    for slug, expression in table.items():
        for home in ("zip", "legacy"):
            what = f"good weights beside a {slug} of a module that runs when imported"
            yield Case(f"unlisted-{slug}-{home}.pt", what, FINE, housed(home, expression), "", "LOD-002", "torch")


# --- Files made by torch itself, hostile and good -------------------------------------------------------------------------


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, shell: str) -> None:
        self.shell = shell

    def __reduce__(self) -> Any:
        return os.system, (self.shell,)


def network() -> Any:
    """Return a small network of secateur's zoo."""
    import torch

    from secateur.models import build

    net = build("convnet", width=1, classes=2, in_channels=1).eval()
    values = {key: torch.frombuffer(bytearray(floats(key)), dtype=torch.float32) for key in SHAPES}
    net.load_state_dict({key: value.reshape(SHAPES[key]) for key, value in values.items()}, strict=False)
    return net


def saved(make: Callable[[], Any], **options: Any) -> Writer:
    """Return what writes an object with ``torch.save``."""

    def write(path: Path) -> None:
        import torch

        buffer = io.BytesIO()
        torch.save(make(), buffer, **options)
        path.write_bytes(buffer.getvalue())

    return write


LEGACY = {"_use_new_zipfile_serialization": False}


def attack_result(**more: Any) -> dict[str, Any]:
    """Return what BackdoorBench writes at the end of an attack."""
    container = {"save_path": "record/bd_train_dataset", "data_dict": {0: {"path": "0.png", "other_info": 1}}}
    return {
        "model_name": "preactresnet18",
        "num_classes": 2,
        "model": network().state_dict(),
        "data_path": "../data",
        "img_size": [32, 32, 1],
        "clean_data": "cifar10",
        "bd_train": {"bd_data_container": container, "poison_indicator": [0.0] * 50, "original_index_array": list(range(50))},
        "bd_test": {"bd_data_container": None, "targets": [0] * 50},
        **more,
    }


def made_by_torch(payload: Payload) -> Iterator[Case]:
    """Hostile files as torch itself writes them."""
    evil = Evil(payload.shell)

    def hooked() -> Any:
        net = network()
        net._forward_pre_hooks[0] = evil  # kept as an attribute, and pickled with the network
        return net

    def beside_weights() -> Any:
        return {"model": network().state_dict(), "optimizer": {"state": evil}}

    table: dict[str, tuple[str, Writer]] = {
        "module": ("a whole network with a hostile hook", saved(hooked)),
        "module-legacy": ("the same in a legacy file", saved(hooked, **LEGACY)),
        "backdoorbench": ("a BackdoorBench result with a hostile entry", saved(lambda: attack_result(bd_out_dataset=evil))),
        "optimizer": ("a hostile object in an optimizer's state", saved(beside_weights)),
        "optimizer-legacy": ("the same in a legacy file", saved(beside_weights, **LEGACY)),
        "protocol-4": ("protocol 4", saved(beside_weights, pickle_protocol=4)),
        "protocol-5": ("protocol 5", saved(beside_weights, pickle_protocol=5)),
    }  # fmt: skip
    for slug, (what, write) in table.items():
        yield Case(f"torch-{slug}.pt", what, CODE, write, "posix", "LOD-001", "torch")


def good() -> Iterator[Case]:
    """Files that must be read: what people really have."""

    def state_dict(prefix: str = "", dtype: str = "float32") -> dict[str, Any]:
        import torch

        kind, values = getattr(torch, dtype), network().state_dict()
        return {prefix + key: value.to(kind) if value.is_floating_point() else value for key, value in values.items()}

    def numpy_beside() -> Any:
        import numpy as np

        arrays = {"mean": np.arange(3.0), "names": np.array(["a", "b"]), "objects": np.array([1, None], dtype=object)}
        return {"net": state_dict(), "acc": np.float64(91.5), "epoch": np.int64(3), "flag": np.bool_(True), **arrays}

    def parallel() -> Any:
        import torch

        return torch.nn.DataParallel(network())

    def training_state() -> Any:
        import torch

        net = network()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3])
        return {"state_dict": net.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict()}

    def by_pickle(path: Path) -> None:
        import pickle

        path.write_bytes(pickle.dumps(state_dict()))

    def bundle(path: Path) -> None:
        from secateur.models import Classifier, save

        arch = {"name": "convnet", "kwargs": {"width": 1, "classes": 2, "in_channels": 1}}
        save(Classifier(network(), classes=["a", "b"], input_shape=(1, 32, 32), mean=[0.5], std=[0.5], arch=arch).eval(), path)

    config = json.dumps({"architectures": ["ConvNet"], "model_type": "convnet"}).encode()
    first, second = list(SHAPES)[:10], list(SHAPES)[10:]
    parts = {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": second}
    index = {"metadata": {}, "weight_map": {key: part for part, keys in parts.items() for key in keys}}
    shards = {part: safetensors(keys) for part, keys in parts.items()}
    namespace = argparse.Namespace(lr=0.1, path=Path("x"), nested=argparse.Namespace(a=1))
    by_hand = torch_zip(dic(*weights()))
    length = int.from_bytes(safetensors()[:8], "little")
    header, values = safetensors()[8 : 8 + length], safetensors()[8 + length :]
    like_pickle = header.ljust(0x280 + length // 256 * 256)
    table: dict[str, tuple[str, bytes | Writer]] = {
        "state.pt": ("a state dict", saved(state_dict)),
        "state-legacy.pth": ("a state dict in a legacy file", saved(state_dict, **LEGACY)),
        "state.pkl": ("a state dict by pickle.dump", by_pickle),
        "hand.pt": ("a state dict put together by hand", by_hand),
        "hand-legacy.pt": ("the same in a legacy file", legacy_file(dic(*weights(legacy=True)))),
        "cuda.pt": ("weights saved from a GPU", torch_zip(dic(*weights(where="cuda:3")))),
        "nested.pt": ("a state dict in containers", saved(lambda: {"model": {"state_dict": state_dict()}, "epoch": 3})),
        "parallel-prefix.pt": ("names that begin with module.", saved(lambda: {"state_dict": state_dict("module.")})),
        "compiled-prefix.pt": ("names that begin with _orig_mod.", saved(lambda: {"net": state_dict("_orig_mod.module.")})),
        "module.pt": ("a whole network", saved(network)),
        "module-legacy.pt": ("a whole network in a legacy file", saved(network, **LEGACY)),
        "module-protocol-4.pt": ("a whole network, protocol 4", saved(network, pickle_protocol=4)),
        "module-parallel.pt": ("a whole network in DataParallel", saved(parallel)),
        "module-namespace.pt": ("a whole network beside its arguments", saved(lambda: {"model": network(), "args": namespace})),
        "attack_result.pt": ("a BackdoorBench result", saved(attack_result)),
        "numpy.pth": ("numpy values beside the weights", saved(numpy_beside)),
        "path.pt": ("a path beside the weights", saved(lambda: {"net": state_dict(), "dir": Path("/tmp/x")})),
        "training.pt": ("optimizer and schedule beside the weights", saved(training_state)),
        "half.pt": ("float16", saved(lambda: state_dict(dtype="float16"))),
        "bfloat.pt": ("bfloat16", saved(lambda: state_dict(dtype="bfloat16"))),
        "double-legacy.pt": ("float64 in a legacy file", saved(lambda: state_dict(dtype="float64"), **LEGACY)),
        "weights.safetensors": ("safetensors", safetensors()),
        "weights-metadata.safetensors": ("safetensors with metadata", safetensors(__metadata__={"format": "pt"})),
        "weights-80.safetensors": ("safetensors that begin like a pickle", framed(like_pickle, values)),
        "wrong-name.onnx": ("a checkpoint named .onnx", by_hand),
        "wrong-name.safetensors": ("a checkpoint named .safetensors", by_hand),
        "wrong-name.pt": ("safetensors named .pt", safetensors()),
        "no-name": ("a checkpoint without an extension", by_hand),
        "bundle": ("a bundle", bundle),
        "hub": ("a Hugging Face folder", folder({"config.json": config, "model.safetensors": safetensors()})),
        "hub-bin": ("a Hugging Face folder with a pickle", folder({"config.json": config, "pytorch_model.bin": by_hand})),
        "hub-sharded": ("a Hugging Face folder in two parts",
                        folder({"config.json": config, "model.safetensors.index.json": json.dumps(index).encode(), **shards})),
        "hub-links": ("a Hugging Face folder of links, as its cache has",
                      folder({"config.json": config, "model.safetensors": "../good-weights.safetensors"})),
    }  # fmt: skip
    for slug, (what, content) in table.items():
        yield Case(f"good-{slug}", what, FINE, content, "", "LOD-005" if slug.startswith("wrong-name") else "")


# --- The corpus -----------------------------------------------------------------------------------------------------------


def cases(payload: Payload) -> dict[str, list[Case]]:
    """Return the good and the hostile cases; most are bytes already, the others are made when they are written."""
    families = (gadgets, opcodes, hidden, archives, programs, formats, special, folders, unlisted, made_by_torch)
    hostile = [case for family in families for case in family(payload)]
    return {"good": list(good()), "hostile": [*hostile, *tensors(), *bombs(), *safetensors_cases(), *onnx_cases()]}


def write(folder: Path, canary: str) -> dict[str, list[dict[str, Any]]]:
    """Write the corpus into an empty folder and return its manifest."""
    import numpy as np

    payload = Payload(canary, str(folder / "payload.py"))
    found = cases(payload)
    files = [case.file for group in found.values() for case in group]
    folder.mkdir(parents=True, exist_ok=True)
    if len(set(files)) < len(files) or any(folder.iterdir()):
        raise SystemExit("the folder must be empty, and every case must have a name of its own")
    (folder / "modules").mkdir()
    module = f"{payload.python}\n\n\nclass Thing:\n    pass\n\n\ndef run(path):\n    open(path, 'w').close()\n"
    (folder / "modules" / "secateur_canary.py").write_text(module, "utf-8")
    (folder / "payload.py").write_text(payload.python + "\n", "utf-8")
    (folder / "secret-link.bin").symlink_to("/etc/passwd")
    (folder / "root-link").symlink_to("/")
    np.savez(folder / "data.npz", **pictures())
    for case in (case for group in found.values() for case in group):
        if isinstance(case.content, bytes):
            (folder / case.file).write_bytes(case.content)
        else:
            case.content(folder / case.file)
    fields = ("file", "what", "codes", "says", "rule", "live", "heavy")
    manifest = {group: [{field: getattr(case, field) for field in fields} for case in made] for group, made in found.items()}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), "utf-8")
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(description="Write hostile, broken and good model files, to try the door with.")
    parser.add_argument("folder", type=Path, help="an empty folder")
    parser.add_argument("canary", type=Path, help="the file that code in them would make; must not exist")
    args = parser.parse_args()
    canary = args.canary.absolute()
    if canary.exists():
        raise SystemExit(f"{canary} exists already")
    manifest = write(args.folder.absolute(), str(canary))
    if canary.exists():
        raise SystemExit("something ran while the corpus was written")
    used = sum(path.lstat().st_blocks * 512 for path in args.folder.rglob("*"))
    counts = " and ".join(f"{len(group)} {name}" for name, group in manifest.items())
    print(f"{counts} cases: {used / 1e6:.1f} MB in {args.folder}")


if __name__ == "__main__":
    main()
