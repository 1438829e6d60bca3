"""The models in a folder: which are trained, which are loaded, and reloading when their files change."""

import asyncio
import contextlib
import logging
from collections.abc import Sized
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from tercet.card import SIGNATURE, Card, Fingerprint, Rows, find_models, fingerprint, is_trained, read_card
from tercet.errors import InvalidInputError, ModelNotFoundError, ModelRefusedError, ModelUnavailableError, StartupError
from tercet.server.batcher import Batcher, Trace
from tercet.server.config import Config
from tercet.server.engine import Engine, load_engine
from tercet.server.telemetry import ModelTelemetry, Telemetry

log = logging.getLogger(__name__)

FILES = ("card.json", SIGNATURE, "model.onnx", "model.pt")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A loaded model: its card, its queue with the engine, and the settings of the service."""

    card: Card
    batcher: Batcher
    telemetry: ModelTelemetry
    config: Config

    async def infer(self, rows: Rows, field: str) -> Rows:
        """Check `rows`, (n, *input shape), and return the model's output, (n, *output shape).

        `field` is their field in the request, with `{row}` and `{feature}`. Raises InvalidInputError and what Batcher.infer raises.
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
        if not 1 <= len(rows) <= self.config.max_request_rows:
            raise InvalidInputError(field, f"expected 1 to {self.config.max_request_rows} rows, got {len(rows)}")


@dataclass
class _Folder:
    """What the repository knows of a model's folder."""

    path: Path
    model: Model | None = None  # while it is served
    attempted: Fingerprint = ()  # the files that were last loaded or refused
    last_seen: Fingerprint = ()
    reason: str = "not trained: run `dvc repro`"  # why it is not served, or why its newest files are not
    unloaded: bool = False  # by request: ignore its files until it is loaded again

    def fingerprint(self) -> Fingerprint:
        return fingerprint(self.path / name for name in FILES)


