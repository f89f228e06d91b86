"""The preflight is compared with what exact arithmetic says."""

import copy
import functools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from expunge import Examples, Recipe, Reload, cache, cross_entropy, gradient, seeded, train, unlearn
from expunge.access import Blind
from expunge.audit.finding import evidence
from expunge.audit.preflight import LEAST, Check, Preflight, overlap, preflight, reset_set, stability
from expunge.errors import ConfigError, MismatchError, NotInformative
from expunge.models.mlp import MLP
from expunge.params import named_without, size
from tests.zoo import classification, network


@functools.cache
def trained():
    with seeded(0, "preflight"):
        model = MLP((5, 24, 3))
    data = classification(200, dtype=torch.float32)
    train(model, data, cross_entropy, Recipe(epochs=5, lr=0.05, batch_size=32), seed=0)
    return model, data, gradient(model, cross_entropy, data, micro_batch=16)


def fitted():
    model, data, full = trained()
    return copy.deepcopy(model), data, full


def checks(result):
    return {check.name: check for check in result.checks}


def test_a_deletion_of_many_from_an_exact_cache_is_a_go():
    model, data, _ = fitted()
    train(model, data, cross_entropy, Recipe(epochs=40, lr=0.1, batch_size=32), seed=0)
    full = gradient(model, cross_entropy, data, micro_batch=16)
    left, others = data.without(torch.arange(LEAST)), Examples(data.tensors[0], model(data.tensors[0]).argmin(1))
    result = preflight(model, cross_entropy, left, full, unseen=others, fresh=lambda _: blank())
    assert result.advice == "go"
    assert result.as_dict()["advice"] == "go"
    assert checks(result)["size of the deletion"].numbers["removed_terms"] == LEAST
    blind = preflight(model, cross_entropy, left, full)
    assert blind.advice == "go with care"  # nobody looked whether there is anything to forget
    assert {check.name for check in blind.checks if check.advice != "go"} == {"something to forget"}


def test_a_deletion_of_one_is_a_go_with_care_and_says_who_can_compute_it_back():
    model, data, full = fitted()
    result = preflight(model, cross_entropy, data.without(torch.tensor([3])), full)
    assert result.advice == "go with care"
    assert "compute them back" in checks(result)["size of the deletion"].words


def test_the_predicted_error_bounds_the_one_against_float64():
    model, data, full = fitted()
    left = data.without(torch.arange(LEAST))
    wide = Examples(data.tensors[0].double(), data.tensors[1])
    twin = MLP((5, 24, 3)).double()
    twin.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    ours = evidence(model, cross_entropy, left, full).removed
    exact_full = gradient(twin, cross_entropy, wide, micro_batch=16)
    exact = evidence(twin, cross_entropy, wide.without(torch.arange(LEAST)), exact_full).removed
    error = sum(float((ours.total[n] - exact.total[n]).square().sum()) for n in ours.total) ** 0.5
    length = sum(float(exact.total[n].square().sum()) for n in ours.total) ** 0.5
    found = checks(preflight(model, cross_entropy, left, full))["error of the difference"]
    assert error / length <= found.numbers["relative_error"] <= 1000 * error / length
    assert overlap(reset_set(ours, full, 0.1), reset_set(exact, exact_full, 0.1)) >= 0.9


def test_a_share_is_taken_by_its_decimal_digits_as_reload_does():
    model = nn.Linear(19, 5)  # 100 entries, and 0.29 * 100 is below 29
    inputs, labels = torch.randn(120, 19, generator=torch.Generator().manual_seed(0)), torch.arange(120) % 5
    data = Examples(inputs, labels)
    full, left = gradient(model, cross_entropy, data, micro_batch=16), data.without(torch.arange(40))
    chosen = reset_set(evidence(model, cross_entropy, left, full).removed, full, 0.29)
    assert sum(int(mask.sum()) for mask in chosen.values()) == 29
    given = Blind(retain=left, loss_terms=cross_entropy, fresh=lambda _: nn.Linear(19, 5), full=full)
    none = Recipe(epochs=0, lr=1.0)
    assert unlearn(model, given, Reload(reset_fraction=0.29, fine_tune=none)).trace.facts["reset_count"] == 29


def test_the_reset_set_is_the_one_that_reload_re_initialises():
    model, data, full = fitted()
    left = data.without(torch.arange(40))
    chosen = reset_set(evidence(model, cross_entropy, left, full).removed, full, 0.2)
    given = Blind(retain=left, loss_terms=cross_entropy, fresh=lambda _: MLP((5, 24, 3)), full=full)
    none = Recipe(epochs=0, lr=1.0)
    trace = unlearn(model, given, Reload(reset_fraction=0.2, fine_tune=none)).trace
    assert sum(int(mask.sum()) for mask in chosen.values()) == trace.facts["reset_count"]
    for name, mask in chosen.items():
        assert float(mask.double().mean()) == pytest.approx(trace.reset[name])


