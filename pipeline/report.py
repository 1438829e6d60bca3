"""All figures and plots of the trained models on one page that needs no network: `make report` writes report.html.

`python -m pipeline.report --live` shows the learning curves alone, and adds to them while models are trained.
"""

import contextlib
import csv
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import dvc.api
import jinja2
import matplotlib as mpl
import numpy as np
from dvc.exceptions import DvcException
from dvc.scm import SCMError
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import models
from pipeline.stage import folder, load_params, load_rows

PAGE = Path("report.html")
CURVES = Path("curves", "plots", "metrics")
OPTIMIZERS = ("sgd", "momentum", "rmsprop", "adam")  # experiments <model>-<name>, as benchmarks/optimizers.py runs them
SHOWN = 40  # misread pictures at most
INK, GREY = "#1a5fb4", "#9a9996"
STYLE: Any = {
    "svg.hashsalt": "tercet",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
}


def read(path: Path, *, sep: str = ",") -> list[dict[str, str]]:
    """The rows of a small table; none when there is no such file."""
    return list(csv.DictReader(path.read_text().splitlines(), delimiter=sep)) if path.is_file() else []


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    """One column as numbers."""
    return [float(row[name]) for row in rows]


@contextlib.contextmanager
def figure(found: list[str], title: str, *, size: tuple[float, float] = (3.6, 2.7)) -> Iterator[Axes]:
    """Axes to draw on; the picture is added to `found` as SVG."""
    with mpl.rc_context(STYLE):
        drawing = Figure(figsize=size, layout="constrained")
        axes = drawing.subplots()
        axes.set_title(title)
        yield axes
        text = io.StringIO()
        drawing.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    found.append(text.getvalue().partition("-->")[2] or text.getvalue())


def curves(model: str, found: list[str]) -> None:
    """Loss and accuracy by epoch."""
    for name in ("loss", "accuracy"):
        parts = {part: read(folder(model) / CURVES / part / f"{name}.tsv", sep="\t") for part in ("train", "validation")}
        if any(parts.values()):
            with figure(found, f"{name} by epoch") as axes:
                for (part, rows), colour in zip(parts.items(), (INK, GREY), strict=True):
                    if rows:
                        axes.plot(column(rows, "step"), column(rows, name), color=colour, label=part)
                axes.legend(frameon=False)


def confusion(model: str, found: list[str]) -> None:
    """How often each label was given for each."""
    if rows := read(folder(model) / "plots" / "confusion.csv"):
        labels = list(models.load(model, "contract").CONTRACT.labels)
        counts = np.zeros((len(labels), len(labels)), dtype=int)
        for row in rows:
            counts[labels.index(row["truth"]), labels.index(row["answer"])] += 1
        with figure(found, "answers (across) for each truth (down)") as axes:
            shade = np.log1p(counts) / np.log1p(counts.max())
            axes.imshow(shade, cmap="Blues", vmin=0, vmax=1.2)
            axes.set_xticks(range(len(labels)), labels)
            axes.set_yticks(range(len(labels)), labels)
            for (truth, answer), count in np.ndenumerate(counts):
                if count:
                    colour = "white" if shade[truth, answer] > 0.6 else "black"  # noqa: PLR2004
                    axes.text(answer, truth, str(count), ha="center", va="center", color=colour, fontsize=7)


def line(name: str, title: str, x: str, y: str) -> Callable[[str, list[str]], None]:
    """Draws one table of `plots` as a line, beside the diagonal."""

    def draw(model: str, found: list[str]) -> None:
        if rows := read(folder(model) / "plots" / name):
            with figure(found, title) as axes:
                axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
                axes.plot(column(rows, x), column(rows, y), color=INK, marker="o" if len(rows) < SHOWN else "", markersize=3)
                axes.set_xlabel(x.replace("_", " "))
                axes.set_ylabel(y.replace("_", " "))

    return draw


