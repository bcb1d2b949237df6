"""Chapter 5, quantisation and compensation: why GPTQ without act-order, on few tokens, loses to rounding on a small
model, and what repairs it."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from thesislib.chapters.ch05_comparisons import (
    QUANTISED,
    OwnGrid,
    Start,
    against,
    answers,
    by_projection,
    calibration_noise,
    few_and_many_bits,
    method_comparisons,
    more_comparisons,
    pruned_comparisons,
    read_gptqmodel,
    stage_report,
    starts,
    tested,
    textbook,
)
from thesislib.chapters.ch05_runs import (
    CLOSED,
    HELD_OUT,
    MORE,
    PPL,
    RECORDED,
    QuantChapter,
    Results,
    ablation_parameters,
    bits_by_group,
    eora_ranks,
    key,
    leave_one_out,
    lora_starts,
    main_models,
    more_calibration,
    on_the_test,
    one_change,
    pick,
    read_recorded,
    recorded_parameters,
    recorded_parts,
)
from thesislib.chapters.ch05_tables import layer_table
from thesislib.chapters.chapter import Chapter, Opening
from thesislib.chapters.phrases import factor, listed, number, points, ratio, together, versus
from thesislib.chapters.pool import Recorded, scored_by
from thesislib.chapters.trainings import on_largest_sample
from thesislib.evaluate.answers import AT_ONCE, FIRST_WORDS
from thesislib.evaluate.compare import compare
from thesislib.evaluate.stats import by_verdict
from thesislib.records import measurement
from thesislib.records.measurement import Measurement, in_markdown


def methods_caption(results: Results, q: QuantChapter) -> str:
    """What `methods` finds."""
    rounding, plain, *_ = one_change(q)
    models = [pick(main_models(q), bits=4, method=m, corrected=True) for m in ("rounding", "GPTQ")]
    test = tested(results, {"plain": (rounding, plain)})["plain"]
    eora = [compare(results[None, HELD_OUT], results[c.key, HELD_OUT]) for c in models]
    return (
        f"From left to right GPTQ is {versus(test)} rounding on its own grid; with its columns ordered, GPTQModel's "
        f"way or the chapter's, it wins. After EoRA it hardly matters which of the two came before ({factor(eora[0])} "
        f"and {factor(eora[1])} dense)."
    )


def eora_sentence(results: Results, p: QuantChapter) -> str:
    """Does GPTQ still matter once EoRA follows?"""
    tests = method_comparisons(results, main_models(p), HELD_OUT)
    said = []
    for bits in p.bits:
        gptq, rounding = (pick(main_models(p), method=m, bits=bits, corrected=True) for m in ("GPTQ", "rounding"))
        if c := tests.get(against(gptq, rounding)):
            said.append(f"{versus(c)} rounding at {bits} bits ({ratio(c)})")
    return f"With EoRA on top, GPTQ is {' and '.join(said)}." if said else "EoRA was not run."


def textbook_sentence(results: Results, p: QuantChapter, bits: int = 4) -> str:
    """Does GPTQ by the plain recipe beat rounding here, and which single change helps most?"""
    found = textbook(results, p, bits)
    best, zero_point = found.changes[found.best], found.zero_point
    also = (
        f" With an integer zero-point it is {versus(zero_point)} rounding ({ratio(zero_point)})." if zero_point else ""
    )
    most = f" Of single changes {found.best} gains most ({ratio(best)})." if best.verdict() == "better" else ""
    return (
        f"At {bits} bits, on held-out text, GPTQ without act-order on {p.calibration * p.length:,} tokens is "
        f"{versus(found.plain)} rounding ({ratio(found.plain)}).{also}{most}"
    )


def gptqmodel_sentence(found: Mapping[str, Any]) -> str:
    """GPTQModel, whose own order goes by groups, beside rounding and this package's GPTQ, on held-out text."""
    values = {
        row["model"]: [r["perplexity"] for r in found["rows"] if r["model"] == row["model"]] for row in found["rows"]
    }
    (dense,), (rounding,), (theirs,) = (values[name] for name in ("dense", "rounding", "GPTQModel"))
    ours, plain = (values[f"thesislib, {name}"] for name in ("the same settings", "from left to right"))
    apart = max(max(several) / min(several) - 1 for several in (ours, plain))
    lost = min(plain) > rounding
    note = (
        f" Two numbers are of two runs, on one thread and on two: these add in another order, which alone moves GPTQ's "
        f"result by up to {apart:.1%}."
        if apart
        else ""
    )
    return (
        f"GPTQModel {found['GPTQModel']} orders columns by groups. Calibrated on as many tokens it has {theirs:.2f} on "
        f"held-out text, rounding has {rounding:.2f} and the dense model {dense:.2f} (float32). GPTQ here has "
        f"{_both(ours)} with the same settings; with columns from left to right it has {_both(plain)}"
        f"{', more than rounding' * lost}.{note}"
    )


