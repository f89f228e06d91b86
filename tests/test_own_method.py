"""A method that another package brings: examples/own_method, installed as pip would leave it."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from expunge import cli, methods
from expunge.audit.manners import manners
from expunge.bench import stages
from expunge.bench.compare import config
from expunge.bench.entries import SHORT, entries
from expunge.bench.experiments import everyone
from expunge.cli import own_model
from expunge.errors import ConfigError, ForgetSetAccessed
from expunge.gradient import gradient
from expunge.losses import cross_entropy
from expunge.methods import METHODS, Method, all_methods, gradient_ascent
from expunge.provenance import file_hash
from expunge.rows import read_rows
from expunge.setup import load_setup
from expunge.space import Choice, Range
from expunge.training import mean_loss
from expunge.unlearn import unlearn
from expunge.weights import save_weights
from tests.cli import SETUP
from tests.contract import world
from tests.tiny_bench import BRIEF, DIGITS

EXAMPLE = Path("examples/own_method").resolve()
EXPERIMENT = """from expunge.bench.stages import Contender
from tests.tiny_bench import tiny


def experiment(profile):
    return tiny(contenders=(Contender(name="mine", entry="neggrad-plus"),))
"""


def installed(site, *lines, package="neggrad-plus"):
    """What pip leaves in a site folder: the example's module, and the entry points of a package, by default its own."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    points = lines or [f"{n} = {v}" for n, v in project["entry-points"]["expunge.methods"].items()]
    shutil.copytree(EXAMPLE, site, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    about = site / f"{package.replace('-', '_')}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n", encoding="utf-8")
    (about / "entry_points.txt").write_text("\n".join(["[expunge.methods]", *points]), encoding="utf-8")
    return site


@pytest.fixture
def known(monkeypatch, tmp_path):
    """Packages of a site folder, as if they had been installed before Python began."""

    def with_packages(*lines, package="neggrad-plus"):
        monkeypatch.syspath_prepend(installed(tmp_path / "site", *lines, package=package))
        forget()

    def forget():
        for each in (methods._installed, stages._entries, stages._source):
            each.cache_clear()

    yield with_packages
    for name in ("neggrad_plus", "twice"):
        sys.modules.pop(name, None)
    monkeypatch.undo()
    forget()


def test_it_takes_part_everywhere_and_gets_what_it_asks_for(known):
    known()
    import neggrad_plus

    assert list(all_methods()) == [*METHODS, "neggrad-plus"]
    entry = entries(replace(SHORT, epochs=3))["neggrad-plus"]
    assert (entry.start.recipe.epochs, entry.blind, entry.space["recipe.epochs"].high) == (3, False, 3)
    assert "neggrad-plus" in {each.name for each in everyone("removal")}
    w = world()
    with pytest.raises(ForgetSetAccessed, match="neggrad-plus needs the removed records"):
        unlearn(w.model, w.blind(), neggrad_plus.NegGradPlus())


def test_the_example_has_the_manners_of_our_own(known):
    known()
    import neggrad_plus

    assert [each for each in manners(neggrad_plus.NegGradPlus()) if not each.kept] == []


def test_the_example_forgets_and_without_weight_is_fine_tuning(known):
    known()
    import neggrad_plus

    w = world()

    def loss_after(beta):
        done = unlearn(w.model, w.sighted(), neggrad_plus.NegGradPlus(beta=beta), seed=1).model
        return mean_loss(done, w.forget, cross_entropy)

    before = mean_loss(w.model, w.forget, cross_entropy)
    assert loss_after(0.8) > loss_after(0.95) > max(before, loss_after(1.0))


def test_a_step_of_the_example_follows_the_two_means(known):
    """One batch of everything: the gradient is that of beta times one mean less 1 - beta times the other."""
    known()
    import neggrad_plus

    w = world()
    beta = 0.7
    whole = len(w.retain) + len(w.forget)
    recipe = replace(SHORT, epochs=1, lr=0.01, batch_size=whole, momentum=0.0, weight_decay=0.0, schedule="constant")
    config = neggrad_plus.NegGradPlus(beta=beta, recipe=recipe, loss_bound=100.0)
    done = unlearn(w.model, w.sighted(), config).model
    total = beta * mean_gradient(w, w.retain) - (1 - beta) * mean_gradient(w, w.forget)
    moved = torch.cat([(a - b).flatten() for a, b in zip(done.parameters(), w.model.parameters(), strict=True)])
    # a batch is averaged over all its terms, of which those of what is left make up this share
    assert torch.allclose(moved.double(), -0.01 * total / beta * len(w.retain) / whole, rtol=1e-3, atol=1e-7)


