"""The picture of attacks: every pixel where it belongs, and the words beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from secateur.errors import DataError, InconclusiveError
from secateur.poison.preview import sheet
from secateur.state import generator


@pytest.fixture
def words(monkeypatch) -> list[tuple[str, tuple[float, float]]]:
    """What is written on the picture, and where."""
    written: list[tuple[str, tuple[float, float]]] = []
    write = ImageDraw.ImageDraw.text

    def text(self, xy, text, *args, **kwargs):
        written.append((text, xy))
        return write(self, xy, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return written


def enlarged(image: torch.Tensor, zoom: int) -> np.ndarray:
    """Pixels (h, w, 3) as they should be on the page."""
    values = np.round(image.numpy().clip(0, 1) * np.float32(255)).astype(np.uint8)
    return np.repeat(np.repeat(np.broadcast_to(values, (3, *values.shape[1:])).transpose(1, 2, 0), zoom, 0), zoom, 1)


def places(page: Image.Image, tile: np.ndarray) -> list[tuple[int, int]]:
    """Everywhere (x, y) that exactly this tile lies on the page."""
    pixels = np.asarray(page)
    h, w, _ = tile.shape
    views = np.lib.stride_tricks.sliding_window_view(pixels, (h, w, 3))[:, :, 0]
    near = np.argwhere((views[:, :, 0, 0] == tile[0, 0]).all(-1) & (views[:, :, -1, -1] == tile[-1, -1]).all(-1))
    return [(int(x), int(y)) for y, x in near if (views[y, x] == tile).all()]


def pictures(n: int, shape: tuple[int, int, int], seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, *shape), generator=generator(seed)) / 255


@pytest.mark.parametrize("shape", [(3, 8, 10), (1, 9, 6)])
@pytest.mark.parametrize("zoom", [1, 3])
def test_every_image_is_there_once_in_its_place(shape, zoom):
    clean, one, two = pictures(5, shape, 0), pictures(5, shape, 1), pictures(5, shape, 2)
    page = sheet([("one", clean, one), ("two", clean, two)], examples=2, zoom=zoom)
    assert page.mode == "RGB"
    assert page.getpixel((0, 0)) == page.getpixel((page.width - 1, page.height - 1)) == (255, 255, 255)
    where = {}
    for row, poisoned in enumerate((one, two)):
        for example in range(2):
            tiles = clean[example], poisoned[example], 0.5 + 10 * (poisoned[example] - clean[example])
            for column, tile in enumerate(tiles):
                found = places(page, enlarged(tile, zoom))
                assert len(found) == (2 if column == 0 else 1)  # both rows show the clean image
                where[row, example, column] = sorted(found, key=lambda place: place[1])[row if column == 0 else 0]
    for row in range(2):
        inside = [where[row, example, column] for example in range(2) for column in range(3)]
        assert len({y for _, y in inside}) == 1
        assert [x for x, _ in inside] == sorted({x for x, _ in inside})
    assert where[0, 0, 0][1] < where[1, 0, 0][1]
    assert [where[0, e, c][0] for e in range(2) for c in range(3)] == [where[1, e, c][0] for e in range(2) for c in range(3)]
    assert not places(page, enlarged(clean[2], zoom))


def test_no_change_is_mid_grey_and_a_twentieth_is_the_limit():
    clean = torch.full((1, 1, 8, 8), 0.5)
    poisoned = clean.clone()
    poisoned[0, 0, 0, :4] += torch.tensor([0.04, 0.06, -0.02, -0.06])
    page = sheet([("a", clean, poisoned)], zoom=1)
    change = np.full((8, 8, 3), 128, np.uint8)
    change[0, :4] = np.array([round(0.9 * 255), 255, round(0.3 * 255), 0])[:, None]
    assert len(places(page, change)) == 1


def test_the_words(words):
    clean = torch.full((3, 1, 12, 12), 0.5)
    poisoned = clean.clone()
    poisoned[:, 0, 0, :4] += 0.25
    sheet([("first", clean, poisoned), ("second", clean, clean)], examples=2)
    said = [text for text, _ in words]
    assert said[:6] == ["clean", "poisoned", "change x10"] * 2
    first, second = said.index("first"), said.index("second")
    assert said[first + 1 : first + 3] == ["L2 0.50", "Linf 0.25"]
    assert said[first + 3].startswith("SSIM 0.")
    assert said[second + 1 : second + 4] == ["L2 0.00", "Linf 0.00", "SSIM 1.000"]
    caption = " ".join(said[second + 4 :])
    assert "0.5 + 10 (poisoned - clean), clipped to [0, 1]; mid-grey is no change" in caption
    assert "means over 3 images" in caption  # also those that are not drawn


def test_rows_of_different_numbers_of_images(words):
    x = pictures(1200, (1, 8, 8), 3)
    page = sheet([("few", x[:1], x[:1]), ("many", x, x)], examples=3, zoom=2)
    assert "means over 1 to 1,200 images" in words[-1][0]
    assert len(places(page, enlarged(x[0], 2))) == 4
    assert len(places(page, enlarged(x[2], 2))) == 2


@pytest.mark.parametrize(("side", "zoom"), [(8, 12), (28, 3), (32, 3), (64, 2), (96, 1), (200, 1)])
def test_images_are_enlarged_by_a_whole_number_to_about_a_hundred_pixels(side, zoom):
    x = pictures(1, (1, side, side), 4)
    assert len(places(sheet([("a", x, x)], examples=1), enlarged(x[0], zoom))) == 2


def test_long_names_are_cut_and_nothing_lies_under_the_images(words):
    x = pictures(1, (3, 8, 8), 5)
    page = sheet([("n" * 100, x, x)], examples=1)
    assert ("n" * 23 + "…") in [text for text, _ in words]
    left = min(x for x, _ in places(page, enlarged(x[0], 12)))
    name = next(xy for text, xy in words if text.startswith("nnn"))
    shown = np.asarray(page)[int(name[1]) + 4 : int(name[1]) + 20, int(name[0]) : left - 2]
    assert (shown[:, -10:] == 255).all()
    assert (shown < 100).any()


def test_every_word_is_on_the_page(words):
    x = pictures(1, (1, 8, 8), 6)
    page = sheet([("a", x, x)], examples=1, zoom=1)  # the caption is wider than the images
    for text, (left, top) in words:
        assert 0 <= left < left + 5 * len(text) <= page.width
        assert 0 <= top <= page.height - 20


def test_the_same_picture_again_and_the_images_as_they_were():
    x, y = pictures(3, (3, 10, 10), 7), pictures(3, (3, 10, 10), 8)
    before = x.clone(), y.clone()
    one, two = (sheet([("a", x, y)]) for _ in range(2))
    assert one.tobytes() == two.tobytes()
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


def test_what_cannot_be_drawn():
    x = pictures(2, (1, 8, 8), 9)
    for rows, settings in (([], {}), ([("a", x, x)], {"examples": 0}), ([("a", x, x)], {"zoom": 0})):
        with pytest.raises(DataError, match="needs an attack, an example and a zoom of at least 1"):
            sheet(rows, **settings)
    with pytest.raises(DataError, match="must have 1 or 3 channels, got 2 for a"):
        sheet([("a", x.expand(-1, 2, -1, -1), x.expand(-1, 2, -1, -1))])
    with pytest.raises(DataError, match="must have the same shape"):
        sheet([("a", x, x[:1])])
    with pytest.raises(InconclusiveError, match="at least one image"):
        sheet([("a", x[:0], x[:0])])
