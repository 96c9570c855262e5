"""encode_image and MKT's stage-1 step on a CUDA GPU; says so where there is none.

    python bench/gpu.py
    python bench/gpu.py --quick --device cpu    # does it run?

encode_image in bf16: what it achieves of the rate of a large bf16 matrix product that is measured
beside it; its operations are counted as they are executed. The step is that of mkt_steps.py.
"""
import mkt_steps
import side_by_side
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def bench_encode_image(args):
    batch, side, sizes = 256, 8192, {}
    if args.quick:
        batch, side, sizes = 2, 64, dict(layers=2, width=128)
    model = side_by_side.random_clip(text_width=64, text_layers=1, **sizes)
    model = model.to(args.device, torch.bfloat16)
    images = torch.randn(batch, 3, 224, 224, device=args.device, dtype=torch.bfloat16)
    a, b = (torch.randn(side, side, device=args.device, dtype=torch.bfloat16) for _ in range(2))
    forms = {"": model.encode_image, ", compiled": torch.compile(model.encode_image)}
    if args.quick:
        del forms[", compiled"]
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model.encode_image(images[:1])
        for name, encode_image in forms.items():
            encode_image(images)
            seconds = side_by_side.alternate({
                "product": lambda: a @ b, "encode": lambda: encode_image(images)}, args.repeats,
                args.device)
            rate = 2 * side ** 3 / seconds["product"] / 1e12
            ours = counter.get_total_flops() * batch / seconds["encode"] / 1e12
            side_by_side.row(f"encode_image, ViT-B/16, bf16, batch {batch}{name}: "
                             f"{batch / seconds['encode']:,.0f} images a second",
                             "bf16 matrix product", f"{rate:.3g} TFLOP/s", f"{ours:.3g} TFLOP/s",
                             ours / rate, ">= 0.5")


def main():
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        return print("no GPU")
    args.batch_size, args.seen, args.repeats = 64, 925, 20
    if args.quick:
        args.batch_size, args.seen, args.repeats = 2, 60, 1
    torch.manual_seed(0)
    side_by_side.start(torch.cuda.get_device_name() if args.device == "cuda" else args.device)
    bench_encode_image(args)
    mkt_steps.bench_stage_1(args)


if __name__ == "__main__":
    main()
