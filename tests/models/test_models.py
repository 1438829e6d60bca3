"""Every model's contract, network and data set agree; and what is particular to each."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import models
from pipeline.prepare import check
from pipeline.stage import load_params, prepared
from pipeline.train import Params, build
from tests.conftest import REPOSITORY, run


class Trainable:
    """A model's fresh network as params.yaml sets it, adapted to its training rows, or solved; and those rows."""

    def __init__(self, name: str) -> None:
        self.contract = models.load(name, "contract").CONTRACT
        with np.load(prepared(name)) as rows:
            self.rows = dict(rows)
        torch.manual_seed(0)
        self.network = build(name, load_params(name, "train", Params).network).eval()
        inputs, targets = (torch.from_numpy(self.rows[f"train_{part}"]) for part in ("inputs", "targets"))
        self.network.adapt(inputs)
        self.network.solve(inputs, targets)

    def answer(self, rows: np.ndarray) -> np.ndarray:
        """(batch, *shape) -> probabilities, (batch, classes)."""
        with torch.inference_mode():
            answers: np.ndarray = self.network(torch.from_numpy(rows)).numpy()
        return answers


@pytest.fixture
def trainable(request: pytest.FixtureRequest, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Trainable:
    """The model that the test names."""
    monkeypatch.chdir(workspace)
    return Trainable(request.param)


every_model = pytest.mark.parametrize("trainable", models.names(), indirect=True)


@every_model
def test_rows_are_as_the_contract_describes_them(trainable: Trainable) -> None:
    """Training and test rows fit the input tensor, and every label of the contract occurs in both."""
    contract = trainable.contract
    for part in ("train", "test"):
        inputs, targets = trainable.rows[f"{part}_inputs"], trainable.rows[f"{part}_targets"]
        check(inputs, contract.input)
        assert inputs.shape[0] == len(targets)
        assert targets.dtype == np.int64
        assert set(targets.tolist()) == set(range(len(contract.labels)))
    assert contract.output.shape == (len(contract.labels),)
    assert len(contract.input.features) in (1, *contract.input.shape[-1:])


@every_model
def test_network_answers_as_the_contract_describes_it(trainable: Trainable) -> None:
    """At any batch size a row gives one float32 distribution over the labels, the same in every company."""
    rows = np.resize(trainable.rows["test_inputs"], (1000, *trainable.contract.input.shape))
    together = trainable.answer(rows)
    for batch in (1, 2, 7, 1000):
        answers = trainable.answer(rows[:batch])
        assert answers.dtype == np.float32
        assert answers.shape == (batch, *trainable.contract.output.shape)
        np.testing.assert_allclose(answers.sum(axis=1), 1, rtol=0, atol=1e-6)
        np.testing.assert_allclose(answers, together[:batch], rtol=0, atol=1e-6)
    assert (together.min(axis=0) < together.max(axis=0)).all()


@pytest.mark.parametrize("trainable", ["mnist"], indirect=True)
def test_digits_are_varied_and_read_by_a_small_network(trainable: Trainable) -> None:
    """Each variation of a digit is another picture of the same size, in ink from 0 to 255; under 200,000 parameters read it."""
    digits = torch.from_numpy(trainable.rows["train_inputs"][:1].repeat(10, axis=0))
    varied = trainable.network.augment(digits).round()
    assert varied.shape == digits.shape
    assert len(varied.unique(dim=0)) == len(digits)
    assert 0 <= varied.min() < varied.max() <= 255
    assert sum(parameter.numel() for parameter in trainable.network.parameters()) < 200_000


@pytest.mark.parametrize("network", ["gaps", "tutorial"])
@pytest.mark.parametrize("trainable", ["diabetes"], indirect=True)
def test_a_measurement_not_taken_may_be_nan_or_an_impossible_zero(trainable: Trainable, network: str) -> None:
    """NaN and a zero that nobody alive has are one; they are the training median, and `gaps` knows more of them than that."""
    impossible = {"glucose_mg_per_dl", "blood_pressure_mm_hg", "skin_thickness_mm", "insulin_mu_u_per_ml", "bmi_kg_per_m2"}
    rows, train = trainable.rows["test_inputs"], trainable.rows["train_inputs"]
    torch.manual_seed(0)
    trainable.network = build("diabetes", network).eval()
    trainable.network.adapt(torch.from_numpy(train))
    for column, feature in enumerate(trainable.contract.input.features):
        taken = train[:, column][train[:, column] > 0] if feature.name in impossible else train[:, column]
        median = np.sort(taken)[(len(taken) - 1) // 2]
        nan, zero, middle = (trainable.answer(with_column(rows, column, value)) for value in (np.nan, 0, median))
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


def test_contracts_need_numpy_at_most() -> None:
    """All contracts load without torch or any other package but numpy."""
    code = (
        "import sys; before = set(sys.modules); import models; [models.load(name, 'contract') for name in models.names()];"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    assert set(run(sys.executable, "-c", code, cwd=REPOSITORY).stdout.split()) <= {"models", "numpy"}
