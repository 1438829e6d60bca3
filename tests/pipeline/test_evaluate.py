"""Quality gates, and the comparison of the two exported files."""

import json
from pathlib import Path

import numpy as np
import pytest

import models
from pipeline.evaluate import TOLERANCE, compare, evaluate
from tests.conftest import edit_params
from tests.pipeline.test_common import refusal

every_model = pytest.mark.parametrize("name", models.names())


@pytest.mark.slow
@every_model
def test_a_missed_gate_is_named(scratch: Path, name: str) -> None:
    """The sentence has the metric and its bound; a gate for an unknown metric is an error too."""
    metrics = json.loads((scratch / "models" / name / "report" / "metrics.json").read_text())
    edit_params(scratch, **{f"{name}__evaluate": {"gates": {metrics["data"]: {"auc": 0, "accuracy": 1.5}}}})
    assert f"missed: accuracy is {metrics['accuracy']:.4f}, expected at least 1.5000" in refusal(evaluate, name)
    edit_params(scratch, **{f"{name}__evaluate": {"gates": {metrics["data"]: {"acuracy": 0}}}})
    assert "gate 'acuracy' is not a metric" in refusal(evaluate, name)


def test_engines_that_disagree_are_refused() -> None:
    """A flipped label or a probability off by more than the tolerance fails, with the number; a smaller difference is reported."""
    ours, step = np.array([[0.9, 0.1], [0.5 + TOLERANCE / 4, 0.5 - TOLERANCE / 4]]), np.array([1, -1])
    assert compare(ours, ours + step * TOLERANCE / 2, classes=True) == {
        "label_flips": 0,
        "largest_difference": pytest.approx(TOLERANCE / 2),
    }
    with pytest.raises(Exception, match="different labels for 1 test rows, the first is row 1"):
        compare(ours, ours - step * TOLERANCE / 2, classes=True)
    with pytest.raises(Exception, match=f"differs by {2 * TOLERANCE:.2g} .* {TOLERANCE:g} is allowed"):
        compare(ours, ours + step * TOLERANCE * 2, classes=True)
    with pytest.raises(Exception, match="differs by nan"):
        compare(ours, np.vstack([ours[:1], [[np.nan, 0]]]), classes=True)
