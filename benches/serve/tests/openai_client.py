"""OpenAI's own client against a running server: `openai_client.py http://127.0.0.1:8000/v1 MODEL`.

Needs `pip install openai`. Prints what it did; ends with an error at the first thing that is wrong.
"""

import sys

import openai

PROMPT = "Once upon a time"
CHAT = [{"role": "user", "content": "Say hello."}]
GREEDY = {"temperature": 0, "seed": 1, "max_tokens": 24}
REASONS = ("stop", "length")


def check(condition, message):
    if not condition:
        sys.exit(f"wrong: {message}")


def completion(client, model):
    whole = client.completions.create(model=model, prompt=PROMPT, **GREEDY)
    text, usage = whole.choices[0].text, whole.usage
    check(whole.object == "text_completion" and whole.model == model, whole)
    check(whole.choices[0].finish_reason in REASONS, whole)
    check(usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage)
    check(0 <= usage.completion_tokens <= GREEDY["max_tokens"], usage)

    chunks = list(client.completions.create(model=model, prompt=PROMPT, stream=True, **GREEDY))
    streamed = "".join(chunk.choices[0].text for chunk in chunks)
    check(streamed == text, f"streamed {streamed!r}, whole {text!r}")
    check(chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason, chunks[-1])
    print(f"completion: {text!r}, {usage.completion_tokens} tokens, {len(chunks)} chunks")
    return text


def chat(client, model):
    whole = client.chat.completions.create(model=model, messages=CHAT, **GREEDY)
    choice = whole.choices[0]
    check(whole.object == "chat.completion" and choice.message.role == "assistant", whole)
    check(choice.finish_reason in REASONS, whole)

    options = {"include_usage": True}
    stream = client.chat.completions.create(
        model=model, messages=CHAT, stream=True, stream_options=options, **GREEDY
    )
    *chunks, last = stream
    check(chunks[0].choices[0].delta.role == "assistant", chunks[0])
    check(last.choices == [] and last.usage == whole.usage, last)
    check(all(chunk.usage is None for chunk in chunks), "usage before the last chunk")
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    check(streamed == choice.message.content, f"streamed {streamed!r}, whole {choice.message!r}")
    print(f"chat: {streamed!r}, {whole.usage.completion_tokens} tokens, {len(chunks) + 1} chunks")


def stop(client, model, text):
    middle = len(text) // 2
    string = text[middle : middle + 3]
    if not string:
        print("stop string: skipped, as there is no text")
        return
    ask = {"model": model, "prompt": PROMPT, "stop": [string], **GREEDY}
    whole = client.completions.create(**ask)
    expected = text[: text.index(string)]
    check(whole.choices[0].text == expected, f"{whole.choices[0]!r}, not {expected!r}")
    check(whole.choices[0].finish_reason == "stop", whole)
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(stream=True, **ask))
    check(streamed == expected, f"streamed {streamed!r}, not {expected!r}")
    print(f"stop string: {string!r}, {expected!r}")


def leave(client, model):
    ask = {"model": model, "prompt": PROMPT, "max_tokens": 200, "stream": True}
    with client.completions.create(**ask) as stream:
        next(iter(stream))
    print("left within a stream")


def errors(client, model):
    def fails(kind, param, **ask):
        try:
            client.completions.create(**{"model": model, "prompt": PROMPT, **ask})
        except kind as error:
            check(error.param == param, f"{error!r}: {error.param!r}, not {param!r}")
            print(f"{kind.__name__}: {error.message}")
        else:
            sys.exit(f"wrong: {ask} is taken")

    fails(openai.NotFoundError, "model", model="no-such-model")
    fails(openai.BadRequestError, "temperature", temperature=3)
    fails(openai.BadRequestError, "n", n=2)
    fails(openai.BadRequestError, "prompt", prompt=[])


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    url, model = sys.argv[1:]
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=2, timeout=120)
    models = [it.id for it in client.models.list()]
    check(model in models, f"{model} is not in {models}")
    print(f"models: {', '.join(models)}")
    text = completion(client, model)
    chat(client, model)
    stop(client, model, text)
    leave(client, model)
    errors(client, model)
    print(f"openai {openai.__version__}: all is well")


if __name__ == "__main__":
    main()
