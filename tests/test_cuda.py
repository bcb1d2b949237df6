"""What a card computes is what the CPU does: tiny random models, made here; nothing but the card is needed."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from thesislib.compress.depth import Depth
from thesislib.compress.gptq import Rtn
from thesislib.compress.width import Width
from thesislib.evaluate.choice import multiple_choice
from thesislib.evaluate.generate import continuations
from thesislib.evaluate.perplexity import perplexity
from thesislib.formats.artifact import load_artifact, save_artifact
from thesislib.formats.checkpoint import SUPPORTED
from thesislib.formats.load import load_subject, save_checkpoint
from thesislib.model import forward
from thesislib.model.layers import Adapted, adapt
from thesislib.model.layers import replace as put
from thesislib.model.sparse import pack_all, semi_structured
from thesislib.sources.corpus import Choice, Text

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available() or bool(torch.version.hip), reason="needs an NVIDIA card"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor"),
]

TEXT = Text(
    "a text",
    "".join(f"Sentence {i} of a text that says {i * i} things, and no more than that. " for i in range(60)),
    (0,),
)
TOLERANCE = 1e-4  # relative, of float32 sums in another order


@pytest.fixture(autouse=True)
def full_float32():
    """No tf32: its products have 10 bits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def there(subject, dtype=None):
    """A copy of a subject on the card."""
    return replace(subject, model=subject.copy().model.to("cuda", dtype))


def nats(subject, **options):
    return perplexity(subject, TEXT, length=64, **options).extra["nats_per_token"]


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_a_model_is_the_same_there(tiny, model_type):
    subject = tiny(model_type, layers=4)
    card = there(subject)
    assert card.fingerprint == subject.fingerprint
    assert nats(card) == pytest.approx(nats(subject), rel=TOLERANCE)
    assert nats(card, batch=1) == pytest.approx(nats(card), rel=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_a_real_vocabulary(tiny, dtype):
    """More states than a tile holds, against float64."""
    subject = there(tiny(vocab_size=50000), dtype)
    rows = forward.tile("cuda", 50000)[0] + 7
    states, targets = torch.randn(rows, 32, device="cuda").to(dtype), torch.randint(50000, (rows,), device="cuda")
    logits = states.double() @ subject.model.get_output_embeddings().weight.double().T
    right = torch.cat(
        [
            -part.double().log_softmax(1).gather(1, t[:, None])[:, 0]
            for part, t in zip(logits.split(256), targets.split(256), strict=True)
        ]
    )
    torch.testing.assert_close(
        forward.token_losses(subject.model, states, targets).double(),
        right,
        rtol=0,
        atol=1e-4 if dtype == torch.float32 else 0.01,
    )


def test_no_wait_within_a_batch(tiny):
    """The card is asked nothing while losses are computed: torch raises where it would be."""
    subject = there(tiny())
    states, targets = torch.randn(100, 32, device="cuda"), torch.randint(100, (100,), device="cuda")
    first = forward.token_losses(subject.model, states, targets)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = forward.token_losses(subject.model, states, targets)
        with pytest.raises(RuntimeError, match="synchronizing"):
            again.cpu()  # so that the mode is known to see a wait
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, first)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_answers_are_those_of_the_cpu(tiny, model_type, recwarn):
    """float32, left-padded, rows that end at different steps; recorded steps and, for windows that slide, the other
    way."""
    subject = tiny(model_type, layers=4, **({"sliding_window": 6} if model_type == "mistral" else {}))
    batch = subject.tokenizer(
        ["a", "What is the longest of these, by far?", "née", "x" * 40],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = continuations(subject, ids, mask, 24)
    card = there(subject)
    assert continuations(card, ids, mask, 24) == expected
    assert continuations(card, ids, mask, 24, ahead=0) == expected
    assert not [w for w in recwarn if "recorded" in str(w.message)]


def test_scores_of_choices(tiny):
    items = [
        Choice(str(i), f"Question {i}: which of the", (f"first {i}", "second, and longer", "third"), i % 3)
        for i in range(30)
    ]
    subject = tiny()
    here, card = (multiple_choice(s, items, task="none").column("logprobs") for s in (subject, there(subject)))
    for a, b in zip(here, card, strict=True):
        assert a == pytest.approx(b, rel=1e-3)


@pytest.mark.parametrize(
    "stage",
    [
        Width(2, 4, metric="magnitude"),
        Width(1, 8, metric="magnitude"),
        Depth(remove=2, metric="magnitude", protect_first=1, protect_last=1),
    ],
    ids=["W2:4", "W1:8", "D2"],
)
def test_stages_prune_there_what_they_prune_here(tiny, tiny_data, stage):
    subject = tiny()
    here, card = (stage.apply(s, data=tiny_data)[0] for s in (subject, there(subject)))
    assert card.device.type == "cuda" and card.fingerprint == here.fingerprint


def test_packed_2_4_unpacked_and_on_sparse_kernels(tiny):
    subject = tiny(layers=2, hidden_size=128, intermediate_size=256, head_dim=32, initializer_range=0.05)
    dense, _ = Width(2, 4, metric="magnitude", linears=["*_proj"]).apply(there(subject, torch.bfloat16))
    packed, sparse = pack_all(dense), semi_structured(dense)
    assert nats(packed) == nats(dense), "unpacked it is the same weight"
    assert nats(sparse) == pytest.approx(nats(dense), rel=1e-2)
    assert packed.fingerprint == sparse.fingerprint == dense.fingerprint


def test_a_step_of_training_moves_a_correction_as_here(tiny):
    torch.manual_seed(0)
    a, b = 0.1 * torch.randn(4, 32), torch.zeros(32, 4)
    moved = []
    for device in ("cpu", "cuda"):
        subject = replace(s := tiny(), model=s.copy().model.to(device))
        put(
            subject.blocks[0],
            "q_proj",
            adapt(subject.linears(0)["q_proj"], a.to(device, copy=True), b.to(device, copy=True)),
        )
        adapted = subject.linears(0)["q_proj"]
        assert isinstance(adapted, Adapted)
        adapted.lora_A.requires_grad_(), adapted.lora_B.requires_grad_()
        optimiser = torch.optim.SGD([adapted.lora_A, adapted.lora_B], lr=0.1)
        ids = torch.arange(40, device=device)[None]
        torch.nn.functional.cross_entropy(subject.model(ids).logits[0, :-1], ids[0, 1:]).backward()
        optimiser.step()
        moved.append(adapted.lora_B.detach().cpu())
    assert moved[0].abs().max() > 0
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-3, atol=1e-6)


