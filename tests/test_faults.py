"""A run that is killed, interrupted, out of disk space or damaged loses no more than the epoch in flight."""

import contextlib
import csv
import io
import os
import random
import shlex
import signal
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import runs
import train
from model import VAE
from tests.conftest import linux, not_windows, processes, same_weights
from utils import UserError

with contextlib.suppress(ImportError):  # on Windows
    import resource


@pytest.fixture
def options(few_digits: Path, tmp_path: Path, no_pictures: None) -> dict[str, object]:
    """A small run's options. No pictures are drawn."""
    small = {"hidden_size": 16, "latent_size": 3, "batch_size": 100, "device": "cpu", "compile": False}
    return small | {"dataset": few_digits, "out_dir": tmp_path / "my runs"}


def words_of(options: dict[str, object]) -> list[str]:
    """The same options on a command line."""
    others = options.items() - {("compile", False)}
    return ["train.py", "--no-compile", *(f"{train.flag(name)}={value}" for name, value in others)]


def run_command(words: list[str], output: Path, max_file_size: int = 0) -> None:
    """Runs train.py in a process of its own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process ignores it
    sys.argv, sys.stderr = words, output.open("w")
    train.draw = lambda *args: None
    if max_file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_size, max_file_size))
    train.main()


@contextlib.contextmanager
def started(*args: object) -> Iterator[processes.Process]:
    process = processes.Process(target=run_command, args=args)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def wait_for_an_epoch(out_dir: Path) -> None:
    """Waits until a run in out_dir writes its metrics.csv."""

    def tables() -> list[os.stat_result]:
        return [path.stat() for path in out_dir.glob("*/metrics.csv")]

    before, deadline = tables(), time.monotonic() + 60
    while tables() == before and time.monotonic() < deadline:
        time.sleep(0.01)


def epochs_in_csv(run: Path) -> list[int]:
    with open(run / "metrics.csv") as file:
        return [int(row["epoch"]) for row in csv.DictReader(file)]


# ---------------------------------------------------------------------------------------------------------------------
# Killed, interrupted, out of disk space


@not_windows
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_killed_at_random_moments(name: str, options: dict, tmp_path: Path, monkeypatch, capsys):
    """And after Ctrl-C, the command says how to continue."""
    out_dir = options["out_dir"]
    moments = random.Random(0)
    epoch = 0
    output = tmp_path / "output"
    number = getattr(signal, name)
    options |= {"data_dir": "it's here"}
    words = words_of(options | {"epochs": 10**6})
    for kill in range(6 if number == signal.SIGKILL else 3):
        with started(words, output) as process:
            if number != signal.SIGKILL or kill > 2:  # the others are killed as they start
                wait_for_an_epoch(out_dir)
            time.sleep(moments.uniform(0, 0.2))
            os.kill(process.pid, number)
            process.join(60)
            assert process.exitcode == (130 if number == signal.SIGINT else -number)
        if not any(out_dir.glob("*/checkpoint.pt")):
            continue
        run = runs.checkpoint_path(out_dir).parent
        before = epoch
        epoch = runs.load_checkpoint(run)[1]["epoch"]
        assert epoch >= before
        words = ["train.py", "--resume", str(run), "--data-dir", "it's here"]
        if number == signal.SIGINT:
            assert output.read_text() == f"--resume {run} continues this run\ntrain.py: interrupted\n"
    assert epoch >= 3

    monkeypatch.setattr(sys, "argv", [*words, f"--epochs={epoch + 1}"])
    train.main()
    last = capsys.readouterr().out.splitlines()[-1]
    evaluation = ["python", "evaluate.py", str(run), "--data-dir", "it's here"]
    assert shlex.split(last.removeprefix("done: now try ")) == evaluation
    assert epochs_in_csv(run) == list(range(1, epoch + 2))
    assert {path.name for path in run.iterdir()} == {"checkpoint.pt", "metrics.csv"}
    _, _, straight = train.train(**options, epochs=epoch + 1)
    assert same_weights(run, straight)


@not_windows
def test_out_of_disk_space(options: dict, tmp_path: Path):
    _, _, run = train.train(**options, epochs=2)
    before, output = (run / "checkpoint.pt").read_bytes(), tmp_path / "output"
    resume = ["train.py", "--resume", str(run), "--epochs=4"]
    with started(resume, output, len(before) // 2) as process:
        process.join(60)
        assert process.exitcode == 2
    assert output.read_text().startswith(f"train.py: error: {run / 'checkpoint.pt'}: ")
    assert output.read_text().count("\n") == 1
    assert (run / "checkpoint.pt").read_bytes() == before
    assert {path.name for path in run.iterdir()} == {"checkpoint.pt", "metrics.csv"}
    train.resume(run, epochs=4)
    _, _, straight = train.train(**options, epochs=4)
    assert same_weights(run, straight)
    assert epochs_in_csv(run) == [1, 2, 3, 4]


def interrupted_step(*batch: Tensor) -> Tensor:
    raise KeyboardInterrupt


@pytest.mark.parametrize("fault", ["interrupted", "not finite"])
def test_a_run_that_fails_in_its_first_epoch_leaves_nothing(fault: str, options: dict, monkeypatch, capsys):
    _, _, good = train.train(**options, epochs=1)
    if fault == "interrupted":
        monkeypatch.setattr(train, "make_step", lambda *args: interrupted_step)
    else:
        options |= {"lr": 1e30}
    monkeypatch.setattr(sys, "argv", words_of(options | {"epochs": 1}))
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == (130 if fault == "interrupted" else 2)
    error = capsys.readouterr().err
    assert error == "train.py: interrupted\n" if fault == "interrupted" else fault in error
    assert error.count("\n") == 1
    assert list(options["out_dir"].iterdir()) == [good]


def test_runs_that_start_together_get_folders_of_their_own(tmp_path: Path):
    with ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(lambda _: runs.new_run_folder(tmp_path / "runs", "mnist", 20), range(100)))
    assert len(set(folders)) == 100


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files, and files not to be trusted


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path, vae = tmp_path_factory.mktemp("whole") / "checkpoint.pt", VAE(30, 8, 2)
    runs.save_checkpoint(path, {"model": vae.config, "model_state_dict": vae.state_dict(), "epoch": 3})
    return path.read_bytes()


def load(data: bytes, folder: Path) -> dict[str, Tensor] | None:
    """The weights in a file of these bytes, or None if it is refused."""
    (folder / "model.pt").write_bytes(data)
    try:
        return runs.load_checkpoint(folder / "model.pt")[0].state_dict()
    except UserError as error:
        assert str(folder / "model.pt") in str(error)
        return None


def test_truncated_files(whole_file: bytes, tmp_path: Path):
    assert load(whole_file, tmp_path)
    for percent in range(100):
        assert load(whole_file[: len(whole_file) * percent // 100], tmp_path) is None


@settings(max_examples=100, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 10**6 - 1), st.integers(1, 255)), min_size=1, max_size=5))
def test_flipped_bytes_never_load_wrong(flips: list, whole_file: bytes, tmp_path_factory: pytest.TempPathFactory):
    data, folder = bytearray(whole_file), tmp_path_factory.getbasetemp()
    for place, mask in flips:
        data[place * len(data) // 10**6] ^= mask
    if (weights := load(bytes(data), folder)) is not None:
        original = load(whole_file, folder)
        assert all(torch.equal(weights[name], original[name]) for name in original)


def test_compressed_archives(tmp_path: Path):
    """A small file could unpack to more than the memory holds."""
    model = {"input_size": 30, "hidden_size": 100, "latent_size": 2}
    weights = {name: torch.zeros_like(weight) for name, weight in VAE(**model).state_dict().items()}
    stored, deflated = tmp_path / "stored.pt", io.BytesIO()
    runs.save_checkpoint(stored, {"model": model, "model_state_dict": weights})
    with zipfile.ZipFile(stored) as old, zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert load(stored.read_bytes(), tmp_path)
    assert load(deflated.getvalue(), tmp_path) is None


class RunsCode:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("owned",)


def test_no_code_in_a_file_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for is_zip in (True, False):
        torch.save({"model": RunsCode()}, "model.pt", _use_new_zipfile_serialization=is_zip)
        with pytest.raises(UserError, match="damaged"):
            runs.load_checkpoint("model.pt")
    assert not Path("owned").exists()
    torch.save({"class": "os.PathLike", "model": {}, "model_state_dict": {}}, "model.pt")  # not in experiments/
    with pytest.raises(UserError, match=r"os\.PathLike"):
        runs.load_checkpoint("model.pt")


def refuse_without_memory(path: Path, config: dict[str, int], weights: dict[str, Tensor]) -> None:
    """Checks that a checkpoint is refused before memory is taken for a model of its config."""
    runs.save_checkpoint(path, {"model": config, "model_state_dict": weights})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="is not a checkpoint of this VAE") as error:
        runs.load_checkpoint(path)
    assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


@linux
@pytest.mark.parametrize("claim", [("hidden_size", 2**20), ("hidden_size", 2**70), ("encoder_layers", 10**5)], ids=str)
def test_a_model_much_larger_than_its_weights(claim: tuple[str, int], tmp_path: Path):
    vae = VAE(30, 8, 2)
    refuse_without_memory(tmp_path / "model.pt", vae.config | dict([claim]), vae.state_dict())


@linux
@pytest.mark.parametrize("kind", ["repeat one value", "have none"])
def test_large_weights_in_a_small_file(kind: str, tmp_path: Path):
    with torch.device("meta"):
        vae = VAE(30, 20_000, 2)
    weights, zero = vae.state_dict(), torch.zeros(())
    if kind == "repeat one value":
        weights = {name: zero.expand(weight.shape) for name, weight in weights.items()}
    refuse_without_memory(tmp_path / "model.pt", vae.config, weights)


# ---------------------------------------------------------------------------------------------------------------------
# Command lines

words = st.sampled_from(["--epochs", "--lr", "--beta", "--seed", "--device", "--dataset", "--resume", "@x", "-h1"])
values = st.one_of(
    st.text(st.characters(exclude_characters="\0"), max_size=5),  # a command line cannot hold \0
    st.integers().map(str),
    st.sampled_from(["nan", "inf", "1e-3", "-0.5", "1e400", "cpu", "", "@", "--"]),
)


@settings(max_examples=100, deadline=None)
@given(args=st.lists(st.one_of(words, values, st.builds("{}={}".format, words, values)), max_size=4))
def test_any_command_line_is_taken_or_refused(args: list[str]):
    """A refusal is a UserError, of which the commands make one line."""
    with contextlib.suppress(UserError):
        given = train.parse_given(train.make_parser(None), args)
        given.pop("resume", None)
        train.make_options(**given)
