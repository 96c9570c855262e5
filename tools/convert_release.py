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


def mkt_weights(paths, clip):
    """-> what a checkpoint of mkt.py has as "model"; the released weights overwrite CLIP's. They
    must have the same names and, but for what was trained, the same values to float16."""
    mkt.MKT(clip, topk=1)  # refuses a ResNet
    last = len(clip.visual.transformer.resblocks) - 1
    blocks = "visual.transformer.resblocks."
    trained = (f"{blocks}{last - 1}.", f"{blocks}{last}.", "visual.ln_post.", "visual.proj",
               "token_embedding.")
    for path, prefix in zip(paths, ("visual.", "")):
        own = {name: weight for name, weight in clip.state_dict().items()
               if name.startswith("visual.") == bool(prefix) and name != "logit_scale"}
        for name, new in data.read_checkpoint(path).items():
            name = prefix + name.removeprefix("module.").replace("projection_dist", "proj")
            if name.startswith("visual.projection."):  # which their forward pass never uses
                continue
            weight = own.pop(name, None)
            if weight is None or new.shape != weight.shape or not (
                    name.startswith(trained) or torch.allclose(new.float(), weight, 1e-3, 1e-6)):
                raise UserError(f"{path}: {name} is not that of --clip: another file or CLIP?")
            weight.copy_(new)
        if own:
            raise UserError(f"{path} lacks {', '.join(own):.200}: not the authors'")
    return mkt.MKT(clip, topk=1).state_dict()


class Inert:
    """An empty dict in the place of every pickled object that is no tensor and no container: of its
    kinds the one whose state torch's safe reader fills in unasked."""

    def __new__(cls, *args):
        return OrderedDict()


def read_tensor(path, shape, key=None):
    """A file's tensor, or the only one of its dict at the key; nothing of the file is executed.
    UserError for another file or shape."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Inert, name) for name in names]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        if key:
            content, = dict(content)[key].values()
        tensor = content.float()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except Exception as error:  # whatever is wrong with the file, it is the user's to replace
        raise UserError(f"{path} is not the authors' file: {error!r:.200}") from None
    if tensor.shape != shape:
        raise UserError(f"{path} has {list(tensor.shape)}, COCO's labels and the embeddings of "
                        f"--clip need {list(shape)}")
    return tensor


def comc_weights(path, memory_path, clip, args):
    """-> what a checkpoint of lang_cls.py has as "model"."""
    shape = len(data.COCO_LABELS), clip.text_projection.shape[1]
    weight = read_tensor(path, shape, "state_dict")
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

    script, dataset = (mkt, "nuswide") if args.method == "mkt" else (lang_cls, "coco")
    run, _ = script.arguments(["--data", dataset, "--device", "cpu"])
    run.clip = args.clip or run.clip
    clip, _ = clip_model.load(run.clip)
    # the fingerprint first: mkt_weights overwrites CLIP's weights
    state = {"args": vars(run), "clip_fingerprint": clip.fingerprint(), "log": [],
             "method": script.__name__, "labels": data.COCO_LABELS}
    if script is mkt:
        state["args"]["preprocess"], state["labels"] = "authors", None  # any that it is asked for
        state["model"] = mkt_weights(args.files, clip)
    else:
        state["model"] = comc_weights(args.files[0], args.memory, clip, run)
    data.write_file(args.output, state)
    print(f"{args.output}: evaluate it with {state['method']}.py --eval {args.output}")


if __name__ == "__main__":
    data.run(main, clip_model.ClipError)
