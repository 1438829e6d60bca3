"""Cross-validation looks at no row that it is judged on, and finds out when somebody else did."""

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
from pipeline.cross_validate import (
    Params,
    calibration_error,
    calibration_error_beyond_chance,
    cross_validate,
    interval,
    settings,
    task_of,
)
from pipeline.folds import SERVED, choose, cross_validate_once, fit_many
from pipeline.prepare import prepare
from pipeline.rivals import RIVALS
from pipeline.stage import PipelineError, load_params, load_rows, prepared
from pipeline.train import Params as TrainParams
from pipeline.train import fit
from tests.conftest import REPOSITORY, edit_params

SMALL = {"repeats": 2, "folds": 3, "inner_folds": 2, "gates": {}}
CHOICES = [{"optimizer": {"weight_decay": 1.0}}, {}]  # one is absurd, the other is what `train` says
MODELS = {SERVED, "tutorial", "logistic", "splines", "boosting"}


@pytest.fixture
def one_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the rivals that take their time."""
    monkeypatch.setattr("pipeline.folds.RIVALS", {"logistic": RIVALS["logistic"]})


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
    return np.concatenate([data["train_inputs"], data["test_inputs"]]), np.concatenate(
        [data["train_targets"], data["test_targets"]]
    )


def result(folder: Path) -> Any:
    """The report of the stage."""
    return json.loads((folder / "models" / "diabetes" / "cross_validation.json").read_text())


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("network", ["gaps", "tutorial"])
def test_networks_trained_together_are_as_trained_alone(network: str) -> None:
    """Two networks trained as one answer as each does that `fit` makes of the same rows with its seed."""
    inputs, targets = all_rows()
    params = settings("diabetes", {"network": network})
    training = np.arange(len(targets)) % 3 != np.arange(2)[:, None]
    together = fit_many("diabetes", inputs, targets, training, params)
    for seed, (rows, answers) in enumerate(zip(training, together, strict=True)):
        alone = fit("diabetes", inputs[rows], targets[rows], replace(params, seed=seed))
        np.testing.assert_allclose(answers, ask(alone, inputs), rtol=0, atol=1e-4)
    assert np.abs(together[0] - together[1]).max() > 0.01


def ask(network: Predictor, inputs: np.ndarray) -> np.ndarray:
    """Probabilities, (rows, classes)."""
    with torch.inference_mode():
        answers: np.ndarray = network(torch.from_numpy(inputs)).numpy()
    return answers


@pytest.mark.usefixtures("folder")
def test_no_model_sees_what_it_is_judged_on() -> None:
    """When rows of a fold change places within their class, their answers change places too, and nothing else: for every model."""
    inputs, targets = all_rows()
    task = task_of("diabetes", load_params("diabetes", "cross_validate", Params), load_rows("diabetes"))
    candidates = [settings("diabetes", changes) for changes in CHOICES]
    before = cross_validate_once(task, candidates, 0)
    moved = np.arange(len(targets))
    for label in (0, 1):
        rows = np.flatnonzero((before.fold == 0) & (targets == label))
        moved[rows] = np.roll(rows, 1)
    after = cross_validate_once(task._replace(inputs=inputs[moved]), candidates, 0)
    first = before.fold == 0
    assert set(before.answers) == MODELS
    for name, answers in before.answers.items():
        np.testing.assert_allclose(after.answers[name][first], answers[moved][first], rtol=0, atol=1e-6, err_msg=name)
        assert np.abs(after.answers[name] - answers)[first].max() > 0.1


@pytest.mark.usefixtures("folder")
def test_a_choice_depends_on_its_part_alone() -> None:
    """Noise in the other rows does not keep the better settings from being chosen; in the part itself it does."""
    _, targets = all_rows()
    task = task_of("diabetes", load_params("diabetes", "cross_validate", Params), load_rows("diabetes"))
    candidates = [settings("diabetes", changes) for changes in CHOICES]
    part, rest = np.arange(400), np.arange(400, 768)
    noise = targets.copy()
    noise[rest] = np.random.default_rng(0).permutation(targets[rest])
    assert choose(task, candidates, [part, rest]) == [1, 1]
    assert choose(task._replace(targets=noise), candidates, [part, rest]) == [1, 0]


def test_calibration_error_is_what_it_is_defined_to_be() -> None:
    """Ten bins of equal mass: 0 when each holds as many positives as it should, else the mean distance."""
    answers = np.repeat(np.arange(10) / 10, 10)
    right = np.concatenate([np.arange(10) < tenths for tenths in range(10)]).astype(int)
    shuffled = np.random.default_rng(0).permutation(100)
    assert calibration_error(answers[shuffled], right[shuffled]) == pytest.approx(0)
    np.testing.assert_allclose(calibration_error(answers, np.array([right, np.zeros(100)])), [0, 0.45], atol=1e-12)


def test_chance_is_taken_off_the_calibration_error() -> None:
    """Labels drawn from the probabilities have an ECE and none beyond chance; a constant shift of .1 is seen as .1."""
    random = np.random.default_rng(0)
    truth = random.uniform(0.1, 0.9, 2000)
    beyond = [
        [calibration_error_beyond_chance(truth - shift, random.random(2000) < truth) for _ in range(50)] for shift in (0, 0.1)
    ]
    assert np.mean(calibration_error(truth, random.random((50, 2000)) < truth)) == pytest.approx(0.026, abs=0.003)
    np.testing.assert_allclose(np.median(beyond, axis=1), [0, 0.1], atol=0.005)


def test_the_interval_is_wider_than_that_of_independent_folds() -> None:
    """Of 10 x 10 folds it is sqrt(1 + 100 / 9) times as wide as Student's, around the same mean."""
    differences = np.random.default_rng(0).normal(0.01, 0.02, (10, 10))
    student = ttest_1samp(differences.ravel(), 0).confidence_interval(0.95)
    found = interval(differences, 10)
    assert found["mean"] == pytest.approx(differences.mean())
    assert found["high"] + found["low"] == pytest.approx(2 * found["mean"])
    assert found["high"] - found["low"] == pytest.approx(np.sqrt(1 + 100 / 9) * (student.high - student.low))


