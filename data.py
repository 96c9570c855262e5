"""Multi-label datasets: images, label names, and which labels are present, absent or unknown.

    dataset = load_dataset("nuswide", root="data/nuswide", split="test", transform=preprocess)
    image, target = dataset[0]        # transform(PIL image), int8 [C]
    dataset.labels, dataset.targets   # C names, int8 [N, C]
    dataset.seen, dataset.unseen      # int64 label indices

One encoding everywhere: +1 present, -1 absent, 0 unknown (as SST, SARB and HCP have it; DualCoOp
swaps the last two). Every dataset is one function, listed in DATASETS.
"""
import argparse
import contextlib
import copy
import csv
import functools
import glob
import hashlib
import http.client
import inspect
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
import unicodedata
import urllib.error
import urllib.request
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from email.utils import parsedate_to_datetime
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
import torch.nn.functional as F
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler
from torch.utils.data import Subset, TensorDataset
from torchvision import transforms
from tqdm import tqdm

from toy import world

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Pillow warns above 89 million pixels, which some phones exceed; open_image refuses above this
MAX_PIXELS = 200_000_000
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class UserError(ValueError):
    """The data, or what was asked of it, is wrong; the message says what, where and what to do."""

    def __str__(self):
        # a DataLoader repeats a worker's error with the worker's traceback in front
        return super().__str__().rsplit(f"{__name__}.UserError: ", 1)[-1].strip()


def _note(message, quiet=False):
    if not quiet:
        print(message, file=sys.stderr)


# ---- images

def open_image(file):
    """An upright RGB PIL image from a path or a binary file object.

    EXIF rotation is applied, transparency composited on white, 16-bit grey scaled to 8 bits; of
    an animation the first frame is taken. UserError names the file and the reason if it is
    missing, empty, truncated, not an image, larger than MAX_PIXELS, or has pixels without a
    defined range (32-bit integers, floating point).
    """
    is_path = isinstance(file, (str, os.PathLike))
    try:
        with Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width} x {image.height}"
                raise ValueError(f"{size} is more than {MAX_PIXELS:,} pixels")
            if max(image.size) > 100 * min(image.size):  # a short side of 224 would be huge
                raise ValueError(f"{image.width} x {image.height} is too long for its width")
            image.load()  # not reduced by Image.draft, which changes the pixels
        with contextlib.suppress(Exception):  # damaged EXIF says nothing about the pixels
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "I" or image.mode.startswith("I;16"):
            pixels = np.asarray(image).astype(np.int32)
            if pixels.min() < 0 or pixels.max() > 65535:
                raise ValueError("32-bit pixels have no defined range, convert to 8 or 16 bits")
            image = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("floating-point pixels have no defined range, convert to 8 bits")
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except UnidentifiedImageError:
        empty = is_path and os.path.getsize(file) == 0
        reason = "the file is empty" if empty else "not an image, or its header is damaged"
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    raise UserError(f"{file if is_path else getattr(file, 'name', 'image')}: {reason}")


def train_transform(size, mean=CLIP_MEAN, std=CLIP_STD):
    """PIL image -> float32 [3, size, size]: random crop, flip, RandAugment, normalisation."""
    bicubic = transforms.InterpolationMode.BICUBIC
    return transforms.Compose([
        transforms.RandomResizedCrop(size, interpolation=bicubic, antialias=True),
        transforms.RandomHorizontalFlip(),
        transforms.RandAugment(num_ops=2, magnitude=9),
        transforms.ToTensor(),
        transforms.Normalize(mean, std),
    ])


def cutout_transform(preprocess):
    """A transform of resizing, to RGB, to a tensor, normalising, with augmentation: flip,
    RandAugment, and a quarter of the image cut out every other time."""
    resize, to_rgb, to_tensor, normalize = preprocess.transforms
    return transforms.Compose([
        resize, transforms.RandomHorizontalFlip(), to_rgb, transforms.RandAugment(), to_tensor,
        normalize, transforms.RandomErasing(0.5, scale=(0.25, 0.25), ratio=(1, 1))])


# ---- the dataset

class MultiLabelDataset(Dataset):
    """Images with one target per label; [i] -> (image, targets[i]).

    labels: C names. targets: int8 [N, C] in {+1 present, -1 absent, 0 unknown}, a tensor or
    SparseTargets. images: N file paths, or any object whose [i] is an RGB PIL image. unseen:
    indices of the labels that training must not see; `seen` are the others. UserError if these do
    not fit together.

    Files that do not exist are left out and counted in `missing`; more than 5% of them is a
    UserError unless allow_missing. A file that cannot be decoded is a UserError with
    on_error="raise" (evaluation). With "replace" (training) it is named once, the next readable
    image takes its place, and `replaced` counts it.
    """

    def __init__(self, labels, targets, images, *, transform=None, unseen=(), name="dataset",
                 on_error="raise", allow_missing=False, quiet=False):
        self.name, self.transform, self.on_error = name, transform, on_error
        self.labels = [label.strip() for label in labels]
        self.targets, self.images = targets, images
        self._check()
        is_unseen = torch.zeros(len(self.labels), dtype=torch.bool)
        is_unseen[torch.as_tensor(unseen, dtype=torch.int64)] = True
        self.seen, self.unseen = (~is_unseen).nonzero()[:, 0], is_unseen.nonzero()[:, 0]

        self.indices = torch.arange(len(images))  # row of targets -> image
        # shared memory, because it is the DataLoader's workers that find out
        self.unreadable = torch.zeros(len(images), dtype=torch.bool).share_memory_()
        self.missing = 0
        self.are_files = (isinstance(images, (list, tuple))
                          and isinstance(images[0], (str, os.PathLike)))
        if self.are_files:
            self._leave_out_missing(allow_missing, quiet)

    def _check(self):
        if not self.labels:
            raise UserError(f"{self.name}: there are no labels")
        if "" in self.labels:
            raise UserError(f"{self.name}: label {self.labels.index('')} (from 0) has no name")
        duplicates = [label for label, count in Counter(self.labels).items() if count > 1]
        if duplicates:
            raise UserError(f"{self.name}: labels given more than once: {', '.join(duplicates)}")
        if not len(self.images):
            raise UserError(f"{self.name}: there are no images")
        shape = [len(self.images), len(self.labels)]
        if self.targets.dtype != torch.int8 or list(self.targets.shape) != shape:
            raise UserError(f"{self.name}: targets must be int8 {shape} (images, labels), "
                            f"not {self.targets.dtype} {list(self.targets.shape)}")
        if self.targets.min() < -1 or self.targets.max() > 1:
            raise UserError(f"{self.name}: targets must be +1 (present), -1 (absent), 0 (unknown)")
        if self.on_error not in ("raise", "replace"):
            raise UserError(f"on_error must be 'raise' or 'replace', not '{self.on_error}'")

    def _leave_out_missing(self, allow_missing, quiet):
        # one listing per directory: a look-up per file takes minutes on a network disk
        parts = [os.path.split(path) for path in self.images]
        present = {}
        for directory in {directory for directory, _ in parts}:
            try:
                present[directory] = set(os.listdir(directory or "."))
            except (FileNotFoundError, NotADirectoryError):
                present[directory] = set()
        exists = torch.tensor([name in present[directory] for directory, name in parts])
        self.missing = int((~exists).sum())
        if self.missing:
            total, first = len(self.images), self.images[int((~exists).nonzero()[0])]
            message = f"{self.name}: {self.missing:,} of {total:,} images missing, e.g. {first}"
            if self.missing == total:
                raise UserError(message)
            if self.missing > 0.05 * total and not allow_missing:
                raise UserError(f"{message}; to go on without them: "
                                f"--allow-missing (allow_missing=True)")
            _note(f"{message}; going on without them", quiet)
            self.indices, self.targets = self.indices[exists], self.targets[exists]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        i = range(len(self))[i]
        # ten damaged files in a row are a damaged disk: stop rather than walk through all of it
        for step in range(min(10, len(self))):
            row = (i + step) % len(self)
            index = int(self.indices[row])
            try:
                image = self.images[index]
                image = open_image(image) if self.are_files else image
            except UserError as error:
                if self.on_error == "raise":
                    raise
                if not self.unreadable[index]:
                    self.unreadable[index] = True
                    _note(f"{error} (another image takes its place)")
            else:
                image = image if self.transform is None else self.transform(image)
                return image, self.targets[row]
        raise UserError(f"{self.image_name(i)}: cannot be read, nor can the images after it")

    @property
    def replaced(self):
        """Number of images that proved unreadable so far, here or in a DataLoader's workers."""
        return int(self.unreadable[self.indices].sum())

    def image_name(self, i):
        """Path of image i, or its number where images are not files; for messages."""
        index = int(self.indices[i])
        return os.fspath(self.images[index]) if self.are_files else f"{self.name} image {index}"

    def files_key(self):
        """What tells these images from others: names, and sizes and times of files; for caches."""
        names = [self.image_name(i) for i in range(len(self))]
        stats = [os.stat(name) for name in names] if self.are_files else []
        return names, [(s.st_size, s.st_mtime_ns) for s in stats]

    def subset(self, indices):
        """The dataset of these images only; indices: integers, or a bool mask [N].

        Attributes such as `transform` and `on_error` can be set without changing this dataset.
        """
        rows = torch.arange(len(self))[torch.as_tensor(indices)]
        if not len(rows):
            raise UserError(f"{self.name}: there are no images in the subset")
        subset = copy.copy(self)
        subset.targets, subset.indices = self.targets[rows], self.indices[rows]
        return subset


# ---- partial labels

def keep_partial(targets, proportion, seed):
    """Every entry of targets [N, C] kept with this probability, all others 0 (unknown).

    The convention of SST, SARB and HCP: an entry is kept where numpy's
    RandomState(seed).rand(N, C) < proportion. UserError (a ValueError) unless 0 < proportion <= 1.
    """
    if not 0 < proportion <= 1:
        raise UserError(f"the proportion of known labels must be in (0, 1], not {proportion}")
    generator, kept = np.random.RandomState(seed), targets.clone()
    for rows in kept.split(4096):  # the numbers of one large draw, without its 8 bytes an entry
        rows *= torch.from_numpy(generator.rand(*rows.shape) < proportion).to(rows.device)
    return kept


def keep_single_positive(targets, seed):
    """One uniformly drawn positive of every image kept, all other entries 0 (unknown).

    The setting of Cole et al. (CVPR 2021). targets: int8 [N, C]; an image without a positive
    becomes all unknown.
    """
    row, column = (targets > 0).nonzero(as_tuple=True)  # sorted by row
    count = torch.bincount(row, minlength=len(targets))
    draw = torch.from_numpy(np.random.RandomState(seed).rand(len(targets))).to(targets.device)
    chosen = (count.cumsum(0) - count + (draw * count).long())[count > 0]
    kept = torch.zeros_like(targets)
    kept[row[chosen], column[chosen]] = 1
    return kept


# ---- reading and writing files

def _find(root, *candidates, layout):
    """The first candidate that exists below root, or a UserError with the expected layout."""
    for candidate in candidates:
        if os.path.exists(os.path.join(root, candidate)):
            return os.path.join(root, candidate)
    raise UserError(f"{' or '.join(candidates)} not found in {root}\n{layout}")


def read_text(path):
    """The text of a UTF-8 file, with or without a byte-order mark; UserError names a bad line."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8, save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _lines(path):
    """Stripped lines of a text file; empty ones at the end are dropped, others are a UserError."""
    lines = [line.strip() for line in read_text(path).rstrip().split("\n")]
    if lines == [""]:
        raise UserError(f"{path}: the file is empty")
    if "" in lines:
        raise UserError(f"{path}, line {lines.index('') + 1}: the line is empty")
    return lines


def _entries(path, parse=lambda line: (line, None)):
    """{key: value} of the pairs that parse makes of a file's lines; UserError names the line of
    parse's ValueError, or where a key comes again."""
    entries = {}
    for number, line in enumerate(_lines(path), 1):
        try:
            key, value = parse(line)
            if key in entries:
                raise ValueError(f"{key} is listed twice")
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        entries[key] = value
    return entries


def _parse_json(path, **options):
    """json.loads of a file, with its options; UserError says where it is not JSON."""
    text = read_text(path)
    try:
        return json.loads(text, **options)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None


def read_json(path):
    """The entries of a JSON list or of JSON lines: [(where it is, entry)], else UserError."""
    text, line, entries = read_text(path), 1, []
    try:
        if text.lstrip().startswith("["):
            return [(f"{path}, entry {n}", entry) for n, entry in enumerate(json.loads(text), 1)]
        for line, content in enumerate(text.split("\n"), 1):  # splitlines would cut at U+2028
            if content.strip():
                entries.append((f"{path}, line {line}", json.loads(content)))
        return entries
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        raise UserError(f"{path}, line {line}: not JSON: {error}") from None


