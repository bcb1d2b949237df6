"""CALR: the closed form against least squares, training against plain loops, and where it must be the pairs alone."""

import dataclasses
import json

import pytest
import torch
from torch.nn import functional as F

from thesislib.compress import calr
from thesislib.compress.calr import Calr, Residual, with_closed_form
from thesislib.compress.depth import Depth
from thesislib.compress.eora import Eora
from thesislib.compress.gptq import Gptq, Rtn
from thesislib.compress.lora.sequences import sequences
from thesislib.compress.lora.stage import Lora
from thesislib.compress.lowrank import LowRankStage
from thesislib.compress.stage import Shape
from thesislib.compress.training import Training, indices, rate
from thesislib.compress.tune import Tune
from thesislib.compress.width import Width
from thesislib.device.cost import costs
from thesislib.errors import BadInput
from thesislib.formats.artifact import load_artifact
from thesislib.formats.gguf import export_gguf
from thesislib.formats.load import load_subject, save_checkpoint
from thesislib.formats.sizes import predicted_disk_bytes, sizes
from thesislib.model.beside import ranks_beside, with_paths
from thesislib.model.blocks import apply_plan, remove, without_parts
from thesislib.model.layers import adapt, replace
from thesislib.model.lowrank import LowRank
from thesislib.pipeline.forecast import forecast, stand_in
from thesislib.pipeline.label import Label
from thesislib.pipeline.recipe import Recipe
from thesislib.pipeline.run import compress
from thesislib.sources.corpus import calibration_windows

MLP = ("gate_proj", "up_proj", "down_proj")
D, H = 32, 64
SMALL = {
    "length": 64, "batch": 2, "accumulate": 2, "steps": 6, "every": 3, "validation": 4, "checkpoint_every": 2,
    "learning_rate": 1e-2, "autocast": False, "windows": 4,
}  # fmt: skip

TRAINED = {name: value for name, value in SMALL.items() if name != "windows"}  # of a stage without calibration


@pytest.fixture
def original(tiny):
    return tiny(layers=4)


def paired(subject, data, rank=6, **settings):
    """The subject whose last two MLPs are pairs."""
    settings = {"linears": MLP, "scope": "last", "blocks": 2, "method": "svd", "windows": 4, "length": 64} | settings
    return LowRankStage(rank=rank, **settings).apply(subject, data=data)[0]


@pytest.fixture
def pairs(original, tiny_data):
    return paired(original, tiny_data)


@pytest.fixture
def ids(original, tiny_data):
    return calibration_windows(original.tokenizer, "c4", tiny_data, 8, 64, 0)


def logits(subject, ids):
    with torch.inference_mode():
        return subject.model(ids, use_cache=False).logits


def inputs_of(subject, ids, block):
    """The inputs (tokens, D) of a block's MLP, by running the whole model."""
    seen = []
    hook = subject.blocks[block].mlp.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    logits(subject, ids)
    hook.remove()
    return seen[0].flatten(0, 1)


def measured(subject, original, ids, block):
    """The relative error of a block's MLP against the original one, on the inputs that it has in this model."""
    x = inputs_of(subject, ids, block)
    with torch.no_grad():
        target = original.blocks[block].mlp(x)
        return ((target - subject.blocks[block].mlp(x)).double().norm() / target.double().norm()).item()


def weights(subject):
    return {name: p.detach() for name, p in subject.model.state_dict().items()}


def products(subject, block):
    """(path, {name: factors}) of a block."""
    pairs = {name: subject.linears(block)[name] for name in MLP}
    return subject.blocks[block].mlp.path, {name: (p.factor("A"), p.factor("B")) for name, p in pairs.items()}


# ---------------------------------------------------------------- the closed form


