"""GPTQ against a reference that eliminates one input after the other, and what it must keep."""

import warnings

import numpy as np
import pytest
import torch

from thesislib.compress.calibration import stream
from thesislib.compress.gptq import ORDERS, Gptq, Quantise, Rtn, gptq, inverse_factor
from thesislib.compress.layerwise import layer_errors, relative_error
from thesislib.compress.width import Width, least_of_each
from thesislib.errors import BadInput
from thesislib.formats.load import save_checkpoint
from thesislib.model.blocks import apply_plan
from thesislib.model.grid import BITS, Grid, round_to_nearest
from thesislib.model.layers import LINEARS, Adapted, adapt, replace
from thesislib.model.packing import THESIS_PATTERNS
from thesislib.model.quantised import QuantisedLinear, is_quantised

IDS = torch.randint(0, 250, (6, 24), generator=torch.Generator().manual_seed(1))
SMALL = {"group": 16, "length": 24}  # settings that a tiny model can take


@pytest.fixture(autouse=True)
def calibrated(monkeypatch):
    monkeypatch.setattr("thesislib.compress.stage.calibration_windows", lambda *a: IDS)


def problem(rows=24, columns=96, tokens=400, seed=0):
    """A weight and X^T X of correlated inputs, some much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x *= torch.exp(torch.randn(columns, generator=generator))
    return torch.randn(rows, columns, generator=generator), x.T @ x


def gptq_by_elimination(w, h, bits, group, act_order="none", damping=0.01, pruned=None, stale=0):
    """OBQ with a fixed order in float64 numpy: after each column its row and column leave the inverse by a Gaussian
    step. Symmetric, no clipping. `stale` reads grids from weights as they were at the last multiple of that many
    columns."""
    w, h = w.double().numpy().copy(), h.double().numpy()
    columns = w.shape[1]
    before, top = w.copy(), 2 ** (bits - 1)
    order = np.argsort(-np.diag(h), kind="stable") if act_order != "none" else np.arange(columns)
    if act_order == "groups":
        top_of = np.diag(h).reshape(-1, group).max(1)
        order = sorted(range(columns), key=lambda j: (-top_of[j // group], -h[j, j]))
    inverse = np.linalg.inv(h + damping * np.diag(h).mean() * np.eye(columns))
    result, scale = np.zeros_like(w), None
    snapshot = w.copy()
    for at, j in enumerate(order):
        if stale and at % stale == 0:
            snapshot = w.copy()
        if act_order == "static":
            members, source = range(j // group * group, j // group * group + group), before
        else:
            members, source = order[at // group * group : at // group * group + group], snapshot if stale else w
        if act_order == "static" or at % group == 0:
            seen = source[:, members] * (1 if pruned is None else ~pruned[:, members])
            scale = (2 * np.abs(seen).max(1) / (2**bits - 1)).astype(np.float16).astype(float)
        q = np.clip(np.rint(w[:, j] / scale), -top, top - 1) * scale
        if pruned is not None:
            q[pruned[:, j]] = 0
        result[:, j] = q
        w -= np.outer((w[:, j] - q) / inverse[j, j], inverse[j])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, :] = inverse[:, j] = 0
    return torch.from_numpy(result).float()


def check_same(a, b, share=0.995):
    """A tie may fall either way, and what follows in its row with it; a wrong formula changes most of them."""
    assert ((a - b).abs() < 1e-4).float().mean() > share


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (3, 16), (2, 96), (4, "row"), (8, 48), (5, 32), (6, 16), (7, 32)])
def test_it_is_the_papers(act_order, bits, group):
    w, h = problem()
    q, damping = gptq(w, h, Grid(bits, group), act_order=act_order)
    check_same(q.weight, gptq_by_elimination(w, h, bits, 96 if group == "row" else group, act_order))
    assert damping == 0.01
    assert (q.index is None) == (act_order != "index")


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize("group", [32, 64, 192, "row"])
def test_blocks_change_nothing_but_the_speed(act_order, group):
    w, h = problem(columns=192)
    results = [gptq(w, h, Grid(4, group), act_order=act_order, block=block)[0].weight for block in (1, 33, 128, 1000)]
    for other in results[1:]:
        check_same(results[0], other)


def test_groups_inside_a_block_see_corrected_weights_unlike_the_papers_code():
    w, h = problem(columns=128)
    q, _ = gptq(w, h, Grid(4, 32))
    stale = gptq_by_elimination(w, h, 4, 32, stale=128)
    check_same(q.weight[:, :32], stale[:, :32])  # the first group has nothing to miss
    assert ((q.weight - stale)[:, 32:].abs() > 1e-4).float().mean() > 0.5
    errors = [relative_error(w - new, w, h) for new in (q.weight, stale)]
    assert errors[0] < errors[1]


def test_more_settings_than_the_reference_has():
    """Asymmetric grids and clipping use the grid's own, tested, code; here: they matter, and errors stay below
    rounding's."""
    w, h = problem()
    for kind in ("symmetric", "asymmetric", "minimum"):
        for clip in ("none", "squared", "weighted"):
            for act_order in ORDERS:
                grid = Grid(3, 32, kind)
                found = relative_error(w - gptq(w, h, grid, act_order=act_order, clip=clip)[0].weight, w, h)
                assert found < 0.9 * relative_error(w - round_to_nearest(w, grid, clip, h.diagonal()).weight, w, h), (
                    kind,
                    clip,
                    act_order,
                )


