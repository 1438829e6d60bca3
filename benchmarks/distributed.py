"""One process beside several on the same global batch: `python -m benchmarks.distributed`, on the 5,000 digits of the repository.

Each seed trains the network of params.yaml on 4,500 digits, in one process and then under torchrun, with one thread a process. The
test loss and accuracy are of the 500 held-out digits; wall seconds are of `fit` alone. Not run on a GPU, and so not with NCCL.
"""

import time

import click
import numpy as np
import torch
from msgspec.structs import replace

from models.mnist.dataset import sample
from pipeline.distributed import ALONE, Alone, joined, launch, launched
from pipeline.common import load_params
from pipeline.train import Params, fit, score


def measure(group: Alone, processes: int, seeds: int, epochs: int) -> None:
    """Train with every seed; rank 0 prints means and standard deviations over them."""
    data = sample()
    test = torch.from_numpy(data.test_inputs), torch.from_numpy(data.test_targets)
    base = replace(load_params("mnist", "train", Params), device="cpu", threads=1, epochs=epochs)
    found = []
    for seed in range(seeds):
        started = time.perf_counter()
        network = fit("mnist", data.train_inputs, data.train_targets, replace(base, seed=seed), group=group)
        found.append([*score(network, *test).values(), time.perf_counter() - started])
    if not group.rank:
        mean, spread = np.mean(found, axis=0), np.std(found, axis=0, ddof=1)
        figures = (f"{name} {m:.4f} ({s:.4f})" for name, m, s in zip(("loss", "accuracy", "wall s"), mean, spread, strict=True))
        print(f"{processes} processes, {seeds} seeds, {epochs} epochs: {', '.join(figures)}", flush=True)


@click.command()
@click.option("--processes", default=2, show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--epochs", default=4, show_default=True)
def main(processes: int, seeds: int, epochs: int) -> None:
    """Print mean and standard deviation of test loss, test accuracy and time."""
    if not launched():
        measure(ALONE, 1, seeds, epochs)
        launch(processes, "benchmarks.distributed", f"--processes={processes}", f"--seeds={seeds}", f"--epochs={epochs}")
        return
    with joined(processes, torch.device("cpu")) as group:
        measure(group, processes, seeds, epochs)


if __name__ == "__main__":
    main()
