"""Perplexity: exp of the mean loss per token over non-overlapping windows."""

import math
import time
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from thesislib.evaluate.stats import Comparison, bootstrap_mean, paired_means
from thesislib.evaluate.task import Options, Task
from thesislib.model.forward import Plan, batch_for, final_states, token_losses
from thesislib.model.subject import Subject
from thesislib.model.tokenizers import check_windows
from thesislib.records.measurement import Measurement, provenance
from thesislib.sources import corpus
from thesislib.sources.corpus import Text, Windows, windows

K = TypeVar("K")  # what a plan is called by
AS_IT_IS = "as it is"
ONE_DOCUMENT = "one document, and an interval shows how documents differ (WikiText's articles begin with ' = Title = ')"


def perplexity(
    subject: Subject, text: Text, *, length: int = 512, limit: int | None = None, batch: int | None = None
) -> Measurement:
    """The subject's perplexity on `text`.

    The text is tokenised once and cut into windows of `length` tokens, no token added, the tail dropped; in each, all
    tokens but the first are predicted, and the mean is over tokens (GPTQ's and WANDA's protocol). The interval is a
    bootstrap over the text's documents. `extra` has the same losses per word and per byte.

    Args:
        subject: the model and tokenizer.
        text: what to predict.
        length: tokens in a window; longer windows give lower perplexities, so only equal lengths compare.
        limit: use this many windows, spread evenly over the text.
        batch: windows at a time, by default 4 on a CPU and what fills a card. It does not change the result.

    Raises:
        BadInput: empty text, window longer than the text or the model's context, length below 2, a token that the model
            has no row for.
    """
    return perplexities(subject, text, {AS_IT_IS: None}, length=length, limit=limit, batch=batch)[AS_IT_IS]


def perplexities(
    subject: Subject,
    text: Text,
    plans: Mapping[K, Plan | None],
    *,
    length: int = 512,
    limit: int | None = None,
    batch: int | None = None,
) -> dict[K, Measurement]:
    """`perplexity` of the subject under every plan (an order of its blocks), blocks that plans share run once.

    The plan None is the model as it is and must stand alone; see `thesislib.model.forward.final_states`.
    """
    started = time.perf_counter()
    cut = windows(text, subject.tokenizer, length, limit)
    check_windows(subject.model, subject.tokenizer, cut.ids)
    names = list(plans)
    orders = None if plans[names[0]] is None else [plans[name] for name in names]
    nats = _nats(subject, cut.ids, orders, batch or batch_for(subject.model, length, on_cpu=4))
    settings = {"length": length, "limit": limit, "text": text.name, "text_sha256": text.sha256, "bootstrap_seed": 0}
    made = provenance(subject, started, **settings)
    return {
        name: _measurement(
            text.name, cut, nats[i], made if plans[name] is None else {**made, "plan": list(plans[name])}
        )
        for i, name in enumerate(names)
    }


@torch.inference_mode()
def _nats(subject: Subject, ids: torch.Tensor, orders: list[Plan] | None, batch: int) -> np.ndarray:
    """(plans, windows) float64: the loss of each window of ids (windows, length). A card is waited for once, at the
    end."""
    ids = ids.to(subject.device)
    nats = torch.zeros(len(orders or [None]), len(ids), dtype=torch.float64, device=ids.device)
    for at in tqdm(range(0, len(ids), batch), desc="perplexity", unit="batch", disable=None, leave=False):
        part = ids[at : at + batch]
        targets = part[:, 1:].reshape(-1)
        for which, states in final_states(subject.model, part, orders):
            losses = token_losses(subject.model, states[:, :-1].reshape(-1, states.shape[-1]), targets)
            nats[which, at : at + len(part)] = losses.view(len(part), -1).double().sum(1)
    return nats.cpu().numpy()


def _measurement(task: str, cut: Windows, nats: np.ndarray, made: dict) -> Measurement:
    n, length = cut.ids.shape
    tokens = np.full(n, length - 1)
    mean = float(nats.sum() / tokens.sum())
    low, high = bootstrap_mean(nats, tokens, cut.document)
    extra: dict[str, Any] = {
        "tokens": int(n * length),
        "predicted_tokens": int(tokens.sum()),
        "documents": len(set(cut.document.tolist())),
        "nats_per_token": mean,
        "word_perplexity": _exp(_per(nats.sum(), cut.scored_words.sum())),
        "bits_per_byte": _per(nats.sum() / math.log(2), cut.scored_bytes.sum()),
    }
    if extra["documents"] < 2:
        extra["why no interval"] = ONE_DOCUMENT
    items = [
        {"id": i, "document": int(d), "nats": float(v), "tokens": length - 1}
        for i, (d, v) in enumerate(zip(cut.document, nats, strict=True))
    ]
    return Measurement(
        task=task, metric="perplexity", value=_exp(mean), low=_exp(low), high=_exp(high), n=n, unit="window of "
            f"{length} tokens", items=items,
        extra=extra, provenance=made,
    )  # fmt: skip


def _per(x: float, n: int) -> float:
    """x / n, infinite for none: a script without spaces may have no word that ends in a window."""
    return float(x / n) if n else math.inf


def _exp(x: float) -> float:
    """exp, infinite where it overflows."""
    with np.errstate(over="ignore"):
        return float(np.exp(x))


def compare(a: Measurement, b: Measurement) -> Comparison:
    """Paired t test of b's loss against a's in nats per token, windows of one document averaged.

    exp(difference) is the ratio of two geometric means over documents: the ratio of the perplexities where every
    document has as many windows, and close to it elsewhere. `thesislib.evaluate.stats.paired_bootstrap` with tokens as
    weights is exact.
    """
    nats_a, nats_b = (np.asarray(x) for x in a.paired_with(b, "nats"))
    tokens = np.asarray(a.column("tokens"))
    return paired_means(nats_a / tokens, nats_b / tokens, a.column("document"))


class Wikitext(Task):
    """Perplexity on the evaluation text."""

    name = "wikitext"
    metric = "perplexity"
    unit = "perplexity"
    higher_is_better = False
    ratio = True
    tolerance = ("relative", (0.001, 0.01, 0.03))

    def items(self, data: str, options: Options) -> Text:
        """See `Task.items`."""
        return corpus.evaluation_text(data)

    def sha256(self, items: Text, options: Options) -> str:
        """See `Task.sha256`."""
        return items.sha256

    def measure(self, subject: Subject, items: Text, options: Options) -> Measurement:
        """See `perplexity`."""
        return perplexity(subject, items, length=options.length, limit=options.limit, batch=options.batch)

    def compare(self, a: Measurement, b: Measurement) -> Comparison:
        """See `compare`."""
        return compare(a, b)

    def options_of(self, m: Measurement) -> dict[str, Any] | None:
        """See `Task.options_of`."""
        settings = m.settings
        if m.metric != self.metric or "length" not in settings:
            return None
        return {"length": settings["length"], "limit": settings.get("limit")}
