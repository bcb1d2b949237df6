"""Chapter 8's tables, and what its plots draw."""

import numpy as np
import pandas as pd

from thesislib.chapters import ch08_sets
from thesislib.chapters.ch08_agreement import (
    ASKING,
    REPORT,
    agreements,
    curse,
    dependence,
    lost,
    reference,
    settled,
)
from thesislib.chapters.ch08_record import Record
from thesislib.chapters.ch08_runs import ALL, TASKS, asked, of_text
from thesislib.chapters.ch08_scale import Scale, beyond_cosine
from thesislib.chapters.phrases import interval, p_number, points
from thesislib.compress.agreement import MIDDLE, Estimate
from thesislib.compress.relevance import Outcomes, relevance
from thesislib.records.measurement import Measurement


def worth(record: Record) -> pd.DataFrame:
    """Blocks by cosine score and by what the items to report lose, in nats, mean over all tasks' items."""
    of_items = reference(record, ALL)
    low, high = np.quantile(of_items[1:], MIDDLE, axis=0)
    return pd.DataFrame(
        {
            "cosine": of_text("cosine", record.scores),
            "loss": of_items[0],
            "low": low,
            "high": high,
            "free": [b in record.middle for b in range(record.depth)],
        }
    ).rename_axis("block")


def spearmans(record: Record, metric: str) -> pd.DataFrame:
    """Rankings of the blocks that may go by (task, value | low | high): rank correlation with what a task's other items
    lose in a metric."""
    found = {task: agreements(record, task, record.middle, metric) for task in TASKS}
    columns = {
        (task, end): [getattr(a.spearman, end) for a in of.values()]
        for task, of in found.items()
        for end in Estimate._fields
    }
    return pd.DataFrame(columns, index=list(found[TASKS[0]]))


def agreement_table(record: Record, task: str = ALL, everything: bool = False) -> pd.DataFrame:
    """Each ranking against the log-probability that other items lose: of the blocks that may go, or of all."""
    blocks = [*range(record.depth)] if everything else record.middle
    rows = {
        name: {
            "Spearman": interval(*a.spearman, ".2f"),
            "Kendall": f"{a.kendall.value:.2f}",
            "of the 8 least, shared": f"{a.shared.value:.0%}",
            "misranked": f"{a.misranked.value:.0%}",
            "regret, nats": interval(*a.regret, ".2f"),
        }
        for name, a in agreements(record, task, blocks).items()
    }
    table = pd.DataFrame(rows).T.rename_axis("ranking by")
    return table.loc[sorted(rows, key=lambda name: -float(table.loc[name, "Spearman"].split()[0]))]


def settling(record: Record) -> dict[str, dict[str, pd.DataFrame]]:
    """{task: {metric: items by value, low, high of Spearman's correlation}}."""
    return {
        task: {
            metric: pd.DataFrame(
                {n: s.spearman._asdict() for n, s in settled(record, task, metric, record.middle).items()}
            ).T
            for metric in reversed(ASKING)
        }
        for task in TASKS
    }


def other_items(record: Record) -> dict[str, pd.DataFrame]:
    """{task: blocks by points of accuracy that the items to rank by (first) and to report (others) lose}."""
    return {
        task: pd.DataFrame(
            {
                name: 100 * lost(of, "relevance").mean(1)[record.middle]
                for name, of in (("first", asked(record.outcomes, task)), ("others", record.outcomes[task, REPORT]))
            },
            index=record.middle,
        )
        for task in TASKS
    }


def curse_table(record: Record) -> pd.DataFrame:
    """A task a row: the blocks without which more items are right, and what other items say of them."""
    rows = {}
    for task in TASKS:
        c = curse(record, task, record.middle)
        value, high, low = (-100 * x for x in c.kept)
        rows[task] = {
            "blocks better left out": ", ".join(str(record.middle[i]) for i in c.blocks) or "none",
            "gain there, points": f"{-100 * c.seen:+.1f}" if len(c.blocks) else "",
            "gain on other items": interval(value, low, high, "+.1f") if len(c.blocks) else "",
            "still better": f"{c.still} of {len(c.blocks)}" if len(c.blocks) else "",
            "slope": interval(*c.slope, ".2f"),
        }
    return pd.DataFrame(rows).T.rename_axis("task")


