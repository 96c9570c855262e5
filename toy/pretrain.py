"""Pre-train the two tiny CLIPs of this folder, from nothing, on captioned scenes. In this order:

    python toy/pretrain.py RN               # both towers, CLIP's loss
    python toy/pretrain.py ViT              # the same
    python toy/pretrain.py ViT-distilled    # its image tower goes on with RN's text tower
    python toy/pretrain.py ViT-whole        # the same on whole images in altered light

CLIP's loss (Radford et al., 2021) is the symmetric cross-entropy over the cosine similarities of a
batch of images and captions, with a learned temperature. What makes it work in an hour on two cores
is a curriculum: scenes of a single thing until the loss falls, then of up to two, then all.
ViT-distilled locks the text tower (LiT, CVPR 2022), drops half of the patches (FLIP, CVPR 2023) and
adds the imitation of RN's image embeddings (CLIP-KD, CVPR 2024). ViT-whole drops none.
Interrupted runs continue where they stopped.
"""
import argparse
import collections
import gzip
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from clip_model import CLIP, MEAN, STD, Tokenizer, build_model, byte_symbols  # noqa: E402
from toy.world import COLOURS, LABELS, SCENE_SIZE, scene, scene_objects  # noqa: E402

STAGES = {  # steps, batch size, learning rate at its peak, warm-up steps
    "RN": (2600, 128, 2e-3, 200),
    "ViT": (4500, 128, 2e-3, 200),
    "ViT-distilled": (1800, 64, 1.2e-3, 100),
    "ViT-whole": (450, 64, 6e-4, 20),
}
FILES = {"RN": "toy-RN.pt", "ViT": "cache/ViT.pt", "ViT-distilled": "cache/ViT-distilled.pt",
         "ViT-whole": "toy-ViT.pt"}
MERGES = 640  # enough for every word of the captions to be one token
PLURALS = {"butterfly": "butterflies", "cactus": "cacti", "fish": "fish", "leaf": "leaves",
           "snowman": "snowmen", "glasses": "glasses", "scissors": "scissors"}
NUMBERS = ("no", "one", "two", "three", "four", "five")
# the web's captions say much that no picture shows; a text tower must have met such words
ADJECTIVES = ("old", "new", "nice", "lovely", "simple", "beautiful", "plain", "funny", "wooden")
VERBS = ("standing", "lying", "placed", "shown", "resting", "hanging", "sitting", "waiting")
SETTINGS = ("on the street", "in a park", "in the garden", "on a table top", "at home",
            "on the wall", "in a room", "by the sea", "on the floor", "on a sunny day",
            "in the city", "in a field", "on a plain background", "in the background",
            "on a shelf", "in the kitchen", "outside", "in the rain", "on the grass",
            "near the window", "for sale", "on the beach")


# ---- captions

def phrase(things, random):
    """Objects of one kind -> "a small red star", "two stars", "a pair of glasses"."""
    name = LABELS[things[0][0]]
    colours = {thing[1] for thing in things}
    words = [list(COLOURS)[colours.pop()]] if len(colours) == 1 and random.random() < 0.55 else []
    if random.random() < 0.08:
        words.insert(0, random.choice(ADJECTIVES))
    if random.random() < 0.15:
        size = np.mean([thing[4] for thing in things])
        big, small = ("big", "large"), ("small", "little")
        words.insert(0, random.choice(big if size > 0.22 else small))
    if len(things) > 1:
        number = NUMBERS[len(things)] if random.random() < 0.8 else "some"
        return " ".join([number, *words, PLURALS.get(name, name + "s")])
    if name in ("glasses", "scissors"):
        return " ".join([random.choice(["a pair of", "some"]), *words, name])
    article = random.choice(["the", "one"]) if random.random() < 0.15 else None
    words.append(name)
    return " ".join([article or ("an" if words[0][0] in "aeiou" else "a"), *words])


