"""torch.hub.load("PATH/OR/USER/REPO", "vae", source="local") builds the model without a copy of the code."""

from model import VAE

dependencies = ["torch"]


def vae(**kwargs: int | str) -> VAE:
    """A VAE with fresh weights; the arguments are those of model.VAE, and so are their defaults."""
    return VAE(**kwargs)
