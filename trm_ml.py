"""TRM-ML: multi-label recognition from images of which most labels are unknown.

Ma et al., "Text-Region Matching for Multi-Label Image Recognition with Missing Labels", ACM MM
2024 (arXiv 2407.18520). Of every training image a part of the labels is known to be present or
absent; nobody looked for the others. Both encoders of CLIP stay as they are.

No code was published with the paper. Its abstract, the caption of its figure 2 and the abstract of
the patent application of the same title (CN119399505A, 2025) say that prompts, category queries,
one cross-attention and a simple MLP are trained, and what for. Every formula is our reading, (ours)
where no source has a word on it:

 1. regions: label c asks the image's embeddings x_1..x_L with its query q_c, by cross-attention,
        S_c = softmax(q_c K^T),   a_c = S_c V,   Q_c = normalise(a_c + MLP(LN(a_c))):
    S_c is the saliency map, Q_c the QUERY-LEVEL feature, which starts as CLIP's matching (ours);
 2. matching, one to one: l_c = s <Q_c, T_c> + b (ours: that Q_c is classified, not G_c), with T_c
    the embedding of 16 learned words and the name;
 3. known labels: asymmetric loss (ours; Ridnik et al., ICCV 2021); unknown ones are left out;
 4. prototypes V_c, the running mean of the query-level features of known positives, and T_c
    estimate an unknown label by relations within and between categories: how near Q_c is to its
    own prototypes and how much nearer than to the others' (ours),
        e_c = mean over P in {V, T} of  <Q_c, P_c> / t + log softmax_c'(<Q_c, P_c'> / t)[c];
    where e_c leaves no doubt it is a pseudo label (ours: the thresholds, from the label's share
    among known entries; and where no absent label is known, all unknown ones are pseudo-absent
    until the first thresholds);
 5. contrast: among the prototypes of either modality, Q_c of a present label must find its own,
        -log softmax_c'(<Q_c, P_c'> / t)[c], mean over P in {V, T};
 6. distillation of what the saliency map pools, the REGION-LEVEL feature G_c = normalise(S_c x),
    into the query-level one: |Q_c - G_c|_1.

    python trm_ml.py --partial 0.3                 # toy world, nothing to download
    python trm_ml.py --data coco --root data/coco --partial 0.1 0.3 0.5 0.7 0.9
    python trm_ml.py --predict photos/ --checkpoint runs/trm_ml-toy/best.pt --heatmap maps/

B images, L embeddings (the whole image, then locations), C labels, T tokens, W width, D joint
embedding, H heads. Targets: +1 present, -1 absent, 0 unknown.

Implementation details
 1. Attention starts as CLIP's own matching, in each head's share of the dimensions: its weights
    are the identity, the queries the labels' embeddings, the temperature CLIP's, the MLP's last
    layer 0. In a prototype on the toy world, the known labels' loss alone ended at 36 mAP from a
    random start, at 94 from this.
 2. Which entries are known is drawn over the full official list with the seeds of this line of
    work: every method and every --seed gets the same.
 3. The encoders are frozen: shares and matchings train side by side on images that are encoded
    once, and without augmentation once for all epochs (float16).
"""
import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms
from tqdm import tqdm

import clip_model
import data
import metrics
from data import UserError

# what the toy world's small CLIP and 10,000 scenes ask for; all other defaults are usual ones
TOY = ("--clip toy-RN --image-size 128 --matching image pixel region --partial 0.3 --epochs 8 "
       "--batch-size 128 --lr 1e-3 --augment no --workers 0 --no-zero-shot")
TITLES = {"image": "text-image matching", "pixel": "text-pixel matching", "region": "TRM-ML"}
TEMPLATES = ["a photo of a {}.", "a photo of the {}.", "a picture of a {}.", "a scene with a {}.",
             "there is a {} in the scene.", "a photo of a small {}.", "a photo of a large {}."]
CONTEXT, HEADS = 16, 4  # learned words of a prompt; attention heads
TEMPERATURE = 0.1  # t, of similarities with prototypes
MOMENTUM = 0.99  # of the visual prototypes
SURE_PRESENT, SURE_ABSENT = 0.5, 2.0  # ranks of the thresholds, times the hidden positives
# labels that an image shows, on average; the benchmarks' as Cole et al. (CVPR 2021) have them
EXPECTED_POSITIVES = {"voc2007": 1.5, "coco": 2.9, "nuswide81": 1.9, "cub": 31.4, "toy": 2.7}


