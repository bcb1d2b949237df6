"""The best pair of a weight in a metric: against torch's SVD and Cholesky in float64."""

import math

import pytest
import torch

from thesislib.compress.factor import best, diagonal, effective_rank, plain, spectrum, truncated, whitening
from thesislib.errors import BadInput

SHAPES = [(24, 40), (40, 24), (32, 32)]


def problem(rows=24, columns=40, tokens=300, seed=0):
    """A weight, and inputs (T, D) that are correlated and of very different sizes, float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x *= torch.exp(torch.randn(columns, generator=generator, dtype=torch.float64))
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x


def svd(m, rank):
    u, s, v = torch.linalg.svd(m.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def by_cholesky(w, h, rank):
    """SVD-LLM: W L truncated, times the inverse of L."""
    lower = torch.linalg.cholesky(h.double())
    return svd(w.double() @ lower, rank) @ lower.inverse()


def by_outputs(w, h, rank):
    """ROM: the projection of W on the top eigenvectors of the outputs' moment W H W^T."""
    w = w.double()
    p = torch.linalg.eigh(w @ h.double() @ w.T).eigenvectors[:, -rank:]
    return p @ p.T @ w


def product(pair):
    return pair.B.double() @ pair.A.double()


def close(a, b, part=1e-4):
    return float((a - b).norm()) <= part * float(b.norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_the_weight(shape):
    w, x = problem(*shape)
    for metric in (plain(shape[1]), diagonal(x.abs().mean(0)), whitening(x.T @ x)):
        pair = best(w, min(shape), metric)
        assert close(product(pair), w) and pair.error < 1e-6
        assert pair.A.dtype == pair.B.dtype == torch.float32
        assert pair.A.shape == (min(shape), shape[1]) and pair.B.shape == (shape[0], min(shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 7, 20])
def test_no_metric_is_the_plain_svd(shape, rank):
    w, _ = problem(*shape)
    for metric in (plain(shape[1]), whitening(13 * torch.eye(shape[1])), diagonal(torch.full((shape[1],), 0.3))):
        assert close(product(best(w, rank, metric)), svd(w, rank))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 7, 20])
def test_cholesky_eigenvectors_and_projected_outputs_are_one(shape, rank):
    w, x = problem(*shape)
    h = x.T @ x
    made = product(best(w, rank, whitening(h)))
    assert close(made, by_cholesky(w, h, rank)) and close(made, by_outputs(w, h, rank))


@pytest.mark.parametrize("rank", [1, 7, 20])
def test_a_diagonal_metric_is_a_scaled_svd(rank):
    w, x = problem()
    sizes = x.abs().mean(0) ** 0.5
    assert close(product(best(w, rank, diagonal(sizes))), svd(w * sizes, rank) / sizes)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_the_singular_values_that_were_dropped(shape):
    w, x = problem(*shape)
    h = x.T @ x
    s = torch.linalg.svdvals(w @ x.T).square()
    for rank in (1, 7, 20):
        pair = best(w, rank, whitening(h))
        measured = float(((w - product(pair)) @ x.T).square().sum())
        assert math.isclose(measured, float(s[rank:].sum()), rel_tol=1e-4)
        # the metric is divided by the mean of H's diagonal
        assert math.isclose(pair.dropped * float(h.diagonal().mean()), measured, rel_tol=1e-4)
        assert math.isclose(pair.error, math.sqrt(measured / float((w @ x.T).square().sum())), rel_tol=1e-4)
    found = spectrum(w, whitening(h)) * math.sqrt(float(h.diagonal().mean()))
    assert torch.allclose(found, s.sqrt()[: min(shape)], rtol=1e-5)


