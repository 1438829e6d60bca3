"""Train one model on its prepared rows: in memory and in one loop. torchrun trains it in several processes."""

import io
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
from dvclive.live import Live
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import models.network
from models.files import atomic_write
from models.network import Predictor
from pipeline import distributed
from pipeline.common import NotNegative, Paths, PipelineError, Positive, Section, Share, load_params, load_rows

MMAP_THRESHOLD_BYTES = 31 * 2**20  # just below 32 MiB, glibc's upper limit of the dynamic threshold
CURVE_POINTS = 100  # maximum per learning curve

Point = dict[str, dict[str, float]]  # of the learning curves: train | validation -> loss | accuracy -> value


class Params(Section, frozen=True, kw_only=True):
    seed: int
    device: Annotated[str, msgspec.Meta(pattern="^(auto|cpu|cuda)$")]
    epochs: NotNegative  # of gradient descent; 0 if the network's `solve` finds the weights
    batch_size: Positive = 2**31  # rows; more than there are means full batches
    optimizer: dict[str, Any] = msgspec.field(default_factory=dict)  # `name`: a class of torch.optim; the rest are its arguments
    warmup: Share = 0.0  # of all steps, during which the learning rate rises; then it falls to 0 along a cosine
    label_smoothing: Share = 0.0
    precision: Annotated[str, msgspec.Meta(pattern="^(float32|bfloat16)$")] = (
        "float32"  # of the network's arithmetic; bfloat16 is faster on CPUs that support it
    )
    validation_rows: NotNegative = 0  # random training rows that are held out, to choose settings by
    threads: NotNegative = 0  # of torch on the CPU; 0: one per core. Small networks are faster with 1
    network: str | dict[str, Any] = msgspec.field(default_factory=dict)  # keywords of the model's Network, or only its `name`


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA when there is a GPU. Raises PipelineError when CUDA is required and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise PipelineError("device: cuda needs a GPU, and torch sees none; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def build(model: str, network: str | dict[str, Any]) -> Predictor:
    """The model's untrained network. Raises PipelineError when it does not accept these arguments."""
    try:
        return models.network.build(model, network)
    except (TypeError, ValueError) as error:
        raise PipelineError(f"params.yaml: models.{model}.train.network: {error}") from error


def load_network(model: str) -> Predictor:
    """The trained network, in evaluation mode."""
    network = build(model, load_params(model, "train", Params).network).eval()
    network.load_state_dict(torch.load(Paths(model).trained / "model.pt", weights_only=True))
    return network


@torch.inference_mode()
def predict(network: Predictor, inputs: np.ndarray) -> np.ndarray:
    """Predictions of a network, (rows, ...), in batches that fit into memory."""
    return np.concatenate([network(rows).numpy() for rows in torch.from_numpy(inputs).split(1000)])


def build_optimizer(parameters: Iterable[Tensor], arguments: dict[str, Any]) -> torch.optim.Optimizer:
    """The optimiser of torch.optim that `name` names, with the other arguments. Raises PipelineError when they are not valid."""
    options = dict(arguments)
    try:
        optimizer: torch.optim.Optimizer = getattr(torch.optim, options.pop("name"))(parameters, **options)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise PipelineError(f"optimizer: expected a class of torch.optim and its arguments, got {arguments}: {error}") from error
    return optimizer


def schedule(optimizer: torch.optim.Optimizer, warmup: float, steps: int) -> LambdaLR:
    """Scale the learning rate: a linear rise during `warmup`, a share of all steps, then half a cosine to 0."""
    up = max(1, round(warmup * steps))
    down = max(1, steps - up)
    return LambdaLR(optimizer, lambda step: (step + 1) / up if step < up else 0.5 * (1 + math.cos(math.pi * (step - up) / down)))


def loss_of(outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy for class indices, mean squared error for values."""
    if targets.is_floating_point():
        return mse_loss(outputs, targets)
    return cross_entropy(outputs, targets, label_smoothing=label_smoothing)


def count_correct(outputs: Tensor, targets: Tensor) -> Tensor:
    """Number of rows with the right class; NaN for values."""
    return targets.sum() * torch.nan if targets.is_floating_point() else (outputs.argmax(dim=1) == targets).sum()


def means(loss_sum: Tensor, correct: Tensor, rows: int) -> dict[str, float]:
    """Mean loss, and a classifier's accuracy."""
    return {"loss": loss_sum.item() / rows} | ({} if correct.isnan() else {"accuracy": correct.item() / rows})


@torch.no_grad()
def score(network: Predictor, inputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Mean loss, and a classifier's accuracy, over all rows, without label smoothing."""
    network.eval()
    outputs = torch.cat([network.outputs(rows) for rows in inputs.split(1000)])  # (rows, ...)
    return means(loss_of(outputs, targets) * len(targets), count_correct(outputs, targets), len(targets))


def fit(
    model: str,
    inputs: np.ndarray,
    targets: np.ndarray,
    params: Params,
    record: Callable[[int, Point], None] = lambda _epoch, _point: None,
) -> Predictor:
    """Train a new network on all rows except `validation_rows`; return it on the CPU, in evaluation mode.

    inputs: (rows, ...) as the contract describes them; targets: (rows,) class indices, or (rows, ...) values. `record` is called
    with points of the learning curves.
    """
    # Allocate and free a large block once: this raises glibc's mmap threshold, so later buffers are reused without page faults.
    torch.empty(MMAP_THRESHOLD_BYTES, dtype=torch.uint8)
    torch.manual_seed(params.seed)
    if params.threads:
        torch.set_num_threads(params.threads)
    device = choose_device(params.device)
    network = build(model, params.network).to(device)

    x, y = torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)
    if params.validation_rows >= len(x):
        raise PipelineError(f"validation_rows: expected fewer than the {len(x)} training rows, got {params.validation_rows}")
    held_out, rows = torch.randperm(len(x)).to(device).split([params.validation_rows, len(x) - params.validation_rows])
    validation_x, validation_y, x, y = x[held_out], y[held_out], x[rows], y[rows]
    network.adapt(x)
    network.solve(x, y)
    if not params.epochs:
        record(0, {"train": score(network, x, y)})
        return network.cpu().eval()

    outputs_of, sampler, batch_size = distributed.share(network, len(x), params.batch_size, params.seed)
    optimizer = build_optimizer(network.parameters(), params.optimizer)
    scheduler = schedule(optimizer, params.warmup, params.epochs * math.ceil(len(sampler) / batch_size))
    title, hidden = f"train {model} on {device.type}", distributed.rank() > 0
    for epoch in (progress := tqdm(range(params.epochs), title, unit="epoch", mininterval=0.5, disable=hidden)):
        network.train()
        sampler.set_epoch(epoch)
        loss_sum, correct = torch.zeros(2, device=device)
        for batch in torch.tensor(list(sampler), device=device).split(batch_size):
            with torch.autocast(device.type, torch.bfloat16, enabled=params.precision == "bfloat16"):
                outputs = outputs_of(network.augment(x[batch])).float()  # (batch, ...)
            loss = loss_of(outputs, y[batch], params.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            loss_sum += loss.detach() * len(batch)
            correct += count_correct(outputs, y[batch])

        if (epoch + 1) % math.ceil(params.epochs / CURVE_POINTS) == 0 or epoch + 1 == params.epochs:
            point = {"train": means(loss_sum, correct, len(sampler))}
            if len(held_out):
                point["validation"] = score(network, validation_x, validation_y)
            record(epoch + 1, point)
            progress.set_postfix({f"{part} loss": f"{values['loss']:.4f}" for part, values in point.items()}, refresh=False)
    return network.cpu().eval()


def log_point(live: Live, epoch: int, point: Point) -> None:
    """Add a point to the learning curves on disk; a single point at epoch 0 is not a curve."""
    live.step = epoch
    for part, values in point.items():
        for name, value in values.items():
            live.log_metric(f"{part}/{name}", value, plot=epoch > 0)
    live.make_summary()


def train(model: str) -> None:
    """Stage: prepared rows -> model.pt (state_dict) and learning curves. With several processes, rank 0 writes them."""
    params, data, paths = load_params(model, "train", Params), load_rows(model), Paths(model)
    with distributed.process_group(choose_device(params.device)):
        if distributed.rank():
            fit(model, data.train_inputs, data.train_targets, params)
            return
        with Live(str(paths.training), dvcyaml=False, save_dvc_exp=False) as live:
            (paths.training / "plots" / "metrics").mkdir(parents=True, exist_ok=True)  # DVC expects it even if it is empty
            network = fit(model, data.train_inputs, data.train_targets, params, partial(log_point, live))
    state = io.BytesIO()
    torch.save(network.state_dict(), state)
    atomic_write(paths.trained / "model.pt", state.getvalue())
