"""TRM-ML: multi-label recognition from images of which most labels are unknown.

Ma et al., "Text-Region Matching for Multi-Label Image Recognition with Missing Labels", ACM MM
2024 (arXiv 2407.18520). Of every training image a part of the labels is known to be present or
absent; nobody looked for the others. Both encoders of CLIP stay as they are.

From the paper's abstract: learned prompts; texts matched one to one with category-aware regions,
instead of with the whole image or with pixels; multimodal category prototypes that estimate the
unknown labels by relations within and between categories; a multimodal contrastive loss. No code
was published with it and only the abstract was at hand, so every formula is our reading of it:

 1. regions: label c asks the image's embeddings x_1..x_L with its query q_c, by cross-attention,
        R_c = normalise(a + MLP(LN(a))),  a = attention(q_c, x, x),
    and where it looked is where the label was found;
 2. matching: l_c = s <R_c, T_c> + b, with T_c the embedding of 16 learned words and the name;
 3. known labels: asymmetric loss (Ridnik et al., ICCV 2021); unknown ones are left out;
 4. prototypes V_c, the running mean of the regions of known positives, and T_c estimate an
    unknown label by how near its own prototypes and how much nearer than the others' they are,
        e_c = mean over P in {V, T} of  <R_c, P_c> / t + log softmax_c'(<R_c, P_c'> / t)[c];
    where e_c leaves no doubt it is a pseudo label, by thresholds that the label's share among
    known entries sets;
 5. contrast: among the prototypes of either modality, R_c of a present label must find its own,
        -log softmax_c'(<R_c, P_c'> / t)[c], mean over P in {V, T};
 6. distillation: |R_c - what CLIP's own embeddings are where the label looked|_1.

    python trm_ml.py --partial 0.3                 # toy world, nothing to download
    python trm_ml.py --data coco --root data/coco --partial 0.1 0.3 0.5 0.7 0.9
    python trm_ml.py --predict photos/ --checkpoint runs/trm_ml-toy/best.pt --heatmap maps/

B images, L embeddings (the whole image, then locations), C labels, T tokens, W width, D joint
embedding, H heads. Targets: +1 present, -1 absent, 0 unknown.

Implementation details
 1. Attention starts as CLIP's own matching, in each head's share of the dimensions: its weights
    are the identity, the queries the labels'
    embeddings, the temperature CLIP's, the MLP's last layer 0. In a prototype on the toy world,
    the known labels' loss alone ended at 36 mAP from a random start, at 94 from this.
 2. A label's thresholds are ranks among its unknown entries: the upper half of as many as its
    share among the known ones lets expect are present, and beyond twice as many absent. Known
    entries would flatter: training fits them.
 3. Which entries are known is drawn once, with the seeds of this line of work, and kept with the
    run; every method and every --seed gets the same.
"""
import argparse
import hashlib
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from torchvision import transforms

import clip_model
import data
import metrics
from data import UserError

# usual in this line of work; and what the toy world's small CLIP and 10,000 scenes ask for
BENCHMARK = {"clip": "RN101", "image_size": 448, "matching": ["region"], "epochs": 20,
             "batch_size": 32, "lr": 1e-4, "pseudo": 0.1, "contrastive": 0.2,
             "distillation": 0.01, "augment": "yes", "workers": 8}
TOY = {**BENCHMARK, "clip": "toy-RN", "image_size": 128, "matching": ["image", "pixel", "region"],
       "epochs": 8, "batch_size": 128, "lr": 1e-3, "augment": "no", "workers": 0}
TITLES = {"image": "text-image matching", "pixel": "text-pixel matching", "region": "TRM-ML"}
TEMPLATES = ["a photo of a {}.", "a photo of the {}.", "a picture of a {}.", "a scene with a {}.",
             "there is a {} in the scene.", "a photo of a small {}.", "a photo of a large {}."]
