"""The step as one compiled function trains as the step of single operations does, and the rules that choose it."""

import copy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Laplace

import train
import utils
from data import ImageData
from model import VAE
from tests.conftest import SIZE
from tests.test_subclasses import state

OPTIONS = {"batch_size": 200, "lr": 1e-2, "kl_warmup": 1.5, "device": "cpu"}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "draw", lambda *args: None)


class Ordinary(VAE):
    def __init__(self):
        super().__init__(SIZE, 16, 2, encoder_layers=1, activation="tanh")


class Unusual(VAE):
    """Another prior, dropout, and a normalization, the statistics of which only training changes.

    There is no bias before it: of gradients that are 0 but for rounding, Adam makes whole steps.
    """

    def __init__(self):
        super().__init__(SIZE, 16, 2)
        layers = nn.Linear(SIZE, 16, bias=False), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1)
        self.encoder, self.centre = nn.Sequential(*layers), nn.Parameter(torch.ones(2))

    def log_prior(self, z: Tensor) -> Tensor:
        return Laplace(self.centre, 1.0).log_prob(z).sum(-1)


class ReadsValues(Ordinary):
    """Looks at a number in the middle of the loss, which a compiled step can't."""

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        assert outputs.sum().item() < 1e9
        return super().log_likelihood(outputs, targets)


def trained(kind: type[VAE], data: ImageData, out_dir: Path, epochs: int = 2, **options: object) -> Path:
    torch.manual_seed(1)
    _, _, run = train.train(data, kind(), **OPTIONS | options, epochs=epochs, out_dir=str(out_dir))
    return run


def was_compiled(run: Path) -> bool:
    return utils.read_checkpoint(run)["options"]["compile"]


def test_adam_is_that_of_torch():
    """adam_step against torch.optim.Adam, to float rounding over 100 steps, with gradients of many sizes."""
    for dtype, eps in ((torch.float64, 1e-4), (torch.float32, 1e-8)):
        weight = torch.randn(50, 20, dtype=dtype)
        ours, theirs = weight.clone(), weight.clone().requires_grad_()
        adam = torch.optim.Adam([theirs], eps=eps, betas=(0.8, 0.95))
        state = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(ours), "exp_avg_sq": torch.zeros_like(ours)}
        for t in range(1, 101):
            theirs.grad = torch.randn(50, 20, dtype=dtype) * 10.0 ** torch.randint(-6, 3, (50, 20))
            lr = adam.param_groups[0]["lr"] = 1e-3 * (1 + t % 3)
            adam.step()
            corrections = torch.tensor([1 - 0.8**t, 1 - 0.95**t], dtype=dtype)
            train.adam_step(ours, theirs.grad, state, torch.tensor(lr, dtype=dtype), corrections, (0.8, 0.95), eps)
        rounding = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(ours, theirs.detach(), **rounding)
        assert not torch.allclose(ours, weight, atol=0.01)
        for name, value in adam.state[theirs].items():
            torch.testing.assert_close(state[name], value, **rounding)


def assert_same_losses(run: Path, reference: Path) -> None:
    """To rounding, after the same draws. (Other draws differ by 1e-2.)"""
    for row, other in zip(*(utils.read_checkpoint(path)["history"] for path in (run, reference)), strict=True):
        for name in ("train_loss", "test_bce", "test_kl"):
            assert row[name] == pytest.approx(other[name], rel=2e-3, abs=0.01)


@pytest.mark.parametrize("kind", [Ordinary, Unusual])
def test_it_trains_as_single_operations_do(kind: type[VAE], small: ImageData, tmp_path: Path):
    """From the same draws; the last batch is a smaller one, which is not compiled."""
    assert len(small.train_images) % OPTIONS["batch_size"]
    unusual = {"objective": "iwae", "importance_samples": 3, "kl_warmup": 0.0, "clip_grad_norm": 200.0}
    unusual["precision"] = "highest"  # a normalization makes much of bfloat16's rounding
    options = unusual if kind is Unusual else {}
    eager, compiled = (trained(kind, small, tmp_path, **options, compile=compile) for compile in (False, True))
    assert was_compiled(compiled)
    assert not was_compiled(eager)
    assert_same_losses(compiled, eager)
    found, expected = state(compiled), state(eager)
    assert found.keys() == expected.keys()
    for name, value in expected.items():  # Adam makes whole steps of tiny gradients, which are rounding
        assert (found[name] - value).double().norm() < 0.03 * value.double().norm(), name


def test_resumed_is_bit_identical_to_straight(small: ImageData, tmp_path: Path):
    """The resumed run makes the same choice: with its second half not compiled, only roundings would be equal."""
    run = tmp_path / "interrupted"

    def interrupt(model: VAE, history: list[dict]) -> None:
        if len(history) == 2:
            shutil.copytree(tmp_path / "001-mnist-5k-z2", run)

    straight = trained(Ordinary, small, tmp_path, 4, compile=True, on_epoch=interrupt)
    assert utils.read_checkpoint(run)["epoch"] == 2
    train.resume(run, Ordinary(), small)
    assert was_compiled(run)
    resumed, expected = state(run), state(straight)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    adams = [utils.read_checkpoint(path)["optimizer_state_dict"]["state"] for path in (run, straight)]
    steps = 4 * -(-len(small.train_images) // OPTIONS["batch_size"])
    for ours, other in zip(*(adam.values() for adam in adams), strict=True):
        assert other["step"] == steps
        assert all(torch.equal(ours[name], other[name]) for name in other)
    eager = trained(Ordinary, small, tmp_path, 4, compile=False)
    assert not all(torch.equal(value, expected[name]) for name, value in state(eager).items())


def test_what_cannot_be_compiled_is_trained_all_the_same(
    small: ImageData,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
):
    run = trained(ReadsValues, small, tmp_path, compile=True)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("warning"))
    assert "can't be compiled" in line
    assert not was_compiled(run)  # so that a resumed run does not try
    plain = state(trained(Ordinary, small, tmp_path, compile=False))
    assert all(torch.equal(value, plain[name]) for name, value in state(run).items())