def test_damping_without_end_is_rounding():
    w, h = problem()
    for kind in ("symmetric", "asymmetric", "minimum"):
        for act_order in ("none", "groups", "static"):
            q, _ = gptq(w, h, Grid(4, 32, kind), act_order=act_order, damping=1e9, clip="squared")
            assert torch.equal(q.codes, round_to_nearest(w, Grid(4, 32, kind), "squared").codes)


def test_inputs_that_are_independent_make_it_rounding():
    w, _ = problem()
    for act_order in ORDERS:  # equal diagonals keep their order
        q, _ = gptq(w, 37 * torch.eye(96), Grid(4, 32), act_order=act_order, damping=0)
        assert torch.equal(q.weight, round_to_nearest(w, Grid(4, 32)).weight)


def test_the_size_of_the_statistics_does_not_matter():
    w, h = problem()
    h[:, 7] = h[7, :] = 0  # an input without any counts for nothing beside either
    a, b = (gptq(w, factor * h, Grid(4, 32), act_order="static")[0].codes for factor in (1, 2.0**-40))
    assert torch.equal(a, b)


@pytest.mark.parametrize(("remove", "of"), THESIS_PATTERNS)
@pytest.mark.parametrize("act_order", ORDERS)
def test_pruned_weights_stay_zero_and_their_error_moves_on(remove, of, act_order):
    w, h = problem()
    pruned = least_of_each(w.abs(), remove, of)
    w = w.masked_fill(pruned, 0)
    q, _ = gptq(w, h, Grid(3, 32), act_order=act_order)
    assert (q.weight[pruned] == 0).all()
    check_same(q.weight, gptq_by_elimination(w, h, 3, 32, act_order, pruned=pruned.numpy()), 0.99)
    if act_order != "groups" or of >= 2 * remove:  # with few weights left, that order is no better than rounding here
        rounding = relative_error(w - round_to_nearest(w, Grid(3, 32)).weight, w, h)
        assert relative_error(w - q.weight, w, h) < 0.96 * rounding


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_pruned_weights_stay_zero_on_both_grids_with_clipping(kind):
    w, h = problem()
    pruned = least_of_each(w.abs(), 2, 4)
    for bits in BITS:
        q, _ = gptq(w.masked_fill(pruned, 0), h, Grid(bits, 16, kind), clip="weighted", act_order="static")
        assert (q.weight[pruned] == 0).all()


def test_an_input_that_is_always_zero_is_rounded_and_touches_nothing():
    w, h = problem()
    h[:, 7] = h[7, :] = 0
    q, _ = gptq(w, h, Grid(4, 32), act_order="static")
    assert torch.equal(q.weight[:, 7], round_to_nearest(w, Grid(4, 32)).weight[:, 7])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it makes no matrix singular
        gptq(w, h, Grid(4, 32), damping=0)
    other = w.clone()
    other[:, 7] = w[:, 8]  # within the group's range, or the scale would move
    assert (gptq(other, h, Grid(4, 32), act_order="static")[0].codes == q.codes).float().mean() > 0.9


def test_the_factor_is_the_upper_cholesky_factor_of_the_inverse():
    _, h = problem()
    factor, _ = inverse_factor(h, 0.01)
    expected = torch.linalg.cholesky(
        (h.double() + 0.01 * h.diagonal().mean() * torch.eye(96, dtype=torch.float64)).inverse(), upper=True
    )
    assert torch.allclose(factor, expected.float(), rtol=1e-3, atol=1e-6 * expected.abs().max())


