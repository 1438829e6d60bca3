"""Pictures of digits, as people have them, to pixels as MNIST has them."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from tercet.card import Rows
from tercet.errors import InvalidInputError

SIDE = 28  # pixels of MNIST's field
BOX = 20  # pixels of the box in it that the ink fills
MAX_PIXELS = 4096 * 4096  # of a picture, before it is decoded
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit is higher, and warns where ours refuses
BLANK = "the picture is blank; a digit has dark ink on light paper, or light on dark"
START_OF_SCAN = b"\xff\xda"
MAX_SCANS = 100  # of a JPEG file, each of which costs as much as a picture; a progressive one has about ten
PAPER = 32  # up to this much ink (of 255) is paper with noise


@dataclass
class Allowance:
    """How many pixels may still be decoded for one request, which may have thousands of pictures."""

    pixels: int = 4 * MAX_PIXELS

    def take(self, picture: Image.Image, content: bytes, where: str) -> None:
        """Raise InvalidInputError when a picture, of which only the header has been read, would cost too much."""
        pixels = picture.width * picture.height
        if pixels > MAX_PIXELS:
            raise InvalidInputError(where, f"{picture.width} x {picture.height} pixels are too many; {MAX_PIXELS} are read")
        if pixels > self.pixels:
            raise InvalidInputError(where, f"the pictures up to here have more than {4 * MAX_PIXELS} pixels; use more requests")
        if picture.format != "PNG" and content.count(START_OF_SCAN) > MAX_SCANS:
            raise InvalidInputError(where, f"more than {MAX_SCANS} scans; save the JPEG file anew")
        self.pixels -= pixels


def decode_image(content: bytes, where: str, allowance: Allowance | None = None) -> Rows:
    """A PNG or JPEG file -> (28, 28) uint8, 0 = paper, 255 = ink.

    The darker or lighter side is taken for ink by the border of the picture. A picture of 28 x 28 is kept as it is; any other is
    cropped to its ink, scaled into a box of 20 x 20 and centred by its centre of mass, as MNIST's digits were (LeCun et al. 1998).
    Raises InvalidInputError with the field `where` when it is no such picture, too large, or blank.
    """
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as picture:
            (allowance or Allowance()).take(picture, content, where)
            if picture.has_transparency_data:
                rgba = picture.convert("RGBA")
                grey = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("L")
            elif picture.mode == "I;16":  # convert would clip it to 255
                grey = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            else:
                grey = ImageOps.exif_transpose(picture).convert("L")
    except InvalidInputError:
        raise
    except Exception as error:  # Pillow's readers raise whatever comes up, AssertionError too
        raise InvalidInputError(where, f"{len(content)} bytes that are no readable PNG or JPEG") from error
    ink = np.asarray(grey)
    border = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
    if np.median(border) > 127:  # noqa: PLR2004  light paper
        ink = 255 - ink
    if int(ink.max()) - int(ink.min()) <= PAPER:
        raise InvalidInputError(where, BLANK)
    return ink if ink.shape == (SIDE, SIDE) else centre(ink, where)


def centre(ink: Rows, where: str) -> Rows:
    """(height, width) uint8 ink -> (28, 28): cropped, scaled to 20 x 20 with its proportions, centre of mass in the middle.

    Raises InvalidInputError with the field `where` when nothing is left of specks that were far apart.
    """
    rows, columns = (np.flatnonzero((ink > PAPER).any(axis=axis)) for axis in (1, 0))
    crop = Image.fromarray(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    scale = BOX / max(crop.size)
    size = (max(1, round(crop.width * scale)), max(1, round(crop.height * scale)))
    digit = np.asarray(crop.resize(size, Image.Resampling.LANCZOS), dtype=np.float64)  # (height, width)
    mass = digit.sum()
    if not mass:
        raise InvalidInputError(where, BLANK)
    top, left = (
        round(np.clip(SIDE / 2 - (digit.sum(axis=1 - axis) @ (np.arange(length) + 0.5)) / mass, 0, SIDE - length))
        for axis, length in enumerate(digit.shape)
    )
    field = np.zeros((SIDE, SIDE), dtype=np.uint8)
    field[top : top + digit.shape[0], left : left + digit.shape[1]] = digit
    return field