def test_a_path_of_full_rank_is_the_least_squares_fit(original, pairs, ids):
    x = inputs_of(pairs, ids, 2).double()
    with torch.no_grad():
        r = (original.blocks[2].mlp(x.float()) - pairs.blocks[2].mlp(x.float())).double()
    fit = torch.linalg.lstsq(x, r).solution  # r ~ x fit
    made, errors = with_closed_form(pairs, original, [2], D, ids)
    A, B = made.blocks[2].mlp.path
    torch.testing.assert_close(x @ A.double().T @ B.double().T, x @ fit, rtol=1e-3, atol=1e-4)
    whole = original.blocks[2].mlp(x.float()).double().norm()
    before, after = (r.norm() / whole).item(), ((r - x @ fit).norm() / whole).item()
    assert errors == {"2": [pytest.approx(before, abs=2e-6), pytest.approx(after, abs=2e-6)]} and after < 0.9 * before


def test_a_path_of_lower_rank_is_the_best_of_its_rank(original, pairs, ids):
    """Reduced rank regression: the fit's values are projected on their own principal directions."""
    x = inputs_of(pairs, ids, 2).double()
    with torch.no_grad():
        r = (original.blocks[2].mlp(x.float()) - pairs.blocks[2].mlp(x.float())).double()
    fitted = x @ torch.linalg.lstsq(x, r).solution
    V = torch.linalg.svd(fitted, full_matrices=False).Vh
    for rank in (1, 5, 17):
        A, B = with_closed_form(pairs, original, [2], rank, ids)[0].blocks[2].mlp.path
        assert A.shape == (rank, D) and B.shape == (D, rank)
        torch.testing.assert_close(
            x @ A.double().T @ B.double().T, fitted @ V[:rank].T @ V[:rank], rtol=1e-3, atol=1e-3
        )


def test_reported_errors_are_those_of_the_model_that_comes_out(original, pairs, ids, tiny_data):
    stage = Calr(rank=5, fit="closed", windows=8, length=64)
    made, report = stage.apply(pairs, data=tiny_data, original=original)
    assert report["blocks"] == [2, 3] and json.loads(json.dumps(report)) == report
    (_, first), (before, second) = report["relative_errors"]["2"], report["relative_errors"]["3"]
    assert [first, second] == [pytest.approx(measured(made, original, ids, b), abs=2e-6) for b in (2, 3)]
    # the later block's error before is on inputs that the earlier path has corrected
    halfway = with_closed_form(pairs, original, [2], 5, ids)[0]
    assert before == pytest.approx(measured(halfway, original, ids, 3), abs=2e-6)
    assert all(after < before for before, after in report["relative_errors"].values())
    for b in (2, 3):
        for name in MLP:
            assert made.linears(b)[name] is pairs.linears(b)[name]  # the pairs stay
    assert ranks_beside(pairs) == {} and made.plan == pairs.plan


def test_the_error_falls_with_the_rank_and_does_not_depend_on_the_batch(original, pairs, ids):
    errors = [with_closed_form(pairs, original, [3], rank, ids)[1]["3"][-1] for rank in (0, 1, 4, 8, 16, 31, 32)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] - 0.05
    one, all_ = (with_closed_form(pairs, original, [2, 3], 4, ids, batch=n) for n in (3, 8))
    for b in (2, 3):
        products_ = [m.blocks[b].mlp.path[1] @ m.blocks[b].mlp.path[0] for m, _ in (one, all_)]
        torch.testing.assert_close(*products_, rtol=1e-3, atol=1e-4)
    ranks = [one[0].blocks[2].mlp.rank, one[1], sorted(with_closed_form(pairs, original, [3, 2], 4, ids)[1])]
    assert ranks == [4, {k: [pytest.approx(e, abs=1e-5) for e in v] for k, v in all_[1].items()}, ["2", "3"]]


def test_pairs_that_are_the_weights_leave_nothing_to_correct(original, ids, tiny_data):
    same = paired(original, tiny_data, rank=D, force=True)
    made, errors = with_closed_form(same, original, [2, 3], 4, ids)
    assert all(max(pair) < 1e-5 for pair in errors.values())
    for b in (2, 3):
        A, B = made.blocks[b].mlp.path
        assert (B @ A).abs().max() < 1e-4
    torch.testing.assert_close(logits(made, ids), logits(original, ids), rtol=1e-3, atol=1e-3)


