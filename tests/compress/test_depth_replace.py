"""What replaces removed blocks, against the same written by hand, and models in which a replacement loses nothing."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from thesislib.compress.depth import Depth
from thesislib.compress.gptq import Gptq, Rtn
from thesislib.compress.replace import gaps, measure, replaced, ridge
from thesislib.compress.stage import as_entry
from thesislib.compress.width import Width
from thesislib.errors import BadInput
from thesislib.experiment import identity_of, recipe_hash
from thesislib.formats.artifact import load_artifact, save_artifact
from thesislib.formats.sizes import predicted_disk_bytes, sizes
from thesislib.model.blocks import remove, without_parts
from thesislib.model.layers import adapt
from thesislib.model.sparse import pack_all
from thesislib.pipeline.forecast import forecast
from thesislib.pipeline.label import Label
from thesislib.pipeline.recipe import Recipe, read_recipe
from thesislib.pipeline.run import compress
from thesislib.records.store import Store

IDS = torch.randint(0, 250, (6, 24), generator=torch.Generator().manual_seed(2))
HOWS = ("scalar", "bias", "linear")


@pytest.fixture(autouse=True)
def calibration(monkeypatch):
    monkeypatch.setattr("thesislib.compress.stage.calibration_windows", lambda *a: IDS)


def exact(subject):
    """In float64, where sums lose nothing; transformers' norms still round to float32."""
    subject.model.double()
    return subject


def states(subject):
    """The residual before each block and after the last, (depth + 1, N T, D), and each MLP's write."""
    x, m = [], []
    hooks = [b.register_forward_hook(lambda _m, args, out: x.extend([args[0], out])) for b in subject.blocks]
    hooks += [b.mlp.register_forward_hook(lambda _m, _args, out: m.append(out)) for b in subject.blocks]
    with torch.no_grad():
        subject.model(IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack([*x[::2], x[-1]]).flatten(1, 2), torch.stack(m).flatten(1, 2)


def logits(subject):
    return logits_of(subject.model)


def logits_of(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def by_hand(subject, removed, inputs):
    """The logits without blocks, each first of a gap replaced by a function of its input: {block: function}."""
    hooks = []
    for b in removed:
        new = inputs.get(b, lambda x: x)
        hooks.append(subject.blocks[b].register_forward_hook(lambda _m, args, _out, new=new: new(args[0])))
    found = logits(subject)
    for hook in hooks:
        hook.remove()
    return found


def test_gaps_are_runs_of_neighbours():
    assert gaps([5, 1, 2, 9, 8, 3]) == [[1, 2, 3], [5], [8, 9]]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_folded_scale_is_the_residual_scaled_by_hand(tiny, kind, tied):
    subject = exact(tiny(kind, layers=7, rms_norm_eps=1e-14, tie_word_embeddings=tied))
    x, _ = states(subject)
    one = (x[3].norm(dim=1).mean() / x[1].norm(dim=1).mean()).item()
    small, report = replaced(subject, [1, 2, 4], "scalar", IDS)
    assert report[0]["scale"] == pytest.approx(one, rel=1e-9)
    # the second gap is measured where the first is replaced already
    two = report[1]["scale"]
    expected = by_hand(subject, [1, 2, 4], {1: lambda x: one * x, 4: lambda x: two * x})
    torch.testing.assert_close(logits(small), expected, rtol=1e-4, atol=1e-5)
    assert abs(one - 1) > 0.05 and not torch.allclose(logits(small), logits(remove(subject, [1, 2, 4])))


def test_the_second_scale_is_measured_after_the_first_is_in_place(tiny):
    subject = exact(tiny(layers=6, rms_norm_eps=1e-14))
    _, (first, second) = replaced(subject, [1, 3], "scalar", IDS)
    scaled = subject.blocks[1].register_forward_hook(lambda _m, args, _out: first["scale"] * args[0])
    x, _ = states(subject)
    scaled.remove()
    assert second["scale"] == pytest.approx((x[4].norm(dim=1).mean() / x[3].norm(dim=1).mean()).item(), rel=1e-8)


def test_epsilon_counts_as_epsilon_times_the_squared_scale(tiny):
    subject = exact(tiny(layers=4, rms_norm_eps=1e-2))
    small, (gap,) = replaced(subject, [1], "scalar", IDS)
    found = logits(small)  # the norms are shared
    for block in subject.blocks[2:]:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.variance_epsilon *= gap["scale"] ** 2
    subject.model.model.norm.variance_epsilon *= gap["scale"] ** 2
    expected = by_hand(subject, [1], {1: lambda x: gap["scale"] * x})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "smollm3"])
