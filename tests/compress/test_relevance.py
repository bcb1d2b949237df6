"""Relevance against its definition in a few lines, and what must be true of it whatever the model."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.evaluate.test_choice import ITEMS, one_pair_at_a_time
from thesislib.compress import relevance as module
from thesislib.compress.depth import Depth
from thesislib.compress.relevance import (
    ByAnswers,
    Items,
    Outcomes,
    choices,
    entropy_change,
    joined,
    next_tokens,
    outcomes,
    relevance,
)
from thesislib.errors import BadInput
from thesislib.files import write_whole
from thesislib.model.blocks import remove
from thesislib.model.forward import blocks_run
from thesislib.sources.choices.choice_set import PARTS, part_of
from thesislib.sources.choices.found import SETS

ASKED = Items("test", ITEMS, "acc", 0.3)
IDS = torch.randint(0, 250, (5, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def subject(tiny):
    return tiny(layers=5)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("asked")
    rows = "".join(
        f'{{"goal": "move {i}", "sol1": "walk to {i}", "sol2": "stand on {i + 7}", "label": {i % 2}}}\n'
        for i in range(60)
    )
    (root / "piqa").mkdir()
    write_whole(root / "piqa" / "validation.jsonl", rows)
    return str(root)


@pytest.mark.parametrize(
    "without, whole, chance, expected",
    [(0.5, 0.5, 0.25, 0), (0.25, 0.5, 0.25, 1), (0.1, 0.5, 0.25, 1), (0.6, 0.5, 0.25, -0.4), (0.4, 0.5, 0.25, 0.4)],
)
def test_relevance_of_numbers(without, whole, chance, expected):
    assert relevance(without, whole, chance) == pytest.approx(expected)


def test_a_model_at_chance_is_refused():
    with pytest.raises(BadInput, match="answers 25.0%, and guessing 25.0%: relevance is undefined"):
        relevance(0.2, 0.25, 0.25)


@pytest.mark.parametrize("part", ["block", "attention", "mlp"])
def test_outcomes_are_those_of_the_model_without_the_part(subject, part):
    found = outcomes(subject, ASKED, [3, 1], part)
    for row, model in zip(range(3), (subject, remove(subject, [3], part), remove(subject, [1], part)), strict=True):
        for i, item in enumerate(ITEMS):
            x = np.array(one_pair_at_a_time(model, item))
            assert found.correct[row, i] == (x.argmax() == item.label)
            assert found.margin[row, i] == pytest.approx(x[item.label] - np.delete(x, item.label).max(), abs=1e-3)
            assert found.likelihood[row, i] == pytest.approx(x[item.label], abs=1e-3)


def test_outcomes_on_text_are_those_of_whole_logits(subject):
    found = outcomes(subject, next_tokens(IDS), [2], kl=True, batch=2)
    whole, less = (m.model(IDS).logits[:, :-1].double().log_softmax(-1) for m in (subject, remove(subject, [2])))
    for row, logp in ((0, whole), (1, less)):
        np.testing.assert_allclose(found.correct[row], (logp.argmax(-1) == IDS[:, 1:]).double().mean(1))
        nats = logp.gather(2, IDS[:, 1:, None])[..., 0].mean(1)
        np.testing.assert_allclose(found.margin[row], nats, atol=1e-5)
        np.testing.assert_array_equal(found.likelihood, found.margin)
    full = (whole.exp() * (whole - less)).sum(-1).mean(1)
    assert found.kl[0] == pytest.approx(0, abs=1e-6) and found.kl[1] == pytest.approx(full.numpy(), abs=1e-4)
    assert found.chance[0] == max(IDS[:, 1:].flatten().bincount()).item() / IDS[:, 1:].numel()


def test_few_tokens_by_themselves_give_a_little_less_than_the_divergence(subject, monkeypatch):
    full = outcomes(subject, next_tokens(IDS), [2], kl=True).kl[1]
    monkeypatch.setattr(module, "TOP", 8)
    less = outcomes(subject, next_tokens(IDS), [2], kl=True).kl[1]
    assert (less > 0).all() and (less < full).all()


def test_a_block_that_does_nothing_has_relevance_0_and_one_that_answers_alone_1(subject, tiny):
    idle = tiny(layers=5)
    for weight in (idle.blocks[2].self_attn.o_proj.weight, idle.blocks[2].mlp.down_proj.weight):
        weight.zero_()
    found = outcomes(idle, next_tokens(IDS), range(5), kl=True)
    assert found.scores("margin")[2] == pytest.approx(0, abs=1e-6) and found.kl[2 + 1] == pytest.approx(0, abs=1e-6)
    assert (found.correct[2 + 1] == found.correct[0]).all()
    correct, nothing = np.array([[1.0, 1, 1, 0], [0, 0, 1, 0]]), np.zeros((2, 4))
    constant = Outcomes(correct, nothing, nothing, nothing, np.full(4, 0.25))
    assert constant.scores("relevance") == pytest.approx([1.0])  # without the block the same answer to every item


def test_ranks_do_not_depend_on_the_order_of_items(subject):
    there = outcomes(subject, ASKED, range(5))
    back = outcomes(subject, Items("test", ITEMS[::-1], "acc", 0.3), range(5))
    np.testing.assert_allclose(there.margin, back.margin[:, ::-1], atol=1e-4)
    np.testing.assert_allclose(there.scores("margin"), back.scores("margin"), atol=1e-4)


def test_a_mixed_set_is_its_items_together(subject):
    text = outcomes(subject, next_tokens(IDS), [1, 2])
    asked = outcomes(subject, ASKED, [1, 2])
    both = joined([asked, text])
    assert both.accuracy() == pytest.approx((asked.correct.sum(1) + text.correct.sum(1)) / (len(ITEMS) + len(IDS)))
    assert both.chance.mean() == pytest.approx((0.3 * len(ITEMS) + text.chance[0] * len(IDS)) / (len(ITEMS) + len(IDS)))


def test_shared_beginnings_save_about_half_of_the_passes():
    whole = tuple(range(30))
    shared, alone = blocks_run([whole, *(whole[:b] + whole[b + 1 :] for b in whole)])
    assert (shared, alone) == (30 + 29 * 30 // 2, 30 + 30 * 29) and 0.5 < shared / alone < 0.53


def test_a_task_falls_into_three_parts_that_share_no_item():
    items = list(range(100))
    parts = [part_of(items, part) for part in PARTS]
    assert sorted(i for part in parts for i in part) == items and part_of(items, None) == items
    assert [len(part) for part in parts] == [34, 33, 33] and parts == [part_of(items, part) for part in PARTS]
    with pytest.raises(BadInput, match="unknown part of the items 'reprot': did you mean 'report'"):
        part_of(items, "reprot")


def test_more_items_contain_the_fewer(data):
    ten, five = choices("piqa", data, 10), choices("piqa", data, 5)
    assert ten.asked[:5] == five.asked and ten.chance == 0.5 and ten.metric == "acc_norm"
    report = {item.id for item in choices("piqa", data, 20, "report").asked}
    assert not report & {item.id for item in choices("piqa", data, 20).asked}


# ---------------------------------------------------------------- as metrics of the depth stage


@pytest.mark.parametrize("metric", ["relevance", "margin", "likelihood", "kl"])
@pytest.mark.parametrize("greedy", [False, True])
def test_the_stage_removes_what_costs_the_answers_least(tiny, data, metric, greedy):
    subject = tiny(layers=6, seed=8)  # it is better than chance on these items
    stage = Depth(2, metric=metric, task="piqa", items=20, greedy=greedy, protect_first=1, protect_last=1)
    small, report = stage.apply(subject, data=data)
    items, free, removed, left = choices("piqa", data, 20), [1, 2, 3, 4], [], list(range(6))
    whole = outcomes(subject, items, []).accuracy()[0]
    for _ in range(2):
        found = outcomes(remove(subject, removed), items, [left.index(b) for b in free], kl=True)
        values, likelihood = found.scores(metric, whole), found.scores("likelihood")
        order = [free[k] for k in sorted(range(len(free)), key=lambda k: (values[k], likelihood[k]))]
        removed += order[: 1 if greedy else 2]
        free, left = [b for b in free if b not in removed], [b for b in left if b not in removed]
        if len(removed) == 2:
            break
    assert report["order"] == removed and small.depth == 4
    assert sorted(report["scores"]) == [1, 2, 3, 4]
    first = Depth(1, metric=metric, task="piqa", items=20, greedy=True, protect_first=1, protect_last=1)
    assert first.apply(subject, data=data)[1]["order"] == removed[:1]


def test_blocks_of_equal_relevance_go_by_the_likelihood(subject, data, monkeypatch):
    def two_ties(subject, items, blocks, part, kl):
        correct = np.array([[1.0, 1], [1, 0], [1, 0], [0, 0]])
        return Outcomes(correct, correct, np.array([[9.0, 9], [0, 0], [5, 5], [8, 8]]), correct, np.full(2, 0.25))

    monkeypatch.setattr(module, "outcomes", two_ties)
    asked = ByAnswers(["piqa"], "relevance", "block", torch.empty(0), data, 2, 0)
    assert sorted(found := asked(subject, [0, 1, 2]), key=lambda b: found[b]) == [1, 0, 2]


def test_next_tokens_rank_blocks_of_text(subject, tiny_data):
    stage = Depth(1, metric="margin", task="next_token", windows=4, length=32, protect_first=0, protect_last=0)
    _, report = stage.apply(subject, data=tiny_data)
    loss = Depth(1, windows=4, length=32, protect_first=0, protect_last=0).apply(subject, data=tiny_data)[1]
    assert report["order"] == loss["order"]  # the lost log-probability of the next token is the loss itself
    whole = math.log(loss["scores"][0]) - report["scores"][0]
    assert [math.log(x) - whole for x in loss["scores"].values()] == pytest.approx(
        list(report["scores"].values()), abs=1e-4
    )


def test_tasks_are_mixed(subject, data, tiny_data, tmp_path):
    import shutil

    shutil.copytree(tiny_data, tmp_path / "both")
    shutil.copytree(data, tmp_path / "both", dirs_exist_ok=True)
    stage = Depth(
        1, metric="kl", task=["piqa", "next_token"], items=4, windows=2, length=32, protect_first=0, protect_last=0
    )
    _, report = stage.apply(subject, data=str(tmp_path / "both"))
    parts = [
        outcomes(subject, choices("piqa", data, 4), range(5), kl=True),
        outcomes(subject, next_tokens(stage.ids(subject.tokenizer, tiny_data)), range(5), kl=True),
    ]
    expected = np.concatenate([p.kl[1:] for p in parts], 1).mean(1)
    assert list(report["scores"].values()) == pytest.approx(list(expected), rel=1e-5)


def test_entropy_is_that_of_all_values(subject):
    change = entropy_change(subject, IDS)
    states = []
    handles = [b.register_forward_hook(lambda _m, args, out: states.append((args[0], out))) for b in subject.blocks]
    subject.model(IDS, use_cache=False)
    for handle in handles:
        handle.remove()

    def entropy(x):
        values = nn.functional.rms_norm(x.double(), x.shape[-1:]).flatten().numpy()
        counts, _ = np.histogram(values, np.arange(-10, 10.05, 0.1) + 1e-9)
        p = counts[counts > 0] / counts.sum()
        return -(p * np.log(p)).sum()

    assert change == pytest.approx([entropy(out) - entropy(x) for x, out in states], abs=5e-3)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"metric": "relevance"}, "metric 'relevance' scores blocks by the answers to a task: expected one or more of"),
        (
            {"metric": "perplexity", "task": "piqa"},
            "task 'piqa' does nothing here: it belongs to the metrics relevance",
        ),
        ({"metric": "kl", "task": "pika"}, "unknown task 'pika': did you mean 'piqa'"),
        ({"metric": "kl", "task": "winogrande"}, "scores one ending with several contexts"),
        ({"metric": "margin", "task": ["piqa", "hellaswg"]}, "did you mean 'hellaswag'"),
        ({"metric": "margin", "task": []}, "expected one or more of"),
        ({"metric": "margin", "task": "piqa", "items": 0}, "parameter 'items' is 0: expected at least 1"),
        ({"metric": "margin", "task": "next_token", "items": 5}, "only a task of questions has items"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(BadInput, match=message):
        Depth(2, **settings)


def test_too_few_items_are_named(subject, data):
    with pytest.raises(BadInput, match="task 'piqa' has 20 items to rank by: expected at most that many instead of 21"):
        Depth(1, metric="kl", task="piqa", items=21, protect_first=0).apply(subject, data=data)
    assert set(module.TASKS) == {*SETS, "next_token"} - {"winogrande"}


def test_a_task_at_chance_is_refused_by_name(tiny, data):
    refused = Items("piqa", choices("piqa", data, 20).asked, "acc_norm", 1.0)
    asked = ByAnswers(["piqa"], "relevance", "block", torch.empty(0), data, 20, 0)
    asked.items = [refused]
    with pytest.raises(BadInput, match="task piqa: the model answers .*, and guessing 100.0%: relevance is undefined"):
        asked(tiny(layers=3), [1])


def test_an_item_with_one_ending_is_refused(tmp_path):
    row = '{"id": "q1", "question": "Who?", "choices": {"text": ["I"], "label": ["A"]}, "answerKey": "A"}\n'
    (tmp_path / "ai2_arc").mkdir()
    write_whole(tmp_path / "ai2_arc" / "easy_validation.jsonl", row)
    with pytest.raises(BadInput, match="item q1 of task 'arc_easy' has one ending"):
        choices("arc_easy", str(tmp_path), 1)
