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
ones.

Intervals of differences are 95 %, of the corrected resampled t test (Nadeau and Bengio, "Inference for the generalization error",
Machine Learning 52, 2003): folds share training rows, so the variance of the mean is that of a fold times
(1 / folds in all + test rows / training rows).
"""

import json
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from joblib import Parallel, delayed
from msgspec.structs import replace
from scipy.stats import t as student
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, roc_auc_score
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import cross_entropy

from models.network import Predictor
from pipeline.evaluate import check_gates, write_csv
from pipeline.rivals import RIVALS
from pipeline.stage import NotNegative, PipelineError, Section, folder, load_params, load_rows, main
from pipeline.train import Params as TrainParams
from pipeline.train import build, build_optimizer, schedule

BINS = 10  # of equal mass, for ECE and the calibration plot
DRAWS = 200  # of labels, for `ece_if_perfect`
TOGETHER = 50  # networks trained at once
SERVED = "served"  # what `train` in params.yaml says, in the report

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
    rivals: dict[str, Changes] = msgspec.field(
        default_factory=dict
    )  # changes of `train` that are judged beside it; pipeline/rivals.py has more
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


class Outputs(nn.Module):
    """A network whose call gives what the loss is taken of."""

    def __init__(self, network: Predictor) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        """(batch, ...) -> (batch, classes)."""
        return self.network.outputs(inputs)


class Many(Predictor):
    """Networks of one kind as one, with their weights stacked; its outputs are (networks, batch, classes)."""

    def __init__(self, networks: Sequence[Predictor]) -> None:
        super().__init__()
        single = [Outputs(network) for network in networks]
        weights, self.state = stack_module_state(single)  # each (networks, ...)
        self.names, self.weights = list(weights), nn.ParameterList(weights.values())
        self.call = partial(functional_call, single[0])

    def outputs(self, inputs: Tensor) -> Tensor:
        """(batch, ...) -> (networks, batch, classes)."""
        weights = dict(zip(self.names, self.weights, strict=True))
        answers: Tensor = vmap(lambda *one: self.call(one, inputs))(weights, self.state)
        return answers


def fit_many(model: str, inputs: np.ndarray, targets: np.ndarray, training: np.ndarray, params: TrainParams) -> np.ndarray:
    """Train a network for every row of `training`, (networks, rows) bool, which marks its training rows; ask each about all rows.

    Returns probabilities, (networks, rows, classes). Network i is what pipeline.train.fit makes of its rows with the seed
    `params.seed + i` in full batches on a CPU, but for rounding: weights are stacked and trained as one, which is 20 times quicker.
    Raises PipelineError when the settings ask for smaller batches or held-out rows.
    """
    if params.batch_size < len(inputs) or params.validation_rows:
        raise PipelineError(
            f"cross-validation trains in full batches: set batch_size to {len(inputs)} or more, validation_rows to 0"
        )
    x, y = torch.from_numpy(inputs), torch.from_numpy(targets)
    chunks = range(0, len(training), TOGETHER)
    return np.concatenate(
        [
            fit_together(model, x, y, torch.from_numpy(training[i : i + TOGETHER]), replace(params, seed=params.seed + i))
            for i in chunks
        ]
    )


def fit_together(model: str, x: Tensor, y: Tensor, training: Tensor, params: TrainParams) -> np.ndarray:
    """What `fit_many` does, of all networks at once."""
    networks = []
    for i, rows in enumerate(training):
        torch.manual_seed(params.seed + i)
        networks.append(build(model, params.network))
        networks[-1].adapt(x[rows])
    many = Many(networks)
    optimizer = build_optimizer(many, params.optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(params.warmup, params.epochs))
    share = training / training.sum(dim=1, keepdim=True)  # (networks, rows): the weight of a row in its network's mean loss
    truth = y.expand(share.shape)
    for _ in range(params.epochs):
        logits = many.outputs(x).transpose(1, 2)  # (networks, classes, rows)
        losses = cross_entropy(logits, truth, reduction="none", label_smoothing=params.label_smoothing)  # (networks, rows)
        optimizer.zero_grad()
        (losses * share).sum().backward()
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        probabilities: np.ndarray = many.outputs(x).softmax(dim=2).numpy()
    return probabilities


class Task(NamedTuple):
    """What is cross-validated, on what."""

    model: str
    inputs: np.ndarray  # (rows, ...)
    targets: np.ndarray  # (rows,), 0 or 1
    params: Params


def masks(rows: int, parts: Sequence[np.ndarray]) -> np.ndarray:
    """(parts, rows) bool from the row numbers of each part."""
    marked = np.zeros((len(parts), rows), dtype=bool)
    for mask, part in zip(marked, parts, strict=True):
        mask[part] = True
    return marked


def choose(task: Task, candidates: Sequence[TrainParams], parts: Sequence[np.ndarray]) -> list[int]:
    """For each part (row numbers) the candidate with the least log loss in an inner cross-validation that sees no other row."""
    if len(candidates) == 1:
        return [0] * len(parts)
    inner = StratifiedKFold(task.params.inner_folds, shuffle=True, random_state=task.params.seed)
    folds = [(part[fitted], part[left]) for part in parts for fitted, left in inner.split(part, task.targets[part])]
    training = masks(len(task.targets), [fitted for fitted, _ in folds])
    losses = []
    for candidate in candidates:
        answers = fit_many(task.model, task.inputs, task.targets, training, candidate)[..., 1]
        of_folds = [log_loss(task.targets[left], answer[left]) for answer, (_, left) in zip(answers, folds, strict=True)]
        losses.append(np.reshape(of_folds, (len(parts), -1)).mean(axis=1))
    return [int(choice) for choice in np.argmin(losses, axis=0)]


class Repeat(NamedTuple):
    """One cross-validation: each row's fold, each model's out-of-fold probability of the second class, the choice in each fold."""

    fold: np.ndarray  # (rows,)
    answers: dict[str, np.ndarray]  # (rows,) each
    choices: list[int]


def cross_validate_once(task: Task, candidates: Sequence[TrainParams], repeat: int) -> Repeat:
    """Ask every model about every row when it is left out; `candidates` are what the served model's settings are chosen from."""
    torch.set_num_threads(1)
    model, inputs, targets, params = task
    first = repeat * params.folds  # other initial weights in each repeat
    candidates = [replace(candidate, seed=candidate.seed + first) for candidate in candidates]
    outer = StratifiedKFold(params.folds, shuffle=True, random_state=params.seed + repeat)
    parts = list(outer.split(inputs, targets))
    fold = np.empty(len(targets), dtype=int)
    for number, (_, left) in enumerate(parts):
        fold[left] = number
    training, everyone = masks(len(targets), [fitted for fitted, _ in parts]), np.arange(len(targets))

    chosen = choose(task, candidates, [fitted for fitted, _ in parts])
    fits = {choice: fit_many(model, inputs, targets, training, candidates[choice]) for choice in sorted(set(chosen))}
    answers = {SERVED: np.array([fits[chosen[number]][number, row, 1] for row, number in enumerate(fold)])}
    for name, changes in params.rivals.items():
        rival = settings(model, changes)
        asked = fit_many(model, inputs, targets, training, replace(rival, seed=rival.seed + first))
        answers[name] = asked[fold, everyone, 1]
    inner = StratifiedKFold(params.inner_folds, shuffle=True, random_state=params.seed)
    rows = torch.from_numpy(inputs)
    known = rows.double().masked_fill(build(model, candidates[0].network).missing(rows), torch.nan).numpy()
    for name, make in RIVALS.items():
        answers[name] = np.empty(len(targets))
        for fitted, left in parts:
            answers[name][left] = make(inner).fit(known[fitted], targets[fitted]).predict_proba(known[left])[:, 1]
    return Repeat(fold, {name: answer.astype(np.float64) for name, answer in answers.items()}, chosen)


