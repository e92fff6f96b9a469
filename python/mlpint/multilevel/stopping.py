"""When to stop coarse training: as soon as fine training lowers the loss by more per FLOP."""

from __future__ import annotations

import dataclasses

_PATIENCE = 2


@dataclasses.dataclass
class StoppingRule:
    """Compares windows of cycles with probes of fine steps alone, by the slope of the fine loss over FLOPs.

    A window is so many cycles, a probe takes the FLOPs of one of them. The fine losses are those of single batches, so
    that a probe may win by chance: two in a row have to.

    Attributes:
        window: cycles in a window.
        over: coarse training has ended.
    """

    window: int
    probing: bool = False
    over: bool = False
    lost: int = 0
    slope: float = 0.0
    cycle: float = 0.0
    points: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    def another(self, flops: float, loss: float) -> bool:
        """Whether a cycle is to follow a fine step that ended with this loss, so many FLOPs after the start."""
        if self.over:
            return False
        self.points.append((flops, loss))
        spent = flops - self.points[0][0]
        if not self.probing and len(self.points) == self.window + 1:
            self.slope, self.cycle = slope(self.points), spent / self.window
            self.probing, self.points = True, self.points[-1:]
        elif self.probing and spent >= self.cycle and len(self.points) > 2:
            self.lost = self.lost + 1 if slope(self.points) <= self.slope else 0
            self.over = self.lost == _PATIENCE
            self.probing, self.points = False, self.points[-1:]
        return not self.probing and not self.over


def slope(points: list[tuple[float, float]]) -> float:
    """Of the least-squares line through (x, y)."""
    x0, y0 = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((x - x0) * (y - y0) for x, y in points) / sum((x - x0) ** 2 for x, _ in points)
