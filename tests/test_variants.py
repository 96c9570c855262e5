"""variants/: every diff applies to its script, which then runs and says something else."""
import importlib.util
import math
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import clip_model
import lang_cls
import mkt
import trm_ml
from trees import results

ROOT = Path(__file__).resolve().parent.parent
DIFFS = {path.stem: path for path in sorted((ROOT / "variants").glob("*.diff"))}
SCRIPTS = {"mkt.py": mkt, "lang_cls.py": lang_cls, "trm_ml.py": trm_ml}
QUICK = {"mkt.py": [], "lang_cls.py": ["--sentences", "20"], "trm_ml.py": ["--partial", "1"]}


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """Gives the module that a diff makes, and the name of its script."""
    @cache
    def apply(name):
        diff, folder = DIFFS[name], tmp_path_factory.mktemp(name)
        script, = re.findall(r"^\+\+\+ b/(.*)$", diff.read_text(), re.MULTILINE)
        shutil.copy(ROOT / script, folder)
        # no repository is needed, and one above the folder would be looked at
        done = subprocess.run(["git", "apply", diff], cwd=folder, capture_output=True, text=True,
                              env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)})
        assert done.returncode == 0, f"""{done.stderr}
variants/{diff.name} does not fit {script} any more. To renew it, in a clean checkout:
    git apply --3way variants/{diff.name}    # then mend the conflicts in {script}
    git diff HEAD {script} > variants/{diff.name}
    git checkout HEAD {script}"""
        specification = importlib.util.spec_from_file_location(name, folder / script)
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        return module, script

    return apply


@cache
def rows_of_the_script(script, folder):
    return SCRIPTS[script].main(quick(script, folder))


def quick(script, folder):
    return [*QUICK[script], "--limit", "40", "--epochs", "1", "--device", "cpu", "--quiet",
            "--output", str(folder)]


@pytest.mark.parametrize("name", DIFFS)
def test_a_variant_runs_and_has_a_row_of_its_own(name, patched, tmp_path, tmp_path_factory):
    module, script = patched(name)
    *_, row = module.main(quick(script, tmp_path))
    assert results(tmp_path)["rows"][-1] == row and row["kind"] == "method"
    *_, before = rows_of_the_script(script, tmp_path_factory.getbasetemp() / script)
    assert row.keys() == before.keys() and row["name"] != before["name"]
    for metric in row.keys() - {"name", "kind"}:
        assert math.isfinite(row[metric]) and 0 <= row[metric] <= 1
        if metric.endswith("mAP"):
            assert row[metric] != before[metric]


def test_every_variant_is_described():
    readme = (ROOT / "variants/README.md").read_text()
    for name in DIFFS:
        assert f"git apply variants/{name}.diff" in readme


@torch.no_grad()
@pytest.mark.parametrize("words", ["a_photo_of_a", ""])
def test_dualcoops_probability_is_a_loop(patched, words):
    torch.manual_seed(0)
    clip, _ = clip_model.load("toy-RN")
    args = SimpleNamespace(words=words, per_label_context=True, free_absent=words == "")
    model = patched("dualcoop")[0].DualCoOp(clip, ["cup", "key", "hat"], args)
    model.context.data += torch.randn_like(model.context)
    x, texts = F.normalize(torch.randn(2, 5, 128), dim=-1), model.texts()
    logits, _, maps = model(x, texts)
    absent = F.normalize(model.absent, dim=-1) if args.free_absent else texts[3:]
    assert len(absent) == 3 and model.context.shape[1:3] == (3, 4 if words else 16)
    for b in range(2):
        for c in range(3):
            similar = [20 * place @ texts[c] for place in x[b, 1:]]
            weights = [s.exp() / sum(s.exp() for s in similar) for s in similar]
            present = 5 * sum(w * s for w, s in zip(weights, similar))
            other = 5 * sum(w * 20 * place @ absent[c] for w, place in zip(weights, x[b, 1:]))
            p = present.exp() / (present.exp() + other.exp())
            torch.testing.assert_close(logits[b, c].sigmoid(), p)
            torch.testing.assert_close(maps[b, c], torch.stack([torch.tensor(0.0), *weights]))


