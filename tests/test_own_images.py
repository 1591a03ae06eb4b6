"""Images of one's own: from a folder or an .npz file to pictures, and what is refused."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train
import utils
from data import ImageData, load_dataset
from model import VAE
from utils import UserError

SMALL = ["--epochs=2", "--hidden-size=16", "--latent-size=2", "--batch-size=50", "--device=cpu"]
CLASSES = ("circle", "cross", "nothing")


def draw_picture(kind: int, shade: int, size: tuple[int, int]) -> Image.Image:
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    rows, columns = np.mgrid[: size[1], : size[0]]
    if kind == 0:
        pixels[np.hypot(rows - size[1] / 2, columns - size[0] / 2) < min(size) / 3] = shade
    elif kind == 1:
        pixels[abs(rows - columns) < 4] = shade
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """200 PNGs in three classes, of several sizes, and files that are no pictures."""
    root = tmp_path / "my shapes"
    for i in range(200):
        path = root / CLASSES[i % 3] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_picture(i % 3, 55 + i, (30 + i % 20, 30 + i % 7)).save(path)
    (root / "notes.txt").write_text("not a picture")
    (root / ".hidden").mkdir()
    return root


def run(monkeypatch: pytest.MonkeyPatch, main: Callable, *args: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, args)])
    main()


def pictures(run: Path) -> set[str]:
    return {path.stem for path in run.glob("*.png")}


def test_a_folder_from_the_command_line_to_pictures(folder, tmp_path, monkeypatch, fails, capsys):
    out_dir = tmp_path / "runs"
    monkeypatch.chdir(tmp_path)
    args = ["--dataset", folder.name, "--image-size=16", *SMALL, "--out-dir", out_dir]
    broken = folder / "cross" / "broken.png"
    broken.write_bytes((folder / "cross" / "001.png").read_bytes()[:60])
    assert str(broken) in fails(train.main, *args)
    assert not out_dir.exists()

    broken.unlink()
    run(monkeypatch, train.main, *args)
    printed = capsys.readouterr().out
    assert "200 pictures, converted to gray, cropped square at the centre and resized to 16 x 16" in printed
    (made,) = out_dir.iterdir()
    assert made.name == "001-my shapes-z2"
    model, checkpoint = utils.load_checkpoint(made)
    assert model.config["input_size"] == 256
    assert checkpoint["options"]["dataset"] == str(folder)

    monkeypatch.chdir(out_dir)
    run(monkeypatch, train.main, "--resume", made, "--epochs=3")
    run(monkeypatch, evaluate.main, made, "--nll-samples=2")
    metrics = json.loads((made / "metrics.json").read_text())
    assert metrics["dataset"] == "my shapes"
    assert metrics["num_images"] == len(load_dataset(str(folder)).test_images)
    drawn = {"curves", "reconstructions", "prior_samples", "interpolations", "latent_space", "latent_usage", "manifold"}
    assert pictures(made) == drawn

    monkeypatch.setattr(evaluate, "save_figure", lambda *args: None)  # it takes most of the time
    moved = folder.rename(tmp_path / "moved")
    assert str(folder) in fails(evaluate.main, made)
    assert str(folder) in fails(train.main, "--resume", made, "--epochs=4")
    run(monkeypatch, evaluate.main, made, "--nll-samples=2", "--dataset", moved)
    run(monkeypatch, train.main, "--resume", made, "--epochs=4", "--dataset", moved)
    assert utils.load_checkpoint(made)[1]["epoch"] == 4

    # A run takes no other images than those it was trained on, but evaluation does if they are named
    draw_picture(0, 255, (30, 30)).save(moved / "circle" / "new.png")
    assert "other images" in fails(train.main, "--resume", made, "--epochs=5")
    assert "other images" in fails(evaluate.main, made)
    assert utils.load_checkpoint(made)[1]["epoch"] == 4
    run(monkeypatch, evaluate.main, made, "--nll-samples=1", "--dataset", moved)


def test_no_image_changes_sides_when_others_are_added(folder: Path):
    dataset = load_dataset(str(folder))
    assert dataset.classes == list(CLASSES)
    assert dataset.shape == (1, 28, 28)
    assert len(dataset.train_images) + len(dataset.test_images) == 200
    assert 10 < len(dataset.test_images) < 35
    for images, labels in ((dataset.train_images, dataset.train_labels), (dataset.test_images, dataset.test_labels)):
        assert labels.unique().tolist() == [0, 1, 2]
        assert (images[labels == 2] == 0).all()
        assert (images[labels == 0, 0, 14, 14] > 0).all()

    def shades(dataset: ImageData) -> set[int]:
        return set(dataset.test_images[dataset.test_labels == 0, 0, 14, 14].tolist())

    (folder / "circle" / "000.png").unlink()
    for i in range(30):
        draw_picture(1, 255, (30, 30)).save(folder / "cross" / f"0{i}.png")
    later = load_dataset(str(folder.rename(folder.parent / "renamed")))
    assert shades(later) == shades(dataset) - {55}
    assert len(later.test_images) > len(dataset.test_images)


def test_labels_in_a_cyclic_order_are_on_both_sides(tmp_path: Path):
    images = np.random.default_rng(0).integers(0, 256, (1000, 4, 4), dtype=np.uint8)
    parts = []
    for count in (1000, 600):  # the first 600 stay where they are
        np.savez(tmp_path / "mine.npz", images=images[:count], labels=np.arange(count) % 10)
        dataset = load_dataset(str(tmp_path / "mine.npz"))
        assert dataset.train_labels.unique().tolist() == dataset.test_labels.unique().tolist() == list(range(10))
        parts.append(dataset.test_images[:40])
    assert torch.equal(*parts)


def test_very_few_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    np.savez(tmp_path / "few.npz", images=np.random.default_rng(0).integers(0, 256, (4, 5, 5), dtype=np.uint8))
    args = ["--epochs=1", "--hidden-size=8", "--latent-size=3", "--out-dir", tmp_path / "runs"]
    run(monkeypatch, train.main, "--dataset", tmp_path / "few.npz", *args)
    run(monkeypatch, evaluate.main, tmp_path / "runs", "--nll-samples=2")
    text = (tmp_path / "runs" / "001-few-z3" / "metrics.json").read_text()
    assert json.loads(text)["num_images"] == 2
    assert "NaN" not in text


def test_names_with_signs_of_formulas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = tmp_path / "a$b"
    for i in range(60):
        path = root / ("b$\\foo$", "c$")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_picture(i % 2, 200, (30, 30)).save(path)
    run(monkeypatch, train.main, "--dataset", root, *SMALL, "--latent-size=3", "--out-dir", tmp_path / "runs")
    run(monkeypatch, evaluate.main, tmp_path / "runs", "--nll-samples=2")
    assert len(pictures(tmp_path / "runs" / "001-a$b-z3")) == 6


def test_pictures_are_gray_square_and_upright(tmp_path: Path):
    folder = tmp_path / "mine" / "train"
    folder.mkdir(parents=True)
    red = Image.new("RGB", (60, 20))
    red.paste((255, 0, 0), (20, 0, 40, 20))  # the middle third, and the square crop leaves no more
    red.save(folder / "a.png")
    sideways = Image.new("L", (20, 20))
    sideways.paste(255, (0, 0, 20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    sideways.save(folder / "b.png", exif=exif)
    Image.fromarray(np.full((20, 20), 40_000, dtype=np.uint16)).save(folder / "c.png")
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(folder / "d.png")
    shutil.copytree(folder, tmp_path / "mine" / "test")
    dataset = load_dataset(str(tmp_path / "mine"), image_size=8)
    assert dataset.classes == ["mine"]
    first, second, third, fourth = dataset.train_images.squeeze(1)
    assert (first[:, 2:-2] == 76).all()  # ITU-R 601: 0.299 red
    assert (first > 60).all()
    assert (second[:, 5:] > 200).all()
    assert (second[:, :3] < 50).all()
    assert (third == 40_000 // 256).all()
    assert (fourth == 255).all()
    Image.fromarray(np.full((20, 20), 200, dtype=np.int32)).save(folder / "e.tif")
    with pytest.raises(UserError, match=r"e\.tif.*32 bits"):
        load_dataset(str(tmp_path / "mine"))


def test_train_and_test_folders(folder: Path, tmp_path: Path):
    parts = tmp_path / "parts"
    shutil.copytree(folder, parts / "train")
    shutil.copytree(folder / "cross", parts / "test" / "cross")
    dataset = load_dataset(str(parts))
    assert (len(dataset.train_images), len(dataset.test_images)) == (200, 67)
    assert dataset.test_labels.unique().tolist() == [1]
    (parts / "test" / "cross").rename(parts / "test" / "star")
    with pytest.raises(UserError, match=r"test.*star"):
        load_dataset(str(parts))


@pytest.mark.parametrize("labels", [None, np.arange(60) % 12, np.array(["a", "b", "c"])[np.arange(60) % 3]])
def test_an_npz_file(labels: np.ndarray | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The images are not square, with one class, three, and more than the palette has colours."""
    images = np.random.default_rng(0).integers(0, 256, (60, 9, 14), dtype=np.uint8)
    arrays = {"images": images} | ({} if labels is None else {"labels": labels})
    np.savez(tmp_path / "mine.npz", **arrays)
    dataset = load_dataset(str(tmp_path / "mine.npz"))
    assert dataset.classes == (["mine"] if labels is None else [str(label) for label in sorted(set(labels.tolist()))])
    names = {image.tobytes(): "mine" if labels is None else str(labels[i]) for i, image in enumerate(images)}
    sides = ((dataset.train_images, dataset.train_labels), (dataset.test_images, dataset.test_labels))
    loaded = [pair for side in sides for pair in zip(*side, strict=True)]
    assert len(loaded) == 60
    assert {image.numpy().tobytes(): dataset.classes[label] for image, label in loaded} == names
    latent_size = 2 if labels is None else 3  # above two, without the manifold, which takes long to draw
    args = [*SMALL, f"--latent-size={latent_size}", "--out-dir", tmp_path / "runs"]
    run(monkeypatch, train.main, "--dataset", tmp_path / "mine.npz", *args)
    run(monkeypatch, evaluate.main, tmp_path / "runs", "--nll-samples=2")
    assert len(pictures(tmp_path / "runs" / f"001-mine-z{latent_size}")) == 9 - latent_size


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"pictures": np.zeros((5, 4, 4), np.uint8)}, "no array named images"),
        ({"images": np.zeros((5, 4, 4))}, "float64"),
        ({"images": np.zeros((5, 16), np.uint8)}, "(5, 16)"),
        ({"images": np.zeros((0, 4, 4), np.uint8)}, "(0, 4, 4)"),
        ({"images": np.zeros((5, 4, 4), np.uint8), "labels": np.zeros(4)}, "(4,)"),
        ({"images": np.zeros((3, 4, 4), np.uint8)}, "3 images"),
        ({"images": np.array([{}])}, "damaged"),
    ],
)
def test_an_npz_file_of_the_wrong_type_or_shape(arrays: dict, says: str, tmp_path: Path, fails: Callable):
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays)
    message = fails(train.main, "--dataset", path, "--out-dir", tmp_path / "runs")
    assert str(path) in message
    assert says in message
    assert not (tmp_path / "runs").exists()


