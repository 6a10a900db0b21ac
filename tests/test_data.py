"""Image data sets: every source gives the same images and labels, and every damaged one an error that names it."""

from __future__ import annotations

import io
import json
import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bench.data import DataError, ImageData, decode, load_images

N = 6
LABELS = np.array([0, 0, 1, 1, 1, 2])  # in order, as sub-folders put them


def pixels(channels: int) -> np.ndarray:
    """(N, C, 5, 7) uint8: height and width differ, so that a transposition shows."""
    return np.random.default_rng(channels).integers(0, 256, (N, channels, 5, 7), dtype=np.uint8)


def encode(image: np.ndarray, form: str = "PNG") -> bytes:
    """A (C, H, W) image as a file."""
    buffer = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(buffer, form)
    return buffer.getvalue()


def parquet(folder: Path, images: np.ndarray) -> Path:
    rows = [{"bytes": encode(image), "path": f"{i}.png"} for i, image in enumerate(images)]
    pq.write_table(pa.table({"image": rows, "label": LABELS}), folder / "data.parquet")
    return folder / "data.parquet"


def parquet_of_bytes(folder: Path, images: np.ndarray) -> Path:
    pq.write_table(pa.table({"label": LABELS, "image": [encode(i) for i in images]}), folder / "plain.parquet")
    return folder / "plain.parquet"


def indexed_folder(folder: Path, images: np.ndarray) -> Path:
    root = folder / "indexed"
    (root / "00000").mkdir(parents=True)
    names = [f"00000/img{i:08d}.png" for i in range(len(images))]
    for name, image in zip(names, images, strict=True):
        (root / name).write_bytes(encode(image))
    listed = [[name, int(label)] for name, label in zip(names, LABELS, strict=True)]
    (root / "dataset.json").write_text(json.dumps({"labels": listed[::-1]}))
    return root


def class_folders(folder: Path, images: np.ndarray) -> Path:
    root = folder / "classes"
    for i, (image, label) in enumerate(zip(images, LABELS, strict=True)):
        file = root / f"class-{label}" / f"{i}.bmp"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(image, "BMP"))
    (root / "class-0" / "notes.txt").write_text("not an image")
    (root / "class-0" / "._0.bmp").write_bytes(b"a hidden file")
    return root


def edm_zip(folder: Path, images: np.ndarray) -> Path:
    root, file = indexed_folder(folder, images), folder / "data.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for name in sorted(root.rglob("*.*"), reverse=True):
            archive.write(name, name.relative_to(root).as_posix())
        archive.writestr("__MACOSX/img00000000.png", b"a copy that macOS adds")
    return file


def npz(folder: Path, images: np.ndarray) -> Path:
    np.savez_compressed(folder / "data.npz", images=images, labels=LABELS.astype(np.int32))
    return folder / "data.npz"


def npz_of_samples(folder: Path, images: np.ndarray) -> Path:
    np.savez(folder / "samples.npz", images.transpose(0, 2, 3, 1), LABELS.astype(float))
    return folder / "samples.npz"


SOURCES = [parquet, parquet_of_bytes, indexed_folder, class_folders, edm_zip, npz, npz_of_samples]
Source = Callable[[Path, np.ndarray], Path]
every_source = pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.__name__)


def refused(path: Path, *words: str) -> None:
    """The data set is refused, with a message that holds the path and the words."""
    with pytest.raises(DataError) as caught:
        load_images(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


@every_source
@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "RGB"])
@pytest.mark.parametrize("limit", [None, 1, 4, 100])
def test_every_source_gives_the_same_images_and_labels(
    source: Source, channels: int, limit: int | None, tmp_path: Path
) -> None:
    images = pixels(channels)
    data = load_images(str(source(tmp_path, images)), limit)
    np.testing.assert_array_equal(data.images, images[:limit])
    assert data.labels is not None
    np.testing.assert_array_equal(data.labels, LABELS[:limit])
    assert (data.images.dtype, data.labels.dtype) == (np.uint8, np.int64)
    assert data.images.flags.c_contiguous
    assert len(data) == len(images[:limit])


