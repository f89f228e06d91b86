"""Which records are removed: uniformly, within a class, a whole class, or a neighbourhood.

Each function returns positions in ascending order and depends on its arguments alone.
"""

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from expunge.errors import ConfigError, NotFinite
from expunge.seeds import stream

_PIECE = 2**20  # entries widened to float64 at a time, 8 MB


def random_removal(count: int, fraction: float, seed: int) -> Int[Tensor, " removed"]:
    """Positions drawn uniformly from ``range(count)``, ascending: round(fraction x count) of them.

    Raises:
        ConfigError: A fraction that removes nothing or everything.
    """
    removed = _share(fraction, count)
    return torch.randperm(count, generator=stream(seed, "random removal"))[:removed].sort().values


def members(labels: Int[Tensor, " examples"], label: int) -> Int[Tensor, " members"]:
    """Positions of the records of a class, ascending.

    Raises:
        ConfigError: A class that does not occur.
    """
    found = (labels == label).nonzero()[:, 0].cpu()
    if not len(found):
        present = labels.unique().tolist()
        shown = ", ".join(map(str, present[:12])) + (" …" if len(present) > 12 else "")
        raise ConfigError(f"label={label}: no record is of this class. Classes here: {shown or 'none'}.")
    return found


def in_class_removal(
    labels: Int[Tensor, " examples"],
    label: int,
    *,
    count: int | None = None,
    fraction: float | None = None,
    seed: int,
) -> Int[Tensor, " removed"]:
    """Positions drawn uniformly from one class, some of which stays: either ``count``, or a ``fraction`` of the class.

    The paper removes 100 records of a class; its grid also has 10 % and 20 % of one.

    Raises:
        ConfigError: Both sizes or neither, a class that does not occur, or a size that leaves or takes none of it.
    """
    if (count is None) == (fraction is None):
        raise ConfigError(f"count={count}, fraction={fraction}: give one of them, how many or what share of the class.")
    own = members(labels, label)
    removed = count if count is not None else round((fraction or 0.0) * len(own))
    if not 0 < removed < len(own):
        asked = f"count={count}" if count is not None else f"fraction={fraction}"
        raise ConfigError(
            f"{asked} removes {removed} of the {len(own)} records of class {label}: it must leave some and take "
            "some. For the whole class use class_removal()."
        )
    order = torch.randperm(len(own), generator=stream(seed, "in-class removal", label))
    return own[order[:removed]].sort().values


def class_removal(labels: Int[Tensor, " examples"], label: int) -> Int[Tensor, " removed"]:
    """Positions of all records of a class.

    Raises:
        ConfigError: A class that does not occur, or is the only one.
    """
    own = members(labels, label)
    if len(own) == len(labels):
        raise ConfigError(f"all {len(labels)} records are of class {label}: removing it leaves nothing.")
    return own


def neighbour_removal(inputs: Num[Tensor, "examples ..."], fraction: float, seed: int) -> Int[Tensor, " removed"]:
    """A record drawn uniformly and its nearest neighbours: round(fraction x examples) positions with itself.

    The records are correlated, unlike those of a random removal; the paper's grid has 5 %.

    Args:
        inputs: Pixels, or features of a network; neighbours are near in Euclidean distance. Of records at the same
            distance, the one that comes first is nearer.
        fraction: Share of all records that is removed.
        seed: Which record is in the middle.

    Raises:
        ConfigError: A fraction that removes nothing or everything.
        NotFinite: An input is NaN or infinite, so that it has no distance.
    """
    removed = _share(fraction, len(inputs))
    middle = int(torch.randint(len(inputs), (1,), generator=stream(seed, "neighbour removal")))
    distances = _distances(inputs.flatten(1), middle)
    return distances.argsort(stable=True)[:removed].sort().values


def _share(fraction: float, count: int) -> int:
    removed = round(fraction * count)
    if not 0 < removed < count:
        raise ConfigError(
            f"fraction={fraction} of {count} records removes {removed}: it must leave some and take some."
        )
    return removed


def _distances(inputs: Num[Tensor, "examples entries"], middle: int) -> Float[Tensor, " examples"]:
    """Squared, in float64; the record in the middle has -1 and thus comes before its copies."""
    here = inputs[middle].double()
    rows = max(1, _PIECE // max(1, inputs.shape[1]))
    distances = torch.cat([(part.double() - here).square().sum(1) for part in inputs.split(rows)]).cpu()
    if not bool(distances.isfinite().all()):
        first = middle if not bool(here.isfinite().all()) else int((~distances.isfinite()).nonzero()[0])
        raise NotFinite(f"record {first} has an input that is NaN or infinite, so it is near nothing. Look at it.")
    distances[middle] = -1
    return distances
