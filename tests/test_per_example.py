"""Squared gradients of single examples, against a loop over them."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from expunge import Examples, cross_entropy
from expunge.errors import ConfigError, NonDeterministicLoss, NotFinite, UnsupportedModule
from expunge.methods import per_example
from expunge.methods.fisher import every_class
from expunge.methods.layer_squares import layer_squares
from expunge.methods.per_example import examples_in, squared_gradients
from expunge.models.convnet import ConvNet
from expunge.trace import Trace
from tests.test_reload_curvature import each_gradient
from tests.zoo import CLASSES, FEATURES, FORMS, NETWORKS, classification, in_form, network, tensors


def built(make) -> nn.Module:
    """A float64 model, with moved BatchNorm statistics and no parameter at a special value."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = make().double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        for p in model.parameters():
            p.data.add_(0.3 * torch.randn_like(p))
    return model


class Scaled(nn.Module):
    """A parameter that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(FEATURES))
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head((inputs * self.scale).tanh())


class Twice(nn.Module):
    """A layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.layer(self.layer(inputs).tanh()).tanh())


class Borrowed(Twice):
    """A weight that is used outside its layer, too."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(functional.linear(self.layer(inputs).tanh(), self.layer.weight).tanh())


class Sequence(nn.Module):
    """Linear layers and a normalisation on three places an example, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(FEATURES, 4), nn.LayerNorm(4)
        self.second, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        places = torch.stack([inputs, inputs.square(), inputs.cos()], 1)
        hidden = self.norm(self.first(places))
        return self.head((hidden + self.second(hidden).tanh()).mean(1))


