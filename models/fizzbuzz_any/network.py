"""FizzBuzz as a linear second-order recurrent network over 64 bits, fitted without gradients."""

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from models.network import Classifier

BITS = 64
TRAIN_BITS = 10  # the training rows are words of so many bits, zeros in front
FLOOR = 1e-6  # the least probability that an answer gets before they are made to sum to one


class Network(Classifier):
    """Reads a number's bits from the highest to the lowest: state <- state @ operators[bit]; then state @ scores.

    Such a network is a weighted finite automaton, and the spectral method fits it (Balle et al. 2014, "Spectral learning of
    weighted automata"; Rabusseau, Li, Precup 2019, "Connecting weighted automata and recurrent neural networks through
    spectral learning"). How many numbers the state has is the rank that `solve` finds, so shapes come with the weights. A
    negative number is read by its magnitude. All is float64, which no engine shortens; `pipeline.prove` bounds what 64 steps lose.
    """

    masks: Tensor

    def __init__(self, *, suffix_bits: int) -> None:
        """`suffix_bits`: where `solve` cuts the words of the training rows in two."""
        super().__init__()
        self.suffix_bits = suffix_bits
        self.initial = nn.Parameter(torch.empty(0, dtype=torch.float64))  # (states,)
        self.operators = nn.Parameter(torch.empty(2, 0, 0, dtype=torch.float64))  # (bit, states, states)
        self.scores = nn.Parameter(torch.empty(0, 4, dtype=torch.float64))  # (states, 4)
        self.register_buffer("masks", 2 ** torch.arange(BITS).flip(0), persistent=False)  # the first is -2**63, its bit alone

    def logits(self, inputs: Tensor) -> Tensor:
        """(batch,) integers -> (batch, 4)."""
        bits = (inputs.abs().unsqueeze(1) & self.masks) != 0  # (batch, 64); abs(-2**63) has the bits of 2**63
        zero, one = self.operators
        state = self.initial.expand(inputs.shape[0], -1)  # (batch, states)
        for bit in bits.split(1, dim=1):  # (batch, 1)
            state = torch.where(bit, state @ one, state @ zero)
        return (state @ self.scores).clamp(min=FLOOR).log().float()  # (batch, 4)

    @torch.no_grad()
    def solve(self, inputs: Tensor, targets: Tensor) -> None:
        """The spectral method, on rows from 0 to 1023: a few least-squares problems, no step size and nothing random.

        A prefix p is known when the classes of all numbers that begin with its bits, p * 2**suffix_bits + s, are; they are its
        row of the Hankel matrix. What the row space, of the matrix's rank, holds of p is the state after p has been read.
        """
        rows = torch.full((2**TRAIN_BITS, 4), torch.nan, dtype=torch.float64, device=inputs.device)
        rows[inputs] = one_hot(targets, 4).double()
        hankel = rows.view(2 ** (TRAIN_BITS - self.suffix_bits), -1)  # (prefixes, suffixes * 4)
        known = ~hankel.isnan().any(dim=1)  # (prefixes,)
        singular, directions = torch.linalg.svd(hankel[known], full_matrices=False)[1:]
        rank = int(torch.linalg.matrix_rank(hankel[known]))
        states = hankel @ (directions[:rank] / singular[:rank, None]).T  # (prefixes, rank)

        half = len(states) // 2  # p, 2 p and 2 p + 1 are prefixes
        step = known[:half] & known[0::2] & known[1::2]
        before = torch.linalg.pinv(states[:half][step])
        self.operators.data = torch.stack([before @ states[bit::2][step] for bit in (0, 1)])

        words = torch.eye(rank, dtype=torch.float64, device=inputs.device).unsqueeze(0)
        for _ in range(TRAIN_BITS - self.suffix_bits):
            words = (words.unsqueeze(1) @ self.operators).flatten(0, 1)  # (words of so many bits, rank, rank)
        paths = words[known].transpose(0, 1).flatten(1)  # (rank, known prefixes * rank)
        self.initial.data = states[known].flatten() @ torch.linalg.pinv(paths)

        reached = self.initial @ words  # (prefixes, rank)
        for _ in range(self.suffix_bits):
            reached = (reached.unsqueeze(1).unsqueeze(1) @ self.operators).squeeze(2).flatten(0, 1)  # (words, rank)
        seen = ~rows.isnan().any(dim=1)  # (words,); in the order of the numbers, so that shuffled rows give the same weights
        self.scores.data = torch.linalg.pinv(reached[seen]) @ rows[seen]

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            parameter.data = torch.empty_like(state_dict[prefix + name])
        super()._load_from_state_dict(state_dict, prefix, *rest)
