"""Evaluate the two exported files on the whole test set; fail when they disagree or miss a quality gate."""

import io
import math
from typing import Any

import numpy as np
import onnxruntime
import torch
from matplotlib.figure import Figure

import models
from models.files import atomic_write
from pipeline.common import Paths, PipelineError, Section, load_params, load_rows, main, write_csv, write_json
from pipeline.metrics import calibration, check_gates, confidence, is_classification, measure, roc
from pipeline.train import load_network

TOLERANCE = 1e-5  # largest difference between torch and onnxruntime: of a probability, or of a value relative to the largest
MAX_IMAGES, COLUMNS = 60, 10  # of misread.png
HEADERS = {
    "confusion.csv": ("truth", "predicted", "count"),
    "roc.csv": ("false_positive_rate", "true_positive_rate"),
    "calibration.csv": ("predicted", "observed", "rows"),
    "misread/misread.csv": ("row", "truth", "predicted", "probability"),
}


class Params(Section, frozen=True, kw_only=True):
    """Section `evaluate` of params.yaml."""

    gates: dict[str, dict[str, float]]  # data set (full, sample) -> metric, dotted -> lower bound


def run_torch(model: str, inputs: np.ndarray) -> np.ndarray:
    """Predictions of model.pt, (rows, ...)."""
    network = load_network(model)
    with torch.inference_mode():
        return np.concatenate([network(rows).numpy() for rows in torch.from_numpy(inputs).split(1000)])


def run_onnxruntime(model: str, inputs: np.ndarray) -> np.ndarray:
    """Predictions of model.onnx, (rows, ...), on the CPU."""
    session = onnxruntime.InferenceSession(Paths(model).trained / "model.onnx", providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: inputs[i : i + 1000]})[0] for i in range(0, len(inputs), 1000)])


def compare(ours: np.ndarray, theirs: np.ndarray, *, classes: bool) -> dict[str, float]:
    """The difference of two predictions, (rows, ...). Raises PipelineError when a label differs, or a value by too much."""
    flips = np.flatnonzero(ours.argmax(axis=1) != theirs.argmax(axis=1)) if classes else np.array([])
    if len(flips):
        raise PipelineError(f"torch and onnxruntime give different labels for {len(flips)} test rows, the first is row {flips[0]}")
    difference = float(np.abs(ours - theirs).max())
    allowed = TOLERANCE * max(1.0, float(np.abs(theirs).max()))
    if not difference <= allowed:
        raise PipelineError(f"a prediction differs by {difference:.2g} between torch and onnxruntime; {allowed:g} is allowed")
    return {"label_flips": len(flips), "largest_difference": difference}


def write_tables(model: str, probabilities: np.ndarray, targets: np.ndarray) -> None:
    """Write the confusion matrix, the ROC and calibration curves and the misread rows of a classifier; of others only headers."""
    tables: dict[str, list[tuple[object, ...]]] = {name: [] for name in HEADERS}
    if is_classification(targets):
        labels, predicted = models.load(model, "contract").CONTRACT.labels, probabilities.argmax(axis=1)
        counts = np.zeros((len(labels), len(labels)), dtype=int)
        np.add.at(counts, (targets, predicted), 1)
        tables = {
            "confusion.csv": [(labels[truth], labels[label], count) for (truth, label), count in np.ndenumerate(counts)],
            "roc.csv": [*roc(probabilities, targets)],
            "calibration.csv": [*calibration(*confidence(probabilities, targets))],
            "misread/misread.csv": [
                (row, labels[targets[row]], labels[predicted[row]], f"{probabilities[row].max():.4f}")
                for row in np.flatnonzero(predicted != targets)
            ],
        }
    for name, rows in tables.items():
        write_csv(Paths(model).report / name, HEADERS[name], rows)


def draw_misread(model: str, images: np.ndarray, probabilities: np.ndarray, targets: np.ndarray) -> None:
    """Write misread.png: the first misread images, (rows, height, width), with prediction, truth and probability."""
    labels, predicted = models.load(model, "contract").CONTRACT.labels, probabilities.argmax(axis=1)
    rows = np.flatnonzero(predicted != targets)[:MAX_IMAGES]
    if not len(rows):
        return
    figure = Figure(figsize=(COLUMNS, 1.5 * math.ceil(len(rows) / COLUMNS)), layout="constrained")
    for position, row in enumerate(rows, 1):
        cell = figure.add_subplot(math.ceil(len(rows) / COLUMNS), COLUMNS, position)
        cell.imshow(images[row], cmap="Greys")
        cell.set_title(f"{labels[predicted[row]]}, is {labels[targets[row]]}\n{probabilities[row].max():.0%}", fontsize=9)
        cell.axis("off")
    png = io.BytesIO()
    figure.savefig(png, metadata={"Software": None})
    atomic_write(Paths(model).report / "misread" / "misread.png", png.getvalue())


def evaluate(model: str) -> None:
    """Stage: model.onnx, model.pt -> report/metrics.json and plots; fails when a gate is missed."""
    params = load_params(model, "evaluate", Params)
    data = load_rows(model)
    inputs, targets = data.test_inputs, data.test_targets
    if data.source not in params.gates:
        raise PipelineError(f"params.yaml: models.{model}.evaluate.gates has no entry for the data set {data.source!r}")
    predictions = run_onnxruntime(model, inputs)
    agreement = compare(run_torch(model, inputs), predictions, classes=is_classification(targets))
    metrics: dict[str, Any] = {"data": data.source, **measure(predictions, targets), **agreement}
    write_json(Paths(model).report / "metrics.json", metrics)
    write_tables(model, predictions, targets)
    if is_classification(targets) and inputs.ndim == 3:  # noqa: PLR2004  images, (rows, height, width)
        draw_misread(model, inputs, predictions, targets)
    check_gates(metrics, params.gates[data.source])
    print(f"{model}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float)))


if __name__ == "__main__":
    main(evaluate)
