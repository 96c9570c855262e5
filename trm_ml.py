"""TRM-ML: multi-label recognition from images of which most labels are unknown.

Ma et al., "Text-Region Matching for Multi-Label Image Recognition with Missing Labels", ACM MM
2024 (arXiv 2407.18520). Of every training image a part of the labels is known to be present or
absent; nobody looked for the others. Both encoders of CLIP stay as they are.

 1. regions: label c asks the image's embeddings x, of the whole and of L locations, with its
    query q_c by cross-attention of H heads, at CLIP's temperature,
        S_c = softmax(q_c . key(x)),   a_c = S_c value(x),   Q_c = normalise(a_c + MLP(a_c));
 2. matching, one to one: l_c = s <Q_c, T_c> + b, with T_c the embedding of learned words and the
    label's name;
 3. known labels: asymmetric loss; unknown ones are left out;
 4. prototypes, V_c of the label's regions and T_c, estimate an unknown label by relations within
    and between categories, how near Q_c is to its own and how much nearer than to the others',
    and by zero-shot CLIP's probability p_c of the label,
        e_c = log(p_c / (1 - p_c))
              + mean over P in {V, T} of  <Q_c, P_c> / t + log softmax_c'(<Q_c, P_c'> / t)[c].
    If h positives must hide among a label's unknown entries, sorted by e_c, the first h / 2 become
    pseudo present, all after the first 2 h pseudo absent, by thresholds of the last epoch;
 5. contrast: among the prototypes of either modality, Q_c of a present label, pseudo ones too,
    must find its own, -log softmax_c'(<Q_c, P_c'> / t)[c], mean over P in {V, T};
 6. distillation of G_c = normalise(S_c x), which the saliency map pools: |Q_c - G_c|_1.

In the code S is saliency, Q query_level, G region_level, T texts, V visual, e estimates.

We had no full text, and the authors' repository has a README but no code (July 2024). The sources
are the paper's abstract [A], the caption of its figure 2 [F] and the abstract of the patent
application of the same title, CN119399505A, 2025 [P]:

    step               the sources say                          ours
    encoders           frozen [F]                               whole images, squeezed to a square
    texts T            learned prompts [A, F]                   16 words, shared by all labels
    regions S, Q       category queries, cross-attention, MLP   4 heads, start at CLIP's matching,
                       [F]; the map, query-level features [P]   the residual, LayerNorm
    matching           text with region, one to one [A]         that Q is classified, scale, bias
    known labels       -                                        asymmetric loss (DualCoOp's)
    prototypes V, T    visual and text ones [A], a memory [P]   running mean, temperature t
    pseudo labels      by relations within and between          e_c, CLIP's part in it, thresholds,
                       categories [A]                           the loss and its weight
    contrast           multimodal, of prototypes [A, P]         its form and weight
    distillation       of region- into query-level [P]          L1, over all labels, its weight

    python trm_ml.py --partial 0.3                 # toy world, nothing to download
    python trm_ml.py --predict photos/ --checkpoint runs/trm_ml-toy/best.pt --heatmap maps/
    python trm_ml.py --data coco --partial 0.1 0.3 0.5 0.7 0.9

In shapes: B images, L locations, C labels, T tokens, W text width, D joint embedding, H heads, R
runs, N images of a dataset, F of its full list. Targets: +1 present, -1 absent, 0 unknown.

Implementation details
 1. Attention starts as CLIP's own matching, in each head's share of the dimensions: its weights
    are the identity, the queries and V the labels' embeddings, the MLP's last layer 0. On the
    toy world an early version without the other losses ended at 36 mAP from a random start, at
    94 from this.
 2. Which entries are known is drawn over the full official list with the seeds of this line of
    work: every method and every --seed gets the same.
 3. Shares train side by side on images that are encoded once, and without augmentation once for
    all epochs (float16).
 4. The losses of known and of pseudo labels are sums over entries: from 90% to 10% known labels
    the first shrinks ninefold against the other terms.
 5. Zero-shot CLIP's rows see these embeddings too: whole, squeezed images of --image-size.
 6. 448 pixels, RN101, batch 32, 16 words and the asymmetric loss's numbers are DualCoOp's
    (NeurIPS 2022). AdamW at 1e-4 for 20 epochs, the shared words, flip, RandAugment and cutout
    are ours (DualCoOp: SGD at 2e-3 for 50, no flip).
"""
import argparse
import json
import math
import os
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms
from tqdm import tqdm

