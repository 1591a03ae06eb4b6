"""How a training step is computed fast. A reader may skip this file: without it, results are as good.

On a CPU, torch.compile turns the whole step, from binarization to Adam, into one program. On a GPU, the step's kernels
are recorded once as a CUDA graph and then replayed. Matrix products use the fastest precision the hardware has.
"""

import contextlib
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from tqdm import tqdm

from data import binarize, draw_bits
from utils import one_line

PRECISIONS = ("highest", "medium", "bfloat16")
STEPS_WORTH_COMPILING = 5000  # they save about the time that compiling takes

Step = Callable[[Tensor, Tensor], Tensor]  # indices of a batch (B,) and rates (2,) -> the negative ELBO, summed


# ---------------------------------------------------------------------------------------------------------------------
# Precision


@contextlib.contextmanager
def matmul_precision(name: str, device: str | torch.device) -> Iterator[None]:
    """Sets the precision of matrix products: highest or medium as PyTorch calls them, or bfloat16 (autocast).

    medium rounds the factors of float32 products to bfloat16 or TF32 on hardware with units for those. Autocast does
    not cache rounded weights, because training changes them within this context.
    """
    before, autocast = torch.get_float32_matmul_precision(), contextlib.nullcontext()
    if name == "bfloat16":
        name, autocast = "highest", torch.autocast(torch.device(device).type, torch.bfloat16, cache_enabled=False)
    torch.set_float32_matmul_precision(name)
    try:
        with autocast:
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def choose_precision(device: torch.device, batch_size: int) -> str:
    """The fastest precision for batches of that size: bfloat16, medium or highest.

    Below 128 images, casts to bfloat16 cost more than they save; without AMX, so does rounding inside products.
    """
    units = bfloat16_units()
    if device.type != "cpu" or not units:
        return "medium"
    if batch_size >= 128:
        return "bfloat16"
    return "medium" if "amx_bf16" in units else "highest"


