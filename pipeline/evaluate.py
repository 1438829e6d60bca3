"""Judge the two files that are served, on the whole test set; fail when they disagree or miss a quality gate."""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

import models
from pipeline.metrics import calibration, is_classified, measure, roc
from pipeline.stage import PipelineError, Section, folder, load_params, load_rows, main
from pipeline.train import Params as TrainParams
from pipeline.train import build

TOLERANCE = 1e-5  # largest difference between torch and onnxruntime: of a probability, or of a value as a share of the largest


class Params(Section, frozen=True, kw_only=True):
    """Section `evaluate` of params.yaml."""

    gates: dict[str, dict[str, float]]  # data set (full, sample) -> metric, dotted -> the least that passes


def with_torch(model: str, inputs: np.ndarray) -> np.ndarray:
    """Answers, (rows, ...), from model.pt."""
    network = build(model, load_params(model, "train", TrainParams).network).eval()
    network.load_state_dict(torch.load(folder(model) / "model.pt", weights_only=True))
    with torch.inference_mode():
        return np.concatenate([network(rows).numpy() for rows in torch.from_numpy(inputs).split(1000)])


def with_onnxruntime(model: str, inputs: np.ndarray) -> np.ndarray:
    """Answers, (rows, ...), from model.onnx, on the CPU."""
    session = onnxruntime.InferenceSession(folder(model) / "model.onnx", providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: inputs[i : i + 1000]})[0] for i in range(0, len(inputs), 1000)])


def compare(ours: np.ndarray, theirs: np.ndarray, *, classes: bool) -> dict[str, float]:
    """How far two sets of answers, (rows, ...), lie apart. Raises PipelineError when a label differs, or an answer by too much."""
    flips = np.flatnonzero(ours.argmax(axis=1) != theirs.argmax(axis=1)) if classes else np.array([])
    if len(flips):
        raise PipelineError(f"torch and onnxruntime give different labels for {len(flips)} test rows, the first is row {flips[0]}")
    difference = float(np.abs(ours - theirs).max())
    allowed = TOLERANCE * max(1.0, float(np.abs(theirs).max()))
    if not difference <= allowed:
        raise PipelineError(f"an answer differs by {difference:.2g} between torch and onnxruntime; {allowed:g} is allowed")
    return {"label_flips": len(flips), "largest_difference": difference}


def check_gates(metrics: dict[str, Any], at_least: dict[str, float], at_most: dict[str, float] | None = None) -> None:
    """Raise PipelineError that names every metric which misses its bound."""
    missed = []
    bounds = [(*gate, "below", 1) for gate in at_least.items()] + [(*gate, "above", -1) for gate in (at_most or {}).items()]
    for name, bound, side, sign in bounds:
        value: Any = metrics
        for key in name.split("."):
            if not isinstance(value, dict) or key not in value:
                raise PipelineError(f"params.yaml: gate {name!r} names no metric; there are {', '.join(metrics)}")
            value = value[key]
        if not sign * value >= sign * bound:
            missed.append(f"{name} is {value:.4f}, {side} its bound {bound:.4f}")
    if missed:
        raise PipelineError("quality gate missed: " + "; ".join(missed))


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a small table for `dvc plots`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def plot(model: str, answers: np.ndarray, targets: np.ndarray) -> None:
    """Write the plots of a classifier; those of other models have no points."""
    labels = models.load(model, "contract").CONTRACT.labels
    plots = folder(model) / "plots"
    confusion: list[tuple[object, ...]] = []
    misread: list[tuple[object, ...]] = []
    if is_classified(targets):
        found = answers.argmax(axis=1)
        confusion = [(labels[truth], labels[answer]) for truth, answer in zip(targets, found, strict=True)]
        misread = [(row, *confusion[row], f"{answers[row].max():.4f}") for row in np.flatnonzero(found != targets)]
    write_csv(plots / "confusion.csv", ("truth", "answer"), confusion)
    write_csv(plots / "misread.csv", ("row", "truth", "answer", "probability"), misread)
    for name, header, points in (
        ("roc.csv", ("false_positive_rate", "true_positive_rate"), roc),
        ("calibration.csv", ("predicted", "observed"), calibration),
    ):
        write_csv(plots / name, header, points(answers, targets) if is_classified(targets) else [])


def evaluate(model: str) -> None:
    """Stage: model.onnx, model.pt -> metrics.json and plots; fails when a gate is missed."""
    params = load_params(model, "evaluate", Params)
    data = load_rows(model)
    source, targets = str(data["source"]), data["test_targets"]
    if source not in params.gates:
        raise PipelineError(f"params.yaml: models.{model}.evaluate.gates has no entry for the data set {source!r}")
    answers = with_onnxruntime(model, data["test_inputs"])
    agreement = compare(with_torch(model, data["test_inputs"]), answers, classes=is_classified(targets))
    metrics: dict[str, Any] = {"data": source, **measure(answers, targets), **agreement}
    (folder(model) / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")

    plot(model, answers, targets)
    check_gates(metrics, params.gates[source])
    print(f"{model}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float)))


if __name__ == "__main__":
    main(evaluate)
