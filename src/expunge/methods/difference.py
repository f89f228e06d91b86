"""What the removed records contributed to a cached gradient: g_D - g_new."""

from torch import nn

from expunge import params
from expunge.access import Blind
from expunge.errors import NotInformative
from expunge.gradient import Gradient
from expunge.second_pass import second_pass
from expunge.trace import Trace

NOTHING_REMOVED = (
    "Either nothing was removed or corrected since the cache was made, or too little. A cache is made before the "
    "deletion, of all data; one made after it shows nothing of what was removed: retrain then. A correction shows in "
    "float64, with positions kept."
)


def difference(model: nn.Module, given: Blind, trace: Trace) -> tuple[Gradient, Gradient]:
    """The gradient of what was removed, or of the faults less that of their corrections, and of what is left.

    ``trace.facts``: removed_count and cached_count (loss terms), of a cache with groups groups_computed and groups (how
    many were computed again, of how many), relative_noise (predicted relative error of the difference, an upper
    estimate), informative_share (of entries above their rounding floor), compared (micro-batches whose losses tell
    whether model, loss and data are those of the cache).

    Raises:
        NotInformative: It shows nothing of what was removed.
        ConfigError: There is no cached gradient.
        MismatchError: A cache and a retain set that do not belong together.
    """
    full = given.cached()
    retain, computed, looked_at, groups, compared = second_pass(full, model, given.cached_terms, given.retain)
    removed = full - retain
    trace.backwarded += computed
    trace.forwarded += looked_at
    if doubts := full.doubts(retain):
        trace.warn(f"{trace.method}: {doubts}")
    marked = removed.informative()
    share = params.count(marked) / params.size(marked)
    trace.facts |= {
        "removed_count": removed.count,
        "cached_count": full.count,
        "informative_share": share,
        "relative_noise": removed.relative_noise(),
        "compared": compared,
    }
    if full.groups is not None:
        trace.facts |= {"groups_computed": groups, "groups": len(full.groups.totals)}
    if share == 0:
        cure = (
            "Too little was removed to be seen at this precision: delete more records at once, cache in float64, keep "
            "positions with the data."
            if removed.count
            else NOTHING_REMOVED
        )
        raise NotInformative(
            f"the gradient difference of {removed.count} removed terms is below its rounding floor in every entry "
            f"(norm {params.norm(removed.total):.3g}). {cure}"
        )
    return removed, retain
