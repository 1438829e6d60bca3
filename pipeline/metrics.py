"""Figures that describe a model on a test set."""

import numpy as np
from sklearn.metrics import accuracy_score, log_loss, mean_squared_error, r2_score, roc_auc_score, roc_curve


def is_classified(targets: np.ndarray) -> bool:
    """Whether targets are class indices, (rows,), and not values, (rows, ...)."""
    return np.issubdtype(targets.dtype, np.integer)


def measure(answers: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Figures of answers, (rows, ...): probabilities against class indices, or values against values."""
    return measure_classes(answers, targets) if is_classified(targets) else measure_values(answers, targets)


def measure_values(answers: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Mean squared error, and the share of the variance that is explained, of (rows, ...) against (rows, ...)."""
    found, expected = answers.reshape(len(answers), -1), targets.reshape(len(targets), -1)
    return {
        "mse": float(mean_squared_error(expected, found)),
        "r2": float(r2_score(expected, found)),
        "rows": len(targets),
    }


def measure_classes(probabilities: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Accuracy, log loss (nats) and area under the ROC curve (one against the rest) of (rows, classes) against (rows,)."""
    exact = probabilities.astype(np.float64)
    exact /= exact.sum(axis=1, keepdims=True)  # float32 rows sum to one only within 1e-7
    return {
        "accuracy": float(accuracy_score(targets, probabilities.argmax(axis=1))),
        "auc": float(roc_auc_score(*decisions(probabilities, targets))),
        "log_loss": float(log_loss(targets, exact, labels=range(probabilities.shape[1]))),
        "rows": len(targets),
    }


def roc(probabilities: np.ndarray, targets: np.ndarray) -> list[tuple[float, float]]:
    """Points (false positive rate, true positive rate) of the ROC curve, one class against the rest."""
    false_positive_rate, true_positive_rate, _ = roc_curve(*decisions(probabilities, targets))
    return list(zip(false_positive_rate.tolist(), true_positive_rate.tolist(), strict=True))


def decisions(probabilities: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each class is the right one, and its probability, pooled over classes; of two classes only the second."""
    right = np.eye(probabilities.shape[1])[targets]  # (rows, classes)
    columns = slice(1, None) if probabilities.shape[1] == 2 else slice(None)  # noqa: PLR2004
    return right[:, columns].ravel(), probabilities[:, columns].ravel()
