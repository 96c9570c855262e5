"""CLIP (Radford et al., ICML 2021): image and text towers, tokenizer, preprocessing, weights.

The interface is OpenAI's, the state-dict keys too, so every OpenAI-format checkpoint loads:

    model, preprocess = clip_model.load("ViT-B/16")              # float32, eval mode
    images = preprocess(Image.open("photo.jpg"))[None]           # [1, 3, 224, 224]
    tokens = model.tokenize(["a photo of a dog", "a photo of a cat"])  # int64 [2, 77]
    logits_per_image, logits_per_text = model(images, tokens)    # [1, 2], [2, 1]

Beside it there is what multi-label methods need: one embedding per image location
(`encode_image_dense`) and a text tower fed with token embeddings (`encode_prompts`).

Shapes: B images, N texts, L locations, T tokens, W tower width, D joint embedding.

Where this differs from OpenAI's code, with equal results:
 1. batch-first tensors and torch's scaled_dot_product_attention;
 2. text is cut after the batch's last end-of-text token: the tower is causal;
 3. the last block computes only the token that is read (class token, end of text);
 4. float32 weights by default, so that under autocast LayerNorm computes in float32;
 5. images of another size than the trained one: positional embeddings are interpolated.
"""
import functools
import gzip
import hashlib
import html
import http.client
import json
import operator
import os
import pickle
import shutil
import sys
import urllib.request
import uuid
import zipfile
from pathlib import Path

import ftfy
import regex
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from torchvision import transforms
from tqdm import tqdm

CACHE = "~/.cache/clip"  # shared with OpenAI's own package
TOY = Path(__file__).resolve().parent / "toy"
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)

# name -> SHA-256 of OpenAI's file, which is also the folder of its URL; the repository with the
# hub's copy of it in float32; the number of parameters, by which an architecture is known
WEIGHTS_URL = "https://openaipublic.azureedge.net/clip/models"
HUB_URL = "https://huggingface.co"
WEIGHTS = {
    "RN50": ("afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
             "timm/resnet50_clip.openai", 102_007_137),
    "RN101": ("8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
              "timm/resnet101_clip.openai", 119_688_033),
    "RN50x4": ("7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
               "timm/resnet50x4_clip.openai", 178_300_601),
    "RN50x16": ("52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
                "timm/resnet50x16_clip.openai", 290_979_217),
    "RN50x64": ("be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
                "timm/resnet50x64_clip.openai", 623_258_305),
    "ViT-B/32": ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
                 "timm/vit_base_patch32_clip_224.openai", 151_277_313),
    "ViT-B/16": ("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
                 "timm/vit_base_patch16_clip_224.openai", 149_620_737),
    "ViT-L/14": ("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
                 "timm/vit_large_patch14_clip_224.openai", 427_616_513),
    "ViT-L/14@336px": ("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
                       "timm/vit_large_patch14_clip_336.openai", 427_944_193),
}
VOCABULARY_URL = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
VOCABULARY_SIZE = 49408


class ClipError(RuntimeError):
    """Weights that cannot be had or are not CLIP's, texts that it cannot take; says what to do."""


# ---- tokenizer

