"""torch.hub.load("PATH/OR/USER/REPO", "vae", source="local") builds the model without a copy of the code.

With pretrained="default" it is one of the trained models in weights/.
"""

from pathlib import Path
from typing import Any

import utils
from model import VAE

dependencies = ["torch"]
WEIGHTS = Path(__file__).parent / "weights"


def vae(pretrained: str | None = None, **kwargs: int | str) -> VAE:
    """A VAE with the arguments of model.VAE, or a trained one in eval mode.

    pretrained is the name of a file in weights/, such as "default", and the only argument then. Raises UserError if
    there is no such file.
    """
    if not pretrained:
        return VAE(**kwargs)
    names = sorted(path.stem for path in WEIGHTS.glob("*.pt"))
    if pretrained not in names or kwargs:
        raise utils.UserError(f"pretrained must be one of {', '.join(names)}, and the only argument, not {pretrained}")
    return load(WEIGHTS / f"{pretrained}.pt")[0]


def load(path: str | Path) -> tuple[VAE, dict[str, Any]]:
    """Does what utils.load_checkpoint does, also for a VampVAE."""
    checkpoint, model = utils.read_checkpoint(path), None
    if checkpoint.get("class", "VAE").endswith("VampVAE"):
        from experiments.vampprior import VampVAE  # needs more packages than the VAE

        model = VampVAE(**checkpoint["model"])
    return utils.load_checkpoint(path, model)
