"""Measures how fast a VAE trains here, side by side in one run, in images per second.

    python benchmarks/throughput.py                 # a tutorial's loop, JAX, train.py, the matrix products alone
    python benchmarks/throughput.py tricks          # what train.py would lose without each of its tricks
    python benchmarks/throughput.py results         # test losses of whole runs, with all tricks and with none
    python benchmarks/throughput.py nll             # an estimate of nll, compiled or not, and its matrix products alone
    python benchmarks/throughput.py race            # the time until the test loss is 100, then 97.5; nll with a recipe

JAX's row needs pip install jax optax. The loops take turns, so a machine whose speed drifts is fair to all of them. The
figures are medians.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
import evaluate
import measure
import options as options_module
import pictures
import runs
import step
import train
import utils
from model import VAE, loss_criterion
from options import SIZES, Options, make_options, make_parser, parse_given
from pictures import BLUE, GRAY, ORANGE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OPTIONS = ("dataset", "data_dir", "batch_size", *SIZES, "epochs", "device")  # those of train.py
RECIPES = Path(__file__).parent.parent / "recipes"
Measurement = Callable[[], float]  # -> the seconds of one pass over the images
Weights = Callable[[], dict[str, Tensor]]  # -> the model's, as they are after the passes so far
Loop = tuple[Measurement, Weights]
Seconds = dict[str, list[float]]  # of each loop's passes


# ---------------------------------------------------------------------------------------------------------------------
# The loops


def conventional(dataset: data.ImageData, args: Namespace) -> Loop:
    """The loop as tutorials have it: a DataLoader of PIL images, Adam unfused, the loss read at every step.

    Its pixels are gray, except in a race, whose losses are of binarized images.
    """
    from torchvision import datasets, transforms

    class Images(datasets.MNIST):
        def __init__(self) -> None:  # reads no file; the rest is torchvision's
            self.data, self.targets = dataset.train_images.squeeze(1), dataset.train_labels
            binarize = [torch.bernoulli] if args.benchmark == "race" else []
            self.transform, self.target_transform = transforms.Compose([transforms.ToTensor(), *binarize]), None

    loader = torch.utils.data.DataLoader(Images(), batch_size=args.batch_size, shuffle=True)
    model = make_vae(dataset, args).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def measure() -> float:
        start, total = time.perf_counter(), 0.0
        for images, _ in loader:
            images = images.to(args.device)
            x_hat, logvar, mu, _ = model(images)
            loss = loss_criterion(x_hat, images, logvar, mu)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        return time.perf_counter() - start

    return measure, model.state_dict


def jax_scan(dataset: data.ImageData, args: Namespace) -> Loop:
    """The same model, batches, binarization and Adam in JAX (optax): the epoch is one jitted scan over its steps."""
    os.environ |= {"JAX_PLATFORMS": args.device, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    import jax
    import jax.numpy as jnp
    import optax

    images, size = jnp.asarray(dataset.train_images.flatten(1).numpy()), args.batch_size
    activation = {"relu": jax.nn.relu, "tanh": jnp.tanh, "silu": jax.nn.silu}[args.activation]
    parameters = make_vae(dataset, args).named_parameters()
    weights = {name: jnp.asarray(weight.detach().numpy().T) for name, weight in parameters}
    adam = optax.adam(args.lr)

    def linear(weights: dict, layer: str, x: Any) -> Any:
        return x @ weights[f"{layer}.weight"] + weights[f"{layer}.bias"]

    def neg_elbo(weights: dict, x: Any, eps: Any) -> Any:
        hidden = x
        for i in range(args.encoder_layers):
            hidden = activation(linear(weights, f"encoder.fc{i + 1}", hidden))
        mu, logvar = linear(weights, "latent_z.mu", hidden), linear(weights, "latent_z.logvar", hidden)
        hidden = mu + jnp.exp(0.5 * logvar) * eps
        for i in range(args.decoder_layers):
            hidden = activation(linear(weights, f"decoder.fc{i + 1}", hidden))
        logits = linear(weights, f"decoder.fc{args.decoder_layers + 1}", hidden)
        return (jax.nn.softplus(logits) - x * logits).sum() - 0.5 * (1 + logvar - mu**2 - jnp.exp(logvar)).sum()

    def step(carry: tuple, batch_and_key: tuple) -> tuple:
        (weights, moments), (batch, key) = carry, batch_and_key
        for_pixels, for_z = jax.random.split(key)
        gray = images[batch]
        x = (jax.random.bits(for_pixels, gray.shape, jnp.uint16) < gray * (2**16 / 255)).astype(jnp.float32)
        eps = jax.random.normal(for_z, (size, args.latent_size))
        loss, gradients = jax.value_and_grad(neg_elbo)(weights, x, eps)
        updates, moments = adam.update(gradients, moments)
        return (optax.apply_updates(weights, updates), moments), loss

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(carry: tuple, key: Any) -> tuple:
        for_order, for_steps = jax.random.split(key)
        steps = len(images) // size  # the images left over are left out
        batches = jax.random.permutation(for_order, len(images))[: steps * size].reshape(steps, size)
        return jax.lax.scan(step, carry, (batches, jax.random.split(for_steps, steps)))

    carry, keys = (weights, adam.init(weights)), iter(jax.random.split(jax.random.key(0, impl="rbg"), 1000))

    def measure() -> float:
        nonlocal carry
        start = time.perf_counter()
        carry, losses = epoch(carry, next(keys))
        losses.block_until_ready()
        return (time.perf_counter() - start) * len(images) / (len(images) // size * size)

    return measure, lambda: {name: torch.tensor(weight.__array__().T) for name, weight in carry[0].items()}


def apart(loop: Callable[..., Loop], dataset: data.ImageData, args: Namespace) -> Loop:
    """A loop in a process of its own, without our settings: PyTorch, for example, does not flush denormals there."""
    process = ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn"), _start, (loop, dataset, args))
    return lambda: process.submit(_call, 0).result(), lambda: process.submit(_call, 1).result()


def _start(loop: Callable[..., Loop], dataset: data.ImageData, args: Namespace) -> None:
    global _loop
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    _loop = loop(dataset, args)


def _call(i: int) -> Any:
    return _loop[i]()


def ours(dataset: data.ImageData, args: Namespace) -> Measurement:
    """train.train itself, in its third epoch, compiled or not as a run of the usual length is."""
    options = train_options(args)
    options = options.resolve(dataset)
    options = options.resolve_for(VAE.for_data(dataset, options), dataset)
    sizes = dataclasses.asdict(options)
    return lambda: third_epoch(**sizes | {"dataset": dataset})


def third_epoch(**arguments: Any) -> float:
    """The seconds of train.train's third epoch. By then, a GPU has recorded all graphs."""
    with silence() as out_dir:
        _, history, _ = train.train(**arguments | {"epochs": 3, "out_dir": out_dir})
    return history[-1]["seconds"]