def _both(values: Iterable[float]) -> str:
    return " and ".join(f"{x:.2f}" for x in values)


def kinds_sentence(results: Results, p: QuantChapter) -> str:
    """Where the plain recipe loses."""
    tests = by_projection(results, p)
    better, worse, _ = by_verdict(tests).values()
    if not tests:
        return "Kinds of projections were not run one at a time."
    if not worse:
        return "At no kind of projection is plain GPTQ worse than rounding."
    lost = f"{' and '.join(worse)}{' alone' * (len(worse) == 1)} ({', '.join(ratio(tests[kind]) for kind in worse)})"
    return f"The loss comes from {lost}.{f' At {listed(better)} plain GPTQ is better than rounding.' * bool(better)}"


def calibration_sentence(results: Results, p: QuantChapter) -> str:
    """`calibration_noise` in words."""
    seeds, amounts = calibration_noise(results, p)
    if len(seeds) < 2:
        return "Other windows of calibration text were not run."
    more = together(f"{v:.2f} with {name}" for name, v in amounts.items()) if amounts else ""
    return (
        f"At 4 bits perplexity on held-out text ends at {together(f'{v:.2f}' for v in seeds)} for {len(seeds)} choices "
        f"of {p.calibration} windows, {max(seeds) / min(seeds) - 1:.1%} apart.{f' It ends at {more}.' * bool(more)}"
    )


def bytes_sentence(results: Results, p: QuantChapter) -> str:
    """Is a correction worth its bytes: the fewer bits with EoRA against more bits without?"""
    few, many = few_and_many_bits(results, p)
    if few is None or many is None:
        return "3 bits with EoRA against 4 bits without were not run."
    c = compare(many, few)
    lead = "Spend the bytes on the fourth bit: " * (c.verdict() == "worse" and few.disk_bytes > many.disk_bytes)
    return (
        f"{lead}3 bits with EoRA of rank {p.rank} take {few.disk_bytes / 1e6:.1f} MB and have {few.value:.1f} on "
        f"WikiText-2 test, 4 bits without take {many.disk_bytes / 1e6:.1f} MB and have {many.value:.1f} ({ratio(c)}; "
        f"both calibrated on {p.calibration} windows of web text)."
    )


def more_sentence(results: Results, p: QuantChapter) -> str:
    """What more and nearer calibration text changes on the test."""
    changes = [
        f"{name} by {factor(tests[PPL], '.3f')}" for name, tests in more_comparisons(results, p).items() if PPL in tests
    ]
    if not changes:
        return "Other calibration text was not run."
    return (
        f"Calibrated on {MORE['windows']} windows of Wikipedia instead of {p.calibration} of web text, perplexity on "
        f"WikiText-2 test changes for {' and for '.join(changes)}. Part of that gain is the kind of text: the test is "
        "from Wikipedia too."
    )


