"""How far a subject's next-token distributions are from a reference's: the mean Kullback-Leibler divergence over a
text.

Perplexity sees the probability of one word a token, and a compressed model can lose and win there by turns; the
divergence sees all words, and is 0 only for a model that predicts as the reference does.
"""

import time
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from thesislib.errors import BadInput
from thesislib.evaluate import perplexity
from thesislib.evaluate.perplexity import ONE_DOCUMENT
from thesislib.evaluate.stats import Comparison, bootstrap_mean
from thesislib.evaluate.task import Options, Task
from thesislib.formats.load import load_subject
from thesislib.model.forward import batch_for, final_states
from thesislib.model.subject import Subject
from thesislib.model.tokenizers import check_windows
from thesislib.records.measurement import Measurement, provenance
from thesislib.sources import corpus
from thesislib.sources.corpus import Text, windows

TILE = 1 << 24  # logits of a model that are held at once, in float32


def divergence(
    subject: Subject,
    reference: Subject,
    text: Text,
    *,
    length: int = 512,
    limit: int | None = None,
    batch: int | None = None,
) -> Measurement:
    """Mean KL(reference || subject) of the next token, in nats a token, over the windows that `perplexity` uses.

    In each window the distributions after all tokens but the last are compared: those whose next token perplexity
    scores. The interval is a bootstrap over the text's documents.

    Args:
        subject: what is held against the reference.
        reference: whose distributions are taken for true.
        text: what is read.
        length: tokens in a window.
        limit: use this many windows, spread evenly over the text.
        batch: windows at a time, by default 4 on a CPU and what fills a card. It does not change the result.

    Raises:
        BadInput: two vocabularies; and whatever `perplexity` refuses.
    """
    started = time.perf_counter()
    _check_vocabularies(subject, reference)
    cut = windows(text, subject.tokenizer, length, limit)
    for one in (subject, reference):
        check_windows(one.model, one.tokenizer, cut.ids)
    nats = _nats(subject, reference, cut.ids, batch or batch_for(subject.model, length, on_cpu=4))
    n, tokens = len(nats), np.full(len(nats), length - 1)
    low, high = bootstrap_mean(nats, tokens, cut.document)
    documents = cut.document.tolist()
    extra: dict[str, Any] = {
        "reference": reference.name,
        "predicted_tokens": int(tokens.sum()),
        "documents": len(set(documents)),
    }
    if extra["documents"] < 2:
        extra["why no interval"] = ONE_DOCUMENT
    settings = {"length": length, "limit": limit, "text": text.name, "text_sha256": text.sha256, "bootstrap_seed": 0,
                "reference": reference.name, "reference_fingerprint": reference.fingerprint}  # fmt: skip
    items = [
        {"id": i, "document": d, "nats": x, "tokens": length - 1}
        for i, (d, x) in enumerate(zip(documents, nats.tolist(), strict=True))
    ]
    return Measurement(
        task=text.name,
        metric=Kl.metric,
        value=float(nats.sum() / tokens.sum()),
        low=low,
        high=high,
        n=n,
        unit=f"window of {length} tokens",
        items=items,
        extra=extra,
        provenance=provenance(subject, started, **settings),
    )


@torch.inference_mode()
def _nats(subject: Subject, reference: Subject, ids: torch.Tensor, batch: int) -> np.ndarray:
    """(windows,) float64: the sum of the divergences in each window of ids (windows, length)."""
    ids = ids.to(subject.device)
    # in float32 for models of 16 bits too: a logit that is rounded diverges by itself
    heads = [one.model.get_output_embeddings().weight.float() for one in (reference, subject)]  # (V, D) each
    rows = max(1, TILE // len(heads[0]))
    nats = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
    for at in tqdm(range(0, len(ids), batch), desc="kl", unit="batch", disable=None, leave=False):
        part = ids[at : at + batch]
        states = [
            next(final_states(one.model, part))[1][:, :-1].flatten(0, 1) for one in (reference, subject)
        ]  # (B (T - 1), D) each
        found = []
        for i in range(0, len(states[0]), rows):
            p, q = (
                torch.log_softmax(h[i : i + rows].float() @ head.T, 1) for h, head in zip(states, heads, strict=True)
            )
            found.append((p.exp() * (p - q)).sum(1, dtype=torch.float64))
        nats[at : at + len(part)] = torch.cat(found).view(len(part), -1).sum(1)
    return nats.cpu().numpy()


def _check_vocabularies(subject: Subject, reference: Subject) -> None:
    """Raises BadInput unless both models give a probability to the same tokens under the same numbers."""
    words, others = (one.tokenizer.get_vocab() for one in (subject, reference))
    rows, other_rows = (len(one.model.get_output_embeddings().weight) for one in (subject, reference))
    if words != others or rows != other_rows:
        odd = sorted(words.items() ^ others.items())
        which = f"; '{odd[0][0]}' is in one of them or numbered otherwise" if odd else ""
        raise BadInput(
            f"{subject.name} has a vocabulary of {len(words):,} tokens and {rows:,} logits, the reference "
            f"{reference.name} of {len(others):,} "
            f"and {other_rows:,}{which}: expected a reference with the subject's own vocabulary, such as what it "
            "was made from"
        )


class Kl(Task):
    """See the module."""

    name = "kl"
    metric = "kl"
    unit = "nats a token"
    higher_is_better = False
    tolerance = ("absolute", (0.001, 0.01, 0.03))  # as that of perplexity, whose logarithm is in nats too
    two_models = True

    def items(self, data: str, options: Options) -> Text:
        """See `Task.items`."""
        return corpus.evaluation_text(data)

    def sha256(self, items: Text, options: Options) -> str:
        """See `Task.sha256`."""
        return items.sha256

    def measure(self, subject: Subject, items: Text, options: Options) -> Measurement:
        """See `divergence`; the reference is loaded in the subject's type."""
        dtype = str(subject.dtype).removeprefix("torch.")
        reference = load_subject(options.reference or "", dtype, str(subject.device), packed=False)
        return divergence(subject, reference, items, length=options.length, limit=options.limit, batch=options.batch)

    def compare(self, a: Measurement, b: Measurement) -> Comparison:
        """Paired t test of b's divergence against a's, in nats a token, windows of one document averaged.

        Raises:
            BadInput: other windows, or another reference.
        """
        one, other = (m.settings for m in (a, b))
        if one["reference_fingerprint"] != other["reference_fingerprint"]:
            raise BadInput(
                f"one is held against {one['reference']} and the other against {other['reference']}, of another "
                "fingerprint: expected one reference"
            )
        return perplexity.compare(a, b)
