"""What a stack is made of: modules, a stack of blocks, or a factory that makes each rank's layers there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from ..comm.communicator import Comm
from ..comm.fingerprint import checksum, fingerprint
from ..nn import BlockStack, EncoderDecoder
from ..nn.random_keys import draw_key, key
from .encoder_decoder_store import EncoderDecoderStore
from .module_store import ModuleStore
from .stack_store import StackStore
from .store import LayerStore


class LayerFactory(Sequence[nn.Module]):
    """Layers that are made on the rank that owns them, for networks that no rank has the memory for.

    ::

        blocks = mlpint.LayerFactory(96, lambda n: Block(config))
        model.blocks = mlpint.LayerParallel(blocks, options, comm=comm)

    Every layer is made under a seed of its own, so that its weights do not depend on the number of ranks; torch's
    generators are left as they were. Elsewhere the factory is a sequence that makes a layer whenever it is asked for:
    ``nn.ModuleList(blocks)`` is the whole network with the same weights.

    Args:
        layers: how many.
        make: makes layer n, a module of its own each time, with random numbers from torch alone.

    Keyword args:
        seed: by default drawn from torch's generator, which must have been seeded alike on all ranks.
        alike: whether all layers must have parameters and buffers of the same names and shapes.

    Raises:
        ValueError: fewer than one layer. :class:`LayerParallel` raises it on all ranks for a ``make`` that returns
            something else than was said, and names the layer.
    """

    def __init__(
        self, layers: int, make: Callable[[int], nn.Module], *, seed: int | None = None, alike: bool = True
    ) -> None:
        if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
            raise ValueError(f"LayerFactory: layers = {layers!r}: must be an integer of at least 1")
        self.seed, self.alike = draw_key() if seed is None else seed, alike
        self._count, self._make = layers, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, n):
        if isinstance(n, slice):
            return [self[i] for i in range(self._count)[n]]
        n = range(self._count)[n]
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            torch.manual_seed(key(self.seed, 0, 0, n))
            layer = self._make(n)
        if not isinstance(layer, nn.Module):
            raise TypeError(f"LayerFactory: make({n}) returned a {type(layer).__name__}, not a torch.nn.Module")
        return layer

    def build(self, indices: Sequence[int]) -> tuple[dict[int, nn.Module], str]:
        """Some of the layers, and what ranks compare of all.

        Raises:
            ValueError: naming a layer; it has other parameters than the first, or shares some with another, or is
                another one when it is made again.
        """
        first = indices[0] if indices else 0
        again, layers = self[first], {n: self[n] for n in indices[:1]}
        form = fingerprint([again])
        self._check_again(first, again, layers)
        del again  # so that no more than this rank's layers are ever in memory, but for the first
        owners = {p: first for layer in layers.values() for p in layer.parameters()}
        for n in indices[1:]:
            layers[n] = layer = self[n]
            shared = next((owners[p] for p in layer.parameters() if p in owners), None)
            if shared is not None:
                raise ValueError(
                    f"LayerFactory: make({n}) returned parameters of layer {shared}: it must make a new module each "
                    "time"
                )
            owners |= dict.fromkeys(layer.parameters(), n)
            if self.alike and fingerprint([layer]) != form:
                raise ValueError(
                    f"LayerFactory: layer {n} has {fingerprint([layer])}, and layer {first} {form}: make all alike, or "
                    "pass alike=False"
                )
        return layers, f"{len(self)} from a factory, seed {self.seed}" + (f", with {form} each" if self.alike else "")

    @staticmethod
    def _check_again(first: int, again: nn.Module, layers: dict[int, nn.Module]) -> None:
        for n, layer in layers.items():
            if {*again.parameters()} & {*layer.parameters()}:
                raise ValueError(
                    f"LayerFactory: make({n}), called twice, returned the same parameters: it must make a new module "
                    "each time"
                )
            if checksum([again]) != checksum([layer]):
                raise ValueError(
                    f"LayerFactory: make({n}), called twice, returned other weights: it draws random numbers that "
                    "torch's seed does not govern, so that another number of ranks would be another network"
                )


class LayerSource:
    """What :class:`mlpint.LayerParallel` is given.

    Attributes:
        modules: those that are here before any rank has kept its own: all, or none of a factory's.
        whole: whether they have memory here, which those of other ranks may lack.
        description: what ranks compare, once :meth:`store` has been called.
    """

    def __init__(self, layers: Iterable[nn.Module] | BlockStack | EncoderDecoder | LayerFactory) -> None:
        self.layers = layers if isinstance(layers, BlockStack | EncoderDecoder | LayerFactory) else list(layers)
        self.modules: list[nn.Module] = []
        if isinstance(self.layers, BlockStack | EncoderDecoder):
            self.modules = [self.layers]
        elif isinstance(self.layers, list):
            self.modules = self.layers
            for n, module in enumerate(self.modules):
                if not isinstance(module, nn.Module):
                    raise TypeError(f"layer {n} is a {type(module).__name__}, not a torch.nn.Module")
        if not len(self):
            raise ValueError("LayerParallel got no layers")
        self.whole = not any(p.is_meta for module in self.modules for p in module.parameters())
        self.description = f"{len(self)} with {fingerprint(self.modules)}"

    def __len__(self) -> int:
        return len(self.layers)

    def store(self, indices: Sequence[int], comm: Comm) -> LayerStore:
        """This rank's layers. Collective.

        Raises:
            ValueError: on all ranks; what a factory makes is not what it should be.
        """
        if isinstance(self.layers, BlockStack):
            return StackStore(self.layers.select(indices))
        if isinstance(self.layers, EncoderDecoder):
            return EncoderDecoderStore(self.layers.select(indices))
        if isinstance(self.layers, list):
            return ModuleStore({n: self.layers[n] for n in indices})
        error, made = "", dict[int, nn.Module]()
        try:
            made, self.description = self.layers.build(indices)
        except (TypeError, ValueError) as raised:
            error = str(raised)
        errors = [message.decode() for message in comm.gather(error.encode())]
        for rank, text in enumerate(errors):
            if text:
                raise ValueError(f"rank {rank}: {text}")
        return ModuleStore(made)
