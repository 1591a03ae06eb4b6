"""A run that is killed, interrupted, out of disk or damaged loses the epoch in flight at most."""

import contextlib
import csv
import io
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import train
import utils
from data import ImageData
from model import VAE, kl_divergence
from tests.conftest import processes, thinned
from utils import UserError

OPTIONS = {"hidden_size": 16, "latent_size": 3, "batch_size": 100, "device": "cpu", "dataset": "mnist-5k"}


@pytest.fixture
def small(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "load_dataset", lambda *args: thinned(digits, 10))
    monkeypatch.setattr(train, "draw", lambda *args: None)


def train_or_resume(out_dir: Path, data: ImageData, epochs: int, max_file_size: int = 0) -> None:
    """In a process of its own: goes on with the newest run that has a checkpoint, or starts one.

    What it would print as an error is found in a file.
    """
    sys.stderr = (out_dir / "errors").open("w")
    train.load_dataset = lambda *args: data
    train.draw = lambda *args: None
    if max_file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_size, max_file_size))
    try:
        run = utils.newest_run(out_dir)
    except UserError:
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
        sys.argv = ["train.py", *arguments, "--no-compile", f"--out-dir={out_dir}", f"--epochs={epochs}"]
    else:
        sys.argv = ["train.py", f"--resume={run}", f"--epochs={epochs}"]
    train.main()


def wait_for_an_epoch(out_dir: Path) -> None:
    """Until some metrics.csv in out_dir is another than it was."""

    def tables() -> list[os.stat_result]:
        return [path.stat() for path in out_dir.glob("*/metrics.csv")]

    before, deadline = tables(), time.monotonic() + 60
    while tables() == before and time.monotonic() < deadline:
        time.sleep(0.01)


def lose_signals() -> None:
    """As a library does that takes any exception for an answer of its own."""
    with contextlib.suppress(BaseException):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)