def test_mlps_that_are_zero_or_broken(original, pairs, ids):
    silent = original.copy()
    silent.linears(2)["down_proj"].weight.data.zero_()
    zero = pairs.copy(unpack=False)
    replace(zero.blocks[2], "down_proj", LowRank(torch.zeros(2, H), torch.zeros(D, 2), None))
    made, errors = with_closed_form(zero, silent, [2], 3, ids)
    assert errors == {"2": [0.0, 0.0]} and torch.equal(logits(made, ids), logits(zero, ids))
    pairs.model.model.embed_tokens.weight.data.fill_(float("nan"))
    with pytest.raises(BadInput, match="block 2's MLP"):
        with_closed_form(pairs, original, [2], 3, ids)


def test_sums_are_over_all_inputs(original, pairs):
    x = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(0))
    sums = Residual(pairs.blocks[2].mlp, original.blocks[2].mlp)
    with torch.no_grad():
        sums.add(x[:1])
        sums.add(x[1:])
        r = (original.blocks[2].mlp(x) - pairs.blocks[2].mlp(x)).double().flatten(0, 1)
        whole = original.blocks[2].mlp(x).double()
    flat = x.double().flatten(0, 1)
    torch.testing.assert_close(sums.moment, flat.T @ flat)
    torch.testing.assert_close(sums.cross, r.T @ flat, rtol=1e-4, atol=1e-5)
    assert sums.error(None) == pytest.approx((r.norm() / whole.norm()).item(), rel=1e-6)
    A, B = torch.randn(2, D), torch.randn(D, 2)
    left = (r - flat @ A.double().T @ B.double().T).norm() / whole.norm()
    assert sums.error((A, B)) == pytest.approx(left.item(), rel=1e-6)


# ---------------------------------------------------------------- training


def test_it_starts_at_its_pairs(original, pairs, ids, tiny_data):
    made, report = Calr(rank=3, fit="none", windows=4, length=64).apply(pairs, data=tiny_data, original=original)
    assert torch.equal(logits(made, ids), logits(pairs, ids)) and ranks_beside(made) == {2: 3, 3: 3}
    A, B = made.blocks[2].mlp.path
    assert not B.any() and 0.9 * D**-0.5 < A.abs().max() <= D**-0.5 and not torch.equal(A, made.blocks[3].mlp.path[0])
    assert [len(e) for e in report["relative_errors"].values()] == [1, 1]
    assert report["relative_errors"]["2"][0] == pytest.approx(
        measured(pairs, original, calibration_windows(pairs.tokenizer, "c4", tiny_data, 4, 64, 0), 2), abs=2e-6
    )
    other, _ = Calr(rank=3, fit="none", seed=1, windows=4, length=64).apply(pairs, data=tiny_data, original=original)
    assert not torch.equal(other.blocks[2].mlp.path[0], A)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fit", ["tokens", "hidden"])
def test_training_that_only_harms_leaves_the_pairs(original, pairs, ids, tiny_data, monkeypatch, fit, dtype):
    for model in (original.model, pairs.model):
        model.to(dtype)
    monkeypatch.setattr("thesislib.compress.training.rate", lambda *_: -1e-2)
    made, report = Calr(rank=3, fit=fit, **SMALL).apply(pairs, data=tiny_data, original=original)
    assert report["best_step"] == 0 and made.dtype == dtype and not made.blocks[2].mlp.path[1].any()
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.3}[dtype]  # the factors were shared out anew, and rounded
    torch.testing.assert_close(logits(made, ids), logits(pairs, ids), rtol=0, atol=tolerance)