import clip_model
import data
import metrics
from data import UserError

NAME = "TRM-ML"  # of the rows in the table
# settings; the defaults of the command line, in arguments(), have their sources above
CONTEXT = 16  # learned words of a prompt; DualCoOp
HEADS = 4  # of the attention; ours
TEMPERATURE = 0.1  # t, of similarities with prototypes; ours
MOMENTUM = 0.9  # of the visual prototypes; ours
SURE_PRESENT, SURE_ABSENT = 0.5, 2.0  # ranks of the thresholds, times the hidden positives; ours
ESTIMATED = 20_000  # images of an epoch whose estimates set the thresholds, as memory allows; ours
WEIGHT_DECAY = 0.01  # ours
# labels that an image shows, on average; the benchmarks' as Cole et al. (CVPR 2021) have them
EXPECTED_POSITIVES = {"voc2007": 1.5, "voc2012": 1.5, "coco": 2.9, "nuswide81": 1.9, "cub": 31.4,
                      "toy": 2.7}
# what the toy world's small CLIP and 10,000 scenes ask for; ours
TOY = ("--clip toy-RN --image-size 128 --partial 0.3 --epochs 8 --batch-size 128 --lr 1e-3 "
       "--augment no --workers 0 --no-zero-shot")


# ---- model

class TRM(nn.Module):
    """What is trained: the prompt's context, queries, attention, MLP, scale and bias of the logits;
    and the visual prototypes and thresholds, which follow the training. All else is CLIP's own."""

    def __init__(self, clip, labels, per_label_context=False):
        super().__init__()
        # no part of the module's state: frozen, and not repeated in checkpoints
        object.__setattr__(self, "clip", clip.requires_grad_(False))
        # an x holds the place of a learned word
        tokens = clip.tokenize(["x " * CONTEXT + f"{label}." for label in labels])
        # end of text has the highest id; on the CPU, so that no GPU is waited for
        self.ends = tokens.argmax(dim=1)
        self.register_buffer("tokens", tokens[:, :self.ends.max() + 1], persistent=False)
        width, size = clip.text_projection.shape
        contexts = len(labels) if per_label_context else 1
        self.context = nn.Parameter(0.02 * torch.randn(contexts, CONTEXT, width))
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.bias = nn.Parameter(torch.tensor(0.05).logit())  # about one label in twenty is there
        self.mlp = nn.Sequential(
            nn.LayerNorm(size), nn.Linear(size, size), nn.GELU(), nn.Linear(size, size))
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)
        start = clip_model.zero_shot_embeddings(clip, labels)
        self.queries = nn.Parameter(start.clone())
        self.query, self.key, self.value, self.out = (nn.Linear(size, size) for _ in range(4))
        for layer in (self.query, self.key, self.value, self.out):  # change nothing at first
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.register_buffer("visual", start.clone())  # the prototypes V
        # thresholds of the estimates: nothing is sure yet
        self.register_buffer("sure_present", torch.full((len(labels),), torch.inf))
        self.register_buffer("sure_absent", torch.full((len(labels),), -torch.inf))
        self.to(clip.text_projection.device)

    def texts(self):
        """T, the labels' embeddings with the learned context: unit length, [C, D]."""
        def encode_texts(tokens, context, ends):
            words = self.clip.token_embedding(tokens)  # [c, T, W]
            words = torch.cat([words[:, :1], context, words[:, 1 + CONTEXT:]], dim=1)
            return F.normalize(self.clip.encode_prompts(words, ends).float(), dim=-1)

        context = self.context.expand(len(self.tokens), -1, -1)  # [C, 16, W]
        return clip_model.in_chunks(encode_texts, (self.tokens, context, self.ends))

    def forward(self, x, texts):
        """Embeddings [B, 1 + L, D], texts [C, D] -> logits [B, C]; query-level features [B, C, D],
        of unit length; saliency maps [B, C, 1 + L], which sum to 1 and say where a label looked."""
        q = self.query(self.queries).unflatten(-1, (HEADS, -1))  # [C, H, d]
        k = self.key(x).unflatten(-1, (HEADS, -1))  # [B, 1 + L, H, d]
        v = self.value(x).unflatten(-1, (HEADS, -1))
        saliency = torch.einsum("chd,blhd->bhcl", q, k)  # [B, H, C, 1 + L]
        saliency = (self.clip.logit_scale.exp() * saliency.float()).softmax(dim=-1)
        attended = torch.einsum("bhcl,blhd->bchd", saliency.to(v.dtype), v)
        attended = self.out(attended.flatten(2))  # [B, C, D]
        query_level = F.normalize((attended + self.mlp(attended)).float(), dim=-1)
        logits = self.log_scale.exp() * (query_level * texts).sum(dim=-1) + self.bias
        return logits.float(), query_level, saliency.mean(dim=1)

    @torch.no_grad()
    def update_prototypes(self, query_level, present):
        """Move the visual prototypes of labels that are present, bool [B, C], to their features."""
        means = F.normalize(torch.einsum("bc,bcd->cd", present.float(), query_level), dim=-1)
        moved = F.normalize(MOMENTUM * self.visual + (1 - MOMENTUM) * means, dim=-1)
        self.visual.copy_(moved.where(present.any(dim=0)[:, None], self.visual))

    @torch.no_grad()
    def calibrate(self, estimates, known, expected_positives):
        """Set each label's thresholds from estimates and known targets [N, C]: those of its unknown
        entries, sorted, at ranks of half and twice the positives that hide among them.

        Entries known at random have the unknown ones' share of positives; few of them say little,
        so one positive more is counted, among as many entries as have one on average. If fewer are
        known absent than present, it was not at random: then an image shows expected_positives, and
        the hidden ones are spread over labels as the known ones are, one more each."""
        estimates, known = estimates.cpu(), known.cpu()
        present, absent, unknown = ((known == sign).sum(dim=0) for sign in (1, -1, 0))
        if present.sum() < absent.sum():  # known at random
            share = present.sum() / (present + absent).sum()
            hidden = unknown * (present + 1) / (present + absent + 1 / share)
        else:
            all_hidden = (expected_positives * len(known) - present.sum()).clamp(min=0)
            hidden = all_hidden * (present + 1) / (present + 1).sum()
        for c in unknown.nonzero()[:, 0].tolist():
            ranked = estimates[known[:, c] == 0, c].sort(descending=True).values
            last = len(ranked) - 1
            self.sure_present[c] = ranked[min(int(SURE_PRESENT * hidden[c]), last)]
            self.sure_absent[c] = ranked[min(int(SURE_ABSENT * hidden[c]), last)]

    def pseudo_labels(self, estimates, known):
        """-> int8 [B, C]: +1 surely present, -1 surely absent; 0 in doubt, and where known."""
        sure = (estimates > self.sure_present).char() - (estimates < self.sure_absent).char()
        return sure * (known == 0)


