"""Texts a second of the tokenizer beside open_clip's and transformers', equal ids asserted.

    python bench/text.py            # under a minute
    python bench/text.py --quick

With OpenAI's vocabulary where it is found (CLIP's cache, or an installed open_clip or clip), else
with the toy world's, alone. The texts are sentences of lang_cls.py's grammar, all of them new to
the tokenizers, which start without a cache each time; then once more, as prompts come back.
"""
import importlib.util
import json
import statistics
import tempfile
import time
from pathlib import Path

import side_by_side
import torch
from side_by_side import row

import clip_model
import data


def vocabulary():
    """Path of the merges: OpenAI's where they are, else the toy world's."""
    folders = [clip_model.CACHE]
    for package in ("open_clip", "clip"):
        spec = importlib.util.find_spec(package)
        folders += map(Path, (spec.submodule_search_locations or []) if spec else [])
    paths = [folder / clip_model.VOCABULARY_FILE for folder in folders]
    return next((path for path in paths if path.exists()), clip_model.TOY / "merges.txt.gz")


def transformers_tokenizer(ours, folder):
    """The same vocabulary and merges as transformers' fast tokenizer; ImportError without it."""
    from transformers import CLIPTokenizerFast
    Path(folder, "vocab.json").write_text(json.dumps(ours.ids), encoding="utf-8")
    merges = sorted(ours.ranks, key=ours.ranks.get)
    Path(folder, "merges.txt").write_text("\n".join(
        ["#version: 0.2", *map(" ".join, merges)]) + "\n", encoding="utf-8")
    return CLIPTokenizerFast.from_pretrained(folder)


def competitors(path, folder):
    """{name: function that makes a tokenizer: texts -> ids [N, 77], without a cache}."""
    found = {}
    if path.parent == clip_model.TOY:
        return found
    try:
        from open_clip.tokenizer import SimpleTokenizer
        found["open_clip"] = lambda: SimpleTokenizer(str(path))
    except ImportError:
        print("open_clip is not installed: left out")
    try:
        theirs = transformers_tokenizer(clip_model.Tokenizer(path), folder)

        def tokenize(texts):
            tokens = theirs(texts, padding="max_length", max_length=77, truncation=True,
                            return_tensors="pt")
            return tokens.input_ids * tokens.attention_mask  # it pads with the end of text

        found["transformers, fast"] = lambda: tokenize
    except ImportError:
        print("transformers is not installed: left out")
    return found


def main():
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.quick:
        args.texts, args.repeats = 300, 1
    path = vocabulary()
    texts = list(dict.fromkeys(data.grammar_sentences(data.COCO_LABELS, args.texts)[0]))
    with tempfile.TemporaryDirectory() as folder:
        makers = {"ours": lambda: clip_model.Tokenizer(path).tokenize,
                  **competitors(path, folder)}
        side_by_side.start()
        first, again = ({name: [] for name in makers} for _ in range(2))
        expected = clip_model.Tokenizer(path).tokenize(texts)
        for _ in range(args.repeats):
            for name, make in makers.items():
                tokenize = make()
                for seconds in (first[name], again[name]):
                    begin = time.perf_counter()
                    ids = tokenize(texts)
                    seconds.append(time.perf_counter() - begin)
                assert torch.equal(ids, expected), f"{name} has other ids"
    for what, times in (("new", first), ("seen before", again)):
        rates = {name: len(texts) / statistics.median(times[name]) for name in makers}
        ours = rates.pop("ours")
        work = f"tokenize {len(texts):,} sentences {what}, {path.name}"
        for name, rate in rates.items():
            row(work, name, f"{rate:,.0f} a second", f"{ours:,.0f} a second", ours / rate)
        if not rates:
            row(work, "", "", f"{ours:,.0f} a second")


if __name__ == "__main__":
    main()
