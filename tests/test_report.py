"A run's report: results first, no network, formulas that a browser draws by itself, logs by their last line."
import json, re

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
import nbformat

from chromium import Browser, browser
from ganprompt import report as R
from ganprompt.runs import stage

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    "The page of a run of two stages; the second has a table, the first a log of a thousand lines."
    run = tmp_path_factory.mktemp("runs")/"toy"
    def made(folder):
        (folder/"table.html").write_text(f"<html><body><h1>Figures</h1><table><tr><td>{'wide '*300}</td></tr></table>"
                                         "</body></html>")
        return {"HR@10": .25}
    stage(str(run), "data", {}, lambda folder: {"rows": 7})
    stage(str(run), "metrics", {"resamples": 9}, made, inputs=["data"])
    (run/"run.json").write_text(json.dumps({"parameters": {"seed": 3}}))
    log = "".join(f"\rstep {i}" for i in range(1000)) + "\nsaved < 5 files\n"
    cells = [new_markdown_cell("# Data\n\n> Lists.\n\nOf $\\frac{x_i}{x_j} * x_i * y$ and `$HOME` $$\\sum_i \\ell_i$$"),
             new_code_cell("#| export\ndef hidden(): 1"),
             new_code_cell("shown()", outputs=[
                 new_output("stream", text=log), new_output("display_data", {"image/png": PIXEL, "text/plain": "x"}),
                 new_output("execute_result", {"text/plain": "<Figure & more>"})])]
    nbformat.write(new_notebook(cells=cells), run/"05_data.ipynb")
    nbformat.write(new_notebook(cells=[new_code_cell("1 + 1")]), run/"19_metrics.ipynb")
    return R.run_report(str(run), sorted(run.glob("*.ipynb")))


def test_results_come_first_and_definitions_not_at_all(page):
    order = ["<h3>Figures</h3>", "What ran", "What was chosen", "seed", "shown()"]
    places = [page.index(x, page.index("</nav>")) for x in order]
    assert places == sorted(places) and "hidden()" not in page
    assert "HR@10 0.25" in page and "rows 7" in page


def test_a_log_shows_its_last_line_and_a_progress_bar_its_end(page):
    assert "<summary><code>saved &lt; 5 files</code></summary><pre>step 999\nsaved &lt; 5 files</pre>" in page
    assert "step 998" not in page


def test_formulas_are_drawn_without_a_script(page):
    assert page.count("<math") == 2 and "<mfrac>" in page and 'display="block"' in page
    assert "<em>" not in page and "$HOME" in page and "\\frac" not in page


def test_every_formula_of_the_chapters_can_be_drawn():
    from ganprompt.files import root
    found = 0
    for path in sorted((root()/"nbs").glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "markdown": found += len(R.mathml(cell.source)[1])
    assert found > 300


def test_output_of_words_is_not_html(page): assert "<pre>&lt;Figure &amp; more&gt;</pre>" in page


def test_nothing_is_fetched(page):
    assert not re.search(r"<(script|link|iframe)|url\(|src=\"(?!data:)", page)


@browser
@pytest.mark.parametrize("width", [1440, 390])
def test_the_page_is_as_wide_as_the_window(width, page, tmp_path):
    (tmp_path/"report.html").write_text(page.replace("<details", "<details open"))
    tab = Browser(tmp_path/"profile", width=width)
    try:
        tab.open(tmp_path/"report.html")
        assert tab.js("document.documentElement.scrollWidth") <= width
        assert all(r.startswith("data:") for r in tab.requests[1:]) and not tab.faults
        assert tab.js("document.querySelector('math').getBoundingClientRect().height") > 20, "the fraction is drawn"
    finally: tab.close()
