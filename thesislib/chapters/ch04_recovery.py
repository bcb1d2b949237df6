"""Chapter 4, LoRA recovery: what training wins back of what pruning cost, on which text, and what of it is only
adaptation."""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from thesislib.chapters import scorings
from thesislib.chapters.ch04_runs import (
    CLOSED,
    PPL,
    RECORDED,
    Configuration,
    LoraChapter,
    Results,
    for_claims,
    is_main,
    key,
    longer,
    merges,
    rates,
    read_recorded,
    recorded_parts,
)
from thesislib.chapters.chapter import WIKITEXT, Chapter, Opening
from thesislib.chapters.labels import thesis_of
from thesislib.chapters.phrases import (
    factor,
    interval,
    number,
    p_value,
    ratio,
    ratio_and_p,
    sample_note,
    times,
    written,
)
from thesislib.chapters.pool import Recorded, largest, scored_by
from thesislib.chapters.thesis import thesis_row
from thesislib.chapters.trainings import Records, compare_models, on_largest_sample, spread
from thesislib.compress.lora.sequences import TEXTS
from thesislib.evaluate import perplexity, triviaqa
from thesislib.evaluate.stats import (
    Comparison,
    Ranking,
    bootstrap_mean,
    by_verdict,
    friedman,
    holm_adjusted,
    paired_bootstrap,
    paired_means,
    signed_rank,
)
from thesislib.experiment import DENSE
from thesislib.records import measurement
from thesislib.records.measurement import Measurement, in_markdown

LETTERS = {"wikitext": "W", "trivia": "T"}
NAMES = {"wikitext": "WikiText", "trivia": "questions"}
THESIS_RULE = "the thesis's rule (a name anywhere in the answer)"


def trained_models(results: Results) -> list[str]:
    """The models that were trained, dense last."""
    trained = dict.fromkeys(c.pruned for c, _ in results if c.text and not c.after)
    return [*(m for m in trained if m != DENSE), *(m for m in trained if m == DENSE)]


def _texts(results: Results) -> list[str]:
    return [t for t in TEXTS if any(c.text == t for c, _ in results)]


def _get(results: Results, task: str, *args, **settings) -> Measurement | None:
    return results.get((Configuration(*args, **settings), task))


def perplexities(results: Results) -> dict[tuple[str, str], Measurement]:
    """{(model, text or ""): perplexity} of the models untrained and after their first training.

    In a recorded run all chapters' measurements on the most windows, once all of these models have one on so many.
    """
    own = {
        (model, text): m
        for model in trained_models(results)
        for text in ("", *_texts(results))
        if (m := _get(results, PPL, model, text or None))
    }
    if not isinstance(results, Recorded):
        return own
    labels = {names: _trained(names[0], LETTERS.get(names[1], "")) for names in own}
    larger = largest(results.pool, WIKITEXT, labels.values())
    if own.keys() != {names for names, label in labels.items() if label in larger}:
        return own
    whole = {names: larger[label] for names, label in labels.items()}
    return whole if min(m.n for m in whole.values()) > max(m.n for m in own.values()) else own


def _beside(results: Results) -> Iterator[tuple[Configuration, Measurement]]:
    """Perplexities of the models whose adapter, if they have one, is kept beside the weights; not those pruned after
    training."""
    return ((c, m) for (c, task), m in results.items() if task == PPL and c.merge == "beside" and not c.after)


def recovery_table(results: Results) -> pd.DataFrame:
    """One row a model: perplexity untrained and trained on each text as a ratio to the untrained dense model's, then
    itself, with the thesis's own figures beside it."""
    rows, measured = [], perplexities(results)
    for model in trained_models(results):
        ms = {text: measured[model, text] for text in ("", *_texts(results)) if (model, text) in measured}
        row: dict[str, Any] = {"model": model}
        row |= {f"x dense{_plus(text)}": number(_to_dense(m, measured), ".3g") for text, m in ms.items()}
        row |= {f"thesis: x dense{_plus(text)}": _thesis_ratio(model, text) for text in ms}
        row |= {f"perplexity{_plus(text)}": f"{m.value:.4g}" for text, m in ms.items()}
        rows.append(row | {"windows": next(iter(ms.values())).n})
    return pd.DataFrame(rows).set_index("model")


def _to_dense(m: Measurement, measured: Mapping[tuple[str, str], Measurement]) -> Measurement:
    return perplexity.relative(m, measured[DENSE, ""])


