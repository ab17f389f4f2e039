"""What a question about one image costs as the image grows: the paper's argument, counted and measured.

    python -m bench.cost [--size 13b|7b|small] [--json] [--plot FILE] [--save]

One prompt of --text-tokens and one square image of each resolution, answered up to the first new token:

    vision_tokens     visual tokens that the language model can see
    llm_tokens_added  tokens that the image adds to the language model's sequence, its <image> included
    flops             floating-point operations of the whole forward, counted as it runs (bench/flops.py)
    activation_bytes  most bytes alive at one time beside the weights, the kept ones included; bfloat16
    kv_cache_bytes    kept for the next tokens: the language model's cache and the vision keys and values
    seconds           at size "small" measured on this CPU in float32; else flops at --rate TFLOP/s x --mfu

    infimm-hd              windows of 448 pixels and a thumbnail, gated cross-attention every 4 layers
    llava-style            the same windows, their patch tokens in the language model's own sequence
    resampler              infimm-hd with 64 latents of a Perceiver for every window
    mixture-of-resolution  LLaVA-HR: CLIP ViT-L and ConvNeXt-L over the whole image, concatenation

An image of 224 pixels is one window of 224, one of 448 a single window of 448. The counted sizes never
allocate their weights; "small" has the true windows, tokens and layers' kinds at narrow widths, and its times
are measured behind every counted table too (--no-measure leaves them out). --save keeps document and picture
in bench/results/cost and writes README.md's block from them.
"""

import argparse
import datetime
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from bench import results
from bench.cross_attention import cpu_model
from bench.flops import counting, remember_lengths
from model import InfiMMHD, InfiMMHDConfig, MixtureOfResolutionConfig, VisionConfig, preset, variant
from model.presets import checked, clip_vit_l_14

SYSTEMS = ("infimm-hd", "llava-style", "resampler", "mixture-of-resolution")
RESOLUTIONS = (224, 448, 896, 1344, 2688)
IN_README = (448, 1344, 2688)
WINDOW = 448
SIZES = ("small", "7b", "13b")


def base_config(size: str) -> InfiMMHDConfig:
    """InfiMM-HD at a size; "small" keeps windows, patches and tokens and narrows everything else."""
    if size != "small":
        return preset(f"infimm_hd_{size}")
    config = preset("infimm_hd_7b")
    config.vision_config = VisionConfig(hidden_size=112, num_layers=3, num_heads=1, intermediate_size=448)
    text = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4, head_dim=32)
    text |= dict(num_attention_heads=4, num_key_value_heads=4)
    config.gated_cross_attention.num_heads, config.gated_cross_attention.head_dim = 2, 32
    config.connector.num_layers, config.connector.num_heads = 2, 2
    config.text_config = type(config.text_config)(**(config.text_config.to_dict() | text))
    return checked(config)


def system_config(size: str, system: str, resolution: int) -> InfiMMHDConfig:
    """One of the compared systems for images of this many pixels a side."""
    config = base_config(size)
    if system == "mixture-of-resolution":
        config = variant(config, "llava-style")
        narrow = dict(hidden_size=64, num_layers=5, num_heads=2, intermediate_size=128)
        vision = clip_vit_l_14()
        if size == "small":
            vision = VisionConfig(**(_fields(vision) | narrow))
        mixture = MixtureOfResolutionConfig(image_size=resolution)
        if size == "small":
            mixture.depths, mixture.hidden_sizes = [1, 1, 1, 1], [16, 32, 48, 64]
        vision.mixture_of_resolution = mixture
        config.vision_config = vision
    else:
        config = variant(config, system)
        config.vision_config.set_input_size(min(resolution, WINDOW))
    # long enough for every concatenation here; nothing else depends on it
    config.text_config.max_position_embeddings = 65536
    return checked(config)


def _fields(vision: VisionConfig) -> dict[str, Any]:
    return {name: getattr(vision, name) for name in VisionConfig.__dataclass_fields__}


