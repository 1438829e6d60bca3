"""Train many small networks on overlapping parts of the same rows, and ask each about the rows that it has not seen."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from msgspec.structs import replace
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import cross_entropy

from models.network import Outputs, Predictor
from pipeline.rivals import RIVALS
from pipeline.stage import PipelineError
from pipeline.train import Params as TrainParams
from pipeline.train import build, build_optimizer, schedule

TOGETHER = 50  # networks trained at once
SERVED = "served"  # the name of what `train` in params.yaml says


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
    `params.seed + i` in full batches on a CPU, but for rounding: weights are stacked and trained as one, which is 7 times quicker.
    Raises PipelineError when the settings ask for smaller batches or held-out rows.
    """
    if params.batch_size < len(inputs) or params.validation_rows:
        raise PipelineError(f"cross-validation trains in full batches: batch_size must be {len(inputs)} or more, validation_rows 0")
    torch.set_num_threads(1)
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
    """What is cross-validated, on what, in how many folds."""

    model: str
    inputs: np.ndarray  # (rows, ...)
    targets: np.ndarray  # (rows,), 0 or 1
    folds: int
    inner_folds: int
    seed: int
    rivals: dict[str, TrainParams]  # by name: settings that are judged beside the served ones

    def inner(self) -> StratifiedKFold:
        """The folds of a part in which choices are made."""
        return StratifiedKFold(self.inner_folds, shuffle=True, random_state=self.seed)


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
    folds = [(part[fitted], part[left]) for part in parts for fitted, left in task.inner().split(part, task.targets[part])]
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
    model, inputs, targets = task[:3]
    first = repeat * task.folds  # other initial weights in each repeat
    candidates = [replace(candidate, seed=candidate.seed + first) for candidate in candidates]
    outer = StratifiedKFold(task.folds, shuffle=True, random_state=task.seed + repeat)
    parts = list(outer.split(inputs, targets))
    fold = np.empty(len(targets), dtype=int)
    for number, (_, left) in enumerate(parts):
        fold[left] = number
    training, everyone = masks(len(targets), [fitted for fitted, _ in parts]), np.arange(len(targets))

    chosen = choose(task, candidates, [fitted for fitted, _ in parts])
    fits = {choice: fit_many(model, inputs, targets, training, candidates[choice]) for choice in sorted(set(chosen))}
    answers = {SERVED: np.array([fits[chosen[number]][number, row, 1] for row, number in enumerate(fold)])}
    for name, rival in task.rivals.items():
        asked = fit_many(model, inputs, targets, training, replace(rival, seed=rival.seed + first))
        answers[name] = asked[fold, everyone, 1]
    rows = torch.from_numpy(inputs)
    known = rows.double().masked_fill(build(model, candidates[0].network).missing(rows), torch.nan).numpy()
    for name, make in RIVALS.items():
        answers[name] = np.empty(len(targets))
        for fitted, left in parts:
            answers[name][left] = make(task.inner()).fit(known[fitted], targets[fitted]).predict_proba(known[left])[:, 1]
    return Repeat(fold, {name: answer.astype(np.float64) for name, answer in answers.items()}, chosen)
