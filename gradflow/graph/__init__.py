"""The layer graph: where the gradient goes, and what stops it.

`LayerGraph` holds a graph record and answers questions about it; every answer is a frozen record of
numbers. This folder never calls a model.
"""

from gradflow.graph.bottlenecks import Bottleneck
from gradflow.graph.circulation import Circulation
from gradflow.graph.compare import EdgeChange, GraphChange, NodeChange
from gradflow.graph.critical import CriticalPoint
from gradflow.graph.flow import FlowNumbers
from gradflow.graph.hodge import HodgeDecomposition
from gradflow.graph.layer_graph import Edge, LayerGraph, Node
from gradflow.graph.paths import GradientPath
from gradflow.graph.reach import Unreachable

__all__ = [
    "Bottleneck",
    "Circulation",
    "CriticalPoint",
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