# ---- images

def transforms_of(args):
    """-> transforms of training and of test images, RGB PIL images to float32 [3, h, w]: squeezed
    to a square, not cropped. In training a flip, RandAugment, and a quarter of the image cut out
    every other time."""
    bicubic = transforms.InterpolationMode.BICUBIC
    resize = transforms.Resize((args.image_size, args.image_size), bicubic)
    to_tensor = [transforms.ToTensor(), transforms.Normalize(clip_model.MEAN, clip_model.STD)]
    plain = transforms.Compose([resize, *to_tensor])
    if args.augment == "no":
        return plain, plain
    training = [resize, transforms.RandomHorizontalFlip(), transforms.RandAugment(), *to_tensor,
                transforms.RandomErasing(0.5, (0.25, 0.25), (1, 1))]
    return transforms.Compose(training), plain


def make_loader(dataset, args, shuffle=False):
    """Batches of (images [B, 3, H, W], targets)."""
    return DataLoader(dataset, args.batch_size, shuffle=shuffle, num_workers=args.workers,
                      pin_memory="cuda" in args.device)


@torch.no_grad()
def encode(clip, images, args):
    """Images [B, 3, H, W] -> unit-length embeddings [B, 1 + L, D]: the whole image, locations."""
    with data.autocast(args):
        global_, local = clip.encode_image_dense(images)
    return F.normalize(torch.cat([global_[:, None], local], dim=1).float(), dim=-1)


