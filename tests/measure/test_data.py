"""Labelled data: what each kind gives, and what each mistake says."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from datafree.errors import DataError
from datafree.measure.data import Labelled, batches_of, inputs_per_batch, open_data
from datafree.task import Task

TASK = Task(shape=(3, 4, 6), mean=(0.5,), std=(0.25,), classes=3)
GREY = Task(shape=(1, 4, 4), classes=("cat", "dog", "eel"))
PIXELS = np.arange(5 * 4 * 6 * 3, dtype=np.uint8).reshape(5, 4, 6, 3)
LABELS = np.array([0, 1, 2, 1, 0])


def picture(colour: tuple[int, int, int] = (255, 0, 51), size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(file, "PNG")
    return file.getvalue()


def npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path / "data.npz", **arrays)
    return path / "data.npz"


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def all_of(data: Labelled) -> tuple[Tensor, list[int]]:
    batches = list(data)
    return torch.cat([inputs for inputs, _ in batches]), torch.cat([labels for _, labels in batches]).tolist()


# ---------------------------------------------------------------- .npz


def test_npz_is_normalised_and_channels_come_first(tmp_path: Path) -> None:
    data = open_data(npz(tmp_path, x_test=PIXELS, y_test=LABELS), TASK)
    inputs, labels = all_of(data)
    expected = (torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    assert len(data) == 5 and labels == LABELS.tolist()
    torch.testing.assert_close(inputs, expected)


def test_npz_with_channels_first_gives_the_same(tmp_path: Path) -> None:
    inputs, _ = all_of(open_data(npz(tmp_path, x_test=PIXELS.transpose(0, 3, 1, 2), y_test=LABELS), TASK))
    torch.testing.assert_close(inputs, (torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25)


def test_npz_of_grey_pictures_needs_no_channel_axis(tmp_path: Path) -> None:
    inputs, _ = all_of(open_data(npz(tmp_path, x_test=PIXELS[:, :, :4, 0], y_test=LABELS), GREY))
    torch.testing.assert_close(inputs[:, 0], torch.from_numpy(PIXELS[:, :, :4, 0].copy()) / 255)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_test": PIXELS}, "no array y_test, only x_test"),
        ({"images": PIXELS, "y_test": LABELS}, "no array x_test, only images, y_test"),
        ({"x_test": PIXELS / 255, "y_test": LABELS}, "x_test holds float64, expected uint8"),
        ({"x_test": PIXELS[:, :3], "y_test": LABELS}, r"shape \(5, 3, 6, 3\), but the network takes \(3, 4, 6\)"),
        ({"x_test": PIXELS, "y_test": LABELS[:4]}, r"y_test is int64 \(4,\)"),
        ({"x_test": PIXELS, "y_test": LABELS / 2}, "y_test is float64"),
        ({"x_test": PIXELS, "y_test": LABELS + 1}, "label 3, expected 0..2"),
        ({"x_test": PIXELS, "y_test": LABELS - 1}, "label -1, expected 0..2"),
        ({"x_test": PIXELS[:0], "y_test": LABELS[:0]}, "holds no labelled pictures"),
        ({"x_test": PIXELS, "y_test": np.array([None] * 5, dtype=object)}, "cannot be read as .npz.*allow_pickle"),
    ],
)
def test_npz_that_does_not_fit_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(npz(tmp_path, **arrays), TASK)


def test_npz_that_is_damaged_is_refused(tmp_path: Path) -> None:
    whole = npz(tmp_path, x_test=PIXELS, y_test=LABELS).read_bytes()
    for name, content in (("text", b"hello"), ("empty", b""), ("cut", whole[: len(whole) // 2]), ("zip", b"PK\x03\x04")):
        (tmp_path / f"{name}.npz").write_bytes(content)
        with pytest.raises(DataError, match=f"{name}.npz cannot be read as .npz"):
            open_data(tmp_path / f"{name}.npz", TASK)


def test_single_array_called_npz_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "data.npz").open("wb") as file:
        np.save(file, PIXELS)
    with pytest.raises(DataError, match="one array without a name"):
        open_data(tmp_path / "data.npz", TASK)


# ---------------------------------------------------------------- folders and zips


def test_folder_of_classes_counts_in_sorted_order(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"b/1.png": picture(), "a/deep/2.PNG": picture(), "c/3.png": picture(), "a/notes.txt": b"", ".git/x.png": b"", "a/._2.png": b""},
    )
    inputs, labels = all_of(open_data(tmp_path, TASK))
    assert labels == [0, 1, 2]
    assert inputs.shape == (3, 3, 4, 6)
    torch.testing.assert_close(inputs[0, :, 0, 0], torch.tensor([2.0, -2.0, -1.2]))  # 255, 0 and 51 of 255


def test_folder_of_classes_is_mapped_by_name(tmp_path: Path) -> None:
    write(tmp_path, {"eel/1.png": picture(), "cat/2.png": picture()})
    inputs, labels = all_of(open_data(tmp_path, GREY))
    assert labels == [0, 2] and inputs.shape == (2, 1, 4, 4)


def test_folder_with_an_unknown_class_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, {"cats/1.png": picture()})
    with pytest.raises(DataError, match="'cats' is no class of the network; nearest names: cat$"):
        open_data(tmp_path, GREY)


def test_folder_with_some_of_the_classes_cannot_be_numbered(tmp_path: Path) -> None:
    write(tmp_path, {"a/1.png": picture(), "b/1.png": picture()})
    with pytest.raises(DataError, match="2 class folders, the network 3 classes without names"):
        open_data(tmp_path, TASK)
    assert all_of(open_data(tmp_path, Task(shape=(3, 4, 6))))[1] == [0, 1]


@pytest.mark.parametrize("packed", [False, True])
def test_labels_csv_gives_file_and_label(tmp_path: Path, packed: bool) -> None:
    table = b"\xef\xbb\xbfid,label,file\r\n7,2,./deep/1.png\r\n8, 0 ,deep\\2.png\r\n"
    files = {"labels.csv": table, "deep/1.png": picture((0, 0, 255)), "deep/2.png": picture((255, 255, 255))}
    path = zipped(tmp_path / "data.ZIP", files) if packed else write(tmp_path / "data", files)
    inputs, labels = all_of(open_data(path, TASK))
    assert labels == [2, 0]
    assert inputs[0, :, 0, 0].tolist() == [-2, -2, 2] and (inputs[1] == 2).all()


def test_labels_csv_may_hold_names_of_classes(tmp_path: Path) -> None:
    write(tmp_path, {"labels.csv": b"file,label\n1.png,dog\n1.png,2\n", "1.png": picture()})
    assert all_of(open_data(tmp_path, GREY))[1] == [1, 2]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"name,label\n1.png,0\n", "no column 'file': its first line holds name, label"),
        (b"file,class\n1.png,0\n", "no column 'label'"),
        (b"", "no column 'file': its first line holds nothing"),
        (b"file,label\n1.png,3\n", "line 2: label 3 is out of range, expected 0..2"),
        (b"file,label\n1.png,-1\n", "label -1 is out of range"),
        (b"file,label\n1.png,0\n1.png,ox\n", "line 3: label 'ox' is not a number"),
        (b"file,label\n1.png\n", "label '' is not a number"),
        (b"file,label\n2.png,0\n", "line 2: no file '2.png'"),
        (b"file,label\n", "holds no labelled pictures"),
        (b"file,label\n\xff.png,0\n", "not a comma-separated table in UTF-8"),
    ],
)
def test_labels_csv_that_is_wrong_is_refused(tmp_path: Path, table: bytes, message: str) -> None:
    write(tmp_path, {"labels.csv": table, "1.png": picture()})
    with pytest.raises(DataError, match=message):
        open_data(tmp_path, TASK)


def test_labels_csv_in_a_deeper_folder_is_pointed_out(tmp_path: Path) -> None:
    write(tmp_path, {"val/labels.csv": b"file,label\n", "val/1.png": picture()})
    with pytest.raises(DataError, match=r"labels.csv in a folder \(val/labels.csv\)"):
        open_data(tmp_path, TASK)


def test_damaged_zips_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(b"no zip")
    with pytest.raises(DataError, match="not a readable .zip"):
        open_data(tmp_path / "data.zip", TASK)
    path = zipped(tmp_path / "data.zip", {"labels.csv": b"file,label\n1.png,0\n", "1.png": picture()})
    path.write_bytes(path.read_bytes().replace(b"IHDR", b"IHDX", 1))
    with pytest.raises(DataError, match="cannot be read: Bad CRC"):
        list(open_data(path, TASK))


@pytest.mark.parametrize("content", [b"", b"text", picture()[:40], b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_unreadable_picture_is_named(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, {"labels.csv": b"file,label\nbad.png,0\n", "bad.png": content})
    data = open_data(tmp_path, TASK)  # pictures are decoded late
    with pytest.raises(DataError, match="bad.png cannot be read as a picture"):
        list(data)


def test_picture_of_16_bits_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"labels.csv": b"file,label\n1.png,0\n", "1.png": picture(mode="I;16")})
    with pytest.raises(DataError, match=r"1.png holds more than 8 bits a pixel \(mode I;16\)"):
        list(open_data(tmp_path, TASK))


def test_missing_unknown_and_empty_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist: expected an .npz"):
        open_data(tmp_path / "nowhere", TASK)
    (tmp_path / "data.txt").touch()
    with pytest.raises(DataError, match="no known kind of labelled data"):
        open_data(tmp_path / "data.txt", TASK)
    with pytest.raises(DataError, match="holds no labelled pictures"):
        open_data(tmp_path, TASK)


def test_tasks_without_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the task's is \(7,\): give tensors"):
        open_data(tmp_path, Task(shape=(7,)))
    with pytest.raises(DataError, match="pictures have 1 or 3 channels"):
        open_data(tmp_path, Task(shape=(4, 4, 4)))


# ---------------------------------------------------------------- resizing and cropping


def test_picture_is_resized_and_its_centre_cropped(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 13, 3), dtype=np.uint8))
    noise.save(tmp_path / "1.png")
    (tmp_path / "labels.csv").write_bytes(b"file,label\n1.png,0\n")
    inputs, _ = all_of(open_data(tmp_path, Task(shape=(3, 4, 4), resize=7)))
    expected = np.asarray(noise.resize((9, 7), Image.Resampling.BILINEAR))[2:6, 2:6]
    torch.testing.assert_close(inputs[0], torch.from_numpy(expected.copy()).permute(2, 0, 1) / 255)


@pytest.mark.parametrize(("size", "cross"), [((36, 12), 0), ((12, 36), 1)])
def test_without_resize_the_crop_is_as_large_as_fits(tmp_path: Path, size: tuple[int, int], cross: int) -> None:
    image = Image.new("RGB", size)
    middle = (12, 0, 24, 12) if cross == 0 else (0, 12, 12, 24)
    image.paste((0, 255, 0), middle)
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "1.png")
    inputs, _ = all_of(open_data(tmp_path, Task(shape=(3, 4, 4))))
    green = inputs[0, 1] if cross else inputs[0, 1].T
    assert (green[1:3] > 0.99).all()  # rows, or columns, of the middle third
    assert (green[0] < 1).all() and (green[3] < 1).all()  # where the bilinear filter reaches over its edge


def test_crop_larger_than_the_picture_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a/1.png": picture()})
    with pytest.raises(DataError, match="1.png is 3 x 3 pixels after resizing, too small for the crop 4 x 4"):
        list(open_data(tmp_path, Task(shape=(3, 4, 4), resize=3)))


# ---------------------------------------------------------------- batches


def test_batches_are_smaller_for_large_inputs() -> None:
    assert inputs_per_batch((3, 32, 32)) == 256
    assert 1 < inputs_per_batch((3, 224, 224)) < 64
    assert inputs_per_batch((3, 4000, 4000)) == 1


def test_take_keeps_the_order_given(tmp_path: Path) -> None:
    data = open_data(npz(tmp_path, x_test=PIXELS, y_test=LABELS), TASK)
    whole, _ = all_of(data)
    inputs, labels = all_of(data.take(torch.tensor([4, 1])).take(torch.tensor([1, 0])))
    assert torch.equal(inputs, whole[[1, 4]]) and labels == [1, 0]


def test_two_tensors_become_batches() -> None:
    inputs, labels = torch.zeros(300, 3, 4, 6), torch.arange(300)
    batches = list(batches_of((inputs, labels), TASK))
    assert [len(part) for part, _ in batches] == [256, 44] and batches[1][1][0] == 256
    with pytest.raises(DataError, match=r"labels have the shape \(300,\) for inputs \(299, 3, 4, 6\)"):
        batches_of((inputs[1:], labels), TASK)
