"""The layer graph: where the gradient goes, and what stops it.

`LayerGraph` holds a graph record and has its queries as methods; a query returns numbers, mostly as a frozen
record. This folder never calls a model.

From low to high, each importing only from those before it: `table.py` (the record as arrays), `flow.py`
(gain, coherence, ω), `algebra/` (the Hodge decomposition), `data.py` (a record with all of these, which every
query takes), `values.py` (nodes and edges with their numbers) and `coarse/` (contraction, folding, parts),
`queries/` and `export.py`, `readers.py` (graphs from elsewhere), `layer_graph.py` (the public class).
"""

from gradflow.graph.algebra.hodge import HodgeDecomposition
from gradflow.graph.flow import FlowNumbers
from gradflow.graph.layer_graph import LayerGraph
from gradflow.graph.queries.bottlenecks import Bottleneck
from gradflow.graph.queries.circulation import Circulation
from gradflow.graph.queries.compare import EdgeChange, GraphChange, NodeChange
from gradflow.graph.queries.critical import CriticalPoint
from gradflow.graph.queries.cuts import Cut
from gradflow.graph.queries.paths import GradientPath
from gradflow.graph.queries.reach import Unreachable
from gradflow.graph.values import Edge, Node

__all__ = [
    "Bottleneck",
    "Circulation",
    "CriticalPoint",
    "Cut",
    "Edge",
    "EdgeChange",
    "FlowNumbers",
    "GradientPath",
    "GraphChange",
    "HodgeDecomposition",
    "LayerGraph",
    "Node",
    "NodeChange",
    "Unreachable",
]
