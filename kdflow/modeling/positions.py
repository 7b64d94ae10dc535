"""How many positions a model has."""

from __future__ import annotations

from typing import Any

from kdflow.errors import ConfigError


def check_positions(config: Any, max_length: int, option: str) -> str | None:
    """Whether samples of `max_length` tokens fit the positions of a model of this config.

    Args:
        option: that sets `max_length`.

    Returns:
        A warning where they do not, but rotary embeddings can be computed for any position; else None.

    Raises:
        ConfigError: the model has a table of positions (GPT-2, OPT), and beyond its end there is nothing.
    """
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)  # some families name it otherwise and map the name
    if longest is None or max_length <= longest:
        return None
    # One of all layers, or one for each kind of layers.
    ropes = text.to_dict().get("rope_parameters")
    if not ropes:
        raise ConfigError(
            f"{option}: got {max_length}, but {text.model_type} has a table of {longest} positions; expected at most "
            "as many, or another model"
        )
    ropes = [ropes, *(rope for rope in ropes.values() if isinstance(rope, dict))]
    stretched = [(r.get("original_max_position_embeddings") or longest) * (r.get("factor") or 1.0) for r in ropes]
    if max_length <= max(stretched):
        return None
    return (
        f"{option}: {max_length} tokens, and {text.model_type} was made for {longest} positions "
        "(max_position_embeddings of its config): what it says beyond them may be worth little"
    )
