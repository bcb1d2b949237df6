"""How far a subject's next-token distributions are from a reference's: the mean Kullback-Leibler divergence over a
text.

Perplexity depends on the probability of the one token that follows, where a compressed model can lose and win by turns.
The divergence depends on the whole distribution, and is 0 only for a model that predicts as the reference does.
"""

import time

import numpy as np
import torch
from tqdm import tqdm

from thesislib.errors import BadInput
from thesislib.evaluate import perplexity
from thesislib.evaluate.perplexity import OnText, mean_over_windows
from thesislib.evaluate.stats import Comparison
from thesislib.evaluate.task import Options
from thesislib.formats.load import load_subject
from thesislib.model.forward import batch_for, final_states
from thesislib.model.subject import Subject
from thesislib.model.tokenizers import check_windows
from thesislib.records.measurement import Measurement, provenance
from thesislib.sources.corpus import Text, windows

TILE = 1 << 24  # how many logits of a model are in memory at a time, in float32


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
        subject: the model that is compared with the reference.
        reference: the model whose distributions are taken for true.
        text: the text that both read.
        length: tokens in a window.
        limit: use this many windows, spread evenly over the text.
        batch: windows at a time, by default 4 on a CPU and as many as fill a card. It does not change the result.

    Raises:
        BadInput: the two have different vocabularies; whatever `perplexity` refuses.
    """
    started = time.perf_counter()
    _check_vocabularies(subject, reference)
    cut = windows(text, subject.tokenizer, length, limit)
    for one in (subject, reference):
        check_windows(one.model, one.tokenizer, cut.ids)
    nats = _nats(subject, reference, cut.ids, batch or batch_for(subject.model, length, on_cpu=4))
    extra = {
        "reference": reference.name,
        "predicted_tokens": len(nats) * (length - 1),
        "documents": len(set(cut.document.tolist())),
    }
    settings = {"length": length, "limit": limit, "text": text.name, "text_sha256": text.sha256, "bootstrap_seed": 0,
                "reference": reference.name, "reference_fingerprint": reference.fingerprint}  # fmt: skip
    return mean_over_windows(text.name, Kl.metric, cut, nats, extra, provenance(subject, started, **settings))


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
        divergences = []
        for i in range(0, len(states[0]), rows):
            p, q = (
                torch.log_softmax(h[i : i + rows].float() @ head.T, 1) for h, head in zip(states, heads, strict=True)
            )
            divergences.append((p.exp() * (p - q)).sum(1, dtype=torch.float64))
        nats[at : at + len(part)] = torch.cat(divergences).view(len(part), -1).sum(1)
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


class Kl(OnText):
    """See the module."""

    name = "kl"
    metric = "kl"
    unit = "nats a token"
    higher_is_better = False
    tolerance = ("absolute", (0.001, 0.01, 0.03))  # as that of perplexity, whose logarithm is in nats too
    two_models = True

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
