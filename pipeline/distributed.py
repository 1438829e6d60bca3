"""Training in several processes: `torchrun --nproc-per-node N -m pipeline.train MODEL`, with DistributedDataParallel.

Each process has all rows and the whole network, and takes its share of every batch; gradients are averaged over the processes.
Started without torchrun there is one process, and every function here returns what a single process needs.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from models.network import Outputs, Predictor
from pipeline.common import PipelineError

COLLECTIVE_TIMEOUT = timedelta(seconds=60)  # after which a process gives up on the others


def size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Connect to the other processes that torchrun has started, if any: over NCCL with one GPU per process, else over gloo.

    Raises PipelineError when there are more processes than GPUs.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    if device.type == "cuda":
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= gpus:
            raise PipelineError(f"device: cuda needs one GPU per process, and torch sees {gpus}; use --nproc-per-node {gpus}")
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)
    yield
    dist.destroy_process_group()


def share(rows: int, batch_size: int, seed: int) -> tuple[DistributedSampler[int], int]:
    """The sampler of this process's rows, in random order, and how many of them it takes per batch of all processes.

    Raises PipelineError when the batches cannot be divided evenly.
    """
    if batch_size % size():
        raise PipelineError(f"batch_size: expected a multiple of the {size()} processes, got {batch_size}")
    sampler: DistributedSampler[int] = DistributedSampler(range(rows), num_replicas=size(), rank=rank(), seed=seed)  # type: ignore[arg-type]  # it only takes the length
    return sampler, batch_size // size()


def parallel(network: Predictor) -> Callable[[Tensor], Tensor]:
    """The network's `outputs`; with several processes their gradients are averaged, and each process augments differently."""
    if size() == 1:
        return network.outputs
    torch.manual_seed(torch.initial_seed() + rank())
    return DistributedDataParallel(Outputs(network))
