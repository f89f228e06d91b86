"""The shadow-model attack: what members look like is learned on models of one's own."""

import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from expunge.errors import ConfigError, MismatchError, MissingExtra
from expunge.metrics.outputs import Outputs
from expunge.metrics.roc import Attack, judge

_LEAST = 5  # shadow records of a class, members and others each


def shadow_attack(
    target: Outputs,
    member: Bool[np.ndarray, " _"],
    shadows: Sequence[tuple[Outputs, Bool[np.ndarray, " _"]]],
    *,
    seed: int = 0,
) -> Attack:
    """Shokri's attack, the one that the RELOAD paper cites for ΔFMIA.

    For each class a small network (64 hidden units, 50 epochs) learns on the shadow models' softmax outputs to tell
    their members from others; it is judged on the target model, at a probability of 0.5. It sees logarithms of the
    probabilities, standardised: the same information, but 0.9999 and 0.99 differ.

    Args:
        target: Outputs of the attacked model on records that no shadow model was trained on.
        member: Which of them it is asked about (True), and which it never saw (False).
        shadows: For each shadow model its outputs on records of its own, and on which of them it was trained.
        seed: Of the attack networks.

    Source: Shokri et al., Membership Inference Attacks Against Machine Learning Models (2017).

    Raises:
        MismatchError: Outputs and marks of different lengths, or other numbers of classes.
        ConfigError: No shadow model, a class with fewer than five shadow members or others, or fewer than five
            records of a kind to judge.
        MissingExtra: scikit-learn is not installed.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.neural_network import MLPClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise MissingExtra("membership attacks need scikit-learn: pip install 'expunge[eval]'.") from error
    if not shadows:
        raise ConfigError("no shadow model: the attack learns from at least one, trained like the target.")
    for found, mark in ((target, member), *shadows):
        if len(found.labels) != len(mark) or found.logits.shape[1] != target.logits.shape[1]:
            raise MismatchError(
                f"outputs of shape {found.logits.shape} with {len(mark)} marks of membership, beside a target with "
                f"{target.logits.shape[1]} classes: every record needs a mark, and all models the same classes."
            )
    inputs = np.concatenate([_inputs(outputs) for outputs, _ in shadows])
    labels = np.concatenate([outputs.labels for outputs, _ in shadows])
    truth = np.concatenate([mark for _, mark in shadows])
    scores = np.empty(len(member))
    for label in np.unique(target.labels):
        fit, judged = labels == label, target.labels == label
        counts = int(truth[fit].sum()), int((~truth[fit]).sum())
        if min(counts) < _LEAST:
            raise ConfigError(
                f"class {label}: {counts[0]} shadow members and {counts[1]} others; the attack needs {_LEAST} of "
                "each. Train more shadow models, or give them more records."
            )
        network = MLPClassifier((64,), max_iter=50, random_state=seed)
        attack = make_pipeline(StandardScaler(), network)
        with warnings.catch_warnings():  # a fixed number of epochs is meant
            warnings.simplefilter("ignore", ConvergenceWarning)
            attack.fit(inputs[fit], truth[fit])
        scores[judged] = attack.predict_proba(_inputs(target)[judged])[:, 1]
    return judge(scores[member], scores[~member], threshold=0.5)


def _inputs(outputs: Outputs) -> Float[np.ndarray, "examples classes"]:
    clipped: Float[np.ndarray, "examples classes"] = np.maximum(outputs.log_probabilities, -50.0)
    return clipped  # so that one hopeless class does not set the scale
