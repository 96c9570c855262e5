"""How CLIP-like the toy world is: every figure of toy/README.md, from zero-shot scores and probes.

    python toy/calibrate.py                           # both CLIPs, some minutes on two cores
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
import metrics  # noqa: E402
from toy import world  # noqa: E402
from toy.pretrain import caption  # noqa: E402

LABELS = world.LABELS


def targets_of(objects):
    targets = torch.full((len(objects), len(LABELS)), -1, dtype=torch.int8)
    for row, things in zip(targets, objects):
        row[[thing[0] for thing in things]] = 1
    return targets


@torch.no_grad()
def image_features(clip, preprocess, domain, seed, count):
    """-> (global [N, D], local [N, L, D], targets [N, C])."""
    objects = [world.scene_objects(domain, seed, i) for i in range(count)]
    parts = []
    for start in tqdm(range(0, count, 100), desc=f"{domain} scenes", leave=False, disable=None):
        images = torch.stack([preprocess(world.scene(domain, seed, i))
                              for i in range(start, min(start + 100, count))])
        parts.append(clip.encode_image_dense(images))
    global_, local = (torch.cat(x) for x in zip(*parts))
    return global_, local, targets_of(objects)


def zero_shot(global_, local, texts, scale):
    """-> {name: scores [N, C]}: cosines of the global embedding, of the best location, of both; and
    as probabilities, as metrics.zero_shot_scores has them."""
    global_scores = F.normalize(global_, dim=-1) @ texts.T
    local_scores = torch.cat([(F.normalize(part, dim=-1) @ texts.T).amax(dim=1)
                              for part in local.split(500)])
    scores = {"global": global_scores, "local": local_scores,
              "both": (global_scores + local_scores) / 2}
    for name in list(scores):
        scores[f"{name}, normalised"] = metrics.normalize_scores(scores[name])
    scores["both, normalised before they are merged"] = (
        scores["global, normalised"] + scores["local, normalised"])
    x = torch.cat([global_[:, None], local], dim=1)
    parts = [metrics.zero_shot_scores(F.normalize(part, dim=-1), texts, scale, {"": slice(None)})
             for part in x.split(500)]
    name = "zero-shot, as probabilities", ""
    scores["as probabilities"] = torch.cat([part[name] for part in parts])
    return scores


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


@torch.no_grad()
def modality_gap(clip, web_global):
    """-> {name: figure} of the first web scenes of seed 3 and a caption of each."""
    random = np.random.default_rng(0)
    objects = [world.scene_objects("web", 3, i) for i in range(len(web_global))]
    tokens = clip.tokenize([caption(things, random) for things in objects])
    captions = F.normalize(clip.encode_text(tokens), dim=-1)
    images = F.normalize(web_global, dim=-1)
    return {"web, modality gap (distance of the centroids)":
            (images.mean(0) - captions.mean(0)).norm().item(),
            "web, cosine of an image and its caption": (images * captions).sum(1).mean().item(),
            "web, cosine of two images": (images @ images.T).mean().item(),
            "web, cosine of two captions": (captions @ captions.T).mean().item()}


def figures(name, train_count, test_count):
    """-> {name: figure}; every figure is in percent but for cosines and distances."""
    clip, preprocess = clip_model.load(name)
    texts, scale = clip_model.zero_shot_embeddings(clip, LABELS), clip.logit_scale.exp()
    result = {}
    web = image_features(clip, preprocess, "web", 3, test_count)
    test = image_features(clip, preprocess, "benchmark", 2, test_count)
    for domain, (global_, local, targets) in (("web", web), ("benchmark", test)):
        for kind, scores in zero_shot(global_, local, texts, scale).items():
            mAP = 100 * metrics.mean_average_precision(scores, targets)
            result[f"{domain}, zero-shot mAP, {kind}"] = mAP
    train = image_features(clip, preprocess, "benchmark", 1, train_count)
    result["benchmark, supervised head mAP"] = 100 * supervised_head(train, test)
    global_, local, targets = test
    scores = zero_shot(global_, local, texts, scale)["global"]
    counts = (targets == 1).sum(dim=1)
    for number in range(1, 5):
        rows = counts == number
        recall = metrics.precision_recall_f1_at_k(scores[rows], targets[rows], number)[1]
        result[f"benchmark, {number} labels: global recall@{number}"] = 100 * recall
    result.update(modality_gap(clip, web[0]))
    result["sentences of 1-5 labels, linear probe mAP"] = 100 * text_probe(clip)
    return result


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
    parser.add_argument("--models", nargs="+", default=["toy-RN", "toy-ViT"])
    parser.add_argument("--train", type=int, default=10_000, help="scenes for the supervised head")
    parser.add_argument("--test", type=int, default=2_000, help="scenes that are scored")
    parser.add_argument("--sheet", help="write a contact sheet of both domains here and stop")
    args = parser.parse_args()
    if args.sheet:
        return contact_sheet(args.sheet)
    columns = {}
    for name in args.models:
        columns[name] = figures(name, args.train, args.test)
    print(" " * 62, *(f"{name[-12:]:>12}" for name in columns))
    for row in columns[args.models[0]]:
        cells = []
        for column in columns.values():
            if row not in column:
                cell = ""
            elif "cosine" in row or "gap" in row:
                cell = f"{column[row]:.2f}"
            else:
                cell = f"{column[row]:.1f}"
            cells.append(f"{cell:>12}")
        print(f"{row:62}", *cells)


if __name__ == "__main__":
    main()