# ---- model

class TRM(nn.Module):
    """CLIP, frozen, beside what is trained: the prompt's context, queries, attention, MLP, scale
    and bias of the logits; and the visual prototypes and thresholds, which follow the training.

    matching: what a label's text is matched with, "region", or for comparison the whole "image",
    or every "pixel" (location), weighted by a softmax of their similarities (as DualCoOp, NeurIPS
    2022). start: the labels' embeddings [C, D] that regions start from, by default CLIP's own."""

    def __init__(self, clip, labels, matching="region", per_label_context=False, start=None):
        super().__init__()
        self.clip, self.matching = clip.requires_grad_(False), matching
        # an x holds the place of a learned word
        try:
            tokens = clip.tokenize(["x " * CONTEXT + f"{label}." for label in labels])
        except clip_model.ClipError as error:
            raise UserError(f"a label behind {CONTEXT} learned words, x: {error}") from None
        self.eot = tokens.argmax(dim=1)  # the highest id; stays on the CPU, so no GPU is waited for
        self.register_buffer("tokens", tokens[:, :self.eot.max() + 1], persistent=False)
        width, size = clip.text_projection.shape
        contexts = len(labels) if per_label_context else 1
        self.context = nn.Parameter(0.02 * torch.randn(contexts, CONTEXT, width))
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.bias = nn.Parameter(torch.tensor(0.05).logit())  # about one label in twenty is there
        self.mlp = nn.Sequential(
            nn.LayerNorm(size), nn.Linear(size, size), nn.GELU(), nn.Linear(size, size))
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)
        if matching == "region":
            start = zero_shot_embeddings(clip, labels, TEMPLATES) if start is None else start
            self.queries = nn.Parameter(start.clone())
            self.query, self.key, self.value, self.out = (nn.Linear(size, size) for _ in range(4))
            for layer in (self.query, self.key, self.value, self.out):  # change nothing at first
                nn.init.eye_(layer.weight)
                nn.init.zeros_(layer.bias)
            self.register_buffer("visual", start.clone())  # the prototypes V
            self.register_buffer("sure_present", torch.full((len(labels),), torch.inf))
            self.register_buffer("sure_absent", torch.full((len(labels),), -torch.inf))
        self.to(clip.text_projection.device)

    def texts(self, chunk=256):
        """T, the labels' embeddings with the learned context: unit length, [C, D].

        Chunks of many labels are recomputed in the backward pass, which bounds the memory."""
        def encode(tokens, context, eot):
            words = self.clip.token_embedding(tokens)  # [c, T, W]
            words = torch.cat([words[:, :1], context, words[:, 1 + CONTEXT:]], dim=1)
            return F.normalize(self.clip.encode_prompts(words, eot).float(), dim=-1)

        context = self.context.expand(len(self.tokens), -1, -1)  # [C, 16, W]
        if len(context) <= chunk:
            return encode(self.tokens, context, self.eot)
        pieces = zip(*(x.split(chunk) for x in (self.tokens, context, self.eot)))
        return torch.cat([recompute(encode, *piece, use_reentrant=False) for piece in pieces])

    def refine(self, x):
        """The simple MLP, residual: [..., D] -> [..., D], unit length."""
        return F.normalize((x + self.mlp(x)).float(), dim=-1)

    def regions(self, x):
        """Embeddings [B, L, D] -> (query-level features [B, C, D], unit length; saliency maps
        [B, C, L], which sum to 1 and say where each label looked)."""
        query = self.query(self.queries).unflatten(-1, (HEADS, -1))  # [C, H, d]
        key = self.key(x).unflatten(-1, (HEADS, -1))  # [B, L, H, d]
        value = self.value(x).unflatten(-1, (HEADS, -1))
        saliency = torch.einsum("chd,blhd->bhcl", query, key)  # [B, H, C, L]
        saliency = (self.clip.logit_scale.exp() * saliency.float()).softmax(dim=-1)
        attended = torch.einsum("bhcl,blhd->bchd", saliency.to(value.dtype), value)
        return self.refine(self.out(attended.flatten(2))), saliency.mean(dim=1)

    def forward(self, x, texts):
        """Embeddings [B, L, D], texts [C, D] -> logits [B, C], and what regions(x) gives."""
        features = saliency = None
        if self.matching == "region":
            features, saliency = self.regions(x)
            similarity = (features * texts).sum(dim=-1)
        elif self.matching == "image":
            similarity = self.refine(x[:, 0]) @ texts.T
        else:
            pixels = self.refine(x[:, 1:]) @ texts.T  # [B, L, C]
            weights = (self.clip.logit_scale.exp() * pixels).softmax(dim=1)
            similarity = (weights * pixels).sum(dim=1)
        return self.log_scale.exp() * similarity + self.bias, features, saliency

    @torch.no_grad()
    def update_prototypes(self, features, present):
        """Move the visual prototypes of the labels present, bool [B, C], towards their features."""
        means = F.normalize(torch.einsum("bc,bcd->cd", present.float(), features), dim=-1)
        moved = F.normalize(MOMENTUM * self.visual + (1 - MOMENTUM) * means, dim=-1)
        self.visual.copy_(moved.where(present.any(dim=0)[:, None], self.visual))

    @torch.no_grad()
    def calibrate(self, estimates, known, expected_positives):
        """Set each label's thresholds from an epoch's estimates and known targets [N, C]: those of
        its unknown entries, sorted, at ranks of half and twice the positives hidden among them.
        Entries known at random have the unknown ones' share of positives. If fewer are known absent
        than present, it was not at random: then an image shows expected_positives, and the hidden
        ones are spread over labels as the known ones are. Known ones do not rank: they are fitted.
        A label without a known positive gets no pseudo labels."""
        positives, negatives = (known == 1).sum(dim=0), (known == -1).sum(dim=0)
        count = (known == 0).sum(dim=0)
        if positives.sum() < negatives.sum():
            hidden = count * positives / (positives + negatives).clamp(min=1)
        else:
            in_all = (expected_positives * len(known) - positives.sum()).clamp(min=0)
            hidden = in_all * positives / positives.sum().clamp(min=1)
        ranked = estimates.masked_fill(known != 0, -torch.inf).sort(dim=0, descending=True).values
        usable = (positives > 0) & (count > 0)
        for threshold, factor, never in ((self.sure_present, SURE_PRESENT, torch.inf),
                                         (self.sure_absent, SURE_ABSENT, -torch.inf)):
            rank = (factor * hidden).long().clamp(max=count - 1).clamp(min=0)
            threshold.copy_(ranked.gather(0, rank[None])[0].where(usable, never))

    def pseudo_labels(self, estimates, known):
        """-> int8 [B, C]: +1 surely present, -1 surely absent; 0 in doubt, and where known."""
        sure = (estimates > self.sure_present).char() - (estimates < self.sure_absent).char()
        return sure * (known == 0)

    def trained(self):
        """The state that training changes; CLIP's own weights are not repeated in checkpoints."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("clip.")}

    def load_trained(self, weights):
        """Take weights as trained() gives them."""
        clip = {k: v for k, v in self.state_dict().items() if k.startswith("clip.")}
        try:
            self.load_state_dict({**clip, **weights})
        except RuntimeError as error:
            raise UserError(f"the checkpoint is of another kind of model: {error}") from None


@torch.no_grad()
def zero_shot_embeddings(clip, labels, templates):
    """CLIP's own embeddings of the labels, the mean over templates: unit length, [C, D]."""
    total = 0
    for template in templates:
        tokens = clip.tokenize([template.format(label) for label in labels])
        texts = clip.encode_text(tokens.to(clip.text_projection.device))
        total = total + F.normalize(texts.float(), dim=-1)
    return F.normalize(total, dim=-1)


