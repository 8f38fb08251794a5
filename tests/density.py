"""How dense is the code? The measures that tests/test_repo.py holds every file to, and what breaks them, by line.

    python tests/density.py spd.py sae.py       # a line of measures for each file, then its faults

A simple statement is one without a body; its weight is the number of its nodes in the syntax tree. Docstrings, comments
and blank lines are free.
"""
import ast
import statistics
import sys
from pathlib import Path

P90, HEAVIEST, COLUMNS, LENGTH = 32, 80, 100, 45    # weights of statements; width of lines; code lines of a function
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSION = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LITERAL = (ast.Constant, ast.List, ast.Tuple, ast.Dict, ast.Set, ast.JoinedStr)
CONDITION = (ast.Compare, ast.BoolOp)


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def simple_statements(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and not hasattr(node, "body") and not is_docstring(node):
            yield node


def weight(node):
    return sum(1 for _ in ast.walk(node))


def is_table(statement):
    """Is it a table of constants: a name bound to a literal in which no more than names are called?"""
    if not isinstance(statement, (ast.Assign, ast.AnnAssign)) or not isinstance(statement.value, LITERAL):
        return False
    return not any(isinstance(node, (*COMPREHENSION, ast.Lambda, ast.IfExp)) for node in ast.walk(statement))


def names(node):
    return {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}


def code_lines(function):
    """Lines of a function that hold code: neither docstring nor comment nor blank."""
    documented = {line for node in ast.walk(function) if is_docstring(node)
                  for line in range(node.lineno, node.end_lineno + 1)}
    coded = {line for node in ast.walk(function) if isinstance(node, (ast.expr, ast.stmt)) and not is_docstring(node)
             for line in (node.lineno, node.end_lineno)}
    return len(coded - documented)


def faults_of(node):
    """What one node of the tree does that a plain line would not."""
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple):
        if not names(node.targets[0]) & names(node.value):
            yield "a tuple assignment of independent values"
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Tuple):
        yield "a tuple as a statement"
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
        yield "a lambda bound to a name"
    if isinstance(node, (ast.If, ast.While)) and any(isinstance(n, ast.NamedExpr) for n in ast.walk(node.test)):
        yield "a walrus inside a condition"
    if isinstance(node, COMPREHENSION):
        inside = [n for n in ast.walk(node) if isinstance(n, COMPREHENSION)]
        if len(inside) > 1 or len(node.generators) > 1:
            yield "a comprehension inside another, or with two for"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        for one, other in ((node.left, node.right), (node.right, node.left)):
            is_bool = isinstance(other, ast.Call) and getattr(other.func, "id", "") == "bool"
            if isinstance(one, LITERAL) and (isinstance(other, CONDITION) or is_bool):
                yield "a literal multiplied by a condition"
    if isinstance(node, FUNCTION):
        length = code_lines(node)
        if length > LENGTH:
            yield f"{length} lines of code in {node.name}"
        if sum(isinstance(n, FUNCTION) for n in ast.walk(node)) > 2:
            yield f"two functions inside {node.name}"


def measure(path):
    """(nodes of the file, median and 90th percentile of its statements' weights, [its faults])."""
    text = Path(path).read_text(encoding="utf-8")
    tree = ast.parse(text)
    statements = list(simple_statements(tree))
    weights = sorted(weight(s) for s in statements if not is_table(s))
    p90 = weights[int(0.9 * len(weights))] if weights else 0
    faults = [f"{i}: {len(line)} columns" for i, line in enumerate(text.splitlines(), 1) if len(line) > COLUMNS]
    for node in ast.walk(tree):
        faults += [f"{node.lineno}: {fault}" for fault in faults_of(node)]
    faults += [f"{s.lineno}: a statement of {weight(s)} nodes" for s in statements
               if weight(s) > HEAVIEST and not is_table(s)]
    if p90 > P90:
        faults.append(f"0: 90th percentile {p90}; heavy: "
                      + ", ".join(str(s.lineno) for s in statements if weight(s) > P90 and not is_table(s)))
    free = sum(weight(node) for node in ast.walk(tree) if is_docstring(node))
    return weight(tree) - free, statistics.median(weights or [0]), p90, faults


if __name__ == "__main__":
    for path in sys.argv[1:]:
        nodes, median, p90, faults = measure(path)
        print(f"{path:28} {nodes:6} nodes, median {median:g}, 90th percentile {p90}, {len(faults)} faults")
        for fault in sorted(faults, key=lambda f: int(f.split(":")[0])):
            print(f"    {path}:{fault}")
