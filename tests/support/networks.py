"""Tiny networks of many families, random pair trees, and the naive log-probs that everything is held against."""

import copy

import torch
from transformers import (
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MiniCPM3Config,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from bfpo_pl.data.collate import collate
from bfpo_pl.data.trees import PairTree

VOCABULARY = 48
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # wide, so that scales, caps and windows show
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=4),
    "qwen2-tied": Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "gemma2": Gemma2Config(
        **GROUPED, head_dim=8, sliding_window=4, final_logit_softcapping=3.0, attn_logit_softcapping=2.0
    ),
    "gemma3": Gemma3TextConfig(
        **GROUPED, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi": PhiConfig(**GROUPED, resid_pdrop=0.0, embd_pdrop=0.0),
    "phi3": Phi3Config(**GROUPED, sliding_window=4),
    "olmo2": Olmo2Config(**GROUPED),
    "gpt-neox": GPTNeoXConfig(**SIZES, hidden_dropout=0.0, attention_dropout=0.0),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.3,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "opt": OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        init_std=0.3,
        dropout=0.0,
        word_embed_proj_dim=32,
        pad_token_id=0,
    ),
    "minicpm3": MiniCPM3Config(  # values narrower than queries
        **SIZES,
        num_key_value_heads=4,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
    ),
    "cohere": CohereConfig(**GROUPED, logit_scale=0.25),
    "granite": GraniteConfig(**GROUPED, logits_scaling=3.0, residual_multiplier=0.5, embedding_multiplier=2.0),
}


def build(name, dtype=torch.float64):
    """A tiny network of a family, with weights that depend on the seed here alone."""
    config = copy.deepcopy(CONFIGS[name])  # a network changes its own
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).to(dtype)
        for parameter in model.parameters():  # norms and biases too, which start at 1 and 0
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def random_tree(generator, k, prompt_length=None):
    """A prompt of 1-9 tokens with k responses of 1-11 tokens."""

    def ids(low, high):
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    prompt = ids(1, 9) if prompt_length is None else ids(prompt_length, prompt_length)
    return PairTree(prompt, [ids(1, 11) for _ in range(k)], tuple((i, i + 1) for i in range(k - 1)))


def trees_of(*ks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [random_tree(generator, k) for k in ks]


def batch_of(trees):
    return collate([(0, tree) for tree in trees], ["only"], [1.0])


def naive_log_probs(model, trees, reduction):
    """One forward pass a response, the whole logits, a loop over the tokens."""
    values = []
    for tree in trees:
        for response in tree.response_ids:
            logits = model(torch.tensor([tree.prompt_ids + response]), use_cache=False).logits[0]
            total = torch.zeros((), dtype=logits.dtype)
            for place, token in enumerate(response):
                row = logits[len(tree.prompt_ids) + place - 1]
                total = total + row[token] - torch.log(torch.exp(row - row.max()).sum()) - row.max()
            values.append(total if reduction == "sum" else total / len(response))
    return torch.stack(values)


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
