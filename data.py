"""Multi-label datasets: images, label names, and which labels are present, absent or unknown.

    dataset = load_dataset("nuswide", "data/nuswide", split="test", transform=preprocess)
    image, target = dataset[0]        # transform(PIL image), int8 [C]
    dataset.labels, dataset.targets   # C names, int8 [N, C]
    dataset.seen, dataset.unseen      # int64 label indices

One encoding everywhere: +1 present, -1 absent, 0 unknown (as SST, SARB and HCP have it; DualCoOp
swaps the last two). Every dataset is one function, listed in DATASETS; DATASETS.md shows its files.
"""
import argparse
import contextlib
import copy
import csv
import difflib
import functools
import glob
import hashlib
import inspect
import io
import json
import math
import os
import pickletools
import re
import sys
import tempfile
import unicodedata
import warnings
from array import array
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from tqdm import tqdm

from toy import world

Image.MAX_IMAGE_PIXELS = 100_000_000  # Pillow refuses twice as many; from here it would warn
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # comments harm no pixel
with contextlib.suppress(ImportError):
    import pillow_heif  # with it, HEIC is read as any other format
    pillow_heif.register_heif_opener()
warnings.filterwarnings("ignore", "Sparse (CSR tensor|invariant checks)")  # Open Images' targets


class UserError(ValueError):
    """The data, or what was asked of it, is wrong; the message says what, where and what to do."""

    def __str__(self):
        # a DataLoader repeats a worker's error with the worker's traceback in front
        return super().__str__().rsplit(f"{__name__}.UserError: ", 1)[-1].strip()


@contextlib.contextmanager
def _expect(what, where):
    """An error of what is inside becomes a UserError, which says where and what was expected."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, ValueError, LookupError, TypeError, AttributeError, SyntaxError,
            RecursionError, csv.Error) as error:
        raise UserError(f"{where}: not {what}: {error}") from None


def _some(names):
    """The first of these names, in a line."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _check_unique(names, where):
    twice = [str(name) for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{where} given more than once: {_some(twice)}")


def _note(message):  # as a whole line, whatever other threads and a progress bar write
    tqdm.write(f"{message}\n", file=sys.stderr, end="")


_note_once = functools.cache(_note)


# ---- images

def open_image(path, *, on_truncated=_note_once):
    """An upright RGB PIL image from a file.

    EXIF rotation is applied, transparency composited on white, 16-bit grey scaled to 8 bits; of
    an animation the first frame is taken. A truncated photo is used as far as it goes, and named
    once on stderr. UserError names the file and the reason if it is missing, empty, not an image,
    of over 200 million pixels, over 100 times longer than wide, or of pixels without a defined
    range (32-bit integers, floats). HEIC needs pillow-heif.
    """
    try:
        content = Path(path).read_bytes()
        image = Image.open(io.BytesIO(content))
        if max(image.size) > 100 * min(image.size):  # huge when the short side is 224
            raise ValueError(f"{image.width} x {image.height} is too long for its width")
        try:
            image.load()  # not reduced by Image.draft, which changes the pixels
        except OSError as error:
            if "truncated" not in str(error):
                raise
            # what LOAD_TRUNCATED_IMAGES gives, which is one switch for all threads
            if image.format in ("JPEG", "MPO"):
                end_of_image = b"\xff\xd9"  # here the decoder shows what it has, of all scans
                image = Image.open(io.BytesIO(content + end_of_image))
            else:
                image.tile = []  # nothing is left to be read
            image.load()
            if all(low == high for low, high in image.convert("RGB").getextrema()):
                raise ValueError("truncated before its first pixels") from None
            on_truncated(f"{path}: truncated, used as far as it goes")
        return _upright_rgb(image)
    except UnidentifiedImageError:
        reason = "not an image, or its header is damaged" if content else "the file is empty"
        if re.match(rb"....ftyp(hei|hev|mif|msf)", content, re.DOTALL):
            reason = "HEIC: convert it to JPEG, or install pillow-heif"
        if content.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
            reason = "JPEG XL: convert it to JPEG or PNG"
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    raise UserError(f"{path}: {reason}")


def _upright_rgb(image):
    with contextlib.suppress(Exception):  # damaged EXIF says nothing about the pixels
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise ValueError("32-bit or signed pixels have no defined range, convert to 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        pixels = np.asarray(image).astype(np.int32)
        image = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _spelled(path):
    """The path as the disk has it: macOS writes accents in another Unicode form."""
    path = os.fsdecode(path)
    folder, name = os.path.split(path)
    if path.isascii() or os.path.lexists(path):
        return path
    forms = [unicodedata.normalize(form, name) for form in ("NFC", "NFD")]
    paths = [os.path.join(_spelled(folder), form) for form in forms]
    return next((other for other in paths if os.path.lexists(other)), path)


def _files_below(folder):
    """Yield the files in a folder, and in those in it or linked there; nothing hidden."""
    visited = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_note):
        is_new = os.path.realpath(parent) not in visited  # else a link led back
        visited.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if is_new and name[0] != ".")
        for path in [os.path.join(parent, name) for name in sorted(names) if name[0] != "."]:
            if is_new and (os.path.isfile(path) or os.path.islink(path)):  # no pipe
                yield path


def image_files(paths):
    """Files as given, folders with every file in them that is not hidden, and patterns such as
    "photos/*.jpg" -> list of Path, each once; UserError where there is none."""
    files = []
    for pattern in map(os.path.expanduser, paths):
        name = _spelled(pattern)
        literally = pattern.replace("[", "[[]")  # brackets may be of a folder's name
        names = [name] if os.path.lexists(name) else sorted(
            glob.glob(pattern, recursive=True) or glob.glob(literally, recursive=True))
        if not names:
            raise UserError(f"--predict: no such file or folder: {pattern}")
        for name in names:
            files += _files_below(name) if os.path.isdir(name) else [name]
    if not files:
        raise UserError(f"--predict: no files in {', '.join(map(str, paths))}")
    return list(dict.fromkeys(map(Path, files)))


def _ahead(function, items):
    """Yield (item, function(item)) in order; threads work ahead, but only by 16 items."""
    ahead = deque()
    with ThreadPoolExecutor() as pool:
        for item in items:
            ahead.append((item, pool.submit(function, item)))
            if len(ahead) == 16:
                item, result = ahead.popleft()
                yield item, result.result()
        for item, result in ahead:
            yield item, result.result()


def photo_batches(args, preprocess):
    """What --predict sees: yield (paths, RGB PIL photos, images [b, 3, h, w] as preprocess makes
    them of photos) in order.

    args.predict: what image_files takes. b is at most 16, less for large photos. Those in the lines
    of the file args.output are left out. What cannot be read is named on stderr; at the end that
    is a UserError if it was named itself, or if there was nothing else.
    """
    def attempt(path):
        try:
            photo = open_image(path)
            return photo, preprocess(photo)
        except UserError as error:
            _note(error)

    files = image_files(args.predict)
    done = _predicted(args.output)
    todo = [path for path in files if str(path) not in done]
    if len(todo) < len(files):
        _note(f"{len(files) - len(todo):,} of {len(files):,} are in {args.output} already")
    batch, unreadable = [], []
    for path, opened in _ahead(attempt, tqdm(todo, "predicting", disable=args.quiet or None)):
        if opened:
            batch.append((path, *opened))
        else:
            unreadable.append(path)
        pixels = sum(photo.width * photo.height for _, photo, _ in batch)
        if batch and (len(batch) == 16 or pixels > 100e6 or path == todo[-1]):
            paths, photos, images = zip(*batch)
            yield paths, photos, torch.stack(images)
            batch = []
    message = f"{len(unreadable):,} of {len(files):,} files could not be read as images"
    named = {Path(_spelled(os.path.expanduser(name))) for name in args.predict}
    if files == unreadable or named & {*unreadable}:
        raise UserError(message)
    if unreadable:
        _note(message)


