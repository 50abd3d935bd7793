"""``linstate chat``: questions and answers in turn, all of it kept in the state."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from linstate.cli import common
from linstate.errors import InputError, LinstateError

if TYPE_CHECKING:
    from linstate.engine import Conversation, Generation, LanguageModel
    from linstate.state.state import State

EXAMPLES = (
    "linstate chat notes.state",
    "linstate chat notes.state -o talk.state",
    "printf '/read notes.txt\\ncolour of the door\\n' | linstate chat",
)

HELP = """\
Each line is a question; its answer becomes part of the state.
  /read FILE    read a file
  /undo         take the last question or file back
  /fork NAME    keep this point as NAME.state and go on here
  /save [FILE]  save now
  /info         what the state has read
  /quit         save, if there is a file to save to, and end (also Ctrl-D)"""

_UNDO = 100


class Chat:
    """The state of a conversation, and what each line does to it."""

    def __init__(self, model: LanguageModel, state: State, out: Path | None, max_tokens: int) -> None:
        self.model, self.state, self.out, self.max_tokens = model, state, out, max_tokens
        self.conversation: Conversation | None = None
        self.past: list[tuple[State, Conversation | None]] = []
        self.saved = state
        self.commands: dict[str, Callable[[str], str]] = {
            "/read": self.read,
            "/undo": self.undo,
            "/fork": self.fork,
            "/save": self.save,
            "/info": self.info,
            "/help": lambda _: HELP,
        }

    def _go_on(self, state: State, conversation: Conversation | None = None) -> None:
        self.past = [*self.past[1 - _UNDO :], (self.state, self.conversation)]
        self.state, self.conversation = state, conversation

    def line(self, line: str) -> str:
        """Do what a line asks; an answer is streamed, anything else returned. Raises LinstateError, OSError."""
        if not line.startswith("/"):
            self.ask(line)
            return ""
        name, _, rest = line.partition(" ")
        if name not in self.commands:
            return f"there is no {name}; /help lists what there is"
        return self.commands[name](rest.strip())

    def ask(self, question: str) -> None:
        from linstate.engine import Conversation, Generation
        from linstate.engine.asking import question_prompt

        conversation: Conversation | None = None
        stop: tuple[str, ...] = ("\n",)
        if self.model.chat_template is None:
            state = self.model.read(question_prompt(question), self.state)
        else:
            conversation, stop = (self.conversation or Conversation(self.state)).ask(self.model, question), ()
            state = conversation.state
        last = Generation("", (), state)

        def steps() -> Iterator[Generation]:
            nonlocal last
            with suppress(KeyboardInterrupt):  # Ctrl-C cuts the answer short
                for last in self.model.stream(state, max_tokens=self.max_tokens, stop=stop):
                    yield replace(last, text=last.text.lstrip())

        common.stream_text(steps(), stop)
        common.write_text("\n")
        if conversation is not None:
            conversation = conversation.answered(last.text, last.ids, last.state)
        self._go_on(last.state, conversation)

    def read(self, name: str) -> str:
        from linstate.cli.reading import NOTE, Ledger, Reading, Stop
        from linstate.cli.sources import find

        found = find([name], lambda line: print(line, file=sys.stderr))
        if not found:
            return "nothing was read"
        ledger = Ledger.of(self.state.notes)
        if ledger.partial is not None:
            raise InputError(
                "the reading of this state was interrupted; finish it with 'linstate read' first"
            )
        stop = Stop()
        with stop.listening():
            outcome = Reading(self.model, self.state, ledger, found).run(stop, lambda _: None)
        if outcome.ledger.partial is not None:
            return f"{outcome.error or 'stopped'}; the state is as it was"
        self._go_on(replace(outcome.state, notes={**outcome.state.notes, NOTE: outcome.ledger.text()}))
        return f"read {outcome.tokens:,} tokens ({common.size(outcome.bytes)})"

    def undo(self, _: str) -> str:
        if not self.past:
            return "there is nothing to take back"
        self.state, self.conversation = self.past.pop()
        return f"back at position {self.state.position:,}"

    def fork(self, name: str) -> str:
        if not name:
            return "/fork needs a name"
        path = Path(name if name.endswith(".state") else f"{name}.state")
        common.check_output(path, force=False)
        self.state.fork().save(path)
        return f"kept this point as {path}"

    def save(self, name: str) -> str:
        path = Path(name) if name else self.out
        if path is None:
            return "/save needs a file name"
        common.check_output(path, force=False, same_as=self.out)
        written = self.state.save(path)
        self.out, self.saved = path, self.state
        return f"saved {path} ({common.size(written)})"

    def info(self, _: str) -> str:
        from linstate.cli.reading import Ledger

        state = self.state
        read = Ledger.of(state.notes)
        return (
            f"model {state.model_name}, position {state.position:,} tokens, state {common.size(state.nbytes)}, "
            f"{read.count} sources ({common.size(read.bytes)})"
            + (f"; saved to {self.out}" if self.out else "")
        )

    def end(self) -> None:
        """Save, if there is a file to save to and something new."""
        if self.out is not None and self.state is not self.saved:
            common.messages().print(self.save(""), markup=False)


def chat(
    state: Annotated[
        Path | None, typer.Argument(metavar="STATE", help="State to go on from; default an empty one.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Where to save at the end; default STATE itself."),
    ] = None,
    model: common.Model = common.POCKET,
    weights: common.Weights = None,
    dtype: common.Dtype = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 200,
    force: common.Force = False,
) -> None:
    """Ask and read in turn; the conversation becomes part of the state.

    Each line is a question, and its answer is streamed. A model that has a chat template is talked to by it. Lines that begin with a slash are commands: /read FILE, /undo,
    /fork NAME, /save FILE, /info, /help, /quit. At the end the state is saved to --out or back to STATE; without
    either, nothing is kept. Standard input may be a pipe.
    """
    if out is not None:
        common.check_output(out, force=force, same_as=state)
    made = common.load_model(model, weights, dtype)
    loaded = made.load_state(state) if state else made.empty_state()
    chat = Chat(made, loaded, out or state, max_tokens)
    person = sys.stdin.isatty()
    if person:
        with suppress(ImportError):
            import readline  # noqa: F401  (gives input() its line editing)
        common.messages().print(f"{chat.info('')}\n/help lists the commands", markup=False)
    try:
        with _ended_by_sigterm():
            for line in _lines(person):
                if line == "/quit":
                    break
                try:
                    if said := chat.line(line):
                        common.write_text(f"{said}\n")
                except (LinstateError, OSError) as error:
                    if isinstance(error, BrokenPipeError):
                        raise
                    common.messages().print(f"error: {error}", markup=False)
    finally:
        chat.end()


def _lines(person: bool) -> Iterator[str]:
    """Lines that are not empty, until the end of input or Ctrl-C at the prompt."""
    while True:
        try:
            line = input("> ") if person else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if not person and not line:
            return
        if line.strip():
            yield line.strip()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the conversation as /quit does, with exit code 143."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