def heed_ctrl_c() -> None:
    """What a shell starts in the background ignores it, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def same_weights(a: Path, b: Path) -> bool:
    a, b = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (a, b))
    parts = ("model_state_dict", "training_weights")
    return all(torch.equal(a[part][name], b[part][name]) for part in parts for name in a[part])


def epochs_in_csv(run: Path) -> list[int]:
    with open(run / "metrics.csv") as file:
        return [int(row["epoch"]) for row in csv.DictReader(file)]


# ---------------------------------------------------------------------------------------------------------------------
# Killed, interrupted, out of disk


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("number", "codes"), [(signal.SIGKILL, {-9}), (signal.SIGTERM, {143, -15})])  # -15: at once
def test_killed_at_random_moments(number: signal.Signals, codes: set[int], tmp_path: Path, digits: ImageData):
    data, moments = thinned(digits, 10), random.Random(0)
    out_dir, epoch, kills = tmp_path / "killed", 0, 0
    out_dir.mkdir()
    while kills < 8:
        process = processes.Process(target=train_or_resume, args=(out_dir, data, 10**6))
        process.start()
        if kills >= 3:  # the first are killed as they start, those after them as they train and save
            wait_for_an_epoch(out_dir)
        time.sleep(moments.uniform(0, 0.6 if kills < 3 else 0.2))
        os.kill(process.pid, number)
        process.join()
        assert process.exitcode in codes
        kills += 1
        if any(out_dir.glob("*/checkpoint.pt")):
            run = utils.newest_run(out_dir)
            reached = utils.load_checkpoint(run)[1]["epoch"]
            assert reached >= epoch
            epoch = reached
        if number == signal.SIGTERM and kills > 3:
            error = (out_dir / "errors").read_text()
            again = rf"--resume {run}|--resume={run} --epochs=1000000"  # of one that was started, or resumed
            assert re.fullmatch(rf"train\.py: terminated: python train\.py ({again}) goes on\n", error)
    assert epoch >= 5
    train.resume(run, epochs=epoch + 2)
    assert epochs_in_csv(run) == list(range(1, epoch + 3))
    assert not list(run.glob(".*.part"))
    _, _, straight = train.train(**OPTIONS, epochs=epoch + 2, out_dir=str(tmp_path))
    assert same_weights(run, straight)


@pytest.mark.usefixtures("small")
def test_a_signal_is_not_lost_in_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """PyTorch's check of a compiled function's arguments takes any exception for a no. Two signals count as one."""
    rates = []

    def step(batch: Tensor, rate: Tensor) -> Tensor:
        rates.append(rate)
        lose_signals()
        return torch.zeros(())

    monkeypatch.setattr(train, "prepare_step", lambda *args: (step, False))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        utils.command(train.train)(**OPTIONS, epochs=1, out_dir=str(tmp_path))
    assert caught.value.code == 143
    assert len(rates) == 1
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("place", ["compute_test_losses", "save", "epoch_line", "prepare_step"])
def test_a_signal_is_not_lost_between_epochs(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    function = getattr(train, place)
    monkeypatch.setattr(train, place, lambda *args: (lose_signals(), function(*args))[1])
    with pytest.raises(SystemExit) as caught:
        utils.command(train.train)(**OPTIONS, epochs=9, out_dir=str(tmp_path))
    assert caught.value.code == 143
    assert capsys.readouterr().out.count("epoch ") <= 1


@pytest.mark.usefixtures("small")
def test_disk_full(tmp_path: Path, digits: ImageData):
    data = thinned(digits, 10)
    _, _, straight = train.train(**OPTIONS, epochs=4, out_dir=str(tmp_path))
    _, _, run = train.train(**OPTIONS, epochs=2, out_dir=str(tmp_path / "full"))
    before = (run / "checkpoint.pt").read_bytes()
    process = processes.Process(target=train_or_resume, args=(run.parent, data, 4, len(before) // 2))
    process.start()
    process.join()
    assert process.exitcode == 2
    error = (run.parent / "errors").read_text()
    assert str(run) in error
    assert error.count("\n") == 1
    assert (run / "checkpoint.pt").read_bytes() == before
    train.resume(run, epochs=4)
    assert same_weights(run, straight)
    assert epochs_in_csv(run) == [1, 2, 3, 4]


def test_ctrl_c_says_how_to_go_on(few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = OPTIONS | {"dataset": few_digits, "out_dir": tmp_path}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    args = [sys.executable, "-u", train.__file__, *arguments, "--no-compile", "--epochs=10000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(args, **pipes, preexec_fn=heed_ctrl_c) as process:
        try:
            for line in process.stdout:
                if line.startswith("epoch     2"):
                    process.send_signal(signal.SIGINT)
                    break
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
    run = tmp_path / "001-few-z3"
    assert process.returncode == 130
    assert f"--resume {run} goes on" in error
    assert error.count("\n") == 1
    epoch = utils.load_checkpoint(run)[1]["epoch"]
    assert epoch >= 2
    monkeypatch.setattr(train, "draw", lambda *args: None)
    train.resume(run, epochs=epoch + 1)
    _, _, straight = train.train(**options, epochs=epoch + 1)
    assert same_weights(run, straight)
    assert epochs_in_csv(run) == list(range(1, epoch + 2))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError("not finite")])
@pytest.mark.parametrize("place", ["choose_device", "_sync_folder", "train_epoch"])
def test_a_run_stopped_before_its_first_epoch_is_whole(error, place, tmp_path, fails, monkeypatch):
    """Where it was interrupted and has a checkpoint, it can be resumed, and else leaves nothing to be evaluated."""

    def stop(*args: object) -> None:
        raise error

    module = train if hasattr(train, place) else utils
    with monkeypatch.context() as patch:
        make = utils.new_run_folder  # after which it goes wrong
        patch.setattr(utils, "new_run_folder", lambda *args: (make(*args), patch.setattr(module, place, stop))[0])
        with pytest.raises(error if isinstance(error, type) else type(error)):
            train.train(**OPTIONS, epochs=1, out_dir=tmp_path)
    is_kept = error is KeyboardInterrupt and place != "choose_device"
    assert [path.name for path in tmp_path.glob("*/*")] == ["checkpoint.pt"] * is_kept
    assert len(list(tmp_path.iterdir())) == is_kept
    if is_kept:
        assert "not trained yet" in fails(train.evaluate.main, tmp_path)
        train.resume(tmp_path)
        assert utils.load_checkpoint(tmp_path)[1]["epoch"] == 1


def test_what_is_printed_can_be_pasted(digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """From a run that is interrupted, over its resumption, interrupted too, to its evaluation."""
    places, train_epoch = [], train.train_epoch

    def load(name: str, data_dir: str, *args: object) -> ImageData:
        places.append(data_dir)
        return thinned(digits, 10)

    def interrupted(*args: object) -> torch.Tensor:
        if args[4] in stops:
            raise KeyboardInterrupt
        return train_epoch(*args)

    def goes_on(command: list[str]) -> list[str]:
        monkeypatch.setattr(sys, "argv", command[1:])
        with pytest.raises(SystemExit) as stop:
            train.main()
        assert stop.value.code == 130
        error = capsys.readouterr().err
        return shlex.split(error.removeprefix("train.py: interrupted: ").removesuffix(" goes on\n"))

    for name, value in (("load_dataset", load), ("train_epoch", interrupted), ("draw", lambda *args: None)):
        monkeypatch.setattr(train, name, value)
    arguments = [f"{train.flag(name)}={value}" for name, value in OPTIONS.items()]
    arguments += ["--epochs=2", "--data-dir", "it's here", "--out-dir", str(tmp_path / "my  runs")]
    stops = {2}
    command = goes_on(["python", "train.py", *arguments])
    assert command[:3] == ["python", "train.py", "--resume"]
    command = goes_on([*command, "--epochs=4"])
    assert utils.load_checkpoint(command[3])[1]["epoch"] == 1
    stops = {}
    monkeypatch.setattr(sys, "argv", command[1:])
    train.main()
    assert utils.load_checkpoint(command[3])[1]["epoch"] == 4
    assert places == ["it's here"] * 3
    last = capsys.readouterr().out.splitlines()[-1]
    command = shlex.split(last.removeprefix("done: now try "))
    assert command == [
        "python",
        "evaluate.py",
        str(tmp_path / "my  runs" / "001-mnist-5k-z3"),
        "--data-dir",
        "it's here",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# What is not finite


@pytest.mark.usefixtures("small")
def test_overflow_is_stopped_before_it_is_saved(tmp_path: Path):
    _, _, run = train.train(**OPTIONS, epochs=1, out_dir=str(tmp_path))
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    checkpoint["training_weights"]["latent_z.logvar.bias"].fill_(1e4)
    utils.save_checkpoint(run / "checkpoint.pt", checkpoint)
    before = (run / "checkpoint.pt").read_bytes()
    with pytest.raises(UserError, match=r"not finite in epoch 2, step 1;.*holds epoch 1"):
        train.resume(run, epochs=2)
    assert (run / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("pixel", [0.0, 1.0])
@pytest.mark.parametrize("bias", [-1e4, 0.0, 1e4])
def test_extreme_images_and_logits(batch_size: int, pixel: float, bias: float):
    """The BCE of logits far off is their size, where they are wrong, and 0 where they are right."""
    model = VAE(20, 8, 2)
    torch.nn.init.zeros_(model.decoder.fc2.weight)
    torch.nn.init.constant_(model.decoder.fc2.bias, bias)
    x = torch.full((batch_size, 20), pixel)
    z, logvar, mu = model.encode(x)
    bce = -model.log_likelihood(model.outputs(z), x).sum()
    (bce + kl_divergence(logvar, mu).sum()).backward()
    assert torch.isfinite(kl_divergence(logvar, mu)).all()
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters())
    wrong = abs(bias) if (bias > 0) != (pixel > 0) else 0.0
    assert bce.item() == pytest.approx(batch_size * 20 * (wrong if bias else 0.6931472), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files, and input not to be trusted


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "checkpoint.pt"
    vae = VAE(30, 8, 2)
    utils.save_checkpoint(path, {"model": vae.config, "model_state_dict": vae.state_dict(), "epoch": 3})
    return path.read_bytes()


def load(data: bytes, folder: Path) -> dict | None:
    """The weights in a file of these bytes, or None where they are refused."""
    (folder / "model.pt").write_bytes(data)
    try:
        return utils.load_checkpoint(folder / "model.pt")[0].state_dict()
    except UserError as error:
        assert str(folder / "model.pt") in str(error)
        return None


def test_truncated_files(whole_file: bytes, tmp_path: Path):
    assert load(whole_file, tmp_path)
    for percent in range(100):
        assert load(whole_file[: len(whole_file) * percent // 100], tmp_path) is None


@settings(max_examples=300, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 10**6 - 1), st.integers(1, 255)), min_size=1, max_size=5))
def test_flipped_bytes_never_load_wrong(flips: list, whole_file: bytes, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.getbasetemp()
    data = bytearray(whole_file)
    for place, mask in flips:
        data[place * len(data) // 10**6] ^= mask
    if (weights := load(bytes(data), folder)) is not None:
        original = load(whole_file, folder)
        assert all(torch.equal(weights[name], original[name]) for name in original)


@pytest.mark.usefixtures("small")
def test_what_a_killed_process_left_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, _, run = train.train(**OPTIONS, epochs=1, out_dir=str(tmp_path))
    dead, alive = subprocess.Popen(["true"]), os.getppid()
    dead.wait()
    others = {f".curves.png.{alive}.part", ".mine.part"}

    def leave() -> None:
        for name in ("checkpoint.pt", "metrics.csv"):  # of a process of this number, which was killed
            (run / f".{name}.{os.getpid()}.part").write_text("left")
        for name in (f".curves.png.{dead.pid}.part", f".metrics.json.{10**30}.part", *others):
            (run / name).write_text("left")

    leave()
    train.resume(run, epochs=2)
    assert utils.load_checkpoint(run)[1]["epoch"] == 2
    assert {path.name for path in run.glob(".*")} == others
    leave()
    monkeypatch.setattr(train.evaluate, "load_dataset", train.load_dataset)
    monkeypatch.setattr(train.evaluate, "draw_all", lambda *args: ())
    train.evaluate.evaluate_run(run, nll_samples=1)
    assert {path.name for path in run.glob(".*")} == others


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c["optimizer_state_dict"]["state"][0].update(exp_avg=torch.zeros(3)),
        lambda c: c["optimizer_state_dict"]["state"][1].update(exp_avg_sq=3),
        lambda c: c["optimizer_state_dict"]["state"].pop(2),
        lambda c: c["optimizer_state_dict"].update(param_groups=[]),
        lambda c: c["optimizer_state_dict"].update(state=torch.zeros(0)),
        lambda c: c["training_weights"].update({"encoder.fc1.weight": torch.zeros(16, 784, dtype=torch.int64)}),
        lambda c: c["history"][0].update(test_kl="12"),
        lambda c: c["history"][0].update(epoch=2),
        lambda c: c["history"][0].update(other=1.0),
        lambda c: c["history"].insert(0, torch.zeros(3)),
        lambda c: c["history"][0].pop("seconds"),
        lambda c: c.update(epoch=2),
        lambda c: c["options"].pop("dataset"),
        lambda c: c["training_weights"].update({"encoder.fc1.weight": torch.zeros(1, 1).expand(16, 784)}),
    ],
)
def test_a_training_state_that_does_not_fit_is_refused(damage: Callable[[dict], object], tmp_path: Path):
    _, _, run = train.train(**OPTIONS, epochs=1, out_dir=str(tmp_path))
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    damage(checkpoint)
    utils.save_checkpoint(run / "checkpoint.pt", checkpoint)
    with pytest.raises(UserError, match="cannot be resumed"):
        train.resume(run, epochs=3)


@pytest.mark.usefixtures("small")
def test_adam_is_that_of_the_options(tmp_path: Path):
    """Whatever a file says of it: its state alone is the file's."""
    _, _, straight = train.train(**OPTIONS, epochs=2, out_dir=tmp_path)
    _, _, run = train.train(**OPTIONS, epochs=1, out_dir=tmp_path)
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    (group,) = checkpoint["optimizer_state_dict"]["param_groups"]
    group |= {"betas": ("x", 2), "maximize": True, "amsgrad": True, "weight_decay": 1e9, "eps": None}
    utils.save_checkpoint(run / "checkpoint.pt", checkpoint)
    train.resume(run, epochs=2)
    assert same_weights(run, straight)