CONTEXT, HEADS = 16, 4  # learned words of a prompt; attention heads
TEMPERATURE = 0.1  # t, of similarities with prototypes
MOMENTUM = 0.99  # of the visual prototypes
SURE_PRESENT, SURE_ABSENT = 0.5, 2.0  # pseudo labels, in units of the expected number of positives
HIDDEN = 2  # hidden positives per known one, where absent labels are never or hardly ever known
PARTIAL_SEED, SINGLE_POSITIVE_SEED = 0, 1200  # of SST, SARB and HCP; of Cole et al. (CVPR 2021)


# ---- model

def identity(size):
    """A linear layer that changes nothing before it is trained."""
    layer = nn.Linear(size, size)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class TRM(nn.Module):
    """CLIP, frozen, beside what is trained: the prompt's context, queries, attention, MLP, scale
    and bias of the logits; and the visual prototypes and thresholds, which follow the training.

    matching: what a label's text is matched with, "region", or for comparison the whole "image",
    or every "pixel" (location), weighted by a softmax of their similarities (as DualCoOp, NeurIPS
    2022). These have the same MLP and logits. start: the labels' embeddings [C, D] that regions
    start from, by default CLIP's own. Raises UserError for a label that is too long."""

    def __init__(self, clip, labels, matching="region", per_label_context=False, start=None):
        super().__init__()
        self.clip, self.matching = clip.requires_grad_(False), matching
        tokens = clip.tokenize([f"{label}." for label in labels])
        self.eot = tokens.argmax(dim=1) + CONTEXT  # on the CPU, as encode_prompts likes it
        if self.eot.max() >= clip.context_length:
            raise UserError(f"the label '{labels[int(self.eot.argmax())]}' and {CONTEXT} words of "
                            f"context are over {clip.context_length} tokens: shorten its name")
        self.register_buffer("tokens", tokens[:, :int(self.eot.max()) + 1 - CONTEXT], False)
        (width, size), device = clip.text_projection.shape, clip.text_projection.device
        self.context = nn.Parameter(0.02 * torch.randn(
            len(labels) if per_label_context else 1, CONTEXT, width, device=device))
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.bias = nn.Parameter(torch.tensor(0.05).logit())  # about one label in twenty is there
        self.norm, self.hidden, self.last = (
            nn.LayerNorm(size), nn.Linear(size, size), nn.Linear(size, size))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        if matching == "region":
            start = zero_shot_embeddings(clip, labels, TEMPLATES) if start is None else start
            self.queries = nn.Parameter(start.clone())
            self.query, self.key, self.value, self.out = (identity(size) for _ in range(4))
            self.register_buffer("visual", start.clone())
            self.register_buffer("sure_present", torch.full((len(labels),), torch.inf))
            self.register_buffer("sure_absent", torch.full((len(labels),), -torch.inf))
        self.to(device)

    def texts(self, chunk=256):
        """T, the labels' embeddings with the learned context: unit length, [C, D].

        Chunks of many labels are recomputed in the backward pass, which bounds the memory."""
        def encode(tokens, context, eot):
            words = self.clip.token_embedding(tokens)  # [c, T, W]
            words = torch.cat([words[:, :1], context, words[:, 1:]], dim=1)
            return F.normalize(self.clip.encode_prompts(words, eot).float(), dim=-1)

        context = self.context.expand(len(self.tokens), -1, -1)  # [C, 16, W]
        pieces = list(zip(*(x.split(chunk) for x in (self.tokens, context, self.eot))))
        if len(pieces) == 1 or not torch.is_grad_enabled():
            return torch.cat([encode(*piece) for piece in pieces])
        return torch.cat([recompute(encode, *piece, use_reentrant=False) for piece in pieces])

    def refine(self, x):
        """The simple MLP, residual: [..., D] -> [..., D], unit length."""
        return F.normalize((x + self.last(F.gelu(self.hidden(self.norm(x))))).float(), dim=-1)

    def regions(self, x):
        """Embeddings [B, L, D] -> (regions [B, C, D], unit length; attention [B, C, L], which
        sums to 1 and says where each label looked)."""
        query = self.query(self.queries).unflatten(-1, (HEADS, -1))  # [C, H, d]
        key = self.key(x).unflatten(-1, (HEADS, -1))  # [B, L, H, d]
        value = self.value(x).unflatten(-1, (HEADS, -1))
        attention = torch.einsum("chd,blhd->bhcl", query, key)  # [B, H, C, L]
        attention = (self.clip.logit_scale.exp() * attention.float()).softmax(dim=-1)
        attended = torch.einsum("bhcl,blhd->bchd", attention.to(value.dtype), value)
        return self.refine(self.out(attended.flatten(2))), attention.mean(dim=1)

    def forward(self, x, texts):
        """Embeddings [B, L, D], texts [C, D] -> logits [B, C], and what regions(x) gives."""
        regions = attention = None
        if self.matching == "region":
            regions, attention = self.regions(x)
            similarity = (regions * texts).sum(dim=-1)
        elif self.matching == "image":
            similarity = self.refine(x[:, 0]) @ texts.T
        else:
            pixels = self.refine(x[:, 1:]) @ texts.T  # [B, L, C]
            weights = (self.clip.logit_scale.exp() * pixels).softmax(dim=1)
            similarity = (weights * pixels).sum(dim=1)
        return self.log_scale.exp() * similarity + self.bias, regions, attention

    @torch.no_grad()
    def update_prototypes(self, regions, present):
        """Move the visual prototypes of the labels present, bool [B, C], towards their regions."""
        means = F.normalize(torch.einsum("bc,bcd->cd", present.float(), regions), dim=-1)
        moved = F.normalize(MOMENTUM * self.visual + (1 - MOMENTUM) * means, dim=-1)
        self.visual.copy_(moved.where(present.any(dim=0)[:, None], self.visual))

    @torch.no_grad()
    def estimates(self, regions, texts):
        """Regions [B, C, D] -> e [B, C], how surely the labels are there, on no fixed scale."""
        total = 0
        for prototypes in (self.visual, texts):
            own = (regions * prototypes).sum(dim=-1) / TEMPERATURE
            among_all = (regions @ prototypes.T / TEMPERATURE).logsumexp(dim=-1)  # over c'
            total = total + 2 * own - among_all
        return total / 2

    @torch.no_grad()
    def calibrate(self, estimates, known):
        """Set the thresholds of pseudo labels from an epoch's estimates and known targets [N, C].

        Where known entries are drawn from all, a label's share of positives is the same among the
        unknown ones. Where they are not, which shows in absent labels being the fewer ones, HIDDEN
        times as many positives as are known are expected. A label without a known positive gets no
        pseudo labels."""
        positives, negatives = (known == 1).sum(dim=0), (known == -1).sum(dim=0)
        drawn = (negatives > 0) & (positives.sum() < negatives.sum())
        share = torch.where(drawn, positives / (positives + negatives).clamp(min=1),
                            HIDDEN * positives / len(known))
        ranked = estimates.masked_fill(known != 0, -torch.inf).sort(dim=0, descending=True).values
        count = (known == 0).sum(dim=0)
        usable = (positives > 0) & (count > 0)
        for threshold, factor, never in ((self.sure_present, SURE_PRESENT, torch.inf),
                                         (self.sure_absent, SURE_ABSENT, -torch.inf)):
            rank = (factor * share * count).long().clamp(max=count - 1).clamp(min=0)
            threshold.copy_(ranked.gather(0, rank[None])[0].where(usable, never))

    def pseudo_labels(self, estimates, known):
        """-> int8 [B, C]: +1 surely present, -1 surely absent; 0 in doubt, and where known."""
        sure = (estimates > self.sure_present).char() - (estimates < self.sure_absent).char()
        return sure * (known == 0)

    def trained(self):
        """The state that training changes; CLIP's own weights are not repeated in checkpoints."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("clip.")}


@torch.no_grad()
def zero_shot_embeddings(clip, labels, templates):
    """CLIP's own embeddings of the labels, the mean over templates: unit length, [C, D]."""
    device, total = clip.text_projection.device, 0
    for template in templates:
        tokens = clip.tokenize([template.format(label) for label in labels]).split(256)
        texts = torch.cat([clip.encode_text(part.to(device)) for part in tokens])
        total = total + F.normalize(texts.float(), dim=-1)
    return F.normalize(total, dim=-1)


