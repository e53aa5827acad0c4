"""Steps far out of line with those before them: a written rule, the same on every rank and in every repetition.

A step is a spike where its loss or its gradient norm lies more than `deviations` standard deviations above the mean of the last `window`
steps that were none. What is remembered of them is saved with each checkpoint, so a continued run judges as if it had never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmllm.config import Spikes


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the rule knows of the steps so far."""

    loss: tuple[float, ...] = ()
    """Of the last steps that were no spikes, oldest first."""
    grad_norm: tuple[float, ...] = ()
    """Likewise."""
    in_a_row: int = 0
    """Spikes since the last step that was none."""
    skipped: int = 0
    """Updates not made, in the whole run."""


def seen_before(state: Mapping[str, Any]) -> Seen:
    """From the plain values of a checkpoint."""
    saved: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in state.get("spikes", {}).items()}
    return Seen(**saved)


def not_finite(measures: Mapping[str, float]) -> list[str]:
    """Names of those that are infinite or not a number."""
    return [name for name, value in measures.items() if not math.isfinite(value)]


def spike(seen: Seen, loss: float, grad_norm: float, rule: Spikes) -> str:
    """Why a step is a spike, in words; nothing if it is none."""
    if rule.rule == "off" or len(seen.loss) < rule.window:
        return ""
    for name, value in (("loss", loss), ("grad_norm", grad_norm)):
        past = np.array(getattr(seen, name)[-rule.window:])
        limit = float(past.mean() + rule.deviations * past.std())
        if value > limit:
            return (f"{name} {value:.4g} is above {limit:.4g}, the mean {past.mean():.4g} of the last {len(past)} steps and "
                    f"{rule.deviations:g} standard deviations (spikes.deviations)")
    return ""


def accepted(seen: Seen, loss: float, grad_norm: float, rule: Spikes) -> Seen:
    """After a step that was no spike."""
    if rule.rule == "off":
        return seen
    return replace(seen, in_a_row=0, loss=(*seen.loss, loss)[-rule.window:], grad_norm=(*seen.grad_norm, grad_norm)[-rule.window:])


def skipped(seen: Seen) -> Seen:
    """After a spike that was skipped."""
    return replace(seen, in_a_row=seen.in_a_row + 1, skipped=seen.skipped + 1)
