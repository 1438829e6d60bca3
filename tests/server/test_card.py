"""The model card: what it accepts, and finding trained models."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import StatusCode
from tercet.card import Card, Feature, Input, find_models, is_trained, read_card
from tercet.client import Client
from tercet.errors import InvalidInputError, StartupError
from tercet.proto.inference_pb2_grpc import GRPCInferenceServiceStub

import models
from tests.conftest import Service
from tests.server.support import fields, infer_request, refused


def features(count: int) -> tuple[Feature, ...]:
    """Features that accept 0 to 9."""
    return tuple(Feature(name=f"f{i}", unit="mm", minimum=0, maximum=9) for i in range(count))


def input_tensor(datatype: Any = "FP32", count: int = 2, *, missing: bool = False) -> Input:
    """An input of two columns."""
    return Input(name="x", datatype=datatype, shape=(2,), features=features(count), missing=missing)


@pytest.mark.parametrize(
    ("rows", "field", "text"),
    [
        ([[0, 9], [3, 10]], "rows[1].f1", "f1 must be 0 to 9 mm; got 10"),
        ([[-0.5, 0]], "rows[0].f0", "f0 must be 0 to 9 mm; got -0.5"),
        ([[0, np.nan]], "rows[0].f1", "got nan"),
        ([[0, np.inf]], "rows[0].f1", "got inf"),
    ],
)
def test_ranges(rows: list[list[float]], field: str, text: str) -> None:
    """The first value outside its feature's range is named, with the range."""
    input_tensor().check(np.array([[0, 9]], np.float32), "rows[{row}].{feature}")
    with pytest.raises(InvalidInputError, match=re.escape(text)) as caught:
        input_tensor().check(np.array(rows, np.float32), "rows[{row}].{feature}")
    assert caught.value.field == field


def test_missing_values() -> None:
    """NaN is accepted only where values may be missing, and the message says so."""
    input_tensor(missing=True).check(np.array([[0, np.nan]], np.float32), "rows")
    with pytest.raises(InvalidInputError, match=r"0 to 9 mm, or NaN \(not measured\); got 10"):
        input_tensor(missing=True).check(np.array([[10, np.nan]], np.float32), "rows")


@pytest.mark.parametrize("count", [0, 3])
def test_features_fit_the_shape(count: int) -> None:
    """There is one feature per column, or one for all."""
    input_tensor(count=1)
    with pytest.raises(ValueError, match=f"{count} features for a row of shape"):
        input_tensor(count=count)


def test_an_empty_range_is_an_error() -> None:
    """A minimum greater than the maximum accepts nothing."""
    with pytest.raises(ValueError, match="minimum 2 is greater than maximum 1"):
        Feature(name="f", unit="", minimum=2, maximum=1)


def test_find_models(tmp_path: Path) -> None:
    """A folder with a contract or a card is a model; only one with a card is trained."""
    for name, file in (("b", "contract.py"), ("a", "card.json"), ("c", "notes.txt")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    assert find_models(tmp_path) == ["a", "b"]
    assert [is_trained(tmp_path / name) for name in ("a", "b")] == [True, False]
    with pytest.raises(StartupError, match="is not a folder"):
        find_models(tmp_path / "nowhere")


def test_missing_and_damaged_cards(tmp_path: Path) -> None:
    """A missing card says how to train; a damaged one is named."""
    with pytest.raises(StartupError, match=r"card.json is missing: run `dvc repro`"):
        read_card(tmp_path)
    (tmp_path / "card.json").write_text("{}")
    with pytest.raises(StartupError, match=r"card.json is not a model card"):
        read_card(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", models.names())
def test_values_outside_the_domain(channel: grpc.Channel, workspace: Path, name: str) -> None:
    """A value outside its feature's range is refused over the wire, with the row, the feature and the range."""
    card = read_card(workspace / "models" / name)
    checked = card.input.dtype.kind in "iu" and all(
        (feature.minimum, feature.maximum) == (np.iinfo(card.input.dtype).min, np.iinfo(card.input.dtype).max)
        for feature in card.input.features
    )  # then there is no such value
    for column, feature in enumerate(card.input.features):
        for value in (feature.minimum - 1, feature.maximum + 1):
            if card.input.dtype.kind in "iu" and not np.iinfo(card.input.dtype).min <= value <= np.iinfo(card.input.dtype).max:
                continue
            rows = np.array(card.example_rows())
            rows.reshape(len(rows), -1)[1, column] = value
            error = refused(partial(GRPCInferenceServiceStub(channel).ModelInfer, infer_request(card, rows)))
            assert (error.code(), fields(error)) == (StatusCode.INVALID_ARGUMENT, [f"inputs[0][1].{feature.name}"])
            assert f"{feature.minimum:g} to {feature.maximum:g}" in error.details()
            checked = True
    assert checked


@pytest.mark.slow
@pytest.mark.parametrize("name", models.names())
def test_the_ends_of_every_range_are_accepted(default_service: Service, cards: dict[str, Card], name: str) -> None:
    """A value exactly at a feature's minimum or maximum is answered, with probabilities that sum to one."""
    card = cards[name]
    ends = [[feature.minimum for feature in card.input.features], [feature.maximum for feature in card.input.features]]
    rows = np.stack([np.broadcast_to(np.squeeze(end), card.input.shape) for end in ends])
    with Client(default_service.address) as client:
        np.testing.assert_allclose(client.infer(name, rows).sum(axis=1), 1, rtol=0, atol=1e-5)
