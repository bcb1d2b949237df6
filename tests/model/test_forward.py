import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.accelerator import losses_as_before
from thesislib.compress.franken import franken_plans
from thesislib.formats.checkpoint import SUPPORTED
from thesislib.model import forward
from thesislib.model.blocks import apply_plan
from thesislib.model.forward import blocks_run, final_states, token_losses
from thesislib.model.subject import Subject

PLANS = [(0, 1, 2, 3, 4, 5), (0, 1, 2, 2, 3), (0, 1), (5,), (0, 1, 2, 3, 4, 5)]


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_shared_beginnings_change_nothing(tiny, model_type):
    subject = tiny(model_type)
    ids = torch.randint(0, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = dict(final_states(subject.model, ids, PLANS))
        assert sorted(found) == list(range(len(PLANS)))
        for i, plan in enumerate(PLANS):
            expected = apply_plan(subject, plan).model.model(ids).last_hidden_state
            torch.testing.assert_close(found[i], expected)


def test_each_shared_block_runs_once(tiny):
    subject = tiny()
    runs = []
    for block in subject.blocks:
        block.register_forward_hook(lambda *_: runs.append(1))
    with torch.inference_mode():
        list(final_states(subject.model, torch.tensor([[1, 2, 3]]), PLANS))
    assert (len(runs), sum(map(len, PLANS))) == blocks_run(PLANS) == (9, 20)


def test_franken_plans_share_as_the_module_says():
    assert blocks_run(list(franken_plans(30).values())) == (347, 469)


def test_no_plan_is_the_model_itself(tiny):
    subject = tiny()
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.inference_mode():
        ((index, states),) = final_states(subject.model, ids)
        assert index == 0
        torch.testing.assert_close(states, subject.model.model(ids).last_hidden_state)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "head_dim": 16}),
        ("smollm3", {}),
    ],
)
def test_blocks_run_by_hand_are_the_model(tiny, model_type, config, implementation):
    """Whatever attention the configuration asks for, also beyond a window, for all blocks and for some of them."""
    subject = tiny(model_type, **config)
    reference = copy.deepcopy(subject.model)
    subject.model.config._attn_implementation = implementation  # as a config.json may have it
    subject = Subject(subject.model, subject.tokenizer, subject.name)
    ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for plan in (range(6), (0, 2, 5), (0, 3, 4, 4)):
            ((_, found),) = final_states(subject.model, ids, [tuple(plan)])
            layers, types = reference.model.layers, getattr(reference.config, "layer_types", None)
            other = copy.deepcopy(reference)
            other.model.layers = torch.nn.ModuleList([layers[b] for b in plan])
            other.config.num_hidden_layers = len(plan)
            if types:
                other.config.layer_types = [types[b] for b in plan]
            torch.testing.assert_close(found, other.model(ids, use_cache=False).last_hidden_state)
            pruned = apply_plan(subject, plan)
            torch.testing.assert_close(pruned.model.model(ids).last_hidden_state, found)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1000), (3, 7), (7, 1), (100, 100)])
def test_sliced_losses_are_cross_entropy(tiny, rows, columns):
    subject = tiny()
    states = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 5, 6, 7, 100, 200, subject.model.config.vocab_size - 1])
    with torch.inference_mode():
        expected = F.cross_entropy(subject.model.lm_head(states), targets, reduction="none")
        torch.testing.assert_close(token_losses(subject.model, states, targets, rows, columns), expected)


def test_no_step_holds_all_logits(tiny):
    subject = tiny()

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    states = torch.zeros(500, 32)
    with torch.inference_mode(), Largest() as largest:
        token_losses(subject.model, states, torch.zeros(500, dtype=torch.long), rows=100, columns=50)
    words = len(subject.model.lm_head.weight)
    assert largest.elements < words * 32 + 1 < 500 * words  # the output embedding itself is the largest thing seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_on_a_cpu_are_bit_for_bit_what_they_were(tiny, dtype):
    subject = tiny(vocab_size=5000)
    made = torch.Generator().manual_seed(0)
    states, targets = torch.randn(1500, 32, generator=made).to(dtype), torch.randint(5000, (1500,), generator=made)
    targets[:4] = torch.tensor([0, 2047, 2048, 4999])
    model = subject.model.to(dtype)
    assert torch.equal(token_losses(model, states, targets), losses_as_before(model, states, targets))


def test_losses_by_a_cards_tiles(tiny, monkeypatch):
    subject = tiny(vocab_size=5000)
    states, targets = torch.randn(70, 32), torch.randint(5000, (70,))
    expected = -(states @ subject.model.get_output_embeddings().weight.T).log_softmax(1)[torch.arange(70), targets]
    monkeypatch.setattr(forward, "tile", lambda device, words: (32, None))
    torch.testing.assert_close(token_losses(subject.model, states, targets), expected)


def test_tiles_and_batches_are_made_for_the_device(tiny):
    assert forward.tile("cpu", 49152) == (1024, 2048)
    for words in (300, 49152, 262144):
        rows, columns = forward.tile("cuda", words)
        assert columns is None and rows * words * 8 <= 2**30 < (rows + 1) * words * 8, (
            "a gigabyte, and a row more would not fit"
        )
    assert forward.tile("cuda", 2**40) == (1, None)
    assert forward.batch_for(tiny().model, 512, on_cpu=4) == 4
    assert forward.tokens_at_once(None, 576, 1536) == forward.tokens_at_once(80 * 2**30, 576, 1536) == 32 * 512
    small = forward.tokens_at_once(2**30, 4096, 14336)  # a large model on what is left of a small card
    assert 0 < small < 32 * 512 and small * 4 * (8 * 4096 + 4 * 14336) <= 2**28


def test_what_float16_holds_is_bounded_by_the_norms(tiny):
    subject = tiny()
    model = subject.model
    ids = torch.arange(200)[None]
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    gamma, words = model.model.norm.weight, model.lm_head.weight
    assert logits.abs().max() <= len(gamma) ** 0.5 * gamma.abs().max() * words.norm(dim=1).max()
    assert forward.fits_half(model)
    large = copy.deepcopy(model)
    large.model.norm.weight.data.fill_(1e6)
    assert not forward.fits_half(large)
