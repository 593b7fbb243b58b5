"""Make the embedded data set ``fashion-mini`` from Debian's package ``dataset-fashion-mnist``.

Run ``python scripts/make_fashion_mini.py`` to write ``src/secateur/data/assets/`` anew (about 20 s); the decoded images
are the same each time. Each split is one xz stream of ``count * 784`` bytes, image by image, column by column, class by
class (the same number each). Columns compress better than rows, and within a class images of like brightness stand
together for the same reason: lossless WebP and PNG needed 5 % and 10 % more.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import lzma
from pathlib import Path

import numpy as np

SOURCE = Path("/usr/share/datasets/fashion-mnist")
ASSETS = Path(__file__).parents[1] / "src" / "secateur" / "data" / "assets"
SPLITS = {"train": ("train", 595), "test": ("t10k", 200)}  # split -> (prefix of its files, images per class)
MAX_BYTES = 2_800_000

README = """\
# fashion-mini

A stratified sample of Fashion-MNIST: {counts}; 28x28, grayscale, ten classes, all equally frequent.
Drawn without replacement from the split of the same name, so that train and test stay disjoint.

Origin: Fashion-MNIST, Zalando SE, <https://github.com/zalandoresearch/fashion-mnist>, by way of Debian's package
`dataset-fashion-mnist`. Han Xiao, Kashif Rasul, Roland Vollgraf: *Fashion-MNIST: a Novel Image Dataset for
Benchmarking Machine Learning Algorithms*, 2017, arXiv:1708.07747.

Made by `scripts/make_fashion_mini.py`, which also explains the format. sha256 of the decoded bytes:

{digests}

## Licence of the images

The MIT License (MIT)

Copyright (c) 2017 Zalando SE, <https://tech.zalando.com>

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def read_idx(path: Path, header: int) -> np.ndarray:
    """Return the bytes of a gzipped idx file behind its header."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8)[header:]


def sample(source: Path, split: str) -> bytes:
    """Return the chosen images of a split in the format of the asset."""
    prefix, per_class = SPLITS[split]
    x = read_idx(source / f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    y = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz", 8)
    draw = np.random.RandomState(0)  # the legacy generator, because its streams are frozen across numpy versions
    chosen = []
    for label in range(10):
        index = np.sort(draw.permutation(np.flatnonzero(y == label))[:per_class])
        brightness = [np.median(image[image > 0]) for image in x[index]]
        chosen.append(index[np.argsort(brightness, kind="stable")])
    return x[np.concatenate(chosen)].transpose(0, 2, 1).tobytes()


def pack(raw: bytes) -> bytes:
    """Compress the bytes of a split."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}]
    return lzma.compress(raw, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=filters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=SOURCE)
    parser.add_argument("--output", type=Path, default=ASSETS)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    raw = {split: sample(args.source, split) for split in SPLITS}
    for split, data in raw.items():
        (args.output / f"fashion_mini_{split}.xz").write_bytes(pack(data))
    counts = " and ".join(f"{len(data) // 784} {split} images" for split, data in raw.items())
    digests = "\n".join(f"    {hashlib.sha256(data).hexdigest()}  {split}" for split, data in raw.items())
    (args.output / "README.md").write_text(README.format(counts=counts, digests=digests), encoding="utf-8")
    total = sum(path.stat().st_size for path in args.output.iterdir())
    print(f"{counts}: {total} bytes in {args.output}")
    if total > MAX_BYTES:
        raise SystemExit(f"the asset may take {MAX_BYTES} bytes, got {total}; take fewer images")


if __name__ == "__main__":
    main()
