"""Low rank as a stage: its methods against a few lines in float64 and against each other, allocations, sizes, and what
may come before and after it."""

import json
import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from thesislib.compress.allocation import by_effective_rank, by_loss
from thesislib.compress.calibration import ALL_AT_ONCE, INPUTS, Statistics, Visitor, stream
from thesislib.compress.depth import Depth
from thesislib.compress.eora import Eora
from thesislib.compress.factor import effective_rank, nested, towards, whitening
from thesislib.compress.gptq import Gptq, Rtn
from thesislib.compress.gradients import fisher_rows
from thesislib.compress.hqq import Hqq
from thesislib.compress.laco import Laco
from thesislib.compress.lora.stage import Lora
from thesislib.compress.lowrank import METHODS, LowRankStage, factorised, metric_of, metrics_of
from thesislib.compress.scope import blocks_of, mlp_turns
from thesislib.compress.width import Width
from thesislib.errors import BadInput
from thesislib.experiment import Prepared
from thesislib.formats.artifact import load_artifact, save_artifact
from thesislib.formats.artifact_json import RECORD, checksum, read_artifact
from thesislib.formats.gguf import export_gguf
from thesislib.formats.gptq import export_gptq
from thesislib.formats.load import load_subject, save_checkpoint
from thesislib.formats.sizes import predicted_disk_bytes, sizes
from thesislib.model.blocks import apply_plan
from thesislib.model.layers import LINEARS, Adapted, base_of
from thesislib.model.lowrank import LowRank, is_lowrank
from thesislib.model.quantised import QuantisedLinear
from thesislib.pipeline.label import Label
from thesislib.pipeline.recipe import Recipe, parse_label
from thesislib.pipeline.run import Job, compress

