"""Chosen settings as a JSON file: `expunge rehearse` writes it and `expunge unlearn --settings` reads it."""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from expunge.errors import ConfigError, CorruptData, MissingData
from expunge.files import write_text
from expunge.methods import method_of
from expunge.space import settings_of, with_settings

# Of "about", by key: what `False` says against the settings.
AGAINST = {
    "holds up": "on the set that they were not tuned on, the settings that were given are better",
    "better than nothing": "on the set that they were not tuned on, they are no better than not unlearning at all",
}


def write_settings(path: Path, config: object, about: Mapping[str, Any]) -> None:
    """Write the settings of a method.

    Args:
        path: Of the file.
        config: The configuration of a method.
        about: Plain values: how the settings were chosen. `False` at a key of `AGAINST` is a warning to who reads it.
    """
    whole = {"method": method_of(config).name, "settings": settings_of(config), "about": dict(about)}
    write_text(path, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")


def read_settings(path: Path, config: Any, warn: Callable[[str], None] = warnings.warn) -> object:
    """The configuration that a file holds; warns if it says that the settings did not stand the test.

    Args:
        path: Of the file.
        config: The configuration of the same method as it is without any settings.
        warn: Called with a warning.

    Raises:
        MissingData: No such file.
        CorruptData: It is no file of settings.
        ConfigError: Settings of another method, settings beside those of the file, or values that the method refuses.
    """
    row = method_of(config)
    name = row.name
    if not path.is_file():
        raise MissingData(f"{path}: no such file of settings. `expunge rehearse` writes one; or leave --settings out.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        method, settings = found["method"], {key: _plain(value) for key, value in found["settings"].items()}
        against = [reason for key, reason in AGAINST.items() if found.get("about", {}).get(key) is False]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptData(
            f"{path} is no file of settings, or damaged ({type(error).__name__}: {error}). `expunge rehearse` "
            "writes one."
        ) from error
    if method != name:
        raise ConfigError(f"{path} holds settings of {method!r}, and this is {name!r}. Name the method {method}.")
    if not row.space:
        raise ConfigError(f"{name} has no settings to choose: leave {path} out, and give its settings by name.")
    if config != row.config():
        raise ConfigError(
            f"settings of {name} were given beside {path}: nobody knows which is meant. Leave them out, or change a "
            "copy of the file."
        )
    try:
        read = with_settings(config, settings)
    except TypeError as error:
        raise ConfigError(f"{path}: {name} cannot use its settings ({error}). Correct the file.") from error
    if against:
        warn(
            f"{path}: these settings did not hold up when they were chosen: {', and '.join(against)}. Rehearse again "
            "(more --sets, --records or --trials), or give settings of your own."
        )
    return read


def _plain(value: Any) -> Any:
    """JSON has no tuples."""
    return tuple(value) if isinstance(value, list) else value
