"""The head and the loss of a model on a share of the tokens on each rank.

Behind a layer-parallel stack every rank holds the same state. Computing the head on all of it on all ranks, as the rest
of the model is, costs each of them the whole: for a vocabulary of 50,000 as much as a dozen layers, and the logits'
memory. Here each rank computes it for 1/P of the tokens; the loss and the gradients are put together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ..comm.agreement import agree
from ..comm.communicator import Comm
from ..state import describe
from .out_of_step import in_step

Loss = torch.Tensor | tuple[torch.Tensor, torch.Tensor | float]


def shard_loss(
    fn: Callable[..., Loss],
    y: torch.Tensor,
    *targets: torch.Tensor,
    parameters: Iterable[nn.Parameter] | None = None,
    comm: Any = None,
) -> torch.Tensor:
    """The mean over all tokens of a loss per token, of which every rank computes its share. Collective.

    ::

        def head(y, targets):
            return F.cross_entropy(model.lm_head(y).float(), targets, reduction="none")

        loss = mlpint.shard_loss(head, model.transformer(tokens), targets, comm=comm)

    Equal to the mean of ``fn`` on all tokens to rounding, and the same on all ranks, as are the gradients: of ``y`` and
    of all parameters that ``fn`` uses, also of those that the model uses elsewhere (tied embeddings). In a mesh of
    replicas the losses that are trained on have the mean number of tokens as their divisor, so that the mean of these
    losses over the replicas is that over all tokens, however many of them each replica has.

    Args:
        fn: called with a share of the tokens as rows: ``y`` as [n, features], each target as [n, ...]. n may be 0. It
            treats rows independently and draws no random numbers. It returns a tensor of losses that has one element a
            row, or a pair: the sum of the losses, and what the sum over all ranks is divided by (a number of tokens,
            where some are ignored).
        y: [..., features], the same on every rank.
        *targets: of shapes that begin with y's but for the last dimension, [..., *]; the same on every rank.
        parameters: those that ``fn`` uses, to be checked; by default they are found.
        comm: the ranks that share the layers.

    Returns:
        A scalar, with a gradient if y or one of the parameters needs one.

    Raises:
        ValueError: on all ranks; shapes that do not agree, an ``fn`` that returns neither of these, draws random
            numbers, or uses what comes out of the stack otherwise than through ``y``, or parameters left out.
    """
    comm = Comm.of(comm)
    tokens = y.shape[:-1]
    for i, target in enumerate(targets):
        if target.shape[: len(tokens)] != tokens:
            raise ValueError(
                f"target {i} is {list(target.shape)}: its shape must begin with that of y without the last dimension, "
                f"{list(tokens)}"
            )
    agree(comm, {"operation": "shard_loss", "tensors": describe([y, *targets])})
    count = tokens.numel()
    first, end = (r * count // comm.size for r in (comm.rank, comm.rank + 1))
    own, *rows = (t.reshape(count, *t.shape[len(tokens) :])[first:end] for t in (y, *targets))
    share = _Share(fn, own, rows, comm, None if parameters is None else list(parameters))
    sums = torch.stack([share.sum.detach().double(), share.divisor, share.divisor.new_tensor(bool(share.error))])
    comm.sum_ordered([sums])
    total, divisor, errors = sums
    if errors:
        raise ValueError("shard_loss: " + next(m.decode() for m in comm.gather(share.error.encode()) if m))
    if comm.data.size > 1 and torch.is_grad_enabled():
        divisor = divisor.clone()
        comm.data.sum_ordered([divisor])
        divisor = divisor / comm.data.size
    agree(comm, {"operation": "shard_loss", "parameters of the function": describe(share.weights)})
    return _ShardedLoss.apply(share, (total / divisor).to(share.sum.dtype), divisor, y, *share.weights)


class _Share:
    """What a rank computes: the sum of its rows' losses, its graph ending at a leaf that stands for its rows of y."""

    def __init__(
        self,
        fn: Callable[..., Loss],
        own: torch.Tensor,
        targets: list[torch.Tensor],
        comm: Comm,
        parameters: list[nn.Parameter] | None,
    ) -> None:
        self.comm, self.error = comm, ""
        self.weights: list[torch.Tensor] = []
        self.rows = own.detach().requires_grad_(own.requires_grad and torch.is_grad_enabled())
        before = _generators(own)
        with in_step(comm):
            result = fn(self.rows, *targets)
        if any(not torch.equal(a, b) for a, b in zip(before, _generators(own), strict=True)):
            self.error = "the function draws random numbers, which would differ from rank to rank: drop out before it"
        losses, divisor = result if isinstance(result, tuple) else (result, float(len(own)))
        if not isinstance(losses, torch.Tensor) or not (isinstance(result, tuple) or losses.numel() == len(own)):
            what = f"a {list(losses.shape)} tensor" if isinstance(losses, torch.Tensor) else type(losses).__name__
            self.error = (
                f"the function returns {what} for {len(own)} rows: it must return a loss for each (reduction='none'), "
                "or the pair (sum of the losses, number to divide by)"
            )
            losses = own.new_zeros(())
        self.sum = losses.sum()
        self.divisor = torch.as_tensor(divisor, dtype=torch.float64, device=own.device).detach()
        if self.sum.requires_grad and not self.error:
            self._find_weights(parameters)

    def _find_weights(self, parameters: list[nn.Parameter] | None) -> None:
        """The leaves of the graph, in an order that is the same on all ranks."""
        seen, waiting, found = {self.sum.grad_fn}, [self.sum.grad_fn], dict[torch.Tensor, None]()
        while waiting:
            node: Any = waiting.pop()
            if node.name() == "SolveFunctionBackward":
                self.error = "the function uses what a stack returns otherwise than through y: pass that as y"
                return
            if (leaf := getattr(node, "variable", None)) is not None and leaf is not self.rows:
                found[leaf] = None
            for follower, _ in node.next_functions:
                if follower is not None and follower not in seen:
                    seen.add(follower)
                    waiting.append(follower)
        missing = [t for t in found if parameters is not None and all(t is not p for p in parameters)]
        if missing:
            self.error = (
                f"the function uses parameters that are not among those passed: {[[*t.shape] for t in missing]}"
            )
        self.weights = list(found)