def model_of(**config: object) -> dict:
    """A checkpoint that says so, and has weights of that shape, which are one number in memory."""
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in VAE(**config).state_dict().items()}
    zero = torch.zeros(())
    return {"model": config, "model_state_dict": {name: zero.expand(shape) for name, shape in shapes.items()}}


def content(name: str) -> object:
    nested = []
    for _ in range(6):
        nested = [nested] * 9
    whole = VAE(30, 8, 2).state_dict()
    flat = torch.zeros(64)
    return {
        "repeated": lambda: model_of(input_size=30, hidden_size=20_000),
        "shared": lambda: {
            "model": {"input_size": 8, "hidden_size": 8, "latent_size": 8, "encoder_layers": 40},
            "model_state_dict": {
                name: flat[: weight.numel()].view_as(weight) for name, weight in VAE(8, 8, 8, 40).state_dict().items()
            },
        },
        "layers": lambda: {"model": {"input_size": 30, "encoder_layers": 2 * 10**9}, "model_state_dict": whole},
        "nested": lambda: {"model": {"input_size": nested}, "model_state_dict": whole},
    }[name]()


@pytest.mark.parametrize("name", ["repeated", "shared", "layers", "nested"])
def test_small_files_that_claim_much(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Refused before a model of that size is built."""
    utils.save_checkpoint(tmp_path / "checkpoint.pt", content(name))
    assert (tmp_path / "checkpoint.pt").stat().st_size < 30_000
    built = []

    class Counted(VAE):
        def __init__(self, **config: object):
            assert torch.get_default_device().type == "meta", "built in memory"
            built.append(max(config.get("encoder_layers", 2), config.get("decoder_layers", 1)))
            assert built[-1] < 100, "built with too many layers"
            super().__init__(**config)

    monkeypatch.setattr(utils, "VAE", Counted)
    with pytest.raises(UserError, match="is not a checkpoint of this VAE") as error:
        utils.load_checkpoint(tmp_path)
    assert len(str(error.value)) < 1000


def test_archives_that_unpack_to_more_than_their_size(whole_file: bytes, tmp_path: Path):
    """Compressed, or with something in them that is neither a tensor nor a plain value."""

    def repack(compression: int, extra: bytes = b"", with_overlap: bool = False) -> bytes:
        packed = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(whole_file)) as old, zipfile.ZipFile(packed, "w", compression) as new:
            for name in old.namelist():
                data = old.read(name)
                new.writestr(name, data[:-1] + extra + b"." if name.endswith("data.pkl") else data)
            if with_overlap:  # a member within a member
                inside = io.BytesIO()
                with zipfile.ZipFile(inside, "w") as inner:
                    inner.writestr("archive/inner", bytes(10_000))
                new.writestr("archive/outer", inside.getvalue())
                (member,) = inner.filelist
                member.header_offset = new.getinfo("archive/outer").header_offset + 30 + len("archive/outer")
                new.filelist.append(member)
        return packed.getvalue()

    ten_million_bytes = b"X\1\0\0\0x" + b"cbuiltins\nbytearray\nJ\x80\x96\x98\x00\x85R" + b"s"
    assert load(repack(zipfile.ZIP_STORED), tmp_path)
    assert load(repack(zipfile.ZIP_DEFLATED), tmp_path) is None
    assert load(repack(zipfile.ZIP_STORED, ten_million_bytes), tmp_path) is None
    assert load(repack(zipfile.ZIP_STORED, with_overlap=True), tmp_path) is None


@pytest.mark.usefixtures("small")
def test_a_name_in_a_checkpoint_is_never_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read = []
    monkeypatch.setattr(
        train,
        "load_dataset",
        lambda name, data_dir, *args, load=train.load_dataset: read.append(data_dir) or load(name, data_dir, *args),
    )
    _, _, run = train.train(**OPTIONS, epochs=1, data_dir="mine", out_dir=str(tmp_path))
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    checkpoint["options"] |= {"data_dir": str(tmp_path / "theirs"), "out_dir": str(tmp_path / "theirs")}
    utils.save_checkpoint(run / "checkpoint.pt", checkpoint)
    train.resume(run, epochs=2)
    assert read == ["mine", "data"]
    assert not (tmp_path / "theirs").exists()


@pytest.mark.usefixtures("small")
def test_links_are_replaced_not_followed(tmp_path: Path):
    _, _, run = train.train(**OPTIONS, epochs=1, out_dir=str(tmp_path))
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (run / "metrics.csv").unlink()
    (run / "metrics.csv").symlink_to(outside)
    train.resume(run, epochs=2)
    assert outside.read_text() == "mine"
    assert epochs_in_csv(run) == [1, 2]
    (tmp_path / "002").symlink_to(outside)
    assert train.train(**OPTIONS, epochs=1, out_dir=str(tmp_path))[2].name == "003-mnist-5k-z3"


def test_runs_started_together_get_numbers_of_their_own(tmp_path: Path):
    with ThreadPoolExecutor(16) as pool:
        runs = list(pool.map(lambda i: utils.new_run_folder(tmp_path / "runs", "mnist", i), range(100)))
    assert sorted(int(run.name[:3]) for run in runs) == list(range(1, 101))


def test_argument_files(tmp_path: Path, fails: Callable):
    """Quotes and comments are a shell's; what is no such file is refused in one line."""
    path = tmp_path / "arguments"
    path.write_text("--dataset 'my digits'  # with a space\n--epochs=3\n")
    assert vars(train.parse_args([f"@{path}"])) == {"dataset": "my digits", "epochs": 3}
    for content, says in (
        (b"--dataset=my digit's", "digit's"),
        (b"\xff\xfe\x00", "not text"),
        (f"--epochs=1 @{path}".encode(), "names itself"),
        (b"--dataset=mnist-5k --out-dir=a\0b", "--out-dir"),
    ):
        path.write_bytes(content)
        assert says in fails(train.main, f"@{path}")
    assert "missing" in fails(train.main, f"@{tmp_path / 'missing'}")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("closed", [("stdout",), ("stderr",), ("stdout", "stderr")])
def test_closed_streams(closed: tuple[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in closed:  # what Python makes of >&- and 2>&-
        monkeypatch.setattr(sys, name, None)
    arguments = [f"{train.flag(name)}={value}" for name, value in OPTIONS.items()]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "--epochs=1", f"--out-dir={tmp_path}"])
    train.main()
    assert utils.load_checkpoint(tmp_path)[1]["epoch"] == 1
    monkeypatch.setattr(sys, "argv", ["train.py", "--epochs=0"])
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 2


def write_without_streams(path: Path) -> None:
    @utils.command
    def main() -> None:
        with open(path, "w") as file:
            file.write(str(file.fileno()))

    os.closerange(0, 3)
    main()


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path):
    """Else what a library writes to stdout would land in it."""
    process = processes.Process(target=write_without_streams, args=(tmp_path / "file",))
    process.start()
    process.join()
    assert int((tmp_path / "file").read_text()) > 2


