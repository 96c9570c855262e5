"""clip_model.py against other implementations, plain references and properties.

open_clip and transformers are compared with where they are installed. Everything runs on random
weights: nothing is downloaded, apart from OpenAI's vocabulary where no package brings it along.
"""
import copy
import gzip
import hashlib
import http.server
import io
import os
import pickle
import random
import re
import socket
import threading
import types
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import clip_model
from clip_model import ClipError

MERGES = ["d o", "do g</w>", "a a", "aa aa", "c a", "ca t</w>", "t h", "th e</w>", "o g</w>",
          "a t</w>", "do g", "\u00c3 \u00a9</w>"]  # the last one is the two bytes of an e acute
VOCABULARY = 512 + len(MERGES) + 2  # bytes, merges, start and end of text: the small models'


def small_clip(kind):
    """A small CLIP none of whose parameters and statistics is trivially zero or one."""
    torch.manual_seed(0)
    layers, width, patch_size = (3, 128, 8) if kind == "ViT" else ((1, 2, 1, 1), 16, None)
    model = clip_model.CLIP(
        embed_dim=32, image_resolution=32 if kind == "ViT" else 96, vision_layers=layers,
        vision_width=width, vision_patch_size=patch_size, context_length=77,
        vocab_size=VOCABULARY, transformer_width=128, transformer_heads=2, transformer_layers=3)
    model.initialize_parameters()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif value.is_floating_point():
                value += torch.randn_like(value) * (0.05 if value.dim() > 2 else 0.2)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vit():
    return small_clip("ViT")


@pytest.fixture(scope="module")
def resnet():
    return small_clip("ResNet")


@pytest.fixture(params=["vit", "resnet"])
def model(request):
    return request.getfixturevalue(request.param)


def random_images(model, count=3, size=None):
    torch.manual_seed(1)
    height, width = size or (model.visual.input_resolution,) * 2
    return torch.randn(count, 3, height, width)


def random_tokens(count=9, longest=77):
    """Token ids int64 [count, 77] with ends of text from 2 to `longest` tokens, zeros after."""
    torch.manual_seed(2)
    tokens = torch.randint(1, VOCABULARY - 2, (count, 77))
    tokens[:, 0] = VOCABULARY - 2
    for row, length in zip(tokens, torch.linspace(2, longest, count).long()):
        row[length - 1] = VOCABULARY - 1
        row[length:] = 0
    return tokens


def assert_equal(ours, expected, tolerance=1e-4):
    assert ours.shape == expected.shape
    assert expected.std() > 0.1  # outputs near zero would be equal to anything
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=0)


# ---------------------------------------------------------------------------------------------
# other implementations

def test_towers_equal_open_clip(model):
    pytest.importorskip("open_clip")
    from clip_towers import as_open_clip
    theirs = as_open_clip(model)
    images, tokens = random_images(model), random_tokens()
    with torch.no_grad():
        assert_equal(model.encode_image(images), theirs.encode_image(images))
        assert_equal(model.encode_text(tokens), theirs.encode_text(tokens))


def test_towers_equal_transformers(vit):
    pytest.importorskip("transformers")
    from clip_towers import as_transformers
    theirs = as_transformers(vit)
    tokens = random_tokens()
    with torch.no_grad():
        assert_equal(vit.encode_text(tokens), theirs.get_text_features(tokens).pooler_output)
        for size in ((32, 32), (48, 48), (40, 64), (24, 16)):  # others than 32: interpolation
            images = random_images(vit, size=size)
            expected = theirs.get_image_features(images, interpolate_pos_encoding=True)
            assert_equal(vit.encode_image(images), expected.pooler_output)
        images = random_images(vit)
        expected = theirs(pixel_values=images, input_ids=tokens)
        logits_per_image, logits_per_text = vit(images, tokens)
        assert_equal(logits_per_image, expected.logits_per_image, 1e-3)  # logits are near 10
        assert_equal(logits_per_text, expected.logits_per_text, 1e-3)


# name: embedding, resolution, vision layers, width, patch, text width, text layers, parameters
PUBLISHED = {
    "RN50": (1024, 224, (3, 4, 6, 3), 64, None, 512, 12, 102_007_137),
    "RN101": (512, 224, (3, 4, 23, 3), 64, None, 512, 12, 119_688_033),
    "RN50x4": (640, 288, (4, 6, 10, 6), 80, None, 640, 12, 178_300_601),
    "RN50x16": (768, 384, (6, 8, 18, 8), 96, None, 768, 12, 290_979_217),
    "RN50x64": (1024, 448, (3, 15, 36, 10), 128, None, 1024, 12, 623_258_305),
    "ViT-B/32": (512, 224, 12, 768, 32, 512, 12, 151_277_313),
    "ViT-B/16": (512, 224, 12, 768, 16, 512, 12, 149_620_737),
    "ViT-L/14": (768, 224, 24, 1024, 14, 768, 12, 427_616_513),
    "ViT-L/14@336px": (768, 336, 24, 1024, 14, 768, 12, 427_944_193),
}


