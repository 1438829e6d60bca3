"""The exported files agree with each other and with the card."""

import hashlib
import json
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tercet.card import read_card

import models
from pipeline.common import Paths, load_params, load_rows
from pipeline.evaluate import TOLERANCE, run_onnxruntime
from pipeline.export import Params, add_metadata, to_onnx
from pipeline.train import load_network, predict
from tests.conftest import run

pytestmark = pytest.mark.slow

every_model = pytest.mark.parametrize("name", models.names())


@every_model
def test_both_files_give_the_predictions_of_the_card(trained: Path, name: str) -> None:
    """model.pt and model.onnx have the checksums in the card, and give the predictions that it shows for its examples."""
    card = read_card(trained / "models" / name)
    expected = [example.output for example in card.examples]
    rows = card.example_rows()
    for file, predictions in (("model.pt", predict(load_network(name), rows)), ("model.onnx", run_onnxruntime(name, rows))):
        assert hashlib.sha256((trained / "models" / name / file).read_bytes()).hexdigest() == card.files[file]
        np.testing.assert_allclose(predictions, expected, rtol=0, atol=TOLERANCE)
    assert {example.target for example in card.examples} == set(card.labels)


def test_the_card_has_cross_validation_use_and_warning(trained: Path) -> None:
    """The diabetes card has them, `tercet models diabetes` prints them, and other cards have no cross-validation."""
    card = read_card(trained / "models" / "diabetes")
    report = json.loads((Paths("diabetes").training / "cross_validation.json").read_text())
    assert {"rows", "chosen_by", "auc", "log_loss", "brier", "accuracy", "ece"} <= set(card.cross_validation)
    assert card.cross_validation["auc"] == report["models"]["served"]["auc"]
    assert "not for medical decisions" in card.intended_use
    output = run("tercet", "models", "diabetes", cwd=trained, COLUMNS="200").stdout
    assert card.warning in output
    assert card.intended_use in output
    assert read_card(trained / "models" / "mnist").cross_validation == {}


@every_model
def test_the_onnx_file_stands_alone(trained: Path, name: str) -> None:
    """It loads without any other file, accepts any batch size, and is the same, byte for byte, when exported again."""
    content = (trained / "models" / name / "model.onnx").read_bytes()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    contract, rows = models.load(name, "contract").CONTRACT, load_rows(name).test_inputs
    for batch in (1, 2, 7, 1000):
        inputs = {contract.input.name: np.resize(rows, (batch, *contract.input.shape))}
        assert session.run([contract.output.name], inputs)[0].shape == (batch, *contract.output.shape)

    opset = load_params(name, "export", Params).opset
    again = to_onnx(load_network(name), contract, torch.from_numpy(rows[:2]), opset)
    card = msgspec.json.decode((trained / "models" / name / "card.json").read_bytes())
    add_metadata(again, card)
    assert again.SerializeToString(deterministic=True) == content
    metadata = {entry.key: entry.value for entry in onnx.load_from_string(content).metadata_props}
    assert metadata["git_commit"] == card["git_commit"]
    assert metadata["data_sha256"] == hashlib.sha256(Paths(name).prepared.read_bytes()).hexdigest()
    assert json.loads(metadata["labels"]) == list(contract.labels)
    assert json.loads(metadata["units"]) == {feature.name: feature.unit for feature in contract.input.features}
    assert json.loads(metadata["metrics"]) == card["metrics"]
