"The board: its figures are those of the studies' pages, and a report that cannot be is refused."
import copy, json, re, sys

import numpy as np
import polars as pl
import pytest
from chromium import Browser, browser, until

from ganprompt import board as B
from ganprompt.cli import main
from ganprompt.files import UserError, root
from ganprompt.pages import to_html
from ganprompt.robustness import make_report


@pytest.fixture(scope="module")
def report(finished, tmp_path_factory):
    "What the command leaves of a recommender of a run."
    return make_report(str(finished/"recommender/ganprompt"), users=8, out=str(tmp_path_factory.mktemp("report"))
                       ).with_suffix(".json")


def test_the_figures_are_those_of_the_studies_pages():
    for study, name in ("robustness", "robustness_toys"), ("ablation", "ablation_toys"):
        page = pl.read_csv(root()/f"figures/{name}.csv")
        rows = [row for row in B.asked_rows(study) if row["dataset"] == "Toys"]
        assert len(rows) == page["entry"].n_unique() > 5
        for row in rows:
            for said in page.filter(entry=row["model"]).iter_rows(named=True):
                found = [said[k] for k in ("value", "low", "high")]
                np.testing.assert_allclose(row[said["statistic"]], found, atol=1e-5)


def test_tables_rows_are_means_over_trainings_and_users():
    (row,) = (r for r in B.ranked_rows("tables") if (r["model"], r["dataset"]) == ("SASRec-CE", "Beauty"))
    page = pl.read_csv(root()/"figures/table2_beauty.csv")
    said = page.filter(model="SASRec-CE", metric="hit@10").row(0, named=True)
    np.testing.assert_allclose(row["clean"], [said[k] for k in ("measured", "low", "high")], atol=1e-5)
    assert row["reality"] == "ids" and row["unseen"] == "as clean" and row["trainings"] == 3
    silent = [r["model"] for r in B.ranked_rows("tables") if r.get("q05") == "as clean"]
    assert "CTRL" in silent and "TALLRec" not in silent # a question reaches the one only


def test_a_report_of_ones_own_stands_among_them(report, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ganprompt", "board", str(report), "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end: main()
    assert not end.value.code and "board.html" in capsys.readouterr().out
    table, said = pl.read_csv(tmp_path/"board.csv"), json.loads(report.read_text())
    row = table.filter(study="yours").row(0, named=True)
    assert len(table) == len(B.kept_rows()) + 1 and row["reality"] == "pocket" and row["users"] == 8
    assert row["clean"] == pytest.approx(said["by_template"][0]["hit@10"])
    assert row["own worst"] == pytest.approx(said["measured"]["unseen"]["hit@10"]["each_worst"])
    page = (tmp_path/"board.html").read_text()
    assert "onclick" in page and "http://" not in page and "https://" not in page and page.count("<tbody>") == 1


def other(said, *keys, value):
    said = copy.deepcopy(said)
    at = said
    for key in keys[:-1]: at = at[key]
    at[keys[-1]] = value
    return said


@pytest.mark.parametrize("keys, value, fault", [
    (("by_template", 3, "hit@10"), 1.5, "lies outside of 0 to 1"),
    (("by_template", 0, "hit@10"), .987, "not the first template's"),
    (("measured", "unseen", "hit@10", "avg"), .9, "the mean over unseen templates"),
    (("measured", "unseen", "hit@10", "q05"), .9, "q05 is not"),
    (("by_template", 5, "text"), "Buy {target_item} now {purchase_history}", "a template is not in templates.yaml"),
    (("by_template", 5, "id"), "own", "two templates have one id"),
    (("intervals", "by_split", "unseen", "avg"), [.5, .6, .7], "outside of its interval"),
    (("users",), 0, "nobody was asked"),
    (("measured",), {}, "KeyError"), (("intervals", "by_template"), None, "TypeError")])
def test_a_report_that_cannot_be_is_refused(keys, value, fault, report, tmp_path):
    said = json.loads(report.read_text())
    if keys[-1] == "id": value = said["by_template"][1]["id"]
    (tmp_path/"report.json").write_text(json.dumps(other(said, *keys, value=value)))
    with pytest.raises(UserError, match=fault): B.make_board([tmp_path/"report.json"], tmp_path/"out")
    assert not (tmp_path/"out").exists()


def test_what_is_no_report_is_refused(tmp_path):
    for text in "", "[]", "{}":
        (tmp_path/"report.json").write_text(text)
        with pytest.raises(UserError, match="is no report of this version"): B.report_row(tmp_path/"report.json")
    with pytest.raises(UserError, match="FileNotFoundError"): B.report_row(tmp_path/"none.json")


@browser
def test_a_click_on_a_head_sorts_by_number_or_word(tmp_path):
    "Largest first, then smallest; 4,144 is a number; what has none stands at one end."
    def row(model, users, clean, minutes):
        return dict(model=model, dataset="Toy", users=users, trainings=1, clean=[clean, clean - .1, clean + .1],
                    minutes=minutes)
    page = to_html(B.board_page([row("b", 300, .5, 2.), row("a", 4144, .25, None), row("c", 1000, .75, 10.)]))
    (tmp_path/"board.html").write_text(page)
    tab = Browser(tmp_path/"profile")
    try:
        tab.call("Page.navigate", url=(tmp_path/"board.html").as_uri())
        until(lambda: tab.js("document.querySelectorAll('tbody tr').length") == 3)
        def sorted_by(column):
            tab.js(f"document.querySelectorAll('thead th')[{B.BOARD.index(column)}].click()")
            return "".join(tab.js("[...document.querySelectorAll('tbody tr')].map(r => r.cells[0].textContent)"))
        assert [sorted_by(c) for c in ("users", "users", "clean", "model")] == ["acb", "bca", "cba", "abc"]
        assert sorted_by("minutes") == "cba" and not tab.requests[1:] and not tab.faults
    finally: tab.close()


def test_a_models_reality_has_a_name():
    "Also of entries whose models have read the web; what ties an entry to its backbones is a digest, and no name."
    said = {row["reality"] for row in B.kept_rows()}
    assert {"pocket", "sentence-transformers/all-MiniLM-L6-v2"} <= said
    assert not [name for name in said if re.fullmatch("[0-9a-f]{64}", name or "")]
