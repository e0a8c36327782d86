"""What makes records show richly in notebooks."""

from __future__ import annotations


class Shown:
    """A record that a notebook shows as a piece of HTML; how it looks is up to `gradflow.report`."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        # Like FlowRecord.graph, an import against the layout's direction: records know nothing of rendering.
        from gradflow.report.notebook import notebook_html

        return notebook_html(self)
