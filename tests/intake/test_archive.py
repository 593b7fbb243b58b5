"""Zip archives: what torch writes is read, what readers could disagree about is refused."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
from collections.abc import Callable

import pytest
import torch

from secateur.errors import ModelError
from secateur.intake import archive
from secateur.intake.archive import open_archive
from secateur.intake.sniff import kind_of_zip


def zipped(*entries: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytearray:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about names given twice
        for name, content in entries:
            file.writestr(name, content)
    return bytearray(buffer.getvalue())


PLAIN = (("a/data.pkl", b"pickle"), ("a/data/0", bytes(40)), ("a/version", b"3\n"))


def test_entries_without_their_root():
    found = open_archive(memoryview(zipped(*PLAIN)))
    assert {name: bytes(found.read(name)) for name in found.entries} == {name[2:]: content for name, content in PLAIN}
    assert found.damaged() == []
    with pytest.raises(ModelError, match="no entry 'nothing'"):
        found.read("nothing")


def test_two_roots_are_kept_apart():
    found = open_archive(memoryview(zipped(("a/data.pkl", b"1"), ("b/data.pkl", b"2"))))
    assert set(found.entries) == {"a/data.pkl", "b/data.pkl"}


def test_what_torch_writes():
    buffer = io.BytesIO()
    torch.save({"w": torch.rand(1000)}, buffer)
    found = open_archive(memoryview(buffer.getvalue()))
    assert len(found.read("data/0")) == 4000


def test_compressed_entries_are_listed_but_not_read():
    found = open_archive(memoryview(zipped(("a/data.pkl", bytes(10**6)), method=zipfile.ZIP_DEFLATED)))
    with pytest.raises(ModelError, match="uncompressed"):
        found.read("data.pkl")


def test_checksums():
    content = zipped(*PLAIN)
    place = content.index(b"pickle")
    content[place] ^= 1
    assert open_archive(memoryview(content)).damaged() == ["data.pkl"]


def central(content: bytearray, change: Callable[[bytearray, int], None]) -> bytearray:
    """Change the first record of the directory."""
    change(content, content.index(b"PK\x01\x02"))
    return content


def patched(offset: int, pattern: str, value: int) -> Callable[[bytearray, int], None]:
    return lambda content, place: struct.pack_into(pattern, content, place + offset, value)


def lengthened(content: bytearray) -> bytearray:
    """Claim in both places that the last entry has a million bytes."""
    for signature, places in ((b"PK\x03\x04", (18, 22)), (b"PK\x01\x02", (20, 24))):
        for place in places:
            struct.pack_into("<I", content, content.rindex(signature) + place, 10**6)
    return content


def counted(content: bytearray, entries: int) -> bytearray:
    """Claim another number of entries at the end."""
    struct.pack_into("<HH", content, len(content) - 14, entries, entries)
    return content


CENTRAL = {"flags": (8, "<H"), "method": (10, "<H"), "packed": (20, "<I"), "size": (24, "<I"), "offset": (42, "<I")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (zipped(*PLAIN) + b"x", "must end where its directory ends"),
        (b"x" + zipped(*PLAIN), "its directory is not where its end says"),
        (zipped(*PLAIN)[:-5], "must end where"),
        (zipped(*PLAIN)[:-22], "must end where"),
        (zipped(*PLAIN, PLAIN[0]), "each entry once, but 'a/data.pkl' is there twice"),
        (zipped(("../a", b"")), "plain relative path, got '../a'"),
        (zipped(("a/../../b", b"")), "plain relative path"),
        (zipped(("/a", b"")), "plain relative path"),
        (zipped(("c:/a", b"")), "plain relative path"),
        (zipped(("a\\b", b"")), "plain relative path"),
        (zipped(("x" * 1001, b"")), "plain relative path"),
        (central(zipped(*PLAIN), patched(*CENTRAL["flags"], 1)), "encrypted"),
        (central(zipped(*PLAIN), patched(*CENTRAL["method"], 8)), "described in two ways"),
        (central(zipped(*PLAIN), patched(*CENTRAL["packed"], 10**6)), "described in two ways"),
        (central(zipped(*PLAIN), patched(*CENTRAL["size"], 10**6)), "described in two ways"),
        (lengthened(zipped(*PLAIN)), "longer than the archive"),
        (zipped(("a/data.pkl", b""), ("a/DATA.PKL", b"")), "there twice"),
        (central(zipped(*PLAIN), patched(*CENTRAL["flags"], 0x20)), "encrypted or a patch"),
        (counted(zipped(*PLAIN), 2), "does not have what, its end says"),
        (central(zipped(*PLAIN), patched(*CENTRAL["offset"], 5)), "one after another"),
        (central(zipped(*PLAIN), lambda c, p: c.__setitem__(p + 46, ord("z"))), "one name, but 'z/data.pkl' has another"),
        (zipped(), "1 to 100000 entries, got 0"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_archives_that_readers_could_disagree_about(content, message):
    with pytest.raises(ModelError, match=message):
        open_archive(memoryview(content))


def wide(content: bytearray, **change: int) -> bytearray:
    """Put the end of a large archive before that of a small one."""
    _, _, _, here, entries, size, start, _ = archive.END.unpack(content[-archive.END.size :])
    fields = {"place": len(content) - archive.END.size, "entries": entries, "size": size, "start": start} | change
    end = archive.END64.pack(b"PK\x06\x06", 44, 45, 45, 0, 0, here, fields["entries"], fields["size"], fields["start"])
    locator = archive.LOCATOR.pack(b"PK\x06\x07", 0, fields["place"], 1)
    return content[: -archive.END.size] + end + locator + content[-archive.END.size :]


def test_ends_of_large_archives():
    found = open_archive(memoryview(wide(zipped(*PLAIN))))
    assert set(found.entries) == {name[2:] for name, _ in PLAIN}
    for change in ({"place": 0}, {"place": 40}, {"entries": 2}, {"size": 10}, {"start": 10}):
        with pytest.raises(ModelError):
            open_archive(memoryview(wide(zipped(*PLAIN), **change)))


def test_a_comment_is_refused():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a/data.pkl", b"")
        file.comment = b"cos\nsystem\n"
    with pytest.raises(ModelError, match="must end where its directory ends"):
        open_archive(memoryview(buffer.getvalue()))


def test_overlapping_entries_are_refused():
    content = zipped(("a/0", b"first"), ("a/1", b"second"))
    first, second = content.index(b"PK\x01\x02"), content.rindex(b"PK\x01\x02")
    content[second + 42 : second + 46] = content[first + 42 : first + 46]
    with pytest.raises(ModelError):
        open_archive(memoryview(content))


def test_hidden_entries_are_refused():
    inner = zipped(("a/data.pkl", b"hidden"))
    content = zipped(("a/0", b"x"))
    place = content.index(b"PK\x01\x02")
    grown = content[:place] + inner[: inner.index(b"PK\x01\x02")] + content[place:]
    struct.pack_into("<I", grown, len(grown) - 6, struct.unpack_from("<I", content, len(content) - 6)[0] + 40 + 6)
    with pytest.raises(ModelError):
        open_archive(memoryview(grown))


def test_entries_are_counted(monkeypatch):
    monkeypatch.setattr(archive, "MAX_ENTRIES", 2)
    with pytest.raises(ModelError, match="1 to 2 entries, got 3"):
        open_archive(memoryview(zipped(*PLAIN)))
    monkeypatch.setattr(archive, "MAX_DIRECTORY", 20)
    with pytest.raises(ModelError, match="at most 20 bytes"):
        open_archive(memoryview(zipped(*PLAIN)))


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["data.pkl", "data/0", "version"], "torch-zip"),
        (["data.pkl", "constants.pkl"], "torchscript"),
        (["data.pkl", "code/__torch__.py"], "torchscript"),
        (["archive_format", "models/model.json"], "exported"),
        (["data/aotinductor/model/a.so", "data.pkl"], "exported"),
        (["serialized_exported_program.json", "version"], "exported"),
        ([".data/python_version", "model/model.pkl"], "package"),
        (["config.json", "metadata.json", "model.weights.h5"], "a Keras archive: save the weights with safetensors"),
        (["x.npy", "y.npy"], "a NumPy archive, which holds data: save the weights with safetensors"),
        (["model.pt"], "a zip archive without a checkpoint's data.pkl: unpack it and give the file inside"),
    ],
)
def test_what_an_archive_is(names, kind):
    assert kind_of_zip(names) == kind
