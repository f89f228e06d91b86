"""Bytes on the device's side at the peak of a gradient pass over a transformer of 350 million parameters.

There need be no device: what would be on one is what torch allocates and the sums are not. Every storage that an
operation makes is counted until it is freed (a ``TorchDispatchMode`` with weak references), the model's from the start;
those made while the sums are set up are left out, as they are on the CPU either way. Two batches of one sequence of
16 tokens, float32, so that activations are few. Prints a name and a number a line.

python benchmarks/transformer.py cpu              gradient(accumulate_on="cpu") and cache.save()
python benchmarks/transformer.py bare checkpoint  forward and backward alone; with checkpoint=True, not saved

About a minute of processor time each; 8 GB of memory and 5 GB of disk.
"""

import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from expunge import Examples, cache, gradient
from expunge import accumulator as accumulators
from expunge.losses import causal_lm

WIDTH, DEPTH, HEADS, WORDS, LENGTH = 1024, 24, 16, 47000, 16


class Storages(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, and their peak."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: dict[int, int] = {}
        self.peak, self.ignoring = 0, False
        for p in model.parameters():
            self._watch(p)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._watch(leaf)
        return result

    def leave_out(self, tensor: Tensor) -> None:
        """Do not count this storage."""
        self.alive[tensor.untyped_storage()._cdata] = 0

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        self.alive[key] = 0 if self.ignoring else storage.nbytes()
        weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))


class Model(nn.Module):
    """A causal transformer with tied word embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(DEPTH)
        )
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of every next word."""
        hidden = self.words(input_ids)
        mask = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        logits: Tensor = self.norm(hidden) @ self.words.weight.T
        return logits


def loss_terms(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    """Cross-entropy of each next word."""
    return causal_lm(model, {"input_ids": batch[0], "labels": batch[0]})


def main(names: list[str]) -> None:
    """Measure and print."""
    torch.manual_seed(0)
    model = Model().eval()
    print("entries", sum(p.numel() for p in model.parameters()))
    data = Examples(torch.randint(WORDS, (2, LENGTH)))

    def bare() -> None:
        for part in data.tensors[0].split(1):
            model.zero_grad()
            loss_terms(model, (part,)).sum().backward()
        model.zero_grad()

    def saved(**options: Any) -> Callable[[], None]:
        def work() -> None:
            full = gradient(model, loss_terms, data, micro_batch=1, accumulate_on="cpu", **options)
            if not options:
                with tempfile.TemporaryDirectory() as folder:
                    cache.save(Path(folder) / "cache.safetensors", full, max_shard_bytes=1e9)

        return work

    works = {"bare": bare, "cpu": saved(), "checkpoint": saved(checkpoint=True)}
    for name in names:
        print(name, measured(model, works[name]), flush=True)


def measured(model: nn.Module, work: Callable[[], None]) -> int:
    """Bytes at the peak."""
    counting = Storages(model)
    build = accumulators.Streamed.__init__

    @contextmanager
    def ignoring() -> Iterator[None]:
        counting.ignoring = True
        yield
        counting.ignoring = False

    def unseen(self: accumulators.Streamed, *arguments: Any) -> None:
        with ignoring():
            build(self, *arguments)

    save = cache.save

    def elsewhere(*arguments: Any, **options: Any) -> None:
        with ignoring():  # the file is written from the CPU's side
            save(*arguments, **options)

    on_cpu = mock.patch.object(accumulators.Streamed, "__init__", unseen)
    with on_cpu, mock.patch.object(cache, "save", elsewhere), counting:
        work()
    return counting.peak


if __name__ == "__main__":
    main(sys.argv[1:])
