"""torch.hub.load("PATH/OR/USER/REPO", "vae", source="local") builds the model without a copy of the code.

With pretrained="default" it is one of the trained models in weights/. A program may have modules of its own called
utils or model, say. They are not disturbed.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model import VAE

dependencies = ["torch", "numpy", "PIL", "tqdm"]
ROOT = Path(__file__).resolve().parent
FOLDERS = ROOT, ROOT / "experiments"  # of the modules
WEIGHTS = ROOT / "weights"


def vae(pretrained: str | None = None, **kwargs: int | str) -> "VAE":
    """A VAE with the arguments of model.VAE, or a trained one in eval mode.

    pretrained is the name of a file in weights/, such as "default", and the only argument then. Raises UserError if
    there is no such file. Save the model's state_dict, because pickle would not find its class again.
    """
    with own_modules():
        from model import VAE
        from runs import load_checkpoint
        from utils import UserError

        if not pretrained:
            return VAE(**kwargs)
        names = sorted(path.stem for path in WEIGHTS.glob("*.pt"))
        if pretrained not in names or kwargs:
            raise UserError(f"pretrained must be one of {', '.join(names)}, and the only argument, not {pretrained}")
        return load_checkpoint(WEIGHTS / f"{pretrained}.pt")[0]


@contextlib.contextmanager
def own_modules() -> Iterator[None]:
    """Makes imports find this repository's modules. Restores a program's own modules of the same names afterwards."""
    names = {path.stem for path in ROOT.glob("*.py")} | {"experiments"}

    def namesakes() -> dict[str, ModuleType]:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in names}

    modules = namesakes()
    path = sys.path[:]
    for name, module in modules.items():
        if Path(getattr(module, "__file__", None) or "").resolve().parent not in FOLDERS:
            del sys.modules[name]
    sys.path.insert(0, str(ROOT))
    try:
        yield
    finally:
        for name in namesakes():
            del sys.modules[name]
        sys.modules.update(modules)
        sys.path[:] = path