@pytest.mark.usefixtures("one_rival")
def test_the_report_has_every_model_and_comes_out_the_same(folder: Path) -> None:
    """Each model has mean and spread of each figure, and the interval of its difference; a second run writes the same bytes."""
    files = [folder / "models" / "diabetes" / file for file in ("cross_validation.json", "plots/cross_validated_calibration.csv")]
    cross_validate("diabetes")
    before = [file.read_bytes() for file in files]
    cross_validate("diabetes")
    assert [file.read_bytes() for file in files] == before

    found = result(folder)
    assert (found["rows"], found["chosen_by"], found["times_chosen"]) == (768, "inner cross-validation", {"0": 0, "1": 6})
    assert set(found["models"]) == {SERVED, "tutorial", "logistic"}
    for figures in found["models"].values():
        assert set(figures) == {"auc", "log_loss", "brier", "accuracy", "ece", "ece_beyond_chance", "ece_if_perfect"}
        assert 0.78 < figures["auc"]["mean"] < 0.87
        assert 0.65 < figures["accuracy"]["mean"] < 0.82
        assert 0 < figures["auc"]["std"] < figures["auc"]["fold_std"] < 0.1
    for name, differences in found["served_less"].items():
        for figure, difference in differences.items():
            expected = found["models"][SERVED][figure]["mean"] - found["models"][name][figure]["mean"]
            assert difference["mean"] == pytest.approx(expected)
            assert difference["low"] < difference["mean"] < difference["high"]
    with files[1].open() as file:
        bins = list(csv.DictReader(file))
    assert sum(int(row["rows"]) for row in bins) == 2 * 768
    assert [float(row["predicted"]) for row in bins] == sorted(float(row["predicted"]) for row in bins)


def impute_by_class() -> None:
    """The popular mistake: fill gaps with the median of the row's class, before the split."""
    data = load_rows("diabetes")
    inputs, targets = all_rows()
    for column in range(1, 6):
        for label in (0, 1):
            rows = targets == label
            gap = rows & (inputs[:, column] == 0)
            inputs[gap, column] = np.median(inputs[rows & ~gap, column])
    data["train_inputs"], data["test_inputs"] = np.split(inputs, [len(data["train_targets"])])
    with prepared("diabetes").open("wb") as file:
        np.savez(file, allow_pickle=False, **data)


