"""Figures that describe a classifier on a test set."""

import numpy as np
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score, roc_curve


def measure(probabilities: np.ndarray, targets: np.ndarray) -> dict[str, float]:
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
