"""The cost model: which way to spread a network's layers over ranks is fastest, counted in layer evaluations.

May import :mod:`mlpint.mgrit`. Public: the command ``mlpint plan``.
"""
