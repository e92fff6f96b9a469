"""An error that one rank swallows: the others hear of it long before the stall limit."""

import launch

PROGRAM = """
import time
import torch
import mlpint
from torch import nn
comm = mlpint.init(stall_limit=40)
torch.manual_seed(0)
class Picky(nn.Linear):
    def forward(self, x):
        if len(x) == 5 and comm.rank == 1:
            raise RuntimeError("out of memory, as it were")
        return super().forward(x)
stack = mlpint.LayerParallel([Picky(6, 6) for _ in range(4)], mlpint.MGRIT(cfactor=2), comm=comm)
for size in (4, 5):
    started = time.monotonic()
    try:
        stack(torch.randn(size, 6)).sum().backward()
    except RuntimeError as error:
        print(f"rank {comm.rank}, {size}, {time.monotonic() - started < 10}: {error}", flush=True)
        time.sleep(2)
"""


def test_an_error_swallowed_on_one_rank_is_heard_of_by_the_others():
    result = launch.run(PROGRAM, 2)
    assert not result.orphans and result.seconds < 30, result.describe()
    assert "rank 1, 5, True: " in result.stdout and "out of memory" in result.stdout, result.stdout
    assert "rank 0, 5, True: rank 0 waits for rank 1, where a pass through a LayerParallel stack has failed" in (
        result.stdout
    ), result.stdout + result.stderr
