"""LASER against torch's SVD, and its search against a model made and asked for every candidate by itself."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from thesislib.compress import laser as module
from thesislib.compress.depth import Depth
from thesislib.compress.eora import Eora
from thesislib.compress.gptq import Rtn
from thesislib.compress.laser import MLP, Laser, cuts, with_variants
from thesislib.compress.lowrank import LowRankStage
from thesislib.compress.relevance import Items, choices, outcomes, outcomes_of
from thesislib.compress.stage import STAGES, Shape
from thesislib.compress.width import Width
from thesislib.errors import BadInput
from thesislib.files import write_whole
from thesislib.formats.artifact import load_artifact, save_artifact
from thesislib.formats.load import save_checkpoint
from thesislib.formats.sizes import sizes
from thesislib.model.blocks import with_projections, without_parts
from thesislib.model.forward import blocks_run
from thesislib.model.layers import LINEARS, adapt
from thesislib.model.sparse import pack_all
from thesislib.pipeline.forecast import forecast, stand_in
from thesislib.pipeline.label import Label
from thesislib.pipeline.recipe import Recipe, parse_label

KINDS = ["llama", "mistral", "qwen2", "qwen3", "smollm3"]
FEW = {"shares": [0.05, 0.3], "task": "piqa", "items": 12}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("asked")
    rows = "".join(
        f'{{"goal": "move {i}", "sol1": "walk to {i}", "sol2": "stand on {i + 7}", "label": {i % 2}}}\n'
        for i in range(60)
    )
    (root / "piqa").mkdir()
    write_whole(root / "piqa" / "validation.jsonl", rows)
    return str(root)


def logits(subject):
    ids = torch.randint(0, 250, (3, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return subject.model(ids, use_cache=False).logits


def by_svd(weight, rank):
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).to(weight.dtype), float(s[rank:].norm() / s.norm())


def dense_with(subject, block, name, weight):
    """A whole copy with another weight."""
    copy = subject.copy()
    copy.linears(block)[name].weight.data = weight
    return copy


# ---------------------------------------------------------------- one weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "share", "rank"), [("down_proj", 0.1, 3), ("k_proj", 0.01, 1), ("up_proj", 0.99, 31)])
def test_a_given_weight_is_torchs_truncated_svd(tiny, kind, name, share, rank):
    subject = tiny(kind, layers=3)
    before = dataclasses.replace(subject).fingerprint
    made, report = Laser(block=1, linear=name, share=share).apply(subject)
    weight, error = by_svd(subject.linears(1)[name].weight, rank)
    torch.testing.assert_close(made.linears(1)[name].weight, weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(made), logits(dense_with(subject, 1, name, weight)), rtol=1e-3, atol=1e-3)
    assert report["chosen"].pop("relative_error") == pytest.approx(error, abs=1e-5)
    assert report == {"chosen": {"block": 1, "linear": name, "share": share, "rank": rank}}
    for b, other in itertools.product(range(3), LINEARS):  # all else is shared, and biases stay
        same = made.linears(b)[other].weight is subject.linears(b)[other].weight
        assert same == ((b, other) != (1, name)) and made.linears(b)[other].bias is subject.linears(b)[other].bias
    assert sizes(made)["parameters"] == sizes(subject)["parameters"]
    assert dataclasses.replace(subject).fingerprint == before


def test_the_whole_rank_is_the_dense_model(tiny):
    subject = tiny(layers=3)
    made, report = Laser(block=2, linear="gate_proj", share=1).apply(subject)
    assert torch.equal(logits(made), logits(subject)) and made.fingerprint == subject.fingerprint
    assert report["chosen"]["rank"] == 32 and report["chosen"]["relative_error"] == 0


def test_ranks_of_several_shares_are_one_decomposition(tiny):
    linear = tiny(layers=1).linears(0)["up_proj"]
    shares = [0.001, 0.5, 1.0, 0.25]
    for cut, rank in zip(cuts((0, "up_proj"), linear, shares), (1, 16, 32, 8), strict=True):
        weight, error = by_svd(linear.weight, rank)
        torch.testing.assert_close(cut.module.weight, weight, rtol=1e-4, atol=1e-5)
        assert torch.linalg.matrix_rank(cut.module.weight, rtol=1e-4) == rank == cut.facts["rank"]
        assert cut.facts["relative_error"] == pytest.approx(error, abs=1e-5)
    zero = torch.nn.Linear(4, 4, bias=False)
    zero.weight.data.zero_()
    ((cut),) = cuts((0, "up_proj"), zero, [0.5])
    assert not cut.module.weight.any() and cut.facts["relative_error"] == 0


def test_bfloat16_is_rounded_once(tiny):
    subject = tiny(layers=2)
    subject.model.to(torch.bfloat16)
    made, _ = Laser(block=0, linear="down_proj", share=0.25).apply(subject)
    found = made.linears(0)["down_proj"].weight
    exact, _ = by_svd(subject.linears(0)["down_proj"].weight.double(), 8)
    assert found.dtype == torch.bfloat16 and (found == exact.to(torch.bfloat16)).float().mean() > 0.99


# ---------------------------------------------------------------- the search


@pytest.mark.parametrize("kind", KINDS)
def test_every_candidate_is_that_model_by_itself(tiny, data, kind):
    subject = tiny(kind, layers=3, seed=3)
    config = Laser(**FEW)
    made, report = config.apply(subject, data=data)
    items = choices("piqa", data, 12)
    whole = outcomes(subject, items, [])
    assert report["whole"] == pytest.approx(
        {"score": whole.likelihood.mean(), "margin": whole.margin.mean(), "accuracy": whole.correct.mean()}
    )
    assert report["task"] == "piqa" and report["items"] == 12
    places = list(itertools.product(range(3), MLP, FEW["shares"]))
    assert [(t["block"], t["linear"], t["share"]) for t in report["tried"]] == places
    found = []
    for (b, name, _), tried in zip(places, report["tried"], strict=True):
        weight, error = by_svd(subject.linears(b)[name].weight, tried["rank"])
        alone = outcomes(dense_with(subject, b, name, weight), items, [])
        gains = alone.likelihood[0] - whole.likelihood[0]
        expected = {
            "relative_error": error, "score": alone.likelihood.mean(), "margin": alone.margin.mean(),
            "accuracy": alone.correct.mean(), "gain": gains.mean(), "standard_error": gains.std(ddof=1) / 12**0.5,
        }  # fmt: skip
        assert {n: tried[n] for n in expected} == pytest.approx(expected, rel=1e-3, abs=1e-3)
        found.append(float(gains.mean()))
    best = int(np.argmax(found))
    assert found[best] > 0 and report["chosen"] == report["tried"][best]
    chosen = {n: report["chosen"][n] for n in ("block", "linear", "share")}
    assert made.fingerprint == Laser(**chosen).apply(subject)[0].fingerprint
    assert outcomes(made, items, []).likelihood.mean() == pytest.approx(report["chosen"]["score"], abs=1e-4)
    assert json.loads(json.dumps(report)) == report


def test_only_what_is_asked_for_is_tried(tiny, data):
    subject = tiny(layers=4)
    _, report = Laser(blocks=[3, 1], linears=["q_proj", "blocks.1.down_proj"], **FEW).apply(subject, data=data)
    assert [(t["block"], t["linear"]) for t in report["tried"][::2]] == [(1, "q_proj"), (1, "down_proj"), (3, "q_proj")]
    part, _ = Depth(remove=1, blocks=None, metric="magnitude", part="mlp").apply(tiny(layers=8))
    tried = Laser(**FEW).apply(part, data=data)[1]["tried"]
    assert len({t["block"] for t in tried}) == 7  # a block without an MLP has nothing to cut


def test_what_comes_before_a_block_runs_once_for_all_its_candidates(tiny):
    subject = tiny(layers=5)
    some = [cut for name in MLP for cut in cuts((3, name), subject.linears(3)[name], [0.1, 0.5])]
    longer, plans = with_variants(subject, 3, some)
    assert blocks_run(plans) == (3 + 6 * 2, 6 * 5)
    assert longer.parameters - subject.parameters == sum(
        cut.module.weight.numel() for cut in some
    )  # the rest is shared


def test_next_tokens_choose_too(tiny, tiny_data):
    subject = tiny(layers=2)
    config = Laser(task="next_token", shares=[0.1], linears="down_proj", windows=3, length=40)
    _, report = config.apply(subject, data=tiny_data)
    ids = config.ids(subject.tokenizer, tiny_data)
    for tried in report["tried"]:
        weight, _ = by_svd(subject.linears(tried["block"])["down_proj"].weight, 3)
        with torch.no_grad():
            loss = dense_with(subject, tried["block"], "down_proj", weight).model(ids, labels=ids).loss
        assert tried["score"] == pytest.approx(-loss.item(), abs=1e-4)
    assert report["items"] == 3 and config.items is None


def test_a_model_that_nothing_improves_stays(tiny, data, monkeypatch):
    subject = tiny(layers=2)
    made, report = Laser(**FEW | {"shares": [1.0]}).apply(subject, data=data)  # no change is no gain
    assert made is subject and report["chosen"] is None and all(t["gain"] == 0 for t in report["tried"])

    def worse(subject, items, plans):
        right = outcomes_of(subject, items, plans)
        if len(plans) == 1:
            return right
        return dataclasses.replace(right, likelihood=right.likelihood - 100)

    monkeypatch.setattr(module, "outcomes_of", worse)
    made, report = Laser(**FEW).apply(subject, data=data)
    assert made is subject and report["chosen"] is None and max(t["gain"] for t in report["tried"]) < 0


def test_a_model_at_chance_is_no_matter_and_a_broken_one_is(tiny, data, monkeypatch):
    subject = tiny(layers=2)
    items = choices("piqa", data, 12)
    hopeless = [dataclasses.replace(item, endings=("the same", "the same")) for item in items.asked]
    monkeypatch.setattr(module, "choices", lambda *_a, **_k: Items("piqa", hopeless, "acc", 0.5))
    assert len(Laser(**FEW).apply(subject, data=data)[1]["tried"]) == 12
    broken = dense_with(subject, 0, "q_proj", torch.full((32, 32), torch.nan))
    with pytest.raises(BadInput, match="the model's scores are not finite"):
        Laser(**FEW | {"linears": "blocks.1.*"}).apply(broken, data=data)


def test_one_item_has_no_standard_error(tiny, data):
    _, report = Laser(**FEW | {"items": 1}).apply(tiny(layers=1), data=data)
    assert {t["standard_error"] for t in report["tried"]} == {None}


# ---------------------------------------------------------------- what cannot be


def changed(tiny, how):
    subject = tiny(layers=3)
    if how == "quantised":
        return Rtn(group=16, linears="blocks.1.up_proj").apply(subject)[0]
    if how == "pair":
        return LowRankStage(rank=4, method="svd", linears="blocks.1.up_proj").apply(subject)[0]
    if how == "corrected":
        up = subject.linears(1)["up_proj"]
        return with_projections(subject, {(1, "up_proj"): adapt(up, torch.ones(2, 32), torch.ones(64, 2))})
    pruned = Width(2, 4, metric="magnitude", linears="blocks.1.up_proj").apply(subject)[0]
    return pack_all(pruned) if how == "packed" else pruned


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("quantised", "up_proj of block 1 is quantised: cut ranks before quantising"),
        ("pair", "up_proj of block 1 is no dense weight but lowrank:4"),
        ("corrected", "up_proj of block 1 has a low-rank correction"),
        ("pruned", "up_proj of block 1 has zeros that would be filled: cut ranks before pruning weights"),
        ("packed", "up_proj of block 1 is no dense weight but 2:4"),
    ],
)
def test_weights_that_cannot_be_cut_are_named(tiny, data, how, message):
    subject = changed(tiny, how)
    for config in (Laser(**FEW), Laser(block=1, linear="up_proj", share=0.1)):
        with pytest.raises(BadInput, match=message):
            config.apply(subject, data=data)
    assert Laser(blocks=[0, 2], **FEW).apply(subject, data=data)[1]["tried"]  # what is elsewhere may be anything
    assert Laser(block=1, linear="down_proj", share=0.1).apply(subject)[1]["chosen"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block": 1, "share": 0.1}, "laser has block and share: expected block, linear and share together"),
        ({"block": 1, "linear": "up_prj", "share": 0.1}, "unknown projection 'up_prj': did you mean 'up_proj'"),
        ({"block": -1, "linear": "up_proj", "share": 0.1}, r"blocks \[-1\]: expected different indices from 0 on"),
        (
            {"block": 1, "linear": "up_proj", "share": 0},
            r"share 0: expected a share of the rank in \(0, 1\], e.g. 0.01",
        ),
        (
            {"block": 1, "linear": "up_proj", "share": 0.1, "task": "piqa"},
            "task is 'piqa': with block, linear and share",
        ),
        ({"shares": [0.1, 1.5]}, r"share 1.5: expected a share of the rank in \(0, 1\]"),
        ({"shares": [float("nan")]}, "share nan"),
        ({"shares": ["a"]}, "share a"),
        ({"shares": []}, r"shares \[\]: expected at least one of each"),
        ({"shares": [0.1, 0.1]}, "different shares"),
        ({"linears": []}, r"linears \[\] and shares"),
        ({"linears": ["up_prj"]}, "unknown projection or pattern 'up_prj'"),
        ({"blocks": [1, 1]}, r"blocks \[1, 1\]: expected different indices"),
        ({"blocks": []}, r"blocks \[\]: expected different indices from 0 on, at least one"),
        ({"blocks": ["a"]}, r"blocks \['a'\]: expected different"),
        ({"task": "pika"}, "unknown task 'pika': did you mean 'piqa'"),
        ({"task": "winogrande"}, "scores one ending with several contexts"),
        ({"task": "next_token", "items": 5}, "items is 5: only a task of questions has items"),
        ({"items": 0}, "parameter 'items' is 0: expected at least 1"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(BadInput, match=message):
        Laser(**settings)


def test_blocks_that_cannot_be(tiny, data):
    for config in (Laser(block=6, linear="up_proj", share=0.1), Laser(blocks=[2, 6], **FEW)):
        with pytest.raises(BadInput, match="block 6 is out of range: the model has blocks 0 to 5"):
            config.apply(tiny(), data=data)
        with pytest.raises(BadInput, match="block 6 is out of range"):
            config.after([], Shape(6, {}))
    with pytest.raises(BadInput, match=r"no projection fits 'blocks.9.\*'"):
        Laser(linears="blocks.9.*", **FEW).apply(tiny(), data=data)
    lame = without_parts(tiny(), {2: "mlp"})
    with pytest.raises(BadInput, match="block 2 has no up_proj: expected a projection that is still there"):
        Laser(block=2, linear="up_proj", share=0.1).apply(lame)
    with pytest.raises(BadInput, match="block 2 has no gate_proj or up_proj or down_proj"):
        Laser(blocks=[1, 2], **FEW).apply(lame, data=data)
    with pytest.raises(BadInput, match="task 'piqa' has 20 items to rank by: expected at most that many instead of 21"):
        Laser(task="piqa", items=21).apply(tiny(), data=data)
    for label in ("Q+Z~", "W+Z~", "W1:8+E+Z~"):
        with pytest.raises(BadInput, match="Z~ after [QWE] would cut weights that it cannot change: put it before"):
            parse_label(label).check()


# ---------------------------------------------------------------- in recipes


def test_labels():
    assert Laser().label == "Z~" and Laser.from_label("Z~") == Laser() == Laser(linears=list(MLP), task="arc_easy")
    late = Laser(block=27, linear="down_proj", share=0.01)
    assert late.label == "Z27-down-1%" and Laser.from_label("Z27-down-1%") == late
    assert Laser.from_label("Z27-down-0.5%") == dataclasses.replace(late, share=0.005)
    assert Label.parse("D2+Z27-down-1%").in_words == (
        "2 blocks removed, block 27's down_proj cut to 1 % of its rank (LASER)"
    )
    assert Label.parse("Z~").in_words == "one weight cut to the low rank that answers best (LASER)"
    assert Laser.from_label("Z") is None and Laser.from_label("Z2-head-1%") is None
    for other in STAGES.values():
        assert other is Laser or not any(other.from_label(label) for label in ("Z~", late.label))
    with pytest.raises(BadInput, match="eora after Z~ has nothing to correct"):
        Eora().after([Laser()])


def test_it_keeps_the_sizes_and_reads_back(tiny, tmp_path):
    subject = tiny(layers=3)
    folder = save_checkpoint(subject, tmp_path / "subject")
    stages = Laser(), Laser(block=1, linear="down_proj", share=0.1), Width(2, 4, metric="magnitude"), Rtn(group=16)
    foretold = forecast(Recipe(stages, ("",) * 4), stand_in(folder), lambda n: None)
    made, _ = stages[1].apply(subject)
    assert foretold[0].parameters == foretold[1].parameters == sizes(made)["parameters"] == sizes(subject)["parameters"]
    assert foretold[0].disk_bytes == foretold[1].disk_bytes and foretold[3].disk_bytes < foretold[2].disk_bytes
    again = load_artifact(save_artifact(made, tmp_path / "made"))
    assert torch.equal(logits(again), logits(made))
    with pytest.raises(BadInput, match="two: block 7 is out of range"):
        some = Depth(remove=1, protect_first=0, protect_last=0), Laser(block=7, linear="down_proj", share=0.1)
        forecast(Recipe(some, ("one", "two")), stand_in(folder), lambda n: None)
