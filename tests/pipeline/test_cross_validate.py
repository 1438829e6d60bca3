"""Cross-validation predicts no row with a model that has seen it, and detects leakage in the data."""

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from joblib import parallel_config
from msgspec.structs import replace
from scipy.stats import ttest_1samp

from models.network import Predictor
from pipeline.baselines import BASELINES
from pipeline.common import Paths, PipelineError, load_params, load_rows
from pipeline.cross_validate import build_task, cross_validate, interval, settings
from pipeline.folds import SERVED, Params, choose, cross_validate_once, fit_many
from pipeline.prepare import prepare
from pipeline.train import Params as TrainParams
from pipeline.train import fit
from tests.conftest import REPOSITORY, edit_params

pytestmark = pytest.mark.slow

SMALL = {"repeats": 2, "folds": 3, "inner_folds": 2, "gates": {}}
CHOICES = [{"optimizer": {"weight_decay": 1.0}}, {}]  # one is absurd, the other is what `train` says
MODELS = {SERVED, "tutorial", "logistic", "splines", "boosting"}


@pytest.fixture
def one_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the slow baselines."""
    monkeypatch.setattr("pipeline.folds.BASELINES", {"logistic": BASELINES["logistic"]})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with prepared rows and settings for a short cross-validation in this process."""
    shutil.copyfile(REPOSITORY / "params.yaml", tmp_path / "params.yaml")
    (tmp_path / "models" / "diabetes").mkdir(parents=True)
    change(tmp_path, **SMALL, choices=CHOICES)
    edit_params(tmp_path, diabetes__train__epochs=60)
    monkeypatch.chdir(tmp_path)
    prepare("diabetes")
    with parallel_config(backend="sequential"):
        yield tmp_path


def change(folder: Path, **entries: object) -> None:
    """Set entries of the section cross_validate."""
    edit_params(folder, **{f"diabetes__cross_validate__{name}": value for name, value in entries.items()})


def all_rows() -> tuple[np.ndarray, np.ndarray]:
    """Inputs, (768, 8), and targets, (768,)."""
    data = load_rows("diabetes")
    inputs = np.concatenate([data.train_inputs, data.test_inputs])
    return inputs, np.concatenate([data.train_targets, data.test_targets])


def result(folder: Path) -> Any:
    """The report of the stage."""
    return json.loads((folder / "models/diabetes/report/training/cross_validation.json").read_text())


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("network", ["missing_indicators", "tutorial"])
def test_networks_trained_at_once_are_as_trained_alone(network: str) -> None:
    """Two networks trained at once predict as the networks that `fit` returns for the same rows and seeds."""
    inputs, targets = all_rows()
    params = settings("diabetes", {"network": network})
    training = np.arange(len(targets)) % 3 != np.arange(2)[:, None]
    together = fit_many("diabetes", inputs, targets, training, params)
    for seed, (rows, predictions) in enumerate(zip(training, together, strict=True)):
        alone = fit("diabetes", inputs[rows], targets[rows], replace(params, seed=seed))
        np.testing.assert_allclose(predictions, predict(alone, inputs), rtol=0, atol=1e-4)
    assert np.abs(together[0] - together[1]).max() > 0.01


def predict(network: Predictor, inputs: np.ndarray) -> np.ndarray:
    """Probabilities, (rows, classes)."""
    with torch.inference_mode():
        probabilities: np.ndarray = network(torch.from_numpy(inputs)).numpy()
    return probabilities


@pytest.mark.usefixtures("folder")
def test_no_model_sees_what_it_is_judged_on() -> None:
    """If rows of a fold swap places within their class, their predictions swap places and do not change, for every model."""
    inputs, targets = all_rows()
    task = build_task("diabetes", load_params("diabetes", "cross_validate", Params), load_rows("diabetes"))
    candidates = [settings("diabetes", changes) for changes in CHOICES]
    networks = {SERVED: candidates, "tutorial": [settings("diabetes", task.params.baselines["tutorial"])]}
    before = cross_validate_once(task, networks, 0)
    first, moved = before.folds[0], np.arange(len(targets))
    for label in (0, 1):
        rows = first[targets[first] == label]
        moved[rows] = np.roll(rows, 1)
    after = cross_validate_once(task._replace(inputs=inputs[moved]), networks, 0)
    assert set(before.predictions) == MODELS
    for name, predictions in before.predictions.items():
        np.testing.assert_allclose(after.predictions[name][first], predictions[moved][first], rtol=0, atol=1e-6, err_msg=name)
        assert np.abs(after.predictions[name] - predictions)[first].max() > 0.1


