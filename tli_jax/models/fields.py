"""Values of a ``config.json``, by type."""

import reprlib
import sys
from collections.abc import Mapping
from typing import Any

from tli_jax.errors import DataError, nearest


class Reader:
    """Typed access to a parsed JSON object; every refusal names the key and what it found."""

    def __init__(self, raw: Mapping[str, Any], where: str):
        self.raw, self.where = raw, where

    def _get(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        value = default if value is None else value
        if value is None:
            raise DataError(f"{self.where}: key {key!r} is missing{nearest(key, self.raw)}: add it")
        return value

    def integer(self, key: str, default: int | None) -> int:
        value = self._get(key, default)
        if type(value) is not int or not 1 <= value < 2**63:
            raise DataError(f"{self.where}: {key} is {shorten(value)}, must be a whole number above 0")
        return value

    def number(self, key: str, default: float | None, can_be_zero: bool = False) -> float:
        value = self._get(key, default)
        # As integers of any size can be compared with a float, but not converted to one.
        is_number = type(value) in (int, float) and 0 <= value <= sys.float_info.max
        if not is_number or not (value or can_be_zero):
            floor = "of 0 or more" if can_be_zero else "above 0"
            raise DataError(f"{self.where}: {key} is {shorten(value)}, must be a number {floor}")
        return float(value)

    def token_ids(self, key: str, default: int) -> tuple[int, ...]:
        """One token id, a list of them, or null for none."""
        value = self.raw.get(key, default)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(one) is not int or not 0 <= one < 2**31 for one in ids):
            raise DataError(f"{self.where}: {key} is {shorten(value)}, must be a token id, a list of them or null")
        return tuple(ids)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if type(value) is not bool:
            raise DataError(f"{self.where}: {key} is {shorten(value)}, must be true or false")
        return value


def shorten(value: Any) -> str:
    """A value for a message."""
    return reprlib.repr(value)