def embed(clip, dataset, args):
    """All images' embeddings, float16 [N, 1 + L, D] on the CPU, and their targets. Where an image
    cannot be read, both are another one's."""
    embeddings, first = None, 0
    loader = make_loader(dataset, args)
    for images, part in tqdm(loader, "embedding", leave=False, disable=args.quiet or None):
        x = encode(clip, images.to(args.device, non_blocking=True), args)
        if embeddings is None:
            embeddings = torch.empty(len(dataset), *x.shape[1:], dtype=torch.float16)
            targets = torch.empty(len(dataset), *part.shape[1:], dtype=part.dtype)
            if embeddings.nbytes > 2 ** 30:
                print(f"{embeddings.nbytes / 2 ** 30:.1f} GiB of embeddings stay in memory")
        embeddings[first:first + len(x)] = x
        targets[first:first + len(x)] = part
        first += len(x)
    return embeddings, targets


# ---- losses

@torch.no_grad()
def clip_log_odds(x, prompts, scale):
    """Of zero-shot CLIP's probabilities: embeddings [B, 1 + L, D], labels [C, D] -> [B, C]."""
    scores = metrics.zero_shot_scores(x, prompts, scale, {"": slice(None)})  # all labels compete
    return scores["zero-shot, as probabilities", ""].logit(eps=1e-6)


def asymmetric_loss(logits, targets, gamma_pos=1, gamma_neg=2, clip=0.05):
    """Ridnik et al. (ICCV 2021) over the known entries: their sum, mean over images, a scalar.

    logits float [B, C]; targets int8 [B, C], +1 present, -1 absent, 0 unknown, which adds nothing.
    With p = sigmoid(logit) and q = max(p - clip, 0): -(1 - p)^gamma_pos log p of a present and
    -q^gamma_neg log(1 - q) of an absent label; all 0: binary cross-entropy. The focusing weights
    are constants for the gradient, as in the loss's own code."""
    p = logits.sigmoid()
    q = (p - clip).clamp(min=0)
    # log(1 - p) by logsigmoid where nothing is shifted: 1 - p would round to 0
    log_absent = F.logsigmoid(-logits) if clip == 0 else torch.log1p(-q)
    present = (1 - p.detach()) ** gamma_pos * F.logsigmoid(logits) * (targets == 1)
    absent = q.detach() ** gamma_neg * log_absent * (targets == -1)
    return -(present + absent).sum() / len(logits)


def relations(query_level, prototypes):
    """Within and between categories: of query-level features [B, C, D] the similarity with their
    own label's prototype, and its log-probability among all labels' [C, D]: two tensors [B, C]."""
    own = (query_level * prototypes).sum(dim=-1) / TEMPERATURE
    among_all = (query_level @ prototypes.T / TEMPERATURE).logsumexp(dim=-1)  # over c'
    return own, own - among_all


def losses_of(model, x, known, log_odds, args):
    """Embeddings x [B, 1 + L, D], known targets [B, C], clip_log_odds [B, C] -> {term: weighted
    value}, "loss", their sum, first; and the estimates [B, C], None with --pseudo 0."""
    with data.autocast(args):
        texts = model.texts()
        logits, query_level, saliency = model(x, texts)
    terms, estimates = {"known": asymmetric_loss(logits, known)}, None
    present = known == 1
    own, contrast = relations(query_level, texts)
    if args.pseudo:
        model.update_prototypes(query_level, present)
        own_visual, contrast_visual = relations(query_level, model.visual)
        own, contrast = (own + own_visual) / 2, (contrast + contrast_visual) / 2
        estimates = log_odds + (own + contrast).detach()  # e_c
        pseudo = model.pseudo_labels(estimates, known)
        terms["pseudo"] = args.pseudo * asymmetric_loss(logits, pseudo)
        present = present | (pseudo == 1)
    if args.contrastive:
        # masked: to index those that are present, a GPU would be waited for
        mean = -(contrast * present).sum() / present.sum().clamp(min=1)
        terms["contrastive"] = args.contrastive * mean
    if args.distillation:
        region_level = F.normalize(saliency.detach().float() @ x, dim=-1)  # [B, C, D], G
        distance = (query_level - region_level).abs().sum(dim=-1).mean()
        terms["distillation"] = args.distillation * distance
    return {"loss": sum(terms.values()), **terms}, estimates