@torch.no_grad()
def encode(clip, images, args):
    """Images [B, 3, H, W] -> unit-length embeddings [B, 1 + L, D]: the whole image, locations."""
    with autocast(args):
        images = images.to(args.device, non_blocking=True)
        # value_path: a ViT's patches localise better
        global_, local = clip.encode_image_dense(images, value_path=True)
    return F.normalize(torch.cat([global_[:, None], local], dim=1).float(), dim=-1)


def embed(clip, dataset, args):
    """All images' embeddings, float16 [N, 1 + L, D] on the CPU, and their targets; both are another
    image's where one cannot be read."""
    bar = tqdm(make_loader(dataset, args), "embedding", leave=False, disable=args.quiet or None)
    parts = [(encode(clip, images, args).half().cpu(), targets) for images, targets in bar]
    return [torch.cat(part) for part in zip(*parts)]


# ---- augmentation

def augmentation(preprocess):
    """preprocess with a flip, RandAugment, and a quarter of the image cut out every other time."""
    resize, to_rgb, to_tensor, normalize = preprocess.transforms
    return transforms.Compose([
        resize, transforms.RandomHorizontalFlip(), to_rgb, transforms.RandAugment(), to_tensor,
        normalize, transforms.RandomErasing(0.5, scale=(0.25, 0.25), ratio=(1, 1))])


