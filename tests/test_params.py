import contextlib
import hashlib
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from expunge import params
from expunge.errors import ConfigError, ExpungeError, MismatchError, NotFinite
from tests.zoo import Tied, network

ODD = [-math.inf, -1.5, -1e-45, -0.0, 0.0, 1e-45, 1e-40, 1.0, 1.0000001, 3e38, math.inf]
numbers = st.sampled_from(ODD) | st.floats(width=32, allow_nan=False)
score_lists = st.lists(st.lists(numbers, max_size=12), min_size=1, max_size=4)


def chosen_by_sorting(scores: dict, k: int) -> torch.Tensor:
    joined = torch.cat([score.flatten().double() for score in scores.values()])
    order = torch.argsort(joined, stable=True)
    order = order[joined[order] < math.inf][:k]
    return torch.zeros(len(joined), dtype=torch.bool).index_fill_(0, order, True)


def joined(masks: dict) -> torch.Tensor:
    return torch.cat([mask.flatten() for mask in masks.values()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("sample", "piece"), [(1 << 18, 1 << 18), (1, 1), (2, 3), (3, 1000)])
@given(lists=score_lists)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_smallest_agrees_with_a_stable_sort_for_every_k(dtype, sample, piece, lists):
    scores = {f"p{number}": torch.tensor(values, dtype=dtype) for number, values in enumerate(lists)}
    before = {name: score.clone() for name, score in scores.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(params, "_SAMPLE", sample)
        patch.setattr(params, "_PIECE", piece)
        for k in range(params.size(scores) + 3):
            masks = params.smallest(scores, k)
            assert torch.equal(joined(masks), chosen_by_sorting(scores, k))
    assert list(masks) == list(scores)
    assert all(masks[name].shape == score.shape and torch.equal(score, before[name]) for name, score in scores.items())


@pytest.mark.parametrize("k", [0, 1, 300_000, 599_999, 600_000, 700_000])
@pytest.mark.parametrize("distinct", [2, 1000, None])
def test_smallest_is_exact_where_the_sample_is_smaller_than_the_scores(k, distinct):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(600_000, generator=generator)
    if distinct:
        values = (values * distinct).round().clamp(-distinct, distinct)
    scores = {"a": values[:123].clone(), "b": values[123:].view(-1, 3).clone()}
    assert torch.equal(joined(params.smallest(scores, k)), chosen_by_sorting(scores, k))


def test_smallest_is_exact_when_the_sample_misses_the_threshold_altogether():
    scores = {"a": torch.zeros(1_000_000, dtype=torch.float64)}
    scores["a"][-3:] = torch.tensor([-2.0, -1.0, -3.0])
    assert params.smallest(scores, 2)["a"].nonzero().flatten().tolist() == [999_997, 999_999]


def test_smallest_breaks_ties_by_position_across_tensors():
    scores = {"late": torch.tensor([[2.0, 1.0], [1.0, 1.0]]), "early": torch.tensor([1.0, 0.0])}
    masks = params.smallest(scores, 3)
    assert masks["late"].tolist() == [[False, True], [True, False]]
    assert masks["early"].tolist() == [False, True]


def test_smallest_never_marks_infinity():
    assert params.smallest({"a": torch.tensor([math.inf, 1.0, math.inf])}, 3)["a"].tolist() == [False, True, False]
    assert params.smallest({"a": torch.full((4,), math.inf)}, 2)["a"].tolist() == [False] * 4


@pytest.mark.parametrize(
    "score", [torch.arange(12.0).reshape(3, 4).t(), torch.arange(96.0).reshape(2, 3, 4, 4).permute(0, 2, 3, 1)]
)
def test_smallest_takes_scores_in_any_memory_layout(score):
    assert not score.is_contiguous()
    assert torch.equal(params.smallest({"a": score}, 5)["a"], score < score.flatten().sort().values[5])


@pytest.mark.parametrize("piece", [1, 1 << 18])
def test_smallest_names_the_tensor_with_a_nan(piece, monkeypatch):
    monkeypatch.setattr(params, "_PIECE", piece)
    scores = {"fine": torch.ones(5), "broken": torch.tensor([1.0, 2.0, math.nan, 0.0])}
    with pytest.raises(NotFinite, match=r"score of 'broken' is NaN.*selector"):
        params.smallest(scores, 2)


def test_smallest_refuses_a_negative_count():
    with pytest.raises(ConfigError, match=r"k=-1: .*cannot be negative"):
        params.smallest({"a": torch.ones(2)}, -1)


def test_smallest_of_nothing_is_nothing():
    assert params.smallest({}, 3) == {}
    assert params.smallest({"empty": torch.empty(0, 4)}, 3)["empty"].shape == (0, 4)


def test_parameters_are_those_that_require_a_gradient_unless_chosen():
    model = network("frozen")
    assert list(params.named_parameters(model)) == ["0.bias", "3.weight", "3.bias"]
    assert list(params.named_parameters(model, ["3.weight", "0.weight"])) == ["0.weight", "3.weight"]
    assert list(params.named_parameters(model, lambda name, p: p.ndim == 1)) == ["0.bias", "3.bias"]


def test_a_tied_parameter_is_named_once():
    assert list(params.named_parameters(Tied())) == [
        "first.weight", "first.bias", "second.bias", "head.weight", "head.bias",
    ]  # fmt: skip


def test_an_unknown_parameter_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"\['body.weight'\].*no such parameter.*'0.weight', '0.bias'"):
        params.named_parameters(network("mlp"), ["0.bias", "body.weight"])


@pytest.mark.parametrize("select", [None, [], lambda name, p: False])
def test_a_model_without_trainable_parameters_is_refused(select):
    model = network("mlp").requires_grad_(False)
    with pytest.raises(ConfigError, match=r"Sequential has nothing trainable: 4 parameters.*requires_grad_\(True\)"):
        params.named_parameters(model, select)


def test_a_compiled_model_has_the_names_and_fingerprints_of_the_model_inside():
    model = network("batch-norm")
    compiled = torch.compile(nn.Sequential(torch.compile(model, backend="eager")), backend="eager")
    assert list(params.named_parameters(compiled)) == [f"0.{name}" for name in params.named_parameters(model)]
    assert params.plain(torch.compile(model, backend="eager")) is model
    assert params.plain(model) is model
    assert params.weights_fingerprint(compiled) == params.weights_fingerprint(nn.Sequential(model))
    assert params.buffers_fingerprint(compiled) == params.buffers_fingerprint(nn.Sequential(model))


def test_training_flags_are_restored_module_by_module_even_after_an_error():
    model = network("dropout")
    model[1].eval()
    with contextlib.suppress(RuntimeError), params.restoring_modes(model):
        model.train()
        model[0].eval()
        raise RuntimeError
    assert [module.training for module in model.modules()] == [True, True, False, True, True]


def test_a_snapshot_does_not_follow_the_model():
    model = network("mlp")
    before = params.snapshot(params.named_parameters(model))
    with torch.no_grad():
        model[0].bias.add_(1)
    assert torch.equal(before["0.bias"] + 1, model[0].bias)
    assert not before["0.bias"].requires_grad


def test_size_and_norm_go_over_all_tensors_in_float64():
    vector = {"a": torch.full((2, 3), 3e-30), "b": torch.full((3,), 2e30)}
    assert params.size(vector) == 9
    assert params.norm(vector) == pytest.approx(math.sqrt(3) * 2e30, rel=1e-6)
    assert params.norm({"a": vector["a"]}) == pytest.approx(math.sqrt(6) * 3e-30, rel=1e-6)
    assert params.norm({}) == 0


def test_vectors_over_other_parameters_are_not_subtracted():
    a, b = {"x": torch.ones(2), "y": torch.ones(3)}, {"x": torch.ones(2), "z": torch.ones(3)}
    with pytest.raises(MismatchError, match="only the first has 'y'; only the second has 'z'"):
        params.subtract(a, b)
    with pytest.raises(MismatchError, match=r"'y' has shape \(3,\) in the first and \(3, 1\) in the second"):
        params.subtract(a, {"x": torch.ones(2), "y": torch.ones(3, 1)})
    assert params.subtract({"x": torch.tensor([3.0])}, {"x": torch.tensor([1.0])})["x"].tolist() == [2.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_with_name_and_count(bad):
    vector = {"whole": torch.arange(3), "fine": torch.ones(2), "broken": torch.tensor([1.0, bad, bad])}
    with pytest.raises(NotFinite, match="here: tensor 'broken' has 2 of 3 entries"):
        params.require_finite(vector, "here")


def test_the_fingerprint_is_what_the_specification_says():
    tensors = {
        "z.scale": torch.tensor(-2.5, dtype=torch.float64),
        "b.weight": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, -0.0]]),
        "count": torch.tensor([7, -1]),
        "flags": torch.tensor([True, False]),
        "low": torch.tensor([1.5, -3.0], dtype=torch.bfloat16),
        "none": torch.empty(0, 2),
    }
    content = b"".join(
        [
            b"b.weight\0float32\0[2, 3]\0" + struct.pack("<6f", 1, 2, 3, 4, 5, -0.0),
            b"count\0int64\0[2]\0" + struct.pack("<2q", 7, -1),
            b"flags\0bool\0[2]\0" + b"\x01\x00",
            b"low\0bfloat16\0[2]\0" + struct.pack("<f", 1.5)[2:] + struct.pack("<f", -3.0)[2:],
            b"none\0float32\0[0, 2]\0",
            b"z.scale\0float64\0[]\0" + struct.pack("<d", -2.5),
        ]
    )
    assert params.fingerprint(tensors) == hashlib.sha256(content).hexdigest()
    assert params.fingerprint(dict(reversed(tensors.items()))) == hashlib.sha256(content).hexdigest()


