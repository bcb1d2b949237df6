"""What is exported as GGUF, evaluated by llama.cpp itself: every supported family, every type.

Runs where llama.cpp is installed.
"""

import dataclasses
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from test_gguf_reader import CASES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.llama_cpp import main, quantise, type_shares
from thesislib.chapters.ch05_runs import HELD_OUT, PPL
from thesislib.compress.gptq import Rtn
from thesislib.compress.width import Width
from thesislib.errors import BadInput
from thesislib.evaluate.perplexity import perplexity
from thesislib.experiment import again
from thesislib.files import sha256_of
from thesislib.formats.gguf import export_gguf
from thesislib.formats.gguf_reader import GgufModel
from thesislib.formats.load import load_subject, save_checkpoint
from thesislib.model.blocks import remove as without_blocks
from thesislib.records.store import Store
from thesislib.sources.corpus import evaluation_text

pytestmark = pytest.mark.skipif(
    find_spec("llama_cpp") is None, reason="llama.cpp is not installed: pip install -e '.[engine]'"
)
IDS = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
TYPES = ("F16", "Q8_0", "Q4_0", "Q4_1")


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes and one merge, cut as GPT-2's: llama.cpp loads no tokenizer that merges nothing."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet[:255], "ab"])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<pad>")


def llama_cpp_logits(file, ids):
    """llama.cpp's logits after each of `ids` (positions, vocabulary), keys and values in float32, on one thread."""
    import llama_cpp as ll

    model_options, options = ll.llama_model_default_params(), ll.llama_context_default_params()
    model_options.n_gpu_layers = 0
    options.n_ctx = options.n_batch = options.n_ubatch = len(ids)
    options.n_threads = options.n_threads_batch = 1
    options.type_k = options.type_v = ll.GGML_TYPE_F32
    options.flash_attn_type = ll.LLAMA_FLASH_ATTN_TYPE_DISABLED
    model = ll.llama_model_load_from_file(str(file).encode(), model_options)
    assert model, f"llama.cpp does not load {file}"
    context = ll.llama_init_from_model(model, options)
    batch = ll.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, True
    assert ll.llama_decode(context, batch) == 0
    rows = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
    logits = np.array([np.ctypeslib.as_array(ll.llama_get_logits_ith(context, i), (rows,)) for i in range(len(ids))])
    ll.llama_batch_free(batch)
    ll.llama_free(context)
    ll.llama_model_free(model)
    return torch.from_numpy(logits)


def loss(logits, ids):
    """Mean loss of the next token, in nats."""
    return torch.nn.functional.cross_entropy(logits[:-1].float(), torch.as_tensor(ids[1:])).item()


def check(file, ids, positions=None, exact=0.03, rounded=0.05):
    """llama.cpp's logits are ours. It multiplies in float16, with rounded weights by inputs rounded to 8 bits."""
    theirs = llama_cpp_logits(file, ids)
    with torch.no_grad():
        ours = load_subject(file).model(torch.tensor([ids]), use_cache=False).logits[0]
    apart = (theirs - ours)[:positions].abs()
    assert apart.max() < exact if file.stem == "F16" else apart.mean() < rounded, (apart.max(), apart.mean())
    # what another model's would be away
    assert (theirs - ours.roll(1, 0))[:positions].abs().mean() > 5 * rounded
    return loss(theirs, ids), loss(ours, ids)


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_we_read_back(tiny, tokenizer, tmp_path, case, type_):
    kind, settings = CASES[case]
    subject = dataclasses.replace(tiny(kind, layers=4, **settings), tokenizer=tokenizer)
    for name, p in subject.model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    # it does not cut attention to a window, as the export says: the same until the first window ends
    positions = settings.get("sliding_window")
    theirs, ours = check(export_gguf(subject, tmp_path / f"{type_}.gguf", type_), IDS[0].tolist(), positions)
    assert positions or theirs == pytest.approx(ours, abs=0.001 if type_ == "F16" else 0.03)


