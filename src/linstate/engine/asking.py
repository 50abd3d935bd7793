"""The one wording of a question and of its answer, shared by training, evaluation and use.

A question follows the text that was read; the model continues it with the answer and a newline::

    \\n? {question}: {value}\\n

Both pieces begin and end where the tokenizer of the pocket model always cuts, so the token ids of
the pieces put together are the token ids of the whole text.
"""

from __future__ import annotations

__all__ = ["answer_text", "parse_answer", "question_prompt"]


def question_prompt(question: str) -> str:
    """The text to feed after a document so that the model's next tokens are the answer.

    Line breaks inside the question become spaces: a question is one line.

    >>> question_prompt("telnet")
    '\\n? telnet:'
    """
    return f"\n? {' '.join(question.split())}:"


def answer_text(value: str) -> str:
    """The text that follows :func:`question_prompt` when the answer is ``value``.

    >>> answer_text("23/tcp")
    ' 23/tcp\\n'
    """
    return f" {value}\n"


def parse_answer(text: str) -> str:
    """The answer in generated ``text``: everything before the first newline, stripped.

    >>> parse_answer(" 23/tcp\\n\\n? ftp")
    '23/tcp'
    """
    return text.split("\n", 1)[0].strip()
