"""Attacks on exact gradients must find what is there, and on noise nothing."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset, Subset

from expunge import Examples, Recipe, causal_lm, cross_entropy, gradient, seeded, squared_error, train
from expunge.audit.candidates import judged_list, score, singly
from expunge.audit.finding import Evidence, Finding, Truth, evidence, judged, worst
from expunge.audit.inversion import _kept, invert
from expunge.audit.labels import composition, labels
from expunge.audit.layers import layer_inputs, linear_layers
from expunge.audit.leakage import CacheAudit, audit_cache
from expunge.audit.ratio import with_bias, without_bias
from expunge.audit.span import records_in_span, span, words_in_span
from expunge.audit.words import bag_of_words
from expunge.data.digits import digits
from expunge.errors import ConfigError, NotInformative, UnsupportedModule
from expunge.models.mlp import MLP
from expunge.params import norm
from tests.zoo import CLASSES, FEATURES, classification, in_form, network


def seen(model, data, removed, loss=cross_entropy):
    """What an attacker has when the records at these positions are gone, and the truth."""
    full = gradient(model, loss, data, micro_batch=4)
    has = evidence(model, loss, data.without(removed), full)
    return has, data.only(removed)


def attacked(attack, has, forget, number=0):
    """A ratio attack on one layer, judged with the truth and without it."""
    layer = linear_layers(has)[number]
    kept, own = (layer_inputs(has.model, has.loss_terms, data)[layer.name] for data in (has.retain, forget))
    return attack(layer, kept, own, has.removed.count), attack(layer, kept, None, has.removed.count)


def with_noise(has: Evidence, size: float, seed: int = 0) -> Evidence:
    """The same with a difference that is random: within its floor for a size below 1, far above it for a large one."""
    generator = torch.Generator().manual_seed(seed)
    total = {
        name: size * floor.double() * (2 * torch.rand(floor.shape, generator=generator, dtype=torch.float64) - 1)
        for name, floor in has.removed.noise.items()
    }
    return replace(has, removed=replace(has.removed, total=total))


@pytest.fixture
def one():
    return seen(network("mlp"), classification(40), torch.tensor([7]))


@pytest.fixture
def five():
    return seen(network("mlp"), classification(40), torch.arange(5))


@pytest.mark.parametrize("number", [0, 1])
def test_the_input_of_a_linear_layer_is_the_quotient_of_two_gradients_written_out_by_hand(number):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    data = Examples(torch.randn(20, 3, dtype=torch.float64), torch.arange(20) % 3)
    has, forget = seen(model, data, torch.tensor([4]))
    x = forget.tensors[0]
    truth = x if number == 0 else model[0](x).tanh().detach()
    found, blind = attacked(with_bias, has, forget, number)
    assert found.verdict == blind.verdict == "recoverable"
    assert torch.allclose(found.recovered, truth, atol=1e-8)
    assert torch.allclose(blind.recovered, truth, atol=1e-8)
    assert found.numbers["median PSNR"] > 100
    if number == 0:
        model(x)
        loss = functional.cross_entropy(model(x), forget.tensors[1])
        weight, bias = torch.autograd.grad(loss, [model[0].weight, model[0].bias])
        assert torch.allclose(found.recovered[0], weight[1] / bias[1], atol=1e-8)
        assert found.shape == (3,)
        assert "the model's input" in found.place


def test_without_a_bias_the_input_comes_back_up_to_its_scale():
    model = nn.Sequential(nn.Linear(FEATURES, 6, bias=False), nn.Tanh(), nn.Linear(6, CLASSES, bias=False)).double()
    has, forget = seen(model, classification(40), torch.tensor([3]))
    found, blind = attacked(without_bias, has, forget)
    assert found.verdict == blind.verdict == "recoverable"
    assert abs(float(functional.cosine_similarity(blind.recovered, forget.tensors[0]))) > 1 - 1e-8
    assert not any(finding.attack == "ratio with bias" for finding in audit_cache(has).findings)


def test_a_unit_that_only_one_of_several_records_reaches_shows_it():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[5.0, 0.0], [0.0, 5.0], [1.0, 1.0]]))
        model[0].bias.copy_(torch.tensor([-4.0, -4.0, 3.0]))
    inputs = torch.rand(30, 2, dtype=torch.float64)
    inputs[:2] = torch.tensor([[2.0, -1.0], [-1.0, 2.0]])
    has, forget = seen(model, Examples(inputs, torch.arange(30) % 3), torch.tensor([0, 1]))
    found, _ = attacked(with_bias, has, forget)
    assert found.numbers["recovered"] == 2
    assert torch.allclose(found.recovered, found.truth, atol=1e-8)


@pytest.mark.parametrize("attack", [with_bias, without_bias])
@pytest.mark.parametrize("size", [0.9, 1e8])
def test_nothing_is_found_in_noise_below_the_floor_or_above_it(one, attack, size):
    for number in (0, 1):
        for finding in attacked(attack, with_noise(one[0], size), one[1], number):
            assert finding.verdict == "not shown"


@pytest.mark.parametrize("size", [0.9, 1e8])
def test_a_whole_audit_of_noise_finds_nothing(five, size):
    unseen = classification(30, seed=9)
    found = audit_cache(with_noise(five[0], size), Truth(forget=five[1], unseen=unseen))
    assert found.verdict == "not shown", [f for f in found.findings if f.verdict != "not shown"]
    assert "no proof" in found.summary


def test_the_rows_of_a_two_class_head_always_agree_and_are_no_record():
    with seeded(0, "test"):
        model = nn.Sequential(nn.Linear(FEATURES, 2)).double()
    inputs, targets = classification(40).tensors
    has, forget = seen(model, Examples(inputs, targets % 2), torch.arange(6))
    found, blind = attacked(with_bias, has, forget)
    assert blind.numbers["units that agree"] == 2
    assert found.verdict == blind.verdict == "not shown"
    assert attacked(without_bias, has, forget)[1].verdict == "not shown"


def test_what_a_kept_twin_shows_anyway_is_no_news():
    inputs, targets = classification(40).tensors
    inputs[8] = inputs[7]
    has, forget = seen(network("mlp"), Examples(inputs, targets), torch.tensor([7]))
    assert attacked(with_bias, has, forget)[0].verdict == "not shown"


@pytest.mark.parametrize("bias", [True, False])
def test_the_label_of_one_record_is_the_one_with_the_other_sign(bias):
    model = nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, CLASSES, bias=bias)).double()
    data = classification(40)
    for position in range(8):
        has, forget = seen(model, data, torch.tensor([position]))
        head = linear_layers(has)[-1]
        found = labels(has, head, Truth(forget=forget))
        assert found.numbers["label"] == int(data.tensors[1][position])
        assert found.verdict == "partly recoverable"
        assert labels(has, head, Truth()).numbers["label"] == found.numbers["label"]
        assert labels(with_noise(has, 0.9), head_of(with_noise(has, 0.9)), Truth()).verdict == "not shown"


def head_of(has):
    return linear_layers(has)[-1]


def test_labels_are_counted_exactly_where_records_of_a_class_are_alike():
    inputs = torch.eye(CLASSES, dtype=torch.float64).repeat(20, 1)
    targets = torch.arange(CLASSES).repeat(20)
    model = nn.Sequential(nn.Linear(CLASSES, CLASSES)).double()
    removed = torch.tensor([0, 3, 6, 9, 12, 15, 1, 4, 2])  # six of class 0, two of class 1, one of class 2
    has, forget = seen(model, Examples(inputs, targets), removed.sort().values)
    found = labels(has, head_of(has), Truth(forget=forget))
    assert found.numbers["estimated counts"] == [6.0, 2.0, 1.0]
    assert found.verdict == "partly recoverable"
    assert labels(has, head_of(has), Truth()).verdict == "not shown"  # nobody knows how good


def test_classes_at_the_end_of_much_sorted_data_are_counted_too():
    targets = torch.arange(CLASSES).repeat_interleave(1500)
    inputs = torch.eye(CLASSES, dtype=torch.float64)[targets]
    model = nn.Sequential(nn.Linear(CLASSES, CLASSES)).double()
    removed = torch.cat([torch.arange(2), torch.arange(len(targets) - 5, len(targets))])
    has, _ = seen(model, Examples(inputs, targets), removed)
    found = composition(has, head_of(has))
    assert found.counts.tolist() == pytest.approx([2, *[0] * (CLASSES - 2), 5], abs=0.05)
    assert found.unexplained < 0.01
    assert found.kept.tolist() == [1498, *[1500] * (CLASSES - 2), 1495]
    whole, _ = seen(model, Examples(inputs, targets), torch.arange(len(targets) - 1500, len(targets)))
    told = labels(whole, head_of(whole), Truth())
    assert told.numbers["unexplained"] > 0.65
    assert "Was all of a class removed?" in told.words


def test_the_rank_of_a_gradient_is_the_number_of_records_and_its_span_holds_them():
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    generator = torch.Generator().manual_seed(0)
    data = Examples(torch.randn(60, 12, generator=generator, dtype=torch.float64), torch.arange(60) % 5)
    has, forget = seen(model, data, torch.arange(4))
    layer = linear_layers(has)[0]
    assert span(layer).rank == 4
    inside = layer_inputs(model, cross_entropy, forget)[layer.name]
    outside = layer_inputs(model, cross_entropy, has.retain)[layer.name]
    assert float(span(layer).beside(inside.values).max()) < 1e-6
    found = records_in_span(layer, inside, outside)
    assert found.verdict == "partly recoverable"
    assert found.numbers["removed records inside"] == 1
    assert found.numbers["unseen records inside"] == 0
    many, gone = seen(model, data, torch.arange(20))
    layer = linear_layers(many)[0]
    inside = layer_inputs(model, cross_entropy, gone)[layer.name]
    assert "everything lies in its span" in records_in_span(layer, inside, outside).words


def test_least_squares_over_candidates_gives_ones_and_zeros(five):
    has, forget = five
    others = classification(20, seed=5)
    found = score(has, [*singly(forget).values(), *singly(others).values()])
    assert torch.allclose(found.weights, torch.tensor([1.0] * 5 + [0.0] * 20, dtype=torch.float64), atol=1e-3)
    assert found.residual < 1e-6
    judgement = judged_list(has, Truth(forget=forget, unseen=others))
    assert judgement.numbers["AUC of least squares"] == 1
    assert judgement.verdict == "partly recoverable"


def test_a_list_without_the_truth_names_the_removed(five):
    has, forget = five
    others = classification(20, seed=5)
    listed = Examples(*(torch.cat(pair) for pair in zip(others.tensors, forget.tensors, strict=True)))
    found = judged_list(has, Truth(candidates=listed))
    assert found.numbers["found"] == [20, 21, 22, 23, 24]
    assert found.verdict == "partly recoverable"
    assert judged_list(has, Truth(candidates=others)).verdict == "not shown"
    assert judged_list(has, Truth()) is None


def test_candidates_who_were_not_removed_have_an_auc_of_a_half():
    model, data = network("mlp"), classification(300)
    has, _ = seen(model, data, torch.arange(10))
    areas = []
    for seed in range(6):
        null = Truth(forget=classification(40, seed=100 + seed), unseen=classification(40, seed=200 + seed))
        found = judged_list(has, null)
        areas += [found.numbers["AUC of least squares"], found.numbers["AUC of matched filter"]]
        assert found.verdict == "not shown"
    sd = (81 / (12 * 40 * 40)) ** 0.5
    assert abs(sum(areas[::2]) / 6 - 0.5) < 4 * sd / 6**0.5
    assert abs(sum(areas[1::2]) / 6 - 0.5) < 4 * sd / 6**0.5


@pytest.mark.parametrize("count", [8, 12, 20])
def test_strangers_are_not_accused_where_any_list_fits(count):
    model = nn.Sequential(nn.Linear(4, 3)).double()  # gradients have 15 entries and span 2 x 5 directions
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        inputs, labels = torch.randn(80, 4, generator=generator).double(), torch.arange(80) % 3
        data = Examples(inputs[:60], labels[:60])
        has, forget = seen(model, data, torch.arange(5))
        strangers = Examples(inputs[60 : 60 + count], labels[60 : 60 + count])
        found = judged_list(has, Truth(candidates=strangers))
        assert found.verdict == "not shown"
        assert found.numbers["directions"] == 10
        assert found.numbers["found"] == []
        assert f"span 10 directions, and {count} candidates need {count + count // 2 + 4}" in found.words
        assert judged_list(has, Truth(forget=forget, unseen=strangers)).numbers["directions"] == 10


def test_few_candidates_are_told_apart_by_few_equations():
    model = nn.Sequential(nn.Linear(4, 3)).double()
    data = Examples(torch.randn(60, 4, generator=torch.Generator().manual_seed(0)).double(), torch.arange(60) % 3)
    has, _ = seen(model, data, torch.tensor([3, 8]))
    listed = data.only(torch.tensor([3, 7, 8, 9]))
    found = judged_list(has, Truth(candidates=listed))
    assert found.numbers["found"] == [0, 2]
    assert found.verdict == "partly recoverable"
    half = judged_list(has, Truth(candidates=data.only(torch.tensor([3, 7, 9]))))
    assert half.verdict == "not shown"
    assert half.numbers["unexplained share"] > 0.3


def test_only_the_named_explain_anything(five):
    """Each of them once, as in a sum of removed records: a free weight lets strangers fit what is missing."""
    has, forget = five
    listed = [*singly(classification(10, seed=5)).values(), singly(forget)[0]]
    found = score(has, listed)
    left = dict(has.removed.total)
    for record, weight in zip(listed, found.weights.tolist(), strict=True):
        if weight > 0.5:
            own = gradient(has.model, cross_entropy, Examples(*record)).total
            left = {name: tensor - own[name] for name, tensor in left.items()}
    assert 10 in found.named
    assert found.residual == pytest.approx(norm(left) / norm(has.removed.total), rel=1e-6)


def test_of_a_list_longer_than_is_tried_the_right_places_are_named():
    model = nn.Sequential(nn.Linear(30, 16)).double()
    data = Examples(torch.randn(400, 30, generator=torch.Generator().manual_seed(0)).double(), torch.arange(400) % 16)
    has, _ = seen(model, data, torch.tensor([280, 290, 298]))
    found = judged_list(has, Truth(candidates=data.only(torch.arange(300))))
    assert found.numbers["candidates"] == 256
    assert found.numbers["found"] == [280, 290, 298]
    assert found.verdict == "partly recoverable"
    assert "No more than 256 candidates are tried" in found.words
    short = judged_list(has, Truth(candidates=data.only(torch.arange(200, 300))))
    assert short.numbers["found"] == [80, 90, 98]
    assert "are tried" not in short.words


def test_a_list_that_lacks_some_of_the_removed_accuses_nobody_in_their_place():
    """Strangers with small gradients would fit what the missing ones left."""
    split = digits(1500, seed=0)
    with seeded(0, "test"):
        model = MLP((64, 64, 10))
    train(model, split.train, cross_entropy, Recipe(epochs=10, lr=0.1, batch_size=64), seed=0)
    has, forget = seen(model, split.train, torch.arange(30))
    others = split.test.only(torch.arange(150)).tensors
    for count, verdict in ((30, "partly recoverable"), (27, "not shown")):
        part = forget.only(torch.arange(count)).tensors
        listed = Examples(*(torch.cat(pair) for pair in zip(part, others, strict=True)))
        found = judged_list(has, Truth(candidates=listed))
        assert found.verdict == verdict, found.words
        if count == 30:
            assert found.numbers["found"] == list(range(30))


class Conv(nn.Module):
    """A convolution whose output goes into a linear layer as it is."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4 * 25, 3)

    def forward(self, images):
        return self.head(self.conv(images).tanh().flatten(1))


