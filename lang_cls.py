"""CoMC: a multi-label image classifier that is trained on sentences alone.

Liu et al., "Language-driven Cross-modal Classifier for Zero-shot Multi-label Image Recognition",
ICML 2024. CLIP puts texts and images into one space, so that a classifier of text embeddings also
classifies images:

 1. texts: a language model, or a grammar, is told which labels to write about, so that every
    sentence comes with its targets;
 2. classifier: one linear layer on unit-length text embeddings plus Gaussian noise, which makes
    it tolerant of the gap between texts and images;
 3. ranking: every present label above every absent one, the sum over pairs of
    max(0, 1 - l_p + l_n);
 4. mapping: at test time an image embedding e is drawn towards the texts by what it is as a
    mixture of the labels' embeddings M [C, D],
        m(e) = normalise(softmax(e M^T / 0.01) M),   f(e) = 0.7 e + 0.3 m(e);
 5. two streams: the logits of the whole image and of its best locations, averaged.

    python lang_cls.py                                     # toy world, nothing to download
    python lang_cls.py --labels "owl, ice cream, traffic light" --output runs/mine  # no data set
    python lang_cls.py --predict photos/ --checkpoint runs/mine/best.pt
    python lang_cls.py --predict photos/ --checkpoint model-best.pth.tar  # the authors', for COCO
    python lang_cls.py --labels "owl, ice cream" --generate texts.jsonl \\
        --llm-url http://localhost:11434/v1 --llm-model NAME  # then train with --texts texts.jsonl

B images, L locations, C labels, D joint embedding. Targets: +1 present, -1 absent, 0 unknown.

Implementation details
 1. The text tower is frozen: every distinct text is embedded once and kept on disk. What trains
    is a matrix, for seconds; several GPUs would have nothing to do.
 2. A ranking pair needs a present label: [present labels, C] margins, never [B, C, C].
Where this differs from the authors' code
 1. Sentences come from a built-in grammar unless --texts names a file; --generate has a language
    model write one. The prompt templates, some forty, are our own.
 2. Their release has made 4,200 steps: --sentences 100000, not the 40,000 of their generator.
 3. The last epoch is reported; --val-fraction selects on held-out sentences, never on test images.
"""
import argparse
import contextlib
import json
import math
import os
import random
import re
import sys
import time
import urllib.error
import urllib.request
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import clip_model
import data
import metrics
from data import UserError
from toy.grammar import fill_template, sentences_about

# what the toy world's small CLIP asks for; all other defaults are the paper's (the learning rate
# was chosen on scenes of their own, not on the test scenes)
TOY = "--clip toy-RN --lr 5e-3 --workers 0 --no-zero-shot"

TEMPLATES = ["a photo of a {}.", "a photo of the {}.", "a photo with a {}.", "a scene with a {}."]
TEMPLATES += [f"a {kind} of a {{}}." for kind in (
    "picture snapshot close-up drawing painting sketch rendering cartoon").split()]
TEMPLATES += [f"a {quality} photo of a {{}}." for quality in (
    "good bad blurred sharp dark bright grainy cropped faded colorful tilted low-resolution "
    "black-and-white").split()]
TEMPLATES += [f"a photo of a {{}} {place}." for place in (
    "at night, by day, indoors, outdoors, in the background, in the foreground, "
    "among other things, seen from above, seen from afar, at the edge, half hidden").split(", ")]

SYNONYMS = [group.split(", ") for group in (  # names that texts use for the same label
    "person, man, woman, boy, girl, child, player, rider; airplane, aeroplane, plane, jet; "
    "boat, ship; bicycle, bike; motorcycle, motorbike, motor bike; car, automobile; couch, sofa; "
    "refrigerator, fridge; ocean, sea; tv, television, tv monitor, tvmonitor; cell phone, "
    "mobile phone, smartphone, phone; dining table, diningtable; potted plant, pottedplant; "
    "donut, doughnut; hair drier, hair dryer, blow dryer").split("; ")]
REFUSAL = re.compile(r"((i['’]?m|i am) )?(very |so )?(sorry|unable|not able)|i can ?(not|['’]?t)"
                     r"|i (won['’]?t|apologi)|as an (ai|artificial)|unfortunately|my apolog", re.I)


# ---- model

