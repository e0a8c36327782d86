"""Whole trainings: healthy ones of many kinds that learn, and some that are well early and go bad late."""

from importlib import import_module

from .registry import CASES, Case, Training

_FAMILIES = """
    tables convolutional recurrent attention published generative contrastive losses graphs physics finetuned
    control agents late_plain late_deep late_made
"""
for _name in _FAMILIES.split():
    import_module(f"{__name__}.{_name}")  # its trainings register themselves

__all__ = ["CASES", "Case", "Training"]