@torch.no_grad()
def encode(clip, images, args):
    """Images [B, 3, H, W] -> unit-length embeddings [B, 1 + L, D]: the whole image, locations.
    Embeddings that were kept pass through. A ViT's patches skip the last block's attention."""
    images = images.to(args.device, non_blocking=True)
    if images.ndim == 3:
        return images.float()
    is_vit = isinstance(clip.visual, clip_model.VisionTransformer)
    with data.autocast(args):
        global_, local = clip.encode_image_dense(images, value_path=is_vit)
    return F.normalize(torch.cat([global_[:, None], local], dim=1).float(), dim=-1)


# ---- losses

def asymmetric_loss(logits, targets, gamma_pos=1, gamma_neg=2, clip=0.05):
    """Ridnik et al. (ICCV 2021) over the known entries: their sum, mean over images, a scalar.

    logits float [B, C]; targets int8 [B, C], +1 present, -1 absent, 0 unknown, which adds nothing.
    With p = sigmoid(logit) and q = max(p - clip, 0): -(1 - p)^gamma_pos log p of a present and
    -q^gamma_neg log(1 - q) of an absent label. All 0: binary cross-entropy."""
    probabilities = logits.sigmoid()
    shifted = (probabilities - clip).clamp(min=0)
    # log(1 - p) by logsigmoid where nothing is shifted: 1 - p would round to 0
    absent = F.logsigmoid(-logits) if clip == 0 else torch.log1p(-shifted)
    present = (1 - probabilities) ** gamma_pos * F.logsigmoid(logits)
    absent = shifted ** gamma_neg * absent
    return -(present * (targets == 1) + absent * (targets == -1)).sum() / len(logits)


