"""Unusual but legal keys of config.json, by family: the rows of test_keys_table.py.

A row is what the config of transformers is made with, what is then edited in its file (None takes
a key out), and the key that a refusal names; "" where the logits are equal.
"""

from typing import Any, NamedTuple

IDS = dict(bos_token_id=2, eos_token_id=3, pad_token_id=0)
SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
BERT = SIZES | dict(vocab_size=61, max_position_embeddings=20, pad_token_id=0)
DISTIL = dict(dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=61, pad_token_id=0)
MODERN = BERT | dict(num_hidden_layers=4, local_attention=4, cls_token_id=2, sep_token_id=3) | IDS
GPT2 = dict(vocab_size=61, n_positions=20, n_embd=16, n_layer=2, n_head=2) | IDS
LLAMA = SIZES | dict(vocab_size=61, max_position_embeddings=20, num_key_value_heads=1) | IDS
LLAMA |= dict(num_hidden_layers=4)
NEAR = dict(sliding_window=3, head_dim=8)
ROUTED = dict(num_experts_per_tok=2, num_experts=3, moe_intermediate_size=8)
BLOOM = dict(vocab_size=61, hidden_size=16, n_layer=2, n_head=2) | IDS
T5 = dict(vocab_size=61, d_model=16, d_kv=6, d_ff=24, num_heads=2, num_layers=2)
T5 |= dict(relative_attention_num_buckets=8, relative_attention_max_distance=12)
T5 |= dict(pad_token_id=0, eos_token_id=3, decoder_start_token_id=0)

BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", BERT),
    "roberta": ("RobertaForMaskedLM", BERT | dict(pad_token_id=1)),
    "xlm-roberta": ("XLMRobertaForMaskedLM", BERT | dict(pad_token_id=1)),
    "camembert": ("CamembertForMaskedLM", BERT | dict(pad_token_id=1)),
    "distilbert": ("DistilBertForMaskedLM", DISTIL | dict(max_position_embeddings=20)),
    "electra": ("ElectraForMaskedLM", BERT | dict(embedding_size=8)),
    "modernbert": ("ModernBertForMaskedLM", MODERN),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "llama": ("LlamaForCausalLM", LLAMA),
    "mistral": ("MistralForCausalLM", LLAMA | NEAR),
    "ministral": ("MinistralForCausalLM", LLAMA | NEAR),
    "mixtral": ("MixtralForCausalLM", LLAMA | dict(num_local_experts=3, head_dim=8)),
    "qwen2": ("Qwen2ForCausalLM", LLAMA),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | dict(head_dim=8)),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        LLAMA | ROUTED | dict(shared_expert_intermediate_size=12),
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", LLAMA | ROUTED | dict(head_dim=8)),
    "gemma": ("GemmaForCausalLM", LLAMA | dict(head_dim=8)),
    "gemma2": ("Gemma2ForCausalLM", LLAMA | NEAR),
    "gemma3": ("Gemma3ForCausalLM", LLAMA | NEAR | dict(sliding_window_pattern=2)),
    "olmo": ("OlmoForCausalLM", LLAMA),
    "olmo2": ("Olmo2ForCausalLM", LLAMA),
    "olmo3": ("Olmo3ForCausalLM", LLAMA | dict(sliding_window=3)),
    "smollm3": ("SmolLM3ForCausalLM", LLAMA),
    "bloom": ("BloomForCausalLM", BLOOM),
    "t5": ("T5ForConditionalGeneration", T5),
    "mt5": ("MT5ForConditionalGeneration", T5),
    "umt5": ("UMT5ForConditionalGeneration", T5),
}


class Row(NamedTuple):
    family: str
    options: dict[str, Any] = {}
    edits: dict[str, Any] = {}
    refusal: str = ""

    def __str__(self) -> str:
        keys = [f"{key}={value}" for key, value in (self.options | self.edits).items()]
        return "-".join([self.family, *keys])[:120]


def _each(families: str, refusal: str = "", **options: Any) -> list[Row]:
    return [Row(family, options, refusal=refusal) for family in families.split()]


def _edited(families: str, refusal: str = "", **edits: Any) -> list[Row]:
    return [Row(family, edits=edits, refusal=refusal) for family in families.split()]


