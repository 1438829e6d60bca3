"""Calibration errors are as defined in the literature, and quality gates name what they miss."""

import numpy as np
import pytest

from pipeline.common import PipelineError
from pipeline.metrics import calibration, calibration_error, check_gates, debiased_calibration_error, measure


def test_calibration_error_is_what_it_is_defined_to_be() -> None:
    """In ten bins of equal mass it is 0 when each has the predicted number of positives, otherwise the mean distance."""
    probabilities = np.repeat(np.arange(10) / 10, 10)
    right = np.concatenate([np.arange(10) < tenths for tenths in range(10)]).astype(int)
    shuffled = np.random.default_rng(0).permutation(100)
    assert calibration_error(probabilities[shuffled], right[shuffled]) == pytest.approx(0)
    np.testing.assert_allclose(calibration_error(probabilities, np.array([right, np.zeros(100)])), [0, 0.45], atol=1e-12)


def test_debiasing_removes_the_part_of_chance() -> None:
    """For labels drawn from the probabilities the ECE is positive and the debiased ECE 0; a constant shift of .1 gives .1."""
    random = np.random.default_rng(0)
    truth = random.uniform(0.1, 0.9, 2000)
    debiased = [[debiased_calibration_error(truth - shift, random.random(2000) < truth) for _ in range(50)] for shift in (0, 0.1)]
    assert np.mean(calibration_error(truth, random.random((50, 2000)) < truth)) == pytest.approx(0.026, abs=0.003)
    np.testing.assert_allclose(np.median(debiased, axis=1), [0, 0.1], atol=0.005)


def test_calibration_has_every_row_in_one_bin() -> None:
    """Ten points, by increasing probability, with the mean of the probabilities and the frequency of the outcomes."""
    points = calibration(np.linspace(0, 1, 101), np.arange(101) >= 50)
    assert sum(rows for *_, rows in points) == 101
    assert [predicted for predicted, *_ in points] == sorted(predicted for predicted, *_ in points)
    assert [observed for _, observed, _ in points] == [0, 0, 0, 0, pytest.approx(1 / 11, abs=0.1), 1, 1, 1, 1, 1]


def test_values_have_an_error_and_classes_an_accuracy() -> None:
    """The type of the targets decides which metrics there are."""
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], np.float32)
    assert measure(probabilities, np.array([0, 1, 1]))["accuracy"] == pytest.approx(2 / 3)
    assert measure(probabilities, probabilities) == {"mse": 0, "r2": 1, "rows": 3}


def test_a_missed_gate_has_its_side() -> None:
    """A lower bound may be below the metric, an upper bound above it."""
    check_gates({"auc": {"mean": 0.8}}, at_least={"auc.mean": 0.8}, at_most={"auc.mean": 0.8})
    with pytest.raises(
        PipelineError, match=r"auc\.mean is 0\.8000, expected at least 0\.9000; auc\.mean is 0\.8000, expected at most 0\.7000"
    ):
        check_gates({"auc": {"mean": 0.8}}, at_least={"auc.mean": 0.9}, at_most={"auc.mean": 0.7})
