"""Corrections in the inputs' eigenspace: against plain SVD, against whitening by Cholesky, and on models."""

import json
from itertools import pairwise

import pytest
import torch

from thesislib.compress.eora import Eora, correction, share_out, square_root, start
from thesislib.compress.gptq import Gptq, Rtn
from thesislib.compress.layerwise import effective_weight, layer_errors, relative_error
from thesislib.compress.stage import as_entry
from thesislib.compress.width import Width
from thesislib.errors import BadInput
from thesislib.formats.load import save_checkpoint
from thesislib.model.layers import LINEARS, Adapted, adapt, replace
from thesislib.model.quantised import QuantisedLinear

IDS = torch.randint(0, 250, (8, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def calibrated(monkeypatch):
    monkeypatch.setattr("thesislib.compress.stage.calibration_windows", lambda *a: IDS)


def problem(rows=24, columns=40, tokens=200, seed=0):
    """What compression took, and inputs (T, D) of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator) @ (
        torch.eye(columns) + 0.1 * torch.randn(columns, columns, generator=generator)
    )
    return torch.randn(rows, columns, generator=generator), x * torch.exp(torch.randn(columns, generator=generator))


def product(missing, moment, rank):
    found = correction(missing, *square_root(moment), rank)
    return found.B @ found.A


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_full_rank_restores_the_weight(shape):
    missing, x = problem(*shape)
    assert torch.allclose(product(missing, x.T @ x, min(shape)), missing, atol=1e-4)


def test_inputs_that_are_independent_make_it_the_plain_svd():
    missing, _ = problem()
    u, s, v = torch.linalg.svd(missing, full_matrices=False)
    for rank in (1, 5, 20):
        assert torch.allclose(
            product(missing, 13 * torch.eye(40), rank), (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-4
        )


def test_whitening_by_cholesky_gives_the_same_product():
    missing, x = problem()
    moment = (x.T @ x).double()
    lower = torch.linalg.cholesky(moment)
    u, s, v = torch.linalg.svd(missing.double() @ lower, full_matrices=False)
    for rank in (1, 5, 20):
        by_cholesky = (u[:, :rank] * s[:rank]) @ v[:rank] @ lower.inverse()
        assert torch.allclose(
            product(missing, moment.float(), rank).double(), by_cholesky, atol=1e-3 * missing.abs().max()
        )


def test_no_other_correction_of_its_rank_does_better():
    missing, x = problem()
    generator = torch.Generator().manual_seed(3)
    found = correction(missing, *square_root(x.T @ x), 4)

    def error(B, A):
        return ((missing - B @ A) @ x.T).norm()

    best = error(found.B, found.A)
    u, s, v = torch.linalg.svd(missing, full_matrices=False)
    assert best < 0.9 * error(u[:, :4] * s[:4], v[:4])  # the weight's own SVD, blind to the inputs
    for _ in range(50):
        near = [t + 0.02 * t.abs().mean() * torch.randn(t.shape, generator=generator) for t in (found.B, found.A)]
        assert error(*near) > best


def test_errors_fall_with_rank_by_what_is_foretold():
    missing, x = problem()
    weight, moment = missing + 1, x.T @ x
    whole = float((weight @ x.T).square().sum())
    found = correction(missing, *square_root(moment), 24, whole)
    errors = [relative_error(missing - found.B[:, :r] @ found.A[:r], weight, moment) for r in range(25)]
    assert all(b < a for a, b in pairwise(errors))
    for r in range(24):
        assert abs(errors[r] ** 2 - errors[r + 1] ** 2 - found.gains[r]) < 1e-4
    assert found.cost == 2 * (24 + 40)


def test_directions_without_inputs_are_left_out_and_not_blown_up():
    missing, x = problem(tokens=10)  # 10 tokens in 40 dimensions
    moment = x.T @ x
    root, inverse = square_root(moment)
    assert root.shape == (40, 10)
    assert torch.allclose(inverse @ root, torch.eye(10, dtype=torch.float64), atol=1e-6)
    made = product(missing, moment, 24)
    assert torch.allclose(
        made @ x.T, missing @ x.T, atol=1e-2 * (missing @ x.T).abs().max()
    )  # right wherever there were inputs
    assert made.norm() < missing.norm()  # and nothing where there were none


def test_a_sink_does_not_hide_the_other_tokens():
    missing, x = problem()
    x[0] *= 100
    assert square_root(x.T @ x)[0].shape == (40, 40)
    made = product(missing, x.T @ x, 24)
    assert torch.allclose(made @ x[1:].T, missing @ x[1:].T, atol=1e-2)


def test_statistics_that_say_nothing():
    with pytest.raises(BadInput, match="block 2's q_proj saw no tokens"):
        square_root(torch.zeros(4, 4), "block 2's q_proj")
    with pytest.raises(BadInput, match="the statistics of block 2's q_proj are not finite"):
        square_root(torch.full((4, 4), torch.inf), "block 2's q_proj")


# ---------------------------------------------------------------- budgets


def test_a_budget_is_spent_where_it_helps_most():
    gains = {"a": [10.0, 4.0, 1.0], "b": [9.0, 8.0, 7.0], "c": [0.1]}
    costs = {"a": 10, "b": 20, "c": 5}
    assert share_out(gains, costs, 10) == {"a": 1, "b": 0, "c": 0}
    assert share_out(gains, costs, 30) == {"a": 1, "b": 1, "c": 0}
    # b's second (8 / 20) ties with a's second (4 / 10), which was given first; then b's
    assert share_out(gains, costs, 40) == {"a": 2, "b": 1, "c": 0}
    assert share_out(gains, costs, 1000) == {"a": 3, "b": 3, "c": 1}
    assert share_out({"a": [4.0, 3.0], "b": [5.0]}, {"a": 10, "b": 20}, 20) == {
        "a": 2,
        "b": 0,
    }  # by the byte, not by itself
    with pytest.raises(BadInput, match="a budget of 4 bytes buys no correction: the cheapest takes 5"):
        share_out(gains, costs, 4)


def test_a_budget_beats_an_even_rank_of_the_same_size(tiny):
    subject = tiny(layers=3)
    # one block quantised hard, the others hardly
    compressed, _ = Rtn(bits=2, group=16, linears="blocks.1.*").apply(subject)
    compressed, _ = Rtn(bits=8, group=16, linears=["blocks.0.*", "blocks.2.*"]).apply(compressed)
    even, even_report = Eora(rank=2).apply(compressed, original=subject)
    spent, report = Eora(bytes=even_report["bytes"]).apply(compressed, original=subject)
    assert 0.9 * even_report["bytes"] < report["bytes"] <= even_report["bytes"]
    held = sum(
        2 * t.numel()
        for i in range(3)
        for m in spent.linears(i).values()
        if isinstance(m, Adapted)
        for t in (m.lora_A, m.lora_B)
    )
    assert held == report["bytes"]
    assert max(report["ranks"].values()) <= 8  # four times the even split
    assert all(rank == 0 for place, rank in report["ranks"].items() if not place.startswith("blocks.1."))
    errors = layer_errors(subject, {"even": even, "spent": spent}, IDS)
    squares = {kind: sum(e**2 for e in found.values()) for kind, found in errors.items()}
    assert squares["spent"] < squares["even"]


# ---------------------------------------------------------------- the stage


def test_no_projection_gets_more_than_four_times_its_even_share(tiny):
    subject = tiny(layers=3)
    compressed, _ = Rtn(bits=2, group=16, linears="blocks.1.q_proj").apply(subject)
    _, even = Eora(rank=2).apply(Rtn(group=16).apply(subject)[0], original=subject)
    _, report = Eora(bytes=even["bytes"]).apply(compressed, original=subject)
    assert report["ranks"] == {"blocks.1.q_proj": 8}


def compressed_in_every_way(tiny, layers=2):
    subject = tiny(layers=layers)
    pruned, _ = Width(2, 4, length=24).apply(subject)
    return subject, {
        "pruned": pruned,
        "rounded": Rtn(bits=3, group=16).apply(subject)[0],
        "both": Gptq(bits=4, group=16, length=24).apply(pruned)[0],
    }


@pytest.mark.parametrize("inputs", ["original", "compressed"])
def test_it_mends_any_compression_and_more_with_more_rank(tiny, inputs):
    subject, kinds = compressed_in_every_way(tiny)
    with torch.inference_mode():
        logits = subject.model(IDS).logits
        for kind, compressed in kinds.items():
            before = compressed.fingerprint
            distance = [(compressed.model(IDS).logits - logits).norm()]
            for rank in (4, 16, 32):
                corrected, report = Eora(rank=rank, inputs=inputs).apply(compressed, original=subject)
                distance.append((corrected.model(IDS).logits - logits).norm())
                for i in range(2):
                    for name, module in corrected.linears(i).items():
                        assert isinstance(module, Adapted) and module.rank == min(rank, *module.lora_B.shape[:1], 32)
                        assert isinstance(module.base, torch.nn.Linear if kind == "pruned" else QuantisedLinear)
                        assert torch.equal(
                            module.weight, compressed.linears(i)[name].weight
                        )  # mask and grid are as they were
            assert distance == sorted(distance, reverse=True), (kind, distance)
            assert distance[-1] < 1e-2 * distance[0], kind  # full rank: the original again
            assert compressed.fingerprint == before
            assert all(after <= first for first, after in report["relative_errors"].values())


def test_the_report_foretells_the_errors(tiny):
    subject, kinds = compressed_in_every_way(tiny)
    corrected, report = Eora(rank=4, inputs="original").apply(kinds["rounded"], original=subject)
    found = layer_errors(subject, {"before": kinds["rounded"], "after": corrected}, IDS)
    for i in range(2):
        for name in LINEARS:
            before, after = report["relative_errors"][f"blocks.{i}.{name}"]
            assert abs(found["before"][i, name] - before) < 1e-4
            assert abs(found["after"][i, name] - after) < 1e-3
    assert report["ranks"]["blocks.0.k_proj"] == 4
    assert report["bytes"] == 2 * 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))


def test_inputs_are_those_asked_for(tiny):
    """In the second block the two models' inputs differ, so each choice is the best by its own measure."""
    subject = tiny(layers=2)
    compressed, _ = Rtn(bits=2, group=16).apply(subject)
    made = {
        kind: Eora(rank=3, inputs=kind).apply(compressed, original=subject)[0] for kind in ("original", "compressed")
    }
    inputs = {}
    for kind, model in (("original", subject), ("compressed", compressed)):
        handle = model.linears(1)["down_proj"].register_forward_pre_hook(
            lambda _m, args, kind=kind: inputs.update({kind: args[0]})
        )
        with torch.inference_mode():
            model.model(IDS)
        handle.remove()
    for seen in inputs:
        old = subject.linears(1)["down_proj"].weight
        error = {
            kind: (inputs[seen] @ (old - effective_weight(s.linears(1)["down_proj"])).T).norm()
            for kind, s in made.items()
        }
        assert min(error, key=error.get) == seen
    assert Eora().inputs == "compressed"


def test_ranks_by_pattern_and_chosen_projections(tiny):
    subject, kinds = compressed_in_every_way(tiny)
    corrected, _ = Eora(rank=2, ranks={"down_proj": 5, "blocks.1.*": 3}, linears=["down_proj", "q_proj"]).apply(
        kinds["rounded"], original=subject
    )
    found = {(i, n): m.rank for i in range(2) for n, m in corrected.linears(i).items() if isinstance(m, Adapted)}
    assert found == {(0, "q_proj"): 2, (0, "down_proj"): 5, (1, "q_proj"): 3, (1, "down_proj"): 3}


def test_what_was_not_compressed_gets_no_correction(tiny):
    subject = tiny(layers=2)
    compressed, _ = Rtn(group=16, linears="blocks.1.*").apply(subject)
    corrected, report = Eora(rank=2).apply(compressed, original=subject)
    assert not any(isinstance(m, Adapted) for m in corrected.linears(0).values())
    assert len(report["ranks"]) == 7
    with pytest.raises(
        BadInput, match="the original's weights equal the compressed subject's: eora has nothing to correct"
    ):
        Eora(rank=2).apply(subject, original=subject)


def test_a_correction_from_training_stays_and_is_not_corrected_away(tiny):
    subject = tiny(layers=1)
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator)
    replace(subject.blocks[0], "q_proj", adapt(subject.linears(0)["q_proj"], A, B))
    compressed, _ = Rtn(bits=3, group=16).apply(subject)
    corrected, _ = Eora(rank=32).apply(compressed, original=subject)
    module = corrected.linears(0)["q_proj"]
    assert module.rank == 34 and torch.equal(module.lora_A[:2], A)
    assert torch.allclose(effective_weight(module), effective_weight(subject.linears(0)["q_proj"]), atol=1e-4)


def test_it_is_a_peft_adapter_with_alpha_equal_to_rank(tiny, tmp_path):
    peft = pytest.importorskip("peft")
    from thesislib.formats.artifact import save_artifact
    from thesislib.formats.load import load_subject

    subject, kinds = compressed_in_every_way(tiny)
    corrected, _ = Eora(rank=4, ranks={"down_proj": 6}).apply(kinds["pruned"], original=subject)
    folder = save_artifact(corrected, tmp_path / "artifact")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4
    base = load_subject(save_checkpoint(kinds["pruned"], tmp_path / "base"))
    with torch.inference_mode():
        expected = corrected.model(IDS).logits
        adapted = peft.PeftModel.from_pretrained(base.model, folder / "adapter")
        assert torch.allclose(adapted(IDS).logits, expected, atol=1e-4)


def test_without_inputs_it_is_the_plain_svd_and_reads_no_text(tiny, monkeypatch):
    subject, kinds = compressed_in_every_way(tiny)

    def unread(*_args, **_kwargs):
        raise AssertionError("a text was read")

    monkeypatch.setattr("thesislib.compress.stage.calibration_windows", unread)
    monkeypatch.setattr("thesislib.compress.eora.stream", unread)
    for compressed in kinds.values():
        made, report = Eora(rank=5, inputs="none").apply(compressed, original=subject)
        for i in range(2):
            for name, module in made.linears(i).items():
                old = subject.linears(i)[name].weight.double()
                missing = old - compressed.linears(i)[name].weight.double()
                u, s, v = torch.linalg.svd(missing, full_matrices=False)
                torch.testing.assert_close(
                    (module.lora_B @ module.lora_A).double(), (u[:, :5] * s[:5]) @ v[:5], rtol=0, atol=1e-5
                )
                errors = [float(s[r:].norm() / old.norm()) for r in (0, 5)]
                assert report["relative_errors"][f"blocks.{i}.{name}"] == pytest.approx(errors, abs=1e-5)
    with pytest.raises(AssertionError, match="a text was read"):
        Eora(rank=5).apply(kinds["rounded"], original=subject)


def test_without_inputs_a_budget_goes_by_the_weights_own_errors(tiny):
    subject = tiny(layers=2)
    compressed, _ = Rtn(bits=2, group=16, linears="blocks.1.*").apply(subject)
    _, report = Eora(bytes=2000, inputs="none").apply(compressed, original=subject)
    assert report["bytes"] <= 2000 and {n for n, rank in report["ranks"].items() if rank} <= {
        f"blocks.1.{n}" for n in LINEARS
    }
    gains, costs = {}, {}
    for name, module in subject.linears(1).items():
        s = torch.linalg.svdvals(module.weight - compressed.linears(1)[name].weight)
        gains[name] = (s.square() / module.weight.square().sum()).tolist()[:4]  # four times the even share
        costs[name] = 2 * sum(module.weight.shape)
    assert share_out(gains, costs, 2000) == {n: report["ranks"][f"blocks.1.{n}"] for n in LINEARS}


def test_the_labels_and_identity_of_recorded_corrections_stay():
    assert Eora(inputs="none").label == "E" and Eora(inputs="none").in_words == "a low-rank correction by plain SVD"
    assert as_entry(Eora()) == {
        "eora": {
            "rank": 32, "ranks": None, "bytes": None, "inputs": "compressed", "linears": ("*",), "text": "c4",
            "windows": 32, "length": 512, "seed": 0, "weighting": "equal",
        }
    }  # fmt: skip


@pytest.mark.parametrize("inputs", ["original", "compressed", "none"])
def test_the_start_of_a_trainable_adapter(tiny, inputs):
    subject = tiny(layers=3)
    compressed, _ = Rtn(bits=2, group=16, linears=["blocks.1.*", "blocks.2.*"]).apply(subject)
    factors = start(compressed, subject, IDS, rank=20, linears=["q_proj", "k_proj"], inputs=inputs)
    assert set(factors) == {(i, n) for i in range(3) for n in ("q_proj", "k_proj")}
    expected, _ = Eora(rank=20, inputs=inputs).apply(compressed, original=subject)
    for (i, name), (A, B) in factors.items():
        module = compressed.linears(i)[name]
        assert A.shape == (20, 32) and B.shape == (module.out_features, 20)
        assert A.any(1).all()  # no direction without a gradient for B
        if i == 0:  # not compressed: as LoRA begins
            assert not B.any()
        else:
            one = expected.linears(i)[name]
            assert torch.allclose(B @ A, one.lora_B @ one.lora_A, atol=1e-6)
    assert not factors[1, "k_proj"][1][:, 16:].any()  # k has 16 rows, and no more directions


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank 0: expected a whole number of at least 1, e.g. 32"),
        ({"ranks": {"q_proj": 1.5}}, "rank 1.5: expected a whole number of at least 1"),
        ({"ranks": {"q_prj": 1}}, "unknown projection or pattern 'q_prj': did you mean 'q_proj'?"),
        ({"rank": 4, "bytes": 100}, "eora takes either rank and ranks, or bytes"),
        ({"bytes": 0}, "bytes is 0: expected a budget of at least 1 byte"),
        ({"inputs": "both"}, "unknown inputs 'both': expected one of original, compressed, none"),
        ({"inputs": "none", "weighting": "unit_norm"}, "weighting unit_norm does nothing here: with inputs none"),
        ({"weighting": "unit"}, "token weighting 'unit' is not known"),
        ({"length": 1}, "eora needs at least 1 calibration window of at least 2 tokens"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(BadInput) as error:
        Eora(**settings)
    assert message in str(error.value)


def test_bad_originals(tiny):
    subject, kinds = compressed_in_every_way(tiny)
    with pytest.raises(BadInput, match="eora corrects the difference to the original weights and needs them at hand"):
        Eora().apply(kinds["rounded"])
    with pytest.raises(BadInput, match="the original has 3 blocks and the compressed subject 2"):
        Eora().apply(kinds["rounded"], original=tiny(layers=3))
    with pytest.raises(BadInput, match="block 0 has projections"):
        Eora().apply(kinds["rounded"], original=tiny(layers=2, intermediate_size=96))
    with pytest.raises(BadInput, match="a budget of 10 bytes buys no correction: the cheapest takes 96"):
        Eora(bytes=10).apply(kinds["rounded"], original=subject)


def test_its_place_in_a_recipe():
    assert Eora().label == "E" and Eora.needs_original and Eora().rank == 32
    Eora().after([Width(2, 4), Gptq()])
    Eora().after([Width(2, 4)])
    with pytest.raises(
        BadInput, match="eora at the beginning has nothing to correct: expected width, rtn or gptq right before it"
    ):
        Eora().after([])
    with pytest.raises(BadInput, match="eora after E has nothing to correct"):
        Eora().after([Gptq(), Eora()])
