"""Arguments that commands share."""

from pathlib import Path
from typing import Annotated, TypeVar

import tyro

T = TypeVar("T")
Maybe = Annotated[T | None, tyro.conf.DisallowNone]  # None is said by leaving the option out
SetupFile = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SETUP")]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
