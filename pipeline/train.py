"""Train one model on its prepared rows: in memory, on one device, in one loop."""

import math
from typing import Any

import msgspec
import numpy as np
import torch
from dvclive.live import Live
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss
from tqdm import tqdm

import models.network
from models.network import Predictor
from pipeline.stage import NotNegative, PipelineError, Positive, Section, Share, folder, load_params, load_rows, main

KEEP_MEMORY = 31 * 2**20  # bytes; glibc unmaps freed blocks larger than the largest one freed so far, if that is below 32 MiB
CURVE_POINTS = 100  # at most so many points a learning curve


class Params(Section, frozen=True, kw_only=True):
    """Section `train` of params.yaml."""

    seed: int
    device: str  # auto | cpu | cuda
    epochs: NotNegative  # of gradient descent; 0 where the network's `solve` has found the weights
    batch_size: Positive = 2**31  # rows; more than there are means full batches
    optimizer: dict[str, Any] = msgspec.field(default_factory=dict)  # `name`: a class of torch.optim; the rest are its arguments
    warmup: Share = 0.0  # of all steps in which the learning rate rises; then it falls to 0 along a cosine
    label_smoothing: Share = 0.0
    precision: str = "float32"  # of the network's arithmetic: float32 | bfloat16, which is quicker where the processor has it
    validation_rows: NotNegative = 0  # so many random training rows are held out, to choose settings by
    threads: NotNegative = 0  # of torch on the CPU; 0: one a core. Small networks are quicker with 1
    network: str | dict[str, Any] = msgspec.field(default_factory=dict)  # keywords of the model's Network, or only its `name`

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision: {self.precision!r} is not known; use float32 or bfloat16")


def choose_device(wish: str) -> torch.device:
    """`auto` is CUDA when there is a GPU. Raises PipelineError when CUDA is demanded and there is none."""
    if wish not in ("auto", "cpu", "cuda"):
        raise PipelineError(f"device: {wish!r} is not known; use auto, cpu or cuda")
    if wish == "cuda" and not torch.cuda.is_available():
        raise PipelineError("device: cuda is demanded, but torch sees no GPU; use auto or cpu")
    return torch.device("cuda" if wish != "cpu" and torch.cuda.is_available() else "cpu")


def build(model: str, network: str | dict[str, Any]) -> Predictor:
    """The model's network, untrained. Raises PipelineError when it does not take these arguments."""
    try:
        return models.network.build(model, network)
    except (TypeError, ValueError) as error:
        raise PipelineError(f"params.yaml: models.{model}.train.network: {error}") from error


def build_optimizer(network: Predictor, arguments: dict[str, Any]) -> torch.optim.Optimizer:
    """An optimiser of torch.optim by name. Raises PipelineError when there is none, or it does not take these arguments."""
    options = dict(arguments)
    kind = getattr(torch.optim, str(options.pop("name", None)), None)
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise PipelineError(f"optimizer: {arguments.get('name')!r} is no optimiser of torch.optim; use SGD, RMSprop, Adam or AdamW")
    try:
        return kind(network.parameters(), **options)
    except (TypeError, ValueError) as error:
        raise PipelineError(f"optimizer: {kind.__name__}: {error}") from error


def schedule(warmup: float, steps: int) -> Any:
    """Factor of the learning rate by step: a linear rise over the share `warmup` of all steps, then half a cosine to 0."""
    rise = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

    return factor


