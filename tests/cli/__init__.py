"""A setup file of a small model, and the commands on it."""

from safetensors.torch import save_file

from expunge.cli import main

SETUP = """
import torch
from torch import nn
from expunge import Examples, Recipe, cross_entropy

recipe = Recipe(epochs=3, lr=0.05)
generator = torch.Generator().manual_seed(0)
images, labels = torch.randn(60, 6, generator=generator), torch.randint(3, (60,), generator=generator)
loss_terms = cross_entropy
data = Examples(images, labels)

def model(seed):
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

def original():
    return data

def retain():
    return data.without(torch.arange(6))

def test():
    return Examples(images.flip(0), labels)
"""
RELOAD = ("reload", "--reset-fraction", "0.2", "--fine-tune.epochs", "2", "--fine-tune.lr", "0.05")


def weights_of_nobody(folder):
    names: dict = {}
    exec(SETUP, names)
    save_file(names["model"](0).state_dict(), folder / "start.safetensors")
    return ["setup.py", "--weights", "start.safetensors"]


def cached(*more):
    return main(["cache", "setup.py", "--weights", "w.safetensors", "--out", "c.safetensors", *more])


def unlearned(*more, cache="c.safetensors", weights="w.safetensors", out="u.safetensors"):
    options = ["--cache", cache] if cache else []
    return main(["unlearn", "setup.py", "--weights", weights, *options, "--out", out, *more])
