"""encode_image and MKT's stage-1 step on a CUDA GPU; says so where there is none.

    python bench/gpu.py
    python bench/gpu.py --quick    # does it run? On the CPU, if there is no GPU

encode_image in bf16, beside what its operations would take at the rate of a large bf16 matrix
product; they are counted as they are executed. The step is that of training.py.
"""
import sys

import side_by_side
import torch
import training
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def encode_image(args):
    batch, side = (2, 64) if args.quick else (256, 8192)
    model = side_by_side.random_clip(args.quick, text_layers=1).to(args.device, torch.bfloat16)
    images = torch.randn(batch, 3, 224, 224, device=args.device, dtype=torch.bfloat16)
    a, b = torch.randn(2, side, side, device=args.device, dtype=torch.bfloat16)
    encode = torch.compile(model.encode_image, backend="eager" if args.quick else "inductor")
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model.encode_image(images[:1])
        encode(images)
        product, encoding = side_by_side.alternate(
            [lambda: a @ b, lambda: encode(images)], args.repeats, args.device)
    operations = counter.get_total_flops() * batch
    work = f"encode_image, ViT-B/16, bf16, compiled, batch {batch}"
    side_by_side.row(f"{work}: {batch / encoding:,.0f} images a second",
                     "the rate of a bf16 matrix product",
                     product * operations / (2 * side ** 3), encoding, ">= 0.5")


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and "--quick" not in sys.argv:
        return print("no GPU")
    name = torch.cuda.get_device_name() if device == "cuda" else device
    args = side_by_side.start(__doc__, device=name)
    args.device, args.batch_size, args.seen, args.repeats = device, 64, 925, 20
    if args.quick:
        args.batch_size, args.seen, args.repeats = 2, 60, 1
    encode_image(args)
    training.mkt_stage_1(args)


if __name__ == "__main__":
    main()