def contrastive_loss(regions, present, prototypes):
    """Regions float [B, C, D], present bool [B, C], prototypes float [M, C, D] -> scalar; vectors
    of unit length.

    Cross-entropy of every present (b, c) among the prototypes of a modality, at temperature t: the
    mean over present labels and M modalities, 0 if nothing is present."""
    image, label = present.nonzero(as_tuple=True)  # [P]
    similarity = regions[image, label] @ prototypes.transpose(1, 2) / TEMPERATURE  # [M, P, C]
    total = F.cross_entropy(similarity.flatten(0, 1), label.repeat(len(prototypes)),
                            reduction="sum")
    return total / max(1, len(label) * len(prototypes))


def batch_loss(model, x, known, args, warm_up=False):
    """One batch -> (loss, {term: weighted value}, pseudo labels [B, C], estimates [B, C]); the last
    two are None without prototypes, estimates also in warm-up, which has no pseudo labels yet."""
    with data.autocast(args):
        texts = model.texts()
        logits, regions, attention = model(x, texts)
    logits = logits.float()
    terms, pseudo, estimates = {"known": asymmetric_loss(logits, known)}, None, None
    if regions is None:
        return terms["known"], terms, pseudo, estimates
    present, prototypes = known == 1, texts[None]
    if args.pseudo:
        model.update_prototypes(regions, present)
        pseudo = torch.zeros_like(known)
        if not warm_up:
            estimates = model.estimates(regions, texts)
            pseudo = model.pseudo_labels(estimates, known)
        terms["pseudo"] = args.pseudo * asymmetric_loss(logits, pseudo)
        present = present | (pseudo == 1)
        prototypes = torch.stack([model.visual, texts])  # [2, C, D]
    if args.contrastive:
        terms["contrastive"] = args.contrastive * contrastive_loss(regions, present, prototypes)
    if args.distillation:
        looked_at = F.normalize(attention.detach().float() @ x, dim=-1)  # [B, C, L] @ [B, L, D]
        distance = (regions - looked_at).abs().sum(dim=-1).mean()
        terms["distillation"] = args.distillation * distance
    return sum(terms.values()), terms, pseudo, estimates


# ---- train

