"""Is an input in the row space of a layer's gradient?

dW = Σ δ xᵀ has rank at most the number of rows that went in (records, or tokens of records), and its row space is the
span of those inputs. If that is not the whole space, an input can be tested: it lies in the span, or it does not. In a
language model the input of the first attention block depends on the token and its place only, so every word of the
vocabulary can be tried at every place. Source: Petrov et al. 2024, "DAGER: Exact Gradient Inversion for LLMs".
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from expunge import params
from expunge.audit.finding import Evidence, Finding, Verdict
from expunge.audit.layers import Inputs, Layer, first_tensor, layer_inputs
from expunge.audit.ratio import noise_size
from expunge.batches import Batch, Batches, map_tensors, micro_batches

CHUNK = 256  # tokens tried at a time
TRIED = 2**26  # numbers that the inputs of all tokens at all places may take
BESIDE = 0.02  # share of an input's length that may lie outside the span of a gradient that shows it


@dataclass(frozen=True)
class Span:
    """The row space of a layer's gradient, as far as it stands above rounding."""

    basis: Float[Tensor, "rank inputs"]
    rank: int
    most: int  # the rank it could have

    @property
    def proper(self) -> bool:
        """Whether it leaves anything out: a span of everything tests nothing."""
        return 0 < self.rank < self.most

    def beside(self, inputs: Float[Tensor, "rows inputs"]) -> Float[Tensor, " rows"]:
        """The share of each input's length that lies outside, in [0, 1]."""
        outside = inputs - inputs @ self.basis.T @ self.basis
        share: Tensor = outside.norm(dim=1) / inputs.norm(dim=1).clamp(min=1e-12)
        return share


def span(layer: Layer) -> Span:
    """Singular vectors whose singular value stands above that of a matrix of rounding errors."""
    _, sizes, right = torch.linalg.svd(layer.weight, full_matrices=False)
    rank = int((sizes > noise_size(layer)).sum())
    return Span(right[:rank], rank, layer.weight.shape[1])


def records_in_span(layer: Layer, removed: Inputs, unseen: Inputs) -> Finding:
    """Tell removed records from unseen ones by whether what they put into a layer lies in its gradient's span.

    Args:
        layer: Of the model.
        removed: Its inputs on removed records.
        unseen: And on records that were never there.
    """
    attack, found = "span", span(layer)
    numbers: dict[str, object] = {"rank": found.rank, "full rank": found.most}
    if not found.proper:
        words = f"The gradient has rank {found.rank} of {found.most}: everything lies in its span, or nothing does."
        return Finding(attack=attack, place=layer.name, verdict="not shown", words=words, numbers=numbers)
    if not removed.per_example or not unseen.per_example:
        words = "The layer runs several times, or on rows of several records at once: nobody knows which are whose."
        return Finding(attack=attack, place=layer.name, verdict="not shown", words=words, numbers=numbers)
    inside, outside = (_by_record(found.beside(each.values), each) for each in (removed, unseen))
    told = float((inside <= BESIDE).double().mean())
    mistaken = float((outside <= BESIDE).double().mean())
    numbers |= {"removed records inside": told, "unseen records inside": mistaken}
    words = (
        f"The gradient has rank {found.rank} of {found.most}. {told:.0%} of the removed records lie in its span, and "
        f"{mistaken:.0%} of unseen ones."
    )
    verdict: Verdict = "partly recoverable" if told >= 0.5 and mistaken <= 0.05 else "not shown"
    words += " Whoever has a candidate can test it." if verdict != "not shown" else ""
    return Finding(attack=attack, place=layer.name, verdict=verdict, words=words, numbers=numbers)


