"""CoMC: a multi-label image classifier that is trained on sentences alone.

Liu et al., "Language-driven Cross-modal Classifier for Zero-shot Multi-label Image Recognition",
ICML 2024. CLIP puts texts and images into one space, so that a classifier of text embeddings also
classifies images:

 1. texts: a language model, or a grammar, is told which labels to write about, so that every
    sentence comes with its targets;
 2. classifier: one linear layer on unit-length text embeddings plus Gaussian noise, which makes
    it tolerant of the gap between texts and images;
 3. ranking: every present label p above every absent one n, the sum over pairs of
        max(0, 1 - l_p + l_n),  l the logits;
 4. mapping: at test time an image embedding e is drawn towards the texts by what it is as a
    mixture of the labels' embeddings M [C, D] (memory),
        m(e) = normalise(softmax(e M^T / 0.01) M),   f(e) = 0.7 e + 0.3 m(e);
 5. two streams: the logits of the whole image and of its best locations, averaged.

    python lang_cls.py                                     # toy world, nothing to download
    python lang_cls.py --labels "owl, ice cream, traffic light" --output runs/mine  # no data set
    python lang_cls.py --predict photos/ --checkpoint runs/mine/last.pt
    python lang_cls.py --data coco --texts texts.jsonl     # sentences of a language model, which
                                                           # tools/generate_texts.py has written

B images, L locations, C labels, D joint embedding. Targets: +1 present, -1 absent, 0 unknown.

Implementation details
 1. The text tower is frozen: every distinct text is embedded once and kept on disk. What trains
    is a matrix, for seconds; several GPUs would have nothing to do.
 2. A ranking pair needs a present label: [present labels, C] margins, never [B, C, C].

What we follow is the authors' released code. Where this differs from it
 1. Sentences come from a built-in grammar unless --texts names a file. Theirs are published as
    pickled token ids, which are not read. The 36 prompt templates are our own.
 2. The optimiser in their release has made 4,200 steps, which takes about 100,000 sentences
    (--sentences 100000); their generator, and our default, makes 40,000.
 3. The last epoch is reported. They select one on the test images.
"""
import argparse
import json
import math
import re
import time
from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import clip_model
import data
import metrics
from data import UserError
from toy.grammar import fill_template, plural, sentences_about  # for labels of any kind

# settings; the defaults of the command line, in arguments(), are the authors' code's too
MARGIN = 1.0  # of the ranking loss; authors' code
TEMPERATURE = 0.01  # of the mapping; authors' code
FIRST_LR = 1e-5  # of the first epoch, which warms up; authors' code
WEIGHT_DECAY = 5e-4  # authors' code
PLAIN_COPIES = 9  # of "a photo of a {}.", beside all templates; authors' code
TEMPLATES = [  # in the spirit of OpenAI's 80 for ImageNet, which the authors use; ours
    "a photo of a {}.", "a photo of the {}.", "a photo with a {}.", "a scene with a {}.",
    "a picture of a {}.", "a snapshot of a {}.", "a close-up of a {}.", "a drawing of a {}.",
    "a painting of a {}.", "a sketch of a {}.", "a rendering of a {}.", "a cartoon of a {}.",
    "a good photo of a {}.", "a bad photo of a {}.", "a blurred photo of a {}.",
    "a sharp photo of a {}.", "a dark photo of a {}.", "a bright photo of a {}.",
    "a grainy photo of a {}.", "a cropped photo of a {}.", "a faded photo of a {}.",
    "a colorful photo of a {}.", "a tilted photo of a {}.", "a low-resolution photo of a {}.",
    "a black-and-white photo of a {}.", "a photo of a {} at night.", "a photo of a {} by day.",
    "a photo of a {} indoors.", "a photo of a {} outdoors.", "a photo of a {} in the background.",
    "a photo of a {} in the foreground.", "a photo of a {} among other things.",
    "a photo of a {} seen from above.", "a photo of a {} seen from afar.",
    "a photo of a {} at the edge.", "a photo of a {} half hidden."]