def test_grey_npz_without_a_channel_axis(tmp_path: Path) -> None:
    np.savez(tmp_path / "flat.npz", images=pixels(1)[:, 0])
    data = load_images(tmp_path / "flat.npz")
    np.testing.assert_array_equal(data.images, pixels(1))
    assert data.labels is None


def test_labels_are_none_where_the_source_has_none(tmp_path: Path) -> None:
    encoded = [encode(image) for image in pixels(1)]
    pq.write_table(pa.table({"image": encoded}), tmp_path / "data.parquet")
    flat, single, null = tmp_path / "flat", tmp_path / "single", tmp_path / "null"
    for folder in (flat, single / "only", null / "a", null / "b"):
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes(encoded[0])
    (null / "dataset.json").write_text('{"labels": null}')
    for path in (tmp_path / "data.parquet", flat, single, null):
        assert load_images(path).labels is None


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("1", [[[0, 255]]]),
        ("L", [[[0, 200]]]),
        ("LA", [[[0, 200]]]),
        ("I;16", [[[0, 200]]]),
        ("P", [[[0, 200]], [[0, 200]], [[0, 200]]]),
        ("RGBA", [[[0, 200]], [[0, 200]], [[0, 200]]]),
    ],
)
def test_decode_gives_one_channel_for_grey_and_three_otherwise(mode: str, expected: list[Any]) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.array([[100, 200 * 256 + 99]], dtype=np.uint16))
    else:
        image = Image.fromarray(np.array([[0, 200]], dtype=np.uint8)).convert("RGB" if mode == "P" else "L")
        image = image.convert(mode, palette=Image.Palette.ADAPTIVE) if mode == "P" else image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    np.testing.assert_array_equal(decode(buffer.getvalue(), "x"), np.array(expected, dtype=np.uint8))


def test_decode_refuses_floating_point_pixels() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0.5]], dtype=np.float32)).save(buffer, "TIFF")
    with pytest.raises(DataError, match=r"here is not a readable image: its pixels are floating-point"):
        decode(buffer.getvalue(), "here")


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=re.escape(str(tmp_path / "nothing.npz")) + ".*parquet.*folder.*zip.*npz"
    ):
        load_images(tmp_path / "nothing.npz")


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"limit must be at least 1.*got {limit}"):
        load_images(npz(tmp_path, pixels(1)), limit)


