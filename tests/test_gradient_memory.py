"""Gradient passes where memory is short: the sums elsewhere, micro-batches that do not fit."""

import warnings

import pytest
import torch
from torch import nn

from expunge import accumulator
from expunge.batches import Examples
from expunge.errors import ConfigError, OutOfMemory
from expunge.gradient import gradient
from expunge.losses import cross_entropy
from expunge.second_pass import second_pass
from tests.test_gradient import Words, same, state
from tests.zoo import NETWORKS, classification, flat, network, summed_by_autograd, tensors


def room_for(examples: int, error: type[Exception] = torch.OutOfMemoryError, message: str = "out of memory"):
    """A loss as of a device that holds so many examples, and the sizes it was called with."""
    called = []

    def loss_terms(model, batch):
        called.append(len(batch[0]))
        if len(batch[0]) > examples:
            raise error(message)
        return cross_entropy(model, batch)

    loss_terms.__qualname__ = "cross_entropy"
    return loss_terms, called


def identical(a, b) -> bool:
    pairs = [(a.total, b.total), (a.noise, b.noise), (vars(a.micro_batches), vars(b.micro_batches))]
    return (a.count, a.loss) == (b.count, b.loss) and all(
        list(x) == list(y)
        and all(torch.equal(x[n], y[n]) if isinstance(x[n], torch.Tensor) else x[n] == y[n] for n in x)
        for x, y in pairs
    )