def test_damping_is_raised_and_said_when_cholesky_fails():
    w, _ = problem()
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(2))  # rank 4
    with pytest.warns(
        UserWarning, match=r"X\^T X of block 3's o_proj has no Cholesky factor at damping 0: raised to 0.0001"
    ):
        q, damping = gptq(w, x.T @ x - 1e-5 * torch.eye(96), Grid(4, 32), damping=0, where="block 3's o_proj")
    assert damping == 1e-4
    assert torch.isfinite(q.weight).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # and nothing is said when it does not
        gptq(w, x.T @ x, Grid(4, 32), damping=0.01)


def test_statistics_that_say_nothing():
    w, h = problem()
    with pytest.raises(
        BadInput,
        match="block 1's q_proj saw no tokens: all its inputs are zero on the calibration text; leave it out with "
        "'linears'",
    ):
        gptq(w, torch.zeros_like(h), Grid(4, 32), where="block 1's q_proj")
    h[3, 5] = torch.nan
    with pytest.raises(BadInput, match="the statistics of block 1's q_proj are not finite"):
        gptq(w, h, Grid(4, 32), where="block 1's q_proj")


# ---------------------------------------------------------------- the stages


def gptq_by_hooks(subject, groups, bits, group, weigh=lambda x: x):
    """True-sequential GPTQ on the whole model: a forward of all of it before every group, then the reference above."""
    for i in range(subject.depth):
        for names in groups:
            inputs, handles = {}, []
            for name in names:
                handles.append(
                    subject.linears(i)[name].register_forward_pre_hook(
                        lambda _m, args, to=inputs, name=name: to.update({name: weigh(args[0])})
                    )
                )
            with torch.no_grad():
                subject.model(IDS, use_cache=False)
            for handle in handles:
                handle.remove()
            for name in names:
                linear, x = subject.linears(i)[name], inputs[name].flatten(0, 1)
                linear.weight.data = gptq_by_elimination(linear.weight.data, x.T @ x, bits, group, "static")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("sequential", [True, False])
def test_the_stage_goes_through_the_model_in_the_papers_order(tiny, kind, sequential):
    subject, reference = tiny(kind, layers=2), tiny(kind, layers=2)
    result, report = Gptq(**SMALL, clip="none", sequential=sequential, weighting="equal").apply(subject)
    gptq_by_hooks(
        reference,
        (("k_proj", "v_proj", "q_proj"), ("o_proj",), ("up_proj", "gate_proj"), ("down_proj",))
        if sequential
        else (LINEARS,),
        4,
        16,
    )
    for i in range(2):
        for name, linear in reference.linears(i).items():
            check_same(result.linears(i)[name].weight, linear.weight, 0.98)
            assert isinstance(result.linears(i)[name], QuantisedLinear)
            assert not is_quantised(subject.linears(i)[name])
    assert subject.fingerprint == tiny(kind, layers=2).fingerprint  # the given one is as it was
    assert report["linears"] == 14


def test_unit_norm_and_the_first_token_counted_often_are_what_they_say(tiny):
    def unit(x):
        return x / x.norm(dim=-1, keepdim=True)

    def first(x):
        return torch.cat([4.0 * x[:, :1], x[:, 1:]], 1)  # 16 times in the sum of squares

    for weighting, weigh in (("unit_norm", unit), ("first_16", first), ("skip_2", lambda x: x[:, 2:])):
        reference = tiny(layers=1)
        gptq_by_hooks(reference, (LINEARS,), 4, 16, weigh)
        result, _ = Gptq(**SMALL, clip="none", sequential=False, weighting=weighting).apply(tiny(layers=1))
        for name, linear in reference.linears(0).items():
            check_same(result.linears(0)[name].weight, linear.weight, 0.98)


