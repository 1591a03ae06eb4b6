"""A compiled or recorded step trains as the step as written does, and the rules that choose how a step is computed."""

import contextlib
import copy
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

import runs
import step
import train
from data import ImageData
from model import VAE
from tests.conftest import SIZE, same_weights
from tests.kinds import Normalized
from tests.test_subclasses import state

compilers = map(shutil.which, ("c++", "g++", "clang++"))
needs_compiler = pytest.mark.skipif(not any(compilers), reason="no C++ compiler on this machine")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
OPTIONS = {"batch_size": 200, "lr": 1e-2, "device": "cpu"}
pytestmark = pytest.mark.usefixtures("no_pictures")


class Ordinary(VAE):
    def __init__(self):
        super().__init__(SIZE, 16, 2, encoder_layers=1, activation="tanh")


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
    return runs.read_checkpoint(run)["options"]["compile"]


def assert_same_losses(run: Path, reference: Path) -> None:
    """To rounding, after the same draws. (Other draws differ by 1e-2.)"""
    for row, other in zip(*(runs.read_checkpoint(path)["history"] for path in (run, reference)), strict=True):
        for name in ("train_loss", "test_reconstruction", "test_kl"):
            assert row[name] == pytest.approx(other[name], rel=2e-3, abs=0.01)


def warnings_in(capsys: pytest.CaptureFixture) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]


# ---------------------------------------------------------------------------------------------------------------------
# Compiled


@pytest.mark.parametrize("kind", [pytest.param(Ordinary, marks=needs_compiler), Normalized])
def test_it_trains_as_the_step_as_written(kind: type[VAE], small: ImageData, tmp_path: Path, request):
    """From the same draws; the last batch is a smaller one, which is not compiled."""
    if kind is Normalized:
        request.getfixturevalue("quick_compiler")
    data = replace(small, train_images=small.train_images[:930], train_labels=small.train_labels[:930])
    normalized = {"objective": "iwae", "importance_samples": 3, "clip_grad_norm": 200.0}
    normalized["precision"] = "highest"  # a normalization amplifies bfloat16's rounding
    options = normalized if kind is Normalized else {"kl_warmup": 1.5}
    written, compiled = (trained(kind, data, tmp_path, **options, compile=compile) for compile in (False, True))
    assert was_compiled(compiled)
    assert not was_compiled(written)
    assert_same_losses(compiled, written)
    found, expected = state(compiled), state(written)
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
    assert runs.read_checkpoint(run)["epoch"] == 2
    train.resume(run, kind(), small)
    assert was_compiled(run)
    assert same_weights(run, straight)
    expected = state(straight)
    adams = [runs.read_checkpoint(path)["optimizer_state_dict"]["state"] for path in (run, straight)]
    steps = 4 * -(-len(small.train_images) // OPTIONS["batch_size"])
    for ours, other in zip(*(adam.values() for adam in adams), strict=True):
        assert other["step"] == steps
        assert all(torch.equal(ours[name], other[name]) for name in other)
    if kind is CountsInBuffer:
        assert expected["training_weights.calls"] == steps
    else:
        written = trained(kind, small, tmp_path, 4, compile=False)
        assert not all(torch.equal(value, expected[name]) for name, value in state(written).items())


def test_a_step_that_cannot_be_compiled_is_taken_all_the_same(small: ImageData, tmp_path: Path, capsys):
    run = trained(ReadsValues, small, tmp_path, compile=True)
    (line,) = warnings_in(capsys)
    assert "not compiled" in line
    assert not was_compiled(run)  # so that a resumed run does not try
    plain = state(trained(Ordinary, small, tmp_path, compile=False))
    assert all(torch.equal(value, plain[name]) for name, value in state(run).items())


def test_a_program_that_no_longer_fits_is_not_compiled_again(small: ImageData, tmp_path: Path, monkeypatch, capsys):
    """A Python number that changes would be compiled again for each value, until PyTorch gives up."""
    programs = []
    compile = torch.compile

    def backend(graph: torch.fx.GraphModule, inputs: list) -> object:
        programs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda f, **_: compile(f, fullgraph=True, dynamic=False, backend=backend))
    run = trained(Counts, small, tmp_path, epochs=4, compile=True)
    assert len(programs) == 1
    assert len(warnings_in(capsys)) == 1
    assert not was_compiled(run)
    first, *_, last = (row["test_loss"] for row in runs.read_checkpoint(run)["history"])
    assert last < 0.7 * first


