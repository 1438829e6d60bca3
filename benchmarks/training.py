"""Training time to 99.0, 99.2 and 99.5 % test accuracy on MNIST: `python -m benchmarks.training`.

It is compared with a well-known example, pytorch/examples, mnist/main.py, in its settings and with its input pipeline (batches of
64, in file order on a CPU; Adadelta at 1.0, times 0.7 per epoch; torchvision's data set in a DataLoader, image by image), whose
test accuracy is measured after every epoch, outside the clock. Ours is the network of params.yaml with a short schedule per target,
chosen on 5,000 held-out training digits; the clock runs over all of `pipeline.train.fit`. `--device cuda` has not been run on a GPU
yet.
"""

import pipeline  # noqa: F401  sets the waiting policy of OpenMP, which is read when torch is loaded

# isort: split

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from models.dataset import Dataset
from pipeline.common import load_params, load_rows
from pipeline.train import Params, fit, score

OURS: dict[float, dict[str, Any]] = {  # target test accuracy -> changes of the section `train` of params.yaml
    0.990: {"epochs": 1, "label_smoothing": 0.0},
    0.992: {"epochs": 2, "label_smoothing": 0.0, "batch_size": 128, "optimizer": {"lr": 0.12}},
    0.995: {"epochs": 10},
}


@dataclass(frozen=True, kw_only=True)
class Time:
    """The cost and the result of a training."""

    wall: float  # seconds
    cpu: float  # seconds, of all threads and children
    accuracy: float  # on the test rows
    epochs: int


class Clock:
    """Wall and CPU seconds, summed over the calls that it times."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def run(self, call: Callable[[], Any]) -> Any:
        """Call, and return the result."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.wall, self.cpu = self.wall + time.perf_counter() - wall, self.cpu + time.process_time() - cpu
        return result


class Digits(datasets.MNIST):  # type: ignore[misc]
    """torchvision's data set, on the files that `pipeline.prepare` has fetched."""

    @property
    def raw_folder(self) -> str:
        return str(self.root)


def example_network() -> nn.Module:
    """The example's network: (batch, 1, 28, 28) normalised -> (batch, 10), 1.2 million parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU()),  # (batch, 32, 26, 26)
        *(nn.Conv2d(32, 64, 3), nn.ReLU()),  # (batch, 64, 24, 24)
        *(nn.MaxPool2d(2), nn.Dropout(0.25), nn.Flatten()),  # (batch, 9216)
        *(nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5)),  # (batch, 128)
        nn.Linear(128, 10),
    )


def example_loader(*, train: bool, device: torch.device) -> DataLoader[tuple[Tensor, Tensor]]:
    """The example's input pipeline; it shuffles, and loads in another process, only on a GPU."""
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    gpu: dict[str, Any] = {"num_workers": 1, "pin_memory": True, "shuffle": True} if device.type == "cuda" else {}
    return DataLoader(
        Digits(Path("data", "raw", "mnist"), train=train, transform=transform), batch_size=64 if train else 1000, **gpu
    )


def example_epoch(network: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any], device: torch.device) -> None:
    """One pass over the training digits."""
    network.train()
    for inputs, targets in loader:
        optimizer.zero_grad()
        cross_entropy(network(inputs.to(device)), targets.to(device)).backward()  # its log_softmax and nll_loss
        optimizer.step()


@torch.no_grad()
def example_accuracy(network: nn.Module, loader: DataLoader[Any], device: torch.device) -> float:
    """Accuracy on the test digits."""
    network.eval()
    correct = sum(int((network(inputs.to(device)).argmax(dim=1).cpu() == targets).sum()) for inputs, targets in loader)
    return correct / len(loader.dataset)  # type: ignore[arg-type]


