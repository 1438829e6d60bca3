"""The parts of a contract. `export` copies a model's contract into its card.json, from which the service reads it."""

from tercet.card import Contract, Feature, Input
from tercet.card import Tensor as Output

__all__ = ["Contract", "Feature", "Input", "Output"]
