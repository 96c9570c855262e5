"""Training steps and encode_image on a CUDA GPU: images a second, memory, waits, bf16, compiled.

    python bench/gpu.py                          # some minutes; says so where there is no GPU
    python bench/gpu.py --device cpu --quick     # tiny sizes: does it run?

Random data and weights, the papers' models and batch sizes, everything on the device already.
encode_image: what it achieves of the rate of a large bf16 matrix product, measured beside it; its
operations are counted where they are executed. Steps: forward, backward and optimizer, in bf16,
with the script's --compile and without. Waits: host-device synchronisations in one step, as
torch.cuda.set_sync_debug_mode counts them.
"""
import contextlib
import warnings
from argparse import Namespace

import side_by_side
import torch
from side_by_side import row
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import lang_cls
import mkt
import trm_ml


def bf16(args):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16)


def random_targets(images, labels, device):
    return torch.where(torch.rand(images, labels) < 0.05, 1, -1).to(device, torch.int8)


def names(count):
    return [f"{a} {b}" for a in data.TOY_LABELS for b in data.TOY_LABELS][:count]


def training_step(parameters, loss, args):
    """-> function: forward, backward, optimizer; what the scripts' loops do with a batch."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step():
        with bf16(args):
            value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return value.detach()
    return step


# Each of these gives (step, images of a step); compiled: with the script's --compile.

def mkt_step(stage, args, compiled):
    batch, count, sizes = 64, 925, {}
    if args.quick:
        batch, count, sizes = 2, 12, dict(layers=3, width=128, text_width=128, text_layers=2)
    model = mkt.MKT(side_by_side.random_clip(**sizes).to(args.device)).eval()
    images = torch.randn(batch, 3, 224, 224, device=args.device)
    targets, embeddings = random_targets(batch, count, "cpu"), mkt.Prompts(
        model.clip, names(count))
    trained = [p for name, p in model.named_parameters()
               if not name.startswith("clip.") and (name == "context") == (stage == 2)]
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_()
    if stage == 1:
        with torch.no_grad(), bf16(args):
            embeddings = model.label_embeddings(embeddings)
    if compiled:
        model.student = torch.compile(model.student)
    options = Namespace(distillation=1.0)
    return training_step(trained, lambda: mkt.batch_loss(
        model, stage, images, targets, embeddings, options)[0], args), batch


def trm_step(args, compiled):
    batch, count, size, layers, sizes = 32, 80, 448, (3, 4, 23, 3), {}
    if args.quick:
        batch, count, size, layers = 2, 6, 64, (1, 1, 1, 1)
        sizes = dict(text_width=128, text_layers=2)
    clip = side_by_side.random_clip(512, layers, 64, None, **sizes).to(args.device)
    model = trm_ml.TRM(clip, names(count))
    images = torch.randn(batch, 3, size, size, device=args.device)
    known = data.keep_partial(random_targets(batch, count, "cpu"), 0.3, 0).to(args.device)
    options = Namespace(pseudo=0.1, contrastive=0.2, distillation=0.01, precision="bf16",
                        device=args.device)
    if compiled:
        model.regions = torch.compile(model.regions)
    trained = [p for p in model.parameters() if p.requires_grad]
    return training_step(trained, lambda: trm_ml.batch_loss(
        model, trm_ml.encode(clip, images, options), known, options)[0], args), batch


def comc_step(args, compiled):
    batch, count, size = (16, 10, 32) if args.quick else (512, 80, 1024)
    embeddings = F.normalize(torch.randn(batch, size, device=args.device), dim=-1)
    model = lang_cls.CoMC(torch.randn(count, size, device=args.device), embeddings[:1])
    targets = random_targets(batch, count, args.device)

    def loss():
        noisy = embeddings + 0.1 * torch.randn_like(embeddings)
        with torch.autocast(torch.device(args.device).type, enabled=False):  # as its train does
            return lang_cls.ranking_loss(model(noisy), targets)
    return training_step([model.weight], loss, args), batch


def waits(step, device):
    """Host-device synchronisations in a step; CUDA alone."""
    if not device.startswith("cuda"):
        return "not measured"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return str(sum("synchroniz" in str(warning.message) for warning in caught))


def bench_step(work, make, args, compiles=True):
    """Rows of a training step: speed, peak memory, waits; with and without --compile."""
    rates, peaks, counts = [], [], []
    for compiled in (False, True) if compiles and args.compile else (False,):
        step, batch = make(args, compiled)
        for _ in range(1 if args.quick else 3):  # also compiles
            assert step().isfinite()
        seconds = side_by_side.alternate({"": step}, args.repeats, args.device)[""]
        rates.append(batch / seconds)
        peaks.append(side_by_side.peak_beyond(step, args.device))
        counts.append(waits(step, args.device))
        del step
    for title, values, unit in ((work, [f"{rate:,.0f} a second" for rate in rates], ""),
                                (f"{work}, peak memory beyond weights and data",
                                 list(map(side_by_side.memory, peaks)), ""),
                                (f"{work}, waits for the device", counts, "")):
        if len(values) == 1:
            row(title, "", "", values[0])
        else:
            ratio = rates[1] / rates[0] if title == work else ""
            row(title, "without --compile", *values, ratio)


def matmul_rate(args):
    """Floating-point operations a second of a large bf16 matrix product."""
    size = 64 if args.quick else 8192
    a, b = (torch.randn(size, size, device=args.device, dtype=torch.bfloat16) for _ in range(2))
    repeats = 1 if args.quick else 10  # calls between two looks at the clock

    def products():
        for _ in range(repeats):
            a @ b

    seconds = side_by_side.alternate({"": products}, args.repeats, args.device)[""]
    return 2 * size ** 3 * repeats / seconds


def bench_encode_image(args):
    """Rows of encode_image in bf16: images a second, and its share of the matrix product's."""
    batch, sizes = (2, dict(layers=2, width=128, text_width=64, text_layers=1)) if args.quick else (
        256, dict(text_width=64, text_layers=1))
    model = side_by_side.random_clip(**sizes).to(args.device)
    images = torch.randn(batch, 3, 224, 224, device=args.device)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter, sdpa_kernel(
            SDPBackend.MATH):  # the form of attention that the counter knows on every device
        model.encode_image(images[:1])
    rate = matmul_rate(args)
    half = side_by_side.random_clip(**sizes).to(args.device, torch.bfloat16)
    for form, encoder, inputs, context in (
            ("float32 weights under autocast", model, images, bf16(args)),
            ("bf16 weights", half, images.bfloat16(), contextlib.nullcontext())):
        forms = {form: encoder.encode_image}
        if args.compile:
            forms[f"{form}, compiled"] = torch.compile(encoder.encode_image)
        for name, function in forms.items():
            with torch.inference_mode(), context:
                seconds = side_by_side.alternate({"": lambda: function(inputs)}, args.repeats,
                                                 args.device)[""]
            achieved = counter.get_total_flops() * batch / seconds
            row(f"encode_image, ViT-B/16, batch {batch}, {name}: {batch / seconds:,.0f} a second",
                "bf16 matrix product", f"{rate / 1e12:.3g} TFLOP/s",
                f"{achieved / 1e12:.3g} TFLOP/s", achieved / rate, ">= 0.50")


def main():
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--compile", action="store_true", default=None,
                        help="also with torch.compile; on a GPU always, but with --quick")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("There is no CUDA device: nothing is measured.")
        return
    if args.compile is None:
        args.compile = args.device.startswith("cuda") and not args.quick
    if args.quick:
        args.repeats = 1
    torch.manual_seed(0)
    is_gpu = args.device.startswith("cuda")
    side_by_side.start(torch.cuda.get_device_name(args.device) if is_gpu else args.device)
    bench_encode_image(args)
    bench_step("MKT stage 1 step, ViT-B/16, 925 labels, batch 64",
               lambda *given: mkt_step(1, *given), args)
    bench_step("MKT stage 2 step, ViT-B/16, 925 labels, batch 64",
               lambda *given: mkt_step(2, *given), args)
    bench_step("TRM-ML step with encoding, RN101 at 448, 80 labels, batch 32", trm_step, args)
    bench_step("CoMC step, 80 labels, batch 512 sentences", comc_step, args, compiles=False)


if __name__ == "__main__":
    main()