def test_a_bias_is_the_mean_write(tiny, kind):
    subject = exact(tiny(kind, layers=6))
    x, _ = states(subject)
    small, (gap,) = replaced(subject, [2, 3], "bias", IDS)
    mean = (x[4] - x[2]).mean(0)
    torch.testing.assert_close(small.blocks[1].mlp.down_proj.bias, nn.Parameter(mean), rtol=1e-9, atol=1e-12)
    expected = by_hand(subject, [2, 3], {2: lambda x: x + mean})
    torch.testing.assert_close(logits(small), expected, rtol=1e-9, atol=1e-9)
    left = (x[4] - x[2] - mean).square().sum() / (x[4] - x[2]).square().sum()
    assert gap["left"] == pytest.approx(left.item(), rel=1e-9)


def test_a_model_whose_mlp_has_biases_keeps_them(tiny):
    subject = exact(tiny(layers=4, mlp_bias=True))
    for b in range(4):
        for name, module in subject.linears(b).items():
            if module.bias is not None and name != "o_proj":
                module.bias.data.normal_(generator=torch.Generator().manual_seed(b))
    x, _ = states(subject)
    small, _ = replaced(subject, [2], "bias", IDS)
    expected = by_hand(subject, [2], {2: lambda y: y + (x[3] - x[2]).mean(0)})
    torch.testing.assert_close(logits(small), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_a_linear_map_is_the_ridge_regression_on_the_mlp_before(tiny, kind):
    subject = exact(tiny(kind, layers=6))
    x, m = states(subject)
    small, (gap,) = replaced(subject, [2, 3], "linear", IDS)
    M, R = m[1], x[4] - (x[2] - m[1])
    penalty = 1e-6 * M.square().sum() / 32
    rows = torch.cat([M, penalty.sqrt() * torch.eye(32, dtype=M.dtype)])  # ridge as least squares with more rows
    T = torch.linalg.lstsq(rows, torch.cat([R, torch.zeros(32, 32, dtype=M.dtype)])).solution
    old = subject.blocks[1].mlp.down_proj.weight
    torch.testing.assert_close(small.blocks[1].mlp.down_proj.weight.detach(), T.T @ old, rtol=1e-6, atol=1e-8)
    left = (R - M @ T).square().sum() / (x[4] - x[2]).square().sum()
    assert gap["left"] == pytest.approx(left.item(), rel=1e-6)
    assert gap["left"] < 0.95


def test_without_a_penalty_the_ridge_is_least_squares():
    r = torch.Generator().manual_seed(0)
    M, R = (torch.randn(200, 16, dtype=torch.float64, generator=r) for _ in range(2))
    expected = torch.linalg.lstsq(M, R).solution
    torch.testing.assert_close(ridge(M.T @ M, M.T @ R, 0.0), expected, rtol=1e-9, atol=1e-9)
    apart = [(ridge(M.T @ M, M.T @ R, a) - expected).norm().item() for a in (1e-2, 1e-4, 1e-6)]
    assert apart[0] > 10 * apart[1] > 100 * apart[2] > 0


# ---------------------------------------------------------------- models in which nothing is lost


def silent(subject, block):
    """Let a block write nothing by itself."""
    for name in ("o_proj", "down_proj"):
        subject.linears(block)[name].weight.data.zero_()


class Instead(nn.Module):
    """A block's MLP that writes a function of the residual before it; its norm lets everything through."""

    def __init__(self, write):
        super().__init__()
        self.write = write

    def forward(self, x):
        return self.write(x)


def constructed(tiny, write, layers=5, block=2):
    """A model whose block writes write(x, m): x is its input, m the write of the MLP before it."""
    subject = exact(tiny(layers=layers, rms_norm_eps=1e-14))
    silent(subject, block)
    seen = {}
    subject.blocks[block - 1].mlp.register_forward_hook(lambda _m, _args, out: seen.update(m=out))
    subject.blocks[block].post_attention_layernorm = nn.Identity()
    subject.blocks[block].mlp = Instead(lambda x: write(x, seen["m"]))
    return subject


C = torch.linspace(-3, 4, 32, dtype=torch.float64)
A = torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("how", "write"),
    [("scalar", lambda x, m: 0.7 * x), ("bias", lambda x, m: C.expand_as(x)), ("linear", lambda x, m: m @ A)],
)
def test_a_block_that_is_the_replacement_is_lost_without_loss(tiny, monkeypatch, how, write):
    subject = constructed(tiny, write)
    if how == "linear":
        monkeypatch.setattr("thesislib.compress.replace.ridge", lambda m, c: ridge(m, c, 0.0))
    whole = logits(subject)
    small, (gap,) = replaced(subject, [2], how, IDS)
    torch.testing.assert_close(logits(small), whole, rtol=1e-6, atol=1e-6)
    assert gap["left"] == pytest.approx(0, abs=1e-9)
    assert not torch.allclose(logits(remove(subject, [2])), whole, atol=1e-2)


