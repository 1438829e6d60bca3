"""Nested, repeated, stratified cross-validation of how a small model is trained, compared with baselines.

It judges the procedure (choose settings, then fit) on all rows, including those that `prepare` keeps for testing: each row is
predicted once per repeat, by a model whose settings and weights never saw it. The served model is chosen and fitted on the training
rows alone, so that the test rows remain a second, independent test.

Settings, the baselines' too, are chosen by log loss in an inner cross-validation of each outer training part. AUC, log loss (nats),
Brier score and accuracy are computed per outer fold, because pooling would rank probabilities of different models against each
other (Forman and Scholz, "Apples-to-apples in cross-validation studies", SIGKDD Explorations 12:1, 2010). A fold has too few rows
for calibration errors, so these are computed from the pooled out-of-fold probabilities of a repeat. `ece_if_calibrated` is the
average ECE that these probabilities would have if they were the true ones.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from joblib import Parallel, cpu_count, delayed
from scipy.stats import t as student
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, roc_auc_score
from tqdm import tqdm

from models.dataset import Dataset
from pipeline.common import Paths, PipelineError, load_params, load_rows, write_csv, write_json
from pipeline.folds import SERVED, Changes, Params, Repeat, Task, choose, cross_validate_once
from pipeline.metrics import calibration, calibration_error, check_gates, debiased_calibration_error
from pipeline.train import Params as TrainParams

DRAWS = 200  # of outcomes, for `ece_if_calibrated`
METRICS = {  # of the probabilities of the second class in one fold
    "auc": roc_auc_score,
    "log_loss": log_loss,
    "brier": brier_score_loss,
    "accuracy": lambda targets, predictions: accuracy_score(targets, predictions > 0.5),  # noqa: PLR2004
}


def settings(model: str, changes: Changes) -> TrainParams:
    """The section `train` with changes, of single keys where both are mappings. Raises PipelineError when it is not valid."""
    train = load_params(model, "train", dict[str, Any])
    for key, value in changes.items():
        old = train.get(key)
        train[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    try:
        return msgspec.convert(train, TrainParams)
    except msgspec.ValidationError as error:
        raise PipelineError(f"params.yaml: models.{model}.cross_validate: train with {changes} is not valid: {error}") from error


def measure_folds(repeats: Sequence[Repeat], name: str, targets: np.ndarray) -> dict[str, np.ndarray]:
    """Each metric of a model in each outer fold, (repeats, folds)."""
    return {
        key: np.array([[metric(targets[rows], each.predictions[name][rows]) for rows in each.folds] for each in repeats])
        for key, metric in METRICS.items()
    }


def measure_calibration(predictions: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """Calibration errors of out-of-fold probabilities, (repeats, rows)."""
    random = np.random.default_rng(0)
    ideal = [calibration_error(row, random.random((DRAWS, len(row))) < row).mean() for row in predictions]
    return {
        "ece": spread(np.array([[calibration_error(row, targets)] for row in predictions])),
        "debiased_ece": spread(np.array([[debiased_calibration_error(row, targets)] for row in predictions])),
        "ece_if_calibrated": {"mean": float(np.mean(ideal))},
    }


def spread(values: np.ndarray) -> dict[str, float]:
    """Mean, and standard deviation over repeats and over single folds, of (repeats, folds)."""
    repeats = values.mean(axis=1)
    std = {"std": float(repeats.std(ddof=1))} if len(repeats) > 1 else {}
    fold_std = {"fold_std": float(values.std(ddof=1))} if values.shape[1] > 1 else {}
    return {"mean": float(values.mean()), **std, **fold_std}


def interval(differences: np.ndarray) -> dict[str, float]:
    """Mean and 95 % interval of paired differences, (repeats, folds), by the corrected resampled t test.

    Folds share training rows, so the variance of the mean is that of a fold times (1 / folds in all + test rows / training rows)
    (Nadeau and Bengio, "Inference for the generalization error", Machine Learning 52, 2003).
    """
    count, folds, mean = differences.size, differences.shape[1], float(differences.mean())
    error = np.sqrt((1 / count + 1 / (folds - 1)) * differences.var(ddof=1))  # a fold is 1 / (folds - 1) of its training rows
    width = float(student.ppf(0.975, count - 1) * error)
    return {"mean": mean, "low": mean - width, "high": mean + width}


def report(repeats: Sequence[Repeat], targets: np.ndarray) -> dict[str, Any]:
    """The metrics of each model, and the difference of the served model from each other (positive: the served one has more)."""
    per_fold = {name: measure_folds(repeats, name, targets) for name in repeats[0].predictions}
    served = per_fold[SERVED]
    return {
        "models": {
            name: {key: spread(values) for key, values in metrics.items()}
            | measure_calibration(np.array([repeat.predictions[name] for repeat in repeats]), targets)
            for name, metrics in per_fold.items()
        },
        "difference_from": {
            name: {key: interval(served[key] - values) for key, values in metrics.items()}
            for name, metrics in per_fold.items()
            if name != SERVED
        },
    }


def check_leakage(models: Mapping[str, Any], bound: float) -> None:
    """Raise PipelineError when a model separates the classes better than is plausible."""
    auc, name = max((metrics["auc"]["mean"], name) for name, metrics in models.items())
    if not auc <= bound:
        raise PipelineError(
            f"suspected leakage: the AUC of {name!r} is {auc:.3f}, and above {bound:.3f} is not plausible; "
            "no input may be computed from the targets, or from rows that are left out (such as medians per class)"
        )


def build_task(model: str, params: Params, data: Dataset) -> Task:
    """The cross-validation of all rows. Raises PipelineError when the folds are not possible."""
    inputs = np.concatenate([data.train_inputs, data.test_inputs])
    targets = np.concatenate([data.train_targets, data.test_targets])
    if len(np.unique(targets)) != 2:  # noqa: PLR2004
        raise PipelineError("cross-validation is for models with two classes; remove the section cross_validate")
    rarest = int(np.bincount(targets).min())
    remaining = rarest - math.ceil(rarest / params.folds)  # of the rarer class in an outer training part, at least
    for name, folds, maximum in (("folds", params.folds, rarest), ("inner_folds", params.inner_folds, remaining)):
        if folds > maximum:
            raise PipelineError(f"params.yaml: models.{model}.cross_validate.{name}: expected 2 to {maximum}, got {folds}")
    return Task(model, inputs, targets, params)


def choose_candidates(task: Task, training_rows: int) -> tuple[list[TrainParams], str]:
    """The settings from which those of the served model are chosen, and what chooses them.

    They are `choices` if an inner cross-validation of the training rows, the first of all rows, chooses the settings of `train`.
    Otherwise those were chosen by hand, and only they are judged.
    """
    train, choices = settings(task.model, {}), task.params.choices
    candidates = [settings(task.model, changes) for changes in choices]
    if train in candidates:
        best = choose(task, candidates, [np.arange(training_rows)])[0]
        if candidates[best] == train:
            return candidates, "inner cross-validation"
        warnings.warn(
            f"params.yaml: models.{task.model}.train is not what the inner cross-validation of the training rows would choose, "
            f"{choices[best]}; it is judged as it is",
            stacklevel=2,
        )
    return [train], "params.yaml"


def cross_validate(model: str) -> None:
    """Stage: prepared rows -> cross_validation.json and a plot; fails when leakage is suspected or a gate is missed."""
    params, data = load_params(model, "cross_validate", Params), load_rows(model)
    task = build_task(model, params, data)
    candidates, chosen_by = choose_candidates(task, len(data.train_inputs))
    networks = {SERVED: candidates, **{name: [settings(model, changes)] for name, changes in params.baselines.items()}}
    jobs = (delayed(cross_validate_once)(task, networks, repeat) for repeat in range(params.repeats))
    done = Parallel(n_jobs=min(params.repeats, cpu_count()), return_as="generator")(jobs)
    repeats = list(tqdm(done, desc=f"cross_validate {model}", unit="repeat", total=params.repeats))
    chosen = [choice for repeat in repeats for choice in repeat.choices]
    result = {
        "rows": len(task.targets),
        "repeats": params.repeats,
        "folds": params.folds,
        "chosen_by": chosen_by,
        "times_chosen": {str(number): chosen.count(number) for number in range(len(candidates))},
        **report(repeats, task.targets),
    }
    write_json(Paths(model).training / "cross_validation.json", result)
    predictions = np.concatenate([repeat.predictions[SERVED] for repeat in repeats])
    points = calibration(predictions, np.tile(task.targets, len(repeats)))
    write_csv(Paths(model).training / "calibration.csv", ("predicted", "observed", "rows"), points)
    check_leakage(result["models"], params.leakage)
    check_gates(result, **params.gates)
    print(f"{model}: " + ", ".join(f"{name} {metric['mean']:.4f}" for name, metric in result["models"][SERVED].items()))
