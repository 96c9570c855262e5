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
    python lang_cls.py --labels "owl, ice cream" --generate texts.jsonl \\
        --llm-url http://localhost:11434/v1 --llm-model NAME  # then train with --texts texts.jsonl

B images, L locations, C labels, D joint embedding. Targets: +1 present, -1 absent, 0 unknown.

Implementation details
 1. The text tower is frozen: every distinct text is embedded once and kept on disk, and training
    is a linear layer on a matrix.
 2. A ranking pair needs a present label: [present labels, C] margins, never [B, C, C].
 3. All rows of the table are scored in one pass over the images.
Where this differs from the paper
 1. Sentences come from a built-in grammar unless --texts names a file; --generate has a language
    model write one. The prompt templates, some forty, are our own.
 2. The last epoch is reported; --val-fraction selects on held-out sentences, never on test images.
"""
import hashlib
import json
import math
import time

import torch
import torch.nn.functional as F
from torch import nn

import clip_model
import data
import metrics
from data import UserError

# what the paper trains with, and what the toy world's small CLIP asks for (the learning rate was
# chosen on scenes of their own, not on the test scenes)
PAPER = {"clip": "RN50", "epochs": 20, "batch_size": 512, "lr": 1e-3, "noise": 0.1,
         "sentences": 40_000, "mapping_weight": 0.3, "streams": "both", "workers": 8}
TOY = {**PAPER, "clip": "toy-RN", "lr": 5e-3, "workers": 0}
PUBLISHED = "adapter.0.weight"  # the one key of the authors' classifier for COCO, [80, 1024]


# ---- model

def map_to_text(embeddings, memory, temperature=0.01):
    """Unit-length embeddings float [..., D] as mixtures of label embeddings -> [..., D], unit
    length.

    memory: float [M, D], one unit-length text embedding per label. The weights are a softmax
    over the cosines divided by the temperature (Liu et al., 2024, cross-modal mapping)."""
    weights = (embeddings @ memory.T / temperature).softmax(dim=-1)  # [..., M]
    return F.normalize(weights @ memory, dim=-1)


class CoMC(nn.Module):
    """A linear classifier without bias, weight [C, D], beside the labels' embeddings, memory
    [C, D] of unit length."""

    def __init__(self, weight, memory):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("memory", memory)

    def forward(self, embeddings):
        return embeddings @ self.weight.T

    def logits(self, embeddings, mapping_weight):
        """Unit-length embeddings of images [..., D] -> [..., C]."""
        if mapping_weight:
            mapped = map_to_text(embeddings, self.memory)
            embeddings = (1 - mapping_weight) * embeddings + mapping_weight * mapped
        return self(embeddings)

    def scores(self, global_, local, mapping_weight=0.3, streams="both"):
        """Unit-length embeddings [B, D] and [B, L, D] -> logits [B, C], of any size: the mean of
        the whole image's and the best location's; streams: "both", or "global" or "local" alone."""
        scores = []
        if streams != "local":
            scores.append(self.logits(global_, mapping_weight))
        if streams != "global":
            scores.append(self.logits(local, mapping_weight).amax(dim=1))  # [B, L, C] -> [B, C]
        return sum(scores) / len(scores)

    def trained(self):
        """The state of a checkpoint."""
        return self.state_dict()


@torch.no_grad()
def encode(clip, images, args):
    """Images -> unit-length CLIP's own global [B, D], CoMC's global [B, D] and local [B, L, D]
    embeddings. A ResNet pools CoMC's without positional embeddings."""
    images = images.to(args.device, non_blocking=True)
    with data.autocast(args):
        if isinstance(clip.visual, clip_model.VisionTransformer):
            global_, local = clip.encode_image_dense(images)
            own = global_
        else:  # two poolings of the same features
            features = clip.visual.features(images)
            own = clip.visual.attnpool(features)
            global_, local = clip.visual.attnpool(features, position=False, dense=True)
    return [F.normalize(x.float(), dim=-1) for x in (own, global_, local)]


# ---- losses