@pytest.mark.usefixtures("small")
def test_what_a_terminal_cannot_show_or_must_not_obey(tmp_path, monkeypatch, fails):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    arguments = [f"{train.flag(name)}={value}" for name, value in OPTIONS.items()]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "--epochs=1", f"--out-dir={tmp_path / 'é'}"])
    train.main()
    shown.flush()
    assert b"\\xe9" in shown.buffer.getvalue()
    monkeypatch.undo()
    run = next((tmp_path / "é").iterdir())
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    checkpoint["options"]["dataset"] = "\033[31mred"
    utils.save_checkpoint(run / "checkpoint.pt", checkpoint)
    assert r"\x1b[31mred" in fails(train.main, "--resume", run)
    assert r"\x1b[31mred" in fails(train.evaluate.main, run)


words = st.sampled_from(
    sorted({"--epochs", "--lr", "--beta", "--seed", "--device", "--dataset", "--resume", "@x", "-h1"})
)
values = st.one_of(
    st.text(st.characters(exclude_characters="\0"), max_size=5),  # which no command line can hold
    st.integers().map(str),
    st.sampled_from(["nan", "inf", "1e-3", "-0.5", "1e400"]),
    st.sampled_from(["cpu", "", "@", "--"]),
)


@settings(max_examples=300, deadline=None)
@given(args=st.lists(st.one_of(words, values, st.builds("{}={}".format, words, values)), max_size=4))
def test_any_command_line_is_taken_or_refused(args: list[str]):
    """Parsed and found good, or refused by a UserError: main makes one line of it."""
    try:
        options = vars(train.parse_args(args))
    except (UserError, OSError):
        return
    if "resume" not in options:
        try:
            train.Options(**options)
        except UserError as error:
            assert "\n" not in utils.one_line(error)
