import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from expunge import Blind, Examples, Recipe, cross_entropy, gradient
from expunge.batches import indexed, only_rows, plain
from expunge.bench import closeness
from expunge.bench.closeness import Seen
from expunge.bench.pseudo_sets import draw, removed_of_each_class
from expunge.bench.rehearsal import Problem, prepare
from expunge.errors import ConfigError, NotInformative, UnsupportedModule
from expunge.losses import logit_margin
from expunge.methods.fine_tune import FineTune
from expunge.metrics.outputs import Outputs
from expunge.unlearn import unlearn
from tests.rehearsing import facts

TRAINED = Recipe(epochs=30, lr=0.1)


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


def test_sets_like_what_was_removed_have_its_classes_in_its_shares():
    labels = np.arange(100) % 5
    sets = draw(labels, "removed", 9, 2, 0, of_each_class=np.array([20.0, 0.0, 10.0, 0.2, 6.0]))
    for rows in sets:
        assert np.bincount(labels[rows.numpy()], minlength=5).tolist() == [5, 0, 2, 0, 2]  # 4.97, 2.486, 0.05, 1.492
        assert rows.tolist() == sorted(rows.tolist())
    assert len(set(torch.cat(sets).tolist())) == 18
    other = draw(labels, "removed", 9, 2, 1, of_each_class=np.array([20.0, 0.0, 10.0, 0.2, 6.0]))
    assert not torch.equal(other[0], sets[0])


def test_a_class_that_is_too_small_for_all_sets_gives_each_its_share_and_keeps_some():
    labels = np.repeat([0, 1], [13, 40])
    sets = draw(labels, "removed", 10, 3, 0, of_each_class=np.array([5.0, 5.0]))
    assert [np.bincount(labels[rows.numpy()]).tolist() for rows in sets] == [[4, 5]] * 3


def of_margins(names, left, model):
    """What is left, with the gradient of margins."""
    full = gradient(model, logit_margin, left)
    return Blind(retain=left, loss_terms=cross_entropy, fresh=names["model"], full=full, cached_loss=logit_margin)


def test_the_classes_of_what_was_removed_come_from_the_gradients():
    names = facts()
    model = names["model"](0)
    trained = unlearn(
        model,
        Blind(retain=names["original"](), loss_terms=cross_entropy, fresh=names["model"]),
        FineTune(recipe=TRAINED),
    ).model
    cached = gradient(trained, logit_margin, names["original"]())  # a record counts alike whatever its loss
    gone = torch.tensor([1, 4, 7, 10, 13, 16, 0, 3])  # six of class 1, two of class 0
    left = names["original"]().without(gone)
    given = of_margins(names, left, trained)
    found = removed_of_each_class(trained, given, cached - given.full)
    assert found.sum() == pytest.approx(8)
    assert found.tolist() == pytest.approx([2, 6, 0], abs=1)
    whole = names["original"]().without(torch.arange(1, 60, 3))
    given = of_margins(names, whole, trained)
    with pytest.raises(NotInformative, match=r"(9\d|100)% of the head's gradient is not .*Was a whole class removed\?"):
        removed_of_each_class(trained, given, cached - given.full)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (lambda m, b: (m(b[0])[:, :1], b[1]), r"logits of shape \(54, 1\), labels of shape \(54,\), and .* 3 outputs"),
        (
            lambda m, b: (m(b[0]), b[1] - 100),
            r"labels from -100 to -98: there are classes 0 to 2\.",
        ),
        (lambda m, b: (m(b[0]), torch.zeros(54, 2)), r"labels of shape \(54, 2\)"),
        (lambda m, b: (m(b[0]).repeat(2, 1), b[1].repeat(2)), r"108 labels of 54 records: .*; tokens are none"),
    ],
)
def test_records_without_a_class_number_each_are_refused(logits, message):
    names = facts()
    model = names["model"](0)
    cached = gradient(model, logit_margin, names["original"]())
    given = of_margins(names, names["retain"](), model)
    with pytest.raises(UnsupportedModule, match=f"like='removed': .*{message}.*Choose another --like"):
        removed_of_each_class(model, given, cached - given.full, logits)


