"""The HTML report: one file with its style, script and drawings inside, that loads nothing from anywhere.

May import `wording`, `svg` and what is above `report`. Inside: `pieces` and `style` < the sections < `page`.
"""
