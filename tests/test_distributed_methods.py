"""Methods in two and four gloo processes, on whole models and in pieces, come to what one process comes to."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from expunge import (
    Blind,
    ClassOrthogonalAscent,
    FineTune,
    Gradient,
    L1Sparse,
    NaturalAscent,
    OrthogonalAscent,
    Recipe,
    Reload,
    Retrain,
    SalUn,
    Sighted,
    cache,
    cross_entropy,
    gradient,
    sharding,
    unlearn,
)
from expunge.errors import MismatchError, UnsupportedModule
from expunge.methods.guard import MeanOfEpoch
from tests.processes import (
    RECIPE,
    REMOVED,
    all_well,
    network,
    records,
    require_same,
    sharded,
    weights,
)


def given(full: Gradient | None) -> Blind:
    return Blind(
        retain=records().without(REMOVED), loss_terms=cross_entropy, fresh=lambda seed: network(seed=seed), full=full
    )


def reloaded(model: nn.Module, path: Path, config: Reload) -> list[dict[str, Tensor]]:
    """The weights after the ascent, after the re-initialisation, and at the end, all from one cache on disk."""
    seen: list[dict[str, Tensor]] = []

    def watch(moment: str, model: nn.Module) -> None:
        if moment in ("ascend", "re-initialise"):
            seen.append(weights(model))

    result = unlearn(model, given(cache.load(path, model, cross_entropy)), config, seed=1, watch=watch)
    return [*seen, weights(result.model)]


CONFIGS = {
    selector: Reload(
        reset_fraction=0.3, selector=selector, scope=scope, reset_to=to, fine_tune=Recipe(epochs=1, lr=0.05)
    )
    for selector, scope, to in (
        ("small-kv", "global", "fresh"),
        ("large-ratio", "layer", "kaiming-normal"),
        ("random", "global", "normal"),
        ("large-gradient", "layer", "layer-mean"),
    )
}


def reloads(alone: dict[str, list[dict[str, Tensor]]], path: Path) -> None:
    for name in alone:
        config = CONFIGS[name]
        for model in (network(), sharded(network())):
            ascended, reset, tuned = reloaded(model, path, config)
            for mine, theirs in zip(alone[name][:2], (ascended, reset), strict=True):
                assert all(torch.equal(mine[n], theirs[n]) for n in mine), name
            for n, tensor in alone[name][2].items():
                torch.testing.assert_close(tuned[n], tensor, rtol=0, atol=1e-12)
    for model, file in ((network(), "whole"), (sharded(network()), "sharded")):
        cache.save(path.with_name(file), gradient(model, cross_entropy, records(), micro_batch=8))
    sighted, model = Sighted(**vars(given(None)), forget=records().only(REMOVED)), sharded(network())
    with pytest.raises(UnsupportedModule, match="salun does not work on a model that FSDP2 has sharded; reload, ortho"):
        unlearn(model, sighted, SalUn(), seed=0)
    full = cache.load(path, model, cross_entropy)
    with pytest.raises(UnsupportedModule, match="selector='obs' takes a model apart into examples"):
        unlearn(model, given(full), Reload(selector="obs"), seed=0)


@pytest.mark.parametrize(("processes", "configs"), [(2, list(CONFIGS)), (4, ["small-kv"])])
def test_reload_resets_what_one_process_resets_and_caches_go_both_ways(
    processes: int, configs: list[str], tmp_path: Path
) -> None:
    one = gradient(network(), cross_entropy, records(), micro_batch=8)
    path = tmp_path / "one"
    cache.save(path, one)
    alone = {name: reloaded(network(), path, CONFIGS[name]) for name in configs}
    for ascended, reset, _ in alone.values():
        changed = sum(int((ascended[name] != reset[name]).sum()) for name in reset)
        assert 0.2 < changed / sum(tensor.numel() for tensor in reset.values()) <= 0.3
    all_well(processes, reloads, tmp_path, alone, path)
    for file in ("whole", "sharded"):
        require_same(one, cache.load(tmp_path / file, network(), cross_entropy))


NEVER = Recipe(epochs=0, lr=0.1)
SIMPLER = {
    "fine-tune": FineTune(recipe=RECIPE),
    "retrain": Retrain(recipe=RECIPE),
    "orthogonal-ascent": OrthogonalAscent(fine_tune=RECIPE),
    "class-orthogonal-ascent": ClassOrthogonalAscent(fine_tune=RECIPE),
    "ascent at random": OrthogonalAscent(direction="random", fine_tune=RECIPE),
}


def bounded(alone: tuple[str, dict[str, Tensor]], bound: float) -> None:
    model = network()
    result = unlearn(model, given(None), L1Sparse(recipe=RECIPE, loss_bound=bound), seed=0)
    assert result.trace.stopped == alone[0]
    for name, tensor in weights(result.model).items():
        torch.testing.assert_close(tensor, alone[1][name], rtol=0, atol=1e-11)


def test_all_processes_take_an_epoch_back_or_none(tmp_path: Path) -> None:
    seen = []
    guard = MeanOfEpoch.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MeanOfEpoch, "__call__", lambda self, model: seen.append(guard(self, model)) or seen[-1])
        unlearn(network(), given(None), L1Sparse(recipe=RECIPE), seed=0)
    assert len(seen) == RECIPE.epochs
    for bound in (seen[0] * 1.001, seen[0] * 0.999):  # either half of the rows is farther from it
        result = unlearn(network(), given(None), L1Sparse(recipe=RECIPE, loss_bound=bound), seed=0)
        folder = tmp_path / str(bound)
        folder.mkdir()
        all_well(2, bounded, folder, (result.trace.stopped, weights(result.model)), bound)


def looking(moment: str, model: nn.Module) -> None:
    with torch.no_grad():
        model(records().tensors[0])  # leaves FSDP2's root whole


NATURAL = NaturalAscent(fine_tune=RECIPE)


def without_pieces(alone: dict[str, Tensor], full: Gradient) -> None:
    for name, tensor in weights(unlearn(network(), given(full), NATURAL, seed=0).model).items():
        torch.testing.assert_close(tensor, alone[name], rtol=0, atol=1e-11)


def test_a_method_for_whole_models_ends_where_one_process_ends(tmp_path: Path) -> None:
    full = gradient(network(), cross_entropy, records(), micro_batch=8)
    all_well(2, without_pieces, tmp_path, weights(unlearn(network(), given(full), NATURAL, seed=0).model), full)


def simpler(alone: dict[str, dict[str, Tensor]], full: Gradient) -> None:
    for name, config in SIMPLER.items():
        for model in (network(), sharded(network())):
            result = unlearn(model, given(full), config, seed=0, watch=looking)
            assert sharding.is_sharded(result.model) == sharding.is_sharded(model)
            for n, tensor in weights(result.model).items():
                torch.testing.assert_close(tensor, alone[name][n], rtol=0, atol=1e-11)
    unlearn(sharded(network()), given(full), CONFIGS["small-kv"], seed=0, watch=looking)


def begins_anew() -> None:
    """A retraining of no epochs, in pieces."""
    trained = network(middle=nn.BatchNorm1d)
    trained[1].running_mean.add_(1)

    def retrained(fresh: nn.Module, model: nn.Module = trained) -> nn.Module:
        blind = Blind(retain=records(), loss_terms=cross_entropy, fresh=lambda _: fresh)
        return unlearn(sharded(copy.deepcopy(model)), blind, Retrain(recipe=NEVER), seed=0).model

    fresh = network(seed=8, middle=nn.BatchNorm1d)
    found = retrained(fresh)
    assert all(torch.equal(tensor, weights(fresh)[name]) for name, tensor in weights(found).items())
    assert all(torch.equal(buffer, dict(fresh.named_buffers())[name]) for name, buffer in found.named_buffers())
    frozen = network(seed=8, middle=nn.BatchNorm1d)
    frozen[0].weight.requires_grad_(False)
    with pytest.raises(MismatchError, match=r"'0.weight' is frozen in what fresh\(\) builds, and the model trains it"):
        retrained(frozen)
    more = copy.deepcopy(trained)
    more.register_buffer("mask", torch.ones(2))
    with pytest.raises(MismatchError, match="mask"):
        retrained(fresh, more)


def test_retraining_in_pieces_begins_with_the_weights_and_buffers_of_fresh(tmp_path: Path) -> None:
    all_well(2, begins_anew, tmp_path)


@pytest.mark.parametrize("processes", [2, 4])
def test_methods_that_need_no_more_come_to_what_one_process_comes_to(processes: int, tmp_path: Path) -> None:
    full = gradient(network(), cross_entropy, records())
    alone = {name: weights(unlearn(network(), given(full), config, seed=0).model) for name, config in SIMPLER.items()}
    all_well(processes, simpler, tmp_path, alone, full)
