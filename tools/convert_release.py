"""The files that MKT's and CoMC's authors published, as checkpoints of mkt.py and lang_cls.py.

    python tools/convert_release.py mkt STAGE1.pth STAGE2.pth --output mkt.pt
    python tools/convert_release.py comc model-best.pth.tar --memory coco_templates.pt \\
        --output comc.pt
    python mkt.py --data nuswide --eval mkt.pt
    python lang_cls.py --predict photos/ --checkpoint comc.pt

MKT's first file is its image encoder, which has to be CLIP's but for what MKT trains; its second,
without which there is no prompt tuning, the text encoder, of which the prompt's eight token
embeddings count. CoMC's are a classifier of COCO's labels and the label embeddings that it maps
with, in whose place ours can stand. Nothing that is pickled in these files is executed.
"""
import argparse
import os
import sys
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clip_model  # noqa: E402
import data  # noqa: E402
import lang_cls  # noqa: E402
import mkt  # noqa: E402
from data import UserError  # noqa: E402


# ---- MKT

def overwrite(weights, released, trained, path):
    """Copy a release's weights, {name: tensor}, over those of CLIP. UserError unless they have the
    same names, shapes and, but for names that start with one of trained, values (to float16)."""
    for name in sorted(weights.keys() ^ released.keys()):
        what = "lacks" if name in weights else "has an unknown"
        raise UserError(f"{path} {what} {name}: not the authors', or not for --clip")
    for name, weight in weights.items():
        new = released[name]
        is_free = name.startswith(trained)
        if new.shape != weight.shape or not (
                is_free or torch.allclose(new.float(), weight, rtol=1e-3, atol=1e-6)):
            raise UserError(f"{path}: {name} is not that of --clip: another CLIP?")
        weight.copy_(new)


def mkt_weights(paths, clip):
    """-> what a checkpoint of mkt.py has as "model"; they overwrite CLIP's."""
    mkt.MKT(clip, topk=1)  # refuses a ResNet
    image, *text = [{name.removeprefix("module."): weight for name, weight in
                     data.read_checkpoint(path).items()} for path in paths]
    image = {name.replace("projection_dist", "proj"): weight for name, weight in image.items()
             if not name.startswith("projection.")}  # which their forward pass never uses
    last = len(clip.visual.transformer.resblocks) - 1
    blocks = f"transformer.resblocks.{last - 1}.", f"transformer.resblocks.{last}."
    overwrite(clip.visual.state_dict(), image, (*blocks, "ln_post.", "proj"), paths[0])
    if text:
        weights = {name: weight for name, weight in clip.state_dict().items()
                   if not name.startswith("visual.") and name != "logit_scale"}
        overwrite(weights, text[0], "token_embedding.", paths[1])
    return mkt.MKT(clip, topk=1).state_dict()


# ---- CoMC

class Inert:
    """An empty dict in the place of every pickled object that is no tensor and no container."""

    def __new__(cls, *args):
        return OrderedDict()


def read_tensor(path, shape, name=None):
    """A file's tensor, or the one of this name that is all of its "state_dict"; nothing of the
    file is executed. UserError for another file or shape."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Inert, name) for name in names]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        if name:
            (found, content), = dict(content)["state_dict"].items()
            if found != name:
                raise KeyError(found)
        tensor = content.float()
    except Exception as error:  # whatever is wrong with the file, it is the user's to replace
        raise UserError(f"{path} is not the authors' file: {error!r:.200}") from None
    if tensor.shape != shape:
        raise UserError(f"{path} has {list(tensor.shape)}, COCO's labels and the embeddings of "
                        f"--clip need {list(shape)}")
    return tensor


def comc_weights(path, memory_path, clip, args):
    """-> what a checkpoint of lang_cls.py has as "model"."""
    shape = len(data.COCO_LABELS), clip.text_projection.shape[1]
    weight = read_tensor(path, shape, "adapter.0.weight")
    if memory_path:
        memory = F.normalize(read_tensor(memory_path, shape), dim=-1)
    else:
        memory = lang_cls.label_embeddings(clip, data.COCO_LABELS, lang_cls.TEMPLATES, args)
    return lang_cls.CoMC(weight, memory).state_dict()


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(usage="convert_release.py {mkt,comc} FILE... [options]",
                                     description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("method", choices=["mkt", "comc"])
    add("files", nargs="+", metavar="FILE", help="STAGE1.pth [STAGE2.pth], or model-best.pth.tar")
    add("--memory", metavar="FILE", help="CoMC's label embeddings, coco_templates.pt")
    add("--clip", help="what they were trained on (ViT-B/16 for mkt, RN50 for comc)")
    add("--output", required=True, metavar="FILE", help="the checkpoint to write")
    args = parser.parse_args(argv)
    if len(args.files) > (2 if args.method == "mkt" else 1):
        parser.error("too many files: mkt has one or two, comc one")
    if args.method == "mkt" and args.memory:
        parser.error("--memory is of comc")
    if os.path.exists(args.output):
        raise UserError(f"{args.output} is there already: remove it or name another --output")

    if args.method == "mkt":
        options = ["--data", "nuswide", "--preprocess", "authors", "--device", "cpu", "--clip"]
        run, _ = mkt.arguments([*options, args.clip or "ViT-B/16"])
    else:
        options = ["--data", "coco", "--device", "cpu", "--clip"]
        run, _ = lang_cls.arguments([*options, args.clip or "RN50"])
    clip, _ = clip_model.load(run.clip)
    state = {"args": vars(run), "clip_fingerprint": clip.fingerprint(), "log": []}
    if args.method == "mkt":  # whose labels are any that it is asked for
        state |= {"method": "mkt", "labels": None, "model": mkt_weights(args.files, clip)}
    else:
        state |= {"method": "lang_cls", "labels": data.COCO_LABELS,
                  "model": comc_weights(*args.files, args.memory, clip, run)}
    data.write_file(args.output, state)
    print(f"{args.output}: evaluate it with {state['method']}.py --eval {args.output}")


if __name__ == "__main__":
    data.run(main, clip_model.ClipError)
