"""The models of a folder: which are there, which are loaded, and what stands between a request and its engine."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sized
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

from tercet.card import SIGNATURE, Card, Rows, read_card
from tercet.errors import (
    InvalidInputError,
    ModelNotFoundError,
    ModelRefusedError,
    ModelUnavailableError,
    ShuttingDownError,
    StartupError,
)
from tercet.server.batcher import Batcher
from tercet.server.config import Config
from tercet.server.engine import Engine, Pace, load_engine, measure
from tercet.server.metrics import Metrics
from tercet.server.statistics import Statistics

log = logging.getLogger(__name__)

FILES = ("card.json", SIGNATURE, "model.onnx", "model.pt")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A loaded model: its card, its engine and its queue."""

    card: Card
    engine: Engine
    batcher: Batcher
    statistics: Statistics
    max_request_rows: int

    async def infer(self, rows: Rows, where: str) -> Rows:
        """Check `rows`, (n, *input shape), against the contract and answer with (n, *output shape).

        `where` names the field that they came from, with `{row}` and `{feature}`. Raises InvalidInputError and all that
        Batcher.infer raises.
        """
        started = perf_counter()
        ended = self.statistics.fail
        try:
            self.admit(rows, where.partition("[{row}]")[0])
            self.card.input.check(rows, where)
            answers = await self.batcher.infer(rows)
            ended = self.statistics.success
        finally:
            ended.add(perf_counter() - started)
        return answers

    def admit(self, rows: Sized, where: str) -> None:
        """Raise InvalidInputError when a request, whose field `where` holds these rows, has none or too many."""
        if not 1 <= len(rows) <= self.max_request_rows:
            raise InvalidInputError(where, f"{len(rows)} rows; a request has 1 to {self.max_request_rows}")


class Loaded(NamedTuple):
    """A version of a model that has been verified and warmed up."""

    card: Card
    engine: Engine
    pace: Pace


Trace = Callable[[float, float, float], None]  # see Batcher
Signature = tuple[tuple[int, int, int], ...]  # of each file: time of change, size, inode


@dataclass
class _Folder:
    """What the repository knows of one model's folder."""

    tried: Signature = ()  # the files that were last loaded or refused
    seen: Signature = ()  # the files at the latest look
    reason: str = "not trained: run `dvc repro`"  # why it is not served, or why its newest files are not
    unloaded: bool = False  # by request; its files are not watched until it is loaded again


