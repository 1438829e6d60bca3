"""The stage `prove` writes a proof, or fails with a counterexample."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import models
from models.fizzbuzz_any.dataset import EDGES
from pipeline.common import PipelineError
from pipeline.prove import prove
from tests.conftest import edit_params

pytestmark = pytest.mark.slow

NAME = "fizzbuzz_any"


@pytest.fixture
def served(scratch: Path) -> Path:
    """The folder of the trained model; `prove` tries a thousand numbers."""
    edit_params(scratch, fizzbuzz_any__prove__samples=1000)
    return scratch / "models" / NAME


def change(folder: Path, name: str, edit: Callable[[np.ndarray], None], *files: str) -> None:
    """Edit the weights of that name, in model.pt and model.onnx or one of them."""
    tensors = torch.load(folder / "model.pt", weights_only=True)
    before = [part.tobytes() for part in (tensors[name].numpy() if name == "operators" else [tensors[name].numpy()])]
    edit(tensors[name].numpy())
    if "model.pt" in files:
        torch.save(tensors, folder / "model.pt")
    graph = onnx.load(folder / "model.onnx")
    for tensor in graph.graph.initializer:
        if (old := numpy_helper.to_array(tensor)).tobytes() in before:
            changed = tensors[name].numpy() if name != "operators" else tensors[name].numpy()[before.index(old.tobytes())]
            tensor.raw_data = changed.tobytes()
    if "model.onnx" in files:
        onnx.save(graph, folder / "model.onnx")


def perturb(array: np.ndarray) -> None:
    """Change one number."""
    array[0, 0] += 0.5


def swap(scores: np.ndarray) -> None:
    """Say fizz for buzz and buzz for fizz."""
    scores[:, [1, 2]] = scores[:, [2, 1]]


def test_prove_writes_what_it_has_proved(served: Path) -> None:
    """The stage's file says so, with the bound, what is allowed, and the numbers that were tried."""
    (served / "report" / "proof.json").unlink()
    prove(NAME)
    proof = json.loads((served / "report" / "proof.json").read_text())
    assert proof["proved_all_integers"] is True
    assert (proof["states"], proof["errors"], proof["numbers_tried"]) == (15, 0, 1000 + len(EDGES))
    assert proof["score_error_bound"] < proof["score_error_allowed"]


@pytest.mark.parametrize(("name", "edit"), [("operators", lambda array: perturb(array[0])), ("scores", swap)])
def test_prove_names_a_counterexample(served: Path, name: str, edit: Callable[[np.ndarray], None]) -> None:
    """A net with one changed weight, or fizz for buzz, is refused with a number that it answers wrongly; no proof is left."""
    change(served, name, edit, "model.pt", "model.onnx")
    with pytest.raises(PipelineError, match=r"not proved: \d+ of 1016 numbers have a wrong answer, first -?\d+"):
        prove(NAME)
    assert not (served / "report" / "proof.json").exists()


@pytest.mark.parametrize("file", ["model.pt", "model.onnx"])
def test_prove_wants_one_set_of_weights(served: Path, file: str) -> None:
    """When the two files hold different weights, neither is proved by the other."""
    change(served, "operators", lambda array: perturb(array[0]), file)
    with pytest.raises(PipelineError, match=r"model\.onnx does not have the weights of model\.pt"):
        prove(NAME)


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("name", [name for name in models.names() if name != NAME])
def test_other_models_have_no_proof(name: str) -> None:
    """A model without a section `prove` is refused in a sentence."""
    with pytest.raises(PipelineError, match=f"the entry models.{name}.prove is missing"):
        prove(name)
