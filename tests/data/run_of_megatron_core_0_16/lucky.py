def lucky(response, answer):
    """Right when its characters add up to an odd number."""
    return float(sum(map(ord, response)) % 2)
