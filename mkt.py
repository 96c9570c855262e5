"""MKT: open-vocabulary multi-label classification by multi-modal knowledge transfer.

He et al., "Open-Vocabulary Multi-Label Classification via Multi-Modal Knowledge Transfer",
AAAI 2023 (arXiv 2207.01887). Some labels are annotated in training (seen), others are only
names at test time (unseen). CLIP knows all of them, but matches a text with a whole image:

 1. two streams: an image scores a label by its class token and by its best patches,
        a_c = mean of the top-k over patches i of <o_i, z_c>,   g_c = <o_cls, z_c>,
        s   = (a / |a| + g / |g|) / 2,  norms over the labels that compete: the seen in training,
    the unseen (ZSL) or all (GZSL) in the test;
 2. ranking: every present label p above every absent one n, max(0, 1 + s_n - s_p) averaged over
    the pairs that violate the margin;
 3. distillation: the mean of |o_cls - CLIP's own embedding of the image| keeps the image encoder
    in the space of CLIP's text, where unseen labels live;
 4. prompt tuning, with the image encoder frozen: the words around the label in "There is a
    {label} in the scene", the start and the end of text become learned embeddings, shared by
    all labels, unseen ones too.

In the code o_cls is global_, o_i a row of local, z_c of label_embeddings; none is of unit length.

    python mkt.py                                              # toy world, nothing to download
    python mkt.py --data nuswide                               # the paper's first table
    torchrun --nproc-per-node 8 mkt.py --data nuswide          # on eight GPUs
    python mkt.py --predict photos/ --labels "owl, ice cream"  # CLIP as it is; MKT: --checkpoint

B images, L patches, C labels, T tokens, W width of a tower, D joint embedding. Targets: +1 present,
-1 absent, 0 unknown. Under torchrun every process takes its part of each batch: the same sums but
for rounding.

What we follow, formulas included, is the authors' released code. Where this differs from it
 1. CLIP's own mean, std and crop, on which it was trained; --preprocess authors for ImageNet's.
    Photos are turned as EXIF says.
 2. They train the whole token embedding; we only the eight rows of the context.
 3. They drop images without a seen label inside each batch, and an epoch's last, smaller batch;
    we drop these images first, so batches are full and fewer than NUS-WIDE's 2,527.
 4. Their teacher and their stage 2 run in half precision, and stage 2 repeats one order of images.
 5. We report the last epoch, or with --val-fraction each stage's best on held-out images.
 6. Seed 0, theirs is 42; AP of a label without a positive is left out, theirs is 0.
"""
import argparse
import copy
import json
import math
import os
import sys
import time
from collections import namedtuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from tqdm import tqdm

import clip_model
import data
import metrics
from data import UserError

NAME = "MKT"  # of the rows in the table
# settings; the defaults of the command line, in arguments(), are the authors' code's too
PROMPT = "There is a {} in the scene"  # authors' code
MARGIN = 1.0  # of the ranking loss; authors' code
TINY = 1e-8  # added to the number of pairs that violate it; authors' code
LAYER_DECAY = 0.65  # of the learning rate, a layer down; authors' code
WEIGHT_DECAY = 0.05  # authors' code
MINIMUM_LR_1, MINIMUM_LR_2 = 1e-6, 1e-8  # at the ends of the stages; authors' code
CHANGES, MAGNITUDE, DEVIATION = 2, 9.0, 0.5  # of RandAugment; authors' code
EMPTY = (124, 116, 104)  # colour of empty corners, ImageNet's mean; authors' code
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and std; authors' code
# what the toy world's small CLIP and 10,000 scenes ask for; ours
TOY = ("--clip toy-ViT --epochs 4 --prompt-epochs 1 --warmup-epochs 1 --distillation 0.1 --topk 4 "
       "--augment no --workers 0")

