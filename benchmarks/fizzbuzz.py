"""FizzBuzz on 1..100 compared with a tutorial's training loop: `python -m benchmarks.fizzbuzz`, on one core.

Both are trained on 101..1023. Ours is `pipeline.train.fit` with the settings of params.yaml, which were chosen on held-out slices
of 101..1023; 1..100 is only used here. The tutorial is Joel Grus's network ("Fizz Buzz in Tensorflow", 2016) as in its PyTorch
versions: ten bits as 0 and 1, one hidden layer of 100 ReLUs, SGD with a learning rate of .05, batches of 128 in order, 10,000
epochs.
"""

import pipeline  # noqa: F401  sets the waiting policy of OpenMP, which is read when torch is loaded

# isort: split

import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import models
from models.dataset import Dataset
from pipeline.common import load_params
from pipeline.train import Params, fit

BITS, HIDDEN, LEARNING_RATE, BATCH, EPOCHS = 10, 100, 0.05, 128, 10_000  # the tutorial's

Answer = Callable[[Tensor], Tensor]  # (batch,) numbers -> (batch, 4) scores; the highest is the answer


def ours(data: Dataset, seed: int) -> Answer:
    """Train the model of this repository."""
    params = replace(load_params("fizzbuzz", "train", Params), seed=seed, device="cpu", threads=1)
    return fit("fizzbuzz", data.train_inputs, data.train_targets, params)


def encode(numbers: Tensor) -> Tensor:
    """(batch,) -> (batch, 10), 0 or 1."""
    return (numbers.unsqueeze(1) >> torch.arange(BITS) & 1).float()


def tutorial(data: Dataset, seed: int) -> Answer:
    """Train as the tutorial does."""
    torch.manual_seed(seed)
    x, y = encode(torch.from_numpy(data.train_inputs)), torch.from_numpy(data.train_targets)
    network = nn.Sequential(nn.Linear(BITS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 4))
    optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE)
    for _ in range(EPOCHS):
        for inputs, targets in zip(x.split(BATCH), y.split(BATCH), strict=True):
            loss = cross_entropy(network(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return lambda numbers: network(encode(numbers))


def measure(train: Callable[[Dataset, int], Answer], data: Dataset, seed: int) -> tuple[int, float]:
    """Wrong answers on 1..100, and CPU seconds of the training."""
    started = time.process_time()
    answer = train(data, seed)
    seconds = time.process_time() - started
    with torch.inference_mode():
        answers = answer(torch.from_numpy(data.test_inputs)).argmax(dim=1).numpy()
    return int(np.count_nonzero(answers != data.test_targets)), seconds


@click.command()
@click.option("--seeds", default=20, show_default=True, help="Trainings of ours, with seeds from 0.")
@click.option("--tutorial-seeds", default=3, show_default=True, help="Trainings of the tutorial, half a minute each.")
def main(seeds: int, tutorial_seeds: int) -> None:
    """Print errors on 1..100 and CPU seconds per seed."""
    torch.set_num_threads(1)
    data = models.load("fizzbuzz", "dataset").load(Path())
    print("seed   errors of 100   CPU seconds   tutorial: errors   CPU seconds", flush=True)
    for seed in range(max(seeds, tutorial_seeds)):
        kinds = (ours, seeds), (tutorial, tutorial_seeds)
        results = [measure(train, data, seed) if seed < count else None for train, count in kinds]
        left, right = (f"{pair[0]:>8}{pair[1]:>18.2f}" if pair else " " * 26 for pair in results)
        print(f"{seed:4}   {left}  {right}".rstrip(), flush=True)


if __name__ == "__main__":
    main()
