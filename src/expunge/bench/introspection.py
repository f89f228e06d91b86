"""What a removed image does inside a network while RELOAD works on it: the numbers of the introspection figure."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from expunge.access import Blind
from expunge.batches import Examples
from expunge.errors import ConfigError, MissingExtra
from expunge.methods.classifier import classifying_layer, embeddings, in_eval_mode
from expunge.methods.reload import Reload
from expunge.report.introspection import Introspection, Step
from expunge.seeds import derive, stream
from expunge.unlearn import unlearn

MOMENTS = {
    "ascend": (3, "after the ascent"),
    "re-initialise": (4, "re-initialised"),
    "fine-tune": (5, "fine-tuned"),
}  # numbered as in Algorithm 1; its step 2 looks at the data and changes nothing
_PERPLEXITY = 30.0


def introspect(
    model: nn.Module, given: Blind, config: Reload, removed: Examples, test: Examples, *, seed: int, records: int = 400
) -> Introspection:
    """Unlearn with RELOAD, and look inside the network at steps 1, 3, 4 and 5.

    Args:
        model: A classifier of images that ends in a linear layer.
        given: What RELOAD may see.
        config: Its settings.
        removed: Removed images, (channels, height, width) each, and their labels; the first is shown.
        test: Images and labels, for the embeddings.
        seed: Of the unlearning, of which test records are taken, and of t-SNE.
        records: How many test records to embed, at most.

    Raises:
        ConfigError: Images of another shape, or too few test records.
        UnsupportedModule: A model whose last layer is not linear.
        MissingExtra: scikit-learn is not installed.
    """
    image, label = removed.tensors[0][:1], int(removed.tensors[1][0])
    if image.ndim != 4:
        raise ConfigError(f"images of shape {tuple(image.shape[1:])}: the figure needs (channels, height, width).")
    if len(test) < 10:
        raise ConfigError(f"{len(test)} test records: an embedding shows nothing of so few. Give at least 10.")
    rows = torch.randperm(len(test), generator=stream(seed, "introspection"))[:records].sort().values
    inputs, labels = (tensor[rows] for tensor in test.tensors)
    layers = convolutions(model)
    steps = []

    def look(number: int, name: str, current: nn.Module) -> None:
        maps, log_probabilities = inside(current, image, layers)
        steps.append(Step(number, name, maps, log_probabilities, embedded(features(current, inputs), seed)))

    def watch(moment: str, current: nn.Module) -> None:
        if moment in MOMENTS:
            look(*MOMENTS[moment], current)

    look(1, "trained", model)
    unlearn(model, given, config, seed=seed, watch=watch)
    return Introspection(_shown(image[0]), label, tuple(layers), tuple(steps), labels.cpu().numpy())


def convolutions(model: nn.Module) -> list[str]:
    """Names of the 1st, 3rd and 5th convolution; of the first three where there are fewer than five."""
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return found[:5:2] if len(found) >= 5 else found[:3]


def inside(
    model: nn.Module, image: Float[Tensor, "1 channels height width"], layers: list[str]
) -> tuple[tuple[Float[np.ndarray, "_ _"], ...], Float[np.ndarray, " classes"]]:
    """For one image: the first channel of what each layer puts out, and the log-probabilities, nats."""
    kept: dict[str, Tensor] = {}
    modules, device = dict(model.named_modules()), next(model.parameters()).device

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, out: Tensor) -> None:  # what a hook returns would take the place of the output
            kept.setdefault(name, out.clone())

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in layers]
    try:
        with in_eval_mode(model), torch.no_grad():
            logits = model(image.to(device)).double()
    finally:
        for handle in handles:
            handle.remove()
    maps = tuple(kept[name][0, 0].cpu().numpy().astype(np.float64) for name in layers)
    return maps, logits.log_softmax(dim=1)[0].cpu().numpy()


def features(model: nn.Module, inputs: Tensor) -> Float[np.ndarray, "records features"]:
    """What goes into the last linear layer, for every input."""
    inputs = inputs.to(next(model.parameters()).device)
    layer = classifying_layer(model, inputs[:2], "the introspection figure")
    with in_eval_mode(model), torch.no_grad(), embeddings(layer) as seen:
        for batch in inputs.split(256):
            model(batch)
    return torch.cat(seen).flatten(1).double().cpu().numpy()


def embedded(points: Float[np.ndarray, "records features"], seed: int) -> Float[np.ndarray, "records 2"]:
    """t-SNE, begun from the two principal components; the same for the same seed.

    Source: van der Maaten and Hinton (2008), as implemented in scikit-learn.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise MissingExtra("t-SNE needs scikit-learn: pip install 'expunge[eval]'.") from error
    perplexity = min(_PERPLEXITY, (len(points) - 1) / 3)
    state = derive(seed, "t-SNE") % 2**32
    result: Float[np.ndarray, "records 2"] = TSNE(
        perplexity=perplexity, init="pca", random_state=state, n_jobs=1
    ).fit_transform(points).astype(np.float64)  # fmt: skip
    return result


def _shown(image: Float[Tensor, "channels height width"]) -> Float[np.ndarray, "height width *colours"]:
    """Between 0 and 1; colours last, or none."""
    values = image.double().cpu().numpy()
    values = (values - values.min()) / max(float(values.max() - values.min()), 1e-12)
    result: Float[np.ndarray, "height width *colours"] = np.moveaxis(values, 0, -1) if len(values) == 3 else values[0]
    return result
