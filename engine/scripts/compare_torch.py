#!/usr/bin/env python3
"""Prefill and decode speed of transformers on torch and of the reference executor, side by side.

    python compare_torch.py --bench target/release/deps/forward-... --model DIR [--model DIR ..] [--threads 1 --threads 2]

Both sides compute in float32 whatever the dtype of the weights (torch's bfloat16 arithmetic rounds differently, so it would be no
comparison), read the same directory, use the same number of threads, and do the same work: one prompt with logits of its
last token, then one token for each of 1, 8 and 32 sequences after a context. Runs alternate (torch, ours, torch, ours, ..) because
the machine may be shared; a figure is the shortest time over all rounds.
"""

import argparse
import os
import re
import subprocess
import sys
import time

BATCHES = [1, 8, 32]


def torch_side(arguments):
    import torch
    import transformers

    torch.set_num_threads(arguments.threads[0])
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model[0], dtype=torch.float32).eval()
    vocab = model.config.vocab_size

    def shortest(run):
        started, best, repeats = time.perf_counter(), float("inf"), 0
        while repeats < 3 or time.perf_counter() - started < arguments.seconds:
            now = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - now)
            repeats += 1
        return best

    with torch.inference_mode():
        prompt = torch.randint(0, vocab, (1, arguments.prompt))
        best = shortest(lambda: model(prompt, use_cache=True, logits_to_keep=1))
        print(f"prefill_{arguments.prompt} {arguments.prompt / best:.1f}", flush=True)
        for batch in BATCHES:
            context = torch.randint(0, vocab, (batch, arguments.context))
            cache = model(context, use_cache=True, logits_to_keep=1).past_key_values
            token = torch.randint(0, vocab, (batch, 1))

            def step():
                model(token, past_key_values=cache, use_cache=True)
                cache.crop(-1)

            print(f"decode_b{batch} {batch / shortest(step):.1f}", flush=True)


def run(command, threads):
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    text = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return text, {name: float(rate) for name, rate in re.findall(r"^(prefill_\d+|decode_b\d+) ([\d.]+)", text, re.M)}


def compare(arguments, model, threads):
    shared = ["--model", model, "--threads", str(threads), "--prompt", str(arguments.prompt)]
    shared += ["--context", str(arguments.context), "--seconds", str(arguments.seconds)]
    torch_best, our_best, text = {}, {}, ""
    for _ in range(arguments.rounds):
        for best, command in [
            (torch_best, [sys.executable, __file__, "--torch-side", *shared]),
            (our_best, [arguments.bench, *shared]),
        ]:
            text, rates = run(command, threads)
            for name, rate in rates.items():
                best[name] = max(best.get(name, 0), rate)
    head, limits = text.splitlines()[:2]
    print(f"\n{head}\n{limits}")
    print(f"{'tokens/s':<14}{'transformers':>14}{'baton':>12}{'ratio':>8}   share of the machine's limits (last round)")
    for name, theirs in torch_best.items():
        share = re.search(rf"^{name} [\d.]+  (.*)$", text, re.M)
        print(f"{name:<14}{theirs:>14.1f}{our_best[name]:>12.1f}{our_best[name] / theirs:>8.2f}   {share.group(1) if share else ''}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--threads", action="append", type=int)
    parser.add_argument("--bench", help="the built benchmark `forward`")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=2, help="for each figure and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torch-side", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.threads = arguments.threads or [1]
    if arguments.torch_side:
        torch_side(arguments)
        return
    import torch
    import transformers

    print(f"torch {torch.__version__}, transformers {transformers.__version__}, float32, {arguments.rounds} alternating rounds")
    for model in arguments.model:
        for threads in arguments.threads:
            compare(arguments, model, threads)


if __name__ == "__main__":
    main()