IDS = torch.randint(0, 250, (8, 24), generator=torch.Generator().manual_seed(1))
FEEDS_OF = {"saes": "both"}
TRAINING = {
    "rank": 4, "length": 32, "batch": 2, "accumulate": 1, "steps": 2, "every": 2, "validation": 0, "autocast": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def calibrated(monkeypatch, tmp_path):
    monkeypatch.setattr("thesislib.compress.stage.calibration_windows", lambda *a: IDS)
    monkeypatch.setenv("THESISLIB_CACHE", str(tmp_path / "cache"))


def low(method="svd_llm", **more):
    return LowRankStage(method=method, **({"feed": FEEDS_OF.get(method, "original"), "length": 24} | more))


def weights(subject):
    return {(b, n): m.weight.double() for b in range(subject.depth) for n, m in subject.linears(b).items()}


def close(a, b, part=1e-4):
    return float((a.double() - b.double()).norm()) <= part * float(b.double().norm())


def inputs_of(subject, feed="original"):
    """{(block, group): (T, D) float64}, the inputs of projections, by hooks on the whole model."""
    seen = {}

    def note(key):
        return lambda _module, args: seen.__setitem__(key, args[0].double().flatten(0, 1))

    hooks = [
        m.register_forward_pre_hook(note((b, INPUTS[n])))
        for b in range(subject.depth)
        for n, m in subject.linears(b).items()
    ]
    with torch.no_grad():
        subject.model(IDS)
    for hook in hooks:
        hook.remove()
    return seen


def truncated_svd(m, rank):
    u, s, v = torch.linalg.svd(m, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def root_of(x):
    return torch.linalg.cholesky(x.T @ x)


# ---------------------------------------------------------------- methods


@pytest.mark.parametrize("method", METHODS)
def test_full_rank_is_the_dense_model(tiny, method):
    subject = tiny(layers=2)
    made, report = low(method, rank=64, force=True).apply(subject)
    with torch.no_grad():
        assert torch.allclose(made.model(IDS).logits, subject.model(IDS).logits, atol=1e-3)
    before = weights(subject)
    assert all(close(w, before[key]) for key, w in weights(made).items())
    assert all(is_lowrank(m) for b in range(2) for m in made.linears(b).values())
    assert max(report["relative_errors"].values()) < 1e-3 and report["linears"] == 14


def by_hand(method, w, x, rank, *, alpha=0.5, whitened=0.95):
    """The pair's product by a few lines: x (T, D) in float64."""
    if method == "svd":
        return truncated_svd(w, rank)
    if method == "asvd":
        s = x.abs().mean(0) ** alpha
        return truncated_svd(w * s, rank) / s
    root = root_of(x)
    if method == "svd_llm":
        return truncated_svd(w @ root, rank) @ root.inverse()
    first = round(whitened * rank)
    one = truncated_svd(w @ root, first) @ root.inverse()
    return one + truncated_svd(w - one, rank - first)


@pytest.mark.parametrize("method", ["svd", "asvd", "svd_llm", "nsvd"])
def test_each_method_by_a_few_lines(tiny, method):
    subject = tiny(layers=3)
    made, report = low(method, rank=6, whitened=0.5).apply(subject)
    x = inputs_of(subject)
    for (b, name), w in weights(subject).items():
        expected = by_hand(method, w, x[b, INPUTS[name]], 6, whitened=0.5)
        assert close(made.linears(b)[name].weight, expected, 1e-3), (b, name)
        assert report["ranks"][f"blocks.{b}.{name}"] == made.linears(b)[name].rank == 6
        missed = {"svd": w - expected, "asvd": (w - expected) * x[b, INPUTS[name]].abs().mean(0) ** 0.5}
        whole = {"svd": w, "asvd": w * x[b, INPUTS[name]].abs().mean(0) ** 0.5}
        root = root_of(x[b, INPUTS[name]])
        error = missed.get(method, (w - expected) @ root).norm() / whole.get(method, w @ root).norm()
        assert math.isclose(report["relative_errors"][f"blocks.{b}.{name}"], float(error), abs_tol=1e-4)


def test_the_compressed_feed_sees_the_compressed_model(tiny):
    subject = tiny(layers=3)
    made, _ = low(rank=6, feed="compressed").apply(subject)
    x, dense = inputs_of(made), inputs_of(subject)
    before = weights(subject)
    for (b, name), w in before.items():
        if INPUTS[name] == "attention":  # what comes before in its own block changes with it
            assert close(made.linears(b)[name].weight, by_hand("svd_llm", w, x[b, "attention"], 6), 2e-3)
    key = (2, "q_proj")
    assert not close(made.linears(2)["q_proj"].weight, by_hand("svd_llm", before[key], dense[2, "attention"], 6), 1e-2)


def test_asvd_without_sizes_is_plain_and_nsvd_has_both_ends(tiny):
    subject = tiny(layers=2)
    pairs = [
        (low("asvd", rank=6, alpha=0), low("svd", rank=6)),
        (low("nsvd", rank=6, whitened=0), low("svd", rank=6)),
        (low("nsvd", rank=6, whitened=1), low("svd_llm", rank=6)),
    ]
    for one, other in pairs:
        a, b = (weights(stage.apply(subject)[0]) for stage in (one, other))
        assert all(close(a[key], b[key]) for key in a), one.label


def test_nested_parts_have_the_ranks_they_should():
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(24, 40, generator=generator), torch.randn(200, 40, generator=generator)
    x *= torch.exp(torch.randn(40, generator=generator))
    metric = whitening(x.T @ x)
    for whitened, first in ((0.95, 19), (0.5, 10), (0.01, 0), (0.99, 20)):
        pair = nested(w, 20, metric, whitened)
        assert pair.A.shape == (20, 40) and pair.B.shape == (24, 20)
        root = torch.linalg.cholesky((x.T @ x).double())
        one = truncated_svd(w.double() @ root, first) @ root.inverse() if first else torch.zeros(24, 40).double()
        assert close(pair.B @ pair.A, one + truncated_svd(w.double() - one, 20 - first), 1e-3), whitened


def test_svd_llm_leaves_the_least_error_of_all_on_its_own_text(tiny):
    subject = tiny(layers=2)
    x, before, errors = inputs_of(subject), weights(subject), {}
    for method in ("svd", "fwsvd", "asvd", "nsvd", "svd_llm"):
        made = weights(low(method, rank=6, whitened=0.5).apply(subject)[0])
        errors[method] = {k: float(((w - made[k]) @ x[k[0], INPUTS[k[1]]].T).norm()) for k, w in before.items()}
    for method in ("svd", "fwsvd", "asvd", "nsvd"):
        assert all(errors["svd_llm"][key] < e for key, e in errors[method].items()), method


def test_fwsvd_by_autograd(tiny):
    subject = tiny(layers=2)
    made, _ = low("fwsvd", rank=6).apply(subject)
    model = subject.copy().model
    squares = {}
    for ids in IDS:
        for block in model.model.layers:
            block.requires_grad_(True)
        model.zero_grad()
        model(ids[None], labels=ids[None]).loss.backward()
        for b, block in enumerate(model.model.layers):
            for name, p in block.named_parameters():
                if "_proj" in name:
                    key = b, name.split(".")[1]
                    squares[key] = squares.get(key, 0) + p.grad.double().square()
    for (b, name), w in weights(subject).items():
        row = squares[b, name].sum(1).sqrt()[:, None]
        assert close(made.linears(b)[name].weight, truncated_svd(row * w, 6) / row, 1e-3), (b, name)
    assert not any(p.requires_grad or p.grad is not None for p in subject.model.parameters())


def test_fisher_rows_of_a_broken_model(tiny):
    subject = tiny(layers=1)
    subject.linears(0)["q_proj"].weight[0, 0] = torch.nan
    with pytest.raises(BadInput, match="the gradients of blocks.0.q_proj are not finite, or all zero"):
        fisher_rows(subject, {(0, "q_proj"): subject.linears(0)["q_proj"]}, IDS)
    quantised, _ = Rtn(bits=8, group=16).apply(tiny(layers=1))
    with pytest.raises(BadInput, match="method fwsvd needs the gradients of blocks.0.q_proj, whose weight is computed"):
        low("fwsvd", rank=4).apply(quantised)


# ---------------------------------------------------------------- both feeds


def both(seed=0, tokens=400, drift=0.3):
    """A weight, compressed inputs x and original ones f (T, D), and their statistics."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 40, generator=generator) * torch.exp(0.5 * torch.randn(40, generator=generator))
    f = x + drift * torch.randn(tokens, 40, generator=generator)
    s = Statistics(x.square().sum(0), x.T @ x, float(tokens), None, f.T @ x)
    return torch.randn(24, 40, generator=generator).double(), x.double(), f.double(), s


@pytest.mark.parametrize("pull", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("ridge", [0.0, 0.1, 3.0])
def test_the_target_solves_the_normal_equations(pull, ridge):
    """With a ridge as further rows: as many tokens as inputs, each of one input, whose outputs stay W's."""
    w, x, f, s = both()
    goal = (1 - pull) * x + pull * f
    more = (ridge * x.square().sum(0).mean()).sqrt() * torch.eye(40)
    expected = torch.linalg.lstsq(torch.cat([x, more]), torch.cat([goal, more]) @ w.T).solution.T
    assert close(towards(w, s, whitening(s.moment), pull, ridge), expected, 1e-3)


def test_a_large_ridge_is_no_target():
    w, _, _, s = both()
    assert close(towards(w, s, whitening(s.moment), 1.0, 1e6), w) and not close(
        towards(w, s, whitening(s.moment), 1.0), w
    )


def test_few_tokens_overfit_the_drift_and_a_ridge_holds_it():
    """On the tokens that it was fitted to a target has the least error; on others a ridge may have less."""
    w, x, f, _ = both(tokens=4000, drift=1.0)
    errors = {}
    for ridge in (0.0, 0.1, 1.0):
        s = Statistics(x[:60].square().sum(0), (x[:60].T @ x[:60]).float(), 60.0, None, (f[:60].T @ x[:60]).float())
        target = towards(w, s, whitening(s.moment), 1.0, ridge)
        errors[ridge] = [float((f[part] @ w.T - x[part] @ target.T).norm()) for part in (slice(60), slice(60, None))]
    assert errors[0.0][0] < errors[0.1][0] < errors[1.0][0]
    assert errors[0.0][1] > errors[0.1][1] > errors[1.0][1]


def test_the_mapped_pair_has_the_least_error_against_the_original_outputs():
    w, x, f, s = both()
    metric = whitening(s.moment)
    made = {}
    for name, config in (("both", low(feed="both", rank=6)), ("one", low(rank=6))):
        pair = factorised_of(config, w, s, metric)
        made[name] = float((f @ w.T - x @ pair.T).square().sum())
    target = towards(w, s, metric, 1.0)
    rest = float((f @ w.T - x @ target.T).square().sum())  # no matrix does better
    dropped = torch.linalg.svdvals(target @ x.T)[6:].square().sum()
    assert made["both"] < made["one"]
    assert math.isclose(made["both"], rest + float(dropped), rel_tol=1e-4)


def factorised_of(config, w, s, metric):
    pair = factorised(config, w, config.rank, metric, s)
    return pair.B.double() @ pair.A.double()


@pytest.mark.parametrize("method", ["svd_llm", "saes"])
def test_equal_feeds_change_nothing(tiny, method):
    """The first block's inputs are equal in both models; and no pull is no target."""
    subject = tiny(layers=3)
    plain = weights(low(rank=6).apply(subject)[0])
    made = weights(low(method, rank=6, feed="both").apply(subject)[0])
    assert all(close(made[0, n], plain[0, n], 1e-3) for n in LINEARS)
    assert not close(made[2, "q_proj"], plain[2, "q_proj"], 1e-2)
    one = weights(low("saes", rank=6, pull=0).apply(subject)[0])
    other = weights(low("svd_llm", rank=6, feed="compressed").apply(subject)[0])
    assert all(close(one[key], other[key], 1e-3) for key in one)


def test_full_pull_is_the_same_by_both_names(tiny):
    subject = tiny(layers=2)
    one, other = (weights(low(m, rank=6, feed="both", pull=1).apply(subject)[0]) for m in ("saes", "svd_llm"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_both_feeds_give_the_cross_moment(tiny):
    subject = tiny(layers=3)
    changed = subject.copy()

    class Halve(Visitor):
        groups, moments, found = ALL_AT_ONCE, True, {}

        def change(self, block, linears, statistics):
            self.found |= {(block, INPUTS[n]): statistics[n] for n in linears}
            for linear in linears.values():
                linear.weight.data *= 0.9

    visitor = Halve()
    stream(changed, IDS, visitor, feed="both", batch=3)
    f, x = inputs_of(subject), inputs_of(changed)
    for b in range(3):  # in its own block only attention's inputs are those of before the change
        s = visitor.found[b, "attention"]
        assert close(s.moment, x[b, "attention"].T @ x[b, "attention"])
        assert close(s.cross, f[b, "attention"].T @ x[b, "attention"])
    assert all(close(visitor.found[0, g].cross, visitor.found[0, g].moment) for g in ("attention", "heads", "mlp"))


# ---------------------------------------------------------------- allocation


def spectra_of(sizes, length=16):
    """Singular values that fall slowly where sizes are large."""
    return {key: scale * torch.exp(-torch.arange(length) / size).double() for key, (size, scale) in sizes.items()}


KEYS = [(b, n) for b in range(3) for n in ("q_proj", "up_proj")]
SHAPES = {(b, n): (16, 16) if n == "q_proj" else (48, 16) for b, n in KEYS}


def spent(ranks):
    return sum(rank * sum(SHAPES[key]) for key, rank in ranks.items())


@pytest.mark.parametrize("share", [by_effective_rank, by_loss])
@pytest.mark.parametrize("uniform", [1, 2, 4, 6])
def test_equal_spectra_share_evenly(share, uniform):
    shapes = dict.fromkeys(KEYS, (16, 16))
    made = share(spectra_of(dict.fromkeys(KEYS, (4.0, 1.0))), shapes, dict.fromkeys(KEYS, uniform))
    assert made == dict.fromkeys(KEYS, uniform)


@pytest.mark.parametrize("share", [by_effective_rank, by_loss])
@pytest.mark.parametrize("spread", [1.5, 10.0, 1e6])
@pytest.mark.parametrize("uniform", [1, 2, 4, 6])
def test_the_budget_is_held_and_more_goes_where_the_spectrum_is_longer(share, spread, uniform):
    sizes = {(b, n): (2.0 + 2 * b, spread**b) for b, n in KEYS}
    even = dict.fromkeys(KEYS, uniform)
    made = share(spectra_of(sizes), SHAPES, even)
    assert spent(made) <= spent(even) and min(made.values()) >= 1
    assert spent(made) > spent(even) - sum(sum(shape) for shape in SHAPES.values())
    for name in ("q_proj", "up_proj"):
        assert made[0, name] <= made[1, name] <= made[2, name]
        assert uniform == 1 or made[0, name] < made[2, name]
        assert all(rank * sum(SHAPES[key]) < math.prod(SHAPES[key]) for key, rank in made.items())


def test_ranks_by_effective_rank_are_the_papers():
    sizes = {(b, n): (2.0 + 2 * b, 1.0) for b, n in KEYS}
    shapes = {key: (1600, 1600) if key[1] == "q_proj" else (4800, 1600) for key in KEYS}
    spectra = spectra_of(sizes, 1600)
    made = by_effective_rank(spectra, shapes, dict.fromkeys(KEYS, 300))
    weight = {key: math.sqrt(effective_rank(spectra[key]) / sum(shapes[key])) for key in KEYS}
    budget = sum(300 * sum(shape) for shape in shapes.values())
    scale = budget / sum(weight[key] * sum(shapes[key]) for key in KEYS)
    assert all(abs(made[key] - scale * weight[key]) < 2 for key in KEYS)


def test_ranks_by_loss_are_the_papers():
    """The share that goes is R (1 / log L) / mean(1 / log L), L relative to the least and times e."""
    sizes = {(b, n): (20.0 + 20 * b, 1.0) for b, n in KEYS}
    shapes, uniform = dict.fromkeys(KEYS, (1600, 1600)), dict.fromkeys(KEYS, 640)
    spectra = spectra_of(sizes, 1600)
    made = by_loss(spectra, shapes, uniform)
    for name in ("q_proj", "up_proj"):
        loss = [float(spectra[b, name][640:].norm()) for b in range(3)]
        inverse = [1 / math.log(math.e * one / min(loss)) for one in loss]
        for b in range(3):
            kept = 1 - (1 - 640 / 800) * inverse[b] / (sum(inverse) / 3)
            assert abs(made[b, name] - min(800 * kept, 799)) < 3


@pytest.mark.parametrize("allocation", ["effective", "loss"])
@pytest.mark.parametrize("method", METHODS)
def test_allocations_as_a_stage(tiny, allocation, method):
    subject = tiny(layers=3)
    for name in ("q_proj", "gate_proj"):
        w = subject.linears(1)[name].weight
        w.copy_(truncated_svd(w.double(), 2).float() + 1e-3 * w)  # nearly of rank 2
    even, one = low(method, keep=0.6).apply(subject)
    made, other = low(method, keep=0.6, allocation=allocation).apply(subject)
    assert other["parameters"] <= one["parameters"] < other["parameters"] + 21 * 96
    assert other["ranks"]["blocks.1.q_proj"] < one["ranks"]["blocks.1.q_proj"]
    assert other["ranks"]["blocks.1.q_proj"] < other["ranks"]["blocks.0.q_proj"]
    assert made.parameters - even.parameters == other["parameters"] - one["parameters"]


# ---------------------------------------------------------------- sizes

ENCODED = [16, 8, 4, [4, 8], [16, 4]]


def recipe(*stages):
    return Recipe(stages, tuple(f"recipe.yaml:{n}" for n in range(1, len(stages) + 1)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", ENCODED, ids=str)
@pytest.mark.parametrize("size", [{"keep": 0.5}, {"rank": 5}, {"bytes": 9000}], ids=str)
def test_parameters_and_bytes_are_foretold_counted_and_stored(tiny, tmp_path, bits, size, dtype):
    folder = save_checkpoint(tiny(layers=2), tmp_path / "tiny")
    stage = low("svd", bits=bits, **size)
    (row,) = Job.prepare(folder, recipe(stage), "embedded", dtype).forecast()
    compress(folder, recipe(stage), tmp_path / "out", data="embedded", dtype=dtype)
    record, made = read_artifact(tmp_path / "out"), load_artifact(tmp_path / "out")
    on_disk = (tmp_path / "out" / "packed.safetensors").stat().st_size
    assert row.disk_bytes == record["sizes"]["bytes_on_disk"] == on_disk == predicted_disk_bytes(made)
    assert row.parameters == record["sizes"]["parameters"] == made.parameters == sizes(made)["parameters"]
    pairs = [m for b in range(2) for m in made.linears(b).values()]
    report = record["reports"][0]
    assert report["parameters"] == sum(m.rank * (m.in_features + m.out_features) for m in pairs)
    assert report["bytes"] == sum(t.nbytes for m in pairs for t in m.stored.values())
    if "bytes" in size:
        assert 0.8 * 9000 < report["bytes"] <= 9000
    if "keep" in size:
        assert 0.4 * report["of_parameters"] < report["parameters"] <= 0.5 * report["of_parameters"]
    if bits == 16:
        own = int((made.model.get_input_embeddings().weight == 0).sum())
        assert row.nonzero == record["sizes"]["nonzero_parameters"] + own == row.parameters
    else:
        assert row.nonzero is None


def test_what_an_artifact_a_checkpoint_and_gguf_hold(tiny, tmp_path):
    made, _ = low(rank=6, bits=[16, 8]).apply(tiny(layers=2))
    save_artifact(made, tmp_path / "packed")
    back = load_artifact(tmp_path / "packed")
    assert back.fingerprint == made.fingerprint
    with torch.no_grad():
        expected = made.model(IDS).logits
        assert torch.equal(back.model(IDS).logits, expected)
        save_artifact(made, tmp_path / "plain", packed=False)
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
        assert type(alone.model.layers[0].self_attn.q_proj) is nn.Linear
        assert torch.allclose(alone(IDS).logits, expected, atol=1e-3)
    with pytest.raises(BadInput, match="self_attn.q_proj is a pair of low rank .14 of 14 are.: a GPTQ checkpoint"):
        export_gptq(made, tmp_path / "gptq")
    back = load_subject(export_gguf(made, tmp_path / "m.gguf"), "float32")
    for key, w in weights(made).items():
        assert close(back.linears(key[0])[key[1]].weight, w, 1e-3)  # float16


def test_biases_stay(tiny):
    subject = tiny("qwen2", layers=2)
    for b in range(2):
        subject.linears(b)["q_proj"].bias.fill_(0.5)
    made, _ = low(rank=64, force=True).apply(subject)
    assert torch.equal(made.linears(0)["q_proj"].bias, subject.linears(0)["q_proj"].bias)
    with torch.no_grad():
        assert torch.allclose(made.model(IDS).logits, subject.model(IDS).logits, atol=1e-3)


def test_ranks_by_the_formula(tiny):
    subject = tiny(layers=1)
    _, report = low("svd", keep=0.8).apply(subject)
    expected = {"q_proj": (32, 32), "k_proj": (16, 32), "gate_proj": (64, 32), "down_proj": (32, 64)}
    for name, (m, n) in expected.items():
        assert report["ranks"][f"blocks.0.{name}"] == int(0.8 * m * n / (m + n))
    assert low("svd").keep == 0.8 and low("svd", rank=5).keep is None


def test_a_pair_that_saves_nothing(tiny):
    subject = tiny(layers=1)
    # 32 x 32: break-even 16
    with pytest.raises(BadInput) as caught:
        low("svd", rank=16, linears="q_proj").apply(subject)
    for part in ("rank 16 of blocks.0.q_proj (32 x 32) takes 4,096 bytes", "takes 4,096", "below 16", "= 16", "force"):
        assert part in str(caught.value)
    made, _ = low("svd", rank=16, linears="q_proj", force=True).apply(subject)
    assert made.parameters == subject.parameters
    assert low("svd", rank=15, linears="q_proj").apply(subject)[0].parameters < subject.parameters
    # 64 x 32: break-even 21.3, so 21 fits and the message does not deny it
    with pytest.raises(BadInput, match="expected a rank below 22 "):
        low("svd", rank=30, linears="up_proj").apply(subject)
    low("svd", rank=21, linears="up_proj").apply(subject)
    # factors of fewer bits may have a higher rank
    low("svd", rank=30, linears="q_proj", bits=8).apply(subject)


def test_a_pruned_weight_is_compared_as_it_is_packed(tiny, tmp_path):
    """W2:4 takes .5625 of float32's bytes (.53 and 2 bits a weight): a pair of three quarters saves nothing."""
    folder = save_checkpoint(tiny(layers=2), tmp_path / "tiny")
    pruned = Width(2, 4, metric="magnitude")
    for run in (lambda r: Job.prepare(folder, r, "embedded").forecast(), lambda r: compress(folder, r, tmp_path / "o")):
        with pytest.raises(BadInput, match="rank 12 of blocks.0.q_proj .32 x 32. takes 3,072 bytes, and what it repl"):
            run(recipe(pruned, low("svd", rank=12)))
    stages = recipe(pruned, low("svd", rank=3))
    rows = Job.prepare(folder, stages, "embedded", "float32").forecast()
    compress(folder, stages, tmp_path / "out", data="embedded", dtype="float32")
    record, made = read_artifact(tmp_path / "out"), load_artifact(tmp_path / "out")
    assert record["label"] == "W2:4+Lr3-svd" and rows[-1].disk_bytes == record["sizes"]["bytes_on_disk"]
    assert rows[-1].parameters == record["sizes"]["parameters"] < sizes(tiny(layers=2))["parameters"]
    assert all((m.weight != 0).float().mean() > 0.9 for m in made.linears(0).values())  # the zeros are filled


# ---------------------------------------------------------------- what may come before and after


def chain(tiny, tmp_path, *stages, layers=5):
    """The result of a recipe on a tiny model, and its record; sizes are as foretold, where they are."""
    folder = save_checkpoint(tiny(layers=layers), tmp_path / "tiny")
    rows = Job.prepare(folder, recipe(*stages), "embedded", "float32").forecast()
    compress(folder, recipe(*stages), tmp_path / "out", data="embedded", dtype="float32")
    record, made = read_artifact(tmp_path / "out"), load_artifact(tmp_path / "out")
    if rows[-1].parameters is not None:
        assert (rows[-1].parameters, rows[-1].disk_bytes) == (
            record["sizes"]["parameters"],
            record["sizes"]["bytes_on_disk"],
        )
    assert record["label"] == "+".join(s.label for s in stages)
    return made, record


def pairs_of(subject):
    return [m for b in range(subject.depth) for m in subject.linears(b).values() if is_lowrank(m)]


D1, SMALL = Depth(blocks=[1]), {"group": 16}


@pytest.mark.parametrize(
    ("stages", "encodings"),
    [
        ((D1, low(rank=5)), ("dense", "dense")),
        ((low(rank=5), D1), ("dense", "dense")),
        ((low(rank=5), Depth(blocks=[2, 3], replace="bias", length=24)), ("dense", "dense")),
        ((low(rank=5), Depth(remove=1, metric="magnitude", protect_first=1, protect_last=1)), ("dense", "dense")),
        ((Rtn(bits=8, group=16), low(rank=2)), ("dense", "dense")),
        ((low(rank=5), Rtn(**SMALL)), ("int4/symmetric/16/all", "int4/symmetric/row/all")),
        (
            (low(rank=5), Rtn(bits=8, group=16, grid="asymmetric")),
            ("int8/asymmetric/16/all", "int8/asymmetric/row/all"),
        ),
        ((low(rank=16, force=True), Rtn(**SMALL)), ("int4/symmetric/16/all", "int4/symmetric/16/all")),
        ((low(rank=5), Hqq(**SMALL)), ("int4/minimum/16/all", "int4/minimum/row/all")),
        ((low(rank=5), Gptq(length=24, **SMALL)), ("int4/symmetric/16/all", "int4/symmetric/row/all")),
        (
            (low(rank=5), Gptq(length=24, act_order="groups", **SMALL)),
            ("int4/symmetric/16/all", "int4/symmetric/row/all"),
        ),
        ((low(rank=5, bits=8), D1), ("int8/symmetric/row/all", "int8/symmetric/row/all")),
    ],
    ids=lambda x: "+".join(s.label for s in x) if isinstance(x[0], LowRankStage | Depth | Rtn) else "",
)
def test_chains(tiny, tmp_path, stages, encodings):
    made, _ = chain(tiny, tmp_path, *stages)
    pairs = pairs_of(made)
    assert len(pairs) == 7 * made.depth
    assert {pair.encodings for pair in pairs if pair.in_features == 32} == {encodings}
    with torch.no_grad():
        assert torch.isfinite(made.model(IDS).logits).all()


def test_gptq_of_a_pair_does_better_than_rounding(tiny):
    subject = tiny(layers=3)
    made, _ = low(rank=12, force=True).apply(subject)
    rounded, _ = Rtn(bits=3, group=16).apply(made)
    solved, report = Gptq(bits=3, group=16, length=24).apply(made)
    x = inputs_of(made)
    squares = {}
    for name, other in (("rounded", rounded), ("solved", solved)):
        a, b = weights(made), weights(other)
        squares[name] = sum(
            float(((a[0, n] - b[0, n]) @ x[0, INPUTS[n]].T).square().sum()) for n in ("q_proj", "k_proj", "v_proj")
        )
    assert squares["solved"] < squares["rounded"]
    assert report["relative_errors"].keys() == {f"blocks.{b}.{n}" for b in range(3) for n in LINEARS}
    assert all(type(m) is LowRank for b in range(3) for m in made.linears(b).values())  # the subject is as it was
    assert not any(m.is_quantised for m in pairs_of(made))


def test_corrections_of_pairs(tiny, tmp_path):
    made, record = chain(tiny, tmp_path, low(rank=5), Eora(rank=2, length=24), layers=2)
    assert all(type(m) is Adapted and type(m.base) is LowRank for b in range(2) for m in made.linears(b).values())
    assert all(after < before for before, after in record["reports"][1]["relative_errors"].values())


def test_quantised_pairs_are_corrected(tiny, tmp_path):
    made, _ = chain(tiny, tmp_path, low(rank=5), Gptq(length=24, **SMALL), Eora(rank=2, length=24), layers=2)
    for b in range(2):
        for m in made.linears(b).values():
            assert type(m) is Adapted and type(m.base) is LowRank and m.base.is_quantised
    other, _ = chain(tiny, tmp_path / "q", Gptq(length=24, **SMALL), Eora(rank=2, length=24), layers=2)
    assert all(type(m.base) is QuantisedLinear for m in other.linears(0).values())


def test_a_correction_is_part_of_what_is_factorised(tiny):
    subject = tiny(layers=1)
    quantised, _ = Rtn(bits=3, group=16).apply(subject)
    corrected, _ = Eora(rank=40, length=24).apply(quantised, original=subject)
    made, _ = low("svd", rank=5, force=True).apply(corrected)
    expected = truncated_svd(weights(subject)[0, "q_proj"], 5)
    assert type(made.linears(0)["q_proj"]) is LowRank and close(made.linears(0)["q_proj"].weight, expected, 1e-2)


def test_pairs_are_trained_beside(tiny, tmp_path, tiny_data):
    folder = save_checkpoint(tiny(layers=2), tmp_path / "tiny")
    stages = recipe(low(rank=5), Lora(**TRAINING, learning_rate=1e-2))
    rows = Job.prepare(folder, stages, tiny_data, "float32").forecast()
    compress(folder, stages, tmp_path / "out", data=tiny_data, dtype="float32")
    made, record = load_artifact(tmp_path / "out"), read_artifact(tmp_path / "out")
    first, _ = low(rank=5).apply(load_subject(folder, "float32"))
    for b in range(2):
        for name, m in made.linears(b).items():
            assert type(base_of(m)) is LowRank and torch.allclose(base_of(m).A, first.linears(b)[name].A, atol=1e-5)
        assert made.linears(b)["q_proj"].lora_B.any()
    assert (rows[-1].parameters, rows[-1].disk_bytes) == (
        record["sizes"]["parameters"],
        record["sizes"]["bytes_on_disk"],
    )


def test_an_artifact_as_subject_keeps_its_pairs(tiny, tmp_path):
    folder = save_checkpoint(tiny(layers=4), tmp_path / "tiny")
    first = compress(folder, recipe(low("svd", rank=5)), tmp_path / "first", data="embedded", dtype="float32")
    second = compress(first, recipe(D1), tmp_path / "second", data="embedded")
    assert len(pairs_of(load_artifact(second))) == 21
    with pytest.raises(BadInput, match="blocks.0.q_proj is a pair already .lowrank:5:dense:dense.: expected linears"):
        compress(first, recipe(low("svd", rank=3)), tmp_path / "third", data="embedded")
    with pytest.raises(BadInput, match="blocks.0.q_proj is a pair of low rank, and zeros in its product are none"):
        compress(first, recipe(Width(2, 4, metric="magnitude")), tmp_path / "fourth", data="embedded")
    # the same function as whole weights has the same fingerprint, and is another subject to a stage
    plain = save_checkpoint(load_artifact(first).copy(), tmp_path / "plain")
    assert load_subject(plain, "float32").fingerprint == load_artifact(first).fingerprint
    again = compress(plain, recipe(D1), tmp_path / "fifth", data="embedded")
    assert not pairs_of(load_artifact(again))
    rounded = compress(first, recipe(Rtn(**SMALL)), tmp_path / "sixth", data="embedded")
    assert all(m.is_quantised for m in pairs_of(load_artifact(rounded))) and pairs_of(load_artifact(rounded))


def test_blocks_that_run_twice_get_one_pair(tiny):
    subject = apply_plan(tiny(layers=3), (0, 1, 1, 2))
    once = apply_plan(tiny(layers=3), (0, 1, 2))
    for method in ("svd", "fwsvd"):
        made, report = low(method, rank=5).apply(subject)
        assert all(made.linears(1)[n] is made.linears(2)[n] and is_lowrank(made.linears(1)[n]) for n in LINEARS)
        assert report["linears"] == 21 and made.parameters == low("svd", rank=5).apply(once)[0].parameters
        assert report["parameters"] == sum(5 * (m.in_features + m.out_features) for m in set(pairs_of(made)))
    with pytest.raises(BadInput, match="runs a block twice cannot be calibrated"):
        low(rank=5).apply(subject)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("L80%+L50%", "L50% after L80% would make pairs of pairs: expected other linears or blocks"),
        ("Lr5+D1+Lr3-svd", "would make pairs of pairs"),
        ("L80%+W2:4", "W2:4 after L80% would multiply the pairs of q_proj, .* out: expected width before low rank"),
        ("L80%+Q+L50%", "L50% after L80% would make pairs of pairs"),
        ("Q+L80%-fwsvd", "method fwsvd needs the gradients of weights, which Q replaced: put lowrank before it"),
        ("L80%+Q+R", "R after Q would quantise a quantised subject"),
        ("L80%+D1+E", "eora after D1 has nothing to correct"),
    ],
)
def test_what_cannot_follow_is_refused_before_anything_is_loaded(label, message):
    with pytest.raises(BadInput, match=message):
        parse_label(label).check()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            (low(), Depth(remove=1, metric="taylor")),
            "metric 'taylor' after L80% needs gradients of weights",
        ),
        (
            (low(), Depth(remove=1, replace="scalar")),
            "D1.* after L80% would change pairs of low rank: put it before",
        ),
        ((low(), Depth(remove=1, replace="linear")), "D1.* after L80% would change pairs of low rank"),
        ((low(bits=8), Gptq()), "Q after L80% would quantise pairs whose factors are quantised: expected bits: 16"),
        ((low(bits=[16, 4]), Rtn()), "R after L80% would quantise pairs whose factors are quantised"),
        ((low(), Gptq(act_order="index")), "Q.* after L80%: a pair's factors keep no index of their inputs"),
        ((low(linears="q_proj"), Width(2, 4, linears="*_proj")), "would multiply the pairs of q_proj out"),
        ((low(linears="q_proj"), low(linears=["*_proj"])), "would make pairs of pairs"),
    ],
)
def test_more_that_cannot_follow(stages, message):
    with pytest.raises(BadInput, match=message):
        recipe(*stages).check()


def test_laco_after_pairs_is_refused(tiny):
    made, _ = low("svd", rank=5).apply(tiny(layers=6))
    with pytest.raises(BadInput, match="no dense weight but lowrank:5:dense:dense"):
        Laco(merge=2, threshold=-1).apply(made)


def test_other_linears_may_follow():
    attention, mlp = low(linears=["q_proj", "o_proj"]), low(linears=["up_proj"])
    recipe(attention, mlp).check()
    recipe(attention, Width(2, 4, linears="up_proj")).check()
    recipe(low(bits=8, linears="q_proj"), Rtn(linears="up_proj")).check()


def test_other_blocks_may_follow(tiny, tmp_path):
    """Scope last leaves the first blocks, which is sure once the depth is known."""
    folder = save_checkpoint(tiny(layers=4), tmp_path / "tiny")
    last = low("svd", rank=5, scope="last", blocks=2)
    for stage in (Width(2, 4, linears=["blocks.0.*"], metric="magnitude"), low("svd", rank=5, linears="blocks.1.*")):
        made = load_artifact(compress(folder, recipe(last, stage), tmp_path / stage.word, data="embedded"))
        assert all(is_lowrank(m) for b in (2, 3) for m in made.linears(b).values())
    with pytest.raises(BadInput, match="would multiply the pairs of q_proj"):
        Job.prepare(folder, recipe(last, Width(2, 4, linears=["blocks.3.*"])), "embedded")
    with pytest.raises(BadInput, match="would make pairs of pairs"):
        Job.prepare(folder, recipe(last, low("svd", rank=5)), "embedded")
    with pytest.raises(BadInput, match="blocks is 5: the model has 4"):
        Job.prepare(folder, recipe(low(scope="last", blocks=5)), "embedded")
    with pytest.raises(BadInput, match=r"no projection fits 'blocks.9.\*'"):
        Job.prepare(folder, recipe(low(linears="blocks.9.*")), "embedded")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.5, "rank": 3}, "lowrank takes one of keep, rank and bytes: not keep and rank"),
        ({"keep": 0.0}, r"keep is 0.0: expected a share in \(0, 1\]"),
        ({"keep": 1.5}, "keep is 1.5"),
        ({"rank": 0}, "rank is 0: expected a whole number of at least 1"),
        ({"bytes": 0}, "bytes is 0"),
        ({"scope": "last"}, "scope last with blocks None: expected a number of blocks"),
        ({"blocks": 3}, "scope all with blocks 3: expected .* none for all"),
        ({"scope": "first", "blocks": 3}, "scope 'first'"),
        ({"scope": "last", "blocks": 0}, "blocks is 0"),
        ({"method": "svdllm"}, "method 'svdllm'"),
        ({"method": "saes"}, "saes compares .*: feed: both"),
        ({"method": "asvd", "feed": "both"}, "feed both is not defined for method asvd"),
        ({"allocation": "loss", "rank": 4}, "allocation loss shares out a budget"),
        ({"allocation": "even"}, "allocation 'even'"),
        ({"alpha": 2}, r"alpha is 2: expected a number in \[0, 1\]"),
        ({"whitened": -0.1}, "whitened is -0.1"),
        ({"method": "saes", "feed": "both", "pull": 1.1}, "pull is 1.1"),
        ({"ridge": -1.0}, "ridge is -1.0: expected a number of at least 0, e.g. 0.1"),
        ({"bits": 3}, "bits is 3: expected 16, 8 or 4"),
        ({"bits": [4, 8, 8]}, r"bits is \[4, 8, 8\]"),
        ({"linears": "q_prj"}, "q_proj"),
        ({"task": "poetry"}, "poetry"),
        ({"items": 0}, "items is 0"),
        ({"length": 1}, "calibration window"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(BadInput, match=message):
        LowRankStage(**settings)


def test_a_budget_that_leaves_no_rank(tiny):
    subject = tiny(layers=1)
    with pytest.raises(BadInput, match="keep 0.01 leaves blocks.0.[a-z]_proj no rank"):
        low("svd", keep=0.01).apply(subject)
    with pytest.raises(BadInput, match="a budget of 100 bytes leaves blocks.0.[a-z]_proj no rank"):
        low("svd", bytes=100).apply(subject)


@pytest.mark.parametrize("method", ["svd_llm", "asvd", "nsvd", "saes"])
def test_inputs_that_say_nothing_are_named(tiny, method):
    subject = tiny(layers=2)
    subject.blocks[1].post_attention_layernorm.weight.data.zero_()
    with pytest.raises(BadInput, match="block 1's gate_proj saw no tokens: all its inputs are zero"):
        low(method, rank=4).apply(subject)
    subject = tiny(layers=2)
    subject.blocks[1].input_layernorm.weight.data.fill_(torch.nan)
    with pytest.raises(BadInput, match="the inputs of block 1's q_proj are not finite"):
        low(method, rank=4).apply(subject)


def test_metrics_of_broken_statistics_are_named():
    s = Statistics(torch.zeros(4), torch.zeros(4, 4), 5.0, torch.zeros(4))
    for method in ("svd_llm", "asvd"):
        with pytest.raises(BadInput, match="block 2's q_proj saw no tokens"):
            metric_of(low(method), s, 4, "block 2's q_proj")


def test_no_projection_in_scope(tiny):
    with pytest.raises(BadInput, match=r"no projection is in scope 'last' with linears blocks.0.\*"):
        low("svd", scope="last", blocks=1, linears="blocks.0.*").apply(tiny(layers=3))


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("lowrank:6:dense:dense", r"'model.layers.0.self_attn.q_proj.A' is torch.float32 of shape \(5, 32\)"),
        ("lowrank:5:dense", "q_proj is 'lowrank:5:dense': expected dense, bitmap, a pattern such as 2:4"),
        ("lowrank:5:int8/symmetric/row/all:dense", "it lacks the weight 'model.layers.0.self_attn.q_proj.A_codes'"),
    ],
)
def test_an_artifact_of_other_factors_is_named(tiny, tmp_path, encoding, message):
    made, _ = low("svd", rank=5).apply(tiny(layers=1))
    save_artifact(made, tmp_path / "a")
    file = tmp_path / "a" / RECORD
    record = json.loads(file.read_text())
    record["encodings"]["model.layers.0.self_attn.q_proj"] = encoding
    del record["sha256"]
    file.write_text(json.dumps({**record, "sha256": checksum(record)}))
    with pytest.raises(BadInput, match=message) as caught:
        load_artifact(tmp_path / "a")
    assert str(tmp_path / "a") in str(caught.value)


