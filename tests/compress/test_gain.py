"""Block gain against central differences of the model's own forward pass, and where it is known exactly."""

import pytest
import torch
from torch import nn

from thesislib.compress.gain import gains
from thesislib.errors import BadInput

IDS = torch.randint(0, 250, (3, 12), generator=torch.Generator().manual_seed(1))


def states_by_hooks(subject, ids=IDS, changed=None, by=0.0):
    """Each block's input and output when the output of block `changed` gets `by` (B, T, D) more."""
    seen = []

    def hook(number):
        def changes(_module, args, out):
            out = out + by if number == changed else out
            seen.append((args[0], out))
            return out

        return changes

    handles = [block.register_forward_hook(hook(k)) for k, block in enumerate(subject.blocks)]
    with torch.no_grad():
        subject.model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    ("kind", "config"), [("llama", {}), ("mistral", {"sliding_window": 4}), ("qwen3", {}), ("smollm3", {})]
)
def test_gain_is_a_central_difference(tiny, kind, config):
    subject = tiny(kind, layers=4, **config)
    subject.model.double()
    found, states, step = gains(subject, IDS), states_by_hooks(subject), 1e-3
    for b, (x, y) in enumerate(states):
        write = y - x
        ahead, behind = (states_by_hooks(subject, changed=b, by=sign * step * write)[-1][1] for sign in (1, -1))
        arrived = ((ahead - behind) / (2 * step)).norm(dim=-1)
        assert torch.allclose(found.gain[b], arrived / write.norm(dim=-1), rtol=2e-3)
        assert torch.allclose(found.share[b], arrived / states[-1][1].norm(dim=-1), rtol=2e-3)
    assert torch.allclose(found.gain[-1], torch.ones(()).double())


class Linear(nn.Module):
    """A block x -> x + A x."""

    def __init__(self, A):
        super().__init__()
        self.A = A

    def forward(self, x, **_kwargs):
        return x + x @ self.A.T


def linear_subject(tiny, matrices):
    subject = tiny(layers=len(matrices))
    subject.model.model.layers = nn.ModuleList(map(Linear, matrices))
    return subject


def test_gain_of_linear_blocks_is_the_product_of_those_behind(tiny):
    factors = [0.5, -0.25, 2.0, 1.0]
    found = gains(linear_subject(tiny, [a * torch.eye(32) for a in factors]), IDS)
    assert [gain for gain, _ in found.medians] == pytest.approx([0.75 * 3 * 2, 3 * 2, 2, 1])
    shares = [a / (1 + a) for a in factors]  # of all that is left, whatever came before and comes after
    assert [share for _, share in found.medians] == pytest.approx([abs(share) for share in shares])


def test_a_write_is_amplified_in_its_own_directions_only(tiny):
    """The first block writes to coordinate 0, the second to 1; the third multiplies coordinate 0 by 100."""
    A, B, C = torch.zeros(3, 32, 32)
    A[0, 5], B[1, 5], C[0, 0] = 0.1, 10.0, 99.0
    found = gains(linear_subject(tiny, [A, B, C]), IDS).gain
    assert torch.allclose(found[0], torch.tensor(100.0)) and torch.allclose(found[1], torch.tensor(1.0))


def test_a_block_that_writes_nothing_has_no_gain(tiny):
    subject = tiny(layers=3)
    for name in ("o_proj", "down_proj"):
        subject.linears(1)[name].weight.data.zero_()
    found = gains(subject, IDS)
    assert found.gain[1].isnan().all() and not found.share[1].any()
    assert not found.gain[[0, 2]].isnan().any()


def test_batches_and_tangents_at_once_change_nothing(tiny, monkeypatch):
    subject = tiny(layers=5)
    one = gains(subject, IDS)
    monkeypatch.setattr("thesislib.compress.gain.TANGENTS", 2)
    assert one.gain.shape == (5, 3, 12)
    assert torch.allclose(one.gain, gains(subject, IDS, batch=3).gain, rtol=1e-4)


def test_bfloat16_is_refused(tiny):
    subject = tiny(layers=2)
    subject.model.bfloat16()
    with pytest.raises(BadInput, match="block gain needs float32: the subject is in bfloat16"):
        gains(subject, IDS)
