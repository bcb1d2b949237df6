"""The best pair of a weight, W ~ B A, in a metric of its inputs: truncated singular value decompositions.

With H = X X^T and any root S S^T = H, ``|(W - B A) X| = |(W - B A) S|``. So the best pair of a rank is the SVD of W S,
truncated, with S^-1 multiplied into the right factor, and its squared error is the sum of the squared singular values
that were dropped (Eckart and Young). All roots give the same product: Cholesky's factor (SVD-LLM), the eigenvectors
(SVD-LLM v2, EoRA), and the projection of outputs on the eigenvectors of W H W^T (ROM, Swift-SVD).
"""

from typing import NamedTuple

import torch

from thesislib.compress.calibration import Statistics, check_moment


class Pair(NamedTuple):
    """The factors of a weight, float32, the directions with the largest singular values first.

    Args:
        A: (rank, inputs); carries the singular values.
        B: (outputs, rank); orthonormal columns, if no metric of the outputs was used.
        dropped: the sum of the squared singular values that were left out: the squared error in the metric.
        total: the sum of all: the squared norm of W in the metric.
    """

    A: torch.Tensor
    B: torch.Tensor
    dropped: float
    total: float

    @property
    def error(self) -> float:
        """The relative error, ``|W - B A| / |W|`` in the metric."""
        return (self.dropped / self.total) ** 0.5 if self.total else 0.0


class Metric(NamedTuple):
    """A root S of a metric of the inputs, float64; S and its inverse are (inputs, inputs), or (inputs,) if diagonal."""

    root: torch.Tensor
    inverse: torch.Tensor

    def rooted(self, weight: torch.Tensor) -> torch.Tensor:
        """W S, float64."""
        root = self.root.to(weight.device)
        return weight.double() * root if root.ndim == 1 else weight.double() @ root

    def undone(self, right: torch.Tensor) -> torch.Tensor:
        """A row space in terms of S back in terms of the inputs: A S^-1."""
        inverse = self.inverse.to(right.device)
        return right * inverse if inverse.ndim == 1 else right @ inverse


def plain(inputs: int) -> Metric:
    """The metric of the weight's own norm, in which all inputs count alike."""
    ones = torch.ones(inputs, dtype=torch.float64)
    return Metric(ones, ones)


def diagonal(sizes: torch.Tensor, where: str = "the projection") -> Metric:
    """Inputs weighted by their sizes (inputs,), which are at least the largest times float32's epsilon.

    Raises:
        BadInput: sizes that are not finite, or all zero.
    """
    check_moment(sizes.square().diag(), where)
    root = sizes.double().clamp(min=floor(sizes.max()))
    root = root / root.square().mean().sqrt()
    return Metric(root, 1 / root)


def whitening(moment: torch.Tensor, where: str = "the projection") -> Metric:
    """S with S S^T = X X^T, divided by its mean diagonal, so that the factors do not depend on the number of tokens.

    Eigenvalues are at least the largest times float32's epsilon, the precision of the sums. Public code adds a multiple
    of the identity until Cholesky succeeds; here directions that no token took keep a small weight, so that a pair of
    full rank is the whole weight in them too.

    Args:
        moment: (inputs, inputs) X X^T.
        where: the projection's name in messages.

    Raises:
        BadInput: a moment that is not finite, or all zero.
    """
    check_moment(moment, where)
    exact = moment.double()
    values, vectors = torch.linalg.eigh(exact / exact.diagonal().mean())
    root = values.clamp(min=floor(values[-1])).sqrt()
    return Metric(vectors * root, (vectors / root).T)


def floor(largest: torch.Tensor) -> float:
    """The smallest value that sums in float32 tell from nothing beside the largest."""
    return float(largest) * torch.finfo(torch.float32).eps


