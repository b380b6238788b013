"""Plant faults, one at a time, and see whether a test or a chapter notices: `make mutants`.

A mutant is one change of an operator (+ and -, * and /), a comparison (< and <=, == and !=), a sign or an index in a
module that computes.
It is caught if a test that needs no trained run fails on it, or a cell of the module's chapter that holds without a
run; what is left is put to the tests that
train a small run first (--quick leaves them out: they take a minute or two a mutant).
tests/survivors.yaml says of those that were looked at why nothing fails."""
import argparse, ast, copy, importlib, io, json, os, random, resource, signal, sys, tempfile, time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
TESTS = {"templates": ["prompts"], "prompts": ["prompts", "equations"], "engine": ["engine", "heads", "sizes"],
         "encoder": ["equations", "encoders"], "scorer": ["sizes", "equations", "scorer", "heads", "engine"],
         "recommender": ["equations", "scorer", "models", "heads", "told"], "gather": ["equations", "study"],
         "measures": ["metrics", "equations"], "statistics": ["statistics", "metrics", "sensitivity"],
         "metrics": ["metrics"], "titles": ["titles"], "sensitivity": ["sensitivity"], "robustness": ["robustness"],
         "study": ["study"]}
# the same, with a trained run
TRAINED = {"encoder": ["models"], "scorer": ["scorer"], "recommender": ["scorer", "models"], "gather": ["study"],
           "robustness": ["robustness"], "study": ["study"]}
# what the tests' trained run is made without: one serves all their mutants
AFTER = "gather", "robustness", "study"
# imported once for all forks
HEAVY = ("pytest", "polars", "torch", "peft", "accelerate", "scipy.stats", "sklearn.metrics", "sklearn.neighbors",
         "sklearn.linear_model", "sklearn.feature_extraction.text", "matplotlib.pyplot", "ir_measures", "nbformat",
         "rich.console", *(f"transformers.models.{name}" for name in ("auto.tokenization_auto", "t5.modeling_t5",
         "t5.tokenization_t5", "bert.modeling_bert", "bert.tokenization_bert", "llama.modeling_llama",
         "qwen2.modeling_qwen2", "gpt2.modeling_gpt2")))
# what makes pictures and text is looked at, not asserted
SHOWN = "plot", "draw", "picture", "caption", "notes", "write", "page", "html", "markdown", "render_", "label", "colour"
SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
         ast.Pow: ast.Mult,
         ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
# a mutant that computes longer, or is at it for ten times as long, is caught: it never ends
SECONDS = {False: 120, True: 1200}


def texts(node):
    "Whether an operand is a text or a list, so that + is no arithmetic."
    return (isinstance(node, (ast.JoinedStr, ast.List, ast.Tuple, ast.ListComp)) or isinstance(node, ast.Constant)
            and isinstance(node.value, str))


def changes(node):
    "The mutants of one node: functions that change it in place."
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPS and not texts(node.left) and not texts(node.right):
        yield lambda n: setattr(n, "op", SWAPS[type(n.op)]())
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield lambda n: n.ops.__setitem__(0, SWAPS[type(n.ops[0])]())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield lambda n: setattr(n, "op", ast.UAdd())
    if isinstance(node, ast.Subscript):
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        bounds = [b for p in parts for b in ((p.lower, p.upper) if isinstance(p, ast.Slice) else (p,))]
        for i, b in enumerate(bounds):
            if isinstance(b, ast.Constant) and isinstance(b.value, int) and not isinstance(b.value, bool):
                yield lambda n, i=i: bump(n, i)


def bump(node, i):
    "Move the i-th index or bound of a subscript by one."
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    bounds = [b for p in parts for b in ((p.lower, p.upper) if isinstance(p, ast.Slice) else (p,))]
    bounds[i].value += 1


def computing(tree):
    "Numbers of the nodes in functions and classes that compute, without messages, defaults and annotations."
    def visit(node):
        if isinstance(node, (ast.Raise, ast.Assert, ast.arguments, ast.AnnAssign)) or isinstance(node,
                (ast.FunctionDef, ast.ClassDef)) and any(w in node.name.lower() for w in SHOWN):
            return
        yield node
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list"): continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST): yield from visit(child)
    inside = {id(n) for top in tree.body if isinstance(top, (ast.FunctionDef, ast.ClassDef)) for n in visit(top)}
    return [i for i, n in enumerate(ast.walk(tree)) if id(n) in inside]


def owner(tree, line):
    "The function that a line belongs to."
    return next((n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))
                 and n.lineno <= line <= n.end_lineno), "")


def mutants(module):
    "(name, line, changed source) of every mutant of a module."
    source = (ROOT/f"ganprompt/{module}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    nodes, names = list(ast.walk(tree)), Counter()
    for i in computing(tree):
        for change in changes(nodes[i]):
            other = copy.deepcopy(tree)
            node = list(ast.walk(other))[i]
            before = ast.unparse(node); change(node)
            name = f"{module}.{owner(tree, node.lineno)}: {before} -> {ast.unparse(node)}"
            names[name] += 1
            yield name + f" ({names[name]})"*(names[name] > 1), node.lineno, ast.unparse(other)


def package(folder, module, source):
    "A copy of the package in which one module is another; the rest are links, so that data and chapters are found."
    (folder/"ganprompt").mkdir()
    for path in (ROOT/"ganprompt").glob("*.py"): (folder/"ganprompt"/path.name).symlink_to(path)
    changed = folder/"ganprompt"/f"{module}.py"
    changed.unlink(); changed.write_text(source, encoding="utf-8")


def cells(module):
    "The cells of a module's chapter that are not exported."
    path = next((ROOT/"nbs").glob(f"*_{module}.ipynb"))
    code = ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"]
            == "code"]
    return [c for c in code if "#| export" not in c and "#| default_exp" not in c and "nbdev_export" not in c]


