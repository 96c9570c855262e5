import baselines
import clip_model
import full_size
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import training

import data


def test_the_straightforward_ranking_loss_is_a_loop_over_pairs():
    torch.manual_seed(0)
    scores, targets = torch.randn(3, 5), torch.randint(-1, 2, (3, 5))
    total = 0
    for s, t in zip(scores.tolist(), targets.tolist()):
        margins = [1 + s[n] - s[p] for p in range(5) for n in range(5) if t[p] == 1 and t[n] == -1]
        violated = [margin for margin in margins if margin > 0]
        total += sum(violated) / max(1, len(violated))
    loss = training.ranking_loss_of_all_pairs(scores, targets)
    assert loss.item() == pytest.approx(total / 3, rel=1e-5)


def test_zero_shot_clip_offsets_the_simple_head():
    torch.manual_seed(0)
    x, labels = F.normalize(torch.randn(2, 4, 8), dim=-1), F.normalize(torch.randn(3, 8), dim=-1)
    head, alone = baselines.ZeroShotHead(labels, scale=5), baselines.SimpleHead(labels)
    for image, offset in zip(x, head(x) - alone(x)):
        whole, *locations = [torch.exp(5 * labels @ part) for part in image]
        best = torch.stack([part / part.sum() for part in locations]).amax(dim=0)
        p = (whole / whole.sum() + best) / 2
        torch.testing.assert_close(offset, torch.log(p / (1 - p)))


@torch.no_grad()
@pytest.mark.parametrize("matching", [baselines.ImageMatching, baselines.PixelMatching])
def test_matchings_are_a_loop(matching):
    torch.manual_seed(0)
    clip = clip_model.load("toy-RN")[0]
    model = matching(clip, ["cup", "key"])
    model.mlp[-1].weight.normal_()
    x = F.normalize(torch.randn(2, 4, 128), dim=-1)
    logits, texts = model(x), model.texts()
    for b in range(2):
        for c in range(2):
            whole, *locations = [model.refine(part) @ texts[c] for part in x[b]]
            weights = [torch.exp(clip.logit_scale.exp() * part) for part in locations]
            similarity = sum(w * part for w, part in zip(weights, locations)) / sum(weights)
            if matching is baselines.ImageMatching:
                similarity = whole
            expected = model.log_scale.exp() * similarity + model.bias
            torch.testing.assert_close(logits[b, c], expected, rtol=1e-4, atol=1e-4)


def test_scenes_of_the_test_seed_are_the_test_scenes():
    test = data.load_dataset("toy", split="test", zero_shot=False, limit=5)
    expected_image, expected_targets = test[4][0], test.targets.clone()
    baselines.use_scenes(test, seed=3)
    assert not torch.equal(test.targets, expected_targets) and test[4][0] != expected_image
    baselines.use_scenes(test, seed=2)
    assert torch.equal(test.targets, expected_targets) and test[4][0] == expected_image


@pytest.mark.parametrize("name", list(full_size.COMMANDS))
def test_stand_ins_have_as_many_images_and_labels_as_were_asked_for(name, tmp_path):
    getattr(full_size, f"write_{name}")(tmp_path, np.random.default_rng(0), 40, 20)
    for split, count in (("train", 40), ("test", 20)):
        dataset = data.load_dataset(name, tmp_path, split)
        assert len(dataset) == count and not dataset.missing
        assert len(dataset.labels) == {"nuswide": 1006, "coco": 80, "openimages": 7586}[name]
        assert dataset[count - 1][0].size == (64, 64)
        assert all(known.sum() for known in dataset.counts())


HOLDS_MEMORY = """
import multiprocessing, time, sys
from tqdm import tqdm
held = b"x" * {size}
try:
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=[600], daemon=True)
    worker.start()
    for _ in tqdm(range(10 ** 9), "stage 1 epoch 1", disable=None):
        time.sleep(0.01)
except KeyboardInterrupt:
    sys.exit(1)
"""


def test_a_command_is_watched_and_interrupted(tmp_path):
    size = 300 * 2 ** 20
    found = full_size.watch(["-c", HOLDS_MEMORY.format(size=size)], tmp_path, 20, 0.05)
    first, last, steps = found.bars["stage 1 epoch 1"]
    assert 0 < first <= last <= found.seconds and steps >= 20
    # the worker's too, which shares these pages; multiprocessing may have a process of its own
    assert {depth for (depth, _), peak in found.peaks.items() if peak > size} == {0, 1}
    assert found.cpu > 0
    assert size < found.together < 1.9 * size


def test_a_command_that_fails_is_shown(tmp_path):
    with pytest.raises(SystemExit, match="exit code 3\\n.*broken"):
        full_size.watch(["-c", "print('broken'); exit(3)"], tmp_path, None, 0.05)