def test_quantised_weights(tiny):
    """The same numbers there, also after a CPU has put them into its own order."""
    wide = tiny(layers=2, hidden_size=128, intermediate_size=256, head_dim=32)
    subject = replace(wide, model=wide.copy().model.to(torch.bfloat16))
    quantised, _ = Rtn(grid="asymmetric").apply(subject)
    before = quantised.fingerprint
    here = nats(quantised)
    with torch.inference_mode():
        quantised.model(torch.arange(3)[None])
    quantised.model.to("cuda")
    del quantised.__dict__["fingerprint"]
    assert quantised.fingerprint == before
    assert nats(quantised) == pytest.approx(here, rel=1e-2)
    assert nats(quantised) == nats(quantised.copy()), "as unpacked"


def test_files_come_back(tiny, tmp_path):
    card = there(tiny())
    pruned, _ = Width(2, 4, metric="magnitude").apply(card)
    save_artifact(pruned, tmp_path / "artifact", packed=True)
    assert (
        load_artifact(tmp_path / "artifact", device="cuda").fingerprint
        == load_artifact(tmp_path / "artifact").fingerprint
        == pruned.fingerprint
    )
    save_checkpoint(pruned, tmp_path / "plain")
    assert load_subject(tmp_path / "plain").fingerprint == pruned.fingerprint


SHARING = """
import sys, torch
from thesislib.sweep.task import MEMORY_FOR_TENSORS
torch.cuda.set_per_process_memory_fraction(MEMORY_FOR_TENSORS / 2, "cuda:0")
total = torch.cuda.get_device_properties(0).total_memory
held = torch.empty(int(0.2 * total), dtype=torch.uint8, device="cuda")
try:
    torch.empty(int(0.4 * total), dtype=torch.uint8, device="cuda")
except torch.cuda.OutOfMemoryError:
    print("held to its part")
sys.stdin.readline()
"""


def test_two_workers_share_a_card():
    both = [
        subprocess.Popen([sys.executable, "-c", SHARING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.stdout.readline() for process in both]  # both hold their memory now
    for process in both:
        process.communicate("\n", timeout=60)
    assert said == ["held to its part\n"] * 2