def wrong(change: Callable[[Tensor], Tensor]) -> Callable:
    """A compiler whose programs change one of the tensors that they return."""

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        def run(*args: Tensor) -> list[Tensor]:
            first, *others = graph(*args)
            return [change(first), *others]

        return run

    return backend


@pytest.mark.parametrize(
    ("change", "is_believed", "precision"),
    [
        (lambda x: x + 0, True, "bfloat16"),
        (lambda x: x * math.nan, False, "bfloat16"),
        (lambda x: 1.5 * x, False, "bfloat16"),
        (lambda x: 1.5 * x, False, "highest"),
    ],
)
def test_a_wrong_program_is_not_believed(change, is_believed: bool, precision: str, monkeypatch, capsys):
    """PyTorch 2.14 compiles some convolutions in bfloat16 to nan, for example."""
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **_: compile(f, fullgraph=True, dynamic=False, backend=wrong(change))
    )
    model, x = Ordinary(), torch.rand(30, SIZE).round()
    adam = train.Adam(model.parameters(), lr=1e-3)
    before = copy.deepcopy(model.state_dict())
    steps = step.Steps(train.make_step(model, adam, train.make_options()), [adam.weights, adam.first, adam.second])
    with step.matmul_precision(precision, "cpu"):
        steps.compile(x, x, torch.zeros(30, dtype=torch.int64), torch.tensor([1e-3, 1e-8, 1.0]))
    assert steps.is_compiled == is_believed
    assert len(warnings_in(capsys)) == (not is_believed)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(moment.any() for moment in (*adam.first, *adam.second))


@pytest.mark.parametrize("place", range(4))
def test_the_first_result_of_a_program_is_compared_whole(place: int):
    """A difference in any of the tensors counts, however small the tensor; one that is rounding does not."""
    expected = [[torch.tensor(100.0)], [torch.randn(50, 40), torch.randn(2)], [1e-4 * torch.randn(9)]]
    same = [[1.00001 * tensor for tensor in group] for group in expected]
    assert step.relative_error(same, expected) < 2e-5
    changed = copy.deepcopy(expected)
    tensors = [tensor for group in changed for tensor in group]
    tensors[place] *= 1.2
    assert step.relative_error(changed, expected) > 0.05
    tensors[place] *= math.nan
    assert math.isnan(step.relative_error(changed, expected))


# ---------------------------------------------------------------------------------------------------------------------
# Recorded


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[Callable]:
    """Stands in for CUDA's recorder, and calls functions again instead. Returns what was recorded."""
    recorded = []
    monkeypatch.setattr(step, "record_graph", lambda function: recorded.append(function) or function)
    monkeypatch.setattr(step, "no_waiting", contextlib.nullcontext)
    return recorded


def recorded_and_not(size: int = 30) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
    """What steps of one model return, recorded and as written, and all weights afterwards."""
    results, weights = [], []
    for wrap in (lambda steps: steps, step.Recorded):
        torch.manual_seed(0)
        model = Ordinary()
        adam = train.Adam(model.parameters(), lr=1e-3)
        steps = wrap(
            step.Steps(train.make_step(model, adam, train.make_options()), [adam.weights, adam.first, adam.second])
        )
        found = []
        for i, sizes in enumerate([[10, 10, 10], [10, 10, 10], [10, 10, 10], [20, 10], [10, 10, 10], [20, 10]]):
            x = torch.rand(size, SIZE).round()
            rates = torch.tensor([[1e-3 * (i + 1), 1e-8, 1.0]] * len(sizes))
            y = torch.zeros(size, dtype=torch.int64)
            found.append(steps(x, x, y, rates, sizes=sizes).clone())
        results.append(found)
        weights.append([weight.detach() for weight in model.parameters()])
    return *results, weights


def test_recorded_steps_are_the_steps(recorder: list[Callable]):
    """Each sequence of sizes is recorded when it comes again, and draws what it would have drawn."""
    written, replayed, weights = recorded_and_not()
    assert len(recorder) == 2
    for found, expected in zip(replayed, written, strict=True):
        assert torch.equal(found, expected)
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


