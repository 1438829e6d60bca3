"""Training is reproducible, and also works on a GPU."""

import json
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

import models
from pipeline.common import load_params, load_rows
from pipeline.metrics import measure
from pipeline.train import Params, fit
from tests.conftest import edit_params

pytestmark = pytest.mark.slow

every_model = pytest.mark.parametrize("name", models.names())


@every_model
def test_a_seed_fixes_the_training(scratch: Path, name: str) -> None:
    """Trained twice with one seed on a CPU, a network has the same weights; with another seed, others, unless they were solved."""
    rows, weights = load_rows(name), []
    for seed in (0, 0, 1):
        edit_params(scratch, **{f"{name}__train__device": "cpu", f"{name}__train__seed": seed})
        params = load_params(name, "train", Params)
        params = replace(params, epochs=min(params.epochs, 1))
        network = fit(name, rows.train_inputs[:256], rows.train_targets[:256], params)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in network.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2]) == (params.epochs == 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@every_model
def test_training_on_a_gpu_passes_the_gates(scratch: Path, name: str) -> None:
    """A network trained on CUDA comes back to the CPU and is as accurate as the one that the workspace trained."""
    edit_params(scratch, **{f"{name}__train__device": "cuda"})
    rows = load_rows(name)
    network = fit(name, rows.train_inputs, rows.train_targets, load_params(name, "train", Params))
    with torch.inference_mode():
        predictions = network(torch.from_numpy(rows.test_inputs)).numpy()
    accuracy = json.loads((scratch / "models" / name / "report" / "metrics.json").read_text())["accuracy"]
    assert measure(predictions, rows.test_targets)["accuracy"] == pytest.approx(accuracy, abs=0.05)
