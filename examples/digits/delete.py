"""Delete records by position: `python delete.py 3 14 159`. What is left keeps its positions."""

import sys

import torch
from safetensors.torch import load_file, save_file
from setup import RECORDS


def main(positions: list[int]) -> None:
    """Rewrite the records without these."""
    stored = load_file(RECORDS)
    unknown = set(positions) - set(stored["positions"].tolist())
    if unknown:
        sys.exit(f"no records at positions {sorted(unknown)}; nothing was deleted")
    left = ~torch.isin(stored["positions"], torch.tensor(positions))
    save_file({name: tensor[left] for name, tensor in stored.items()}, RECORDS)
    print(f"{int((~left).sum())} records deleted, {int(left.sum())} left")


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