def test_steps_that_cannot_be_recorded_are_taken_all_the_same(monkeypatch: pytest.MonkeyPatch, recorder, capsys):
    """A graph that is wrong, or a step that waits for the GPU."""

    def fail(function: Callable) -> Callable:
        raise RuntimeError("operation not permitted when stream is capturing")

    for record in (fail, lambda function: lambda: 2 * function()):
        monkeypatch.setattr(step, "record_graph", record)
        written, replayed, weights = recorded_and_not()
        assert all(torch.equal(*pair) for pair in zip(replayed, written, strict=True))
        assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))
        (line,) = warnings_in(capsys)
        assert "not recorded" in line


@cuda
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu_recorded_steps_train_as_written(compile: bool, small: ImageData, tmp_path: Path, monkeypatch, capsys):
    options = {"device": "cuda", "epochs": 5, "kl_warmup": 3, "precision": "highest"}
    recorded = trained(Ordinary, small, tmp_path, **options, compile=compile)
    assert was_compiled(recorded) == compile
    monkeypatch.setattr(train, "Recorded", lambda steps: steps)
    written = trained(Ordinary, small, tmp_path, **options, compile=False)
    assert_same_losses(recorded, written)
    assert warnings_in(capsys) == []


@cuda
def test_on_a_gpu_a_step_that_waits_is_taken_all_the_same(small: ImageData, tmp_path: Path, capsys):
    run = trained(ReadsValues, small, tmp_path, device="cuda", epochs=4)
    (line,) = warnings_in(capsys)
    assert "not recorded" in line
    assert_same_losses(run, trained(Ordinary, small, tmp_path, device="cuda", epochs=4))


# ---------------------------------------------------------------------------------------------------------------------
# The rules


def test_long_runs_are_compiled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(step.shutil, "which", lambda name: "/usr/bin/c++")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert step.is_worth_compiling(cpu, 1, 5000)
    assert not step.is_worth_compiling(cpu, 1, 4999)
    assert not step.is_worth_compiling(cpu, 2, 5000)
    assert step.is_worth_compiling(gpu, 1, 30_000)
    assert not step.is_worth_compiling(gpu, 1, 29_999)
    assert not step.is_worth_compiling(torch.device("mps"), 1, 10**6)
    monkeypatch.setattr(step.shutil, "which", lambda name: None)
    assert not step.is_worth_compiling(cpu, 1, 5000)


def test_the_rules_see_the_steps_and_the_batch(small: ImageData, monkeypatch: pytest.MonkeyPatch):
    counted = []
    monkeypatch.setattr("options.is_worth_compiling", lambda device, ranks, steps: counted.append(steps) or steps > 200)
    seen = []
    monkeypatch.setattr("options.choose_precision", lambda device, *how: seen.append(how) or "medium")
    cases = ({}, True), ({"epochs": 10}, False), ({"epochs": 10, "mirror": True}, True), ({"compile": False}, False)
    for given, expected in cases:
        options = train.make_options(**{"epochs": 20, "batch_size": 99} | given)  # 1,000 images: the last batch has 10
        options = options.resolve(small).resolve_for(Ordinary(), small)
        assert (options.compile, options.precision) == (expected, "medium")
    assert counted == [20 * 11, 10 * 11, 10 * 21]
    assert seen == [(99, expected) for _, expected in cases]


def test_precision_follows_from_the_hardware_and_the_batch(monkeypatch: pytest.MonkeyPatch):
    expected = {
        (): "medium medium",
        ("avx512_bf16",): "highest bfloat16",
        ("amx_bf16", "avx512_bf16"): "highest bfloat16",
    }
    for units, precisions in expected.items():
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda units=units: {"avx2": True} | dict.fromkeys(units, True)
        )
        cpu = torch.device("cpu")
        for is_compiled in (False, True):
            assert [step.choose_precision(cpu, size, is_compiled) for size in (127, 128)] == precisions.split()
    gpu = torch.device("cuda")
    for has_bfloat16 in (False, True):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda answer=has_bfloat16, **_: answer)
        assert step.choose_precision(gpu, 20, is_compiled=False) == "medium"
        assert step.choose_precision(gpu, 20, is_compiled=True) == ("bfloat16" if has_bfloat16 else "medium")


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
