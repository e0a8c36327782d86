"""The Hodge decomposition against dense least squares, closed forms and its own laws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradflow.graph import LayerGraph
from gradflow.graph.algebra.laplacian import laplacian_potentials
from tests.graph.dags import edges_of, network, networks, residual


def incidence(num: int, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    matrix = np.zeros((len(source), num))
    matrix[np.arange(len(source)), source] += 1.0
    matrix[np.arange(len(source)), target] -= 1.0
    return matrix


@settings(max_examples=80, deadline=None)
@given(networks(max_nodes=14))
def test_against_dense_least_squares(net):
    graph = net.graph
    d = incidence(len(graph), graph.table.source, graph.table.target)
    for hodge, omega in (
        (graph.hodge, graph.numbers.mean_omega),
        (graph.hodge_per_step, graph.numbers.omega),
    ):
        potential, *_ = np.linalg.lstsq(d, omega, rcond=None)
        np.testing.assert_allclose(hodge.cyclic, omega - d @ potential, atol=1e-9)
        np.testing.assert_allclose(d @ hodge.potential + hodge.cyclic, omega, atol=1e-12)
        np.testing.assert_allclose(d.T @ hodge.cyclic, 0.0, atol=1e-9)  # nothing is left to explain


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 60), st.integers(0, 1000))
def test_on_a_chain_the_potential_is_ln_of_the_norm(num, seed):
    graph = network([(i, i + 1) for i in range(num)], seed=seed, steps=3).graph
    np.testing.assert_allclose(graph.hodge_per_step.cyclic, 0.0, atol=1e-9)
    np.testing.assert_allclose(graph.hodge_per_step.potential, np.log(graph.numbers.grad_norm), atol=1e-9)
    np.testing.assert_allclose(graph.hodge.potential, np.log(graph.numbers.mean_grad_norm), atol=1e-9)
    np.testing.assert_allclose(graph.hodge.curl, 0.0, atol=1e-9)


def test_a_residual_block_shares_its_circulation_over_its_edges():
    graph = residual(0.1)
    cyclic = dict(zip(graph.edges, graph.hodge.cyclic, strict=True))
    third = np.log(0.1) / 3  # a lone cycle of three edges
    assert cyclic["a", "fc"] == pytest.approx(third)
    assert cyclic["fc", "add"] == pytest.approx(third)
    assert cyclic["a", "add"] == pytest.approx(-third)
    assert cyclic["add", "loss"] == pytest.approx(0.0, abs=1e-12)
    assert graph["fc"].curl == pytest.approx(abs(third))
    assert graph["add"].curl == pytest.approx(abs(third) * np.sqrt(2 / 3))
    assert graph["loss"].curl == pytest.approx(0.0, abs=1e-12)
    assert graph.edge("a", "fc").cyclic == pytest.approx(third)


def test_severed_edges_are_left_out_and_parts_stand_alone():
    graph = LayerGraph.from_flows(
        {"a": 0.0, "b": 3.0, "c": 2.0, "lone": 0.0, "loss": 1.0},
        {("a", "b"): 0.0, ("b", "c"): 3.0, ("c", "loss"): 0.0, ("lone", "loss"): 0.0},
    )
    assert np.isnan(graph["a"].potential)
    assert np.isnan(graph["a"].curl)
    assert np.isnan(graph.edge("a", "b").cyclic)
    np.testing.assert_allclose([graph["b"].potential, graph["c"].potential], np.log([3.0, 2.0]))


def test_the_potential_stands_at_the_loss_wherever_the_record_lists_it():
    graph = LayerGraph.from_flows({"loss": 1.0, "b": 2.0, "a": 5.0}, {("a", "b"): 3.0, ("b", "loss"): 2.0})
    assert graph["loss"].potential == 0.0
    assert graph["a"].potential == pytest.approx(np.log(3.0))  # what arrives there, though more was measured


def test_steps_that_sever_different_edges_are_solved_apart():
    graph = LayerGraph.from_flows(
        {"a": [1.1, 1.0], "fc": [1.0, 1.0], "add": [1.0, 1.0], "loss": [1.0, 1.0]},
        {
            ("a", "fc"): [0.1, 0.0],
            ("a", "add"): [1.0, 1.0],
            ("fc", "add"): [1.0, 1.0],
            ("add", "loss"): [1.0, 1.0],
        },
        ops=("add",),
    )
    cyclic = graph.hodge_per_step.cyclic
    assert cyclic[1, 0] == pytest.approx(-np.log(0.1) / 3)
    assert np.isnan(cyclic[0, 1])
    np.testing.assert_allclose(cyclic[1:, 1], 0.0, atol=1e-12)


def test_a_dense_core_goes_to_the_dense_solver():
    rng = np.random.default_rng(0)
    num = 120
    source, target = np.triu_indices(num, k=1)
    source = np.concatenate([source, np.arange(num, num + 50), [200, 201]])  # a tail and a part of its own
    target = np.concatenate([target, np.arange(num - 1, num + 49), [201, 202]])
    omega = rng.normal(size=(len(source), 2))
    s = laplacian_potentials(203, source, target, omega)
    d = incidence(203, source, target)
    expected, *_ = np.linalg.lstsq(d, omega, rcond=None)
    np.testing.assert_allclose(d @ s, d @ expected, atol=1e-9)


def test_parallel_edges_and_two_dense_parts():
    source, target = np.array([0, 0, 1]), np.array([1, 1, 2])
    s = laplacian_potentials(3, source, target, np.array([[1.0], [3.0], [5.0]]))
    assert s[0, 0] - s[1, 0] == pytest.approx(2.0)  # the mean of the two
    one, two = np.triu_indices(40, k=1)
    source, target = np.concatenate([one, one + 40]), np.concatenate([two, two + 40])
    omega = np.random.default_rng(1).normal(size=(len(source), 1))
    d = incidence(80, source, target)
    expected, *_ = np.linalg.lstsq(d, omega, rcond=None)
    np.testing.assert_allclose(d @ laplacian_potentials(80, source, target, omega), d @ expected, atol=1e-9)


def test_a_large_random_graph_against_sparse_least_squares():
    sparse = pytest.importorskip("scipy.sparse")
    linalg = pytest.importorskip("scipy.sparse.linalg")
    edges = np.array(edges_of(3, 800, 0.3))
    omega = np.random.default_rng(2).normal(size=(len(edges), 1))
    s = laplacian_potentials(800, edges[:, 0], edges[:, 1], omega)
    d = sparse.csr_matrix(incidence(800, edges[:, 0], edges[:, 1]))
    expected = linalg.lsqr(d, omega[:, 0], atol=1e-14, btol=1e-14, iter_lim=20_000)[0]
    np.testing.assert_allclose(d @ s[:, 0], d @ expected, atol=1e-7)


def test_the_decomposition_is_read_only_and_readable():
    hodge = residual(0.1).hodge
    with pytest.raises(ValueError, match="read-only"):
        hodge.cyclic[0] = 0.0
    assert repr(hodge) == "HodgeDecomposition(4 nodes, 4 edges, largest cyclic part 0.768)"
    assert "cyclic part 0)" in repr(LayerGraph.from_flows({"loss": 1.0}, {}).hodge)