def map_to_text(embeddings, memory, temperature=0.01):
    """Cross-modal mapping: unit-length embeddings float [..., D] as mixtures of the labels' text
    embeddings, memory float [M, D], unit length too -> [..., D], unit length."""
    weights = (embeddings @ memory.T / temperature).softmax(dim=-1)  # [..., M]
    return F.normalize(weights @ memory, dim=-1)


class CoMC(nn.Module):
    """A linear classifier, weight [C, D], and unit-length label embeddings, memory [C, D]."""

    def __init__(self, weight, memory):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("memory", memory)

    def forward(self, embeddings, mapping_weight=0):
        """Embeddings [..., D], those of images of unit length and mapped -> logits [..., C]."""
        if mapping_weight:
            mapped = map_to_text(embeddings, self.memory)
            embeddings = (1 - mapping_weight) * embeddings + mapping_weight * mapped
        return embeddings @ self.weight.T

    def scores(self, global_, local, mapping_weight=0.3, streams="both"):
        """Unit-length embeddings [B, D] and [B, L, D] -> logits [B, C], of any size: the mean of
        the whole image's and the best location's; streams: "both", "global" or "local" alone."""
        whole = self(global_, mapping_weight)
        best = self(local, mapping_weight).amax(dim=1)  # [B, L, C] -> [B, C]
        return {"global": whole, "local": best, "both": (whole + best) / 2}[streams]