def test_an_unknown_suffix_is_refused_and_the_known_ones_named(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("1,2")
    refused(tmp_path / "data.csv", ".parquet", "folder", ".zip", ".npz")


@pytest.mark.parametrize("source", [parquet, edm_zip, npz], ids=lambda s: s.__name__)
@pytest.mark.parametrize("damage", ["empty", "text", "half", "overwritten"])
def test_a_damaged_file_is_named(source: Source, damage: str, tmp_path: Path) -> None:
    path = source(tmp_path, pixels(3))
    content = path.read_bytes()
    spoilt = {
        "empty": b"",
        "text": b"this is neither of them",
        "half": content[: len(content) // 2],
        "overwritten": content[:100] + bytes(200) + content[300:],
    }
    path.write_bytes(spoilt[damage])
    refused(path)


def test_every_damage_to_a_zip_or_an_npz_is_a_data_error_or_harmless(tmp_path: Path) -> None:
    rng, messages = np.random.default_rng(0), []
    for path in (edm_zip(tmp_path, pixels(1)), npz(tmp_path, pixels(1))):
        content = path.read_bytes()
        for at in rng.integers(0, len(content), 150):
            path.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
            try:
                load_images(path)
            except DataError as error:
                messages.append(str(error))
    assert len(messages) > 50
    assert all(str(tmp_path) in message for message in messages)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_a_damaged_image_is_named(form: str, tmp_path: Path) -> None:
    folder = class_folders(tmp_path, pixels(1))
    file = folder / "class-1" / "3.bmp"
    file.write_bytes(encode(np.random.default_rng(0).integers(0, 256, (3, 40, 40), dtype=np.uint8), form)[:300])
    refused(folder, "class-1/3.bmp", "not a readable image")


def test_a_damaged_image_in_a_parquet_file_is_named_by_its_row(tmp_path: Path) -> None:
    encoded = [encode(image) for image in pixels(1)]
    encoded[4] = encoded[4][:40]
    pq.write_table(pa.table({"image": encoded}), tmp_path / "data.parquet")
    refused(tmp_path / "data.parquet", "row 4")
    assert len(load_images(tmp_path / "data.parquet", limit=4)) == 4


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"img": [b"1"], "label": [1]}, ("no column 'image'", "['img', 'label']")),
        ({"image": [1, 2]}, ("row 0", "encoded bytes", "int")),
        ({"image": [{"path": "0.png"}]}, ("row 0", "struct with 'bytes'", "NoneType")),
        ({"image": [{"bytes": None, "path": "0.png"}]}, ("row 0", "NoneType")),
        ({"image": [encode(pixels(1)[0])], "label": [None]}, ("label", "None")),
        ({"image": [encode(pixels(1)[0])], "label": ["cat"]}, ("label", "'cat'")),
        ({"image": [encode(pixels(1)[0])], "label": [0.5]}, ("label", "0.5")),
        ({"image": pa.array([], pa.binary())}, ("no images",)),
    ],
)
def test_parquet_columns_that_do_not_fit_are_refused(
    table: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    pq.write_table(pa.table(table), tmp_path / "data.parquet")
    refused(tmp_path / "data.parquet", *words)


class Trap:
    """Unpickling it creates the file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("wrapped", [True, False], ids=["object array", "bare pickle"])
def test_an_npz_with_pickled_objects_is_refused_unread(wrapped: bool, tmp_path: Path) -> None:
    path, trace = tmp_path / "data.npz", tmp_path / "unpickled"
    if wrapped:
        np.savez(path, images=np.array([Trap(trace)], dtype=object))
    else:
        path.write_bytes(pickle.dumps(Trap(trace)))
    refused(path, "without pickled objects")
    assert not trace.exists()
    if wrapped:
        np.load(path, allow_pickle=True)["images"]
    else:
        pickle.loads(path.read_bytes())
    assert trace.exists(), "the trap does not work, so the test shows nothing"


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"pictures": np.zeros((2, 1, 4, 4), np.uint8)}, ("no array 'images'",)),
        ({"images": np.zeros((2, 1, 4, 4))}, ("uint8", "(2, 1, 4, 4) float64")),
        ({"images": np.zeros((2, 4, 4, 5), np.uint8)}, ("1 or 3", "(2, 5, 4, 4)")),
        ({"images": np.uint8(3)}, ("(1,) uint8",)),
        ({"images": np.zeros((0, 1, 4, 4), np.uint8)}, ("no images",)),
        ({"images": np.zeros((2, 1, 4, 4), np.uint8), "labels": np.zeros(3, int)}, ("(2,)", "got (3,)")),
        ({"images": np.zeros((2, 1, 4, 4), np.uint8), "labels": np.eye(2)}, ("one whole number",)),
        ({"images": np.zeros((2, 1, 4, 4), np.uint8), "labels": np.array([0, np.nan])}, ("whole number", "nan")),
    ],
)
def test_npz_arrays_that_do_not_fit_are_refused(arrays: dict[str, Any], words: tuple[str, ...], tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    refused(tmp_path / "data.npz", *words)


def test_a_single_array_named_npz_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "data.npz").open("wb") as file:
        np.save(file, pixels(1))
    refused(tmp_path / "data.npz", "not a readable .npz")


@pytest.mark.parametrize("odd", [pixels(1)[0][:, :4], pixels(3)[0]], ids=["size", "channels"])
def test_unequal_images_are_refused(odd: np.ndarray, tmp_path: Path) -> None:
    folder = class_folders(tmp_path, pixels(1))
    (folder / "class-1" / "3.bmp").write_bytes(encode(odd))
    refused(folder, "class-1/3.bmp", str(odd.shape), "(1, 5, 7)")


def test_no_images_are_refused(tmp_path: Path) -> None:
    folder, file = tmp_path / "empty", tmp_path / "empty.zip"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "notes.txt").write_text("nothing")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "nothing")
    refused(folder, "no images", ".png")
    refused(file, "no images", ".png")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"labels": [["00000/img00000000.png", 0]]}', ("no label for '00000/img00000001.png'",)),
        ('{"labels": [["00000/img00000000.png"]]}', ("dataset.json must hold",)),
        ('{"labels": 3}', ("dataset.json must hold",)),
        ("[1, 2]", ("dataset.json must hold",)),
        ("not JSON", ("dataset.json must hold",)),
        (
            json.dumps({"labels": [[f"00000/img{i:08d}.png", [0.0, 1.0]] for i in range(N)]}),
            ("one whole number", "[0.0, 1.0]"),
        ),
    ],
)
def test_a_dataset_json_that_does_not_fit_is_refused(content: str, words: tuple[str, ...], tmp_path: Path) -> None:
    folder = indexed_folder(tmp_path, pixels(1))
    (folder / "dataset.json").write_text(content)
    refused(folder, *words)


def test_a_label_is_only_needed_for_the_images_that_are_read(tmp_path: Path) -> None:
    folder = indexed_folder(tmp_path, pixels(1))
    (folder / "dataset.json").write_text('{"labels": [["00000/img00000000.png", 2]]}')
    labels = load_images(folder, limit=1).labels
    assert labels is not None
    assert labels.tolist() == [2]


def test_image_data_checks_its_arrays() -> None:
    images = pixels(1)
    with pytest.raises(DataError, match=r"images must be .* uint8, got \(6, 5, 7\)"):
        ImageData(images[:, 0], None)
    with pytest.raises(DataError, match=r"labels must be \(6,\) int64.*got \(6,\) float64"):
        ImageData(images, np.zeros(6))


# ---- the options of EDM's readers ----


@every_source
def test_labels_that_are_not_used_are_neither_read_nor_checked(source: Source, tmp_path: Path) -> None:
    data = load_images(source(tmp_path, pixels(1)), use_labels=False)
    np.testing.assert_array_equal(data.images, pixels(1))
    assert data.labels is None


def test_labels_that_cannot_be_read_hinder_only_who_uses_them(tmp_path: Path) -> None:
    folder = indexed_folder(tmp_path, pixels(1))
    (folder / "dataset.json").write_text("not JSON")
    np.savez(tmp_path / "data.npz", images=pixels(1), labels=np.full(N, 0.5))
    pq.write_table(pa.table({"image": [encode(i) for i in pixels(1)], "label": ["cat"] * N}), tmp_path / "data.parquet")
    for path in (folder, tmp_path / "data.npz", tmp_path / "data.parquet"):
        assert len(load_images(path, use_labels=False)) == N
        refused(path)


def test_mirrored_images_follow_the_limited_set_with_its_labels(tmp_path: Path) -> None:
    images = pixels(3)
    data = load_images(npz(tmp_path, images), limit=4, xflip=True)
    np.testing.assert_array_equal(data.images[:4], images[:4])
    for image, mirrored in zip(images[:4], data.images[4:], strict=True):
        np.testing.assert_array_equal(mirrored, np.stack([np.fliplr(channel) for channel in image]))
    assert data.labels is not None
    np.testing.assert_array_equal(data.labels, np.tile(LABELS[:4], 2))


def test_a_resolution_is_checked_in_height_and_width(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.npz: images must be 7 x 7, the resolution asked for, got 5 x 7"):
        load_images(npz(tmp_path, pixels(1)), resolution=7)
    assert load_images(npz(tmp_path, pixels(1)[:, :, :, :5]), resolution=5).images.shape == (N, 1, 5, 5)
    with pytest.raises(ValueError, match="resolution must be at least 1, or None for any, got 0"):
        load_images(npz(tmp_path, pixels(1)), resolution=0)


# ---- the library datasets ----


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """`saved(split=images)`: a folder of the library with those splits, or with one nameless set."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()

    def save(columns: tuple[str, str] = ("img", "label"), **splits: np.ndarray) -> Path:
        def table(images: np.ndarray) -> Any:
            encoded = [{"bytes": encode(image), "path": None} for image in images]
            features = datasets.Features({columns[0]: datasets.Image(), columns[1]: datasets.Value("int64")})
            rows = {columns[0]: encoded, columns[1]: LABELS[: len(images)].tolist()}
            return datasets.Dataset.from_dict(rows, features=features)

        made = {name: table(images) for name, images in splits.items()}
        (made["whole"] if "whole" in made else datasets.DatasetDict(made)).save_to_disk(str(tmp_path / "saved"))
        return tmp_path / "saved"

    return save


@pytest.mark.parametrize("columns", [("img", "label"), ("image", "labels"), ("img", "fine_label")], ids=str)
def test_a_saved_data_set_gives_the_images_of_each_split(saved: Callable[..., Path], columns: tuple[str, str]) -> None:
    folder = saved(columns, train=pixels(3), test=pixels(3)[::-1][:4])
    for name, expected in ((f"hf:{folder}", pixels(3)), (f"hf:{folder}:test", pixels(3)[::-1][:4])):
        data = load_images(name)
        np.testing.assert_array_equal(data.images, expected)
        assert data.labels is not None
        np.testing.assert_array_equal(data.labels, LABELS[: len(expected)])
    data = load_images(f"hf:{folder}:train", limit=2, use_labels=False)
    assert (len(data), data.labels) == (2, None)


def test_a_saved_data_set_without_splits(saved: Callable[..., Path]) -> None:
    np.testing.assert_array_equal(load_images(f"hf:{saved(whole=pixels(1))}").images, pixels(1))


def test_an_unknown_split_lists_the_splits(saved: Callable[..., Path]) -> None:
    name = f"hf:{saved(train=pixels(1), test=pixels(1))}:validation"
    with pytest.raises(DataError, match=r"split must be one of \['test', 'train'\], got 'validation'"):
        load_images(name)


def test_columns_of_a_saved_data_set_that_do_not_fit_are_named(saved: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of the columns image, img \(columns: \['picture', 'label'\]\)"):
        load_images(f"hf:{saved(('picture', 'label'), train=pixels(1))}")
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"image": [1, 2]}).save_to_disk(str(tmp_path / "numbers"))
    with pytest.raises(DataError, match="column 'image' holds no images"):
        load_images(f"hf:{tmp_path / 'numbers'}")