def _note_count(what, count, published, quiet):
    note = f"{what}: {count:,} images listed, {published:,} published"
    if count != published:
        note += "; WARNING: another release, results do not compare with published ones"
    _note(note, quiet)


def _line_blocks(path, quiet):
    """Yield (number of the first line, some MB of whole lines as bytes), with a progress bar."""
    first_line = 1
    with open(path, "rb") as file, tqdm(
            total=os.path.getsize(path), unit="B", unit_scale=True, leave=False,
            desc=os.path.basename(path), disable=quiet or None) as progress:
        while block := file.read(1 << 21):
            block += file.readline(1 << 20)  # bounded, whatever the file is
            progress.update(len(block))
            if first_line == 1:
                block = block.removeprefix(b"\xef\xbb\xbf")
            if not block.endswith(b"\n"):
                block += b"\n"
            yield first_line, block
            first_line += block.count(b"\n")


def _bad_line(path, first_line, block, index, expected):
    text = block.split(b"\n")[index].strip()[:60].decode(errors="backslashreplace")
    return UserError(f"{path}, line {first_line + index}: '{text}' is not {expected}")


def _read_bits(path, columns, quiet):
    """A text file with rows of 0/1 entries -> bits, uint8 [rows, ceil(columns / 8)].

    Entries are separated by white space, empty lines ignored; UserError names a bad line. No
    Python loop sees a line or an entry."""
    packed = [np.empty((0, (columns + 7) // 8), np.uint8)]
    for first_line, block in _line_blocks(path, quiet):
        characters = np.frombuffer(block, np.uint8)
        is_entry = characters > ord(" ")
        line_starts = np.flatnonzero(characters == ord("\n"))[:-1] + 1
        line_starts = np.concatenate([[0], line_starts])
        entries = np.add.reduceat(is_entry, line_starts, dtype=np.int32)  # in every line
        # unsigned: characters that sort before "0" become large
        values = np.frombuffer(block.translate(None, b" \t\r\n"), np.uint8) - ord("0")
        if ((values > 1).any() or (is_entry[1:] & is_entry[:-1]).any()
                or ((entries != columns) & (entries != 0)).any()):
            raise _bad_entry(path, block, first_line, columns)
        packed.append(np.packbits(values.reshape(-1, columns), axis=1))
    return np.concatenate(packed)


def _bad_entry(path, block, first_line, columns):
    for number, line in enumerate(block.split(b"\n"), first_line):
        entries = [entry for entry in re.split(rb"[ \t\r]", line) if entry]
        for entry in entries:
            if entry not in (b"0", b"1"):
                shown = entry[:20].decode(errors="backslashreplace")
                return UserError(f"{path}, line {number}: '{shown}' is not 0 or 1")
        if len(entries) not in (0, columns):
            return UserError(f"{path}, line {number}: {len(entries)} entries instead of {columns}")


@contextlib.contextmanager
def replacing(path, mode="wb", suffix=".tmp", **options):
    """open(path, mode, **options) under a temporary name until the end: whatever happens
    meanwhile, the old file or the new one is there, whole. Folders that do not exist are made.
    UserError if it cannot be written."""
    temporary = Path(f"{path}{suffix}")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_file(path, content):
    """Write str, bytes, an image as PNG or what torch.save takes; UserError and all as replacing
    has it."""
    with replacing(path) as file:
        if isinstance(content, (str, bytes)):
            file.write(content.encode() if isinstance(content, str) else content)
        elif isinstance(content, Image.Image):
            content.save(file, "PNG")
        else:
            torch.save(content, file)


def cache_folder():
    """$XDG_CACHE_HOME/clip_multilabel, or ~/.cache/clip_multilabel; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "clip_multilabel"


def cached(name, paths, key, make, quiet):
    """make(), a dict of numpy arrays without objects, kept in a cache.

    The file is in cache_folder(), its name starts with `name`. It is valid while the files it was
    made of, `paths`, keep their sizes and modification times, and `key`, anything that JSON can
    hold, is the same; without paths every key has a file of its own. No array can be called
    "key".
    """
    stats = [os.stat(path) for path in paths]
    key = json.dumps([key, [(s.st_size, s.st_mtime_ns) for s in stats]])
    names = "\n".join(os.path.abspath(path) for path in paths) or key
    digest = hashlib.sha256(names.encode()).hexdigest()[:16]
    cache = cache_folder() / f"{name}-{digest}.npz"
    try:
        with np.load(cache, allow_pickle=False) as content:
            if content["key"] == key:
                return {array: content[array] for array in content.files if array != "key"}
    except FileNotFoundError:
        pass
    except Exception as error:  # whatever is wrong with it, the sources are there
        _note(f"{cache} cannot be read ({error}), it is made anew", quiet)

    arrays = make()
    try:
        with replacing(cache, suffix=f".{os.getpid()}") as file:  # others may be at it too
            np.savez(file, key=key, **arrays)
    except UserError as error:
        _note(f"the cache cannot be written, the next start is slow too: {error}", quiet)
    return arrays


def mapped(name, key, shape, batches):
    """The tensors of batches() one after the other, float16 of this shape, mapped from a file.

    The file is in cache_folder() under `name` and a hash of `key`, anything JSON can hold; with it
    batches is not called again. UserError if the file cannot be written."""
    digest = hashlib.sha256(json.dumps([key, shape]).encode()).hexdigest()
    file, size = cache_folder() / f"{name}-{digest[:16]}.f16", math.prod(shape)
    if not file.exists() or file.stat().st_size != 2 * size:
        with replacing(file, suffix=f".{os.getpid()}") as out:
            for batch in batches():
                out.write(batch.half().cpu().numpy().tobytes())
    return torch.from_file(str(file), False, size, dtype=torch.float16).view(shape)


def _cached_bits(paths, columns, rows, quiet):
    """_read_bits of every path, uint8 [rows, len(paths), ceil(columns / 8)], kept in a cache.

    UserError if a file has not `rows` rows.
    """
    def make():
        bits = []
        for path in paths:
            bits.append(_read_bits(path, columns, quiet))
            if len(bits[-1]) != rows:
                raise UserError(f"{path}: {len(bits[-1]):,} rows for {rows:,} images")
        return {"bits": np.stack(bits, axis=1)}

    return cached(os.path.basename(paths[0]), paths, [columns, rows], make, quiet)["bits"]


def _fill_targets(targets, bits, width, rows, columns):
    """targets [N, C] = +1 / -1 for these N rows and C columns of _cached_bits(_, width, ...)."""
    for start in range(0, len(rows), 4096):
        block = np.unpackbits(bits[rows[start:start + 4096]], axis=-1, count=width)
        block = block.reshape(len(block), -1)[:, columns]  # [n, files, width] -> [n, C]
        targets[start:start + 4096] = 2 * block.astype(np.int8) - 1


# ---- NUS-WIDE

NUSWIDE_LAYOUT = """NUS-WIDE is expected as it is distributed:
    ConceptsList/Concepts81.txt
    NUS_WID_Tags/TagList1k.txt  AllTags1k.txt
    Groundtruth/AllLabels/Labels_<concept>.txt
    ImageList/Imagelist.txt  TrainImagelist.txt  TestImagelist.txt
    Flickr/<directory>/<image>.jpg
Lists, tags and ground truth, and the way to the images:
https://lms.comp.nus.edu.sg/wp-content/uploads/2019/research/nuswide/NUS-WIDE.html"""
NUSWIDE_IMAGES = {"train": 161_789, "test": 107_859}  # as published; other releases differ


def _nuswide_images(root, split, quiet):
    """Image paths of a split, their rows in the label files int64 [N], and the number of rows."""
    flickr = _find(root, "Flickr", layout=NUSWIDE_LAYOUT)
    lists = []
    for name in ("Imagelist.txt", f"{split.title()}Imagelist.txt"):
        path = _find(root, os.path.join("ImageList", name), layout=NUSWIDE_LAYOUT)
        # file name -> path; file names are unique across directories
        lists.append(_entries(path, lambda line: (re.split(r"[\\/]", line)[-1],
                                                  line.replace("\\", "/"))))
    everything, chosen = lists
    row_of = {name: row for row, name in enumerate(everything)}
    strangers = [name for name in chosen if name not in row_of]
    if strangers:
        raise UserError(f"{path}: {len(strangers):,} images are not in Imagelist.txt, "
                        f"e.g. {strangers[0]}")

    _note_count(f"NUS-WIDE {split}", len(chosen), NUSWIDE_IMAGES[split], quiet)
    paths = [os.path.join(flickr, everything[name]) for name in chosen]
    return paths, np.array([row_of[name] for name in chosen]), len(everything)


def _nuswide_concepts(root):
    """The 81 concepts and their label files."""
    concepts = _lines(_find(root, "ConceptsList/Concepts81.txt", "Concepts81.txt",
                            layout=NUSWIDE_LAYOUT))
    directory = _find(root, "Groundtruth/AllLabels", "AllLabels", layout=NUSWIDE_LAYOUT)
    return concepts, [_find(directory, f"Labels_{concept}.txt", layout=NUSWIDE_LAYOUT)
                      for concept in concepts]


def _note_placeholders(dataset, quiet):
    """Say how many images are Flickr's "photo no longer available", which comes as one file."""
    if quiet:
        return
    by_size, by_content = {}, {}
    for i in range(len(dataset)):
        path = dataset.image_name(i)
        by_size.setdefault(os.path.getsize(path), []).append(path)
    for paths in by_size.values():
        if len(paths) >= 20:  # photos seldom have the same size by chance: few files are read
            for path in paths:
                with open(path, "rb") as file:
                    digest = hashlib.sha256(file.read()).digest()
                by_content.setdefault(digest, []).append(path)
    copies = [paths for paths in by_content.values() if len(paths) >= 20]
    if copies:
        count, example = sum(map(len, copies)), max(copies, key=len)[0]
        _note(f"{dataset.name}: {count:,} of {len(dataset):,} images are copies of {len(copies)} "
              f"file(s), probably placeholders for photos no longer available, e.g. {example}")


def nuswide(root, split, transform=None, *, allow_missing=False, quiet=False):
    """NUS-WIDE zero-shot: 925 seen Flickr tags, then 81 unseen concepts annotated by people.

    Seen are the 1,000 tags but those among the concepts. In the training split the concepts are
    unknown (0); in the test split every entry is known. -1 means not tagged, for the tags.
    """
    images, rows, total = _nuswide_images(root, split, quiet)
    concepts, concept_files = _nuswide_concepts(root)
    tags = _lines(_find(root, "NUS_WID_Tags/TagList1k.txt", layout=NUSWIDE_LAYOUT))
    tag_file = _find(root, "NUS_WID_Tags/AllTags1k.txt", layout=NUSWIDE_LAYOUT)
    columns = [column for column, tag in enumerate(tags) if tag not in concepts]
    seen = len(columns)

    targets = np.zeros((len(rows), seen + len(concepts)), np.int8)
    bits = _cached_bits([tag_file], len(tags), total, quiet)
    _fill_targets(targets[:, :seen], bits, len(tags), rows, columns)
    if split == "test":
        bits = _cached_bits(concept_files, 1, total, quiet)
        _fill_targets(targets[:, seen:], bits, 1, rows, slice(None))
    dataset = MultiLabelDataset(
        [tags[column] for column in columns] + concepts, torch.from_numpy(targets), images,
        transform=transform, unseen=range(seen, seen + len(concepts)), name="nuswide",
        allow_missing=allow_missing, quiet=quiet)
    _note_placeholders(dataset, quiet)
    return dataset


def nuswide81(root, split, transform=None, *, annotated_only=False, allow_missing=False,
              quiet=False):
    """NUS-WIDE with its 81 concepts as the only labels; annotated_only drops images with none."""
    images, rows, total = _nuswide_images(root, split, quiet)
    concepts, concept_files = _nuswide_concepts(root)
    targets = np.empty((len(rows), len(concepts)), np.int8)
    _fill_targets(targets, _cached_bits(concept_files, 1, total, quiet), 1, rows, slice(None))
    if annotated_only:
        annotated = np.flatnonzero((targets > 0).any(1))
        targets, images = targets[annotated], [images[i] for i in annotated]
    dataset = MultiLabelDataset(
        concepts, torch.from_numpy(targets), images, transform=transform, name="nuswide81",
        allow_missing=allow_missing, quiet=quiet)
    _note_placeholders(dataset, quiet)
    return dataset


# ---- CUB-200-2011

CUB_LAYOUT = """CUB-200-2011 is expected as its archive CUB_200_2011.tgz unpacks:
    attributes.txt (or below CUB_200_2011)
    CUB_200_2011/
        images.txt  train_test_split.txt
        attributes/image_attribute_labels.txt
        images/<class>/<image>.jpg
https://www.vision.caltech.edu/datasets/cub_200_2011/"""
CUB_IMAGES = {"train": 5_994, "test": 5_794}  # as published


def _numbered_lines(path):
    """{number: text} of the lines "number text"."""
    def parse(line):
        number, *text = line.split(None, 1)
        if not (number.isascii() and number.isdecimal() and len(number) < 8 and text):
            raise ValueError(f"'{line[:60]}' is not a number and a text")
        return int(number), text[0]

    return _entries(path, parse)


def cub_label(name):
    """A CUB attribute in words: has_bill_shape::curved_(up_or_down) -> bird with a curved bill.

    Every label ends a prompt's "a photo of a". What is in brackets (inches) is left out."""
    part, _, value = name.removeprefix("has_").partition("::")
    part, _, kind = part.replace("_", " ").rpartition(" ")  # "upper tail", "color"; "", "size"
    value = re.sub(r"\(.*?\)", "", value).replace("_", " ").strip()
    if not part:  # size, shape
        return f"{value} bird"
    if part == "primary":
        return f"mostly {value} bird"
    if kind == "length":  # longer than head
        return f"bird with a {part} {value.replace(' head', ' its head')}"
    if kind == "pattern":
        value, part = value.removesuffix(" pattern"), f"{part} pattern"
    else:
        value = re.sub(f"[ -]{part}s?$", "", value)  # forked_tail
        part += "s" if part in ("wing", "eye", "leg") else ""
    article = "" if part.endswith("s") else "an " if VOWEL_SOUND.match(value) else "a "
    return f"bird with {article}{value} {part}"


def _read_cub(path, image_ids, attribute_ids, quiet):
    """-> uint8 [images, attributes], 2 * certainty + present; 0 where the file has no row."""
    marks = np.zeros((len(image_ids), len(attribute_ids)), np.uint8)
    # id -> row or column; the last entry, for what is not listed, is -1
    row_of, column_of = (np.full(max(ids) + 2, -1) for ids in (image_ids, attribute_ids))
    row_of[image_ids] = range(len(image_ids))
    column_of[attribute_ids] = range(len(attribute_ids))
    for first_line, block in _line_blocks(path, quiet):
        characters = np.frombuffer(block, np.uint8)
        is_entry = (characters > ord(" ")).astype(np.int8)
        edges = np.flatnonzero(np.diff(is_entry, prepend=0))  # a block ends in a line feed
        starts, lengths = edges[::2], edges[1::2] - edges[::2]
        newlines = np.flatnonzero(characters == ord("\n"))
        counts = np.bincount(np.searchsorted(newlines, starts), minlength=len(newlines))
        lines = np.flatnonzero(counts)
        if not len(lines):
            continue
        # some lines have more than five entries: the first four are the same everywhere
        entries = (np.cumsum(counts) - counts)[lines] + np.arange(4)[:, None]  # [4, n]
        entries = np.minimum(entries, len(starts) - 1)
        starts, lengths = starts[entries], lengths[entries]
        wrong = (counts[lines] < 4) | (lengths > 7).any(0)
        numbers = np.zeros(starts.shape, np.int64)
        for k in range(min(7, lengths.max())):
            digit = characters[np.minimum(starts + k, len(block) - 1)] - ord("0")  # unsigned
            wrong |= ((k < lengths) & (digit > 9)).any(0)
            numbers = np.where(k < lengths, 10 * numbers + digit, numbers)
        image, attribute, present, certainty = numbers
        row = row_of[np.minimum(image, len(row_of) - 1)]
        column = column_of[np.minimum(attribute, len(column_of) - 1)]
        wrong |= (row < 0) | (column < 0) | (present > 1) | (certainty < 1) | (certainty > 4)
        if wrong.any():
            raise _bad_line(path, first_line, block, lines[wrong.argmax()], "`image attribute "
                            "present certainty`: listed numbers, 0 or 1, and 1 to 4")
        marks[row, column] = 2 * certainty + present
    return marks


def cub(root, split, transform=None, *, not_visible="absent", allow_missing=False, quiet=False):
    """CUB-200-2011 with its 312 attributes as labels, each annotated in every image by one person.

    not_visible: "absent" or "unknown", what an attribute is where the annotator could not see the
    part (certainty 1). Attributes become words by cub_label.
    """
    if not_visible not in ("absent", "unknown"):
        raise UserError(f"cub: not_visible must be 'absent' or 'unknown', not '{not_visible}'")
    if os.path.isdir(os.path.join(root, "CUB_200_2011")):
        root = os.path.join(root, "CUB_200_2011")
    find = functools.partial(_find, root, layout=CUB_LAYOUT)
    images = _numbered_lines(find("images.txt"))
    attributes = _numbered_lines(find("attributes.txt", "attributes/attributes.txt",
                                      "../attributes.txt"))
    split_file = find("train_test_split.txt")
    chosen = {"1": "train", "0": "test"}
    split_of = {image: chosen.get(text) for image, text in _numbered_lines(split_file).items()}
    for image in images:
        if split_of.get(image) is None:
            raise UserError(f"{split_file}: no line `{image} 0` or `{image} 1`, which image of "
                            f"images.txt is for training (1)")
    rows = [row for row, image in enumerate(images) if split_of[image] == split]
    label_file = find("attributes/image_attribute_labels.txt")
    marks = cached("cub", [label_file], [list(images), list(attributes)], lambda: {
        "marks": _read_cub(label_file, list(images), list(attributes), quiet)}, quiet)["marks"]
    _note_count(f"CUB {split}", len(rows), CUB_IMAGES[split], quiet)
    if unmarked := int((marks == 0).sum()):
        _note(f"CUB: WARNING: {unmarked:,} entries have no line in {label_file}: unknown", quiet)

    marks = marks[rows]
    targets = np.where(marks % 2 == 1, 1, -1).astype(np.int8)
    targets[marks // 2 == 1] = -1 if not_visible == "absent" else 0
    targets[marks == 0] = 0
    directory, paths = find("images"), list(images.values())
    return MultiLabelDataset(
        [cub_label(name) for name in attributes.values()], torch.from_numpy(targets),
        [os.path.join(directory, paths[row]) for row in rows], transform=transform, name="cub",
        allow_missing=allow_missing, quiet=quiet)


# ---- Open Images V4

OPENIMAGES_LAYOUT = """Open Images V4 (2018_04) is expected as
    class-descriptions.csv  classes-trainable.txt  top_400_unseen.csv
    train-annotations-human-imagelabels.csv  test-annotations-human-imagelabels.csv
    train/<ImageID>.jpg  test/<ImageID>.jpg
the lists in the folder itself, in 2018_04 or in 2018_04/<split>.
https://storage.googleapis.com/openimages/web/download_v4.html"""
OPENIMAGES_TEST = 125_436  # images, as published
OPENIMAGES_HEADER = b"ImageID,Source,LabelName,Confidence"


# targets with fewer entries are an ordinary tensor, unknown ones included
DENSE_ENTRIES = 1 << 31


class SparseTargets:
    """Targets of which nearly all are unknown: what a dataset needs of an int8 [N, C] tensor.

    Human annotators verified 5 of Open Images' 7,586 labels an image: 45 MB of entries, where the
    tensor has 13 GB and its copies, in a subset or a comparison, as much again each. A row is a
    tensor; so is a selection of rows of up to DENSE_ENTRIES entries.

    starts: int64 [N + 1], the entries of row i are starts[i]:starts[i + 1] of columns (int32 [K],
    none twice in a row) and values (int8 or bool [K]).
    """

    def __init__(self, starts, columns, values, width):
        self.starts, self.columns, self.values = starts, columns, values
        self.shape, self.dtype = torch.Size([len(starts) - 1, width]), values.dtype

    def __len__(self):
        return self.shape[0]

    def min(self):
        return min(0, int(self.values.min())) if len(self.values) else 0

    def max(self):
        return max(0, int(self.values.max())) if len(self.values) else 0

    def __getitem__(self, index):
        """[i] -> tensor [C]; [rows]: integers or a bool mask [N]; [:, columns]: integers."""
        if isinstance(index, tuple):
            new = torch.full((self.shape[1],), -1, dtype=torch.int32)
            new[index[1]] = torch.arange(len(index[1]), dtype=torch.int32)
            columns = new[self.columns]
            kept = columns >= 0
            starts = F.pad(kept.cumsum(0), (1, 0))[self.starts]
            return SparseTargets(starts, columns[kept], self.values[kept], len(index[1]))
        if isinstance(index, int):
            entries = slice(*self.starts[index:index + 2].tolist())
            row = torch.zeros(self.shape[1], dtype=self.dtype)
            row[self.columns[entries].long()] = self.values[entries]
            return row
        rows = torch.arange(len(self))[index]
        counts = self.starts.diff()[rows]
        starts = F.pad(counts.cumsum(0), (1, 0))
        entries = (self.starts[rows] - starts[:-1]).repeat_interleave(counts)
        entries += torch.arange(len(entries))
        return targets_of(starts, self.columns[entries], self.values[entries], self.shape[1])

    def __eq__(self, value):
        if value == 0:
            raise ValueError("nearly every target is 0")
        return SparseTargets(self.starts, self.columns, self.values == value, self.shape[1])

    def clone(self, *_):  # keep_partial and keep_single_positive begin with these two
        raise UserError(f"{self.shape[0]:,} x {self.shape[1]:,} targets are too many to draw "
                        f"partial labels of: take fewer images, --limit N")

    __gt__ = clone

    def any(self, dim):
        if dim != 1:
            raise ValueError("only any(dim=1), of the entries of every row")
        return F.pad(self.values.bool().cumsum(0), (1, 0))[self.starts].diff() > 0


def targets_of(starts, columns, values, width):
    """The targets that SparseTargets(...) describes, as a tensor if that is not too large."""
    if (len(starts) - 1) * width > DENSE_ENTRIES:
        return SparseTargets(starts, columns, values, width)
    targets = torch.zeros(len(starts) - 1, width, dtype=values.dtype)
    rows = torch.arange(len(targets)).repeat_interleave(starts.diff())
    targets[rows, columns.long()] = values
    return targets


def _openimages_find(root, *names):
    return _find(root, *(os.path.join(folder, name) for name in names
                         for folder in ("", "2018_04")), layout=OPENIMAGES_LAYOUT)


def _fields(characters, starts, ends):
    """Bytes starts[i]:ends[i] for every i -> S [n], of the longest one's width."""
    width = max(1, int((ends - starts).max(initial=0)))
    index = starts[:, None] + np.arange(width)
    fields = characters[np.minimum(index, len(characters) - 1)]
    fields[index >= ends[:, None]] = 0
    return fields.view(f"S{width}")[:, 0]


def _openimages_lines(path, quiet):
    """Yield images S [n], labels S [n], and whether these are present, bool [n], of some lines."""
    for first_line, block in _line_blocks(path, quiet):
        characters = np.frombuffer(block, np.uint8)
        ends = np.flatnonzero(characters == ord("\n"))
        starts = np.concatenate([[0], ends[:-1] + 1])
        ends = ends - (characters[ends - 1] == ord("\r"))
        if first_line == 1:
            if characters[:ends[0]].tobytes() != OPENIMAGES_HEADER:
                raise _bad_line(path, 1, block, 0, f"the header {OPENIMAGES_HEADER.decode()}")
            starts[0] = ends[0]
        lines = np.flatnonzero(ends > starts)
        starts, ends = starts[lines], ends[lines]
        if not len(lines):
            continue
        commas = np.flatnonzero(characters == ord(","))
        commas = commas[commas >= starts[0]]
        wrong = np.diff(np.searchsorted(commas, starts), append=len(commas)) != 3
        if not wrong.any():
            a, b, c = commas.reshape(-1, 3).T
            wrong = (a == starts) | (a - starts > 64) | (c - b > 64) | (ends - c > 8)
        if not wrong.any():
            confidence = _fields(characters, c + 1, ends)
            is_one = (confidence == b"1") | (confidence == b"1.0")
            wrong = ~(is_one | (confidence == b"0") | (confidence == b"0.0"))
        if wrong.any():
            raise _bad_line(path, first_line, block, lines[wrong.argmax()],
                            f"`{OPENIMAGES_HEADER.decode()}` with confidence 0 or 1")
        yield _fields(characters, starts, a), _fields(characters, b + 1, c), is_one


def _read_openimages(path, class_ids, quiet):
    """Human-verified labels -> images S [N] in the order of the file, starts int64 [N + 1],
    columns int32 [K] (rows of class_ids), values int8 [K]; entries as in SparseTargets.

    Entries verified twice with different answers, and of classes without a description, are
    unknown.
    """
    ids = np.array([name.encode() for name in class_ids])
    order = ids.argsort()
    ids = ids[order]
    images, counts, columns, present = [], [], [], []
    for image, label, is_one in _openimages_lines(path, quiet):
        position = np.minimum(np.searchsorted(ids, label), len(ids) - 1)
        columns.append(np.where(ids[position] == label, order[position], -1).astype(np.int32))
        present.append(is_one)
        # an image's lines mostly follow one another
        runs = np.flatnonzero(np.concatenate([[True], image[1:] != image[:-1]]))
        images.append(image[runs])
        counts.append(np.diff(runs, append=len(image)))
    if not images:
        raise UserError(f"{path}: no annotations")

    images, first, inverse = np.unique(np.concatenate(images), return_index=True,
                                       return_inverse=True)
    by_appearance = first.argsort()
    rank = np.empty_like(by_appearance)
    rank[by_appearance] = np.arange(len(rank))
    columns, present = np.concatenate(columns), np.concatenate(present)
    keys = np.repeat(rank[inverse], np.concatenate(counts)) * len(ids) + columns
    keys = (2 * keys + present)[columns >= 0]
    keys.sort()  # numpy.unique takes ten times as long
    keys = keys[np.diff(keys, prepend=-1) != 0]
    pair = keys >> 1  # twice where an answer is 0 and another one 1
    once = (np.diff(pair, prepend=-1) != 0) & (np.diff(pair, append=-1) != 0)
    keys, pair = keys[once], pair[once]
    starts = np.searchsorted(pair, np.arange(len(images) + 1) * len(ids))
    return {"images": images[by_appearance], "starts": starts,
            "columns": (pair % len(ids)).astype(np.int32),
            "values": (2 * (keys & 1) - 1).astype(np.int8)}


def _openimages_entries(root, split, class_file, class_ids, quiet):
    path = _openimages_find(root, f"{split}-annotations-human-imagelabels.csv",
                            f"{split}/{split}-annotations-human-imagelabels.csv")
    return cached(f"openimages-{split}", [path, class_file], None,
                   lambda: _read_openimages(path, class_ids, quiet), quiet)


def _openimages_classes(path):
    """{class id: name} of class-descriptions.csv."""
    def parse(line):
        fields = next(csv.reader([line]))
        if len(fields) != 2 or not fields[0] or not fields[1].strip():
            raise ValueError(f"'{line[:60]}' is not `class id,name`")
        return fields[0], fields[1].strip()

    return _entries(path, parse)


def _openimages_unseen(path, others, counts, quiet):
    """The unseen classes. others: classes that are not trainable, counts {class: test images}.

    Their papers define them as the 400 most frequent labels of the test images that are not
    trainable. What the numbers in top_400_unseen.csv count is written nowhere. As rows of
    class-descriptions.csv, 204 of them would be trainable. As rows of the 12,809 classes that are
    not, which is how we read them, they name 400 unseen classes; but all lie among the first
    2,594, and those they name (Escopetarra, Martin marietta x-24a) are no commoner than their
    neighbours: they seem to count a list that was never published. So the test annotations have
    the last word: if the classes named have less than half of the annotations that the most
    frequent ones have (and these ten or more each, on average), the most frequent ones are taken,
    with a warning. A file of class ids (/m/...) instead of numbers is taken as it is.
    """
    known = set(others)

    def parse(line):
        is_number = line.isascii() and line.isdecimal() and len(line) < 8
        if is_number and int(line) < len(others):
            return others[int(line)], True
        if line not in known:
            raise ValueError(f"'{line[:60]}' is neither a number below {len(others):,} nor a "
                             f"class that is not trainable")
        return line, False

    unseen = _entries(path, parse)  # {class: whether it was a number}
    frequent = sorted(others, key=lambda name: -counts[name])[:len(unseen)]
    listed, most = (sum(counts[name] for name in names) for names in (unseen, frequent))
    if any(unseen.values()) and most >= 10 * len(unseen) and 2 * listed < most:
        _note(f"Open Images: WARNING: the labels that {path} counts off have {listed:,} test "
              f"annotations, the {len(unseen)} most frequent unseen labels {most:,}; these are "
              f"taken", quiet)
        return frequent
    return list(unseen)


def openimages(root, split, transform=None, *, allow_missing=False, quiet=False):
    """Open Images V4 zero-shot: 7,186 seen labels, then 400 unseen ones, as people verified them.

    What was not verified is unknown (0), in training all unseen labels. Only images with at least
    one verified label are there. Labels of the same name (Bat, the animal and the club) are told
    apart by a number, Bat (2), in the order of columns. targets is a SparseTargets if large.
    """
    class_file = _openimages_find(root, "class-descriptions.csv")
    names = _openimages_classes(class_file)
    ids = list(names)
    seen_file = _openimages_find(root, "classes-trainable.txt")
    seen = list(_entries(seen_file))
    is_seen = set(seen)
    for row, name in enumerate(seen, 1):
        if name not in names:
            raise UserError(f"{seen_file}, line {row}: '{name[:60]}' is not in {class_file}")
    unseen_file = _openimages_find(root, "top_400_unseen.csv")

    entries = _openimages_entries(root, "test", class_file, ids, quiet)
    counts = np.bincount(entries["columns"][entries["values"] > 0], minlength=len(ids))
    unseen = _openimages_unseen(unseen_file, [name for name in ids if name not in is_seen],
                                dict(zip(ids, counts.tolist())), quiet)
    if split == "train":
        entries = _openimages_entries(root, "train", class_file, ids, quiet)
    if split == "test":
        _note_count("Open Images test", len(entries["images"]), OPENIMAGES_TEST, quiet)
    else:
        _note(f"Open Images train: {len(entries['images']):,} images with verified labels", quiet)
    if (len(seen), len(unseen)) != (7_186, 400):
        _note(f"Open Images: {len(seen):,} seen and {len(unseen)} unseen labels listed, 7,186 and "
              f"400 published; WARNING: results do not compare with published ones", quiet)

    column_of = dict(zip(seen + unseen if split == "test" else seen, range(len(names))))
    columns = np.array([column_of.get(name, -1) for name in ids], np.int32)[entries["columns"]]
    starts = np.append(0, (columns >= 0).cumsum())[entries["starts"]]
    has_entries = np.diff(starts) > 0
    if not has_entries.any():
        raise UserError(f"openimages {split}: none of the labels is annotated in any image")
    starts = np.append(0, starts[1:][has_entries])
    targets = targets_of(*map(torch.from_numpy, (
        starts, columns[columns >= 0], entries["values"][columns >= 0])), len(seen + unseen))

    labels, times = [], Counter()
    for name in (names[class_id] for class_id in seen + unseen):
        times[name] += 1
        labels.append(name if times[name] == 1 else f"{name} ({times[name]})")
    directory = _find(root, split, layout=OPENIMAGES_LAYOUT)
    images = [os.path.join(directory, f"{name.decode()}.jpg")
              for name in entries["images"][has_entries].tolist()]
    return MultiLabelDataset(
        labels, targets, images, transform=transform, unseen=range(len(seen), len(labels)),
        name="openimages", allow_missing=allow_missing, quiet=quiet)


# ---- COCO

# by category id
COCO_LABELS = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball,
kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup,
fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut,
cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush""".replace("\n", " ").split(", ")
# zero-shot split of Bansal et al., "Zero-Shot Object Detection", ECCV 2018; 15 are in neither
COCO_SEEN = """person, bicycle, car, motorcycle, train, truck, boat, bench, bird, horse, sheep,
bear, zebra, giraffe, backpack, handbag, suitcase, frisbee, skis, kite, surfboard, bottle, fork,
spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, pizza, donut, chair, bed, toilet,
tv, laptop, mouse, remote, microwave, oven, toaster, refrigerator, book, clock, vase,
toothbrush""".replace("\n", " ").split(", ")
COCO_UNSEEN = """airplane, bus, cat, dog, cow, elephant, umbrella, tie, snowboard, skateboard, cup,
knife, cake, couch, keyboard, sink, scissors""".replace("\n", " ").split(", ")
COCO_LAYOUT = """COCO 2014 is expected as it is distributed:
    annotations/instances_train2014.json  instances_val2014.json
    train2014/COCO_train2014_<number>.jpg
    val2014/COCO_val2014_<number>.jpg
Images and "2014 Train/Val annotations": https://cocodataset.org/#download"""
COCO_IMAGES = {"train": 82_783, "test": 40_504}  # as published
COCO_ANNOTATED = {"train": 82_081, "test": 40_137}  # those with a box


def _coco_instances(path, quiet):
    """File names [N], label names [C] by category id, and boxes int8 [N, C] of an instances file.

    boxes: 0 where there is none, 1 where all are crowds, else 2. The images are in the order of
    the file. Parsing takes a while, so its result is cached.
    """
    wanted = {"images", "annotations", "categories", "id", "file_name", "name", "image_id",
              "category_id", "iscrowd"}

    def reduced(entry):  # as soon as it is read: the outlines take over a gigabyte
        return {key: value for key, value in entry.items() if key in wanted}

    def make():
        _note(f"{path}: read once, then a compact copy is used", quiet)
        content = _parse_json(path, object_hook=reduced)
        try:
            files = {image["id"]: image["file_name"] for image in content["images"]}
            names = {category["id"]: category["name"] for category in content["categories"]}
            boxes = [(box["image_id"], box["category_id"], bool(box.get("iscrowd")))
                     for box in content["annotations"]]
            for what, found in (("images", files), ("categories", names)):
                if len(found) < len(content[what]):
                    raise UserError(f"{path}: an id comes twice among the {what}")
            row_of = {image: row for row, image in enumerate(files)}
            column_of = {category: column for column, category in enumerate(sorted(names))}
            for number, (image, category, _) in enumerate(boxes, 1):
                if image not in row_of or category not in column_of:
                    raise UserError(f"{path}: annotation {number} is of image {image}, category "
                                    f"{category}, which the file does not list")
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: not a file of COCO instances: {error!r}") from None
        marks = np.zeros((len(files), len(names)), np.int8)
        for image, category, is_crowd in boxes:
            row, column = row_of[image], column_of[category]
            marks[row, column] = max(marks[row, column], 1 if is_crowd else 2)
        return {"files": np.array(list(files.values()), np.str_), "boxes": marks,
                "labels": np.array([names[category] for category in column_of], np.str_)}

    arrays = cached(os.path.basename(path), [path], "instances", make, quiet)
    return arrays["files"].tolist(), arrays["labels"].tolist(), arrays["boxes"]


def coco(root, split, transform=None, *, annotated_only=False, drop_crowd=False, zero_shot=False,
         allow_missing=False, quiet=False):
    """COCO 2014: train2014 for training, val2014 as the test split; every entry is known.

    annotated_only leaves out images without a label. drop_crowd: a label is not present where all
    its boxes are crowds. zero_shot: the 65 labels of Bansal et al. (ECCV 2018), 17 of them unseen;
    training images that show an unseen label are left out, in the others its entry is unknown (0).
    All images of val2014 stay in the test split.
    """
    part = {"train": "train2014", "test": "val2014"}[split]
    path = _find(root, os.path.join("annotations", f"instances_{part}.json"), layout=COCO_LAYOUT)
    directory = _find(root, part, layout=COCO_LAYOUT)
    files, labels, boxes = _coco_instances(path, quiet)
    _note_count(f"COCO {split}", len(files), COCO_IMAGES[split], quiet)
    _note_count(f"COCO {split} with annotations", int(boxes.any(1).sum()), COCO_ANNOTATED[split],
                quiet)
    if labels != COCO_LABELS:
        _note(f"{path}: WARNING: {len(labels)} categories that are not COCO's 80", quiet)

    unseen, kept = [], np.ones(len(files), bool)
    targets = np.where(boxes > (1 if drop_crowd else 0), 1, -1).astype(np.int8)
    if zero_shot:
        lacking = sorted({*COCO_SEEN, *COCO_UNSEEN} - {*labels})
        if lacking:
            raise UserError(f"{path}: zero_shot needs the categories {', '.join(lacking)}")
        columns = [c for c, label in enumerate(labels) if label in COCO_SEEN + COCO_UNSEEN]
        labels = [labels[column] for column in columns]
        unseen = [labels.index(label) for label in COCO_UNSEEN]
        targets, boxes = targets[:, columns], boxes[:, columns]
        if split == "train":
            kept = ~boxes[:, unseen].any(1)  # a crowd shows the label too
            targets[:, unseen] = 0
    if annotated_only:
        kept &= (targets > 0).any(1)
    rows = np.flatnonzero(kept)
    return MultiLabelDataset(
        labels, torch.from_numpy(targets[rows]), [os.path.join(directory, files[i]) for i in rows],
        transform=transform, unseen=unseen, name="coco", allow_missing=allow_missing, quiet=quiet)


# ---- VOC 2007

# Pascal VOC writes potted plant, dining table and tv monitor as one word, in which CLIP's text
# tower would not recognise them; aeroplane, motorbike and sofa stay
VOC_LABELS = """aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dining table,
dog, horse, motorbike, person, potted plant, sheep, sofa, train, tv monitor""".replace(
    "\n", " ").split(", ")
VOC_LAYOUT = """VOC 2007 is expected as it is distributed, trainval and test in one place:
    VOCdevkit/VOC2007/ImageSets/Main/trainval.txt  test.txt  <class>_trainval.txt  <class>_test.txt
    VOCdevkit/VOC2007/JPEGImages/<image>.jpg
    VOCdevkit/VOC2007/Annotations/<image>.xml    (needed without the <class> files only)
The root is VOC2007, VOCdevkit or the folder it is in.
Archives: http://host.robots.ox.ac.uk/pascal/VOC/voc2007/"""
VOC_IMAGES = {"train": 5_011, "test": 4_952}
VOC_DIFFICULT = {"absent": -1, "unknown": 0, "present": 1}


def _voc_class_file(path, row_of):
    """int8 [N] in {1, -1, 0}, from lines like "000012 -1"; 0 means difficult objects only."""
    def parse(line):
        image, *value = line.split()
        if value not in (["1"], ["-1"], ["0"]):
            raise ValueError(f"'{line}' is not an image and 1, -1 or 0")
        if image not in row_of:
            raise ValueError(f"{image} is not in the list of the split")
        return image, int(value[0])

    column = _entries(path, parse)
    lacking = [image for image in row_of if image not in column]
    if lacking:
        raise UserError(f"{path}: {len(lacking):,} images of the split are not listed, "
                        f"e.g. {lacking[0]}")
    return np.array([column[image] for image in row_of], np.int8)


def _voc_annotation(path):
    """int8 [C] in {1, -1, 0} from the objects of an image; 0 means difficult objects only."""
    try:
        objects = ElementTree.parse(path).getroot().findall("object")
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(f"{path}: not XML: {error}") from None
    row, names = np.full(len(VOC_LABELS), -1, np.int8), [x.replace(" ", "") for x in VOC_LABELS]
    for thing in objects:
        name = thing.findtext("name", "").strip()  # its own: parts of a person have names too
        if name not in names:
            raise UserError(f"{path}: '{name}' is not one of the classes {', '.join(names)}")
        is_difficult = thing.findtext("difficult", "0").strip() == "1"
        row[names.index(name)] = max(row[names.index(name)], 0 if is_difficult else 1)
    return row


def voc2007(root, split, transform=None, *, difficult="absent", allow_missing=False, quiet=False):
    """Pascal VOC 2007: trainval for training and test; 20 labels.

    difficult: what a label is, "absent", "unknown" or "present", where all its objects in an image
    are marked as difficult; all other entries are known.
    """
    if difficult not in VOC_DIFFICULT:
        raise UserError(f"difficult must be one of {', '.join(VOC_DIFFICULT)}, not '{difficult}'")
    root = os.path.dirname(_find(root, "ImageSets", os.path.join("VOC2007", "ImageSets"),
                                 os.path.join("VOCdevkit", "VOC2007", "ImageSets"),
                                 layout=VOC_LAYOUT))
    part = {"train": "trainval", "test": "test"}[split]
    main = os.path.join("ImageSets", "Main")
    images = list(_entries(_find(root, os.path.join(main, f"{part}.txt"), layout=VOC_LAYOUT)))
    directory = _find(root, "JPEGImages", layout=VOC_LAYOUT)
    _note_count(f"VOC 2007 {split}", len(images), VOC_IMAGES[split], quiet)

    class_files = [os.path.join(main, f"{label.replace(' ', '')}_{part}.txt")
                   for label in VOC_LABELS]
    if any(os.path.exists(os.path.join(root, file)) for file in class_files):
        row_of = {image: row for row, image in enumerate(images)}
        targets = np.stack([_voc_class_file(_find(root, file, layout=VOC_LAYOUT), row_of)
                            for file in class_files], axis=1)
    else:
        annotations = _find(root, "Annotations", layout=VOC_LAYOUT)
        targets = np.stack([_voc_annotation(os.path.join(annotations, f"{image}.xml"))
                            for image in progress(images, "VOC annotations", quiet)])
    targets[targets == 0] = VOC_DIFFICULT[difficult]
    return MultiLabelDataset(
        VOC_LABELS, torch.from_numpy(targets),
        [os.path.join(directory, f"{image}.jpg") for image in images], transform=transform,
        name="voc2007", allow_missing=allow_missing, quiet=quiet)


# ---- Visual Genome, 200 labels

VG_LAYOUT = """VG-200 is expected as it is distributed, with the names of the labels beside it:
    VG_100K/<image>.jpg    (images may also be in VG_100K_2)
    train_list_500.txt  test_list_500.txt
    vg_category_200_labels_index.json
    vg_category_200.txt    200 names, a line each
Images: https://homes.cs.washington.edu/~ranjay/visualgenome/api.html
Lists and labels: those of SSGRL, "Learning Semantic-Specific Graph Representation for Multi-Label
Image Recognition", ICCV 2019"""
VG_IMAGES = {"train": 98_249, "test": 10_000}


def _vg_names(root):
    """The names of the labels, in the order of their indices."""
    text, path = (os.path.join(root, f"vg_category_200.{suffix}") for suffix in ("txt", "json"))
    if os.path.exists(text):
        return list(_entries(text))
    if not os.path.exists(path):
        raise UserError(f"{root}: VG-200's labels are published as numbers, but these methods "
                        f"need their names: write them to {text}, a line each, in the order of "
                        f"the numbers (line 1 is label 0), or as a JSON list to {path}")
    names = _parse_json(path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: must be a JSON list of names, label 0 first")
    return names


def vg200(root, split, transform=None, *, allow_missing=False, quiet=False):
    """Visual Genome with 200 labels (SSGRL, ICCV 2019); all that is not annotated is absent."""
    path = _find(root, "vg_category_200_labels_index.json", layout=VG_LAYOUT)
    names = _vg_names(root)
    if len(names) != 200:
        _note(f"VG-200: WARNING: {len(names)} names instead of 200", quiet)
    list_path = _find(root, f"{split}_list_500.txt", layout=VG_LAYOUT)
    images = [os.path.basename(image) for image in _entries(list_path)]
    _note_count(f"VG-200 {split}", len(images), VG_IMAGES[split], quiet)
    first = _find(root, "VG_100K", "VG_100K_2", layout=VG_LAYOUT)
    second = os.path.join(root, "VG_100K_2")
    in_second = set(os.listdir(second)) if os.path.isdir(second) else set()
    in_second -= set(os.listdir(first))

    chosen = _parse_json(path)
    if not isinstance(chosen, dict):
        raise UserError(f'{path}: must be {{"<image>.jpg": [label indices], ...}}')
    targets = np.full((len(images), len(names)), -1, np.int8)
    for row, image in enumerate(images):
        if image not in chosen:
            raise UserError(f"{list_path}, line {row + 1}: {image} has no labels in {path}")
        indices = chosen[image]
        if not isinstance(indices, list) or not all(
                type(index) is int and 0 <= index < len(names) for index in indices):
            raise UserError(f"{path}: the labels of {image} must be a list of numbers from 0 to "
                            f"{len(names) - 1}, as there are {len(names)} names")
        targets[row, indices] = 1
    return MultiLabelDataset(
        names, torch.from_numpy(targets),
        [os.path.join(second if image in in_second else first, image) for image in images],
        transform=transform, name="vg200", allow_missing=allow_missing, quiet=quiet)


# ---- a folder of one's own

FOLDER_LAYOUT = """Images of your own are described by a line each:
    train.jsonl  test.jsonl    {"image": "photos/1.jpg", "present": ["dog"], "absent": ["cat"]}
    labels.txt                 optional: all labels, a line each
    unseen.txt                 optional: those of them that training must not see
Paths are relative to the folder. Labels in neither list are unknown; "absent": "rest" means all
others."""


def _folder_entries(path):
    """[(where it is, path of the image, present labels, absent labels or "rest")]"""
    entries, first = [], {}
    for where, entry in read_json(path):
        if not isinstance(entry, dict) or not entry.keys() <= {"image", "present", "absent"}:
            raise UserError(f'{where}: not {{"image": "...", "present": [...], "absent": [...]}}')
        image = entry.get("image")
        if not isinstance(image, str) or not image:
            raise UserError(f'{where}: "image" must be the path of an image')
        image = os.path.normpath(os.path.join(os.path.dirname(path), image))
        if first.setdefault(image, where) != where:
            raise UserError(f"{where}: {entry['image']} is listed twice, also at {first[image]}")
        labels = {"present": [], "absent": [], **entry}
        for key in ("present", "absent"):
            names, rest = labels[key], ' or "rest"' if key == "absent" else ""
            if rest and names == "rest":
                continue
            if not isinstance(names, list) or not all(
                    isinstance(name, str) and name.strip() for name in names):
                raise UserError(f'{where}: "{key}" must be a list of labels{rest}')
            labels[key] = [name.strip() for name in names]
        both = [name for name in labels["present"] if name in labels["absent"]]
        if both and labels["absent"] != "rest":
            raise UserError(f"{where}: '{both[0]}' is both present and absent")
        entries.append((where, image, labels["present"], labels["absent"]))
    if not entries:
        raise UserError(f"{path}: there are no images in it")
    return entries


def _folder_labels(root, path, entries):
    """-> the labels of entries, {split: _folder_entries}, and indices of the unseen ones."""
    fixed, unseen_path = (os.path.join(root, name) for name in ("labels.txt", "unseen.txt"))
    if os.path.exists(fixed):
        labels = list(_entries(fixed))
    else:
        labels = sorted({label for part in entries.values() for _, _, present, absent in part
                         for label in present + (absent if absent != "rest" else [])})
        if not labels:
            raise UserError(f"{path}: no label occurs in it\n{FOLDER_LAYOUT}")
    unseen = list(_entries(unseen_path)) if os.path.exists(unseen_path) else []
    for number, label in enumerate(unseen, 1):
        if label not in labels:
            raise UserError(f"{unseen_path}, line {number}: there is no label '{label}'")
    if len(unseen) == len(labels):
        raise UserError(f"{unseen_path}: every label is in it, none is left to train with")
    return labels, [labels.index(label) for label in unseen]


def folder(root, split, transform=None, *, allow_missing=False, quiet=False):
    """Images of one's own, described in train.jsonl and test.jsonl as FOLDER_LAYOUT shows.

    The labels are those of labels.txt, else all that occur in the two files, sorted. Those in
    unseen.txt are unseen: in the training split their entries are unknown (0).
    """
    path = _find(root, f"{split}.jsonl", layout=FOLDER_LAYOUT)
    entries = {part: _folder_entries(file) for part in ("train", "test")
               if os.path.exists(file := os.path.join(root, f"{part}.jsonl"))}
    labels, unseen = _folder_labels(root, path, entries)
    column_of = {label: column for column, label in enumerate(labels)}
    targets = np.zeros((len(entries[split]), len(labels)), np.int8)
    for row, (where, _, present, absent) in enumerate(entries[split]):
        for names, value in ((absent, -1), (present, 1)):
            if names == "rest":
                targets[row] = value
                continue
            for name in names:
                if name not in column_of:
                    raise UserError(f"{where}: '{name}' is not in {root}/labels.txt")
                targets[row, column_of[name]] = value
    if split == "train":
        targets[:, unseen] = 0
    images = [image for _, image, _, _ in entries[split]]
    if split == "test" and "train" in entries:
        shared = {image for _, image, _, _ in entries["train"]} & set(images)
        if shared:
            _note(f"{path}: WARNING: {len(shared):,} images are in train.jsonl too, e.g. "
                  f"{min(shared)}", quiet)
    return MultiLabelDataset(labels, torch.from_numpy(targets), images, transform=transform,
                             unseen=unseen, name="folder", allow_missing=allow_missing, quiet=quiet)


# ---- toy world

@functools.lru_cache
def toy_targets(count, seed, seen_only):
    """What the first scenes of a seed show: int8 [count, C], +1 or -1."""
    targets = np.full((count, len(world.LABELS)), -1, np.int8)
    for i in range(count):
        objects = world.scene_objects("benchmark", seed, i, world.SEEN if seen_only else None)
        targets[i, [thing[0] for thing in objects]] = 1
    return torch.from_numpy(targets)


def toy_dataset(root, split, transform=None, *, zero_shot=True, quiet=False):
    """10,000 training and 2,000 test scenes of the toy world, each a function of its index.

    zero_shot: a quarter of the labels is unseen; the training scenes show none of these things,
    and their entries are unknown (0). Otherwise all labels are seen. root is not used."""
    count, seed = (10_000, 1) if split == "train" else (2_000, 2)
    hidden = zero_shot and split == "train"
    things = world.SEEN if hidden else None
    targets = toy_targets(count, seed, hidden).clone()
    if hidden:
        targets[:, world.UNSEEN] = 0
    return MultiLabelDataset(world.LABELS, targets, world.Scenes(count, seed, things),
                             transform=transform, unseen=world.UNSEEN if zero_shot else (),
                             name="toy", quiet=quiet)


# ---- all datasets

DATASETS = {"toy": toy_dataset, "nuswide": nuswide, "nuswide81": nuswide81, "coco": coco,
            "voc2007": voc2007, "vg200": vg200, "cub": cub, "openimages": openimages,
            "folder": folder}
# of some datasets
DATASET_OPTIONS = ("annotated_only", "drop_crowd", "zero_shot", "difficult", "not_visible")


def check_root(name, root):
    """UserError unless there is such a dataset and, but for "toy", a directory for it."""
    if name not in DATASETS:
        raise UserError(f"unknown dataset '{name}', known are: {', '.join(DATASETS)}")
    if root is None and name != "toy":
        raise UserError(f"{name} needs the directory it is in: --root DIR (root=...)")
    if root is not None and not os.path.isdir(os.path.expanduser(root)):
        raise UserError(f"{name}: no such directory: {root}")


def options_of(name):
    """The keyword-only arguments of a dataset's function."""
    parameters = inspect.signature(DATASETS[name]).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def load_dataset(name, root=None, split="train", transform=None, **options):
    """The "train" or "test" split of a dataset as a MultiLabelDataset.

    name: a key of DATASETS. root: its directory, not needed by "toy". options: the keyword-only
    arguments of the dataset's function. Training replaces images that cannot be decoded, test
    stops at them. UserError for an unknown name, split or option, and for missing files.
    """
    check_root(name, root)
    if split not in ("train", "test"):
        raise UserError(f"unknown split '{split}', known are: train, test")
    known = options_of(name)
    for option in options:
        if option not in known:
            raise UserError(f"{name} has no option '{option}', known are: {', '.join(known)}")
    root = None if root is None else os.path.expanduser(root)
    try:
        dataset = DATASETS[name](root, split, transform, **options)
    except OSError as error:
        raise UserError(f"{error.filename or root}: {error.strerror}") from None
    dataset.on_error = "replace" if split == "train" else "raise"
    return dataset


# ---- pictures

# of heatmaps, from low to high: even steps of lightness, so that it reads without colour vision
PALETTE = np.array([(25, 15, 115), (135, 25, 155), (215, 60, 100), (250, 140, 40), (255, 225, 30)])
# of curves: colours that colour-blind people tell apart (Okabe and Ito, 2008)
LINE_COLOURS = ["#000000", "#e69f00", "#0072b2", "#cc79a7", "#009e73", "#d55e00", "#56b4e9"]
PANEL = (1040, 760)  # pixels; curves are drawn twice as large, then reduced
INK, GREY, PALE = "#222222", "#6f6f6f", "#e4e4e4"
CORRECT, FALSE = "#007a5a", "#d55e00"
# of Linux, Windows and macOS, those with the most scripts first
OTHER_FONTS = ("NotoSansCJK-Regular.ttc", "msyh.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf")


@functools.lru_cache
def _font(size, is_ascii=True):
    """Pillow's own font, which has hardly a letter beyond ASCII, or one of the system's."""
    for name in () if is_ascii else OTHER_FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def _fit_text(text, size, width):
    """-> (text, font): a line no wider than so many pixels, in smaller letters where it has to be
    and cut with an ellipsis where that is not enough.

    Accents go where the rest is ASCII; a letter that no font here has becomes a box."""
    text = " ".join(text[:300].split())
    letters = unicodedata.normalize("NFKD", text)
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    text = plain if plain.isascii() else text
    for height in (size, size * 6 // 7):
        font = _font(height, text.isascii())
        if font.getlength(text) <= width:
            return text, font
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…", font


def _palette(values):
    """Values in [0, 1] -> RGB, uint8 [..., 3]."""
    stops = np.linspace(0, 1, len(PALETTE))
    return np.stack([np.interp(values, stops, channel) for channel in PALETTE.T], -1).astype("u1")


def _overlay(picture, values):
    """The palette's colours over a picture, the more opaque the higher the value in [0, 1]."""
    colours = Image.fromarray(_palette(values))
    return Image.composite(colours, picture, Image.fromarray((190 * values ** 2).astype("u1")))


def draw_heatmaps(photo, maps, whole=False):
    """The photo, then a tile per map with its colours over the photo -> RGB PIL image.

    photo: RGB PIL image. maps: (label, score, float [h, w]) each, a grid over the central square
    of the photo, which is what CLIP's preprocessing keeps, or over the whole photo; what a grid
    does not cover stays as it is, and of a longer strip twice the square is shown.
    Colours go from a map's own lowest to its own highest value; a constant map has none."""
    gap, caption, most = 16, 36, math.inf if whole else 2 * min(photo.size)
    shown = [min(size, most) for size in photo.size]
    width, height = (max(1, round(360 * size / max(shown))) for size in shown)
    photo = ImageOps.fit(photo, (width, height), Image.Resampling.LANCZOS)
    side, cell = min(width, height), max(width, 240)  # a label needs some room
    left, top, right, bottom = 0, 0, width, height
    if not whole:
        left, top = (width - side) // 2, (height - side) // 2
        right, bottom = left + side, top + side
    covered = photo.crop((left, top, right, bottom))
    columns = min(1 + len(maps), 4)
    rows = math.ceil((1 + len(maps)) / columns)
    sheet = Image.new("RGB", (gap + columns * (cell + gap), gap + rows * (height + caption + gap)),
                      "white")
    draw = ImageDraw.Draw(sheet)
    sheet.paste(photo, (gap, gap))
    y = gap + height + 9  # under the photo: what the colours mean
    draw.text((gap, y), "low", GREY, _font(15))
    ramp = np.broadcast_to(np.linspace(0, 1, 96), (12, 96))
    sheet.paste(_overlay(Image.new("RGB", (96, 12), "white"), ramp), (gap + 34, y + 4))
    draw.rectangle((gap + 33, y + 3, gap + 130, y + 16), outline=PALE)
    draw.text((gap + 138, y), "high", GREY, _font(15))
    for i, (label, score, values) in enumerate(maps, 1):
        values = np.nan_to_num(np.asarray(values, np.float32))
        values = (values - values.min()) / (np.ptp(values) or 1)
        values = Image.fromarray(values).resize(covered.size, Image.Resampling.BICUBIC)
        x, y = gap + i % 4 * (cell + gap), gap + i // 4 * (height + caption + gap)
        sheet.paste(photo, (x, y))
        sheet.paste(_overlay(covered, np.asarray(values).clip(0, 1)), (x + left, y + top))
        if covered.size != photo.size:  # say where the map ends, on bright and dark ground
            for inset, colour in ((0, "white"), (1, INK)):
                draw.rectangle((x + left + inset, y + top + inset, x + right - 1 - inset,
                                y + bottom - 1 - inset), outline=colour)
        score, y = f"{score:.3f}", y + height + 24
        label, font = _fit_text(label, 17, cell - 12 - _font(17).getlength(score))
        draw.text((x, y), label, INK, font, anchor="ls")
        draw.text((x + cell, y), score, GREY, _font(17), anchor="rs")
    return sheet


def _ticks(low, high, most):
    """At most about so many round numbers, evenly spaced, that enclose [low, high]."""
    spread = max(high - low, 0.05 * max(abs(low), abs(high)), 1e-6)  # no microscope for noise
    low, high = (low + high - spread) / 2, (low + high + spread) / 2
    step = 10.0 ** math.floor(math.log10(spread / most))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step * most >= spread)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [step * i for i in range(first, last + 1)], max(0, -math.floor(math.log10(step) + 1e-6))


def draw_curves(log):
    """The lines of a log.jsonl as a panel of losses, and one of scores if any -> RGB PIL image.

    log: dicts with "epoch", numbers, perhaps "stage". Names with mAP, precision, recall or F1 are
    scores in [0, 1], drawn in percent. Epochs are counted through all stages; a line is broken
    where a stage ends."""
    names = [name for name in dict.fromkeys(name for line in log for name in line)
             if name not in ("stage", "epoch", "lr", "seconds", "unreadable_images")]
    scores = [name for name in names if re.search("mAP|precision|recall|F1", name)]
    losses = [name for name in names if name not in scores]
    scores.sort(key=lambda name: "mAP" not in name)  # first what best.pt is selected by
    panels = [panel for panel in (("Loss", losses, 1), ("Scores (%)", scores, 100)) if panel[1]]
    sheet = Image.new("RGB", (PANEL[0] * max(1, len(panels)), PANEL[1]), "white")
    for i, panel in enumerate(panels):
        _draw_panel(ImageDraw.Draw(sheet), i * PANEL[0], log, *panel)
    return sheet.reduce(2)


def _draw_panel(draw, x, log, title, names, factor):
    """The values of these names, times a factor, over the epochs, from x to x + PANEL[0]."""
    left, right, bottom = x + 124, x + PANEL[0] - 44, PANEL[1] - 104
    draw.text((left, 28), title, INK, _font(34))
    legend, x, y = [], left, 84
    for name in names:
        text, font = _fit_text(name, 26, 400)
        if x > left and x + 56 + font.getlength(text) > right:
            x, y = left, y + 40
        legend.append((x, y, text, font))
        x += 104 + int(font.getlength(text))
    stages = [line.get("stage", 1) for line in log]
    top = y + (84 if len(set(stages)) > 1 else 56)
    values = {name: [(epoch, factor * line[name]) for epoch, line in enumerate(log)
                     if math.isfinite(line.get(name, math.nan))] for name in names}
    drawn = [value for points in values.values() for _, value in points] or [0.0]
    ticks, digits = _ticks(min(drawn), max(drawn), 5)

    def place(epoch, value):
        return (left + (right - left) * (epoch + 0.5) / len(log),
                bottom - (bottom - top) * (value - ticks[0]) / (ticks[-1] - ticks[0]))

    for tick in ticks:
        y = place(0, tick)[1]
        draw.line((left, y, right, y), PALE, 2)
        draw.text((left - 16, y), f"{tick:.{digits}f}", GREY, _font(24), anchor="rm")
    draw.line((left, bottom, right, bottom), GREY, 2)
    for epoch in {round(tick) for tick in _ticks(0, len(log), 8)[0]}:
        if 1 <= epoch <= len(log):
            x = place(epoch - 1, 0)[0]
            draw.line((x, bottom, x, bottom + 8), GREY, 2)
            draw.text((x, bottom + 16), str(epoch), GREY, _font(24), anchor="mt")
    draw.text(((left + right) / 2, bottom + 56), "epoch", GREY, _font(24), anchor="mt")
    for stage in dict.fromkeys(stages) if len(set(stages)) > 1 else ():
        x, text = place(stages.index(stage) - 0.5, 0)[0], f"stage {stage}"
        draw.text((min(x, right - _font(24).getlength(text)), top - 36), text, GREY, _font(24))
        if x > left:
            draw.line((x, top, x, bottom), GREY, 2)
    for i, (name, (x, y, text, font)) in enumerate(zip(names, legend)):
        # the first line is the widest: a total stays visible under a term that equals it
        colour, size = LINE_COLOURS[i % len(LINE_COLOURS)], 4 if i else 8
        draw.line((x, y + 16, x + 44, y + 16), colour, size)
        draw.text((x + 60, y), text, INK, font)
        for stage in dict.fromkeys(stages):
            points = [place(epoch, value) for epoch, value in values[name]
                      if stages[epoch] == stage]
            if len(points) > 1:
                draw.line(points, colour, size, joint="curve")
            for x, y in points if len(log) <= 40 or len(points) == 1 else ():
                draw.ellipse((x - size, y - size, x + size, y + size), colour)


def _mark(draw, kind, x, y):
    """A check mark, a cross or a dash as lines in a square of 22 pixels."""
    lines = {"correct": [(1, 12, 8, 19), (8, 19, 21, 3)], "missed": [(2, 11, 20, 11)],
             "false": [(3, 3, 19, 19), (3, 19, 19, 3)]}[kind]
    colour = {"correct": CORRECT, "false": FALSE, "missed": GREY}[kind]
    for x0, y0, x1, y1 in lines:
        draw.line((x + x0, y + y0, x + x1, y + y1), colour, 5)
        for px, py in ((x + x0, y + y0), (x + x1, y + y1)):
            draw.ellipse((px - 2, py - 2, px + 2, py + 2), colour)


def draw_gallery(images, truths, predictions):
    """A contact sheet, six images a row -> RGB PIL image.

    images: RGB PIL images; their central square is shown. truths: per image its labels.
    predictions: per image (label, score), best first. Under an image come the predictions, with a
    check mark or a cross, and with a dash the labels that are not among them."""
    side, gap, line, most = 320, 32, 36, 12  # drawn twice as large, then reduced
    entries = []
    for truth, predicted in zip(truths, predictions):
        lines = [("correct" if label in truth else "false", label, f"{score:.3f}")
                 for label, score in predicted]
        found = {label for label, _ in predicted}
        lines += [("missed", label, "") for label in truth if label not in found]
        entries.append(lines)
    columns = min(6, max(3, len(images)))
    rows = [entries[i:i + columns] for i in range(0, len(entries), columns)]
    heights = [side + 16 + line * min(most, max(map(len, row))) + gap for row in rows]
    sheet = Image.new("RGB", (gap + columns * (side + gap), 2 * gap + line + sum(heights)),
                      "white")
    draw, x = ImageDraw.Draw(sheet), gap
    for kind in ("correct", "false", "missed"):
        _mark(draw, kind, x, gap)
        draw.text((x + 34, gap - 4), kind, INK, _font(26))
        x += 98 + int(_font(26).getlength(kind))
    y = gap + line + gap
    for row, entries in enumerate(rows):
        for column, lines in enumerate(entries):
            x, image = gap + column * (side + gap), images[row * columns + column]
            sheet.paste(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS), (x, y))
            if len(lines) > most:
                lines = [*lines[:most - 1], (None, f"and {len(lines) - most + 1} more", "")]
            for i, (kind, label, score) in enumerate(lines):
                top = y + side + 16 + i * line
                if kind:
                    _mark(draw, kind, x, top + 4)
                label, font = _fit_text(label, 26, side - 46 - _font(26).getlength(score))
                draw.text((x + 34, top + 24), label, INK if kind == "correct" else GREY, font,
                          anchor="ls")
                draw.text((x + side, top + 24), score, GREY, _font(26), anchor="rs")
        y += heights[row]
    return sheet.reduce(2)


# ---- files of a run

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
# fixed for the length of a run
SAME = ("data", "seed", "limit", "val_fraction", "precision", *DATASET_OPTIONS)
RUN_FILES = ("args.json", "known.pt", "log.jsonl", "best.pt", "last.pt", "results.json",
             "curves.png")


def image_files(paths):
    """Image files: files as given, folders recursively by name, patterns such as "photos/*.jpg"
    by name, each file once; UserError where there is none."""
    files = []
    for given in paths:
        path = Path(given).expanduser()
        found = [path] if path.exists() else [
            Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if not found:
            raise UserError(f"--predict: no such file or folder: {given}")
        for path in found:
            files += [path] if not path.is_dir() else sorted(
                p for p in path.rglob("*")
                if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not files:
        raise UserError(f"--predict: no images in {', '.join(map(str, paths))}")
    return list(dict.fromkeys(files))


def parse_labels(text):
    """"owl, ice cream" -> ["owl", "ice cream"]; UserError if there is none or one comes twice."""
    labels = [label.strip() for label in text.split(",") if label.strip()]
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if not labels:
        raise UserError("--labels is empty: give names, separated by commas")
    if twice:
        raise UserError(f"--labels names more than once: {', '.join(twice)}")
    return labels


def start_run(args):
    """Make --output and write args.json; files of an earlier run move to output/previous-N.

    UserError if the folder cannot be made or written to."""
    output = Path(args.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --output {output}: {error.strerror}") from None
    earlier = [output / name for name in RUN_FILES if (output / name).exists()]
    if earlier:
        folders = (output / f"previous-{number}" for number in itertools.count(1))
        previous = next(folder for folder in folders if not folder.exists())
        previous.mkdir()
        for file in earlier:
            file.rename(previous / file.name)
        _note(f"the earlier run in {output} is now in {previous}")
    write_file(output / "args.json", json.dumps(vars(args), indent=1))


def write_results(method, args, seconds, rows, dataset, begin):
    """-> the results of a run, also written to results.json in --output, if there is one.

    seconds: of training. rows: of the table. dataset: the images tested, or None. begin: the time
    when the script began; how long ago that is is printed."""
    if dataset is not None and dataset.missing:
        print(f"{dataset.missing} test images are missing: not comparable with complete results")
    if dataset is not None and torch.is_tensor(dataset.targets):
        without = int((~(dataset.targets == 1).any(dim=0)).sum())
        print(f"{without} labels that no test image shows do not count in mAP\n" * (without > 0),
              end="")
    results = {"method": method, "data": args.data, "clip": args.clip, "seed": args.seed,
               "seconds": round(seconds, 1), "rows": [
                   {key: None if value != value else value for key, value in row.items()}
                   for row in rows]}  # JSON has no NaN
    if args.output:
        write_file(Path(args.output) / "results.json", json.dumps(results, indent=1))
    print(f"{time.time() - begin:.0f} s"
          + f"; results and checkpoints: {args.output}" * bool(args.output))
    return results


def read_checkpoint(path, method, clip=None, published=None):
    """The state that a method script saved; UserError if it is missing, unreadable, another
    method's or of another CLIP than this one, if one is given. A file with the one key `published`
    is somebody else's weights and returned as it is."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if set(state) == {published}:
            return state
        found = state["method"]
    except Exception as error:  # whatever is wrong with the file, it is the user's to replace
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a checkpoint of {method}.py: {reason}") from None
    if found != method:
        raise UserError(f"{path} is a checkpoint of {found}.py, not of {method}.py")
    if clip is not None and clip != state["clip"]:
        raise UserError(f"{path} belongs to --clip {state['clip']}, not {clip}")
    return state


def check_weights(path, state, clip):
    """UserError if the CLIP that is loaded is not the one that a checkpoint was trained with."""
    if clip.fingerprint() != state["clip_fingerprint"]:
        raise UserError(f"{path} belongs to other weights than {state['clip']} has now")


def restore(path, model, state=None):
    """Load a checkpoint's weights, read from its path if they are not given, into a model with
    trained(). UserError where they are not all that it has trained."""
    state = state or torch.load(path, map_location="cpu", weights_only=True)
    expected = {name: value.shape for name, value in model.trained().items()}
    if {name: value.shape for name, value in state["model"].items()} != expected:
        raise UserError(f"{path}: other weights than this model has: it is damaged or of another "
                        f"version")
    model.load_state_dict(state["model"], strict=False)


def new_state(method, labels, clip, args):
    """What checkpoints hold, before the first epoch; the scripts add the weights and their own."""
    return {"method": method, "data": args.data or "labels", "clip": args.clip, "labels": labels,
            "clip_fingerprint": clip.fingerprint(), "args": vars(args), "epoch": 0,
            "optimizer": None, "scaler": None, "log": [], "seconds": 0.0}


def same_dataset(args, state):
    """--eval scores what the training saw: the CLIP, the dataset and its options are the
    checkpoint's where they are not given. UserError where --output holds results."""
    if args.output and (Path(args.output) / "results.json").exists():
        raise UserError(f"--output {args.output} holds the results.json of a run: choose another "
                        f"folder for --eval, or leave --output out")
    args.data, args.clip = args.data or state["data"], state["clip"]
    for name in DATASET_OPTIONS if args.data == state["data"] else ():
        if not getattr(args, name):
            setattr(args, name, state.get("args", {}).get(name))


def check_same(args, before, names):
    """UserError if an option has another value than the run that is to be resumed had."""
    for name in names:
        if name != "workers" and getattr(args, name) != before[name]:
            raise UserError(f"--resume: the run in {args.output} was started with --"
                            f"{name.replace('_', '-')} {before[name]}, not {getattr(args, name)}")


def check_labels(dataset, state):
    """UserError if the labels of a checkpoint are not the dataset's."""
    if state["labels"] != dataset.labels:
        raise UserError(f"the checkpoint belongs to the {len(state['labels'])} labels of "
                        f"{state['data']}; {dataset.name} has {len(dataset.labels)} other labels")


def finish_epoch(output, state, line, quiet):
    """Print an epoch's line, append it to the log, write the checkpoints, log.jsonl, curves.png.

    line: {"stage", "epoch", numbers..., "seconds"}; best.pt is the epoch with the highest val_mAP,
    or the last one where there is none."""
    if not quiet:
        print("  ".join(f"{name} {value:.4g}" for name, value in line.items()), flush=True)
    state["log"].append(line)
    state["seconds"] += line["seconds"]
    output, selection = Path(output), [earlier.get("val_mAP", 0) for earlier in state["log"]]
    selection = [0 if math.isnan(score) else score for score in selection]  # nothing to go by
    if "val_mAP" not in line or selection[-1] == max(selection):
        write_file(output / "best.pt", state)
    write_file(output / "last.pt", state)
    write_file(output / "log.jsonl", "".join(json.dumps(line) + "\n" for line in state["log"]))
    write_file(output / "curves.png", draw_curves(state["log"]))


def finite_means(history, names, where, output):
    """Per-step loss terms, a list of float tensors [K] -> {name: mean}; waits for the device.

    UserError with the step, its terms and the checkpoint to go back to if one is not finite."""
    values = torch.stack(history).cpu()
    bad = (~values.isfinite()).any(dim=1).nonzero()
    if len(bad):
        step = int(bad[0])
        terms = ", ".join(f"{n} {v:.4g}" for n, v in zip(names, values[step].tolist()))
        raise UserError(f"the loss is not finite at {where}, step {step + 1} ({terms}); "
                        f"{output}/last.pt holds the epoch before, if there was one (--resume); "
                        f"try a smaller --lr or --precision fp32")
    return dict(zip(names, values.mean(dim=0).tolist()))


def dataset_options(args):
    """{option: value} of those given; UserError for one that --data does not have."""
    options = {name: getattr(args, name) for name in DATASET_OPTIONS if getattr(args, name)}
    for name in options:
        if name not in options_of(args.data):
            known = ", ".join(dataset for dataset in DATASETS if name in options_of(dataset))
            raise UserError(f"--{name.replace('_', '-')} is not for {args.data}, but for: {known}")
    return options


def load_split(split, transform, args, toy_zero_shot=False):
    """The dataset that the arguments of a script ask for; toy_zero_shot: a quarter of the toy
    world's labels is unseen without --zero-shot too. UserError as dataset_options and
    load_dataset."""
    options = dataset_options(args)
    if args.data == "toy":
        options["zero_shot"] = args.zero_shot or toy_zero_shot
    else:
        options["allow_missing"] = args.allow_missing
    dataset = load_dataset(args.data, args.root, split, transform, quiet=args.quiet, **options)
    return dataset.subset(range(min(args.limit, len(dataset)))) if args.limit else dataset


def evaluation(dataset):
    """-> ({prefix of the metrics: label indices that compete}, the k of F1@k), as the papers do.

    ZSL ranks the unseen labels alone and GZSL all; without unseen labels there is one setting."""
    everything = torch.arange(len(dataset.labels))
    settings = ({"zsl_": dataset.unseen, "gzsl_": everything} if len(dataset.unseen) else
                {"": everything})
    return settings, (10, 20) if dataset.name == "openimages" else (3, 5)


def hold_out(dataset, fraction, transform):
    """-> (the other images, a fraction of the images with this transform or None for 0).

    Of those held out none is replaced: the score would be another image's. UserError if no image
    is left to train with."""
    if not fraction:
        return dataset, None
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    count = max(1, round(fraction * len(dataset)))
    if count == len(dataset):
        raise UserError(f"--val-fraction {fraction} leaves none of {count} images to train with")
    validation = dataset.subset(order[:count])
    validation.transform, validation.on_error = transform, "raise"
    return dataset.subset(order[count:]), validation


def kept_embeddings(dataset, encode, key, args):
    """encode(images [B, 3, H, W]) of all images: float16 [N, ...], in memory or mapped from a file
    as --cache-features says; None if that is "no".

    key: anything JSON can hold that tells this encoder from others. NaN for an image that cannot
    be read, of which a loader gives another one instead. UserError as mapped."""
    def embeddings():
        begin = 0
        for images, _ in progress(make_loader(dataset, args), "embedding images", args.quiet):
            batch = encode(images).half().cpu()
            batch[dataset.unreadable[dataset.indices[begin:begin + len(images)]]] = torch.nan
            yield batch
            begin += len(images)

    if args.cache_features == "no":
        return None
    if args.cache_features == "memory":
        return torch.cat(list(embeddings()))
    first = dataset[0][0]  # stands for how images are made
    key = [*key, dataset.files_key(), hashlib.sha256(first.numpy().tobytes()).hexdigest()]
    return mapped("embeddings", key, [len(dataset), *encode(first[None]).shape[1:]], embeddings)


def make_loader(dataset, args, shuffle=False, kept=None, batch_size=None):
    """Batches of (images, targets), loaded by --workers processes, which every epoch starts and
    seeds anew: a resumed run draws what an uninterrupted one would.

    kept: embeddings as kept_embeddings gives them, which take the place of the images. batch_size:
    instead of --batch-size. UserError for an image without an embedding, unless it is one that
    training leaves out."""
    pin = args.device.startswith("cuda")
    if kept is None:
        return DataLoader(dataset, batch_size or args.batch_size, shuffle=shuffle,
                          num_workers=args.workers, pin_memory=pin)
    rows, unreadable = TensorDataset(kept, dataset.targets), kept.flatten(1)[:, 0].isnan()
    if unreadable.any():
        if dataset.on_error == "raise":
            raise UserError(f"{dataset.image_name(int(unreadable.nonzero()[0]))}: cannot be read")
        dataset.unreadable[dataset.indices[unreadable]] = True
        rows = Subset(rows, (~unreadable).nonzero()[:, 0].tolist())
    order = RandomSampler(rows) if shuffle else SequentialSampler(rows)
    return DataLoader(rows, sampler=BatchSampler(order, args.batch_size, False), batch_size=None,
                      pin_memory=pin)  # whole batches at once: reading is all there is to do


def autocast(args):
    """The context in which CLIP and the models run: --precision, on --device."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision]
    return torch.autocast(torch.device(args.device).type, dtype, enabled=args.precision != "fp32")


def progress(iterable, title, quiet=False):
    """A progress bar where there is a terminal to draw it on."""
    return tqdm(iterable, desc=title, leave=False, disable=True if quiet else None)


def number(kind, least, most=math.inf):
    """A type for argparse: an int or a float within [least, most]."""
    def convert(text):
        value = kind(text)
        if not least <= value <= most or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not within [{least}, {most}]")
        return value
    convert.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return convert


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Lines as wide as the docstring's; what an option takes is called by its type."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=100)

    def _get_default_metavar_for_optional(self, action):
        return (action.type or str).__name__.upper()


class Parser(argparse.ArgumentParser):
    """A script's docstring up to its symbols, then the options, whose help shows their defaults,
    {name: value}: `usual` ones, called "paper" or otherwise, and those of the toy world. Errors
    become UserError: one line instead of the usage and a line."""

    def __init__(self, docstring="", usual=(), toy=(), called="paper"):
        super().__init__(usage="%(prog)s [options]", formatter_class=HelpFormatter,
                         description=docstring.split("\n\nB images")[0])
        self.defaults = {called: usual, "toy": toy}

    def group(self, title):
        """-> function(flag, type, help, **options) that adds an option under this title."""
        group = self.add_argument_group(title)

        def add(flag, kind, text, **options):
            name = flag[2:].replace("-", "_")
            shown = [f"{called}: " + (" ".join(values[name]) if isinstance(values[name], list)
                                      else str(values[name]))
                     for called, values in self.defaults.items() if name in values]
            options |= {} if kind is None else {"type": kind}
            group.add_argument(flag, help=text + f" ({', '.join(shown)})" * bool(shown), **options)
        return add

    def error(self, message):
        raise UserError(message)


@contextlib.contextmanager
def command_line(script, *errors):
    """What is wrong with a call, UserError or another of these errors, is one line on stderr and
    exit code 2; Ctrl-C and SIGTERM are a line and 130; where nobody reads on (`| head -1`) the
    program ends, quietly, with SIGPIPE's code 141."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except (UserError, *errors) as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; a training goes on after its last finished epoch with --resume",
              file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Python flushes once more when it ends, which must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def fill_defaults(args, method, usual, toy):
    """Options that were not given are those of the toy world, the dataset unless there are
    --labels, or else the usual ones, {name: value}; --output is below runs/ unless --eval."""
    args.data = args.data or (None if getattr(args, "labels", None) else "toy")
    for name, value in (toy if args.data == "toy" else usual).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not args.eval:
        args.output = args.output or f"runs/{method}-{args.data or 'labels'}"


def add_run_arguments(parser, method):
    """The options that every method has and that mean the same in each."""
    add = parser.add_argument_group("data").add_argument
    add("--data", choices=list(DATASETS),
        help="default: toy; folder: your own images, the README says how")
    add("--root", metavar="DIR", help="the dataset's folder, laid out as the README shows")
    add("--val-fraction", type=number(float, 0, 0.9), default=0.0,
        help="of the training images (lang_cls.py: sentences), held out to select the best epoch "
             "(default: 0, the last)")
    add("--limit", type=number(int, 1), help="only so many images of each split: a quick look")
    add("--allow-missing", action="store_true", help="go on without over 5%% of the images")
    add("--workers", type=number(int, 0), help="processes that load images (default: 8, toy: 0)")
    add = parser.add_argument_group("what some datasets offer").add_argument
    add("--annotated-only", action="store_true",
        help="coco, nuswide81: leave out images without a label")
    add("--drop-crowd", action="store_true", help="coco: boxes of crowds do not count")
    add("--zero-shot", action="store_true",
        help="coco: 48 seen and 17 unseen labels; toy: 42 and 14, which mkt.py has anyway")
    add("--difficult", choices=list(VOC_DIFFICULT),
        help="voc2007: what a label with difficult objects only is (default: absent)")
    add("--not-visible", choices=["absent", "unknown"],
        help="cub: what an attribute of a part that was not visible is (default: absent)")
    add = parser.add_argument_group("run").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="default here: %(default)s")
    add("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="default: fp32")
    add("--compile", action="store_true", help="torch.compile what is trained (lang_cls.py: the "
        "image encoder)")
    add("--seed", type=number(int, 0, 2 ** 32 - 1), default=0,
        help="of everything drawn (default: 0)")
    add("--output", metavar="DIR", help=f"the run's folder (default: runs/{method}-DATA)")
    add("--resume", action="store_true", help="continue the run in --output")
    add("--quiet", action="store_true", help="print the results only")
    add = parser.add_argument_group("use a trained model").add_argument
    add("--eval", metavar="CHECKPOINT", help="evaluate it on the test split instead of training; "
        "what it was trained with stays as it was")
    add("--gallery", metavar="FILE.png", help="with --eval or after training, 24 test images with "
        "their labels and as many predictions")
    add("--predict", nargs="+", metavar="IMAGE", help="print a JSON object for each of these "
        "images, folders and quoted patterns; exit code 1 if some could not be read")
    add("--checkpoint", metavar="FILE", help="the trained model for --predict")
    add("--top", type=number(int, 1), metavar="N", help="predict the N best labels only")
    add("--threshold", type=number(float, -math.inf), metavar="T",
        help="predict labels with at least this score only (MKT's depend on which labels compete, "
             "CoMC's have no bounds, TRM-ML's are probabilities)")
    add("--csv", metavar="FILE", help="for --predict, also a table: path, label, score")
    add("--heatmap", metavar="DIR", help="for --predict, also a PNG per image: where its best "
        "labels (default: 3) were seen")


def check_writable(option, path, is_folder=False):
    """UserError if no file can be written at a path, or below one, which may not exist yet."""
    path = Path(os.path.abspath(path))
    folder = path.parent
    if is_folder:  # it will be made, and those above it
        folder = next(part for part in (path, *path.parents) if part.exists())
    elif path.is_dir():
        raise UserError(f"{option}: {path} is a folder, give the name of a file")
    try:  # permissions alone do not tell
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{option}: cannot write to {folder}: {error.strerror}") from None


def check_run_arguments(args):
    """UserError if options do not fit together; the images of --predict become a list of files."""
    if args.predict and not args.checkpoint:
        raise UserError("--predict needs --checkpoint FILE")
    if args.predict and args.gallery:
        raise UserError("--gallery shows images of the test split: leave --predict out")
    if bool(args.predict) + bool(args.eval) + args.resume > 1:
        raise UserError("--predict, --eval and --resume: give one of them")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:  # what PyTorch has for a GPU that is not there
        raise UserError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    for name in ("checkpoint", "csv", "heatmap", "top", "threshold"):
        pictured = args.gallery and name in ("top", "threshold")
        if getattr(args, name) is not None and not (args.predict or pictured):
            raise UserError(f"--{name} needs --predict IMAGE")
    if args.gallery and not args.gallery.lower().endswith(".png"):
        raise UserError(f"--gallery {args.gallery}: the name must end in .png")
    for name in ("csv", "gallery", "heatmap", "output"):
        if getattr(args, name) is not None:
            check_writable(f"--{name}", getattr(args, name), name in ("heatmap", "output"))
    if args.predict:
        args.predict = image_files(args.predict)


# ---- use of a trained model

def best_labels(scores, labels, args):
    """Scores [C] -> [(label, score)] of --top and --threshold, best first, to four digits."""
    values, order = scores.sort(descending=True, stable=True)
    best = [(labels[i], round(value, 4)) for i, value in zip(order[:args.top].tolist(),
                                                             values.tolist())]
    return [(label, score) for label, score in best
            if args.threshold is None or score >= args.threshold]


def print_line(text):
    """Print at once. Where nobody reads on (`| head -1`) the program ends, quietly, with SIGPIPE's
    code; UserError for any other failure, such as a full disk."""
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except OSError as error:
        # Python flushes once more when it ends, which must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(141)
        raise UserError(f"cannot print the results: {error.strerror}") from None


@contextlib.contextmanager
def csv_rows(path):
    """A csv.writer whose file has a temporary name until the end; without a path it is None.

    UTF-8: a file name's other bytes are escaped as in JSON, \\udce9, or few programs read any."""
    if path is None:
        yield None
        return
    with replacing(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        yield csv.writer(file)


def heatmap_files(files, folder):
    """{image file: its PNG in the folder}, laid out as the images are below their common folder.

    A number tells images of one stem apart, and keeps images from being written over."""
    full = [Path(os.path.abspath(file)) for file in files]
    common, pictures = os.path.commonpath([path.parent for path in full]), {}
    taken = {str(path).lower() for path in full}  # some file systems ignore case
    for file, path in zip(files, full):
        stem = os.path.abspath(Path(folder) / path.relative_to(common).with_suffix(""))
        names = itertools.chain([f"{stem}.png"], (f"{stem}-{n}.png" for n in itertools.count(2)))
        picture = next(name for name in names if name.lower() not in taken)
        taken.add(picture.lower())
        pictures[file] = Path(picture)
    return pictures


@torch.no_grad()
def predict(score, labels, preprocess, args, whole=False):
    """--predict: print a JSON object per image, its path and the labels with scores, best first;
    write what --csv and --heatmap ask for.

    score: images [B, 3, H, W] -> (scores [B, C], maps [B, C, h, w], which only --heatmap needs);
    whole: as draw_heatmaps has it, for a preprocess that crops nothing away.
    Images that cannot be read are named on stderr and left out, and the exit code is 1;
    UserError if there is no other."""
    def load(file):
        try:
            return preprocess(open_image(file))
        except UserError as error:
            return error

    # a --batch-size may be of sentences, of which far more fit than images
    files, unreadable, size = args.predict, [], min(args.batch_size or 64, 64)
    threads = 8 if args.workers is None else max(1, args.workers)
    pictures = heatmap_files(files, args.heatmap) if args.heatmap else {}
    batches = progress([files[i:i + size] for i in range(0, len(files), size)], "predicting",
                       args.quiet)
    with csv_rows(args.csv) as table, ThreadPoolExecutor(threads) as pool:
        if table:
            table.writerow(("path", "label", "score"))
        for batch in batches:
            loaded = dict(zip(batch, pool.map(load, batch)))
            unreadable += [x for x in loaded.values() if isinstance(x, UserError)]
            images = {file: x for file, x in loaded.items() if torch.is_tensor(x)}
            if not images:
                continue
            scores, maps = score(torch.stack([*images.values()]))
            if not scores.isfinite().all():  # nor would it be JSON
                raise UserError(f"scores of {next(iter(images))} or one of the {len(images) - 1} "
                                f"after it are not finite: try --precision fp32")
            for i, (file, row) in enumerate(zip(images, scores.float().cpu())):
                best = best_labels(row, labels, args)
                # in ASCII: valid whatever stdout's encoding is, and any file name comes back exact
                print_line(json.dumps({"path": str(file), "labels": [
                    {"label": label, "score": value} for label, value in best]}))
                if table:
                    table.writerows((file, label, value) for label, value in best)
                if args.heatmap:
                    shown = [(label, value, maps[i, labels.index(label)].float().cpu().numpy())
                             for label, value in best[:args.top or 3]]
                    write_file(pictures[file], draw_heatmaps(open_image(file), shown, whole))
        if len(unreadable) == len(files):
            raise UserError("; ".join(map(str, unreadable)))
    for error in unreadable:
        _note(error)
    if unreadable:
        sys.exit(1)


@torch.no_grad()
def write_gallery(dataset, score, args):
    """--gallery: 24 images from all over a split, each with its labels and, unless --top or
    --threshold say otherwise, as many predictions; score as in predict."""
    shown = dataset.subset(torch.linspace(0, len(dataset) - 1, min(24, len(dataset))).long())
    scores = score(torch.stack([image for image, _ in shown]))[0].float().cpu()
    shown.transform = None
    images, truths, predictions = [], [], []
    for (image, target), row in zip(shown, scores):
        known = target.nonzero()[:, 0].tolist()
        labels = [dataset.labels[i] for i in known]
        truths.append([dataset.labels[i] for i in known if target[i] == 1])
        predicted = best_labels(row[known], labels, args)
        images.append(image)
        predictions.append(predicted if args.top or args.threshold is not None
                           else predicted[:len(truths[-1])])
    write_file(args.gallery, draw_gallery(images, truths, predictions))