def learning_rate(progress, peak):
    """Half a cosine from the peak to 0; progress: 0 to 1, the share of all steps that are done."""
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def pseudo_label_counts(pseudo, known, truth):
    """What a log can tell of pseudo labels: int64 [5], right and given positives, hidden
    positives, right and given negatives; entries whose truth nobody knows are left out."""
    hidden = truth * (known == 0)
    given = pseudo * (hidden != 0)
    return torch.stack([x.sum() for x in (
        (given == 1) & (hidden == 1), given == 1, hidden == 1,
        (given == -1) & (hidden == -1), given == -1)])


def train(model, training, validation, known, truth, args, state):
    """Epoch by epoch, from wherever `state` is; a checkpoint after every epoch.

    training, validation: (images, kept embeddings or None), whose targets are rows of known and
    truth, int8 [N, C]; the truth is for the log alone. Every epoch seeds its own shuffling and
    augmentation, so a resumed run repeats the epoch it was killed in exactly."""
    device, (dataset, kept) = torch.device(args.device), training
    loader = data.make_loader(dataset, args, True, kept)
    known, truth = known.to(device), truth.to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.01, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    if state["optimizer"]:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    for epoch in range(state["epoch"], args.epochs):
        torch.manual_seed(1_000_003 * args.seed + epoch)
        begin, history, counts, estimated = time.time(), [], 0, []
        warm_up = epoch + 1 < args.epochs // 2  # until prototypes mean something
        batches = data.progress(loader, f"epoch {epoch + 1}", args.quiet)
        for step, (images, rows) in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate((epoch + step / len(loader)) / args.epochs, args.lr)
            rows = rows.to(device, non_blocking=True)
            x, given = encode(model.clip, images, args), known[rows]
            loss, terms, pseudo, estimates = batch_loss(model, x, given, args, warm_up)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            history.append(torch.stack([loss.detach(), *(t.detach() for t in terms.values())]))
            if pseudo is not None:
                counts = counts + pseudo_label_counts(pseudo, given, truth[rows])
            if estimates is not None and step * args.batch_size < 20_000:  # images enough
                estimated.append((estimates, given))
            if step % 50 == 49 or step == len(loader) - 1:  # waits for the GPU
                means = data.finite_means(history, ["loss", *terms], f"epoch {epoch + 1}",
                                          args.output)
        line = {"epoch": epoch + 1, **means, "lr": optimizer.param_groups[0]["lr"]}
        if estimated:
            model.calibrate(*map(torch.cat, zip(*estimated)))
        if pseudo is not None:
            right, found, hidden, right_absent, found_absent = counts.tolist()
            if found and hidden:
                line["pseudo_precision"], line["pseudo_recall"] = right / found, right / hidden
            if found_absent:
                line["pseudo_precision_absent"] = right_absent / found_absent
        if dataset.replaced:
            line["unreadable_images"] = dataset.replaced
        line["seconds"] = time.time() - begin
        if validation is not None:
            line["val_mAP"] = validation_score(model, *validation, known, args)
        state.update(epoch=epoch + 1, model=model.trained(), optimizer=optimizer.state_dict(),
                     scaler=scaler.state_dict())
        data.finish_epoch(args.output, state, line, args.quiet)


@torch.no_grad()
def validation_score(model, dataset, kept, known, args):
    """mAP of images by those of their labels that are known."""
    texts, batches = model.texts(), []
    for images, rows in data.make_loader(dataset, args, kept=kept):
        with data.autocast(args):
            logits = model(encode(model.clip, images, args), texts)[0]
        batches.append((logits.float(), known[rows.to(args.device)]))
    return metrics.mean_average_precision(*map(torch.cat, zip(*batches)))


# ---- evaluate