def test_the_stage_hands_its_settings_on(tiny):
    subject = tiny(layers=1)
    with torch.no_grad():
        x = subject.blocks[0].input_layernorm(subject.model.model.embed_tokens(IDS)).flatten(0, 1)
    w = subject.linears(0)["q_proj"].weight
    results = []
    for own in (
        {},
        {"clip": "none"},
        {"clip": "weighted"},
        {"damping": 1.0},
        {"act_order": "index"},
        {"grid": "asymmetric"},
        {"bits": 3},
        {"group": 8},
    ):
        stage = Gptq(**{**SMALL, **own}, weighting="equal", linears="q_proj")
        expected, _ = gptq(w, x.T @ x, stage.levels, act_order=stage.act_order, damping=stage.damping, clip=stage.clip)
        results.append(stage.apply(subject)[0].linears(0)["q_proj"].weight)
        check_same(results[-1], expected.weight)
    assert all(
        (a != b).float().mean() > 0.02 for i, a in enumerate(results) for b in results[:i]
    )  # and each makes a difference


def test_it_beats_rounding_on_every_kind_of_projection(tiny):
    subject = tiny(layers=3)
    rounded, _ = Rtn(bits=3, group=16).apply(subject)
    result, report = Gptq(bits=3, **SMALL, weighting="equal").apply(subject)
    errors = layer_errors(subject, {"rounding": rounded, "GPTQ": result}, IDS)
    for name in LINEARS:
        mine, theirs = (sum(e for (_, n), e in errors[kind].items() if n == name) for kind in ("GPTQ", "rounding"))
        assert mine < theirs, name
    # the first block's inputs are the same in both models, so the report's errors are these
    assert abs(report["relative_errors"]["blocks.0.q_proj"] - errors["GPTQ"][0, "q_proj"]) < 1e-4


def test_layer_errors_are_those_of_the_outputs(tiny):
    subject = tiny(layers=2)
    result, _ = Rtn(bits=2, group=16).apply(subject)
    found = layer_errors(subject, {"R": result}, IDS)["R"]
    inputs = {}
    handle = subject.linears(1)["down_proj"].register_forward_pre_hook(lambda _m, args: inputs.update(x=args[0]))
    with torch.no_grad():
        subject.model(IDS, use_cache=False)
    handle.remove()
    old, new = (s.linears(1)["down_proj"].weight for s in (subject, result))
    expected = (inputs["x"] @ (old - new).T).norm() / (inputs["x"] @ old.T).norm()
    assert abs(found[1, "down_proj"] - expected) < 1e-4
    assert set(found) == {(i, n) for i in range(2) for n in LINEARS}
    with pytest.raises(
        BadInput, match="the original has 3 blocks and the compressed subject 2: compare what differs by weights only"
    ):
        layer_errors(tiny(layers=3), {"R": result}, IDS)


@pytest.mark.parametrize(
    "stage", [Rtn(group=16, embedding_bits=8), Gptq(**SMALL, bits=3, grid="asymmetric", act_order="index")]
)
def test_what_is_computed_with_is_what_is_stored(tiny, stage, tmp_path):
    from thesislib.formats.load import load_subject

    result, _ = stage.apply(tiny(layers=2))
    state = result.model.state_dict()
    assert set(state) == set(tiny(layers=2).model.state_dict())
    with torch.inference_mode():
        logits = result.model(IDS).logits
        assert torch.allclose(
            load_subject(save_checkpoint(result, tmp_path / "plain")).model(IDS).logits, logits, atol=1e-5
        )
        assert torch.equal(result.copy().model(IDS).logits, logits)
    for i in range(2):
        for name, module in result.linears(i).items():
            again = QuantisedLinear(
                module.encoding, (module.out_features, module.in_features), module.bias, **module.stored
            )
            assert torch.equal(again.weight, module.weight)
            assert isinstance(result.copy().linears(i)[name], torch.nn.Linear)


def test_bfloat16_rounds_once_more_but_stores_the_same(tiny):
    from dataclasses import replace as with_other

    subject = tiny(layers=1)
    result, _ = Rtn(group=16).apply(subject)
    half = with_other(result, model=result.model.to(torch.bfloat16))
    for name, module in half.linears(0).items():
        exact = round_to_nearest(subject.linears(0)[name].weight, Grid(4, 16), "squared").weight
        assert torch.equal(module.quantised.weight, exact), name  # .to() did not round the scales
        assert torch.equal(module.weight, exact.bfloat16())
    assert half.model(IDS).logits.dtype == torch.bfloat16
    # a model in bfloat16 quantises its bfloat16 weights, and what it computes with lies on the stored grid
    stored, _ = Gptq(**SMALL).apply(with_other(subject, model=tiny(layers=1).model.to(torch.bfloat16)))
    assert torch.equal(stored.linears(0)["q_proj"].weight, stored.linears(0)["q_proj"].quantised.weight.bfloat16())


