"""Images of every kind, through open_image, in training, evaluation and prediction."""
import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
import mkt
from data import MultiLabelDataset, UserError, open_image

# pytest undoes data.py's own filter
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


# ---- open_image

def test_upright_whatever_the_exif_orientation_says(tmp_path):
    corners = np.zeros((20, 30, 3), np.uint8)
    corners[:10, :15] = 255  # the upper left quarter is white
    upright = Image.fromarray(corners)
    # how each orientation is stored: undoing it must give `upright` back
    stored = {1: upright, 2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
              3: upright.transpose(Image.Transpose.ROTATE_180),
              6: upright.transpose(Image.Transpose.ROTATE_90),
              8: upright.transpose(Image.Transpose.ROTATE_270)}
    for orientation, image in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for suffix in ("png", "jpg"):
            path = tmp_path / f"{orientation}.{suffix}"
            image.save(path, exif=exif, **({"quality": 100} if suffix == "jpg" else {}))
            opened = np.asarray(open_image(path)).astype(int)
            assert opened.shape == (20, 30, 3)
            assert abs(opened - corners).mean() < 8, (orientation, suffix)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_hide_the_pixels(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (8, 8), (0, 0, 255)).save(path, exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff\0")
    assert open_image(path).getpixel((4, 4))[2] > 250


@pytest.mark.parametrize("mode, colour, expected", [
    ("L", 100, (100, 100, 100)),
    ("1", 1, (255, 255, 255)),
    ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ("LA", (0, 0), (255, 255, 255)),
    ("LA", (100, 255), (100, 100, 100)),
    ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
    ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
    ("RGBA", (255, 0, 0, 51), (255, 204, 204)),  # a fifth red on white
    ("I;16", 65535, (255, 255, 255)),
    ("I;16", 257 * 100, (100, 100, 100)),
    ("I;16", 1000, (4, 4, 4)),  # 3.9; not clipped to white
    ("I", 257 * 100, (100, 100, 100)),
])
def test_every_mode_becomes_rgb(tmp_path, mode, colour, expected):
    path = tmp_path / ("a.tif" if mode in ("CMYK", "I") else "a.png")
    Image.new(mode, (4, 3), colour).save(path)
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (4, 3))
    assert np.abs(np.subtract(image.getpixel((1, 1)), expected)).max() <= 1


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    red, green, blue = open_image(tmp_path / "a.jpg").getpixel((8, 8))
    assert red > 240 and green < 15 and blue < 15


def test_palette(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "transparent.png", transparency=0)
    image.save(tmp_path / "half.png", transparency=bytes([128, 255]))
    plain, transparent, half = (open_image(tmp_path / f"{name}.png")
                                for name in ("plain", "transparent", "half"))
    assert [plain.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (0, 0, 255)]
    assert [transparent.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)]
    assert half.getpixel((0, 0)) == (255, 127, 127)


def test_colour_marked_as_transparent_in_an_rgb_file(tmp_path):
    Image.new("RGB", (2, 2), (9, 8, 7)).save(tmp_path / "a.png", transparency=(9, 8, 7))
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def test_file_object_stays_open():
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (1, 2, 3)).save(file, "PNG")
    file.seek(0)
    assert open_image(file).getpixel((0, 0)) == (1, 2, 3)
    assert not file.closed


def png_without_pixels(width, height):
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    header = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 9) + b"IDAT"