# ---- losses

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


def batch_loss(model, x, known, args):
    """Embeddings x [B, L, D] with known targets [B, C] -> {term: weighted value} of the loss, and
    the estimates [B, C] of unknown labels, None without prototypes."""
    with autocast(args):
        texts = model.texts()
        logits, features, saliency = model(x, texts)
    logits = logits.float()
    terms, estimates = {"known": asymmetric_loss(logits, known)}, None
    if features is None:
        return terms, estimates
    present, modalities = known == 1, [texts]
    if args.pseudo:
        model.update_prototypes(features, present)
        modalities = [model.visual, texts]
    cosine = log_softmax = 0  # [B, C], means over the modalities of the two terms of e_c
    for prototypes in modalities:
        matched = (features * prototypes).sum(dim=-1) / TEMPERATURE
        among_all = (features @ prototypes.T / TEMPERATURE).logsumexp(dim=-1)  # over c'
        cosine = cosine + matched / len(modalities)
        log_softmax = log_softmax + (matched - among_all) / len(modalities)
    if args.pseudo:
        estimates = (cosine + log_softmax).detach()  # e_c
        pseudo = model.pseudo_labels(estimates, known)
        terms["pseudo"] = args.pseudo * asymmetric_loss(logits, pseudo)
        present = present | (pseudo == 1)
    if args.contrastive:
        # of all labels, masked: a list of those that are present would be waited for on a GPU
        contrast = -(log_softmax * present).sum() / present.sum().clamp(min=1)
        terms["contrastive"] = args.contrastive * contrast
    if args.distillation:
        # [B, C, L] @ [B, L, D]: the region-level features teach, the query-level ones learn
        region_level = F.normalize(saliency.detach().float() @ x, dim=-1)
        distance = (features - region_level).abs().sum(dim=-1).mean()
        terms["distillation"] = args.distillation * distance
    return terms, estimates


# ---- train

def make_loader(dataset, args, shuffle=False):
    """Batches of (images [B, 3, H, W], targets)."""
    return DataLoader(dataset, args.batch_size, shuffle=shuffle, num_workers=args.workers,
                      pin_memory="cuda" in args.device)


def make_runs(clip, dataset, args):
    """-> what is trained side by side, a namespace for every share of known labels and matching:
    the name and kind ("method" or "ablation") of its row in the table, its folder (output), the
    labels known to it (int8 [F, C], of the full list), model, optimizer, log (a dict an epoch)."""
    runs = []
    start = zero_shot_embeddings(clip, dataset.labels, TEMPLATES)
    for partial in args.partial:
        known = dataset.full_targets  # before missing or unused images are left out
        if partial == "single positive":
            known = data.keep_single_positive(known, seed=1200)  # Cole et al., CVPR 2021
        else:
            known = data.keep_partial(known, partial, seed=0)  # SST, SARB, HCP
        if not known[dataset.rows].any():
            raise UserError("none of the training labels is known: raise --partial or --limit")
        known = known.to(args.device)
        for matching in args.matching:
            run = SimpleNamespace(name=TITLES[matching], kind="method", output=args.output)
            if len(args.partial) > 1:
                run.name += f", {100 * partial:g}% known"
                run.output += f"/partial-{partial:g}"
            if matching != args.matching[-1]:
                run.kind = "ablation"
                run.output += f"/{matching}"
            torch.manual_seed(args.seed)  # as if it were trained alone
            model = TRM(clip, dataset.labels, matching, args.per_label_context, start)
            if matching == "region" and not (known[dataset.rows] == -1).any():
                model.sure_absent.fill_(torch.inf)  # absent, until there are estimates
            optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)
            run.known, run.model, run.optimizer, run.log = known, model, optimizer, []
            if args.resume and os.path.exists(f"{run.output}/last.pt"):
                saved = data.read_checkpoint(f"{run.output}/last.pt", "trm_ml")
                model.load_trained(saved["model"])
                optimizer.load_state_dict(saved["optimizer"])
                run.log = saved["log"]
            runs.append(run)
    return runs


