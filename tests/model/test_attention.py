import numpy as np
import pytest
import torch

from thesislib.errors import BadInput
from thesislib.model.attention import attention_maps, sink_share
from thesislib.model.blocks import apply_plan


def test_rows_sum_to_one_and_nobody_looks_ahead(tiny):
    subject = tiny()
    maps, tokens = attention_maps(subject, "abcdefgh")
    assert maps.shape == (6, 4, 8, 8) and tokens == list("abcdefgh")
    np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)
    assert np.triu(maps, 1).max() == 0


def test_the_model_is_left_as_it_was(tiny):
    subject = tiny()
    ids = torch.tensor([[1, 2, 3]])
    before, implementation = subject.model(ids).logits, subject.model.config._attn_implementation
    attention_maps(apply_plan(subject, (0, 3)), "abc")
    attention_maps(subject, "abc")
    assert subject.model.config._attn_implementation == implementation
    assert torch.equal(subject.model(ids).logits, before)


def test_first_map_by_hand(tiny):
    subject = tiny()
    maps, _ = attention_maps(subject, "abcd")
    model, block = subject.model, subject.blocks[0]
    ids = subject.tokenizer("abcd", return_tensors="pt", add_special_tokens=False)["input_ids"]
    x = block.input_layernorm(model.model.embed_tokens(ids))
    heads, dim = 4, 8
    q = block.self_attn.q_proj(x).view(4, heads, dim).transpose(0, 1)
    k = block.self_attn.k_proj(x).view(4, 2, dim).transpose(0, 1).repeat_interleave(2, 0)
    cos, sin = (r[0] for r in model.model.rotary_emb(x, position_ids=torch.arange(4)[None]))
    turn = lambda v: v * cos + torch.cat([-v[..., dim // 2 :], v[..., : dim // 2]], -1) * sin  # noqa: E731
    scores = turn(q) @ turn(k).transpose(1, 2) / dim**0.5 + torch.full((4, 4), float("-inf")).triu(1)
    np.testing.assert_allclose(maps[0], scores.softmax(-1).detach().numpy(), atol=1e-5)


def test_sink_share():
    maps = np.zeros((2, 1, 3, 3))
    maps[0, :, :, 0] = 1
    maps[1] = np.eye(3)
    assert sink_share(maps).tolist() == [1, 0]


def test_short_text(tiny):
    with pytest.raises(BadInput, match="has 1 tokens: an attention map needs at least 2"):
        attention_maps(tiny(), "a")
