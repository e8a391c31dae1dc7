"""Tiers with a part replaced, for the time of a test."""

import dataclasses

from flash_attn_mps import tiers


def replace_tier(monkeypatch, name, **changes):
    """The tier of that name with other `run`, `limits` and so on, wherever it is looked up."""
    changed = dataclasses.replace(tiers.BY_NAME[name], **changes)
    monkeypatch.setattr(tiers, "ORDER", tuple(changed if tier.name == name else tier for tier in tiers.ORDER))
    monkeypatch.setitem(tiers.BY_NAME, name, changed)


def leave_out(monkeypatch, name):
    """No tier of that name is asked."""
    monkeypatch.setattr(tiers, "ORDER", tuple(tier for tier in tiers.ORDER if tier.name != name))
