"The notebooks as files: clean, portable, in order, and the package is what they export."
import ast, importlib, inspect, json, re, shutil, subprocess, sys
from dataclasses import fields

import nbformat
import pytest
from papermill.inspection import inspect_notebook

from ganprompt.files import root
from ganprompt.runs import Settings, settings_of
from ganprompt.jobs import chapters, read_parameters

NOTEBOOKS = sorted((root()/"nbs").glob("*.ipynb"))
CHAPTERS = [p for p in NOTEBOOKS if p.name[0].isdigit()]
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)


MINUTES = {"< 1": "less than a minute", "1": "about a minute", "2": "about two minutes", "4": "about four minutes"}


@each
def test_clean(path):
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    for cell in nb.cells:
        assert set(cell.metadata) <= {"tags"}
        if cell.cell_type == "code": assert cell.execution_count is None
    assert path.stat().st_size < 500_000


@each
def test_no_machine_paths(path):
    assert not re.findall(r"/(?:home|root|Users|work|opt|mnt)/\w+", path.read_text(encoding="utf-8"))


@each_chapter
def test_imports_go_down_the_list(path):
    order = [p.stem.split("_", 1)[1] for p in CHAPTERS]
    code = "\n".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
                     if c["cell_type"] == "code")
    imported = set(re.findall(r"(?:from|import) ganprompt\.(\w+)", code))
    assert imported <= set(order[:order.index(path.stem.split("_", 1)[1]) + 1])


@each_chapter
def test_papermill_sees_every_parameter(path):
    "Its reader passes over a line with two equals signs, in the help too."
    cells = nbformat.read(path, as_version=4).cells
    cell = next((c.source for c in cells if "parameters" in c.metadata.get("tags", [])), "")
    assert list(inspect_notebook(str(path))) == [n.target.id for n in ast.parse(cell).body]


@pytest.mark.parametrize("chapter", chapters(), ids=lambda c: c.stage)
def test_settings_have_a_field_for_each_line_of_the_parameters_cell(chapter):
    "Names, order, types, defaults and help are the same; the cell has `replace` besides."
    settings = settings_of(getattr(importlib.import_module(f"ganprompt.{chapter.stage}"), f"make_{chapter.stage}"))
    lines = [line.strip() for c in (Settings, settings) for line in inspect.getsource(c).splitlines()
             if re.match(r"    \w+:\w+=", line)]
    cell = {name: p for name, p in chapter.parameters.items() if name != "replace"}
    assert list(read_parameters("\n".join(lines), settings.__name__).items()) == list(cell.items())
    assert [(f.name, f.type.__name__, f.default) for f in fields(settings)] == [p[:3] for p in cell.values()]
    assert {"run", *settings.neutral} <= set(cell)


def may_be_long(source):
    "Whether a cell has nothing but classes, imports and data."
    def is_data(node):
        try: return [ast.literal_eval(node.value)]
        except ValueError: return []
    return all(isinstance(node, (ast.ClassDef, ast.Import, ast.ImportFrom))
               or isinstance(node, (ast.Assign, ast.AnnAssign)) and is_data(node) for node in ast.parse(source).body)


@each_chapter
def test_shape(path):
    "A title, a one-line subtitle, a module of the chapter's name, and short cells, not too many."
    cells = nbformat.read(path, as_version=4).cells
    assert re.match(r"# .+\n+> .+", cells[0].source)
    assert any(c.source.startswith(f"#| default_exp {path.stem.split('_', 1)[1]}") for c in cells)
    code = [c.source for c in cells if c.cell_type == "code"]
    assert len(code) <= 42
    for source in code: assert sum(map(bool, map(str.strip, source.splitlines()))) <= 25 or may_be_long(source), source


def test_exports_in_sync(tmp_path):
    for name in ("nbs", "ganprompt", "pyproject.toml"):
        (shutil.copytree if (root()/name).is_dir() else shutil.copy)(root()/name, tmp_path/name)
    subprocess.run([f"{sys.prefix}/bin/nbdev-export"], cwd=tmp_path, check=True)
    for path in (tmp_path/"ganprompt").glob("*.py"):
        assert path.read_text() == (root()/"ganprompt"/path.name).read_text(), "run nbdev-export"


def test_a_stage_can_be_made_without_its_lesson():
    "What a run executes of a chapter leaves the lesson's cells out: it names nothing that only they define."
    from ganprompt.launcher import job_cells
    for c in chapters():
        cells = job_cells(json.loads(c.path.read_text(encoding="utf-8"))["cells"])
        code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        done = subprocess.run([f"{sys.prefix}/bin/ruff", "check", "--isolated", "--select", "F821", "--output-format",
                               "concise", "-"], input=code, text=True, capture_output=True)
        assert f"make_{c.stage}(" in code and done.returncode == 0, (c.path.name, done.stdout)


@each
def test_lines_are_short(path):
    "120 columns, but for tables, formulas and commands."
    for c in nbformat.read(path, 4).cells:
        if c.cell_type == "raw": continue
        fenced = False
        for line in c.source.splitlines():
            if c.cell_type == "markdown" and line.strip().startswith("```"): fenced = not fenced
            prose = c.cell_type == "code" or not (fenced or re.match(r"\s*(\||\$\$|#|!\[)", line) or "$" in line)
            assert not prose or len(line) <= 120, line


