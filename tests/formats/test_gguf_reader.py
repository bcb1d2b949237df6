"""A GGUF file is read as the model that it is: every setting and tensor used or refused by name, exports among them."""

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from tokenizers import Tokenizer, models, pre_tokenizers

from thesislib.errors import BadInput
from thesislib.formats.gguf import export_gguf
from thesislib.formats.gguf_reader import GgufModel, byte_level, halves
from thesislib.formats.load import load_subject, save_checkpoint

IDS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
WINDOWS = {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2}
CASES = {
    "llama": ("llama", {}),
    "llama, rotary factors": ("llama", {"rope_parameters": LLAMA3}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}),
    "llama, all heads": ("llama", {"num_key_value_heads": 4}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window": ("mistral", {"sliding_window": 12}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows": ("qwen2", WINDOWS),
    "qwen3, wide heads": ("qwen3", {"head_dim": 32}),
    "qwen3, yarn and windows": ("qwen3", {"rope_parameters": YARN, **WINDOWS}),
    "smollm3": ("smollm3", {}),
}


def logits(subject):
    with torch.no_grad():
        return subject.model(IDS, use_cache=False).logits


def rewritten(source, target, fields=lambda name, value: (name, value), tensors=lambda name, data: data, more=()):
    """A copy of a GGUF file with other settings and tensors; None leaves one out."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for f in reader.fields.values():
        if (
            f.name.startswith("GGUF.")
            or f.name == "general.architecture"
            or (kept := fields(f.name, f.contents())) is None
        ):
            continue
        writer.add_key_value(*kept, f.types[0], f.types[-1] if f.types[0] == GGUFValueType.ARRAY else None)
    for name, value, kind in more:
        writer.add_key_value(name, value, kind)
    for t in reader.tensors:
        if (data := tensors(t.name, t.data)) is not None:
            writer.add_tensor(t.name, data, raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize("case", CASES)
def test_an_export_comes_back(tiny, tmp_path, case):
    kind, settings = CASES[case]
    subject = tiny(kind, layers=4, **settings)
    for name, p in subject.model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    exact = load_subject(save_checkpoint(subject, tmp_path / "folder"))
    exact.model.load_state_dict(
        {key: t.half().float() if t.ndim > 1 else t for key, t in exact.model.state_dict().items()}
    )
    back = load_subject(export_gguf(subject, tmp_path / "m.gguf", "F16"))
    assert torch.allclose(logits(back), logits(exact), atol=1e-4)
    assert not torch.allclose(logits(back), logits(tiny(kind, layers=4, seed=1, **settings)), atol=0.01)
    text = "Of 1984 the   12 words,\n\n and <|im_end|> a\ttab."
    assert (
        back.tokenizer(text)["input_ids"] == subject.tokenizer(text)["input_ids"]
        and back.tokenizer.chat_template == subject.tokenizer.chat_template
    )
    assert back.model.generation_config.eos_token_id == subject.model.generation_config.eos_token_id
    for rounded, apart in (("Q8_0", 0.05), ("Q4_0", 1.0)):
        assert (
            logits(load_subject(export_gguf(subject, tmp_path / f"{rounded}.gguf", rounded))) - logits(exact)
        ).abs().mean() < apart


def test_tokens_that_end_an_answer_come_back(tiny, tmp_path):
    subject = tiny(layers=1)
    subject.model.generation_config.eos_token_id = [subject.tokenizer.eos_token_id, 65, 66]
    back = load_subject(export_gguf(subject, tmp_path / "m.gguf"))
    assert sorted(back.model.generation_config.eos_token_id) == sorted(subject.model.generation_config.eos_token_id)
    subject.model.generation_config.eos_token_id = [65, 66, 67, 68]
    with pytest.raises(BadInput, match="ends its answers at 4 tokens: GGUF has a place for 3"):
        export_gguf(subject, tmp_path / "n.gguf")


def test_a_split_file_is_read_with_all_its_parts(tiny, tmp_path):
    subject = tiny(layers=4)
    whole = export_gguf(subject, tmp_path / "whole.gguf")
    split = [("split.no", 0, GGUFValueType.UINT16), ("split.count", 2, GGUFValueType.UINT16)]
    first, second = (tmp_path / f"m-0000{n}-of-00002.gguf" for n in (1, 2))
    late = ("blk.2.", "blk.3.")
    rewritten(whole, first, tensors=lambda name, data: None if name.startswith(late) else data, more=split)
    with pytest.raises(BadInput, match=r"m-00002-of-00002\.gguf is not beside it"):
        load_subject(first)
    rewritten(whole, second, tensors=lambda name, data: data if name.startswith(late) else None, more=split)
    for part in (first, second):
        assert load_subject(part).fingerprint == load_subject(whole).fingerprint
    alone = first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(BadInput, match="is one of 2 parts of a model: expected the name"):
        load_subject(alone)


def unsigned(name, value):
    return [(name, value, GGUFValueType.UINT32)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tensors": lambda name, data: None if name == "blk.1.ffn_up.weight" else data},
            r"lacks the weight 'blk\.1\.ffn_up\.weight'",
        ),
        (
            {"tensors": lambda name, data: None if name == "token_embd.weight" else data},
            "lacks the weight 'token_embd.weight'",
        ),
        (
            {"fields": lambda name, value: (name, 1) if name == "llama.block_count" else (name, value)},
            r"holds 'blk\.1\..*no place",
        ),
        (
            {"fields": lambda name, value: (name, 3) if name == "llama.block_count" else (name, value)},
            r"lacks the weight 'blk\.2",
        ),
        (
            {"fields": lambda name, value: None if name == "llama.embedding_length" else (name, value)},
            "embedding_length is None",
        ),
        (
            {"fields": lambda name, value: None if name == "tokenizer.ggml.tokens" else (name, value)},
            "holds no tokenizer",
        ),
        (
            {"fields": lambda name, value: (name, "tekken") if name == "tokenizer.ggml.pre" else (name, value)},
            "cuts text by 'tekken'",
        ),
        (
            {"fields": lambda name, value: (name, "rwkv") if name == "tokenizer.ggml.model" else (name, value)},
            "tokenizer 'rwkv'",
        ),
        ({"more": unsigned("llama.expert_count", 8)}, "says llama.expert_count = 8"),
        ({"more": [("llama.logit_scale", 0.5, GGUFValueType.FLOAT32)]}, "says llama.logit_scale"),
        ({"more": [("llama.attention.causal", False, GGUFValueType.BOOL)]}, "says llama.attention.causal"),
        ({"more": [("llama.rope.scaling.type", "longrope", GGUFValueType.STRING)]}, "rotary scaling 'longrope'"),
        (
            {"fields": lambda name, value: (name, 4) if name == "llama.rope.dimension_count" else (name, value)},
            "rope.dimension_count is 4",
        ),
        (
            {"fields": lambda name, value: (name, "adapter") if name == "general.type" else (name, value)},
            "says general.type = 'adapter'",
        ),
        ({"more": [("somebodys.setting", 1, GGUFValueType.UINT32)]}, "says somebodys.setting"),
        ({"more": [("general.note", "harmless", GGUFValueType.STRING), *unsigned("llama.expert_count", 0)]}, None),
        ({"fields": lambda name, value: (name, "mistral") if name == "general.name" else (name, value)}, None),
    ],
)
def test_everything_in_a_file_is_accounted_for(tiny, tmp_path, change, message):
    whole = export_gguf(tiny(layers=2), tmp_path / "whole.gguf")
    other = rewritten(whole, tmp_path / "other.gguf", **change)
    if message is None:
        assert load_subject(other).fingerprint == load_subject(whole).fingerprint
        return
    with pytest.raises(BadInput, match=message) as raised:
        load_subject(other)
    assert "\n" not in str(raised.value)


def test_a_window_that_another_program_wrote(tiny, tmp_path):
    """LLaMA's layout with a window is Mistral."""
    whole = export_gguf(tiny(layers=2), tmp_path / "whole.gguf")
    other = load_subject(rewritten(whole, tmp_path / "other.gguf", more=unsigned("llama.attention.sliding_window", 9)))
    wanted = tiny("mistral", layers=2, sliding_window=9)
    wanted.model.load_state_dict(load_subject(whole).model.state_dict())
    assert torch.allclose(logits(other), logits(wanted), atol=1e-5)


