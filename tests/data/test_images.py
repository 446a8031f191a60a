"""Images: what their rows hold, worked out by hand, what training changes, and every bad file."""

import contextlib
import gzip
import json
import struct

import numpy as np
import pytest

from fmjax import data
from fmjax.data import order
from fmjax.data.images import augmentation, sources
from fmjax.data.images.augmentation import Augmentation, augmented
from fmjax.errors import ConfigError, DataError

PIXELS = np.arange(2 * 2 * 3).reshape(2, 2, 3) * 20


def idx(array, kind=8, sizes=None):
    """The bytes of an idx file."""
    array = np.asarray(array, np.uint8)
    sizes = array.shape if sizes is None else sizes
    head = bytes([0, 0, kind, len(sizes)]) + struct.pack(f">{len(sizes)}i", *sizes)
    return head + array.tobytes()


@pytest.fixture
def files(tmp_path):
    """files(images=…, labels=…, name=…): the path of a file of images, with its labels beside."""

    def files(images=None, labels=None, name="train"):
        path = tmp_path / f"{name}-images-idx3-ubyte"
        path.write_bytes(idx(PIXELS) if images is None else images)
        beside = tmp_path / f"{name}-labels-idx1-ubyte"
        beside.write_bytes(idx([1, 0]) if labels is None else labels)
        return str(path)

    return files


@pytest.fixture
def prepare(tmp_path):
    """prepare(**config.data): prepared images, in a cache of their own."""

    def prepare(log=lambda line: None, **settings):
        defaults = dict(format="images", cache=str(tmp_path / "cache"), validation_fraction=0.0)
        return data.prepare(defaults | settings, log=log)

    return prepare


# ---- rows ----


def test_rows_of_a_file_by_hand(files, prepare):
    dataset = prepare(name="idx", train=files())
    split = dataset.splits["train"]
    batch = split.rows(np.array([1, 0]))
    # 120 of 255 is 0.4706, which is -0.0588 around 0.
    assert batch["images"][0, 0, :, 0] == pytest.approx(
        [2 * x / 255 - 1 for x in (120, 140, 160)], abs=1e-6
    )
    assert batch["images"][0, 0, 0, 0] == pytest.approx(-0.0588, abs=1e-4)
    assert batch["images"].shape == (2, 2, 3, 1) and batch["images"].dtype == np.float32
    assert batch["labels"].tolist() == [0, 1] and batch["labels"].dtype == np.int32
    assert dataset.labels == ("0", "1") and dataset.target == "classes"
    assert dataset.facts["image_shape"] == (2, 3, 1) and dataset.unit == "images"
    assert (len(split), split.unit_count, split.row_units, split.row_size) == (
        2, 2, 1, "2 x 3 pixels",
    )  # fmt: skip
    assert split.units(batch).tolist() == [1, 1] and split.widths(np.arange(2)).tolist() == [1, 1]
    assert dataset.texts({"index": np.array([7])}) == ["image 7"]


def test_the_processor_makes_the_same_numbers(files, prepare):
    dataset = prepare(name="idx", train=files())
    config = json.loads(
        (dataset.processors["image_processor"] / "preprocessor_config.json").read_text()
    )
    pixels = PIXELS[..., None] * config["rescale_factor"]
    expected = (pixels - config["image_mean"][0]) / config["image_std"][0]
    np.testing.assert_allclose(
        dataset.splits["train"].rows(np.arange(2))["images"], expected, atol=1e-6
    )
    assert config["size"] == {"height": 2, "width": 3}


def test_validation_files_and_colours(files, prepare):
    colours = idx(np.arange(24).reshape(1, 2, 4, 3))
    train = files(colours, idx([2]))
    validation = files(colours, idx([0]), name="t10k")
    dataset = prepare(name="idx", train=train, validation=validation, classes=("a", "b", "c"))
    assert dataset.splits["validation"].labels.tolist() == [0]
    assert dataset.labels == ("a", "b", "c") and dataset.image_shape == (2, 4, 3)
    assert dataset.splits["train"].row_size == "2 x 4 pixels of 3 colours"
    first = dataset.splits["train"].rows(np.array([0]))["images"][0, 0, 1]
    np.testing.assert_allclose(first, np.array([3, 4, 5]) / 127.5 - 1, atol=1e-6)


