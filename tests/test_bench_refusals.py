"""Experiments that cannot work are refused when they are planned, with what to do."""

from dataclasses import replace

import pytest
import torch

from expunge.bench import difference, experiments, fit, profiles, tasks
from expunge.bench.fit import require_fit
from expunge.bench.records import records_of
from expunge.bench.stages import Contender
from expunge.bench.store import Store
from expunge.bench.tasks import Scenario
from expunge.bench.workers import Processes
from expunge.cli import main
from expunge.data.images import ImageData, Images
from expunge.errors import ConfigError, IncompleteRun, MismatchError, MissingData
from expunge.files import write_text
from expunge.training import Recipe
from tests.contract import without_type_checks
from tests.tiny_bench import BRIEF, CROSS, DIGITS, RANDOM, TINY, TWO, tiny


@pytest.mark.parametrize(
    ("text", "profile", "message"),
    [
        ("x = (", "cpu", r"wrong.py: failed when it was run: SyntaxError: '\(' was never closed"),
        ("x = 1\ny = z", "cpu", r"wrong.py, line 2: failed when it was run: NameError: name 'z' is not defined"),
        ("def experiment(profile):\n    return 1 / 0", "cpu", r"line 2: experiment\('cpu'\) failed: ZeroDivisionError"),
        (
            "from expunge.bench.tasks import Scenario\nScenario(kind='rnd')",
            "cpu",
            r"wrong.py, line 2: failed when it was run: kind='rnd': choose from random, in-class, class",
        ),
        ("x = 1", "cpu", r"defines no experiment\(profile\)"),
        ("def experiment(profile): return 3", "cpu", r"returned int, and not an Experiment"),
    ],
)
def test_a_file_that_defines_no_experiment_is_refused(tmp_path, text, profile, message):
    file = tmp_path / "wrong.py"
    write_text(file, text)
    with without_type_checks(), pytest.raises(ConfigError, match=message):
        experiments.load(file, profile, None)


