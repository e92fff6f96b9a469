"""Error control: how wrong the stack's gradients are, and which options follow from that (arXiv 2601.09026, 3.2.3).

A rehearsal goes through the present batch again, gauges turn it into figures, the ladder orders options by cost, the
policy decides from figures alone, and :class:`ErrorControl` carries out what the policy asks for and decides. This
package may import :mod:`mlpint.parallel` and what that may. Public: :class:`ErrorControl`, :func:`gradient_bias`.
"""

from .error_control import ErrorControl
from .gradient_bias import gradient_bias

__all__ = ["ErrorControl", "gradient_bias"]