def words_in_span(evidence: Evidence, layers: list[Layer], forget: Batches | None) -> Finding | None:
    """Try every token at every place against the first layer whose inputs depend on token and place alone.

    Args:
        evidence: With a model whose inputs are token numbers.
        layers: Linear layers in the order they run.
        forget: The removed records, to judge by.

    Returns:
        None if the model takes no token numbers or no layer qualifies.
    """
    template = next(iter(micro_batches(evidence.retain, 1)[1]))[1]
    ids, table = first_tensor(template), vocabulary(evidence)
    if ids.is_floating_point() or ids.ndim != 2 or table is None:
        return None
    template = map_tensors(template, lambda tensor: tensor[:1])
    tokens = table[1].num_embeddings
    for layer in layers:
        found, wide = span(layer), layer.weight.shape[1]
        places = min(ids.shape[1], max(2, TRIED // (tokens * wide)))
        inputs = _inputs_of_every_token(evidence, template, layer.name, tokens, places) if found.proper else None
        if inputs is None:
            continue
        read = [(found.beside(inputs[:, place]) <= BESIDE).nonzero().flatten().tolist() for place in range(places)]
        numbers: dict[str, object] = {"rank": found.rank, "full rank": found.most, "tokens by place": read}
        return _judged_text(layer.name, read, forget, numbers)
    return None


def _judged_text(place: str, read: list[list[int]], forget: Batches | None, numbers: dict[str, object]) -> Finding:
    attack, some, single = "words in the span", sum(map(len, read)), sum(len(each) == 1 for each in read)
    numbers |= {"places with one token": single}
    verdict: Verdict
    if forget is None:
        few = all(len(each) <= 1 for each in read)
        verdict = "recoverable" if single >= 3 and few else "partly recoverable" if single >= 3 else "not shown"
        words = f"{some} pairs of token and place lie in the gradient's span; {single} places have exactly one token."
        return Finding(attack=attack, place=place, verdict=verdict, words=words, numbers=numbers)
    texts = [text[: len(read)] for _, batch in micro_batches(forget, 128)[1] for text in first_tensor(batch).tolist()]
    true = {(at, token) for text in texts for at, token in enumerate(text)}
    hits = sum((at, token) in true for at, tokens in enumerate(read) for token in tokens)
    recall, precision = hits / max(len(true), 1), hits / max(some, 1)
    numbers |= {"tokens recovered": recall, "precision": precision, "texts": texts[:8]}
    good = precision >= 0.5
    verdict = (
        "recoverable" if good and recall >= 0.75 else "partly recoverable" if good and recall >= 0.3 else "not shown"
    )
    words = (
        f"{recall:.0%} of the removed tokens are read off with their places; {precision:.0%} of what is read is right."
    )
    return Finding(attack=attack, place=place, verdict=verdict, words=words, numbers=numbers)


def _by_record(beside: Float[Tensor, " rows"], inputs: Inputs) -> Float[Tensor, " records"]:
    """The median over a record's rows: the last token of a text has no target, and leaves no trace."""
    return beside.view(-1, inputs.per_example).median(1).values


def vocabulary(evidence: Evidence) -> tuple[str, nn.Embedding] | None:
    """The embedding that the model's own token numbers go into, with its name."""
    model = params.plain(evidence.model)
    seen = layer_inputs(model, evidence.loss_terms, evidence.retain, limit=2, all_modules=True)
    modules = dict(model.named_modules())
    for name, inputs in seen.items():
        module = modules[name]
        if isinstance(module, nn.Embedding) and inputs.is_model_input:
            return name, module
    return None


def _inputs_of_every_token(
    evidence: Evidence, template: Batch, layer: str, tokens: int, places: int
) -> Float[Tensor, "tokens places features"] | None:
    """What each token puts into a layer at each place; None if it depends on the tokens around."""

    def inputs(batch: Batch) -> Tensor:
        found = layer_inputs(evidence.model, evidence.loss_terms, [batch], limit=None)[layer].values
        return found.view(-1, places, found.shape[-1]) if len(found) % places == 0 else found[:0]

    real = inputs(_cut(template, places))
    if not len(real):
        return None
    parts = [inputs(_constant(template, chunk, places)) for chunk in torch.arange(tokens).split(CHUNK)]
    table = torch.cat(parts)
    ids = first_tensor(template)[0, :places].cpu()
    if len(table) != tokens:
        return None
    alone = table[ids, torch.arange(places)]
    return table if torch.allclose(alone, real[0], rtol=1e-3, atol=1e-4 * float(real.abs().max())) else None


def _cut(template: Batch, places: int) -> Batch:
    return map_tensors(template, lambda tensor: tensor[:, :places] if tensor.ndim > 1 else tensor)


def _constant(template: Batch, tokens: Int[Tensor, " tokens"], places: int) -> Batch:
    """A batch of sequences that repeat one token each, in the form of the template."""
    ids = first_tensor(template)

    def change(tensor: Tensor) -> Tensor:
        if tensor is ids:
            return tokens.to(ids)[:, None].expand(-1, places).contiguous()
        row = tensor[:, :places] if tensor.ndim > 1 else tensor
        return row.expand(len(tokens), *row.shape[1:]).contiguous()

    return map_tensors(template, change)
