"""Train many small networks on overlapping parts of the same rows, and predict each row with networks not trained on it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from msgspec.structs import replace
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import cross_entropy

from models.network import Outputs
from pipeline.baselines import BASELINES
from pipeline.common import PipelineError
from pipeline.train import Params as TrainParams
from pipeline.train import build, build_optimizer, schedule

SERVED = "served"  # the name of the model that section `train` of params.yaml describes


def fit_many(model: str, inputs: np.ndarray, targets: np.ndarray, training: np.ndarray, params: TrainParams) -> np.ndarray:
    """Train a network for each row of `training`, (networks, rows) bool, which marks its training rows; predict all rows with it.

    Returns probabilities, (networks, rows, classes). Except for rounding, network i is what pipeline.train.fit returns for its rows
    with seed `params.seed + i`; training them with stacked weights is several times as fast.
    Raises PipelineError unless the settings ask for full batches and no held-out rows.
    """
    if params.batch_size < len(inputs) or params.validation_rows:
        raise PipelineError(
            f"cross-validation needs full batches: expected batch_size >= {len(inputs)} and validation_rows 0, "
            f"got {params.batch_size} and {params.validation_rows}"
        )
    torch.set_num_threads(1)
    x, y, rows = torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(training)
    networks = []
    for i, mask in enumerate(rows):
        torch.manual_seed(params.seed + i)
        networks.append(Outputs(build(model, params.network)))
        networks[-1].network.adapt(x[mask])
    weights, state = stack_module_state(networks)  # each (networks, ...)
    outputs_of = vmap(lambda *one: functional_call(networks[0], one, x))
    optimizer = build_optimizer(weights.values(), params.optimizer)
    scheduler = schedule(optimizer, params.warmup, params.epochs)
    share = rows / rows.sum(dim=1, keepdim=True)  # (networks, rows), of a row in its network's mean loss
    for _ in range(params.epochs):
        logits = outputs_of(weights, state).transpose(1, 2)  # (networks, classes, rows)
        losses = cross_entropy(logits, y.expand(rows.shape), reduction="none", label_smoothing=params.label_smoothing)
        optimizer.zero_grad()
        (losses * share).sum().backward()
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        probabilities: np.ndarray = outputs_of(weights, state).softmax(dim=2).numpy()
    return probabilities


class Task(NamedTuple):
    """The rows to cross-validate on, the folds, and the settings to compare with."""

    model: str
    inputs: np.ndarray  # (rows, ...)
    targets: np.ndarray  # (rows,), 0 or 1
    folds: int
    inner_folds: int
    seed: int
    baselines: dict[str, TrainParams]  # name -> settings

    def inner(self) -> StratifiedKFold:
        """The folds of a training part by which settings are chosen."""
        return StratifiedKFold(self.inner_folds, shuffle=True, random_state=self.seed)


def masks(rows: int, parts: Sequence[np.ndarray]) -> np.ndarray:
    """(parts, rows) bool from the row numbers of each part."""
    return np.array([np.isin(np.arange(rows), part) for part in parts])


def choose(task: Task, candidates: Sequence[TrainParams], parts: Sequence[np.ndarray]) -> list[int]:
    """For each part (row numbers), the candidate with the lowest log loss in an inner cross-validation of that part alone."""
    if len(candidates) == 1:
        return [0] * len(parts)
    folds = [(part[train], part[test]) for part in parts for train, test in task.inner().split(part, task.targets[part])]
    training = masks(len(task.targets), [train for train, _ in folds])
    losses = []
    for candidate in candidates:
        predictions = fit_many(task.model, task.inputs, task.targets, training, candidate)[..., 1]
        per_fold = [log_loss(task.targets[test], row[test]) for row, (_, test) in zip(predictions, folds, strict=True)]
        losses.append(np.reshape(per_fold, (len(parts), -1)).mean(axis=1))
    return [int(choice) for choice in np.argmin(losses, axis=0)]


class Repeat(NamedTuple):
    """One cross-validation: each row's fold, each model's out-of-fold probability of the second class, the choice in each fold."""

    fold: np.ndarray  # (rows,)
    predictions: dict[str, np.ndarray]  # model -> (rows,)
    choices: list[int]


def cross_validate_once(task: Task, candidates: Sequence[TrainParams], repeat: int) -> Repeat:
    """Predict every row with every model, trained without that row; `candidates` are the settings of the served model."""
    model, inputs, targets = task[:3]
    offset = repeat * task.folds  # of the seeds: other initial weights in each repeat
    candidates = [replace(candidate, seed=candidate.seed + offset) for candidate in candidates]
    parts = list(StratifiedKFold(task.folds, shuffle=True, random_state=task.seed + repeat).split(inputs, targets))
    fold = np.empty(len(targets), dtype=int)
    for number, (_, test) in enumerate(parts):
        fold[test] = number
    training, every_row = masks(len(targets), [train for train, _ in parts]), np.arange(len(targets))

    chosen = choose(task, candidates, [train for train, _ in parts])
    fits = {choice: fit_many(model, inputs, targets, training, candidates[choice]) for choice in sorted(set(chosen))}
    predictions = {SERVED: np.array([fits[chosen[number]][number, row, 1] for row, number in enumerate(fold)])}
    for name, settings in task.baselines.items():
        fitted = fit_many(model, inputs, targets, training, replace(settings, seed=settings.seed + offset))
        predictions[name] = fitted[fold, every_row, 1]
    rows = torch.from_numpy(inputs)
    with_nan = rows.double().masked_fill(build(model, candidates[0].network).is_missing(rows), torch.nan).numpy()
    for name, make in BASELINES.items():
        predictions[name] = np.empty(len(targets))
        for train, test in parts:
            estimator = make(task.inner()).fit(with_nan[train], targets[train])
            predictions[name][test] = estimator.predict_proba(with_nan[test])[:, 1]
    return Repeat(fold, {name: values.astype(np.float64) for name, values in predictions.items()}, chosen)