def ranking_loss(logits, targets):
    """Sum over (present p, absent n) of max(0, 1 - l_p + l_n), mean over the batch: a scalar.

    logits: float [B, C]. targets: int8 [B, C]; unknown labels (0) form no pairs, rows without a
    present or without an absent label add nothing. Liu et al. (2024), their ranking loss with
    margin 1."""
    rows, columns = (targets == 1).nonzero(as_tuple=True)  # [P]; B x C x C is never built
    absent = logits.masked_fill(targets != -1, -torch.inf)  # others fall below every margin
    margins = 1 - logits[rows, columns, None] + absent[rows]  # [P, C]
    return margins.relu().sum() / len(logits)


# ---- texts

def template_sentences(labels, templates=data.TEMPLATES):
    """For each label "a photo of a {}." nine times, and every template once (Liu et al., 2024).

    -> sentences list[str], targets int8 [N, C] in {+1, -1}."""
    templates = 9 * data.TEMPLATES[:1] + list(templates)
    sentences = [data.fill_template(template, label) for label in labels for template in templates]
    targets = 2 * torch.eye(len(labels), dtype=torch.int8) - 1
    return sentences, targets.repeat_interleave(len(templates), dim=0)


# ---- embeddings of the texts

@torch.no_grad()
def embed_texts(clip, texts, device="cpu", quiet=False):
    """Unit-length embeddings of texts, float32 [N, D] on the CPU; too long texts are cut.

    They are kept in data.cache_folder(), under a hash of the texts and of CLIP's weights."""
    unique = list(dict.fromkeys(texts))

    def embed():
        tokens = clip.tokenize(unique, truncate=True)
        embeddings = torch.empty(len(unique), clip.text_projection.shape[1])
        by_length = tokens.argmax(dim=1).argsort(stable=True).split(256)  # little padding
        for rows in data.progress(by_length, "embedding texts", quiet):
            embeddings[rows] = F.normalize(clip.encode_text(tokens[rows].to(device)).float(),
                                           dim=-1).cpu()
        return {"embeddings": embeddings.numpy()}

    digest = hashlib.sha256(json.dumps(unique).encode()).hexdigest()
    kept = data.cached("texts", [], [clip.fingerprint(), digest], embed, quiet)
    embeddings = torch.from_numpy(kept["embeddings"])
    row = {text: index for index, text in enumerate(unique)}
    return embeddings[[row[text] for text in texts]]


def training_texts(labels, args):
    """-> sentences list[str], targets int8 [N, C] of --sources."""
    sentences, targets = [], []
    if args.sources != "templates" and args.texts:
        texts, present, dropped = data.load_texts(args.texts, labels)
        if not args.quiet:
            print(f"{args.texts}: {len(texts):,} sentences" + "".join(
                f", {count:,} dropped: {reason}" for reason, count in dropped.items()))
        sentences, targets = texts[:args.sentences], [present[:args.sentences]]
    elif args.sources != "templates":
        sentences, present = data.grammar_sentences(labels, args.sentences, args.seed)
        targets = [present]
    if args.sources != "sentences":
        prompts, present = template_sentences(labels, prompt_templates(args))
        sentences, targets = sentences + prompts, [*targets, present]
    return sentences, torch.cat(targets)


def prompt_templates(args):
    """Those of --templates, or our own."""
    return data.load_templates(args.templates) if args.templates else data.TEMPLATES


def label_embeddings(clip, labels, templates, args):
    """Mean over the templates of unit-length embeddings, of unit length again: [C, D]."""
    prompts = [data.fill_template(template, label) for label in labels for template in templates]
    embeddings = embed_texts(clip, prompts, args.device, args.quiet)
    return F.normalize(embeddings.unflatten(0, (len(labels), -1)).mean(dim=1), dim=-1)


# ---- train

def learning_rate(epoch, peak, epochs):
    """1e-5 in the first epoch, then half a cosine from the peak towards 0, a step an epoch."""
    return 1e-5 if epoch == 0 else peak * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))


