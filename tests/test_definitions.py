import importlib
import json

import pytest

from expunge.cli import main
from expunge.definitions import ARROWS, METRICS, define, find
from expunge.errors import ConfigError


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_says_what_it_is_and_what_it_misses(metric):
    found = METRICS[metric]
    assert all((found.name, found.text, found.unit, found.formula, found.perfect, found.misses, found.source))
    assert found.good in ARROWS
    assert found.kind in ("value", "distance", "cost")
    assert found.text.endswith(".")
    assert not found.formula.endswith(".")
    if found.function:
        module, name = found.function.rsplit(".", 1)
        assert callable(getattr(importlib.import_module(module), name))


def test_a_metric_without_a_definition_says_so():
    assert (define("ΔX").kind, define("ΔX").good, define("X").good) == ("distance", "low", "unknown")
    assert "without a stored definition" in define("X").text
    assert define("FA") is METRICS["FA"]
    assert define("FSKL, random 10 %") is METRICS["FSKL"]  # as in tables over scenarios


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("FA", "FA"),
        ("ΔFA", "ΔFA"),
        ("delta fa", "ΔFA"),
        ("dfa", "ΔFA"),
        ("dFE", "ΔFE"),
        ("klom", "KLOM"),
        ("u-lira auc", "U-LiRA AUC"),
    ],
)
def test_a_metric_is_found_however_it_is_written(written, meant):
    assert find(written) == meant


def test_an_unknown_metric_is_answered_with_the_closest():
    with pytest.raises(ConfigError, match=r"no metric 'KLON'\. The closest: KLOM"):
        find("KLON")
    with pytest.raises(ConfigError, match="The closest: LiRA AUC, U-LiRA AUC"):
        find("lira")
    with pytest.raises(ConfigError, match="The closest: NA, FA, FE"):
        find("???")


def test_explain_prints_everything_about_a_metric(capsys):
    assert main(["explain", "klom"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    found = METRICS["KLOM"]
    for words in (found.name, found.text, found.formula, found.perfect, found.misses, found.source, found.function):
        assert " ".join(words.split()) in printed
    assert "nats" in printed
    assert "low is good" in printed


def test_explain_without_a_metric_lists_all(capsys):
    assert main(["explain"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in METRICS)


def test_explain_as_json(capsys):
    assert main(["explain", "FA", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unit"] == "%"
    assert main(["explain", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == METRICS.keys()


def test_explain_of_an_unknown_metric_ends_with_2(capsys):
    assert main(["explain", "forgetting"]) == 2
    assert "The closest: Under-forgetting, Over-forgetting" in capsys.readouterr().err
