"""Slicing: a rotation alone changes nothing, the directions are torch's, and a sliced model is an ordinary one."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from thesislib.compress.depth import Depth
from thesislib.compress.gptq import Rtn
from thesislib.compress.slicing import Slice, moment, principal, sliced
from thesislib.compress.width import Width
from thesislib.errors import BadInput
from thesislib.formats.artifact import load_artifact, save_artifact
from thesislib.formats.gguf import export_gguf
from thesislib.formats.load import load_subject
from thesislib.model.blocks import apply_plan
from thesislib.model.layers import adapt
from thesislib.pipeline.forecast import forecast
from thesislib.pipeline.recipe import parse_label

IDS = torch.randint(0, 250, (5, 20), generator=torch.Generator().manual_seed(2))
KINDS = ["llama", "mistral", "qwen2", "qwen3", "smollm3"]


@pytest.fixture(autouse=True)
def calibration(monkeypatch):
    monkeypatch.setattr("thesislib.compress.stage.calibration_windows", lambda *a: IDS)


def logits(subject):
    with torch.no_grad():
        return subject.model(IDS, use_cache=False).logits


def uneven(subject):
    """Gains and biases that are all different."""
    for i, (name, p) in enumerate(subject.model.named_parameters()):
        if "norm" in name:
            p.data.normal_(1, 0.3, generator=torch.Generator().manual_seed(i))
        elif name.endswith("bias"):
            p.data.normal_(generator=torch.Generator().manual_seed(i))
    return subject


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_keeping_all_is_the_dense_function(tiny, kind, tied):
    more = {"mlp_bias": True, "attention_bias": True} if kind == "llama" else {}
    subject = uneven(tiny(kind, layers=4, tie_word_embeddings=tied, rms_norm_eps=1e-3, **more))
    before = subject.fingerprint
    whole, report = Slice(keep=1).apply(subject)
    torch.testing.assert_close(logits(whole), logits(subject), rtol=1e-4, atol=1e-4)
    assert report == {"hidden_size": [32, 32], "kept_energy": pytest.approx(1.0), "untied": tied} and json.dumps(report)
    added = subject.model.lm_head.weight.numel() if tied else 0
    assert whole.parameters == subject.parameters + added
    assert type(subject)(subject.model, subject.tokenizer, "again").fingerprint == subject.fingerprint == before


@pytest.mark.parametrize("kind", KINDS)
def test_features_that_are_always_zero_are_sliced_away_without_loss(tiny, kind):
    """Their number counts in a root mean square and in epsilon alone."""
    subject = uneven(tiny(kind, layers=4, rms_norm_eps=1e-2))
    free = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    P = free[:, :24] @ free[:, :24].T  # nothing writes outside of 24 directions
    model = subject.model.double()
    for block in subject.blocks:
        for m in (block.self_attn.o_proj, block.mlp.down_proj):
            m.weight.data = P @ m.weight.data
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.data.clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data @ P
    small, report = Slice(keep=0.75).apply(subject)
    assert report["hidden_size"] == [32, 24] and report["kept_energy"] == pytest.approx(1.0, abs=1e-9)
    torch.testing.assert_close(logits(small), logits(subject), rtol=1e-4, atol=1e-5)


def test_the_moment_is_that_of_all_normalised_inputs_and_its_directions_are_eighs(tiny):
    subject = uneven(tiny(layers=3))
    inputs = []
    names = ("input_layernorm", "post_attention_layernorm")
    norms = [getattr(block, name) for block in subject.blocks for name in names] + [subject.model.model.norm]
    hooks = [norm.register_forward_hook(lambda n, args, out: inputs.append(out / n.weight)) for norm in norms]
    logits(subject)
    for hook in hooks:
        hook.remove()
    X = torch.stack(inputs).flatten(0, -2).double()
    assert len(X) == 7 * IDS.numel()
    found = moment(subject, IDS, batch=2)
    torch.testing.assert_close(found, X.T @ X, rtol=1e-5, atol=1e-3)
    values, Q = principal(found)
    left, by_hand = torch.linalg.eigh(found)
    torch.testing.assert_close(values, left.flip(0))
    torch.testing.assert_close((Q.T @ by_hand.flip(1)).abs(), torch.eye(32).double(), rtol=0, atol=1e-8)
    torch.testing.assert_close(Q.T @ Q, torch.eye(32).double(), rtol=0, atol=1e-10)
    assert (Q.gather(0, Q.abs().argmax(0)[None]) > 0).all()
    _, report = Slice(keep=0.5).apply(subject)
    assert report["kept_energy"] == pytest.approx(float(values[:16].sum() / X.square().sum()), abs=1e-6)


def test_no_other_directions_lose_less_of_the_moment(tiny):
    subject = tiny(layers=3)
    m = moment(subject, IDS)
    Q = principal(m)[1][:, :16]
    other = torch.linalg.qr(torch.randn(32, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]
    first = torch.eye(32, 16, dtype=torch.float64)
    kept = [float((q.T @ m @ q).trace()) for q in (Q, other, first)]
    assert kept[0] > max(kept[1:])
    apart = [(logits(sliced(subject, q)) - logits(subject)).square().mean() for q in (Q, other)]
    assert apart[0] < apart[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sliced_model_is_an_ordinary_one(tiny, tmp_path, kind):
    subject = uneven(tiny(kind, layers=3))
    subject.model.model.embed_tokens.weight.data.clamp_(min=0.01)  # its padding token's row is zero
    small, report = Slice(keep=0.5).apply(subject)
    config = small.model.config
    assert report["hidden_size"] == [32, 16] and (config.hidden_size, config.head_dim) == (16, 8)
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (4, 2, 64)
    assert small.linears(0)["k_proj"].weight.shape == (16, 16) and small.linears(0)["o_proj"].weight.shape == (16, 32)
    save_artifact(small, tmp_path / "small")
    assert load_artifact(tmp_path / "small").fingerprint == small.fingerprint
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        torch.testing.assert_close(read(IDS).logits, logits(small))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(read.generate(IDS, **options), small.model.generate(IDS, **options))
    (row,) = forecast(parse_label("N50%"), tiny(kind, layers=3), lambda n: None)
    on_disk = sum(f.stat().st_size for f in (tmp_path / "small").glob("*.safetensors"))
    assert (row.parameters, row.nonzero, row.disk_bytes) == (small.parameters, small.parameters, on_disk)


def test_it_is_computed_in_float64_and_rounded_once(tiny):
    subject = tiny(layers=3)
    half = subject.copy()
    half.model.to(torch.bfloat16)
    small, _ = Slice(keep=0.5).apply(half)
    Q = principal(moment(half, IDS))[1][:, :16]
    exact = sliced(type(half)(half.copy().model.double(), half.tokenizer, "exact"), Q)
    assert small.dtype == torch.bfloat16
    for name, tensor in exact.model.state_dict().items():
        assert torch.equal(tensor.to(torch.bfloat16), small.model.state_dict()[name])


def test_other_stages_before_and_after(tiny, tmp_path):
    subject = uneven(tiny(layers=5))
    small, _ = Slice(keep=0.5).apply(Depth(blocks=[1], part="mlp").apply(Depth(blocks=[2]).apply(subject)[0])[0])
    assert small.depth == 4 and small.plan == (0, 1, 3, 4)
    rounded, _ = Rtn(group=16).apply(Width(2, 4, metric="magnitude").apply(small)[0])
    save_artifact(rounded, tmp_path / "rounded")
    assert torch.equal(logits(load_artifact(tmp_path / "rounded")), logits(rounded))
    rows = forecast(parse_label("D1+N50%+W2:4"), tiny(layers=8), lambda n: None)
    expected = Width(2, 4, metric="magnitude").apply(
        Slice(keep=0.5).apply(Depth(blocks=[4]).apply(tiny(layers=8))[0])[0]
    )
    assert rows[-1].parameters == expected[0].parameters


def test_it_goes_to_gguf_and_back(tiny, tmp_path):
    small, _ = Slice(keep=0.5).apply(uneven(tiny(layers=2, hidden_size=64)))
    export_gguf(small, tmp_path / "small.gguf", "F16")
    again = load_subject(tmp_path / "small.gguf")
    torch.testing.assert_close(logits(again), logits(small), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("kind", "heads", "multiple", "keep", "width"),
    [
        ("llama", 4, 8, 0.8, 24), ("llama", 4, 1, 0.8, 24), ("mistral", 4, 1, 0.8, 25), ("llama", 4, 8, 1, 32),
        ("qwen3", 4, 8, 0.99, 24), ("llama", 4, 8, 0.25, 8),
    ],
)  # fmt: skip
def test_the_number_of_features_is_a_multiple(tiny, kind, heads, multiple, keep, width):
    subject = tiny(kind, layers=1, num_attention_heads=heads)
    assert Slice(keep=keep, multiple=multiple).apply(subject)[0].model.config.hidden_size == width


def test_the_books_model_has_nine_heads(tiny):
    """transformers' LlamaConfig refuses other widths than multiples of the heads."""
    subject = tiny(layers=1, hidden_size=72, num_attention_heads=9, num_key_value_heads=3)
    with pytest.raises(BadInput, match="leaves none: their number is a multiple of 72, expected at least 1"):
        Slice(keep=0.9).apply(subject)
    assert Slice(keep=0.9, multiple=1).apply(subject)[0].model.config.hidden_size == 63


