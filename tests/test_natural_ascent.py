"""Natural ascent against steps worked by hand in float64, and what it is for."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, Subset

from expunge import (
    Blind,
    Examples,
    FineTune,
    NaturalAscent,
    Recipe,
    Reload,
    causal_lm,
    causal_lm_documents,
    cross_entropy,
    gradient,
    logit_margin,
    seeded,
    squared_error,
    train,
    unlearn,
)
from expunge.errors import ConfigError, NotInformative, UnsupportedModule
from expunge.seeds import derive
from expunge.training import mean_loss
from tests.contract import without_type_checks, world
from tests.test_class_orthogonal_ascent import ascended
from tests.test_orthogonal_ascent import REMOVED, flat, moved, weights
from tests.zoo import CLASSES, classification, network

ONCE = Recipe(epochs=1, lr=0.05, batch_size=8)
TWICE = Recipe(epochs=2, lr=0.05, batch_size=8)


def given(model: nn.Module, data: Examples, gone: Tensor = REMOVED, **changes) -> Blind:
    loss = changes.pop("loss", cross_entropy)
    own = {"retain": data.without(gone), "loss_terms": loss, "fresh": lambda seed: network("mlp", seed + 100)}
    return Blind(**own | {"full": gradient(model, loss, data, micro_batch=8)} | changes)


def by_hand(model: nn.Module, data: Examples, damping: float, gone: Tensor = REMOVED) -> tuple[Tensor, Tensor, float]:
    """(F + λ)⁻¹ g, g and tr F(F + λ)⁻¹ of the removed gradient g: each layer's F whole, in its Kronecker basis."""
    first, last = model[0], model[-1]
    inputs, labels = data.without(gone).tensors
    hidden = first(inputs).tanh().detach()
    wrong = model(inputs).softmax(1).detach() - functional.one_hot(labels, CLASSES)
    both = {first: (inputs, wrong @ last.weight.detach() * (1 - hidden**2)), last: (hidden, wrong)}
    bases, eigenvalues = {}, {}
    for layer, (entered, slopes) in both.items():
        own = torch.einsum("no,ni->noi", slopes, entered).flatten(1)  # the gradient of each record
        factors = (torch.linalg.eigh(each.T @ each)[1] for each in (slopes, entered))
        bases[layer] = torch.kron(*factors)
        eigenvalues[layer] = (bases[layer].T @ own.T @ own @ bases[layer]).diagonal()
    every = torch.cat(list(eigenvalues.values()))
    floor = damping * every.mean()
    loss = cross_entropy(model, data.only(gone).tensors).sum()
    removed = torch.autograd.grad(loss, [first.weight, last.weight])
    solved = [
        bases[layer] @ ((bases[layer].T @ part.flatten()) / (eigenvalues[layer] + floor))
        for layer, part in zip((first, last), removed, strict=True)
    ]
    return flat(solved), flat(removed), float((every / (every + floor)).sum())


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("damping", [0.1, 3.0])
def test_it_ascends_along_the_difference_over_the_curvature_and_fine_tunes_in_turns(rounds, damping):
    model, own, data = network("mlp").eval(), network("mlp").eval(), classification(40)
    recipe = Recipe(epochs=2, lr=0.05, batch_size=8)
    config = NaturalAscent(step=0.3, growth=0.0, rounds=rounds, damping=damping, fine_tune=recipe)
    result = unlearn(model, given(model, data), config, seed=3)

    direction, removed, parameters = by_hand(own, data, damping)
    step = 0.3 * flat(weights(own)).norm() * direction / direction.norm()
    for number in range(rounds):
        moved(own, step)
        part = Recipe(epochs=2 // rounds, lr=0.05, batch_size=8)
        train(own, data.without(REMOVED), cross_entropy, part, seed=derive(3, "round", number))

    assert torch.allclose(flat(result.model.parameters()), flat(own.parameters()), rtol=1e-7)
    facts = result.trace.facts
    assert facts["ascent"] == pytest.approx(float(step.norm()))
    assert facts["alignment"] == pytest.approx(float(direction @ removed / (direction.norm() * removed.norm())))
    assert facts["information_share"] == pytest.approx(float(direction @ removed) / parameters)
    assert (facts["removed_count"], facts["kronecker_share"]) == (len(REMOVED), 1.0)
    assert result.trace.backwarded == 32 + 2 * 32 + 2 * 32


@pytest.mark.parametrize("gone", [torch.tensor([3]), torch.arange(0, 40, 8), torch.arange(30)])
def test_a_step_grows_with_what_was_removed_as_the_curvature_sees_it(gone, recwarn):
    model, data = network("mlp").eval(), classification(40)
    found = unlearn(model, given(model, data, gone), NaturalAscent(step=0.1, rounds=1, fine_tune=ONCE)).trace.facts
    direction, removed, parameters = by_hand(model, data, 0.3, gone)
    share = float(direction @ removed) / parameters
    assert found["ascent_share"] == pytest.approx(0.1 * (7 * min(share, 0.25)) ** (2 / 3))
    assert (share > 0.25) == (len(gone) == 30) == any("The step is that of 0.25" in str(w.message) for w in recwarn)


def test_records_that_pull_at_the_same_weights_count_for_more_than_their_number():
    model, data, gone = network("mlp").eval(), classification(400), torch.arange(0, 400, 20)
    inputs, labels = data.tensors
    alike = Examples(inputs.index_copy(0, gone, inputs[:1].expand(20, -1)), labels.index_fill(0, gone, int(labels[0])))
    shares = [
        unlearn(model, given(model, each, gone), NaturalAscent(sample=sample, rounds=1, fine_tune=ONCE)).trace.facts
        for each, sample in ((data, 1.0), (data, 0.7), (alike, 1.0))
    ]
    various, sampled, same = (each["information_share"] for each in shares)
    assert 0.5 * 20 / 380 < various < 2 * 20 / 380
    assert sampled == pytest.approx(various, rel=0.3)  # the share is of all that is left
    assert same > 3 * various


def test_without_curvature_it_would_be_the_difference_itself():
    model, data = network("mlp"), classification(40)
    step = ascended(model, given(model, data), NaturalAscent(rounds=1, damping=1e9, fine_tune=ONCE))
    removed = by_hand(model.eval(), data, 1.0)[1]
    assert float(step @ removed / (step.norm() * removed.norm())) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("sample", "records"), [(0.1, 256), (0.8, 304), (1.0, 380)])
