"""What a person sees in a terminal: tables, cards, pictures, bars and histograms, as plain text."""

import math
import shutil
from collections.abc import Mapping, Sequence

import click
import numpy as np

from tercet.card import Card, Rows

SHARP = 128  # from this much ink (of 255) a pixel is drawn
EIGHTHS = " ▏▎▍▌▋▊▉"
HALVES = " ▀▄█"  # nothing, the upper pixel, the lower one, both
BAR = 24  # characters of a bar that is full
DIGEST = 16  # hexadecimal digits of a hash that are shown; card.json has all
MARGIN = 12  # characters for the name of an entry


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def bar(share: float, width: int = BAR) -> str:
    """A bar for a share of one, in eighths of a character."""
    full, rest = divmod(round(share * width * 8), 8)
    return ("█" * full + EIGHTHS[rest]).ljust(width)[:width]


def draw(pixels: Rows) -> list[str]:
    """(height, width) uint8, 255 = ink, an even height -> height / 2 lines of `width` characters."""
    ink = (pixels >= SHARP).astype(int)
    return ["".join(HALVES[i] for i in line) for line in ink[::2] + 2 * ink[1::2]]


def show_digit(pixels: Rows, probabilities: Sequence[float]) -> str:
    """A picture, (28, 28) uint8, beside a bar for each digit's probability."""
    best = max(probabilities)
    bars = [f"{digit} {bar(p)} {p:6.1%}{' <-' * (p == best)}" for digit, p in enumerate(probabilities)]
    lines = draw(pixels)
    above = (len(lines) - len(bars)) // 2
    beside = [*[""] * above, *bars, *[""] * (len(lines) - above - len(bars))]
    return "\n".join(f"{left}  {right}".rstrip() for left, right in zip(lines, beside, strict=True))


def histogram(values: Rows) -> str:
    """How many of the values, (n,), lie where: a bar for each step of 1, 2, 5, 10, 20 and so on."""
    values = np.maximum(values, 1e-3)
    powers = range(math.floor(math.log10(values.min())), math.ceil(math.log10(values.max())) + 1)
    counts, edges = np.histogram(values, [float(f"{factor}e{power}") for power in powers for factor in (1, 2, 5)])
    some = np.flatnonzero(counts)
    return "\n".join(
        f"{edges[i]:8g} to {edges[i + 1]:<6g} {bar(counts[i] / counts.max(), 40)} {counts[i]}" for i in range(some[0], some[-1] + 1)
    )


def overview(cards: Mapping[str, Card | None]) -> str:
    """A table of models by name, a line each; one without a card is not trained."""
    return table([("NAME", "TAKES", "LABELS", "FIGURE", "DATA", "COMMIT"), *(_line(name, card) for name, card in cards.items())])


def _line(name: str, card: Card | None) -> tuple[str, ...]:
    """One model as cells of a table."""
    if card is None:
        return name, "-", "-", "not trained", "-", "-"
    figure = next((f"{key} {value:.4g}" for key, value in card.metrics.items()), "-")
    takes = " ".join(filter(None, [card.input.name, "x".join(map(str, card.input.shape))]))
    labels = ", ".join(card.labels) if len(card.labels) <= 2 else f"{card.labels[0]} .. {card.labels[-1]}"  # noqa: PLR2004
    return name, takes, labels or "-", figure, card.data["source"], commit(card)


def commit(card: Card) -> str:
    """The commit that trained a model, with a * when there were changes beside it."""
    return card.git_commit[:7] + "*" * card.git_commit.endswith("-dirty")


def details(card: Card) -> str:
    """All that a card says for a person."""
    tensor = card.input
    shape = f"{tensor.datatype}, [batch{''.join(f', {size}' for size in tensor.shape)}]"
    ranges = [(f"  {each.name}", f"{each.minimum} to {each.maximum}", each.unit) for each in tensor.features]
    said = [f"{card.name}, version {card.version}", card.description, card.intended_use, card.warning]
    about = {
        "answers": f"{card.output.name}, {card.output.datatype}: {', '.join(card.labels) or 'values'}",
        "figures": ", ".join(f"{key} {value:.4g}" for key, value in card.metrics.items()),
        "validated": validated(card),
        "data": f"{card.data['source']}, SHA-256 {card.data['sha256'][:DIGEST]}",
        "parameters": f"SHA-256 {card.params_sha256[:DIGEST]}",
        "commit": card.git_commit,
        **{name: f"SHA-256 {digest[:DIGEST]}" for name, digest in card.files.items()},
    }
    return "\n".join(
        [
            *(wrap(text) for text in said if text),
            "",
            wrap(f"{tensor.name}, {shape}{'; NaN = not measured' * tensor.missing}", "takes"),
            table(ranges),
            *(wrap(text, name) for name, text in about.items() if text),
        ]
    )


def wrap(text: str, name: str = "") -> str:
    """A text in the width of the terminal, beside its name when it has one."""
    width, margin = shutil.get_terminal_size().columns, MARGIN if name else 0
    return click.wrap_text(text, width, initial_indent=name.ljust(margin), subsequent_indent=" " * margin)


def validated(card: Card) -> str:
    """The figures of the cross-validation: mean, and standard deviation over its repeats when there were several."""
    figures = [(key, value) for key, value in card.cross_validation.items() if isinstance(value, dict)]
    return ", ".join(
        f"{key} {value['mean']:.3f}" + (f" ({value['std']:.3f})" if "std" in value else "") for key, value in figures[:4]
    )
