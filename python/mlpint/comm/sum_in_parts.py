"""The sum over ranks of a flat tensor: each adds a part up, so that none sends or receives over twice the whole."""

from __future__ import annotations

import torch

from .. import _core
from ..state import State


class SumInParts:
    """A sum under way: it begins here, and :meth:`complete` ends it. Each part is added up in rank order.

    Args:
        transport: of the ranks.
        flat: alike in size on all ranks; left alone until ``complete`` puts the sum into it.
        tag: of its messages, which nothing else uses meanwhile.
    """

    def __init__(self, transport: _core.Transport, flat: torch.Tensor, tag: int) -> None:
        self.flat, self._transport = flat, transport
        self._parts = flat.tensor_split(transport.size)
        own, others = self._parts[transport.rank], [r for r in range(transport.size) if r != transport.rank]
        self._arriving = {r: torch.empty_like(own) for r in others if own.numel()}
        self._transfers = [transport.receive(r, tag, State([into])) for r, into in self._arriving.items()]
        for r in others:
            if self._parts[r].numel():
                transport.post(r, tag, State([self._parts[r]]))

    def wait(self) -> None:
        """Until all that is exchanged before the sum is known has come and gone; ``flat`` is as it was."""
        for transfer in self._transfers:
            transfer.wait(self._transport.stall_limit)
        self._transfers = []
        self._transport.flush()

    def complete(self) -> None:
        """Puts the sum into ``flat``, on all ranks."""
        self.wait()
        own = self._parts[self._transport.rank]
        if own.numel():
            terms = {**self._arriving, self._transport.rank: own.clone()}
            own.copy_(terms[0])
            for r in range(1, self._transport.size):
                own += terms[r]
        for r, part in enumerate(self._parts):
            if part.numel():
                self._transport.broadcast(State([part]), r)
