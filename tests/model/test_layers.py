import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from thesislib.compress.width import Width
from thesislib.errors import BadInput
from thesislib.model import packing
from thesislib.model.blocks import apply_plan
from thesislib.model.layers import (
    Adapted,
    PackedLinear,
    adapt,
    base_of,
    merge,
    merge_all,
    merge_masked,
    merged,
    replace,
    unpack,
    unpack_all,
)
from thesislib.model.sparse import pack_all, semi_structured


def linear(outputs=6, inputs=16, bias=False, seed=0):
    """A random linear, 2 of each 4 inputs zero."""
    generator = torch.Generator().manual_seed(seed)
    made = nn.Linear(inputs, outputs, bias=bias)
    weight = torch.randn(outputs, inputs, generator=generator)
    groups = weight.view(-1, 4)
    groups.scatter_(1, groups.abs().topk(2, 1, largest=False).indices, 0)
    made.weight = nn.Parameter(weight)
    return made.requires_grad_(False)


def correction(rank=3, outputs=6, inputs=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)


def inputs(*shape, seed=2):
    return torch.randn(*shape, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("encoding", (None, "bitmap", "4:8"))
def test_packed_computes_what_the_linear_does(bias, encoding):
    dense = linear(bias=bias)
    packed = PackedLinear.of(dense, encoding)
    assert packed.encoding == (encoding or "2:4") and (packed.in_features, packed.out_features) == (16, 6)
    assert torch.equal(packed(inputs(2, 5)), dense(inputs(2, 5))) and torch.equal(packed.weight, dense.weight)
    assert {k: v.tolist() for k, v in packed.state_dict().items()} == {
        k: v.tolist() for k, v in dense.state_dict().items()
    }
    assert not any("weight" in name for name, _ in packed.named_parameters())


def test_packed_memory_is_what_the_encoding_says():
    packed = PackedLinear.of(linear(32, 64).bfloat16())
    assert (
        sum(b.nbytes for b in packed.buffers())
        == packing.predicted_bytes((32, 64), torch.bfloat16, "2:4")
        == 32 * 64 * 2 * 35 // 64
    )


def test_nothing_to_pack():
    with pytest.raises(BadInput, match="too few zeros for packing to save anything"):
        PackedLinear.of(nn.Linear(16, 6))


def test_a_change_of_type_changes_values_and_never_codes():
    dense = linear()
    packed = PackedLinear.of(dense)
    codes = packed.codes.clone()
    packed.to(torch.bfloat16)
    assert (
        packed.values.dtype == torch.bfloat16 and torch.equal(packed.codes, codes) and packed.codes.dtype == torch.uint8
    )
    assert torch.equal(packed.weight, dense.weight.bfloat16())


def test_copies_are_independent():
    packed = PackedLinear.of(linear(bias=True))
    other, adapted = copy.deepcopy(packed), copy.deepcopy(Adapted(packed, *correction()))
    before = packed.weight.clone()
    other.values.zero_(), adapted.base.values.zero_(), adapted.lora_A.zero_()
    assert torch.equal(packed.weight, before) and other.weight.count_nonzero() == 0


def test_gradients_pass_through_packed_weights():
    """Also where the tables were first made in inference mode, whose tensors autograd refuses to save."""
    for table in vars(packing).values():
        if hasattr(table, "cache_clear"):
            table.cache_clear()
    dense = linear()
    for encoding in ("2:4", "bitmap"):
        packed = PackedLinear.of(dense, encoding)
        with torch.inference_mode():
            packed(inputs(1))
        a, b = (inputs(3).requires_grad_() for _ in range(2))
        adapted = Adapted(packed, *correction())
        adapted.lora_A.requires_grad_(True), adapted.lora_B.requires_grad_(True)
        adapted(a).square().sum().backward()
        A, B = (t.requires_grad_() for t in correction())
        (F.linear(b, dense.weight) + b @ A.T @ B.T).square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
        torch.testing.assert_close((adapted.lora_A.grad, adapted.lora_B.grad), (A.grad, B.grad))


@pytest.mark.parametrize("pack", (False, True))
def test_adapted_adds_its_correction(pack):
    dense, (A, B) = linear(bias=True), correction()
    adapted = Adapted(PackedLinear.of(dense) if pack else dense, A, B)
    x = inputs(2, 5)
    torch.testing.assert_close(adapted(x), x @ (dense.weight + B @ A).T + dense.bias)
    assert adapted.rank == 3 and adapted.in_features == 16 and adapted.out_features == 6
    assert torch.equal(adapted.weight, dense.weight) and torch.equal(adapted.bias, dense.bias)
    assert {k: tuple(v.shape) for k, v in nn.ModuleDict({"q": adapted}).state_dict().items()} == {
        "q.weight": (6, 16), "q.bias": (6,), "q.lora_A": (3, 16), "q.lora_B": (6, 3),
    }  # fmt: skip


def test_a_dense_base_can_be_changed_in_place():
    adapted = Adapted(linear(), *correction())
    adapted.weight.data.zero_()
    assert adapted.base.weight.count_nonzero() == 0


def test_corrections_of_another_type_keep_the_outputs_type():
    dense, (A, B) = linear().bfloat16(), correction()
    y = Adapted(dense, A, B)(inputs(4).bfloat16())
    assert y.dtype == torch.bfloat16
    expected = dense(inputs(4).bfloat16()).float() + inputs(4).bfloat16().float() @ A.T @ B.T
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=5e-2)


