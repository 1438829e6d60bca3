"""The spectral method finds the rule in 101 to 1023, and the proof accepts no network that errs."""

import numpy as np
import pytest
import torch

from models.fizzbuzz_any import proof
from models.fizzbuzz_any.dataset import EDGES, answer, draw
from models.fizzbuzz_any.network import Network
from models.fizzbuzz_any.proof import (
    Automaton,
    NotProvedError,
    Weights,
    counterexample,
    error_bound,
    explore,
    prove,
)

TRAIN = np.arange(101, 1024)


def fitted(numbers: np.ndarray = TRAIN) -> Network:
    """The network, fitted to these numbers."""
    network = Network(suffix_bits=3)
    network.solve(torch.from_numpy(numbers), torch.from_numpy(answer(numbers)))
    return network


def errors(network: torch.nn.Module, numbers: np.ndarray) -> int:
    """The number of wrong answers."""
    with torch.inference_mode():
        return int(np.count_nonzero(network(torch.from_numpy(numbers)).argmax(dim=1).numpy() != answer(numbers)))


@pytest.fixture(scope="module")
def weights() -> Weights:
    """The weights of the fitted network."""
    network = fitted()
    return Weights(*(getattr(network, name).detach().numpy() for name in Weights._fields))


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


def test_the_proof_holds(weights: Weights) -> None:
    """The states are those of the rule, and the bound on the scores lies far below what is allowed."""
    points, machine = explore(weights)
    assert len(points) == len(machine.steps) == 15
    assert counterexample(machine) is None
    error, margin = error_bound(weights, points, machine)
    assert 0 < error < 1e-10
    assert margin > 0.49


def test_the_bound_is_above_what_happens(weights: Weights) -> None:
    """After 64 bits no score of a thousand numbers is further from its point's than the bound, which is not idle either."""
    points, machine = explore(weights)
    noise = np.random.default_rng(0).uniform(-1e-9, 1e-9, weights.operators.shape)
    noisy = weights._replace(operators=weights.operators + noise)
    error = error_bound(noisy, points, machine)[0]
    state = np.broadcast_to(noisy.initial, (1000, 15))
    for bit in np.random.default_rng(0).integers(2, size=(64, 1000)):
        state = (state[:, None] @ noisy.operators[bit])[:, 0]
    off = np.abs((state @ noisy.scores)[:, None] - points @ noisy.scores).max(axis=2).min(axis=1).max()
    assert 1e-3 * error < off < error


@pytest.mark.parametrize("state", range(15))
@pytest.mark.parametrize("bit", [0, 1])
def test_one_wrong_transition_is_found(state: int, bit: int) -> None:
    """An automaton that errs in one step is refuted by a number, which it really answers wrongly."""
    steps = [[2 * rest % 15, (2 * rest + 1) % 15] for rest in range(15)]  # of the rule: each bit doubles and adds
    outputs = answer(np.arange(15)).tolist()
    assert counterexample(Automaton([tuple(step) for step in steps], outputs)) is None
    steps[state][bit] = (steps[state][bit] + 1) % 15
    wrong = Automaton([tuple(step) for step in steps], outputs)
    number = counterexample(wrong)
    assert number is not None
    at = 0
    for position in reversed(range(64)):
        at = steps[at][number >> position & 1]
    assert wrong.outputs[at] != (number % 3 == 0) + 2 * (number % 5 == 0)


def test_states_that_do_not_close_are_no_proof(weights: Weights) -> None:
    """Operators that lead elsewhere than to the same few points are refused."""
    with pytest.raises(NotProvedError, match="reaches more than 1000 states"):
        explore(weights._replace(operators=weights.operators * 0.999))


def test_dependent_states_are_no_proof(weights: Weights) -> None:
    """Where the points are no basis there is no bound."""
    padded = Weights(
        np.append(weights.initial, 0), np.pad(weights.operators, [(0, 0), (0, 1), (0, 1)]), np.pad(weights.scores, [(0, 1), (0, 0)])
    )
    with pytest.raises(NotProvedError, match="15 states are not a basis of its 16 dimensions"):
        error_bound(padded, *explore(padded))


def test_the_smallest_counterexample_is_named(weights: Weights) -> None:
    """A network that answers fizz for buzz and buzz for fizz is refuted by 3."""
    with pytest.raises(NotProvedError, match="3 has a wrong answer"):
        prove(weights._replace(scores=weights.scores[:, [0, 2, 1, 3]]))


def test_too_large_an_error_is_not_proved(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the bound reaches the allowed error, right answers on all numbers that were tried prove nothing."""
    monkeypatch.setattr(proof, "ROUNDING", proof.ROUNDING * 2**36)
    with pytest.raises(NotProvedError, match="a score may be wrong by"):
        prove(weights)
