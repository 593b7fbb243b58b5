"""Coverage-guided fuzzing of the door by atheris (libFuzzer): ``python tests/intake/fuzz_door.py -runs=100000 CORPUS``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["secateur.intake", "zipfile", "pickletools"]):
    import fuzzing

PATH = Path(tempfile.mkdtemp(prefix="fuzz-")) / "a.pt"


def one(content: bytes) -> None:
    """Use one file."""
    PATH.write_bytes(content or b"\x00")
    with fuzzing.watched():
        fuzzing.use(PATH)


def main() -> None:
    """Warm up what is imported on first use, then fuzz."""
    for content in (b"\x08\x07", b"(lp0\n.", b"PK\x03\x04"):
        PATH.write_bytes(content)
        fuzzing.use(PATH)
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
