"""Average precision, F1 at k, and precision / recall / F1 at a threshold.

    scores   float16, bfloat16, float32 or float64 [images, labels]; higher: more likely present
    targets  integer [images, labels]: +1 present, -1 absent, 0 unknown (the entry is left out)

Tensors on any device, or anything torch.as_tensor takes (NumPy arrays, lists). A 0/1 matrix is not
in this encoding: convert it with 2 * t - 1, or every absent label counts as unknown.

Every function raises ValueError for scores that are not floating point, targets that are not
integers in {-1, 0, +1}, shapes that differ or are not two-dimensional, and NaN scores (the message
names the label's column). Infinite scores are ordinary values.

    >>> scores = torch.tensor([[0.9, 0.2], [0.8, 0.7], [0.1, 0.3]])
    >>> targets = torch.tensor([[1, -1], [-1, 1], [1, 0]], dtype=torch.int8)
    >>> average_precision(scores, targets)
    tensor([0.8333, 1.0000], dtype=torch.float64)
"""
import re
import shutil
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

# Entries of the matrix that are worked on at a time; bounds the memory, never changes a result.
CHUNK = 2 ** 22
# Bytes of scores above which evaluate keeps them in temporary files instead of in memory.
IN_MEMORY = 2 ** 31


def average_precision(scores, targets):
    """Area under each label's precision-recall steps, as scikit-learn's average_precision_score.

    AP = sum over score values v of (recall(v) - recall(just above v)) * precision(v), images ranked
    by descending score. Images with equal scores enter together, so the order of the images never
    matters. Scores are compared in their own dtype, exactly.

    Returns float64 [labels] on the scores' device: values in (0, 1], NaN where a label has no
    positive (so everywhere if there are no images). average_precision(...).isnan().sum() is the
    number of labels that the mean leaves out.

    Labels are worked on in chunks, on the CPU spread over torch.get_num_threads() threads. The
    extra memory is about 30 MB a thread for 107,859 x 1,006 float32 scores, whatever the number
    of labels; from a million images on it is about 50 bytes an image and thread.
    """
    scores, targets = _check(scores, targets)
    images, labels = scores.shape
    if images == 0:
        return torch.full((labels,), torch.nan, dtype=torch.float64, device=scores.device)
    width = max(1, CHUNK // images)

    def chunk(start):
        columns = slice(start, start + width)
        s, t = _transposed(scores[:, columns]), _transposed(targets[:, columns])
        return torch.stack([_average_precision(*label) for label in zip(s, t)])

    parts = _map(chunk, range(0, labels, width), scores.device)
    return torch.cat([scores.new_empty(0, dtype=torch.float64), *parts])


def _average_precision(scores, targets):
    """One label: scores [images], targets [images] -> float64 scalar."""
    # Integers sort several times faster than floats (radix sort). The bits of a float, read as an
    # integer, are in the float's order once the magnitude of the negative ones is flipped.
    # 0 - scores: highest score first, and -0.0 becomes 0.0, which it must tie with.
    keys = (0 - scores).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[scores.itemsize])
    largest = torch.iinfo(keys.dtype).max
    keys ^= (keys >> (8 * keys.itemsize - 1)) & largest
    if targets.abs().amin() == 0:
        keys.masked_fill_(targets == 0, largest)   # unknown: behind all others, even -inf
    keys, order = keys.sort()
    # 0-based ranks of the positives; index_select is much faster here than targets[order], and
    # NumPy, where it can read the tensor, than nonzero
    present = targets.clamp(min=0).index_select(0, order).view(torch.bool)
    ranks = (torch.from_numpy(np.flatnonzero(present.numpy())) if present.device.type == "cpu"
             else present.nonzero().squeeze(1))
    hits = torch.arange(1, len(ranks) + 1, device=ranks.device)   # positives down to this one
    items = ranks + 1                                             # all images down to this one
    # Where the next image has the same score, both counts go on to the end of the tie.
    positive_keys = keys[ranks]
    tied = (positive_keys == keys[items.clamp(max=len(keys) - 1)]).nonzero().squeeze(1)
    hits[tied] = torch.searchsorted(positive_keys, positive_keys[tied], right=True)
    items[tied] = torch.searchsorted(keys, positive_keys[tied], right=True)
    return (hits.double() / items).mean()


