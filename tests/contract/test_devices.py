"""Methods, gradients and audits on a device that is not the CPU, with caches that come from files."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from expunge import (
    Examples,
    Gradient,
    NaturalAscent,
    OrthogonalAscent,
    Reload,
    Unlearned,
    cross_entropy,
    gradient,
    unlearn,
)
from expunge.audit.finding import Truth, evidence
from expunge.audit.leakage import audit_cache
from expunge.audit.preflight import preflight
from expunge.bench.runner import Serial, carry_out
from expunge.bench.stages import Contender
from expunge.bench.store import Store
from expunge.cache import load, save
from expunge.methods import METHODS
from expunge.metrics.outputs import outputs
from expunge.models.convnet import ConvNet
from expunge.rows import read_rows
from expunge.selectors import Name
from tests.contract import BRIEF, FORGET, KINDS, World, examples, quick, same, state, world
from tests.elsewhere import Elsewhere, elsewhere
from tests.tiny_bench import DIGITS, TINY

EASY = {"priming_lr": 0.5, "reset_fraction": 0.3, "fine_tune": BRIEF}


def there_and_here(folder: Path, here: World, config: Any, **changes: Any) -> tuple[Unlearned, Unlearned]:
    """The same unlearning on both devices, each with the same cache from a file; checks that both end alike."""
    save(folder / "cache", here.full)
    alone = unlearn(here.model, here.sighted(**changes), config, seed=3)
    with elsewhere() as place:
        model = copy.deepcopy(here.model).to(place)
        given = here.sighted(full=load(folder / "cache", model, cross_entropy), **changes)
        found = unlearn(model, given, config, seed=3)
        assert all(isinstance(tensor, Elsewhere) for tensor in found.model.state_dict().values())
        back = state(found.model.cpu())
    for key, tensor in state(alone.model).items():
        torch.testing.assert_close(back[key], tensor)
    assert found.trace.losses == pytest.approx(alone.trace.losses, rel=1e-4)
    return found, alone


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_method_does_on_the_device_of_the_model_what_it_does_on_a_cpu(name, kind, tmp_path):
    here = world(kind)
    found, alone = there_and_here(tmp_path, here, quick(name))
    assert not same(state(found.model), state(here.model))
    assert found.trace.facts.keys() == alone.trace.facts.keys()


@pytest.mark.parametrize("selector", get_args(Name))
def test_every_selector_chooses_the_same_entries(selector, tmp_path):
    config = Reload(selector=selector, statistics="re-estimated", **EASY)
    found, alone = there_and_here(tmp_path, world("batch-norm"), config)
    assert found.trace.facts["reset_count"] == alone.trace.facts["reset_count"] > 0


@pytest.mark.parametrize("config", [NaturalAscent(fine_tune=BRIEF), OrthogonalAscent(fine_tune=BRIEF), Reload(**EASY)])
def test_labels_are_corrected(config, tmp_path):
    here = world()
    inputs, labels = here.original.tensors
    there_and_here(tmp_path, here, config, retain=Examples(inputs, torch.where(labels == 2, 1, labels)))


@pytest.mark.parametrize("name", ["natural-ascent", "fisher", "ssd"])
def test_convolutions_are_taken_apart_into_examples(name, tmp_path):
    data = Examples(examples().tensors[0].repeat(1, 11)[:, :64].view(-1, 1, 8, 8), examples().tensors[1])

    def fresh(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return ConvNet(classes=3, widths=(4, 4))

    model = fresh(1).eval()
    here = World(model, fresh, data, gradient(model, cross_entropy, data, micro_batch=8))
    there_and_here(tmp_path, here, quick(name))


@pytest.mark.parametrize("options", [{"accumulate_on": "cpu"}, {"accumulate_on": "device"}, {"groups": 3}])
def test_a_gradient_is_summed_up_on_either_device(options):
    here = world()
    alone = gradient(here.model, cross_entropy, here.original, micro_batch=8)

    def found(model: nn.Module, data: Examples) -> Gradient:
        return gradient(model, cross_entropy, data, micro_batch=8, **options)

    with elsewhere() as place:
        model = copy.deepcopy(here.model).to(place)
        full, left = (found(model, data) for data in (here.original, here.retain))
        total = {name: tensor.cpu() for name, tensor in full.total.items()}
        assert isinstance(next(iter(full.total.values())), Elsewhere) == (options.get("accumulate_on") != "cpu")
        assert (full - left).count == len(FORGET)
        assert (full - left).relative_noise() < 1e-3
    for name, tensor in alone.total.items():
        torch.testing.assert_close(total[name], tensor)


def test_measurements_and_audits_say_the_same(tmp_path):
    here = world()
    save(tmp_path / "cache", here.full)

    def said(place: torch.device) -> list[Any]:
        model = copy.deepcopy(here.model).to(place)
        full = load(tmp_path / "cache", model, cross_entropy)
        checks = preflight(model, cross_entropy, here.retain, full, unseen=here.forget, fresh=here.fresh).checks
        has = evidence(model, cross_entropy, here.retain, full)
        found = audit_cache(has, Truth(forget=here.forget)).findings
        return [
            outputs(model, here.forget).losses.mean(),
            [(check.name, check.advice) for check in checks],
            [(finding.attack, finding.place, finding.verdict) for finding in found],
        ]

    alone = said(torch.device("cpu"))
    with elsewhere() as place:
        there = said(place)
    assert there == [pytest.approx(alone[0]), *alone[1:]]


def test_experiments_have_their_data_there_too_and_the_same_rows(tmp_path):
    def measured(store: Store, device: str) -> list[Any]:
        task = replace(DIGITS, device=device)
        own = replace(TINY, tasks=(task,), contenders=(Contender(name="orthogonal-ascent", entry="orthogonal-ascent"),))
        stages = own.evaluations([0])
        carry_out(stages, store, Serial(store), lambda _: None)
        rows = (row for stage in stages for row in read_rows(store.folder(stage) / "rows.csv"))
        return [(row.method, row.metric, pytest.approx(row.value, rel=1e-3)) for row in rows if row.metric != "Cost"]

    alone = measured(Store(tmp_path / "here"), "cpu")
    with elsewhere() as place:
        assert measured(Store(tmp_path / "there"), str(place)) == [(*named, value.expected) for *named, value in alone]
    assert len(alone) > 20


def test_the_device_tells_what_was_left_behind():
    with elsewhere() as place:
        model, inputs = copy.deepcopy(world().model).to(place), examples().tensors[0]
        there = inputs.to(place)
        for mixed in (lambda: model(inputs), lambda: inputs + there, lambda: torch.cat([there, inputs])):
            with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
                mixed()
        with pytest.raises(TypeError, match="Use Tensor"):
            there.numpy()
        assert there.to(place) is there
        assert torch.equal(there.to(place, copy=True).zero_().cpu(), torch.zeros_like(inputs))
        assert torch.equal(there.cpu(), inputs)