def train(model, embeddings, targets, args, state):
    """Embeddings [N, D] with targets [N, C], epoch by epoch, from wherever `state` is.

    Every epoch seeds its own shuffling and noise, so a resumed run repeats the epoch it was
    killed in exactly."""
    embeddings, targets = embeddings.to(args.device), targets.to(args.device)
    kept = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    held_out = kept[:0]
    if args.val_fraction:  # of distinct texts: what is held out is trained with nowhere else
        _, text = embeddings.cpu().unique(dim=0, return_inverse=True)
        order = torch.randperm(int(text.max()) + 1, generator=torch.Generator().manual_seed(0))
        is_held_out = (order < math.ceil(args.val_fraction * len(order)))[text[kept]]
        held_out, kept = kept[is_held_out], kept[~is_held_out]
    if not len(kept):
        raise UserError(f"--val-fraction {args.val_fraction} leaves no sentence to train with")
    optimizer = torch.optim.Adam([model.weight], lr=args.lr)
    if state["optimizer"]:
        optimizer.load_state_dict(state["optimizer"])
    for epoch in range(state["epoch"], args.epochs):
        torch.manual_seed(1_000_003 * args.seed + epoch)
        begin, history = time.time(), []
        optimizer.param_groups[0]["lr"] = learning_rate(epoch, args.lr, args.epochs)
        order = kept[torch.randperm(len(kept))].to(args.device)  # not a copy a step
        for rows in order.split(args.batch_size):
            batch = embeddings[rows]
            loss = ranking_loss(model(batch + args.noise * torch.randn_like(batch)), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.detach()[None])
        means = data.finite_means(history, ["loss"], f"epoch {epoch + 1}", args.output)
        line = {"epoch": epoch + 1, **means, "lr": optimizer.param_groups[0]["lr"],
                "seconds": time.time() - begin}
        if len(held_out):
            with torch.no_grad():
                line["val_mAP"] = metrics.mean_average_precision(
                    model(embeddings[held_out]), targets[held_out])
        state.update(epoch=epoch + 1, model=model.trained(), optimizer=optimizer.state_dict())
        data.finish_epoch(args.output, state, line, args.quiet)


# ---- evaluate

@torch.no_grad()
def evaluate(clip, model, dataset, args):
    """The rows of the table: CLIP as it is, CoMC without its parts, CoMC."""
    prompts = {f'"{data.TEMPLATES[0]}"': label_embeddings(
        clip, dataset.labels, data.TEMPLATES[:1], args).to(args.device),
        "mean of templates": model.memory}
    settings = {"CoMC": (args.mapping_weight, args.streams)}
    if args.streams == "both":
        settings = {"CoMC, global alone": (args.mapping_weight, "global"),
                    "CoMC, local alone": (args.mapping_weight, "local"), **settings}
    if args.mapping_weight:
        settings = {"CoMC without mapping": (0.0, args.streams), **settings}
    encoder = torch.compile(encode) if args.compile else encode

    def score(images):
        (own, global_, local), scores = encoder(clip, images, args), {}
        for title, labels in prompts.items():
            whole, best = own @ labels.T, (local @ labels.T).amax(dim=1)  # [B, C]
            scores.update({f"zero-shot, global, {title}": whole,
                           f"zero-shot, local, {title}": best,
                           f"zero-shot, both, {title}": (whole + best) / 2})
        return scores | {name: model.scores(global_, local, *setting)
                         for name, setting in settings.items()}

    loader = data.make_loader(dataset, args, batch_size=64)  # --batch-size counts sentences
    results = metrics.evaluate(score, data.progress(loader, "evaluating", args.quiet),
                               dataset.targets, *data.evaluation(dataset))
    kinds = {"CoMC": "method", **{name: "ablation" for name in settings if name != "CoMC"}}
    return [{"name": name, "kind": kinds.get(name, "zero-shot"), **row}
            for name, row in results.items()]


# ---- predict