class Repository:
    """The models in a folder, by name. Use it from one event loop."""

    def __init__(self, config: Config, telemetry: Telemetry, trace: Trace | None = None) -> None:
        """Load every trained model; `trace` is the batchers'. Raises StartupError when there is none, or one is damaged."""
        self._config, self._telemetry, self._trace = config, telemetry, trace
        self._folders = {name: _Folder(config.models / name) for name in find_models(config.models)}
        self._load_lock = asyncio.Lock()  # one load at a time: it needs the CPU
        for name, folder in self._folders.items():
            if is_trained(folder.path):
                folder.attempted = folder.fingerprint()
                self._serve(folder, *load_model(folder.path, config))
            else:
                log.warning("%s is not trained and not served; run `dvc repro` to train it", name)
        if not self.loaded_names():
            raise StartupError(f"no trained model in {config.models}: run `dvc repro`, or pass another folder with --models")

    def all_names(self) -> list[str]:
        """Names of all models in the folder, loaded or not."""
        return sorted(self._folders)

    def loaded_names(self) -> list[str]:
        """Names of the models that are served."""
        return [name for name in self.all_names() if self._folders[name].model]

    @property
    def ready(self) -> bool:
        """Whether every model is loaded, except those unloaded by request."""
        return all(folder.model or folder.unloaded for folder in self._folders.values())

    def engines(self) -> dict[str, str]:
        """The engine of each loaded model, for example `onnxruntime 1.31.1 on cpu`."""
        engines = {name: self.get(name).batcher.engine for name in self.loaded_names()}
        return {name: f"{engine.name} on {engine.device}" for name, engine in engines.items()}

    def reason(self, name: str) -> str:
        """Why a model, or its newest files, are not served; empty when they are."""
        return self._folders[name].reason

    def get(self, name: str, version: str = "") -> Model:
        """The loaded model of this name, and version unless that is empty. Raises ModelNotFoundError, ModelUnavailableError."""
        folder = self._folder(name)
        if folder.model is None:
            raise ModelUnavailableError(f"model {name!r} is not served: {folder.reason}")
        right = folder.model.card.version
        if version not in ("", right):
            raise ModelNotFoundError(f"model {name!r} has no version {version!r}; version {right!r} is served")
        return folder.model

    def _folder(self, name: str) -> _Folder:
        try:
            return self._folders[name]
        except KeyError:
            raise ModelNotFoundError(f"there is no model {name!r}; the models are {', '.join(self.all_names())}") from None

    async def load(self, name: str) -> None:
        """Verify a model's files and serve them from the next batch on. Raises ModelNotFoundError, ModelRefusedError."""
        self._add_new_folders()
        folder = self._folder(name)
        async with self._load_lock:
            folder.attempted, folder.unloaded = folder.fingerprint(), False
            try:
                card, engine = await asyncio.to_thread(load_model, folder.path, self._config)
                self._serve(folder, card, engine)
            except StartupError as error:
                folder.reason = str(error)
                self._telemetry.model_reloaded(name, "refused")
                previous = "; the previous version is still served" if folder.model else ""
                log.error("%s: refused: %s%s", name, error, previous)  # noqa: TRY400  the operator needs no traceback
                raise ModelRefusedError(f"model {name!r} was refused: {error}{previous}") from error
        self._telemetry.model_reloaded(name, "served")
        log.info("%s: serving the version trained at commit %s", name, card.git_commit[:12])

    async def unload(self, name: str) -> None:
        """Stop serving a model, once its waiting requests are answered. Raises ModelNotFoundError."""
        folder = self._folder(name)
        async with self._load_lock:
            folder.unloaded, folder.reason = True, "unloaded by request; load it to serve it again"
            model, folder.model = folder.model, None
        if model:
            log.info("%s: unloaded", name)
            await model.batcher.drain()
            await model.batcher.close()

    async def reload_changed(self, *, wait_until_stable: bool = True) -> None:
        """Reload the models whose files have changed; by default only once they have been stable since the previous call."""
        self._add_new_folders()
        for name, folder in sorted(self._folders.items()):
            current = folder.fingerprint()
            stable, folder.last_seen = current == folder.last_seen, current
            wanted = folder.model or (is_trained(folder.path) and not folder.unloaded)
            if wanted and current != folder.attempted and (stable or not wait_until_stable):
                with contextlib.suppress(ModelRefusedError):
                    await self.load(name)

    async def close(self) -> None:
        """Close all queues."""
        await asyncio.gather(*(folder.model.batcher.close() for folder in self._folders.values() if folder.model))

    def _add_new_folders(self) -> None:
        with contextlib.suppress(StartupError):  # the folder of all models may be missing for a while
            for name in find_models(self._config.models):
                self._folders.setdefault(name, _Folder(self._config.models / name))

    def _serve(self, folder: _Folder, card: Card, engine: Engine) -> None:
        """Serve a version from now on. Raises StartupError when its tensors or labels differ from those that are served."""
        if folder.model is None:
            telemetry = self._telemetry.model(card.name)
            batcher = Batcher(engine, self._config, telemetry, self._trace)
            folder.model = Model(card=card, batcher=batcher, telemetry=telemetry, config=self._config)
        else:
            served, new = _interface(folder.model.card), _interface(card)
            if served != new:
                text = f"its tensors or labels differ from those that are served: expected {served}, got {new}"
                raise StartupError(f"{text}; unload the model first, or restart the service")
            folder.model.batcher.engine = engine
            folder.model = replace(folder.model, card=card)
        folder.reason = ""


def _interface(card: Card) -> tuple[object, ...]:
    """What clients rely on: names, datatypes and shapes of the tensors, and the labels."""
    return (*((tensor.name, tensor.datatype, tensor.shape) for tensor in (card.input, card.output)), card.labels)


def load_model(folder: Path, config: Config) -> tuple[Card, Engine]:
    """Load and verify a trained model. Raises StartupError when a file is missing, damaged or not signed as required."""

    def verify(content: bytes) -> None:
        if config.require_signed:
            from tercet.server.security import check_signature  # noqa: PLC0415  only this needs cryptography

            check_signature(content, folder, config.require_signed)

    try:
        card = read_card(folder, verify)
        if card.name != folder.name:
            raise StartupError(f"{folder / 'card.json'} is the card of {card.name!r}: rename the folder to match")  # noqa: TRY301
        card.input.check(card.example_rows(), "examples[{row}].{feature}")
        return card, load_engine(folder, card, config)
    except StartupError:
        raise
    except Exception as error:  # damaged files make numpy and the file system raise exceptions of any kind
        raise StartupError(f"{folder} cannot be loaded: {error}") from error
