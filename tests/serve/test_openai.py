"""The official OpenAI client, unchanged, against a real server; and that its answers are the model's own."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest
import torch

import small_models
from linstate import Sampling
from linstate.engine.generation import Live
from linstate.engine.slots import ROWS
from linstate.engine.tokens import encode
from serve_server import Server

TEXT = small_models.TEXT


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    http = httpx.Client(trust_env=False, timeout=60)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=http, max_retries=0) as made:
        yield made


def alone(server: Server, text: str, count: int, sampling: Sampling | None = None) -> str:
    """What the model says behind ``text``, with nobody else there."""
    model = server.service.model
    state, chosen = model.append(encode(model.tokenizer, text)), sampling or Sampling()
    live, ids = Live(model.decoder, state, ROWS), []
    generator = torch.Generator().manual_seed(chosen.seed * 1_000_003 + state.position)
    for _ in range(count):
        ids.append(chosen.choose(live.logits(), generator))
        live.add(ids[-1])
    return model.tokenizer.decode(ids, skip_special_tokens=False)


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["delta"]
    assert client.models.retrieve("delta").owned_by == "linstate"
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.models.retrieve("gpt-4")


def test_completions(client: openai.OpenAI, server: Server) -> None:
    made = client.completions.create(model="delta", prompt=TEXT[:200], max_tokens=12, logprobs=2)
    assert made.choices[0].text == alone(server, TEXT[:200], 12)
    assert made.choices[0].finish_reason == "length"
    assert made.usage and made.usage.completion_tokens == 12
    logprobs = made.choices[0].logprobs
    assert logprobs and logprobs.tokens and len(logprobs.tokens) == 12
    assert logprobs.token_logprobs and all(p <= 0 for p in logprobs.token_logprobs if p is not None)
    streamed = client.completions.create(
        model="delta", prompt=TEXT[:200], max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(streamed)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == made.choices[0].text
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == 12


def test_seeds_and_several_answers(client: openai.OpenAI, server: Server) -> None:
    made = client.completions.create(
        model="delta", prompt="entry", max_tokens=9, n=3, temperature=1.0, seed=5
    )
    for choice in made.choices:
        expected = alone(server, "entry", 9, Sampling(1.0, seed=5 + choice.index))
        assert choice.text == expected
    assert len({c.text for c in made.choices}) == 3


def test_chat_and_its_cache(client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": TEXT[:400]}, {"role": "user", "content": "lamp"}]
    first = client.chat.completions.create(model="delta", messages=messages, max_tokens=6)  # type: ignore[call-overload]
    again = client.chat.completions.create(model="delta", messages=messages, max_tokens=6)  # type: ignore[call-overload]
    assert again.choices[0].message == first.choices[0].message
    assert again.usage.prompt_tokens_details.cached_tokens > 0
    parts = list(client.chat.completions.create(model="delta", messages=messages, max_tokens=6, stream=True))  # type: ignore[call-overload]
    text = "".join(p.choices[0].delta.content or "" for p in parts)
    assert text.strip() == first.choices[0].message.content
    assert parts[0].choices[0].delta.role == "assistant" and parts[-1].choices[0].finish_reason


def test_chat_logprobs_and_stop(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "entry 3"}]
    free = client.chat.completions.create(
        model="delta",
        messages=messages,
        max_tokens=8,
        logprobs=True,
        top_logprobs=3,  # type: ignore[arg-type]
    )
    entries = free.choices[0].logprobs.content
    assert entries and all(e.logprob == pytest.approx(e.top_logprobs[0].logprob) for e in entries)
    mark = entries[2].token
    cut = client.chat.completions.create(model="delta", messages=messages, max_tokens=8, stop=[mark])  # type: ignore[arg-type]
    assert cut.choices[0].finish_reason == "stop" and mark not in (cut.choices[0].message.content or "")


def test_structured_output_follows_its_schema(client: openai.OpenAI) -> None:
    import json

    schema = {
        "type": "object",
        "properties": {
            "colour": {"enum": ["red", "green"]},
            "n": {"type": "integer", "minimum": 0, "maximum": 9},
        },
        "required": ["colour", "n"],
        "additionalProperties": False,
    }
    made = client.chat.completions.create(
        model="delta",
        messages=[{"role": "user", "content": "which"}],
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    found = json.loads(made.choices[0].message.content or "")
    assert found["colour"] in ("red", "green") and 0 <= found["n"] <= 9
    with pytest.raises(openai.BadRequestError, match="schema"):
        client.chat.completions.create(
            model="delta",
            messages=[{"role": "user", "content": "which"}],
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "nonsense"}},
            },
        )


def test_responses_rest_on_kept_states(client: openai.OpenAI, server: Server) -> None:
    first = client.responses.create(model="delta", input=TEXT[:600] + "\nlamp", max_output_tokens=7)
    assert first.status == "incomplete" or first.output_text is not None
    before, tail = server.metric("linstate_prompt_tokens_total"), server.metric("linstate_tail_tokens_total")
    second = client.responses.create(
        model="delta", input="chair", previous_response_id=first.id, max_output_tokens=7
    )
    new = len(encode(server.service.model.tokenizer, "\n? chair:"))
    assert server.metric("linstate_prompt_tokens_total") - before == new
    assert server.metric("linstate_tail_tokens_total") == tail  # nothing was run again
    assert first.usage and second.usage
    total = first.usage.input_tokens + first.usage.output_tokens + new
    assert second.usage.input_tokens == total
    assert second.usage.input_tokens_details.cached_tokens == total - new
    assert second.previous_response_id == first.id
    branch = client.responses.create(
        model="delta", input="chair", previous_response_id=first.id, max_output_tokens=7
    )
    assert branch.output_text == second.output_text
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="delta", input="x", previous_response_id=first.id)


def test_responses_stream(client: openai.OpenAI) -> None:
    quiet = client.responses.create(model="delta", input="spoon", max_output_tokens=9, store=False)
    events = list(client.responses.create(model="delta", input="spoon", max_output_tokens=9, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[-1].type in (
        "response.completed",
        "response.incomplete",
    )
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text.strip() == quiet.output_text == events[-1].response.output_text
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(quiet.id)


def test_conversations(client: openai.OpenAI) -> None:
    talk = client.conversations.create(items=[{"type": "message", "role": "user", "content": TEXT[:300]}])
    one = client.responses.create(model="delta", input="lamp", conversation=talk.id, max_output_tokens=5)
    two = client.responses.create(model="delta", input="book", conversation=talk.id, max_output_tokens=5)
    assert two.usage and one.usage and two.usage.input_tokens > one.usage.input_tokens
    items = list(client.conversations.items.list(talk.id))
    assert [getattr(i, "role", None) for i in items] == ["user", "user", "assistant", "user", "assistant"]
    assert client.conversations.update(talk.id, metadata={"a": "b"}).metadata == {"a": "b"}
    client.conversations.delete(talk.id)
    with pytest.raises(openai.NotFoundError):
        client.conversations.retrieve(talk.id)


def test_embeddings(client: openai.OpenAI) -> None:
    made = client.embeddings.create(model="delta", input=["red lamp", "red lamp", "door"])
    a, b, c = (d.embedding for d in made.data)
    assert a == b != c and sum(x * x for x in a) == pytest.approx(1, abs=1e-5)


def test_what_is_not_served_is_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="presence_penalty"):
        client.completions.create(model="delta", prompt="x", presence_penalty=1.0)
    with pytest.raises(openai.BadRequestError, match="knows no tools"):
        client.chat.completions.create(
            model="delta",
            messages=[{"role": "user", "content": "x"}],
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="delta", prompt="x", max_tokens=10**6)
    with pytest.raises(openai.BadRequestError, match="nothing to go on from"):
        client.completions.create(model="delta", prompt="")