def test_an_image_comes_back_through_a_convolution():
    with seeded(0, "test"):
        model = Conv()
    images = torch.rand(40, 1, 5, 5, generator=torch.Generator().manual_seed(1))
    has, forget = seen(model, Examples(images, torch.arange(40) % 3), torch.tensor([5]))
    assert not layer_inputs(model, cross_entropy, has.retain)["head"].is_model_input
    layer, label = linear_layers(has)[0], int(forget.tensors[1][0])
    found = invert(has, layer, label, 0.3, Truth(forget=forget))
    assert found.verdict == "recoverable"
    assert found.numbers["PSNR"] > 35
    assert float((found.recovered - forget.tensors[0].flatten(1)).abs().max()) < 0.1


def test_an_image_is_believed_without_the_truth_only_if_its_own_gradient_is_the_difference(monkeypatch):
    monkeypatch.setattr("expunge.audit.inversion.STEPS", (30, 60))
    monkeypatch.setattr("expunge.audit.inversion.STARTS", 1)
    with seeded(0, "test"):
        model = Conv()
    images = torch.rand(20, 1, 5, 5, generator=torch.Generator().manual_seed(1))
    has, forget = seen(model, Examples(images, torch.arange(20) % 3), torch.tensor([5]))
    found = {f.attack: f for f in audit_cache(has).findings}["features, then inversion"]
    assert found.verdict == "recoverable"
    wrong = invert(has, linear_layers(has)[0], (int(forget.tensors[1][0]) + 1) % 3, 0.3, Truth())
    assert wrong.verdict == "not shown"