def test_the_fingerprint_reads_values_in_order_whatever_the_memory_layout():
    matrix = torch.arange(12.0).reshape(3, 4)
    assert params.fingerprint({"a": matrix.t().contiguous().t()}) == params.fingerprint({"a": matrix})
    assert params.fingerprint({"a": matrix.t()}) != params.fingerprint({"a": matrix})


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.zeros(4)},
        {"a": torch.zeros(4, dtype=torch.float64)},
        {"a": torch.zeros(2, 2)},
        {"a": torch.zeros(4, dtype=torch.int32)},
        {"a": torch.tensor([0.0, 0.0, 0.0, -0.0])},
        {"a": torch.tensor([0.0, 0.0, 0.0, 1e-45])},
        {"a": torch.zeros(4), "b": torch.zeros(0)},
    ],
)
def test_the_fingerprint_sees_every_difference(other):
    assert params.fingerprint(other) != params.fingerprint({"a": torch.zeros(4)})


def test_weights_and_buffers_have_fingerprints_of_their_own():
    model = network("batch-norm")
    weights, buffers = params.weights_fingerprint(model), params.buffers_fingerprint(model)
    model[1].num_batches_tracked.add_(1)
    assert params.weights_fingerprint(model) == weights
    assert params.buffers_fingerprint(model) != buffers
    frozen = network("frozen")
    before = params.weights_fingerprint(frozen)
    frozen[0].weight.data[0, 0] += 1  # not trainable, and yet part of what the gradient was taken at
    assert params.weights_fingerprint(frozen) != before


def test_buffers_that_a_checkpoint_does_not_keep_do_not_count():
    model = network("mlp")
    empty = params.buffers_fingerprint(model)
    model.register_buffer("scratch", torch.ones(3), persistent=False)
    assert params.buffers_fingerprint(model) == empty == hashlib.sha256().hexdigest()
    model.register_buffer("kept", torch.ones(3))
    assert params.buffers_fingerprint(model) != empty


def test_long_lists_of_names_are_cut():
    assert params.listed([]) == "none"
    assert params.listed("ab") == "'a', 'b'"
    assert params.listed("abcdefg") == "'a', 'b', 'c', 'd', 'e' and 2 more"


def test_every_error_has_one_base():
    for kind in (ConfigError, MismatchError):
        assert issubclass(kind, ExpungeError)
        assert issubclass(kind, ValueError)