def truncated(m: torch.Tensor, rank: int, left: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U s^left (rows, rank), V s^(1 - left) (columns, rank), and the singular values s of the best matrix of a rank.

    The singular vectors of the shorter side are the eigenvectors of its Gram matrix, in a quarter of an SVD's time.
    Since they are orthonormal, u u^T m is a projection of m however small a singular value is.

    Args:
        m: (rows, columns) float64.
        rank: at most; the shorter side restores m completely.
        left: the power of the singular values that U carries.
    """
    tall = m.shape[0] > m.shape[1]
    short = torch.linalg.eigh(m.T @ m if tall else m @ m.T).eigenvectors.flip(1)[:, :rank]
    long = m @ short if tall else m.T @ short  # times the singular values
    s = long.norm(dim=0)

    def power(p: float) -> torch.Tensor:
        return torch.where(s > 0, s**p, 0)

    if tall:
        return long * power(left - 1), short * power(1 - left), s
    return short * power(left), long * power(-left), s


def best(weight: torch.Tensor, rank: int, metric: Metric, rows: torch.Tensor | None = None) -> Pair:
    """The pair of a rank that is nearest to a weight in a metric.

    Args:
        weight: (outputs, inputs).
        rank: of the pair; of the smaller side the pair is the weight.
        metric: of the inputs.
        rows: (outputs,) positive weights of the outputs, or None.
    """
    m = metric.rooted(weight)
    if rows is not None:
        rows = rows.to(m)
        m = rows[:, None] * m
    u, v, s = truncated(m, rank)
    total = float(m.square().sum())
    B = u if rows is None else u / rows[:, None]
    return Pair(metric.undone(v.T).float(), B.float(), max(total - float(s.square().sum()), 0.0), total)


def nested(weight: torch.Tensor, rank: int, metric: Metric, whitened: float) -> Pair:
    """NSVD's pair: the first part of the rank in the metric, the rest by the plain SVD of what that leaves."""
    first = min(max(round(whitened * rank), 0), rank)
    if first == rank:
        return best(weight, rank, metric)
    no_metric = plain(weight.shape[1])
    if first == 0:
        return best(weight, rank, no_metric)
    one = best(weight, first, metric)
    two = best(weight.double() - one.B.double() @ one.A.double(), rank - first, no_metric)
    A, B = torch.cat([one.A, two.A]), torch.cat([one.B, two.B], 1)
    left = metric.rooted(weight - B @ A).square().sum()
    return Pair(A, B, float(left), one.total)


def towards(weight: torch.Tensor, s: Statistics, metric: Metric, pull: float, ridge: float = 0.0) -> torch.Tensor:
    """The weight that maps compressed inputs X nearest to a mixture of W X and W F, F being the original inputs.

    ``argmin (1 - pull) |V X - W X|^2 + pull |V X - W F|^2 + ridge |V - W|^2 = W + pull W (F - X) X^T (H + ridge I)^-1``
    in float64, where H is divided by its mean diagonal; its eigenvalues are the metric's, which have a floor.
    """
    scale = s.moment.diagonal().double().mean()  # of the metric, see `whitening`
    drift = (s.cross.double() - s.moment.double()) / scale
    inverse = metric.inverse  # a row is an eigenvector divided by the root of its eigenvalue
    inverse = inverse / (1 + ridge * inverse.square().sum(1, keepdim=True)).sqrt()
    return weight.double() + pull * weight.double() @ drift @ inverse.T @ inverse


def spectrum(weight: torch.Tensor, metric: Metric) -> torch.Tensor:
    """The singular values of a weight in a metric, the largest first, float64."""
    m = metric.rooted(weight)
    gram = m.T @ m if m.shape[0] > m.shape[1] else m @ m.T
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()


def effective_rank(singular_values: torch.Tensor) -> float:
    """exp of the entropy of the squared singular values as shares (D-Rank); from 1 to their number.

    >>> effective_rank(torch.tensor([1.0, 1.0, 0.0]))
    2.0
    """
    share = singular_values.double().square()
    share = share[share > 0] / share.sum()
    return round(float(torch.exp(-(share * share.log()).sum())), 9)
