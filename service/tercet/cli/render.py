"""Tables, cards, pictures and bars as plain text, which looks the same in a terminal and in a pipe."""

from collections.abc import Mapping, Sequence
from io import StringIO

from rich.bar import Bar
from rich.console import Console, RenderableType
from rich.table import Table

from tercet.card import Card, Rows

INK = 128  # pixels of at least this value (of 255) are drawn
HALVES = " ▀▄█"  # no pixel, the upper one, the lower one, both
DIGEST = 16  # hexadecimal digits of a hash that are shown; card.json has all


def to_text(content: RenderableType, width: int | None = None) -> str:
    """Render without colours; by default as wide as the terminal, or as COLUMNS."""
    file = StringIO()
    Console(file=file, width=width or Console().width, color_system=None, highlight=False, markup=False, emoji=False).print(content)
    return "\n".join(map(str.rstrip, file.getvalue().splitlines()))


def grid(rows: Sequence[Sequence[RenderableType]], *, wrap: bool = False, gap: int = 2) -> Table:
    """Cells in aligned columns; only the last one may wrap."""
    table = Table.grid(padding=(0, gap))
    for i in range(len(rows[0])):
        table.add_column(no_wrap=not (wrap and i == len(rows[0]) - 1), vertical="middle")
    for row in rows:
        table.add_row(*row)
    return table


def show_digit(pixels: Rows, probabilities: Sequence[float]) -> str:
    """A picture, (28, 28) uint8, 255 = ink, next to a bar per digit; two pixels per character, one above the other."""
    ink = (pixels >= INK).astype(int)
    picture = "\n".join("".join(HALVES[i] for i in line) for line in ink[::2] + 2 * ink[1::2])
    best = max(probabilities)
    bars = [(f"{digit}", Bar(1, 0, p, width=24), f"{p:6.1%}{' <-' * (p == best)}") for digit, p in enumerate(probabilities)]
    return to_text(grid([(picture, grid(bars, gap=1))]), width=80)


def overview(cards: Mapping[str, Card | None]) -> str:
    """A table of models by name; those without a card are not trained."""
    rows = [("NAME", "INPUT", "LABELS", "METRIC", "DATA", "COMMIT")]
    for name, card in cards.items():
        if card is None:
            rows.append((name, "-", "-", "not trained", "-", "-"))
            continue
        shape = "x".join(map(str, card.input.shape))
        labels = ", ".join(card.labels) if len(card.labels) <= 2 else f"{card.labels[0]} .. {card.labels[-1]}"  # noqa: PLR2004
        commit = card.git_commit[:7] + "*" * card.git_commit.endswith("-dirty")
        metric = _metrics(card).partition(",")[0]
        rows.append((name, f"{card.input.name} {shape}".strip(), labels or "-", metric or "-", card.data["source"], commit))
    return to_text(grid(rows), width=1000)


def details(card: Card) -> str:
    """The card of a model, wrapped to the width of the terminal."""
    tensor = card.input
    shape = ", ".join(["batch", *map(str, tensor.shape)])
    ranges = [(f"  {feature.name}", f"{feature.minimum} to {feature.maximum}", feature.unit) for feature in tensor.features]
    validated = [(key, value) for key, value in card.cross_validation.items() if isinstance(value, dict)][:4]
    facts = {
        "output": f"{card.output.name}, {card.output.datatype}: {', '.join(card.labels) or 'values'}",
        "metrics": _metrics(card),
        "validated": ", ".join(
            f"{key} {value['mean']:.3f}" + (f" ({value['std']:.3f})" if "std" in value else "") for key, value in validated
        ),
        "data": f"{card.data['source']}, SHA-256 {card.data['sha256'][:DIGEST]}",
        "parameters": f"SHA-256 {card.params_sha256[:DIGEST]}",
        "commit": card.git_commit,
        **{name: f"SHA-256 {digest[:DIGEST]}" for name, digest in card.files.items()},
    }
    texts = [f"{card.name}, version {card.version}", card.description, card.intended_use, card.warning]
    head = (f"{'input':10}", f"{tensor.name}, {tensor.datatype}, [{shape}]{'; NaN = not measured' * tensor.missing}")
    tables = [head], ranges, [(f"{name:10}", text) for name, text in facts.items() if text]
    parts: list[RenderableType] = [*filter(None, texts), "", *(grid(rows, wrap=True) for rows in tables if rows)]
    return "\n".join(map(to_text, parts))


def _metrics(card: Card) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in card.metrics.items())
