"""Images a second and core, from a JPEG file to a batch: training and test pipelines.

    python bench/images.py            # under a minute
    python bench/images.py --quick

data.MultiLabelDataset over photos of 640 x 480 that the script draws, in a DataLoader without
workers and with one thread, beside torchvision's transforms on Image.open(...).convert("RGB") and
open_clip's image_transform, equal batches asserted (of training: from the same seed). Then what
each step takes: the decoder and the resizing are Pillow's, and what is left is small.
"""
import statistics
import tempfile
import time

import numpy as np
import side_by_side
import torch
from PIL import Image
from side_by_side import duration, row
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms

import clip_model
import data

BATCH = 16


def write_photos(folder, count):
    """Smooth colours under a camera's noise: about as many bytes as a photo of this size."""
    generator = np.random.default_rng(0)
    paths = [f"{folder}/{i}.jpg" for i in range(count)]
    for path in paths:
        colors = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(colors.resize((640, 480), Image.Resampling.BICUBIC), dtype=np.float32)
        pixels = pixels + generator.normal(0, 5, pixels.shape)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=85)
    return paths


class Plain(Dataset):
    """What one writes without data.py."""

    def __init__(self, paths, targets, transform):
        self.paths, self.targets, self.transform = paths, targets, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return self.transform(Image.open(self.paths[i]).convert("RGB")), self.targets[i]


def plain_transforms():
    """-> {training, test}: torchvision's, as everybody writes them."""
    bicubic = transforms.InterpolationMode.BICUBIC
    end = [transforms.ToTensor(), transforms.Normalize(data.CLIP_MEAN, data.CLIP_STD)]
    return {
        "training": transforms.Compose([
            transforms.RandomResizedCrop(224, interpolation=bicubic),
            transforms.RandomHorizontalFlip(), transforms.RandAugment(2, 9), *end]),
        "test": transforms.Compose([
            transforms.Resize(224, bicubic), transforms.CenterCrop(224), *end])}


def pipelines(paths, targets, labels):
    """{"training", "test": {name: Dataset}}, ours first."""
    ours = {"training": data.train_transform(224), "test": clip_model.preprocess_transform(224)}
    found = {kind: {"ours": data.MultiLabelDataset(labels, targets, paths, transform=transform),
                    "torchvision": Plain(paths, targets, plain_transforms()[kind])}
             for kind, transform in ours.items()}
    try:
        from open_clip import image_transform
        found["test"]["open_clip"] = Plain(paths, targets, image_transform(224, is_train=False))
    except ImportError:
        print("open_clip is not installed: left out")
    return found


def bench_pipelines(found, repeats):
    for kind, datasets in found.items():
        seconds, expected = {name: [] for name in datasets}, None
        for _ in range(repeats):
            for name, dataset in datasets.items():
                torch.manual_seed(0)
                begin = time.perf_counter()
                batches = list(DataLoader(dataset, BATCH))
                seconds[name].append(time.perf_counter() - begin)
                images = torch.cat([batch for batch, _ in batches])
                expected = images if name == "ours" else expected
                assert torch.equal(images, expected), f"{kind}: {name} differs"
        rates = {name: len(expected) / statistics.median(each) for name, each in seconds.items()}
        for name, rate in list(rates.items())[1:]:
            row(f"{kind} images, 640 x 480 JPEG to 224 x 224", name, f"{rate:.0f} a second",
                f"{rates['ours']:.0f} a second", rates["ours"] / rate)


def bench_steps(path, repeats):
    """Time of every step on one image, in its pipeline's order."""
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [
        ("decode", lambda _: data.open_image(path)),
        ("test: resize, center crop", transforms.Compose([
            transforms.Resize(224, bicubic), transforms.CenterCrop(224)])),
        ("training: random resized crop", transforms.RandomResizedCrop(
            224, interpolation=bicubic)),
        ("training: flip", transforms.RandomHorizontalFlip()),
        ("training: RandAugment", transforms.RandAugment(2, 9)),
        ("to tensor", transforms.ToTensor()),
        ("normalise", transforms.Normalize(data.CLIP_MEAN, data.CLIP_STD))]
    photo = image = data.open_image(path)
    for name, step in steps:
        x = photo if "crop" in name else image
        seconds = side_by_side.alternate({name: lambda: step(x)}, repeats)[name]
        image = step(x)
        row(f"one image, {name}", "", "", duration(seconds))
    batch = [(image, torch.zeros(80, dtype=torch.int8))] * BATCH
    seconds = side_by_side.alternate({"collate": lambda: default_collate(batch)}, repeats)
    row("one image, collate", "", "", duration(seconds["collate"] / BATCH))


def main():
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.quick:
        args.images, args.repeats = 8, 1
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photos(folder, args.images)
        targets = torch.full((len(paths), 80), -1, dtype=torch.int8)
        found = pipelines(paths, targets, data.COCO_LABELS)
        side_by_side.start()
        bench_pipelines(found, args.repeats)
        bench_steps(paths[0], 20 * args.repeats)


if __name__ == "__main__":
    main()
