r"""A complete setup file: what the command line needs to know about one's own model and data.

    python examples/digits/train.py                       # your training; writes records and weights
    expunge cache examples/digits/setup.py --weights model.safetensors --out cache.safetensors
    python examples/digits/delete.py 3 14 159             # these three records are gone
    expunge unlearn examples/digits/setup.py --weights model.safetensors --cache cache.safetensors \
        --out unlearned.safetensors reload --reset-fraction 0.2 --fine-tune.epochs 10 --fine-tune.lr 0.05
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from expunge import Examples, cross_entropy

RECORDS = Path("records.safetensors")


class Network(nn.Module):
    """Any module of yours."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.layers(images)
        return logits


def model(seed: int) -> nn.Module:
    """An untrained network: the architecture, and where re-initialised weights come from."""
    torch.manual_seed(seed)
    return Network()


loss_terms = cross_entropy  # one loss an example, never a mean


def original() -> Examples:
    """All training records, before anything is deleted: for `expunge cache`."""
    return retain()


def retain() -> Examples:
    """What is on disk now. Every record keeps the position it had in the original data."""
    stored = load_file(RECORDS)
    return Examples(stored["images"], stored["labels"], positions=stored["positions"])
