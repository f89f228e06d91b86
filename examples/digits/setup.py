"""A complete setup file: what the command line needs to know about one's own model and data.

The commands that use it are in docs/own-model.md; train.py beside it writes the records and the weights, delete.py
deletes records. All work in the current folder.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from expunge import Examples, Recipe, cross_entropy

RECORDS = Path("records.safetensors")
TRAINED = 500  # of the 1,797 digits


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
recipe = Recipe(
    epochs=40, lr=1e-3, batch_size=50, optimizer="adamw", weight_decay=0.01, schedule="constant"
)  # train.py


def original() -> Examples:
    """All training records, before anything is deleted: for `expunge cache`."""
    return retain()


def retain() -> Examples:
    """What is on disk now. Every record keeps the position it had in the original data."""
    stored = load_file(RECORDS)
    return Examples(stored["images"], stored["labels"], positions=stored["positions"])


def test() -> Examples:
    """Records that nothing was trained on: the digits behind the first 500."""
    digits = load_digits()
    images = torch.from_numpy(digits.images[TRAINED:]).float() / 16
    return Examples(images, torch.from_numpy(digits.target[TRAINED:]).long())
