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
import inspect
import io
import itertools
import json
import os
import pickletools
import re
import sys
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset
from tqdm import tqdm

from toy import world

Image.MAX_IMAGE_PIXELS = 100_000_000  # Pillow refuses twice as many; from here it would warn
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # Open Images' targets


class UserError(ValueError):
    """The data, or what was asked of it, is wrong; the message says what, where and what to do."""

    def __str__(self):
        # a DataLoader repeats a worker's error with the worker's traceback in front
        return super().__str__().rsplit(f"{__name__}.UserError: ", 1)[-1].strip()


def _note(message):  # as a whole line, whatever other threads and a progress bar write
    tqdm.write(f"{message}\n", file=sys.stderr, end="")


# ---- images

_note_once = functools.cache(_note)


def open_image(file, *, on_truncated=_note_once):
    """An upright RGB PIL image from a path or a binary file object.

    EXIF rotation is applied, transparency composited on white, 16-bit grey scaled to 8 bits; of
    an animation the first frame is taken. A truncated photo is used as far as it goes, and named
    once on stderr. UserError names the file and the reason if it is missing, empty, not an image,
    of over 200 million pixels, or of pixels without a defined range (32-bit integers, floats).
    """
    is_path = isinstance(file, (str, os.PathLike))
    name = os.fspath(file) if is_path else getattr(file, "name", "image")
    start = b""
    try:
        with open(file, "rb") if is_path else contextlib.nullcontext(file) as opened:
            opened.seek(0)
            start = opened.read(12)
            image = Image.open(opened)  # from the first byte
            if max(image.size) > 100 * min(image.size):  # huge when the short side is 224
                raise ValueError(f"{image.width} x {image.height} is too long for its width")
            try:
                image.load()  # not reduced by Image.draft, which changes the pixels
            except OSError as error:
                if "truncated" not in str(error):
                    raise
                image = _load_truncated(image, opened)
                on_truncated(f"{name}: truncated, used as far as it goes")
            return _upright_rgb(image)
    except UnidentifiedImageError:
        reason = "not an image, or its header is damaged" if start else "the file is empty"
        if start[4:] in (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1"):
            reason = "HEIC: convert it to JPEG, or install pillow-heif and register its opener"
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    raise UserError(f"{name}: {reason}")


def _load_truncated(image, file):
    """What Pillow's LOAD_TRUNCATED_IMAGES gives, which is one switch for all threads."""
    if image.format in ("JPEG", "MPO"):
        file.seek(0)
        end_of_image = b"\xff\xd9"  # here the decoder shows what it has, of all scans
        image = Image.open(io.BytesIO(file.read() + end_of_image))
    else:
        image.tile = []  # nothing is left to be read
    image.load()
    extrema = image.convert("RGB").getextrema()
    if all(lowest == highest for lowest, highest in extrema):
        raise ValueError("truncated before its first pixels")
    return image


def _upright_rgb(image):
    with contextlib.suppress(Exception):  # damaged EXIF says nothing about the pixels
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        pixels = np.asarray(image).astype(np.int32)
        if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("32-bit pixels have no defined range, convert to 8 or 16 bits")
        image = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def image_files(paths):
    """Files as given, folders with every file in them that is not hidden, and patterns such as
    "photos/*.jpg" -> list of Path, each once; UserError where there is none."""
    files = []
    for pattern in map(os.path.expanduser, paths):
        names = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not names:
            raise UserError(f"--predict: no such file or folder: {pattern}")
        for path in map(Path, names):
            inside = sorted(path.rglob("*")) if path.is_dir() else [path]
            files += [file for file in inside if file.is_file() and not any(
                part.startswith(".") for part in file.relative_to(path).parts)]
    if not files:
        raise UserError(f"--predict: no files in {', '.join(map(str, paths))}")
    return list(dict.fromkeys(files))


def _ahead(function, items):
    """Yield (item, function(item)) in order; threads work ahead, but only by 16 items."""
    items, waiting = iter(items), deque()
    with ThreadPoolExecutor() as pool:
        while True:
            for item in itertools.islice(items, 16 - len(waiting)):
                waiting.append((item, pool.submit(function, item)))
            if not waiting:
                return
            item, result = waiting.popleft()
            yield item, result.result()


def photo_batches(args, preprocess):
    """What --predict sees: yield (paths, RGB PIL photos, images float [b, 3, H, W]) in order.

    args.predict: files, folders and patterns, as image_files takes them. b is at most 32, and
    fewer for large photos. Those in the JSON lines of args.output, if this file exists, are done
    and left out. What cannot be read is named on stderr; after the last batch this is a UserError
    for a file that was named itself, and where no image was left.
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
        if opened is None:
            unreadable.append(path)
        else:
            batch.append((path, *opened))
        pixels = sum(photo.width * photo.height for _, photo, _ in batch)
        if batch and (len(batch) == 32 or pixels > 100e6 or path == todo[-1]):
            paths, photos, images = map(list, zip(*batch))
            yield paths, photos, torch.stack(images)
            batch = []
    named = {Path(name).expanduser() for name in args.predict}.intersection(unreadable)
    if named or files == unreadable:
        raise UserError(f"{len(named) or len(files):,} of the files could not be read as images")
    if unreadable:
        _note(f"{len(unreadable):,} of {len(files):,} files could not be read as images")


def _predicted(path):
    """The photos in a file of predictions, as a set of their paths; {} where there is no file."""
    if not path or not os.path.exists(path):
        return set()
    text = read_text(path)
    whole = text[:text.rfind("\n") + 1]
    try:
        done = {_parse_json(line, path)["path"] for line in whole.split("\n") if line.strip()}
    except (TypeError, KeyError):
        raise UserError(f"{path}: not a file of predictions") from None
    if whole != text:
        write_file(path, whole)  # a killed run has cut the last line
    return done


# ---- the dataset

class MultiLabelDataset(Dataset):
    """Images with one target per label; [i] -> (image, full_targets[rows[i]]).

    labels: C names. targets: int8 [F, C] in {+1 present, -1 absent, 0 unknown} of the full list of
    images, kept as `full_targets`. images: a list of F paths, or an object whose [i] is an RGB PIL
    image. rows: int64 [N], which of the full list this dataset has; all by default. unseen:
    indices of the labels that training must not see; `seen` are the others.

    Files that do not exist are left out and counted in `missing`; more than 5% of them is a
    UserError unless allow_missing. A file that cannot be decoded is a UserError with
    on_error="raise" (evaluation). With "replace" (training) it is named once, the next readable
    image takes its place, and `replaced` counts it.
    """

    def __init__(self, labels, targets, images, *, transform=None, unseen=(), rows=None,
                 name="dataset", on_error="raise", allow_missing=False):
        self.name = name
        self.transform = transform
        self.on_error = on_error
        self.labels = [label.strip() for label in labels]
        self.images = images
        self.full_targets = torch.as_tensor(targets)
        self.rows = torch.arange(len(images)) if rows is None else torch.as_tensor(rows)
        self.missing = 0
        is_unseen = np.isin(np.arange(len(self.labels)), unseen)
        self.seen = torch.from_numpy(np.flatnonzero(~is_unseen))
        self.unseen = torch.from_numpy(np.flatnonzero(is_unseen))
        # in shared memory, because it is the DataLoader's workers that find out
        self.truncated = torch.zeros(len(images), dtype=torch.bool).share_memory_()
        self.unreadable = torch.zeros(len(images), dtype=torch.bool).share_memory_()
        self.are_files = isinstance(images, list)
        if not len(self.rows):
            raise UserError(f"{name}: there are no images")
        twice = [label for label, count in Counter(self.labels).items() if count > 1]
        if twice:
            raise UserError(f"{name}: labels given more than once: {', '.join(twice)}")
        full, shape = self.full_targets, [len(images), len(self.labels)]
        if full.dtype != torch.int8 or list(full.shape) != shape:
            raise UserError(f"{name}: targets must be int8 {shape} (images, labels), not "
                            f"{full.dtype} {list(full.shape)}")
        is_mapped = isinstance(targets, np.memmap)  # and was checked when made: it is large
        if not is_mapped and (full.min() < -1 or full.max() > 1):
            raise UserError(f"{name}: targets must be +1 (present), -1 (absent), 0 (unknown)")
        if self.are_files:
            self._leave_out_missing(allow_missing)

    def _leave_out_missing(self, allow_missing):
        # one listing per directory: a look-up per file takes minutes on a network disk
        paths = [os.path.split(self.images[row]) for row in self.rows.tolist()]
        folders = {folder for folder, _ in paths if os.path.isdir(folder or ".")}
        names_in = {folder: set(os.listdir(folder or ".")) for folder in folders}
        exists = torch.tensor([name in names_in.get(folder, ()) for folder, name in paths])
        self.missing = int((~exists).sum())
        if self.missing:
            first = self.images[int(self.rows[~exists][0])]
            count = f"{self.missing:,} of {len(paths):,}"
            message = f"{self.name}: {count} images missing, e.g. {first}"
            if self.missing == len(paths):
                raise UserError(message)
            if self.missing > 0.05 * len(paths) and not allow_missing:
                raise UserError(f"{message}; --allow-missing goes on without them")
            _note(f"{message}; going on without them")
            self.rows = self.rows[exists]

    @property
    def targets(self):
        """int8 [N, C]: full_targets[rows], without a copy if nothing is left out."""
        if torch.equal(self.rows, torch.arange(len(self.full_targets))):
            return self.full_targets
        return self.full_targets[self.rows]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        i = range(len(self))[i]
        # ten damaged files in a row are a damaged disk: stop rather than walk through all of it
        for step in range(min(10, len(self))):
            row = int(self.rows[(i + step) % len(self)])
            try:
                image = self.images[row]
                if self.are_files:
                    note = functools.partial(self._note_first, self.truncated, row)
                    image = open_image(image, on_truncated=note)
            except UserError as error:
                last_error = error
                if self.on_error == "raise":
                    raise
                self._note_first(self.unreadable, row, f"{error} (another takes its place)")
            else:
                image = image if self.transform is None else self.transform(image)
                return image, self.full_targets[row]
        raise UserError(f"{last_error}; nor can the images before it be read")

    def _note_first(self, noted, row, message):
        if not noted[row]:
            noted[row] = True
            _note(message)

    @property
    def replaced(self):
        """Number of images found unreadable so far, here or in a DataLoader's workers."""
        return int(self.unreadable[self.rows].sum())

    def shows(self, columns):
        """bool [N]: images that are known to show one of the labels of these columns."""
        return torch.cat([(self.full_targets[rows][:, columns] == 1).any(dim=1)
                          for rows in self.rows.split(4096)])

    def counts(self):
        """Known entries of every label: (present int64 [C], absent int64 [C])."""
        present = absent = torch.zeros(len(self.labels), dtype=torch.int64)
        for rows in self.rows.split(4096):
            targets = self.full_targets[rows]
            present = present + (targets == 1).sum(dim=0)
            absent = absent + (targets == -1).sum(dim=0)
        return present, absent

    def subset(self, indices):
        """The dataset of these images only; indices: integers, or a bool mask [N]."""
        rows = self.rows[torch.arange(len(self))[torch.as_tensor(indices)]]
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
        return self.subset(order[count:]), held_out


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
    for candidate in candidates:
        if os.path.exists(os.path.join(root, candidate)):
            return os.path.join(root, candidate)
    raise FileNotFoundError(f"{' or '.join(candidates)} not found in {root}")


def read_text(path):
    """The text of a UTF-8 file, with or without a byte-order mark; UserError if it is not one."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        reason = getattr(error, "strerror", "not UTF-8, save the file as UTF-8")
        raise UserError(f"{path}: {reason}") from None


def _entries(path, parse=lambda line: (line, None)):
    """{key: value} of the pairs that parse makes of a text file's lines; UserError names a line
    that is empty, has a key again, or of which parse raises a ValueError."""
    lines = [line.strip() for line in read_text(path).rstrip().split("\n")]
    if lines == [""]:
        raise UserError(f"{path}: the file is empty")
    entries = {}
    for number, line in enumerate(lines, 1):
        try:
            if not line:
                raise ValueError("the line is empty")
            key, value = parse(line)
            if key in entries:
                raise ValueError(f"{key} is listed twice")
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        entries[key] = value
    return entries


def _parse_json(text, where, **options):
    try:
        return json.loads(text, **options)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from None


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
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            if isinstance(content, (str, bytes)):
                file.write(content.encode() if isinstance(content, str) else content)
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


def _cache_file(name, paths, key, suffix):
    """A path in the cache folder: another one where a file of `paths` changes, or the key."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    stats = [(os.path.abspath(path), os.path.getsize(path), os.stat(path).st_mtime_ns)
             for path in paths]
    digest = hashlib.sha256(json.dumps([stats, key]).encode()).hexdigest()
    return folder / "clip_multilabel" / f"{name}-{digest[:16]}{suffix}"