def _generators(tensor: torch.Tensor) -> list[torch.Tensor]:
    cuda = [torch.cuda.get_rng_state(tensor.device)] if tensor.is_cuda else []
    return [torch.get_rng_state(), *cuda]


class _ShardedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, share: _Share, mean: torch.Tensor, divisor: torch.Tensor, y: torch.Tensor, *weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.share, ctx.divisor, ctx.shape = share, divisor, y.shape
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        share, comm = ctx.share, ctx.share.comm
        needs_y, *needed = ctx.needs_input_grad[3:]
        inputs = [share.rows] * needs_y + [w for w, n in zip(share.weights, needed, strict=True) if n]
        with in_step(comm):
            scale = (grad / ctx.divisor).to(share.sum.dtype)
            own = torch.autograd.grad(share.sum, inputs, scale, allow_unused=True)
        found = [torch.zeros_like(t) if g is None else g.contiguous() for t, g in zip(inputs, own, strict=True)]
        grad_y = None
        if needs_y:
            grad_y = torch.empty(ctx.shape, dtype=share.rows.dtype, device=share.rows.device)
            _gather_rows(grad_y.view(-1, ctx.shape[-1]), found.pop(0), comm)
        comm.sum_ordered(found)
        gradients = iter(found)
        return None, None, None, grad_y, *(next(gradients) if n else None for n in needed)


def _gather_rows(whole: torch.Tensor, own: torch.Tensor, comm: Comm) -> None:
    """Fills a tensor with the rows of all ranks, on all of them."""
    bounds = [r * len(whole) // comm.size for r in range(comm.size + 1)]
    whole[bounds[comm.rank] : bounds[comm.rank + 1]] = own
    for owner in range(comm.size):
        if bounds[owner] < bounds[owner + 1]:
            comm.broadcast(whole[bounds[owner] : bounds[owner + 1]], owner)
