"""Masks against few-line references, and what they must leave alone."""

import numpy as np
import pytest
import torch

from thesislib.compress.calibration import Statistics, stream
from thesislib.compress.width import Prune, Width, least_of_each, least_share
from thesislib.errors import BadInput
from thesislib.model.layers import LINEARS
from thesislib.model.packing import THESIS_PATTERNS

IDS = torch.randint(0, 250, (4, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def calibrated(monkeypatch):
    monkeypatch.setattr("thesislib.compress.stage.calibration_windows", lambda *a: IDS)


def lowest_by_loops(score, remove, of):
    """The reference: one group after the other, in plain Python."""
    gone = np.zeros(score.shape, bool)
    for r in range(score.shape[0]):
        for at in range(0, score.shape[1], of):
            group = list(score[r, at : at + of])
            for i in sorted(range(of), key=lambda i: (group[i], i))[:remove]:
                gone[r, at + i] = True
    return gone


@pytest.mark.parametrize(("remove", "of"), THESIS_PATTERNS)
@pytest.mark.parametrize("ties", [True, False])
def test_exactly_n_of_each_m_go_and_they_are_the_lowest(remove, of, ties):
    score = torch.rand(5, 48, generator=torch.Generator().manual_seed(0))
    score = (score * 3).floor() if ties else score
    gone = least_of_each(score, remove, of)
    assert (gone.view(5, -1, of).sum(-1) == remove).all()
    assert (gone.numpy() == lowest_by_loops(score.numpy(), remove, of)).all()


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.99])
def test_the_share_is_taken_from_each_row(ratio):
    score = torch.rand(5, 48, generator=torch.Generator().manual_seed(0))
    gone = least_share(score, ratio)
    assert (gone.sum(1) == int(48 * ratio)).all()
    for row, flags in zip(score, gone, strict=True):
        assert not flags.any() or row[flags].max() <= row[~flags].min()


def wanda_by_hooks(subject, remove, of):
    """WANDA by its paper, block after block on a model of its own: {(block, name): weight}, in ten lines."""
    found = {}
    for b in range(subject.depth):
        inputs, handles = {}, []
        for name, linear in subject.linears(b).items():
            keep = lambda _m, args, name=name, inputs=inputs: inputs.__setitem__(name, args[0].flatten(0, 1))  # noqa: E731
            handles.append(linear.register_forward_pre_hook(keep))
        with torch.no_grad():
            subject.model(IDS, use_cache=False)
        for name, linear in subject.linears(b).items():
            score = linear.weight.abs() * inputs[name].norm(dim=0)
            linear.weight.data[torch.from_numpy(lowest_by_loops(score.numpy(), remove, of))] = 0
            found[b, name] = linear.weight.clone()
        for handle in handles:
            handle.remove()
    return found


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_wanda_is_the_papers(tiny, kind):
    subject = tiny(kind, layers=3)
    pruned, report = Width(2, 4).apply(subject)
    for (b, name), weight in wanda_by_hooks(tiny(kind, layers=3), 2, 4).items():
        found = pruned.linears(b)[name].weight
        # a tie in the last bit of a sum may fall either way; a wrong formula would move a third of them
        assert (found == weight).float().mean() > 0.998, (b, name)
    assert report["removed_weights"] / report["of_weights"] == 0.5


def test_wanda_with_equal_activations_is_magnitude(tiny):
    subject = tiny(layers=1)
    linear = subject.linears(0)["up_proj"]
    expected = torch.from_numpy(lowest_by_loops(linear.weight.abs().numpy(), 4, 8))
    Prune(Width(4, 8)).change(0, {"up_proj": linear}, {"up_proj": Statistics(torch.full((32,), 7.0), None, 3.0)})
    assert ((linear.weight == 0) == expected).all()


def test_magnitude_needs_no_text(tiny, monkeypatch):
    monkeypatch.setattr("thesislib.compress.stage.calibration_windows", lambda *a: pytest.fail("text was read"))
    pruned, _ = Width(1, 8, metric="magnitude").apply(tiny(layers=2))
    before = tiny(layers=2)
    for b in range(2):
        for name, linear in pruned.linears(b).items():
            expected = lowest_by_loops(before.linears(b)[name].weight.abs().numpy(), 1, 8)
            assert ((linear.weight == 0).numpy() == expected).all()


def test_what_stays_is_bit_for_bit_what_it_was_and_zeros_have_no_sign(tiny):
    subject = tiny(layers=2)
    before = subject.fingerprint
    pruned, _ = Width(8, 16).apply(subject)
    for b in range(2):
        for name, linear in pruned.linears(b).items():
            kept = linear.weight != 0
            assert torch.equal(linear.weight[kept], subject.linears(b)[name].weight[kept])
            assert not torch.signbit(linear.weight[~kept]).any()
    assert pruned.fingerprint != before and tiny(layers=2).fingerprint == before
    for key, tensor in subject.model.state_dict().items():
        if not any(name in key for name in LINEARS):
            assert torch.equal(tensor, pruned.model.state_dict()[key])