@torch.no_grad()
def evaluate(clip, models, dataset, args):
    """The table, in one pass over the images: CLIP as it is, then models [(name, kind, TRM)]."""
    prompts = {f'"{TEMPLATES[0]}"': TEMPLATES[:1], f"mean of {len(TEMPLATES)} prompts": TEMPLATES}
    prompts = {title: zero_shot_embeddings(clip, dataset.labels, templates)
               for title, templates in prompts.items()}
    texts = [model.texts() for _, _, model in models]

    def score(images):
        x, scores = encode(clip, images, args), {}
        for title, labels in prompts.items():
            global_, local = x[:, 0] @ labels.T, (x[:, 1:] @ labels.T).amax(dim=1)  # [B, C]
            scores.update({f"zero-shot, global, {title}": global_,
                           f"zero-shot, local, {title}": local,
                           f"zero-shot, both, {title}": (global_ + local) / 2})
        for (name, _, model), labels in zip(models, texts):
            with data.autocast(args):
                scores[name] = model(x, labels)[0]
        return scores

    loader = data.make_loader(dataset, args, kept=kept_embeddings(clip, dataset, args))
    results = metrics.evaluate(score, data.progress(loader, "evaluating", args.quiet),
                               dataset.targets, *data.evaluation(dataset))
    kinds = {name: kind for name, kind, _ in models}
    return [{"name": name, "kind": kinds.get(name, "zero-shot"), **row}
            for name, row in results.items()]


# ---- predict

def scorer(model, args):
    """-> function: images -> (probabilities [B, C], regions' attention [B, C, h, w])."""
    texts = model.texts()

    def score(images):
        with data.autocast(args):
            logits, _, attention = model(encode(model.clip, images, args), texts)
        if attention is not None:
            attention = attention[:, :, 1:]  # without the whole image
            attention = attention.unflatten(2, (math.isqrt(attention.shape[2]), -1))
        return logits.float().sigmoid(), attention

    if args.heatmap and model.matching != "region":
        raise UserError("--heatmap: only region matching looks anywhere, this checkpoint's is "
                        f"--matching {model.matching}")
    return score


@torch.no_grad()
def predict(args):
    model, preprocess, state = load_checkpoint(args.checkpoint, args)
    data.predict(scorer(model, args), state["labels"], preprocess, args, whole=True)


# ---- arguments

def parse_arguments(arguments=None):
    parser, number = data.Parser(__doc__, BENCHMARK, TOY, "default"), data.number
    add = parser.group("known labels")
    add("--partial", number(float, 0, 1), "train with this share of the label entries known; "
        "several: a run each, and their average (default: 0.3 on toy, else all there are)",
        nargs="+", metavar="P")
    add("--single-positive", None, "train with one present label an image known, and nothing else",
        action="store_true")
    add("--upper-bound", None, "train TRM-ML with all labels known too, and add its row",
        action="store_true")
    add = parser.group("model")
    add("--clip", str, "a name of clip_model.available_models() or a path to weights")
    add("--image-size", number(int, 32), "pixels, square; images are not cropped")
    add("--matching", str, "what texts are matched with; several: a model each, the last is the "
        "run's", nargs="+", choices=["image", "pixel", "region"])
    add("--per-label-context", None, "every label learns a context of its own",
        action="store_true")
    parser.add_argument("--labels", help=argparse.SUPPRESS)
    add = parser.group("optimization")
    add("--epochs", number(int, 1), "passes over the training images")
    add("--batch-size", number(int, 1), "images")
    add("--lr", number(float, 0), "peak learning rate")
    add("--pseudo", number(float, 0), "weight of the pseudo labels' loss; 0 leaves prototypes out")
    add("--contrastive", number(float, 0), "weight of the contrastive loss; 0 leaves it out")
    add("--distillation", number(float, 0), "weight of the distillation; 0 leaves it out")
    add("--augment", str, "cutout, flip and RandAugment", choices=["yes", "no"])
    add("--cache-features", str, "keep the embeddings of images (default: disk, with --augment no)",
        choices=["no", "memory", "disk"])
    data.add_run_arguments(parser, "trm_ml")
    args = parser.parse_args(arguments)
    data.check_run_arguments(args)
    if args.labels is not None:
        raise UserError("--labels: this method scores the labels that it was trained for only")
    if args.partial and args.single_positive:
        raise UserError("--partial and --single-positive exclude each other")
    if args.partial and 0 in args.partial:
        raise UserError("--partial 0: with nothing known there is nothing to learn from, give a "
                        "share above 0 and up to 1")
    if args.single_positive and args.val_fraction:
        raise UserError("--val-fraction: with --single-positive no absent label is known, and "
                        "nothing could be selected by")
    return args


