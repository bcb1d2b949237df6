"""LaCo against its formula in three lines, its public code's loop, and whole models run with merged blocks."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from thesislib.compress.eora import Eora
from thesislib.compress.gptq import Rtn
from thesislib.compress.laco import Laco, merged, similarities
from thesislib.compress.width import Width
from thesislib.errors import BadInput
from thesislib.formats.artifact import load_artifact, save_artifact
from thesislib.model.blocks import apply_plan, remove, without_parts
from thesislib.model.layers import adapt
from thesislib.model.sparse import pack_all
from thesislib.pipeline.forecast import forecast
from thesislib.pipeline.label import Label
from thesislib.pipeline.recipe import parse_label

IDS = torch.randint(0, 250, (5, 20), generator=torch.Generator().manual_seed(2))
KINDS = ["llama", "mistral", "qwen2", "qwen3", "smollm3"]


@pytest.fixture(autouse=True)
def calibration(monkeypatch):
    monkeypatch.setattr("thesislib.compress.stage.calibration_windows", lambda *a: IDS)


def states(subject):
    with torch.no_grad():
        return subject.model.model(IDS, use_cache=False).last_hidden_state


def cosine(subject, original):
    """As the public code: a window's states flattened, the mean over windows."""
    pairs = zip(states(subject).double(), states(original).double(), strict=True)
    return sum(float(a.flatten() @ b.flatten() / a.norm() / b.norm()) for a, b in pairs) / len(IDS)


def with_biases(subject):
    for b in range(subject.depth):
        for m in subject.linears(b).values():
            if m.bias is not None:
                m.bias.data.normal_(generator=torch.Generator().manual_seed(b))
    return subject


