"""The two fizzbuzz networks: what the recipes find in 101..1023, and a proof that can fail."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from msgspec.structs import replace
from onnx import numpy_helper

import models
from models.fizzbuzz_any.dataset import EDGES, answer, draw
from models.fizzbuzz_any.network import Network
from pipeline import prove as stage
from pipeline.prove import Automaton, Weights, bound, explore, minimise, prove, rule, walk
from pipeline.stage import PipelineError, load_params
from pipeline.train import Params, fit
from tests.conftest import REPOSITORY

NAME = "fizzbuzz_any"
TRAIN = np.arange(101, 1024)


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The params.yaml of the repository."""
    monkeypatch.chdir(REPOSITORY)


def fitted(numbers: np.ndarray = TRAIN) -> Network:
    """The network of fizzbuzz_any, fitted to these numbers."""
    network = fit(NAME, numbers, answer(numbers), load_params(NAME, "train", Params))
    assert isinstance(network, Network)
    return network


def errors(network: torch.nn.Module, numbers: np.ndarray) -> int:
    """How many of the numbers are answered wrongly."""
    with torch.inference_mode():
        return int(np.count_nonzero(network(torch.from_numpy(numbers)).argmax(dim=1).numpy() != answer(numbers)))


@pytest.fixture(scope="module")
def weights() -> Weights:
    """The weights of fizzbuzz_any."""
    network = Network(suffix_bits=3)
    network.solve(torch.from_numpy(TRAIN), torch.from_numpy(answer(TRAIN)))
    return Weights(*(getattr(network, name).detach().numpy() for name in Weights._fields))


# What the recipes find


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ten_bits_make_no_error(seed: int) -> None:
    """Trained on 101..1023, fizzbuzz says 1..100 without an error, whatever the seed."""
    params = replace(load_params("fizzbuzz", "train", Params), seed=seed, device="cpu")
    assert errors(fit("fizzbuzz", TRAIN, answer(TRAIN), params), np.arange(1, 101)) == 0


def test_spectral_method_finds_the_rank_and_every_integer() -> None:
    """From 101..1023 the fit finds 15 states, and answers numbers of all sizes and both signs without an error."""
    network = fitted()
    assert network.initial.shape == (15,)
    assert errors(network, np.concatenate([np.array(EDGES), np.arange(-1000, 1025), draw(10_000, seed=1)])) == 0


@pytest.mark.parametrize("start", range(101, 1024, 93))
def test_spectral_method_needs_no_row_in_particular(start: int) -> None:
    """Without any tenth of the training rows the fit still makes no error on them: the settings were chosen so."""
    left_out = (start <= TRAIN) & (start + 93 > TRAIN)
    assert errors(fitted(TRAIN[~left_out]), TRAIN[left_out]) == 0


def test_too_few_rows_are_not_enough() -> None:
    """Rows that do not show all states give a network that errs: it is the data that it learns from."""
    assert errors(fitted(TRAIN[:100]), TRAIN) > 0


# The proof


def test_the_proof_holds(weights: Weights) -> None:
    """The states are those of the rule, and the bound on the scores lies far below what is allowed."""
    points, machine = explore(weights)
    assert len(minimise(machine).steps) == len(rule(NAME).steps) == 15
    assert walk(minimise(machine), rule(NAME)) is None
    error, margin = bound(weights, points, machine)
    assert 0 < error < 1e-10
    assert margin > 0.49


def test_the_bound_is_above_what_happens(weights: Weights) -> None:
    """After 64 bits no score of a thousand numbers is further from its point's than the bound, which is not idle either."""
    points, machine = explore(weights)
    noise = np.random.default_rng(0).uniform(-1e-9, 1e-9, weights.operators.shape)
    noisy = weights._replace(operators=weights.operators + noise)
    error = bound(noisy, points, machine)[0]
    state = np.broadcast_to(noisy.initial, (1000, 15))
    for bit in np.random.default_rng(0).integers(2, size=(64, 1000)):
        state = (state[:, None] @ noisy.operators[bit])[:, 0]
    off = np.abs((state @ noisy.scores)[:, None] - points @ noisy.scores).max(axis=2).min(axis=1).max()
    assert 1e-3 * error < off < error