# ---------------------------------------------------------------- scope and labels


def test_the_last_and_the_quiet(tiny):
    subject = tiny(layers=4)
    for b in (0, 2):
        subject.linears(b)["down_proj"].weight.mul_(1e-3)
    assert blocks_of(low(scope="last", blocks=2), 4) == [2, 3]
    assert blocks_of(low(), 4) == [0, 1, 2, 3]
    turns = mlp_turns(subject, IDS)
    seen, dense = {}, subject.model
    for b, block in enumerate(dense.model.layers):
        block.post_attention_layernorm.register_forward_pre_hook(lambda _m, a, b=b: seen.__setitem__(b, a[0]))
    with torch.no_grad():
        states = dense.model(IDS, output_hidden_states=True).hidden_states
    for b in range(3):  # the last of these states is normalised
        cos = nn.functional.cosine_similarity(seen[b].double(), states[b + 1].double(), dim=-1)
        assert math.isclose(turns[b], float((1 - cos).mean()), abs_tol=1e-4)
    made, report = low("svd", rank=5, scope="quiet", blocks=2).apply(subject)
    assert report["blocks"] == [0, 2] and len(pairs_of(made)) == 14
    assert [(b, is_lowrank(made.linears(b)["q_proj"])) for b in range(4)] == [(b, b in (0, 2)) for b in range(4)]


