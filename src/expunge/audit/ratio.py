"""Reading the input of a linear layer off its gradient.

A linear layer's gradient is dW = Σ δ xᵀ and db = Σ δ over the removed records, so for one record every row of dW is x
times a number, and that number is in db: x = dW_i / db_i for each output unit i. Without the bias the rows are still
proportional to x. With several records a row is a mixture, unless a unit was active for one of them only, which
happens with ReLU. Source: Phong et al. 2018, "Privacy-Preserving Deep Learning via Additively Homomorphic Encryption".
"""

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.audit.finding import Finding, judged, peak_ratio
from expunge.audit.layers import Inputs, Layer

ROWS = 256  # that are compared with each other
AGREE = 0.1  # of the spread: two rows that differ by less show the same record
NO_NEWS = "what is left holds records as near, as after a correction of labels alone, so that nothing new is shown."


def quotients(layer: Layer, spread: float) -> Float[Tensor, "rows inputs"]:
    """dW_i / db_i of the units that rounding leaves accurate to a tenth of how much records differ, best first."""
    assert layer.bias is not None
    assert layer.bias_floor is not None
    values = layer.weight / layer.bias[:, None]
    size = layer.bias.abs()
    error = layer.weight_floor.square().mean(1).sqrt() + values.square().mean(1).sqrt() * layer.bias_floor
    error = torch.where(size > layer.bias_floor, error / size, torch.inf)
    units = error.argsort()
    units = units[error[units] < AGREE * spread][:ROWS]
    return values[units]


def with_bias(layer: Layer, retain: Inputs, removed: Inputs | None, records: int) -> Finding:
    """Divide weight gradients by bias gradients.

    Without the truth it counts how many units agree on the same input: mixtures of several records would not.

    Args:
        layer: With a bias.
        retain: What goes into the layer on kept records: how much records differ there.
        removed: What went in on the removed ones, to judge by; None if nobody knows.
        records: How many loss terms were removed.
    """
    rows = quotients(layer, retain.spread)
    place = layer.name + (" (the model's input)" if retain.is_model_input else "")
    attack = "ratio with bias"
    numbers: dict[str, object] = {"units above the floor": len(rows), "units": len(layer.weight)}
    if not len(rows):
        words = "No output unit's gradient stands far enough above rounding to divide by."
        return Finding(attack=attack, place=place, verdict="not shown", words=words, numbers=numbers)
    distances = torch.cdist(rows, rows) / rows.shape[1] ** 0.5
    agreeing = (distances < AGREE * retain.spread).sum(1)
    most = int(agreeing.argmax())
    numbers |= {"units that agree": int(agreeing[most])}
    shape = retain.shape if retain.is_model_input else None
    if removed is None:
        # Behind a layer of few outputs all rows carry one mixture of several records.
        one = records == 1 or float(torch.linalg.svdvals(layer.weight)[1:2].sum()) > noise_size(layer)
        sure = int(agreeing[most]) >= 2 and layer.free_rows >= 2 and one
        words = (
            f"{int(agreeing[most])} of {len(rows)} usable units give the same input to within rounding: that "
            "of one removed record."
            if sure
            else "No two units agree on an input that must be that of one record. One of them may still show a record; "
            "only someone who knows the records can tell."
        )
        shown = rows[most : most + 1] if sure else None
        verdict = judged(0.0 if sure else 1.0)
        return Finding(
            attack=attack, place=place, verdict=verdict, words=words, numbers=numbers, recovered=shown, shape=shape
        )
    truth = removed.values
    errors = torch.cdist(truth, rows) / truth.shape[1] ** 0.5 / retain.spread
    closest, best = errors.min(1)
    lowest = news(closest, truth, retain)
    recovered = rows[best]
    psnr = peak_ratio(recovered, truth, retain.span)
    exact, known = int((lowest <= AGREE).sum()), int(((closest <= AGREE) & lowest.isinf()).sum())
    numbers |= {
        "removed terms": records,
        "rows to recover": len(truth),
        "recovered": exact,
        "median PSNR": float(psnr.median()),
        "best PSNR": float(psnr.max()),
    }
    if float(lowest.min()) < torch.inf:
        numbers["lowest error"] = float(lowest.min())
    what = "inputs" if retain.per_example == 1 else "token vectors"
    words = (
        f"Dividing two gradients gives {exact} of {len(truth)} removed {what} back to within a tenth of how much they "
        f"differ (median PSNR {float(psnr.median()):.0f} dB, best {float(psnr.max()):.0f} dB)."
    )
    if known:
        numbers["recovered, but no news"] = known
        words += f" {known} more are met as closely and not counted: {NO_NEWS}"
    order = lowest.argsort()
    return Finding(
        attack=attack,
        place=place,
        verdict=judged(float(lowest.min())),
        words=words,
        numbers=numbers,
        recovered=recovered[order],
        truth=truth[order],
        shape=shape,
    )


