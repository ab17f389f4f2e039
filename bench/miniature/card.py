"""The model card, made from a document alone: what was trained, on what, how it scores, where it fails."""

from typing import Any

from bench.report import markdown

from .scores import Document, accuracy, findings, groups, table


def card(document: Document) -> str:
    """Markdown; the arm described is `dynamic`, the others stand in the table."""
    size, header = document["size"], document["header"]
    runs = [run for run in document["arms"] if (run["name"], run["match"]) == ("dynamic", "steps")]
    lines = [
        f"# InfiMM-HD in miniature, size {size['name']}",
        "",
        "Made by `python -m bench.miniature` from the result file of the same name; nothing here is typed by "
        f"hand. {header['date']}, {header['processor']}, torch {header['torch']}, `{header['command']}`.",
        "",
        "## What it is",
        "",
        f"A ViT of {size['vision_layers']} layers, {size['vision_width']} wide, reads windows of "
        f"{size['window']} pixels in patches of {size['patch']}; an LLM of {size['text_layers']} layers, "
        f"{size['text_width']} wide, reads them through gated cross-attention, a block for "
        f"every {size['interval']} layers. A page has {2 * size['window']} pixels a side: four windows and a "
        "thumbnail. It shows how parts of the system compare, and is of no use for real documents.",
        "",
        "## Data",
        "",
        f"Generated: {size['train_pages']:,} pages to train, {size['evaluated_pages']:,} to ask about; "
        "sheets of paper and pieces of sixteen photographs (four of them only in evaluation), two to four "
        f"words of two digits in DejaVu Sans Mono Bold of {', '.join(map(str, size['font_sizes']))} "
        "pixels, anywhere in their quarter. A fifth of the words is never trained on, and all that are asked "
        "about are of it.",
        "",
        "## Training",
        "",
        "Encoders, resamplers and LLM are warmed up apart and shared by all arms; the encoders are then "
        "frozen.",
        "",
        *markdown(
            [
                ["part", "steps", "last accuracy in training", "seconds"],
                *(
                    [part, f"{row['steps']:,}", f"{100 * row['accuracy']:.1f} %", f"{row['seconds']:.0f}"]
                    for part, row in document["warm_up"].items()
                ),
            ]
        ),
        "",
        *_training_line(size, runs),
        "",
        "## Scores",
        "",
        "Exact match of greedy answers in percent, mean over the seeds, half of the 95 % interval.",
        "",
        *markdown(table(document)),
        "",
        "## Findings",
        "",
        *markdown(finding_rows(document)),
        "",
        "## Where it fails",
        "",
        *_failures(document, bool(runs)),
    ]
    return "\n".join(lines) + "\n"


def finding_rows(document: Document) -> list[list[str]]:
    """A row for every claim: the difference in points, its interval, whether it holds."""
    rows = [["claim", "questions", "difference", "95 % interval", "holds"]]
    for row in findings(document):
        span = f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}"
        difference, group = f"{100 * row['difference']:+.1f}", row["group"].replace("_", " ")
        rows.append([row["claim"], group, difference, span, "yes" if row["holds"] else "**no**"])
    return rows


def _training_line(size: dict[str, Any], runs: list[dict[str, Any]]) -> list[str]:
    if not runs:
        return ["The arm `dynamic` was not run."]
    seconds = sum(run["train_seconds"] for run in runs) / len(runs)
    return [
        f"Arm `dynamic`: {runs[0]['steps']:,} steps of {size['batch']} samples, {size['turns']} questions "
        f"each, peak rates {size['lr_joining']:g} (gates {size['lr_gates']:g}, LLM {size['lr_language']:g}, "
        f"resampler, where there is one, {size['lr_resampler']:g}), "
        f"{runs[0]['flops'] / 1e12:.1f} TFLOP, {seconds:.0f} s a seed, {len(runs)} seeds; loss "
        f"{runs[0]['loss'][0]:.3f} to {runs[0]['loss'][-1]:.3f} (means of the first and last twentieth)."
    ]


def _failures(document: Document, has_dynamic: bool) -> list[str]:
    if not has_dynamic:
        return ["The arm `dynamic` was not run."]
    names = ("small_text", "medium_text", "large_text", "place", "right_of", "below", "colour", "count")
    found = groups(document)
    scores = {name: accuracy(document, "dynamic", found[name]) for name in names}
    worst = sorted(scores, key=scores.get)[:3]
    listed = ", ".join(f"{name.replace('_', ' ')} ({100 * scores[name]:.1f} %)" for name in worst)
    return [
        f"The lowest scores of `dynamic`: {listed}. Letters, other typefaces and other sizes were never seen."
    ]
