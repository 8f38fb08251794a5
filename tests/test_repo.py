"""Guards against rot: sizes, dead flags, a README whose commands no longer parse, lines that nobody can read."""
import ast
import builtins
import dataclasses
import importlib
import re
import shlex
import symtable
from pathlib import Path

import pytest

import common
import compare
import density

ROOT = Path(__file__).parent.parent
# Nodes of each file's syntax tree when the packages were made; a file may grow by SLACK, or a new figure is argued for.
NODES = {
    "apd.py": 3550,
    "baselines.py": 1780,
    "clt.py": 3890,
    "common.py": 5400,
    "compare.py": 5840,
    "data.py": 4450,
    "digits.py": 8280,
    "evals.py": 4820,
    "folders.py": 2050,
    "fused.py": 2590,
    "model.py": 3200,
    "molt.py": 3690,
    "pretrain.py": 2400,
    "sae.py": 4290,
    "scratch.py": 2400,
    "spd.py": 5840,
    "stochastic.py": 1980,
    "toys.py": 2460,
    "transcoder.py": 3990,
    "metrics/answers.py": 420,
    "metrics/atoms.py": 1580,
    "metrics/attribution.py": 6700,
    "metrics/chat.py": 2550,
    "metrics/columns.py": 90,
    "metrics/concepts.py": 4110,
    "metrics/effects.py": 2340,
    "metrics/faithful.py": 1900,
    "metrics/groups.py": 80,
    "metrics/llm.py": 1600,
    "metrics/mapping.py": 7300,
    "metrics/masks.py": 1590,
    "metrics/matching.py": 2680,
    "metrics/parts.py": 520,
    "metrics/recording.py": 1560,
    "metrics/sizes.py": 6410,
    "metrics/stability.py": 2620,
    "metrics/words.py": 3350,
    "report/curve.py": 700,
    "report/drawing.py": 1040,
    "report/gallery.py": 6760,
    "report/headline.py": 260,
    "report/maps.py": 2520,
    "report/narrative.py": 400,
    "report/noise.py": 720,
    "report/pictures.py": 1790,
    "report/table.py": 3560,
    "studies/across.py": 6300,
    "studies/bench.py": 5690,
    "studies/kept.py": 550,
    "studies/length.py": 3040,
    "studies/map.py": 5700,
    "studies/native.py": 2120,
    "studies/sizes.py": 9600,
    "studies/tune.py": 2200,
    "tinytales/cache.py": 1050,
    "tinytales/concepts.py": 1960,
    "tinytales/prompts.py": 1250,
    "tinytales/story.py": 4810,
}
SLACK = 1.15
PLAIN = {           # files that tests/density.py finds nothing wrong with, and that have to stay so
    "apd.py",
    "baselines.py",
    "clt.py",
    "common.py",
    "compare.py",
    "data.py",
    "digits.py",
    "evals.py",
    "folders.py",
    "fused.py",
    "model.py",
    "molt.py",
    "pretrain.py",
    "sae.py",
    "scratch.py",
    "spd.py",
    "stochastic.py",
    "toys.py",
    "transcoder.py",
    "metrics/answers.py",
    "metrics/atoms.py",
    "metrics/attribution.py",
    "metrics/chat.py",
    "metrics/columns.py",
    "metrics/concepts.py",
    "metrics/effects.py",
    "metrics/faithful.py",
    "metrics/groups.py",
    "metrics/llm.py",
    "metrics/mapping.py",
    "metrics/masks.py",
    "metrics/matching.py",
    "metrics/parts.py",
    "metrics/recording.py",
    "metrics/sizes.py",
    "metrics/stability.py",
    "metrics/words.py",
    "report/curve.py",
    "report/drawing.py",
    "report/gallery.py",
    "report/headline.py",
    "report/maps.py",
    "report/narrative.py",
    "report/noise.py",
    "report/pictures.py",
    "report/table.py",
    "studies/across.py",
    "studies/bench.py",
    "studies/kept.py",
    "studies/length.py",
    "studies/map.py",
    "studies/native.py",
    "studies/sizes.py",
    "studies/tune.py",
    "tinytales/cache.py",
    "tinytales/concepts.py",
    "tinytales/prompts.py",
    "tinytales/story.py",
}
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
def test_files_stay_small_and_plain(path):
    nodes, _, _, faults = density.measure(path)
    assert nodes <= SLACK * NODES[name(path)]
    assert name(path) not in PLAIN or faults == []


def test_density_sees_what_it_should(tmp_path):
    (tmp_path / "dense.py").write_text("\n".join((
        "a, b = 1, 2", "a, b = b, a", "f(), g()", "h = lambda x: x", "if (y := f()) > 1:", "    pass",
        "z = [[i for i in j] for j in k]", "w = [1] * (a > 2)", "v = " + " + ".join(["x"] * 40), "T = {'k': [1, 2, 3]}")))
    faults = density.measure(tmp_path / "dense.py")[3]
    assert [fault.split(":")[0] for fault in faults if not fault.startswith("0:")] == [
        "9", "1", "3", "4", "5", "7", "8", "9"]


def undefined(source):
    """Names that a module's functions read and that neither the module nor Python defines."""
    module = symtable.symtable(source, "module", "exec")
    defined = {symbol.get_name() for symbol in module.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    defined |= {*dir(builtins), "__file__", "__name__", "__doc__"}

    def scopes(table):
        yield table
        for child in table.get_children():
            yield from scopes(child)
    return {symbol.get_name() for table in scopes(module) for symbol in table.get_symbols()
            if symbol.is_global() and symbol.is_referenced()} - defined


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_every_name_is_defined(path):
    assert undefined(path.read_text()) == set()


def test_undefined_names_are_found():
    assert undefined("import os\ndef f(x):\n    return os.path, len(x), [y for y in x], z") == {"z"}


def configs():
    for path in SCRIPTS:
        module = imported(path)
        for value in list(vars(module).values()):
            if dataclasses.is_dataclass(value) and value.__module__ == module.__name__ and value.__name__ == "Config":
                yield pytest.param(path, value, id=name(path))


SHARED = {"transcoder.py": "sae.py", "scratch.py": "spd.py"}     # whose functions it gives its configuration to


@pytest.mark.parametrize("path, Config", list(configs()))
def test_every_flag_is_used_and_explained(path, Config):
    source = path.read_text()
    head, body = source.split("class Config", 1)
    if name(path) in SHARED:
        body += (ROOT / SHARED[name(path)]).read_text()
    for f in dataclasses.fields(Config):
        text = common.comments(Config).get(f.name, "")
        assert re.match(r"\w", common.RANGE.sub("", text)), f"--{f.name} has no help"
        assert f.type not in (int, float) or common.is_in(f.default, common.RANGE.match(text)[0]), f"--{f.name} has no range"
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
    """Each file there is a method, is imported by one or by what it imports, or is a command of the README."""
    def imports(path):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.module
    needed = set()
    asked = {*re.findall(r"python (\w+)\.py", (ROOT / "README.md").read_text())}
    asked |= {method.module.__name__ for method in compare.METHODS.values()}
    while asked:
        needed |= asked
        files = [ROOT / f"{module.replace('.', '/')}.py" for module in asked]
        asked = {module for path in files if path.exists() for module in imports(path)} - needed
    assert [path.name for path in sorted(ROOT.glob("*.py")) if path.stem not in needed] == []


def test_readme_names_every_file():
    table = (ROOT / "README.md").read_text()
    for path in FILES:
        assert f"`{name(path)}`" in table, name(path)
