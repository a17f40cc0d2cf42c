#!/usr/bin/env python3
"""A streamed chat with the official client (pip install openai). Usage: chat.py [QUESTION] [BASE_URL]"""
import sys

from openai import OpenAI

question = sys.argv[1] if len(sys.argv) > 1 else "Tell me a story about Mia and a horse."
base = sys.argv[2] if len(sys.argv) > 2 else "http://127.0.0.1:8080/v1"
client = OpenAI(base_url=base, api_key="unused")
for chunk in client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": question}], stream=True):
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
