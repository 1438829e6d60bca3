"""Images as people have them, to pixels as MNIST has them."""

import io
from functools import partial

import grpc
import numpy as np
import pytest
from grpc import StatusCode
from PIL import Image
from tercet.card import Rows
from tercet.errors import InvalidInputError
from tercet.proto.digits_pb2 import ClassifyRequest
from tercet.proto.digits_pb2 import Image as Picture
from tercet.proto.digits_pb2_grpc import DigitsStub
from tercet.server.images import BOX_SIDE, MAX_PAPER, MAX_PIXELS, MAX_SCANS, SIDE, START_OF_SCAN, PixelBudget, decode_image

from tests.conftest import Service
from tests.server.support import bomb, encoded, fields, four, refused


def pixels(content: bytes) -> Rows:
    """The pixels of a file, as signed numbers."""
    rows = decode_image(content, "image")
    assert rows.shape == (SIDE, SIDE)
    assert rows.dtype == np.uint8
    return rows.astype(int)


def transparent() -> Image.Image:
    """Black ink on a transparent background whose hidden colour is black too."""
    return four(mode="RGBA", paper=(0, 0, 0, 0), ink=(0, 0, 0, 255))


def sideways() -> bytes:
    """A photo taken with a rotated camera, according to its EXIF data."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # orientation: turn by 90 degrees to see it upright
    four().transpose(Image.Transpose.ROTATE_90).save(file, "JPEG", exif=exif, quality=95)
    return file.getvalue()


SAME = {
    "light on dark": encoded(four(paper=0, ink=255)),
    "grey": encoded(four(paper=230, ink=0)),
    "rgb": encoded(four(mode="RGB", paper="white", ink="black")),
    "bilevel": encoded(four(mode="1", paper=1, ink=0)),
    "16 bits": encoded(four(mode="I;16", paper=60_000, ink=2_000)),
    "palette": encoded(four().quantize(2)),
    "transparent": encoded(transparent()),
    "transparent palette": encoded(transparent().quantize(2)),
    "jpeg": encoded(four(), "JPEG"),
    "cmyk": encoded(four(mode="CMYK", paper=(0, 0, 0, 0), ink=(0, 0, 0, 255)), "JPEG"),
    "exif": sideways(),
    "small": encoded(four(60, 90)),
    "large": encoded(four(1200, 1800)),
}


@pytest.mark.parametrize("case", SAME)
def test_same_digit_however_it_is_kept(case: str) -> None:
    """Colours, transparency, format, orientation and size of an image hardly change the pixels."""
    expected = pixels(encoded(four()))
    assert np.corrcoef(expected.ravel(), pixels(SAME[case]).ravel())[0, 1] > 0.95


@pytest.mark.parametrize("turn", [None, *Image.Transpose])
@pytest.mark.parametrize(("width", "height"), [(120, 180), (300, 60), (40, 400)])
def test_centred(width: int, height: int, turn: Image.Transpose | None) -> None:
    """The ink ends as high or as wide as the box, with its centre of mass within half a pixel of the middle."""
    picture = four(width, height)
    rows = pixels(encoded(picture if turn is None else picture.transpose(turn)))
    assert max(np.ptp(np.flatnonzero((rows > MAX_PAPER).any(axis=axis))) + 1 for axis in (0, 1)) in (BOX_SIDE - 1, BOX_SIDE)
    for axis in (0, 1):
        centre = rows.sum(axis=1 - axis) @ (np.arange(SIDE) + 0.5) / rows.sum()
        assert abs(centre - SIDE / 2) <= 0.5


@pytest.mark.parametrize("invert", [False, True])
def test_kept_as_it_is(*, invert: bool) -> None:
    """An image of 28 x 28 pixels is not moved or scaled; only its polarity is normalised."""
    field = np.zeros((SIDE, SIDE), np.uint8)
    field[3:9, 5:20] = np.arange(100, 190).reshape(6, 15)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(255 - field if invert else field))), field)


NOISE = np.random.default_rng(0).integers(255 - MAX_PAPER, 256, (40, 40), np.uint8)


UNREADABLE, TOO_LARGE, BLANK = "not a readable PNG or JPEG image", f"at most {MAX_PIXELS} pixels", "blank"


NO_DIGIT = {
    "nothing": (b"", UNREADABLE),
    "text": (b"a text file\n", UNREADABLE),
    "cut PNG": (encoded(four())[:-40], UNREADABLE),
    "cut JPEG": (encoded(four(), "JPEG")[:400], UNREADABLE),
    "gif": (encoded(four(), "GIF"), UNREADABLE),
    "no pixels": (bomb(SIDE, SIDE), UNREADABLE),
    "no palette": (bomb(SIDE, SIDE, 3), UNREADABLE),
    "too large": (bomb(MAX_PIXELS + 1, 1), TOO_LARGE),
    "very large": (bomb(10_000, 10_000), TOO_LARGE),
    "bomb": (bomb(60_000, 60_000), TOO_LARGE),
    "white": (encoded(Image.new("L", (50, 50), 255)), BLANK),
    "black": (encoded(Image.new("L", (SIDE, SIDE), 0)), BLANK),
    "all transparent": (encoded(Image.new("RGBA", (50, 50), (0, 0, 0, 0))), BLANK),
    "noise": (encoded(Image.fromarray(NOISE)), BLANK),
}


@pytest.mark.parametrize("case", NO_DIGIT)
def test_no_digit(case: str) -> None:
    """An unreadable, too large (by its header alone) or blank image is an error that names the field and what would be right."""
    content, text = NO_DIGIT[case]
    with pytest.raises(InvalidInputError, match=text) as caught:
        decode_image(content, "images[3].encoded")
    assert caught.value.field == "images[3].encoded"


MAX_SIDE = 4096  # pixels


def test_scan_bomb() -> None:
    """A JPEG file whose last scan is repeated, 20 ms and 33 bytes each, is refused before the first is read."""
    file = io.BytesIO()
    four(800, 1200).save(file, "JPEG", progressive=True)
    good = file.getvalue()
    assert decode_image(good, "image").any()
    start = good.rindex(START_OF_SCAN)
    with pytest.raises(InvalidInputError, match=f"more than {MAX_SCANS} scans"):
        decode_image(good[:-2] + good[start:-2] * MAX_SCANS + good[-2:], "image")


def test_dust() -> None:
    """Two specks, far apart, of which nothing is left when they are scaled to a digit's size, are no digit."""
    field = np.full((MAX_SIDE, MAX_SIDE), 255, np.uint8)
    field[0, 0] = field[-1, -1] = 0
    with pytest.raises(InvalidInputError, match="blank"):
        decode_image(encoded(Image.fromarray(field)), "image")


