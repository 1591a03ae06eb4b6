"""How training steps are computed fast. A reader may skip this file: without it, results are as good.

train.py writes the step once. Here it is compiled into one program, and on a GPU several steps are recorded as one
graph. A program is believed only after its first result has been compared with that of the code as written. Matrix
products use the fastest precision that the hardware has.
"""

import contextlib
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from tqdm import tqdm

from utils import one_line

PRECISIONS = ("highest", "medium", "bfloat16")
STEPS_WORTH_COMPILING = {"cpu": 5_000, "cuda": 30_000}  # they save about the time that compiling takes
ROUNDING = 1e-3  # how far results may be apart in float32, relative to their size

Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # inputs, targets, y, rates -> the negative ELBO of the batch
Outcome = list[list[Tensor]]  # a result, and groups of the tensors that it changed


@contextlib.contextmanager
def no_validation() -> Iterator[None]:
    """A context in which torch.distributions check no arguments, which waits for a GPU and stops compilation."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


# ---------------------------------------------------------------------------------------------------------------------
# Precision


@contextlib.contextmanager
def matmul_precision(name: str, device: str | torch.device) -> Iterator[None]:
    """Sets the precision of matrix products: highest or medium as PyTorch calls them, or bfloat16 (autocast).

    medium rounds the factors of float32 products to bfloat16 or TF32 on hardware with units for those. Autocast does
    not cache rounded weights, because training changes them within this context.
    """
    before = torch.get_float32_matmul_precision()
    is_bfloat16 = name == "bfloat16"
    torch.set_float32_matmul_precision("highest" if is_bfloat16 else name)
    try:
        with torch.autocast(torch.device(device).type, torch.bfloat16, is_bfloat16, cache_enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def choose_precision(device: torch.device, batch_size: int, is_compiled: bool) -> str:
    """The fastest precision for batches of that size: bfloat16, medium or highest.

    On a CPU, batches below 128 images lose more by casts than they gain, so they stay in float32. On a GPU, casts pay
    only where a compiler joins them with other work.
    """
    if device.type == "cuda":
        return "bfloat16" if is_compiled and torch.cuda.is_bf16_supported(including_emulation=False) else "medium"
    if device.type == "cpu" and bfloat16_units():
        return "bfloat16" if batch_size >= 128 else "highest"
    return "medium"


def bfloat16_units() -> set[str]:
    """The CPU's units for products of bfloat16. Without any, such products take many times longer than float32's."""
    capabilities = torch.cpu.get_capabilities()
    return {name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name)}


# ---------------------------------------------------------------------------------------------------------------------
# One compiled program


def is_worth_compiling(device: torch.device, ranks: int, steps: int) -> bool:
    """Whether compiling pays: in one process, for STEPS_WORTH_COMPILING steps or more, with a compiler."""
    cpp_compilers = (os.environ.get("CXX", "c++"), "g++", "clang++", "cl")
    has_compiler = device.type == "cuda" or any(map(shutil.which, cpp_compilers))
    return ranks == 1 and has_compiler and steps >= STEPS_WORTH_COMPILING.get(device.type, math.inf)


def compile_checked(
    function: Callable[..., Tensor],
    outcome: Callable[[Callable[..., Tensor]], Outcome],
    device: torch.device,
    what: str,
    freeze: bool = False,
) -> "Program | None":
    """Compiles a function into one program. Returns None, after a warning about `what`, if that fails.

    outcome(function) calls the function on an example with fixed draws and returns what that gives. The program's
    outcome may differ from the function's by about as much as the precision of products does. freeze builds the weights
    in as constants, which makes products of matrices faster without gradients.
    """
    function.__code__ = function.__code__.replace()  # a new one, since PyTorch compiles each at most 8 times
    options = {"fallback_random": True}  # the draws of the function as written
    if device.type == "cuda":
        options["combo_kernels"] = True  # independent small kernels become one
    if device.type == "cpu":
        options["cpp_wrapper"] = True  # C++ calls the kernels one after the other, and not Python
    expected = outcome(function)
    with matmul_precision("highest", device):
        exact = outcome(function)
    tolerance = ROUNDING + 4 * relative_error(expected, exact)
    program = torch.compile(function, fullgraph=True, dynamic=False, options=options)
    try:
        with torch._dynamo.config.patch(trace_autograd_ops=True), torch._inductor.config.patch(freezing=freeze):
            error = relative_error(outcome(program), expected)
    except Exception as error:  # of many kinds, from PyTorch and from the compiler
        warn_slower(f"{what} is not compiled", error)
        return None
    if not error <= tolerance:  # nan too
        reason = f"the program's result is off by {error:.1e}, where {tolerance:.1e} would be rounding"
        warn_slower(f"{what} is not compiled", reason)
        return None
    return Program(function, torch.compiler.set_stance("fail_on_recompile")(program), what)


class Program:
    """A compiled function. From the first call that would need another program on, it is the function as written."""

    def __init__(self, function: Callable[..., Tensor], compiled: Callable[..., Tensor], what: str):
        self.function = function
        self.compiled: Callable[..., Tensor] | None = compiled
        self.what = what

    def __call__(self, *args: Any) -> Tensor:
        if self.compiled:
            try:
                return self.compiled(*args)
            except Exception as error:  # a Python number of the model's has changed, for example
                warn_slower(f"{self.what} is no longer compiled", error)
                self.compiled = None
        return self.function(*args)


def warn_slower(what: str, reason: Exception | str) -> None:
    """Says on stderr that a computation goes on, only slower."""
    if isinstance(reason, Exception):
        reason = f"{type(reason).__name__}: {one_line(reason)[:200]}"
    tqdm.write(f"warning: {what}; going on slower, with the same results ({reason})", file=sys.stderr)


def try_out(call: Callable[[], Tensor], state: list[list[Tensor]]) -> Outcome:
    """What a call returns and makes of the state's tensors, which are then restored."""
    tensors = [tensor for group in state for tensor in group]
    before = [tensor.detach().clone() for tensor in tensors]
    gpus = {tensor.device for tensor in tensors if tensor.is_cuda}
    try:
        with torch.random.fork_rng(gpus):
            torch.manual_seed(0)
            result = call().detach().clone()
        return [[result], *([tensor.detach().clone() for tensor in group] for group in state)]
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


