"""One job over several processes: which share is mine, what the others have, and one end for all of them.

Processes are those of `torch.distributed`, usually started by ``torchrun``. Without an initialised process group, or
with one process, everything here is the identity: code above calls it without asking.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from expunge.errors import MismatchError, ProcessFailed

T = TypeVar("T")

_MOST_FACTS = 4
_CAUSE = "expunge/cause"
_TOLD = "Every process of the job was told."
_LOST = (
    "onnection closed",
    "onnection reset",
    "roken pipe",
    "onnection refused",
    "imed out",
)  # gloo, in a RuntimeError


def world() -> int:
    """How many processes work on this together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if world() > 1 else 0


def mine(count: int) -> slice:
    """The rows of a batch that this process takes; all of them where there are too few to deal out.

    Two rows each at least: normalisation in train mode cannot do with one.
    """
    if count < 2 * world():
        return slice(0, count)
    return slice(count * rank() // world(), count * (rank() + 1) // world())


def is_mine(number: int) -> bool:
    """Whether this process takes a batch that stands alone, by its number."""
    return number % world() == rank()


def agreed(work: Callable[[], T], facts: Callable[[T], Sequence[float]]) -> tuple[T, list[list[float]]]:
    """Do the own part of a common step, and learn what the others found in theirs.

    Nobody goes on, into an exchange that would wait forever, unless all can.

    Args:
        work: What may fail on one process alone: reading data, the user's loss.
        facts: Up to four numbers about its result. Not asked for where there is one process.

    Returns:
        The own result, and the facts of all processes in their order.

    Raises:
        ProcessFailed: The work failed elsewhere. Where it failed, its own error is raised.
    """
    if world() == 1:
        return work(), []
    error: Exception | None = None
    try:
        result = work()
        found = [0.0, *map(float, facts(result))]
    except Exception as failure:  # whatever it is, the others have to hear of it
        error, found = failure, [1.0]
    everyone = _gathered(found, _MOST_FACTS + 1)
    if any(failed for failed, *_ in everyone):
        tell(error)
    return result, [each[1 : len(found)] for each in everyone]


def tell(error: Exception | None) -> NoReturn:
    """End on every process, after each has said what went wrong with it; all of them call this.

    Raises:
        ProcessFailed: Where nothing went wrong. Elsewhere its own error is raised.
    """
    said = [bytes(map(round, each)).decode() for each in _gathered(list(map(float, _named(error).encode())))]
    if error is not None:
        error.add_note(_TOLD)
        raise error
    raise ProcessFailed(
        "; ".join(f"process {number} of {world()} failed with {cause}" for number, cause in enumerate(said) if cause)
    )


def by_the_first(work: Callable[[], object]) -> None:
    """Something that one process does for all, such as to write a file; the others wait for it.

    Raises:
        ProcessFailed: It failed there.
    """
    agreed(lambda: work() if rank() == 0 else None, lambda _: ())


def is_known(error: Exception) -> bool:
    """Whether every process was told of this error."""
    return isinstance(error, ProcessFailed) or _TOLD in getattr(error, "__notes__", ())


def reading(batches: Iterable[T]) -> Iterator[T]:
    """The own batches, read in step with the others.

    Raises:
        MismatchError: The data ends sooner on one process than on another.
        ProcessFailed: Reading failed elsewhere.
    """
    if world() == 1:
        yield from batches
        return
    own = iter(batches)
    while True:
        batch, going_on = agreed(lambda: next(own, None), lambda found: (found is not None,))
        if not all(on for (on,) in going_on):
            break
        assert batch is not None
        yield batch
    if any(on for (on,) in going_on):
        raise MismatchError(
            f"the data has more batches on some of {world()} processes than on others. Every process names the same "
            "data in the same order: no DistributedSampler, no share of one's own."
        )


def names() -> tuple[str | int, ...]:
    """What tells the randomness of this process from that of others, as names of a stream; none if it is alone."""
    return ("process", rank()) if world() > 1 else ()


@contextmanager
def failing_together() -> Iterator[None]:
    """Around a call: if a process fails inside, or dies, the others end with its cause instead of waiting for it.

    Raises:
        ProcessFailed: The connection to another process was lost.
    """
    if world() == 1:
        yield
        return
    try:
        yield
    except Exception as error:
        if is_known(error):
            raise
        # Of errors by gloo itself: a data server may time out, too, and of that the others must hear.
        gloo = type(error) is RuntimeError and any(sign in str(error) for sign in _LOST)
        if isinstance(error, dist.DistError) or gloo:
            cause = _cause() or "without a word (killed, or out of memory)"
            raise ProcessFailed(
                f"another of the {world()} processes ended: {cause}. Nothing was written; start the job again once "
                "the cause is gone."
            ) from error
        _leave(_named(error))
        raise


def require_alike(what: str, own: str) -> None:
    """Refuse a job whose processes do not work on the same.

    Args:
        what: Its name, for the message.
        own: A description or a digest of it.

    Raises:
        MismatchError: Some process has another.
    """
    if world() == 1:
        return
    digest = hashlib.sha256(own.encode()).digest()
    halves = [float(int.from_bytes(digest[i : i + 6], "big")) for i in (0, 6)]  # exact in float64
    for other, theirs in enumerate(_gathered(halves)):
        if theirs != halves:
            raise MismatchError(
                f"process {other} of {world()} has other {what} than process {rank()}. Every process builds the same "
                "model and names the same data; the library deals the work out."
            )


@torch.no_grad()
def same_buffers(model: nn.Module) -> None:
    """Give every process the buffers of the first, running statistics above all."""
    if world() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def mean_of_all(terms: Callable[[], Tensor], in_step: bool) -> tuple[Tensor, Tensor, int]:
    """The mean over the loss terms that the processes compute from their rows of a batch.

    Args:
        terms: Computes the own ones.
        in_step: Whether that takes all processes; if it fails on one, the others end with it.

    Returns:
        What to back-propagate, such that the average over processes is the gradient of the mean; the mean; and the
        number of terms. Where there is none at all there is nothing to follow: the mean is not a number.
    """
    done = terms() if in_step else None
    own, facts = agreed(
        terms if done is None else lambda: done, lambda found: (len(found), float(found.detach().double().sum()))
    )
    if not facts:
        loss = own.mean()
        return loss, loss.detach(), len(own)
    count, total = (sum(column) for column in zip(*facts, strict=True))
    mean = torch.tensor(total / count if count else float("nan"), dtype=own.dtype)
    return own.sum() * (world() / max(count, 1)), mean, round(count)


def counts(own: Iterable[int]) -> list[list[int]]:
    """Whole numbers of every process, in their order."""
    return [list(map(round, each)) for each in _gathered([float(number) for number in own])]


def summed(own: Sequence[float]) -> list[float]:
    """Numbers added up over all processes, one by one."""
    return [math.fsum(column) for column in zip(*_gathered(list(map(float, own))), strict=True)]


def added(own: Tensor) -> Tensor:
    """A tensor of all processes added up, entry by entry; it is changed."""
    if world() > 1:
        dist.all_reduce(own)
    return own


def joined(own: Tensor) -> Tensor:
    """One-dimensional tensors of all processes, one behind the other; their lengths may differ."""
    if world() == 1:
        return own
    device = _device()
    lengths = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(world())]
    dist.all_gather(lengths, torch.tensor(len(own), device=device))
    padded = own.new_zeros(max(int(length) for length in lengths), device=device)
    padded[: len(own)] = own
    everyone = [torch.empty_like(padded) for _ in range(world())]
    dist.all_gather(everyone, padded)
    return torch.cat([each[: int(length)] for each, length in zip(everyone, lengths, strict=True)]).to(own.device)


