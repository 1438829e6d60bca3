"""Training in several processes: `torchrun --nproc-per-node N -m pipeline train MODEL`, with DistributedDataParallel.

Each process has all rows and the whole network, and takes its share of every batch; gradients are averaged over the processes.
Without torchrun there is one process, whose share is everything.
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


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Connect to the other processes of torchrun, if any: over NCCL with one GPU per process, otherwise over gloo.

    Raises PipelineError when there are more processes than GPUs.
    """
    if dist.is_torchelastic_launched():
        if device.type == "cuda":
            local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local_rank >= gpus:
                raise PipelineError(f"device: cuda needs a GPU per process; expected --nproc-per-node {gpus} at most")
            torch.cuda.set_device(local_rank)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def share(
    network: Predictor, rows: int, batch_size: int, seed: int
) -> tuple[Callable[[Tensor], Tensor], DistributedSampler[int], int]:
    """The part of this process in a training: the network's `outputs`, a sampler of its rows, and its rows per batch.

    Raises PipelineError when the processes cannot share a batch equally.
    """
    size = dist.get_world_size() if dist.is_initialized() else 1
    if batch_size % size:
        raise PipelineError(f"batch_size: expected a multiple of the {size} processes, got {batch_size}")
    sampler: DistributedSampler[int] = DistributedSampler(range(rows), num_replicas=size, rank=rank(), seed=seed)  # type: ignore[arg-type]
    if size == 1:
        return network.outputs, sampler, batch_size
    torch.manual_seed(seed + rank())  # each process augments differently
    return DistributedDataParallel(Outputs(network)), sampler, batch_size // size