@contextlib.contextmanager
def silence() -> Iterator[str]:
    """A context in which train.train prints and draws nothing. Yields a folder for its run."""
    with (
        tempfile.TemporaryDirectory() as out_dir,
        patch.object(train, "draw"),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        yield out_dir


def make_vae(dataset: data.ImageData, args: Namespace) -> VAE:
    sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    return VAE(dataset.input_size, channels=dataset.shape[0], **sizes)


def train_options(args: Namespace) -> Options:
    return make_options(**{name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None})


def matrix_products(dataset: data.ImageData, args: Namespace, precision: str) -> Measurement:
    """A pass's matrix products alone: each layer's outputs and two gradients, but no gradient of the images."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    layers = [layer for layer in make_vae(dataset, args).modules() if isinstance(layer, nn.Linear)]
    weights = [layer.weight.detach().to(args.device, dtype) for layer in layers]
    inputs = [weight.new_empty(args.batch_size, weight.shape[1]).normal_() for weight in weights]
    gradients = [weight.new_empty(args.batch_size, weight.shape[0]).normal_() for weight in weights]

    def products() -> None:
        for i, (x, weight, gradient) in enumerate(zip(inputs, weights, gradients, strict=True)):
            x @ weight.T
            gradient.T @ x
            if i > 0:
                gradient @ weight

    def measure() -> float:
        with step.matmul_precision(precision, args.device):
            run = products
            if args.device == "cuda":
                products()  # which chooses kernels
                run = step.record_graph(products)
            start = time.perf_counter()
            for _ in range(round(len(dataset.train_images) / args.batch_size)):
                run()
            if args.device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

    return measure


def take_turns(loops: dict[str, Measurement], repeats: int) -> Seconds:
    """Measures each loop's passes in turn. A first pass of each, to warm up, is not counted."""
    seconds: Seconds = {name: [] for name in loops}
    for name in tqdm([*loops] * (repeats + 1), unit=" passes", leave=False, disable=None):
        seconds[name].append(loops[name]())
    return {name: passes[1:] for name, passes in seconds.items()}


def print_speeds(title: str, seconds: Seconds, dataset: data.ImageData) -> tuple[dict[str, float], dict[str, float]]:
    """Prints a table -> each loop's images per second, and its time in train.py's, the median of the turns' ratios."""
    speeds = {name: len(dataset.train_images) / statistics.median(passes) for name, passes in seconds.items()}
    turns = {name: zip(passes, seconds["train.py"], strict=True) for name, passes in seconds.items()}
    times = {name: statistics.median(a / b for a, b in pairs) for name, pairs in turns.items()}
    print(f"| {title} | images/s | time, in that of train.py |\n| --- | --- | --- |")
    print(*(f"| {name} | {speeds[name]:,.0f} | {times[name]:.2f} |" for name in seconds), sep="\n")
    return speeds, times


# ---------------------------------------------------------------------------------------------------------------------
# The benchmarks: each prints a table and returns what it measured


def compare(dataset: data.ImageData, args: Namespace) -> dict[str, Any]:
    """The conventional loop, JAX on a CPU, train.py and its matrix products alone."""
    rivals = {name: loop[0] for name, loop in start_rivals(dataset, args).items()}
    has_bfloat16 = args.device != "cpu" or step.bfloat16_units()  # without, such products take many times longer
    precisions = step.PRECISIONS if has_bfloat16 else ("highest", "medium")
    floors = {f"matrix products ({name})": matrix_products(dataset, args, name) for name in precisions}
    seconds = take_turns(rivals | {"train.py": ours(dataset, args)} | floors, args.repeats)
    speeds, times = print_speeds("loop", seconds, dataset)
    floor = max(floors, key=speeds.__getitem__)
    faster = " and ".join(f"{times[name]:.2f} times as fast as {name}" for name in rivals)
    print(f"train.py is {faster}, and takes {1 / times[floor]:.2f} times as long as the {floor} alone")
    if args.picture:
        speeds = {name: speeds[name] for name in (*rivals, "train.py", floor)}
        pictures.save_figure(draw_speeds(speeds, describe(args)), Path(args.picture))
    return {"seconds": seconds, "times": times, "floor": floor}


def start_rivals(dataset: data.ImageData, args: Namespace) -> dict[str, Loop]:
    """The conventional loop and JAX, each in its own process."""
    rivals = {"conventional": apart(conventional, dataset, args)}
    if missing := [package for package in ("jax", "optax") if not importlib.util.find_spec(package)]:
        print(f"no row for JAX, because a package is missing: pip install {' '.join(missing)}")
    else:
        rivals["JAX"] = apart(jax_scan, dataset, args)
    return rivals


def race(dataset: data.ImageData, args: Namespace) -> dict[str, Any]:
    """The time that each loop takes to test losses of 100 and 97.5, and its nll in the time that --recipe takes.

    The rivals have Adam's usual step size of 1e-3. train.py's time includes compilation and its tests, but no pictures.
    """
    goals, path = (100.0, 97.5), RECIPES / f"{args.recipe}.txt"
    options = parse_given(make_parser(None), [f"@{path}"])  # which fails, if it does, before the race
    curves, _, _ = take_race(dataset, args, dataclasses.asdict(train_options(args)), goals[-1])
    print(f"| loop | {' | '.join(f'seconds to a test loss of {goal:g}' for goal in goals)} |\n| --- | --- | --- |")
    for name, curve in curves.items():
        reached = (next((f"{seconds:.0f}" for seconds, loss in curve if loss <= goal), None) for goal in goals)
        print(f"| {name} | {' | '.join(time or f'not in {curve[-1][0]:.0f}' for time in reached)} |")
    options |= {name: getattr(args, name) for name in ("dataset", "data_dir", "device")}
    sizes = Namespace(**vars(args) | dataclasses.asdict(make_options(**options)) | {"likelihood": "bernoulli"})
    _, models, seconds = take_race(dataset, sizes, options)
    print(f"| loop | nll after {seconds:.0f} s, with the sizes of {args.recipe} |\n| --- | --- |")
    nlls = {
        name: evaluate.evaluate(model, dataset.test_images, nll_samples=5000)["nll"] for name, model in models.items()
    }
    print(*(f"| {name} | {value:.2f} |" for name, value in nlls.items()), sep="\n")
    return {"curves": curves, "nll": nlls}


def take_race(
    dataset: data.ImageData, args: Namespace, options: dict[str, Any], goal: float | None = None, patience: float = 10
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, VAE], float]:
    """Trains all loops in turn -> seconds and test losses after every epoch, models, and train.py's seconds.

    While train.py runs, each rival is given the same time. Then it goes on until it reaches the goal, or has taken
    `patience` times train.py's time.
    """
    rivals = start_rivals(dataset, Namespace(**vars(args) | {"lr": 1e-3}))
    test_set = measure.make_test_set(dataset, "dynamic", args.device)
    models = {name: make_vae(dataset, args).to(args.device) for name in rivals}
    curves: dict[str, list[tuple[float, float]]] = {name: [] for name in (*rivals, "train.py")}
    start, paused = time.perf_counter(), 0.0

    def go_on(name: str, until: float, goal: float = -math.inf) -> None:
        run_epoch, weights = rivals[name]
        while not curves[name] or (curves[name][-1][0] < until and curves[name][-1][1] > goal):
            seconds = run_epoch() + (curves[name][-1][0] if curves[name] else 0)
            models[name].load_state_dict(weights())
            curves[name].append((seconds, sum(train.compute_test_losses(models[name], test_set)[1:])))

    def on_epoch(model: VAE, history: train.History) -> None:
        nonlocal paused
        pause = time.perf_counter()
        curves["train.py"].append((pause - start - paused, history[-1]["test_loss"]))
        for name in rivals:
            go_on(name, until=curves["train.py"][-1][0])
        paused += time.perf_counter() - pause

    with silence() as out_dir:
        changes = {"dataset": dataset, "out_dir": out_dir}
        models["train.py"], _, _ = train.train(**options | changes, on_epoch=on_epoch)
    finish = curves["train.py"][-1][0]
    if goal:
        for name in rivals:
            go_on(name, patience * finish, goal)
    return curves, models, finish