def _thesis_ratio(model: str, text: str) -> str:
    row = thesis_of(_trained(model, LETTERS.get(text, "")))
    return written(row.perplexity / thesis_row(DENSE).perplexity, ",.3g") if row else ""


def _plus(text: str) -> str:
    return f", +{LETTERS[text]}" if text else ""


def recovered(results: Results, text: str = "wikitext") -> pd.DataFrame:
    """How much of the loss that pruning caused is gone after training, by two countings.

    naive: what training gained, as a share of the gap to the dense model. fair: by how much the gap to the dense model
    shrank, both with the same training; what the dense model gains too is adaptation to the text and not recovery. The
    interval is the bootstrap's over documents. cost, naive left and fair left are gaps in nats a token, before training
    and after it by each counting.
    """
    rows = []
    measured = perplexities(results)
    dense, control = measured.get((DENSE, "")), measured.get((DENSE, text))
    for model in trained_models(results):
        before, after = measured.get((model, "")), measured.get((model, text))
        if model == DENSE or None in (before, after, control):
            continue
        nats_dense, nats_control, nats_before, nats_after = map(_per_token, (dense, control, before, after))
        gap = nats_before - nats_dense
        row: dict[str, Any] = {"model": model, "gap before, nats": f"{gap.mean():.3f}", "cost": float(gap.mean())}
        for name, left in (("naive", nats_after - nats_dense), ("fair", nats_after - nats_control)):
            value = float((gap - left).sum() / gap.sum())
            bounds = bootstrap_mean(gap - left, gap, before.column("document"))
            row |= {f"recovered, {name}": interval(value, *bounds, ".0%"), name: value}
            row[f"{name} left"] = float(left.mean())
        rows.append(row)
    return pd.DataFrame(rows).set_index("model")


def _per_token(m: Measurement) -> np.ndarray:
    return np.array(m.column("nats")) / np.array(m.column("tokens"))


def adaptation(results: Results, text: str = "wikitext") -> Comparison:
    """The dense model trained on a text against itself untrained."""
    measured = perplexities(results)
    return perplexity.compare(measured[DENSE, ""], measured[DENSE, text])


def control_sentence(results: Results, text: str = "wikitext") -> str:
    """What the dense model, which lost nothing, gains by the same training."""
    c = adaptation(results, text)
    verb = {"better": "lowers", "worse": "raises"}.get(c.verdict(), "does not measurably change")
    return (
        f"The same training on {NAMES[text]} {verb} the dense model's perplexity, though it lost nothing to pruning: "
        f"{ratio(c)}."
    )


def counted_sentence(results: Results, model: str = "D2", text: str = "wikitext") -> str:
    """Both countings of what one model wins back, and the fair one of all."""
    shares = recovered(results, text)
    naive, fair = shares.naive[model], shares.fair
    return (
        f"Counted against the untrained dense model, LoRA repairs {naive:.0%} of what pruning cost {model}"
        f"{', which cannot be' if naive > 1 else ''}. Against the dense model with the same LoRA it repairs "
        f"{fair[model]:.0%}; over all {len(shares)} pruned models {fair.min():.0%} to {fair.max():.0%}."
    )


def converged_sentence(results: Results) -> str:
    """How long the trainings were, and how many had not converged."""
    reports = [training_report(m) for c, m in _beside(results) if c.text and is_main(c)]
    rising = sum(r["best_step"] == r["curve"][-1]["step"] for r in reports)
    count = "Every training" if rising == len(reports) else f"{rising} of {len(reports)} trainings"
    tokens = statistics.median(r["tokens"] for r in reports)
    return (
        f"Each number is of a single training of {tokens:,.0f} tokens. {count} did "
        "best on held-out text at the last step: not converged."
    )


def _against_untrained(results: Results, task: str) -> dict[Configuration, Comparison]:
    """Each trained model against itself untrained, Holm-adjusted over all."""
    pairs = {}
    for (c, w), m in results.items():
        base = _get(results, task, c.pruned)
        if w == task and c.text and c.merge == "beside" and is_main(c) and base is not None:
            pairs[c] = (perplexity if task == PPL else triviaqa).compare(base, m)
    return holm_adjusted(pairs)


def answers_table(pool: Records, models: Iterable[str], task: str = CLOSED) -> pd.DataFrame:
    """Answers by every scoring, of each model untrained and after each training, from the largest measurement of
    each."""
    return scorings.answers_table(largest(pool, task, [_trained(m, end) for m in models for end in ("", "T", "W")]))


