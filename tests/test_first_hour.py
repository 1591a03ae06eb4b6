"""What went wrong in other people's first hour: inherited settings, copied folders, namesakes, two commands at once."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import evaluate
import runs
import train
import utils
from data import ImageData
from model import VAE
from tests.conftest import not_windows, processes, thinned
from utils import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A small run's options. No pictures are drawn."""
    monkeypatch.setattr(train, "draw", lambda *args: None)
    monkeypatch.setattr(evaluate, "draw_all", lambda *args: ())
    small = {"hidden_size": 16, "latent_size": 2, "epochs": 1, "device": "cpu", "compile": False}
    return small | {"out_dir": tmp_path / "runs"}


@pytest.fixture(scope="module")
def few(digits: ImageData) -> ImageData:
    return thinned(digits, 20)


def run_script(*words: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, encoding="utf-8", timeout=100)


# ---------------------------------------------------------------------------------------------------------------------
# What a command inherits

COMMANDS = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/docs"]
import evaluate, make, train
for main, *words in ((train.main, *{train!r}), (evaluate.main, {run!r}, "--nll-samples=1"), (make.main, {run!r})):
    sys.argv = ["command.py", *words]
    main()
"""


def test_neither_a_backend_nor_the_locale_matters(few_digits: Path, tmp_path: Path):
    """A notebook's backend may not be installed here, and files are UTF-8 even where the locale is ASCII."""
    run = tmp_path / "001-few-z3"
    options = tmp_path / "options.txt"
    options.write_text(f"# for \N{GREEK SMALL LETTER BETA}\n--dataset '{few_digits}' --epochs 1", encoding="utf-8")
    words = [f"@{options}", "--latent-size=3", "--binarize=dynamic", f"--out-dir={tmp_path}"]
    code = COMMANDS.format(root=str(ROOT), train=words, run=str(run))
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = run_script("-c", code, MPLBACKEND="no-such-backend", **locale)
    assert (done.returncode, done.stderr) == (0, "")
    page, script = (path.read_text(encoding="utf-8") for path in (run / "explorer.html", ROOT / "docs" / "page.js"))
    assert {letter for letter in script if ord(letter) > 127} <= set(page)
    assert {"curves.png", "latent_usage.png"} <= {path.name for path in run.iterdir()}


