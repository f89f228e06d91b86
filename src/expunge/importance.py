"""`Importance`: how much the loss on some data depends on each weight, as a sum of squared gradients.

It is data only; ``methods/ssd.py`` measures it. Like a `Gradient` it is a sum, belongs to the weights it was taken at,
and can be kept from the end of training until records are deleted.
"""

from dataclasses import dataclass
from typing import Literal

from expunge import params
from expunge.errors import MismatchError
from expunge.gradient import Origin
from expunge.params import Params

Squares = Literal["records", "batch-means"]


@dataclass(frozen=True)
class Importance:
    """The diagonal of the empirical Fisher information, times the number of records (or batches)."""

    total: Params  # sum of squared gradients
    count: int  # how many were squared
    squares: Squares  # what was squared: the gradient of every record, or the mean gradient of every batch
    batch_size: int  # examples a batch-mean, for data with positions
    origin: Origin  # the point it was taken at

    def mean(self) -> Params:
        """A record's, or a batch's."""
        return {name: total / self.count for name, total in self.total.items()}

    def require_like(self, part: "Importance") -> None:
        """Refuse an importance of something else than a part of the data of this one, at the same weights.

        Raises:
            MismatchError: Another origin or other parameters, something else that was squared, or more of it.
        """
        self.origin.require(part.origin, "the importance of all data")
        params.require_same_names(self.total, part.total, "the importance of all data", "that of the removed records")
        mine, theirs = (_described(each) for each in (self, part))
        if mine != theirs:
            raise MismatchError(
                f"the importance of all data is of {mine}, and {theirs} are asked for. Take it again with the same "
                "settings, importance(…, squares=…, batch_size=…), or give SSD those it was taken with."
            )
        if part.count > self.count:
            raise MismatchError(
                f"the removed records have {part.count} squared gradients, and all data had {self.count}. A part "
                "cannot be more than the whole: give the importance of all data, removed records included."
            )

    def __add__(self, other: "Importance") -> "Importance":
        """Of both sets of data together."""
        total = {name: own + other.total[name] for name, own in self.total.items()}
        return Importance(total, self.count + other.count, self.squares, self.batch_size, self.origin)


def _described(importance: Importance) -> str:
    if importance.squares == "records":
        return "squares='records'"
    return f"squares={importance.squares!r}, batch_size={importance.batch_size}"