def chapter(module):
    "Numbers of the cells that raise nothing; stages cannot be made."
    import matplotlib; matplotlib.use("agg")
    import ganprompt.runs as runs
    def no(*_, **__): raise RuntimeError("no runs here")
    for name in ("stage", "manifest", "need"): setattr(runs, name, no)
    space, held = {"__name__": "chapter"}, []
    exec(f"import numpy as np, polars as pl\nimport ganprompt.{module} as _m\nglobals().update(vars(_m))", space)
    space["__name__"] = "chapter"
    for i, source in enumerate(cells(module)):
        try: exec(compile(source, f"cell {i}", "exec"), space); held.append(i)
        except Exception: pass
    return held


class WithoutRuns:
    "A pytest plugin: only tests that need no trained run."
    def pytest_collection_modifyitems(self, config, items):
        items[:] = [i for i in items if not {"finished", "studied", "reworded", "shown"} & set(i.fixturenames)]


def noticed(module, expected, trained):
    "What fails in this process: '' or the first test or cell."
    import pytest
    said, files = io.StringIO(), (TRAINED if trained else TESTS)[module]
    with redirect_stdout(said), redirect_stderr(said):
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=line", "--rootdir", str(ROOT),
                            *(str(ROOT/f"tests/test_{t}.py") for t in files)], plugins=[] if trained
                            else [WithoutRuns()])
    if code:
        return next((line for line in said.getvalue().splitlines() if line.startswith(("FAILED", "ERROR"))),
                    f"pytest ends with {code}")
    if trained: return ""
    with redirect_stdout(said), redirect_stderr(said): held = chapter(module)
    lost = sorted(set(expected or held) - set(held))
    return f"cell {lost[0]} of the chapter" if lost else "" if expected else json.dumps(held)


def in_fork(module, source, expected, trained=False):
    "`noticed` in a fork of this process, with a changed module, which the processes that tests start import too."
    with tempfile.TemporaryDirectory() as folder:
        package(Path(folder), module, source)
        pid = os.fork()
        if not pid:
            try:
                os.chdir(folder)
                os.setpgid(0, 0)
                resource.setrlimit(resource.RLIMIT_CPU, (SECONDS[trained],)*2)
                sys.dont_write_bytecode = True
                sys.path.insert(0, folder)
                os.environ["PYTHONPATH"] = folder
                answer = noticed(module, expected, trained)
            except BaseException as e: answer = f"{type(e).__name__} at import"
            Path(folder, "answer").write_text(answer); os._exit(0)
        end = time.time() + 10*SECONDS[trained]
        while time.time() < end:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return Path(folder, "answer").read_text() if Path(folder, "answer").exists() else "the process died"
            time.sleep(.05)
        os.killpg(pid, signal.SIGKILL); os.waitpid(pid, 0)
        return f"not done after {10*SECONDS[trained]} s"


def main():
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("--each", type=int, default=18, help="mutants of each module, drawn at random")
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--modules", default=",".join(TESTS))
    ask.add_argument("--workers", type=int, default=os.cpu_count())
    ask.add_argument("--quick", action="store_true", help="only tests that need no trained run")
    a = ask.parse_args()
    sys.path.insert(0, str(ROOT/"tests"))
    for name in HEAVY: importlib.import_module(name)
    known, counts, left = yaml.safe_load((ROOT/"tests/survivors.yaml").read_text()) or {}, {}, []
    home = tempfile.TemporaryDirectory()
    for module in a.modules.split(","):
        every = list(mutants(module))
        gone = {k for k in known if k.startswith(f"{module}.")} - {name for name, *_ in every}
        if gone: sys.exit(f"tests/survivors.yaml names mutants that there are not: {', '.join(sorted(gone))}")
        drawn = sorted(random.Random(f"{a.seed} {module}").sample(every, min(a.each, len(every))), key=lambda m: m[1])
        whole = in_fork(module, (ROOT/f"ganprompt/{module}.py").read_text(), None)
        if not whole.startswith("["): sys.exit(f"{module}: tests or chapter fail as they are: {whole}")
        if module in AFTER: os.environ["TESTS_SHARE"] = home.name
        else: os.environ.pop("TESTS_SHARE", "")
        def put(m):
            return (in_fork(module, m[2], json.loads(whole))
                    or ("" if a.quick or module not in TRAINED else in_fork(module, m[2], None, True)))
        with ThreadPoolExecutor(a.workers) as pool: answers = list(pool.map(put, drawn))
        counts[module] = (sum(map(bool, answers)), len(drawn), len(every))
        print(f"{module:12} {counts[module][0]:3} of {len(drawn)} caught ({len(every)} there are)", flush=True)
        for (name, line, _), answer in zip(drawn, answers):
            if answer: print(f"    caught   {name}: {answer[:110]}")
            else: print(f"    SURVIVES line {line} {name}: {known.get(name, 'not looked at')}"); left.append(name)
    caught, of = (sum(c[i] for c in counts.values()) for i in (0, 1))
    print(f"{caught} of {of} caught, {caught/of:.1%}; {len(left)} survive")


if __name__ == "__main__": main()
