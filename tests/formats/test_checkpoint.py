"""Every tensor and setting of a checkpoint is used, or refused by name; what a subject is, is asked of what was
loaded."""

import json
import math
import shutil
from functools import partial

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from thesislib.compress.depth import Depth, leave_one_out
from thesislib.compress.eora import Eora
from thesislib.compress.gptq import Gptq, Rtn
from thesislib.compress.lora.stage import Lora
from thesislib.compress.width import Width
from thesislib.errors import BadInput
from thesislib.evaluate.generate import continuations
from thesislib.formats.artifact import load_artifact, save_artifact
from thesislib.formats.checkpoint import SUPPORTED, read_config
from thesislib.formats.gguf import export_gguf
from thesislib.formats.gptq import export_gptq
from thesislib.formats.load import load_subject, save_checkpoint
from thesislib.model.blocks import remove, without_parts

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 12},
    "qwen2": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2, "head_dim": 16},
    "smollm3": {},
}
IDS = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(0))
IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention", "flash_attention_2")


def edit(folder, file="config.json", **changes):
    plain = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({k: v for k, v in plain.items() if v is not ...}))
    return folder


def tensors_of(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def plain_losses(folder, layers=None):
    """transformers' own model: mean next-token loss, in nats."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return losses(model)


def losses(model):
    with torch.no_grad():
        logits = model(IDS, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).item()


@pytest.fixture
def checkpoint(tiny, tmp_path):
    return save_checkpoint(tiny(layers=4), tmp_path / "model")


# ---------------------------------------------------------------- all of it is used


def test_a_plain_checkpoint_is_what_transformers_loads(tiny, tmp_path):
    for model_type in SUPPORTED:
        folder = save_checkpoint(tiny(model_type, layers=4, **FAMILIES[model_type]), tmp_path / model_type)
        assert losses(load_subject(folder).model) == pytest.approx(plain_losses(folder), rel=1e-5)


def drop(key):
    return lambda tensors: tensors.pop(key)


def add(key, tensor):
    return lambda tensors: tensors.update({key: tensor})


def cast(key, dtype):
    return lambda tensors: tensors.update({key: tensors[key].to(dtype)})


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(UP), f"lacks the weight '{UP}'"),
        (drop("model.embed_tokens.weight"), "lacks the weight 'model.embed_tokens.weight'"),
        (
            add("model.layers.4.mlp.up_proj.weight", torch.ones(64, 32)),
            "config.json describes 4 blocks; to leave blocks out, use --plan",
        ),
        (
            add("model.layers.1.self_attn.q_proj.bias", torch.ones(32)),
            "'model.layers.1.self_attn.q_proj.bias', which would not be used",
        ),
        (add("model.layers.1.self_attn.q_norm.weight", torch.ones(8)), "which would not be used"),
        (add("score.weight", torch.ones(2, 32)), "'score.weight', which would not be used"),
        (add(UP, torch.ones(64, 16)), r"has shape \(64, 16\), and config.json describes \(64, 32\)"),
        (cast(UP, torch.int8), "is stored as I8: codes of a quantised checkpoint are not weights"),
        (cast(UP, torch.float8_e4m3fn), "is stored as F8_E4M3"),
        (add("model.layers.1.mlp.up_proj.weight_scale", torch.ones(1)), "which would not be used"),
        (
            add("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)),
            "are other rotary frequencies than config.json's",
        ),
    ],
)
def test_tensors_are_accounted_for(checkpoint, change, message):
    tensors_of(checkpoint, change)
    with pytest.raises(BadInput, match=message) as raised:
        load_subject(checkpoint)
    assert "\n" not in str(raised.value)


def test_rotary_frequencies_that_old_checkpoints_hold_are_harmless(tiny, tmp_path):
    subject = tiny(layers=2)
    folder = save_checkpoint(subject, tmp_path / "old")
    tensors_of(
        folder, add("model.layers.0.self_attn.rotary_emb.inv_freq", subject.model.model.rotary_emb.inv_freq.clone())
    )
    assert load_subject(folder).fingerprint == subject.fingerprint


def test_a_checkpoint_of_the_decoder_alone(tiny, tmp_path):
    subject = tiny(layers=2)
    folder = save_checkpoint(subject, tmp_path / "decoder")
    subject.model.model.save_pretrained(folder)
    assert not any(key.startswith("model.") for key in load_file(folder / "model.safetensors"))
    assert load_subject(folder).fingerprint == subject.fingerprint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hidden_layers": 3}, "describes 3 blocks"),
        ({"num_hidden_layers": 5}, "lacks the weight 'model.layers.4"),
        ({"attention_bias": True}, "lacks the weight 'model.layers.0.self_attn"),
        ({"sliding_window": 16}, "sliding_window = 16, which llama models ignore"),
        ({"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "layer_types"),
        ({"no_rope_layers": [1, 1, 1, 0]}, "no_rope_layers"),
        ({"logit_scale": 0.5}, "logit_scale = 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"transformers_weights": "../other.safetensors"}, "names another file of weights"),
        ({"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}, "quantised by 'fp8'"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "quantised by 'bitsandbytes'",
        ),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quantised by 'compressed-tensors'"),
        ({"model_type": "gpt2"}, "unsupported architecture 'gpt2'"),
        ({"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1.0}}, "config.json|configuration|cannot read"),
    ],
)
def test_settings_are_accounted_for(checkpoint, settings, message):
    edit(checkpoint, **settings)
    with pytest.raises(BadInput, match=message) as raised:
        load_subject(checkpoint)
    assert "\n" not in str(raised.value)


def test_settings_that_change_nothing_are_taken(checkpoint):
    before = load_subject(checkpoint).fingerprint
    edit(
        checkpoint,
        sliding_window=None,
        logit_scale=1.0,
        rope_interleaved=False,
        layer_types=["full_attention"] * 4,
        unsloth_version="2024.9",
    )
    assert load_subject(checkpoint).fingerprint == before


@pytest.mark.parametrize("types", [["sliding_attention"] * 3, ["sliding_attention"] * 3 + ["chunked_attention"]])
def test_layer_types_that_no_block_has(tiny, tmp_path, types):
    folder = edit(save_checkpoint(tiny("qwen2", layers=4, **FAMILIES["qwen2"]), tmp_path / "q"), layer_types=types)
    with pytest.raises(BadInput, match="layer_types|layer type|chunked"):
        read_config(folder)


def test_generation_settings_that_cannot_be_read(checkpoint):
    (checkpoint / "generation_config.json").write_text("{")
    with pytest.raises(BadInput, match="generation_config.json cannot be read"):
        load_subject(checkpoint)


# ---------------------------------------------------------------- shards and indices


def test_one_file_is_preferred_to_an_index_as_transformers_does(tiny, tmp_path):
    one, other = tiny(layers=3), tiny(layers=3, seed=5)
    folder = save_checkpoint(one, tmp_path / "both")
    (folder / "model.safetensors").unlink()
    other.model.save_pretrained(folder, max_shard_size="30KB")
    assert load_subject(folder).fingerprint == other.fingerprint
    one.model.save_pretrained(tmp_path / "single")
    shutil.copy(tmp_path / "single" / "model.safetensors", folder)
    assert load_subject(folder).fingerprint == one.fingerprint
    assert losses(load_subject(folder).model) == pytest.approx(plain_losses(folder), rel=1e-5)


def test_shards_that_are_missing_swapped_or_elsewhere(tiny, tmp_path):
    folder = save_checkpoint(tiny(layers=3), tmp_path / "shards")
    (folder / "model.safetensors").unlink()
    tiny(layers=3).model.save_pretrained(folder, max_shard_size="30KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    index = folder / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    whole = {shard: shard.read_bytes() for shard in shards}
    for ruin, message in (
        (lambda: shards[1].unlink(), f"lacks the file '{shards[1].name}'"),
        (lambda: shards[1].write_bytes(whole[shards[1]][:50]), "cannot be read"),
        (
            lambda: shards[1].write_bytes(whole[shards[0]]),
            "lacks the weight|other tensors|does not name|another checkpoint",
        ),
        (
            lambda: index.write_text(json.dumps({"weight_map": {k: "../" + v for k, v in said["weight_map"].items()}})),
            "not in its folder",
        ),
        (lambda: index.write_text(json.dumps({"weight_map": {}})), "is not an index"),
        (lambda: index.write_text("[]"), "is not an index"),
    ):
        ruin()
        with pytest.raises(BadInput, match=message):
            load_subject(folder)
        index.write_text(json.dumps(said))
        for shard, content in whole.items():
            shard.write_bytes(content)
    assert load_subject(folder).fingerprint == tiny(layers=3).fingerprint


# ---------------------------------------------------------------- an adapter beside the weights


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 7}}, {"lora_alpha": 1}],
)
def test_an_adapter_beside_the_weights_is_kept(tiny, tmp_path, settings):
    base = save_checkpoint(tiny(layers=3), tmp_path / "base")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], base_model_name_or_path="nowhere", **settings
    )
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.3)
    folder = shutil.copytree(base, tmp_path / "with")
    adapted.save_pretrained(folder)
    wanted = losses(adapted)
    subject = load_subject(folder)
    assert (
        losses(subject.model) == pytest.approx(wanted, rel=1e-5)
        and abs(losses(load_subject(base).model) - wanted) > 0.01
    )
    pruned = remove(subject, [1])
    back = load_artifact(save_artifact(pruned, tmp_path / "artifact"))
    assert losses(back.model) == pytest.approx(losses(pruned.model), rel=1e-6)
    with pytest.raises(BadInput, match="low-rank correction"):
        export_gguf(subject, tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_adapters_of_other_kinds_are_refused(tiny, tmp_path, settings, message):
    folder = save_checkpoint(tiny(layers=2), tmp_path / "m")
    peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), peft.LoraConfig(r=2, target_modules=["q_proj"])
    ).save_pretrained(folder)
    edit(folder, "adapter_config.json", **settings)
    with pytest.raises(BadInput, match=message):
        load_subject(folder)


def test_adapters_that_do_not_fit_are_refused(tiny, tmp_path):
    folder = save_checkpoint(tiny(layers=2), tmp_path / "m")
    other = save_checkpoint(tiny(layers=3), tmp_path / "deeper")
    peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(other), peft.LoraConfig(r=2, target_modules=["q_proj"])
    ).save_pretrained(folder)
    with pytest.raises(BadInput, match="layers.2.self_attn.q_proj.lora"):
        load_subject(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"no adapter_model\.safetensors"):
        load_subject(folder)


# ---------------------------------------------------------------- what was loaded is believed, not the configuration


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_of_its_own_survives(tiny, tmp_path, dtype):
    folder = save_checkpoint(tiny(layers=3), tmp_path / "m")
    head = (
        torch.randn(
            load_file(folder / "model.safetensors")["model.embed_tokens.weight"].shape,
            generator=torch.Generator().manual_seed(1),
        )
        * 0.2
    )
    tensors_of(folder, add("lm_head.weight", head))
    subject = load_subject(folder, dtype)
    assert (
        torch.equal(subject.model.lm_head.weight, head.to(getattr(torch, dtype)))
        and not subject.model.config.tie_word_embeddings
    )
    if dtype == "float32":
        assert losses(subject.model) == pytest.approx(plain_losses(folder), rel=1e-5)
    for packed in (True, False):
        back = load_artifact(save_artifact(subject, tmp_path / f"a{packed}", packed=packed))
        assert back.fingerprint == subject.fingerprint
    assert load_subject(save_checkpoint(subject, tmp_path / "plain"), dtype).fingerprint == subject.fingerprint
    assert torch.equal(
        load_subject(export_gguf(subject, tmp_path / "m.gguf")).model.lm_head.weight,
        head.to(getattr(torch, dtype)).half().float(),
    )


def test_a_head_that_is_the_embedding_once_more_stays_tied(tiny, tmp_path):
    subject = tiny(layers=2)
    folder = save_checkpoint(subject, tmp_path / "m")
    tensors_of(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    again = load_subject(folder)
    assert again.fingerprint == subject.fingerprint and again.parameters == subject.parameters


def test_an_untied_head_that_is_missing_is_not_made_up(tiny, tmp_path):
    folder = save_checkpoint(tiny(layers=2, tie_word_embeddings=False), tmp_path / "m")
    tensors_of(folder, drop("lm_head.weight"))
    with pytest.raises(BadInput, match="lacks the weight 'lm_head.weight'"):
        load_subject(folder)


def by_hand(model, gone):
    """transformers' own model without some blocks, every setting by block cut with them."""
    kept = [i for i in range(len(model.model.layers)) if i not in gone]
    model.model.layers = torch.nn.ModuleList([model.model.layers[i] for i in kept])
    config = model.config
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    return losses(model)


@pytest.mark.parametrize(
    ("model_type", "implementation"),
    [*((name, "flash_attention_2") for name in SUPPORTED), *(("mistral", name) for name in IMPLEMENTATIONS[:3])],
)
def test_stages_do_not_depend_on_the_attention_of_a_configuration(
    tiny, tiny_data, tmp_path, model_type, implementation, monkeypatch
):
    """Scores, masks, grids, corrections and training losses are those of a causal model, whatever config.json asks
    for."""
    monkeypatch.setattr("thesislib.compress.stage.calibration_windows", lambda *_: IDS)
    plain = save_checkpoint(tiny(model_type, layers=4, **FAMILIES[model_type]), tmp_path / "plain")
    asks = edit(
        shutil.copytree(plain, tmp_path / "asks"),
        attn_implementation=implementation,
        _attn_implementation=implementation,
    )
    one, two = load_subject(plain), load_subject(asks)
    scores = leave_one_out(two, IDS, range(4))
    reference = {
        b: math.exp(by_hand(AutoModelForCausalLM.from_pretrained(plain, attn_implementation="eager").eval(), {b}))
        for b in range(4)
    }
    assert scores == pytest.approx(reference, rel=1e-4)
    lora = Lora(
        text="trivia", steps=1, batch=2, accumulate=1, length=128, validation=0, every=1, dropout=0.0, autocast=False
    )
    for stage in (
        Width(remove=2, of=4),
        Gptq(bits=4, group=16),
        Depth(remove=1, metric="influence", protect_first=0, protect_last=0),
        lora,
    ):
        a, b = (stage.apply(s, data=tiny_data)[0] for s in (one, two))
        assert a.fingerprint == b.fingerprint, stage
    rounded, _ = Rtn(bits=2, group=16).apply(two)
    mended, _ = Eora(rank=2).apply(rounded, data=tiny_data, original=two)
    assert losses(mended.model) != losses(rounded.model)


@pytest.mark.parametrize("model_type", SUPPORTED)
@pytest.mark.parametrize("parts", [{0: "attention"}, {1: "attention", 3: "attention"}, {2: "mlp", 0: "attention"}])
def test_what_lost_attentions_generates_with_a_cache_what_it_does_without(tiny, model_type, parts):
    """Also beyond the windows of the blocks that have one, and where the first of a kind lost its attention."""
    pruned = without_parts(tiny(model_type, layers=4, **FAMILIES[model_type]), parts)
    ids = IDS[:2, :10]
    found = continuations(pruned, ids, torch.ones_like(ids), 12)
    for row, said in enumerate(found):
        sofar = ids[row : row + 1]
        for n, token in enumerate(said):
            with torch.no_grad():
                scores = pruned.model(sofar, use_cache=False).logits[0, -1]
            if n == 0 and pruned.model.generation_config.eos_token_id is not None:
                scores[pruned.model.generation_config.eos_token_id] = -torch.inf
            assert int(scores.argmax()) == token
            sofar = torch.cat([sofar, torch.tensor([[token]])], 1)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_settings_by_block_follow_the_blocks(tiny, tmp_path, model_type):
    subject = tiny(model_type, layers=6, **FAMILIES[model_type])
    pruned = remove(subject, [1, 4])
    back = load_artifact(save_artifact(pruned, tmp_path / "a"))
    folder = save_checkpoint(pruned, tmp_path / "plain")
    wanted = by_hand(
        AutoModelForCausalLM.from_pretrained(
            save_checkpoint(subject, tmp_path / "whole"), attn_implementation="eager"
        ).eval(),
        {1, 4},
    )
    for model in (
        pruned.model,
        back.model,
        load_subject(folder).model,
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval(),
    ):
        assert losses(model) == pytest.approx(wanted, rel=1e-5)


# ---------------------------------------------------------------- what is written is read back


@pytest.mark.parametrize("model_type", SUPPORTED)
@pytest.mark.parametrize("bits", [3, 4])
def test_a_gptq_export_comes_back(tiny, tmp_path, model_type, bits):
    more = {"head_dim": 16} if model_type == "qwen3" else {}
    subject = tiny(
        model_type, layers=2, hidden_size=64, intermediate_size=96, num_key_value_heads=4, **{"head_dim": 16, **more}
    )
    for p in (p for name, p in subject.model.named_parameters() if name.endswith("bias")):
        p.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    for grid in ("symmetric", "asymmetric"):
        quantised, _ = Rtn(bits=bits, group=32, grid=grid).apply(subject)
        folder = export_gptq(quantised, tmp_path / f"{grid}")
        back = load_subject(folder)
        assert losses(back.model) == pytest.approx(losses(quantised.model), rel=1e-6)
        assert all(
            torch.equal(a.weight, b.weight)
            for i in range(2)
            for a, b in zip(quantised.linears(i).values(), back.linears(i).values(), strict=True)
        )
        assert (folder / "model.safetensors").stat().st_size < save_checkpoint(subject, tmp_path / "dense").joinpath(
            "model.safetensors"
        ).stat().st_size


def test_a_gptq_checkpoint_that_is_damaged_or_of_another_kind(tiny, tmp_path):
    subject = tiny(layers=1, hidden_size=64, intermediate_size=96, num_key_value_heads=4, head_dim=16)
    folder = export_gptq(Rtn(bits=4, group=32).apply(subject)[0], tmp_path / "q")
    path = "model.layers.0.mlp.up_proj"
    for number, (change, message) in enumerate(
        [
            (drop(f"{path}.qweight"), f"lacks the weight '{path}.qweight'"),
            (add(f"{path}.scales", torch.ones(3, 96, dtype=torch.float16)), "scales' has shape"),
            (add(f"{path}.qzeros", torch.zeros(2, 12, dtype=torch.int32)), "qzeros' are not those of a symmetric grid"),
            (add(f"{path}.g_idx", torch.full((64,), 9, dtype=torch.int32)), "names groups that it does not have"),
            (add("model.layers.0.mlp.extra", torch.ones(2)), "which has no place"),
        ]
    ):
        other = tensors_of(shutil.copytree(folder, tmp_path / str(number)), change)
        with pytest.raises(BadInput, match=message):
            load_subject(other)
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    for change, message in (
        ({"checkpoint_format": "marlin"}, "format 'marlin'"),
        ({"bits": 5}, "5 bits"),
        ({"dynamic": {"x": {}}}, "not read here"),
    ):
        other = edit(shutil.copytree(folder, tmp_path / message), quantization_config=said | change)
        with pytest.raises(BadInput, match=message):
            load_subject(other)


def test_an_artifact_with_a_tensor_of_no_use_is_refused(tiny, tmp_path, monkeypatch):
    folder = save_artifact(Width(remove=2, of=4, metric="magnitude").apply(tiny(layers=2))[0], tmp_path / "a")
    record = json.loads((folder / "artifact.json").read_text())
    tensors = load_file(folder / "packed.safetensors")
    save_file(
        {**tensors, "model.layers.0.mlp.up_proj.extra": torch.ones(2)}, folder / "packed.safetensors", {"format": "pt"}
    )
    monkeypatch.setattr("thesislib.formats.artifact.read_artifact", lambda _: record)
    with pytest.raises(BadInput, match="'model.layers.0.mlp.up_proj.extra', which has no place in it"):
        load_artifact(folder)


@pytest.mark.parametrize("way", ["plain", "packed", "checkpoint", "gguf", "gptq"])
def test_what_reads_back_otherwise_is_not_written(tiny, tmp_path, monkeypatch, way):
    """A writer that loses something leaves nothing under the final name."""
    from gguf import GGUFWriter

    from thesislib.formats import artifact, gptq, load

    subject = tiny(layers=2, hidden_size=64, intermediate_size=96, num_key_value_heads=4, head_dim=16)
    spoil = lambda tensors: {key: (t + 1 if key.endswith("norm.weight") else t) for key, t in tensors.items()}  # noqa: E731
    if way == "gguf":
        monkeypatch.setattr(
            GGUFWriter,
            "add_tensor",
            lambda self, name, tensor, *more, add=GGUFWriter.add_tensor: add(
                self, name, tensor + 1 if name == "output_norm.weight" else tensor, *more
            ),
        )
        write = partial(export_gguf, subject, tmp_path / "out.gguf")
    elif way == "gptq":
        monkeypatch.setattr(gptq, "plain_tensors", lambda s, real=artifact.plain_tensors: spoil(real(s)))
        write = partial(export_gptq, Rtn(bits=4, group=32).apply(subject)[0], tmp_path / "out")
    else:
        for module in (artifact, load):
            monkeypatch.setattr(module, "plain_tensors", lambda s, real=artifact.plain_tensors: spoil(real(s)))
        monkeypatch.setattr(
            artifact, "packed_tensors", lambda s, real=artifact.packed_tensors: (spoil(real(s)[0]), real(s)[1])
        )
        if way == "packed":
            subject = Width(remove=2, of=4, metric="magnitude").apply(subject)[0]
        if way == "checkpoint":
            write = partial(save_checkpoint, subject, tmp_path / "out")
        else:
            write = partial(save_artifact, subject, tmp_path / "out", packed=way == "packed")
    with pytest.raises(BadInput, match="reads back"):
        write()
    assert not list(tmp_path.iterdir())