def _trained(model: str, letter: str) -> str:
    """The label of a model after a training: the dense one's is the letter alone."""
    return (letter or DENSE) if model == DENSE else f"{model}+{letter}" if letter else model


def texts_compared(pool: Records, models: Iterable[str], measure: str = CLOSED) -> dict[str, Comparison]:
    """Answers after training on WikiText against after training on questions, for each model that was trained on both
    and asked, on the largest sample that both were asked. Holm-adjusted.

    The test counts how far trainings lie apart, see `thesislib.chapters.trainings`.
    """
    tests, apart = {}, spread(pool, measure)
    for model in models:
        questions, wikitext = (_trained(model, letter) for letter in "TW")
        if both := on_largest_sample(pool, questions, wikitext, measure):
            tests[model] = compare_models(questions, both[0], wikitext, both[1], apart)
    return holm_adjusted(tests)


def texts_sentence(pool: Records, models: Sequence[str], task: str = CLOSED) -> str:
    """`texts_compared` in words, a sentence a scoring."""
    said, verdicts = [], set()
    for metric in (None, *scorings.SCORINGS):
        tests = texts_compared(pool, models, scored_by(task, metric) if metric else task)
        better, worse, _ = by_verdict(tests, higher_is_better=True).values()
        found = {"better": better, "worse": worse}
        verdicts |= {word for word, names in found.items() if names}
        scored = " that it scores" * (len(tests) < len(models))
        words = [f"{word} for {_of_all(names, len(tests), scored)}" for word, names in found.items() if names]
        by = f"By {metric or THESIS_RULE}"
        if words:
            said.append(f"{by} training on WikiText is {' and '.join(words)}.")
        elif tests:
            said.append(f"{by} neither is better.")
    first = "whether WikiText or questions is the better training depends on the scoring. " * (len(verdicts) > 1)
    return f"{task.capitalize()}: {first}{' '.join(said) or 'not measured.'}"


def _of_all(names: Sequence[str], n: int, which: str = "") -> str:
    return (
        f"all {n} models{which}"
        if len(names) == n > 1
        else " and ".join(x for x in (", ".join(names[:-1]), names[-1]) if x)
    )


def other_measure_sentence(results: Results, text: str = "trivia") -> str:
    """What training on questions does to perplexity, against the untrained models."""
    tests = {c.pruned: test for c, test in _against_untrained(results, PPL).items() if c.text == text}
    better, worse, _ = by_verdict(tests).values()
    said = [
        f"{verb} perplexity on Wikipedia text for {_of_all(names, len(tests))} ({_range(tests[x] for x in names)})"
        for verb, names in (("raises", worse), ("lowers", better))
        if names
    ]
    changes = " and ".join(said) or "does not measurably change perplexity on Wikipedia text"
    return f"Training on {NAMES[text]} {changes}." if tests else f"Training on {NAMES[text]} was not run."


def _range(tests: Iterable[Comparison]) -> str:
    """The smallest and the largest ratio."""
    low, *_, high = [factor(c) for c in sorted(tests, key=lambda c: c.difference)] * 2
    return low if low == high else f"{low} to {high}"


def orders(results: Results) -> dict[Configuration, Comparison]:
    """Perplexity of each model whose width was pruned after training against the same pruned before."""
    tests = {}
    for (c, task), late in results.items():
        if task == PPL and c.after and (early := _get(results, PPL, f"{c.pruned}+{c.after}", c.text)) is not None:
            tests[c] = perplexity.compare(early, late)
    return tests


def order_sentence(results: Results) -> str:
    """`orders` in words."""
    tests = " and ".join(f"{ratio(test)} after training on {NAMES[c.text]}" for c, test in orders(results).items())
    return (
        f"Pruned after training instead of before, perplexity is {tests}. These intervals are of documents; how far "
        "trainings lie apart is counted on the page of claims."
    )


def mergings(results: Results) -> dict[tuple[str, str], tuple[Measurement, Measurement]]:
    """{(label, way): (perplexity with the adapter beside the weights, merged)} of every adapter that was merged."""
    return {(c.label, way.merge): (m, results[way, PPL]) for c, m in _beside(results) for way in merges(c)}


