"""How CLIP-like the toy world is: every figure of toy/README.md, from zero-shot scores and probes.

    python toy/calibrate.py            # both CLIPs, a few minutes on two cores
    python toy/calibrate.py --sheet toy/scenes.png    # a contact sheet of both domains

No method of this repository is run here: the world was fixed by these figures alone.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clip_model  # noqa: E402
import data  # noqa: E402
import metrics  # noqa: E402
from pretrain import caption  # noqa: E402

LABELS = world.LABELS


def targets_of(objects):
    targets = torch.full((len(objects), len(LABELS)), -1, dtype=torch.int8)
    for row, things in zip(targets, objects):
        row[[thing[0] for thing in things]] = 1
    return targets


@torch.no_grad()
def image_features(clip, preprocess, domain, seed, count, value_path=False):
    """-> (global [N, D], local [N, L, D], targets [N, C])."""
    objects = [world.scene_objects(domain, seed, i) for i in range(count)]
    parts = []
    for start in tqdm(range(0, count, 100), desc=f"{domain} scenes", leave=False, disable=None):
        images = torch.stack([preprocess(world.scene(domain, seed, i))
                              for i in range(start, min(start + 100, count))])
        options = {"value_path": True} if value_path else {}
        parts.append(clip.encode_image_dense(images, **options))
    global_, local = (torch.cat(x) for x in zip(*parts))
    return global_, local, targets_of(objects)


@torch.no_grad()
def label_embeddings(clip):
    tokens = clip.tokenize([f"a photo of a {label}." for label in LABELS])
    return F.normalize(clip.encode_text(tokens), dim=-1)


def zero_shot(global_, local, texts):
    """-> cosine scores: of the global embedding, of the best location, of both."""
    global_scores = F.normalize(global_, dim=-1) @ texts.T
    local_scores = torch.cat([(F.normalize(part, dim=-1) @ texts.T).amax(dim=1)
                              for part in local.split(500)])
    return {"global": global_scores, "local": local_scores,
            "both": (global_scores + local_scores) / 2}


def train_probe(forward, parameters, inputs, targets, epochs, lr=3e-3):
    """Binary cross-entropy over random batches of 128; forward(*rows of inputs) -> logits."""
    optimizer = torch.optim.Adam(parameters, lr=lr)
    steps = epochs * len(targets) // 128
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(targets), (128,), generator=generator)
        loss = F.binary_cross_entropy_with_logits(forward(*(x[rows] for x in inputs)),
                                                  (targets[rows] == 1).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def supervised_head(train, test, epochs=20):
    """mAP of a linear classifier of the global embedding plus the log-sum-exp over the locations
    of an MLP's scores: what the frozen features hold."""
    torch.manual_seed(0)
    (global_, local, targets), (test_global, test_local, test_targets) = train, test
    mean, std = local.mean((0, 1)), local.std((0, 1))
    width = global_.shape[1]
    whole = torch.nn.Linear(width, len(LABELS))
    part = torch.nn.Sequential(torch.nn.Linear(width, 256), torch.nn.ReLU(),
                               torch.nn.Linear(256, len(LABELS)))

    def forward(global_, local):
        return whole((global_ - mean) / std) + part((local - mean) / std).logsumexp(dim=1)

    parameters = [*whole.parameters(), *part.parameters()]
    train_probe(forward, parameters, (global_, local), targets, epochs)
    with torch.no_grad():
        parts = zip(test_global.split(500), test_local.split(500))
        scores = torch.cat([forward(*part) for part in parts])
    return metrics.mean_average_precision(scores, test_targets)


def text_probe(clip, count=24_000):
    """mAP of a linear classifier of sentence embeddings that name 1-5 things."""
    random = np.random.default_rng(7)
    embeddings, objects = [], []
    for _ in range(count):
        things = random.choice(len(LABELS), random.integers(1, 6), replace=False)
        objects.append([(int(thing), int(random.integers(8)), *random.random(2), 0.2, 0)
                        for thing in things])
    texts = [caption(things, random, name_all=True) for things in objects]
    with torch.no_grad():
        for start in range(0, count, 500):
            embeddings.append(clip.encode_text(clip.tokenize(texts[start:start + 500])))
    embeddings = F.normalize(torch.cat(embeddings), dim=-1) * 20
    torch.manual_seed(0)
    linear, split = torch.nn.Linear(embeddings.shape[1], len(LABELS)), count * 3 // 4
    targets = targets_of(objects)
    train_probe(linear, linear.parameters(), (embeddings[:split],), targets[:split], 60, lr=1e-2)
    with torch.no_grad():
        return metrics.mean_average_precision(linear(embeddings[split:]), targets[split:])


