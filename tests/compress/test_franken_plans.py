import pytest
import torch

from thesislib.compress.franken import format_plan, franken_plans, parse_plan, plan_in_words
from thesislib.errors import BadInput
from thesislib.formats.checkpoint import SUPPORTED
from thesislib.formats.load import save_checkpoint
from thesislib.model.blocks import apply_plan

# What the original study ran on 32 blocks, by its own (skip, repeat, times) lists and its own loop, except for the two
# configurations that franken_plans documents as mended.
ORIGINAL = {
    "baseline": ([], [], 1),
    "0-7": (range(8, 32), [], 1),
    "23-31r3": (range(0, 23), range(23, 32), 3),
    "11-19": ([*range(0, 11), *range(20, 32)], [], 1),
    "0-3_28-31": (range(4, 28), [], 1),
    "27-31r5": (range(0, 27), range(27, 32), 5),
    "15_single_skip": ([15], [], 1),
    "only_odd_layers": ([i for i in range(32) if i % 2 == 0], [], 1),
    "first_last_2_with_skips": ([15, 16, 24, 25], [0, 31], 2),
    "mid_expansion_with_repeats": ([6, 7, 8, 9, 25, 26, 27, 28], range(14, 19), 2),
    "2_3rds_plus_llama": (range(11, 21, 2), [], 1),
    "skip_every_2_layers": ([i for i in range(32) if i % 3], [], 1),
    "essential_layers_with_final_repeats": (range(10, 26), [30, 31], 2),
}


def greedy_without_cache(model, ids, n):
    for _ in range(n):
        logits = model(ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("name", ORIGINAL)
def test_franken_plans_at_32_are_the_originals(name):
    skip, repeat, times = ORIGINAL[name]
    expected = [i for i in range(32) for _ in range(times if i in repeat else 1) if i not in skip]
    assert franken_plans(32)[name] == tuple(expected)


@pytest.mark.parametrize("depth", [11, 12, 16, 22, 24, 28, 30, 32, 40, 80])
def test_carried_plans_keep_order_and_kind(depth):
    plans, original = franken_plans(depth), franken_plans(32)
    assert len(plans) == 25
    assert plans["baseline"] == tuple(range(depth))
    assert plans["only_even_layers"] == tuple(range(0, depth, 2))
    for name, plan in plans.items():
        assert list(plan) == sorted(plan), name
        assert plan[-1] < depth
        repeats = max(plan.count(b) for b in set(plan))
        assert repeats == max(original[name].count(b) for b in original[name]), name
    assert len(set(plans.values())) == (24 if depth == 11 else 25)  # in so few blocks two plans fall together
    assert set(range(depth)) - set(plans["15_single_skip"]) != set()  # a single skipped block never vanishes
    assert plans["0_7_15_23_31"][0] == 0 and plans["0_7_15_23_31"][-1] == depth - 1


def test_too_shallow_a_model_is_told_how_deep_it_must_be():
    with pytest.raises(BadInput, match="at least 11 blocks, .*: this one has 10"):
        franken_plans(10)


@pytest.mark.parametrize("plan", [(0,), (0, 1, 2), (0, 0, 1, 1, 5), (3, 2, 1), (1, 0, 1), (0, 2, 4, 4, 4)])
def test_written_plans_read_back(plan):
    assert parse_plan(format_plan(plan), 6) == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the plan is empty"),
        (" , ", "the plan is empty"),
        ("0-2,six", "plan term 'six' is not understood"),
        ("5-2", "runs no block"),
        ("0-2x0", "runs no block"),
        ("0-4:0", "runs no block"),
        ("0-6", "block 6 is out of range: this model has blocks 0 to 5"),
        ("-1", "not understood"),
    ],
)
def test_bad_plans(text, message):
    with pytest.raises(BadInput, match=message):
        parse_plan(text, 6)


@pytest.mark.parametrize("bad", [[], [6], [-1]])
def test_apply_refuses_bad_plans(tiny, bad):
    with pytest.raises(BadInput, match="empty|out of range"):
        apply_plan(tiny(), bad)


