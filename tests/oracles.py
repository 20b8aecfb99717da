"""Closed forms that the flow is tested against, independent of the library (NumPy only)."""

import numpy as np


def riccati(y, w1, w2, lam, t):
    """P(t) = [W1^T; W2] [W1^T; W2]^T for dW1/dt = W2^T R, dW2/dt = R W1^T, R = Y - W2 W1, if W2^T W2 - W1 W1^T = lam I.

    Y is (m, n), W1 (h, n), W2 (m, h). The matrix Riccati solution, advanced in short steps by its semigroup property,
    since the formula in one shot overflows its digits at long times.
    """
    m, n = y.shape
    f, basis = np.linalg.eigh(np.block([[-lam / 2 * np.eye(n), y.T], [y, lam / 2 * np.eye(m)]]))
    steps = max(1, int(np.ceil(np.abs(f).max() * t / 4)))
    dt = t / steps
    rate = 2 * f * dt
    gain = np.where(np.abs(rate) < 1e-12, dt, np.expm1(rate) / np.where(f == 0, 1.0, 2 * f))
    q = basis.T @ np.vstack([w1.T, w2])
    for _ in range(steps):
        cholesky = np.linalg.cholesky(np.eye(q.shape[1]) + q.T @ (gain[:, None] * q))
        q = np.linalg.solve(cholesky, (np.exp(f * dt)[:, None] * q).T).T
    return basis @ (q @ q.T) @ basis.T


def scalar_mode(y, u0, v0, t):
    """u(t), v(t) for u' = (y - u v) v, v' = (y - u v) u, with unequal imbalance; needs u0 != -v0."""
    d = (u0 - v0) * (u0 + v0)
    s = np.sqrt(4 * y**2 + d**2)
    z0 = (u0 + v0) ** 2
    high = 2 * y + s
    low = -(d**2) / high
    decay = np.exp(-s * t)
    z = (high * (z0 - low) - low * (z0 - high) * decay) / ((z0 - low) - (z0 - high) * decay)
    w = np.sign(u0 + v0) * np.sqrt(z)
    return (w + d / w) / 2, (w - d / w) / 2
