"""The setup file of the demo, copied beside the data of each run: all that an unlearning process gets to see."""

from pathlib import Path

from safetensors.torch import load_file

from expunge import Examples, cross_entropy
from expunge.models.convnet import ConvNet

loss_terms = cross_entropy


def model(seed: int) -> ConvNet:  # noqa: ARG001 - the global generators are seeded by the caller
    """An untrained network."""
    return ConvNet(widths=(16, 32))


def retain() -> Examples:
    """The records on disk: all of them at first, what is left after a deletion."""
    stored = load_file(Path(__file__).with_name("data.safetensors"))
    return Examples(stored["images"], stored["labels"], positions=stored["positions"])


original = retain
