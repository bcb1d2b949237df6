"""Theorem 1 of arXiv 2605.14075 as a model that runs: the block that changes the stream least is worth everything.

For any eps between 0 and 1 there are three blocks of which the middle one has the cosine score eps, the lowest of all,
and the model is always right with it and never without. The paper's text is not at hand: the construction is ours.

The coordinates of the residual stream are one a token (which one was read), one a token (the answer, all that the head
reads), j (junk that nothing reads) and u. The first block adds c j. The middle one adds delta u. The last one turns j
around, and multiplies u by 1 / delta into the answer: the snowball. Without u it adds no answer, and the head falls
back on token 0, which is never right.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from thesislib.compress.depth import influence
from thesislib.compress.relevance import next_tokens, outcomes
from thesislib.errors import BadInput
from thesislib.model.subject import Subject

FALLBACK, ANSWER = 0.5, 2.0  # on the answer coordinates: of token 0 always, of the answer with the middle block
ANSWERS = (3, 1, 4, 1, 5, 2)  # of the tokens 1 to 6, where the page needs some
EVERY_EPS = tuple(10.0**-k for k in range(1, 7))


class Snowball(NamedTuple):
    """A model and the data that it solves.

    Args:
        subject: of three blocks, in float64 or float32.
        ids: (N, T) windows in which each token is the answer to the one before, one window for each token.
        delta: what the middle block writes, and the last one multiplies by ANSWER / delta.
    """

    subject: Subject
    ids: torch.Tensor
    delta: float


def snowball(answers: Sequence[int], eps: float, length: int = 8, dtype: torch.dtype = torch.float32) -> Snowball:
    """A Llama of three blocks whose middle block has the cosine score eps, the lowest, and decides all answers.

    Its attention adds nothing. RMSNorm is no obstacle: the residual stream is equally long for all tokens, so that each
    norm divides by a number that is known beforehand. The score is exact up to rounding: a norm computes in float32, in
    a float64 model too, which leaves a relative error of about 1e-7. `thesislib.compress.depth.influence` takes the
    cosine in float32, so that it tells eps to about 1e-7 only; the answers do not depend on that.

    Args:
        answers: of the tokens 1, 2, ...; each is one of these tokens.
        eps: the middle block's score.
        length: tokens of a window of the data.
        dtype: of the weights.

    Raises:
        BadInput: eps that is not between 0 and 1, or an answer that is no token from 1 on.
    """
    if not 0 < eps < 1:
        raise BadInput(f"eps is {eps}: expected a cosine score between 0 and 1, e.g. 0.001")
    if wrong := [a for a in answers if not 1 <= a <= len(answers)] or not answers:
        raise BadInput(f"answers {wrong or answers}: expected tokens from 1 to {max(1, len(answers))}, one for each")
    v = len(answers) + 1
    tokens, answer, j, u = slice(0, v), v, 2 * v, 2 * v + 1  # coordinates; the answers' are answer + token
    start = math.hypot(1, FALLBACK)  # the length of the embeddings
    c = start * math.sqrt(4 / (1 - eps) ** 2 - 1)  # then the first block's cosine is (1 - eps) / 2
    delta = math.hypot(start, c) * math.sqrt(eps * (2 - eps)) / (1 - eps)  # sqrt(1 / (1 - eps)^2 - 1) without rounding
    turned = c + (start**2 + delta**2) / c  # j becomes -turned: the last block's cosine is below 0

    model: Any = LlamaForCausalLM(_config(v))
    model = model.to(dtype).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.fill_(1.0 if "norm" in name else 0.0)
    model.model.embed_tokens.weight[:, tokens] = torch.eye(v, dtype=dtype)
    model.model.embed_tokens.weight[:, answer] = FALLBACK
    model.lm_head.weight[:, answer : answer + v] = torch.eye(v, dtype=dtype)
    lengths = (start, math.hypot(start, c), math.hypot(start, c, delta))  # of the three blocks' inputs
    for block, length_in, target, write in zip(
        model.model.layers, lengths, (j, u, j), (c, delta, -c - turned), strict=True
    ):
        mlp: Any = block.mlp
        s = _scale(length_in, model.config)
        mlp.gate_proj.weight[0, tokens] = mlp.up_proj.weight[0, tokens] = 1  # any token, so a constant
        mlp.down_proj.weight[target, 0] = write / (_silu(s) * s)
    s = _scale(lengths[-1], model.config)
    for token, right in enumerate(answers, 1):
        mlp.gate_proj.weight[token, token] = mlp.up_proj.weight[token, u] = 1
        mlp.down_proj.weight[answer + right, token] = ANSWER / delta / (_silu(s) * s)
    chains = [torch.arange(1, v)]
    for _ in range(length - 1):
        chains.append(torch.tensor(answers)[chains[-1] - 1])
    return Snowball(Subject(model, _tokenizer(v), f"snowball {eps:g}"), torch.stack(chains, 1), delta)


def _config(v: int) -> LlamaConfig:
    """Of a vocabulary of v tokens."""
    width = 2 * v + 2
    return LlamaConfig(
        vocab_size=v,
        hidden_size=width,
        intermediate_size=v,
        num_hidden_layers=3,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=width,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def _scale(length: float, config: LlamaConfig) -> float:
    """What RMSNorm multiplies a vector of this length by."""
    return 1 / math.sqrt(length**2 / config.hidden_size + config.rms_norm_eps)


def _silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def _tokenizer(v: int) -> PreTrainedTokenizerFast:
    """Numbers apart by spaces are tokens."""
    raw = Tokenizer(models.WordLevel({str(i): i for i in range(v)}, unk_token="0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="0")


# ---------------------------------------------------------------- what the page says of it


class Case(NamedTuple):
    """A snowball, measured.

    Args:
        eps: that it was made for.
        cosine: each block's `thesislib.compress.depth.influence`.
        accuracy: of the whole model and without each block.
        chance: the accuracy of always giving the commonest answer.
        relevance: of each block.
        gain: what the last block multiplies the middle one's write by.
    """

    eps: float
    cosine: tuple[float, ...]
    accuracy: tuple[float, ...]
    chance: float
    relevance: tuple[float, ...]
    gain: float


def measured(eps: float, answers: Sequence[int] = ANSWERS) -> Case:
    """Measure a snowball by the package's own functions."""
    subject, ids, delta = snowball(answers, eps)
    items = next_tokens(ids)
    found = outcomes(subject, items, range(subject.depth))
    accuracy, relevance = (tuple(x.tolist()) for x in (found.accuracy(), found.scores("relevance")))
    return Case(eps, tuple(influence(subject, ids)), accuracy, items.chance, relevance, ANSWER / delta)


