"""The paper's times (Wei et al. 2024, section 4 and Table 8) beside what its steps and batches come to."""

import dataclasses

from ..gpus import gpu
from ..recipes import PT
from .stage import Setup, StagePlan, model_config, plan_stage

PAPER_GPU, PAPER_GPUS = "a100-80", 64
PAPER_HOURS = {"PT": 72.0}
"""On the 64 GPUs, documents included; the other stages have one figure together."""
PAIRS_HOURS = 30.0
"""Of PT with image-text pairs alone."""
LATER_STAGES, LATER_HOURS = ("CPT", "DRA", "IFT"), 21.0
"""The last three stages together take less."""
PAIRS = 140_000_000
"""Image-text pairs of PT's data."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PaperPairs:
    """PT's image-text pairs on the paper's machine: its figures against the operations they need."""

    steps: int
    batch: int
    samples: int
    passes: float
    """Over the 140 M pairs."""
    hours_at_peak: float
    """All steps with every GPU at 100 % of its peak."""
    pass_hours_at_peak: float
    """One pass over the pairs, likewise."""
    share_for_paper: float
    """Of the peak that all steps in the paper's 30 hours would take."""
    pass_share_for_paper: float
    """Of the peak that one pass in the paper's 30 hours would take."""


def paper_pairs() -> PaperPairs:
    """Counted for InfiMM-HD 13B at the recipe's size, whatever else is planned."""
    config = PT()
    setup = Setup(gpu=gpu(PAPER_GPU), gpus=PAPER_GPUS, mfu=1.0, headroom=0.0)
    plan = plan_stage(config, model_config(config, "infimm_hd_13b"), setup)
    pass_hours = plan.hours * PAIRS / plan.samples
    return PaperPairs(
        steps=plan.steps,
        batch=plan.global_batch,
        samples=plan.samples,
        passes=plan.samples / PAIRS,
        hours_at_peak=plan.hours,
        pass_hours_at_peak=pass_hours,
        share_for_paper=plan.hours / PAIRS_HOURS,
        pass_share_for_paper=pass_hours / PAIRS_HOURS,
    )


def pass_hours(plan: StagePlan) -> float:
    """Of one pass over the paper's pairs at the plan's rate."""
    return plan.hours * PAIRS / plan.samples


def paper_lines(plans: list[StagePlan], pairs: PaperPairs) -> list[str]:
    """What the paper says and what its figures imply, in sentences."""
    by_stage = {plan.stage: plan for plan in plans}
    lines = []
    if "PT" in by_stage:
        plan = by_stage["PT"]
        lines.append(
            f"PT: {plan.hours:.0f} h planned, one pass over the {PAIRS / 1e6:.0f} M pairs "
            f"{pass_hours(plan):.0f} h; the paper: {PAPER_HOURS['PT']:.0f} h, "
            f"{PAIRS_HOURS:.0f} h for the pairs alone."
        )
        lines.append(
            f"The paper's PT figures do not agree: its {pairs.steps:,} steps of {pairs.batch:,} pairs are "
            f"{pairs.samples / 1e9:.2f} billion samples, {pairs.passes:.1f} passes over its pairs, and need "
            f"{pairs.hours_at_peak:.0f} h at 100% of the peak; {PAIRS_HOURS:.0f} h would take "
            f"{pairs.share_for_paper:.0%} of it, for one pass {pairs.pass_share_for_paper:.0%}."
        )
    if all(stage in by_stage for stage in LATER_STAGES):
        hours = sum(by_stage[stage].hours for stage in LATER_STAGES)
        lines.append(
            f"{', '.join(LATER_STAGES)} together: {hours:.0f} h planned; the paper: less than "
            f"{LATER_HOURS:.0f} h."
        )
    head = [f"The paper trained InfiMM-HD 13B on {PAPER_GPUS} {PAPER_GPU}:"] if lines else []
    return head + lines