def train(runs, clip, dataset, validation, truth, state, args):
    """All runs, on the same batches.

    dataset, validation: (image, row) pairs. A run trains on run.known[row]; truth[row] is for the
    log alone; both int8 [F, C]. Every epoch seeds its own shuffling and augmentation, so a resumed
    run repeats the epoch it was killed in exactly."""
    truth = truth.to(args.device)
    loader = make_loader(dataset, args, shuffle=True)
    first = min(len(run.log) for run in runs)  # they differ in a resumed sweep
    if args.augment == "no" and first < args.epochs:
        embedded = TensorDataset(*embed(clip, dataset, args))
        loader = DataLoader(embedded, args.batch_size, shuffle=True)
    if validation is not None and first < args.epochs:
        held_out, held_out_rows = embed(clip, validation, args)  # once: they are not augmented
    for epoch in range(first, args.epochs):
        unfinished = [run for run in runs if len(run.log) == epoch]
        torch.manual_seed(1_000_003 * args.seed + epoch)
        begin = time.time()
        for run in unfinished:
            run.total = 0  # of the losses
            run.estimated = []  # estimates, known targets and hidden ones of every batch
        bar = tqdm(loader, f"epoch {epoch + 1}", leave=False, disable=args.quiet or None)
        for step, (images, rows) in enumerate(bar):
            progress = (epoch + step / len(loader)) / args.epochs
            lr = args.lr * 0.5 * (1 + math.cos(math.pi * progress))
            x = images if args.augment == "no" else encode(clip, images, args)
            x = x.to(args.device, non_blocking=True).float()
            rows = rows.to(args.device, non_blocking=True)
            for run in unfinished:
                known = run.known[rows]
                terms, estimates = batch_loss(run.model, x, known, args)
                losses = torch.stack([sum(terms.values()), *terms.values()])
                run.optimizer.param_groups[0]["lr"] = lr
                run.optimizer.zero_grad()
                losses[0].backward()
                run.optimizer.step()
                run.total = run.total + losses.detach()
                if estimates is not None and step * args.batch_size < 20_000:  # bounds memory
                    hidden = truth[rows].masked_fill(known != 0, 0)
                    run.estimated.append((estimates, known, hidden))
                if step % 50 == 49 or step == len(loader) - 1:  # the only wait for the GPU
                    mean = run.total / (step + 1)
                    run.means = dict(zip(["loss", *terms], mean.tolist()))
                    if not math.isfinite(run.means["loss"]):
                        raise UserError(f"{run.name}, epoch {epoch + 1}, step {step + 1}: the loss "
                                        f"is not finite, {run.means}; finished epochs are in "
                                        f"{run.output}: try a smaller --lr or --precision fp32")
        for run in unfinished:
            line = {"epoch": epoch + 1, **run.means}
            if run.estimated:
                estimates, known, hidden = (torch.cat(parts) for parts in zip(*run.estimated))
                pseudo = run.model.pseudo_labels(estimates, known).float()
                quality = metrics.f1_at_threshold(pseudo, hidden, threshold=1)
                if ((pseudo == 1) & (hidden != 0)).any() and (hidden == 1).any():
                    line |= {"pseudo_precision": quality["OP"], "pseudo_recall": quality["OR"]}
                if epoch + 1 >= args.epochs // 2:  # until then prototypes do not mean enough
                    run.model.calibrate(estimates, known, args.expected_positives)
            line["seconds"] = time.time() - begin
            if dataset.replaced:
                line["unreadable_images"] = dataset.replaced
            if validation is not None:
                known = run.known[held_out_rows.to(args.device)]
                with torch.no_grad(), autocast(args):
                    texts = run.model.texts()
                    logits = [run.model(x.to(args.device).float(), texts)[0].float()
                              for x in held_out.split(args.batch_size)]
                line["val_mAP"] = metrics.mean_average_precision(torch.cat(logits), known)
            print(run.name, *(f"{name} {value:.4g}" for name, value in line.items()), sep="  ",
                  flush=True)
            run.log.append(line)
            checkpoint = {**state, "matching": run.model.matching, "model": run.model.trained(),
                          "optimizer": run.optimizer.state_dict(), "log": run.log}
            best = max(x.get("val_mAP", 0) for x in run.log)
            if not line.get("val_mAP", 0) < best:  # without --val-fraction, or NaN: always
                data.write_file(f"{run.output}/best.pt", checkpoint)
            lines = "".join(json.dumps(x) + "\n" for x in run.log)
            data.write_file(f"{run.output}/log.jsonl", lines)
            data.write_file(f"{run.output}/curves.png", metrics.draw_curves(run.log))
            data.write_file(f"{run.output}/last.pt", checkpoint)  # at the end: the epoch is done
    for run in runs:
        best = data.read_checkpoint(f"{run.output}/best.pt", "trm_ml")
        run.model.load_trained(best["model"])


