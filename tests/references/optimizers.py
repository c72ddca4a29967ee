"""The optimizers' published rules in float64, one matrix (inputs, outputs) at a time.

Written from the formulas; imports nothing of the package.
"""

import numpy as np

from tests.references.polar import PUBLISHED, halley, safe_rows

JORDAN = (3.4445, -4.7750, 2.0315)


def newton_schulz(x, steps=5, coefficients=JORDAN):
    """Steps of a quintic, by default five of KellerJordan/Muon."""
    norm = np.linalg.norm(x)
    x = x / norm if norm else x
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def polar(x):
    """The orthogonal polar factor of a matrix of full rank."""
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt


def momenta(grads, beta, nesterov=True, debias=False):
    """Muon's momentum; `debias` as optax.contrib.muon has it."""
    m, out = 0.0, []
    for t, g in enumerate(np.asarray(grads, np.float64), start=1):
        m = beta * m + (1 - beta) * g
        m_hat, g_hat = m, g
        if debias:
            m_hat = m / (1 - beta ** (t + 1 if nesterov else t))
            g_hat = g / (1 - beta**t)
        out.append(beta * m_hat + (1 - beta) * g_hat if nesterov else m_hat)
    return np.stack(out)


def scheduled_momenta(grads, betas):
    """Muon's momentum with a decay of its own for each gradient."""
    m, out = 0.0, []
    for g, beta in zip(np.asarray(grads, np.float64), betas, strict=True):
        m = beta * m + (1 - beta) * g
        out.append(beta * m + (1 - beta) * g)
    return np.stack(out)


def mixed_momenta(grads, decays, weights, mu):
    """K-Maxwell momentum; `weights` and `mu` have a row per gradient."""
    grads = np.asarray(grads, np.float64)
    ages = np.subtract.outer(np.arange(len(grads)), np.arange(len(grads)))
    kernels = [
        np.where(ages >= 0, (1 - d) * d ** np.maximum(ages, 0), 0.0) for d in decays
    ]
    kernel = np.einsum("tk,kts->ts", np.asarray(weights), np.stack(kernels))
    mixture = np.einsum("ts,s...->t...", kernel, grads)
    mu = np.asarray(mu).reshape(-1, *[1] * (grads.ndim - 1))
    return mu * mixture + (1 - mu) * grads


def spectral(shape):
    """Muon's factor of the shape."""
    inputs, outputs = shape
    return max(1.0, outputs / inputs) ** 0.5


