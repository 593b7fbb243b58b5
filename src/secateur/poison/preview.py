"""A picture of attacks side by side: images without and with the trigger, and what changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import DataError
from ..measure.visibility import Visibility, compare

GAIN = 10
SIDE = 96  # pixels that the longer side of an image is enlarged to, or nearly
LONGEST = 24  # characters of a name
MARGIN, GAP, APART = 20, 4, 18  # around the picture, between images, between examples and between attacks
LARGE, SMALL = 17, 13
WHITE, BLACK, GREY, LINE = (255, 255, 255), (20, 20, 20), (95, 95, 95), (205, 205, 205)
HEADS = "clean", "poisoned", f"change x{GAIN}"


def sheet(rows: Iterable[tuple[str, Tensor, Tensor]], *, examples: int = 4, zoom: int | None = None) -> Image.Image:
    """Draw one row for each attack: a few images clean, poisoned, and the difference ten times enlarged.

    The attack's name stands beside them, with the means of L2, Linf and SSIM over all images of the row (`compare`).
    The difference is drawn as ``0.5 + 10*(x' - x)``, clipped to [0, 1], so that mid-grey is no change.

    Args:
        rows: For each attack its name, images without the trigger and the same images with it, float ``(n, c, h, w)`` in
            [0, 1], with 1 or 3 channels.
        examples: Images to draw of each row: the first ones, as many as there are.
        zoom: Screen pixels for each pixel of an image, each way; by default so many that images become about 96 pixels large.

    Raises:
        DataError: There is nothing to draw, or images that cannot be drawn.
    """
    drawn = [(name, clean, poisoned, compare(clean, poisoned)) for name, clean, poisoned in rows]
    if not drawn or examples < 1 or (zoom is not None and zoom < 1):
        raise DataError(f"a picture needs an attack, an example and a zoom of at least 1, got {len(drawn)}, {examples}, {zoom}")
    for name, clean, _, _ in drawn:
        if clean.shape[1] not in (1, 3):
            raise DataError(f"images to draw must have 1 or 3 channels, got {clean.shape[1]} for {name}")
    tiles = [_tiles(clean[:examples], poisoned[:examples], zoom) for _, clean, poisoned, _ in drawn]
    width, height = (max(row[0][0].size[side] for row in tiles) for side in (0, 1))
    return _draw(drawn, tiles, max(width, _width(HEADS, SMALL)), max(height, LARGE + 4 * (SMALL + 5)))


def _draw(
    rows: Sequence[tuple[str, Tensor, Tensor, Visibility]],
    tiles: Sequence[Sequence[Sequence[Image.Image]]],
    width: int,
    height: int,
) -> Image.Image:
    names = [name if len(name) <= LONGEST else name[: LONGEST - 1] + "…" for name, *_ in rows]
    numbers = [_numbers(seen) for *_, seen in rows]
    left = MARGIN + APART + max(_width(names, LARGE), *(_width(lines, SMALL) for lines in numbers))
    group = len(HEADS) * (width + GAP) - GAP
    columns = max(map(len, tiles))
    caption = _caption([seen for *_, seen in rows])
    top = MARGIN + SMALL + 9
    bottom = top + len(rows) * (height + APART)
    size = (
        max(left + columns * (group + APART) - APART, MARGIN + _width(caption, SMALL)) + MARGIN,
        bottom + len(caption) * (SMALL + 6) + MARGIN - 6,
    )
    page = Image.new("RGB", size, WHITE)
    draw = ImageDraw.Draw(page)
    for column in range(columns):
        for i, head in enumerate(HEADS):
            draw.text((left + column * (group + APART) + i * (width + GAP), MARGIN), head, GREY, _font(SMALL))
    for row, (name, lines, examples) in enumerate(zip(names, numbers, tiles, strict=True)):
        y = top + row * (height + APART)
        draw.text((MARGIN, y - 3), name, BLACK, _font(LARGE))
        for i, line in enumerate(lines):
            draw.text((MARGIN, y + LARGE + 7 + i * (SMALL + 5)), line, GREY, _font(SMALL))
        for column, example in enumerate(examples):
            for i, tile in enumerate(example):
                x = left + column * (group + APART) + i * (width + GAP)
                draw.rectangle((x - 1, y - 1, x + tile.width, y + tile.height), LINE)  # white pixels end where the page begins
                page.paste(tile, (x, y))
    draw.line((MARGIN, bottom - 6, size[0] - MARGIN, bottom - 6), LINE)
    for i, line in enumerate(caption):
        draw.text((MARGIN, bottom + 2 + i * (SMALL + 6)), line, GREY, _font(SMALL))
    return page


def _tiles(clean: Tensor, poisoned: Tensor, zoom: int | None) -> list[tuple[Image.Image, ...]]:
    """Return each example as enlarged images in the order of `HEADS`."""
    change = 0.5 + GAIN * (poisoned - clean)
    factor = zoom or max(1, round(SIDE / max(clean.shape[2:])))
    return [tuple(_enlarged(image, factor) for image in example) for example in zip(clean, poisoned, change, strict=True)]


def _enlarged(image: Tensor, factor: int) -> Image.Image:
    pixels = image.detach().cpu().nan_to_num().clamp(0, 1).mul(255).round().to(torch.uint8)
    pixels = pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    found = Image.fromarray(pixels)
    return found.resize((found.width * factor, found.height * factor), Image.Resampling.NEAREST)


def _numbers(seen: Visibility) -> tuple[str, ...]:
    return f"L2 {seen.l2:.2f}", f"Linf {seen.linf:.2f}", f"SSIM {seen.ssim:.3f}"


def _caption(seen: Sequence[Visibility]) -> tuple[str, ...]:
    least, most = min(row.n for row in seen), max(row.n for row in seen)
    count = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    return (
        f"Change x{GAIN}: 0.5 + {GAIN} (poisoned - clean), clipped to [0, 1]; mid-grey is no change.",
        f"L2, Linf, SSIM: means over {count} images, values in [0, 1]; SSIM 1 is no change.",
    )


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _width(lines: Iterable[str], size: int) -> int:
    """Return the width in pixels of the longest line."""
    return max(int(_font(size).getlength(line)) + 1 for line in lines)
