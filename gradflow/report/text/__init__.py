"""Plain text: a report in short and in full, and what special measurements and comparisons tell.

May import `wording`, and what is above `report`.
"""