# names that texts use for the same label
SYNONYMS = [group.split(", ") for group in (
    "person, man, woman, boy, girl, child, player, rider, human",
    "airplane, aeroplane, air plane, plane, jet", "boat, ship", "bicycle, bike",
    "motorcycle, motorbike, motor bike, motor cycle", "car, automobile", "couch, sofa",
    "refrigerator, fridge", "ocean, sea", "tv, television, tv monitor, tvmonitor",
    "cell phone, mobile phone, smartphone, phone", "dining table, diningtable, table",
    "potted plant, pottedplant", "donut, doughnut", "hair drier, hair dryer, blow dryer")]
# what the toy world's small CLIP asks for (the learning rate was chosen on scenes of their own,
# not on the test scenes); ours
TOY = "--clip toy-RN --lr 5e-3 --workers 0 --no-zero-shot"


# ---- model

def map_to_text(embeddings, memory, temperature=TEMPERATURE):
    """Cross-modal mapping: unit-length embeddings float [..., D] as mixtures of the labels' text
    embeddings, memory float [C, D], unit length too -> [..., D], unit length."""
    mixture = (embeddings @ memory.T / temperature).softmax(dim=-1)  # [..., C]
    return F.normalize(mixture @ memory, dim=-1)


class CoMC(nn.Module):
    """A linear classifier, weight [C, D], and unit-length label embeddings, memory [C, D]."""

    def __init__(self, weight, memory):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("memory", memory)

    def forward(self, embeddings, mapping_weight):
        """Embeddings [..., D], those of images of unit length -> logits [..., C], unbounded.
        mapping_weight: the share of the mapped embedding; 0 for texts, which need no mapping."""
        if mapping_weight:
            mapped = map_to_text(embeddings, self.memory)
            embeddings = (1 - mapping_weight) * embeddings + mapping_weight * mapped
        return embeddings @ self.weight.T


def merge(scores, streams="both"):
    """Of the whole image and of L locations [B, 1 + L, C] -> scores [B, C]: the mean of the whole
    image's and the best location's; streams: "global" or "local" for one alone."""
    whole, best = scores[:, 0], scores[:, 1:].amax(dim=1)
    if streams == "global":
        return whole
    if streams == "local":
        return best
    return (whole + best) / 2


def encode(clip, images, args):
    """Images [B, 3, H, W] -> [CLIP's own, CoMC's], unit-length embeddings [B, 1 + L, D] of the
    whole and of L locations. For CoMC a ResNet pools the whole without positional embeddings."""
    with data.autocast(args):
        if isinstance(clip.visual, clip_model.VisionTransformer):
            clips_own, local = clip.encode_image_dense(images)
            global_ = clips_own
        else:  # two poolings of the same features
            features = clip.visual.features(images)
            clips_own = clip.visual.attnpool(features)
            global_, local = clip.visual.attnpool(features, position=False, dense=True)
    return [F.normalize(torch.cat([whole[:, None], local], dim=1).float(), dim=-1)
            for whole in (clips_own, global_)]


# ---- loss

def ranking_loss(logits, targets):
    """Sum over (present p, absent n) of max(0, 1 - l_p + l_n), mean over the batch: a scalar.

    logits: float [B, C]. targets: int8 [B, C]; unknown labels (0) form no pairs. Targets may stay
    on the CPU, so that no GPU is waited for to count the present ones."""
    present = (targets == 1).nonzero().to(logits.device, non_blocking=True)  # [P, 2]
    is_absent = (targets == -1).to(logits.device, non_blocking=True)
    rows, columns = present.T
    absent = logits.masked_fill(~is_absent, -torch.inf)  # others fall below every margin
    margins = (MARGIN - logits[rows, columns, None] + absent[rows]).relu()  # [P, C]
    return margins.sum() / len(logits)


# ---- texts and their embeddings

def names_of(labels):
    """{a name that texts may use, in lower case: column of the label}: its own, its synonyms unless
    two labels share them, and the plurals of all."""
    column_of = {" ".join(label.split()).lower(): column for column, label in enumerate(labels)}
    for group in SYNONYMS:
        columns = [column_of[name] for name in group if name in column_of]
        if len(columns) == 1:
            column_of |= dict.fromkeys(group, columns[0])
    return {plural(name): column for name, column in column_of.items()} | column_of


