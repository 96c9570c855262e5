"""Pre-train a tiny CLIP on captioned scenes, from nothing: the weights in this folder.

    python toy/pretrain.py --model ViT        # toy-ViT.pt
    python toy/pretrain.py --model RN         # toy-RN.pt

The loss is CLIP's own (Radford et al., 2021): symmetric cross-entropy over the cosine
similarities of a batch of images and captions, with a learned temperature. What makes it work in
an hour on two cores is a curriculum: scenes of a single thing until the loss falls, then of up to
two, then all. Interrupted runs continue where they stopped.
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
from clip_model import CLIP, MEAN, STD, Tokenizer, byte_symbols  # noqa: E402
from toy.world import COLOURS, LABELS, SCENE_SIZE, scene, scene_objects  # noqa: E402

MERGES = 640  # enough for every word of the captions to be one token
ARCHITECTURES = {  # embed_dim, resolution, vision layers, width, patch; text width 128, layers
    "ViT": dict(vision_layers=5, vision_width=128, vision_patch_size=16, transformer_layers=3),
    "RN": dict(vision_layers=(1, 1, 1, 1), vision_width=16, vision_patch_size=None,
               transformer_layers=2),
}
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


# ---------------------------------------------------------------------------------------------
# captions

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


# ---------------------------------------------------------------------------------------------
# scenes

def scene_pool(path, count, seed):
    """Draw the scenes once: uint8 [count, size, size, 3], memory-mapped, shared by both CLIPs."""
    if not path.exists():
        temporary = path.with_name(f"{path.stem}-{os.getpid()}.npy")
        shape = (count, SCENE_SIZE, SCENE_SIZE, 3)
        pool = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
        for i in tqdm(range(count), desc="scenes", disable=None):
            pool[i] = np.asarray(scene("web", seed, i))
        pool.flush()
        temporary.rename(path)
    return np.load(path, mmap_mode="r")


# ---------------------------------------------------------------------------------------------
# training

def learning_rate(step, args):
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / (args.steps - args.warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(ARCHITECTURES), required=True)
    parser.add_argument("--steps", type=int, help="default: 2600 (RN), 3000 (ViT)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--easy-loss", type=float, default=1.7,
                        help="the running loss below which harder scenes come in")
    parser.add_argument("--scenes", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--stop-at", type=int, help="stop after this step, to continue later")
    parser.add_argument("--save-every", type=int, default=250, help="steps")
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--cache", type=Path, default=HERE / "cache", help="scenes, checkpoints")
    args = parser.parse_args()
    args.steps = args.steps or {"RN": 2600, "ViT": 3000}[args.model]
    torch.set_num_threads(args.threads)
    args.cache.mkdir(parents=True, exist_ok=True)
    args.output.mkdir(parents=True, exist_ok=True)

    merges = args.output / "merges.txt.gz"
    if not merges.exists():
        write_merges(merges)
    tokenizer = Tokenizer(merges)
    objects = [scene_objects("web", args.seed, i) for i in range(args.scenes)]
    pool = scene_pool(args.cache / f"web-{args.seed}-{args.scenes}.npy", args.scenes, args.seed)
    counts = np.array([len(things) for things in objects])
    stages = [np.flatnonzero(counts == 1), np.flatnonzero(counts <= 2), np.arange(args.scenes)]

    torch.manual_seed(args.seed)
    model = CLIP(128, SCENE_SIZE, context_length=77, vocab_size=len(tokenizer),
                 transformer_width=128, transformer_heads=2, **ARCHITECTURES[args.model])
    model.to(memory_format=torch.channels_last)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]  # norms, biases, temperature
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": args.weight_decay},
                                   {"params": others, "weight_decay": 0}], betas=(0.9, 0.98))
    step, stage, running, since = 0, 0, 5.0, 0
    checkpoint = args.cache / f"toy-{args.model}-{args.seed}.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, stage, running, since = (state[k] for k in ("step", "stage", "running", "since"))
        print(f"continuing at step {step}", flush=True)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    diagonal = torch.arange(args.batch_size)
    start = time.time()

    def save():
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                    "stage": stage, "running": running, "since": since},
                   checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)
        half = {key: value.half() if value.is_floating_point() else value
                for key, value in model.state_dict().items()}
        torch.save(half, args.output / f"toy-{args.model}.tmp")
        (args.output / f"toy-{args.model}.tmp").replace(args.output / f"toy-{args.model}.pt")

    while step < min(args.steps, args.stop_at or args.steps):
        random = np.random.default_rng((args.seed, step))  # a resumed run draws the same batches
        chosen = random.choice(stages[stage], args.batch_size, replace=False)
        images = torch.from_numpy(pool[np.sort(chosen)]).permute(0, 3, 1, 2)  # channels last
        images = (images.float() / 255 - mean) / std
        tokens = tokenizer.tokenize([caption(objects[i], random) for i in np.sort(chosen)])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        logits, transposed = model(images, tokens)
        loss = (F.cross_entropy(logits, diagonal) + F.cross_entropy(transposed, diagonal)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        step, since = step + 1, since + 1
        running += 0.03 * (loss.item() - running)
        if stage < 2 and since >= 100 and (running < args.easy_loss or since > 0.2 * args.steps):
            stage, since = stage + 1, 0
            print(f"step {step}: scenes of up to {(2, 5)[stage - 1]} things", flush=True)
        if step % 50 == 0:
            print(f"step {step} loss {running:.3f} scale {model.logit_scale.exp():.1f} "
                  f"{time.time() - start:.0f} s", flush=True)
        if step % args.save_every == 0 or step == args.steps:
            save()


if __name__ == "__main__":
    main()
