"""The theorem's model measured by the package's own functions, and by hand in float64."""

import math
import re

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import nn

from thesislib.chapters import ch08_pictures as pictures
from thesislib.chapters.ch08_cost import runs
from thesislib.chapters.ch08_theorem import ANSWER, ANSWERS, EVERY_EPS, measured, sentence, snowball, table
from thesislib.compress.depth import influence, window_losses
from thesislib.compress.gain import gains
from thesislib.compress.relevance import relevance
from thesislib.errors import BadInput
from thesislib.model.blocks import remove
from thesislib.sources.choices.choice_set import PARTS


def right(subject, ids):
    """The share of next tokens that the model's own forward pass gets right."""
    with torch.no_grad():
        return (subject.model(ids).logits[:, :-1].argmax(-1) == ids[:, 1:]).double().mean().item()


def cosine_scores(subject, ids):
    """1 - mean cosine of each block's input and output, in float64, by hooks."""
    scores = []
    handles = [
        block.register_forward_hook(
            lambda _m, args, out: scores.append(
                1 - nn.functional.cosine_similarity(args[0].double(), out.double(), dim=-1).mean().item()
            )
        )
        for block in subject.blocks
    ]
    with torch.no_grad():
        subject.model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return scores


@pytest.mark.parametrize("eps", EVERY_EPS)
def test_the_block_with_the_lowest_score_decides_everything(eps):
    subject, ids, _ = snowball(ANSWERS, eps)
    scores = influence(subject, ids)
    assert scores[1] == pytest.approx(eps, abs=3e-7) and scores[1] == min(scores)
    assert (right(subject, ids), right(remove(subject, [1]), ids)) == (1, 0)
    chance = ids[:, 1:].flatten().bincount().max().item() / ids[:, 1:].numel()
    assert 0 < chance < 1
    assert relevance(right(remove(subject, [1]), ids), right(subject, ids), chance) == 1


@pytest.mark.parametrize("eps", [*EVERY_EPS, 0.5, 0.9])
def test_the_score_is_eps_up_to_rounding(eps):
    subject, ids, _ = snowball(ANSWERS, eps, dtype=torch.float64)
    scores = cosine_scores(subject, ids)
    assert scores[1] == pytest.approx(eps, rel=1e-6)
    assert scores[1] < scores[0] == pytest.approx(1 - (1 - eps) / 2, rel=1e-6) and scores[2] > 1
    assert (right(subject, ids), right(remove(subject, [1]), ids)) == (1, 0)


def test_the_last_block_multiplies_the_write_into_the_answer():
    subject, ids, delta = snowball(ANSWERS, 1e-4, dtype=torch.float64)
    states = []
    for block in subject.blocks:
        block.register_forward_hook(lambda _m, args, out: states.append(out))
    with torch.no_grad():
        subject.model(ids, use_cache=False)
    v = len(ANSWERS) + 1
    written = states[1] - states[0]
    assert written[..., -1] == pytest.approx(delta, rel=1e-6) and written[..., :-1].abs().max() == 0
    assert delta < 0.1 * states[0].norm(dim=-1).min()
    answers = (states[2] - states[1])[..., v : 2 * v]
    assert torch.equal(answers.argmax(-1), torch.tensor([0, *ANSWERS])[ids])
    assert answers.amax(-1) == pytest.approx(ANSWER, rel=1e-6)


def test_without_the_first_block_it_still_answers_and_without_the_middle_it_is_worse_than_a_guess():
    subject, ids, _ = snowball(ANSWERS, 1e-3)
    losses = window_losses(subject, ids, range(3)).mean(1)
    assert right(remove(subject, [0]), ids) == 1
    assert losses[0] < math.log(2) < math.log(len(ANSWERS) + 1) < losses[1]


def test_data_are_chains_of_answers():
    _, ids, _ = snowball([2, 3, 1], 0.1, length=4)
    assert ids.tolist() == [[1, 2, 3, 1], [2, 3, 1, 2], [3, 1, 2, 3]]


@pytest.mark.parametrize("eps", [0, 1, -0.1, math.nan])
def test_a_score_out_of_range_is_refused(eps):
    with pytest.raises(BadInput, match="between 0 and 1"):
        snowball(ANSWERS, eps)


@pytest.mark.parametrize("answers", [[], [0], [1, 3]])
def test_an_answer_that_is_no_token_is_refused(answers):
    with pytest.raises(BadInput, match="expected tokens from 1 to"):
        snowball(answers, 0.1)