def _predicted(path):
    """The paths in a file of predictions, as a set; a line that was cut by a kill is removed."""
    if not path or not os.path.exists(path):
        return set()
    text = read_text(path)
    lines = text[:text.rfind("\n") + 1]
    with _expect("a file of predictions", path):
        done = {json.loads(line)["path"] for line in lines.split("\n")[:-1]}
    if lines != text:
        write_file(path, lines)
    return done


# ---- the dataset

class MultiLabelDataset(Dataset):
    """Images with one target per label; [i] -> (image, int8 [C]).

    labels: C names. targets: int8 [F, C] in {+1 present, -1 absent, 0 unknown} of the full list of
    images, kept as `full_targets`; dense, or as a sparse CSR tensor where few entries are known.
    images: F paths, or an object whose [i] is an RGB PIL image. rows: int64 [N], which of the full
    list this dataset has; all by default. unseen: indices of the labels that training must not
    see; `seen` are the others.

    Files that do not exist are left out and counted in `missing`; over 5% is a UserError unless
    allow_missing. A file that cannot be decoded is a UserError with on_error="raise" (evaluation);
    with "replace" (training) the next readable image takes its place, and `replaced` counts it.
    """

    def __init__(self, labels, targets, images, *, transform=None, unseen=(), rows=None,
                 name="dataset", on_error="raise", allow_missing=False):
        self.name = name
        self.transform = transform
        self.on_error = on_error
        self.allow_missing = allow_missing
        self.labels = [label.strip() for label in labels]
        if isinstance(images, list):
            images = np.array([os.fsencode(path.replace(os.sep, "/")) for path in images])
        self.are_files = isinstance(images, np.ndarray)
        if self.are_files:  # a DataLoader's workers share a tensor, but copy strings or an array
            images = torch.from_numpy(images.view(np.uint8).reshape(-1, images.itemsize))
        self.images = images
        self.full_targets = full = torch.as_tensor(targets)
        self.rows = torch.arange(len(images)) if rows is None else torch.as_tensor(rows)
        self.missing = 0
        is_unseen = torch.zeros(len(self.labels), dtype=torch.bool)
        is_unseen[list(unseen)] = True
        self.seen, self.unseen = (~is_unseen).nonzero()[:, 0], is_unseen.nonzero()[:, 0]
        # in shared memory, because it is the DataLoader's workers that find out
        self.truncated = torch.zeros(len(images), dtype=torch.bool).share_memory_()
        self.unreadable = torch.zeros(len(images), dtype=torch.bool).share_memory_()
        if not len(self.rows):
            raise UserError(f"{name}: there are no images")
        _check_unique(self.labels, f"{name}: labels")
        shape = [len(images), len(self.labels)]
        known = full.values() if full.is_sparse_csr else full
        if (full.dtype != torch.int8 or list(full.shape) != shape
                or known.numel() and (known.min() < -1 or known.max() > 1)):
            raise UserError(f"{name}: targets must be int8 {shape} (images, labels) of 1, -1, 0, "
                            f"not {full.dtype} {list(full.shape)} of {known.unique().tolist()[:9]}")
        if self.are_files:
            self._leave_out_missing()

    def paths(self):
        """Yield the N files as bytes, none where images are no files."""
        for rows in self.rows.split(4096) if self.are_files else ():
            names = self.images[rows].numpy()  # [4096, longest]
            yield from names.view(f"S{names.shape[1]}")[:, 0].tolist()

    def _leave_out_missing(self):
        def find():
            names_in, missing = {}, []
            for i, path in enumerate(self.paths()):
                folder, _, name = path.rpartition(b"/")
                if folder not in names_in:  # to look up every file would take minutes
                    names_in[folder] = set()
                    with contextlib.suppress(FileNotFoundError):
                        entries = os.scandir(folder or b".")
                        names_in[folder] = {entry.name for entry in entries if entry.is_file()}
                if name not in names_in[folder] and not os.path.isfile(_spelled(path)):
                    missing.append(i)
            return {"missing": np.array(missing, np.int64)}

        if len(self) < 100_000:
            missing = find()["missing"].tolist()
        else:  # a folder's time is that of the last file that came or went
            folders = {path.rpartition(b"/")[0] or b"." for path in self.paths()}
            folders = sorted(os.fsdecode(folder) for folder in folders if os.path.isdir(folder))
            digest = hashlib.sha256(self.images[self.rows].numpy()).hexdigest()
            missing = cached(f"{self.name}-files", folders, digest, find)["missing"].tolist()
        self._leave_out({i: f"{self._path(self.rows[i])}: no such file" for i in missing})

    def _path(self, row):
        return os.fsdecode(bytes(self.images[row].numpy()).rstrip(b"\0"))

    def leave_out_damaged(self):
        """Decode all files, or 1,000 of more than 5,000 and the others only if one of these is
        damaged; leave out, as missing ones are, those that cannot be decoded."""
        if not self.are_files:
            return

        def error_of(i):
            try:
                self._open(int(self.rows[i]))
            except UserError as error:
                return str(error)

        step = len(self) // 1000 if len(self) > 5000 else 1
        for indices in (range(0, len(self), step), range(len(self))):
            with ThreadPoolExecutor() as pool:
                found = tqdm(pool.map(error_of, indices), f"{self.name}: reading images",
                             len(indices), leave=False, disable=None, delay=2)
                errors = {i: error for i, error in zip(indices, found) if error}
            if not errors or step == 1:
                break
        self._leave_out(errors)

    def _leave_out(self, errors):
        """errors: {index: what is wrong with the file}"""
        if not errors:
            return
        message = (f"{self.name}: {len(errors):,} of {len(self):,} images missing or damaged: "
                   f"{_some(list(errors.values()))}")
        if len(errors) == len(self):
            raise UserError(message)
        if len(errors) > 0.05 * len(self) and not self.allow_missing:
            raise UserError(f"{message}; --allow-missing goes on without them")
        _note(f"{message}; going on without them")
        self.missing += len(errors)
        self.rows = self.rows[torch.tensor([i not in errors for i in range(len(self))])]

    @property
    def targets(self):
        """int8 [N, C]: the rows of full_targets."""
        return self._dense(self.rows)

    def _dense(self, rows):
        """int8 [n, C]: these rows [n] of full_targets."""
        full = self.full_targets
        if not full.is_sparse_csr:
            return full[rows]
        dense = torch.zeros(len(rows), len(self.labels), dtype=torch.int8)
        starts, columns, values = full.crow_indices(), full.col_indices(), full.values()
        for target, row in zip(dense, rows.tolist()):
            known = slice(starts[row], starts[row + 1])
            target[columns[known]] = values[known]
        return dense

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        i = range(len(self))[i]
        # ten damaged files in a row are a damaged disk: stop rather than walk through all of it
        tries = min(10, len(self)) if self.on_error == "replace" else 1
        for step in range(tries):
            row = self.rows[(i + step) % len(self)]
            try:
                image = self._open(int(row))
                break
            except UserError as error:
                if self.on_error == "raise":
                    message = f"{error}; remove the file, then --eval the checkpoint"
                    raise UserError(message) from None
                if step == tries - 1:
                    raise
                self._note_first(self.unreadable, row, f"{error} (another takes its place)")
        image = image if self.transform is None else self.transform(image)
        return image, self._dense(row[None])[0]

    def _open(self, row):
        if not self.are_files:
            return self.images[row]
        note = functools.partial(self._note_first, self.truncated, row)
        return open_image(_spelled(self._path(row)), on_truncated=note)

    def _note_first(self, noted, row, message):
        if not noted[row]:
            noted[row] = True
            _note(message)

    @property
    def replaced(self):
        """Number of images found unreadable so far, here or in a DataLoader's workers."""
        return int(self.unreadable[self.rows].sum())

    def shows(self):
        """bool [N]: images that are known to show a label."""
        full = self.full_targets
        if not full.is_sparse_csr:
            return (self.targets == 1).any(dim=1)
        shown_before = F.pad((full.values() == 1).cumsum(dim=0), (1, 0))[full.crow_indices()]
        return (shown_before.diff() > 0)[self.rows]

    def counts(self):
        """Known entries of every label: (present int64 [C], absent int64 [C])."""
        full = self.full_targets
        if not full.is_sparse_csr:
            counts = np.zeros((2, len(self.labels)), np.int64)
            for rows in self.rows.split(4096):  # all rows at once would take many times as long
                targets = full[rows].numpy()
                for count, sign in zip(counts, (1, -1)):
                    count += (targets == sign).sum(axis=0)
            return tuple(torch.from_numpy(counts))
        is_here = self.rows.bincount(minlength=len(full)).bool()
        is_here = is_here.repeat_interleave(full.crow_indices().diff())  # of every known entry
        return tuple(full.col_indices()[is_here & (full.values() == sign)].bincount(
            minlength=len(self.labels)) for sign in (1, -1))

    def subset(self, indices):
        """The dataset of these images only; indices: integers, or a bool mask [N]."""
        rows = self.rows[torch.as_tensor(indices)]
        if not len(rows):
            raise UserError(f"{self.name}: there are no images in the subset")
        subset = copy.copy(self)  # its transform, for example, can be set without changing ours
        subset.rows = rows
        return subset

    def hold_out(self, fraction, transform):
        """-> (the others, a random fraction with this transform, the same in every run), or
        (self, None) for 0."""
        if not fraction:
            return self, None
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))
        count = max(1, round(fraction * len(self)))
        held_out = self.subset(order[:count])
        held_out.transform = transform
        held_out.on_error = "raise"  # the score would be another image's
        held_out.leave_out_damaged()
        return self.subset(order[count:]), held_out


