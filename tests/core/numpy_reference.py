"""Cross entropy in float64 numpy, and problems to try it on: what the tests of the torch-free core share."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np

_ROW_MAPS_H = (Path(__file__).resolve().parents[2] / "csrc/rowwise/row_maps.h").read_text()
# The numbers of the row maps.
MAP = SimpleNamespace(**{name: i for i, name in enumerate(re.findall(r'(?m)^    "(\w+)[: ]', _ROW_MAPS_H))})

DTYPES = ("float32", "float64", "float16", "bfloat16")
# Relative error of a result kept in the dtype; the arithmetic is float32, or float64 for float64.
EPS = {"float32": 2e-6, "float64": 1e-13, "float16": 1e-3, "bfloat16": 8e-3}
HALF_ULP = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # of the 16-bit types: what rounding costs
FEATURES = {
    "plain": {},
    "weight": {"weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "weight, smoothing, sum": {"weight": True, "label_smoothing": 0.2, "reduction": "sum"},
    "rows": {"reduction": "none", "weight": True},
    "everything": {
        "weight": True,
        "sample_weight": True,
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "softcap": 3.0,
        "logit_scale": 0.7,
    },
    "focal": {"row_map": MAP.focal, "map_params": [2.0], "weight": True},
    "focal and everything": {
        "row_map": MAP.focal,
        "map_params": [0.5],
        "weight": True,
        "sample_weight": True,
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "softcap": 3.0,
        "logit_scale": 0.7,
    },
    "poly-1": {"row_map": MAP.poly1, "map_params": [-0.5]},
    "generalized cross entropy": {
        "row_map": MAP.generalized_cross_entropy,
        "map_params": [0.7],
        "weight": True,
        "label_smoothing": 0.1,
    },
    "token-scaled": {"row_map": MAP.token_scaled, "map_params": [], "z_loss": 0.01},
    "margin": {"margins": [0.6, 0.0], "weight": True},
    "margins and everything": {
        "margins": [0.5, 0.2],
        "weight": True,
        "sample_weight": True,
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "softcap": 3.0,
        "logit_scale": 1.7,
        "row_map": MAP.focal,
        "map_params": [0.5],
    },
    "normalizer": {"normalizer": 7.5, "weight": True, "z_loss": 0.01},
}


def to_bits(x):
    """bfloat16 bits of x, rounded to nearest even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return np.asarray((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, np.uint16)


def stored(x, dtype):
    return to_bits(x) if dtype == "bfloat16" else np.asarray(x).astype(dtype)


def exact(x):
    """float64 of an array as the core stores it."""
    return (x.astype(np.uint32) << 16).view(np.float32).astype(float) if x.dtype == np.uint16 else x.astype(float)


def focal(nll, gamma):
    """g(nll) of the row map, and its slope."""
    p = np.exp(-nll)
    u = -np.expm1(-nll)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(u > 0, nll / u, 1)
    return u**gamma * nll, u**gamma * (1 + gamma * p * ratio)


# Functions of the nll and their slopes, by number.
ROW_MAPS = {
    MAP.focal: focal,
    MAP.poly1: lambda nll, epsilon: (nll - epsilon * np.expm1(-nll), 1 + epsilon * np.exp(-nll)),
    MAP.generalized_cross_entropy: lambda nll, q: (-np.expm1(-q * nll) / q, np.exp(-q * nll)),
    MAP.token_scaled: lambda nll: (np.exp(-nll) * nll, np.exp(-nll)),
}


def with_margins(x, angle, cosine):
    """A target's logit with margins, and the derivative."""
    sine = np.sqrt(np.maximum((1 - x) * (1 + x), 0))
    turned = x > np.cos(np.pi - angle)
    value = np.where(turned, x * np.cos(angle) - sine * np.sin(angle), x - angle * np.sin(np.pi - angle)) - cosine
    steep = np.where(x > 1, 0, np.sin(angle) * x / np.maximum(sine, 1e-3))
    return value, np.where(turned, np.cos(angle) + steep, 1)


def transformed(x, target, *, ignore_index=-100, softcap=0.0, logit_scale=1.0, margins=()):
    """z and dz/dx, [rows, classes], of x [outer, classes, inner]."""
    z = x.transpose(0, 2, 1).reshape(-1, x.shape[1])
    dz = np.full_like(z, logit_scale)
    if margins:
        z, rows = z.copy(), np.arange(len(z))
        index = np.where(target == ignore_index, 0, target)
        value, slope = with_margins(z[rows, index], *margins)
        counted = target != ignore_index
        z[rows, index] = np.where(counted, value, z[rows, index])
        dz[rows, index] *= np.where(counted, slope, 1)
    z = z * logit_scale
    if softcap:
        dz = dz * (1 - np.tanh(z / softcap) ** 2)
        z = softcap * np.tanh(z / softcap)
    return z, dz


def entropy(x, *, softcap=0.0, logit_scale=1.0):
    """Of the softmax of each row, [rows]."""
    z = (x * logit_scale).transpose(0, 2, 1).reshape(-1, x.shape[1])
    z = softcap * np.tanh(z / softcap) if softcap else z
    log_p = z - np.logaddexp.reduce(z, 1)[:, None]
    return -np.where(log_p > -np.inf, np.exp(log_p) * np.where(log_p > -np.inf, log_p, 0), 0).sum(1)


def reference(x, target, *, weight=None, sample_weight=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0,
              softcap=0.0, logit_scale=1.0, reduction="mean", grad_output=1.0, normalizer=None, row_map=0,
              map_params=(), margins=()):  # fmt: skip
    """Loss and its derivatives by x and by a probability target, in float64. x: [outer, classes, inner]."""
    outer, classes, inner = x.shape
    rows = x.transpose(0, 2, 1).reshape(-1, classes)
    w = np.ones(classes) if weight is None else weight.astype(float)
    s = np.ones(len(rows)) if sample_weight is None else sample_weight.astype(float)
    soft = target.dtype.kind == "f"
    transform = {"softcap": softcap, "logit_scale": logit_scale, "margins": margins}
    z, dz = transformed(x, target.reshape(-1) if not soft else target, ignore_index=ignore_index, **transform)
    lse = z.max(1) + np.log(np.exp(z - z.max(1, keepdims=True)).sum(1)) if z.size else np.zeros(len(z))
    softmax = np.exp(z - lse[:, None])
    if soft:
        counted = np.ones(len(rows))
        q = target.transpose(0, 2, 1).reshape(-1, classes)
        d = s.sum()
    else:
        t = target.reshape(-1).astype(int)
        counted = (t != ignore_index).astype(float)
        q = (np.arange(classes) == np.where(counted, t, 0)[:, None]).astype(float)
        d = (s * counted * w[np.where(counted, t, 0)]).sum()
    # Index targets weigh their own share by w_t and the smoothed rest by w_c: the same as w on every share.
    q = (1 - label_smoothing) * q + label_smoothing / classes
    nll = (w * q * (lse[:, None] - z)).sum(1)
    slope, level = np.ones(len(rows)), np.zeros(len(rows))
    if row_map:
        mass = (w * q).sum(1)
        mean = nll / mass
        value, slope = ROW_MAPS[row_map](mean, *map_params)
        nll, level = mass * value, value - mean * slope
    if normalizer is None:
        n = (s * counted).sum()
    else:
        n = d = normalizer
    if reduction == "mean":
        u, uz = s * counted / d, s * counted / n
        loss = (s * counted * nll).sum() / d + z_loss * (s * counted * lse**2).sum() / n
    else:
        u = uz = s * counted
        loss = u * (nll + z_loss * lse**2)
        loss = loss.sum() if reduction == "sum" else loss
    g = np.broadcast_to(np.asarray(grad_output, float), len(rows))
    by_z = (u * slope)[:, None] * ((w * q).sum(1, keepdims=True) * softmax - w * q) + (uz * z_loss * 2 * lse)[
        :, None
    ] * softmax
    by_p = (g * u)[:, None] * (1 - label_smoothing) * w * (slope[:, None] * (lse[:, None] - z) + level[:, None])
    back = lambda y: y.reshape(outer, inner, classes).transpose(0, 2, 1)  # noqa: E731
    return loss, back(g[:, None] * by_z * dz), back(by_p)


def multi_margin(x, target, p, margin, options, grad_output):
    """Multi-margin loss and its gradient in float64; x: [outer, classes, inner]."""
    outer, classes, inner = x.shape
    rows = x.transpose(0, 2, 1).reshape(-1, classes)
    counted = target != options.get("ignore_index", -100)
    w = options["weight"].astype(float) if "weight" in options else np.ones(classes)
    w = np.where(counted, w[target * counted], 0)
    is_target = np.arange(classes) == target[:, None]
    z = np.where(
        is_target, 0, np.maximum(0, margin - np.take_along_axis(rows, target[:, None] * counted[:, None], 1) + rows)
    )
    loss = w * (z**p).sum(1) / classes
    slope = (z > 0) * p * z ** (p - 1) / classes
    d = 1.0
    if options["reduction"] == "mean":
        d = counted.sum() if options.get("mean_over_rows") else w.sum()
    grad = np.where(is_target, -slope.sum(1, keepdims=True), slope) * (w * grad_output / d)[:, None]
    return loss if options["reduction"] == "none" else loss.sum() / d, grad.reshape(outer, inner, classes).transpose(
        0, 2, 1
    )


def problem(shape, dtype, features, layout="contiguous", soft=False, seed=0):
    """Arrays of one problem, and the same in float64 for the reference."""
    rng = np.random.default_rng([seed, *shape])
    x = rng.normal(0, 3, shape)
    if layout == "classes last" and len(shape) == 3:
        logits = stored(x.transpose(0, 2, 1), dtype).transpose(0, 2, 1)
    elif layout == "sliced":
        logits = stored(np.repeat(np.repeat(x, 2, 0), 3, 1), dtype)[::2, ::3]
    else:
        logits = stored(x, dtype)
    classes, rows = shape[1], int(np.prod(shape)) // shape[1]
    if soft:
        p = rng.random(shape)
        target = stored(p / p.sum(1, keepdims=True), dtype)
    else:
        target = rng.integers(0, classes, rows)
        target[rng.random(rows) < 0.2] = features.get("ignore_index", -100)
        if rows:
            target[0] = classes - 1
    accum = "float64" if dtype == "float64" else "float32"
    options = dict(features)
    if options.get("weight"):
        options["weight"] = rng.uniform(0.5, 2, classes).astype(accum)
    if options.get("sample_weight"):
        options["sample_weight"] = rng.uniform(0.5, 2, rows).astype(accum)
    cube = (*shape, 1)[:3]
    exact_target = exact(target).reshape(cube) if soft else target
    return logits, target, options, exact(logits).reshape(cube), exact_target


def merged(stats):
    """The statistics of all classes from those of the shards, as fastloss.rows.merge_row_stats merges them."""
    s = np.stack(stats)
    ref = s[:, 0].max(0)
    base = lambda r: np.where(r == -np.inf, 0, r)  # noqa: E731
    factor, shift = np.exp(s[:, 0] - base(ref)), base(s[:, 0]) - base(ref)
    out = {"ref": ref, "others": (s[:, 1] * factor).sum(0), "target": s[:, 2].max(0)}
    if s.shape[1] in (5, 8):
        out |= {"dot": (s[:, 3] + s[:, 4] * shift).sum(0), "mass": s[:, 4].sum(0)}
    if s.shape[1] in (6, 8):
        first = s[:, -3].argmax(0)
        out["best_at"] = s[first, -2, np.arange(len(ref))]
        out["exp_dot"] = (factor * (s[:, -1] + shift * s[:, 1])).sum(0)
    return out


def saved_of_shards(stats, soft, features, denominators, slope=None, level=None):
    """What backward of a shard takes: see SavedFields in csrc/rowwise/cross_entropy.h."""
    fields = [stats["ref"], stats["others"], stats["target"]]
    if soft:
        fields.append(stats["mass"])
    if features.get("row_map"):
        fields += [slope, level] if soft else [slope]
    return np.concatenate([*fields, denominators]).astype(stats["ref"].dtype)


def close(got, want, dtype):
    got = exact(np.asarray(got)).reshape(np.shape(want))
    # Where terms cancel, the error is that of the terms, which are about as large as the largest result, or 1. 16 bits
    # add no more than what rounding to nearest does; 2^-25 is half the distance of float16's smallest numbers.
    scale = max(np.abs(want).max(initial=0), 1) if np.size(want) == 1 else np.abs(want).max(initial=0)
    eps = 4 * EPS["float32" if dtype in HALF_ULP else dtype]
    tiny = 2.0**-25 if dtype == "float16" else 0
    np.testing.assert_allclose(got, want, rtol=eps + HALF_ULP.get(dtype, 0), atol=eps * scale + tiny)