def test_unreadable_files_are_named_with_the_reason(tmp_path):
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8))
    for suffix in ("jpg", "png"):
        noise.save(tmp_path / f"whole.{suffix}")
        whole = (tmp_path / f"whole.{suffix}").read_bytes()
        (tmp_path / f"truncated.{suffix}").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("<html>404 not found</html>")
    (tmp_path / "bomb.png").write_bytes(png_without_pixels(30000, 30000))
    (tmp_path / "large.png").write_bytes(png_without_pixels(20000, 20000))
    (tmp_path / "folder.jpg").mkdir()
    Image.new("F", (2, 2), 0.5).save(tmp_path / "float.tif")
    Image.new("I", (2, 2), 70000).save(tmp_path / "integer.tif")
    for name, reason in [
            ("truncated.jpg", "truncated"), ("truncated.png", "truncated"),
            ("empty.jpg", "is empty"), ("text.jpg", "not an image"),
            ("bomb.png", "decompression bomb"),
            ("large.png", "20000 x 20000 is more than 200,000,000 pixels"),
            ("absent.jpg", "No such file"), ("folder.jpg", "Is a directory"),
            ("float.tif", "no defined range"), ("integer.tif", "no defined range")]:
        with pytest.raises(UserError) as error:
            open_image(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: ")
        assert reason in str(error.value)
        assert "\n" not in str(error.value)


# ---- in training, evaluation and prediction

def blocks(*colours):
    """Four blocks of 64 x 48 pixels in these colours: uint8 [96, 128, 3]."""
    pixels = np.array(colours, np.uint8).reshape(2, 2, 3)
    return pixels.repeat(48, axis=0).repeat(64, axis=1)


WHITE, RED, BLUE, BLACK, GREY = (255,) * 3, (255, 0, 0), (0, 0, 255), (0,) * 3, (100,) * 3
COLOURED, GREYS = blocks(BLUE, RED, BLACK, WHITE), blocks(BLACK, GREY, WHITE, GREY)
# name -> the pixels it shows
READABLE = {"rotated.jpg": COLOURED, "cmyk.jpg": COLOURED, "cmyk.tif": COLOURED,
            "transparent.png": blocks(WHITE, RED, BLACK, WHITE), "first.gif": COLOURED,
            "16 bits.png": GREYS, "grey.png": GREYS, "grey.jpg": GREYS}
UNREADABLE = {"truncated.jpg": "truncated", "truncated.png": "truncated",
              "zero bytes.jpg": "the file is empty", "text.jpg": "not an image",
              "bomb.png": "20000 x 20000 is more than 200,000,000 pixels"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    coloured, greys = Image.fromarray(COLOURED), Image.fromarray(GREYS).convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = coloured.transpose(Image.Transpose.ROTATE_90)
    turned.save(folder / "rotated.jpg", exif=exif, quality=95)
    coloured.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    coloured.convert("CMYK").save(folder / "cmyk.tif")
    palette = coloured.quantize(4)
    palette.save(folder / "transparent.png", transparency=palette.getpixel((0, 0)))  # the blue
    coloured.save(folder / "first.gif", save_all=True,
                  append_images=[Image.new("RGB", coloured.size, c) for c in ("red", "green")])
    Image.fromarray(GREYS[..., 0].astype(np.uint16) * 257).save(folder / "16 bits.png")
    greys.save(folder / "grey.png")
    greys.save(folder / "grey.jpg", quality=95)

    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8))
    for suffix in ("jpg", "png"):
        noise.save(folder / f"truncated.{suffix}")
        whole = (folder / f"truncated.{suffix}").read_bytes()
        (folder / f"truncated.{suffix}").write_bytes(whole[:len(whole) // 2])
    (folder / "zero bytes.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("<html>404 not found</html>")
    (folder / "bomb.png").write_bytes(png_without_pixels(20000, 20000))
    assert sorted(path.name for path in folder.iterdir()) == sorted([*READABLE, *UNREADABLE])
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """MKT as it is before training."""
    args = mkt.parse_arguments(["--device", "cpu"])
    mkt.fill_defaults(args)
    model, _ = mkt.build(vars(args), "cpu")
    path = tmp_path_factory.mktemp("mkt") / "best.pt"
    torch.save({"method": "mkt", "data": "toy", "clip": args.clip, "args": vars(args),
                "labels": data.TOY_LABELS, "clip_fingerprint": model.clip.fingerprint(),
                "model": model.trained()}, path)
    return path


def dataset_of(folder, names, **options):
    return MultiLabelDataset(["a"], torch.ones(len(names), 1, dtype=torch.int8),
                             [str(folder / name) for name in names], **options)


@pytest.mark.parametrize("on_error", ["raise", "replace"])
def test_datasets_show_every_kind_of_image(folder, on_error, capsys):
    dataset = dataset_of(folder, list(READABLE), on_error=on_error)
    for (image, _), (name, expected) in zip(dataset, READABLE.items()):
        difference = np.abs(np.asarray(image).astype(int) - expected)
        # in lossy files the borders of blocks are blurred
        assert difference.mean() < 3 if name.endswith("jpg") else difference.max() == 0, name
    assert dataset.replaced == 0 and capsys.readouterr().err == ""


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_image_in_training_and_evaluation(folder, name, capsys):
    names = [name, "grey.png"]
    with pytest.raises(UserError) as error:
        dataset_of(folder, names)[0]
    assert str(error.value).startswith(f"{folder / name}: ")
    assert UNREADABLE[name] in str(error.value) and "\n" not in str(error.value)
    dataset = dataset_of(folder, names, on_error="replace")
    for _ in range(2):
        assert np.array_equal(np.asarray(dataset[0][0]), GREYS)
    assert dataset.replaced == 1
    assert capsys.readouterr().err == f"{error.value} (another image takes its place)\n"


def predictions(paths, checkpoint, capsys):
    mkt.main(["--predict", *map(str, paths), "--checkpoint", str(checkpoint), "--quiet"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [{label["label"]: label["score"] for label in line["labels"]} for line in lines]


def test_predictions_of_every_kind_of_image(folder, checkpoint, tmp_path, capsys):
    scores = predictions([folder / name for name in READABLE], checkpoint, capsys)
    for i, pixels in enumerate(READABLE.values()):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    plain = predictions([tmp_path / f"{i}.png" for i in range(len(READABLE))], checkpoint, capsys)
    for name, a, b in zip(READABLE, scores, plain):
        assert a == pytest.approx(b, abs=0.02 if name.endswith("jpg") else 2e-4), name
    coloured, greys = plain[0], plain[-1]  # they are far enough apart for that to mean something
    assert max(abs(coloured[label] - greys[label]) for label in coloured) > 0.1


@pytest.mark.parametrize("name", UNREADABLE)
def test_prediction_names_an_unreadable_image(folder, checkpoint, name, capsys):
    with pytest.raises(SystemExit) as error:
        predictions([folder / "grey.png", folder / name], checkpoint, capsys)
    printed = capsys.readouterr()
    assert error.value.code == 1 and len(printed.out.splitlines()) == 1  # the other one's scores
    message = printed.err.strip()
    assert message.startswith(f"{folder / name}: ")
    assert UNREADABLE[name] in message and "\n" not in message