def test_pruning_two_halves_of_the_layers_is_pruning_all(tiny):
    """With magnitude the halves are independent; with WANDA the second half must see the first one pruned."""
    whole, _ = Width(2, 4).apply(tiny(layers=4))
    first, _ = Width(2, 4, linears=["blocks.0.*", "blocks.1.*"]).apply(tiny(layers=4))
    both, _ = Width(2, 4, linears=["blocks.2.*", "blocks.3.*"]).apply(first)
    assert both.fingerprint == whole.fingerprint != first.fingerprint


def test_choice_of_linears_and_ratios(tiny):
    pruned, _ = Width(ratio=0.5, linears="q_proj", ratios={"*.down_proj": 0.25, "blocks.1.down_proj": 0.75}).apply(
        tiny(layers=2)
    )
    for block, down in ((0, 0.25), (1, 0.75)):
        zeros = {name: float((x.weight == 0).float().mean()) for name, x in pruned.linears(block).items()}
        assert (zeros["q_proj"], zeros["down_proj"], zeros["up_proj"]) == (0.5, down, 0)


def test_a_ratio_of_zero_changes_nothing(tiny):
    subject = tiny(layers=2)
    assert Width(ratio=0).apply(subject)[0].fingerprint == subject.fingerprint


@pytest.mark.parametrize("weighting", ["unit_norm", "first_16", "skip_1"])
def test_token_weighting_reaches_the_score(tiny, weighting):
    plain, _ = Width(4, 8).apply(tiny(layers=2))
    weighted, report = Width(4, 8, weighting=weighting).apply(tiny(layers=2))
    assert weighted.fingerprint != plain.fingerprint and report["removed_weights"] * 2 == report["of_weights"]


def test_all_zero_inputs_are_named_and_compared_by_magnitude(tiny):
    subject = tiny(layers=2)
    subject.linears(1)["v_proj"].weight.data.zero_()  # so nothing reaches o_proj
    with pytest.warns(
        UserWarning,
        match="all inputs of block 1's o_proj are zero on the calibration text: its weights are compared by magnitude "
        "alone",
    ):
        pruned, report = Width(2, 4).apply(subject)
    assert report["compared by magnitude"] == ["blocks.1.o_proj"]
    expected = lowest_by_loops(subject.linears(1)["o_proj"].weight.abs().numpy(), 2, 4)
    assert ((pruned.linears(1)["o_proj"].weight == 0).numpy() == expected).all()


def test_inputs_that_are_not_finite(tiny):
    subject = tiny(layers=2)
    subject.linears(0)["down_proj"].weight.data[:] = torch.inf
    with pytest.raises(BadInput, match="inputs of block 1's q_proj are not finite"):
        stream(subject.copy(), IDS, Prune(Width(2, 4)))


def test_rows_that_the_pattern_does_not_divide(tiny):
    with pytest.raises(
        BadInput,
        match="pattern 1:7 does not fit q_proj: its rows have 32 inputs, which 7 does not divide; all rows of this "
        "model are multiples of 2, 4, 8, 16, 32",
    ):
        Width(1, 7).apply(tiny())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "either 'remove' and 'of'"),
        ({"remove": 2}, "either 'remove' and 'of'"),
        ({"remove": 2, "of": 4, "ratio": 0.5}, "either 'remove' and 'of'"),
        ({"remove": 4, "of": 4}, "pattern 4:4 removes all: expected 0 < removed < 4"),
        ({"remove": 0, "of": 4}, "pattern 0:4 removes none"),
        ({"ratio": 1.0}, r"ratio 1.0: expected a share of the weights in \[0, 1\)"),
        ({"ratio": -0.1}, "ratio -0.1"),
        ({"ratios": {"q_proj": 2}}, "ratio 2"),
        ({"ratio": 0.5, "metric": "wandb"}, "unknown width metric 'wandb'.*wanda"),
        ({"ratio": 0.5, "linears": "q_prj"}, "'q_prj'.*q_proj"),
        ({"ratios": {"qproj": 0.5}}, "'qproj'.*q_proj"),
        ({"ratio": 0.5, "weighting": "sink"}, "token weighting 'sink'"),
        ({"ratio": 0.5, "windows": 0}, "at least 1 calibration window"),
    ],
)
def test_bad_settings(settings, said):
    with pytest.raises(BadInput, match=said):
        Width(**settings)


def test_labels():
    assert [Width(1, 8).label, Width(ratio=0.5).label, Width(ratios={"q_proj": 0.5}).label] == ["W1:8", "W50%", "W~"]
