"""A solve that an exception ended leaves nothing behind: the core's solver is as good as new for the next one."""

import gc
import math
import threading
import weakref
from collections import defaultdict, deque

import pytest

from mlpint import _core

STEPS, CFACTOR = 13, 3
SETTINGS = [(0, False), (1, True), (3, False), (2, True)]  # iterations, learning


class Number:
    """A state that is one number; the core asks for its memory only where ranks are several."""

    alive = weakref.WeakSet()

    def __init__(self, value):
        self.value = value
        Number.alive.add(self)


class Fault(Exception):
    pass


class Propagator:
    """Steps that differ from each other. Every call is written down, and call ``fails_at`` raises."""

    def __init__(self, learning=False, fails_at=None):
        self.learning, self.fails_at, self.calls = learning, fails_at, []

    def _called(self, *call):
        if len(self.calls) == self.fails_at:
            raise Fault(call)
        self.calls.append(call)

    def evaluate(self, positions, inputs, outputs, level, sweep, index):
        values = [x.value for x in inputs]
        self._called("evaluate", positions, values, [y is not None for y in outputs], level, sweep)
        return [Number(x + 0.1 * math.tanh((p + 1) * x)) for p, x in zip(positions, values, strict=True)]

    def extrapolate(self, u, v, length):
        self._called("extrapolate", u.value, v.value, length)
        return Number(u.value + length * (v.value - u.value))

    def axpy(self, a, x, y):
        self._called("axpy", a, x.value, y.value)
        return Number(a * x.value + y.value)

    def increments(self, u, outputs):
        self._called("increments", u.value, [y.value for y in outputs])
        return Number(sum(y.value - u.value for y in outputs))

    def squared_norm(self, x):
        self._called("squared_norm", x.value)
        return x.value**2

    def empty(self, index):
        self._called("empty", index)
        return Number(math.nan)

    def slices(self):
        return 1

    def finishes_on_chain(self):
        self._called("finishes_on_chain")
        return False

    def learns(self):
        self._called("learns")
        return self.learning

    def learnt_step(self, position, length, u, v):
        self._called("learnt_step", position, length, u.value, v.value)
        return Number(u.value + 0.9 * length * (v.value - u.value))

    def observe(self, position, length, u, v, end):
        self._called("observe", position, length, u.value, v.value, end.value)


def solve(solver, iterations, propagator, *, first=True):
    """What a solve gives, and all that it asked of the propagator."""
    result = solver.solve(propagator, Number(0.7) if first else None, iterations)
    final = result.final_value.value if result.final_value else None
    return final, result.iterations, result.residual_norms, propagator.calls


def block(coarse="fitted", levels=2, fcf=False, tolerance=0.0):
    return _core.Solver(
        _core.Grid(STEPS, CFACTOR, levels),
        _core.Partition([0, STEPS], STEPS),
        [0],
        _core.SelfTransport(),
        coarse=coarse,
        fcf=fcf,
        tolerance=tolerance,
        norms=True,
    )


def cyclic(tolerance=0.0):
    grid = _core.Grid(STEPS, CFACTOR, 2)
    return _core.CyclicSolver(grid, [0] * STEPS, _core.SelfTransport(), tolerance=tolerance, norms=True)


MAKERS = {
    "fitted": block,
    "three levels": lambda: block(levels=3),
    "FCF": lambda: block("injection", 3, fcf=True),
    "sum": lambda: block("sum"),
    "tolerance": lambda: block(tolerance=1e-2),
    "cyclic": cyclic,
    "cyclic, tolerance": lambda: cyclic(tolerance=1e-2),
}


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS.keys())
def test_any_call_may_fail(maker):
    """Each call of a learning solve in turn, so in every phase: relaxation, coarse sweep, last sweep, learning."""
    expected = [solve(maker(), k, Propagator(learning)) for k, learning in SETTINGS]
    calls = solve(maker(), 3, Propagator(True))[-1]
    solver = maker()
    gc.collect()
    for fails_at in range(len(calls)):
        try:
            solve(solver, 3, Propagator(True, fails_at))
        except Fault:
            pass
        else:
            raise AssertionError(f"call {calls[fails_at]} did not fail")
        assert not Number.alive, f"call {calls[fails_at]} failed, and the solver has kept states"
        i = fails_at % len(SETTINGS)
        iterations, learning = SETTINGS[i]
        assert solve(solver, iterations, Propagator(learning)) == expected[i], f"after call {calls[fails_at]} failed"