@torch.no_grad()
def score_images(score, dataset, batch_size, args):
    """Of all images, in batches: score(images [B, 3, H, W] on the device) -> {key: [B, ...]}.

    Returns {key: float32 [N, ...] on the CPU}; under torchrun rank 0 has the scores, others {}."""
    rank, processes = 0, 1
    if dist.is_initialized():
        rank, processes = dist.get_rank(), dist.get_world_size()
    # they take turns with the images; where these run out, one of the first again
    mine = DistributedSampler(dataset, processes, rank, shuffle=False)
    loader = DataLoader(dataset, batch_size, sampler=mine, num_workers=args.workers,
                        pin_memory="cuda" in args.device)
    scores, first = {}, 0
    for images, _ in tqdm(loader, "scoring", leave=False, disable=args.quiet or None):
        for key, part in score(images.to(args.device, non_blocking=True)).items():
            part = part.float().cpu()
            if processes > 1:
                parts = [torch.empty_like(part) for _ in range(processes)]
                dist.gather(part.contiguous(), parts if rank == 0 else None)
                part = torch.stack(parts, dim=1).flatten(0, 1)  # on rank 0 the images in order
            if key not in scores and rank == 0:
                scores[key] = torch.empty(len(dataset), *part.shape[1:])
            if rank == 0:
                scores[key][first:first + len(part)] = part[:len(dataset) - first]
        first += processes * len(images)
    return scores


# ---- partial labels

def keep_partial(targets, proportion, seed):
    """Every entry of targets [N, C] kept with this probability, all others 0 (unknown).

    The convention of SST, SARB and HCP, for the full official list (a dataset's full_targets):
    known is where RandomState(seed).rand(N, C) < proportion. UserError unless 0 < proportion <= 1.
    """
    if not 0 < proportion <= 1:
        raise UserError(f"the proportion of known labels must be in (0, 1], not {proportion}")
    generator = np.random.RandomState(seed)
    partial = targets.clone()
    for rows in partial.split(4096):  # the numbers of one large draw, without its 8 bytes an entry
        rows *= torch.from_numpy(generator.rand(*rows.shape) < proportion).to(rows.device)
    return partial


def keep_single_positive(targets, seed):
    """One uniformly drawn positive of every image kept, all other entries 0 (unknown).

    targets: int8 [N, C]; an image without a positive becomes all unknown. As Cole et al. (CVPR
    2021) draw it: in every row, in order, the positives are shuffled and the first is kept.
    """
    generator = np.random.RandomState(seed)
    single = torch.zeros_like(targets)
    for row, target in enumerate(targets.cpu().numpy()):
        positives = np.nonzero(target == 1)[0]
        generator.shuffle(positives)
        single[row, positives[:1]] = 1
    return single


# ---- reading and writing files

def _find(root, *candidates):
    """The first candidate that exists below root, or FileNotFoundError."""
    for path in [os.path.join(root, candidate) for candidate in candidates]:
        if os.path.exists(path):
            return path
    raise FileNotFoundError(f"{' or '.join(candidates)} not found in {root}")


def read_text(path):
    """The text of a UTF-8 file, with or without a byte-order mark; UserError if it is not one."""
    with _expect("UTF-8, in which it must be saved", path):
        return Path(path).read_text("utf-8-sig")


def _lines(path):
    """The lines of a text file; UserError names one that is empty or listed twice."""
    lines = {}
    for number, line in enumerate(read_text(path).rstrip().split("\n"), 1):
        line = line.strip()
        if not line or line in lines:
            problem = f"{line} is listed twice" if line else "the line is empty"
            raise UserError(f"{path}, line {number}: {problem}")
        lines[line] = number
    return list(lines)


def _parse_json(text, where, **options):
    with _expect("JSON", where):
        return json.loads(text, **options)


