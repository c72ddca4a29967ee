"""The published rules of Shampoo, SOAP and their KL forms in float64, one matrix each.

Written from the formulas; imports nothing of the package. `grads` is a sequence of
(m, n) matrices, L is (m, m) and R is (n, n). Every rule returns its directions, not
negated and before the learning rate.
"""

import collections

import numpy as np


def inverse_root(a, exponent, damping):
    """Q (max(w, 0) + damping max(w))^exponent Q^T of a = Q w Q^T; of zero, zero.

    A singular matrix needs damping.
    """
    w, q = np.linalg.eigh(np.asarray(a, np.float64))
    if w.max() <= 0:
        return np.zeros_like(q)
    return (q * (np.maximum(w, 0) + damping * w.max()) ** exponent) @ q.T


def is_due(since, refresh, turn):
    """Returns whether to refresh `since` updates after the first refresh.

    One of every `refresh` updates does. Staggered matrices differ in `turn`.
    """
    return since == 0 or (since - turn) % refresh == 0


def turns(shapes, refresh, sides=(True, True), max_dim=None):
    """Returns the turn of each matrix if refreshes are staggered.

    Matrices of one shape stand together in a line, the shape that comes first in front.
    Each takes the sum of the cubes of its sides that have a statistic, and its turn is
    where its middle lies in the line, in updates of a round.
    """
    line = sorted(range(len(shapes)), key=lambda i: shapes.index(shapes[i]))

    def cost(shape):
        kept = [k**3 for k, side in zip(shape, sides, strict=True) if side]
        return sum(k for k in kept if max_dim is None or k <= max_dim**3)

    ends = dict(zip(line, np.cumsum([cost(shapes[i]) for i in line]), strict=True))
    total = max(ends.values())
    doubled = [2 * ends[i] - cost(shape) for i, shape in enumerate(shapes)]
    return np.array([refresh * middle // (2 * total) for middle in doubled])


def shampoo(
    grads,
    *,
    b1,
    b2,
    exponents=(-0.25, -0.25),
    damping,
    refresh=1,
    turn=0,
    start=0,
):
    """Shampoo (arXiv:1802.09568) with momentum and, for b2 < 1, averages.

    The roots are of the statistics that hold this step's gradient. An exponent of None
    leaves its side out.
    """
    grads = np.asarray(grads, np.float64)
    _, rows, columns = grads.shape
    m, stat_l, stat_r = 0.0, 0.0, 0.0
    root_l, root_r = np.eye(rows), np.eye(columns)
    out = []
    for t, g in enumerate(grads, start=1):
        m = b1 * m + (1 - b1) * g
        m_hat = m / (1 - b1**t)
        if b2 == 1:
            stat_l = stat_l + g @ g.T
            stat_r = stat_r + g.T @ g
            hat_l, hat_r = stat_l, stat_r
        else:
            stat_l = b2 * stat_l + (1 - b2) * g @ g.T
            stat_r = b2 * stat_r + (1 - b2) * g.T @ g
            hat_l, hat_r = stat_l / (1 - b2**t), stat_r / (1 - b2**t)
        since = t - 1 - start
        if since >= 0 and is_due(since, refresh, turn):
            if exponents[0] is not None:
                root_l = inverse_root(hat_l, exponents[0], damping)
            if exponents[1] is not None:
                root_r = inverse_root(hat_r, exponents[1], damping)
        out.append(root_l @ m_hat @ root_r)
    return np.stack(out)


def kronecker_shampoo(g, left, right, exponent, damping):
    """Shampoo's step as one (m n, m n) matrix on the rows of G laid end to end."""
    root_l = inverse_root(left, exponent, damping)
    root_r = inverse_root(right, exponent, damping)
    g = np.asarray(g, np.float64)
    return (np.kron(root_l, root_r) @ g.reshape(-1)).reshape(g.shape)


def full_kronecker_root(left, right, exponent):
    """(L kron R)^exponent of positive definite L and R, from the whole matrix."""
    full = np.kron(np.asarray(left, np.float64), np.asarray(right, np.float64))
    w, q = np.linalg.eigh(full)
    assert w.min() > 0
    return (q * w**exponent) @ q.T


def rotated_in(x, ql, qr):
    """QL^T X QR."""
    return ql.T @ x @ qr


def rotated_back(x, ql, qr):
    """QL X QR^T."""
    return ql @ x @ qr.T


def first_basis(stat, given=None):
    """The eigenvectors, the largest eigenvalue's first; or `given`, once checked.

    A null space has no unique basis, so a comparison may bring its own.
    """
    if given is None:
        return np.linalg.eigh(stat)[1][:, ::-1]
    q = np.asarray(given, np.float64)
    eye = np.eye(len(stat))
    diagonal = q.T @ stat @ q
    residue = diagonal - np.diag(np.diag(diagonal))
    assert q.shape == stat.shape
    assert np.linalg.norm(q.T @ q - eye) <= 1e-5 * np.linalg.norm(eye)
    assert np.linalg.norm(residue) <= 1e-5 * np.linalg.norm(stat)
    return q


def next_basis(stat, q):
    """One step of orthogonal iteration. The columns' signs change no direction."""
    return np.linalg.qr(stat @ q)[0]


def descending(stat, q):
    """The order of the basis by estimated eigenvalues, the largest first."""
    return np.argsort(-np.diag(q.T @ stat @ q), kind="stable")


def soap(
    grads,
    *,
    b1,
    b2,
    shampoo_b2=None,
    eps,
    refresh=1,
    turn=0,
    first_bases=None,
    left=True,
    right=True,
):
    """SOAP (arXiv:2409.11321) as in its authors' code, nikhilvyas/SOAP.

    The first gradient only gives the bases. A side that is not `left` or `right` keeps
    the identity.
    """
    first, *later = np.asarray(grads, np.float64)
    rows, columns = first.shape
    bs = b2 if shampoo_b2 is None else shampoo_b2
    given_l, given_r = (None, None) if first_bases is None else first_bases

    stat_l = (1 - bs) * first @ first.T
    stat_r = (1 - bs) * first.T @ first
    ql = first_basis(stat_l, given_l) if left else np.eye(rows)
    qr = first_basis(stat_r, given_r) if right else np.eye(columns)
    m, v = np.zeros_like(first), np.zeros_like(first)
    out = [np.zeros_like(first)]

    for s, g in enumerate(later, start=1):
        # Adam in the bases of the gradients before this one.
        rotated = rotated_in(g, ql, qr)
        m = b1 * m + (1 - b1) * rotated
        v = b2 * v + (1 - b2) * rotated**2
        correction = np.sqrt(1 - b2**s) / (1 - b1**s)
        out.append(correction * rotated_back(m / (np.sqrt(v) + eps), ql, qr))

        stat_l = bs * stat_l + (1 - bs) * g @ g.T
        stat_r = bs * stat_r + (1 - bs) * g.T @ g
        if is_due(s, refresh, turn):
            m = rotated_back(m, ql, qr)
            if left:
                order = descending(stat_l, ql)
                v = v[order, :]
                ql = next_basis(stat_l, ql[:, order])
            if right:
                order = descending(stat_r, qr)
                v = v[:, order]
                qr = next_basis(stat_r, qr[:, order])
            m = rotated_in(m, ql, qr)
    return np.stack(out)


def schatten4(x):
    """The fourth root of the sum of the singular values' fourth powers."""
    return (np.linalg.svd(x, compute_uv=False) ** 4).sum() ** 0.25


def whitened_momentum(
    grads, *, mus, b2, eps=1e-8, refresh=1, first_bases=None, ahead=None
):
    """The "SOAP-Muon" of modded-nanogpt's record 46, before Newton-Schulz.

    `mus` has the momentum for each gradient, or `ahead` what is whitened. Statistics
    are of the raw gradient and include it from the next update on.
    """
    given_l, given_r = (None, None) if first_bases is None else first_bases
    m, v, stat_l, stat_r, out = 0.0, 0.0, 0.0, 0.0, []
    ql = qr = None
    for s, (g, mu) in enumerate(zip(np.asarray(grads, np.float64), mus, strict=True)):
        m = mu * m + (1 - mu) * g
        u = mu * m + (1 - mu) * g if ahead is None else ahead[s]
        if ql is None:
            out.append(u)
        else:
            p = rotated_in(u, ql, qr)
            v = b2 * v + (1 - b2) * p**2
            white = rotated_back(p / np.sqrt(np.maximum(v, eps**2)), ql, qr)
            out.append(white * schatten4(u) / schatten4(white))
        stat_l = b2 * stat_l + (1 - b2) * g @ g.T
        stat_r = b2 * stat_r + (1 - b2) * g.T @ g
        if ql is None:
            ql, qr = first_basis(stat_l, given_l), first_basis(stat_r, given_r)
        elif s % refresh == 0:
            rows, columns = descending(stat_l, ql), descending(stat_r, qr)
            v = v[rows][:, columns]
            ql = next_basis(stat_l, ql[:, rows])
            qr = next_basis(stat_r, qr[:, columns])
    return np.stack(out)


# One side of the KL forms: the statistic L or R, its basis Q, and the estimated
# inverse square roots h of its eigenvalues.
Side = collections.namedtuple("Side", ["stat", "q", "h"])


def finite(x):
    """X with zero for every entry that is not finite."""
    return np.where(np.isfinite(x), x, 0.0)


def kl_side(g, decay, initial, given):
    """The left side after the first gradient; of G^T, the right side."""
    rows, columns = g.shape
    stat = (1 - decay) * g @ g.T / columns
    return Side(stat, first_basis(stat, given), np.ones(rows) / np.sqrt(initial))


def kl_sides(g, decay, initial, first_bases):
    """Both sides after the first gradient."""
    given_l, given_r = (None, None) if first_bases is None else first_bases
    return kl_side(g, decay, initial, given_l), kl_side(g.T, decay, initial, given_r)


def kl_observed(side, other, g, decay, clamp):
    """The left side with G added, `other` the right one; of G^T, the right side.

    L's share is G R^-1 G^T / n with R as its basis and eigenvalues have it, and the
    eigenvalues' share is the diagonal of that in the basis of L.
    """
    rows, columns = g.shape
    inverse = other.q @ np.diag(other.h**2) @ other.q.T
    stat = decay * side.stat + (1 - decay) * g @ inverse @ g.T / columns

    seen = np.mean((rotated_in(g, side.q, other.q) * other.h) ** 2, axis=1)
    with np.errstate(divide="ignore"):
        eigenvalues = finite(1 / side.h**2)
        eigenvalues = decay * eigenvalues + (1 - decay) * seen
        h = finite(1 / np.sqrt(eigenvalues))
    return Side(stat, side.q, np.minimum(h, max(10, min(rows, clamp))))


def kl_turned(side):
    """The side with its next basis; neither sorted nor its eigenvalues moved."""
    return side._replace(q=next_basis(side.stat, side.q))


def kl_soap(
    grads,
    *,
    b1,
    b2,
    shampoo_b2=None,
    eps,
    refresh=1,
    turn=0,
    initial=0.1,
    clamp=4000,
    first_bases=None,
):
    """KL-SOAP (arXiv:2509.03378) as in its authors' code, yorkerlin/KL-Methods.

    The first gradient only gives the bases. The moments have no bias correction.
    """
    first, *later = np.asarray(grads, np.float64)
    bs = b2 if shampoo_b2 is None else shampoo_b2
    left, right = kl_sides(first, bs, initial, first_bases)
    m, v = np.zeros_like(first), np.zeros_like(first)
    out = [np.zeros_like(first)]

    for s, g in enumerate(later, start=1):
        rotated = rotated_in(g, left.q, right.q)
        m = b1 * m + (1 - b1) * rotated
        v = b2 * v + (1 - b2) * rotated**2
        out.append(rotated_back(m / (np.sqrt(v) + eps), left.q, right.q))

        # Each side from the other as it was before this gradient.
        left, right = (
            kl_observed(left, right, g, bs, clamp),
            kl_observed(right, left, g.T, bs, clamp),
        )
        if is_due(s, refresh, turn):
            m = rotated_back(m, left.q, right.q)
            left, right = kl_turned(left), kl_turned(right)
            m = rotated_in(m, left.q, right.q)
    return np.stack(out)


def kl_shampoo(
    grads,
    *,
    b1,
    b2,
    shampoo_b2=None,
    eps,
    refresh=1,
    turn=0,
    initial=0.1,
    clamp=4000,
    first_bases=None,
):
    """KL-Shampoo (arXiv:2509.03378) as in its authors' code, yorkerlin/KL-Methods.

    The first gradient only gives the bases. The momentum is never rotated.
    """
    first, *later = np.asarray(grads, np.float64)
    bs = b2 if shampoo_b2 is None else shampoo_b2
    left, right = kl_sides(first, bs, initial, first_bases)
    m = np.zeros_like(first)
    out = [np.zeros_like(first)]

    for s, g in enumerate(later, start=1):
        m = b1 * m + (1 - b1) * g
        k = left.h[:, None] * right.h
        scaled = rotated_in(m, left.q, right.q) * k / (1 + eps * k)
        out.append(rotated_back(scaled, left.q, right.q))

        # Each side from the other as it was before this gradient.
        left, right = (
            kl_observed(left, right, g, bs, clamp),
            kl_observed(right, left, g.T, bs, clamp),
        )
        if is_due(s, refresh, turn):
            left, right = kl_turned(left), kl_turned(right)
    return np.stack(out)


def grafted(magnitudes, directions):
    """Each direction with the Frobenius norm of its magnitude; of zero, zero."""
    out = []
    for magnitude, direction in zip(
        np.asarray(magnitudes, np.float64),
        np.asarray(directions, np.float64),
        strict=True,
    ):
        norm = np.linalg.norm(direction)
        scale = np.linalg.norm(magnitude) / norm if norm else 0.0
        out.append(scale * direction)
    return np.stack(out)