def merged(numbered: Mapping[int, Sequence[float]]) -> dict[int, list[float]]:
    """What each process found out about its own micro-batches, put together and sorted by their numbers."""
    if world() == 1:
        return {number: list(found) for number, found in sorted(numbered.items())}
    rows = [[float(number), *found] for number, found in numbered.items()]
    longest = max(each[0] for each in counts([len(rows)]))
    width = max(each[0] for each in counts([len(rows[0]) if rows else 0]))
    padding = [[-1.0] * width] * (longest - len(rows))
    flat = [value for row in rows + padding for value in row]
    everyone = [each[i : i + width] for each in _gathered(flat) for i in range(0, len(each), width)] if width else []
    return {round(row[0]): row[1:] for row in sorted(everyone) if row[0] >= 0}


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _gathered(found: list[float], most: int | None = None) -> list[list[float]]:
    """A list of float64 numbers of every process; padded with zeros to ``most`` if that is given."""
    if world() == 1:
        return [found]
    device = _device()
    lengths = [most] * world() if most is not None else _lengths(len(found), device)
    padded = torch.tensor(found + [0.0] * (max(lengths) - len(found)), dtype=torch.float64, device=device)
    everyone = [torch.empty_like(padded) for _ in range(world())]
    dist.all_gather(everyone, padded)
    return [each.tolist()[:length] for each, length in zip(everyone, lengths, strict=True)]


def _lengths(length: int, device: torch.device) -> list[int]:
    own = torch.tensor([length], device=device)
    everyone = [torch.empty_like(own) for _ in range(world())]
    dist.all_gather(everyone, own)
    return [int(each) for each in everyone]


def _named(error: Exception | None) -> str:
    return "" if error is None else f"{type(error).__name__}: {error}"


def _leave(cause: str) -> None:
    """Write a cause where the others find it, unless one is there already."""
    with suppress(Exception):  # the store may have gone with its process; the error itself is what counts
        dist.distributed_c10d._get_default_store().compare_set(_CAUSE, "", f"process {rank()} failed with {cause}")


def _cause() -> str:
    try:
        store = dist.distributed_c10d._get_default_store()
        return bytes(store.get(_CAUSE)).decode() if store.check([_CAUSE]) else ""
    except Exception:  # gone with the process that held it
        return ""
