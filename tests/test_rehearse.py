"""`expunge rehearse`: what it searches, keeps and says, and what it refuses."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import save_file

from expunge import gradient, second_pass
from expunge.bench import closeness, rehearsal, tuning
from expunge.bench.closeness import Score
from expunge.bench.tuning import Trial
from expunge.cli import main
from expunge.cli.rehearsed import verdicts
from expunge.errors import NotFinite
from expunge.methods import METHODS
from expunge.provenance import file_hash
from tests.rehearsing import SETUP, facts

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


def rehearsed(*more, cache=True, method=RELOAD):
    options = ["--cache", "c.safetensors"] if cache else []
    return main(["rehearse", "setup.py", "--weights", "w.safetensors", *options, *more, *method])


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
    assert re.search(r"tuned on . forgetting . usefulness . points lost . held out", out)
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


def test_sets_are_of_the_classes_that_the_cache_tells_were_removed(folder, capsys):
    edited("without(torch.arange(6))", "without(torch.arange(0, 24, 3))")  # eight of class 0
    more = ("--like", "removed", "--may-lose", "0.5")
    assert rehearsed("--trials", "1", "--sets", "2", *more) == 0
    out = capsys.readouterr().out
    stored = json.loads(Path("settings.json").read_text(encoding="utf-8"))["about"]
    assert stored["may_lose"] == 0.5
    assert "removed" not in stored  # the settings outlive the cache
    assert re.match(r"removed, as the cache tells: class 0: [5678]", out)  # an estimate
    assert re.search(r"2 pseudo-forget sets of [4567] records, of 8 asked for, against test", out)  # 12 are left, for 3
    assert rehearsed("--trials", "1", "--sets", "2", "--like", "removed", "--replace") == 2
    assert "may_lose" in capsys.readouterr().err  # another search


def test_a_class_that_went_whole_is_not_rehearsed_on_others(folder, capsys):
    edited("without(torch.arange(6))", "without(torch.arange(0, 60, 3))")
    assert rehearsed("--trials", "1", "--sets", "2", "--like", "removed") == 2
    error = capsys.readouterr().err
    assert re.search(r"no record of class 0\. Was a whole class removed\? .*--like class --retrain 2", error)


def test_a_search_in_which_all_settings_lose_too_much_says_so(folder, capsys):
    wreck = ("reload", "--priming-lr", "1000000", "--fine-tune.epochs", "1", "--fine-tune.lr", "1e-6")
    assert rehearsed("--trials", "1", "--sets", "2", method=wreck) == 0
    assert re.search(r"All settings lose too much of what is left, these \d+\.\d points", capsys.readouterr().out)


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
    assert "reset_fraction=0.8 is at an end of what was searched, 0.05 to 0.8: a value beyond it may be better" in out
    assert "fine_tune.lr=1e-05 is at" not in out  # outside of what is searched: a setting of one's own
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
    story = command.split()[command.split().index("--out") + 1].replace(".safetensors", ".trace.json")
    assert "did not hold up" in json.loads(Path(story).read_text(encoding="utf-8"))["warnings"][0]


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
    found = verdicts(scores)
    assert found == {"holds up": holds, "better than nothing": better}


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
        (18, r"It would take --records 18, and retain\(\) has no 3 sets of so many: .*--retrain 3"),
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
        (["--may-lose", "1"], r"may_lose=1.0: give a share of what is left"),
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
    edited("def test():", "def test():\n    return retain()\n\ndef tested():")
    assert rehearsed("--trials", "1", "--sets", "2", "--out", "other.json") == 0
    assert "54 of 54 records of test() are in retain() as well" in capsys.readouterr().err
    edited("def test():", "def testing():")
    assert rehearsed("--trials", "1") == 2
    assert "the setup file defines no test()" in capsys.readouterr().err
    edited("recipe = ", "recipes = ")
    assert rehearsed("--trials", "1", "--retrain", "2") == 2
    assert "retrain=2: the setup file defines no recipe" in capsys.readouterr().err
    edited("recipes = Recipe(epochs=4, lr=0.1, batch_size=16)", "recipe = 4")
    assert rehearsed("--trials", "1", "--retrain", "2") == 2
    assert "recipe is a int. Write expunge.Recipe" in capsys.readouterr().err


def test_without_a_cache_the_number_of_records_is_needed(folder, capsys):
    assert rehearsed("--like", "removed", "--records", "6", cache=False) == 2
    assert "like='removed': it is the cache that tells the classes" in capsys.readouterr().err
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
    said = capsys.readouterr().err
    assert "nothing was removed yet: then say how many records" in said
    assert "Or the cache was made after the deletion: no blind method can use it, nor settings for one" in said


def test_terms_of_a_loss_are_counted_in_records_and_labels_are_one_a_record(folder, capsys):
    edited(
        "def test():",
        "def loss_terms(model, batch):\n    return cross_entropy(model, batch).repeat(2)\n\ndef test():",
    )
    Path("c.safetensors").unlink()
    assert main(["cache", "setup.py", "--weights", "w.safetensors", "--out", "c.safetensors"]) == 0
    assert rehearsed("--trials", "1", "--sets", "2") == 0
    assert "2 pseudo-forget sets of 6 records" in capsys.readouterr().out  # and not 12, as the cache has terms
    edited(
        "def test():",
        "def logits(model, batch):\n    return model(batch[0]).repeat(2, 1), batch[1].repeat(2)\n\ndef test():",
    )
    assert rehearsed("--trials", "1", "--sets", "2", "--replace") == 2
    assert "logits() returned 108 labels for the 54 records of retain(), and a rehearsal" in capsys.readouterr().err


@pytest.mark.parametrize("method", [("scrub",), ("retrain",)])
def test_a_method_that_cannot_be_rehearsed_is_refused(method, folder, capsys):
    assert rehearsed(method=method) == 2
    said = capsys.readouterr()
    wrapped = "".join((said.out + said.err).replace("│", " ").split())
    assert "Availablesubcommands:reload,orthogonal-ascent,class-orthogonal-ascent,natural-ascent,fine-tune" in wrapped


def test_settings_are_not_written_over(folder, capsys):
    Path("settings.json").write_text("{}", encoding="utf-8")
    assert rehearsed() == 2
    assert "settings.json exists" in capsys.readouterr().err
    before = Path("w.safetensors").read_bytes()
    assert rehearsed("--out", "w.safetensors", "--replace") == 2
    assert "w.safetensors is read by this command" in capsys.readouterr().err
    assert Path("w.safetensors").read_bytes() == before


def test_settings_are_tried_with_a_loop_of_ones_own(folder):
    loop = '\n\ndef train_further(model, data, recipe, seed):\n    print(recipe.lr, file=open("calls.txt", "a"))\n'
    setup = Path("setup.py")
    setup.write_text(setup.read_text(encoding="utf-8") + loop, encoding="utf-8")
    assert rehearsed("--trials", "2", "--sets", "2") == 0
    tried = Path("calls.txt").read_text(encoding="utf-8").split()
    assert len(set(tried)) == 2  # learning rates of two trials


def test_any_blind_method_can_be_rehearsed(folder):
    assert rehearsed("--trials", "1", "--sets", "2", method=("fine-tune", "--recipe.epochs", "1")) == 0
    assert json.loads(Path("settings.json").read_text(encoding="utf-8"))["method"] == "fine-tune"
