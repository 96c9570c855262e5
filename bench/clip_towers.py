"""CLIP's towers beside open_clip's and transformers': same weights, same inputs, equal outputs.

    python bench/clip_towers.py            # five minutes on two cores
    python bench/clip_towers.py --quick    # shallow towers: does it run?

Forward only, float32, random weights, which cost the same. Texts are random ids, as many as in
"There is a {label} in the scene", padded to 77 tokens as everyone's tokenizer does. Both libraries
must be installed.
"""
import side_by_side
import torch
from side_by_side import duration, row


def as_open_clip(model):
    """The same CLIP in open_clip, float32."""
    from open_clip.model import build_model_from_openai_state_dict
    state_dict = model.state_dict()
    theirs = build_model_from_openai_state_dict(dict(state_dict), cast_dtype=torch.float32).float()
    theirs.load_state_dict(state_dict)  # again: it was built in float16, which rounds
    return theirs


# our names -> transformers', replaced one after the other
TRANSFORMERS_NAMES = {
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
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def as_transformers(model):
    """The same CLIP, a ViT, in transformers."""
    from transformers import CLIPConfig, CLIPModel

    def tower(transformer, width):
        return dict(hidden_size=width, intermediate_size=4 * width, hidden_act="quick_gelu",
                    num_hidden_layers=len(transformer.resblocks),
                    num_attention_heads=transformer.resblocks[0].attn.heads)

    visual = model.visual
    text_width, embed_dim = model.text_projection.shape
    vision = tower(visual.transformer, len(visual.class_embedding))
    vision.update(patch_size=visual.patch_size, image_size=visual.input_resolution)
    text = tower(model.transformer, text_width)
    text.update(vocab_size=model.vocab_size, max_position_embeddings=model.context_length,
                bos_token_id=model.vocab_size - 2, eos_token_id=model.vocab_size - 1)
    config = CLIPConfig(projection_dim=embed_dim, vision_config=vision, text_config=text)
    theirs = CLIPModel(config)
    state_dict = {}
    for key, value in model.state_dict().items():
        if key in ("visual.proj", "text_projection"):
            value = value.T
        for ours, other in TRANSFORMERS_NAMES.items():
            key = key.replace(ours, other)
        if "attn.in_proj_" in key:
            for letter, part in zip("qkv", value.chunk(3)):
                state_dict[key.replace("attn.in_proj_", f"self_attn.{letter}_proj.")] = part
        else:
            state_dict[key] = value
    theirs.load_state_dict(state_dict)
    return theirs.eval()


def random_prompts(count):
    """Token ids int64 [count, 77], of 9 to 11 tokens with start and end of text."""
    tokens = torch.zeros(count, 77, dtype=torch.int64)
    for i, prompt in enumerate(tokens):
        length = 9 + i % 3
        prompt[:length] = torch.randint(1000, 40000, (length,))
        prompt[0] = 49406
        prompt[length - 1] = 49407
    return tokens


def compare(work, functions, x, repeats, target):
    """A row of the table for every function {name: input -> output} beside the first, ours."""
    with torch.inference_mode():
        expected = functions["ours"](x)
        for name, function in functions.items():
            error = (function(x) - expected).abs().max() / expected.abs().max()
            assert error < 1e-3, f"{work}: {name} differs by {error:.1e}"
        calls = {name: lambda function=function: function(x)
                 for name, function in functions.items()}
        seconds = side_by_side.alternate(calls, repeats, warm_up=False)
    for name in list(functions)[1:]:
        row(work, name, duration(seconds[name]), duration(seconds["ours"]),
            seconds[name] / seconds["ours"], target)


def main():
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    side_by_side.start()
    vit = dict()  # random_clip's default: a ViT-B/16
    resnet = dict(embed_dim=1024, layers=(3, 4, 6, 3), width=64, patch=None, text_layers=1)
    batch = 8
    texts = 126  # an eighth of NUS-WIDE's 1,006 labels
    if args.quick:
        vit = dict(layers=2, width=128, text_width=128, text_layers=2)
        resnet.update(layers=(1, 1, 1, 1))
        batch = texts = args.repeats = 2
    vit = side_by_side.random_clip(**vit)
    resnet = side_by_side.random_clip(**resnet)
    theirs, hf = as_open_clip(vit), as_transformers(vit)
    vit_image = {"ours": vit.encode_image, "open_clip": theirs.encode_image,
                 "transformers": lambda x: hf.get_image_features(x).pooler_output}
    text = {"ours": vit.encode_text, "open_clip, 77 tokens": theirs.encode_text,
            "transformers, 77 tokens": lambda x: hf.get_text_features(x).pooler_output}
    resnet_image = {"ours": resnet.encode_image,
                    "open_clip": as_open_clip(resnet).encode_image}
    images = torch.randn(batch, 3, 224, 224)
    compare(f"ViT-B/16 encode_image, batch {batch}", vit_image, images, args.repeats, ">= 1")
    compare(f"RN50 encode_image, batch {batch}", resnet_image, images, args.repeats, ">= 1")
    compare(f"encode_text, {texts} short prompts", text, random_prompts(texts), args.repeats,
            ">= 10")


if __name__ == "__main__":
    main()
