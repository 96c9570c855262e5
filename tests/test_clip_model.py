"""clip_model.py against open_clip, transformers and plain references; nothing is downloaded."""
import gzip
import hashlib
import os
import pickle
import random
import re
import threading
import warnings
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip_model
from clip_model import ClipError

MERGES = ["d o", "do g</w>", "c a", "ca t</w>"]
VOCABULARY = 512 + len(MERGES) + 2  # bytes, merges, start and end of text: the small models'


def small_clip(resolution, layers, width, patch_size):
    """A small CLIP none of whose parameters and statistics is trivially zero or one."""
    torch.manual_seed(0)
    model = clip_model.CLIP(32, resolution, layers, width, patch_size, 77, VOCABULARY, 128, 2, 3)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif value.is_floating_point():
                value += torch.randn_like(value) * (0.05 if value.dim() > 2 else 0.2)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vit():
    return small_clip(32, 3, 128, 8)


@pytest.fixture(scope="module")
def resnet():
    return small_clip(96, (1, 2, 1, 1), 16, None)


@pytest.fixture(params=["vit", "resnet"])
def model(request):
    return request.getfixturevalue(request.param)


def random_images(model, size=None):
    torch.manual_seed(1)
    height, width = size or (model.visual.input_resolution,) * 2
    return torch.randn(3, 3, height, width)


def random_tokens(longest=77):
    """Token ids int64 [9, 77] with ends of text from 2 to `longest` tokens, zeros after."""
    torch.manual_seed(2)
    tokens = torch.randint(1, VOCABULARY - 2, (9, 77))
    tokens[:, 0] = VOCABULARY - 2
    for row, length in zip(tokens, torch.linspace(2, longest, 9).long()):
        row[length - 1] = VOCABULARY - 1
        row[length:] = 0
    return tokens


def assert_equal(ours, expected, tolerance=1e-4):
    assert ours.shape == expected.shape
    assert expected.std() > 0.1  # outputs near zero would be equal to anything
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=0)


# ---- other implementations

def test_towers_equal_open_clip(model):
    pytest.importorskip("open_clip")
    from libraries import as_open_clip
    theirs = as_open_clip(model)
    images = random_images(model)
    with torch.no_grad():
        assert_equal(model.encode_image(images), theirs.encode_image(images))
        for longest in (12, 77):
            tokens = random_tokens(longest=longest)
            assert_equal(model.encode_text(tokens), theirs.encode_text(tokens))


def test_towers_equal_transformers(vit):
    pytest.importorskip("transformers")
    from libraries import as_transformers
    theirs = as_transformers(vit)
    tokens = random_tokens()
    with torch.no_grad():
        for size in ((40, 64), (24, 16)):  # other than 32: interpolation
            images = random_images(vit, size=size)
            expected = theirs.vision_model(images, interpolate_pos_encoding=True).last_hidden_state
            expected = theirs.visual_projection(theirs.vision_model.post_layernorm(expected))
            assert_equal(vit.encode_image(images), expected[:, 0])
            global_, local = vit.encode_image_dense(images)
            assert_equal(global_, expected[:, 0])
            assert_equal(local, expected[:, 1:])
        images = random_images(vit)
        expected = theirs(pixel_values=images, input_ids=tokens)
        logits_per_image, logits_per_text = vit(images, tokens)
    assert_equal(logits_per_image, expected.logits_per_image, 1e-3)  # logits are near 10
    assert_equal(logits_per_text, expected.logits_per_text, 1e-3)


