CANNOT: dict = {}
def page(rows, cannot): return ""
