"""GAR: climb the loss on all of the original data, then learn the corrected data again.

Source: "Blind Unlearning: Unlearning Without a Forget Set", section 4.3 (Gradient Ascent Relearn, a baseline for
corrections). Deviations: the paper gives epochs and learning rate only; momentum 0.9 and batches of 128 are ours. An
epoch of ascent that passes a bound on the loss is taken back, and relearning starts from the one before. BatchNorm
statistics stay as they are during the ascent, since the faulty records must not enter them.

Needs: all of the original data beside what is left (or its corrected form); any loss.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from expunge.access import Sighted
from expunge.batches import Batch
from expunge.errors import ForgetSetAccessed
from expunge.methods.guard import LESS_ASCENT, keeping_what_is_left, require_bound, taking_back
from expunge.seeds import derive
from expunge.space import Range, Space
from expunge.trace import Trace
from expunge.training import Recipe, mean_loss, train


@dataclass(frozen=True, kw_only=True)
class GAR:
    """Gradient ascent on all original data, then descent on the corrected data.

    Raises:
        ConfigError: A loss bound that is not positive.
    """

    ascent: Recipe = Recipe(epochs=10, lr=1e-3, weight_decay=0.0, schedule="constant")  # on the original data
    descent: Recipe = Recipe(epochs=10, lr=1e-3, schedule="constant")  # on what is left, or its corrected form
    loss_bound: float = 5.0  # mean loss on the original data, nats a term, at which the ascent ends

    def __post_init__(self) -> None:
        require_bound(self.loss_bound)


SPACE: Space = {"ascent.lr": Range(1e-5, 0.3, log=True), "descent.lr": Range(1e-4, 0.3, log=True)}


def gar(model: nn.Module, given: Sighted, config: GAR, *, seed: int, trace: Trace) -> nn.Module:
    """Descent on the negated loss over D, then on the loss over D_new.

    ``trace.losses`` holds the negated losses of the ascent first. ``trace.facts``: ascent_stopped (why it ended).

    Raises:
        ForgetSetAccessed: The original data was not given.
    """
    original = given.original
    if original is None:
        raise ForgetSetAccessed(
            "original=None: gar climbs the loss on all of the original data and was not given it. Give "
            "Sighted(original=…), or take a method that needs less: reload, fine-tune."
        )

    def negated(model: nn.Module, batch: Batch) -> Tensor:
        return -given.loss_terms(model, batch)

    with trace.stage("ascend", model):
        up, terms = derive(seed, "ascend"), given.loss_terms
        stop = taking_back(
            model, config.loss_bound, lambda now: mean_loss(now, original, terms, trace), trace=trace, cure=LESS_ASCENT
        )
        train(model, original, negated, config.ascent, seed=up, trace=trace, stop=stop, freeze_statistics=True)
        trace.facts["ascent_stopped"] = trace.stopped
    with trace.stage("relearn", model):
        stop = keeping_what_is_left(model, given, config.loss_bound, trace, config.descent.epochs)
        train(model, given.retain, terms, config.descent, seed=derive(seed, "relearn"), trace=trace, stop=stop)
    return model
