"""Train a network on 500 handwritten digits with a plain loop; nothing of expunge is needed to train."""

import torch
from safetensors.torch import save_file
from setup import RECORDS, TRAINED, model
from sklearn.datasets import load_digits
from torch.nn import functional

EPOCHS = 40


def main() -> None:
    """Write records.safetensors and model.safetensors into the current folder."""
    torch.set_num_threads(1)
    digits = load_digits()
    images = torch.from_numpy(digits.images[:TRAINED]).float() / 16
    labels = torch.from_numpy(digits.target[:TRAINED]).long()
    network = model(seed=0).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(TRAINED).split(50):
            optimizer.zero_grad()
            functional.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
    network.eval()
    print(f"training accuracy {(network(images).argmax(1) == labels).float().mean():.1%}")
    save_file({"images": images, "labels": labels, "positions": torch.arange(TRAINED)}, RECORDS)
    save_file(network.state_dict(), "model.safetensors")


if __name__ == "__main__":
    main()
