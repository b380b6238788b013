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
    assert ([p.name for p in draw_benchmarks()] == ["benchmarks-mine.png"]
            and draw_benchmarks()[0].stat().st_size > 10_000)