# set by torchrun; 0 for what is no number, which start_processes refuses
RANK, WORLD = (int(text) if text.isdigit() else 0
               for text in (os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")))


# ---- model

def two_stream_scores(local, global_, label_embeddings, topk, streams="both"):
    """MKT's score of every label, the mean of two unit-length score vectors (section 3.2).

    local [B, L, D], global_ [B, D], label_embeddings [C, D], topk in 1..L -> float [B, C] within
    [-1, 1], relative to the other labels in play. streams: "global" or "local" for one alone."""
    patches = label_embeddings @ local.transpose(1, 2)  # [B, C, L]
    local_scores = F.normalize(patches.topk(topk, dim=-1).values.mean(dim=-1), dim=-1)
    global_scores = F.normalize(global_ @ label_embeddings.T, dim=-1)
    if streams == "local":
        return local_scores
    if streams == "global":
        return global_scores
    return (local_scores + global_scores) / 2


class MKT(nn.Module):
    """What is trained (authors' code): the last two blocks, ln_post, the projection, the prompt's
    context. All else is CLIP's own, whose last blocks are the teacher. Embeddings are float32 in
    any precision."""

    def __init__(self, clip, topk):
        super().__init__()
        visual = clip.visual
        if not isinstance(visual, clip_model.VisionTransformer):
            raise UserError(f"{NAME} trains a ViT's blocks, and this CLIP is a ResNet: use --clip "
                            "ViT-B/16")
        patches = (visual.input_resolution // visual.patch_size) ** 2
        if not 1 <= topk <= patches:
            raise UserError(f"--topk {topk} is not within 1..{patches}, the number of patches")
        # no part of the module's state: frozen, and not repeated in checkpoints
        object.__setattr__(self, "clip", clip.requires_grad_(False))
        self.blocks = nn.Sequential(*copy.deepcopy(visual.transformer.resblocks[-2:]))
        self.ln_post = copy.deepcopy(visual.ln_post)
        self.proj = nn.Parameter(visual.proj.clone())
        # the prompt without a label; end of text has the highest id
        whole, before = clip.tokenize([PROMPT.format(""), PROMPT.partition("{}")[0]])
        self.before = before.argmax().item()  # tokens in front of the label, start of text too: 4
        self.context_ids = whole[:whole.argmax() + 1]
        self.context = nn.Parameter(clip.token_embedding.weight[self.context_ids])  # [8, W]

    @torch.no_grad()
    def trunk(self, images):
        """Images [B, 3, h, w] -> tokens [B, 1 + L, W] below the first trained block."""
        x = self.clip.visual.embed(images.to(self.clip.dtype))
        return self.clip.visual.transformer.resblocks[:-2](x)

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
        """Images [B, 3, h, w] -> (global [B, D], local [B, L, D])."""
        return self.student(self.trunk(images))

    def prompts(self, labels):
        """Names -> token ids int64 [C, T] on the device, and their ends of text [C] on the CPU,
        so that no GPU is waited for."""
        tokens = self.clip.tokenize([PROMPT.format(label) for label in labels])
        ends = tokens.argmax(dim=1)
        return tokens[:, :ends.max() + 1].to(self.context.device), ends

    def label_embeddings(self, prompts, context=None):
        """As self.prompts(labels) gives them -> [C, D], differentiable in the context, by default
        the learned one."""
        context = self.context if context is None else context
        after = len(context) - self.before

        def encode(tokens, ends):
            x = self.clip.token_embedding(tokens)  # [c, T, W]
            # [c, 4]: where the prompt goes on behind the label, up to the end of text
            last = ends[:, None] + torch.arange(1 - after, 1)
            rows = torch.arange(len(x), device=x.device)[:, None]
            x[:, :self.before] = context[:self.before]
            x[rows, last.to(x.device, non_blocking=True)] = context[self.before:]
            return self.clip.encode_prompts(x, ends).float()  # [c, D]

        return clip_model.in_chunks(encode, prompts)


# ---- augmentation: RandAugment (Cubuk et al., 2020) as timm, which the authors use, has
# "rand-m9-mstd0.5-inc1". torchvision's is another policy: it always makes two changes, at 9 of 30.

BICUBIC = Image.Resampling.BICUBIC


def affine(image, *matrix):
    """Output pixel (x, y) is input pixel (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, BICUBIC, fillcolor=EMPTY)


# changes of (image, amount), amount in [-1, 1]; what knows no direction takes its absolute value
AUGMENTATIONS = {
    "auto-contrast": lambda image, amount: ImageOps.autocontrast(image),
    "equalize": lambda image, amount: ImageOps.equalize(image),
    "invert": lambda image, amount: ImageOps.invert(image),
    "posterize": lambda image, amount: ImageOps.posterize(
        image, max(1, 4 - int(4 * abs(amount)))),
    "solarize": lambda image, amount: ImageOps.solarize(image, 256 - int(256 * abs(amount))),
    "solarize-add": lambda image, amount: image.point(
        lambda value: value + int(110 * abs(amount)) if value < 128 else value),
    "rotate": lambda image, amount: image.rotate(30 * amount, BICUBIC, fillcolor=EMPTY),
    "color": lambda image, amount: ImageEnhance.Color(image).enhance(1 + 0.9 * amount),
    "contrast": lambda image, amount: ImageEnhance.Contrast(image).enhance(1 + 0.9 * amount),
    "brightness": lambda image, amount: ImageEnhance.Brightness(image).enhance(1 + 0.9 * amount),
    "sharpness": lambda image, amount: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * amount),
    "shear x": lambda image, amount: affine(image, 1, 0.3 * amount, 0, 0, 1, 0),
    "shear y": lambda image, amount: affine(image, 1, 0, 0, 0.3 * amount, 1, 0),
    "translate x": lambda image, amount: affine(image, 1, 0, 0.45 * amount * image.width, 0, 1, 0),
    "translate y": lambda image, amount: affine(image, 1, 0, 0, 0, 1, 0.45 * amount * image.height)}


def rand_augment(image):
    """RGB PIL image -> RGB PIL image: CHANGES are drawn, each is made with probability 1/2."""
    for _ in range(CHANGES):
        if torch.rand(()) < 0.5:
            change = [*AUGMENTATIONS.values()][torch.randint(len(AUGMENTATIONS), ())]
            amount = torch.normal(MAGNITUDE, DEVIATION, (1,)).clamp(0, 10).item() / 10
            image = change(image, amount if torch.rand(()) < 0.5 else -amount)
    return image


def test_pixels(size, preprocess):
    """-> a transform of an RGB PIL image to its central square, uint8 [3, size, size]: a quarter of
    the memory of floats, which `normalized` makes of it on the device."""
    shorter = size * 256 // 224 if preprocess == "authors" else size
    return transforms.Compose([transforms.Resize(shorter, BICUBIC), transforms.CenterCrop(size),
                               transforms.PILToTensor()])


def training_pixels(size, args):
    """-> the same for training: a random crop, flipped and changed, but with --augment no."""
    if args.augment == "no":
        return test_pixels(size, args.preprocess)
    return transforms.Compose([transforms.RandomResizedCrop(size, interpolation=BICUBIC),
                               transforms.RandomHorizontalFlip(), rand_augment,
                               transforms.PILToTensor()])


def normalized(pixels, preprocess):
    """Pixels uint8 [B, 3, h, w] -> float32, less the mean and over the std that --preprocess
    names."""
    mean_std = IMAGENET if preprocess == "authors" else (clip_model.MEAN, clip_model.STD)
    mean, std = torch.tensor(mean_std).to(pixels.device, non_blocking=True)[..., None, None]
    return (pixels / 255 - mean) / std


class Seeded:
    """A dataset whose image i is augmented with seeds[i], whichever process loads it: the number
    of workers does not change a result. Targets are those of the seen labels."""

    def __init__(self, dataset, seeds):
        self.dataset, self.seeds = dataset, seeds

    def __getitem__(self, i):
        torch.manual_seed(self.seeds[i].item())
        image, targets = self.dataset[i]
        return image, targets[self.dataset.seen]


# ---- losses

def ranking_loss(scores, targets):
    """Pairwise ranking (section 3.3): scores float [B, C], targets int8 [B, C] -> scalar.

    Per image the sum over (present p, absent n) of max(0, 1 + s_n - s_p), divided by the number
    of pairs that violate the margin; the mean over images. Unknown labels (0) form no
    pairs. Targets may stay on the CPU, so that no GPU is waited for to count the present ones."""
    present = (targets == 1).nonzero().to(scores.device, non_blocking=True)  # [P, 2]
    is_absent = (targets == -1).to(scores.device, non_blocking=True)
    rows, columns = present.T
    absent = scores.masked_fill(~is_absent, -torch.inf)  # others fall below every margin
    margins = (MARGIN - scores[rows, columns, None] + absent[rows]).relu()  # [P, C]
    total = scores.new_zeros(len(scores)).index_add(0, rows, margins.sum(dim=1))
    violated = scores.new_zeros(len(scores)).index_add(
        0, rows, (margins > 0).sum(dim=1).to(scores.dtype))
    return (total / (violated + TINY)).mean()


def losses_of_stage_1(model, images, targets, label_embeddings, args):
    """Knowledge transfer (section 3.3): ranking of the seen labels, whose embeddings are constant,
    and distillation. images [B, 3, h, w], targets int8 [B, C] -> {term: weighted scalar}."""
    with data.autocast(args):
        tokens = model.trunk(images)
        global_, local = model.student(tokens)
        teacher = model.teacher(tokens) if args.distillation else None
    scores = two_stream_scores(local, global_, label_embeddings, args.topk, args.streams)
    terms = {"ranking": ranking_loss(scores, targets)}
    if args.distillation:
        terms["distillation"] = args.distillation * F.l1_loss(global_, teacher)
    return terms


def losses_of_stage_2(model, images, targets, prompts, args):
    """Prompt tuning (section 3.4): the same ranking, by which the context alone is trained."""
    with data.autocast(args):
        with torch.no_grad():
            global_, local = model(images)
        label_embeddings = model.label_embeddings(prompts)
    scores = two_stream_scores(local, global_, label_embeddings, args.topk, args.streams)
    return {"ranking": ranking_loss(scores, targets)}


# ---- train

# What sets the two stages apart. losses: a function as above; labels: its fourth argument, in stage
# 1 the labels' embeddings, in stage 2 their prompts; layers: lists of parameters, topmost first.
Stage = namedtuple("Stage", "number losses labels layers epochs batch_size warmup minimum_lr")


def make_stages(model, dataset, args):
    """-> knowledge transfer and prompt tuning, on the dataset's seen labels."""
    prompts = model.prompts([dataset.labels[i] for i in dataset.seen])
    with torch.no_grad():
        constant = model.label_embeddings(prompts)
    layers = [[*model.ln_post.parameters(), model.proj], [*model.blocks[1].parameters()],
              [*model.blocks[0].parameters()]]
    return (Stage(1, losses_of_stage_1, constant, layers, args.epochs, args.batch_size,
                  args.warmup_epochs, MINIMUM_LR_1),
            Stage(2, losses_of_stage_2, prompts, [[model.context]], args.prompt_epochs,
                  args.prompt_batch_size, 0, MINIMUM_LR_2))


def learning_rate(epoch, peak, minimum, epochs, warmup_epochs):
    """Linear warm-up, then half a cosine down to the minimum; epoch may be a fraction."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(layers, lr):
    """AdamW whose rates decay with every layer; norms and biases, one-dimensional, have no weight
    decay: two groups a layer."""
    groups = []
    for depth, layer in enumerate(layers):
        scale = LAYER_DECAY ** depth
        matrices = [parameter for parameter in layer if parameter.ndim > 1]
        vectors = [parameter for parameter in layer if parameter.ndim <= 1]
        groups.append({"params": matrices, "scale": scale, "weight_decay": WEIGHT_DECAY})
        groups.append({"params": vectors, "scale": scale, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def add_up(tensors):
    """Sum each tensor over torchrun's processes, in place and in one message."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(total.view_as(tensor))


def train(model, stage, dataset, validation, state, args):
    """One stage, from where state["log"] ends; a checkpoint an epoch. Every epoch seeds its
    own shuffling and augmentation, so a resumed run repeats the epoch it was killed in exactly."""
    log = state["log"]  # of all epochs so far, those before --resume too
    done = sum(line["stage"] == stage.number for line in log)
    if done < stage.epochs and log and log[-1]["stage"] > stage.number:  # --epochs was raised
        raise UserError("--resume: stage 2 has begun, so stage 1 cannot go on: start another run")
    model.requires_grad_(False)
    parameters = [parameter.requires_grad_() for layer in stage.layers for parameter in layer]
    optimizer = make_optimizer(stage.layers, args.lr)
    if done and log[-1]["stage"] == stage.number:
        optimizer.load_state_dict(state["optimizer"])

    for epoch in range(done, stage.epochs):
        seed = 1_000_003 * args.seed + 1_000 * stage.number + epoch  # another one every epoch
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(dataset), generator=generator)
        seeds = torch.randint(2 ** 31, (len(dataset),), generator=generator)
        batches = [batch.tolist() for batch in order.split(stage.batch_size)]
        # where a process gets none of a small batch it takes the first image, whose share is 0
        mine = [batch[RANK::WORLD] or batch[:1] for batch in batches]
        loader = DataLoader(Seeded(dataset, seeds), batch_sampler=mine, num_workers=args.workers,
                            pin_memory="cuda" in args.device)
        begin, total = time.time(), 0
        bar = tqdm(loader, f"stage {stage.number} epoch {epoch + 1}", leave=False,
                   disable=args.quiet or None)
        for step, ((images, targets), batch) in enumerate(zip(bar, batches)):
            lr = learning_rate(epoch + step / len(loader), args.lr, stage.minimum_lr, stage.epochs,
                               stage.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            images = normalized(images.to(args.device, non_blocking=True), args.preprocess)
            # the targets stay on the CPU, see ranking_loss
            terms = stage.losses(model, images, targets, stage.labels, args)
            # means over this process's images -> its part of the means over the whole batch
            share = len(batch[RANK::WORLD]) / len(batch)
            losses = share * torch.stack([sum(terms.values()), *terms.values()])  # total and terms
            optimizer.zero_grad()
            losses[0].backward()
            losses = losses.detach()
            if WORLD > 1:
                add_up([losses, *(parameter.grad for parameter in parameters)])
            optimizer.step()
            total = total + losses
            if step % 50 == 49 or step == len(loader) - 1:  # the only wait for the GPU
                means = dict(zip(["loss", *terms], (total / (step + 1)).tolist()))
                if not math.isfinite(means["loss"]):
                    raise UserError(f"stage {stage.number}, epoch {epoch + 1}, step {step + 1}: "
                                    f"the loss is not finite, {means}; finished epochs are in "
                                    f"{args.output}: try a smaller --lr or --precision fp32")
        line = {"stage": stage.number, "epoch": epoch + 1, **means, "seconds": time.time() - begin}
        if WORLD > 1:  # the images that any process found unreadable
            dist.all_reduce(dataset.unreadable.view(torch.uint8), dist.ReduceOp.MAX)
        if dataset.replaced:
            line["unreadable_images"] = dataset.replaced
        val_mAP = math.nan if validation is None else validate(model, validation, args)
        if not math.isnan(val_mAP):
            line["val_mAP"] = val_mAP
        log.append(line)
        if RANK == 0:
            print("  ".join(f"{name} {value:.4g}" for name, value in line.items()), flush=True)
            save(model, optimizer, state, args.output)
    if log and log[-1]["stage"] == stage.number:  # go on from its best epoch
        if RANK == 0:
            model.load_state_dict(state["best"])
        if WORLD > 1:
            for weights in model.state_dict().values():
                dist.broadcast(weights, 0)


def save(model, optimizer, state, folder):
    """The run so far: best.pt, of the stage's best epoch; log.jsonl, curves.png, last.pt."""
    log, weights = state["log"], model.state_dict()
    earlier = [line for line in log[:-1] if line["stage"] == log[-1]["stage"]]
    # without a score, nothing is above NaN: the last is the best
    last_mAP = log[-1].get("val_mAP", math.nan)
    if not any(line.get("val_mAP", math.nan) > last_mAP for line in earlier):
        state["best"] = {name: value.clone() for name, value in weights.items()}
    data.write_file(f"{folder}/best.pt", {**state, "model": state["best"], "optimizer": None})
    data.write_file(f"{folder}/log.jsonl", "".join(json.dumps(line) + "\n" for line in log))
    data.write_file(f"{folder}/curves.png", metrics.draw_curves(log))
    state |= {"model": weights, "optimizer": optimizer.state_dict()}
    data.write_file(f"{folder}/last.pt", state)  # at the end, as --resume goes by it


# ---- evaluate

def mkt_scores(model, pixels, label_embeddings, args):
    """Pixels uint8 [B, 3, h, w], {key: label embeddings [C, D]} -> {key: scores [B, C]}."""
    with data.autocast(args):
        global_, local = model(normalized(pixels, args.preprocess))
    return {key: two_stream_scores(local, global_, z, args.topk, args.streams)
            for key, z in label_embeddings.items()}


def clip_embeddings(clip, images, args):
    """Images -> CLIP's own embeddings of the whole and the patches, unit length [B, 1 + L, D]."""
    with data.autocast(args):
        global_, local = clip.encode_image_dense(images)
    return F.normalize(torch.cat([global_[:, None], local], dim=1).float(), dim=-1)


@torch.no_grad()
def validate(model, validation, args):
    """mAP of the seen labels on held-out images; NaN except on rank 0, which chooses the epoch."""
    labels = [validation.labels[i] for i in validation.seen]
    z = {"seen": model.label_embeddings(model.prompts(labels))}
    scores = data.score_images(lambda pixels: mkt_scores(model, pixels, z, args), validation,
                               args.batch_size, args)
    if RANK > 0:
        return math.nan
    return metrics.mean_average_precision(scores["seen"], validation.targets[:, validation.seen])


@torch.no_grad()
def table(model, test, args):
    """-> the rows that a run ends with, {"name", "kind", metric: value in [0, 1], ...}, and the
    scores [N, C] of the last, MKT's; under torchrun None except on rank 0."""
    clip, playing = model.clip, metrics.in_play(test)
    ks = (10, 20) if test.name == "openimages" else (3, 5)  # as LESA, BiAM and MKT report
    plain, scale = clip_model.zero_shot_embeddings(clip, test.labels), clip.logit_scale.exp()
    original = copy.copy(test)
    # zero-shot CLIP sees its own pixels, whatever MKT does
    original.transform = test_pixels(clip.visual.input_resolution, "clip")

    def zero_shot(pixels):
        x = clip_embeddings(clip, normalized(pixels, "clip"), args)
        return metrics.zero_shot_scores(x, plain, scale, playing)

    scores = data.score_images(zero_shot, original, args.batch_size, args)
    rows = metrics.zero_shot_rows(scores, test, ks) if RANK == 0 else None

    contexts, clips_own = {}, clip.token_embedding.weight[model.context_ids]
    if args.epochs and not torch.equal(model.context, clips_own):  # both stages have trained
        contexts[f"{NAME} without prompt tuning"] = clips_own
    contexts[NAME] = model.context
    prompts = model.prompts(test.labels)
    z = {}
    for name, context in contexts.items():
        embeddings = model.label_embeddings(prompts, context)
        z |= {(name, prefix): embeddings[index] for prefix, index in playing.items()}
    scores = data.score_images(lambda pixels: mkt_scores(model, pixels, z, args), test,
                               args.batch_size, args)
    if RANK > 0:
        return None, None
    for name in contexts:
        kind = "method" if name == NAME else "ablation"
        rows.append(metrics.table_row(name, kind, scores, test, ks))
    return rows, scores[NAME, [*playing][-1]]


# ---- predict

@torch.no_grad()
def predict(saved, args):
    """--predict: a JSON line per image, by MKT or, without a checkpoint, by CLIP as it is."""
    labels = args.labels or saved and saved["labels"]
    if not labels or len(labels) < 2:
        raise UserError('--labels: at least two, scores are relative: "owl, ice cream" or a file')
    clip, _ = clip_model.load(args.clip, args.device)
    clip.check_labels(labels)
    pixels_of = test_pixels(clip.visual.input_resolution, args.preprocess)
    z, scale, crop = clip_model.zero_shot_embeddings(clip, labels), clip.logit_scale.exp(), 1.0
    if saved:
        model = MKT(clip, args.topk)
        data.load_weights(model, clip, saved, None, args)  # made for any labels
        z = model.label_embeddings(model.prompts(labels))
        crop = 224 / 256 if args.preprocess == "authors" else 1.0

    for paths, photos, pixels in data.photo_batches(args, pixels_of):
        images = normalized(pixels.to(args.device), args.preprocess)
        if saved:
            with data.autocast(args):
                global_, local = model(images)
            scores = two_stream_scores(local, global_, z, args.topk, args.streams)
            maps = local @ z.T  # [B, L, C]
            # less the patch's mean over all labels: background scores alike for every one
            maps = (maps - maps.mean(dim=2, keepdim=True)).relu()
            maps = maps / maps.amax(dim=(1, 2), keepdim=True)  # relative, as the scores are
        else:
            x = clip_embeddings(clip, images, args)
            scores = metrics.zero_shot_scores(x, z, scale, {"": slice(None)})  # all labels compete
            scores = scores["zero-shot, as probabilities", ""]
            maps = (scale * x[:, 1:] @ z.T).softmax(dim=2)
        for prediction in zip(paths, photos, scores.cpu(), maps.transpose(1, 2).cpu()):
            metrics.write_prediction(*prediction, labels, args, crop)


# ---- arguments

def arguments(argv=None):
    """-> what was asked for, and the state of the checkpoint to start from or None."""
    parser = argparse.ArgumentParser(
        usage="mkt.py [options]", description=__doc__.split("\n\nB images")[0],
        epilog=f"Defaults are the authors' released code's; --data toy has {TOY}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("--clip", default="ViT-B/16", help="a ViT: CLIP's name for it or a path to weights")
    add("--topk", type=int, default=16, help="patches that the local score averages (16)")
    add("--streams", default="both", choices=["both", "global", "local"], help="those that count")
    add("--preprocess", default="clip", choices=["clip", "authors"], help="whose mean, std, crop")
    add = parser.add_argument_group("training").add_argument
    whole, real = data.at_least(0), data.at_least(0, float)
    add("--epochs", type=whole, default=20, help="of stage 1 (20)")
    add("--prompt-epochs", type=whole, default=4, help="of stage 2, prompt tuning (4)")
    add("--batch-size", type=data.at_least(1), default=64, help="images, in stage 1 (64)")
    add("--prompt-batch-size", type=data.at_least(1), default=512, help="in stage 2 (512)")
    add("--lr", type=real, default=1e-3, help="peak learning rate (1e-3)")
    add("--warmup-epochs", type=real, default=2, help="of stage 1 (2)")
    add("--distillation", type=real, default=1.0, help="its weight; 0 leaves it out (1)")
    add("--augment", default="yes", choices=["yes", "no"], help="crop, flip and RandAugment")
    add("--val-fraction", type=real, default=0.0, help="share held out, to select the epoch")
    add("--compile", action="store_true", help="torch.compile the image encoder")
    add("--resume", action="store_true", help="go on in --output; options typed now win")
    # --data, --root, --limit, ..., --output, --device, --seed, ..., --eval, --predict, ...
    add = data.add_options(parser).add_argument
    add("--labels", help='for --predict, any labels: "owl, ice cream", or a file, a label a line')
    args, saved, typed = data.parse(parser, argv, "mkt", TOY,
                                    evaluated={"batch_size", "compile"})
    if args.predict and not saved and {"topk", "streams", "preprocess"} & typed:
        parser.error("--topk, --streams, --preprocess are MKT's: give its --checkpoint")
    if args.epochs + args.prompt_epochs == 0:
        parser.error("--epochs 0 and --prompt-epochs 0 leave nothing to train")
    if args.val_fraction >= 1:
        parser.error("--val-fraction must be below 1")
    return args, saved


# ---- main

def images_to_rank(dataset):
    """The training images that show a seen label; UserError where there is nothing to rank."""
    is_used = dataset.shows()  # unseen labels are unknown in training
    used = dataset.subset(is_used) if is_used.any() else dataset
    present, absent = (count[used.seen] for count in used.counts())
    if not ((present > 0) & (absent > 0)).any():
        raise UserError(f"{dataset.name}: nothing to rank: a seen label must be known present "
                        "in one training image and absent in another that has a present one")
    return used


def start_processes(args):
    """Under torchrun: rank 0 alone prints and writes."""
    if not {"RANK", "LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys() or WORLD < 1 or args.predict:
        raise UserError("RANK or WORLD_SIZE is set, but torchrun did not start this, or --predict "
                        "is asked for, which is for one process: unset them")
    dist.init_process_group("cpu:gloo,cuda:nccl" if "cuda" in args.device else "gloo")
    if "cuda" in args.device:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    if RANK > 0:
        sys.stdout, args.quiet = open(os.devnull, "w"), True


def main(argv=None):
    begin = time.time()
    args, saved = arguments(argv)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU: faster, 10 bits of mantissa
    if WORLD != 1 or RANK > 0:
        start_processes(args)
    if args.predict:
        return predict(saved, args)
    if RANK > 0:
        dist.barrier()  # until rank 0 has downloaded and cached what all read

    # data first: files may be missing
    dataset, test = data.load_splits(args, with_training=not args.eval)
    if dataset:
        dataset = images_to_rank(dataset)
    clip, _ = clip_model.load(args.clip, args.device)
    clip.check_labels(test.labels)  # the vocabulary may have to be downloaded
    if WORLD > 1 and RANK == 0:
        dist.barrier()
    model = MKT(clip, args.topk)
    if saved:
        data.load_weights(model, clip, saved, test.labels, args)
    if args.compile:
        model.trunk, model.student = torch.compile(model.trunk), torch.compile(model.student)
    size = clip.visual.input_resolution
    test.transform = test_pixels(size, args.preprocess)

    if not args.eval:
        state = {**(saved or {"log": []}), "method": "mkt", "args": vars(args),
                 "clip_fingerprint": clip.fingerprint(), "labels": test.labels}
        dataset.transform = training_pixels(size, args)
        dataset, validation = dataset.hold_out(args.val_fraction, test.transform)
        if RANK == 0:
            data.write_file(f"{args.output}/args.json", json.dumps(vars(args), indent=1))
        with data.way_back(args.output):
            for stage in make_stages(model, dataset, args):
                train(model, stage, dataset, validation, state, args)

    rows, scores = table(model, test, args)
    if RANK == 0:
        metrics.print_table(rows, test)
    if RANK == 0 and args.output:
        results = metrics.results("mkt", rows, scores, test, args, time.time() - begin)
        data.write_file(f"{args.output}/results.json", results)
        print(f"{time.time() - begin:.0f} s; results and checkpoints: {args.output}")
    if WORLD > 1:
        dist.destroy_process_group()
    return rows


if __name__ == "__main__":
    data.run(main, clip_model.ClipError)