def optimizers(model: str, found: list[str]) -> None:
    """The training loss of the experiments that benchmarks/optimizers.py has run, if it has."""
    tables = {}
    for name in OPTIMIZERS:
        try:
            text = dvc.api.read(str(folder(model) / CURVES / "train" / "loss.tsv"), rev=f"{model}-{name}")
        except (DvcException, SCMError, FileNotFoundError):  # no such experiment here
            continue
        tables[name] = list(csv.DictReader(text.splitlines(), delimiter="\t"))
    if tables:
        with figure(found, "training loss by epoch, by optimiser") as axes:
            for name, rows in tables.items():
                axes.plot(column(rows, "step"), column(rows, "loss"), label=name)
            axes.legend(frameon=False)


def misread(model: str, found: list[str]) -> None:
    """Pictures that were given a wrong label, with that label, its probability and the truth."""
    rows = read(folder(model) / "plots" / "misread.csv")[:SHOWN]
    contract = models.load(model, "contract").CONTRACT
    if not rows or len(contract.input.shape) != 2:  # noqa: PLR2004  only pictures can be shown
        return
    pictures = load_rows(model)["test_inputs"]
    across = min(10, len(rows))
    down = -(-len(rows) // across)
    title = f"misread: the answer, its probability, the truth ({len(rows)} shown)"
    with figure(found, title, size=(0.8 * across, 1.05 * down + 0.3)) as axes:
        axes.axis("off")
        for i, row in enumerate(rows):
            place = axes.inset_axes(((i % across) / across, 1 - (i // across + 0.78) / down, 0.85 / across, 0.7 / down))
            place.imshow(pictures[int(row["row"])], cmap="Greys", interpolation="nearest")
            place.set_title(f"{row['answer']} {float(row['probability']):.0%}, is {row['truth']}", fontsize=6, loc="center", pad=2)
            place.set_xticks([])
            place.set_yticks([])


PLOTS = (
    curves,
    confusion,
    line("roc.csv", "ROC", "false_positive_rate", "true_positive_rate"),
    line("calibration.csv", "calibration on the test rows", "predicted", "observed"),
    line("cross_validated_calibration.csv", "calibration, cross-validated", "predicted", "observed"),
    optimizers,
    misread,
)


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of a tree of figures, by dotted name."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, f"{value:.4g}" if isinstance(value, float) else str(value)


def describe(model: str) -> dict[str, Any]:
    """What the page says of a model."""
    pictures: list[str] = []
    for plot in PLOTS:
        plot(model, pictures)
    card = json.loads((folder(model) / "card.json").read_text())
    metrics = json.loads((folder(model) / "metrics.json").read_text())
    gates = load_params(model, "evaluate", dict[str, Any])["gates"].get(metrics["data"], {})
    return {"card": card, "metrics": list(flat(metrics)), "gates": list(flat(gates)), "pictures": pictures}


def write(described: dict[str, dict[str, Any]], *, live: bool = False) -> None:
    """Write the page."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    unfinished = PAGE.with_suffix(".part")
    unfinished.write_text(environment.get_template("report.html.j2").render(models=described, live=live))
    unfinished.replace(PAGE)  # whoever looks sees a whole page


def grown() -> dict[Path, float]:
    """The files of learning curves, and when they were last added to."""
    times = {}
    for path in sorted(Path("models").glob(f"*/{CURVES}/*/*.tsv")):
        with contextlib.suppress(FileNotFoundError):  # DVC removes them before it trains anew
            times[path] = path.stat().st_mtime
    return times


def follow() -> None:
    """Write a page of learning curves whenever one has grown, for ever."""
    seen: dict[Path, float] = {}
    while True:
        if (now := grown()) != seen:
            seen, drawn = now, {model: list[str]() for model in models.names()}
            for model, pictures in drawn.items():
                curves(model, pictures)
            write({model: {"pictures": pictures} for model, pictures in drawn.items() if pictures}, live=True)
        time.sleep(1)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--live", is_flag=True, help="Show learning curves alone, as they grow, until Ctrl-C.")
def main(*, live: bool) -> None:
    """Write report.html: the figures and plots of all trained models."""
    if live:
        print(f"{PAGE}: learning curves; the page follows them until Ctrl-C", flush=True)
        follow()
    trained = [model for model in models.names() if (folder(model) / "metrics.json").is_file()]
    write({model: describe(model) for model in trained})
    print(f"{PAGE}: {', '.join(trained)}")


if __name__ == "__main__":
    main()