def test_a_chapter_imports_only_from_chapters_with_a_lower_number():
    number = {p.stem.split("_", 1)[1]: int(p.stem.split("_")[0]) for p in (root()/"nbs").glob("[0-9]*.ipynb")}
    for name in number:
        imported = set(re.findall(r"^from \.(\w+) import", (root()/f"ganprompt/{name}.py").read_text(), re.M))
        assert not {other for other in imported if number[other] >= number[name]}, name


def test_every_name_in_contributing_is_there():
    text = (root()/"CONTRIBUTING.md").read_text()
    for line in text.splitlines():
        if chapter := re.search(r"\(nbs/\d\d_(\w+)\.ipynb\)", line):
            source = (root()/f"ganprompt/{chapter[1]}.py").read_text()
            for name in re.findall(r"`(\w+)`", line[chapter.end():]):
                assert re.search(rf"\b{name}\b", source), (name, chapter[1])
    for path in re.findall(r"\((nbs/[\w.]+)\)|`(data/[\w.]+)`", text):
        assert (root()/(path[0] or path[1])).exists(), path


def defined(path):
    "Public names that a module binds at its top, those of commands and of readers patched on `Run` left out."
    def made_for(node): return any(re.search(r"\bcommand\b|\bpatch\b", ast.unparse(d)) for d in node.decorator_list)
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): names = [] if made_for(node) else [node.name]
        else:
            targets = getattr(node, "targets", []) + ([node.target] if isinstance(node, ast.AnnAssign) else [])
            names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)
                     and isinstance(n.ctx, ast.Store)]
        yield from (name for name in names if not name.startswith("_"))


MODULES = sorted((root()/"ganprompt").glob("[a-z]*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_a_function_has_at_most_eight_arguments(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            a = node.args
            given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
            assert len(given) <= 8, getattr(node, "name", "lambda")


def bound(source):
    "Names that a cell binds, those of a loop and of a comprehension left out."
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): yield node.name
        for target in getattr(node, "targets", []):
            yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


@each_chapter
def test_a_lesson_leaves_the_names_of_its_module_alone(path):
    "A job runs in the names of its lesson: what is exported would find the lesson's in place of its own."
    module = root()/f"ganprompt/{path.stem.split('_', 1)[1]}.py"
    imported = {a.asname or a.name for node in ast.parse(module.read_text("utf-8")).body
                if isinstance(node, (ast.Import, ast.ImportFrom)) for a in node.names}
    lesson = [c.source for c in nbformat.read(path, as_version=4).cells
              if c.cell_type == "code" and "#| export" not in c.source and "tags" not in c.metadata]
    found = {name for source in lesson for name in bound(source)}
    assert not found & (imported | {*defined(module)})


def test_a_name_means_one_thing():
    "No public name is defined in two modules, and none is a module's; of commands, their words are the user's."
    home = {}
    for path in MODULES:
        for name in set(defined(path)): home.setdefault(name, []).append(path.stem)
    assert {name: where for name, where in home.items() if len(where) > 1} == {}
    assert {name: home[name] for path in MODULES if (name := path.stem) in home} in ({}, {"cli": ["cli"]})


@each_chapter
def test_no_chapter_imports_a_private_name(path):
    for c in nbformat.read(path, 4).cells:
        if c.cell_type != "code": continue
        for module, names in re.findall(r"from ganprompt\.(\w+) import (\([^)]*\)|[^\n;\"']*)", c.source):
            own = path.stem.endswith(f"_{module}") # code for another process
            assert own or not re.search(r"\b_\w", names), names


def opening_of(cells):
    "What stands between a chapter's title and its first section, in one line."
    first = next(i for i, c in enumerate(cells) if c.cell_type == "markdown" and "## " in c.source)
    return " ".join(" ".join(c.source for c in cells[:first] if c.cell_type == "markdown").split())


def shows_something(source):
    "Whether a cell asserts, or ends with a value."
    body = ast.parse(source).body
    return any(isinstance(n, ast.Assert) for n in ast.walk(ast.Module(body, []))) or isinstance(body[-1], ast.Expr)


@each_chapter
def test_a_chapter_opens_with_what_it_is_for_and_ends_with_two_exercises(path):
    "Its minutes are those of docs/chapters.md; both solutions are executed in the lesson, and none of them in a job."
    from ganprompt.launcher import job_cells
    cells = nbformat.read(path, as_version=4).cells
    said = re.search(r"After this chapter you can .+?\. It takes (.+?) on one core\b.*?\bGPU\b", opening_of(cells))
    at = [i for i, c in enumerate(cells) if c.cell_type == "markdown" and re.match("## Exercises\n", c.source)]
    assert said and at
    row = re.search(rf"^\| \[{path.stem}\].*\| *(.+?) *\|$", (root()/"docs/chapters.md").read_text("utf-8"), re.M)
    assert said[1] == MINUTES[row[1]]
    last = [c for c in cells[at[0]:] if not c.source.startswith("#| hide")]
    assert [c.cell_type for c in last] == ["markdown", "code"]*2
    assert [re.findall(r"^\*\*(\d)\.\*\*", c.source, re.M) for c in last[::2]] == [["1"], ["2"]]
    assert all(shows_something(c.source) and not c.source.startswith("#|") for c in last[1::2])
    if "\n## Run this stage" in "".join("\n" + c.source for c in cells if c.cell_type == "markdown"):
        assert not {c.id for c in last} & {c.id for c in job_cells(cells)}