class Mixed(nn.Module):
    """Parameters of two types, one that is unused, one whose memory is laid out otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network("batch-norm").float()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.unused = nn.Parameter(torch.ones(3))
        self.turned = nn.Parameter(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).t())

    def forward(self, inputs):
        return (self.inner(inputs) @ self.turned) * self.scale


def numbered_words() -> Examples:
    words = torch.randint(30, (40, 6), generator=torch.Generator().manual_seed(0))
    return Examples(words, torch.arange(40) % 3)


CASES = {kind: (lambda kind=kind: network(kind).float(), classification(40, dtype=torch.float32)) for kind in NETWORKS}
CASES |= {
    "mixed": (Mixed, classification(40, dtype=torch.float32)),
    "sparse": (lambda: Words(sparse=True), numbered_words()),
}


@pytest.mark.parametrize("case", CASES)
def test_sums_on_the_cpu_one_parameter_at_a_time_have_the_same_bits(case):
    make, data = CASES[case]
    model = make()
    before = state(model)
    on_device, on_cpu = (
        gradient(model, cross_entropy, data, micro_batch=7, accumulate_on=on) for on in ("device", "cpu")
    )
    assert identical(on_device, on_cpu)
    assert same(before, state(model))
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


def test_streamed_sums_leave_at_most_one_gradient_beside_the_model():
    model, held = network("batch-norm"), []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda _: held.append(sum(q.grad is not None for q in model.parameters())))
    gradient(model, cross_entropy, classification(20), micro_batch=5, accumulate_on="cpu")
    assert set(held) == {1}
    held.clear()
    gradient(model, cross_entropy, classification(20), micro_batch=5, accumulate_on="device")
    assert set(held) == {6}


NEEDED = 1010 * (4 + 8 + 4)  # of a float32 layer: gradients, float64 sums, float32 magnitudes


@pytest.mark.parametrize(
    ("free", "on", "kind"),
    [
        (2 * NEEDED, None, accumulator.Flat),
        (2 * NEEDED - 1, None, accumulator.Streamed),
        (2 * NEEDED - 1, "device", accumulator.Flat),
        (10 * NEEDED, "cpu", accumulator.Streamed),
        (None, None, accumulator.Flat),  # a device that does not say
    ],
)
def test_a_gpu_that_is_short_of_memory_gives_its_sums_away(free, on, kind, monkeypatch):
    monkeypatch.setattr(accumulator, "_free_memory", lambda _: free)
    assert type(accumulator.sums_of(dict(nn.Linear(100, 10).named_parameters()), on)) is kind


@pytest.mark.parametrize("on", ["device", "cpu"])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2 GiB"),
        (RuntimeError, "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
        (RuntimeError, "MPS backend out of memory"),
        (MemoryError, ""),
    ],
)
def test_the_largest_micro_batch_that_fits_is_found_by_halving_and_recorded(error, message, on):
    model, data = network("batch-norm"), classification(200)
    loss_terms, called = room_for(40, error, message)
    found = gradient(model, loss_terms, data, accumulate_on=on)
    assert found.micro_batches.size == 32
    assert max(called) == 128
    assert identical(found, gradient(model, cross_entropy, data, micro_batch=32))
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    again, computed, *_ = second_pass(found, model, loss_terms, data.without(torch.tensor([5, 190])))
    assert (computed, again.micro_batches.size) == (198, 32)
    assert found.micro_batches.touched_by(again.micro_batches)[0] == 2


def test_halving_goes_below_the_few_examples_of_the_probe():
    loss_terms, _ = room_for(3)
    found = gradient(network("mlp"), loss_terms, classification(50))
    assert found.micro_batches.size == 2
    assert found.count == 50


def test_memory_that_runs_out_late_starts_the_pass_anew():
    model, data = network("mlp"), classification(300)
    calls = []

    def loss_terms(model, batch):
        calls.append(len(batch[0]))
        if len(batch[0]) == 128 and calls.count(128) == 2:
            raise torch.OutOfMemoryError("no")
        return cross_entropy(model, batch)

    loss_terms.__qualname__ = "cross_entropy"
    for on in ("device", "cpu"):
        calls.clear()
        found = gradient(model, loss_terms, data, accumulate_on=on)
        assert identical(found, gradient(model, cross_entropy, data, micro_batch=64))


@pytest.mark.parametrize("on", ["device", "cpu"])
def test_a_size_that_is_given_is_kept_and_goes_through_in_parts(on):
    model, data = network("mlp").float(), classification(100, dtype=torch.float32)
    whole = gradient(model, cross_entropy, data, micro_batch=50)
    loss_terms, _ = room_for(20)
    with pytest.warns(UserWarning, match=r"micro-batches of 50 examples do not fit .* 12 at a time.*floor rises"):
        parts = gradient(model, loss_terms, data, micro_batch=50, accumulate_on=on)
    assert (parts.micro_batches.size, parts.micro_batches.counts.tolist()) == (50, [50, 50])
    twelve = gradient(
        model, cross_entropy, [tuple(t[a : a + 12] for t in half) for half in halves(data) for a in range(0, 50, 12)]
    )
    assert torch.equal(flat(parts.total), flat(twelve.total))
    assert torch.allclose(flat(parts.noise), flat(twelve.noise), rtol=1e-6)
    assert torch.allclose(flat(parts.total), flat(whole.total), rtol=1e-3, atol=1e-4)


def halves(data: Examples):
    return [tuple(tensor[:50] for tensor in data.tensors), tuple(tensor[50:] for tensor in data.tensors)]


def test_a_smaller_machine_finds_the_same_difference_within_a_floor_that_is_higher():
    model, data = network("mlp").float(), classification(400, dtype=torch.float32)
    full = gradient(model, cross_entropy, data, micro_batch=50)
    left = data.without(torch.tensor([7]))
    good = full - second_pass(full, model, cross_entropy, left)[0]
    with pytest.warns(UserWarning, match="25 at a time"):
        poor = full - second_pass(full, model, room_for(30)[0], left)[0]
    exact = summed_by_autograd(
        network("mlp"),
        list(full.total),
        tuple(t[7:8].to(torch.float64 if t.is_floating_point() else t.dtype) for t in data.tensors),
    )
    assert float(flat(poor.noise).norm()) > 3 * float(flat(good.noise).norm())
    assert bool(((flat(poor.total) - flat(exact)).abs() <= flat(poor.noise) + 1e-5 * flat(exact).abs()).all())


def test_batches_of_ones_own_are_divided_too():
    model, data = network("mlp"), tensors(90)
    loss_terms, called = room_for(20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gradient(model, loss_terms, [tuple(t[:60] for t in data), tuple(t[60:] for t in data)])
    assert found.count == 90
    assert called[-6:] == [15, 15, 15, 15, 15, 15]
    expected = gradient(model, cross_entropy, Examples(*data))
    assert torch.allclose(flat(found.total), flat(expected.total), rtol=1e-9)


def test_a_single_example_that_does_not_fit_is_an_error():
    with pytest.raises(
        OutOfMemory, match=r"one example does not fit .*\(GPU is full\).*accumulate_on='cpu'.*checkpoint"
    ):
        gradient(network("mlp"), room_for(0, torch.OutOfMemoryError, "GPU is full\nmore lines")[0], classification(20))
    assert issubclass(OutOfMemory, MemoryError)


def test_a_batch_that_cannot_be_divided_is_an_error():
    def loss_terms(model, batch):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("GPU is full")
        return cross_entropy(model, batch[:2])

    batch = (*tensors(20), torch.ones(3))
    with pytest.raises(OutOfMemory, match="a batch that cannot be divided into examples does not fit"):
        gradient(network("mlp"), loss_terms, [batch])


def test_another_error_of_the_loss_is_not_taken_for_one_of_memory():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        gradient(network("mlp"), room_for(3, RuntimeError, "shapes cannot be multiplied")[0], classification(20))


def test_an_unknown_place_is_refused():
    with pytest.raises(ConfigError, match=r"accumulate_on='gpu': choose from device, cpu"):
        accumulator.sums_of(dict(network("mlp").named_parameters()), "gpu")