def _transposed(columns):
    """[images, width] -> contiguous [width, images]; in blocks, as the rows lie far apart."""
    out = columns.new_empty(columns.shape[::-1])
    for row in range(0, len(columns), 4096):
        out[:, row:row + 4096] = columns[row:row + 4096].contiguous().t()
    return out


def mean_average_precision(scores, targets):
    """Mean of average_precision over the labels that have a positive: a float in (0, 1].

    NaN if no label has one. Memory as average_precision.
    """
    return average_precision(scores, targets).nanmean().item()


def precision_recall_f1_at_k(scores, targets, k):
    """Predict the k highest-scoring labels of every image; counts pooled over all images (micro).

    The F1@k of multi-label zero-shot papers (He et al., AAAI 2023, section "Experimental Setup"):
        precision = hits / predictions, recall = hits / positives, F1 = their harmonic mean.
    Only an image's known labels are ranked: an unknown one takes none of the k places and counts
    neither as predicted nor as a positive. An image with fewer than k known labels predicts those.
    Of labels with equal scores the one with the lower column index goes first, on every device.

    Returns three floats in [0, 1]; a ratio whose denominator is 0 (no positives, no known entry,
    no images) is 0. Raises ValueError unless k is an integer from 1 to the number of labels.
    Extra memory: about 20 MB a thread.
    """
    scores, targets = _check(scores, targets)
    if k != int(k) or not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k must be an integer from 1 to the number of labels, "
                         f"{scores.shape[1]}; it is {k}")

    def count(s, t):
        known, positive = t != 0, t == 1
        s = s.masked_fill(~known, -torch.inf)
        kth = s.topk(int(k), dim=1).values[:, -1:]   # [rows, 1]
        # Which of equal scores topk picks is not defined, so only its k-th value is used.
        above, equal = s > kth, (s == kth) & known
        places = k - above.sum(1, keepdim=True)
        predicted = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= places))
        return torch.stack([x.sum() for x in (predicted & positive, predicted, positive)])

    return _precision_recall_f1(*_sum_over_rows(count, scores, targets, shape=3).tolist())


def f1_at_threshold(scores, targets, threshold):
    """Precision, recall and F1 of the predictions score >= threshold, per label and overall.

    As Chen et al. (ML-GCN, CVPR 2019, section 4.1) and the partial-label papers report them:
        CP, CR  mean over labels of the label's precision and recall
        OP, OR  precision and recall of the entries of all labels pooled
        CF1     harmonic mean of CP and CR (not the mean of the labels' F1);  OF1 of OP and OR
    CP and CR take in the labels that have a positive, as mean average precision does; one of these
    that is never predicted has precision 0. OP and OR take in every known entry. Unknown entries
    are neither predicted nor positives. The threshold is rounded to the scores' dtype.

    Returns {"CP", "CR", "CF1", "OP", "OR", "OF1"}, floats in [0, 1]; a ratio whose denominator is 0
    is 0, never NaN. Extra memory: about 20 MB a thread.
    """
    scores, targets = _check(scores, targets)

    def count(s, t):
        predicted, positive = (s >= threshold) & (t != 0), t == 1
        return torch.stack([x.sum(0) for x in (predicted & positive, predicted, positive)])

    counts = _sum_over_rows(count, scores, targets, shape=(3, scores.shape[1]))
    overall = _precision_recall_f1(*counts.sum(1).tolist())
    hits, predictions, positives = counts[:, counts[2] > 0].double()
    labels = max(1, len(positives))
    cp = (hits / predictions.clamp(min=1)).sum().item() / labels
    cr = (hits / positives).sum().item() / labels
    return {"CP": cp, "CR": cr, "CF1": _harmonic_mean(cp, cr),
            "OP": overall[0], "OR": overall[1], "OF1": overall[2]}