@pytest.mark.usefixtures("folder")
def test_a_choice_depends_on_its_part_alone() -> None:
    """Noise in the other rows does not change the choice; noise in the part itself does."""
    _, targets = all_rows()
    task = build_task("diabetes", load_params("diabetes", "cross_validate", Params), load_rows("diabetes"))
    candidates = [settings("diabetes", changes) for changes in CHOICES]
    part, rest = np.arange(400), np.arange(400, 768)
    noise = targets.copy()
    noise[rest] = np.random.default_rng(0).permutation(targets[rest])
    assert choose(task, candidates, [part, rest]) == [1, 1]
    assert choose(task._replace(targets=noise), candidates, [part, rest]) == [1, 0]


def test_the_interval_is_wider_than_that_of_independent_folds() -> None:
    """Of 10 x 10 folds it is sqrt(1 + 100 / 9) times as wide as Student's, around the same mean."""
    differences = np.random.default_rng(0).normal(0.01, 0.02, (10, 10))
    student = ttest_1samp(differences.ravel(), 0).confidence_interval(0.95)
    corrected = interval(differences)
    assert corrected["mean"] == pytest.approx(differences.mean())
    assert corrected["high"] + corrected["low"] == pytest.approx(2 * corrected["mean"])
    assert corrected["high"] - corrected["low"] == pytest.approx(np.sqrt(1 + 100 / 9) * (student.high - student.low))


@pytest.mark.usefixtures("one_baseline")
def test_the_report_has_every_model_and_comes_out_the_same(folder: Path) -> None:
    """Each model has mean and spread of each metric, and the interval of its difference; a second run writes the same bytes."""
    files = [Paths("diabetes").training / file for file in ("cross_validation.json", "calibration.csv")]
    cross_validate("diabetes")
    before = [file.read_bytes() for file in files]
    cross_validate("diabetes")
    assert [file.read_bytes() for file in files] == before

    report = result(folder)
    assert (report["rows"], report["chosen_by"], report["times_chosen"]) == (768, "inner cross-validation", {"0": 0, "1": 6})
    assert set(report["models"]) == {SERVED, "tutorial", "logistic"}
    for metrics in report["models"].values():
        assert set(metrics) == {"auc", "log_loss", "brier", "accuracy", "ece", "debiased_ece", "ece_if_calibrated"}
        assert 0.78 < metrics["auc"]["mean"] < 0.87
        assert 0.65 < metrics["accuracy"]["mean"] < 0.82
        assert 0 < metrics["auc"]["std"] < metrics["auc"]["fold_std"] < 0.1
    for name, differences in report["difference_from"].items():
        for metric, difference in differences.items():
            expected = report["models"][SERVED][metric]["mean"] - report["models"][name][metric]["mean"]
            assert difference["mean"] == pytest.approx(expected)
            assert difference["low"] < difference["mean"] < difference["high"]
    with files[1].open() as file:
        bins = list(csv.DictReader(file))
    assert sum(int(row["rows"]) for row in bins) == 2 * 768
    assert [float(row["predicted"]) for row in bins] == sorted(float(row["predicted"]) for row in bins)


def impute_by_class() -> None:
    """A common mistake: replace missing values by the median of the row's class, before the split."""
    data = load_rows("diabetes")
    inputs, targets = all_rows()
    for column in range(1, 6):
        for label in (0, 1):
            rows = targets == label
            missing = rows & (inputs[:, column] == 0)
            inputs[missing, column] = np.median(inputs[rows & ~missing, column])
    train, test = np.split(inputs, [len(data.train_targets)])
    np.savez(Paths("diabetes").prepared, **data._replace(train_inputs=train, test_inputs=test)._asdict())


