"""The CLIP towers and their loading beside open_clip and transformers: same weights and inputs.

    python bench/clip_towers.py            # five minutes on two cores
    python bench/clip_towers.py --quick    # shallow towers: does it run?

What is timed: encode_image of ViT-B/16 and RN50 (float32, batch 8) and encode_text of 1,006
short prompts, forward only. The implementations take turns, the medians of the runs count, and
the outputs are asserted to be equal. The weights are random, which costs the same. The prompts
are random token ids in the pattern of "There is a {word} in the scene", so that no vocabulary
is needed. open_clip is fed with 77 tokens, as its tokenizer pads to; transformers with 77 tokens
and, as its own examples do, with the batch padded to its longest text.
Loading: a ViT-B/16 TorchScript archive in float16, as OpenAI publishes them, to a float32 model
on the CPU; every load is a process of its own, which imports first and is then timed.
"""
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import side_by_side
import torch
from side_by_side import duration, row

import clip_model

START, END = 49406, 49407


def as_open_clip(model):
    """The same CLIP in open_clip, float32; ImportError where it is not installed."""
    from open_clip.model import build_model_from_openai_state_dict
    state_dict = model.state_dict()
    theirs = build_model_from_openai_state_dict(dict(state_dict), cast_dtype=torch.float32).float()
    theirs.load_state_dict(state_dict)  # again: it was built in float16, which rounds
    return theirs


def as_transformers(model):
    """The same CLIP, a ViT, in transformers; ImportError where it is not installed."""
    from transformers import CLIPConfig, CLIPModel
    visual, embed_dim = model.visual, model.text_projection.shape[1]
    vision_width, text_width = len(visual.class_embedding), model.transformer_width

    def tower(transformer, width):
        return dict(hidden_size=width, intermediate_size=4 * width, hidden_act="quick_gelu",
                    num_hidden_layers=len(transformer.resblocks), projection_dim=embed_dim,
                    num_attention_heads=transformer.resblocks[0].attn.heads)

    theirs = CLIPModel(CLIPConfig(
        projection_dim=embed_dim,
        vision_config=dict(tower(visual.transformer, vision_width), patch_size=visual.patch_size,
                           image_size=visual.input_resolution),
        text_config=dict(tower(model.transformer, text_width), vocab_size=model.vocab_size,
                         max_position_embeddings=model.context_length,
                         bos_token_id=model.vocab_size - 2, eos_token_id=model.vocab_size - 1)))
    names = {
        "visual.transformer.resblocks": "vision_model.encoder.layers",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1": "vision_model.embeddings.patch_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "visual.proj": "visual_projection.weight",
        "transformer.resblocks": "text_model.encoder.layers",
        "token_embedding": "text_model.embeddings.token_embedding",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final": "text_model.final_layer_norm",
        "text_projection": "text_projection.weight",
    }
    parts = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
             "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    state_dict = {}
    for key, value in model.state_dict().items():
        if key in ("visual.proj", "text_projection"):
            value = value.T
        prefix = next((name for name in names if key.startswith(name)), "")  # "": logit_scale
        key = names.get(prefix, "") + key[len(prefix):]
        for ours, other in parts.items():
            key = key.replace(ours, other)
        if "attn.in_proj_" in key:
            for letter, part in zip("qkv", value.chunk(3)):
                state_dict[key.replace("attn.in_proj_", f"self_attn.{letter}_proj.")] = part
        else:
            state_dict[key] = value
    theirs.load_state_dict(state_dict)
    return theirs.eval()


def random_prompts(count):
    """Token ids int64 [count, 77]: start, 3 words, a label of 1 to 3 tokens, 3 words, end."""
    before, after = torch.randint(1000, 40000, (2, 3)).tolist()
    tokens = torch.zeros(count, 77, dtype=torch.int64)
    for i in range(count):
        label = torch.randint(1000, 40000, (1 + i % 3,)).tolist()
        ids = [START, *before, *label, *after, END]
        tokens[i, :len(ids)] = torch.tensor(ids)
    return tokens


def compare(work, functions, inputs, target, rounds=1):
    """A row of the table for every function beside the first one, ours.

    functions: {name: input -> output}; the outputs must agree with ours to 1e-3 of their size."""
    times = {name: [] for name in functions}
    with torch.inference_mode():
        for function in functions.values():
            function(inputs[0][:2])  # warm up
        for x in inputs * rounds:
            expected = None
            for name, function in functions.items():
                start = time.perf_counter()
                output = function(x)
                times[name].append(time.perf_counter() - start)
                expected = output if expected is None else expected
                error = (output - expected).abs().max() / expected.abs().max()
                assert error < 1e-3, f"{work}: {name} differs by {error:.1e}"
    ours, *others = map(statistics.median, times.values())
    for name, theirs in zip(list(times)[1:], others):
        note = ""
        if name == "transformers, padded to the longest":
            target, note = ">= 1", ("These prompts are about equally long: padded to the longest "
                                    "they are as short as ours, cut after their end. No more than "
                                    "1 can be expected.")
        row(work, name, duration(theirs), duration(ours), theirs / ours, target, note=note)