def changed(tiny, how):
    subject = tiny(layers=3)
    if how == "quantised":
        return Rtn(group=16).apply(subject)[0]
    if how == "pruned":
        return Width(2, 4, metric="magnitude").apply(subject)[0]
    if how == "corrected":
        mlp = subject.blocks[2].mlp
        mlp.up_proj = adapt(mlp.up_proj, torch.ones(1, 32), torch.ones(64, 1))
        return subject
    return apply_plan(subject, [0, 1, 1])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("quantised", "q_proj of block 0 is quantised: slice before quantising"),
        ("pruned", "q_proj of block 0 has zeros that would be filled: slice before pruning weights"),
        ("corrected", "up_proj of block 2 has a low-rank correction: merge it into the weight, or slice before it"),
        ("repeated", "a plan that runs a block twice cannot be sliced"),
    ],
)
def test_weights_that_cannot_be_sliced_are_named(tiny, how, message):
    with pytest.raises(BadInput, match=message):
        Slice(keep=0.5).apply(changed(tiny, how))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.0}, r"keep is 0.0: expected a share of the hidden features in \(0, 1\]"),
        ({"keep": 1.5}, "keep is 1.5"),
        ({"multiple": 0}, "multiple is 0: expected at least 1"),
        ({"windows": 0}, "slice needs at least 1 calibration window"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(BadInput, match=message):
        Slice(**settings)


def test_a_share_that_leaves_nothing(tiny):
    with pytest.raises(BadInput, match="keep 0.2 of 32 hidden features leaves none: .* of 8, expected at least 0.25"):
        Slice(keep=0.2).apply(tiny())


def test_labels_and_order():
    assert Slice().label == "N75%" and Slice.from_label("N12.5%") == Slice(keep=0.125)
    with pytest.raises(BadInput, match="N75% after Q would rotate weights"):
        parse_label("Q+N75%").check()
    parse_label("D2+N75%+W2:4+Q").check()
