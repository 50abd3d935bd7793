"""A model with a chat template: what it is given to read, tools included, and calls of tools in what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import httpx
import openai
import pytest

import small_models
from linstate import LanguageModel, Sampling
from linstate.engine.chat_template import ChatTemplate
from linstate.engine.tokens import encode
from linstate.serve import dialogue
from linstate.serve.tools import STYLES, nested, style_of
from serve_server import Server

TEMPLATE = """
{%- if tools %}{{ '<|im_start|>system\\n' }}
{%- for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}
{{- 'Write a call as <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>' + m.content + '</tool_response><|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + '}</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

WEATHER = {
    "name": "weather",
    "description": "the weather of a place",
    "parameters": {
        "type": "object",
        "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
    },
}
TOOL = {"type": "function", "function": WEATHER}
FLAT = {"type": "function", **WEATHER}
SAID = (
    'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"place": "Rome", "days": 2}}\n</tool_call>'
)
ARGUMENTS = {"place": "Rome", "days": 2}
ASK = [{"role": "user", "content": "weather in Rome?"}]


def templated() -> LanguageModel:
    made = small_models.build("delta")
    return LanguageModel(
        made.decoder, made.tokenizer, name="talker", end=0, grid=16, chat_template=ChatTemplate(TEMPLATE, {})
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("store"), templated()) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    http = httpx.Client(trust_env=False, timeout=60)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=http, max_retries=0) as made:
        yield made


@pytest.fixture
def says(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """What the model writes next: its tokens are given, everything else is as ever."""

    def script(text: str) -> None:
        ids = iter([*encode(server.service.model.tokenizer, text), 0])
        monkeypatch.setattr(Sampling, "choose", lambda *_: next(ids))

    return script


def what_was_read(server: Server, state: str) -> str:
    """The text that a kept state has read."""
    ids = server.service.store.ids(state)
    assert ids is not None
    text: str = server.service.model.tokenizer.decode(ids, skip_special_tokens=False)
    return text


def test_turns_on_kept_states_read_what_the_template_makes_of_the_whole_conversation(server: Server) -> None:
    template = server.service.model.chat_template
    assert template is not None
    talk: list[dict[str, str]] = [{"role": "system", "content": "Be brief."}]
    state, new = None, [*talk, {"role": "user", "content": "lamp?"}]
    for question in ("and the chair?", "thanks", ""):
        body = {"messages": new, "max_tokens": 6, "store": True, "state": state}
        answer = server.http.post("/v1/chat/completions", json=body).json()
        talk += new if state else new[1:]
        talk.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
        state, new = answer["state"], [{"role": "user", "content": question}]
        assert what_was_read(server, state) + "<|im_end|>\n" == template.render(talk, answer=False)


def test_a_call_comes_as_tool_calls_and_its_result_goes_back(
    client: openai.OpenAI, server: Server, says: Callable[[str], None]
) -> None:
    says(SAID)
    made = client.chat.completions.create(
        model="talker",
        messages=ASK,
        tools=[TOOL],
        extra_body={"store": True},  # type: ignore[list-item,arg-type]
    )
    message = made.choices[0].message
    assert made.choices[0].finish_reason == "tool_calls" and message.content == "Let me see."
    assert message.tool_calls and message.tool_calls[0].type == "function"
    call = message.tool_calls[0]
    assert call.function.name == "weather" and json.loads(call.function.arguments) == ARGUMENTS
    read = what_was_read(server, made.state)  # type: ignore[attr-defined]
    assert json.dumps(TOOL) in read and read.endswith(SAID)

    says("Sun.")
    back = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    again = client.chat.completions.create(
        model="talker",
        messages=[*ASK, message.model_dump(exclude_none=True), back],  # type: ignore[list-item]
        tools=[TOOL],  # type: ignore[list-item]
        extra_body={"store": True},
    )
    assert again.choices[0].message.content == "Sun." and again.choices[0].finish_reason == "stop"
    read = what_was_read(server, again.state)  # type: ignore[attr-defined]
    assert '"arguments": {"place": "Rome", "days": 2}' in read  # an object, not text in quotes
    assert read.endswith("<tool_response>sunny</tool_response><|im_end|>\n<|im_start|>assistant\nSun.")


def test_calls_in_a_stream(client: openai.OpenAI, says: Callable[[str], None]) -> None:
    says(SAID)
    chunks = list(client.chat.completions.create(model="talker", messages=ASK, tools=[TOOL], stream=True))  # type: ignore[call-overload]
    deltas = [c.choices[0].delta for c in chunks]
    assert "".join(d.content or "" for d in deltas) == "Let me see.\n"
    calls = [d.tool_calls[0] for d in deltas if d.tool_calls]
    assert len(calls) == 1 and json.loads(calls[0].function.arguments) == ARGUMENTS
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("said", ['x <tool_call>{"name": nonsense</tool_call>', "a < b <tool_cal", "a <b> c"])
def test_what_is_no_call_stays_text(client: openai.OpenAI, says: Callable[[str], None], said: str) -> None:
    says(said)
    made = client.chat.completions.create(model="talker", messages=ASK, tools=[TOOL])  # type: ignore[call-overload]
    assert made.choices[0].message.content == said and made.choices[0].message.tool_calls is None
    assert made.choices[0].finish_reason == "stop"
    says(said)
    chunks = list(client.chat.completions.create(model="talker", messages=ASK, tools=[TOOL], stream=True))  # type: ignore[call-overload]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == said


def test_without_tools_a_call_is_text(client: openai.OpenAI, says: Callable[[str], None]) -> None:
    says(SAID)
    made = client.chat.completions.create(model="talker", messages=ASK, tools=[TOOL], tool_choice="none")  # type: ignore[call-overload]
    assert made.choices[0].message.content == SAID and made.choices[0].finish_reason == "stop"


def test_responses_make_function_calls_and_take_their_output(
    client: openai.OpenAI, server: Server, says: Callable[[str], None]
) -> None:
    says(SAID)
    first = client.responses.create(model="talker", input="weather in Rome?", tools=[FLAT])  # type: ignore[list-item]
    message, call = first.output
    assert message.type == "message" and first.output_text == "Let me see.\n"
    assert call.type == "function_call" and json.loads(call.arguments) == ARGUMENTS
    says("Sun.")
    before = server.metric("linstate_prompt_tokens_total")
    second = client.responses.create(
        model="talker",
        previous_response_id=first.id,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}],
    )
    assert second.output_text == "Sun."
    new = "<|im_end|>\n<|im_start|>user\n<tool_response>sunny</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert server.metric("linstate_prompt_tokens_total") - before == len(
        encode(server.service.model.tokenizer, new, goes_on=True)
    )
    whole = [
        {"role": "user", "content": "weather in Rome?"},
        call.model_dump(),
        *[{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}],
    ]
    says("Sun.")
    assert client.responses.create(model="talker", input=whole, tools=[FLAT]).output_text == "Sun."  # type: ignore[arg-type,list-item]