def sink_sentence(shares: Mapping[str, float], length: int) -> str:
    """How much of X^T X is the first token's (see `thesislib.chapters.ch05_runs.sink_shares`)."""
    largest = max(shares, key=shares.get)
    _, block, projection = largest.split(".")
    large, at_v = [v for v in shares.values() if v > 0.1], [v for name, v in shares.items() if name.endswith("v_proj")]
    return (
        f"The sum over tokens is the trace of XᵀX. The first of {length} tokens makes at most {max(at_v):.1%} of it at "
        f"v_proj. At block {block}'s {projection} it makes {shares[largest]:.0%}, and over 10% at {len(large)} of "
        f"{len(shares)} projections."
    )


def grid_sentence(rounded: OwnGrid) -> str:
    """The same in words."""
    return (
        "Rounded to its own grid (groups of 32, a floating minimum), the largest change of a weight in "
        f"{rounded.linears} linears is {rounded.lost:g}; with an integer zero-point instead, the mean change is "
        f"{rounded.steps:.2f} steps."
    )


def layer_sentence(errors: Mapping[str, Mapping[str, float]], results: Results, q: QuantChapter) -> str:
    """What errors of single layers say of the tokens' weights, and what perplexity says."""
    best = leave_one_out(q)[0]
    equal = pick(leave_one_out(q), varied="token weighting")
    c = tested(results, {"equal": (best, equal)})["equal"]
    at_v = layer_table(errors).loc["v_proj"]
    return (
        f"The mean relative error of v_proj's output on held-out text is {at_v['GPTQ']:.4f} with tokens at unit norm "
        f"and {at_v['GPTQ, tokens equal']:.4f} with equal weights ({at_v['rounding']:.4f} by rounding): an error that "
        f"is small on average says little about the one token that everyone reads. Perplexity with equal weights is "
        f"{versus(c)} with unit norms ({ratio(c)})."
    )


def cost_sentence(results: Results) -> str:
    """How long this chapter's own measurements took; the dense model's on the test text and its answers are other
    chapters'."""
    return measurement.cost(m for m in results.values() if "cell" in m.chapter)


def starts_sentence(results: Results, p: QuantChapter) -> str:
    """`starts` in words."""
    both = starts(results, p)
    if both is None:
        return "Starts of LoRA were not run."
    first = lora_starts(p)[0].stages[-1]

    def ends(start: Start) -> str:
        return f"{np.mean(list(start.after.values())):.2f} (rate {start.rate:g})"

    _, worse, undecided = map(len, by_verdict(both.tests).values())
    seeds = len(both.tests)
    told = "for every seed" if not worse + undecided else f"for {seeds - worse - undecided} of {seeds} seeds"
    ahead = np.mean(list(both.eora.after.values())) < np.mean(list(both.usual.after.values()))
    after = {
        (c.rate, c.seed): results[c.key, HELD_OUT].value
        for c in lora_starts(p)
        if c.corrected and (c.key, HELD_OUT) in results
    }
    lost = [
        v for (rate, _), v in after.items() if rate != both.eora.rate and both.usual.before and v > both.usual.before
    ]
    tried = sum(rate != both.eora.rate for rate, _ in after)
    caution = (
        f" The rate decides: at {first.learning_rate:g} {len(lost)} of {tried} seeds end far worse "
        f"({' and '.join(f'{v:.1f}' for v in lost)}) than the quantised model without EoRA or training "
        f"({both.usual.before:.2f})."
        if lost
        else ""
    )
    return (
        f"After {first.steps} steps at 3 bits, LoRA that starts from EoRA's correction is "
        f"{'ahead' if ahead else 'behind'}: held-out perplexity {ends(both.eora)} on average against "
        f"{ends(both.usual)} from the usual start, {'better' if ahead else 'better only'} {told}.{caution}"
    )