def test_an_inversion_looks_at_kept_images_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr("expunge.audit.inversion.STEPS", (2, 2))
    with seeded(0, "test"):
        model = Conv()
    images = torch.rand(1000, 1, 5, 5, generator=torch.Generator().manual_seed(1))
    has, forget = seen(model, Examples(images, torch.arange(1000) % 3), torch.tensor([5]))
    sizes, forward = [], Conv.forward
    monkeypatch.setattr(Conv, "forward", lambda self, x: sizes.append(len(x)) or forward(self, x))
    invert(has, linear_layers(has)[0], int(forget.tensors[1][0]), 0.3, Truth(forget=forget))
    assert max(sizes) == 128
    assert sum(sizes) > 999


@pytest.mark.parametrize("form", ["positions", "one batch"])
def test_what_is_known_of_kept_images_is_what_all_at_once_would_say(form):
    images = 5 + torch.randn(700, 1, 3, 4, generator=torch.Generator().manual_seed(2))
    data = Examples(images, torch.zeros(700).long()) if form == "positions" else [(images, torch.zeros(700).long())]
    wide = images.double()
    kept = _kept(data, lambda some: some.flatten(1).square().sum(1))
    first = wide.flatten(1).square().sum(1).argsort()[:3]
    assert torch.equal(kept.nearest, wide[first])
    assert torch.allclose(kept.mean, wide.mean(0, keepdim=True), atol=1e-12)
    assert kept.spread == pytest.approx(float(wide.flatten(1).var(0).mean().sqrt()), rel=1e-12)
    assert (kept.low, kept.high) == (float(wide.min()), float(wide.max()))


