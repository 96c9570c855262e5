"""MKT: open-vocabulary multi-label classification by multi-modal knowledge transfer.

He et al., "Open-Vocabulary Multi-Label Classification via Multi-Modal Knowledge Transfer",
AAAI 2023 (arXiv 2207.01887). Some labels are annotated in training (seen), others are only
names at test time (unseen). CLIP knows all of them, but matches a text with a whole image:

 1. two streams: an image scores a label by its class token and by its best patches,
        a_c = mean of the top-k over patches i of <o_i, z_c>,   g_c = <o_cls, z_c>,
        s   = (a / |a| + g / |g|) / 2,  norms over the labels that compete (ZSL: the unseen);
 2. ranking: every present label above every absent one, max(0, 1 + s_n - s_p) averaged over the
    pairs that violate the margin;
 3. distillation: the mean of |o_cls - CLIP's own embedding of the image| keeps the image encoder
    in the space of CLIP's text, where unseen labels live;
 4. prompt tuning, with the image encoder frozen: the words around the label in "There is a
    {label} in the scene", the start and the end of text become learned embeddings, shared by
    all labels, unseen ones too.

    python mkt.py                                     # toy world, nothing to download
    python mkt.py --data nuswide --root data/nuswide  # the paper's first table
    torchrun --nproc-per-node 8 mkt.py --data nuswide --root data/nuswide  # eight GPUs
    python mkt.py --predict photos/ --checkpoint runs/mkt-toy/best.pt --labels "owl, ice cream"

B images, L patches, C labels, T tokens, W width, D joint embedding. Targets: +1 present,
-1 absent, 0 unknown.

Implementation details
 1. Teacher and student share the frozen blocks, which run once and without gradients.
 2. A ranking pair needs a present label: [present labels, C] margins, never [B, C, C].
 3. Label embeddings are computed once in stage 1; in stage 2 prompts are cut after their end.
 4. Under torchrun every process takes its part of each batch: the same sums but for rounding.
Where this differs from the authors' code
 1. CLIP's own mean, std and crop, on which it was trained; --preprocess authors for ImageNet's.
 2. They train the whole token embedding; we only the eight rows of the context.
 3. Images without a seen label are dropped before batching, so batches stay full.
 4. The last epoch is reported, or with --val-fraction each stage's best on held-out images.
"""
import argparse
import copy
import json
import math
import os
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from tqdm import tqdm

import clip_model
import data
import metrics
from data import UserError

PROMPT = "There is a {} in the scene"
# what the toy world's small CLIP and 10,000 scenes ask for; all other defaults are the paper's
TOY = ("--clip toy-ViT --epochs 4 --prompt-epochs 1 --warmup-epochs 1 --distillation 0.1 --topk 4 "
       "--augment no --workers 0")
EMPTY = (124, 116, 104)  # colour of corners that augmentation leaves empty: ImageNet's mean

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's


# ---- model

def stream_scores(local, global_, label_embeddings, topk):
    """As two_stream_scores takes them -> [2, B, C]: mean of the top-k patches', class token's."""
    patches = label_embeddings @ local.transpose(1, 2)  # [B, C, L]
    best = patches.topk(topk, dim=-1).values
    return torch.stack([best.mean(dim=-1), global_ @ label_embeddings.T])


def merge_streams(scores, streams):
    """stream_scores -> [B, C]: each divided by its norm over the C labels, then their mean."""
    local, global_ = F.normalize(scores, dim=-1)
    return {"local": local, "global": global_, "both": (local + global_) / 2}[streams]


def two_stream_scores(local, global_, label_embeddings, topk, streams="both"):
    """MKT's score of every label, the mean of two unit-length score vectors (section 3.2).

    local [B, L, D], global_ [B, D], label_embeddings [C, D], topk in 1..L -> float [B, C] within
    [-1, 1], relative to the other labels in play. streams: "global" or "local" for one alone."""
    return merge_streams(stream_scores(local, global_, label_embeddings, topk), streams)