def answer(results: Results) -> str:
    """The chapter's answer, in two sentences."""
    p, q = recorded_parameters(), ablation_parameters()
    plain = textbook(results, q).plain
    worse = by_verdict(by_projection(results, q))["worse"]
    gptq, eora = (
        compare(results[None, PPL], results[pick(main_models(p), method="GPTQ", bits=4, corrected=e).key, PPL])
        for e in (False, True)
    )
    return (
        f"From left to right GPTQ is {versus(plain)} rounding ({factor(plain, '.3f')} on held-out text): at "
        f"{' and '.join(worse)} it overlooks the token that all others read. Set up better, 4 bits cost {factor(gptq)} "
        f"the dense perplexity on WikiText-2, and {factor(eora)} with EoRA (calibrated on {p.calibration} windows of "
        "web text)."
    )


def short(results: Results) -> str:
    """The answer in about ten words."""
    p = recorded_parameters()
    gptq, eora = (
        results[pick(main_models(p), method="GPTQ", bits=4, corrected=e).key, PPL].value / results[None, PPL].value
        for e in (False, True)
    )
    return f"4 bits cost {gptq - 1:.0%} of perplexity, with EoRA {eora - 1:.0%}; plain GPTQ loses to rounding."


def protocol(results: Recorded) -> str:
    """Text, windows, questions and the dense model's values."""
    p, q = recorded_parameters(), ablation_parameters()
    test, held_out = results[None, PPL], results[None, HELD_OUT]
    asked = ", ".join(f"{next(iter(ms.values())).n:,} {task}" for task, ms in answers(results).items() if ms)
    missing = [c for c in on_the_test(p) if (c.key, PPL) not in results]
    note = f" Not yet measured on WikiText-2: {len(missing)} models of the table." if missing else ""
    return (
        f"WikiText-2 test, {test.n} windows of {p.length}: dense {number(test)}. Held-out Wikipedia, on which settings "
        f"are chosen, {held_out.n} windows: dense {number(held_out)}. TriviaQA: {asked}. Calibration on web text, "
        f"{q.calibration} windows to compare settings, {p.calibration} in the table.{note}"
    )


def headline(results: Results) -> str:
    """What chapter 5 found, in sentences: the fold "All findings in one place"."""
    p, q = recorded_parameters(), ablation_parameters()
    reached = []
    for text, configs in (
        (f"{p.calibration} windows of web text", [c for c in main_models(p) if c.method == "GPTQ"]),
        (f"{MORE['windows']} windows of Wikipedia", [c for bits in p.bits for c in more_calibration(p, bits)]),
    ):
        values = [f"{c.short} {m.value:.1f}" for c in configs if (m := results.get((c.key, PPL)))]
        reached += [f"calibrated on {text}: {', '.join(values)}"] if values else []
    best = tested(results, {"best": (one_change(q)[1], leave_one_out(q)[0])})["best"]
    dense = results[None, PPL]
    return in_markdown(
        f"{textbook_sentence(results, q)} {kinds_sentence(results, q)} {gptqmodel_sentence(read_gptqmodel())} All of "
        f"the chapter's changes together multiply the plain recipe's perplexity by {np.exp(best.difference):.2f}. "
        f"{eora_sentence(results, p)} On WikiText-2 test (dense {dense.value:.1f}), {'; '.join(reached)}. "
        f"{bytes_sentence(results, p)} {starts_sentence(results, q)}"
    )


def pruned_sentence(results: Results, p: QuantChapter) -> str:
    """`pruned_comparisons` in words."""
    tests = pruned_comparisons(results, p)
    said = [
        f"On {label} GPTQ is {versus(tests[f'{label}: GPTQ against rounding'])} rounding "
        f"({ratio(tests[f'{label}: GPTQ against rounding'])}), and EoRA {versus(tests[f'{label}: EoRA against none'])} "
        f"none ({ratio(tests[f'{label}: EoRA against none'])})."
        for label in dict.fromkeys(name.partition(": ")[0] for name in tests)
    ]
    return " ".join(said) or "Pruned models were not run."


