"""The zoo: labelled models that are sick, each with its repair, and healthy ones that look suspicious."""

from importlib import import_module

from .registry import BFLOAT16, CASES, DTYPES, FLOAT32, TYPES, Case, Setup, call

_FAMILIES = """
    mlp mlp_training mlp_healthy cnn cnn_healthy rnn transformer transformer_healthy gan vae graph moe rl
    finetune metric detection diffusion
    contact1a_1 contact1a_2 contact1a_3 contact1b_1 contact1b_2 contact1b_3
    contact2a_1 contact2a_2 contact2a_3 contact2b_1 contact2b_2 contact2b_3
    contact3a_1 contact3a_2 contact3a_3 contact3b_1 contact3b_2
    contact4a_1 contact4a_2 contact4b_1 contact4b_2
    contact5a_1 contact5a_2 contact5a_3
    contact5b_1 contact5b_2 contact5b_3
    contact6a_1 contact6a_2 contact6a_3
    contact6b_1 contact6b_2 contact6b_3
    contact7a_1 contact7a_2 contact7a_3
    contact7b_1 contact7b_2 contact7b_3
    contact8a_1 contact8a_2 contact8a_3
    contact8b_1 contact8b_2 contact8b_3
    contact9a_1 contact9a_2 contact9a_3
    contact9b_1 contact9b_2 contact9b_3
    contact10a_1 contact10a_2
    contact10b_1 contact10b_2
    contact11a_1 contact11a_2 contact11a_3 contact11a_4 contact11a_5
    contact11b_1 contact11b_2 contact11b_3 contact11b_4 contact11b_5
    contact12a_1 contact12a_2 contact12a_3 contact12a_4 contact12a_5
    contact12b_1 contact12b_2 contact12b_3 contact12b_4 contact12b_5
    contact13a_1 contact13a_2 contact13a_3
    contact13b_1 contact13b_2 contact13b_3 contact13b_4
    contact14a_1 contact14a_2 contact14a_3
    contact14b_1 contact14b_2 contact14b_3 contact14b_4
    contact15a_1 contact15a_2 contact15a_3 contact15a_4
    contact15b_1 contact15b_2 contact15b_3 contact15b_4
    contact16a_1 contact16a_2 contact16a_3 contact16a_4
    contact16b_1 contact16b_2 contact16b_3
    contact17a_1 contact17a_2 contact17a_3 contact17a_4
    contact17b_1 contact17b_2 contact17b_3 contact17b_4
    contact18a_1 contact18a_2 contact18a_3
    contact18b_1 contact18b_2 contact18b_3 contact18b_4 contact18b_5
"""
for _name in _FAMILIES.split():
    import_module(f"{__name__}.{_name}")  # its cases register themselves

__all__ = ["BFLOAT16", "CASES", "DTYPES", "FLOAT32", "TYPES", "Case", "Setup", "call"]
