"""Tables, pictures and bars are plain text."""

import numpy as np
from tercet.cli.render import grid, show_digit, to_text


def test_a_grid_is_aligned() -> None:
    """Columns are as wide as their widest cell, without spaces at the end of lines; markup is text."""
    assert to_text(grid([("a", "bc", "d"), ("[red]efg", "h", "")])) == "a         bc  d\n[red]efg  h"


def test_a_digit_is_drawn_next_to_its_probabilities() -> None:
    """Two pixels make a character; each digit has a bar, and the most probable one an arrow."""
    pixels = np.zeros((28, 28), np.uint8)
    pixels[0, 0] = pixels[1, 1] = pixels[2:4, 0] = 255
    lines = show_digit(pixels, [0.5, 0.25, 0.25, *[0.0] * 7]).split("\n")
    assert (len(lines), lines[0], lines[1]) == (14, "▀▄", "█")
    assert lines[2] == f"{'':30}0 {'█' * 12:24}  50.0% <-"
    assert lines[11].endswith("9                            0.0%")
