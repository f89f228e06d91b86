"""Remove deleted or corrected training data from a trained PyTorch model, without that data."""

from expunge import cache, selectors
from expunge.access import Blind, Sighted
from expunge.batches import Batches, Examples, LossTerms
from expunge.gradient import Gradient, gradient
from expunge.losses import causal_lm, cross_entropy, squared_error
from expunge.methods import METHODS
from expunge.methods.fine_tune import FineTune
from expunge.methods.gradient_ascent import GradientAscent
from expunge.methods.reload import Reload
from expunge.methods.retrain import Retrain
from expunge.params import Params
from expunge.seeds import seeded, stream
from expunge.trace import Trace
from expunge.training import Recipe, train
from expunge.unlearn import Unlearned, unlearn

__all__ = [
    "METHODS",
    "Batches",
    "Blind",
    "Examples",
    "FineTune",
    "Gradient",
    "GradientAscent",
    "LossTerms",
    "Params",
    "Recipe",
    "Reload",
    "Retrain",
    "Sighted",
    "Trace",
    "Unlearned",
    "cache",
    "causal_lm",
    "cross_entropy",
    "gradient",
    "seeded",
    "selectors",
    "squared_error",
    "stream",
    "train",
    "unlearn",
]
