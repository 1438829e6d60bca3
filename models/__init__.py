"""The models: one folder each, and the folder is the registry.

A folder under `models/` that holds a `contract.py` is a model. Beside it lie `network.py` and `dataset.py`, and, once `dvc repro`
has run, the trained files `model.onnx`, `model.pt` and `card.json`. Adding a model means adding a folder; nothing is registered.
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent


class UnknownModelError(LookupError):
    """No folder of that name holds a contract.py."""


def names() -> list[str]:
    """Names of all models, sorted."""
    return sorted(path.parent.name for path in ROOT.glob("*/contract.py"))


def load(name: str, part: str) -> ModuleType:
    """Import `contract`, `network` or `dataset` of one model.

    Raises UnknownModelError when there is no such model.
    """
    if name not in names():
        raise UnknownModelError(f"there is no model {name!r} in {ROOT}: known are {', '.join(names())}")
    return import_module(f"models.{name}.{part}")
