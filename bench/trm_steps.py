"""TRM-ML with nine shares of known labels: one command against nine.

    python bench/trm_steps.py            # ten minutes on two cores
    python bench/trm_steps.py --quick

One step of training, RN101 at 448 pixels with random weights, 32 images and 80 labels, encoding and
checkpoints included: all shares in one loop, or each in its own. What is trained is asserted to be
equal.
"""
import contextlib
import io
import tempfile

import side_by_side
import torch

import data
import trm_ml

SHARES = "0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9".split()


def main():
    args = side_by_side.parser(__doc__).parse_args()
    torch.manual_seed(0)
    side_by_side.start()
    layers, size, images, names = (3, 4, 23, 3), 448, 32, [f"label {i}" for i in range(80)]
    sizes = {}
    if args.quick:
        layers, size, images, names = (1, 1, 1, 1), 64, 8, names[:6]
        sizes = dict(text_width=128, text_layers=2)
    clip = side_by_side.random_clip(512, layers, 64, None, **sizes)
    truth = torch.where(torch.rand(images, len(names)) < 0.1, 1, -1).to(torch.int8)
    dataset = data.MultiLabelDataset(names, truth, torch.randn(images, 3, size, size))

    def plan(folder):
        options, _ = trm_ml.arguments([
            "--data", "coco", "--partial", *SHARES, "--epochs", "1", "--workers", "0", "--device",
            "cpu", "--quiet", "--output", folder])
        dataset.full_targets = truth
        return trm_ml.make_runs(clip, dataset, options), options

    def train(runs, options):
        dataset.full_targets = torch.arange(images)  # [i] gives an image and its row
        with contextlib.redirect_stdout(io.StringIO()):
            trm_ml.train(runs, clip, dataset, None, truth, {"method": "trm_ml"}, options)

    with tempfile.TemporaryDirectory() as folder:
        (runs, options), (others, _) = plan(f"{folder}/1"), plan(f"{folder}/2")
        together = side_by_side.seconds_of(lambda: train(runs, options))
        alone = side_by_side.seconds_of(lambda: [train([run], options) for run in others])
        for run, other in zip(runs, others):
            torch.testing.assert_close(run.model.trained(), other.model.trained())
        work = f"TRM-ML, nine shares of known labels, RN101 at {size}, batch {images}"
        side_by_side.row(work, "nine commands", side_by_side.duration(alone),
                         side_by_side.duration(together), alone / together, ">= 4")
        runs, options = plan(f"{folder}/3")
        others, _ = plan(f"{folder}/4")
        side_by_side.compare_memory(work, "one share", lambda: train(others[:1], options),
                                    lambda: train(runs, options))


if __name__ == "__main__":
    main()
