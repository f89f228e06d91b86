"""A log of the updates of training, to take back those that removed records took part in.

Source: Graves, Nagisetty and Ganesh, "Amnesiac Machine Learning" (AAAI 2021), amnesiac unlearning proper.
"""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from expunge import params
from expunge.errors import ConfigError, CorruptCache, MismatchError
from expunge.files import save_tensors
from expunge.params import Params
from expunge.training import Step

FORMAT = "expunge-updates"


@dataclass(frozen=True)
class Update:
    """What one step of training did."""

    positions: Int[Tensor, " _"]  # of the examples in its batch
    change: Params  # weights after minus weights before, in the type of the weights


@dataclass
class UpdateLog:
    """The updates of a training whose batches held watched records.

    ``train(model, …, after_step=log)`` with ``log = UpdateLog.of(model, watched)`` fills it; updates are on the CPU.
    Every logged step costs a copy of the weights, in memory and in the file. It is personal data like a gradient cache:
    an update gives its batch away.

    Only weights are logged. BatchNorm's statistics keep what they saw, and so do later updates that followed from
    weights the removed records had moved; a short fine-tuning on what is left mends both.
    """

    weights: Params  # where the log ends
    watched: Int[Tensor, " _"] | None  # positions; steps without any of them are not logged. None: log all
    updates: list[Update] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, watched: Int[Tensor, " _"] | None = None) -> "UpdateLog":
        """An empty log of a model that is about to be trained."""
        return cls(params.snapshot(params.named_parameters(model)), watched)

    @torch.no_grad()
    def __call__(self, step: Step) -> None:
        """Record a step of training, if its batch held a watched record.

        Raises:
            ConfigError: The data has no positions, so that nobody knows whose update it was.
        """
        if step.positions is None:
            raise ConfigError(
                "the data trained on has no positions, so no update can be told from another. Give Examples(x, y), a "
                "Dataset or a DataLoader over one."
            )
        positions = step.positions.cpu()
        held = self.watched is None or bool(torch.isin(positions, self.watched).any())
        moved = [p for group in step.optimizer.param_groups for p in group["params"]]
        if held:
            pairs = zip(self.weights.items(), moved, strict=True)
            self.updates.append(Update(positions, {name: (now - last).cpu() for (name, last), now in pairs}))
        for last, now in zip(self.weights.values(), moved, strict=True):
            last.copy_(now)

    def subtract(self, model: nn.Module, positions: Int[Tensor, " _"]) -> nn.Module:
        """A copy of the trained model without the updates of the batches that held any of these records.

        Sums run in float64: without any of its updates a model is back where training began, to the rounding of the
        changes (nothing in most entries, a few times 1e-8 of the largest change in others, for float32 weights).

        Args:
            model: With the weights the log ends at. For a second deletion, give that model again, and the
                positions of both.
            positions: Of all records to remove.

        Raises:
            ConfigError: Records that were not watched, or that no logged batch held.
            MismatchError: Another model, or other weights than those the log ends at.
        """
        unknown = positions[:0] if self.watched is None else positions[~torch.isin(positions, self.watched)]
        if len(unknown):
            raise ConfigError(
                f"position {int(unknown[0])} was not watched ({len(unknown)} such), so its updates may be missing from "
                "the log. Log training with all records that may have to be removed, or unlearn with another method."
            )
        taken_back = [update for update in self.updates if bool(torch.isin(update.positions, positions).any())]
        seen = [positions[:0], *(update.positions for update in taken_back)]
        never = positions[~torch.isin(positions, torch.cat(seen))]
        if len(never) or not taken_back:
            which = f"position {int(never[0])} ({len(never)} such)" if len(never) else "any record"
            raise ConfigError(
                f"{which} of {len(positions)} was in no batch of the {len(self.updates)} logged updates. Positions "
                "count from 0 in the data that was trained on; is this the log of that training?"
            )
        model = copy.deepcopy(params.plain(model))
        theta = params.named_parameters(model, self.weights)
        params.require_same_names(self.weights, dict(theta), "the log", "the model")
        for name, p in theta.items():
            if not torch.equal(p.detach().cpu(), self.weights[name].cpu()):
                raise MismatchError(
                    f"parameter {name!r} is not what it was when the log ended. Load the weights that training ended "
                    "with, bit for bit; they include updates that are to be taken back."
                )
            change = torch.zeros(p.shape, dtype=torch.float64)
            for update in taken_back:
                change += update.change[name]
            with torch.no_grad():
                p.copy_(p.detach().cpu().double() - change)
        return model

    def save(self, path: Path | str) -> None:
        """Write the log to a safetensors file, whole or not at all.

        Raises:
            OSError: The disk is full, or the folder cannot be written.
        """
        tensors = {f"weights/{name}": value for name, value in self.weights.items()}
        tensors |= {} if self.watched is None else {"watched": self.watched}
        for number, update in enumerate(self.updates):
            tensors[f"positions/{number}"] = update.positions
            tensors |= {f"change/{number}/{name}": value for name, value in update.change.items()}
        save_tensors(path, tensors, _header(tensors, len(self.updates)))

    @classmethod
    def load(cls, path: Path | str) -> "UpdateLog":
        """Read a log.

        Raises:
            FileNotFoundError: No such file.
            CorruptCache: Truncated, altered, or no log of updates.
        """
        if not Path(path).exists():
            raise FileNotFoundError(f"{path}: no such log. Make one with train(…, after_step=log) and log.save().")
        try:
            with safe_open(path, "pt") as file:
                header: dict[str, str] = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        except SafetensorError as error:
            raise CorruptCache(f"{path} cannot be read as safetensors ({error}). Restore it from a copy.") from error
        number = header.get("updates", "")
        count = int(number) if number.isdecimal() else -1
        if header != _header(tensors, count):
            raise CorruptCache(f"{path} is no log of updates, or was altered since. Restore it from a copy.")
        weights = {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
        return cls(
            weights,
            tensors.get("watched"),
            [
                Update(tensors[f"positions/{number}"], {name: tensors[f"change/{number}/{name}"] for name in weights})
                for number in range(count)
            ],
        )


def _header(tensors: dict[str, Tensor], updates: int) -> dict[str, str]:
    fields = {"format": FORMAT, "version": 1, "updates": updates, "checksum": params.fingerprint(tensors)}
    return {name: json.dumps(value) if name != "checksum" else str(value) for name, value in fields.items()}