def mean_gradient(w, data):
    found = gradient(w.model, cross_entropy, data)
    return torch.cat([total.flatten() for total in found.total.values()]) / found.count


def test_the_command_tunes_it_and_measures_it_as_the_others(tmp_path):
    """In a process of its own, as a worker is, which finds it by itself."""
    (tmp_path / "mine.py").write_text(EXPERIMENT, encoding="utf-8")
    site = installed(tmp_path / "site")
    paths = os.pathsep.join(map(str, (site, Path.cwd())))
    run = [sys.executable, "-m", "expunge", "bench", "run", "mine.py", "--seeds", "1", "--out", "out"]
    subprocess.run(run, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, check=True, capture_output=True)
    (rows,) = (tmp_path / "out").glob("tiny-cpu-*/rows.csv")
    assert {"mine", "retrain", "original"} <= {row.method for row in read_rows(rows)}


def test_a_trace_has_the_hash_of_the_method_s_file(known, tmp_path, monkeypatch, capsys):
    known()
    import neggrad_plus

    monkeypatch.chdir(tmp_path)
    gone = "def forget():\n    return data.only(torch.arange(6))\n"
    Path("setup.py").write_text(SETUP + gone, encoding="utf-8")
    save_weights(Path("w.safetensors"), load_setup("setup.py").model(0))
    config = neggrad_plus.NegGradPlus(recipe=replace(SHORT, epochs=1))
    own_model.unlearn(Path("setup.py"), config, weights=Path("w.safetensors"), out=Path("u.safetensors"), json=True)
    files = json.loads(capsys.readouterr().out)["provenance"]["files"]
    assert files["method"] == file_hash(tmp_path / "site" / "neggrad_plus.py")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("mine = nowhere_at_all:METHOD", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("mine = neggrad_plus:SPACE", "it is dict, and not an expunge.methods.Method"),
        ("ssd = expunge.methods:METHODS.ssd", "AttributeError"),
    ],
)
def test_one_that_cannot_be_used_is_left_out_with_the_reason(known, line, reason):
    known(line, package="broken")
    with pytest.warns(RuntimeWarning, match=rf"{line.split(' ')[0]} = .* of broken is left out: .*{reason}"):
        assert all_methods() == METHODS


USABLE = """
import sys
from dataclasses import dataclass
from torch import nn
from expunge.access import Blind
from expunge.errors import ConfigError
from expunge.methods import Method
from expunge.space import Range

@dataclass(frozen=True)
class Mine:
    scale: float = 0.5

    def __post_init__(self):
        if self.scale > 1:
            raise ConfigError(f"scale={self.scale}: must be at most 1.")

def mine(model: nn.Module, given: Blind, config: Mine, *, seed, trace) -> nn.Module:
    return model

METHOD = Method("mine", Mine, mine, {"scale": Range(0.1, 0.9)})
"""


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("", "", None),
        ('Method("mine"', 'Method("ssd"', "there is a method of the name 'ssd' already; give it another"),
        ('Method("mine"', 'Method("other"', "its Method has the name 'other'; write the same name in both places"),
        ("scale: float = 0.5", "scale: float", "Give every setting a default"),
        ("scale: float = 0.5", "scale = 0.5", "Mine.scale has no annotation, so it is no setting"),
        ('{"scale"', '{"sclae"', "its search space has 'sclae': .*Name one of scale"),
        ("Range(0.1, 0.9)", "(0.1, 0.9)", "its search space has 'scale': .*give a Range or a Choice"),
        ("Range(0.1, 0.9)", "Range(0.1, 9.0)", r"its search space allows scale=9\.0, which it refuses itself: "),
        ("*, seed, trace", "*, trace", "mine must take .*does not: got an unexpected keyword argument 'seed'"),
        ("import sys", "import sys\nsys.exit(0)", "SystemExit: 0"),
    ],
)
def test_what_would_show_late_is_found_when_a_method_is_loaded(known, tmp_path, recwarn, old, new, reason):
    known("mine = twice:METHOD", package="broken")
    (tmp_path / "site" / "twice.py").write_text(USABLE.replace(old, new), encoding="utf-8")
    assert ("mine" in all_methods()) == (reason is None)
    said = [str(each.message) for each in recwarn if "is left out" in str(each.message)]
    assert re.search(reason, said[0]) if reason else not said


OWN_NAMES = """
from dataclasses import dataclass
from torch import nn
from expunge.access import Blind
from expunge.methods import Method
from expunge.space import Choice, Range
from expunge.training import Recipe

@dataclass(frozen=True)
class Mine:
    k: int = 40
    rounds: int = 3
    epochs: int = 9
    recipe: Recipe = Recipe(epochs=20, lr=0.1)

def mine(model: nn.Module, given: Blind, config: Mine, *, seed, trace) -> nn.Module:
    return model

SPACE = {
    "k": Range(1, 50), "rounds": Choice((3, 4)), "epochs": Range(5, 50), "recipe.epochs": Choice((2, 20)),
}
METHOD = Method("mine", Mine, mine, SPACE)
"""