def test_a_mistake_in_an_experiment_file_is_said_in_one_line(tmp_path, capsys):
    file = tmp_path / "wrong.py"
    write_text(file, "import expunge\nexpunge.nothing_of_this_name\n")
    assert main(["bench", "status", str(file), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"expunge: {file}, line 2: failed when it was run: AttributeError")
    assert "Traceback" not in said
    assert "mistake of ours" not in said


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "rnd"}, "kind='rnd': choose from random, in-class, class, neighbours, .*, noise"),
        ({"kind": "random"}, "amount=0.0: random takes a share of the training images, above 0 and below 1"),
        ({"kind": "sequence", "amount": 10}, "amount=10: sequence takes a share of the training images"),
        ({"kind": "random", "amount": "0.1"}, "amount='0.1': give a number"),
        (
            {"kind": "in-class", "amount": 1.5},
            "amount=1.5: of a class it is how many images, a whole number, or a share below 1",
        ),
        ({"kind": "random", "amount": 0.1, "round": 2}, "round=2: random has none. Leave it out"),
        ({"kind": "sequence", "amount": 0.1, "round": 0}, "round=0: count deletions from 1"),
        ({"kind": "random", "amount": 0.1, "classes": (0,)}, r"classes=\(0,\): random has none"),
        ({"kind": "random", "amount": 0.1, "gamma": 0.5}, "gamma=0.5: random has none"),
        ({"kind": "in-class", "amount": 5, "known_are": "removed"}, "known_are='removed': in-class has none"),
        ({"kind": "cross-backdoor"}, r"classes=\(\): name those whose images get the pattern"),
        ({"kind": "cross-backdoor", "classes": (0, 0)}, r"classes=\(0, 0\): name every class once"),
        ({"kind": "cross-backdoor", "classes": (-1,)}, r"classes=\(-1,\): name those"),
        ({"kind": "cross-backdoor", "classes": (0,), "amount": 0.1}, "amount=0.1: cross-backdoor has none"),
        ({"kind": "cross-backdoor", "classes": (0,), "gamma": 0}, "gamma=0: choose a share above 0, up to 1"),
        ({"kind": "cross-backdoor", "classes": (0,), "known_are": "gone"}, "known_are='gone': choose from corrected"),
        ({"kind": "class", "classes": (0, 1)}, r"classes=\(0, 1\): name one, as \(3,\), or leave it to the seed"),
        ({"kind": "in-class", "amount": 5, "classes": 3}, r"classes=3: name one, as \(3,\)"),
        ({"kind": "class", "amount": 0.1}, "amount=0.1: class has none. Leave it out"),
        ({"kind": "flipped-labels", "amount": 0.2}, r"pairs=\(\): name classes two by two, as \(\(0, 2\), \(3, 5\)\)"),
        ({"kind": "flipped-labels", "amount": 0.2, "pairs": (0, 2)}, r"pairs=\(0, 2\): name classes two by two"),
        ({"kind": "flipped-labels", "amount": 0.2, "pairs": ((0, 2), (2, 3))}, "pairs=.*: name every class once"),
        (
            {"kind": "flipped-labels", "amount": 1, "pairs": ((0, 2),)},
            "amount=1: flipped-labels takes a share of the images of",
        ),
        ({"kind": "noise", "amount": 0.1, "pairs": ((0, 2),)}, r"pairs=\(\(0, 2\),\): noise has none"),
    ],
)
def test_a_scenario_that_cannot_be_is_refused(values, message):
    with without_type_checks(), pytest.raises(ConfigError, match=message):
        Scenario(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"dataset": "cifar11"},
            "dataset='cifar11': choose from digits, cifar10, cifar100, svhn, mnist, fashion-mnist",
        ),
        ({"model": "convnets"}, "model='convnets': choose from mlp, convnet"),
        ({"model": "mlp", "settings": (("depth", 3),)}, "model='mlp'.*'depth'.* this model takes widths"),
        ({"called": 3}, "called=3: write a name for tables, or leave it out"),
        (
            {"settings": (("widht", 8),)},
            "unexpected keyword argument 'widht'.* this model takes channels, classes, widths",
        ),
        ({"settings": (("classes", 8),)}, "multiple values for keyword argument 'classes'"),
        ({"settings": ("widths", 8)}, r"settings=\('widths', 8\): write pairs: \(\(\"name\", value\),\)"),
        ({"settings": (("widths", [8]),)}, r"widths=\[8\]: give a number, a text, None, or a tuple of these"),
        ({"settings": (("widths", (8,)),) * 2}, "give every setting once"),
        ({"settings": ((1, 2),)}, "the first of each pair is a name"),
        ({"recipe": 30}, r"recipe=30: write Recipe\(epochs=…, lr=…\)"),
        ({"recipe": Recipe(epochs=0, lr=0.1)}, "recipe.epochs=0: an original must train"),
        ({"scenario": "random"}, r"scenario='random': write Scenario\(kind=…\)"),
        ({"train": 3000}, "train=3000: of the 1797 digits give 1 to 1796: the others are the test images"),
        ({"train": 0}, "train=0: of the 1797 digits"),
        ({"train": 0.5}, "train=0.5: give a number of images, or 0 for all"),
        ({"test": 100}, "test=100: the digits that are not trained on are the test images"),
        ({"threads": 0}, "threads=0: give 1 or more"),
        ({"device": "gpu"}, "device='gpu': torch has none of this name. Write cpu or cuda"),
    ],
)
def test_a_task_that_cannot_be_is_refused(values, message):
    with without_type_checks(), pytest.raises(ConfigError, match=message):
        replace(DIGITS, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": ""}, "name='': give a contender a name"),
        ({"entry": "relaod"}, r"no entry 'relaod'\. Is it 'reload'\? There are reload"),
        (
            {"settings": (("selectr", "obs"),)},
            "contender 'x': reload has no setting 'selectr'. Is it 'selector'. It has priming_lr, .*selector",
        ),
        ({"settings": (("selector", "kv"),)}, "reload refuses this: selector='kv': choose from small-kv"),
        (
            {"settings": (("reset_fraction", "a"),)},
            "settings=.*reset_fraction.* reload refuses this: '<=' not supported",
        ),
        ({"settings": (("fine_tune.lr", -1.0),)}, "reload refuses this: lr=-1.0"),
        ({"entry": "retrain", "settings": (("lr", 1),)}, "settings=.*: retrain has none of its own. Leave them out"),
        ({"tuned": "no"}, "tuned='no': write True, False or 'blind'"),
        ({"tuned": 1}, "tuned=1: write True, False or 'blind'"),
        ({"entry": "ssd", "tuned": "blind"}, "tuned='blind': ssd needs the removed records"),
        ({"entry": "fine-tune", "cached_loss": "logit_margin"}, "fine-tune uses no cached gradient. Leave it out"),
        (
            {"cached_loss": "mse"},
            "cached_loss='mse': choose from cross_entropy, logit_margin, tempered_margin, or leave it out",
        ),
    ],
)
def test_a_contender_that_cannot_be_is_refused(values, message):
    with without_type_checks(), pytest.raises(ConfigError, match=message):
        Contender(**{"name": "x", "entry": "reload", **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget": 5}, r"budget=5: write Recipe\("),
        ({"trials": 2.5}, "trials=2.5: give a whole number"),
        ({"rehearsals": 1001}, r"rehearsals=1001: write a tuple of seeds, as \(1001,\)"),
        ({"rehearsals": (7, 7)}, "name every seed once"),
    ],
)
def test_an_effort_of_another_kind_is_refused(values, message):
    with without_type_checks(), pytest.raises(ConfigError, match=message):
        replace(BRIEF, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "a/b"}, "name='a/b': a folder is called after it"),
        ({"tasks": DIGITS}, r"tasks: write a tuple of Task, with a comma after the last"),
        ({"tasks": ()}, r"tasks=\(\): there must be one"),
        ({"tasks": (DIGITS, replace(DIGITS, train=50))}, "tasks: random 10 % would be there twice. .* with called="),
        ({"contenders": list(TWO)}, "contenders: write a tuple of Contender"),
        ({"contenders": (Contender(name="x", entry="retrain"),)}, "entry='retrain': it is in every table anyway"),
        ({"shown": "ΔFE"}, "shown: write a tuple of str"),
        ({"shown": ()}, "there must be one metric in the table"),
        ({"shown": ("DFA",)}, "'DFA' is not measured in these scenarios. There are NA, .*ΔFA"),
        ({"shown": ("Acc_corr",)}, "'Acc_corr' is not measured in these scenarios"),
        ({"leading": "dFE"}, "'dFE' is not measured in these scenarios"),
    ],
)
def test_an_experiment_that_cannot_be_is_refused(values, message):
    with without_type_checks(), pytest.raises(ConfigError, match=message):
        replace(TINY, **values)
    assert replace(TINY, tasks=(DIGITS, replace(DIGITS, scenario=CROSS)), shown=("Acc_corr", "ΔFE")).shown


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scenario": Scenario(kind="random", amount=0.01)}, "amount=0.01 is 0 of 40 training images at a time"),
        (
            {"scenario": Scenario(kind="in-class", amount=4)},
            "amount=4 images of one class: .*no more than 4 of 40 training",
        ),
        (
            {"scenario": Scenario(kind="in-class", amount=0.1)},
            "amount=0.1 of a class: .*no more than 4 of 40 training images, of which this is 0",
        ),
        (
            {"scenario": Scenario(kind="random-labels", amount=0.1, gamma=0.1)},
            "gamma=0.1 of 4 faults is none, and some must be known. Raise gamma or amount",
        ),
        (
            {"scenario": Scenario(kind="feature-backdoor", classes=tuple(range(10)), known_are="removed")},
            "classes=.*: all images have the pattern, and removing them leaves none",
        ),
        ({"scenario": Scenario(kind="class", classes=(10,))}, r"classes=\(10,\): digits has classes 0 to 9"),
        ({"scenario": Scenario(kind="noise", amount=0.99)}, "amount=0.99 is 40 of 40 training images at a time"),
        (
            {"scenario": Scenario(kind="cross-backdoor", classes=(0, 10))},
            r"classes=\(0, 10\): digits has classes 0 to 9",
        ),
        (
            {"scenario": Scenario(kind="flipped-labels", amount=0.5, pairs=((0, 10),))},
            r"pairs=\(\(0, 10\),\): digits has classes 0 to 9",
        ),
        ({"model": "vgg16", "settings": ()}, r"model='vgg16'.* does not work on images of \(1, 8, 8\)"),
        (
            {"model": "mlp", "settings": (("widths", (64, 3)),)},
            r"model='mlp'.* does not work on images of .*gives \(2, 3\) for two images of 10 classes",
        ),
        ({"settings": (("widths", (8,) * 5),)}, r"model='convnet'.* does not work on images of"),
    ],
)
def test_a_task_that_does_not_fit_its_data_is_refused_before_anything_runs(values, message):
    with without_type_checks(), pytest.raises(ConfigError, match=message):
        require_fit(replace(DIGITS, **values), None)
    require_fit(DIGITS, None)


