"""Methods that change training itself, so that a removal can be exact or come with a bound.

Each module has a ``fit``, and what it returns has a ``remove`` and is called like any classifier: it gives logits.
"""

from expunge.exact import certified, graph, sisa

__all__ = ["certified", "graph", "sisa"]
