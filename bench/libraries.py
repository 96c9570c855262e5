"""CLIP's towers and mean average precision beside other libraries', which must give the same.

    python bench/libraries.py            # some minutes on two cores
    python bench/libraries.py --quick    # shallow towers, few images: does it run?

Towers: forward only, float32, random weights, which cost the same. Texts are 11 random ids, as in
"There is a {label} in the scene", padded to 77 tokens as everyone's tokenizer does.
mAP: the size of NUS-WIDE's test set, all labels, every entry known; the loop over scikit-learn has
every label's scores and targets contiguous beforehand.
"""
from functools import partial

import numpy as np
import side_by_side
import torch

import metrics


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

    def tower(transformer, width, **others):
        return dict(hidden_size=width, intermediate_size=4 * width,
                    num_hidden_layers=len(transformer.resblocks),
                    num_attention_heads=transformer.resblocks[0].attn.heads, **others)

    visual = model.visual
    text_width, embed_dim = model.text_projection.shape
    vision = tower(visual.transformer, len(visual.class_embedding),
                   patch_size=visual.patch_size, image_size=visual.input_resolution)
    text = tower(model.transformer, text_width, vocab_size=model.vocab_size,
                 bos_token_id=model.vocab_size - 2, eos_token_id=model.vocab_size - 1)
    theirs = CLIPModel(CLIPConfig(projection_dim=embed_dim, vision_config=vision,
                                  text_config=text))
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


def compare_towers(work, ours, others, x, repeats, target):
    """A row of the table for each of the others, {name: input -> output}."""
    with torch.inference_mode():
        expected = ours(x)
        for function in others.values():
            difference = (function(x) - expected).abs().max()
            assert difference < 1e-3 * expected.abs().max(), f"{work}: {difference:.1e}"
        calls = [partial(function, x) for function in (ours, *others.values())]
        own, *seconds = side_by_side.alternate(calls, repeats)
    for name, theirs in zip(others, seconds):
        side_by_side.row(work, name, theirs, own, target)


def towers(args):
    batch, texts, repeats = (2, 2, 2) if args.quick else (8, 1006, 5)
    vit = side_by_side.random_clip(args.quick)
    resnet = side_by_side.random_clip(args.quick, (3, 4, 6, 3), 64, None, 1024, text_layers=1)
    theirs, hf = as_open_clip(vit), as_transformers(vit)
    images = torch.randn(batch, 3, 224, 224)
    compare_towers(f"ViT-B/16 encode_image, batch {batch}", vit.encode_image, {
        "open_clip": theirs.encode_image,
        "transformers": lambda x: hf.get_image_features(x).pooler_output,
    }, images, repeats, ">= 1")
    compare_towers(f"RN50 encode_image, batch {batch}", resnet.encode_image,
                   {"open_clip": as_open_clip(resnet).encode_image}, images, repeats, ">= 1")
    prompts = torch.zeros(texts, 77, dtype=torch.int64)
    prompts[:, :11] = torch.randint(1000, 40000, (texts, 11))
    prompts[:, 0] = 49406  # start of text
    ends = 7 + torch.arange(texts) % 4  # "a photo of a {}." with labels of one to four tokens
    prompts[torch.arange(texts), ends] = 49407
    prompts[torch.arange(77) > ends[:, None]] = 0
    compare_towers(f"encode_text, {texts} short prompts", vit.encode_text, {
        "open_clip, 77 tokens": theirs.encode_text,
        "transformers, 77 tokens": lambda x: hf.get_text_features(x).pooler_output,
    }, prompts, min(repeats, 3), ">= 10")


def mean_average_precision(args):
    from sklearn.metrics import average_precision_score
    images, labels = (2000, 40) if args.quick else (107_859, 1006)
    targets = 2 * (torch.rand(images, labels) < 0.02).char() - 1
    scores = torch.randn(images, labels) + 0.5 * targets  # better than chance
    columns = list(zip((targets == 1).T.contiguous().numpy(), scores.T.contiguous().numpy()))

    def theirs():
        return [average_precision_score(present, s) for present, s in columns]

    def ours():
        return metrics.average_precision(scores, targets)

    np.testing.assert_allclose(ours(), theirs(), rtol=1e-10)
    side_by_side.row(f"mAP, {images:,} x {labels:,}", "loop over scikit-learn",
                     *side_by_side.alternate([theirs, ours], 3), ">= 10")


def main():
    args = side_by_side.start(__doc__)
    towers(args)
    mean_average_precision(args)


if __name__ == "__main__":
    main()