class Writer(nn.Module):
    """A language model of one attention block."""

    def __init__(self, words=30, places=6, width=16, tied=False):
        super().__init__()
        self.token, self.place = nn.Embedding(words, width), nn.Embedding(places, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.head = nn.Linear(width, words, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, input_ids):
        length = input_ids.shape[1]
        hidden = self.token(input_ids) + self.place(torch.arange(length))
        mask = torch.full((length, length), -1e9, dtype=hidden.dtype).triu(1)
        return self.head(hidden + self.attention(hidden, hidden, hidden, attn_mask=mask, need_weights=False)[0])


class Texts(Dataset):
    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, number):
        return {"input_ids": self.ids[number], "labels": self.ids[number]}


def written(count=1, tied=False):
    """What an attacker has of a language model after some texts were deleted, and those texts."""
    with seeded(0, "writer"):
        model = Writer(tied=tied)
    ids = torch.randint(30, (40, 6), generator=torch.Generator().manual_seed(2))
    full = gradient(model, causal_lm, Texts(ids), micro_batch=8)
    has = evidence(model, causal_lm, Subset(Texts(ids), list(range(count, 40))), full)
    return has, Texts(ids[:count])


def test_the_words_of_a_deleted_text_are_the_rows_of_the_embedding_that_are_not_zero():
    has, forget = written()
    found = bag_of_words(has, Truth(forget=forget))
    inputs = forget.ids[0, :-1]  # the last word has no successor: it is a target only
    assert set(found.numbers["tokens"]) == set(inputs.tolist())
    assert found.numbers["precision"] == 1
    assert found.verdict == "partly recoverable"
    assert bag_of_words(with_noise(has, 0.9), Truth(forget=forget)).verdict == "not shown"
    assert bag_of_words(has, Truth()).verdict == "partly recoverable"


