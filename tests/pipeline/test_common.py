"""Stages stop with one sentence that names what is wrong."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import models
from pipeline.__main__ import main
from pipeline.evaluate import evaluate
from pipeline.export import export
from pipeline.prepare import prepare
from pipeline.train import train
from tests.conftest import edit_params

pytestmark = pytest.mark.slow

ANY = models.names()[0]


def refusal(stage: Callable[[str], None], name: str) -> str:
    """The one sentence with which a stage exits."""
    with pytest.raises(SystemExit) as stopped:
        main(stage.__name__, name)
    sentence = stopped.value.code
    assert isinstance(sentence, str)
    assert sentence.startswith(f"{stage.__name__} {name}: ")
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("stage", "entry", "value", "sentence"),
    [
        (train, "", {}, f"the entry models.{ANY}.train is missing"),
        (train, "__train__epoch", 3, "unknown field `epoch`"),
        (train, "__train__epochs", "many", "`$.epochs`"),
        (train, "__train__epochs", -1, "`$.epochs`"),
        (train, "__train__batch_size", 0, "`$.batch_size`"),
        (train, "__train__precision", "half", "Expected `str` matching regex '^(float32|bfloat16)$' - at `$.precision`"),
        (train, "__train__device", "tpu", "Expected `str` matching regex '^(auto|cpu|cuda)$' - at `$.device`"),
        (train, "__train__device", "cuda", "torch sees none; use auto or cpu"),
        (train, "__train__optimizer__name", "Sgdd", "has no attribute 'Sgdd'"),
        (train, "__train__optimizer__lrr", 1, "'lrr'"),
        (train, "__train__network", {"hiden": 1}, "'hiden'"),
        (prepare, "__prepare__sampel", 1, "'sampel'"),
        (export, "__export__opste", 1, "unknown field `opste`"),
        (evaluate, "__evaluate__gate", 5, "unknown field `gate`"),
        (evaluate, "__evaluate__gates", {}, "gates has no entry for the data set"),
    ],
)
def test_a_wrong_parameter_is_named(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, *, stage: Callable[[str], None], entry: str, value: object, sentence: str
) -> None:
    """A missing, unknown or invalid entry of params.yaml stops the stage with a sentence that names it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    edit_params(scratch, **{ANY + entry: value})
    assert sentence in refusal(stage, ANY)


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("stage", [prepare, train, export, evaluate])
def test_an_unknown_model_is_named(stage: Callable[[str], None]) -> None:
    """An unknown model stops every stage with a sentence."""
    assert f"models.nosuch.{stage.__name__} is missing" in refusal(stage, "nosuch")
