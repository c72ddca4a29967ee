"""Polar factors and Newton-Schulz schedules in float64 NumPy.

Written from the papers' numbers; imports nothing of the package, nor JAX.
"""

import numpy as np

# Restated from the sources, not read from the package.
PUBLISHED = {
    "jordan": [(3.4445, -4.7750, 2.0315)] * 5,
    "quintic": [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
    "polar_express": [
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        (1.875, -1.25, 0.375),
    ],
    # Divided by Dion's margin below.
    "polar_express5": [
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ],
    "cans": [
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ],
    "aol": [
        (4.0098, -7.0585, 2.4635),
        (3.4585, -5.5479, 2.5959),
        (2.7573, -3.2939, 1.4254),
        (2.7215, -3.0494, 1.3169),
    ],
    "track3": [(2.0, -1.5, 0.5)] * 12,
    "cubic": [(1.5, -0.5, 0.0)] * 20,
    "cubic5": [
        (3.3656576, -3.3420992, 0.0),
        (2.5744352, -1.4957376, 0.0),
        (2.5368962, -1.4312570, 0.0),
        (2.4418906, -1.2764040, 0.0),
        (2.2230472, -0.9630650, 0.0),
    ],
}
# The first AOL row changes sign at 0.884, so inputs are scaled down to this; Dion
# divides by 1.02.
LARGEST = {"aol": 0.85, "polar_express5": 1 / 1.02}


def safe_rows(name, safety=1.01):
    """The published rows, each but the last divided by a safety factor."""
    rows = PUBLISHED[name]
    shrunk = [(a / safety, b / safety**3, c / safety**5) for a, b, c in rows[:-1]]
    return [*shrunk, rows[-1]]


def newton_schulz(x, rows, normalization="frobenius", shrink=1.0):
    """X <- aX + (bA + cA²)X with A = XXᵀ, matrix by matrix; 0 stays 0."""
    x = np.asarray(x, np.float64)
    if x.ndim > 2:
        return np.stack([newton_schulz(y, rows, normalization, shrink) for y in x])
    if not x.any():
        return x
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T, rows, normalization, shrink).T
    x = x / np.abs(x).max()
    gram = x @ x.T
    if normalization == "frobenius":
        x = x / np.sqrt(np.trace(gram))
    elif normalization == "schatten4":
        x = x / np.sum(gram**2) ** 0.25
    elif normalization == "aol":
        x = x / np.sqrt(np.abs(gram).sum(axis=1, keepdims=True))
    x = shrink * x
    for a, b, c in rows:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def halley_weights(low):
    """The published weights (a, b, c) of the map for [low, 1]."""
    d = np.cbrt(4 * (1 - low**2) / low**4)
    under = 8 - 4 * d + 8 * (2 - low**2) / (low**2 * np.sqrt(1 + d))
    a = np.sqrt(1 + d) + np.sqrt(under) / 2
    b = (a - 1) ** 2 / 4
    return a, b, a + b - 1


def halley_map(s, low):
    """One step on singular values."""
    a, b, c = halley_weights(low)
    return s * (a + b * s**2) / (1 + c * s**2)


def halley(x, lower_bound, steps=1):
    """QDWH on the singular values, scaled by the Schatten-4 norm."""
    u, s, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    s = s / np.sum(s**4, axis=-1, keepdims=True) ** 0.25
    low = lower_bound
    for _ in range(steps):
        s, low = halley_map(s, low), halley_map(low, low)
    return (u * s[..., None, :]) @ vt


def rational(x, h):
    """A map of the singular values, scaled by the Schatten-4 norm."""
    u, s, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    s = s / np.sum(s**4, axis=-1, keepdims=True) ** 0.25
    return (u * h(s)[..., None, :]) @ vt


def mud(x, passes=1):
    """Gauss-Seidel over unit outputs, or inputs if they are fewer, one by one."""
    x = np.asarray(x, np.float64)
    if x.ndim > 2:
        return np.stack([mud(y, passes) for y in x])
    q = x.copy() if x.shape[0] < x.shape[1] else x.T.copy()
    for _ in range(passes):
        q /= np.linalg.norm(q, axis=1, keepdims=True)
        before = q.copy()
        for i in range(1, len(q)):
            q[i] -= (before[i] @ before[:i].T) @ q[:i]
        q /= np.linalg.norm(q, axis=1, keepdims=True)
    return q if x.shape[0] < x.shape[1] else q.T


def polar(x, rank=None):
    """U Vᵀ of the SVD, over the first `rank` singular triples."""
    u, _, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    return u[..., :, :rank] @ vt[..., :rank, :]


def orthogonal(rng, n):
    """A random n×n orthogonal matrix."""
    return np.linalg.qr(rng.normal(size=(n, n)))[0]


def with_spectrum(rng, m, n, sigma):
    """A random m×n matrix with the given min(m, n) singular values."""
    k = min(m, n)
    return (orthogonal(rng, m)[:, :k] * sigma) @ orthogonal(rng, n)[:k]