def save_archive(model, path):
    """A TorchScript archive of modules with these weights in float16, as far as loading goes."""
    root = torch.nn.Module()
    for name, value in model.state_dict().items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)
        module.register_parameter(leaf, torch.nn.Parameter(value.half()))
    torch.jit.script(root).save(str(path))


def load(name, path):
    """-> seconds and peak memory, in bytes, of a load."""
    if name == "open_clip":
        from open_clip.openai import load_openai_model

        def function():
            return load_openai_model(path, precision="fp32", device="cpu")
    elif name == "clip_model":
        def function():
            return clip_model.load(path)[0]
    else:
        def function():
            return torch.jit.load(path, map_location="cpu").float()

    kept, begin = [], time.perf_counter()
    peak = side_by_side.peak_beyond(lambda: kept.append(function()))
    return time.perf_counter() - begin, peak


def compare_loading(model, competitors, repeats, quick):
    def in_new_process(name, path):
        return side_by_side.in_new_process(__file__, "--load", name, path)

    measure = load if quick else in_new_process  # a process takes seconds to begin with
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "archive.pt")
        save_archive(model, path)
        figures = {name: [] for name in ["clip_model", *competitors]}
        for _ in range(repeats):
            for name, measured in figures.items():
                measured.append(measure(name, path))
        size = side_by_side.memory(path.stat().st_size)
    medians = {name: [statistics.median(x) for x in zip(*measured)]
               for name, measured in figures.items()}
    seconds, peak = medians.pop("clip_model")
    for name, (their_seconds, their_peak) in medians.items():
        row(f"load an archive of {size}", name, duration(their_seconds), duration(seconds),
            their_seconds / seconds, note="torch.jit.load makes no CLIP, only the archive's "
            "modules in float32; the others begin with it." if name == "torch.jit.load" else "")
        row(f"load an archive of {size}, peak memory", name, side_by_side.memory(their_peak),
            side_by_side.memory(peak), their_peak / max(1, peak))


def main():
    warnings.simplefilter("ignore")  # TorchScript is deprecated, OpenAI's files are not
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--load", nargs=2, metavar=("LIBRARY", "ARCHIVE"),
                        help="what the script calls itself with")
    args = parser.parse_args()
    if args.load:
        return print(*load(*args.load))
    torch.manual_seed(args.seed)
    side_by_side.start()
    layers, batch, prompts, rounds = (2, 2, 16, 1) if args.quick else (12, 8, 1006, 5)
    sizes = dict(width=128, text_width=128) if args.quick else {}

    vit = side_by_side.random_clip(layers=layers, text_layers=layers, **sizes)
    resnet = side_by_side.random_clip(
        1024, (1, 1, 1, 1) if args.quick else (3, 4, 6, 3), 64, None, text_width=64, text_layers=1)
    images = [torch.randn(batch, 3, 224, 224)]
    vit_functions = {"clip_model": vit.encode_image}
    resnet_functions = {"clip_model": resnet.encode_image}
    text_functions = {"clip_model": vit.encode_text}
    archives = ["torch.jit.load"]
    try:
        open_clip_vit = as_open_clip(vit)
        vit_functions["open_clip"] = open_clip_vit.encode_image
        resnet_functions["open_clip"] = as_open_clip(resnet).encode_image
        text_functions["open_clip, 77 tokens"] = open_clip_vit.encode_text
        archives.append("open_clip")
    except ImportError:
        print("open_clip is not installed: left out")
    try:
        transformers_vit = as_transformers(vit)

        def padded_to_longest(tokens):
            tokens = tokens[:, :int(tokens.argmax(dim=1).max()) + 1]
            return transformers_vit.get_text_features(tokens).pooler_output

        vit_functions["transformers"] = (
            lambda x: transformers_vit.get_image_features(x).pooler_output)
        text_functions["transformers, 77 tokens"] = (
            lambda tokens: transformers_vit.get_text_features(tokens).pooler_output)
        text_functions["transformers, padded to the longest"] = padded_to_longest
    except ImportError:
        print("transformers is not installed: left out")

    compare(f"ViT-B/16 encode_image, batch {batch}", vit_functions, images, ">= 1", rounds)
    # cheap, so more often
    compare(f"RN50 encode_image, batch {batch}", resnet_functions, images, ">= 1", 3 * rounds)
    # in eight parts, so that a single pass over all prompts gives eight measurements
    compare(f"encode_text, {prompts:,} short prompts, an eighth of them", text_functions,
            list(random_prompts(prompts).chunk(8)), ">= 4")
    compare_loading(vit, archives, 1 if args.quick else 3, args.quick)
    side_by_side.print_notes()


if __name__ == "__main__":
    main()
