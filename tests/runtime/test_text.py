import json
from datetime import datetime

import numpy as np
import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers

from relay_attention.errors import ArtifactError, PromptError
from relay_attention.runtime.text import ChatTemplate, SystemPrompt, Tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# what templates use: macros, namespaces, loop controls, tojson, dates, generation blocks, exceptions
ELABORATE = """
{%- set date = strftime_now("%d %b %Y") if strftime_now is defined else "never" -%}
{% macro header(role) %}<|im_start|>{{ role }} {{ strftime_now("%Y") }}{% endmacro %}
{% set ns = namespace(last='') %}
{{ bos_token }}Today: {{ date }}
    {% for message in messages %}
        {% if message.role == 'skip' %}{% continue %}{% endif %}
        {% if message.role == 'bad' %}{{ raise_exception('no bad roles <here>') }}{% endif %}
        {% set ns.last = message.role %}
{{ header(message.role) }}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}{% else %}{{
message.content }}{% endif %}{{ {'é<': [1, message.content]} | tojson }}<|im_end|>
    {% endfor %}
{% if add_generation_prompt %}{{ header('assistant') }} after {{ ns.last }}{% endif %}"""
DATED = "Date {{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}\n" + CHATML


def chat_tokenizer(byte_tokenizer, template=CHATML, **special) -> Tokenizer:
    return Tokenizer(byte_tokenizer, {"bos_token": "<s>", "eos_token": "</s>"} | special, template)


@pytest.fixture(params=["special", "plain text", "spaces"])
def tokenizer(request, byte_tokenizer) -> Tokenizer:
    """Turns that end with special tokens, or with text only, and a space before the user's text."""
    template = {
        "special": "{{ bos_token }}" + CHATML,
        "plain text": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}assistant: ",
        "spaces": "<s>{% for m in messages %} [{{ m.role }}] {{ m.content }} [end]{% endfor %}",
    }[request.param]
    return chat_tokenizer(byte_tokenizer, template)


@pytest.mark.parametrize(
    "user", ["A", "hello", "\nhello", "\n\n x", " the", "  a", "é", "中文", "🙂", "1", "</s>", "a" * 500]
)
def test_prefix_and_rest_are_the_whole_rendering(tokenizer, user):
    prompt = SystemPrompt.make(tokenizer, "Be kind. The stop is the end.")
    messages = [{"role": "system", "content": prompt.text}, {"role": "user", "content": user}]
    whole = tokenizer.encode(tokenizer.chat_template.render(messages))
    assert [*prompt.token_ids, *prompt.encode(user)] == whole
    assert [*prompt.token_ids, *prompt.encode(messages)] == whole
    assert [*prompt.token_ids, *prompt.encode(messages[1:])] == whole
    assert tokenizer.decode(prompt.token_ids).find(prompt.text) >= 0


def test_several_turns(tokenizer):
    prompt = SystemPrompt.make(tokenizer, "Be kind.")
    turns = [("user", "hello"), ("assistant", "hell"), ("user", "the stop")]
    messages = [{"role": role, "content": content} for role, content in turns]
    whole = tokenizer.encode(
        tokenizer.chat_template.render([{"role": "system", "content": "Be kind."}, *messages])
    )
    assert [*prompt.token_ids, *prompt.encode(messages)] == whole


def test_long_prefix_is_not_tokenized_again(byte_tokenizer):
    """Tokenizing restarts after the last special token of the prefix, where the tokenizer allows it."""
    tokenizer = chat_tokenizer(byte_tokenizer)
    prompt = SystemPrompt.make(tokenizer, "word " * 1000)
    seen = []
    encode = tokenizer.encode
    tokenizer.encode = lambda text: seen.append(text) or encode(text)
    prompt.encode("hello")
    seen.clear()
    prompt.encode("hello")
    assert [len(text) < 100 for text in seen] == [True]


def test_tokenizer_that_marks_the_beginning_of_a_text():
    """A normalizer that prepends a mark makes a restarted text differ: the whole text is tokenized then."""
    vocab = {chr(code): code - 32 for code in range(32, 127)} | {
        "▁": 200,
        "<u>": 201,
        "<|im_start|>": 202,
        "\n": 203,
    }
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<u>"))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Metaspace()
    fast.add_special_tokens(["<|im_start|>"])
    tokenizer = Tokenizer(
        fast, {}, "A{% for m in messages %}{{ m.role }}<|im_start|>{{ m.content }}{% endfor %}"
    )
    prompt = SystemPrompt.make(tokenizer, "Be kind.")
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "you"}]
    whole = tokenizer.encode(tokenizer.chat_template.render(messages))
    assert [*prompt.token_ids, *prompt.encode("you")] == whole


def test_plain(byte_tokenizer):
    tokenizer = Tokenizer(byte_tokenizer, {"bos_token": "<s>"})
    prompt = SystemPrompt.make(tokenizer, "hello")
    assert prompt.template == "plain"
    assert prompt.token_ids == (tokenizer.bos_id, *tokenizer.encode("hello"))
    assert prompt.encode(" the") == tokenizer.encode(" the")
    without = Tokenizer(byte_tokenizer, {"bos_token": "<s>"}, add_bos=False)
    assert SystemPrompt.make(without, "hello").token_ids == tuple(tokenizer.encode("hello"))
    with pytest.raises(PromptError, match="no chat template"):
        prompt.encode([{"role": "user", "content": "x"}])
    with pytest.raises(PromptError, match="no chat template"):
        SystemPrompt.make(tokenizer, "hello", "chat")


