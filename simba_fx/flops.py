"""placeholder"""
def budget_cost(model):
    return None
