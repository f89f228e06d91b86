import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from expunge import params
from expunge.batches import Examples
from expunge.errors import ConfigError
from expunge.gradient import gradient
from expunge.losses import causal_lm, causal_lm_documents, cross_entropy, name_of, squared_error
from tests.zoo import FORMS, NETWORKS, classification, flat, in_form, network, summed_by_autograd, tensors

COUNT = 40
removals = st.sets(st.integers(0, COUNT - 1), min_size=1, max_size=COUNT - 1).map(sorted).map(torch.tensor)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
eager = {"backend": "eager"}


def close(a: dict, b: dict, relative: float = 1e-9) -> bool:
    assert list(a) == list(b)
    return float((flat(a) - flat(b)).norm()) <= relative * float(flat(b).norm())


def left_of(removed: torch.Tensor) -> torch.Tensor:
    everything = torch.arange(COUNT)
    return everything[~torch.isin(everything, removed)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", NETWORKS)
@given(removed=removals, size=st.integers(1, COUNT + 5), seed=st.integers(0, 5))
@settings(max_examples=6, deadline=None, derandomize=True)
def test_full_minus_retain_is_the_gradient_of_what_was_removed(kind, form, removed, size, seed):
    model, data = network(kind, seed), tensors(COUNT, seed)
    full = gradient(model, cross_entropy, in_form(form, data, torch.arange(COUNT), size), micro_batch=size)
    retain = gradient(model, cross_entropy, in_form(form, data, left_of(removed), size), micro_batch=size)
    difference = full - retain
    forget = tuple(tensor[removed] for tensor in data)
    names = list(params.named_parameters(model))
    assert close(difference.total, summed_by_autograd(copy.deepcopy(model), names, forget))
    assert difference.count == len(removed)
    with torch.no_grad():
        loss = float(functional.cross_entropy(model.eval()(forget[0]), forget[1], reduction="sum"))
    assert difference.loss == pytest.approx(loss, rel=1e-9)
    assert difference.mean_loss == pytest.approx(loss / len(removed), rel=1e-9)


@pytest.mark.parametrize("select", [["0.weight"], ["3.bias", "0.bias"], lambda name, p: p.ndim == 2])
def test_a_subset_of_the_parameters_can_be_chosen_frozen_ones_too(select):
    model, data = network("frozen"), tensors(COUNT)
    names = list(params.named_parameters(model, select))
    total = gradient(model, cross_entropy, Examples(*data), parameters=select).total
    assert close(total, summed_by_autograd(copy.deepcopy(model), names, data))


def test_the_total_does_not_depend_on_the_micro_batch():
    model, data = network("batch-norm"), classification(COUNT)
    one, many = (gradient(model, cross_entropy, data, micro_batch=size) for size in (1, 1000))
    assert close(one.total, many.total, 1e-13)
    assert one.loss == pytest.approx(many.loss, rel=1e-14)
    assert (len(one.micro_batches.numbers), len(many.micro_batches.numbers)) == (COUNT, 1)


def test_a_pass_records_what_it_saw_where():
    model, data = network("mlp"), classification(COUNT).without(torch.tensor([8, 9, 10, 11, 39]))
    full = gradient(model, cross_entropy, data, micro_batch=4)
    groups = full.micro_batches
    assert groups.size == 4
    assert groups.numbers.tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert groups.counts.tolist() == [4, 4, 4, 4, 4, 4, 4, 4, 3]
    with torch.no_grad():
        terms = cross_entropy(model, data.tensors)
    sums = [float(terms[torch.isin(data.positions // 4, number)].sum()) for number in groups.numbers]
    assert groups.losses.tolist() == pytest.approx(sums, rel=1e-12)
    assert full.loss == pytest.approx(sum(sums), rel=1e-12)
    assert full.count == 35
    assert {full.total[name].dtype for name in full.total} == {torch.float64}
    assert {full.noise[name].dtype for name in full.noise} == {torch.float32}


@given(removed=removals, size=st.integers(1, COUNT + 5))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_exactly_the_micro_batches_that_lost_a_record_are_touched(removed, size):
    model, data = network("mlp"), classification(COUNT, dtype=torch.float64)
    full, retain = (gradient(model, cross_entropy, d, micro_batch=size) for d in (data, data.without(removed)))
    assert full.micro_batches.touched_by(retain.micro_batches)[0] == len(set((removed // size).tolist()))
    assert full.micro_batches.touched_by(full.micro_batches) == (0, 0)


@pytest.mark.parametrize("offset", range(1, 9))
def test_where_a_micro_batch_starts_in_memory_does_not_change_its_bits(offset):
    model, (inputs, labels) = network("mlp"), tensors(COUNT)
    moved = torch.cat([torch.zeros(offset, dtype=inputs.dtype), inputs.flatten()])[offset:].view_as(inputs)
    assert moved.data_ptr() % 64 == offset * 8 % 64
    here, there = (gradient(model, cross_entropy, Examples(x, labels), micro_batch=8) for x in (inputs, moved))
    assert all(torch.equal(here.total[name], there.total[name]) for name in here.total)
    assert here.micro_batches.touched_by(there.micro_batches) == (0, 0)


def test_corrected_records_give_the_old_gradient_minus_the_new():
    model, (inputs, labels) = network("mlp"), tensors(COUNT)
    wrong = torch.tensor([3, 17])
    corrected = labels.clone()
    corrected[wrong] = (labels[wrong] + 1) % 3
    full, new = (gradient(model, cross_entropy, Examples(inputs, y), micro_batch=8) for y in (labels, corrected))
    difference = full - new
    assert difference.count == 0
    assert full.micro_batches.touched_by(new.micro_batches)[0] == 2
    names = list(full.total)
    old_part = summed_by_autograd(copy.deepcopy(model), names, (inputs[wrong], labels[wrong]))
    new_part = summed_by_autograd(copy.deepcopy(model), names, (inputs[wrong], corrected[wrong]))
    assert close(difference.total, params.subtract(old_part, new_part))


def test_only_data_with_positions_is_aligned():
    model, data = network("mlp"), tensors(12)
    for form in FORMS:
        full = gradient(model, cross_entropy, in_form(form, data, torch.arange(12), 4))
        assert (full.micro_batches is not None) == (form != "batches")
        assert (full - full).micro_batches is None


def test_tied_parameters_are_summed_into_one():
    model = network("tied")
    assert "second.weight" not in gradient(model, cross_entropy, classification(5)).total


def state(model: nn.Module) -> list:
    tensors_ = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    flags = [module.training for module in model.modules()] + [p.requires_grad for p in model.parameters()]
    return [*tensors_, *(None if p.grad is None else p.grad.clone() for p in model.parameters()), *flags]


def same(a: list, b: list) -> bool:
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x is y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("fail_at", [None, 1, 3, 7])
@pytest.mark.parametrize("form", FORMS)
def test_everything_is_left_as_it_was_found(form, fail_at):
    model, calls = network("batch-norm"), 0
    model[0].eval()
    model[3].bias.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    held = model[3].weight.grad

    def loss_terms(model, batch):
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise RuntimeError("in the middle")
        return cross_entropy(model, batch)

    torch.manual_seed(5)
    before, random = state(model), torch.get_rng_state()
    data = in_form(form, tensors(COUNT), torch.arange(COUNT), 4)
    if fail_at is None:
        gradient(model, loss_terms, data, parameters=["0.weight", "3.bias"], micro_batch=4)
    else:
        with pytest.raises(RuntimeError, match="in the middle"):
            gradient(model, loss_terms, data, parameters=["0.weight", "3.bias"], micro_batch=4)
    assert same(before, state(model))
    assert model[3].weight.grad is held
    assert torch.equal(random, torch.get_rng_state())
    assert torch.is_grad_enabled()


def test_a_pass_works_where_gradients_are_switched_off():
    model, data = network("mlp"), tensors(8)
    expected = gradient(model, cross_entropy, Examples(*data)).total
    with torch.no_grad():
        assert close(gradient(model, cross_entropy, Examples(*data)).total, expected, 0)
        assert not torch.is_grad_enabled()


def test_a_sampler_of_its_own_is_taken_as_batches():
    data = TensorDataset(*tensors(6))
    in_order = DataLoader(data, batch_sampler=[[0, 1, 2, 3], [4, 5]])
    model = network("mlp")
    taken = gradient(model, cross_entropy, in_order)
    assert taken.micro_batches is None
    assert close(taken.total, gradient(model, cross_entropy, data).total, 1e-12)
    everything = DataLoader(data, sampler=WeightedRandomSampler([1.0] + [0.0] * 5, 6), batch_size=6)
    assert close(
        gradient(model, cross_entropy, everything).total,
        {n: 6 * t for n, t in gradient(model, cross_entropy, [tuple(x[:1] for x in data.tensors)]).total.items()},
    )


@pytest.mark.parametrize(
    ("dtype", "roundoff"), [(torch.float64, 2**-53), (torch.float32, 2**-24), (torch.bfloat16, 2**-8)]
)
def test_every_precision_is_summed_in_float64(dtype, roundoff):
    model = network("mlp").to(dtype)
    data = classification(60, dtype=dtype)
    full = gradient(model, cross_entropy, data, micro_batch=1)
    assert full.roundoff == roundoff
    one_by_one = [gradient(model, cross_entropy, data.only(torch.tensor([i]))).total for i in range(60)]
    exact = {name: sum(each[name] for each in one_by_one) for name in full.total}
    assert close(full.total, exact, 1e-14)
    magnitude = {name: sum(each[name].abs() for each in one_by_one) for name in full.total}
    assert close(full.noise, {name: 4 * roundoff * m for name, m in magnitude.items()}, 1e-5)


def test_a_compiled_model_gives_the_same_gradient_under_the_same_names():
    model, data = network("batch-norm"), classification(20)
    expected = gradient(model, cross_entropy, data, micro_batch=8)
    compiled = gradient(torch.compile(model, **eager), cross_entropy, data, micro_batch=8)
    assert close(compiled.total, expected.total, 1e-14)
    assert compiled.origin == expected.origin


class Words(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 4, sparse=sparse)
        self.head = nn.Linear(4, 3)

    def forward(self, words):
        return self.head(self.table(words).mean(1))


def test_sparse_gradients_are_summed_like_dense_ones():
    words = torch.randint(30, (40, 6), generator=torch.Generator().manual_seed(0))
    data = Examples(words, torch.arange(40) % 3)
    dense = Words(sparse=False)
    sparse = Words(sparse=True)
    sparse.load_state_dict(dense.state_dict())
    a, b = (gradient(model, cross_entropy, data, micro_batch=7) for model in (dense, sparse))
    assert close(b.total, a.total, 1e-6)
    assert close(b.noise, a.noise, 1e-6)
    assert sparse.table.weight.grad is None


def test_a_parameter_that_takes_no_part_has_a_zero_gradient():
    model = network("mlp")
    model.register_parameter("spare", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    full = gradient(model, cross_entropy, classification(9))
    assert full.total["spare"].tolist() == [0, 0, 0]
    assert not full.informative()["spare"].any()


class TinyLM(nn.Module):
    def __init__(self, wrapped: bool = False) -> None:
        super().__init__()
        self.table, self.head, self.wrapped = nn.Embedding(11, 4), nn.Linear(4, 11), wrapped

    def forward(self, input_ids, attention_mask):
        assert attention_mask.shape == input_ids.shape
        logits = self.head(self.table(input_ids).cumsum(1))
        return type("Output", (), {"logits": logits}) if self.wrapped else logits


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_language_loss_is_that_of_a_loop_over_target_tokens(wrapped):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(11, (3, 6), generator=generator)
    labels = tokens.clone()
    labels[0, 4:] = labels[1, :3] = labels[2, 2] = -100  # padding, a prompt, a hole
    mask = (labels != -100).long()
    model = TinyLM(wrapped)
    terms = causal_lm(model, {"input_ids": tokens, "labels": labels, "attention_mask": mask, "extra": tokens})
    logits = model.head(model.table(tokens).cumsum(1)).log_softmax(-1).detach()
    expected = [
        -float(logits[row, at - 1, labels[row, at]])
        for row in range(3)
        for at in range(1, 6)
        if int(labels[row, at]) != -100
    ]
    assert terms.tolist() == pytest.approx(expected, rel=1e-5)
    assert len(expected) == 10


def test_language_terms_are_tokens_and_add_up_over_paddings():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(11, (6, 7), generator=generator)
    labels = torch.where(torch.arange(7) < torch.tensor([[7], [2], [5], [3], [6], [4]]), tokens, -100)
    batch = {"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)}
    model = TinyLM().double()
    whole = gradient(model, causal_lm, [batch])
    parts = [{key: value[rows] for key, value in batch.items()} for rows in ([0, 1], [2, 3, 4], [5])]
    assert whole.count == 7 + 2 + 5 + 3 + 6 + 4 - 6
    assert close(gradient(model, causal_lm, parts).total, whole.total, 1e-12)
    assert (whole - gradient(model, causal_lm, parts[:2])).count == 3
    documents = gradient(model, causal_lm_documents, [batch])
    assert documents.count == 6
    assert documents.loss == pytest.approx(whole.loss, rel=1e-12)
    assert close(documents.total, whole.total, 1e-12)


@pytest.mark.parametrize("loss", [causal_lm, causal_lm_documents])
def test_a_language_loss_says_what_it_takes(loss):
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    for batch, said in (
        (
            (tokens, tokens),
            r"a batch is a tuple \(int64 \(2, 3\), int64 \(2, 3\)\), and this loss takes a dictionary with",
        ),
        ({"input_ids": tokens, "target": tokens}, "a batch has input_ids, target, and this loss takes"),
    ):
        with pytest.raises(ConfigError, match=said):
            loss(TinyLM(), batch)


def test_the_squared_error_is_summed_over_the_target():
    model = nn.Linear(2, 3)
    inputs, targets = torch.randn(4, 2), torch.randn(4, 3)
    expected = (model(inputs) - targets).pow(2).sum(1)
    assert torch.allclose(squared_error(model, (inputs, targets)), expected)
    flat_model = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))
    assert squared_error(flat_model, (inputs, targets[:, 0])).shape == (4,)


class Wrapped:
    def __call__(self, model, batch):
        return cross_entropy(model, batch)


def test_a_loss_is_known_by_the_name_of_its_function_or_type():
    assert name_of(cross_entropy) == "cross_entropy"
    assert name_of(Wrapped()) == "Wrapped"
    assert gradient(network("mlp"), Wrapped(), classification(4)).origin.loss_terms == "Wrapped"


def test_a_device_without_float64_is_summed_on_the_cpu(monkeypatch):
    model, data = network("mlp"), classification(20)
    expected = gradient(model, cross_entropy, data)
    monkeypatch.setattr("expunge.accumulator.WITHOUT_FLOAT64", ("cpu",))
    assert close(gradient(model, cross_entropy, data).total, expected.total, 0)


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("without", [(), ("cuda",)])
def test_a_pass_on_a_gpu_agrees_with_the_cpu(without, monkeypatch):
    monkeypatch.setattr("expunge.accumulator.WITHOUT_FLOAT64", without)
    model, data = network("batch-norm"), classification(COUNT)
    here = gradient(model, cross_entropy, data, micro_batch=8)
    there = gradient(copy.deepcopy(model).cuda(), cross_entropy, data.without(torch.tensor([3])), micro_batch=8)
    assert {tensor.device.type for tensor in there.total.values()} == {"cpu" if without else "cuda"}
    difference = here - there  # a cache is read to the CPU
    assert {tensor.device.type for tensor in difference.total.values()} == {"cpu"}
    names = list(here.total)
    record = tuple(tensor[3:4] for tensor in data.tensors)
    assert close(difference.total, summed_by_autograd(copy.deepcopy(model), names, record), 1e-9)


@pytest.mark.gpu
@cuda
def test_the_generator_of_a_gpu_is_left_alone():
    model = network("mlp").cuda()
    before = torch.cuda.get_rng_state()
    gradient(model, lambda m, b: cross_entropy(m, b) + 0 * torch.rand(len(b[0]), device="cuda"), classification(9))
    assert torch.equal(before, torch.cuda.get_rng_state())


def test_it_shows_what_it_is_of_and_not_a_million_numbers():
    data = classification(30)
    found = gradient(network("mlp"), cross_entropy, data, micro_batch=8)
    entries = sum(tensor.numel() for tensor in found.total.values())
    shown = f"Gradient(30 terms of cross_entropy, mean {found.mean_loss:.4g}, {entries} entries in 4 tensors"
    assert repr(found) == f"{shown})"
    assert repr(gradient(network("mlp"), cross_entropy, data, micro_batch=8, groups=3)) == f"{shown}, 3 groups)"