def num_windows(system: str, resolution: int) -> int:
    """Windows of a square image, thumbnail included."""
    per_side = 1 if system == "mixture-of-resolution" else -(-resolution // WINDOW)
    return per_side**2 + (per_side > 1)


def prompt(config: InfiMMHDConfig, windows: int, text_tokens: int) -> tuple[torch.Tensor, int]:
    """`input_ids` [1, text_len], the image before the text, and the tokens that the image added."""
    added = windows * config.image_seq_length if config.image_seq_length else 1
    ids = [config.image_token_id] * added + [5] * text_tokens
    return torch.tensor([ids]), added


def image_arguments(config: InfiMMHDConfig, windows: int, dtype: torch.dtype) -> dict[str, Any]:
    size = config.vision_config.input_size
    side = int((windows - 1) ** 0.5)
    places = [(-1, -1)] + [(row, column) for row in range(side) for column in range(side)]
    return dict(
        pixel_values=torch.zeros(windows, 3, size, size, dtype=dtype),
        window_positions=torch.tensor(places[:windows]),
        windows_per_image=[windows],
        images_per_sample=[1],
    )


class CountedModel(InfiMMHD):
    """Runs on tensors without storage: the pieces of the text, whose values decide what runs, are real."""

    def _segments(self, input_ids, images, cache):
        if not self.is_gated:
            return None
        with unset_fake_temporarily():
            is_image = torch.zeros(tuple(input_ids.shape), dtype=torch.bool)
            is_image[0, 0] = True
            real = images.segments(is_image)
            lengths = {name: getattr(real, name).diff().tolist() for name in ("cu_seqlens_q", "cu_seqlens_k")}
        fake_mode = input_ids.fake_mode
        fakes = [None if not isinstance(x, torch.Tensor) else fake_mode.from_tensor(x) for x in real]
        segments = type(real)(*fakes)._replace(max_keys=real.max_keys)
        for name, values in lengths.items():
            remember_lengths(getattr(segments, name), values)
        return segments


def count(config: InfiMMHDConfig, windows: int, text_tokens: int) -> dict[str, int]:
    """The counted columns of a row, in bfloat16, without allocating the model."""
    ids, added = prompt(config, windows, text_tokens)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
        model = _without_storage(config)
        inputs = image_arguments(config, windows, torch.bfloat16)
        input_ids = fake.from_tensor(ids)
        with counting(model) as (flops, live):
            out = model(input_ids, **inputs, use_cache=True, logits_to_keep=1)
        cache = [x for layer in out.past_key_values.layers for x in (layer.keys, layer.values)]
        cache += [x for pair in out.images.keys_values.values() for x in pair]
    return dict(
        vision_tokens=windows * config.visual_tokens_per_window,
        llm_tokens_added=added,
        flops=flops.get_total_flops(),
        activation_bytes=live.peak,
        kv_cache_bytes=sum(x.numel() * x.element_size() for x in cache),
    )


def _without_storage(config: InfiMMHDConfig) -> CountedModel:
    """The model in bfloat16, its weights as the current `FakeTensorMode`'s."""
    with unset_fake_temporarily(), torch.device("meta"):  # constructors may read what they compute
        model = CountedModel(config).to(torch.bfloat16).eval().requires_grad_(False)
    return model.to_empty(device="cpu")


def measure(config: InfiMMHDConfig, windows: int, text_tokens: int, repeats: int) -> float:
    """Median seconds of the forward on this CPU, float32."""
    torch.manual_seed(0)
    model = InfiMMHD(config).eval()
    ids, _ = prompt(config, windows, text_tokens)
    inputs = image_arguments(config, windows, torch.float32)
    inputs["pixel_values"].normal_()
    times = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            model(ids, **inputs, use_cache=True, logits_to_keep=1)
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def table(
    size: str,
    resolutions: Sequence[int],
    text_tokens: int,
    seconds: Callable[[InfiMMHDConfig, int, dict], float],
) -> list[dict[str, Any]]:
    """A row for every system and resolution."""
    rows = []
    for system in SYSTEMS:
        for resolution in resolutions:
            config, windows = system_config(size, system, resolution), num_windows(system, resolution)
            row = dict(system=system, resolution=resolution) | count(config, windows, text_tokens)
            row["seconds"] = seconds(config, windows, row)
            print(f"{size}: {system} at {resolution}", file=sys.stderr, flush=True)
            rows.append(row)
    return rows


def report(options: argparse.Namespace) -> dict[str, Any]:
    def measured(config: InfiMMHDConfig, windows: int, row: dict) -> float:
        return measure(config, windows, options.text_tokens, options.repeats)

    def at_rate(config: InfiMMHDConfig, windows: int, row: dict) -> float:
        return row["flops"] / (options.rate * 1e12 * options.mfu)

    is_small = options.size == "small"
    stated = f"counted flops at {options.rate:g} TFLOP/s x {options.mfu:g}"
    on_cpu = f"measured, median of {options.repeats}, float32, {torch.get_num_threads()} threads"
    document = dict(
        size=options.size,
        text_tokens=options.text_tokens,
        seconds=on_cpu if is_small else stated,
        cpu=cpu_model(),
        torch=torch.__version__,
        date=datetime.date.today().isoformat(),
        command=f"python -m bench.cost {shlex.join(options.arguments)}".strip(),
        rows=table(options.size, options.resolutions, options.text_tokens, measured if is_small else at_rate),
    )
    if not is_small and options.measure:
        rows = table("small", options.resolutions, options.text_tokens, measured)
        document["measured"] = dict(size="small", seconds=on_cpu, rows=rows)
    return results.scrub(document)


def _print(title: str, document: dict[str, Any]) -> None:
    print(f"{title}; seconds: {document['seconds']}")
    print(f"{'system':24}{'pixels':>7}{'vision':>8}{'LLM +':>8}{'TFLOP':>11}", end="")
    print(f"{'act. MB':>11}{'KV MB':>10}{'s':>10}")
    for row in document["rows"]:
        print(
            f"{row['system']:24}{row['resolution']:7}{row['vision_tokens']:8}{row['llm_tokens_added']:8}"
            f"{row['flops'] / 1e12:11.3f}{row['activation_bytes'] / 1e6:11.1f}"
            f"{row['kv_cache_bytes'] / 1e6:10.1f}{row['seconds']:10.3f}"
        )


def save(document: dict[str, Any]) -> None:
    """Document and picture into bench/results/cost, and a table of them into README.md."""
    from bench.cost_plot import draw
    from bench.report import README, with_block

    folder, stem = results.RESULTS / "cost", f"{document['size']}-{document['date']}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
    picture = folder / f"{stem}.png"
    draw(document, picture)
    block = readme_block(document, str(picture.relative_to(results.ROOT)))
    README.write_text(with_block(README.read_text(), block, "cost"))


def readme_block(document: dict[str, Any], picture: str) -> str:
    """Markdown of the larger images; the picture has all."""
    measured = document.get("measured", document)
    seconds = {(row["system"], row["resolution"]): row["seconds"] for row in measured["rows"]}
    lines = [
        f"Size {document['size']}, a question of {document['text_tokens']} tokens, up to the first new one,",
        f"counted, but for the last column: {measured['size']} size, {measured['seconds']}",
        f"({document['cpu']}, torch {document['torch']}, {document['date']}, `{document['command']}`).",
        "",
        "| system | pixels | visual tokens | added to the LLM | TFLOP | activations GB | kept GB | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        if row["resolution"] in IN_README:
            lines.append(
                f"| {row['system']} | {row['resolution']} | {row['vision_tokens']:,} "
                f"| {row['llm_tokens_added']:,} | {row['flops'] / 1e12:.1f} "
                f"| {row['activation_bytes'] / 1e9:.2f} | {row['kv_cache_bytes'] / 1e9:.2f} "
                f"| {seconds[row['system'], row['resolution']]:.2f} |"
            )
    lines += ["", f"![Cost of an image against its side in pixels]({picture})"]
    return "\n".join(lines) + "\n"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="13b")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--plot", type=Path, help="write the picture to this PNG file")
    parser.add_argument("--save", action="store_true", help="keep it in bench/results/cost and in README.md")
    parser.add_argument("--resolutions", type=int, nargs="+", default=list(RESOLUTIONS), metavar="PIXELS")
    parser.add_argument("--text-tokens", type=int, default=128, help="of the question (default 128)")
    parser.add_argument("--rate", type=float, default=989.0, help="peak TFLOP/s (default 989: H100, bf16)")
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="share of the peak that is reached (default 0.4)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of the small size (default 3)")
    parser.add_argument("--no-measure", dest="measure", action="store_false", help="count only")
    options = parser.parse_args(arguments)
    for name in ("text_tokens", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    for name in ("rate", "mfu"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name} must be positive, got {getattr(options, name)}")
    for pixels in options.resolutions:
        # 224 or whole windows of 448, and whole cells of 32 for the ConvNeXt
        if pixels != WINDOW // 2 and (pixels < WINDOW or pixels % WINDOW):
            parser.error(f"--resolutions must be {WINDOW // 2} or multiples of {WINDOW}, got {pixels}")
    options.arguments = list(arguments)
    if options.plot is not None and not options.plot.parent.is_dir():
        parser.error(f"--plot must be a file in an existing folder, got {str(options.plot)!r}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    document = report(options)
    if options.plot is not None:
        from bench.cost_plot import draw

        draw(document, options.plot)
    if options.save:
        save(document)
    if options.json:
        print(json.dumps(document, indent=1))
        return
    _print(f"size {document['size']}, a question of {document['text_tokens']} tokens", document)
    if "measured" in document:
        print()
        _print("size small", document["measured"])


if __name__ == "__main__":
    main()
