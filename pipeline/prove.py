"""Prove that a recurrent network over bits follows its rule on every integer of 64 bits.

The network's state after reading a word is a vector, and of 2**64 words only few can be tried. Yet the vectors lie close to a few
points, between which its bits lead like those of a finite automaton. The proof has three parts:

1. `explore` finds the points X, (states, dimension), and where each bit leads, the automaton; `minimise` makes it small.
2. `walk` goes through all words of 64 bits, all at once, in that automaton and in the machine of the rule: they must agree.
3. `bound` shows that the vectors stay so near to their points that the network answers as the automaton does. Write a state as c X.
   In exact arithmetic a bit's matrix A takes it to c (P + E) X, where P, zeros and ones, is the automaton's step, and
   E = (X A - P X) X^-1 is how far A misses. P lengthens no c in the 1-norm, so |c - e|, with e the right point, grows from 0 to at
   most (1 + |E| + r)^64 - 1. Here r is the rounding of one step, at most | g |X||A||X^-1| |, with g = n u / (1 - n u), u = 2^-53,
   for sums of n terms in any order, fused or not (Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 3.1).
   The scores must then still have the right one above one half and the others below it.

The bound is computed in fractions, so it has no rounding of its own. It holds for any choice of points: how near two vectors are
taken for one (TOLERANCE) decides whether the proof succeeds, not whether it is right. Negative numbers are read by their magnitude,
and both the network's words and the rule's have no sign, so all words of 64 bits are more than all integers of 64 bits.
"""

import json
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

import models
from pipeline.evaluate import with_onnxruntime
from pipeline.export import replace
from pipeline.stage import PipelineError, folder, load_params, main
from pipeline.train import Params, build

BITS = 64
SAMPLES, SEED = 1_000_000, 64  # random numbers through the ONNX file
TOLERANCE = 1e-6  # vectors nearer than this, by their largest component, are taken for one point
MOST_STATES = 1000  # of an automaton that is worth looking at
ROUNDING = Fraction(1, 2**53)  # the unit of float64
Exact = NDArray[Any]  # of fractions.Fraction


class Automaton(NamedTuple):
    """A finite machine that reads bits; state 0 is where it begins."""

    steps: Sequence[tuple[int, ...]]  # state -> the next one, by bit
    outputs: list[int]  # state -> class


class Weights(NamedTuple):
    """A linear second-order recurrent network, float64."""

    initial: np.ndarray  # (dimension,)
    operators: np.ndarray  # (2, dimension, dimension)
    scores: np.ndarray  # (dimension, classes)


def explore(weights: Weights) -> tuple[np.ndarray, Automaton]:
    """The points that the state comes to, (states, dimension), and the automaton on them.

    Raises PipelineError when there are more than MOST_STATES.
    """
    points, steps = [weights.initial], []
    for point in points:  # grows
        following = []
        for operator in weights.operators:
            reached = point @ operator
            distances = np.abs(np.array(points) - reached).max(axis=1)
            if not distances.min() < TOLERANCE:
                points.append(reached)
            following.append(int(distances.argmin()) if distances.min() < TOLERANCE else len(points) - 1)
        steps.append(tuple(following))
        if len(points) > MOST_STATES:
            raise PipelineError(f"its states do not close: there are more than {MOST_STATES}, so it is no finite automaton")
    return np.array(points), Automaton(steps, (np.array(points) @ weights.scores).argmax(axis=1).tolist())


def minimise(machine: Automaton) -> Automaton:
    """The smallest automaton with the same answers (Moore 1956): split classes of states until none has to be."""
    kinds, found = machine.outputs, 0
    while found < len(set(kinds)):
        found = len(set(kinds))
        signatures = [(kinds[state], *(kinds[to] for to in machine.steps[state])) for state in range(len(kinds))]
        kinds = [signatures.index(signature) for signature in signatures]  # the first state of that signature
    kept = sorted(set(kinds))
    steps = [tuple(kept.index(kinds[to]) for to in machine.steps[state]) for state in kept]
    return Automaton(steps, [machine.outputs[state] for state in kept])


def rule(model: str) -> Automaton:
    """The machine of the rule: remainders by 15, each bit doubles and adds; the answers are those of the data set's rule."""
    outputs = models.load(model, "dataset").answer(np.arange(15))
    return Automaton([(2 * rest % 15, (2 * rest + 1) % 15) for rest in range(15)], outputs.tolist())


def walk(machine: Automaton, truth: Automaton) -> int | None:
    """The least number of 64 bits, without sign, that two automata answer differently; None when there is none."""
    words = {(0, 0): 0}  # the pairs of states that words of some length lead to -> the least such word
    for _ in range(BITS):
        longer: dict[tuple[int, int], int] = {}
        for (ours, theirs), word in words.items():
            for bit in (0, 1):
                pair = machine.steps[ours][bit], truth.steps[theirs][bit]
                longer[pair] = min(2 * word + bit, longer.get(pair, 2**BITS))
        words = longer
    wrong = [word for (ours, theirs), word in words.items() if machine.outputs[ours] != truth.outputs[theirs]]
    return min(wrong, default=None)