def test_token_ids_are_taken_as_they_are(tokenizer):
    prompt = SystemPrompt.make(tokenizer, "Be kind.")
    assert (
        prompt.encode([5, 6]) == prompt.encode(np.int64([5, 6])) == prompt.encode((5, np.int32(6))) == [5, 6]
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "empty"),
        ([], "empty"),
        (7, "int 7, not a string"),
        (None, "NoneType None, not"),
        (b"x", "bytes"),
        ([1, "x"], "neither of token ids nor of messages"),
        ([True], "neither of token ids"),
        ([1.5], "neither of token ids"),
        ([{"content": "x"}], "neither of token ids nor of messages"),
        ([{"role": "system", "content": "Other."}, {"role": "user", "content": "x"}], "not the one"),
    ],
)
def test_prompts_that_make_no_sense(tokenizer, value, message):
    with pytest.raises(PromptError, match=message):
        SystemPrompt.make(tokenizer, "Be kind.").encode(value)


def test_template_that_prints_the_date(byte_tokenizer, tmp_path):
    """The prefix was rendered at another time than the requests are."""
    tokenizer = chat_tokenizer(byte_tokenizer, DATED)
    made = SystemPrompt.make(tokenizer, "Be kind.")
    later = SystemPrompt(tokenizer, made.text, made.template, made.token_ids, made.rendered_at)
    assert made.encode("hello") == later.encode("hello")
    never = SystemPrompt(tokenizer, made.text, made.template, made.token_ids, "2001-02-03T04:05:06")
    with pytest.raises(PromptError, match="does not begin with the artifact's system prompt"):
        never.encode("hello")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ raise_exception('System role not supported') }}{% endfor %}",
            "role not supported",
        ),
        ("{% for m in messages if m.role == 'user' %}user: {{ m.content }}{% endfor %}", "before the user"),
        ("{% for m in messages | reverse %}{{ m.role }}: {{ m.content }}{% endfor %}", "before the user"),
        ("{{ messages[7].content }}", "refuses the messages"),
        ("{{ range(10 ** 12) | list }}", "refuses the messages"),
    ],
)
def test_templates_that_cannot_share_a_prefix(byte_tokenizer, template, message):
    with pytest.raises(PromptError, match=message):
        SystemPrompt.make(chat_tokenizer(byte_tokenizer, template), "Be kind.")


def test_template_that_does_not_compile(byte_tokenizer):
    with pytest.raises(ArtifactError, match="chat template cannot be compiled"):
        chat_tokenizer(byte_tokenizer, "{% for %}")


def test_template_is_sandboxed(byte_tokenizer):
    tokenizer = chat_tokenizer(byte_tokenizer, "{{ ''.__class__.__mro__ }}{{ messages.append(1) }}")
    with pytest.raises(PromptError, match="refuses"):
        tokenizer.chat_template.render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("template", ["{{ bos_token }}" + CHATML, ELABORATE])
def test_renders_as_transformers_does(template):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [
        {"role": "system", "content": "Be “kind” & <b>"},
        {"role": "skip", "content": "x"},
        {"role": "user", "content": "  hello\n", "name": None},
        {"role": "assistant", "content": "hm"},
        {"role": "user", "content": "again"},
    ]
    expected, _ = utils.render_jinja_template(
        conversations=[[{key: value for key, value in m.items() if value is not None} for m in messages]],
        chat_template=template,
        add_generation_prompt=True,
        bos_token="<s>",
    )
    ours = ChatTemplate(template, {"bos_token": "<s>"})
    assert ours.render(messages) == expected[0]
    if template == ELABORATE:
        assert "03 Feb 2001" in ours.render(messages, datetime(2001, 2, 3))
        with pytest.raises(PromptError, match="no bad roles <here>"):
            ours.render([{"role": "bad", "content": ""}])


def test_tokenizer_files(byte_tokenizer, tmp_path):
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: missing"):
        Tokenizer.open(tmp_path)
    byte_tokenizer.enable_padding()
    byte_tokenizer.enable_truncation(4)
    byte_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "x", "eos_token": "</s>"}')
    config = {"bos_token": {"content": "<s>"}, "chat_template": [{"name": "default", "template": "T"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.open(tmp_path)
    assert tokenizer.bos_id == byte_tokenizer.token_to_id("<s>")
    assert tokenizer.eos_id == byte_tokenizer.token_to_id("</s>")
    assert tokenizer.chat_template.source == "T"
    assert len(tokenizer.encode("a long text")) > 4, "truncation and padding are the trainer's, not ours"
    (tmp_path / "chat_template.jinja").write_text("of the file")
    assert Tokenizer.open(tmp_path).chat_template.source == "of the file"
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"tokenizer_config\.json: not valid JSON"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: cannot be read as a tokenizer"):
        Tokenizer.open(tmp_path)


def test_artifact_without_its_template(artifact, byte_tokenizer):
    with pytest.raises(ArtifactError, match="made with a chat template"):
        SystemPrompt.open(artifact, Tokenizer(byte_tokenizer))