def test_what_is_no_data(tmp_path: Path, fails: Callable):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one" / "class").mkdir(parents=True)
    (tmp_path / "file.npz").write_bytes(b"PK no")
    (tmp_path / "file.txt").touch()
    (tmp_path / "mixed" / "class").mkdir(parents=True)
    for path in ("mixed/class/a.png", "mixed/b.PNG"):
        Image.new("L", (9, 9)).save(tmp_path / path)
    for name, says in (
        ("empty", "not a folder of images"),
        ("one", "not a folder of images"),
        ("file.npz", "damaged"),
        ("file.txt", "neither a folder nor an .npz file"),
        ("missing", "not a known data set, nor a path"),
        ("mixed", "images beside them"),
    ):
        message = fails(train.main, "--dataset", tmp_path / name, "--out-dir", tmp_path / "runs")
        assert str(tmp_path / name) in message
        assert says in message
    assert "--image-size" in fails(train.main, "--dataset=mnist-5k", "--image-size=14")
    assert "--image-size" in fails(train.main, "--dataset", tmp_path / "empty", "--image-size=0")
    for name in ("b.png", "c.png"):
        shutil.copy(tmp_path / "mixed" / "b.PNG", tmp_path / "mixed" / "class" / name)
    (tmp_path / "mixed" / "b.PNG").unlink()
    assert "memory" in fails(train.main, "--dataset", tmp_path / "mixed", f"--image-size={2**31 - 1}")