def test_labels():
    for stage, label in [
        (low(), "L80%"), (low("svd", keep=0.5), "L50%-svd"), (low(rank=64), "Lr64"), (low("asvd", rank=7), "Lr7-asvd"),
        (low(keep=0.875), "L87.5%"), (low(bytes=5000), "L~"), (low("saes"), "L80%-saes"),
    ]:  # fmt: skip
        assert stage.label == label and Label.parse(label).family == "factorised"
        if label != "L~":
            back = LowRankStage.from_label(label)
            assert (back.label, back.method, back.rank) == (label, stage.method, stage.rank)
            assert back.keep == pytest.approx(stage.keep)
    with pytest.raises(BadInput):
        parse_label("L0%")
    with pytest.raises(BadInput):
        parse_label("Lr" + "9" * 5000)
    assert str(Label.parse("D2+L80%+Q+E")) == "D2+L80%+Q+E" and Label.parse("D2+L80%").depth == 2


@pytest.mark.parametrize("allocation", ["uniform", "effective", "loss"])
@pytest.mark.parametrize("bits", ENCODED, ids=str)
def test_a_budget_of_bytes_is_held_by_every_allocation(tiny, allocation, bits):
    _, report = low(bytes=9000, allocation=allocation, bits=bits).apply(tiny(layers=2))
    assert 9000 - 14 * 4 * 96 < report["bytes"] <= 9000 and len(set(report["ranks"].values())) > 1