def theirs(device: torch.device, epochs: int) -> Iterator[Time]:
    """Train as the example does; yield the time so far and the test accuracy after every epoch."""
    torch.manual_seed(1)
    loader, test = (example_loader(train=train, device=device) for train in (True, False))
    network = example_network().to(device)
    optimizer = torch.optim.Adadelta(network.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    clock = Clock()
    for epoch in range(1, epochs + 1):
        clock.run(lambda: example_epoch(network, optimizer, loader, device))
        yield Time(wall=clock.wall, cpu=clock.cpu, accuracy=example_accuracy(network, test, device), epochs=epoch)
        scheduler.step()


def ours(rows: Dataset, target: float, **changes: Any) -> Time:
    """Train with the schedule for a target."""
    base, own = load_params("mnist", "train", dict[str, Any]), OURS[target]
    optimizer = base["optimizer"] | own.get("optimizer", {})
    params = msgspec.convert(base | own | {"optimizer": optimizer} | changes, Params)
    clock = Clock()
    network = clock.run(lambda: fit("mnist", rows.train_inputs, rows.train_targets, params))
    accuracy = score(network, torch.from_numpy(rows.test_inputs), torch.from_numpy(rows.test_targets))["accuracy"]
    return Time(wall=clock.wall, cpu=clock.cpu, accuracy=accuracy, epochs=params.epochs)


def print_line(name: str, times: list[Time]) -> None:
    """Print one line: medians over the trainings, and the mean accuracy."""
    wall, cpu = (float(np.median([getattr(training, clock) for training in times])) for clock in ("wall", "cpu"))
    mean = float(np.mean([training.accuracy for training in times]))
    print(f"{name:22} {times[0].epochs:3} epochs {wall:8.1f} s {cpu:8.1f} CPU s   test accuracy {mean:.4f}", flush=True)


def compare(rows: Dataset, threads: int, seeds: int, epochs: int) -> None:
    """On the CPU: the example epoch by epoch, then ours to every target."""
    history = []
    for epoch in theirs(torch.device("cpu"), epochs):
        print_line("theirs", [epoch])
        history.append(epoch)
    for target in OURS:
        trainings = [ours(rows, target, device="cpu", threads=threads, seed=seed) for seed in range(seeds)]
        reached = sum(training.accuracy >= target for training in trainings)
        print_line(f"ours to {target:.1%}", trainings)
        first = next((epoch for epoch in history if epoch.accuracy >= target), None)
        cpu = float(np.median([training.cpu for training in trainings]))
        ratio = f"theirs {first.cpu:.1f} CPU s, {first.cpu / cpu:.1f} x ours" if first else f"theirs not in {epochs} epochs"
        print(f"  {reached} of {seeds} seeds reach it; {ratio}", flush=True)


def on_gpu(rows: Dataset, seeds: int) -> None:
    """Seconds to 99.0 % over many seeds. The first training loads cuDNN and is reported separately; nothing is compiled."""
    first, *times = [ours(rows, 0.99, device="cuda", seed=seed) for seed in (0, *range(seeds))]
    print_line("first, cuDNN loaded", [first])
    print_line("to 99.0 %", times)
    wall = np.array([training.wall for training in times])
    reached = np.mean([training.accuracy for training in times] >= np.float64(0.99))
    print(
        f"  {wall.mean():.2f} s, standard deviation {wall.std(ddof=1):.2f}; {reached:.0%} of {seeds} seeds reach it; compiling: 0 s"
    )


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", default=1, show_default=True, help="Threads of torch on the CPU.")
@click.option("--seeds", default=3, show_default=True, help="Trainings of ours; use 30 on a GPU.")
@click.option("--epochs", default=14, show_default=True, help="Epochs of the example.")
def main(device: str, threads: int, seeds: int, epochs: int) -> None:
    """Print the training time to each target."""
    torch.set_num_threads(threads)
    rows = load_rows("mnist")
    if device == "cuda":
        on_gpu(rows, seeds)
    else:
        compare(rows, threads, seeds, epochs)


if __name__ == "__main__":
    main()