def test_a_choice_at_the_mercy_of_rounding_is_not_stable():
    model, data, full = fitted()
    removed = evidence(model, cross_entropy, data.without(torch.arange(40)), full).removed
    assert stability(removed, full, 0.1) > 0.9
    loud = {name: total.abs().mul(0.99).float() for name, total in removed.total.items()}  # barely above the floor
    assert stability(replace(removed, noise=loud), full, 0.1) < 0.5


def test_a_bfloat16_cache_is_never_a_go(tmp_path):
    model, data, full = fitted()
    cache.save(tmp_path / "c", full, dtype=torch.bfloat16)
    coarse = cache.load(tmp_path / "c", model, cross_entropy)
    result = preflight(model, cross_entropy, data.without(torch.arange(40)), coarse)
    assert result.advice in ("go with care", "do not")
    assert "Cache in float64" in checks(result)["stability of the choice"].words


def test_data_without_positions_is_a_reason_for_care():
    model, data, _ = fitted()
    full = gradient(model, cross_entropy, [data.tensors])
    left = [tuple(tensor[40:] for tensor in data.tensors)]
    found = checks(preflight(model, cross_entropy, left, full))["alignment"]
    assert (found.advice, "The cache was made of data without positions" in found.words) == ("go with care", True)


def test_positions_counted_anew_are_noticed_where_a_micro_batch_lost_nothing():
    model, data, full = fitted()
    gone = torch.arange(40)
    kept = checks(preflight(model, cross_entropy, data.without(gone), full))
    assert kept["alignment"].advice == "go"
    assert "of 10 micro-batches with as many terms as they had most give the loss" in kept["alignment"].words
    anew = checks(preflight(model, cross_entropy, Examples(*data.without(gone).tensors), full))
    assert anew["alignment"].advice == "go with care"
    assert "9 of 10 micro-batches with as many terms" in anew["alignment"].words
    error = "error of the difference"
    assert anew[error].numbers["relative_error"] > 2 * kept[error].numbers["relative_error"]
    none = checks(preflight(model, cross_entropy, [data.without(gone).tensors], full))["alignment"]
    assert none.advice == "go with care"
    assert "what is left has none" in none.words


def test_where_no_micro_batch_is_as_it_was_nobody_says_that_it_fits():
    model, data, full = fitted()
    labels = data.tensors[1].clone()
    labels[:40] = (labels[:40] + 1) % 3
    for left in (data.without(torch.arange(0, len(data), 16)), Examples(data.tensors[0], labels)):
        found = checks(preflight(model, cross_entropy, left, full))["alignment"]
        assert (found.advice, found.numbers) == ("go with care", {"compared": 0})
        assert "0 can be compared with what they were" in found.words


def test_a_loss_that_was_edited_after_the_cache_was_made_is_a_matter_of_care():
    model, data, full = fitted()

    def edited(model, batch):
        return 2 * cross_entropy(model, batch)

    edited.__qualname__ = "cross_entropy"  # the name is all that the cache has of it
    found = checks(preflight(model, edited, data.without(torch.arange(40)), full))["alignment"]
    assert found.advice == "go with care"
    assert "Are the model's code, the loss 'cross_entropy' or the preprocessing others? Then the" in found.words


def test_a_difference_that_is_rounding_is_a_do_not():
    model, data, full = fitted()
    noisy = replace(full, noise={name: torch.full_like(floor, 1e6) for name, floor in full.noise.items()})
    result = preflight(model, cross_entropy, data.without(torch.tensor([3])), noisy)
    assert result.advice == "do not"
    assert checks(result)["informative share"].advice == "do not"
    assert checks(result)["error of the difference"].advice == "do not"


def test_nothing_to_go_by_is_a_do_not_whatever_is_to_be_reset():
    model, data, full = fitted()
    noisy = replace(full, noise={name: torch.full_like(floor, 1e6) for name, floor in full.noise.items()})
    result = preflight(model, cross_entropy, data.without(torch.tensor([3])), noisy, reset_fraction=0)
    assert checks(result)["informative share"].advice == "do not"


def test_half_precision_of_the_model_is_named_as_the_cause():
    model, data, _ = fitted()
    half = Examples(data.tensors[0].bfloat16(), data.tensors[1])
    full = gradient(model.bfloat16(), cross_entropy, half, micro_batch=16)
    found = checks(preflight(model, cross_entropy, half.without(torch.tensor([3])), full))["error of the difference"]
    assert "this one computes in half precision" in found.words
    assert "float64" not in found.words


def test_corrected_records_are_no_matter_of_size():
    model, data, full = fitted()
    labels = data.tensors[1].clone()
    labels[:20] = (labels[:20] + 1) % 3
    found = checks(preflight(model, cross_entropy, Examples(data.tensors[0], labels), full))["size of the deletion"]
    assert found.advice == "go"
    assert "corrected" in found.words


