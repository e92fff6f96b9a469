"""What the C++ solver is told: options, who owns which layer, learnt coarse operators, and what a solve has cost.

May import :mod:`mlpint.comm`. Knows neither layers nor torch modules. Public: :class:`MGRIT`.
"""

from .options import MGRIT

__all__ = ["MGRIT"]
