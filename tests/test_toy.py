"""The toy world, its captions, and the script that trained the two tiny CLIPs."""
import collections
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import clip_model
import data

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "toy"))
import pretrain  # noqa: E402


@pytest.mark.parametrize("domain", ["web", "benchmark"])
def test_a_scene_is_a_function_of_domain_seed_and_index(domain):
    scene = np.asarray(data.toy_scene(domain, 3, 5))
    assert scene.shape == (128, 128, 3)
    assert np.array_equal(scene, np.asarray(data.toy_scene(domain, 3, 5)))
    other = "web" if domain == "benchmark" else "benchmark"
    for different in ((domain, 3, 6), (domain, 4, 5), (other, 3, 5)):
        assert not np.array_equal(scene, np.asarray(data.toy_scene(*different)))


def test_domains_have_the_number_and_size_of_things_they_promise():
    web = [data.toy_objects("web", 0, i) for i in range(1000)]
    counts = collections.Counter(map(len, web))
    assert counts[1] + counts[2] > 800 and 0 < counts[4] + counts[5] < 120
    benchmark = [data.toy_objects("benchmark", 0, i) for i in range(500)]
    counts = collections.Counter(map(len, benchmark))  # of 2-6, those that find a place
    assert counts[2] + counts[3] + counts[4] > 440 and max(counts) <= 6
    for objects in web + benchmark:
        sizes = [thing[4] for thing in objects]
        assert sizes == sorted(sizes, reverse=True)
        assert all(0 <= x <= 1 and 0 <= y <= 1 for _, _, x, y, _, _ in objects)


def test_every_thing_is_drawn_and_no_two_look_alike():
    """Each thing alone, in one colour: the shape changes the pixels, and no two shapes agree."""
    pictures = {}
    for label in data.TOY_LABELS:
        canvas = data.Image.new("L", (64, 64), 128)
        draw = data.ImageDraw.Draw(canvas)
        for outline, tone in data.THINGS[label]:
            assert np.abs(outline).max() <= 1.1
            draw.polygon((outline * 30 + 32).ravel().tolist(), 40 * tone)
        pictures[label] = np.asarray(canvas, float)
        assert (pictures[label] != 128).mean() > 0.08, label
    names = list(pictures)
    differences = [np.abs(pictures[a] - pictures[b]).mean()
                   for i, a in enumerate(names) for b in names[:i]]
    assert min(differences) > 5


def test_targets_are_what_is_drawn_and_training_hides_the_unseen():
    train, test = (data.load_dataset("toy", split=split) for split in ("train", "test"))
    assert len(train) == 10_000 and len(test) == 2_000 and len(train.labels) == 56
    assert len(train.unseen) == 14 and train.labels == test.labels == data.TOY_LABELS
    assert (train.targets[:, train.unseen] == 0).all() and (train.targets[:, train.seen] != 0).all()
    assert (test.targets != 0).all() and ((test.targets == 1).sum(0) > 30).all()
    for i in (0, 17, 1999):
        things = {thing[0] for thing in data.toy_objects("benchmark", 2, i)}
        assert things == set((test.targets[i] == 1).nonzero()[:, 0].tolist())
        seen = {thing[0] for thing in data.toy_objects("benchmark", 1, i, data.TOY_SEEN)}
        assert seen == set((train.targets[i] == 1).nonzero()[:, 0].tolist())
        image = np.asarray(data.toy_scene("benchmark", 1, i, data.TOY_SEEN))
        assert np.array_equal(np.asarray(train[i][0]), image)  # drawn ...
        assert np.array_equal(np.asarray(train[i][0]), image)  # ... and kept
    everything = data.load_dataset("toy", split="train", zero_shot=False)
    assert not len(everything.unseen) and (everything.targets != 0).all()
    assert (everything.targets[:, data.TOY_UNSEEN] == 1).any(dim=0).all()


def without_settings(text):
    """Leave out "on a table top" and the like, which are said of any scene."""
    for setting in pretrain.SETTINGS:
        text = text.replace(" " + setting, "")
    return text


