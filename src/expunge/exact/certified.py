"""Certified removal from a linear classifier: a Newton step, a bound on its error, and noise that hides the error.

Source: Guo et al., "Certified Data Removal from Machine Learning Models" (ICML 2020). One-vs-rest logistic regression
minimises L(θ) = Σ log(1 + exp(-y θᵀx)) + (λn/2) ‖θ‖² + bᵀθ with a secret b ~ N(0, σ²). Removing m records moves θ by
H⁻¹Δ, where Δ is their share of the gradient, mλθ + Σ∇ℓ, and H the Hessian on what is left. The gradient of what is
left is then not zero but at most γ‖X‖₂‖H⁻¹Δ‖‖XH⁻¹Δ‖ with γ = 1/4 (for any data: 4γm²/(λ²n)). The noise b hides
gradients up to a budget σε/c, c = √(2 ln(1.5/δ)).

Deviations: the noise of all classes together hides the gradients of all classes together (root of the sum of squares),
so that (ε, δ) holds for the whole model and not for each class alone; the gradient that the fit and the linear solver
leave is measured and counted too; the bound for any data takes account of b, which the paper's ‖θ‖ ≤ 1/λ leaves out;
Newton's method with step halving in place of L-BFGS; two classes share one θ; more than one Newton step is offered.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from expunge import params
from expunge.batches import Batches, Examples, indexed, micro_batches, to_device
from expunge.errors import ConfigError
from expunge.exact.head import Certified, Head, Removal, require_classes, require_short
from expunge.seeds import keeping_random_state
from expunge.trace import Trace

__all__ = ["Certified", "CertifiedLinear", "Removal", "extract_features", "fit"]


class CertifiedLinear(nn.Module):
    """A linear classifier over features from which records can be removed.

    It keeps the features that it was trained on, less what was removed; ``trace`` counts the fit and all removals.
    """

    def __init__(self, data: Examples, config: Certified, *, classes: int, seed: int) -> None:
        super().__init__()
        self.data, self.trace = data, Trace("certified", seed)
        features, labels = data.tensors
        with self.trace.stage("fit", self):
            self.head = Head(features, labels, config, classes=classes, seed=seed)
        self.trace.backwarded = self.head.passed

    def forward(self, features: Float[Tensor, "n features"]) -> Float[Tensor, "n classes"]:
        """Logits of feature vectors."""
        logits: Tensor = self.head(features)
        return logits

    def remove(self, positions: Int[Tensor, " _"]) -> Removal:
        """Delete records: a Newton step if the budget allows it, else as ``when_spent`` says.

        Args:
            positions: Of the records, as in ``data.positions``.

        Raises:
            ConfigError: A position that is not there, or all of them; nothing has changed then.
        """
        left, gone = self.data.without(positions), self.data.only(positions)
        if not len(left):
            raise ConfigError(f"all {len(gone)} records are to be removed: nothing is left to learn from.")
        features, labels = left.tensors
        with self.trace.stage("remove", self):
            removal = self.head.move(features, labels, self.head.pull(*gone.tensors))
        self.trace.backwarded = self.head.passed
        if removal.outcome != "refused":
            self.data = left
        return removal


def fit(data: Batches, config: Certified, *, classes: int, seed: int) -> CertifiedLinear:
    """Train a linear classifier from which records can be removed.

    Args:
        data: `Examples` of feature vectors no longer than 1 (`extract_features` makes them) and class numbers. There
            is no intercept: add a constant feature for one, before dividing by the length.
        config: What is promised.
        classes: How many there are.
        seed: Names the stream of the noise b, which must stay secret: so must the seed.

    Raises:
        ConfigError: Data of another form, class numbers out of range, or a feature vector longer than 1.
        NotFinite: The problem is too badly conditioned.
    """
    tensors = data.tensors if isinstance(data, Examples) else ()
    if len(tensors) != 2 or tensors[0].ndim != 2 or tensors[1].ndim != 1 or not len(tensors[0]):
        raise ConfigError(
            f"data is {type(data).__name__} of shapes {[tuple(t.shape) for t in tensors]}: certified removal needs "
            "Examples(features, labels) of shapes (n, features) and (n,). extract_features() makes them from a model."
        )
    assert isinstance(data, Examples)
    require_classes(tensors[1], classes)
    require_short(tensors[0], "every feature vector by its own length; extract_features() does")
    return CertifiedLinear(data, config, classes=classes, seed=seed)


def extract_features(model: nn.Module, data: Batches, *, batch_size: int = 512) -> Examples:
    """What a model says about inputs, in eval mode, each vector divided by its length; in float64 on the CPU.

    The certificate covers what is trained on these features, not the model: it must not have seen the records.

    Args:
        model: Without its last layer: inputs -> (n, ...) of features.
        data: Batches of (inputs, class numbers); records keep the positions they have.
        batch_size: Positions a batch.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))  # a body may have none
    features, labels = [], []
    with params.restoring_modes(model), keeping_random_state(), torch.no_grad():
        model.eval()
        for _, (inputs, names) in micro_batches(data, batch_size)[1]:
            raw = model(to_device(inputs, device)).flatten(1).cpu().double()
            features.append(functional.normalize(raw, dim=1))
            labels.append(names.cpu())
    known = indexed(data)
    positions = known.positions if known is not None else None
    return Examples(torch.cat(features), torch.cat(labels), positions=positions)