def adam_directions(grads, b1, b2, eps):
    """Adam's update before the learning rate."""
    m, v, out = 0.0, 0.0, []
    for t, g in enumerate(np.asarray(grads, np.float64), start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        out.append((m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps))
    return np.stack(out)


def variance_scaled(updates, decay, eps, debias=True):
    """Each update over the running RMS of its entries."""
    v, out = 0.0, []
    for t, u in enumerate(np.asarray(updates, np.float64), start=1):
        v = decay * v + (1 - decay) * u**2
        out.append(u / (np.sqrt(v / (1 - decay**t) if debias else v) + eps))
    return np.stack(out)


def neuron_scaled(updates, decay, eps):
    """NorMuon's step: the running mean square over the inputs, the norm kept."""
    v, out = 0.0, []
    for u in np.asarray(updates, np.float64):
        v = decay * v + (1 - decay) * (u**2).mean(axis=0, keepdims=True)
        scaled = u / (np.sqrt(v) + eps)
        out.append(scaled * np.linalg.norm(u) / np.linalg.norm(scaled))
    return np.stack(out)


def with_rms(update, rms):
    """The update with root mean square entry `rms`."""
    return update * rms * np.sqrt(update.size) / np.linalg.norm(update)


def descend(w, directions, lr, weight_decay=0.0):
    """W <- (1 - lr * weight_decay) W - lr D: all iterates."""
    out, w = [], np.asarray(w, np.float64)
    for d in directions:
        w = (1 - lr * weight_decay) * w - lr * d
        out.append(w)
    return np.stack(out)


def descend_on_sphere(w, directions, lr):
    """Steps of relative length `lr`, each back on the sphere of the start."""
    out, w = [], np.asarray(w, np.float64)
    radius = np.linalg.norm(w)
    for d in directions:
        s = w - lr * radius * d / np.linalg.norm(d)
        w = radius * s / np.linalg.norm(s)
        out.append(w)
    return np.stack(out)


def muon(w, grads, lr, beta=0.95, weight_decay=0.0, nesterov=True, debias=False):
    """KellerJordan/Muon."""
    scale = spectral(np.shape(w))
    directions = [
        scale * newton_schulz(u) for u in momenta(grads, beta, nesterov, debias)
    ]
    return descend(w, directions, lr, weight_decay)


def muonh(w, grads, lr, beta=0.95):
    """arXiv:2606.16899 with Muon's direction."""
    return descend_on_sphere(w, [newton_schulz(u) for u in momenta(grads, beta)], lr)


def adamh(w, grads, lr, b1=0.9, b2=0.95, eps=1e-8):
    """arXiv:2606.16899 with Adam's direction."""
    return descend_on_sphere(w, adam_directions(grads, b1, b2, eps), lr)


def normuon(w, grads, lr, beta=0.95, b2=0.95, eps=1e-10):
    """arXiv:2510.05491."""
    orthogonal = [newton_schulz(u) for u in momenta(grads, beta)]
    directions = spectral(np.shape(w)) * neuron_scaled(orthogonal, b2, eps)
    return descend(w, directions, lr)


def halley_muon(w, grads, lr, svd_every=None):
    """Entries, then outputs, divided by running RMS around one Halley step."""
    scaled = variance_scaled(momenta(grads, 0.95), 0.95, 1e-8)
    exact = [svd_every is not None and t % svd_every == 0 for t in range(len(scaled))]
    orthogonal = [
        polar(u) if whole else halley(u, 1e-2)
        for u, whole in zip(scaled, exact, strict=True)
    ]
    directions = neuron_scaled(orthogonal, 0.95, 1e-10)
    return descend(w, [with_rms(d, 0.2) for d in directions], lr)


def adamuon(w, grads, lr, beta=0.95, b2=0.95, eps=1e-8, rms=0.2):
    """arXiv:2507.11005."""
    orthogonal = [newton_schulz(np.sign(u)) for u in momenta(grads, beta)]
    scaled = variance_scaled(orthogonal, b2, eps, debias=False)
    return descend(w, [with_rms(d, rms) for d in scaled], lr)


def hopper(w, grads, lr, steps=1, variance="post", rms=0.2, eps=1e-8):
    """Variance and `steps` Newton-Schulz steps, in either order."""
    if variance == "post":
        orthogonal = [newton_schulz(u, steps) for u in momenta(grads, 0.95)]
        directions = variance_scaled(orthogonal, 0.95, eps)
    else:
        adam = adam_directions(grads, 0.9, 0.999, eps)
        directions = [newton_schulz(u, steps) for u in adam]
    return descend(w, [with_rms(d, rms) for d in directions], lr)


def noise_scaled(grads, beta=0.95, gamma=None, eps=1e-8):
    """The input of the orthogonalization in Muon-VS, or with `gamma` in Muon-NSR."""
    m, v, out = 0.0, 0.0, []
    for t, g in enumerate(np.asarray(grads, np.float64), start=1):
        v = beta * v + beta * (1 - beta) * (m - g) ** 2
        m = beta * m + (1 - beta) * g
        m_hat, v_hat = m / (1 - beta**t), v / (1 - beta**t)
        signal = g + beta / (1 - beta) * m_hat
        square = v_hat if gamma is None else signal**2 + gamma * v_hat
        out.append(signal / (np.sqrt(square) + eps))
    return np.stack(out)


def muon_vs(w, grads, lr, weight_decay=0.0, gamma=None):
    """arXiv:2601.14603, with Moonlight's factor of the shape."""
    scale = 0.2 * np.sqrt(max(np.shape(w)))
    directions = [scale * newton_schulz(u) for u in noise_scaled(grads, gamma=gamma)]
    return descend(w, directions, lr, weight_decay)


def muon_squared(
    w, grads, lr, weight_decay=0.0, steps=5, coefficients=JORDAN, nesterov=True
):
    """arXiv:2604.09967 as modded-nanogpt's script has it, with columns for outputs."""
    m, v, directions = 0.0, 0.0, []
    for g in np.asarray(grads, np.float64):
        m = 0.95 * m + 0.05 * g
        v = 0.95 * v + 0.05 * g**2
        u = (0.05 * g + 0.95 * m) if nesterov else m
        u = newton_schulz(u / (np.sqrt(v) + 1e-10), steps, coefficients)
        directions.append(u * spectral(np.shape(w)))
    return descend(w, directions, lr, weight_decay)


def mano(w, grads, lr, weight_decay=0.1, nesterov=False):
    """The authors' mano.py (arXiv:2601.23000), whose axis 0 is the outputs, here 1."""
    w, buffer, out = np.asarray(w, np.float64), 0.0, []
    for t, g in enumerate(np.asarray(grads, np.float64)):
        axis = 1 - t % 2
        buffer = 0.95 * buffer + g
        u = g + 0.95 * buffer if nesterov else buffer
        unit = w / np.maximum(np.linalg.norm(w, axis=axis, keepdims=True), 1e-8)
        u = u - (u * unit).sum(axis=axis, keepdims=True) * unit
        u = u / np.maximum(np.linalg.norm(u, axis=axis, keepdims=True), 1e-8)
        w = (1 - lr * weight_decay) * w - lr * 0.2 * np.sqrt(w.shape[axis]) * u
        out.append(w)
    return np.stack(out)


def track3(w, directions, rates, *, outward=0.5, floor=0.3825, weight_decay=0.025):
    """The step of modded-nanogpt's record 46, given the whitened momenta.

    From the released script, which has rows for the outputs; here they are columns.
    """
    w, out = np.asarray(w, np.float64), []
    for d, rate in zip(directions, rates, strict=True):
        x = d / (np.linalg.svd(d, compute_uv=False) ** 4).sum() ** 0.25
        for _ in range(12):
            gram = x @ x.T
            x = 2 * x + (-1.5 * gram + 0.5 * gram @ gram) @ x
        u = x * spectral(w.shape)
        along = (u * w).sum() / (w * w).sum() * w
        if (u * w).sum() < 0:
            u = u - along + outward * along
        lengths = np.linalg.norm(u, axis=0)
        u = u * np.maximum(1, floor * np.linalg.norm(w, axis=0) / lengths)
        radius = np.linalg.norm(w) - rate * (u * w).sum() / np.linalg.norm(w)
        shrinks = u * w > 0
        w = w - rate * u
        w = w * radius / np.linalg.norm(w)
        w = np.where(shrinks, (1 - rate * weight_decay) * w, w)
        out.append(w)
    return np.stack(out)


def polar_express(x, margin):
    """Five steps of Polar Express, as in nanochat and microsoft/dion."""
    return quintic_steps(x, PUBLISHED["polar_express5"], margin)


def nanochat_muon(w, grads, rate, decays, beta=0.95, b2=0.9):
    """nanochat/optim.py with columns for the outputs; v is always per output.

    `decays` has the weight decay of each step.
    """
    w, v, out = np.asarray(w, np.float64), 0.0, []
    for u, decay in zip(momenta(grads, beta), decays, strict=True):
        lengths = np.linalg.norm(u, axis=0)
        x = u * np.linalg.norm(u) / np.sqrt(u.shape[1]) / lengths
        x = polar_express(x, 1.01)
        x = x * np.sqrt(min(x.shape)) / np.linalg.norm(x)
        v = b2 * v + (1 - b2) * (x**2).mean(axis=0)
        d = x / np.sqrt(v)
        d = d * np.linalg.norm(x) / np.linalg.norm(d)
        w = w - rate * spectral(w.shape) * (d + decay * w * (d * w >= 0))
        out.append(w)
    return np.stack(out)


def dion(w, grads, lr, fraction=0.25, mu=0.95, weight_decay=0.01):
    """microsoft/dion, dion2.py on one device, with columns for the outputs."""
    w = np.asarray(w, np.float64)
    scale = np.sqrt(w.shape[1] / w.shape[0])
    if w.shape[0] < w.shape[1]:  # slices are columns below
        turned = dion_directions(np.swapaxes(grads, 1, 2), fraction, mu)
        directions = np.swapaxes(turned, 1, 2)
    else:
        directions = dion_directions(grads, fraction, mu)
    return descend(w, scale * directions, lr, weight_decay)


def dion_directions(grads, fraction, mu):
    """Polar factors of the largest columns, zeros elsewhere."""
    m, out = np.zeros(np.shape(grads)[1:]), []
    for g in np.asarray(grads, np.float64):
        m += g
        sums = np.abs(m).sum(axis=0)
        count = max(1, int(np.ceil(fraction * len(sums))))
        chosen = sorted(range(len(sums)), key=lambda j: -sums[j])[:count]
        o = np.zeros_like(m)
        o[:, chosen] = polar_express(m[:, chosen], 1.02)
        m[:, chosen] *= mu
        out.append(o)
    return np.stack(out)


def muown(w, grads, lr, beta=0.95, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0):
    """kcc-lion/muown, optim/muown.py, with columns for the outputs."""
    w, out = np.array(w, np.float64), []
    g = np.linalg.norm(w, axis=0)
    v_norm = g.copy()
    m_v, m_g, v_g = 0.0, 0.0, 0.0
    for t, grad in enumerate(np.asarray(grads, np.float64), start=1):
        old, u = w, w / g
        d_g = (grad * u).sum(axis=0)
        d_v = g / v_norm * (grad - u * d_g)
        m_v = beta * m_v + d_v
        o = newton_schulz(d_v + beta * m_v)
        v = u * v_norm - lr * 0.2 * max(w.shape) ** 0.5 * o
        m_g = b1 * m_g + (1 - b1) * d_g
        v_g = b2 * v_g + (1 - b2) * d_g**2
        g = g - lr * (m_g / (1 - b1**t)) / (np.sqrt(v_g / (1 - b2**t)) + eps)
        v_norm = np.linalg.norm(v, axis=0)
        w = g * v / v_norm
        if weight_decay:
            w = w - lr * weight_decay * old
            g = np.linalg.norm(w, axis=0)
        out.append(w)
    return np.stack(out)


def quintic_steps(x, rows, margin=1.0):
    """Newton-Schulz with a row of coefficients per step."""
    x = x / np.linalg.norm(x) / margin
    for a, b, c in rows:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def polar_express_eight(x):
    """Eight steps of arXiv:2505.16932, with its safety factor on all but the last."""
    return quintic_steps(x, safe_rows("polar_express"))


def leading(w):
    """The spectral norm of a matrix, and the product of its leading vectors."""
    u, s, vt = np.linalg.svd(w)
    return s[0], np.outer(u[:, 0], vt[0])


def tangent_direction(m, theta):
    """msign(M + λΘ) orthogonal to Θ: a bracket by doubling from 1e-3, then bisection.

    As in the authors' code, but to rounding, with as many doublings as it takes, and
    from λ = 0, where theirs starts from the λ of the update before.
    """
    m = m / np.linalg.norm(m)

    def inner(x):
        return (theta * polar_express_eight(m + x * theta)).sum()

    step = 1e-3 if inner(0.0) < 0 else -1e-3
    last, x = 0.0, step
    while (inner(x) < 0) == (step > 0):
        step *= 2
        last, x = x, x + step
    low, high = min(last, x), max(last, x)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inner(middle) < 0 else (low, middle)
    return polar_express_eight(m + (low + high) / 2 * theta)


def spectral_sphere(w, grads, lr, beta=0.9, radius=1.0, tangent=True, weight_decay=0.0):
    """arXiv:2601.08393, retracted after each step; MuonSphere without `tangent`."""
    out, w = [], np.asarray(w, np.float64)
    target = radius * np.sqrt(w.shape[1] / w.shape[0])
    for u in momenta(grads, beta):
        _, theta = leading(w)
        w = (1 - lr * weight_decay) * w - lr * target * (
            tangent_direction(u, theta) if tangent else polar_express_eight(u)
        )
        w = w * target / leading(w)[0]
        out.append(w)
    return np.stack(out)


def spel(w, grads, lr, beta=0.95, weight_decay=0.1):
    """arXiv:2601.21487, with the exact polar factor of the weights."""
    out, w = [], np.asarray(w, np.float64)
    for m in momenta(grads, beta, nesterov=False):
        w = polar(
            (1 - lr * weight_decay) * w - lr * quintic_steps(m, PUBLISHED["quintic"])
        )
        out.append(w)
    return np.stack(out)
