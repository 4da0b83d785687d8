"""What programs do with the SDKs of both providers, told nothing but their environment. Prints one JSON object."""

import json
import sys

import anthropic
import openai

ASK = [{"role": "user", "content": "hello"}]


def refused():
    """What the SDKs show to who has used up the cap."""
    shown = {}
    for name, call in [
        ("openai", lambda: openai.OpenAI().chat.completions.create(model="m", messages=ASK)),
        ("anthropic", lambda: anthropic.Anthropic().messages.create(model="m", max_tokens=9, messages=ASK)),
    ]:
        try:
            call()
        except (openai.APIStatusError, anthropic.APIStatusError) as error:
            shown[name] = {"kind": type(error).__name__, "status": error.status_code, "text": str(error)}
    return shown


def used():
    client, told = openai.OpenAI(), {}
    told["chat"] = client.chat.completions.create(model="m", messages=ASK).choices[0].message.content
    chunks = client.chat.completions.create(model="m", messages=ASK, stream=True)
    # As most programs do, without looking whether there is a choice.
    told["chat_stream"] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    asked = client.chat.completions.create(
        model="m", messages=ASK, stream=True, stream_options={"include_usage": True}
    )
    told["chat_usage"] = [chunk.usage.total_tokens for chunk in asked if chunk.usage]
    told["response"] = client.responses.create(model="m", input="hello").output_text
    events = client.responses.create(model="m", input="hello", stream=True)
    told["response_stream"] = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    told["embedding"] = client.embeddings.create(model="m", input="x", encoding_format="float").data[0].embedding
    told["models"] = [model.id for model in client.models.list()]
    client = anthropic.Anthropic()
    told["message"] = client.messages.create(model="m", max_tokens=9, messages=ASK).content[0].text
    with client.messages.stream(model="m", max_tokens=9, messages=ASK) as stream:
        told["message_stream"] = "".join(stream.text_stream)
        told["message_usage"] = stream.get_final_message().usage.output_tokens
    try:
        openai.OpenAI().files.list()
    except openai.PermissionDeniedError as error:
        told["files"] = str(error)
    return told


print(json.dumps(refused() if sys.argv[1:] == ["refused"] else used()))
