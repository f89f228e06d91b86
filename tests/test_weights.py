import pytest
import torch
from torch import nn

from expunge import Examples, cache, cross_entropy, gradient
from expunge.errors import ConfigError, MismatchError
from expunge.params import named_parameters
from expunge.weights import load_weights, save_weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.head.weight = self.first.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.first(inputs)))


def test_tied_weights_stay_tied_and_a_cache_of_the_tied_model_still_fits(tmp_path):
    model = Tied()
    data = Examples(torch.randn(8, 4), torch.randint(4, (8,)))
    save_weights(tmp_path / "w.safetensors", model)
    cache.save(tmp_path / "c.safetensors", gradient(model, cross_entropy, data))
    loaded = load_weights(Tied(), tmp_path / "w.safetensors")
    assert loaded.head.weight is loaded.first.weight
    assert list(named_parameters(loaded)) == ["first.weight"]
    cache.load(tmp_path / "c.safetensors", loaded, cross_entropy)


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_come_back_bit_for_bit_in_a_model_of_their_type(tmp_path, dtype):
    model = layers().to(dtype)
    save_weights(tmp_path / "w.safetensors", model)
    loaded = load_weights(layers().to(dtype), tmp_path / "w.safetensors")
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("stored", "built"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
    ],
)
def test_weights_of_another_type_than_the_model_s_are_refused_and_it_stays_as_it_was(tmp_path, stored, built):
    save_weights(tmp_path / "w.safetensors", layers().to(stored))
    model = layers().to(built)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said = (
        rf"w.safetensors has '0.weight', .* and 1 more as {stored}, and the model as {built}\. Build the .* "
        rf"in model\(seed\) cast it, or the modules of these, with .to\({stored}\)\. Or save the weights as {built}"
    )
    with pytest.raises(MismatchError, match=said):
        load_weights(model, tmp_path / "w.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_of_weights_of_several_types_those_that_differ_are_named(tmp_path):
    mixed = layers()
    mixed[0].half()
    save_weights(tmp_path / "w.safetensors", mixed)
    with pytest.raises(
        MismatchError, match=r"has '0.weight', '0.bias' as torch.float16, and the model as torch.float32"
    ):
        load_weights(layers(), tmp_path / "w.safetensors")
    built = layers()
    built[0].half()  # the cure
    assert load_weights(built, tmp_path / "w.safetensors")[0].weight.dtype == torch.float16


def test_weights_of_another_architecture_and_files_that_are_none_are_refused(tmp_path):
    save_weights(tmp_path / "w.safetensors", nn.Linear(3, 3))
    with pytest.raises(MismatchError, match=r"has shape .* in .*w.safetensors and \(4,.*\) in the model"):
        load_weights(nn.Linear(3, 4), tmp_path / "w.safetensors")
    (tmp_path / "text").write_text("no weights", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be read as weights"):
        load_weights(nn.Linear(3, 3), tmp_path / "text")
    with pytest.raises(FileNotFoundError, match=r"no such weights\. Save them with safetensors"):
        load_weights(nn.Linear(3, 3), tmp_path / "nowhere")


@pytest.mark.parametrize("size", [5e9, 100])
def test_a_cache_in_place_of_weights_is_called_one(tmp_path, size):
    model = nn.Linear(3, 3)
    full = gradient(model, cross_entropy, Examples(torch.randn(8, 3), torch.randint(3, (8,))))
    cache.save(tmp_path / "c.safetensors", full, max_shard_bytes=size)
    for file in tmp_path.glob("*.safetensors"):
        with pytest.raises(ConfigError, match=r"safetensors is a gradient cache, not weights\. Give the trained"):
            load_weights(model, file)