def read_json(path):
    """The entries of a JSON list or of JSON lines: [(where it is, entry)], else UserError."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        return [(f"{path}, entry {n}", entry) for n, entry in enumerate(_parse_json(text, path), 1)]
    lines = enumerate(text.split("\n"), 1)  # splitlines would cut at U+2028
    lines = [(f"{path}, line {number}", line) for number, line in lines if line.strip()]
    return [(where, _parse_json(line, where)) for where, line in lines]


# reasoning ends with a closing tag of whatever name, with or without an opening one, or as Mistral,
# Kimi, Cohere, gpt-oss (with its tokens or without them) and Gemma end it
REASONING_END = (r"</[\w:-]+>|\[/[A-Z]+\]|◁/\w+▷|<\|(?i:end_(?:of_)?th\w+)\|>"
                 r"|<\|channel\|>final<\|message\|>|assistantfinal|<channel\|>")
REASONING_START = (r"<[\w:-]+>|\[[A-Z]+\]|◁\w+▷|<\|(?i:(?:start|begin)_(?:of_)?th\w+)\|>"
                   r"|<\|channel|\Aanalysis(?=[A-Z])")
ANSWER_TAG = r"(?i)</?(?:answer|response|final|output|sentence|b|i|em|p|strong)>"
TEXT_ENDS = r"</?s>|<(?:bos|eos|pad|(?:start|end)_of_turn)>"  # Llama's, Gemma's; others: <|...|>
LEAD_IN = (r"(?i)\A(?:(?:sure|certainly|of course|absolutely|okay)[!,.]\s+(?:I\b.*\n\s*)?)?"
           r"(?:[^:\n]*\b(?:sentence|description|caption|answer|response)\b[^:\n]*:"
           r"|[^:\n]*:\s*\n)?\s*")
REFUSAL = (  # the writer speaks of itself: "Unable to fly, an owl ..." is none
    r"(?i)(?:(?:unfortunately|regrettably|sorry),? )?i(?:"
    r"(?:['’]m| am) (?:\w+ )?(?:sorry|afraid|unable|not)\b"
    r"| (?:can|could|do|must|should|will|wo|would) ?(?:not|n?['’]?t)\b"
    r"|(?: (?:must|will|would|have|need|to|politely))* (?:decline|refuse|apologi[sz]e)\b)"
    r"|(?:very |so )?sorry(?:[,.;:!]|$| but\b)|(?:my )?apologies\b"
    r"|as an? (?:ai|artificial intelligence|(?:large )?language model)\b")


def clean_sentence(text):
    """A language model's answer -> its sentence in one line, "" if it has none or is a refusal.

    Dropped are reasoning, tokens of the chat template and what a model writes on behind them,
    "Here is a sentence:", markdown, quotation marks and further paragraphs. Reasoning without an
    end was cut off: "" too."""
    text = re.sub(TEXT_ENDS, "<|end|>", re.sub(ANSWER_TAG, " ", text))
    text = re.split(REASONING_END, text)[-1].strip()
    if re.search(REASONING_START, text):
        return ""
    parts = re.split(r"<\|[^<>|]*\|>(?:assistant\b|model\b)?", text)
    text = next((part for part in parts if part.strip()), "")
    text = re.sub(LEAD_IN, "", re.sub(r"[*`]", "", text).strip())
    text = " ".join(re.split(r"\n\s*\n", text)[0].split()).strip("\"'“”‘’«»_#>•- ")
    return "" if re.match(REFUSAL, text) or not re.search(r"[^\W\d_]", text) else text


def write_file(path, content):
    """Write str, bytes, a PIL image as PNG, or else what torch.save takes.

    Whatever happens meanwhile, the old file or the new one is there, whole. Folders are made.
    """
    temporary = Path(f"{path}.tmp")
    content = content.encode() if isinstance(content, str) else content
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            elif isinstance(content, Image.Image):
                content.save(file, "PNG")
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def cached(name, paths, key, make):
    """make(), a dict of numpy arrays without objects, kept in the cache folder as long as `key`,
    anything that JSON can hold, and the files it was made of, `paths`, stay the same."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if folder.startswith("~"):  # a user without a home
        folder = tempfile.gettempdir()
    stats = [(os.path.abspath(path), os.path.getsize(path), os.stat(path).st_mtime_ns)
             for path in paths]
    digest = hashlib.sha256(json.dumps([stats, key]).encode()).hexdigest()
    file = f"{folder}/clip_multilabel/{name}-{digest[:16]}.npz"
    # whatever is wrong with the file, its sources are there
    with contextlib.suppress(Exception), np.load(file, allow_pickle=False) as content:
        return dict(content)
    arrays = make()
    with contextlib.suppress(OSError):  # or the next start is slow too
        os.makedirs(os.path.dirname(file), exist_ok=True)
        unfinished = f"{file}.{os.getpid()}.npz"  # others may be at it too
        np.savez(unfinished, **arrays)
        os.replace(unfinished, file)
    return arrays


def read_checkpoint(path, method=None):
    """The dict that a script saved, on the CPU; UserError if it is not this method's, or for a
    file of anything else. Without method: any dict of weights."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        writer = state["method"] if method else state.keys()  # which fails if it is no dict
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such checkpoint") from None
    except Exception as error:  # whatever is wrong with the file, it is the user's to replace
        reason = repr(error).partition("\\n")[0]
        raise UserError(f"{path} is not a checkpoint: {reason}") from None
    if method and writer != method:
        raise UserError(f"{path} is a checkpoint of {writer}.py, not of {method}.py")
    return state


# ---- datasets: functions of root, split and options -> what MultiLabelDataset takes. DATASETS.md
# shows their files. load_dataset makes the unseen labels unknown (0) in training.

def _nuswide(root, split):
    """-> the names of the 81 concepts, targets int8 [F, 81], paths of the F images, their rows in
    the label files, and the number of rows."""
    lists, names_of = [], []
    for name in ("Imagelist", f"{split.title()}Imagelist"):
        path = _find(root, f"ImageList/{name}.txt")
        lists.append([line.replace("\\", "/") for line in _lines(path)])
        # file names are unique across directories: lists are joined by them
        names_of.append([line.rpartition("/")[2] for line in lists[-1]])
        _check_unique(names_of[-1], f"{path}: files")
    paths, names, part = lists[0], *names_of
    row_of = {name: row for row, name in enumerate(names)}
    with _expect("a part of Imagelist.txt", path):
        rows = [row_of[name] for name in part]
    folder = _find(root, "Flickr")
    images = [os.path.join(folder, paths[row]) for row in rows]
    concepts = _lines(_find(root, "ConceptsList/Concepts81.txt", "Concepts81.txt"))
    folder = _find(root, "Groundtruth/AllLabels", "AllLabels")
    targets = [_read_table(_find(folder, f"Labels_{concept}.txt"), len(paths), 1)[rows]
               for concept in concepts]
    return concepts, np.concatenate(targets, axis=1), images, rows, len(paths)


def _read_table(path, rows, columns):
    """A text file of 0 and 1 separated by white space -> int8 [rows, columns], -1 and +1."""
    # 255 is -1 as int8, and 2 marks what is neither
    signs = bytes({ord("0"): 255, ord("1"): 1}.get(byte, 2) for byte in range(256))
    entries = np.frombuffer(Path(path).read_bytes().translate(signs, b" \t\r\n"), np.int8)
    if entries.max(initial=0) == 2:
        raise UserError(f"{path}, row {entries.argmax() // columns + 1}: an entry is not 0 or 1")
    if len(entries) != rows * columns:
        raise UserError(f"{path}: {len(entries):,} entries for {rows:,} images x {columns:,}")
    return entries.reshape(rows, columns)


def nuswide(root, split):
    """NUS-WIDE zero-shot: seen are the 1,000 Flickr tags but those among the concepts, unseen the
    81 concepts, annotated by people. -1 means not tagged, for the tags."""
    concepts, concept_targets, images, rows, total = _nuswide(root, split)
    tags = _lines(_find(root, "NUS_WID_Tags/TagList1k.txt"))
    columns = [column for column, tag in enumerate(tags) if tag not in concepts]
    labels = [tags[column] for column in columns] + concepts
    path = _find(root, "NUS_WID_Tags/AllTags1k.txt")  # half a gigabyte of text, 31 MB of bits
    bits = cached("nuswide-tags", [path], [total, columns], lambda: {"bits": np.packbits(
        _read_table(path, total, len(tags))[:, columns] > 0, axis=1)})["bits"]
    is_tagged = np.unpackbits(bits[rows], axis=1, count=len(columns)).view(np.int8)
    targets = np.concatenate([2 * is_tagged - 1, concept_targets], axis=1)
    return {"labels": labels, "targets": targets, "images": images,
            "unseen": range(len(columns), len(labels))}


def nuswide81(root, split, *, annotated_only=False):
    """NUS-WIDE's 81 concepts as the only labels, annotated_only: of the images that have one."""
    concepts, targets, images, *_ = _nuswide(root, split)
    rows = np.flatnonzero((targets > 0).any(axis=1)) if annotated_only else None
    return {"labels": concepts, "targets": targets, "images": images, "rows": rows}


def _note_placeholders(dataset):
    """Say how many images are Flickr's "photo no longer available", which comes as one file."""
    paths = list(dataset.paths())
    sizes = [os.path.getsize(path) for path in paths]
    times = Counter(sizes)  # photos seldom have the same size by chance: few files are read
    contents = Counter(hashlib.sha256(Path(os.fsdecode(path)).read_bytes()).digest()
                       for path, size in zip(paths, sizes) if times[size] >= 20)
    copies = sum(count for count in contents.values() if count >= 20)
    if copies:
        _note(f"{dataset.name}: {copies:,} of {len(paths):,} images are copies of one file, "
              f"probably the placeholder for photos no longer available")


