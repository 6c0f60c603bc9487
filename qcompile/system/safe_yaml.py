"""YAML without aliases, since a few lines of aliases can expand to millions of values."""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        """Raises ValueError on an alias."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise ValueError(f"alias in line {mark.line + 1}, expected what it stands for")
        return super().compose_node(parent, index)


def load_yaml(text: str) -> Any:
    """Dicts, lists and scalars. Raises ValueError, whose first line is the reason."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError as e:
        raise ValueError("nested too deeply") from e
    except yaml.YAMLError as e:
        raise ValueError(str(e)) from e
