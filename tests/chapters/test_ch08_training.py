"""A training of seconds; what is measured of it against the model's own forward pass, and rates by hand."""

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from thesislib.chapters.ch08_training import (
    Checkpoint,
    FromScratch,
    small_config,
    small_tokenizer,
    trained,
)
from thesislib.errors import BadInput

TINY = FromScratch(
    narrow=2, blocks=3, vocabulary=256, length=32, batch=4, steps=30, first=3, checkpoints=3, warmup=3, held_out=5
)


def test_a_run_learns_and_its_seed_decides_it(tiny, tiny_data):
    first, again, other = (list(trained(tiny(), TINY, seed, tiny_data)) for seed in (0, 0, 1))
    assert first == again != other
    assert [c.step for c in first] == TINY.measured == [3, 9, 30]
    assert [c.seen for c in first] == [3 * 128, 9 * 128, 30 * 128]
    assert first[-1].loss < first[0].loss < 6 and first[-1].perplexity[0] < first[0].perplexity[0] / 2
    assert all(len(c.right) == len(c.nats) == 4 and len(c.cosine) == 3 for c in first)
    assert all(len(row) == 5 and max(row) <= c.predicted == 31 for c in first for row in c.right)


def test_a_shorter_run_is_the_beginning_of_a_longer_one(tiny, tiny_data):
    short = replace(TINY, steps=9, checkpoints=2)
    assert list(trained(tiny(), short, 0, tiny_data)) == list(trained(tiny(), TINY, 0, tiny_data))[:2]


def checkpoint(*right, commonest=(1, 1)):
    """Two windows of ten predictions; cosine scores fall from block to block."""
    rows = tuple(right)
    cosine = tuple(1 / (b + 1) for b in range(len(rows) - 1))
    return Checkpoint(0, 1, 1, 1.0, 10, commonest, rows, ((10.0, 20.0),) * len(rows), cosine)


def test_relevance_by_hand():
    found = checkpoint((4, 6), (1, 1), (0, 0), (5, 5), (3, 4), (6, 8))
    assert (found.chance, found.accuracy[:2]) == (0.1, [0.5, 0.1])
    assert found.relevance == pytest.approx([1, 1, 0, 1 - 0.25 / 0.4, 1 - 0.6 / 0.4])
    assert found.perplexity == pytest.approx([torch.e**1.5] * 6)
    ranks = torch.tensor([[4.5, 4.5, 2, 3, 1], [5, 4, 3, 2, 1]]).double()
    assert found.rank_correlation == pytest.approx(torch.corrcoef(ranks)[0, 1].item())


def test_a_model_at_chance_has_no_relevance():
    found = checkpoint((1, 1), (0, 0), (2, 2))
    assert found.relevance is None and found.rank_correlation is None
    same = checkpoint((4, 6), (3, 3), (3, 3))
    assert same.relevance == pytest.approx([0.5, 0.5]) and same.rank_correlation is None


# ---------------------------------------------------------------- the model's tokenizer and configuration


def pairs():
    """A byte-pair tokenizer of ab, cd, abcd, cda in this order of merges."""
    vocabulary = ["<end>", *"abcd", "ab", "cd", "abcd", "cda"]
    merges = [("a", "b"), ("c", "d"), ("ab", "cd"), ("cd", "a")]
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges))
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")


@pytest.mark.parametrize(
    ("size", "pieces"),
    [(4, [*"abcdcda"]), (5, ["ab", *"cdcda"]), (7, ["abcd", "cd", "a"]), (50, ["abcd", "cda"])],
)
def test_a_tokenizer_is_cut_to_its_first_merges(size, pieces):
    cut = small_tokenizer(pairs(), size)
    assert cut.tokenize("abcdcda") == pieces and len(cut) == min(size, 8)
    assert sorted(cut.get_vocab().values()) == list(range(len(cut)))


def test_a_cut_tokenizer_reads_any_text(embedded_subject):
    text, cut = "Größe: 1,024 naïve façades — 東京\n\n", small_tokenizer(embedded_subject.tokenizer, 1024)
    ids = cut(text)["input_ids"]
    assert cut.decode(ids) == text and len(cut) == 1024 and max(ids) < 1024


def test_a_tokenizer_that_cannot_be_cut_is_refused():
    with pytest.raises(BadInput, match="vocabulary 3 is too small: the tokenizer's single characters are 4"):
        small_tokenizer(pairs(), 3)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(BadInput, match=r"WordLevel cannot be cut: expected byte pairs"):
        small_tokenizer(words, 10)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_the_model_is_of_the_subjects_kind(tiny, kind):
    whole = tiny(kind).model.config
    config = small_config(whole, TINY, 300)
    model = AutoModelForCausalLM.from_config(config)
    assert config.model_type == kind and len(model.model.layers) == 3
    assert model.get_input_embeddings().weight.shape == (300, 16)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (16, 16) and attention.k_proj.weight.shape == (8, 16)
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(0.25, rel=0.1)
    assert whole.hidden_size == 32 and whole.num_hidden_layers == 6  # left as it was


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"narrow": 3}, "narrow 3 does not divide the subject's hidden_size 32 into a multiple of 4"),
        ({"blocks": 7}, "7 blocks asked for: the subject has 6"),
    ],
)
def test_a_subject_that_cannot_be_made_small_is_refused(tiny, changes, message):
    with pytest.raises(BadInput, match=message):
        small_config(tiny().model.config, replace(TINY, **changes), 300)


def test_checkpoints_are_geometric_and_differ():
    assert FromScratch().measured == [20, 29, 43, 63, 93, 137, 202, 296, 435, 640]
    with pytest.raises(BadInput, match="5 checkpoints from step 1 to 3 fall on the same steps: expected at most 3"):
        FromScratch(steps=3, first=1, checkpoints=5)