def shapes(model):
    return {key: value.shape for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_architectures_are_inferred(name):
    embed_dim, resolution, layers, width, patch_size, text_width, text_layers, total = (
        PUBLISHED[name])
    with torch.device("meta"):  # shapes without memory
        model = clip_model.CLIP(embed_dim, resolution, layers, width, patch_size, 77, 49408,
                                text_width, text_width // 64, text_layers)
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    inferred = clip_model.build_model(model.state_dict())
    assert shapes(inferred) == shapes(model)
    assert inferred.visual.input_resolution == resolution
    assert (inferred.context_length, inferred.vocab_size) == (77, 49408)
    text_heads = {block.attn.heads for block in inferred.transformer.resblocks}
    assert text_heads == {text_width // 64}
    if patch_size:
        assert inferred.visual.patch_size == patch_size
        heads = {block.attn.heads for block in inferred.visual.transformer.resblocks}
        assert heads == {width // 64}
    else:
        assert inferred.visual.attnpool.heads == width * 32 // 64


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_equal_open_clip(name):
    open_clip = pytest.importorskip("open_clip")
    config = open_clip.get_model_config(name.replace("/", "-").replace("@336px", "-336"))
    with torch.device("meta"):
        theirs = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
    assert shapes(clip_model.build_model(theirs.state_dict())) == shapes(theirs)


def test_available_models_are_the_published_and_the_toy_ones():
    assert clip_model.available_models() == ["toy-RN", "toy-ViT", *PUBLISHED]


# ---------------------------------------------------------------------------------------------
# tokenizer

STRINGS = [
    "", " ", "\t\n  \r\n", "a", "A photo of a dog.", "There is a traffic light in the scene",
    "it's they're I've I'm we'll he'd don't", "IT'S", "rock 'n' roll", "2014 3,677,856 1/2 0.5",
    "a1b2c3", "caf\u00e9 na\u00efve \u00dcber stra\u00dfe \u0130stanbul", "cafe\u0301",
    "\u732b\u3068\u72ac", "\u043a\u043e\u0448\u043a\u0430", "\u0642\u0637\u0629",
    "\u0e41\u0e21\u0e27",
    "\U0001f600\U0001f680 rocket", "\U0001f468\u200d\U0001f469\u200d\U0001f467 family",
    "\U0001f1eb\U0001f1f7", "&amp; &lt;b&gt; &amp;lt; &eacute; &#39; &nbsp;x", "&amp;amp;amp;",
    "a < b &amp;lt; c &amp;eacute;",  # ftfy leaves entities alone where it sees a "<"
    "\u2018quoted\u2019 \u201ctext\u201d \u2014 dash\u2026", "sch\u00c3\u00b6n",
    "\u00e2\u20ac\u2122",
    "\ufb01nd \uff26\uff35\uff2c\uff2c", "\u00a0no\u00a0break\u3000wide", "\u200bzero\u200bwidth",
    "#hash @at $5 100% a_b-c+d=e^f~g`h|i\\j", "...!!!???", "</w> a</w>", "x" * 60,
    "antidisestablishmentarianism", "hello <|endoftext|> world", "<|startoftext|>",
    "<|StartOfText|> ! <|endoftext|><|endoftext|>", "<|endoftext", "the " * 100, "12345 " * 30,
    "\u00bd \u00b2 \u2460 \u0663", "\u1e9e \u03a3\u0391\u03a3", "\ud55c\uad6d\uc5b4",
]


def random_strings(count, seed=0):
    rng = random.Random(seed)
    pools = ["abcdefghijklmnopqrstuvwxyz", "ABCXYZ", "0123456789", " \n", "'.,!?-_/&;#<>|()",
             "\u00e9\u00e8\u00fc\u00f1\u00e7\u00df\u00d8\u0130", "\u732b\u72ac\u9ce5\u304b\u30ab",
             "\U0001f600\U0001f431\u2764\ufe0f\u200d", "\u0430\u0431\u0432\u0393\u0416"]
    words = ["dog", "Traffic", "light", "it's", "we'll", "&amp;", "&eacute;", "don't", "42nd"]
    for _ in range(count):
        parts = [rng.choice(words) if rng.random() < 0.3 else
                 "".join(rng.choices(rng.choice(pools), k=rng.randint(1, 6)))
                 for _ in range(rng.randint(1, 12))]
        yield rng.choice(["", " "]).join(parts)


@pytest.fixture(scope="module")
def official():
    try:
        return clip_model.official_tokenizer()
    except ClipError as error:
        pytest.skip(f"OpenAI's vocabulary is not to be had: {error}")


def test_token_ids_equal_open_clip(official):
    open_clip = pytest.importorskip("open_clip")
    theirs = open_clip.tokenizer.SimpleTokenizer()
    texts = STRINGS + list(random_strings(300))
    for text in texts:
        # open_clip spells the two special tokens in another way
        spelled = text.replace("<|endoftext|>", "<end_of_text>")
        spelled = re.sub(r"<\|startoftext\|>", "<start_of_text>", spelled, flags=re.IGNORECASE)
        assert official.encode(text) == theirs.encode(spelled), repr(text)
    plain = [text for text in texts if "<|" not in text]
    assert torch.equal(clip_model.tokenize(plain, truncate=True), theirs(plain))


def test_official_tokenizer_properties(official):
    assert len(official) == 49408
    tokens = clip_model.tokenize("a diagram")
    assert tokens.dtype == torch.int64 and tokens.shape == (1, 77)
    # the ids of OpenAI's README example: <start> a diagram <end>
    assert tokens[0, :5].tolist() == [49406, 320, 22697, 49407, 0]
    text = "<|startoftext|> a diagram <|endoftext|> "
    assert official.decode([49406, 320, 22697, 49407]) == text


def test_decode_gives_the_text_back(official):
    words = ["a", "traffic", "light", "caf\u00e9", "\u732b", "\U0001f680", "7", "umbrella", "&",
             "\u00bd", "antidisestablishmentarianism", "'s"]
    rng = random.Random(0)
    for _ in range(100):
        text = " ".join(rng.choices(words, k=rng.randint(1, 12)))
        assert official.decode(official.encode(text)) == text + " "
    # half a character is replaced, not an error
    assert "\ufffd" in official.decode(official.encode("\U0001f680\U0001f431")[:1] + [160])


@pytest.fixture
def merges_path(tmp_path):
    path = tmp_path / "merges.txt.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("#version: test\n" + "\n".join(MERGES) + "\n")
    return path


def brute_force_bpe(word):
    """Applies the first of the merges that applies, from left to right, until none does."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]  # of Latin-1
    others = [b for b in range(256) if b not in printable]
    symbol = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    entries = [*symbol.values(), *(s + "</w>" for s in symbol.values())]
    entries += [merge.replace(" ", "") for merge in MERGES]
    parts = [symbol[b] for b in word.encode()]
    parts[-1] += "</w>"
    while True:
        pairs = [" ".join(parts[i:i + 2]) for i in range(len(parts) - 1)]
        merge = next((merge for merge in MERGES if merge in pairs), None)
        if merge is None:
            return [entries.index(part) for part in parts]
        for i in range(len(parts)):
            if " ".join(parts[i:i + 2]) == merge:
                parts[i:i + 2] = [merge.replace(" ", "")]


def test_small_vocabulary_equals_brute_force(merges_path):
    tokenizer = clip_model.Tokenizer(merges_path)
    assert len(tokenizer) == VOCABULARY
    assert tokenizer.encode("dog") == [512 + 1]  # the second merge
    rng = random.Random(0)
    words = ["the", "dogs", "cat", "caf\u00e9", "\U0001f680"]
    words += ["".join(rng.choices("aacdghottes", k=rng.randint(1, 12))) for _ in range(200)]
    for word in words:
        expected = brute_force_bpe(word)
        assert tokenizer.encode(word) == expected, word
        assert tokenizer.encode(word) == expected, word  # now from the cache
        assert tokenizer.decode(expected) == word + " "
    separate = [i for word in words for i in brute_force_bpe(word)]
    assert tokenizer.encode(" ".join(words)) == separate


def test_the_cache_cannot_be_changed_from_outside(merges_path):
    tokenizer = clip_model.Tokenizer(merges_path)
    first = tokenizer.encode("the cat")
    expected = list(first)
    first.append(0)
    tokenizer.encode("the cat").append(0)
    assert tokenizer.encode("the cat") == expected


def test_tokenize(merges_path):
    tokenizer = clip_model.Tokenizer(merges_path)
    start, end = len(tokenizer) - 2, len(tokenizer) - 1
    cat = tokenizer.encode("cat")
    tokens = tokenizer.tokenize("cat cat")
    assert tokens.shape == (1, 77) and tokens.dtype == torch.int64
    assert tokens[0].tolist() == [start, *cat, *cat, end] + [0] * 73
    assert torch.equal(tokens, tokenizer.tokenize(["cat cat"]))
    assert tokenizer.tokenize([]).shape == (0, 77)

    exact, too_long = "cat " * 75, "cat " * 75 + "dog"
    assert tokenizer.tokenize(exact)[0, -1] == end
    with pytest.raises(RuntimeError, match=r"78 tokens.*77.*cat dog'"):
        tokenizer.tokenize(["cat", too_long])
    cut = tokenizer.tokenize(["cat", too_long], truncate=True)
    assert cut[0].tolist() == [start, *cat, end] + [0] * 74
    assert cut[1].tolist() == [start, *cat * 75, end]

    assert tokenizer.tokenize("cat", context_length=3).tolist() == [[start, *cat, end]]
    with pytest.raises(RuntimeError, match="too long"):
        tokenizer.tokenize("cat cat", context_length=3)
    assert tokenizer.tokenize("cat dog", 3, True).tolist() == [[start, *cat, end]]


def test_models_tokenize_with_their_own_vocabulary(merges_path, vit, monkeypatch):
    tokenizer = clip_model.Tokenizer(merges_path)
    model = clip_model.build_model(vit.state_dict())
    monkeypatch.setattr(clip_model, "official_tokenizer", lambda: tokenizer)
    expected = tokenizer.tokenize(["a cat"])
    assert torch.equal(clip_model.tokenize("a cat"), expected)
    assert torch.equal(model.tokenize("a cat"), expected)  # none of its own: OpenAI's
    monkeypatch.setattr(clip_model, "official_tokenizer", lambda: pytest.fail("not asked for"))
    model.tokenizer, model.context_length = tokenizer, 20
    assert torch.equal(model.tokenize(["a cat"]), expected[:, :20])
    assert model.tokenize("cat " * 30, truncate=True)[0, -1] == len(tokenizer) - 1


# ---------------------------------------------------------------------------------------------
# transformer, against plain references

def reference_block(block, x, mask=None):
    """[B, T, W] -> [B, T, W] with torch's own attention; mask bool [T, T], True = hidden."""
    def norm(layer, x):
        return F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)

    attention, mlp = block.attn, block.mlp
    y = norm(block.ln_1, x).transpose(0, 1)  # [T, B, W]
    y, _ = F.multi_head_attention_forward(
        y, y, y, y.shape[-1], attention.heads, attention.in_proj_weight, attention.in_proj_bias,
        None, None, False, 0.0, attention.out_proj.weight, attention.out_proj.bias,
        attn_mask=mask)  # need_weights: an explicit softmax
    x = x + y.transpose(0, 1)
    y = F.linear(norm(block.ln_2, x), mlp.c_fc.weight, mlp.c_fc.bias)
    y = y * torch.sigmoid(1.702 * y)
    return x + F.linear(y, mlp.c_proj.weight, mlp.c_proj.bias)


def reference_prompts(model, embeddings, eot):
    """The text tower over all tokens, with an explicit causal mask; nothing is cut off."""
    length = embeddings.shape[1]
    mask = torch.ones(length, length).triu(1).bool()
    x = embeddings + model.positional_embedding[:length]
    for block in model.transformer.resblocks:
        x = reference_block(block, x, mask)
    x = F.layer_norm(x, x.shape[-1:], model.ln_final.weight, model.ln_final.bias)
    return x[torch.arange(len(x)), eot] @ model.text_projection


def reference_tokens(model, images):
    """The ViT before its last block: [B, 1 + L, W], patches one after the other."""
    visual, size = model.visual, model.visual.patch_size
    patches = [images[:, :, i:i + size, j:j + size].flatten(1)
               for i in range(0, images.shape[2], size) for j in range(0, images.shape[3], size)]
    x = torch.stack(patches, 1) @ visual.conv1.weight.flatten(1).T  # [B, L, W]
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1)
    x = visual.ln_pre(x + visual.positional_embedding)
    for block in visual.transformer.resblocks[:-1]:
        x = reference_block(block, x)
    return x


def gradients(model, function, x):
    """The output for x, and the gradients of a random projection of it: the text tower's
    parameters', and x's if it has one."""
    parameters = [p.requires_grad_() for name, p in model.named_parameters()
                  if not name.startswith(("visual", "logit_scale"))]
    wanted = parameters
    if x.is_floating_point():
        x = x.clone().requires_grad_()
        wanted = [x, *parameters]
    output = function(x)
    torch.manual_seed(3)
    loss = (output * torch.randn_like(output)).sum()
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    model.requires_grad_(False)
    return output.detach(), [torch.zeros(1) if grad is None else grad for grad in grads]


def assert_gradients_equal(ours, expected):
    assert_equal(ours[0], expected[0])
    assert len(ours[1]) == len(expected[1])
    for own, other in zip(ours[1], expected[1]):
        assert (own - other).abs().max() <= 1e-4 * max(1, other.abs().max())


@pytest.mark.parametrize("longest", [12, 77])
def test_cut_text_equals_all_77_tokens(vit, longest):
    tokens = random_tokens(5, longest)
    eot = (tokens == VOCABULARY - 1).int().argmax(dim=1)
    expected = gradients(
        vit, lambda x: reference_prompts(vit, vit.token_embedding.weight[x], eot), tokens)
    assert_gradients_equal(gradients(vit, vit.encode_text, tokens), expected)
    # tokens shorter than the context give the same
    assert_equal(vit.encode_text(tokens[:, :longest]), expected[0])

    embeddings = vit.token_embedding(tokens) + 0.1 * torch.randn(5, 77, 128)
    expected = gradients(vit, lambda x: reference_prompts(vit, x, eot), embeddings)
    ours = gradients(vit, lambda x: vit.encode_prompts(x, eot), embeddings)
    assert_gradients_equal(ours, expected)
    assert ours[1][0].abs().max() > 1e-2  # the prompts do get a gradient
    assert (ours[1][0][:, longest:] == 0).all()


def test_text_after_the_end_changes_nothing(vit):
    tokens = random_tokens(4, 40)
    other = tokens.clone()
    for row in other:
        end = int((row == VOCABULARY - 1).nonzero())
        row[end + 1:] = 7
    assert torch.equal(vit.encode_text(tokens), vit.encode_text(other))
    other[-1, 20] += 1
    assert not torch.allclose(vit.encode_text(tokens)[-1], vit.encode_text(other)[-1], atol=1e-3)


def test_no_texts_and_no_images(model):
    assert model.encode_text(random_tokens()[:0]).shape == (0, 32)
    prompts = model.encode_prompts(torch.zeros(0, 77, 128), torch.zeros(0, dtype=torch.int64))
    assert prompts.shape == (0, 32)
    assert model.encode_image(random_images(model)[:0]).shape == (0, 32)


@pytest.mark.parametrize("causal", [False, True])
def test_one_token_equals_the_whole_block(vit, causal):
    block = vit.transformer.resblocks[0]
    torch.manual_seed(4)
    x, index = torch.randn(6, 10, 128), torch.tensor([0, 9, 4, 4, 1, 8])
    mask = (torch.arange(10) <= index[:, None])[:, None, None] if causal else None
    ours = gradients(vit, lambda x: block.one_token(x, index, mask), x)
    expected = gradients(vit, lambda x: block(x, causal)[torch.arange(6), index], x)
    assert_gradients_equal(ours, expected)


def test_layer_norm_in_half_precision():
    torch.manual_seed(5)
    norm = clip_model.LayerNorm(64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    for dtype, tolerance in ((torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
        x = (torch.randn(8, 64) * 0.01 + 4).to(dtype)  # a small variance around a large mean
        centred = x.double() - x.double().mean(1, keepdim=True)
        exact = centred / (centred.pow(2).mean(1, keepdim=True) + norm.eps).sqrt()
        exact = exact * norm.weight + norm.bias
        for layer in (norm, copy.deepcopy(norm).to(dtype)):  # weights in float32, in half
            y = layer(x)
            assert y.dtype == dtype
            torch.testing.assert_close(y.double(), exact, atol=tolerance, rtol=tolerance)


def test_bfloat16_autocast_is_close(model):
    images, tokens = random_images(model), random_tokens()
    expected = [model.encode_image(images), model.encode_text(tokens),
                *(x.flatten(0, -2) for x in model.encode_image_dense(images))]
    with torch.autocast("cpu", torch.bfloat16):
        ours = [model.encode_image(images), model.encode_text(tokens),
                *(x.flatten(0, -2) for x in model.encode_image_dense(images))]
    for own, exact in zip(ours, expected):
        assert F.cosine_similarity(own.float(), exact).min() > 0.995
        assert not torch.equal(own.float(), exact)  # it was in effect


# ---------------------------------------------------------------------------------------------
# dense embeddings

def test_global_embedding_equals_encode_image(model):
    images = random_images(model)
    global_, local = model.encode_image_dense(images)
    assert_equal(global_, model.encode_image(images))
    locations = (32 // 8) ** 2 if model.visual.input_resolution == 32 else (96 // 32) ** 2
    assert local.shape == (3, locations, 32)


def test_vit_dense_equals_reference(vit):
    images = random_images(vit)
    x, last = reference_tokens(vit, images), vit.visual.transformer.resblocks[-1]
    expected = vit.visual.ln_post(reference_block(last, x)) @ vit.visual.proj
    for position in (True, False):  # of no effect on a ViT
        global_, local = vit.encode_image_dense(images, global_position=position)
        assert_equal(global_, expected[:, 0])
        assert_equal(local, expected[:, 1:])


def test_vit_value_path_equals_formula(vit):
    images = random_images(vit)
    global_, local = vit.encode_image_dense(images, value_path=True)
    last = vit.visual.transformer.resblocks[-1]
    for x, embedding in zip(reference_tokens(vit, images)[0, 1:], local[0]):  # one image's patches
        y = F.layer_norm(x, (128,), last.ln_1.weight, last.ln_1.bias)
        value = last.attn.in_proj_weight[-128:] @ y + last.attn.in_proj_bias[-128:]
        x = x + last.attn.out_proj.weight @ value + last.attn.out_proj.bias
        y = F.layer_norm(x, (128,), last.ln_2.weight, last.ln_2.bias)
        y = last.mlp.c_fc.weight @ y + last.mlp.c_fc.bias
        x = x + last.mlp.c_proj.weight @ (y * torch.sigmoid(1.702 * y)) + last.mlp.c_proj.bias
        assert_equal(embedding, vit.visual.proj.T @ vit.visual.ln_post(x))
    assert local.shape == (3, 16, 32)
    assert_equal(global_, vit.encode_image(images))


def test_resnet_has_no_value_path(resnet):
    with pytest.raises(ValueError, match="ViT"):
        resnet.encode_image_dense(random_images(resnet), value_path=True)


def test_resnet_dense_equals_loop_over_locations(resnet):
    images = random_images(resnet, size=(64, 96))
    pool = resnet.visual.attnpool
    features = resnet.visual.features(images)
    assert features.shape == (3, 512, 2, 3)
    local = resnet.encode_image_dense(images)[1]
    for image in range(3):
        for row in range(2):
            for column in range(3):
                location = features[image, :, row, column]
                value = pool.v_proj.weight @ location + pool.v_proj.bias
                expected = pool.c_proj.weight @ value + pool.c_proj.bias
                assert_equal(local[image, row * 3 + column], expected)


def test_resnet_global_without_position(resnet):
    images = random_images(resnet)
    without = clip_model.build_model(resnet.state_dict())
    without.visual.attnpool.positional_embedding.data.zero_()
    expected = without.encode_image(images)
    global_, local = resnet.encode_image_dense(images, global_position=False)
    assert_equal(global_, expected)
    assert (resnet.encode_image(images) - expected).abs().max() > 1e-2  # positions do count
    assert torch.equal(local, resnet.encode_image_dense(images)[1])


# ---------------------------------------------------------------------------------------------
# other image sizes

def test_positions_are_interpolated():
    torch.manual_seed(6)
    positions = torch.randn(17, 8)
    assert torch.equal(clip_model.resize_positions(positions, (4, 4)), positions)
    assert torch.equal(clip_model.resize_positions(positions, torch.Size([4, 4])), positions)
    for grid in ((2, 8), (7, 7), (3, 5), (1, 1)):
        resized = clip_model.resize_positions(positions, grid)
        assert resized.shape == (1 + grid[0] * grid[1], 8)
        assert torch.equal(resized[0], positions[0])
    constant = torch.full((17, 8), 0.7)
    torch.testing.assert_close(clip_model.resize_positions(constant, (5, 9)),
                               torch.full((46, 8), 0.7))
    # what differs from row to row only still does, row-major
    rows = torch.arange(4.).repeat_interleave(4)[:, None].expand(16, 8)
    resized = clip_model.resize_positions(torch.cat([rows[:1], rows]), (8, 2))[1:]
    assert torch.equal(resized[0::2], resized[1::2])
    assert (resized[0::2].diff(dim=0) > 0).all()
    assert clip_model.resize_positions(positions.half(), (6, 6)).dtype == torch.float16


def test_other_image_sizes(model):
    for size in ((64, 64), (64, 128), (128, 96)):
        images = random_images(model, 2, size)
        global_, local = model.encode_image_dense(images)
        locations = size[0] * size[1] // (64 if model.visual.input_resolution == 32 else 1024)
        assert global_.shape == (2, 32) and local.shape == (2, locations, 32)
        assert_equal(model.encode_image(images), global_)


# ---------------------------------------------------------------------------------------------
# model and preprocessing

def test_logits_are_scaled_cosines(model):
    images, tokens = random_images(model), random_tokens(5)
    per_image, per_text = model(images, tokens)
    assert per_image.shape == (3, 5) and torch.equal(per_text, per_image.T)
    image, text = model.encode_image(images), model.encode_text(tokens)
    for i in range(3):
        for j in range(5):
            cosine = image[i] @ text[j] / (image[i].norm() * text[j].norm())
            expected = model.logit_scale.exp() * cosine
            torch.testing.assert_close(per_image[i, j], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["ViT", "ResNet"])
def test_random_initialisation(kind):
    layers, width = (2, 128) if kind == "ViT" else ((1, 1, 1, 1), 16)
    model = clip_model.CLIP(64, 64, layers, width, 8, 77, 300, 128, 2, 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "conv" not in name and "downsample" not in name:
                parameter.fill_(float("nan"))  # convolutions keep torch's initialisation
    model.initialize_parameters()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    block = model.transformer.resblocks[1]
    for parameter, expected in ((model.token_embedding.weight, 0.02),
                                (model.positional_embedding, 0.01),
                                (model.text_projection, 128 ** -0.5),
                                (block.attn.in_proj_weight, 128 ** -0.5),
                                (block.attn.out_proj.weight, 128 ** -0.5 / 2),
                                (block.mlp.c_fc.weight, 256 ** -0.5),
                                (block.mlp.c_proj.weight, 128 ** -0.5 / 2)):
        assert abs(parameter.std() / expected - 1) < 0.05  # OpenAI's
    if kind == "ResNet":  # every block starts as the identity
        assert model.visual.layer2[0].bn3.weight.abs().max() == 0
    torch.testing.assert_close(model.logit_scale.exp().item(), 1 / 0.07)


@pytest.mark.parametrize("size", [(37, 101), (101, 37), (64, 64), (33, 32), (640, 427), (200, 3)])
def test_preprocessing_equals_arithmetic(size):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    ours = clip_model.preprocess_transform(32)(image)
    assert ours.shape == (3, 32, 32) and ours.dtype == torch.float32
    width, height = size
    width, height = (32, 32 * height // width) if width < height else (32 * width // height, 32)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - 32) / 2), round((height - 32) / 2)
    pixels = np.asarray(resized)[top:top + 32, left:left + 32] / 255
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    expected = torch.tensor((pixels - mean) / std).permute(2, 0, 1)
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK"])
def test_preprocessing_takes_every_colour_mode(mode):
    image = Image.new("RGB", (50, 40), (200, 200, 200)).convert(mode)
    pixels = clip_model.preprocess_transform(32)(image)
    assert pixels.shape == (3, 32, 32) and pixels.isfinite().all()


def test_preprocessing_can_be_sent_to_worker_processes():
    transform = clip_model.preprocess_transform(32)
    image = Image.effect_mandelbrot((50, 40), (-2, -1, 1, 1), 50)
    sent = pickle.loads(pickle.dumps(transform))  # what data loaders do on macOS and Windows
    assert torch.equal(sent(image), transform(image))


# ---------------------------------------------------------------------------------------------
# weights

def test_build_model_copies(model):
    state_dict = {key: value.clone() for key, value in model.state_dict().items()}
    built = clip_model.build_model(state_dict)
    assert not built.training
    with torch.no_grad():
        for value in built.state_dict().values():
            value += 1
    for key, value in model.state_dict().items():
        assert torch.equal(state_dict[key], value), key


def test_build_model_gives_float32_that_trains(vit):
    half = {key: value.half() for key, value in vit.state_dict().items()}
    model = clip_model.build_model(half)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("key", ["text_projection", "token_embedding.weight", "ln_final.bias",
                                 "visual.conv1.weight", "logit_scale"])
@pytest.mark.parametrize("change", ["missing", "surplus", "another shape"])
def test_wrong_keys_are_refused(model, key, change):
    state_dict = dict(model.state_dict())
    value = state_dict.pop(key)
    if change == "surplus":
        state_dict |= {key: value, (key := key + "_2"): value}
    elif change == "another shape":
        state_dict[key] = torch.zeros(*value.shape, 2)
    with pytest.raises(ClipError, match=re.escape(key)) as error:
        clip_model.build_model(state_dict)
    assert "\n" not in str(error.value)


def half_state_dict(model):
    """As OpenAI saves them: float16, and three integers beside the weights."""
    state_dict = {key: value.half() if value.is_floating_point() else value
                  for key, value in model.state_dict().items()}
    integers = dict(input_resolution=model.visual.input_resolution, context_length=77,
                    vocab_size=VOCABULARY)
    return state_dict | {key: torch.tensor(value) for key, value in integers.items()}


class Node(nn.Module):
    def forward(self, x: torch.Tensor):
        return x


def save_torchscript(state_dict, path):
    """An archive with the given keys: modules nested as the dots say."""
    root = Node()
    for key, value in state_dict.items():
        *parents, name = key.split(".")
        node = root
        for parent in parents:
            if parent not in node._modules:
                node.add_module(parent, Node())
            node = node._modules[parent]
        if value.is_floating_point():
            node.register_parameter(name, nn.Parameter(value, requires_grad=False))
        else:
            node.register_buffer(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.script(root).save(str(path))


def test_load_reads_every_format(model, merges_path):
    state_dict, folder = half_state_dict(model), merges_path.parent
    save_torchscript(state_dict, folder / "archive.pt")
    torch.save(state_dict, folder / "saved.pt")
    torch.save({"epoch": 3, "state_dict": state_dict}, folder / "checkpoint.pt")
    expected = clip_model.build_model(state_dict)
    images, tokens = random_images(model), random_tokens()
    for path in (folder / "archive.pt", folder / "saved.pt", str(folder / "checkpoint.pt")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # TorchScript's deprecation is not the user's concern
            loaded, preprocess = clip_model.load(path)
        assert not loaded.training and loaded.dtype == torch.float32
        assert shapes(loaded) == shapes(model)
        assert torch.equal(loaded.encode_image(images), expected.encode_image(images))
        assert torch.equal(loaded.encode_text(tokens), expected.encode_text(tokens))
        size = model.visual.input_resolution
        assert preprocess(Image.new("RGB", (120, 150))).shape == (3, size, size)
        assert loaded.tokenize("dog")[0, 1] == 512 + 1  # the second merge
    assert clip_model.load(path, device="meta")[0].logit_scale.device.type == "meta"


def test_loading_never_holds_all_weights_twice(vit, monkeypatch):
    references, alive = [], []

    def read():
        state_dict = half_state_dict(vit)
        references.extend(map(weakref.ref, state_dict.values()))
        return state_dict

    def spy(model, state_dict, **options):
        alive.extend(reference for reference in references if reference() is not None)
        return nn.Module.load_state_dict(model, state_dict, **options)

    monkeypatch.setattr(clip_model.CLIP, "load_state_dict", spy)
    clip_model.build_model(read())
    assert references and len(alive) <= 1  # the loop's last tensor
    kept = half_state_dict(vit)  # a caller's own state dict stays as it is
    before = dict(kept)
    clip_model.build_model(kept)
    assert kept.keys() == before.keys() and all(kept[key] is before[key] for key in before)


def test_toy_clips_load_with_their_own_vocabulary():
    for name, kind in (("toy-RN", clip_model.ModifiedResNet),
                       ("toy-ViT", clip_model.VisionTransformer),
                       ("toy", clip_model.VisionTransformer)):
        model, preprocess = clip_model.load(name)
        assert isinstance(model.visual, kind)
        tokens = model.tokenize(["a red star", "a blue boat"])
        assert tokens.shape == (2, model.context_length)
        assert tokens.max() == len(model.tokenizer) - 1
        logits, _ = model(preprocess(Image.new("RGB", (60, 50)))[None], tokens)
        assert logits.shape == (1, 2) and logits.isfinite().all()


def test_load_wants_the_vocabulary_that_belongs_to_the_weights(vit, merges_path):
    state_dict = half_state_dict(vit)
    state_dict["token_embedding.weight"] = torch.zeros(520, 128)
    path = merges_path.parent / "small.pt"
    torch.save(state_dict, path)
    with pytest.raises(ClipError, match=f"merges.txt.gz makes {VOCABULARY} .*520"):
        clip_model.load(path)
    merges_path.unlink()
    with pytest.raises(ClipError, match="520 entries.*merges.txt.gz"):
        clip_model.load(path)


def test_unknown_names_list_the_known_ones(tmp_path):
    for name in ("ViT-Z/99", "no such file.pt", tmp_path):
        with pytest.raises(ClipError) as error:
            clip_model.load(name)
        assert str(name) in str(error.value) and "\n" not in str(error.value)
        for known in clip_model.available_models():
            assert known in str(error.value)


class Executes:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")  # runs while it is unpickled


def test_nothing_in_a_pickle_is_executed(tmp_path):
    contents = {"text_projection": Executes(tmp_path / "trap")}
    torch.save(contents, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(contents, protocol=2))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(ClipError, match=name):
            clip_model.load(tmp_path / name)
        assert not (tmp_path / "trap").exists()
    pickle.loads((tmp_path / "plain.pt").read_bytes())["text_projection"].close()
    assert (tmp_path / "trap").exists()  # the trap works


@pytest.mark.parametrize("content", [
    b"", b"hello\n", b"<!DOCTYPE html>\n<html>404</html>\n", b"0", b"e",
    b"version https://git-lfs.github.com/spec/v1\n",
    b"\x80\x02.", b"PK\x03\x04", pickle.dumps([1, 2, 3], protocol=2)], ids=repr)
def test_other_files_are_no_weights(tmp_path, content):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(ClipError) as error:
        clip_model.load(path)
    assert "\n" not in str(error.value)


def test_truncated_weights_are_refused(vit, tmp_path):
    torch.save(half_state_dict(vit), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for proportion in (0.1, 0.5, 0.99):
        (tmp_path / "part.pt").write_bytes(whole[:int(proportion * len(whole))])
        with pytest.raises(ClipError, match="part.pt"):
            clip_model.load(tmp_path / "part.pt")


# ---------------------------------------------------------------------------------------------
# downloads

CONTENT = bytes(range(256)) * 500
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests.append(self.path)
        if self.path == "/missing":
            return self.send_error(404)
        body = CONTENT[::-1] if self.path == "/corrupt" else CONTENT
        self.send_response(200)
        if self.path == "/chunked":  # breaks off inside a chunk
            self.send_header("Transfer-Encoding", "chunked")
            body = b"20000\r\n" + body[:1000]
        else:
            self.send_header("Content-Length", str(len(body)))
            body = body[:1000] if self.path == "/short" else body
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *args):
        """Not a line a request among the tests' output."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.url = [], f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_download(server, tmp_path):
    path = tmp_path / "new" / "folder" / "weights.pt"
    assert clip_model.download(f"{server.url}/good", SHA256, path) == path
    assert path.read_bytes() == CONTENT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip_model.download(f"{server.url}/good", SHA256, path)  # it is there: no request
    assert server.requests == ["/good"]
    assert os.listdir(path.parent) == ["weights.pt"]


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
def test_downloads_can_be_read_by_those_who_share_the_folder(server, tmp_path):
    (tmp_path / "ordinary").write_text("")
    path = clip_model.download(f"{server.url}/good", SHA256, tmp_path / "weights.pt")
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("page", ["/corrupt", "/short", "/chunked", "/missing"])
def test_bad_downloads_are_refused_and_leave_nothing(server, tmp_path, page):
    path = tmp_path / "weights.pt"
    with pytest.raises(ClipError) as error:
        clip_model.download(server.url + page, SHA256, path)
    for part in (server.url + page, SHA256, str(path)):
        assert part in str(error.value)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "weights.pt"  # a file in place of the folder
    with pytest.raises(ClipError) as error:
        clip_model.download(f"{server.url}/good", SHA256, path)
    assert str(path) in str(error.value)


def test_corrupt_cached_file_is_fetched_again(server, tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(CONTENT[:-1])
    with pytest.warns(UserWarning, match="weights.pt is corrupt"):
        clip_model.download(f"{server.url}/good", SHA256, path)
    assert path.read_bytes() == CONTENT


def test_without_network_the_message_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setattr(clip_model, "WEIGHTS_URL", url)
        with pytest.raises(ClipError) as error:
            clip_model.load("RN50", download_root=tmp_path)
    sha256 = "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"
    for part in (f"{url}/{sha256}/RN50.pt", str(tmp_path / "RN50.pt"), sha256):
        assert part in str(error.value)
    assert os.listdir(tmp_path) == []


def test_published_names_are_downloaded(vit, tmp_path, monkeypatch):
    state_dict = {key: value.half() for key, value in vit.state_dict().items()}
    state_dict["token_embedding.weight"] = torch.zeros(49408, 128, dtype=torch.float16)
    content = io.BytesIO()
    torch.save(state_dict, content)
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    (tmp_path / digest).mkdir()
    (tmp_path / digest / "ViT-B-32.pt").write_bytes(content.getvalue())
    monkeypatch.setattr(clip_model, "WEIGHTS_URL", tmp_path.as_uri())
    monkeypatch.setitem(clip_model.WEIGHTS, "ViT-B/32", (digest, "ViT-B-32.pt"))
    model, _ = clip_model.load("ViT-B/32", download_root=tmp_path / "cache")
    assert (tmp_path / "cache" / "ViT-B-32.pt").is_file()
    assert model.tokenizer is None and model.vocab_size == 49408
    images = random_images(vit)
    assert_equal(model.encode_image(images), vit.encode_image(images), 0.05)  # rounded weights


def test_where_the_official_vocabulary_is_looked_for(merges_path, tmp_path, monkeypatch):
    find = clip_model.official_tokenizer.__wrapped__  # without its cache
    packages = {}  # what is installed: name -> folder
    monkeypatch.setattr(clip_model.importlib.util, "find_spec", lambda name: packages.get(name))
    monkeypatch.setattr(clip_model, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(clip_model, "VOCABULARY_URL", merges_path.as_uri())
    digest = hashlib.sha256(merges_path.read_bytes()).hexdigest()
    monkeypatch.setattr(clip_model, "VOCABULARY_SHA256", digest)
    cached = tmp_path / "cache" / "bpe_simple_vocab_16e6.txt.gz"

    # an installed package comes before the download
    with gzip.open(tmp_path / cached.name, "wt") as file:
        file.write("#version: test\na b\n")
    packages["clip"] = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    assert len(find()) == 512 + 1 + 2 and not cached.exists()
    # without one it is fetched into the cache
    installed = packages.pop("clip")
    assert len(find()) == VOCABULARY and cached.read_bytes() == merges_path.read_bytes()
    # the cache comes first, and is checked
    packages["clip"] = installed
    assert len(find()) == VOCABULARY
    cached.write_bytes(b"broken")
    with pytest.warns(UserWarning, match="corrupt"):
        assert len(find()) == VOCABULARY
