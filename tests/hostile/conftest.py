"""What all tests of hostile models share: one thread, and a seed before each."""

from __future__ import annotations

from tests.functional.conftest import one_thread, seeded

__all__ = ["one_thread", "seeded"]
