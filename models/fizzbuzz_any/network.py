"""FizzBuzz as a linear second-order recurrent network over 64 bits, fitted without gradients."""

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from models.network import Classifier

BITS = 64
TRAIN_BITS = 10  # length of a training word, with leading zeros
MIN_SCORE = 1e-6  # lower bound of a score before the softmax normalises the scores


class Network(Classifier):
    """Reads a number's bits from the highest to the lowest: state <- state @ operators[bit]; then state @ scores.

    Such a network is a weighted finite automaton, and the spectral method fits it (Balle et al. 2014, "Spectral learning of
    weighted automata"; Rabusseau, Li, Precup 2019, "Connecting weighted automata and recurrent neural networks through
    spectral learning"). The dimension of the state is the rank that `solve` finds, so the weights determine the shapes. The sign
    of a number is ignored. All arithmetic is float64; `proof.py` bounds the rounding error of 64 steps.
    """

    def __init__(self, *, suffix_bits: int) -> None:
        """`suffix_bits`: length of the suffixes into which `solve` splits the training words."""
        super().__init__()
        self.suffix_bits = suffix_bits
        self.initial = nn.Parameter(torch.empty(0, dtype=torch.float64))  # (states,)
        self.operators = nn.Parameter(torch.empty(2, 0, 0, dtype=torch.float64))  # (bit, states, states)
        self.scores = nn.Parameter(torch.empty(0, 4, dtype=torch.float64))  # (states, 4)
        self.masks = nn.Buffer(2 ** torch.arange(BITS).flip(0), persistent=False)  # the first is -2**63

    def outputs(self, inputs: Tensor) -> Tensor:
        """(batch,) integers -> logits, (batch, 4)."""
        bits = (inputs.abs().unsqueeze(1) & self.masks) != 0  # (batch, 64); abs(-2**63) has the bits of 2**63
        zero, one = self.operators
        state = self.initial.expand(inputs.shape[0], -1)  # (batch, states)
        for bit in bits.split(1, dim=1):  # (batch, 1)
            state = torch.where(bit, state @ one, state @ zero)
        return (state @ self.scores).clamp(min=MIN_SCORE).log().float()  # (batch, 4)

    @torch.no_grad()
    def solve(self, inputs: Tensor, targets: Tensor) -> None:
        """Fit the weights to numbers from 0 to 1023 by the spectral method: a few least-squares problems, nothing random.

        The row of prefix p in the Hankel matrix has the classes of all numbers p * 2**suffix_bits + s; the prefix is complete when
        all of them are training rows. The projection of p's row on the row space is the state after reading p.
        """
        rows = torch.full((2**TRAIN_BITS, 4), torch.nan, dtype=torch.float64, device=inputs.device)
        rows[inputs] = one_hot(targets, 4).double()
        hankel = rows.view(2 ** (TRAIN_BITS - self.suffix_bits), -1)  # (prefixes, suffixes * 4)
        complete = ~hankel.isnan().any(dim=1)  # (prefixes,)
        singular, directions = torch.linalg.svd(hankel[complete], full_matrices=False)[1:]
        rank = int(torch.linalg.matrix_rank(hankel[complete]))
        states = hankel @ (directions[:rank] / singular[:rank, None]).T  # (prefixes, rank)

        half = len(states) // 2  # p, 2 p and 2 p + 1 are prefixes
        step = complete[:half] & complete[0::2] & complete[1::2]
        before = torch.linalg.pinv(states[:half][step])
        self.operators.data = torch.stack([before @ states[bit::2][step] for bit in (0, 1)])

        words = torch.eye(rank, dtype=torch.float64, device=inputs.device).unsqueeze(0)
        for _ in range(TRAIN_BITS - self.suffix_bits):
            words = (words.unsqueeze(1) @ self.operators).flatten(0, 1)  # (prefixes, rank, rank) after the last step
        paths = words[complete].transpose(0, 1).flatten(1)  # (rank, complete prefixes * rank)
        self.initial.data = states[complete].flatten() @ torch.linalg.pinv(paths)

        reached = self.initial @ words  # (prefixes, rank)
        for _ in range(self.suffix_bits):
            reached = (reached.unsqueeze(1).unsqueeze(1) @ self.operators).squeeze(2).flatten(0, 1)  # (words, rank)
        trained = ~rows.isnan().any(dim=1)  # (words,), ordered by number, so that shuffled rows give the same weights
        self.scores.data = torch.linalg.pinv(reached[trained]) @ rows[trained]

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            parameter.data = torch.empty_like(state_dict[prefix + name])
        super()._load_from_state_dict(state_dict, prefix, *rest)
