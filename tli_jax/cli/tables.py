"""Numbers and tables for people."""


def show_number(value: float | None, spec: str = ".4f") -> str:
    """A loss, say; null stands for what was not measured, or is not finite."""
    return "–" if value is None else format(value, spec)
