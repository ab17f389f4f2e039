"""`python -m bench.report [RESULTS.json ...]`: tables and pictures; no number is typed by hand.

Writes one page and its pictures for each file (default: all of bench/results) into bench/results/report or
--output. `--readme` rewrites the block between the two "kernels" comments of README.md instead: from the
newest result of each GPU, or, where there is none, from the static ledger bench/ledger.json.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.baselines import ATTENTION
from bench.problem import OURS
from bench.results import RESULTS, ROOT, load, of_gpu_runs

Entry = dict[str, Any]
README = ROOT / "README.md"
LEDGER = ROOT / "bench" / "ledger.json"
SECTIONS = {
    "main": "The windows of the ViT",
    "decode": "A new token over kept vision keys and values",
    "prefill": "A text over an image: attention, projection, gate",
    "vision_keys_values": "Keys and values of the layers",
    "gated": "Projection, gate and residual",
    "feed_forward": "Gated feed-forward",
    "post_norm": "Residual post-norm",
    "position": "Positions",
    "seqlen": "Window size",
    "windows": "Number of windows",
    "head_dim": "Head dimension",
    "ragged": "Ragged windows",
    "cross": "Text over vision tokens",
    "memory": "Peak memory of forward and backward, above the inputs",
    "float16": "float16",
    "deterministic": "Deterministic backward",
    "host": "Host time of a forward call, from Python's call to its return",
}
# In README.md: how many cases of a section, which are the most important first. The pages have all.
IN_README = {"main": 4, "decode": 3, "prefill": 2, "vision_keys_values": 2, "gated": 2, "feed_forward": 2}
IN_README |= {"post_norm": 2, "position": 2}
RATES = {"tflops": "TFLOP/s", "gbps": "GB/s"}
UNMEASURED = "No speed was measured on any GPU: A100, H100 and H200 are unmeasured."
UNMEASURED_A100 = "No speed was measured on an A100."
OTHER_BASELINES = ("torch", "sdpa_cached", "sdpa_masked", "recompute")  # of the ops beside attention
RATIO = (
    "A figure with x is the time of that implementation over ours in the same run: above 1, ours is faster."
)


def case_of(entry: Entry) -> tuple:
    """What entries of one case have in common, hashable."""
    shape = json.dumps(entry["shape"], sort_keys=True)
    return (
        entry["section"],
        entry["op"],
        entry["pass"],
        entry["metric"],
        shape,
        entry["dtype"],
        entry["deterministic"],
    )


def by_case(entries: list[Entry]) -> list[dict[str, Entry]]:
    """The entries of each case by implementation, in the order they were measured."""
    cases: dict[tuple, dict[str, Entry]] = {}
    for entry in entries:
        cases.setdefault(case_of(entry), {})[entry["implementation"]] = entry
    return list(cases.values())


def shape_label(shape: dict[str, Any]) -> str:
    """A shape as a reader says it: "40 windows of 1025, 16 heads of 112"."""
    parts = []
    if "num_windows" in shape and "seqlen" in shape:
        plural = "s" if shape["num_windows"] > 1 else ""
        parts.append(f"{shape['num_windows']} window{plural} of {shape['seqlen']}")
    if "lengths" in shape:
        parts.append(f"{len(shape['lengths'])} windows of {_lengths(shape['lengths'])}")
    if "lengths_q" in shape:
        queries, keys = shape["lengths_q"], shape["lengths_k"]
        parts.append(f"{len(queries)} segments of {_lengths(queries)} over {_lengths(keys)}")
    if "head_dim" in shape:
        heads = str(shape["num_heads"])
        if shape.get("num_kv_heads", shape["num_heads"]) != shape["num_heads"]:
            heads += f" ({shape['num_kv_heads']} key)"
        parts.append(f"{heads} heads of {shape['head_dim']}")
    known = {
        "num_windows",
        "seqlen",
        "lengths",
        "lengths_q",
        "lengths_k",
        "num_heads",
        "num_kv_heads",
        "head_dim",
    }
    parts += [
        f"{key} {value}" for key, value in shape.items() if key not in known and key != "num_prefix_tokens"
    ]
    return ", ".join(parts)


def _lengths(lengths: list[int]) -> str:
    return str(lengths[0]) if len(set(lengths)) == 1 else f"{min(lengths)} to {max(lengths)}"


def quantity(entry: Entry) -> float | None:
    """What implementations are compared by: time, or bytes."""
    return entry["peak_bytes"] if entry["metric"] == "memory" else entry["median_us"]


def value_label(entry: Entry) -> str:
    if entry["status"] != "ok":
        return entry["status"]
    if entry["metric"] == "memory":
        return f"{entry['peak_bytes'] / 2**20:.0f} MiB"
    label = f"{entry['median_us']:.{1 if entry['median_us'] < 100 else 0}f} us"
    for key, unit in RATES.items():
        if (rate := entry[key]) is not None:
            label += f", {rate:.0f} {unit}" if rate >= 100 else f", {rate:.3g} {unit}"
    return label


def ratio_label(entry: Entry | None, ours: Entry | None) -> str:
    """`entry` over ours; its own value where ours has none, its status where it has none."""
    if entry is None:
        return "-"
    if entry["status"] != "ok" or ours is None or ours["status"] != "ok":
        return value_label(entry)
    return f"{quantity(entry) / quantity(ours):.2f}x"


def case_line(entries: list[Entry]) -> str:
    """One case on one line, for the terminal."""
    first = entries[0]
    ours = next((e for e in entries if e["implementation"] == OURS), None)
    parts = [
        f"{first['section']}: {first['op']} {first['pass']} {shape_label(first['shape'])} {first['dtype']}"
    ]
    if ours is not None:
        parts.append(f"ours {value_label(ours)}")
    for entry in entries:
        if entry is not ours and entry["status"] != "missing":
            parts.append(f"{entry['implementation']} {ratio_label(entry, ours)}")
    return " | ".join(parts)


def page(document: dict[str, Any], pictures: dict[str, str]) -> str:
    """The report of one result file in Markdown; `pictures` maps a title to a file beside it."""
    lines = [f"# {document['header']['gpu']}, {document['header']['date']}", "", provenance(document), ""]
    lines += [*_ceilings(document), RATIO, ""]
    for title, name in pictures.items():
        lines += [f"![{title}]({name})", ""]
    lines += _encoder(document)
    cases = by_case(document["entries"])
    for section, title in SECTIONS.items():
        chosen = [case for case in cases if next(iter(case.values()))["section"] == section]
        if chosen:
            lines += [f"## {title}", "", *table(chosen, ceilings(document)), ""]
            if notes := _notes(chosen, ("wrong", "failed", "budget")):
                lines += [*notes, ""]
    if missing := _notes(cases, ("missing",)):
        lines += ["## Not measured, and why", "", *missing, ""]
    return "\n".join(lines)


def provenance(document: dict[str, Any]) -> str:
    """On what, with what and how it was measured, and what the tests of the same run said."""
    h = document["header"]
    parts = [
        f"{h['gpu']}"
        + (f" (compute capability {h['compute_capability']})" if h["compute_capability"] else "")
    ]
    for name, key in (
        ("driver", "driver"),
        ("torch", "torch"),
        ("CUDA", "cuda"),
        ("Triton", "triton"),
        ("nvcc", "nvcc"),
    ):
        if h[key]:
            parts.append(f"{name} {h[key]}")
    text = f"{', '.join(parts)}; {h['date']}, commit {h['commit'][:12]}{h['commit'][40:]}, `{h['command']}`."
    if not document["finished"]:
        text += " The run was cut short."
    tests = document.get("tests")
    if tests is None:
        return text + " The GPU tests were not run."
    text += f" GPU tests of the same run: {tests['passed']} passed, {tests['failed']} failed"
    return text + (f" ({tests['status']}: {tests['reason']})." if tests["status"] == "budget" else ".")


def ceilings(document: dict[str, Any]) -> dict[str, float]:
    """The rates of the matrix product and of the copy of the same run, where they were measured."""
    return {
        rate: entry[rate]
        for entry in document["entries"]
        for rate in RATES
        if entry["section"] == "ceilings" and entry["status"] == "ok" and entry[rate] is not None
    }


def share_label(entry: Entry | None, limits: dict[str, float]) -> str:
    """How much of the nearer ceiling an entry reaches: of the matrix product's rate or of the copy's."""
    if entry is None or entry["status"] != "ok":
        return "-"
    shares = [entry[rate] / limits[rate] for rate in limits if entry[rate] is not None]
    return f"{100 * max(shares):.0f} %" if shares else "-"


def _ceilings(document: dict[str, Any]) -> list[str]:
    found = []
    for entry in document["entries"]:
        if entry["section"] == "ceilings" and entry["status"] == "ok":
            name = "matrix product" if entry["op"] == "matrix_product" else "copy"
            found.append(f"{name} ({shape_label(entry['shape'])}, {entry['dtype']}) {value_label(entry)}")
    return [f"Ceilings of the same run: {'; '.join(found)}.", ""] if found else []


def _encoder(document: dict[str, Any]) -> list[str]:
    """The whole encoder's table (bench.encoder), and what is missing in it."""
    found = document.get("encoder")
    if found is None:
        return []
    lines = ["## The whole encoder", ""]
    if found["status"] != "ok":
        lines += [f"{found['status']}: {found['reason']}", ""]
    table = [["rival", "mode", "dtype", "windows", "pass", "ours", "theirs", "ratio"]]
    for row in found["rows"] or []:
        mode, times = "compiled" if row["compiled"] else "eager", (row["ours_ms"], row["theirs_ms"])
        case = [row["rival"], mode, row["dtype"], str(row["windows"]), row["pass"]]
        table.append([*case, *(f"{ms:.1f} ms" for ms in times), f"{row['ratio']:.2f}x"])
    missing = dict.fromkeys(f"- {each['rival']}: {each['reason']}" for each in found["missing"] or [])
    return lines + (markdown(table) + [""] if found["rows"] else []) + ([*missing, ""] if missing else [])


