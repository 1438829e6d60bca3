"""Proof that the network follows the FizzBuzz rule on every 64-bit integer.

There are too many words of 64 bits to try, but the network's state vectors lie close to a few points, between which each bit leads
as in a finite automaton:

1. `explore` finds the points X, (states, dimension), and the automaton on them.
2. `counterexample` follows all 64-bit words at once through that automaton: each must end with the right answer.
3. `error_bound` shows that the vectors stay so close to their points that the network answers as the automaton does. Write a state
   as c X. In exact arithmetic a bit's matrix A takes it to c (P + E) X, where P, zeros and ones, is the automaton's step and
   E = (X A - P X) X^-1 is the deviation of A. P does not lengthen c in the 1-norm, so |c - e|, with e the right point, grows from 0
   to at most (1 + |E| + r)^64 - 1. Here r is the rounding error of one step, at most | g |X||A||X^-1| |, with g = n u / (1 - n u)
   and u = 2^-53, for sums of n terms in any order, fused or not (Higham 2002, "Accuracy and Stability of Numerical Algorithms",
   section 3.1). After that, the score of the right class must still be above one half and the others below.

The bound is computed in fractions, without rounding. It holds for any choice of points: TOLERANCE decides whether the proof
succeeds, not whether it is right. Network and rule ignore the sign, so the unsigned words cover all 64-bit integers.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.fizzbuzz_any.dataset import answer

BITS = 64
TOLERANCE = 1e-6  # vectors closer than this, by their largest component, count as one point
MAX_STATES = 1000  # of the automaton
ROUNDING = Fraction(1, 2**53)  # unit roundoff of float64
Exact = NDArray[Any]  # of fractions.Fraction


class NotProvedError(Exception):
    """The weights do not follow the rule, or the proof does not cover them."""


class Automaton(NamedTuple):
    """A finite automaton that reads bits, starting in state 0."""

    steps: Sequence[tuple[int, ...]]  # state -> next state, by bit
    outputs: list[int]  # state -> class


class Weights(NamedTuple):
    """The weights of a linear second-order recurrent network, float64."""

    initial: np.ndarray  # (dimension,)
    operators: np.ndarray  # (2, dimension, dimension)
    scores: np.ndarray  # (dimension, classes)


def prove(weights: Weights) -> dict[str, float]:
    """Prove the weights right on every 64-bit integer; return the number of states, the error bound and the allowed error.

    Raises NotProvedError, with the smallest counterexample when there is one.
    """
    points, machine = explore(weights)
    if (number := counterexample(machine)) is not None:
        raise NotProvedError(f"{number} has a wrong answer")
    error, margin = error_bound(weights, points, machine)
    if not 2 * error < margin:  # the other half is for float32, in which the scores become probabilities
        raise NotProvedError(f"a score may be wrong by {float(error):.2g}, allowed is half of {float(margin):.2g}")
    return {"states": len(points), "score_error_bound": float(error), "score_error_allowed": float(margin)}


def explore(weights: Weights) -> tuple[np.ndarray, Automaton]:
    """The points that the state reaches, (states, dimension), and the automaton on them, if there are at most MAX_STATES."""
    points, steps = [weights.initial], []
    for point in points:  # grows
        next_states = []
        for operator in weights.operators:
            reached = point @ operator
            distances = np.abs(np.array(points) - reached).max(axis=1)
            if not distances.min() < TOLERANCE:
                points.append(reached)
            next_states.append(int(distances.argmin()) if distances.min() < TOLERANCE else len(points) - 1)
        steps.append(tuple(next_states))
        if len(points) > MAX_STATES:
            raise NotProvedError(f"the network reaches more than {MAX_STATES} states, so it is not a finite automaton")
    return np.array(points), Automaton(steps, (np.array(points) @ weights.scores).argmax(axis=1).tolist())


def counterexample(machine: Automaton) -> int | None:
    """The smallest unsigned 64-bit number with a wrong output; None when there is none."""
    smallest = {(0, 0): 0}  # (state, remainder by 15) after words of one length -> the smallest such word
    for _ in range(BITS):
        longer: dict[tuple[int, int], int] = {}
        for (state, _rest), word in smallest.items():
            for number in (2 * word, 2 * word + 1):
                key = machine.steps[state][number % 2], number % 15
                longer[key] = min(number, longer.get(key, number))
        smallest = longer
    rule = answer(np.arange(15))
    return min((word for (state, rest), word in smallest.items() if machine.outputs[state] != rule[rest]), default=None)


def exact(array: np.ndarray) -> Exact:
    return np.vectorize(Fraction, otypes=[object])(array)  # type: ignore[no-any-return]


def norm(matrix: Exact) -> Fraction:
    """The operator norm for row vectors in the 1-norm."""
    return Fraction(abs(matrix).sum(axis=1).max())


def error_bound(weights: Weights, points: np.ndarray, machine: Automaton) -> tuple[Fraction, Fraction]:
    """How far a score can be from that of its point after 64 bits, and how far it may be; see the module docstring.

    The points have to be a basis, because otherwise they do not determine the vectors between them.
    """
    x, operators, scores = exact(points), exact(weights.operators), exact(weights.scores)
    if x.shape[0] != x.shape[1] or np.linalg.matrix_rank(points) < len(points):
        raise NotProvedError(f"its {len(points)} states are not a basis of its {x.shape[1]} dimensions, so there is no error bound")
    y = exact(np.linalg.inv(points))  # X^-1 up to a factor (I + F)^-1, as X y = I + F
    factor = norm(x @ y - np.eye(len(x), dtype=int))
    if factor >= 1:
        raise NotProvedError("its states are nearly linearly dependent, so there is no error bound")
    gamma = len(x) * ROUNDING / (1 - len(x) * ROUNDING)
    deviations = [x @ operator - x[[to[bit] for to in machine.steps]] for bit, operator in enumerate(operators)]
    deviation = max(norm(matrix @ y) for matrix in deviations) / (1 - factor)
    rounding = max(gamma * norm(abs(x) @ abs(operator) @ abs(y)) for operator in operators) / (1 - factor)
    drift = (1 + deviation + rounding) ** BITS - 1

    outputs = x @ scores  # (states, classes)
    error = drift * abs(outputs).max() + gamma * (1 + drift) * (abs(x) @ abs(scores)).max()
    right = np.eye(outputs.shape[1], dtype=bool)[machine.outputs]
    return error, min(outputs[right].min() - Fraction(1, 2), Fraction(1, 2) - outputs[~right].max())