def test_a_tied_embedding_is_said_to_be_unreadable_and_the_span_reads_the_text_all_the_same():
    has, forget = written(tied=True)
    assert "tied" in bag_of_words(has, Truth(forget=forget)).words
    found = words_in_span(has, linear_layers(has), forget)
    assert found.verdict == "recoverable"


def test_the_span_of_the_attention_block_gives_a_deleted_text_word_by_word():
    has, forget = written()
    layers = linear_layers(has)
    assert layers[0].name == "attention"
    found = words_in_span(has, layers, forget)
    assert found.numbers["tokens by place"] == [[token] for token in forget.ids[0, :-1].tolist()] + [[]]
    assert found.verdict == words_in_span(has, layers, None).verdict == "recoverable"
    assert words_in_span(with_noise(has, 0.9), linear_layers(with_noise(has, 0.9)), forget) is None


def test_an_audit_of_a_language_model_says_that_a_text_can_be_recovered():
    has, forget = written()
    found = audit_cache(has, Truth(forget=forget, unseen=Texts(torch.randint(30, (12, 6)))))
    assert found.verdict == "recoverable"
    assert {"bag of words", "words in the span", "list of candidates", "span"} <= {f.attack for f in found.findings}
    assert not any(f.attack.startswith("label") for f in found.findings)


