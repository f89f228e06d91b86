"""An image from the gradient of a convolutional network.

The ratio attack gives the input of the first linear layer, the features. An image is optimised until its features are
those, and from there until its own gradient is the difference. Starting from noise with the gradient alone, as in
Zhu et al. 2019, "Deep Leakage from Gradients", mostly fails, and an audit that tries nothing else lets leaking caches
pass. Source of the first step: Geiping et al. 2020, "Inverting Gradients", on fully connected layers.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from expunge import params
from expunge.audit.finding import Evidence, Finding, Truth, judged, peak_ratio
from expunge.audit.layers import Layer, first_tensor
from expunge.audit.ratio import NO_NEWS, news_of, quotients
from expunge.batches import Batches, micro_batches
from expunge.methods.classifier import embeddings

STARTS, STEPS = 3, (60, 300)  # kept images to start from; L-BFGS steps for the features, then for the gradient
AT_ONCE = 128  # kept images in memory
SAME = 1e-2  # share of the difference's length within which an image's gradient is the difference


def invert(evidence: Evidence, layer: Layer, label: int, spread: float, truth: Truth) -> Finding:
    """Find the image of the one record that was removed.

    Args:
        evidence: One removed record; batches are (inputs, class numbers).
        layer: The first linear layer, with a bias.
        label: The record's class, as the head's gradient tells it.
        spread: How much records differ in what goes into the layer.
        truth: ``forget`` to judge by; without it, the verdict is whether the image's own gradient is the difference.
    """
    attack, place = "features, then inversion", f"the model's input, from {layer.name}"
    rows = quotients(layer, spread)
    if not len(rows):
        words = "The features cannot be read off: no output unit stands far enough above rounding."
        return Finding(attack=attack, place=place, verdict="not shown", words=words)
    model = copy.deepcopy(params.plain(evidence.model)).cpu().double().eval().requires_grad_(True)
    module = dict(model.named_modules())[layer.name]
    features = _features(model, module)
    target = rows[0]
    kept = _kept(evidence.retain, lambda images: (features(images) - target).square().sum(1))
    low, high = kept.low, kept.high
    match = _mismatch(evidence, model, label)
    best, residual = kept.nearest[:1], float("inf")
    for start in (*kept.nearest.unsqueeze(1), kept.mean):
        image = _descend(
            start, lambda x: (features(x) - target).square().mean() / spread**2 + _tidy(x, low, high), STEPS[0]
        )
        image = _descend(image, lambda x: match(x) + 1e-3 * _outside(x, low, high), STEPS[1])
        left = float(match(image).detach()) ** 0.5
        if left < residual:
            best, residual = image, left
        if residual < SAME / 10:
            break
    return _judged(best, kept, evidence.retain, residual, truth, attack, place)


@dataclass(frozen=True)
class _Kept:
    """What is known of kept images without holding them all."""

    nearest: Float[Tensor, "images ..."]  # the nearest `STARTS`, nearest first
    mean: Float[Tensor, "1 ..."]
    spread: float  # root of the mean variance
    low: float  # smallest value, and largest
    high: float


def _images(data: Batches) -> Iterator[Tensor]:
    """The inputs of each batch, float64, at most `AT_ONCE` of them."""
    for _, batch in micro_batches(data, AT_ONCE)[1]:
        for part in first_tensor(batch).split(AT_ONCE):
            yield part.cpu().double()


@torch.no_grad()
def _kept(data: Batches, distances: Callable[[Tensor], Tensor]) -> _Kept:
    """One pass over kept images; moments are merged as in Chan et al. 1979."""
    nearest, apart = torch.empty(0), torch.empty(0, dtype=torch.float64)
    mean, squares, count, low, high = torch.zeros(()), torch.zeros(()), 0, torch.inf, -torch.inf
    for images in _images(data):
        nearest = torch.cat([nearest, images]) if count else images
        apart = torch.cat([apart, distances(images)])
        first = apart.argsort(stable=True)[:STARTS]
        nearest, apart = nearest[first], apart[first]
        own, both = images.mean(0, keepdim=True), count + len(images)
        squares = squares + (images - own).square().sum(0) + (own - mean)[0].square() * count * len(images) / both
        mean, count = mean + (own - mean) * (len(images) / both), both
        low, high = min(low, float(images.min())), max(high, float(images.max()))
    return _Kept(nearest, mean, float((squares / max(count - 1, 1)).mean().sqrt()), low, high)


def _judged(
    best: Tensor, kept: _Kept, retain: Batches, residual: float, truth: Truth, attack: str, place: str
) -> Finding:
    shape, flat = tuple(best.shape[1:]), best.flatten(1).detach()
    numbers = {"unexplained share of the gradient": residual}
    if truth.forget is None:
        verdict = judged(0.0 if residual <= SAME else 1.0)
        words = f"An image was found whose own gradient is the difference but for {residual:.1g} of its length."
        return Finding(
            attack=attack, place=place, verdict=verdict, words=words, numbers=numbers, recovered=flat, shape=shape
        )
    (true, *_) = [first_tensor(batch) for _, batch in micro_batches(truth.forget, 512)[1]]
    true = true[:1].cpu().double().flatten(1)
    error = apart = (flat - true).square().mean(1).sqrt() / kept.spread
    for images in _images(retain):
        error = news_of(error, true, images.flatten(1), kept.spread)
    psnr = float(peak_ratio(flat, true, kept.high - kept.low)[0])
    numbers |= {"PSNR": psnr}
    words = f"The image found is the removed one to {psnr:.0f} dB; {residual:.1g} of the gradient is left unexplained."
    if judged(float(apart[0])) != judged(float(error[0])):
        words += f" That is not counted: {NO_NEWS}"
    return Finding(
        attack=attack,
        place=place,
        verdict=judged(float(error[0])),
        words=words,
        numbers=numbers,
        recovered=flat,
        truth=true,
        shape=shape,
    )


def _descend(start: Tensor, objective: Callable[[Tensor], Tensor], steps: int) -> Tensor:
    """L-BFGS from a start, a bounded number of steps; the start itself if that ends in NaN."""
    image = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([image], max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        value = objective(image)
        (image.grad,) = torch.autograd.grad(value, [image])
        return value.detach()

    optimizer.step(closure)
    found = image.detach()
    return found if bool(found.isfinite().all()) else start


def _mismatch(evidence: Evidence, model: nn.Module, label: int) -> Callable[[Tensor], Tensor]:
    """The squared distance of an image's gradient from the difference, as a share of its squared length."""
    named = params.named_parameters(model, evidence.removed.total)
    wanted = [evidence.removed.total[name].cpu() for name in named]
    length = sum(each.square().sum() for each in wanted)

    def mismatch(image: Tensor) -> Tensor:
        terms = evidence.loss_terms(model, (image, torch.tensor([label])))
        slopes = torch.autograd.grad(terms.sum(), list(named.values()), create_graph=True)
        apart = sum(((a - b).square().sum() for a, b in zip(slopes, wanted, strict=True)), torch.zeros(()))
        return apart / length

    return mismatch


def _features(model: nn.Module, module: nn.Module) -> Callable[[Tensor], Tensor]:
    def features(images: Tensor) -> Tensor:
        with embeddings(module) as seen:
            model(images)
        return seen[0]

    return features


def _tidy(image: Float[Tensor, "1 ..."], low: float, high: float) -> Tensor:
    """A little total variation, and nothing outside the range of kept images."""
    variation = sum((image.diff(dim=dim).square().mean() for dim in range(2, image.ndim)), torch.zeros(()))
    return 1e-4 * variation + _outside(image, low, high)


def _outside(image: Tensor, low: float, high: float) -> Tensor:
    return (image - image.clamp(low, high)).square().mean()
