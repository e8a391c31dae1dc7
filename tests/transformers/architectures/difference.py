"""What a model returns, and how far it is from what another returned."""

import math

import torch


def outputs(result, prefix=""):
    """name -> floating-point tensor, of whatever a model returns."""
    if isinstance(result, torch.Tensor):
        return {prefix or "output": result} if result.is_floating_point() else {}
    items = (
        result.items() if hasattr(result, "items") else enumerate(result) if isinstance(result, (tuple, list)) else ()
    )
    found = {}
    for name, value in items:
        if str(name) not in ("past_key_values", "attentions", "cross_attentions", "router_logits"):
            found.update(outputs(value, f"{prefix}.{name}" if prefix else str(name)))
    return found


def difference(expected, got, mask=None):
    """The largest difference, relative to the largest value, at tokens that are not padding; and where."""
    worst, where = 0.0, ""
    for name, value in expected.items():
        if name not in got or got[name].shape != value.shape:
            return math.inf, f"{name}: shape {tuple(value.shape)} and {tuple(got[name].shape) if name in got else None}"
        other = got[name]
        if mask is not None and is_tokenwise(value, mask):
            keep = for_rows(mask, value).bool()
            value, other = value[keep], other[keep]
        if value.numel() == 0:
            continue
        both = torch.isfinite(value) & torch.isfinite(other)
        if not torch.equal(torch.isfinite(value), torch.isfinite(other)):
            return math.inf, f"{name}: not finite at other places"
        error = (
            ((value - other)[both].abs().max() / value[both].abs().max().clamp_min(1e-6)).item() if both.any() else 0.0
        )
        if error > worst:
            worst, where = error, name
    return worst, where


def is_tokenwise(value, mask):
    """Has a tensor an entry for each token? Its rows may be the batch times choices, or codebooks."""
    return value.dim() > 1 and value.shape[1] == mask.shape[1] and value.shape[0] % mask.shape[0] == 0


def for_rows(mask, value):
    """The mask for each of its rows."""
    return mask.repeat_interleave(value.shape[0] // mask.shape[0], 0)


def gradient_difference(expected, got):
    """Relative to the largest gradient of all: some parameters' own are nothing but rounding (a key's bias)."""
    if expected.keys() != got.keys():
        return math.inf, f"gradients of other parameters: {sorted(expected.keys() ^ got.keys())[:3]}"
    scale = max((g.abs().max().item() for g in expected.values()), default=1.0) or 1.0
    errors = {name: (expected[name] - got[name]).abs().max().item() / scale for name in expected}
    where = max(errors, key=errors.get, default="")
    return errors.get(where, 0.0), where
