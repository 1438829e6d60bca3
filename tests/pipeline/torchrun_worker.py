"""What test_torchrun.py starts in two processes: short trainings, and a file with what this rank ends with."""

import os
import sys
from pathlib import Path
from typing import TypedDict

import torch
from msgspec.structs import replace
from torch import Tensor

from pipeline.distributed import Alone, joined
from pipeline.stage import load_params, load_rows
from pipeline.train import Params, Point, fit, score

SEEDS = range(6)
CHANGES: dict[str, tuple[str, dict[str, object]]] = {  # name -> model, and what differs from its section `train`
    "fizzbuzz": ("fizzbuzz", {"epochs": 5}),  # the last batch of an epoch has 27 rows
    "diabetes": ("diabetes", {"epochs": 5, "validation_rows": 100}),  # one batch an epoch
    "fizzbuzz_any": ("fizzbuzz_any", {}),  # solved
    "mnist again": ("mnist", {"seed": 0}),
    **{f"mnist {seed}": ("mnist", {"seed": seed}) for seed in SEEDS},
}
DIGITS = {"epochs": 3, "network": "tiny", "threads": 1}
ROWS = 1000  # of the digits


class Outcome(TypedDict):
    """What a rank ends a training with."""

    weights: dict[str, Tensor]
    curves: dict[int, Point]
    test_loss: float
    random: Tensor  # what it would draw next


def train(group: Alone, model: str, changes: dict[str, object]) -> Outcome:
    """One training, and how well it does on the test rows."""
    params = replace(load_params(model, "train", Params), device="cpu", **(DIGITS if model == "mnist" else {}), **changes)
    data, curves = load_rows(model), dict[int, Point]()
    network = fit(model, data["train_inputs"][:ROWS], data["train_targets"][:ROWS], params, curves.__setitem__, group)
    random = torch.rand(4)
    loss = score(network, torch.from_numpy(data["test_inputs"]), torch.from_numpy(data["test_targets"]))["loss"]
    weights = {name: weight.detach() for name, weight in network.named_parameters()}
    return {"weights": weights, "curves": curves, "test_loss": loss, "random": random}


def train_all(group: Alone) -> dict[str, Outcome]:
    """All of them."""
    return {name: train(group, model, changes) for name, (model, changes) in CHANGES.items()}


if __name__ == "__main__":
    with joined(2, torch.device("cpu")) as group:
        torch.save(train_all(group), Path(sys.argv[1], f"{os.environ['RANK']}.pt"))
