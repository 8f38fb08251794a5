"""The one table of the README: the middle of three sparsities, six columns, most rows of compare.py.

    headline.render(results) -> Markdown
"""
COLUMNS = ("ce_recovered_at", "completeness", "coverage", "rule_det_hard", "activations_shared_0.7",
           "active_params_at")
LEFT_OUT = ("transcoder-skip", "transcoder-nofreq", "transcoder-freq", "sae:frozen", "sae:untrained",
            "svd", "random")


def cell(metric, digits):
    """A mean over seeds; empty where the metric means nothing for a row."""
    if metric is None or metric.get("mean") is None:
        return ""
    return f"{metric['mean']:,.{digits}f}"


def render(results):
    columns = results["columns"]
    rows = [row for row in results["rows"] if row["middle"] and row["name"] not in LEFT_OUT]
    heads = [f"{columns[key]['head']} {arrow(columns[key])}".strip() for key in COLUMNS]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for row in rows:
        cells = [cell(row["metrics"].get(key), columns[key]["digits"]) for key in COLUMNS]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def arrow(column):
    """Which way is better."""
    return {"up": "↑", "down": "↓"}.get(column["better"], "")