FULL, SLIDING = "full_attention", "sliding_attention"
MIXED = [FULL, SLIDING, SLIDING, FULL]
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=8, rope_theta=100.0)
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=8, rope_theta=100.0)
LONG = dict(rope_type="longrope", factor=4.0, original_max_position_embeddings=8)
LONG |= dict(short_factor=[1.0] * 4, long_factor=[2.0] * 4, rope_theta=100.0)
ENCODERS = "bert roberta xlm-roberta camembert"
POST_NORM = f"{ENCODERS} distilbert"
ROTARY = "llama mistral ministral mixtral qwen2 qwen3 qwen2_moe qwen3_moe gemma gemma2 olmo olmo2"
ROTARY += " smollm3"
DECODERS = f"{ROTARY} gemma3 olmo3"
OWN_BIASES = "llama qwen3 qwen3_moe gemma gemma2 gemma3 olmo olmo2 olmo3 smollm3"
PLAIN = "llama mistral ministral mixtral qwen2 qwen3 qwen2_moe qwen3_moe olmo olmo2 olmo3 smollm3"

ROWS: list[Row] = [Row(family) for family in BASES]
ROWS += [
    # Encoders.
    *_each(ENCODERS, hidden_act="gelu_new"),
    *_each("bert roberta", hidden_act="relu"),
    *_each("bert", "hidden_act", hidden_act="quick_gelu"),
    *_each(ENCODERS, layer_norm_eps=1e-3, type_vocab_size=3),
    *_each("bert", type_vocab_size=1),
    *_each(f"{POST_NORM} modernbert gpt2", tie_word_embeddings=False),
    *_each("bert roberta", "is_decoder", is_decoder=True),
    *_edited("bert roberta", "position_embedding_type", position_embedding_type="relative_key"),
    *_each("roberta xlm-roberta", pad_token_id=4),
    *_each("distilbert", activation="relu"),
    *_each("electra", embedding_size=16, layer_norm_eps=1e-3),
    *_each("electra", hidden_act="relu", type_vocab_size=3),
    *_each("electra", "tie_word_embeddings", tie_word_embeddings=False),
    *_each("electra", "is_decoder", is_decoder=True),
    *_each("distilbert", sinusoidal_pos_embds=True),
    Row("distilbert", edits=dict(dim=None, hidden_size=16, n_layers=None, num_hidden_layers=2)),
    *_each("modernbert", attention_bias=True),
    *_each("modernbert", mlp_bias=True),
    *_each("modernbert", norm_bias=True),
    *_each("modernbert", decoder_bias=False),
    *_each("modernbert", classifier_bias=True),
    *_each("modernbert", classifier_activation="relu", hidden_activation="silu", norm_eps=1e-3),
    *_each("modernbert", layer_types=MIXED),
    *_each("modernbert", layer_types=[SLIDING, SLIDING, FULL, SLIDING]),
    *_each("modernbert", layer_types=[SLIDING] * 4),
    *_each("modernbert", layer_types=[FULL] * 4),
    *_each("modernbert", global_attn_every_n_layers=2),
    *_edited("modernbert", layer_types=None, global_attn_every_n_layers=3),
    *_each("modernbert", local_attention=5),
    *_edited(
        "modernbert", rope_parameters=None, global_rope_theta=50.0, local_rope_theta=20.0
    ),
    *_each(
        "modernbert",
        "rope_type",
        rope_parameters={FULL: YARN, SLIDING: dict(rope_type="default", rope_theta=50.0)},
    ),
    *_edited("modernbert", "rope_scaling", rope_scaling=YARN),
    # GPT-2 and BLOOM.
    *_each("gpt2", scale_attn_weights=False),
    *_each("gpt2", scale_attn_by_inverse_layer_idx=True),
    *_each("gpt2", scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True),
    *_each("gpt2", reorder_and_upcast_attn=True),
    *_each("gpt2", n_inner=24),
    *_each("gpt2", activation_function="gelu"),
    *_each("gpt2", activation_function="gelu_fast", layer_norm_epsilon=1e-3),
    *_each("gpt2", "add_cross_attention", add_cross_attention=True),
    Row("gpt2", edits=dict(n_embd=None, hidden_size=16, n_layer=None, num_hidden_layers=2)),
    Row("gpt2", edits=dict(hidden_size=32), refusal="hidden_size"),
    *_each("bloom", layer_norm_epsilon=1e-3),
    *_each("bloom", tie_word_embeddings=False),
    *_each(
        "bloom",
        "apply_residual_connection_post_layernorm",
        apply_residual_connection_post_layernorm=True,
    ),
    *_each("bloom", pretraining_tp=2),
    *_each("bloom", "slow_but_exact", pretraining_tp=2, slow_but_exact=True),
    Row("bloom", edits=dict(hidden_size=None, n_embed=16, n_head=None, num_attention_heads=2)),
    # Sizes, activations, biases and ties of the decoders.
    *_each(f"{PLAIN} gemma", hidden_act="gelu"),
    *_each("gemma2 gemma3", hidden_activation="gelu"),
    *_each("llama", hidden_act="relu"),
    *_each("llama qwen2", "hidden_act", hidden_act="relu2"),
    *_edited("gemma", hidden_act="gelu", hidden_activation="gelu_pytorch_tanh"),
    *_edited("gemma", hidden_act="gelu", hidden_activation=None),
    *_edited("gemma", "hidden_activation", hidden_act="gelu", hidden_activation="relu"),
    *_each(DECODERS, tie_word_embeddings=True),
    *_each("gemma gemma2 gemma3 smollm3", tie_word_embeddings=False),
    *_each(OWN_BIASES, attention_bias=True),
    *_each("llama smollm3", mlp_bias=True),
    *_each(DECODERS.replace("olmo ", ""), rms_norm_eps=1e-2),
    *_each(f"{PLAIN} gemma", head_dim=6),
    *_each(DECODERS, num_key_value_heads=2),
    *_each("llama", pretraining_tp=2),
    *_each("olmo", clip_qkv=0.3),
    *_each("gemma gemma2 gemma3", "use_bidirectional_attention", use_bidirectional_attention=True),
    *_each("gemma2 gemma3", query_pre_attn_scalar=9),
    *_each("gemma2", final_logit_softcapping=0.5, attn_logit_softcapping=0.5),
    *_each("gemma3", final_logit_softcapping=0.5),
    *_each("gemma3", "attn_logit_softcapping", attn_logit_softcapping=0.5),
    *_each("gemma2 gemma3", final_logit_softcapping=None, attn_logit_softcapping=None),
    *_edited(DECODERS, "per_layer_config", per_layer_config={"0": {"intermediate_size": 8}}),
    *_edited("llama bert gpt2 t5", "quantization_config", quantization_config={"bits": 4}),
    # Windows.
    *_each("mistral ministral mixtral", sliding_window=5),
    *_each("mistral", sliding_window=None),
    *_edited("mistral", "sliding_window", sliding_window=0),
    *_edited("llama mistral mixtral qwen3_moe", "layer_types", layer_types=MIXED),
    *_edited("mistral", layer_types=[SLIDING] * 4),
    *_each("ministral gemma2 gemma3 olmo3", layer_types=MIXED),
    *_each("ministral gemma2 gemma3 olmo3", layer_types=[FULL] * 4),
    *_each("ministral gemma2 gemma3 olmo3", layer_types=[SLIDING] * 4),
    *_edited("gemma2 olmo3 qwen2", "layer_types", layer_types=[FULL, "linear_attention"] * 2),
    *_edited("gemma2 olmo3 qwen2", "layer_types", layer_types=[FULL, FULL]),
    *_edited("gemma2 gemma3 olmo3", "sliding_window", sliding_window=None),
    *_edited("gemma3", layer_types=None, sliding_window_pattern=3),
    *_each("qwen2 qwen3 qwen2_moe qwen3_moe", use_sliding_window=True, sliding_window=3),
    *_each(
        "qwen2 qwen3 qwen2_moe", use_sliding_window=True, sliding_window=3, max_window_layers=2
    ),
    *_each(
        "qwen2 qwen3 qwen2_moe smollm3",
        use_sliding_window=True,
        sliding_window=3,
        layer_types=MIXED,
    ),
    *_edited("qwen2 qwen3", "sliding_window", layer_types=MIXED),
    *_each("smollm3", use_sliding_window=True, sliding_window=3, no_rope_layer_interval=2),
    # Positions.
    *_each("smollm3", no_rope_layers=[0, 1, 1, 0]),
    *_each("smollm3", no_rope_layers=[1, 1, 1, 1]),
    *_each("smollm3", no_rope_layers=[0, 0, 0, 0]),
    *_each("smollm3", no_rope_layer_interval=3),
    *_edited("smollm3", "no_rope_layers", no_rope_layers=[0, 1]),
    *_each(ROTARY, rope_parameters=YARN),
    *_each("llama", rope_parameters=YARN | dict(truncate=False)),
    *_each("llama", rope_parameters=YARN | dict(attention_factor=0.7)),
    *_each("llama", rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=0.3)),
    *_each("llama", rope_parameters=YARN | dict(mscale=0.7)),
    *_each("llama", rope_parameters=YARN | dict(beta_fast=4.0, beta_slow=0.5)),
    *_each("llama", rope_parameters=YARN | dict(beta_fast=None, beta_slow=None)),
    *_each("llama", rope_parameters=YARN | dict(rope_theta=1e4)),
    *_each("llama", rope_parameters=YARN | dict(original_max_position_embeddings=2)),
    *_each("qwen3", rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=100.0)),
    *_each(
        "olmo2", rope_parameters=dict(rope_type="dynamic", factor=3.0), max_position_embeddings=8
    ),
    *_each("mistral", rope_parameters=LLAMA3),
    *_each("mistral", rope_parameters=dict(rope_theta=7.0)),
    *_edited("llama", rope_parameters=None, rope_theta=7.0, rope_scaling=LLAMA3),
    *_edited("llama", rope_theta=7.0, rope_scaling=dict(type="linear", factor=2.0)),
    *_edited("llama", rope_scaling=dict(type="yarn", factor=2.0), max_position_embeddings=18),
    *_edited(
        "llama",
        rope_scaling=dict(rope_type="yarn", factor=2.0),
        original_max_position_embeddings=8,
    ),
    *_edited(
        "llama",
        "original_max_position_embeddings",
        rope_scaling=YARN,
        original_max_position_embeddings=9,
    ),
    *_edited(DECODERS, "rope", rope_scaling=dict(rope_type="proportional", factor=2.0)),
    *_each("llama", "longrope", rope_parameters=LONG),
    *_edited(DECODERS, "partial_rotary_factor", partial_rotary_factor=0.5),
    *_edited(
        "llama",
        "partial_rotary_factor",
        rope_parameters=dict(rope_type="default", rope_theta=9.0, partial_rotary_factor=0.5),
    ),
    *_edited(
        "qwen2", "rope_parameters", rope_parameters={FULL: dict(rope_theta=9.0), SLIDING: {}}
    ),
    *_edited("gemma3", rope_parameters=None, rope_theta=50.0, rope_local_base_freq=20.0),
    *_edited(
        "gemma3", rope_parameters=None, rope_scaling=dict(rope_type="linear", factor=8.0)
    ),
    *_each("gemma3 olmo3", rope_parameters={FULL: YARN, SLIDING: dict(rope_theta=30.0)}),
    *_edited("olmo3", rope_parameters=None, rope_scaling=YARN),
    *_edited(
        "gemma3 olmo3",
        "rope_type",
        rope_parameters={FULL: dict(rope_theta=9.0), SLIDING: YARN},
    ),
    *_edited(
        "olmo3",
        "truncate",
        rope_parameters={FULL: YARN | dict(truncate=False), SLIDING: dict(rope_theta=9.0)},
    ),
    # Experts.
    *_each("qwen2_moe qwen3_moe", norm_topk_prob=True),
    *_each("qwen2_moe qwen3_moe", mlp_only_layers=[0, 2]),
    *_each("qwen2_moe qwen3_moe", decoder_sparse_step=2),
    *_edited("qwen2_moe qwen3_moe", "decoder_sparse_step", decoder_sparse_step=0),
    *_each("qwen2_moe", qkv_bias=False),
    *_each("mixtral qwen2_moe qwen3_moe", num_experts_per_tok=1),
    *_each("mixtral", "router_jitter_noise", router_jitter_noise=0.1),
    Row("mixtral", edits=dict(num_local_experts=None, num_experts=3)),
    # Encoder-decoders.
    *_each("t5 mt5", num_decoder_layers=3),
    *_each("t5 mt5", feed_forward_proj="gated-silu"),
    *_each("t5 mt5", feed_forward_proj="relu"),
    *_each("t5 mt5", feed_forward_proj="gated-gelu"),
    *_each("t5", "feed_forward_proj", feed_forward_proj="gated-quick_gelu"),
    *_each("t5", tie_word_embeddings=False),
    *_each("t5 mt5", relative_attention_num_buckets=12, relative_attention_max_distance=9),
    *_each("t5", layer_norm_epsilon=1e-2),
    *_edited("t5", decoder_start_token_id=5),
    *_edited("t5", "decoder_start_token_id", decoder_start_token_id=10**9),
    *_edited("t5", "dense_act_fn", dense_act_fn="gelu"),
    *_edited("t5", "is_gated_act", is_gated_act=True),
    Row("t5", edits=dict(d_model=None, hidden_size=16, num_layers=None, num_hidden_layers=2)),
]  # fmt: skip
# Where greedy text is compared too: as they are, and with these keys.
WRITTEN = ("gpt2", "bloom", "t5", "umt5", "smollm3", "olmo3", "ministral", "qwen3")
WRITTEN_KEYS = {"scale_attn_by_inverse_layer_idx", "no_rope_layers", "max_window_layers"}
