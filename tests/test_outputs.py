"What chapters have shown is kept small, without a word of the machine; and the rest of their files is left alone."
import base64, io, json, platform, re, subprocess, sys, tempfile
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from ganprompt import outputs as O
from ganprompt.files import UserError, root

NOTEBOOKS = sorted((root()/"nbs").glob("*.ipynb"))
OF_A_MACHINE = [r"/(?:home|root|Users|work|opt|mnt|tmp|usr)/\w+", r"0x[0-9a-f]{6,}", r"\dT\d\d:\d\d", r"\x1b\[",
                r"\r[^\n]", re.escape(str(root())), re.escape(tempfile.gettempdir()) + r"/\w",
                *[rf"\b{re.escape(platform.node())}\b"]*(platform.node() not in ("", "localhost"))]


def outputs_of(path):
    return [o for c in nbformat.read(path, 4).cells if c.cell_type == "code" for o in c.outputs]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_in_the_repository_are_small_and_name_no_machine(path):
    for out in outputs_of(path):
        assert out.output_type != "error" and out.get("name") != "stderr"
        (form, text), = [("text/plain", out.text)] if out.output_type == "stream" else out.data.items()
        assert form in O.RICHEST and len(text) <= O.LARGEST
        if form == "image/png": assert Image.open(io.BytesIO(base64.b64decode(text))).width <= O.WIDEST
        else: assert not [m for p in OF_A_MACHINE for m in re.findall(p, text)]


def test_all_outputs_together_are_small():
    assert sum(len(json.dumps(o)) for path in NOTEBOOKS for o in outputs_of(path)) < 4e6


def png(mode="RGBA", size=(1600, 300)):
    image = Image.effect_noise(size, 50).convert(mode)
    image.save(data := io.BytesIO(), "PNG")
    return image.convert("RGB"), base64.b64encode(data.getvalue()).decode()


def test_a_picture_is_small_and_the_same():
    "Its colours are off by little, and a second time nothing changes."
    image, data = png()
    small = O.small_png(data)
    shown = Image.open(io.BytesIO(base64.b64decode(small)))
    assert len(small) < len(data) and shown.size == (1000, 188) and O.small_png(small + "\n") == small
    image.thumbnail((1000, 300))
    differ = [abs(a - b) for a, b in zip(image.tobytes(), shown.convert("RGB").tobytes())]
    assert sum(differ)/len(differ) < 2


def test_a_rare_colour_stays():
    "A dot of a legend beside all the shades of a scale."
    shades = Image.linear_gradient("L").resize((900, 300))
    image = Image.merge("RGB", (shades, shades.rotate(180), shades))
    image.paste((213, 94, 0), (10, 10, 16, 16))
    image.save(data := io.BytesIO(), "PNG")
    shown = Image.open(io.BytesIO(base64.b64decode(O.small_png(base64.b64encode(data.getvalue()).decode()))))
    assert max(abs(a - b) for a, b in zip(shown.convert("RGB").getpixel((12, 12)), (213, 94, 0))) < 16


@pytest.mark.parametrize("text, said", [
    (f"{root()}/data/demo", "./data/demo"), (f"in {root()}", "in ."), (f"{tempfile.mkdtemp()}/run/x", "…/run/x"),
    (f"{Path.home()}/.cache", "~/.cache"), (f"{Path.home()}stead", f"{Path.home()}stead"),
    (f"on {platform.node()}:", "on …:"), (f"{sys.prefix}/bin/python", ".venv/bin/python"),
    ("<A object at 0x7f3a9c0d1e50>, B", "<A object>, B"), ("\x1b[1;31mred\x1b[0m", "red"), ("0.25", "0.25"),
    ("made at 2026-01-31T09:07:52+0000 by process 46, 2026", "made at … by process …, 2026")])
def test_a_machine_is_not_named(text, said): assert O.nameless(text) == said


