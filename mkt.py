"""MKT: open-vocabulary multi-label classification by multi-modal knowledge transfer.

He et al., "Open-Vocabulary Multi-Label Classification via Multi-Modal Knowledge Transfer",
AAAI 2023 (arXiv 2207.01887). Some labels are annotated in training (seen), others are only
names at test time (unseen). CLIP knows all of them, but matches a text with a whole image:

 1. two streams: an image scores a label by its class token and by its best patches,
        a_c = mean of the top-k over patches i of <o_i, z_c>,   g_c = <o_cls, z_c>,
        s   = (a / |a| + g / |g|) / 2,  each norm taken over the labels in play;
 2. ranking: every present label above every absent one, max(0, 1 + s_n - s_p) averaged over the
    pairs that violate the margin;
 3. distillation: the mean of |o_cls - CLIP's own embedding of the image| keeps the image encoder
    in the space of CLIP's text, where unseen labels live;
 4. prompt tuning, with the image encoder frozen: the words around the label in "There is a
    {label} in the scene" become learned embeddings, shared by all labels, unseen ones too.

    python mkt.py                                     # toy world, nothing to download
    python mkt.py --data nuswide --root data/nuswide  # the paper's first table
    python mkt.py --predict photos/ --checkpoint runs/mkt-toy/best.pt --labels "owl, ice cream"

B images, L patches, C labels, T tokens, W width, D joint embedding. Targets: +1 present,
-1 absent, 0 unknown.

Implementation details
 1. Teacher and student share the frozen blocks: they run once, without gradients.
 2. The teacher's last block computes its class token alone.
 3. A ranking pair needs a present label: [present labels, C] margins, never [B, C, C].
 4. Label embeddings are computed once in stage 1; in stage 2 prompts are cut after their end.
Where this differs from the paper
 1. CLIP's own normalisation of pixels, not ImageNet's: the frozen blocks were trained with it
    (--normalization imagenet for the authors').
 2. Images without a seen label are dropped before batching, so batches stay full.
 3. The last epoch is reported; --val-fraction selects on held-out training images.
"""
import copy
import math
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from torchvision import transforms

import clip_model
import data
import metrics
from data import UserError

PROMPT = ("There is a", "in the scene")  # around the label
# what the paper trains with, and what the toy world's small CLIP and 10,000 scenes ask for
PAPER = {"clip": "ViT-B/16", "epochs": 20, "prompt_epochs": 4, "batch_size": 64, "lr": 1e-3,
         "prompt_lr": 1e-3, "warmup_epochs": 2, "weight_decay": 0.05, "distillation": 1.0,
         "topk": 16, "streams": "both", "augment": "yes", "workers": 8}
TOY = {**PAPER, "clip": "toy-ViT", "epochs": 4, "prompt_epochs": 1, "warmup_epochs": 1,
       "distillation": 0.1, "topk": 4, "augment": "no", "workers": 0}


# ---- model

def two_stream_scores(local, global_, label_embeddings, topk, streams="both"):
    """MKT's score of every label, the mean of two unit-length score vectors (section 3.2).

    local [B, L, D], global_ [B, D], label_embeddings [C, D], topk in 1..L -> float [B, C] within
    [-1, 1]. streams: "both", or "global" or "local" alone. The scores depend on which labels are
    in play; those of a single one say nothing."""
    scores = []
    if streams != "global":
        patches = label_embeddings @ local.transpose(1, 2)  # [B, C, L]
        scores.append(F.normalize(patches.topk(topk, dim=-1).values.mean(dim=-1), dim=-1))
    if streams != "local":
        scores.append(F.normalize(global_ @ label_embeddings.T, dim=-1))
    return sum(scores) / len(scores)