def plain_loop(subject, original, config, train):
    """The factors after training, {name: (A, B)} a block, by F.linear and autograd alone."""
    student = subject.copy()
    learned, order = {}, []
    for b in (2, 3):
        found = {}
        if config.rank:
            A, B = calr.start(config, subject, b)
            found["path"] = (A.clone().requires_grad_(True), B.clone().requires_grad_(True))
        for name in MLP if config.pairs else ():
            pair = subject.linears(b)[name]
            u, s, vt = torch.linalg.svd(pair.weight, full_matrices=False)
            s = s[: pair.rank].sqrt()
            # signs and directions of an SVD are free: those of the pair itself are taken
            sign = torch.sign((vt[: pair.rank] * pair.factor("A")).sum(1))
            A, B = s[:, None] * vt[: pair.rank] * sign[:, None], u[:, : pair.rank] * s * sign
            found[name] = (A.clone().requires_grad_(True), B.clone().requires_grad_(True))
        learned[b] = found
        order += [p for pair in found.values() for p in pair]

        def linear(name, x, b=b, found=found):
            if name in found:
                return x @ found[name][0].T @ found[name][1].T
            return F.linear(x, student.linears(b)[name].weight)

        def forward(x, linear=linear, found=found):
            y = linear("down_proj", F.silu(linear("gate_proj", x)) * linear("up_proj", x))
            return y + x @ found["path"][0].T @ found["path"][1].T if "path" in found else y

        student.blocks[b].mlp.forward = forward
    optimiser = torch.optim.AdamW(order, weight_decay=0.0)
    for step in range(1, config.steps + 1):
        some = train.ids[indices(len(train), 0, 4 * step - 4, 4)]
        optimiser.zero_grad()
        if config.fit == "tokens":
            student.model(some, labels=some).loss.backward()
        else:
            loss = 0
            with torch.no_grad():
                x = {b: inputs_of(student, some, b).clone().view(2, 2, 64, D) for b in (2, 3)}
            for batch in range(2):
                for b in (2, 3):
                    target = original.blocks[b].mlp(x[b][batch])
                    error = student.blocks[b].mlp.forward(x[b][batch]) - target
                    loss = loss + error.square().sum() / target.square().sum() / 4
            loss.backward()
        torch.nn.utils.clip_grad_norm_(order, 1.0)
        optimiser.param_groups[0]["lr"] = rate(step, config)
        optimiser.step()
    return learned, sum(p.numel() for p in order)


@pytest.mark.parametrize("fit", ["tokens", "hidden"])
@pytest.mark.parametrize(("rank", "trained"), [(3, True), (3, False), (0, True)])
def test_it_is_what_a_plain_loop_trains(original, pairs, tiny_data, fit, rank, trained):
    config = Calr(rank=rank, pairs=trained, fit=fit, **SMALL | {"validation": 0})
    before = pairs.fingerprint, original.fingerprint
    made, report = config.apply(pairs, data=tiny_data, original=original)
    train = sequences("wikitext", pairs, tiny_data, length=64, validation=0).train
    learned, count = plain_loop(pairs, original, config, train)
    assert report["parameters"] == count
    assert ranks_beside(made) == ({2: 3, 3: 3} if rank else {})
    for b in (2, 3):
        found = {name: made.linears(b)[name] for name in MLP}
        for name, pair in found.items():
            expected = learned[b].get(name)
            assert isinstance(pair, LowRank) and pair.rank == 6
            if expected is None:
                assert all(torch.equal(pair.factor(f), pairs.linears(b)[name].factor(f)) for f in "AB")
                continue
            product = expected[1] @ expected[0]
            assert (pair.weight - product).norm() < 5e-3 * product.norm(), name
            assert (product - pairs.linears(b)[name].weight).norm() > 1e-2 * product.norm()
        if rank:
            A, B = made.blocks[b].mlp.path
            product = learned[b]["path"][1] @ learned[b]["path"][0]
            assert (B @ A - product).norm() < 1e-2 * product.norm() and product.norm() > 1e-3
    changed = {k for k, t in weights(pairs).items() if not torch.equal(t, weights(made)[k])}
    assert changed == {f"model.layers.{b}.mlp.{n}.weight" for b in (2, 3) for n in MLP if trained}
    assert (dataclasses.replace(pairs).fingerprint, dataclasses.replace(original).fingerprint) == before
    assert not any(p.requires_grad for p in made.model.parameters()) and not made.model.training
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("fit", ["tokens", "hidden"])
def test_the_best_loss_is_that_of_the_model_that_comes_out(original, pairs, tiny_data, fit):
    config = Calr(rank=8, fit=fit, **SMALL | {"steps": 30})
    made, report = config.apply(pairs, data=tiny_data, original=original)
    ids = sequences("wikitext", pairs, tiny_data, length=64, validation=4).held_out.ids

    def loss(model):
        if fit == "tokens":
            return model.model(ids, labels=ids).loss.item()
        halves = [[measured(model, original, some, b) ** 2 for b in (2, 3)] for some in (ids[:2], ids[2:])]
        return sum(map(sum, halves)) / 4

    with torch.no_grad():
        first, best = loss(pairs), loss(made)
    assert first == pytest.approx(report["validation"][0]["loss"], rel=1e-3)
    assert best == pytest.approx(report["best_loss"], rel=1e-3) and best < first - (1 if fit == "tokens" else 0.05)


