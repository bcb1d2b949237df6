"""The theorem's model measured by the package's own functions, and by hand in float64."""

import math

import pytest
import torch
from torch import nn

from thesislib.chapters.ch08_theorem import ANSWER, snowball
from thesislib.compress.depth import influence, window_losses
from thesislib.compress.gain import gains
from thesislib.compress.relevance import relevance
from thesislib.errors import BadInput
from thesislib.model.blocks import remove

ANSWERS = [3, 1, 4, 1, 5, 2]
EVERY_EPS = [10.0**-k for k in range(1, 7)]


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
