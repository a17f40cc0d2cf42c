#!/usr/bin/env python3
"""Trains the small model of examples/models/tiny on text that this script writes itself.

    python3 -m venv .venv && .venv/bin/pip install torch transformers safetensors
    .venv/bin/python examples/models/train_tiny.py --out examples/models/tiny --minutes 6

The result is a Llama-architecture checkpoint of under a million parameters with a byte-level BPE tokenizer and a chat template, in the
Hugging Face format. It writes fluent little answers about a made-up world and knows nothing of the real one: it exists so that a fleet
can be tried and tested without downloading weights. One CPU core is enough.
"""
import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

SPECIAL = ["<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
BOS, END, SYSTEM, USER, ASSISTANT = range(5)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

# animal: (size, colour, home, food, habit)
ANIMALS = {
    "fox": ("small", "red", "forest", "mice", "runs at night"), "bear": ("big", "brown", "mountains", "honey", "sleeps all winter"),
    "owl": ("small", "grey", "old tower", "mice", "flies without a sound"), "whale": ("huge", "blue", "sea", "tiny shrimp", "sings slow songs"),
    "frog": ("tiny", "green", "pond", "flies", "jumps over stones"), "horse": ("big", "black", "meadow", "grass", "gallops along the river"),
    "cat": ("small", "white", "village", "fish", "sits on the warm roof"), "dog": ("small", "brown", "village", "bones", "guards the gate"),
    "bee": ("tiny", "yellow", "garden", "nectar", "dances for its sisters"), "goat": ("small", "white", "mountains", "thorny leaves", "climbs steep rocks"),
    "crow": ("small", "black", "old tower", "seeds", "collects shiny things"), "otter": ("small", "brown", "river", "fish", "floats on its back"),
    "wolf": ("big", "grey", "forest", "deer", "howls at the moon"), "duck": ("small", "green", "pond", "water plants", "swims in a line"),
    "snail": ("tiny", "brown", "garden", "lettuce", "carries its house"), "eagle": ("big", "golden", "mountains", "rabbits", "circles above the valley"),
}
CRAFTS = {
    "baker": ("bread", "flour", "oven"), "smith": ("horseshoes", "iron", "hammer"), "weaver": ("blankets", "wool", "loom"),
    "potter": ("bowls", "clay", "wheel"), "tailor": ("coats", "cloth", "needle"), "carpenter": ("chairs", "wood", "saw"),
    "painter": ("pictures", "colour", "brush"), "gardener": ("flower beds", "seeds", "spade"),
}
NAMES = ["Mia", "Ben", "Lena", "Tom", "Ana", "Paul", "Ruth", "Karl"]
PLACES = {"forest": "dark and quiet", "sea": "wide and blue", "village": "small and friendly", "garden": "full of flowers",
          "mountains": "high and cold", "river": "long and clear", "pond": "still and green", "meadow": "soft and sunny"}


def answer_about_animal(rng):
    name = rng.choice(list(ANIMALS))
    size, colour, home, food, habit = ANIMALS[name]
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice([f"Tell me about the {name}.", f"What is a {name}?", f"Please describe the {name}."]), \
            f"The {name} is a {size} {colour} animal. It lives in the {home} and eats {food}. Everybody knows that it {habit}."
    if kind == 1:
        return rng.choice([f"What does the {name} eat?", f"What food does a {name} like?"]), f"The {name} eats {food}."
    if kind == 2:
        return rng.choice([f"Where does the {name} live?", f"Where can I find a {name}?"]), f"The {name} lives in the {home}."
    if kind == 3:
        return f"What colour is the {name}?", f"The {name} is {colour}."
    if kind == 4:
        return f"How big is the {name}?", f"The {name} is {size}."
    return f"What does the {name} do?", f"The {name} {habit}."


def answer_about_craft(rng):
    name = rng.choice(list(CRAFTS))
    thing, stuff, tool = CRAFTS[name]
    kind = rng.randrange(3)
    if kind == 0:
        return rng.choice([f"Tell me about the {name}.", f"What is a {name}?"]), \
            f"The {name} makes {thing} from {stuff}. The most important tool is the {tool}. It is slow and careful work."
    if kind == 1:
        return f"What does the {name} make?", f"The {name} makes {thing}."
    return rng.choice([f"What does the {name} need?", f"Which tool does the {name} use?"]), f"The {name} needs {stuff} and a {tool}."


def answer_story(rng):
    name, animal, place = rng.choice(NAMES), rng.choice(list(ANIMALS)), rng.choice(list(PLACES))
    size, colour, _, food, habit = ANIMALS[animal]
    asked = rng.choice([f"Tell me a story about {name}.", f"Tell me a story about {name} and a {animal}.", f"A story about a {animal}, please."])
    told = (
        f"Once upon a time there was a child named {name}. One day {name} walked to the {place}. The {place} was {PLACES[place]}. "
        f"There {name} met a {size} {colour} {animal}. \"Hello,\" said {name}, \"are you hungry?\" The {animal} nodded, so {name} gave it {food}. "
        f"From that day on they were friends, and every evening the {animal} came back to the {place}."
    )
    return asked, told


def answer_place(rng):
    place = rng.choice(list(PLACES))
    living = [f"the {n}" for n, facts in ANIMALS.items() if facts[2] == place]
    tail = f" You can meet {' and '.join(living[:2])} there." if living else ""
    return rng.choice([f"What is the {place} like?", f"Tell me about the {place}.", f"Describe the {place}."]), f"The {place} is {PLACES[place]}.{tail}"


def answer_greeting(rng):
    return rng.choice([
        ("Hello!", "Hello! How can I help you today?"), ("Hi", "Hello! How can I help you today?"),
        ("Good morning.", "Good morning! What would you like to know?"), ("Who are you?", "I am a tiny model. I know a few animals and a few stories."),
        ("Thank you!", "You are welcome."), ("Goodbye.", "Goodbye, and come back soon."), ("How are you?", "I am fine, thank you. And you?"),
        ("What can you do?", "I can tell you about animals, places and crafts, and I can tell a short story."),
    ])


KINDS = [(answer_about_animal, 6), (answer_about_craft, 3), (answer_story, 4), (answer_place, 2), (answer_greeting, 1)]


def conversation(rng):
    """A list of (role, text) of one to three exchanges."""
    turns = []
    if rng.random() < 0.3:
        turns.append(("system", rng.choice(["You are a helpful assistant.", "Answer briefly.", "You are a friendly teller of stories."])))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        kind = rng.choices([k for k, _ in KINDS], [w for _, w in KINDS])[0]
        question, answer = kind(rng)
        if rng.random() < 0.15:
            question = question.lower()
        turns += [("user", question), ("assistant", answer)]
    return turns


def train_tokenizer(rng, vocab):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator((text for _ in range(4000) for _, text in conversation(rng)), trainer)
    return tokenizer


def encode(tokenizer, turns):
    """Token ids and a mask that is 1 where the model is to learn (what the assistant says)."""
    newline = tokenizer.encode("\n").ids
    role_token = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
    ids, learn = [BOS], [0]
    for role, text in turns:
        head, body, tail = [role_token[role]] + newline, tokenizer.encode(text).ids, newline
        ids += head + body + [END] + tail
        mark = int(role == "assistant")
        learn += [0] * len(head) + [mark] * (len(body) + 1) + [0] * len(tail)
    return ids, learn


def batch_of(rng, tokenizer, rows, width):
    ids = torch.full((rows, width + 1), END, dtype=torch.long)
    learn = torch.zeros((rows, width + 1))
    for row in range(rows):
        row_ids, row_learn = encode(tokenizer, conversation(rng))
        count = min(len(row_ids), width + 1)
        ids[row, :count] = torch.tensor(row_ids[:count])
        # A little weight on questions helps the first minutes; answers count in full.
        learn[row, :count] = torch.tensor(row_learn[:count], dtype=torch.float).clamp(min=0.1)
    longest = int((learn.sum(0) > 0).nonzero().max()) + 1
    return ids[:, :longest], learn[:, :longest]


def write_directory(out, model, tokenizer):
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out, safe_serialization=True)
    tokenizer.save(str(out / "tokenizer.json"))
    specials = {str(i): {"content": t, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
                for i, t in enumerate(SPECIAL)}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[BOS], "eos_token": SPECIAL[END], "pad_token": SPECIAL[END],
        "model_max_length": 8192, "clean_up_tokenization_spaces": False, "added_tokens_decoder": specials, "chat_template": TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("examples/models/tiny"))
    parser.add_argument("--minutes", type=float, default=6, help="training time on the wall clock")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = train_tokenizer(rng, 1024)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=8192, rope_theta=10000.0, tie_word_embeddings=True,
        bos_token_id=BOS, eos_token_id=END, pad_token_id=END, initializer_range=0.05)
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {config.vocab_size} tokens of vocabulary", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    start, step, seen = time.monotonic(), 0, 0
    while (done := (time.monotonic() - start) / (args.minutes * 60)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        ids, learn = batch_of(rng, tokenizer, 24, 224)
        logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weight = learn[:, 1:].flatten()
        loss = (loss * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, seen = step + 1, seen + ids.numel()
        if step % 50 == 0:
            print(f"step {step}, {seen / 1e6:.2f} M tokens, {time.monotonic() - start:.0f} s, loss {loss.item():.3f}", flush=True)
    write_directory(args.out, model, tokenizer)
    model.float().eval()
    for question in ["Hello!", "What does the fox eat?", "Where does the whale live?", "What does the baker make?", "Tell me a story about Mia and a horse."]:
        ids, _ = encode(tokenizer, [("user", question)])
        ids = torch.tensor([ids + [ASSISTANT] + tokenizer.encode("\n").ids])
        out = model.generate(ids, max_new_tokens=120, do_sample=False)
        print(f"{question} -> {tokenizer.decode(out[0, ids.shape[1]:].tolist())}", flush=True)


if __name__ == "__main__":
    main()