class MKT(nn.Module):
    """CLIP, frozen, beside what is trained: the last two blocks, ln_post, the projection and the
    prompt's context. CLIP's own blocks are the teacher. Embeddings are float32 in any precision."""

    def __init__(self, clip, topk=16):
        super().__init__()
        visual = clip.visual
        if not isinstance(visual, clip_model.VisionTransformer):
            raise UserError("MKT trains a ViT's blocks, this CLIP is a ResNet: use --clip ViT-B/16")
        patches = (visual.input_resolution // visual.patch_size) ** 2
        if not 1 <= topk <= patches:
            raise UserError(f"--topk {topk} is not within 1..{patches}, the number of patches")
        self.clip = clip.requires_grad_(False)
        self.blocks = nn.Sequential(*copy.deepcopy(visual.transformer.resblocks[-2:]))
        self.ln_post = copy.deepcopy(visual.ln_post)
        self.proj = nn.Parameter(visual.proj.clone())
        # tokens whose embeddings are learned: start of text, six words, end of text
        self.context_ids = clip.tokenize(PROMPT.format(""))[0, :8]
        self.context = nn.Parameter(clip.token_embedding.weight[self.context_ids])  # [8, W]

    @torch.no_grad()
    def trunk(self, images):
        """Images [B, 3, H, W] -> tokens [B, 1 + L, W] below the first trained block."""
        x = self.clip.visual.embed(images)
        for block in self.clip.visual.transformer.resblocks[:-2]:
            x = block(x)
        return x

    def student(self, x):
        """Trunk tokens -> (global [B, D], local [B, L, D])."""
        x = (self.ln_post(self.blocks(x)) @ self.proj).float()
        return x[:, 0], x[:, 1:]

    @torch.no_grad()
    def teacher(self, x):
        """Trunk tokens -> CLIP's image embedding [B, D]."""
        *_, block, last = self.clip.visual.transformer.resblocks
        x = last.one_token(block(x), 0)  # [B, W]: CLIP reads the class token alone
        return (self.clip.visual.ln_post(x) @ self.clip.visual.proj).float()

    def forward(self, images):
        """Images [B, 3, H, W] -> (global [B, D], local [B, L, D])."""
        return self.student(self.trunk(images))

    def prompts(self, labels):
        """Names -> token ids int64 [C, T] on the device, and their ends of text [C] on the CPU."""
        tokens = self.clip.tokenize([PROMPT.format(label) for label in labels])
        ends = tokens.argmax(dim=1)  # end of text has the highest id
        return tokens[:, :ends.max() + 1].to(self.context.device), ends

    def label_embeddings(self, prompts, context=None, chunk=256):
        """prompts(labels) -> [C, D], differentiable in the context, by default the learned one.
        The backward pass recomputes chunks: 7,000 labels would keep 7,000 texts' activations."""
        context = self.context if context is None else context

        def encode(tokens, ends):
            x = self.clip.token_embedding(tokens)  # [c, T, W]
            last = ends[:, None] + torch.arange(-3, 1)  # [c, 4]: after the label's name
            rows = torch.arange(len(x), device=x.device)[:, None]
            x[:, :4] = context[:4]
            x[rows, last.to(x.device, non_blocking=True)] = context[4:]
            return self.clip.encode_prompts(x, ends)  # [c, D]

        if len(prompts[0]) <= chunk:
            return encode(*prompts).float()
        pieces = zip(*(x.split(chunk) for x in prompts))
        labels = [recompute(encode, *piece, use_reentrant=False) for piece in pieces]
        return torch.cat(labels).float()

    def trained(self):
        """The state that training changes; CLIP's own weights are not repeated in checkpoints."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("clip.")}


# ---- augmentation

def rand_augment(image):
    """RandAugment (Cubuk et al., 2020) as timm, which the authors use, has "rand-m9-mstd0.5-inc1":
    RGB PIL image -> RGB PIL image. Two changes are drawn, each is made with probability 1/2, of a
    magnitude from N(9, 0.5) out of 10. torchvision's always makes two, at 9 out of 30."""
    def shift(*matrix):  # output pixel (x, y) is input pixel (a x + b y + c, d x + e y + f)
        return image.transform(image.size, Image.Transform.AFFINE, matrix,
                               Image.Resampling.BILINEAR, fillcolor=EMPTY)

    changes = [  # amount, in [0, 1], and signed, the same or its negative, are drawn below
        lambda: ImageOps.autocontrast(image),
        lambda: ImageOps.equalize(image),
        lambda: ImageOps.invert(image),
        lambda: image.rotate(30 * signed, Image.Resampling.BILINEAR, fillcolor=EMPTY),
        lambda: ImageOps.posterize(image, max(1, 4 - int(4 * amount))),
        lambda: ImageOps.solarize(image, 256 - int(256 * amount)),
        lambda: image.point(lambda v: v + int(110 * amount) if v < 128 else v),
        lambda: ImageEnhance.Color(image).enhance(1 + 0.9 * signed),
        lambda: ImageEnhance.Contrast(image).enhance(1 + 0.9 * signed),
        lambda: ImageEnhance.Brightness(image).enhance(1 + 0.9 * signed),
        lambda: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * signed),
        lambda: shift(1, 0.3 * signed, 0, 0, 1, 0),
        lambda: shift(1, 0, 0, 0.3 * signed, 1, 0),
        lambda: shift(1, 0, 0.45 * signed * image.width, 0, 1, 0),
        lambda: shift(1, 0, 0, 0, 1, 0.45 * signed * image.height)]
    for _ in range(2):
        if torch.rand(()) >= 0.5:
            amount = (torch.normal(9.0, 0.5, (1,)).clamp(0, 10) / 10).item()
            signed = amount if torch.rand(()) < 0.5 else -amount
            image = changes[torch.randint(len(changes), ())]()
    return image


