import warnings

import pytest

from raycompress.pareto import Point, marked
from raycompress.results import Curve, JobResult, ModelRow, SearchStep, TrialResult
from raycompress.tracking.figures import (
    allocation_figure,
    pareto_figure,
    search_figure,
    sensitivity_figure,
)


def job(num_groups, num_trials):
    names = [f"backbone.encoder.layers.{i}.attention.output.dense" for i in range(num_groups)]
    row = ModelRow(
        name="slim", params=9, nonzero_params=9, macs=50, file_bytes=9, score_validation=0.8
    )
    trials = tuple(
        TrialResult(
            name=f"L1Filter-macs50-seed{i}",
            pruner="L1Filter",
            counts=tuple((name, 1 + i, 16) for name in names),
            rows=(row,),
            curve=tuple(
                SearchStep(step=s, score=0.5, loss=1.0, best_score=0.5, best_loss=1.0, dfe=s + 1.0)
                for s in range(1 + 4 * (i % 2))
            ),
        )
        for i in range(num_trials)
    )
    return JobResult(
        name="demo",
        score_name="accuracy",
        output="",
        dense=ModelRow(
            name="dense",
            params=20,
            nonzero_params=20,
            macs=100,
            file_bytes=20,
            score_validation=0.9,
        ),
        trials=trials,
        sensitivity=tuple(
            Curve(group=n, num=16, points=((0.1, 0.9), (0.5, 0.7))[: 1 + i % 2])
            for i, n in enumerate(names)
        ),
    )


def points(num_trials, *, timed=False):
    ms = {"latency_ms": 2.0} if timed else {}
    found = [Point(id="d", stage="dense", macs=100, params=20, score=0.9, loss=0.1, **ms)]
    for i in range(num_trials):
        name = f"L1Filter-macs50-seed{i}"
        finals = {"trial": name, "macs": 50, "params": 9 + i, "loss": 0.2}
        found.append(Point(id=f"f{i}", stage="final", score=0.8 - i / 100, **finals, **ms))
        found.append(Point(id=f"s{i}", step=0, score=0.3 + i / 100, **finals))
        found.append(Point(id=f"w{i}", step=0, score=0.01, **finals))
    return marked(found)


@pytest.mark.parametrize(("num_groups", "num_trials"), [(1, 1), (5, 2), (60, 8)])
def test_figures_render_at_a_printable_size(num_groups, num_trials, tmp_path):
    result = job(num_groups, num_trials)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for draw in (sensitivity_figure, allocation_figure, search_figure, pareto_figure):
            more = (points(num_trials, timed=True),) if draw is pareto_figure else ()
            figure = draw(result, *more)
            figure.savefig(tmp_path / "figure.png", dpi=50)
            assert figure.get_size_inches()[1] < 15, draw.__name__


def test_fronts_are_drawn_of_everything_and_of_what_searches_judged():
    figure = pareto_figure(job(2, 3), points(3))
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    # All trials cost 50%: the front is the best of them and the dense model.
    assert list(lines["front"].get_xdata()) == [50.0, 100.0]
    assert list(lines["front"].get_ydata()) == [0.8, 0.9]
    assert list(lines["front before recovery"].get_ydata()) == [0.32, 0.9]
    # What is far below is shown at the lower end, and doesn't stretch the scale.
    worse = lines["further down"].get_ydata()
    assert len(worse) == 3 and figure.axes[0].get_ylim()[0] < worse[0] and worse[0] > 0.1
    assert [axes.get_xlabel().split(",")[0] for axes in figure.axes] == [
        "multiply-adds",
        "parameters",
    ]
    assert len(pareto_figure(job(2, 3), points(3, timed=True)).axes) == 3


def test_labels_tell_groups_apart():
    labels = [t.get_text() for t in sensitivity_figure(job(60, 1)).axes[0].get_yticklabels()]
    assert len(set(labels)) == 60 and labels[7] == "…7.attention.output.dense (16)"
