"""A training of seconds; what is measured of it against the model's own forward pass, and rates by hand."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from thesislib.chapters import ch08_over_training as over
from thesislib.chapters.ch08_figures_training import training_chart
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


# ---------------------------------------------------------------- the record


def test_a_killed_run_goes_on_with_the_seed_that_it_was_at(tiny, tiny_data, tmp_path, monkeypatch):
    subject, whole, killed = tiny(), tmp_path / "whole.json", tmp_path / "killed.json"
    over.record(subject, tiny_data, [0, 2], whole, TINY)
    asked = []

    def killed_in_the_second(subject, settings, seed, data):
        asked.append(seed)
        for c in trained(subject, settings, seed, data):
            if len(asked) == 2 and c.step == TINY.measured[1]:
                raise KeyboardInterrupt
            yield c

    monkeypatch.setattr(over, "trained", killed_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        over.record(subject, tiny_data, [0, 2], killed, TINY)
    assert not killed.exists()
    over.record(subject, tiny_data, [0, 2], killed, TINY)
    assert asked == [0, 2, 2] and {f.name for f in tmp_path.iterdir()} == {"whole.json", "killed.json"}
    found, again = over.read(whole), over.read(killed)
    assert found.checkpoints == again.checkpoints and list(found.checkpoints) == [0, 2]
    for kept, c in zip(found.checkpoints[2], trained(subject, TINY, 2, tiny_data), strict=True):
        assert (kept.right, kept.commonest, kept.step, kept.seen) == (c.right, c.commonest, c.step, c.seen)
        assert np.allclose(kept.nats, c.nats, atol=0.0051) and np.allclose(kept.cosine, c.cosine, atol=1e-7)


def test_the_record_says_what_was_trained_and_on_what(tiny, tiny_data, tmp_path):
    over.record(tiny(), tiny_data, [0], tmp_path / "r.json", TINY)
    made = over.read(tmp_path / "r.json").made
    assert made["fingerprint"] == tiny().fingerprint and made["dtype"] == "float32"
    settings = made["settings"]
    assert {name: settings[name] for name in asdict(TINY)} == asdict(TINY) and settings["width"] == 16
    # embedding, tied; per block 2 norms, q, k, v, o, and gate, up, down of 32; a last norm
    block = 2 * 16 + 2 * 16 * 16 + 2 * 8 * 16 + 3 * 16 * 32
    assert settings["parameters"] == 256 * 16 + 3 * block + 16
    assert settings["held_out_tokens"] == 5 * 32 and settings["text_tokens"] % 32 == 0


def test_what_was_begun_otherwise_is_not_gone_on_with(tiny, tiny_data, tmp_path):
    file, short = tmp_path / "r.json", replace(TINY, steps=9, checkpoints=2)
    over.record(tiny(), tiny_data, [0], file, short)
    file.rename(tmp_path / "r.json.partial")
    over.record(tiny(), tiny_data, [0], file, TINY)
    assert [c.step for c in over.read(file).checkpoints[0]] == TINY.measured
    file.rename(tmp_path / "r.json.partial")
    over.record(tiny(), tiny_data, [1], file, TINY)  # the other seed is not wanted now
    assert list(over.read(file).checkpoints) == [1]


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_seeds_are_different_ones(tiny, tmp_path, seeds):
    with pytest.raises(BadInput, match="expected different ones"):
        over.record(tiny(), "embedded", seeds, tmp_path / "r.json", TINY)


# ---------------------------------------------------------------- what the page says

COSINE = (0.9, 0.3, 0.2, 0.1)


def at(step, seed, lost, whole=50, cosine=COSINE):
    """Twenty windows of 100 predictions, of which 10 are the commonest token; block b loses lost[b] in each."""
    wiggle = [w % 2 for w in range(20)]
    right = tuple(tuple(n + w for w in wiggle) for n in (whole, *(whole - x for x in lost)))
    nats = tuple(tuple(100.0 + x + w for w in wiggle) for x in (0, *lost))
    return Checkpoint(seed, step, 100 * step, 1.0, 100, (10,) * 20, right, nats, cosine)


def story(first, last):
    """Two seeds: at chance at step 1, then two orders of what is lost without a block."""
    rows = {
        seed: [at(1, seed, (0, 0, 0, 0), 9), at(4, seed, first), at(9, seed, [x + seed for x in last])]
        for seed in (0, 1)
    }
    settings = {"blocks": 4, "parameters": 5, "text_tokens": 300, "held_out_tokens": 2000, "vocabulary": 7}
    return over.Trained(rows, {"settings": settings})


ALIKE, AGAINST = (30, 20, 10, 5), (5, 10, 20, 30)


def test_the_correlation_is_scipys_and_undefined_at_chance():
    c = at(4, 0, (30, 5, 10, 20))
    relevance, loss = over.correlation(c, "relevance"), over.correlation(c, "loss")
    assert relevance.value == loss.value == pytest.approx(spearmanr(c.relevance, c.cosine).statistic)
    assert (relevance.low, relevance.high) == pytest.approx((c.rank_correlation,) * 2)  # windows differ in nothing
    assert over.correlation(c, "loss", 1).value == -1
    lucky = at(4, 0, (0, 0, 0, 0), 10)  # a half token more than the commonest gives, in windows that spread
    lucky = replace(lucky, right=tuple(tuple(10 + 30 * (w == 0) for w in range(20)) for _ in range(5)))
    assert lucky.accuracy[0] > lucky.chance and not over.above_chance(lucky)
    assert over.correlation(lucky, "relevance") is None
    assert over.correlation(lucky, "loss") is not None


def test_intervals_are_of_other_windows():
    r = np.random.default_rng(0)
    right = tuple(tuple(r.binomial(100, p, 20).tolist()) for p in (0.5, 0.2, 0.4, 0.41, 0.42))
    c = replace(at(4, 0, ALIKE), right=right)
    found = over.correlation(c, "relevance")
    assert found.low < found.value <= found.high == 1


def test_steps_tell_relevance_and_the_blocks_in_their_order():
    chance, first, last = over.steps(story(AGAINST, ALIKE))
    assert (chance.defined, first.defined, last.defined) == (False, True, True)
    assert (first.place(0), first.place(1)) == ([3, 3], [2, 2]) and last.place(0) == [0, 0]
    assert first.relevance[0] == pytest.approx([1 - (40.5 - x) / 40.5 for x in AGAINST])
    table = over.table([chance, first, last])
    assert list(table["relevance and cosine"]) == ["undefined", "-1.00 (-1.00 to -1.00)", "1.00 (1.00 to 1.00)"]
    assert list(table["most relevant block"]) == ["undefined", "3", "0"]
    assert table.loc[9, "tokens read"] == "900"


def test_sentences_tell_where_relevance_begins_and_how_agreement_goes():
    what, begins, first, last, every, rest, noise = over.sentences(story(AGAINST, ALIKE))
    assert "4 blocks and 5 parameters" in what and "300 tokens of text 3.0 times over" in what
    assert "50.5% (50.5% to 50.5%) of next tokens right" in what and "commonest gives 10.0%" in what
    assert "from step 4 on" in begins and "at step 1 it is not yet" in begins
    assert "At step 4 block 3 is the most relevant, with 0.74" in first and "the next is block 2." in first
    assert "mean relevance of 0.29" in first and "mean cosine score of 0.47" in first  # 35 / 3 / 40.5; 1.4 / 3
    assert "At step 9 block 0" in last
    assert (
        "that of relevance rises in every seed beyond all first ones, from -1.00 (-1.00 to -1.00) to 1.00" in every
        and "over all blocks" in every
    )
    assert "over blocks 1 to 3" in rest and "that of loss rises" in rest
    assert "0.00 and 0.00 wide with relevance" in noise  # windows that differ in nothing
    falls = over.sentences(story(ALIKE, AGAINST))[-3]
    assert "relevance falls" in falls and "loss falls" in falls
    assert "relevance stays within the spread of seeds" in over.sentences(story(ALIKE, ALIKE))[-3]


def test_a_record_that_never_is_above_chance_says_so():
    record = over.Trained({0: [at(1, 0, (0, 0, 0, 0), 9)]}, story(ALIKE, ALIKE).made)
    assert "undefined" in over.sentences(record)[-1] and len(over.sentences(record)) == 2


def test_the_chart_has_the_steps_with_relevance_and_their_means():
    found = over.steps(story(AGAINST, ALIKE))
    relevance, cosine, agreement = training_chart(found).axes
    words = [t.get_text() for t in relevance.texts]
    assert words == [f"{x:.2f}" for s in found[1:] for x in s.relevance.mean(0)]
    assert [t.get_text() for t in cosine.texts] == [f"{x:.2f}" for x in COSINE] * 2
    assert [t.get_text() for t in agreement.get_xticklabels()] == ["4", "9"]


def test_a_record_comes_back_from_its_file(tmp_path):
    (tmp_path / "r.json").write_text(story(AGAINST, ALIKE).to_json())
    assert over.read(tmp_path / "r.json") == story(AGAINST, ALIKE)
    assert set(json.loads((tmp_path / "r.json").read_text())) == {"checkpoints", "made"}
