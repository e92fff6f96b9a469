"""How many floating-point operations training takes: the model's, by formula where it is known, else measured once.

Only products of matrices count, a multiply-add as two, as in torch's FlopCounterMode; causal attention counts in full.
Training takes three times a forward pass: the forward itself, the gradients of inputs and those of weights. These are
the FLOPs of the network as it is written down: activation checkpointing, and MGRIT's iterations, do more
(``blocks.stats`` counts these).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .nn import Block, BlockStack, DecoderBlock, EncoderBlock, EncoderDecoder
from .nn.settings import BlockSettings
from .parallel.layer_parallel import LayerParallel

# A stack of residual blocks as users have it; nn.Sequential and nn.ModuleList are sequences, too, without saying so.
Blocks = Sequence[nn.Module] | nn.Sequential | nn.ModuleList | BlockStack | EncoderDecoder | LayerParallel

_TRAINING = 3


def block_flops(
    settings: BlockSettings, tokens: int, sequence: int, memory: torch.Tensor | None = None
) -> tuple[int, int]:
    """Forward FLOPs of a block in its dense layers (queries, keys, values, projection, FFN) and in its attention."""
    shapes = settings.shapes()
    matrices = (shapes.qkv_weight, shapes.proj_weight, shapes.up_weight, shapes.down_weight)
    dense, seen = 2 * tokens * sum(map(math.prod, matrices)), sequence
    if settings.cross and memory is not None:
        dense += 2 * tokens * (math.prod(shapes.cross_q_weight) + math.prod(shapes.cross_proj_weight))
        dense += 2 * math.prod(memory.shape[:-1]) * math.prod(shapes.cross_kv_weight)
        seen += memory.shape[-2]
    return dense, 4 * tokens * seen * settings.heads * settings.head_width


def measured(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> int:
    """Forward FLOPs of a call, by doing it; without a trace in gradients or random numbers."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton where that is installed

    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    # Attention as plain products of matrices, which are counted on every device.
    with torch.no_grad(), torch.random.fork_rng(devices), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            type(module).forward(module, *args, **kwargs)
    return counter.get_total_flops()


