"""Prove that a model is right on every input in its domain, and try the exported file on random ones.

The model's `proof.py` has `Weights`, `prove` and `NotProvedError`; its `dataset.py` has the rule, edge cases and random inputs.
"""

from types import ModuleType
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

import models
from pipeline.common import Paths, PipelineError, Positive, Section, load_params, write_json
from pipeline.evaluate import run_onnxruntime
from pipeline.train import load_network


class Params(Section, frozen=True, kw_only=True):
    seed: int
    samples: Positive  # random numbers that model.onnx is tried on


def load_weights(model: str, proof: ModuleType) -> Any:
    """The weights in model.pt. Raises PipelineError when model.onnx has others."""
    network = load_network(model)
    weights = proof.Weights(*(getattr(network, name).detach().numpy() for name in proof.Weights._fields))
    graph = onnx.load(Paths(model).trained / "model.onnx").graph
    exported = {numpy_helper.to_array(tensor).tobytes() for tensor in graph.initializer}
    if not all(tensor.tobytes() in exported for tensor in (weights.initial, *weights.operators, weights.scores)):
        raise PipelineError("model.onnx does not have the weights of model.pt: run `dvc repro`")
    return weights


def try_samples(model: str, params: Params) -> int:
    """Run model.onnx on edge cases and random numbers; return how many. Raises PipelineError when a prediction is wrong."""
    dataset = models.load(model, "dataset")
    numbers = np.concatenate([np.array(dataset.EDGES), dataset.draw(params.samples, params.seed)])
    wrong = np.flatnonzero(run_onnxruntime(model, numbers).argmax(axis=1) != dataset.answer(numbers))
    if len(wrong):
        raise PipelineError(f"not proved: {len(wrong)} of {len(numbers)} numbers have a wrong answer, first {numbers[wrong[0]]}")
    return len(numbers)


def prove(model: str) -> None:
    """Stage: model.pt, model.onnx -> report/proof.json; fails, with a counterexample if there is one, when the proof fails."""
    params, target = load_params(model, "prove", Params), Paths(model).report / "proof.json"
    target.unlink(missing_ok=True)
    proof = models.load(model, "proof")
    try:
        weights, tried = load_weights(model, proof), try_samples(model, params)
        result = {"proved_all_integers": True, **proof.prove(weights), "numbers_tried": tried, "errors": 0}
    except proof.NotProvedError as error:
        raise PipelineError(f"not proved: {error}") from error
    write_json(target, result)
    print(f"{model}: " + ", ".join(f"{name} {value}" for name, value in result.items()))
