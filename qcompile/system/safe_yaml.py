"""YAML without aliases: a few lines of them stand for millions of values."""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuses an alias."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise ValueError(f"alias in line {mark.line + 1}, expected what it stands for")
        return super().compose_node(parent, index)


def load(text: str) -> Any:
    """Plain values. Raises ValueError, with its first line saying why, for what cannot be read."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError as e:
        raise ValueError("nested too deeply") from e
    except yaml.YAMLError as e:
        raise ValueError(str(e)) from e
