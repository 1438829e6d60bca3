"""The models, one folder each.

Every folder under `models/` that has a `contract.py` is a model; nothing else registers it. It also has `network.py` and
`dataset.py`, and after `dvc repro` the trained files `model.onnx`, `model.pt` and `card.json` and the folder `report`.
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent


class UnknownModelError(LookupError):
    """There is no model of that name."""


def names() -> list[str]:
    """Names of all models, sorted."""
    return sorted(path.parent.name for path in ROOT.glob("*/contract.py"))


def load(name: str, part: str) -> ModuleType:
    """Import `contract`, `network` or another module of a model. Raises UnknownModelError when there is no such model."""
    if name not in names():
        raise UnknownModelError(f"there is no model {name!r} in {ROOT}: expected one of {', '.join(names())}")
    return import_module(f"models.{name}.{part}")