def test_repeats_share_storage_and_the_subject_is_untouched(tiny):
    subject = tiny()
    before = subject.fingerprint, [b.self_attn.layer_idx for b in subject.blocks]
    changed = apply_plan(subject, (0, 0, 3, 5, 5, 5))
    for place, block in enumerate((0, 0, 3, 5, 5, 5)):
        for (name, new), old in zip(
            changed.blocks[place].named_parameters(), subject.blocks[block].parameters(), strict=True
        ):
            assert new.data_ptr() == old.data_ptr(), name
    assert [b.self_attn.layer_idx for b in changed.blocks] == list(range(6))
    del subject.__dict__["fingerprint"]  # cached: compute it anew
    assert before == (subject.fingerprint, [b.self_attn.layer_idx for b in subject.blocks])
    assert subject.model.config.num_hidden_layers == 6 and changed.model.config.num_hidden_layers == 6
    assert changed.parameters < subject.parameters
    assert changed.model.lm_head.weight.data_ptr() == changed.model.model.embed_tokens.weight.data_ptr()
    assert changed.fingerprint != subject.fingerprint


def test_hooks_on_one_do_not_fire_on_the_other(tiny):
    subject = tiny()
    changed = apply_plan(subject, range(6))
    calls = []
    changed.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    subject.model(torch.tensor([[1, 2, 3]]))
    assert not calls


def test_plans_compose(tiny):
    subject = tiny()
    twice = apply_plan(apply_plan(subject, (0, 2, 4, 4)), (0, 1, 3))
    assert twice.plan == (0, 2, 4)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(twice.model(ids).logits, apply_plan(subject, (0, 2, 4)).model(ids).logits)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_applying_equals_a_plain_loop_over_blocks(tiny, model_type):
    """The reference runs the blocks by hand, as the original study's code does."""
    subject = tiny(model_type)
    plan = (0, 1, 1, 3, 5)
    ids = torch.arange(1, 13)[None]
    model = subject.model
    with torch.inference_mode():
        h = model.model.embed_tokens(ids)
        rotary = model.model.rotary_emb(h, position_ids=torch.arange(12)[None])
        mask = torch.full((12, 12), float("-inf")).triu(1)[None, None]
        for block in plan:
            h = subject.blocks[block](h, attention_mask=mask, position_embeddings=rotary)
        expected = model.lm_head(model.model.norm(h))
        torch.testing.assert_close(apply_plan(subject, plan).model(ids).logits, expected)


@pytest.mark.parametrize("model_type", SUPPORTED)
@pytest.mark.parametrize("name", franken_plans(12))
def test_generation_with_cache_equals_without(tiny, model_type, name):
    changed = apply_plan(tiny(model_type, layers=12), franken_plans(12)[name])
    ids = torch.tensor([[5, 17, 3]])
    with torch.inference_mode():
        without = greedy_without_cache(changed.model, ids, 6)
        cached = changed.model.generate(
            ids,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            use_cache=True,
            attention_mask=torch.ones_like(ids),
        )
    assert torch.equal(without, cached)


def test_a_saved_plan_loads_as_a_plain_checkpoint(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    changed = apply_plan(tiny(), (0, 0, 4))
    loaded = AutoModelForCausalLM.from_pretrained(save_checkpoint(changed, tmp_path / "saved"))
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(loaded(ids).logits, changed.model(ids).logits)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()


@pytest.mark.embedded
def test_generation_on_the_embedded_model(embedded_subject):
    plan = franken_plans(embedded_subject.depth)["mid_expansion_with_repeats"]
    changed = apply_plan(embedded_subject, plan)
    ids = changed.tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        without = greedy_without_cache(changed.model, ids, 8)
        cached = changed.model.generate(
            ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids)
        )
    assert torch.equal(without, cached)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("0-9", "all blocks"),
        ("0-4,6-9", "without 5"),
        ("0-9:2", "every 2nd block, from 0"),
        ("2-9:3x2", "every 3rd block, from 2, each twice"),
        ("3-9:3", "only 3, 6, 9"),
        ("7-9x3", "only 7-9, each 3 times"),
        ("0-5x2", "without 6-9, all others twice"),
        ("0x2,1-4,6,7-8x3", "without 5, 9; 0 twice; 7-8 3 times"),
        ("5", "only 5"),
    ],
)
def test_a_plan_in_words(plan, words):
    assert plan_in_words(parse_plan(plan, 10), 10) == words


@pytest.mark.parametrize("depth", [11, 30, 32])
def test_different_plans_have_different_words(depth):
    plans = set(franken_plans(depth).values())
    assert len({plan_in_words(plan, depth) for plan in plans}) == len(plans)
