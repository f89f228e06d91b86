"""Attacks on exact gradients must find what is there, and on noise nothing."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from expunge import Examples, cross_entropy, gradient, seeded, squared_error
from expunge.audit.finding import Finding, Truth, evidence, judged, worst
from expunge.audit.labels import composition, labels
from expunge.audit.layers import layer_inputs, linear_layers
from expunge.audit.leakage import CacheAudit, audit_cache
from expunge.audit.ratio import with_bias, without_bias
from expunge.audit.span import records_in_span, span
from expunge.errors import NotInformative, UnsupportedModule
from tests.attacked import seen, with_noise
from tests.zoo import CLASSES, FEATURES, classification, in_form, network


def attacked(attack, has, forget, number=0):
    """A ratio attack on one layer, judged with the truth and without it."""
    layer = linear_layers(has)[number]
    kept, own = (layer_inputs(has.model, has.loss_terms, data)[layer.name] for data in (has.retain, forget))
    return attack(layer, kept, own, has.removed.count), attack(layer, kept, None, has.removed.count)


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
def test_nothing_is_found_in_noise_below_the_floor_or_above_it(one_removed, attack, size):
    for number in (0, 1):
        for finding in attacked(attack, with_noise(one_removed[0], size), one_removed[1], number):
            assert finding.verdict == "not shown"


@pytest.mark.parametrize("size", [0.9, 1e8])
def test_a_whole_audit_of_noise_finds_nothing(five_removed, size):
    unseen = classification(30, seed=9)
    found = audit_cache(with_noise(five_removed[0], size), Truth(forget=five_removed[1], unseen=unseen))
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


@pytest.mark.parametrize("outputs", [1, 2])
def test_the_mixture_that_few_outputs_leave_behind_a_linear_layer_is_no_record(outputs):
    with seeded(0, "test"):
        model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Linear(8, outputs)).double()
    inputs, targets = classification(40).tensors
    data = Examples(inputs, targets % 2 if outputs == 2 else inputs[:, :1])
    has, forget = seen(model, data, torch.arange(6), cross_entropy if outputs == 2 else squared_error)
    for attack in (with_bias, without_bias):  # without the truth
        assert attacked(attack, has, forget)[1].verdict == "not shown"
    assert "may be a mixture of several records" in attacked(without_bias, has, forget)[1].words
    one, truth = seen(model, data, torch.tensor([3]), has.loss_terms)
    assert all(found.verdict == "recoverable" for a in (with_bias, without_bias) for found in attacked(a, one, truth))


def test_what_a_kept_twin_shows_anyway_is_no_news():
    inputs, targets = classification(40).tensors
    inputs[8] = inputs[7]
    has, forget = seen(network("mlp"), Examples(inputs, targets), torch.tensor([7]))
    found = attacked(with_bias, has, forget)[0]
    assert found.verdict == "not shown"
    assert "1 more are met as closely and not counted: what is left holds records as near" in found.words
    assert (found.numbers["recovered"], found.numbers["recovered, but no news"]) == (0, 1)
    alone = seen(network("mlp"), Examples(inputs, targets), torch.tensor([3]))
    assert "not counted" not in attacked(with_bias, *alone)[0].words


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


def test_of_two_classes_without_a_bias_either_label_may_be_the_one():
    with seeded(0, "test"):
        model = nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, 2, bias=False)).double()
    inputs, targets = classification(40).tensors
    has, forget = seen(model, Examples(inputs, targets % 2), torch.tensor([3]))
    assert [labels(has, head_of(has), each).verdict for each in (Truth(), Truth(forget=forget))] == ["not shown"] * 2


class Packed(nn.Module):
    """Tokens without the padding, all records in a row."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Linear(FEATURES, 30), nn.Linear(30, CLASSES)

    def forward(self, inputs):
        real = inputs[..., 0] > 0
        hidden = self.words(inputs[real]).relu()
        return self.head(hidden.new_zeros(len(inputs), 30).index_add(0, real.nonzero()[:, 0], hidden))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, CLASSES)

    def forward(self, inputs):
        return self.head(self.inner(self.inner(inputs).relu()).relu())


@pytest.mark.parametrize("kind", [Packed, Twice])
def test_rows_that_nobody_knows_the_records_of_are_not_told_apart(kind):
    generator = torch.Generator().manual_seed(0)
    shape = (40, 3, FEATURES) if kind is Packed else (40, FEATURES)
    inputs, others = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    with seeded(0, "test"):
        model = kind().double()
    has, forget = seen(model, Examples(inputs, torch.arange(40) % CLASSES), torch.tensor([5, 7]))
    audit = audit_cache(has, Truth(forget=forget, unseen=Examples(others, torch.arange(40) % CLASSES)))
    (found,) = [f for f in audit.findings if (f.attack, f.place) == ("span", "words" if kind is Packed else "inner")]
    assert found.verdict == "not shown"
    assert "has rank" in found.words or "nobody knows which are whose" in found.words
    assert layer_inputs(model, cross_entropy, forget)[found.place].per_example == 0


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


def test_verdicts_follow_the_error_and_the_worst_one_counts(one_removed):
    assert [judged(error) for error in (0.05, 0.2, 0.5, float("inf"))] == [
        "recoverable",
        "partly recoverable",
        "not shown",
        "not shown",
    ]
    assert worst([]) == "not shown"
    found = audit_cache(one_removed[0], Truth(forget=one_removed[1]))
    assert worst(found.findings) == found.verdict == "recoverable"


def test_an_attack_changes_nothing_of_the_model(one_removed):
    has, forget = one_removed
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


@pytest.mark.parametrize("numbers", [1, 3])
def test_the_target_of_one_record_of_a_regression_is_read_off_the_last_bias(numbers):
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(40, size, generator=generator, dtype=torch.float64) for size in (5, numbers))
    with seeded(0):
        model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, numbers)).double()
    has, removed = seen(model, Examples(inputs, 100 * targets), torch.tensor([7]), squared_error)
    for truth in (Truth(), Truth(forget=removed)):
        (found,) = (each for each in audit_cache(has, truth).findings if each.attack == "target of one record")
        assert found.verdict == "recoverable"
        assert found.numbers["target"] == pytest.approx((100 * targets[7]).tolist(), rel=1e-4)
    wrong = Truth(forget=Examples(removed.tensors[0], removed.tensors[1] + 9))
    (found,) = (each for each in audit_cache(has, wrong).findings if each.attack == "target of one record")
    assert found.verdict == "not shown"
    assert "and it is" in found.words
    two, _ = seen(model, Examples(inputs, targets), torch.tensor([7, 9]), squared_error)
    assert not [each for each in audit_cache(two).findings if each.attack == "target of one record"]


def test_without_a_bias_the_target_is_not_told():
    with seeded(0):
        model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 1, bias=False)).double()
    inputs = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    has, _ = seen(model, Examples(inputs, inputs[:, :1] ** 2), torch.tensor([7]), squared_error)
    (found,) = (each for each in audit_cache(has).findings if each.attack == "target of one record")
    assert found.verdict == "not shown"
