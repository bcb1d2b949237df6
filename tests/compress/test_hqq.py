"""HQQ against its formulas in float64, rounding as its fixed beginning, and what it leaves on disk."""

import numpy as np
import pytest
import torch

from thesislib.compress.gptq import Rtn
from thesislib.compress.hqq import Hqq, shrink
from thesislib.compress.width import Width
from thesislib.errors import BadInput
from thesislib.formats.artifact import load_artifact, save_artifact
from thesislib.formats.gguf import export_gguf
from thesislib.formats.gptq import export_gptq
from thesislib.formats.load import load_subject
from thesislib.model.grid import BITS
from thesislib.model.quantised import QuantisedLinear
from thesislib.pipeline.recipe import parse_label


def weights(seed=0, rows=12, columns=64):
    """Gaussian weights with a few large ones, as HQQ's norm is made for."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    return w * torch.where(torch.rand(w.shape, generator=generator) < 0.03, 6.0, 1.0)


def by_hand(w, bits, group, iterations, p=0.7, beta=10.0, growth=1.01):
    """The paper's loop on zeros z and inverse scales, in float64 numpy, one row at a time; the dequantised weight."""
    out = np.empty_like(w)
    for r, row in enumerate(w):
        x, b = row.reshape(-1, group), beta
        scale = ((x.max(1) - x.min(1)) / (2**bits - 1)).astype(np.float16).astype(float)[:, None]
        z = -x.min(1, keepdims=True).astype(np.float16).astype(float) / scale
        least, best = np.inf, z
        for _ in range(iterations + 1):
            q = np.clip(np.rint(x / scale + z), 0, 2**bits - 1)
            error = x - scale * (q - z)
            if np.abs(error).mean() >= least:
                break
            least, best = np.abs(error).mean(), z
            e = np.sign(error) * np.maximum(np.abs(error) - np.maximum(np.abs(error), 1e-12) ** (p - 1) / b, 0)
            z = (q - (x - e) / scale).mean(1, keepdims=True)
            z = -(-z * scale).astype(np.float16).astype(float) / scale  # what is stored
            b *= growth
        out[r] = (scale * (np.clip(np.rint(x / scale + best), 0, 2**bits - 1) - best)).reshape(-1)
    return out


@pytest.mark.parametrize("bits", BITS)
def test_no_iteration_is_rounding(bits):
    w = weights()
    rounded = Rtn(bits=bits, group=16, grid="minimum", clip="none").rounded(w)
    found = Hqq(bits=bits, group=16, iterations=0).rounded(w)
    for a, b in ((found.codes, rounded.codes), (found.scale, rounded.scale), (found.offset, rounded.offset)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_papers_loop(bits, seed):
    w = weights(seed)
    found = Hqq(bits=bits, group=16).rounded(w).weight
    wanted = torch.from_numpy(by_hand(w.double().numpy(), bits, 16, 20))
    # in float32 a weight halfway between two levels may fall to the other one, and takes its row along
    assert ((found - wanted).abs() < 1e-3).all(1).sum() >= len(w) - 1


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_leaves_less_mean_error_than_rounding_in_every_row(bits):
    w = weights()
    rounded, found = (
        c.rounded(w).weight for c in (Rtn(bits=bits, group=16, grid="minimum", clip="none"), Hqq(bits=bits, group=16))
    )
    before, after = ((w - x).abs().mean(1) for x in (rounded, found))
    assert (after <= before).all() and after.mean() < 0.97 * before.mean()


def test_a_row_does_not_depend_on_the_others():
    w = weights()
    assert torch.equal(Hqq(group=16).rounded(w).weight[3:5], Hqq(group=16).rounded(w[3:5]).weight)


def test_what_lies_on_the_grid_stays():
    w = Rtn(bits=4, group=16, grid="minimum", clip="none").rounded(weights()).weight
    torch.testing.assert_close(
        Hqq(group=16).rounded(w).weight, w, atol=2e-3, rtol=0
    )  # the scale is fitted again, in float16


def test_shrink_with_p_1_is_the_minimiser():
    x, e = torch.linspace(-1, 1, 41), torch.linspace(-1.2, 1.2, 24001)
    cost = e.abs() + 5.0 * (e - x[:, None]) ** 2  # beta / 2 with beta 10
    torch.testing.assert_close(shrink(x, 10.0, 1.0), e[cost.argmin(1)], atol=1e-3, rtol=0)


def test_it_comes_back_from_an_artifact_and_goes_to_other_formats_or_is_refused(tiny, tmp_path):
    subject = tiny(layers=2, hidden_size=64, intermediate_size=64, num_attention_heads=8)
    made, report = Hqq(group=32).apply(subject)
    assert all(isinstance(m, QuantisedLinear) for m in made.linears(0).values()) and report["bits_per_weight"] == 5.0
    save_artifact(made, tmp_path / "artifact")
    assert load_artifact(tmp_path / "artifact").fingerprint == made.fingerprint
    export_gguf(made, tmp_path / "model.gguf", "Q4_1")  # scale and minimum for each 32: the same form
    again = load_subject(tmp_path / "model.gguf")
    for name, module in made.linears(1).items():
        torch.testing.assert_close(again.linears(1)[name].weight, module.weight, atol=1e-6, rtol=0)
    with pytest.raises(BadInput, match="grid 'minimum' cannot be held: a GPTQ checkpoint has integer zeros"):
        export_gptq(made, tmp_path / "gptq")


def test_pruned_weights_are_refused(tiny):
    pruned, _ = Width(2, 4, metric="magnitude").apply(tiny(layers=2))
    with pytest.raises(BadInput, match="grid 'minimum' has no exact zero"):
        Hqq(group=16).apply(pruned)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": "symmetric"}, "unknown grid of hqq, whose offset is a floating number, 'symmetric': "),
        ({"iterations": -1}, "iterations is -1: expected 0 to 1000"),
        ({"p": 0}, r"p is 0: expected a norm in \(0, 1\]"),
        ({"beta": -1.0}, "beta is -1.0"),
        ({"bits": 9}, "9 bits: expected 2, 3, 4, 5, 6, 7, 8"),
        ({"clip": "squared"}, "unknown clip 'squared'"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(BadInput, match=message):
        Hqq(**settings)


def test_labels():
    assert (
        parse_label("D2+H3").stages[1] == Hqq(bits=3)
        and Hqq().label == "H"
        and Hqq.family == "quantised"
        and Hqq.correctable
    )