def scorer(clip, model, args):
    """-> function: images -> (scores [B, C], with --heatmap every location's [B, C, h, w])."""
    def score(images):
        _, global_, local = encode(clip, images, args)
        scores = model.scores(global_, local, args.mapping_weight, args.streams)
        if not args.heatmap:
            return scores, None
        locations = model.logits(local, args.mapping_weight).transpose(1, 2)  # [B, C, L]
        return scores, locations.unflatten(2, (math.isqrt(local.shape[1]), -1))
    return score


def predict(args):
    clip, model, preprocess, state = load_checkpoint(args.checkpoint, args)
    data.predict(scorer(clip, model, args), state["labels"], preprocess, args)


# ---- arguments

def parse_arguments(arguments=None):
    parser, number = data.Parser(__doc__, PAPER, TOY), data.number
    add = parser.group("model")
    add("--clip", str, "a name of clip_model.available_models() or a path to weights")
    add("--mapping-weight", number(float, 0, 1), "share of the mapped embedding; 0 leaves it out")
    add("--streams", str, "which of the two scores count", choices=["both", "global", "local"])
    add = parser.group("texts")
    add("--labels", str, 'train for these, without a dataset: "owl, ice cream"')
    add("--texts", str, 'JSON, a list or one a line, of {"labels": ["..."], "description": "..."}, '
        "instead of the grammar's sentences", metavar="FILE")
    add("--sources", str, "what to train with (default: both)",
        choices=["both", "sentences", "templates"], default="both")
    add("--sentences", number(int, 1), "how many the grammar writes; or the first of --texts, by "
        "default all of them")
    add("--templates", str, "prompts, one a line with {} in it", metavar="FILE")
    add("--generate", str, "have a language model write --sentences about the labels, for --texts; "
        "a repeated call continues", metavar="OUT.jsonl")
    add("--llm-url", str, "of an OpenAI-compatible server, e.g. http://localhost:11434/v1; a key "
        "is read from OPENAI_API_KEY", metavar="URL")
    add("--llm-model", str, "the server's name of the language model", metavar="NAME")
    add("--llm-requests", number(int, 1, 256), "at a time (default: 8)", default=8)
    add = parser.group("optimization")
    add("--epochs", number(int, 1), "of which the first warms up")
    add("--batch-size", number(int, 1), "sentences")
    add("--lr", number(float, 0), "peak learning rate")
    add("--noise", number(float, 0), "standard deviation, of text embeddings; 0 leaves it out")
    data.add_run_arguments(parser, "lang_cls")
    args = parser.parse_args(arguments)
    data.check_run_arguments(args)
    if args.labels is not None:
        args.labels = data.parse_labels(args.labels)
        if args.predict or args.eval:
            raise UserError("--labels are for training: a checkpoint scores its own labels only")
    if args.labels and args.data:
        raise UserError(f"--labels and --data {args.data} both name labels: give one of them")
    if args.labels and args.gallery:
        raise UserError("--gallery shows images of a dataset: name one with --data, not --labels")
    if args.generate and not (args.llm_url and args.llm_model):
        raise UserError("--generate needs --llm-url URL and --llm-model NAME")
    if args.generate and (args.texts or args.eval or args.resume or args.predict):
        raise UserError("--generate writes a file of texts and does nothing else: leave --texts, "
                        "--eval, --resume and --predict out")
    if args.texts and args.sources == "templates":
        raise UserError("--texts and --sources templates: the file would not be used")
    return args


def fill_defaults(args):
    given = args.sentences
    data.fill_defaults(args, "lang_cls", PAPER, TOY)
    args.sentences = given if args.texts else args.sentences  # all that the file has


# ---- main

