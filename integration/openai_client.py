"""The official `openai` client against a fleet: chat, streaming, completions, responses, models, errors. Usage: openai_client.py BASE_URL"""
import sys

import openai
from openai import OpenAI

client = OpenAI(base_url=sys.argv[1], api_key="unused", max_retries=0, timeout=30)
QUESTION = [{"role": "user", "content": "What does the fox eat?"}]
ANSWER = "The fox eats mice."

assert "tiny" in [model.id for model in client.models.list()]
assert client.models.retrieve("tiny").object == "model"

# Chat, whole.
chat = client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0, max_completion_tokens=40)
assert chat.object == "chat.completion" and chat.id.startswith("chatcmpl-"), chat
assert chat.choices[0].message.role == "assistant" and chat.choices[0].message.content == ANSWER, chat
assert chat.choices[0].finish_reason == "stop", chat
assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens > 0, chat

# Chat, streamed: the same text in pieces, one id, usage at the end when asked for.
pieces, ids, reasons, usage = [], set(), [], None
for chunk in client.chat.completions.create(
    model="tiny", messages=QUESTION, temperature=0, max_tokens=40, stream=True, stream_options={"include_usage": True}
):
    ids.add(chunk.id)
    for choice in chunk.choices:
        pieces.append(choice.delta.content or "")
        reasons += [choice.finish_reason] if choice.finish_reason else []
    usage = chunk.usage or usage
assert "".join(pieces) == ANSWER and len([p for p in pieces if p]) > 1, pieces
assert len(ids) == 1 and reasons == ["stop"] and usage.completion_tokens == chat.usage.completion_tokens, (ids, reasons, usage)

# System prompt, several turns, several choices, seeds.
turns = [{"role": "system", "content": "You are a helpful assistant."}, *QUESTION, {"role": "assistant", "content": ANSWER},
         {"role": "user", "content": "Tell me a story about Mia and a horse."}]
sample = dict(model="tiny", messages=turns, temperature=0.9, seed=7, n=3, max_tokens=30)
first, again = client.chat.completions.create(**sample), client.chat.completions.create(**sample)
texts = [choice.message.content for choice in first.choices]
assert [choice.index for choice in first.choices] == [0, 1, 2] and len(set(texts)) > 1, texts
assert texts == [choice.message.content for choice in again.choices], "the same seed gives the same answer"

# Logprobs.
logged = client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3)
entries = logged.choices[0].logprobs.content
assert len(entries) == 5 and all(len(e.top_logprobs) == 3 and e.logprob <= 0 for e in entries), logged
assert all(e.token == e.top_logprobs[0].token for e in entries), "greedy takes the likeliest"

# Stop sequences.
stopped = client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0, max_tokens=40, stop=[" eats"])
assert stopped.choices[0].message.content == "The fox" and stopped.choices[0].finish_reason == "stop", stopped

# Completions: text, token ids, a batch, streamed.
prompt = "<s><|user|>\nWhat does the fox eat?<|end|>\n<|assistant|>\n"
text = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=40)
assert text.object == "text_completion" and text.choices[0].text == ANSWER, text
batch = client.completions.create(model="tiny", prompt=[prompt, prompt], temperature=0, max_tokens=40)
assert [(c.index, c.text) for c in batch.choices] == [(0, ANSWER), (1, ANSWER)], batch
ids_answer = client.completions.create(model="tiny", prompt=[5, 6, 7, 8], temperature=0, max_tokens=3)
assert ids_answer.usage.prompt_tokens == 4, ids_answer
streamed = "".join(c.choices[0].text for c in client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=40, stream=True) if c.choices)
assert streamed == ANSWER, streamed
short = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=2)
assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2, short

# Responses: whole, with instructions, and sent back as the history of the next question.
response = client.responses.create(model="tiny", input="What does the fox eat?", temperature=0, max_output_tokens=40, store=False)
assert response.status == "completed" and response.output_text == ANSWER, response
assert response.id.startswith("resp_") and response.output[0].role == "assistant" and response.error is None, response
assert response.usage.input_tokens == chat.usage.prompt_tokens and response.usage.output_tokens == chat.usage.completion_tokens, response
assert response.usage.total_tokens == chat.usage.total_tokens and response.usage.input_tokens_details.cached_tokens >= 0, response
history = [*turns[:1], *QUESTION, *response.output, turns[3]]
follow = client.responses.create(model="tiny", input=history, temperature=0, max_output_tokens=30, metadata={"topic": "horses"})
told = client.chat.completions.create(model="tiny", messages=turns, temperature=0, max_tokens=30)
assert follow.output_text == told.choices[0].message.content and follow.metadata == {"topic": "horses"}, (follow, told)
guided = client.responses.create(model="tiny", instructions=turns[0]["content"], input=history[1:], temperature=0, max_output_tokens=30)
assert guided.output_text == follow.output_text and guided.instructions == turns[0]["content"], guided
counted = client.responses.input_tokens.count(model="tiny", input="What does the fox eat?")
assert counted.input_tokens == response.usage.input_tokens, counted
cut = client.responses.create(model="tiny", input=QUESTION, temperature=0, max_output_tokens=2)
assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens" and cut.usage.output_tokens == 2, cut
likely = client.responses.create(model="tiny", input=QUESTION, temperature=0, max_output_tokens=5, top_logprobs=3,
                                 include=["message.output_text.logprobs"])
entries = likely.output[0].content[0].logprobs
assert len(entries) == 5 and all(len(e.top_logprobs) == 3 and e.logprob <= 0 for e in entries), likely

# Responses, streamed: typed events in order, numbered, and the whole response at the end.
events = list(client.responses.create(model="tiny", input="What does the fox eat?", temperature=0, max_output_tokens=40, stream=True))
kinds = [event.type for event in events]
assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"], kinds
assert kinds[-4:] == ["response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed"], kinds
assert [event.sequence_number for event in events] == list(range(len(events))), events
assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER, events
assert events[-1].response.output_text == ANSWER and events[-1].response.usage.output_tokens == response.usage.output_tokens, events[-1]
with client.responses.stream(model="tiny", input="What does the fox eat?", temperature=0, max_output_tokens=40) as stream:
    assert "".join(event.delta for event in stream if event.type == "response.output_text.delta") == ANSWER
    assert stream.get_final_response().output_text == ANSWER


def refused(error, param, call):
    try:
        call()
    except error as caught:
        assert caught.body["message"] and caught.body["type"], caught.body
        assert caught.body["param"] == param, caught.body
        return
    raise AssertionError(f"{error} expected")


refused(openai.NotFoundError, "model", lambda: client.chat.completions.create(model="gpt-none", messages=QUESTION))
refused(openai.BadRequestError, "temperature", lambda: client.chat.completions.create(model="tiny", messages=QUESTION, temperature=3))
refused(openai.BadRequestError, "messages", lambda: client.chat.completions.create(model="tiny", messages=[]))
refused(openai.BadRequestError, "prompt", lambda: client.completions.create(model="tiny", prompt=[5] * 9000, max_tokens=1))
refused(openai.BadRequestError, "previous_response_id", lambda: client.responses.create(model="tiny", input="hi", previous_response_id=response.id))
refused(openai.BadRequestError, "background", lambda: client.responses.create(model="tiny", input="hi", background=True))
refused(openai.BadRequestError, "tools", lambda: client.responses.create(model="tiny", input="hi", tools=[{"type": "web_search"}]))
refused(openai.NotFoundError, None, lambda: client.responses.retrieve(response.id))
refused(openai.BadRequestError, "model", lambda: client.embeddings.create(model="tiny", input="hi"))
print("openai client: all good")