class FlopMeter:
    """Counts what training steps take, from the shapes that pass through the model.

    ::

        meter = FlopMeter(model.blocks, model)
        with meter.step():
            loss = model(inputs); loss.backward(); optimizer.step()

    Forward passes without gradients, and those outside a step, are not counted.

    Args:
        blocks: the residual blocks: a sequence of modules, a BlockStack, an EncoderDecoder or a LayerParallel stack.
        model: what they are part of, so that what lies outside them (head, embedding) counts too; dense layers by
            formula, other modules with matrices as measured.

    Attributes:
        linear, attention, outside: training FLOPs so far: of the blocks' dense layers, of their attention (0 where it
            was measured together with the dense layers, in ``linear``), and outside the blocks.
        tokens: positions of the state so far, batch times sequence.
        seconds: wall time of the steps.
        steps: those taken, by name of the network.
    """

    def __init__(self, blocks: Blocks, model: nn.Module | None = None) -> None:
        self.linear = self.attention = self.outside = self.tokens = 0
        self.seconds = 0.0
        self.steps: Counter[str] = Counter()
        self._running = 0  # blocks that run now
        self._measured: dict[tuple, int] = {}
        entrances: list[nn.Module]
        entrances = [blocks] if isinstance(blocks, BlockStack | EncoderDecoder | LayerParallel) else list(blocks)
        if any(isinstance(block, EncoderBlock | DecoderBlock) for block in entrances):
            raise ValueError(
                "the blocks are an encoder's and a decoder's: pass mlpint.nn.EncoderDecoder.from_blocks(...)"
            )
        self.layers = len(blocks)
        self._example = blocks.store.example if isinstance(blocks, LayerParallel) else entrances[0]
        entrances[0].register_forward_pre_hook(self._block_called, with_kwargs=True)
        if model is not None:
            self._watch_outside(model, {id(m) for entrance in entrances for m in entrance.modules()})

    @property
    def blocks(self) -> int:
        """Training FLOPs of the blocks."""
        return self.linear + self.attention

    @property
    def all(self) -> int:
        """Training FLOPs of the model; of the blocks alone if no model was given."""
        return self.blocks + self.outside

    def step(self, name: str = "fine", layers: int | None = None) -> _Step:
        """A context manager around one optimiser step of a network with so many of the blocks; all by default."""
        return _Step(self, name, self.layers if layers is None else layers)

    def as_dict(self) -> dict[str, Any]:
        names = ("linear", "attention", "outside", "tokens", "seconds")
        return {name: getattr(self, name) for name in names} | {"steps": dict(self.steps)}

    def load(self, values: Mapping[str, Any]) -> None:
        """Goes on from :meth:`as_dict`'s counts."""
        for name, value in values.items():
            setattr(self, name, Counter(value) if name == "steps" else value)

    # --- what the hooks call -----------------------------------------------------------------------------------------

    def _block_called(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self._running or not torch.is_grad_enabled():
            return
        state = args[0] if args else next(iter(kwargs.values()))
        first = state if isinstance(state, torch.Tensor) else state[0]
        tokens = math.prod(first.shape[:-1])
        self.tokens += tokens
        if isinstance(self._example, EncoderDecoder):
            self._pair_called(self._example, *state)
            return
        if isinstance(self._example, Block | BlockStack):
            linear, attention = block_flops(self._example.settings, tokens, first.shape[-2], kwargs.get("memory"))
        else:
            linear, attention = self._measure(self._example, args, kwargs), 0
        self._add(self._running, linear, attention)

    def _pair_called(self, stack: EncoderDecoder, x: torch.Tensor, y: torch.Tensor) -> None:
        """Encoder layers take the first stream, decoder layers the second."""
        encoder, decoder = (part.settings for part in stack.parts)
        self._add(stack.encoder_layers, *block_flops(encoder, math.prod(x.shape[:-1]), x.shape[-2]))
        decoder_layers = self.layers - stack.encoder_layers
        self._add(decoder_layers, *block_flops(decoder, math.prod(y.shape[:-1]), y.shape[-2], x))

    def _add(self, blocks: int, linear: int, attention: int) -> None:
        self.linear += _TRAINING * blocks * linear
        self.attention += _TRAINING * blocks * attention

    def _watch_outside(self, model: nn.Module, inside: set[int]) -> None:
        for module in model.modules():
            own = any(p.dim() >= 2 for p in module._parameters.values() if p is not None)
            if not own or isinstance(module, nn.Embedding | nn.EmbeddingBag):
                continue
            # What the blocks lie in is not measured: to run it once more is to run them, on all ranks.
            if inside.isdisjoint(id(m) for m in module.modules()):
                module.register_forward_pre_hook(self._outside_called, with_kwargs=True)

    def _outside_called(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self._running or not torch.is_grad_enabled():
            return
        if isinstance(module, nn.Linear) and args:
            self.outside += _TRAINING * 2 * math.prod(args[0].shape) * module.out_features
        else:
            self.outside += _TRAINING * self._measure(module, args, kwargs)

    def _measure(self, module: nn.Module | None, args: tuple, kwargs: dict[str, Any]) -> int:
        if module is None:  # a rank without layers
            return 0
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        key = (id(module), *(tuple(t.shape) for t in leaves if isinstance(t, torch.Tensor)))
        if key not in self._measured:
            self._measured[key] = measured(module, args, kwargs)
        return self._measured[key]


class _Step:
    def __init__(self, meter: FlopMeter, name: str, layers: int) -> None:
        self.meter, self.name, self.layers = meter, name, layers

    def __enter__(self) -> None:
        self.meter._running = self.layers
        self.started = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        self.meter._running = 0
        self.meter.seconds += time.perf_counter() - self.started
        self.meter.steps[self.name] += kind is None  # a step that raised was not taken, whatever it has cost