def test_adapted_state_goes_round():
    one, other = (nn.Sequential(Adapted(linear(bias=True, seed=s), *correction(seed=s))) for s in (3, 4))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(inputs(2)), other(inputs(2)))
    with pytest.raises(RuntimeError, match="lora_B"):
        other.load_state_dict({k: v for k, v in one.state_dict().items() if "lora_B" not in k})


def test_two_corrections_are_one_of_both_ranks():
    dense, first, second = linear(), correction(3), correction(2, seed=9)
    joined = adapt(adapt(dense, *first), *second)
    x = inputs(5)
    torch.testing.assert_close(joined(x), dense(x) + x @ first[0].T @ first[1].T + x @ second[0].T @ second[1].T)
    assert joined.rank == 5 and joined.base is dense
    with pytest.raises(BadInput, match=r"adapted already: use adapt\(\)"):
        Adapted(joined, *second)


@pytest.mark.parametrize(("A", "B"), [((3, 15), (6, 3)), ((3, 16), (5, 3)), ((3, 16), (6, 2)), ((6, 3), (3, 16))])
def test_corrections_that_do_not_fit(A, B):
    with pytest.raises(BadInput) as caught:
        Adapted(linear(), torch.zeros(A), torch.zeros(B))
    assert str(caught.value) == f"A {A} and B {B} do not fit: expected (r, 16) and (6, r)"


@pytest.mark.parametrize("pack", (False, True))
def test_merging(pack):
    dense, (A, B) = linear(bias=True), correction()
    dense.weight.data[0, :4] = torch.tensor([-0.0, 0.0, 1.0, 0.0])
    adapted = Adapted(PackedLinear.of(dense) if pack else dense, A, B)
    whole, kept = merge(adapted), merge_masked(adapted)
    torch.testing.assert_close(whole.weight, dense.weight + B @ A)
    assert torch.equal(whole.bias, dense.bias) and torch.equal(
        whole(inputs(3)), F.linear(inputs(3), whole.weight, dense.bias)
    )
    zero = dense.weight.view(torch.int32) == 0
    assert kept.weight[zero].view(torch.int32).count_nonzero() == 0 and zero[0].tolist()[:4] == [
        False,
        True,
        False,
        True,
    ]
    assert torch.equal(kept.weight[~zero], whole.weight[~zero]) and packing.smallest(kept.weight) == "2:4"


