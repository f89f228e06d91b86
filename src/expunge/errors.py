"""Every error a user can cause: the value, the reason, the cure.

Each class is also the built-in exception a caller would expect, so ``except ValueError`` keeps working.
"""


class ExpungeError(Exception):
    """Base of all errors raised for something the caller can change."""


class ConfigError(ExpungeError, ValueError):
    """A setting or an argument that cannot work."""


class MismatchError(ExpungeError, ValueError):
    """Two things that must belong together do not: names, shapes, counts, fingerprints."""


class CorruptCache(ExpungeError, ValueError):
    """A gradient cache that is damaged, truncated, or was never one."""


class MissingData(ExpungeError, FileNotFoundError):
    """A file of a dataset that is not where it was looked for, or could not be downloaded."""


class CorruptData(ExpungeError, ValueError):
    """A file that is damaged, truncated, or something else than it should be."""


class NotFinite(ExpungeError, FloatingPointError):
    """A NaN or an infinity in the weights, a loss, a gradient or a score."""


class NonDeterministicLoss(ExpungeError, RuntimeError):
    """The same data gives two different losses, so a difference of gradients would mean nothing."""


class NotInformative(ExpungeError, RuntimeError):
    """The gradient difference is below its rounding floor: what was removed cannot be seen in it."""


class OutOfMemory(ExpungeError, MemoryError):
    """A single example that does not fit in memory."""


class UnsupportedModule(ExpungeError, TypeError):
    """A model that a method cannot work on."""


class ForgetSetAccessed(ExpungeError, PermissionError):
    """A method asked for data it was not given, or must not see."""


class MissingExtra(ExpungeError, ImportError):
    """An optional dependency that this call needs is not installed."""


class IncompleteRun(ExpungeError, RuntimeError):
    """A run that did not finish, or whose folder lacks a part."""


class ProcessFailed(ExpungeError, RuntimeError):
    """Another process of the same job failed or died."""