def test_more_images_than_a_dataset_has_are_refused_before_anything_runs(monkeypatch):
    def few(count):
        return Images(torch.zeros(count, 3, 32, 32, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64))

    data = ImageData("cifar10", tuple("abcdefghij"), few(50), few(20))
    monkeypatch.setattr(fit, "images", lambda task, folder: data)
    task = replace(DIGITS, dataset="cifar10")
    require_fit(task, None)
    with pytest.raises(ConfigError, match=r"train=51: cifar10 has 50 such images. Take fewer, or 0 for all"):
        require_fit(replace(task, train=51), None)
    with pytest.raises(ConfigError, match="test=21: cifar10 has 20 such images"):
        require_fit(replace(task, test=21), None)
    monkeypatch.setattr(fit, "images", lambda task, folder: replace(data, test=None))
    with pytest.raises(ConfigError, match="cifar10 has no test images"):
        require_fit(task, None)


def test_profiles_refuse_the_digits_and_trainings_too_short_for_a_budget():
    with pytest.raises(ConfigError, match=r"they are 1797 images, and a profile takes more. Write a Task of your own"):
        profiles.task("cpu", "digits", RANDOM)
    with pytest.raises(ConfigError, match=r"recipe.epochs=4: 0.12 of these less two leaves -2 .* Train for 34 or more"):
        profiles.effort(DIGITS, "cpu")
    assert profiles.effort(replace(DIGITS, recipe=Recipe(epochs=34, lr=0.1)), "cpu").budget.epochs == 2


