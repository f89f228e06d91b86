"""Remove deleted or corrected training data from a trained PyTorch model, without that data."""

from expunge import cache, exact, selectors
from expunge.access import Blind, Sighted
from expunge.batches import Batches, Examples, LossTerms
from expunge.gradient import Gradient, gradient
from expunge.importance import Importance
from expunge.losses import causal_lm, causal_lm_documents, cross_entropy, logit_margin, squared_error, tempered_margin
from expunge.methods import all_methods
from expunge.methods.amnesiac import Amnesiac
from expunge.methods.bad_teacher import BadTeacher
from expunge.methods.boundary_expand import BoundaryExpand
from expunge.methods.boundary_shrink import BoundaryShrink
from expunge.methods.cf_k import CFk
from expunge.methods.class_orthogonal_ascent import ClassOrthogonalAscent
from expunge.methods.duck import Duck
from expunge.methods.eu_k import EUk
from expunge.methods.fine_tune import FineTune
from expunge.methods.fisher import FisherForgetting
from expunge.methods.gar import GAR
from expunge.methods.gradient_ascent import GradientAscent
from expunge.methods.grda import GRDA
from expunge.methods.l1_sparse import L1Sparse
from expunge.methods.natural_ascent import NaturalAscent
from expunge.methods.orthogonal_ascent import OrthogonalAscent
from expunge.methods.reload import Reload
from expunge.methods.retrain import Retrain
from expunge.methods.salun import SalUn
from expunge.methods.scrub import Scrub
from expunge.methods.ssd import SSD, importance
from expunge.methods.unsir import Unsir
from expunge.methods.update_log import UpdateLog
from expunge.params import Params
from expunge.seeds import seeded, stream
from expunge.trace import Trace
from expunge.training import Recipe, train
from expunge.unlearn import Unlearned, unlearn

__all__ = [
    "GAR",
    "GRDA",
    "SSD",
    "Amnesiac",
    "BadTeacher",
    "Batches",
    "Blind",
    "BoundaryExpand",
    "BoundaryShrink",
    "CFk",
    "ClassOrthogonalAscent",
    "Duck",
    "EUk",
    "Examples",
    "FineTune",
    "FisherForgetting",
    "Gradient",
    "GradientAscent",
    "Importance",
    "L1Sparse",
    "LossTerms",
    "NaturalAscent",
    "OrthogonalAscent",
    "Params",
    "Recipe",
    "Reload",
    "Retrain",
    "SalUn",
    "Scrub",
    "Sighted",
    "Trace",
    "Unlearned",
    "Unsir",
    "UpdateLog",
    "all_methods",
    "cache",
    "causal_lm",
    "causal_lm_documents",
    "cross_entropy",
    "exact",
    "gradient",
    "importance",
    "logit_margin",
    "seeded",
    "selectors",
    "squared_error",
    "stream",
    "tempered_margin",
    "train",
    "unlearn",
]
