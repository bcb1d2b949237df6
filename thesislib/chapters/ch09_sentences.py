"""What chapter 9's records say, in sentences."""

import numpy as np

from thesislib.chapters import ch09_tables as tables
from thesislib.chapters.ch09_runs import Record, calr, methods, neighbours, orders, recorded_parameters, scopes
from thesislib.chapters.phrases import factor, p_value, percent_more, ratio, times, together
from thesislib.evaluate.compare import compare
from thesislib.evaluate.stats import Comparison
from thesislib.records.measurement import Measurement


def _x(record: Record, m: Measurement) -> str:
    """Times the dense model's perplexity."""
    return times(m.value / tables.whole_model(record).value)


def front_sentence(record: Record) -> str:
    """Whether a pair beats another way to as many bytes."""
    rivals = tables.rivals(record)
    lost = [r for r in rivals if r.c.told and r.c.difference < 0]
    won = [r for r in rivals if r.c.told and r.c.difference > 0]
    if not rivals:
        return ""
    closest = max(rivals, key=lambda r: r.c.difference)
    said = (
        f"{len(lost)} of {len(rivals)} low-rank models lose to another model that is no larger, {len(won)} win "
        f"({tables.whole_model(record).n} windows, Holm)."
    )
    return said + (
        f" The closest: {closest.model} against {closest.rival}, whose perplexity is {factor(closest.c)} its own "
        f"({p_value(closest.c.p)})."
    )


def whole_sentence(record: Record) -> str:
    """The same on the whole of WikiText-2."""
    table = tables.whole_text(record)
    if not len(table):
        return ""
    mine = table[table["low rank"]]
    if not len(mine):
        return ""
    said = []
    for name, row in mine.iterrows():
        smaller = table[~table["low rank"] & (table["MB"] <= row["MB"])]
        best = smaller["perplexity"].idxmin() if len(smaller) else None
        rival = (
            f"; {best} has {smaller.loc[best, 'perplexity']:.1f} at {smaller.loc[best, 'MB']:.0f} MB" if best else ""
        )
        said.append(f"{name}: {row['perplexity']:.1f} at {row['MB']:.0f} MB{rival}")
    return f"Perplexity on the whole of WikiText-2 (dense {table.loc['dense', 'perplexity']:.2f}): {'. '.join(said)}."


def metric_sentence(record: Record) -> str:
    """What the metric buys over the plain SVD."""
    rows = tables.found(record, methods(recorded_parameters()))
    if not {"svd", "svd_llm", "asvd"} <= {*rows}:
        return ""
    dense = tables.whole_model(record).value
    said = together(
        f"{name} {times(rows[name].value / dense)}"
        for name in ("svd", "fwsvd", "asvd", "nsvd", "svd_llm")
        if name in rows
    )
    return (
        f"With {recorded_parameters().keep:.0%} of the parameters kept, perplexity is {said} the dense model's. No "
        "method without the whole moment of the inputs is usable."
        if min(rows[n].value for n in ("svd", "asvd")) > 3 * rows["svd_llm"].value
        else f"With {recorded_parameters().keep:.0%} of the parameters kept, perplexity is {said} the dense model's."
    )


def kinds_sentence(record: Record) -> str:
    """Which kinds of linear give, and what whitening buys for each."""
    points, tests = tables.kinds_points(record), tables.kinds_tests(record, "svd", "svd_llm")
    if not tests:
        return ""
    best = points[points["method"] == "svd_llm"].sort_values("x dense")
    better, worse = (
        {
            base: [
                k for k, c in tables.kinds_tests(record, base, "svd_llm").items() if c.told and sign * c.difference < 0
            ]
            for base in ("svd", "asvd")
        }
        for sign in (1, -1)
    )
    beside = " and ".join(
        f"{base} for {len(better[base])} of {len(tests)} kinds"
        + (f" (surely worse for {together(worse[base])})" if worse[base] else "")
        for base in better
    )
    said = together(f"{row['kind']} {times(row['x dense'])}" for _, row in best.iterrows())
    return (
        f"One kind alone, {recorded_parameters().keep:.0%} kept, whitened: {said}. Whitening is surely better than "
        f"{beside}."
    )


def _changed(tests: dict[str, Comparison], name: str) -> str:
    c = tests[name]
    return f"{percent_more(c)} ({p_value(c.p)})"


def sink_sentence(record: Record) -> str:
    """Whether the sink spoils whitening as it spoils GPTQ."""
    tests = tables.against(record, methods(recorded_parameters()), "svd_llm")
    names = [n for n in tests if n.startswith("svd_llm, tokens by")]
    if not names:
        return ""
    said = together(f"{n.rpartition(' ')[2]} {_changed(tests, n)}" for n in names)
    return (
        "A window's first token is an attention sink (chapter 5). Weighting tokens against it, or for it, changes "
        f"whitened pairs' perplexity by {said}."
    )


