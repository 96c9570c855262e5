"""Every method on every dataset that it is for, on small trees with the tiny CLIPs, end to end."""
import json
import math

import pytest

import data
import lang_cls
import mkt
import trm_ml
from test_benchmarks import folder_root, vg_root, write_coco, write_voc  # noqa: F401
from test_big_benchmarks import cub_root, openimages_root  # noqa: F401
from test_data import nuswide_root  # noqa: F401

ONE_EPOCH = ["--epochs", "1", "--batch-size", "4", "--workers", "0", "--device", "cpu", "--quiet"]
METHODS = {
    mkt: ["--clip", "toy-ViT", "--topk", "4", "--prompt-epochs", "1"],
    lang_cls: ["--clip", "toy-RN", "--sentences", "20"],
    trm_ml: ["--clip", "toy-RN", "--image-size", "128", "--matching", "region"],
}
# dataset -> (arguments, whether labels are unseen)
DATASETS = {
    "coco": ([], False), "coco, zero-shot": (["--zero-shot"], True), "voc2007": ([], False),
    "vg200": ([], False), "cub": (["--not-visible", "unknown"], False), "nuswide": ([], True),
    "nuswide81": ([], False), "openimages": ([], True), "folder": ([], False),
}


def tree(dataset, request, tmp_path):
    """A small tree in the dataset's layout -> its root."""
    name = dataset.split(",")[0]
    fixtures = {"vg200": "vg_root", "cub": "cub_root", "openimages": "openimages_root",
                "folder": "folder_root", "nuswide": "nuswide_root", "nuswide81": "nuswide_root"}
    if name in fixtures:
        return request.getfixturevalue(fixtures[name])
    if name == "voc2007":
        write_voc(tmp_path / "VOC2007")
    elif dataset == "coco":
        write_coco(tmp_path, "train2014"), write_coco(tmp_path, "val2014")
    else:  # the split is by names: 65 of COCO's 80
        categories = dict(enumerate(data.COCO_LABELS, 1))
        seen = [1, 2, 3, 4]  # person, bicycle, car, motorcycle; 5 is the unseen airplane
        boxes = [(image, category, 0) for image in (1, 2) for category in seen] + [(3, 5, 0)]
        for part in ("train2014", "val2014"):
            write_coco(tmp_path, part, {1: 0, 2: 1, 3: 2}, boxes, categories)
    return tmp_path


@pytest.fixture
def root(request, dataset, tmp_path):
    return tree(dataset, request, tmp_path)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
@pytest.mark.parametrize("dataset", DATASETS)
def test_a_method_on_a_dataset(method, dataset, root, tmp_path, capsys):
    options, has_unseen = DATASETS[dataset]
    method.main(["--data", dataset.split(",")[0], "--root", str(root), *options, *METHODS[method],
                 *ONE_EPOCH, "--output", str(tmp_path / "run")])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    row = results["rows"][-1]
    assert row["kind"] == "method" and results["data"] == dataset.split(",")[0]
    scores = [row[name] for name in (("zsl_mAP", "gzsl_mAP") if has_unseen else ("mAP",))]
    assert all(0 < score <= 1 for score in scores if not math.isnan(score))
    assert not math.isnan(scores[-1]) and ("mAP" in row) != has_unseen
    at = {name.partition("@")[2] for name in row if "F1@" in name}
    assert at <= ({"10", "20"} if dataset == "openimages" else {"3", "5"})
    method.main(["--eval", str(tmp_path / "run" / "best.pt"), "--root", str(root), "--workers", "0",
                 "--device", "cpu", "--quiet", "--output", str(tmp_path / "again")])
    again = json.loads((tmp_path / "again" / "results.json").read_text())["rows"][-1]
    assert again == pytest.approx(row, nan_ok=True) if has_unseen else again == row


@pytest.mark.parametrize("partial", [[], ["--partial", "0.5"]])
def test_targets_too_large_for_a_tensor_are_refused(partial, openimages_root, tmp_path,  # noqa: F811
                                                    monkeypatch, capsys):
    monkeypatch.setattr(data, "DENSE_ENTRIES", 20)  # of the training split's 24, the test's 12
    with pytest.raises(SystemExit) as error:
        trm_ml.main(["--data", "openimages", "--root", str(openimages_root), *METHODS[trm_ml],
                     *ONE_EPOCH, *partial, "--output", str(tmp_path / "run")])
    message = capsys.readouterr().err.strip()
    assert error.value.code == 2 and "--limit" in message and not (tmp_path / "run").exists()
