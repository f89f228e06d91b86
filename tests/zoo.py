"""Tiny models and data that the tests of the core share."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset, TensorDataset

from expunge.batches import Examples

FEATURES, CLASSES = 5, 3
NETWORKS = ("mlp", "batch-norm", "dropout", "tied", "frozen")
FORMS = ("examples", "dataset", "subset of a subset", "loader", "batches")


class Tied(nn.Module):
    """Two layers that share one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, FEATURES)
        self.second = nn.Linear(FEATURES, FEATURES)
        self.second.weight = self.first.weight
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.second(self.first(inputs).tanh()).tanh())


def network(kind: str, seed: int = 0) -> nn.Module:
    """A float64 classifier of FEATURES numbers, with moved BatchNorm statistics where it has them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "tied":
            return Tied().double()
        middle = {"batch-norm": nn.BatchNorm1d(6), "dropout": nn.Dropout(0.5)}.get(kind, nn.Identity())
        model = nn.Sequential(nn.Linear(FEATURES, 6), middle, nn.Tanh(), nn.Linear(6, CLASSES)).double()
        model(3 * torch.randn(50, FEATURES, dtype=torch.float64) + 1)  # moves the statistics
        if kind == "frozen":
            model[0].weight.requires_grad_(False)
        return model


def tensors(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs and class numbers."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(CLASSES, (count,), generator=generator)


def classification(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Examples:
    """The same as Examples."""
    return Examples(*tensors(count, seed, dtype))


def in_form(form: str, data: tuple[Tensor, Tensor], positions: Tensor, batch: int) -> object:
    """The records at these positions, as each kind of data that gradient() takes."""
    if form == "examples":
        return Examples(*data).only(positions)
    if form == "batches":
        return [tuple(tensor[rows] for tensor in data) for rows in positions.split(batch)]
    reversed_ = TensorDataset(*(tensor.flip(0) for tensor in data))
    whole = Subset(reversed_, list(reversed(range(len(reversed_)))))  # positions here are not positions there
    if form == "subset of a subset":
        return Subset(whole, positions.tolist())
    subset = Subset(TensorDataset(*data), positions.tolist())
    return DataLoader(subset, batch_size=batch, shuffle=True) if form == "loader" else subset


def summed_by_autograd(model: nn.Module, names: list[str], data: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The gradient of the summed cross-entropy in eval mode, without the library."""
    named = dict(model.named_parameters())
    model.eval()
    for name in names:
        named[name].requires_grad_(True)
    loss = functional.cross_entropy(model(data[0]), data[1], reduction="sum")
    return dict(zip(names, torch.autograd.grad(loss, [named[name] for name in names]), strict=True))


def flat(params: dict[str, Tensor]) -> Tensor:
    """All entries as one float64 vector, ordered by name."""
    return torch.cat([params[name].flatten().double() for name in sorted(params)])
