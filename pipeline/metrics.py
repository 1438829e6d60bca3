"""Metrics of predictions, calibration among them, and quality gates."""

from functools import reduce
from operator import getitem
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, log_loss, mean_squared_error, r2_score, roc_auc_score, roc_curve

from pipeline.common import PipelineError

BINS = 10  # for calibration


def is_classification(targets: np.ndarray) -> bool:
    """Whether targets are class indices, (rows,), and not values, (rows, ...)."""
    return targets.dtype.kind == "i"


def measure(predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Metrics of predictions, (rows, ...): mean squared error and explained share of the variance of values against values.

    Of probabilities, (rows, classes), against class indices, (rows,): accuracy, area under the ROC curve (one versus rest) and log
    loss (nats).
    """
    rows = len(targets)
    if not is_classification(targets):
        values = targets.reshape(rows, -1), predictions.reshape(rows, -1)
        return {"mse": float(mean_squared_error(*values)), "r2": float(r2_score(*values)), "rows": rows}
    normalised = predictions.astype(np.float64)
    normalised /= normalised.sum(axis=1, keepdims=True)  # float32 rows sum to one only within 1e-7
    return {
        "accuracy": float(accuracy_score(targets, predictions.argmax(axis=1))),
        "auc": float(roc_auc_score(*one_versus_rest(predictions, targets))),
        "log_loss": float(log_loss(targets, normalised, labels=range(predictions.shape[1]))),
        "rows": rows,
    }


def one_versus_rest(probabilities: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each class is the right one, and its probability, pooled over the classes; of two classes only the second."""
    right = np.eye(probabilities.shape[1])[targets]  # (rows, classes)
    columns = slice(1, None) if probabilities.shape[1] == 2 else slice(None)  # noqa: PLR2004
    return right[:, columns].ravel(), probabilities[:, columns].ravel()


def roc(probabilities: np.ndarray, targets: np.ndarray) -> list[tuple[float, float]]:
    """Points (false positive rate, true positive rate) of the ROC curve, one versus rest."""
    return [*zip(*roc_curve(*one_versus_rest(probabilities, targets))[:2], strict=True)]


def confidence(probabilities: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The probability of the second of two classes, or of the most probable of several, and whether it is the right class."""
    shown = np.ones_like(targets) if probabilities.shape[1] == 2 else probabilities.argmax(axis=1)  # noqa: PLR2004
    return probabilities[np.arange(len(targets)), shown], targets == shown


def equal_mass_bins(probabilities: np.ndarray) -> list[np.ndarray]:
    """Row numbers in bins of equally many rows, by increasing probability."""
    return np.array_split(np.argsort(probabilities, kind="stable"), BINS)


def calibration(probabilities: np.ndarray, outcomes: np.ndarray) -> list[tuple[float, float, int]]:
    """Points (mean probability, observed frequency, rows), one per bin, of (rows,) against (rows,)."""
    bins = equal_mass_bins(probabilities)
    return [(float(probabilities[rows].mean()), float(outcomes[rows].mean()), len(rows)) for rows in bins]


def calibration_error(probabilities: np.ndarray, outcomes: np.ndarray) -> np.ndarray:
    """Expected calibration error (ECE) of probabilities, (rows,), for outcomes, (..., rows): the mean error of their bins.

    Naeini, Cooper and Hauskrecht, "Obtaining well calibrated probabilities using Bayesian binning", AAAI 2015.
    """
    bins = equal_mass_bins(probabilities)
    errors = [np.abs(outcomes[..., rows].mean(axis=-1) - probabilities[rows].mean()) * len(rows) for rows in bins]
    return np.asarray(np.sum(errors, axis=0) / len(probabilities))


def debiased_calibration_error(probabilities: np.ndarray, outcomes: np.ndarray) -> float:
    """Root mean square calibration error of the bins, without the part that chance explains, of (rows,) against (rows,).

    Kumar, Liang and Ma, "Verified uncertainty calibration", NeurIPS 2019.
    """
    squares = [
        ((outcomes[rows].mean() - probabilities[rows].mean()) ** 2 - outcomes[rows].var(ddof=1) / len(rows)) * len(rows)
        for rows in equal_mass_bins(probabilities)
    ]
    return float(np.sqrt(max(0.0, np.sum(squares) / len(probabilities))))


def check_gates(metrics: dict[str, Any], **gates: dict[str, float]) -> None:
    """Raise PipelineError with every metric that misses its bound; `gates` are `at_least` and `at_most`, by dotted name."""
    missed = []
    for side, name, bound in ((side, *gate) for side, bounds in gates.items() for gate in bounds.items()):
        try:
            value: Any = reduce(getitem, name.split("."), metrics)
        except (KeyError, TypeError):
            raise PipelineError(f"params.yaml: the gate {name!r} is not a metric; expected one of {', '.join(metrics)}") from None
        if not (value >= bound if side == "at_least" else value <= bound):
            missed.append(f"{name} is {value:.4f}, expected {side.replace('_', ' ')} {bound:.4f}")
    if missed:
        raise PipelineError("quality gate missed: " + "; ".join(missed))
