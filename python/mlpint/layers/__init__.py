"""Evaluating layers for the solver: forwards, and their vector-Jacobian products backwards.

An evaluator takes one batch through the layers that are on this rank, be they separate modules or the rows of a
:class:`mlpint.nn.BlockStack`; tapes and saved rows are what it keeps for the way back, random keys what makes dropout
the same in every sweep. May import :mod:`mlpint.nn` and what that may. Nothing here is public but by way of
:class:`mlpint.LayerParallel`.
"""
