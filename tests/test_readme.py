"""The README does what it says: its fork works, its table is that of the results, its drawing is the script's."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from report import drawing, headline, table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_fork_is_five_lines_that_work(target, tmp_path):
    """Its shell lines, in a copy of the repository, the comparison on a tiny target."""
    section = README.split("## Fork it")[1]
    lines = re.search(r"```sh\n(.*?)```", section, re.S).group(1).splitlines()
    assert len(lines) <= 10
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for package in ("metrics", "report", "studies", "tinytales"):
        shutil.copytree(ROOT / package, tmp_path / package)
    tiny = f" --model {target} --data {target}/x.bin --tokens 384 --eval_tokens 240 --device cpu --metrics faithfulness"
    script = "\n".join(line + (tiny if line.startswith("python compare.py") else "") for line in lines)
    script = script.replace("python ", f"{sys.executable} ")
    done = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row["metrics"] for row in json.loads(
        next(tmp_path.glob("results*/results.json")).read_text())["rows"]}
    assert rows.keys() == {"spd", "spd-l1"} and rows["spd"]["l0"]["mean"] != rows["spd-l1"]["l0"]["mean"]
    assert "s_C = g_NC.sum(0)" in (tmp_path / "spd_l1.py").read_text()


@pytest.mark.skipif(not (ROOT / "results/results.json").exists(), reason="no results are committed")
def test_the_table_is_that_of_the_results():
    found = json.loads((ROOT / "results/results.json").read_text())
    assert table.MARKERS[0] + "\n" + headline.render(found) + table.MARKERS[1] in README


def test_the_drawing_is_what_the_script_draws():
    assert drawing.OUT.read_text(encoding="utf-8") == drawing.draw() and "report/methods.svg" in README


def test_pictures_and_pages_that_it_names_are_there():
    for name in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / name).exists(), name


def test_it_stays_short():
    assert len(README.encode()) < 10_500 and README.count("|---") <= 3 * 8
