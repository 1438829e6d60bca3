"""The models in a folder: which are trained, which are loaded, and reloading when their files change."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sized
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

from tercet.card import SIGNATURE, Card, Rows, decode_card, find_models, is_trained, read_card_file
from tercet.errors import InvalidInputError, ModelNotFoundError, ModelRefusedError, ModelUnavailableError, StartupError
from tercet.server.batcher import Batcher
from tercet.server.config import Config
from tercet.server.engine import BatchLimits, Engine, calibrate_batch_size, load_engine
from tercet.server.telemetry import ModelTelemetry, Telemetry

log = logging.getLogger(__name__)

FILES = ("card.json", SIGNATURE, "model.onnx", "model.pt")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A loaded model: its card, engine and queue."""

    card: Card
    engine: Engine
    batcher: Batcher
    telemetry: ModelTelemetry
    max_request_rows: int

    async def infer(self, rows: Rows, field: str) -> Rows:
        """Check `rows`, (n, *input shape), against the contract and return the model's output, (n, *output shape).

        `field` is the rows' field in the request, with `{row}` and `{feature}`. Raises InvalidInputError and what Batcher.infer
        raises.
        """
        started = perf_counter()
        try:
            self.check_row_count(rows, field.partition("[{row}]")[0])
            self.card.input.check(rows, field)
            output = await self.batcher.infer(rows)
        except BaseException:
            self.telemetry.request_failed(perf_counter() - started)
            raise
        self.telemetry.request_succeeded(perf_counter() - started)
        return output

    def check_row_count(self, rows: Sized, field: str) -> None:
        """Raise InvalidInputError when there are no rows, or too many for one request."""
        if not 1 <= len(rows) <= self.max_request_rows:
            raise InvalidInputError(field, f"expected 1 to {self.max_request_rows} rows, got {len(rows)}")


class LoadedModel(NamedTuple):
    """A version of a model that has been verified and warmed up."""

    card: Card
    engine: Engine
    limits: BatchLimits


Trace = Callable[[float, float, float], None]  # see Batcher
Fingerprint = tuple[tuple[int, int, int], ...]  # of each file: modification time, size, inode


@dataclass
class _FolderState:
    """What the repository knows of a model's folder."""

    attempted: Fingerprint = ()  # the files that were last loaded or refused
    last_seen: Fingerprint = ()
    reason: str = "not trained: run `dvc repro`"  # why it is not served, or why its newest files are not
    unloaded: bool = False  # by request: ignore its files until it is loaded again


