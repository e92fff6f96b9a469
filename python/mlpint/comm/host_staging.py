"""GPU memory over a transport for host memory: for ranks that share a GPU, or that shall do without NCCL."""

from __future__ import annotations

import torch

from .. import _core
from ..state import State


class StagedTransport:
    """What `_core.PythonTransport` asks for; copies each state to the host to send it, and back where it arrives."""

    def __init__(self, host: _core.Transport) -> None:
        self.host = host
        self.rank, self.size = host.rank, host.size

    def send(self, to: int, tag: int, state) -> _Sent:
        self.host.post(to, tag, State(t.cpu() for t in _tensors(state)))
        return _Sent()

    def receive(self, source: int, tag: int, state) -> _Arriving:
        tensors = _tensors(state)
        staged = State(torch.empty(t.shape, dtype=t.dtype, device="cpu") for t in tensors)
        return _Arriving(self.host.receive(source, tag, staged), staged, tensors)


class _Sent:
    """The host transport keeps the copy until it has left."""

    def test(self) -> bool:
        return True

    def wait(self, seconds: float) -> None:
        pass


class _Arriving:
    def __init__(self, transfer: _core.Transfer, staged: State, tensors: tuple[torch.Tensor, ...]) -> None:
        self.transfer, self.staged, self.tensors = transfer, staged, tensors

    def test(self) -> bool:
        if not self.transfer.test():
            return False
        self._unpack()
        return True

    def wait(self, seconds: float) -> None:
        self.transfer.wait(seconds)
        self._unpack()

    def _unpack(self) -> None:
        for tensor, arrived in zip(self.tensors, self.staged.tensors, strict=True):
            tensor.copy_(arrived)


def _tensors(state) -> tuple[torch.Tensor, ...]:
    if isinstance(state, memoryview):  # the core's own messages
        return (torch.frombuffer(state, dtype=torch.uint8),)
    state.buffers()  # makes them contiguous
    return state.tensors
