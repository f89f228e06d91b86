"""The one place that reads pickles: the Python version of CIFAR is published as such, and as nothing else.

A pickle is a program, and running a stranger's program is what "no pickle" is about. This reader can build
dictionaries, lists, numbers, strings and NumPy arrays. Every other name that a file asks for is refused before it is
looked up, so nothing in the file can run. The names it knows are a function and two types that NumPy has in C, which a
pickle cannot change either. Prefer the binary version of CIFAR where you have the choice; it needs none of this.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core import multiarray

from expunge.errors import CorruptData

_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): multiarray._reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): multiarray._reconstruct,
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which data has no use for") from None


def read_arrays(path: Path) -> dict[bytes, Any]:
    """A dictionary of arrays, lists, numbers and strings; strings of Python 2 come as bytes.

    Raises:
        CorruptData: The file is damaged, is not a dictionary, or asks for anything but arrays. Nothing in it has run.
    """
    with path.open("rb") as file:
        try:
            content = _ArraysOnly(file, encoding="bytes").load()
        except Exception as error:  # a damaged pickle can raise anything
            raise CorruptData(
                f"{path} is not a file of arrays: {error or type(error).__name__}. Nothing in it was run. Get it again "
                "from the official page, or take the binary version."
            ) from error
    if not isinstance(content, dict):
        raise CorruptData(f"{path} holds a {type(content).__name__}; CIFAR's files hold dictionaries.")
    return content