def test_merging_in_bfloat16_rounds_once():
    dense, (A, B) = linear(seed=5).bfloat16(), (t.bfloat16() for t in correction())
    expected = (dense.weight.double() + B.double() @ A.double()).bfloat16()
    assert torch.equal(merge(Adapted(dense, A, B)).weight, expected)


def test_unpacking():
    dense = linear(bias=True)
    plain = unpack(PackedLinear.of(dense))
    assert type(plain) is nn.Linear and torch.equal(plain.weight, dense.weight) and torch.equal(plain.bias, dense.bias)
    assert not plain.weight.requires_grad and unpack(dense) is dense
    adapted = Adapted(PackedLinear.of(dense), *correction())
    assert type(unpack(adapted).base) is nn.Linear and torch.equal(unpack(adapted)(inputs(2)), adapted(inputs(2)))
    assert unpack(Adapted(dense, *correction())).base is dense


def test_replacing_a_projection(tiny):
    subject = tiny(layers=1)
    new = linear(32, 32)
    replace(subject.blocks[0], "q_proj", new)
    assert subject.linears(0)["q_proj"] is new and subject.blocks[0].self_attn.q_proj is new
    replace(subject.blocks[0], "q_proj", Adapted(new, *correction(2, 32, 32)))
    with pytest.raises(BadInput, match="unknown projection 'k_prj': did you mean 'k_proj'"):
        replace(subject.blocks[0], "k_prj", new)
    with pytest.raises(BadInput, match="unknown projection 'base': expected one of q_proj, k_proj"):
        replace(subject.blocks[0], "base", new)


def test_unpacking_all_keeps_what_is_shared(tiny):
    subject = apply_plan(tiny(layers=2), [0, 1, 1])
    for name, module in subject.linears(1).items():
        packed = module if name == "v_proj" else PackedLinear.of(module, "bitmap")
        packed = Adapted(packed, *correction(2, *module.weight.shape)) if name == "q_proj" else packed
        replace(subject.blocks[1], name, packed)
        replace(subject.blocks[2], name, packed)
    before, fingerprint = subject.linears(2), subject.fingerprint
    assert unpack_all(subject.model) is subject.model
    del subject.__dict__["fingerprint"]
    assert subject.fingerprint == fingerprint
    for name, module in subject.linears(2).items():
        assert module is subject.linears(1)[name] and (module is before[name]) == (name == "v_proj")
        assert type(getattr(module, "base", module)) is nn.Linear


def test_kernels_for_2_4_say_why_not(tiny):
    with pytest.raises(
        BadInput, match=r"2:4 kernels cannot run on 'cpu': expected an NVIDIA GPU of compute capability 8.0 or newer"
    ):
        semi_structured(tiny(layers=1))


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="torch's 2:4 kernels need an NVIDIA GPU of compute capability 8.0 or newer",
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_kernels_for_2_4_compute_the_same(tiny):
    from thesislib.formats.sizes import sizes

    subject = tiny(layers=2, hidden_size=128, intermediate_size=256, head_dim=32, initializer_range=0.05)
    with pytest.raises(BadInput, match=r"cannot run in torch.float32: expected torch.bfloat16 or torch.float16"):
        semi_structured(type(subject)(subject.model.cuda(), subject.tokenizer, subject.name))
    subject.model.to("cuda", torch.bfloat16)
    with pytest.raises(BadInput, match="holds 2:4 weights of a shape"):
        semi_structured(subject)
    for i in range(subject.depth):
        for module in subject.linears(i).values():
            groups = module.weight.data.view(-1, 4)
            groups.scatter_(1, groups.abs().topk(2, 1, largest=False).indices, 0)
    fast, ids = semi_structured(subject), torch.arange(64, device="cuda").view(2, 32)
    assert fast.fingerprint == subject.fingerprint and type(subject.linears(0)["q_proj"]) is nn.Linear
    torch.testing.assert_close(fast.model(ids).logits, subject.model(ids).logits, rtol=3e-2, atol=3e-2)
    assert sizes(fast)["bytes_in_memory"] < sizes(subject)["bytes_in_memory"]
    assert sizes(fast)["parameters"] == sizes(subject)["parameters"]


