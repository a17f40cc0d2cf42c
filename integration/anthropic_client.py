"""The official `anthropic` client against a fleet: messages, streaming, counting, errors. Usage: anthropic_client.py BASE_URL"""
import sys

import anthropic
from anthropic import Anthropic

client = Anthropic(base_url=sys.argv[1], api_key="unused", max_retries=0, timeout=30)
QUESTION = [{"role": "user", "content": "What does the fox eat?"}]
ANSWER = "The fox eats mice."
GREEDY = {"temperature": 0}

# Whole.
message = client.messages.create(model="tiny", messages=QUESTION, max_tokens=40, extra_body=GREEDY)
assert message.type == "message" and message.id.startswith("msg_") and message.role == "assistant", message
assert [block.text for block in message.content] == [ANSWER] and message.content[0].type == "text", message
assert message.stop_reason == "end_turn" and message.stop_sequence is None and message._request_id == message.id, message
assert message.usage.input_tokens + message.usage.cache_read_input_tokens > 0 and message.usage.output_tokens > 0, message

# Counting is what the prompt comes to.
counted = client.messages.count_tokens(model="tiny", messages=QUESTION)
assert counted.input_tokens == message.usage.input_tokens + message.usage.cache_read_input_tokens, (counted, message)

# A system prompt, several turns, blocks, and the answer sent back as it came.
turns = [*QUESTION, message.to_param(), {"role": "user", "content": [{"type": "text", "text": "Tell me a story about Mia and a horse."}]}]
story = client.messages.create(model="tiny", system=[{"type": "text", "text": "You are a helpful assistant."}], messages=turns,
                               max_tokens=30, metadata={"user_id": "u"}, extra_body=GREEDY)
assert story.content[0].text and story.content[0].text != ANSWER, story

# Why it stops.
cut = client.messages.create(model="tiny", messages=QUESTION, max_tokens=2, extra_body=GREEDY)
assert cut.stop_reason == "max_tokens" and cut.usage.output_tokens == 2, cut
stopped = client.messages.create(model="tiny", messages=QUESTION, max_tokens=40, stop_sequences=["never", " eats"], extra_body=GREEDY)
assert stopped.content[0].text == "The fox" and (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " eats"), stopped

# Streamed: raw events, and the helper that puts them together.
events = list(client.messages.create(model="tiny", messages=QUESTION, max_tokens=40, stream=True, extra_body=GREEDY))
kinds = [event.type for event in events]
assert kinds[:2] == ["message_start", "content_block_start"] and kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"], kinds
pieces = [event.delta.text for event in events if event.type == "content_block_delta"]
assert "".join(pieces) == ANSWER and len(pieces) > 1, pieces
assert events[-2].delta.stop_reason == "end_turn" and events[-2].usage.output_tokens == message.usage.output_tokens, events[-2]
with client.messages.stream(model="tiny", messages=QUESTION, max_tokens=40, extra_body=GREEDY) as stream:
    assert "".join(stream.text_stream) == ANSWER
    final = stream.get_final_message()
assert final.content[0].text == ANSWER and final.stop_reason == "end_turn", final
assert final.usage.input_tokens + final.usage.cache_read_input_tokens == counted.input_tokens, (final, counted)


def refused(error, kind, names, call):
    try:
        call()
    except error as caught:
        assert caught.body["type"] == "error" and caught.body["error"]["type"] == kind, caught.body
        assert names in caught.body["error"]["message"], caught.body
        return
    raise AssertionError(f"{error} expected")


refused(anthropic.NotFoundError, "not_found_error", "gpt-none", lambda: client.messages.create(model="gpt-none", messages=QUESTION, max_tokens=1))
refused(anthropic.BadRequestError, "invalid_request_error", "'max_tokens'", lambda: client.messages.create(model="tiny", messages=QUESTION, max_tokens=0))
refused(anthropic.BadRequestError, "invalid_request_error", "'temperature'",
        lambda: client.messages.create(model="tiny", messages=QUESTION, max_tokens=1, extra_body={"temperature": 1.5}))
refused(anthropic.BadRequestError, "invalid_request_error", "'tools'",
        lambda: client.messages.create(model="tiny", messages=QUESTION, max_tokens=1, tools=[{"name": "f", "input_schema": {"type": "object"}}]))
print("anthropic client: all good")
