"""One training in several processes: torchrun starts them, DistributedDataParallel averages their gradients.

Each process has all rows and the whole network, and takes its share of every batch. Rank 0 draws the order of the rows as a single
process would; a share counts by its rows, so that the gradients are those of the whole batch. Each rank has random numbers of its
own to augment with. Batch norm sees the share, not the batch; its running statistics are rank 0's, sent to the others in each step.
"""

import hashlib
import json
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.nn.parallel import DistributedDataParallel

from models.network import Outputs, Predictor
from pipeline.stage import PipelineError

PATIENCE = timedelta(seconds=30)  # with the others in any exchange: far above a step, even on a busy host, and short to wait for
ROLL_CALL = timedelta(seconds=5)  # in which those that are left tell each other so
AGAIN = "no checkpoint was written, start all processes again"


class Alone:
    """The only process: nothing is shared, and nothing of torch.distributed is used."""

    rank = 0

    def check(self, settings: bytes, *rows: np.ndarray) -> None:
        """Raise PipelineError when the processes do not all have these settings and rows."""

    def batches(self, rows: int, batch_size: int) -> int:
        """How many batches an epoch has. Raises PipelineError when one has fewer rows than there are processes."""
        return math.ceil(rows / batch_size)

    def wrap(self, network: Predictor) -> Callable[[Tensor], Tensor]:
        """The network's `outputs`, whose gradients become the mean of all ranks; the weights are made rank 0's."""
        return network.outputs

    def agree(self, order: Tensor) -> Tensor:
        """Rank 0's tensor."""
        return order

    def share(self, batch: Tensor) -> tuple[Tensor, float]:
        """The part of a batch that is this process's, and what the mean over it counts in the mean of all ranks."""
        return batch, 1.0

    def sums(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Each scalar, added up over the ranks."""
        return values


ALONE = Alone()


@dataclass(frozen=True, kw_only=True)
class Group(Alone):
    """One of several processes; all of them make the same calls in the same order."""

    rank: int
    size: int
    hosts: tuple[str, ...]  # names, by rank

    def check(self, settings: bytes, *rows: np.ndarray) -> None:
        """Compare digests."""
        digest = hashlib.sha256(settings)
        for array in rows:
            digest.update(np.ascontiguousarray(array).data)
        digests: list[str] = [""] * self.size
        dist.all_gather_object(digests, digest.hexdigest())
        if len(set(digests)) > 1:
            raise PipelineError(
                "params.yaml or the prepared rows differ between the hosts; give all the same, and run `prepare` there"
            )

    def batches(self, rows: int, batch_size: int) -> int:
        """How many batches an epoch has; the last may be the smallest."""
        smallest = rows % batch_size or batch_size
        if smallest < self.size:
            raise PipelineError(
                f"batch_size: {batch_size} leaves a batch of {smallest} of {rows} rows for {self.size} processes; "
                f"choose one that leaves at least {self.size}"
            )
        return super().batches(rows, batch_size)

    def wrap(self, network: Predictor) -> Callable[[Tensor], Tensor]:
        """The network in DistributedDataParallel. From here on each rank has its own seed; rank 0 goes on as one process would."""
        if self.rank:
            generator = torch.Generator().manual_seed(torch.initial_seed())
            torch.manual_seed(int(torch.randint(2**62, (self.size,), generator=generator)[self.rank]))
        return DistributedDataParallel(Outputs(network))

    def agree(self, order: Tensor) -> Tensor:
        """Broadcast in place."""
        dist.broadcast(order, 0)
        return order

    def share(self, batch: Tensor) -> tuple[Tensor, float]:
        """A slice of the batch; one row longer for the first ranks when it cannot be divided."""
        part = batch.tensor_split(self.size)[self.rank]
        return part, len(part) * self.size / len(batch)

    def sums(self, *values: Tensor) -> tuple[Tensor, ...]:
        """One exchange for all of them."""
        total = torch.stack(values)
        dist.all_reduce(total)
        return total.unbind()


def launched() -> bool:
    """Whether this process is one that torchrun, or `launch`, has started."""
    return dist.is_torchelastic_launched()


def launch(processes: int, module: str, *arguments: str) -> None:
    """Run `python -m module arguments` in this host's part of so many processes, as torchrun does, and wait for them.

    All are on this host unless torchrun's environment variables (PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR...) name others.
    Raises PipelineError when the processes cannot start or do not all succeed.
    """
    options = run.parse_args(["--module", module, *arguments])
    hosts = run.parse_min_max_nnodes(options.nnodes)[1]
    if processes % hosts:
        raise PipelineError(f"processes: {processes} cannot be divided among {hosts} hosts; use a multiple of {hosts}")
    options.nproc_per_node = str(processes // hosts)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() * hosts // processes)))
    if "TORCH_CPP_LOG_LEVEL" not in os.environ:
        os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"  # read when torch is loaded, so too late for this process,
        if hosts > 1:  # which would tell much while it waits for the other hosts
            os.execv(sys.executable, sys.orig_argv)  # noqa: S606  the same command again
    logging.disable(logging.ERROR)  # of torchrun, whose account of a failure becomes one sentence here
    with TemporaryDirectory() as options.log_dir:
        try:
            run.run(options)
        except ChildFailedError as error:
            raise PipelineError(cause(error.failures)) from None
        except SignalException as error:
            raise PipelineError(f"stopped by {error.sigval.name}: {AGAIN}") from None
        except dist.DistError as error:
            raise PipelineError(f"the {hosts} hosts did not find each other: {error}; look at PET_MASTER_ADDR on each") from error


def cause(failures: Mapping[int, ProcessFailure]) -> str:
    """Why the processes of this host have failed: what came first, before what others told of it, or that they were stopped."""
    rank, failure = min(
        failures.items(), key=lambda pair: (pair[1].exitcode == -signal.SIGTERM, pair[1].timestamp, pair[1].exitcode > 0)
    )
    if Path(failure.error_file).exists():
        return str(failure.message)
    how = f"was ended by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with exit code {failure.exitcode}, see above"
    return f"rank {rank} {how}: {AGAIN}"


@contextmanager
def joined(processes: int, device: torch.device) -> Iterator[Group]:
    """The place of this process among those that train one network, as torchrun has given it.

    On a GPU, the one of its local rank, NCCL carries the exchanges; otherwise gloo does. When training cannot go on, the process
    ends, and leaves the sentence about it to whoever has started it.
    """
    try:
        group = join(processes, device)
        try:
            yield group
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                raise PipelineError(f"no answer from {missing(group)}: {AGAIN}") from error
            raise
        dist.destroy_process_group()
    except PipelineError as error:
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": str(error), "timestamp": int(time.time())}))
        raise SystemExit(1) from None


def join(processes: int, device: torch.device) -> Group:
    """Meet the others. Raises PipelineError when they are not so many, do not come, or outnumber the GPUs."""
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if size != processes:
        raise PipelineError(f"processes: torchrun has started {size}, but params.yaml says {processes}; make them the same")
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise PipelineError(f"processes: torch sees {torch.cuda.device_count()} GPUs here, and each needs one; use fewer")
        torch.cuda.set_device(local)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever has started the processes tells of it
    host, hosts = socket.gethostname(), [""] * size
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        dist.all_gather_object(hosts, host)
    except RuntimeError as error:
        raise PipelineError(
            f"rank {rank} on {host} does not reach the others ({error}); where a host's name is not its address, "
            "set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to its network interface"
        ) from error
    return Group(rank=rank, size=size, hosts=tuple(hosts))


def missing(group: Group) -> str:
    """Which of the others no longer answer, in words; the roll is called in torchrun's store, on the host of rank 0."""
    lost = [rank for rank, host in enumerate(group.hosts) if host == group.hosts[0] and rank != group.rank]
    with suppress(dist.DistError):
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=ROLL_CALL)  # type: ignore[attr-defined]  # public all the same
        store.set(f"here/{group.rank}", "")
        everyone = [f"here/{rank}" for rank in range(group.size)]
        with suppress(dist.DistStoreError):
            store.wait(everyone, ROLL_CALL)
        lost = [rank for rank, key in enumerate(everyone) if not store.check([key])]
    return ", ".join(f"rank {rank} on {group.hosts[rank]}" for rank in lost) or "one of the others in time"
