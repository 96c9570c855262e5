"""CoMC's training on embeddings that are given, with checkpoints and curves.

    python bench/lang_cls_training.py          # a minute on two cores
    python bench/lang_cls_training.py --quick

The paper's size: 40,000 sentences, 80 labels, 1,024 dimensions, 20 epochs, batches of 512.
Embeddings are random, with their labels' directions in them.
"""
import contextlib
import io
import tempfile

import side_by_side
import torch
from torch.nn import functional as F

import lang_cls


def main():
    args = side_by_side.parser(__doc__).parse_args()
    sentences, labels, size, epochs = 40_000, 80, 1024, 20
    if args.quick:
        sentences, labels, size, epochs = 2000, 10, 32, 3
    torch.manual_seed(0)
    present = torch.rand(sentences, labels) < 3 / labels
    directions = F.normalize(torch.randn(labels, size), dim=1)
    noise = 0.02 * torch.randn(sentences, size)
    embeddings = F.normalize(present.float() @ directions + noise, dim=1)
    targets = torch.where(present, 1, -1).to(torch.int8)
    state = {"method": "lang_cls", "log": []}
    with tempfile.TemporaryDirectory() as folder:
        options, _ = lang_cls.arguments(["--data", "coco", "--epochs", str(epochs), "--quiet",
                                         "--device", "cpu", "--output", folder])
        model = lang_cls.CoMC(torch.zeros(labels, size), directions)

        def train():
            with contextlib.redirect_stdout(io.StringIO()):
                lang_cls.train(model, embeddings, targets, state, options)

        side_by_side.start()
        seconds = side_by_side.seconds_of(train)
    assert state["log"][-1]["loss"] < state["log"][0]["loss"], "it does not learn"
    side_by_side.row(f"CoMC training, {sentences:,} sentences, {epochs} epochs, {labels} labels",
                     "the target", "30 s", side_by_side.duration(seconds), 30 / seconds, ">= 1")


if __name__ == "__main__":
    main()
