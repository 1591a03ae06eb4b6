"""Images per second of training: a tutorial's convolutional VAE and experiments/convolutional.py, side by side.

    python benchmarks/convolutions.py --dataset data/emoji.npz

The tutorial's has four strided convolutions of 32 to 256 channels with batch normalization, the same backwards, squared
error, a DataLoader, unfused Adam, and loss.item() at every step. "its network as ours" has its convolutions without
normalization, a pixel's channels side by side, and train.py's loop. "products alone" is the time of nothing but the
convolutions and linear layers of experiments/convolutional.py, forward and backward. Ours runs in each precision,
compiled or not.
"""

import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import step
import utils
from benchmarks.throughput import Measurement, print_speeds, take_turns, third_epoch
from data import ImageData, load_dataset
from experiments.convolutional import SIZES, Activation, ChannelsLast, ConvDecoder, ConvVAE
from model import VAE
from options import make_options

LATENT_SIZE = 128
OUR_SIZES = SIZES | {"latent_size": LATENT_SIZE}


class TutorialVAE(nn.Module):
    """For images (B, C, H, W) with H and W multiples of 16."""

    def __init__(self, shape: tuple[int, int, int], widths: tuple[int, ...] = (32, 64, 128, 256)):
        super().__init__()
        grid = (widths[-1], shape[1] // 16, shape[2] // 16)
        features, down, up = widths[-1] * grid[1] * grid[2], [], []
        for before, after in zip((shape[0], *widths), widths, strict=False):
            down += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.LeakyReLU()]
        for before, after in zip(widths[::-1], (*widths[-2::-1], widths[0]), strict=True):
            up += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.BatchNorm2d(after), nn.LeakyReLU()]
        self.encoder = nn.Sequential(*down, nn.Flatten())
        self.mu, self.logvar = nn.Linear(features, LATENT_SIZE), nn.Linear(features, LATENT_SIZE)
        output = nn.Conv2d(widths[0], shape[0], 3, padding=1)
        self.decoder = nn.Sequential(nn.Linear(LATENT_SIZE, features), nn.Unflatten(1, grid), *up, output, nn.Sigmoid())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encoder(x)
        mu, logvar = self.mu(hidden), self.logvar(hidden)
        return self.decoder(mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)), mu, logvar


class OurTutorialVAE(VAE):
    """TutorialVAE's convolutions, written as experiments/convolutional.py writes its own."""

    def __init__(self, shape: tuple[int, int, int], widths: tuple[int, ...] = (32, 64, 128, 256)):
        grid = (widths[-1], shape[1] // 16, shape[2] // 16)
        features = math.prod(grid)
        super().__init__(math.prod(shape), features, LATENT_SIZE, likelihood="logistic", channels=shape[0])
        down = []
        up = []
        for before, after in zip((shape[0], *widths), widths, strict=False):
            down += [nn.Conv2d(before, after, 3, stride=2, padding=1), Activation("relu")]
        for before, after in zip(widths[::-1], (*widths[-2::-1], widths[0]), strict=True):
            up += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), Activation("relu")]
        output = nn.Conv2d(widths[0], shape[0], 3, padding=1)
        self.encoder = nn.Sequential(nn.Unflatten(1, shape), ChannelsLast(), *down, nn.Flatten())
        first = nn.Linear(LATENT_SIZE, features), nn.Unflatten(1, grid), ChannelsLast()
        self.decoder = ConvDecoder(shape, *first, *up, output)


def tutorial(dataset: ImageData, batch_size: int) -> Measurement:
    model = TutorialVAE(dataset.shape)
    loader = DataLoader(TensorDataset(dataset.train_images / 255), batch_size, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def measure() -> float:
        start, total = time.perf_counter(), 0.0
        for (x,) in loader:
            x_hat, mu, logvar = model(x)
            kl = -0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp())
            loss = nn.functional.mse_loss(x_hat, x, reduction="sum") + kl
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        return time.perf_counter() - start

    return measure


def ours(dataset: ImageData, batch_size: int, model: VAE | None = None, **how: bool | str) -> Measurement:
    options = {"dataset": dataset, "batch_size": batch_size, "device": "cpu"} | how
    if model:
        return lambda: third_epoch(model=model, **options)
    return lambda: third_epoch(model=ConvVAE, **options, **OUR_SIZES)


def products(dataset: ImageData, batch_size: int) -> Measurement:
    """The forward and backward passes of each convolution and linear layer of a step, for all images."""
    model = ConvVAE.for_data(dataset, make_options(likelihood="logistic", **OUR_SIZES))
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
    calls = []
    hooks = [layer.register_forward_hook(lambda *call: calls.append(call[:2])) for layer in layers]
    images = dataset.train_images[:batch_size] / 255
    model.loss(images, images)
    for hook in hooks:
        hook.remove()

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(math.ceil(len(dataset.train_images) / batch_size)):
            for layer, (x,) in calls:
                x = x.detach()
                wanted = [*layer.parameters()]
                if layer is not layers[0]:  # nobody needs the gradient of the images
                    wanted.append(x.requires_grad_())
                y = layer(x)
                torch.autograd.grad(y, wanted, y.detach())
        return time.perf_counter() - start

    return measure


@utils.command
def main() -> None:
    parser = utils.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True, help="as for train.py; the height and width are multiples of 16")
    parser.add_argument("--batch-size", type=utils.count, default=32, help="images per step")
    parser.add_argument("--repeats", type=utils.count, default=3, metavar="N", help="passes of each loop")
    args = parser.parse_args()
    dataset = load_dataset(args.dataset)
    if dataset.shape[1] % 16 or dataset.shape[2] % 16:
        raise utils.UserError("the tutorial's network needs a height and width that are multiples of 16")
    torch.set_flush_denormal(True)
    arguments = dataset, args.batch_size
    loops = {
        "tutorial": tutorial(*arguments),
        "tutorial, its network as ours": ours(*arguments, OurTutorialVAE(dataset.shape)),
        "train.py": ours(*arguments),
        "train.py, products alone": products(*arguments),
    }
    for precision in step.PRECISIONS if step.bfloat16_units() else ("highest",):
        loops[f"train.py --precision {precision}"] = ours(*arguments, precision=precision, compile=False)
        loops[f"train.py --precision {precision} --compile"] = ours(*arguments, precision=precision, compile=True)
    print(f"{dataset.name}, batches of {args.batch_size}, {torch.get_num_threads()} threads, {step.bfloat16_units()}")
    print_speeds("loop", take_turns(loops, args.repeats), dataset)


if __name__ == "__main__":
    main()