@pytest.mark.parametrize("pattern", ["1:8", "2:4", "8:16"])
@pytest.mark.parametrize("stage", [Rtn(group=16), Gptq(**SMALL), Gptq(**SMALL, grid="asymmetric", act_order="index")])
def test_masks_survive_the_stages(tiny, pattern, stage):
    pruned, _ = Width(*map(int, pattern.split(":")), length=24).apply(tiny(layers=2))
    result, _ = stage.apply(pruned)
    for i in range(2):
        for name, linear in pruned.linears(i).items():
            module = result.linears(i)[name]
            assert (module.weight[linear.weight == 0] == 0).all()
            assert module.mask == pattern
            assert module.weight.count_nonzero() > 0.5 * linear.weight.count_nonzero()


def test_adapters_stay_around_what_is_quantised(tiny):
    subject = tiny(layers=2)
    linear = subject.linears(0)["q_proj"]
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator)
    replace(subject.blocks[0], "q_proj", adapt(linear, A, B))
    for stage in (Gptq(**SMALL), Rtn(group=16)):
        result, _ = stage.apply(subject)
        module = result.linears(0)["q_proj"]
        assert isinstance(module, Adapted) and isinstance(module.base, QuantisedLinear)
        assert torch.equal(module.lora_A, A) and torch.equal(module.lora_B, B)
        with pytest.raises(BadInput, match="block 0's q_proj is quantised already"):
            stage.apply(result)


def test_only_chosen_projections_change(tiny):
    subject = tiny(layers=2)
    for stage in (
        Rtn(group=16, linears=["blocks.1.*", "down_proj"]),
        Gptq(**SMALL, linears=["blocks.1.*", "down_proj"]),
    ):
        result, report = stage.apply(subject)
        quantised = {(i, n) for i in range(2) for n in LINEARS if is_quantised(result.linears(i)[n])}
        assert quantised == {(1, n) for n in LINEARS} | {(0, "down_proj")}
        assert report["linears"] == 8
        assert torch.equal(result.linears(0)["q_proj"].weight, subject.linears(0)["q_proj"].weight)
        assert torch.equal(result.model.model.embed_tokens.weight, subject.model.model.embed_tokens.weight)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("grid", ["symmetric", "asymmetric", "minimum"])
def test_embedding_and_head_in_8_bits(tiny, tied, grid, tmp_path):
    subject = tiny(layers=1, tie_word_embeddings=tied)
    result, _ = Rtn(group=16, grid=grid, embedding_bits=8).apply(subject)
    embedding, head = result.model.get_input_embeddings(), result.model.get_output_embeddings()
    expected = round_to_nearest(subject.model.model.embed_tokens.weight, Grid(8, 16, grid)).weight
    assert torch.equal(embedding(IDS), expected[IDS])
    assert torch.equal(embedding.weight, expected)
    assert 0 < (expected - subject.model.model.embed_tokens.weight).abs().max() < 0.01
    assert (embedding.table is head) == tied
    assert torch.equal(head.weight, round_to_nearest(subject.model.lm_head.weight, Grid(8, 16, grid)).weight)
    ids = result.model.generate(IDS[:1], max_new_tokens=4, do_sample=False)
    assert ids.shape == (1, 28)
    with pytest.raises(BadInput, match="the embedding is quantised already"):
        Rtn(linears="q_proj", group=16, embedding_bits=8).apply(
            Rtn(linears="k_proj", group=16, embedding_bits=8).apply(subject)[0]
        )


def test_a_plan_that_repeats_blocks_goes_on_sharing(tiny):
    repeated = apply_plan(tiny(layers=2), (0, 1, 1))
    result, report = Rtn(group=16).apply(repeated)
    for name in LINEARS:
        assert result.linears(1)[name] is result.linears(2)[name]
    assert report["linears"] == 14
    with pytest.raises(BadInput, match="a plan that runs a block twice cannot be calibrated"):
        Gptq(**SMALL).apply(repeated)


def test_streamed_blocks_get_the_same_weights(tiny):
    stage, subject = Gptq(**SMALL), tiny(layers=2)
    result, _ = stage.apply(subject)
    streamed = tiny(layers=2)
    report = stage.stream_weights(streamed, IDS)
    for i in range(2):
        for name in LINEARS:
            assert torch.equal(streamed.linears(i)[name].weight, result.linears(i)[name].weight)
    assert len(report["relative_errors"]) == 14