def test_compressed_files_are_those_of_their_contents(files, tmp_path, prepare):
    plain = prepare(name="idx", train=files())
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    packed = prepare(name="idx", train=str(tmp_path / "train-images-idx3-ubyte.gz"))
    assert packed.digest == plain.digest


def test_equal_images_of_digits_are_never_in_both_splits(prepare):
    dataset = prepare(validation_fraction=0.2)
    images = {
        name: {image.tobytes() for image in split.rows(np.arange(len(split)))["images"]}
        for name, split in dataset.splits.items()
    }
    assert not images["train"] & images["validation"]
    sizes = {name: len(split) for name, split in dataset.splits.items()}
    assert sizes == {"train": 1423, "validation": 374}
    # Every class is in both, at about its share.
    for split in dataset.splits.values():
        shares = np.bincount(split.labels, minlength=10) / len(split)
        assert (np.abs(shares - 0.1) < 0.04).all()


def test_a_stand_in_tells_shapes_without_reading_images(files):
    cut = idx(PIXELS)[:20]  # whose end is missing
    spec = data.stand_in(dict(format="images", name="idx", train=files(cut)), {})
    assert spec.facts["image_shape"] == (2, 3, 1) and spec.splits == {}
    assert data.stand_in(dict(format="images"), {}).image_shape == (8, 8, 1)


# ---- augmentation ----


def test_a_shift_by_hand(monkeypatch):
    draws = iter([1.0, 0.75, 0.5, 0.5])  # 1 pixel down, half of one to the right
    monkeypatch.setattr(order, "uniform", lambda *keys: np.full(1, next(draws)))
    image = np.array([[10, 20, 40], [50, 60, 80], [90, 0, 30]], np.uint8)[None, ..., None]
    found = augmented(image, Augmentation(shift=1), 0, np.arange(1))
    expected = [[10, 15, 30], [10, 15, 30], [50, 55, 70]]
    np.testing.assert_array_equal(found[0, ..., 0], expected)


def test_a_quarter_of_a_turn_and_half_the_size_by_hand(monkeypatch):
    image = np.array([[10, 20, 40], [50, 60, 80], [90, 0, 30]], np.uint8)[None, ..., None]
    monkeypatch.setattr(order, "uniform", lambda seed, examples, stream: np.full(
        1, 1.0 if stream == 2 else 0.5
    ))  # fmt: skip
    turned = augmented(image, Augmentation(rotate=90), 0, np.arange(1))[0, ..., 0]
    assert turned.tolist() in (np.rot90(image[0, ..., 0], k).tolist() for k in (1, -1))
    monkeypatch.setattr(order, "uniform", lambda seed, examples, stream: np.full(
        1, 0.0 if stream == 3 else 0.5
    ))  # fmt: skip
    # Half as large: what was a pixel from the centre would be half of one, and beyond is border.
    small = augmented(image, Augmentation(zoom=0.5), 0, np.arange(1))[0, ..., 0]
    np.testing.assert_array_equal(small, image[0, ..., 0])


def test_augmentation_depends_on_the_seed_and_the_example_alone():
    images = sources.digits()[0][:32]
    how, examples = Augmentation(shift=1.5, rotate=20, zoom=0.2), np.arange(1000, 1032)
    whole = augmented(images, how, 7, examples)
    for part in (slice(0, 1), slice(3, 10), slice(31, None, -3)):
        np.testing.assert_array_equal(augmented(images[part], how, 7, examples[part]), whole[part])
    assert whole.dtype == np.uint8 and (whole != images).any(axis=(1, 2, 3)).all()
    assert (augmented(images, how, 8, examples) != whole).any()
    assert (augmented(images, how, 7, examples + 1) != whole).any()


