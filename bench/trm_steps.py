"""TRM-ML's training step against its straightforward form, and an epoch with kept embeddings.

    python bench/trm_steps.py                      # four minutes on two cores
    python bench/trm_steps.py --quick
    python bench/trm_steps.py --device cuda --repeats 10

The step: RN101's text tower with random weights, the embeddings of 32 images given, 1 + 196 each;
80 labels. Straightforward means: prompts have 77 tokens; the similarities of all regions with all
prototypes are formed with gradients, [B, C, 2 C], and masked afterwards. Losses and gradients are
asserted to be equal. The epoch: 300 toy scenes through toy-RN, encoded anew or kept.
"""
import os
import tempfile
from argparse import Namespace

import side_by_side
import torch
import torch.nn.functional as F

import data
import trm_ml


def straightforward_loss(model, x, known, args):
    """trm_ml.batch_loss without its savings."""
    clip, count = model.clip, len(model.tokens)
    words = clip.token_embedding(model.tokens)
    context = model.context.expand(count, -1, -1)
    words = torch.cat([words[:, :1], context, words[:, 1:]], dim=1)
    words = F.pad(words, (0, 0, 0, 77 - words.shape[1])) + clip.positional_embedding
    for block in clip.transformer.resblocks:
        words = block(words, causal=True)
    ends = clip.ln_final(words)[torch.arange(count), model.eot]
    texts = F.normalize(ends @ clip.text_projection, dim=-1)

    logits, regions, attention = model(x, texts)
    present = known == 1
    model.update_prototypes(regions, present)
    prototypes = torch.cat([model.visual, texts])  # [2 C, D]
    similarity = regions @ prototypes.T / trm_ml.TEMPERATURE  # [B, C, 2 C]
    by_modality = similarity.unflatten(2, (2, count))  # [B, C, 2, C]
    own = by_modality.diagonal(dim1=1, dim2=3)  # [B, 2, C]
    estimates = (2 * own - by_modality.logsumexp(dim=3).transpose(1, 2)).sum(dim=1) / 2
    pseudo = model.pseudo_labels(estimates, known)
    chosen = present | (pseudo == 1)
    contrast = (by_modality.logsumexp(dim=3).transpose(1, 2) - own).mean(dim=1)  # [B, C]
    distance = (regions - F.normalize(attention.detach() @ x, dim=-1)).abs().sum(dim=-1).mean()
    return (trm_ml.asymmetric_loss(logits, known)
            + args.pseudo * trm_ml.asymmetric_loss(logits, pseudo)
            + args.contrastive * (contrast * chosen).sum() / chosen.sum().clamp(min=1)
            + args.distillation * distance)


def step_forms(args):
    """-> (theirs, ours), functions -> (loss, gradients)."""
    sizes = dict(text_width=128, text_layers=2) if args.quick else {}
    clip = side_by_side.random_clip(512, 1, 64, 32, **sizes).to(args.device)  # no image is encoded
    labels = [f"{a} {b}" for a in data.TOY_LABELS for b in data.TOY_LABELS][:args.labels]
    model = trm_ml.TRM(clip, labels)
    x = F.normalize(torch.randn(args.batch_size, args.locations, 512, device=args.device), dim=-1)
    truth = torch.where(torch.rand(args.batch_size, args.labels) < 0.1, 1, -1).to(torch.int8)
    known = data.keep_partial(truth, 0.3, 0).to(args.device)
    options = Namespace(pseudo=0.1, contrastive=0.2, distillation=0.01, precision="fp32",
                        device=args.device)
    with torch.no_grad():
        for parameter in (model.last.weight, model.queries):  # 0 would hide what differs
            parameter += 0.02 * torch.randn_like(parameter)
        texts = model.texts()
        estimates = model.estimates(model(x, texts)[1], texts)
        model.calibrate(estimates, known)
        assert model.pseudo_labels(estimates, known).any()
        model.sure_present += 1e-3  # rounding must not decide what is above
        model.sure_absent -= 1e-3
    start = model.visual.clone()
    trained = [p for p in model.parameters() if p.requires_grad]

    def form(function):
        def step():
            model.visual.copy_(start)
            model.zero_grad()
            loss = function(model, x, known, options)
            loss.backward()
            return loss.detach(), [p.grad for p in trained]
        return step

    return form(straightforward_loss), form(lambda *given: trm_ml.batch_loss(*given)[0])


def bench_epoch(args):
    """An epoch of trm_ml.train, one row."""
    limit = 8 if args.quick else 300
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        options = trm_ml.parse_arguments([
            "--limit", str(limit), "--output", f"{folder}/run", "--matching", "region",
            "--epochs", "1", "--batch-size", "32", "--partial", "0.3", "--quiet",
            "--device", args.device])
        trm_ml.fill_defaults(options)
        clip, preprocess = trm_ml.build(vars(options), args.device)
        dataset = data.load_split("train", preprocess, options)
        truth, known = dataset.targets, data.keep_partial(dataset.targets, 0.3, 0)
        dataset.targets = torch.arange(len(dataset))  # rows of these
        kept = trm_ml.kept_embeddings(clip, dataset, options)  # also draws the scenes
        os.makedirs(options.output)
        losses = {}

        def epoch(name, embeddings):
            torch.manual_seed(0)
            model = trm_ml.TRM(clip, dataset.labels)
            state = {"epoch": 0, "optimizer": None, "scaler": None, "log": [], "seconds": 0.0}
            trm_ml.train(model, (dataset, embeddings), None, known, truth, options, state)
            losses[name] = state["log"][0]["loss"]

        side_by_side.compare(f"TRM-ML epoch, {limit} scenes, toy-RN, kept embeddings",
                             "images encoded anew", lambda: epoch("anew", None),
                             lambda: epoch("kept", kept), args.repeats, device=args.device)
        assert abs(losses["anew"] / losses["kept"] - 1) < 1e-3, losses  # kept in half precision


def main():
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--labels", type=int, default=80)
    parser.add_argument("--locations", type=int, default=1 + 196, help="embeddings of an image")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.quick:
        args.batch_size, args.labels, args.locations, args.repeats = 32, 6, 5, 1
    torch.manual_seed(0)
    side_by_side.start(args.device)
    straight, ours = step_forms(args)
    torch.testing.assert_close(ours(), straight(), rtol=1e-3, atol=1e-6)
    work = (f"TRM-ML step, batch {args.batch_size}, {args.labels} labels, {args.locations} "
            f"embeddings")
    against = "77 tokens, all similarities"
    side_by_side.compare(work, against, straight, ours, args.repeats, "> 1", args.device)
    side_by_side.compare_memory(work, against, straight, ours, "> 1", args.device)
    bench_epoch(args)


if __name__ == "__main__":
    main()