class Seeded:
    """The dataset repeated without end: [i] is image i % N, augmented with seed i, whatever process
    loads it. So the number of workers does not change a result."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, i):
        torch.manual_seed(i)
        return self.dataset[i % len(self.dataset)]


def transforms_of(preprocess, args):
    """CLIP's preprocess -> (of training images, of test images)."""
    size, bicubic = preprocess.transforms[0].size, transforms.InterpolationMode.BICUBIC
    if args.preprocess == "authors":  # ImageNet's
        preprocess = transforms.Compose([
            transforms.Resize(size * 256 // 224, bicubic), *preprocess.transforms[1:-1],
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    if args.augment == "no":
        return preprocess, preprocess
    training = [transforms.RandomResizedCrop(size, interpolation=bicubic),
                transforms.RandomHorizontalFlip(), rand_augment, *preprocess.transforms[-2:]]
    return transforms.Compose(training), preprocess


# ---- losses

def ranking_loss(scores, targets):
    """Pairwise ranking, margin 1 (section 3.3): scores float [B, C], targets int8 [B, C] -> scalar.

    Per image the sum over (present p, absent n) of max(0, 1 + s_n - s_p), divided by the number
    of pairs that violate the margin (+ 1e-8); the mean over images. Unknown labels (0) form no
    pairs. Targets may stay on the CPU, so that no GPU is waited for to count the present ones."""
    present = (targets == 1).nonzero().to(scores.device, non_blocking=True)  # [P, 2]
    is_absent = (targets == -1).to(scores.device, non_blocking=True)
    rows, columns = present.T
    absent = scores.masked_fill(~is_absent, -torch.inf)  # others fall below every margin
    margins = (1 - scores[rows, columns, None] + absent[rows]).relu()  # [P, C]
    sums = torch.stack([margins.sum(dim=1), (margins > 0).sum(dim=1)])
    total, violated = margins.new_zeros(2, len(scores)).index_add(1, rows, sums)
    return (total / (violated + 1e-8)).mean()


# ---- train

def learning_rate(epoch, peak, minimum, epochs, warmup_epochs):
    """Linear warm-up, then half a cosine down to the minimum; epoch may be a fraction."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))


def train(model, stage, epochs, dataset, validation, state, args):
    """One stage, from where state["log"] ends; a checkpoint an epoch. Every epoch seeds its
    own shuffling and augmentation, so a resumed run repeats the epoch it was killed in exactly."""
    log = state["log"]
    done = sum(line["stage"] == stage for line in log)
    if done < epochs and log and log[-1]["stage"] > stage:
        raise UserError("--resume: stage 2 has begun, so stage 1 cannot go on: start another run")
    if stage == 1:  # by layer, from the projection down
        layers = [[*model.ln_post.parameters(), model.proj], model.blocks[1].parameters(),
                  model.blocks[0].parameters()]
        batch_size, minimum, warmup = args.batch_size, 1e-6, args.warmup_epochs
    else:
        layers = [[model.context]]
        batch_size, minimum, warmup = args.prompt_batch_size, 1e-8, 0
    model.requires_grad_(False)
    # rates decay with every layer; norms and biases, one-dimensional, have no weight decay
    groups = [{"params": [parameter.requires_grad_()], "scale": 0.65 ** depth,
               "weight_decay": 0.05 if parameter.ndim > 1 else 0.0}
              for depth, parameters in enumerate(layers) for parameter in parameters]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    if done and log[-1]["stage"] == stage:
        optimizer.load_state_dict(state["optimizer"])
    prompts = model.prompts([dataset.labels[i] for i in dataset.seen])
    if stage == 1:
        embeddings = model.label_embeddings(prompts)  # constant: the prompt is not trained
    parts = []  # this process's indices of every batch; the loader rereads it each epoch
    loader = DataLoader(Seeded(dataset), batch_sampler=parts, num_workers=args.workers,
                        pin_memory="cuda" in args.device, persistent_workers=args.workers > 0)

    for epoch in range(done, epochs):
        seed = 1_000_003 * args.seed + 1_000 * stage + epoch
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        order += (seed % 2 ** 31) * len(dataset)  # Seeded: the same images, other augmentations
        batches = [batch.tolist() for batch in order.split(batch_size)]
        # where it gets none of a small batch it takes the first image, which then counts 0
        parts[:] = [batch[RANK::WORLD] or batch[:1] for batch in batches]
        begin, total = time.time(), 0
        bar = tqdm(loader, f"stage {stage} epoch {epoch + 1}", leave=False,
                   disable=args.quiet or None)
        for step, ((images, targets), batch) in enumerate(zip(bar, batches)):
            lr = learning_rate(epoch + step / len(loader), args.lr, minimum, epochs, warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            with autocast(args):
                tokens = model.trunk(images.to(args.device, non_blocking=True))
                global_, local = model.student(tokens)
                if stage == 2:
                    embeddings = model.label_embeddings(prompts)
                elif args.distillation:
                    teacher = model.teacher(tokens)
            scores = two_stream_scores(local, global_, embeddings, args.topk, args.streams)
            terms = {"ranking": ranking_loss(scores, targets[:, dataset.seen])}
            if stage == 1 and args.distillation:
                # at first global_ = teacher: the gradient, a sign, is rounding's (torchrun differs)
                terms["distillation"] = args.distillation * F.l1_loss(global_, teacher)
            # means over this process's images -> its part of the means over the whole batch
            share = len(batch[RANK::WORLD]) / len(batch)
            losses = share * torch.stack([sum(terms.values()), *terms.values()])
            optimizer.zero_grad()
            losses[0].backward()
            losses = losses.detach()
            if WORLD > 1:
                for tensor in (losses, *(group["params"][0].grad for group in groups)):
                    dist.all_reduce(tensor)
            optimizer.step()
            total = total + losses
            if step % 50 == 49 or step == len(loader) - 1:  # the only wait for the GPU
                means = dict(zip(["loss", *terms], (total / (step + 1)).tolist()))
                if not math.isfinite(means["loss"]):
                    raise UserError(f"stage {stage}, epoch {epoch + 1}, step {step + 1}: the loss "
                                    f"is not finite, {means}; finished epochs are in "
                                    f"{args.output}: try a smaller --lr or --precision fp32")
        line = {"stage": stage, "epoch": epoch + 1, **means, "seconds": time.time() - begin}
        if WORLD > 1:  # the images that any process found unreadable
            dist.all_reduce(dataset.unreadable.view(torch.uint8), dist.ReduceOp.MAX)
        if dataset.replaced:
            line["unreadable_images"] = dataset.replaced
        if validation is not None:
            scores = evaluate(model, model.label_embeddings(prompts), args.topk, validation, args)
            line["val_mAP"] = metrics.mean_average_precision(
                merge_streams(scores, args.streams), validation.targets[:, dataset.seen])
        log.append(line)
        if RANK > 0:
            continue
        print("  ".join(f"{name} {value:.4g}" for name, value in line.items()), flush=True)
        state.update(model=model.trained(), optimizer=optimizer.state_dict())
        best = max(x.get("val_mAP", 0) for x in log if x["stage"] == stage)
        if not line.get("val_mAP", 0) < best:  # without --val-fraction, or NaN: always
            data.write_file(f"{args.output}/best.pt", state)
        data.write_file(f"{args.output}/log.jsonl", "".join(json.dumps(x) + "\n" for x in log))
        data.write_file(f"{args.output}/curves.png", metrics.draw_curves(log))
        data.write_file(f"{args.output}/last.pt", state)  # at the end: the epoch is done
    if log and log[-1]["stage"] == stage:  # go on from the best epoch
        if WORLD > 1:
            dist.barrier()  # until it is written
        best = data.read_checkpoint(f"{args.output}/best.pt", "mkt")
        model.load_state_dict(best["model"], strict=False)


# ---- evaluate

@torch.no_grad()
def evaluate(encode, label_embeddings, topk, dataset, args):
    """All images' stream_scores of labels [C, D]: [2, N, C]. encode: images -> (global, local)."""
    scores = torch.zeros(2, len(dataset), len(label_embeddings))  # each part below is a view
    loader = DataLoader(Subset(dataset, range(RANK, len(dataset), WORLD)), args.batch_size,
                        num_workers=args.workers, pin_memory="cuda" in args.device)
    bar = tqdm(loader, "scoring", leave=False, disable=args.quiet or None)
    for (images, _), part in zip(bar, scores[:, RANK::WORLD].split(args.batch_size, dim=1)):
        with autocast(args):
            global_, local = encode(images.to(args.device, non_blocking=True))
        part.copy_(stream_scores(local, global_, label_embeddings, topk))
    if WORLD > 1:
        dist.all_reduce(scores)  # a sum: 0 where another process has the score
    return scores


@torch.no_grad()
def table(model, test, clip_preprocess, args):
    """-> the rows that a run ends with: {"name", "kind", metric: value in [0, 1], ...}."""
    ks = (10, 20) if test.name == "openimages" else (3, 5)

    def cosines(images):
        return [F.normalize(x.float(), dim=-1) for x in model.clip.encode_image_dense(images)]

    tokens = model.clip.tokenize([f"a photo of a {label}." for label in test.labels])
    texts = [model.clip.encode_text(part.to(args.device)) for part in tokens.split(256)]
    original = copy.copy(test)
    original.transform = clip_preprocess  # zero-shot CLIP sees its own pixels, whatever MKT does
    texts = F.normalize(torch.cat(texts), dim=-1)
    local_scores, global_scores = evaluate(cosines, texts, 1, original, args)  # of the best patch
    rows = metrics.zero_shot_rows(global_scores, local_scores, test, ks)

    contexts, clips_own = {}, model.clip.token_embedding.weight[model.context_ids]
    if args.epochs and not torch.equal(model.context, clips_own):  # what stage 2 has trained
        contexts["MKT without prompt tuning"] = clips_own
    contexts["MKT"] = model.context
    prompts = model.prompts(test.labels)
    embeddings = [model.label_embeddings(prompts, context) for context in contexts.values()]
    scores = evaluate(model, torch.cat(embeddings), args.topk, test, args)
    scores = scores.chunk(len(contexts), dim=2)
    for name, streams in zip(contexts, scores):
        kind = "method" if name == "MKT" else "ablation"
        rows.append(metrics.table_row(name, kind, streams, test, ks,
                                      lambda x: merge_streams(x, args.streams)))
    return rows


# ---- predict

@torch.no_grad()
def predict(model, preprocess, labels, args):
    """--predict: a JSON object per image, {"path", "labels": [{"label", "score"}, ...]}."""
    if len(set(labels)) < max(2, len(labels)) or "" in labels:
        raise UserError("--labels: give at least two, each once: a score is relative to the others")
    embeddings = model.label_embeddings(model.prompts(labels))
    for path, photo in data.open_images(args.predict):
        with autocast(args):
            global_, local = model(preprocess(photo)[None].to(args.device))
        scores = two_stream_scores(local, global_, embeddings, args.topk, args.streams)[0].tolist()
        best = sorted(range(len(labels)), key=lambda i: -scores[i])[:args.top]
        predicted = [{"label": labels[i], "score": round(scores[i], 4)} for i in best
                     if args.threshold is None or scores[i] >= args.threshold]
        print(json.dumps({"path": str(path), "labels": predicted}), flush=True)
        if args.heatmap:
            maps = embeddings @ local[0].T  # [C, L]
            # less the patch's mean over all labels: background scores alike for every one
            maps = (maps - maps.mean(dim=0)).relu().cpu()
            maps = maps.unflatten(1, (math.isqrt(maps.shape[1]), -1))  # [C, h, w]
            shown = [(*line.values(), maps[i]) for i, line in zip(best, predicted[:3])]
            name = str(path).strip("./").replace(os.sep, "_")
            data.write_file(f"{args.heatmap}/{name}.png", metrics.draw_heatmaps(photo, shown))


# ---- arguments

def arguments(argv=None):
    """-> what was asked for, and the state of the checkpoint to start from or None."""
    parser = argparse.ArgumentParser(
        usage="mkt.py [options]", description=__doc__.split("\n\nB images")[0],
        epilog=f"Defaults are the paper's; --data toy has {TOY}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("--clip", default="ViT-B/16", help="a ViT: CLIP's name for it or a path to weights")
    add("--topk", type=int, default=16, help="patches that the local score averages (16)")
    add("--streams", default="both", choices=["both", "global", "local"], help="those that count")
    add("--preprocess", default="clip", choices=["clip", "authors"], help="whose mean, std, crop")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=20, help="of stage 1 (20)")
    add("--prompt-epochs", type=int, default=4, help="of stage 2, prompt tuning (4)")
    add("--batch-size", type=int, default=64, help="images, in stage 1 (64)")
    add("--prompt-batch-size", type=int, default=512, help="images, in stage 2 (512)")
    add("--lr", type=float, default=1e-3, help="peak learning rate (1e-3)")
    add("--warmup-epochs", type=float, default=2, help="of stage 1 (2)")
    add("--distillation", type=float, default=1.0, help="its weight; 0 leaves it out (1)")
    add("--augment", default="yes", choices=["yes", "no"], help="crop, flip and RandAugment")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="toy", choices=list(data.DATASETS), help="folder: images of your own")
    add("--root", metavar="DIR", help="its folder, laid out as DATASETS.md shows")
    add("--val-fraction", type=float, default=0.0, help="share held out, to select the epoch")
    add("--limit", type=int, help="only so many images of each split: a quick look")
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
    add("--output", metavar="DIR", help="the run's folder (runs/mkt-DATA)")
    add("--resume", action="store_true", help="go on in --output; options typed now win")
    add("--quiet", action="store_true", help="no progress bars")
    add = parser.add_argument_group("a trained model").add_argument
    add("--eval", nargs="+", metavar="FILE", help="evaluate it, or releases: STAGE1.pth STAGE2.pth")
    add("--predict", nargs="+", metavar="IMAGE", help="images, folders or quoted patterns")
    add("--checkpoint", nargs="+", metavar="FILE", help="the trained model for --predict")
    add("--labels", help='for --predict, any labels: "owl, ice cream"')
    add("--top", type=int, default=5, help="labels to predict, the best ones (5)")
    add("--threshold", type=float, help="the least score of a label to predict")
    add("--heatmap", metavar="DIR", help="a picture per image of where its best labels were seen")

    args = parser.parse_args(argv)
    if bool(args.predict) != bool(args.checkpoint):
        parser.error("--predict and --checkpoint FILE go together")
    output = args.output or f"runs/mkt-{args.data}"  # of a training run
    start = (args.checkpoint or args.eval or [args.resume and f"{output}/last.pt"])[0]
    saved = None
    if start and not start.endswith(".pth"):  # its run's options; what is typed wins
        saved = data.read_checkpoint(start, "mkt")
        saved["args"] |= {"output": args.output, "device": args.device, "resume": args.resume}
        args = parser.parse_args(argv, argparse.Namespace(**saved["args"]))
    elif args.data == "toy" and not start:
        args = parser.parse_args(argv, parser.parse_args(TOY.split()))
    if not (args.predict or args.eval):
        args.output = output
    if min(args.batch_size, args.prompt_batch_size, args.top) < 1:
        parser.error("--batch-size, --prompt-batch-size, --top: at least 1")
    if args.epochs + args.prompt_epochs == 0:
        parser.error("--epochs 0 and --prompt-epochs 0 leave nothing to train")
    if min(args.epochs, args.prompt_epochs, args.lr, args.distillation, args.seed) < 0:
        parser.error("--epochs, --prompt-epochs, --lr, --distillation, --seed: not below 0")
    if not 0 <= args.val_fraction < 1:
        parser.error("--val-fraction must be at least 0 and below 1")
    return args, saved


# ---- main

def load_release(model, paths):
    """The authors' weights into the model: stage 1 is their image encoder, of which all but what
    MKT trains must be CLIP's; stage 2 their text encoder, of which eight token embeddings count."""
    image, *text = [{str(key).removeprefix("module."): value for key, value in
                     data.read_checkpoint(path).items()} for path in paths]
    image = {key.replace("projection_dist", "proj"): value for key, value in image.items()
             if not key.startswith("projection.")}  # which their forward pass never uses
    clip = copy.deepcopy(model.clip)
    try:
        clip.visual.load_state_dict(image)
        if text:
            clip.token_embedding.load_state_dict({"weight": text[0]["token_embedding.weight"]})
    except (RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{', '.join(paths)}: not the authors' for --clip: {reason}") from None
    released = MKT(clip, topk=1)
    size = clip.visual.input_resolution
    photo = torch.rand(1, 3, size, size, device=model.proj.device)
    if not torch.allclose(released.trunk(photo), model.trunk(photo), rtol=0.01, atol=0.01):
        raise UserError(f"{paths[0]}: the frozen blocks are not those of --clip: another CLIP?")
    model.load_state_dict(released.trained(), strict=False)


def autocast(args):
    """What is computed in --precision."""
    device = torch.device(args.device).type
    return torch.autocast(device, torch.bfloat16, enabled=args.precision == "bf16")


def main(argv=None):
    begin = time.time()
    args, saved = arguments(argv)
    if not args.predict:  # data first: files may be missing
        options = {name: getattr(args, name) for name in data.OPTIONS}
        test = data.load_dataset(args.data, args.root, "test", **options)
    if not (args.predict or args.eval):
        dataset = data.load_dataset(args.data, args.root, "train", **options)
        has_seen = torch.cat([(dataset.full_targets[rows][:, dataset.seen] == 1).any(dim=1)
                              for rows in dataset.rows.split(4096)])
        if len(dataset.seen) < 2 or not has_seen.any():
            raise UserError(f"{args.data}: ranking needs two seen labels and images that show one")
        dataset = dataset.subset(has_seen)
        if os.path.exists(f"{args.output}/last.pt") and not args.resume:
            raise UserError(f"{args.output} holds a run: --resume it or name another --output")

    if WORLD > 1:  # torchrun has started us: rank 0 alone prints and writes
        dist.init_process_group("cpu:gloo,cuda:nccl" if "cuda" in args.device else "gloo")
        if "cuda" in args.device:
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        if RANK > 0:
            sys.stdout, args.quiet = open(os.devnull, "w"), True
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU: faster, 10 bits of mantissa

    # model
    clip, clip_preprocess = clip_model.load(args.clip, args.device)
    model = MKT(clip, args.topk).to(args.device).eval()
    state = {"method": "mkt", "args": vars(args), "clip_fingerprint": clip.fingerprint(),
             "labels": None if args.predict else test.labels, "log": []}
    if saved:
        if saved["clip_fingerprint"] != state["clip_fingerprint"]:
            raise UserError(f"the checkpoint belongs to another CLIP than --clip {args.clip}")
        if saved["labels"] != state["labels"] and not args.predict:
            raise UserError(f"the checkpoint was trained for other labels than {args.data} has")
        model.load_state_dict(saved["model"], strict=False)
        state = {**saved, "args": vars(args)}
    elif released := args.checkpoint or args.eval:
        load_release(model, released)
    if args.compile:
        model.trunk, model.student = torch.compile(model.trunk), torch.compile(model.student)
    train_preprocess, preprocess = transforms_of(clip_preprocess, args)
    if args.predict:
        labels = args.labels.split(",") if args.labels else state["labels"] or []
        return predict(model, preprocess, [label.strip() for label in labels], args)

    # train
    test.transform = preprocess
    if not args.eval:
        print(f"{args.data}: {len(dataset):,} training images, {len(dataset.seen)} seen labels; "
              f"{len(test):,} test images, {len(test.unseen)} unseen labels", flush=True)
        dataset.transform = train_preprocess
        dataset, validation = dataset.hold_out(args.val_fraction, preprocess)
        if RANK == 0:
            data.write_file(f"{args.output}/args.json", json.dumps(vars(args), indent=1))
        train(model, 1, args.epochs, dataset, validation, state, args)
        train(model, 2, args.prompt_epochs, dataset, validation, state, args)

    # evaluate
    rows = table(model, test, clip_preprocess, args)
    metrics.print_table(rows)
    if test.missing:
        print(f"{test.missing} test images are missing: not comparable with complete results")
    if args.output and RANK == 0:
        results = {"method": "mkt", "data": args.data, "clip": args.clip, "seed": args.seed,
                   "seconds": round(time.time() - begin), "rows": rows}
        data.write_file(f"{args.output}/results.json", json.dumps(results, indent=1))
        print(f"{results['seconds']} s; results and checkpoints: {args.output}")
    return rows


if __name__ == "__main__":
    try:
        main()
    except (UserError, clip_model.ClipError) as error:
        print(f"mkt.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; a training run goes on with --resume")