def test_function_calls_in_a_stream_of_responses(client: openai.OpenAI, says: Callable[[str], None]) -> None:
    says(SAID.removeprefix("Let me see.\n"))
    with client.responses.stream(model="talker", input="weather?", tools=[FLAT]) as stream:  # type: ignore[list-item]
        events = list(stream)
        final = stream.get_final_response()
    kinds = [e.type for e in events]
    assert "response.function_call_arguments.done" in kinds and "response.output_text.delta" not in kinds
    assert [o.type for o in final.output] == ["function_call"]
    assert json.loads(final.output[0].arguments) == ARGUMENTS  # type: ignore[union-attr]
    says(SAID)
    events = list(client.responses.create(model="talker", input="weather?", tools=[FLAT], stream=True))  # type: ignore[call-overload]
    assert [e.sequence_number for e in events] == list(range(len(events)))
    added = [e.output_index for e in events if e.type == "response.output_item.added"]
    assert added == [0, 1] and events[-1].type == "response.completed"


@pytest.mark.parametrize(
    ("sign", "text"),
    [
        (
            "<tool_call>",
            '<tool_call>{"name": "weather", "arguments": {"place": "Rome", "days": 2}}</tool_call>',
        ),
        (
            "<function=",
            "<tool_call>\n<function=weather>\n<parameter=place>\nRome\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
            "</function>\n</tool_call>",
        ),
        (
            "<TOOLCALL>",
            '<TOOLCALL>[{"name": "weather", "arguments": {"place": "Rome", "days": 2}}]</TOOLCALL>',
        ),
        (
            "<|tool_calls_section_begin|>",
            '<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{"place": "Rome", '
            '"days": 2}<|tool_call_end|><|tool_calls_section_end|>',
        ),
        ("<|tool_call_start|>", '<|tool_call_start|>[weather(place="Rome", days=2)]<|tool_call_end|>'),
    ],
)
def test_each_style_of_calls(sign: str, text: str) -> None:
    style = style_of(ChatTemplate(sign, {}))
    assert style is not None and style.sign == sign
    for tools in ([TOOL], [FLAT]):
        rest, calls = style.split(f"Well. {text}{text} So.", tools)
        assert rest == "Well.  So." and [c.name for c in calls] == ["weather"] * 2
        assert all(json.loads(c.arguments) == ARGUMENTS for c in calls)
    cut = text.removesuffix(style.end)
    assert style.split(cut, [TOOL])[1] == style.split(text, [TOOL])[1]
    broken = text.replace("weather", "")
    assert style.split(broken, [TOOL]) == (broken, [])


def test_styles_do_not_hide_each_other() -> None:
    assert len({style.sign for style in STYLES}) == len(STYLES)
    assert style_of(None) is None and style_of(ChatTemplate("{{ messages }}", {})) is None
    assert nested([FLAT]) == [TOOL] == nested([TOOL]) and nested(None) is None


def test_a_template_without_tools_refuses_them() -> None:
    made = templated()
    made.chat_template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    with pytest.raises(Exception, match="knows no tools"):
        dialogue.prompt(made, ASK, behind_answer=False, tools=[TOOL])
