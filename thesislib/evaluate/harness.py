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
from typing import Any, NamedTuple

import numpy as np
import yaml

from thesislib.errors import BadInput
from thesislib.evaluate.perplexity import PerplexityTask, no_interval
from thesislib.evaluate.stats import Comparison, bootstrap_mean, paired_means
from thesislib.evaluate.task import Options, share_correct
from thesislib.formats.checkpoint import quiet_transformers
from thesislib.model.subject import Subject
from thesislib.model.tokenizers import check_tokens
from thesislib.records.measurement import Measurement, provenance
from thesislib.sources.corpus import article_starts, wikitext_lines
from thesislib.sources.rows import Row, origin_of, rows, take

CUT = "contexts cut"  # the name of that count in `Measurement.extra`
SCORES = ("acc", "acc_norm")


class Stock(NamedTuple):
    """A task of the harness.

    Args:
        name: its name in this package.
        file: its YAML file below lm_eval/tasks.
        metric: the harness's name of the score that a measurement's value is.
        split: the split of the data set that it is measured on.
    """

    name: str
    file: str
    metric: str
    split: str = "validation"


def lm_eval_task(
    subject: Subject, stock: Stock, chosen: list[Row], *, limit: int | None = None, seed: int = 0, batch: int = 8
) -> Measurement:
    """One stock task of lm-evaluation-harness, 0-shot, on local rows.

    A context that is longer than the model's is cut from the left; `extra["contexts cut"]` counts the items that this
    happened to.

    Args:
        subject: the model and tokenizer.
        stock: the task.
        chosen: the rows to measure on, as the task's data set has them.
        limit, seed: how the rows were chosen, for the record.
        batch: requests at a time.

    Raises:
        BadInput: harness not installed; a context or an ending without tokens, or with a token outside the model's
            embedding; an ending longer than the model's context.
    """
    samples, cut, facts = _run(subject, stock, chosen, limit, seed, batch)
    items: list[dict[str, Any]] = [
        {"id": str(s["doc_id"]), "correct": bool(s[stock.metric]), **{m: float(s[m]) for m in SCORES if m in s}}
        for s in samples
    ]
    extra: dict[str, float] = {m: sum(i[m] for i in items) / len(items) for m in SCORES if m in items[0]}
    extra[CUT] = sum(any(tuple(pair) in cut for pair in s["arguments"]) for s in samples)
    return share_correct(stock.name, stock.metric, "item", items, extra, facts)


def _run(
    subject: Subject, stock: Stock, chosen: list[Row], limit: int | None, seed: int, batch: int
) -> tuple[list[dict], set[tuple], dict]:
    """Run the harness on one task, see `lm_eval_task`.

    Returns:
        The harness's samples in order, the (context, ending) pairs whose context was cut, and the provenance.
    """
    try:
        import lm_eval
        from lm_eval import evaluator
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise BadInput(
            "lm-evaluation-harness is not installed: in the checkout, pip install -e '.[harness]' -c constraints.txt"
        ) from error
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as quiet:
        quiet.enter_context(quiet_transformers())
        quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
        # it would ask git about the user's folder, whose complaint goes past redirect_stderr
        quiet.callback(setattr, evaluator, "get_git_commit_hash", evaluator.get_git_commit_hash)
        evaluator.get_git_commit_hash = lambda: None
        if not sys.stderr.isatty():  # the harness draws its bars into logs too
            quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in chosen), "utf8")
        name, split = f"local_{stock.name}", stock.split
        (Path(folder) / "task.yaml").write_text(yaml.safe_dump({
            "include": str(Path(lm_eval.__file__).parent / "tasks" / stock.file), "task": name, "tag": None,
            "dataset_path": "json", "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(file)}, "cache_dir": str(Path(folder) / "cache")},
            "training_split": None, "validation_split": split if split == "validation" else None,
            "test_split": split if split == "test" else None,
        }))  # fmt: skip
        model = _watched(subject, batch)
        results = evaluator.simple_evaluate(
            model=model,
            tasks=[name], task_manager=TaskManager(include_path=folder, include_defaults=False),
            num_fewshot=0, log_samples=True, bootstrap_iters=0, verbosity="ERROR",
        )  # fmt: skip
    samples = sorted(results["samples"][name], key=lambda s: s["doc_id"])
    settings = {
        "task": stock.name,
        "limit": limit,
        "seed": seed,
        "protocol": "lm-eval 0-shot",
        "lm_eval": lm_eval.__version__,
    }
    return samples, model.cut, provenance(subject, started, **settings)