def merge_table(results: Results) -> pd.DataFrame:
    """The same adapter kept beside the weights, merged under the mask, and merged dense: perplexity, zeros and
    bytes."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for (label, way), (beside, merged) in mergings(results).items():
        rows.setdefault((label, "beside"), _merge_row(beside))
        rows[label, way] = _merge_row(merged, ratio(perplexity.compare(beside, merged)))
    return pd.DataFrame(rows.values(), pd.MultiIndex.from_tuples(rows, names=["model", "adapter"]))


def _merge_row(m: Measurement, against_beside: str = "") -> dict[str, str]:
    size = m.made["bytes"]
    return {
        "perplexity": number(m),
        "against beside, paired": against_beside,
        "zeros": f"{1 - size['nonzero_parameters'] / size['parameters']:.1%}",
        "MB on disk": f"{size['bytes_on_disk'] / 1e6:.1f}",
    }


def merge_sentence(results: Results) -> str:
    """What merging costs, in words."""
    ways = mergings(results).items()
    masked = ", ".join(
        f"{label} {factor(perplexity.compare(*pair), '.3f')}" for (label, way), pair in ways if way == "masked"
    )
    dense = [pair for (_, way), pair in ways if way == "dense"]
    moved = [merged.value / beside.value for beside, merged in dense]
    grown = [merged.disk_bytes / beside.disk_bytes - 1 for beside, merged in dense]
    return (
        f"Merged under the mask, perplexity changes: {masked}. Merged dense it stays where it was "
        f"(x {min(moved):.3f} to x {max(moved):.3f}), and the file grows by {min(grown):.1%} to {max(grown):.1%}."
    )


@dataclass(frozen=True)
class Seeds:
    """One training with several seeds.

    Attributes:
        label: of the model.
        values: perplexity by seed.
        untrained: the perplexity before training.
        test: Friedman's over documents, whether seeds rank alike; None for fewer than three seeds.
    """

    label: str
    values: np.ndarray
    untrained: float
    test: Ranking | None

    @property
    def deviation(self) -> float:
        """Standard deviation over seeds."""
        return self.values.std(ddof=1)

    @property
    def share_of_gain(self) -> float:
        """The standard deviation as a share of what training gains."""
        return self.deviation / (self.untrained - self.values.mean())


def seeds(results: Results) -> Seeds:
    """The training with the most seeds."""
    runs: dict[Configuration, list[Measurement]] = {}
    for c, m in _beside(results):
        if c.text and c.learning_rate is None:
            runs.setdefault(dataclasses.replace(c, seed=0), []).append(m)
    config, ms = max(runs.items(), key=lambda pair: len(pair[1]))
    test = None
    if len(ms) > 2:
        test = friedman({str(i): m.column("nats") for i, m in enumerate(ms)}, ms[0].column("document"))
    untrained = _get(results, PPL, config.pruned)
    return Seeds(config.label, np.array([m.value for m in ms]), untrained.value if untrained else math.nan, test)


def seeds_sentence(results: Results) -> str:
    """How far seeds of one training lie apart."""
    one = seeds(results)
    if len(one.values) < 2:
        return f"{one.label} was trained with one seed."
    told = ""
    if test := one.test:
        verdict = "The seeds differ" if test.p < 0.05 else "The seeds do not measurably differ"
        told = f" {verdict} (Friedman test over {test.n} documents, {p_value(test.p)})."
    return (
        f"{one.label} with {len(one.values)} seeds ends at {', '.join(f'{v:.2f}' for v in one.values)}: a standard "
        f"deviation of {one.deviation:.2f}, {one.share_of_gain:.1%} of what training gains.{told}"
    )


def tests_table(results: Results) -> pd.DataFrame:
    """Some of the chapter's comparisons by three paired tests that assume different things of the losses, ratios of
    perplexity."""
    C = Configuration
    pairs = {
        "D2 to D2+W": (C("D2"), C("D2", "wikitext")),
        "dense to W": (C(DENSE), C(DENSE, "wikitext")),
        "dense to D2+W": (C(DENSE), C("D2", "wikitext")),
        "D2+W1:8+W to D2+W+W1:8": (C("D2+W1:8", "wikitext"), C("D2", "wikitext", after="W1:8")),
        "W2:4+W, beside to masked": (C("W2:4", "wikitext"), C("W2:4", "wikitext", merge="masked")),
        "D2+W, seed 0 to seed 1": (C("D2", "wikitext"), C("D2", "wikitext", seed=1)),
    }
    rows = []
    for name, (first, second) in pairs.items():
        a, b = results.get((first, PPL)), results.get((second, PPL))
        if a is None or b is None:
            continue
        x, y, documents = _per_token(a), _per_token(b), a.column("document")
        tests = (
            paired_means(x, y, documents, a.column("tokens")),
            paired_bootstrap(x, y, documents, a.column("tokens")),
            signed_rank(x, y, documents),
        )
        rows.append({"comparison": name} | {c.test: ratio_and_p(c) for c in tests})
    return pd.DataFrame(rows).set_index("comparison")


def training_report(m: Measurement) -> dict:
    """What the LoRA stage said of itself: curve, validation, tokens, seconds."""
    return next(r for r in reversed(m.made["reports"]) if "curve" in r)


def training_table(results: Results) -> pd.DataFrame:
    """What each training saw and took."""
    rows = []
    for c, m in _beside(results):
        if c.text:
            r = training_report(m)
            before = r["validation"][0]["loss"] if r["validation"] else math.nan
            rows.append(
                {
                    "model": c.label,
                    "seed": c.seed,
                    "learning rate": f"{m.stages[-1]['lora']['learning_rate']:g}",
                    "tokens": r["tokens"],
                    "M trained": f"{r['parameters'] / 1e6:.2f}",
                    "held-out loss before": f"{before:.3f}",
                    "best": f"{r['best_loss']:.3f}",
                    "at step": r["best_step"],
                    "tokens/s": r["tokens_per_second"],
                }
            )
    return pd.DataFrame(rows).set_index("model")


def cost_sentence(results: Results) -> str:
    """How long all trainings took and on what; `thesislib.records.measurement.cost` says the same of measuring."""
    reports = {}
    for m in results.values():
        for stage, r in zip(m.stages, m.made["reports"], strict=True):
            if "lora" in stage:  # one training may stand behind many rows
                training = [m.made["base"], {**stage["lora"], "merge": ""}, r["curve"][:1]]
                reports[json.dumps(training, sort_keys=True)] = r
    hours = sum(r["seconds"] for r in reports.values()) / 3600
    each = statistics.median(r["tokens"] for r in reports.values())
    return (
        f"{len(reports)} trainings of {each:,.0f} tokens took {hours:.1f} hours. {measurement.cost(results.values())}"
    )


def by_rate(results: Results, p: LoraChapter, model: str | None = None) -> dict[float, Measurement]:
    """{learning rate: perplexity} of a model's training on the first text, by default the first pruned model's, lowest
    rate first."""
    tried = [Configuration(model or p.pruned[0], p.texts[0]), *rates(p, model)]
    return dict(sorted((c.learning_rate or p.learning_rate, results[c, PPL]) for c in tried if (c, PPL) in results))


def rates_sentence(results: Results, p: LoraChapter) -> str:
    """Which learning rate did best on held-out text, for the first pruned model and for the control."""
    said = []
    for model in (p.pruned[0], DENSE):
        tried, label = by_rate(results, p, model), _trained(model, LETTERS[p.texts[0]])
        if len(tried) < 2:
            said.append(f"{label} has been trained with one learning rate only.")
            continue
        held_out = {rate: training_report(m)["best_loss"] for rate, m in tried.items()}
        losses = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in held_out.items())
        test = ", ".join(f"{rate:g}: {m.value:.2f}" for rate, m in tried.items())
        said.append(
            f"{label} has its lowest held-out loss with a learning rate of {min(held_out, key=held_out.get):g} "
            f"({losses}); the chapter trains with {p.learning_rate:g}. Perplexity on the test text decided nothing "
            f"({test})."
        )
    return " ".join(said)


def tokens_sentence(results: Results, p: LoraChapter) -> str:
    """What the first pruned model wins back, counted against the control, by how many tokens both are trained on."""
    model, text, shares = p.pruned[0], p.texts[0], {}
    before, dense = (results.get((Configuration(m), PPL)) for m in (model, DENSE))
    for steps in (None, *dict.fromkeys(c.steps for c in longer(p))):
        after, control = (results.get((Configuration(m, text, steps=steps), PPL)) for m in (model, DENSE))
        if None not in (before, dense, after, control):
            lost, left = (perplexity.compare(*pair).difference for pair in ((dense, before), (control, after)))
            shares[training_report(after)["tokens"]] = 1 - left / lost
    said = ", ".join(f"{share:.0%} after {tokens:,} tokens" for tokens, share in shares.items())
    more = "" if len(shares) > 1 else "; longer trainings are not run yet"
    return f"Counted against the dense model with the same training, {model} wins back {said}{more}."


def curves(results: Results) -> dict[str, dict[str, tuple[list, list]]]:
    """{text: {model: (curve, validation)}} of every training with the chapter's rate and first seed."""
    reports = {(c.text, c.pruned): training_report(m) for c, m in _beside(results) if c.text and is_main(c)}
    return {
        text: {model: (r["curve"], r["validation"]) for (on, model), r in reports.items() if on == text}
        for text in _texts(results)
    }