# name: embedding, resolution, vision layers, width, patch, text width
PUBLISHED = {
    "RN50": (1024, 224, (3, 4, 6, 3), 64, None, 512),
    "RN101": (512, 224, (3, 4, 23, 3), 64, None, 512),
    "RN50x4": (640, 288, (4, 6, 10, 6), 80, None, 640),
    "RN50x16": (768, 384, (6, 8, 18, 8), 96, None, 768),
    "RN50x64": (1024, 448, (3, 15, 36, 10), 128, None, 1024),
    "ViT-B/32": (512, 224, 12, 768, 32, 512),
    "ViT-B/16": (512, 224, 12, 768, 16, 512),
    "ViT-L/14": (768, 224, 24, 1024, 14, 768),
    "ViT-L/14@336px": (768, 336, 24, 1024, 14, 768),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_architectures_are_inferred(name):
    *sizes, text_width = PUBLISHED[name]
    with torch.device("meta"):  # shapes without memory
        model = clip_model.CLIP(*sizes, 77, 49408, text_width, text_width // 64, 12)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert clip_model.WEIGHTS[name][2] == count
    inferred = clip_model.build_model(model.state_dict())
    found, expected = ({key: value.shape for key, value in each.state_dict().items()}
                       for each in (inferred, model))
    assert found == expected and inferred.visual.input_resolution == sizes[1]
    heads = [module.heads for module in inferred.modules() if hasattr(module, "heads")]
    assert set(heads) == {text_width // 64, sizes[3] // (64 if name.startswith("ViT") else 2)}


# open_clip's: heads of 64 as OpenAI's, or a layer too few or too many
@pytest.mark.parametrize("name, differs", [
    ("ViT-B-16-plus-240", None), ("ViT-L-14-CLIPA", "ln_pre"), ("ViT-M-16-alt", "ls_1")])
def test_other_architectures_load_with_the_right_heads_or_are_refused(name, differs):
    open_clip = pytest.importorskip("open_clip")
    with torch.device("meta"):
        theirs = open_clip.model.CLIP(**open_clip.get_model_config(name))
    if differs:
        with pytest.raises(ClipError, match=differs):
            clip_model.build_model(theirs.state_dict())
        return
    ours = clip_model.build_model(theirs.state_dict())
    for tower, expected in ((ours, theirs), (ours.visual, theirs.visual)):
        heads = expected.transformer.resblocks[0].attn.num_heads
        assert tower.transformer.resblocks[0].attn.heads == heads


@pytest.mark.parametrize("width", [96, 1280])  # 1280: ViT-H, with heads of 80
def test_widths_without_heads_of_64_are_refused(width):
    with torch.device("meta"):
        model = clip_model.CLIP(32, 32, 1, 64, 8, 77, 100, width, 1, 1)
    with pytest.raises(ClipError, match=f"{width}.*heads"):
        clip_model.build_model(model.state_dict())


# ---- labels

def test_zero_shot_embeddings():
    model = clip_model.load("toy-RN")[0]
    phrases = ["a dog", "an ear", "a unicorn", "an hour", "an MRI scanner", "a US passport",
               "an X-ray", "a one-way street", "a European", "an umbrella", "a T-shirt", "a -",
               "a HORSE", "an UMBRELLA", "a UFO", "a usb stick", "an unidentified object"]
    labels = [phrase.split(" ", 1)[1] for phrase in phrases]
    embeddings = clip_model.zero_shot_embeddings(model, labels * 30)  # more than a batch
    expected = [model.encode_text(model.tokenize(f"a photo of {phrase}.")) for phrase in phrases]
    expected = F.normalize(torch.cat(expected), dim=-1)
    torch.testing.assert_close(embeddings, expected.repeat(30, 1), atol=1e-5, rtol=0)
    assert not embeddings.requires_grad


def test_labels_must_differ_for_clip():
    model = clip_model.load("toy")[0]
    model.check_labels(["dog", "dogs", "-", "+", "\U0001f600", "\U0001f436", "\u732b"])
    for first, second in [("Dog", "dog"), ("hot dog", "hot  dog"), ("caf\u00e9", "cafe\u0301")]:
        with pytest.raises(ClipError, match=f"{first}.*{second}"):
            model.check_labels([first, "cat", second])
    for empty in ("", " \n"):
        with pytest.raises(ClipError, match="is empty"):
            model.check_labels(["dog", empty])


# ---- tokenizer

STRINGS = [
    "", "\t\n  \r\n", "A photo of a dog.", "There is a traffic light in the scene",
    "it's they're I've I'm we'll he'd don't IT'S", "2014 3,677,856 1/2 0.5 a1b2c3",
    "caf\u00e9 na\u00efve \u00dcber stra\u00dfe \u0130stanbul cafe\u0301", "\u732b\u3068\u72ac",
    "\u0642\u0637\u0629 \u0e41\u0e21\u0e27", "\U0001f468\u200d\U0001f469\u200d\U0001f467 family",
    "&amp; &lt;b&gt; &amp;lt; &eacute; &#39; &nbsp;x &amp;amp;amp;",
    "a < b &amp;lt; c &amp;eacute;",  # ftfy leaves entities alone where it sees a "<"
    "\u2018quoted\u2019 \u2014 dash\u2026 sch\u00c3\u00b6n \u00e2\u20ac\u2122",  # mojibake
    "\ufb01nd \uff26\uff35\uff2c\uff2c \u00a0no\u00a0break\u3000wide \u200bzero\u200bwidth",
    "#hash @at $5 100% a_b-c+d=e^f~g`h|i\\j ...!!!???", "</w> a</w>", "x" * 60, "the " * 100,
    "hello <|endoftext|> world", "<|StartOfText|> ! <|endoftext|><|endoftext|>", "<|endoftext",
    "\u00bd \u00b2 \u2460 \u0663 \u1e9e \u03a3\u0391\u03a3", "\ud55c\uad6d\uc5b4",
]


def random_strings(count):
    rng = random.Random(0)
    parts = [*"abcdeABC019 \n'.,!?-_/&;#<>|()\u00e9\u00fc\u00df\u0130\u732b\u2764\ufe0f\u0416",
             "dog", "Traffic", " light", "it's", " we'll ", "&amp;", "&eacute;", "42nd"]
    return ["".join(rng.choices(parts, k=rng.randint(1, 30))) for _ in range(count)]


def test_tokens_equal_open_clip(tmp_path, monkeypatch):
    """OpenAI's tokenizer as users get it, but that it is downloaded from open_clip's folder."""
    open_clip = pytest.importorskip("open_clip")
    file = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    monkeypatch.setattr(clip_model, "VOCABULARY_URL", file.as_uri())
    monkeypatch.setattr(clip_model, "CACHE", str(tmp_path))
    official, theirs = clip_model.official_tokenizer(), open_clip.tokenizer.SimpleTokenizer()
    texts = STRINGS + random_strings(300)
    for text in texts:
        # open_clip spells the two special tokens in another way
        spelled = text.replace("<|endoftext|>", "<end_of_text>")
        spelled = re.sub(r"<\|startoftext\|>", "<start_of_text>", spelled, flags=re.IGNORECASE)
        tokens = official.encode(text)
        assert tokens == theirs.encode(spelled), repr(text)
        if "<|" not in text:
            assert official.decode(tokens) == theirs.decode(tokens)
            assert official.decode(tokens[1:-1]) == theirs.decode(tokens[1:-1])  # half characters
    plain = [text for text in texts if "<|" not in text]
    assert torch.equal(clip_model.tokenize(plain, truncate=True), theirs(plain))
    tokens = clip_model.tokenize("a diagram")  # of OpenAI's README
    assert tokens.dtype == torch.int64 and tokens.shape == (1, 77)
    assert tokens[0, :5].tolist() == [49406, 320, 22697, 49407, 0]
    model = clip_model.CLIP(8, 32, 1, 64, 8, 20, 49408, 64, 1, 1)  # no vocabulary of its own
    assert torch.equal(model.tokenize("a diagram"), tokens[:, :20])


@pytest.fixture
def merges_path(tmp_path):
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(gzip.compress("\n".join(["#version: test", *MERGES, ""]).encode()))
    return path


def test_tokenize(merges_path):
    tokenizer = clip_model.Tokenizer(merges_path)
    assert len(tokenizer) == VOCABULARY
    assert tokenizer.encode("dog") == [512 + 1]  # the second merge
    assert tokenizer.encode("CAT doc") == [512 + 3, 512, 256 + 66]  # do c</w>: bytes start with !
    assert tokenizer.tokenize("dog cat").tolist() == [[516, 513, 515, 517] + [0] * 73]
    assert tokenizer.tokenize("cat " * 75)[0, -1] == 517
    too_long = "cat " * 75 + "dog"
    with pytest.raises(RuntimeError, match=r"78 tokens.*77.*cat dog'"):
        tokenizer.tokenize(["cat", too_long])
    cut = tokenizer.tokenize(["cat", too_long], truncate=True)
    assert cut.tolist() == [[516, 515, 517] + [0] * 74, [516, *[515] * 75, 517]]
    assert tokenizer.tokenize("cat dog", 3, True).tolist() == [[516, 515, 517]]


# ---- towers, against themselves

@pytest.mark.parametrize("longest", [12, 77])
def test_what_follows_the_end_of_a_text_changes_nothing(vit, longest):
    tokens = random_tokens(longest=longest)
    expected = vit.encode_text(tokens)  # equal to open_clip's
    assert_equal(vit.encode_text(tokens[:, :longest]), expected)
    tokens[0, 2:] = 7
    assert_equal(vit.encode_text(tokens), expected)
    eot = (tokens == VOCABULARY - 1).int().argmax(dim=1)
    assert_equal(vit.encode_prompts(vit.token_embedding(tokens), eot), expected)


def test_many_texts_equal_a_loop_over_texts(vit):
    tokens = torch.cat([random_tokens(longest=longest) for longest in (12, 77, 30) * 10])
    assert len(tokens) > 256
    expected = torch.cat([vit.encode_text(text[None]) for text in tokens])
    assert_equal(vit.encode_text(tokens), expected)


def test_resnet_dense_equals_a_loop_over_locations(resnet):
    images = random_images(resnet, size=(64, 96))
    pool = resnet.visual.attnpool
    features = resnet.visual.features(images)
    assert features.shape == (3, 512, 2, 3)
    global_, local = resnet.encode_image_dense(images)
    assert_equal(global_, resnet.encode_image(images))
    assert local.shape == (3, 6, 32)
    for i in range(6):
        location = features[:, :, i // 3, i % 3]
        assert_equal(local[:, i], pool.c_proj(pool.v_proj(location)))
    without, same = resnet.encode_image_dense(images, global_position=False)
    assert (without - global_).abs().max() > 1e-2 and torch.equal(same, local)
    other = clip_model.build_model(resnet.state_dict())
    features = other.visual.features(images)
    assert features.is_contiguous(memory_format=torch.channels_last)  # faster
    other.visual.attnpool.positional_embedding.data.zero_()
    assert_equal(without, other.encode_image(images))


# ---- preprocessing and weights

@pytest.mark.parametrize("size, mode", [((37, 101), "RGB"), ((101, 37), "L"), ((64, 64), "RGBA"),
                                        ((200, 3), "CMYK")])
def test_preprocessing_equals_arithmetic(size, mode):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(image).convert(mode)
    # pickled as on the way to data loaders' processes
    ours = pickle.loads(pickle.dumps(clip_model.preprocess_transform(32)))(image)
    assert ours.shape == (3, 32, 32) and ours.dtype == torch.float32
    width, height = size
    width, height = (32, 32 * height // width) if width < height else (32 * width // height, 32)
    resized = image.resize((width, height), Image.Resampling.BICUBIC).convert("RGB")
    left, top = round((width - 32) / 2), round((height - 32) / 2)
    pixels = np.asarray(resized)[top:top + 32, left:left + 32] / 255
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    expected = torch.tensor((pixels - mean) / std).permute(2, 0, 1)
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("key", ["text_projection", "ln_final.bias", "visual.conv1.weight"])
def test_wrong_keys_are_refused(model, key):
    state_dict = model.state_dict()
    value = state_dict.pop(key)
    for wrong in ({}, {key: value, key + "_2": value}, {key: torch.zeros(*value.shape, 2)}):
        with pytest.raises(ClipError, match=re.escape(key)) as error:
            clip_model.build_model(state_dict | wrong)
        assert "\n" not in str(error.value)


def half_state_dict(model):
    """As OpenAI saves them: float16, and three integers beside the weights."""
    state_dict = {key: value.half() if value.is_floating_point() else value
                  for key, value in model.state_dict().items()}
    integers = dict(input_resolution=model.visual.input_resolution, context_length=77,
                    vocab_size=VOCABULARY)
    return state_dict | {key: torch.tensor(value) for key, value in integers.items()}


def test_load_reads_archives_and_state_dicts(model, merges_path):
    state_dict, folder = half_state_dict(model), merges_path.parent
    expected = clip_model.build_model(state_dict)
    images, tokens = random_images(model), random_tokens()
    torch.save({**state_dict, "attn_mask": torch.zeros(77, 77)}, folder / "saved.pt")
    training = {"module." + key: value for key, value in state_dict.items()}
    optimizer = torch.optim.AdamW(expected.parameters()).state_dict()
    torch.save({"epoch": 3, "name": "run", "state_dict": training, "optimizer": optimizer},
               folder / "training.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        archive = torch.jit.trace(expected, (images, tokens), check_trace=False)
        archive.save(str(folder / "archive.pt"))
    for path in (folder / "archive.pt", folder / "training.pt", str(folder / "saved.pt")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # which is not the user's concern
            loaded, preprocess = clip_model.load(path)
        assert not loaded.training and loaded.dtype == torch.float32
        assert torch.equal(loaded.encode_image(images), expected.encode_image(images))
        assert torch.equal(loaded.encode_text(tokens), expected.encode_text(tokens))
        size = model.visual.input_resolution
        assert preprocess(Image.new("RGB", (120, 150))).shape == (3, size, size)
        assert loaded.tokenize("dog")[0, 1] == 512 + 1  # the second merge
    with gzip.open(merges_path, "at") as file:  # another CLIP's
        file.write("\no w")
    with pytest.raises(ClipError, match=f"merges.txt.gz has {VOCABULARY + 1} entries"):
        clip_model.load(path)
    merges_path.unlink()
    with pytest.raises(ClipError, match=f"{VOCABULARY} entries.*merges.txt.gz"):
        clip_model.load(path)


class Scripted(torch.nn.Module):
    """What TorchScript may hold: all kinds of weights, views, shared weights, odd names, others."""

    def __init__(self):
        super().__init__()
        table = torch.randn(7, 5)
        self.text_projection = torch.nn.Parameter(table.T[1:4, ::2])
        self.same = torch.nn.Parameter(table.half())
        self.register_buffer("brain", table.bfloat16())
        self.register_buffer("resolution", torch.tensor(224))
        self.register_buffer("mask", torch.eye(3) > 0)
        self.conv, self.sizes = torch.nn.Conv2d(1, 2, 3), {"a": [1, 2]}  # of typed lists and dicts
        self.inner = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3))
        self.inner.add_module("-1", self.inner[1])
        self.size, self.name, self.nothing = (3, 4.5), "a", None

    def forward(self, x):
        return self.inner(x) + self.resolution


@pytest.mark.parametrize("kind", ["script", "trace", "safetensors"])
def test_state_dicts_equal_those_of_the_libraries(kind, tmp_path):
    path, model = tmp_path / "weights", Scripted()
    if kind == "safetensors":
        library = pytest.importorskip("safetensors.torch")
        library.save_file({name: x.contiguous().clone() for name, x in model.state_dict().items()},
                          path, metadata={"format": "pt"})
        expected = library.load_file(path)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated
            compiled = (torch.jit.script(model) if kind == "script" else
                        torch.jit.trace(model, torch.ones(2, 3)))
            compiled.save(str(path))
            expected = torch.jit.load(path).state_dict()
    state_dict = clip_model.read_state_dict(path)
    assert set(state_dict) == set(expected) and len(expected) == 16
    for key, value in expected.items():
        assert state_dict[key].dtype == value.dtype and torch.equal(state_dict[key], value), key


def test_fingerprints():
    toy = clip_model.load("toy")[0]
    content = b"".join(value.numpy().tobytes() for value in toy.state_dict().values())
    assert toy.fingerprint() == hashlib.sha256(content).hexdigest()[:8]
    assert clip_model.load("toy-RN")[0].fingerprint() != toy.fingerprint()
    assert clip_model.available_models() == ["toy-RN", "toy-ViT", *PUBLISHED]


class Trap:
    def __reduce__(self):
        return open, ("trap", "w")  # runs while it is unpickled


def test_other_files_are_no_weights_and_nothing_in_them_is_executed(vit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("weights.pt")
    torch.save(half_state_dict(vit), path)
    truncated = path.read_bytes()[:-1000]
    torch.save({"text_projection": Trap()}, path)
    saved = path.read_bytes()
    trap = pickle.dumps({"text_projection": Trap()}, protocol=2)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", trap)
        archive.writestr("archive/constants.pkl", pickle.dumps(()))  # so it is TorchScript
    for content, found in [
            (path.read_bytes(), r"PK.*KeyError.*\.open"), (saved, "PK"), (trap, r"x80"),
            (b"", "b''"),
            (b"<html>404</html>\n", "<html>"), (b"PK\x03\x04", "PK"), (truncated, "PK"),
            ((1000).to_bytes(8, "little") + b'{"text_proj', r'\{'),
            (pickle.dumps([1, 2, 3], protocol=2), "x80")]:
        path.write_bytes(content)
        with pytest.raises(ClipError, match=f"weights.pt is damaged.*{found}") as error:
            clip_model.load(path)
        assert "\n" not in str(error.value)
    assert not Path("trap").exists()
    pickle.loads(trap)["text_projection"].close()
    assert Path("trap").exists()  # the trap works
    for content, found in [({"model": half_state_dict(vit), "epoch": 1}, "but model, epoch"),
                           ({"text_projection": 3}, "'int'"), ({}, "weights.pt.* but nothing")]:
        torch.save(content, path)
        with pytest.raises(ClipError, match=found):
            clip_model.load(path)


def test_download(tmp_path, monkeypatch, capsys):
    content = bytes(range(256)) * 500
    digest = hashlib.sha256(content).hexdigest()
    source, path = tmp_path / "good.pt", tmp_path / "new" / "folder" / "good.pt"
    source.write_bytes(content)
    assert clip_model.download(source.as_uri(), path, digest) == path
    assert path.read_bytes() == content
    path.write_bytes(content[:-1])
    clip_model.download(source.as_uri(), path, digest)
    assert path.read_bytes() == content and "good.pt is corrupt" in capsys.readouterr().err
    source.unlink()
    clip_model.download(source.as_uri(), path, digest)  # it is there: nothing is fetched
    monkeypatch.setenv("no_proxy", "*")
    source.write_bytes(content[:-1])
    for url in (source.as_uri(), "http://127.0.0.1:1/no-network.pt"):
        with pytest.raises(ClipError) as error:
            clip_model.download(url, path.with_name("other.pt"), digest)
        for part in (url, digest, str(path.with_name("other.pt"))):
            assert part in str(error.value)
    assert os.listdir(path.parent) == ["good.pt"]  # the bad ones leave nothing
    monkeypatch.setattr(clip_model, "CACHE", "~nobody-of-this-name/clip")
    with pytest.raises(ClipError, match="home"):
        clip_model.load("RN50")


@pytest.fixture
def server(monkeypatch):
    """OpenAI's address and the hub: .files {path: content}, .requests; .cut bytes are lost."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(self.path)
            if self.path not in server.files:
                return self.send_error(404)
            content = server.files[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:len(content) - server.cut])

        log_message = print  # not to stderr, where messages are looked for

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.requests, server.cut = {}, [], 0
        server.url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(clip_model, "WEIGHTS_URL", server.url + "/models")
        monkeypatch.setattr(clip_model, "HUB_URL", server.url)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def test_weights_come_from_openai_or_the_hub(server, vit, resnet, tmp_path, monkeypatch, capsys):
    library = pytest.importorskip("safetensors.torch")
    table = {"token_embedding.weight": torch.zeros(49408, 128)}
    wrong, state_dict = resnet.state_dict() | table, vit.state_dict() | table
    torch.save(state_dict, tmp_path / "weights")
    content = (tmp_path / "weights").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    size = sum(value.numel() for value in state_dict.values())  # a ViT has no other tensors
    monkeypatch.setitem(clip_model.WEIGHTS, "ViT-B/32", (digest, "somebody/copy", size))
    openai = f"/models/{digest}/ViT-B-32.pt"
    hub = "/somebody/copy/resolve/main/open_clip_model.safetensors"
    cache = tmp_path / "cache"

    def refused(*reasons):
        with pytest.raises(ClipError) as error:
            clip_model.load("ViT-B/32", download_root=cache)
        for part in (*reasons, server.url + openai, server.url + hub,
                     str(cache / "ViT-B-32.pt"), str(cache / "ViT-B-32.safetensors")):
            assert part in str(error.value)
        assert "\n" not in str(error.value)

    def load():
        server.requests.clear()
        model = clip_model.load("ViT-B/32", download_root=cache)[0]
        assert_equal(model.encode_image(random_images(vit)), vit.encode_image(random_images(vit)))
        return server.requests

    refused("404", "--clip FILE")  # by both
    copy = library.save(state_dict)
    by_hand = cache / "ViT-B-32.safetensors"
    by_hand.write_bytes(library.save(wrong))
    refused("404", f"{by_hand.name} has ", f"instead of {size:,}")
    by_hand.write_bytes(copy)
    assert load() == []
    by_hand.unlink()
    by_hand.with_name(f"{by_hand.name}.sha256").write_text("")  # cut by a full disk
    for server.files[hub], server.cut, reason in [
            (copy, 9, "is damaged"), (b"<html>", 0, "<html>"),
            (library.save(wrong), 0, f"instead of {size:,}")]:
        refused("404", reason)
        assert os.listdir(cache) == ["ViT-B-32.safetensors.sha256"]
    server.files[hub] = copy
    assert load() == [openai, hub] and server.url + hub in capsys.readouterr().err
    assert sorted(os.listdir(cache)) == ["ViT-B-32.safetensors", "ViT-B-32.safetensors.sha256"]
    server.files = {openai: content}
    assert load() == [] and capsys.readouterr().err == ""  # no network is needed

    # another file in the place of the first, here or at the hub, is not taken
    (cache / "ViT-B-32.safetensors").write_bytes(library.save(state_dict | wrong))
    server.files = {hub: library.save({key: value + 1 for key, value in state_dict.items()})}
    refused("what came is corrupt", f"remove {cache}/ViT-B-32.safetensors.sha256", "404")
    server.files[openai] = content
    assert load() == [hub, openai] and "is corrupt" in capsys.readouterr().err
    server.files = {}
    assert load() == []
