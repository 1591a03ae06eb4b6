"""Measures how fast a VAE trains here, side by side in one run, in images per second.

    python benchmarks/throughput.py                 # a tutorial's loop, JAX, python train.py, the matrix products alone
    python benchmarks/throughput.py tricks          # what train.py would lose without each of its tricks
    python benchmarks/throughput.py scaling         # cost against batch size, hidden size and number of images
    python benchmarks/throughput.py results         # test losses of the default run, with all tricks and with none

JAX's row needs pip install jax optax. The loops take turns, so that a machine whose speed drifts is fair to all of
them, and the figures are medians.
"""

import contextlib
import functools
import importlib.util
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
import evaluate
import train
import utils
from data import DATASETS, ImageData, load_dataset
from model import ACTIVATIONS, loss_criterion

Measurement = Callable[[], float]  # -> the seconds of one pass over the images

# ---------------------------------------------------------------------------------------------------------------------
# The loops


def conventional(data: ImageData, args: Any) -> Measurement:
    """The loop as tutorials have it: a DataLoader of PIL images, Adam unfused, the loss read at every step."""
    from torchvision import datasets, transforms

    class Images(datasets.MNIST):
        def __init__(self) -> None:  # reads no file: the rest is torchvision's
            self.data, self.targets = data.train_images, data.train_labels
            self.transform, self.target_transform = transforms.ToTensor(), None

    loader = torch.utils.data.DataLoader(Images(), batch_size=args.batch_size, shuffle=True)
    model = train.make_vae(data, args).to(args.device)
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

    return measure


def jax_scan(data: ImageData, args: Any) -> Measurement:
    """The same model, batches, binarization and Adam in JAX (optax): the epoch is one jitted scan over its steps."""
    import jax
    import jax.numpy as jnp
    import optax

    model, size = train.make_vae(data, args), args.batch_size
    images = jnp.asarray(data.train_images.flatten(1).numpy())
    activation = {"relu": jax.nn.relu, "tanh": jnp.tanh, "silu": jax.nn.silu}[args.activation]
    weights = {name: jnp.asarray(weight.detach().numpy().T) for name, weight in model.named_parameters()}
    hidden_layers = {"encoder": args.encoder_layers, "decoder": args.decoder_layers}
    adam = optax.adam(train.Options.lr)

    def linear(weights: dict, layer: str, x: Any) -> Any:
        return x @ weights[f"{layer}.weight"] + weights[f"{layer}.bias"]

    def hidden(weights: dict, side: str, x: Any) -> Any:
        for i in range(hidden_layers[side]):
            x = activation(linear(weights, f"{side}.fc{i + 1}", x))
        return x

    def neg_elbo(weights: dict, x: Any, eps: Any) -> Any:
        features = hidden(weights, "encoder", x)
        mu, logvar = linear(weights, "latent_z.mu", features), linear(weights, "latent_z.logvar", features)
        features = hidden(weights, "decoder", mu + jnp.exp(0.5 * logvar) * eps)
        logits = linear(weights, f"decoder.fc{args.decoder_layers + 1}", features)
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

    return measure


def apart(loop: Callable[[ImageData, Any], Measurement], data: ImageData, args: Any) -> Measurement:
    """A loop in a process of its own, whose settings are not ours: PyTorch's, say, which does not flush denormals."""
    context = torch.multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=_serve, args=(loop, there, data, args), daemon=True).start()
    there.close()

    def measure() -> float:
        here.send("measure")
        return here.recv()

    return measure


def _serve(loop: Callable[[ImageData, Any], Measurement], pipe: Connection, data: ImageData, args: Any) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    measure = loop(data, args)
    with contextlib.suppress(EOFError):  # the other end is gone: nobody will ask again
        while pipe.recv():
            pipe.send(measure())


def ours(data: ImageData, args: Any) -> Measurement:
    """train.train itself, in its second epoch, compiled or not as in a run of as many epochs as by default."""
    options = {name: getattr(args, name) for name in ("batch_size", "device", *train.SIZES)}
    options["compile"] = train.choose_how(train.Options(**options, epochs=20), len(data.train_images)).compile

    def measure() -> float:
        with contextlib.ExitStack() as stack:
            options["out_dir"] = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(patch.object(train, "draw", lambda *_: None))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            _, history, _ = train.train(data, epochs=2, **options)
        return history[-1]["seconds"]

    return measure


