"""Figures with matplotlib, an optional extra (`pip install "gradient-flow[plot]"`), one function a question.

    from gradflow.report import plots

| asks | call |
| --- | --- |
| where does the gradient go on its way from the loss | `plot_flow(report)` |
| what changes over steps, layer by layer | `plot_grid(record, "gradient")`, `share`, `activity`, `updates` |
| does the loss fall, does the gradient jump | `plot_loss(record)`, `plot_gradient_norm(record)` |
| what does each attention head do | `plot_attention(record, "entropy")`, `first`, `gradient` |
| how far back does the gradient reach | `plot_through_time(record)` |
| how sure is the policy | `plot_actions(record)` |
| what did a fix do | `plot_trial(trial)` |
| what feeds what, and with how much gradient | `draw_graph(record.graph)` |
| all of it at a glance | `plot_report(report)`, which is `report.plot()` |

Each takes `ax=`, axes to draw into, and returns the axes that it drew into: titles, limits, colours and
fonts are yours to change. `draw_graph` and `plot_report` return a figure. Nothing is shown and no backend is
chosen.

May import: `series`, `layout`, `wording`, and what is above `report`. Inside: `canvas` < the rest <
`overview`.
"""

from gradflow.report.plots.curves import (
    plot_actions,
    plot_gradient_norm,
    plot_loss,
    plot_through_time,
    plot_trial,
)
from gradflow.report.plots.flow import plot_flow
from gradflow.report.plots.graph import draw_graph
from gradflow.report.plots.grids import plot_attention, plot_grid
from gradflow.report.plots.overview import plot_report

__all__ = [
    "draw_graph",
    "plot_actions",
    "plot_attention",
    "plot_flow",
    "plot_gradient_norm",
    "plot_grid",
    "plot_loss",
    "plot_report",
    "plot_through_time",
    "plot_trial",
]