@pytest.mark.parametrize("form", ["paper", "public"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_window_of_one_is_the_dense_model(tiny, kind, form):
    subject = tiny(kind)
    assert torch.equal(states(merged(subject, 2, 1, form)), states(subject))


@pytest.mark.parametrize("kind", KINDS)
def test_the_papers_form_is_its_formula(tiny, kind):
    subject = with_biases(tiny(kind))
    before = subject.fingerprint
    short = merged(subject, 1, 4, "paper")
    for name, found in short.linears(1).items():
        w = [subject.linears(b)[name].weight.double() for b in range(1, 5)]
        torch.testing.assert_close(found.weight.double(), w[1] + w[2] + w[3] - 2 * w[0], rtol=1e-6, atol=1e-6)
        if found.bias is not None:
            b = [subject.linears(b)[name].bias.double() for b in range(1, 5)]
            torch.testing.assert_close(found.bias.double(), b[1] + b[2] + b[3] - 2 * b[0], rtol=1e-6, atol=1e-6)
    assert short.plan == (0, 1, 5) and short.depth == short.model.config.num_hidden_layers == 3
    kept = dict(subject.blocks[1].named_parameters()), dict(short.blocks[1].named_parameters())
    assert all(kept[1][n] is kept[0][n] for n in kept[0] if "norm" in n)
    assert subject.fingerprint == type(subject)(subject.model, subject.tokenizer, "again").fingerprint == before


def public_code(subject, base, count):
    """The notebook's loop: each difference is to the base that is updated already."""
    copy = subject.copy()
    for later in range(base + 1, base + count):
        for name, m in copy.linears(base).items():
            m.weight.data.add_(subject.linears(later)[name].weight.data - m.weight.data)
    return remove(copy, range(base + 1, base + count))


def test_the_public_form_is_the_last_block_with_the_firsts_norms(tiny):
    subject = tiny()
    for i, block in enumerate(subject.blocks):
        block.input_layernorm.weight.data.normal_(1, 0.3, generator=torch.Generator().manual_seed(i))
    short = merged(subject, 1, 4, "public")
    assert all(m is subject.linears(4)[n] for n, m in short.linears(1).items())
    assert short.blocks[1].input_layernorm is subject.blocks[1].input_layernorm
    torch.testing.assert_close(states(short), states(public_code(subject, 1, 4)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(states(short), states(merged(subject, 1, 4, "paper")), atol=0.1)


def test_the_forms_agree_on_windows_of_two(tiny):
    one, two = (merged(tiny(), 2, 2, form) for form in ("paper", "public"))
    torch.testing.assert_close(states(one), states(two), rtol=1e-5, atol=1e-5)


def test_equal_blocks_lose_nothing_but_their_number(tiny):
    subject = tiny(layers=5)
    for b in (2, 3):
        subject.blocks[b].load_state_dict(subject.blocks[1].state_dict())
    for form in ("paper", "public"):
        expected = states(apply_plan(subject, [0, 1, 4]))
        torch.testing.assert_close(states(merged(subject, 1, 3, form)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mistral", "smollm3"])
def test_similarities_are_those_of_whole_models(tiny, kind):
    more = {"sliding_window": 6} if kind == "mistral" else {}
    subject = tiny(kind, **more)
    windows = [(0, 3), (1, 2), (3, 3), (4, 2)]
    with torch.no_grad():
        found = dict(similarities(subject, windows, "paper", IDS, states(subject)))
    for first, size in windows:
        assert found[first] == pytest.approx(cosine(merged(subject, first, size, "paper"), subject), abs=1e-5)


def test_the_greedy_search_merges_the_best_window_each_time(tiny):
    subject = tiny(layers=8)
    short, report = Laco(remove=3, merge=3, lowest=1, highest=6).apply(subject)
    current, top = subject, 6
    for size, merge in zip((3, 2), report["merges"], strict=True):  # two blocks, then the one that is left
        each = {s: cosine(merged(current, s, size, "paper"), subject) for s in range(1, top - size + 2)}
        assert merge["scores"] == pytest.approx(each, abs=1e-5)
        best = max(each, key=each.get)
        assert merge["similarity"] == pytest.approx(each[best], abs=1e-5)
        current, top = merged(current, best, size, "paper"), top - size + 1
    assert short.depth == 5 and report["removed"] == 3 and torch.equal(states(short), states(current))
    assert json.dumps(report) and len(report["merges"][0]["blocks"]) == 3


def papers_search(subject, merge, low, high, interval, threshold, form):
    """Algorithm 1, as the public code has it, with `high` the last block that may be merged."""
    current, first, done = subject, high - merge + 1, []
    while first >= low:
        size = min(merge, high - first + 1)
        short = merged(current, first, size, form)
        if size > 1 and cosine(short, subject) > threshold:
            current, high = short, high - size + 1
            done.append((first, size))
            first -= interval
        else:
            first -= 1
    return current, done


@pytest.mark.parametrize(("interval", "threshold"), [(1, 0.5), (2, 0.5), (3, 0.2), (1, -1)])
@pytest.mark.parametrize("form", ["paper", "public"])
def test_a_threshold_searches_as_the_paper(tiny, form, interval, threshold):
    subject = tiny(layers=9, initializer_range=0.05)
    config = Laco(threshold=threshold, merge=3, interval=interval, highest=7, lowest=1, form=form)
    short, report = config.apply(subject)
    expected, done = papers_search(subject, 3, 1, 7, interval, threshold, form)
    assert torch.equal(states(short), states(expected)) and len(report["merges"]) == len(done)
    assert report["removed"] == sum(size - 1 for _, size in done) == 9 - short.depth
    gone = {b for merge in report["merges"] for b in merge["blocks"]}
    assert gone <= set(range(1, 8)) and config.label == ("M~" if form == "paper" else "M~P")


def test_a_threshold_that_nothing_reaches_says_what_is_reached(tiny):
    with pytest.raises(
        BadInput, match=r"no window of 3 blocks leaves a similarity above 0.9999: the highest is 0\.\d+"
    ):
        Laco(threshold=0.9999, merge=3).apply(tiny())


def test_the_result_is_an_ordinary_checkpoint_of_the_forecast_size(tiny, tmp_path):
    subject = tiny(layers=6)
    subject.model.model.embed_tokens.weight.data.clamp_(min=0.01)  # its padding token's row is zero
    short, _ = Laco(remove=2, merge=3).apply(subject)
    save_artifact(short, tmp_path / "short")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "short")
    with torch.no_grad():
        torch.testing.assert_close(read(IDS).logits, short.model(IDS).logits)
    again = load_artifact(tmp_path / "short")
    assert again.fingerprint == short.fingerprint and again.plan == short.plan
    (row,) = forecast(parse_label("M2"), tiny(layers=6), lambda n: None)
    on_disk = sum(f.stat().st_size for f in (tmp_path / "short").glob("*.safetensors"))
    assert (row.parameters, row.nonzero, row.disk_bytes) == (short.parameters, short.parameters, on_disk)
    after, _ = Rtn(group=16).apply(Width(2, 4, metric="magnitude").apply(short)[0])  # later stages take it
    assert after.depth == 4


def changed(tiny, how):
    subject = tiny(layers=4)
    if how == "quantised":
        return Rtn(group=16).apply(subject)[0]
    if how == "pruned":
        return Width(2, 4, metric="magnitude").apply(subject)[0]
    if how == "packed":
        return pack_all(Width(2, 4, metric="magnitude").apply(subject)[0])
    if how == "corrected":
        mlp = subject.blocks[2].mlp
        mlp.up_proj = adapt(mlp.up_proj, torch.ones(1, 32), torch.ones(64, 1))
        return subject
    return without_parts(subject, {1: "mlp"})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("quantised", "q_proj of block 0 is quantised: merge blocks before quantising"),
        ("pruned", "q_proj of block 0 has zeros that would be filled: merge blocks before pruning"),
        ("packed", "q_proj of block 0 is no dense weight but 2:4"),
        ("corrected", "up_proj of block 2 has a low-rank correction"),
        ("part", "block 1 has lost its mlp"),
    ],
)
def test_weights_that_cannot_be_merged_are_named(tiny, how, message):
    with pytest.raises(BadInput, match=message):
        Laco(remove=1).apply(changed(tiny, how))


def test_what_lies_outside_the_window_may_be_anything(tiny):
    short, _ = Laco(remove=1, highest=1).apply(changed(tiny, "corrected"))
    assert short.depth == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"remove": 2, "threshold": 0.5}, "either 'remove', a number of blocks, or 'threshold'"),
        ({"remove": 0}, "remove is 0: expected at least 1 block"),
        ({"threshold": 1.0}, r"threshold is 1.0: expected a cosine in \[-1, 1\)"),
        ({"merge": 1}, "merge is 1: a window of fewer than 2 blocks"),
        ({"form": "papr"}, "unknown form 'papr'.*paper"),
        ({"interval": 0}, "interval is 0: expected at least 1 block"),
        ({"interval": 2}, "interval is 2: expected at least 1 block, and 1 without a threshold"),
        ({"lowest": 3, "highest": 3}, "blocks 3 to 3: expected at least two"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(BadInput, match=message):
        Laco(**settings)


def test_depths_that_cannot_be(tiny):
    with pytest.raises(BadInput, match="block 6 is out of range: the model has blocks 0 to 5"):
        Laco(highest=6).apply(tiny())
    with pytest.raises(BadInput, match="cannot merge 4 of blocks 2 to 5 into others: expected at most 3"):
        Laco(remove=4, lowest=2).apply(tiny())
    for label in ("Q+M2", "W+M2", "W1:8+E+M2"):
        with pytest.raises(BadInput, match=r"M2 after [QWE] would merge weights that it cannot change"):
            parse_label(label).check()
    assert Laco(remove=5).apply(tiny())[0].depth == 1


def test_labels():
    assert Laco().label == "M2" and Laco.from_label("M3P") == Laco(remove=3, form="public")
    assert Label.parse("M4+W1:8").in_words.startswith("4 blocks merged into neighbours")
    assert Laco.from_label("M~") is None and Eora().label == "E"