def cub_label(name):
    """An attribute in words: has_bill_shape::hooked_seabird -> bird with a hooked seabird bill."""
    part, _, value = name.removeprefix("has_").partition("::")
    part, _, kind = part.replace("_", " ").rpartition(" ")  # "upper tail", "color"; "", "size"
    value = re.sub(r"\(.*?\)", "", value).replace("_", " ").strip()
    if not part:  # size, shape
        return f"{value} bird"
    if part == "primary":
        return f"mostly {value} bird"
    if kind == "length":  # longer than head
        return f"bird with a {part} {value.replace(' head', ' its head')}"
    value = re.sub(f"[ -]({part}|{kind})s?$", "", value)  # forked_tail, unique_pattern
    if kind == "pattern":
        part = f"{part} pattern"
    if part in ("wing", "eye", "leg"):
        part += "s"
    article = "" if part.endswith("s") else "an " if value[0] in "aeio" else "a "
    return f"bird with {article}{value} {part}"


def cub(root, split, *, not_visible="absent"):
    """CUB-200-2011 with its 312 attributes as labels, each annotated in every image by one person.
    not_visible: "absent" or "unknown", what an attribute is where the annotator could not see the
    part (certainty 1)."""
    def numbered(name):  # the texts of lines "number text"
        return [line.partition(" ")[2] for line in _lines(_find(root, name))]

    images = numbered("CUB_200_2011/images.txt")
    attributes = numbered("attributes.txt")
    is_training = numbered("CUB_200_2011/train_test_split.txt")
    path = _find(root, "CUB_200_2011/attributes/image_attribute_labels.txt")
    targets = np.zeros((len(images) + 1, len(attributes) + 1), np.int8)  # which count from 1
    with _expect("lines of image, attribute, 0 or 1, certainty", path):  # some have more entries
        image, attribute, present, certainty = np.loadtxt(
            path, np.int32, usecols=range(4), unpack=True, ndmin=2, encoding="utf-8-sig")
        values = np.array([-1, 1])[present]
        values[certainty == 1] = {"absent": -1, "unknown": 0}[not_visible]
        targets[image, attribute] = values
    rows = [row for row, text in enumerate(is_training) if (text == "1") == (split == "train")]
    folder = _find(root, "CUB_200_2011/images")
    return {"labels": [cub_label(name) for name in attributes], "targets": targets[1:, 1:][rows],
            "images": [os.path.join(folder, images[row]) for row in rows]}


def _read_openimages(path, column_of):
    """The verified labels as the arrays of a CSR matrix, and the images' file names S [F]."""
    _note(f"{path}: read once, which takes minutes")
    signs = {"1": 1, "1.0": 1, "0": -1, "0.0": -1}
    row_of, rows, columns, values = {}, array("i"), array("i"), array("b")
    try:
        with open(path, newline="", encoding="utf-8-sig") as lines:
            reader = csv.reader(lines)
            next(reader, None)
            for image, _, label, confidence in reader:
                if label in column_of:
                    rows.append(row_of.setdefault(f"{image}.jpg".encode(), len(row_of)))
                    columns.append(column_of[label])
                    values.append(signs[confidence])
    except (ValueError, LookupError, csv.Error) as error:
        raise UserError(f"{path}, line {reader.line_num}: not `ImageID,Source,LabelName,"
                        f"Confidence` with confidence 0 or 1: {error}") from None
    if not rows:
        raise UserError(f"{path}: no label of the vocabulary is in it")
    entries = torch.sparse_coo_tensor(np.stack([rows, columns]), values, dtype=torch.int8,
                                      size=(len(row_of), len(column_of)), check_invariants=True)
    # what was verified twice adds up: with different answers it is unknown
    matrix = entries.coalesce().to_sparse_csr()
    return {"files": np.array(list(row_of)), "starts": matrix.crow_indices().int().numpy(),
            "columns": matrix.col_indices().int().numpy(),
            "values": matrix.values().clamp(-1, 1).numpy()}


def openimages(root, split):
    """Open Images V4 zero-shot: 7,186 seen labels, then 400 unseen ones, as people verified them.
    What was not verified is unknown (0); images without a verified label are left out. The targets
    are sparse: dense ones would take 43 GB."""
    classes = _find(root, "2018_04/class-descriptions.csv")
    seen = _lines(_find(root, "2018_04/classes-trainable.txt"))
    # a pickled array: its strings are taken, nothing that it says is executed
    listed = _find(root, "2018_04/unseen_labels.pkl")
    chosen = _find(root, "2018_04/top_400_unseen.csv")  # numbers in that list, from 0
    with _expect(f"numbers of class ids in {listed}", chosen):
        operations = pickletools.genops(Path(listed).read_bytes())
        ids = [value for _, value, _ in operations if str(value).startswith("/m/")]
        unseen = [ids[int(number)] for number in _lines(chosen)]
    times, labels = Counter(), []
    with _expect("a list of all classes", classes):
        rows = list(csv.reader(_lines(classes)))
        _check_unique([class_id for class_id, _ in rows], f"{classes}: ids")
        name_of = dict(rows)
        for name in [name_of[class_id].strip() for class_id in seen + unseen]:
            times[name] += 1
            labels.append(name if times[name] == 1 else f"{name} ({times[name]})")  # Bat, Bat (2)
    path = _find(root, f"2018_04/{split}-annotations-human-imagelabels.csv")
    vocabulary = seen if split == "train" else seen + unseen
    column_of = {class_id: column for column, class_id in enumerate(vocabulary)}
    arrays = cached(f"openimages-{split}-files", [path], vocabulary,
                    lambda: _read_openimages(path, column_of))
    files, *csr = [arrays[key] for key in ("files", "starts", "columns", "values")]
    folder = os.fsencode(os.path.join(_find(root, split), ""))
    return {"labels": labels, "unseen": range(len(seen), len(labels)),
            "images": np.char.add(folder, files),
            "targets": torch.sparse_csr_tensor(*map(torch.from_numpy, csr),
                                               (len(files), len(labels)), check_invariants=True)}


# by category id
COCO_LABELS = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat,
traffic light, fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow,
elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis,
snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket,
bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli,
carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv,
laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book,
clock, vase, scissors, teddy bear, hair drier, toothbrush""".replace("\n", " ").split(", ")
# zero-shot split of Bansal et al., "Zero-Shot Object Detection", ECCV 2018: seen are 48 others,
# neither are the 15 of two words
COCO_UNSEEN = """airplane, bus, cat, dog, cow, elephant, umbrella, tie, snowboard, skateboard, cup,
knife, cake, couch, keyboard, sink, scissors""".replace("\n", " ").split(", ")


def _coco_instances(path):
    """Arrays: file names [F], label names [C] by category id, and boxes int8 [F, C]: 0 where there
    is none, 1 where all are crowds, else 2."""
    def by_id(kind, key):
        """{id: text} of the file's images or categories; neither may be there twice."""
        _check_unique([entry["id"] for entry in content[kind]], f"{path}: ids of {kind}")
        texts = {entry["id"]: entry.get(key) for entry in content[kind]}
        for number, text in texts.items():
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"{path}: {kind}, id {number}: {key} must be a text, not {text!r}")
        _check_unique(texts.values(), f"{path}: {key} of {kind}")
        return texts

    # left out as soon as they are read: the outlines take over a gigabyte
    content = _parse_json(read_text(path), path, object_hook=lambda entry: {
        key: value for key, value in entry.items() if key != "segmentation"})
    with _expect("a file of COCO instances", path):
        files, names = by_id("images", "file_name"), by_id("categories", "name")
        row_of = {image: row for row, image in enumerate(files)}
        column_of = {category: column for column, category in enumerate(sorted(names))}
        boxes = np.zeros((len(files), len(names)), np.int8)
        for box in content["annotations"]:
            image, category = box["image_id"], box["category_id"]
            if image not in files or category not in names:
                raise UserError(f"{path}: annotation {box.get('id')} is of image {image}, category "
                                f"{category}, which must both be in the file")
            index = row_of[image], column_of[category]
            boxes[index] = max(boxes[index], 1 if box.get("iscrowd") else 2)
    return {"files": np.array(list(files.values())), "boxes": boxes,
            "labels": np.array([names[category] for category in column_of])}


