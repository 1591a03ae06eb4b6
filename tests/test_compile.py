"""The compiled step trains as the eager step does, and the rules that choose how a step is computed."""

import copy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

import step
import train
import utils
from data import ImageData
from model import VAE
from tests.conftest import SIZE
from tests.test_subclasses import state

compilers = map(shutil.which, ("c++", "g++", "clang++"))
needs_compiler = pytest.mark.skipif(not any(compilers), reason="no C++ compiler on this machine")
OPTIONS = {"batch_size": 200, "lr": 1e-2, "device": "cpu"}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "draw", lambda *args: None)


class Ordinary(VAE):
    def __init__(self):
        super().__init__(SIZE, 16, 2, encoder_layers=1, activation="tanh")


class Unusual(Ordinary):
    """Dropout, a normalization with statistics that only training changes, and a frozen weight.

    There is no bias before the normalization: of gradients that are 0 but for rounding, Adam makes whole steps.
    """

    def __init__(self):
        super().__init__()
        layers = nn.Linear(SIZE, 16, bias=False), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1)
        self.encoder = nn.Sequential(*layers)
        self.decoder.fc1.weight.requires_grad_(False)


class ReadsValues(Ordinary):
    """Looks at a number in the middle of the loss, which a compiled step cannot."""

    def likelihood(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        assert z.sum().item() < 1e9
        return super().likelihood(z, y)


class Counts(Ordinary):
    """Has a temperature that falls with the calls of the loss, kept in a Python number."""

    calls = 0

    def elbo_terms(self, *args: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        reconstruction, kl = super().elbo_terms(*args)
        return reconstruction, kl * max(0.5, 1 - 0.01 * self.calls)


class CountsInBuffer(Ordinary):
    """Has the same, kept in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def elbo_terms(self, *args: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        reconstruction, kl = super().elbo_terms(*args)
        return reconstruction, kl * (1 - 0.01 * self.calls).clamp(min=0.5)


def trained(kind: type[VAE], data: ImageData, out_dir: Path, epochs: int = 2, **options: object) -> Path:
    torch.manual_seed(1)
    _, _, run = train.train(data, kind(), **OPTIONS | options, epochs=epochs, out_dir=out_dir)
    return run


def was_compiled(run: Path) -> bool:
    return utils.read_checkpoint(run)["options"]["compile"]


def test_adam_is_that_of_torch():
    """To float rounding over 100 steps, with gradients of many sizes."""
    for dtype, eps in ((torch.float64, 1e-4), (torch.float32, 1e-8)):
        weight = torch.randn(50, 20, dtype=dtype)
        ours, theirs = weight.clone(), weight.clone().requires_grad_()
        adam = torch.optim.Adam([theirs], eps=eps, betas=(0.8, 0.95))
        moments = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(ours), "exp_avg_sq": torch.zeros_like(ours)}
        for t in range(1, 101):
            theirs.grad = torch.randn(50, 20, dtype=dtype) * 10.0 ** torch.randint(-6, 3, (50, 20))
            lr = adam.param_groups[0]["lr"] = 1e-3 * (1 + t % 3)
            adam.step()
            corrections = torch.tensor([1 - 0.8**t, 1 - 0.95**t], dtype=dtype)
            step.adam_step(ours, theirs.grad, moments, torch.tensor(lr, dtype=dtype), corrections, (0.8, 0.95), eps)
        rounding = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(ours, theirs.detach(), **rounding)
        assert not torch.allclose(ours, weight, atol=0.01)
        for name, value in adam.state[theirs].items():
            torch.testing.assert_close(moments[name], value, **rounding)


def assert_same_losses(run: Path, reference: Path) -> None:
    """To rounding, after the same draws. (Other draws differ by 1e-2.)"""
    for row, other in zip(*(utils.read_checkpoint(path)["history"] for path in (run, reference)), strict=True):
        for name in ("train_loss", "test_reconstruction", "test_kl"):
            assert row[name] == pytest.approx(other[name], rel=2e-3, abs=0.01)


@pytest.mark.parametrize("kind", [pytest.param(Ordinary, marks=needs_compiler), Unusual])
def test_it_trains_as_single_operations_do(kind: type[VAE], small: ImageData, tmp_path: Path, request):
    """From the same draws; the last batch is a smaller one, which is not compiled."""
    if kind is Unusual:
        request.getfixturevalue("quick_compiler")
    data = replace(small, train_images=small.train_images[:930], train_labels=small.train_labels[:930])
    unusual = {"objective": "iwae", "importance_samples": 3, "clip_grad_norm": 200.0}
    unusual["precision"] = "highest"  # a normalization amplifies bfloat16's rounding
    options = unusual if kind is Unusual else {"kl_warmup": 1.5}
    eager, compiled = (trained(kind, data, tmp_path, **options, compile=compile) for compile in (False, True))
    assert was_compiled(compiled)
    assert not was_compiled(eager)
    assert_same_losses(compiled, eager)
    found, expected = state(compiled), state(eager)
    assert found.keys() == expected.keys()
    for name, value in expected.items():  # Adam makes whole steps of tiny gradients, which are rounding
        assert (found[name] - value).double().norm() <= 0.03 * value.double().norm(), name


@pytest.mark.parametrize("kind", [pytest.param(Ordinary, marks=needs_compiler), CountsInBuffer])
def test_resumed_is_bit_identical_to_straight(kind: type[VAE], small: ImageData, tmp_path: Path, request):
    """The resumed run is compiled too: otherwise it would be equal to rounding only."""
    if kind is CountsInBuffer:
        request.getfixturevalue("quick_compiler")
    run = tmp_path / "interrupted"

    def interrupt(model: VAE, history: list[dict]) -> None:
        if len(history) == 2:
            shutil.copytree(tmp_path / "001-mnist-5k-z2", run)

    straight = trained(kind, small, tmp_path, 4, compile=True, on_epoch=interrupt)
    assert utils.read_checkpoint(run)["epoch"] == 2
    train.resume(run, kind(), small)
    assert was_compiled(run)
    resumed, expected = state(run), state(straight)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    adams = [utils.read_checkpoint(path)["optimizer_state_dict"]["state"] for path in (run, straight)]
    steps = 4 * -(-len(small.train_images) // OPTIONS["batch_size"])
    for ours, other in zip(*(adam.values() for adam in adams), strict=True):
        assert other["step"] == steps
        assert all(torch.equal(ours[name], other[name]) for name in other)
    if kind is CountsInBuffer:
        assert expected["training_weights.calls"] == steps
    else:
        eager = trained(kind, small, tmp_path, 4, compile=False)
        assert not all(torch.equal(value, expected[name]) for name, value in state(eager).items())


def warnings_in(capsys: pytest.CaptureFixture) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]


def test_a_step_that_cannot_be_compiled_is_taken_all_the_same(small: ImageData, tmp_path: Path, capsys):
    run = trained(ReadsValues, small, tmp_path, compile=True)
    (line,) = warnings_in(capsys)
    assert "cannot be compiled" in line
    assert not was_compiled(run)  # so that a resumed run does not try
    plain = state(trained(Ordinary, small, tmp_path, compile=False))
    assert all(torch.equal(value, plain[name]) for name, value in state(run).items())


def test_a_step_that_no_longer_fits_is_taken_all_the_same(small: ImageData, tmp_path: Path, capsys, quick_compiler):
    """A Python number that changes would be compiled again for each value, until PyTorch gives up."""
    run = trained(Counts, small, tmp_path, epochs=4, compile=True)
    assert len(warnings_in(capsys)) == 1
    assert not was_compiled(run)
    first, *_, last = (row["test_loss"] for row in utils.read_checkpoint(run)["history"])
    assert last < 0.7 * first


def test_a_step_that_no_longer_fits_is_not_compiled_again(small: ImageData, tmp_path: Path, monkeypatch):
    programs, compile = [], torch.compile

    def backend(graph: torch.fx.GraphModule, inputs: list) -> object:
        programs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda f, **_: compile(f, fullgraph=True, dynamic=False, backend=backend))
    trained(Counts, small, tmp_path, epochs=4, compile=True)
    assert len(programs) == 2  # ahead of time, which this backend cannot do, and at the first call


def test_it_takes_adams_epsilon_from_the_options(small: ImageData, tmp_path: Path, quick_compiler: None):
    eager, compiled, other = (
        trained(Ordinary, small, tmp_path, 2, compile=compile, adam_eps=eps)
        for compile, eps in ((False, 100.0), (True, 100.0), (True, 1e-8))
    )
    assert_same_losses(compiled, eager)
    with pytest.raises(AssertionError):
        assert_same_losses(other, eager)


def test_a_step_that_fails_at_any_time(small: ImageData, tmp_path: Path, monkeypatch, capsys, quick_compiler):
    """Whatever it raises, in the second epoch too."""
    calls, run_program = [], step.CompiledStep._try

    def fail(self: step.CompiledStep, *args: object) -> Tensor | None:
        calls.append(args)
        if len(calls) == 9:  # the trial, five steps, and three
            self.program.compiled = lambda *_: 1 / 0
        return run_program(self, *args)

    monkeypatch.setattr(step.CompiledStep, "_try", fail)
    run = trained(Ordinary, small, tmp_path, epochs=3, compile=True)
    (line,) = warnings_in(capsys)
    assert "ZeroDivisionError" in line
    assert len(calls) == 9
    assert not was_compiled(run)
    losses, expected = (
        [row["test_loss"] for row in utils.read_checkpoint(path)["history"]]
        for path in (run, trained(Ordinary, small, tmp_path, epochs=3, compile=False))
    )
    assert losses == pytest.approx(expected, rel=0.02)  # the step that failed has drawn its pixels again


def test_any_number_of_runs_in_one_process_is_compiled(small: ImageData, tmp_path: Path, quick_compiler: None):
    """PyTorch compiles one code object for up to recompile_limit different sizes, by default 8."""
    with torch._dynamo.config.patch(recompile_limit=1):
        runs = [trained(Ordinary, small, tmp_path, 1, batch_size=size, compile=True) for size in (100, 200)]
    assert all(map(was_compiled, runs))


def test_long_runs_are_compiled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(step.shutil, "which", lambda name: "/usr/bin/c++")
    cpu = torch.device("cpu")
    assert step.is_worth_compiling(cpu, 1, 5000)
    assert not step.is_worth_compiling(cpu, 1, 4999)
    assert not step.is_worth_compiling(cpu, 2, 5000)
    assert not step.is_worth_compiling(torch.device("cuda"), 1, 5000)
    monkeypatch.setattr(step.shutil, "which", lambda name: None)
    assert not step.is_worth_compiling(cpu, 1, 5000)


def test_the_rule_counts_the_steps(small: ImageData, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train, "is_worth_compiling", lambda device, ranks, steps: steps == 20 * 11)
    for given, expected in (({}, True), ({"epochs": 19}, False), ({"compile": False}, False)):
        options = train.make_options(**{"epochs": 20, "batch_size": 99} | given)  # 1,000 images: the last batch has 10
        train.complete(options, small, Ordinary())
        assert options.compile == expected


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
        assert [step.choose_precision(cpu, size) for size in (127, 128)] == precisions.split()
        assert step.choose_precision(torch.device("cuda"), 128) == "medium"


def test_bfloat16_rounds_products_and_nothing_else():
    torch.manual_seed(0)
    model, x = VAE(784, 64, 5, activation="tanh"), torch.rand(200, 784).round()
    exact = copy.deepcopy(model)
    losses = {}
    for name, vae in (("highest", exact), ("bfloat16", model)):
        with step.matmul_precision(name, "cpu"):
            torch.manual_seed(1)
            reconstruction, kl = vae.elbo_terms(x, x)
            assert {value.dtype for value in (reconstruction, kl, *vae.encode(x))} == {torch.float32}
            losses[name] = (reconstruction + kl).sum()
        losses[name].backward()
    assert losses["bfloat16"].item() != losses["highest"].item()
    assert losses["bfloat16"].item() == pytest.approx(losses["highest"].item(), rel=1e-3)
    for weight, other in zip(model.parameters(), exact.parameters(), strict=True):
        assert weight.grad.dtype == torch.float32
        assert nn.functional.cosine_similarity(weight.grad.flatten(), other.grad.flatten(), 0) > 0.999
    with step.matmul_precision("medium", "cpu"):
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("compile", [False, True])
def test_bfloat16_follows_the_weights_as_they_change(compile: bool, small: ImageData, tmp_path: Path, quick_compiler):
    """Losses stay float32's, but for rounding, while they halve: no step uses weights rounded in an earlier one."""
    precisions = ("bfloat16", "highest")
    run, reference = (trained(Ordinary, small, tmp_path, 6, precision=name, compile=compile) for name in precisions)
    assert_same_losses(run, reference)
    *_, last = utils.read_checkpoint(reference)["history"]
    assert last["train_loss"] < 17


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """A resumed run may be told to be computed in another way."""
    few = ["--dataset=mnist-5k", "--epochs=1", "--hidden-size=8", f"--out-dir={tmp_path}", "--device=cpu"]
    monkeypatch.setattr(sys, "argv", ["train.py", *few, "--precision=highest", "--no-compile"])
    train.main()
    options = utils.read_checkpoint(tmp_path)["options"]
    assert (options["compile"], options["precision"]) == (False, "highest")
    assert "compil" not in capsys.readouterr().out
    resume = ["--resume", str(tmp_path / "001-mnist-5k-z20"), "--epochs=2", "--precision=medium"]
    monkeypatch.setattr(sys, "argv", ["train.py", *resume])
    train.main()
    assert utils.read_checkpoint(tmp_path)["options"]["precision"] == "medium"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_graph_trains_as_the_steps_it_records(small: ImageData, tmp_path: Path, monkeypatch):
    options = {"device": "cuda", "epochs": 5, "kl_warmup": 3}
    graphed, eager = trained(Ordinary, small, tmp_path, **options), None
    monkeypatch.setattr(train, "CudaGraph", lambda function: function)
    eager = trained(Ordinary, small, tmp_path, **options)
    for row, other in zip(*(utils.read_checkpoint(run)["history"] for run in (graphed, eager)), strict=True):
        for name in ("train_loss", "test_loss", "test_kl"):
            assert row[name] == pytest.approx(other[name], rel=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graph_calls_its_function():
    total = torch.zeros(3, device="cuda")

    def function(x: Tensor, scale: Tensor) -> Tensor:
        total.add_(x.sum())
        return x * scale + torch.rand(len(x), device="cuda")

    call = step.CudaGraph(function)
    results = []
    for i in range(8):
        x = torch.full((5 if i % 3 else 4,), float(i), device="cuda")
        results.append(call(x, torch.tensor(10.0, device="cuda")).tolist())
    assert total.tolist() == [sum(i * (5 if i % 3 else 4) for i in range(8))] * 3
    for i, result in enumerate(results):
        assert len(result) == (5 if i % 3 else 4)
        assert all(10 * i <= value < 10 * i + 1 for value in result)
    draws = [value % 1 for result in results for value in result]
    assert len(set(draws)) == len(draws)
