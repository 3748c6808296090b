"""Plain data in files to read and edit: JSON if a path ends in `.json`, else YAML."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from fused_merge.io.headers import load_json


def read_plain(path: Path) -> Any:
    """Read plain data; ValueError if it is none or a key stands twice, ImportError for YAML without PyYAML."""
    text = path.read_bytes()
    if path.suffix.lower() == ".json":
        try:
            return load_json(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON ({error}); correct it") from error
    yaml = _yaml(path)

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined, misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            pairs = node.value if isinstance(node, yaml.MappingNode) else ()
            for key, count in Counter(str(key.value) for key, _ in pairs).items():
                if count > 1:
                    raise ValueError(f"{key!r} stands in it twice")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML ({' '.join(str(error).split())}); correct it") from error


def plain_text(path: Path, content: Any) -> str:
    """Return the text of plain data for a path; raises TypeError for other data, ImportError as `read_plain`."""
    text = json.dumps(content, indent=2) + "\n"
    if path.suffix.lower() == ".json":
        return text
    # From JSON, which has no tuples and no subclasses of numbers: the two forms say the same.
    return str(_yaml(path).safe_dump(json.loads(text), sort_keys=False, width=math.inf))


def _yaml(path: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"{path} needs PyYAML: pip install 'fused_merge[cli]', or take a .json file") from error
    return yaml