def test_a_damaged_saved_data_set_is_named(saved: Callable[..., Path]) -> None:
    folder = saved(train=pixels(1))
    next(folder.rglob("*.arrow")).write_bytes(b"not arrow")
    with pytest.raises(DataError, match=rf"hf:{re.escape(str(folder))} cannot be loaded by datasets"):
        load_images(f"hf:{folder}")


def test_images_that_are_only_named_are_read_from_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    folder = class_folders(tmp_path, pixels(3))
    paths = [str(next(folder.rglob(f"{i}.bmp"))) for i in range(1, N)]
    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_dict({"image": paths}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    np.testing.assert_array_equal(load_images("hf:pictures").images, pixels(3)[1:])


def test_any_other_name_goes_to_the_library_with_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets, asked = pytest.importorskip("datasets"), []

    def load_dataset(name: str, split: str) -> Any:
        asked.append((name, split))
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("hf:cifar10", "hf:uoft-cs/cifar10:test"):
        with pytest.raises(DataError, match=f"{name} cannot be loaded by datasets: ConnectionError: no network"):
            load_images(name)
    assert asked == [("cifar10", "train"), ("uoft-cs/cifar10", "test")]
    with pytest.raises(DataError, match="names no data set"):
        load_images("hf:")


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"'hf:cifar10' needs the package datasets: pip install 'fewstep\[hf\]'"):
        load_images("hf:cifar10")
