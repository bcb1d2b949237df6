"""The streaming engine against hooks on a plain forward pass."""

import pytest
import torch

from thesislib.compress.calibration import ALL_AT_ONCE, INPUTS, TRUE_SEQUENTIAL, Visitor, stream, token_weights
from thesislib.errors import BadInput
from thesislib.model.blocks import apply_plan
from thesislib.model.layers import LINEARS
from thesislib.sources.corpus import calibration_windows, join

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
IDS = torch.randint(0, 250, (5, 12), generator=torch.Generator().manual_seed(1))


class Collect(Visitor):
    """Keeps all statistics and all block outputs; changes nothing unless told how."""

    def __init__(self, groups=ALL_AT_ONCE, moments=True, change=None):
        self.groups, self.moments, self.how = groups, moments, change
        self.found, self.outputs, self.calls = {}, {}, []

    def change(self, block, linears, statistics):
        self.calls.append((block, tuple(linears)))
        self.found.update({(block, name): statistics[name] for name in linears})
        if self.how:
            self.how(block, linears)

    def seen(self, block, first, x, y):
        self.outputs[block, first] = y.clone()


def inputs_by_hooks(subject, ids):
    """{(block, projection): (N, T, D) inputs} of one plain forward pass."""
    found, handles = {}, []
    for b in range(subject.depth):
        for name, linear in subject.linears(b).items():
            handles.append(
                linear.register_forward_pre_hook(lambda _m, args, key=(b, name): found.__setitem__(key, args[0]))
            )
    with torch.no_grad():
        subject.model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_statistics_are_those_of_a_plain_forward(tiny, kind):
    subject = tiny(kind, layers=3)
    visitor = Collect()
    stream(subject, IDS, visitor, batch=2)
    expected = inputs_by_hooks(subject, IDS)
    assert set(visitor.found) == set(expected) == {(b, n) for b in range(3) for n in LINEARS}
    for key, x in expected.items():
        x = x.flatten(0, 1)
        torch.testing.assert_close(visitor.found[key].moment, x.T @ x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(visitor.found[key].squares, (x**2).sum(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(visitor.found[key].rms, x.square().mean(0).sqrt(), rtol=1e-4, atol=1e-5)
        assert visitor.found[key].tokens == IDS.numel()


@pytest.mark.parametrize("moments", [True, False])
def test_batch_feed_and_disk_change_nothing(tiny, moments):
    subject = tiny(layers=3)
    runs = []
    for options in ({"batch": 5}, {"batch": 1}, {"feed": "original"}, {"activations_on_disk": True}):
        visitor = Collect(moments=moments)
        stream(subject, IDS, visitor, **options)
        runs.append(visitor.found)
    for other in runs[1:]:
        for key, s in runs[0].items():
            torch.testing.assert_close(other[key].squares, s.squares, rtol=1e-4, atol=1e-5)
            assert (s.moment is None) == (not moments)


def test_the_next_block_sees_the_changed_one_unless_fed_the_original(tiny):
    def halve(block, linears):
        for linear in linears.values():
            linear.weight.data.mul_(0.5)

    plain = Collect()
    stream(tiny(layers=2), IDS, plain)
    changed, kept = tiny(layers=2), tiny(layers=2)
    after = Collect(change=halve)
    stream(changed, IDS, after)
    # what reached block 1 is what the changed block 0 gives
    expected = inputs_by_hooks(changed, IDS)[1, "q_proj"].flatten(0, 1)
    torch.testing.assert_close(after.found[1, "q_proj"].moment, expected.T @ expected, rtol=1e-4, atol=1e-4)
    fed = Collect(change=halve)
    stream(kept, IDS, fed, feed="original")
    for key in plain.found:
        torch.testing.assert_close(fed.found[key].moment, plain.found[key].moment, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after.found[1, "q_proj"].moment, plain.found[1, "q_proj"].moment, rtol=1e-2)


def test_true_sequential_groups_see_their_predecessors_changes(tiny):
    subject = tiny(layers=1)

    def double_v(block, linears):
        if "v_proj" in linears:
            linears["v_proj"].weight.data.mul_(2)

    visitor = Collect(groups=TRUE_SEQUENTIAL, change=double_v)
    before = inputs_by_hooks(subject, IDS)[0, "o_proj"].flatten(0, 1)
    stream(subject, IDS, visitor)
    assert visitor.calls == [(0, group) for group in TRUE_SEQUENTIAL]
    torch.testing.assert_close(
        visitor.found[0, "o_proj"].moment, 4 * before.T @ before, rtol=1e-4, atol=1e-4
    )  # o reads heads, linear in v


def test_only_wanted_projections_are_collected_and_blocks_are_seen_after_their_change(tiny):
    class Some(Collect):
        def wants(self, block, name):
            return block == 1 and name in ("up_proj", "q_proj")

    subject, visitor = (
        tiny(layers=2),
        Some(change=lambda _b, linears: [m.weight.data.zero_() for m in linears.values()]),
    )
    stream(subject, IDS, visitor, batch=5)
    assert set(visitor.found) == {(1, "up_proj"), (1, "q_proj")}
    with torch.no_grad():
        expected = subject.model.model(IDS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(visitor.outputs[0, 0], expected[1])
    assert not torch.allclose(visitor.outputs[1, 0], expected[2])  # that one is after the final norm
    torch.testing.assert_close(subject.model.model.norm(visitor.outputs[1, 0]), expected[2])


def test_token_weights():
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    assert token_weights("equal", x).tolist() == [[1.0] * 4] * 2
    assert token_weights("first_16", x).tolist() == [[16.0, 1, 1, 1]] * 2
    assert token_weights("skip_3", x).tolist() == [[0.0, 0, 0, 1]] * 2
    torch.testing.assert_close(token_weights("unit_norm", x), 1 / x.norm(dim=-1) ** 2)
    assert token_weights("unit_norm", torch.zeros(1, 2, 3)).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("weighting", ["first_4", "skip_2", "unit_norm"])
def test_weighted_moments(tiny, weighting):
    subject = tiny(layers=1)
    visitor = Collect()
    stream(subject, IDS, visitor, weighting=weighting, batch=2)
    x = inputs_by_hooks(subject, IDS)[0, "down_proj"]
    w = token_weights(weighting, x)
    expected = torch.einsum("ntd,nte,nt->de", x, x, w)
    found = visitor.found[0, "down_proj"]
    torch.testing.assert_close(found.moment, expected, rtol=1e-4, atol=1e-5)
    assert found.tokens == (IDS.numel() if weighting == "unit_norm" else w.sum())
    if weighting == "unit_norm":
        assert found.moment.trace() == pytest.approx(IDS.numel(), rel=1e-4)


@pytest.mark.parametrize("weighting", ["sink", "first_0", "skip_", "Equal", 3])
def test_unknown_weighting(weighting):
    with pytest.raises(
        BadInput, match=f"token weighting '{weighting}' is not known: expected equal, unit_norm, first_N or skip_N"
    ):
        token_weights(weighting, torch.zeros(1, 2, 3))


def test_bad_input(tiny):
    subject = tiny(layers=2)
    with pytest.raises(BadInput, match="skip_12' leaves no token of windows of 12"):
        stream(subject, IDS, Collect(), weighting="skip_12")
    with pytest.raises(BadInput, match=r"calibration windows have shape \(0, 12\)"):
        stream(subject, IDS[:0], Collect())
    with pytest.raises(BadInput, match="feed 'orignal' is not known"):
        stream(subject, IDS, Collect(), feed="orignal")
    with pytest.raises(BadInput, match="runs a block twice"):
        stream(apply_plan(subject, (0, 1, 1)), IDS, Collect())


def test_inputs_that_are_not_finite_name_block_and_projection(tiny):
    subject = tiny(layers=2)

    def poison(block, linears):
        if block == 0:
            linears["down_proj"].weight.data[:] = torch.inf

    with pytest.raises(BadInput, match="inputs of block 1's q_proj are not finite"):
        stream(subject, IDS, Collect(change=poison))


def test_projections_with_one_input_share_one_statistic(tiny):
    visitor = Collect()
    stream(tiny(layers=1), IDS, visitor)
    for a in LINEARS:
        for b in LINEARS:
            assert (visitor.found[0, a] is visitor.found[0, b]) == (INPUTS[a] == INPUTS[b])


def test_calibration_windows_are_a_seeded_choice_to_which_a_larger_one_adds(byte_tokenizer, monkeypatch):
    monkeypatch.setattr(
        "thesislib.sources.corpus.calibration_text",
        lambda *_: join("calibration", ["".join(map(chr, range(97, 122)))] * 8),
    )
    few, more, other = (
        calibration_windows(byte_tokenizer, "c4", "embedded", n, 16, seed) for n, seed in ((3, 0), (6, 0), (6, 1))
    )
    assert few.shape == (3, 16) and torch.equal(few, more[:3]) and not torch.equal(more, other)
    with pytest.raises(BadInput, match="14 calibration windows of 16 tokens asked for: 'calibration' has 13"):
        calibration_windows(byte_tokenizer, "c4", "embedded", 14, 16)
    with pytest.raises(BadInput, match="window length 300 is longer than text 'calibration', which has 214 tokens"):
        calibration_windows(byte_tokenizer, "c4", "embedded", 1, 300)