def test_a_block_that_writes_nothing_needs_nothing(tiny):
    subject = exact(tiny(layers=5))
    silent(subject, 2)
    for how in HOWS:
        small, (gap,) = replaced(subject, [2], how, IDS)
        torch.testing.assert_close(logits(small), logits(subject), rtol=1e-3, atol=1e-3)
        assert gap["left"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("how", HOWS)
def test_the_last_block_can_be_replaced(tiny, how):
    subject = exact(tiny(layers=4, rms_norm_eps=1e-14))
    small, _ = replaced(subject, [3], how, IDS)
    same = torch.allclose(logits(small), logits(remove(subject, [3])))
    assert same == (how == "scalar")  # nothing writes after it, and the last norm does not see a scale


# ---------------------------------------------------------------- the stage, and what comes after it


@pytest.mark.parametrize("how", HOWS)
def test_the_stage_is_removal_and_replacement_and_leaves_its_subject_alone(tiny, how):
    subject = tiny(layers=8)
    before = subject.fingerprint
    plain, first = Depth(3, protect_first=1, protect_last=1).apply(subject)
    small, report = Depth(3, protect_first=1, protect_last=1, replace=how).apply(subject)
    assert report["removed"] == first["removed"] and report["scores"] == first["scores"]
    assert [b for gap in report["gaps"] for b in gap["blocks"]] == report["removed"] and report["replace"] == how
    assert tiny(layers=8).fingerprint == before and subject.fingerprint == before == fresh(subject)
    assert (small.depth, small.plan) == (5, plain.plan) and not torch.equal(logits(small), logits(plain))
    again, _ = Depth(blocks=first["removed"], replace=how).apply(subject)
    assert torch.equal(logits(again), logits(small))
    assert "replace" not in first and json.dumps(report)


def fresh(subject):
    return type(subject)(subject.model, subject.tokenizer, subject.name).fingerprint


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kind", ["llama", "smollm3"])
def test_transformers_reads_the_artifact_as_an_ordinary_checkpoint(tiny, tmp_path, how, kind):
    small, _ = Depth(blocks=[1, 3], replace=how).apply(tiny(kind, layers=5))
    save_artifact(small, tmp_path / "small")
    assert predicted_disk_bytes(small) == sum(f.stat().st_size for f in (tmp_path / "small").glob("*.safetensors"))
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(logits_of(read), logits(small))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(read.generate(IDS, **options), small.model.generate(IDS, **options))
    assert load_artifact(tmp_path / "small").fingerprint == small.fingerprint


@pytest.mark.parametrize("how", HOWS)
def test_later_stages_take_it(tiny, tmp_path, how):
    small, _ = Depth(blocks=[1, 3], replace=how).apply(tiny(layers=5))
    pruned, _ = Width(2, 4).apply(small)
    rounded, _ = Gptq(group=16).apply(pruned)
    save_artifact(rounded, tmp_path / "small")
    assert torch.equal(logits(load_artifact(tmp_path / "small")), logits(rounded))


@pytest.mark.parametrize("how", HOWS)
def test_a_recipe_in_the_cache_and_its_forecast(own_cache, tiny, tiny_data, tmp_path, how):
    whole = tiny(layers=6)
    whole.model.model.embed_tokens.weight.data.clamp_(min=0.01)  # its padding token's row is zero
    save_artifact(whole, tmp_path / "whole")
    (tmp_path / "whole" / "artifact.json").unlink()
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"stages:\n- depth: {{blocks: [2, 4], replace: {how}}}\n- width: {{remove: 2, of: 4}}\n")
    assert read_recipe(recipe).label == f"D2{how[0].upper()}+W2:4"
    out = compress(tmp_path / "whole", recipe, tmp_path / "out", data=tiny_data)
    subject = load_artifact(out)
    rows = forecast(read_recipe(recipe), tiny(layers=6), lambda n: None)
    found = sizes(subject)
    assert rows[-1].parameters == found["parameters"]
    assert rows[-1].disk_bytes == sum(f.stat().st_size for f in out.glob("*.safetensors"))
    assert rows[-1].nonzero == (None if how == "bias" else found["nonzero_parameters"])


def test_a_bias_goes_beside_quantised_and_packed_weights_and_a_scale_keeps_zeros_and_corrections(tiny, tmp_path):
    rounded, _ = Rtn(group=16).apply(tiny(layers=5))
    biased, _ = Depth(blocks=[2], replace="bias").apply(rounded)
    save_artifact(biased, tmp_path / "small")
    assert torch.equal(logits(load_artifact(tmp_path / "small")), logits(biased))
    pruned = pack_all(Width(2, 4, metric="magnitude").apply(tiny(layers=5))[0])
    dense = pruned.copy()
    scaled, again = (Depth(blocks=[2], replace="scalar").apply(s)[0] for s in (pruned, dense))
    torch.testing.assert_close(logits(scaled), logits(again))
    assert sizes(scaled)["nonzero_parameters"] == sizes(remove(pruned, [2]))["nonzero_parameters"]