def calibration_sentence(record: Record) -> str:
    """Which text, how much, which inputs, which allocation."""
    tests = tables.against(record, methods(recorded_parameters()), "svd_llm")
    words = {
        "svd_llm, Wikipedia": "calibrated on Wikipedia, the kind of text that is measured on",
        f"svd_llm, {4 * recorded_parameters().windows} windows": "on four times the text",
        "svd_llm, compressed inputs": "on the inputs in the compressed model so far",
        "svd_llm, both inputs": "for the original model's outputs",
        "svd_llm, both inputs, ridge": "for these with a ridge towards the weight",
        "saes, both inputs": "half-way towards them (saes)",
        "svd_llm, allocation by effective": "ranks shared out by effective rank (D-Rank)",
        "svd_llm, allocation by loss": "ranks shared out by loss (SVD-LLM v2)",
    }
    said = [f"{word} {_changed(tests, name)}" for name, word in words.items() if name in tests]
    return f"Against {recorded_parameters().windows} windows of c4: {'; '.join(said)}." if said else ""


def overfit_sentence(record: Record) -> str:
    """Whether the full metric gains more from text of the measured kind than the diagonal one."""
    rows = tables.found(record, methods(recorded_parameters()))
    if not {"svd_llm, Wikipedia", "asvd, Wikipedia", "svd_llm", "asvd"} <= {*rows}:
        return ""
    full, diagonal = (compare(rows[m], rows[f"{m}, Wikipedia"]) for m in ("svd_llm", "asvd"))
    return (
        f"Calibration text of the measured kind changes the full metric's perplexity by {percent_more(full)} "
        f"({p_value(full.p)}), the diagonal one's by {percent_more(diagonal)} ({p_value(diagonal.p)})."
    )


def spectra_sentence(record: Record) -> str:
    """Why MLPs give less than attention, and what whitening changes."""
    s = record.spectra
    said = []
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        plain, white = (float(np.median(s.of(way, name))) for way in ("plain", "whitened"))
        said.append(f"{name} {plain:.0f} and {white:.1f} of {s.break_even(name):.0f}")
    unit = together(f"{np.median(s.of(WEIGHTED, n)):.0f} for {n}" for n in ("q_proj", "v_proj", "down_proj"))
    return (
        f"Median effective rank over blocks, plain and whitened, beside the break-even rank: {together(said)}. By "
        "themselves MLPs need as many directions as a pair may have, or more; in the metric of their inputs the "
        f"energy of the outputs lies in far fewer (tokens of unit norm: {unit})."
    )


def energy_sentence(record: Record) -> str:
    """How little of the outputs is lost, and how much of the perplexity."""
    m = next((m for name, m in tables.found(record, methods(recorded_parameters())).items() if name == "svd_llm"), None)
    if m is None:
        return ""
    errors = {name: float(e) for name, e in m.made["reports"][0]["relative_errors"].items()}
    mlps = np.median([e for name, e in errors.items() if name.endswith(("gate_proj", "up_proj", "down_proj"))])
    others = np.median([e for name, e in errors.items() if name.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))])
    return (
        f"Energy is not what counts: with {recorded_parameters().keep:.0%} of the parameters kept the outputs of MLPs' "
        f"projections miss {mlps**2:.1%} of their energy and those of attention {others**2:.1%} (medians, on the "
        f"calibration text), and perplexity is {_x(record, m)} the dense model's."
    )


WEIGHTED = "whitened, tokens of unit norm"


def path_sentence(record: Record) -> str:
    """What the closed form of the path wins back."""
    rows = tables.found(record, calr(recorded_parameters()))
    if not {"pairs", "path in closed form"} <= {*rows}:
        return ""
    c = compare(rows["pairs"], rows["path in closed form"])
    r = recorded_parameters()
    gone = rows.get("MLPs removed")
    without = f" With {r.quiet} MLPs removed, those that cost least, it is {_x(record, gone)}." if gone else ""
    ranks = [n for n in rows if n.startswith("path of rank")]
    less = together(f"{n.split()[3]} {_x(record, rows[n])}" for n in ranks) if ranks else ""
    return (
        f"Pairs of rank {r.rank} in the MLPs of {r.quiet} quiet blocks: perplexity {_x(record, rows['pairs'])} the "
        f"dense model's; with the path of rank {r.rank} in closed form {_x(record, rows['path in closed form'])} "
        f"({ratio(c)}, {p_value(c.p)}), without training.{f' Of rank {less}.' if less else ''}{without}"
    )