# ---- evaluate

@torch.no_grad()
def table(runs, clip, test, args):
    """-> the rows that a run ends with: {"name", "kind", metric: value in [0, 1], ...}."""
    ks = (10, 20) if test.name == "openimages" else (3, 5)
    labels = zero_shot_embeddings(clip, test.labels, TEMPLATES)
    texts = [run.model.texts() for run in runs]
    parts = []
    bar = tqdm(make_loader(test, args), "scoring", leave=False, disable=args.quiet or None)
    for images, _ in bar:
        x = encode(clip, images, args)
        with autocast(args):
            scores = [x[:, 0] @ labels.T, (x[:, 1:] @ labels.T).amax(dim=1)]  # [B, L, C] -> [B, C]
            scores += [run.model(x, text)[0] for run, text in zip(runs, texts)]
        parts.append([matrix.float().cpu() for matrix in scores])
    whole, best, *scores = (torch.cat(matrices) for matrices in zip(*parts))
    rows = metrics.zero_shot_rows(whole, best, test, ks)
    for run, matrix in zip(runs, scores):
        rows.append(metrics.table_row(run.name, run.kind, matrix, test, ks))
    return rows


def print_sweep(rows, args):
    """A line per matching, as the papers print it: mAP by the share of known labels, and the
    average. -> rows of the averages."""
    metric = [name for name in rows[-1] if name.endswith("mAP")][-1]
    shares = "".join(f"{100 * share:7g}%" for share in args.partial)
    print(f"\n{metric + ' (%), known labels':30}{shares} average")
    averages = []
    for matching in args.matching:
        swept = [row for row in rows if row["name"].startswith(f"{TITLES[matching]}, ")]
        average = {**swept[0], "name": f"{TITLES[matching]}, average"}
        for name in list(average)[2:]:  # the metrics
            average[name] = sum(row[name] for row in swept) / len(swept)
        averages.append(average)
        values = "".join(f"{100 * row[metric]:8.1f}" for row in [*swept, average])
        print(f"{TITLES[matching]:30}{values}")
    return averages


# ---- predict

@torch.no_grad()
def predict(clip, model, preprocess, labels, args):
    """--predict: a JSON object per image, {"path", "labels": [{"label", "score"}, ...]}."""
    if args.heatmap and model.matching != "region":
        raise UserError(f"--heatmap: --matching {model.matching} looks nowhere in particular")
    texts = model.texts()
    for path, photo in data.open_images(args.predict):
        x = encode(clip, preprocess(photo)[None], args)
        with autocast(args):
            logits, _, saliency = model(x, texts)
        scores = logits[0].float().sigmoid().tolist()
        best = sorted(range(len(labels)), key=lambda i: -scores[i])[:args.top]
        predicted = [{"label": labels[i], "score": round(scores[i], 4)} for i in best
                     if args.threshold is None or scores[i] >= args.threshold]
        print(json.dumps({"path": str(path), "labels": predicted}), flush=True)
        if args.heatmap:
            maps = saliency[0, :, 1:].cpu()  # [C, L], without the whole image
            maps = maps.unflatten(1, (math.isqrt(maps.shape[1]), -1))  # [C, h, w]
            shown = [(*line.values(), maps[i]) for i, line in zip(best, predicted[:3])]
            name = str(path).strip("./").replace(os.sep, "_")
            picture = metrics.draw_heatmaps(photo, shown, whole=True)
            data.write_file(f"{args.heatmap}/{name}.png", picture)