# ---- train

@dataclass
class Run:
    """One of the models that train side by side, with their own share of known labels."""
    name: str  # of its row in the table
    index: int  # of its known labels among an image's targets [R + 1, C]
    share: float  # of the labels that are known, 0 for a single positive
    output: str  # its folder
    model: nn.Module
    optimizer: torch.optim.Optimizer
    best: dict  # the weights of the best epoch
    log: list = field(default_factory=list)  # a dict an epoch


def make_run(index, clip, labels, known, args):
    """A model at its start or, with --resume, where it was left. known: int8 [N, C]."""
    name, output, share = NAME, args.output, args.partial[index]
    if args.single_positive:
        share = 0
    if len(args.partial) > 1:
        name, output = f"{NAME}, {100 * share:g}% known", f"{output}/partial-{share:g}"
    count = (known != 0).sum().item()
    if not count:
        raise UserError("none of the training labels is known: raise --partial or --limit")
    print(f"{name}: {count:,} training entries are known, {100 * count / known.numel():.3g}%")
    torch.manual_seed(args.seed)  # as if it were trained alone
    model = TRM(clip, labels, args.per_label_context)
    if not (known == -1).any():  # until there are thresholds, all that is unknown counts as absent
        model.sure_absent.fill_(torch.inf)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW([
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0}], lr=args.lr, fused=True)
    run = Run(name, index, share, output, model, optimizer, best={})
    if args.resume and os.path.exists(f"{output}/last.pt"):
        saved = data.read_checkpoint(f"{output}/last.pt", "trm_ml")
        if saved.get("share") != share:
            raise UserError(f"--resume: {output} is of another share of known labels: start anew")
        data.load_weights(model, clip, saved, labels, args)
        optimizer.load_state_dict(saved["optimizer"])
        run.best, run.log = saved["best"], saved["log"]
    return run