def test_how_text_is_cut_follows_the_file():
    """Against tokenizers made by hand: SmolLM cuts digits apart first, which matters after a run of spaces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "ĠĠ", "12"]
    types, merges = [1] * len(tokens), ["Ġ Ġ", "1 2"]
    by_hand = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [("Ġ", "Ġ"), ("1", "2")]))
    by_hand.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    text = "a  12"
    assert (
        byte_level(tokens, types, merges, "smollm").encode(text).tokens
        == by_hand.encode(text).tokens
        == ["a", "ĠĠ", "1", "2"]
    )
    assert byte_level(tokens, types, merges, "gpt-2").encode(text).tokens == ["a", "Ġ", "Ġ", "12"]
    with pytest.raises(BadInput, match="has the token 'a' twice"):
        byte_level([*tokens, "a"], [*types, 1], merges, "gpt-2")


def test_rows_return_to_their_order():
    rows = torch.arange(8)[:, None]
    assert halves(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_counts_that_no_file_has_take_no_memory(tmp_path):
    """A header that promises 2^60 tensors, settings or letters is refused at once."""
    for counts in ((2**60, 0), (0, 2**60)):
        path = tmp_path / "x.gguf"
        path.write_bytes(b"GGUF" + np.uint32(3).tobytes() + np.array(counts, dtype=np.uint64).tobytes() + bytes(64))
        with pytest.raises(BadInput, match="cannot be read as GGUF"):
            GgufModel(path)