# ---- arguments

def arguments(argv=None):
    """-> what was asked for, and the state of the checkpoint to start from or None."""
    parser = argparse.ArgumentParser(
        usage="trm_ml.py [options]", description=__doc__.split("\n\nB images")[0],
        epilog=f"Defaults are usual in this line of work; --data toy has {TOY}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("known labels")
    add = group.add_mutually_exclusive_group().add_argument
    add("--partial", type=float, nargs="+", default=[1.0], metavar="P",
        help="the share of label entries that is known; several are trained side by side")
    add("--single-positive", dest="partial", action="store_const", const=["single positive"],
        help="of every image one present label is known")
    group.add_argument("--expected-positives", type=float, metavar="K",
        help="labels that an image shows, for --single-positive (the benchmark's, else 3)")
    add = parser.add_argument_group("model").add_argument
    add("--clip", default="RN101", help="CLIP's name for it or a path to weights")
    add("--image-size", type=int, default=448, help="pixels, square; nothing is cropped (448)")
    add("--matching", nargs="+", default=["region"], choices=list(TITLES),
        help="what texts are matched with; several: one model each, the last is the run's")
    add("--per-label-context", action="store_true", help="every label learns its own context")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=20, help="passes over the training images (20)")
    add("--batch-size", type=int, default=32, help="images (32)")
    add("--lr", type=float, default=1e-4, help="peak learning rate (1e-4)")
    add("--pseudo", type=float, default=0.1, help="weight of pseudo labels; 0: no prototypes")
    add("--contrastive", type=float, default=0.2, help="its weight; 0 leaves it out (0.2)")
    add("--distillation", type=float, default=0.01, help="its weight; 0 leaves it out (0.01)")
    add("--augment", default="yes", choices=["yes", "no"], help="cutout, flip and RandAugment")
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
    add("--compile", action="store_true", help="torch.compile the regions")
    add("--seed", type=int, default=0)
    add("--output", metavar="DIR", help="the run's folder (runs/trm_ml-DATA)")
    add("--resume", action="store_true", help="go on in --output; options typed now win")
    add("--quiet", action="store_true", help="no progress bars")
    add = parser.add_argument_group("a trained model").add_argument
    add("--eval", metavar="FILE", help="evaluate this checkpoint instead of training")
    add("--predict", nargs="+", metavar="IMAGE", help="images, folders or quoted patterns")
    add("--checkpoint", metavar="FILE", help="the trained model for --predict")
    add("--top", type=int, default=5, help="labels to predict, the best ones (5)")
    add("--threshold", type=float, help="the least probability of a label to predict")
    add("--heatmap", metavar="DIR", help="a picture per image of where its best labels were seen")

    args = parser.parse_args(argv)
    if bool(args.predict) != bool(args.checkpoint):
        parser.error("--predict and --checkpoint FILE go together")
    output = args.output or f"runs/trm_ml-{args.data}"  # of a training run
    start, saved = args.checkpoint or args.eval, None
    if args.resume and not start:  # of a sweep the newest, which has the sweep's last arguments
        checkpoints = Path(output).rglob("last.pt")
        start = max(checkpoints, key=os.path.getmtime, default=f"{output}/last.pt")
    if start:  # its run's options; what is typed wins
        saved = data.read_checkpoint(start, "trm_ml")
        saved["args"] |= {"output": args.output, "device": args.device, "resume": args.resume}
        args = parser.parse_args(argv, argparse.Namespace(**saved["args"]))
    elif args.data == "toy":
        args = parser.parse_args(argv, parser.parse_args(TOY.split()))
    if not (args.predict or args.eval):
        args.output = output
    if min(args.batch_size, args.top, args.epochs) < 1 or args.image_size < 32:
        parser.error("--batch-size, --top, --epochs: at least 1; --image-size: 32")
    if min(args.lr, args.pseudo, args.contrastive, args.distillation, args.seed) < 0:
        parser.error("--lr, --pseudo, --contrastive, --distillation, --seed: not below 0")
    if not 0 <= args.val_fraction < 1:
        parser.error("--val-fraction must be at least 0 and below 1")
    single_positive = args.partial == ["single positive"]
    if single_positive and args.val_fraction:
        parser.error("--single-positive knows no absent label: no --val-fraction")
    if not single_positive and not 0 < min(args.partial) <= max(args.partial) <= 1:
        parser.error("--partial: shares above 0 and up to 1")
    args.expected_positives = args.expected_positives or EXPECTED_POSITIVES.get(args.data, 3.0)
    return args, saved