def test_nothing_to_change_changes_nothing():
    images = sources.digits()[0][:5]
    np.testing.assert_array_equal(augmented(images, Augmentation(), 0, np.arange(5)), images)
    assert not Augmentation() and Augmentation(zoom=0.1)


def test_changes_are_of_training_alone_and_uniform(prepare):
    dataset = prepare(shift=1.0)
    split, index = dataset.splits["train"], np.arange(400)
    plain = split.rows(index)["images"]
    np.testing.assert_array_equal(plain, prepare().splits["train"].rows(index)["images"])
    moved = split.rows(index, examples=np.arange(400), seed=0)["images"]
    assert (moved != plain).any(axis=(1, 2, 3)).mean() > 0.99
    # The centre of mass moves in both directions alike.
    rows = np.arange(8)[:, None, None]
    centre = lambda x: ((x + 1) * rows).sum((1, 2, 3)) / (x + 1).sum((1, 2, 3))
    by = centre(moved) - centre(plain)
    assert abs(by.mean()) < 0.03 and np.abs(by).mean() > 0.1


@pytest.mark.parametrize("name", augmentation.LIMITS)
@pytest.mark.parametrize("value", [-1, True, float("nan"), 1000])
def test_what_is_no_amount_is_refused(name, value, prepare):
    with pytest.raises(ConfigError, match=f"config.data.{name}=.* expected a number from 0 to"):
        prepare(**{name: value})


# ---- settings ----


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(shfit=1), r"Unknown key config.data.shfit with .*'images'.*shift"),
        (dict(seq_len=8), "Unknown key config.data.seq_len"),
        (dict(name="digit"), "config.data.name='digit' is no source of images.*digits"),
        (dict(name="idx"), "config.data.name='idx' needs config.data.train"),
        (dict(train="x-images"), "name='digits' comes with its images.*name='idx'"),
        (dict(validation="x-images"), "config.data.validation needs config.data.train"),
        (dict(name="idx", train="digits.gz"), "must have the word images"),
        (dict(classes=("a", "b")), "classes has 2 names, and the images have labels from 0 to 9"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message, prepare):
    with pytest.raises(ConfigError, match=message):
        prepare(**settings)


# ---- bad files ----


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (idx(PIXELS)[:-1], None, "has fewer values than the 12 of an array of shape"),
        (idx(PIXELS) + b"\0", None, "has more values than the 12"),
        (idx(PIXELS, kind=13), None, "is no idx file of bytes"),
        (b"", None, "is no idx file of bytes"),
        (b"\x89PNG" + bytes(30), None, "is no idx file of bytes"),
        (idx(PIXELS)[:9], None, "claims an array of shape"),
        (idx([], sizes=(2**31 - 1,) * 3), None, r"claims an array of shape \[2147483647"),
        (idx([], sizes=(-1, 2, 2)), None, "claims an array of shape"),
        (idx([], sizes=(0, 2, 3)), None, "images are"),
        (idx([1, 2]), None, r"has an array of shape \[2\]: images are"),
        (idx(np.zeros((1, 2, 3, 4))), None, r"shape \[1, 2, 3, 4\]: images are"),
        (None, idx([1, 2, 3]), r"labels.* shape \(3,\), not a label for each of the 2 images"),
        (None, idx([[1, 2]]), r"labels.* shape \(1, 2\), not a label for each"),
        (None, b"", "labels-idx1-ubyte is no idx file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_files_are_refused(images, labels, message, files, prepare, tmp_path):
    with pytest.raises(DataError, match=message) as caught:
        prepare(name="idx", train=files(images, labels))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("images-*/index.json"))