def matrix_products(data: ImageData, args: Any, dtype: torch.dtype, precision: str) -> Measurement:
    """The pass's matrix products alone: each layer's outputs and two gradients, save the first's for images."""
    device = torch.device(args.device)
    model = train.make_vae(data, args)
    weights = [layer.weight.to(device, dtype) for layer in model.modules() if isinstance(layer, nn.Linear)]
    inputs = [torch.randn(args.batch_size, weight.shape[1], device=device, dtype=dtype) for weight in weights]
    gradients = [torch.randn(args.batch_size, weight.shape[0], device=device, dtype=dtype) for weight in weights]

    @torch.no_grad()
    def step(_: Tensor) -> Tensor:
        for i, (x, weight, gradient) in enumerate(zip(inputs, weights, gradients, strict=True)):
            x @ weight.T
            result = gradient.T @ x
            if i > 0:
                gradient @ weight
        return result

    run, nothing = utils.CudaGraph(step) if device.type == "cuda" else step, torch.empty(1, device=device)

    def measure() -> float:
        torch.set_float32_matmul_precision(precision)
        for timed in (False, True):
            start = time.perf_counter()
            for _ in range(round(len(data.train_images) / args.batch_size) if timed else 10):
                run(nothing)
            if device.type == "cuda":
                torch.cuda.synchronize()
        torch.set_float32_matmul_precision("highest")
        return time.perf_counter() - start

    return measure