def without_bias(layer: Layer, retain: Inputs, removed: Inputs | None, records: int) -> Finding:
    """Take the one direction that all rows of a weight gradient have in common, if they have one.

    Args:
        layer: With or without a bias.
        retain: As for `with_bias`; its mean length and sign stand in for the unknown scale.
        removed: As for `with_bias`.
        records: How many loss terms were removed.
    """
    attack, place = "ratio without bias", layer.name + (" (the model's input)" if retain.is_model_input else "")
    _, sizes, right = torch.linalg.svd(layer.weight, full_matrices=False)
    floor = noise_size(layer)
    numbers = {"largest singular value": float(sizes[0]), "second": float(sizes[1]) if len(sizes) > 1 else 0.0}
    numbers |= {"rounding floor": floor}
    if float(sizes[0]) <= floor or min(layer.free_rows, layer.weight.shape[1]) < 2:
        words = "The layer's gradient is rounding, or has too few outputs for a common direction to mean anything."
        return Finding(attack=attack, place=place, verdict="not shown", words=words, numbers=numbers)
    direction = right[0]
    typical = retain.values.mean(0)
    direction = direction * (1 if float(direction @ typical) >= 0 else -1)
    length = float(retain.values.norm(dim=1).mean())
    beside = float(sizes[1] / sizes[0]) * length / retain.values.shape[1] ** 0.5 / retain.spread
    shape = retain.shape if retain.is_model_input else None
    if removed is None:
        alone = beside <= AGREE and records == 1
        words = (
            "All rows of the gradient are multiples of one vector: the input of one removed record, up to its scale."
            if alone
            else "The rows of the gradient have a direction in common, which may be a mixture of several records."
            if beside <= AGREE
            else "The rows of the gradient have no single direction in common."
        )
        verdict = judged(0.0 if alone else 1.0)
        shown = (direction * length)[None] if alone else None
        return Finding(
            attack=attack, place=place, verdict=verdict, words=words, numbers=numbers, recovered=shown, shape=shape
        )
    truth = removed.values
    scaled = (truth @ direction)[:, None] * direction
    errors = (scaled - truth).square().mean(1).sqrt() / retain.spread
    errors = news(errors, truth, retain)
    best = int(errors.argmin())
    psnr = float(peak_ratio(scaled, truth, retain.span)[best])
    numbers |= {"removed terms": records, "best PSNR": psnr}
    if float(errors[best]) < torch.inf:
        numbers["lowest error"] = float(errors[best])
    words = (
        f"The strongest common direction of the rows, scaled to fit, is off from a removed input by "
        f"{float(errors[best]):.2g} of how much inputs differ ({psnr:.0f} dB)."
        if float(errors[best]) < torch.inf
        else "The strongest common direction of the rows is no closer to a removed input than kept records are."
    )
    return Finding(
        attack=attack,
        place=place,
        verdict=judged(float(errors[best])),
        words=words,
        numbers=numbers,
        recovered=scaled[best : best + 1],
        truth=truth[best : best + 1],
        shape=shape,
    )


def news(errors: Float[Tensor, " rows"], truth: Tensor, retain: Inputs) -> Float[Tensor, " rows"]:
    """Errors, but infinite where a kept record is hardly further from the truth than what was recovered."""
    return news_of(errors, truth, retain.values, retain.spread)


def news_of(errors: Float[Tensor, " rows"], truth: Tensor, kept: Tensor, spread: float) -> Float[Tensor, " rows"]:
    """The same, for records as they are."""
    nearest = torch.cdist(truth, kept).min(1).values / truth.shape[1] ** 0.5 / spread
    return torch.where(errors < nearest / 2, errors, torch.inf)


def noise_size(layer: Layer) -> float:
    """A bound on the largest singular value of a matrix of rounding errors: its longest row plus its longest column."""
    return float(layer.weight_floor.norm(dim=1).max() + layer.weight_floor.norm(dim=0).max())
