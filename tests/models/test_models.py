"""The contract, network and data set of every model agree."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import models
from pipeline.common import load_params, load_rows
from pipeline.prepare import check
from pipeline.train import Params, build
from tests.conftest import REPOSITORY, run


class Trainable:
    """A model's fresh network as params.yaml sets it, adapted to its training rows, or solved; and those rows."""

    def __init__(self, name: str) -> None:
        self.contract = models.load(name, "contract").CONTRACT
        self.rows = load_rows(name)
        torch.manual_seed(0)
        self.network = build(name, load_params(name, "train", Params).network).eval()
        inputs, targets = torch.from_numpy(self.rows.train_inputs), torch.from_numpy(self.rows.train_targets)
        self.network.adapt(inputs)
        self.network.solve(inputs, targets)

    def predict(self, rows: np.ndarray) -> np.ndarray:
        """(batch, *shape) -> probabilities, (batch, classes)."""
        with torch.inference_mode():
            probabilities: np.ndarray = self.network(torch.from_numpy(rows)).numpy()
        return probabilities


@pytest.fixture
def trainable(request: pytest.FixtureRequest, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Trainable:
    """The model that the test names."""
    monkeypatch.chdir(workspace)
    return Trainable(request.param)


every_model = pytest.mark.parametrize("trainable", models.names(), indirect=True)


@pytest.mark.slow
@every_model
def test_rows_are_as_the_contract_describes_them(trainable: Trainable) -> None:
    """Training and test rows fit the input tensor, and every label of the contract occurs in both."""
    contract = trainable.contract
    rows = trainable.rows
    for inputs, targets in ((rows.train_inputs, rows.train_targets), (rows.test_inputs, rows.test_targets)):
        check(inputs, contract.input)
        assert inputs.shape[0] == len(targets)
        assert targets.dtype == np.int64
        assert set(targets.tolist()) == set(range(len(contract.labels)))
    assert contract.output.shape == (len(contract.labels),)
    assert len(contract.input.features) in (1, *contract.input.shape[-1:])


@pytest.mark.slow
@every_model
def test_networks_predict_what_the_contract_describes(trainable: Trainable) -> None:
    """At any batch size a row has one float32 distribution over the labels, whatever the other rows are."""
    rows = np.resize(trainable.rows.test_inputs, (1000, *trainable.contract.input.shape))
    together = trainable.predict(rows)
    for batch in (1, 2, 7, 1000):
        predictions = trainable.predict(rows[:batch])
        assert predictions.dtype == np.float32
        assert predictions.shape == (batch, *trainable.contract.output.shape)
        np.testing.assert_allclose(predictions.sum(axis=1), 1, rtol=0, atol=1e-6)
        np.testing.assert_allclose(predictions, together[:batch], rtol=0, atol=1e-6)
    assert (together.min(axis=0) < together.max(axis=0)).all()


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["mnist"], indirect=True)
def test_digits_are_varied_and_read_by_a_small_network(trainable: Trainable) -> None:
    """Each variation of a digit is another picture of the same size, in ink from 0 to 255; under 200,000 parameters read it."""
    digits = torch.from_numpy(trainable.rows.train_inputs[:1].repeat(10, axis=0))
    varied = trainable.network.augment(digits).round()
    assert varied.shape == digits.shape
    assert len(varied.unique(dim=0)) == len(digits)
    assert 0 <= varied.min() < varied.max() <= 255
    assert sum(parameter.numel() for parameter in trainable.network.parameters()) < 200_000


@pytest.mark.slow
@pytest.mark.parametrize("network", ["missing_indicators", "tutorial"])
@pytest.mark.parametrize("trainable", ["diabetes"], indirect=True)
def test_a_measurement_not_taken_may_be_nan_or_an_impossible_zero(trainable: Trainable, network: str) -> None:
    """NaN and an impossible zero are both missing: the training median, which `missing_indicators` tells from a measured one."""
    impossible = {"glucose_mg_per_dl", "blood_pressure_mm_hg", "skin_thickness_mm", "insulin_mu_u_per_ml", "bmi_kg_per_m2"}
    rows, train = trainable.rows.test_inputs, trainable.rows.train_inputs
    torch.manual_seed(0)
    trainable.network = build("diabetes", network).eval()
    trainable.network.adapt(torch.from_numpy(train))
    for column, feature in enumerate(trainable.contract.input.features):
        taken = train[:, column][np.greater(train[:, column], 0)] if feature.name in impossible else train[:, column]
        median = np.sort(taken)[(len(taken) - 1) // 2]
        nan, zero, middle = (trainable.predict(with_column(rows, column, value)) for value in (np.nan, 0, median))
        assert np.array_equal(nan, middle) == (network == "tutorial" or feature.name not in impossible), feature.name
        assert np.array_equal(nan, zero) == (feature.name in impossible), feature.name


def with_column(rows: np.ndarray, column: int, value: float) -> np.ndarray:
    """A copy of (batch, columns) with one column set."""
    copy = rows.copy()
    copy[:, column] = value
    return copy


def test_fizzbuzz_is_trained_on_the_rule_and_tested_on_other_numbers(tmp_path: Path) -> None:
    """1 to 100 are for the test, 101 to 1023 for training, and each has the label that the game gives it."""
    labels = models.load("fizzbuzz", "contract").CONTRACT.labels
    data = models.load("fizzbuzz", "dataset").load(tmp_path)
    assert data.test_inputs.tolist() == list(range(1, 101))
    assert data.train_inputs.tolist() == list(range(101, 1024))
    for numbers, targets in ((data.train_inputs, data.train_targets), (data.test_inputs, data.test_targets)):
        words = ["fizz" * (number % 3 == 0) + "buzz" * (number % 5 == 0) or "number" for number in numbers.tolist()]
        assert [labels[target] for target in targets] == words


def test_contracts_do_not_need_torch() -> None:
    """All contracts load with the packages that a client needs."""
    code = (
        "import sys; before = set(sys.modules); import models; [models.load(name, 'contract') for name in models.names()];"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    assert not {"torch", "sklearn", "onnxruntime", "pipeline"} & set(run(sys.executable, "-c", code, cwd=REPOSITORY).stdout.split())
