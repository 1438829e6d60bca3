"""Evaluate the two exported files on the whole test set; fail when they disagree or miss a quality gate."""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix

import models
from models.files import atomic_write
from pipeline.common import Paths, PipelineError, Section, load_params, load_rows, write_csv, write_json
from pipeline.metrics import calibration, check_gates, confidence, is_classification, measure, roc
from pipeline.train import load_network, predict

TOLERANCE = 1e-5  # largest difference between torch and onnxruntime: of a probability, or of a value relative to the largest
MAX_IMAGES, COLUMNS = 60, 10  # of misread.png
HEADERS = {
    "confusion.csv": ("truth", "predicted", "count"),
    "roc.csv": ("false_positive_rate", "true_positive_rate"),
    "calibration.csv": ("predicted", "observed", "rows"),
    "misread/misread.csv": ("row", "truth", "predicted", "probability"),
}


class Params(Section, frozen=True, kw_only=True):
    gates: dict[str, dict[str, float]]  # data set (full, sample) -> metric, dotted -> lower bound


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


def write_tables(model: str, inputs: np.ndarray, probabilities: np.ndarray, targets: np.ndarray) -> None:
    """Write a classifier's confusion matrix, ROC and calibration curves, and misread rows, images too; of others only headers."""
    tables: dict[str, list[Any]] = {name: [] for name in HEADERS}
    if is_classification(targets):
        labels, predicted = models.load(model, "contract").CONTRACT.labels, probabilities.argmax(axis=1)
        counts = confusion_matrix(targets, predicted, labels=range(len(labels)))
        wrong = [
            (row, labels[targets[row]], labels[predicted[row]], probabilities[row].max())
            for row in np.flatnonzero(predicted != targets)
        ]
        tables = {
            "confusion.csv": [(labels[truth], labels[label], count) for (truth, label), count in np.ndenumerate(counts)],
            "roc.csv": roc(probabilities, targets),
            "calibration.csv": calibration(*confidence(probabilities, targets)),
            "misread/misread.csv": [(*texts, f"{probability:.4f}") for *texts, probability in wrong],
        }
        if inputs.ndim == 3 and wrong:  # noqa: PLR2004  images, (rows, height, width)
            titles = {row: f"{label}, is {truth}\n{probability:.0%}" for row, truth, label, probability in wrong[:MAX_IMAGES]}
            draw(Paths(model).report / "misread" / "misread.png", inputs, titles)
    for name, rows in tables.items():
        write_csv(Paths(model).report / name, HEADERS[name], rows)


def draw(path: Path, images: np.ndarray, titles: Mapping[Any, str]) -> None:
    """Write a PNG file of some of the images, (rows, height, width), under their titles."""
    height = math.ceil(len(titles) / COLUMNS)
    figure = Figure(figsize=(COLUMNS, 1.5 * height), layout="constrained")
    for position, (row, title) in enumerate(titles.items(), 1):
        cell = figure.add_subplot(height, COLUMNS, position)
        cell.imshow(images[row], cmap="Greys")
        cell.set_title(title, fontsize=9)
        cell.axis("off")
    png = io.BytesIO()
    figure.savefig(png, metadata={"Software": None})
    atomic_write(path, png.getvalue())


def evaluate(model: str) -> None:
    """Stage: model.onnx, model.pt -> report/metrics.json and plots; fails when a gate is missed."""
    params, data = load_params(model, "evaluate", Params), load_rows(model)
    inputs, targets = data.test_inputs, data.test_targets
    if data.source not in params.gates:
        raise PipelineError(f"params.yaml: models.{model}.evaluate.gates has no entry for the data set {data.source!r}")
    predictions = run_onnxruntime(model, inputs)
    agreement = compare(predict(load_network(model), inputs), predictions, classes=is_classification(targets))
    metrics: dict[str, Any] = {"data": data.source, **measure(predictions, targets), **agreement}
    write_json(Paths(model).report / "metrics.json", metrics)
    write_tables(model, inputs, predictions, targets)
    check_gates(metrics, at_least=params.gates[data.source])
    print(f"{model}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float)))
