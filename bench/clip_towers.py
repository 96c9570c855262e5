"""Speed of the CLIP towers beside open_clip and transformers: same weights, same inputs.

    python bench/clip_towers.py            # about three minutes on two cores
    python bench/clip_towers.py --quick    # shallow towers: does it run?

What is timed: encode_image of ViT-B/16 and RN50 (float32, batch 8) and encode_text of 1,006
short prompts, forward only. The implementations take turns, the median of the runs counts, and
the outputs are asserted to be equal. The weights are random, which costs the same. The prompts
are random token ids in the pattern of "There is a {word} in the scene", so that no vocabulary
is needed. open_clip is fed with 77 tokens, as its tokenizer pads to; transformers with 77 tokens
and, as its own examples do, with the batch padded to its longest text.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clip_model

START, END = 49406, 49407
TEXT = dict(context_length=77, vocab_size=49408, transformer_width=512, transformer_heads=8)


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


def random_model(embed_dim, layers, width, patch_size, text_layers):
    model = clip_model.CLIP(embed_dim, 224, layers, width, patch_size, **TEXT,
                            transformer_layers=text_layers).initialize_parameters().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # nothing stays zero: equality is to mean something
            parameter += 0.01 * torch.randn_like(parameter)
    return model


def random_prompts(count):
    """Token ids int64 [count, 77]: start, 3 words, a label of 1 to 3 tokens, 3 words, end."""
    before, after = torch.randint(1000, 40000, (2, 3)).tolist()
    tokens = torch.zeros(count, 77, dtype=torch.int64)
    for i in range(count):
        label = torch.randint(1000, 40000, (1 + i % 3,)).tolist()
        ids = [START, *before, *label, *after, END]
        tokens[i, :len(ids)] = torch.tensor(ids)
    return tokens


def compare(title, functions, inputs, rounds=1):
    """Times every function on every input in turn and prints medians; the first one is ours.

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
                assert error < 1e-3, f"{title}: {name} differs by {error:.1e}"
    ours = next(iter(times.values()))
    print(f"\n{title}, {sum(map(len, inputs)) // len(inputs)} at a time, "
          f"{len(ours)} runs, forward only")
    for name, seconds in times.items():
        ratio = statistics.median(other / own for other, own in zip(seconds, ours))
        print(f"  {name:34} {statistics.median(seconds):8.3f} s   {ratio:5.2f} x ours")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="shallow towers, few inputs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    print(f"torch {torch.__version__}, float32 on the CPU, {torch.get_num_threads()} threads")
    layers, batch, prompts, rounds = (2, 2, 16, 1) if args.quick else (12, 8, 1006, 3)

    vit = random_model(512, layers, 768, 16, layers)
    resnet = random_model(1024, (1, 1, 1, 1) if args.quick else (3, 4, 6, 3), 64, None, 1)
    images = [torch.randn(batch, 3, 224, 224)]
    vit_functions = {"clip_model": vit.encode_image}
    resnet_functions = {"clip_model": resnet.encode_image}
    text_functions = {"clip_model": vit.encode_text}
    try:
        open_clip_vit = as_open_clip(vit)
        vit_functions["open_clip"] = open_clip_vit.encode_image
        resnet_functions["open_clip"] = as_open_clip(resnet).encode_image
        text_functions["open_clip, 77 tokens"] = open_clip_vit.encode_text
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

    compare("ViT-B/16 encode_image", vit_functions, images, rounds)
    compare("RN50 encode_image", resnet_functions, images, 3 * rounds)  # cheap, so more often
    # in eight parts, so that a single pass over all prompts gives eight paired measurements
    compare(f"encode_text of {prompts:,} short prompts", text_functions,
            list(random_prompts(prompts).chunk(8)))


if __name__ == "__main__":
    main()