def test_image_data_is_checked():
    images, labels = torch.zeros(4, 3, 5, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    good = {"train_images": images, "train_labels": labels, "test_images": images[:, None], "test_labels": labels}
    dataset = ImageData("mine", ["all"], **good)
    assert (dataset.shape, dataset.input_size) == ((1, 3, 5), 15)
    assert dataset.train_images.shape == dataset.test_images.shape == (4, 1, 3, 5)
    in_colour = images[:, None].expand(4, 3, 3, 5)
    dataset = ImageData("mine", ["all"], in_colour, labels, in_colour, labels)
    assert (dataset.shape, dataset.input_size) == ((3, 3, 5), 45)
    for name, wrong, says in (
        ("train_images", images / 255, "float32"),
        ("train_images", images.flatten(1), r"\(4, 15\)"),
        ("test_images", images[:0], r"\(0, 1, 3, 5\)"),
        ("test_images", images.numpy(), "ndarray"),
        ("test_images", images[:, :2], "same size"),
        ("test_images", in_colour, "same size"),
        ("test_images", images.bool(), r"torch\.uint8\), not torch\.bool: .*255 \* x"),
        ("train_images", images[:, :0], r"\(4, 1, 0, 5\)"),
        ("test_images", images[:1], "N > 1"),
        ("train_labels", labels[:3], "labels"),
        ("train_labels", labels + 1, "labels"),
        ("train_labels", labels - 1, "labels"),
        ("test_labels", labels.float(), "labels"),
        ("test_labels", labels.tolist(), "labels"),
    ):
        with pytest.raises(UserError, match=says):
            ImageData("mine", ["all"], **good | {name: wrong})


def test_metrics_are_of_bytes_only():
    images, model = torch.zeros(4, 3, 5, dtype=torch.uint8), VAE(15, 4, 2)
    assert evaluate.evaluate(model, images, nll_samples=1)["num_images"] == 4
    for wrong, says in (
        (images / 255, "float32"),
        (images.numpy(), "ndarray"),
        (images[:1], r"\(1, 3, 5\)"),
        (images[:, :2], "15 values"),
        (images[0, 0], "15 values"),
    ):
        with pytest.raises(UserError, match=says):
            evaluate.evaluate(model, wrong, nll_samples=1)
    with pytest.raises(UserError, match="nll_samples"):
        evaluate.evaluate(model, images, nll_samples=0)
