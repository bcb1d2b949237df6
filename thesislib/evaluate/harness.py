"""lm-evaluation-harness on a loaded subject, its stock tasks pointed at local rows.

The harness is the field's reference for these tasks, so its wording, scoring and names are taken as they are: each
task includes the stock YAML file and changes only where the rows come from.
"""

import contextlib
import io
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import yaml

from thesislib.errors import BadInput, unknown
from thesislib.evaluate.choice import CUT
from thesislib.evaluate.perplexity import ONE_DOCUMENT
from thesislib.evaluate.stats import bootstrap_mean, proportion
from thesislib.formats.checkpoint import quiet_transformers
from thesislib.model.subject import Subject
from thesislib.model.tokenizers import check_tokens
from thesislib.records.measurement import Measurement, provenance
from thesislib.sources.corpus import CHOICE_TASKS, TASKS, Row, article_starts, choices, kind_of, rows, take, wikitext_lines

# task: its stock file in lm_eval/tasks, the metric to lead with
STOCK = {
    "hellaswag": ("hellaswag/hellaswag.yaml", "acc_norm"),
    "piqa": ("piqa/piqa.yaml", "acc_norm"),
    "arc_easy": ("arc/arc_easy.yaml", "acc_norm"),
    "arc_challenge": ("arc/arc_challenge.yaml", "acc_norm"),
    "winogrande": ("winogrande/default.yaml", "acc"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "acc_norm"),
    "wikitext": ("wikitext/wikitext.yaml", "word_perplexity"),
}


def lm_eval_task(subject: Subject, task: str, data: str | Path = "embedded", *, limit: int | None = None, seed: int = 0, batch: int = 8) -> Measurement:
    """One stock task of lm-evaluation-harness, 0-shot, on rows from `data`.

    'wikitext' is the harness's word perplexity of detokenised WikiText-2 articles, another number than
    `thesislib.evaluate.perplexity`; it needs a folder or the Hub. A context that the model has no positions for is cut from
    the left; `extra["contexts cut"]` counts the items to which that happened.

    Args:
        subject: the model and tokenizer.
        task: one of `STOCK`.
        data: a data spec.
        limit: a seeded choice of that many rows.
        seed: of that choice.
        batch: requests at a time.

    Raises:
        BadInput: unknown task or data; 'wikitext' on embedded text, which is not WikiText; harness not installed; a context
            or an ending without tokens or with one that the model has no row for, an ending longer than the model's context.
    """
    if task not in STOCK:
        raise unknown("lm-eval task", task, STOCK)
    try:
        import lm_eval
        from lm_eval import evaluator
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise BadInput("lm-evaluation-harness is not installed: in the checkout, pip install -e '.[harness]' -c constraints.txt") from error
    started = time.perf_counter()
    chosen = take(_pages(data) if task == "wikitext" else _plain(task, data), limit, seed)
    stock, metric = STOCK[task]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as quiet:
        quiet.enter_context(quiet_transformers())
        quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
        # it would ask git about the user's folder, whose complaint goes past redirect_stderr
        quiet.enter_context(patch("lm_eval.evaluator.get_git_commit_hash", return_value=None))
        if not sys.stderr.isatty():  # the harness draws its bars into logs too
            quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in chosen), "utf8")
        split = "test" if task == "wikitext" else "validation"
        name = f"local_{task}"
        (Path(folder) / "task.yaml").write_text(yaml.safe_dump({
            "include": str(Path(lm_eval.__file__).parent / "tasks" / stock), "task": name, "tag": None,
            "dataset_path": "json", "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(file)}, "cache_dir": str(Path(folder) / "cache")},
            "training_split": None, "validation_split": split if split == "validation" else None,
            "test_split": split if split == "test" else None,
        }))  # fmt: skip
        quiet.enter_context(patch.object(evaluator, "get_git_commit_hash", lambda: None))  # git says so where there is no checkout
        model = _watched(subject, batch)
        results = evaluator.simple_evaluate(
            model=model,
            tasks=[name], task_manager=TaskManager(include_path=folder, include_defaults=False),
            num_fewshot=0, log_samples=True, bootstrap_iters=0, verbosity="ERROR",
        )  # fmt: skip
    samples = sorted(results["samples"][name], key=lambda s: s["doc_id"])
    settings = {"task": task, "limit": limit, "seed": seed, "protocol": "lm-eval 0-shot", "lm_eval": lm_eval.__version__}
    made = provenance(subject, started, **settings)
    if task == "wikitext":
        return _word_perplexity(samples, made)
    items = [{"id": str(s["doc_id"]), "correct": bool(s[metric]), **{m: float(s[m]) for m in ("acc", "acc_norm") if m in s}} for s in samples]
    n, right = len(items), sum(i["correct"] for i in items)
    extra = {m: sum(i[m] for i in items) / n for m in ("acc", "acc_norm") if m in items[0]}
    extra[CUT] = sum(any(tuple(pair) in model.cut for pair in s["arguments"]) for s in samples)
    low, high = proportion(right, n)
    return Measurement(task=task, metric=metric, value=right / n, low=low, high=high, n=n, unit="item", items=items, extra=extra, provenance=made)


