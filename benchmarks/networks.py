"""Accuracy of every MNIST network over several seeds: `python -m benchmarks.networks --networks tiny,record`.

RECIPES were chosen on 5,000 held-out training digits (`validation_rows: 5000`), not by the accuracy that this file prints, which is
that of the weights after the last epoch.
"""

import pipeline  # noqa: F401  sets the waiting policy of OpenMP, which is read when torch is loaded

# isort: split

import time
from typing import Any

import click
import msgspec
import numpy as np
import torch

import models
from models.dataset import Dataset
from pipeline.common import load_params, load_rows
from pipeline.export import to_onnx
from pipeline.train import Params, fit, score

OPSET = 20
RECIPES: dict[str, dict[str, Any]] = {  # network -> changes of the section `train` of params.yaml
    "cnn": {},
    "mlp": {},
    "inception": {},
    "tiny": {"epochs": 20},
    "record": {
        "network": {"name": "record", "rotation": 15, "scale": 0.15, "shift": 3},
        "epochs": 40,
        "batch_size": 128,
        "precision": "bfloat16",
        "optimizer": {"lr": 0.1},
    },
}


def recipe(network: str, **changes: Any) -> Params:
    """The section `train` for a network."""
    base, own = load_params("mnist", "train", dict[str, Any]), RECIPES[network]
    optimizer = base["optimizer"] | own.get("optimizer", {})
    return msgspec.convert(base | {"network": network} | own | {"optimizer": optimizer} | changes, Params)


def measure(name: str, rows: Dataset, params: Params) -> float:
    """Train once, print one line, return the test accuracy."""
    wall, cpu = time.perf_counter(), time.process_time()
    network = fit("mnist", rows.train_inputs, rows.train_targets, params)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    accuracy = score(network, torch.from_numpy(rows.test_inputs), torch.from_numpy(rows.test_targets))["accuracy"]
    size = sum(parameter.numel() for parameter in network.parameters())
    contract = models.load("mnist", "contract").CONTRACT
    graph = to_onnx(network, contract, torch.from_numpy(rows.test_inputs[:2]), OPSET).SerializeToString()
    sizes = f"{size:7} parameters {len(graph):8} bytes of ONNX"
    print(f"{name:10}{sizes}   seed {params.seed}   accuracy {accuracy:.4f}   {cpu:6.0f} CPU s {wall:6.0f} s", flush=True)
    return accuracy


@click.command()
@click.option("--networks", default=",".join(RECIPES), show_default=True, help="Names, separated by commas.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Numbers, separated by commas.")
@click.option("--threads", default=0, show_default=True, help="Threads of torch on the CPU; 0: one per core.")
def main(networks: str, seeds: str, threads: int) -> None:
    """Train every network with every seed; print each accuracy, and mean and standard deviation."""
    rows = load_rows("mnist")
    for network in networks.split(","):
        accuracies = [measure(network, rows, recipe(network, seed=int(seed), threads=threads)) for seed in seeds.split(",")]
        spread = f" standard deviation {np.std(accuracies, ddof=1):.5f}" if len(accuracies) > 1 else ""
        print(f"{network:10}mean {np.mean(accuracies):.5f}{spread} over {len(accuracies)} seeds", flush=True)


if __name__ == "__main__":
    main()