def learning_rate(epoch, peak, epochs):
    """Half a cosine from the peak to 0; epoch may be a fraction."""
    return peak * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def train(runs, clip, dataset, validation, state, args):
    """All runs, on the same batches. dataset, validation: an image's targets are [R + 1, C], what
    every run knows of it and, for the log alone, the truth. Every epoch seeds its own shuffling
    and augmentation, so a resumed run repeats the epoch it was killed in exactly."""
    first = min(len(run.log) for run in runs)  # they differ in a resumed sweep
    if first < args.epochs:
        prompts = clip_model.zero_shot_embeddings(clip, dataset.labels)
        if args.augment == "no":
            embedded = TensorDataset(*embed(clip, dataset, args))
            loader = DataLoader(embedded, args.batch_size, shuffle=True)
        else:
            loader = make_loader(dataset, args, shuffle=True)
        if validation is not None:  # once: they are not augmented
            held_out = embed(clip, validation, args)
    for epoch in range(first, args.epochs):
        torch.manual_seed(1_000_003 * args.seed + epoch)
        begin = time.time()
        here = [run for run in runs if len(run.log) == epoch]  # runs ahead wait
        totals = [0] * len(here)  # of the losses
        estimated = [[] for _ in here]  # of every batch estimates, known targets, the truth
        bar = tqdm(loader, f"epoch {epoch + 1}", leave=False, disable=args.quiet or None)
        for step, (x, targets) in enumerate(bar):
            lr = learning_rate(epoch + step / len(loader), args.lr, args.epochs)
            x = x.to(args.device, non_blocking=True)
            x = x.float() if args.augment == "no" else encode(clip, x, args)
            log_odds = clip_log_odds(x, prompts, clip.logit_scale.exp())
            targets = targets.to(args.device, non_blocking=True)  # [B, R + 1, C]
            for i, run in enumerate(here):
                known = targets[:, run.index]
                terms, estimates = losses_of(run.model, x, known, log_odds, args)
                for group in run.optimizer.param_groups:
                    group["lr"] = lr
                run.optimizer.zero_grad()
                terms["loss"].backward()
                run.optimizer.step()
                totals[i] = totals[i] + torch.stack([*terms.values()]).detach()
                if estimates is not None and step * args.batch_size < ESTIMATED:
                    truth = targets[:, -1].masked_fill(known != 0, 0)
                    estimated[i].append((estimates, known, truth))
            if step % 50 == 49 or step == len(loader) - 1:  # the only wait for the GPU
                means = [dict(zip(terms, (total / (step + 1)).tolist())) for total in totals]
                for run, mean in zip(here, means):
                    if not math.isfinite(mean["loss"]):
                        raise UserError(f"{run.name}, epoch {epoch + 1}, step {step + 1}: the loss "
                                        f"is not finite, {mean}; finished epochs are in "
                                        f"{run.output}: try a smaller --lr or --precision fp32")
        for run, mean, parts in zip(here, means, estimated):
            line = {"epoch": epoch + 1, **mean}
            if parts:
                estimates, known, truth = (torch.cat(part) for part in zip(*parts))
                line |= quality_of(run.model.pseudo_labels(estimates, known), truth)
                run.model.calibrate(estimates, known, args.expected_positives)
            line["seconds"] = time.time() - begin
            if dataset.replaced:
                line["unreadable_images"] = dataset.replaced
            val_mAP = math.nan if validation is None else validate(run, *held_out, args)
            if not math.isnan(val_mAP):
                line["val_mAP"] = val_mAP
            run.log.append(line)
            text = "  ".join(f"{name} {value:.4g}" for name, value in line.items())
            print(f"{run.name}  {text}", flush=True)
            save(run, state)
    for run in runs:
        run.model.load_state_dict(run.best)


def quality_of(pseudo, truth):
    """Precision and recall of pseudo labels that are present, {} where that is not known. Both int8
    [N, C]; truth: the true targets of unknown entries."""
    if not ((pseudo == 1) & (truth != 0)).any() or not (truth == 1).any():
        return {}
    quality = metrics.f1_at_threshold(pseudo.float(), truth, threshold=1)
    return {"pseudo_precision": quality["OP"], "pseudo_recall": quality["OR"]}


@torch.no_grad()
def validate(run, embeddings, targets, args):
    """mAP of the run's known labels on held-out images, by which the best epoch is chosen."""
    texts = run.model.texts()
    with data.autocast(args):
        scores = [run.model(x.to(args.device).float(), texts)[0].cpu()
                  for x in embeddings.split(args.batch_size)]
    return metrics.mean_average_precision(torch.cat(scores), targets[:, run.index])


def save(run, state):
    """The run so far: best.pt, of its best epoch; log.jsonl, curves.png, last.pt."""
    log, weights = run.log, run.model.state_dict()
    # without a score, nothing is above NaN: the last is the best
    last_mAP = log[-1].get("val_mAP", math.nan)
    if not any(line.get("val_mAP", math.nan) > last_mAP for line in log[:-1]):
        run.best = {name: value.clone() for name, value in weights.items()}
    state = {**state, "share": run.share, "log": log}
    data.write_file(f"{run.output}/best.pt", {**state, "model": run.best})
    data.write_file(f"{run.output}/log.jsonl", "".join(json.dumps(x) + "\n" for x in log))
    data.write_file(f"{run.output}/curves.png", metrics.draw_curves(log))
    state |= {"model": weights, "best": run.best, "optimizer": run.optimizer.state_dict()}
    data.write_file(f"{run.output}/last.pt", state)  # at the end, as --resume goes by it


# ---- evaluate