def table(cases: Sequence[Case]) -> pd.DataFrame:
    """A row an eps: scores, accuracy with and without the middle block, relevance, and the gain of its write."""
    rows = [
        {
            "eps": f"{c.eps:g}",
            "cosine of blocks 0, 1, 2": ", ".join(f"{score:.2g}" for score in c.cosine),
            "right": f"{c.accuracy[0]:.0%}",
            "right without block 1": f"{c.accuracy[2]:.0%}",
            "guessed": f"{c.chance:.0%}",
            "relevance of blocks 0, 1, 2": ", ".join(f"{r:.2g}" for r in c.relevance),
            "block 2 multiplies by": f"{c.gain:,.1f}",
        }
        for c in cases
    ]
    return pd.DataFrame(rows).set_index("eps")


def sentence(cases: Sequence[Case]) -> str:
    """In how many cases the score and relevance contradict each other, and by how much."""
    eps, gains = [c.eps for c in cases], [c.gain for c in cases]
    lowest = sum(c.cosine[1] == min(c.cosine) for c in cases)
    decides = sum(c.accuracy[0] == 1 and c.accuracy[2] == 0 for c in cases)
    off = max(abs(c.cosine[1] - c.eps) for c in cases)
    return (
        f"For eps from {max(eps):g} to {min(eps):g} the middle block has the lowest cosine score in {lowest} of "
        f"{len(cases)} models, within {off:.0e} of eps; in {decides} of {len(cases)} the model is always right with it "
        f"and never without. The last block multiplies its write by {min(gains):.1f} to {max(gains):.0f}. The "
        "construction says that such a model exists, and nothing of how often training makes one."
    )