def test_nothing_does_better_on_its_own_moment():
    w, x = problem()
    generator = torch.Generator().manual_seed(3)
    pair = best(w, 6, whitening(x.T @ x))

    def error(B, A):
        return float(((w - B @ A) @ x.T).norm())

    least = error(pair.B.double(), pair.A.double())
    for metric in (plain(40), diagonal(x.abs().mean(0) ** 0.5), diagonal(x.abs().mean(0))):
        other = best(w, 6, metric)
        assert error(other.B.double(), other.A.double()) > least
    for _ in range(30):
        near = [t + 0.02 * t.abs().mean() * torch.randn(t.shape, generator=generator) for t in (pair.B, pair.A)]
        assert error(*(t.double() for t in near)) > least


def test_the_number_of_tokens_changes_nothing():
    w, x = problem()
    one, other = (best(w, 7, whitening(scale * x.T @ x)) for scale in (1.0, 2.0**20))
    assert torch.allclose(one.A.abs(), other.A.abs(), rtol=1e-4, atol=1e-5) and torch.allclose(
        one.B.abs(), other.B.abs(), rtol=1e-4, atol=1e-5
    )
    assert math.isclose(one.error, other.error, rel_tol=1e-6)
    tiny = best(w, 7, whitening((1e-20 * x.T @ x).float()))
    assert close(product(tiny), product(one))


def test_a_residual_in_one_metric_is_the_single_svd():
    """ResSVD's second step, without a change of metric."""
    w, x = problem()
    metric = whitening(x.T @ x)
    first = product(best(w, 5, metric))
    assert close(first + product(best(w - first, 4, metric)), product(best(w, 9, metric)))


def test_few_tokens_restore_the_weight_where_no_token_was():
    w, x = problem(tokens=10)
    h = (x.T @ x).float()
    assert close(product(best(w, 24, whitening(h))), w, 1e-3)
    pair = best(w, 10, whitening(h))
    assert pair.error < 1e-3 and close(product(pair) @ x.T, w @ x.T, 1e-3)
    assert product(pair).norm() < 1.01 * w.norm()  # a projection of the weight


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_have_weights(shape):
    w, _ = problem(*shape)
    rows = torch.linspace(0.1, 3, shape[0], dtype=torch.float64)
    made = product(best(w, 5, plain(shape[1]), rows))
    assert close(made, svd(rows[:, None] * w, 5) / rows[:, None])
    assert close(product(best(w, min(shape), plain(shape[1]), rows)), w)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("left", [0.0, 0.5, 1.0])
def test_the_singular_values_go_where_asked(shape, left):
    w, _ = problem(*shape)
    s_all = torch.linalg.svdvals(w)
    u, v, s = truncated(w, 6, left)
    assert torch.allclose(s, s_all[:6]) and close(u @ v.T, svd(w, 6), 1e-10)
    assert torch.allclose(u.norm(dim=0), s**left) and torch.allclose(v.norm(dim=0), s ** (1 - left))


def test_a_weight_of_lower_rank_and_a_zero_weight():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(24, 3, generator=generator) @ torch.randn(3, 40, generator=generator)
    pair = best(w, 10, plain(40))
    assert close(product(pair), w.double()) and pair.error < 1e-3
    nothing = best(torch.zeros(24, 40), 5, plain(40))
    assert not nothing.A.any() and torch.isfinite(nothing.B).all() and nothing.error == 0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 1, 1, 1], 4.0),
        ([5, 0, 0], 1.0),
        ([2, 2, 0], 2.0),
        ([0, 0], 1.0),
        # squared shares .8 and .2
        ([2, 1], 0.8**-0.8 * 0.2**-0.2),
    ],
)
def test_effective_ranks_by_hand(values, expected):
    assert math.isclose(effective_rank(torch.tensor(values, dtype=torch.float64)), expected, rel_tol=1e-6)


@pytest.mark.parametrize("make", [whitening, lambda m, where: diagonal(m.diagonal(), where)])
def test_moments_that_say_nothing_are_named(make):
    with pytest.raises(BadInput, match="block 2's q_proj saw no tokens"):
        make(torch.zeros(4, 4), "block 2's q_proj")
    for value in (torch.inf, torch.nan):
        with pytest.raises(BadInput, match="the statistics of block 2's q_proj are not finite"):
            make(torch.full((4, 4), value), "block 2's q_proj")