def nll(dataset: data.ImageData, args: Namespace) -> dict[str, Any]:
    """nll of 1,000 training images with 1,000 samples, compiled and not, and its decoder's matrix products alone."""
    images, labels, num_samples = dataset.train_images[:1000], dataset.train_labels[:1000], 1000
    model = make_vae(dataset, args).to(args.device).requires_grad_(False)
    test_set = measure.to_test_set(images.to(args.device), labels.to(args.device), "dynamic")
    device = torch.device(args.device)
    rows = math.prod(measure.BLOCKS[device.type])
    precision = measure.nll_precision(model, test_set)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    weights = [layer.weight.to(dtype) for layer in model.decoder.children()]
    inputs = [weight.new_empty(rows, weight.shape[1]).normal_() for weight in weights]
    make_weigh = measure.make_weigh
    made = {}

    def estimate(is_compiled: bool) -> float:
        def make_once(*args: Any) -> Callable[..., torch.Tensor]:
            if is_compiled not in made:
                made[is_compiled] = make_weigh(*args)
            return made[is_compiled]

        with (
            patch.object(measure, "is_worth_compiling", lambda *_: is_compiled),  # by the rule, too few blocks
            patch.object(measure, "make_weigh", make_once),
        ):
            start = time.perf_counter()
            measure.estimate_nll(model, test_set, num_samples)[0].sum().item()
            return time.perf_counter() - start

    def products() -> float:
        start = time.perf_counter()
        with step.matmul_precision(precision, args.device):
            for _ in range(len(images) * num_samples // rows):
                for x, weight in zip(inputs, weights, strict=True):
                    x @ weight.T
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    loops = {"nll": lambda: estimate(True), "not compiled": lambda: estimate(False), "matrix products": products}
    seconds = take_turns(loops, args.repeats)
    print(f"| {precision} | seconds | in those of its products |\n| --- | --- | --- |")
    for name, passes in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(passes, seconds["matrix products"], strict=True))
        print(f"| {name} | {statistics.median(passes):.2f} | {ratio:.2f} |")
    return {"seconds": seconds}


