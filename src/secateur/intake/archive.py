"""Zip archives as torch writes them, and no others: every reader must see the same entries in them.

Python's ``zipfile`` reads the directory. What readers disagree about is refused: data before or after the archive, names that
differ between directory and entry, names given twice (in either case), entries that overlap, compression.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from dataclasses import dataclass

from ..errors import ModelError
from .view import View, release

MAX_ENTRIES = 100_000
MAX_DIRECTORY = 16 * 2**20
LOCAL_HEADER = struct.Struct("<4s5H3L2H")
END = struct.Struct("<4s4H2LH")
END64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR = struct.Struct("<4sLQL")
DESCRIPTOR = 24  # bytes that may follow an entry's data
UNREADABLE = 0x1 | 0x20 | 0x40 | 0x2000  # flags of entries that are encrypted or patches
SIZES_FOLLOW = 0x8  # the flag that sizes stand after the data, not in the entry's header
OTHER_NAME = 0x7075  # the extra field that gives an entry a second name
STORED = zipfile.ZIP_STORED


@dataclass(frozen=True, slots=True)
class Entry:
    """One file in an archive."""

    start: int
    size: int
    method: int
    crc: int


@dataclass(frozen=True, eq=False)
class Archive:
    """A checked archive: entries by their names.

    Attributes:
        data: All its bytes.
        entries: Its files; without the name of the folder that all of them are in, if there is one.
        rooted: Whether there is one, as torch writes it.
    """

    data: memoryview
    entries: dict[str, Entry]
    rooted: bool

    def read(self, name: str) -> memoryview:
        """Return the bytes of an entry; `ModelError` when it is missing or compressed."""
        entry = self.entries.get(name)
        if entry is None:
            raise ModelError(f"the archive has no entry {_show(name)}")
        if entry.method != STORED:
            raise ModelError("a checkpoint must hold its entries uncompressed, as torch writes them")
        return self.data[entry.start : entry.start + entry.size]

    def damaged(self) -> list[str]:
        """Return the names of entries whose checksum does not match."""
        found = []
        for name, entry in self.entries.items():
            if entry.method == STORED and zlib.crc32(self.read(name)) != entry.crc:
                found.append(name)
            if entry.size > MAX_DIRECTORY:
                release(self.data)
        return found


def open_archive(data: memoryview) -> Archive:
    """Check a zip archive and return it; `ModelError` tells what is wrong with it."""
    end = _check_end(data)
    try:
        with zipfile.ZipFile(View(data)) as file:
            infos, directory = file.infolist(), file.start_dir
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error, IndexError) as error:
        raise ModelError("a damaged zip archive") from error
    if not 0 < len(infos) <= MAX_ENTRIES:
        raise ModelError(f"a zip archive must have 1 to {MAX_ENTRIES} entries, got {len(infos)}")
    if (len(infos), directory) != (end.entries, end.start):
        raise ModelError("a damaged zip archive: its directory is not where, or does not have what, its end says")
    found: dict[str, Entry] = {}
    spelled: set[str] = set()
    place = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        _check_name(info)
        if info.filename.casefold() in spelled:
            raise ModelError(f"an archive must have each entry once, but {_show(info.filename)} is there twice")
        spelled.add(info.filename.casefold())
        start = _locate(data, info, place)
        place = start + info.compress_size
        found[info.filename] = Entry(start, info.compress_size, info.compress_type, info.CRC)
    if not 0 <= directory - place <= DESCRIPTOR:
        raise ModelError("a damaged zip archive: its entries and its directory do not follow each other")
    roots = {name.partition("/")[0] for name in found}
    rooted = len(roots) == 1 and all("/" in name for name in found)
    if rooted:
        found = {name.partition("/")[2]: entry for name, entry in found.items()}
    return Archive(data, found, rooted)


@dataclass(frozen=True)
class _End:
    entries: int
    start: int


def _check_end(data: memoryview) -> _End:
    """Return what the end of an archive says of its directory: everything in its place, byte by byte, and no comment."""
    tail = bytes(data[-END.size :])
    if len(tail) < END.size or tail[:4] != b"PK\x05\x06" or END.unpack(tail)[-1] != 0:
        raise ModelError("a zip archive must end where its directory ends: this one is cut, or something follows it")
    _, disk, first_disk, here, entries, size, start, _ = END.unpack(tail)
    stop = len(data) - END.size
    if bytes(data[max(0, stop - LOCATOR.size) :][:4]) == b"PK\x06\x07":
        stop -= LOCATOR.size + END64.size
        _, _, place, _ = LOCATOR.unpack(data[stop + END64.size : stop + END64.size + LOCATOR.size])
        if stop < 0 or place != stop or bytes(data[stop : stop + 4]) != b"PK\x06\x06":
            raise ModelError("a damaged zip archive: its end points at another end")
        _, length, _, _, disk, first_disk, wide_here, wide_entries, wide_size, wide_start = END64.unpack(
            data[stop : stop + END64.size]
        )
        narrow = (
            (here, wide_here, 0xFFFF),
            (entries, wide_entries, 0xFFFF),
            (size, wide_size, 2**32 - 1),
            (start, wide_start, 2**32 - 1),
        )
        if length != END64.size - 12 or any(small not in (wide, limit) for small, wide, limit in narrow):
            raise ModelError("a damaged zip archive: its two ends say different things")
        here, entries, size, start = wide_here, wide_entries, wide_size, wide_start
    if size > MAX_DIRECTORY:
        raise ModelError(f"a zip archive's directory must have at most {MAX_DIRECTORY} bytes, got {size}")
    if here != entries or disk or first_disk or start + size != stop:
        raise ModelError("a damaged zip archive: its directory is not where its end says, or something stands between them")
    return _End(entries, start)


def _check_name(info: zipfile.ZipInfo) -> None:
    name = info.orig_filename
    parts = name.split("/")
    if name != info.filename or len(name) > 1000 or "\\" in name or ".." in parts or parts[0] == "" or ":" in parts[0]:
        raise ModelError(f"an entry's name must be a plain relative path, got {_show(name)}")
    if info.flag_bits & UNREADABLE:
        raise ModelError(f"the entry {_show(name)} is encrypted or a patch; unpack the archive and give what is inside")


def _locate(data: memoryview, info: zipfile.ZipInfo, end: int) -> int:
    """Return where an entry's data starts; the entry before it ends at ``end``."""
    offset = info.header_offset
    if not 0 <= offset - end <= (DESCRIPTOR if end else 0):
        raise ModelError("a zip archive must hold its entries one after another, and nothing else")
    header = bytes(data[offset : offset + LOCAL_HEADER.size])
    if len(header) < LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
        raise ModelError("a damaged zip archive: an entry is not where the directory says")
    _, _, flags, method, _, _, _, packed, size, name_length, extra_length = LOCAL_HEADER.unpack(header)
    start = offset + LOCAL_HEADER.size + name_length + extra_length
    name = bytes(data[offset + LOCAL_HEADER.size : start - extra_length])
    if name != info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437"):
        raise ModelError(f"an entry must have one name, but {_show(info.filename)} has another one in its own header")
    extra = bytes(data[start - extra_length : start])
    own = (packed, size)
    sizes_agree = own == (info.compress_size, info.file_size) or 0xFFFFFFFF in own or (flags & SIZES_FOLLOW and not any(own))
    if flags & UNREADABLE or method != info.compress_type or not sizes_agree or OTHER_NAME in _fields(extra + info.extra):
        raise ModelError(f"the entry {_show(info.filename)} is described in two ways")
    if start + info.compress_size > len(data) or (method == STORED and info.compress_size != info.file_size):
        raise ModelError(f"the entry {_show(info.filename)} is longer than the archive: the file is cut or lies")
    return start


def _fields(extra: bytes) -> set[int]:
    """Return the kinds of extra fields of an entry."""
    found, place = set(), 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, place)
        found.add(kind)
        place += 4 + length
    return found


def _show(name: str) -> str:
    return ascii(name if len(name) <= 100 else name[:100] + "...")
