"""What teacher and student share about Hugging Face models: loading, packed attention, heads."""

from kdflow.modeling.attention import PACKED_ATTENTION
from kdflow.modeling.context import ContextKeys, ContextSplit
from kdflow.modeling.decoder import check_decoder, forward_decoder, forward_hidden_states, head_options
from kdflow.modeling.gather import gather
from kdflow.modeling.loading import (
    empty_causal_lm,
    hide_progress_bars,
    load_causal_lm,
    load_decoder,
    load_final_norm,
    load_lm_head,
    load_model_config,
    load_tokenizer,
    map_causal_lm,
    resolve_model,
)
from kdflow.modeling.placement import resolve_device, resolve_dtype, to_device
from kdflow.modeling.positions import check_positions
from kdflow.modeling.prune import prune_layers, prune_model
from kdflow.modeling.saving import check_free, flush, written_aside

__all__ = [
    "PACKED_ATTENTION",
    "ContextKeys",
    "ContextSplit",
    "check_decoder",
    "check_free",
    "check_positions",
    "empty_causal_lm",
    "flush",
    "forward_decoder",
    "forward_hidden_states",
    "gather",
    "head_options",
    "hide_progress_bars",
    "load_causal_lm",
    "load_decoder",
    "load_final_norm",
    "load_lm_head",
    "load_model_config",
    "load_tokenizer",
    "map_causal_lm",
    "prune_layers",
    "prune_model",
    "resolve_device",
    "resolve_dtype",
    "resolve_model",
    "to_device",
    "written_aside",
]