@torch.no_grad()
def table(models, names, clip, test, args):
    """-> the rows that a run ends with, {"name", "kind", metric: value in [0, 1], ...}: zero-shot
    CLIP's and one a model; and the models' scores in [0, 1], [N, C] each."""
    ks, playing, scale = (3, 5), metrics.in_play(test), clip.logit_scale.exp()
    prompts = clip_model.zero_shot_embeddings(clip, test.labels)
    texts = [model.texts() for model in models]

    def score(images):
        x = encode(clip, images, args)
        scores = metrics.zero_shot_scores(x, prompts, scale, playing)
        for name, model, text in zip(names, models, texts):
            with data.autocast(args):
                logits, _, _ = model(x, text)
            scores |= {(name, prefix): logits[:, index] for prefix, index in playing.items()}
        return scores

    scores = data.score_images(score, test, args.batch_size, args)
    rows = metrics.zero_shot_rows(scores, test, ks)
    rows += [metrics.table_row(name, "method", scores, test, ks) for name in names]
    return rows, [scores[name, [*playing][-1]].sigmoid() for name in names]  # of all labels


def average_of(rows, args):
    """Print the sweep's line as the papers have it, mAP by the share of known labels and the
    average; -> the average as a row."""
    metric = [name for name in rows[0] if name.endswith("mAP")][-1]
    average = {"name": f"{NAME}, average", "kind": "method"}
    for name in list(rows[0])[2:]:  # the metrics
        average[name] = sum(row[name] for row in rows) / len(rows)
    shares = "".join(f"{100 * share:7g}%" for share in args.partial)
    values = "".join(f"{100 * row[metric]:8.1f}" for row in [*rows, average])
    print(f"\n{metric + ' (%), known labels':30}{shares} average\n{NAME:30}{values}")
    return average


# ---- predict

@torch.no_grad()
def predict(saved, args):
    """--predict: a JSON line per image; with --heatmap where each label looked."""
    clip, _ = clip_model.load(args.clip, args.device)
    labels = saved["labels"]
    model = load_model(clip, saved, labels, args)
    _, preprocess = transforms_of(args)
    texts = model.texts()
    for paths, photos, images in data.photo_batches(args, preprocess):
        x = encode(clip, images.to(args.device), args)
        with data.autocast(args):
            logits, _, saliency = model(x, texts)
        scores = logits.sigmoid().cpu()
        maps = saliency[:, :, 1:].cpu()  # [B, C, L], without the whole image
        maps = maps / maps.amax(dim=2, keepdim=True) * scores[..., None]  # as bright as likely
        for prediction in zip(paths, photos, scores, maps):
            metrics.write_prediction(*prediction, labels, args, crop=0)


# ---- arguments

