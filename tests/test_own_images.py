"""Images of one's own: from a folder or an .npz file to pictures, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import runs
import train
from data import ImageData, load_dataset
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


def save_picture(path: Path, shade: int = 200, format: str | None = None) -> None:
    """Saves a picture of one gray value, in a folder that need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (30, 30), shade).save(path, format)


@pytest.fixture
def drawn(short_chains: None, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of pictures, which are drawn but not rendered. That takes most of the time."""
    names = set()
    for module in (evaluate, train.pictures):
        monkeypatch.setattr(module, "save_figure", lambda figure, path: names.add(path.stem))
    return names


def test_a_folder_from_the_command_line_to_pictures(folder, tmp_path, call, fails, drawn, monkeypatch, capsys):
    out_dir = tmp_path / "runs"
    monkeypatch.chdir(tmp_path)
    args = ["--dataset", folder.name, "--image-size=16", *SMALL, "--latent-size=3", "--out-dir", out_dir]
    broken = folder / "cross" / "broken.png"
    broken.write_bytes((folder / "cross" / "001.png").read_bytes()[:60])
    assert str(broken) in fails(train.main, *args)
    assert not out_dir.exists()

    broken.unlink()
    call(train.main, *args)
    printed = capsys.readouterr().out
    assert "200 pictures in gray, cropped square at the centre and resized to 16 x 16" in printed
    (made,) = out_dir.iterdir()
    assert made.name == "001-my shapes-z3"
    model, checkpoint = runs.load_checkpoint(made)
    assert model.config["input_size"] == 256
    assert checkpoint["options"]["dataset"] == str(folder)

    monkeypatch.chdir(out_dir)
    call(train.main, "--resume", made, "--epochs=3")
    call(evaluate.main, made, "--nll-samples=2")
    metrics = json.loads((made / "metrics.json").read_text())
    assert metrics["dataset"] == "my shapes"
    assert metrics["num_images"] == len(load_dataset(str(folder)).test_images)
    call(evaluate.main, made, "--save", tmp_path / "codes.npz")
    codes = np.load(tmp_path / "codes.npz")
    assert len(codes["name"]) == metrics["num_images"]
    assert all((folder / name).is_file() for name in codes["name"])
    assert [name.split("/")[0] for name in codes["name"]] == codes["label"].tolist()
    names = {"curves", "reconstructions", "prior_samples", "completions", "interpolations", "latent_space"}
    assert drawn == names | {"latent_usage", "traversals", "least_likely"}

    monkeypatch.setattr(evaluate, "draw_all", lambda *args: ())
    moved = folder.rename(tmp_path / "moved")
    for main, *args in ((evaluate.main, made), (train.main, "--resume", made, "--epochs=4")):
        message = fails(main, *args)
        assert f"trained on {folder}, which does not exist now" in message
        assert "--dataset" in message
    call(evaluate.main, made, "--nll-samples=2", "--dataset", moved)
    call(train.main, "--resume", made, "--dataset", moved)  # trains no epoch, but remembers the new place
    call(evaluate.main, made, "--nll-samples=1")
    call(train.main, "--resume", made, "--epochs=4")
    assert runs.load_checkpoint(made)[1]["epoch"] == 4

    # A run takes no other images than those it was trained on, but evaluation does if they are named
    draw_picture(0, 255, (30, 30)).save(moved / "circle" / "new.png")
    assert "was trained on other images" in fails(train.main, "--resume", made, "--epochs=5")
    assert "was trained on other images" in fails(evaluate.main, made)
    assert runs.load_checkpoint(made)[1]["epoch"] == 4
    call(evaluate.main, made, "--nll-samples=1", "--dataset", moved)


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


def test_very_few_pictures(tmp_path: Path, call: Callable, drawn: set[str]):
    np.savez(tmp_path / "few.npz", images=np.random.default_rng(0).integers(0, 256, (4, 5, 5), dtype=np.uint8))
    args = ["--epochs=1", "--hidden-size=8", "--latent-size=3", "--out-dir", tmp_path / "runs"]
    call(train.main, "--dataset", tmp_path / "few.npz", *args)
    call(evaluate.main, tmp_path / "runs", "--nll-samples=2")
    text = (tmp_path / "runs" / "001-few-z3" / "metrics.json").read_text()
    assert json.loads(text)["num_images"] == 2
    assert "NaN" not in text
    assert len(drawn) == 9


def test_pictures_are_square_and_upright_in_their_colours(tmp_path: Path, capsys: pytest.CaptureFixture):
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
    assert "8 pictures in colour, cropped square at the centre and resized to 8 x 8\n" in capsys.readouterr().out
    assert dataset.classes == ["mine"]
    assert dataset.shape == (3, 8, 8)
    first, second, third, fourth = dataset.train_images
    assert (first[0, :, 2:-2] == 255).all()
    assert (first[0] > 200).all()
    assert (first[1:] == 0).all()
    assert (second[:, :, 5:] > 200).all()
    assert (second[:, :, :3] < 50).all()
    assert (third == 40_000 // 256).all()
    assert (fourth == 255).all()
    gray = load_dataset(str(tmp_path / "mine"), image_size=8, channels=1).train_images[0]
    assert (gray[0, :, 2:-2] == 76).all()  # ITU-R 601: 0.299 red
    Image.fromarray(np.full((20, 20), 200, dtype=np.int32)).save(folder / "e.tif")
    with pytest.raises(UserError, match=r"e\.tif.*32 bits"):
        load_dataset(str(tmp_path / "mine"))


def test_one_picture_in_colour_makes_all_of_them_rgb(tmp_path: Path):
    for i in range(4):
        save_picture(tmp_path / "gray" / "train" / f"{i}.png", shade=50 * i)
        save_picture(tmp_path / "gray" / "test" / f"{i}.jpg")
    assert load_dataset(str(tmp_path / "gray")).shape == (1, 28, 28)
    colour = load_dataset(str(tmp_path / "gray"), channels=3).train_images
    assert colour.shape == (4, 3, 28, 28)
    assert colour[:, :, 14, 14].tolist() == [[50 * i] * 3 for i in range(4)]
    Image.new("RGB", (30, 30), (9, 9, 10)).save(tmp_path / "gray" / "test" / "4.png")
    assert load_dataset(str(tmp_path / "gray")).shape == (3, 28, 28)


# ---------------------------------------------------------------------------------------------------------------------
# Folders as they are found


@pytest.mark.parametrize(
    ("train_name", "test_name"),
    [
        ("train", "test"),
        ("TRAINING", "Validation"),
        ("train2017", "val2017"),
    ],
)
def test_folders_of_a_split(train_name: str, test_name: str, tmp_path: Path):
    for i in range(4):
        save_picture(tmp_path / "mine" / train_name / "cat" / f"{i}.png", shade=100)
        save_picture(tmp_path / "mine" / test_name / "dog" / f"{i}.png", shade=200)
    dataset = load_dataset(str(tmp_path / "mine"))
    assert dataset.classes == ["cat", "dog"]
    assert (dataset.train_images[:, 0, 14, 14] == 100).all()
    assert (dataset.test_images[:, 0, 14, 14] == 200).all()
    assert (len(dataset.train_images), len(dataset.test_images)) == (4, 4)
    assert (dataset.train_labels.unique().tolist(), dataset.test_labels.unique().tolist()) == ([0], [1])


def test_the_validation_set_is_left_out_if_there_is_a_test_set(tmp_path: Path):
    for name, shade in (("train", 100), ("val", 150), ("test", 200), ("extra", 250)):
        for i in range(4):
            save_picture(tmp_path / name / f"{i}.png", shade=shade)
    dataset = load_dataset(str(tmp_path))
    assert (dataset.train_images[:, 0, 14, 14] == 100).all()
    assert (dataset.test_images[:, 0, 14, 14] == 200).all()


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["Training", "cat", "dog"], "Training"),
        (["test", "val", "cat"], "test"),
        (["cat/train", "cat/test", "dog/train", "dog/test"], "cat/test"),
        (["mine/train/cat", "mine/test/cat"], "mine/test"),
    ],
)
def test_half_a_split_is_not_a_class(names: list[str], says: str, tmp_path: Path, fails: Callable):
    for name in names:
        for i in range(9):
            save_picture(tmp_path / "data" / name / f"{i}.png")
    message = fails(train.main, "--dataset", tmp_path / "data", "--out-dir", tmp_path / "runs")
    assert f"{tmp_path / 'data' / says}" in message


@pytest.mark.parametrize(
    ("train_class", "test_class", "classes"),
    [("cat/", "", ["cat", "unlabelled"]), ("", "cat/", ["cat", "unlabelled"]), ("", "", ["mine"])],
)
def test_labels_are_not_needed(train_class: str, test_class: str, classes: list, tmp_path: Path, monkeypatch):
    for i in range(4):
        save_picture(tmp_path / "mine" / "train" / train_class / f"{i}.png")
        save_picture(tmp_path / "mine" / "test" / test_class / f"{i}.png")
    dataset = load_dataset(str(tmp_path / "mine"))
    assert dataset.classes == classes
    for labels, name in ((dataset.train_labels, train_class), (dataset.test_labels, test_class)):
        assert [classes[label] for label in labels] == [name.rstrip("/") or classes[-1]] * 4


def test_dark_images_get_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture):
    np.savez(tmp_path / "bits.npz", images=np.eye(12, dtype=np.uint8).repeat(40, 0).reshape(40, 12, 12))
    load_dataset(str(tmp_path / "bits.npz"))
    assert "its brightest value is 1 of 255\n" in capsys.readouterr().err


def test_all_kinds_of_pictures_are_read_and_other_files_are_not(tmp_path: Path):
    for i in range(8):
        save_picture(tmp_path / "cat" / f"{i}.png")
        save_picture(tmp_path / "cat" / f"{i}.JFIF", format="JPEG")
        save_picture(tmp_path / "cat" / f"{i}.gif")
        (tmp_path / "cat" / f"{i}.heic").touch()
    (tmp_path / "README").touch()
    dataset = load_dataset(str(tmp_path))
    assert len(dataset.train_images) + len(dataset.test_images) == 24


def test_hidden_files_and_links_to_folders_are_not_read(folder: Path):
    expected = load_dataset(str(folder))
    for hidden in (".hidden", ".ipynb_checkpoints", "__MACOSX", "cross/.ipynb_checkpoints", "cross/__MACOSX/.a/b"):
        save_picture(folder / hidden / "001-checkpoint.png")
    (folder / "cross" / ".DS_Store").touch()
    (folder / "cross" / "._001.png").touch()
    dataset = load_dataset(str(folder))
    assert dataset.checksums() == expected.checksums()
    (folder / "circle" / "up").symlink_to("..", target_is_directory=True)
    dataset = load_dataset(str(folder))
    assert (dataset.checksums(), dataset.classes) == (expected.checksums(), list(CLASSES))


@pytest.mark.parametrize("counts", [(9, 1), (1, 9), (1, 1)])
def test_one_picture_to_train_or_test_on_is_too_few(counts: tuple[int, int], tmp_path: Path, fails: Callable):
    for name, count in zip(("train", "test"), counts, strict=True):
        for i in range(count):
            save_picture(tmp_path / "mine" / name / f"{i}.png")
    message = fails(train.main, "--dataset", tmp_path / "mine", "--out-dir", tmp_path / "runs")
    assert f"{sum(counts)} images, {counts[1]} of them for testing" in message
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Arrays


@pytest.mark.parametrize("labels", [None, np.arange(60) % 12, np.array(["a", "b", "c"])[np.arange(60) % 3]])
def test_an_npz_file(labels: np.ndarray | None, tmp_path: Path, call: Callable, drawn: set[str]):
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
    args = [*SMALL, "--latent-size=3", "--out-dir", tmp_path / "runs"]
    call(train.main, "--dataset", tmp_path / "mine.npz", *args)
    call(evaluate.main, tmp_path / "runs", "--nll-samples=2")
    assert len(drawn) == 9


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((9, 5, 6), (1, 5, 6)),
        ((9, 5, 6, 3), (3, 5, 6)),
        ((9, 3, 5, 6), (3, 5, 6)),
        ((9, 5, 6, 1), (1, 5, 6)),
        ((9, 1, 5, 6), (1, 5, 6)),
        ((9, 3, 5, 3), (3, 3, 5)),  # could be either; as pictures are usually stored
    ],
)
def test_colour_in_an_npz_file(shape: tuple[int, ...], expected: tuple[int, int, int], tmp_path: Path):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", images=images)
    dataset = load_dataset(str(tmp_path / "mine.npz"))
    assert dataset.shape == expected
    if shape[-1] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    written = {image.tobytes() for image in images}
    assert {image.numpy().tobytes() for image in torch.cat([dataset.train_images, dataset.test_images])} == written


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"pictures": np.zeros((5, 4, 4), np.uint8)}, "no array named images"),
        ({"images": np.zeros((5, 4, 4))}, "float64"),
        ({"images": np.zeros((0, 4, 4), np.uint8)}, "(0, 4, 4)"),
        ({"images": np.zeros((5, 4, 4, 4), np.uint8)}, "(5, 4, 4, 4)"),
        ({"images": np.zeros((5, 4, 4), bool)}, "bool"),
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
    for name in ("empty", "one", "file.npz", "file.txt", "missing", "mixed"):
        assert str(tmp_path / name) in fails(train.main, "--dataset", tmp_path / name, "--out-dir", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
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
    for name, wrong in (
        ("train_images", images / 255),
        ("test_images", images[:1]),
        ("test_images", images.numpy()),
        ("test_images", in_colour),
        ("train_labels", labels[:3]),
        ("train_labels", labels + 1),
        ("test_labels", labels.float()),
    ):
        with pytest.raises(UserError):
            ImageData("mine", ["all"], **good | {name: wrong})
