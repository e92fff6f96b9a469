"""What the kernels share: device functions that also hold in Triton's interpreter, checks of strides, the launch.

The interpreter (TRITON_INTERPRET=1 when Triton is first imported) is how kernels are tested without a GPU. It keeps
bfloat16 as raw 16-bit integers: its `tl.dot` multiplies those integers, and its float32 -> bfloat16 cast truncates.
`dot`, `to_float` and `round_to` are right in both worlds; kernels use them for everything that may be bfloat16.

Float32 dots are exact ("ieee") unless the user allows TF32 by torch's own switch, see `input_precision`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
INVERSE_SQRT_2 = tl.constexpr(0.7071067811865476)
GELU_TANH_LINEAR = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
GELU_TANH_CUBIC = tl.constexpr(0.044715 * 1.5957691216057308)
INVERSE_SQRT_2_PI = tl.constexpr(0.3989422804014327)
ACTIVATIONS = ("none", "gelu_tanh", "gelu", "relu", "silu")


@triton.jit
def to_float(x):
    """A bfloat16, float16 or float32 block in float32; float64 stays what it is."""
    if x.dtype == tl.float64 or x.dtype == tl.float32:
        y = x
    elif INTERPRETED and x.dtype == tl.bfloat16:
        y = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """A float32 block in `dtype`, rounded to nearest even."""
    if INTERPRETED and x.dtype == tl.float32 and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        upper = tl.where(x == x, upper, 0x7FC0)  # the carry would turn some NaNs into infinities
        y = upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(dtype)
    return y


@triton.jit
def dot(a, b, acc, INPUT_PRECISION: tl.constexpr):
    """Returns acc + a @ b in acc's type: float32, or float64 of float64. `INPUT_PRECISION` is for float32 operands."""
    if INTERPRETED:
        acc = tl.dot(to_float(a), to_float(b), acc, input_precision="ieee", out_dtype=acc.dtype)
    else:
        acc = tl.dot(a, b, acc, input_precision=INPUT_PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """`x`, or its GELU ("gelu_tanh" with tanh, "gelu" exact), ReLU ("relu") or SiLU ("silu"), of a float32 block."""
    if ACTIVATION == "gelu_tanh":
        # This is 0.5 (1 + tanh u) = sigmoid(2 u): libdevice's tanh does not exist in the interpreter.
        y = x * tl.sigmoid(x * (x * x * GELU_TANH_CUBIC + GELU_TANH_LINEAR))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * INVERSE_SQRT_2))
    elif ACTIVATION == "relu":
        y = tl.where(x > 0, x, 0.0)
    elif ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    else:
        tl.static_assert(ACTIVATION == "none")
        y = x
    return y


@triton.jit
def activate_and_slope(x, ACTIVATION: tl.constexpr):
    """(value, derivative) of an activation that is not "none", of a float32 block."""
    if ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(x * (x * x * GELU_TANH_CUBIC + GELU_TANH_LINEAR))
        slope = s + x * s * (1.0 - s) * (3.0 * GELU_TANH_CUBIC * x * x + GELU_TANH_LINEAR)
    elif ACTIVATION == "gelu":
        s = 0.5 * (1.0 + tl.erf(x * INVERSE_SQRT_2))
        slope = s + x * tl.exp(-0.5 * x * x) * INVERSE_SQRT_2_PI
    elif ACTIVATION == "relu":
        s = tl.where(x > 0, 1.0, 0.0)
        slope = s
    else:
        tl.static_assert(ACTIVATION == "silu")
        s = tl.sigmoid(x)
        slope = s * (1.0 + x * (1.0 - s))
    return x * s, slope


@triton.jit
def tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(layer, row tile, column tile) of a program of a one-dimensional grid of J x tiles(M) x tiles(N).

    Layers come one after the other, since they share nothing. Within one, programs run down GROUP_M row tiles before
    they move to the next column tile, so that those in flight share rows of the activation and of the weight in L2.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    layer = pid // (tiles_m * tiles_n)
    tile = pid % (tiles_m * tiles_n)
    group = tile // (GROUP_M * tiles_n)
    rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    inside = tile % (GROUP_M * tiles_n)
    return layer.to(tl.int64), group * GROUP_M + inside % rows, inside // rows


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what `run` starts on a device, and what `mlpint.kernels.aot` compiles without one."""

    kernel: triton.JITFunction  # in the interpreter what Triton has in its place
    grid: tuple[int, ...]
    arguments: tuple  # tensors, integers, floats and tuples of these, in the kernel's order
    constexprs: dict  # the kernel's constexpr parameters, and num_warps and num_stages

    def run(self):
        first = self.arguments[0]
        if first.is_cuda:
            with torch.cuda.device_of(first):
                self.kernel[self.grid](*self.arguments, **self.constexprs)
        elif INTERPRETED:
            self.kernel[self.grid](*self.arguments, **self.constexprs)
        else:
            raise RuntimeError(
                f"{self.kernel.__name__} runs on a CUDA device and the tensors are on {first.device}: "
                "take the _reference function beside it, or set TRITON_INTERPRET=1 before Triton is imported"
            )


def distinct(configs: list[dict[str, int]]) -> list[dict[str, int]]:
    """The launch configurations in their order, each once."""
    return [config for i, config in enumerate(configs) if config not in configs[:i]]


def strides_of(*tensors: torch.Tensor | None) -> list[tuple[int, ...]]:
    """What kernels take of the layout of each tensor: the strides of all dimensions but the last, whose is 1.

    Of vectors that there are not, [J, N] for None: (0,).
    """
    return [(0,) if tensor is None else tensor.stride()[:-1] for tensor in tensors]


def input_precision() -> str:
    """ "ieee", or "tf32" where the user allowed TF32 for float32 products (`torch.set_float32_matmul_precision`)."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def check(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], like: torch.Tensor) -> None:
    """Raise ValueError unless `tensor` has `shape`, `like`'s dtype and device, and a last dimension of stride 1.

    None is what there is not: nothing is wrong with it.
    """
    if tensor is None:
        return
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if tensor.dtype != like.dtype or tensor.device != like.device:
        got, expected = f"{tensor.dtype} on {tensor.device}", f"{like.dtype} on {like.device}"
        raise ValueError(f"{name} is {got}, expected {expected}: convert it")
    check_dense(name, tensor)


def check_dense(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless the last dimension of `tensor` has stride 1; the others may have any."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}'s last dimension has stride {tensor.stride(-1)}, expected 1: lay it out row by row")


def check_activation(activation: str) -> None:
    """Raise ValueError unless `activation` is one that :func:`activate` knows."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