def draw_speeds(speeds: dict[str, float], title: str) -> "Figure":
    """A bar for each loop's images per second; the last two are train.py and the floor."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.2), layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots()
    bars = axes.barh(list(speeds), list(speeds.values()), color=[GRAY] * (len(speeds) - 2) + [BLUE, ORANGE])
    axes.bar_label(bars, [f"{speed:,.0f}" for speed in speeds.values()], padding=4)
    axes.set(xlabel="images per second", xlim=(0, 1.15 * max(speeds.values())))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_floats(shape: torch.Size, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    return torch.rand(shape, generator=generator, device=device) * 2**16 - 2**15


TRICKS: dict[str, list[tuple[Any, str, Any]]] = {  # what to patch to do without each
    "the step as one compiled function": [(options_module, "is_worth_compiling", lambda *_: False)],
    "matrix products in the fastest precision": [(options_module, "choose_precision", lambda *_: "highest")],
    "16 random bits a pixel, not 32": [(data, "draw_bits", draw_floats)],
    "eight steps at once, and then one average of the weights": [(train, "STEPS_AT_ONCE", 1)],
    "a CUDA graph": [(train, "Recorded", lambda steps: steps)],
}


@contextlib.contextmanager
def without(*tricks: str) -> Iterator[None]:
    """Takes tricks out of train.py."""
    with contextlib.ExitStack() as stack:
        for patched in (patched for trick in tricks for patched in TRICKS[trick]):
            stack.enter_context(patch.object(*patched))
        yield


def tricks(dataset: data.ImageData, args: Namespace) -> dict[str, Any]:
    """train.py as it is, without each of its tricks, and without any."""
    names = [name for name in TRICKS if args.device == "cuda" or "CUDA" not in name]
    left_out = {"train.py": ()} | {name: (name,) for name in names} | {"all of these": names}
    loops = {name: without(*names)(lambda: ours(dataset, args)()) for name, names in left_out.items()}
    seconds = take_turns(loops, args.repeats)
    print_speeds("train.py as it is, and without", seconds, dataset)
    return {"seconds": seconds}


def results(dataset: data.ImageData, args: Namespace) -> dict[str, Any]:
    """The test losses of whole runs: what the tricks cost in quality, next to what another seed changes."""
    losses: dict[str, list[float]] = {"with all tricks": [], "with none": []}
    for seed in range(args.repeats):
        for row, left_out in zip(losses.values(), ((), TRICKS), strict=True):
            with tempfile.TemporaryDirectory() as out_dir, without(*left_out):
                changes = {"dataset": dataset, "seed": seed, "out_dir": out_dir}
                model, _, _ = train.train(**dataclasses.asdict(train_options(args)) | changes)
            row.append(evaluate.evaluate(model, dataset.test_images, nll_samples=1)["neg_elbo"])
    print(f"| seed | {' | '.join(losses)} |\n| --- | --- | --- |")
    rows = dict(enumerate(zip(*losses.values(), strict=True))) | {"mean": map(statistics.mean, losses.values())}
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{loss:.2f}' for loss in row)} |")
    return {"neg_elbo": losses}


# ---------------------------------------------------------------------------------------------------------------------
# The command


def first_images(dataset: data.ImageData, n: int | None) -> data.ImageData:
    return replace(dataset, train_images=dataset.train_images[:n], train_labels=dataset.train_labels[:n])


def describe(args: Namespace) -> str:
    """The sizes, and the GPU's name, or the CPU's with the units that decide how fast its matrix products are."""
    layers = f"{args.encoder_layers} + {args.decoder_layers} layers of {args.hidden_size}, {args.activation}"
    cpu = [torch.backends.cpu.get_cpu_capability(), *step.bfloat16_units(), f"{torch.get_num_threads()} threads"]
    where = torch.cuda.get_device_name() if args.device == "cuda" else ", ".join(cpu)
    return f"batch {args.batch_size}, {layers}, latent {args.latent_size} ({where})"


@utils.command
def main() -> None:
    parser = utils.ArgumentParser(description=__doc__)
    benchmarks, add = {run.__name__: run for run in (compare, tricks, results, nll, race)}, parser.add_argument
    add("benchmark", nargs="?", choices=benchmarks, default="compare", help="one of the five above")
    add("--images", type=utils.count, metavar="N", help="train on the first N images (default: all)")
    add("--repeats", type=utils.count, default=3, metavar="N", help="passes of each loop; for results, seeds")
    add("--recipe", default="one-minute", help="the recipe of the race for nll")
    add("--json", metavar="FILE", help="where to write all that was measured")
    add("--picture", metavar="FILE", help="where compare draws a picture")
    for name in OPTIONS:
        add(utils.flag(name), metavar="X", help="as for train.py")
    args = parser.parse_args()
    options = train_options(args)
    torch.set_flush_denormal(True)  # as train.py does, before PyTorch starts its threads
    device = utils.choose_device(options.device).type
    args = Namespace(**vars(args) | dataclasses.asdict(options) | {"device": device, "likelihood": "bernoulli"})
    dataset = first_images(data.load_dataset(args.dataset, args.data_dir), args.images)
    if args.batch_size > len(dataset.train_images):
        raise utils.UserError(f"--batch-size {args.batch_size} is more than the {len(dataset.train_images)} images")
    how = f"{dataset.name}, {len(dataset.train_images):,} images, {describe(args)}; PyTorch {torch.__version__}"
    print(how)
    measured = benchmarks[args.benchmark](dataset, args)
    if args.json:
        measured = {"options": vars(args), "how": how} | measured
        runs.write_atomically(Path(args.json), (json.dumps(measured, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
