"""How good the gradients of each setting have been: what was measured, not what is promised.

The cosine between the stack's gradient and the exact one, of a byte GPT of 32 layers (d 128) after 1,000 steps of
training with AdamW. Without a consistency term: betas .9 and .999 (docs/experiments.md, section 5; at .95 all are
poorer). With one, mu = 1: betas .9 and .95, the lowest of three seeds (section 13).
"""

from __future__ import annotations

from ..mgrit.options import MGRIT

_PLAIN = {
    ("injection", 4): (0.491, 0.789, 0.884),
    ("injection", 8): (0.557, 0.704, 0.856),
    ("scaled", 4): (0.732, 0.908, 0.967),
    ("scaled", 8): (0.747, 0.923, 0.979),
    ("fitted", 4): (0.840, 0.941, 0.985),
    ("fitted", 8): (0.874, 0.946, 0.992),
    ("sum", 4): (0.990, 0.998, 1.000),
    ("sum", 8): (0.965, 0.992, 0.998),
}
_ITERATIONS = {(1, 1): 0, (2, 1): 1, (2, 2): 2}
_CONSISTENT = {("injection", 4): 0.994, ("injection", 8): 0.999}


def expected_cosine(options: MGRIT, consistency: bool) -> float | None:
    """Of the gradients; 1 for exact sweeps, None where nothing was measured."""
    if options.exact:
        return 1.0
    setting, place = (options.coarse, options.cfactor), _ITERATIONS.get((options.forward_iters, options.backward_iters))
    if place is None or options.levels != 2 or options.relaxation != "F":
        return None
    if consistency:
        return _CONSISTENT.get(setting)
    return _PLAIN[setting][place] if setting in _PLAIN else None
