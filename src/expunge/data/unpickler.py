"""The one place that reads pickles: the Python version of CIFAR is published as such, and as nothing else.

A pickle is a program, and running a stranger's program is what "no pickle" is about. This reader can build
dictionaries, lists, numbers and strings. What a pickle says of an array of bytes is written down, and the array is made
from that afterwards: NumPy itself never answers to the file, since a file may also ask it for an array of objects, with
pointers of its choice. Every other name is refused before it is looked up. Prefer the binary version of CIFAR where you
have the choice; it needs none of this.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from expunge.errors import CorruptData


class _Described:
    """What a pickle says of an array: version, shape, type, order, bytes."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """The array, if it is one of bytes.

        Raises:
            UnpicklingError: It is of another kind, or its parts do not fit together.
        """
        match self.state:
            case (1, tuple(shape), _Bytes(), 0, bytes(raw)) if all(type(side) is int for side in shape):
                return np.frombuffer(raw, dtype=np.uint8).reshape(shape).copy()
        raise pickle.UnpicklingError("it holds an array that is not one of bytes in rows")


class _Bytes:
    """The type of an unsigned byte, whatever more is said of it."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


class _Maker:
    """Answers to the name of a function or type; nothing that a file does changes it."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it would change what reads it")


class _Reconstruct(_Maker):
    __slots__ = ()

    def __call__(self, _kind: object, _shape: object, _code: object) -> _Described:
        return _Described()


class _DType(_Maker):
    __slots__ = ()

    def __call__(self, code: object, *_: object) -> _Bytes:
        if code not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"it holds an array of type {code!r}, not of bytes")
        return _Bytes()


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "numpy", "ndarray":
                return _Maker()
            case "numpy", "dtype":
                return _DType()
            case "numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct":
                return _Reconstruct()
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which data has no use for")


def read_arrays(path: Path) -> dict[bytes, Any]:
    """A dictionary of arrays of bytes, lists, numbers and strings; strings of Python 2 come as bytes.

    Raises:
        CorruptData: The file is damaged, is not a dictionary, or asks for anything else. Nothing in it has run.
    """
    with path.open("rb") as file:
        try:
            content = _ArraysOnly(file, encoding="bytes").load()
            if isinstance(content, dict):
                content = {k: v.array() if isinstance(v, _Described) else v for k, v in content.items()}
        except Exception as error:  # a damaged pickle can raise anything
            raise CorruptData(
                f"{path} is not a file of arrays: {error or type(error).__name__}. Nothing in it was run. Get it again "
                "from the official page, or take the binary version."
            ) from error
    if not isinstance(content, dict):
        raise CorruptData(f"{path} holds a {type(content).__name__}; CIFAR's files hold dictionaries.")
    return content
