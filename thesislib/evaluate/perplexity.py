"""Perplexity: exp of the mean loss per token over non-overlapping windows."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
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

K = TypeVar("K")  # the name of a plan
AS_IT_IS = "as it is"
ONE_DOCUMENT = "one document, and an interval shows how documents differ (WikiText's articles begin with ' = Title = ')"


def perplexity(
    subject: Subject, text: Text, *, length: int = 512, limit: int | None = None, batch: int | None = None
) -> Measurement:
    """The subject's perplexity on `text`.

    The protocol is that of GPTQ and WANDA. The text is tokenised once and cut into windows of `length` tokens; no token
    is added, and the tail is dropped. In each window all tokens but the first are predicted. The mean is over tokens,
    and its interval a bootstrap over the text's documents. `extra` has the same losses per word and per byte.

    Args:
        subject: the model and tokenizer.
        text: the text to predict.
        length: tokens in a window; longer windows give lower perplexities, so only equal lengths compare.
        limit: use this many windows, spread evenly over the text.
        batch: windows at a time, by default 4 on a CPU and as many as fill a card. It does not change the result.

    Raises:
        BadInput: empty text, window longer than the text or the model's context, length below 2, a token outside the
            model's embedding.
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
    """`perplexity` of the subject under every plan, an order of its blocks. Beginnings that plans share run once.

    The plan None is the model as it is and must stand alone; see `thesislib.model.forward.final_states`.
    """
    started = time.perf_counter()
    cut = windows(text, subject.tokenizer, length, limit)
    check_windows(subject.model, subject.tokenizer, cut.ids)
    names = list(plans)
    orders = None if plans[names[0]] is None else [plans[name] for name in names]
    nats = _nats(subject, cut.ids, orders, batch or batch_for(subject.model, length, on_cpu=4))
    settings = {"length": length, "limit": limit, "text": text.name, "text_sha256": text.sha256, "bootstrap_seed": 0}
    facts = provenance(subject, started, **settings)
    return {name: _measurement(text.name, cut, nats[i], with_plan(facts, plans[name])) for i, name in enumerate(names)}


def with_plan(facts: dict, plan: Plan | None) -> dict:
    """The provenance of a measurement under a plan; None is the model as it is."""
    return facts if plan is None else {**facts, "plan": list(plan)}


@torch.inference_mode()
def _nats(subject: Subject, ids: torch.Tensor, orders: list[Plan] | None, batch: int) -> np.ndarray:
    """(plans, windows) float64: the summed loss of each window of ids (windows, length), in nats.

    Losses are collected on the card and fetched once, at the end.
    """
    ids = ids.to(subject.device)
    nats = torch.zeros(len(orders or [None]), len(ids), dtype=torch.float64, device=ids.device)
    for at in tqdm(range(0, len(ids), batch), desc="perplexity", unit="batch", disable=None, leave=False):
        part = ids[at : at + batch]
        targets = part[:, 1:].reshape(-1)
        for plan, states in final_states(subject.model, part, orders):
            losses = token_losses(subject.model, states[:, :-1].reshape(-1, states.shape[-1]), targets)
            nats[plan, at : at + len(part)] = losses.view(len(part), -1).double().sum(1)
    return nats.cpu().numpy()


def _measurement(task: str, cut: Windows, nats: np.ndarray, facts: dict) -> Measurement:
    """The perplexity of windows whose losses are nats (windows,)."""
    n, length = cut.ids.shape
    predicted = n * (length - 1)
    extra = {
        "tokens": n * length,
        "predicted_tokens": predicted,
        "documents": len(set(cut.document.tolist())),
        "nats_per_token": float(nats.sum() / predicted),
        "word_perplexity": _exp(_per(nats.sum(), cut.scored_words.sum())),
        "bits_per_byte": _per(nats.sum() / math.log(2), cut.scored_bytes.sum()),
    }
    return mean_over_windows(task, "perplexity", cut, nats, extra, facts, _exp)


