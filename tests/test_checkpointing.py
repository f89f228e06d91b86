import dataclasses

import pytest
import torch
from torch import nn

from expunge import cache
from expunge.batches import Examples
from expunge.checkpointing import repeated_modules
from expunge.errors import ConfigError
from expunge.gradient import gradient
from expunge.losses import cross_entropy
from expunge.second_pass import second_pass
from tests.test_gradient import same, state
from tests.test_gradient_memory import identical
from tests.zoo import classification, network


class Blocks(nn.Module):
    """A small transformer: an embedding, a list of layers, a head in a Sequential."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True) for _ in range(depth)
        )
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3))

    def forward(self, words):
        hidden = self.table(words)
        for layer in self.layers:
            hidden = layer(src=hidden)  # by name, too
        return self.head(hidden.mean(1))


def words() -> Examples:
    generator = torch.Generator().manual_seed(0)
    return Examples(torch.randint(20, (24, 10), generator=generator), torch.arange(24) % 3)


def blocks() -> Blocks:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Blocks()


def test_a_module_that_changes_its_inputs_is_refused_and_one_that_does_so_inside_is_not():
    def model():
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.SiLU(inplace=True), nn.Linear(8, 3))

    data = Examples(torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3)
    with pytest.raises(ConfigError, match="SiLU changes what goes into it in place"):
        gradient(model(), cross_entropy, data, checkpoint=True)
    blocks = nn.Sequential(model()[:3], nn.Linear(8, 3))
    identical(gradient(blocks, cross_entropy, data), gradient(blocks, cross_entropy, data, checkpoint=["0"]))


def kept_between(model, data, **options) -> int:
    """Bytes that forward passes keep for backward passes, by autograd's own account; the weights do not count."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    most, kept = 0, {}

    def keep(tensor):
        nonlocal most
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.grad_fn is not None:
            kept[storage.data_ptr()] = storage.nbytes()
            most = max(most, sum(kept.values()))
        return tensor

    def loss_terms(model, batch):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return cross_entropy(model, batch)

    gradient(model, loss_terms, data, micro_batch=8, **options)
    return most


@pytest.mark.parametrize("on", ["device", "cpu"])
@pytest.mark.parametrize("choice", [True, ["layers.*"], ["layers.?", "head"], ["layers.1"], ["*"]])
def test_recomputed_activations_give_the_same_bits(choice, on):
    model = blocks()
    before = state(model)
    plain = gradient(model, cross_entropy, words(), micro_batch=8)
    again = gradient(model, cross_entropy, words(), micro_batch=8, checkpoint=choice, accumulate_on=on)
    assert identical(plain, again)
    assert same(before, state(model))
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_less_is_kept_between_forward_and_backward():
    whole, half, all_ = (kept_between(blocks(), words(), checkpoint=c) for c in (False, ["layers.0", "layers.1"], True))
    assert whole > 0
    assert half < 0.65 * whole
    assert all_ < 0.3 * whole


@pytest.mark.parametrize("groups", [None, 3])
def test_the_second_pass_computes_again_what_the_first_did_also_from_a_file(tmp_path, groups):
    model, left = blocks(), words().without(torch.tensor([3]))
    full = gradient(model, cross_entropy, words(), micro_batch=8, checkpoint=["layers.*"], groups=groups)
    cache.save(tmp_path / "c.safetensors", full)
    stored = cache.load(tmp_path / "c.safetensors", model, cross_entropy)
    assert stored.recomputed == full.recomputed == ("layers.0", "layers.1", "layers.2", "layers.3")
    calls = []
    model.layers[0].norm1.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    again = second_pass(stored, model, cross_entropy, left)
    whole = [batch for batch in calls if batch]
    calls.clear()
    plain = second_pass(dataclasses.replace(stored, recomputed=()), model, cross_entropy, left)
    assert len(whole) > len([batch for batch in calls if batch])
    assert all(torch.equal(again.gradient.total[n], plain.gradient.total[n]) for n in full.total)


def test_by_default_the_blocks_of_the_longest_list_are_taken():
    assert list(repeated_modules(blocks(), True)) == ["layers.0", "layers.1", "layers.2", "layers.3"]
    assert list(repeated_modules(network("mlp"), True)) == ["0", "1", "2", "3"]
    assert list(repeated_modules(blocks(), ["layers.3", "layers.3.*", "head.1"])) == ["layers.3", "head.1"]
    assert repeated_modules(blocks(), False) == {}


def test_a_forward_that_was_patched_before_is_put_back():
    model = blocks()
    model.layers[1].forward = patched = model.layers[2].forward

    def fails(model, batch):
        if torch.is_grad_enabled():
            raise ValueError("in the middle")
        return cross_entropy(model, batch)

    with pytest.raises(ValueError, match="in the middle"):
        gradient(model, fails, words(), checkpoint=True)
    assert model.layers[1].forward is patched
    assert "forward" not in model.layers[0].__dict__


def test_modules_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match=r"checkpoint: 'blocks.\*' matches no module. The model has 'table'"):
        gradient(blocks(), cross_entropy, words(), checkpoint=["layers.*", "blocks.*"])
    with pytest.raises(ConfigError, match=r"checkpoint=True: Tied has no Sequential .*has 'first', 'second', 'head'"):
        gradient(network("tied"), cross_entropy, classification(5), checkpoint=True)
