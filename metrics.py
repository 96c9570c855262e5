"""What a run reports: average precision, F1 at k and at a threshold, zero-shot CLIP's scores, the
table, results.json, predictions with heatmaps, curves.

    scores   float16, bfloat16, float32 or float64 [N, C]: N images, C labels; higher: likelier
    targets  integer [N, C]: +1 present, -1 absent, 0 unknown

Tensors on any device, or what torch.as_tensor takes; all is computed on the CPU. Other shapes,
dtypes and values, and NaN scores, raise ValueError. A 0/1 matrix t becomes 2 * t - 1.
"""
import json
import math
import os
import re
import unicodedata
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

CHUNK = 2 ** 22  # entries that are worked on at a time: bounds the memory, changes no result


# ---- metrics

def average_precision(scores, targets):
    """Area under each label's precision-recall steps, as scikit-learn's average_precision_score.

    The mean over a label's positives of the precision among the images that score at least as
    high, so images with equal scores enter together. Unknown entries are left out. Scores are
    compared exactly. Memory beside the input: 60 MB.

    Returns float64 [C]: in (0, 1], NaN where a label has no positive.
    """
    scores, targets = _check(scores, targets)
    width = max(1, CHUNK // max(1, len(scores)))
    precisions = []
    for columns in zip(scores.split(width, dim=1), targets.split(width, dim=1)):
        # contiguous twice: collected from the rows of a wide matrix, then transposed
        for s, t in zip(*(x.contiguous().t().contiguous().numpy() for x in columns)):  # [W, N]
            _, known, hits = _present(s, t)
            precisions.append((hits / known).mean() if len(hits) else math.nan)
    return torch.tensor(precisions, dtype=torch.float64)


def _present(scores, targets):
    """The present ones of entries, by rising score: three arrays, the scores, and how many known
    and how many present entries score at least as high. (NumPy sorts values ten times as fast as
    anyone sorts values with indices.)"""
    known, present = np.sort(scores[targets != 0]), np.sort(scores[targets == 1])
    return (present, len(known) - np.searchsorted(known, present),
            len(present) - np.searchsorted(present, present))


def mean_average_precision(scores, targets):
    """Mean of average_precision over the labels that have a positive: a float, NaN if none has."""
    return average_precision(scores, targets).nanmean().item()


def precision_recall_f1_at_k(scores, targets, k):
    """Predict the k highest-scoring labels of every image; counts pooled over all images (micro).

    All labels compete, and an unknown one among the k counts as wrong, as in the code of LESA
    (CVPR 2020), BiAM (ICCV 2021) and MKT. Of equal scores the lower column index goes first.
    Returns three floats in [0, 1], 0 where there is nothing; ValueError unless 1 <= k <= C.
    """
    scores, targets = _check(scores, targets)
    if k != int(k) or not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k must be an integer from 1 to {scores.shape[1]}, labels; it is {k}")
    hits, positives = 0, 0
    rows = max(1, CHUNK // scores.shape[1])
    for s, t in zip(scores.split(rows), targets.split(rows)):
        # which of equal scores topk takes is not defined, so only its k-th value is used
        kth = s.topk(int(k), dim=1).values[:, -1:]  # [rows, 1]
        above, equal = s > kth, s == kth
        places = k - above.sum(dim=1, keepdim=True)
        predicted = above | (equal & (equal.cumsum(dim=1) <= places))
        hits += int((predicted & (t == 1)).sum())
        positives += int((t == 1).sum())  # of a part: a sum makes int64 of its bools first
    predictions = max(1, len(scores) * k)
    return hits / predictions, hits / max(1, positives), 2 * hits / (predictions + positives)


def f1_at_threshold(scores, targets, threshold):
    """Precision, recall and F1 of the predictions score >= threshold, per label and overall.

    As Chen et al. (ML-GCN, CVPR 2019, section 4.1) and the papers on partial labels report them:
    CP and CR are means over the labels that have a positive (never predicted: precision 0), OP and
    OR pool all entries, CF1 is the harmonic mean of CP and CR, OF1 of OP and OR. Unknown entries
    are neither predicted nor positives.
    Returns {"CP", "CR", "CF1", "OP", "OR", "OF1"}, floats in [0, 1], 0 where there is nothing.
    """
    scores, targets = _check(scores, targets)
    counts = 0
    rows = max(1, CHUNK // max(1, scores.shape[1]))
    for s, t in zip(scores.split(rows), targets.split(rows)):
        predicted = (s >= threshold) & (t != 0)
        counts += torch.stack([predicted & (t == 1), predicted, t == 1]).sum(dim=1)  # [3, C]
    hits, predictions, positives = counts.double()
    labels = max(1, (positives > 0).sum().item())
    # where a denominator is raised to 1 there is no hit: sums over labels with a positive
    cp = (hits / predictions.clamp(min=1)).sum().item() / labels
    cr = (hits / positives.clamp(min=1)).sum().item() / labels
    hits, predictions, positives = counts.sum(dim=1).tolist()
    return {"CP": cp, "CR": cr, "CF1": 2 * cp * cr / (cp + cr or 1),
            "OP": hits / max(1, predictions), "OR": hits / max(1, positives),
            "OF1": 2 * hits / max(1, predictions + positives)}


def _check(scores, targets):
    """Both as tensors on the CPU, scores of at least float32: NumPy does not know bfloat16.
    ValueError as the module's docstring says."""
    scores, targets = torch.as_tensor(scores).detach().cpu(), torch.as_tensor(targets).cpu()
    if scores.dim() != 2 or scores.shape != targets.shape:
        raise ValueError("scores and targets must both be [images, labels]; they are "
                         f"{list(scores.shape)} and {list(targets.shape)}")
    floating = scores.is_floating_point(), targets.is_floating_point()
    if floating != (True, False) or targets.dtype == torch.bool:
        raise ValueError("scores must be floating point and targets integers; they are "
                         f"{scores.dtype} and {targets.dtype}")
    if scores.numel() and (targets.min() < -1 or targets.max() > 1):
        raise ValueError("targets must be +1 (present), -1 (absent) or 0 (unknown)")
    if scores.numel() and scores.min().isnan():  # the minimum is NaN if any score is
        raise ValueError("scores must not be NaN")
    return scores.to(torch.promote_types(scores.dtype, torch.float32)), targets


def best_threshold(scores, targets):
    """The score that, as a threshold, gives the highest OF1 over the known entries, and that OF1:
    two floats, NaN where no entry is known to be present. On test images it is optimistic."""
    scores, targets = (x.numpy() for x in _check(scores, targets))
    # a threshold between two present entries only adds wrong predictions: the best is one's score
    present, known, hits = _present(scores, targets)
    if not len(present):
        return math.nan, math.nan
    of1 = 2 * hits / (known + len(present))
    best = of1.argmax()
    return present[best].item(), of1[best].item()


# ---- CLIP as it is

ZERO_SHOT = "zero-shot, global", "zero-shot, global + local", "zero-shot, as probabilities"


def zero_shot_scores(embeddings, labels, scale, playing):
    """Scores of CLIP without training, in float32 whatever comes in, for the labels in play.

    embeddings: unit length [B, 1 + L, D], the whole image's, then the locations'. labels: unit
    length [C, D]. scale: CLIP's own, the inverse of its temperature. playing: as in_play gives it.
    Returns {(name, prefix): [B, c]}: the cosine of the whole image; the mean of that and the best
    location's; the same of probabilities, a softmax over the labels in play at each place."""
    cosines, scores = embeddings.float() @ labels.float().T, {}  # [B, 1 + L, C]
    for prefix, index in playing.items():
        whole, best = cosines[:, 0, index], cosines[:, 1:, index].amax(dim=1)
        p = (scale * cosines[..., index]).softmax(dim=-1)
        rows = whole, (whole + best) / 2, (p[:, 0] + p[:, 1:].amax(dim=1)) / 2
        scores |= {(name, prefix): row for name, row in zip(ZERO_SHOT, rows)}
    return scores


def normalize_scores(scores):
    """Zero-shot scores [N, C], normalised over the test images -> float32 [N, C].

    Each label is standardised over the images, then each image over its labels: it takes all test
    images, but no target. (SPARC, CVPR 2025, equations 1 and 2, has the other order, the image
    first.) What does not vary becomes 0, never NaN."""
    scores = torch.as_tensor(scores).to(torch.float32, copy=True)
    for dim in (0, 1):
        width = max(1, CHUNK // max(1, scores.shape[dim]))
        for part in scores.split(width, dim=1 - dim):  # views: scores is normalised in place
            # in float64 the mean of equal float32 values is just this value: their difference is 0
            centred = part - part.mean(dim, keepdim=True, dtype=torch.float64).float()
            std = centred.std(dim, correction=0, keepdim=True)
            part.copy_(centred / std.where(std > 0, 1))
    return scores


def zero_shot_rows(scores, dataset, ks):
    """What a method has to beat, four rows: those of zero_shot_scores, here of all test images,
    and the best of them normalised. Takes them out of scores: Open Images' fill 12 GB."""
    rows = [table_row(name, "zero-shot", scores, dataset, ks) for name in ZERO_SHOT]
    playing = in_play(dataset)
    best = _strongest(rows, [*playing][-1]) or rows[0]  # by the mAP of all labels
    for key in [*scores]:
        if key[0] in ZERO_SHOT and key[0] != best["name"]:
            del scores[key]
    name = "zero-shot, the best of these normalised"
    normalised = {(name, prefix): normalize_scores(scores.pop((best["name"], prefix)))
                  for prefix in playing}
    return [*rows, table_row(name, "zero-shot", normalised, dataset, ks)]


# ---- the table

def in_play(dataset):
    """{prefix of the metrics: which labels compete}. Where a dataset has unseen labels, ZSL
    ("zsl_mAP", ...) ranks these alone, GZSL ("gzsl_mAP", ...) all labels."""
    if len(dataset.unseen):
        return {"zsl_": dataset.unseen, "gzsl_": slice(None)}
    return {"": slice(None)}


def table_row(name, kind, scores, dataset, ks):
    """A row of the table: {"name", "kind", "mAP", "P@k", "R@k", "F1@k" of every k}, each metric
    with the prefix of its setting. scores: {(name, prefix): float [N, c], of the labels in play}.

    NaN is what cannot be said: mAP where no label is known to be present in one image and absent
    in another, all metrics where no label is known to be present at all."""
    row = {"name": name, "kind": kind}
    (present, absent), all_targets = dataset.counts(), dataset.targets
    for prefix, index in in_play(dataset).items():
        ranked, targets = scores[name, prefix], all_targets[:, index]
        can_rank = ((present > 0) & (absent > 0))[index].any()
        row[f"{prefix}mAP"] = mean_average_precision(ranked, targets) if can_rank else math.nan
        for k in ks:
            if k <= ranked.shape[1]:
                values = 3 * [math.nan]
                if present[index].any():
                    values = precision_recall_f1_at_k(ranked, targets, k)
                row |= zip((f"{prefix}P@{k}", f"{prefix}R@{k}", f"{prefix}F1@{k}"), values)
    return row


def _strongest(rows, prefix):
    """The zero-shot row of the highest mAP, None where there is no mAP."""
    rows = [row for row in rows
            if row["kind"] == "zero-shot" and not math.isnan(row[f"{prefix}mAP"])]
    return max(rows, key=lambda row: row[f"{prefix}mAP"], default=None)


def print_table(rows, dataset):
    """Print table_row's rows in percent, a table a setting; a star marks the best zero-shot row.
    Under it, how many labels the mAP averages where that is not all of them."""
    titles = {"zsl_": "ZSL, unseen labels", "gzsl_": "GZSL, all labels", "": "all labels"}
    width = max(len(row["name"]) for row in rows) + 3
    present, absent = dataset.counts()
    for prefix, index in in_play(dataset).items():
        names = [name for name in rows[-1] if re.match(f"{prefix}(mAP|P@|R@|F1@)", name)]
        best = _strongest(rows, prefix)
        heading = f"{titles[prefix]} (%)"
        print(f"\n{heading:{width}}" + "".join(f"{name[len(prefix):]:>7}" for name in names))
        for row in rows:
            title = f"{row['name']} *" if row is best else row["name"]
            values = [f"{100 * row[name]:7.1f}" for name in names]
            print(f"{title:{width}}" + "".join(values).replace("    nan", "    n/a"))
        has_present, has_absent = present[index] > 0, absent[index] > 0
        has_both, only_present = has_present & has_absent, has_present & ~has_absent
        if not has_both.any():
            print("no mAP: no label is known to be present in one image and absent in another")
        elif not has_both.all():
            count = f"{has_present.sum()} of {len(has_present)}"
            print(f"mAP averages the {count} labels with a known present entry")
        if only_present.any() and has_both.any():
            print(f"{only_present.sum()} of them without an absent one: AP 1 whatever the scores")
    if best is not None:
        print("* the best zero-shot scoring")
    if dataset.missing:
        print(f"{dataset.missing} test images are missing: not comparable with complete results")


def results(method, rows, scores, dataset, args, seconds):
    """The text of a run's results.json. scores: float [N, C] of the last row, the method's, of
    which every label's AP and the best threshold are kept; None where it has none, a sweep's
    average. What cannot be said is null."""
    found = {"method": method, "data": args.data, "clip": args.clip, "seed": args.seed,
             "seconds": round(seconds), "images": len(dataset), "missing": dataset.missing,
             "limit": args.limit, "rows": rows}
    if scores is not None:
        targets = dataset.targets
        found["threshold"], found["threshold_OF1"] = best_threshold(scores, targets)
        values = average_precision(scores, targets), *dataset.counts()
        columns = dataset.labels, *(x.tolist() for x in values)
        found["labels"] = [dict(zip(("label", "AP", "present", "absent"), row))
                           for row in zip(*columns)]
    without_nan = json.loads(json.dumps(found), parse_constant=lambda _: None)
    return json.dumps(without_nan, indent=1)


# ---- predictions

def write_prediction(path, photo, scores, maps, labels, args, crop=1.0):
    """Print an image's JSON line, {"path", "labels": [{"label", "score"}, ...]}, best label first,
    or append it to the file --output; with --heatmap draw its three best labels before.

    scores: float [C]. maps: float [C, L] in [0, 1], of a square grid's locations, row by row.
    crop: as draw_heatmaps takes it."""
    scores = scores.tolist()
    count = args.top or (5 if args.threshold is None else len(labels))
    best = sorted(range(len(labels)), key=lambda i: -scores[i])[:count]
    best = [i for i in best if args.threshold is None or scores[i] >= args.threshold]
    if args.heatmap:
        file = heatmap_file(path, args.heatmap)
        file.parent.mkdir(parents=True, exist_ok=True)
        side = math.isqrt(maps.shape[1])
        shown = [(labels[i], scores[i], maps[i].view(side, side)) for i in best[:3]]
        draw_heatmaps(photo, shown, crop).save(file)
    predicted = [{"label": labels[i], "score": round(scores[i], 4)} for i in best]
    line = json.dumps({"path": str(path), "labels": predicted}, ensure_ascii=False)
    line = line.encode(errors="backslashreplace").decode()  # names may be no Unicode
    if args.output:
        with open(args.output, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")
    else:
        print(line, flush=True)


def heatmap_file(path, folder):
    """Where the heatmap of an image goes: album/a.jpg -> folder/album/a.jpg.png, a Path that does
    not exist yet. Names too long for a file system are cut."""
    path = Path(path)
    *folders, name = [os.fsencode(part)[:200].decode(errors="ignore") for part in path.parts
                      if part not in ("..", path.anchor)]
    name = name.removesuffix(".png")
    file, number = Path(folder, *folders, f"{name}.png"), 2
    while file.exists():  # perhaps the photo itself
        file = file.with_name(f"{name}-{number}.png")
        number += 1
    return file


# ---- pictures

# colours that colour-blind people tell apart (Okabe and Ito, 2008)
COLOURS = ["#000000", "#e69f00", "#0072b2", "#cc79a7", "#009e73", "#d55e00", "#56b4e9"]


def _write(draw, place, text, size, anchor="la", width=math.inf):
    """A line of text, cut to a width in pixels -> its width. Pillow's own font is for ASCII."""
    text = unicodedata.normalize("NFKD", " ".join(text.split())).encode("ascii", "ignore").decode()
    font = ImageFont.load_default(size)
    while font.getlength(text) > width:
        text = text[:-1]
    draw.text(place, text, "#444444", font, anchor)
    return font.getlength(text)


def draw_heatmaps(photo, maps, crop=1.0):
    """The photo, then a tile per map with its colours over the grey photo -> RGB PIL image.

    maps: (label, score, values [h, w]) each. All values are on one scale, from 0, where the photo
    is seen, to 1. crop: the side of the central square that the grid covers, as a share of the
    photo's shorter one; 0: it covers the whole photo. The rest, never looked at, is dark."""
    width, height = (max(1, round(360 * side / max(photo.size))) for side in photo.size)
    photo = photo.resize((width, height))
    covered, corner = photo.size, (0, 0)
    if crop:
        side = max(1, round(crop * min(photo.size)))
        covered, corner = (side, side), ((width - side) // 2, (height - side) // 2)
    seen = photo.crop((*corner, corner[0] + covered[0], corner[1] + covered[1]))
    photo = photo.point(lambda value: 80 * value // 255)
    photo.paste(seen, corner)
    tiles = [("photo", photo)]
    for label, score, values in maps:
        values = np.nan_to_num(np.asarray(values, np.float32)).clip(0, 1)
        heat = Image.fromarray((255 * values).astype(np.uint8)).resize(covered)
        # ever lighter, so that it reads without colour vision
        colours = ImageOps.colorize(heat, "#190f73", "#ffe11e", mid="#d73c64")
        tile = ImageOps.grayscale(photo).convert("RGB")
        tile.paste(colours, corner, heat.point(lambda value: 3 * value // 4))
        tiles.append((f"{score:.3f}  {label}", tile))
    cell = max(width, 200) + 16  # a label needs some room
    sheet = Image.new("RGB", (16 + len(tiles) * cell, height + 56), "white")
    for i, (caption, tile) in enumerate(tiles):
        sheet.paste(tile, (16 + i * cell, 16))
        _write(ImageDraw.Draw(sheet), (16 + i * cell, height + 22), caption, 17, width=cell - 16)
    return sheet


def draw_curves(log):
    """A run's losses over its epochs, and its scores if there are any -> RGB PIL image.

    log: a dict or more with "epoch", numbers, perhaps "stage". Names with mAP, precision, recall
    or F1 are scores in [0, 1], drawn in percent. Epochs are counted through all stages."""
    names = dict.fromkeys(name for line in log for name in line)
    scores = [name for name in names if re.search("mAP|precision|recall|F1", name)]
    others = ("stage", "epoch", "lr", "seconds", "unreadable_images", *scores)
    losses = [name for name in names if name not in others]
    panels = [("loss", losses, 1), ("score (%)", scores, 100)][:2 if scores else 1]
    sheet = Image.new("RGB", (1040 * len(panels), 760), "white")
    for i, panel in enumerate(panels):
        _draw_panel(ImageDraw.Draw(sheet), 1040 * i, log, *panel)
    return sheet.reduce(2)  # drawn twice as large: smooth lines


def _draw_panel(draw, x, log, title, names, factor):
    left, right, top, bottom = x + 120, x + 1000, 180, 660
    values = {name: [factor * line.get(name, math.nan) for line in log] for name in names}
    finite = [value for row in values.values() for value in row if math.isfinite(value)]
    low, high = min(finite, default=0), max(finite, default=0)
    step = 10.0 ** math.floor(math.log10(max(high - low, 0.05 * abs(high), 1e-6)))  # round numbers
    ticks = range(math.floor(low / step), math.floor(high / step) + 2)

    def place(epoch, value):
        return (left + (right - left) * (epoch + 0.5) / len(log),
                bottom - (bottom - top) * (value / step - ticks[0]) / (ticks[-1] - ticks[0]))

    _write(draw, (left, 24), title, 34)
    _write(draw, ((left + right) / 2, 710), "epoch", 24, "ma")
    for tick in ticks:
        y = place(0, tick * step)[1]
        draw.line((left, y, right, y), "#e4e4e4", 2)
        _write(draw, (left - 16, y), f"{tick * step:.5g}", 24, "rm")
    every = math.ceil(len(log) / 10)
    for epoch in range(every, len(log) + 1, every):
        _write(draw, (place(epoch - 1, 0)[0], bottom + 12), str(epoch), 24, "ma")
    x, y = left, 84
    for i, (name, row) in enumerate(values.items()):
        # the first is the widest: a total stays visible under a term that equals it
        colour, size = COLOURS[i % len(COLOURS)], 4 if i else 8
        points = [place(epoch, value) for epoch, value in enumerate(row) if math.isfinite(value)]
        if len(points) > 1:
            draw.line(points, colour, size, joint="curve")
        for px, py in points:
            draw.ellipse((px - size, py - size, px + size, py + size), colour)
        draw.line((x, y + 16, x + 44, y + 16), colour, size)
        x += 104 + _write(draw, (x + 60, y), name, 26)
        if x > right - 200:
            x, y = left, y + 40