def test_pixels_of_a_request() -> None:
    """A request may have many pictures and large ones, but not many large ones; that is told before the last is decoded."""
    budget = PixelBudget()
    for _ in range(4):
        with pytest.raises(InvalidInputError, match="not a readable"):
            decode_image(bomb(MAX_SIDE, MAX_SIDE), "image", budget)
    with pytest.raises(InvalidInputError, match="use several requests"):
        decode_image(bomb(1, 1), "images[4].encoded", budget)


@pytest.mark.slow
def test_many_large_pictures(default_service: Service) -> None:
    """The client is told which picture is too much, and the service answers others meanwhile and after it."""
    large, digit = encoded(Image.fromarray(np.pad(np.asarray(four()), MAX_SIDE // 3, constant_values=255))), encoded(four())
    count = 4 * MAX_PIXELS // (Image.open(io.BytesIO(large)).width * Image.open(io.BytesIO(large)).height)
    with grpc.insecure_channel(default_service.address) as channel:
        pictures = [Picture(encoded=large)] * (count + 1)
        error = refused(partial(DigitsStub(channel).Classify, ClassifyRequest(images=pictures)))
        assert (error.code(), fields(error)) == (StatusCode.INVALID_ARGUMENT, [f"images[{count}].encoded"])
        assert len(DigitsStub(channel).Classify(ClassifyRequest(images=[Picture(encoded=digit)] * 100)).digits) == 100
