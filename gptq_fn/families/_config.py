"""Reading a Hugging Face config so that no key which changes the model goes unnoticed."""

from collections.abc import Mapping
from typing import Any

from gptq_fn.families._rope import scaling_of
from gptq_fn.spec import Activation, ProportionalScaling, RopeSpec

# fmt: off
HARMLESS = frozenset({
    "activation_dropout", "add_cross_attention", "architectures", "attention_dropout", "attention_probs_dropout_prob",
    "attention_softmax_in_fp32", "attn_impl", "attn_pdrop", "auto_map", "aux_loss_alpha", "bad_words_ids", "begin_suppress_tokens",
    "bias_dropout_fusion", "bos_token_id", "cache_implementation", "chunk_size_feed_forward", "classifier_dropout",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dropout", "dtype", "early_stopping", "emb_pdrop", "embd_pdrop",
    "embed_dropout", "embedding_dropout", "embedding_fraction", "embedding_initializer_range", "eod_token_id", "eos_token_id", "ep_size",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "hidden_dropout", "hidden_dropout_prob",
    "id2label", "inference_runner", "init_config", "init_device", "init_std", "initializer_range", "is_decoder", "is_encoder_decoder",
    "is_llama_config", "keys_to_ignore_at_inference", "label2id", "layerdrop", "length_penalty", "masked_softmax_fusion", "max_batch_size",
    "max_length", "max_position_embeddings", "max_seq_len", "max_sequence_length", "min_length", "model_type", "n_ctx", "n_positions",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels", "num_return_sequences", "offset_alibi", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_key_length", "pad_token_id", "pre_allocate_kv_cache", "prefix", "pretraining_tp",
    "problem_type", "quantization_config", "repetition_penalty", "resid_dropout", "resid_pdrop", "residual_dropout", "return_dict",
    "router_aux_loss_coef", "router_jitter_noise", "scale_attention_softmax_in_fp32", "sep_token_id", "seq_aux", "seq_length",
    "skip_bias_add", "skip_bias_add_qkv", "slow_but_exact", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "summary_type", "summary_use_proj", "task_specific_params", "temperature", "tokenizer_class", "tokenizer_name", "top_k", "top_p",
    "torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "transformers_weights", "typical_p", "unk_token_id",
    "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache", "use_parallel_embedding", "use_return_dict", "validate_runner_input",
    "verbose", "vocab_size", "word_embed_proj_dim",
})
# fmt: on
"""Keys that do not change the logits, or only say what the shapes of the tensors say too."""

_ACT: dict[str, Activation] = {
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu2": "relu2",
}
_REQUIRED = object()


class Config:
    """The keys of a config.json; `leftovers` are those that nobody asked for."""

    def __init__(self, values: Mapping[str, Any]):
        """A reader of `values`, of which no key has been asked for yet."""
        self._values = values
        self._asked: set[str] = set()
        self._sections: dict[str, Config] = {}

    def get(self, *names: str, default: Any = _REQUIRED) -> Any:
        """The value of the first of these keys that is there and not null. Raises ValueError if one is needed and none is there."""
        self._asked.update(names)
        for name in names:
            if self._values.get(name) is not None:
                return self._values[name]
        if default is _REQUIRED:
            raise ValueError(f"The config of this {self._values.get('model_type')} model has no {' or '.join(names)}.")
        return default

    def section(self, name: str) -> "Config":
        """A reader of the keys under this one, which are refused like the others where nobody asks for them."""
        return self._sections.setdefault(name, Config({"model_type": f"{self._values.get('model_type')}", **self.get(name, default={})}))

    def number(self, name: str, default: float | int | None) -> Any:
        """The value of this key as a float; None where there is none and `default` is None."""
        found = self.get(name, default=default)
        return None if found is None else float(found)

    def only(self, name: str, value: Any) -> None:
        """Refuse any other value of this key. Raises ValueError."""
        found = self.get(name, default=value)
        if found != value:
            raise ValueError(
                f"The config says {name} = {found!r}, but only {value!r} is described for {self._values.get('model_type')} models. "
                "A spec written by hand may describe it: see gptq_fn.spec."
            )

    def act(self, name: str, default: str) -> Activation:
        """The activation function under this key. Raises ValueError for one that has no name here."""
        found = self.get(name, default=default)
        if found not in _ACT:
            raise ValueError(f"The config says {name} = {found!r}; the activations that are understood are {', '.join(_ACT)}.")
        return _ACT[found]

    def rope(
        self, head_dim: int, *, partial: float = 1.0, interleaved: bool = False, theta: float = 10000.0, layer: str | None = None
    ) -> RopeSpec:
        """Rotary positions as transformers 5 writes them (rope_parameters) or as older files do (rope_theta, rope_scaling).

        `layer` is a layer type, for configs that hold parameters for each. Older ones scale "full_attention" alone, and
        may hold another theta for "sliding_attention" (rope_local_base_freq).
        """
        new, old = dict(self.get("rope_parameters", default={})), dict(self.get("rope_scaling", default={}))
        theta = self.get("rope_theta", "rotary_emb_base", default=theta)
        self.get("rope_type", default=None)
        if layer is not None and layer in new:
            new = dict(new[layer] or {})
        elif layer == "sliding_attention":
            theta = self.get("rope_local_base_freq", default=new.get("rope_theta", theta))
            new, old = {}, {}
        partial = self.get("partial_rotary_factor", "rotary_pct", default=partial)
        found = {"rope_theta": theta, "partial_rotary_factor": partial, **old, **new}
        length = self.get("original_max_position_embeddings", default=None)
        if length is not None:
            found.setdefault("original_max_position_embeddings", length)
        partial, theta = found.pop("partial_rotary_factor"), float(found.pop("rope_theta"))
        scaling = scaling_of(found, self.get("max_position_embeddings", "n_positions", default=None), partial)
        dim = head_dim if isinstance(scaling, ProportionalScaling) else int(head_dim * partial)
        return RopeSpec(dim, theta, interleaved, scaling)

    def leftovers(self, harmless: frozenset[str]) -> dict[str, Any]:
        """Keys with a value, that were not asked for and are not known to be harmless; those of a section with its name."""
        unknown = self._values.keys() - self._asked - harmless
        found = {key: self._values[key] for key in sorted(unknown) if key[0] != "_" and self._values[key] not in (None, False, [], {}, "")}
        inner = {name: section.leftovers(harmless) for name, section in self._sections.items()}
        return found | {f"{name}.{key}": value for name, keys in inner.items() for key, value in keys.items()}
