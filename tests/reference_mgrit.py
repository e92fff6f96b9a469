"""Textbook FAS multigrid-in-time over whole arrays of points, written for clarity: what the solver is compared with.

Nothing is reused, skipped or distributed here, and the correction is added as a correction.
"""

import torch


def grid(steps, cfactor, levels):
    """Points of each level as positions on level 0."""
    points = [list(range(steps + 1))]
    while len(points) < levels and (len(points) == 1 or len(points[-1]) > 2):
        kept = points[-1][:-1:cfactor]
        points.append([*kept, points[-1][-1]])
    return points


def mirrored(points):
    return [[level[-1] - p for p in reversed(level)] for level in points]


class Mgrit:
    """fine[m](u): the fine step from position m. coarse: "injection" or "identity"."""

    def __init__(self, fine, points, coarse, fcf):
        self.fine, self.points, self.coarse, self.fcf = fine, points, coarse, fcf

    def phi(self, level, i, u):
        position, end = self.points[level][i], self.points[level][i + 1]
        if level == 0:
            return self.fine[position](u)
        if self.coarse == "identity":
            return u
        return u + (end - position) * (self.fine[position](u) - u)

    def c_points(self, level):
        return [self.points[level].index(p) for p in self.points[level + 1]]

    def f_relax(self, level, u, g):
        c = self.c_points(level)
        for i in range(len(u) - 1):
            if i + 1 not in c:
                u[i + 1] = self.phi(level, i, u[i]) + g[i + 1]

    def c_relax(self, level, u, g):
        for i in self.c_points(level)[1:]:
            u[i] = self.phi(level, i - 1, u[i - 1]) + g[i]

    def serial(self, level, u, g):
        for i in range(len(u) - 1):
            u[i + 1] = self.phi(level, i, u[i]) + g[i + 1]

    def zeros(self, level, like):
        return [torch.zeros_like(like) for _ in self.points[level]]

    def cycle(self, level, u, g):
        if level == len(self.points) - 1:
            self.serial(level, u, g)
            return
        self.f_relax(level, u, g)
        if self.fcf:
            self.c_relax(level, u, g)
            self.f_relax(level, u, g)
        c = self.c_points(level)
        old = [u[i] for i in c]
        g_c = self.zeros(level + 1, u[0])
        for k in range(1, len(c)):
            residual = g[c[k]] + self.phi(level, c[k] - 1, u[c[k] - 1]) - u[c[k]]
            g_c[k] = residual + old[k] - self.phi(level + 1, k - 1, old[k - 1])
        new = list(old)
        self.cycle(level + 1, new, g_c)
        for k, i in enumerate(c):
            u[i] = u[i] + new[k] - old[k]
        self.f_relax(level, u, g)

    def residual_norm(self, u):
        """At C-points inside, with the intervals relaxed from their C-points."""
        v = list(u)
        self.f_relax(0, v, self.zeros(0, u[0]))
        c = self.c_points(0)[1:-1]
        return sum(float((self.fine[i - 1](v[i - 1]) - v[i]).square().sum()) for i in c) ** 0.5

    def solve(self, u0, iterations):
        """States the fine steps are evaluated at, the final value, residual norms after each iteration."""
        if iterations == 0 or len(self.points) == 1:
            u = [u0]
            for step in self.fine:
                u.append(step(u[-1]))
            return u[:-1], u[-1], []
        u = self.zeros(len(self.points) - 1, u0)
        u[0] = u0
        for level in reversed(range(1, len(self.points))):
            g = self.zeros(level, u0)
            if level == len(self.points) - 1:
                self.serial(level, u, g)
            else:
                self.f_relax(level, u, g)
            below = self.zeros(level - 1, u0)
            for k, i in enumerate(self.c_points(level - 1)):
                below[i] = u[k]
            u = below
        norms = [self.residual_norm(u)]
        for _ in range(iterations - 1):
            self.cycle(0, u, self.zeros(0, u0))
            norms.append(self.residual_norm(u))
        self.f_relax(0, u, self.zeros(0, u0))
        return u[:-1], self.fine[-1](u[-2]), norms


def gradients(layers, x, weight, options):
    """Output, and gradients of (output * weight).sum() for x and every parameter, as MGRIT gives them."""
    points = grid(len(layers), options.cfactor, options.levels)
    fcf = options.relaxation == "FCF"
    with torch.no_grad():
        forward = Mgrit(list(layers), points, options.coarse, fcf)
        states, y, forward_norms = forward.solve(x, options.iterations("forward"))

    def vjp(n, lam, wanted):
        z = states[n].clone().requires_grad_()
        out = layers[n](z)
        return torch.autograd.grad(out, [z] if wanted is None else wanted, lam, allow_unused=True)

    n_layers = len(layers)
    steps = [lambda lam, n=n_layers - 1 - m: vjp(n, lam, None)[0] for m in range(n_layers)]
    adjoint = Mgrit(steps, mirrored(points), options.coarse, fcf)
    lams, x_grad, backward_norms = adjoint.solve(weight, options.iterations("backward"))
    grads = []
    for n, layer in enumerate(layers):
        grads.append(vjp(n, lams[n_layers - 1 - n], list(layer.parameters())))
    return y, x_grad, grads, {"forward": forward_norms, "backward": backward_norms}
