"""An oracle in numpy float64, written from qbr/kernels/README.md and sharing no code with the backends.

Codes and masks are taken in the compute dtype of the contract (float32, or float64 for float64 x), because a tie is
a tie only there; every sum and product after that is in float64.
"""

from __future__ import annotations

import numpy as np


def quantities(x, alpha, spec, relu=False, clip=None):
    """x: ndarray; alpha: 1-D ndarray; both of the compute dtype. A dict of everything that the ops return."""
    compute = x.dtype.type
    y, passes = x, np.ones(x.shape, bool)
    if relu:
        bound = compute(np.inf if clip is None else clip)
        y = np.minimum(np.maximum(x, compute(0)), bound)
        passes = (x > 0) & (x <= bound)
    axis = spec.channel_axis
    shape = [1] * x.ndim
    if axis is not None:
        shape[axis] = -1
    step = alpha.reshape(shape)
    v = y / step
    if spec.binary:
        b = np.where(v >= 0, 1, -1).astype(np.int64)
    else:
        b = np.rint(np.minimum(np.maximum(v, spec.qn), spec.qp)).astype(np.int64)
    inside = (v >= spec.qn) & (v <= spec.qp)

    y64, step64 = y.astype(np.float64), np.broadcast_to(step, x.shape).astype(np.float64)
    d = y64 - b * step64
    codes, counts = np.unique(b, return_counts=True)
    n = dict(zip(codes.tolist(), counts.tolist()))
    per_element = x.size // max(alpha.size, 1)
    dloss_dalpha = np.zeros(alpha.size)
    for c in range(alpha.size):
        mine = np.ones(x.shape, bool) if axis is None else np.moveaxis(np.zeros(x.shape, bool), axis, 0)
        if axis is not None:
            mine[c] = True
            mine = np.moveaxis(mine, 0, axis)
        for k in n:
            dloss_dalpha[c] -= 2 * k * d[mine & (b == k)].sum() / n[k]
    return {
        "y": y64,
        "v": y64 / step64,
        "b": b,
        "xhat": b * step64,
        "inside": inside,
        "passes": passes,
        "d": d,
        "n": np.array([n.get(k, 0) for k in range(spec.qn, spec.qp + 1)]),
        "S": np.array([d[b == k].sum() for k in range(spec.qn, spec.qp + 1)]),
        "Q": np.array([(d[b == k] ** 2).sum() for k in range(spec.qn, spec.qp + 1)]),
        "loss": sum((d[b == k].mean() ** 2 + d[b == k].var()) for k in n),
        "dloss_dx": np.where(passes, 2 * d / np.maximum(np.vectorize(lambda k: n.get(k, 1))(b) if b.size else 1, 1), 0),
        "dloss_dalpha": dloss_dalpha,
        "s": 1 / np.sqrt(max(per_element, 1) * max(spec.qp, 1)),
        "axis": axis,
    }


def lsq_gradients(q, grad):
    """dx and dalpha of LSQ for an incoming gradient, from quantities()."""
    term = grad * (q["b"] - q["v"] * q["inside"])
    axes = tuple(i for i in range(grad.ndim) if i != q["axis"])
    return grad * q["inside"] * q["passes"], q["s"] * term.sum(axis=axes).reshape(-1)
