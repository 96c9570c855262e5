"""The toy world, its captions, and the two tiny CLIPs with the script that trained them."""
import gzip
import re
import shutil

import numpy as np
import pytest
import torch

import clip_model
import metrics
from toy import calibrate, pretrain, world

TOY = clip_model.TOY


def test_a_scene_is_a_function_of_domain_seed_and_index():
    scene = np.asarray(world.scene("web", 3, 5))
    assert scene.shape == (128, 128, 3)
    assert np.array_equal(scene, np.asarray(world.scene("web", 3, 5)))
    for different in (("web", 3, 6), ("web", 4, 5), ("benchmark", 3, 5)):
        assert not np.array_equal(scene, np.asarray(world.scene(*different)))


def test_captions_name_only_what_is_there():
    random = np.random.default_rng(0)
    nouns = {name: label for label in world.LABELS
             for name in (label, pretrain.PLURALS.get(label, label + "s"))}
    pattern = re.compile(r"\b(" + "|".join(sorted(nouns, key=len, reverse=True)) + r")\b")
    settings = re.compile(" (" + "|".join(pretrain.SETTINGS) + ")")  # "on a table top": no table
    named, present = 0, 0
    for i in range(500):
        objects = world.scene_objects("web", 11, i)
        labels = [world.LABELS[thing[0]] for thing in objects]
        text = settings.sub("", pretrain.caption(objects, random))
        found = {nouns[name] for name in pattern.findall(text)}
        assert labels[0] in found and found <= set(labels), text  # the largest is always named
        named += len(found)
        present += len(set(labels))
        complete = settings.sub("", pretrain.caption(objects, random, name_all=True))
        assert {nouns[name] for name in pattern.findall(complete)} == set(labels), complete
    assert 0.8 < named / present < 1


@pytest.mark.parametrize("name, expected", [("toy-RN", (51.6, 70.2, 80.3)),
                                            ("toy-ViT", (40.7, 49.3, 50.2))])
def test_the_committed_weights_score_as_calibrated(name, expected):
    """Zero-shot mAP on the first 300 benchmark scenes."""
    assert (TOY / f"{name}.pt").stat().st_size <= 4_000_000
    clip, preprocess = clip_model.load(name)
    assert len(clip.tokenizer) == clip.vocab_size
    for label in world.LABELS:  # every label's words are single tokens
        assert len(clip.tokenizer.encode(label)) == len(label.split())
    global_, local, targets = calibrate.image_features(clip, preprocess, "benchmark", 2, 300)
    texts, scale = clip_model.zero_shot_embeddings(clip, world.LABELS), clip.logit_scale.exp()
    scores = calibrate.zero_shot(global_, local, texts, scale)
    for kind, mAP in zip(("global", "both, normalised", "as probabilities"), expected):
        assert abs(100 * metrics.mean_average_precision(scores[kind], targets) - mAP) < 0.5, kind


def test_pretraining_resumes_exactly_and_later_stages_train_what_they_say(tmp_path):
    def run(stage, folder, *options):
        pretrain.main([stage, "--batch-size", "8", "--scenes", "64", "--output",
                       str(tmp_path / folder), *options])
        return torch.load(tmp_path / folder / pretrain.FILES[stage], weights_only=True)

    merges = "merges.txt.gz"
    whole = run("ViT", "whole", "--steps", "4")
    (tmp_path / "halves").mkdir()
    shutil.copy(TOY / merges, tmp_path / "halves")
    run("ViT", "halves", "--steps", "4", "--stop-at", "2")
    halves = run("ViT", "halves", "--steps", "4")
    assert all(torch.equal(whole[key], halves[key]) for key in whole)
    whole, published = (gzip.decompress((folder / merges).read_bytes())
                        for folder in (tmp_path / "whole", TOY))
    assert whole == published  # other Pythons pack it another way

    resnet = run("RN", "whole", "--steps", "1")
    before = run("ViT-distilled", "whole", "--steps", "2")
    after = run("ViT-whole", "whole", "--steps", "2")
    for key in after:  # the text tower is RN's and stays so, the image tower is trained
        if not key.startswith("visual.") and key != "logit_scale":
            assert torch.equal(after[key], resnet[key]), key
    assert not torch.equal(after["visual.proj"], before["visual.proj"])