def encode(clip, images, args):
    """Images -> unit-length CLIP's own global [B, D], CoMC's global [B, D] and local [B, L, D]
    embeddings. A ResNet pools CoMC's without positional embeddings."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        if isinstance(clip.visual, clip_model.VisionTransformer):
            global_, local = clip.encode_image_dense(images)
            clip_global = global_
        else:  # two poolings of the same features
            features = clip.visual.features(images)
            clip_global = clip.visual.attnpool(features)
            global_, local = clip.visual.attnpool(features, position=False, dense=True)
    return [F.normalize(x.float(), dim=-1) for x in (clip_global, global_, local)]


# ---- loss

def ranking_loss(logits, targets):
    """Sum over (present p, absent n) of max(0, 1 - l_p + l_n), mean over the batch: a scalar.

    logits: float [B, C]. targets: int8 [B, C]; unknown labels (0) form no pairs. Targets may stay
    on the CPU, so that no GPU is waited for to count the present ones."""
    present = (targets == 1).nonzero().to(logits.device, non_blocking=True)  # [P, 2]
    is_absent = (targets == -1).to(logits.device, non_blocking=True)
    rows, columns = present.T  # B x C x C is never built
    absent = logits.masked_fill(~is_absent, -torch.inf)  # others fall below every margin
    margins = (1 - logits[rows, columns, None] + absent[rows]).relu()  # [P, C]
    return margins.sum() / len(logits)


# ---- texts by a language model

def ask(url, model, labels, waits=(0, 1, 2, 4, 8, 16)):
    """A sentence about these labels from an OpenAI-compatible server. 429, 5xx and time-outs are
    tried again; UserError if that does not help, or if the server refuses. waits: seconds before
    each attempt, unless the server asks for more."""
    prompt = (f"Describe, in one sentence of at most 25 words, a photo that shows: "
              f"{', '.join(labels)}. Use each of these names as it is written here and mention no "
              f"other object. Answer with the sentence only.")
    body = {"model": model, "messages": [{"role": "user", "content": prompt}]}
    request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions",
                                     json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if key:  # unredirected: another host must not get it
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    retry_after = 0
    for wait in waits:
        time.sleep(max(wait, retry_after))
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                answer = json.load(response)["choices"][0]["message"]["content"] or ""
            return re.sub("(?s)<think>.*?</think>", "", answer).strip('" \n')  # reasoning
        except urllib.error.HTTPError as error:
            reason = str(error)
            with contextlib.suppress(Exception):  # it may break off too
                reason += f" {error.read(10_000).decode(errors='replace')}"
            if error.code not in (408, 409, 425, 429) and error.code < 500:
                break
            if error.headers.get("Retry-After", "").isdigit():
                retry_after = min(int(error.headers["Retry-After"]), 600)
        except Exception as error:  # connections break off, and answers are no answers
            reason = f"{type(error).__name__}: {error}"
    reason = reason.replace(key, "***") if key else reason
    raise UserError(f"{url}: {reason[:300]}; the same command goes on from what has come so far")


def generate(path, labels, args):
    """Have a language model write --sentences about 1 to 5 random labels each, several at a time.
    Every answer is kept at once, {"request", "labels", "description"} a line; a repeated call
    asks for the missing ones."""
    generator = random.Random(args.seed)
    missing = {request: generator.sample(labels, generator.randint(1, min(5, len(labels))))
               for request in range(args.sentences)}
    if os.path.exists(path):
        text = data.read_text(path)
        if text and not text.startswith('{"request": '):
            raise UserError(f"{path}: not written by --generate: choose another file")
        data.write_file(path, text[:text.rfind("\n") + 1])  # a killed call may have cut a line
        for where, entry in data.read_json(path):
            if missing.pop(entry.get("request"), entry.get("labels")) != entry.get("labels"):
                raise UserError(f"{where}: for other labels or another seed: choose another file")

    def answer(request):
        line = {"request": request, "labels": missing[request],
                "description": ask(args.llm_url, args.llm_model, missing[request])}
        file.write(json.dumps(line).encode() + b"\n")

    # unbuffered, a line is one write, whole and at once, whichever thread it comes from
    with open(path, "ab", buffering=0) as file, ThreadPoolExecutor(args.llm_requests) as pool:
        futures = [pool.submit(answer, request) for request in missing]
        try:
            for future in tqdm(as_completed(futures), total=len(futures),
                               disable=args.quiet or None):
                future.result()
        except BaseException:  # Ctrl-C too: ask no more
            pool.shutdown(cancel_futures=True)
            raise
    print(f"{args.sentences:,} answers; train with --texts {path}")


# ---- texts and their embeddings

def load_texts(path, labels):
    """Sentences with their labels from a file; those of no use are dropped and counted.

    path: a JSON list of {"labels": ["dog", ...], "description": "..."}, or such an object a line.
    A synonym counts as the label; a sentence need not repeat its word ("a skateboarder").
    -> N sentences, targets int8 [N, C] in {+1, -1}, Counter {reason: number dropped}."""
    column_of = {label.lower(): column for column, label in enumerate(labels)}
    for group in SYNONYMS:
        columns = [column_of[name] for name in group if name in column_of]
        if len(columns) == 1:
            column_of |= dict.fromkeys(group, columns[0])
    sentences, targets, dropped = {}, [], Counter()  # sentences by their lower case
    for where, entry in data.read_json(path):
        try:
            columns = [column_of.get(label.strip().lower()) for label in entry["labels"]]
            sentence = " ".join((entry["description"] or "").split())
        except (TypeError, KeyError, AttributeError):
            raise UserError(f'{where}: not {{"labels": ["..."], "description": "..."}}') from None
        if not columns or None in columns:
            dropped["no or unknown label"] += 1
        elif not sentence or REFUSAL.match(sentence):
            dropped["empty or refusal"] += 1
        elif sentence.lower() in sentences:
            dropped["duplicate"] += 1
        else:
            sentences[sentence.lower()] = sentence
            targets.append(torch.full((len(labels),), -1, dtype=torch.int8))
            targets[-1][columns] = 1
    if not sentences:
        raise UserError(f"{path}: no sentence of use, dropped are {dict(dropped)}")
    return list(sentences.values()), torch.stack(targets), dropped


def training_texts(labels, templates, args):
    """-> sentences list[str] of --sources, targets int8 [N, C] in {+1, -1}. Templates: for each
    label "a photo of a {}." nine times, and every template once (Liu et al., 2024)."""
    count = 0 if args.sources == "templates" else args.sentences
    if args.texts:
        sentences, targets, dropped = load_texts(args.texts, labels)
        print(f"{args.texts}: {len(sentences):,} sentences; dropped: {dict(dropped)}")
        sentences, targets = sentences[:count], targets[:count]
    else:
        sentences, targets = sentences_about(labels, count, args.seed)
    if args.sources != "sentences":
        templates = 9 * TEMPLATES[:1] + templates
        sentences += [fill_template(template, label) for label in labels for template in templates]
        one_present = 2 * torch.eye(len(labels), dtype=torch.int8) - 1
        targets = torch.cat([targets, one_present.repeat_interleave(len(templates), dim=0)])
    return sentences, targets


@torch.no_grad()
def embed_texts(clip, texts, args):
    """Unit-length embeddings float32 [N, D] of texts, cut where too long; kept on disk."""
    unique = list(dict.fromkeys(texts))

    def embed():
        tokens = clip.tokenize(unique, truncate=True)
        embeddings = torch.empty(len(unique), clip.text_projection.shape[1])
        by_length = tokens.argmax(dim=1).argsort(stable=True).split(256)  # little padding
        for rows in tqdm(by_length, "embedding texts", leave=False, disable=args.quiet or None):
            embedded = clip.encode_text(tokens[rows].to(args.device)).float()
            embeddings[rows] = F.normalize(embedded, dim=-1).cpu()
        return {"embeddings": embeddings.numpy()}

    arrays = data.cached("texts", [], [clip.fingerprint(), unique], embed)
    embeddings = torch.from_numpy(arrays["embeddings"])
    row = {text: index for index, text in enumerate(unique)}
    return embeddings[[row[text] for text in texts]]


def label_embeddings(clip, labels, templates, args):
    """Mean over the templates of unit-length embeddings, of unit length again: [C, D]."""
    prompts = [fill_template(template, label) for label in labels for template in templates]
    embeddings = embed_texts(clip, prompts, args)
    return F.normalize(embeddings.unflatten(0, (len(labels), -1)).mean(dim=1), dim=-1)


# ---- train

def learning_rate(epoch, peak, epochs):
    """1e-5 in the first epoch, then half a cosine from the peak towards 0, a step an epoch."""
    return 1e-5 if epoch == 0 else peak * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))


def train(model, embeddings, targets, state, args):
    """On embeddings [N, D], from where state["log"] ends; a checkpoint an epoch. Every epoch seeds
    its own shuffling and noise, so a resumed run repeats the epoch it was killed in exactly."""
    log = state["log"]
    # held out are distinct texts, wherever they occur
    distinct, text = embeddings.unique(dim=0, return_inverse=True)
    shuffled = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(0))
    is_held_out = (shuffled < math.ceil(args.val_fraction * len(distinct)))[text]
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    held_out, order = order[is_held_out[order]], order[~is_held_out[order]]
    embeddings = embeddings.to(args.device)
    optimizer = torch.optim.Adam([model.weight], lr=args.lr, weight_decay=5e-4)
    if log:
        optimizer.load_state_dict(state["optimizer"])

    for epoch in range(len(log), args.epochs):
        torch.manual_seed(1_000_003 * args.seed + epoch)
        begin, total = time.time(), 0
        lr = learning_rate(epoch, args.lr, args.epochs)
        optimizer.param_groups[0]["lr"] = lr
        batches = order[torch.randperm(len(order))].split(args.batch_size)
        for rows in batches:
            batch = embeddings[rows.to(args.device, non_blocking=True)]
            noisy = batch + args.noise * torch.randn_like(batch)
            loss = ranking_loss(model(noisy), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total = total + loss.detach()
        loss = total.item() / len(batches)  # the only wait for the GPU
        if not math.isfinite(loss):
            raise UserError(f"epoch {epoch + 1}: the loss is not finite; finished epochs are in "
                            f"{args.output}: try a smaller --lr")
        line = {"epoch": epoch + 1, "loss": loss, "lr": lr, "seconds": time.time() - begin}
        if len(held_out):
            scores = model(embeddings[held_out]).detach().cpu()
            line["val_mAP"] = metrics.mean_average_precision(scores, targets[held_out])
        print("  ".join(f"{name} {value:.4g}" for name, value in line.items()), flush=True)
        log.append(line)
        state.update(model=model.state_dict(), optimizer=optimizer.state_dict())
        best = max(x.get("val_mAP", 0) for x in log)
        if not line.get("val_mAP", 0) < best:  # without --val-fraction, or NaN: always
            data.write_file(f"{args.output}/best.pt", state)
        data.write_file(f"{args.output}/log.jsonl", "".join(json.dumps(x) + "\n" for x in log))
        data.write_file(f"{args.output}/curves.png", metrics.draw_curves(log))
        data.write_file(f"{args.output}/last.pt", state)  # at the end: else the epoch is repeated
    best = data.read_checkpoint(f"{args.output}/best.pt", "lang_cls")
    model.load_state_dict(best["model"])


# ---- evaluate

@torch.no_grad()
def table(clip, model, test, args):
    """-> the rows that a run ends with: {"name", "kind", metric: value in [0, 1], ...}."""
    ks = (10, 20) if test.name == "openimages" else (3, 5)
    settings = {"CoMC without mapping": (0, args.streams),
                "CoMC, global alone": (args.mapping_weight, "global"),
                "CoMC, local alone": (args.mapping_weight, "local"),
                "CoMC": (args.mapping_weight, args.streams)}
    encoder = torch.compile(encode) if args.compile else encode
    scores = torch.empty(2 + len(settings), len(test), len(test.labels))
    loader = DataLoader(test, 64, num_workers=args.workers, pin_memory="cuda" in args.device)
    bar = tqdm(loader, "scoring", leave=False, disable=args.quiet or None)
    for (images, _), part in zip(bar, scores.split(64, dim=1)):
        clip_global, global_, local = encoder(clip, images.to(args.device, non_blocking=True), args)
        whole = clip_global @ model.memory.T
        best = (local @ model.memory.T).amax(dim=1)  # [B, L, C] -> [B, C]
        ours = [model.scores(global_, local, *setting) for setting in settings.values()]
        part.copy_(torch.stack([whole, best, *ours]))
    rows = metrics.zero_shot_rows(*scores[:2], test, ks)
    for name, x in zip(settings, scores[2:]):
        kind = "method" if name == "CoMC" else "ablation"
        rows.append(metrics.table_row(name, kind, x, test, ks))
    return rows


# ---- predict

@torch.no_grad()
def predict(clip, model, preprocess, labels, args):
    """--predict: a JSON object per image, {"path", "labels": [{"label", "score"}, ...]}."""
    for path, photo in data.open_images(args.predict):
        _, global_, local = encode(clip, preprocess(photo)[None].to(args.device), args)
        scores = model.scores(global_, local, args.mapping_weight, args.streams)[0].tolist()
        best = sorted(range(len(labels)), key=lambda i: -scores[i])[:args.top]
        predicted = [{"label": labels[i], "score": round(scores[i], 4)} for i in best
                     if args.threshold is None or scores[i] >= args.threshold]
        print(json.dumps({"path": str(path), "labels": predicted}), flush=True)
        if args.heatmap:
            maps = model(local, args.mapping_weight)[0].T.cpu()  # [C, L]
            maps = maps.unflatten(1, (math.isqrt(maps.shape[1]), -1))  # [C, h, w]
            shown = [(*line.values(), maps[i]) for i, line in zip(best, predicted[:3])]
            name = str(path).strip("./").replace(os.sep, "_")
            data.write_file(f"{args.heatmap}/{name}.png", metrics.draw_heatmaps(photo, shown))


# ---- arguments

def arguments(argv=None):
    """-> what was asked for, and the state of the checkpoint to start from or None."""
    parser = argparse.ArgumentParser(
        usage="lang_cls.py [options]", description=__doc__.split("\n\nB images")[0],
        epilog=f"Defaults are the paper's; --data toy has {TOY}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("--clip", default="RN50", help="CLIP's name for it or a path to weights")
    add("--mapping-weight", type=float, default=0.3, help="share of the mapped embedding (0.3)")
    add("--streams", default="both", choices=["both", "global", "local"], help="those that count")
    add = parser.add_argument_group("texts").add_argument
    add("--labels", help='train for these, without a dataset: "owl, ice cream"')
    add("--sources", default="both", choices=["both", "sentences", "templates"])
    add("--sentences", type=int, default=40_000, help="by the grammar, or the first of --texts")
    add("--texts", metavar="FILE", help='JSON: {"labels": ["..."], "description": "..."}, ...')
    add("--templates", metavar="FILE", help="prompts, one a line with {} in it")
    add("--generate", metavar="FILE", help="let a language model write it; repeat to continue")
    add("--llm-url", metavar="URL", help="an OpenAI-compatible server's; key: OPENAI_API_KEY")
    add("--llm-model", metavar="NAME", help="the server's name of the language model")
    add("--llm-requests", type=int, default=8, help="at a time (8)")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=20, help="of which the first warms up (20)")
    add("--batch-size", type=int, default=512, help="sentences (512)")
    add("--lr", type=float, default=1e-3, help="peak learning rate (1e-3)")
    add("--noise", type=float, default=0.1, help="standard deviation, on embeddings (0.1)")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="toy", choices=list(data.DATASETS), help="folder: images of your own")
    add("--root", metavar="DIR", help="its folder, laid out as DATASETS.md shows")
    add("--val-fraction", type=float, default=0.0, help="share held out, to select the epoch")
    add("--limit", type=int, help="only so many images: a quick look")
    flag = {"action": argparse.BooleanOptionalAction}  # None where it was not given
    add("--allow-missing", **flag, help="go on if over 5%% of the images are missing")
    add("--annotated-only", **flag, help="coco, nuswide81: drop images without a label")
    add("--drop-crowd", **flag, help="coco: boxes of crowds do not count")
    add("--zero-shot", **flag, help="coco: 48 seen and 17 unseen labels")
    add("--difficult", choices=["absent", "unknown", "present"], help="of voc2007 (absent)")
    add("--not-visible", choices=["absent", "unknown"], help="cub: parts out of sight (absent)")
    add = parser.add_argument_group("run").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, default=8, help="processes that load images (8)")
    add("--precision", default="fp32", choices=["fp32", "bf16"])
    add("--compile", action="store_true", help="torch.compile the image encoder")
    add("--seed", type=int, default=0)
    add("--output", metavar="DIR", help="the run's folder (runs/lang_cls-DATA)")
    add("--resume", action="store_true", help="go on in --output; options typed now win")
    add("--quiet", action="store_true", help="no progress bars")
    add = parser.add_argument_group("a trained model").add_argument
    add("--eval", metavar="FILE", help="evaluate this checkpoint instead of training")
    add("--predict", nargs="+", metavar="IMAGE", help="images, folders or quoted patterns")
    add("--checkpoint", metavar="FILE", help="for --predict; or the authors' model-best.pth.tar")
    add("--memory", metavar="FILE", help="with the authors' model: their label embeddings [C, D]")
    add("--top", type=int, default=5, help="labels to predict, the best ones (5)")
    add("--threshold", type=float, help="the least score of a label to predict")
    add("--heatmap", metavar="DIR", help="a picture per image of where its best labels were seen")

    args = parser.parse_args(argv)
    if bool(args.predict) != bool(args.checkpoint):
        parser.error("--predict and --checkpoint FILE go together")
    if args.generate and not ((args.llm_url or "").startswith("http") and args.llm_model):
        parser.error("--generate needs --llm-url http://... and --llm-model NAME")
    if args.labels and (args.predict or args.eval):
        parser.error("--labels are for training: a checkpoint scores its own labels only")
    output = args.output or f"runs/lang_cls-{'labels' if args.labels else args.data}"
    start = args.checkpoint or args.eval or (args.resume and f"{output}/last.pt")
    saved = None
    if start and not start.endswith(".pth.tar"):  # its run's options; what is typed wins
        saved = data.read_checkpoint(start, "lang_cls")
        saved["args"] |= {"output": args.output, "device": args.device, "resume": args.resume}
        args = parser.parse_args(argv, argparse.Namespace(**saved["args"]))
    elif args.data == "toy" and not (start or args.labels):
        args = parser.parse_args(argv, parser.parse_args(TOY.split()))
    if not (args.predict or args.eval):
        args.output = output
    if min(args.batch_size, args.top, args.epochs, args.sentences) < 1:
        parser.error("--batch-size, --top, --epochs, --sentences: at least 1")
    if min(args.lr, args.noise, args.seed) < 0 or not 0 <= args.mapping_weight <= 1:
        parser.error("--lr, --noise, --seed: not below 0; --mapping-weight: from 0 to 1")
    if not 0 <= args.val_fraction < 1:
        parser.error("--val-fraction must be at least 0 and below 1")
    return args, saved


# ---- main

class Inert:
    """An empty dict for every object that is not a tensor or a container: nothing is executed."""

    def __new__(cls, *args):
        return OrderedDict()


def load_release(path, clip, templates, args):
    """The authors' checkpoint for COCO, which pickled a scheduler and more beside the weight, and
    label embeddings, those of --memory or of our templates -> CoMC. UserError for other files."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Inert, name) for name in names]):
            state = torch.load(path, map_location="cpu", weights_only=True)
        weight = state["state_dict"]["adapter.0.weight"].float()  # [80, 1024]
        if args.memory:
            path = args.memory
            memory = torch.load(path, map_location="cpu", weights_only=True).float()
    except Exception as error:  # whatever is wrong with the file, it is the user's to replace
        raise UserError(f"{path} is not the authors' file: {error!r:.200}") from None
    if not args.memory:
        memory = label_embeddings(clip, data.COCO_LABELS, templates, args)
    if not weight.shape == memory.shape == (80, clip.text_projection.shape[1]):
        raise UserError(f"a classifier {list(weight.shape)} and label embeddings "
                        f"{list(memory.shape)} do not fit COCO's labels and --clip {args.clip}")
    return CoMC(weight, memory)


