"""Images of digits, as people have them, to pixels as MNIST has them."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from tercet.card import Rows
from tercet.errors import InvalidInputError

SIDE = 28  # pixels, of MNIST's field
BOX_SIDE = 20  # pixels, of the box in the field that the ink fills
MAX_PIXELS = 4096 * 4096  # of one image, checked before it is decoded
MAX_REQUEST_PIXELS = 4 * MAX_PIXELS  # of all images in one request
Image.MAX_IMAGE_PIXELS = None  # Pillow's limit is higher than ours, and warns where ours raises
BLANK = "the image is blank: expected dark ink on light paper, or light ink on dark"
START_OF_SCAN = b"\xff\xda"
MAX_SCANS = 100  # of a JPEG file, each of which takes as long as an image; a progressive file has about ten
MAX_PAPER = 32  # of 255: noise on the paper; more is ink


@dataclass
class PixelBudget:
    """Pixels that may still be decoded for one request, which may have thousands of images."""

    pixels: int = MAX_REQUEST_PIXELS

    def spend(self, image: Image.Image, content: bytes, field: str) -> None:
        """Raise InvalidInputError when an image, of which only the header has been read, is too expensive to decode."""
        pixels = image.width * image.height
        if pixels > MAX_PIXELS:
            raise InvalidInputError(field, f"expected at most {MAX_PIXELS} pixels, got {image.width} x {image.height}")
        if pixels > self.pixels:
            raise InvalidInputError(field, f"the images so far have more than {MAX_REQUEST_PIXELS} pixels; use several requests")
        if image.format != "PNG" and content.count(START_OF_SCAN) > MAX_SCANS:
            raise InvalidInputError(field, f"the JPEG file has more than {MAX_SCANS} scans; save it again as a simple JPEG or PNG")
        self.pixels -= pixels


def decode_image(content: bytes, field: str, budget: PixelBudget | None = None) -> Rows:
    """A PNG or JPEG file -> (28, 28) uint8, 0 = paper, 255 = ink.

    The border tells whether the ink is dark or light. An image of 28 x 28 pixels is used as it is; any other is cropped to its ink,
    scaled to fit a 20 x 20 box and centred by its centre of mass, like MNIST's digits (LeCun et al. 1998).
    Raises InvalidInputError for `field` when it is not such a file, too large, or blank.
    """
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            (budget or PixelBudget()).spend(image, content, field)
            if image.has_transparency_data:
                rgba = image.convert("RGBA")
                grey = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("L")
            elif image.mode == "I;16":  # convert would clip it to 255
                grey = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            else:
                grey = ImageOps.exif_transpose(image).convert("L")
    except InvalidInputError:
        raise
    except Exception as error:  # Pillow raises exceptions of any kind for a damaged file, even AssertionError
        raise InvalidInputError(field, "not a readable PNG or JPEG image") from error
    ink = np.asarray(grey)
    border = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
    if np.median(border) > 127:  # noqa: PLR2004  light paper
        ink = 255 - ink
    if int(ink.max()) - int(ink.min()) <= MAX_PAPER:
        raise InvalidInputError(field, BLANK)
    return ink if ink.shape == (SIDE, SIDE) else _centre(ink, field)


def _centre(ink: Rows, field: str) -> Rows:
    """(height, width) uint8 ink -> (28, 28): cropped, scaled to fit 20 x 20, centre of mass in the middle."""
    rows, columns = (np.flatnonzero((ink > MAX_PAPER).any(axis=axis)) for axis in (1, 0))
    crop = Image.fromarray(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    scale = BOX_SIDE / max(crop.size)
    size = (max(1, round(crop.width * scale)), max(1, round(crop.height * scale)))
    digit = np.asarray(crop.resize(size, Image.Resampling.LANCZOS), dtype=np.float64)  # (height, width)
    mass = digit.sum()
    if not mass:  # specks that were far apart are lost
        raise InvalidInputError(field, BLANK)
    top, left = (
        round(np.clip(SIDE / 2 - (digit.sum(axis=1 - axis) @ (np.arange(length) + 0.5)) / mass, 0, SIDE - length))
        for axis, length in enumerate(digit.shape)
    )
    pixels = np.zeros((SIDE, SIDE), dtype=np.uint8)
    pixels[top : top + digit.shape[0], left : left + digit.shape[1]] = digit
    return pixels