def test_padding_and_other_answers_do_not_count(original, pairs, tiny_data):
    """Questions are packed into sequences with padding: the loss on outputs leaves its tokens out."""
    config = Calr(rank=3, fit="hidden", text="trivia", **SMALL | {"length": 128})
    report = config.apply(pairs, data=tiny_data, original=original)[1]
    assert report["filled"] < 1 and report["best_loss"] < report["validation"][0]["loss"]


@pytest.mark.parametrize("fit", ["tokens", "hidden"])
def test_autocast_changes_little_and_a_dead_run_goes_on(original, pairs, tiny_data, tmp_path, monkeypatch, fit):
    config, step = Calr(rank=3, fit=fit, **SMALL | {"autocast": True}), Training.step
    whole, report = config.apply(pairs, data=tiny_data, original=original)
    plain = dataclasses.replace(config, autocast=False).apply(pairs, data=tiny_data, original=original)[1]
    assert report["best_loss"] != plain["best_loss"]
    assert report["best_loss"] == pytest.approx(plain["best_loss"], rel=0.05)

    def dying(self, train, number):
        if number == 4:
            raise KeyboardInterrupt
        return step(self, train, number)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Training, "step", dying)
        config.apply(pairs, data=tiny_data, work=tmp_path, original=original)
    again, report = config.apply(pairs, data=tiny_data, work=tmp_path, original=original)
    assert report["resumed_at"] == 2
    for b in (2, 3):
        (path, found), (other, expected) = products(again, b), products(whole, b)
        assert all(map(torch.equal, path, other))
        assert all(torch.equal(t, u) for n in MLP for t, u in zip(found[n], expected[n], strict=True))
    fresh = dataclasses.replace(config, pairs=False).apply(pairs, data=tiny_data, work=tmp_path, original=original)[1]
    assert fresh["resumed_at"] == 0 and len(list(tmp_path.iterdir())) == 2


def test_a_block_that_the_plan_repeats(original, tiny_data):
    """Its copies share their pairs, so both training and paths would set them apart."""
    twice = apply_plan(original, (0, 1, 2, 2))
    small = paired(twice, tiny_data)
    for fit in ("tokens", "closed"):
        with pytest.raises(BadInput, match="calr corrects block 2, whose pairs block 3 has too"):
            Calr(rank=3, fit=fit, **SMALL).apply(small, data=tiny_data, original=twice)


# ---------------------------------------------------------------- sizes, files and other stages


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_it_reads_back_and_its_size_was_foretold(tiny, tiny_data, tmp_path, kind, dtype):
    folder = save_checkpoint(tiny(kind, layers=4), tmp_path / "subject")
    low = LowRankStage(rank=6, linears=MLP, windows=4, length=64)
    stages = low, Calr(rank=4, **SMALL), Rtn(group=16), Lora(rank=2, **TRAINED)
    foretold = forecast(Recipe(stages, ("",) * 4), stand_in(folder, dtype), lambda n: None)
    assert [f.label for f in foretold][1] == "Lr6+CALR4"
    for n in (2, 3, 4):
        out = compress(folder, Recipe(stages[:n], ("",) * n), tmp_path / str(n), data=tiny_data, dtype=dtype)
        made = load_artifact(out)
        assert foretold[n - 1].parameters == sizes(made)["parameters"], n
        assert foretold[n - 1].disk_bytes == predicted_disk_bytes(made), n
        assert foretold[n - 1].disk_bytes == sum(f.stat().st_size for f in out.rglob("*.safetensors")), n
        assert ranks_beside(made) == dict.fromkeys(range(4), 4)
        record = json.loads((out / "artifact.json").read_text())
        assert record["fingerprint"] == made.fingerprint
    assert foretold[1].parameters - foretold[0].parameters == 4 * 4 * 2 * D
    assert load_artifact(tmp_path / "2").linears(0)["up_proj"].encoding == "lowrank:6:dense:dense"
    assert load_artifact(tmp_path / "3").linears(0)["up_proj"].encodings[0].startswith("int4/")


