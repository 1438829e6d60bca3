"""Nested, repeated, stratified cross-validation of how a small model is made, beside rivals.

It is over all rows, also those that `prepare` keeps for the test. What is judged is the procedure (choose settings, then fit), and
each row is judged once a repeat, by a model whose settings and weights never saw it: there is nothing to spare rows for, and
published figures are of all rows too. The model that is served is another matter: its settings are chosen and its weights fitted on
the training rows alone, so that the test rows stay a second, independent look at it.

Choices, the rivals' too, are by log loss in an inner cross-validation of each outer training part. AUC, log loss (nats), Brier
score and accuracy are taken in each outer fold: pooled, probabilities of different models would be ranked against each other
(Forman and Scholz, "Apples-to-apples in cross-validation studies", SIGKDD Explorations 12:1, 2010). A fold has too few rows for
ECE; it is taken of a repeat's pooled out-of-fold probabilities: ten bins of equal mass, the mean over rows of |mean probability -
share of positives| of the bin (Naeini, Cooper and Hauskrecht, "Obtaining well calibrated probabilities using Bayesian binning",
AAAI 2015). Chance alone keeps it from 0: `ece_if_perfect` is what these probabilities would show on average if they were the true
ones, and `ece_beyond_chance` is the root mean square gap of the bins without the part of chance (Kumar, Liang and Ma, "Verified
uncertainty calibration", NeurIPS 2019).

Intervals of differences are 95 %, of the corrected resampled t test (Nadeau and Bengio, "Inference for the generalization error",
Machine Learning 52, 2003): folds share training rows, so the variance of the mean is that of a fold times
(1 / folds in all + test rows / training rows).
"""

import json
import math
import warnings
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from joblib import Parallel, cpu_count, delayed
from scipy.stats import t as student
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, roc_auc_score
from tqdm import tqdm

from pipeline.evaluate import check_gates, write_csv
from pipeline.folds import SERVED, Repeat, Task, choose, cross_validate_once
from pipeline.stage import NotNegative, PipelineError, Section, folder, load_params, load_rows, main
from pipeline.train import Params as TrainParams

BINS = 10  # of equal mass, for ECE and the calibration plot
DRAWS = 200  # of labels, for `ece_if_perfect`

Changes = dict[str, Any]  # of the section `train` of params.yaml


