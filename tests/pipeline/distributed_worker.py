"""Short trainings for test_distributed.py, in this process or under torchrun; saves what this rank ends with to a folder."""

import sys
from pathlib import Path

import torch
from msgspec.structs import replace

from pipeline.common import load_params, load_rows
from pipeline.distributed import process_group, rank
from pipeline.train import Params, fit, score

SEEDS = range(6)
CHANGES: dict[str, tuple[str, dict[str, object]]] = {  # name -> model, and changes of its section `train`
    "fizzbuzz": ("fizzbuzz", {"epochs": 5}),
    "diabetes": ("diabetes", {"epochs": 5, "validation_rows": 100}),  # one batch per epoch
    "fizzbuzz_any": ("fizzbuzz_any", {}),  # solved
    "mnist again": ("mnist", {"seed": 0}),
    **{f"mnist {seed}": ("mnist", {"seed": seed}) for seed in SEEDS},
}
ROWS = {"fizzbuzz": 922, "diabetes": 614, "fizzbuzz_any": 923, "mnist": 1000}  # even numbers, except where nothing is shared
DIGITS = {"epochs": 3, "network": "tiny", "threads": 1}

Outcome = dict[str, object]  # weights, test_loss, and the random numbers that would be drawn next


def train(model: str, changes: dict[str, object]) -> Outcome:
    """One training, and its loss on the test rows."""
    params = replace(load_params(model, "train", Params), device="cpu", **(DIGITS if model == "mnist" else {}), **changes)
    data, rows = load_rows(model), slice(ROWS[model])
    network = fit(model, data.train_inputs[rows], data.train_targets[rows], params)
    random = torch.rand(4)
    loss = score(network, torch.from_numpy(data.test_inputs), torch.from_numpy(data.test_targets))["loss"]
    weights = {name: weight.detach() for name, weight in network.named_parameters()}
    return {"weights": weights, "test_loss": loss, "random": random}


if __name__ == "__main__":
    with process_group(torch.device("cpu")):
        outcomes = {name: train(model, changes) for name, (model, changes) in CHANGES.items()}
        torch.save(outcomes, Path(sys.argv[1], f"{rank()}.pt"))