@functools.lru_cache
def byte_symbols():
    """The 256 bytes as printable characters, in the order that CLIP's vocabulary lists them.

    Printable Latin-1 bytes stand for themselves; the others get the characters from 256 on, so
    that byte pairs can be kept in a text file without white space or control characters."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    symbols = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in symbols]
    return symbols | {byte: chr(256 + i) for i, byte in enumerate(others)}


class Tokenizer:
    """Lower-cased byte-level BPE. merges_path: gzip text, a header line, then a merge a line.

    The vocabulary is 256 bytes, the same with `</w>` (end of word), the merges, start of text
    and end of text: 49,408 entries with OpenAI's file, of which CLIP reads 48,894 merges."""

    start, end = "<|startoftext|>", "<|endoftext|>"
    pattern = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|"
                            r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)

    def __init__(self, merges_path):
        with gzip.open(merges_path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1:][:VOCABULARY_SIZE - 512 - 2]  # behind the header
        merges = [tuple(line.split()) for line in lines if line.strip()]
        symbols = list(byte_symbols().values())
        self.tokens = symbols + [symbol + "</w>" for symbol in symbols]
        self.tokens += ["".join(merge) for merge in merges] + [self.start, self.end]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.ranks = {merge: rank for rank, merge in enumerate(merges)}
        self.bytes = {symbol: byte for byte, symbol in byte_symbols().items()}
        self.words = {self.start: [self.ids[self.start]], self.end: [self.ids[self.end]]}  # cache

    def __len__(self):
        return len(self.tokens)

    def merge(self, word):
        """Byte symbols of one word (str) -> token ids: always the pair learned first."""
        parts = [*word[:-1], word[-1] + "</w>"]
        while ranked := [(self.ranks[pair], i) for i, pair in enumerate(zip(parts, parts[1:]))
                         if pair in self.ranks]:
            _, i = min(ranked)
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        return [self.ids[part] for part in parts]

    def encode(self, text):
        """str -> list of token ids, without start and end of text."""
        clean = html.unescape(html.unescape(ftfy.fix_text(text)))
        clean = regex.sub(r"\s+", " ", clean.strip()).strip().lower()
        ids = []
        for word in self.pattern.findall(clean):
            if word not in self.words:
                symbols = "".join(byte_symbols()[byte] for byte in word.encode("utf-8"))
                self.words[word] = self.merge(symbols)
            ids += self.words[word]
        return ids

    def decode(self, ids):
        """List of token ids -> str; every word is followed by a space, as in OpenAI's code."""
        data = bytes(self.bytes[symbol] for i in ids for symbol in self.tokens[i])
        return data.decode(errors="replace").replace("</w>", " ")

    def tokenize(self, texts, context_length=77, truncate=False):
        """A text or a list of texts -> int64 [N, context_length], padded with 0.

        Raises RuntimeError naming the text that is too long; with truncate=True the text is cut
        instead, and its last token is the end of text."""
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.zeros(len(texts), context_length, dtype=torch.int64)
        for row, text in zip(tokens, texts):
            ids = [self.ids[self.start], *self.encode(text), self.ids[self.end]]
            if len(ids) > context_length:
                if not truncate:
                    raise ClipError(f"text of {len(ids)} tokens is too long for a context length "
                                    f"of {context_length}: {text!r}")
                ids = ids[:context_length - 1] + ids[-1:]
            row[:len(ids)] = torch.tensor(ids)
        return tokens


@functools.lru_cache
def official_tokenizer():
    """OpenAI's vocabulary: from the cache, or downloaded into it."""
    path = cache_folder() / "bpe_simple_vocab_16e6.txt.gz"
    return Tokenizer(download(VOCABULARY_URL, path, VOCABULARY_SHA256))


def tokenize(texts, context_length=77, truncate=False):
    """As Tokenizer.tokenize, with OpenAI's vocabulary: -> int64 [N, context_length]."""
    return official_tokenizer().tokenize(texts, context_length, truncate)


# ---- transformer