def fill_defaults(args):
    data.fill_defaults(args, "trm_ml", BENCHMARK, TOY)
    args.cache_features = args.cache_features or ("disk" if args.augment == "no" else "no")
    if args.augment == "yes" and args.cache_features != "no":
        raise UserError(f"--cache-features {args.cache_features} needs --augment no: augmented "
                        "images differ every time")
    if not args.partial:
        args.partial = [0.3 if args.data == "toy" and not args.single_positive else 1.0]
    if args.upper_bound and 1 in args.partial and not args.single_positive:
        raise UserError("--upper-bound: --partial 1 is that already, give a smaller share")
    args.partial = list(dict.fromkeys(args.partial))
    args.matching = list(dict.fromkeys(args.matching))


# ---- main

def build(options, device):
    """-> (CLIP, transform of a whole image) with the options "clip" and "image_size"."""
    clip, preprocess = clip_model.load(options["clip"], device)
    bicubic = transforms.InterpolationMode.BICUBIC
    size = (options["image_size"], options["image_size"])  # squeezed: nothing is cropped away
    return clip, transforms.Compose([transforms.Resize(size, bicubic), *preprocess.transforms[2:]])


def load_checkpoint(path, args):
    """-> (TRM, preprocess, state). UserError for another checkpoint or another CLIP."""
    state = data.read_checkpoint(path, "trm_ml", args.clip)
    clip, preprocess = build(state["args"], args.device)
    data.check_weights(path, state, clip)
    model = TRM(clip, state["labels"], state["args"]["matching"],
                state["args"]["per_label_context"], start=state["model"].get("visual"))
    data.restore(path, model, state)
    return model, preprocess, state


def known_targets(truth, args):
    """Targets [N, C] of which --partial or --single-positive leaves a part known, else 0."""
    if args.single_positive:
        return data.keep_single_positive(truth, SINGLE_POSITIVE_SEED)
    return truth if args.partial == 1 else data.keep_partial(truth, args.partial, PARTIAL_SEED)


def kept_embeddings(clip, dataset, args):
    """encode() of all images as --cache-features says: float16 [N, 1 + L, D], or None."""
    return data.kept_embeddings(dataset, lambda images: encode(clip, images, args),
                                [clip.fingerprint(), args.precision], args)


def row_name(matching, partial, args):
    """Of a model in the table."""
    return TITLES[matching] + f", {100 * partial:g}% known" * (len(args.partial) > 1)


def plan(args):
    """The models that a run trains: [(name, kind of its row, args with one partial, one matching
    and an output of its own)]."""
    models = []
    for partial in args.partial:
        for matching in args.matching:
            kind = "method" if matching == args.matching[-1] else "ablation"
            folders = ([f"partial-{partial:g}"] * (len(args.partial) > 1)
                       + [matching] * (kind == "ablation"))
            models.append((row_name(matching, partial, args), kind, {
                "partial": partial, "matching": matching,
                "output": str(Path(args.output, *folders))}))
    if args.upper_bound:
        models.append(("upper bound (all labels known)", "ablation", {
            "partial": 1.0, "single_positive": False, "matching": args.matching[-1],
            "output": str(Path(args.output, "upper-bound"))}))
    return [(name, kind, argparse.Namespace(**{**vars(args), **own}))
            for name, kind, own in models]


def start_or_resume(clip, labels, start, known, args):
    """-> (TRM, state) of one of plan(args); known.pt says which entries are known, bool [N, C]."""
    torch.manual_seed(args.seed)
    model = TRM(clip, labels, args.matching, args.per_label_context, start)
    known = known != 0
    digest = hashlib.sha256(known.numpy().tobytes()).hexdigest()
    if not Path(args.output, "last.pt").exists():
        data.write_file(f"{args.output}/known.pt", known)
        return model, {**data.new_state("trm_ml", labels, clip, args), "known": digest}
    state = data.read_checkpoint(f"{args.output}/last.pt", "trm_ml")
    data.check_same(args, state["args"], (*BENCHMARK, *data.SAME, "partial", "single_positive",
                                          "per_label_context", "cache_features"))
    data.check_weights(args.output, state, clip)
    if state["labels"] != labels or state["known"] != digest:
        raise UserError(f"--resume: the run in {args.output} was started with other data")
    data.restore(f"{args.output}/last.pt", model, state)
    return model, state


