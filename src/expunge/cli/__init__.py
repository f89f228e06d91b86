"""The command line, a module for each kind of command.

Exit codes: 0 done, 2 a mistake of the user (said on standard error), 1 a mistake of ours (with a traceback), 3 an audit
that found something (a record that can be recovered, an unlearning that should not be done, a trace that is left), or
evidence that does not fit its files, 130 interrupted.
"""

import inspect
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from expunge import losses
from expunge.allocator import keep_freed_memory
from expunge.cli import processes
from expunge.cli.audits import audit
from expunge.cli.bench import bench
from expunge.cli.data import data
from expunge.cli.evaluation import evaluate
from expunge.cli.experiments import compare, demo
from expunge.cli.own_model import cache, show, unlearn
from expunge.cli.reference import explain, methods
from expunge.cli.rehearse import rehearse
from expunge.cli.reports import evidence, report
from expunge.errors import ExpungeError
from expunge.methods import all_methods
from expunge.setup import SETUP

ABOUT = "Remove deleted or corrected training data from a trained PyTorch model, without that data."
COMMANDS: dict[str, Callable[..., Any]] = {
    "cache": cache,
    "rehearse": rehearse,
    "unlearn": unlearn,
    "evaluate": evaluate,
    "report": report,
    "evidence": evidence,
    "show": show,
    "audit": audit,
    "methods": methods,
    "data": data,
    "explain": explain,
    "demo": demo,
    "compare": compare,
    "bench": bench,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    warnings.showwarning = _warn
    if arguments is None:  # the process is ours
        keep_freed_memory()
        arguments = sys.argv[1:]
    try:
        with processes.joined(arguments):
            tyro.extras.subcommand_cli_from_dict(
                COMMANDS,
                prog="expunge",
                description=ABOUT,
                args=arguments,
            )
    except (ExpungeError, OSError) as error:
        return _said(error)
    except KeyboardInterrupt:
        print("expunge: interrupted; every file is either complete or as it was before.", file=sys.stderr)
        return 130
    except SystemExit as stop:  # argument errors and --help
        return stop.code if isinstance(stop.code, int) else 2
    except Exception as error:
        theirs = _frames_of_the_user(error)
        if theirs is not None:
            print("".join(traceback.format_list(theirs)), end="", file=sys.stderr)
            said = "\n".join([str(error), *getattr(error, "__notes__", [])])
            print(f"expunge: {type(error).__name__} in your own code or data: {said}", file=sys.stderr)
            return 2
        traceback.print_exc()
        print("expunge: this is a mistake of ours. Please report it with the lines above.", file=sys.stderr)
        return 1
    return 0


def _said(error: Exception) -> int:
    if isinstance(error, BrokenPipeError):  # whoever read the output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    print(f"expunge: {error}", file=sys.stderr)
    return 2


def _frames_of_the_user(error: Exception) -> list[traceback.FrameSummary] | None:
    """The frames of a setup file, of what it imports, or of somebody's own method, if it came out of one.

    Also if it came out of a loss that the file's data does not fit.
    """
    loaded = [getattr(module, "__file__", None) for name, module in sys.modules.items() if name.startswith(SETUP)]
    loaded += [inspect.getfile(method.run) for method in all_methods().values() if not method.of_expunge]
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if frame.filename in loaded or _is_of_the_user(Path(frame.filename))]
    return theirs if theirs or any(frame.filename == losses.__file__ for frame in frames) else None


def _is_of_the_user(file: Path) -> bool:
    """Whether code is neither ours, Python's nor installed, and in a file (what dataclasses generates is not)."""
    ours = (Path(__file__).parents[1], Path(os.__file__).parent)
    installed = {"site-packages", "dist-packages"} & set(file.parts)
    return file.is_file() and not installed and not any(file.is_relative_to(folder) for folder in ours)


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    print(f"expunge: warning: {message}", file=sys.stderr)
