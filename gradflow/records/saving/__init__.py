"""Records as JSON and back, checked field by field; and as pickles and copies.

May import the fields, values and issues beside this folder, and none of the records.
"""