def dependence_table(record: Record) -> pd.DataFrame:
    """How much the standing of blocks differs between tasks, by metric, and what the choice of items alone gives."""
    rows = {}
    for metric in ("cosine", *ASKING):
        d = dependence(record, metric, record.middle)
        rows[metric] = {
            "variance of z": f"{d.variance.mean():.3f}",
            "by items alone": f"{d.noise.mean():.3f}",
            "concordance": f"{d.order.w:.2f}",
            "p": p_number(d.order.p),
        }
    return pd.DataFrame(rows).T.rename_axis("score")


def sets_rows(record: Record) -> pd.DataFrame:
    """A row a ranking and count: right answers of the items to report."""
    return pd.DataFrame(
        [
            {"ranking": name, "k": k, "value": x.accuracy, "low": x.low, "high": x.high, "blocks": x.blocks}
            for k in ch08_sets.counts(record)
            for name in ch08_sets.measured(record, k)
            for x in [ch08_sets.kept(record, k, name)]
        ]
    )


def sets_table(record: Record, k: int, base: str = "cosine") -> pd.DataFrame:
    """What each ranking's k blocks leave: right answers with the difference from a base's, log-probability of the right
    ending, perplexity where it was measured."""
    answers, likelihood = (ch08_sets.against(record, k, base, column) for column in ("correct", "right"))
    texts = ch08_sets.perplexities(record, k)
    rows = {}
    for name in ch08_sets.measured(record, k):
        x = ch08_sets.kept(record, k, name)
        rows[name] = {
            "removed": ", ".join(map(str, x.blocks)),
            "right answers": f"{x.accuracy:.1%}",
            f"beside {base}'s": f"{points(answers[name])}, p {p_number(answers[name].p)}" if name in answers else "",
            "log-probability": f"{ch08_sets.outcomes(record, k, name, 'right').mean():.2f}",
            "beside it": f"{likelihood[name].difference:+.2f}, p {p_number(likelihood[name].p)}"
            if name in likelihood
            else "",
            "perplexity": f"{texts[name].value:.4g}" if name in texts else "",
        }
    table = pd.DataFrame(rows).T.rename_axis("ranked by")
    order = sorted(rows, key=lambda name: -ch08_sets.kept(record, k, name).accuracy)
    return table.loc[order, [c for c in table if table[c].str.len().any()]]


def left_out_table(record: Record) -> pd.DataFrame:
    """Why some tasks rank no blocks: the whole model beside guessing, and the standard error of R that 15 % changed
    answers give."""
    return pd.DataFrame({task: _beside_chance(m) for task, m in _whole(record).items()}).T.rename_axis("task")


CHANGED = 0.15  # share of answers that skipping a block changes, for the standard error


def _whole(record: Record) -> dict[str, Measurement]:
    return {**{task: record.whole(task, REPORT) for task in TASKS}, **record.left_out}


def _beside_chance(m: Measurement) -> dict[str, str]:
    margin = m.value - m.extra["chance"]
    error = np.sqrt(CHANGED / m.n) / margin if margin > 0 else np.nan
    surely = m.low > m.extra["chance"]
    return {
        "n": f"{m.n:,}",
        "right": interval(m.value, m.low, m.high, ".1%"),
        "guessing": f"{m.extra['chance']:.1%}",
        "standard error of relevance": f"{error:.2f}" if margin > 0 else "undefined",
        "above guessing": "yes" if surely else "not surely" if margin > 0 else "no",
    }


def run_table(found: Outcomes, cosine: list[float]) -> pd.DataFrame:
    """This run's blocks: accuracy and log-probability that are lost, relevance, and the cosine score."""
    accuracy, chance = found.accuracy(), float(found.chance.mean())
    above = accuracy[0] > chance
    return pd.DataFrame(
        {
            "accuracy lost, points": 100 * (accuracy[0] - accuracy[1:]),
            "relevance": [relevance(a, accuracy[0], chance) if above else np.nan for a in accuracy[1:]],
            "log-probability lost, nats": found.scores("likelihood"),
            "cosine": cosine,
        },
        index=[f"block {b}" for b in range(len(cosine))],
    ).rename_axis("without")


def beyond_cosine_table(record: Scale) -> pd.DataFrame:
    """`ch08_scale.beyond_cosine` rounded."""
    table = beyond_cosine(record)
    return pd.DataFrame(
        {
            "Spearman": table["Spearman"].map("{:.2f}".format),
            "given cosine": table["given cosine"].map("{:.2f}".format).replace("nan", ""),
            "p": table["p"].map(lambda p: p_number(p) if p == p else ""),
        }
    )
