"""The one table of the README: six columns of compare.py's and most of its rows.

    headline.render(results) -> Markdown        # results: what results/results.json holds
"""
from report.table import ARROWS, markdown_table

COLUMNS = ("ce_recovered_at", "completeness", "coverage", "rule_det_hard", "activations_shared_0.7",
           "active_params_at")
LEFT_OUT = ("spd:scratch", "transcoder-skip", "transcoder-noiseless", "transcoder-nofreq",
            "transcoder-freq", "sae:frozen", "sae:untrained", "svd", "random")


def render(results):
    """Write the table as Markdown: a line of heads, then one line for each row that is shown.

    A number is the mean over seeds at the middle one of a method's sparsities."""
    columns = [results["columns"][key] for key in COLUMNS]
    heads = [f"{column['head']} {ARROWS[column['better']]}".strip() for column in columns]
    lines = []
    for row in results["rows"]:
        if row["middle"] and row["name"] not in LEFT_OUT:
            lines.append([row["name"], *cells_of(row, columns)])
    return "\n".join([*markdown_table(["", *heads], lines), ""])


def cells_of(row, columns):
    """Show a row's mean in each column; empty where the number means nothing for this row."""
    cells = []
    for key, column in zip(COLUMNS, columns):
        metric = row["metrics"].get(key)
        cells.append(f"{metric['mean']:,.{column['digits']}f}" if metric else "")
    return cells