def arguments(argv=None):
    """-> what was asked for, and the state of the checkpoint to start from or None."""
    parser = argparse.ArgumentParser(
        usage="trm_ml.py [options]", description=__doc__.split("\n\nB images")[0],
        epilog=f"The docstring says whose the defaults are; --data toy has {TOY}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("--clip", default="RN101", help="CLIP's name for it or a path to weights")
    add("--image-size", type=data.at_least(32), default=448, help="pixels, square (448)")
    group = parser.add_argument_group("training")
    add = group.add_mutually_exclusive_group().add_argument
    add("--partial", type=float, nargs="+", default=[1.0], metavar="P",
        help="the share of label entries that is known; several are trained side by side")
    add("--single-positive", action="store_true", help="one present label an image is known")
    add, real = group.add_argument, data.at_least(0, float)
    add("--expected-positives", type=real, metavar="K",
        help="labels that an image shows, for --single-positive (the benchmark's, else 3)")
    add("--per-label-context", action="store_true", help="every label learns its own words")
    add("--epochs", type=data.at_least(1), default=20, help="passes over the images (20)")
    add("--batch-size", type=data.at_least(1), default=32, help="images (32)")
    add("--lr", type=real, default=1e-4, help="peak learning rate (1e-4)")
    add("--pseudo", type=real, default=0.1, help="weight of pseudo labels; 0 leaves them out (0.1)")
    add("--contrastive", type=real, default=0.2, help="its weight; 0 leaves it out (0.2)")
    add("--distillation", type=real, default=0.01, help="its weight; 0 leaves it out (0.01)")
    add("--augment", default="yes", choices=["yes", "no"], help="cutout, flip and RandAugment")
    add("--val-fraction", type=real, default=0.0, help="share held out, to select the epoch")
    add("--compile", action="store_true", help="torch.compile the image encoder")
    add("--resume", action="store_true", help="go on in --output; options typed now win")
    data.add_options(parser)  # --data, --limit, ..., --output, --seed, ..., --eval, --predict, ...
    args, saved, typed = data.parse(parser, argv, "trm_ml", TOY, {"batch_size", "compile"})
    if args.predict and not saved:
        parser.error("--predict needs a --checkpoint")
    if args.data == "openimages":
        parser.error("--data openimages: 43 GB of known labels a share are too many")
    if args.single_positive and "partial" in typed:
        parser.error("--partial: the run to resume knows a single positive of every image")
    if args.single_positive:
        args.partial = [1.0]
    if not 0 < min(args.partial) <= max(args.partial) <= 1:
        parser.error("--partial: shares above 0 and up to 1")
    if len(set(args.partial)) < len(args.partial):
        parser.error("--partial: every share once")
    if args.val_fraction >= 1 or (args.single_positive and args.val_fraction):
        parser.error("--val-fraction: below 1, and not with --single-positive, which knows no "
                     "absent label")
    if args.expected_positives is None:
        args.expected_positives = EXPECTED_POSITIVES.get(args.data, 3.0)
    return args, saved


# ---- main

def load_model(clip, saved, labels, args):
    """The model of a checkpoint."""
    model = TRM(clip, labels, args.per_label_context)
    data.load_weights(model, clip, saved, labels, args)
    return model


def main(argv=None):
    begin = time.time()
    args, saved = arguments(argv)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU: faster, 10 bits of mantissa
    if args.predict:
        return predict(saved, args)

    # data first: files may be missing
    dataset, test = data.load_splits(args, with_training=not args.eval)
    clip, _ = clip_model.load(args.clip, args.device)
    clip.check_labels(test.labels)
    if args.compile:
        clip.encode_image_dense = torch.compile(clip.encode_image_dense)
    training_transform, test.transform = transforms_of(args)

    if args.eval:
        models, names = [load_model(clip, saved, test.labels, args)], [NAME]
    else:
        state = {"method": "trm_ml", "args": vars(args), "clip_fingerprint": clip.fingerprint(),
                 "labels": test.labels}
        # over the full list, with the seeds of SST, SARB and HCP, and of Cole et al. (CVPR 2021)
        truth = dataset.full_targets
        known = [data.keep_partial(truth, share, seed=0) for share in args.partial]
        if args.single_positive:
            known = [data.keep_single_positive(truth, seed=1200)]
            if not args.pseudo:  # nothing estimates the others: they count as absent
                known = [known[0].where(known[0] == 1, -1)]
        runs = [make_run(i, clip, dataset.labels, targets[dataset.rows], args)
                for i, targets in enumerate(known)]
        # from here on an image's targets are what every run knows of it, then the truth
        dataset.full_targets = torch.stack([*known, truth], dim=1)  # [F, R + 1, C]
        dataset.transform = training_transform
        dataset, validation = dataset.hold_out(args.val_fraction, test.transform)
        data.write_file(f"{args.output}/args.json", json.dumps(vars(args), indent=1))
        with data.way_back(args.output):
            train(runs, clip, dataset, validation, state, args)
        models, names = [run.model for run in runs], [run.name for run in runs]

    rows, scores = table(models, names, clip, test, args)
    metrics.print_table(rows, test)
    if len(names) > 1:  # a sweep: every share's results beside its checkpoint, then the average
        zero_shot, swept = rows[:-len(runs)], rows[-len(runs):]
        for run, row, of_run in zip(runs, swept, scores):
            results = metrics.results("trm_ml", [*zero_shot, row], of_run, test, args,
                                      time.time() - begin)
            data.write_file(f"{run.output}/results.json", results)
        rows = [*rows, average_of(swept, args)]
        scores = [None]  # of the average there are none
    if args.output:
        results = metrics.results("trm_ml", rows, scores[-1], test, args, time.time() - begin)
        data.write_file(f"{args.output}/results.json", results)
        print(f"{time.time() - begin:.0f} s; results and checkpoints: {args.output}")
    return rows


if __name__ == "__main__":
    data.run(main, clip_model.ClipError)