def mean_over_windows(
    task: str,
    metric: str,
    cut: Windows,
    nats: np.ndarray,
    extra: dict[str, Any],
    facts: dict,
    transform: Callable[[float], float] = float,
) -> Measurement:
    """The measurement of a mean per predicted token over windows, with a bootstrap interval over documents.

    Args:
        task, metric: names for the record.
        cut: the windows.
        nats: (windows,) the sum over each window's predicted tokens.
        extra: further numbers, "documents" among them.
        facts: the provenance.
        transform: of the mean and of its bounds.
    """
    n, length = cut.ids.shape
    tokens = np.full(n, length - 1)
    low, high = bootstrap_mean(nats, tokens, cut.document)
    items = [
        {"id": i, "document": document, "nats": x, "tokens": length - 1}
        for i, (document, x) in enumerate(zip(cut.document.tolist(), nats.tolist(), strict=True))
    ]
    return Measurement(
        task=task,
        metric=metric,
        value=transform(float(nats.sum() / tokens.sum())),
        low=transform(low),
        high=transform(high),
        n=n,
        unit=f"window of {length} tokens",
        items=items,
        extra={**extra, **no_interval(extra["documents"])},
        provenance=facts,
    )


def no_interval(documents: int) -> dict[str, str]:
    """Why a measurement has no interval, for its `extra`; {} if it has one."""
    return {"why no interval": ONE_DOCUMENT} if documents < 2 else {}


def _per(x: float, n: int) -> float:
    """x / n; infinite if n is 0, as where a script without spaces has no word that ends in a window."""
    return float(x / n) if n else math.inf


def _exp(x: float) -> float:
    """exp(x); infinite where that overflows."""
    with np.errstate(over="ignore"):
        return float(np.exp(x))


def compare(a: Measurement, b: Measurement) -> Comparison:
    """Paired t test of b's loss against a's in nats per token, over documents, each weighted by its tokens.

    exp(difference) is the ratio of the two perplexities. Of a whole text and a sample of its windows those windows are
    compared that both have.

    Raises:
        BadInput: the two were measured on different windows.
    """
    a, b = on_common_windows(a, b)
    nats_a, nats_b = (np.asarray(x) for x in a.paired_with(b, "nats"))
    tokens = np.asarray(a.column("tokens"))
    return paired_means(nats_a / tokens, nats_b / tokens, a.column("document"), tokens)


def relative(m: Measurement, base: Measurement) -> Measurement:
    """A perplexity as a ratio to another model's on the windows that both have, with the interval of the paired test.

    Ratios compare across samples of one text: the difficulty of the windows cancels.
    """
    c = compare(base, m)
    value, low, high = (_exp(x) for x in (c.difference, c.low, c.high))
    return replace(m, metric="ratio of perplexities", value=value, low=low, high=high)


def on_common_windows(*measurements: Measurement) -> list[Measurement]:
    """The measurements, a whole text's restricted to the windows of the smallest sample among them.

    They are left as they are if they are not of one text and one length. Only `items` and `n` are restricted.
    """
    protocols = {(m.settings.get("text_sha256"), m.settings.get("length")) for m in measurements}
    smallest = min(measurements, key=lambda m: m.n)
    if len(protocols) > 1 or None in next(iter(protocols)):
        return list(measurements)
    return [
        _restricted(m, smallest) if m.n > smallest.n and m.settings.get("limit") is None else m for m in measurements
    ]


def _restricted(whole: Measurement, sample: Measurement) -> Measurement:
    items = [{**whole.items[at], "id": i} for i, at in enumerate(corpus.spread(whole.n, sample.n).tolist())]
    if [item["document"] for item in items] != sample.column("document"):
        return whole  # other windows than `corpus.windows` takes: the pairing refuses them
    return replace(whole, items=items, n=len(items))


class PerplexityTask(Task):
    """A task whose number is a perplexity."""

    unit = "perplexity"
    higher_is_better = False
    ratio = True
    tolerance = ("relative", (0.001, 0.01, 0.03))


class OnText(Task):
    """A task on the evaluation text."""

    def items(self, data: str, options: Options) -> Text:
        """See `Task.items`."""
        return corpus.evaluation_text(data)

    def sha256(self, items: Text, options: Options) -> str:
        """See `Task.sha256`."""
        return items.sha256


class Wikitext(OnText, PerplexityTask):
    """Perplexity on the evaluation text."""

    name = "wikitext"
    metric = "perplexity"

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