CHAINS = {
    "as it is": ("Q8_0", []),
    "depth": ("Q4_0", [lambda s: without_blocks(s, [20, 21])]),
    "depth, width": (
        "F16",
        [lambda s: without_blocks(s, [20, 21]), lambda s: Width(remove=2, of=4, metric="magnitude").apply(s)[0]],
    ),
    "rounded": ("Q4_1", [lambda s: Rtn(bits=4, group=32, grid="minimum").apply(s)[0]]),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_the_subject_compressed(embedded_subject, tmp_path, chain):
    type_, changes = CHAINS[chain]
    subject = embedded_subject.copy()
    for change in changes:
        subject = change(subject)
    ids = subject.tokenizer(evaluation_text().text[:2000])["input_ids"][:128]
    theirs, ours = check(export_gguf(subject, tmp_path / f"{type_}.gguf", type_), ids, exact=1.0, rounded=0.5)
    assert theirs == pytest.approx(ours, abs=0.005 if type_ == "F16" else 0.03)


# ---------------------------------------------------------------- llama.cpp's own quantiser


def quantised(subject, folder, kind):
    """The file that llama.cpp makes of a subject's F16 file."""
    f16, file = folder / "F16.gguf", folder / f"{kind}.gguf"
    quantise(f16 if f16.exists() else export_gguf(subject, f16, "F16"), file, kind)
    return file


@pytest.mark.parametrize(
    ("kind", "embedding"), [("Q4_0", "Q6_K"), ("Q5_0", "Q6_K"), ("Q8_0", "Q8_0"), ("Q4_K_M", "Q6_K")]
)
def test_what_llama_cpp_quantises_is_read(tiny, tokenizer, tmp_path, kind, embedding):
    """Rows of 256, which its K types divide."""
    subject = dataclasses.replace(
        tiny(layers=2, hidden_size=256, intermediate_size=256, head_dim=64, initializer_range=0.05), tokenizer=tokenizer
    )
    file = quantised(subject, tmp_path, kind)
    assert GgufModel(file).stored["token_embd.weight"].tensor_type.name == embedding
    theirs, ours = check(file, IDS[0].tolist(), rounded=0.02)
    assert theirs == pytest.approx(ours, abs=0.03)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_our_files_hold_the_same_bytes_as_llama_cpp_s(tiny, tokenizer, tmp_path, kind):
    """Of weights that the F16 file holds exactly."""
    subject = dataclasses.replace(tiny(), tokenizer=tokenizer)
    subject.model.load_state_dict({name: t.half().float() for name, t in subject.model.state_dict().items()})
    theirs, ours = (
        GgufModel(file).stored
        for file in (quantised(subject, tmp_path, kind), export_gguf(subject, tmp_path / "ours.gguf", kind))
    )
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tensor.tensor_type == ours[name].tensor_type and np.array_equal(tensor.data, ours[name].data), name


@pytest.mark.embedded
def test_the_subject_quantised_by_llama_cpp(embedded_subject, tmp_path):
    """576 is no multiple of 256: the embedding is Q8_0 instead of Q6_K."""
    file = quantised(embedded_subject, tmp_path, "Q5_0")
    shares = type_shares(file)
    assert list(shares) == ["Q5_0", "Q8_0", "F32"] and sum(shares.values()) == pytest.approx(1)
    assert shares["Q8_0"] == pytest.approx(49152 * 576 / 134515008)
    ids = embedded_subject.tokenizer(evaluation_text().text[:2000])["input_ids"][:128]
    theirs, ours = check(file, ids, rounded=0.5)
    assert theirs == pytest.approx(ours, abs=0.03)


@pytest.mark.embedded
def test_its_files_are_recorded(tiny, tokenizer, tiny_data, tmp_path):
    folder, out = tmp_path / "tiny", tmp_path / "rows.jsonl"
    save_checkpoint(dataclasses.replace(tiny(layers=2), tokenizer=tokenizer), folder)
    arguments = ["--out", str(out), "--subject", str(folder), "--data", tiny_data]
    main(arguments)
    rows, before = list(Store(out).rows().values()), out.read_bytes()
    labels = [f"llama.cpp {kind}" for kind in ("Q4_0", "Q5_0", "Q8_0")]
    assert [(m.label, m.chapter["what"]) for m in rows] == [(x, what) for x in labels for what in (PPL, HELD_OUT)]
    main(arguments)
    assert out.read_bytes() == before
    five, facts = rows[2], rows[2].provenance["file"]
    file = quantised(load_subject(folder), tmp_path, "Q5_0")
    assert facts["sha256"] == sha256_of(file) and five.disk_bytes == facts["bytes"] == file.stat().st_size
    assert facts["types"] == type_shares(file) and facts["made_by"].keys() == {"llama_cpp_python", "llama.cpp"}
    assert facts["of"] == load_subject(folder, "bfloat16").fingerprint
    decoded = load_subject(file, "bfloat16")
    assert five.provenance["fingerprint"] == five.made["base"]["fingerprint"] == decoded.fingerprint != facts["of"]
    assert five.value == perplexity(decoded, evaluation_text(tiny_data)).value
    assert (five.settings["length"], five.settings["limit"], five.provenance["dtype"]) == (512, None, "bfloat16")
    verdict = again(five, str(file), tiny_data)
    assert verdict.same_bits and verdict.same_subject
    with pytest.raises(BadInput, match="name the record's subject"):
        again(five, str(folder), tiny_data)