def place(thing):
    x, y = thing[2], thing[3]
    sides = [(x, "on the left"), (1 - x, "on the right"), (y, "at the top"),
             (1 - y, "at the bottom")]
    distance, words = min(sides)
    return words if distance < 0.38 else "in the middle"


def relation(first, second, random):
    dx, dy = second[2] - first[2], second[3] - first[3]
    if random.random() < 0.4:
        return random.choice(["next to", "near", "with", "beside"])
    if abs(dx) > abs(dy):
        return "to the left of" if dx > 0 else "to the right of"
    return "above" if dy > 0 else "below"


def caption(objects, random, name_all=False):
    """Objects of a scene, the largest first -> a sentence that names some of them, or all."""
    kinds = collections.defaultdict(list)
    for thing in objects:
        kinds[thing[0]].append(thing)
    groups = [group for i, group in enumerate(kinds.values())
              if i == 0 or name_all or random.random() < 0.85]
    phrases = [phrase(group, random) for group in groups]
    if len(phrases) == 1:
        text = phrases[0]
        if len(groups[0]) == 1 and random.random() < 0.2:
            text += " " + place(groups[0][0])
    elif len(phrases) == 2 and random.random() < 0.5:
        text = f"{phrases[0]} {relation(groups[0][0], groups[1][0], random)} {phrases[1]}"
    else:
        text = ", ".join(phrases[:-1]) + " and " + phrases[-1]
    if random.random() < 0.08:
        text += " " + random.choice(VERBS)
    if random.random() < 0.25:
        text += " " + random.choice(SETTINGS)
    verb = "is" if len(groups) == len(groups[0]) == 1 else "are"
    return random.choice([
        "{}", "{}", "{}.", "a photo of {}", "a photo of {}.", "a picture of {}", "an image of {}",
        "a drawing of {}", "a scene with {}", "there {verb} {} in the scene",
        "there {verb} {} in the picture", "there {verb} {}", "here {verb} {}", "we can see {}",
        "this image shows {}", "a cropped photo of {}", "a good photo of {}",
        "a close-up of {}", "a photo of the scene: {}", "look at {}",
    ]).format(text, verb=verb)


def learn_merges(texts, count):
    """Byte-pair encoding (Sennrich et al., 2016): merge the most frequent pair, count times."""
    words = collections.Counter(word for text in texts for word in
                                Tokenizer.pattern.findall(text.lower()))
    symbols = byte_symbols()
    parts = {word: [*(symbols[b] for b in word.encode()[:-1]), symbols[word.encode()[-1]] + "</w>"]
             for word in words}
    merges = []
    while len(merges) < count:
        pairs = collections.Counter()
        for word, times in words.items():
            for pair in zip(parts[word], parts[word][1:]):
                pairs[pair] += times
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word, symbols_of_word in parts.items():
            merged = []
            for symbol in symbols_of_word:
                if merged and (merged[-1], symbol) == best:
                    merged[-1] = "".join(best)
                else:
                    merged.append(symbol)
            parts[word] = merged
    return merges


def write_merges(path):
    random = np.random.default_rng(0)
    texts = [caption(scene_objects("web", 0, i), random) for i in range(20_000)]
    texts += [f"a photo of {name} {PLURALS.get(name, name + 's')}" for name in LABELS] * 50
    merges = learn_merges(texts, MERGES)
    with gzip.GzipFile(path, "wb", mtime=0) as file:  # no time stamp: the same bytes every time
        lines = ["#version: learned from the captions of toy/pretrain.py"]
        lines += [" ".join(merge) for merge in merges]
        file.write(("\n".join(lines) + "\n").encode())


# ---- scenes