def test_captions_name_only_what_is_there():
    random = np.random.default_rng(0)
    nouns = {name: label for label in data.TOY_LABELS
             for name in (label, pretrain.PLURALS.get(label, label + "s"))}
    pattern = re.compile(r"\b(" + "|".join(sorted(nouns, key=len, reverse=True)) + r")\b")
    named, present = 0, 0
    for i in range(500):
        objects = data.toy_objects("web", 11, i)
        text = without_settings(pretrain.caption(objects, random))
        found = {nouns[name] for name in pattern.findall(text)}
        labels = [data.TOY_LABELS[thing[0]] for thing in objects]
        assert found and found <= set(labels), text
        assert labels[0] in found, text  # the largest is always named
        assert len(pretrain.Tokenizer(ROOT / "toy" / "merges.txt.gz").encode(text)) < 75
        named, present = named + len(found), present + len(set(labels))
        complete = without_settings(pretrain.caption(objects, random, name_all=True))
        assert {nouns[name] for name in pattern.findall(complete)} == set(labels), complete
    assert 0.8 < named / present < 1


def test_learned_merges_equal_a_brute_force():
    texts = ["low lower lowest", "new newer newest", "wide wider widest", "low low"]
    merges = pretrain.learn_merges(texts, 9)
    words = [[*word[:-1], word[-1] + "</w>"] for text in texts for word in text.split()]
    for merge in merges:
        pairs = collections.Counter(pair for word in words for pair in zip(word, word[1:]))
        assert pairs[merge] == max(pairs.values())
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == merge:
                    word[i:i + 2] = ["".join(merge)]
                i += 1
    tokens = {token for word in words for token in word}
    assert tokens >= {"low</w>"} and len(merges) == 9


@pytest.mark.parametrize("name", ["toy-ViT", "toy-RN"])
def test_the_committed_weights_are_small_and_know_the_labels(name):
    """Single large things against their names: far above the chance of 1 in 56."""
    assert (ROOT / "toy" / f"{name}.pt").stat().st_size <= 4_000_000
    clip, preprocess = clip_model.load(name)
    assert len(clip.tokenizer) == clip.vocab_size
    for label in data.TOY_LABELS:  # every label's words are single tokens
        assert len(clip.tokenizer.encode(label)) == len(label.split())
    scenes = [i for i in range(400) if len(data.toy_objects("web", 5, i)) == 1][:100]
    images = torch.stack([preprocess(data.toy_scene("web", 5, i)) for i in scenes])
    tokens = clip.tokenize([f"a photo of a {label}." for label in data.TOY_LABELS])
    with torch.no_grad():
        best = clip(images, tokens)[0].argmax(dim=1).tolist()
    truth = [data.toy_objects("web", 5, i)[0][0] for i in scenes]
    assert sum(a == b for a, b in zip(best, truth)) >= 60


def test_pretraining_starts_from_nothing_and_resumes_exactly(tmp_path):
    command = [sys.executable, str(ROOT / "toy" / "pretrain.py"), "--model", "ViT", "--batch-size",
               "8", "--scenes", "64", "--warmup", "2", "--threads", "1", "--easy-loss", "9",
               "--save-every", "1"]
    for name, runs in (("whole", [4]), ("halves", [2, 4])):
        for until in runs:
            subprocess.run([*command, "--steps", "4", "--stop-at", str(until), "--output",
                            str(tmp_path / name), "--cache", str(tmp_path / name)], check=True,
                           stdout=subprocess.DEVNULL)
    whole, halves = (torch.load(tmp_path / name / "toy-ViT.pt", weights_only=True)
                     for name in ("whole", "halves"))
    assert all(torch.equal(whole[key], halves[key]) for key in whole)
    assert (tmp_path / "whole" / "merges.txt.gz").read_bytes() == \
        (ROOT / "toy" / "merges.txt.gz").read_bytes()
