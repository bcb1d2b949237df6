import json

import pytest

from thesislib.errors import BadInput
from thesislib.evaluate.compare import compare
from thesislib.evaluate.setup import Setup, setup_of

ANSWERS = [True, True, False, True, True, False, True, False, True, True]


def folder(root, answers=ANSWERS, **changes):
    path = root / "boolq" / "validation.jsonl"
    path.parent.mkdir(parents=True)
    rows = [
        {
            "question": f"is {n} larger than {n // 2}",
            "passage": f"Of numbers, {n} comes {'after' * n} others.",
            "answer": a,
        }
        for n, a in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row | changes) + "\n" for row in rows))
    return str(root)


def test_fast_and_lm_eval_agree_and_the_majority_is_chance(tiny, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is an extra")
    data, subject = folder(tmp_path), tiny(layers=2)
    fast, slow = (Setup("boolq", fast=fast).measure(subject, data) for fast in (True, False))
    assert (
        fast.column("correct") == slow.column("correct")
        and 0 < fast.value < 1
        and (fast.value, fast.low, fast.high) == (slow.value, slow.low, slow.high)
    )
    assert fast.metric == slow.metric == "acc" and fast.extra["chance"] == slow.extra["chance"] == 0.7
    assert setup_of(fast) == Setup("boolq", fast=True) and compare(fast, slow).p == 1


def test_chance_is_of_the_items_that_were_measured(tiny, tmp_path):
    data = folder(tmp_path, [False, False, True, False])
    one = Setup("boolq", limit=1, fast=True).measure(tiny(layers=2), data)
    whole = Setup("boolq", fast=True).measure(tiny(layers=2), data)
    assert (one.n, one.extra["chance"], whole.extra["chance"]) == (1, 1, 0.75)
    right = [
        scores.index(max(scores)) == label for scores, label in zip(whole.column("logprobs"), (0, 0, 1, 0), strict=True)
    ]
    assert whole.column("correct") == right and whole.value == sum(right) / 4


@pytest.mark.parametrize(
    "change", [{"answer": "true"}, {"answer": 1}, {"answer": None}, {"passage": " "}, {"question": 3}]
)
@pytest.mark.parametrize("fast", [True, False])
def test_rows_that_are_none(tiny, tmp_path, change, fast):
    (column,) = change
    with pytest.raises(
        BadInput, match=rf"row 1 of .*validation\.jsonl \(task 'boolq'\) has the {column} .*: expected "
    ):
        Setup("boolq", fast=fast).measure(tiny(layers=1), folder(tmp_path, **change))


@pytest.mark.embedded
def test_on_the_embedded_model(few_blocks):
    pytest.importorskip("lm_eval", reason="lm-eval is an extra")
    fast, slow = (Setup("boolq", limit=4, fast=fast).measure(few_blocks, "embedded") for fast in (True, False))
    assert fast.column("correct") == slow.column("correct") and fast.value == slow.value
    items = Setup("boolq", fast=True).items("embedded")
    assert len(items) == 3270 and items[0].context.endswith(
        "\nQuestion: does ethanol take more energy make that produces?\nAnswer:"
    )