@pytest.mark.parametrize("state", range(15))
@pytest.mark.parametrize("bit", [0, 1])
def test_one_wrong_transition_is_found(state: int, bit: int) -> None:
    """An automaton that errs in one step is refuted by a number, which it really answers wrongly."""
    truth = rule(NAME)
    steps = [list(step) for step in truth.steps]
    steps[state][bit] = (steps[state][bit] + 1) % 15
    wrong = Automaton([tuple(step) for step in steps], truth.outputs)
    number = walk(minimise(wrong), truth)
    assert number is not None
    at = 0
    for position in reversed(range(64)):
        at = steps[at][number >> position & 1]
    assert wrong.outputs[at] != (number % 3 == 0) + 2 * (number % 5 == 0)


def test_minimise_merges_what_answers_alike() -> None:
    """An automaton with every state doubled has the same smallest one."""
    truth = rule(NAME)
    doubled = Automaton([(zero + 15, one) for zero, one in truth.steps] * 2, truth.outputs * 2)
    assert minimise(doubled) == truth
    assert minimise(Automaton([(1, 0), (0, 1)], [2, 2])) == Automaton([(0, 0)], [2])


def test_states_that_do_not_close_are_no_proof(weights: Weights) -> None:
    """Operators that lead elsewhere than to the same few points are refused."""
    with pytest.raises(PipelineError, match="do not close"):
        explore(weights._replace(operators=weights.operators * 0.999))


def test_dependent_states_are_no_proof(weights: Weights) -> None:
    """Where the points are no basis there is no bound."""
    padded = Weights(
        np.append(weights.initial, 0), np.pad(weights.operators, [(0, 0), (0, 1), (0, 1)]), np.pad(weights.scores, [(0, 1), (0, 0)])
    )
    with pytest.raises(PipelineError, match="15 states are no basis of its 16 dimensions"):
        bound(padded, *explore(padded))


@pytest.fixture
def served(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the trained model in a working folder of its own; `prove` tries a thousand numbers."""
    shutil.copytree(workspace / "models" / NAME, folder := tmp_path / "models" / NAME)
    shutil.copy(workspace / "params.yaml", tmp_path)
    monkeypatch.setattr(stage, "SAMPLES", 1000)
    monkeypatch.chdir(tmp_path)
    return folder


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
    (served / "proof.json").unlink()
    prove(NAME)
    proof = json.loads((served / "proof.json").read_text())
    assert proof["proved_all_integers"] is True
    assert (proof["states"], proof["errors"], proof["numbers_tried"]) == (15, 0, 1000 + len(EDGES))
    assert proof["score_error_bound"] < proof["score_error_allowed"]


@pytest.mark.parametrize(("name", "edit"), [("operators", lambda array: perturb(array[0])), ("scores", swap)])
def test_prove_names_a_counterexample(served: Path, name: str, edit: Callable[[np.ndarray], None]) -> None:
    """A net with one changed weight, or fizz for buzz, is refused with a number that it answers wrongly; no proof is left."""
    change(served, name, edit, "model.pt", "model.onnx")
    with pytest.raises(PipelineError, match=r"not proved: \d+ of 1016 numbers have a wrong answer, the first -?\d+"):
        prove(NAME)
    assert not (served / "proof.json").exists()


def test_the_walk_names_a_counterexample(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the numbers that are tried show no error, the walk through the automaton still does, and names the least."""
    monkeypatch.setattr(stage, "sample", lambda _: 0)
    change(served, "scores", swap, "model.pt", "model.onnx")
    with pytest.raises(PipelineError, match="not proved: 3 has a wrong answer"):
        prove(NAME)


@pytest.mark.parametrize("file", ["model.pt", "model.onnx"])
def test_prove_wants_one_set_of_weights(served: Path, file: str) -> None:
    """When the two files hold different weights, neither is proved by the other."""
    change(served, "operators", lambda array: perturb(array[0]), file)
    with pytest.raises(PipelineError, match=r"model\.onnx does not hold the weights of model\.pt"):
        prove(NAME)


@pytest.mark.usefixtures("served")
def test_a_drift_that_is_too_large_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the bound reaches what is allowed, right answers on all that was tried prove nothing."""
    monkeypatch.setattr(stage, "ROUNDING", stage.ROUNDING * 2**36)
    with pytest.raises(PipelineError, match="not proved: a score may be wrong by"):
        prove(NAME)


@pytest.mark.parametrize("name", [name for name in models.names() if name != NAME])
def test_other_networks_cannot_be_proved(name: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of another kind is refused in a sentence."""
    monkeypatch.chdir(workspace)
    with pytest.raises(PipelineError, match="no linear second-order recurrent network"):
        prove(name)
