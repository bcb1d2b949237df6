import numpy as np
import pytest
from scipy import stats as scipy_stats

from thesislib.errors import BadInput
from thesislib.evaluate.stats import bootstrap_mean, holm, paired_means, paired_outcomes, proportion


def test_bootstrap_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        x = rng.normal(3.0, 1.0, size=40)
        low, high = bootstrap_mean(x, np.ones(40), np.arange(40), resamples=1000, seed=trial)
        hits += low <= 3.0 <= high
    assert 178 <= hits <= 199  # 95 % of 200 is 190; the percentile bootstrap at n = 40 falls a little short


def test_bootstrap_agrees_with_scipy():
    x = np.random.default_rng(0).gamma(2.0, size=60)
    expected = scipy_stats.bootstrap((x,), np.mean, method="percentile", rng=0).confidence_interval
    np.testing.assert_allclose(bootstrap_mean(x, np.ones(60), np.arange(60)), expected, rtol=0.02)


def test_documents_not_windows_are_resampled():
    """Ten copies of each of five documents know no more than the five."""
    x = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    once = bootstrap_mean(x, np.ones(5), np.arange(5))
    copies = bootstrap_mean(np.tile(x, 10), np.ones(50), np.tile(np.arange(5), 10))
    np.testing.assert_allclose(copies, once)
    alone = bootstrap_mean(np.tile(x, 10), np.ones(50), np.arange(50))
    assert alone[1] - alone[0] < (once[1] - once[0]) / 2


def test_weights_count_tokens():
    low, high = bootstrap_mean([10.0, 0.0], [10, 1000], [0, 1])
    assert low == 0.0 and high == 1.0  # the extremes are one document drawn twice


def test_one_document_gives_no_interval():
    assert np.isnan(bootstrap_mean([1.0, 2.0], [1, 1], [7, 7])).all()


def test_wilson_against_its_formula():
    z, n, k = 1.959964, 50, 21
    p = k / n
    centre, half = (p + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    np.testing.assert_allclose(proportion(k, n), (centre - half, centre + half), rtol=1e-6)
    assert proportion(0, 10)[0] == 0 and proportion(10, 10)[1] == 1
    for bad in ((11, 10), (-1, 10), (0, 0)):
        with pytest.raises(BadInput, match="expected 0 <= successes <= n"):
            proportion(*bad)


def test_paired_means_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    a = rng.normal(size=30)
    b = a + rng.normal(0.1, 0.2, size=30)
    c = paired_means(a, b)
    expected = scipy_stats.ttest_rel(b, a)
    assert c.p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval()
    assert (c.difference, c.low, c.high) == pytest.approx(((b - a).mean(), interval.low, interval.high))
    grouped = paired_means(a, b, np.arange(30) // 3)
    assert grouped.n == 10 and grouped.difference == pytest.approx(c.difference)


def test_paired_means_edges():
    assert paired_means([1, 2], [1, 2]).p == 1.0
    assert paired_means([1, 2], [2, 3]).p == 0.0  # the same difference every time
    with pytest.raises(BadInput, match="same items on both sides: got 2 and 3"):
        paired_means([1, 2], [1, 2, 3])
    with pytest.raises(BadInput, match="at least two"):
        paired_means([1, 2], [1, 2], [0, 0])


def test_mcnemar_by_hand():
    a = [True] * 10 + [False] * 10
    b = [True] * 9 + [False] + [True] * 6 + [False] * 4  # 6 gained, 1 lost
    c = paired_outcomes(a, b)
    assert c.p == pytest.approx(2 * sum([1, 7]) / 2**7)
    assert c.difference == pytest.approx(5 / 20) and c.n == 20
    assert paired_outcomes(a, a).p == 1.0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