class Gates(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bounds by dotted name of a figure in the report."""

    at_least: dict[str, float] = msgspec.field(default_factory=dict)
    at_most: dict[str, float] = msgspec.field(default_factory=dict)


class Params(Section, frozen=True, kw_only=True):
    """Section `cross_validate` of params.yaml; an empty one does nothing."""

    seed: int = 0
    repeats: NotNegative = 0  # 0: no cross-validation
    folds: NotNegative = 10
    inner_folds: NotNegative = 5
    choices: tuple[Changes, ...] = ()  # changes of `train` that the inner cross-validation chooses among
    # changes of `train` that are judged beside it, by name; pipeline/rivals.py has more
    rivals: dict[str, Changes] = msgspec.field(default_factory=dict)
    leakage: float = 1.0  # an AUC above it is suspected leakage, and refused
    gates: Gates = Gates()


def merge(settings: dict[str, Any], changes: Changes) -> dict[str, Any]:
    """`settings` with `changes`, key by key where both are mappings."""
    merged = dict(settings)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def settings(model: str, changes: Changes) -> TrainParams:
    """The section `train` with changes. Raises PipelineError when they make it impossible."""
    try:
        return msgspec.convert(merge(load_params(model, "train", dict[str, Any]), changes), TrainParams)
    except msgspec.ValidationError as error:
        raise PipelineError(f"params.yaml: models.{model}.cross_validate: train cannot be changed by {changes}: {error}") from error


def bins(answers: np.ndarray) -> list[np.ndarray]:
    """Row numbers in bins of equal mass, by rising probability."""
    return np.array_split(np.argsort(answers, kind="stable"), BINS)


def calibration_error(answers: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """ECE of probabilities, (rows,), for labels, (..., rows): the mean over rows of |mean probability - share of positives|."""
    errors = [np.abs(targets[..., rows].mean(axis=-1) - answers[rows].mean()) * len(rows) for rows in bins(answers)]
    error: np.ndarray = np.sum(errors, axis=0) / len(answers)
    return error


def calibration_error_beyond_chance(answers: np.ndarray, targets: np.ndarray) -> float:
    """Root of the mean squared gap of the bins, less what chance adds to it; 0 where chance explains all."""
    squares = [
        ((targets[rows].mean() - answers[rows].mean()) ** 2 - targets[rows].var(ddof=1) / len(rows)) * len(rows)
        for rows in bins(answers)
    ]
    return float(np.sqrt(max(0.0, np.sum(squares) / len(answers))))


def measure_folds(repeat: Repeat, name: str, targets: np.ndarray) -> list[dict[str, float]]:
    """The figures of each outer fold."""
    return [
        {
            "auc": float(roc_auc_score(truth, answers)),
            "log_loss": float(log_loss(truth, answers)),
            "brier": float(brier_score_loss(truth, answers)),
            "accuracy": float(accuracy_score(truth, answers > 0.5)),  # noqa: PLR2004
        }
        for number in range(repeat.fold.max() + 1)
        for truth, answers in [(targets[repeat.fold == number], repeat.answers[name][repeat.fold == number])]
    ]


def spread(values: np.ndarray) -> dict[str, float]:
    """Mean, and standard deviation over repeats and over single folds, of (repeats, folds)."""
    repeats = values.mean(axis=1)
    several = {"std": float(repeats.std(ddof=1))} if len(repeats) > 1 else {}
    return {"mean": float(values.mean()), **several, **({"fold_std": float(values.std(ddof=1))} if values.shape[1] > 1 else {})}


def interval(differences: np.ndarray, folds: int) -> dict[str, float]:
    """Mean and 95 % interval of paired differences, one an outer fold of all repeats: the corrected resampled t test."""
    count = differences.size
    error = np.sqrt((1 / count + 1 / (folds - 1)) * differences.var(ddof=1))  # a fold is 1 / (folds - 1) of its training rows
    width = student.ppf(0.975, count - 1) * error
    return {"mean": float(differences.mean()), "low": float(differences.mean() - width), "high": float(differences.mean() + width)}


def report(repeats: Sequence[Repeat], targets: np.ndarray) -> dict[str, Any]:
    """Every model's figures, and how far the served one is from each other (positive: the served one has more)."""
    random = np.random.default_rng(0)
    figures: dict[str, dict[str, np.ndarray]] = {}  # model -> figure -> (repeats, folds)
    models_report: dict[str, Any] = {}
    for name in repeats[0].answers:
        folds = [measure_folds(repeat, name, targets) for repeat in repeats]
        figures[name] = {key: np.array([[fold[key] for fold in of_repeat] for of_repeat in folds]) for key in folds[0][0]}
        answers = np.array([repeat.answers[name] for repeat in repeats])  # (repeats, rows)
        ece = np.array([[calibration_error(answer, targets)] for answer in answers])
        beyond = np.array([[calibration_error_beyond_chance(answer, targets)] for answer in answers])
        perfect = [calibration_error(answer, random.random((DRAWS, len(answer))) < answer).mean() for answer in answers]
        models_report[name] = {
            **{key: spread(values) for key, values in figures[name].items()},
            "ece": spread(ece),
            "ece_beyond_chance": spread(beyond),
            "ece_if_perfect": {"mean": float(np.mean(perfect))},
        }
    count = repeats[0].fold.max() + 1
    less = {
        name: {key: interval(figures[SERVED][key] - values, count) for key, values in of_model.items()}
        for name, of_model in figures.items()
        if name != SERVED
    }
    return {"models": models_report, "served_less": less}


def calibration(repeats: Sequence[Repeat], targets: np.ndarray) -> list[tuple[float, float, int]]:
    """The served model's calibration: mean probability, share of positives and rows of each bin, all repeats together."""
    answers, truth = np.concatenate([repeat.answers[SERVED] for repeat in repeats]), np.tile(targets, len(repeats))
    return [(float(answers[rows].mean()), float(truth[rows].mean()), len(rows)) for rows in bins(answers)]


def check_leakage(figures: dict[str, Any], bound: float) -> None:
    """Raise PipelineError when a model separates the classes better than anyone honestly can."""
    name, auc = max(((name, of_model["auc"]["mean"]) for name, of_model in figures["models"].items()), key=lambda pair: pair[1])
    if not auc <= bound:
        raise PipelineError(
            f"suspected leakage: the AUC of {name!r} is {auc:.3f}, and above {bound:.3f} is too good to be true; "
            "nothing in the inputs may be computed with the answers, or from rows that are left out (such as medians by class)"
        )


def task_of(model: str, params: Params, data: dict[str, np.ndarray]) -> Task:
    """What the section asks for, over all rows. Raises PipelineError when such folds cannot be."""
    inputs = np.concatenate([data["train_inputs"], data["test_inputs"]])
    targets = np.concatenate([data["train_targets"], data["test_targets"]])
    if len(np.unique(targets)) != 2:  # noqa: PLR2004
        raise PipelineError("cross-validation is for models of two classes; leave the section cross_validate empty")
    rarest = int(np.bincount(targets).min())
    left = rarest - math.ceil(rarest / max(1, params.folds))  # of the rarer class in an outer training part, at least
    for name, folds, most in (("folds", params.folds, rarest), ("inner_folds", params.inner_folds, left)):
        if not 2 <= folds <= most:  # noqa: PLR2004
            raise PipelineError(
                f"params.yaml: models.{model}.cross_validate.{name}: {folds} cannot be; "
                f"use 2 to {most}, so that each fold has both classes"
            )
    rivals = {name: settings(model, changes) for name, changes in params.rivals.items()}
    return Task(model, inputs, targets, params.folds, params.inner_folds, params.seed, rivals)


def candidates_of(task: Task, choices: Sequence[Changes], training_rows: int) -> tuple[list[TrainParams], str]:
    """What the served model's settings are chosen from, and by whom they are chosen.

    They are the `choices` when the settings of `train` are what the same choice gives on the training rows, the first of all;
    otherwise somebody chose them by hand, and they are judged as they stand.
    """
    train = settings(task.model, {})
    candidates = [settings(task.model, changes) for changes in choices]
    if train not in candidates:
        return [train], "params.yaml"
    best = choose(task, candidates, [np.arange(training_rows)])[0]
    if candidates[best] != train:
        warnings.warn(
            f"params.yaml: models.{task.model}.train is judged as it stands; the inner cross-validation of the training rows would "
            f"choose {choices[best]}",
            stacklevel=2,
        )
        return [train], "params.yaml"
    return candidates, "inner cross-validation"


def cross_validate(model: str) -> None:
    """Stage: prepared rows -> cross_validation.json and a plot; fails when leakage is suspected or a gate is missed."""
    params = load_params(model, "cross_validate", Params)
    figures: dict[str, Any] = {}
    points: list[tuple[float, float, int]] = []
    if params.repeats:
        data = load_rows(model)
        task = task_of(model, params, data)
        candidates, chosen_by = candidates_of(task, params.choices, len(data["train_inputs"]))
        jobs = min(params.repeats, cpu_count())
        tasks = (delayed(cross_validate_once)(task, candidates, repeat) for repeat in range(params.repeats))
        done = Parallel(n_jobs=jobs, return_as="generator")(tasks)
        repeats = list(tqdm(done, desc=f"cross_validate {model}", unit="repeat", total=params.repeats))
        chosen = [choice for repeat in repeats for choice in repeat.choices]
        figures = {
            "rows": len(task.targets),
            "repeats": params.repeats,
            "folds": params.folds,
            "chosen_by": chosen_by,
            "times_chosen": {str(number): chosen.count(number) for number in range(len(candidates))},
            **report(repeats, task.targets),
        }
        points = calibration(repeats, task.targets)
    (folder(model) / "cross_validation.json").write_text(json.dumps(figures, indent=2) + "\n")
    write_csv(folder(model) / "plots" / "cross_validated_calibration.csv", ("predicted", "observed", "rows"), points)
    if figures:
        check_leakage(figures, params.leakage)
        check_gates(figures, params.gates.at_least, params.gates.at_most)
        served = figures["models"][SERVED]
        print(f"{model}: " + ", ".join(f"{name} {figure['mean']:.4f}" for name, figure in served.items()))


if __name__ == "__main__":
    main(cross_validate)