def _word_perplexity(samples: list[dict], made: dict) -> Measurement:
    """The harness gives no interval for perplexities: this is its own sum, resampled by article."""
    import numpy as np

    loglikelihood, words = zip(*(s["word_perplexity"] for s in samples), strict=True)
    low, high = bootstrap_mean([-x for x in loglikelihood], words, range(len(samples)))
    value = -sum(loglikelihood) / sum(words)
    items = [{"id": str(s["doc_id"]), "nats": -s["word_perplexity"][0], "words": s["word_perplexity"][1]} for s in samples]
    extra = {"documents": len(items)} | ({"why no interval": ONE_DOCUMENT} if len(items) < 2 else {})
    extra |= {"bits_per_byte": -sum(loglikelihood) / sum(s["bits_per_byte"][1] for s in samples) / float(np.log(2))}
    value, low, high = np.exp([value, low, high]).tolist()
    return Measurement(
        task="wikitext (lm-eval)", metric="word_perplexity", value=value, low=low, high=high, n=len(items), unit="article", items=items,
        extra=extra, provenance=made,
    )  # fmt: skip


def _watched(subject: Subject, batch: int):
    """The harness's model of a subject, which looks at tokens before they run and keeps in `cut` the (context, ending) pairs that it cuts."""
    from lm_eval.models.huggingface import HFLM

    class Watched(HFLM):
        def _loglikelihood_tokens(self, requests, *args, **kwargs):
            for pair, context, ending in requests:
                check_tokens(subject.model, subject.tokenizer, [context, ending])
                if not context or not 1 <= len(ending) <= self.max_length:
                    where = repr(" ".join(pair)[-60:]) if pair else "a page"
                    raise BadInput(f"{where} has {len(context)} tokens of context and {len(ending)} of an ending: "
                                   f"expected at least one each, and an ending of at most the {self.max_length} of the model's context")  # fmt: skip
                if pair and len(context) + len(ending) > self.max_length + 1:
                    self.cut.add(pair)
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

    named = (subject.tokenizer.bos_token_id, subject.tokenizer.eos_token_id)
    # a tokenizer with neither puts nothing in front of a text; the harness would ask what
    model = Watched(
        pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=batch, prefix_token_id=None if any(t is not None for t in named) else subject.pad_id
    )
    model.cut = set()
    return model


def _plain(task: str, data: str | Path) -> list[Row]:
    """The rows of a task, checked, with the columns that the harness needs and each label as its stock task has it."""
    if task in CHOICE_TASKS:
        choices(task, data)  # for its errors, which name the row
    found = [{column: row[column] for column in TASKS[task].columns} for row in rows(task, data)]
    spelt = {"label": int if task == "piqa" else str, "answerKey": str.strip}
    return [{column: spelt.get(column, lambda value: value)(value) for column, value in row.items()} for row in found]


def _pages(data: str | Path) -> list[Row]:
    """WikiText-2 articles as the harness wants them, one `page` each, in the official line layout."""
    if kind_of(data) == "embedded":
        raise BadInput("the harness's wikitext task needs WikiText-2 itself: give a folder with wikitext2/test.jsonl or 'hub' as data")
    text = "".join(line if line.endswith("\n") else f"{line or ' '}\n" for line in wikitext_lines(rows("wikitext", data)))
    starts = [0, *(at for at in article_starts(text) if text[:at].strip())]
    return [{"page": text[a:b]} for a, b in itertools.pairwise((*starts, len(text)))]