def scene_pool(path, count):
    """Draw the scenes once: uint8 [count, size, size, 3], memory-mapped, shared by both CLIPs."""
    if not path.exists():
        temporary = path.with_name(f"{path.stem}-{os.getpid()}.npy")
        shape = (count, SCENE_SIZE, SCENE_SIZE, 3)
        pool = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
        for i in tqdm(range(count), desc="scenes", disable=None):
            pool[i] = np.asarray(scene("web", 0, i))
        pool.flush()
        temporary.rename(path)
    return np.load(path, mmap_mode="r")


# ---- training

def first_model(stage, output, tokenizer):
    """-> (CLIP to train, CLIP to imitate or None); what stays as it is has requires_grad False."""
    if stage in ("RN", "ViT"):
        towers = {"vision_layers": 5, "vision_width": 128, "vision_patch_size": 16,
                  "transformer_layers": 3}
        if stage == "RN":
            towers = {"vision_layers": (1, 1, 1, 1), "vision_width": 16,
                      "vision_patch_size": None, "transformer_layers": 2}
        model = CLIP(embed_dim=128, image_resolution=SCENE_SIZE, context_length=77,
                     vocab_size=len(tokenizer), transformer_width=128, transformer_heads=2,
                     **towers)
        return model.train(), None
    weights = torch.load(output / FILES["RN"], weights_only=True)
    teacher = build_model(dict(weights)).requires_grad_(False)
    first = "ViT" if stage == "ViT-distilled" else "ViT-distilled"
    images = torch.load(output / FILES[first], weights_only=True)
    weights = {key: value for key, value in weights.items() if not key.startswith("visual.")}
    weights.update({key: value for key, value in images.items() if key.startswith("visual.")})
    model = build_model(weights).requires_grad_(False)
    model.visual.requires_grad_(True)
    model.logit_scale.requires_grad_(True)
    return model, teacher


