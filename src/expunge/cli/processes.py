"""The command line under ``torchrun``: one job over several processes, of which the first one prints."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from expunge import distributed
from expunge.errors import ConfigError

SHARED = ("cache", "unlearn")  # commands whose work is dealt out


def several() -> bool:
    """Whether ``torchrun`` started this process beside others."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined(arguments: Sequence[str]) -> Iterator[None]:
    """Run a command as one of several processes, if that is what this is.

    Raises:
        ConfigError: A command that one process does.
        ProcessFailed: Another process failed or died.
    """
    if not several() or dist.is_initialized() or {"--help", "-h"} & set(arguments):
        yield
        return
    command = next(iter(arguments), "")
    if command not in SHARED:
        raise ConfigError(
            f"{command} runs in one process; {' and '.join(SHARED)} run under torchrun. Leave torchrun out."
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        with contextlib.ExitStack() as stack:
            if distributed.rank():
                silence = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(silence))
            stack.enter_context(distributed.failing_together())
            yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def device() -> str:
    """The GPU of this process, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if several() else "cuda"