def cached(name, paths, key, make):
    """make(), a dict of numpy arrays without objects, kept in the cache folder as long as `key`,
    anything that JSON can hold, and the files it was made of, `paths`, stay the same."""
    file = _cache_file(name, paths, key, ".npz")
    # whatever is wrong with the file, its sources are there
    with contextlib.suppress(Exception), np.load(file, allow_pickle=False) as content:
        return dict(content)
    arrays = make()
    with contextlib.suppress(OSError):  # or the next start is slow too
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = f"{file}.{os.getpid()}.npz"  # others may be at it too
        np.savez(unfinished, **arrays)
        os.replace(unfinished, file)
    return arrays


def read_checkpoint(path, method=None):
    """The dict that a script saved, on the CPU; UserError if it is not this method's, or for a
    file of anything else. Without method: any dict of weights."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        writer = state["method"] if method else state.keys()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such checkpoint") from None
    except Exception as error:  # whatever is wrong with the file, it is the user's to replace
        reason = repr(error).partition("\\n")[0]
        raise UserError(f"{path} is not a checkpoint: {reason}") from None
    if method and writer != method:
        raise UserError(f"{path} is a checkpoint of {writer}.py, not of {method}.py")
    return state


# ---- datasets: functions of root, split and options -> what MultiLabelDataset takes; a docstring
# shows the expected layout, and is printed where a file is not found

def _nuswide_images(root, split):
    """Image paths of a split, their rows in the label files, and the number of rows."""
    def parse(line):  # file names are unique across directories: lists are joined by them
        return re.split(r"[\\/]", line)[-1], line.replace("\\", "/")

    flickr = _find(root, "Flickr")
    everything = _entries(_find(root, "ImageList/Imagelist.txt"), parse)
    path = _find(root, f"ImageList/{split.title()}Imagelist.txt")
    names = list(_entries(path, parse))
    if not {*names} <= {*everything}:
        raise UserError(f"{path}: some images are not in Imagelist.txt")
    row_of = {name: row for row, name in enumerate(everything)}
    images = [os.path.join(flickr, everything[name]) for name in names]
    return images, [row_of[name] for name in names], len(everything)


def _read_table(path, rows, columns):
    """A text file of 0 and 1 separated by white space -> int8 [rows, columns], -1 and +1."""
    with open(path, "rb") as file:
        digits = np.frombuffer(file.read().translate(None, b" \t\r\n"), np.uint8) - ord("0")
    wrong = digits > 1  # unsigned: what sorts before "0" becomes large
    if wrong.any():
        raise UserError(f"{path}, row {wrong.argmax() // columns + 1}: an entry is not 0 or 1")
    if len(digits) != rows * columns:
        raise UserError(f"{path}: {len(digits):,} entries for {rows:,} images x {columns:,}")
    return 2 * digits.view(np.int8).reshape(rows, columns) - 1


def _nuswide_concepts(root, rows, total):
    """The names of the 81 concepts, and their targets int8 [F, 81]."""
    concepts = list(_entries(_find(root, "ConceptsList/Concepts81.txt", "Concepts81.txt")))
    folder = _find(root, "Groundtruth/AllLabels", "AllLabels")
    columns = [_read_table(_find(folder, f"Labels_{concept}.txt"), total, 1)
               for concept in concepts]
    return concepts, np.concatenate(columns, axis=1)[rows]


def nuswide(root, split):
    """NUS-WIDE zero-shot: 925 seen Flickr tags, then 81 unseen concepts annotated by people.

        ConceptsList/Concepts81.txt  NUS_WID_Tags/TagList1k.txt  AllTags1k.txt
        Groundtruth/AllLabels/Labels_<concept>.txt  Flickr/<directory>/<image>.jpg
        ImageList/Imagelist.txt  TrainImagelist.txt  TestImagelist.txt
    All lists (ImageList.zip and others), and the way to the images, are on the dataset's page:
    https://lms.comp.nus.edu.sg/wp-content/uploads/2019/research/nuswide/NUS-WIDE.html

    Seen are the 1,000 tags but those among the concepts. In the training split the concepts are
    unknown (0); in the test split every entry is known. -1 means not tagged, for the tags.
    """
    images, rows, total = _nuswide_images(root, split)
    concepts, concept_targets = _nuswide_concepts(root, rows, total)
    tags = list(_entries(_find(root, "NUS_WID_Tags/TagList1k.txt")))
    columns = [column for column, tag in enumerate(tags) if tag not in concepts]
    tag_targets = _read_table(_find(root, "NUS_WID_Tags/AllTags1k.txt"), total, len(tags))
    if split == "train":
        concept_targets[:] = 0
    labels = [tags[column] for column in columns] + concepts
    targets = np.concatenate([tag_targets[np.ix_(rows, columns)], concept_targets], axis=1)
    return {"labels": labels, "targets": targets, "images": images,
            "unseen": range(len(columns), len(labels))}


def nuswide81(root, split, *, annotated_only=False):
    """NUS-WIDE's 81 concepts as the only labels, annotated_only: of the images that have one."""
    images, rows, total = _nuswide_images(root, split)
    concepts, targets = _nuswide_concepts(root, rows, total)
    rows = np.flatnonzero((targets > 0).any(axis=1)) if annotated_only else None
    return {"labels": concepts, "targets": targets, "images": images, "rows": rows}