def load_texts(path, labels):
    """Sentences with their labels from a file; those of no use are dropped and counted.

    path: a JSON list of {"labels": ["dog", ...], "description": "..."}, or such an object a line.
    A sentence need not repeat a label's word ("a skateboarder").
    -> N sentences, targets int8 [N, C] in {+1, -1}, Counter {reason: number dropped}."""
    column_of = names_of(labels)
    sentences, targets, dropped = {}, [], Counter()  # sentences by their lower case
    for where, entry in data.read_json(path):
        try:
            if isinstance(entry["labels"], str):  # it would be read letter by letter
                raise TypeError
            names = [" ".join(name.split()).lower() for name in entry["labels"]]
            sentence = data.clean_sentence(entry["description"] or "")
        except (TypeError, KeyError, AttributeError):
            raise UserError(f'{where}: not {{"labels": ["..."], "description": "..."}}') from None
        unknown = [name for name in names if name not in column_of]
        if unknown or not names:
            dropped[f"of no label: {unknown[0]!r}" if unknown else "without a label"] += 1
        elif not sentence:
            dropped["empty or a refusal"] += 1
        elif sentence.lower() in sentences:
            dropped["said before"] += 1
        else:
            sentences[sentence.lower()] = sentence
            targets.append(torch.full((len(labels),), -1, dtype=torch.int8))
            targets[-1][[column_of[name] for name in names]] = 1
    if not sentences:
        raise UserError(f"{path}: no sentence of use; dropped: {described(dropped)}")
    return list(sentences.values()), torch.stack(targets), dropped


def described(dropped):
    """A Counter in a line, the most frequent reasons first."""
    reasons = [f"{count:,} {reason}" for reason, count in dropped.most_common(12)]
    if len(dropped) > 12:
        reasons.append("...")
    return ", ".join(reasons) or "none"


def training_texts(labels, templates, args):
    """-> sentences list[str] of --sources, targets int8 [N, C] in {+1, -1}. Of templates: for each
    label "a photo of a {}." PLAIN_COPIES times, then every template once."""
    sentences, targets = [], torch.empty(0, len(labels), dtype=torch.int8)
    if args.texts:
        sentences, targets, dropped = load_texts(args.texts, labels)
        print(f"{args.texts}: {len(sentences):,} sentences; dropped: {described(dropped)}")
    elif args.sources != "templates":
        sentences, targets = sentences_about(labels, args.sentences, args.seed)
    if args.sources != "sentences":
        prompts = PLAIN_COPIES * TEMPLATES[:1] + templates
        sentences += [fill_template(prompt, label) for label in labels for prompt in prompts]
        one_present = 2 * torch.eye(len(labels), dtype=torch.int8) - 1
        targets = torch.cat([targets, one_present.repeat_interleave(len(prompts), dim=0)])
    return sentences, targets


@torch.no_grad()
def embed_texts(clip, texts, args):
    """Unit-length embeddings float32 [N, D] of texts, cut where too long; kept on disk."""
    unique = list(dict.fromkeys(texts))

    def embed():
        tokens = clip.tokenize(unique, truncate=True)
        embeddings = torch.empty(len(unique), clip.text_projection.shape[1])
        # shortest first: a batch is cut behind its longest text (end of text: the highest id)
        by_length = tokens.argmax(dim=1).argsort(stable=True).split(256)
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
    """FIRST_LR in the first epoch, then half a cosine from the peak towards 0, a step an epoch."""
    return FIRST_LR if epoch == 0 else peak * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))


