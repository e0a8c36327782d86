"""The remedies that gradflow knows: of initialisation, structure, single operations, training and data.

May import what stands above it in `remedies/`: what a remedy is, and how a model is changed by names.
"""
