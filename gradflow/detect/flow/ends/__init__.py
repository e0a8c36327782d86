"""Between the last layers and the loss: outputs too loud for it, outputs it does not hear, outputs all alike.

What the layers before do is told by the detectors of each type, which call these. May import: what the
detectors of the flow may, and `readings`.
"""
