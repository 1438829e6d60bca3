"""Train many small networks on overlapping parts of the same rows, and predict each row with networks not trained on it."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
import torch
from msgspec.structs import replace
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import cross_entropy

from models.network import Outputs
from pipeline.baselines import BASELINES
from pipeline.common import PipelineError, Positive, Section
from pipeline.train import Params as TrainParams
from pipeline.train import build, build_optimizer, schedule

SERVED = "served"  # the name of the model that section `train` of params.yaml describes

Changes = dict[str, Any]  # of the section `train` of params.yaml
Folds = Annotated[int, msgspec.Meta(ge=2)]


class Params(Section, frozen=True, kw_only=True):
    seed: int = 0
    repeats: Positive
    folds: Folds = 10
    inner_folds: Folds = 5
    choices: tuple[Changes, ...] = ()  # changes of `train` among which the inner cross-validation chooses
    baselines: dict[str, Changes] = msgspec.field(default_factory=dict)  # name -> changes of `train`; baselines.py has more
    leakage: float = 1.0  # an AUC above it is rejected as suspected leakage
    gates: dict[Literal["at_least", "at_most"], dict[str, float]] = msgspec.field(
        default_factory=dict
    )  # by dotted name of a figure


class Task(NamedTuple):
    """The rows to cross-validate on, (rows, ...) and (rows,) with 0 or 1, and how."""

    model: str
    inputs: np.ndarray
    targets: np.ndarray
    params: Params

    def inner(self) -> StratifiedKFold:
        return StratifiedKFold(self.params.inner_folds, shuffle=True, random_state=self.params.seed)


class Repeat(NamedTuple):
    """One cross-validation: the rows of each fold, each model's out-of-fold P(second class), and what was chosen."""

    folds: list[np.ndarray]  # row numbers
    predictions: dict[str, np.ndarray]  # model -> (rows,)
    choices: list[int]  # of settings for the served model, by fold


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


def cross_validate_once(task: Task, networks: Mapping[str, Sequence[TrainParams]], repeat: int) -> Repeat:
    """Predict every row with every model, trained without that row; each of `networks` has the settings to choose from."""
    model, inputs, targets, params = task
    parts = list(StratifiedKFold(params.folds, shuffle=True, random_state=params.seed + repeat).split(inputs, targets))
    train_parts, test_parts = [train for train, _ in parts], [test for _, test in parts]
    predictions, choices = {}, {}
    for name, settings in networks.items():
        candidates = [replace(each, seed=each.seed + repeat * params.folds) for each in settings]  # other weights in each repeat
        choices[name] = choose(task, candidates, train_parts)
        predictions[name] = np.empty(len(targets))
        for choice in set(choices[name]):
            probabilities = fit_many(model, inputs, targets, masks(len(targets), train_parts), candidates[choice])[..., 1]
            for fold in np.flatnonzero(np.equal(choices[name], choice)):
                predictions[name][test_parts[fold]] = probabilities[fold, test_parts[fold]]
    rows = torch.from_numpy(inputs)
    with_nan = rows.double().masked_fill(build(model, networks[SERVED][0].network).is_missing(rows), torch.nan).numpy()
    for name, make in BASELINES.items():
        predictions[name] = cross_val_predict(make(task.inner()), with_nan, targets, cv=parts, method="predict_proba")[:, 1]
    return Repeat(test_parts, predictions, choices[SERVED])