def test_settings_that_are_called_like_ours_mean_what_their_owner_means(known, tmp_path):
    known("mine = twice:METHOD", package="broken")
    (tmp_path / "site" / "twice.py").write_text(OWN_NAMES, encoding="utf-8")
    found = entries(replace(SHORT, epochs=5), layers=2)["mine"]
    import twice

    assert found.start.recipe.epochs == 5
    assert dict(found.space) == twice.SPACE | {"recipe.epochs": Choice((2,))}  # the budget holds for recipes alone
    assert entries(replace(SHORT, epochs=5), layers=2)["cf-k"].space["k"] == Range(1, 1)


def test_another_space_of_somebody_s_own_method_is_another_search(known, tmp_path):
    known("mine = twice:METHOD", package="broken")
    (tmp_path / "site" / "twice.py").write_text(OWN_NAMES, encoding="utf-8")
    mine = stages.Contender(name="mine", entry="mine")
    search = stages.Stage(step="tune", task=DIGITS, seed=0, contender=mine, effort=BRIEF)
    before = search.key
    import twice

    twice.SPACE["epochs"] = Range(5, 60)  # what imports of the file change, its own hash does not tell
    for each in (stages._entries, stages._key):
        each.cache_clear()
    assert search.key != before


def test_the_search_space_may_hold_only_what_the_settings_take(known, tmp_path):
    known("mine = twice:METHOD", package="broken")
    refusing = USABLE.replace("self.scale > 1", "self.scale > 0.8").replace("raise ConfigError", "raise ValueError")
    (tmp_path / "site" / "twice.py").write_text(refusing, encoding="utf-8")
    with pytest.warns(RuntimeWarning, match=r"is left out: ValueError: scale=0\.9"):
        all_methods()


def test_a_mistake_in_somebody_s_own_method_is_called_theirs(known, tmp_path, monkeypatch, capsys):
    known("mine = twice:METHOD", package="broken")
    broken = USABLE.replace("    return model", "    trace.stages('part')")
    (tmp_path / "site" / "twice.py").write_text(broken, encoding="utf-8")
    import twice

    def command(arguments):
        unlearn(world().model, world().blind(), twice.Mine())

    monkeypatch.setattr(cli, "COMMANDS", {"unlearn": lambda: command(()), "other": lambda: None})
    assert cli.main(["unlearn"]) == 2
    said = capsys.readouterr().err
    assert "twice.py" in said
    assert "AttributeError in your own code or data" in said


def test_who_asks_a_blind_view_for_the_removed_records_is_told_how_to_get_them():
    given = world().blind()
    with pytest.raises(AttributeError, match=r"Blind has no forget. A method that needs .* annotates .* as Sighted"):
        _ = given.forget
    assert not hasattr(given, "retained")


def test_a_method_that_forgets_to_return_the_model_is_told(known, tmp_path):
    known("mine = twice:METHOD", package="broken")
    (tmp_path / "site" / "twice.py").write_text(USABLE.replace("    return model", "    del model"), encoding="utf-8")
    import twice

    with pytest.raises(ConfigError, match="mine returned NoneType, and not the model"):
        unlearn(world().model, world().blind(), twice.Mine())


def test_a_comparison_on_the_digits_leaves_out_who_has_no_settings(known):
    before = config()
    known()
    assert config() == before
    with pytest.raises(ConfigError, match=r"'neggrad-plus' has no settings for .*own-method\.md"):
        config(["neggrad-plus"])


@dataclass
class Changing:
    """Settings that are not frozen."""


def test_a_method_says_what_its_settings_are_and_what_it_may_see():
    row = METHODS["gradient-ascent"]
    with pytest.raises(ConfigError, match=r"method mine: <class .*Changing'> is no frozen dataclass"):
        replace(row, name="mine", config=Changing)

    def unannotated(model, given, config, *, seed, trace):
        return model

    with pytest.raises(
        ConfigError, match=r"the second argument of unannotated is annotated as .* Annotate it as Blind"
    ):
        Method("mine", gradient_ascent.GradientAscent, unannotated, {})


def test_settings_of_nobody_are_refused_with_the_way_to_install_ones_own():
    w = world()
    with pytest.raises(ConfigError, match=r"install your own \(docs/own-method.md\)"):
        unlearn(w.model, w.blind(), Changing())