def coco(root, split, *, annotated_only=False, drop_crowd=False, zero_shot=False):
    """COCO 2014, val2014 as the test split, or else one other pair of instances_train*.json and
    instances_val*.json, as of COCO 2017 or of an annotation tool; every entry is known.

    annotated_only leaves out images without a label. drop_crowd: a label is not present where all
    its boxes are crowds. zero_shot: the 65 labels of Bansal et al. (ECCV 2018), 17 of them unseen;
    training images that show an unseen label are left out.
    """
    part = {"train": "train", "test": "val"}[split]
    official = f"annotations/instances_{part}2014.json"
    found = sorted(glob.glob(f"annotations/instances_{part}*.json", root_dir=root))
    if len(found) > 1 and official not in found:
        raise UserError(f"{root}: keep one of {', '.join(found)}")
    path = _find(root, official, *found)
    ending = Path(path).stem.removeprefix(f"instances_{part}")
    arrays = cached(f"coco-{part}", [path], "boxes", lambda: _coco_instances(path))
    labels, files, boxes = arrays["labels"].tolist(), arrays["files"].tolist(), arrays["boxes"]
    unseen = []
    if zero_shot:
        if labels != COCO_LABELS:
            raise UserError(f"{path}: --zero-shot needs COCO's 80 categories")
        boxes = boxes[:, [" " not in label for label in labels]]
        labels = [label for label in labels if " " not in label]
        unseen = [labels.index(label) for label in COCO_UNSEEN]
    targets = np.where(boxes > (1 if drop_crowd else 0), 1, -1).astype(np.int8)
    is_used = (targets > 0).any(axis=1) if annotated_only else np.ones(len(targets), bool)
    if zero_shot and split == "train":
        is_used &= ~boxes[:, unseen].any(axis=1)  # a crowd shows the label too
    folders = f"{part}{ending}", f"images/{part}{ending}", "images", "annotations", ""
    folder = next((folder for folder in folders for name in files[:100]
                   if os.path.exists(os.path.join(root, folder, name))), folders[0])
    return {"labels": labels, "targets": targets, "unseen": unseen, "rows": np.flatnonzero(is_used),
            "images": [os.path.join(root, folder, name) for name in files],
            "release": f"coco{ending}"}


# Pascal VOC writes potted plant, dining table and tv monitor as one word, in which CLIP's text
# tower would not recognise them; aeroplane, motorbike and sofa stay
VOC_LABELS = """aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dining table,
dog, horse, motorbike, person, potted plant, sheep, sofa, train, tv monitor""".replace(
    "\n", " ").split(", ")


def _voc(root, year, part, difficult):
    root = os.path.dirname(_find(root, f"VOCdevkit/VOC{year}/ImageSets", f"VOC{year}/ImageSets",
                                 "ImageSets"))
    images = _lines(_find(root, f"ImageSets/Main/{part}.txt"))
    column_of = {label.replace(" ", ""): column for column, label in enumerate(VOC_LABELS)}
    value = {"absent": -1, "unknown": 0, "present": 1}[difficult]
    targets = np.full((len(images), len(VOC_LABELS)), -1, np.int8)
    for target, image in zip(targets, images):
        path = _find(root, f"Annotations/{image}.xml")
        with _expect("an annotation of VOC's 20 classes", path):
            # of the objects themselves: parts of a person have names too
            for thing in ElementTree.parse(path).getroot().findall("object"):
                column = column_of[thing.findtext("name", "").strip()]
                is_difficult = thing.findtext("difficult", "").strip() == "1"
                target[column] = max(target[column], value if is_difficult else 1)
    folder = _find(root, "JPEGImages")
    return {"labels": VOC_LABELS, "targets": targets,
            "images": [os.path.join(folder, f"{image}.jpg") for image in images]}


def voc2007(root, split, *, difficult="absent"):
    """Pascal VOC 2007: trainval for training and test; 20 labels. difficult: what a label is,
    "absent", "unknown" or "present", where all its objects in an image are marked as difficult;
    all other entries are known."""
    return _voc(root, "2007", "trainval" if split == "train" else "test", difficult)


def voc2012(root, split, *, difficult="absent"):
    """Pascal VOC 2012: train for training, val as the test split, because the labels of its test
    images are not public; else as voc2007."""
    return _voc(root, "2012", "train" if split == "train" else "val", difficult)


def vg200(root, split):
    """Visual Genome with 200 labels (SSGRL, ICCV 2019); all that is not annotated is absent."""
    names = _lines(_find(root, "vg_category_200.txt"))
    images = [os.path.basename(image) for image in _lines(_find(root, f"{split}_list_500.txt"))]
    path = _find(root, "vg_category_200_labels_index.json")
    indices_of = _parse_json(read_text(path), path)  # {file name: label indices}
    targets = np.full((len(images), len(names)), -1, np.int8)
    for target, image in zip(targets, images):
        with _expect(f"a list of numbers below {len(names)}", f"{path}, {image}"):
            for index in indices_of[image]:
                if index not in range(len(names)):
                    raise ValueError(index)
                target[index] = 1
    folder = _find(root, "VG_100K")
    return {"labels": names, "targets": targets,
            "images": [os.path.join(folder, image) for image in images]}


def _folder_entries(path):
    """{path of the image: (where it is described, present labels, absent labels or "rest")}"""
    def stripped(names):
        if not isinstance(names, list):
            raise TypeError(f"{names!r} is no list")
        names = [name.strip() for name in names]
        if "" in names:
            raise ValueError("an empty name")
        return names

    entries = {}
    for where, entry in read_json(path):
        with _expect('{"image": "...", "present": ["..."], "absent": ["..."] or "rest"}', where):
            if not {"present", "absent"} & entry.keys():  # other keys, of an export, are ignored
                raise ValueError("neither present nor absent")
            image = os.path.normpath(os.path.join(os.path.dirname(path), entry["image"]))
            present, absent = stripped(entry.get("present", [])), entry.get("absent", [])
            absent = absent if absent == "rest" else stripped(absent)
        if image in entries:
            raise UserError(f"{where}: {image} is listed twice, also at {entries[image][0]}")
        both = {*present}.intersection(absent if absent != "rest" else ())
        if both:
            raise UserError(f"{where}: '{min(both)}' is both present and absent")
        entries[image] = where, present, absent
    return entries


