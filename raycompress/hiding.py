"""What is kept, logged or printed of settings: all but secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from raycompress.tracking.address import masked_uri

__all__ = ["hidden", "is_secret"]

SECRET = re.compile(
    r"(?:^|_)(?:password|passwd|pwd|passphrase|token|secret|credentials?|api_?key|access_?key)s?$",
    re.IGNORECASE,
)
"""Keys whose values are secrets; `num_tokens` and `token_dim` aren't."""


def is_secret(key: str) -> bool:
    """Whether the value of a key, by its name, is a secret."""
    return bool(SECRET.search(key)) and not re.match(r"(?:num|max|min|n)_", key)


def hidden(value: Any) -> Any:
    """A copy of plain data with `***` for the values of secret keys and for passwords in URIs."""
    if isinstance(value, Mapping):
        return {
            key: "***" if is_secret(str(key)) and isinstance(item, str) else hidden(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [hidden(item) for item in value]
    return masked_uri(value) if isinstance(value, str) else value