def contact_sheet(path, columns=8, rows=2):
    size = world.SCENE_SIZE + 2
    sheet = Image.new("RGB", (columns * size, (2 * rows) * size + 8), "white")
    for half, domain in enumerate(("web", "benchmark")):
        for i in range(columns * rows):
            place = (i % columns * size, (half * rows + i // columns) * size + 8 * half)
            sheet.paste(world.scene(domain, 9, i), place)
    # few colours, because noise packs badly
    sheet = sheet.quantize(200, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    sheet.save(path, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["toy-ViT", "toy-RN"])
    parser.add_argument("--train", type=int, default=10_000, help="scenes for the supervised head")
    parser.add_argument("--test", type=int, default=2_000, help="scenes that are scored")
    parser.add_argument("--sheet", help="write a contact sheet of both domains here and stop")
    args = parser.parse_args()
    if args.sheet:
        return contact_sheet(args.sheet)
    for name in args.models:
        clip, preprocess = clip_model.load(name)
        texts = label_embeddings(clip)
        print(f"{name}: {sum(p.numel() for p in clip.parameters()):,} parameters")
        web = image_features(clip, preprocess, "web", 3, args.test)
        for mode, scores in zero_shot(*web[:2], texts).items():
            print(f"  web, zero-shot mAP, {mode}: "
                  f"{100 * metrics.mean_average_precision(scores, web[2]):.1f}")
        paths = (False, True) if "ViT" in name else (False,)
        for value_path in paths:
            test = image_features(clip, preprocess, "benchmark", 2, args.test, value_path)
            for mode, scores in zero_shot(*test[:2], texts).items():
                if mode == "global" and value_path:
                    continue
                note = " (value path)" * value_path
                print(f"  benchmark, zero-shot mAP, {mode}{note}: "
                      f"{100 * metrics.mean_average_precision(scores, test[2]):.1f}", flush=True)
        scores, counts = zero_shot(*test[:2], texts)["global"], (test[2] == 1).sum(1)
        for number in range(1, 7):
            rows = counts == number
            if rows.sum() > 20:
                recall = metrics.precision_recall_f1_at_k(scores[rows], test[2][rows], number)[1]
                print(f"  benchmark, {number} labels: recall@{number} {100 * recall:.1f}")
        random = np.random.default_rng(0)
        objects = [world.scene_objects("web", 3, i) for i in range(args.test)]
        with torch.no_grad():
            tokens = clip.tokenize([caption(things, random) for things in objects])
            captions = F.normalize(clip.encode_text(tokens), dim=-1)
        images = F.normalize(web[0], dim=-1)
        pairs = (images * captions).sum(1).mean()
        gap = (images.mean(0) - captions.mean(0)).norm()
        print(f"  web: modality gap (distance of the centroids) {gap:.2f}; cosine of matching pairs "
              f"{pairs:.2f}, of two images {(images @ images.T).mean():.2f}, of two captions "
              f"{(captions @ captions.T).mean():.2f}")
        print(f"  sentences of 1-5 labels, linear probe mAP: {100 * text_probe(clip):.1f}",
              flush=True)
        for value_path in paths if args.train else ():
            train = image_features(clip, preprocess, "benchmark", 1, args.train, value_path)
            if value_path != paths[-1]:
                test_here = image_features(clip, preprocess, "benchmark", 2, args.test, value_path)
            else:
                test_here = test
            print(f"  benchmark, supervised head mAP{' (value path)' * value_path}: "
                  f"{100 * supervised_head(train, test_here):.1f}", flush=True)


if __name__ == "__main__":
    main()