def test_mistakes_are_named_with_their_cure(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such experiment"):
        experiments.load(tmp_path / "none.py", "cpu", None)
    with pytest.raises(ConfigError, match="reload would be there twice"):
        tiny(contenders=TWO[:1] * 2)
    with pytest.raises(ConfigError, match=r"--data DIR or in the environment variable EXPUNGE_DATA"):
        records_of(replace(DIGITS, dataset="cifar10"), 0, None)
    with pytest.raises(MissingData, match="expunge data get cifar10"):
        records_of(replace(DIGITS, dataset="cifar10"), 0, tmp_path)
    with pytest.raises(ConfigError, match="jobs=0: at least one process"):
        Processes(Store(tmp_path), 0)
    with pytest.raises(IncompleteRun, match=r"there is no result of the stage 'original \(random"):
        Store(tmp_path).result(TINY.evaluations([0])[0].of("original"))
    with pytest.raises(ConfigError, match="no such rows"):
        difference.rows_of(tmp_path)
    assert main(["bench", "run", "experiments/table1.py", "--seeds", "0"]) == 2


def test_other_data_than_planned_is_refused(tmp_path, monkeypatch):

    monkeypatch.setattr(tasks, "_read", lambda dataset, folder: (None, "found"))
    with pytest.raises(MismatchError, match="is not the data that this run was planned with"):
        tasks.images(replace(DIGITS, dataset="cifar10", fingerprint="planned"), tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [("budget", Recipe(epochs=1, lr=0.1)), ("trials", 0), ("rehearsals", ()), ("references", 1)]
)
def test_an_effort_too_small_for_a_comparison_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"Effort: {name}.* a comparison takes"):
        replace(BRIEF, **{name: value})
