"""Retraining from scratch on what is left: the yardstick, and the only exact answer.

Source: by definition (Cao & Yang, 2015, call it the naive solution). Deviations: none.

Needs: any loss.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expunge import params, sharding
from expunge.access import Blind
from expunge.errors import ConfigError, MismatchError
from expunge.methods.further import own_loop
from expunge.methods.guard import note_if_nothing_was_learned
from expunge.space import Space
from expunge.trace import Trace
from expunge.training import Recipe, is_frozen_normalisation, train


@dataclass(frozen=True, kw_only=True)
class Retrain:
    """Train an untrained model on what is left, as the original was trained.

    Raises:
        ConfigError: A file to resume from beside a loop of one's own.
    """

    recipe: Recipe | None = None  # of the original; None: with the loop of one's own in `Blind.train_from_scratch`
    resume: str | None = None  # a file from which a retraining that was interrupted goes on, see `train`

    def __post_init__(self) -> None:
        if self.recipe is None and self.resume is not None:
            raise ConfigError(f"resume={self.resume!r}: a loop of your own keeps its own state. Leave it out.")


SPACE: Space = {}  # the recipe is that of the original


def freeze_alike_(untrained: nn.Module, model: nn.Module) -> None:
    """Freeze what is frozen in the trained model, so that both train the same parameters.

    Raises:
        MismatchError: A parameter is frozen in the trained model alone, at values that ``fresh`` does not build.
    """
    fresh = params.named_parameters(untrained, lambda _, __: True)
    for name, p in params.named_parameters(model, lambda _, __: True).items():
        if not p.requires_grad and fresh[name].requires_grad:
            trained = sharding.whole(p.detach())
            if not torch.equal(trained, fresh[name].detach().to(trained)):
                raise MismatchError(
                    f"{name!r} is frozen in the trained model, and fresh() builds it trainable with other values. Let "
                    "fresh() load what was frozen during training; unfreeze what was frozen only afterwards."
                )
            fresh[name].requires_grad_(False)


def note_statistics_of_frozen(untrained: nn.Module, model: nn.Module, trace: Trace) -> None:
    """Warn of normalisations with frozen scales whose statistics moved in the training of the model.

    They stay as they are here, also in retraining, so that the two would differ for that reason alone.
    """
    built = dict(untrained.named_modules())
    for name, module in model.named_modules():
        if not is_frozen_normalisation(module):
            continue
        mean, fresh = module.running_mean, getattr(built.get(name), "running_mean", None)
        if isinstance(mean, Tensor) and isinstance(fresh, Tensor) and not torch.equal(mean, fresh.to(mean)):
            trace.warn(
                f"{name!r} has frozen scales, and other running statistics than fresh() builds. Frozen normalisations "
                "keep their statistics: let fresh() load those that the model has, or retrain with a loop of your own."
            )
            return


@torch.no_grad()
def _take_over_(model: nn.Module, untrained: nn.Module) -> None:
    """Put the parameters and buffers of a whole model into one that FSDP2 has sharded; its attributes stay.

    Raises:
        MismatchError: ``fresh`` builds other parameters or buffers, or freezes what the model trains.
    """
    values, own = (dict(each.named_parameters()) | dict(each.named_buffers()) for each in (untrained, model))
    params.require_same_names(values, own, "what fresh() builds", "the model")
    for name, tensor in own.items():
        if tensor.requires_grad and not values[name].requires_grad:
            raise MismatchError(
                f"{name!r} is frozen in what fresh() builds, and the model trains it. Freeze it in both, or in neither."
            )
        tensor.copy_(sharding.placed_like(values[name].detach(), tensor))


def retrain(model: nn.Module, given: Blind, config: Retrain, *, seed: int, trace: Trace) -> nn.Module:
    """Fresh weights for every module, then training.

    The trained model only says which device and mode, which types, and which parameters are frozen.

    Raises:
        MismatchError: ``fresh`` builds another architecture, or other values for parameters that were frozen since.
        ConfigError: Neither a recipe nor a loop of one's own.
    """
    if config.recipe is None and given.train_from_scratch is None:
        raise ConfigError(
            "recipe=None: how the original was trained is not known. Give Retrain(recipe=Recipe(epochs=…, lr=…)), or "
            "Blind(train_from_scratch=…), a loop of your own."
        )
    untrained = given.fresh_model(seed, model)
    freeze_alike_(untrained, model)
    note_statistics_of_frozen(untrained, model, trace)
    if sharding.is_sharded(model):
        _take_over_(model, untrained)
    else:
        model = untrained.to(next(model.parameters()).device).train(model.training)
    with trace.stage("train", model):
        if config.recipe is not None:
            train(model, given.retain, given.loss_terms, config.recipe, seed=seed, trace=trace, resume=config.resume)
            note_if_nothing_was_learned(trace)
        elif given.train_from_scratch is not None:
            with own_loop(model, seed, "train from scratch"):
                given.train_from_scratch(model, given.retain, seed)
    return model