def _word_perplexity(samples: list[dict], facts: dict) -> Measurement:
    """The harness's word perplexity. Its interval, which the harness does not give, is a bootstrap over articles."""
    loglikelihood, words = zip(*(s["word_perplexity"] for s in samples), strict=True)
    low, high = bootstrap_mean([-x for x in loglikelihood], words, range(len(samples)))
    value = -sum(loglikelihood) / sum(words)
    items = [
        {"id": str(s["doc_id"]), "nats": -s["word_perplexity"][0], "words": s["word_perplexity"][1]} for s in samples
    ]
    extra = {"documents": len(items)} | no_interval(len(items))
    extra |= {"bits_per_byte": -sum(loglikelihood) / sum(s["bits_per_byte"][1] for s in samples) / float(np.log(2))}
    value, low, high = np.exp([value, low, high]).tolist()
    return Measurement(
        task="wikitext (lm-eval)", metric="word_perplexity", value=value, low=low, high=high, n=len(items),
        unit="article", items=items, extra=extra, provenance=facts,
    )  # fmt: skip


def _watched(subject: Subject, batch: int):
    """The harness's model of a subject. It checks tokens before they run, and keeps the (context, ending) pairs whose
    context it cuts in `cut`."""
    from lm_eval.models.huggingface import HFLM

    class Watched(HFLM):
        def _loglikelihood_tokens(self, requests, *args, **kwargs):
            for pair, context, ending in requests:
                check_tokens(subject.model, subject.tokenizer, [context, ending])
                if not context or not 1 <= len(ending) <= self.max_length:
                    text = repr(" ".join(pair)[-60:]) if pair else "a page"
                    raise BadInput(
                        f"{text} has {len(context)} tokens of context and {len(ending)} of an ending: "
                        f"expected at least one each, and an ending of at most the {self.max_length} of the "
                        "model's context"
                    )
                if pair and len(context) + len(ending) > self.max_length + 1:
                    self.cut.add(pair)
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

    # the harness asks for a token to put before a text where a tokenizer has neither of these
    has_prefix = (subject.tokenizer.bos_token_id, subject.tokenizer.eos_token_id) != (None, None)
    prefix = None if has_prefix else subject.pad_id
    model = Watched(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=batch, prefix_token_id=prefix)
    model.cut = set()
    return model


class LmEvalWikitext(PerplexityTask):
    """The harness's word perplexity of detokenised WikiText-2 articles. It is another number than
    `thesislib.evaluate.perplexity`.

    It needs a folder or the Hub: embedded text is not WikiText.
    """

    name = "lm_eval_wikitext"
    metric = "word_perplexity"

    def items(self, data: str, options: Options) -> list[Row]:
        """Articles as the harness wants them, one `page` each, in the official line layout."""
        if origin_of(data) == "embedded":
            raise BadInput(
                "the harness's wikitext task needs WikiText-2 itself: give a folder with wikitext2/test.jsonl or "
                "'hub' as data"
            )
        text = "".join(
            line if line.endswith("\n") else f"{line or ' '}\n" for line in wikitext_lines(rows("wikitext", data))
        )
        starts = [0, *(at for at in article_starts(text) if text[:at].strip())]
        return take(
            [{"page": text[a:b]} for a, b in itertools.pairwise((*starts, len(text)))], options.limit, options.seed
        )

    def sha256(self, items: list[Row], options: Options) -> None:
        """None: the ids in a record tell which articles they were."""

    def measure(self, subject: Subject, items: list[Row], options: Options) -> Measurement:
        """See the class."""
        stock = Stock("wikitext", "wikitext/wikitext.yaml", self.metric, "test")
        samples, _, facts = _run(subject, stock, items, options.limit, options.seed, options.batch or 8)
        return _word_perplexity(samples, facts)

    def compare(self, a: Measurement, b: Measurement) -> Comparison:
        """Paired t test of b's loss against a's in nats a word, over articles; exp(difference) is a ratio of word
        perplexities."""
        nats_a, nats_b = (np.asarray(x) for x in a.paired_with(b, "nats"))
        words = np.asarray(a.column("words"))
        return paired_means(nats_a / words, nats_b / words, weights=words)
