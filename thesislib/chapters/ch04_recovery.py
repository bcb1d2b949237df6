"""Chapter 4, LoRA recovery: what training wins back of what pruning cost, on which text, and what of it is only
adaptation."""

import dataclasses
import json
import math
import statistics
from typing import Any

import numpy as np
import pandas as pd

from thesislib.chapters.ch04_runs import (
    CLOSED,
    OPEN,
    PPL,
    RECORDED,
    Configuration,
    LoraChapter,
    Results,
    asked,
    for_claims,
    key,
    merges,
    rates,
    read_recorded,
    recorded_parts,
)
from thesislib.chapters.chapter import Chapter
from thesislib.chapters.phrases import interval, listed, number, p_value, ratio, share, versus
from thesislib.chapters.thesis import thesis_row
from thesislib.compress.lora.sequences import TEXTS
from thesislib.errors import BadInput
from thesislib.evaluate import perplexity, triviaqa
from thesislib.evaluate.stats import (
    Comparison,
    bootstrap_mean,
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


def _models(results: Results) -> list[str]:
    """The models that were trained, dense last."""
    trained = dict.fromkeys(c.pruned for c, _ in results if c.text and not c.after)
    return [*(m for m in trained if m != DENSE), *(m for m in trained if m == DENSE)]


def _texts(results: Results) -> list[str]:
    return [t for t in TEXTS if any(c.text == t for c, _ in results)]


def _get(results: Results, what: str, *args, **settings) -> Measurement | None:
    return results.get((Configuration(*args, **settings), what))


def recovery_table(results: Results) -> pd.DataFrame:
    """One row a model: perplexity untrained and trained on each text, with the thesis's own figures beside it."""
    rows = []
    for model in _models(results):
        row = {"model": model, "untrained": number(_get(results, PPL, model))}
        for text in _texts(results):
            row[f"+{LETTERS[text]}"] = number(_get(results, PPL, model, text))
        for text in ("", *_texts(results)):
            letter = LETTERS.get(text, "")
            try:
                theirs = f"{thesis_row(model, letter).perplexity:,.1f}"
            except BadInput:
                theirs = ""
            row[f"thesis{' +' if letter else ': untrained'}{letter}"] = theirs
        rows.append(row)
    return pd.DataFrame(rows).set_index("model")


def recovered(results: Results, text: str = "wikitext") -> pd.DataFrame:
    """How much of the loss that pruning caused is gone after training, by two countings.

    naive: what training gained, as a share of the gap to the dense model. fair: by how much the gap to the dense model
    shrank, both trained alike; what the dense model gains too is adaptation to the text and not recovery. The interval
    is the bootstrap's over documents.
    """
    rows = []
    dense, control = _get(results, PPL, DENSE), _get(results, PPL, DENSE, text)
    for model in _models(results):
        before, after = _get(results, PPL, model), _get(results, PPL, model, text)
        if model == DENSE or None in (before, after, control):
            continue
        nats = {name: np.array(m.column("nats")) / np.array(m.column("tokens")) for name, m in
                (("dense", dense), ("control", control), ("before", before), ("after", after))}  # fmt: skip
        documents = before.column("document")
        gap = nats["before"] - nats["dense"]
        row: dict[str, Any] = {"model": model, "gap before, nats": f"{gap.mean():.3f}"}
        for name, gained in (
            ("naive", nats["before"] - nats["after"]),
            ("fair", gap - (nats["after"] - nats["control"])),
        ):
            low, high = bootstrap_mean(gained, gap, documents)
            row[f"recovered, {name}"] = interval(gained.sum() / gap.sum(), low, high, ".0%")
            row[name] = float(gained.sum() / gap.sum())
        rows.append(row)
    return pd.DataFrame(rows).set_index("model")


def control_sentence(results: Results, text: str = "wikitext") -> str:
    """What the dense model gains by the same training, and what is left of recovery when that is counted."""
    dense, control = _get(results, PPL, DENSE), _get(results, PPL, DENSE, text)
    c = perplexity.compare(dense, control)
    table = recovered(results, text)
    shares = ", ".join(f"{model} {row.naive:.0%} ({row.fair:.0%})" for model, row in table.iterrows())
    moved = "changes" if c.told else "does not measurably change"
    return (
        f"The same training on {text} {moved} the dense model's perplexity ({ratio(c)}, paired t test, "
        f"{p_value(c.p)}). "
        "Of the loss that pruning caused, training wins back, counted naively (and against the dense model "
        f"trained alike): {shares}."
    )


def _against_untrained(results: Results, what: str) -> dict[Configuration, Comparison]:
    """Each trained model against itself untrained, Holm-adjusted over all."""
    pairs = {}
    for (c, w), m in results.items():
        base = _get(results, what, c.pruned)
        if w == what and c.text and not c.after and c.merge == "beside" and asked(c) and base is not None:
            pairs[c] = (perplexity if what == PPL else triviaqa).compare(base, m)
    return holm_adjusted(pairs)


def answers_table(results: Results) -> pd.DataFrame:
    """TriviaQA closed and open book, untrained and after each training; * where the paired test tells it from
    untrained."""
    told = {(what, c): found.told for what in (CLOSED, OPEN) for c, found in _against_untrained(results, what).items()}
    rows = []
    for model in _models(results):
        row = {"model": model}
        for what in (CLOSED, OPEN):
            for text in (None, *_texts(results)):
                m = _get(results, what, model, text)
                star = "*" if text and told.get((what, Configuration(model, text))) else ""
                name = f"{what}{f', +{LETTERS[text]}' if text else ''}"
                row[name] = "not asked" if m is None else share(m).replace("%", f"%{star}", 1)
        rows.append(row)
    return pd.DataFrame(rows).set_index("model")


def _texts_compared(results: Results, what: str) -> tuple[list, dict[str, list[str]]]:
    """[(model, trained on questions, trained on WikiText)], and the models for which WikiText is told better or
    worse."""
    pairs = [(m, _get(results, what, m, "trivia"), _get(results, what, m, "wikitext")) for m in _models(results)]
    pairs = [(name, t, w) for name, t, w in pairs if t is not None and w is not None]
    tests = holm_adjusted({name: triviaqa.compare(t, w) for name, t, w in pairs})
    return pairs, {
        word: [name for name, c in tests.items() if c.verdict(higher_is_better=True) == word]
        for word in ("better", "worse")
    }


def texts_sentence(results: Results, what: str = CLOSED) -> str:
    """Does training on WikiText or on questions answer more questions? Each model by itself."""
    pairs, told = _texts_compared(results, what)
    better, worse = told["better"], told["worse"]
    sums = ", ".join(f"{name} {w.value:.1%} against {t.value:.1%}" for name, t, w in pairs)
    return (
        f"{what.capitalize()}, trained on WikiText against trained on questions: {sums}. By exact McNemar tests, "
        "Holm-adjusted, WikiText is better for "
        f"{listed(better)}, worse for {listed(worse)}, and within noise for the other "
        f"{len(pairs) - len(better) - len(worse)}."
    )


def other_measure_sentence(results: Results, text: str = "trivia") -> str:
    """What training on questions does to perplexity, against the untrained models."""
    found = [(c, t) for c, t in _against_untrained(results, PPL).items() if c.text == text]
    told = ", ".join(f"{c.pruned} {ratio(t)}{'' if t.told else ' (within noise)'}" for c, t in found)
    return (
        f"Perplexity on Wikipedia text after training on {text}, against untrained: {told or 'not run'} (paired t "
        "tests, Holm-adjusted over all trainings)."
    )


def order_sentence(results: Results) -> str:
    """Width pruning before or after recovery, paired."""
    said = []
    for (c, what), late in results.items():
        early = _get(results, PPL, f"{c.pruned}+{c.after}", c.text) if what == PPL and c.after else None
        if early is not None:
            test = perplexity.compare(early, late)
            said.append(
                f"{c.label} ({late.value:.4g}) is {versus(test)} {c.pruned}+{c.after}+{LETTERS[c.text]} "
                f"({early.value:.4g}; {ratio(test)}, {p_value(test.p)})"
            )
    return "Paired t tests over documents: " + "; ".join(said) + "."


def merge_table(results: Results) -> pd.DataFrame:
    """The same adapter kept beside the weights, merged under the mask, and merged dense: perplexity, zeros and
    bytes."""
    rows = []
    for (c, what), m in results.items():
        if what == PPL and c.merge == "beside" and merges(c):
            for one in (c, *merges(c)):
                found = m if one == c else _get(results, PPL, **dataclasses.asdict(one))
                size = found.made["bytes"]
                test = "" if one == c else ratio(perplexity.compare(m, found))
                rows.append(
                    {
                        "model": c.label, "adapter": one.merge, "perplexity": number(found), "against beside, "
                            "paired": test,
                        "zeros": f"{1 - size['nonzero_parameters'] / size['parameters']:.1%}", "MB on "
                            "disk": f"{size['bytes_on_disk'] / 1e6:.1f}",
                    }
                )  # fmt: skip
    return pd.DataFrame(rows).set_index(["model", "adapter"])


def merge_sentence(results: Results) -> str:
    """What merging costs, in words."""
    masked, grown, moved = [], [], []
    for c in dict.fromkeys(c for c, what in results if what == PPL and c.merge == "beside" and merges(c)):
        beside, under, dense = (_get(results, PPL, **dataclasses.asdict(one)) for one in (c, *merges(c)))
        masked.append(f"{c.label} {ratio(perplexity.compare(beside, under))}")
        size, larger = (m.disk_bytes for m in (beside, dense))
        grown.append(larger / size - 1)
        moved.append(dense.value / beside.value)
    return (
        f"Merged under the mask, perplexity changes by {', '.join(masked)} (paired t tests). Merged dense it "
        "stays where it was "
        f"(x {min(moved):.3f} to x {max(moved):.3f}), and the file grows by {min(grown):.1%} to {max(grown):.1%}."
    )


def seeds_sentence(results: Results) -> str:
    """How far seeds of one training lie apart."""
    found: dict[Configuration, list[Measurement]] = {}
    for (c, what), m in results.items():
        if what == PPL and c.text and not c.after and c.merge == "beside" and c.learning_rate is None:
            found.setdefault(dataclasses.replace(c, seed=0), []).append(m)
    config, runs = max(found.items(), key=lambda pair: len(pair[1]))
    values = np.array([m.value for m in runs])
    if len(runs) < 2:
        return f"{config.label} was trained with one seed."
    base = _get(results, PPL, config.pruned).value
    listed = ", ".join(f"{v:.2f}" for v in values)
    told = ""
    if len(runs) > 2:
        test = friedman({str(i): m.column("nats") for i, m in enumerate(runs)}, runs[0].column("document"))
        told = (
            f" A Friedman test over {test.n} documents "
            f"{'tells the seeds apart' if test.p < 0.05 else 'does not tell the seeds apart'} ({p_value(test.p)})."
        )
    return (
        f"{config.label} with {len(runs)} seeds: {listed}; standard deviation {values.std(ddof=1):.2f}, "
        f"{values.std(ddof=1) / (base - values.mean()):.1%} of what training gains.{told}"
    )


def tests_table(results: Results) -> pd.DataFrame:
    """Some of the chapter's comparisons by three paired tests that assume different things of the losses, ratios of
    perplexity."""
    C = Configuration
    asked_of = {
        "D2 to D2+W": (C("D2"), C("D2", "wikitext")),
        "dense to dense+W": (C(DENSE), C(DENSE, "wikitext")),
        "dense to D2+W": (C(DENSE), C("D2", "wikitext")),
        "D2+W1:8+W to D2+W+W1:8": (C("D2+W1:8", "wikitext"), C("D2", "wikitext", after="W1:8")),
        "W2:4+W, beside to masked": (C("W2:4", "wikitext"), C("W2:4", "wikitext", merge="masked")),
        "D2+W, seed 0 to seed 1": (C("D2", "wikitext"), C("D2", "wikitext", seed=1)),
    }
    rows = []
    for name, (first, second) in asked_of.items():
        a, b = results.get((first, PPL)), results.get((second, PPL))
        if a is None or b is None:
            continue
        x, y = ([n / t for n, t in zip(m.column("nats"), m.column("tokens"), strict=True)] for m in (a, b))
        documents, tokens = a.column("document"), a.column("tokens")
        found = (paired_means(x, y, documents), paired_bootstrap(x, y, documents, tokens), signed_rank(x, y, documents))
        rows.append({"comparison": name} | {c.test: f"{ratio(c)}, {p_value(c.p)}" for c in found})
    return pd.DataFrame(rows).set_index("comparison")


def training_report(m: Measurement) -> dict:
    """What the LoRA stage said of itself: curve, validation, tokens, seconds."""
    return next(r for r in reversed(m.made["reports"]) if "curve" in r)


def training_table(results: Results) -> pd.DataFrame:
    """What each training saw and took."""
    rows = []
    for (c, what), m in results.items():
        if what == PPL and c.text and not c.after and c.merge == "beside":
            r = training_report(m)
            rate = m.stages[-1]["lora"]["learning_rate"]
            first = r["validation"][0]["loss"] if r["validation"] else math.nan
            rows.append(
                {
                    "model": c.label, "seed": c.seed, "learning rate": f"{rate:g}", "tokens": r["tokens"], "M "
                        "trained": f"{r['parameters'] / 1e6:.2f}",
                    "held-out loss before": f"{first:.3f}", "best": f"{r['best_loss']:.3f}", "at "
                        "step": r["best_step"], "tokens/s": r["tokens_per_second"],
                }
            )  # fmt: skip
    return pd.DataFrame(rows).set_index("model")


def cost_sentence(results: Results) -> str:
    """How long all trainings took and on what; `thesislib.records.measurement.cost` says the same of measuring."""
    trained = {}
    for m in results.values():
        for stage, r in zip(m.stages, m.made["reports"], strict=True):
            if "lora" in stage:  # one training may stand behind many rows
                trained[
                    json.dumps([m.made["base"], {**stage["lora"], "merge": ""}, r["curve"][:1]], sort_keys=True)
                ] = r
    hours = sum(r["seconds"] for r in trained.values()) / 3600
    each = statistics.median(r["tokens"] for r in trained.values())
    return (
        f"{len(trained)} trainings of {each:,.0f} tokens took {hours:.1f} hours. {measurement.cost(results.values())}"
    )


def rates_sentence(results: Results, p: LoraChapter) -> str:
    """Which learning rate did best on held-out text."""
    tried = {
        c.learning_rate or p.learning_rate: training_report(m)["best_loss"]
        for c in [Configuration(p.pruned[0], p.texts[0]), *rates(p)]
        if (m := results.get((c, PPL)))
    }
    best = min(tried, key=tried.get)
    listed = ", ".join(f"{rate:g}: {tried[rate]:.3f}" for rate in sorted(tried))
    name = f"{p.pruned[0]}+{LETTERS[p.texts[0]]}"
    test = ", ".join(
        f"{rate:g}: {m.value:.2f}"
        for rate, m in sorted(
            (c.learning_rate or p.learning_rate, results[c, PPL])
            for c in [Configuration(p.pruned[0], p.texts[0]), *rates(p)]
            if (c, PPL) in results
        )
    )
    return (
        f"Held-out loss of {name} by learning rate: {listed}. Best of these: {best:g}; the chapter trains with "
        f"{p.learning_rate:g}. Perplexity on the test "
        f"text, which decided nothing: {test}."
    )


def curves(results: Results) -> dict[str, tuple[list, list]]:
    """{label: (curve, validation)} of every training with the chapter's rate and first seed."""
    found = {}
    for (c, what), m in results.items():
        if what == PPL and c.text and not c.after and c.merge == "beside" and asked(c):
            r = training_report(m)
            found[c.label] = (r["curve"], r["validation"])
    return found


def points(results: Results) -> dict[str, dict[str, Measurement]]:
    """{model: {"untrained", "+W", "+T": perplexity}} for the chart."""
    return {
        model: {
            f"+{LETTERS[t]}" if t else "untrained": m
            for t in (None, *_texts(results))
            if (m := _get(results, PPL, model, t))
        }
        for model in _models(results)
    }


def samples(results: Results, p: LoraChapter) -> pd.DataFrame:
    """Greedy completions of the chapter's prompt."""
    rows = []
    for (c, what), m in results.items():
        if what == PPL and not c.after and c.merge == "beside" and asked(c):
            rows.append({"model": c.label, f"{p.prompt} ...": m.chapter["text"].replace("\n", " ")})
    return pd.DataFrame(rows).set_index("model")


def headline(results: Results) -> str:
    """What chapter 4 found, in sentences, for the book's first page and the README."""
    before, after, dense, control = (
        _get(results, PPL, *c) for c in (("D2",), ("D2", "wikitext"), (DENSE,), (DENSE, "wikitext"))
    )
    theirs = (
        f"{thesis_row('D2').perplexity:.1f} to {thesis_row('D2', 'W').perplexity:.1f}, dense "
        f"{thesis_row('dense').perplexity:.1f}"
    )
    tokens, test = training_report(after)["tokens"], perplexity.compare(dense, after)
    word = {"worse": "above", "better": "below"}.get(test.verdict(), "within noise of")
    shares, (pairs, told) = recovered(results), _texts_compared(results, CLOSED)
    numbers = {
        name: f"{name} ({w.value:.1%} against {t.value:.1%}, untrained {_get(results, CLOSED, name).value:.1%})"
        for name, t, w in pairs
    }
    answers = (
        "; ".join(f"{how} for {', '.join(numbers[n] for n in names)}" for how, names in told.items() if names)
        or "told from it for none"
    )
    return in_markdown(
        f"LoRA on {tokens:,} tokens of WikiText takes D2 from perplexity {before.value:.1f} to "
        f"{after.value:.1f}, {word} the dense model's "
        f"{dense.value:.1f} (the thesis's subject: {theirs}). But the dense model, trained alike, goes to "
        f"{control.value:.1f}: of the loss that "
        f"pruning caused, D2 seems to win back {shares.naive['D2']:.0%}, and against that control it is "
        f"{shares.fair['D2']:.0%}; over all "
        f"{len(shares)} pruned models {shares.fair.min():.0%} to {shares.fair.max():.0%}. On closed-book "
        "questions, training on WikiText against training "
        f"on questions is {answers}, of {len(pairs)} models. {order_sentence(results)}"
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
    claims=for_claims,
)