def relative_error(found: Outcome, expected: Outcome) -> float:
    """The largest difference between two outcomes' tensors, or nan.

    Differences are relative to the tensor's size plus its group's, as root mean squares, because a gradient that is 0
    but for rounding has no relative error.
    """
    errors = [torch.zeros((), dtype=torch.float64)]
    for tensors, others in zip(found, expected, strict=True):
        if not others:
            continue
        size = torch.cat([other.double().flatten() for other in others]).square().mean().sqrt()
        for tensor, other in zip(tensors, others, strict=True):
            difference, own_size = (x.double().square().mean().sqrt() for x in (tensor.double() - other, other))
            errors.append((difference / (own_size + size).clamp(min=1e-30)).cpu())
    return torch.stack(errors).max().item()


# ---------------------------------------------------------------------------------------------------------------------
# Several steps


class Steps:
    """Takes training steps, with a step as written or compiled."""

    def __init__(self, step: Step, state: list[list[Tensor]]):
        """state: all tensors that a step changes, in groups of one kind."""
        self.step = step
        self.state = state
        self.program: Program | None = None
        self.batch_size = 0  # of the program

    @property
    def is_compiled(self) -> bool:
        """Whether batches of the usual size are taken by a program."""
        return self.program is not None and self.program.compiled is not None

    def compile(self, *example: Tensor) -> None:
        """Compiles the step for batches of the example's size. Others are taken as written."""
        # Inputs and targets may be one tensor here, but are two views when training calls the program
        example = tuple(tensor[:] for tensor in example)
        tqdm.write("compiling the training step, which takes up to half a minute (--no-compile skips it)")
        sys.stdout.flush()

        def outcome(step: Step) -> Outcome:
            return try_out(lambda: step(*example), self.state)

        self.program = compile_checked(self.step, outcome, example[0].device, "the training step")
        self.batch_size = len(example[0])

    def __call__(self, inputs: Tensor, targets: Tensor, y: Tensor, rates: Tensor, sizes: Sequence[int]) -> Tensor:
        """Takes steps on batches of these sizes, which lie one after the other in inputs, targets (N, ...) and y (N,).

        rates (steps, 3) are those of train.make_step. Returns the negative ELBO of each step (steps,), in nats for its
        batch.
        """
        neg_elbos = []
        for batch in zip(inputs.split(sizes), targets.split(sizes), y.split(sizes), rates, strict=True):
            step = self.program if self.program and len(batch[0]) == self.batch_size else self.step
            neg_elbos.append(step(*batch))
        return torch.stack(neg_elbos)


class Recorded:
    """Steps on a GPU, recorded together as a CUDA graph and then replayed instead of launched kernel by kernel.

    There is a graph for each sequence of batch sizes, recorded when it comes for the second time: the first time, steps
    allocate memory and choose kernels. The next call overwrites what a call returns.
    """

    def __init__(self, steps: Steps):
        self.steps = steps
        self.seen: set[tuple[int, ...]] = set()
        self.graphs: dict[tuple[int, ...], tuple[list[Tensor], Callable[[], Tensor]]] = {}
        self.is_recordable = True

    @property
    def is_compiled(self) -> bool:
        """Whether batches of the usual size are taken by a program."""
        return self.steps.is_compiled

    def __call__(self, *tensors: Tensor, sizes: Sequence[int]) -> Tensor:
        """Takes steps as Steps does."""
        key = tuple(sizes)
        if key in self.seen and key not in self.graphs and self.is_recordable:
            self.record(key, [tensor.clone() for tensor in tensors])
        self.seen.add(key)
        if key not in self.graphs:
            return self.steps(*tensors, sizes)
        static, replay = self.graphs[key]
        for place, tensor in zip(static, tensors, strict=True):
            place.copy_(tensor)
        return replay()

    def record(self, key: tuple[int, ...], static: list[Tensor]) -> None:
        """Records a graph that reads its arguments from static tensors, if it computes what the steps compute."""

        def call() -> Tensor:
            return self.steps(*static, key)

        try:
            with no_waiting():
                expected = try_out(call, self.steps.state)
            replay = record_graph(call)
            error = relative_error(try_out(replay, self.steps.state), expected)
            if not error <= 10 * ROUNDING:  # the kernels are the same, but sums may be taken in another order
                raise RuntimeError(f"the recorded steps' result is off by {error:.1e}")
            self.graphs[key] = static, replay
        except RuntimeError as error:
            self.is_recordable = False
            warn_slower("the steps are not recorded", error)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """A context in which it is an error that the CPU waits for the GPU, which a graph cannot do."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(action="ignore"):  # PyTorch warns that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def record_graph(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Records the kernels of a function as a CUDA graph. Returns a function that replays them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
