"""Training in one or several processes, on the MNIST sample: `torchrun --nproc-per-node 2 -m benchmarks.distributed`.

Each seed trains the network of params.yaml on 4,500 digits with the same batch size for all processes together; without torchrun
(`python -m benchmarks.distributed`) there is one process. Test loss and accuracy are measured on the 500 held-out digits; wall
seconds are those of `fit`. It has not been run on a GPU.
"""

import pipeline  # noqa: F401  sets the waiting policy of OpenMP, which is read when torch is loaded

# isort: split

import os
import time

import click
import numpy as np
import torch
from msgspec.structs import replace

from models.mnist.dataset import sample
from pipeline.common import load_params
from pipeline.distributed import process_group, rank
from pipeline.train import Params, fit, score


@click.command()
@click.option("--seeds", default=3, show_default=True)
@click.option("--epochs", default=4, show_default=True)
@click.option("--threads", default=1, show_default=True, help="Per process.")
def main(seeds: int, epochs: int, threads: int) -> None:
    """Print mean and standard deviation of test loss, test accuracy and time."""
    data = sample()
    test = torch.from_numpy(data.test_inputs), torch.from_numpy(data.test_targets)
    base = replace(load_params("mnist", "train", Params), device="cpu", threads=threads, epochs=epochs)
    results = []
    with process_group(torch.device("cpu")):
        for seed in range(seeds):
            started = time.perf_counter()
            network = fit("mnist", data.train_inputs, data.train_targets, replace(base, seed=seed))
            seconds = time.perf_counter() - started
            results.append([*score(network, *test).values(), seconds])
        if rank() == 0:
            mean, spread = np.mean(results, axis=0), np.std(results, axis=0, ddof=1)
            figures = (f"{name} {m:.4f} ({s:.4f})" for name, m, s in zip(("loss", "accuracy", "wall s"), mean, spread, strict=True))
            processes = os.environ.get("WORLD_SIZE", "1")
            print(f"{processes} processes, {seeds} seeds, {epochs} epochs: {', '.join(figures)}", flush=True)


if __name__ == "__main__":
    main()
