"""The official OpenAI client against `linstate serve`: read once, ask, go on the next day.

linstate serve &
python examples/openai_client.py
"""

from __future__ import annotations

import sys

import httpx
from openai import OpenAI

URL = sys.argv[1].rstrip("/") if len(sys.argv) > 1 else "http://127.0.0.1:8080"
NOTES = "planet: Mars\ncaptain: Ines Duarte\ncolour of the door: green\n"

# Read a text once; what is kept of it is a state with a name.
state = httpx.post(f"{URL}/v1/states", json={"text": NOTES}, trust_env=False).raise_for_status().json()
print(f"read {state['position']} tokens into {state['bytes']:,} bytes")

client = OpenAI(base_url=f"{URL}/v1", api_key="none", http_client=httpx.Client(trust_env=False))

# Ask it. The text is not sent again, and not read again.
answer = client.chat.completions.create(
    model="pocket", messages=[{"role": "user", "content": "captain"}], extra_body={"state": state["id"]}
)
print("captain:", answer.choices[0].message.content)

# Turns that rest on each other: only what is new is sent.
first = client.responses.create(model="pocket", input="planet", extra_body={"state": state["id"]})
second = client.responses.create(model="pocket", input="colour of the door", previous_response_id=first.id)
print("planet:", first.output_text)
print("door:", second.output_text)

# Two ways on from one point.
fork = httpx.post(f"{URL}/v1/states/{state['id']}/fork", trust_env=False).raise_for_status().json()
for token in client.completions.create(
    model="pocket",
    prompt="\n? planet:",
    max_tokens=8,
    stop="\n",
    stream=True,
    extra_body={"state": fork["id"]},
):
    if token.choices:
        print(token.choices[0].text, end="", flush=True)
print()