def folder(root, split):
    """Images of your own, described by a line each in train.jsonl and test.jsonl, without which a
    fifth of the former is the test split. Labels: those of labels.txt, or else those that occur."""
    paths = {name: os.path.join(root, f"{name}.jsonl") for name in ("train", "test")}
    lists = {name: _folder_entries(path) for name, path in paths.items() if os.path.exists(path)}
    source = split if "test" in lists else "train"
    _find(root, f"{source}.jsonl")  # or an error
    entries, rows = lists[source], None
    if "test" not in lists:
        count = max(1, len(entries) // 5)
        is_test = np.random.RandomState(0).permutation(len(entries)) < count
        rows = np.flatnonzero(is_test == (split == "test"))
        _note_once(f"{root}: there is no test.jsonl: {count:,} of the {len(entries):,} images of "
                   f"train.jsonl, the same in every run, are the test split")
    label_file, unseen_file = os.path.join(root, "labels.txt"), os.path.join(root, "unseen.txt")
    unseen = _lines(unseen_file) if os.path.exists(unseen_file) else []
    if os.path.exists(label_file):
        labels = _lines(label_file)
    else:
        named = [names for listed in lists.values() for _, *both in listed.values()
                 for names in both if names != "rest"]
        labels = sorted({label for names in named for label in names})
    known = labels
    for label in sorted({*unseen} - {*known}):
        near = difflib.get_close_matches(label, known, 1)
        hint = f", but '{near[0]}' is" if near else ""
        message = f"{unseen_file}: '{label}' is no label{hint}"
        if os.path.exists(label_file):
            raise UserError(message)
        _note_once(f"{message}; taken as a new one, which no image is annotated with")
        labels = sorted([*labels, label])
    if not labels:
        raise UserError(f"{root}: no image is annotated with a label")
    if len(unseen) == len(labels):
        raise UserError(f"{unseen_file}: must not name all of the {len(labels)} labels")
    column_of = {label: column for column, label in enumerate(labels)}
    targets = np.zeros((len(entries), len(labels)), np.int8)
    for target, (where, present, absent) in zip(targets, entries.values()):
        with _expect(f"labels of {label_file}", where):
            target[slice(None) if absent == "rest" else [column_of[name] for name in absent]] = -1
            target[[column_of[name] for name in present]] = 1
    return {"labels": labels, "targets": targets, "images": list(entries), "rows": rows,
            "unseen": [column_of[label] for label in unseen]}


def toy(root, split, *, zero_shot=True, first=None):
    """10,000 training and 2,000 test scenes of the toy world, each a function of its index.

    zero_shot: a quarter of the labels is unseen, and the training scenes show none of these things.
    Otherwise all labels are seen. first: only so many scenes.
    """
    count, seed = (10_000, 1) if split == "train" else (2_000, 2)
    count = min(count, first or count)
    things = tuple(world.SEEN) if zero_shot and split == "train" else None
    targets = np.full((count, len(world.LABELS)), -1, np.int8)
    for i, target in enumerate(targets):
        target[[thing for thing, *_ in world.scene_objects("benchmark", seed, i, things)]] = 1
    return {"labels": world.LABELS, "targets": targets,
            "images": world.Scenes(count, seed, things),
            "unseen": world.UNSEEN if zero_shot else []}


DATASETS = {function.__name__: function for function in (
    toy, nuswide, nuswide81, coco, voc2007, voc2012, vg200, cub, openimages, folder)}
# images of the training and the test split, as published; other releases differ
PUBLISHED = {"nuswide": (161_789, 107_859), "coco2014": (82_783, 40_504),
             "coco2017": (118_287, 5_000), "voc2007": (5_011, 4_952), "voc2012": (5_717, 5_823),
             "vg200": (82_904, 10_000), "cub": (5_994, 5_794)}


def load_dataset(name, root=None, split="train", transform=None, *, limit=None,
                 allow_missing=False, **options):
    """The "train" or "test" split of a dataset as a MultiLabelDataset.

    name: a key of DATASETS. root: its directory, data/NAME by default; "toy" has none. limit: only
    so many images. options: the keyword-only arguments of the dataset's function; None counts as
    not given. Files of the test split that cannot be decoded are left out.
    """
    if name not in DATASETS:
        raise UserError(f"unknown dataset '{name}', known are: {', '.join(DATASETS)}")
    if split not in ("train", "test"):
        raise UserError(f"unknown split '{split}', known are: train, test")
    options = {option: value for option, value in options.items() if value is not None}
    for option in options.keys() - inspect.signature(DATASETS[name]).parameters.keys():
        raise UserError(f"--{option.replace('_', '-')} is not for {name}")
    own_name = name.removesuffix("81")  # both of NUS-WIDE share a folder and a layout
    if name == "toy":
        if root:
            raise UserError(f"--root {root}: the toy world has no files; --data names a dataset")
        options["first"] = limit  # what nobody looks at need not be drawn
    root = _spelled(os.path.expanduser(root or f"data/{own_name}"))
    try:
        parts = DATASETS[name](root, split, **options)
        if split == "train" and name != "openimages":  # which is sparse, and has none of them
            parts["targets"][:, list(parts.get("unseen", ()))] = 0
        release = parts.pop("release", own_name)
        if release in PUBLISHED:
            count, published = len(parts["images"]), PUBLISHED[release][split == "test"]
            warning = "" if count == published else "; WARNING: another release"
            _note(f"{release} {split}: {count:,} images listed, {published:,} published{warning}")
        dataset = MultiLabelDataset(**parts, transform=transform, name=name,
                                    on_error="replace" if split == "train" else "raise",
                                    allow_missing=allow_missing)
    except OSError as error:
        raise UserError(f"{name}: {error} (from {os.getcwd()}; --root DIR names the folder)\n\n"
                        f"{_layout(own_name)}") from None
    if own_name == "nuswide":
        _note_placeholders(dataset)
    if limit is not None:
        dataset = dataset.subset(range(min(limit, len(dataset))))
    if split == "test":
        dataset.leave_out_damaged()
    return dataset


def _layout(name):
    """What DATASETS.md says of a dataset's files: its section down to the commands."""
    text = Path(__file__).with_name("DATASETS.md").read_text("utf-8")
    command = rf"\n    python \w+\.py --data {name}\b"
    section = next(part for part in text.split("\n## ") if re.search(command, part))
    return section.partition("\n    python")[0].rstrip()


def load_splits(args, with_training=True):
    """What a run starts with, as parsed arguments name it -> (training split or None, test split),
    (None, None) with --labels. What they hold is printed: images, labels, known entries, and what
    follows from gaps. UserError where --output holds another run's results."""
    if args.output and not getattr(args, "resume", False):
        found = [*Path(args.output).rglob("last.pt"), *Path(args.output).glob("results.json")]
        if found:
            how = "--resume it or name" if hasattr(args, "resume") and not args.eval else "name"
            raise UserError(f"{found[0]} is another run's: {how} another --output")
    if getattr(args, "labels", None):
        return None, None
    options = {name: getattr(args, name) for name in (
        "limit", "allow_missing", "annotated_only", "drop_crowd", "zero_shot", "difficult",
        "not_visible")}
    test = load_dataset(args.data, args.root, "test", **options)
    training = load_dataset(args.data, args.root, "train", **options) if with_training else None
    if training and training.labels != test.labels:
        differing = _some(sorted({*training.labels} ^ {*test.labels})) or "another order"
        raise UserError(f"{test.name}: the splits have different labels: {differing}")
    if training:
        _describe("training", training, training.seen)
    _describe("test", test, torch.arange(len(test.labels)))
    both = {*test.paths()}.intersection(training.paths()) if training else None
    if both:
        print(f"images in both splits: {len(both):,}, e.g. {os.fsdecode(min(both))}")
    return training, test


def _describe(split, dataset, columns):
    """Print what is known of the labels of these columns."""
    present, absent = [count[columns] for count in dataset.counts()]
    unseen = f" and {len(dataset.unseen)} unseen ones" if len(dataset.unseen) else ""
    print(f"{split}: {len(dataset):,} images, {len(dataset.seen):,} labels{unseen}")
    for kind, count in (("present", present), ("absent", absent)):
        print(f"  known to be {kind}: {count.sum():,} entries, of a label at least "
              f"{count.min():,}, median {count.median():,}")
        without = [dataset.labels[column] for column in columns[count == 0]]
        if without:
            print(f"    never ({len(without):,} of the labels): {_some(without)}")
    if not ((present > 0) & (absent > 0)).any():
        print("  no label has both, so none can be learned or measured")
    elif split == "test" and (absent == 0).any():
        print("  a label that is never known to be absent has AP 1, whatever the scores")
    if dataset.name == "folder" and not absent.any():
        print('  where a line names all that its image shows, write "absent": "rest"')
    if dataset.missing:
        print(f"  images missing or damaged, and left out: {dataset.missing:,}")


# ---- the command line

def add_options(parser):
    """Add the options that every script has, beside those of its method: --data and what
    load_dataset takes, those of a run, and those of a trained model, whose group it returns."""
    def threshold(text):
        if text != "best" and math.isnan(float(text)):
            raise argparse.ArgumentTypeError("a number or best")
        return text if text == "best" else float(text)

    add = parser.add_argument_group("data").add_argument
    add("--data", default="toy", choices=list(DATASETS), help="folder: images of your own")
    add("--root", metavar="DIR", help="its folder, laid out as DATASETS.md shows (data/NAME)")
    add("--limit", type=at_least(1), help="only so many images of each split: a quick look")
    flag = {"action": argparse.BooleanOptionalAction}  # None where it was not given
    add("--allow-missing", **flag, help="go on if over 5%% of the images are missing")
    add("--annotated-only", **flag, help="coco, nuswide81: drop images without a label")
    add("--drop-crowd", **flag, help="coco: boxes of crowds do not count")
    add("--zero-shot", **flag, help="coco: 48 seen and 17 unseen labels; toy: 42 and 14")
    add("--difficult", choices=["absent", "unknown", "present"], help="of VOC (absent)")
    add("--not-visible", choices=["absent", "unknown"], help="cub: parts out of sight (absent)")
    add = parser.add_argument_group("run").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=at_least(0), default=min(8, os.cpu_count() or 1),
        help="processes that load images (as many as cores, at most 8)")
    add("--precision", default="fp32", choices=["fp32", "bf16"])
    add("--seed", type=at_least(0), default=0)
    add("--output", metavar="PATH", help="the run's folder (runs/METHOD-DATA); of --predict a file")
    add("--quiet", action="store_true", help="no progress bars")
    group = parser.add_argument_group("a trained model")
    add = group.add_argument
    add("--eval", metavar="FILE", help="evaluate this checkpoint instead of training")
    add("--predict", nargs="+", metavar="IMAGE", help="images, folders or quoted patterns")
    add("--checkpoint", metavar="FILE", help="the trained model for --predict")
    add("--top", type=at_least(1), help="labels to predict (5; with --threshold all above it)")
    add("--threshold", metavar="T", type=threshold,
        help="the least score of a label to predict, or best: of the highest OF1 in results.json")
    add("--heatmap", metavar="DIR", help="a picture per image of where its best labels were seen")
    return group