class Looks(Scaled):
    """Looks at numbers inside forward()."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) * (2.0 if inputs.sum().item() > 0 else 1.0)


IMAGES = {
    "convnet": lambda: ConvNet(2, CLASSES, (3, 4)),
    "odd convolutions": lambda: nn.Sequential(
        nn.Conv2d(2, 4, (3, 2), stride=2, padding=(2, 1), dilation=(1, 2), groups=2),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 3, 3, padding="same", padding_mode="circular"),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    ),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.Flatten(), nn.Linear(3 * 49, CLASSES)),
}
VECTORS = {"scaled": Scaled, "twice": Twice, "borrowed": Borrowed, "sequence": Sequence}


def images(count: int) -> Examples:
    inputs = torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Examples(inputs, tensors(count)[1])


def case(kind: str) -> tuple[nn.Module, Examples]:
    if kind in IMAGES:
        return built(IMAGES[kind]), images(13)
    return (built(VECTORS[kind]) if kind in VECTORS else network(kind)), classification(13)


def one_by_one(model: nn.Module, loss_terms, data: Examples) -> dict[str, Tensor]:
    """The definition: a backward pass a term."""
    return {name: rows.square().sum(0) for name, rows in each_gradient(model, data, loss_terms).items()}


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, found in a.items():
        torch.testing.assert_close(found, b[name], rtol=1e-9, atol=1e-14)


def column_by_column(model: nn.Module, batch) -> Tensor:
    """Several terms an example, in another order than that of the examples."""
    return model(batch[0]).square().T.flatten()


@pytest.mark.parametrize("loss_terms", [cross_entropy, every_class, column_by_column])
@pytest.mark.parametrize("kind", [*NETWORKS, *VECTORS, *IMAGES])
def test_squares_are_those_of_a_loop_over_single_examples(kind, loss_terms):
    model, data = case(kind)
    close(squared_gradients(model, loss_terms, data, chunk=5), one_by_one(model, loss_terms, data))


@pytest.mark.parametrize("kind", ["batch-norm", "sequence", "convnet", "odd convolutions"])
def test_one_batched_pass_and_vmap_agree(kind, monkeypatch):
    model, data = case(kind)
    passes = squared_gradients(model, every_class, data)
    monkeypatch.setattr(per_example, "_try_layers", lambda *_: (0, CLASSES))
    monkeypatch.setattr(per_example, "layer_squares", None)
    close(passes, squared_gradients(model, every_class, data))


@pytest.mark.parametrize(
    ("kind", "batched"),
    [
        *((kind, True) for kind in ("mlp", "batch-norm", "frozen", "sequence", "convnet", "odd convolutions")),
        *((kind, False) for kind in ("transposed", "tied", "scaled", "twice", "borrowed")),
    ],
)
def test_common_layers_take_the_batched_pass_and_others_do_not(kind, batched):
    model, data = case(kind)
    model.eval()
    theta = {name: p for name, p in model.named_parameters() if p.requires_grad}
    numbers, terms = per_example._try_layers(model, cross_entropy, theta, data.tensors)
    assert (numbers > 0, terms) == (batched, 1)


def test_a_weight_used_outside_its_layer_is_what_the_batched_pass_cannot_see():
    model, data = case("borrowed")
    found = layer_squares(model, cross_entropy, dict(model.named_parameters()), data.tensors, len(data))
    truth = one_by_one(model, cross_entropy, data)["layer.weight"]
    assert found is not None
    assert not torch.allclose(found[0]["layer.weight"], truth, rtol=0.1)


class Cut(nn.Module):
    """A layer whose weights could be trained, behind which no gradient comes back."""

    def __init__(self, first: nn.Linear, last: nn.Linear) -> None:
        super().__init__()
        self.first, self.last = first, last

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self.first(inputs).relu_()
        return self.last(hidden)


def test_a_layer_without_a_gradient_has_squares_of_zero():
    data = tensors(12)
    width = data[0].shape[1]
    model = Cut(nn.Linear(width, 5), nn.Linear(5, CLASSES)).double()
    found = squared_gradients(model, cross_entropy, Examples(*data))
    assert not found["first.weight"].any()
    with torch.no_grad():
        hidden = model.first(data[0]).relu()
    alone = one_by_one(model.last, cross_entropy, Examples(hidden, data[1]))
    close({name: found[f"last.{name}"] for name in alone}, alone)


@pytest.mark.parametrize("form", FORMS)
def test_any_form_of_data_gives_the_same(form):
    positions = torch.tensor([0, 2, 3, 7, 8, 11])
    model, data = network("mlp"), tensors(12)
    found = squared_gradients(model, cross_entropy, in_form(form, data, positions, 4), chunk=4)
    close(found, one_by_one(model, cross_entropy, Examples(*data).only(positions)))
    assert examples_in(in_form(form, data, positions, 4)) == 6


def test_float32_models_are_summed_in_float64_and_left_as_they_were():
    model = network("batch-norm").float().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, trace = torch.get_rng_state(), Trace("test", 0)
    data = classification(40, dtype=torch.float32)
    found = squared_gradients(model, every_class, data, trace=trace)
    assert all(tensor.dtype == torch.float64 for tensor in found.values())
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert trace.backwarded == 40 * CLASSES
    truth = one_by_one(model.double(), every_class, classification(40))
    for name in found:
        assert float((found[name] - truth[name]).norm() / truth[name].norm()) < 1e-5


@pytest.mark.parametrize("as_batches", [False, True])
def test_a_limit_takes_so_many_examples_at_random(as_batches):
    model = nn.Linear(20, 2, bias=False)
    data = Examples(torch.eye(20), torch.arange(20) % 2)  # each example has a column of its own
    given = list(data.fetch(torch.arange(20).split(7))) if as_batches else data
    whole = squared_gradients(model, cross_entropy, given)["weight"]
    taken = []
    for seed in range(3):
        part = squared_gradients(model, cross_entropy, given, limit=8, chunk=3, seed=seed)["weight"]
        mine = part[0] != 0
        assert mine.sum() == 8
        torch.testing.assert_close(part, whole * mine)
        taken.append(tuple(mine.tolist()))
    assert len(set(taken)) == 3
    assert (examples_in(given, 8), examples_in(given, 50), examples_in(given)) == (8, 20, 20)
    torch.testing.assert_close(squared_gradients(model, cross_entropy, given, limit=50)["weight"], whole)


def tokens(model: nn.Module, batch) -> Tensor:
    """As many terms as the label says."""
    return model(batch[0])[:, 0].repeat_interleave(batch[1] + 1)


class Recurrent(nn.Module):
    """Texts of several lengths, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer, self.head = nn.Embedding(9, 4), nn.GRU(4, 5, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, texts: Tensor) -> Tensor:
        lengths = (texts > 0).sum(1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(self.words(texts), lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.layer(packed)[1][0])


class Masked(nn.Module):
    """The same with torch's own encoder, which takes a kernel of its own in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.words, self.layers, self.head = nn.Embedding(9, 4), nn.TransformerEncoder(layer, 1), nn.Linear(4, CLASSES)

    def forward(self, texts: Tensor) -> Tensor:
        return self.head(self.layers(self.words(texts), src_key_padding_mask=texts == 0).mean(1))


def texts(count: int = 12) -> Examples:
    drawn = torch.randint(1, 9, (count, 6), generator=torch.Generator().manual_seed(0))
    lengths = 2 + torch.arange(count) % 4
    return Examples(drawn * (torch.arange(6) < lengths[:, None]), torch.arange(count) % CLASSES)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", [Recurrent, Masked])
def test_models_of_texts_are_taken_apart_as_they_are(kind):
    model, data = built(kind).double(), texts()
    fast = torch.backends.mha.get_fastpath_enabled()
    found = squared_gradients(model, cross_entropy, data)
    truth = one_by_one(model, cross_entropy, data)
    assert truth["words.weight"].any()
    for name, tensor in truth.items():
        torch.testing.assert_close(found[name], tensor)
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_statistics_that_are_wider_than_what_is_normalised_are_no_obstacle():
    model = network("batch-norm").bfloat16()
    inputs, labels = classification(12).tensors
    found = squared_gradients(model, cross_entropy, Examples(inputs.bfloat16(), labels))
    assert all(tensor.isfinite().all() for tensor in found.values())


def test_a_model_that_looks_at_values_goes_through_one_example_at_a_time():
    model, data = built(Looks).double(), classification(12)
    found, truth = squared_gradients(model, cross_entropy, data), one_by_one(model, cross_entropy, data)
    for name, tensor in truth.items():
        torch.testing.assert_close(found[name], tensor)


def test_what_cannot_be_taken_apart_is_refused():
    data = classification(12)
    with pytest.raises(UnsupportedModule, match=r"Looks.*torch\.func\.vmap.*item.*take a method without"):
        squared_gradients(built(Looks), every_class, data)
    with pytest.raises(UnsupportedModule, match=r"terms for the first .* examples.*return a loss of 0"):
        squared_gradients(network("mlp"), tokens, data)
    uneven = [(*classification(4).tensors, data.tensors[0][:3])]
    with pytest.raises(UnsupportedModule, match=r"have \[3, 4\] rows"):
        squared_gradients(network("mlp"), lambda m, b: cross_entropy(m, b[:2]), uneven)


def test_examples_that_go_through_alone_have_as_many_terms_each():
    def some(model: nn.Module, batch) -> Tensor:
        return cross_entropy(model, batch).repeat_interleave(batch[1])  # as many as the label says

    labels = torch.tensor([1, 1, 1, 0, 2, *[1] * 7])  # 12 terms all the same
    with pytest.raises(UnsupportedModule, match=r"gives \[0, 1, 2\] terms for the first 12 examples of a batch"):
        squared_gradients(built(Recurrent), some, Examples(texts().tensors[0], labels))


def test_what_is_wrong_with_loss_and_settings_is_said():
    model, data = network("mlp"), classification(6)
    with pytest.raises(ConfigError, match="chunk=0"):
        squared_gradients(model, cross_entropy, data, chunk=0)
    with pytest.raises(ConfigError, match="limit=0"):
        squared_gradients(model, cross_entropy, data, limit=0)
    with pytest.raises(NonDeterministicLoss):
        squared_gradients(model, lambda m, b: functional.dropout(cross_entropy(m, b)), data)
    poisoned = Examples(data.tensors[0].clone().index_fill_(0, torch.tensor([4]), float("nan")), data.tensors[1])
    with pytest.raises(NotFinite, match="loss of an example is nan"):
        squared_gradients(model, cross_entropy, poisoned)


@pytest.mark.parametrize(("cached", "largest"), [(1, 5), (7 * 7, 7), (10**9, 20)])
def test_a_batched_pass_takes_as_many_examples_as_a_processor_keeps_close(cached, largest, monkeypatch):
    monkeypatch.setattr(per_example, "CACHED", cached)
    data, lengths = Examples(torch.randn(41, 4), torch.arange(41) % 7), []

    def terms(model: nn.Module, batch) -> Tensor:
        lengths.append(len(batch[0]))
        return cross_entropy(model, batch)

    squared_gradients(nn.Linear(4, 7), terms, data, chunk=5)
    assert lengths[-2] == largest
