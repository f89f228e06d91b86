"""What cannot work is refused where it is written down, before anything runs."""

import difflib
from collections.abc import Iterable
from typing import Any

from expunge.errors import ConfigError


def require(holds: bool, name: str, value: object, cure: str) -> None:
    """Refuse a value.

    Args:
        holds: Whether it can work.
        name: Of the field.
        value: Of the field.
        cure: What to write instead.

    Raises:
        ConfigError: It cannot.
    """
    if not holds:
        raise ConfigError(f"{name}={value!r}: {cure}.")


def is_whole(value: object, least: int) -> bool:
    """Whether it is a whole number of at least that much."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def require_settings(settings: Any) -> None:
    """Settings are pairs of a name and a plain value, because a stage travels as text and is named by a hash of them.

    Raises:
        ConfigError: They are something else.
    """
    pairs = isinstance(settings, tuple) and all(isinstance(each, tuple) and len(each) == 2 for each in settings)
    require(pairs, "settings", settings, 'write pairs: (("name", value),), with the comma at the end')
    names = [name for name, _ in settings]
    require(all(isinstance(name, str) for name in names), "settings", settings, "the first of each pair is a name")
    require(len(set(names)) == len(names), "settings", settings, "give every setting once")
    for name, value in settings:
        require(_is_plain(value), name, value, "give a number, a text, None, or a tuple of these")


def nearest(name: str, known: Iterable[str]) -> str:
    """The question for the known name that looks like it, with a space in front; "" if none does."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f" Is it {found[0]!r}?" if found else ""


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
