"""The page of Hugging Face families: `python tests/hf_table.py` measures every case and writes docs/families.md."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from plait.frontends.hf import FAMILIES
from plait.runtime import write_text

from tests.hf_checks import CHECKS, cases_of, outcomes, reached

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
Outcomes = Mapping[str, Mapping[str, float]]  # by family, by check: the worst of its cases

# Where transformers 5.23 is not what its own forward in float64 means, and what happens here.
NOTES = (
    "Packing by restarting `position_ids` leaks from one segment into the next through every recurrent mixer and short "
    "convolution, and in gpt_oss through attention, silently. Here states, convolutions and positions begin anew at every "
    "border: the column *packed* is against each row alone.",
    "Decoding from a cache leaves out `time_step_limit`. Here every step keeps to it, as the forward of a whole row does.",
    "`time_step_limit` is not read at all, and steps are clamped at `time_step_min` in the forward of a whole row, but not in "
    "decoding. Here decoding is what the whole row is; a `time_step_limit` that would say something is refused.",
    "More than one token fed on top of a cache begins from an empty state. Here prompts may be read in parts.",
    "With a cache and without `position_ids` positions begin at 0 again; MiniMax takes no second part of a prompt. Here "
    "positions go on.",
    "With padding on the left the short convolution reads the padding. Here padding is taken out before anything runs.",
    "Without an attention layer there is no cache. Here there is.",
    "Decay tables are in the file, and a file in bfloat16 rounds them. Here they are computed from the config.",
)
RECURRENT = (
    "bailing_hybrid", "bamba", "falcon_h1", "gpt_oss", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "mamba", "mamba2",
    "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next",
    "recurrent_gemma", "zamba2",
)  # fmt: skip
NOTED: dict[str, tuple[int, ...]] = {
    "mamba2": (2,), "nemotron_h": (3, 7), "zamba2": (3,), "mamba": (4,), "jamba": (4,), "bamba": (5,), "minimax": (5, 8),
    "recurrent_gemma": (6,),
}  # fmt: skip

TEXT = """# Hugging Face families

What holds of every `model_type`, measured on small models with odd sizes whose weights follow from their names. Written by
`make families`; a number is the error of the worst of a family's cases, relative to what it should be.

| column | what is compared |
| --- | --- |
| logits, gradients | the references of our ops with transformers 5.23, both in true float64 (at most 1e-9) |
| in float32 | the compiled program with float64: logits to 2e-5, the gradient of every tensor to 1e-4 |
| generation | {new} greedy tokens by the cached program, prompts of unequal length in one batch, with float64 without a cache |
| padded | rows padded on the left, and on the right, with each row alone in float64 (2e-5); with an encoder, what it reads |
| packed | rows behind one another in one row, with each row alone in float64 (2e-5) |
| save back | the folder that `save_hf` writes, and the one that was read: every tensor, bit for bit |

"""


def main() -> None:
    """Measure all, write the page, and fail where a figure is not reached."""
    found = {family: worst(outcomes(name) for name in cases_of(family)) for family in sorted(FAMILIES)}
    write_text(PAGE, page(found))
    bad = [f"{f}: {c} is {v:.1e}" for f, checks in found.items() for c, v in checks.items() if not reached(c, v)]
    sys.exit("\n".join(bad))


def worst(cases: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The largest of every check."""
    found = [*cases]
    return {check: max(case[check] for case in found) for check in CHECKS}


def page(found: Outcomes) -> str:
    """The whole text."""
    columns = ["model_type", "cases", *(check.title for check in CHECKS.values()), "transformers"]
    rules = ["---", "---:", *("---:" for _ in CHECKS), "---:"]
    rows = [columns, rules, *(_row(family, checks) for family, checks in found.items())]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    notes = "\n".join(f"{i}. {text}" for i, text in enumerate(NOTES, 1))
    return f"{TEXT.format(new=2 * 12)}{table}\n\n{WRONG}\n\n{notes}\n"


WRONG = """## Where transformers is off

The last column counts what follows. All of it shows in float64, so it is no rounding, and the figures above are against the
forward of each whole row, which is right."""


def _row(family: str, checks: Mapping[str, float]) -> list[str]:
    numbers = [*([1] if family in RECURRENT else []), *NOTED.get(family, ())]
    cells = [cell(check, value) for check, value in checks.items()]
    return [family, str(len(cases_of(family))), *cells, ", ".join(map(str, numbers))]


def cell(check: str, value: float) -> str:
    """A check's outcome as the page shows it."""
    if math.isnan(value):
        return "-"
    if CHECKS[check].counts:
        return "equal" if value == 0 else f"**{value:.0f} differ**"
    text = "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")
    return text if reached(check, value) else f"**{text}**"


def rows_of(text: str) -> dict[str, dict[str, str]]:
    """The cells of a page by family and check."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {line[0]: dict(zip(CHECKS, line[2:], strict=False)) for line in lines if line[0] in FAMILIES}


if __name__ == "__main__":
    main()