def load_checkpoint(path, args):
    """-> (CLIP, CoMC, preprocess, state). UserError for what is no checkpoint or of another CLIP.

    The authors' classifier, for COCO's labels, loads too. --mapping-weight and --streams are the
    checkpoint's unless given."""
    state = data.read_checkpoint(path, "lang_cls", args.clip, PUBLISHED)
    name = (args.clip or PAPER["clip"]) if PUBLISHED in state else state["clip"]
    clip, preprocess = clip_model.load(name, args.device)
    if PUBLISHED in state:
        weight, args.clip, labels = state[PUBLISHED].float(), name, data.COCO_LABELS
        expected = [len(labels), clip.text_projection.shape[1]]
        if list(weight.shape) != expected:
            raise UserError(f"{path}: the classifier is {list(weight.shape)}, --clip {name} and "
                            f"COCO's labels ask for {expected} (the authors' CLIP is RN50)")
        memory = label_embeddings(clip, labels, prompt_templates(args), args)
        state = {**data.new_state("lang_cls", labels, clip, args), "data": "coco", "args": PAPER,
                 "model": {"weight": weight, "memory": memory}}
    data.check_weights(path, state, clip)
    for name in ("mapping_weight", "streams"):
        if getattr(args, name) is None:
            setattr(args, name, state["args"][name])
    return clip, CoMC(**state["model"]).to(args.device), preprocess, state


def generate(labels, args):
    """Have a language model write the sentences of --generate."""
    missing = data.generate_sentences(args.generate, labels, args.sentences, args.seed,
                                      args.llm_url, args.llm_model, args.llm_requests,
                                      quiet=args.quiet)
    print(f"{args.generate}: {missing} answers are missing, the same command asks for them again"
          if missing else f"train with --texts {args.generate}")


def start_or_resume(clip, labels, sentences, args):
    """-> (CoMC, state): new ones, or with --resume those of last.pt."""
    names = ("labels", "texts", "templates", "sources")
    digest = hashlib.sha256(json.dumps(sentences).encode()).hexdigest()
    if args.resume:
        state = data.read_checkpoint(f"{args.output}/last.pt", "lang_cls", args.clip)
        data.check_weights(args.output, state, clip)
        data.check_same(args, state["args"], (*PAPER, *data.SAME, *names))
        if state["texts"] != digest:
            raise UserError(f"--resume: the run in {args.output} was started with other texts")
        return CoMC(**state["model"]).to(args.device), state
    torch.manual_seed(args.seed)
    memory = label_embeddings(clip, labels, prompt_templates(args), args)
    weight = nn.Linear(memory.shape[1], len(labels), bias=False).weight.detach()
    data.start_run(args)
    state = {**data.new_state("lang_cls", labels, clip, args), "texts": digest}
    return CoMC(weight, memory).to(args.device), state


def run(args):
    """Train, unless --eval, and evaluate -> the results that results.json holds."""
    begin = time.time()
    if args.eval:
        clip, model, preprocess, state = load_checkpoint(args.eval, args)
        data.same_dataset(args, state)
        if args.data == "labels":
            raise UserError(f"{args.eval} was trained for --labels: name a dataset with --data")
    fill_defaults(args)
    test = None
    if not args.labels:
        test = data.load_split("test", None, args)  # first of all: it may lack files
    if args.generate:
        return generate(args.labels or test.labels, args)
    if not args.eval:
        clip, preprocess = clip_model.load(args.clip, args.device)
        labels = args.labels or test.labels
        if len(labels) < 2:
            raise UserError("one label has nothing to be ranked against: give at least two")
        sentences, targets = training_texts(labels, args)
        if not args.quiet:
            print(f"{args.clip}: {len(labels)} labels, {len(sentences):,} texts to train with, "
                  f"{len(set(sentences)):,} distinct", flush=True)
        embeddings = embed_texts(clip, sentences, args.device, args.quiet)
        model, state = start_or_resume(clip, labels, sentences, args)
        train(model, embeddings, targets, args, state)
        data.restore(f"{args.output}/best.pt", model)
    rows = []
    if test is not None:
        test.transform = preprocess
        data.check_labels(test, state)
        rows = evaluate(clip, model, test, args)
        metrics.print_table(rows)
        if args.gallery:
            data.write_gallery(test, scorer(clip, model, args), args)
    return data.write_results("lang_cls", args, state["seconds"], rows, test, begin)


def main(arguments=None):
    with data.command_line("lang_cls.py", clip_model.ClipError):
        args = parse_arguments(arguments)
        return predict(args) if args.predict else run(args)


if __name__ == "__main__":
    main()
