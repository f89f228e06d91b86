import importlib
import json
import math
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset, Subset

from expunge import Blind, Examples, Recipe, Reload, cross_entropy, gradient, second_pass
from expunge.batches import indexed, only_rows, plain
from expunge.bench import chosen, closeness, rehearsal, tuning
from expunge.bench.closeness import Score, Seen
from expunge.bench.rehearsal import Problem, draw, prepare
from expunge.bench.tuning import Trial
from expunge.cli import main
from expunge.errors import ConfigError, CorruptData, NotFinite
from expunge.methods import METHODS
from expunge.metrics.outputs import Outputs
from expunge.provenance import file_hash
from expunge.space import settings_of, with_settings

SETUP = """
import torch
from torch import nn
from expunge import Examples, Recipe, cross_entropy

generator = torch.Generator().manual_seed(0)
labels = torch.arange(120) % 3
images = torch.randn(120, 6, generator=generator) + 1.5 * torch.eye(3, 6)[labels]
loss_terms = cross_entropy
recipe = Recipe(epochs=4, lr=0.1, batch_size=16)

def model(seed):
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

def original():
    return Examples(images[:60], labels[:60])

def retain():
    return original().without(torch.arange(6))

def test():
    return Examples(images[60:], labels[60:])
"""
RELOAD = ("reload", "--fine-tune.epochs", "2", "--fine-tune.batch-size", "16")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A setup file, trained weights and a cache."""
    folder = tmp_path_factory.mktemp("trained")
    setup, weights, cached = (folder / name for name in ("setup.py", "w.safetensors", "c.safetensors"))
    setup.write_text(SETUP, encoding="utf-8")
    names = facts()
    model = names["model"](0)
    save_file(model.state_dict(), folder / "start.safetensors")
    start = ["unlearn", str(setup), "--weights", str(folder / "start.safetensors"), "--out", str(weights)]
    assert main([*start, "fine-tune", "--recipe.epochs", "30", "--recipe.lr", "0.1"]) == 0
    assert main(["cache", str(setup), "--weights", str(weights), "--out", str(cached)]) == 0
    return folder


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """The same as the current folder, free to be changed."""
    for path in trained.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def facts():
    names: dict = {}
    exec(SETUP, names)
    return names


def rehearsed(*more, cache=True, method=RELOAD):
    options = ["--cache", "c.safetensors"] if cache else []
    return main(["rehearse", "setup.py", "--weights", "w.safetensors", *options, *more, *method])


def outputs_of(logits, labels):
    return Outputs(np.array(logits, dtype=np.float64), np.array(labels))


# Which records


def test_random_sets_share_no_record_and_have_the_size_asked_for():
    sets = draw(np.arange(50) % 5, "random", 7, 4, seed=3)
    assert [len(rows) for rows in sets] == [7] * 4
    rows = torch.cat(sets).tolist()
    assert len(set(rows)) == 28
    assert all(rows.tolist() == sorted(rows.tolist()) for rows in sets)
    again, other = draw(np.arange(50) % 5, "random", 7, 4, seed=3), draw(np.arange(50) % 5, "random", 7, 4, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(sets, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(sets, other, strict=True))


@pytest.mark.parametrize(("like", "size"), [("in-class", 4), ("class", 10)])
def test_sets_of_a_class_have_a_class_of_their_own(like, size):
    labels = np.arange(50) % 5
    sets = draw(labels, like, 4, 3, seed=0)
    classes = [set(labels[rows.numpy()].tolist()) for rows in sets]
    assert [len(rows) for rows in sets] == [size] * 3
    assert all(len(own) == 1 for own in classes)
    assert len(set.union(*classes)) == 3


def test_sets_of_persons_have_all_their_records_and_somebody_stays():
    persons = np.repeat(np.arange(8), [1, 2, 3, 4, 5, 6, 7, 8])
    labels = np.zeros(36, dtype=np.int64)
    for seed in range(20):
        sets = draw(labels, "person", 4, 3, seed, persons)
        own = [set(persons[rows.numpy()].tolist()) for rows in sets]
        assert sum(map(len, own)) == len(set.union(*own))  # nobody twice
        for rows, mine in zip(sets, own, strict=True):
            assert rows.tolist() == np.flatnonzero(np.isin(persons, list(mine))).tolist()
            assert len(rows) >= 4
            assert any(len(rows) - (persons == person).sum() < 4 for person in mine)  # and no more of them than needed
    drawn = {tuple(map(tuple, (r.tolist() for r in draw(labels, "person", 4, 3, seed, persons)))) for seed in range(20)}
    assert len(drawn) == 20
    with pytest.raises(
        ConfigError, match=r"3 pseudo-forget sets of at least 12 .* nothing of the 36 records of 8 persons"
    ):
        draw(labels, "person", 12, 3, 0, persons)


def test_sets_that_cannot_be_drawn_are_refused():
    labels = np.arange(12) % 3
    with pytest.raises(ConfigError, match=r"3 pseudo-forget sets of 4 records leave nothing of the 12 .*smaller sets"):
        draw(labels, "random", 4, 3, 0)
    with pytest.raises(ConfigError, match=r"like='in-class': 0 classes have 5 records or more .*--records"):
        draw(labels, "in-class", 4, 3, 0)
    with pytest.raises(ConfigError, match=r"like='class': 3 classes .*and 4 pseudo-forget sets"):
        draw(labels, "class", 4, 4, 0)
    with pytest.raises(ConfigError, match="records=0: a pseudo-forget set has at least one"):
        draw(labels, "random", 0, 3, 0)


class Squares(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.tensor([float(index)]), index


@pytest.mark.parametrize("form", ["examples", "dataset", "subset", "loader"])
def test_some_rows_of_any_data_keep_their_positions(form):
    kept = [3, 5, 8, 13]
    numbers = torch.arange(20)
    data = {
        "examples": Examples(numbers.float()[:, None], numbers).only(torch.tensor(kept)),
        "dataset": Squares(),
        "subset": Subset(Squares(), [13, 3, 8, 5]),
        "loader": DataLoader(Subset(Squares(), kept), batch_size=3, shuffle=True),
    }[form]
    rows, expected = ([3, 8], [3, 8]) if form == "dataset" else ([0, 2], [3, 8])
    part = indexed(only_rows(data, torch.tensor(rows)))
    assert part is not None
    assert part.positions.tolist() == expected
    (batch,) = part.fetch([slice(0, 2)]) if form == "examples" else part.fetch([torch.arange(2)])
    assert batch[1].tolist() == expected


def test_data_without_positions_cannot_be_divided():
    with pytest.raises(ConfigError, match="list without positions cannot be divided"):
        only_rows([(torch.zeros(2, 6), torch.zeros(2))], torch.tensor([0]))
    assert plain([1]) == [1]


def problem_of(names, model, **more):
    left = names["retain"]()
    given = Blind(
        retain=left, loss_terms=cross_entropy, fresh=names["model"], full=gradient(model, cross_entropy, left)
    )
    return Problem(model=model, given=given, **more)


def test_the_blind_difference_of_a_rehearsal_is_the_gradient_of_its_set():
    names = facts()
    model = names["model"](0)
    problem = problem_of(names, model, unseen=names["test"]())
    rows = [torch.tensor([1, 4, 30]), torch.tensor([0, 53])]
    for each, own in zip(prepare(problem, rows, seed=0), rows, strict=True):
        assert type(each.given) is Blind
        assert each.given.full is not None
        found = each.given.full - gradient(model, cross_entropy, each.given.retain)
        truth = gradient(model, cross_entropy, names["retain"]().only(own + 6))
        assert found.count == len(own)
        for name, total in truth.total.items():
            torch.testing.assert_close(found.total[name], total, rtol=1e-4, atol=1e-5)
        assert len(each.before.left.labels) + len(each.before.forget.labels) == 54


def test_references_never_saw_the_set_and_differ():
    names = facts()
    model = names["model"](0)
    problem = problem_of(names, model)
    recipe = Recipe(epochs=2, lr=0.1, batch_size=16)
    (each,) = prepare(problem, [torch.tensor([2, 3])], seed=0, recipe=recipe, retrain=2)
    one, other = each.references
    assert not np.array_equal(one.forget.logits, other.forget.logits)
    moved = names["retain"]().tensors[0].clone()
    moved[[2, 3]] += 100.0  # other records in the set: the same models, since they were not trained on
    strange = Examples(moved, names["retain"]().tensors[1], positions=names["retain"]().positions)
    again = replace(problem, given=replace(problem.given, retain=strange))
    (twin,) = prepare(again, [torch.tensor([2, 3])], seed=0, recipe=recipe, retrain=2)
    assert np.array_equal(twin.references[0].left.logits, one.left.logits)


# Scores


def seen(seed, shift=0.0):
    generator = np.random.default_rng(seed)
    parts = [(30, np.arange(30) % 3), (6, np.arange(6) % 2), (24, np.arange(24) % 3)]
    return Seen(*(outputs_of(generator.normal(size=(n, 3)) + shift * np.eye(3)[labels], labels) for n, labels in parts))


def test_the_score_against_unseen_records_is_the_sum_of_a_gap_and_of_what_was_lost():
    before, after = [seen(0, 2.0), seen(1, 2.0)], [seen(2, 1.0), seen(3, 3.0)]
    gaps, rises = [], []
    for own, trained in zip(after, before, strict=True):
        for loss, label in zip(own.forget.losses, own.forget.labels, strict=True):
            like = [u for u, other in zip(own.unseen.losses, own.unseen.labels, strict=True) if other == label]
            gaps.append(loss - sum(like) / len(like))
        rises.append(max(0, own.left.losses.mean() - trained.left.losses.mean()))
        rises.append(max(0, own.unseen.losses.mean() - trained.unseen.losses.mean()))
    found = closeness.against_unseen(before, after)
    assert found.forgetting == pytest.approx(abs(sum(gaps) / 12))
    assert found.usefulness == pytest.approx(sum(rises) / 2)
    assert found.usefulness > 0
    assert found.total == pytest.approx(found.forgetting + found.usefulness)


def test_a_model_that_treats_a_set_as_unseen_and_loses_nothing_scores_0():
    one = seen(0, 2.0)
    same = Seen(one.left, outputs_of(one.unseen.logits, one.unseen.labels), one.unseen)
    assert closeness.against_unseen([same], [same]).total == pytest.approx(0, abs=1e-12)


def test_sets_that_are_easier_or_harder_by_chance_balance():
    one = seen(0)
    easy, hard = (
        Seen(one.left, outputs_of([[shift, 0.0, 0.0]], [0]), outputs_of([[0.0, 0.0, 0.0]], [0]))
        for shift in (1.0, -0.9)
    )
    alone = closeness.against_unseen([easy], [easy]).forgetting
    assert closeness.against_unseen([easy, hard], [easy, hard]).forgetting < alone / 3


def test_the_score_against_retrained_models_counts_noise_floors():
    references, after = [[seen(10), seen(11), seen(12)], [seen(13), seen(14)]], [seen(0), seen(1)]

    def kl(a, b):
        p, q = (np.exp(x.logits) / np.exp(x.logits).sum(1, keepdims=True) for x in (a, b))
        return float((p * np.log(p / q) + q * np.log(q / p)).sum(1).mean())

    def both(a, b):
        return abs(a.forget.losses.mean() - b.forget.losses.mean()), kl(a.left, b.left)

    own = np.mean([both(a, r) for a, rs in zip(after, references, strict=True) for r in rs], axis=0)
    floor = np.mean([both(a, b) for rs in references for a, b in combinations(rs, 2)], axis=0)
    found = closeness.against_retrained(references, after)
    assert found[1:] == pytest.approx(tuple(own / floor))
    assert found.total == pytest.approx((own / floor).mean())


def test_chance_is_the_standard_error_of_a_mean_loss():
    each = seen(0)
    losses = each.unseen.losses.copy()
    for label in range(3):
        losses[each.unseen.labels == label] -= losses[each.unseen.labels == label].mean()
    assert closeness.chance([each, each]) == pytest.approx(losses.std() / math.sqrt(12))


def test_what_there_is_to_forget_is_how_much_better_records_are_known_that_were_trained_on():
    sets = [seen(0), seen(1)]
    known = [*zip(sets[0].left.losses, sets[0].left.labels, strict=True)]
    known += [*zip(sets[0].forget.losses, sets[0].forget.labels, strict=True)]
    unseen = [*zip(sets[0].unseen.losses, sets[0].unseen.labels, strict=True)]

    def mean(pairs, label):
        return np.mean([loss for loss, other in pairs if other == label])

    labels = [label for each in sets for label in each.forget.labels]
    expected = np.mean([mean(unseen, label) - mean(known, label) for label in labels])
    assert closeness.to_forget(sets) == pytest.approx(expected)


def spread(gain, deviation, records):
    """Records that are known by `gain` nats better than unseen ones, whose losses deviate by so much."""
    losses = {"known": [1.0], "unseen": [1.0 + gain - deviation, 1.0 + gain + deviation]}
    logits = {k: [[0.0, math.log(math.exp(loss) - 1)] for loss in own] for k, own in losses.items()}
    of = {k: outputs_of(own, [0] * len(own)) for k, own in logits.items()}
    return Seen(of["known"], outputs_of(logits["known"] * records, [0] * records), of["unseen"])


@pytest.mark.parametrize(
    ("gain", "records", "needed"),
    [
        (0.3, 3, 15),  # 3 sets: chance is 0.5 / 3 = 0.17; a quarter of 0.3 with (0.5 · 4 / 0.3)² / 3 = 14.8 records
        (0.3, 4, None),
        (0.34, 3, None),
        (0.3, 15, None),
        (-0.1, 50, 0),
    ],
)
def test_too_few_records_are_those_of_which_chance_is_half_of_what_there_is_to_forget(gain, records, needed):
    assert closeness.records_needed([spread(gain, 0.5, records)] * 3) == needed


def test_a_class_without_unseen_records_is_named():
    one = seen(0)
    lacking = Seen(one.left, one.forget, outputs_of([[0.0, 0.0, 0.0]], [0]))
    with pytest.raises(ConfigError, match=r"test\(\) has no record of class 1"):
        closeness.against_unseen([lacking], [lacking])


# The command


def test_activations_that_the_cache_computed_again_are_computed_again(folder, monkeypatch):
    cached = ("cache", "setup.py", "--weights", "w.safetensors", "--out", "c.safetensors", "--replace")
    assert main([*cached, "--checkpoint", "2"]) == 0
    asked = []
    monkeypatch.setattr(second_pass, "gradient", lambda *a, **k: asked.append(k["checkpoint"]) or gradient(*a, **k))
    assert rehearsed("--trials", "1", "--sets", "2") == 0
    assert set(asked) == {("2",)}


def test_settings_are_chosen_and_unlearn_takes_them(folder, capsys):
    assert rehearsed("--trials", "3", "--sets", "2") == 0
    out = capsys.readouterr().out
    assert "2 pseudo-forget sets of 6 records, against test()" in out  # as many as were deleted
    stored = json.loads(Path("settings.json").read_text(encoding="utf-8"))
    assert stored["method"] == "reload"
    assert stored["settings"]["fine_tune.epochs"] == 2
    trials = [json.loads(line) for line in Path("settings.trials.jsonl").read_text(encoding="utf-8").splitlines()[1:]]
    best = min(trials, key=lambda trial: trial["score"])
    assert best["settings"].items() <= stored["settings"].items()
    line = next(line for line in out.splitlines() if line.startswith("expunge unlearn"))
    assert main(line.split()[1:]) == 0
    trace = json.loads(Path("unlearned.trace.json").read_text(encoding="utf-8"))
    assert trace["config"]["priming_lr"] == best["settings"]["priming_lr"]
    assert trace["config"]["fine_tune"]["lr"] == best["settings"]["fine_tune.lr"]
    assert trace["config"]["fine_tune"]["epochs"] == 2
    assert "settings" in trace["provenance"]["files"]


def test_a_cache_in_several_files_is_as_good_as_one(folder):
    made = ["cache", "setup.py", "--weights", "w.safetensors", "--out", "c.safetensors", "--replace", "--groups", "1"]
    assert main(made) == 0
    assert not Path("c.safetensors").exists()
    assert rehearsed("--trials", "1", "--sets", "2") == 0
    about = json.loads(Path("settings.json").read_text(encoding="utf-8"))["about"]
    assert about["files"]["cache"] == file_hash("c.safetensors.index.json")


def test_references_are_retrained_if_asked_for(folder, capsys):
    assert rehearsed("--trials", "2", "--sets", "2", "--retrain", "2", "--like", "class", "--out", "a.json") == 0
    out = capsys.readouterr().out
    assert "Scores, noise floors; 1 is as close as another retrained model" in out
    assert "0 is perfect" not in out
    assert rehearsed("--trials", "2", "--sets", "2", "--retrain", "2", "--like", "class", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["retrain"] == 2
    assert set(found["scores"]) == {"no unlearning", "settings as given", "settings chosen"}
    assert found["scores"]["settings chosen"]["tuned on"]["total"] == min(each["score"] for each in found["tried"])
    assert found["chosen"] == min(found["tried"], key=lambda each: each["score"])["settings"]


def test_a_rehearsal_goes_on_where_it_was_interrupted(folder, monkeypatch, capsys):
    assert rehearsed("--trials", "3", "--sets", "2", "--out", "a.json") == 0
    run, count = rehearsal.rehearse, []

    def interrupted(*given):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return run(*given)

    monkeypatch.setattr(rehearsal, "rehearse", interrupted)
    assert rehearsed("--trials", "3", "--sets", "2", "--out", "b.json") == 130
    assert not Path("b.json").exists()
    assert rehearsed("--trials", "3", "--sets", "2", "--out", "b.json") == 0
    assert len(count) == 2 + 2 + 4  # one trial kept, two run, and two settings confirmed on two kinds of sets
    a, b = (json.loads(Path(name).read_text(encoding="utf-8")) for name in ("a.json", "b.json"))
    assert a == b


def test_other_data_is_another_search(folder, capsys):
    assert rehearsed("--trials", "1", "--sets", "2") == 0
    setup = Path("setup.py").read_text(encoding="utf-8")
    Path("setup.py").write_text(setup.replace("torch.arange(6)", "torch.arange(7)"), encoding="utf-8")
    assert rehearsed("--trials", "1", "--sets", "2", "--replace") == 2
    assert re.search(r"another search, .*files.setup: .* there, .* here", capsys.readouterr().err)


def test_another_search_is_named_by_the_setting_that_differs(folder, capsys):
    assert rehearsed("--trials", "1", "--sets", "2") == 0
    method = ("reload", "--fine-tune.epochs", "3", "--fine-tune.batch-size", "16")
    assert rehearsed("--trials", "1", "--sets", "2", "--replace", method=method) == 2
    assert "(fine_tune.epochs: 2 there, 3 here). Name another journal" in capsys.readouterr().err


def test_settings_that_do_not_hold_up_are_said_not_to(folder, monkeypatch, capsys):
    broken = {"priming_lr": 10.0, "reset_fraction": 0.8, "fine_tune.lr": 1e-5, "fine_tune.schedule": "cosine"}
    monkeypatch.setattr(tuning, "tune", lambda *_, **__: [Trial(0, broken, 0.1, 0.0)])
    assert rehearsed("--sets", "2", method=(*RELOAD, "--reset-fraction", "0.01", "--priming-lr", "0.01")) == 0
    out = capsys.readouterr().out
    assert "do NOT hold up: on the set that they were not tuned on, the settings that were given are better" in out
    assert "do NOT hold up: on the set that they were not tuned on, they are no better than not unlearning" in out
    about = json.loads(Path("settings.json").read_text(encoding="utf-8"))["about"]
    assert about["holds up"] is False
    assert about["better than nothing"] is False
    warning, command = out.splitlines()[-2:]
    assert warning == "This unlearns with them all the same, and warns:"
    assert main(command.split()[1:]) == 0
    error = capsys.readouterr().err
    assert "warning: settings.json: these settings did not hold up when they were chosen: on the set" in error
    assert "the settings that were given are better, and on the set" in error
    assert "Rehearse again" in error


@pytest.mark.parametrize(
    ("score", "holds", "better"), [(0.4, True, True), (0.5, True, True), (0.6, False, True), (0.7, False, False)]
)
def test_holding_up_is_judged_on_the_held_out_set(score, holds, better):
    scores = {
        who: {"tuned on": Score(tuned, 0, 0), "held out": Score(held, 0, 0)}
        for who, tuned, held in (
            ("settings as given", 0.1, 0.5),
            ("settings chosen", 0.9, score),
            ("no unlearning", 0.1, 0.7),
        )
    }
    found = importlib.import_module("expunge.cli.rehearse").verdicts(scores)
    assert found == {"holds up": holds, "better than nothing": better}


def test_settings_that_held_up_are_read_without_a_warning(tmp_path, recwarn):
    for about in ({"holds up": True, "better than nothing": True}, {}):
        chosen.write_settings(tmp_path / "s.json", Reload(), about)
        assert chosen.read_settings(tmp_path / "s.json", Reload()) == Reload()
    assert not recwarn.list


def test_the_settings_as_given_are_the_first_trial_and_the_chosen_are_no_worse(folder, capsys):
    method = (*RELOAD, "--fine-tune.schedule", "constant", "--priming-lr", "0.3")  # outside the space
    assert rehearsed("--trials", "3", "--sets", "2", "--json", method=method) == 0
    found = json.loads(capsys.readouterr().out)
    first = next(trial for trial in found["tried"] if trial["number"] == 0)
    assert first["settings"]["fine_tune.schedule"] == "constant"
    assert first["settings"]["priming_lr"] == 0.3
    assert len(found["tried"]) == 3
    given, best = (found["scores"][who]["tuned on"]["total"] for who in ("settings as given", "settings chosen"))
    assert first["score"] == given
    assert best <= given


def test_that_records_are_too_few_is_said_before_the_search(folder, monkeypatch, capsys):
    def search(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "tune", search)
    for needed, cure in (
        (None, None),
        (8, "Use --records 8."),
        (18, r"It would take --records 18, more than retain\(\) has: .*--retrain 3"),
        (0, r"knows what is left no better than test\(\): rehearse against retrained models"),
    ):
        monkeypatch.setattr(closeness, "records_needed", lambda _, needed=needed: needed)
        assert rehearsed("--sets", "2", "--records", "2") == 130
        error = capsys.readouterr().err
        if cure is None:
            assert "too few" not in error
            continue
        told = r"warning: 2 records are too few to rehearse: there are \S+ nats to forget, .* misses 0 by about "
        assert re.search(told + rf"\S+\. {cure}|{cure}", error), error


def test_only_methods_that_can_be_rehearsed_are_listed(capsys):
    assert main(["rehearse", "--help"]) == 0
    listed = set(re.findall(r"• (\S+)", capsys.readouterr().out))
    assert listed == {each.name for each in METHODS.values() if each.blind and each.space}
    assert "scrub" not in listed


def test_settings_that_break_the_model_have_no_score_and_the_file_is_json(folder, monkeypatch):
    def broken(*_):
        raise NotFinite("the loss became nan")

    monkeypatch.setattr(tuning, "tune", lambda *_, **__: [Trial(0, {"reset_fraction": 0.2}, 0.1, 0.0)])
    monkeypatch.setattr(rehearsal, "rehearse", broken)
    assert rehearsed("--sets", "2") == 0
    text = Path("settings.json").read_text(encoding="utf-8")
    stored = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert stored["about"]["scores"]["settings chosen"]["held out"]["total"] is None


def test_the_last_set_is_not_tuned_on(folder, monkeypatch):
    run, tuned = rehearsal.rehearse, []
    monkeypatch.setattr(
        rehearsal, "rehearse", lambda p, sets, c: tuned.append([each.seed for each in sets]) or run(p, sets, c)
    )
    assert rehearsed("--trials", "2", "--sets", "2") == 0
    assert tuned[0] == tuned[1]
    assert len(tuned[0]) == 2
    held = [seeds for seeds in tuned if len(seeds) == 1]
    assert len(held) == 2
    assert held[0][0] not in tuned[0]


def edited(old, new):
    text = Path("setup.py").read_text(encoding="utf-8")
    assert old in text
    Path("setup.py").write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sets", "1"], "sets=1: settings that suit a single set"),
        (["--like", "class"], r"like='class': unseen records .*--retrain 2"),
        (
            ["--like", "class", "--retrain", "2", "--records", "9"],
            "records=9, like='class': a whole class has the size",
        ),
        (["--retrain", "1"], r"retrain=1: nobody knows how far two retrained models are apart"),
        (["--records", "20"], r"4 pseudo-forget sets of 20 records leave nothing of the 54 records in retain\(\)"),
        (["--minutes", "0"], "no settings of reload worked: no trial began in 0 minutes"),
        (["--trials", "0"], "trials=0: tuning needs at least one"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused(options, message, folder, capsys):
    assert rehearsed(*options) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not Path("settings.json").exists()


def test_a_setup_file_that_lacks_something_is_told_what(folder, capsys):
    edited("def test():", "def tested():")
    assert rehearsed("--trials", "1") == 2
    assert "the setup file defines no test()" in capsys.readouterr().err
    edited("recipe = ", "recipes = ")
    assert rehearsed("--trials", "1", "--retrain", "2") == 2
    assert "retrain=2: the setup file defines no recipe" in capsys.readouterr().err
    edited("recipes = Recipe(epochs=4, lr=0.1, batch_size=16)", "recipe = 4")
    assert rehearsed("--trials", "1", "--retrain", "2") == 2
    assert "recipe is a int. Write expunge.Recipe" in capsys.readouterr().err


def test_without_a_cache_the_number_of_records_is_needed(folder, capsys):
    assert rehearsed(cache=False) == 2
    assert "without a cache nobody knows how many records were removed" in capsys.readouterr().err
    assert rehearsed("--records", "4", "--trials", "1", cache=False) == 0
    assert "sets of 4 records" in capsys.readouterr().out


def test_persons_of_the_setup_file_are_drawn_whole(folder, capsys):
    edited("def test():", "def persons():\n    return [f'person {i // 4}' for i in range(54)]\n\ndef test():")
    assert rehearsed("--like", "person", "--records", "7", "--trials", "1", "--sets", "2") == 0
    assert re.search(r"2 pseudo-forget sets of 8( to \d+)? records", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[1] * 53", "persons() returned 53 names, and retain() has 54 records. Return the name"),
        ("['anna'] * 53 + [None]", "persons()[53] is None, and persons()[0] is 'anna'. Return names or whole numbers"),
        ("['1'] * 53 + [1]", "persons()[53] is 1, and persons()[0] is '1'"),
        ("[None] * 54", "persons()[0] is None"),
        (
            "torch.arange(54) // 20",
            "4 pseudo-forget sets, of which one is held out, and somebody who stays take 5 persons",
        ),
        (None, 'setup.py does not define persons. Add: def persons(): return ["anna", "anna", "ben", …]'),
    ],
)
def test_persons_that_do_not_fit_the_records_are_refused(returned, message, folder, capsys):
    if returned:
        edited("def test():", f"def persons():\n    return {returned}\n\ndef test():")
    assert rehearsed("--like", "person") == 2
    assert message in capsys.readouterr().err


def test_a_list_in_place_of_a_function_is_refused(folder, capsys):
    edited("def test():", "persons = [1]\n\ndef test():")
    assert rehearsed("--like", "person") == 2
    assert "setup.py: persons is a list, no function. Write def persons(): return" in capsys.readouterr().err


def test_a_cache_from_which_nothing_was_removed_does_not_say_how_many(folder, capsys):
    edited(".without(torch.arange(6))", "")
    assert rehearsed() == 2
    assert "nothing was removed. Say how many records" in capsys.readouterr().err


@pytest.mark.parametrize("method", [("scrub",), ("retrain",)])
def test_a_method_that_cannot_be_rehearsed_is_refused(method, folder, capsys):
    assert rehearsed(method=method) == 2
    said = capsys.readouterr()
    wrapped = "".join((said.out + said.err).replace("│", " ").split())
    assert "Availablesubcommands:reload,orthogonal-ascent,class-orthogonal-ascent,fine-tune" in wrapped


def test_settings_are_not_written_over(folder, capsys):
    Path("settings.json").write_text("{}", encoding="utf-8")
    assert rehearsed() == 2
    assert "settings.json exists" in capsys.readouterr().err
    before = Path("w.safetensors").read_bytes()
    assert rehearsed("--out", "w.safetensors", "--replace") == 2
    assert "w.safetensors is read by this command" in capsys.readouterr().err
    assert Path("w.safetensors").read_bytes() == before


def test_any_blind_method_can_be_rehearsed(folder):
    assert rehearsed("--trials", "1", "--sets", "2", method=("fine-tune", "--recipe.epochs", "1")) == 0
    assert json.loads(Path("settings.json").read_text(encoding="utf-8"))["method"] == "fine-tune"


# The file of settings


def test_settings_survive_their_file(tmp_path):
    config = Reload(
        priming_lr=None,
        published_code=("normal-1d",),
        fine_tune=Recipe(epochs=3, lr=0.2, schedule="step", milestones=(1, 2)),
    )
    chosen.write_settings(tmp_path / "s.json", config, {"why": "test"})
    assert chosen.read_settings(tmp_path / "s.json", Reload()) == config
    assert with_settings(Reload(), settings_of(config)) == config


def test_settings_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "s.json"
    chosen.write_settings(path, Reload(), {})
    with pytest.raises(ConfigError, match="settings of reload were given beside"):
        chosen.read_settings(path, Reload(reset_fraction=0.3))
    text = path.read_text(encoding="utf-8")
    for old, new, error, message in (
        ('"reload"', '"ssd"', ConfigError, "holds settings of 'ssd', and this is 'reload'"),
        ('"reset_fraction": 0.1', '"reset_fraction": "much"', ConfigError, "reload cannot use its settings"),
        ('"reset_fraction": 0.1', '"reset_fraction": 3', ConfigError, r"reset_fraction=3: must be in \[0, 1\)"),
        ('"reset_fraction"', '"fraction"', ConfigError, "'fraction': Reload has no such setting"),
        ('"method"', '"methods"', CorruptData, "no file of settings, or damaged"),
        (text, "not json", CorruptData, "no file of settings, or damaged"),
    ):
        path.write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(error, match=message):
            chosen.read_settings(path, Reload())
