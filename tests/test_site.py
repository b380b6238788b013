"The site: every page there, every link leads somewhere, nothing is fetched, one searches from disk, slides go on."
import base64, re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from chromium import Browser, browser, until
from ganprompt import site as S
from ganprompt.files import UserError, root


@pytest.fixture(scope="module")
def site(tmp_path_factory): return S.make_site(tmp_path_factory.mktemp("site")).parent


def test_every_chapter_how_to_and_module_has_a_page(site):
    for chapter in (p for p in (root()/"nbs").glob("[0-9]*.ipynb")):
        assert (site/f"nbs/{chapter.stem}.html").exists() and (site/f"api/{chapter.stem[3:]}.html").exists()
    for page in (root()/"docs").glob("*.md"): assert (site/f"docs/{page.stem}.html").exists()


def test_nothing_is_fetched(site):
    for page in site.rglob("*.html"):
        text = page.read_text("utf-8")
        found = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]+)|<link[^>]* href="([^"]+)', text)
        assert not [url for pair in found for url in pair if url.startswith(("http", "//"))], page


def test_a_formula_stays_in_its_sentence(site):
    "Also one that begins a line; and no TeX is left."
    page = (site/"nbs/12_encoder.html").read_text("utf-8")
    assert page.count("<math") > 20 and "\\mathcal" not in page and not re.search(r"<p>\s*<math[^>]*inline", page)


def test_a_link_that_leads_nowhere_is_told(tmp_path, monkeypatch):
    def broken(out):
        out.mkdir(); (out/"index.md").write_text("# Start\n\n[there](no/such/page.md)\n")
    monkeypatch.setattr(S, "stage_pages", broken)
    monkeypatch.setattr(S, "side_list", lambda pages: ["index.md"])
    with pytest.raises(UserError, match="no/such/page.md"): S.make_site(tmp_path/"site")


@browser
@pytest.mark.parametrize("width", [1440, 390])
def test_pages_are_as_wide_as_the_window(width, site, tmp_path):
    tab = Browser(tmp_path/"profile", width=width)
    try:
        for page in ("index", "nbs/12_encoder", "docs/results", "figures/robustness_beauty", "api/encoder"):
            tab.open(site/f"{page}.html")
            assert tab.js("document.documentElement.scrollWidth") <= width, page
        assert all(url.startswith(("file:", "data:")) for url in tab.requests[1:]) and not tab.faults
    finally: tab.close()


@browser
def test_one_searches_from_disk(site, tmp_path):
    tab = Browser(tmp_path/"profile")
    try:
        tab.open(site/"docs/runs.html")
        tab.js("document.querySelector('.md-search__input').focus()")
        tab.call("Input.insertText", text="discriminator")
        until(lambda: tab.js("document.querySelectorAll('.md-search-result__item').length") > 0)
        found = tab.js("[...document.querySelectorAll('.md-search-result__link')].map(a => a.href)")
        assert any("nbs/12_encoder.html" in url for url in found)
        assert all(url.startswith(("file:", "data:", "about:", "blob:")) for url in tab.requests[1:])
    finally: tab.close()


def test_no_result_is_typed_into_the_lecture():
    "Words on slides name no figure: those come from kept results."
    for cell in nbformat.read(root()/"nbs/lecture.ipynb", 4).cells:
        if cell.cell_type == "markdown": assert not re.findall(r"(?<!\d)\.\d\d|\d+ %", cell.source), cell.source


@browser
@pytest.mark.parametrize("width,height", [(1440, 900), (1280, 720), (1024, 768)])
def test_twelve_slides_fit_and_go_on_by_a_key(width, height, site, tmp_path):
    tab = Browser(tmp_path/"profile", width, height)
    def press(key): tab.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key)
    def at(): return tab.js("scrollY/innerHeight")
    try:
        tab.open(site/"lecture.html")
        assert tab.js("slides.length") == 12 and tab.js("[...document.images].every(image => image.naturalWidth > 0)")
        assert tab.js("slides.every(s => s.scrollHeight <= s.clientHeight && s.scrollWidth <= s.clientWidth)")
        for n in range(1, 12):
            press("ArrowRight")
            until(lambda: at() == n, 5)
        press("ArrowRight"); press("ArrowLeft")
        until(lambda: at() == 10, 5)
        assert all(url.startswith(("file:", "data:")) for url in tab.requests[1:]) and not tab.faults
    finally: tab.close()


def test_the_readmes_table_is_that_of_its_page():
    readme, page = ((root()/name).read_text("utf-8") for name in ("README.md", "figures/robustness_beauty.md"))
    def rows(text): return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()
                            if line.startswith("| ") and "[." in line and "](" not in line]
    kept = {row[0]: row for row in reversed(rows(page))} # the first table holds the levels
    assert len(rows(readme)) == 4 and len(readme.splitlines()) <= 120
    for name, clean, unseen, low in rows(readme): assert kept[name][2:5] == [clean, unseen, low]


def test_a_page_shows_what_a_chapter_has_shown(tmp_path):
    "A table, a picture beside the page, a text; of a hidden cell nothing."
    pixel = base64.b64encode(b"a picture").decode()
    cells = [new_code_cell(source, outputs=[new_output("execute_result", data)]) for source, data in (
        ("frame", {"text/html": "<table><tr><td>.25</td></tr></table>"}), ("plot", {"image/png": pixel}),
        ("number", {"text/plain": "1.5"}), ("#| hide\nsecret", {"text/plain": "not for readers"}))]
    nbformat.write(new_notebook(cells=cells), tmp_path/"99_toy.ipynb")
    text = S.chapter_page(tmp_path/"99_toy.ipynb", tmp_path).read_text("utf-8")
    (picture,) = re.findall(r"!\[png\]\((99_toy_files/.+)\)", text)
    assert (tmp_path/picture).read_bytes() == b"a picture"
    assert "```python\nframe" in text and "<td>.25</td>" in text and "\n    1.5\n" in text
    assert "secret" not in text and "not for readers" not in text