def test_a_label_is_a_recipe(original, tiny_data, tmp_path):
    folder = save_checkpoint(original, tmp_path / "subject")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "label: Lr8+CALR4\nstages:\n"
        "  - lowrank: {rank: 8, windows: 4, length: 64}\n"
        "  - calr: {rank: 4, steps: 2, length: 64, batch: 2, validation: 2}\n"
    )
    out = compress(folder, recipe, tmp_path / "out", data=tiny_data)
    made, record = load_subject(out), json.loads((out / "artifact.json").read_text())
    assert record["label"] == "Lr8+CALR4" and ranks_beside(made) == dict.fromkeys(range(4), 4)
    assert record["reports"][1]["blocks"] == [0, 1, 2, 3] and made.fingerprint == record["fingerprint"]
    assert isinstance(made.linears(0)["q_proj"], LowRank)  # all seven became pairs, and those of MLPs were trained
    with pytest.raises(BadInput, match="a plain checkpoint cannot hold"):
        compress(folder, recipe, tmp_path / "plain", data=tiny_data, packed=False)
    with pytest.raises(BadInput, match="a GGUF file cannot hold"):
        export_gguf(made, tmp_path / "out.gguf")
    one = costs(made, 1)
    assert sum(o.macs for o in one.operations if o.name.endswith(".beside")) == 4 * 4 * 2 * D


def test_stages_after_it(original, pairs, ids, tiny_data):
    made = Calr(rank=4, fit="closed", windows=4, length=64).apply(pairs, data=tiny_data, original=original)[0]
    for stage in (Rtn(bits=8, group=16), Gptq(bits=8, group=16, windows=4, length=64)):
        low, _ = stage.apply(made, data=tiny_data)
        assert low.linears(2)["up_proj"].is_quantised and ranks_beside(low) == {2: 4, 3: 4}
        assert all(map(torch.equal, low.blocks[2].mlp.path, made.blocks[2].mlp.path))
        assert (logits(low, ids) - logits(made, ids)).norm() < 0.1 * logits(made, ids).norm()
    lora, report = Lora(rank=2, **TRAINED).apply(made, data=tiny_data)
    assert ranks_beside(lora) == {2: 4, 3: 4} and report["best_loss"] < report["validation"][0]["loss"]
    assert all(map(torch.equal, lora.blocks[2].mlp.path, made.blocks[2].mlp.path))
    corrected, _ = Eora(rank=2, windows=4, length=64).apply(low, data=tiny_data, original=made)
    assert ranks_beside(corrected) == {2: 4, 3: 4}
    fewer, _ = Depth(blocks=[2]).apply(made, data=tiny_data)
    assert ranks_beside(fewer) == {2: 4} and torch.equal(logits(fewer, ids), logits(remove(made, [2]), ids))
    with pytest.raises(BadInput, match="tune trains whole weights"):
        Tune(blocks=1, **TRAINED).apply(made, data=tiny_data)