def _precision_recall_f1(hits, predictions, positives):
    precision, recall = hits / max(1, predictions), hits / max(1, positives)
    return precision, recall, _harmonic_mean(precision, recall)


def _harmonic_mean(a, b):
    return 2 * a * b / (a + b) if a + b > 0 else 0.0


def _sum_over_rows(count, scores, targets, shape):
    """count(scores, targets) -> int64 [shape], summed over chunks of rows."""
    rows = max(1, CHUNK // 8 // max(1, scores.shape[1]))   # an eighth: many temporaries an entry

    def chunk(start):
        return count(scores[start:start + rows], targets[start:start + rows])

    zero = torch.zeros(shape, dtype=torch.int64, device=scores.device)
    return sum(_map(chunk, range(0, len(scores), rows), scores.device), zero)


def _map(function, items, device):
    """Generator of function(item) for each item, in order; on the CPU an item a thread.

    That beats many threads on one item, by far where other programs keep the cores busy: a sort
    hardly gains from a second thread, and small steps wait for the slowest one.
    """
    if device.type != "cpu" or len(items) < 2:
        yield from map(function, items)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(function, items)
    finally:
        torch.set_num_threads(threads)


def _check(scores, targets):
    """Both as tensors on the scores' device, targets int8; ValueError as the module says."""
    scores = torch.as_tensor(scores).detach()
    targets = torch.as_tensor(targets, device=scores.device)
    if scores.dim() != 2 or scores.shape != targets.shape:
        raise ValueError(f"scores and targets must both be [images, labels]; they are "
                         f"{list(scores.shape)} and {list(targets.shape)}")
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating point; they are {scores.dtype}")
    if targets.dtype == torch.bool or targets.is_floating_point() or targets.is_complex():
        raise ValueError(f"targets must be integers, +1 present, -1 absent, 0 unknown; they are "
                         f"{targets.dtype} (a 0/1 matrix t becomes 2 * t - 1)")
    if scores.numel():
        low, high = (x.item() for x in targets.aminmax())
        if low < -1 or high > 1:
            raise ValueError(f"targets must be +1 (present), -1 (absent) or 0 (unknown); they go "
                             f"from {low} to {high}")
    # One fast pass: the sum is NaN if any score is (and if infinities cancel, hence the second).
    if scores.sum().isnan():
        columns = torch.stack([column.isnan().any() for column in scores.unbind(1)]).nonzero()
        if len(columns):
            raise ValueError(f"scores have NaN in label column {columns[0].item()} "
                             f"({len(columns)} such columns)")
    return scores, targets.to(torch.int8)


def summary(scores, targets, ks, prefix=""):
    """{prefix + "mAP", "P@k", "R@k", "F1@k" for every k up to the number of labels}: floats."""
    result = {prefix + "mAP": mean_average_precision(scores, targets)}
    for k in ks:
        if k <= targets.shape[1]:
            for name, value in zip("P R F1".split(), precision_recall_f1_at_k(scores, targets, k)):
                result[f"{prefix}{name}@{k}"] = value
    return result


def _score_matrices(shapes):
    """Empty float32 matrices of these shapes: in memory, or together too large for it in files.

    The files have no name any more: they end with their tensors, even in a crash."""
    size = 4 * sum(rows * columns for rows, columns in shapes)
    if size <= IN_MEMORY:
        return [torch.empty(shape) for shape in shapes]
    folder = tempfile.gettempdir()
    if shutil.disk_usage(folder).free < size:
        warnings.warn(f"{folder} has no room for {size / 2 ** 30:.1f} GiB of scores, they stay in "
                      f"memory; TMPDIR names another folder")
        return [torch.empty(shape) for shape in shapes]
    matrices = []
    for rows, columns in shapes:
        with tempfile.NamedTemporaryFile() as file:
            matrix = torch.from_file(file.name, True, rows * columns, dtype=torch.float32)
            matrices.append(matrix.view(rows, columns))
    return matrices


@torch.no_grad()
def evaluate(score, batches, targets, settings, ks):
    """Several ways to score labels, in one pass over the images -> {name: summary}.

    score: a batch of images -> {name: scores of all labels [B, C], or, where they depend on which
    labels compete, a function of these labels' indices -> [B, c]}. batches: of (images, ...) in
    the order of targets int8 [N, C]. settings: {prefix: label indices that compete}; a summary a
    setting. ks: see summary. Raises ValueError unless there are N images.

    The scores of all images, 4 bytes each, lie in memory up to IN_MEMORY bytes, or else in
    temporary files (mapped, so the system pages them in and out); one name's at a time are read
    to be ranked."""
    scores, begin = None, 0
    for images, *_ in batches:
        found, end = score(images), begin + len(images)
        if scores is None:
            keys = [(name, prefix) for name in found for prefix in settings]
            scores = dict(zip(keys, _score_matrices([
                (len(targets), len(settings[prefix])) for _, prefix in keys])))
        for (name, prefix), rows in scores.items():
            index, value = settings[prefix], found[name]
            rows[begin:end] = value(index) if callable(value) else value[:, index]
        begin = end
    if begin != len(targets):
        raise ValueError(f"{begin:,} images for targets of {len(targets):,}")
    results = {}
    for (name, prefix), rows in scores.items():
        results.setdefault(name, {}).update(
            summary(rows, targets[:, settings[prefix]], ks, prefix))
    return results


def print_table(rows):
    """Print rows of {"name", "kind", metric: value in [0, 1], or NaN} in percent; a table a
    setting.

    Settings are the metrics' prefixes: zsl_ (unseen labels alone), gzsl_ (all labels), or none.
    A star marks the zero-shot row with the highest mAP."""
    titles = {"zsl_": "ZSL, unseen labels (%)", "gzsl_": "GZSL, all labels (%)",
              "": "all labels (%)"}
    for prefix, title in titles.items():
        names = [name for name in rows[-1] if name.startswith(prefix + "mAP")
                 or re.match(f"{prefix}(P|R|F1)@", name)]
        if not names:
            continue
        width = max(len(row["name"]) for row in rows) + 3
        best = max((row for row in rows if row["kind"] == "zero-shot"), default=None,
                   key=lambda row: row[prefix + "mAP"])
        print(f"\n{title:{width}}" + "".join(f"{name[len(prefix):]:>7}" for name in names))
        for row in rows:
            print(f"{row['name'] + ' *' * (row is best):{width}}"
                  + "".join(f"{100 * row[name]:7.1f}" for name in names))
    if best:
        print("* the best zero-shot scoring")


def print_sweep(rows, shares, names):
    """Print a line of mAP per method, a column per share of known labels, and the average, as
    the papers on partial labels do -> rows of the averages.

    rows: as print_table. shares: K values in (0, 1]. names: {method: names of its K rows}."""
    averages, named = [], {row["name"]: row for row in rows}
    metric = "mAP" if "mAP" in rows[0] else "gzsl_mAP"
    print(f"\n{metric + ' (%), known labels':30}" + "".join(f"{100 * p:6g}%" for p in shares)
          + f"{'average':>9}")
    for method, names_of_rows in names.items():
        swept = [named[name] for name in names_of_rows]
        means = {key: sum(row[key] for row in swept) / len(swept)
                 for key in swept[0] if key not in ("name", "kind")}
        averages.append({"name": f"{method}, average", "kind": swept[0]["kind"], **means})
        print(f"{method:30}" + "".join(f"{100 * row[metric]:7.1f}" for row in swept)
              + f"{100 * means[metric]:9.1f}")
    return averages