class Repository:
    """The models in a folder, by name. Use it from one event loop."""

    def __init__(self, config: Config, metrics: Metrics, trace: Trace | None = None) -> None:
        """Load every trained model. Raises StartupError when none is trained, or one is damaged."""
        self.config, self.metrics, self._trace = config, metrics, trace
        self.came, self.closing = 0, False  # calls, and whether new ones are refused
        self._models: dict[str, Model] = {}
        self._folders = {name: _Folder() for name in find(self.config.models)}
        self._loading = asyncio.Lock()  # one at a time: it is work for the CPU
        for name in self.known:
            if is_trained(self.config.models / name):
                self._folders[name].tried = signature(self.config.models / name)
                self._serve(name, load(self.config.models / name, self.config))
            else:
                log.warning("%s: not trained, not served; run `dvc repro` to train it", name)
        if not self._models:
            raise StartupError(f"no trained model in {self.config.models}: run `dvc repro`, or name another folder with --models")

    def admit(self) -> None:
        """A call has come. Raises ShuttingDownError when it comes too late."""
        self.came += 1
        if self.closing:
            raise ShuttingDownError("the service is shutting down: ask another one")

    @property
    def known(self) -> list[str]:
        """Names of all models in the folder, loaded or not."""
        return sorted(self._folders)

    def names(self) -> list[str]:
        """Names of the models that are loaded."""
        return sorted(self._models)

    @property
    def ready(self) -> bool:
        """Whether every model is loaded, save those that were unloaded by request."""
        return all(name in self._models or folder.unloaded for name, folder in self._folders.items())

    def engines(self) -> dict[str, str]:
        """What runs each model that is loaded, as in `onnxruntime 1.31.1 on cpu`."""
        return {name: f"{self._models[name].engine.name} on {self._models[name].engine.device}" for name in self.names()}

    def reason(self, name: str) -> str:
        """Why a model is not served, or why its newest files are not; empty when all is well."""
        return self._folders[name].reason

    def get(self, name: str, version: str = "") -> Model:
        """The loaded model of that name; an empty version is the one served.

        Raises ModelNotFoundError when it or the version is unknown, ModelUnavailableError when it is not loaded.
        """
        model = self._models.get(name)
        if model is None:
            if name not in self._folders:
                raise ModelNotFoundError(f"there is no model {name!r}; known are {', '.join(self.known)}")
            raise ModelUnavailableError(f"model {name!r} is known, but not served: {self.reason(name)}")
        if version not in ("", model.card.version):
            raise ModelNotFoundError(f"model {name!r} has no version {version!r}; version {model.card.version!r} is served")
        return model

    async def load(self, name: str) -> None:
        """Verify what now lies in a model's folder, and let it take over between two batches; until then the old one answers.

        Raises ModelNotFoundError, and ModelRefusedError when the files are not fit to be served.
        """
        folder = self.config.models / name
        if name not in self._folders and name not in self._present():
            raise ModelNotFoundError(f"there is no model {name!r} in the folder; known are {', '.join(self.known)}")
        known = self._folders.setdefault(name, _Folder())
        async with self._loading:
            known.tried, known.unloaded = signature(folder), False
            try:
                loaded = await asyncio.to_thread(load, folder, self.config)
                self._serve(name, loaded)
            except StartupError as error:
                known.reason = str(error)
                self.metrics.reloaded(name, "refused")
                before = "; the version before goes on" if name in self._models else ""
                log.error("%s: refused: %s%s", name, error, before)  # noqa: TRY400  a sentence, not a traceback
                raise ModelRefusedError(f"model {name!r} is refused: {error}{before}") from error
        self.metrics.reloaded(name, "served")
        log.info("%s: serving what commit %s has trained", name, loaded.card.git_commit[:12])

    async def unload(self, name: str) -> None:
        """Serve a model no more; requests that have come are answered. Raises ModelNotFoundError."""
        if name not in self._folders:
            raise ModelNotFoundError(f"there is no model {name!r}; known are {', '.join(self.known)}")
        async with self._loading:
            self._folders[name].unloaded, self._folders[name].reason = True, "unloaded by request; load it to serve it again"
            model = self._models.pop(name, None)
        if model:
            log.info("%s: unloaded", name)
            await model.batcher.drain()
            await model.batcher.close()

    async def follow(self, *, at_once: bool = False) -> None:
        """Load every model whose files have changed and then, unless `at_once`, stayed as they are since the last look.

        What is not fit to be served, or is there no more, is in the log.
        """
        for name in sorted({*self._present(), *self._models}):
            known, now = self._folders.setdefault(name, _Folder()), signature(self.config.models / name)
            settled, known.seen = now == known.seen or at_once, now
            wanted = name in self._models or (is_trained(self.config.models / name) and not known.unloaded)
            if settled and now != known.tried and wanted:
                with contextlib.suppress(ModelRefusedError):
                    await self.load(name)

    def _present(self) -> list[str]:
        """The names in the folder; none while the folder itself is away."""
        with contextlib.suppress(StartupError):
            return find(self.config.models)
        return []

    async def close(self) -> None:
        """End all queues."""
        await asyncio.gather(*(model.batcher.close() for model in self._models.values()))

    def _serve(self, name: str, loaded: Loaded) -> None:
        """Let a version take over. Raises StartupError when its tensors or labels are not those that callers know."""
        card, engine, pace = loaded
        config, before = self.config, self._models.get(name)
        if before and tensors(before.card) != tensors(card):
            raise StartupError(
                f"its tensors or labels are not those that are served: {tensors(card)} instead of {tensors(before.card)}; "
                "unload the model first, or start the service anew"
            )
        if before:
            statistics, batcher = before.statistics, before.batcher
            batcher.take_over(engine.run, max_batch_rows=pace.batch_rows, inline_rows=pace.inline_rows)
        else:
            statistics = Statistics(self.metrics.observer(name))
            batcher = Batcher(
                engine.run,
                max_batch_rows=pace.batch_rows,
                max_queue_rows=config.max_queue_rows,
                queue_timeout=config.queue_timeout,
                max_delay=config.max_delay,
                inline_rows=pace.inline_rows,
                observer=statistics,
                trace=self._trace,
            )
        self._models[name] = Model(
            card=card, engine=engine, batcher=batcher, statistics=statistics, max_request_rows=config.max_request_rows
        )
        self._folders[name].reason = ""


def tensors(card: Card) -> tuple[object, ...]:
    """What callers rely on: names, datatypes and shapes of the tensors, and the labels."""
    tensor = [(part.name, part.datatype, part.shape) for part in (card.input, card.output)]
    return (*tensor, card.labels)


def find(folder: Path) -> list[str]:
    """Names of the models in a folder, trained or not. Raises StartupError when it is no folder, or not to be read."""
    if not folder.is_dir():
        raise StartupError(f"{folder} is no folder: name the one with the trained models with --models")
    try:
        return sorted(
            path.name for path in folder.iterdir() if any((path / part).is_file() for part in ("contract.py", "card.json"))
        )
    except OSError as error:
        raise StartupError(f"{folder} cannot be read: {error}") from error


def is_trained(folder: Path) -> bool:
    """Whether the pipeline has written a card into a model's folder."""
    return (folder / "card.json").is_file()


def signature(folder: Path) -> Signature:
    """Changes when one of a model's files is replaced, written to or removed."""
    stats = []
    for name in FILES:
        with contextlib.suppress(OSError):
            stats.append((folder / name).stat())
    return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)


def load(folder: Path, config: Config) -> Loaded:
    """Load, verify and warm up one trained model.

    Raises StartupError when a file is missing or damaged, the card is another model's, or the model does not give its answers.
    """
    try:
        return _load(folder, config)
    except StartupError:
        raise
    except Exception as error:  # whatever the files make numpy or the file system raise, what is served goes on
        raise StartupError(f"{folder} cannot be loaded: {error}") from error


def _load(folder: Path, config: Config) -> Loaded:
    """As `load`, but raise whatever comes."""
    card = read_card(folder, config.require_signed)
    if card.name != folder.name:
        raise StartupError(f"{folder / 'card.json'} is the card of {card.name!r}: name the folder so")
    card.input.check(card.example_rows(), "examples[{row}].{feature}")
    engine = load_engine(folder, card, config)
    return Loaded(card, engine, measure(engine, card.example_rows(), config.max_batch_rows))