def test_batches_in_which_nobody_can_count_records_are_taken_at_their_labels():
    names = facts()
    model, whole = names["model"](0), names["original"]().tensors
    extra = torch.zeros(30)  # with a tensor of another length a batch has none
    loaded = [(images, labels, extra) for images, labels in zip(*(each.split(20) for each in whole), strict=True)]

    def loss(model, batch):
        return cross_entropy(model, batch[:2])

    cached = gradient(model, loss, loaded)
    left = [(images[5:], labels[5:], extra) for images, labels, _ in loaded]
    given = Blind(retain=left, loss_terms=loss, fresh=names["model"], full=gradient(model, loss, left))
    found = removed_of_each_class(model, given, cached - given.full, lambda m, b: (m(b[0]), b[1]))
    assert found.sum() == pytest.approx(15, abs=2)


def test_a_cache_from_which_nothing_was_removed_tells_no_classes():
    names = facts()
    model = names["model"](0)
    given = of_margins(names, names["retain"](), model)
    with pytest.raises(
        NotInformative, match=r"like='removed': .* nothing was removed since it was made. Choose another --like"
    ):
        removed_of_each_class(model, given, given.full - given.full)


def test_a_cache_without_the_head_does_not_tell_the_classes():
    names = facts()
    model = names["model"](0)
    cached = gradient(model, logit_margin, names["original"](), parameters=["0.weight"])
    given = of_margins(names, names["retain"](), model)
    left = gradient(model, logit_margin, names["retain"](), parameters=["0.weight"])
    with pytest.raises(UnsupportedModule, match=r"'removed': .*cache ends at 0, before the last .*another --like"):
        removed_of_each_class(model, given, cached - left)


def test_sets_that_cannot_be_drawn_are_refused():
    labels = np.arange(12) % 3
    with pytest.raises(ConfigError, match=r"3 pseudo-forget sets of 4 records leave nothing of the 12 .*smaller sets"):
        draw(labels, "random", 4, 3, 0)
    with pytest.raises(ConfigError, match=r"like='in-class': 0 classes have 5 records or more .*--records"):
        draw(labels, "in-class", 4, 3, 0)
    with pytest.raises(ConfigError, match=r"like='class': 3 classes .*and 4 pseudo-forget sets"):
        draw(labels, "class", 4, 4, 0)
    with pytest.raises(ConfigError, match=r"4 pseudo-forget sets take more .*\(class 2: 2 of 4 for each set\)"):
        draw(labels, "removed", 2, 4, 0, of_each_class=np.array([0.0, 0.0, 9.0]))
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
    trained_on = []

    def own_loop(_, data, seed):
        trained_on.append((len(data), seed))

    own = replace(problem, given=replace(problem.given, train_from_scratch=own_loop))
    prepare(own, [torch.tensor([2, 3])], seed=0, retrain=2)
    assert [count for count, _ in trained_on] == [52, 52]
    assert len({seed for _, seed in trained_on}) == 2


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
    found = closeness.against_unseen(before, after, may_lose=1)
    assert found.forgetting == pytest.approx(abs(sum(gaps) / 12))
    assert found.usefulness == pytest.approx(sum(rises) / 2)
    assert found.usefulness > 0
    assert found.total == pytest.approx(found.forgetting + found.usefulness)


def test_what_loses_more_than_it_may_is_no_better_than_nothing():
    labels = np.arange(200) % 2
    right = 8.0 * np.eye(2)[labels]
    wrong = right.copy()
    wrong[:6] = wrong[:6, ::-1]  # 3 % of what is left
    flat = outputs_of([[0.0, 0.0]] * 4, [0, 1, 0, 1])
    before = Seen(outputs_of(right, labels), outputs_of(right[:2], labels[:2]), flat)
    forgot = Seen(outputs_of(wrong, labels), outputs_of([[0.0, 0.0]] * 2, labels[:2]), flat)
    nothing = closeness.against_unseen([before], [before])
    assert nothing.total == pytest.approx(math.log(2), abs=1e-3)
    allowed = closeness.against_unseen([before], [forgot], may_lose=0.03)
    assert allowed.forgetting == pytest.approx(0, abs=1e-12)
    assert allowed.total == pytest.approx(allowed.usefulness) == pytest.approx(0.03 * 8, rel=1e-3)
    assert allowed.total < nothing.total
    assert (nothing.lost, allowed.lost) == pytest.approx((0, 3))
    for may_lose, beyond in ((0.02, 1), (0.01, 2)):  # points
        found = closeness.against_unseen([before], [forgot], may_lose)
        assert found.total == pytest.approx(nothing.total + beyond, rel=1e-6)
    assert closeness.against_unseen([before], [forgot]).total == found.total


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
    assert found[1:3] == pytest.approx(tuple(own / floor))
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
    with pytest.raises(ConfigError, match=r"test\(\) has no record of class 1"):
        closeness.to_forget([lacking])  # asked before the search