@pytest.mark.parametrize("settings", [{"rank": 5}, {"keep": 0.6, "allocation": "loss"}, {"bytes": 9000, "bits": 8}])
@pytest.mark.parametrize("method", ["svd_llm", "asvd", "nsvd"])
def test_metrics_of_one_pass_serve_several_stages(tiny, method, settings):
    subject, stage = tiny(layers=2), low(method, **settings)
    shared = metrics_of(low(method), subject)
    one, other = stage.apply(subject), stage.apply(subject, metrics=shared)
    assert one[0].fingerprint == other[0].fingerprint and one[1] == other[1]
    with pytest.raises(BadInput, match="metrics are those of the original model's inputs, and feed is compressed"):
        low(method, feed="compressed").apply(subject, metrics=shared)


def test_a_measured_model_keeps_its_pairs(tiny):
    """Packed weights are unpacked once for a measurement, and pairs are what is measured."""
    made, _ = low("svd", rank=5, linears="q_proj").apply(tiny(layers=2))
    assert Prepared(made, {}).unpacked is made
    rounded, _ = Rtn(bits=8, group=16).apply(made)
    model = Prepared(rounded, {}).unpacked
    assert (
        all(type(model.linears(b)["q_proj"]) is LowRank for b in range(2)) and model.fingerprint == rounded.fingerprint
    )
    assert type(model.linears(0)["up_proj"]) is nn.Linear
