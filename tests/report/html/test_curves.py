"""Curves, heat maps and the pictures of special measurements."""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ElementTree
import zlib

import numpy as np
import pytest
import torch
from torch import nn

import gradflow as gf
from gradflow.records import FlowRecord
from gradflow.report.html.curves import chart, heat_section, png
from gradflow.report.html.special import special_section
from tests.samples import chain_record


def pixels_of(data: bytes) -> np.ndarray:
    """Return the colours of a PNG without filters, read by its definition."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, found = 8, {}
    while place < len(data):
        (size,) = struct.unpack(">I", data[place : place + 4])
        kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + size]
        (checked,) = struct.unpack(">I", data[place + 8 + size : place + 12 + size])
        assert checked == zlib.crc32(kind + body)
        found[kind] = body
        place += 12 + size
    width, height = struct.unpack(">II", found[b"IHDR"][:8])
    lines = np.frombuffer(zlib.decompress(found[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(height, width, 3)


def test_a_picture_holds_the_colours_that_it_was_given() -> None:
    given = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    assert np.array_equal(pixels_of(png(given)), given)


def test_pictures_are_read_by_another_library() -> None:
    image = pytest.importorskip("PIL.Image")
    import io

    given = np.random.default_rng(0).integers(0, 256, (4, 9, 3)).astype(np.uint8)
    assert np.array_equal(np.asarray(image.open(io.BytesIO(png(given)))), given)


def test_a_heat_map_has_a_column_a_layer_and_a_row_a_step_the_smaller_the_bluer() -> None:
    import base64
    import re

    page = heat_section(chain_record(6, 9))
    first = re.findall(r"base64,([^\"]+)", page)[0]
    colours = pixels_of(base64.b64decode(first)).astype(int)
    assert colours.shape == (9, 6, 3)
    blueness = colours[0, :, 2] - colours[0, :, 0]
    assert (np.diff(blueness) < 0).all()
    assert "Gradient rms" in page
    assert "Share of expected" in page
    assert heat_section(FlowRecord(steps=0, losses=[], layers=(), parameters=())) == ""


def test_curves_say_where_nothing_is_finite_and_tell_their_ends() -> None:
    assert "nothing finite" in chart("loss", [("", np.array([np.nan, np.inf]))])
    text = chart("norm", [("a", np.array([1.0, 10.0, 100.0])), ("b", np.array([2.0, 0.0, 4.0]))], log=True)
    assert ElementTree.fromstring(text).tag == "figure"
    assert ">100<" in text
    assert ">1<" in text
    assert "step 2" in text


def test_attention_has_a_cell_for_every_layer_and_head() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    report = gf.diagnose(model, lambda: torch.randn(4, 6, 16), lambda y: y.square().mean(), steps=2)
    text = special_section(report.record)
    grids = ElementTree.fromstring(f"<div>{text}</div>").findall(".//figure")
    assert [sum(e.attrib.get("class") == "cell" for e in g.iter("rect")) for g in grids] == [12, 12, 12]
    shares = report.record.transformer.attention[0].entropy_share
    assert f"head 0: {float(np.median(shares[:, 0])):.3g}" in text


def test_recurrent_layers_show_the_gradient_through_time_though_nothing_is_sick() -> None:
    torch.manual_seed(0)
    report = gf.diagnose(nn.GRU(3, 8, batch_first=True), lambda: torch.randn(4, 7, 3),
                         lambda y: y[0].square().mean(), steps=2)  # fmt: skip
    assert report.ok
    text = special_section(report.record)
    assert "Gradient through time" in text
    assert "step 6" in text
    assert "l0: whole loss" in text