def take_turns(loops: dict[str, Measurement], repeats: int) -> dict[str, list[float]]:
    """-> the seconds of each loop's passes. A first pass of each, to warm up, is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    with tqdm(total=(repeats + 1) * len(loops), unit=" passes", leave=False, disable=None) as progress:
        for repeat in range(repeats + 1):
            for name, measure in loops.items():
                progress.set_description(name)
                duration = measure()
                progress.update()
                if repeat > 0:
                    seconds[name].append(duration)
    return seconds


def compare(data: ImageData, args: Any) -> dict[str, Any]:
    loops = {"conventional": apart(conventional, data, args), "train.py": ours(data, args)}
    if missing := [package for package in ("jax", "optax") if not importlib.util.find_spec(package)]:
        print(f"no row for JAX, since a package is missing: pip install {' '.join(missing)}")
    elif args.device == "cpu":
        loops["JAX"] = apart(jax_scan, data, args)
    floors = {
        "matrix products, float32": (torch.float32, "highest"),
        "matrix products, float32 with rounded factors": (torch.float32, "medium"),
    }
    if args.device != "cpu" or utils.bfloat16_units():  # without which they take many times longer
        floors["matrix products, bfloat16"] = (torch.bfloat16, "highest")
    loops |= {name: matrix_products(data, args, *how) for name, how in floors.items()}
    seconds = take_turns(loops, args.repeats)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    floor = min(floors, key=medians.__getitem__)

    def times(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))

    print("| loop | images/s | time, in that of train.py |\n| --- | --- | --- |")
    for name, median in medians.items():
        print(f"| {name} | {len(data.train_images) / median:,.0f} | {median / medians['train.py']:.2f} |")
    rivals = {name: times(name, "train.py") for name in ("conventional", "JAX") if name in seconds}
    faster = " and ".join(f"{ratio:.2f} times as fast as {name}" for name, ratio in rivals.items())
    slower = times("train.py", floor)
    print(f"train.py is {faster}, and takes {slower:.2f} times as long as the {floor}, alone")
    if args.picture:
        speeds = {
            name: len(data.train_images) / medians[name]
            for name in ("conventional", *loops.keys() & {"JAX"}, "train.py", floor)
        }
        evaluate.save_figure(draw_speeds(speeds, f"{title(args)} ({where(args.device)})"), Path(args.picture))
    return {"seconds": seconds, "speedup": rivals, "times_the_floor": slower, "floor": floor}


def draw_speeds(speeds: dict[str, float], title: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.2), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(
        list(speeds), list(speeds.values()), color=["#94a4a2"] * (len(speeds) - 2) + ["#3f90da", "#ffa90e"]
    )
    axes.bar_label(bars, [f"{speed:,.0f}" for speed in speeds.values()], padding=4)
    figure.suptitle(title, fontsize=9)
    axes.set(xlabel="images per second", xlim=(0, 1.15 * max(speeds.values())))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# The tricks, one at a time


def draw_floats(shape: torch.Size, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    return torch.rand(shape, generator=generator, device=device) * 2**16 - 2**15


def unfused(*args: Any, adam: type = torch.optim.Adam, **kwargs: Any) -> torch.optim.Optimizer:
    return adam(*args, **kwargs | {"fused": False})


Patches = list[tuple[Any, str, Any]]
NOT_COMPILED: Patches = [(train, "compile_step", lambda *_: None)]
TRICKS: dict[str, Patches] = {
    "the step as one compiled function": NOT_COMPILED,
    "that, and Adam in one pass over each weight (fused)": [*NOT_COMPILED, (torch.optim, "Adam", unfused)],
    "matrix products in the fastest precision": [(utils, "choose_precision", lambda *_: "highest")],
    "16 random bits a pixel, not 32": [(module, "draw_bits", draw_floats) for module in (data, train)],
    "weights averaged 50 times per epoch": [(train, "AVERAGES_PER_EPOCH", 10**9)],
    "a CUDA graph": [(utils, "CudaGraph", lambda function: function)],
}


@contextlib.contextmanager
def without(*tricks: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for trick in tricks:
            for patched in TRICKS[trick]:
                stack.enter_context(patch.object(*patched))
        yield


def tricks(data: ImageData, args: Any) -> dict[str, Any]:
    def measure_without(*tricks: str) -> Measurement:
        def measure() -> float:
            with without(*tricks):
                return ours(data, args)()

        return measure

    names = [name for name in TRICKS if args.device == "cuda" or "CUDA" not in name]
    loops = {"train.py": measure_without(), **{name: measure_without(name) for name in names}}
    loops["all of these"] = measure_without(*names)
    seconds = take_turns(loops, args.repeats)
    print("| without | images/s | time, in that of train.py |\n| --- | --- | --- |")
    for name, values in seconds.items():
        ratio = statistics.median(value / full for value, full in zip(values, seconds["train.py"], strict=True))
        name = "nothing: train.py as it is" if name == "train.py" else name
        print(f"| {name} | {len(data.train_images) / statistics.median(values):,.0f} | {ratio:.2f} |")
    return {"seconds": seconds}


def results(data: ImageData, args: Any) -> dict[str, Any]:
    """The losses of whole runs: what the tricks cost in quality, beside what another seed makes of it."""
    rows = {"with all tricks": [], "with none": []}
    for seed in range(3):
        for name, row in rows.items():
            with tempfile.TemporaryDirectory() as out_dir, without(*(TRICKS if name == "with none" else ())):
                model, _, _ = train.train(data, seed=seed, device=args.device, out_dir=out_dir)
            row.append(evaluate.evaluate(model, data.test_images, nll_samples=1)["neg_elbo"])
    print("| seed | with all tricks | with none |\n| --- | --- | --- |")
    for seed, losses in enumerate(zip(*rows.values(), strict=True)):
        print(f"| {seed} | {' | '.join(f'{loss:.2f}' for loss in losses)} |")
    print(f"| mean | {' | '.join(f'{statistics.mean(row):.2f}' for row in rows.values())} |")
    return {"neg_elbo": rows}


# ---------------------------------------------------------------------------------------------------------------------
# How cost grows


def scaling(data: ImageData, args: Any) -> dict[str, Any]:
    sizes = {
        "batch_size": (16, 32, 64, 128, 256, 512, 1024),
        "hidden_size": (64, 128, 256, 512, 1024, 2048),
        "images": [n for n in (1000, 4000, 15_000, 60_000) if n <= len(data.train_images)],
    }
    seconds: dict[str, dict[str, list[float]]] = {}
    for name, values in sizes.items():
        seconds[name] = {"conventional": [], "train.py": []}
        for value in values:
            case = type(args)(**vars(args) | {name: value})
            images = first_images(data, value if name == "images" else min(6000, len(data.train_images)))
            loops = {"conventional": apart(conventional, images, case), "train.py": ours(images, case)}
            for loop, durations in take_turns(loops, args.repeats).items():
                seconds[name][loop].append(statistics.median(durations))
            print(f"{name} {value}: {', '.join(f'{loop} {s[-1]:.3f} s' for loop, s in seconds[name].items())}")
    if args.picture:
        evaluate.save_figure(draw_scaling(sizes, seconds, title(args)), Path(args.picture))
    return {"sizes": sizes, "seconds": seconds}


def draw_scaling(sizes: dict[str, Any], seconds: dict[str, dict[str, list[float]]], title: str) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    figure.suptitle(f"Seconds per epoch: {title}, but for the size on each axis", fontsize=10)
    labels = {name: f"{name.replace('_', ' ')} (6,000 images)" for name in sizes} | {"images": "images"}
    for axes, (name, loops) in zip(figure.subplots(1, len(sizes), sharey=True), seconds.items(), strict=True):
        for (loop, durations), color in zip(loops.items(), ("#94a4a2", "#3f90da"), strict=True):
            axes.loglog(sizes[name], durations, marker=".", color=color, label=loop)
        axes.set_xlabel(labels[name])
        axes.set_xticks(sizes[name], [f"{size:,}" for size in sizes[name]], fontsize=7)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("seconds")
    figure.axes[0].legend(fontsize=8, frameon=False)
    return figure


def first_images(data: ImageData, n: int) -> ImageData:
    return replace(data, train_images=data.train_images[:n], train_labels=data.train_labels[:n])


# ---------------------------------------------------------------------------------------------------------------------
# The command


def title(args: Any) -> str:
    layers = f"{args.encoder_layers} + {args.decoder_layers} layers of {args.hidden_size}"
    return f"batch {args.batch_size}, {layers}, {args.activation}, latent {args.latent_size}, {args.device}"


def where(device: str) -> str:
    """The GPU's name, or the CPU's with the units that decide how fast its matrix products are."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    names = (capabilities.get("cpu_name", "CPU"), torch.backends.cpu.get_cpu_capability(), *utils.bfloat16_units())
    return f"{', '.join(names)}, {torch.get_num_threads()} threads"