def test_the_smaller_the_score_the_larger_the_gain():
    """The write stays and becomes the answer; the last block's norm, which it changes too, hardly counts."""
    for eps in (1e-4, 1e-6):
        subject, ids, delta = snowball(ANSWERS, eps)
        assert gains(subject, ids).medians[1][0] == pytest.approx(math.hypot(1, ANSWER / delta), rel=1e-3)


# ---------------------------------------------------------------- what the page says of it


@pytest.mark.parametrize("eps", [0.1, 1e-4])
def test_a_case_has_what_the_models_own_forward_pass_gives(eps):
    subject, ids, delta = snowball(ANSWERS, eps)
    c = measured(eps)
    whole, *without = (right(one, ids) for one in (subject, *(remove(subject, [b]) for b in range(3))))
    assert c.accuracy == pytest.approx((whole, *without)) and c.gain == ANSWER / delta
    assert c.relevance == pytest.approx([relevance(one, whole, c.chance) for one in without])
    assert c.cosine == pytest.approx(cosine_scores(subject, ids), abs=3e-7)


def test_the_table_has_a_row_an_eps_and_the_sentence_counts_contradictions():
    cases = [measured(eps) for eps in EVERY_EPS]
    rows = table(cases)
    assert list(rows.index) == ["0.1", "0.01", "0.001", "0.0001", "1e-05", "1e-06"]
    assert set(rows["right"]) == {"100%"} and set(rows["right without block 1"]) == {"0%"}
    assert set(rows["relevance of blocks 0, 1, 2"]) == {"0, 1, 1"}
    assert "lowest cosine score in 6 of 6 models" in sentence(cases) and "in 6 of 6 the model" in sentence(cases)
    other = cases[0]._replace(cosine=(0.01, 0.1, 1.4), accuracy=(1.0, 1.0, 0.5, 0.0))
    assert "lowest cosine score in 5 of 6 models" in sentence([other, *cases[1:]])
    assert "in 5 of 6 the model" in sentence([other, *cases[1:]])


# ---------------------------------------------------------------- pictures of ideas


def words(svg):
    """The words of a picture."""
    return re.findall(r">([^<>\n]+)</text>", svg)


@pytest.mark.parametrize("eps", [1e-2, 1e-3])
def test_the_drawn_states_are_the_models(eps):
    subject, _, delta = snowball(ANSWERS, eps)
    names, values = pictures.states(eps)
    u, answer, fallback, junk = (values[names.index(n)] for n in ("u", "answer: right", "answer: fallback", "junk"))
    assert u == pytest.approx([0, 0, delta, delta, 0], rel=1e-5)
    assert answer == pytest.approx([0, 0, 0, ANSWER, 0], abs=1e-5) and (fallback == 0.5).all()
    with torch.no_grad():
        final = subject.model(torch.tensor([[1]]), output_hidden_states=True).hidden_states[2][0, 0]
    assert junk[2] == final[2 * (len(ANSWERS) + 1)].item()
    drawn = words(pictures.snowball(eps))
    assert f"x {ANSWER / delta:.0f}" in drawn and f"{eps:.3f}" in drawn


def test_bars_are_as_long_as_the_values():
    _, values = pictures.states(pictures.EPS)
    bars = [float(w) for w, h in re.findall(r'width="([\d.]+)" height="(\d+)"', pictures.snowball()) if h == "16"]
    assert bars == pytest.approx(pictures.UNIT * np.abs(values[values != 0]), rel=1e-4)


def test_a_skipped_block_leaves_its_beginning_to_share():
    assert runs(30) == (30 + sum(range(30)), 30 + 30 * 29)
    svg = pictures.skipping(30, drawn=8)
    run = [w for w in words(svg) if w.isdigit()]
    assert len(run) == runs(8)[0] == 36
    assert any(w.startswith("30 blocks: 465 instead of 900 (52%)") for w in words(svg))


def test_the_best_of_equal_blocks_seems_better_by_its_own_items():
    lowest, _ = quad(lambda x: x * pictures.BLOCKS * norm.pdf(x) * norm.sf(x) ** (pictures.BLOCKS - 1), -9, 9)
    found = pictures.noise()
    assert found.seen == pytest.approx(lowest, abs=0.05) and abs(found.kept) < 3 / math.sqrt(pictures.DRAWS)
    drawn = words(pictures.three_parts())
    assert all(drawn.count(str(i)) == 2 + (i == 0) for i in range(18))  # in the row, in a part; and the axis's 0
    assert [w for w in drawn if w in PARTS] == list(PARTS)
    assert f"{found.seen:.1f} standard errors by its own items, 0.0 by others" in drawn[-1]