def test_the_curvature_is_measured_on_a_part_of_what_is_left(sample, records):
    model, data, gone = network("mlp"), classification(400), torch.arange(0, 400, 20)
    config = NaturalAscent(rounds=1, sample=sample, fine_tune=ONCE)
    blind = given(model, data, gone)
    first, again, other = (unlearn(model, blind, config, seed=seed) for seed in (0, 0, 1))
    assert first.trace.backwarded == 380 + 2 * records + 380
    directions = [each.trace.facts["alignment"] for each in (first, again, other)]
    assert directions[0] == directions[1]
    assert (directions[0] == directions[2]) == (sample == 1.0)


def test_batches_without_positions_are_all_looked_at():
    model, data, gone = network("mlp"), classification(400), torch.arange(0, 400, 20)
    batches = [data.without(gone).tensors]
    trace = unlearn(
        model, given(model, data, gone, retain=batches), NaturalAscent(fine_tune=Recipe(epochs=2, lr=0.05))
    ).trace
    assert trace.backwarded == 380 + 2 * 380 + 2 * 380


def test_the_removed_records_are_forgotten_where_fine_tuning_and_reloads_ascent_keep_them():
    w = world("batch-norm")
    brief = Recipe(epochs=4, lr=0.03, batch_size=16)

    def losses(config: object) -> tuple[float, float]:
        model = unlearn(w.model, w.blind(), config).model
        return mean_loss(model, w.forget, cross_entropy), mean_loss(model, w.retain, cross_entropy)

    forgotten, kept = losses(NaturalAscent(fine_tune=brief))
    tuned = losses(FineTune(recipe=brief))[0]
    climbed = losses(Reload(reset_fraction=0.0, fine_tune=brief))[0]
    assert forgotten > 5 * max(tuned, climbed)
    assert kept < 0.2