def _note_placeholders(dataset):
    """Say how many images are Flickr's "photo no longer available", which comes as one file."""
    paths = [dataset.images[row] for row in dataset.rows.tolist()]
    sizes = [os.path.getsize(path) for path in paths]
    times = Counter(sizes)  # photos seldom have the same size by chance: few files are read
    contents = Counter(hashlib.sha256(Path(path).read_bytes()).digest()
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
    if kind == "pattern":
        value = value.removesuffix(" pattern")
        part = f"{part} pattern"
    else:
        value = re.sub(f"[ -]{part}s?$", "", value)  # forked_tail
    if part in ("wing", "eye", "leg"):
        part += "s"
    article = "" if part.endswith("s") else "an " if value[0] in "aeio" else "a "
    return f"bird with {article}{value} {part}"


def cub(root, split, *, not_visible="absent"):
    """CUB-200-2011 with its 312 attributes as labels, each annotated in every image by one person.

        attributes.txt  CUB_200_2011/images/<class>/<image>.jpg
        CUB_200_2011/images.txt  train_test_split.txt  attributes/image_attribute_labels.txt
    as in the archive of https://www.vision.caltech.edu/datasets/cub_200_2011/

    not_visible: "absent" or "unknown", what an attribute is where the annotator could not see the
    part (certainty 1). Attributes become words by cub_label.
    """
    def numbered(name):  # the texts of lines "number text"
        return [line.partition(" ")[2] for line in _entries(_find(root, name))]

    images = numbered("CUB_200_2011/images.txt")
    attributes = numbered("attributes.txt")
    is_training = numbered("CUB_200_2011/train_test_split.txt")
    path = _find(root, "CUB_200_2011/attributes/image_attribute_labels.txt")
    targets = np.zeros((len(images) + 1, len(attributes) + 1), np.int8)  # which count from 1
    try:  # some lines have more than five entries: the first four are the same everywhere
        image, attribute, present, certainty = np.loadtxt(
            path, np.int32, usecols=range(4), unpack=True, ndmin=2, encoding="utf-8-sig")
        values = np.array([-1, 1])[present]
        values[certainty == 1] = {"absent": -1, "unknown": 0}[not_visible]
        targets[image, attribute] = values
    except (ValueError, IndexError) as error:
        raise UserError(f"{path}: {error}") from None
    rows = [row for row, text in enumerate(is_training) if (text == "1") == (split == "train")]
    folder = _find(root, "CUB_200_2011/images")
    return {"labels": [cub_label(name) for name in attributes], "targets": targets[1:, 1:][rows],
            "images": [os.path.join(folder, images[row]) for row in rows]}


def _openimages_unseen(list_file, number_file):
    """Class ids of the 400 unseen labels: the numbers in one file count the other's, from 0."""
    try:  # a pickled array: its strings are taken, nothing that it says is executed
        operations = pickletools.genops(Path(list_file).read_bytes())
        ids = [value for _, value, _ in operations if str(value).startswith("/m/")]
        return [ids[int(number)] for number in _entries(number_file)]
    except (ValueError, IndexError) as error:
        raise UserError(f"{number_file} must count class ids in {list_file}: {error}") from None


def _read_openimages(path, column_of, width, file):
    """Write verified labels to a file, int8 [F, width], and the images' names S [F] beside it."""
    _note(f"{path}: read once, which takes minutes, then {file} is used")
    signs = {"1": 1, "1.0": 1, "0": -1, "0.0": -1}
    names = []
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(f"{file}.{os.getpid()}")  # another name until it is whole
    try:
        with open(path, newline="", encoding="utf-8-sig") as lines, open(unfinished, "wb") as out:
            reader = csv.reader(lines)
            next(reader, None)
            for image, entries in itertools.groupby(reader, lambda entry: entry[0]):
                targets = np.zeros(width, np.int8)
                for _, _, label, confidence in entries:
                    if label in column_of:
                        column, sign = column_of[label], signs[confidence]
                        # verified twice with different answers: unknown
                        targets[column] = 0 if targets[column] == -sign else sign
                if targets.any():
                    names.append(image)
                    out.write(targets)
        if not names or len(set(names)) < len(names):
            raise ValueError("there are no labels, or the lines of an image are not together")
        np.save(f"{file}.npy", np.array(names, np.bytes_))
        os.replace(unfinished, file)
    except (ValueError, LookupError) as error:
        raise UserError(f"{path}, line {reader.line_num}: not `ImageID,Source,LabelName,"
                        f"Confidence` with confidence 0 or 1: {error}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def openimages(root, split):
    """Open Images V4 zero-shot: 7,186 seen labels, then 400 unseen ones, as people verified them.

        2018_04/class-descriptions.csv  classes-trainable.txt
        2018_04/unseen_labels.pkl  top_400_unseen.csv
        2018_04/train-annotations-human-imagelabels.csv  test-annotations-human-imagelabels.csv
        train/<ImageID>.jpg  test/<ImageID>.jpg
    https://storage.googleapis.com/openimages/web/download_v4.html; the lists of unseen labels are
    in the repositories of LESA and BiAM

    What was not verified is unknown (0), in training all unseen labels; images without a verified
    label are left out. The targets are mapped from a file in the cache, of 43 GB in training: they
    can be read only, writing to them ends Python.
    """
    class_file = _find(root, "2018_04/class-descriptions.csv")
    name_of = _entries(class_file, lambda line: next(csv.reader([line])))
    seen = list(_entries(_find(root, "2018_04/classes-trainable.txt")))
    unseen = _openimages_unseen(_find(root, "2018_04/unseen_labels.pkl"),
                                _find(root, "2018_04/top_400_unseen.csv"))
    labels = []
    times = Counter()
    for class_id in seen + unseen:
        if class_id not in name_of:
            raise UserError(f"{class_file}: '{class_id}' is not in it")
        name = name_of[class_id].strip()
        times[name] += 1
        labels.append(name if times[name] == 1 else f"{name} ({times[name]})")  # Bat, Bat (2)
    path = _find(root, f"2018_04/{split}-annotations-human-imagelabels.csv")
    vocabulary = seen if split == "train" else seen + unseen
    column_of = {class_id: column for column, class_id in enumerate(vocabulary)}
    file = _cache_file(f"openimages-{split}", [path], [vocabulary, len(labels)], ".int8")
    if not file.exists():
        _read_openimages(path, column_of, len(labels), file)
    folder = _find(root, split)
    images = [os.path.join(folder, f"{name.decode()}.jpg") for name in np.load(f"{file}.npy")]
    return {"labels": labels, "images": images, "unseen": range(len(seen), len(labels)),
            "targets": np.memmap(file, np.int8, "r", shape=(len(images), len(labels)))}


# by category id
COCO_LABELS = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat,
traffic light, fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow,
elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis,
snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket,
bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli,
carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv,
laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book,
clock, vase, scissors, teddy bear, hair drier, toothbrush""".replace("\n", " ").split(", ")
# zero-shot split of Bansal et al., "Zero-Shot Object Detection", ECCV 2018: 48 others are seen
COCO_UNSEEN = """airplane, bus, cat, dog, cow, elephant, umbrella, tie, snowboard, skateboard, cup,
knife, cake, couch, keyboard, sink, scissors""".replace("\n", " ").split(", ")
COCO_NEITHER = """traffic light, fire hydrant, stop sign, parking meter, sports ball, baseball bat,
baseball glove, tennis racket, wine glass, hot dog, potted plant, dining table, cell phone,
teddy bear, hair drier""".replace("\n", " ").split(", ")


def _coco_instances(path):
    """Arrays: file names [F], label names [C] by category id, and boxes int8 [F, C]: 0 where there
    is none, 1 where all are crowds, else 2."""
    def reduced(entry):  # as soon as it is read: the outlines take over a gigabyte
        return {key: value for key, value in entry.items() if key != "segmentation"}

    content = _parse_json(read_text(path), path, object_hook=reduced)
    try:
        row_of = {image["id"]: row for row, image in enumerate(content["images"])}
        names = {category["id"]: category["name"] for category in content["categories"]}
        column_of = {category: column for column, category in enumerate(sorted(names))}
        boxes = np.zeros((len(row_of), len(names)), np.int8)
        for box in content["annotations"]:
            index = row_of[box["image_id"]], column_of[box["category_id"]]
            boxes[index] = max(boxes[index], 1 if box.get("iscrowd") else 2)
        return {"files": np.array([image["file_name"] for image in content["images"]]),
                "labels": np.array([names[category] for category in column_of]), "boxes": boxes}
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not a file of COCO instances: {error!r}") from None


def coco(root, split, *, annotated_only=False, drop_crowd=False, zero_shot=False):
    """COCO 2014: train2014 for training, val2014 as the test split; every entry is known.

        annotations/instances_train2014.json  instances_val2014.json
        train2014/COCO_train2014_<number>.jpg  val2014/COCO_val2014_<number>.jpg
    Images and "2014 Train/Val annotations": https://cocodataset.org/#download

    annotated_only leaves out images without a label. drop_crowd: a label is not present where all
    its boxes are crowds. zero_shot: the 65 labels of Bansal et al. (ECCV 2018), 17 of them unseen;
    training images that show an unseen label are left out, in the others its entry is unknown (0).
    The test images are all of val2014; DualCoOp's are those with a label, which is annotated_only.
    """
    part = {"train": "train2014", "test": "val2014"}[split]
    path = _find(root, f"annotations/instances_{part}.json")
    arrays = cached(os.path.basename(path), [path], "boxes", lambda: _coco_instances(path))
    labels = arrays["labels"].tolist()
    boxes = arrays["boxes"]
    unseen = []
    if zero_shot:
        if labels != COCO_LABELS:
            raise UserError(f"{path}: --zero-shot needs COCO's 80 categories")
        columns = [c for c, label in enumerate(labels) if label not in COCO_NEITHER]
        boxes = boxes[:, columns]
        labels = [labels[column] for column in columns]
        unseen = [labels.index(label) for label in COCO_UNSEEN]
    targets = np.where(boxes > (1 if drop_crowd else 0), 1, -1).astype(np.int8)
    is_used = (targets > 0).any(axis=1) if annotated_only else np.ones(len(targets), bool)
    if zero_shot and split == "train":
        is_used &= ~boxes[:, unseen].any(axis=1)  # a crowd shows the label too
        targets[:, unseen] = 0
    folder = _find(root, part)
    return {"labels": labels, "targets": targets, "unseen": unseen, "rows": np.flatnonzero(is_used),
            "images": [os.path.join(folder, name) for name in arrays["files"].tolist()]}


# Pascal VOC writes potted plant, dining table and tv monitor as one word, in which CLIP's text
# tower would not recognise them; aeroplane, motorbike and sofa stay
VOC_LABELS = """aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dining table,
dog, horse, motorbike, person, potted plant, sheep, sofa, train, tv monitor""".replace(
    "\n", " ").split(", ")


def voc2007(root, split, *, difficult="absent"):
    """Pascal VOC 2007: trainval for training and test; 20 labels.

        VOCdevkit/VOC2007/ImageSets/Main/trainval.txt  test.txt
        VOCdevkit/VOC2007/Annotations/<image>.xml  JPEGImages/<image>.jpg
    both archives in one place: http://host.robots.ox.ac.uk/pascal/VOC/voc2007/

    difficult: what a label is, "absent", "unknown" or "present", where all its objects in an image
    are marked as difficult; all other entries are known.
    """
    root = os.path.dirname(_find(root, "VOCdevkit/VOC2007/ImageSets", "VOC2007/ImageSets",
                                 "ImageSets"))
    part = {"train": "trainval", "test": "test"}[split]
    images = list(_entries(_find(root, f"ImageSets/Main/{part}.txt")))
    column_of = {label.replace(" ", ""): column for column, label in enumerate(VOC_LABELS)}
    targets = np.full((len(images), len(VOC_LABELS)), -1, np.int8)
    for row, image in enumerate(images):
        path = _find(root, f"Annotations/{image}.xml")
        try:
            objects = ElementTree.parse(path).getroot().findall("object")
            # names of the objects themselves: parts of a person have names too
            columns = [column_of[thing.findtext("name", "").strip()] for thing in objects]
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            raise UserError(f"{path}: not an annotation of VOC: {error!r}") from None
        easy = [thing.findtext("difficult", "").strip() != "1" for thing in objects]
        targets[row, columns] = {"absent": -1, "unknown": 0, "present": 1}[difficult]
        targets[row, np.array(columns, int)[easy]] = 1
    folder = _find(root, "JPEGImages")
    return {"labels": VOC_LABELS, "targets": targets,
            "images": [os.path.join(folder, f"{image}.jpg") for image in images]}


def vg200(root, split):
    """Visual Genome with 200 labels (SSGRL, ICCV 2019); all that is not annotated is absent.

        train_list_500.txt  test_list_500.txt  vg_category_200_labels_index.json
        vg_category_200.txt    200 names, a line each: line 1 is label 0
        VG_100K/<image>.jpg    with the images of VG_100K_2 moved into it
    Images: https://homes.cs.washington.edu/~ranjay/visualgenome/api.html. SSGRL's lists give only
    numbers of labels; these methods need names. 82,904 training images, not 98,249 as printed.
    """
    names = list(_entries(_find(root, "vg_category_200.txt")))
    images = list(_entries(_find(root, f"{split}_list_500.txt")))
    path = _find(root, "vg_category_200_labels_index.json")
    indices_of = _parse_json(read_text(path), path)  # {file name: label indices}
    targets = np.full((len(images), len(names)), -1, np.int8)
    for row, image in enumerate(images):
        try:
            targets[row, np.array(indices_of[os.path.basename(image)], np.int64)] = 1
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"{path}: the labels of {image} must be a list of numbers below "
                            f"{len(names)}, as there are names: {error!r}") from None
    folder = _find(root, "VG_100K")
    return {"labels": names, "targets": targets,
            "images": [os.path.join(folder, os.path.basename(image)) for image in images]}


def _folder_entries(path):
    """{path of the image: (where it is described, present labels, absent labels or "rest")}"""
    def cleaned(names):
        stripped = [name.strip() for name in names]
        if not isinstance(names, list) or not all(stripped):
            raise ValueError
        return stripped

    entries = {}
    for where, entry in read_json(path):
        try:
            image, present, absent = ({"image": None, "present": [], "absent": []} | entry).values()
            image = os.path.normpath(os.path.join(os.path.dirname(path), image))
            present = cleaned(present)
            absent = absent if absent == "rest" else cleaned(absent)
        except (TypeError, ValueError, AttributeError):
            raise UserError(f'{where}: not {{"image": "...", "present": ["..."], "absent": ["..."] '
                            f'or "rest"}}') from None
        if image in entries:
            raise UserError(f"{where}: {image} is listed twice, also at {entries[image][0]}")
        if absent != "rest" and {*present} & {*absent}:
            both = min({*present} & {*absent})
            raise UserError(f"{where}: '{both}' is both present and absent")
        entries[image] = where, present, absent
    return entries


def folder(root, split):
    """Images of your own, described by a line each.

        train.jsonl  test.jsonl    {"image": "photos/1.jpg", "present": ["dog"], "absent": ["cat"]}
        labels.txt                 optional: all labels, a line each
        unseen.txt                 optional: those of them that training must not see
    Paths are relative to the folder. Labels in neither list are unknown; "absent": "rest" means
    all others. Without labels.txt the labels are all that occur in the two files, sorted. In the
    training split the entries of unseen labels are unknown (0).
    """
    entries = {split: _folder_entries(_find(root, f"{split}.jsonl"))}
    other = os.path.join(root, "train.jsonl" if split == "test" else "test.jsonl")
    if os.path.exists(other):
        entries["other"] = _folder_entries(other)
    label_file = os.path.join(root, "labels.txt")
    if os.path.exists(label_file):
        labels = list(_entries(label_file))
    else:
        labels = sorted({label for part in entries.values() for _, present, absent in part.values()
                         for label in present + (absent if absent != "rest" else [])})
    column_of = {label: column for column, label in enumerate(labels)}
    targets = np.zeros((len(entries[split]), len(labels)), np.int8)
    for row, (where, present, absent) in enumerate(entries[split].values()):
        try:
            if absent == "rest":
                targets[row] = -1
            else:
                targets[row, [column_of[name] for name in absent]] = -1
            targets[row, [column_of[name] for name in present]] = 1
        except KeyError as error:
            raise UserError(f"{where}: {error} is not in {label_file}") from None
    unseen_file = os.path.join(root, "unseen.txt")
    unseen = list(_entries(unseen_file)) if os.path.exists(unseen_file) else []
    if not {*unseen} < {*labels}:
        raise UserError(f"{unseen_file}: must be some, and not all, of the {len(labels)} labels")
    unseen = [column_of[label] for label in unseen]
    if split == "train":
        targets[:, unseen] = 0
    return {"labels": labels, "targets": targets, "images": list(entries[split]), "unseen": unseen}


def toy(root, split, *, zero_shot=True, first=None):
    """10,000 training and 2,000 test scenes of the toy world, each a function of its index.

    zero_shot: a quarter of the labels is unseen; the training scenes show none of these things,
    and their entries are unknown (0). Otherwise all labels are seen. first: only so many scenes.
    """
    count, seed = (10_000, 1) if split == "train" else (2_000, 2)
    count = min(count, first or count)
    things = tuple(world.SEEN) if zero_shot and split == "train" else None
    targets = np.full((count, len(world.LABELS)), -1, np.int8)
    for i in range(count):
        for thing, *_ in world.scene_objects("benchmark", seed, i, things):
            targets[i, thing] = 1
    if things:
        targets[:, world.UNSEEN] = 0
    return {"labels": world.LABELS, "targets": targets,
            "images": world.Scenes(count, seed, things),
            "unseen": world.UNSEEN if zero_shot else []}


DATASETS = {function.__name__: function for function in (
    toy, nuswide, nuswide81, coco, voc2007, vg200, cub, openimages, folder)}
# images of the training and the test split, as published; other releases differ
PUBLISHED = {"nuswide": (161_789, 107_859), "nuswide81": (161_789, 107_859),
             "coco": (82_783, 40_504), "voc2007": (5_011, 4_952), "vg200": (82_904, 10_000),
             "cub": (5_994, 5_794)}


def load_dataset(name, root=None, split="train", transform=None, *, limit=None,
                 allow_missing=False, **options):
    """The "train" or "test" split of a dataset as a MultiLabelDataset.

    name: a key of DATASETS. root: its directory, not needed by "toy". limit: only so many images.
    options: the keyword-only arguments of the dataset's function; None counts as not given.
    Training replaces images that cannot be decoded, test stops at them.
    """
    if name not in DATASETS:
        raise UserError(f"unknown dataset '{name}', known are: {', '.join(DATASETS)}")
    if split not in ("train", "test"):
        raise UserError(f"unknown split '{split}', known are: train, test")
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: at least 1")
    root = os.path.expanduser(root or "")
    if name != "toy" and not os.path.isdir(root):
        raise UserError(f"{name} needs the directory it is in, --root DIR; '{root}' is none")
    options = {option: value for option, value in options.items() if value is not None}
    for option in options:
        having = [other for other, function in DATASETS.items()
                  if option in inspect.signature(function).parameters]
        if name not in having:
            raise UserError(f"--{option.replace('_', '-')} is not for {name}, but for: "
                            f"{', '.join(having) or 'no dataset'}")
    if name == "toy":
        options["first"] = limit  # what nobody looks at need not be drawn
    try:
        parts = DATASETS[name](root, split, **options)
    except OSError as error:
        layout = inspect.getdoc(DATASETS[name.removesuffix("81")])  # of nuswide for both
        raise UserError(f"{error}\n\n{layout}") from None
    if name in PUBLISHED:
        count = len(parts["images"])
        published = PUBLISHED[name][split == "test"]
        warning = "" if count == published else "; WARNING: another release"
        _note(f"{name} {split}: {count:,} images listed, {published:,} published{warning}")
    dataset = MultiLabelDataset(**parts, transform=transform, name=name,
                                on_error="replace" if split == "train" else "raise",
                                allow_missing=allow_missing)
    if name in ("nuswide", "nuswide81"):
        _note_placeholders(dataset)
    if limit:
        dataset = dataset.subset(range(min(limit, len(dataset))))
    return dataset


def describe(training, test):
    """Print what the data holds: images, labels, known entries, and what follows from gaps.
    training may be None."""
    for split, dataset in (("training", training), ("test", test)):
        if dataset is None:
            continue
        present, absent = dataset.counts()
        columns = dataset.seen if split == "training" else slice(None)
        present, absent = present[columns], absent[columns]
        print(f"{split}: {len(dataset):,} images, {len(present):,} labels; known entries: "
              f"{present.sum():,} present ({present.min():,} to {present.max():,} a label, median "
              f"{present.median():,}), {absent.sum():,} absent ({absent.min():,} to "
              f"{absent.max():,}, median {absent.median():,})", flush=True)


# ---- options of the command line

def add_options(parser):
    """Add --data, --root and all that load_dataset takes beside them, as a group of their own."""
    add = parser.add_argument_group("data").add_argument
    add("--data", default="toy", choices=list(DATASETS), help="folder: images of your own")
    add("--root", metavar="DIR", help="its folder, laid out as DATASETS.md shows (data/NAME)")
    add("--limit", type=int, help="only so many images of each split: a quick look")
    flag = {"action": argparse.BooleanOptionalAction}  # None where it was not given
    add("--allow-missing", **flag, help="go on if over 5%% of the images are missing")
    add("--annotated-only", **flag, help="coco, nuswide81: drop images without a label")
    add("--drop-crowd", **flag, help="coco: boxes of crowds do not count")
    add("--zero-shot", **flag, help="coco: 48 seen and 17 unseen labels")
    add("--difficult", choices=["absent", "unknown", "present"], help="of voc (absent)")
    add("--not-visible", choices=["absent", "unknown"], help="cub: parts out of sight (absent)")


def dataset_options(args):
    """What load_dataset takes of parsed arguments, beside args.data and args.root."""
    names = ("limit", "allow_missing", "annotated_only", "drop_crowd", "zero_shot", "difficult",
             "not_visible")
    return {name: getattr(args, name) for name in names}


def typed(parser, argv):
    """The names of the arguments that a command line gives itself, as a set of str."""
    missing = object()  # argparse sets a default only where there is no value yet
    names = vars(parser.parse_args(argv))
    found = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, missing)))
    return {name for name, value in vars(found).items() if value is not missing}


def read_labels(text):
    """The labels that --labels names: the lines of a file, or else separated by commas."""
    text = text.strip()
    if os.path.isfile(text):
        where, labels = text, [line for line in read_text(text).split("\n") if line.strip()]
    else:
        where, labels = "--labels", text.split(",")
        if text.endswith(".txt") and len(labels) == 1:
            raise UserError(f"--labels: there is no file {text}")
    labels = [label.strip() for label in labels]
    if not all(labels) or not labels:
        raise UserError(f"{where}: an empty name")
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice:
        raise UserError(f"{where}: labels given more than once: {', '.join(twice)}")
    return labels


def add_run_options(parser, output):
    """Add the options of every run as a group; output: what --output is by default."""
    add = parser.add_argument_group("run").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=at_least(0), default=min(8, os.cpu_count() or 1),
        help="processes that load images (as many as cores, at most 8)")
    add("--precision", default="fp32", choices=["fp32", "bf16"])
    add("--seed", type=at_least(0), default=0)
    add("--output", metavar="PATH", help=f"the run's folder ({output}); of --predict a file")
    add("--quiet", action="store_true", help="no progress bars")


def at_least(minimum, kind=int):
    """A type for argparse: a number that is not below the minimum."""
    def number(text):
        value = kind(text)
        if not value >= minimum:  # NaN too
            raise argparse.ArgumentTypeError(f"{text} is below {minimum}")
        return value

    number.__name__ = kind.__name__  # argparse: invalid int value
    return number


def parse(parser, argv, method, toy):
    """A script's command line -> (args, the state of the checkpoint to start from or None).

    What is typed wins over the checkpoint's own options, or over `toy`, those of the toy world.
    An option without effect is refused, by the titles of the parser's groups: with --predict all
    but "a trained model" and "model", with --eval what is of training, in training what is of a
    trained model."""
    args, names = parser.parse_args(argv), typed(parser, argv)
    group = {group.title: {action.dest for action in group._group_actions}
             for group in parser._action_groups}
    trained = group["a trained model"]
    used = group["model"] | {"device", "precision", "quiet", "output"}
    mode, unused = "in training", names & (trained - {"predict", "eval"})
    if args.predict:
        mode, unused = "with --predict", names - used - (trained - {"eval"})
    elif args.eval:
        used |= group["data"] | {"eval", "workers", "batch_size", "compile"}
        mode, unused = "with --eval", names - used
    for name in sorted(unused):
        parser.error(f"--{name.replace('_', '-')} has no effect {mode}")

    output = args.output or f"runs/{method}-{args.data}"  # of a training run
    start, saved = args.checkpoint or args.eval, None
    if getattr(args, "resume", False):  # of a sweep the newest, which has the last arguments
        checkpoints = Path(output).rglob("last.pt")
        start = max(checkpoints, key=os.path.getmtime, default=f"{output}/last.pt")
    if start:
        saved = read_checkpoint(start, method)
        here = ("output", "device", "resume", "predict", "eval", "checkpoint", "workers", "quiet")
        saved["args"] |= {name: getattr(args, name, None) for name in here}
        args = parser.parse_args(argv, argparse.Namespace(**saved["args"]))
    elif args.data == "toy" and not (args.predict or getattr(args, "labels", None)):
        args = parser.parse_args(argv, parser.parse_args(toy.split()))
    if not (args.predict or args.eval):
        args.output = output
    if args.threshold == "best":
        path = Path(args.checkpoint or "no checkpoint").with_name("results.json")
        args.threshold = _parse_json(read_text(path), path).get("threshold")
        if args.threshold is None:
            raise UserError(f"{path} has no threshold: --threshold takes a number too")
    return args, saved


def refuse_used(args):
    """UserError where a run or an evaluation would overwrite another one's results."""
    if args.output and not getattr(args, "resume", False):
        found = [*Path(args.output).rglob("last.pt"), *Path(args.output).glob("results.json")]
        if found:
            raise UserError(f"{found[0]} is another run's: --resume it or name another --output")


def check_belongs(saved, fingerprint, labels, args):
    """UserError where a checkpoint is of another CLIP than --clip, or for other labels. Labels of
    None, in the checkpoint or here, are any."""
    if saved["clip_fingerprint"] != fingerprint:
        raise UserError(f"the checkpoint belongs to another CLIP than --clip {args.clip}")
    if labels is None or saved["labels"] in (None, labels):
        return
    came, went = ([name for name in some if name not in others] for some, others in
                  ((labels, saved["labels"]), (saved["labels"], labels)))
    changes = [f"{change}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
               for change, names in (("new", came), ("gone", went)) if names]
    raise UserError(f"the checkpoint was trained for other labels than {args.data} has: "
                    f"{'; '.join(changes) or 'another order'}; labels.txt pins them")


@contextlib.contextmanager
def way_back(folder):
    """Around a training: what an interrupted user can do next."""
    try:
        yield
    except KeyboardInterrupt:
        is_saved = os.path.exists(f"{folder}/last.pt")
        advice = "--resume goes on" if is_saved else "no epoch was finished, start again"
        raise KeyboardInterrupt(f"; {advice}") from None


def run(main, *errors):
    """main() of a script; what is the user's to mend is one line on stderr and exit code 2."""
    try:
        main()
    except (UserError, *errors) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        sys.exit(f"\ninterrupted{interrupt}")
    except BrokenPipeError:  # | head: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