def points(results: Results) -> dict[str, dict[str, Measurement]]:
    """{model: {"untrained", "+W", "+T": perplexity as a ratio to the untrained dense model's}} for the chart."""
    measured, ratios = perplexities(results), {}
    for (model, text), m in measured.items():
        ratios.setdefault(model, {})[f"+{LETTERS[text]}" if text else "untrained"] = _to_dense(m, measured)
    return ratios


def samples(results: Results, p: LoraChapter) -> pd.DataFrame:
    """Greedy completions of the chapter's prompt."""
    rows = [
        {"model": c.label, f"{p.prompt} ...": m.chapter["text"].replace("\n", " ")}
        for c, m in _beside(results)
        if is_main(c)
    ]
    return pd.DataFrame(rows).set_index("model")


def _times(m: Measurement, dense: Measurement) -> str:
    return times(perplexity.relative(m, dense).value)


def agrees(results: Results, record: Results, text: str = "wikitext") -> bool:
    """Whether training moves each model's perplexity the way it does in the record, and leaves it on the same side of
    the dense model with the same training."""
    signs = []
    for found in (perplexities(results), perplexities(record)):
        control = found[DENSE, text].value
        signs.append(
            {m: (found[m, text].value < found[m, ""].value, found[m, text].value > control) for m, t in found if t}
        )
    return all(signs[1].get(model) == sign for model, sign in signs[0].items())


