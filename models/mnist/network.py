"""A small convolutional network over 28 x 28 pixels, scaled inside."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample

from models.network import Classifier

SIDE = 28  # pixels
ROTATION, SCALE, SHIFT = math.radians(12), 0.1, 2 / SIDE  # at most, either way; the shift in sides


def block(channels_in: int, channels_out: int, size: int, *, padding: int = 0, pool: bool = False) -> nn.Sequential:
    """Convolution -> halved by maximum where `pool` -> batch norm -> ReLU; pooled early, as all else costs less then."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, size, padding=padding, bias=False),
        nn.MaxPool2d(2) if pool else nn.Identity(),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


class Network(Classifier):
    """Four convolutions, two of them pooled, and one linear layer: 109,000 parameters."""

    def __init__(self, *, name: str = "cnn") -> None:
        super().__init__()
        if name != "cnn":
            raise ValueError(f"there is no network {name!r}; use cnn")
        self.layers = nn.Sequential(
            block(1, 16, 5, padding=2, pool=True),  # (batch, 16, 14, 14)
            block(16, 32, 3, padding=1, pool=True),  # (batch, 32, 7, 7)
            block(32, 64, 3),  # (batch, 64, 5, 5)
            block(64, 128, 3),  # (batch, 128, 3, 3)
            nn.Flatten(),
            nn.Linear(128 * 3 * 3, 10),
        ).to(memory_format=torch.channels_last)

    def augment(self, inputs: Tensor) -> Tensor:
        """(batch, 28, 28) ink -> the same, each picture turned, stretched and shifted a little at random."""
        angle, width, height, right, down = torch.rand(5, len(inputs), device=inputs.device) * 2 - 1
        angle, width, height = angle * ROTATION, 1 + width * SCALE, 1 + height * SCALE
        row = torch.stack([angle.cos() * width, -angle.sin() * height, right * 2 * SHIFT], dim=1)
        column = torch.stack([angle.sin() * width, angle.cos() * height, down * 2 * SHIFT], dim=1)
        grid = affine_grid(torch.stack([row, column], dim=1), [len(inputs), 1, SIDE, SIDE], align_corners=False)
        return grid_sample(inputs.unsqueeze(1).float(), grid, align_corners=False).squeeze(1)

    def logits(self, inputs: Tensor) -> Tensor:
        """(batch, 28, 28) ink from 0 to 255 -> (batch, 10)."""
        logits: Tensor = self.layers(inputs.unsqueeze(1).float() / 255)
        return logits