# ---- main

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
        if any(Path(args.output).rglob("last.pt")) and not args.resume:
            raise UserError(f"{args.output} holds a run: --resume it or name another --output")

    torch.set_float32_matmul_precision("high")  # TF32 on a GPU: faster, 10 bits of mantissa

    # model
    clip, preprocess = clip_model.load(args.clip, args.device)
    bicubic = transforms.InterpolationMode.BICUBIC
    resize = transforms.Resize((args.image_size, args.image_size), bicubic)  # squeezed, not cropped
    preprocess = transforms.Compose([resize, *preprocess.transforms[2:]])
    state = {"method": "trm_ml", "args": vars(args), "clip_fingerprint": clip.fingerprint(),
             "labels": None if args.predict else test.labels}
    if saved:
        if saved["clip_fingerprint"] != state["clip_fingerprint"]:
            raise UserError(f"the checkpoint belongs to another CLIP than --clip {args.clip}")
        if saved["labels"] != state["labels"] and not args.predict:
            raise UserError(f"the checkpoint was trained for other labels than {args.data} has")
    if args.predict or args.eval:
        model = TRM(clip, saved["labels"], saved["matching"], args.per_label_context,
                    start=saved["model"].get("visual"))  # spares CLIP's own, all is loaded anyway
        model.load_trained(saved["model"])
        runs = [SimpleNamespace(name=TITLES[model.matching], kind="method", model=model)]
    else:
        runs = make_runs(clip, dataset, args)
    if args.compile:
        for run in runs:
            run.model.regions = torch.compile(run.model.regions)
    if args.predict:
        return predict(clip, model, preprocess, saved["labels"], args)

    # train
    test.transform = preprocess
    if not args.eval:
        truth = dataset.full_targets
        shares = [(run.known != 0).float().mean().item() for run in runs]
        shares = ", ".join(dict.fromkeys(f"{100 * share:.3g}%" for share in shares))
        print(f"{args.data}: {len(dataset):,} training images, {len(dataset.labels)} labels, "
              f"{shares} of the entries known; {len(test):,} test images", flush=True)
        # runs know different labels: from here on dataset[i] is (image, its row in run.known)
        dataset.full_targets = torch.arange(len(truth))
        dataset.transform = augmentation(preprocess) if args.augment == "yes" else preprocess
        dataset, validation = dataset.hold_out(args.val_fraction, preprocess)
        data.write_file(f"{args.output}/args.json", json.dumps(vars(args), indent=1))
        train(runs, clip, dataset, validation, truth, state, args)

    # evaluate
    rows = table(runs, clip, test, args)
    metrics.print_table(rows)
    if len(args.partial) > 1 and not args.eval:
        rows += print_sweep(rows, args)
    if test.missing:
        print(f"{test.missing} test images are missing: not comparable with complete results")
    if args.output:
        results = {"method": "trm_ml", "data": args.data, "clip": args.clip, "seed": args.seed,
                   "seconds": round(time.time() - begin), "rows": rows}
        data.write_file(f"{args.output}/results.json", json.dumps(results, indent=1))
        print(f"{results['seconds']} s; results and checkpoints: {args.output}")
    return rows


if __name__ == "__main__":
    try:
        main()
    except (UserError, clip_model.ClipError) as error:
        print(f"trm_ml.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; a training run goes on with --resume")