def test_without_a_reset_its_choice_is_not_looked_at():
    model, data, full = fitted()
    loud = replace(full, noise={name: total.abs().mul(0.99).float() for name, total in full.total.items()})
    left = data.without(torch.arange(40))
    assert preflight(model, cross_entropy, left, loud).advice == "do not"
    found = preflight(model, cross_entropy, left, loud, reset_fraction=0)
    assert "stability of the choice" not in checks(found)
    assert found.advice == "go with care"  # the error of the difference concerns every method


def test_a_model_that_knows_others_nearly_as_well_as_its_own_records_has_little_to_forget():
    model, data, _ = fitted()
    train(model, data, cross_entropy, Recipe(epochs=40, lr=0.1, batch_size=32), seed=0)
    full = gradient(model, cross_entropy, data, micro_batch=16)
    left, name = data.without(torch.arange(40)), "something to forget"

    def checked(unseen, fresh=lambda _: blank()):
        return checks(preflight(model, cross_entropy, left, full, unseen=unseen, fresh=fresh))[name]

    for not_compared in (checked(None), checked(left, None), checked(left, lambda _: blank(math.inf))):
        assert not_compared.words.startswith("Was not looked at: ")
        assert (not_compared.advice, not_compared.numbers) == ("go with care", {})
    same = checked(left)
    assert same.advice == "go with care"
    assert "0% does not hold for others. There is little to forget" in same.words
    own = same.numbers["loss_on_what_is_left"]
    assert same.numbers["loss_untrained"] == pytest.approx(math.log(3))
    nothing = checked(left, lambda _: nearly(model))
    assert nothing.advice == "go with care"  # what was not learned cannot be forgotten
    wrong = checked(Examples(data.tensors[0], model(data.tensors[0]).argmin(1)))
    assert wrong.advice == "go"
    assert wrong.numbers["loss_on_unseen"] > own + 0.1 * (math.log(3) - own)
    with pytest.raises(ConfigError, match="fresh\\(\\) returned the weights to be unlearned"):
        checked(left, lambda _: copy.deepcopy(model))
    before = torch.get_rng_state()
    checked(left, lambda seed: (torch.manual_seed(seed), blank())[1])
    assert torch.equal(torch.get_rng_state(), before)


def nearly(model):
    """One that knows as much untrained."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        next(twin.parameters()).mul_(1.0001)
    return twin


def blank(value=0.0):
    """An untrained model that has no idea."""
    model = MLP((5, 24, 3))
    for p in model.parameters():
        nn.init.constant_(p, value)
    return model


@pytest.mark.parametrize("fraction", [-0.1, 1.0, math.nan])
def test_a_fraction_that_cannot_work_is_refused(fraction):
    model, data, full = fitted()
    with pytest.raises(ConfigError, match="reset_fraction"):
        preflight(model, cross_entropy, data, full, reset_fraction=fraction)


def test_what_does_not_belong_together_is_refused():
    model, data, full = fitted()
    with pytest.raises(NotInformative, match="nothing was removed"):
        preflight(model, cross_entropy, data, full)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(MismatchError, match="weights"):
        preflight(model, cross_entropy, data.without(torch.arange(40)), full)


def test_the_worst_check_decides():
    one, two = Check("a", "go", ""), Check("b", "do not", "")
    assert Preflight([one, two]).advice == "do not"
    assert Preflight([one]).advice == "go"


def test_the_overlap_is_that_of_jaccard():
    a = {"x": torch.tensor([True, True, False, False])}
    b = {"x": torch.tensor([True, False, True, False])}
    assert overlap(a, b) == 1 / 3
    nothing = {"x": torch.zeros(4, dtype=torch.bool)}
    assert overlap(nothing, nothing) == 1


def test_parameters_are_left_out_by_name_or_pattern_and_reload_works_with_what_is_left(tmp_path):
    model, data, _ = fitted()
    names = named_without(model, ["layers.linear1.*"])
    assert names == ["layers.linear2.weight", "layers.linear2.bias"]
    cache.save(tmp_path / "c", gradient(model, cross_entropy, data, parameters=names))
    full = cache.load(tmp_path / "c", model, cross_entropy)
    left = data.without(torch.arange(40))
    given = Blind(retain=left, loss_terms=cross_entropy, fresh=lambda _: MLP((5, 24, 3)), full=full)
    none = Recipe(epochs=0, lr=1.0)
    result = unlearn(model, given, Reload(reset_fraction=0.2, fine_tune=none))
    before, after = dict(model.named_parameters()), dict(result.model.named_parameters())
    assert torch.equal(before["layers.linear1.weight"], after["layers.linear1.weight"])
    assert not torch.equal(before["layers.linear2.weight"], after["layers.linear2.weight"])
    assert result.trace.facts["reset_count"] == math.floor(0.2 * size(full.total))


@pytest.mark.parametrize(("patterns", "said"), [(["head.*"], "'head.\\*' matches no"), (["*"], "nothing remains")])
def test_patterns_that_leave_out_nothing_or_everything_are_refused(patterns, said):
    with pytest.raises(ConfigError, match=said):
        named_without(network("mlp"), patterns)
