"""Networks for images of 28 x 28 pixels. Scaling is part of the network; all use the same augmentation."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample

from models.network import Classifier

SIDE = 28  # pixels


def block(channels_in: int, channels_out: int, size: int, *, padding: int = 0, pool: bool = False) -> nn.Sequential:
    """Convolution -> 2 x 2 max pooling if `pool` -> batch norm -> ReLU. Pooling first makes the other steps cheaper."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, size, padding=padding, bias=False),
        nn.MaxPool2d(2) if pool else nn.Identity(),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


def cnn(first: int = 16, second: int = 32, third: int = 64, fourth: int = 128) -> nn.Module:
    """Four convolutions with these numbers of channels, two of them pooled, and one linear layer; 109,000 parameters by default."""
    return nn.Sequential(
        block(1, first, 5, padding=2, pool=True),  # (batch, first, 14, 14)
        block(first, second, 3, padding=1, pool=True),  # (batch, second, 7, 7)
        block(second, third, 3),  # (batch, third, 5, 5)
        block(third, fourth, 3),  # (batch, fourth, 3, 3)
        *(nn.Flatten(), nn.Linear(fourth * 3 * 3, 10)),
    )


def tiny() -> nn.Module:
    """The same shape with 7,864 parameters."""
    return cnn(10, 14, 16, 18)


def record() -> nn.Module:
    """Five convolutions with 320,000 parameters, pooled late; benchmarks/networks.py has the settings to train it with."""
    return nn.Sequential(
        block(1, 48, 3),  # (batch, 48, 26, 26)
        block(48, 48, 3, pool=True),  # (batch, 48, 12, 12)
        block(48, 96, 3),  # (batch, 96, 10, 10)
        block(96, 96, 3, pool=True),  # (batch, 96, 4, 4)
        block(96, 192, 3),  # (batch, 192, 2, 2)
        *(nn.Flatten(), nn.Linear(192 * 2 * 2, 10)),
    )


def mlp() -> nn.Module:
    """Five linear layers, from a well-known tutorial (S. Kim, PyTorch Zero To All, lesson 9): 575,000 parameters."""
    hidden = [layer for sizes in pairwise((SIDE * SIDE, 512, 256, 128, 64)) for layer in (nn.Linear(*sizes), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 10))


class Inception(nn.Module):
    """Four parallel branches, concatenated (Szegedy et al. 2014): (batch, channels, h, w) -> (batch, 88, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        one = nn.Conv2d(channels, 16, 1)
        five = nn.Sequential(nn.Conv2d(channels, 16, 1), nn.Conv2d(16, 24, 5, padding=2))
        three = nn.Sequential(nn.Conv2d(channels, 16, 1), nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1))
        pooled = nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), nn.Conv2d(channels, 24, 1))
        self.branches = nn.ModuleList([one, five, three, pooled])

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([branch(inputs) for branch in self.branches], dim=1)  # (batch, 16 + 24 + 24 + 24, h, w)


def inception() -> nn.Module:
    """Two Inception blocks, from the same tutorial (lesson 11): 97,000 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU()),  # (batch, 10, 12, 12)
        Inception(10),  # (batch, 88, 12, 12)
        *(nn.Conv2d(88, 20, 5), nn.MaxPool2d(2), nn.ReLU()),  # (batch, 20, 4, 4)
        Inception(20),  # (batch, 88, 4, 4)
        *(nn.Flatten(), nn.Linear(88 * 4 * 4, 10)),
    )


NETWORKS: dict[str, Callable[..., nn.Module]] = {network.__name__: network for network in (cnn, mlp, inception, tiny, record)}


class Network(Classifier):
    """One of NETWORKS. Raises ValueError for another name."""

    def __init__(self, *, name: str = "cnn", rotation: float = 12, scale: float = 0.1, shift: float = 2) -> None:
        """Digits are augmented by up to `rotation` degrees, a relative `scale`, and a `shift` in pixels."""
        super().__init__()
        self.rotation, self.scale, self.shift = math.radians(rotation), scale, 2 * shift / SIDE  # of a grid from -1 to 1
        if name not in NETWORKS:
            raise ValueError(f"name: expected one of {', '.join(NETWORKS)}, got {name!r}")
        self.layers = NETWORKS[name]().to(memory_format=torch.channels_last)

    def augment(self, inputs: Tensor) -> Tensor:
        """(batch, 28, 28) ink -> the same shape, each image rotated, stretched and shifted at random."""
        angle, width, height, right, down = torch.rand(5, len(inputs), device=inputs.device) * 2 - 1
        angle, width, height = angle * self.rotation, 1 + width * self.scale, 1 + height * self.scale
        row = torch.stack([angle.cos() * width, -angle.sin() * height, right * self.shift], dim=1)
        column = torch.stack([angle.sin() * width, angle.cos() * height, down * self.shift], dim=1)
        grid = affine_grid(torch.stack([row, column], dim=1), [len(inputs), 1, SIDE, SIDE], align_corners=False)
        return grid_sample(inputs.unsqueeze(1).float(), grid, align_corners=False).squeeze(1)

    def outputs(self, inputs: Tensor) -> Tensor:
        """(batch, 28, 28) ink from 0 to 255 -> logits, (batch, 10)."""
        outputs: Tensor = self.layers(inputs.unsqueeze(1).float() / 255)
        return outputs