def answers_sentence(results: Recorded) -> str:
    """Closed-book questions of the quantised models: by the scoring that gives all as many words, and by the thesis's
    rule."""
    fair, rule = (
        [on_largest_sample(results.pool, *two, measure) for two in itertools.pairwise(QUANTISED)]
        for measure in (scored_by(CLOSED, AT_ONCE.metric), CLOSED)
    )
    if not all([*fair, *rule]):
        return "Chapter 6's quantised models have not answered yet."

    def shown(pairs) -> tuple[Measurement, str, str]:
        ((dense,), (gptq,)), (_, (eora,)) = pairs
        costs, gains = points(compare(dense, gptq)), points(compare(gptq, eora))
        return dense, f"{gptq.value:.1%} ({costs})", f"{eora.value:.1%} ({gains})"

    dense, gptq, eora = shown(fair)
    thesis, gptq_there, eora_there = shown(rule)
    return (
        f"Cut at its first line and at {FIRST_WORDS} words, the dense model's answer is right for {dense.value:.1%} of "
        f"{dense.n:,} closed-book questions. Q answers {gptq}, and EoRA brings that to {eora}. By the thesis's rule, "
        f"which counts a name anywhere in the answer, the same go from {thesis.value:.1%} to {gptq_there} and to "
        f"{eora_there}."
    )


# ---------------------------------------------------------------- answers to the exercises


def rank_in_bits(results: Results, p: QuantChapter) -> str:
    """What a correction costs in bits a weight."""
    few, many = (pick(main_models(p), method="GPTQ", bits=bits, corrected=bits == 3) for bits in (3, 4))
    m, other = results[few.key, PPL], results[many.key, PPL]
    quantised, eora = (stage_report(m, word) for word in ("gptq", "eora"))
    weights = 8 * quantised["bytes"] / quantised["bits_per_weight"]
    per_weight = 8 * eora["bytes"] / weights
    return (
        f"The corrections take {eora['bytes'] / 1e6:.1f} MB for {weights / 1e6:.0f} M weights: {per_weight:.2f} bits a "
        f"weight. With scales and zero-points 3 bits are {quantised['bits_per_weight']:.2f}, so together "
        f"{quantised['bits_per_weight'] + per_weight:.2f}, and 4 bits are "
        f"{stage_report(other, 'gptq')['bits_per_weight']:.2f}. A matrix grows with the product of its sides and a "
        "rank with their sum, so wider models get it cheaper."
    )


def groups_or_rank(results: Results, q: QuantChapter) -> str:
    """Five megabytes at 3 bits: smaller groups, or EoRA of rank 8?"""
    groups = {c.group: c for c in bits_by_group(q) if (c.method, c.bits) == ("GPTQ", 3)}
    rank = pick(eora_ranks(q), rank=8)
    start, small, eora = (results[c.key, HELD_OUT] for c in (groups[64], groups[32], rank))
    better = "smaller groups" if small.value < eora.value else "the rank"
    return (
        f"Groups of 32 take {(small.disk_bytes - start.disk_bytes) / 1e6:.1f} MB more and rank 8 "
        f"{(eora.disk_bytes - start.disk_bytes) / 1e6:.1f} MB. Held-out perplexity falls from {start.value:.2f} to "
        f"{small.value:.2f} ({ratio(compare(start, small))}) and to {eora.value:.2f} ({ratio(compare(start, eora))}): "
        f"spend them on {better}. A scale is fitted to its own 32 weights, while rank 8 has to serve a whole matrix."
    )


CHAPTER = Chapter(
    "05_quantisation",
    "quantisation and compensation",
    QuantChapter,
    recorded_parts,
    key,
    read_recorded,
    headline,
    RECORDED,
    reads=("06_evaluation",),
    opening=Opening(
        question="What do 4 bits a weight cost a small model, and why does plain GPTQ lose to rounding here?",
        answer=answer,
        short=short,
        protocol=protocol,
        learn="How GPTQ pushes rounding errors along a row, and how EoRA cuts an SVD.",
    ),
)
