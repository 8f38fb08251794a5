"""Guards against rot: sizes, dead flags, a README whose commands no longer parse, lines that nobody can read."""
import ast
import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest

import common
import compare

ROOT = Path(__file__).parent.parent
BUDGET = {"model.py": 220, "data.py": 284, "tinytales/cache.py": 103, "tinytales/story.py": 400,
          "tinytales/concepts.py": 120, "tinytales/prompts.py": 100, "pretrain.py": 170, "common.py": 173,
          "fused.py": 250, "spd.py": 442, "report/curve.py": 60, "clt.py": 310, "molt.py": 311, "evals.py": 279,
          "baselines.py": 150, "studies/bench.py": 450, "sae.py": 345, "transcoder.py": 321, "compare.py": 424,
          "report/table.py": 325, "report/pictures.py": 170, "studies/tune.py": 200, "report/noise.py": 70,
          "studies/length.py": 260, "metrics/atoms.py": 108, "metrics/concepts.py": 243, "metrics/effects.py": 131,
          "metrics/faithful.py": 110, "metrics/llm.py": 101, "metrics/masks.py": 77, "metrics/matching.py": 272,
          "metrics/recording.py": 137, "metrics/stability.py": 152, "metrics/words.py": 228}
# common.py: 120, the switch to oneDNN's matrix products, worth 1.5x to every script, and glibc's memory, worth 8 %;
# and the limits of flags, some for all scripts; and the two optimizers that every method may have.
# data.py and tinytales/cache.py: 300 together, and three splits at once, each of enough tokens; and activations.
# spd.py: 330 and the four kinds of Gamma, of which the toys need one more than the default, an adversary more, --sweep
# and the signed strengths of its units.
# clt.py: 240, the second way to be sparse, the scales folded back, the figures of all MLPs at once, and its tensors as
# the matrices that Muon turns.
# molt.py: 240, the transforms that sum to the weights, the second objective, the scales folded back, and Muon.
# pretrain.py: 150, the start of the heads for induction.
# bench.py: 250, and the activation-space methods beside public trainers.
# sae.py and transcoder.py: 220 was for one variant; each has five, two objectives, two optimizers, and sae.py three sites.
# table.py, pictures.py: what compare.py found, as text and files and as pictures; compare.py keeps what is run, now
# with a judge, and more controls; table.py says which numbers beat their nulls, and reads each row's curve at one L0.
# noise.py: what is larger than the spread over seeds.
# tune.py: optimizers and learning rates, tried alike for all rows; 130, and a table that several runs put rows into.
# story.py, concepts.py and prompts.py are what data.py would hold if it were one file
PACKAGES = ("metrics", "report", "studies", "tinytales")
FILES = [path for folder in (".", *PACKAGES) for path in sorted((ROOT / folder).glob("*.py"))
         if path.name != "__init__.py"]
TABLES = {"tinytales/words.py"}                                        # words and sentences, no code


def name(path):
    """Of a file in this repository, as the README has it: report/table.py."""
    return path.relative_to(ROOT).as_posix()


def imported(path):
    return importlib.import_module(name(path).removesuffix(".py").replace("/", "."))


SCRIPTS = [path for path in FILES if name(path) not in TABLES]


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_files_stay_small_and_narrow(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= BUDGET[name(path)]
    assert [i for i, line in enumerate(lines, 1) if len(line) > 120] == []


def configs():
    for path in SCRIPTS:
        module = imported(path)
        for value in list(vars(module).values()):
            if dataclasses.is_dataclass(value) and value.__module__ == module.__name__ and value.__name__ == "Config":
                yield pytest.param(path, value, id=name(path))


@pytest.mark.parametrize("path, Config", list(configs()))
def test_every_flag_is_used_and_explained(path, Config):
    source = path.read_text()
    head, body = source.split("class Config", 1)
    for f in dataclasses.fields(Config):
        assert re.search(rf"^    {f.name}: .*# \w", body, re.M), f"--{f.name} has no help"
        used = re.findall(rf"\b(?:cfg|self\.cfg)\.{f.name}\b|\"{f.name}\"", body)
        assert used, f"--{f.name} is used nowhere"


def commands():
    """[(module, its arguments)] of the README's commands."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    out = []
    for _, script, *args in (shlex.split(line.split("&&")[-1]) for line in lines if "python " in line):
        if script != "-m":
            out.append((Path(script).stem, args))
        elif args[0] != "pytest":
            out.append((args[0], args[1:]))
    return out


def test_readme_commands_parse(capsys):
    assert len(commands()) >= 5
    for module, args in commands():
        args = args[1:] if module == "studies.bench" else args      # its first word names the job
        assert common.cli(importlib.import_module(module).Config, args), module


def test_commands_are_printed_as_they_are_typed(capsys):
    with pytest.raises(SystemExit):
        common.cli(importlib.import_module("studies.tune").Config, ["--zzz"])
    assert "(see python -m studies.tune --help)" in capsys.readouterr().err
    for module in ("spd", "studies.tune", "studies.bench"):
        cfg = common.cli(importlib.import_module(module).Config, [])
        typed = f"python -m {module} " if "." in module else f"python {module}.py "
        assert capsys.readouterr().out.startswith(f"$ {typed}") and common.command(cfg).startswith(typed)


def test_the_top_level_trains_or_is_what_training_needs():
    """Each file there is a command of the README, or imported by a method."""
    def imports(method):
        for node in ast.walk(ast.parse(Path(compare.METHODS[method].module.__file__).read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.module
    needed = {*re.findall(r"python (\w+)\.py", (ROOT / "README.md").read_text())}
    needed |= {module for method in compare.METHODS for module in imports(method)}
    assert [path.name for path in sorted(ROOT.glob("*.py")) if path.stem not in needed] == []


def test_readme_names_every_file():
    table = (ROOT / "README.md").read_text()
    for path in FILES:
        assert f"`{name(path)}`" in table, name(path)