def contrastive_loss(images, texts, logit_scale):
    """Embeddings [B, D] of images and of their captions -> CLIP's loss."""
    logits = logit_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    diagonal = torch.arange(len(logits))
    return (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2


def altered(images, generator):
    """Pixels [B, 3, H, W] in [0, 1] in another saturation, contrast and light, with noise."""
    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(len(images), *shape, generator=generator)

    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * uniform(0.7, 1.1, 1, 1, 1)
    images = images * uniform(0.85, 1.1, 1, 1, 1) + uniform(-0.08, 0.08, 3, 1, 1)
    noise = torch.randn(images.shape, generator=generator)
    return (images + uniform(0, 0.03, 1, 1, 1) * noise).clamp(0, 1)


def distillation_loss(model, teacher, clean, images, texts, patches, generator):
    """CLIP's loss, plus 10 and 5 times one minus the cosine to the teacher's embeddings.

    The class token imitates the teacher's global embedding, each of the randomly kept patches the
    local embedding of the location (32 pixels, 2 by 2 patches) that it lies in. The teacher sees
    the clean images."""
    with torch.no_grad():
        teacher_global, teacher_local = teacher.encode_image_dense(clean)  # [B, D], [B, 16, D]
    patch = torch.arange(64)
    teacher_local = teacher_local[:, patch // 16 * 4 + patch % 8 // 2]  # [B, 64, D]
    kept = torch.rand(len(images), 64, generator=generator).argsort(dim=1)[:, :patches]
    rows = torch.arange(len(images))[:, None]
    x = model.visual.embed(images)  # [B, 1 + 64, W]
    x = torch.cat([x[:, :1], x[rows, 1 + kept]], dim=1)  # [B, 1 + patches, W]
    for block in model.visual.transformer.resblocks:
        x = block(x)
    x = model.visual.ln_post(x) @ model.visual.proj
    cosine_global = F.cosine_similarity(x[:, 0], teacher_global, dim=-1).mean()
    cosine_local = F.cosine_similarity(x[:, 1:], teacher_local[rows, kept], dim=-1).mean()
    loss = contrastive_loss(x[:, 0], texts, model.logit_scale)
    return loss + 10 * (1 - cosine_global) + 5 * (1 - cosine_local)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--steps", type=int, help="of the learning rate's schedule")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--scenes", type=int, default=100_000)
    parser.add_argument("--stop-at", type=int, help="stop after this step, to continue later")
    parser.add_argument("--output", type=Path, default=HERE)
    args = parser.parse_args(argv)
    steps, batch_size, peak, warmup = STAGES[args.stage]
    steps = args.steps or steps
    batch_size = args.batch_size or batch_size
    last = min(steps, args.stop_at or steps)
    cache = args.output / "cache"  # scenes, checkpoints, weights of the first two stages
    cache.mkdir(parents=True, exist_ok=True)

    if not (args.output / "merges.txt.gz").exists():
        write_merges(args.output / "merges.txt.gz")
    tokenizer = Tokenizer(args.output / "merges.txt.gz")
    objects = [scene_objects("web", 0, i) for i in range(args.scenes)]
    pool = scene_pool(cache / f"web-{args.scenes}.npy", args.scenes)
    counts = np.array([len(things) for things in objects])
    if args.stage in ("RN", "ViT"):
        levels = [np.flatnonzero(counts == 1), np.flatnonzero(counts <= 2), np.arange(args.scenes)]
    else:
        levels = [np.arange(args.scenes)]

    torch.manual_seed(0)
    model, teacher = first_model(args.stage, args.output, tokenizer)
    model.to(memory_format=torch.channels_last)
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    others = [p for p in trained if p.ndim <= 1]  # norms, biases, temperature
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.05},
                                   {"params": others, "weight_decay": 0}], betas=(0.9, 0.98))
    step, level, since, running = 0, 0, 0, 5.0  # since: steps on this level
    checkpoint = cache / f"{args.stage}-checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, level, since, running = state["progress"]
        print(f"continuing at step {step}", flush=True)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    start = time.time()

    while step < last:
        random = np.random.default_rng((0, step))  # a resumed run draws the same batches
        chosen = random.choice(levels[level], batch_size, replace=False)
        if args.stage == "ViT-whole":  # at least half of the scenes show several things
            several = np.flatnonzero(counts >= 2)
            chosen[::2] = random.choice(several, len(chosen[::2]), replace=False)
        chosen = np.sort(chosen)
        images = torch.from_numpy(pool[chosen]).permute(0, 3, 1, 2)  # channels last
        clean = (images.float() / 255 - mean) / std
        captions = [caption(objects[i], random) for i in chosen]
        texts = model.encode_text(tokenizer.tokenize(captions))
        if teacher:
            generator = torch.Generator().manual_seed(step)
            patches, seen = 32, clean
            if args.stage == "ViT-whole":
                patches, seen = 64, (altered(images.float() / 255, generator) - mean) / std
            loss = distillation_loss(model, teacher, clean, seen, texts, patches, generator)
        else:
            loss = contrastive_loss(model.encode_image(clean), texts, model.logit_scale)
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, (step + 1) / warmup) * decay
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        step += 1
        since += 1
        running += 0.03 * (loss.item() - running)
        easy = running < 1.7 or since > 0.2 * steps
        if easy and since >= 100 and level + 1 < len(levels):
            level += 1
            since = 0
            print(f"step {step}: scenes of up to {(1, 2, 5)[level]} things", flush=True)
        if step % 50 == 0:
            print(f"step {step} loss {running:.3f} scale {model.logit_scale.exp():.1f} "
                  f"{time.time() - start:.0f} s", flush=True)
        if step % 250 == 0 or step == last:
            temporary = checkpoint.with_suffix(".tmp")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                        "progress": (step, level, since, running)}, temporary)
            temporary.replace(checkpoint)
            half = {key: value.half() if value.is_floating_point() else value
                    for key, value in model.state_dict().items()}
            torch.save(half, temporary)
            temporary.replace(args.output / FILES[args.stage])


if __name__ == "__main__":
    main()