def headline(results: Recorded) -> str:
    """What chapter 4 found, in sentences: the fold "All findings in one place"."""
    measured = perplexities(results)
    before, after, dense, control = (measured[c, text] for c in ("D2", DENSE) for text in ("", "wikitext"))
    theirs = " to ".join(
        times(thesis_row("D2", letter).perplexity / thesis_row(DENSE).perplexity) for letter in ("", "W")
    )
    return in_markdown(
        f"LoRA on WikiText takes D2 from {_times(before, dense)} the dense model's perplexity to "
        f"{_times(after, dense)} (the thesis's model: {theirs}). The dense model with the same training goes to "
        f"{_times(control, dense)}. {counted_sentence(results)} {converged_sentence(results)} "
        f"{texts_sentence(results.pool, trained_models(results))} {order_sentence(results)}"
        f"{sample_note([m for (_, task), m in results.items() if task == PPL])}"
    )


def answer(results: Recorded) -> str:
    """The chapter's answer in two sentences."""
    row, fair = recovered(results).loc["D2"], recovered(results).fair
    return in_markdown(
        f"About half: LoRA on WikiText wins back {row['recovered, fair']} of what pruning cost D2, counted against the "
        f"dense model with the same training ({fair.min():.0%} to {fair.max():.0%} over {len(fair)} models). Without "
        f"that control it looks like {row.naive:.0%}, because training on Wikipedia helps any model on Wikipedia."
    )


def short(results: Recorded) -> str:
    """The answer in some ten words."""
    row = recovered(results).loc["D2"]
    return f"LoRA wins back {row.fair:.0%} of D2's loss, not {row.naive:.0%}."


def protocol(results: Recorded) -> str:
    """What was measured."""
    dense = perplexities(results)[DENSE, ""]
    asked = largest(results.pool, CLOSED, [DENSE])[DENSE]
    return (
        f"Perplexity of WikiText-2's test text, {dense.n} windows of {dense.settings['length']} tokens "
        f"(dense model {number(dense)}); TriviaQA closed book, {asked.n:,} questions."
        f"{sample_note([m for (_, task), m in results.items() if task == PPL])}"
    )


CHAPTER = Chapter(
    "04_lora_recovery",
    "LoRA recovery",
    LoraChapter,
    recorded_parts,
    key,
    read_recorded,
    headline,
    RECORDED,
    reads=("06_evaluation",),
    claims=for_claims,
    opening=Opening(
        question="How much of what pruning cost does LoRA win back, and how much is only adaptation to the text?",
        answer=answer,
        short=short,
        protocol=protocol,
        learn="How LoRA trains and merges, and how to count what it wins back.",
    ),
)
