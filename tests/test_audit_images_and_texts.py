"""Removed images and texts are put together again."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from expunge import Examples, causal_lm, cross_entropy, gradient, seeded
from expunge.audit.finding import Truth, evidence
from expunge.audit.inversion import _kept, invert
from expunge.audit.layers import layer_inputs, linear_layers
from expunge.audit.leakage import audit_cache
from expunge.audit.span import words_in_span
from expunge.audit.words import bag_of_words
from tests.attacked import seen, with_noise
from tests.test_per_example import Masked, built, texts


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
    assert "not counted" not in found.words
    twin = Examples(torch.cat([has.retain.tensors[0], forget.tensors[0]]), torch.arange(40) % 3)
    known = invert(replace(has, retain=twin), layer, label, 0.3, Truth(forget=forget))
    assert known.verdict == "not shown"
    assert "That is not counted: what is left holds records as near" in known.words


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


class Patches(nn.Module):
    """A network whose first linear layer runs on patches."""

    def __init__(self):
        super().__init__()
        self.patch, self.mix, self.head = nn.Conv2d(1, 8, 4, 4), nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, images):
        return self.head(self.mix(self.patch(images).flatten(2).mT).relu().mean(1))


def test_a_network_of_patches_is_audited_without_an_inversion():
    generator = torch.Generator().manual_seed(0)
    data = Examples(torch.rand(40, 1, 8, 8, generator=generator, dtype=torch.float64), torch.arange(40) % 3)
    with seeded(0, "test"):
        model = Patches().double()
    has, forget = seen(model, data, torch.tensor([5]))
    attacks = {finding.attack for finding in audit_cache(has, Truth(forget=forget)).findings}
    assert "ratio with bias" in attacks
    assert "features, then inversion" not in attacks


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


def test_layers_of_torchs_own_encoder_are_seen_behind_a_mask():
    model, data = built(Masked), texts()
    found = layer_inputs(model, cross_entropy, data)
    assert {"layers.layers.0.linear1", "layers.layers.0.linear2", "head"} <= set(found)
    assert all(len(inputs.values) for inputs in found.values())
    assert torch.backends.mha.get_fastpath_enabled()