def test_a_sample_with_gaps_goes_through_the_model_in_whole_batches():
    model, data, gone = network("mlp"), classification(4000), torch.arange(0, 4000, 20)
    sizes: list[int] = []
    model[0].register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    blind = given(model, data, gone)
    sizes.clear()
    unlearn(model, blind, NaturalAscent(rounds=1, fine_tune=Recipe(epochs=1, lr=0.05, batch_size=100)))
    assert sizes.count(32) >= 2 * (380 // 32)  # two passes over 380 records of 3,800
    assert sizes.count(380 % 32) == 2


def test_regression_is_curved_as_its_inputs_and_errors_are():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    data, model, gone = Examples(inputs, inputs[:, :1] ** 2), nn.Linear(5, 1).double(), torch.arange(6)
    blind = given(model, data, gone, loss=squared_error, fresh=lambda seed: nn.Linear(5, 1).double())
    step = ascended(model, blind, NaturalAscent(rounds=1, damping=0.5, fine_tune=ONCE))

    def each(rows: slice) -> Tensor:
        """The gradient of every record."""
        losses = squared_error(model, (inputs[rows], inputs[rows, :1] ** 2))
        return torch.stack([torch.autograd.grad(loss, model.weight, retain_graph=True)[0][0] for loss in losses])

    own = each(slice(6, 60))
    basis = torch.linalg.eigh(inputs[6:].T @ inputs[6:])[1]
    eigenvalues = (own @ basis).square().sum(0)
    removed = each(slice(0, 6)).sum(0)
    expected = basis @ ((basis.T @ removed) / (eigenvalues + 0.5 * eigenvalues.mean()))
    assert float(step @ expected / (step.norm() * expected.norm())) == pytest.approx(1, abs=1e-9)


class Attention(nn.Module):
    """A language model of one block."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with seeded(seed, "attention"):
            self.table, self.mixed, self.head = nn.Embedding(7, 8), nn.Linear(8, 24), nn.Linear(8, 7)

    def forward(self, input_ids: Tensor) -> Tensor:
        queries, keys, values = self.mixed(self.table(input_ids)).chunk(3, -1)
        return self.head(functional.scaled_dot_product_attention(queries, keys, values, is_causal=True))


class Documents(Dataset):
    ids = torch.randint(7, (24, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


@pytest.mark.filterwarnings("error")  # torch's own, which ask for issues there
def test_a_language_model_forgets_documents_where_tokens_cannot_be_taken_apart():
    model, gone = Attention(0), Subset(Documents(), range(3))
    train(model, Documents(), causal_lm, Recipe(epochs=60, lr=0.1, batch_size=8), seed=0)
    config = NaturalAscent(fine_tune=Recipe(epochs=2, lr=0.01, batch_size=8))
    found = {}
    for loss in (causal_lm_documents, causal_lm):
        full = gradient(model, loss, Documents())
        found[loss] = Blind(retain=Subset(Documents(), range(3, 24)), loss_terms=causal_lm, fresh=Attention, full=full)
    by_document = replace(found[causal_lm_documents], cached_loss=causal_lm_documents)
    done = unlearn(model, by_document, config)
    assert done.trace.facts["removed_count"] == 3
    assert mean_loss(done.model, gone, causal_lm) > mean_loss(model, gone, causal_lm) + 0.1
    with pytest.raises(UnsupportedModule, match="of documents take causal_lm_documents in place of causal_lm"):
        unlearn(model, found[causal_lm], config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step": 0.0}, "step=0.0: must be a share of the norm"),
        ({"rounds": 4, "fine_tune": ONCE}, "fine_tune.epochs=1, rounds=4: an ascent without an epoch"),
        ({"damping": 0.0}, "damping=0.0: must be a positive number"),
        ({"damping": float("inf")}, "damping=inf"),
        ({"sample": 0.0}, "sample=0.0: must be a share of what is left"),
        ({"sample": 1.5}, "sample=1.5"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with without_type_checks(), pytest.raises(ConfigError, match=message):
        NaturalAscent(**settings)


def test_removed_records_that_show_in_no_weight_are_refused():
    data, model = classification(40), network("mlp")[0]  # a layer by itself: an input of zeros moves its bias alone
    inputs, labels = data.tensors
    data = Examples(inputs.clone().index_fill_(0, REMOVED, 0.0), labels)
    blind = given(model, data, fresh=lambda seed: network("mlp", seed + 100)[0])
    with pytest.raises(NotInformative, match="in the weights, no more than its rounding floor"):
        unlearn(model, blind, NaturalAscent(rounds=1, fine_tune=ONCE))


@pytest.mark.parametrize(("loss", "warned"), [(cross_entropy, True), (logit_margin, False)])
def test_a_correction_of_faults_that_have_no_gradient_left_is_warned_of(loss, warned, recwarn):
    inputs, labels = classification(60).tensors
    faulty, model = Examples(inputs, labels.where(torch.arange(60) >= 6, (labels + 1) % CLASSES)), network("mlp")
    train(model, faulty, cross_entropy, Recipe(epochs=800, lr=0.3, batch_size=60, weight_decay=0.0), seed=0)
    before, after = (gradient(model, loss, data, micro_batch=8) for data in (faulty, Examples(inputs, labels)))
    blind = given(model, faulty, retain=Examples(inputs, labels), full=before, cached_loss=loss)
    trace = unlearn(model, blind, NaturalAscent(rounds=1, fine_tune=ONCE)).trace
    one, other = (
        flat([each[name] for name in ("0.weight", "3.weight")]) for each in ((after - before).total, after.total)
    )
    along = float(one @ other / one.norm() / other.norm())
    assert trace.facts["along_left"] == pytest.approx(along, rel=1e-9)
    assert any("cache the gradient of expunge.logit_margin" in str(each.message) for each in recwarn) == warned
    assert (along > 0.99) == warned


@pytest.mark.parametrize(("loss", "warned"), [(cross_entropy, True), (logit_margin, False)])
def test_removed_records_that_have_next_to_no_gradient_beside_a_few_others_are_warned_of(loss, warned, recwarn):
    inputs, labels = classification(40).tensors
    data, model = Examples(inputs, labels), network("mlp")
    train(model, data, cross_entropy, Recipe(epochs=200, lr=0.3, batch_size=8, weight_decay=0.0), seed=0)
    one_is_wrong = Examples(inputs, torch.cat([labels[:-1], (labels[-1:] + 1) % CLASSES]))
    known_best = cross_entropy(model, data.tensors).argsort()[:8].sort().values
    blind = given(model, one_is_wrong, known_best, loss=loss)
    facts = unlearn(model, blind, NaturalAscent(fine_tune=TWICE), seed=0).trace.facts
    share = facts["information_share"] / (facts["removed_count"] / facts["cached_count"])
    assert (share < 0.05) == warned
    assert (
        any("of the information that as many records have on average" in str(each.message) for each in recwarn)
        == warned
    )


def test_of_a_removal_nobody_asks_where_the_difference_points():
    model, data = network("mlp"), classification(40)
    assert "along_left" not in unlearn(model, given(model, data), NaturalAscent(rounds=1, fine_tune=ONCE)).trace.facts