def test_leakage_is_detected(folder: Path) -> None:
    """Imputed by class, the data give an AUC around .95, as in many notebooks; the stage fails and says why."""
    change(folder, repeats=1)
    impute_by_class()
    with pytest.raises(
        PipelineError, match=r"suspected leakage: the AUC of 'boosting' is 0\.9\d\d, and above 0\.870 is not plausible"
    ):
        cross_validate("diabetes")
    aucs = {name: metrics["auc"]["mean"] for name, metrics in result(folder)["models"].items()}
    assert 0.93 < aucs["boosting"] < 0.97
    assert aucs[SERVED] > 0.87


@pytest.mark.usefixtures("one_baseline")
@pytest.mark.parametrize(
    ("gates", "sentence"),
    [
        ({"at_least": {"models.served.auc.mean": 0.99}}, r"missed: models.served.auc.mean is 0.8\d\d\d, expected at least 0.9900"),
        ({"at_most": {"models.served.ece.mean": 0}}, r"missed: models.served.ece.mean is 0.\d\d\d\d, expected at most 0.0000"),
        ({"at_most": {"models.served.loss": 0}}, "gate 'models.served.loss' is not a metric"),
    ],
)
def test_a_missed_gate_is_named(folder: Path, gates: dict[str, dict[str, float]], sentence: str) -> None:
    """A gate is a lower or an upper bound; the sentence says which metric missed which bound."""
    change(folder, repeats=1, choices=[{}], gates=gates)
    with pytest.raises(PipelineError, match=sentence):
        cross_validate("diabetes")


@pytest.mark.usefixtures("one_baseline")
@pytest.mark.parametrize(
    ("entry", "value", "sentence"),
    [
        ("cross_validate__folds", 300, "cross_validate.folds: expected 2 to 268, got 300"),
        ("cross_validate__folds", 1, r"cross_validate: Expected `int` >= 2 - at `\$.folds`"),
        ("cross_validate__inner_folds", 250, "cross_validate.inner_folds: expected 2 to 178, got 250"),
        ("cross_validate__repeat", 1, "unknown field `repeat`"),
        ("cross_validate__choices", [{"epoch": 1}], r"train with {'epoch': 1} is not valid: .*`epoch`"),
        ("cross_validate__baselines", {"mlp": {"network": "mlp"}}, "expected missing_indicators or tutorial, got 'mlp'"),
        ("train__batch_size", 64, "expected batch_size >= 768"),
    ],
)
def test_a_wrong_parameter_is_named(folder: Path, entry: str, value: object, sentence: str) -> None:
    """Invalid settings stop the stage with a sentence that names them."""
    change(folder, repeats=1, choices=[])
    edit_params(folder, **{f"diabetes__{entry}": value})
    with pytest.raises(PipelineError, match=sentence):
        cross_validate("diabetes")


@pytest.mark.usefixtures("one_baseline")
def test_settings_chosen_by_hand_are_judged_as_they_stand(folder: Path) -> None:
    """If the inner cross-validation would choose other settings than `train`, a warning has them, and only `train` is judged."""
    change(folder, repeats=1)
    edit_params(folder, diabetes__train__optimizer__weight_decay=1.0)
    change(folder, choices=[{}, {"optimizer": {"weight_decay": 0.01}}])
    with pytest.warns(UserWarning, match=r"would choose, {'optimizer': {'weight_decay': 0.01}}"):
        cross_validate("diabetes")
    report = result(folder)
    assert (report["chosen_by"], report["times_chosen"]) == ("params.yaml", {"0": 3})
    assert report["models"][SERVED]["log_loss"]["mean"] > report["models"]["logistic"]["log_loss"]["mean"]


@pytest.mark.usefixtures("folder")
def test_the_served_settings_are_one_of_the_choices() -> None:
    """The settings in params.yaml are among the choices, so that the report is about choosing them too."""
    shutil.copyfile(REPOSITORY / "params.yaml", "params.yaml")
    choices = load_params("diabetes", "cross_validate", Params).choices
    assert load_params("diabetes", "train", TrainParams) in [settings("diabetes", changes) for changes in choices]
