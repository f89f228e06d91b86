"""The introspection figure (Figure 2 of the RELOAD paper) for any model, dataset and class.

One removed image at steps 1 (trained), 3 (after the ascent) and 4 (after the re-initialisation): the first channel of
the outputs of the 1st, 3rd and 5th convolution, and the log-probabilities; t-SNE of the penultimate features of test
records at these steps and at step 5 (after fine-tuning). The whole class is removed.
Claim: the ascent lowers the probability of the removed class, re-initialisation destroys what is left of its features,
and fine-tuning brings back the other classes.
Data: the digits that come with scikit-learn by default (downsampled pictures of 8 x 8, where the paper has SVHN), or a
dataset that `expunge data get` has got.
Cost: 15 seconds on one core for the digits; training for anything larger.
Expected (digits, class 8): log-probability of the image 0.00, -7.46, -4.06, and -6.01 nats after fine-tuning; the
removed class a cluster of its own at first, and between the others in the end.

    python experiments/figure2.py                       # writes figure2.* into the current folder
    python experiments/figure2.py --out docs/figure2    # the figure of docs/reload.md
    python experiments/figure2.py --dataset cifar10 --folder data --model convnet --removed 3 --train 5000
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from expunge.access import Blind
from expunge.batches import Examples
from expunge.bench.introspection import introspect
from expunge.data import read
from expunge.data.digits import CLASSES, COUNT, digits
from expunge.data.images import Images, normalisation, to_examples
from expunge.gradient import gradient
from expunge.losses import cross_entropy
from expunge.methods.reload import Reload
from expunge.models import build
from expunge.report.introspection import write_figure
from expunge.scenarios.removal import class_removal
from expunge.training import Recipe, train


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which figure."""

    dataset: str = "digits"  # or one of expunge.data.READERS
    folder: Path = Path("data")  # where datasets are
    model: str = "convnet"  # one of expunge.models.MODELS
    widths: tuple[int, ...] = (16, 32, 32)  # of the convnet: the output channels of its convolutions
    removed: int = 8  # the class
    train: int = 1000  # training images, at most
    epochs: int = 30
    lr: float = 0.05
    priming_lr: float = 5.0
    reset_fraction: float = 0.2
    fine_tune_epochs: int = 6
    fine_tune_lr: float = 0.05
    seed: int = 0
    out: Path = Path("figure2")  # without an ending


def data(options: Options) -> tuple[Examples, Examples, int]:
    """Training and test images, and the number of classes."""
    if options.dataset == "digits":
        split = digits(min(options.train, COUNT - 400), seed=options.seed)
        return split.train, split.test, CLASSES
    found = read(options.dataset, options.folder)
    assert found.test is not None
    scale = normalisation(found.train)
    few = found.train.pixels[: options.train], found.train.labels[: options.train]
    return to_examples(Images(*few), scale), to_examples(found.test, scale), len(found.classes)


def main(options: Options) -> None:
    """Train, cache, remove the class, unlearn while watching, draw."""
    torch.set_num_threads(1)
    original, test, classes = data(options)
    settings: dict[str, Any] = {"classes": classes}
    if options.model == "convnet":
        settings |= {"channels": original.tensors[0].shape[1], "widths": options.widths}
    model = build(options.model, seed=options.seed, **settings)
    recipe = Recipe(epochs=options.epochs, lr=options.lr, batch_size=64)
    train(model, original, cross_entropy, recipe, seed=options.seed)
    gone = class_removal(original.tensors[1], options.removed)
    given = Blind(
        retain=original.without(gone),
        loss_terms=cross_entropy,
        fresh=lambda seed: build(options.model, seed=seed, **settings),
        full=gradient(model, cross_entropy, original),
    )
    config = Reload(
        priming_lr=options.priming_lr,
        reset_fraction=options.reset_fraction,
        fine_tune=Recipe(epochs=options.fine_tune_epochs, lr=options.fine_tune_lr, batch_size=64),
    )
    found = introspect(model, given, config, original.only(gone), test, seed=options.seed)
    title = f"RELOAD inside a {options.model} on {options.dataset}, class {options.removed} removed"
    for path in write_figure(options.out, found, title):
        print(path)
    for step in found.steps:
        own = float(step.log_probabilities[options.removed])
        print(f"step {step.number} ({step.name}): log-probability of class {options.removed} is {own:.2f} nats")


if __name__ == "__main__":
    main(tyro.cli(Options))
