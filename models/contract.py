"""What a contract is made of: plain frozen values that `export` writes into card.json, where the service reads them."""

from dataclasses import dataclass

DATATYPES = {"UINT8": "uint8", "INT64": "int64", "FP32": "float32"}  # Open Inference Protocol name -> numpy dtype


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One measurement: its name, its unit and the closed range in which a value is accepted."""

    name: str
    unit: str
    minimum: float
    maximum: float


@dataclass(frozen=True, kw_only=True)
class Input:
    """The input tensor. `shape` is that of one row; the tensor has a batch axis before it.

    `features` holds one entry for each column of the last axis, or a single one that goes for every element.
    With `missing`, NaN is accepted and means "not measured".
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    features: tuple[Feature, ...]
    missing: bool = False


@dataclass(frozen=True, kw_only=True)
class Output:
    """The output tensor. `shape` is that of one row; the tensor has a batch axis before it."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What goes into a model, what comes out, and what the columns of the answer are called: classes, or values.

    `intended_use` and `warning` are sentences for those who use the answers; empty where the description says all.
    """

    description: str
    input: Input
    output: Output
    labels: tuple[str, ...]
    intended_use: str = ""
    warning: str = ""
