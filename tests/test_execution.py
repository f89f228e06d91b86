import copy
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from expunge import Examples, Recipe, cross_entropy, execution, gradient, train
from expunge.models.convnet import ConvNet
from expunge.seeds import stream
from expunge.trace import Trace
from tests.contract import architecture, examples, same, state

BRIEF = Recipe(epochs=2, lr=0.05, batch_size=16)


def images(count: int = 48) -> Examples:
    return Examples(torch.rand(count, 2, 8, 8, generator=stream(0, "images")), torch.arange(count) % 4)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ConvNet(channels=2, classes=4, widths=(4, 8))


def recipe(**settings: object) -> Recipe:
    return Recipe(**{"epochs": 2, "lr": 0.05, "batch_size": 16, **settings})


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> bool:
    return all(torch.allclose(a[name].float(), b[name].float(), tolerance, tolerance) for name in a)


@pytest.mark.parametrize("channels", [1, 2])
def test_channels_last_reaches_the_convolutions_and_leaves_the_weights_layout(channels):
    models = [ConvNet(channels=channels, classes=4, widths=(4, 8)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    data = Examples(images().tensors[0][:, :channels], images().tensors[1])
    strides: list[int] = []
    models[0].features.conv2.register_forward_pre_hook(lambda _, inputs: strides.append(inputs[0].stride(1)))
    for model, last in zip(models, (True, False), strict=True):
        train(model, data, cross_entropy, recipe(channels_last=last), seed=0)
    assert set(strides) == {1}
    assert all(p.is_contiguous() for p in models[0].parameters())
    assert close(state(models[0]), state(models[1]), 1e-3)


def test_layout_leaves_a_later_gradient_pass_its_bits():
    model, reloaded = network(), network()
    train(model, images(), cross_entropy, recipe(channels_last=True), seed=0)
    reloaded.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    totals = [gradient(each, cross_entropy, images()).total for each in (model, reloaded)]
    assert same(totals[0], totals[1])


def test_bfloat16_is_used_in_products_and_not_in_weights_gradients_or_losses():
    model, plain, seen = network(), network(), []
    model.features.conv2.register_forward_hook(lambda _, inputs, out: seen.append(out.dtype))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        terms = cross_entropy(model, batch)
        seen.append(terms.dtype)
        return terms

    train(model, images(), loss, recipe(precision="bfloat16"), seed=0, after_step=lambda step: seen.extend(
        p.grad.dtype for group in step.optimizer.param_groups for p in group["params"]))  # fmt: skip
    train(plain, images(), cross_entropy, recipe(), seed=0)
    assert set(seen) == {torch.bfloat16, torch.float64, torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not same(state(model), state(plain))
    assert close(state(model), state(plain), 0.05)


@pytest.mark.parametrize(("slow", "kept"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_the_faster_number_format_is_kept_and_noted(monkeypatch, slow, kept):
    clock = [0.0]
    monkeypatch.setattr(execution, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    formats = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        low = torch.is_autocast_enabled("cpu")
        formats.append("bfloat16" if low else "float32")
        first = len(formats) <= 2  # the first step of each is slow for another reason
        clock[0] += (100.0 if formats[-1] == kept else 1.0) if first else (3.0 if formats[-1] == slow else 2.0)
        return cross_entropy(model, batch)

    trace = train(network(), images(), loss, recipe(epochs=3, precision="fastest"), seed=0)
    assert formats == ["float32", "bfloat16"] * 3 + [kept] * 3
    assert trace.facts == {"precision": kept}


def test_on_a_gpu_the_next_batch_is_sent_before_the_present_one_is_used(monkeypatch):
    """With a stand-in for CUDA's streams that writes down what happens."""
    said: list[str] = []

    class Sent(torch.Tensor):
        def record_stream(self, stream):
            said.append(f"kept {int(self[0])}")

    class Stream(nullcontext):
        def record_event(self):
            return said[-1]

        def wait_event(self, event):
            said.append(f"waited for: {event}")

    def send(batch, device):
        said.append(f"sent {int(batch[0])}")
        return batch.as_subclass(Sent)

    monkeypatch.setattr(execution, "to_device", send)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    batches = [(torch.tensor([10 + n]), torch.tensor([n])) for n in range(3)]
    for positions, batch in execution.ahead(iter(batches), torch.device("cuda")):
        said.append(f"used {int(batch[0])} of position {int(positions[0])}")
    assert said == [
        "sent 0", "sent 1",
        "waited for: sent 0", "kept 0", "used 0 of position 10", "sent 2",
        "waited for: sent 1", "kept 1", "used 1 of position 11",
        "waited for: sent 2", "kept 2", "used 2 of position 12",
    ]  # fmt: skip


def test_the_defaults_note_nothing():
    assert train(network(), images(), cross_entropy, recipe(), seed=0).facts == {}


@pytest.fixture
def compiler(monkeypatch) -> Iterator[SimpleNamespace]:
    """A compiler that takes no time: it runs what it was given, and counts or fails as told."""
    told = SimpleNamespace(calls=0, error=None)

    def compile_(function):
        def compiled(*inputs, **named):
            told.calls += 1
            if told.error is not None:
                raise told.error
            return function(*inputs, **named)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    return told


def test_compiled_steps_are_those_of_full_batches_and_give_the_bits_of_plain_ones(compiler):
    models = [network(), network()]
    data = images(40)  # 16, 16, 8
    trace = train(models[0], data, cross_entropy, recipe(compile=True), seed=0)
    train(models[1], data, cross_entropy, recipe(), seed=0)
    assert compiler.calls == 5  # one more, to try it
    assert trace.facts == {"compiled_steps": 4}
    assert same(state(models[0]), state(models[1]))
    assert "forward" not in vars(models[0])


def test_a_trial_of_the_compiler_leaves_statistics_and_randomness_alone(compiler):
    models = [architecture("batch-norm"), architecture("batch-norm")]  # with dropout
    models[1].load_state_dict(models[0].state_dict())
    for model, compiles in zip(models, (True, False), strict=True):
        train(model, examples(), cross_entropy, recipe(compile=compiles, batch_size=20), seed=0)
    assert same(state(models[0]), state(models[1]))


def test_a_compiler_that_fails_is_noted_once_and_the_model_is_trained_as_it_is(compiler):
    compiler.error = RuntimeError("InvalidCxxCompiler: no working C++ compiler\nin a long text")
    models = [network(), network()]
    with pytest.warns(UserWarning, match="compile=True: ConvNet could not be compiled"):
        trace = train(models[0], images(), cross_entropy, recipe(compile=True), seed=0)
    train(models[1], images(), cross_entropy, recipe(), seed=0)
    assert trace.warnings == [
        "compile=True: ConvNet could not be compiled and is trained as it is: RuntimeError: InvalidCxxCompiler: no "
        "working C++ compiler"
    ]
    assert compiler.calls == 1
    assert trace.facts == {"compiled_steps": 0}
    assert same(state(models[0]), state(models[1]))


def test_an_error_of_the_model_itself_is_still_raised(compiler):
    compiler.error = RuntimeError("shapes")
    wrong = Examples(torch.rand(16, 3, 8, 8), torch.zeros(16, dtype=torch.int64))
    model = network()
    with pytest.warns(UserWarning, match="compile=True"), pytest.raises(RuntimeError, match="expected input"):
        train(model, wrong, cross_entropy, recipe(compile=True), seed=0)
    assert "forward" not in vars(model)


def test_hooks_and_measurements_run_the_model_as_it_is(compiler):
    model = network()
    handle = model.head.register_forward_hook(lambda *_: None)
    trace = train(model, images(), cross_entropy, recipe(compile=True), seed=0)
    assert trace.facts == {"compiled_steps": 0}
    handle.remove()

    def stop(model: nn.Module, _: float) -> str | None:
        before = compiler.calls
        model(images().tensors[0][:16])
        assert compiler.calls == before
        return None

    trace = train(model, images(), cross_entropy, recipe(compile=True), seed=0, stop=stop)
    assert trace.facts == {"compiled_steps": 6}


def test_a_real_compiler_that_is_missing_falls_back(monkeypatch):
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    torch.compiler.reset()
    model = architecture("plain")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trace = train(model, examples(), cross_entropy, recipe(compile=True, batch_size=20), seed=0)
    assert "MLP could not be compiled and is trained as it is" in trace.warnings[0]
    assert len(trace.losses) == 6


@pytest.mark.slow
def test_really_compiled_training_agrees_with_plain_training():
    models = [network(), network()]
    for model, compiles in zip(models, (True, False), strict=True):
        trace = train(model, images(), cross_entropy, recipe(compile=compiles), seed=0)
        assert (trace.facts, trace.warnings) == ({"compiled_steps": 6} if compiles else {}, [])
    assert list(models[0].state_dict()) == list(models[1].state_dict())
    assert close(state(models[0]), state(models[1]), 1e-4)
    copied = copy.deepcopy(models[0])  # code that was compiled already serves a copy, with the weights of the copy
    before = state(models[0])
    train(copied, images(), cross_entropy, recipe(compile=True), seed=1)
    train(models[1], images(), cross_entropy, recipe(), seed=1)
    assert close(state(copied), state(models[1]), 1e-3)
    assert same(state(models[0]), before)


@pytest.mark.gpu
def test_data_sent_batch_by_batch_trains_like_data_on_the_gpu():
    found = []
    loader = DataLoader(TensorDataset(*images().tensors), batch_size=16, pin_memory=True)
    for data in (images().to("cuda"), images(), loader):
        model = network().cuda()
        train(model, data, cross_entropy, recipe(), seed=0)
        found.append({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    assert close(found[0], found[1], 1e-4)
    assert close(found[0], found[2], 1e-4)


@pytest.mark.gpu
def test_bytes_on_a_gpu_train_in_any_way():
    for settings in ({}, {"channels_last": True, "precision": "bfloat16", "crop": 1, "flip": True, "cutout": 2}):
        model = network().cuda()
        trace: Trace = train(model, images().to("cuda"), cross_entropy, recipe(epochs=8, **settings), seed=0)
        assert sum(trace.losses[-3:]) < sum(trace.losses[:3])