def test_what_may_come_before_and_after():
    low = LowRankStage(rank=6, linears=MLP)
    assert Calr(rank=4).after([low], Shape(4, {})) == Shape(4, {})
    assert Calr(rank=4).after([Depth(remove=1), Width(2, 4), low]) is None
    for previous, before in (
        ([], "at the beginning"), ([Width(2, 4)], "after W2:4"), ([low, Width(2, 4, linears="q_proj")], "after W2:4"),
        ([low, Calr()], "after CALR32"), ([low, Rtn()], "after R"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=f"calr {before} has no pairs to correct: expected lowrank"):
            Calr().after(previous)
    with pytest.raises(BadInput, match="eora after CALR32"):
        Eora().after([low, Calr()])


def test_what_cannot_be_corrected(original, pairs, tiny_data):
    def fails(message, subject=pairs, before=original, **settings):
        with pytest.raises(BadInput, match=message):
            Calr(**{"rank": 3} | SMALL | settings).apply(subject, data=tiny_data, original=before)

    fails("calr needs the subject before lowrank at hand", before=None)
    fails("calr needs the subject before lowrank at hand: .* of as many blocks", before=remove(original, [0]))
    for fit in calr.FITS:
        fails("rank 33 of a path: the model has 32 features", rank=33, fit=fit)
        fails("none is: expected lowrank with linears", subject=original, fit=fit)
        present = with_paths(pairs, {2: calr.start(Calr(rank=2), pairs, 2)})
        fails("block 2 has a path already: expected calr once", subject=present, fit=fit)
    fails(
        "none is: expected lowrank with linears",
        paired(original, tiny_data, linears=("q_proj", "gate_proj", "up_proj")),
    )
    # an MLP that was removed before has no pairs, and its block is left alone
    lamed = without_parts(original, {2: "mlp"})
    made = Calr(rank=3, fit="closed", windows=4, length=64).apply(
        paired(lamed, tiny_data), data=tiny_data, original=lamed
    )[0]
    assert ranks_beside(made) == {3: 3}
    # factors that are quantised, or have a correction, stay; a path beside them can be trained
    low = paired(original, tiny_data, rank=12, bits=8)
    fails("blocks.2.gate_proj is lowrank:12:int8.*: calr trains dense factors", subject=low)
    alone, _ = Calr(rank=3, pairs=False, **SMALL).apply(low, data=tiny_data, original=original)
    assert ranks_beside(alone) == {2: 3, 3: 3}
    assert alone.linears(2)["up_proj"].encoding == low.linears(2)["up_proj"].encoding
    adapted = pairs.copy(unpack=False)
    correction = torch.zeros(1, D), torch.zeros(H, 1)
    replace(adapted.blocks[2], "up_proj", adapt(adapted.linears(2)["up_proj"], *correction))
    fails("blocks.2.up_proj .*correction: calr trains dense factors", subject=adapted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fit": "close"}, "unknown fit of calr 'close'"),
        ({"rank": -1}, "rank -1 with fit tokens"),
        ({"rank": 0, "fit": "closed"}, "rank 0 with fit closed and pairs True: expected a rank of at least 1"),
        ({"rank": 0, "fit": "none"}, "rank 0 with fit none"),
        ({"rank": 0, "pairs": False}, "rank 0 with fit tokens and pairs False"),
        ({"windows": 0}, "windows"),
        ({"text": "c4"}, "unknown text of CALR 'c4'"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(BadInput, match=message):
        Calr(**settings)


def test_a_forecast_refuses_what_the_run_would(tiny, tmp_path):
    folder = save_checkpoint(tiny(layers=4), tmp_path / "subject")
    low = LowRankStage(rank=6, linears=("q_proj", "up_proj"))
    for stages, message in (
        ((low, Calr(rank=4)), "two: calr corrects MLPs"),
        ((LowRankStage(rank=6), Calr(rank=33)), "two: rank 33 of a path: the model has 32 features"),
        ((LowRankStage(rank=6, bits=8), Calr(rank=3)), "two: .*calr trains dense factors"),
    ):
        with pytest.raises(BadInput, match=message):
            forecast(Recipe(stages, ("one", "two")), stand_in(folder), lambda n: None)


def test_labels():
    for stage in (Calr(), Calr(rank=0), Calr(rank=7, fit="closed"), Calr(rank=7, fit="hidden"), Calr(fit="none")):
        assert Calr.from_label(stage.label) == stage
    assert Calr().label == "CALR32" and Calr(rank=4, fit="closed").label == "CALR4-closed"
    assert Calr.from_label("CALR") is None
    assert Label.parse("Lr6+CALR32").in_words.endswith("linear paths of rank 32 beside MLPs, trained on text")
    assert Calr(rank=0).in_words == "the pairs of MLPs trained"
    with pytest.raises(BadInput):
        Calr.from_label("CALR" + "9" * 30)
