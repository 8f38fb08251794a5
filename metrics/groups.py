"""What is a decomposition asked? The groups of `compare.py --metrics`, and the columns they fill.

A group is a module with COLUMNS and, beside them, measure(): see metrics/columns.py. The name of a
group also seeds its random draws.
"""
import evals
from metrics import concepts, effects, faithful, llm, masks, stability, words

GROUPS = {
    "faithfulness": evals,
    "completeness": faithful,
    "parts": concepts,
    "words": words,
    "judged": llm,                  # only with --judge_url
    "effects": effects,
    "robustness": masks,
    "stability": stability,
}
CURVES = {"faithfulness"}           # asked of every sparsity, the other groups of the middle one
BY_RATE = {"words", "judged"}       # asked of random directions at every sparsity: what their
                                    # density alone gives
TOGETHER = {"stability"}            # asked of all seeds at once

COLUMNS = {}
for module in GROUPS.values():
    COLUMNS |= module.COLUMNS
