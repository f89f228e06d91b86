"""Which words were in the removed text: rows of an embedding's gradient that are not zero.

An embedding's gradient has a row for every token, and only tokens that occurred have one that is not zero. Kept text
cancels in the difference. Source: Fowl et al. 2022, "Decepticons"; the observation is older.
"""

import torch

from expunge import params
from expunge.audit.finding import Evidence, Finding, Truth, Verdict, floor_of, weights_in
from expunge.audit.layers import layer_inputs
from expunge.audit.span import vocabulary


def bag_of_words(evidence: Evidence, truth: Truth) -> Finding | None:
    """Read off which tokens occurred.

    Args:
        evidence: With a model whose token numbers go into an `nn.Embedding`.
        truth: ``forget`` to judge by, if there is one.

    Returns:
        None if the model has no such embedding.
    """
    found = vocabulary(evidence)
    if found is None:
        return None
    place, module = found
    attack, removed = "bag of words", evidence.removed
    names = weights_in(params.plain(evidence.model), module)
    if names.get("weight") not in removed.total:
        words = "The embedding's weights are tied to another layer, or were not cached: its rows cannot be read off."
        return Finding(attack=attack, place=place, verdict="not shown", words=words)
    weight = names["weight"]
    rows = removed.total[weight].double().norm(dim=1).cpu()
    tokens = (rows > floor_of(removed, weight).norm(dim=1).cpu()).nonzero().flatten()
    tokens = tokens[rows[tokens].argsort(descending=True)]
    numbers: dict[str, object] = {"tokens": tokens.tolist(), "vocabulary": module.num_embeddings}
    telling = 0 < len(tokens) <= module.num_embeddings / 2
    if truth.forget is None:
        words = f"{len(tokens)} of {module.num_embeddings} words of the vocabulary have a gradient above rounding."
        words += " Those, and no others, were in what was removed." if telling else " That tells nothing."
        verdict: Verdict = "partly recoverable" if telling else "not shown"
        return Finding(attack=attack, place=place, verdict=verdict, words=words, numbers=numbers)
    model = evidence.model
    seen = layer_inputs(model, evidence.loss_terms, truth.forget, limit=None, all_modules=True)
    true = seen[place].values.long().unique()
    hits = int(torch.isin(tokens, true).sum())
    precision, recall = hits / max(len(tokens), 1), hits / max(len(true), 1)
    numbers |= {"precision": precision, "recall": recall, "true tokens": len(true)}
    good = telling and precision >= 0.9 and recall >= 0.5
    words = (
        f"{len(tokens)} of {module.num_embeddings} words stand above rounding; {precision:.0%} of them were in the "
        f"removed text, which is {recall:.0%} of its different words. Their order is not in it."
    )
    verdict = "partly recoverable" if good else "not shown"
    return Finding(attack=attack, place=place, verdict=verdict, words=words, numbers=numbers)