def test_any_number_of_runs_in_one_process_is_compiled(small: ImageData, tmp_path: Path, monkeypatch):
    """PyTorch compiles one code object for up to recompile_limit different sizes, by default 8."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    runs = [trained(Ordinary, small, tmp_path, 1, batch_size=size, compile=True) for size in (100, 200)]
    assert all(map(was_compiled, runs))


def test_several_processes_do_not_compile(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(utils, "rank_and_ranks", lambda: (0, 2))
    objective = train.Objective(Ordinary(), options := train.Options(compile=True))
    adam = torch.optim.Adam(objective.parameters())
    assert train.compile_step(objective, adam, torch.zeros(200, SIZE, dtype=torch.uint8), options) is None
    assert "several processes" in capsys.readouterr().err
    assert not adam.state


def test_a_weight_without_gradient_is_refused(small: ImageData, tmp_path: Path):
    class Idle(Ordinary):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(2, 2)

    with pytest.raises(utils.UserError, match=r"no gradient reaches spare\.weight, spare\.bias"):
        trained(Idle, small, tmp_path, compile=True)


def test_long_runs_are_compiled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train.shutil, "which", lambda name: "/usr/bin/c++")
    options = train.Options(device="cpu", epochs=20, batch_size=100)

    def is_compiled(num_images: int, **changes: object) -> bool:
        return train.choose_how(replace(options, **changes), num_images).compile

    assert is_compiled(40_000)
    assert not is_compiled(39_900)
    assert is_compiled(39_901)  # whose last batch has one image
    assert is_compiled(200, compile=True)
    assert not is_compiled(40_000, compile=False)
    monkeypatch.setattr(utils, "rank_and_ranks", lambda: (0, 2))
    assert not is_compiled(40_000)
    monkeypatch.setattr(utils, "rank_and_ranks", lambda: (0, 1))
    monkeypatch.setattr(train.shutil, "which", lambda name: None)
    assert not is_compiled(40_000)


def test_precision_follows_from_the_cpu_and_the_batch(monkeypatch: pytest.MonkeyPatch):
    expected = {
        (): "medium medium",
        ("avx512_bf16",): "highest bfloat16",
        ("amx_bf16", "avx512_bf16"): "medium bfloat16",
    }
    for units, precisions in expected.items():
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda units=units: {"avx2": True} | dict.fromkeys(units, True)
        )
        cpu = torch.device("cpu")
        assert [utils.choose_precision(cpu, size) for size in (127, 128)] == precisions.split()
        assert utils.choose_precision(torch.device("cuda"), 128) == "medium"


def test_a_run_in_bfloat16_goes_on_without_units_for_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    options = train.Options(precision="bfloat16", compile=True, device="cpu")
    monkeypatch.setattr(utils, "bfloat16_units", lambda: {"avx512_bf16"})
    assert train.keep_how(options) == options
    assert not capsys.readouterr().err
    monkeypatch.setattr(utils, "bfloat16_units", set)
    assert train.keep_how(options) == replace(options, precision="medium")
    assert capsys.readouterr().err.count("\n") == 1


def test_bfloat16_rounds_products_and_nothing_else():
    torch.manual_seed(0)
    model, x = VAE(784, 64, 5, activation="tanh"), torch.rand(200, 784).round()
    exact = copy.deepcopy(model)
    losses = {}
    for name, vae in (("highest", exact), ("bfloat16", model)):
        with utils.matmul_precision(name, "cpu"):
            torch.manual_seed(1)
            bce, kl = vae.elbo_terms(x, x)
            assert {value.dtype for value in (bce, kl, *vae.encode(x))} == {torch.float32}
            losses[name] = (bce + kl).sum()
        losses[name].backward()
    assert losses["bfloat16"].item() != losses["highest"].item()
    assert losses["bfloat16"].item() == pytest.approx(losses["highest"].item(), rel=1e-3)
    for weight, other in zip(model.parameters(), exact.parameters(), strict=True):
        assert weight.grad.dtype == torch.float32
        assert nn.functional.cosine_similarity(weight.grad.flatten(), other.grad.flatten(), 0) > 0.999
    with utils.matmul_precision("medium", "cpu"):
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("compile", [False, True])
def test_bfloat16_follows_the_weights_as_they_change(compile: bool, small: ImageData, tmp_path: Path):
    """Losses stay float32's, but for rounding, while they halve: no step uses weights rounded in an earlier one."""
    precisions = ("bfloat16", "highest")
    run, reference = (trained(Ordinary, small, tmp_path, 6, precision=name, compile=compile) for name in precisions)
    assert_same_losses(run, reference)
    *_, last = utils.read_checkpoint(reference)["history"]
    assert last["train_loss"] < 17


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    few = ["--dataset=mnist-5k", "--epochs=1", "--hidden-size=8", f"--out-dir={tmp_path}", "--device=cpu"]
    monkeypatch.setattr(sys, "argv", ["train.py", *few, "--precision=highest", "--no-compile"])
    train.main()
    options = utils.read_checkpoint(tmp_path)["options"]
    assert (options["compile"], options["precision"]) == (False, "highest")
    assert "compil" not in capsys.readouterr().out