def test_a_subject_packed_in_memory_computes_the_same_and_holds_less(tiny):
    dense, _ = Width(2, 4, metric="magnitude", linears=["*_proj"]).apply(tiny(layers=3))
    packed = pack_all(dense)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(packed.model(ids).logits, dense.model(ids).logits)
    assert all(isinstance(m, PackedLinear) for b in range(3) for m in packed.linears(b).values())
    assert packed.fingerprint == dense.fingerprint and packed.parameters == dense.parameters
    assert packed.model.model.embed_tokens.weight is dense.model.model.embed_tokens.weight  # shared, not copied
    assert not any(isinstance(m, PackedLinear) for m in dense.model.modules())
    assert pack_all(tiny(layers=1)).linears(0)["q_proj"].__class__ is nn.Linear  # nothing to gain
    repeated = pack_all(apply_plan(dense, (0, 1, 1)))
    assert repeated.linears(1)["q_proj"] is repeated.linears(2)["q_proj"]


def test_a_copy_that_stays_packed(tiny):
    """Its own memory, the same form, and blocks that repeat still share; the other kind of copy is plain."""
    subject = apply_plan(pack_all(Width(2, 4, metric="magnitude").apply(tiny())[0]), [0, 1, 1, 2])
    packed, plain = subject.copy(unpack=False), subject.copy()
    assert packed.fingerprint == plain.fingerprint == subject.fingerprint and packed.plan == subject.plan
    assert (
        sum(isinstance(m, PackedLinear) for m in packed.model.modules())
        == sum(isinstance(m, PackedLinear) for m in subject.model.modules())
        == 21
    )
    assert not any(isinstance(m, PackedLinear) for m in plain.model.modules())
    for copied in (packed, plain):
        assert copied.linears(1)["q_proj"] is copied.linears(2)["q_proj"] is not subject.linears(1)["q_proj"]
    packed.linears(0)["q_proj"].values.zero_()
    assert subject.linears(0)["q_proj"].weight.any() and not packed.linears(0)["q_proj"].weight.any()


@pytest.mark.parametrize("how", ("dense", "masked"))
def test_merging_all(tiny, how):
    """Every correction of a packed subject, against the sum by hand; what repeats is one linear again."""
    subject = apply_plan(pack_all(Width(2, 4, metric="magnitude").apply(tiny())[0]), [0, 1, 1])
    factors = {}
    for i in (0, 1):
        old = subject.linears(i)["q_proj"]
        factors[i] = (
            correction(outputs=32, seed=i)[1],
            torch.randn(3, 32, generator=torch.Generator().manual_seed(9 + i)),
        )
        new = adapt(old, factors[i][1], factors[i][0])
        for block in {0: [0], 1: [1, 2]}[i]:
            replace(subject.blocks[block], "q_proj", new)
    weights = {i: base_of(subject.linears(i)["q_proj"]).weight for i in (0, 1)}
    merge_all(subject.model, how)
    for i, (B, A) in factors.items():
        wanted = weights[i] + B @ A
        torch.testing.assert_close(
            subject.linears(i)["q_proj"].weight, torch.where(weights[i] != 0, wanted, 0) if how == "masked" else wanted
        )
    assert subject.linears(1)["q_proj"] is subject.linears(2)["q_proj"]
    assert isinstance(subject.linears(0)["k_proj"], PackedLinear) and not any(
        isinstance(m, Adapted) for m in subject.model.modules()
    )


def test_an_adapter_that_stays_beside_is_the_same_object():
    adapted = Adapted(linear(), *correction())
    assert merged(adapted, "beside") is adapted and base_of(adapted) is adapted.base is base_of(adapted.base)