class Prompts:
    """The labels' prompts as token ids, and which of the tokens are learned context.

    tokens int64 [C, T]; slots int64 [C, T]: 0, or 1 + the index of the context word; both on
    CLIP's device. eot int64 [C], on the CPU. Raises ClipError naming a label that is too long."""

    def __init__(self, clip, labels):
        device, (before, after) = clip.text_projection.device, PROMPT
        tokens = clip.tokenize([f"{before} {label} {after}" for label in labels])
        words = [clip.tokenize(part)[0].argmax().item() - 1 for part in PROMPT]  # how many tokens
        self.eot = tokens.argmax(dim=1)
        self.tokens = tokens[:, :self.eot.max() + 1].to(device)
        position = torch.arange(self.tokens.shape[1])
        second = position - self.eot[:, None] + words[1]  # 0, 1, ... at the words after the label
        slots = position.where(position <= words[0], 0) + (1 + words[0] + second).where(
            (second >= 0) & (second < words[1]), 0)  # start of text is position and slot 0
        self.slots = slots.to(device)
        self.context = self.tokens[0][self.slots[0] > 0]


class MKT(nn.Module):
    """CLIP, frozen, beside what is trained: the last two blocks, ln_post, the projection and
    the prompt's context. CLIP's own last two blocks are the teacher."""

    def __init__(self, clip, topk=16, streams="both"):
        super().__init__()
        visual = clip.visual
        if not isinstance(visual, clip_model.VisionTransformer):
            raise UserError("MKT is defined for ViTs (it trains the last two blocks and scores "
                            "patch tokens), and this CLIP is a ResNet: use --clip ViT-B/16")
        patches = (visual.input_resolution // visual.patch_size) ** 2
        if not 1 <= topk <= patches:
            raise UserError(f"--topk {topk} is not within 1..{patches}, the number of patches")
        self.clip = clip.requires_grad_(False)
        self.topk, self.streams = topk, streams
        self.blocks = copy.deepcopy(visual.transformer.resblocks[-2:]).requires_grad_()
        self.ln_post = copy.deepcopy(visual.ln_post).requires_grad_()
        self.proj = nn.Parameter(visual.proj.clone())
        context = Prompts(clip, ["label"]).context
        self.context = nn.Parameter(clip.token_embedding(context).detach().clone())  # [words, W]

    @torch.no_grad()
    def trunk(self, images):
        """Images [B, 3, H, W] -> tokens [B, 1 + L, W] below the first trained block."""
        x = self.clip.visual.embed(images)
        for block in self.clip.visual.transformer.resblocks[:-2]:
            x = block(x)
        return x

    def student(self, x):
        """Trunk tokens -> (global [B, D], local [B, L, D])."""
        for block in self.blocks:
            x = block(x)
        x = self.ln_post(x) @ self.proj
        return x[:, 0], x[:, 1:]

    def encode(self, images):
        """Images [B, 3, H, W] -> (global [B, D], local [B, L, D])."""
        return self.student(self.trunk(images))

    @torch.no_grad()
    def teacher(self, x):
        """Trunk tokens -> CLIP's image embedding [B, D]."""
        visual = self.clip.visual
        x = visual.transformer.resblocks[-2](x)
        first = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return visual.ln_post(visual.transformer.resblocks[-1].one_token(x, first)) @ visual.proj

    def label_embeddings(self, prompts, chunk=256):
        """Prompts -> [C, D], differentiable in the context.

        With gradients, chunks of labels are recomputed in the backward pass: 7,000 labels would
        otherwise keep the activations of 7,000 texts."""
        context = torch.cat([torch.zeros_like(self.context[:1]), self.context])  # slot 0: none

        def encode(tokens, slots, eot):
            fixed = self.clip.token_embedding(tokens).masked_fill(slots[..., None] > 0, 0)
            return self.clip.encode_prompts(fixed + context[slots], eot)  # [c, T, W] -> [c, D]

        pieces = list(zip(*(x.split(chunk) for x in (prompts.tokens, prompts.slots, prompts.eot))))
        if len(pieces) == 1 or not (torch.is_grad_enabled() and self.context.requires_grad):
            return torch.cat([encode(*piece) for piece in pieces])
        return torch.cat([recompute(encode, *piece, use_reentrant=False) for piece in pieces])

    def scores(self, global_, local, label_embeddings):
        """two_stream_scores with this model's top-k and streams."""
        return two_stream_scores(local, global_, label_embeddings, self.topk, self.streams)

    def trained(self):
        """The state that training changes; CLIP's own weights are not repeated in checkpoints."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("clip.")}


# ---- losses

def ranking_loss(scores, targets):
    """Pairwise ranking with margin 1 (section 3.3): scores float [B, C], targets int8 [B, C] ->
    scalar.

    Per image the sum over (present p, absent n) of max(0, 1 + s_n - s_p), divided by the number
    of pairs that violate the margin (+ 1e-8); the mean over images. Unknown labels (0) form no
    pairs. An image without a present or without an absent label adds 0. Targets may stay on the
    CPU: how many are present is then known without a wait for the GPU."""
    rows, columns, not_absent = (x.to(scores.device, non_blocking=True) for x in (
        *(targets == 1).nonzero(as_tuple=True), targets != -1))  # [P] present labels, [B, C]
    absent = scores.masked_fill(not_absent, -torch.inf)  # others fall below every margin
    margins = (absent[rows] + (1 - scores[rows, columns])[:, None]).relu()  # [P, C]
    total = margins.new_zeros(len(scores)).index_add(0, rows, margins.sum(dim=1))
    violated = margins.new_zeros(len(scores)).index_add(
        0, rows, (margins > 0).sum(dim=1).to(margins.dtype))
    return (total / (violated + 1e-8)).mean()


# ---- train

def parameter_groups(model, weight_decay, layer_decay=0.65):
    """Stage 1: layer-wise learning-rate decay, scale layer_decay^(layers + 1 - id).

    Block i of CLIP's image encoder has id i + 1, what comes after the blocks layers + 1. No
    weight decay on one-dimensional tensors (norms, biases)."""
    layers = len(model.clip.visual.transformer.resblocks)
    parts = [(model.blocks[0], layers - 1), (model.blocks[1], layers), (model.ln_post, layers + 1)]
    tensors = [(p, layer) for part, layer in parts for p in part.parameters()]
    groups = {}
    for parameter, layer in [*tensors, (model.proj, layers + 1)]:
        decay = weight_decay if parameter.ndim > 1 else 0.0
        group = groups.setdefault((layer, decay), {
            "params": [], "weight_decay": decay, "scale": layer_decay ** (layers + 1 - layer)})
        group["params"].append(parameter)
    return list(groups.values())


def learning_rate(epoch, peak, minimum, epochs, warmup_epochs):
    """Linear warm-up, then half a cosine down to the minimum; epoch may be a fraction."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-8)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))


def batch_loss(model, stage, images, targets, labels, args):
    """One batch -> (loss, {term: weighted value}); labels: their embeddings [C, D] in stage 1,
    which does not change them, their Prompts in stage 2."""
    tokens = model.trunk(images)
    global_, local = model.student(tokens)
    embeddings = labels if stage == 1 else model.label_embeddings(labels)
    terms = {"ranking": ranking_loss(model.scores(global_, local, embeddings).float(), targets)}
    if stage == 1 and args.distillation:
        distance = F.l1_loss(global_.float(), model.teacher(tokens).float())
        terms["distillation"] = args.distillation * distance
    return sum(terms.values()), terms


def train(model, stage, epochs, dataset, validation, args, state):
    """One stage, epoch by epoch, from wherever `state` is; a checkpoint after every epoch.

    Every epoch seeds its own shuffling and augmentation, so a resumed run repeats the epoch it
    was killed in exactly."""
    if state["stage"] > stage or epochs == 0:
        return
    if state["stage"] < stage:
        state.update(stage=stage, epoch=0, optimizer=None, scaler=None)
    device, seen = torch.device(args.device), dataset.seen
    loader = data.make_loader(dataset, args, shuffle=True)
    labels = Prompts(model.clip, [dataset.labels[i] for i in seen])
    if stage == 1:
        groups = parameter_groups(model, args.weight_decay)
        peak, minimum, warmup = args.lr, 1e-6, args.warmup_epochs
        with torch.no_grad(), data.autocast(args):
            labels = model.label_embeddings(labels)
    else:
        groups = [{"params": [model.context], "scale": 1.0, "weight_decay": args.weight_decay}]
        peak, minimum, warmup = args.prompt_lr, 1e-8, 0
    model.requires_grad_(False)
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_()
    optimizer = torch.optim.AdamW(groups, lr=peak, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    if state["optimizer"]:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    for epoch in range(state["epoch"], epochs):
        torch.manual_seed(1_000_003 * args.seed + 1_000 * stage + epoch)
        begin, history = time.time(), []
        batches = data.progress(loader, f"stage {stage} epoch {epoch + 1}", args.quiet)
        for step, (images, targets) in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * learning_rate(
                    epoch + step / len(loader), peak, minimum, epochs, warmup)
            images, targets = images.to(device, non_blocking=True), targets[:, seen]
            with data.autocast(args):
                loss, terms = batch_loss(model, stage, images, targets, labels, args)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            history.append(torch.stack([loss.detach(), *(t.detach() for t in terms.values())]))
            if step % 50 == 49 or step == len(loader) - 1:  # the only wait for the GPU
                means = data.finite_means(history, ["loss", *terms],
                                          f"stage {stage}, epoch {epoch + 1}", args.output)
        line = {"stage": stage, "epoch": epoch + 1, **means,
                "lr": optimizer.param_groups[-1]["lr"], "seconds": time.time() - begin}
        if dataset.replaced:
            line["unreadable_images"] = dataset.replaced
        if validation is not None:
            line["val_mAP"] = model_row(model, validation, args, settings={"": seen})["mAP"]
        state.update(stage=stage, epoch=epoch + 1, model=model.trained(),
                     optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
        data.finish_epoch(args.output, state, line, args.quiet)


# ---- evaluate

@torch.no_grad()
def evaluate(score, dataset, args, settings=None):
    """score as metrics.evaluate has it -> {name: metrics}. By default ZSL ranks the unseen labels
    alone and GZSL all labels; settings: {prefix of the metrics: label indices in play}."""
    usual, ks = data.evaluation(dataset)
    loader = data.progress(data.make_loader(dataset, args), "evaluating", args.quiet)
    return metrics.evaluate(score, loader, dataset.targets, settings or usual, ks)


def features(encode, images, args):
    """encode(images) -> (global [B, D], local [B, L, D]); labels are ranked in float32."""
    with data.autocast(args):
        return [x.float() for x in encode(images.to(args.device, non_blocking=True))]


@torch.no_grad()
def model_row(model, dataset, args, name="MKT", kind="method", settings=None):
    embeddings = model.label_embeddings(Prompts(model.clip, dataset.labels))

    def score(images):
        encoded = features(model.encode, images, args)
        return {name: lambda index: model.scores(*encoded, embeddings[index])}

    return {"name": name, "kind": kind, **evaluate(score, dataset, args, settings)[name]}


@torch.no_grad()
def zero_shot_rows(model, dataset, args):
    """CLIP as it is: cosines of the global embedding, of the best patch and of both, with two
    prompts; and MKT's own two-stream score before any training."""
    clip, prompts, own = model.clip, {}, "{} {{}} {}".format(*PROMPT)
    for prompt in ("a photo of a {}.", own):
        tokens = clip.tokenize([prompt.format(label) for label in dataset.labels])
        prompts[prompt] = torch.cat([clip.encode_text(part.to(args.device))
                                     for part in tokens.split(256)])

    def score(images):
        (global_, local), scores = features(clip.encode_image_dense, images, args), {}
        for title, texts in prompts.items():
            labels = F.normalize(texts, dim=-1)
            whole = F.normalize(global_, dim=-1) @ labels.T
            best = (F.normalize(local, dim=-1) @ labels.T).amax(dim=1)  # [B, L, C] -> [B, C]
            scores.update({f'zero-shot, global, "{title}"': whole,
                           f'zero-shot, local, "{title}"': best,
                           f'zero-shot, both, "{title}"': (whole + best) / 2})
        return scores | {"zero-shot, two-stream score": lambda index: two_stream_scores(
            local, global_, prompts[own][index], model.topk)}

    results = evaluate(score, dataset, args)
    return [{"name": name, "kind": "zero-shot", **row} for name, row in results.items()]


# ---- predict

@torch.no_grad()
def scorer(model, labels, args):
    """-> function: images -> (scores [B, C], with --heatmap patch scores [B, C, h, w])."""
    embeddings = model.label_embeddings(Prompts(model.clip, labels))

    def score(images):
        global_, local = features(model.encode, images, args)
        scores = model.scores(global_, local, embeddings)
        if not args.heatmap:
            return scores, None
        patches = embeddings @ local.transpose(1, 2)  # [B, C, L]
        return scores, patches.unflatten(2, (math.isqrt(local.shape[1]), -1))
    return score


def predict(args):
    model, preprocess, state = load_checkpoint(args.checkpoint, args)
    labels = args.labels or state["labels"]
    if len(labels) < 2:
        raise UserError("--labels: a score is relative to the other labels, give at least two")
    data.predict(scorer(model, labels, args), labels, preprocess, args)


# ---- arguments

def parse_arguments(arguments=None):
    parser, number = data.Parser(__doc__, PAPER, TOY), data.number
    add = parser.group("model")
    add("--clip", str, "a ViT: a name of clip_model.available_models() or a path to weights")
    add("--topk", number(int, 1), "patches that the local score averages")
    add("--streams", str, "which of the two scores count", choices=["both", "global", "local"])
    add("--labels", str, 'for --predict, any labels: "owl, ice cream"')
    add = parser.group("optimization")
    add("--epochs", number(int, 0), "of stage 1")
    add("--prompt-epochs", number(int, 0), "of stage 2, prompt tuning; 0 leaves it out")
    add("--batch-size", number(int, 1), "images")
    add("--lr", number(float, 0), "peak learning rate of stage 1")
    add("--prompt-lr", number(float, 0), "peak learning rate of stage 2")
    add("--warmup-epochs", number(float, 0), "of stage 1")
    add("--weight-decay", number(float, 0), "AdamW's")
    add("--distillation", number(float, 0), "weight of the distillation; 0 leaves it out")
    add("--augment", str, "random crop, flip and RandAugment", choices=["yes", "no"])
    add("--normalization", str, "of pixels (default: clip; the authors' code: imagenet)",
        choices=["clip", "imagenet"])
    data.add_run_arguments(parser, "mkt")
    args = parser.parse_args(arguments)
    data.check_run_arguments(args)
    if args.labels is not None and not args.predict:
        raise UserError("--labels are for --predict: a dataset has its own")
    args.labels = None if args.labels is None else data.parse_labels(args.labels)
    if args.epochs == 0 and args.prompt_epochs == 0:
        raise UserError("--epochs 0 and --prompt-epochs 0 leave nothing to train")
    return args


def fill_defaults(args):
    data.fill_defaults(args, "mkt", PAPER, TOY)
    args.normalization = args.normalization or "clip"


# ---- main

def build(options, device):
    """-> (MKT, preprocess) with the options "clip", "topk", "streams", "normalization"."""
    clip, preprocess = clip_model.load(options["clip"], device)
    if options["normalization"] == "imagenet":
        preprocess.transforms[-1] = transforms.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD)
    return MKT(clip, options["topk"], options["streams"]).eval(), preprocess


def load_checkpoint(path, args):
    """-> (MKT, preprocess, state). UserError for what is no MKT checkpoint or of another CLIP."""
    state = data.read_checkpoint(path, "mkt", args.clip)
    for name in ("topk", "normalization"):
        if getattr(args, name) not in (None, state["args"][name]):
            raise UserError(f"{path} was trained with --{name} {state['args'][name]}"
                            + "; for the best N labels there is --top N" * (name == "topk"))
    streams = args.streams or state["args"]["streams"]
    model, preprocess = build({**state["args"], "streams": streams}, args.device)
    data.check_weights(path, state, model.clip)
    data.restore(path, model, state)
    return model, preprocess, state


def load_training(preprocess, args):
    """-> (training images with a seen label, held-out validation images or None)."""
    size, normalize = preprocess.transforms[0].size, preprocess.transforms[-1]
    augment = data.train_transform(size, normalize.mean, normalize.std)
    dataset = data.load_split("train", augment if args.augment == "yes" else preprocess, args,
                              True)
    if len(dataset.seen) < 2:
        raise UserError("ranking takes two seen labels at least: add images of something else")
    has_seen = (dataset.targets[:, dataset.seen] == 1).any(dim=1)
    if not has_seen.any():
        raise UserError(f"no training image of {args.data} shows a seen label")
    dataset = dataset.subset(has_seen)
    return data.hold_out(dataset, args.val_fraction, preprocess)


def run(args):
    """Train, unless --eval, and evaluate -> the results that results.json holds."""
    begin = time.time()
    if args.eval:
        model, preprocess, state = load_checkpoint(args.eval, args)
        data.same_dataset(args, state)
    fill_defaults(args)
    test = data.load_split("test", None, args, True)  # first of all: it may lack files
    if args.resume:
        model, preprocess, state = load_checkpoint(f"{args.output}/last.pt", args)
        data.check_same(args, state["args"], (*PAPER, *data.SAME, "normalization"))
    elif not args.eval:
        model, preprocess = build(vars(args), args.device)
        state = {**data.new_state("mkt", test.labels, model.clip, args), "stage": 0, "rows": []}
    test.transform = preprocess
    data.check_labels(test, state)
    if len(test.unseen) == 1:
        print("one unseen label: ZSL has nothing to rank it against, only GZSL means something",
              file=sys.stderr)
    if args.compile:
        model.student = torch.compile(model.student)
    rows = [] if args.eval else state["rows"]
    if not args.eval:
        dataset, validation = load_training(preprocess, args)
        if not args.quiet:
            trained, frozen = (sum(x.numel() for x in tensors) for tensors in (
                model.trained().values(), model.clip.parameters()))
            print(f"{args.data}: {len(dataset):,} training images, {len(dataset.seen)} seen "
                  f"labels; {len(test):,} test images, {len(test.unseen)} unseen labels\n"
                  f"{args.clip}: {trained:,} trained weights, {frozen:,} frozen ones", flush=True)
        if not args.resume:
            data.start_run(args)
    if not rows:
        rows += zero_shot_rows(model, test, args)
    if not args.eval:
        train(model, 1, args.epochs, dataset, validation, args, state)
        if args.epochs and args.prompt_epochs and rows[-1]["kind"] == "zero-shot":
            rows.append(model_row(model, test, args, "MKT without prompt tuning", "ablation"))
        train(model, 2, args.prompt_epochs, dataset, validation, args, state)
        data.restore(f"{args.output}/best.pt", model)
    rows = rows + [model_row(model, test, args)]
    metrics.print_table(rows)
    if args.gallery:
        data.write_gallery(test, scorer(model, test.labels, args), args)
    return data.write_results("mkt", args, state["seconds"], rows, test, begin)


def main(arguments=None):
    with data.command_line("mkt.py", clip_model.ClipError):
        args = parse_arguments(arguments)
        return predict(args) if args.predict else run(args)


if __name__ == "__main__":
    main()