def exact(array: np.ndarray) -> Exact:
    """The same numbers as fractions."""
    fractions: Exact = np.vectorize(Fraction, otypes=[object])(array)
    return fractions


def norm(matrix: Exact) -> Fraction:
    """By how much a matrix lengthens a row vector at most, in the 1-norm."""
    return Fraction(abs(matrix).sum(axis=1).max())


def bound(weights: Weights, points: np.ndarray, machine: Automaton) -> tuple[Fraction, Fraction]:
    """How far a score can be from that of its point after 64 bits, and how far it may be: see the top of this file.

    Raises PipelineError when the points are no basis, as then they say nothing about the space between them.
    """
    x, operators, scores = exact(points), exact(weights.operators), exact(weights.scores)
    if x.shape[0] != x.shape[1] or np.linalg.matrix_rank(points) < len(points):
        raise PipelineError(f"its {len(points)} states are no basis of its {x.shape[1]} dimensions, so nothing bounds its errors")
    y = exact(np.linalg.inv(points))  # X^-1 but for a factor (I + F)^-1, as X y = I + F
    factor = norm(x @ y - np.eye(len(x), dtype=int))
    if factor >= 1:
        raise PipelineError("its states are too close to dependent to bound its errors")
    gamma = len(x) * ROUNDING / (1 - len(x) * ROUNDING)
    misses = [x @ operator - x[[to[bit] for to in machine.steps]] for bit, operator in enumerate(operators)]
    miss = max(norm(matrix @ y) for matrix in misses) / (1 - factor)
    rounding = max(gamma * norm(abs(x) @ abs(operator) @ abs(y)) for operator in operators) / (1 - factor)
    drift = (1 + miss + rounding) ** BITS - 1

    answers = x @ scores  # (states, classes)
    error = drift * abs(answers).max() + gamma * (1 + drift) * (abs(x) @ abs(scores)).max()
    right = np.eye(answers.shape[1], dtype=bool)[machine.outputs]
    return error, min(answers[right].min() - Fraction(1, 2), Fraction(1, 2) - answers[~right].max())


def served(model: str) -> Weights:
    """The weights in model.pt. Raises PipelineError when they are missing, no such network's, or not those in model.onnx."""
    try:
        network = build(model, load_params(model, "train", Params).network)
        network.load_state_dict(torch.load(folder(model) / "model.pt", weights_only=True))
        graph = onnx.load(folder(model) / "model.onnx").graph
        tensors = (getattr(network, name).detach().numpy() for name in Weights._fields)
        weights = Weights(*tensors)
    except FileNotFoundError as error:
        raise PipelineError(f"{error.filename} is missing: run `dvc repro`") from None
    except AttributeError as error:
        raise PipelineError(f"it is no linear second-order recurrent network: {error}") from None
    held = {numpy_helper.to_array(tensor).tobytes() for tensor in graph.initializer}
    if not all(tensor.tobytes() in held for tensor in (weights.initial, *weights.operators, weights.scores)):
        raise PipelineError("model.onnx does not hold the weights of model.pt: run `dvc repro`")
    return weights


def sample(model: str) -> int:
    """Try the ends of the range and a million random numbers in model.onnx; how many. Raises PipelineError with a wrong one."""
    dataset = models.load(model, "dataset")
    numbers = np.concatenate([np.array(dataset.EDGES), dataset.draw(SAMPLES, SEED)])
    wrong = np.flatnonzero(with_onnxruntime(model, numbers).argmax(axis=1) != dataset.answer(numbers))
    if len(wrong):
        raise PipelineError(
            f"not proved: {len(wrong)} of {len(numbers)} numbers have a wrong answer, the first {numbers[wrong[0]]}"
        )
    return len(numbers)


def prove(model: str) -> None:
    """Stage: model.pt, model.onnx -> proof.json; fails, with a counterexample if one is known, when there is no proof."""
    (folder(model) / "proof.json").unlink(missing_ok=True)
    weights = served(model)
    tried = sample(model)
    points, machine = explore(weights)
    smallest = minimise(machine)
    if (counterexample := walk(smallest, rule(model))) is not None:
        raise PipelineError(f"not proved: {counterexample} has a wrong answer")
    error, margin = bound(weights, points, machine)
    if not 2 * error < margin:  # the other half is for float32, in which the scores become probabilities
        raise PipelineError(f"not proved: a score may be wrong by {float(error):.2g}, half of {float(margin):.2g} is allowed")
    proof = {
        "proved_all_integers": True,
        "states": len(smallest.steps),
        "score_error_bound": float(error),
        "score_error_allowed": float(margin),
        "numbers_tried": tried,
        "errors": 0,
    }
    replace(folder(model) / "proof.json", (json.dumps(proof, indent=2) + "\n").encode())
    print(f"{model}: " + ", ".join(f"{name} {value}" for name, value in proof.items()))


if __name__ == "__main__":
    main(prove)
