"""What became of the claims of the low-rank papers on this subject."""

from thesislib.chapters import ch09_arithmetic
from thesislib.chapters import ch09_tables as tables
from thesislib.chapters.ch09_runs import NOTEBOOK, Record, methods, recorded_parameters
from thesislib.chapters.ch09_sentences import untrained_sentence
from thesislib.chapters.paper_claims import PaperClaim
from thesislib.chapters.phrases import UNDECIDED, decided, p_value, ratio, together
from thesislib.evaluate.compare import compare

CALR = "[CALR](https://arxiv.org/abs/2508.16680)"
SVD_LLM = "[SVD-LLM](https://arxiv.org/abs/2403.07378)"
ASVD = "[ASVD](https://arxiv.org/abs/2312.05821)"


def claims(record: Record) -> list[PaperClaim]:
    """Each claim with its verdict."""
    return [_path(record), _removed(), _whitened(record), _kinds(record)]


def _path(record: Record) -> PaperClaim:
    c = tables.arms_compared(record).get("wider pairs trained")
    return PaperClaim(
        CALR,
        "the corrective path wins back what pairs lose (read here as: more than the same parameters in wider pairs "
        "with the same training, over seeds, at one learning rate).",
        "no such control is known to us",
        UNDECIDED if c is None else decided(c.told and c.difference > 0, c.told and c.difference < 0),
        "Not measured with several seeds yet."
        if c is None
        else f"Wider pairs against CALR: perplexity {ratio(c)} ({p_value(c.p)}).{untrained_sentence(record)}",
        (NOTEBOOK, "calr-path-or-training"),
    )


def _removed() -> PaperClaim:
    impossible = any(m.needed(32, m.whole) > m.blocks for m in ch09_arithmetic.MODELS)
    return PaperClaim(
        CALR,
        "MLPs of three models become smaller until 51.77 % of the parameters are gone (read here as: of the whole "
        "model, each of the three, pairs and paths of rank 32).",
        "26.93 % to 51.77 %",
        decided(not impossible, impossible),
        ch09_arithmetic.removable_sentence(),
        (NOTEBOOK, "what-a-ratio-means"),
    )


def _whitened(record: Record) -> PaperClaim:
    rows = tables.found(record, methods(recorded_parameters()))
    tests = {
        name: compare(rows["svd_llm"], rows[name]) for name in ("svd", "fwsvd", "asvd") if {name, "svd_llm"} <= {*rows}
    }
    holds = bool(tests) and all(c.told and c.difference > 0 for c in tests.values())
    fails = any(c.told and c.difference < 0 for c in tests.values())
    return PaperClaim(
        SVD_LLM,
        "at 20 % compression whitening loses less than plain SVD, FWSVD and ASVD.",
        "perplexity 7.94 against 20,061, 1,727 and 11.14 (LLaMA-7B)",
        decided(holds, fails),
        together(f"{name} has {ratio(c, '.3g')} of its perplexity" for name, c in tests.items()) + "."
        if tests
        else "Not measured yet.",
        (NOTEBOOK, "what-the-metric-buys"),
    )


def _kinds(record: Record) -> PaperClaim:
    points = tables.kinds_points(record)
    order = points[points["method"] == "asvd"].sort_values("x dense")["kind"].tolist() if len(points) else []
    mlps = {"gate_proj", "up_proj", "down_proj"}
    whole = len(order) == 7
    holds = whole and set(order[:2]) == {"q_proj", "k_proj"} and set(order[-3:]) == mlps
    return PaperClaim(
        ASVD,
        "queries and keys give most, MLPs least (read here as: with 20 % of one kind removed, the first two and the "
        "last three in order of lost perplexity).",
        "",
        decided(holds, whole and not holds),
        f"In order: {together(order)}." if order else "Not measured yet.",
        (NOTEBOOK, "which-linears-give"),
    )
