"What the benchmarks compare does the same work; and they run only when they are asked for."
import json

import pytest

from ganprompt.files import UserError
from ganprompt.benchmarks import (BenchmarksSettings, bench_data, draw_benchmarks, keep_benchmarks, make_benchmarks,
                                  plot_benchmarks)
from ganprompt.jobs import chapters


def test_pandas_and_ours_keep_the_same_rows(tmp_path):
    found = bench_data(30_000, 1, tmp_path)
    assert 0 < found["rows_left"] < 30_000 and not list(tmp_path.iterdir())
    assert found["rows_at_which_pandas_fills_it"] > 30_000 and min(found["peak_mb"]["ours"]) > 0


def test_benchmarks_run_on_demand_only():
    assert ([c.stage for c in chapters() if c.on_demand]
            == ["baselines", "titles", "p5", "collm", "ctrl", "gather", "study", "benchmarks"])


@pytest.mark.parametrize("bad, said", [(dict(bench_size="huge"), "bench_size='huge'.*t5-small"),
                                       (dict(bench_parts="training,speed"), "bench_parts='speed'.*scoring")])
def test_a_wrong_part_is_named(bad, said, finished):
    with pytest.raises(UserError, match=said): make_benchmarks(BenchmarksSettings(str(finished), **bad))


def test_a_part_that_fails_does_not_stop_the_others_and_results_are_kept(finished, tmp_path, monkeypatch):
    (tmp_path/"data/results").mkdir(parents=True); (tmp_path/"figures").mkdir()
    run = tmp_path/"mine"
    import shutil
    shutil.copytree(finished, run)
    shutil.rmtree(run/"recommender")
    folder = make_benchmarks(BenchmarksSettings(str(run), bench_parts="catalogue,ranking", bench_repeats=1))
    found = json.loads((folder/"benchmarks.json").read_text())
    assert ("recommend" in found["parts"]["catalogue"]["failed"]
            and found["parts"]["ranking"]["ratios"]["t5-decoder"] > 0)
    assert found["random_weights"] and found["versions"]["torch"] and len(plot_benchmarks(found).axes) == 1
    monkeypatch.setattr("ganprompt.files.workspace", lambda: tmp_path)
    with pytest.raises(UserError, match="no results"): draw_benchmarks()
    kept = json.loads(keep_benchmarks(str(run)).read_text())
    assert kept["parts"] == found["parts"] and kept["fingerprint"]
    assert ([p.name for p in draw_benchmarks()] == ["benchmarks-mine.png", "benchmarks-mine.pdf"]
            and draw_benchmarks()[0].stat().st_size > 10_000)


def test_growth_has_a_marker_and_a_safe_colour_for_each_line_and_all_is_as_wide_as_a_page():
    from ganprompt.figures import COLORS
    from ganprompt.pages import TWO_COLUMNS
    axes = {name: dict(sizes=[2, 4, 8], seconds=[1., s, s*s], exponent=e)
            for name, s, e in (("users", 2., 1.), ("candidates", 1.5, .58), ("tokens", 3., 1.58))}
    training = dict(seconds={"full": [8., 9.], "kept": [2., 3.]}, ratios={"full": 3.5})
    found = dict(parts=dict(training=training, growth=axes), machine="by hand", threads=1, random_weights=True,
                 size="pocket", llm="", run="toy")
    fig = plot_benchmarks(found)
    bars, growth = fig.axes
    lines = growth.get_lines()
    assert [line.get_ydata().tolist() for line in lines] == [[1, s, s*s] for s in (2, 1.5, 3)]
    assert [line.get_xdata().tolist() for line in lines] == [[1, 2, 4]]*3
    assert len({line.get_marker() for line in lines}) == len({line.get_color() for line in lines}) == 3
    assert {line.get_color() for line in lines} <= set(COLORS) and fig.get_size_inches()[0] == TWO_COLUMNS
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["users: exponent 1.00", "candidates: exponent 0.58",
                                                                  "tokens: exponent 1.58"]
    assert bars.patches[0].get_width() == 3.5
    assert {t.get_fontsize() for t in (*bars.texts, *bars.get_yticklabels())} == {7}