def at_least(minimum, kind=int):
    """A type for argparse: a number that is not below the minimum."""
    def number(text):
        value = kind(text)
        if not value >= minimum:  # NaN too
            raise argparse.ArgumentTypeError(f"{text} is below {minimum}")
        return value
    return number


def read_labels(text):
    """The labels that --labels names: the lines of a file, or else separated by commas."""
    where, labels = "--labels", text.split(",")
    if os.path.isfile(text):
        where, labels = text, [line for line in read_text(text).split("\n") if line.strip()]
    elif text.endswith(".txt") and len(labels) == 1:
        raise UserError(f"--labels: there is no file {text}")
    labels = [label.strip() for label in labels]
    if not all(labels) or not labels:
        raise UserError(f"{where}: an empty name")
    _check_unique(labels, f"{where}: labels")
    return labels


def parse(parser, argv, method, toy_options, evaluated=()):
    """A script's command line -> (args, the state of the checkpoint to start from or None, the
    names of what is typed).

    What is typed wins over the checkpoint's own options, or over those of the toy world.
    An option without effect is refused, by the titles of the parser's groups; evaluated: those of
    training that --eval uses. --labels that are typed become a list, --threshold best a number."""
    args = parser.parse_args(argv)
    untyped = object()  # argparse sets a default only where there is no value yet
    found = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), untyped)))
    typed = {name for name, value in vars(found).items() if value is not untyped}
    group = {group.title: {action.dest for action in group._group_actions}
             for group in parser._action_groups}
    trained, always = group["a trained model"], {"device", "precision", "quiet", "output"}
    if args.predict:
        mode, used = "with --predict", always | group["model"] | (trained - {"eval"})
    elif args.eval:
        used = always | group["model"] | group["data"] | {"eval", "workers", *evaluated}
        mode = "with --eval"
    elif "labels" in typed - trained:  # lang_cls.py's, which stand for a dataset
        mode, used = "with --labels", typed - trained - group["data"]
    else:
        mode, used = "in training", typed - trained
    for name in sorted(typed - used):
        parser.error(f"--{name.replace('_', '-')} has no effect {mode}")
    if args.threshold == "best" and ("labels" in typed or not args.checkpoint):
        parser.error("--threshold best is of a --checkpoint's run and of its labels")

    named = "labels" if "labels" in typed else args.data
    output = args.output or f"runs/{method}-{named}"  # of a training run
    start, saved = args.checkpoint or args.eval, None
    if getattr(args, "resume", False):  # of a sweep the newest, which has the last arguments
        checkpoints = Path(output).rglob("last.pt")
        start = max(checkpoints, key=os.path.getmtime, default=f"{output}/last.pt")
    if start:
        saved = read_checkpoint(start, method)
        # of this command, not of the run that was saved
        here = {"output", "device", "resume", "predict", "eval", "checkpoint", "workers", "quiet"}
        if "data" in typed and args.data != saved["args"]["data"]:
            here |= group["data"]
        saved["args"] |= {name: getattr(args, name, None) for name in here}
        args = parser.parse_args(argv, argparse.Namespace(**saved["args"]))
    elif args.data == "toy" and not args.predict and "labels" not in typed:
        args = parser.parse_args(argv, parser.parse_args(toy_options.split()))
    if not (args.predict or args.eval):
        args.output = output
    if "labels" in typed:
        args.labels = read_labels(args.labels)
    if args.threshold == "best":
        path = Path(args.checkpoint).with_name("results.json")
        args.threshold = _parse_json(read_text(path), path).get("threshold")
        if args.threshold is None:
            raise UserError(f"{path} has no threshold: --threshold takes a number too")
    return args, saved, typed


def autocast(args):
    """What is computed in --precision."""
    device = torch.device(args.device).type
    return torch.autocast(device, torch.bfloat16, enabled=args.precision == "bf16")


def load_weights(model, clip, saved, labels, args):
    """A checkpoint's weights into a model; UserError where they are of another CLIP than --clip,
    for other labels (None, in the checkpoint or here, are any), or of another kind of model."""
    if saved["clip_fingerprint"] != clip.fingerprint():
        raise UserError(f"the checkpoint belongs to another CLIP than --clip {args.clip}")
    if labels is not None and saved["labels"] not in (None, labels):
        new = _some([label for label in labels if label not in saved["labels"]])
        gone = _some([label for label in saved["labels"] if label not in labels])
        changes = "another order"
        if new or gone:
            changes = f"new: {new or 'none'}; gone: {gone or 'none'}"
        raise UserError(f"the checkpoint was trained for other labels than {args.data} has: "
                        f"{changes}; labels.txt pins them")
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the checkpoint is of another kind of model: {reason}") from None


@contextlib.contextmanager
def way_back(folder):
    """Around a training: says what an interrupted user can do next."""
    try:
        yield
    except KeyboardInterrupt:
        is_saved = any(Path(folder).rglob("last.pt"))  # a sweep's are in folders of their own
        advice = "--resume goes on" if is_saved else "no epoch was finished, start again"
        raise KeyboardInterrupt(f"; {advice}") from None


def run(main, *errors):
    """main() of a script; what is the user's to mend is one line on stderr and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a label or a file's name may be in any script
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt as interrupt:
        sys.exit(f"\ninterrupted{interrupt}")
    except BrokenPipeError:  # | head: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError, *errors) as error:
        if isinstance(error, OSError) and error.filename:  # not there or not ours, a full disk
            error = f"{error.filename}: {error.strerror}"
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