def train(model, embeddings, targets, args):
    """On embeddings [N, D] -> the log, a dict an epoch."""
    log, embeddings = [], embeddings.to(args.device)
    optimizer = torch.optim.Adam([model.weight], lr=args.lr, weight_decay=WEIGHT_DECAY)
    for epoch in range(args.epochs):
        torch.manual_seed(1_000_003 * args.seed + epoch)
        begin, total = time.time(), 0
        lr = learning_rate(epoch, args.lr, args.epochs)
        optimizer.param_groups[0]["lr"] = lr
        batches = torch.randperm(len(targets)).split(args.batch_size)
        for rows in batches:
            batch = embeddings[rows.to(args.device, non_blocking=True)]
            noisy = batch + args.noise * torch.randn_like(batch)
            loss = ranking_loss(model(noisy, mapping_weight=0), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total = total + loss.detach()
        loss = total.item() / len(batches)  # the only wait for the GPU
        if not math.isfinite(loss):
            raise UserError(f"epoch {epoch + 1}: the loss is not finite: try a smaller --lr")
        log.append({"epoch": epoch + 1, "loss": loss, "lr": lr, "seconds": time.time() - begin})
        print("  ".join(f"{name} {value:.4g}" for name, value in log[-1].items()), flush=True)
    return log


# ---- evaluate

@torch.no_grad()
def table(clip, model, test, args):
    """-> the rows that a run ends with, {"name", "kind", metric: value in [0, 1], ...}, and the
    logits [N, C] of the last, CoMC's."""
    ks = (10, 20) if test.name == "openimages" else (3, 5)
    playing, scale = metrics.in_play(test), clip.logit_scale.exp()
    prompts = clip_model.zero_shot_embeddings(clip, test.labels)

    def score(images):
        clips_own, x = encode(clip, images, args)
        plain_logits, mapped_logits = model(x, 0), model(x, args.mapping_weight)  # [B, 1 + L, C]
        scores = metrics.zero_shot_scores(clips_own, prompts, scale, playing)
        for prefix, index in playing.items():
            plain, mapped = plain_logits[..., index], mapped_logits[..., index]
            of_name = {
                "CoMC without mapping": merge(plain, args.streams),
                "CoMC, global alone": merge(mapped, "global"),
                "CoMC, local alone": merge(mapped, "local"),
                "CoMC without mapping, merged as probabilities":
                    merge(plain.softmax(dim=-1), args.streams),
                "CoMC, merged as probabilities": merge(mapped.softmax(dim=-1), args.streams),
                "CoMC": merge(mapped, args.streams)}
            scores |= {(name, prefix): value for name, value in of_name.items()}
        return scores

    scores = data.score_images(score, test, 64, args)  # --batch-size is of sentences
    rows = metrics.zero_shot_rows(scores, test, ks)
    for name in dict.fromkeys(name for name, _ in scores):  # zero_shot_rows took the others
        kind = "method" if name == "CoMC" else "ablation"
        rows.append(metrics.table_row(name, kind, scores, test, ks))
    return rows, scores["CoMC", [*playing][-1]]


# ---- predict

@torch.no_grad()
def predict(saved, args):
    """--predict: a JSON line per image."""
    clip, preprocess = clip_model.load(args.clip, args.device)
    model = load_model(clip, saved, saved["labels"], args)
    for paths, photos, images in data.photo_batches(args, preprocess):
        _, x = encode(clip, images.to(args.device), args)
        logits = model(x, args.mapping_weight)  # [B, 1 + L, C]
        maps = logits[:, 1:].softmax(dim=-1).transpose(1, 2).cpu()  # [B, C, L], for heatmaps
        for prediction in zip(paths, photos, merge(logits, args.streams).cpu(), maps):
            metrics.write_prediction(*prediction, saved["labels"], args)


# ---- arguments

def arguments(argv=None):
    """-> what was asked for, and the state of the checkpoint to start from or None."""
    parser = argparse.ArgumentParser(
        usage="lang_cls.py [options]", description=__doc__.split("\n\nB images")[0],
        epilog=f"Defaults are the authors' released code's; --data toy has {TOY}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("--clip", default="RN50", help="CLIP's name for it or a path to weights")
    add("--mapping-weight", type=data.at_least(0, float), default=0.3,
        help="share of the mapped embedding, up to 1 (0.3)")
    add("--streams", default="both", choices=["both", "global", "local"], help="those that count")
    add = parser.add_argument_group("training").add_argument
    add("--labels", help='train for these, without a dataset: "owl, ice cream", or a file of lines')
    add("--sources", default="both", choices=["both", "sentences", "templates"])
    add("--sentences", type=data.at_least(1), default=40_000, help="by the grammar (40,000)")
    add("--texts", metavar="FILE", help='JSON: {"labels": ["..."], "description": "..."}, ...')
    add("--templates", metavar="FILE", help="prompts, one a line with {} in it")
    add("--epochs", type=data.at_least(1), default=20, help="of which the first warms up (20)")
    add("--batch-size", type=data.at_least(1), default=512, help="sentences (512)")
    add("--lr", type=data.at_least(0, float), default=1e-3, help="peak learning rate (1e-3)")
    add("--noise", type=data.at_least(0, float), default=0.1,
        help="standard deviation, on embeddings (0.1)")
    data.add_options(parser)  # --data, --limit, ..., --output, --seed, ..., --eval, --predict, ...
    args, saved, typed = data.parse(parser, argv, "lang_cls", TOY)
    if args.predict and not saved:
        parser.error("--predict needs a --checkpoint")
    if saved:
        args.labels = None  # those of its training; what is scored now is a dataset or photos
    if args.texts and (args.sources == "templates" or "sentences" in typed):
        parser.error("--texts are used as a whole: no --sentences, no --sources templates")
    if args.mapping_weight > 1:
        parser.error("--mapping-weight: from 0 to 1")
    return args, saved


# ---- main

def load_model(clip, saved, labels, args):
    """The classifier of a checkpoint."""
    shape = len(saved["labels"]), clip.text_projection.shape[1]
    model = CoMC(torch.empty(shape), torch.empty(shape)).to(args.device)
    data.load_weights(model, clip, saved, labels, args)
    return model


def read_templates(path):
    """Prompts, a line each; UserError for one that has no place for the label."""
    templates = re.split(r"\s*\n\s*", data.read_text(path).strip())
    if not all("{}" in template for template in templates):
        raise UserError(f"{path}: every line needs {{}}, where the label goes")
    return templates


def main(argv=None):
    begin = time.time()
    args, saved = arguments(argv)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU: faster, 10 bits of mantissa
    if args.predict:
        return predict(saved, args)
    templates = TEMPLATES
    if args.templates and not args.eval:
        templates = read_templates(args.templates)

    # data first: files may be missing
    _, test = data.load_splits(args, with_training=False)
    labels = test.labels if test else args.labels
    if len(labels) < 2:
        raise UserError("labels are ranked against each other: give two or more")
    clip, preprocess = clip_model.load(args.clip, args.device)
    clip.check_labels(labels)

    if args.eval:
        model = load_model(clip, saved, labels, args)
    else:
        torch.manual_seed(args.seed)
        memory = label_embeddings(clip, labels, templates, args)
        linear = nn.Linear(memory.shape[1], len(labels), bias=False)  # for its initial weight
        model = CoMC(linear.weight.detach(), memory).to(args.device)
        sentences, targets = training_texts(labels, templates, args)
        print(f"{args.clip}: {len(labels)} labels, {len(sentences):,} texts to train with, "
              f"{len(set(sentences)):,} distinct", flush=True)
        log = train(model, embed_texts(clip, sentences, args), targets, args)
        data.write_file(f"{args.output}/args.json", json.dumps(vars(args), indent=1))
        data.write_file(f"{args.output}/log.jsonl", "".join(json.dumps(x) + "\n" for x in log))
        data.write_file(f"{args.output}/curves.png", metrics.draw_curves(log))
        data.write_file(f"{args.output}/last.pt", {
            "method": "lang_cls", "args": vars(args), "clip_fingerprint": clip.fingerprint(),
            "labels": labels, "log": log, "model": model.state_dict()})

    rows = []
    if test:
        test.transform = preprocess
        rows, scores = table(clip, model, test, args)
        metrics.print_table(rows, test)
    if test and args.output:
        results = metrics.results("lang_cls", rows, scores, test, args, time.time() - begin)
        data.write_file(f"{args.output}/results.json", results)
    if args.output:
        print(f"{time.time() - begin:.0f} s; results and checkpoints: {args.output}")
    return rows


if __name__ == "__main__":
    data.run(main, clip_model.ClipError)