class Repository:
    """The models in a folder, by name. Use it from one event loop."""

    def __init__(self, config: Config, telemetry: Telemetry, trace: Trace | None = None) -> None:
        """Load every trained model. Raises StartupError when there is none, or one is damaged."""
        self._config, self._telemetry, self._trace = config, telemetry, trace
        self._models: dict[str, Model] = {}
        self._folders = {name: _FolderState() for name in find_models(config.models)}
        self._load_lock = asyncio.Lock()  # one load at a time: it needs the CPU
        for name in self.all_names():
            if is_trained(config.models / name):
                self._folders[name].attempted = fingerprint(config.models / name)
                self._serve(name, load_model(config.models / name, config))
            else:
                log.warning("%s is not trained and not served; run `dvc repro` to train it", name)
        if not self._models:
            raise StartupError(f"no trained model in {config.models}: run `dvc repro`, or pass another folder with --models")

    def all_names(self) -> list[str]:
        """Names of all models in the folder, loaded or not."""
        return sorted(self._folders)

    def loaded_names(self) -> list[str]:
        """Names of the models that are served."""
        return sorted(self._models)

    @property
    def ready(self) -> bool:
        """Whether every model is loaded, except those unloaded by request."""
        return all(name in self._models or folder.unloaded for name, folder in self._folders.items())

    def engines(self) -> dict[str, str]:
        """The engine of each loaded model, for example `onnxruntime 1.31.1 on cpu`."""
        return {name: f"{self._models[name].engine.name} on {self._models[name].engine.device}" for name in self.loaded_names()}

    def reason(self, name: str) -> str:
        """Why a model, or its newest files, are not served; empty when they are."""
        return self._folders[name].reason

    def get(self, name: str, version: str = "") -> Model:
        """The loaded model of this name; an empty version means the one that is served.

        Raises ModelNotFoundError when the name or version is unknown, ModelUnavailableError when the model is not loaded.
        """
        model = self._models.get(name)
        if model is None:
            if name not in self._folders:
                raise self._not_found(name)
            raise ModelUnavailableError(f"model {name!r} is not served: {self.reason(name)}")
        if version not in ("", model.card.version):
            raise ModelNotFoundError(f"model {name!r} has no version {version!r}; version {model.card.version!r} is served")
        return model

    async def load(self, name: str) -> None:
        """Verify the files in a model's folder and serve them from the next batch on; until then the previous version is served.

        Raises ModelNotFoundError, and ModelRefusedError when the files do not pass.
        """
        folder = self._config.models / name
        if name not in self._folders and name not in self._names_on_disk():
            raise self._not_found(name)
        state = self._folders.setdefault(name, _FolderState())
        async with self._load_lock:
            state.attempted, state.unloaded = fingerprint(folder), False
            try:
                loaded = await asyncio.to_thread(load_model, folder, self._config)
                self._serve(name, loaded)
            except StartupError as error:
                state.reason = str(error)
                self._telemetry.model_reloaded(name, "refused")
                previous = "; the previous version is still served" if name in self._models else ""
                log.error("%s: refused: %s%s", name, error, previous)  # noqa: TRY400  the operator needs no traceback
                raise ModelRefusedError(f"model {name!r} was refused: {error}{previous}") from error
        self._telemetry.model_reloaded(name, "served")
        log.info("%s: serving the version trained at commit %s", name, loaded.card.git_commit[:12])

    async def unload(self, name: str) -> None:
        """Stop serving a model, once its waiting requests are answered. Raises ModelNotFoundError."""
        if name not in self._folders:
            raise self._not_found(name)
        async with self._load_lock:
            self._folders[name].unloaded, self._folders[name].reason = True, "unloaded by request; load it to serve it again"
            model = self._models.pop(name, None)
        if model:
            log.info("%s: unloaded", name)
            await model.batcher.drain()
            await model.batcher.close()

    async def reload_changed(self, *, wait_until_stable: bool = True) -> None:
        """Reload the models whose files have changed; by default only once they have been stable since the previous call.

        Models whose files are missing or refused are logged.
        """
        for name in sorted({*self._names_on_disk(), *self._models}):
            folder, state = self._config.models / name, self._folders.setdefault(name, _FolderState())
            current = fingerprint(folder)
            stable, state.last_seen = current == state.last_seen, current
            wanted = name in self._models or (is_trained(folder) and not state.unloaded)
            if wanted and current != state.attempted and (stable or not wait_until_stable):
                with contextlib.suppress(ModelRefusedError):
                    await self.load(name)

    async def close(self) -> None:
        """Close all queues."""
        await asyncio.gather(*(model.batcher.close() for model in self._models.values()))

    def _names_on_disk(self) -> list[str]:
        """The models in the folder; none while the folder itself is missing."""
        with contextlib.suppress(StartupError):
            return find_models(self._config.models)
        return []

    def _not_found(self, name: str) -> ModelNotFoundError:
        return ModelNotFoundError(f"there is no model {name!r}; the models are {', '.join(self.all_names())}")

    def _serve(self, name: str, loaded: LoadedModel) -> None:
        """Serve a version from now on. Raises StartupError when its tensors or labels differ from those that are served."""
        card, engine, limits = loaded
        config, current = self._config, self._models.get(name)
        if current and _interface(current.card) != _interface(card):
            raise StartupError(
                f"its tensors or labels differ from those that are served: expected {_interface(current.card)}, "
                f"got {_interface(card)}; unload the model first, or restart the service"
            )
        if current:
            telemetry, batcher = current.telemetry, current.batcher
            batcher.replace_engine(engine.run, max_batch_rows=limits.max_batch_rows, inline_rows=limits.inline_rows)
        else:
            telemetry = self._telemetry.model(name)
            batcher = Batcher(
                engine.run,
                max_batch_rows=limits.max_batch_rows,
                max_queue_rows=config.max_queue_rows,
                queue_timeout=config.queue_timeout,
                max_delay=config.max_delay,
                inline_rows=limits.inline_rows,
                recorder=telemetry,
                trace=self._trace,
            )
        self._models[name] = Model(
            card=card, engine=engine, batcher=batcher, telemetry=telemetry, max_request_rows=config.max_request_rows
        )
        self._folders[name].reason = ""


def _interface(card: Card) -> tuple[object, ...]:
    """What clients rely on: names, datatypes and shapes of the tensors, and the labels."""
    return (*((tensor.name, tensor.datatype, tensor.shape) for tensor in (card.input, card.output)), card.labels)


def fingerprint(folder: Path) -> Fingerprint:
    """A value that changes when one of a model's files is replaced, written to or removed."""
    stats = []
    for name in FILES:
        with contextlib.suppress(OSError):
            stats.append((folder / name).stat())
    return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)


def load_model(folder: Path, config: Config) -> LoadedModel:
    """Load, verify and warm up one trained model.

    Raises StartupError when a file is missing, damaged or not signed as required, the card belongs to another model, or the model
    does not return the outputs in its card.
    """
    try:
        return _load_model(folder, config)
    except StartupError:
        raise
    except Exception as error:  # damaged files make numpy and the file system raise exceptions of any kind
        raise StartupError(f"{folder} cannot be loaded: {error}") from error


def _load_model(folder: Path, config: Config) -> LoadedModel:
    content = read_card_file(folder)
    if config.require_signed:
        from tercet.server.security import check_signature  # noqa: PLC0415  only this needs cryptography

        check_signature(content, folder, config.require_signed)
    card = decode_card(content, folder)
    if card.name != folder.name:
        raise StartupError(f"{folder / 'card.json'} is the card of {card.name!r}: rename the folder to match")
    card.input.check(card.example_rows(), "examples[{row}].{feature}")
    engine = load_engine(folder, card, config)
    return LoadedModel(card, engine, calibrate_batch_size(engine, card.example_rows(), config.max_batch_rows))
