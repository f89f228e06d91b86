"""The file of settings that a rehearsal writes and `unlearn` reads."""

import pytest

from expunge import Recipe, Reload
from expunge.bench import chosen
from expunge.errors import ConfigError, CorruptData
from expunge.space import settings_of, with_settings


def test_settings_survive_their_file(tmp_path):
    config = Reload(
        priming_lr=None,
        published_code=("normal-1d",),
        fine_tune=Recipe(epochs=3, lr=0.2, schedule="step", milestones=(1, 2)),
    )
    chosen.write_settings(tmp_path / "s.json", config, {"why": "test"})
    assert chosen.read_settings(tmp_path / "s.json", Reload()) == config
    assert with_settings(Reload(), settings_of(config)) == config


def test_settings_that_held_up_are_read_without_a_warning(tmp_path, recwarn):
    for about in ({"holds up": True, "better than nothing": True}, {}):
        chosen.write_settings(tmp_path / "s.json", Reload(), about)
        assert chosen.read_settings(tmp_path / "s.json", Reload()) == Reload()
    assert not recwarn.list


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
