"""A training that goes on where it was interrupted: its state after an epoch, in a file.

Every epoch draws its randomness from streams of its own, so that weights, buffers and the optimiser's memory are all
the state there is. The same bits come out as without an interruption, on a CPU.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from expunge import distributed, params, sharding
from expunge.batches import Batches, Examples, LossTerms, indexed
from expunge.errors import ConfigError, MismatchError
from expunge.files import require_writable, save_tensors
from expunge.gradient import Origin
from expunge.trace import Trace

_EVERY = 60.0  # seconds between two writings: with an epoch, the most that an interruption costs
_FORMAT = "expunge training 1"
_WEIGHTS, _OPTIMIZER, _LOSSES = "model/", "optimizer/", "losses"


def identity(model: nn.Module, data: Batches, loss_terms: LossTerms, **settings: Any) -> dict[str, Any]:
    """What must be the same for a training to go on, by name: where it began, on what, and how.

    Data in memory is known by its content, other data by its positions: of a `Dataset`, a record that was corrected in
    place goes unnoticed.

    Args:
        model: As it is at the beginning.
        data: All of it.
        loss_terms: The loss.
        **settings: Whatever else matters, as JSON holds it.
    """
    known = indexed(data)
    read = {} if known is None else {"positions": known.positions}
    if isinstance(data, Examples):
        read |= {str(number): tensor for number, tensor in enumerate(data.tensors)}
    origin = Origin.of(model, loss_terms)
    return {
        "weights at the beginning": origin.weights,
        "buffers at the beginning": origin.buffers,
        "loss": origin.loss_terms,
        "data": params.fingerprint(read),
        "parameters to train": sorted(params.named_parameters(model)),
        "number of processes": distributed.world(),
        **settings,
    }


@dataclass
class Resumable:
    """The state of a training, and the file that keeps it.

    Args:
        path: The file; only its owner may read it.
        about: What must be the same for a training to go on, see `identity`.
        model: What is trained.
        optimizer: Of its parameters.
        trace: Of the training.

    Raises:
        ConfigError: The file cannot be written.
    """

    path: Path
    about: Mapping[str, Any]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    trace: Trace

    def __post_init__(self) -> None:
        distributed.by_the_first(lambda: require_writable(self.path))
        self._steps = len(self.trace.losses)  # of what the trace saw before
        self._terms = self.trace.backwarded
        self._begun = self._written = time.perf_counter()
        self._processor = time.process_time()

    def restore(self) -> int:
        """Take the state from the file if there is one.

        ``trace.facts["resumed"]`` says after how many epochs, and how long these took.

        Returns:
            How many epochs are done.

        Raises:
            ConfigError: The file keeps another training, or none.
            MismatchError: Some processes see another file.
        """
        (header, tensors), everyone = distributed.agreed(self._read, lambda read: (read[0].get("epochs", 0),))
        if any(found != everyone[0] for found in everyone):
            raise MismatchError(
                f"{self.path}: of {len(everyone)} processes some see another file, or none. Keep it where all can read."
            )
        if not header:
            return 0
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(tensors[_WEIGHTS + name])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(_OPTIMIZER):
                number, key = name.removeprefix(_OPTIMIZER).split("/")
                state.setdefault(int(number), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.trace.losses += tensors[_LOSSES].tolist()
        self.trace.epoch_ends += [self._steps + end for end in header["epoch_ends"]]
        self.trace.backwarded += header["backwarded"]
        self.trace.facts |= header["facts"]
        before = {name: header[name] for name in ("epochs", "seconds", "processor_seconds")}
        self._begun -= before["seconds"]
        self._processor -= before["processor_seconds"]
        self.trace.count_earlier(before["seconds"])
        self.trace.facts["resumed"] = before
        return int(before["epochs"])

    def keep(self, epochs: int) -> None:
        """Write the state after so many epochs, at most once a minute.

        Raises:
            OSError: The disk is full.
        """
        now = time.perf_counter()
        _, clocks = distributed.agreed(lambda: None, lambda _: (now - self._written,))
        if (clocks[0][0] if clocks else now - self._written) < _EVERY:
            return
        tensors = {_WEIGHTS + name: tensor for name, tensor in self._tensors().items()}
        for number, memory in self.optimizer.state_dict()["state"].items():
            kept = {key: value for key, value in memory.items() if value is not None}
            tensors |= {f"{_OPTIMIZER}{number}/{key}": torch.as_tensor(value) for key, value in kept.items()}
        gathered = sharding.gathered(tensors)
        distributed.by_the_first(lambda: self._write(epochs, gathered))
        self._written = time.perf_counter()

    def _write(self, epochs: int, tensors: dict[str, Tensor]) -> None:
        tensors[_LOSSES] = torch.tensor(self.trace.losses[self._steps :], dtype=torch.float64)
        ends = [end - self._steps for end in self.trace.epoch_ends if end > self._steps]
        facts = {name: fact for name, fact in self.trace.facts.items() if name == "precision"}  # that was measured
        header = {
            "about": self.about,
            "epochs": epochs,
            "epoch_ends": ends,
            "backwarded": self.trace.backwarded - self._terms,
            "facts": facts,
            "seconds": time.perf_counter() - self._begun,
            "processor_seconds": time.process_time() - self._processor,
        }
        save_tensors(self.path, tensors, {_FORMAT: json.dumps(header)})

    def _read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if not self.path.exists():
            return {}, {}
        try:
            with safe_open(self.path, "pt") as file:
                header = json.loads(file.metadata()[_FORMAT])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"resume={str(self.path)!r} is not the state of a training, or damaged ({type(error).__name__}). "
                "Delete it to begin anew, or give another name."
            ) from error
        now = json.loads(json.dumps(self.about))
        other = [name for name in now if header["about"].get(name) != now[name]]
        if other:
            raise ConfigError(
                f"resume={str(self.path)!r} keeps a training after {header['epochs']} epochs with another value of: "
                f"{', '.join(other)}. Delete it to begin anew, or give another name."
            )
        return header, self._own_pieces()

    def _own_pieces(self) -> dict[str, Tensor]:
        """The tensors of the file; of a model in pieces the own ones, so that no process holds more than these."""
        like = {_WEIGHTS + name: tensor for name, tensor in self._tensors().items()}
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        found: dict[str, Tensor] = {}
        with safe_open(self.path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 it is no dictionary
                tensor = file.get_tensor(name)
                number = name.removeprefix(_OPTIMIZER).split("/")[0] if name.startswith(_OPTIMIZER) else ""
                placed = trained[int(number)] if number else like.get(name, tensor)
                same = tensor.shape == placed.shape  # others count steps
                found[name] = sharding.placed_like(tensor, placed) if same else tensor
        return found

    def _tensors(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters()) | dict(self.model.named_buffers())