def train_all(clip, preprocess, args):
    """Train what plan(args) says -> ([(name, kind, TRM with its best weights)], seconds)."""
    runs, models, seconds = plan(args), [], 0.0
    if args.resume and not any(Path(own.output, "last.pt").exists() for _, _, own in runs):
        raise UserError(f"--resume: no checkpoint at {runs[0][2].output}/last.pt")
    augment = data.cutout_transform(preprocess) if args.augment == "yes" else preprocess
    whole = data.load_split("train", augment, args)
    truth, labels = whole.targets, whole.labels
    if not torch.is_tensor(truth):
        raise UserError(f"{args.data}: targets of {len(whole):,} images and {len(labels):,} "
                        f"labels are too many for this method: give a --limit")
    knowns = [known_targets(truth, own) for _, _, own in runs]
    if not all(known.any() for known in knowns):
        raise UserError("none of the training labels is known: raise --partial or --limit")
    whole.targets = torch.arange(len(whole))  # rows of what each run knows
    parts = [part and (part, kept_embeddings(clip, part, args))
             for part in data.hold_out(whole, args.val_fraction, preprocess)]
    start = zero_shot_embeddings(clip, labels, TEMPLATES)
    if not args.resume:  # all at once, so that --resume later finds nothing of an earlier run
        for own in [args] * (len(args.partial) > 1) + [own for _, _, own in runs]:
            data.start_run(own)
    for (name, kind, own), known in zip(runs, knowns):
        without = [labels[i] for i in (known != 1).all(dim=0).nonzero()[:, 0]]
        if not args.quiet:
            print(f"\n{name}: {len(whole):,} training images, {len(labels)} labels, "
                  f"{(known != 0).float().mean():.1%} of the entries known; {own.output}",
                  flush=True)
        if without and kind == "method":
            print(f"{len(without)} labels without a known positive, e.g. '{without[0]}': they get "
                  f"no pseudo labels and rest on CLIP's text", file=sys.stderr)
        model, state = start_or_resume(clip, labels, start, known, own)
        if args.compile:
            model.regions = torch.compile(model.regions)
        train(model, *parts, known, truth, own, state)
        data.restore(f"{own.output}/best.pt", model)
        models.append((name, kind, model))
        seconds += state["seconds"]
    return models, seconds


def run(args):
    """Train, unless --eval, and evaluate -> the results that results.json holds."""
    begin = time.time()
    if args.eval:
        model, preprocess, state = load_checkpoint(args.eval, args)
        data.same_dataset(args, state)
        args.cache_features = args.cache_features or state["args"]["cache_features"]
        args.partial, args.matching, args.augment = [state["args"]["partial"]], [], "no"
    fill_defaults(args)
    test = data.load_split("test", None, args)  # first of all: it may lack files
    if args.eval:
        data.check_labels(test, state)
        clip, models = model.clip, [(TITLES[model.matching], "method", model)]
        seconds = state["seconds"]
    else:
        clip, preprocess = build(vars(args), args.device)
        models, seconds = train_all(clip, preprocess, args)
    test.transform = preprocess
    rows = evaluate(clip, models, test, args)
    metrics.print_table(rows)
    if len(args.partial) > 1:
        rows += metrics.print_sweep(rows, args.partial, {
            TITLES[m]: [row_name(m, p, args) for p in args.partial] for m in args.matching})
    if args.gallery:
        last = [model for _, kind, model in models if kind == "method"][-1]
        data.write_gallery(test, scorer(last, args), args)
    return data.write_results("trm_ml", args, seconds, rows, test, begin)


def main(arguments=None):
    with data.command_line("trm_ml.py", clip_model.ClipError):
        args = parse_arguments(arguments)
        return predict(args) if args.predict else run(args)


if __name__ == "__main__":
    main()
