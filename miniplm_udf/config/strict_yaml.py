"""Reads YAML in which no mapping has a key twice. Input: text. Output: plain data; imports PyYAML when it is called."""

from typing import Any


def read(text: str) -> Any:
    """Returns the data of a YAML document.

    Args:
        text: the document. Keys that come by a merge (`<<: *student`) may be given again: the mapping's own win.

    Raises:
        yaml.YAMLError: it is no YAML, or a mapping has a key twice; the message has line and column.
    """
    import yaml

    class StrictLoader(yaml.SafeLoader):
        """Refuses a key that a mapping has already: PyYAML takes the last one without a word."""

        def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
            node = super().compose_mapping_node(anchor)
            seen: dict[str, int] = {}
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                    continue
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} is there twice, first on line {seen[key.value]}; remove one",
                        problem_mark=key.start_mark,
                    )
                seen[key.value] = key.start_mark.line + 1
            return node

    return yaml.load(text, Loader=StrictLoader)
