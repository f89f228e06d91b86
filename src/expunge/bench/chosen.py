"""Chosen settings as a JSON file: `expunge rehearse` writes it and `expunge unlearn --settings` reads it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expunge.errors import ConfigError, CorruptData, MissingData
from expunge.files import write_text
from expunge.methods import METHODS, method_of
from expunge.space import settings_of, with_settings


def write_settings(path: Path, config: object, about: Mapping[str, Any]) -> None:
    """Write the settings of a method.

    Args:
        path: Of the file.
        config: The configuration of a method.
        about: Plain values: how the settings were chosen.
    """
    whole = {"method": method_of(config).name, "settings": settings_of(config), "about": dict(about)}
    write_text(path, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")


def read_settings(path: Path, config: Any) -> object:
    """The configuration that a file holds.

    Args:
        path: Of the file.
        config: The configuration of the same method as it is without any settings.

    Raises:
        MissingData: No such file.
        CorruptData: It is no file of settings.
        ConfigError: Settings of another method, settings beside those of the file, or values that the method refuses.
    """
    name = method_of(config).name
    if not path.is_file():
        raise MissingData(f"{path}: no such file of settings. `expunge rehearse` writes one; or leave --settings out.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        method, settings = found["method"], {key: _plain(value) for key, value in found["settings"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptData(
            f"{path} is no file of settings, or damaged ({type(error).__name__}: {error}). `expunge rehearse` "
            "writes one."
        ) from error
    if method != name:
        raise ConfigError(f"{path} holds settings of {method!r}, and this is {name!r}. Name the method {method}.")
    if not METHODS[name].space:
        raise ConfigError(f"{name} has no settings to choose: leave {path} out, and give its settings by name.")
    if config != METHODS[name].config():
        raise ConfigError(
            f"settings of {name} were given beside {path}: nobody knows which is meant. Leave them out, or change a "
            "copy of the file."
        )
    try:
        return with_settings(config, settings)
    except TypeError as error:
        raise ConfigError(f"{path}: {name} cannot use its settings ({error}). Correct the file.") from error


def _plain(value: Any) -> Any:
    """JSON has no tuples."""
    return tuple(value) if isinstance(value, list) else value