def test_files_that_are_not_there_are_refused(files, prepare, tmp_path):
    path = files()
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="labels-idx1-ubyte does not exist.*labels"):
        prepare(name="idx", train=path)
    with pytest.raises(DataError, match="none-images does not exist"):
        prepare(name="idx", train=str(tmp_path / "none-images"))


@pytest.mark.parametrize("damage", [lambda x: x[:-12], lambda x: x[:-8] + bytes(8), idx])
def test_damaged_compression_is_refused(damage, files, prepare, tmp_path):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx([0] * 50)))
    whole = gzip.compress(idx(np.random.default_rng(0).integers(0, 256, (50, 4, 4))))
    path.write_bytes(idx(PIXELS) if damage is idx else damage(whole))
    with pytest.raises(DataError, match="train-images-idx3-ubyte.gz cannot be read"):
        prepare(name="idx", train=str(path))


def test_images_of_two_shapes_are_refused(files, prepare):
    other = files(idx(np.zeros((2, 3, 3))), name="t10k")
    with pytest.raises(DataError, match="different shapes.*config.data.validation"):
        prepare(name="idx", train=files(), validation=other)


def test_a_split_without_images_is_refused(files, prepare):
    with pytest.raises(DataError, match="no images for .*validation_fraction"):
        prepare(name="idx", train=files(), validation_fraction=1e-9)


# ---- the cache ----


def test_the_cache_is_used_again_and_made_again_after_damage(files, prepare, tmp_path, monkeypatch):
    path, lines = files(), []
    first = prepare(name="idx", train=path)
    read = sources.read
    monkeypatch.setattr(sources, "read", lambda settings: pytest.fail("it was read again"))
    again = prepare(name="idx", train=path, shift=2.0)  # which is done to rows, not in the cache
    assert again.digest == first.digest
    monkeypatch.setattr(sources, "read", read)
    (file,) = (tmp_path / "cache").glob("images-*/train.images.npy")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    repaired = prepare(name="idx", train=path, log=lines.append)
    assert repaired.digest == first.digest and any("damaged" in line for line in lines)
    np.testing.assert_array_equal(repaired.splits["train"].rows(np.arange(2))["labels"], [1, 0])


def test_other_files_under_the_same_name_are_other_data(files, prepare):
    first = prepare(name="idx", train=files())
    second = prepare(name="idx", train=files(labels=idx([1, 1])))
    assert first.digest != second.digest
    assert second.splits["train"].labels.tolist() == [1, 1]


def test_files_that_change_while_they_are_read_are_an_error(files, prepare, monkeypatch):
    path, read = files(), sources.read

    def changed(settings):
        found = read(settings)
        files(labels=idx([1, 1]))
        return found

    monkeypatch.setattr(sources, "read", changed)
    with pytest.raises(DataError, match="have changed while they were read"):
        prepare(name="idx", train=path)


def test_files_that_change_under_a_run_are_an_error(files, prepare, tmp_path):
    split = prepare(name="idx", train=files()).splits["train"]
    (file,) = (tmp_path / "cache").glob("images-*/train.images.npy")
    with open(file, "r+b") as opened:
        opened.write(b"\0")
    with pytest.raises(DataError, match="train.images.npy has been changed while it was read"):
        split.rows(np.arange(2))


# ---- batches ----


def test_batches_are_a_function_of_the_step(prepare):
    """A run that goes on reads what it would have read."""
    dataset = prepare(shift=1.0, rotate=10.0)
    how = dict(batch_size=8, seeds=(3,))
    with contextlib.closing(data.batches(dataset.splits["train"], **how)) as straight:
        rows = [next(straight) for _ in range(3)]
        state, after = straight.state(), next(straight)
    with contextlib.closing(data.batches(dataset.splits["train"], **how)) as other:
        other.restore(json.loads(json.dumps(state)))
        resumed = next(other)
    for name, array in after.items():
        np.testing.assert_array_equal(resumed[name], array, err_msg=name)
    assert {"images", "labels", "index", "units"} <= rows[0].keys()
