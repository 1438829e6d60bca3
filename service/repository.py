"""The models of a folder: which are there, which are loaded, and what stands between a request and its engine."""

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path

from service.batcher import Batcher
from service.card import Card, Rows, read_card
from service.config import Config
from service.engine import Engine, load_engine, measure
from service.errors import InvalidInputError, ModelNotFoundError, ModelUnavailableError, StartupError
from service.metrics import Metrics, Observer

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A loaded model: its card, its engine and its queue."""

    card: Card
    engine: Engine
    batcher: Batcher
    max_request_rows: int

    async def infer(self, rows: Rows, where: str) -> Rows:
        """Check `rows`, (n, *input shape), against the contract and answer with (n, *output shape).

        `where` names the field that they came from, with `{row}` and `{feature}`. Raises InvalidInputError and all that
        Batcher.infer raises.
        """
        self.admit(rows, where)
        self.card.input.check(rows, where)
        return await self.batcher.infer(rows)

    def admit(self, rows: Rows, where: str) -> None:
        """Raise InvalidInputError when a request of these rows has none or too many; `where` as for `infer`."""
        if not 1 <= len(rows) <= self.max_request_rows:
            raise InvalidInputError(where.partition("[{row}]")[0], f"{len(rows)} rows; a request has 1 to {self.max_request_rows}")


class Repository:
    """The models in a folder, by name."""

    def __init__(self, config: Config, metrics: Metrics) -> None:
        """Load every trained model. Raises StartupError when none is trained, or one is damaged."""
        self.known = find(config.models)
        self.metrics = metrics
        trained = [name for name in self.known if is_trained(config.models / name)]
        self._models = {name: load(config.models / name, config, metrics.observer(name)) for name in trained}
        if not self._models:
            raise StartupError(f"no trained model in {config.models}: run `dvc repro`, or name another folder with --models")
        for name in self.known:
            if name not in self._models:
                log.warning("%s: not trained, not served; run `dvc repro` to train it", name)

    def names(self) -> list[str]:
        """Names of the models that are loaded."""
        return list(self._models)

    def get(self, name: str, version: str = "") -> Model:
        """The loaded model of that name; an empty version is the one served.

        Raises ModelNotFoundError when it or the version is unknown, ModelUnavailableError when it is not trained.
        """
        if name not in self.known:
            raise ModelNotFoundError(f"there is no model {name!r}; known are {', '.join(self.known)}")
        if name not in self._models:
            raise ModelUnavailableError(f"model {name!r} is known, but not trained: run `dvc repro` and start the service again")
        model = self._models[name]
        if version not in ("", model.card.version):
            raise ModelNotFoundError(f"model {name!r} has no version {version!r}; version {model.card.version!r} is served")
        return model

    async def close(self) -> None:
        """End all queues."""
        await asyncio.gather(*(model.batcher.close() for model in self._models.values()))


def find(folder: Path) -> list[str]:
    """Names of the models in a folder, trained or not. Raises StartupError when it is no folder."""
    if not folder.is_dir():
        raise StartupError(f"{folder} is no folder: name the one with the trained models with --models")
    return sorted(path.name for path in folder.iterdir() if any((path / part).is_file() for part in ("contract.py", "card.json")))


def is_trained(folder: Path) -> bool:
    """Whether the pipeline has written a card into a model's folder."""
    return (folder / "card.json").is_file()


def load(folder: Path, config: Config, observer: Observer | None) -> Model:
    """Load one trained model. Raises StartupError when a file is missing or damaged, or the card is another model's."""
    card = read_card(folder)
    if card.name != folder.name:
        raise StartupError(f"{folder / 'card.json'} is the card of {card.name!r}: name the folder so")
    engine = load_engine(folder, card, config)
    pace = measure(engine, card.example_rows(), config.max_batch_rows)
    batcher = Batcher(
        engine.run,
        max_batch_rows=pace.batch_rows,
        max_queue_rows=config.max_queue_rows,
        queue_timeout=config.queue_timeout,
        max_delay=config.max_delay,
        inline_rows=pace.inline_rows,
        observer=observer,
    )
    return Model(card=card, engine=engine, batcher=batcher, max_request_rows=config.max_request_rows)