def attend(q, k, v, heads, mask=None, causal=False):
    """Multi-head attention of q [B, Q, W] over k and v [B, T, W] -> [B, Q, W]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, h, T, W/h]
    x = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head self-attention with the parameter names of nn.MultiheadAttention."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(width ** -0.5 * torch.randn(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, causal=False):
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return self.out_proj(attend(q, k, v, self.heads, causal=causal))

    def query(self, token, x, mask=None):
        """Attention of one token [B, 1, W] over x [B, T, W]; mask [B, 1, 1, T], True = look."""
        width = x.shape[-1]
        q = F.linear(token, self.in_proj_weight[:width], self.in_proj_bias[:width])
        k, v = F.linear(x, self.in_proj_weight[width:], self.in_proj_bias[width:]).chunk(2, -1)
        return self.out_proj(attend(q, k, v, self.heads, mask))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x):
        # QuickGELU, x * sigmoid(1.702 x), written so that autograd keeps one tensor, not two
        x = F.silu(1.702 * self.c_fc(x)).div_(1.702)  # in place: backward needs silu's input only
        return self.c_proj(x)


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = MLP(width)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x, causal=False):
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))

    def one_token(self, x, index, mask=None):
        """What forward gives for a token of every row: x [B, T, W], index [B] or int -> [B, W]."""
        rows = torch.arange(len(x), device=x.device)
        token = x[rows, index][:, None]  # [B, 1, W]
        token = token + self.attn.query(self.ln_1(token), self.ln_1(x), mask)
        return (token + self.mlp(self.ln_2(token)))[:, 0]


class Transformer(nn.Module):
    def __init__(self, width, layers, heads):
        super().__init__()
        self.resblocks = nn.Sequential(
            *(ResidualAttentionBlock(width, heads) for _ in range(layers)))
        for block in self.resblocks:
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            for branch_end in (block.attn.out_proj, block.mlp.c_proj):
                nn.init.normal_(branch_end.weight, std=(2 * layers * width) ** -0.5)


def resize_positions(positions, grid):
    """Positional embeddings [1 + n * n, W] (first: class or mean token) for a (h, w) grid."""
    size = round((len(positions) - 1) ** 0.5)
    if (size, size) == tuple(grid):
        return positions
    square = positions[1:].T.reshape(1, -1, size, size)  # [1, W, n, n]
    square = F.interpolate(square.float(), grid, mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], square[0].flatten(1).T.to(positions.dtype)])


class VisionTransformer(nn.Module):
    def __init__(self, resolution, patch_size, width, layers, heads, output_dim):
        super().__init__()
        self.input_resolution, self.patch_size = resolution, patch_size
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        std = width ** -0.5
        self.class_embedding = nn.Parameter(std * torch.randn(width))
        positions = (resolution // patch_size) ** 2 + 1  # of the class token and the patches
        self.positional_embedding = nn.Parameter(std * torch.randn(positions, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(std * torch.randn(width, output_dim))

    def embed(self, images):
        """Images [B, 3, H, W] -> tokens [B, 1 + L, W], class token first, before any block."""
        x = self.conv1(images)
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)  # [B, W, h, w] -> [B, L, W]
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1).to(x.dtype), x], dim=1)
        return self.ln_pre(x + resize_positions(self.positional_embedding, grid))

    def forward(self, images):
        x = self.transformer.resblocks[:-1](self.embed(images))
        x = self.transformer.resblocks[-1].one_token(x, 0)
        return self.ln_post(x) @ self.proj

    def dense(self, images, position=True):  # which is of no effect here
        x = self.transformer.resblocks(self.embed(images))
        x = self.ln_post(x) @ self.proj  # [B, 1 + L, W] -> [B, 1 + L, D]
        return x[:, 0], x[:, 1:]


# ---- residual network

class Bottleneck(nn.Module):
    """Strided convolutions are replaced by stride 1 and average pooling, to avoid aliasing."""

    def __init__(self, inplanes, planes, stride=1):
        super().__init__()
        outplanes = 4 * planes
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, outplanes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outplanes)
        nn.init.zeros_(self.bn3.weight)  # a block starts as the identity
        self.downsample = None
        if stride > 1 or inplanes != outplanes:
            self.downsample = nn.Sequential()
            self.downsample.add_module("-1", nn.AvgPool2d(stride))
            self.downsample.add_module("0", nn.Conv2d(inplanes, outplanes, 1, bias=False))
            self.downsample.add_module("1", nn.BatchNorm2d(outplanes))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x)).relu_()
        x = self.bn2(self.conv2(x)).relu_()
        x = self.bn3(self.conv3(self.avgpool(x)))
        x += identity  # in place: nothing reads the norm's output again
        return x.relu_()


class AttentionPool2d(nn.Module):
    """One attention query, the mean of all locations, over the mean and the locations."""

    def __init__(self, grid, width, heads, output_dim):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(grid ** 2 + 1, width) * width ** -0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, output_dim)
        for projection in (self.k_proj, self.q_proj, self.v_proj, self.c_proj):
            nn.init.normal_(projection.weight, std=width ** -0.5)

    def forward(self, x, position=True, dense=False):
        """Feature map [B, W, h, w] -> global [B, D], and with dense also local [B, L, D]."""
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)  # [B, W, h, w] -> [B, L, W]
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)
        values = self.v_proj(x)
        # a location on its own, as if the attention looked at nothing else (values are linear,
        # so the positions are added to them afterwards rather than running v_proj twice)
        local = self.c_proj(values[:, 1:]) if dense else None
        if position:
            positions = resize_positions(self.positional_embedding, grid)
            x = x + positions
            values = values + F.linear(positions, self.v_proj.weight)
        pooled = attend(self.q_proj(x[:, :1]), self.k_proj(x), values, self.heads)  # [B, 1, W]
        pooled = self.c_proj(pooled[:, 0])
        return (pooled, local) if dense else pooled


class ModifiedResNet(nn.Module):
    def __init__(self, layers, output_dim, heads, resolution, width):
        super().__init__()
        self.input_resolution = resolution
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        inplanes = width
        for i, blocks in enumerate(layers):
            planes = width * 2 ** i
            stage = [Bottleneck(inplanes, planes, stride=1 if i == 0 else 2)]
            inplanes = 4 * planes
            stage += [Bottleneck(inplanes, planes) for _ in range(1, blocks)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
        self.attnpool = AttentionPool2d(resolution // 32, width * 32, heads, output_dim)

    def features(self, x):
        """Images [B, 3, H, W] -> layer4 [B, 32 * width, H / 32, W / 32]."""
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = bn(conv(x)).relu_()
        return self.layer4(self.layer3(self.layer2(self.layer1(F.avg_pool2d(x, 2)))))

    def forward(self, images):
        return self.attnpool(self.features(images))

    def dense(self, images, position=True):
        return self.attnpool(self.features(images), position, dense=True)


# ---- CLIP

class CLIP(nn.Module):
    """Both towers. vision_layers: an int makes a ViT, four ints a ModifiedResNet.

    Constructor arguments as OpenAI's. `tokenizer` is the vocabulary that the weights belong to;
    None means OpenAI's, which is looked for when it is first needed."""

    def __init__(self, embed_dim, image_resolution, vision_layers, vision_width, vision_patch_size,
                 context_length, vocab_size, transformer_width, transformer_heads,
                 transformer_layers):
        super().__init__()
        self.context_length, self.vocab_size = context_length, vocab_size
        self.tokenizer = None
        if isinstance(vision_layers, int):
            self.visual = VisionTransformer(image_resolution, vision_patch_size, vision_width,
                                            vision_layers, vision_width // 64, embed_dim)
        else:
            self.visual = ModifiedResNet(vision_layers, embed_dim, vision_width * 32 // 64,
                                         image_resolution, vision_width)
        self.transformer = Transformer(transformer_width, transformer_layers, transformer_heads)
        self.token_embedding = nn.Embedding(vocab_size, transformer_width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        positions = 0.01 * torch.randn(context_length, transformer_width)
        self.positional_embedding = nn.Parameter(positions)
        self.ln_final = nn.LayerNorm(transformer_width)
        projection = transformer_width ** -0.5 * torch.randn(transformer_width, embed_dim)
        self.text_projection = nn.Parameter(projection)
        self.logit_scale = nn.Parameter(torch.tensor(0.07).reciprocal().log())

    @property
    def dtype(self):
        return self.visual.conv1.weight.dtype

    def fingerprint(self):
        """Eight hex digits of the SHA-256 of the weights."""
        digest = hashlib.sha256()
        for tensor in self.state_dict().values():
            digest.update(tensor.detach().cpu().numpy().tobytes())
        return digest.hexdigest()[:8]

    def tokenize(self, texts, truncate=False):
        """As Tokenizer.tokenize, with this model's vocabulary: -> int64 [N, context_length]."""
        tokenizer = self.tokenizer or official_tokenizer()
        return tokenizer.tokenize(texts, self.context_length, truncate)

    def check_labels(self, labels):
        """Raises ClipError where two labels have the same tokens (Dog, dog), or one has none."""
        known = {}
        for label in labels:
            tokens = tuple(self.tokenize(label, truncate=True)[0].tolist())
            if tokens.index(max(tokens)) == 1:  # the end follows the start
                raise ClipError(f"the label {label!r} is empty: CLIP finds no token in it")
            if tokens in known:
                raise ClipError(f"CLIP cannot tell the labels {known[tokens]!r} and {label!r} "
                                "apart, they have the same tokens: leave one out")
            known[tokens] = label

    def encode_image(self, images):
        """Normalised images [B, 3, H, W] -> embeddings [B, D], not of unit length."""
        return self.visual(images.to(self.dtype))

    def encode_image_dense(self, images, global_position=True):
        """Images [B, 3, H, W] -> (global [B, D], local [B, L, D]), row-major, not normalised.

        ViT: class and patch tokens through ln_post and the projection (MKT, section 3).
        ResNet: attention pool, and v_proj and c_proj of each location of layer4 (CoMC, section 3);
        global_position=False pools without positional embeddings. Of no effect on a ViT."""
        return self.visual.dense(images.to(self.dtype), global_position)

    def encode_text(self, tokens):
        """Token ids int64 [N, T], T up to the context length -> embeddings [N, D], not of unit
        length. The embedding is read at each text's end-of-text token, the highest id."""
        eot = tokens.argmax(dim=-1).cpu()  # a GPU is waited for here, once
        return self.encode_prompts(self.token_embedding(tokens), eot)

    def encode_prompts(self, embeddings, eot):
        """Token embeddings [N, T, W] without positions, indices of their ends [N] -> [N, D].

        What follows the last end is cut off; many texts are encoded in parts, from the shortest to
        the longest. eot may be on the CPU: a GPU is not waited for."""
        if len(eot) <= 256:
            return self._encode_prompts(embeddings, eot)
        order = eot.argsort()
        parts = [self._encode_prompts(embeddings[rows.to(embeddings.device, non_blocking=True)],
                                      eot[rows]) for rows in order.split(256)]
        return torch.cat(parts)[order.argsort().to(embeddings.device, non_blocking=True)]

    def _encode_prompts(self, embeddings, eot):
        length = int(eot.max()) + 1 if len(eot) else 0
        x = embeddings[:, :length].to(self.dtype) + self.positional_embedding[:length]
        eot = eot.to(x.device, non_blocking=True)  # a GPU need not be done first
        *blocks, last = self.transformer.resblocks
        for block in blocks:
            x = block(x, causal=True)
        visible = torch.arange(length, device=x.device) <= eot[:, None]  # [N, T]
        x = last.one_token(x, eot, visible[:, None, None])
        return self.ln_final(x) @ self.text_projection

    def forward(self, images, tokens):
        """-> (logits_per_image [B, N], logits_per_text [N, B]): scaled cosine similarities."""
        image_embeddings = F.normalize(self.encode_image(images), dim=-1)
        text_embeddings = F.normalize(self.encode_text(tokens), dim=-1)
        logits = self.logit_scale.exp() * image_embeddings @ text_embeddings.T
        return logits, logits.T


# "an" stands before letters that are spelled (an MRI, an X-ray) and before vowels that are heard
AN = regex.compile(
    r"[AEFHILMNORSX](?![a-z]|[A-Z]{3})|(?!U[A-Z]{1,2}\b)(?i:[fhlmnrsx8](?![a-z])|hour|heir|hono|"
    r"honest|(?!eu|ew|one\b|u\b|usb\b|u[krst][aeiou]|uni(?![dn]))[aeiou])")


@torch.no_grad()
def zero_shot_embeddings(model, labels):
    """Labels -> embeddings of "a photo of a dog.", "a photo of an ear.": float32 [C, D], of unit
    length, on the model's device. Raises ClipError for a label that is too long."""
    prompts = [f"a photo of {'an' if AN.match(label) else 'a'} {label}." for label in labels]
    parts = model.tokenize(prompts).to(model.text_projection.device).split(256)
    return F.normalize(torch.cat([model.encode_text(part).float() for part in parts]), dim=-1)


def in_chunks(encode, tensors, chunk=1024):
    """encode(*tensors) -> [C, D] of tensors [C, ...]. More than a chunk is recomputed in the
    backward pass, chunk by chunk: 7,000 labels would keep the activations of 7,000 texts, of which
    ViT-B/16's tower takes 4 GB a chunk."""
    if len(tensors[0]) <= chunk:
        return encode(*tensors)
    pieces = zip(*(x.split(chunk) for x in tensors))
    return torch.cat([recompute(encode, *piece, use_reentrant=False) for piece in pieces])


# ---- weights

def available_models():
    """Names that `load` takes, apart from paths."""
    return ["toy-RN", "toy-ViT", *WEIGHTS]


def preprocess_transform(size):
    """OpenAI's test-time transform: PIL image -> float32 [3, size, size], CLIP's normalisation."""
    return transforms.Compose([
        transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(size),
        operator.methodcaller("convert", "RGB"),  # no lambda: it is pickled for the workers
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])


def count_blocks(state_dict, prefix):
    return len({key[len(prefix):].split(".")[0] for key in state_dict if key.startswith(prefix)})


def build_model(state_dict):
    """OpenAI-format state dict -> CLIP in eval mode and float32; the tensors are copied.

    The architecture is inferred from the shapes. Raises ClipError where they are not OpenAI's.
    LAION's and others' weights have the same keys but were trained with GELU, where OpenAI's have
    QuickGELU. Nothing in them tells: they load, and their embeddings are wrong."""
    # what archives have beside the weights
    others = "input_resolution", "context_length", "vocab_size", "attn_mask"
    try:
        weights = {key: value.detach().clone() for key, value in state_dict.items()
                   if key not in others}
        embed_dim = weights["text_projection"].shape[1]
        context_length, width = weights["positional_embedding"].shape
        vocab_size = len(weights["token_embedding.weight"])
        text_layers = count_blocks(weights, "transformer.resblocks.")
        if "visual.proj" in weights:
            vision_width = len(weights["visual.conv1.weight"])
            patch_size = weights["visual.conv1.weight"].shape[-1]
            layers = count_blocks(weights, "visual.transformer.resblocks.")
            positions = weights["visual.positional_embedding"]
        else:
            vision_width, patch_size = len(weights["visual.layer1.0.conv1.weight"]), None
            layers = [count_blocks(weights, f"visual.layer{i}.") for i in (1, 2, 3, 4)]
            positions = weights["visual.attnpool.positional_embedding"]
        for size in [vision_width, width] if patch_size else [width]:
            if size % 64 or size > 1024:  # ViT-H's are of 80: the weights do not tell
                raise ValueError(f"a transformer {size} wide: how many heads does it have?")
        resolution = (patch_size or 32) * round((len(positions) - 1) ** 0.5)
        with torch.device("meta"):  # nothing is allocated: the copies become the model's weights
            model = CLIP(embed_dim, resolution, layers, vision_width, patch_size, context_length,
                         vocab_size, width, width // 64, text_layers)
        model.load_state_dict(weights, assign=True)
        if not patch_size:  # a tenth faster for a ResNet's convolutions
            model.visual.to(memory_format=torch.channels_last)
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]  # there may be a line for each key
        raise ClipError(f"not a CLIP state dict in OpenAI's format: {reason}") from None
    return model.float().eval()


def read_safetensors(path):
    """{name: tensor} of a safetensors file: a length, a JSON header, the tensors' bytes."""
    dtypes = {"F32": torch.float, "F16": torch.half, "BF16": torch.bfloat16, "I64": torch.long,
              "BOOL": torch.bool}
    content = memoryview(bytearray(Path(path).read_bytes()))
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8:start]))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensor = torch.frombuffer(content[start + begin:start + end], dtype=dtypes[entry["dtype"]])
        tensors[name] = tensor.reshape(entry["shape"])
    return tensors


