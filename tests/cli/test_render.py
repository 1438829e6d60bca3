"""Tables, pictures, bars and histograms are plain text."""

import numpy as np
from tercet.cli.render import grid, histogram, show_digit, to_text


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


def test_a_histogram_has_steps_of_1_2_5() -> None:
    """Every value is counted in its step, empty steps between others too."""
    lines = histogram(np.array([0.15, 3.0, 4.0])).splitlines()
    assert [(line.split()[0], line.split()[2], line.split()[-1]) for line in lines] == [
        ("0.1", "0.2", "1"),
        ("0.2", "0.5", "0"),
        ("0.5", "1", "0"),
        ("1", "2", "0"),
        ("2", "5", "2"),
    ]
