#!/usr/bin/env python3
"""Writes a model directory with random weights, to try a real size without downloading anything.

    python make_random_checkpoint.py --preset 0.5b --tokenizer examples/models/tiny --out /tmp/half-billion

Needs nothing but Python. The model computes as a trained one of its size does and says nothing sensible. Weights are drawn from one pool
of normal numbers per matrix shape, rotated by a random offset for every tensor.
"""

import argparse
import array
import json
import pathlib
import random
import shutil
import struct

PRESETS = {
    # architecture, hidden, intermediate, layers, heads, key/value heads, head dimension, vocabulary, tied
    "12m": ("llama", 288, 768, 6, 6, 6, 48, 20000, True),
    "95m": ("llama", 768, 2048, 12, 12, 4, 64, 25600, True),
    "0.1b": ("llama", 768, 2048, 12, 12, 4, 64, 32000, True),
    "0.5b": ("qwen2", 896, 4864, 24, 14, 2, 64, 32000, True),
    "0.6b": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True),
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
TOKENIZER_FILES = [
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "generation_config.json",
]
POOL = 1 << 18


def tensors(config):
    """Name, shape and standard deviation (none: a norm) of every tensor."""
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    kind = config["model_type"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden), 0.5
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", (hidden,), None
        yield at + "post_attention_layernorm.weight", (hidden,), None
        for name, rows, columns in [
            ("self_attn.q_proj", query, hidden), ("self_attn.k_proj", kv, hidden), ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, query), ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ]:
            yield f"{at}{name}.weight", (rows, columns), columns**-0.5
            if kind == "qwen2" and name.startswith("self_attn") and name != "self_attn.o_proj":
                yield f"{at}{name}.bias", (rows,), 0.1
        if kind == "qwen3":
            yield at + "self_attn.q_norm.weight", (dim,), None
            yield at + "self_attn.k_norm.weight", (dim,), None
    yield "model.norm.weight", (hidden,), None
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden), 0.1


def encode(values, dtype):
    """Little-endian bytes of numbers; bf16 by cutting f32."""
    whole = struct.pack(f"<{len(values)}f", *values)
    if dtype == "F32":
        return whole
    halves = array.array("H")
    halves.frombytes(whole)
    return halves[1::2].tobytes()


def write(path, config, dtype, seed):
    generator = random.Random(seed)
    normal = [generator.gauss(0, 1) for _ in range(POOL)]
    size = 4 if dtype == "F32" else 2
    header, offset, plan = {}, 0, list(tensors(config))
    for name, shape, _ in plan:
        count = 1
        for n in shape:
            count *= n
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + count * size]}
        offset += count * size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    pools = {}
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, _, deviation in plan:
            if deviation not in pools:
                values = [1.0] * POOL if deviation is None else [deviation * x for x in normal]
                pools[deviation] = encode(values, dtype)
            pool = pools[deviation]
            start, end = header[name]["data_offsets"]
            remaining = end - start
            while remaining:
                at = generator.randrange(POOL) * size
                piece = pool[at : at + remaining]
                file.write(piece)
                remaining -= len(piece)
    return offset // size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="0.1b")
    parser.add_argument("--dtype", choices=["bf16", "f32"], default="bf16")
    parser.add_argument("--vocab", type=int, help="size of the vocabulary (default: the tokenizer's, else the preset's)")
    parser.add_argument("--tokenizer", type=pathlib.Path, help="model directory to copy tokenizer and chat template from")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    kind, hidden, inner, layers, heads, kv_heads, dim, vocab, tied = PRESETS[arguments.preset]
    config = {
        "architectures": [ARCHITECTURES[kind]], "model_type": kind, "hidden_act": "silu", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": dim, "vocab_size": vocab, "tie_word_embeddings": tied,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "dtype": "float32" if arguments.dtype == "f32" else "bfloat16",
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.tokenizer:
        for name in TOKENIZER_FILES:
            if (arguments.tokenizer / name).exists():
                shutil.copy(arguments.tokenizer / name, arguments.out / name)
        other = json.loads((arguments.tokenizer / "config.json").read_text())
        for field in ["bos_token_id", "eos_token_id", "pad_token_id"]:
            if field in other:
                config[field] = other[field]
        config["vocab_size"] = other["vocab_size"]
    if arguments.vocab:
        config["vocab_size"] = arguments.vocab
    (arguments.out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    count = write(arguments.out / "model.safetensors", config, "F32" if arguments.dtype == "f32" else "BF16", arguments.seed)
    print(f"{arguments.out}: {kind}, {count / 1e6:.1f} M parameters, {arguments.dtype}")


if __name__ == "__main__":
    main()