def test_the_report_counts_what_is_held(tiny):
    subject = tiny(layers=1)
    result, report = Rtn(bits=3, group=32, linears="down_proj").apply(subject)
    # 32 x 64 weights of 3 bits, and 2 float16 scales in each of 32 rows
    assert report == {"linears": 1, "bytes": 32 * 64 * 3 // 8 + 2 * 64, "bits_per_weight": 3.5}
    assert sum(t.nbytes for t in result.linears(0)["down_proj"].stored.values()) == report["bytes"]


def test_raised_damping_is_reported(tiny):
    visitor = Quantise(Gptq(**SMALL, damping=0, weighting="equal"))
    with pytest.warns(UserWarning, match="raised to"):
        stream(tiny(layers=1, intermediate_size=256), IDS[:1, :4], visitor)
    assert visitor.report()["damping_raised"]["block 0's down_proj"] >= 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 1}, "1 bits: 1 bit needs another method, expected 2, 3, 4, 5, 6, 7, 8"),
        ({"clip": "mse"}, "unknown clip 'mse'"),
        (
            {"act_order": "statik"},
            "unknown act_order 'statik': did you mean 'static'? expected one of none, groups, static, index",
        ),
        ({"damping": -0.1}, "damping is -0.1: expected a finite share of the mean diagonal, at least 0, e.g. 0.01"),
        ({"damping": float("inf")}, "damping is inf"),
        ({"embedding_bits": 4}, "embedding_bits is 4: expected 8, or nothing"),
        ({"weighting": "unit"}, "token weighting 'unit' is not known"),
        ({"windows": 0}, "gptq needs at least 1 calibration window of at least 2 tokens"),
        ({"linears": "q_prj"}, "unknown projection or pattern 'q_prj': did you mean 'q_proj'?"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(BadInput) as error:
        Gptq(**settings)
    assert message in str(error.value)


def test_bad_subjects(tiny):
    subject = tiny(layers=1)
    with pytest.raises(
        BadInput, match=r"group 64 does not divide the rows of q_proj \(32 inputs\): 8, 16, 32 divide all rows here"
    ):
        Gptq(length=24).apply(subject)
    Gptq(length=24, linears="down_proj").apply(subject)  # whose rows it does divide
    pruned, _ = Width(2, 4, length=24).apply(subject)
    with pytest.raises(
        BadInput,
        match="grid 'minimum' has no exact zero, and 50% of block 0's q_proj are zeros: use symmetric or asymmetric",
    ):
        Rtn(group=16, grid="minimum").apply(pruned)
    with pytest.raises(
        BadInput,
        match=r"block 0's q_proj is quantised already \(int4/symmetric/16/all\): start from the subject before that",
    ):
        Gptq(**SMALL).apply(Rtn(group=16).apply(subject)[0])
    subject.linears(0)["v_proj"].weight.data.zero_()
    with pytest.raises(BadInput, match="block 0's o_proj saw no tokens"):
        Gptq(**SMALL).apply(subject)
    with pytest.raises(BadInput, match="unknown clip 'weighted': expected one of none, squared"):
        Rtn(clip="weighted")


def test_labels_and_recipes():
    from thesislib.pipeline.recipe import Shape

    assert [Gptq().label, Gptq(bits=3).label, Rtn().label, Rtn(bits=8).label] == ["Q", "Q3", "R", "R8"]
    assert Gptq.from_label("Q2") == Gptq(bits=2) and Rtn.from_label("R") == Rtn() and Rtn.from_label("R5") == Rtn(5)
    assert Gptq.from_label("Q4") is None and Gptq.from_label("R") is None and Rtn.from_label("Q") is None
    assert Gptq.from_label("Q9") is None and Gptq.from_label("Q1") is None
    with pytest.raises(BadInput, match="Q after R3 would quantise a quantised subject: keep one of the two"):
        Gptq().after([Rtn(bits=3)])
    shape = Shape(30, {"q_proj": 576, "down_proj": 1536})
    Gptq().after([Width(2, 4)], shape)
    with pytest.raises(
        BadInput,
        match=r"group 128 does not divide the rows of q_proj \(576 inputs\): 8, 12, 16, 24, 32, 48, 64, 96, 192 divide",
    ):
        Gptq(group=128).after([], shape)
    Gptq(group=128, linears="down_proj").after([], shape)