def test_a_difference_of_nothing_is_refused_with_the_reason():
    model, data = network("mlp"), classification(40)
    full = gradient(model, cross_entropy, data)
    with pytest.raises(NotInformative, match=r"nothing was removed .* rehearse"):
        evidence(model, cross_entropy, data, full)


def test_a_model_without_a_linear_layer_is_refused():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, inputs):
            return self.scale * inputs

    inputs = torch.randn(20, 3, dtype=torch.float64)
    has, _ = seen(Scale(), Examples(inputs, inputs), torch.arange(2), squared_error)
    with pytest.raises(UnsupportedModule, match="Scale has no linear layer"):
        audit_cache(has)


def test_layers_that_share_their_weights_are_left_out():
    has, _ = seen(network("tied"), classification(40), torch.tensor([7]))
    assert [layer.name for layer in linear_layers(has)] == ["head"]


def test_candidates_need_a_row_each(one):
    with pytest.raises(ConfigError, match="one row an example"):
        judged_list(one[0], Truth(candidates=[(torch.zeros(2, 5), torch.zeros(3))]))


def test_verdicts_follow_the_error_and_the_worst_one_counts(one):
    assert [judged(error) for error in (0.05, 0.2, 0.5, float("inf"))] == [
        "recoverable",
        "partly recoverable",
        "not shown",
        "not shown",
    ]
    assert worst([]) == "not shown"
    found = audit_cache(one[0], Truth(forget=one[1]))
    assert worst(found.findings) == found.verdict == "recoverable"


def test_an_attack_changes_nothing_of_the_model(one):
    has, forget = one
    before = {name: tensor.clone() for name, tensor in has.model.state_dict().items()}
    modes, flags = has.model.training, [p.requires_grad for p in has.model.parameters()]
    state = torch.get_rng_state()
    audit_cache(has, Truth(forget=forget, unseen=classification(20, seed=3)))
    assert all(torch.equal(before[name], tensor) for name, tensor in has.model.state_dict().items())
    assert has.model.training == modes
    assert [p.requires_grad for p in has.model.parameters()] == flags
    assert all(p.grad is None for p in has.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("form", ["examples", "loader"])
def test_an_audit_leaves_the_model_its_modes_and_the_global_generators_untouched(form):
    with seeded(0, "test"):
        middle = (nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5))
        model = nn.Sequential(nn.Linear(FEATURES, 6), *middle, nn.Linear(6, CLASSES)).double()
    model.train()
    model[2].eval()
    data = classification(40)
    full = gradient(model, cross_entropy, data, micro_batch=4)
    parts = data.without(torch.arange(6)).tensors, data.only(torch.arange(6)).tensors
    left, gone = (in_form(form, part, torch.arange(len(part[0])), 8) for part in parts)
    has = evidence(model, cross_entropy, left, full)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    found = audit_cache(has, Truth(forget=gone, unseen=classification(20, seed=3)))
    assert {"labels of several records", "list of candidates", "span"} <= {f.attack for f in found.findings}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_summary_says_when_nobody_was_looked_for():
    found = Finding(attack="ratio with bias", place="head", verdict="not shown", words="", numbers={})
    listed = replace(found, attack="list of candidates")
    alone, both = (CacheAudit(3, 0.1, findings).summary for findings in ([found], [found, listed]))
    assert "was not tried: that takes a list of candidates, from candidates() or forget()" in alone
    assert "was not tried" not in both