def training_sentence(record: Record) -> str:
    """Whether CALR's gain is the path's or the training's."""
    points, tests = tables.arms_points(record), tables.arms_compared(record)
    present = [name for name in tables.ARMS if name in points.index]
    if "CALR" not in present:
        return ""
    r = recorded_parameters()
    said = together(f"{name} {times(points.loc[name, 'x dense'])}" for name in present)
    seeds = int(points.loc["CALR", "seeds"])
    verdicts = [
        f"{name} is {c.verdict() if c.told else 'not told apart'} ({ratio(c)}, {p_value(c.p)})"
        for name, c in tests.items()
    ]
    told = (
        f" Against CALR, over seeds: {'; '.join(verdicts)}."
        if verdicts
        else " One seed so far: trainings are not told apart."
    )
    tokens = r.steps * 2 * r.length
    return (
        f"After {tokens:,} tokens ({seeds} seed{'s' if seeds > 1 else ''}): {said}. Wider pairs have as many "
        f"parameters as pairs and path, and the same training.{told}{untrained_sentence(record)}"
    )


def untrained_sentence(record: Record) -> str:
    """The path against wider pairs where nothing is trained."""
    c = tables.untrained_path(record)
    if c is None:
        return ""
    return f" Without any training the path in closed form against wider pairs is {ratio(c)} ({p_value(c.p)})."


def starts_sentence(record: Record) -> str:
    """Plain against whitened start, path's rank, and training on outputs."""
    rows = tables.found(record, calr(recorded_parameters()))
    if "CALR, seed 0" not in rows:
        return ""
    base, said = rows["CALR, seed 0"], []
    for name in ("plain pairs, CALR", "CALR on outputs", "CALR, path of rank 8", "CALR, path of rank 32"):
        if name in rows:
            c = compare(base, rows[name])
            said.append(f"{name} {percent_more(c)} ({p_value(c.p)})")
    return f"Of the first seed, against CALR as it is: {'; '.join(said)}." if said else ""


def scopes_sentence(record: Record) -> str:
    """Which blocks' MLPs to take."""
    rows = tables.found(record, scopes(recorded_parameters()))
    tests = tables.against(record, scopes(recorded_parameters()), "quiet")
    if not tests:
        return ""
    said = together(f"{name} {_x(record, m)}" for name, m in rows.items())
    beside = together(f"{name} {_changed(tests, name)}" for name in tests)
    return (
        f"Pairs in the MLPs of {recorded_parameters().quiet} blocks: {said} the dense model's perplexity; against "
        f"quiet {beside}."
    )


def orders_sentence(record: Record) -> str:
    """Low rank and few bits together."""
    rows = tables.found(record, orders(recorded_parameters()))
    if not {"GPTQ", "low rank, GPTQ"} <= {*rows}:
        return ""
    said = together(f"{name} {m.disk_bytes / 1e6:.1f} MB and {_x(record, m)}" for name, m in rows.items())
    return f"Bytes and perplexity, times the dense model's: {said}."


def neighbours_sentence(record: Record) -> str:
    """The comparison of CALR's paper."""
    found = tables.neighbours_tests(record)
    if not found:
        return ""
    ranking, pairs = found
    order = sorted(ranking.mean_ranks, key=lambda n: ranking.mean_ranks[n])
    untold = [f"{a} and {b}" for (a, b), c in pairs.items() if not c.told]
    rows = tables.found(record, [*neighbours(recorded_parameters()), *calr(recorded_parameters())])
    sizes = [rows[n].disk_bytes / tables.MB for n in order]
    told = f"{len(untold)} are not told apart: {'; '.join(untold)}." if untold else "all are told apart."
    return (
        f"From {min(sizes):.0f} to {max(sizes):.0f} MB, so not quite at equal bytes. Friedman's test over {ranking.n} "
        f"windows: {p_value(ranking.p)}, concordance {ranking.w:.2f}. By mean rank: "
        f"{together(f'{n} {ranking.mean_ranks[n]:.1f}' for n in order)}. Of {len(pairs)} pairs (Wilcoxon, Holm) {told}"
    )


def every(record: Record) -> list[str]:
    """All of them, in order."""
    makers = (
        front_sentence,
        whole_sentence,
        spectra_sentence,
        energy_sentence,
        metric_sentence,
        kinds_sentence,
        sink_sentence,
        calibration_sentence,
        overfit_sentence,
        path_sentence,
        training_sentence,
        starts_sentence,
        scopes_sentence,
        orders_sentence,
        neighbours_sentence,
    )
    return [said for make in makers if (said := make(record))]