class Module(dict):
    """Stands for a module of any class in a TorchScript archive: its state dict."""

    def __setstate__(self, attributes):
        for name, value in attributes.items():
            if isinstance(value, Module):
                self.update({f"{name}.{key}": tensor for key, tensor in value.items()})
            elif isinstance(value, torch.Tensor):
                self[name] = value


class TorchScriptReader(pickle.Unpickler):
    """Its load() gives the state dict of a TorchScript archive; nothing of that is executed."""

    known = {
        "torch.FloatStorage": torch.float, "torch.HalfStorage": torch.half,
        "torch.BFloat16Storage": torch.bfloat16, "torch.LongStorage": torch.long,
        "torch.BoolStorage": torch.bool,
        "torch._utils._rebuild_tensor_v2":
            lambda storage, offset, size, stride, *_: storage.as_strided(size, stride, offset),
        "collections.OrderedDict": dict,
    }

    def __init__(self, archive):
        file = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        super().__init__(archive.open(file))
        self.archive, self.folder = archive, file.removesuffix(".pkl")

    def find_class(self, module, name):
        """What the pickle gets for a class or function that it names."""
        if module.split(".")[0] == "__torch__":
            return Module
        if module == "torch.jit._pickle":  # marks lists and dicts, which hold no weights
            return lambda value, *_: value
        return self.known[f"{module}.{name}"]  # all that is part of weights

    def persistent_load(self, storage):
        _, dtype, name, *_ = storage
        return torch.frombuffer(bytearray(self.archive.read(f"{self.folder}/{name}")), dtype=dtype)