@utils.command
def main() -> None:
    benchmarks = {"compare": compare, "tricks": tricks, "scaling": scaling, "results": results}
    parser = utils.ArgumentParser(description=__doc__)
    parser.add_argument("benchmark", nargs="?", choices=benchmarks, default="compare")
    parser.add_argument(
        "--batch-size", type=utils.count, default=128, metavar="N", help="images per step (default: %(default)s)"
    )
    parser.add_argument("--hidden-size", type=utils.count, default=512, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--latent-size", type=utils.count, default=20, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--encoder-layers", type=utils.count, default=2, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--decoder-layers", type=utils.count, default=1, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--activation", choices=ACTIVATIONS, default="relu", help="(default: %(default)s)")
    parser.add_argument("--images", type=utils.count, metavar="N", help="images per pass (default: all)")
    parser.add_argument(
        "--repeats", type=utils.count, default=3, metavar="N", help="passes of each (default: %(default)s)"
    )
    parser.add_argument("--threads", type=utils.count, metavar="N", help="of the CPU (default: PyTorch's choice)")
    parser.add_argument("--device", choices=utils.DEVICES, default="auto", help="(default: %(default)s)")
    parser.add_argument("--dataset", choices=DATASETS, default="auto", help="(default: %(default)s)")
    parser.add_argument("--data-dir", default="data", metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="where to write all that was measured")
    parser.add_argument("--picture", metavar="FILE", help="where compare and scaling draw a picture")
    args = parser.parse_args()
    train.flush_denormals()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.device = utils.choose_device(args.device).type
    data = load_dataset(args.dataset, args.data_dir)
    if args.images and args.benchmark != "results":
        data = first_images(data, args.images)
    how = f"{title(args)} ({where(args.device)}); PyTorch {torch.__version__}"
    print(f"{data.name}, {len(data.train_images):,} images; {how}")
    measured = benchmarks[args.benchmark](data, args)
    if args.json:
        measured = {"options": vars(args), "where": where(args.device), "torch": torch.__version__, **measured}
        utils.write_atomically(Path(args.json), (json.dumps(measured, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