def calibration_error(answers: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """ECE of probabilities, (rows,), for labels, (..., rows): the sum over bins of |sum of label - probability|, by rows."""
    order = np.argsort(answers, kind="stable")
    starts = [part[0] for part in np.array_split(np.arange(len(order)), BINS)]
    gaps = np.add.reduceat(targets[..., order] - answers[order], starts, axis=-1)  # (..., bins)
    error: np.ndarray = np.abs(gaps).sum(axis=-1) / len(order)
    return error


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
        perfect = [calibration_error(answer, random.random((DRAWS, len(answer))) < answer).mean() for answer in answers]
        models_report[name] = {
            **{key: spread(values) for key, values in figures[name].items()},
            "ece": spread(ece),
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
    bins = np.array_split(np.argsort(answers, kind="stable"), BINS)
    return [(float(answers[rows].mean()), float(truth[rows].mean()), len(rows)) for rows in bins]


def check_leakage(figures: dict[str, Any], bound: float) -> None:
    """Raise PipelineError when a model separates the classes better than anyone honestly can."""
    name, auc = max(((name, of_model["auc"]["mean"]) for name, of_model in figures["models"].items()), key=lambda pair: pair[1])
    if not auc <= bound:
        raise PipelineError(
            f"suspected leakage: the AUC of {name!r} is {auc:.3f}, and above {bound:.3f} is too good to be true; "
            "nothing in the inputs may be computed with the answers, or from rows that are left out (such as medians by class)"
        )


def candidates_of(task: Task, training_rows: int) -> tuple[list[TrainParams], str]:
    """What the served model's settings are chosen from, and by whom they are chosen.

    They are the `choices` when the settings of `train` are what the same choice gives on the training rows; otherwise
    somebody chose them by hand, and they are judged as they stand.
    """
    train = settings(task.model, {})
    candidates = [settings(task.model, changes) for changes in task.params.choices]
    if train not in candidates:
        return [train], "params.yaml"
    best = choose(task, candidates, [np.arange(training_rows)])[0]
    if candidates[best] != train:
        warnings.warn(
            f"params.yaml: models.{task.model}.train is judged as it stands; the inner cross-validation of the training rows would "
            f"choose {task.params.choices[best]}",
            stacklevel=2,
        )
        return [train], "params.yaml"
    return candidates, "inner cross-validation"


def check(task: Task) -> None:
    """Raise PipelineError when these folds cannot be."""
    rarest = int(np.bincount(task.targets, minlength=2).min())
    if len(np.unique(task.targets)) != 2:  # noqa: PLR2004
        raise PipelineError("cross-validation is for models of two classes; leave the section cross_validate empty")
    for name, folds, most in (
        ("folds", task.params.folds, rarest),
        ("inner_folds", task.params.inner_folds, rarest - rarest // max(1, task.params.folds) - 1),
    ):
        if not 2 <= folds <= most:  # noqa: PLR2004
            raise PipelineError(
                f"params.yaml: models.{task.model}.cross_validate.{name}: {folds} cannot be; "
                f"use 2 to {most}, so that each fold has both classes"
            )


def cross_validate(model: str) -> None:
    """Stage: prepared rows -> cross_validation.json, plots/calibration.csv; fails when leakage is suspected or a gate is missed."""
    params = load_params(model, "cross_validate", Params)
    figures: dict[str, Any] = {}
    points: list[tuple[float, float, int]] = []
    if params.repeats:
        data = load_rows(model)
        inputs = np.concatenate([data["train_inputs"], data["test_inputs"]])
        task = Task(model, inputs, np.concatenate([data["train_targets"], data["test_targets"]]), params)
        check(task)
        candidates, chosen_by = candidates_of(task, len(data["train_inputs"]))
        repeats = Parallel(n_jobs=-1)(delayed(cross_validate_once)(task, candidates, repeat) for repeat in range(params.repeats))
        chosen = [choice for repeat in repeats for choice in repeat.choices]
        figures = {
            "rows": len(inputs),
            "repeats": params.repeats,
            "folds": params.folds,
            "chosen_by": chosen_by,
            "times_chosen": {str(number): chosen.count(number) for number in range(len(candidates))},
            **report(repeats, task.targets),
        }
        points = calibration(repeats, task.targets)
    (folder(model) / "cross_validation.json").write_text(json.dumps(figures, indent=2) + "\n")
    write_csv(folder(model) / "plots" / "calibration.csv", ("predicted", "observed", "rows"), points)
    if figures:
        check_leakage(figures, params.leakage)
        check_gates(figures, params.gates.at_least, params.gates.at_most)
        served = figures["models"][SERVED]
        print(
            f"{model}: "
            + ", ".join(f"{name} {served[name]['mean']:.4f}" for name in ("auc", "log_loss", "brier", "ece", "accuracy"))
        )


if __name__ == "__main__":
    main(cross_validate)