def bfloat16_units() -> set[str]:
    """The CPU's units for products of bfloat16. Without any, such products take many times longer than float32's."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # older PyTorch
    return {name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name)}


# ---------------------------------------------------------------------------------------------------------------------
# One compiled program for a CPU


def is_worth_compiling(device: torch.device, ranks: int, steps: int) -> bool:
    """Whether compiling pays: in one process on a CPU with a C++ compiler, for STEPS_WORTH_COMPILING steps or more."""
    has_compiler = any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl")))
    return device.type == "cpu" and ranks == 1 and has_compiler and steps >= STEPS_WORTH_COMPILING


class Program:
    """A function compiled into one program, which draws the random numbers that the function would.

    Once the program has failed, a line says why, and calls return None. It is never compiled for arguments of other
    shapes or kinds, because that takes as long every time, so these are a failure.
    """

    def __init__(self, function: Callable[..., Tensor], warning: str, freeze: bool = False):
        """freeze: build the weights in as constants, which makes products of matrices faster without gradients."""
        function.__code__ = function.__code__.replace()  # a new one, since PyTorch compiles each at most 8 times
        self.compile = torch.compile(function, fullgraph=True, dynamic=False, options={"fallback_random": True})
        self.compiled: Callable[..., Tensor] | None = None
        self.warning, self.freeze, self.has_failed = warning, freeze, False

    def __call__(self, *args: Any) -> Tensor | None:
        if self.has_failed:
            return None
        try:
            if self.compiled:
                return self.compiled(*args)
            with torch._inductor.config.patch(freezing=self.freeze):
                return self._compile(args)
        except Exception as error:  # of many kinds, from PyTorch and from the compiler
            self.has_failed = True
            tqdm.write(f"warning: {self.warning} ({type(error).__name__}: {one_line(error)[:200]})", file=sys.stderr)
            return None

    def _compile(self, args: tuple[Any, ...]) -> Tensor:
        """Compiles the function, and calls it for the first time."""
        try:
            self.compiled = self.compile.aot_compile((args, {}))  # spares each call the search for its program
        except Exception:  # local classes, among others, cannot be compiled ahead of time
            result = self.compile(*args)
            self.compiled = torch.compiler.set_stance("fail_on_recompile")(self.compile)
            return result
        return self.compiled(*args)


class CompiledStep:
    """A training step as one program: binarization, both passes and Adam.

    Like the eager step, it updates the weights and Adam's state in place, and it draws the same random numbers.
    Batches of another size, and all batches after the program has failed once, go to the eager step.
    """

    def __init__(
        self,
        eager: Step,
        objective: nn.Module,
        optimizer: torch.optim.Adam,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        binarization: str,
        clip_grad_norm: float | None,
    ):
        """objective: inputs, targets, y, kl_weight -> the loss and the negative ELBO. images are (N, ...) uint8."""
        shape = images.shape[1:]
        self.eager, self.images, self.labels = eager, images.flatten(1), labels  # flat images make faster code
        self.batch_size, self.binarization = min(batch_size, len(images)), binarization
        trainable = {name: weight for name, weight in objective.named_parameters() if weight.requires_grad}
        self.weights = {name: weight.detach() for name, weight in trainable.items()}  # the same memory
        self.buffers = dict(objective.named_buffers())
        self.adam = [adam_state(optimizer, weight) for weight in trainable.values()]
        (group,) = optimizer.param_groups
        self.betas = torch.tensor(group["betas"], device=images.device, dtype=torch.float64)

        def loss(weights: dict[str, Tensor], buffers: dict[str, Tensor], *args: Tensor) -> tuple[Tensor, Tensor]:
            return functional_call(objective, weights | buffers, args)

        def whole_step(weights, buffers, adam, images, y, bits, rates, corrections):  # type: ignore[no-untyped-def]
            lr, kl_weight = rates.unbind()
            inputs, targets = (x.view(-1, *shape) for x in binarize(images, binarization, bits=bits))
            batch = inputs, targets, y, kl_weight
            gradients, (_, neg_elbo) = grad_and_value(loss, has_aux=True)(weights, buffers, *batch)
            if clip_grad_norm:
                scale = (clip_grad_norm / nn.utils.get_total_norm(gradients.values())).clamp(max=1)
                gradients = {name: scale * gradient for name, gradient in gradients.items()}
            for name, state in zip(weights, adam, strict=True):
                adam_step(weights[name], gradients[name], state, lr, corrections, group["betas"], group["eps"])
            return neg_elbo

        warning = "the step cannot be compiled; training continues uncompiled, slower but with the same results"
        self.program = Program(whole_step, warning)
        tqdm.write("compiling the training step, which takes up to half a minute (--no-compile skips it)")
        sys.stdout.flush()
        self._try_out()

    def _try_out(self) -> None:
        """Takes one step, which compiles the program, and undoes it."""
        state = [*self.weights.values(), *self.buffers.values(), *(x for state in self.adam for x in state.values())]
        before = [tensor.clone() for tensor in state]
        self._try(torch.arange(self.batch_size, device=self.images.device), torch.ones(2, device=self.images.device))
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)

    def __call__(self, batch: Tensor, rates: Tensor) -> Tensor:
        fits = len(batch) == self.batch_size and not self.program.has_failed
        neg_elbo = self._try(batch, rates) if fits else None
        return self.eager(batch, rates) if neg_elbo is None else neg_elbo

    def _try(self, batch: Tensor, rates: Tensor) -> Tensor | None:
        """Runs the program. Returns None if it fails."""
        images = self.images.index_select(0, batch)
        bits = None
        if self.binarization == "dynamic":
            bits = draw_bits(images.shape, images.device).float()  # a kernel that read int16 would not be vectorized
        corrections = (1 - self.betas ** (self.adam[0]["step"] + 1)).float()
        y, state = self.labels.index_select(0, batch), (self.weights, self.buffers, self.adam)
        with torch.no_grad():
            return self.program(*state, images, y, bits, rates, corrections)


def adam_state(optimizer: torch.optim.Adam, weight: Tensor) -> dict[str, Tensor]:
    """Adam's state of a weight, which it would otherwise make in its first step."""
    if not optimizer.state[weight]:
        zeros = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        optimizer.state[weight] = {"step": torch.zeros((), device=weight.device), **zeros}
    return optimizer.state[weight]


def adam_step(
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    lr: Tensor,
    corrections: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Takes a step of Adam (Kingma & Ba 2015, arXiv 1412.6980, algorithm 1) in place, with torch.optim.Adam's state.

    corrections (2,) are the bias corrections 1 - beta^t of this step t, computed by the caller in float64.
    """
    state["exp_avg"].lerp_(gradient, 1 - betas[0])
    state["exp_avg_sq"].lerp_(gradient**2, 1 - betas[1])
    first, second = corrections.unbind()
    weight.sub_(lr / first * state["exp_avg"] / ((state["exp_avg_sq"] / second).sqrt() + eps))
    state["step"].add_(1)


# ---------------------------------------------------------------------------------------------------------------------
# One recorded graph for a GPU


class CudaGraph:
    """A function of CUDA tensors whose kernels are recorded once and then replayed instead of launched one by one.

    The function may draw random numbers and change other tensors in place, but it must never wait for the GPU. The next
    call overwrites what it returns. Calls with other shapes than the first call's run without the graph.
    """

    def __init__(self, function: Callable[..., Tensor], warmup: int = 3):
        self.function, self.warmup, self.args, self.graph = function, warmup, None, None

    def __call__(self, *args: Tensor) -> Tensor:
        self.args = self.args or [arg.clone() for arg in args]
        if any(arg.shape != static.shape for arg, static in zip(args, self.args, strict=True)):
            return self.function(*args)
        for arg, static in zip(args, self.args, strict=True):
            static.copy_(arg)
        if self.warmup > 0:  # the first calls allocate memory and choose kernels, on a stream of their own
            self.warmup -= 1
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
                result = self.function(*self.args)
            torch.cuda.current_stream().wait_stream(stream)
            return result
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.function(*self.args)
        self.graph.replay()
        return self.result