def main(argv=None):
    begin = time.time()
    args, saved = arguments(argv)
    test = labels = None
    if args.labels:
        labels = [label.strip() for label in args.labels.split(",")]
    elif not args.predict:  # data first: files may be missing
        options = {name: getattr(args, name) for name in data.OPTIONS}
        test = data.load_dataset(args.data, args.root, "test", **options)
        labels = test.labels
    if labels and len(set(labels)) < max(2, len(labels)):
        raise UserError("labels are ranked against each other: give two or more, each once")
    if args.generate:
        return generate(args.generate, labels, args)
    if os.path.exists(f"{args.output}/last.pt") and not (args.resume or args.eval or args.predict):
        raise UserError(f"{args.output} holds a run: --resume it or name another --output")

    torch.set_float32_matmul_precision("high")  # TF32 on a GPU: faster, 10 bits of mantissa

    # model
    clip, preprocess = clip_model.load(args.clip, args.device)
    templates = TEMPLATES
    if args.templates:
        templates = re.split(r"\s*\n\s*", data.read_text(args.templates).strip())
        if not all("{}" in template for template in templates):
            raise UserError(f"{args.templates}: every line needs {{}}, where the label goes")
    state = {"method": "lang_cls", "args": vars(args), "clip_fingerprint": clip.fingerprint(),
             "labels": labels, "log": []}
    if saved:
        if saved["clip_fingerprint"] != state["clip_fingerprint"]:
            raise UserError(f"the checkpoint belongs to another CLIP than --clip {args.clip}")
        model = CoMC(**saved["model"])
        state = {**saved, "args": vars(args)}
    elif released := args.checkpoint or args.eval:
        model = load_release(released, clip, templates, args)
        state["labels"] = data.COCO_LABELS
    else:
        torch.manual_seed(args.seed)
        memory = label_embeddings(clip, labels, templates, args)
        model = CoMC(nn.Linear(memory.shape[1], len(labels), bias=False).weight.detach(), memory)
    if state["labels"] != labels and not args.predict:
        raise UserError("the checkpoint was trained for other labels")
    model.to(args.device)
    if args.predict:
        return predict(clip, model, preprocess, state["labels"], args)

    # train
    if not args.eval:
        sentences, targets = training_texts(labels, templates, args)
        print(f"{args.clip}: {len(labels)} labels, {len(sentences):,} texts to train with, "
              f"{len(set(sentences)):,} distinct", flush=True)
        embeddings = embed_texts(clip, sentences, args)
        data.write_file(f"{args.output}/args.json", json.dumps(vars(args), indent=1))
        train(model, embeddings, targets, state, args)

    # evaluate
    rows = []
    if test is not None:
        test.transform = preprocess
        rows = table(clip, model, test, args)
        metrics.print_table(rows)
        if test.missing:
            print(f"{test.missing} test images are missing: not comparable with complete results")
    if args.output:
        results = {"method": "lang_cls", "data": args.data, "clip": args.clip, "seed": args.seed,
                   "seconds": round(time.time() - begin), "rows": rows}
        data.write_file(f"{args.output}/results.json", json.dumps(results, indent=1))
        print(f"{results['seconds']} s; results and checkpoints: {args.output}")
    return rows


if __name__ == "__main__":
    try:
        main()
    except (UserError, clip_model.ClipError) as error:
        print(f"lang_cls.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; a training run goes on with --resume")
