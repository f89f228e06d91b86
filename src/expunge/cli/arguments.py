"""Arguments that commands share."""

from pathlib import Path
from typing import Annotated

import tyro

SetupFile = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SETUP")]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
