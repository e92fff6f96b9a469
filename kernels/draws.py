"""Dropout by draws of 16 bits: what a probability is in them. Imports no Triton."""

LEVELS = 1 << 16  # a draw is one of so many: probabilities count in parts of that


def levels_of(probability: float) -> int:
    """Those of the draws that drop an element."""
    return min(round(probability * LEVELS), LEVELS - 1)


def factor_of(levels: int) -> float:
    """What elements that are kept are multiplied by where so many levels drop one."""
    return LEVELS / (LEVELS - levels)