def test_a_notebook_keeps_its_backend(few: ImageData, options: dict, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    _, _, run = train.train(few, **options)
    assert (run / "curves.png").exists()
    assert os.environ["MPLBACKEND"] == "module://matplotlib_inline.backend_inline"


# ---------------------------------------------------------------------------------------------------------------------
# Beside a user's own modules

PROGRAM = """
import sys
import torch
if sys.argv[1] == "before":
    import data.sets, model, train, utils
models = [torch.hub.load({root!r}, "vae", source="local", latent_size=3)]
models += [torch.hub.load({root!r}, "vae", source="local", pretrained=name) for name in ("default", "vampprior")]
import data.sets, model, step, train, utils
assert data.sets.MINE and model.MINE and step.MINE and train.MINE and utils.MINE
for vae in models:
    vae.elbo_terms(torch.rand(2, 784), torch.ones(2, 784))
    print(type(vae).__name__, *vae.sample(2).shape)
assert {root!r} not in sys.path
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_torch_hub_beside_modules_of_the_same_names(when: str, tmp_path: Path):
    (tmp_path / "data").mkdir()
    for name in ("data/__init__", "data/sets", "model", "step", "train", "utils"):
        (tmp_path / f"{name}.py").write_text("MINE = True\n", encoding="utf-8")
    (tmp_path / "program.py").write_text(PROGRAM.format(root=str(ROOT)), encoding="utf-8")
    done = run_script(tmp_path / "program.py", when)
    assert done.stdout.split("\n") == ["VAE 2 784", "VAE 2 784", "VampVAE 2 784", ""], done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Two at once


def write_often(path: Path) -> None:
    for i in range(20):
        runs.save_checkpoint(path, {"weights": torch.full((10_000,), i)})


@not_windows
def test_two_processes_write_the_same_file(tmp_path: Path):
    path = tmp_path / "checkpoint.pt"
    write_often(path)
    started = [processes.Process(target=write_often, args=(path,)) for _ in range(2)]
    for process in started:
        process.start()
    while any(process.is_alive() for process in started):
        assert len(torch.load(path, weights_only=True)["weights"].unique()) == 1
    assert [process.exitcode for process in started] == [0, 0]
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------------------------------------------------
# Which run is the newest


def test_a_run_in_its_first_epoch_is_not_the_newest(few, options: dict, monkeypatch: pytest.MonkeyPatch, capsys):
    _, _, run = train.train(few, **options)
    unfinished = runs.new_run_folder(run.parent, "few", 2)
    capsys.readouterr()
    metrics = evaluate.evaluate_run(run.parent, dataset=few, nll_samples=1)
    printed = capsys.readouterr()
    assert str(unfinished) in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out.startswith(f"{run / 'checkpoint.pt'}: ")
    assert metrics["num_images"] == 50
    evaluate.evaluate_run(run, dataset=few, nll_samples=1)
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="after an epoch"):
        runs.checkpoint_path(unfinished)


def test_a_copy_is_not_taken_for_the_newest(few, options: dict):
    train.train(few, **options)
    _, _, run = train.train(few, **options)
    for suffix in (" copy", "-backup"):
        copy = Path(shutil.copytree(run, f"{run}{suffix}"))
        assert runs.newest_run(run.parent) == run
        assert runs.checkpoint_path(copy).parent == copy
    assert runs.new_run_folder(run.parent, "few", 2).name == "003-few-z2"


# ---------------------------------------------------------------------------------------------------------------------
# Commands that are printed and typed


def test_commands_are_quoted_for_the_shell_of_the_system(monkeypatch: pytest.MonkeyPatch):
    lines = {}
    for system in ("posix", "nt"):
        with monkeypatch.context() as patched:
            patched.setattr(os, "name", system)
            lines[system] = utils.shell_line("python", "train.py", "--resume", "my runs", "it's")
    assert lines["posix"] == "python train.py --resume 'my runs' 'it'\"'\"'s'"
    assert lines["nt"] == 'python train.py --resume "my runs" it\'s'


def test_windows_paths_and_editors_in_an_argument_file(tmp_path: Path):
    path = tmp_path / "mine.txt"
    text = "--data-dir C:\\new\\data --out-dir \"D:\\my runs\\\"  # a comment\n--dataset '\\\\server\\it'\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    given = train.parse_given(train.make_parser(None), [f"@{path}"])
    assert given == {"data_dir": "C:\\new\\data", "out_dir": "D:\\my runs\\", "dataset": "\\\\server\\it"}


def test_the_nearest_option_is_suggested(fails: Callable):
    near = {"--latnt-size": "--latent-size", "-epochs": "--epochs", "runs --batch_size": "--batch-size"}
    for wrong, right in near.items():
        for words in (f"{wrong} 5", f"{wrong}=5"):
            assert f"did you mean {right}?" in fails(train.main, *words.split())
    assert "did you mean" not in fails(train.main, "--number-of-layers", "3")


# ---------------------------------------------------------------------------------------------------------------------
# What can be known before the first step


class NormalizedVAE(VAE):
    def __init__(self, *args: int, **sizes: int | str):
        super().__init__(*args, **sizes)
        size = self.config["hidden_size"]
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, size), nn.BatchNorm1d(size))


@pytest.mark.parametrize(("images", "batch_size", "is_possible"), [(7, 1, False), (7, 2, True), (7, 3, True)])
def test_a_normalization_and_a_batch_of_one_image(images, batch_size, is_possible, few, options: dict):
    first = (few.train_images[:images], few.train_labels[:images], few.test_images, few.test_labels)
    dataset, options = ImageData("few", few.classes, *first), options | {"batch_size": batch_size}
    if is_possible:
        train.train(dataset, NormalizedVAE, **options)
        return
    with pytest.raises(UserError, match=r"batches of 1: .*Try a larger --batch-size"):
        train.train(dataset, NormalizedVAE, **options)
    assert not options["out_dir"].exists()


@pytest.mark.parametrize(
    "wrong",
    [{"dataset": torch.zeros(9, 28, 28)}, {"dataset": [1, 2]}, {"model": "conv"}, {"on_epoch": lambda model: None}],
)
def test_wrong_arguments_are_refused_before_the_first_step(wrong: dict, few, options: dict, capsys):
    with pytest.raises((UserError, TypeError)):
        train.train(**{"dataset": few} | wrong, **options)
    assert "epoch 1" not in capsys.readouterr().out
    assert not list(options["out_dir"].glob("*"))


def test_wrong_arguments_of_resume_and_evaluate(few, options: dict):
    model, _, run = train.train(few, **options)
    tensor, labels = few.test_images, few.test_labels
    for call in (
        lambda: train.resume(run, dataset=tensor, epochs=2),
        lambda: evaluate.evaluate_run(run, dataset=tensor),
        lambda: evaluate.evaluate_run(run, dataset=few, nll_samples=1.5),
        lambda: evaluate.evaluate(model, tensor, labels=labels[:3]),
        lambda: evaluate.evaluate(model, tensor, labels=labels.float()),
    ):
        with pytest.raises(UserError):
            call()
    evaluate.evaluate_run(run, dataset=few, device=torch.device("cpu"), nll_samples=1)