def loss_of(outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy with class indices, mean squared error with values."""
    if targets.is_floating_point():
        return mse_loss(outputs, targets)
    return cross_entropy(outputs, targets, label_smoothing=label_smoothing)


def correct(outputs: Tensor, targets: Tensor) -> Tensor:
    """How many rows have the right class; of values none has."""
    return targets.new_zeros(()) if targets.is_floating_point() else (outputs.argmax(dim=1) == targets).sum()


def figures(loss_sum: Tensor, right: Tensor, targets: Tensor) -> dict[str, float]:
    """Mean loss, and of a classifier accuracy, over all rows."""
    means = {"loss": loss_sum.item() / len(targets), "accuracy": right.item() / len(targets)}
    return {"loss": means["loss"]} if targets.is_floating_point() else means


@torch.no_grad()
def score(network: Predictor, inputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Mean loss, and of a classifier accuracy, over all rows, without label smoothing."""
    network.eval()
    outputs = torch.cat([network.outputs(rows) for rows in inputs.split(1000)])  # (rows, ...)
    return figures(loss_of(outputs, targets) * len(targets), correct(outputs, targets), targets)


def fit(model: str, inputs: np.ndarray, targets: np.ndarray, params: Params, live: Live | None = None) -> Predictor:
    """Train a fresh network on all rows but `validation_rows`; return it on the CPU, in evaluation mode.

    inputs: (rows, ...) as the contract describes them; targets: (rows,) class indices, or (rows, ...) values. Learning curves go to
    `live`.
    """
    torch.empty(KEEP_MEMORY, dtype=torch.uint8)  # freed at once: a third less CPU time in the loop, for want of page faults
    torch.manual_seed(params.seed)
    if params.threads:
        torch.set_num_threads(params.threads)
    device = choose_device(params.device)
    network = build(model, params.network).to(device)

    x, y = torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)
    if params.validation_rows >= len(x):
        raise PipelineError(f"validation_rows: {params.validation_rows} leaves none of {len(x)} rows to train on")
    held_out, rows = torch.randperm(len(x)).to(device).split([params.validation_rows, len(x) - params.validation_rows])
    validation_x, validation_y, x, y = x[held_out], y[held_out], x[rows], y[rows]
    network.adapt(x)
    network.solve(x, y)
    if not params.epochs:
        if live:
            log(live, 0, {"train": score(network, x, y)})
        return network.cpu().eval()

    optimizer = build_optimizer(network, params.optimizer)
    steps = params.epochs * math.ceil(len(x) / params.batch_size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(params.warmup, steps))
    progress = tqdm(range(params.epochs), desc=f"train {model} on {device.type}", unit="epoch", mininterval=0.5)
    for epoch in progress:
        network.train()
        loss_sum, right = torch.zeros(2, device=device)
        for batch in torch.randperm(len(x), device=device).split(params.batch_size):
            with torch.autocast(device.type, torch.bfloat16, enabled=params.precision == "bfloat16"):
                outputs = network.outputs(network.augment(x[batch])).float()  # (batch, ...)
            loss = loss_of(outputs, y[batch], params.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            loss_sum += loss.detach() * len(batch)
            right += correct(outputs, y[batch])

        if (epoch + 1) % math.ceil(params.epochs / CURVE_POINTS) == 0 or epoch + 1 == params.epochs:
            curves = {"train": figures(loss_sum, right, y)}
            if len(held_out):
                curves["validation"] = score(network, validation_x, validation_y)
            shown = {f"{part} {name}": f"{value:.4f}" for part, c in curves.items() for name, value in c.items()}
            progress.set_postfix(shown, refresh=False)
            if live:
                log(live, epoch + 1, curves)
    return network.cpu().eval()


def log(live: Live, epoch: int, curves: dict[str, dict[str, float]]) -> None:
    """Add one point to each learning curve."""
    live.step = epoch
    for part, values in curves.items():
        for name, value in values.items():
            live.log_metric(f"{part}/{name}", value)
    live.make_summary()


def train(model: str) -> None:
    """Stage: prepared rows -> checkpoint.pt (state_dict) and learning curves."""
    params = load_params(model, "train", Params)
    data = load_rows(model)
    with Live(str(folder(model) / "curves"), dvcyaml=False, save_dvc_exp=False) as live:
        network = fit(model, data["train_inputs"], data["train_targets"], params, live)
    torch.save(network.state_dict(), folder(model) / "checkpoint.pt")


if __name__ == "__main__":
    main(train)