@pytest.mark.parametrize("maker", [block, cyclic])
def test_what_failed_is_known_until_the_next_solve(maker):
    solver = maker()
    calls = solve(solver, 2, Propagator(True))[-1]
    assert solver.where[0] == "idle"
    last = max(i for i, call in enumerate(calls) if call[0] == "evaluate")
    with pytest.raises(Fault):
        solve(solver, 2, Propagator(True, last))
    assert solver.where == ("last sweep", 0, calls[last][1][0])
    solve(solver, 2, Propagator(True))
    assert solver.where[0] == "idle"


class Mailboxes:
    """A transport between threads. Wait number ``fails_at`` of a rank raises, and then all do."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size
        self.post = self.fails_at = None
        self.waits = 0

    def send(self, to, tag, state):
        self.post.put((self.rank, to, tag), state.value if isinstance(state, Number) else bytes(state))
        return Transfer(lambda seconds: None)

    def receive(self, source, tag, state):
        def wait(seconds):
            if self.waits == self.fails_at:
                self.post.close()
            self.waits += 1
            arrived = self.post.get((source, self.rank, tag), seconds)
            if isinstance(state, Number):
                state.value = arrived
            else:
                state[:] = arrived

        return Transfer(wait)


class Transfer:
    def __init__(self, wait):
        self.wait = wait

    def test(self):
        return False


class Post:
    """The messages under way between threads."""

    def __init__(self):
        self.changed, self.closed, self.messages = threading.Condition(), False, defaultdict(deque)

    def put(self, key, message):
        with self.changed:
            self.messages[key].append(message)
            self.changed.notify_all()

    def get(self, key, seconds):
        with self.changed:
            assert self.changed.wait_for(lambda: self.closed or self.messages[key], seconds), key
            if self.closed:
                raise Fault(key)
            return self.messages[key].popleft()

    def close(self):
        with self.changed:
            self.closed = True
            self.changed.notify_all()


class Ranks:
    """Solvers on two ranks that are threads."""

    def __init__(self, make):
        self.mailboxes = [Mailboxes(rank, 2) for rank in range(2)]
        self.solvers = [make(_core.PythonTransport(m)) for m in self.mailboxes]

    def solve(self, iterations, learning, fails_at=(None, None)):
        """What each rank gets, or the exception there, and how many times it has waited."""
        post, results = Post(), [None, None]
        for mailbox, wait in zip(self.mailboxes, fails_at, strict=True):
            mailbox.post, mailbox.waits, mailbox.fails_at = post, 0, wait

        def rank_main(rank):
            try:
                results[rank] = solve(self.solvers[rank], iterations, Propagator(learning), first=rank == 0)
            except Fault as error:
                results[rank] = type(error)

        threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results, [m.waits for m in self.mailboxes]


def two_blocks(transport):
    partition = _core.Partition([0, 7, STEPS], STEPS)  # the border is inside an interval
    grid, ranks = _core.Grid(STEPS, CFACTOR, 3), [0, 1]
    return _core.Solver(grid, partition, ranks, transport, coarse="fitted", fcf=True, tolerance=0.0, norms=True)


def two_dealt(transport):
    owners = [p % CFACTOR % 2 for p in range(STEPS)]
    return _core.CyclicSolver(_core.Grid(STEPS, CFACTOR, 2), owners, transport, tolerance=0.0, norms=True)


@pytest.mark.parametrize("make", [two_blocks, two_dealt])
def test_any_receive_may_fail(make):
    """On either rank; the other one hears of it where it waits, or is done already."""
    expected = [Ranks(make).solve(*setting)[0] for setting in SETTINGS]
    ranks = Ranks(make)
    _, waits = ranks.solve(3, True)
    assert min(waits) > 5
    failures = [(w, None) for w in range(waits[0])] + [(None, w) for w in range(waits[1])]
    for n, fails_at in enumerate(failures):
        results, _ = ranks.solve(3, True, fails_at)
        assert Fault in results
        i = n % len(SETTINGS)
        assert ranks.solve(*SETTINGS[i])[0] == expected[i], f"after wait {fails_at} failed"