def test_rams_transport_has_its_marginals_and_is_the_least(patched):
    torch.manual_seed(0)
    cost, shares = torch.rand(2, 6, 4).double(), torch.rand(2, 6).double().softmax(dim=1)
    plan = patched("ram")[0].transport(cost, shares)
    torch.testing.assert_close(plan.sum(dim=1), torch.full((2, 4), 0.25).double())
    torch.testing.assert_close(plan.sum(dim=2), shares, rtol=1e-2, atol=0)
    # the least: but for what belongs to rows or columns alone, -0.1 log(plan) is the cost
    for image, costs in zip(plan, cost):
        rest = costs + 0.1 * image.log()
        rest = rest - rest.mean(dim=0) - rest.mean(dim=1, keepdim=True) + rest.mean()
        torch.testing.assert_close(rest, torch.zeros_like(rest), rtol=0, atol=1e-9)


def test_rams_loss_is_a_loop_over_the_batch(patched):
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 4), torch.tensor([[1, -1, 0, 1], [-1] * 4, [0, 1, 0, -1]])
    terms = patched("ram")[0].contrastive_losses(logits, targets)
    for x, loss in zip(logits, terms.values()):
        known = [x[b, c].exp() for b in range(3) for c in range(4) if targets[b, c]]
        present = [x[b, c] for b in range(3) for c in range(4) if targets[b, c] == 1]
        expected = sum(sum(known).log() - value for value in present) / len(present)
        torch.testing.assert_close(loss, expected)


def test_piaas_discriminants_are_scikit_learns(patched):
    """Equal numbers and weights of locations a label; scikit-learn divides by n, not n - 1, and
    its shrinkage takes from the covariance what it adds."""
    analysis = pytest.importorskip("sklearn.discriminant_analysis")
    torch.manual_seed(0)
    label = torch.arange(4).repeat_interleave(30)
    x = torch.randn(4, 8).double()[label] + torch.randn(120, 8).double() @ torch.rand(8, 8).double()
    p = F.one_hot(label, 5).double()  # no location is of the fifth label
    memory = torch.randn(5, 8).double()
    weight, bias = patched("piaa")[0].discriminants(x, p, memory)
    ratio = 8 / 119
    model = analysis.LinearDiscriminantAnalysis("lsqr", ratio / (1 + ratio), priors=[0.25] * 4)
    model.fit(x.numpy(), label.numpy())
    scale = 120 / 119 * (1 + ratio)
    torch.testing.assert_close(scale * weight[:4], torch.from_numpy(model.coef_))
    bias_there = torch.from_numpy(model.intercept_) - math.log(0.25)
    torch.testing.assert_close(scale * bias[:4], bias_there)
    shrunk = scale * torch.from_numpy(model.covariance_)
    torch.testing.assert_close(weight[4], torch.linalg.solve(shrunk, memory[4]))


def test_piaa_takes_the_surest_locations_of_all_photos(patched, monkeypatch):
    module, _ = patched("piaa")
    torch.manual_seed(0)
    embeddings = F.normalize(torch.randn(130, 1 + 2, 8), dim=-1)  # three batches of photos
    memory = F.normalize(torch.randn(4, 8), dim=-1)
    monkeypatch.setattr(module, "LOCATIONS", 5)
    monkeypatch.setattr(module, "encode", lambda clip, photos, args: (embeddings[photos], None))
    args = SimpleNamespace(workers=0, device="cpu", quiet=True)
    photos = [(torch.tensor(i), 0) for i in range(130)]
    x, p = module.sure_locations(None, photos, memory, args)
    places = embeddings[:, 1:].flatten(0, 1)
    probabilities = (60 * places @ memory.T).softmax(dim=1)
    expected = []
    for c in range(4):
        own = [i for i in range(260) if probabilities[i].argmax() == c]
        entropy = [sum(-q * math.log(q) for q in probabilities[i].tolist() if q) for i in own]
        expected += [i for _, i in sorted(zip(entropy, own))[:5]]
    torch.testing.assert_close(x, places[expected])
    torch.testing.assert_close(p, probabilities[expected])