def columns(cases: list[dict[str, Entry]]) -> list[str]:
    """The implementations beside ours that have something to say in these cases."""
    names = {name for case in cases for name, entry in case.items() if entry["status"] != "missing"}
    order = [OURS, *OTHER_BASELINES, *(baseline.name for baseline in ATTENTION)]
    return sorted(names - {OURS, "all"}, key=lambda name: (order.index(name.split(":")[0]), name))


def table(cases: list[dict[str, Entry]], limits: dict[str, float]) -> list[str]:
    """Rows of cases: ours in full, its share of the nearer of the ceilings `limits`, the others as ratios."""
    names = columns(cases)
    header = ["op", "shape", "pass", "ours", "of ceiling", *names]
    rows = []
    for case in cases:
        first, ours = next(iter(case.values())), case.get(OURS)
        label = value_label(ours) if ours else case["all"]["status"] if "all" in case else "-"
        cells = [first["op"], shape_label(first["shape"]), first["pass"], label, share_label(ours, limits)]
        rows.append(cells + [ratio_label(case.get(name), ours) for name in names])
    return markdown([header, *rows])


def markdown(rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def _notes(cases: list[dict[str, Entry]], statuses: tuple[str, ...]) -> list[str]:
    """The reason of what has one of these statuses, each said once."""
    reasons: dict[str, list[str]] = {}
    for case in cases:
        for name, entry in case.items():
            if entry["status"] in statuses:
                text = f"{name} {entry['status']}: {entry['reason']}"
                reasons.setdefault(text, []).append(f"{shape_label(entry['shape'])} {entry['pass']}")
    return [f"- {text}" + _where(places, len(cases)) for text, places in reasons.items()]


def _where(places: list[str], of: int) -> str:
    if len(places) == of:
        return ""
    return f" ({'; '.join(places)})" if len(places) < 4 else f" ({len(places)} of {of} cases)"


def readme_block(folder: Path = RESULTS, ledger: Path = LEDGER) -> str:
    """What stands between the comments of README.md."""
    newest: dict[str, tuple[str, str, dict[str, Any]]] = {}
    for path in of_gpu_runs(folder):
        document = load(path)
        found = document["header"]
        if found["compute_capability"] is not None:
            key = (found["date"], path.stem, document)
            newest[found["gpu"]] = max(newest.get(found["gpu"], key), key, key=lambda item: item[:2])
    lines = []
    for gpu in sorted(newest):
        document = newest[gpu][2]
        lines += [provenance(document), "", *_ceilings(document), *_readme_tables(document)]
    if lines:
        lines += [RATIO, ""]
    else:
        lines += _ledger_table(ledger)
    if not any("A100" in gpu for gpu in newest):
        lines += [UNMEASURED_A100 if newest else UNMEASURED, ""]
    return "\n".join(lines)


def _readme_tables(document: dict[str, Any]) -> list[str]:
    """The first cases of the sections that README.md shows, and what could not run in them."""
    lines, chosen = [], []
    cases = by_case(document["entries"])
    for section, count in IN_README.items():
        shown = [case for case in cases if next(iter(case.values()))["section"] == section][:count]
        if shown:
            lines += [f"{SECTIONS[section]}:", "", *table(shown, ceilings(document)), ""]
            chosen += shown
    missing = {n for c in chosen for n, e in c.items() if e["status"] == "missing"} - set(columns(chosen))
    if missing:
        lines += [f"Not installed or not able there: {', '.join(sorted(missing))}.", ""]
    return lines


def _ledger_table(path: Path) -> list[str]:
    """Ours and the rivals at the ViT's shape: of each pass the kernel with the matrix work."""
    shown = [
        row
        for row in json.loads(path.read_text())
        if (row["head_dim"], row["seqlen"]) == (112, 1025) and row["arch"] in ("sm_80", "sm_90")
    ]
    rivals = list(dict.fromkeys(row["rival"] for row in shown if "rival" in row))
    share = {
        (row["rival"], row["arch"], row["pass"]): f"{row['useful_over_issued']:.3f}"
        for row in shown
        if "rival" in row
    }
    ours = [row for row in shown if "rival" not in row and row["mma"] != "none"]
    own = [row for row in ours if row["default"]]
    in_cuda = [row for row in ours if row["backend"] == "cuda"]
    rows = [["pass", "arch", "ours", *rivals, "registers", "spills in loop", "shared memory"]]
    for row in sorted([*own, *in_cuda], key=lambda row: (row["pass"] == "bwd", row["arch"], row["kernel"])):
        arch = row["arch"] + (" (CUDA C++)" if row in in_cuda else "")
        at = [share.get((rival, row["arch"], row["pass"]), "-") for rival in rivals]
        resources = [str(row[key]) for key in ("registers", "spills_in_loop", "shared_memory")]
        rows.append([row["pass"], arch, f"{row['useful_over_issued']:.3f}", *at, *resources])
    compilers = sorted({f"Triton {row['triton']} and ptxas {row['ptxas']}" for row in own})
    compilers += sorted({f"nvcc's ptxas {row['ptxas']}" for row in in_cuda})
    return [
        "Useful share of the matrix work that a kernel issues for a window of 1025 tokens and head_dim 112,",
        f"ours as compiled by {', '.join(compilers)}, the others' from their tile sizes",
        "(`python -m bench.ledger`):",
        "",
        *markdown(rows),
        "",
    ]


def with_block(text: str, block: str, name: str = "kernels") -> str:
    """`text` with `block` between its comments `name`; ValueError unless each stands there once, in order."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    counts = text.count(begin), text.count(end)
    if counts != (1, 1) or text.index(begin) > text.index(end):
        raise ValueError(f"text must hold {begin} and then {end} once each, got {counts[0]} and {counts[1]}")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{block}{end}{rest.partition(end)[2]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULTS.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "report")
    parser.add_argument("--readme", action="store_true", help="rewrite README.md's block instead")
    options = parser.parse_args(arguments)
    if options.readme:
        try:
            README.write_text(with_block(README.read_text(), readme_block()))
        except (OSError, ValueError) as error:
            parser.error(str(error))
        return 0
    paths = options.results or of_gpu_runs()
    if not paths:
        parser.error(f"no result file in {RESULTS.relative_to(ROOT)}; `make gpu` writes one")
    from bench.plots import draw  # here, so that --readme and bench.gpu need no matplotlib

    for path in paths:
        try:
            document = load(path)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        options.output.mkdir(parents=True, exist_ok=True)
        pictures = draw(document, options.output, path.stem)
        target = options.output / f"{path.stem}.md"
        target.write_text(page(document, pictures))
        print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