@pytest.mark.parametrize("how", HOWS)
def test_a_correction_beside_a_weight_is_mapped_with_it(tiny, how):
    subject, merged = exact(tiny(layers=5)), exact(tiny(layers=5))
    r = torch.Generator().manual_seed(3)
    for b in range(5):
        A, B = (torch.randn(*s, dtype=torch.float64, generator=r) / 8 for s in ((2, 64), (32, 2)))
        subject.blocks[b].mlp.down_proj = adapt(subject.blocks[b].mlp.down_proj, A, B)
        merged.blocks[b].mlp.down_proj.weight.data += B @ A
    one, two = (replaced(s, [2], how, IDS)[0] for s in (subject, merged))
    torch.testing.assert_close(logits(one), logits(two), rtol=1e-8, atol=1e-8)


def test_labels_tell_replacements_apart_from_the_thesiss_removal():
    for how in HOWS:
        label = Depth(4, replace=how).label
        assert Depth.from_label(label) == Depth(4, replace=how) and Label.parse(label).depth == 4 and label != "D4"
    assert Label.parse("D12+DA3").depth == 12 and Depth.from_label("DA2S") is None
    assert [Depth(2, replace=how).in_words for how in (None, *HOWS)] == [
        "2 blocks removed",
        "2 blocks removed, a scale in their place",
        "2 blocks removed, a bias in their place",
        "2 blocks removed, a linear map in their place",
    ]


def test_recorded_rows_keep_their_identity(pytestconfig):
    assert (
        "replace" not in as_entry(Depth(2))["depth"]
        and as_entry(Depth(2, replace="bias"))["depth"]["replace"] == "bias"
    )
    every = Store(pytestconfig.rootpath / "data" / "results" / "02_depth_pruning.jsonl").rows(items=False).values()
    rows = [m for m in every if any("depth" in stage for stage in m.stages)]
    assert len(rows) > 50
    for m in rows:
        stages = [Depth(**stage["depth"]) for stage in m.stages]
        assert json.loads(json.dumps([as_entry(stage) for stage in stages])) == m.stages
        assert recipe_hash(Recipe(tuple(stages), ("",) * len(stages))) == m.made["recipe"] and identity_of(m)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"remove": 2, "replace": "scaler"}, "unknown replacement 'scaler'.*scalar"),
        ({"remove": 2, "replace": "bias", "part": "mlp"}, "whole blocks: it does not go with part 'mlp'"),
        ({"blocks": [0], "replace": "linear"}, "block 0 has none, keep it or use scalar"),
        ({"remove": 1, "protect_first": 0, "replace": "bias"}, "block 0 has none"),
    ],
)
def test_bad_settings(settings, said):
    with pytest.raises(BadInput, match=said):
        Depth(**settings)
    assert Depth(1, protect_first=0, replace="scalar").label == "D1S"


def test_neighbours_that_cannot_take_it(tiny):
    subject = tiny(layers=5)
    rounded, _ = Rtn(group=16).apply(subject)
    pruned, _ = Width(2, 4, metric="magnitude").apply(subject)
    cut = without_parts(subject, {1: "mlp"})
    for model, how, said in [
        (rounded, "scalar", "weights after block 2, and they are quantised: quantise after the depth stage"),
        (rounded, "linear", "down_proj of block 1, which is quantised"),
        (pruned, "linear", "down_proj of block 1, which has zeros that it would fill"),
        (pack_all(pruned), "linear", "zeros that it would fill"),
        (cut, "linear", "down_proj of block 1, which was removed with its MLP: use scalar"),
        (cut, "bias", "removed with its MLP"),
        (tiny("mistral", layers=5), "bias", "may have biases .llama, smollm3., and this one is mistral"),
    ]:
        with pytest.raises(BadInput, match=said):
            Depth(blocks=[2], replace=how).apply(model)
    for how in ("scalar", "linear"):
        with pytest.raises(BadInput, match="after Q would change quantised weights: quantise after it, or use bias"):
            Depth(2, replace=how).after([Gptq()])
    with pytest.raises(BadInput, match="this one is mistral"):
        forecast(Recipe((Depth(blocks=[2], replace="bias"),), ("here",)), tiny("mistral", layers=5), lambda n: None)


def test_a_broken_residual_is_named(tiny):
    subject = tiny(layers=4)
    subject.blocks[1].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(BadInput, match="zero or not finite"):
        measure(subject, 2, IDS, False)
    silent_one = tiny(layers=4)
    silent_one.linears(1)["gate_proj"].weight.data.zero_()
    with pytest.raises(BadInput, match="the MLP before a removed block saw no tokens.*use scalar or bias"):
        replaced(silent_one, [2], "linear", IDS)