def test_the_canary_sings(folder: Path) -> None:
    """Imputed by class, the data give an AUC around .95, as in many a notebook; the stage refuses it and says why."""
    change(folder, repeats=1)
    impute_by_class()
    with pytest.raises(PipelineError, match=r"suspected leakage: the AUC of 'boosting' is 0\.9\d\d, and above 0\.870 is too good"):
        cross_validate("diabetes")
    aucs = {name: figures["auc"]["mean"] for name, figures in result(folder)["models"].items()}
    assert 0.93 < aucs["boosting"] < 0.97
    assert aucs[SERVED] > 0.87


@pytest.mark.usefixtures("one_rival")
@pytest.mark.parametrize(
    ("gates", "sentence"),
    [
        ({"at_least": {"models.served.auc.mean": 0.99}}, r"missed: models.served.auc.mean is 0.8\d\d\d, below its bound 0.9900"),
        ({"at_most": {"models.served.ece.mean": 0}}, r"missed: models.served.ece.mean is 0.\d\d\d\d, above its bound 0.0000"),
        ({"at_most": {"models.served.loss": 0}}, "gate 'models.served.loss' names no metric"),
    ],
)
def test_a_missed_gate_is_named(folder: Path, gates: dict[str, dict[str, float]], sentence: str) -> None:
    """A bound may be the least or the most that passes; the sentence says which was missed by what."""
    change(folder, repeats=1, choices=[{}], gates=gates)
    with pytest.raises(PipelineError, match=sentence):
        cross_validate("diabetes")


@pytest.mark.usefixtures("one_rival")
@pytest.mark.parametrize(
    ("entry", "value", "sentence"),
    [
        ("cross_validate__folds", 300, "cross_validate.folds: 300 cannot be; use 2 to 268"),
        ("cross_validate__folds", 1, "cross_validate.folds: 1 cannot be"),
        ("cross_validate__inner_folds", 250, "cross_validate.inner_folds: 250 cannot be; use 2 to 178"),
        ("cross_validate__repeat", 1, "unknown field `repeat`"),
        ("cross_validate__choices", [{"epoch": 1}], r"cannot be changed by {'epoch': 1}: .*`epoch`"),
        ("cross_validate__rivals", {"mlp": {"network": "mlp"}}, "there is no network 'mlp'"),
        ("train__batch_size", 64, "batch_size must be 768 or more"),
    ],
)
def test_a_wrong_parameter_is_named(folder: Path, entry: str, value: object, sentence: str) -> None:
    """Settings that cannot be end the stage with a sentence that names them."""
    change(folder, repeats=1, choices=[])
    edit_params(folder, **{f"diabetes__{entry}": value})
    with pytest.raises(PipelineError, match=sentence):
        cross_validate("diabetes")


@pytest.mark.usefixtures("one_rival")
def test_settings_chosen_by_hand_are_judged_as_they_stand(folder: Path) -> None:
    """Where `train` is not what the inner cross-validation chooses, a warning says what that would be, and the report who chose."""
    change(folder, repeats=1)
    edit_params(folder, diabetes__train__optimizer__weight_decay=1.0)
    change(folder, choices=[{}, {"optimizer": {"weight_decay": 0.01}}])
    with pytest.warns(UserWarning, match=r"would choose {'optimizer': {'weight_decay': 0.01}}"):
        cross_validate("diabetes")
    found = result(folder)
    assert (found["chosen_by"], found["times_chosen"]) == ("params.yaml", {"0": 3})
    assert found["models"][SERVED]["log_loss"]["mean"] > found["models"]["logistic"]["log_loss"]["mean"]


def test_an_empty_section_does_nothing(folder: Path) -> None:
    """A model whose section is empty gets an empty report."""
    edit_params(folder, diabetes__cross_validate={})
    cross_validate("diabetes")
    assert result(folder) == {}


@pytest.mark.usefixtures("folder")
def test_the_served_settings_are_one_of_the_choices() -> None:
    """What params.yaml trains is among what the inner cross-validation chooses from: the figures are of choosing too."""
    shutil.copyfile(REPOSITORY / "params.yaml", "params.yaml")
    choices = load_params("diabetes", "cross_validate", Params).choices
    assert load_params("diabetes", "train", TrainParams) in [settings("diabetes", changes) for changes in choices]