def read_state_dict(path):
    """A CLIP's state dict on the CPU, from a TorchScript archive, a safetensors file, a saved state
    dict or a checkpoint of open_clip's training; nothing in them is executed. Raises ClipError,
    which says what the file holds instead."""
    start = b""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        archive = zipfile.ZipFile(path) if start[:2] == b"PK" else None
        if archive and any(name.endswith("/constants.pkl") for name in archive.namelist()):
            content = TorchScriptReader(archive).load()  # saved weights have no constants
        elif start[8:] == b"{":
            content = read_safetensors(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
        content = content.get("state_dict", content)  # open_clip's, with module. where it was DDP
        state_dict = {key.removeprefix("module."): value for key, value in content.items()}
    except OSError as error:
        raise ClipError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # a broken file can make a reader raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0].partition(". ")[0]
        raise ClipError(f"{path} is damaged or holds other things than weights, it starts with "
                        f"{start} ({reason})") from None
    if "text_projection" not in state_dict:
        keys = ", ".join(state_dict)[:200] or "nothing"
        raise ClipError(f"{path} is no CLIP in OpenAI's format: no text_projection, but {keys}")
    return state_dict


def load(name, device="cpu", download_root=None):
    """-> (CLIP in eval mode and float32 on the device, preprocess).

    name: one of available_models(), "toy" (the same as "toy-ViT"), or a path to weights in a form
    that read_state_dict takes; build_model says which are wrong and load all the same.
    download_root: for weights, by default ~/.cache/clip. ClipError: no such CLIP or device, or
    weights that cannot be had or are not CLIP's."""
    name = "toy-ViT" if name == "toy" else os.fspath(name)
    path = TOY / f"{name}.pt" if name in ("toy-RN", "toy-ViT") else Path(name)
    if name in WEIGHTS:
        path = find_weights(name, cache_folder(download_root))
    if not os.path.isfile(path):
        raise ClipError(f"no CLIP called {name!r}: it is neither a file nor one of "
                        f"{', '.join(available_models())}")
    state_dict = read_state_dict(path)
    try:
        model = build_model(state_dict)
    except ClipError as error:
        raise ClipError(f"{path}: {error}") from None
    if model.vocab_size != VOCABULARY_SIZE:
        merges = path.with_name("merges.txt.gz")
        if not merges.is_file():
            raise ClipError(f"{path} has a vocabulary of its own ({model.vocab_size} entries), "
                            f"whose BPE merges were looked for in {merges}")
        model.tokenizer = Tokenizer(merges)
        if len(model.tokenizer) != model.vocab_size:
            raise ClipError(f"{merges} has {len(model.tokenizer)} entries, {path} needs those of "
                            f"{model.vocab_size}")
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # no such device, or not with this torch
        raise ClipError(f"--device {device}: {str(error).splitlines()[0]}") from None
    return model, preprocess_transform(model.visual.input_resolution)


def cache_folder(folder=None):
    """Where downloads are kept; asked for only when it is needed, as not everyone has a home."""
    folder = os.path.expanduser(folder or CACHE)
    if folder.startswith("~"):
        raise ClipError(f"there is no home folder for {folder}, where downloads go: set HOME")
    return Path(folder)


def find_weights(name, folder):
    """-> path of OpenAI's file, else of the hub's copy; nothing is fetched if either is there."""
    sha256, repository, parameters = WEIGHTS[name]
    file = name.replace("/", "-").replace("@", "-")

    def check(path):
        model = build_model(read_state_dict(path))
        count = sum(parameter.numel() for parameter in model.parameters())
        if count != parameters:
            raise ClipError(f"{path.name} has {count:,} parameters instead of {parameters:,}")

    sources = [(f"{WEIGHTS_URL}/{sha256}/{file}.pt", folder / f"{file}.pt", sha256),
               (f"{HUB_URL}/{repository}/resolve/main/open_clip_model.safetensors",
                folder / f"{file}.safetensors", None, check)]
    sources.sort(key=lambda source: not source[1].exists())
    problems = []
    for source in sources:
        try:
            return download(*source)
        except ClipError as error:
            problems.append(str(error))
    raise ClipError(f"{' Or: '.join(problems)} Or name a file: --clip FILE.")


def download(url, path, sha256=None, check=None):
    """Fetches the URL to the path, unless it is there with the right SHA-256 -> path.

    If that is not known, check(path) raises ClipError for a wrong file, and the SHA-256 of the
    first right one is kept beside it: no other is taken later. A file gets its name when it is
    complete. Raises ClipError, which says what to put where by hand."""
    record = path.with_name(path.name + ".sha256")
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")  # others may be at it too
    try:
        if sha256 is None and record.exists():
            sha256 = record.read_text().strip() or None  # of a full disk
        if path.exists():
            if sha256 is None:
                check(path)  # put there by hand
            if sha256 in (None, hashlib.sha256(path.read_bytes()).hexdigest()):
                return path
            print(f"{path} is corrupt, it is fetched again", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as source, open(temporary, "wb") as target:
            size = int(source.headers.get("Content-Length") or 0)
            with tqdm.wrapattr(source, "read", size, desc=path.name, disable=None) as reader:
                shutil.copyfileobj(reader, target)
        digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
        if sha256 not in (None, digest):
            hint = f"; if there is a new version, remove {record}" if record.exists() else ""
            raise OSError(f"what came is corrupt, its SHA-256 is {digest}{hint}")
        if check:
            check(temporary)
            record.write_text(f"{digest}\n")
        temporary.replace(path)
    except (OSError, http.client.HTTPException, ClipError) as error:
        raise ClipError(f"cannot fetch {path.name}: {error}. Download {url} (SHA-256 "
                        f"{sha256 or 'unknown'}) elsewhere and put it at {path}.") from None
    finally:
        if os.path.exists(temporary):
            temporary.unlink()
    print(f"fetched {path} from {url}", file=sys.stderr)
    return path
