"""Block importance against few-line references, and removal against skipping by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from thesislib.compress.depth import (
    Depth,
    angular_distances,
    importance,
    influence,
    leave_one_out,
    sets_losses,
    taylor,
    window_losses,
)
from thesislib.compress.gptq import Rtn
from thesislib.compress.lowrank import LowRankStage
from thesislib.compress.width import Width
from thesislib.errors import BadInput
from thesislib.formats.load import load_subject, save_checkpoint
from thesislib.model.blocks import Without, apply_plan, remove, removed_parts, without_parts
from thesislib.model.forward import blocks_run
from thesislib.model.sparse import pack_all

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
IDS = torch.randint(0, 250, (5, 16), generator=torch.Generator().manual_seed(1))


def perplexity_of(subject, ids=IDS):
    with torch.no_grad():
        return math.exp(subject.model(ids, labels=ids).loss.item())


def states_by_hooks(subject, ids=IDS):
    """Input of every block and output of the last, (depth + 1, N, T, D)."""
    found = []
    handles = [
        block.register_forward_hook(lambda _m, args, out: found.extend([args[0], out])) for block in subject.blocks
    ]
    with torch.no_grad():
        subject.model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack([*found[::2], found[-1]])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_leave_one_out_is_the_perplexity_of_the_rest(tiny, kind):
    subject = tiny(kind, layers=5)
    found = leave_one_out(subject, IDS, range(5))
    for b, value in found.items():
        rest = apply_plan(subject, [i for i in range(5) if i != b])
        assert value == pytest.approx(perplexity_of(rest), rel=1e-5)


@pytest.mark.parametrize("part", ["block", "attention"])
def test_the_losses_of_sets_are_those_of_the_models_without_them(tiny, part):
    subject = tiny(layers=4)
    sets = [(), (2,), *itertools.combinations(range(4), 2), (3, 0, 1)]
    found = sets_losses(subject, IDS, sets, part, batch=2)
    assert found.shape == (len(sets), len(IDS))
    for some, nats in zip(sets, found, strict=True):
        rest = remove(subject, some, part) if some else subject
        np.testing.assert_allclose(nats, [math.log(perplexity_of(rest, ids[None])) for ids in IDS], rtol=1e-5)
    chunks = [sets_losses(subject, IDS[i : i + 2], sets, part) for i in (0, 2, 4)]  # as a run that is resumed
    np.testing.assert_allclose(np.concatenate(chunks, 1), found, rtol=1e-6)
    np.testing.assert_array_equal(window_losses(subject, IDS, [2], part, batch=2)[0], found[1])


def test_a_set_has_only_blocks_of_the_model(tiny):
    with pytest.raises(BadInput, match="block 4 is out of range: the model has blocks 0 to 3"):
        sets_losses(tiny(layers=4), IDS, [(0, 1), (1, 4)])


def test_pairs_take_little_more_than_a_third_of_the_block_runs():
    pairs = [[b for b in range(30) if b not in pair] for pair in itertools.combinations(range(30), 2)]
    assert len(pairs) == 435 and blocks_run(pairs) == (4494, 12180) and round(4494 / 12180, 2) == 0.37


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_leaving_out_a_part_is_setting_its_output_to_zero(tiny, part):
    subject = tiny(layers=3)
    found = leave_one_out(subject, IDS, range(3), part)
    for b in range(3):
        zeroed = tiny(layers=3)
        zeroed.linears(b)["o_proj" if part == "attention" else "down_proj"].weight.data.zero_()
        assert found[b] == pytest.approx(perplexity_of(zeroed), rel=1e-5)


def test_influence(tiny):
    subject = tiny(layers=4)
    subject.model.model.norm.weight.data.copy_(torch.linspace(0.1, 3, 32))
    x = states_by_hooks(subject)
    expected = [1 - nn.functional.cosine_similarity(x[b], x[b + 1], dim=-1).mean().item() for b in range(4)]
    assert influence(subject, IDS) == pytest.approx(expected, abs=1e-5)
    with torch.no_grad():  # what a reader of hidden_states would have got for the last block
        normed = subject.model.model(IDS, output_hidden_states=True).hidden_states[-1]
    assert abs(1 - nn.functional.cosine_similarity(x[3], normed, dim=-1).mean().item() - expected[3]) > 1e-3


def test_a_block_that_is_the_identity_has_no_influence_and_no_distance(tiny):
    subject = tiny(layers=4)
    for name in ("o_proj", "down_proj"):
        subject.linears(2)[name].weight.data.zero_()
    assert influence(subject, IDS)[2] == pytest.approx(0, abs=1e-6)
    assert angular_distances(subject, IDS)[1, 2] == pytest.approx(0, abs=1e-4)
    assert leave_one_out(subject, IDS, [2])[2] == pytest.approx(perplexity_of(subject), rel=1e-6)


def test_angular_distances(tiny):
    subject = tiny(layers=4)
    x = states_by_hooks(subject)[:, :, -1]
    found = angular_distances(subject, IDS)
    for n in range(5):
        for b in range(5):
            if b + n > 4:
                assert np.isnan(found[n, b])
            else:
                cosine = nn.functional.cosine_similarity(x[b], x[b + n], dim=-1)
                assert found[n, b] == pytest.approx((cosine.clamp(-1, 1).arccos() / math.pi).mean().item(), abs=2e-4)


def test_taylor_is_autograd_of_the_mean_loss(tiny):
    subject = tiny(layers=3)
    found = taylor(subject, IDS, range(3))
    model = tiny(layers=3).model.requires_grad_(True)
    model(IDS, labels=IDS).loss.backward()
    for b in range(3):
        expected = sum(
            (p * p.grad).abs().sum().item() for n, p in model.model.layers[b].named_parameters() if "norm" not in n
        )
        assert found[b] == pytest.approx(expected, rel=1e-4)
    parts = [taylor(subject, IDS, range(3), part) for part in ("attention", "mlp")]
    assert [parts[0][b] + parts[1][b] for b in range(3)] == pytest.approx([found[b] for b in range(3)])
    assert not any(p.requires_grad or p.grad is not None for p in subject.model.parameters())  # left as it was found


def test_magnitude(tiny):
    subject = tiny(layers=3)
    expected = [
        sum(p.abs().sum().item() for n, p in block.named_parameters() if "norm" not in n) for block in subject.blocks
    ]
    assert list(importance(subject, IDS, "magnitude").values()) == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------- the stage


@pytest.mark.parametrize("metric", ["perplexity", "taylor", "magnitude", "influence"])
def test_one_shot_removes_the_least_important_unprotected(tiny, metric, monkeypatch):
    monkeypatch.setattr("thesislib.compress.stage.calibration_windows", lambda *a: IDS)
    subject = tiny(layers=8)
    pruned, report = Depth(2, metric=metric, protect_first=2, protect_last=1).apply(subject)
    scores = importance(subject, IDS, metric)
    expected = sorted(range(2, 7), key=scores.get)[:2]
    assert report["order"] == expected and report["scores"] == {b: scores[b] for b in range(2, 7)}
    assert pruned.depth == 6 and pruned.plan == tuple(b for b in range(8) if b not in expected)


def test_greedy_scores_again_after_each_removal(tiny, monkeypatch):
    monkeypatch.setattr("thesislib.compress.stage.calibration_windows", lambda *a: IDS)
    subject = tiny(layers=8, seed=3)
    left, expected = list(range(8)), []
    for _ in range(3):
        free = [b for b in left if 1 <= b < 7]
        costs = {b: perplexity_of(apply_plan(subject, [i for i in left if i != b])) for b in free}
        expected.append(min(costs, key=costs.get))
        left.remove(expected[-1])
    pruned, report = Depth(3, greedy=True, protect_first=1, protect_last=1).apply(subject)
    assert report["order"] == expected and list(pruned.plan) == left


def test_angular_removes_the_run_of_neighbours_that_turns_least(tiny, monkeypatch):
    monkeypatch.setattr("thesislib.compress.stage.calibration_windows", lambda *a: IDS)
    subject = tiny(layers=8)
    _, report = Depth(3, metric="angular", protect_first=1, protect_last=1).apply(subject)
    distance = angular_distances(subject, IDS)[3]
    first = min(range(1, 5), key=lambda i: distance[i])
    assert report["removed"] == [first, first + 1, first + 2]


def test_removing_nothing_changes_nothing(tiny):
    subject = tiny(layers=4)
    assert perplexity_of(remove(subject, [])) == perplexity_of(subject)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("part", ["block", "attention", "mlp"])
def test_removed_saved_and_loaded_generates_with_cache_what_skipping_by_hook_does(tiny, tmp_path, kind, part):
    subject = tiny(kind, layers=5)
    pruned, _ = Depth(blocks=[0, 3], part=part).apply(subject)
    save_checkpoint(pruned, tmp_path / "pruned")
    loaded = load_subject(tmp_path / "pruned")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    by_hook = tiny(kind, layers=5)
    for b in (0, 3):
        if part == "block":
            by_hook.blocks[b].register_forward_hook(lambda _m, args, _out: args[0])
        elif part == "attention":
            by_hook.blocks[b].self_attn.register_forward_hook(lambda _m, _args, out: (torch.zeros_like(out[0]), None))
        else:
            by_hook.blocks[b].mlp.register_forward_hook(lambda _m, _args, out: torch.zeros_like(out))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = by_hook.model.generate(IDS, use_cache=part == "block", **options)
    for model in (pruned.model, loaded.model, plain):
        assert torch.equal(model.generate(IDS, use_cache=True, **options), expected)
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, by_hook.model(IDS, use_cache=False).logits)


def test_parts_removed_one_after_the_other_add_up(tiny):
    subject = tiny(layers=4)
    first, _ = Depth(blocks=[1], part="attention").apply(subject)
    both, _ = Depth(blocks=[2], part="mlp").apply(first)
    assert removed_parts(both) == {"attention": [1], "mlp": [2]} and removed_parts(subject) == {}
    assert isinstance(both.blocks[1].self_attn, Without) and set(both.linears(1)) == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    shorter = remove(both, [0])
    assert removed_parts(shorter) == {"attention": [0], "mlp": [1]}


def test_the_given_subject_is_not_changed(tiny):
    subject = tiny(layers=4)
    before = subject.fingerprint
    Depth(blocks=[1], part="attention").apply(subject)
    Depth(blocks=[1, 2]).apply(subject)
    again = tiny(layers=4)
    assert again.fingerprint == before and perplexity_of(subject) == perplexity_of(again) and subject.depth == 4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "either 'remove', a number of blocks, or 'blocks'"),
        ({"remove": 2, "blocks": [1]}, "either 'remove'"),
        ({"remove": 0}, "remove is 0: expected at least 1 block"),
        ({"blocks": []}, "expected different indices"),
        ({"blocks": [1, 1]}, "expected different indices"),
        ({"remove": 1, "metric": "perplexty"}, "'perplexty'.*perplexity"),
        ({"remove": 1, "part": "head"}, "unknown part 'head'"),
        ({"remove": 1, "metric": "angular", "greedy": True}, "knows neither greedy nor parts"),
        ({"remove": 1, "protect_first": -1}, "at least 0"),
    ],
)
def test_bad_settings(settings, said):
    with pytest.raises(BadInput, match=said):
        Depth(**settings)


def test_what_a_model_cannot_lose(tiny):
    subject = tiny(layers=6)
    with pytest.raises(
        BadInput, match="cannot remove 1 of 6 blocks: 4 at the beginning and 2 at the end are protected, which leaves 0"
    ):
        Depth(1).apply(subject)
    with pytest.raises(BadInput, match="block 6 is out of range: the model has blocks 0 to 5"):
        Depth(blocks=[6]).apply(subject)
    with pytest.raises(BadInput, match="removing all 6 blocks leaves no model"):
        Depth(blocks=range(6)).apply(subject)
    with pytest.raises(BadInput, match="keep at least one"):
        without_parts(subject, dict.fromkeys(range(6), "attention"))
    with pytest.raises(BadInput, match="metric 'influence' compares a block's input and output"):
        importance(subject, IDS, "influence", part="mlp")


def test_labels():
    assert [Depth(2).label, Depth(blocks=[3, 4, 5]).label, Depth(2, part="mlp").label] == ["D2", "D3", "DM2"]


def test_taylor_on_weights_without_gradients(tiny):
    pruned, _ = Width(2, 4, metric="magnitude").apply(tiny(layers=2))
    quantised, _ = Rtn(group=16).apply(tiny(layers=2))
    pairs, _ = LowRankStage(method="svd").apply(tiny(layers=2))
    for subject in (pack_all(pruned), quantised, pairs):
        with pytest.raises(
            BadInput,
            match=r"metric 'taylor' needs the gradients of blocks\.0\.q_proj, whose weight is computed from packed or "
            "quantised numbers or is a pair of low rank: use perplexity, influence or magnitude",
        ):
            importance(subject, IDS, "taylor")
        assert set(importance(subject, IDS, "magnitude")) == {0, 1}


@pytest.mark.parametrize("metric", ["perplexity", "taylor", "magnitude"])
def test_a_part_that_is_gone_is_not_chosen_again(tiny, tiny_data, metric):
    subject = tiny()
    stage = Depth(
        remove=1,
        part="attention",
        metric=metric,
        text="wikipedia",
        windows=2,
        length=16,
        protect_first=1,
        protect_last=1,
    )
    once, first = stage.apply(subject, data=tiny_data)
    twice, second = stage.apply(once, data=tiny_data)
    assert first["removed"] != second["removed"] and first["removed"][0] not in second["scores"]
    assert removed_parts(twice)["attention"] == sorted(first["removed"] + second["removed"])
    with pytest.raises(BadInput, match=f"the attention of block {first['removed'][0]} is gone already"):
        Depth(blocks=first["removed"], part="attention").apply(once)
    left = subject.depth - 1 - 2
    with pytest.raises(BadInput, match=f"cannot remove {left + 1}: {left} unprotected blocks"):
        Depth(remove=left + 1, part="attention", metric="magnitude", protect_first=1, protect_last=1).apply(once)