TABLE = {"text/plain": "shape: (1, 1)", "text/html": "<table><tr><td>1</td></tr></table>"}
WIDGET = {"text/plain": "IntSlider(value=0)", "application/vnd.jupyter.widget-view+json": {"model_id": "1"}}


@pytest.mark.parametrize("data, form", [
    (TABLE, "text/html"), ({"text/plain": "1.5"}, "text/plain"), ({"text/plain": "<Axes: >"}, None), (WIDGET, None),
    ({"text/plain": "polars.config.Config"}, None), ({"text/plain": "torch.float32"}, "text/plain"),
    (TABLE | {"text/html": f"<iframe srcdoc='{'x'*200_000}'></iframe>"}, "text/plain"),
    ({"text/html": "x"*200_000, "text/plain": "x"*200_000}, None), ({"application/javascript": "1"}, None)])
def test_the_richest_small_form_is_kept(data, form):
    made = O.tidy_output(new_output("execute_result", data, execution_count=3, metadata={"isolated": True}))
    assert made == (form and new_output("execute_result", {form: data[form]}, execution_count=None))


SHOWN = """import os, sys, tempfile, warnings
warnings.warn("slow")
for i in range(3): print(i, end="\\r", flush=True); print("bar", i, file=sys.stderr)
print("in", os.getcwd(), "and", tempfile.mkdtemp())"""


@pytest.fixture
def chapter(tmp_path):
    "A made-up chapter that shows what is kept and what is not."
    cells = [new_markdown_cell("# Toy"), new_code_cell("#| export\ndef f(): return 1\n'a value'"), new_code_cell(SHOWN),
             new_code_cell("import polars as pl\npl.DataFrame({'a': [f()]})"),
             new_code_cell("from matplotlib import pyplot as plt\nplt.plot([1, 2]);"), new_code_cell("object()"),
             new_code_cell("#| hide\n'not for readers'"), new_code_cell("assert f() == 1")]
    for i, cell in enumerate(cells): cell.id = f"toy-{i}"
    cells[2].metadata = {"tags": ["parameters"]}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": {
        "name": "python3", "display_name": "python3", "language": "python"}}), tmp_path/"99_toy.ipynb")
    return tmp_path/"99_toy.ipynb"


def test_a_chapter_gets_its_outputs_and_no_more(chapter, capsys):
    before = nbformat.read(chapter, 4)
    O.make_outputs([chapter])
    book = nbformat.read(chapter, 4)
    *_, shown, table, plot, _, _, _ = [c.get("outputs") for c in book.cells]
    assert [o.text for o in shown] == ["in … and …\n"] or re.fullmatch(r"in \S+ and …\n", shown[0].text)
    assert [list(o.data) for o in (*table, *plot)] == [["text/html"], ["image/png"]]
    assert [len(c.get("outputs", [])) for c in book.cells] == [0, 0, 1, 1, 1, 0, 0, 0]
    for cell in book.cells: cell.get("outputs", []).clear()
    assert book == before and chapter.name in capsys.readouterr().out


def test_nbdev_has_nothing_left_to_clean(chapter):
    O.make_outputs([chapter])
    before = chapter.read_bytes()
    for name in ("pyproject.toml", "settings.ini"): (chapter.parent/name).write_bytes((root()/name).read_bytes())
    subprocess.run([f"{sys.prefix}/bin/nbdev-clean", "--fname", chapter], cwd=chapter.parent, check=True)
    assert chapter.read_bytes() == before


def test_a_chapter_that_fails_is_told_and_left_as_it_was(chapter):
    book = nbformat.read(chapter, 4)
    book.cells[-1].source = "assert f() == 2, 'one is not two'"
    nbformat.write(book, other := chapter.with_name("98_bad.ipynb"))
    before = other.read_bytes()
    with pytest.raises(UserError, match="98_bad.ipynb: AssertionError: one is not two"):
        O.make_outputs([other, chapter])
    assert other.read_bytes() == before and outputs_of(chapter)
