"""Chats: templates as Hugging Face renders them, and turns that are read from states, exactly as if all were read at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.normalizers import Prepend
from tokenizers.processors import TemplateProcessing

import checkpoints
from linstate import LanguageModel
from linstate.engine import Conversation
from linstate.engine.chat_template import ChatTemplate
from linstate.engine.tokens import encode, first_tokens
from linstate.errors import CheckpointError, InputError
from small_models import build

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "entry 7? "},
    {"role": "assistant", "content": "the red lamp"},
    {"role": "user", "content": "and <b>&8?"},
]


@pytest.fixture
def model(tmp_path: Path) -> LanguageModel:
    return LanguageModel.from_pretrained(checkpoints.write(tmp_path / "m"))


def test_a_template_is_rendered_as_transformers_renders_it(tmp_path: Path, model: LanguageModel) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=model.tokenizer, eos_token="<|end|>")
    source = (
        checkpoints.TEMPLATE
        + "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
    )
    ours = ChatTemplate(source, {"eos_token": "<|end|>"})
    for answer in (True, False):
        expected = theirs.apply_chat_template(
            MESSAGES, chat_template=source, tokenize=False, add_generation_prompt=answer
        )
        assert ours.render(MESSAGES, answer=answer) == expected
    assert '{"role": "system"' in ours.render(MESSAGES)


def test_special_tokens_of_a_template_are_special(model: LanguageModel) -> None:
    tokens = model.chat_tokens(MESSAGES)
    assert tokens.count(0) == 3, "one end for each message but the system's"
    assert model.tokenizer.encode(model.chat_prompt(MESSAGES)).ids.count(0) == 0, (
        "elsewhere they are plain text"
    )


def test_templates_that_cannot_be_used(tmp_path: Path, model: LanguageModel) -> None:
    with pytest.raises(
        InputError, match="is no Jinja template"
    ):  # when it is used, not when its model is loaded
        ChatTemplate("{% if %}", {}).render(MESSAGES)
    with pytest.raises(InputError, match="only one user"):
        ChatTemplate("{{ raise_exception('only one user') }}", {}).render(MESSAGES)
    with pytest.raises(InputError, match="cannot write these messages down"):
        ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}", {}).render(MESSAGES)
    with pytest.raises(InputError, match="has no chat template"):
        build("delta").chat_prompt(MESSAGES)


def test_where_templates_are_found(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "m")
    (folder / "chat_template.jinja").write_text("from a file of its own")
    assert LanguageModel.from_pretrained(folder).chat_prompt(MESSAGES) == "from a file of its own"
    (folder / "chat_template.jinja").unlink()
    named = '{"chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]}'
    (folder / "tokenizer_config.json").write_text(named)
    assert LanguageModel.from_pretrained(folder).chat_prompt(MESSAGES) == "d"
    (folder / "tokenizer_config.json").write_text('{"chat_template": 3}')
    with pytest.raises(CheckpointError, match="chat_template must be text, found int"):
        LanguageModel.from_pretrained(folder)


def answer(model: LanguageModel, conversation: Conversation, count: int = 7) -> Conversation:
    made = model.generate("", conversation.state, max_tokens=count)
    return conversation.answered(made.text, made.ids, made.state)


def test_a_turn_goes_on_where_the_last_ended(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    book = model.read("entry 1: the red lamp has number 3; keep it.\n" * 3)
    asked = Conversation(book).ask(model, "which lamp?")
    said = encode(model.tokenizer, "the red lamp")
    first = asked.answered("the red lamp", said, model.append(said, asked.state))
    read: list[int] = []
    append = model.append

    def counted(ids, state=None):
        ids = list(ids)
        read.append(len(ids))
        return append(ids, state)

    monkeypatch.setattr(model, "append", counted)
    second = first.ask(model, "and which chair?")
    whole = model.chat_tokens(second.messages)
    assert read[0] < len(whole) / 2, "what was said is not read again"
    expected = append(whole, book)
    assert second.state.tail == expected.tail and second.state.position == expected.position
    for name, tensor in second.state.tensors.items():
        assert torch.equal(tensor, expected.tensors[name]), name
    assert first.state is not second.state and len(first.messages) == 2, (
        "the conversation before stays as it is"
    )


def test_a_template_that_changes_the_past_rolls_back(model: LanguageModel) -> None:
    model.chat_template = ChatTemplate(
        "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last or m.role == 'user' else '(cut)' }}\n{% endfor %}",
        {},
    )
    turn = answer(model, Conversation(model.empty_state()).ask(model, "which lamp?"))
    later = turn.ask(model, "and which chair?")
    expected = model.append(model.chat_tokens(later.messages))
    assert later.state.position == expected.position and later.state.tail == expected.tail
    assert all(torch.equal(t, expected.tensors[name]) for name, t in later.state.tensors.items())


def words() -> Tokenizer:
    """A tokenizer that puts a mark before every text, and a begin of text."""
    vocabulary = {
        word: i for i, word in enumerate(["<s>", "▁", "▁a", "▁b", "▁▁b", "a", "b", "\n", "▁\nb", "?"])
    }
    made = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    made.normalizer = Prepend("▁")
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made


def test_a_text_that_goes_on_is_not_begun_anew() -> None:
    tokenizer = words()
    assert first_tokens(tokenizer) == (0,)
    assert encode(tokenizer, "a b") == [2, 3]
    assert encode(tokenizer, " b") == [1, 3], "alone, it is begun"
    assert encode(tokenizer, " b", goes_on=True) == [3], "behind another text, it is not"


def test_a_text_begins_once() -> None:
    plain = build("delta")
    begun = LanguageModel(plain.decoder, Tokenizer.from_str(plain.tokenizer.to_str()), name="m")
    begun.tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    assert plain.first_tokens == () and begun.first_tokens == (0,)
    text = "entry 7: the red lamp"
    state = begun.read(text)
    assert state.tail == (0, *plain.read(text).tail)
    assert begun.read(" has", state).tail == (0, *plain.read(text + " has").tail)
    assert begun.append([5]).tail == (5,), "who gives token ids gives all of them"
