"""Planning: which way to spread a network and its batch over ranks is fastest.

A training step simulated event by event, what its parts take by measurement, the ways that there are, and how good the
gradients of each have been. May import :mod:`mlpint.parallel` and what that may. Public: the command ``mlpint plan``.
"""
