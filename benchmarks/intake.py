"""What reading a checkpoint costs, beside ``torch.load``: seconds and peak memory of whole processes on one file.

    python benchmarks/intake.py [--megabytes 400] [--scanner PATH_OF_PICKLESCAN]

Every row is a fresh process; start-up with its imports is measured apart and subtracted. ``picklescan`` is a scanner of pickles
that loads nothing; it is the peer of ``secateur info --quick``, which also hashes the file and looks for NaN in every tensor.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
REPEATS = 3
READERS = {
    "torch.load(weights_only=True)": ("import torch", "state = torch.load({path!r}, map_location='cpu', weights_only=True)"),
    "secateur: read, check and copy": (
        "import torch; from secateur.intake.checkpoint import tensors; from secateur.intake.reading import admit, read",
        "found = read({path!r}); state = tensors(admit(found), found.size)",
    ),
}


def write(path: Path, megabytes: int, zipped: bool) -> None:
    """Write a state dict of 200 tensors."""
    import torch

    rows = megabytes * 2**20 // 200 // 4 // 256
    state = {f"layers.{i}.weight": torch.rand(rows, 256) for i in range(200)}
    torch.save({"state_dict": state, "epoch": 1}, path, _use_new_zipfile_serialization=zipped)


def run(command: list[str]) -> tuple[float, float]:
    """Return seconds and peak MiB of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{command} failed")
    return seconds, usage.ru_maxrss / 1024


def median(command: list[str]) -> tuple[float, float]:
    """Return the median seconds and the largest memory of a few runs, after one that warms the file's pages."""
    run(command)
    rows = [run(command) for _ in range(REPEATS)]
    return statistics.median(row[0] for row in rows), max(row[1] for row in rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--scanner")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("zip", "legacy"):
            path = Path(folder) / f"{kind}.pt"
            made = f"import intake, pathlib; intake.write(pathlib.Path({str(path)!r}), {given.megabytes}, {kind == 'zip'})"
            subprocess.run([sys.executable, "-c", made], cwd=Path(__file__).parent, check=True)  # its memory is not ours
            size = path.stat().st_size / 2**20
            print(f"{kind}: {size:.0f} MiB")
            for name, (imports, code) in READERS.items():
                start, _ = median([sys.executable, "-c", imports])
                seconds, peak = median([sys.executable, "-c", f"{imports}; {code.format(path=str(path))}"])
                print(f"  {name:<34} {seconds - start:6.2f} s beyond {start:.2f} s of imports, peak {peak:5.0f} MiB")
            scanners = {
                "secateur info --quick": [str(Path(sys.executable).with_name("secateur")), "info", "--quick", str(path)]
            }
            if given.scanner:
                scanners["picklescan"] = [given.scanner, "-p", str(path)]
            for name, command in scanners.items():
                seconds, peak = median(command)
                print(f"  {name:<34} {seconds:6.2f} s in all, peak {peak:5.0f} MiB")


if __name__ == "__main__":
    main()
