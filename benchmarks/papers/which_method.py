"""What each method costs and keeps, on a pretrained network and on photographs, in one run.

    python -m benchmarks.papers.which_method [--rounds 5]

Patches EfficientNet-Lite0 (ImageNet weights) with every recipe and compares: share of the crops of 23 photographs whose
top-1 stays, parameters, multiply-adds, time of a forward pass (patched and merged) and of a training step, batch 8 at
224². The table of docs/which_method.md is what it prints.
"""

from __future__ import annotations

from benchmarks.common import arguments, in_turns, medians, new_parser, training_step, write_results
from timm_contconv.cli.compare import compare_recipes
from timm_contconv.cli.lite0 import load_lite0, load_photographs

RECIPES = ("dcls", "dcls_triangle", "dcls_gauss", "smp", "flex", "genv", "cc")


def main() -> None:
    parser = new_parser(__doc__, "which_method.json", threads=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--crops", type=int, default=4, help="of each photograph")
    options = arguments(parser)
    model, images = load_lite0(), load_photographs(options.crops).flatten(0, 1)
    compared = compare_recipes(model, images, RECIPES, options.rounds)
    nets = {"plain": model, **{c.recipe: c.model for c in compared}}
    steps = medians(in_turns({name: training_step(net, images[:8]) for name, net in nets.items()}, options.rounds))
    record = {}
    print("| recipe | layers | top-1 kept | parameters | multiply-adds | forward | forward, merged | training step |")
    print("|---|---|---|---|---|---|---|---|")
    for c in compared:
        step = steps[c.recipe] / steps["plain"]
        cost = "-" if c.multiply_adds is None else f"{c.multiply_adds:.2f}×"
        print(
            f"| `{c.recipe}` | {c.layers} | {100 * c.top1_kept:.0f} % | {c.parameters:.2f}× | {cost}"
            f" | {c.patched_time:.2f}× | {c.merged_time:.2f}× | {step:.2f}× |",
            flush=True,
        )
        record[c.recipe] = {
            "layers": c.layers, "top1_kept": c.top1_kept, "difference": c.difference, "parameters": c.parameters,
            "multiply_adds": c.multiply_adds, "forward": c.patched_time, "forward_merged": c.merged_time,
            "training_step": step,
        }  # fmt: skip
    write_results(options.output, {"images": len(images), "recipes": record})


if __name__ == "__main__":
    main()
